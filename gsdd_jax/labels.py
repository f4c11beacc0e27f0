"""Soft labels: what a teacher says of each image, at a stated precision, counted in bytes.

Hard labels cost nothing, since the order of the images implies them. A soft one is a row of probabilities that is
stored beside its image; D3 (Qin et al. 2024) points out that rivals leave these bytes uncounted. Here they are part of
the budget, whatever the codec.

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

D3's labels are float32, complete, softmax at temperature 1 of one teacher, of the decoded mean image.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt, Le
from jax import lax
from typing_extensions import Doc

from gsdd_jax import exchange, pixels, storage
from gsdd_jax.exchange import LABEL_INDICES, LABELS
from gsdd_jax.nets import Network
from gsdd_jax.training import inputs
from gsdd_jax.whiten import Whitening

if TYPE_CHECKING:
    from gsdd_jax.match.base import Objective

# Largest number of classes that uint16 can name.
_MOST_CLASSES = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelSpec:
    """What networks are told about distilled images, and what that costs."""

    kind: Annotated[
        Literal["hard", "soft"],
        Doc("hard: the class, which costs no byte; soft: a teacher's probabilities, part of the budget."),
    ] = "hard"
    dtype: Annotated[
        Literal["float32", "bfloat16", "uint8", "uint4"],
        Doc("Precision on disk of soft labels (D3: float32); uint8 = steps of 1/255, uint4 = squares of 0 to 15."),
    ] = "float32"
    top_k: Annotated[
        int, Ge(0), Doc("Keep only so many largest probabilities of a label, the rest spread evenly; 0 = all.")
    ] = 0
    temperature: Annotated[float, Gt(0), Doc("Logits are divided by it before the teacher's softmax (D3: 1).")] = 1.0
    hard_weight: Annotated[
        float,
        Ge(0),
        Le(1),
        Doc(
            "Share of an image's own class in its label where the teacher finds another most probable (after NCFM: 1)."
        ),
    ] = 0.0
    teacher: Annotated[
        Literal["train", "experts", "learned"],
        Doc(
            "train: networks trained on the training set as evaluate says; experts: those of the objective; learned: "
            "none, the labels are those that the objective learns beside the images."
        ),
    ] = "train"
    teachers: Annotated[
        int, Ge(1), Doc("Networks whose probabilities are averaged; the first so many of the experts (D3: 1).")
    ] = 1
    teacher_epochs: Annotated[int, Ge(1), Doc("Passes of a trained teacher over the training set (D3: 9 to 13).")] = 10
    teacher_steps: Annotated[int, Ge(0), Doc("Its training steps, in place of epochs; 0 = by epochs.")] = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftLabels:
    """The labels of a set as they are written.

    Attributes:
        spec: How; ``dtype`` and ``top_k`` count.
        num_classes: ``k``.
        arrays: As :func:`layout` describes them.
    """

    spec: LabelSpec = dataclasses.field(metadata={"static": True})
    num_classes: int = dataclasses.field(metadata={"static": True})
    arrays: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return storage.nbytes(self.arrays)

    @property
    def entry(self) -> dict[str, Any]:
        """What a manifest says of them."""
        return {"kind": "soft", "dtype": self.spec.dtype, "top_k": self.spec.top_k}

    def probabilities(self) -> jax.Array:
        """Returns the labels ``[n, k]`` as float32, each with sum 1; also under transformations, without a gradient."""
        read = partial(unpack, spec=self.spec, num_classes=self.num_classes)
        if not any(isinstance(x, jax.core.Tracer) for x in self.arrays.values()):
            return jnp.asarray(read(self.arrays))
        rows = jax.ShapeDtypeStruct((self.arrays[LABELS].shape[0], self.num_classes), jnp.float32)
        # Reading checks values and counts in float64: NumPy does it, on the host.
        return jax.pure_callback(read, rows, lax.stop_gradient(self.arrays), vmap_method="sequential")


def layout(spec: LabelSpec, num_images: int, num_classes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of the written arrays: ``labels [n, k or top_k]`` and ``label_indices [n, top_k]``.

    Raises:
        ValueError: ``top_k`` is no fewer than the classes, there are more classes than uint16 can name, or it is uint4.
    """
    if spec.kind == "hard":
        return {}
    if spec.top_k and spec.dtype == "uint4":
        raise ValueError(f"labels.top_k: expected 0 (all) with labels.dtype=uint4, found {spec.top_k}")
    if spec.top_k >= num_classes:
        raise ValueError(
            f"labels.top_k: expected 0 (all) to {num_classes - 1} with {num_classes} classes, found {spec.top_k}"
        )
    if spec.top_k and num_classes > _MOST_CLASSES:
        raise ValueError(f"labels.top_k: expected 0 (all) with {num_classes} classes, above {_MOST_CLASSES}")
    arrays = exchange.Labels(spec.dtype, spec.top_k).arrays(num_images, num_classes)
    return {name: jax.ShapeDtypeStruct(array.shape, jnp.dtype(array.dtype)) for name, array in arrays.items()}


def nbytes(spec: LabelSpec, num_images: int, num_classes: int) -> int:
    """Returns the bytes of the labels of so many images, exactly as written; 0 for hard ones.

    Raises:
        ValueError: As :func:`layout`.
    """
    return storage.nbytes(layout(spec, num_images, num_classes))


def pack(probabilities: jax.Array | np.ndarray, spec: LabelSpec) -> SoftLabels:
    """Rounds labels to what is written; on the host.

    Args:
        probabilities: ``[n, k]``, no negative ones, sum 1 in each row.
        spec: ``dtype`` and ``top_k`` count.

    Raises:
        ValueError: Rows that are no probabilities, or as :func:`layout`.
    """
    p: Any = np.asarray(probabilities, np.float64)
    if p.ndim != 2:
        raise ValueError(f"probabilities: shape {p.shape}, must be [n, k]")
    n, k = p.shape
    described = layout(dataclasses.replace(spec, kind="soft"), n, k)
    exchange.check_probabilities(p, low=1 - exchange.SUM_TOLERANCE, high=1 + exchange.SUM_TOLERANCE)
    arrays = {}
    if spec.top_k:
        chosen = np.argsort(-p, axis=1, kind="stable")[:, : spec.top_k]
        arrays[LABEL_INDICES] = chosen.astype(described[LABEL_INDICES].dtype)
        p, rest = np.take_along_axis(p, chosen, 1), p.sum(1)
        rest = np.maximum(rest - p.sum(1), 0)
    if spec.dtype == "uint8":
        parts = np.column_stack([p, rest]) if spec.top_k else p
        arrays[LABELS] = shared_out(parts, exchange.LABEL_STEPS)[:, : p.shape[1]]
    elif spec.dtype == "uint4":
        codes = np.round(exchange.LARGEST_CODE * np.sqrt(p / p.max(1, keepdims=True))).astype(np.uint8)
        codes = np.pad(codes, [(0, 0), (0, k % 2)])
        arrays[LABELS] = codes[:, ::2] << 4 | codes[:, 1::2]
    else:
        arrays[LABELS] = p.astype(np.float32).astype(jnp.dtype(spec.dtype))
    return SoftLabels(spec, k, arrays)


def unpack(arrays: dict[str, np.ndarray], spec: LabelSpec, num_classes: int) -> np.ndarray:
    """Reads written labels: float32 ``[n, k]``, each row with sum 1.

    Args:
        arrays: As :func:`layout` describes them.
        spec: ``dtype`` and ``top_k`` count.
        num_classes: ``k``.

    Raises:
        ValueError: Numbers that :func:`pack` does not write.
    """
    return exchange.soft_labels(arrays, exchange.Labels(spec.dtype, spec.top_k), num_classes)


@partial(jax.jit, static_argnames=("network", "batch"))
def label(
    params: Any,
    images: jax.Array,
    *,
    network: Network,
    temperature: jax.Array | float = 1.0,
    whitening: Whitening | None = None,
    batch: int = 500,
) -> jax.Array:
    """Asks teachers what they see: the mean of their softmax(logits / temperature).

    Args:
        params: Weights of the teachers, stacked: each array with a leading axis ``s``.
        images: ``[n, h, w, c]``, uint8 or floating point in [0,1].
        network: The teachers' network.
        temperature: > 0.
        whitening: As in ``gsdd_jax.training.train_network``.
        batch: Images per pass, bounds the memory.

    Returns:
        ``[n, k]`` float32.

    Raises:
        ValueError, TypeError: Images that are none, see `pixels.check`; values are not looked at.
    """
    pixels.check(images, real=False)
    n = images.shape[0]
    batch = min(batch, n)
    windows = jnp.arange(-(-n // batch) * batch).reshape(-1, batch)

    def one(index: jax.Array) -> jax.Array:
        # The last window is filled up with the last image.
        x = inputs(images[jnp.minimum(index, n - 1)], whitening)
        logits = lax.map(lambda teacher: network.outputs(teacher, x)[0], params)
        return jax.nn.softmax(logits / temperature).mean(0)

    rows = lax.map(one, windows)
    return rows.reshape(-1, rows.shape[-1])[:n]


def toward_class(probabilities: jax.Array, classes: jax.Array, weight: float) -> jax.Array:
    """Corrects labels whose most probable class is not the image's own: (1 - weight) p + weight one-hot.

    After NCFM (Wang et al. 2025), which replaces what the teacher gets wrong by a one-hot vector. Deviations: any
    weight, and of probabilities; there it stands for logits, so that its softmax is nearly uniform. Labels that the
    teacher gets right stay, unlike in distillation of networks (Hinton et al. 2015), which mixes the class into all.

    Args:
        probabilities: ``[n, k]``.
        classes: Integers ``[n]``.
        weight: 0 to 1.
    """
    wrong = probabilities.argmax(1) != classes
    share = jnp.where(wrong, weight, 0.0)[:, None]
    return (1 - share) * probabilities + share * jax.nn.one_hot(classes, probabilities.shape[1])


def check_learned(spec: LabelSpec, objective: Objective) -> None:
    """Tells whether labels that an objective learns are written, and those that are to be written are learned.

    Raises:
        ValueError: They are not.
    """
    learns, name = "labels" in jax.eval_shape(objective.init)[0], objective.spec.name
    if learns != (spec.kind == "soft" and spec.teacher == "learned"):
        expected = "kind=soft and teacher=learned" if learns else "another teacher than learned, or kind=hard"
        raise ValueError(
            f"labels: the objective {name} learns {'labels' if learns else 'no labels'}; expected {expected}, found "
            f"kind={spec.kind} and teacher={spec.teacher}"
        )


def onto_simplex(rows: jax.Array) -> jax.Array:
    """Returns the probabilities that are nearest to each row ``[n, k]``, by Euclidean distance.

    For objectives that learn labels: their ``learned["labels"]`` are probabilities of all images in order, and
    ``project`` keeps them such. They start one-hot, which no softmax of learned logits reaches.
    """
    # Under JAX_ENABLE_X64 optax counts the columns in float64, and gives that.
    return jax.vmap(optax.projections.projection_simplex)(rows).astype(rows.dtype)


def shared_out(parts: np.ndarray, steps: int) -> np.ndarray:
    """Shares out at most 255 steps in each row in proportion to its parts, by largest remainder; uint8."""
    exact = steps * parts / parts.sum(1, keepdims=True)
    codes = np.floor(exact)
    order = np.argsort(-(exact - codes), axis=1, kind="stable")
    left = steps - codes.sum(1, keepdims=True)
    np.put_along_axis(codes, order, np.take_along_axis(codes, order, 1) + (np.arange(parts.shape[1]) < left), 1)
    return codes.astype(np.uint8)
