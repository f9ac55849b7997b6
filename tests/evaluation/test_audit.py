"""The audit: an oracle by hand, a planted leak that is found, an honest model that passes."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from epic_files import HEADER, write_retrieval_split

from datamodules.annotations.epic import RetrievalClip, Sentence
from lightning_modules.cli.main import main
from lightning_modules.evaluation.audit import audit, blind_oracle, find_duplicates, pairing_signal
from lightning_modules.evaluation.benchmarks.ek100_mir import RetrievalAnnotations

WORDS = ("put", "place", "set"), ("red", "blue", "big", "old"), ("cup", "pan", "knife")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 clips of 4 classes x 12 captions each: the same classes said in different words."""
    root = tmp_path_factory.mktemp("annotations")
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        said = [
            (f"{verb} the {adjective} {noun}", number)
            for number, noun in enumerate(WORDS[2])
            for verb in WORDS[0]
            for adjective in WORDS[1]
        ]
        clips = [said[row] for row in [*range(len(said)), *draw.integers(0, len(said), 204)]]
        with (root / f"EPIC_100_retrieval_{split}.csv").open("w", newline="") as file:
            file.write(HEADER + "\n")
            writer = csv.writer(file)
            for row, (text, noun) in enumerate(clips):
                video = f"P0{1 if split == 'train' else 2}_01"
                span = (
                    f"00:{row // 60:02}:{row % 60:02}.00",
                    f"00:{row // 60:02}:{row % 60:02}.80",
                )
                head = (f"{video}_{row}", video[:3], video, span[0], *span, 1, 50)
                tail = (text, "put", 1, WORDS[2][noun], noun, f"['{WORDS[2][noun]}']", f"[{noun}]")
                writer.writerow([*head, *tail])
        with (root / f"EPIC_100_retrieval_{split}_sentence.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["narration_id", "narration"])
            for row, (text, _) in enumerate(said):
                writer.writerow([f"{video}_{row}", text])
    return root


@pytest.fixture(scope="module")
def annotations(folder: Path) -> RetrievalAnnotations:
    return RetrievalAnnotations(folder, "test")


def honest(annotations: RetrievalAnnotations, seed: int = 0) -> torch.Tensor:
    """A dual encoder that sees classes, and noise of clips and of sentences, but no pairing."""
    generator = torch.Generator().manual_seed(seed)
    clips = torch.tensor([clip.noun_class for clip in annotations.clips])
    texts = torch.tensor([sentence.all_noun_classes[0] for sentence in annotations.sentences])
    basis = torch.randn(3, 32, generator=generator)
    video = basis[clips] + 3.0 * torch.randn(len(clips), 32, generator=generator)
    text = basis[texts] + 3.0 * torch.randn(len(texts), 32, generator=generator)
    return (
        torch.nn.functional.normalize(video, dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    )


def leaked(annotations: RetrievalAnnotations, strength: float) -> torch.Tensor:
    """The same, with the own caption's words mixed into the video side."""
    return honest(annotations) + strength * blind_oracle(annotations.clips, annotations.sentences)


def test_the_oracle_is_the_cosine_of_word_sets(annotations: RetrievalAnnotations) -> None:
    found = blind_oracle(annotations.clips, annotations.sentences)
    for row, column in ((0, 0), (3, 17), (200, 35)):
        own = set(annotations.clips[row].narration.split())
        other = set(annotations.sentences[column].text.split())
        wanted = len(own & other) / (len(own) * len(other)) ** 0.5
        assert float(found[row, column]) == pytest.approx(wanted, abs=1e-6)


def test_a_planted_leak_is_found_and_an_honest_model_passes(
    annotations: RetrievalAnnotations,
) -> None:
    for seed in range(3):
        signal = pairing_signal(honest(annotations, seed), annotations.clips, annotations.sentences)
        assert signal is not None and not signal.is_leak and abs(signal.excess) < 0.1
    for strength in (0.5, 2.0):
        found = audit(annotations, leaked(annotations, strength))
        assert found.pairing is not None and found.pairing.is_leak
        assert any("have reached the video side" in text for text in found.warnings)
    assert audit(annotations, honest(annotations)).warnings == []


def test_shuffled_captions_do_not_move_an_honest_model(annotations: RetrievalAnnotations) -> None:
    """Which caption accompanies a clip is told to the audit alone: permute it, and the signal of
    a leak goes, while an honest one stays where it was."""
    order = np.random.default_rng(1).permutation(len(annotations.clips))
    classes = [(c.verb_class, c.all_noun_classes) for c in annotations.clips]
    shuffled = list(annotations.clips)
    for key in set(classes):
        rows = [row for row in range(len(classes)) if classes[row] == key]
        for row, other in zip(rows, sorted(rows, key=lambda r: order[r]), strict=True):
            shuffled[row] = replace(shuffled[row], narration=annotations.clips[other].narration)
    for matrix, moves in ((leaked(annotations, 2.0), True), (honest(annotations), False)):
        before = pairing_signal(matrix, annotations.clips, annotations.sentences)
        after = pairing_signal(matrix, shuffled, annotations.sentences)
        assert before is not None and after is not None
        assert (abs(before.own_first - after.own_first) > 0.5) is moves


def test_figures_above_the_oracle_are_told(annotations: RetrievalAnnotations) -> None:
    perfect = torch.tensor(
        [
            [float(c.all_noun_classes == s.all_noun_classes) for s in annotations.sentences]
            for c in annotations.clips
        ]
    )
    told = audit(annotations, perfect).warnings
    assert any("map 100.00 is above the blind oracle's" in text for text in told)


def test_missing_clips_are_left_out(annotations: RetrievalAnnotations) -> None:
    matrix = leaked(annotations, 2.0)
    matrix[::5] = torch.nan
    found = audit(annotations, matrix)
    assert found.pairing is not None and found.pairing.num_clips == len(matrix) * 4 // 5
    assert sum(row["num_clips"] for row in found.kinds["seconds"].values()) == len(matrix) * 4 // 5


def clip(name: str, video: str, start_s: float, stop_s: float) -> RetrievalClip:
    return RetrievalClip(name, "P01", video, start_s, stop_s, "say", 0, 0, (0,))


def test_overlapping_seconds_of_one_video_are_duplicates() -> None:
    train = [clip("a", "v", 1, 3), clip("b", "w", 0, 9)]
    test = [clip("c", "v", 2.9, 4), clip("d", "v", 3, 4), clip("e", "x", 1, 3)]
    found = find_duplicates(train, test)
    assert found.same_seconds == 1 and found.same_bytes is None
    assert found.examples == ["c overlaps a in v"]


def test_nothing_to_compare_is_no_signal() -> None:
    clips = [clip("a", "v", 0, 1), clip("b", "v", 1, 2)]
    assert pairing_signal(torch.zeros(2, 1), clips, [Sentence("a", "say", 0, (0,))]) is None


def test_the_command_ends_with_1_where_something_speaks_against_it(
    folder: Path, annotations: RetrievalAnnotations, tmp_path: Path, capsys
) -> None:
    words = ["audit", "--annotations", str(folder)]
    assert main(words) == 0
    assert "blind oracle" in capsys.readouterr().out
    np.save(tmp_path / "honest.npy", honest(annotations).numpy())
    np.save(tmp_path / "leaked.npy", leaked(annotations, 2.0).numpy())
    assert main([*words, "--similarity", str(tmp_path / "honest.npy")]) == 0
    told = capsys.readouterr().out
    assert "nothing speaks against it" in told and "training clips of the action" in told
    json = tmp_path / "audit.json"
    leak = [*words, "--similarity", str(tmp_path / "leaked.npy"), "--json", str(json)]
    assert main(leak) == 1
    assert "WARNING" in capsys.readouterr().out and '"warnings"' in json.read_text()
    assert main([*words, "--shards", "x"]) == 2


def test_stored_bytes_are_compared(tmp_path: Path) -> None:
    from small_videos import write_video

    from datamodules.annotations.formats import read_clips
    from datamodules.manifest import Manifest
    from datamodules.shards import LAYOUTS, EncodeOptions, build_shards

    write_retrieval_split(tmp_path, "test", 6, 4)
    write_video(tmp_path / "v" / "P01" / "P01_01.MP4", 90)
    clips = list(read_clips(tmp_path / "EPIC_100_retrieval_test.csv", "ek100"))
    manifests = []
    for name, part in (("train", clips[:4]), ("test", clips[3:])):
        build_shards(
            part,
            videos=tmp_path / "v",
            layout=LAYOUTS["ek100"],
            output=tmp_path / name,
            options=EncodeOptions(short_side=48, preset="ultrafast", fps=5),
            num_workers=1,
        )
        manifests.append(Manifest.load(str(tmp_path / name / "manifest.json")))
    found = find_duplicates([], [], *manifests)
    assert found.same_bytes == 1 and found.examples == [f"{clips[3].clip_id} is {clips[3].clip_id}"]
