"""`lipexp bench bounds`: bounds on the Lipschitz constant of ReLU networks, against those of eclipse-nn.

Both see the same float32 weights. eclipse-nn computes in float64, and proves nothing of what it rounds; lipexp's
bounds are proven.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from rich.console import Console

from lipexp.activations import Activation, GroupSort, ReLU
from lipexp.bench.steps import composed, say_missing
from lipexp.bench.timing import Case, table, take_turns
from lipexp.blocks import Affine
from lipexp.loop import fit
from lipexp.members import build, stack
from lipexp.networks import BakedNetwork
from lipexp.proven.semidefinite import eclipse, lipsdp
from lipexp.wording import above

PACKAGE = "eclipse-nn"
RELU, FAST, SLOW = ReLU(), "ECLipsE_Fast", "ECLipsE"
ONE_IN = 10  # a case takes seconds: it has one round where others have this many


def trained() -> BakedNetwork:
    """64-128-128-1, trained without a bound to tell odd digits from even ones."""
    config = composed("dataset=digits_parity", "constraint=none", "act=relu", "steps=1000")
    return fit(stack([build(config)]), lambda checkpoint: None).network.run(0)


def random(sizes: Sequence[int], act: Activation = RELU) -> BakedNetwork:
    """Normal weights of the variance 1 / inputs."""
    draws, layers = torch.Generator().manual_seed(0), []
    for n_in, n_out in itertools.pairwise(sizes):
        weight = torch.randn(1, n_out, n_in, generator=draws) / n_in**0.5
        layers.append(Affine(weight, torch.zeros(1, 1, n_out)))
    return BakedNetwork(layers, [act] * len(layers))


# name -> the network, and the methods of eclipse-nn that it is bounded by
NETWORKS: Mapping[str, tuple[Callable[[], BakedNetwork], Sequence[str]]] = {
    "digits, 64-128-128-1": (trained, (FAST, SLOW)),
    "20 layers of 40": (partial(random, (2, *[40] * 20, 1)), (FAST, SLOW)),
    "10 layers of 256": (partial(random, (64, *[256] * 10, 1)), (FAST,)),  # the other takes hours
    "10 layers of 256, MaxMin": (partial(random, (64, *[256] * 10, 1), GroupSort()), ()),
}


def bounds(console: Console, rounds: int) -> None:
    """Every method on every network: the bound, and the time against that of the first."""
    try:
        library = importlib.import_module("eclipse_nn")
    except ImportError:
        library = None
        say_missing(console, [PACKAGE])
    for name, (made, methods) in NETWORKS.items():
        network = made()
        weights = [layer.weight[0].double() for layer in network.layers]
        product = float(np.prod([float(torch.linalg.matrix_norm(weight, ord=2)) for weight in weights]))
        found: dict[str, Callable[[], float]] = {}
        for method in methods if library is not None else ():
            found[method] = partial(estimate, library, weights, method)
        found["lipexp eclipse"] = partial(proven, eclipse, network)
        found["lipexp lipsdp"] = partial(proven, lambda network: lipsdp(network)[0], network)
        values: dict[str, float] = {}
        cases = [Case(case, partial(keep, values, case, work)) for case, work in found.items()]
        take_turns(cases, max(1, rounds // ONE_IN), 1, warm_up=0)
        for case in cases:
            case.name += f"  {above(values[case.name], None, digits=5)}"
        title = f"{name}, {PACKAGE} and lipexp: bound and time; product {above(product, None, digits=5)}"
        console.print(table(title, cases))


def keep(values: dict[str, float], case: str, work: Callable[[], float]) -> None:
    """Carry out a case, and keep its bound."""
    values[case] = work()


def proven(method: Callable[[BakedNetwork], float | None], network: BakedNetwork) -> float:
    bound = method(network)
    return math.inf if bound is None else bound


def estimate(library: object, weights: list[torch.Tensor], method: str) -> float:
    """The bound of eclipse-nn, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return float(library.LipConstEstimator(weights=weights).estimate(method))  # type: ignore[attr-defined]
