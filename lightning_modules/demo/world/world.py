"""Writes the demo world: source videos and annotation files, as a user of this project has them.

OUT/videos/ego4d/{uid}.mp4               narrated videos for pretraining
OUT/videos/ek100/P01/P01_01.MP4          videos for multi-instance retrieval
OUT/annotations/egoclip.csv              EgoVLP's columns
OUT/annotations/EPIC_100_retrieval_{train,test}{,_sentence}.csv   EK-100's columns
OUT/annotations/vocabulary.json          phrases of the verbs and nouns
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import pickle
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from lightning_modules.demo.world.draw import draw_scene
from lightning_modules.demo.world.scene import sample_scene
from lightning_modules.demo.world.vocabulary import (
    NOUNS,
    VERBS,
    imperative,
    is_test_only,
    narration,
    phrases,
    rephrasings,
)

_SPLITS = ("pretrain", "train", "test")
_CLIPS_PER_VIDEO = 24
_TWO_OBJECTS = 0.2  # share of actions that handle two objects
_STAMP = "world.json"


@dataclass(frozen=True)
class WorldOptions:
    """Size and seed of a demo world.

    Attributes:
        seed: Everything follows from it.
        num_pretrain: Narrated clips for pretraining.
        num_train: Clips of the retrieval training split.
        num_test: Clips of the retrieval test split.
        height: Frame height in pixels.
        width: Frame width in pixels.
        fps: Frames a second of the source videos.
        clip_s: Length of a narrated segment in seconds.
    """

    seed: int = 0
    num_pretrain: int = 4800
    num_train: int = 1200
    num_test: int = 288
    height: int = 96
    width: int = 128
    fps: int = 8
    clip_s: float = 1.5

    def __post_init__(self) -> None:
        for name in ("num_pretrain", "num_train", "num_test"):
            value = getattr(self, name)
            if value < 2 or value % 2:
                raise ValueError(
                    f"{name} is {value}; it must be even and at least 2, since every action is "
                    "followed by its undoing"
                )

    @property
    def frames_per_clip(self) -> int:
        """Frames of a narrated segment."""
        return round(self.clip_s * self.fps)


@dataclass(frozen=True)
class Segment:
    """A narrated segment of a source video.

    Attributes:
        verb_class: Row of `VERBS`.
        noun_classes: Rows of `NOUNS`.
        start_s: Start within the video in seconds.
        stop_s: Stop in seconds.
    """

    verb_class: int
    noun_classes: tuple[int, ...]
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class DemoWorld:
    """Where the files of a world are.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def annotations(self) -> Path:
        """Folder of the annotation files."""
        return self.root / "annotations"

    @property
    def pretrain_videos(self) -> Path:
        """Source videos of `egoclip.csv`, layout `whole`."""
        return self.root / "videos" / "ego4d"

    @property
    def retrieval_videos(self) -> Path:
        """Source videos of the EK-100 files, layout `ek100`."""
        return self.root / "videos" / "ek100"


@dataclass(frozen=True)
class _Video:
    """One source video to be made."""

    split: str
    number: int
    num_clips: int
    options: WorldOptions

    def rng(self, purpose: int) -> np.random.Generator:
        split = _SPLITS.index(self.split)
        return np.random.default_rng([self.options.seed, split, self.number, purpose])

    @property
    def name(self) -> str:
        """Ego4D's random uid, or EK-100's participant and number."""
        if self.split == "pretrain":
            return str(uuid.UUID(bytes=self.rng(1).bytes(16), version=4))
        participant = 2 * (self.number // 4) + 1 + (self.split == "test")  # odd train, even test
        return f"P{participant:02d}_{self.number % 4 + 1:02d}"

    @property
    def path(self) -> str:
        if self.split == "pretrain":
            return f"ego4d/{self.name}.mp4"
        return f"ek100/{self.name.partition('_')[0]}/{self.name}.MP4"


def build_world(
    root: str | Path,
    options: WorldOptions | None = None,
    *,
    num_workers: int = 1,
    progress: bool = False,
) -> DemoWorld:
    """Write a demo world, or return the one that is there already with the same options.

    Args:
        root: Folder to write to.
        options: Size and seed.
        num_workers: Processes that render videos. Files do not depend on their number.
        progress: Show a progress bar.

    Raises:
        ValueError: The folder holds a world with other options.
    """
    options = options or WorldOptions()
    world = DemoWorld(Path(root))
    stamp = world.root / _STAMP
    wanted = json.dumps({"options": asdict(options), "generator": _generator_digest()}, indent=1)
    if stamp.is_file():
        if stamp.read_text() != wanted:
            raise ValueError(
                f"{world.root} holds a demo world with other options, or of another version of "
                "the generator; use another folder, or remove this one"
            )
        return world
    videos = [
        _Video(split, number, min(_CLIPS_PER_VIDEO, total - number * _CLIPS_PER_VIDEO), options)
        for split in _SPLITS
        for total in [getattr(options, f"num_{split}")]
        for number in range(-(-total // _CLIPS_PER_VIDEO))
    ]
    segments = _render_all(world, videos, num_workers, progress)
    world.annotations.mkdir(parents=True, exist_ok=True)
    made = list(zip(videos, segments, strict=True))
    narrated = [pair for pair in made if pair[0].split == "pretrain"]
    _write_egoclip(world, narrated)
    _write_rephrased(world, narrated)
    for split in ("train", "test"):
        _write_epic(world, split, [pair for pair in made if pair[0].split == split])
    (world.annotations / "vocabulary.json").write_text(json.dumps(phrases(), indent=1) + "\n")
    stamp.write_text(wanted)
    return world


def _generator_digest() -> str:
    """Digest of this package's code: a changed generator makes other videos."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _render_all(
    world: DemoWorld, videos: Sequence[_Video], num_workers: int, progress: bool
) -> list[list[Segment]]:
    folder = world.root / "videos"
    with tqdm(
        total=sum(video.num_clips for video in videos),
        desc="videos",
        unit="clip",
        disable=not progress,
    ) as bar:
        done = []
        # Spawned, because the caller may hold threads that a fork would tear.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
            for segments in pool.map(_render, videos, [folder] * len(videos)):
                done.append(segments)
                bar.update(len(segments))
    return done


def _render(video: _Video, folder: Path) -> list[Segment]:
    """Draw and encode one source video: pairs of an action and its undoing."""
    options, rng = video.options, video.rng(0)
    path = folder / video.path
    path.parent.mkdir(parents=True, exist_ok=True)
    segments: list[Segment] = []
    clips: list[np.ndarray] = []
    kitchen = int(rng.integers(2**31))
    for _ in range(video.num_clips // 2):
        verb, nouns = _draw_action(rng, allow_test_only=video.split == "test")
        scene = sample_scene(
            rng, verb, nouns, num_frames=options.frames_per_clip, fps=options.fps, kitchen=kitchen
        )
        frames = draw_scene(scene, options.height, options.width)
        for shown, pixels in ((scene, frames), (scene.reversed(), frames[::-1])):
            start_s = len(segments) * options.clip_s
            segments.append(Segment(shown.verb_class, nouns, start_s, start_s + options.clip_s))
            clips.append(pixels)
    _encode(path, clips, options)
    return segments


def _draw_action(rng: np.random.Generator, *, allow_test_only: bool) -> tuple[int, tuple[int, ...]]:
    while True:
        verb = int(rng.integers(len(VERBS)))
        count = 2 if rng.uniform() < _TWO_OBJECTS else 1
        nouns = tuple(int(n) for n in rng.choice(len(NOUNS), size=count, replace=False))
        if allow_test_only or not any(is_test_only(verb, noun) for noun in nouns):
            return verb, nouns


def _encode(path: Path, clips: Iterable[np.ndarray], options: WorldOptions) -> None:
    temporary = path.with_name(f".{path.name}")
    container: Any = av.open(str(temporary), "w", format="mp4")
    with container:
        stream = container.add_stream("libx264", rate=options.fps)
        stream.width, stream.height, stream.pix_fmt = options.width, options.height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {
            "crf": "18",
            "preset": "veryfast",
            "g": str(options.frames_per_clip),
            "x264-params": "mbtree=0",  # with macroblock trees the bytes vary from run to run
        }
        for frames in clips:
            for pixels in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(picture))
        container.mux(stream.encode())
    temporary.replace(path)


_Made = Sequence[tuple[_Video, list[Segment]]]


def _write_table(path: Path, rows: Sequence[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_egoclip(world: DemoWorld, made: _Made) -> None:
    rows: list[dict[str, Any]] = []
    for video, segments in made:
        rng = video.rng(2)
        for number, segment in enumerate(segments):
            rows.append(
                {
                    "clip_idx": len(rows),
                    "video_uid": video.name,
                    "video_dur": segments[-1].stop_s,
                    "narration_source": "narration_pass_1",
                    "narration_ind": number,
                    "narration_time": (segment.start_s + segment.stop_s) / 2,
                    "clip_start": segment.start_s,
                    "clip_end": segment.stop_s,
                    "clip_text": narration(segment.verb_class, segment.noun_classes, rng),
                    "tag_verb": [segment.verb_class],
                    "tag_noun": list(segment.noun_classes),
                }
            )
    _write_table(world.annotations / "egoclip.csv", rows, delimiter="\t")


def _write_rephrased(world: DemoWorld, made: _Made) -> None:
    rows = [
        (
            video.name,
            segment.start_s,
            segment.stop_s,
            rephrasings(segment.verb_class, segment.noun_classes),
        )
        for video, segments in made
        for segment in segments
    ]
    (world.annotations / "ego4d_rephrased.pkl").write_bytes(pickle.dumps(rows, protocol=4))


def _write_epic(world: DemoWorld, split: str, made: _Made) -> None:
    rows: list[dict[str, Any]] = []
    sentences: dict[str, dict[str, Any]] = {}
    for video, segments in made:
        for number, segment in enumerate(segments):
            verb, nouns = VERBS[segment.verb_class], [NOUNS[n] for n in segment.noun_classes]
            text = imperative(segment.verb_class, segment.noun_classes)
            rows.append(
                {
                    "narration_id": f"{video.name}_{number}",
                    "participant_id": video.name.partition("_")[0],
                    "video_id": video.name,
                    "narration_timestamp": _clock(segment.start_s),
                    "start_timestamp": _clock(segment.start_s),
                    "stop_timestamp": _clock(segment.stop_s),
                    "start_frame": round(segment.start_s * video.options.fps),
                    "stop_frame": round(segment.stop_s * video.options.fps),
                    "narration": text,
                    "verb": verb.name,
                    "verb_class": segment.verb_class,
                    "noun": nouns[0],
                    "noun_class": segment.noun_classes[0],
                    "all_nouns": nouns,
                    "all_noun_classes": list(segment.noun_classes),
                }
            )
            sentence = {"narration_id": rows[-1]["narration_id"], "narration": text}
            if split == "train":
                sentence |= {
                    "verb_class": segment.verb_class,
                    "noun_classes": list(segment.noun_classes),
                    "verb": verb.name,
                    "nouns": nouns,
                }
            sentences.setdefault(text, sentence)
    name = f"EPIC_100_retrieval_{split}"
    _write_table(world.annotations / f"{name}.csv", rows)
    _write_table(world.annotations / f"{name}_sentence.csv", list(sentences.values()))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours:02d}:{minutes:02d}:{rest:05.2f}"
