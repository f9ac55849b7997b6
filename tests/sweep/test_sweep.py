"""A sweep on this machine: what exists is not run again, what fails is named and alone."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweep_runs import results, write_checkpoint, write_program

from lightning_modules.cli.main import main
from lightning_modules.sweep.cells import SweepFiles
from lightning_modules.sweep.discovery import find_checkpoints
from lightning_modules.sweep.plan import Plan, parse_benchmarks


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVA02_AT", str(write_program(tmp_path)))


def conversions(sweep: Path) -> list[str]:
    return (sweep / "weights" / "conversions.txt").read_text().splitlines()


def rows(sweep: Path) -> list[dict]:
    with (sweep / "table.csv").open() as file:
        return list(csv.DictReader(file))


def sweep(*words: str) -> int:
    return main(["sweep", "--output", "out", *words])


def test_checkpoints_times_benchmarks_end_in_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20):
        write_checkpoint(Path("runs/a"), step, "x" * step)
    write_checkpoint(Path("runs/b"), 10, "b")
    words = ["--checkpoints", "runs/*", "--benchmark", "mir --data d", "--benchmark", "mcq"]
    assert sweep(*words, "--jobs", "2") == 0
    assert len(results(Path("out"))) == 6
    assert len(conversions(Path("out"))) == 3  # once for both benchmarks
    text = Path("out/table.md").read_text()
    assert text.splitlines()[0].count("map.avg") == 2
    assert text.splitlines()[0].count("num_missing_clips") == 2
    assert [line.split(" | ")[:2] for line in text.splitlines()[2:5]] == [
        ["| runs/a", "10"],
        ["| runs/a", "20"],
        ["| runs/b", "10"],
    ]
    assert "mir --data d" not in text  # no need: only one benchmark has that name
    values = {(r["run"], r["step"], r["benchmark"], r["metric"]): r for r in rows(Path("out"))}
    assert float(values["runs/a", "20", "mcq", "num_queries"]["value"]) == 20
    row = values["runs/b", "10", "mir", "map.v2t"]
    assert float(row["low"]) < float(row["value"]) < float(row["high"])
    page = Path("out/table.html").read_text()
    assert "<svg" in page and "http" not in page and "<script" not in page
    assert "6 of 6 cells" in page
    # again: nothing is run
    capsys.readouterr()
    assert sweep(*words) == 0
    assert "6 cells, 0 to run" in capsys.readouterr().out
    assert len(conversions(Path("out"))) == 3


def test_results_are_known_by_content_not_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.pt").write_text("same")
    Path("two.pt").write_text("other")
    assert sweep("--checkpoints", "*.pt", "--benchmark", "mir") == 0
    Path("one.pt").rename("moved.pt")
    capsys.readouterr()
    assert sweep("--checkpoints", "moved.pt", "--benchmark", "mir") == 0
    assert "2 cells, 0 to run" in capsys.readouterr().out
    # other contents, other options of evaluate, another way to read: each a cell of its own
    Path("two.pt").write_text("changed")
    for words, count in [
        (["two.pt", "--benchmark", "mir"], "3 cells, 1 to run"),
        (["two.pt", "--benchmark", "mir --frames 8"], "4 cells, 1 to run"),
        (["two.pt", "--benchmark", "mir", "--average"], "5 cells, 1 to run"),
    ]:
        assert sweep("--checkpoints", *words) == 0
        assert count in capsys.readouterr().out


def test_failures_are_alone_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        write_checkpoint(Path("run"), step, "x" * step)
    Path("run/checkpoints/step-00000002/state").write_text("cut")
    Path("broken.pt").write_text("damaged")
    words = ["--checkpoints", "run", "broken.pt", "--benchmark", "mir", "--benchmark", "mcq --fail"]
    assert sweep(*words) == 1
    told = capsys.readouterr()
    assert "damaged: run/checkpoints/step-00000002" in told.err
    assert len(results(Path("out"))) == 2
    text = Path("out/table.md").read_text()
    assert "state has 3 bytes, not 2" in text
    assert "run @ 1, mcq: evaluate: no such data (exit code 2)" in text
    assert "broken.pt, mir: convert: checkpoint" in text and "cannot be read" in text
    # failed ones are left until asked for
    assert sweep(*words) == 1
    assert "6 cells, 0 to run" in capsys.readouterr().out
    Path("broken.pt").write_text("repaired")
    assert sweep("--checkpoints", "run", "--benchmark", "mir", "--retry-failed") == 1
    assert "6 cells, 4 to run" in capsys.readouterr().out


def test_a_killed_cell_is_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        Path(f"{name}.pt").write_text(name)
    assert sweep("--checkpoints", "*.pt", "--benchmark", "mir --crash-at b", "--rounds", "1") == 1
    assert "evaluate: it said nothing (killed by SIGKILL)" in Path("out/table.md").read_text()
    assert len(results(Path("out"))) == 2
    assert sweep("--checkpoints", "*.pt", "--benchmark", "mir --crash-at b") == 0
    assert "3 cells, 1 to run" in capsys.readouterr().out
    assert len(results(Path("out"))) == 3
    # within one call
    Path("out/weights").rename("gone")
    for path in Path("out/results").glob("*.json"):
        path.unlink()
    assert sweep("--checkpoints", "*.pt", "--benchmark", "mir --crash-at b") == 0


def test_a_sweep_killed_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    for n in range(4):
        Path(f"{n}.pt").write_text(str(n))
    words = ["sweep", "--output", "out", "--checkpoints", *(f"{n}.pt" for n in range(4))]
    words += ["--benchmark", "mir --sleep 0.5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_modules.cli.main", *words], start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out/results/[!.]*"))) < 1:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/results/[!.]*")}
    assert 1 <= len(done) < 4
    assert main(words) == 0
    assert len(results(Path("out"))) == 4
    for name, written in done.items():
        assert Path("out/results", name).stat().st_mtime_ns == written


def test_options_make_columns_of_their_own() -> None:
    Path("a.pt").write_text("a")
    words = ["--checkpoints", "a.pt", "--benchmark", "mir --data d", "--options=--flip"]
    assert sweep(*words, "--options=--frames 8") == 0
    head = Path("out/table.md").read_text().splitlines()[0]
    assert "mir --flip<br>map.v2t" in head and "mir --frames 8<br>map.v2t" in head


def test_watching_a_run_evaluates_what_it_writes_before_it_is_removed() -> None:
    words = [sys.executable, "-m", "lightning_modules.cli.main", "sweep", "--output", "out"]
    words += ["--checkpoints", "run", "--benchmark", "mir", "--benchmark", "mcq"]
    words += ["--watch", "--every-s", "0.1", "--until-step", "3"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        for step in (1, 2, 3):
            folder = write_checkpoint(Path("run"), step, "x" * step)
            deadline = time.monotonic() + 60
            while len(list(Path("out/results").glob("[!.]*"))) < 2 * step:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            for path in folder.iterdir():  # training keeps the newest only
                path.unlink()
            folder.rmdir()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()
    assert Path("out/table.md").read_text().count("\n| run | ") == 3


def test_job_arrays_find_their_cells(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.pt").write_text("a")
    assert sweep("--checkpoints", "a.pt", "--benchmark", "mir") == 0
    files = SweepFiles("out")
    (cell,) = Plan.load(files.directory).cells
    (Path("out/results") / f"{cell.key}.json").unlink()
    assert main(["sweep", "cell", "out", cell.key]) == 0
    assert files.result(cell)["result"]["benchmark"] == "mir"
    written = (Path("out/results") / f"{cell.key}.json").stat().st_mtime_ns
    assert main(["sweep", "cell", "out", cell.key]) == 0  # a requeued task has nothing to do
    assert (Path("out/results") / f"{cell.key}.json").stat().st_mtime_ns == written
    assert main(["sweep", "cell", "out", "nothing"]) == 2
    assert "no cell 'nothing'" in capsys.readouterr().err
    assert main(["sweep", "table", "out"]) == 0
    assert main(["sweep", "table", "."]) == 2


def test_a_cell_near_its_time_limit_ends_with_the_reason() -> None:
    Path("a.pt").write_text("a")
    assert sweep("--checkpoints", "a.pt", "--benchmark", "mir --fail --sleep 0") == 1
    Path("out/plan.json").write_text(
        Path("out/plan.json").read_text().replace('"--sleep",\n    "0"', '"--sleep",\n    "30"')
    )
    files = SweepFiles("out")
    (cell,) = Plan.load(files.directory).cells
    assert "30" in cell.benchmark
    words = [sys.executable, "-m", "lightning_modules.cli.main", "sweep", "cell", "out", cell.key]
    process = subprocess.Popen(words)
    deadline = time.monotonic() + 30
    while files.log(cell).read_text().count("$ eva02-at evaluate") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 2
    assert "time limit" in files.failure(cell)["reason"] and not files.failure(cell)["killed"]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.pt").write_text("a")
    for words, message in [
        (["--checkpoints", "nothing*", "--benchmark", "mir"], "no checkpoint matches 'nothing*'"),
        (["--checkpoints", "a.pt", "--benchmark=--flip"], "must begin with a benchmark's name"),
        (["--checkpoints", "a.pt", "--benchmark", "mir", "--jobs", "0"], "jobs is 0"),
        (["--checkpoints", "a.pt", "--benchmark", "mir", "--throttle", "0"], "at least 1"),
        (["--checkpoints", "a.pt"], "--benchmark"),
    ]:
        assert sweep(*words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_checkpoints_are_found_by_run_folder_file_and_glob() -> None:
    write_checkpoint(Path("runs/a"), 5, "a")
    write_checkpoint(Path("runs/b"), 7, "b")
    Path("epoch=1-step=30.ckpt").write_text("c")
    patterns = ["runs/*", "runs/a/checkpoints/step-00000005", "*.ckpt"]
    sources, damaged = find_checkpoints(patterns)
    assert [source.path.name for source in sources] == [
        "step-00000005",
        "step-00000007",
        "epoch=1-step=30.ckpt",
    ]
    assert damaged == {}
    assert find_checkpoints(["later"], may_be_missing=True) == ([], {})


def test_benchmarks_are_split_like_a_shell_does() -> None:
    assert parse_benchmarks(["mir --data 'a b'"], []) == [("mir", "--data", "a b")]
    assert parse_benchmarks(["mir", "mcq"], ["", "--flip"]) == [
        ("mir",),
        ("mir", "--flip"),
        ("mcq",),
        ("mcq", "--flip"),
    ]
