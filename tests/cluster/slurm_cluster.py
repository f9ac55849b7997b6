"""A SLURM cluster of two nodes on this machine, for the tests; stops only what it started."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from rank_zygote import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")


def why_not() -> str | None:
    """Why a cluster cannot be started here, or None."""
    if os.geteuid() != 0:
        return "a test cluster of SLURM needs root (slurmd starts tasks as their users)"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; run .ci/install-slurm.sh"
    return None


# The first node, in SLURM's alphabetical order, has this machine's own name: the ranks look up
# its address to find rank 0.
CONFIG = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,defer_batch
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 Port={n0} CPUs=1 State=UNKNOWN
NodeName={host}-second NodeAddr=127.0.0.1 Port={n1} CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


class SlurmCluster:
    """`low` jobs are preempted by `high` ones and requeued."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.processes: list[subprocess.Popen] = []
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        (self.root / "munge").mkdir(mode=0o755)
        (self.root / "state").mkdir()
        host = socket.gethostname().split(".")[0]
        nodes = (host, f"{host}-second")
        for node in nodes:
            (self.root / f"spool.{node}").mkdir()
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = dict(zip(("ctld", "n0", "n1"), (free_port() for _ in range(3)), strict=True))
        (self.root / "slurm.conf").write_text(CONFIG.format(root=self.root, host=host, **ports))
        munge = self.root / "munge"
        files = {
            "key": key,
            "socket": munge / "socket",
            "pid": munge / "pid",
            "seed": munge / "seed",
        }
        options = [f"--{name}-file={files[name]}" for name in ("key", "pid", "seed")]
        options += [f"--socket={files['socket']}", f"--log-file={munge / 'log'}"]
        self._spawn("munged", "--foreground", "--force", *options)
        self._wait_until(lambda: (munge / "socket").exists(), "munged")
        self._spawn("slurmctld", "-D", "-i")
        for node in nodes:
            self._spawn("slurmd", "-D", "-N", node)
        self._wait_until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "nodes")

    def _spawn(self, *words: str) -> None:
        log = (self.root / f"{words[0]}.out").open("ab")
        self.processes.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))

    def _wait_until(self, true, what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                logs = "\n".join(p.read_text()[-2000:] for p in self.root.glob("*.log"))
                raise RuntimeError(f"{what}: not within {seconds} s\n{logs}")
            time.sleep(0.2)

    def run(self, *words: str) -> str:
        """Run a SLURM command; its output, or its error where it fails."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        return (done.stdout if done.returncode == 0 else done.stderr).strip()

    def submit(self, *words: str) -> str:
        """Submit a job; its id."""
        answer = self.run("sbatch", "--parsable", *words)
        assert answer.isdigit(), answer
        return answer

    def state(self, job: str) -> str:
        """A job's state, such as RUNNING."""
        told = self.run("scontrol", "show", "job", job, "-o")
        fields = dict(word.split("=", 1) for word in told.split() if "=" in word)
        return fields.get("JobState", told)

    def wait_for(self, job: str, *states: str, seconds: float = 120.0) -> str:
        """Wait for one of some states; requeued jobs need not sit out SLURM's two minutes."""

        def reached() -> bool:
            if self.state(job) == "PENDING" and "PENDING" not in states:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return self.state(job) in states

        self._wait_until(reached, f"job {job} in {states} (is {self.state(job)})", seconds)
        return self.state(job)

    @contextlib.contextmanager
    def hanging(self, node: str) -> Iterator[None]:
        """A node whose slurmd does not answer, while what it started runs on."""
        (slurmd,) = (p for p in self.processes if p.args[0] == "slurmd" and p.args[-1] == node)
        slurmd.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            slurmd.send_signal(signal.SIGCONT)
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            self._wait_until(
                lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "low") == "2", node
            )

    def stop(self) -> None:
        self.run("scancel", "--user=root")
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
