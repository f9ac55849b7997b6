"""The zip that the EK-100 multi-instance retrieval challenge takes: write, validate, read back.

One `test.pkl` within a zip: a dict with `version`, `challenge`, `sim_mat` (clips x sentences,
float32 in [0, 1]), `vis_ids`, `txt_ids` and the supervision levels `sls_pt`, `sls_tl`, `sls_td`.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MEMBER = "test.pkl"
VERSION, CHALLENGE = "0.1", "multi_instance_retrieval"
LEVELS = ("sls_pt", "sls_tl", "sls_td")
# What a dict of strings, integers and numpy arrays needs; anything else could run code.
_ALLOWED = {
    (module, name)
    for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("ndarray", "dtype", "_reconstruct", "scalar")
} | {("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")}


@dataclass(frozen=True)
class Levels:
    """Supervision levels that a submission declares; -1 says unknown.

    Attributes:
        sls_pt: Of pretraining.
        sls_tl: Of the training labels.
        sls_td: Of the training data.
    """

    sls_pt: int = -1
    sls_tl: int = -1
    sls_td: int = -1


def write_submission(
    path: Path,
    similarity: Tensor,
    vis_ids: Sequence[str],
    txt_ids: Sequence[str],
    levels: Levels | None = None,
) -> None:
    """Write a submission, and read it back before it gets its name.

    Args:
        path: The zip.
        similarity: (clips, sentences) cosine similarities, in [-1, 1]; written as (cos + 1) / 2.
        vis_ids: narration_id of each clip, in the order of the clip file.
        txt_ids: narration_id of each sentence, in the order of the sentence file.
        levels: What to declare.

    Raises:
        ValueError: The matrix does not fit the ids, or holds something else than cosines.
    """
    cosines = similarity.detach().cpu().float().numpy()
    if not (np.isfinite(cosines).all() and np.abs(cosines).max() <= 1 + 1e-5):
        raise ValueError(
            "the similarities are not cosines in [-1, 1], which the challenge's (cos + 1) / 2 "
            "needs; give embeddings' plain cosine similarities (no logits, no dual softmax)"
        )
    levels = levels or Levels()
    content = {
        "version": VERSION,
        "challenge": CHALLENGE,
        "sim_mat": np.clip((cosines + 1) / 2, 0, 1),
        "vis_ids": list(vis_ids),
        "txt_ids": list(txt_ids),
        **{name: getattr(levels, name) for name in LEVELS},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, pickle.dumps(content, protocol=4))
    try:
        read_submission(temporary, vis_ids, txt_ids)
    except ValueError:
        temporary.unlink()
        raise
    temporary.replace(path)


def read_submission(
    path: Path, vis_ids: Sequence[str] | None = None, txt_ids: Sequence[str] | None = None
) -> dict[str, Any]:
    """Read and validate a submission, without running code that its pickle may carry.

    Args:
        path: The zip.
        vis_ids: The clips that it must have, in order; any by default.
        txt_ids: The sentences that it must have, in order; any by default.

    Returns:
        The dict.

    Raises:
        ValueError: It is no zip with one `test.pkl`, unsafe to read, or breaks the specification;
            the message says what.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if names != [MEMBER]:
                raise ValueError(f"{path} holds {names}; it must hold {MEMBER} alone")
            content = _SafeUnpickler(io.BytesIO(archive.read(MEMBER))).load()
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is no readable submission: {error}") from error
    expected = {"version", "challenge", "sim_mat", "vis_ids", "txt_ids", *LEVELS}
    if not isinstance(content, dict) or set(content) != expected:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {found}; it must be a dict of {sorted(expected)}")
    for problem in _problems(content, vis_ids, txt_ids):
        raise ValueError(f"{path}: {problem}")
    return content


def _problems(
    content: dict[str, Any], vis_ids: Sequence[str] | None, txt_ids: Sequence[str] | None
) -> list[str]:
    """What breaks the specification."""
    problems = []
    for name, value in (("version", VERSION), ("challenge", CHALLENGE)):
        if content[name] != value:
            problems.append(f"{name} is {content[name]!r}; it must be {value!r}")
    for name, ids in (("vis_ids", vis_ids), ("txt_ids", txt_ids)):
        if ids is not None and list(content[name]) != list(ids):
            problems.append(f"{name} are not those of the annotations, in their order")
    for name in LEVELS:
        if type(content[name]) is not int or content[name] < -1:
            problems.append(f"{name} is {content[name]!r}; it must be an integer, -1 for unknown")
    shape = (len(content["vis_ids"]), len(content["txt_ids"]))
    problems += _matrix_problems(content["sim_mat"], shape)
    return problems


def _matrix_problems(matrix: NDArray[Any], shape: tuple[int, int]) -> list[str]:
    if not isinstance(matrix, np.ndarray) or matrix.dtype != np.float32 or matrix.shape != shape:
        found = f"{getattr(matrix, 'dtype', type(matrix).__name__)} {np.shape(matrix)}"
        return [f"sim_mat is {found}; it must be float32 {shape}, as many as the ids"]
    if not (matrix.min() >= 0 and matrix.max() <= 1):  # false for NaN, too
        return [f"sim_mat lies in [{matrix.min()}, {matrix.max()}]; it must lie in [0, 1]"]
    return []


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Admit numpy's array constructors only."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed")
        return super().find_class(module, name)
