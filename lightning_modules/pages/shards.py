"""A set of shards as one page: what is in it, samples to look at, and everything that is wrong."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.manifest import ClipRecord, Manifest
from datamodules.shards.describe import describe
from datamodules.stream.reader import Corpus, SampleReader
from datamodules.video.decode import DamagedSample, decode_frames
from datamodules.video.windows import Unreadable, in_children
from lightning_modules.pages import page

_FRAMES, _SIDE = 3, 256
_BINS, _MOST_CLASSES, _MOST_REJECTS = 20, 20, 200

_STYLE = """
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; }
.facts div { padding: 10px 14px; } .facts b { display: block; font-size: 20px; }
.facts span, figcaption, dt { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr));
  gap: 14px; }
.charts figure { margin: 0; padding: 12px 14px; }
.bars { display: flex; align-items: end; gap: 2px; height: 110px; }
.bars i { flex: 1; background: var(--mark); min-height: 1px; border-radius: 2px 2px 0 0; }
.axis { display: flex; justify-content: space-between; font-size: 12px; color: var(--soft); }
.rows { display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px 8px;
  font-size: 13px; align-items: center; }
.rows i { display: block; height: 10px; background: var(--mark); border-radius: 2px; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr));
  gap: 16px; }
.samples article { overflow: hidden; }
.samples article:target, li:target { outline: 3px solid var(--mark); }
.strip { display: grid; grid-template-columns: repeat(3, 1fr); gap: 2px; background: #000; }
.strip img { width: 100%; display: block; aspect-ratio: 4 / 3; object-fit: contain; }
.text { padding: 8px 12px 12px; font-size: 14px; } .text h3 { font-size: 14px; margin: 0 0 4px; }
.text h3 a { color: inherit; text-decoration: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 1px 10px; margin: 6px 0 0; }
dd { margin: 0; font-size: 13px; }
.bad { color: var(--bad); }
li { margin: 2px 0; }
"""


@dataclass(frozen=True)
class Sample:
    """One sample as the page shows it.

    Attributes:
        place: (shard, row).
        shard: Name of its tar.
        key: In the tar; None where not even that can be read.
        record: Its metadata; None likewise.
        num_bytes: Of its video.
        frames: JPEGs, or what is wrong with it.
    """

    place: tuple[int, int]
    shard: str
    key: str | None
    record: ClipRecord | None
    num_bytes: int
    frames: list[bytes] | str


def browse_shards(manifest: Manifest, num_samples: int = 48, num_workers: int = 2) -> str:
    """Render a set of shards.

    Args:
        manifest: The set, on this machine.
        num_samples: Samples to show, at even distances over the whole set.
        num_workers: Decoding processes.

    Returns:
        HTML that loads nothing from elsewhere.
    """
    summary = describe(manifest)
    samples = read_samples(manifest, num_samples, num_workers)
    rejects = [reject for n in range(len(manifest.shards)) for reject in _rejects(manifest, n)]
    body = [
        f"<h1>{html.escape(manifest.root)}</h1>",
        _facts(summary, len(rejects)),
        _complaints(samples, rejects),
        f'<h2>How it is spread</h2><div class="charts">{_charts(manifest, summary)}</div>',
        f"<h2>{len(samples)} of {summary['samples']:,} samples</h2>",
        f'<div class="samples">{"".join(map(_card, samples))}</div>',
    ]
    return page(f"Shards in {manifest.root}", "".join(body), _STYLE)


def read_samples(manifest: Manifest, count: int, num_workers: int) -> list[Sample]:
    """Read and decode samples at even distances; a crash of the decoder costs its sample alone."""
    corpus = Corpus((manifest,), (1.0,))
    total = int(corpus.starts[-1])
    rows = sorted({int(r) for r in np.linspace(0, total - 1, min(count, total)).round()})
    shards = np.searchsorted(corpus.starts, rows, side="right") - 1
    places = [(int(s), r - int(corpus.starts[s])) for s, r in zip(shards, rows, strict=True)]
    reader = SampleReader(corpus)
    share = -(-len(places) // max(1, num_workers))
    jobs = [places[start : start + share] for start in range(0, len(places), share)]

    def read(place: tuple[int, int]) -> list[bytes]:
        try:
            frames = decode_frames(reader.read(*place).video, _FRAMES)
        except DamagedSample as error:
            raise ValueError(str(error)) from error
        return [_jpeg(frame) for frame in frames]

    found: dict[tuple[int, int], list[bytes] | str] = {}
    for results in in_children(read, jobs, num_workers, lambda place: Path("{}/{}".format(*place))):
        for place, result in results:
            found[place] = result.reason if isinstance(result, Unreadable) else result
    return [_sample(manifest, place, found[place]) for place in places]


def _sample(manifest: Manifest, place: tuple[int, int], frames: list[bytes] | str) -> Sample:
    number, row = place
    index = manifest.load_index(number)
    try:
        key, record = index.key(row), index.record(row)
    except ValueError as error:
        key, record, frames = None, None, str(error)
    size = int(index.rows[row]["video_bytes"])
    return Sample(place, manifest.shards[number].name, key, record, size, frames)


def _jpeg(frame: np.ndarray) -> bytes:
    image = Image.fromarray(frame)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _rejects(manifest: Manifest, number: int) -> Iterable[tuple[str, str, str]]:
    """(tar, clip, reason) of what is not in a shard."""
    for reject in manifest.load_index(number).rejects:
        yield manifest.shards[number].name, reject["clip_id"], reject["reason"]


def _facts(summary: dict, num_rejects: int) -> str:
    told = {
        "samples": f"{summary['samples']:,}",
        "shards": f"{summary['shards']:,}",
        "videos": f"{summary['videos']:,}",
        "texts": f"{summary['texts']:,}",
        "hours": f"{summary['hours']:,.1f}",
        "GB": f"{summary['bytes'] / 1e9:,.2f}",
        "rejected": f"{num_rejects:,}",
    }
    cells = (f'<div class="card"><b>{v}</b><span>{k}</span></div>' for k, v in told.items())
    return f'<div class="facts">{"".join(cells)}</div>'


def _complaints(samples: Sequence[Sample], rejects: Sequence[tuple[str, str, str]]) -> str:
    """Everything that is wrong, each with an address of its own."""
    damaged = [sample for sample in samples if isinstance(sample.frames, str)]
    items = [
        f'<li><a href="#{_anchor(sample)}">{html.escape(_name(sample))}</a>: '
        f"{html.escape(str(sample.frames))}</li>"
        for sample in damaged
    ]
    reasons = Counter(reason.partition(":")[0] for _, _, reason in rejects)
    parts = ["<h2>What is wrong</h2>"]
    if items:
        parts.append(
            f'<p class="bad">{len(items)} of the {len(samples)} samples looked at cannot be used: '
            f"<code>eva02-at shards verify --repair</code></p><ul>{''.join(items)}</ul>"
        )
    if rejects:
        kinds = ", ".join(f"{n:,} {html.escape(reason)}" for reason, n in reasons.most_common())
        rows = [
            f'<li id="reject-{n}"><a href="#reject-{n}">#</a> {html.escape(clip)} '
            f"({html.escape(tar)}): {html.escape(reason)}</li>"
            for n, (tar, clip, reason) in enumerate(rejects[:_MOST_REJECTS])
        ]
        rest = len(rejects) - _MOST_REJECTS
        more = f"<p>{rest:,} more in rejects.jsonl</p>" if rest > 0 else ""
        parts.append(
            f"<details><summary>{len(rejects):,} clips were rejected at the build: {kinds}"
            f"</summary><ul>{''.join(rows)}</ul>{more}</details>"
        )
    if len(parts) == 1:
        parts.append("<p>Nothing: no clip was rejected, and every sample looked at decodes.</p>")
    return "".join(parts)


def _charts(manifest: Manifest, summary: dict) -> str:
    seconds, sizes = [], []
    for number in range(len(manifest.shards)):
        index = manifest.load_index(number)
        sizes.append(index.rows["video_bytes"] / 1e3)
        records = (index.record(row) for row in range(len(index)))
        seconds += [record.end_s - record.start_s for record in records]
    parts = [
        _histogram("seconds of a clip", np.array(seconds)),
        _histogram("kB of a clip", np.concatenate(sizes)),
    ]
    for name in ("verb_classes", "noun_classes"):
        if summary[name]:
            parts.append(_classes(name.replace("_", " "), summary[name]))
    return "".join(parts)


def _histogram(title: str, values: np.ndarray) -> str:
    """Bars up to the 99th percentile; what is longer is in the last."""
    high = float(np.percentile(values, 99)) or 1.0
    counts, _ = np.histogram(np.minimum(values, high), bins=_BINS, range=(0.0, high))
    bars = "".join(
        f'<i style="height:{100 * n / counts.max():.1f}%" title="{n:,}"></i>' for n in counts
    )
    return (
        f'<figure class="card"><figcaption>{title}</figcaption><div class="bars">{bars}</div>'
        f'<div class="axis"><span>0</span><span>{high:,.1f}+</span></div></figure>'
    )


def _classes(title: str, counts: dict[int, int]) -> str:
    most = list(counts.items())[:_MOST_CLASSES]
    rows = "".join(
        f'<span>{name}</span><i style="width:{100 * n / most[0][1]:.1f}%"></i><span>{n:,}</span>'
        for name, n in most
    )
    rest = f"{len(counts):,}, the most frequent" if len(counts) > len(most) else f"{len(counts):,}"
    return (
        f'<figure class="card"><figcaption>{title}: {rest}</figcaption>'
        f'<div class="rows">{rows}</div></figure>'
    )


def _name(sample: Sample) -> str:
    return sample.record.clip_id if sample.record else f"row {sample.place[1]} of {sample.shard}"


def _anchor(sample: Sample) -> str:
    return "sample-{}-{}".format(*sample.place)


def _card(sample: Sample) -> str:
    anchor, name = _anchor(sample), html.escape(_name(sample))
    if isinstance(sample.frames, str):
        pictures = f'<p class="bad text">{html.escape(sample.frames)}</p>'
    else:
        images = "".join(
            f'<img alt="frame {n + 1} of {_FRAMES}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
            for n, data in enumerate(sample.frames)
        )
        pictures = f'<div class="strip">{images}</div>'
    facts = {"tar": f"{sample.shard}, key {sample.key}", "kB": f"{sample.num_bytes / 1e3:,.0f}"}
    texts = ""
    if sample.record is not None:
        record = sample.record
        texts = "".join(f"<p>{html.escape(text)}</p>" for text in record.texts[:3])
        span = f"{record.start_s:.2f} – {record.end_s:.2f} s ({record.end_s - record.start_s:.2f})"
        facts = {"video": f"{record.video_id}, {span}", **facts}
        if record.verb_classes or record.noun_classes:
            verbs, nouns = (
                " ".join(map(str, c)) for c in (record.verb_classes, record.noun_classes)
            )
            facts["classes"] = f"verbs {verbs or 'none'}, nouns {nouns or 'none'}"
    rows = "".join(f"<dt>{k}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    return (
        f'<article class="card" id="{anchor}">{pictures}<div class="text">'
        f'<h3><a href="#{anchor}">{name}</a></h3>{texts}<dl>{rows}</dl></div></article>'
    )
