"""Rotation tables against the published angles."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kernels.attention import (
    st_rope_attention,
    st_rope_attention_packed,
    st_rope_attention_pooled,
)
from kernels.st_rope import StRopeTables, _cached_tables, apply_st_rope, st_rope_tables

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
    positions = [0.0, 0.1, 1 / 3, 2.7]
    temporal = st_rope_tables((1, 1), 4, 8, temporal_positions=positions).temporal
    expected = torch.tensor(
        [[t * 10**-i for i in range(4)] for t in positions], dtype=torch.float64
    )
    torch.testing.assert_close(temporal[..., 0], expected.cos(), rtol=0, atol=1e-15)
    torch.testing.assert_close(temporal[..., 1], expected.sin(), rtol=0, atol=1e-15)


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


@pytest.mark.parametrize("stretch", [0.5, 2.0, 3.0])
@pytest.mark.parametrize(
    ("mode", "head_dim", "pairs"), [("rotary", 4, 2), ("rotary", 64, 32), ("split", 48, 6)]
)
def test_stretched_time(mode: str, head_dim: int, pairs: int, stretch: float) -> None:
    """The fastest frequency stays, the slowest is divided by s, those between follow."""
    tables = st_rope_tables((1, 1), 3, head_dim, mode=mode, theta=100.0, temporal_stretch=stretch)
    for t in range(3):
        for i in range(head_dim // 2):
            frequency = 100 ** (-i / pairs) * stretch ** (-i / (pairs - 1)) if i < pairs else 0
            cos, sin = tables.temporal[t, i]
            assert cos.item() == pytest.approx(math.cos(t * frequency), abs=1e-14)
            assert sin.item() == pytest.approx(math.sin(t * frequency), abs=1e-14)


def test_angles_are_formed_on_the_cpu_whatever_the_default_device() -> None:
    arguments = {"grid": (2, 3), "frames": 4, "head_dim": 32, "mode": "split"}
    expected = st_rope_tables(**arguments, dtype=torch.float32)
    _cached_tables.cache_clear()
    with torch.device("meta"):
        got = st_rope_tables(**arguments, dtype=torch.float32, device="cpu")
        default = st_rope_tables(**arguments)
    for a, b, c in zip(got, expected, default, strict=True):
        assert torch.equal(a, b)
        assert c.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ((2, 2), 1, 6),
            {},
            "head_dim is 6; mode 'rotary' needs a multiple of 4. "
            "Choose another width or number of heads.",
        ),
        (
            ((2, 2), 1, 24),
            {"mode": "split"},
            "head_dim is 24; mode 'split' needs a multiple of 16. "
            "Choose another width or number of heads.",
        ),
        (
            ((2, 2), 1, 0),
            {"mode": "none"},
            "head_dim is 0; mode 'none' needs a multiple of 4. "
            "Choose another width or number of heads.",
        ),
        (((2, 2), 1, 8), {"mode": "3d"}, "mode is '3d'; it must be one of none, rotary, split"),
        (((2, 2), 0, 8), {}, "grid (2, 2) and frames 0 must be at least 1"),
        (((0, 2), 1, 8), {}, "grid (0, 2) and frames 1 must be at least 1"),
        (((2, 0), 1, 8), {}, "grid (2, 0) and frames 1 must be at least 1"),
        (
            ((2, 2), 3, 8),
            {"temporal_positions": [0, 1]},
            "temporal_positions has 2 entries for 3 frames",
        ),
        (
            ((2, 2), 1, 8),
            {"temporal_stretch": 0.0},
            "temporal_stretch is 0.0; it must be positive",
        ),
        (
            ((2, 2), 1, 8),
            {"temporal_stretch": math.nan},
            "temporal_stretch is nan; it must be positive",
        ),
    ],
)
def test_impossible_tables(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        st_rope_tables(*arguments, **options)
    assert str(error.value) == message


@pytest.mark.parametrize(("tokens", "head_dim"), [(18, 20), (20, 20), (19, 16)])
@pytest.mark.parametrize("wrong", ["q", "k", "packed", "pooled"])
def test_tokens_of_another_clip_are_refused(wrong: str, tokens: int, head_dim: int) -> None:
    """By every door, q and k each."""
    tables = st_rope_tables((2, 3), 3, 20)
    good, bad = torch.zeros(1, 19, 2, 20), torch.zeros(1, tokens, 2, head_dim)
    q, k = (bad if wrong == name else good for name in "qk")
    doors = {
        "packed": [lambda: st_rope_attention_packed(bad.repeat(1, 1, 1, 3).flatten(2), 2, tables)],
        "pooled": [
            lambda: st_rope_attention_pooled(
                bad[:, :1], bad.repeat(1, 1, 1, 2).flatten(2), torch.zeros(1).long(), tables
            )
        ],
    }
    pair = [lambda: apply_st_rope(q, k, tables), lambda: st_rope_attention(q, k, q, tables)]
    for door in doors.get(wrong, pair):
        with pytest.raises(ValueError) as error:
            door()
        assert str(error.value) == (
            f"q and k have {tokens} tokens of head dim {head_dim}; the tables are for 1 + 3*6 "
            "tokens of head dim 20. Build them with st_rope_tables(grid, frames, head_dim) of "
            "this clip."
        )
