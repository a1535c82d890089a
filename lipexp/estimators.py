"""scikit-learn estimators: a Lipschitz network that is trained by the loop of lipexp, and its certified radii.

Shapes: N rows, D features, C outputs. A fitted estimator is the map x -> f(x - center) with `center_` (D,) and a
network f of stored float32 numbers. That it standardises its input is part of f: the scales are multiplied into
the weights of the first layer, those of a regression's targets into the last one. So everything that is proven of
f is proven in the units of the X that `fit` was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from omegaconf import OmegaConf
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from lipexp.config import GROUPS, SETTINGS, ConfigError, conf_dir, number, one_of, plain
from lipexp.datasets import Data, Dataset
from lipexp.loop import Checkpoint, Value, fit
from lipexp.measured.gradients import Maximum
from lipexp.members import Member, build, made_key, stack
from lipexp.networks import Affine, BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF
from lipexp.process import cpu_threads
from lipexp.proven import METHODS, Certificate, Chain, Problem, prove
from lipexp.proven.radii import certified_radii, why_no_radii
from lipexp.tasks import TASKS, squeezed

Array = npt.NDArray[Any]
Option = str | Mapping[str, Any]

LOSSES = {"classification": "hinge", "multiclass": "multi_margin", "regression": "mse"}  # where none is named
ROWS_AT_ONCE = 2**16  # that are evaluated, for the memory that their features take


class Rows(Dataset):
    """The rows that `fit` has split into training and validation; there is no test part."""

    def __init__(self, task: str, n_outputs: int, train: tuple[Array, Array], val: tuple[Array, Array]) -> None:
        self.task, self.n_outputs, self.n_inputs = task, n_outputs, train[0].shape[1]
        self.n_train, self.n_val = len(train[0]), len(val[0])
        self._data = Data(*train, *val, train[0][:0], train[1][:0])

    def draw(self, stream: np.random.SeedSequence) -> Data:
        return self._data


class _Lipschitz(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What both estimators share: their parameters, the training, and the network in the units of X."""

    def __init__(
        self,
        act: Option = "groupsort",
        constraint: Option = "spectral",
        loss: Option | None = None,
        lipschitz: float = 1.0,
        width: int = 64,
        depth: int = 2,
        lr: float = 0.01,
        steps: int = 500,
        batch_size: int = 256,
        eval_every: int = 50,
        validation_fraction: float = 0.1,
        keep: str = "best",
        patience: int = 0,
        standardize: bool = True,
        method: str = "product",
        device: str = "auto",
        threads: int = 1,
        random_state: Any = None,
    ) -> None:
        self.act = act
        self.constraint = constraint
        self.loss = loss
        self.lipschitz = lipschitz
        self.width = width
        self.depth = depth
        self.lr = lr
        self.steps = steps
        self.batch_size = batch_size
        self.eval_every = eval_every
        self.validation_fraction = validation_fraction
        self.keep = keep
        self.patience = patience
        self.standardize = standardize
        self.method = method
        self.device = device
        self.threads = threads
        self.random_state = random_state

    def _train(self, x: Array, y: Array, task: str, n_outputs: int) -> Array:
        """Train on points (N, D) and targets, prove, and set the attributes of the fitted network.

        Returns:
            The indices of the rows that were kept for validation; all rows where none were.
        """
        method = None if self.method == "best" else one_of("method", self.method, list(METHODS))
        seed = int(check_random_state(self.random_state).randint(2**31))
        train, val = self._split(y, task, seed)
        scaler = StandardScaler(with_mean=self.standardize, with_std=self.standardize).fit(x[train])
        self.center_ = np.zeros(x.shape[1]) if scaler.mean_ is None else scaler.mean_
        z = scaler.transform(x)
        target = StandardScaler(with_mean=self.standardize, with_std=self.standardize)
        if task == "regression":
            y = target.fit(y[train].reshape(len(train), -1)).transform(y.reshape(len(y), -1)).reshape(y.shape)
        member = self._member(Rows(task, n_outputs, (z[train], y[train]), (z[val], y[val])), seed)
        trained = _fitted(member)
        scales = _ones_if_none(scaler, x.shape[1]), _ones_if_none(target, n_outputs)
        constraint = member.parts["constraint"]
        self.network_ = constraint.prove(_in_given_units(trained, *scales))
        self.p_ = float(constraint.p)
        points = torch.from_numpy(x - self.center_)
        chain = Chain.of(constraint, len(trained.layers))
        box = points.amin(dim=0), points.amax(dim=0)
        problem = Problem(self.network_, chain, box, Maximum(0.0, ()), member.config.max_regions)
        self._take(prove(problem, method))
        self._offset = np.zeros(n_outputs) if getattr(target, "mean_", None) is None else target.mean_
        return val if len(val) else np.arange(len(x))

    def _take(self, certificate: Certificate) -> None:
        """Set what is proven."""
        self.lipschitz_ = np.inf if certificate.value is None else certificate.value

    def _split(self, y: Array, task: str, seed: int) -> tuple[Array, Array]:
        """The indices of the rows for training and for validation, stratified by class.

        A class with a single row stays in training. There is no validation where it would have less than one row,
        or less than one of each other class.
        """
        fraction = number("validation_fraction", _plain(self.validation_fraction), least=0, most=0.9)
        rows, n_val = np.arange(len(y)), int(fraction * len(y))
        classes = y.astype(int) if TASKS[task].has_classes else None
        single = np.zeros(len(y), dtype=bool) if classes is None else np.bincount(classes)[classes] < 2
        kinds = 1 if classes is None else len(np.unique(classes[~single]))
        if n_val < max(1, kinds) or len(y) - n_val - single.sum() < kinds:
            return rows, rows[:0]
        of_class = None if classes is None else classes[~single]
        train, val = train_test_split(rows[~single], test_size=n_val, stratify=of_class, random_state=seed)
        return np.sort(np.concatenate([train, rows[single]])), np.sort(val)

    def _member(self, dataset: Rows, seed: int) -> Member:
        """The parameters and the data as one run of lipexp."""
        given: Any = OmegaConf.load(conf_dir() / "config.yaml")
        settings = {key: given[key] for key in SETTINGS if key not in GROUPS}
        settings |= {name: _plain(getattr(self, name)) for name in settings.keys() & self.get_params().keys()}
        settings |= {"seed": seed, "batch_size": min(settings["batch_size"], dataset.n_train)}
        if not dataset.n_val:  # nothing to choose by
            settings |= {"keep": "last", "patience": 0, "eval_every": 0}
        choices: dict[str, Option] = {
            "act": self.act,
            "constraint": self.constraint,
            "loss": LOSSES[dataset.task] if self.loss is None else self.loss,
            "model": {"option": "mlp", "width": _plain(self.width), "depth": _plain(self.depth)},
            "optim": {"option": "adam", "lr": _plain(self.lr)},
        }
        nodes = {group: _node(group, choice, settings["lipschitz"]) for group, choice in choices.items()}
        nodes["dataset"] = {"_target_": f"{__name__}.Rows"}
        names = {"dataset": "X"} | {group: _name(choice) for group, choice in choices.items()}
        return build(settings | nodes, names, made={made_key("dataset", nodes["dataset"]): dataset})

    def _centered(self, X: Any) -> Array:
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False) - self.center_

    def _outputs(self, X: Any) -> Array:
        """f (N, C) in float64."""
        return self._outputs_at(self._centered(X))

    def _outputs_at(self, points: Array) -> Array:
        return self._by_parts(lambda part: self.network_.double(part[None])[0].numpy(), points)

    @staticmethod
    def _by_parts(function: Callable[[Tensor], Array], points: Array) -> Array:
        parts = gen_batches(len(points), ROWS_AT_ONCE)
        return np.concatenate([function(torch.from_numpy(points[part])) for part in parts])


class LipschitzClassifier(ClassifierMixin, _Lipschitz):  # type: ignore[misc]
    def fit(self, X: Any, y: Any) -> LipschitzClassifier:
        x, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        n_classes = len(self.classes_)
        if n_classes < 2:
            raise ValueError(f"y holds one class only, {self.classes_[0]!r}; a classifier needs at least two classes")
        task, n_outputs = ("classification", 1) if n_classes == 2 else ("multiclass", n_classes)
        held = self._train(x, codes, task, n_outputs)
        self.temperature_ = _temperature(self._outputs_at(x[held] - self.center_), codes[held])
        return self

    def decision_function(self, X: Any) -> Array:
        f = self._outputs(X)
        return f[:, 0] if f.shape[1] == 1 else f

    def predict(self, X: Any) -> Array:
        f = self._outputs(X)
        decided = (f[:, 0] > 0).astype(int) if f.shape[1] == 1 else f.argmax(axis=1)
        return self.classes_[decided]

    def predict_proba(self, X: Any) -> Array:
        f = self._outputs(X)
        return softmax(self.temperature_ * _logits(f), axis=1)

    def certified_radius(self, X: Any) -> Array:
        points = self._centered(X)
        if not np.isfinite(self.lipschitz_) or why_no_radii(self.network_) is not None:
            return np.zeros(len(points))
        radius = self._by_parts(
            lambda part: certified_radii(self.network_, part, self.lipschitz_).radius, points
        )
        shift = 2 * UNIT_ROUNDOFF * np.linalg.norm(points, ord=self.p_, axis=1)
        return np.maximum(0, np.nextafter(radius - shift, 0))


class LipschitzRegressor(RegressorMixin, _Lipschitz):  # type: ignore[misc]
    def fit(self, X: Any, y: Any) -> LipschitzRegressor:
        x, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        y = y.astype(np.float64)
        self._one_dimensional = y.ndim == 1
        self._train(x, y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y, "regression", 1 if y.ndim == 1 else y.shape[1])
        return self

    def predict(self, X: Any) -> Array:
        found = self._outputs(X) + self._offset
        return found[:, 0] if self._one_dimensional else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _fitted(member: Member) -> BakedNetwork:
    """The network of one run, trained by the loop of all runs.

    Raises:
        ValueError: its numbers stop being finite.
    """
    run, config = stack([member]), member.config
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device
    x, y = (torch.from_numpy(part).double()[None] for part in run.data[0].part("val"))
    score, sign = run.task.scores[run.task.metric], 1 if run.task.larger_is_better else -1

    def evaluate(checkpoint: Checkpoint) -> list[Value | None]:
        if checkpoint.failures or not x.numel():
            return [None]
        f = squeezed(checkpoint.network.double(x))
        return [(sign * float(score(f, y)), -float(run.loss(f, y).mean()))]

    with cpu_threads(config.threads):
        last = fit(run, evaluate, device="cpu" if device == "auto" else device)
    if last.failures:
        raise ValueError(f"training failed: {last.failures[0].reason} at step {last.failures[0].step}")
    return last.network


def _in_given_units(network: BakedNetwork, x_scale: Array, y_scale: Array) -> BakedNetwork:
    """The network x -> y_scale f(x / x_scale), its weights rounded to float32."""
    layers = list(network.layers)
    weight, bias = layers[0]
    layers[0] = Affine((weight.double() / torch.from_numpy(x_scale)).float(), bias)
    weight, bias = layers[-1]
    scale = torch.from_numpy(y_scale)
    layers[-1] = Affine((weight.double() * scale[:, None]).float(), (bias.double() * scale).float())
    return BakedNetwork(layers, network.act)


def _logits(f: Array) -> Array:
    """Outputs (N, C) with one column for each class: (0, f) for the single output of two classes."""
    return np.hstack([np.zeros_like(f), f]) if f.shape[1] == 1 else f


def _temperature(f: Array, classes: Array) -> float:
    """The T for which the probabilities softmax(T f) of the classes are the most likely.

    Of n rows the class counts (n + 1) / (n + C) and each other one 1 / (n + C): so T stays finite where no row is
    wrong.

    Reference: Guo et al. 2017, "On calibration of modern neural networks" (arXiv 1706.04599), section 4.2.
    """
    logits = _logits(f)
    n, n_classes = logits.shape
    share = np.full(logits.shape, 1 / (n + n_classes))
    share[np.arange(n), classes] = (n + 1) / (n + n_classes)
    unit = np.abs(logits).max() or 1.0

    def unlikely(log_t: float) -> float:
        return float(-(share * log_softmax(np.exp(log_t) / unit * logits, axis=1)).mean())

    return float(np.exp(minimize_scalar(unlikely, bounds=(-7, 7), method="bounded").x) / unit)


def _node(group: str, choice: Option, lipschitz: float) -> dict[str, Any]:
    """The configuration node of an option of conf/, or of a class with its arguments.

    Raises:
        ConfigError: there is no such option.
    """
    arguments = {"option": choice} if isinstance(choice, str) else {key: _plain(v) for key, v in dict(choice).items()}
    node: dict[str, Any] = {}
    if "option" in arguments:
        folder = conf_dir() / group
        option = one_of(group, arguments.pop("option"), sorted(path.stem for path in folder.glob("*.yaml")))
        leaf = OmegaConf.create({"lipschitz": lipschitz, group: OmegaConf.load(folder / f"{option}.yaml")})
        node = plain(leaf[group])
    return node | arguments


def _name(choice: Option) -> str:
    return choice if isinstance(choice, str) else str(choice.get("option") or choice.get("_target_"))


def _plain(value: Any) -> Any:
    """A number of numpy, such as one of np.logspace, as one of Python."""
    return value.item() if isinstance(value, np.generic) else value


def _ones_if_none(scaler: StandardScaler, n: int) -> Array:
    found = getattr(scaler, "scale_", None)
    return np.ones(n) if found is None else np.asarray(found)
