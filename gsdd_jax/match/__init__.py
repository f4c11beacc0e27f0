"""Objectives: pure losses between a real and a synthetic batch. A new one is a file here and a line in ``SPECS``."""

from gsdd_jax.match.distribution import DistributionSpec, distribution_loss

__all__ = ["SPECS", "DistributionSpec", "distribution_loss"]

SPECS = {"distribution": DistributionSpec}
