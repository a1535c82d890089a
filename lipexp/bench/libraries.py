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

from lipexp.bench.steps import DEPTH, MinimumMaximum, mlp, say_missing

WIDTH = 64
HALF = 0.5  # of the time of their step: the aim for layers that they make orthogonal

Norm = Callable[[Any], Tensor]  # of one layer
Made = Callable[[], nn.Sequential]  # a new network


@dataclass(frozen=True)
class Rival:
    """A network of another library, and what lipexp has for the same bound."""

    name: str
    network: Made
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
    """The bound max(1, 2 s - 1) of x - 2 W^T diag(t) relu(W x + b), s the largest eigenvalue of W^T diag(t) W.

    Its Jacobian I - 2 W^T diag(t) D W with 0 <= D <= I is symmetric, and its eigenvalues are in [1 - 2 s, 1].
    """
    scaled = layer.compute_t().sqrt().unsqueeze(1) * layer.weight
    return (2 * torch.linalg.matrix_norm(scaled.double(), ord=2).square() - 1).clamp_min(1)


SPECTRAL = (spectral,) * (DEPTH + 1)


def constant(rival: Rival, network: nn.Sequential) -> float:
    """The product of the norms of its layers, of the weights that it works with."""
    layers = [part for part in network if hasattr(part, "weight")]
    with torch.no_grad():
        return math.prod(float(norm(layer)) for norm, layer in zip(rival.norms, layers, strict=True))


def of_torch() -> Iterator[Rival]:
    """torch.nn.utils.parametrizations: `spectral_norm`, and `orthogonal` with each of its maps."""

    def network(parametrised: Callable[[nn.Module], nn.Module]) -> Made:
        return lambda: mlp(lambda n_in, n_out: parametrised(nn.Linear(n_in, n_out)), MinimumMaximum, WIDTH)

    yield Rival("torch spectral_norm + MaxMin", network(spectral_norm), ["spectral"], SPECTRAL)
    for name, own in (
        ("householder", ["qr", "orthogonal"]),
        ("cayley", ["cayley"]),
        ("matrix_exp", ["matrix_exp"]),
    ):
        made = network(partial(orthogonal, orthogonal_map=name))
        yield Rival(f"torch {name} + MaxMin", made, own, SPECTRAL)


def of_torchlip(library: Any) -> Iterator[Rival]:
    """`SpectralLinear` divides by the spectral norm and then, unless eps_bjorck=None, iterates as Björck."""

    def network(kind: Callable[..., nn.Module], act: Callable[[], nn.Module], **options: Any) -> Made:
        return lambda: mlp(partial(kind, **options), act, WIDTH)

    linear, pairs = library.SpectralLinear, library.GroupSort2
    with_pairs = ["orthogonal constraint.method=bjorck constraint.iterations=8", "orthogonal"]
    yield Rival("torchlip Spectral + GroupSort2", network(linear, pairs), with_pairs, SPECTRAL, HALF)
    sorting = ["orthogonal act=fullsort"]
    yield Rival("torchlip Spectral + FullSort", network(linear, library.FullSort), sorting, SPECTRAL, HALF)
    made = network(linear, partial(library.HouseHolder, WIDTH))
    yield Rival("torchlip Spectral + HouseHolder", made, ["orthogonal act=householder"], SPECTRAL, HALF)
    made = network(linear, pairs, eps_bjorck=None)
    yield Rival("torchlip Spectral, no Björck", made, ["spectral"], SPECTRAL)
    made = network(library.FrobeniusLinear, pairs, disjoint_neurons=False)
    yield Rival("torchlip Frobenius + GroupSort2", made, ["frobenius"], (frobenius,) * (DEPTH + 1))


def of_orthogonium(library: Any) -> Iterator[Rival]:
    """`OrthoLinear` with each of its parametrisations, and its dense residual layers."""
    maps = importlib.import_module(f"{library.__name__}.reparametrizers")
    max_min = importlib.import_module(f"{library.__name__}.layers.custom_activations").MaxMin
    sll = importlib.import_module(f"{library.__name__}.layers.conv.SLL.sll_layer").SDPBasedLipschitzDense
    linear = importlib.import_module(f"{library.__name__}.layers.linear").OrthoLinear

    def network(parameters: Any) -> Made:
        return lambda: mlp(partial(linear, ortho_params=parameters), max_min, WIDTH)

    def residual_network() -> nn.Sequential:
        return nn.Sequential(linear(2, WIDTH), *(sll(WIDTH, WIDTH, WIDTH) for _ in range(DEPTH)), linear(WIDTH, 1))

    for name, parameters, own in (
        ("Björck", maps.DEFAULT_ORTHO_PARAMS, ["orthogonal"]),
        ("QR", maps.QR_ORTHO_PARAMS, ["qr"]),
        ("Cholesky", maps.CHOLESKY_STABLE_ORTHO_PARAMS, ["qr", "orthogonal"]),
        ("exponential", maps.EXP_ORTHO_PARAMS, ["matrix_exp"]),
    ):
        yield Rival(f"orthogonium {name} + MaxMin", network(parameters), own, SPECTRAL, HALF)
    norms = (spectral, *(residual,) * DEPTH, spectral)
    yield Rival("orthogonium SLL", residual_network, ["sll act=relu"], norms)


def of_monotonic(library: Any) -> Iterator[Rival]:
    """`GroupSort` is told the number of groups."""

    def network(first: str, later: str) -> Made:
        def linear(n_in: int, n_out: int) -> nn.Module:
            return library.LipschitzLinear(n_in, n_out, kind=first if n_in == 2 else later)

        return lambda: mlp(linear, partial(library.GroupSort, WIDTH // 2), WIDTH)

    norms = (longest_row, *(row_sum,) * DEPTH)
    yield Rival("MonotonicNetworks inf + GroupSort", network("two-inf", "inf"), ["linf"], norms)
    yield Rival("MonotonicNetworks one + GroupSort", network("one", "one"), ["one"], (column_sum,) * (DEPTH + 1))


LIBRARIES: dict[str, tuple[str, Callable[[Any], Iterator[Rival]]]] = {  # package -> its module, and its networks
    "deel-torchlip": ("deel.torchlip", of_torchlip),
    "orthogonium": ("orthogonium", of_orthogonium),
    "monotonicnetworks": ("monotonicnetworks", of_monotonic),
}


def rivals(console: Console) -> list[Rival]:
    """All networks of what is installed; says which packages are not."""
    found: list[Rival] = []
    missing = []
    for package, (module, networks) in LIBRARIES.items():
        try:
            found += networks(importlib.import_module(module))
        except ImportError:
            missing.append(package)
    say_missing(console, missing)
    return [*found, *of_torch()]
