"""The outer step of distillation: ``(state, data, key) -> (state, metrics)``, for any codec and objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsdd_jax.augment import DsaSpec
from gsdd_jax.codecs import Codec
from gsdd_jax.data.sampling import ClassTable, sample_classes
from gsdd_jax.match import (
    GradientSpec,
    ObjectiveSpec,
    TrajectorySpec,
    distribution_loss,
    gradient_loss,
    trajectory_loss,
)
from gsdd_jax.match.distribution import Transform
from gsdd_jax.match.gradient import train_between
from gsdd_jax.match.trajectory import floor_syn_lr, syn_lr_optimiser
from gsdd_jax.nets import Network


class State(NamedTuple):
    """What a step changes; checkpoints hold exactly this."""

    params: Any
    opt_state: Any
    step: jax.Array  # int32 scalar, steps taken
    # What the objective carries on: gradient matching its network's weights, trajectory matching its SynLr.
    matcher: Any = ()


class DeviceData(NamedTuple):
    """A training set that stays on the device."""

    images: jax.Array  # uint8 [N, h, w, c]
    table: ClassTable
    transform_params: Any


class HostBatch(NamedTuple):
    """Real images drawn by the host, for sets that do not fit the device."""

    images: jax.Array  # uint8 [k, batch_real, h, w, c]
    transform_params: Any


class ExpertBatch(NamedTuple):
    """Segments of expert trajectories, for trajectory matching."""

    start: jax.Array  # float32 [segments, p], flat weights
    target: jax.Array  # float32 [segments, p], expert_epochs later
    transform_params: Any


class SynLr(NamedTuple):
    """The learned step size of trajectory matching."""

    value: jax.Array  # float32 scalar
    opt_state: Any


# What a step's key is folded with for codecs that decode at random.
DRAWN = 1

Data = DeviceData | HostBatch | ExpertBatch
Step = Callable[[State, Data, jax.Array], tuple[State, dict[str, jax.Array]]]


def init_state(codec: Codec, params: Any, objective: ObjectiveSpec, network: Network) -> State:
    """Returns the state before the first step."""
    matcher: Any = ()
    if _network_lives_on(objective):
        # Overwritten by the first step, which draws them.
        matcher = jax.tree.map(jnp.zeros_like, jax.eval_shape(network.init, jax.random.key(0)))
    if isinstance(objective, TrajectorySpec):
        syn_lr = jnp.float32(objective.syn_lr)
        matcher = SynLr(syn_lr, syn_lr_optimiser(objective).init(syn_lr))
    return State(params, codec.optimiser().init(params), jnp.zeros((), jnp.int32), matcher)


def _network_lives_on(objective: ObjectiveSpec) -> bool:
    return isinstance(objective, GradientSpec) and objective.outer_loop > 1


def make_step(
    codec: Codec,
    objective: ObjectiveSpec,
    *,
    network: Network,
    augment: DsaSpec,
    transform: Transform,
    schedule: optax.Schedule | None = None,
) -> Step:
    """Builds the outer step; pure, to be jitted with its state donated.

    Args:
        codec: The parameterisation; its ``decode``, ``regularise``, ``project`` and ``optimiser`` are used.
        objective: What to match; gradient matching with its loops filled in, see ``GradientSpec.for_ipc``.
        network: The architecture that matches.
        augment: DSA settings.
        transform: Normalisation; its arrays travel in the data, so that they are not baked into the executable.
        schedule: Factor of the codec's updates, by outer steps taken; 1 throughout if None, as in the references.

    Returns:
        ``step(state, data, key)``, with ``ExpertBatch`` for trajectory matching and real images for the others. The
        randomness of step ``i`` is ``fold_in(key, i)``, so an interrupted run that resumes from a state repeats the
        same bits. Metrics are device scalars: ``loss``, ``regulariser``, ``grad_norm``, and ``param_norm`` after the
        step; for trajectory matching also those of ``trajectory_loss`` and the ``syn_lr`` after the step.

    Raises:
        ValueError: The loops of gradient matching are not filled in.
    """
    if isinstance(objective, GradientSpec) and 0 in (objective.outer_loop, objective.inner_loop):
        raise ValueError("objective: outer_loop and inner_loop are 0; GradientSpec.for_ipc fills them in")
    if isinstance(objective, TrajectorySpec):
        return _trajectory_step(
            codec, objective, network=network, augment=augment, transform=transform, schedule=schedule
        )
    k, g = codec.num_classes, codec.images_per_class

    def step(state: State, data: Data, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        assert not isinstance(data, ExpertBatch)
        key_real, key_syn, key_loss = jax.random.split(jax.random.fold_in(key, state.step), 3)
        if isinstance(data, DeviceData):
            real = data.images[sample_classes(key_real, data.table, objective.batch_real)]
        else:
            real = data.images
        normal = {"transform": transform, "transform_params": data.transform_params}
        settings = {"network": network, "augment": augment, "class_chunk": objective.class_chunk, **normal}
        weights: Any = ()
        if isinstance(objective, GradientSpec):
            key_loss, key_network, key_train = jax.random.split(key_loss, 3)
            weights = network.init(key_network)
            if _network_lives_on(objective):
                born = state.step % objective.outer_loop == 0
                weights = jax.tree.map(lambda new, old: jnp.where(born, new, old), weights, state.matcher)

        def match(real: jax.Array, syn: jax.Array) -> jax.Array:
            if isinstance(objective, GradientSpec):
                return gradient_loss(key_loss, real, syn, params=weights, **settings)
            return distribution_loss(key_loss, real, syn, **settings)

        def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            index, batch = None, g
            if 0 < objective.batch_syn < g:
                batch = objective.batch_syn
                keys = jax.random.split(key_syn, k)
                within = jax.vmap(lambda key: jax.random.choice(key, g, (batch,), replace=False))(keys)
                index = (within + g * jnp.arange(k)[:, None]).reshape(-1)
            syn = codec.decode(params, index, key=jax.random.fold_in(key_syn, DRAWN))
            loss = match(real, syn.reshape(k, batch, *syn.shape[1:]))
            regulariser = codec.regularise(params)
            return loss + regulariser, {"loss": loss, "regulariser": regulariser}

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        params, opt_state, norms = _updated(codec, state, grads, schedule)
        matcher: Any = ()
        if isinstance(objective, GradientSpec) and _network_lives_on(objective):

            def train() -> Any:
                images, labels = codec.decode(params), jnp.repeat(jnp.arange(k), g)
                return train_between(
                    key_train, weights, images, labels, spec=objective, network=network, augment=augment, **normal
                )

            # Its last iteration leaves a network untrained, for nothing follows.
            dies = (state.step + 1) % objective.outer_loop == 0
            matcher = jax.lax.cond(dies, lambda: weights, train)
        return State(params, opt_state, state.step + 1, matcher), metrics | norms

    return step


def _updated(
    codec: Codec, state: State, grads: Any, schedule: optax.Schedule | None
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Returns parameters and optimiser state after a gradient, and the norms to log."""
    updates, opt_state = codec.optimiser().update(grads, state.opt_state, state.params)
    if schedule is not None:
        updates = optax.tree.scale(schedule(state.step), updates)
    params = codec.project(optax.apply_updates(state.params, updates))
    return params, opt_state, {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}


def _trajectory_step(
    codec: Codec,
    objective: TrajectorySpec,
    *,
    network: Network,
    augment: DsaSpec,
    transform: Transform,
    schedule: optax.Schedule | None,
) -> Step:
    """Builds the outer step of trajectory matching: one for the codec, one for the student's step size."""

    def step(state: State, data: Data, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        assert isinstance(data, ExpertBatch)
        labels = jnp.repeat(jnp.arange(codec.num_classes), codec.images_per_class)
        key_step = jax.random.fold_in(key, state.step)

        def loss_fn(params: Any, syn_lr: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            loss, student = trajectory_loss(
                key_step,
                codec.decode(params, key=jax.random.fold_in(key_step, DRAWN)),
                labels,
                syn_lr,
                data.start,
                data.target,
                network=network,
                augment=augment,
                transform=transform,
                transform_params=data.transform_params,
                spec=objective,
            )
            regulariser = codec.regularise(params)
            return loss + regulariser, {"loss": loss, "regulariser": regulariser, **student}

        old: SynLr = state.matcher
        (grads, lr_grad), metrics = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(state.params, old.value)
        params, opt_state, norms = _updated(codec, state, grads, schedule)
        update, lr_state = syn_lr_optimiser(objective).update(lr_grad, old.opt_state)
        syn_lr = SynLr(floor_syn_lr(old.value + update), lr_state)
        return State(params, opt_state, state.step + 1, syn_lr), metrics | norms | {"syn_lr": syn_lr.value}

    return step
