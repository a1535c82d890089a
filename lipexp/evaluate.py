"""Baked networks and data -> what is reported of each run.

Shapes: K runs, N points, D inputs. Everything here is computed in float64 from the stored float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipexp import record
from lipexp.loop import Checkpoint, Stack, generator
from lipexp.measured import Points, overall, sources, steepest
from lipexp.measured.ascent import starts
from lipexp.measured.gradients import Maximum, Scan, largest, operator_norms, scan
from lipexp.networks import BakedNetwork
from lipexp.norms import dual, norm_name
from lipexp.proven import Certificate, Chain, Problem, prove, prove_quickly
from lipexp.proven.radii import Robustness, assess, decided
from lipexp.tasks import squeezed

NORMS = (1.0, 2.0, float("inf"))
NOTHING = Maximum(0.0, ())  # a lower bound before anything is measured


@dataclass
class Evaluation:
    """What is known of one finished run."""

    network: BakedNetwork  # K = 1
    train: dict[str, float]  # loss and metric
    test: dict[str, float]
    gradient_norm: record.GradientNorm
    certificate: Certificate
    measured: Maximum
    search: record.SearchedBox
    robustness: Robustness | None  # None where nothing is classified
    gradients: dict[str, npt.NDArray[Any]]  # the columns of gradients.csv
    layers: list[dict[str, Any]]  # the rows of layers.csv


class Evaluator:
    """Evaluates the checkpoints of one stack, whose data it holds in float64.

    Args:
        report: is told what takes its time at the end.
    """

    def __init__(self, stack: Stack, report: Callable[[str], None] = lambda text: None) -> None:
        self.stack, self.report = stack, report
        self.n_train = len(stack.data[0].train_x)
        self.x = _stacked([np.concatenate([data.train_x, data.test_x]) for data in stack.data])  # (K, N, D)
        self.y = _stacked([np.concatenate([data.train_y, data.test_y]) for data in stack.data])  # (K, N)
        self._last: tuple[Checkpoint, Scan] | None = None

    def history(self, checkpoint: Checkpoint) -> list[dict[str, float | None]]:
        """One line of history.csv per run; failed runs get an empty one."""
        scanned = self._scan(checkpoint)
        scores = self._scores(scanned.f)
        metric = self.stack.task.metric
        rows: list[dict[str, float | None]] = []
        for run in range(len(self.x)):
            if run in checkpoint.failures:
                rows.append({})
                continue
            train, test = scores[run]
            network = checkpoint.network.run(run)
            constraint = self.stack.constraint
            steepest = largest(network, self.x[run], scanned.gradient[run], constraint.q, constraint.hidden_p)
            rows.append(
                {
                    "step": checkpoint.step,
                    "train_loss": train["loss"],
                    "test_loss": test["loss"],
                    f"test_{metric}": test[metric],
                    "grad_max": steepest.value if steepest else None,
                    "certified": prove_quickly(self._problem(network, run)).value,
                }
            )
        return rows

    def final(self, checkpoint: Checkpoint) -> list[Evaluation | None]:
        """The evaluation of each run, None for failed ones."""
        self.report("measuring")
        scanned = self._scan(checkpoint)
        generators = [generator(s.search) for s in self.stack.streams]
        q, h = self.stack.constraint.q, self.stack.constraint.hidden_p
        points = sources(checkpoint.network, self.x, scanned, q, generators, h=h)
        scores = self._scores(scanned.f)
        found: list[Evaluation | None] = []
        for run in range(len(self.x)):
            self.report(f"proving: run {run + 1} of {len(self.x)}")
            failed = run in checkpoint.failures
            found.append(None if failed else self._evaluation(checkpoint, run, scanned, points, scores[run]))
        return found

    def _scan(self, checkpoint: Checkpoint) -> Scan:
        """f and its gradients at the data. The last checkpoint is reported twice, and scanned once."""
        if self._last is None or self._last[0] is not checkpoint:
            is_last = checkpoint.step == self.stack.steps  # only the final report has the hidden gradients
            hidden_p = self.stack.constraint.hidden_p if is_last else None
            self._last = (checkpoint, scan(checkpoint.network, self.x, hidden_p))
        return self._last[1]

    def _scores(self, f: Tensor) -> list[tuple[dict[str, float], dict[str, float]]]:
        """(train, test) loss and metric of each run for outputs f (K, N, C)."""
        columns = []
        for f_part, y in zip(self._split(squeezed(f)), self._split(self.y), strict=True):
            loss, score = (
                self.stack.loss(f_part, y).mean(dim=1),
                self.stack.task.scores[self.stack.task.metric](f_part, y),
            )
            columns.append(zip(loss.tolist(), score.tolist(), strict=True))
        train, test = (
            [dict(zip(("loss", self.stack.task.metric), row, strict=True)) for row in c] for c in columns
        )
        return list(zip(train, test, strict=True))

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The train and the test part of (K, N)."""
        return values[:, : self.n_train], values[:, self.n_train :]

    def _problem(self, network: BakedNetwork, run: int, measured: Maximum = NOTHING) -> Problem:
        chain = Chain.of(self.stack.constraint, len(network.layers), run)
        box = self.x[run].amin(dim=0), self.x[run].amax(dim=0)
        return Problem(network, chain, box, measured, self.stack.max_regions)

    def _certificate(self, network: BakedNetwork, run: int, measured: Maximum) -> Certificate:
        """The best bound that is proven for the finished network.

        If the norms that baking proved exceed L, baking is broken: that is reported instead of a tighter bound,
        which would hide it.
        """
        problem = self._problem(network, run, measured)
        quick = prove_quickly(problem)
        if quick.verdict(measured) == "FAIL":
            return quick
        alone = len(self.x) == 1  # of many runs each is over soon, and `final` counts them
        return prove(problem._replace(report=self.report if alone else None))

    def _evaluation(
        self,
        checkpoint: Checkpoint,
        run: int,
        scanned: Scan,
        points: Points,
        scores: tuple[dict[str, float], dict[str, float]],
    ) -> Evaluation:
        network, q, h = checkpoint.network.run(run), self.stack.constraint.q, self.stack.constraint.hidden_p
        by = steepest(network, points, run, q, h)
        measured = overall(by)
        certificate = self._certificate(network, run, measured)
        jacobians = scanned.gradient[run]
        at_data = {norm: operator_norms(jacobians, norm, h) for norm in defined(network, h)}  # (N,) each
        robustness = None
        if self.stack.task.decides:
            robustness = assess(network, decided(self.stack.data[run]), certificate)
        x = self.x[run].numpy()
        return Evaluation(
            network=network,
            train=scores[0],
            test=scores[1],
            gradient_norm=self._gradient_norm(network, run, scanned, by, at_data[q]),
            certificate=certificate,
            measured=measured,
            search=record.SearchedBox(
                np.stack([x.min(axis=0), x.max(axis=0)], axis=1).tolist(),
                starts(x.shape[1]),
                int(self.stack.streams[run].search.generate_state(1, np.uint64)[0]),
            ),
            robustness=robustness,
            gradients={
                "split": np.where(np.arange(len(x)) < self.n_train, "train", "test"),
                **{f"x{i}": x[:, i] for i in range(x.shape[1])},
                "y": self.y[run].numpy().astype(np.int64 if self.stack.task.has_classes else np.float64),
                **by_output("f", scanned.f[run].numpy()),
                **{f"grad_{norm_name(norm)}": values.numpy() for norm, values in at_data.items()},
            },
            layers=_layer_rows(certificate, network, [at_data[q], *(hidden[run] for hidden in scanned.hidden)]),
        )

    def _gradient_norm(
        self, network: BakedNetwork, run: int, scanned: Scan, by: dict[str, Maximum], at_data: Tensor
    ) -> record.GradientNorm:
        q = self.stack.constraint.q
        low, median, high = at_data.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
        in_norm = {
            norm: by.get("data") if norm == q else largest(network, self.x[run], scanned.gradient[run], norm)
            for norm in defined(network, self.stack.constraint.hidden_p)
        }
        return record.GradientNorm(
            q=norm_name(q),
            max=overall(by).value,
            mean=float(at_data.mean()),
            median=median,
            p05=low,
            p95=high,
            argmax=list(overall(by).point),
            by={source: found.value for source, found in by.items()},
            data_max={str(norm_name(norm)): found.value for norm, found in in_norm.items() if found is not None},
        )


def _layer_rows(
    certificate: Certificate, network: BakedNetwork, gradient_norms: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """One row per layer: its norm and bound, its singular values, and the gradient norm (N,) at its input."""
    chain = certificate.chain
    rows = []
    for i, (layer, name, (norm,)) in enumerate(zip(network.layers, chain.layer_norms, network.norms, strict=True)):
        singular = torch.linalg.svdvals(layer.weight[0].double())
        rows.append(
            {
                "layer": i,
                "out": layer.weight.shape[1],
                "in": layer.weight.shape[2],
                "norm": name,
                "operator_norm": norm,
                "bound": chain.layer_bound,
                "singular_min": float(singular[-1]),
                "singular_median": float(singular.median()),
                "singular_max": float(singular[0]),
                # Gradients are measured in the dual of the norm of the space: p at the input, hidden_p behind it.
                "gradient_q": norm_name(dual(chain.p if i == 0 else chain.hidden_p)),
                "gradient_median": float(gradient_norms[i].median()),
            }
        )
    return rows


def defined(network: BakedNetwork, h: float) -> Sequence[float]:
    """The norms q in which gradients are measured: of several outputs only 2 where h is 2, their norm."""
    return NORMS if network.n_outputs == 1 or np.isinf(h) else (2.0,)


def by_output(name: str, values: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Columns of values (N, C): `f` for one output, f0, f1, ... for several."""
    return {name if values.shape[1] == 1 else f"{name}{c}": values[:, c] for c in range(values.shape[1])}


def _stacked(arrays: Sequence[npt.NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).double()
