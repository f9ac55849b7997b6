"""LaViLa's pickles: narrations of Ego4D, rephrased and generated ones (EgoClip+).

A pickle from elsewhere can run any code when it is loaded. These files hold lists, tuples, strings
and numbers alone, so they are read by an unpickler that admits nothing else.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.annotations.rows import Rejects, records_of_rows
from datamodules.manifest import ClipRecord


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    """What pickles written by Python 3 in protocol 2 call for bytes; other codecs are refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not admitted")
    return text.encode("latin1")


def _number_scalar(dtype: np.dtype, data: bytes) -> Any:
    """Rebuild a numpy number; object arrays could carry anything."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or not isinstance(data, bytes):
        raise pickle.UnpicklingError("numpy scalars other than numbers are not admitted")
    return np.frombuffer(data, dtype=dtype, count=1)[0].item()


_ADMITTED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _latin1_bytes,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "scalar"): _number_scalar,
    ("numpy._core.multiarray", "scalar"): _number_scalar,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Admits Python's plain types and numpy's numbers; any other name in the file is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an admitted constructor."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}; only plain values and numpy numbers are admitted"
            )
        return _ADMITTED[module, name]


def read_lavila(path: str | Path, rejects: Rejects | None = None) -> list[ClipRecord]:
    """Read `ego4d_train.pkl`, or the rephrased (rephraser) or generated (narrator) narrations.

    Each is a list of (video uid, start s, end s, text or texts[, likelihoods]). A clip's id is its
    row number; starts are clamped to 0; likelihoods and empty texts are left out.

    Args:
        path: The file.
        rejects: Takes the rows that cannot be used; without it the first one refuses the file.

    Raises:
        ValueError: The file is missing, no such pickle, or holds what is not admitted.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            rows = RestrictedUnpickler(file).load()
    except FileNotFoundError as error:
        raise ValueError(f"annotation file {path} does not exist") from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise ValueError(f"{path} cannot be read as a LaViLa pickle: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no list of rows but {type(rows).__name__}")
    return records_of_rows(path, enumerate(rows, start=1), _record, rejects)


def _record(number: int, row: Any) -> tuple[ClipRecord]:
    try:
        uid, start_s, end_s, texts = row[:4]
        texts = (texts,) if isinstance(texts, str) else tuple(texts)
        kept = tuple(text.strip() for text in texts if text.strip())
        start_s, end_s = float(start_s), float(end_s)
        uid = sys.intern(uid)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"{row!r:.200} is not (uid, start, end, texts): {error}") from error
    start_s = 0.0 if start_s < 0 else start_s  # max() would make 0 of what is not a number
    return (ClipRecord(str(number - 1), uid, start_s, end_s, kept),)
