"""Training of one network on a set of images: optimizer, schedule, stream of batches, averaged weights.

Nothing here sees test images; `gsdd_jax.evaluation` tests what comes out.
"""

import dataclasses
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt, Le, Lt
from jax import lax
from typing_extensions import Doc

from gsdd_jax import pixels
from gsdd_jax.augment import DsaSpec, cutmix, dsa
from gsdd_jax.errors import InputError
from gsdd_jax.nets import Network
from gsdd_jax.whiten import Whitening, inputs

Schedule: TypeAlias = Literal["constant", "step", "multistep", "cosine", "warmup_cosine"]
# Where GLaD's warm-up starts, as a factor on the rate.
_WARMUP_START = 1e-7


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """How networks are trained for a test: SGD or Adam as in PyTorch, with coupled weight decay.

    Raises:
        ValueError: `warmup_steps` is set for a schedule that has its own warm-up.
    """

    epochs: Annotated[int, Ge(1), Doc("Passes over the images (DSA: 1000); steps = ceil(epochs * n / batch).")] = 1000
    steps: Annotated[int, Ge(0), Doc("Training steps, in place of epochs; 0 = by epochs.")] = 0
    batch: Annotated[int, Ge(1), Doc("Images per step (DC: 256); all of them if there are fewer.")] = 256
    optimizer: Annotated[
        Literal["sgd", "adam"], Doc("sgd with momentum (DC), or adam with PyTorch's defaults (GSDD across networks).")
    ] = "sgd"
    lr: Annotated[float, Gt(0), Doc("Learning rate (DC: 0.01, with sgd).")] = 0.01
    momentum: Annotated[float, Ge(0), Lt(1), Doc("Momentum of sgd (DC: 0.9); adam has none.")] = 0.9
    weight_decay: Annotated[float, Ge(0), Doc("Times the weight, added to the gradient; all weights (DC: 5e-4).")] = (
        5e-4
    )
    schedule: Annotated[
        Schedule,
        Doc(
            "constant; step: a tenth from half time on, optimizer restarted (DC); multistep: times 0.2 at 2/3 and 5/6 "
            "(IDC, DANCE); cosine: to 0; warmup_cosine: linear from 0 to half time, then cosine to 0 (GLaD)."
        ),
    ] = "step"
    warmup_steps: Annotated[int, Ge(0), Doc("First steps over which the rate rises linearly.")] = 0
    cutmix: Annotated[
        float, Ge(0), Le(1), Doc("Probability that a batch is mixed by CutMix, beta 1 (DC: 0; IDC, DANCE: 0.5).")
    ] = 0.0
    ema: Annotated[
        float,
        Ge(0),
        Lt(1),
        Doc("Decay of a mean of the weights, taken once per epoch, that is tested (GLaD: 0.995); 0 = last weights."),
    ] = 0.0
    seeds: Annotated[int, Ge(1), Doc("Number of networks trained and tested.")] = 5
    parallel: Annotated[int, Ge(1), Doc("Networks trained side by side where several are asked for at once.")] = 1

    def __post_init__(self) -> None:
        """Checks what no single field can say."""
        if self.schedule == "warmup_cosine" and self.warmup_steps:
            raise InputError(
                f"evaluate.warmup_steps: {self.warmup_steps}, must be 0 with schedule warmup_cosine, "
                "which rises until half time"
            )

    def num_steps(self, num_images: int) -> int:
        """Returns how many steps training takes on so many images."""
        return self.steps or -(-self.epochs * num_images // min(self.batch, num_images))

    def static(self) -> "EvalSpec":
        """Returns the settings with neutral values where compiled training does not depend on them."""
        return dataclasses.replace(self, lr=1.0, seeds=1, parallel=1)


class _Static(NamedTuple):
    """What the compiled functions depend on, and hash by."""

    network: Network
    spec: EvalSpec
    augment: DsaSpec


def train_network(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    network: Network,
    spec: EvalSpec,
    augment: DsaSpec,
    whitening: Whitening | None = None,
    lr: jax.Array | float | None = None,
) -> Any:
    """Trains a fresh network on cross entropy and returns its final weights, or their average with `spec.ema`.

    Protocol of DC, DSA, DM and MTT (their `evaluate_synset`). Deviations: batches are windows of fixed size in a
    stream of shuffled epochs, so that no last batch is short; and there are `epochs` epochs with the drop at half of
    all steps, where the reference runs one more and drops after epochs // 2 + 2 of them.

    All steps are one compiled loop. It is compiled anew for other shapes, settings or functions, but not for
    another learning rate or other `whitening`. Works under `vmap` over `key`.

    Args:
        key: decides the weights, the batches and the augmentations; consumed.
        images: [n, h, w, c], uint8 (divided by 255 batch by batch) or floating point as `pixels.check` says.
        labels: int [n], in 0..k-1, or soft ones, float [n, k]; of augmentations only CutMix changes them.
        network: what to train.
        spec: how.
        augment: DSA, with parameters per image; strategy "none" for none.
        whitening: applied to each batch before augmentation, a callable pytree; None for images that are what the
            network sees. A set that fits into memory as floats is cheaper to whiten beforehand.
        lr: learning rate in place of `spec.lr`.

    Returns:
        The weights, as `network.init` shapes them.

    Raises:
        ValueError: images that are none, see `pixels.check`, or labels of another shape.
        TypeError: images that are neither uint8 nor floating point, or labels [n] that are not integers.
    """
    check_images(images, labels, "", soft=True)
    static = _Static(network, spec.static(), augment)
    return _train(key, images, labels, whitening, rate_of(lr, spec), static=static)


def lr_factor(step: jax.Array | int, schedule: Schedule, *, steps: int, warmup_steps: int = 0) -> jax.Array:
    """Returns the factor on the learning rate at a step: warm-up times schedule.

    Args:
        step: 0 to steps - 1.
        schedule: "step" drops to a tenth at half of all steps (DC), "multistep" to a fifth at two thirds and once more
            at five sixths (IDC, DANCE). The cosine starts after the warm-up. "warmup_cosine" is GLaD's with a step
            where GLaD has an epoch (the same thing where one batch holds all images): from 1e-7 up to 1 at half time,
            1 once more, then down along a cosine.
        steps: length of the training.
        warmup_steps: first steps, over which the rate rises linearly; without effect on "warmup_cosine".

    Returns:
        float32 scalar in [0, 1].
    """
    step = jnp.asarray(step, jnp.float32)
    if schedule == "warmup_cosine":
        half = max(steps // 2, 1)
        rise = _WARMUP_START + (1 - _WARMUP_START) * jnp.minimum(step / half, 1.0)
        return rise * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((step - half - 1) / half, 0, 1)))
    warmup = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
        return warmup * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    drops = {
        "constant": {},
        "step": {_drop(steps): 0.1},
        "multistep": {-(-2 * steps // 3): 0.2, -(-5 * steps // 6): 0.2},
    }[schedule]
    return warmup * optax.piecewise_constant_schedule(1.0, drops)(step)


def optimizer(name: Literal["sgd", "adam"], *, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """Returns PyTorch's SGD or Adam, but for the learning rate: what it finds is subtracted, times the rate.

    Weight decay is coupled: it goes through the momentum, or through both moments, unlike in AdamW.
    """
    descent = optax.trace(momentum) if name == "sgd" else optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    return optax.chain(optax.add_decayed_weights(weight_decay), descent)


def training_batch(
    key: jax.Array,
    step: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    steps: int,
    network: Network,
    augment: DsaSpec,
    mix: float,
    whitening: Whitening | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns what a network is trained on in a step: a batch, whitened, augmented by DSA, then mixed by CutMix.

    Args:
        key: the same for all steps.
        step: 0 to steps - 1.
        images: [n, h, w, c], as in `train_network`.
        labels: int [n], or float [n, k].
        steps: that use the key.
        network: says how many classes there are.
        augment: DSA settings.
        mix: probability of CutMix; 0 leaves the labels as they are.
        whitening: as in `train_network`.

    Returns:
        float [n, h, w, c], and the labels, float [n, k] with CutMix.
    """
    x = dsa(jax.random.fold_in(key, step), inputs(images, whitening), augment)
    if not mix:
        return x, labels
    if labels.ndim == 1:
        logits = jax.eval_shape(lambda: network.outputs(network.init(jax.random.key(0)), x)[0])
        labels = jax.nn.one_hot(labels, logits.shape[1], dtype=x.dtype)
    # Keys that DSA does not use.
    return cutmix(jax.random.fold_in(key, steps + step), x, labels, mix)


def stream_start(key: jax.Array, num_images: int) -> jax.Array:
    """Returns the first two epochs of the stream of batches: int32 [2n], two permutations of the n images."""
    return jnp.concatenate([_epoch(key, 0, num_images), _epoch(key, 1, num_images)])


def stream_batch(key: jax.Array, order: jax.Array, step: jax.Array, *, batch: int) -> tuple[jax.Array, jax.Array]:
    """Cuts batch number `step` from the stream of shuffled epochs, laid end to end.

    Must be called for step 0, 1, 2, ... in turn.

    Args:
        key: the one given to `stream_start`.
        order: what that, or the call for the step before, returned.
        step: number of the batch.
        batch: its size, at most n.

    Returns:
        The order for the next call, and the image indices, int32 [batch].
    """
    n = order.shape[0] // 2
    epoch, before = step * batch // n, jnp.maximum(step - 1, 0) * batch // n
    # A batch is no longer than an epoch, so at most one epoch ends per step. The predicate does not depend on the
    # key: under vmap over keys this stays a branch.
    order = lax.cond(epoch > before, lambda: jnp.concatenate([order[n:], _epoch(key, epoch + 1, n)]), lambda: order)
    return order, lax.dynamic_slice_in_dim(order, step * batch - epoch * n, batch)


def rate_of(lr: jax.Array | float | None, spec: EvalSpec) -> jax.Array:
    """Returns the learning rate as an array, so that another one needs no compilation."""
    return jnp.asarray(spec.lr if lr is None else lr, jnp.float32)


def check_images(images: jax.Array, labels: jax.Array, which: str, *, soft: bool = False, real: bool = False) -> None:
    """Raises if images and labels are not what `train_network` says; `which` goes before their names.

    Labels [n, k] pass only where soft ones are allowed; `real` as in `pixels.check`.
    """
    pixels.check(images, f"{which}images", real=real)
    if soft and labels.ndim == 2 and labels.shape[0] == images.shape[0]:
        if not jnp.issubdtype(labels.dtype, jnp.floating):
            raise InputError(f"{which}labels: {labels.dtype}, must be floating point where there is a row per image")
        return
    if labels.shape != images.shape[:1]:
        raise InputError(f"{which}labels: shape {labels.shape}, must be {images.shape[:1]}, one per image")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(f"{which}labels: {labels.dtype}, must be integers")


def _epoch(key: jax.Array, epoch: jax.Array | int, n: int) -> jax.Array:
    return jax.random.permutation(jax.random.fold_in(key, epoch), n).astype(jnp.int32)


def _drop(steps: int) -> int:
    return (steps + 1) // 2


def _average(average: Any, params: Any, step: jax.Array, *, decay: float, batch: int, n: int, steps: int) -> Any:
    """Takes the weights into their running mean where an epoch ends, as GLaD does with the package ema_pytorch.

    The decay of update k = 0, 1, ... is min(1 - 1 / (1 + k), decay): a plain mean at first. Deviation: the last step
    counts as the end of an epoch even if it is not, so that weights are tested that saw all steps.
    """
    k = step * batch // n
    ends = ((step + 1) * batch // n > k) | (step == steps - 1)
    keep = jnp.where(ends, jnp.minimum(1 - 1 / (1 + k.astype(jnp.float32)), decay), 1.0)
    return jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, params)


@partial(jax.jit, static_argnames="static")
def _train(
    key: jax.Array, images: jax.Array, labels: jax.Array, whitening: Whitening | None, lr: jax.Array, *, static: _Static
) -> Any:
    network, spec, augment = static
    n = images.shape[0]
    batch, steps = min(spec.batch, n), spec.num_steps(n)
    key_init, key_stream, key_augment = jax.random.split(key, 3)
    descent = optimizer(spec.optimizer, momentum=spec.momentum, weight_decay=spec.weight_decay)
    batch_of = partial(
        training_batch, key_augment, steps=steps, network=network, augment=augment, mix=spec.cutmix, whitening=whitening
    )

    def step(carry: tuple[Any, Any, jax.Array, Any], t: jax.Array) -> tuple[tuple[Any, Any, jax.Array, Any], None]:
        params, state, order, average = carry
        order, index = stream_batch(key_stream, order, t, batch=batch)
        _, grads = network.loss_and_gradient(params, *batch_of(t, images[index], labels[index]))
        if spec.schedule == "step":
            state = jax.tree.map(lambda leaf: jnp.where(t == _drop(steps), jnp.zeros_like(leaf), leaf), state)
        direction, state = descent.update(grads, state, params)
        rate = lr * lr_factor(t, spec.schedule, steps=steps, warmup_steps=spec.warmup_steps)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
        if spec.ema:
            average = _average(average, params, t, decay=spec.ema, batch=batch, n=n, steps=steps)
        return (params, state, order, average), None

    params = network.init(key_init)
    start = (params, descent.init(params), stream_start(key_stream, n), params if spec.ema else None)
    (params, _, _, average), _ = lax.scan(step, start, jnp.arange(steps))
    return average if spec.ema else params
