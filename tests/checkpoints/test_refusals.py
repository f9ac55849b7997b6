"""What is told of a checkpoint's keys: reports and refusals, word for word."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoints import load_clip_checkpoint
from lightning_modules.checkpoints.layouts import translate, unwrap
from lightning_modules.checkpoints.loading import LoadReport
from lightning_modules.checkpoints.source import find_checkpoint
from lightning_modules.models import DualEncoder, DualEncoderConfig, TextConfig, VisionConfig
from lightning_modules.training.run.checkpoint_store import (
    STATE,
    CheckpointFolder,
    Manifest,
    checkpoint_name,
    file_record,
)

CONFIG = DualEncoderConfig(
    VisionConfig(
        image_size=16, patch_size=4, width=32, depth=2, num_heads=2, mlp_hidden=40, num_frames=4
    ),
    TextConfig(context_length=8, vocab_size=32, width=16, depth=2, num_heads=2),
    embed_dim=12,
)


def state(**vision: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = replace(CONFIG, vision=replace(CONFIG.vision, **vision))
    return dict(DualEncoder(config).state_dict())


def refusal(call, *arguments: object) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    return str(caught.value)


BLOCK = "visual.blocks.0.attn."
NO_TENSORS = (
    "the checkpoint holds no tensors: expected keys to tensors, possibly wrapped in state_dict, "
    "model, module, model_state_dict"
)


@pytest.mark.parametrize("content", [3, None, [1], {}, {"a": 1}, {"model": {"state_dict": {}}}])
def test_what_holds_no_tensors(content: object) -> None:
    assert refusal(unwrap, content) == NO_TENSORS


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (
            {"q_proj.weight": (4, 4), "k_proj.weight": (4, 4), "v_proj.weight": (4, 3)},
            "these tensors of the checkpoint must have one shape: {b}q_proj.weight (4, 4), "
            "{b}k_proj.weight (4, 4), {b}v_proj.weight (4, 3)",
        ),
        (
            {"q_proj.weight": (4, 4)},
            "the checkpoint has '{b}q_proj.weight' but lacks its companions (as "
            "{b}k_proj.weight, {b}v_proj.weight); the file is incomplete",
        ),
        (
            {"q_proj.weight": (4, 4), "k_proj.weight": (4, 4), "v_proj.weight": (4, 4)}
            | {"qkv.weight": (12, 4)},
            "the checkpoint holds '{b}qkv.weight' twice: as {b}qkv.weight and as {b}q_proj.weight, "
            "{b}k_proj.weight, {b}v_proj.weight. Remove one of them.",
        ),
    ],
)
def test_parts_that_do_not_make_a_whole(shapes: dict, told: str) -> None:
    tensors = {BLOCK + name: torch.ones(shape) for name, shape in shapes.items()}
    assert refusal(translate, tensors) == told.format(b=BLOCK)


def test_what_a_whole_was_made_of_is_told_where_it_comes_twice() -> None:
    names = [f"{BLOCK}{part}_proj.weight" for part in "qkv"]
    parts = {name: torch.ones(4, 4) for name in names}
    found = translate(parts)
    assert found.sources == {f"{BLOCK}qkv.weight": tuple(names)}
    told = refusal(found.add, f"{BLOCK}qkv.weight", torch.ones(1), ("one", "two"))
    assert told == (
        f"the checkpoint holds '{BLOCK}qkv.weight' twice: as {', '.join(names)} and as one, two. "
        "Remove one of them."
    )


@pytest.mark.parametrize(
    ("key", "tensor", "ours", "shape"),
    [
        ("text_projection", torch.ones(16, 12), "text.head.weight", (12, 16)),
        ("visual.conv1.weight", torch.ones(5, 3, 1, 4, 4), "visual.patch_embed.weight",
         (5, 3, 4, 4)),
        ("visual.conv1.weight", torch.ones(5, 3, 1, 1, 4), "visual.patch_embed.weight",
         (5, 3, 1, 4)),
        ("visual.conv1.weight", torch.ones(5, 48), "visual.patch_embed.weight", (5, 3, 4, 4)),
        ("visual.conv1.weight", torch.ones(5, 50), "visual.patch_embed.weight", (5, 50)),
        ("visual.other.weight", torch.ones(5, 3, 1, 4, 4), "visual.other.weight",
         (5, 3, 1, 4, 4)),
        ("visual.blocks.0.attn.in_proj_bias", torch.ones(9), "visual.blocks.0.attn.qkv.q_bias",
         (3,)),
        ("visual.blocks.0.attn.in_proj_bias", torch.ones(8), "visual.blocks.0.attn.qkv.bias",
         (8,)),
    ],
)  # fmt: skip
def test_shapes_of_other_layouts(key: str, tensor: torch.Tensor, ours: str, shape: tuple) -> None:
    # a video tower's mark, so that a key without prefix is taken by its own name alone
    found = translate({"cls_token": torch.ones(1, 1, 5), key: tensor})
    assert found.tensors[ours].shape == shape


@pytest.mark.parametrize("source", ["mapping", "file"])
def test_a_load_is_logged_with_all_that_was_done(tmp_path: Path, caplog, source: str) -> None:
    caplog.set_level(logging.INFO)
    content: object = {**state(num_frames=2, image_size=24), "rope.freqs": torch.ones(1)}
    name = "the given mapping"
    if source == "file":
        torch.save(content, tmp_path / "a.pt")
        content, name = tmp_path / "a.pt", f"checkpoint {tmp_path / 'a.pt'}"
    report = load_clip_checkpoint(content, DualEncoder(replace(CONFIG, embed_dim=7)))
    assert report.interpolated == {
        "visual.pos_embed": "(1, 37, 32) -> (1, 17, 32)",
        "visual.temporal_embed": "(2, 32) -> (4, 32)",
    }
    told = f"{name}: {report.summary()}"
    assert told in [record.getMessage() for record in caplog.records]


def test_a_report_in_one_line() -> None:
    report = LoadReport(
        ["a", "b"], ["i"], ["m", "n"], {"x": "(1,) -> (2,)", "y": "(3,) -> (4,)"}, ["r"], ["d"]
    )
    assert report.summary() == (
        "2 tensors loaded; resampled: x (1,) -> (2,), y (3,) -> (4,); fresh, for the new shared "
        "dimension: r; not in the checkpoint: m, n; ignored: i; NOT as the checkpoint was trained: "
        "d"
    )
    assert LoadReport(["a"]).summary() == "1 tensors loaded"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "text.blocks.1.norm1.weight"},
         "its text tower lacks text.blocks.1.norm1.weight; the file is incomplete, or belongs to "
         "another architecture"),
        (lambda s: {k: v for k, v in s.items()
                    if k.startswith("text") and k != "text.norm.weight"},
         "its text tower lacks text.norm.weight; the file is incomplete, or belongs to another "
         "architecture"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("text.blocks.1")},
         "its text tower has blocks 0..0, the model's 0..1; build the preset this checkpoint "
         "belongs to"),
        (lambda s: {k.replace("text.blocks.", "text.blocks.1"): v for k, v in s.items()},
         "its text tower has blocks 10..11, the model's 0..1; build the preset this checkpoint "
         "belongs to"),
        (lambda s: {**s, "text.blocks.0.ls1.gamma": torch.ones(1),
                    "visual.blocks.1.ls1.gamma": torch.ones(1)},
         "its blocks hold text.blocks.0.ls1.gamma, visual.blocks.1.ls1.gamma, which this model's "
         "do not have: it belongs to another architecture"),
        (lambda s: {**s, "text.positional_embedding": torch.ones(9, 16)},
         "wrong shapes: text.positional_embedding makes text.positional_embedding (9, 16), the "
         "model has (8, 16). Is it a checkpoint of this preset?"),
        (lambda s: {**s, "visual.temporal_embed": torch.ones(1, 4, 32)},
         "wrong shapes: visual.temporal_embed makes visual.temporal_embed (1, 4, 32), the model "
         "has (4, 32). Is it a checkpoint of this preset?"),
        (lambda s: {**s, "visual.norm.weight": torch.ones(31), "text.norm.weight": torch.ones(3)},
         "wrong shapes: visual.norm.weight makes visual.norm.weight (31,), "),
    ],
)  # fmt: skip
def test_towers_that_are_not_the_models(change, told: str) -> None:
    found = refusal(load_clip_checkpoint, change(state()), DualEncoder(CONFIG))
    whole = f"the given mapping: {told}"
    assert found.startswith(whole) if told.endswith(", ") else found == whole
    if told.endswith(", "):
        assert found.count("; text.norm.weight makes") == 1
        assert found.endswith(". Is it a checkpoint of this preset?")


def run_of(folder: Path, content: object, deepspeed: bool = False) -> Path:
    """A run whose only checkpoint holds this."""
    store = CheckpointFolder(folder / "checkpoints")
    temporary = store.begin(checkpoint_name(3))
    path = temporary / STATE
    if deepspeed:
        path = path / "global_step3" / "mp_rank_00_model_states.pt"
        path.parent.mkdir(parents=True)
    torch.save(content, path)
    kind = "zero2" if deepspeed else "plain"
    record = file_record(temporary, path)
    store.commit(checkpoint_name(3), Manifest(3, 0, 1, kind, files=[record]))
    return folder / "checkpoints" / checkpoint_name(3)


WHOLE = {"model.a": torch.ones(1), "loss.b": torch.zeros(1)}


@pytest.mark.parametrize("deepspeed", [False, True])
def test_a_run_is_read_as_a_model_and_as_a_module(tmp_path: Path, deepspeed: bool) -> None:
    lightning = {"pytorch-lightning_version": "2", "state_dict": WHOLE}
    content = {"module": WHOLE} if deepspeed else lightning
    folder = run_of(tmp_path, content, deepspeed)
    source = find_checkpoint(tmp_path)
    assert list(source.read()) == ["a"]
    assert list(source.read_module()) == list(WHOLE)
    data = folder / STATE / ("global_step3" if deepspeed else "")
    assert source.data == data
    written = next(p for p in [folder / STATE, *data.rglob("*.pt")] if p.is_file())
    content = bytearray(written.read_bytes())
    content[len(content) // 2] ^= 1
    written.write_bytes(content)
    for read in (source.read, source.read_module):
        assert "have changed" in refusal(read)


def test_others_files_are_no_modules(tmp_path: Path) -> None:
    torch.save({"state_dict": WHOLE}, tmp_path / "a.pt")
    assert find_checkpoint(tmp_path / "a.pt").read_module() is None
    lightning = {"pytorch-lightning_version": "2", "state_dict": {"a": torch.ones(1)}}
    torch.save(lightning, tmp_path / "c.pt")
    assert list(find_checkpoint(tmp_path / "c.pt").read()) == ["a"]
    torch.save([1], tmp_path / "b.pt")
    source = find_checkpoint(tmp_path / "b.pt")
    assert source.read_module() is None
    assert refusal(source.read) == f"checkpoint {tmp_path / 'b.pt'}: {NO_TENSORS}"
    folder = tmp_path / "ds" / "global_step1"
    folder.mkdir(parents=True)
    torch.save({"module": WHOLE}, folder / "mp_rank_00_model_states.pt")
    source = find_checkpoint(tmp_path / "ds")
    assert source.read_module() is None and list(source.read()) == ["a"]
    assert refusal(lambda: source.read(average=True)) == (
        f"checkpoint {tmp_path / 'ds'} holds no moving average (ema.safetensors)"
    )


RECIPE = "model: {init_args: {model: {preset: eva02_at_tiny}}}"


def test_what_describes_a_file_lies_nearest_and_at_most_three_folders_up(tmp_path: Path) -> None:
    near = tmp_path / "a" / "b" / "c"
    near.mkdir(parents=True)
    for name in ("m.safetensors", "m.pt"):
        (near / name).write_bytes(b"")
    places = [tmp_path / "config.yaml", tmp_path / "a" / "config.yaml", near / "config.yaml"]
    places[0].write_text(RECIPE)
    assert find_checkpoint(near / "m.pt").config is None
    places[1].write_text(RECIPE)
    assert find_checkpoint(near / "m.pt").config == places[1]
    places[2].write_text("trainer: {}")
    assert find_checkpoint(near / "m.pt").config == places[1]
    places[2].write_text(RECIPE)
    assert find_checkpoint(near / "m.pt").config == places[2]
    (near / "config.json").write_text("{}")
    assert find_checkpoint(near / "m.safetensors").config == places[2]
    (near / "config.json").write_text('{"vision": {}, "text": {}}')
    assert find_checkpoint(near / "m.safetensors").config == near / "config.json"
    (near / "m.json").write_text("{}")
    assert find_checkpoint(near / "m.safetensors").config == near / "m.json"
    assert find_checkpoint(near / "m.pt").config == places[2]
    (near / "mp_rank_00_model_states.pt").write_bytes(b"")
    assert find_checkpoint(near).config == places[2]
    (tmp_path / "none").mkdir()
    assert refusal(find_checkpoint, tmp_path / "none") == (
        f"{tmp_path / 'none'} is no checkpoint: expected a file, a run's folder with "
        "`checkpoints/step-*`, or a DeepSpeed folder (`*_model_states.pt`, or `latest` naming the "
        "folder that has them)"
    )
