"""Models between models: the weighted mean of weights (WiSE-FT, model soups)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from lightning_modules.checkpoints.conversion import Loaded

Model = TypeVar("Model", bound=Loaded)


def interpolate(parts: Sequence[Model], weights: Sequence[float] | None = None) -> Model:
    """The mean of several models' weights, parameter by parameter.

    Between a zero-shot and a fine-tuned model it is WiSE-FT (arXiv 2109.01903), over runs of one
    initialisation a soup (arXiv 2203.05482); of models that do not share one it is noise. Summed in
    float64, so that the mean of a model with itself is that model to the bit.

    Args:
        parts: At least two models of one architecture. The first is changed in place.
        weights: One each, not negative; their sum is taken as 1. Equal by default.

    Returns:
        The first, holding the mean.

    Raises:
        ValueError: There are not as many weights as models, they cannot be normalised, or the
            models differ in their architecture; names where.
    """
    weights = [1.0] * len(parts) if weights is None else list(weights)
    if len(parts) < 2 or len(weights) != len(parts):
        raise ValueError(
            f"{len(parts)} checkpoints and {len(weights)} weights given; interpolation needs two "
            "checkpoints at least, and a weight for each"
        )
    if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
        raise ValueError(f"weights {weights} given; none may be negative, and not all of them 0")
    first, shares = parts[0], [weight / math.fsum(weights) for weight in weights]
    for other in parts[1:]:
        _check_same(first, other)
    states = [part.model.state_dict() for part in parts]
    with torch.no_grad():
        for name, tensor in states[0].items():
            total = torch.zeros_like(tensor, dtype=torch.float64)
            for state, share in zip(states, shares, strict=True):
                total.add_(state[name].double(), alpha=share)
            tensor.copy_(total)
    first.parts = [
        {"source": str(part.source.path), "step": part.source.step, "weight": share}
        for part, share in zip(parts, shares, strict=True)
    ]
    return first


def _check_same(first: Loaded, other: Loaded) -> None:
    """Both must be of one kind, with the same configuration and the same parameters."""
    told: dict[str, tuple[Any, Any]] = {}
    if type(first.model) is not type(other.model):
        told["kind"] = (type(first.model).__name__, type(other.model).__name__)
    one, two = (_flat(dataclasses.asdict(part.config)) for part in (first, other))
    told |= {name: (one[name], two[name]) for name in one if one[name] != two.get(name)}
    shapes = [{k: tuple(v.shape) for k, v in p.model.state_dict().items()} for p in (first, other)]
    if not told:
        told = {
            name: (shapes[0].get(name), shapes[1].get(name))
            for name in shapes[0] | shapes[1]
            if shapes[0].get(name) != shapes[1].get(name)
        }
    if told:
        listed = ", ".join(f"{name} {a} and {b}" for name, (a, b) in list(told.items())[:4])
        raise ValueError(
            f"{first.source.path} and {other.source.path} are different models ({listed}): there "
            "is nothing between them. --set reads both with one value of a field where that is "
            "possible (--set vision.num_frames=16)"
        )


def _flat(values: Mapping[str, Any], stem: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{stem}{name}.") if nested else {stem + name: value}
    return flat
