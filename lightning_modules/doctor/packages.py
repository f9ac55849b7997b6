"""The libraries that a run takes on trust: attention and kernels, decoders, DeepSpeed."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Iterator
from importlib import metadata

import torch

from datamodules.video.decode import stored_decoder
from kernels import flash, numerics, xformers_door
from kernels.attention import available_backends, resolve_backend
from kernels.operators import fused_status
from lightning_modules.doctor.finding import Finding

# of attention's and the gated norm's values and gradients: the arithmetic of the type, and the
# order of its sums (tests/kernels)
TOLERANCES = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
_FALLBACK = "slow operations run instead: "


def attention(device: str) -> Iterator[Finding]:
    """Which attention and rotation a run takes here and why; what the others say."""
    dtype = torch.bfloat16
    name = resolve_backend("auto", device, dtype)
    statuses = available_backends(device, dtype)
    yield Finding("attention", "ok", f"{name} (auto, bf16): {statuses[name].reason}")
    fused, reason = fused_status(device)
    if device == "cuda" and not fused:
        mend = "install gcc and Python's headers (python3-dev) on every node, or set CC"
        yield Finding("Triton", "bad", _FALLBACK + reason, mend)
    else:
        yield Finding("Triton", "ok" if fused else "skipped", reason)
    problem = xformers_door.load_problem()
    status = statuses["xformers"]
    state = "ok" if status.available else "skipped" if problem is None else "note"
    yield Finding("xformers", state, status.reason if problem is None else problem)
    newer = " and ".join(flash.installed()) or "no newer one installed"
    yield Finding("FlashAttention", "ok", f"2 comes with torch's CUDA builds; {newer}")


def parity(device: str) -> Iterator[Finding]:
    """Every backend and type against float64, values and gradients, on this very device."""
    rows = [
        *numerics.measure(device),
        *numerics.measure_gated_norm(device),
        *numerics.measure_norm(device),
    ]
    rows = [row for row in rows if not row[0].startswith("(")]
    wrong = [row for row in rows if not max(row[2:]) < TOLERANCES[row[1]]]
    for name, dtype, out, grad in wrong:
        text = f"{name}, {dtype}: off by {out:.1e} (output), {grad:.1e} (gradient)"
        mend = "do not train on this node; report it with the output of `--json`"
        yield Finding("kernels", "bad", text, mend)
    if not wrong:
        worst = max(rows, key=lambda row: max(row[2:]) / TOLERANCES[row[1]])
        text = f"{len(rows)} forms agree with float64; {worst[0]} in {worst[1]} is furthest: "
        yield Finding("kernels", "ok", text + f"{max(worst[2:]):.1e}")


def decoders() -> Iterator[Finding]:
    """What reads the clips: decord, torchcodec, or PyAV, which is always there."""
    yield Finding("decoder", "ok", f"{stored_decoder('auto')} (auto)")
    if importlib.util.find_spec("torchcodec") is None:
        yield Finding("torchcodec", "skipped", "not installed (an option: data.decoder)")
        return
    try:
        importlib.import_module("torchcodec.decoders")
        yield Finding("torchcodec", "ok", metadata.version("torchcodec"))
    except (ImportError, OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        text = f"{metadata.version('torchcodec')} cannot be loaded: {first}"
        yield Finding("torchcodec", "note", text)


def deepspeed() -> Iterator[Finding]:
    """DeepSpeed, and what it would build its operators with."""
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        mend = "install it, or train with configs/strategy/ddp.yaml"
        yield Finding("DeepSpeed", "bad", "is not installed", mend)
        return
    found = {name: shutil.which(name) is not None for name in ("ninja", "g++", "nvcc")}
    lacking = [name for name, here in found.items() if not here]
    text = f"{version}; ZeRO 1-3 need no operator of its own"
    if lacking:
        text += f" (one that offloads would miss {', '.join(lacking)})"
    yield Finding("DeepSpeed", "ok", text)
