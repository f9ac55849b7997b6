"""Who works in a run's folder: one process at a time, also over NFS and Lustre.

    RUN/.owner/
      00000002        the last owner's: `released` or a heartbeat that stands still
      00000003        the owner's: the highest number counts
        000000000041                                  heartbeat, overwritten in place
        {"host": "n7", "pid": 4242, "job": "123", ...}

A number is taken by `link`, which is atomic on every file system (flock is not on many); it is
never given back, so it also tells an owner that was declared dead from its successor. Whether an
owner lives is told by its process where that is on this machine, by SLURM's queue where it has a
job, else by its heartbeat: read again and again by the reader's own clock, so that no two clocks
need agree. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import socket
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = ".owner"
_RELEASED = b"released    "
_BEAT_BYTES = len(_RELEASED)
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# States of a job whose processes may still be there.
LIVING_STATES = frozenset(
    {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
)


class RunInUse(ValueError):
    """Another process works in the run's folder; the message says which and what to do."""


@dataclass(frozen=True)
class Owner:
    """A process that works in a run's folder.

    Attributes:
        host: Its machine.
        pid: Its process id there.
        machine: Boot and process namespace in which the id means something.
        started: When the process started, in the kernel's ticks: ids are used again.
        user: Whose it is.
        job: SLURM's job id, or empty.
        restart: How often SLURM had restarted the job.
        since: When it took the run, for people.
    """

    host: str
    pid: int
    machine: str
    started: str
    user: str
    job: str
    restart: str
    since: str

    @staticmethod
    def this_process() -> Owner:
        """Describe the process that asks."""
        return Owner(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()),
            user=getpass.getuser(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=os.environ.get("SLURM_RESTART_COUNT", "0"),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def __str__(self) -> str:
        job = f"SLURM job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} of {self.user} on {self.host}, since {self.since}"

    def how_to_end(self) -> str:
        """The command that ends it."""
        return f"scancel {self.job}" if self.job else f"kill {self.pid} on {self.host}"

    def lives(self) -> bool | None:
        """Whether its process lives, as far as this machine or SLURM's queue can tell."""
        job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        if self.job and self.job == job and self.restart != restart:
            return False  # SLURM takes the earlier start of a job for dead when it starts it again
        if self.machine == _machine():
            mine = self.pid == os.getpid()  # an earlier run of this process: it is over
            return not mine and _started(self.pid) == self.started
        if not self.job or self.job == job:
            return None
        state = job_state(self.job)
        return False if state is not None and state not in LIVING_STATES else None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} (no /proc)"


def _started(pid: int) -> str:
    """Start time of a process, or nothing if there is none (or only what a parent must reap)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def job_state(job: str) -> str | None:
    """State of a job as SLURM's queue says; `GONE` if it knows none, None if it cannot be asked."""
    words = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return "GONE" if "Invalid job id" in done.stderr else None
    return done.stdout.strip() or "GONE"


class RunOwnership:
    """The claim of one process to a run's folder.

    Args:
        run_dir: The run's folder.
        lost_s: How long a heartbeat stands still before its owner counts as dead.
        look_s: Pause between two looks at another's heartbeat.
    """

    def __init__(self, run_dir: str | Path, lost_s: float = 120.0, look_s: float = 1.0) -> None:
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / FOLDER
        self.lost_s, self.look_s = lost_s, look_s
        self.number = 0
        self._beats = 0

    def acquire(self) -> str | None:
        """Become the owner, if need be after waiting for another's sign of life.

        Returns:
            Whose place was taken, if it was not given back.

        Raises:
            RunInUse: The owner lives.
            OSError: The folder cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            number = self._highest()
            taken_from = self._wait_for_death(number) if number else None
            if self._claim(number + 1):
                break
        self.number = number + 1
        for path in self.folder.iterdir():
            if path.name.isdigit() and int(path.name) < number:
                path.unlink(missing_ok=True)
        return taken_from

    def owner(self) -> Owner | None:
        """The process that owns the run, as far as is known without waiting; None if none does."""
        beat, owner = self._last()
        return None if beat == _RELEASED or owner is None or owner.lives() is False else owner

    def was_released(self) -> bool:
        """Whether the last owner gave the run back, or there never was one."""
        return self._last()[0] == _RELEASED

    def beat(self) -> bool:
        """Give a sign of life; False once another process has taken the run.

        Overwrites in place: that needs no room on a full disk.
        """
        self._beats += 1
        return self._overwrite(b"%012d" % self._beats) and self.is_mine()

    def is_mine(self) -> bool:
        """Whether no other process has taken the run since."""
        return self._highest() == self.number

    def release(self) -> None:
        """Give the run back."""
        if self.number:
            with contextlib.suppress(OSError):  # it will be seen by the process that has gone
                self._overwrite(_RELEASED)
            self.number = 0

    def _highest(self) -> int:
        return max((int(p.name) for p in self.folder.iterdir() if p.name.isdigit()), default=0)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def _read(self, number: int) -> tuple[bytes, Owner | None]:
        try:
            content = self._path(number).read_bytes()
            return content[:_BEAT_BYTES], Owner(**json.loads(content[_BEAT_BYTES:]))
        except (FileNotFoundError, ValueError, TypeError):
            return b"", None  # gone, or being written where there are no links

    def _last(self) -> tuple[bytes, Owner | None]:
        """What the last owner has written; nothing where that cannot be read."""
        try:
            number = self._highest() if self.folder.is_dir() else 0
            return self._read(number) if number else (_RELEASED, None)
        except OSError:
            return b"", None

    def _overwrite(self, beat: bytes) -> bool:
        try:
            descriptor = os.open(self._path(self.number), os.O_WRONLY)
        except FileNotFoundError:
            return False
        try:
            os.pwrite(descriptor, beat, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True

    def _wait_for_death(self, number: int) -> str | None:
        """Return once the owner of a number is dead (who that was), or gave the run back (None)."""
        first, owner = self._read(number)
        seen = time.monotonic()
        while True:
            beat, owner = self._read(number)
            if beat == _RELEASED:
                return None
            lives = owner.lives() if owner is not None else None
            silent_s = time.monotonic() - seen
            if lives is False or (lives is None and silent_s > self.lost_s):
                return str(owner)
            if lives or beat != first or self._highest() != number:
                who = f"{owner}" if owner is not None else "another process"
                end = f", end it ({owner.how_to_end()})" if owner is not None else ""
                raise RunInUse(
                    f"{self.run_dir} is in use by {who}. Wait for it{end}, or name another "
                    "--run_dir"
                )
            time.sleep(self.look_s)

    def _claim(self, number: int) -> bool:
        """Take a number; False if another process was faster."""
        content = f"{0:012d}\n{json.dumps(asdict(Owner.this_process()))}\n".encode()
        target = self._path(number)
        temporary = self.folder / f"new-{socket.gethostname()}-{os.getpid()}"
        try:
            _write(temporary, content, os.O_TRUNC)
            try:
                os.link(temporary, target)
            except FileExistsError:
                # the answer to an earlier try of NFS's own may have been lost
                if not temporary.samefile(target):
                    return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                try:
                    _write(target, content, os.O_EXCL)
                except FileExistsError:
                    return False
        finally:
            temporary.unlink(missing_ok=True)
        if self._highest() != number:  # a number long past, of one who slept meanwhile
            target.unlink(missing_ok=True)
            return False
        return True


def _write(path: Path, content: bytes, how: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o644)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
