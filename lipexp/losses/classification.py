"""Losses for classes, two or several, and for two distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lipexp.config import number
from lipexp.losses.base import Loss, Margined, Scaled, Tempered, column
from lipexp.tasks import class_weights


def _radius(f: Tensor, y: Tensor, lipschitz: Any) -> Tensor:
    """(K, B) s f / L with s = 2 y - 1: how far away f = 0 is at least; below 0 on the wrong side."""
    return (2 * y - 1) * f / column(lipschitz, f)


def _radii_to_others(f: Tensor, y: Tensor, lipschitz: Any) -> tuple[Tensor, Tensor]:
    """The class of each point (K, B, 1), and (f_y - f_j) / (2 L) for every class j (K, B, C)."""
    own = y.long().unsqueeze(-1)
    return own, (f.gather(-1, own) - f) / column(lipschitz, f) / 2


def _transport(f: Tensor, y: Tensor, lipschitz: Any) -> Tensor:
    """(K, B) of which the mean over B is -(mean of f where y = 1 - mean of f where y = 0) / L."""
    return -class_weights(y) * f * (y.shape[1] / column(lipschitz, f))


# Two classes -----------------------------------------------------------------------------------------------------


class BCE(Tempered):
    """Binary cross-entropy of logits with a temperature: BCE(T f, y) / (T L) with y in {0, 1}.

    It falls for ever as margins grow, so under a gradient bound it trades errors for margins. A large T makes it
    attend to small margins: at T -> infinity it is the hinge loss with margin 0.

    Reference: Bethune et al. 2022, "Pay attention to your loss" (arXiv 2104.05097).
    """

    task = "classification"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        temperature = column(self.temperature, f)
        entropy = functional.binary_cross_entropy_with_logits(temperature * f, y, reduction="none")
        return entropy / temperature / column(self.lipschitz, f)


class Hinge(Margined):
    """max(0, m - s f) / L with s = 2 y - 1 and m = margin * L, y in {0, 1}.

    It stops at its margin, so a bounded network can spend its slope on the decision line. `margin` is a distance
    in input space: a point with no loss is at least `margin` away from every point where f has the other sign.
    Dividing by L makes training the same for every L up to the scale of f.
    """

    task = "classification"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.relu(column(self.margin, f) - _radius(f, y, self.lipschitz))


class SoftMargin(Margined):
    """log(1 + exp(T (margin - s f / L))) / T with s = 2 y - 1, y in {0, 1}: `Hinge` with a rounded corner.

    It is above `Hinge` by log(2) / T at the margin and by less elsewhere, so at T -> infinity it is `Hinge`. With
    the margin 0 it is `BCE` with the temperature T / L. Since T multiplies a distance, training is the same for
    every L up to the scale of f.

    Args, beyond the margin and L:
        temperature: T, per unit of the input.
    """

    task = "classification"
    per_run = ("margin", "temperature", "lipschitz")

    def __init__(self, margin: float = 0.5, temperature: float = 10.0, lipschitz: float = 1.0) -> None:
        super().__init__(margin, lipschitz)
        self.temperature = number("temperature", temperature, above=0)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        temperature = column(self.temperature, f)
        lacking = column(self.margin, f) - _radius(f, y, self.lipschitz)
        return -functional.logsigmoid(-temperature * lacking) / temperature


class HKR(Margined):
    """(1 - alpha) Kantorovich + alpha Hinge, the hinge-Kantorovich-Rubinstein loss.

    `Kantorovich` alone may leave errors, since it only counts means, and `Hinge` alone stops at its margin: both
    together also push points apart that have their margin. It is for networks with a bound; without one it may
    fall for ever.

    alpha is that of deel-torchlip's HKRLoss, whose min_margin is twice the margin here. The article has
    Kantorovich + lambda Hinge with the margin 1: (1 + lambda) times this, with alpha = lambda / (1 + lambda).

    Args, beyond the margin and L:
        alpha: the weight of the hinge loss, from 0 to 1.

    Reference: Serrurier et al. 2021, "Achieving robustness in classification using optimal transport with hinge
    regularization" (arXiv 2006.06520).
    """

    task = "classification"
    per_run = ("alpha", "margin", "lipschitz")

    def __init__(self, alpha: float = 0.95, margin: float = 0.5, lipschitz: float = 1.0) -> None:
        super().__init__(margin, lipschitz)
        self.alpha = number("alpha", alpha, least=0, most=1)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        alpha = column(self.alpha, f)
        hinge = torch.relu(column(self.margin, f) - _radius(f, y, self.lipschitz))
        return (1 - alpha) * _transport(f, y, self.lipschitz) + alpha * hinge


class Kantorovich(Scaled):
    """-(mean of f where y = 1 - mean of f where y = 0) / L: the dual of the Wasserstein-1 distance of the classes.

    Over all L-Lipschitz f the largest difference of means is L times that distance (Kantorovich and Rubinstein).
    Each sample is weighted by the number of samples of its class in the batch, so the mean over the batch is the
    loss above exactly, and a constant added to f changes nothing. The mean of a class without a sample is 0.

    Reference: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", section 2.3.
    """

    task = "transport"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return _transport(f, y, self.lipschitz)


# Several classes -------------------------------------------------------------------------------------------------


class CrossEntropy(Tempered):
    """Cross-entropy of logits with a temperature: CE(T f, y) / (T L), CE(z, y) = log(sum_j exp(z_j)) - z_y.

    It is for several classes what `BCE` is for two: at T -> infinity it is max_j (f_j - f_y) / L, which is zero as
    soon as the largest output is that of the class. f is (K, B, C) and y (K, B), of 0, 1, ..., C - 1.

    Reference: Bethune et al. 2022, "Pay attention to your loss" (arXiv 2104.05097).
    """

    task = "multiclass"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        logits = (column(self.temperature, f) * f).movedim(-1, 1)  # torch wants the classes on axis 1
        entropy = functional.cross_entropy(logits, y.long(), reduction="none")
        return entropy / column(self.temperature, y) / column(self.lipschitz, y)


class MultiMargin(Margined):
    """The sum over the classes j other than y of max(0, margin - (f_y - f_j) / (2 L)).

    A network with the constant L has f_y - f_j with the constant 2 L at most, whichever norm its outputs live in.
    So `margin` is a distance in input space, as for `Hinge`: a point with no loss is at least `margin` away from
    every point where another class has the largest output. For two classes with the outputs (-f, f) it is `Hinge`
    of f. f is (K, B, C) and y (K, B), of 0, 1, ..., C - 1.

    Where outputs live in the 2-norm (constraint=spectral) the constant of f_y - f_j is sqrt(2) L. A point with no
    loss is then sqrt(2) times as far away, and two points of different classes can only both have no loss if they
    are 2 sqrt(2) times the margin apart.

    Reference: Weston and Watkins 1999, "Support vector machines for multi-class pattern recognition".
    """

    task = "multiclass"

    def __init__(self, margin: float = 0.25, lipschitz: float = 1.0) -> None:
        super().__init__(margin, lipschitz)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        own, radii = _radii_to_others(f, y, self.lipschitz)
        return torch.relu(column(self.margin, f) - radii).scatter(-1, own, 0.0).sum(dim=-1)


class SoftHKR(Margined):
    """HKR for several classes: (1 - alpha) (sum_j p_j f_j - f_y) / (2 L) + alpha (h(f_y) + sum_j p_j h(-f_j)) / 2.

    The sums are over the classes j other than y, h(z) = max(0, margin - z / L), and p is the softmax of T f_j / L
    over the same classes: at T -> 0 all of them count alike, at T -> infinity the largest alone. A point with
    h = 0 throughout is at least `margin` away from every point where another class has the largest output, as for
    `MultiMargin`. For two classes with the outputs (-f, f) it is -(1 - alpha) s f / L + alpha `Hinge` of f. It is
    for networks with a bound, as `HKR`. f is (K, B, C) and y (K, B), of 0, 1, ..., C - 1.

    It is half of deel-torchlip's SoftHKRMulticlassLoss, whose min_margin is twice the margin here, but for the
    temperature, which follows the running mean of |f| there and is constant here.

    Args, beyond the margin and L:
        alpha: the weight of the hinge loss, from 0 to 1.
        temperature: T, per unit of the input.

    Reference: Serrurier et al. 2022, "On the explainable properties of 1-Lipschitz neural networks: an optimal
    transport perspective" (arXiv 2206.06854).
    """

    task = "multiclass"
    per_run = ("alpha", "margin", "temperature", "lipschitz")

    def __init__(
        self, alpha: float = 0.95, margin: float = 0.25, temperature: float = 10.0, lipschitz: float = 1.0
    ) -> None:
        super().__init__(margin, lipschitz)
        self.alpha = number("alpha", alpha, least=0, most=1)
        self.temperature = number("temperature", temperature, above=0)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        own, distance = y.long().unsqueeze(-1), f / column(self.lipschitz, f)  # (K, B, 1) and (K, B, C)
        others = (column(self.temperature, f) * distance).scatter(-1, own, -torch.inf).softmax(dim=-1)
        signed = (-distance).scatter(-1, own, distance.gather(-1, own))
        weights = others.scatter(-1, own, 1.0)
        alpha, lacking = column(self.alpha, f), torch.relu(column(self.margin, f) - signed)
        return (weights * (alpha * lacking - (1 - alpha) * signed)).sum(dim=-1) / 2


class Cosine(Loss):
    """1 - f_y / ||f||_2: how far the outputs point away from the axis of the class; it is 1 where f = 0.

    It is the same for c f with any c > 0, so it needs no L: its derivatives by f have the size 1 / ||f||_2, and f
    and the derivatives of f by the parameters are proportional to L, so those of the loss by the parameters have a
    size of about 1 for every L. For the same reason it asks for no radius. f is (K, B, C) and y (K, B), of
    0, 1, ..., C - 1.

    Reference: Barz and Denzler 2020, "Deep learning on small datasets without pre-training using cosine loss"
    (arXiv 1901.09054).
    """

    task = "multiclass"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        # In units of the largest output, since squares of small ones underflow.
        largest = f.detach().abs().amax(dim=-1, keepdim=True)  # (K, B, 1)
        unit = f / largest.where(largest > 0, 1)
        length = torch.linalg.vector_norm(unit, dim=-1)  # at least 1 unless f = 0
        return 1 - unit.gather(-1, y.long().unsqueeze(-1)).squeeze(-1) / length.clamp_min(0.5)


# Two or several --------------------------------------------------------------------------------------------------


class CertifiedRadius(Scaled):
    """R g(1 - r / R) with the certified radius r of the class y of a point, below 0 where f errs.

    r = s f / L with s = 2 y - 1 for two classes, and min_j (f_y - f_j) / (2 L) over the classes j other than y for
    several. A network with the constant L has f_y - f_j with the constant 2 L at most, whichever norm its outputs
    live in; where that is the 2-norm (constraint=spectral) it is sqrt(2) L, and points are sqrt(2) times as safe.

    g(u) is 0 below 0, and u from there to 2, where r = -R: so far the loss is `Hinge` with the margin R, for
    several classes that to the nearest other one. Beyond, g(u) = 2 + 2 log(u / 2), so that points far on the wrong
    side, which may never be mended, do not outweigh others. If it stayed at 2, they would have no derivative, and
    a network that starts with |f| > R L at most points would not learn. The mean loss is at least R times the
    share of errors.

    Args:
        radius: R, in the units of the input.
        lipschitz: L.

    Reference: Collobert et al. 2006, "Trading convexity for scalability", on the ramp loss, which stays at 2.
    """

    task = ("classification", "multiclass")
    per_run = ("radius", "lipschitz")

    def __init__(self, radius: float = 0.25, lipschitz: float = 1.0) -> None:
        super().__init__(lipschitz)
        self.radius = number("radius", radius, above=0)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        if f.ndim == y.ndim:
            found = _radius(f, y, self.lipschitz)
        else:
            own, radii = _radii_to_others(f, y, self.lipschitz)
            found = radii.scatter(-1, own, torch.inf).amin(dim=-1)
        radius = column(self.radius, y)
        ramp = torch.relu(1 - found / radius)
        return radius * (ramp.clamp_max(2) + 2 * (ramp / 2).clamp_min(1).log())
