"""What each outer step is given, built from what its objective needs: for one device, a mesh, or from the host."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gsdd_jax import parallel, pixels
from gsdd_jax.data.host import prefetch
from gsdd_jax.data.sampling import ClassTable, class_index, class_table
from gsdd_jax.errors import InputError
from gsdd_jax.match.needs import Held, Need, Source
from gsdd_jax.whiten import Whitening

# Bits of a seed of `Source`; those above tell the needs of a step apart.
_SEED_BITS = 60


class Data(NamedTuple):
    """The argument of an outer step.

    Attributes:
        whitening: What networks see images through; its arrays travel here so that no executable holds them.
        held: The training set, where it stays on the device: needs that can be drawn from it are, inside the step.
        drawn: What the host drew, by the names of the needs.
    """

    whitening: Whitening
    held: Held | None
    drawn: Mapping[str, Any]


def hold(images: np.ndarray, labels: np.ndarray, num_classes: int, mesh: Mesh | None = None) -> Held:
    """Puts a training set on the device, or each class on that device of a mesh whose shard it is in.

    Args:
        images: Real ones ``[n, h, w, c]``, uint8 or floating point in [0,1], also in a process that has only some of
            the devices.
        labels: Integers ``[n]``.
        num_classes: k.
        mesh: The devices, where there are several.

    Raises:
        ValueError, TypeError: Images that are none, see `pixels.check`, or labels that do not fit, see `class_table`.
    """
    images = pixels.check(images)
    if len(images) != len(labels):
        raise InputError(f"labels: found {len(labels)} of them for {len(images)} images; expected one per image")
    if mesh is None:
        return Held(jnp.asarray(images), class_table(labels, num_classes))
    index, count = class_index(labels, num_classes)
    own = parallel.per_device(num_classes, mesh.size)
    held = max(int(count[first : first + own].sum()) for first in range(0, num_classes, own))
    parts, tables, counts = [], [], []
    for classes in parallel.own_classes(num_classes, mesh):
        known = classes[classes < num_classes]
        members = [index[label, : count[label]] for label in known]
        part = np.zeros((held, *images.shape[1:]), images.dtype)
        mine = np.concatenate(members) if members else np.zeros(0, np.int32)
        part[: len(mine)] = images[mine]
        ends = np.cumsum(count[known])
        # As long as the rows of the whole table, or draws would differ from it.
        rows = [end - n + np.resize(np.arange(n), index.shape[1]) for end, n in zip(ends, count[known], strict=True)]
        fill = len(classes) - len(known)
        parts.append(part)
        tables.append(np.stack([*rows, *np.zeros((fill, index.shape[1]))]).astype(np.int32))
        counts.append(np.concatenate([count[known], np.ones(fill, count.dtype)]))
    of_all, *table = (parallel.sharded(np.concatenate(x), mesh) for x in (parts, tables, counts))
    return Held(of_all, ClassTable(*table))


def device_data(images: Any, labels: Any, whitening: Whitening) -> Data:
    """Returns the data of all steps at once, for objectives that need real images alone, held on the device.

    Args:
        images: ``[n, h, w, c]``, uint8 or floating point in [0,1].
        labels: Integers ``[n]``, of every class from 0 on.
        whitening: What networks see images through, such as ``whiten.fit("meanstd", images)``.

    Raises:
        ValueError, TypeError: As `hold`.
    """
    labels = np.asarray(labels)
    return Data(whitening, hold(np.asarray(images), labels, int(labels.max(initial=0)) + 1), {})


def batches(
    needs: Mapping[str, Need],
    source: Source,
    *,
    first: int = 0,
    last: int,
    mesh: Mesh | None = None,
    on_host: bool = False,
) -> Generator[Data, None, None]:
    """Yields the data of the steps ``first`` to ``last - 1``, a pure function of the source and the step.

    Closing the generator ends the threads that read ahead.

    Args:
        needs: Of the objective.
        source: Where they are found.
        first: First step.
        last: The step after the last.
        mesh: The devices, where there are several.
        on_host: Draw everything on the host, for training sets that do not fit the device.

    Raises:
        ValueError, TypeError: Images, labels or a seed that are none.
    """
    inside = {} if on_host else {name: need for name, need in needs.items() if _drawn_inside(need)}
    if len(inside) < len(needs) and not 0 <= source.seed < 1 << _SEED_BITS:
        raise InputError(f"seed: expected 0 to 2**{_SEED_BITS} - 1, found {source.seed}")
    held = hold(source.images, source.labels, source.num_classes, mesh) if inside else None
    whitening = source.whitening if mesh is None else parallel.replicated(source.whitening, mesh)
    with contextlib.ExitStack() as open_streams:
        streams = {}
        for position, (name, need) in enumerate(needs.items()):
            if name not in inside:
                streams[name] = prefetch(need.sampler(source, source.seed + (position << _SEED_BITS), mesh), first)
                open_streams.callback(streams[name].close)
        for _ in range(first, last):
            drawn = {name: needs[name].put(next(stream)[1], mesh) for name, stream in streams.items()}
            yield Data(whitening, held, drawn)


def example(needs: Mapping[str, Need], source: Source, *, num_params: int, on_host: bool = False) -> Data:
    """Returns shapes and dtypes of the data of a step on one device; computes nothing.

    Args:
        needs: Of the objective.
        source: Where they are found; shapes and dtypes do for the arrays of its whitening.
        num_params: Weights of the network.
        on_host: As for `batches`.
    """
    inside = set() if on_host else {name for name, need in needs.items() if _drawn_inside(need)}
    held = jax.eval_shape(lambda: hold(source.images, source.labels, source.num_classes)) if inside else None
    drawn = {name: need.shape(source, num_params) for name, need in needs.items() if name not in inside}
    return Data(jax.eval_shape(lambda whitening: whitening, source.whitening), held, drawn)


def specs(needs: Mapping[str, Need]) -> Any:
    """Returns a function from data to how they are spread over the devices of a mesh."""

    def of(data: Data) -> Data:
        held = None if data.held is None else PartitionSpec(parallel.AXIS)
        return Data(PartitionSpec(), held, {name: needs[name].partition for name in data.drawn})  # type: ignore[arg-type]

    return of


def _drawn_inside(need: Need) -> bool:
    return type(need).draw is not Need.draw
