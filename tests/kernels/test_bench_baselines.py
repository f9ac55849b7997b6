"""The benches compare like with like: the field's formulation gives the same numbers as ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_modules.bench import baselines
from lightning_modules.bench.step import Step, make_batch
from lightning_modules.bench.timing import compare, peak_tensor_bytes
from lightning_modules.cli.bench import main as bench
from lightning_modules.models import (
    DualEncoder,
    DualEncoderConfig,
    TextConfig,
    VisionConfig,
)


@pytest.mark.parametrize("explicit", [True, False])
def test_baseline_has_our_outputs_and_gradients(explicit: bool) -> None:
    torch.manual_seed(0)
    vision = VisionConfig(
        image_size=16, patch_size=4, width=32, depth=2, num_heads=2, mlp_hidden=40, num_frames=3
    )
    text = TextConfig(context_length=8, vocab_size=32, width=16, depth=2, num_heads=2)
    model = DualEncoder(DualEncoderConfig(vision, text, embed_dim=12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    video = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    tokens = torch.randint(0, 32, (2, 8))
    options = {"explicit": explicit, "recompute": True}
    results = []
    for v, t in (
        (model.visual(video), model.text(tokens)),
        (
            baselines.encode_video(model.visual, video, **options),
            baselines.encode_text(model, tokens, **options),
        ),
    ):
        model.zero_grad()
        (v.square().sum() + t.square().sum()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((v.detach(), t.detach(), gradients))
    # float32 sums in another order, through two blocks
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


SMALL = DualEncoderConfig(
    VisionConfig(
        image_size=16, patch_size=4, width=32, depth=2, num_heads=2, mlp_hidden=40, num_frames=3
    ),
    TextConfig(width=16, depth=2, num_heads=2),
    embed_dim=12,
)


@pytest.mark.parametrize("variant", ["softmax", "sdpa", "kept"])
def test_a_baseline_keeps_to_its_device(variant: str) -> None:
    """On the meta device, which like CUDA refuses to meet the CPU's tensors."""
    step = Step(variant, SMALL, "meta", mixed=False)
    video, tokens = make_batch(SMALL, 2, "meta")
    loss = step.loss(video, tokens)
    loss.backward()
    assert loss.device.type == "meta"
    with pytest.raises(RuntimeError, match=r"on device cpu|same device"):
        loss + torch.ones(3)


def test_bench_step_times_the_same_step(tmp_path: Path) -> None:
    """Under autocast too: the losses agree within bf16's rounding of the embeddings."""
    names = ["softmax", "sdpa", "kept", "ours", "recomputed"]
    arguments = ["--preset", "eva02_at_tiny", "--depth", "0", "--batch", "2", "--rounds", "1"]
    for dtype, tolerance in (("float32", 1e-3), ("bf16-mixed", 0.1)):
        file = tmp_path / "rows.json"
        words = [*arguments, "--dtype", dtype, "--variants", *names, "--json", str(file)]
        assert bench(["step", *words]) == 0
        notes = [row["notes"] for row in json.loads(file.read_text())["rows"]]
        losses = [float(note["loss"].split(" -> ")[0]) for note in notes]
        assert losses == pytest.approx([losses[0]] * len(names), abs=tolerance)
        assert all(note["pairs/s"] > 0 for note in notes)
    with pytest.raises(ValueError, match="`graphs` needs a CUDA device"):
        bench(["step", "--variants", "graphs"])


def test_bench_kernels_runs_a_block_as_the_recipes_do(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = ["--frames", "1", "--rounds", "1", "--dtype", "bf16-mixed", "--json", str(file)]
    assert bench(["kernels", *words]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["group"] for row in rows} == {"block fwd+bwd, 1 x 197 tokens, bf16-mixed"}


def test_compare_takes_ratios_to_the_first_case() -> None:
    now = iter(float(t) for t in (0, 4, 4, 6, 6, 10, 10, 12))
    cases = {"slow": lambda: None, "fast": lambda: None}
    slow, fast = compare("g", cases, rounds=2, warmup=0, clock=lambda: next(now))
    assert (slow.median_s, slow.ratio, fast.median_s, fast.ratio) == (4.0, 1.0, 2.0, 2.0)


def test_peak_is_counted_to_the_byte() -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA's allocator rounds up")
    assert peak_tensor_bytes(lambda: torch.zeros(1000) + torch.zeros(1000)) == 12_000


def test_bench_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--frames", "1", "--rounds", "1", "--only", "rotation", "--dtype", "float32"]
    assert bench(["kernels", *arguments, "--json", str(tmp_path / "rows.json")]) == 0
    assert "in place" in capsys.readouterr().out
    assert '"ratio"' in (tmp_path / "rows.json").read_text()
    with pytest.raises(ValueError, match="unknown bench 'kernel'; one of: kernels"):
        bench(["kernel"])
