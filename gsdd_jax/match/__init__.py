"""Objectives: pure losses of a synthetic set. A new one is a file here and a line in ``SPECS``."""

from gsdd_jax.match.distribution import DistributionSpec, distribution_loss
from gsdd_jax.match.gradient import GradientSpec, gradient_loss
from gsdd_jax.match.mmd import MmdSpec, feature_mmd, mmd_loss
from gsdd_jax.match.trajectory import TrajectorySpec, trajectory_loss

__all__ = [
    "SPECS",
    "DistributionSpec",
    "GradientSpec",
    "MmdSpec",
    "ObjectiveSpec",
    "TrajectorySpec",
    "distribution_loss",
    "feature_mmd",
    "gradient_loss",
    "mmd_loss",
    "trajectory_loss",
]

ObjectiveSpec = DistributionSpec | GradientSpec | TrajectorySpec
SPECS = {"distribution": DistributionSpec, "gradient": GradientSpec, "trajectory": TrajectorySpec}
