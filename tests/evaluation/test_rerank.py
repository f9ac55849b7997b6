"""A second look in the engine: against loops, on two ranks, through `evaluate` and `tune`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from gloo_ranks import run_ranks
from small_world import NUM_CLIPS, NUM_SENTENCES, tiny_model

from datamodules.tokenizer import Tokenizer
from lightning_modules.cli.main import main
from lightning_modules.evaluation.rerank import RerankOptions, candidates
from lightning_modules.evaluation.run import EvalOptions, clip_batches, evaluate, open_benchmark
from lightning_modules.models.rerank import RerankConfig, ReRanker, fingerprint, words_of

HEAD = {"width": 24, "depth": 2, "num_heads": 3, "window": 2, "dropout": 0.0}
ALL = min(NUM_CLIPS, NUM_SENTENCES)


def head() -> ReRanker:
    dual = tiny_model()  # which seeds, where it is built
    torch.manual_seed(1)
    made = ReRanker(RerankConfig(**HEAD), dual.config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        made.fingerprint.copy_(fingerprint(dual))
    return made


@pytest.fixture(scope="module")
def reranker(tmp_path_factory) -> Path:
    """A run's folder as `find_checkpoint` knows them, with a head of the small world's model."""
    folder = tmp_path_factory.mktemp("reranker")
    state = {f"model.{name}": tensor for name, tensor in head().state_dict().items()}
    torch.save({"pytorch-lightning_version": "2", "state_dict": state}, folder / "state.ckpt")
    model = {"preset": "eva02_at_tiny", "num_frames": 2}
    arguments = {"model": model, "reranker": HEAD}
    section = {"class_path": "lightning_modules.rerank.RerankModule", "init_args": arguments}
    (folder / "config.yaml").write_text(yaml.dump({"model": section}))
    return folder / "state.ckpt"


def matrices(folder: Path, top: int | None, blend: float = 1.0):
    """(matrix, second stage, figures) of the engine, on however many ranks there are."""
    how = EvalOptions(batch_size=3, num_workers=0)
    if top is not None:
        how = EvalOptions(3, 0, rerank=(head(), RerankOptions(top, blend)))
    benchmark, corpus = open_benchmark(
        "ek100_mir", str(folder / "shards"), annotations=folder / "annotations"
    )
    done = evaluate(tiny_model(), benchmark, corpus, how)
    return done.prediction, done.second_stage, done.measured.flat


def of_a_rank(rank: int, folder: Path, top: int):
    torch.set_num_threads(1)
    prediction, stage, figures = matrices(folder, top)
    return prediction, stage.scores, figures


@pytest.fixture(scope="module")
def one(world):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield matrices(world[0], 3)
    torch.set_num_threads(threads)


def nearest(row: list[float], top: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda k: -row[k])[:top])


@torch.no_grad()
def test_the_matrix_is_its_loop(world, one):
    """Candidates by sorting lists, then a pair at a time, a sentence without its padding."""
    plain, *_ = matrices(world[0], None)
    prediction, stage, figures = one
    rows, columns = plain.tolist(), plain.T.tolist()
    wanted = {(i, j) for i, row in enumerate(rows) for j in nearest(row, 3)}
    wanted |= {(i, j) for j, column in enumerate(columns) for i in nearest(column, 3)}
    assert stage.num_pairs == len(wanted) < plain.numel()

    benchmark, corpus = open_benchmark(
        "ek100_mir", str(world[0] / "shards"), annotations=world[0] / "annotations"
    )
    model, second = tiny_model(), head()
    videos = {}
    for batch in clip_batches(model, corpus, EvalOptions(3, 0)):
        videos |= dict(zip(batch.clip_index[batch.mask].tolist(), batch.video, strict=False))
    expected = torch.zeros_like(plain)
    for i, j in wanted:
        tokens = Tokenizer()([benchmark.prompts[j]])
        tokens = tokens[:, : int(words_of(tokens).sum())]
        _, patches = model.encode_video_with_patches(videos[i][None])
        _, words = model.encode_text_with_words(tokens)
        pair = second.places(patches), second.words(words), words_of(tokens), torch.zeros(1).long()
        expected[i, j] = second(*pair).sigmoid()
    # float32 sums in another order; a logit's error is at most a quarter in the probability
    torch.testing.assert_close(stage.scores, expected, rtol=0, atol=1e-5)
    assert expected[expected > 0].std() > 0.01
    assert torch.equal(prediction, plain + stage.scores)
    # each direction is measured by its own queries' candidates
    by_clip, by_text = plain.clone(), plain.clone()
    for i, row in enumerate(rows):
        for j in nearest(row, 3):
            by_clip[i, j] += stage.scores[i, j]
    for j, column in enumerate(columns):
        for i in nearest(column, 3):
            by_text[i, j] += stage.scores[i, j]
    assert torch.equal(stage.by_clip, by_clip) and torch.equal(stage.by_text, by_text)
    present = torch.ones(NUM_CLIPS, dtype=torch.bool)
    for direction, matrix in (("v2t", by_clip), ("t2v", by_text)):
        alone = benchmark.measure(matrix, present).flat
        for name in (f"map_{direction}", f"ndcg_{direction}"):
            assert figures[name] == alone[name]


@pytest.mark.parametrize(("top", "blend"), [(0, 1.0), (3, 0.0)])
def test_no_second_look_is_the_dual_encoder_to_the_bit(world, top, blend):
    plain, second = matrices(world[0], None), matrices(world[0], top, blend)
    assert torch.equal(second[0], plain[0]) and second[2] == plain[2]


@pytest.mark.distributed
def test_two_ranks_are_one_to_the_bit(world, one):
    for found in run_ranks(2, of_a_rank, world[0], 3):
        assert torch.equal(found[0], one[0]) and found[2] == one[2]
        assert torch.equal(found[1], one[1].scores)


def test_candidates_are_nearest_of_either_side_and_never_missing():
    matrix = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.7, 0.3], [torch.nan] * 3, [0.1, 0.0, 0.6]])
    by_clip, by_text = (side.int().tolist() for side in candidates(matrix, 1))
    assert by_clip == [[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert by_text == [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert [int(side.sum()) for side in candidates(matrix, 3)] == [9, 9]


def words(folder: Path, *more: object) -> list[str]:
    data = ["--shards", folder / "shards", "--annotations", folder / "annotations"]
    how = ["--accelerator", "cpu", "--workers", "0", "--batch-size", "3"]
    read = ["--checkpoint", folder / "m.pt", "--config", folder / "m.json"]
    return [*map(str, ["evaluate", "--benchmark", "ek100_mir", *read, *data, *how, *more])]


def test_evaluate_says_what_it_did(world, reranker, one, tmp_path, capsys):
    files = tmp_path / "e.json", tmp_path / "s.npy", tmp_path / "p.npy"
    out = ["--json", files[0], "--prediction", files[1], "--rerank-scores", files[2]]
    second = ["--rerank", reranker, "--top", 3, "--blend", 0.5]
    assert main(words(world[0], *out, *second)) == 0
    result = json.loads(files[0].read_text())
    assert "top 3 re-ranked with blend 0.5" in result["protocol"]
    assert result["num_pairs_reranked"] == one[1].num_pairs
    assert " pairs/s" in capsys.readouterr().err
    prediction, scores = (torch.from_numpy(np.load(file)) for file in files[1:])
    torch.testing.assert_close(
        scores, one[1].scores, rtol=0, atol=1e-6
    )  # threads of another number
    torch.testing.assert_close(prediction - 0.5 * scores, one[0] - one[1].scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--top", 3], "--rerank, --blend missing"),
        (["--rerank", "R", "--top", 3], "--blend missing"),
        (["--rerank", "R", "--top", ALL + 1, "--blend", 1], f"at most {ALL}"),
        (["--rerank", "R", "--top", -1, "--blend", 1], "both are at least 0"),
        (["--rerank", "R", "--top", 3, "--blend", "nan"], "both are at least 0"),
        (["--rerank", "R", "--top", 3, "--blend", 1, "--flip"], "no --views, no --flip"),
        (["--rerank", "M", "--top", 3, "--blend", 1], "is no re-ranker: give a run of a recipe"),
        (["--rerank", "/none", "--top", 3, "--blend", 1], "/none: no such file"),
        (["--rerank", "R", "--top", 3, "--blend", 1, "--dtype", "bfloat16"], None),
    ],
)
def test_mistakes_are_told_in_words(world, reranker, capsys, more, told):
    named = {"R": reranker, "M": world[0] / "m.pt"}
    code = main(words(world[0], *(named.get(word, word) for word in more)))
    if told is None:
        assert code == 0
    else:
        assert code == 2 and told in capsys.readouterr().err


def test_a_head_of_another_dual_encoder_is_refused(world, reranker, tmp_path, capsys):
    state = tiny_model().state_dict()
    other = state | {"logit_scale": state["logit_scale"] + 1}
    torch.save(other, tmp_path / "other.pt")
    second = ["--rerank", reranker, "--top", 3, "--blend", 1]
    given = words(world[0], *second, "--checkpoint", tmp_path / "other.pt")
    assert main(given) == 2
    assert "the re-ranker was trained on the dual encoder" in capsys.readouterr().err


def test_a_reranker_is_no_model_by_itself(world, reranker, capsys):
    given = words(world[0], "--checkpoint", reranker)
    given = [w for w in given if w not in ("--config", str(world[0] / "m.json"))]
    assert main(given) == 2
    assert "is a re-ranker, which is no model by itself" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_takes_evaluates_words(world, reranker, one, tmp_path):
    """The checkpoint is converted on the way: the re-ranker knows its weights all the same."""
    folder, out = world[0], tmp_path / "sweep"
    data = f"--shards {folder / 'shards'} --annotations {folder / 'annotations'}"
    how = "--accelerator cpu --workers 0 --batch-size 3"
    benchmark = f"ek100_mir {data} {how} --rerank {reranker} --top 3 --blend 1"
    given = ["sweep", "--checkpoints", folder / "m.pt", "--config", folder / "m.json"]
    assert main([*map(str, [*given, "--benchmark", benchmark, "--output", out])]) == 0
    (result,) = (out / "results").glob("*.json")
    content = json.loads(result.read_text())["result"]
    assert content["num_pairs_reranked"] == one[1].num_pairs
    assert content["map"]["v2t"] == pytest.approx(one[2]["map_v2t"], abs=1e-6)
