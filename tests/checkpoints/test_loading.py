"""Wrappers, layouts, resampling and every way a checkpoint can be wrong."""

from __future__ import annotations

import argparse
import math
import os
import pickletools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_modules.checkpoints import load_clip_checkpoint
from lightning_modules.checkpoints.loading import read_checkpoint
from lightning_modules.checkpoints.plain_data import load_plain
from lightning_modules.cli.endings import exit_code
from lightning_modules.models import DualEncoder, DualEncoderConfig, TextConfig, VisionConfig
from lightning_modules.training.run import checkpoint_store

EVA = DualEncoderConfig(
    VisionConfig(
        image_size=16, patch_size=4, width=32, depth=2, num_heads=2, mlp_hidden=40, num_frames=4
    ),
    TextConfig(context_length=8, vocab_size=32, width=16, depth=1, num_heads=2),
    embed_dim=12,
)


def build(config: DualEncoderConfig = EVA, *, seed: int = 0, **vision: object) -> DualEncoder:
    embed_dim = vision.pop("embed_dim", config.embed_dim)
    config = replace(config, vision=replace(config.vision, **vision), embed_dim=embed_dim)
    torch.manual_seed(seed)
    model = DualEncoder(config)
    with torch.no_grad():  # nothing at the value it is initialised with
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(2, 3, 4, 16, 16, generator=generator)
    return video, torch.randint(0, 32, (2, 8), generator=generator)


def assert_same_model(a: DualEncoder, b: DualEncoder) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


WRAPPERS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s},
    "module": lambda s: {"module": s},
    "nested": lambda s: {"model": {"state_dict": s}},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "lightning": lambda s: {
        "state_dict": {**{f"model.{k}": v for k, v in s.items()}, "loss.weight": torch.ones(1)}
    },
    "compiled": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_and_prefixes(wrapper: str) -> None:
    source, target = build(seed=1), build(seed=2)
    report = load_clip_checkpoint(WRAPPERS[wrapper](source.state_dict()), target)
    assert_same_model(source, target)
    assert report.missing == [] and report.interpolated == {} and report.reinitialised == []


def test_avion_training_checkpoint_with_namespace(tmp_path: Path) -> None:
    """AVION stores its arguments beside the weights, and names the ViT's parts its own way."""
    config = DualEncoderConfig(
        VisionConfig(
            image_size=16,
            patch_size=4,
            width=32,
            depth=2,
            num_heads=2,
            mlp_hidden=64,
            architecture="clip",
            temporal="learnable",
        ),
        EVA.text,
        embed_dim=12,
    )
    source, target = build(config, seed=1), build(config, seed=2)
    state: dict[str, torch.Tensor] = {}
    for key, value in source.state_dict().items():
        key = key.replace("text.", "textual.").replace(".blocks.", ".transformer.resblocks.")
        key = key.replace(".norm1.", ".ln_1.").replace(".norm2.", ".ln_2.")
        key = key.replace(".attn.qkv.weight", ".attn.Wqkv.weight")
        key = key.replace(".attn.proj.", ".attn.out_proj.").replace(
            "visual.norm_pre", "visual.ln_pre"
        )
        if key.endswith(("k_bias", "v_bias")):
            continue
        if key.endswith("q_bias"):
            native = key.replace("textual.", "text.").replace("transformer.resblocks", "blocks")
            value = torch.cat(
                [source.state_dict()[native.replace("q_bias", f"{n}_bias")] for n in "qkv"]
            )
            key = key.replace("qkv.q_bias", "Wqkv.bias")
        if key == "visual.patch_embed.weight":
            key, value = "visual.conv1.weight", value.flatten(1)
        if key == "visual.cls_token":
            key, value = "visual.class_embedding", value.flatten()
        if key == "visual.pos_embed":
            key, value = "visual.positional_embedding", value[0]
        if key == "visual.head.weight":
            key, value = "visual.image_projection", value.t()
        if key == "textual.head.weight":
            key, value = "textual.text_projection", value.t()
        key = key.replace("visual.norm.", "visual.ln_post.").replace(
            "textual.norm.", "textual.ln_final."
        )
        key = key.replace("temporal_embed", "temporal_embedding")
        value = value.reshape(()) if key == "logit_scale" else value
        state[f"module.{key}"] = value.clone()
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 1, "state_dict": state, "args": argparse.Namespace(lr=3e-5)}, path)
    report = load_clip_checkpoint(path, target)
    assert_same_model(source, target)
    assert report.missing == [] and report.ignored == []


def test_fp16_file_and_zero_dim_temperature(tmp_path: Path) -> None:
    source, target = build(seed=1), build(seed=2)
    state = {k: v.half() for k, v in source.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    torch.save(state, tmp_path / "half.pt")
    load_clip_checkpoint(tmp_path / "half.pt", target)
    assert target.logit_scale.shape == (1,) and target.logit_scale.dtype == torch.float32
    torch.testing.assert_close(target.state_dict(), source.half().float().state_dict())


def test_safetensors(tmp_path: Path) -> None:
    source, target = build(seed=1), build(seed=2)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    load_clip_checkpoint(str(tmp_path / "model.safetensors"), target)
    assert_same_model(source, target)


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_one_tower_alone(tower: str) -> None:
    source, target = build(seed=1), build(seed=2)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    report = load_clip_checkpoint(getattr(source, tower).state_dict(), target)
    for key, value in target.state_dict().items():
        expected = source.state_dict()[key] if key.startswith(tower) else before[key]
        assert torch.equal(value, expected), key
    assert report.missing == [k for k in before if not k.startswith(tower)]


def test_new_projection_is_reinitialised() -> None:
    source, target = build(seed=1), build(seed=2, embed_dim=7)
    heads = [target.visual.head.weight.clone(), target.text.head.weight.clone()]
    report = load_clip_checkpoint(source.state_dict(), target)
    assert sorted(report.reinitialised) == [
        "text.head.weight",
        "visual.head.bias",
        "visual.head.weight",
    ]
    assert torch.equal(heads[0], target.visual.head.weight)
    assert torch.equal(heads[1], target.text.head.weight)
    assert torch.equal(source.visual.norm.weight, target.visual.norm.weight)


def test_four_to_sixteen_frames_and_back() -> None:
    source, target = build(seed=1), build(seed=2, num_frames=16)
    report = load_clip_checkpoint(source.state_dict(), target)
    p = source.visual.temporal_embed
    got = target.visual.temporal_embed
    assert "visual.temporal_embed" in report.interpolated
    # source points 0, 0, .125, .375, ..., 2.875, 3, 3
    points = [min(max((t + 0.5) / 4 - 0.5, 0.0), 3.0) for t in range(16)]
    assert points[:4] == [0, 0, 0.125, 0.375] and points[-3:] == [2.875, 3, 3]
    for row, point in zip(got, points, strict=True):
        low = min(int(point), 2)
        torch.testing.assert_close(row, p[low] + (point - low) * (p[low + 1] - p[low]))
    back = build(seed=3)
    load_clip_checkpoint(target.state_dict(), back)
    # 16 -> 4: new frame t stands between old frames 4t+1 and 4t+2
    expected = torch.stack([(got[4 * t + 1] + got[4 * t + 2]) / 2 for t in range(4)])
    torch.testing.assert_close(back.visual.temporal_embed, expected)


def test_another_resolution_resamples_positions_bicubically() -> None:
    source, target = build(seed=1), build(seed=2, image_size=24)
    report = load_clip_checkpoint(source.state_dict(), target)
    assert list(report.interpolated) == ["visual.pos_embed"]
    assert torch.equal(source.visual.pos_embed[:, 0], target.visual.pos_embed[:, 0])
    grid = source.visual.pos_embed[0, 1:].unflatten(0, (4, 4))
    got = target.visual.pos_embed[0, 1:].unflatten(0, (6, 6))
    weights = torch.stack([cubic_weights((r + 0.5) * 4 / 6 - 0.5, 4) for r in range(6)])
    expected = torch.einsum("ra,cb,abd->rcd", weights, weights, grid)
    torch.testing.assert_close(got, expected)


def cubic_weights(point: float, size: int) -> torch.Tensor:
    """Weights of cubic convolution (a = -0.75, torch's) at a point, edges repeated."""
    a = -0.75
    weights = torch.zeros(size)
    for tap in range(math.floor(point) - 1, math.floor(point) + 3):
        x = abs(point - tap)
        if x <= 1:
            weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
        else:
            weight = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        weights[min(max(tap, 0), size - 1)] += weight
    return weights


def test_half_precision_positions_are_resampled_in_full() -> None:
    state = {key: tensor.half() for key, tensor in build(seed=1).state_dict().items()}
    load_clip_checkpoint(state, target := build(seed=2, image_size=24, num_frames=16))
    exact = {key: tensor.float() for key, tensor in state.items()}
    load_clip_checkpoint(exact, same := build(seed=3, image_size=24, num_frames=16))
    assert_same_model(target, same)


def test_positions_without_a_batch_dimension_are_resampled_on_their_grid() -> None:
    source = build(seed=1)
    state = source.state_dict()
    load_clip_checkpoint(state, expected := build(seed=2, image_size=24))
    flat = {**state, "visual.pos_embed": state["visual.pos_embed"][0]}
    load_clip_checkpoint(flat, target := build(seed=3, image_size=24))
    assert_same_model(target, expected)


def test_model_is_untouched_when_a_shape_is_wrong() -> None:
    source, target = build(seed=1), build(seed=2)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = {**source.state_dict(), "visual.norm.weight": torch.ones(31)}
    with pytest.raises(ValueError, match=r"visual\.norm\.weight.*\(31,\).*\(32,\).*preset"):
        load_clip_checkpoint(state, target)
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def drop(key: str):
    return lambda state: {k: v for k, v in state.items() if k != key}


def split_qkv_without_v(state: dict) -> dict:
    packed = state.pop("visual.blocks.0.attn.qkv.weight").chunk(3)
    return {
        **state,
        "visual.blocks.0.attn.q_proj.weight": packed[0],
        "visual.blocks.0.attn.k_proj.weight": packed[1],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"a": 1}, "holds no tensors"),
        (lambda s: {}, "holds no tensors"),
        (lambda s: {"foo.bar": torch.ones(2)}, r"no key fits this model; the file has foo\.bar"),
        (drop("visual.blocks.1.norm1.weight"), r"lacks visual\.blocks\.1\.norm1\.weight"),
        (
            lambda s: {k: v for k, v in s.items() if "visual.blocks.1." not in k},
            r"its visual tower has blocks 0\.\.0, the model's 0\.\.1; build the preset",
        ),
        (
            lambda s: {k.replace("visual.blocks.1.", "visual.blocks.3."): v for k, v in s.items()},
            r"its visual tower has blocks 0\.\.3 with gaps, the model's 0\.\.1;",
        ),
        (split_qkv_without_v, r"q_proj\.weight.*lacks.*v_proj\.weight"),
        (
            lambda s: {**s, "visual.blocks.0.ls1.gamma": torch.ones(32)},
            r"ls1\.gamma.*another architecture",
        ),
        (
            lambda s: {**s, "visual.pos_embed": torch.ones(1, 12, 32)},
            "only square grids",
        ),
        (
            lambda s: {**s, "visual.patch_embed.proj.weight": s["visual.patch_embed.weight"]},
            "twice",
        ),
    ],
)
def test_unusable_content_is_one_clear_error(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_clip_checkpoint(change(build(seed=1).state_dict()), build(seed=2))


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pt: no such file"):
        load_clip_checkpoint("absent.pt", build())


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": build().state_dict(), "x": _Evil()}, "evil.pt")
    with pytest.raises(ValueError, match="not unpickled"):
        load_clip_checkpoint("evil.pt", build())
    assert not Path("evil").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_and_empty_files(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    state = build().state_dict()
    if suffix == ".pt":
        torch.save(state, whole)
    else:
        save_file(state, whole)
    content = whole.read_bytes()
    for length in (0, 5, len(content) // 2):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.\w+ (cannot be read|is no file that torch)"):
            load_clip_checkpoint(cut, build())


OPERATIONS = [op.code.encode("latin1") for op in pickletools.opcodes] + [b"\n", b"0", b"torch\n"]


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(content=st.binary(max_size=40) | st.lists(st.sampled_from(OPERATIONS)).map(b"".join))
def test_no_bytes_break_the_reader(content: bytes, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("bytes") / "a.pt"
    path.write_bytes(content)
    for read in (read_checkpoint, load_plain):
        with pytest.raises(ValueError, match=r"a\.pt (cannot be read|is |holds )"):
            read(path)


@pytest.mark.parametrize("content", [b"to do: sleep\n", b"no checkpoint", b".", b"<html>", b"{}"])
def test_other_files_are_no_checkpoints(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    for read in (read_checkpoint, load_plain):
        with pytest.raises(ValueError, match=r"a\.pt (cannot be read|is no file that torch)"):
            read(tmp_path / "a.pt")


def test_torchscript_archive_is_explained(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(ValueError, match=r"TorchScript.*torch\.jit\.load"):
        load_clip_checkpoint(tmp_path / "script.pt", build())


def test_storage_that_fails_when_tensors_are_read_is_no_missing_file(tmp_path, monkeypatch) -> None:
    """safetensors: "No such file or directory", whatever the reason."""
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError):
        checkpoint_store.read_safetensors(path)
    save_file({"a": torch.ones(2)}, path)
    assert checkpoint_store.read_safetensors(path)["a"].tolist() == [1, 1]

    def fails(path):
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr(checkpoint_store, "load_file", fails)
    with pytest.raises(OSError, match="cannot be opened any more") as caught:
        checkpoint_store.read_safetensors(path)
    assert (
        checkpoint_store.is_of_the_machine(caught.value) and exit_code(caught.value, ["fit"]) == 75
    )
