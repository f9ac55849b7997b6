"""The demo world: what its videos and annotation files promise."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from datamodules.annotations.epic import read_retrieval_clips, read_sentences, retrieval_files
from datamodules.annotations.formats import read_clips
from lightning_modules.demo.world import DemoWorld, WorldOptions, build_world, sample_scene
from lightning_modules.demo.world.draw import draw_scene
from lightning_modules.demo.world.vocabulary import (
    NOUNS,
    VERBS,
    imperative,
    is_test_only,
    narration,
    rephrasings,
    reversed_verb,
)

SMALL = WorldOptions(seed=3, num_pretrain=26, num_train=20, num_test=40, height=48, width=64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    return build_world(tmp_path_factory.mktemp("world"), SMALL, num_workers=2)


def _sample(seed: int, verb: int, nouns: tuple[int, ...] = (1,), num_frames: int = 12):
    rng = np.random.default_rng(seed)
    return sample_scene(rng, verb, nouns, num_frames=num_frames, fps=8, kitchen=5)


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_verbs_come_in_pairs_of_opposite_direction() -> None:
    for verb, partner in zip(VERBS[::2], VERBS[1::2], strict=True):
        assert (verb.family, -verb.direction) == (partner.family, partner.direction)
    assert [reversed_verb(reversed_verb(v)) for v in range(8)] == list(range(8))
    assert all(reversed_verb(v) != v for v in range(8))


@pytest.mark.parametrize("verb", range(len(VERBS)))
def test_a_reversed_clip_is_drawn_exactly_as_its_partner(verb: int) -> None:
    scene = _sample(verb, verb, (2, 7))
    backwards = scene.reversed()
    assert backwards.verb_class == reversed_verb(verb)
    frames = draw_scene(scene, 48, 64)
    np.testing.assert_array_equal(draw_scene(backwards, 48, 64), frames[::-1])
    assert len(np.unique(frames.reshape(len(frames), -1), axis=0)) > 6  # something moves


@pytest.mark.parametrize("verb", range(0, len(VERBS), 2))
def test_a_verb_and_its_reversed_partner_have_the_same_law(verb: int) -> None:
    """Frame by frame, `progress` of a verb is distributed as the mirrored one of its partner."""
    own = np.stack([_sample(s, verb).progress for s in range(300)])
    mirrored = np.stack([_sample(1000 + s, verb + 1).reversed().progress for s in range(300)])
    # Two samples of 300 from one law: a quantile of a spread of 0.1 moves by about 0.01.
    quantiles = np.linspace(0.1, 0.9, 5)
    difference = np.quantile(own, quantiles, axis=0) - np.quantile(mirrored, quantiles, axis=0)
    assert np.abs(difference).max() < 0.03
    # ... so the frames as a set say nothing, while their order does: progress rises or falls
    pooled = np.sort(own.ravel()) - np.sort(mirrored[:, ::-1].ravel())
    assert np.abs(pooled).max() < 0.03
    assert np.all(np.diff(own * VERBS[verb].direction, axis=1) >= 0)


def test_an_action_is_followed_by_its_undoing(world: DemoWorld) -> None:
    clips = read_clips(world.annotations / "egoclip.csv", "egoclip")
    for first, second in zip(clips[::2], clips[1::2], strict=True):
        assert first.video_id == second.video_id
        assert second.verb_classes == (reversed_verb(first.verb_classes[0]),)
        assert first.noun_classes == second.noun_classes
        assert first.end_s == second.start_s
    frames = _decode(world.pretrain_videos / f"{clips[0].video_id}.mp4").astype(float)
    n = SMALL.frames_per_clip
    mirrored = np.abs(frames[:n] - frames[2 * n - 1 : n - 1 : -1]).mean()
    same = np.abs(frames[:n] - frames[n : 2 * n]).mean()
    assert mirrored < 4  # what H.264 at this quality leaves of 256 levels
    assert mirrored < 0.5 * same


def test_equal_seeds_give_equal_files_on_any_number_of_workers(
    world: DemoWorld, tmp_path: Path
) -> None:
    again = build_world(tmp_path / "again", SMALL, num_workers=1)
    assert _files(again.root) == _files(world.root)
    other = build_world(tmp_path / "other", WorldOptions(**{**vars(SMALL), "seed": 4}))
    texts = [
        (root / "annotations" / "egoclip.csv").read_text() for root in (world.root, other.root)
    ]
    assert texts[0] != texts[1]


def test_training_never_shows_the_test_only_pairs(world: DemoWorld) -> None:
    def pairs(name: str, kind: str) -> set[tuple[int, int]]:
        clips = read_clips(world.annotations / name, kind)
        return {(clip.verb_classes[0], noun) for clip in clips for noun in clip.noun_classes}

    trained = pairs("egoclip.csv", "egoclip") | pairs("EPIC_100_retrieval_train.csv", "ek100")
    tested = pairs("EPIC_100_retrieval_test.csv", "ek100")
    assert not any(is_test_only(*pair) for pair in trained)
    assert any(is_test_only(*pair) for pair in tested)
    everything = {(v, n) for v in range(len(VERBS)) for n in range(len(NOUNS))}
    allowed = {pair for pair in everything if not is_test_only(*pair)}
    assert {v for v, _ in allowed} == set(range(len(VERBS)))
    assert {n for _, n in allowed} == set(range(len(NOUNS)))
    assert len(allowed) == len(everything) * 5 // 6


def test_the_files_are_read_by_the_readers_of_real_data(world: DemoWorld) -> None:
    clips = read_clips(world.annotations / "egoclip.csv", "egoclip")
    assert len(clips) == SMALL.num_pretrain
    assert all(clip.texts[0].startswith("#C C ") for clip in clips)
    rephrased = read_clips(world.annotations / "ego4d_rephrased.pkl", "lavila")
    for clip, plain in zip(rephrased, clips, strict=True):
        assert (clip.video_id, clip.start_s, clip.end_s) == (
            plain.video_id,
            plain.start_s,
            plain.end_s,
        )
        assert plain.texts[0] in clip.texts and len(clip.texts) == 4
    for split, count in (("train", SMALL.num_train), ("test", SMALL.num_test)):
        clip_file, sentence_file = retrieval_files(world.annotations, split)
        rows = read_retrieval_clips(clip_file)
        sentences = read_sentences(sentence_file, rows)
        assert len(rows) == count
        assert [s.text for s in sentences] == list(dict.fromkeys(row.narration for row in rows))
        for row in rows:
            assert row.narration == imperative(row.verb_class, row.all_noun_classes)
            assert row.stop_s - row.start_s == pytest.approx(SMALL.clip_s)
            path = world.retrieval_videos / row.participant_id / f"{row.video_id}.MP4"
            assert path.is_file()


def test_participants_of_the_test_split_are_new(world: DemoWorld) -> None:
    people = [
        {
            row.participant_id
            for row in read_retrieval_clips(retrieval_files(world.annotations, s)[0])
        }
        for s in ("train", "test")
    ]
    assert not people[0] & people[1]


def test_narrations_name_verb_and_objects_in_every_form() -> None:
    rng = np.random.default_rng(0)
    forms = {narration(4, (0, 7), rng) for _ in range(40)}
    assert len(forms) == 4
    assert forms == set(rephrasings(4, (0, 7)))
    assert all("push" in text and "the red box and the blue bottle left" in text for text in forms)
    assert imperative(4, (0, 7)) == "push red box and blue bottle left"


def test_a_world_is_reused_and_never_mixed_with_another(world: DemoWorld) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.root.rglob("*")}
    assert build_world(world.root, SMALL) == world
    assert {path: path.stat().st_mtime_ns for path in world.root.rglob("*")} == before
    with pytest.raises(ValueError, match="other options"):
        build_world(world.root, WorldOptions(seed=4))
    stamp = json.loads((world.root / "world.json").read_text())
    assert stamp["options"]["seed"] == SMALL.seed


@pytest.mark.parametrize("count", [0, 3, -2])
def test_odd_or_empty_splits_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="num_train is"):
        WorldOptions(num_train=count)
