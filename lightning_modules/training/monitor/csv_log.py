"""A CSV of a run's metrics that a requeued job goes on with (Lightning's deletes the old one)."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)

_MOST_PENDING = 100_000  # rows in memory while the disk is away


class AppendingCSVLogger(Logger):
    """Write `metrics.csv`: one row for each call, columns `step`, then metrics as they come up.

    Rows that a resumed run will write again are dropped at `resume_at`. While the file cannot be
    written (a full disk) rows are kept in memory, with one warning, and follow as soon as it can.

    Args:
        save_dir: Folder of the file; made if it is missing.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._last: list[dict[str, str]] = []  # rows of the last step before the resumed one
        self._pending: list[dict[str, str]] = []
        self._resumed_at: int | None = None  # rows from here on are still to be dropped
        self._away = False  # the file cannot be written

    @property
    def name(self) -> str:
        """Part of Lightning's directory scheme, which is not used."""
        return ""

    @property
    def version(self) -> str:
        """Part of Lightning's directory scheme, which is not used."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved recipe is saved elsewhere."""

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Drop the rows of `step` and later: those steps are done again from the checkpoint."""
        self._resumed_at = step
        self._write_what_is_due()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        self._pending.append({"step": str(step), **{k: repr(float(v)) for k, v in metrics.items()}})
        self._write_what_is_due()

    def _write_what_is_due(self) -> None:
        try:
            if self._resumed_at is not None:
                self._drop(self._resumed_at)
                self._resumed_at = None
            self._append([row for row in self._pending if row not in self._last])
        except OSError as error:
            if not self._away:
                log.warning("%s is not written for now: %s", self.path, error)
            self._away = True
            del self._pending[:-_MOST_PENDING]
        else:
            if self._away:
                log.warning("%s is written again", self.path)
            self._away = False
            self._pending = []

    def _drop(self, step: int) -> None:
        rows = [row for row in self._read() if _step(row) < step]
        # a validation that a checkpoint has as due is done again after its step: log it once
        self._last = [row for row in rows if _step(row) == step - 1]
        if self._columns:
            self._write(rows, self._columns)

    def _append(self, rows: list[dict[str, str]]) -> None:
        """Append rows, or nothing at all."""
        if not rows:
            return
        names = dict.fromkeys(name for row in rows for name in row if name not in self._columns)
        if names or not self.path.exists():
            columns = [*self._columns, *names]
            self._write(self._read(), columns)
            self._columns = columns
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns, restval="").writerows(rows)
        except OSError:
            os.truncate(self.path, size)  # a row that was cut off would swallow the next one
            raise

    def _read(self) -> list[dict[str, str]]:
        """Read the file as it is, without the cells that are empty."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [{k: v for k, v in row.items() if k and v} for row in reader]
            self._columns = list(reader.fieldnames or [])
        return [row for row in rows if row.get("step", "").isdigit()]  # not one cut off

    def _write(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)


def _step(row: dict[str, str]) -> int:
    return int(row["step"])
