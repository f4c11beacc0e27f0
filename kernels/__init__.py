"""Hand-written operators. Only :func:`splat` is public; the files that start with an underscore are its backends."""

from kernels.splat import DEFAULT_CUTOFF, splat

__all__ = ["DEFAULT_CUTOFF", "splat"]
