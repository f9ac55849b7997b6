"""The learnable temperature stays within CLIP's bounds and can come back from them."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.models.dual_encoder import MAX_LOG_SCALE, _ClampInward


@pytest.mark.parametrize(
    ("start", "target", "expected"),
    [
        (4.0, 200.0, 100.0),  # the loss wants more than the bound
        (0.5, 0.01, 1.0),  # and less
        (4.0, 30.0, 30.0),  # and a value inside
        (MAX_LOG_SCALE + 0.05, 30.0, 30.0),  # from beyond the bound, back in
    ],
)
def test_descent_ends_at_the_nearest_allowed_scale(start: float, target: float, expected: float):
    parameter = torch.nn.Parameter(torch.tensor([start]))
    optimizer = torch.optim.SGD([parameter], lr=0.02)
    for _ in range(2000):
        optimizer.zero_grad()
        log_scale = _ClampInward.apply(parameter)
        (0.5 * (log_scale - math.log(target)) ** 2).sum().backward()
        optimizer.step()
    assert log_scale.exp().item() == pytest.approx(expected, rel=1e-3)  # 2,000 steps of descent
    # one step beyond a bound at most: 0.02 times the largest slope here
    assert -0.1 < parameter.item() < MAX_LOG_SCALE + 0.1
