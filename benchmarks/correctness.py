"""Values, gradients and bits of the GPU kernels against the XLA path; the stage ``correctness`` of `benchmarks.gpu`.

The reference is computed on the CPU in float64. Samples that rounding may put on either side of the cutoff are found,
and the error that they explain is allowed; all else has the tolerances of the tests. Equality of runs is bit for bit.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import figure5, record, table16, timing
from gsdd_jax.gaussians import Gaussians, to_pixels
from kernels import DEFAULT_CUTOFF, splat
from kernels.spec import SplatSpec

SEED = 0
# Share of the larger of 1 and the largest value, and of the largest gradient; as in tests/test_splat.py.
TOLERANCES = {"images": 1e-5, "centers": 1e-4, "conics": 1e-4, "colors": 1e-4}
# float32 knows exp(-q/2) to about this, relative; a sample so close to the cutoff may fall on either side.
AMBIGUOUS = 2e-4
BFLOAT16_ROUNDING = 2.0**-8
RUNS_UNDER_LOAD = 20
# (images, Gaussians per image, pixels per edge) of what runs twice, and of what keeps the device busy meanwhile.
REPEATED = (256, 170, 128)
LOAD = (2000, 54, 128)
SMOKE_SHAPE = (2, 6, 16)


class Case(NamedTuple):
    """Operands of the operator in pixel space, on the host, and its settings."""

    name: str
    operands: tuple[np.ndarray, np.ndarray, np.ndarray]
    height: int
    width: int
    supersample: int = 2
    cutoff: float = DEFAULT_CUTOFF

    @property
    def spec(self) -> SplatSpec:
        """The settings, as the backends take them."""
        return SplatSpec(height=self.height, width=self.width, supersample=self.supersample, cutoff=self.cutoff)

    def cotangent(self) -> np.ndarray:
        """Returns a fixed float32 cotangent of the images."""
        shape = (len(self.operands[0]), self.height, self.width, self.operands[2].shape[2])
        return np.random.default_rng(SEED).standard_normal(shape, np.float32)


@functools.cache
def operator(height: int, width: int, supersample: int, cutoff: float, backend: str) -> Callable[..., Any]:
    """Returns the jitted function from operands and cotangent to the images and the three gradients."""

    def function(centers: jax.Array, conics: jax.Array, colors: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        draw = functools.partial(
            splat, height=height, width=width, supersample=supersample, cutoff=cutoff, backend=backend
        )
        images, pull = jax.vjp(draw, centers, conics, colors)
        return images, *pull(v)

    return jax.jit(function)


def _scenes() -> Any:
    """Imports tests/scenes.py, which is no package."""
    spec = importlib.util.spec_from_file_location("scenes", record.ROOT / "tests" / "scenes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_cpu() -> Any:
    """Returns a context in which JAX computes on the CPU."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


_to_pixels = jax.jit(to_pixels, static_argnums=1)


def case(
    name: str, g: Gaussians, dtype: Any = np.float32, *, size: tuple[int, int] | None = None, **settings: Any
) -> Case:
    """Maps Gaussians to pixel space, on the CPU."""
    with on_cpu():
        splats = _to_pixels(jax.device_put(g, jax.local_devices(backend="cpu")[0]), size)
    height, width = size or g.size
    centers, conics, colors = (np.asarray(x).astype(dtype) for x in splats)
    return Case(name, (centers, conics, colors), height, width, **settings)


def scene(n: int, m: int, pixels: int, dtype: Any = np.float32) -> Case:
    """Returns Gaussians like those of fitted images, as a case."""
    return case(f"{n} x {m}, {pixels} px", figure5.gaussians(n, m, pixels), dtype)


def cases(smoke: bool) -> list[Case]:
    """Returns the hostile scenes of the tests, theirs of other shapes, and larger ones."""
    scenes = _scenes()
    chosen = list(scenes.HOSTILE.items())[: 2 if smoke else None]
    hostile = [case(name, make()) for name, make in chosen]
    if smoke:
        return [*hostile, case("bfloat16", scenes.random(), jnp.bfloat16)]
    random = functools.partial(scenes.random, n=2)
    wide = random(m=40, size=(100, 129), seed=20)
    wide = Gaussians(wide.mean, 6 * wide.cholesky, wide.color, wide.opacity, size=wide.size)
    return [
        *hostile,
        *(one._replace(name=f"{one.name}, no cutoff", cutoff=0.0) for one in hostile),
        *(one._replace(name=f"{one.name}, cutoff 0.05", cutoff=0.05) for one in hostile),
        *(case(name, g, **settings) for name, (g, settings) in scenes.shaped().items()),
        case("five channels", random(m=33, size=(32, 48), channels=5, seed=21)),
        case("one Gaussian", random(m=1, size=(129, 32), channels=1, seed=22), supersample=1),
        case("64 x 96, 16 samples", random(m=170, size=(64, 96), seed=23), supersample=4),
        case("96 x 65, 9 samples", random(m=54, size=(96, 65), channels=4, seed=24), supersample=3),
        case("2730 Gaussians", random(n=1, m=2730, size=(129, 97), seed=25)),
        case("wide Gaussians", wide),
        case("wide Gaussians, no cutoff", wide, cutoff=0.0),
        case("bfloat16", random(m=54, size=(64, 64), seed=26), jnp.bfloat16),
        case("bfloat16, five channels", random(m=12, size=(33, 40), channels=5, seed=27), jnp.bfloat16),
    ]


class Reference(NamedTuple):
    """What a case should give: images and gradients in float64, and the most that ambiguous samples can move them."""

    wanted: list[np.ndarray]
    slack: list[np.ndarray]
    float32: list[np.ndarray]


def reference(one: Case) -> Reference:
    """Draws a case through XLA on the CPU, in float64 and, for comparison, in float32."""
    v = one.cotangent()
    op = operator(*one[2:], "xla")
    with on_cpu():
        single = [np.asarray(x, np.float64) for x in op(*one.operands, v)]
        with jax.enable_x64(True):
            double = [np.asarray(x) for x in op(*(x.astype(np.float64) for x in (*one.operands, v)))]
    return Reference(double, slack(one, v), single)


def slack(one: Case, v: np.ndarray) -> list[np.ndarray]:
    """Returns how far samples that may lie on either side of the cutoff can move the images and each gradient."""
    centers, conics, colors = (np.asarray(x, np.float64) for x in one.operands)
    s, out = one.supersample, [np.zeros(x.shape) for x in (v, centers, conics, colors)]
    if one.cutoff == 0:
        return out
    x = (np.arange(one.width * s) + 0.5) / s
    y = (np.arange(one.height * s) + 0.5)[:, None] / s
    for i, k in np.ndindex(*centers.shape[:2]):
        (cx, cy), (p, r, q) = centers[i, k], conics[i, k]
        u = p * (x - cx) + r * (y - cy)
        w = np.exp(-0.5 * (u**2 + (q * (y - cy)) ** 2))
        row, column = np.nonzero(np.abs(w - one.cutoff) <= AMBIGUOUS * one.cutoff)
        w, u, dx, dy = w[row, column] / s**2, np.abs(u[row, column]), np.abs(x[column] - cx), np.abs(y[row, 0] - cy)
        pixel = (i, row // s, column // s)
        np.add.at(out[0], pixel, w[:, None] * np.abs(colors[i, k]))
        v_weight = w * np.abs(v[pixel] @ colors[i, k])
        out[1][i, k] = np.sum(v_weight * np.stack([p * u, abs(r) * u + q**2 * dy]), axis=1)
        out[2][i, k] = np.sum(v_weight * np.stack([u * dx, u * dy, q * dy**2]), axis=1)
        out[3][i, k] = w @ np.abs(v[pixel])
    return out


def errors(one: Case, found: Iterable[Any], expected: Reference) -> dict[str, dict[str, float]]:
    """Returns the largest error of each operand, relative to its scale: all of it, and what no slack explains."""
    rows = {}
    for i, (name, one_found) in enumerate(zip(TOLERANCES, found, strict=True)):
        wanted, allowed = expected.wanted[i], expected.slack[i]
        if one_found.dtype == jnp.bfloat16:
            allowed = allowed + BFLOAT16_ROUNDING * np.abs(wanted)
        largest = float(np.abs(wanted).max())
        scale = max(1.0, largest) if name == "images" else largest or 1.0
        difference = np.abs(np.asarray(one_found, np.float64) - wanted)
        rows[name] = {
            "error": float(difference.max() / scale),
            "beyond_slack": float(np.maximum(difference - allowed, 0).max() / scale),
            "xla_float32_error": float(np.abs(expected.float32[i] - wanted).max() / scale),
            "tolerance": TOLERANCES[name],
        }
    return rows


def run(
    deadline: timing.Deadline, *, backend: str, smoke: bool, save: Callable[[Any], Any] = lambda results: None
) -> tuple[dict[str, Any], list[str]]:
    """Compares values and gradients with float64, and bits with bits.

    Args:
        deadline: Cases that it leaves no time for count as failures.
        backend: The backend under test.
        smoke: Few cases, tiny sizes.
        save: Called with the results so far before each case, so that one that never ends can be told.

    Returns:
        The results, and a line for each check that failed.
    """
    bits = {"poison": poison(backend), "repeats": repeatability(backend, smoke=smoke)}
    failures = [f"{group}: {name}" for group, checks in bits.items() for name, passed in checks.items() if not passed]
    rows: list[dict[str, Any]] = []
    todo = cases(smoke)
    # References compile on the CPU for longer than the kernels run.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(reference, one) for one in todo]
        for one, job in zip(todo, jobs, strict=True):
            row: dict[str, Any] = {"case": one.name, "shape": [*one.operands[2].shape], "size": [one.height, one.width]}
            row |= {"supersample": one.supersample, "cutoff": one.cutoff, "dtype": str(one.operands[0].dtype)}
            rows.append(row)
            save({"bits": bits, "cases": rows})
            if deadline.left() <= 0:
                job.cancel()
                row["skipped"] = "out of time"
                failures.append(f"{one.name}: not checked, out of time")
                continue
            try:
                found = operator(*one[2:], backend)(*map(jnp.asarray, one.operands), one.cotangent())
                row["operands"] = errors(one, found, job.result())
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:1000]}"
                failures.append(f"{one.name}: {row['error']}")
                continue
            # NaN passes no comparison.
            row["passed"] = all(x["beyond_slack"] <= x["tolerance"] for x in row["operands"].values())
            if not row["passed"]:
                failures.append(f"{one.name}: {row['operands']}")
    worst = {
        name: max((row["operands"][name]["beyond_slack"] for row in rows if "operands" in row), default=None)
        for name in TOLERANCES
    }
    done = sum("operands" in row for row in rows)
    print(f"{done} of {len(rows)} cases, {len(failures)} failures; worst beyond slack: {worst}; {bits}")
    return {"worst": worst, "bits": bits, "cases": rows}, failures


def poison(backend: str) -> dict[str, bool]:
    """Checks that NaN in one operand of one image spoils that image and its gradients and nothing else."""
    one = case("poison", _scenes().random(seed=30))
    op, v = operator(*one[2:], backend), one.cotangent()
    clean = [np.asarray(x) for x in op(*one.operands, v)]
    passed = {}
    for i, name in enumerate(("centers", "conics", "colors")):
        spoilt = [x.copy() for x in one.operands]
        spoilt[i][1, 5, 0] = np.nan
        found = [np.asarray(x) for x in op(*spoilt, v)]
        others = all(np.array_equal(a[0], b[0]) for a, b in zip(found, clean, strict=True))
        passed[name] = others and all(np.isnan(x[1]).all() for x in found)
    return passed


def repeatability(backend: str, *, smoke: bool) -> dict[str, bool]:
    """Checks that equal inputs give equal bits: again, under load, and as a vmap over a further axis."""
    n, m, pixels = SMOKE_SHAPE if smoke else REPEATED
    one = scene(n, m, pixels)
    op = operator(*one[2:], backend)
    args = [jnp.asarray(x) for x in (*one.operands, one.cotangent())]
    first = op(*args)
    other = scene(*(SMOKE_SHAPE if smoke else LOAD))
    load_args = [jnp.asarray(x) for x in (*other.operands, other.cotangent())]
    load = operator(*other[2:], backend)
    under_load = []
    for _ in range(2 if smoke else RUNS_UNDER_LOAD):
        # Not waited for: it evicts the caches, and runs into ours where the device allows it.
        load(*load_args)
        under_load.append(table16.same_bits(op(*args), first))
    folded = jax.jit(jax.vmap(op))(*(x.reshape(2, n // 2, *x.shape[1:]) for x in args))
    folded = tuple(x.reshape(n, *x.shape[2:]) for x in folded)
    return {
        "two_runs": table16.same_bits(op(*args), first),
        "runs_under_load": all(under_load),
        "vmap_equals_one_batch": table16.same_bits(folded, first),
    }
