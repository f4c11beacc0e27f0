"""Compiles the Triton kernels to machine code, on any machine, and reads what the code needs."""

from __future__ import annotations

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
    """A compiled kernel and its resources, the bytes per thread."""

    ptx: str
    cubin: bytes
    target: int
    registers: int
    stack: int
    spilled: int


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
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "--dump-resource-usage", compiled)))
    return Code(
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        target=int(re.search(r"\.target sm_(\d+)", compiled.asm["ptx"])[1]),
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        spilled=int(usage["LOCAL"]),
    )


def _tool(name: str, option: str, compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / name, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
