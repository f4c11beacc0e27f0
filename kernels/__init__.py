"""Hand-written operators. Only what is listed here is public; the files that start with an underscore are backends."""

from kernels.splat import DEFAULT_CUTOFF, compute_capability, splat

__all__ = ["DEFAULT_CUTOFF", "compute_capability", "splat"]
