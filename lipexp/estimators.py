"""scikit-learn estimators: a network that is trained under a Lipschitz bound, and what is proven of it.

Shapes: N rows, D features, C outputs. A fitted estimator is the map x -> f(x - c) with the column means c, and a
network f of stored float32 numbers. The scales of the columns are multiplied into the weights of its first layer,
those of a regression's targets into its last one. So whatever is proven of the weights is proven in the units of
the X and y that `fit` was given, and subtracting c changes no distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from lipexp.config import GROUPS, SETTINGS, conf_dir, one_of, whole
from lipexp.fitting import Array, Option, Rows, node, number_of_python, proven_in_given_units, split, trained
from lipexp.measured.gradients import Maximum
from lipexp.members import Member, build, made_key
from lipexp.norms import UNIT_ROUNDOFF
from lipexp.proven import METHODS, Certificate, Chain, Problem, prove
from lipexp.proven.pairs import pair_constants
from lipexp.proven.radii import certified_radii, predicted
from lipexp.proven.rounding import why_no_radii

LOSSES = {"classification": "hinge", "multiclass": "multi_margin", "regression": "mse"}  # where none is named
ROWS_AT_ONCE = 2**16  # in an evaluation, for the memory that their features take


class LipschitzEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What the classifier and the regressor share. See `LipschitzClassifier` and `LipschitzRegressor`.

    Args:
        act: an option of conf/act/, such as "groupsort" or "relu"; with arguments, {"option": "groupsort",
            "n_groups": 1}; or a class of your own, {"_target_": "my.Class"}. So are the next two.
        constraint: an option of conf/constraint/, such as "spectral" (radii and constants in the 2-norm), "linf"
            ({"option": "linf", "p": "inf"}: in the inf-norm), or "none". "sll", "cpl" and "sandwich" need
            act="relu" or another one with slopes in [0, 1].
        loss: an option of conf/loss/ that fits the task. None: "hinge" for two classes and "multi_margin" for
            several, whose accuracy is higher than that of cross-entropy at its default temperature; "mse" for a
            regression.
        lipschitz: the bound L under which the network is trained, for standardised features (and targets).
        width: features of a hidden layer.
        depth: hidden layers.
        widths: features of each hidden layer, such as [128, 32], instead of `width` and `depth`.
        lr: learning rate of Adam at the start; it falls to zero along a cosine.
        steps: optimiser steps.
        batch_size: rows per step; all of them if there are less.
        eval_every: steps between two checkpoints.
        validation_fraction: of the rows are not trained on. They choose the checkpoint that is kept and the
            temperature of `predict_proba`. 0: none; then the last network is kept.
        keep: "best", the checkpoint with the best score on validation, or "last".
        patience: checkpoints in a row that are no better, after which training stops; 0: never.
        standardize: subtract the means of the training rows' features (and of a regression's targets) and divide
            by their standard deviations.
        method: what proves the Lipschitz constant: "product" of the layers' norms, which takes no time, another
            method of `lipexp certify --method`, or "best", the best of all, which may take a minute.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        threads: CPU threads; these networks are too small to gain from more.
        random_state: of the split, the first weights and the batches; an int for the same network at every call.

    Raises:
        ConfigError: (a ValueError) at `fit`, for a parameter that is not allowed.
    """

    def __init__(
        self,
        act: Option = "groupsort",
        constraint: Option = "spectral",
        loss: Option | None = None,
        lipschitz: float = 1.0,
        width: int = 64,
        depth: int = 2,
        widths: Sequence[int] | None = None,
        lr: float = 0.01,
        steps: int = 300,
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
        self.widths = widths
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

    def _train(self, x: Array, y: Array, task: str, n_outputs: int) -> tuple[Array, Certificate]:
        """Train on points (N, D) and targets (N,) or (N, C), and set the attributes of the fitted network.

        Returns:
            The indices of the rows for validation, or of all rows where there are none; and what is proven.
        """
        method = None if self.method == "best" else one_of("method", self.method, ["best", *METHODS])
        seed = int(check_random_state(self.random_state).randint(2**31))
        train, val = split(y, task, number_of_python(self.validation_fraction), seed)
        features, targets = (
            StandardScaler(with_mean=wanted, with_std=wanted)
            for wanted in (self.standardize, self.standardize and task == "regression")
        )
        features.fit(x[train])
        targets.fit(y[train].reshape(len(train), -1))
        z, t = features.transform(x), targets.transform(y.reshape(len(y), -1)).reshape(y.shape)
        member = self._member(Rows(task, n_outputs, (z[train], t[train]), (z[val], t[val])), seed)
        constraint = member.parts["constraint"]
        self.network_ = proven_in_given_units(trained(member), constraint, features.scale_, targets.scale_)
        if not self.network_.is_finite(0):
            raise ValueError("the scales of X or y are too far from 1 for a network in float32")
        self.center_ = np.zeros(x.shape[1]) if features.mean_ is None else features.mean_
        self.offset_ = np.zeros(n_outputs) if targets.mean_ is None else targets.mean_
        self.p_ = float(constraint.p)
        moved = torch.from_numpy(x - self.center_)
        box = moved.amin(dim=0), moved.amax(dim=0)
        chain = Chain.of(constraint, self.network_.layers)
        problem = Problem(self.network_, chain, box, Maximum(0.0, ()), member.config.max_regions)
        certificate = prove(problem, method)
        self.lipschitz_ = np.inf if certificate.value is None else certificate.value
        return (val if len(val) else np.arange(len(x))), certificate

    def _member(self, dataset: Rows, seed: int) -> Member:
        """The parameters and the data as one run of lipexp."""
        given: Any = OmegaConf.load(conf_dir() / "config.yaml")
        settings = {key: given[key] for key in SETTINGS if key not in GROUPS}
        settings |= {name: number_of_python(value) for name, value in vars(self).items() if name in settings}
        whole("batch_size", settings["batch_size"], least=1)
        settings |= {"seed": seed, "batch_size": min(settings["batch_size"], dataset.n_train)}
        if not dataset.n_val:  # nothing to choose by
            settings |= {"keep": "last", "patience": 0, "eval_every": 0}
        choices: dict[str, Option] = {
            "act": self.act,
            "constraint": self.constraint,
            "loss": LOSSES[dataset.task] if self.loss is None else self.loss,
            "model": {"option": "mlp", "width": self.width, "depth": self.depth, "widths": self.widths},
            "optim": {"option": "adam", "lr": self.lr},
        }
        nodes = {group: node(group, choice, settings["lipschitz"]) for group, choice in choices.items()}
        nodes["dataset"] = {"_target_": f"{__name__}.Rows"}
        names = {
            group: choice if isinstance(choice, str) else choice.get("option") for group, choice in choices.items()
        }
        made: dict[str, Any] = {made_key("dataset", nodes["dataset"]): dataset}
        return build(settings | nodes, names | {"dataset": "X"}, made=made)

    def _centered(self, X: Any) -> Array:
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False) - self.center_

    def _outputs(self, centered: Array) -> Array:
        """f (N, C) at points from which the center is subtracted, in float64."""
        return _by_parts(lambda part: self.network_.double(part[None])[0].numpy(), centered)


class LipschitzClassifier(ClassifierMixin, LipschitzEstimator):  # type: ignore[misc]
    """A classifier with a certified radius around each row, within which its prediction cannot change.

    >>> from sklearn.datasets import make_moons
    >>> from lipexp import LipschitzClassifier
    >>> X, y = make_moons(300, noise=0.1, random_state=0)
    >>> model = LipschitzClassifier(random_state=0).fit(X, y)
    >>> radius = model.certified_radius(X)
    >>> certain = (model.predict(X) == y) & (radius > 0.05)  # right, and still so if a row moves by 0.05
    >>> bool(certain.mean() > 0.9)
    True

    The parameters are those of `LipschitzEstimator`.

    Attributes:
        classes_: the classes, in sorted order.
        lipschitz_: a proven bound on the Lipschitz constant of the decision function, for the norm `p_` in the
            units of the X that `fit` was given. With several classes its values are vectors, in the inf-norm
            under constraint="linf", in the 1-norm under "one", and else in the 2-norm. inf: nothing is proven.
        pair_lipschitz_: with several classes, (C, C) a bound for the difference of each two outputs, else None.
        p_: the norm in which rows move: 1, 2 or inf.
        temperature_: T of `predict_proba`.
        network_: f, a `lipexp.networks.BakedNetwork` of rows from which `center_` (D,) is subtracted.

    A network with the constant L for standardised features z = (x - c) / s has the constant L / min_k s_k for x,
    as ||z' - z||_p <= ||x' - x||_p / min_k s_k. `lipschitz_` is proven from the weights divided by s, and is no
    larger than that but for their rounding to float32.
    """

    def fit(self, X: Any, y: Any) -> LipschitzClassifier:
        """Train on rows X (N, D), which must be finite, and their classes y (N,), at least two different ones."""
        x, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        n_classes = len(self.classes_)
        if n_classes < 2:
            raise ValueError(f"y has one class only, {self.classes_[0]}; a classifier needs at least two")
        task, n_outputs = ("classification", 1) if n_classes == 2 else ("multiclass", n_classes)
        rows, certificate = self._train(x, codes, task, n_outputs)
        several = n_classes > 2 and certificate.value is not None
        self.pair_lipschitz_ = pair_constants(self.network_, certificate).constants if several else None
        self.temperature_ = _temperature(self._outputs(x[rows] - self.center_), codes[rows])
        return self

    def decision_function(self, X: Any) -> Array:
        """f: (N,), positive for `classes_[1]`; with several classes (N, C), of which the largest decides."""
        f = self._outputs(self._centered(X))
        return f[:, 0] if f.shape[1] == 1 else f

    def predict(self, X: Any) -> Array:
        """The class of each row, (N,)."""
        f = self._outputs(self._centered(X))
        return self.classes_[predicted(f)]

    def predict_proba(self, X: Any) -> Array:
        """(N, C) softmax(T f), for two classes sigmoid(T f) of the second one.

        T, the attribute `temperature_`, makes the classes of the validation rows the most likely, or those of all
        rows if there are no validation rows.
        """
        f = self._outputs(self._centered(X))
        return softmax(self.temperature_ * _logits(f), axis=1)

    def certified_radius(self, X: Any) -> Array:
        """(N,) how far each row can move in the norm `p_`, in the units of X, before its prediction can change.

        For two classes it is |f| / `lipschitz_`; for several the smallest (f_c - f_j) / `pair_lipschitz_[c, j]`
        over all classes j but the predicted one, c. Bounds on the rounding errors are subtracted, so that it holds
        for the stored weights in real arithmetic. It is 0 where nothing is proven.
        """
        points = self._centered(X)
        if not np.isfinite(self.lipschitz_) or why_no_radii(self.network_) is not None:
            return np.zeros(len(points))
        constants = self.lipschitz_ if self.pair_lipschitz_ is None else self.pair_lipschitz_
        radius = _by_parts(lambda part: certified_radii(self.network_, part, constants).radius, points)
        # x - c is rounded: each coordinate is off by at most a half unit in its last place.
        lost = 2 * UNIT_ROUNDOFF * np.linalg.norm(points, ord=self.p_, axis=1)
        return np.maximum(np.nextafter(radius - lost, 0), 0)


class LipschitzRegressor(RegressorMixin, LipschitzEstimator):  # type: ignore[misc]
    """A regression, of one target or of several, that moves by no more than `lipschitz_` times what its row moves.

    >>> import numpy as np
    >>> from sklearn.datasets import load_diabetes
    >>> from lipexp import LipschitzRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = LipschitzRegressor(random_state=0).fit(X, y)
    >>> step = np.full(X.shape[1], 0.01)
    >>> change = model.predict(X + step) - model.predict(X)
    >>> bool(np.abs(change).max() <= model.lipschitz_ * np.linalg.norm(step))
    True

    The parameters are those of `LipschitzEstimator`.

    Attributes:
        lipschitz_: a proven bound on the Lipschitz constant of the map X -> y, in the units of both, for the norm
            `p_` of a row. Several targets are vectors, in the inf-norm under constraint="linf", in the 1-norm
            under "one", and else in the 2-norm. inf: nothing is proven.
        p_: the norm in which rows move: 1, 2 or inf.
        network_: f, a `lipexp.networks.BakedNetwork` of rows from which `center_` (D,) is subtracted, for targets
            from which `offset_` (C,) is subtracted.

    With features of scales s and targets of scales t the constant is at most L max_c t_c / min_k s_k, but for
    rounding: see `LipschitzClassifier`.
    """

    def fit(self, X: Any, y: Any) -> LipschitzRegressor:
        """Train on rows X (N, D) and targets y (N,) or (N, C), all finite."""
        x, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        self.y_ndim_ = y.ndim
        y = np.asarray(y, dtype=np.float64)
        n_outputs = 1 if y.ndim == 1 else y.shape[1]
        self._train(x, y.ravel() if n_outputs == 1 else y, "regression", n_outputs)
        return self

    def predict(self, X: Any) -> Array:
        """The targets of each row, in the shape in which `fit` was given them, (N,) or (N, C)."""
        y = self._outputs(self._centered(X)) + self.offset_
        return y[:, 0] if self.y_ndim_ == 1 else y

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _by_parts(function: Callable[[Tensor], Array], points: Array) -> Array:
    parts = gen_batches(len(points), ROWS_AT_ONCE)
    return np.concatenate([function(torch.from_numpy(points[part])) for part in parts])


def _logits(f: Array) -> Array:
    """Outputs (N, C) with a column for each class: (0, f) for the single output of two classes."""
    return np.hstack([np.zeros_like(f), f]) if f.shape[1] == 1 else f


def _temperature(f: Array, classes: Array) -> float:
    """The T for which softmax(T f) makes the classes of N rows the most likely, of outputs f (N, 1) or (N, C).

    So that T stays finite where no row is wrong, the class of a row counts (N + 1) / (N + C) and each other class
    1 / (N + C).

    Reference: Guo et al. 2017, "On calibration of modern neural networks" (arXiv 1706.04599), section 4.2.
    """
    logits = _logits(f)
    n, n_classes = logits.shape
    share = np.full(logits.shape, 1 / (n + n_classes))
    share[np.arange(n), classes] = (n + 1) / (n + n_classes)
    unit = float(np.abs(logits).max()) or 1.0

    def surprise(log_t: float) -> float:
        return -float((share * log_softmax(np.exp(log_t) / unit * logits, axis=1)).sum())

    return float(np.exp(minimize_scalar(surprise, bounds=(-10, 10), method="bounded").x) / unit)
