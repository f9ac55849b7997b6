"""Recognition: a run of its recipe that learns and is tested, and its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from epic_files import write_recognition_split

from datamodules.annotations.epic import read_actions
from datamodules.annotations.formats import read_clips
from datamodules.batch import ClipBatch, TextBatch
from datamodules.manifest import ClipRecord
from datamodules.module import RetrievalSplit
from datamodules.shards import LAYOUTS, EncodeOptions, build_shards
from lightning_modules.cli.main import main
from lightning_modules.evaluation.engine import Engine
from lightning_modules.models import DualEncoder, ModelConfig
from lightning_modules.recognition import RecognitionModule
from lightning_modules.training.optim.optimizers import OptimizerConfig

RECIPE = Path(__file__).parents[2] / "configs" / "recognition" / "eva02_at_base_ek100.yaml"
TINY = ModelConfig(preset="eva02_at_tiny", embed_dim=16, num_frames=2)
DARK, BRIGHT = ("dim the lamp", 3, 7, [1, 7]), ("light the lamp", 10, 2, [2])
SMALL = (
    "--model.model.preset=eva02_at_tiny",
    "--model.model.num_frames=2",
    "--model.optimizer.lr=0.003",
    "--data.image_size=64",
    "--data.global_batch_size=8",
    "--data.eval_batch_size=3",
    "--data.num_workers=0",
    "--trainer.max_epochs=8",
    "--trainer.precision=32",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
)


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    folder = tmp_path / "epic-kitchens-100-annotations"
    folder.mkdir()
    write_recognition_split(folder, "train", [DARK] * 8 + [BRIGHT] * 8)
    write_recognition_split(folder, "validation", [DARK] * 8 + [BRIGHT] * 8)
    return folder


def make_shards(folder: Path, annotations: Path) -> None:
    """The clips of both splits: the first half of the video is dark, the second bright."""
    video = folder / "videos" / "P01" / "P01_01.MP4"
    video.parent.mkdir(parents=True)
    with av.open(str(video), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        stream.codec_context.thread_count = 1
        for k in range(40):
            grey = np.full((64, 80, 3), 40 if k < 17 else 200, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    for split in ("train", "validation"):
        build_shards(
            read_clips(annotations / f"EPIC_100_{split}.csv", "ek100"),
            videos=folder / "videos",
            layout=LAYOUTS["ek100"],
            output=folder / f"ek100_{split}",
            options=EncodeOptions(short_side=64, preset="ultrafast"),
            samples_per_shard=8,
            num_workers=1,
        )


def module(annotations: Path, **settings) -> RecognitionModule:
    return RecognitionModule(TINY, str(annotations), OptimizerConfig(), **settings)


def batch(verbs: list[list[int]], nouns: list[list[int]]) -> ClipBatch:
    count, none = len(verbs), torch.full((len(verbs), 1), -1)
    generator = torch.Generator().manual_seed(0)
    return ClipBatch(
        video=torch.randint(0, 256, (count, 3, 2, 64, 64), generator=generator).byte(),
        tokens=torch.zeros(count, 16, dtype=torch.int64),
        clip_index=torch.arange(count),
        text_index=torch.arange(count),
        sample_index=torch.arange(count),
        mask=torch.ones(count, dtype=torch.bool),
        verb_classes=torch.tensor(verbs),
        noun_classes=torch.tensor(nouns),
        text_verb_classes=none,
        text_noun_classes=none,
        keys=[f"clip {k}" for k in range(count)],
    )


def test_the_recipe_learns_from_a_pretrained_tower_and_is_tested(tmp_path, annotations, capsys):
    make_shards(tmp_path, annotations)
    pretrained = tmp_path / "pretrained.pt"
    torch.save(DualEncoder(replace(TINY, embed_dim=256).resolve()).state_dict(), pretrained)
    run = tmp_path / "run"
    common = [f"--config={RECIPE}", f"--data_dir={tmp_path}", f"--run_dir={run}", *SMALL]
    assert main(["fit", *common, f"--model.init_checkpoint={pretrained}"]) == 0
    assert main(["test", *common, f"--ckpt_path={run / 'checkpoints'}"]) == 0
    content = json.loads((run / "test.json").read_text())
    figures = {name: value for name, value in content.items() if name.startswith("test/")}
    # 15 of 16: one clip lies across the change
    assert figures["test/action_top1"] > 90 and figures["test/verb_top1"] > 90
    assert figures["test/noun_top5"] == 100
    assert main(["predict", *common, f"--ckpt_path={run / 'checkpoints'}"]) == 0
    saved = torch.load(run / "logits.pt")["video"]
    assert saved["index"].tolist() == list(range(16)) and saved["logits"].shape == (16, 2)
    check_evaluate_and_sweep(tmp_path, run, annotations, figures)
    check_two_ranks(tmp_path, run, annotations, common)
    capsys.readouterr()
    assert main(["embed", f"--checkpoint={run}", "--videos=x.mp4", "--output=x.pt"]) == 2
    assert "names one of 2 classes and keeps no text tower" in capsys.readouterr().err


def check_evaluate_and_sweep(folder: Path, run: Path, annotations: Path, tested: dict) -> None:
    """Both give what `test` gave, to the bit; a benchmark of texts is refused."""
    shards = f"--shards={folder / 'ek100_validation'}"
    words = [shards, f"--annotations={annotations}", "--workers=0", "--batch-size=3"]
    words += ["--accelerator=cpu"]
    command = ["evaluate", f"--checkpoint={run}", *words]
    assert main([*command, "--benchmark=ek100_cls", f"--json={folder / 'e.json'}"]) == 0
    evaluated = json.loads((folder / "e.json").read_text())
    exact = {f"test/{name}": evaluated[name] for name in evaluated if f"test/{name}" in tested}
    assert exact == tested and len(exact) == 6 + 3  # figures and counts
    assert main(["evaluate", f"--checkpoint={run}", shards, "--benchmark=text_video"]) == 2
    benchmark = " ".join(["ek100_cls", *words])
    newest = max((run / "checkpoints").glob("step-*"))
    swept = ["sweep", f"--checkpoints={newest}", f"--benchmark={benchmark}", "--rounds=1"]
    assert main([*swept, f"--output={folder / 'sweep'}"]) == 0
    (result,) = (folder / "sweep" / "results").glob("*.json")
    result = json.loads(result.read_text())["result"]
    assert {
        f"test/{name}": result[name] for name in evaluated if f"test/{name}" in tested
    } == tested


def check_two_ranks(folder: Path, run: Path, annotations: Path, common: list[str]) -> None:
    """`test` and `evaluate` of one checkpoint on two ranks each: the same figures and counts."""
    test = ["test", *common, f"--ckpt_path={run / 'checkpoints'}", "--trainer.devices=2"]
    test += ["--trainer.strategy=ddp", f"--run_dir={folder / 'two'}"]
    evaluate = ["evaluate", f"--checkpoint={run}", "--benchmark=ek100_cls", "--devices=2"]
    evaluate += [f"--shards={folder / 'ek100_validation'}", f"--annotations={annotations}"]
    evaluate += [
        "--workers=0",
        "--batch-size=3",
        "--accelerator=cpu",
        f"--json={folder / '2.json'}",
    ]
    for words in (test, evaluate):
        command = [sys.executable, "-m", "lightning_modules.cli.main", *words]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200, check=True)
    tested = json.loads((folder / "two" / "test.json").read_text())
    evaluated = json.loads((folder / "2.json").read_text())
    same = {name for name in evaluated if f"test/{name}" in tested}
    assert len(same) == 9  # figures and counts
    assert {name: tested[f"test/{name}"] for name in same} == {n: evaluated[n] for n in same}


def test_a_pretrained_tower_comes_without_its_projection(tmp_path, annotations):
    pretrained = DualEncoder(TINY.resolve())
    torch.save(pretrained.state_dict(), tmp_path / "m.pt")
    ours = module(annotations, init_checkpoint=str(tmp_path / "m.pt"))
    ours.configure_model()
    given = pretrained.visual.state_dict()
    taken = {
        name
        for name, value in ours.model.visual.state_dict().items()
        if value.shape == given[name].shape and torch.equal(value, given[name])
    }
    assert set(given) - taken == {"head.weight", "head.bias"}
    assert {name.split(".")[0] for name, _ in ours.model.named_parameters()} == {"visual"}


def test_the_main_noun_makes_the_action(annotations):
    actions = read_actions(annotations)
    assert [(a.verb_class, a.noun_class) for a in actions] == [(10, 2), (3, 7)]
    clip = read_clips(annotations / "EPIC_100_train.csv", "ek100")[0]
    assert clip.noun_classes == (7, 1)
    ours = module(annotations)
    assert ours._actions(batch([[3], [10]], [[7, 1], [2, -1]])).tolist() == [1, 0]


@pytest.mark.parametrize(("verb", "noun"), [(3, 2), (3, 99), (99, 7), (-1, 7), (3, -1)])
def test_an_action_of_other_annotations_is_named(annotations, verb, noun):
    with pytest.raises(ValueError, match=f"'clip 1' has verb {verb} and noun {noun}, .*no action"):
        module(annotations)._actions(batch([[3], [verb]], [[7], [noun]]))


def test_padding_and_sentences_do_not_count(annotations):
    ours = module(annotations)
    ours.eval()
    rows = batch([[3], [10], [3]], [[7], [2], [7]])
    # where clips 0 and 8 (dark, bright) lie in shards that lack the rest; the third row is padding
    names = ["validation_8", "validation_0"]
    records = [ClipRecord(name, "v", 0.0, 1.0, ("",)) for name in names]
    rows.mask[2] = False
    rows.clip_index[2] = 0
    benchmark = ours.benchmark(RetrievalSplit("none"), records)
    engine = Engine(benchmark, records, ours.predictor(), max_missing=0.9)
    engine.take(rows)
    empty = torch.zeros(1, 1, dtype=torch.int64)
    engine.take(TextBatch(empty, empty[0], empty[0] == 0, empty, empty))
    done = engine.finish()
    assert done.present.nonzero().flatten().tolist() == [0, 8]
    assert torch.equal(done.prediction[done.present], ours(rows)[[1, 0]])
    hits = (ours(rows)[[1, 0]].argmax(1) == torch.tensor([1, 0])).double().mean()
    assert done.measured.metrics["action_top1"] == 100 * hits
    assert done.measured.metrics["num_missing_clips"] == 14
    assert ours.benchmark(RetrievalSplit("none", split="train"), records).clip_ids[0] == "train_0"


def test_views_of_a_clip_average_their_probabilities(annotations):
    predictor = module(annotations).predictor()
    views = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    expected = (views[0].softmax(1) + views[1].softmax(1)) / 2
    torch.testing.assert_close(predictor.mean(views).softmax(1), expected)


def test_label_smoothing_reaches_the_loss(annotations):
    plain, smooth = (module(annotations, label_smoothing=s) for s in (0.0, 0.2))
    smooth.load_state_dict(plain.state_dict())
    rows = batch([[3], [10]], [[7], [2]])
    logits, target = plain(rows), torch.tensor([1, 0])
    chosen = logits.log_softmax(1)
    right, mean = chosen[[0, 1], target].mean(), chosen.mean()
    for ours, expected in ((plain, -right), (smooth, -(0.8 * right + 0.2 * mean))):
        ours.log = lambda *args, **kwargs: None
        torch.testing.assert_close(ours.training_step(rows, 0), expected)
