"""How long jitted functions take and what memory they need, on CPUs and GPUs alike.

Compilation is timed apart. A GPU runs calls in the order in which they were launched, so short functions are launched
several times and waited for once: the time of the launches hides behind that of the work, unless the work is shorter
than a launch, some 50 microseconds; then the calls can be put in a row inside one program. A CPU may run independent
calls side by side, so there each is waited for.

Memory is the compiler's own account of one call: arguments, outputs and temporaries that exist at the same time. The
allocator's ``peak_bytes_in_use`` is no measure of one function, because it cannot be reset and a process holds more
than one; fresh processes would cost more time than the measurements. `device_peak` reports it for a whole
process, as an upper bound that the account must respect.

`floors` measures what the device could do at best, which is what the times are judged by.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

K = TypeVar("K")

# A batch of launches should take so long that the clock and the wait do not matter.
BATCH_SECONDS = 5e-3
MAX_CALLS = 100
REPEATS = 15
# Outputs that wait in the queue are alive.
MAX_QUEUED_BYTES = 4 << 30
# Of the device's memory, what a benchmark may take.
MEMORY_SHARE = 0.8
# What all targets are for, as `device_label` names it; the results of any device are held against them.
TARGET_DEVICE = "h200"


class Deadline:
    """A moment after which nothing new is started.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Returns the seconds left, negative once it has passed."""
        return self.end - time.monotonic()


class Timed:
    """A function with its arguments, compiled once for them and ready to be timed.

    Args:
        function: Arrays in, arrays out; pure.
        *args: Its arguments; arrays on the device, so that no transfer is timed.
        donate: Positions of the arguments that it may overwrite.
        in_a_row: Calls that one launch makes, each waiting for the one before; the first argument is a float array.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = (), in_a_row: int = 1):
        self.traces = 0
        self.args = args
        self.in_a_row = in_a_row

        def traced(*args: Any) -> Any:
            self.traces += 1
            return function(*args) if in_a_row == 1 else _repeated(function, in_a_row, *args)

        self._jitted = jax.jit(traced, donate_argnums=donate)
        self._lowered: Any = None
        self._compiled: Any = None
        self.compile_seconds = 0.0

    def lower(self) -> Timed:
        """Traces and lowers; Triton kernels are compiled here, which is not safe in several threads."""
        began = time.perf_counter()
        self._lowered = self._jitted.lower(*self.args)
        self.compile_seconds += time.perf_counter() - began
        return self

    def compile(self) -> Timed:
        """Compiles what was lowered, lowering it first if need be."""
        if self._lowered is None:
            self.lower()
        began = time.perf_counter()
        self._compiled = self._lowered.compile()
        self.compile_seconds += time.perf_counter() - began
        return self

    def __call__(self, *args: Any) -> Any:
        """Launches the compiled function, with its own arguments unless others are given; does not wait."""
        return self._compiled(*(args or self.args))

    def memory(self) -> dict[str, int]:
        """Returns the compiler's account of one call in bytes.

        ``total`` is arguments, outputs and temporaries, with what outputs share with arguments counted once.
        """
        found = self._compiled.memory_analysis()
        parts = {name: int(getattr(found, f"{name}_size_in_bytes")) for name in ("argument", "output", "alias", "temp")}
        return parts | {"total": parts["argument"] + parts["output"] + parts["temp"] - parts["alias"]}

    def measure(self, *, seconds: float = 0.5, repeats: int = REPEATS) -> dict[str, Any]:
        """Warms up, then times.

        Args:
            seconds: After so long no repeat is started; there is at least one.
            repeats: The most repeats.

        Returns:
            ``median_ms`` and ``min_ms`` per call, over ``repeats`` batches of ``calls`` launches each, each of
            ``in_a_row`` calls; ``compile_seconds`` and ``memory``.

        Raises:
            AssertionError: The function was traced more than once, so something else was compiled than was timed.
        """
        jax.block_until_ready(self())
        deadline, calls = Deadline(seconds), 1
        once = self._batch(1)
        if jax.default_backend() == "gpu":
            most = min(MAX_CALLS, max(1, MAX_QUEUED_BYTES // max(1, self.memory()["output"])))
            calls = int(np.clip(BATCH_SECONDS / once, 1, most))
        times = [once if calls == 1 else self._batch(calls)]
        while len(times) < repeats and deadline.left() > 0:
            times.append(self._batch(calls))
        if self.traces != 1:
            raise AssertionError(f"the timed function was traced {self.traces} times, expected once")
        return {
            "median_ms": 1e3 * float(np.median(times)) / self.in_a_row,
            "min_ms": 1e3 * min(times) / self.in_a_row,
            "calls": calls,
            "in_a_row": self.in_a_row,
            "repeats": len(times),
            "compile_seconds": round(self.compile_seconds, 3),
            "memory": self.memory(),
        }

    def _batch(self, calls: int) -> float:
        """Returns the seconds per launch of so many launches."""
        began = time.perf_counter()
        out = None
        for _ in range(calls):
            out = self()
        jax.block_until_ready(out)
        return (time.perf_counter() - began) / calls


def _repeated(function: Callable[..., Any], count: int, first: jax.Array, *rest: jax.Array) -> jax.Array:
    """Calls a function so many times; returns its first argument, which is made to depend on the last call."""

    def call(_: int, first: jax.Array) -> jax.Array:
        out = jax.tree.leaves(function(first, *rest))[0]
        # Zero to us but not to the compiler, since a factor may be NaN: no call can be left out or moved.
        return first + 0 * out.ravel()[0].astype(first.dtype)

    return jax.lax.fori_loop(0, count, call, first)


def compile_all(functions: Mapping[K, Timed]) -> dict[K, Timed | Exception]:
    """Compiles several functions, side by side but for their lowering.

    Returns:
        Each function, or what its compilation raised.
    """

    def attempt(step: Callable[[], Timed]) -> Timed | Exception:
        try:
            return step()
        except Exception as error:
            return error

    def compiled(one: Timed | Exception) -> Timed | Exception:
        return one if isinstance(one, Exception) else attempt(one.compile)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {key: pool.submit(compiled, attempt(one.lower)) for key, one in functions.items()}
        return {key: job.result() for key, job in jobs.items()}


def fits(timed: Timed) -> bool:
    """Tells whether a call needs less than ``MEMORY_SHARE`` of the device's memory."""
    return timed.memory()["total"] <= MEMORY_SHARE * device_bytes()


@functools.cache
def floors(smoke: bool) -> dict[str, float]:
    """Measures what bounds the kernels: bytes copied and powers of two computed per second.

    ``exp2_per_second`` is a Triton kernel's of nothing but the hardware instruction; ``xla_exp2_per_second`` is what
    XLA makes of ``jnp.exp2``, which is all there is on a CPU.
    """
    size = 1 << (16 if smoke else 28)
    x = jnp.ones(size, jnp.float32)
    copied = Timed(lambda x: x + 1, x).compile().measure()
    found = {"copy_bytes_per_second": 8 * size / (1e-3 * copied["min_ms"])}
    steps, size = 64, size >> 2

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(steps):
            x = jnp.exp2(-x)
        return x

    timed = Timed(chain, x[:size]).compile().measure()
    found["xla_exp2_per_second"] = steps * size / (1e-3 * timed["min_ms"])
    if jax.default_backend() == "gpu":
        timed = Timed(functools.partial(_exp2_chain, steps=steps), x[:size]).compile().measure()
        found["exp2_per_second"] = steps * size / (1e-3 * timed["min_ms"])
    return found


def _exp2_chain(x: jax.Array, steps: int, capability: int | None = None) -> jax.Array:
    """Applies ``exp2(-x)`` so many times to each element, in registers."""
    import triton
    import triton.language as tl

    from kernels import _splat_triton

    @triton.jit
    def exp2_chain(x, out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + index)
        for _ in range(STEPS):
            value = tl.exp2(-value)
        tl.store(out + index, value)

    block = 1024
    launch = _splat_triton.Launch(
        kernel=exp2_chain,
        grid=x.size // block,
        warps=4,
        constants={"STEPS": steps, "BLOCK": block},
        outputs=(jax.ShapeDtypeStruct(x.shape, x.dtype),),
        aliases={},
    )
    return _splat_triton._call(launch, x, capability=capability)[0]


def exp2_floor(smoke: bool) -> float:
    """Returns the powers of two per second that the kernels are judged by."""
    found = floors(smoke)
    return found.get("exp2_per_second", found["xla_exp2_per_second"])


def device_bytes() -> int:
    """Returns the memory that JAX may use on its device; on a CPU that of the machine."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_peak() -> int | None:
    """Returns the most bytes that this process has held on the device so far, where the device counts them."""
    stats = jax.devices()[0].memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats and "peak_bytes_in_use" in stats else None


def device_state() -> list[str] | None:
    """Returns what nvidia-smi says of clocks, power and heat at this moment, or None where it cannot be asked."""
    fields = (
        "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    )
    asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None


def device_label() -> str:
    """Returns a short name of the device for folders: its first word with a digit, else its first.

    "h100" for an NVIDIA H100 80GB HBM3, "4090" for a GeForce RTX 4090, "cpu" where nvidia-smi knows of none. JAX is not
    asked, because it would take the device's memory.
    """
    kind = next(iter((device_state() or [])[1:]), "cpu").partition(",")[0]
    words = re.findall("[a-z0-9]+", kind.lower()) or ["unknown"]
    return next((word for word in words if any(map(str.isdecimal, word))), words[0])
