"""Compiles the Triton kernels for GPUs that are not there, and reads what the compiler made.

    python -m kernels.ahead_of_time                      # the table
    python -m kernels.ahead_of_time --json               # the same for a program
    python -m kernels.ahead_of_time --write docs/kernels.md   # into the page, between its markers

Needs Triton but no GPU; run it without TRITON_INTERPRET. The assembler and disassembler are those
that Triton ships.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.pages import write_between

CAPABILITIES = {80: "A100", 90: "H100, H200", 100: "B200", 120: "RTX 50, RTX PRO"}
ELEMENT_TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
NUM_HEADS = 12


@dataclass(frozen=True)
class Form:
    """A kernel as run time would specialise it.

    Attributes:
        kernel: "rotate q, k", "rotate k", "gated norm", "add, norm", or a norm's "..., backward".
        width: Channels of a head, hidden channels F, or channels of the residual stream.
        element_type: Of q and k, hidden channels or stream: "fp32", "bf16" or "fp16".
        weight_type: Of the norm's weight and bias; autocast keeps them in fp32.
        padded: Hidden channels with padding, where there is any.
    """

    kernel: str
    width: int
    element_type: str
    weight_type: str | None = None
    padded: int | None = None


_GATED = ("gated norm", "gated norm, backward")
_NORM = ("add, norm", "add, norm, backward")
FORMS = (
    *(Form("rotate q, k", 64, name) for name in ELEMENT_TYPES),
    Form("rotate k", 64, "bf16"),
    *(Form("rotate q, k", 20, name) for name in ("fp32", "bf16")),  # 20 is no power of two
    *(Form(kernel, 2048, name, name) for kernel in _GATED for name in ELEMENT_TYPES),
    *(Form(kernel, 2048, "bf16", "fp32") for kernel in _GATED),
    *(Form(kernel, 2730, "bf16", "fp32", 2736) for kernel in _GATED),  # the L model's
    *(Form(kernel, 768, name, name) for kernel in _NORM for name in ELEMENT_TYPES),
    *(Form(kernel, width, "bf16", "fp32") for kernel in _NORM for width in (768, 1024)),
)


@dataclass(frozen=True)
class Budget:
    """The most of each that a kernel may use; a spill is never within it."""

    registers: int
    shared_bytes: int
    narrow_accesses: int


def budget(form: Form) -> Budget:
    """The budget of a form, and why.

    Rotation, of head dims that are a multiple of 16, which all models have: 64 registers a thread
    keep 1,024 threads on a multiprocessor of 65,536 registers, each with two 16-byte loads in
    flight: 32 KiB, where bandwidth times latency of an H100 needs about 18 KiB (3.35 TB/s over 132
    multiprocessors, 700 ns). Other head dims shuffle their channels through shared memory.

    SwiGLU's norm: 128 registers let 16 warps of the backward run, each thread with three 16-byte
    loads: 24 KiB in flight. Shared memory for one row in float32, on its way between the layouts
    of 16- and 32-bit vectors. Narrow accesses are the two statistics of a row; rows of 2,730
    channels do not begin at multiples of 16 bytes.

    The residual's norm: 170 registers let three blocks of the backward run, each with three times
    four rows of 1.5 KB on their way: 54 KiB. Shared memory for the weight in float32, between the
    same layouts. Narrow accesses are the statistics of the four rows.
    """
    aligned = form.width % 16 == 0
    if form.kernel in _NORM:
        return Budget(registers=170, shared_bytes=4096, narrow_accesses=8)
    if form.kernel in _GATED:
        row_bytes = 4 << (form.width - 1).bit_length()
        return Budget(registers=128, shared_bytes=row_bytes, narrow_accesses=2 if aligned else 64)
    if aligned:
        return Budget(registers=64, shared_bytes=0, narrow_accesses=0)
    return Budget(registers=128, shared_bytes=8192, narrow_accesses=64)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a form for one architecture.

    Attributes:
        capability: Compute capability, 90 for sm_90.
        form: What was compiled.
        registers: A thread's.
        spill_bytes: Stack and local memory of a thread.
        shared_bytes: Shared memory of a block.
        wide_accesses: Global loads and stores of 128 bits.
        narrow_accesses: Global loads and stores of fewer.
    """

    capability: int
    form: Form
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_accesses: int
    narrow_accesses: int


def compile_form(capability: int, form: Form) -> Compiled:
    """Compile a kernel as run time would specialise it, and read registers and accesses.

    Args:
        capability: 80, 90, 100 or 120.
        form: What to compile.

    Raises:
        ValueError: if TRITON_INTERPRET is set, which replaces the compiler.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET is set: unset it to compile the kernels")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, sizes, num_warps = _kernel(form)
    names = kernel.arg_names
    signature = {name: _argument_type(name, form, sizes) for name in names}
    # What run time finds divisible by 16: tensors' addresses, and strides where the width is.
    aligned = {n for n in names if signature[n].startswith("*")}
    aligned |= {n for n in names if "stride" in n and form.width % 16 == 0}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constants = {(names.index(n),): value for n, value in sizes.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    used = _resources(compiled.asm["cubin"])
    bits = _access_bits(compiled.asm["ptx"])
    return Compiled(
        capability,
        form,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        compiled.metadata.shared,
        bits.count(128),
        len(bits) - bits.count(128),
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers (REG) and spilled bytes (STACK, LOCAL) of a compiled kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


def _access_bits(ptx: str) -> list[int]:
    """Width of each access to global memory."""
    widths = re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(vector or 1) * int(element) for vector, element in widths]


def _kernel(form: Form) -> tuple[Any, dict[str, int], int]:
    """The kernel, its compile-time sizes and its warps."""
    from kernels import triton_gated_norm, triton_norm, triton_rotation

    backward = form.kernel.endswith(", backward")
    if form.kernel in _NORM:
        sizes, num_warps = triton_norm.launch_sizes(form.width, backward=backward)
        kernels = (triton_norm.norm_kernel, triton_norm.norm_backward_kernel)
        return kernels[backward], sizes | {"ADDS": True}, num_warps
    if form.kernel in _GATED:
        sizes, num_warps = triton_gated_norm.launch_sizes(
            form.width, form.padded or form.width, backward=backward
        )
        kernels = (
            triton_gated_norm.gated_norm_kernel,
            triton_gated_norm.gated_norm_backward_kernel,
        )
        return kernels[backward], sizes, num_warps
    sizes = triton_rotation.launch_sizes(form.width, NUM_HEADS, ELEMENT_TYPES[form.element_type])
    sizes |= {"PAIR": form.kernel == "rotate q, k"}
    return triton_rotation.rotate_kernel, sizes, triton_rotation.NUM_WARPS


_OF_THE_ELEMENTS = {
    *("q_in", "k_in", "q_out", "k_out", "hidden", "d_hidden", "out", "grad"),
    *("x", "branch", "total", "d_total", "d_x"),
}


def _argument_type(name: str, form: Form, constants: dict) -> str:
    if name in constants:
        return "constexpr"
    if name in _OF_THE_ELEMENTS:
        return f"*{form.element_type}"
    if name in ("weight", "bias"):
        return f"*{form.weight_type}"
    if name in ("spatial", "temporal", "mean", "rstd", "d_parameters"):
        return "*fp32"
    return "fp32" if name in ("sign", "eps") else "i32"


def compile_all() -> list[Compiled]:
    """Every form on every architecture."""
    return [compile_form(capability, form) for capability in CAPABILITIES for form in FORMS]


def over_budget(rows: list[Compiled]) -> list[str]:
    """Say what is over budget: nothing, if all is well."""
    problems = []
    for row in rows:
        form, most = row.form, budget(row.form)
        name = f"sm_{row.capability}, {form.kernel}, {form.element_type}, width {form.width}"
        if row.spill_bytes:
            problems.append(f"{name}: spills {row.spill_bytes} bytes")
        if row.registers > most.registers:
            problems.append(f"{name}: {row.registers} registers")
        if row.shared_bytes > most.shared_bytes:
            problems.append(f"{name}: {row.shared_bytes} bytes of shared memory")
        if row.narrow_accesses > most.narrow_accesses:
            problems.append(f"{name}: {row.narrow_accesses} accesses narrower than 128 bits")
        if form.width % 16 == 0 and not row.wide_accesses:
            problems.append(f"{name}: no accesses of 128 bits")
    return problems


def table(rows: list[Compiled]) -> str:
    """The rows as Markdown."""
    import triton

    lines = [
        f"Triton {triton.__version__}, {NUM_HEADS} heads; written by "
        "`python -m kernels.ahead_of_time --write docs/kernels.md`.",
        "",
        "| architecture | kernel | width | type | registers | spills | shared memory "
        "| 128-bit accesses | narrower |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        form = row.form
        types = form.element_type
        if form.weight_type not in (None, form.element_type):
            types += f", {form.weight_type} weight"
        lines.append(
            f"| sm_{row.capability} ({CAPABILITIES[row.capability]}) | {form.kernel} "
            f"| {form.width} | {types} | {row.registers} | {row.spill_bytes} B "
            f"| {row.shared_bytes} B | {row.wide_accesses} | {row.narrow_accesses} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compile everything; exit 1 if anything is over budget."""
    parser = argparse.ArgumentParser(prog="python -m kernels.ahead_of_time")
    parser.add_argument("--json", action="store_true", help="rows as JSON on standard output")
    parser.add_argument("--write", type=Path, help="a Markdown page with the two markers")
    args = parser.parse_args(argv)
    rows = compile_all()
    print(json.dumps([asdict(r) for r in rows], indent=1) if args.json else table(rows))
    if args.write:
        write_between(args.write, "kernels.ahead_of_time", table(rows))
    problems = over_budget(rows)
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
