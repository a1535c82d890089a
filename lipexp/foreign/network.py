"""What was read as a network: a chain of affine layers, each with the activation behind it.

Weights are never multiplied with each other unless the product is exact. Two affine maps that follow each other
stay two layers, with the identity between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from lipexp.activations import Activation, Identity
from lipexp.blocks import Affine
from lipexp.foreign.features import Numbers, Rows, Stage, Unread, change
from lipexp.networks import BakedNetwork

IDENTITY = Identity()


class Layer(NamedTuple):
    """act(W x + b), in float64."""

    weight: Numbers  # (out, in)
    bias: Numbers  # (out,)
    act: Activation


@dataclass(frozen=True)
class Foreign:
    """A network from elsewhere, as lipexp certifies it."""

    network: BakedNetwork  # K = 1
    rounding: float  # of its numbers to float32: the largest relative change of one, at most 2^-24
    notes: Sequence[str] = ()  # what was left off, and the like
    names: Sequence[str] = field(default_factory=list)  # of its inputs, where they are known
    classes: Sequence[object] = ()  # of a classifier, where they are known


def network_of(layers: Sequence[Layer], linear: Numbers | None = None) -> tuple[BakedNetwork, float]:
    """The network of these layers, rounded to float32, and the largest relative rounding.

    Args:
        linear: (C, D) A: A x is added to the outputs.

    Raises:
        Unread: it has numbers that float32 cannot hold.
    """
    layers = folded(layers)
    numbers = [*(part for layer in layers for part in layer[:2]), *([] if linear is None else [linear])]
    with np.errstate(over="ignore"):
        rounded = [part.astype(np.float32) for part in numbers]
    if not all(np.isfinite(part).all() for part in rounded):
        raise Unread("holds numbers beyond the range of float32")
    changes = [change(old, new) for new, old in zip(rounded, numbers, strict=True)]
    changes += [layer.act.rounding for layer in layers]
    tensors = [torch.from_numpy(np.ascontiguousarray(part))[None] for part in rounded]
    blocks = [Affine(tensors[2 * i], tensors[2 * i + 1][:, None]) for i in range(len(layers))]
    acts = [layer.act for layer in layers]
    for block, act in zip(blocks[:-1], acts, strict=False):
        act.check_width(block.weight.shape[1])
    return _baked(blocks, acts, None if linear is None else tensors[-1]), max(changes, default=0.0)


def _baked(blocks: Sequence[Affine], acts: Sequence[Activation], linear: torch.Tensor | None) -> BakedNetwork:
    return BakedNetwork(blocks, acts, linear=linear)


def chain(outputs: Rows) -> tuple[list[Layer], Numbers | None]:
    """The layers whose outputs these features are, and the linear term beside them."""
    features = outputs.per_row
    if len(features) == 0:
        raise Unread("has no features")
    layers = _layers(_last(outputs.stage, features))
    if outputs.beside is None:
        return layers, None
    beside = _layers(_last(outputs.beside.stage, outputs.beside.per_row))
    linear, offset = beside[0].weight, beside[0].bias
    for layer in beside[1:]:
        linear, offset = layer.weight @ linear, layer.weight @ offset + layer.bias
    last = layers[-1]
    return [*layers[:-1], last._replace(bias=last.bias + offset)], linear


def _last(stage: Stage, features: Numbers) -> Stage:
    """An affine map whose outputs are some features of a stage."""
    if stage.weight is None or stage.bias is None or stage.parent is None:
        return stage.selected(features)
    return stage.parent.mapped(stage.weight[features], stage.bias[features])


def _layers(last: Stage) -> list[Layer]:
    stages, stage = [last], last
    while stage.parent is not None:
        stage = stage.parent
        stages.append(stage)
    layers: list[Layer] = []
    waiting: tuple[Numbers, Numbers] | None = None  # a map behind which no activation has come yet
    for stage in reversed(stages[:-1]):
        if stage.act is not None:
            weight, bias = waiting or (np.eye(stage.width), np.zeros(stage.width))
            layers.append(Layer(weight, bias, stage.act))
            waiting = None
        elif stage.weight is not None and stage.bias is not None:
            layers += [Layer(*waiting, IDENTITY)] if waiting else []
            waiting = stage.weight, stage.bias
    assert waiting is not None
    return [*layers, Layer(*waiting, IDENTITY)]


# Folding ---------------------------------------------------------------------------------------------------------


def folded(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, with affine maps that follow each other multiplied where that needs no rounding."""
    found = [layers[0]]
    for layer in layers[1:]:
        product = _product(layer, found[-1]) if found[-1].act is IDENTITY else None
        if product is None:
            found.append(layer)
        else:
            found[-1] = product
    return found


def _product(outer: Layer, inner: Layer) -> Layer | None:
    """Both maps as one, if its numbers are float32 without rounding."""
    if not all(_fits(part) for part in (*outer[:2], *inner[:2])):
        return None
    one = (np.count_nonzero(outer.weight, axis=1) <= 1).all()  # so each entry is one product, exact in float64
    if not (one or (np.count_nonzero(inner.weight, axis=0) <= 1).all()):
        return None
    weight = outer.weight @ inner.weight
    # A product that underflows float64 would be a multiple of 2^-298, which it holds.
    sums = [[*row[row != 0] * inner.bias[row != 0], b] for row, b in zip(outer.weight, outer.bias, strict=True)]
    bias = np.array([math.fsum(terms) for terms in sums])
    exact = all(math.fsum([*terms, -total]) == 0 for terms, total in zip(sums, bias, strict=True))
    return Layer(weight, bias, outer.act) if exact and _fits(weight) and _fits(bias) else None


def _fits(numbers: Numbers) -> bool:
    with np.errstate(over="ignore"):
        return bool((numbers.astype(np.float32) == numbers).all())
