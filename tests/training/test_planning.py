"""FLOPs, activations and memory of the plan, against the real model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from epic_files import write_recognition_split
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.cli.plan import main
from lightning_modules.models import (
    DualEncoderConfig,
    TextConfig,
    VideoClassifier,
    VisionConfig,
    build_dual_encoder,
)
from lightning_modules.planning.costs import (
    GIB,
    ClusterConfig,
    communication_bytes,
    count_saved,
    model_costs,
    plan_option,
    saved_bytes,
    state_bytes,
)
from lightning_modules.planning.plan import make_plan
from lightning_modules.training.monitor.flops import pair_flops, peak_tflops, video_flops
from lightning_modules.training.recipe import build_cli

ROOT = Path(__file__).parents[2]


def small(architecture="eva02", **changes):
    vision = VisionConfig(
        image_size=32,
        patch_size=8,
        width=48,
        depth=3,
        num_heads=4,
        mlp_hidden=104,  # no padding, which is not counted
        num_frames=3,
        architecture=architecture,
        temporal="both" if architecture == "eva02" else "learnable",
        **changes,
    )
    text = TextConfig(context_length=20, vocab_size=99, width=32, depth=2, num_heads=2)
    return DualEncoderConfig(vision, text, embed_dim=24)


def inputs(config, pairs):
    size, frames = config.vision.image_size, config.vision.num_frames
    video = torch.zeros(pairs, 3, frames, size, size, dtype=torch.uint8)
    return video, torch.zeros(pairs, config.text.context_length, dtype=torch.int64)


@pytest.mark.parametrize("architecture", ["eva02", "clip"])
@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_flops_are_those_that_torch_counts(architecture, patch_dropout):
    config = small(architecture, patch_dropout=patch_dropout)
    # torch's counter does not know the CPU's fused attention
    model = build_dual_encoder(config, attention_backend="reference")
    counter = FlopCounterMode(display=False)
    with counter:
        model(*inputs(config, 2))
    # nor the matrix-vector product of the last block's one query: 0.2 % here
    assert 2 * pair_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.003)


def test_flops_of_a_published_model():
    """ViT-B/16 at 224 px: 17.6 G multiply-adds an image; of the last block little is needed."""
    vision = VisionConfig(architecture="clip", temporal="none", mlp_hidden=3072, num_frames=1)
    config = DualEncoderConfig(vision)
    assert video_flops(config.vision, 512) / 2 / 1e9 == pytest.approx(17.6, rel=0.08)


def test_the_peak_is_found_by_the_devices_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA RTX 6000 Ada Generation") == 364.0
    assert peak_tflops("Banana 3000") is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["eva02", "clip"])
def test_fake_activations_are_the_real_ones(checkpointing, architecture):
    config = small(architecture)
    model = build_dual_encoder(config, activation_checkpointing=checkpointing)
    real = count_saved(model, *inputs(config, 2))
    fake = saved_bytes(config, 2, checkpointing=checkpointing, dtype=torch.float32)
    assert fake == real


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_recogniser_is_the_video_tower_alone(checkpointing):
    config = replace(small(), activation_checkpointing=checkpointing)
    model = VideoClassifier(config, 31)
    video, _ = inputs(config, 2)
    real = count_saved(model, video)
    options = {"checkpointing": checkpointing, "dtype": torch.float32, "num_classes": 31}
    assert saved_bytes(config, 2, **options) == real
    costs = model_costs(config, 31)
    assert costs.parameters == sum(p.numel() for p in model.parameters())
    assert costs.flops == video_flops(config.vision, 31) < pair_flops(config)


def test_counting_leaves_no_fake_tensor_behind():
    config = small()
    model_costs(config)
    output = build_dual_encoder(config)(*inputs(config, 1))
    assert all(torch.isfinite(tensor).all() for tensor in output)


MEASURE = """
import resource, torch
from tests_config import config
from lightning_modules.models import build_dual_encoder
torch.set_num_threads(1)
model = build_dual_encoder(config)
def step(pairs):
    video = torch.zeros(pairs, 3, 4, 64, 64, dtype=torch.uint8)
    outputs = model(video, torch.zeros(pairs, 20, dtype=torch.int64))
    return outputs
def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
step(1)
before = rss()
kept = step(16)
print(rss() - before)
"""


def test_activations_are_the_memory_that_a_step_takes(tmp_path):
    """Resident memory of a real process, as the forward pass of 16 pairs is held."""
    vision = (
        "VisionConfig(image_size=64, patch_size=8, width=192, depth=4, num_heads=4, mlp_hidden=512)"
    )
    text = "TextConfig(context_length=20, vocab_size=99, width=64, depth=1, num_heads=2)"
    (tmp_path / "tests_config.py").write_text(
        "from lightning_modules.models import DualEncoderConfig, TextConfig, VisionConfig\n"
        f"config = DualEncoderConfig({vision}, {text}, embed_dim=16)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin", "MALLOC_ARENA_MAX": "1"},
    )
    scope: dict = {}
    exec((tmp_path / "tests_config.py").read_text(), scope)
    predicted = saved_bytes(scope["config"], 16, checkpointing=False, dtype=torch.float32)
    assert predicted > 100 * 2**20
    # the allocator keeps some of what the forward pass let go of
    assert int(done.stdout) == pytest.approx(predicted, rel=0.2)


def test_states_of_each_stage_by_hand():
    """ZeRO's paper: 16 bytes a parameter, shared out more and more."""
    bucket = 4 * 200e6
    assert state_bytes(10**9, "ddp", 8) == 18e9
    assert state_bytes(10**9, "zero1", 8) == 4e9 + 1.5e9 + bucket
    assert state_bytes(10**9, "zero2", 8) == 2e9 + 1.75e9 + bucket
    assert state_bytes(10**9, "zero3", 8) == 2e9 + bucket
    assert communication_bytes(10**9, "ddp", 1) == 0
    assert communication_bytes(10**9, "zero3", 4) / communication_bytes(10**9, "zero2", 4) == 1.5


def test_a_batch_that_does_not_fit_gets_the_largest_micro_batch_that_does():
    costs = model_costs(small())
    tight = ClusterConfig(gpu_memory_gib=1.2, gpus_per_node=2)
    options = {"strategy": "zero2", "checkpointing": False, "pair_input_bytes": 0.0}
    plan = plan_option(costs, tight, batch=10_000, **options)
    assert not plan.fits and plan.micro_batch
    assert plan.total_bytes <= 1.2 * GIB
    more = plan_option(costs, tight, batch=plan.micro_batch + 1, **options)
    assert not more.fits
    assert plan_option(costs, tight, batch=plan.micro_batch, **options).fits


def _plan(recipe, cluster, clips):
    import yaml

    words = ["--config", str(ROOT / "configs" / recipe), "--trainer.accelerator=cpu"]
    with torch.device("meta"):
        cli = build_cli([*words, "--trainer.logger=false"])
    described = yaml.safe_load((ROOT / "configs" / "cluster" / cluster).read_text())
    plan = make_plan(cli, ClusterConfig(**described), clips, None)
    return next(r for r in plan["options"] if r["strategy"] == "ddp" and r["checkpointing"])


def test_avions_published_memory_and_hours():
    """README of AVION: 19 GB for 256 pairs a GPU and 130 A5000-hours on EgoClip, 5 epochs."""
    row = _plan("pretrain/avion_base_egoclip.yaml", "a5000_x8.yaml", 3_847_723)
    assert row["total_bytes"] / 1e9 == pytest.approx(19, rel=0.2)
    assert 130 / 2 < row["gpu_hours"] < 130 * 2


def test_eva02_ats_published_hours():
    """About 40 h on 4 RTX 6000 Ada, taken as EgoClip+ (8 M clips an epoch)."""
    row = _plan("pretrain/eva02_at_base_egoclip_plus.yaml", "rtx6000ada_x4.yaml", 8_000_000)
    assert row["fits"]
    assert 160 / 2 < row["gpu_hours"] < 160 * 2


def test_the_command_prints_and_writes_a_plan(tmp_path, capsys):
    words = ["--config", str(ROOT / "configs/mir/eva02_at_base_sms.yaml"), "--clips", "67217"]
    file = tmp_path / "plan.json"
    assert main([*words, "--cluster.gpus_per_node=4", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "149." in printed and "fastest with configs/strategy/" in printed
    assert file.exists()
    annotations = tmp_path / "epic-kitchens-100-annotations"
    annotations.mkdir()
    for split in ("train", "validation"):
        write_recognition_split(annotations, split, [("dim the lamp", 3, 7, [7])])
    recipe = ROOT / "configs/recognition/eva02_at_base_ek100.yaml"
    assert main([f"--config={recipe}", "--clips=67217", f"--data_dir={tmp_path}"]) == 0
    assert "85.9 M parameters" in capsys.readouterr().out  # no text tower
    with pytest.raises(ValueError, match="does not divide over 3 GPUs"):
        main([*words, "--cluster.gpus_per_node=3"])
    with pytest.raises(ValueError, match="--clips"):
        main(words[:2])
