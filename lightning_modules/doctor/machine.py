"""The node: driver, GPUs and links, cores, shared memory, limits, disk."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lightning_modules.doctor.finding import Finding
from lightning_modules.doctor.ranks import Ranks
from lightning_modules.packaged import version

# the oldest driver of a CUDA major version (NVIDIA's compatibility table)
DRIVERS = {13: 580, 12: 525, 11: 450}
_CORES_PER_GPU = 4  # fewer cannot decode for a GPU
_SHM_BYTES = 2**30  # Docker gives 64 MiB
_FILES = 4096
_PROBE_MIB = 128


def software() -> Iterator[Finding]:
    """Versions that have to be the same on every node."""
    yield Finding("project", "ok", f"eva02-at {version()}")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
    text = f"{torch.__version__}, built for {built}; Python {platform.python_version()}"
    yield Finding("torch", "ok", text)


def driver() -> Iterator[Finding]:
    """The driver, against what this torch is built for."""
    version = _driver_version()
    built_for = int((torch.version.cuda or "0").split(".")[0])
    here = "no NVIDIA driver" if version is None else f"driver {version}"
    if torch.cuda.is_available():
        yield Finding("driver", "ok", f"{here}, CUDA {torch.version.cuda}")
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("NCCL", "ok", nccl)
    elif version is None:
        yield Finding("driver", "skipped", f"{here} on this machine: what needs a GPU is left out")
    elif built_for == 0:
        mend = "install torch's CUDA build: docs/cluster.md has the table of drivers"
        yield Finding(
            "driver", "bad", f"{here}, but torch {torch.__version__} is a CPU build", mend
        )
    elif int(version.split(".")[0]) < DRIVERS.get(built_for, 0):
        yield Finding(
            "driver",
            "bad",
            f"{here} is too old for CUDA {torch.version.cuda}, which needs {DRIVERS[built_for]}",
            "update the driver, or take a torch built for an older CUDA: "
            "`make LOCK=requirements-xformers.lock` has one for CUDA 12.8",
        )
    else:
        yield Finding(
            "driver",
            "bad",
            f"{here}, but torch sees no GPU (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
            "ask the scheduler for GPUs (--gpus-per-node), or pass them to the container (--nv, "
            "--gpus all)",
        )


def _driver_version() -> str | None:
    told = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    if told:
        return told.splitlines()[0].strip()
    file = Path("/proc/driver/nvidia/version")
    if not file.exists():
        return None
    words = file.read_text().split()
    return next((w for w in words if w[:1].isdigit() and w.count(".") >= 1), None)


def _nvidia_smi(*words: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


def gpus() -> Iterator[Finding]:
    """Every GPU: its name, whether this torch has kernels for it, whether it is free; the links."""
    if not torch.cuda.is_available():
        return
    architectures = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        text = f"{properties.name}, sm_{major}{minor}, {memory}"
        state, mend = "ok", ""
        if not _has_kernels(major, minor, architectures):
            state, text = "bad", f"{text}: this torch has kernels for {', '.join(architectures)}"
            mend = "take a torch built for this GPU: docs/cluster.md"
        elif free < 0.8 * total:
            state, text = "bad", f"{text}: another process holds the rest"
            mend = "ask for whole GPUs, or end what runs there (nvidia-smi)"
        elif major < 8:
            state, text = "note", f"{text}; bf16 is slow below sm_80, and xformers refuses it"
        figures: dict[str, float | str] = {"gpu": properties.name}
        figures["gpu_memory_gib"] = total / 2**30
        yield Finding(f"GPU {index}", state, text, mend, figures)
    if topology := _nvidia_smi("topo", "-m"):
        yield Finding("links", "ok", _links(topology))


def _has_kernels(major: int, minor: int, architectures: list[str]) -> bool:
    """Binary code runs within a major version; PTX ("compute_") on anything newer."""
    for name in architectures:
        kind, number = name.split("_")
        number = number.rstrip("af")
        built = int(number[:-1]), int(number[-1])
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
        if kind == "compute" and built <= (major, minor):
            return True
    return False


def _links(topology: str) -> str:
    """What joins pairs of GPUs in `nvidia-smi topo -m`: NV# is NVLink, the others PCIe."""
    rows = [line.split() for line in topology.splitlines() if line.startswith("GPU")]
    count = len(rows)
    kinds = [row[1 + j] for i, row in enumerate(rows) for j in range(i + 1, count)]
    if not kinds:
        return "one GPU"
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def cores(ranks_on_node: int) -> Iterator[Finding]:
    """The cores that this process may use, for the ranks of its node that share them."""
    allowed = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count()
    # tasks that SLURM binds have cores of their own; one process alone shares with all GPUs
    sharing = gpus if ranks_on_node == 1 else 1
    if ranks_on_node > 1 and allowed == os.cpu_count():
        sharing = ranks_on_node
    per_rank = allowed / max(1, sharing)
    text = f"{allowed} of {os.cpu_count()} for this process"
    text += f", {per_rank:.0f} a GPU" if gpus else ""
    figures = {"cores_per_gpu": per_rank} if gpus else {}
    if gpus and per_rank < _CORES_PER_GPU:
        mend = (
            "loader workers need cores: sbatch --cpus-per-task=N, and srun with it too "
            "(SRUN_CPUS_PER_TASK: srun does not inherit it from sbatch since SLURM 22.05)"
        )
        yield Finding("cores", "bad", text, mend, figures)
    else:
        yield Finding("cores", "ok", text, figures=figures)


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, through which loader workers hand over their batches."""
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Finding("/dev/shm", "bad", "is not there", "mount it: loader workers need it")
        return
    usage = shutil.disk_usage(path)
    text = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    mend = "docker run --shm-size=16g (or --ipc=host); remove what earlier jobs left there"
    bad = usage.free < _SHM_BYTES
    yield Finding("/dev/shm", "bad" if bad else "ok", text, mend if bad else "")


def limits() -> Iterator[Finding]:
    """Open files, and locked memory where there is InfiniBand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} (hard limit {hard})"
    bad = soft < _FILES
    mend = f"`ulimit -n {min(65536, hard) if hard > 0 else 65536}` in slurm/env.sh" if bad else ""
    yield Finding("open files", "bad" if bad else "ok", text, mend)
    adapters = sorted(p.name for p in Path("/sys/class/infiniband").glob("*"))
    if not adapters:
        yield Finding("InfiniBand", "skipped", "no adapter here")
        return
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    text = f"{', '.join(adapters)}; locked memory {'unlimited' if unlimited else f'{locked} B'}"
    mend = "" if unlimited else "`ulimit -l unlimited` (the site's limits.conf, or slurmd's unit)"
    yield Finding("InfiniBand", "ok" if unlimited else "bad", text, mend)


def disk(folder: Path) -> Iterator[Finding]:
    """Write, read and open files where a run would write."""
    kind = _file_system(folder)
    usage = shutil.disk_usage(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".eva02-at-doctor-") as scratch:
        write, read = _stream_mib_s(Path(scratch, "large"))
        files = _small_files_a_second(Path(scratch))
    text = (
        f"{folder} ({kind}): {usage.free / 2**30:.0f} GiB free; writes {write:.0f} MiB/s, reads "
        f"{read:.0f} MiB/s, {files:.0f} small files/s"
    )
    slow = write < 20 or read < 20
    mend = "checkpoints and shards belong on a faster file system (--folder tries another)"
    figures = {"disk_write_mib_s": write, "disk_read_mib_s": read}
    yield Finding("disk", "bad" if slow else "ok", text, mend if slow else "", figures)


def _file_system(folder: Path) -> str:
    """The type in /proc/mounts of the longest mount point above a folder."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown"
    place, best, kind = str(folder.resolve()), "", "unknown"
    for line in mounts.read_text().splitlines():
        _, point, name, *_ = line.split()
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


def _stream_mib_s(file: Path) -> tuple[float, float]:
    block = os.urandom(2**20)
    start = time.perf_counter()
    with file.open("wb") as out:
        for _ in range(_PROBE_MIB):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    written = time.perf_counter() - start
    with file.open("rb") as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not out of the cache
        start = time.perf_counter()
        while source.read(2**20):
            pass
        read = time.perf_counter() - start
    return _PROBE_MIB / written, _PROBE_MIB / read


def _small_files_a_second(folder: Path, count: int = 100) -> float:
    start = time.perf_counter()
    for number in range(count):
        file = folder / str(number)
        file.write_bytes(b"x" * 4096)
        file.read_bytes()
        file.unlink()
    return count / (time.perf_counter() - start)


def shared_folder(ranks: Ranks, folder: Path) -> list[Finding]:
    """Whether every node sees the folder of a run; a collective call."""
    if ranks.world == 1:
        return []
    name = [f".eva02-at-doctor-{time.time_ns()}" if ranks.rank == 0 else ""]
    torch.distributed.broadcast_object_list(name)
    token = folder / name[0]
    if ranks.rank == 0:
        token.write_text("")
    torch.distributed.barrier()
    seen: list[bool] = [False] * ranks.world
    torch.distributed.all_gather_object(seen, token.exists())
    if ranks.rank == 0:
        token.unlink()
    if all(seen):
        return [Finding("shared folder", "ok", f"all nodes see {folder}")]
    mend = "--run_dir must lie on a file system that all nodes share"
    return [Finding("shared folder", "bad", f"not every node sees {folder}", mend)]
