"""Trajectory matching: a student's weights against those of an expert (MTT, Cazenavette et al. 2022).

The gradient is exact, through all steps of the student, at the activation memory of one, or of a part of its batch on a
CPU (`nets.microbatch`): the backward pass recomputes each step from its starting weights. TESLA's gradient of constant
memory treats those weights as constants and is an approximation; `benchmarks/trajectory.py` compares the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge
from jax import lax
from jax.flatten_util import ravel_pytree
from typing_extensions import Doc

from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.codecs import Codec
from gsdd_jax.errors import InputError
from gsdd_jax.match.base import Batch, Objective, Synthetic
from gsdd_jax.match.needs import ExpertSegments
from gsdd_jax.nets import Network
from gsdd_jax.whiten import Whitening

# HaBa, SPEED and DDiF: left alone, the rate of the reference can turn negative or NaN.
MIN_SYN_LR = 1e-3
LR_MOMENTUM = 0.5  # MTT


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectorySpec:
    """Settings of trajectory matching; the defaults are GSDD's for CIFAR-10."""

    name: Annotated[Literal["trajectory"], Doc("the objective")] = "trajectory"
    syn_steps: Annotated[int, Ge(1), Doc("SGD steps of the student (GSDD: 60 on CIFAR, 20 on ImageNet subsets)")] = 60
    batch_syn: Annotated[int, Ge(0), Doc("synthetic images per step of the student, of all classes; 0 = all")] = 0
    expert_epochs: Annotated[int, Ge(1), Doc("epochs of the expert that one match spans (MTT: 2 or 3)")] = 2
    min_start_epoch: Annotated[int, Ge(0), Doc("first epoch that a match may start from (MTT: 0)")] = 0
    max_start_epoch: Annotated[int, Ge(1), Doc("matches start before this epoch (GSDD: 30 on CIFAR, 40 else)")] = 30
    first_max_start_epoch: Annotated[
        int, Ge(0), Doc("max_start_epoch of iteration 0, for a window that grows (DATM); 0 = a fixed window")
    ] = 0
    expansion_iterations: Annotated[
        int, Ge(0), Doc("iterations over which a growing window reaches max_start_epoch (DATM: 1,000 or 2,000)")
    ] = 0
    segments: Annotated[int, Ge(1), Doc("expert segments matched per iteration, the loss is their mean (MTT: 1)")] = 1
    syn_lr: Annotated[float, Ge(MIN_SYN_LR), Doc("learned step size of the student, at the start (MTT: 0.01)")] = 0.01
    lr_lr: Annotated[float, Ge(0), Doc("learning rate of syn_lr, SGD with momentum 0.5 (GSDD: 1e-5); 0 = fixed")] = 1e-5
    checkpoint: Annotated[
        bool,
        Doc(
            "recompute each step in the backward pass; false holds the activations of all steps, of batches that a CPU "
            "takes in parts the augmented images alone"
        ),
    ] = True

    def __post_init__(self) -> None:
        """Checks the windows.

        Raises:
            ValueError: No epoch to start from, or half of a growing window.
        """
        low, high, first = self.min_start_epoch, self.max_start_epoch, self.first_max_start_epoch
        if low >= high:
            raise InputError(f"objective.min_start_epoch must be below max_start_epoch ({high}), found {low}")
        if bool(first) != bool(self.expansion_iterations):
            raise InputError(
                "objective.first_max_start_epoch and expansion_iterations must both be set for a growing window, or "
                f"both 0, found {first} and {self.expansion_iterations}"
            )
        if first and not low < first <= high:
            raise InputError(
                f"objective.first_max_start_epoch must be above min_start_epoch ({low}) and at most "
                f"max_start_epoch ({high}), found {first}"
            )

    @property
    def last_epoch(self) -> int:
        """Last epoch of an expert that a match can reach: what has to be trained."""
        return self.max_start_epoch - 1 + self.expert_epochs

    def start_window(self, iteration: int) -> tuple[int, int]:
        """Returns `(low, high)`: matches of this iteration start from epochs low, ..., high - 1.

        A growing window widens linearly, rounded down, as in DATM's code.
        """
        first, high = self.first_max_start_epoch, self.max_start_epoch
        if first and iteration < self.expansion_iterations:
            high = first + (high - first) * iteration // self.expansion_iterations
        return self.min_start_epoch, high


def make(spec: TrajectorySpec, codec: Codec, network: Network, augment: DsaSpec) -> Objective:
    """Builds the objective; see `gsdd_jax.match.make`."""

    def loss(
        key: jax.Array, learned: Any, carry: Any, synthetic: Synthetic, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        key_syn, key_loss = jax.random.split(key)
        segments, axis = batch.drawn["segments"], synthetic.axis
        value, metrics = trajectory_loss(
            key_loss,
            synthetic.images(key_syn),
            synthetic.labels,
            learned["syn_lr"],
            segments[:, 0],
            segments[:, 1],
            network=network,
            augment=augment,
            whitening=batch.whitening,
            spec=spec,
        )
        # The first step that is bad on any device.
        late = spec.syn_steps + 1
        first = axis.min(jnp.where(metrics["bad_step"] < 0, late, metrics["bad_step"]))
        student = axis.sum(axis.part(metrics["student_loss"]))
        metrics = {"student_loss": student, "bad_step": jnp.where(first == late, -1, first)}
        return axis.part(value), metrics, carry

    return Objective(
        spec,
        codec,
        network,
        {"segments": ExpertSegments(spec)},
        loss,
        init=lambda: ({"syn_lr": jnp.float32(spec.syn_lr)}, ()),
        optimizer=lambda: optax.sgd(spec.lr_lr, momentum=LR_MOMENTUM),
        # NaN stays NaN.
        project=lambda learned: {"syn_lr": jnp.maximum(learned["syn_lr"], MIN_SYN_LR)},
    )


@lru_cache(maxsize=64)
def flattener(network: Network) -> tuple[Callable[[Any], jax.Array], Callable[[jax.Array], Any]]:
    """Returns `(flatten, unflatten)` between a network's weights and their flat vector [p]."""
    shapes = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)))
    # Concrete values, even when called inside a trace: only their shapes matter.
    with jax.ensure_compile_time_eval():
        _, unflatten = ravel_pytree(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    return lambda params: ravel_pytree(params)[0], unflatten


def student_batches(key: jax.Array, num_images: int, *, spec: TrajectorySpec) -> jax.Array | None:
    """Draws which images each step of the student sees.

    Each epoch is a permutation cut into whole batches; what is left over sits that epoch out. No image is twice in a
    batch. Deviation: the reference also uses the remainder, as a shorter batch, and begins with it.

    Args:
        key: Consumed.
        num_images: n.
        spec: `syn_steps` and `batch_syn` count.

    Returns:
        int32 [t, batch_syn], or None where every step sees all images.
    """
    if not 0 < spec.batch_syn < num_images:
        return None
    per_epoch = num_images // spec.batch_syn
    epochs = -(-spec.syn_steps // per_epoch)
    order = jax.vmap(lambda key: jax.random.permutation(key, num_images))(jax.random.split(key, epochs))
    batches = order[:, : per_epoch * spec.batch_syn].reshape(-1, spec.batch_syn)
    return batches[: spec.syn_steps].astype(jnp.int32)


def trajectory_loss(
    key: jax.Array,
    syn: jax.Array,
    labels: jax.Array,
    syn_lr: jax.Array,
    start: jax.Array,
    target: jax.Array,
    *,
    network: Network,
    augment: DsaSpec,
    whitening: Whitening,
    spec: TrajectorySpec,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns `||theta_t - target||^2 / ||start - target||^2`, the mean over segments.

    The student starts at `start` and takes t = `spec.syn_steps` steps of plain SGD on the cross entropy of augmented
    batches, with a fresh DSA draw per step and parameters per image. Source: MTT, Algorithm 1. All segments see the
    same batches and augmentations, so that these are made once; the mean over segments of the losses of single calls
    with the same key is the same number.

    Peak memory grows with `syn_steps` by the flat weights that each step starts from, and its batch indices; by
    all activations without `spec.checkpoint`, but see there. On CPU segments run one after the other, on a GPU side by
    side.

    Args:
        key: Decides batches and augmentations; consumed.
        syn: `[n, h, w, c]` float images in [0,1], all of the decoded set.
        labels: int `[n]`.
        syn_lr: The student's step size, a scalar. Not held above `MIN_SYN_LR` here.
        start: Flat weights of the expert, `[p]`, or `[segments, p]`.
        target: Those `spec.expert_epochs` later, of the same shape.
        network: The architecture of expert and student.
        augment: DSA settings.
        whitening: What networks see images through.
        spec: `syn_steps`, `batch_syn` and `checkpoint` count; the number of segments is that of `start`.

    Returns:
        The loss, and of metrics `student_loss`, the cross entropy of the student's last step, mean over segments;
        `bad_step`, int32, the first step (from 0) whose loss is not finite in some segment, t if only the final weights
        are not, -1 if all is finite. Differentiable once, with respect to `syn` and `syn_lr`.

    Raises:
        ValueError: Weights that are not those of the network, or shapes that do not belong together.
        TypeError: Labels that are not integers.
    """
    _check(syn, labels, start, target, network)
    key_batches, key_augment = jax.random.split(key)
    batches = student_batches(key_batches, syn.shape[0], spec=spec)
    flatten, unflatten = flattener(network)
    # Once for all steps: a batch is drawn from the set several times, and ZCA is a product with a d x d matrix.
    normal = whitening(syn)

    def step(theta: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, y = normal, labels
        if batches is not None:
            index = batches[t]
            # Known to be distinct, the cotangents of a batch need no atomic additions: their order would be any.
            x = normal.at[index].get(unique_indices=True, mode="promise_in_bounds")
            y = labels[index]
        x = dsa(jax.random.fold_in(key_augment, t), x, augment)
        loss, grads = network.loss_and_gradient(unflatten(theta), x, y)
        return theta - syn_lr.astype(theta.dtype) * flatten(grads), loss

    # Inside a scan there is nothing that common subexpressions could be shared with.
    body = jax.checkpoint(step, prevent_cse=False) if spec.checkpoint else step

    def match(start: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        theta, losses = lax.scan(body, start, jnp.arange(spec.syn_steps))
        return jnp.sum((theta - target) ** 2) / jnp.sum((start - target) ** 2), losses

    syn_lr = jnp.asarray(syn_lr)
    if start.ndim == 2 and start.shape[0] > 1:
        distance, losses = jax.vmap(match)(start, target)
    else:
        distance, losses = (x[None] for x in match(start.reshape(-1), target.reshape(-1)))
    metrics = {"student_loss": losses[:, -1].mean(), "bad_step": _first_bad(losses, distance)}
    return distance.mean(), jax.tree.map(lax.stop_gradient, metrics)


def _first_bad(losses: jax.Array, distance: jax.Array) -> jax.Array:
    bad = jnp.concatenate([~jnp.isfinite(losses).all(0), ~jnp.isfinite(distance).all(keepdims=True)])
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def _check(syn: jax.Array, labels: jax.Array, start: jax.Array, target: jax.Array, network: Network) -> None:
    if syn.ndim not in (4, 5) or syn.shape[0] < 1:
        raise InputError(f"syn: shape {syn.shape}, must be [n, h, w, c], or [n, t, h, w, c], with n at least 1")
    if labels.shape != syn.shape[:1]:
        raise InputError(f"labels: shape {labels.shape}, must be {syn.shape[:1]}, one per image")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(f"labels: {labels.dtype}, must be integers")
    if start.ndim not in (1, 2) or start.shape[-1] != network.num_params:
        raise InputError(
            f"start: shape {start.shape}, must be [{network.num_params}] or [segments, {network.num_params}], "
            "the flat weights of the network"
        )
    if target.shape != start.shape:
        raise InputError(f"target: shape {target.shape}, must be that of start, {start.shape}")
