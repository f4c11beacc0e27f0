"""Runs the Triton kernels on NumPy arrays, in Triton's own interpreter: no GPU, no PyTorch."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import kernels


def load() -> Any:
    """Imports `kernels._splat_triton` once more, interpreted, on a copy of Triton that is interpreted as well.

    Its `forward` and `backward` run here and now, on NumPy arrays.

    Triton decides at its own import whether its library functions are compiled or interpreted, and the tests need both
    in one process. The copy shares the compiled extension, which is not touched by that choice.
    """
    compiled = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "triton"}
    for name in compiled:
        if not name.startswith("triton._C"):
            del sys.modules[name]
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        path = Path(kernels.__file__).parent / "_splat_triton.py"
        spec = importlib.util.spec_from_file_location("interpreted_splat_triton", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module._call = run
        _patch_once(sys.modules["triton.runtime.interpreter"])
        return module
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
            del sys.modules[name]
        sys.modules.update(compiled)


def _patch_once(interpreter: Any) -> None:
    """Leaves the language of the copy patched: the interpreter patches it anew at every call of a device function."""
    patch, kept = interpreter._patch_lang, SimpleNamespace(restore=lambda: None)
    patched = []

    def patch_lang(function: Any) -> SimpleNamespace:
        # By the modules that the function sees, which are those that are patched.
        if not any(function.__globals__ is seen for seen in patched):
            patched.append(function.__globals__)
            patch(function)
        return kept

    interpreter._patch_lang = patch_lang


class Tensor:
    """What the interpreter asks of a tensor, over a NumPy array that it reads and writes in place."""

    def __init__(self, array: np.ndarray):
        assert array.flags.c_contiguous
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    # One storage per tensor, on the host already: copies to and from the device are the tensor itself.
    def untyped_storage(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def new_empty(self, *_: Any, **__: Any) -> Tensor:
        return Tensor(self.array)

    def set_(self, *_: Any) -> None: ...

    def copy_(self, _: Any) -> None: ...

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)


def run(launch: Any, *arrays: np.ndarray, **_: Any) -> list[np.ndarray]:
    """Executes a `Launch` program by program; outputs that alias no input start as NaN, so that gaps show."""
    inputs = [np.ascontiguousarray(np.asarray(x)) for x in arrays]
    outputs = [np.full(out.shape, np.nan, out.dtype) for out in launch.outputs]
    for position, number in launch.aliases.items():
        outputs[number] = inputs[position] = inputs[position].copy()
    launch.kernel[(launch.grid,)](*(Tensor(x) for x in [*inputs, *outputs]), **launch.constants)
    return outputs
