"""Weights and scales chosen on held-out clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from epic_files import write_retrieval_split

from datamodules.relevance import relevance_matrix
from lightning_modules.cli.main import main
from lightning_modules.evaluation.benchmarks.ek100_mir import RetrievalAnnotations
from lightning_modules.evaluation.rerank import candidates
from lightning_modules.evaluation.saved import score_saved
from lightning_modules.evaluation.tuning import Tuned, tune, without_zeros
from lightning_modules.evaluation.tuning_rerank import tune_rerank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits, and for each: two models that know different things, and one that knows none."""
    root = tmp_path_factory.mktemp("epic")
    for split, seed in (("train", 0), ("test", 1)):
        clips, sentences = write_retrieval_split(root, split, 60, 24, seed)
        draw = np.random.default_rng(seed)
        noise = [draw.normal(size=(60, 24)) for _ in range(3)]
        verbs = np.array([[float(a == b) for b, _ in sentences] for a, _ in clips])
        nouns = np.array([[len(a & b) / len(a | b) for _, b in sentences] for _, a in clips])
        for name, matrix in (
            ("verbs", verbs + 0.3 * noise[0]),
            ("nouns", nouns + 0.3 * noise[1]),
            ("noise", 3.0 * noise[2]),
        ):
            np.save(root / f"{name}_{split}.npy", matrix.astype(np.float32))
    return root


def paths(folder: Path, split: str) -> list[Path]:
    return [folder / f"{name}_{split}.npy" for name in ("verbs", "nouns", "noise")]


def test_what_helps_is_weighed_and_what_does_not_is_left_out(folder: Path) -> None:
    annotations = RetrievalAnnotations(folder, "train")
    tuned = tune(paths(folder, "train"), annotations, "train")
    assert tuned.value > max(tuned.before) and tuned.num_clips == 60
    verbs, nouns, noise = tuned.weights
    assert verbs > 0 and nouns > 0 and noise <= min(verbs, nouns) / 4
    # no neighbour in the grid of weights is better
    for place in range(2):
        for factor in (0.5, 2.0):
            weights = list(tuned.weights)
            weights[place] *= factor
            assert score(folder, "train", weights) <= tuned.value + 1e-9


def score(folder: Path, split: str, weights: list[float]) -> float:
    matrices, weights = without_zeros(paths(folder, split), weights)
    done = score_saved(matrices, RetrievalAnnotations(folder, split), weights=weights)
    return (done.metrics["map"]["avg"] + done.metrics["ndcg"]["avg"]) / 2


def test_clips_that_were_not_held_out_do_not_count(folder: Path, tmp_path: Path) -> None:
    annotations = RetrievalAnnotations(folder, "train")
    files = []
    for path in paths(folder, "train"):
        matrix = np.load(path)
        matrix[::3] = np.nan
        files.append(tmp_path / path.name)
        np.save(files[-1], matrix)
    assert tune(files, annotations, "train").num_clips == 40
    np.save(files[0], np.full_like(matrix, np.nan))
    with pytest.raises(ValueError, match="no clip of train is in all of"):
        tune(files, annotations, "train")


def test_the_test_split_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "--annotations", folder, "--split", "test", "--output", folder / "x.json"]
    assert main([*map(str, words), "--similarity", str(paths(folder, "test")[0])]) == 2
    assert "makes its figure worthless" in capsys.readouterr().err


def test_from_held_out_clips_to_the_test(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "tuned.json"
    words = ["--annotations", str(folder)]
    held = [str(path) for path in paths(folder, "train")]
    assert main(["tune", *words, "--similarity", *held, "--output", str(out)]) == 0
    assert "next: eva02-at score" in capsys.readouterr().err
    tuned = Tuned.load(out)
    assert tuned.dual_softmax is None
    test = [str(path) for path in paths(folder, "test")]
    assert main(["score", *words, "--similarity", *test, "--tuned", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tuned"]["weights"] == tuned.weights and "transductive" not in result
    value = (result["map"]["avg"] + result["ndcg"]["avg"]) / 2
    assert value == pytest.approx(score(folder, "test", tuned.weights), abs=1e-9)
    assert value > max(score(folder, "test", list(row)) for row in torch.eye(3).tolist())
    assert (
        main(["score", *words, "--similarity", *test, "--tuned", str(out), "--weights", "1"]) == 2
    )
    assert main(["score", *words, "--similarity", *test[:2], "--tuned", str(out)]) == 2
    assert "weights" in capsys.readouterr().err
    out.write_text("{}")
    assert main(["score", *words, "--similarity", *test, "--tuned", str(out)]) == 2


def test_a_transductive_choice_says_so(folder: Path, tmp_path: Path, capsys) -> None:
    plain = tune(paths(folder, "train"), RetrievalAnnotations(folder, "train"), "train")
    tuned = tune(
        paths(folder, "train"), RetrievalAnnotations(folder, "train"), "train", transductive=True
    )
    assert tuned.value >= plain.value and tuned.weights == plain.weights
    Tuned(**{**vars(tuned), "dual_softmax": 20.0}).save(tmp_path / "t.json")
    test = [str(path) for path in paths(folder, "test")]
    words = ["score", "--annotations", str(folder), "--similarity", *test]
    assert main([*words, "--tuned", str(tmp_path / "t.json")]) == 0
    assert json.loads(capsys.readouterr().out)["transductive"] is True


def second_look(folder: Path, top: int, good: bool) -> tuple[Path, Path]:
    """A dual encoder that knows verbs, and what somebody who knows nouns says of its candidates."""
    first = np.load(folder / "verbs_train.npy")
    first[40:] = np.nan  # not held out
    by_clip, by_text = candidates(torch.from_numpy(first), top)
    chosen = (by_clip | by_text).numpy()
    told = np.load(folder / "nouns_train.npy") * (1 if good else -1)
    scores = np.where(chosen, 1 / (1 + np.exp(-4 * told)), 0).astype(np.float32)
    scores[40:] = np.nan
    files = folder / "first.npy", folder / f"second_{top}_{good}.npy"
    for file, matrix in zip(files, (first, scores), strict=True):
        np.save(file, matrix)
    return files


def test_a_second_look_is_chosen_where_it_gains(folder: Path, tmp_path: Path, capsys) -> None:
    first, second = second_look(folder, 20, good=True)
    words = ["tune", f"--annotations={folder}", f"--similarity={first}"]
    out = tmp_path / "tuned.json"
    assert main([*words, f"--rerank-scores={second}", f"--output={out}"]) == 0
    tuned = json.loads(out.read_text())
    assert tuned["value"] > tuned["before"] + 1 and tuned["num_clips"] == 40
    assert tuned["tried"] == [5, 10, 20] and tuned["top"] in tuned["tried"] and tuned["blend"] > 0
    assert f"--top {tuned['top']} --blend {tuned['blend']:g}" in capsys.readouterr().err
    # the value is that of the matrix which `evaluate` would make
    matrix, scores = (torch.from_numpy(np.load(file)) for file in (first, second))
    parts = []
    for direction, chosen in zip(("v2t", "t2v"), candidates(matrix, tuned["top"]), strict=True):
        mixed = matrix + tuned["blend"] * scores.where(chosen, torch.zeros(()))
        np.save(tmp_path / "mixed.npy", mixed.numpy())
        annotations = RetrievalAnnotations(folder, "train")
        metrics = score_saved([tmp_path / "mixed.npy"], annotations, max_missing=1).metrics
        parts += [metrics[name][direction] for name in ("map", "ndcg")]
    assert sum(parts) / 4 == pytest.approx(tuned["value"], abs=1e-9)


def test_a_second_look_that_does_harm_is_left_out(folder: Path) -> None:
    files = second_look(folder, 10, good=False)
    tuned = tune_rerank(*files, RetrievalAnnotations(folder, "train"), "train", objective="map")
    assert tuned.value == tuned.before and (tuned.top, tuned.blend) == (0, 0.0)


def test_scores_of_another_matrix_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    _, second = second_look(folder, 10, good=True)
    words = ["tune", f"--annotations={folder}", f"--output={tmp_path / 'x'}"]
    words += [f"--rerank-scores={second}"]
    for more, told in (
        ([f"--similarity={folder / 'noise_train.npy'}"], "lacks candidates of the top 5"),
        ([f"--similarity={folder / 'first.npy'}", "--split=test"], "tuning on the test split"),
        (["--similarity", str(second), str(second)], "wants one --similarity"),
    ):
        assert main([*words, *more]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def with_hubs(folder: Path, split: str) -> tuple[Path, Path]:
    """A model for which a few clips are near every text, and its bank."""
    draw = np.random.default_rng(5)
    hubs = 1.5 * (draw.random((60, 1)) < 0.2)
    matrix = 0.7 * np.load(folder / f"verbs_{split}.npy") + np.load(folder / f"nouns_{split}.npy")
    bank = draw.normal(scale=0.3, size=(60, 40)) + hubs
    files = folder / f"hubs_{split}.npy", folder / f"bank_{split}.npy"
    for file, values in zip(files, (matrix + hubs, bank), strict=True):
        np.save(file, values.astype(np.float32))
    return files


def test_a_bank_lowers_hubs_and_is_chosen_where_it_gains(folder: Path, tmp_path: Path, capsys):
    held, _ = with_hubs(folder, "train")
    test, bank = with_hubs(folder, "test")
    out = tmp_path / "tuned.json"
    words = ["--annotations", str(folder)]
    assert main(["tune", *words, f"--similarity={held}", "--bank", f"--output={out}"]) == 0
    tuned = Tuned.load(out)
    assert tuned.bank_scale is not None and tuned.bank_gain > 5
    capsys.readouterr()
    score_it = ["score", *words, f"--similarity={test}"]
    assert main(score_it) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*score_it, f"--tuned={out}", f"--bank={bank}"]) == 0
    normal = json.loads(capsys.readouterr().out)
    assert normal["bank"] == {"scale": tuned.bank_scale, "num_texts": 40}
    assert "transductive" not in normal
    assert normal["map"]["t2v"] > plain["map"]["t2v"] + 5
    # a shift of a clip moves nothing in the retrieval of texts by it
    assert normal["map"]["v2t"] == pytest.approx(plain["map"]["v2t"])
    assert main([*score_it, f"--tuned={out}"]) == 2
    assert "the bank is missing: give --bank" in capsys.readouterr().err


def test_a_bank_that_does_not_help_is_not_taken(folder: Path, tmp_path: Path, capsys):
    """A model whose hubs are right: clips that every text is near, and that are relevant to all."""
    annotations = RetrievalAnnotations(folder, "train")
    clips, sentences = annotations.classes
    relevance = relevance_matrix(
        torch.tensor(clips.verbs), clips.nouns, torch.tensor(sentences.verbs), sentences.nouns
    )
    perfect = tmp_path / "perfect.npy"
    np.save(perfect, relevance.numpy().astype(np.float32))
    tuned = tune([perfect], annotations, "train", bank=True)
    assert tuned.bank_scale is None and tuned.bank_gain == 0
    tuned.save(tmp_path / "t.json")
    words = ["score", "--annotations", str(folder), f"--similarity={folder / 'verbs_test.npy'}"]
    _, bank = with_hubs(folder, "test")
    assert main([*words, f"--tuned={tmp_path / 't.json'}", f"--bank={bank}"]) == 2
    assert "no bank helps" in capsys.readouterr().err
    assert main([*words, f"--bank={bank}"]) == 2  # no scale
    assert main([*words, f"--bank={bank}", "--bank-scale=5", "--dual-softmax=5"]) == 2
    with pytest.raises(ValueError, match="exclude each other"):
        tune([perfect], annotations, "train", bank=True, transductive=True)


def test_a_clip_that_the_bank_lacks_is_missing(folder: Path, tmp_path: Path, capsys):
    test, bank = with_hubs(folder, "test")
    values = np.load(bank)
    values[3] = np.nan
    np.save(tmp_path / "b.npy", values)
    words = ["score", "--annotations", str(folder), f"--similarity={test}", "--bank-scale=20"]
    assert main([*words, f"--bank={tmp_path / 'b.npy'}", "--max-missing=1"]) == 0
    assert json.loads(capsys.readouterr().out)["num_missing_clips"] == 1
