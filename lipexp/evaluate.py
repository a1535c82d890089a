"""Baked networks and data -> what is reported: one record a run.

Shapes: K runs, N points, D inputs. Everything here is computed in float64 from the stored float32 weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipexp import regions
from lipexp.activations import PiecewiseLinear
from lipexp.bounds import Certificate, Problem, product_certificate, prove
from lipexp.certificates import dual, norm_name
from lipexp.loop import Checkpoint, Stack, generator
from lipexp.losses import difference_of_means
from lipexp.measures import Maximum, MeasuredNetwork, Scan, grid, largest, norms, scan
from lipexp.models import Layer, run_layers
from lipexp.robustness import Robustness, assess
from lipexp.search import search, starts

NORMS = (1.0, 2.0, math.inf)


@dataclass
class Record:
    """What one finished run reports."""

    train: dict[str, float]
    test: dict[str, float]
    gradient_norm: dict[str, Any]
    certificate: Certificate
    measured: Maximum
    search: dict[str, Any]
    gradients: dict[str, npt.NDArray[Any]]  # the columns of gradients.csv
    layers: list[dict[str, Any]]  # the rows of layers.csv
    robustness: Robustness | None  # None for a regression


class Evaluator:
    """Evaluates the checkpoints of one stack, whose data it holds in float64."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.n_train = len(stack.data[0].train_x)
        self.x = _stacked([np.concatenate([data.train_x, data.test_x]) for data in stack.data])  # (K, N, D)
        self.y = _stacked([np.concatenate([data.train_y, data.test_y]) for data in stack.data])  # (K, N)
        self.has_classes = stack.task != "regression"
        self.metric = {"classification": "accuracy", "transport": "score"}.get(stack.task, "mse")
        self._last: tuple[Checkpoint, Scan] | None = None

    def history(self, checkpoint: Checkpoint) -> list[dict[str, float | None]]:
        """One line of history.csv a run; failed runs get an empty one."""
        scanned = self._scan(checkpoint)
        scores = self._scores(scanned.f)
        rows: list[dict[str, float | None]] = []
        for run in range(len(self.x)):
            if run in checkpoint.failures:
                rows.append({})
                continue
            train, test = scores[run]
            certificate = self.certify(checkpoint, run)
            network = MeasuredNetwork(checkpoint.layers, checkpoint.act, run)
            steepest = largest(network, self.x[run], scanned.gradient[run], certificate.q)
            rows.append(
                {
                    "step": checkpoint.step,
                    "train_loss": train["loss"],
                    "test_loss": test["loss"],
                    f"test_{self.metric}": test[self.metric],
                    "grad_max": steepest.value if steepest else None,
                    "certified": certificate.value,
                }
            )
        return rows

    def final(self, checkpoint: Checkpoint) -> list[Record | None]:
        """The full record of each run, None for failed ones."""
        constraint, layers, act = self.stack.constraint, checkpoint.layers, checkpoint.act
        scanned = self._scan(checkpoint)
        generators = [generator(s.search) for s in self.stack.streams]
        sources = {"data": (self.x, scanned.gradient)}
        low, high = self.x.amin(dim=1), self.x.amax(dim=1)  # (K, D)
        points = grid(low, high, generators)
        if points is not None:
            sources["grid"] = (points, scan(layers, act, points).gradient)
        found = search(layers, act, self.x, scanned.gradient, constraint.q, generators)
        sources["search"] = (found, scan(layers, act, found).gradient)
        scores, constants = self._scores(scanned.f), self._constants(checkpoint)
        return [
            None
            if run in checkpoint.failures
            else self._record(checkpoint, run, scanned, sources, scores[run], constants.get(run))
            for run in range(len(self.x))
        ]

    def _constants(self, checkpoint: Checkpoint) -> dict[int, regions.Constants | None]:
        """The exact constants that are found together in less time than one after the other, by run."""
        layers, act = checkpoint.layers, checkpoint.act
        runs = [run for run in range(len(self.x)) if run not in checkpoint.failures]
        if len(runs) < 2 or self.stack.max_regions == 0 or regions.refusal(layers, act) is not None:
            return {}
        boxes = [(low.numpy(), high.numpy()) for low, high in (_box(self.x[run]) for run in runs)]
        chosen = [Layer(weight[runs], bias[runs]) for weight, bias in layers]
        q, act = self.stack.constraint.q, cast(PiecewiseLinear, act)
        return dict(
            zip(runs, regions.constants_together(chosen, act, boxes, q, self.stack.max_regions), strict=True)
        )

    def _scan(self, checkpoint: Checkpoint) -> Scan:
        """f and its gradients at the data. The last checkpoint is reported twice, and scanned once."""
        if self._last is None or self._last[0] is not checkpoint:
            is_last = checkpoint.step == self.stack.steps  # only then somebody asks for the hidden gradients
            hidden_q = dual(self.stack.constraint.hidden_p) if is_last else None
            self._last = (checkpoint, scan(checkpoint.layers, checkpoint.act, self.x, hidden_q))
        return self._last[1]

    def certify(self, checkpoint: Checkpoint, run: int) -> Certificate:
        return product_certificate(self.stack.constraint, self.stack.act, checkpoint.layers, run)

    def _prove(
        self, checkpoint: Checkpoint, run: int, measured: Maximum, constants: regions.Constants | None = None
    ) -> Certificate:
        """The best bound that is proven for the finished network.

        Baking answers for the product. Where that breaks L, no tighter bound hides it.
        """
        constraint = self.stack.constraint
        product = self.certify(checkpoint, run)
        if product.verdict(measured.value) == "FAIL":
            return product
        return prove(
            Problem(
                run_layers(checkpoint.layers, run),
                checkpoint.act,
                constraint,
                product,
                _box(self.x[run]),
                measured,
                self.stack.max_regions,
                constants=constants,
            )
        )

    def _robustness(self, checkpoint: Checkpoint, run: int, certificate: Certificate) -> Robustness | None:
        if self.metric != "accuracy":
            return None
        layers, test = run_layers(checkpoint.layers, run), slice(self.n_train, None)
        return assess(layers, checkpoint.act, self.x[run, test], self.y[run, test], certificate)

    def _scores(self, f: Tensor) -> list[tuple[dict[str, float], dict[str, float]]]:
        """(train, test) loss and metric of each run for outputs f (K, N)."""
        parts = [
            {"loss": self.stack.loss(f_part, y).mean(dim=1), self.metric: _METRICS[self.metric](f_part, y)}
            for f_part, y in zip(self._split(f), self._split(self.y), strict=True)
        ]
        train, test = ([dict(zip(part, row, strict=True)) for row in _rows_of(part)] for part in parts)
        return list(zip(train, test, strict=True))

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The train and the test part of (K, N)."""
        return values[:, : self.n_train], values[:, self.n_train :]

    def _record(
        self,
        checkpoint: Checkpoint,
        run: int,
        scanned: Scan,
        sources: dict[str, tuple[Tensor, Tensor]],
        scores: tuple[dict[str, float], dict[str, float]],
        constants: regions.Constants | None,
    ) -> Record:
        q = self.stack.constraint.q
        network = MeasuredNetwork(checkpoint.layers, checkpoint.act, run)

        def steepest(source: str, norm: float) -> Maximum | None:
            points, gradients = sources[source]
            return largest(network, points[run], gradients[run], norm)

        by = {source: found for source in sources if (found := steepest(source, q)) is not None}
        # A network whose points all lie on kinks has shown no slope; 0 is a lower bound of anything.
        measured = max(by.values(), key=lambda m: m.value, default=Maximum(0.0, ()))
        at_data = scanned.gradient[run]  # (N, D)
        sizes = {q_: norms(at_data, q_) for q_ in NORMS}
        in_norm = {
            str(norm_name(q_)): found.value
            for q_ in NORMS
            if (found := by.get("data") if q_ == q else steepest("data", q_)) is not None
        }
        spread = sizes[q].quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
        x = self.x[run].numpy()
        certificate = self._prove(checkpoint, run, measured, constants)
        box = [[float(low), float(high)] for low, high in zip(x.min(axis=0), x.max(axis=0), strict=True)]
        return Record(
            train=scores[0],
            test=scores[1],
            gradient_norm={
                "q": norm_name(q),
                "max": measured.value,
                "mean": float(sizes[q].mean()),
                "median": spread[1],
                "p05": spread[0],
                "p95": spread[2],
                "argmax": list(measured.point),
                "by": {source: found.value for source, found in by.items()},
                "data_max": in_norm,
            },
            certificate=certificate,
            measured=measured,
            search={
                "box": box,
                "starts": starts(x.shape[1]),
                "seed": int(self.stack.streams[run].search.generate_state(1, np.uint64)[0]),
            },
            gradients={
                "split": np.where(np.arange(len(x)) < self.n_train, "train", "test"),
                **{f"x{i}": x[:, i] for i in range(x.shape[1])},
                "y": self.y[run].numpy().astype(np.int64 if self.has_classes else np.float64),
                "f": scanned.f[run].numpy(),
                **{f"grad_{norm_name(q_)}": sizes[q_].numpy() for q_ in NORMS},
            },
            layers=self._layer_rows(checkpoint, run, certificate, [sizes[q], *(h[run] for h in scanned.hidden)]),
            robustness=self._robustness(checkpoint, run, certificate),
        )

    def _layer_rows(
        self, checkpoint: Checkpoint, run: int, certificate: Certificate, gradient_norms: Sequence[Tensor]
    ) -> list[dict[str, Any]]:
        """One row a layer: its norm and bound, its singular values, and the gradient norm (N,) at its input."""
        constraint = self.stack.constraint
        layers = run_layers(checkpoint.layers, run)
        rows = []
        for i, (norm, layer) in enumerate(zip(constraint.norms(len(layers)), layers, strict=True)):
            singular = torch.linalg.svdvals(layer.weight[0].double())
            # The space at the input of layer i has norm p for the first layer, hidden_p afterwards; gradients
            # are measured in its dual.
            input_dual = dual(constraint.p if i == 0 else constraint.hidden_p)
            rows.append(
                {
                    "layer": i,
                    "out": layer.weight.shape[1],
                    "in": layer.weight.shape[2],
                    "norm": norm.name,
                    "operator_norm": certificate.layer_norms[i],
                    "bound": certificate.layer_bound,
                    "singular_min": float(singular[-1]),
                    "singular_median": float(singular.median()),
                    "singular_max": float(singular[0]),
                    "gradient_q": norm_name(input_dual),
                    "gradient_median": float(gradient_norms[i].median()),
                }
            )
        return rows


def _box(x: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest coordinates (D,) of points (N, D)."""
    return x.amin(dim=0), x.amax(dim=0)


def _accuracy(f: Tensor, y: Tensor) -> Tensor:
    return ((f > 0) == (y > 0.5)).double().mean(dim=1)


def _mse(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().mean(dim=1)


# Of outputs f (K, N) and targets y (K, N), one number a run.
_METRICS = {"accuracy": _accuracy, "mse": _mse, "score": difference_of_means}


def _rows_of(columns: dict[str, Tensor]) -> list[list[float]]:
    """[[first value of each column], ...]"""
    return [list(row) for row in zip(*(column.tolist() for column in columns.values()), strict=True)]


def _stacked(arrays: Sequence[npt.NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).double()
