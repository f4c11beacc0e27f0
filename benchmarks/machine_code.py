"""Compiles the Triton kernels to machine code, on any machine, and reads what the code needs and does."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


class Code(NamedTuple):
    """A compiled kernel and what it needs.

    Attributes:
        ptx: NVIDIA's portable assembly.
        cubin: Machine code, as an ELF file.
        target: Compute capability that it is for.
        registers: Registers of a thread.
        stack: Stack of a thread, in bytes.
        spilled: Local memory of a thread, in bytes, where registers do not suffice.
    """

    ptx: str
    cubin: bytes
    target: int
    registers: int
    stack: int
    spilled: int


class Loop(NamedTuple):
    """A loop in the machine code.

    Attributes:
        length: Instructions of its body, those of loops inside included.
        operations: How often each occurs, as ``{"FFMA": 44, "MUFU.EX2": 16}``.
    """

    length: int
    operations: dict[str, int]


def compile(launch: Any, inputs: list[str], capability: int) -> Code:
    """Compiles as jax-triton does: pointers aligned to 16 bytes, all scalars constant.

    Args:
        launch: A `Launch` of `kernels._splat_triton`.
        inputs: Dtypes of the operands, cut or filled up with those of the outputs that alias them.
        capability: Compute capability, 90 for 9.0.
    """
    outputs = [np.dtype(out.dtype).name for out in launch.outputs]
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    dtypes = inputs[: len(names) - len(outputs)]
    dtypes += outputs * 2 if len(names) - len(dtypes) > len(outputs) else outputs
    signature = {name: POINTERS[dtype] for name, dtype in zip(names, dtypes, strict=True)}
    source = ASTSource(
        launch.kernel,
        signature=signature | dict.fromkeys(launch.constants, "constexpr"),
        constexprs=launch.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(names))},
    )
    options = {"num_warps": launch.warps, "num_stages": 1, "enable_fp_fusion": True}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        # jax-triton, once imported, leaves Triton without a cache of its own.
        triton.knobs.cache.dir = folder
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    dump = _tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump))
    return Code(
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        target=int(re.search(r"\.target sm_(\d+)", compiled.asm["ptx"])[1]),
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        spilled=int(usage["LOCAL"]),
    )


def loops(code: Code) -> list[Loop]:
    """Returns the loops of the machine code, inner ones before those around them."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in _tool("nvdisasm", "-c", code.cubin).splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]*);", line):
            instructions.append(instruction[1].strip())
    found = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        start = labels.get(target[1], end) if target else end
        # The endless loop behind the last instruction of a kernel is one instruction long.
        if start < end:
            body = instructions[start : end + 1]
            names = (".".join(x.split()[0].split(".")[: 2 if x.startswith("MUFU") else 1]) for x in body)
            found.append(Loop(len(body), dict(collections.Counter(names))))
    return found


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / name, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
