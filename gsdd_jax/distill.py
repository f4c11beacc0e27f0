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
from gsdd_jax.match import GradientSpec, ObjectiveSpec, distribution_loss, gradient_loss
from gsdd_jax.match.distribution import Transform
from gsdd_jax.match.gradient import train_between
from gsdd_jax.nets import Network


class State(NamedTuple):
    """What a step changes; checkpoints hold exactly this."""

    params: Any
    opt_state: Any
    step: jax.Array  # int32 scalar, steps taken
    matcher: Any = ()  # what the objective carries on: gradient matching its network's weights, others nothing


class DeviceData(NamedTuple):
    """A training set that stays on the device."""

    images: jax.Array  # uint8 [N, h, w, c]
    table: ClassTable
    transform_params: Any


class HostBatch(NamedTuple):
    """Real images drawn by the host, for sets that do not fit the device."""

    images: jax.Array  # uint8 [k, batch_real, h, w, c]
    transform_params: Any


def init_state(codec: Codec, params: Any, objective: ObjectiveSpec, network: Network) -> State:
    """Returns the state before the first step."""
    matcher: Any = ()
    if _network_lives_on(objective):
        # Overwritten by the first step, which draws them.
        matcher = jax.tree.map(jnp.zeros_like, jax.eval_shape(network.init, jax.random.key(0)))
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
) -> Callable[[State, DeviceData | HostBatch, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """Builds the outer step; pure, to be jitted with its state donated.

    Args:
        codec: The parameterisation; its ``decode``, ``regularise``, ``project`` and ``optimiser`` are used.
        objective: What to match; gradient matching with its loops filled in, see ``GradientSpec.for_ipc``.
        network: The architecture that matches.
        augment: DSA settings.
        transform: Normalisation; its arrays travel in the data, so that they are not baked into the executable.

    Returns:
        ``step(state, data, key)``. The randomness of step ``i`` is ``fold_in(key, i)``, so an interrupted run that
        resumes from a state repeats the same bits. Metrics are device scalars: ``loss``, ``regulariser``,
        ``grad_norm``, and ``param_norm`` after the step.

    Raises:
        ValueError: The loops of gradient matching are not filled in.
    """
    if isinstance(objective, GradientSpec) and 0 in (objective.outer_loop, objective.inner_loop):
        raise ValueError("objective: outer_loop and inner_loop are 0; GradientSpec.for_ipc fills them in")
    optimiser = codec.optimiser()
    k, g = codec.num_classes, codec.images_per_class

    def step(state: State, data: DeviceData | HostBatch, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
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
            syn = codec.decode(params, index)
            loss = match(real, syn.reshape(k, batch, *syn.shape[1:]))
            regulariser = codec.regularise(params)
            return loss + regulariser, {"loss": loss, "regulariser": regulariser}

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params = codec.project(optax.apply_updates(state.params, updates))
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["param_norm"] = optax.tree.norm(params)
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
        return State(params, opt_state, state.step + 1, matcher), metrics

    return step
