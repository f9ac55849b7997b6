"""Ranks for the tests: a process that has imported everything forks them within milliseconds.

Importing Lightning and DeepSpeed takes seconds; a real run of several ranks is started dozens of
times here. The zygote imports once, never computes, and forks each rank, which then starts its
own process group and runs `tiny_run.main(**kwargs)`, or `eva02-at ARGV` where argv is given.
Protocol: one JSON line in ({world, kwargs, log}), one of pids out; later the pids in, and the exit
codes out when all have ended. Several runs may be alive at once.
"""

import ctypes
import importlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
# what a rank would import otherwise, which takes seconds: all of DeepSpeed, with Inductor
SLOW_IMPORTS = (
    "tiny_run",
    "lightning_modules.cli.train",
    "deepspeed.checkpoint.ds_to_universal",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Run:
    """A run in progress: pids of its ranks, and their exit codes once `wait` returns."""

    zygote: "Zygote"
    pids: list[int]
    log: Path
    codes: list[int] = field(default_factory=list)

    def wait(self) -> list[int]:
        self.codes = self.zygote.ask(self.pids)
        return self.codes

    def ended(self) -> bool:
        """Whether some rank is there no more; it is not waited for."""
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in self.pids]
        return any(stat.rpartition(")")[2].split()[0] in "ZX" for stat in stats)

    def text(self) -> str:
        return self.log.read_text()


class Zygote:
    """Starts runs."""

    def __init__(self, **more: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, log: Path, world: int = 1, **kwargs) -> Run:
        return Run(self, self.ask({"world": world, "kwargs": kwargs, "log": str(log)}), log)

    def ask(self, order: dict | list[int]) -> list[int]:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # a loaded machine; it has no children left to leave
            self.process.kill()
            self.process.wait()


def _be_a_rank(order: dict, rank: int, port: int) -> None:
    world = order["world"]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if world > 1:
        os.environ["TORCHELASTIC_RUN_ID"] = "test"  # how Lightning knows that ranks are given
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "argv" in order["kwargs"]:
        from lightning_modules.cli.main import main

        os.environ.update(order["kwargs"].get("environment", {}))
        sys.exit(main(order["kwargs"]["argv"]))
    import tiny_run

    fault = order["kwargs"].pop("fault", None)
    if fault is not None:
        if fault.pop("rank", rank) != rank:
            fault["n"] = 10**9  # another's: this one has none
        sys.exit(_with_a_failing_call(tiny_run.main, order["kwargs"], **fault))
    sys.exit(tiny_run.main(**order["kwargs"]))


def _with_a_failing_call(main, kwargs, under, call, n, error=5, times=1) -> int:
    """Run with failing_calls.c armed, and end as the command line does."""
    from lightning_modules.cli.endings import exit_code, report

    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.fault_arm(under.encode(), b".jsonl", call.encode(), n, error, times)
    try:
        code = main(**kwargs)
    except Exception as caught:
        code = exit_code(caught, ["fit"])
        if code == 1:
            raise
        report(caught, code)
    hit = "hit" if shim.fault_hits() else "not hit"
    print(f"fault: {hit}, calls {shim.fault_calls()}", flush=True)
    return code


def _serve() -> None:
    sys.path.insert(0, str(HERE))
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order, list):
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in order]
            print(json.dumps(codes), file=answers, flush=True)
            continue
        port, pids = free_port(), []
        for rank in range(order["world"]):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    _be_a_rank(order, rank, port)
                except SystemExit as leave:
                    code = leave.code or 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
