"""The outer step on several devices.

Distribution matching, gradient matching and the MMD term are sums over classes, as kernel ridge regression is of real
images, and trajectory matching is a mean over segments of experts: these are what devices share out. Parameters and
optimizer are held by every device, gradients are added up between them, and every device takes the same step. A step
moves as many bytes as that sum does, which is small where a set is, and images never: but for kernel ridge regression,
which solves for all synthetic images at once and has every device gather them with their features.

Every random number of a class is drawn as if one device had all classes, so that a run on several devices is the run
on one, up to the rounding of sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gsdd_jax.errors import InputError

AXIS = "devices"


class Shard(NamedTuple):
    """Consecutive classes: those of all that one device holds."""

    own: int
    total: int
    # The first of them. Those from total on fill up, and count for nothing.
    first: jax.Array | int = 0

    @property
    def classes(self) -> jax.Array:
        """Their numbers, int32 ``[own]``."""
        return self.first + jnp.arange(self.own)

    def take(self, x: jax.Array) -> jax.Array:
        """Returns the rows ``[own, ...]`` of its classes, from those of all, ``[total, ...]``."""
        return x if self.own == self.total else x[self.classes % self.total]


def unsharded(classes: int) -> Shard:
    """Returns the shard of a device that holds all classes."""
    return Shard(classes, classes)


@dataclasses.dataclass(frozen=True)
class Axis:
    """The mesh axis along which devices take one step together, seen by each; under ``shard_map`` if several."""

    size: int = 1

    def shard(self, classes: int) -> Shard:
        """Returns the classes of this device: consecutive ones, as many as of any other."""
        if self.size == 1:
            return unsharded(classes)
        own = per_device(classes, self.size)
        return Shard(own, classes, lax.axis_index(AXIS) * own)

    def sum(self, tree: Any) -> Any:
        """Adds up what the devices hold, leaf by leaf."""
        return tree if self.size == 1 else lax.psum(tree, AXIS)

    def gather(self, x: jax.Array) -> jax.Array:
        """Lays what the devices hold end to end along the first axis."""
        return x if self.size == 1 else lax.all_gather(x, AXIS, tiled=True)

    def part(self, x: jax.Array) -> jax.Array:
        """Returns this device's part of a replicated number that ``sum`` is to give once."""
        return x if self.size == 1 else x / self.size

    def min(self, x: jax.Array) -> jax.Array:
        """Returns the smallest of what the devices hold."""
        return x if self.size == 1 else lax.pmin(x, AXIS)


def per_device(classes: int, devices: int) -> int:
    """Returns how many classes each device has; the last ones may be filled up with what counts for nothing."""
    return -(-classes // devices)


def mesh_of(devices: int) -> Mesh:
    """Returns a mesh over so many devices, the first of all processes together; 0 = all.

    Raises:
        ValueError: There are fewer, or several processes are to use only some.
    """
    every = jax.devices()
    if jax.process_count() > 1 and devices not in (0, len(every)):
        raise InputError(
            f"distill.devices: {jax.process_count()} processes share out the work among all their {len(every)} "
            f"devices; expected 0 or {len(every)}, found {devices}"
        )
    if devices > len(every):
        raise InputError(f"distill.devices: expected at most {len(every)}, as many as JAX finds; found {devices}")
    return Mesh(np.array(every[: devices or None]), (AXIS,))


def shard_step(step: Callable, mesh: Mesh, specs: Callable[[Any], Any]) -> Callable:
    """Lets the devices of a mesh take a step ``(state, data, key)`` together; see `Axis`.

    Args:
        step: What one device does; state and metrics come out replicated.
        mesh: Its devices.
        specs: From the data to their ``PartitionSpec``s.
    """
    every = PartitionSpec()

    def together(state: Any, data: Any, key: jax.Array) -> Any:
        # What comes out is replicated because the step adds up, which JAX's check of it cannot see in derivatives that
        # are written by hand.
        wrapped = jax.shard_map(
            step, mesh=mesh, in_specs=(every, specs(data), every), out_specs=(every, every), check_vma=False
        )
        return wrapped(state, data, key)

    return together


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays, or random keys, on every device of a mesh; every process must have the same."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(put, tree)


def sharded(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Cuts an array's first axis among the devices of a mesh; a process gives the part of its own devices."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(AXIS)), array)


def local(tree: Any) -> Any:
    """Returns what is replicated on all devices, as arrays of this process's first one."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def local_indices(mesh: Mesh) -> list[int]:
    """Returns the indices in a mesh of this process's devices."""
    return [index for index, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]


def own_classes(classes: int, mesh: Mesh) -> np.ndarray:
    """Returns the classes of each of this process's devices, int ``[its devices, own]``; those from k on fill up."""
    own = per_device(classes, mesh.size)
    return np.array(local_indices(mesh))[:, None] * own + np.arange(own)
