"""The static settings of the splat operator, shared by its backends."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import SupportsIndex

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplatSpec:
    """What a splat compiles for.

    Attributes:
        height: Rows of the image.
        width: Columns of the image.
        supersample: ``s``; a pixel is the mean of ``s * s`` samples at ``(i + 1/2) / s``.
        cutoff: Contributions with ``exp(-q / 2)`` below it are zero; 0 keeps them all.
        backend: ``"auto"`` picks by platform; ``"xla"`` forces the portable path, ``"triton"`` the GPU kernels.
        capability: Compute capability to compile the GPU kernels for, 90 for 9.0; None is that of the GPU at hand.
    """

    height: int
    width: int
    supersample: int
    cutoff: float
    backend: str = "auto"
    capability: int | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "supersample"):
            object.__setattr__(self, name, integer(getattr(self, name), name))
        if not (isinstance(self.cutoff, int | float) and math.isfinite(self.cutoff) and 0 <= self.cutoff < 1):
            raise ValueError(f"cutoff: expected a number in [0, 1), found {self.cutoff!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; found {self.backend!r}")


def integer(value: SupportsIndex, name: str) -> int:
    """Returns a count as Python's own integer, whichever kind it is of, NumPy's too.

    Raises:
        ValueError: It is none, or below 1.
    """
    # Neither is a count, though both pass for one.
    found = None if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__") else operator.index(value)
    if found is None or found < 1:
        raise ValueError(f"{name}: expected an integer >= 1, found {value!r}")
    return found


BACKENDS = ("auto", "xla", "triton")
