"""Objectives behind one interface: what is matched between real and synthetic images.

A new one is a file here, with a spec whose ``name`` is a ``Literal`` and a function ``make``, and its spec in
``SPECS``; docs/add_objective.md has an example.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, get_args, get_type_hints

import flax.core

from gsdd_jax.augment import DsaSpec
from gsdd_jax.codecs import Codec
from gsdd_jax.errors import InputError
from gsdd_jax.match.base import Batch, Objective, Synthetic
from gsdd_jax.match.distribution import DistributionSpec, ExpertNetwork, distribution_loss
from gsdd_jax.match.gradient import GradientSpec, gradient_loss
from gsdd_jax.match.kernel_ridge import KernelRidgeSpec
from gsdd_jax.match.mmd import MmdSpec, feature_mmd, mmd_loss, with_mmd
from gsdd_jax.match.needs import (
    ExpertNetworks,
    ExpertSegments,
    ExpertWeights,
    Held,
    Need,
    RealImages,
    Source,
    expert_window,
)
from gsdd_jax.match.trajectory import TrajectorySpec, trajectory_loss
from gsdd_jax.nets import Network

__all__ = [
    "SPECS",
    "Batch",
    "DistributionSpec",
    "ExpertNetwork",
    "ExpertNetworks",
    "ExpertSegments",
    "ExpertWeights",
    "GradientSpec",
    "Held",
    "KernelRidgeSpec",
    "MmdSpec",
    "Need",
    "Objective",
    "RealImages",
    "Source",
    "Synthetic",
    "TrajectorySpec",
    "distribution_loss",
    "expert_window",
    "feature_mmd",
    "gradient_loss",
    "make",
    "mmd_loss",
    "register",
    "resolved",
    "trajectory_loss",
    "with_mmd",
]

SPECS: dict[str, type] = {
    "distribution": DistributionSpec,
    "gradient": GradientSpec,
    "kernel_ridge": KernelRidgeSpec,
    "trajectory": TrajectorySpec,
}
"""The registry: the specs of all objectives, those of `register` included, by name."""


def register(spec: type) -> type:
    """Adds an objective from outside the package, by the ``name`` of its spec; a class decorator.

    The function ``make(spec, codec, network, augment) -> Objective`` is looked up in the module of the spec.
    """
    SPECS[get_args(get_type_hints(spec)["name"])[0]] = spec
    return spec


def make(
    spec: Any, *, codec: Codec, network: Network, augment: DsaSpec | None = None, mmd: MmdSpec | None = None
) -> Objective:
    """Builds the objective of a spec.

    Args:
        spec: Which objective and its settings, as `resolved` fills them in.
        codec: How the synthetic images are stored.
        network: The architecture that matches.
        augment: DSA settings; the default ones if None.
        mmd: The MMD term; none if None or of weight 0.

    Raises:
        ValueError: There is no such objective, settings are left open, the MMD term has too few images, or the network
            is none for the codec's images and classes.
        TypeError: The network has weights that cannot be trained.
    """
    name = getattr(spec, "name", spec)
    if SPECS.get(name) is not type(spec):
        raise InputError(f"objective.name: expected one of {', '.join(SPECS)}; found {name!r}")
    network.check(codec.image_shape, codec.num_classes)
    return _made(spec, codec, network, augment or DsaSpec(), mmd or MmdSpec())


# One object for one objective: what is jitted with it is traced once, however often it is made.
@functools.lru_cache(maxsize=64)
def _made(spec: Any, codec: Codec, network: Network, augment: DsaSpec, mmd: MmdSpec) -> Objective:
    objective = with_mmd(sys.modules[type(spec).__module__].make(spec, codec, network, augment), mmd)
    return objective._replace(needs=flax.core.freeze(objective.needs))


def resolved(spec: Any, ipc: float) -> Any:
    """Returns the settings with what follows from the budget, ``ipc`` float32 pixel images per class, filled in."""
    return spec.for_ipc(ipc) if hasattr(spec, "for_ipc") else spec
