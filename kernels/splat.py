"""The splat operator: additive 2-D Gaussians to images, with a hand-written derivative.

This file owns what all backends share: the public signature, the reverse-mode rule, the batching rule and the choice
of the backend. The backends know one leading batch axis and nothing of ``grad`` or ``vmap``: each direction is a
``custom_vmap`` function that folds any new axis into the images, and a ``custom_vjp`` joins the two. Only first-order
reverse mode is defined.
"""

from __future__ import annotations

import functools
import importlib
import os
import textwrap
import warnings
from collections.abc import Callable, Sequence
from concurrent import futures
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from kernels import _splat_xla
from kernels.spec import SplatSpec

DEFAULT_CUTOFF = 1e-4
"""Contributions below it, relative to a Gaussian's peak, are zero.

Moves no pixel of a fitted image by more than 0.2 of 1/512; 2e-4 moves some by 0.4 and 5e-4 by the whole ("cutoff" in
benchmarks/results/fit_psnr.json). A larger value saves little: the area drawn grows with log(1 / cutoff) only.
"""

# From Turing on, ten times; given any other, LLVM ends the process.
CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)

compute_capability = jax.make_user_context(None)
"""``with compute_capability(90):`` lowers for a Hopper GPU, whatever is at hand; JAX traces anew where it changes.

For a whole process the environment variable GSDD_COMPUTE_CAPABILITY says the same; JAX does not see that one change, so
a program that is already traced keeps what it was traced for.
"""


def splat(
    centers: jax.Array,
    conics: jax.Array,
    colors: jax.Array,
    *,
    height: int,
    width: int,
    supersample: int = 2,
    cutoff: float = DEFAULT_CUTOFF,
    backend: str = "auto",
) -> jax.Array:
    """Draws sums of Gaussians (GSDD, Eq. 2 and 4).

    ``image[y, x]`` is the mean over its samples of ``sum_k exp(-q_k / 2) * color_k``. With ``dx, dy`` the offset of a
    sample from the center, ``q = (p dx + r dy)^2 + (s dy)^2`` and ``(p, r, s)`` the conic. This is the Cholesky form of
    the inverse covariance: ``p^2, p r, r^2 + s^2`` are its entries. Unlike those entries it keeps ``q`` accurate in
    float32 for needle-like Gaussians, and needs fewer operations per sample.

    Blending is additive: no order, no clamp, no background. Differentiable once, in reverse mode, with respect to the
    three arrays; the cut at ``cutoff`` counts as constant. Works under ``jit``, nested ``vmap`` (also with unmapped
    operands), ``remat``.

    Args:
        centers: ``[n, m, 2]`` centers (x, y) in pixels; pixel (row y, column x) covers ``[x, x+1) x [y, y+1)``.
        conics: ``[n, m, 3]`` entries (p, r, s) in 1/pixel with p, s > 0.
        colors: ``[n, m, c]`` weights, of any sign.
        height: Rows of the images.
        width: Columns of the images.
        supersample: ``s``; each pixel is the mean of ``s * s`` samples at ``(i + 1/2) / s``.
        cutoff: Contributions with ``exp(-q / 2)`` below it are zero, in every backend alike.
        backend: ``"auto"`` takes the Triton kernels on an NVIDIA GPU, if jax-triton works there and no operand is
            float64, and XLA anywhere else; ``"triton"`` and ``"xla"`` insist. To lower for a GPU on a machine without
            one, see `compute_capability`.

    Returns:
        Images ``[n, height, width, c]``: float64 if an operand is, else float32. An image with a NaN operand is all
        NaN. Gradients have the dtypes of their operands; half precision is read as it is, and summed in float32.

    Raises:
        ValueError: A shape or a setting is off, or ``backend="triton"`` without a GPU; the message names it.
        TypeError: An operand is not floating point, or a second derivative is asked for.
        ImportError: ``backend="triton"`` without jax-triton, or with one that does not work with this JAX or GPU.
    """
    spec = SplatSpec(
        height=height,
        width=width,
        supersample=supersample,
        cutoff=cutoff,
        backend=backend,
        # Read here, for the operator of a spec is traced once.
        capability=None if backend == "xla" else _capability(),
    )
    _check(centers, conics, colors)
    dtype = jnp.result_type(centers, conics, colors)
    if dtype == jnp.float64 and backend == "triton":
        raise ValueError("backend: 'triton' computes in float32 and found float64 operands; allowed here: auto, xla")
    operands = [
        x if dtype != jnp.float64 and x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) else x.astype(_wide(dtype))
        for x in (centers, conics, colors)
    ]
    return _operator(spec)(*operands)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _check(centers: jax.Array, conics: jax.Array, colors: jax.Array) -> None:
    for name, array, last in (("centers", centers, 2), ("conics", conics, 3), ("colors", colors, None)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating dtype, found {array.dtype}")
        if array.ndim != 3 or (last is not None and array.shape[2] != last):
            raise ValueError(f"{name}: expected shape [n, m, {last or 'c'}], found {list(array.shape)}")
        if array.shape[:2] != centers.shape[:2]:
            raise ValueError(
                f"{name}: expected leading axes {list(centers.shape[:2])} as in centers, found {list(array.shape[:2])}"
            )


@functools.cache
def _operator(spec: SplatSpec) -> Callable[..., jax.Array]:
    """Builds the differentiable operator of one spec; cached so that equal calls share one trace."""
    # Compiled as a whole also in eager calls, whose loops would otherwise compile anew every time.
    forward = _fold_batches(jax.jit(functools.partial(_forward, spec)))
    backward = _fold_batches(jax.jit(functools.partial(_backward, spec)))

    # The rule for first derivatives is what second ones would differentiate.
    rule = _once(forward), _once(backward)

    @jax.custom_vjp
    def operator(centers, conics, colors):
        return forward(centers, conics, colors)

    operator.defvjp(lambda *inputs: (rule[0](*inputs), inputs), lambda inputs, v_image: rule[1](*inputs, v_image))
    return operator


def _once(function: Callable) -> Callable:
    """Lets a function be called and batched, but not differentiated.

    JAX would take the loops of a backend apart, which ends in words about linearization, or in no memory left.
    """
    guarded = jax.custom_jvp(function)

    @guarded.defjvp
    def _refuse(primals: tuple, tangents: tuple) -> tuple:
        raise TypeError(
            "splat: only first derivatives pass through the renderer, in reverse mode (grad, vjp, jacrev); second "
            "ones, such as hessian or grad of grad, do not"
        )

    return guarded


def _forward(spec: SplatSpec, *operands: jax.Array) -> jax.Array:
    def portable(*operands: jax.Array) -> jax.Array:
        dtype = _wide(jnp.result_type(*operands))
        return _splat_xla.forward(spec, *(x.astype(dtype) for x in operands))

    return _by_platform(spec, "forward", portable, *operands)


def _backward(spec: SplatSpec, *operands: jax.Array) -> tuple[jax.Array, ...]:
    def portable(*operands: jax.Array) -> tuple[jax.Array, ...]:
        dtype = _wide(jnp.result_type(*operands))
        gradient = _splat_xla.backward(spec, *(x.astype(dtype) for x in operands))
        return tuple(v.astype(x.dtype) for v, x in zip(gradient, operands, strict=False))

    return _by_platform(spec, "backward", portable, *operands)


def _by_platform(spec: SplatSpec, direction: str, portable: Callable, *operands: jax.Array):
    """Calls the backend of the spec; with ``"auto"``, that of the platform that the program is lowered for."""
    for_gpu = spec.backend != "xla" and (spec.capability is not None or jax.default_backend() == "gpu")
    if spec.backend == "triton" and not for_gpu:
        platform = jax.default_backend()
        raise ValueError(f"backend: 'triton' needs an NVIDIA GPU, JAX runs on {platform}; allowed here: auto, xla")
    # Importing Triton takes a second, so not where no GPU is in sight.
    if not for_gpu or any(x.dtype == jnp.float64 for x in operands):
        return portable(*operands)
    triton = _triton(spec.capability, tuple(x.dtype for x in operands[:3]))
    if isinstance(triton, str):
        if spec.backend == "triton":
            raise ImportError(f"backend: 'triton' needs {triton}; {_INSTALL}")
        _warn_of_slow_path(triton)
        return portable(*operands)
    kernel = functools.partial(getattr(triton, direction), spec)
    if spec.backend == "triton":
        return jax.lax.platform_dependent(*operands, cuda=kernel)
    return jax.lax.platform_dependent(*operands, cuda=kernel, default=portable)


_INSTALL = "pip install 'gsdd_jax[cuda]' installs versions that work together"


def _capability() -> int | None:
    """Returns the compute capability to compile for, or None for that of the GPU at hand."""
    name, value = "compute_capability", compute_capability.value
    if value is None:
        name, value = "GSDD_COMPUTE_CAPABILITY", os.environ.get("GSDD_COMPUTE_CAPABILITY") or None
    if value is None:
        return None
    if str(value) not in map(str, CAPABILITIES):
        allowed = ", ".join(map(str, CAPABILITIES))
        raise ValueError(f"{name}: expected ten times the capability of a GPU, one of {allowed}; found {value!r}")
    return int(value)


@functools.cache
def _triton(capability: int | None, dtypes: tuple[np.dtype, ...]) -> ModuleType | str:
    """Returns the module of the GPU kernels, or what is missing for them to compile for operands of these dtypes."""
    try:
        # jax-triton refuses to be imported by itself where JAX has no CUDA plugin.
        importlib.import_module("jax_triton")
        module = importlib.import_module("kernels._splat_triton")
        # Lowered now, for JAX would do so after all choices are made. In a thread of its own, whose JAX knows nothing
        # of the trace, mesh and settings at hand.
        with futures.ThreadPoolExecutor(1) as thread:
            thread.submit(module.try_to_lower, capability, dtypes).result()
        return module
    # jax-triton uses parts of JAX and Triton that change without notice: whatever it dies of, XLA works.
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return f"a jax-triton that works with jax {jax.__version__} and this GPU ({textwrap.shorten(said, 200)})"


@functools.cache
def _warn_of_slow_path(missing: str) -> None:
    warnings.warn(f"splat runs through XLA, its GPU kernels need {missing}; {_INSTALL}", stacklevel=2)


def _fold_batches(function: Callable) -> Callable:
    """Gives a function over a leading image axis a batching rule that merges any mapped axis into the images.

    Operands that are not mapped are broadcast first; ``vjp`` of that broadcast then sums their cotangents.
    """
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def _rule(axis_size: int, mapped: Sequence[bool], *args: jax.Array):
        wide = [
            x if is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_mapped in zip(args, mapped, strict=True)
        ]
        out = folded(*(x.reshape(axis_size * x.shape[1], *x.shape[2:]) for x in wide))
        out = jax.tree.map(
            lambda x: (
                x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:])
                if x.size
                else jnp.zeros((axis_size, wide[0].shape[1], *x.shape[1:]), x.dtype)
            ),
            out,
        )
        return out, jax.tree.map(lambda _: True, out)

    return folded
