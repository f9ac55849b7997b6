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

from kernels.pages import write_between

CAPABILITIES = {80: "A100", 90: "H100, H200", 100: "B200", 120: "RTX 50, RTX PRO"}
ELEMENT_TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
# (type, head dim, q and k or k alone): the models' 64, and 20, which is no power of two
FORMS = (
    ("fp32", 64, True),
    ("bf16", 64, True),
    ("fp16", 64, True),
    ("bf16", 64, False),
    ("fp32", 20, True),
    ("bf16", 20, True),
)
NUM_HEADS = 12

# Budgets of the head dims that are a multiple of 16, which all models have. 64 registers a thread
# keep 1,024 threads on a multiprocessor of 65,536 registers, each with two 16-byte loads in
# flight: 32 KiB, where bandwidth times latency of an H100 needs about 18 KiB (3.35 TB/s over 132
# multiprocessors, 700 ns). Other head dims shuffle their channels through shared memory.
MAX_REGISTERS, MAX_SHARED_BYTES = 64, 0
MAX_REGISTERS_ODD, MAX_SHARED_BYTES_ODD = 128, 8192


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of the rotation for one architecture and type.

    Attributes:
        capability: Compute capability, 90 for sm_90.
        element_type: Of q and k.
        head_dim: Channels of a head.
        pair: True for q and k, False for k alone.
        registers: A thread's.
        spill_bytes: Stack and local memory of a thread.
        shared_bytes: Shared memory of a block.
        wide_accesses: Global loads and stores of 128 bits.
        narrow_accesses: Global loads and stores of fewer.
    """

    capability: int
    element_type: str
    head_dim: int
    pair: bool
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_accesses: int
    narrow_accesses: int


def compile_rotation(capability: int, element_type: str, head_dim: int, pair: bool) -> Compiled:
    """Compile the rotation as run time would specialise it, and read registers and accesses.

    Args:
        capability: 80, 90, 100 or 120.
        element_type: "fp32", "bf16" or "fp16".
        head_dim: Channels of a head.
        pair: q and k, or k alone.

    Raises:
        ValueError: if TRITON_INTERPRET is set, which replaces the compiler.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET is set: unset it to compile the kernels")
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.triton_rotation import NUM_WARPS, launch_sizes, rotate_kernel

    sizes = launch_sizes(head_dim, NUM_HEADS, ELEMENT_TYPES[element_type]) | {"PAIR": pair}
    names = rotate_kernel.arg_names
    signature = {name: _argument_type(name, element_type, sizes) for name in names}
    # What run time finds divisible by 16: tensors' addresses, and strides where head_dim is.
    aligned = {n for n in names if signature[n].startswith("*")}
    aligned |= {n for n in names if "stride" in n and head_dim % 16 == 0}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constants = {(names.index(n),): value for n, value in sizes.items()}
    compiled = triton.compile(
        ASTSource(rotate_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": NUM_WARPS},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    widths = re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    bits = [int(vector or 1) * int(element) for vector, element in widths]
    return Compiled(
        capability,
        element_type,
        head_dim,
        pair,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        compiled.metadata.shared,
        bits.count(128),
        len(bits) - bits.count(128),
    )


def _argument_type(name: str, element_type: str, constants: dict) -> str:
    if name in constants:
        return "constexpr"
    if name in ("q_in", "k_in", "q_out", "k_out"):
        return f"*{element_type}"
    if name in ("spatial", "temporal"):
        return "*fp32"
    return "fp32" if name == "sign" else "i32"


def compile_all() -> list[Compiled]:
    """Every form on every architecture."""
    return [compile_rotation(capability, *form) for capability in CAPABILITIES for form in FORMS]


def over_budget(rows: list[Compiled]) -> list[str]:
    """Say what is over budget: nothing, if all is well."""
    problems = []
    for row in rows:
        even = row.head_dim % 16 == 0
        name = f"sm_{row.capability}, {row.element_type}, head dim {row.head_dim}"
        if row.spill_bytes:
            problems.append(f"{name}: spills {row.spill_bytes} bytes")
        if row.registers > (MAX_REGISTERS if even else MAX_REGISTERS_ODD):
            problems.append(f"{name}: {row.registers} registers")
        if row.shared_bytes > (MAX_SHARED_BYTES if even else MAX_SHARED_BYTES_ODD):
            problems.append(f"{name}: {row.shared_bytes} bytes of shared memory")
        if even and (row.narrow_accesses or not row.wide_accesses):
            problems.append(f"{name}: {row.narrow_accesses} accesses narrower than 128 bits")
    return problems


def table(rows: list[Compiled]) -> str:
    """The rows as Markdown."""
    import triton

    lines = [
        f"Triton {triton.__version__}, {NUM_HEADS} heads; written by "
        "`python -m kernels.ahead_of_time --write docs/kernels.md`.",
        "",
        "| architecture | type | head dim | rotates | registers | spills | shared memory "
        "| 128-bit accesses | narrower |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| sm_{r.capability} ({CAPABILITIES[r.capability]}) | {r.element_type} | {r.head_dim} "
        f"| {'q, k' if r.pair else 'k'} | {r.registers} | {r.spill_bytes} B | {r.shared_bytes} B "
        f"| {r.wide_accesses} | {r.narrow_accesses} |"
        for r in rows
    ]
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
