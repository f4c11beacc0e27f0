"""Soft labels: what a teacher says of each image, at a stated precision, counted in bytes.

Hard labels cost nothing, since the order of the images implies them. A soft one is a row of probabilities that is
stored beside its image; D3 (Qin et al. 2024) points out that rivals leave these bytes uncounted. Here they are part of
the budget, whatever the codec.

How they are written is in `soft_labels`. D3's labels are float32, complete, softmax at temperature 1 of one teacher, of
the decoded mean image.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le
from jax import lax
from typing_extensions import Doc

from gsdd_jax import pixels, storage
from gsdd_jax.errors import InputError
from gsdd_jax.exchange import LABELS
from gsdd_jax.soft_labels import Labels
from gsdd_jax.whiten import Whitening, inputs

if TYPE_CHECKING:
    from gsdd_jax.match.base import Objective
    from gsdd_jax.nets import Network


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

    @property
    def written(self) -> Labels:
        """How soft labels are written."""
        return Labels(dtype=self.dtype, top_k=self.top_k)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftLabels:
    """The labels of a set as they are written.

    Attributes:
        spec: How.
        num_classes: ``k``.
        arrays: As `gsdd_jax.soft_labels.Labels.arrays` describes them.
    """

    spec: Labels = dataclasses.field(metadata={"static": True})
    num_classes: int = dataclasses.field(metadata={"static": True})
    arrays: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return storage.nbytes(self.arrays)

    def probabilities(self) -> jax.Array:
        """Returns the labels ``[n, k]`` as float32, each with sum 1; also under transformations, without a gradient."""
        read = partial(self.spec.unpack, num_classes=self.num_classes)
        if not any(isinstance(x, jax.core.Tracer) for x in self.arrays.values()):
            return jnp.asarray(read(self.arrays))
        rows = jax.ShapeDtypeStruct((self.arrays[LABELS].shape[0], self.num_classes), jnp.float32)
        # Reading checks values and counts in float64: NumPy does it, on the host.
        return jax.pure_callback(read, rows, lax.stop_gradient(self.arrays), vmap_method="sequential")


def nbytes(spec: LabelSpec, num_images: int, num_classes: int) -> int:
    """Returns the bytes of the labels of so many images, exactly as written; 0 for hard ones.

    Raises:
        ValueError: As `gsdd_jax.soft_labels.Labels.arrays`.
    """
    if spec.kind == "hard":
        return 0
    return sum(array.nbytes for array in spec.written.arrays(num_images, num_classes).values())


def pack(probabilities: jax.Array | np.ndarray, spec: LabelSpec) -> SoftLabels:
    """Rounds labels ``[n, k]`` to what is written, whatever the ``kind``; on the host.

    Raises:
        ValueError: Rows that are no probabilities, or as `gsdd_jax.soft_labels.Labels.arrays`.
    """
    return SoftLabels(spec.written, probabilities.shape[-1], spec.written.pack(probabilities))


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
        raise InputError(
            f"labels: the objective {name} learns {'labels' if learns else 'no labels'}; expected {expected}, found "
            f"kind={spec.kind} and teacher={spec.teacher}"
        )


def onto_simplex(rows: jax.Array) -> jax.Array:
    """Returns the probabilities that are nearest to each row ``[n, k]``, by Euclidean distance.

    For objectives that learn labels: their ``learned["labels"]`` are probabilities of all images in order, and
    ``project`` keeps them such. They start one-hot, which no softmax of learned logits reaches.
    """
    import optax

    # Under JAX_ENABLE_X64 optax counts the columns in float64, and gives that.
    return jax.vmap(optax.projections.projection_simplex)(rows).astype(rows.dtype)
