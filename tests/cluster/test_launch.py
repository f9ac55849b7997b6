"""How the ranks of a SLURM step find each other, and what those say who do not."""

import multiprocessing
import os
import re
import socket
import threading
import time
from contextlib import suppress

import pytest

from lightning_modules.cli.main import main
from lightning_modules.training.run import launch

STEP = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_JOB_NAME": "run",
}


def take_part(environment, answers) -> None:
    """One rank: meet the others, start torch's group as Lightning does, and sum the ranks."""
    import torch
    import torch.distributed as dist

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    step, rank = environment["SLURM_STEP_ID"], int(environment["SLURM_PROCID"])
    try:
        launch.meet()
        dist.init_process_group("gloo", rank=rank, world_size=2)
        total = torch.tensor([10 ** int(step)])
        dist.all_reduce(total)
        answers.put((step, rank, int(total), os.environ["MASTER_PORT"]))
        dist.barrier()
        time.sleep(0.5)  # rank 0 keeps the store
        dist.destroy_process_group()
    except OSError as error:
        answers.put((step, rank, type(error).__name__, str(error)))


def meet(*tasks: dict[str, str]) -> list[tuple]:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=take_part, args=({**STEP, **t}, answers)) for t in tasks]
    for process in ranks:
        process.start()
    found = sorted(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    return found


def step(number: int, **more: str) -> list[dict[str, str]]:
    return [{"SLURM_STEP_ID": str(number), "SLURM_PROCID": str(r), **more} for r in (0, 1)]


@pytest.mark.distributed
def test_two_steps_of_one_job_keep_to_themselves():
    (_, _, a, port_a), (_, _, b, port_b), (_, _, c, port_c), (_, _, d, port_d) = meet(
        *step(0), *step(1)
    )
    assert (a, b, c, d) == (2, 2, 20, 20)
    assert port_a == port_b != port_c == port_d


@pytest.mark.distributed
@pytest.mark.parametrize("stranger", ["silent", "talking"])
def test_a_port_that_is_taken_is_passed_over(stranger, monkeypatch):
    monkeypatch.setattr(launch, "_ANSWER_S", 1.0)
    with socket.create_server(("", launch.ports("4242.0.0")[0])) as server:
        if stranger == "talking":

            def talk() -> None:
                with suppress(OSError):  # the server is closed
                    while True:
                        server.accept()[0].sendall(b"220 mail\n")

            threading.Thread(target=talk, daemon=True).start()
        assert [total for _, _, total, _ in meet(*step(0))] == [2, 2]


@pytest.mark.distributed
def test_a_rank_0_that_is_killed_while_it_waits_takes_the_others_along():
    """They need not sit out their patience."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    tasks = [{**STEP, **task, "SLURM_STEP_NUM_TASKS": "3"} for task in step(0)]
    ranks = [context.Process(target=take_part, args=(task, answers)) for task in tasks]
    for process in ranks:
        process.start()
    time.sleep(3)
    ranks[0].kill()
    assert answers.get(timeout=30)[1:3] == (1, "NotAllCame")
    for process in ranks:
        process.join()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rank", "told"),
    [("0", r"1 of 2 ranks have not come after \d+ s: 1\."), ("1", "rank 0 cannot be reached")],
)
def test_nobody_waits_for_ever_for_a_rank_that_does_not_come(rank, told, monkeypatch):
    """Its process died at start-up, or was never started."""
    monkeypatch.setattr(launch, "_TOLD_AFTER_S", 0.0)
    ((_, _, kind, message),) = meet({"SLURM_PROCID": rank, "EVA02_AT_START_S": "1"})
    assert kind == "NotAllCame"
    assert re.search(told, message)


def test_a_promise_of_tasks_that_nobody_starts_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: {max_epochs: 1}\n")
    for verb in ("fit", "test"):
        assert main([verb, "--config", str(recipe)]) == 2
        told = capsys.readouterr().err
        assert "not started by `srun`" in told and len(told.splitlines()) == 1


def test_a_shell_of_salloc_is_one_machine(monkeypatch):
    """It has no SLURM_PROCID and no SLURM_NODEID, on which Lightning's environment insists."""
    for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    launch.check_slurm()
    assert not launch.SLURMEnvironment.detect()
