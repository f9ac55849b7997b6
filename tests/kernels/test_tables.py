"""Rotation tables against the published angles."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kernels.st_rope import StRopeTables, st_rope_tables

FIXTURE = Path(__file__).parents[1] / "fixtures" / "eva02_micro_timm.pt"


def angles(tables: StRopeTables) -> torch.Tensor:
    """Angle of every (frame, patch, pair), modulo 2 pi, through the product of the factors."""
    space, time = (torch.view_as_complex(table) for table in tables)
    return (time[:, None] * space[None]).angle()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b + math.pi) % (2 * math.pi) - math.pi).abs().max().item()


def test_every_angle_of_the_b16_model() -> None:
    """i < 16: p_h w^(i/16) + t w^(i/32); i >= 16: p_w w^((i-16)/16) + t w^(i/32); w = 1e-4."""
    expected = torch.empty(3, 14, 14, 32, dtype=torch.float64)
    for t in range(3):
        for row in range(14):
            for column in range(14):
                for i in range(32):
                    place = row if i < 16 else column
                    expected[t, row, column, i] = place * 16 / 14 * 10000 ** (
                        -(i % 16) / 16
                    ) + t * 10000 ** (-i / 32)
    tables = st_rope_tables((14, 14), 3, 64)
    assert difference(angles(tables), expected.flatten(1, 2)) < 1e-13


def test_split_mode_divides_the_head() -> None:
    """t : h : w = 1/4 : 3/8 : 3/8, each with frequencies of its own."""
    tables = st_rope_tables((2, 3), 4, 32, mode="split", reference_grid=16)
    expected = torch.empty(4, 2, 3, 16, dtype=torch.float64)
    for t in range(4):
        for row in range(2):
            for column in range(3):
                time = [t * 10000 ** (-i / 4) for i in range(4)]
                height = [row * 8 * 10000 ** (-i / 6) for i in range(6)]
                width = [column * 16 / 3 * 10000 ** (-i / 6) for i in range(6)]
                expected[t, row, column] = torch.tensor(time + height + width)
    assert difference(angles(tables), expected.flatten(1, 2)) < 1e-5  # float32 list above


def test_no_time_in_mode_none() -> None:
    tables = st_rope_tables((2, 2), 5, 8, mode="none")
    assert torch.equal(tables.temporal[..., 0], torch.ones(5, 4, dtype=torch.float64))
    assert torch.equal(tables.temporal[..., 1], torch.zeros(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", ["base_flags", "large_flags", "large336_flags"])
def test_timm_tables(name: str) -> None:
    """timm's own sine and cosine, which it keeps in float32."""
    case = torch.load(FIXTURE, weights_only=True)["cases"][name]
    grid = case["config"]["grid"]
    tables = st_rope_tables((grid, grid), 1, case["config"]["head_dim"])
    cos, sin = (tables.spatial[..., i].repeat_interleave(2, -1).float() for i in (0, 1))
    torch.testing.assert_close(cos, case["rope_cos"], rtol=0, atol=2e-6)
    torch.testing.assert_close(sin, case["rope_sin"], rtol=0, atol=2e-6)


def test_temporal_positions() -> None:
    halves = st_rope_tables((1, 1), 3, 8, temporal_positions=[0.0, 0.5, 1.0])
    whole = st_rope_tables((1, 1), 2, 8)
    torch.testing.assert_close(halves.temporal[[0, 2]], whole.temporal)


def test_tables_are_small_and_rounded_once() -> None:
    tables = st_rope_tables((14, 14), 16, 64, dtype=torch.float32)
    assert tables.spatial.shape == (196, 32, 2) and tables.temporal.shape == (16, 32, 2)
    exact = st_rope_tables((14, 14), 16, 64)
    assert torch.equal(tables.spatial, exact.spatial.float())
    assert tables.factors(torch.bfloat16)[0].dtype == torch.float32
    assert exact.factors(torch.float64)[0] is exact.spatial


def test_tables_of_one_clip_are_built_once_and_serve_training_after_inference() -> None:
    with torch.inference_mode():
        first = st_rope_tables((3, 5), 7, 12)
    assert st_rope_tables((3, 5), 7, 12).spatial is first.spatial
    weight = torch.ones(1, requires_grad=True, dtype=torch.float64)
    (weight * first.spatial).sum().backward()  # raises for inference tensors


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((2, 2), 1, 6), {}, "head_dim is 6; mode 'rotary' needs a multiple of 4"),
        (((2, 2), 1, 24), {"mode": "split"}, "multiple of 16"),
        (((2, 2), 1, 8), {"mode": "3d"}, "'3d'; it must be one of none, rotary, split"),
        (((2, 2), 0, 8), {}, "at least 1"),
        (((2, 2), 3, 8), {"temporal_positions": [0, 1]}, "2 entries for 3 frames"),
    ],
)
def test_impossible_tables(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st_rope_tables(*arguments, **options)
