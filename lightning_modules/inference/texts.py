"""Features of sentences as files, in the layouts that heads for language queries read.

What is read: a `.txt` with a sentence a line; a `.jsonl` with `query_id` and `query` (GroundNLQ,
OSGNet, CONE); Ego4D's `nlq_*.json`, whose query k of an annotation is called `UID_k` by all three.

What is written, by the output's name:

    FILE.npy     (N, E) pooled, L2-normalised; FILE.json holds ids and sentences
    FILE.pt      id -> tensor: (E,) pooled, or (L, D) per token
    sentence.npy a pickled dict sentence -> tensor, as EgoVLP's run/test_nlq.py leaves for VSLNet:
                 pooled (1, E), or per token without the first and last (L - 2, D)
    FOLDER.lmdb  LMDB, id -> npz of `token_features` (L, D) and `features` (E,): GroundNLQ's and
                 OSGNet's libs/datasets/ego4d_loader.py

Per token: the last hidden states after the final norm, from the start to the end token, as CLIP's
extractors for moment retrieval take them. The sentence is tokenised as CLIP does (lower case).
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.files import write_atomically, write_whole
from lightning_modules.inference.embedding import Embedder

EGOVLP = "sentence.npy"
_SUFFIXES = (".npy", ".pt", ".lmdb")
_BATCH = 256


@dataclass(frozen=True)
class Query:
    """A sentence and what its features are called."""

    id: str
    text: str


def read_queries(path: Path) -> list[Query]:
    """Read sentences.

    Args:
        path: See the module.

    Raises:
        ValueError: It is none of the formats, holds nothing, or names two sentences alike.
    """
    readers = {".txt": _lines, ".jsonl": _rows, ".json": _ego4d}
    if path.suffix not in readers:
        raise ValueError(f"{path} must be one of {', '.join(readers)}")
    try:
        found = list(readers[path.suffix](path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no {path.suffix} of queries ({error!r})") from None
    if not found:
        raise ValueError(f"{path} holds no sentence")
    texts: dict[str, str] = {}
    for query in found:
        if texts.setdefault(query.id, query.text) != query.text:
            raise ValueError(f"{path} has two sentences of the id {query.id!r}")
    return found


def _lines(text: str) -> Iterator[Query]:
    for number, line in enumerate(text.splitlines()):
        if line.strip():
            yield Query(str(number), line.strip())


def _rows(text: str) -> Iterator[Query]:
    for line in text.splitlines():
        if line.strip():
            row = json.loads(line)
            yield Query(str(row["query_id"]), str(row["query"]))


def _ego4d(text: str) -> Iterator[Query]:
    for video in json.loads(text)["videos"]:
        for clip in video["clips"]:
            for annotation in clip["annotations"]:
                for number, query in enumerate(annotation["language_queries"]):
                    if query.get("query"):  # a few of the published ones are empty
                        yield Query(f"{annotation['annotation_uid']}_{number}", query["query"])


def check_text_output(output: Path, per_token: bool) -> None:
    """Refuse an output that cannot be written, before a model is read.

    Raises:
        ValueError: Its kind is unknown, cannot hold tokens, or needs a library that is absent.
    """
    if output.suffix not in _SUFFIXES:
        raise ValueError(f"output {output} must end in {', '.join(_SUFFIXES)}")
    if output.suffix == ".npy" and output.name != EGOVLP and per_token:
        raise ValueError(
            f"{output} holds one row a sentence; with --per-token write FILE.pt, FOLDER.lmdb or "
            f"{EGOVLP}"
        )
    if output.suffix == ".lmdb" and importlib.util.find_spec("lmdb") is None:
        raise ValueError(f"output {output} needs lmdb: pip install 'eva02-at[nlq]'")


def write_text_features(
    embedder: Embedder, queries: Sequence[Query], output: Path, per_token: bool, template: str
) -> str:
    """Embed sentences and write their features.

    Args:
        embedder: With the model.
        queries: The sentences.
        output: Its name says the layout; see the module.
        per_token: Last hidden states instead of one embedding; LMDB holds both always.
        template: What a sentence is put into, `#C C {}` say.

    Returns:
        In words, what lies where.
    """
    texts = [template.replace("{}", query.text) for query in queries]
    pooled = torch.cat(
        [embedder.texts(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
    )
    needs_tokens = per_token or output.suffix == ".lmdb"
    tokens = embedder.tokens(texts, _BATCH) if needs_tokens else []
    if output.suffix == ".lmdb":
        _write_lmdb(output, queries, pooled, tokens)
    elif output.name == EGOVLP:
        rows = [t[1:-1] for t in tokens] if per_token else list(pooled[:, None])
        by_text = {query.text: row for query, row in zip(queries, rows, strict=True)}
        _save(output, lambda file: np.save(file, np.array(by_text, dtype=object)))
    elif output.suffix == ".pt":
        named = dict(zip((q.id for q in queries), tokens if per_token else pooled, strict=True))
        named = {name: row.clone() for name, row in named.items()}
        _save(output, lambda file: torch.save(named, file))
    else:
        _save(output, lambda file: np.save(file, pooled.numpy()))
        about = {"ids": [q.id for q in queries], "texts": [q.text for q in queries]}
        write_atomically(output.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    width = tokens[0].shape[1] if per_token else pooled.shape[1]
    kind = "per token" if per_token else "pooled"
    return f"features of {len(queries)} sentences ({kind}, {width}) in {output}"


def _save(path: Path, write: Any) -> None:
    def whole(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(file)

    write_whole(path, whole)


def _write_lmdb(
    folder: Path, queries: Sequence[Query], pooled: Tensor, tokens: Sequence[Tensor]
) -> None:
    import lmdb

    folder.mkdir(parents=True, exist_ok=True)
    size = sum(t.numel() for t in (*tokens, pooled)) * 4
    with (
        lmdb.open(str(folder), map_size=4 * size + 2**24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for query, row, states in zip(queries, pooled, tokens, strict=True):
            with io.BytesIO() as buffer:
                np.savez(buffer, token_features=states.numpy(), features=row.numpy())
                transaction.put(query.id.encode(), buffer.getvalue())
