"""The outer step of distillation: ``(state, data, key) -> (state, metrics)``, for any codec and objective."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gsdd_jax import batches, parallel
from gsdd_jax.batches import Data
from gsdd_jax.match.base import Batch, Loss, Objective, Synthetic
from gsdd_jax.match.needs import Source
from gsdd_jax.parallel import Axis


class State(NamedTuple):
    """What a step changes; checkpoints hold exactly this.

    Attributes:
        params: Of the codec, float32 masters.
        learned: What the objective trains beside them, such as the step size of a student.
        opt_state: Of the one transformation of both, see `optimizer`.
        carry: What the objective carries on, such as a network that lives for several steps.
        step: int32 scalar, steps taken.
    """

    params: Any
    learned: dict[str, jax.Array]
    opt_state: Any
    carry: Any
    step: jax.Array


Step = Callable[[State, Data, jax.Array], tuple[State, dict[str, jax.Array]]]


@functools.lru_cache(maxsize=64)
def cosine(steps: int) -> optax.Schedule:
    """Returns the factor that falls from 1 to 0 along a cosine over so many outer steps."""
    return optax.cosine_decay_schedule(1.0, max(steps, 1))


class Loop:
    """Outer steps from one state on, compiled, their data read ahead.

    A context manager: leaving it ends the reading.
    """

    def __init__(
        self,
        objective: Objective,
        state: State,
        key: jax.Array,
        source: Source,
        *,
        first: int = 0,
        last: int,
        schedule: optax.Schedule | None = None,
        mesh: Mesh | None = None,
        on_host: bool = False,
    ):
        """Prepares the steps ``first`` to ``last - 1``.

        Args:
            objective: From `gsdd_jax.match.make`.
            state: Before step ``first``; its arrays are donated to it.
            key: Of the whole distillation, whatever ``first``.
            source: Training set, whitening and experts.
            first: Steps taken before.
            last: All steps in the end.
            schedule: As for `make_step`.
            mesh: As there.
            on_host: As for `gsdd_jax.batches.batches`.
        """
        if mesh is not None:
            state, key = parallel.replicated((state, key), mesh)
        self._mesh, self._state, self._key = mesh, state, key
        self._step: Any = jax.jit(make_step(objective, schedule=schedule, mesh=mesh), donate_argnums=0)
        stream = batches.batches(objective.needs, source, first=first, last=last, mesh=mesh, on_host=on_host)
        self._batches: Iterator[Data] = stream
        self._close = stream.close

    @property
    def state(self) -> State:
        """The state after the steps so far, on one device."""
        return self._state if self._mesh is None else parallel.local(self._state)

    def compile(self) -> None:
        """Compiles the step before it is first taken, with the data that it will take; there must be one."""
        data = next(self._batches)
        self._step = self._step.lower(self._state, data, self._key).compile()
        self._batches = itertools.chain([data], self._batches)

    def take(self, count: int) -> dict[str, jax.Array]:
        """Takes steps, at least one, and returns the metrics of the last, without waiting for them."""
        for _ in range(count):
            self._state, metrics = self._step(self._state, next(self._batches), self._key)
        return metrics

    def close(self) -> None:
        """Ends the reading of data."""
        self._close()

    def __enter__(self) -> Loop:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the reading of data."""
        self.close()


def optimizer(objective: Objective) -> optax.GradientTransformation:
    """Returns the transformation of ``(params, learned)``: the codec's on the one, the objective's on the other."""
    parts = objective.codec.optimizer(), objective.optimizer()

    def init(trained: tuple[Any, Any]) -> tuple[Any, Any]:
        params, learned = trained
        return parts[0].init(params), parts[1].init(learned)

    def update(updates: tuple[Any, Any], state: Any, trained: Any = None) -> tuple[Any, Any]:
        found = [
            part.update(*args) for part, args in zip(parts, zip(updates, state, trained, strict=True), strict=True)
        ]
        return tuple(x for x, _ in found), tuple(x for _, x in found)

    return optax.GradientTransformation(init, update)


def init_state(objective: Objective, params: Any) -> State:
    """Returns the state before the first step, from parameters of the objective's codec."""
    learned, carry = objective.init()
    opt_state = optimizer(objective).init((params, learned))
    return State(params, learned, opt_state, carry, jnp.zeros((), jnp.int32))


@functools.lru_cache(maxsize=64)
def make_step(objective: Objective, *, schedule: optax.Schedule | None = None, mesh: Mesh | None = None) -> Step:
    """Builds the outer step; pure, to be jitted with its state donated. Works under ``lax.scan`` and ``vmap``.

    Args:
        objective: From `gsdd_jax.match.make`; it brings codec and network along.
        schedule: Factor of the codec's updates, by outer steps taken; 1 throughout if None, as in the references.
        mesh: Devices that take the step together, from ``parallel.mesh_of``: they share out classes, or the segments of
            trajectory matching. State and key are then held by all of them, and data as `batches` puts them.

    Returns:
        ``step(state, data, key)``, the same object for equal arguments, so that it is traced once. The randomness of
        step ``i`` is ``fold_in(key, i)``, so an interrupted run that resumes from a state repeats the same bits.
        Metrics are device scalars: ``loss`` (the objective's own, without its terms), ``regularizer``, ``grad_norm``,
        ``param_norm`` after the step, those of the objective, and scalars that it learns. Norms are those of the step
        on its first loss.

    Raises:
        ValueError: So many devices cannot share out what the objective needs.
    """
    codec, axis = objective.codec, Axis(1 if mesh is None else mesh.size)
    for need in objective.needs.values():
        need.check(axis.size)
    both = optimizer(objective)

    def scaled(updates: Any, step: jax.Array) -> Any:
        return updates if schedule is None else optax.tree.scale(schedule(step), updates)

    def step(state: State, data: Data, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        key_batch, key_loss, key_after = jax.random.split(jax.random.fold_in(key, state.step), 3)
        drawn = {
            name: data.drawn[name]
            if name in data.drawn
            else need.draw(jax.random.fold_in(key_batch, position), data.held, axis.shard(codec.num_classes))
            for position, (name, need) in enumerate(objective.needs.items())
        }
        batch = Batch(data.whitening, drawn)

        def gradient(trained: tuple[Any, Any], carry: Any, loss: Loss, *, regularized: bool) -> tuple[Any, Any]:
            def value(trained: tuple[Any, Any]) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
                params, learned = trained
                found, metrics, after = loss(key_loss, learned, carry, Synthetic(codec, params, axis), batch)
                if not regularized:
                    return found, (metrics, after)
                own = {"loss": found, "regularizer": axis.part(codec.regularize(params))}
                return own["loss"] + own["regularizer"], (axis.sum(own) | metrics, after)

            grads, aux = jax.grad(value, has_aux=True)(trained)
            return axis.sum(grads), aux

        trained = state.params, state.learned
        grads, (metrics, carry) = gradient(trained, state.carry, objective.loss, regularized=True)
        updates, opt_state = both.update(grads, state.opt_state, trained)
        params = codec.project(optax.apply_updates(state.params, scaled(updates[0], state.step)))
        learned = objective.project(optax.apply_updates(state.learned, updates[1]))
        metrics |= {"grad_norm": optax.tree.norm(grads[0]), "param_norm": optax.tree.norm(params)}
        for loss in objective.then:
            # One optimizer takes all steps, as in D3; its schedule counts iterations.
            grads, (found, carry) = gradient((params, learned), carry, loss, regularized=False)
            update, codec_state = codec.optimizer().update(grads[0], opt_state[0], params)
            params = codec.project(optax.apply_updates(params, scaled(update, state.step)))
            opt_state, metrics = (codec_state, opt_state[1]), metrics | found
        carry = objective.after(key_after, carry, Synthetic(codec, params, axis), batch)
        metrics |= {name: value for name, value in learned.items() if value.ndim == 0}
        return State(params, learned, opt_state, carry, state.step + 1), metrics

    return step if mesh is None else parallel.shard_step(step, mesh, batches.specs(objective.needs))
