"""A run's logs on a disk that fills up, and comes back: nothing of a run ends for them."""

import csv
import errno
import logging

import pytest
from small_disks import mounted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.training.monitor import tensorboard_log
from lightning_modules.training.monitor.csv_log import AppendingCSVLogger
from lightning_modules.training.monitor.tensorboard_log import TolerantTensorBoardLogger


@pytest.fixture
def disk(tmp_path):
    """A file system of 64 KiB."""
    with mounted(tmp_path / "disk", 64) as folder:
        yield folder


def fill(folder) -> None:
    with pytest.raises(OSError, match="No space"), (folder / "filler").open("wb", 0) as file:
        while True:
            file.write(bytes(4096))


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("new_column", [False, True])
def test_the_csv_misses_nothing_of_a_full_disk(disk, caplog, new_column):
    """One warning when it fills, one word when there is room; rows are cut off in the middle."""
    logger = AppendingCSVLogger(str(disk))
    expected = []

    def log(step: int) -> None:
        row = {f"metric/{k}": step + k / 7 for k in range(60)}
        if new_column and step >= 4:
            row["val/new"] = float(step)
        logger.log_metrics(row, step)
        expected.append({"step": str(step), **{k: repr(v) for k, v in row.items()}})

    for step in range(3):
        log(step)
    fill(disk)
    for step in range(3, 12):
        log(step)
    (disk / "filler").unlink()
    for step in range(12, 14):
        log(step)
    written = [{k: v for k, v in row.items() if v} for row in rows(disk / "metrics.csv")]
    assert written == expected
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 2
    assert "No space left" in told[0] and "is written again" in told[1]


def test_a_resumed_csv_drops_its_rows_once_the_disk_is_back(disk, monkeypatch):
    logger = AppendingCSVLogger(str(disk))
    for step in range(4):
        logger.log_metrics({"loss": float(step)}, step)
    again = AppendingCSVLogger(str(disk))
    real = again._write

    def read_only(*args):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(again, "_write", read_only)
    again.resume_at(2)
    again.log_metrics({"loss": 20.0}, 2)
    monkeypatch.setattr(again, "_write", real)
    again.log_metrics({"loss": 30.0}, 3)
    assert [row["loss"] for row in rows(disk / "metrics.csv")] == ["0.0", "1.0", "20.0", "30.0"]


def test_tensorboards_log_leaves_off_and_comes_back(disk, caplog, monkeypatch, capfd):
    monkeypatch.setattr(tensorboard_log, "_PAUSE_S", 0.0)
    logger = TolerantTensorBoardLogger(str(disk), name="", version="logs", flush_secs=0)
    logger.log_metrics({"loss": 0.5}, 0)
    logger.save()
    fill(disk)
    for step in range(1, 400):
        logger.log_metrics({"loss": 0.5, "a/long/name/of/a/metric": 1.0}, step)
        logger.save()
    (disk / "filler").unlink()
    for step in range(400, 402):
        logger.log_metrics({"loss": 0.5}, step)
        logger.save()
    logger.finalize("success")
    told = [r.getMessage() for r in caplog.records if "TensorBoard" in r.getMessage()]
    assert len(told) == 2 and "not written for now" in told[0] and "again" in told[1]
    assert "Traceback" not in capfd.readouterr().err
    events = EventAccumulator(str(disk / "logs"))
    events.Reload()
    found = [event.step for event in events.Scalars("loss")]
    assert found[0] == 0 and found[-1] == 401


def test_tensorboard_begins_with_its_first_point(tmp_path):
    """Lightning saves its loggers before the first step: nothing is there yet to be saved."""
    logger = TolerantTensorBoardLogger(str(tmp_path / "run"), name="", version="logs")
    logger.save()
    assert not (tmp_path / "run").exists()
    logger.log_metrics({"loss": 0.5}, 3)
    logger.save()
    points = EventAccumulator(logger.log_dir).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in points] == [(3, 0.5)]
