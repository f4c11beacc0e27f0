"""What several devices share out: equality with one device, bytes summed per step, memory; and a plan for ImageNet-1K.

    python -m benchmarks.scale [--out FILE]

Everything is measured in a process of its own, whose CPU stands for eight devices, and nothing is timed: equality, the
collectives of the compiled step and the compiler's account of memory do not depend on the speed of a device. The plan
is arithmetic with stated assumptions (`plan`), not a measurement; it rests on three things that are measured here: the
operations of the networks, as XLA counts them, and the two constants of the memory model (`temporaries`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import record
from gsdd_jax import codecs, distillation, match, parallel, whiten
from gsdd_jax.batches import Data, hold
from gsdd_jax.data.sampling import ClassTable
from gsdd_jax.match import DistributionSpec, GradientSpec, TrajectorySpec
from gsdd_jax.match.trajectory import flattener
from gsdd_jax.nets import NetSpec, Network, build
from train.errors import exit_cleanly
from train.results import count_flops

SEED = 0
DEVICES = (1, 2, 4, 8)
CHANNELS = 3
# XLA's libraries for the CPU take whole networks as one operation, whose inner arrays no account of memory shows.
XLA_FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_experimental_ynn_fusion_type="
# Of the objectives' sums: scalars beside the gradient of the parameters. Loss and regularizer; for trajectory matching
# also the loss of the student, its first bad step and the gradient of its step size.
SCALARS = {"distribution": 2, "gradient": 2, "trajectory": 5}
ITEMSIZE = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}

OBJECTIVES: tuple[Any, ...] = (
    DistributionSpec(batch_real=8, class_chunk=2),
    GradientSpec(batch_real=8, class_chunk=2).for_ipc(1),
    TrajectorySpec(syn_steps=3, segments=8),
)


class Size(NamedTuple):
    """Sizes of a step: classes, side in pixels, network, images per class that are held and drawn, Gaussians."""

    classes: int
    pixels: int
    depth: int
    width: int
    held: int
    real: int
    gpc: int
    points: int
    class_chunk: int = 1

    @property
    def image(self) -> int:
        """Numbers of an image."""
        return self.pixels**2 * CHANNELS

    @property
    def parameters(self) -> int:
        """Numbers of the set."""
        return self.classes * self.gpc * self.points * (6 + CHANNELS)

    @property
    def maps(self) -> int:
        """Bytes of the feature maps of one image, one for each block of the network, before pooling."""
        return sum(4 * self.width * (self.pixels >> block) ** 2 for block in range(self.depth))


TOY = Size(classes=10, pixels=16, depth=2, width=16, held=20, real=8, gpc=4, points=6, class_chunk=2)
# The constants of memory come from the first size, with these classes per chunk, and are tried on the others.
FITTED, FITTED_CHUNKS = Size(12, 32, 3, 32, held=40, real=16, gpc=16, points=10), (3, 6)
CHECKED = (
    (4, Size(40, 64, 4, 64, held=40, real=16, gpc=24, points=10, class_chunk=5)),
    (8, Size(1000, 128, 5, 128, held=1300, real=64, gpc=200, points=54)),
)

# The plan: ImageNet-1K at the paper's settings of 128 px (Table 10 for ipc 1, Table 9 for ipc 10). It has none at
# 64 px, where these fill the budget with Gaussians per image that it uses at other sizes.
TRAIN_IMAGES, TRAIN_CLASSES, LARGEST_CLASS = 1_281_167, 1000, 1300
PLANNED = {
    (64, 1): Size(TRAIN_CLASSES, 64, 4, 128, held=LARGEST_CLASS, real=64, gpc=64, points=42),
    (64, 10): Size(TRAIN_CLASSES, 64, 4, 128, held=LARGEST_CLASS, real=64, gpc=320, points=85),
    (128, 1): Size(TRAIN_CLASSES, 128, 5, 128, held=LARGEST_CLASS, real=64, gpc=200, points=54),
    (128, 10): Size(TRAIN_CLASSES, 128, 5, 128, held=LARGEST_CLASS, real=64, gpc=640, points=170),
}
ITERATIONS = 20_000
# TF32 with dense operands, H100 and H200 SXM, and the share of it that a step is assumed to reach.
PEAK_FLOPS, REACHED = 494e12, 0.4
# Devices -> bytes per second of the slowest link of a ring: NVLink within a host, the network between hosts.
LINKS = {8: 450e9, 64: 50e9}


def own_classes(size: Size, devices: int) -> int:
    """Returns the classes of a device."""
    return parallel.per_device(size.classes, devices)


def summed_bytes(size: Size, objective: str) -> int:
    """Returns the bytes that the devices add up in a step, by the formula."""
    return 4 * (size.parameters + SCALARS[objective])


def ring_seconds(size: Size, devices: int, bytes_per_second: float) -> float:
    """Returns the time of that sum as a ring all-reduce, in which a device sends 2 (n - 1) / n times the bytes."""
    return 2 * (devices - 1) / devices * summed_bytes(size, "distribution") / bytes_per_second


def state_bytes(size: Size) -> int:
    """Returns the bytes of the parameters and of Adam's two moments."""
    return 3 * 4 * size.parameters


def temporaries(size: Size, devices: int, constants: dict[str, float]) -> float:
    """Returns the bytes that a step of distribution matching needs beside its arguments, by the model.

    These are the real images drawn, ``images`` arrays of the size of the synthetic ones, and ``maps`` copies of the
    feature maps of the synthetic images of a chunk. Real images have no backward pass; with more than about twice as
    many of them as synthetic ones their maps count instead, which is not modeled.
    """
    own = own_classes(size, devices)
    kept = own * size.image * (size.real + constants["images"] * 4 * size.gpc)
    return kept + constants["maps"] * size.class_chunk * size.gpc * size.maps


def fit_constants(first: tuple[Size, int], second: tuple[Size, int]) -> dict[str, float]:
    """Solves `temporaries` for its two constants, from what one device needs at two numbers of classes per chunk."""
    (size, need), (larger, more) = first, second
    step = (larger.class_chunk - size.class_chunk) * size.gpc * size.maps
    maps = (more - need) / step
    rest = need - maps * size.class_chunk * size.gpc * size.maps - size.classes * size.image * size.real
    return {"maps": maps, "images": rest / (4 * size.classes * size.gpc * size.image)}


def collective_bytes(program: str) -> dict[str, int]:
    """Returns the bytes of the results of each kind of collective in the text of a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    found: dict[str, int] = {}
    for shapes, kind in re.findall(rf"^\s*(?:ROOT )?%?\S+ = (.+?) ({kinds})(?:-start)?\(", program, re.MULTILINE):
        for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = math.prod(int(side) for side in sides.split(",") if side)
            found[kind] = found.get(kind, 0) + ITEMSIZE[dtype] * count
    return found


def whitening() -> whiten.MeanStd:
    """Returns some normalization."""
    return whiten.MeanStd(jnp.full(CHANNELS, 0.5), jnp.full(CHANNELS, 0.25))


def parts(size: Size) -> tuple[codecs.Codec, Network]:
    """Builds codec and network of a size, in bytes that just hold its Gaussians."""
    shape = (size.pixels, size.pixels, CHANNELS)
    codec = codecs.make(
        codecs.GaussianSpec(images_per_class=size.gpc, num_points=size.points),
        image_shape=shape,
        num_classes=size.classes,
        bytes_per_class=2 * size.parameters // size.classes,
    )
    return codec, build(NetSpec(depth=size.depth, width=size.width), shape, size.classes)


def toy_step(objective: Any, devices: int) -> dict[str, Any]:
    """Takes one step of the toy size and returns Adam's first moment, metrics, collectives and memory."""
    codec, network = parts(TOY)
    mesh = parallel.mesh_of(devices) if devices > 1 else None
    rng = np.random.default_rng(SEED)
    # Classes of different sizes, so that some device's block of images is filled up.
    counts = TOY.held + np.arange(TOY.classes)
    labels = np.repeat(np.arange(TOY.classes), counts)
    images = rng.integers(0, 256, (len(labels), *codec.image_shape), np.uint8)
    start = jnp.asarray(rng.uniform(size=(codec.num_images, *codec.image_shape)), jnp.float32)
    made = match.make(objective, codec=codec, network=network)
    state = distillation.init_state(made, codec.init(jax.random.key(SEED), start))
    key, normal = jax.random.key(SEED), whitening()
    if mesh is not None:
        state, key, normal = parallel.replicated((state, key, normal), mesh)
    own = own_classes(TOY, devices)
    if match.expert_window(made.needs) is not None:
        weights = np.stack([flattener(network)[0](network.init(jax.random.key(i))) for i in range(objective.segments)])
        target = weights + rng.normal(scale=0.01, size=weights.shape).astype(np.float32)
        segments = made.needs["segments"].put(np.stack([weights, target], axis=1), mesh)
        data = Data(normal, None, {"segments": segments})
        held = 2 * 4 * network.num_params * objective.segments // devices
    else:
        data = Data(normal, hold(images, labels, TOY.classes, mesh), {})
        most = max(int(counts[first : first + own].sum()) for first in range(0, TOY.classes, own))
        held = most * TOY.image + 4 * own * (int(counts.max()) + 1)
    step = distillation.make_step(made, mesh=mesh)
    compiled = jax.jit(step).lower(state, data, key).compile()
    after, metrics = compiled(state, data, key)
    memory: Any = compiled.memory_analysis()
    moment = optax.tree.get(after.opt_state, "mu")
    return {
        "objective": objective.name,
        "devices": devices,
        "moment": np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(moment)]),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "collectives": collective_bytes(compiled.as_text() or ""),
        "summed_formula": summed_bytes(TOY, objective.name) if devices > 1 else 0,
        "arguments": int(memory.argument_size_in_bytes),
        "arguments_formula": state_bytes(TOY) + held,
        "temporaries": int(memory.temp_size_in_bytes),
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replaces the gradients and metrics of one objective by their differences from those of one device."""
    alone = rows[0]
    moment, metrics = alone["moment"].astype(np.float64), alone["metrics"]
    if not np.linalg.norm(moment) > 0:
        raise AssertionError(f"{alone['objective']}: the gradient is zero")

    def against_one(row: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in row.items() if name not in ("moment", "metrics")}
        gradient = np.linalg.norm(row["moment"] - moment) / np.linalg.norm(moment)
        metric = max(abs(row["metrics"][name] - x) / max(abs(x), 1e-12) for name, x in metrics.items())
        return kept | {"gradient_difference": float(gradient), "metrics_difference": float(metric)}

    return [against_one(row) for row in rows]


def planned_temporaries(size: Size, devices: int) -> int:
    """Returns the bytes beside its arguments that the compiler plans for a step; nothing of that size is allocated."""
    codec, network = parts(size)
    mesh = parallel.mesh_of(devices) if devices > 1 else None
    spec = DistributionSpec(batch_real=size.real, class_chunk=size.class_chunk)
    objective, rows = match.make(spec, codec=codec, network=network), own_classes(size, devices) * devices
    params = jax.eval_shape(
        codec.init, jax.random.key(SEED), jax.ShapeDtypeStruct((codec.num_images, *codec.image_shape), np.float32)
    )
    state = jax.eval_shape(lambda params: distillation.init_state(objective, params), params)

    def array(dtype: type, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    table = ClassTable(array(np.int32, rows, size.held), array(np.int32, rows))
    held = match.Held(array(np.uint8, rows * size.held, *codec.image_shape), table)
    normal = jax.eval_shape(whitening)
    key = jax.eval_shape(lambda: jax.random.key(SEED))
    if mesh is not None:
        state, key, normal = _placed((state, key, normal), mesh, PartitionSpec())
        held = _placed(held, mesh, PartitionSpec(parallel.AXIS))
    step = distillation.make_step(objective, mesh=mesh)
    memory: Any = jax.jit(step, donate_argnums=0).lower(state, Data(normal, held, {}), key).compile().memory_analysis()
    return int(memory.temp_size_in_bytes)


def _placed(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def network_flops(size: Size) -> dict[str, float]:
    """Returns the operations of one image, as XLA counts them: forward, and forward with the gradient of the image.

    Counted at one and at two images; what an image adds is the difference. Features do not depend on the classes.
    """
    shape = (size.pixels, size.pixels, CHANNELS)
    network = build(NetSpec(depth=size.depth, width=size.width), shape, 2)
    params = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(SEED)))

    def embed(params: Any, images: jax.Array) -> jax.Array:
        return network.apply(params, images)[1]

    def gradient(params: Any, images: jax.Array) -> jax.Array:
        return jax.grad(lambda images: jnp.sum(embed(params, images) ** 2))(images)

    def count(function: Any, images: int) -> float:
        example = jax.ShapeDtypeStruct((images, *shape), np.float32)
        counted = count_flops(function, params, example)
        assert counted is not None
        return counted

    return {name: count(f, 2) - count(f, 1) for name, f in (("forward", embed), ("gradient", gradient))}


def plan(flops: dict[int, dict[str, float]], constants: dict[str, float]) -> list[dict[str, Any]]:
    """Calculates memory, communication and time of a step of distribution matching on ImageNet-1K.

    Args:
        flops: Of the network of each resolution in pixels, from `network_flops`.
        constants: Of `temporaries`.

    Returns:
        A row for each resolution, budget and number of devices; bytes are those of one device. Time is the operations
        of the networks at `REACHED` of `PEAK_FLOPS`, and the sum of the gradients, one after the other. Not in it are
        rendering, augmentation, the optimizer, and all waiting for memory.
    """
    rows = []
    for (pixels, ipc), size in PLANNED.items():
        for devices, link in LINKS.items():
            own = own_classes(size, devices)
            work = own * (size.real * flops[pixels]["forward"] + size.gpc * flops[pixels]["gradient"])
            row: dict[str, Any] = {
                "pixels": pixels,
                "ipc": ipc,
                "devices": devices,
                "gpc": size.gpc,
                "points": size.points,
                "classes": own,
                "data_bytes": round(TRAIN_IMAGES / TRAIN_CLASSES * own * size.image),
                "state_bytes": state_bytes(size),
                "gradient_bytes": 4 * size.parameters,
                "subtask_state_bytes": state_bytes(size._replace(classes=own)),
                "temporary_bytes": round(temporaries(size, devices, constants)),
                "summed_bytes": summed_bytes(size, "distribution"),
                "sum_seconds": ring_seconds(size, devices, link),
                "flops": work,
                "network_seconds": work / (REACHED * PEAK_FLOPS),
            }
            kinds = ("data", "state", "gradient", "temporary")
            row["total_bytes"] = sum(row[f"{kind}_bytes"] for kind in kinds)
            row["hours"] = ITERATIONS * (row["sum_seconds"] + row["network_seconds"]) / 3600
            rows.append(row)
    return rows


def measure() -> dict[str, Any]:
    """Measures everything in this process, which needs the devices."""
    # Nothing is timed, and XLA's own passes, which decide on memory and collectives, stay.
    jax.config.update("jax_disable_most_optimizations", True)
    steps = []
    for objective in OBJECTIVES:
        rows = []
        for devices in DEVICES:
            rows.append(toy_step(objective, devices))
            print(f"{objective.name}, {devices} devices", file=sys.stderr, flush=True)
        steps += compared(rows)
    sizes = [FITTED._replace(class_chunk=chunk) for chunk in FITTED_CHUNKS]
    need = [planned_temporaries(size, 1) for size in sizes]
    constants = fit_constants(*zip(sizes, need, strict=True))
    memory: list[dict[str, Any]] = []
    for devices, size in [*((1, size) for size in sizes), *CHECKED]:
        found = need[len(memory)] if len(memory) < len(sizes) else planned_temporaries(size, devices)
        row = {"devices": devices, **size._asdict(), "fitted": len(memory) < len(sizes), "temporaries": found}
        memory.append(row | {"formula": round(temporaries(size, devices, constants))})
        print(f"memory: {memory[-1]}", file=sys.stderr, flush=True)
    flops = {size.pixels: network_flops(size) for size in PLANNED.values()}
    return {
        "steps": steps,
        "memory": {"constants": constants, "rows": memory},
        "flops": flops,
        "plan": plan(flops, constants),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.RESULTS / "scale.json", metavar="FILE")
    parser.add_argument("--here", action="store_true", help="measure in this process, and print the JSON alone")
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measure()))
        return
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", "--here"],
        cwd=record.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    settings: dict[str, Any] = {
        "toy": TOY._asdict(),
        "iterations": ITERATIONS,
        "peak_flops": PEAK_FLOPS,
        "reached": REACHED,
        "links": LINKS,
        "train_images": TRAIN_IMAGES,
        "xla_flags": XLA_FLAGS,
    }
    print(f"wrote {record.write(args.out, json.loads(found.stdout), seed=SEED, n=1, **settings)}")


if __name__ == "__main__":
    exit_cleanly()(main)()
