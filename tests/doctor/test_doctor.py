"""The doctor's checks: what it calls bad, with the real fault where one can be had here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import numerics
from lightning_modules.cli.doctor import main
from lightning_modules.doctor import machine, packages, rates
from lightning_modules.doctor.finding import Finding, merge, run_check, screen, verdict

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "lightning_modules.cli.main", "doctor", "--quick"]


def run(words: list[str], folder: Path) -> tuple[int, str, dict]:
    file = folder / "doctor.json"
    done = subprocess.run(
        [*words, "--folder", str(folder), "--json", str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )
    told = json.loads(file.read_text()) if file.exists() else {}
    return done.returncode, done.stdout + done.stderr, told


def states(told: dict) -> dict[str, str]:
    return {f["name"]: f["state"] for f in told["findings"]}


def test_a_fault_is_told_with_its_mend_and_so_is_what_was_not_checked(tmp_path: Path) -> None:
    """A real one: too few open files."""
    words = ["bash", "-c", 'ulimit -n 512; exec "$@"', "bash", *PROGRAM]
    code, out, told = run(words, tmp_path)
    known = states(told)
    assert code == told["exit_code"] == 1 and known["open files"] == "bad", out
    assert "BAD   open files" in out and "mend: `ulimit -n 512`" in out
    assert "1 thing stands in the way" in out
    assert {known[name] for name in ("torch", "cores", "disk", "decoder", "all-reduce")} == {"ok"}
    if not torch.cuda.is_available():
        assert "not checked here: driver, InfiniBand, Triton" in out
        assert known["NCCL"] == "skipped" and told["cluster"] == {}


@pytest.mark.distributed
def test_two_ranks_speak_once(tmp_path: Path) -> None:
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    code, out, told = run([*ranks, "-m", *PROGRAM[2:]], tmp_path)
    assert code == 0, out
    assert out.count("eva02-at doctor on") == 1 and "ranks: 2" in out
    said = {f["name"]: f["text"] for f in told["findings"]}
    assert said["all-reduce"].endswith("by gloo, 2 ranks on 1 nodes")
    assert said["shared folder"] == f"all nodes see {tmp_path}"


def test_a_folder_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no directory"):
        main(["--folder", str(tmp_path / "nowhere")])


def test_nodes_that_agree_speak_as_one_and_those_that_differ_by_name() -> None:
    same, fast, slow = (Finding("disk", "ok", text) for text in ("same", "fast", "slow"))
    assert merge({"a": [same], "b": [same]}) == [same]
    assert [f.text for f in merge({"a": [fast], "b": [slow]})] == ["a: fast", "b: slow"]
    versions = {"a": [Finding("torch", "ok", "2.13")], "b": [Finding("torch", "ok", "2.10")]}
    assert [f.state for f in merge(versions)] == ["ok", "ok", "bad"]
    assert verdict(merge(versions)) == 1
    assert "the nodes differ" in screen("title", merge(versions))


def test_a_check_that_fails_itself_ends_nothing() -> None:
    def check():
        yield Finding("thing", "ok", "first")
        raise OSError("no such device")

    kept, finding = run_check("thing", check)
    assert kept.text == "first" and finding.state == "skipped"
    assert finding.text.endswith("OSError: no such device")


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # binary code runs within its major version
        ((7, 0), ["sm_75", "sm_80"], False),  # a V100 and CUDA 13
        ((12, 0), ["sm_80", "sm_90a"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((10, 3), ["sm_100", "sm_120"], True),
    ],
)
def test_a_torch_without_kernels_for_a_gpu(capability, architectures, expected) -> None:
    assert machine._has_kernels(*capability, architectures) == expected


@pytest.mark.parametrize(
    ("version", "cuda", "state", "words"),
    [
        (None, None, "skipped", "no NVIDIA driver"),
        ("580.65", None, "bad", "is a CPU build"),
        ("550.54", "13.0", "bad", "too old for CUDA 13.0, which needs 580"),
        ("550.54", "12.8", "bad", "torch sees no GPU"),
        ("580.65", "13.0", "bad", "torch sees no GPU"),
    ],
)
def test_a_driver_that_does_not_fit(version, cuda, state, words, monkeypatch) -> None:
    monkeypatch.setattr(machine, "_driver_version", lambda: version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = machine.driver()
    assert finding.state == state and words in finding.text
    assert bool(finding.mend) == (state == "bad")


def test_links_of_a_topology() -> None:
    rows = ("GPU0 X NV18 SYS PIX 0-31", "GPU1 NV18 X SYS SYS 0-31", "GPU2 SYS SYS X SYS 0-31")
    told = "\n".join((" GPU0 GPU1 GPU2 NIC0 Affinity", *rows, "NIC0 PIX SYS SYS X"))
    assert machine._links(told) == "1 x NV18, 2 x SYS"


def test_few_cores_for_many_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    (finding,) = machine.cores(1)
    assert finding.state == "bad" and "SRUN_CPUS_PER_TASK" in finding.mend
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert next(iter(machine.cores(1))).state == "ok"


def test_a_kernel_that_is_off_is_bad(monkeypatch) -> None:
    monkeypatch.setattr(numerics, "GRID", (2, 2))
    monkeypatch.setattr(numerics, "GATED_CHANNELS", 64)
    assert [f.state for f in packages.parity("cpu")] == ["ok"]
    attend = numerics.st_rope_attention_packed

    def wrong(x, *args, backend, **kwargs):
        return attend(x, *args, backend=backend, **kwargs) * (1.1 if backend == "sdpa" else 1.0)

    monkeypatch.setattr(numerics, "st_rope_attention_packed", wrong)
    found = list(packages.parity("cpu"))
    assert {f.state for f in found} == {"bad"} and all("sdpa" in f.text for f in found)


def test_rates_are_measured_and_compared() -> None:
    (decoding,) = rates.decoding()
    (step,) = rates.training_step("eva02_at_tiny", torch.device("cpu"))
    assert decoding.figures["decode_clips_per_s"] > 1 and step.figures["pairs_per_s"] > 0

    def verdict_of(cores: float) -> str:
        figures = {"pairs_per_s": 760.0, "decode_clips_per_s": 90.0, "cores_per_gpu": cores}
        (finding,) = rates.feeding([Finding("x", "ok", "", figures=figures)])
        return finding.state

    assert [verdict_of(cores) for cores in (4, 8, 12)] == ["bad", "note", "ok"]
    assert next(iter(rates.feeding([decoding]))).state == "skipped"
