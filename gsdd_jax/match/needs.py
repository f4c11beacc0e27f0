"""What an objective asks to be given in each step, and how it gets there: from the device, a mesh or the host.

A need is a small class like those here; an objective may bring one of its own. Its values come from `Need.draw`, inside
the compiled step, where the training set is held on the device; else from `Need.sampler`, on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gsdd_jax import parallel
from gsdd_jax.augment import DsaSpec
from gsdd_jax.data.host import HostSampler, Sampler
from gsdd_jax.data.sampling import ClassTable, sample_classes
from gsdd_jax.errors import InputError
from gsdd_jax.nets import Network
from gsdd_jax.parallel import Shard

if TYPE_CHECKING:
    from gsdd_jax.experts import Experts
    from gsdd_jax.match.distribution import DistributionSpec
    from gsdd_jax.match.trajectory import TrajectorySpec


class Held(NamedTuple):
    """A training set that stays on the device; of several devices, each has the images of its classes."""

    images: jax.Array  # [N, h, w, c], uint8 or float32 in [0,1]
    table: ClassTable


class Source(NamedTuple):
    """Where the host finds what is needed.

    Attributes:
        images: Real training images ``[N, h, w, c]``, uint8 or floating point in [0,1].
        labels: Integers ``[N]``.
        num_classes: ``k``.
        whitening: What networks see images through.
        seed: Of what the host draws, 0 to 2**60 - 1.
        experts: Those of trajectory matching, or whose networks match.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    whitening: Any
    seed: int = 0
    experts: Experts | None = None


class Need:
    """What an objective asks for under one name.

    Attributes:
        partition: How its array is spread over the devices of a mesh.
    """

    partition: ClassVar[PartitionSpec] = PartitionSpec()

    def check(self, devices: int) -> None:
        """Raises ValueError where so many devices cannot share it out."""

    def draw(self, key: jax.Array, held: Any, shard: Shard) -> Any:
        """Draws it inside the step from a ``Held`` training set; left as it is where only the host can."""

    def sampler(self, source: Source, seed: int, mesh: Mesh | None) -> Sampler:
        """Returns what draws it on the host, as a pure function of the step."""
        raise NotImplementedError

    def put(self, array: np.ndarray, mesh: Mesh | None) -> jax.Array:
        """Puts what the host drew on the device, or on those of a mesh."""
        return jnp.asarray(array) if mesh is None else parallel.replicated(array, mesh)

    def shape(self, source: Source, num_params: int) -> jax.ShapeDtypeStruct:
        """Returns what ``put`` gives on one device, for a network of so many weights."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RealImages(Need):
    """Real images of every class, drawn anew in each step: ``[k, per_class, h, w, c]``, uint8 or in [0,1]."""

    per_class: int
    partition = PartitionSpec(parallel.AXIS)

    def draw(self, key: jax.Array, held: Any, shard: Shard) -> jax.Array:  # noqa: D102
        return held.images[sample_classes(key, held.table, self.per_class, shard)]

    def sampler(self, source: Source, seed: int, mesh: Mesh | None) -> Sampler:  # noqa: D102
        k, classes = source.num_classes, None
        if mesh is not None:
            # What fills up repeats a class, which costs least where all have images.
            classes = parallel.own_classes(k, mesh).reshape(-1) % k
        return HostSampler(
            source.images, source.labels, num_classes=k, batch=self.per_class, seed=seed, classes=classes
        )

    def put(self, array: np.ndarray, mesh: Mesh | None) -> jax.Array:  # noqa: D102
        return jnp.asarray(array) if mesh is None else parallel.sharded(array, mesh)

    def shape(self, source: Source, num_params: int) -> jax.ShapeDtypeStruct:  # noqa: D102
        del num_params
        images = source.images
        return jax.ShapeDtypeStruct((source.num_classes, self.per_class, *images.shape[1:]), images.dtype)


@dataclasses.dataclass(frozen=True)
class ExpertSegments(Need):
    """Segments of expert trajectories, ``[segments, 2, p]``: flat weights of starts and targets."""

    objective: TrajectorySpec
    partition = PartitionSpec(parallel.AXIS)

    def check(self, devices: int) -> None:  # noqa: D102
        if self.objective.segments % devices:
            raise InputError(
                f"objective.segments: {devices} devices share out the segments of trajectory matching evenly; expected "
                f"a multiple of {devices}, found {self.objective.segments} (or set distill.devices)"
            )

    def sampler(self, source: Source, seed: int, mesh: Mesh | None) -> Sampler:  # noqa: D102
        from gsdd_jax.experts import Segments  # which imports the objective

        del mesh
        return Segments(_experts(source), self.objective, seed=seed)

    def put(self, array: np.ndarray, mesh: Mesh | None) -> jax.Array:  # noqa: D102
        if mesh is None:
            return jnp.asarray(array)
        by_device = array.reshape(mesh.size, -1, *array.shape[1:])
        return parallel.sharded(np.concatenate(by_device[parallel.local_indices(mesh)]), mesh)

    def shape(self, source: Source, num_params: int) -> jax.ShapeDtypeStruct:  # noqa: D102
        del source
        return jax.ShapeDtypeStruct((self.objective.segments, 2, num_params), jnp.float32)


@dataclasses.dataclass(frozen=True)
class ExpertWeights(Need):
    """Flat weights ``[p]``, after its last epoch, of the expert that a step's first segment is from."""

    objective: TrajectorySpec

    def sampler(self, source: Source, seed: int, mesh: Mesh | None) -> Sampler:  # noqa: D102
        from gsdd_jax.experts import FinalWeights

        del seed, mesh
        return FinalWeights(_experts(source), self.objective, seed=source.seed)

    def shape(self, source: Source, num_params: int) -> jax.ShapeDtypeStruct:  # noqa: D102
        del source
        return jax.ShapeDtypeStruct((num_params,), jnp.float32)


@dataclasses.dataclass(frozen=True)
class ExpertNetworks(Need):
    """A trained network and what all real images are under it, an `ExpertNetwork` of distribution matching."""

    objective: DistributionSpec
    network: Network
    augment: DsaSpec

    def sampler(self, source: Source, seed: int, mesh: Mesh | None) -> Sampler:  # noqa: D102
        from gsdd_jax.expert_networks import Networks

        del mesh
        return Networks(_experts(source), self, source, seed=seed)

    def put(self, array: Any, mesh: Mesh | None) -> Any:  # noqa: D102
        return jax.tree.map(jnp.asarray, array) if mesh is None else parallel.replicated(array, mesh)

    def shape(self, source: Source, num_params: int) -> Any:  # noqa: D102
        from gsdd_jax.expert_networks import shapes

        return shapes(self, source, num_params)


def expert_window(needs: Mapping[str, Need]) -> TrajectorySpec | DistributionSpec | None:
    """Returns the settings whose ``last_epoch`` says which experts are needed; None for none."""
    found = (need.objective for need in needs.values() if isinstance(need, ExpertSegments | ExpertNetworks))
    return next(found, None)


def _experts(source: Source) -> Experts:
    if source.experts is None:
        raise InputError("experts: this objective needs trained ones, found None; see gsdd_jax.experts")
    return source.experts
