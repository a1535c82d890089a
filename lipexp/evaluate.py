"""Baked networks and data -> what is reported of each run.

Shapes: K runs, N points, D inputs. Everything here is computed in float64 from the stored float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipexp import record
from lipexp.loop import Checkpoint, Stack, Value, generator
from lipexp.measured import monotone, overall, sources, steepest
from lipexp.measured.ascent import starts
from lipexp.measured.gradients import Maximum, Points, Scan, largest, operator_norms, scan
from lipexp.networks import BakedNetwork
from lipexp.norms import dual, norm_name
from lipexp.proven import Certificate, Chain, Problem, prove, prove_quickly
from lipexp.proven.radii import Robustness, assess, decided
from lipexp.tasks import SPLITS, squeezed

NORMS = (1.0, 2.0, float("inf"))
NOTHING = Maximum(0.0, ())  # a lower bound before anything is measured


@dataclass
class Evaluation:
    """What is known of one finished run."""

    network: BakedNetwork  # K = 1
    step: int  # that it is from
    scores: dict[str, dict[str, float]]  # train, val, test -> loss and scores
    gradient_norm: record.GradientNorm
    certificate: Certificate
    measured: Maximum
    search: record.SearchedBox
    robustness: Robustness | None  # None where nothing is classified
    monotone: record.Monotone | None  # None where it need not be
    gradients: dict[str, npt.NDArray[Any]]  # the columns of gradients.csv
    layers: list[dict[str, Any]]  # the rows of layers.csv


class Evaluator:
    """Evaluates the checkpoints of one stack, whose data it holds in float64.

    Args:
        report: is told what takes its time at the end.
    """

    def __init__(self, stack: Stack, report: Callable[[str], None] = lambda text: None) -> None:
        self.stack, self.report = stack, report
        sizes = {split: len(stack.data[0].part(split)[0]) for split in SPLITS}
        ends = dict(zip(SPLITS, accumulate(sizes.values()), strict=True))
        self.split = np.repeat(SPLITS, list(sizes.values()))  # (N,) of each point
        self.parts = {split: slice(end - sizes[split], end) for split, end in ends.items()}
        self.x = _stacked([data.x for data in stack.data])  # (K, N, D)
        self.y = _stacked([data.y for data in stack.data])  # (K, N), or (K, N, C) for several targets
        self._last: tuple[BakedNetwork, bool, Scan] | None = None

    def history(self, checkpoint: Checkpoint) -> list[dict[str, float | None]]:
        """One line of history.csv per run; runs that have failed, or stopped before, get an empty one."""
        scanned = self._scan(checkpoint)
        scores = self._scores(scanned.f)
        metric = self.stack.task.metric
        rows: list[dict[str, float | None]] = []
        for run in range(len(self.x)):
            if run in checkpoint.failures or run in checkpoint.stopped:
                rows.append({})
                continue
            val, network = scores[run]["val"], checkpoint.network.run(run)
            constraint = self.stack.constraint
            steepest = largest(network, self.x[run], scanned.gradient[run], constraint.q, constraint.output_p)
            rows.append(
                {
                    "step": checkpoint.step,
                    "train_loss": scores[run]["train"]["loss"],
                    "val_loss": val["loss"],
                    f"val_{metric}": val[metric],
                    "grad_max": steepest.value if steepest else None,
                    "certified": prove_quickly(self._problem(network, run)).value,
                }
            )
        return rows

    def value(self, row: Mapping[str, float | None]) -> Value | None:
        """How good the run of a line of history.csv is on validation."""
        metric, loss = row.get(f"val_{self.stack.task.metric}"), row.get("val_loss")
        if metric is None or loss is None:
            return None
        return self.stack.task.value(metric, loss)

    def final(self, checkpoint: Checkpoint) -> list[Evaluation | None]:
        """The evaluation of each run, None for failed ones."""
        self.report("measuring")
        scanned = self._scan(checkpoint, final=True)
        generators = [generator(s.search) for s in self.stack.streams]
        q, h = self.stack.constraint.q, self.stack.constraint.output_p
        points = sources(checkpoint.network, self.x, scanned, q, generators, h=h)
        scores = self._scores(scanned.f)
        found: list[Evaluation | None] = []
        for run in range(len(self.x)):
            self.report(f"proving: run {run + 1} of {len(self.x)}")
            failed = run in checkpoint.failures
            found.append(None if failed else self._evaluation(checkpoint, run, scanned, points, scores[run]))
        return found

    def _scan(self, checkpoint: Checkpoint, final: bool = False) -> Scan:
        """f and its gradients at the data, for the final report with the hidden gradients.

        The last checkpoint is reported twice, and scanned once where it is also the one that is kept.
        """
        final = final or checkpoint.step == self.stack.steps
        network = checkpoint.network
        if self._last is None or self._last[0] is not network or (final and not self._last[1]):
            constraint = self.stack.constraint
            hidden_p = constraint.hidden_p if final else None
            self._last = (network, final, scan(network, self.x, hidden_p, constraint.output_p))
        return self._last[2]

    def _scores(self, f: Tensor) -> list[dict[str, dict[str, float]]]:
        """Loss and scores of each run, for train, val and test, with outputs f (K, N, C)."""
        f = squeezed(f)
        found: list[dict[str, dict[str, float]]] = [{} for _ in self.x]
        functions = {"loss": lambda f, y: self.stack.loss(f, y).mean(dim=1), **self.stack.task.scores}
        for split, part in self.parts.items():
            values = {name: score(f[:, part], self.y[:, part]).tolist() for name, score in functions.items()}
            for run, of_run in enumerate(found):
                of_run[split] = {name: value[run] for name, value in values.items()}
        return found

    def _problem(self, network: BakedNetwork, run: int, measured: Maximum = NOTHING) -> Problem:
        chain = Chain.of(self.stack.constraint, network.layers, run)
        box = self.x[run].amin(dim=0), self.x[run].amax(dim=0)
        return Problem(network, chain, box, measured, self.stack.max_regions, self.stack.task.decides)

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
        scores: dict[str, dict[str, float]],
    ) -> Evaluation:
        network, q, h = checkpoint.network.run(run), self.stack.constraint.q, self.stack.constraint.output_p
        by = steepest(network, points, run, q, h)
        measured = overall(by)
        signs = self.stack.constraint.signs
        certificate = self._certificate(network, run, measured)
        jacobians = scanned.gradient[run]
        at_data = {norm: operator_norms(jacobians, norm, h) for norm in defined(network, h)}  # (N,) each
        robustness = None
        if self.stack.task.decides:
            robustness = assess(network, decided(self.stack.data[run]), certificate)
        x = self.x[run].numpy()
        return Evaluation(
            network=network,
            step=checkpoint.kept[run] if checkpoint.kept else checkpoint.step,
            scores=scores,
            gradient_norm=self._gradient_norm(network, run, scanned, by, at_data[q]),
            certificate=certificate,
            measured=measured,
            search=record.SearchedBox(
                np.stack([x.min(axis=0), x.max(axis=0)], axis=1).tolist(),
                starts(x.shape[1]),
                int(self.stack.streams[run].search.generate_state(1, np.uint64)[0]),
            ),
            robustness=robustness,
            monotone=None
            if signs is None
            else monotone.assess(network, points, run, signs, self.stack.model.monotone),
            gradients={
                "split": self.split,
                **{f"x{i}": x[:, i] for i in range(x.shape[1])},
                **self._targets(run),
                **by_output("f", scanned.f[run].numpy()),
                **{f"grad_{norm_name(norm)}": values.numpy() for norm, values in at_data.items()},
            },
            layers=_layer_rows(certificate, network, [at_data[q], *(hidden[run] for hidden in scanned.hidden)]),
        )

    def _targets(self, run: int) -> dict[str, npt.NDArray[Any]]:
        """The columns of the targets: y, or y0, y1, ... where there are several."""
        y = self.y[run].numpy()
        if y.ndim > 1:
            return by_output("y", y)
        return {"y": y.astype(np.int64 if self.stack.task.has_classes else np.float64)}

    def _gradient_norm(
        self, network: BakedNetwork, run: int, scanned: Scan, by: dict[str, Maximum], at_data: Tensor
    ) -> record.GradientNorm:
        q = self.stack.constraint.q
        low, median, high = at_data.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
        in_norm = {
            norm: by.get("data") if norm == q else largest(network, self.x[run], scanned.gradient[run], norm)
            for norm in defined(network, self.stack.constraint.output_p)
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
                "bound": chain.bound_of(layer),
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
    """The norms q in which gradients are measured: of several outputs only the dual of h, unless that is inf."""
    return NORMS if network.n_outputs == 1 or np.isinf(h) else (dual(h),)


def by_output(name: str, values: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Columns of values (N, C): `f` for one output, f0, f1, ... for several."""
    return {name if values.shape[1] == 1 else f"{name}{c}": values[:, c] for c in range(values.shape[1])}


def _stacked(arrays: Sequence[npt.NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).double()
