"""Soft labels as numbers of a file, without JAX: their precisions, and what is checked of them.

What is written, per image of ``k`` classes:

- ``float32``: the probabilities, to the bit.
- ``bfloat16``: rounded to the nearest; divided by their sum on reading.
- ``uint8``: whole numbers of steps of 1/255 that add up to 255. Shares are rounded down, and the steps that are left go
  to the largest remainders: nothing is off by a step or more, and no label of many classes vanishes.
- ``uint4``: whole numbers of 0 to 15, two to a byte, whose squares are the parts of 1; the largest is 15. Of the ten
  classes of CIFAR-10 that is a third of the error of 15 equal steps, and of the three largest in uint8.
- ``top_k = t``: the ``t`` largest probabilities in falling order, of equals the lower class first, at another of these
  precisions, with their classes (uint8 up to 256 classes, uint16 above). What they leave of 1 is spread evenly over the
  other classes on reading. With uint8 this rest takes part in the sharing out, unwritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from gsdd_jax.errors import InputError
from gsdd_jax.exchange import LABEL_INDICES, LABELS, Array

STEPS = 255
# The code of the largest probability of a row of uint4; a code c stands for c^2 parts.
LARGEST_CODE = 15
# How far a sum of rounded probabilities may be from 1: bfloat16 is off by at most 2^-9 of it.
SUM_TOLERANCE = 0.01
# Largest number of classes that uint16 can name.
NAMED_CLASSES = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """How soft labels are written: what a manifest says of them."""

    kind: Literal["soft"] = "soft"
    dtype: Literal["float32", "bfloat16", "uint8", "uint4"]
    top_k: Annotated[int, Ge(0)]

    def arrays(self, num_images: int, num_classes: int) -> dict[str, Array]:
        """Returns the arrays that hold them: ``labels [n, k or top_k]`` and ``label_indices [n, top_k]``.

        Of uint4, ``labels [n, ceil(k / 2)]``, two in a byte.

        Raises:
            ValueError: ``top_k`` is no fewer than the classes, these are more than uint16 can name, or it is uint4.
        """
        most = 0 if self.dtype == "uint4" or num_classes > NAMED_CLASSES else num_classes - 1
        if self.top_k > most:
            what = f"{num_classes} classes and labels.dtype={self.dtype}"
            raise InputError(
                f"labels.top_k: expected 0 (all){f' to {most}' * (most > 0)} with {what}, found {self.top_k}"
            )
        if self.dtype == "uint4":
            return {LABELS: Array("uint8", (num_images, -(-num_classes // 2)))}
        shape = (num_images, self.top_k or num_classes)
        index = Array("uint8" if num_classes <= 1 << 8 else "uint16", shape)
        return {LABELS: Array(self.dtype, shape)} | ({LABEL_INDICES: index} if self.top_k else {})

    def pack(self, probabilities: Any) -> dict[str, np.ndarray]:
        """Rounds probabilities ``[n, k]``, no negative ones, sum 1 in each row, to what is written.

        Raises:
            ValueError: Rows that are no probabilities, or as `arrays`.
        """
        p: Any = np.asarray(probabilities, np.float64)
        if p.ndim != 2:
            raise InputError(f"probabilities: shape {p.shape}, must be [n, k]")
        k, described = p.shape[1], self.arrays(*p.shape)
        check_probabilities(p, low=1 - SUM_TOLERANCE, high=1 + SUM_TOLERANCE)
        arrays = {}
        if self.top_k:
            chosen = np.argsort(-p, axis=1, kind="stable")[:, : self.top_k]
            arrays[LABEL_INDICES] = chosen.astype(described[LABEL_INDICES].dtype)
            p, rest = np.take_along_axis(p, chosen, 1), p.sum(1)
            rest = np.maximum(rest - p.sum(1), 0)
        if self.dtype == "uint8":
            parts = np.column_stack([p, rest]) if self.top_k else p
            arrays[LABELS] = shared_out(parts, STEPS)[:, : p.shape[1]]
        elif self.dtype == "uint4":
            codes = np.round(LARGEST_CODE * np.sqrt(p / p.max(1, keepdims=True))).astype(np.uint8)
            codes = np.pad(codes, [(0, 0), (0, k % 2)])
            arrays[LABELS] = codes[:, ::2] << 4 | codes[:, 1::2]
        else:
            # NumPy knows bfloat16 where JAX is.
            arrays[LABELS] = p.astype(np.float32).astype(self.dtype)
        return arrays

    def unpack(self, arrays: Mapping[str, np.ndarray], num_classes: int) -> np.ndarray:
        """Reads written labels: float32 ``[n, k]``, each row with sum 1.

        Args:
            arrays: As `arrays` describes them; bfloat16 ones in any type that NumPy turns into floats.
            num_classes: ``k``.

        Raises:
            ValueError: Numbers that are no probabilities, or indices that name no class or one twice.
        """
        written = np.asarray(arrays[LABELS])
        if self.dtype == "uint4":
            return _of_codes(written, num_classes)
        values = written.astype(np.float64)
        if self.dtype == "uint8":
            values /= STEPS
        # Steps of 1/255 add up to 1 but for the rounding of float64.
        slack = 1e-9 if self.dtype == "uint8" else SUM_TOLERANCE
        check_probabilities(values, low=0 if self.top_k else 1 - slack, high=1 + slack)
        if self.top_k:
            indices = np.asarray(arrays[LABEL_INDICES]).astype(np.int64)
            ordered = np.sort(indices, axis=1)
            wrong = (ordered[:, -1] >= num_classes) | (ordered[:, 1:] == ordered[:, :-1]).any(1)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise InputError(
                    f"{LABEL_INDICES}: row {row}: expected different classes of 0 to {num_classes - 1}, "
                    f"found {indices[row].tolist()}"
                )
            rest = np.maximum(1 - values.sum(1), 0) / (num_classes - self.top_k)
            whole_rows = np.repeat(rest[:, None], num_classes, 1)
            np.put_along_axis(whole_rows, indices, values, 1)
            values = whole_rows
        elif self.dtype == "float32":
            return np.array(written)
        return (values / values.sum(1, keepdims=True)).astype(np.float32)


def _of_codes(written: np.ndarray, num_classes: int) -> np.ndarray:
    """Reads uint4: of each byte the upper half first; the last lower half of an odd number of classes is 0."""
    codes = np.stack([written >> 4, written & LARGEST_CODE], -1).reshape(len(written), -1)
    sound = (codes.max(1) == LARGEST_CODE) & (codes[:, num_classes:] == 0).all(1)
    if not sound.all():
        row = int(np.argmin(sound))
        raise InputError(
            f"{LABELS}: row {row}: expected {num_classes} codes of 4 bits, the largest {LARGEST_CODE}, "
            f"found {codes[row].tolist()}"
        )
    parts = codes[:, :num_classes].astype(np.float64) ** 2
    return (parts / parts.sum(1, keepdims=True)).astype(np.float32)


def shared_out(parts: np.ndarray, steps: int) -> np.ndarray:
    """Shares out at most 255 steps in each row in proportion to its parts, by largest remainder; uint8."""
    exact = steps * parts / parts.sum(1, keepdims=True)
    codes = np.floor(exact)
    order = np.argsort(-(exact - codes), axis=1, kind="stable")
    left = steps - codes.sum(1, keepdims=True)
    np.put_along_axis(codes, order, np.take_along_axis(codes, order, 1) + (np.arange(parts.shape[1]) < left), 1)
    return codes.astype(np.uint8)


def check_probabilities(values: np.ndarray, *, low: float, high: float) -> None:
    """Raises where a row holds no probabilities, or their sum is out of range."""
    sums = values.sum(1)
    sound = (values >= 0).all(1) & (sums >= low) & (sums <= high)
    if not sound.all():
        row = int(np.argmin(sound))
        found = f"the sum {sums[row]:g}" if (values[row] >= 0).all() else "a negative number or NaN"
        raise InputError(f"{LABELS}: row {row}: expected probabilities with sum 1, found {found}")
