"""Data for steps of any objective, for the tests."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import match
from gsdd_jax.batches import Data, hold


def data_of(
    objective: match.Objective,
    images: np.ndarray,
    labels: np.ndarray,
    whitening: Any,
    *,
    drawn: Mapping[str, Any] | None = None,
    move: float = 0.02,
) -> Data:
    """Returns data with the training set held and, for trajectories, random weights and ones a little further on.

    Not far: the loss is relative to the distance, and its gradient must not be lost in the rounding of a leaf.
    """
    held, given = hold(images, labels, objective.codec.num_classes), dict(drawn or {})
    rng = np.random.default_rng(0)
    for name, need in objective.needs.items():
        if isinstance(need, match.ExpertSegments) and name not in given:
            start = rng.normal(0, 0.2, (need.objective.segments, objective.network.num_params))
            segments = np.stack([start, start + rng.normal(0, move, start.shape)], axis=1)
            given[name] = jnp.asarray(segments, jnp.float32)
        if isinstance(need, match.ExpertWeights) and name not in given:
            given[name] = jnp.asarray(rng.normal(0, 0.2, objective.network.num_params), jnp.float32)
        if isinstance(need, match.ExpertNetworks) and name not in given:
            spec, params = need.objective, objective.network.init(jax.random.key(0))
            weights = jnp.asarray(rng.normal(0, 0.2, (2, objective.network.num_params)), jnp.float32)
            features = objective.network.outputs(params, jnp.zeros((1, *images.shape[1:])))[1].size
            kept = jnp.asarray(rng.normal(0, 0.2, (objective.codec.num_classes, features)), jnp.float32)
            later = weights[1] if spec.later_epochs else None
            given[name] = match.ExpertNetwork(weights[0], later, jnp.int32(1), kept if spec.draws else None)
    return Data(whitening, held, given)
