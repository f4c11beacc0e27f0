"""The outer step of distillation: ``(state, data, key) -> (state, metrics)``, for any codec and objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from gsdd_jax import parallel, pixels
from gsdd_jax.augment import DsaSpec
from gsdd_jax.codecs import Codec
from gsdd_jax.data.sampling import ClassTable, class_index, class_table, sample_classes
from gsdd_jax.match import (
    DistributionSpec,
    GradientSpec,
    MmdSpec,
    ObjectiveSpec,
    TrajectorySpec,
    distribution_loss,
    feature_mmd,
    gradient_loss,
    trajectory_loss,
)
from gsdd_jax.match.distribution import Transform
from gsdd_jax.match.gradient import train_between
from gsdd_jax.match.mmd import LEAST_SAMPLES
from gsdd_jax.match.trajectory import flattener, floor_syn_lr, syn_lr_optimizer
from gsdd_jax.nets import Network
from gsdd_jax.parallel import Share, Team


class State(NamedTuple):
    """What a step changes; checkpoints hold exactly this."""

    params: Any
    opt_state: Any
    step: jax.Array  # int32 scalar, steps taken
    # What the objective carries on: gradient matching its network's weights, trajectory matching its SynLr.
    matcher: Any = ()


class DeviceData(NamedTuple):
    """A training set that stays on the device; of several devices, each has the images of its classes."""

    images: jax.Array  # [N, h, w, c], uint8 or float32 in [0,1]
    table: ClassTable
    transform_params: Any


class HostBatch(NamedTuple):
    """Real images drawn by the host, for sets that do not fit the device."""

    images: jax.Array  # [k, batch_real, h, w, c], uint8 or float32 in [0,1]
    transform_params: Any


class ExpertBatch(NamedTuple):
    """Segments of expert trajectories, for trajectory matching."""

    start: jax.Array  # float32 [segments, p], flat weights
    target: jax.Array  # float32 [segments, p], expert_epochs later
    transform_params: Any


class MmdBatch(NamedTuple):
    """What an objective needs, and what its MMD term does."""

    matched: DeviceData | HostBatch | ExpertBatch
    real: DeviceData | HostBatch
    # Flat weights [p] of the network whose features are compared; None = a random one in each step.
    weights: jax.Array | None


def device_data(
    images: np.ndarray, labels: np.ndarray, num_classes: int, transform_params: Any, mesh: Mesh | None = None
) -> DeviceData:
    """Puts a training set on the device, or each class on that device of a mesh whose share it is.

    Args:
        images: Real ones ``[n, h, w, c]``, uint8 or floating point in [0,1], also in a process that has only some of
            the devices.
        labels: Integers ``[n]``.
        num_classes: k.
        transform_params: Of the normalization.
        mesh: The devices, where there are several.

    Raises:
        ValueError, TypeError: Images that are none, see `pixels.check`, or labels that do not fit, see `class_table`.
    """
    images = pixels.check(images)
    if len(images) != len(labels):
        raise ValueError(f"labels: found {len(labels)} of them for {len(images)} images; expected one per image")
    if mesh is None:
        return DeviceData(jnp.asarray(images), class_table(labels, num_classes), transform_params)
    index, count = class_index(labels, num_classes)
    own = parallel.per_device(num_classes, mesh.size)
    held = max(int(count[first : first + own].sum()) for first in range(0, num_classes, own))
    parts, tables, counts = [], [], []
    for classes in parallel.own_classes(num_classes, mesh):
        known = classes[classes < num_classes]
        members = [index[label, : count[label]] for label in known]
        part = np.zeros((held, *images.shape[1:]), images.dtype)
        mine = np.concatenate(members) if members else np.zeros(0, np.int32)
        part[: len(mine)] = images[mine]
        ends = np.cumsum(count[known])
        # As long as the rows of the whole table, or draws would differ from it.
        rows = [end - n + np.resize(np.arange(n), index.shape[1]) for end, n in zip(ends, count[known], strict=True)]
        fill = len(classes) - len(known)
        parts.append(part)
        tables.append(np.stack([*rows, *np.zeros((fill, index.shape[1]))]).astype(np.int32))
        counts.append(np.concatenate([count[known], np.ones(fill, count.dtype)]))
    of_all, *table = (parallel.sharded(np.concatenate(x), mesh) for x in (parts, tables, counts))
    return DeviceData(of_all, ClassTable(*table), parallel.replicated(transform_params, mesh))


def _specs(data: Data) -> Data:
    """Returns how the data are spread over several devices: by classes, or by segments."""
    by_rows, alike = PartitionSpec(parallel.AXIS), PartitionSpec()
    if isinstance(data, MmdBatch):
        return MmdBatch(_specs(data.matched), _specs(data.real), alike)  # type: ignore[arg-type]
    return type(data)(*(alike if name == "transform_params" else by_rows for name in data._fields))  # type: ignore


class SynLr(NamedTuple):
    """The learned step size of trajectory matching."""

    value: jax.Array  # float32 scalar
    opt_state: Any


# What a step's key is folded with for codecs that decode at random, and for the MMD term.
DRAWN, OF_MMD = 1, 2

Data = DeviceData | HostBatch | ExpertBatch | MmdBatch
# ``(params, data, key of the step) -> (weighted, its value)``: a further loss.
Term = Callable[[Any, Data, jax.Array], tuple[jax.Array, jax.Array]]
Step = Callable[[State, Data, jax.Array], tuple[State, dict[str, jax.Array]]]


def init_state(codec: Codec, params: Any, objective: ObjectiveSpec, network: Network) -> State:
    """Returns the state before the first step."""
    matcher: Any = ()
    if _network_lives_on(objective):
        # Overwritten by the first step, which draws them.
        matcher = jax.tree.map(jnp.zeros_like, jax.eval_shape(network.init, jax.random.key(0)))
    if isinstance(objective, TrajectorySpec):
        syn_lr = jnp.float32(objective.syn_lr)
        matcher = SynLr(syn_lr, syn_lr_optimizer(objective).init(syn_lr))
    return State(params, codec.optimizer().init(params), jnp.zeros((), jnp.int32), matcher)


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
    mmd: MmdSpec | None = None,
    mesh: Mesh | None = None,
) -> Step:
    """Builds the outer step; pure, to be jitted with its state donated.

    Args:
        codec: The parameterization; its ``decode``, ``regularize``, ``project`` and ``optimizer`` are used.
        objective: What to match; gradient matching with its loops filled in, see ``GradientSpec.for_ipc``.
        network: The architecture that matches.
        augment: DSA settings.
        transform: Normalization; its arrays travel in the data, so that they are not baked into the executable.
        schedule: Factor of the codec's updates, by outer steps taken; 1 throughout if None, as in the references.
        mmd: The MMD term; none if None or of weight 0.
        mesh: Devices that take the step together, from ``parallel.mesh_of``: they share out classes, or the segments of
            trajectory matching. State and key are then held by all of them, and data as ``device_data`` puts them.

    Returns:
        ``step(state, data, key)``, with ``ExpertBatch`` for trajectory matching and real images for the others, in an
        ``MmdBatch`` if there is an MMD term. The randomness of step ``i`` is ``fold_in(key, i)``, so an interrupted run
        that resumes from a state repeats the same bits. Metrics are device scalars: ``loss`` (the objective's own),
        ``regularizer``, ``grad_norm``, and ``param_norm`` after the step; for trajectory matching also those of
        ``trajectory_loss`` and the ``syn_lr`` after the step; with the term ``mmd``, not weighted. Norms are those of
        the objective's step.

    Raises:
        ValueError: The loops of gradient matching are not filled in, the MMD term has too few images, the segments
            cannot be shared out evenly, or the network is none for the codec's images and classes.
        TypeError: The network has weights that cannot be trained.
    """
    network.check(codec.image_shape, codec.num_classes)
    team = Team(1 if mesh is None else mesh.size)
    if isinstance(objective, TrajectorySpec) and objective.segments % team.size:
        raise ValueError(
            f"objective.segments: {team.size} devices share out the segments of trajectory matching evenly; expected a "
            f"multiple of {team.size}, found {objective.segments} (or set distill.devices)"
        )
    if isinstance(objective, GradientSpec) and 0 in (objective.outer_loop, objective.inner_loop):
        raise ValueError("objective: outer_loop and inner_loop are 0; GradientSpec.for_ipc fills them in")
    parts: dict[str, Any] = {"network": network, "transform": transform, "team": team}
    term = None if mmd is None or mmd.weight == 0 else _mmd_term(codec, mmd, **parts)
    joint = term if mmd is not None and mmd.steps == "joint" else None
    build = _trajectory_step if isinstance(objective, TrajectorySpec) else _image_step
    step = build(codec, objective, augment=augment, term=joint, schedule=schedule, **parts)  # type: ignore[arg-type]
    if term is not None and joint is None:
        step = _then(step, codec, term, schedule, team)
    return step if mesh is None else parallel.spread(step, mesh, _specs)


def _then(step: Step, codec: Codec, term: Term, schedule: optax.Schedule | None, team: Team) -> Step:
    """Adds an optimizer step on a term to a step."""

    def then(state: State, data: Data, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        after, metrics = step(state, data, key)
        # One optimizer takes both steps, as in D3; its schedule counts iterations.
        moved = after._replace(step=state.step)
        key_step = jax.random.fold_in(key, state.step)
        grads, value = team.sum(jax.grad(term, has_aux=True)(moved.params, data, key_step))
        params, opt_state, _ = _updated(codec, moved, grads, schedule)
        return after._replace(params=params, opt_state=opt_state), metrics | {"mmd": value}

    return then


def _image_step(
    codec: Codec,
    objective: DistributionSpec | GradientSpec,
    *,
    network: Network,
    augment: DsaSpec,
    transform: Transform,
    schedule: optax.Schedule | None,
    term: Term | None,
    team: Team,
) -> Step:
    """Builds the outer step of distribution and gradient matching."""
    k, g = codec.num_classes, codec.images_per_class

    def step(state: State, data: Data, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        matched = data.matched if isinstance(data, MmdBatch) else data
        assert not isinstance(matched, ExpertBatch)
        key_step = jax.random.fold_in(key, state.step)
        key_real, key_syn, key_loss = jax.random.split(key_step, 3)
        share = team.share(k)
        real = _real_images(matched, key_real, objective.batch_real, share)
        normal = {"transform": transform, "transform_params": matched.transform_params}
        settings = {"network": network, "augment": augment, "class_chunk": objective.class_chunk, **normal}
        settings |= {"share": share}
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
            batch = min(objective.batch_syn or g, g)
            index = _some_of_each_class(key_syn, share, g, batch)
            syn = codec.decode(params, index, key=jax.random.fold_in(key_syn, DRAWN))
            loss = match(real, syn.reshape(share.own, batch, *syn.shape[1:]))
            return _total(codec, params, loss, {}, term, data, key_step, team)

        grads, metrics = team.sum(jax.grad(loss_fn, has_aux=True)(state.params))
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


def _total(
    codec: Codec,
    params: Any,
    loss: jax.Array,
    metrics: dict[str, jax.Array],
    term: Term | None,
    data: Data,
    key_step: jax.Array,
    team: Team,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Adds the codec's regularizer and, if there is one, the MMD term to a loss; devices then add up what they have."""
    regularizer = team.part(codec.regularize(params))
    total, metrics = loss + regularizer, {"loss": loss, "regularizer": regularizer, **metrics}
    if term is None:
        return total, metrics
    extra, value = term(params, data, key_step)
    return total + extra, metrics | {"mmd": value}


def mmd_samples(codec: Codec, spec: MmdSpec) -> tuple[int, int]:
    """Returns how often the MMD term decodes how many images of each class.

    D3 draws each latent as often as it takes. Where decoding is not random, a copy would be a sample at distance 0.

    Raises:
        ValueError: A class has no two synthetic images.
    """
    g = codec.images_per_class
    copies, each = (max(spec.samples // g, 1) if codec.draws else 1), min(spec.samples, g)
    if copies * each < LEAST_SAMPLES:
        raise ValueError(
            f"mmd.weight: the term needs {LEAST_SAMPLES} synthetic images per class, the {codec.name} codec has "
            f"{g}; expected 0, or more images"
        )
    return copies, each


def _mmd_term(codec: Codec, spec: MmdSpec, *, network: Network, transform: Transform, team: Team) -> Term:
    """Builds the MMD term.

    Raises:
        ValueError: A class has no two synthetic images.
    """
    k, g = codec.num_classes, codec.images_per_class
    copies, each = mmd_samples(codec, spec)

    def term(params: Any, data: Data, key_step: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert isinstance(data, MmdBatch)
        key_real, key_index, key_draw, key_network = jax.random.split(jax.random.fold_in(key_step, OF_MMD), 4)
        share = team.share(k)
        index = _some_of_each_class(key_index, share, g, each)
        syn = jnp.stack([codec.decode(params, index, key=key) for key in jax.random.split(key_draw, copies)])
        syn = syn.reshape(copies, -1, each, *codec.image_shape).swapaxes(0, 1)
        syn = syn.reshape(share.own, -1, *codec.image_shape)
        value = feature_mmd(
            _real_images(data.real, key_real, spec.samples, share),
            syn,
            network.init(key_network) if data.weights is None else flattener(network)[1](data.weights),
            network=network,
            transform=transform,
            transform_params=data.real.transform_params,
            share=share,
        )
        return spec.weight * value, value

    return term


def _real_images(data: DeviceData | HostBatch, key: jax.Array, count: int, share: Share) -> jax.Array:
    """Returns ``[own, count, h, w, c]`` of a share's classes; those that the host drew are as many as it drew."""
    if isinstance(data, HostBatch):
        return data.images
    return data.images[sample_classes(key, data.table, count, share)]


def _some_of_each_class(key: jax.Array, share: Share, g: int, count: int) -> jax.Array | None:
    """Draws ``count`` of the ``g`` images of every class of a share, class-major; None for all that there are."""
    if count < g:
        keys = share.take(jax.random.split(key, share.total))
        within = jax.vmap(lambda key: jax.random.choice(key, g, (count,), replace=False))(keys)
    elif share.own == share.total:
        return None
    else:
        within = jnp.arange(g)
    return (within + g * share.take(jnp.arange(share.total))[:, None]).reshape(-1)


def _updated(
    codec: Codec, state: State, grads: Any, schedule: optax.Schedule | None
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Returns parameters and optimizer state after a gradient, and the norms to log."""
    updates, opt_state = codec.optimizer().update(grads, state.opt_state, state.params)
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
    term: Term | None,
    team: Team,
) -> Step:
    """Builds the outer step of trajectory matching: one for the codec, one for the student's step size."""

    def step(state: State, data: Data, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        matched = data.matched if isinstance(data, MmdBatch) else data
        assert isinstance(matched, ExpertBatch)
        labels = jnp.repeat(jnp.arange(codec.num_classes), codec.images_per_class)
        key_step = jax.random.fold_in(key, state.step)

        def loss_fn(params: Any, syn_lr: jax.Array) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
            loss, student = trajectory_loss(
                key_step,
                codec.decode(params, key=jax.random.fold_in(key_step, DRAWN)),
                labels,
                syn_lr,
                matched.start,
                matched.target,
                network=network,
                augment=augment,
                transform=transform,
                transform_params=matched.transform_params,
                spec=objective,
            )
            bad_step = student.pop("bad_step")
            loss, student = jax.tree.map(team.part, (loss, student))
            total, metrics = _total(codec, params, loss, student, term, data, key_step, team)
            return total, (metrics, bad_step)

        old: SynLr = state.matcher
        grads, (metrics, bad_step) = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(state.params, old.value)
        (grads, lr_grad), metrics = team.sum((grads, metrics))
        # The first step that is bad on any device.
        late = objective.syn_steps + 1
        first = team.least(jnp.where(bad_step < 0, late, bad_step))
        metrics |= {"bad_step": jnp.where(first == late, -1, first)}
        params, opt_state, norms = _updated(codec, state, grads, schedule)
        update, lr_state = syn_lr_optimizer(objective).update(lr_grad, old.opt_state)
        syn_lr = SynLr(floor_syn_lr(old.value + update), lr_state)
        return State(params, opt_state, state.step + 1, syn_lr), metrics | norms | {"syn_lr": syn_lr.value}

    return step
