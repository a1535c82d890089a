"""Torch modules and their programs, as the tests of networks from elsewhere read them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lipexp.activations import Abs, GroupSort

D = 4
CLOSE = 1e-6  # of torch's float32 from float64


def points(n: int = 50, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(n, *(shape or (D,)), generator=torch.Generator().manual_seed(1))


def outputs(foreign, x: torch.Tensor) -> torch.Tensor:
    return foreign.network.double(x.double().reshape(1, len(x), -1))[0]


class Preprocessed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.randn(D))
        self.scale = torch.rand(D) + 0.5

    def forward(self, x):
        return (x - self.mean) / self.scale


class Sorts(nn.Module):
    """Sorts by chunks, by pairs side by side, and by groups."""

    def forward(self, z):
        a, b = z.split(z.shape[1] // 2, 1)
        z = torch.cat([torch.max(a, b), torch.min(a, b)], 1)
        pairs = z.view(z.shape[0], -1, 2)
        low, high = torch.min(pairs, 2, keepdim=True)[0], torch.max(pairs, 2, keepdim=True)[0]
        z = torch.cat([low, high], 2).view(z.shape)
        return z.reshape(z.shape[0], 2, -1).sort(-1)[0].flatten(1)[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])]


class WithTerm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.term = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 1)), nn.Linear(D, 1)

    def forward(self, x):
        return self.term(x) + self.body(x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.relu(self.inner(x))


class Mixture(nn.Module):
    """What programs write in several ways."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("turn", torch.randn(8, D))

    def forward(self, x):
        z = (self.turn @ x.T).T
        z = torch.rsub(torch.sub(z, 0.5, alpha=2), 1.0, alpha=0.5)
        z = torch.clamp(torch.maximum(z, -0.2 * z), max=0.3)
        z = torch.clamp(self.inner(z), min=-0.5)
        means = z.unflatten(1, (2, 4)).mean(dim=2)
        z = torch.cat([means, z.narrow(1, 2, 2), z[:, ::3], z[:, 3:4]], dim=1)
        return torch.stack([*z.topk(3, dim=1)[0].unbind(1)[:1], z.sort(dim=1)[0].select(1, -2)], dim=1)


class Reused(nn.Module):
    """Uses the features from before an activation that changes them in place."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, 8)

    def forward(self, x):
        z = self.inner(x)
        view = z.flatten()
        return torch.tanh_(z) + torch.relu(view).view(z.shape)


class Rounded(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


def linear(n_in: int = D, n_out: int = 8) -> nn.Linear:
    return nn.Linear(n_in, n_out)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.Sequential(linear(), nn.ReLU(inplace=True), nn.Dropout(), linear(8, 3)),
    "preprocessed": lambda: nn.Sequential(Preprocessed(), linear(), nn.Tanh(), nn.Linear(8, 2, bias=False)),
    "sorts": lambda: nn.Sequential(linear(), Sorts(), linear(8, 8), Sorts(), linear(8, 2)),
    "lipexp's own": lambda: nn.Sequential(linear(), GroupSort(2), linear(8, 8), Abs(), linear(8, 2)),
    "term": WithTerm,
    "normalised": lambda: nn.Sequential(linear(), nn.BatchNorm1d(8), nn.PReLU(8), linear(8, 2)),
    "piecewise": lambda: nn.Sequential(linear(), nn.LeakyReLU(3.0), linear(8, 8), nn.Hardtanh(), nn.ReLU6()),
    "smooth": lambda: nn.Sequential(
        linear(), nn.ELU(0.5), nn.GELU(), nn.SiLU(), nn.SELU(), nn.CELU(2.0), nn.Softplus(2.0), linear(8, 2)
    ),
    "sigmoids": lambda: nn.Sequential(linear(), nn.Sigmoid(), nn.Hardsigmoid(), nn.LogSigmoid(), linear(8, 2)),
    "channels": lambda: nn.Sequential(linear(), nn.Unflatten(1, (2, 4)), nn.PReLU(2), nn.Flatten(), linear(8, 2)),
    "mixture": Mixture,
    "unflattened": lambda: nn.Sequential(
        linear(), nn.Unflatten(1, (2, 4)), nn.Linear(4, 3), nn.ReLU(), nn.Flatten()
    ),
}


def module(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = MODULES[name]()
    for part in made.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            part.weight.data.normal_()
    return made.eval()


def program(net: nn.Module, path: Path, dynamic: bool = True) -> Path:
    shapes = ({0: torch.export.Dim("N")},) if dynamic else None
    torch.export.save(torch.export.export(net, (torch.zeros(2, D),), dynamic_shapes=shapes), path)
    return path


def script(net: nn.Module, path: Path, traced: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        made = torch.jit.trace(net, torch.zeros(2, D), check_trace=False) if traced else torch.jit.script(net)
        torch.jit.save(made, path)
    return path


# Modules and programs --------------------------------------------------------------------------------------------
