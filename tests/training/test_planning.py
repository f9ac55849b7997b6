"""FLOPs, activations and memory of the plan, against the real model."""

import json
import re
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
from lightning_modules.models.config import resolve_config
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
from lightning_modules.training.monitor.flops import (
    pair_flops,
    peak_tflops,
    text_flops,
    video_flops,
)
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
    peaks = {
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H100 NVL": 835.0,
        "NVIDIA H200": 989.0,
        "NVIDIA GB200": 2500.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA A10": 125.0,  # no A100
        "NVIDIA A10G": 70.0,
        "NVIDIA L4": 121.0,  # no L40S
        "NVIDIA L40S": 362.0,
        "NVIDIA RTX 6000 Ada Generation": 364.0,
        "NVIDIA RTX PRO 6000 Blackwell Server Edition": 504.0,
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 439.0,
        "NVIDIA RTX A6000": 155.0,
        "NVIDIA GeForce RTX 5090": 210.0,
        "Tesla V100-SXM2-32GB": 125.0,
        "Banana 3000": None,
    }
    assert {name: peak_tflops(name) for name in peaks} == peaks
    assert ClusterConfig(gpu="NVIDIA A40").tflops == 150.0
    assert ClusterConfig(gpu="NVIDIA H200").memory_gib == 141
    assert ClusterConfig(gpu="NVIDIA A100-SXM4-80GB", gpu_memory_gib=80).memory_gib == 80
    banana = ClusterConfig(gpu="Banana 3000", gpu_tflops=1.0, gpu_memory_gib=3)
    assert (banana.tflops, banana.memory_gib) == (1.0, 3)
    for given in ({}, {"gpu_tflops": 1.0}, {"gpu_memory_gib": 3}):
        with pytest.raises(ValueError, match=r"'Banana 3000' are not known; give\s+cluster.gpu_"):
            ClusterConfig(gpu="Banana 3000", **given)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["eva02", "clip"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_fake_activations_are_the_real_ones(precision, checkpointing, architecture):
    """In the mode that the recipe runs: autocast keeps other tensors than bf16 weights do."""
    config = small(architecture)
    model = build_dual_encoder(config, activation_checkpointing=checkpointing)
    model.to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        real = count_saved(model, *inputs(config, 2))
    fake = saved_bytes(config, 2, checkpointing=checkpointing, precision=precision)
    # fake layer norms keep their mean and std in bf16 under autocast, real ones in float32
    assert fake == (pytest.approx(real, rel=1e-3) if precision == "bf16-mixed" else real)


def test_modes_differ_where_the_arithmetic_does():
    kept = [
        model_costs(small(), precision=name).activation_bytes
        for name in ("bf16-true", "bf16-mixed", "32-true")
    ]
    assert kept[0] <= kept[1] < kept[2] <= 2.1 * kept[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_recogniser_is_the_video_tower_alone(checkpointing):
    config = replace(small(), activation_checkpointing=checkpointing)
    model = VideoClassifier(config, 31)
    video, _ = inputs(config, 2)
    real = count_saved(model, video)
    options = {"checkpointing": checkpointing, "precision": "32-true", "num_classes": 31}
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
    predicted = saved_bytes(scope["config"], 16, checkpointing=False, precision="32-true")
    assert predicted > 100 * 2**20
    # the allocator keeps some of what the forward pass let go of
    assert int(done.stdout) == pytest.approx(predicted, rel=0.2)


def test_states_of_each_stage_by_hand():
    """ZeRO's paper: 16 bytes a parameter, shared out more and more."""
    bucket = 8 * 50e6
    assert state_bytes(10**9, "ddp", 8) == 18e9
    assert state_bytes(10**9, "zero1", 8) == 4e9 + 1.5e9 + bucket
    assert state_bytes(10**9, "zero2", 8) == 2e9 + 1.75e9 + bucket
    assert state_bytes(10**9, "zero3", 8) == 2e9 + bucket
    assert communication_bytes(10**9, "ddp", 1) == 0
    assert communication_bytes(10**9, "zero3", 4) / communication_bytes(10**9, "zero2", 4) == 8 / 6


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


def test_a_ring_crosses_between_nodes_once():
    """Eight GPUs share a node's network: it carries one GPU's bytes, not eight times them."""
    wide = ClusterConfig(nodes=2, gpus_per_node=8, intra_node_gb_s=400, inter_node_gb_s=50)
    assert wide.gb_s_per_rank == 50
    assert replace(wide, nodes=1).gb_s_per_rank == 400
    assert replace(wide, inter_node_gb_s=900).gb_s_per_rank == 400


def test_no_more_cores_decode_than_there_are_workers():
    costs = model_costs(small())
    options = {"strategy": "ddp", "checkpointing": False, "batch": 720, "pair_input_bytes": 0.0}
    cluster = ClusterConfig(cores_per_gpu=12, decode_clips_per_s=90)
    assert plan_option(costs, cluster, workers=8, **options).data_s == 1.0
    assert plan_option(costs, cluster, workers=16, **options).data_s == 720 / (12 * 90)


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
    assert row["total_bytes"] / 1e9 == pytest.approx(19, rel=0.1)
    assert 130 / 2 < row["gpu_hours"] < 130 * 2


def test_eva02_ats_published_hours():
    """About 40 h on 4 RTX 6000 Ada, taken as EgoClip+ (8 M clips an epoch)."""
    row = _plan("pretrain/eva02_at_base_egoclip_plus.yaml", "rtx6000ada_x4.yaml", 8_000_000)
    assert row["fits"]
    assert 160 / 2 < row["gpu_hours"] < 160 * 2


def test_hard_negatives_are_counted(capsys):
    """As real batches of so many sentences and clips; the retrieval module reads no captions."""
    config = resolve_config("eva02_at_tiny", num_frames=2)
    plain = model_costs(config)
    captions = model_costs(config, num_captions=3)
    sentence = text_flops(config.text, config.embed_dim)
    assert captions.flops == pytest.approx(plain.flops + 2 * sentence)
    sizes = [saved_bytes(config, 2, checkpointing=False, num_captions=n) for n in (1, 2, 3)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0
    assert captions.activation_bytes - plain.activation_bytes == sizes[1] - sizes[0]
    turned = model_costs(config, num_captions=3, turned=0.5)
    for name in ("flops", "activation_bytes", "checkpointed_bytes", "block_bytes"):
        assert getattr(turned, name) == pytest.approx(1.5 * getattr(captions, name))
    assert turned.parameters == plain.parameters

    words = ["--config", "pretrain/eva02_at_base_egoclip_egonce_plus_plus"]
    words += ["--cluster.gpus_per_node=4", "--clips=100000"]
    assert main(words) == 0
    assert "10 false captions a clip, 0% of the clips backwards too" in capsys.readouterr().out
    words = ["--config", "demo/retrieval", "--clips=1200", "--cluster.gpus_per_node=1"]
    negatives = {"vocabulary": "v.json", "num_verbs": 4, "reversed_share": 0.5}
    negatives["inverse_verbs"] = [["open", "close"]]
    assert main([*words, f"--data.hard_negatives={json.dumps(negatives)}"]) == 0
    assert " 0 false captions a clip, 50% of the clips backwards" in capsys.readouterr().out


def test_muon_is_planned_without_zero(capsys):
    words = ["--config", "mir/eva02_at_base_sms", "--clips=6400"]
    words += ["--cluster.gpus_per_node=8", "--model.optimizer.name=muon"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "\nddp " in told and "zero" not in told
    assert main([*words, "--cluster.gpu_memory_gib=2"]) == 0
    assert "adamw instead of muon, which is not for ZeRO" in capsys.readouterr().out


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
    with pytest.raises(ValueError, match=r"charades_ego_train.*--clips"):
        main(["--config", str(ROOT / "configs/charades_ego/eva02_at_base.yaml")])


def test_published_sizes_stand_in_for_manifests_that_are_elsewhere(capsys):
    config = ["--config", str(ROOT / "configs/pretrain/eva02_at_base_egoclip.yaml")]
    assert main(config) == 0
    printed = capsys.readouterr().out
    assert "3,847,723 clips an epoch (the data sets' published sizes)" in printed
    assert f"{3_847_723 // 1024 * 5} steps" in printed
    assert "MiB a pair in bf16-mixed, " in printed and "in bf16-true" in printed


def test_what_the_doctor_measured_stands_in_for_what_is_assumed(tmp_path, capsys):
    """Later words override earlier ones: those before and after `--doctor` too."""
    measured = {"gpu": "NVIDIA H100 PCIe", "gpus_per_node": 2, "decode_clips_per_s": 71.5}
    file = tmp_path / "doctor.json"
    file.write_text(json.dumps({"cluster": measured}))
    words = ["--config", str(ROOT / "configs/mir/eva02_at_base_sms.yaml"), "--json"]
    words += [str(tmp_path / "plan.json"), "--cluster.gpus_per_node=4", f"--doctor={file}"]
    assert main([*words, "--cluster.nodes=2"]) == 0
    cluster = json.loads((tmp_path / "plan.json").read_text())["cluster"]
    assert ClusterConfig(**cluster).tflops == 756.0 and cluster["decode_clips_per_s"] == 71.5
    assert cluster["gpus_per_node"] == 2 and cluster["nodes"] == 2
    file.write_text(json.dumps({"cluster": {}}))
    with pytest.raises(ValueError, match="has no measurement of a GPU"):
        main(words)
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    sorted(p.relative_to(ROOT / "configs") for p in ROOT.glob("configs/*/*.yaml")),
    ids=str,
)
def test_a_recipe_recomputes_only_where_80_gb_do_not_do_without(recipe):
    text = (ROOT / "configs" / recipe).read_text()
    said = re.search(r"activation_checkpointing: (true|false)  # ours", text)
    published = re.search(r"global_batch_size: \d+  # (\d+) x \d+", text)
    if said is None:
        pytest.skip("no recipe that says")
    ranks = int(published.group(1)) if published else 4
    with torch.device("meta"):
        here = ("--trainer.accelerator=cpu", "--trainer.logger=false")
        cli = build_cli([f"--config={ROOT / 'configs' / recipe}", *here])
    cluster = ClusterConfig(gpus_per_node=min(8, ranks), nodes=max(1, ranks // 8))
    rows = make_plan(cli, cluster, 10**6, None)["options"]
    row = next(r for r in rows if r["strategy"] == "ddp" and not r["checkpointing"])
    assert (said.group(1) == "true") == (not row["fits"])
    if row["fits"]:
        assert f"{row['total_bytes'] / GIB:.0f} GiB a GPU" in text
