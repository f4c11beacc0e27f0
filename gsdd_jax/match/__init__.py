"""Objectives: pure losses between a real and a synthetic batch. A new one is a file here and a line in ``SPECS``."""

from gsdd_jax.match.distribution import DistributionSpec, distribution_loss
from gsdd_jax.match.gradient import GradientSpec, gradient_loss

__all__ = ["SPECS", "DistributionSpec", "GradientSpec", "ObjectiveSpec", "distribution_loss", "gradient_loss"]

ObjectiveSpec = DistributionSpec | GradientSpec
SPECS = {"distribution": DistributionSpec, "gradient": GradientSpec}
