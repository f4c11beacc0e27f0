"""Sparse Gaussian images, bfloat16 on disk: the parameterization of GSDD (sections 3.1 and 3.2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import Doc

from gsdd_jax import growth, spacetime, starts, storage
from gsdd_jax.codecs.base import MOST, Codec, Draft, Layout, Shape, Spec, arrays
from gsdd_jax.later import optax
from gsdd_jax.render import render
from gsdd_jax.spacetime import render_video
from kernels import DEFAULT_CUTOFF

# Positions are kept this far inside [-1, 1]: the released code's value (paper, Eq. 11, leaves epsilon open). The
# bfloat16 of 1 - 1e-3 is 1.0, so the log of Eq. 10 is always taken of the float32 master.
CLIP_MARGIN = 1e-3
# The released code bounds 1 - x^2 from below by it in Eq. 10.
LOG_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianSpec(Spec):
    """Settings of the Gaussian codec."""

    name: Annotated[Literal["gaussian"], Doc("the parameterization")] = "gaussian"
    images_per_class: Annotated[
        int, Ge(0), Doc("Gaussian images per class (paper, appendix A); 0 = as many as the budget holds")
    ] = 0
    num_points: Annotated[
        int, Ge(0), Doc("Gaussians per image; 0 = as many as the budget holds in each of so many images")
    ] = 0
    dtype: Annotated[Literal["bfloat16", "float32"], Doc("precision on disk and in the forward pass")] = "bfloat16"
    supersample: Annotated[int, Ge(1), Le(64), Doc("samples per pixel and axis (paper, section 3.2: 2)")] = 2
    cutoff: Annotated[float, Ge(0), Lt(1), Doc("contributions with exp(-q/2) below it are zero")] = DEFAULT_CUTOFF
    boundary: Annotated[float, Ge(0), Doc("weight of the boundary loss (paper, Eq. 10 and section 4.1: 0.1)")] = 0.1
    start: Annotated[
        Literal["growth", "clusters", "gradient", "uniform"],
        Doc(
            "starting point of the fit: one Gaussian after another where the error is largest, over the first half of "
            "its steps; color clusters of the image; points on its edges; or the authors' uniform draw"
        ),
    ] = "growth"
    lr: Annotated[
        float, Gt(0), Doc("learning rate of Adam in distillation, for every leaf (paper, section 4.1: 1e-3)")
    ] = 1e-3
    lr_mean: Annotated[float, Ge(0), Doc("factor of lr for the positions")] = 1.0
    lr_cholesky: Annotated[float, Ge(0), Doc("factor of lr for the shapes")] = 1.0
    lr_color: Annotated[float, Ge(0), Doc("factor of lr for colors and opacities")] = 1.0
    NOISE = ("uniform",)
    TRAINING = (*Spec.TRAINING, "boundary")
    FORMER = Spec.FORMER | {"images_per_class": "gpc"}

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        return {"num_points": range(1, MOST), "images_per_class": range(1, MOST)}

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        *size, c = image_shape
        lead, d = (num_classes * self.images_per_class, self.num_points), len(size)
        shapes = {"mean": (*lead, d), "cholesky": (*lead, d * (d + 1) // 2), "color": (*lead, c), "opacity": lead}
        return arrays(self.dtype, shapes)


# Adam's rates when fitting images, in units that make them independent of the size of image and Gaussians: positions
# per mean spacing, shapes per radius of an equal share of the image, colors per full range. The authors use one rate
# for all leaves. Swept at 32 px with 22 and at 128 px with 107 Gaussians; opacity stays 1, since the colors already
# carry it. Videos have the same (8 frames of moving digits, 16 px, 15 Gaussians, 300 steps: 33.2 dB, and 31.6 to 34.0
# with a third or three times the rate of positions, times, shapes, motions, durations or colors, each alone).
FIT_POSITION = 0.05
FIT_SHAPE = 0.1
FIT_COLOR = 0.015


def fit_rates(size: Sequence[int], num_points: int) -> dict[str, float | np.ndarray]:
    """Returns Adam's learning rate of each leaf for fitting images or videos of a size with so many Gaussians each."""
    *frames, h, w = size
    spacing = float((np.prod(size) / num_points) ** (1 / len(size)))
    half = 0.5 * np.array([max(h, w), max(h, w), *frames])
    return {
        "mean": (FIT_POSITION * spacing / half).astype(np.float32),
        "cholesky": FIT_SHAPE * starts.EDGE_SPREAD * spacing / float(np.sqrt(np.pi)),
        "color": FIT_COLOR,
        "opacity": 0.0,
    }


def make(spec: GaussianSpec, image_shape: Shape, num_classes: int) -> Codec:
    """Builds the codec of images or, with one more side, of videos; see `gsdd_jax.codecs.make`."""
    size = image_shape[:-1]
    draw: Any = render if len(size) == 2 else render_video

    def init(key: jax.Array, images: jax.Array) -> Any:
        return starts.START[spec.start](key, jnp.asarray(images, jnp.float32), spec.num_points)

    def rounded(params: Any) -> Any:
        return jax.tree.map(lambda x: storage.quantize(x, spec.dtype), params)

    def decode(params: Any, index=None, *, size=None, key=None) -> jax.Array:
        del key
        chosen = params if index is None else params[index]
        return draw(rounded(chosen), size, supersample=spec.supersample, cutoff=spec.cutoff)

    def draw_first(params: Any, count: jax.Array) -> jax.Array:
        drawn = (jnp.arange(spec.num_points) < count).astype(params.opacity.dtype)
        return decode(dataclasses.replace(params, opacity=params.opacity * drawn))

    draft = Draft(
        lambda params, done: draw_first(params, growth.number(done, spec.num_points)),
        lambda params, done: clip_positions(params),
        functools.partial(growth.grow, draw=draw_first),
    )

    def quantize(params: Any) -> dict[str, jax.Array]:
        leaves = {name: getattr(params, name) for name in ("mean", "cholesky", "color", "opacity")}
        return storage.cast(leaves, spec.dtype)

    def dequantize(tree: dict[str, jax.Array]) -> Any:
        leaves = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in tree.items()}
        return spacetime.kind(size)(**leaves, size=size)

    def optimizer() -> optax.GradientTransformation:
        return leafwise_adam(
            {
                "mean": spec.lr * spec.lr_mean,
                "cholesky": spec.lr * spec.lr_cholesky,
                "color": spec.lr * spec.lr_color,
                "opacity": spec.lr * spec.lr_color,
            }
        )

    return Codec(
        name=spec.name,
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        quantize=quantize,
        dequantize=dequantize,
        nbytes=lambda params: storage.nbytes(jax.eval_shape(quantize, params)),
        regularize=lambda params: spec.boundary * boundary_loss(params),
        project=clip_positions,
        optimizer=optimizer,
        fitter=lambda steps: leafwise_adam(
            fit_rates(size, spec.num_points), optax.cosine_decay_schedule(1.0, steps, alpha=0.02)
        ),
        layout=lambda: spec.layout(image_shape, num_classes),
        gaussians=rounded if len(size) == 2 else lambda params: None,
        draft=draft if spec.start == "growth" else None,
    )


class Positioned(Protocol):
    """A dataclass of parameters with positions ``[n, m, 2]`` or, of videos, ``[n, m, 3]``."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def mean(self) -> jax.Array: ...


P = TypeVar("P", bound=Positioned)


def boundary_loss(params: Positioned) -> jax.Array:
    """Log-barrier that keeps centers inside the image (paper, Eq. 10), on the raw positions.

    The mean over images, Gaussians and coordinates of ``-log(1 - x^2)``, as in the released code; Eq. 10 itself
    sums the two.
    """
    return -jnp.mean(jnp.log(jnp.maximum(1 - params.mean**2, LOG_FLOOR)))


def clip_positions(params: P) -> P:
    """Clips centers to +-(1 - ``CLIP_MARGIN``) (paper, Eq. 11), after the step so that Eq. 10 keeps its gradient."""
    limit = 1 - CLIP_MARGIN
    return dataclasses.replace(params, mean=jnp.clip(params.mean, -limit, limit))


def leafwise_adam(
    rates: Mapping[str, float | np.ndarray], schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Adam (default betas) whose update of each leaf of a dataclass has its own learning rate."""

    def scale(updates: P) -> P:
        return dataclasses.replace(updates, **{name: -rate * getattr(updates, name) for name, rate in rates.items()})

    parts = [optax.scale_by_adam(), optax.stateless(lambda updates, params: scale(updates))]
    if schedule is not None:
        parts.append(optax.scale_by_schedule(schedule))
    return optax.chain(*parts)
