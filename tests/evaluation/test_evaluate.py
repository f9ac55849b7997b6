"""`eva02-at evaluate` on real shards: figures, ranks, damage, test-time options."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from epic_files import write_retrieval_split
from gloo_ranks import run_ranks
from retrieval_protocol import protocol, relevance_of_sets
from small_world import NUM_CLIPS, NUM_SENTENCES, tiny_model

from datamodules.manifest import Manifest
from datamodules.stream.clips import ClipOptions, EvalClips
from datamodules.stream.faults import FaultMonitor
from datamodules.stream.reader import Corpus, SampleReader
from lightning_modules.cli.evaluate_options import BENCHMARKS, DTYPES
from lightning_modules.cli.main import main
from lightning_modules.evaluation import benchmarks
from lightning_modules.evaluation.processes import PRECISIONS
from lightning_modules.evaluation.run import (
    EvalOptions,
    clip_batches,
    evaluate,
    open_benchmark,
    open_engine,
    text_batches,
)
from lightning_modules.evaluation.submission import read_submission
from lightning_modules.models import DualEncoder


def run(folder: Path, *words: str | Path, shards: str | Path = "shards") -> int:
    checkpoint = ["--checkpoint", folder / "m.pt", "--config", folder / "m.json"]
    data = ["--shards", folder / shards, "--accelerator", "cpu", "--workers", "0"]
    return main([*map(str, ["evaluate", *checkpoint, *data, *words])])


def test_a_flip_says_which_texts_name_a_side(world, tmp_path, capsys):
    folder, *_ = world
    words = ["--benchmark", "ek100_mir", "--annotations", folder / "annotations"]
    for more, told in (
        (["--flip"], None),
        (["--flip", "--template", "{} with the left hand"], "7 of 7 texts name a side ('say 0"),
        (["--template", "turn {} clockwise"], None),
        (["--flip", "--template", "{} leftover"], None),
    ):
        assert run(folder, *words, *more) == 0
        error = capsys.readouterr().err
        assert (told or "") in error and ("name a side" in error) == (told is not None)


def test_choices_of_a_vocabulary_on_any_shards(world, tmp_path, capsys):
    folder, _, texts = world
    (verb, nouns), sentence = texts[0], "say 0"
    verbs, noun = [[f"shout {k}"] for k in range(5)], min(nouns)
    verbs[verb] = [sentence]
    things = [["loudly"] if k == noun else [f"thing {k}"] for k in range(9)]
    (tmp_path / "v.json").write_text(json.dumps({"verbs": verbs, "nouns": things}))
    words = ["--benchmark", "egohoi", "--annotations", tmp_path / "v.json"]
    saved = ["--json", tmp_path / "r.json", "--prediction", tmp_path / "s.npy"]
    assert run(folder, *words, *saved) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    rows = np.load(tmp_path / "s.npy")
    assert len(rows) == result["num_questions"] > 0
    assert result["num_questions"] + result["num_questions_without_choices"] == NUM_CLIPS
    right = (rows[:, :1] > rows[:, 1:11]).all(1), (rows[:, :1] > rows[:, 11:]).all(1)
    for name, hits in zip(("verb", "noun"), right, strict=True):
        assert result[name] == pytest.approx(100 * hits.mean())
    capsys.readouterr()


def test_the_command_agrees_with_the_protocol(world, tmp_path, capsys):
    folder, videos, texts = world
    words = ["--benchmark", "ek100_mir", "--annotations", folder / "annotations"]
    files = ["--json", tmp_path / "r.json", "--prediction", tmp_path / "s.npy"]
    assert run(folder, *words, *files, "--submission", tmp_path / "test.zip") == 0
    printed = json.loads(capsys.readouterr().out)
    result = json.loads((tmp_path / "r.json").read_text())
    assert {key: result[key] for key in printed} == printed
    assert printed["protocol"] == "2 frames, float32"
    similarity = np.load(tmp_path / "s.npy")
    expected = protocol(similarity, relevance_of_sets(videos, texts))
    for name, (v2t, t2v) in expected.items():
        # fp64 sums in another order; the issue asks for 1e-9
        assert printed[name]["v2t"] == pytest.approx(100 * v2t, abs=1e-11, rel=0)
        assert printed[name]["t2v"] == pytest.approx(100 * t2v, abs=1e-11, rel=0)
        assert np.mean(result["per_query"][name]["v2t"]) == pytest.approx(v2t)
    words = ["score", "--annotations", str(folder / "annotations"), "--similarity"]
    assert main([*words, str(tmp_path / "s.npy")]) == 0
    assert json.loads(capsys.readouterr().out)["map"] == printed["map"]
    content = read_submission(tmp_path / "test.zip")
    np.testing.assert_allclose(content["sim_mat"], (similarity + 1) / 2, atol=1e-6)


def result_of_a_rank(rank: int, folder: Path) -> tuple:
    benchmark, corpus = open_benchmark(
        "ek100_mir", str(folder / "shards"), annotations=folder / "annotations"
    )
    options = EvalOptions(batch_size=3, num_workers=0)
    done = evaluate(tiny_model(), benchmark, corpus, options)
    return done.prediction, done.measured.metrics


@pytest.mark.distributed
def test_four_ranks_give_identical_results(world):
    folder = world[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each rank has: sums of another order are not the point here
    prediction, metrics = result_of_a_rank(0, folder)
    torch.set_num_threads(threads)
    assert prediction.std() > 1e-3
    for rank_prediction, rank_metrics in run_ranks(4, result_of_a_rank, folder):
        assert torch.equal(rank_prediction, prediction)
        assert rank_metrics == metrics


@pytest.mark.distributed
def test_the_command_starts_its_processes(world, tmp_path, capfd):
    folder = world[0]
    words = ["--benchmark", "text_video", "--devices", "2", "--json", tmp_path / "two.json"]
    checkpoint = ["--checkpoint", folder / "m.pt", "--config", folder / "m.json"]
    data = ["--shards", folder / "shards", "--accelerator", "cpu", "--workers", "0"]
    command = [sys.executable, "-m", "lightning_modules.cli.main", "evaluate"]
    subprocess.run([*map(str, [*command, *checkpoint, *data, *words])], check=True, timeout=200)
    result = json.loads((tmp_path / "two.json").read_text())
    assert run(folder, "--benchmark", "text_video", "--json", tmp_path / "one.json") == 0
    one = json.loads((tmp_path / "one.json").read_text())
    assert (result["num_videos"], result["t2v"]) == (NUM_CLIPS, one["t2v"])


def test_shards_behind_a_url_give_the_figures_of_local_ones(world, tmp_path, capsys):
    folder = world[0]
    words = ["--benchmark", "text_video"]
    assert run(folder, *words) == 0
    local = capsys.readouterr().out
    handler = functools.partial(QuietFiles, directory=str(folder / "shards"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/manifest.json"
        assert run(folder, *words, "--shards", url) == 2
        assert "--cache-dir" in capsys.readouterr().err
        cached = ["--shards", url, "--cache-dir", tmp_path / "cache"]
        assert run(folder, *words, *cached) == 0
        server.shutdown()
    assert capsys.readouterr().out == local


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def damaged(world, tmp_path) -> Path:
    """The same shards, the second clip's bytes changed."""
    folder = world[0]
    manifest = Manifest.load(folder / "shards")
    copy = tmp_path / "shards"
    copy.mkdir()
    for file in (folder / "shards").iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    tar = copy / manifest.shards[0].name
    offset = int(manifest.load_index(0).rows[1]["video_offset"])
    content = bytearray(tar.read_bytes())
    content[offset + 100] ^= 1
    tar.write_bytes(content)
    return copy


def test_a_part_is_marked_as_one_and_scored_as_one(world, damaged, tmp_path, capsys):
    folder, videos, texts = world
    annotations = ["--annotations", folder / "annotations"]
    words = ["--benchmark", "ek100_mir", *annotations]
    path = tmp_path / "s.npy"
    more = ["--prediction", path, "--max-missing", "0.1"]
    assert run(folder, *words, *more, shards=damaged) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert result["num_missing_clips"] == 1
    assert result["num_queries"]["v2t"] == NUM_CLIPS - 1
    headline = next(line for line in told.err.splitlines() if line.startswith("mAP"))
    assert headline.endswith(" -- 1 of 13 clips missing (7.69%)")
    prediction = np.load(path)
    assert np.isnan(prediction).all(axis=1).tolist() == [n == 1 for n in range(NUM_CLIPS)]
    kept = np.delete(prediction, 1, axis=0), [v for n, v in enumerate(videos) if n != 1]
    expected = protocol(kept[0], relevance_of_sets(kept[1], texts))
    assert result["map"]["t2v"] == pytest.approx(100 * expected["map"][1])

    def score(*options: str) -> int:
        return main([*map(str, ["score", *annotations, "--similarity", path, *options])])

    assert score("--max-missing", "0.1") == 0
    scored = json.loads(capsys.readouterr().out)
    assert {name: result[name] for name in scored} == scored
    assert score() == 2
    assert "1 of 13 clips missing (7.69%), more than a share of 0.01" in capsys.readouterr().err
    assert score("--max-missing", "1", "--submission", str(tmp_path / "x.zip")) == 2
    assert not (tmp_path / "x.zip").exists()


@pytest.mark.parametrize("limit", [[], ["--max-missing", "1", "--submission", "x.zip"]])
def test_too_small_a_part_has_no_figures(world, damaged, tmp_path, capsys, limit):
    words = ["--benchmark", "ek100_mir", "--annotations", world[0] / "annotations", *limit]
    assert run(world[0], *words, "--json", tmp_path / "r.json", shards=damaged) == 2
    told = capsys.readouterr()
    assert told.out == "" and not (tmp_path / "r.json").exists()
    assert "1 of 13 clips missing" in told.err and "Of benchmark ek100_mir, 'P01_01_1'" in told.err


def test_what_is_not_in_the_shards_is_told_before_any_work(world, tmp_path, monkeypatch):
    folder = world[0]
    monkeypatch.setattr("lightning_modules.evaluation.run.clip_batches", None)  # not called
    other = tmp_path / "annotations"
    other.mkdir()
    write_retrieval_split(other, "test", 2 * NUM_CLIPS, NUM_SENTENCES)
    words = ["--benchmark", "ek100_mir", "--annotations", other]
    assert run(folder, *words) == 2


def rows(folder: Path, model: DualEncoder, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the clips and of the sentences, as the engine has them."""
    benchmark, corpus = open_benchmark("text_video", str(folder / "shards"))
    how = EvalOptions(num_workers=0, **options)
    engine = open_engine(model, benchmark, corpus, how)
    for batch in (
        *clip_batches(model, corpus, how),
        *text_batches(benchmark.prompts, how.batch_size),
    ):
        engine.take(batch)
    (clips, intact), (texts, complete) = engine.clips.gather(), engine.texts.gather()
    assert intact.all() and complete.all()
    return clips, texts


@torch.inference_mode()
def test_views_and_flips_are_averaged(world):
    model = tiny_model()
    plain, _ = rows(world[0], model, batch_size=4)
    rich, _ = rows(world[0], model, batch_size=4, views=2, flip=True)
    corpus = Corpus.load([str(world[0] / "shards")])
    clips = EvalClips(SampleReader(corpus), ClipOptions(4, 64), FaultMonitor(0, 0.0))
    frames = clips[0, len(clips)].video
    views = [frames[:, :, 0::2], frames[:, :, 1::2]]
    embeddings = [model.encode_video(v) for view in views for v in (view, view.flip(-1))]
    expected = F.normalize(torch.stack(embeddings).mean(0), dim=1)
    torch.testing.assert_close(rich, expected, rtol=0, atol=1e-5)  # batches of other sizes
    assert (rich - plain).abs().max() > 1e-3


def test_texts_do_not_depend_on_the_batch(world):
    model = tiny_model()
    _, two = rows(world[0], model, batch_size=2)
    _, five = rows(world[0], model, batch_size=5)
    torch.testing.assert_close(two, five, rtol=0, atol=1e-5)
    torch.testing.assert_close(two.norm(dim=1), torch.ones(len(two)))
    assert (two[0] - two[4]).abs().max() > 1e-4


def test_the_options_name_every_benchmark_and_precision():
    assert tuple(benchmarks.BENCHMARKS) == BENCHMARKS and tuple(PRECISIONS) == DTYPES


def test_mistakes_are_one_line(world, tmp_path, capsys):
    folder = world[0]

    def refused(message: str, *words: str | Path, shards: str = "shards") -> None:
        assert run(folder, *words, shards=shards) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error

    mir = ["--benchmark", "ek100_mir"]
    refused("invalid choice: 'k400'", "--benchmark", "k400")
    refused("needs its annotations", *mir)
    refused("has no EPIC_100_retrieval_test.csv", *mir, "--annotations", folder)
    annotations = ["--annotations", folder / "annotations"]
    refused("no manifest at", *mir, *annotations, shards="absent")
    refused("a submission is for", "--benchmark", "text_video", "--submission", "x.zip")
    refused("at least 1, 1 and 0", *mir, *annotations, "--views", "0")
    (tmp_path / "egomcq.json").write_text("{}")
    mcq = ["--benchmark", "egomcq", "--annotations", tmp_path]
    refused("dual softmax is for retrieval", *mcq, "--dual-softmax", "1")
    refused("has no questions", *mcq)
    other = tmp_path / "other"
    other.mkdir()
    write_retrieval_split(other, "test", 5, 4)
    for name in other.iterdir():
        name.write_text(name.read_text().replace("P01_01_", "P09_01_"))
    refused("none of the 5 clips", *mir, "--annotations", other)


HANGS = """
import time
from types import SimpleNamespace
from lightning_modules.evaluation.processes import Machines
from lightning_modules.evaluation.run import evaluate_here
model = SimpleNamespace(to=lambda *place: time.sleep(1000))
evaluate_here(model, SimpleNamespace(clip_ids=[]), None, None, Machines("cpu", stall_s=1.0))
"""


def test_an_evaluation_that_hangs_while_it_loads_ends() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True)
    assert done.returncode == 70, done.stderr
    assert "rank 0 (loading): no progress" in done.stderr
