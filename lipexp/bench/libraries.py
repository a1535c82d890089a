"""The bounded networks of other libraries, and which of lipexp's constraints and activations is the same.

All have the same widths, and come with the norms whose product bounds them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from lipexp.bench.steps import MinimumMaximum, mlp, say_missing
from lipexp.config import conf_dir

WIDTH = 64
HALF = 0.5  # of the time of their step: the aim for layers that they make orthogonal

Norm = Callable[[Any], Tensor]  # of one layer


@dataclass(frozen=True)
class Rival:
    """A network of another library, and what lipexp has for the same bound."""

    name: str
    network: Callable[[], nn.Sequential]
    own: Sequence[str]  # overrides, separated by spaces, of each of lipexp's
    norms: Sequence[Norm]  # of each layer
    aim: float | None = None  # the largest ratio of step times


def spectral(layer: nn.Linear) -> Tensor:
    """The largest singular value."""
    return torch.linalg.matrix_norm(layer.weight.double(), ord=2)


def frobenius(layer: nn.Linear) -> Tensor:
    """The root of the sum of squares."""
    return torch.linalg.matrix_norm(layer.weight.double())


def longest_row(layer: nn.Linear) -> Tensor:
    """The operator norm 2 -> inf."""
    return torch.linalg.vector_norm(layer.weight.double(), dim=1).max()


def row_sum(layer: nn.Linear) -> Tensor:
    """The operator norm inf -> inf."""
    return torch.linalg.matrix_norm(layer.weight.double(), ord=math.inf)


def column_sum(layer: nn.Linear) -> Tensor:
    """The operator norm 1 -> 1."""
    return torch.linalg.matrix_norm(layer.weight.double(), ord=1)


def residual(layer: Any) -> Tensor:
    """The constant of x - 2 W^T diag(t) relu(W x + b): max(1, 2 s - 1), s the largest eigenvalue of W^T diag(t) W.

    Its Jacobian is I - 2 W^T diag(t) D W with 0 <= D <= I, which is symmetric: its eigenvalues are in [1 - 2 s, 1].
    """
    scaled = layer.compute_t().sqrt().unsqueeze(1) * layer.weight
    return (2 * torch.linalg.matrix_norm(scaled.double(), ord=2).square() - 1).clamp_min(1)


SPECTRAL = (spectral,) * 3


def constant(rival: Rival, network: nn.Sequential) -> float:
    """The product of the norms of its layers, of the weights that it works with."""
    layers = [part for part in network if hasattr(part, "weight")]
    with torch.no_grad():
        return math.prod(float(norm(layer)) for norm, layer in zip(rival.norms, layers, strict=True))


def of_torch() -> Iterator[Rival]:
    """torch.nn.utils.parametrizations; `orthogonal` has three maps."""

    def network(parametrised: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Sequential]:
        return lambda: mlp(lambda n_in, n_out: parametrised(nn.Linear(n_in, n_out)), MinimumMaximum, WIDTH)

    yield Rival("torch spectral_norm", network(spectral_norm), ["spectral"], SPECTRAL)
    for name, own in (("householder", "qr"), ("cayley", "cayley"), ("matrix_exp", "matrix_exp")):
        made = network(partial(orthogonal, orthogonal_map=name))
        yield Rival(f"torch orthogonal, {name}", made, [own, *["orthogonal"] * (own == "qr")], SPECTRAL)


def of_torchlip(library: Any) -> Iterator[Rival]:
    """`SpectralLinear` is spectral normalisation and, unless eps_bjorck=None, Björck's iteration."""

    def network(
        linear: Callable[[int, int], nn.Module], act: Callable[[], nn.Module]
    ) -> Callable[[], nn.Sequential]:
        return lambda: mlp(linear, act, WIDTH)

    orthogonal, pairs = library.SpectralLinear, library.GroupSort2
    own = ["orthogonal constraint.method=bjorck constraint.iterations=8", "orthogonal"]
    yield Rival("torchlip SpectralLinear, GroupSort2", network(orthogonal, pairs), own, SPECTRAL, HALF)
    own = ["orthogonal act=fullsort"]
    yield Rival("torchlip SpectralLinear, FullSort", network(orthogonal, library.FullSort), own, SPECTRAL, HALF)
    if (conf_dir() / "act" / "householder.yaml").exists():
        made = network(orthogonal, lambda: library.HouseHolder(WIDTH))
        own = ["orthogonal act=householder"]
        yield Rival("torchlip SpectralLinear, HouseHolder", made, own, SPECTRAL, HALF)
    made = network(partial(orthogonal, eps_bjorck=None), pairs)
    yield Rival("torchlip SpectralLinear, eps_bjorck=None", made, ["spectral"], SPECTRAL)
    made = network(partial(library.FrobeniusLinear, disjoint_neurons=False), pairs)
    yield Rival("torchlip FrobeniusLinear, GroupSort2", made, ["frobenius"], (frobenius,) * 3)


def of_orthogonium(library: Any) -> Iterator[Rival]:
    """`OrthoLinear` with each of its parametrisations, and residual layers."""
    maps = importlib.import_module("orthogonium.reparametrizers")
    max_min = importlib.import_module("orthogonium.layers.custom_activations").MaxMin
    sll = importlib.import_module("orthogonium.layers.conv.SLL.sll_layer").SDPBasedLipschitzDense
    linear = importlib.import_module("orthogonium.layers.linear").OrthoLinear

    def network(parameters: Any) -> Callable[[], nn.Sequential]:
        return lambda: mlp(partial(linear, ortho_params=parameters), max_min, WIDTH)

    for name, parameters, own in (
        ("Björck", maps.DEFAULT_ORTHO_PARAMS, "orthogonal"),
        ("QR", maps.QR_ORTHO_PARAMS, "qr"),
        ("Cholesky", maps.CHOLESKY_STABLE_ORTHO_PARAMS, "qr"),
        ("exponential", maps.EXP_ORTHO_PARAMS, "matrix_exp"),
    ):
        yield Rival(f"orthogonium OrthoLinear, {name}", network(parameters), [own], SPECTRAL, HALF)

    def residual_network() -> nn.Sequential:
        inside = [sll(WIDTH, WIDTH, WIDTH) for _ in range(2)]
        return nn.Sequential(linear(2, WIDTH), *inside, linear(WIDTH, 1))

    norms = (spectral, residual, residual, spectral)
    yield Rival("orthogonium SDPBasedLipschitzDense", residual_network, ["sll act=relu"], norms)


def of_monotonic(library: Any) -> Iterator[Rival]:
    """`GroupSort` is told the number of groups."""

    def network(first: str, later: str) -> Callable[[], nn.Sequential]:
        def linear(n_in: int, n_out: int) -> nn.Module:
            return library.LipschitzLinear(n_in, n_out, kind=first if n_in == 2 else later)

        return lambda: mlp(linear, lambda: library.GroupSort(WIDTH // 2), WIDTH)

    norms = (longest_row, row_sum, row_sum)
    yield Rival("monotonicnetworks two-inf, inf", network("two-inf", "inf"), ["linf"], norms)
    yield Rival("monotonicnetworks one", network("one", "one"), ["one"], (column_sum,) * 3)


LIBRARIES: dict[str, tuple[str, Callable[[Any], Iterator[Rival]]]] = {  # package -> its module, and its networks
    "deel-torchlip": ("deel.torchlip", of_torchlip),
    "orthogonium": ("orthogonium", of_orthogonium),
    "monotonicnetworks": ("monotonicnetworks", of_monotonic),
}


def rivals(console: Console) -> list[Rival]:
    """All networks of what is installed; says which packages are not."""
    found, missing = [], []
    for package, (module, networks) in LIBRARIES.items():
        try:
            found += networks(importlib.import_module(module))
        except ImportError:
            missing.append(package)
    say_missing(console, missing)
    return [*found, *of_torch()]
