"""Networks drawn from experts for distribution matching, and what the whole training set is under each.

Statistics of all real images are computed when a network is first drawn, and kept beside the experts, in a folder
named by the hash of all that they depend on: a later step, or run, reads 40 kB in place of a pass over the data.
"""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import files
from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.experts import Experts
from gsdd_jax.match.distribution import DistributionSpec, ExpertNetwork, draw_key, statistics
from gsdd_jax.match.needs import ExpertNetworks, Source
from gsdd_jax.match.trajectory import flattener
from gsdd_jax.nets import Network
from gsdd_jax.whiten import Whitening, inputs

# Images of one class that go through a network at a time; one shape is compiled.
_BATCH = 250


class Choice(NamedTuple):
    """What an iteration draws.

    Attributes:
        expert: Its number.
        epoch: Of the network that matches.
        later: Of the network of the cross entropy.
        draw: Of the augmentation.
    """

    expert: int
    epoch: int
    later: int
    draw: int


class Networks:
    """Draws the network of each iteration as a pure function of `(seed, iteration)`; for `data.prefetch`.

    Expert and epoch are uniform and independent. Where networks are interpolated, epoch `e` of the last `E` stands for
    `(1 - e/E)` times the first and `e/E` times the last weights. Deviation: DANCE draws the share from all of [0, 1].
    """

    def __init__(self, experts: Experts, need: ExpertNetworks, source: Source, *, seed: int):
        """Names the statistics by what they depend on; reads the training set where there are some.

        Args:
            experts: Where to read; what has ``means``, statistics for each of them, brings its own.
            need: Objective, network, and augmentation of matched images.
            source: The training set and its whitening.
            seed: 0 to 2**64 - 1.
        """
        self._experts, self._need, self._source, self._seed = experts, need, source, seed
        self._means = getattr(experts, "means", None)
        if need.objective.draws and self._means is None:
            self._folder = experts.path / "statistics" / _identity(need, source)
            self._members = [np.flatnonzero(source.labels == label) for label in range(source.num_classes)]

    def choice(self, iteration: int) -> Choice:
        """Returns what iteration `iteration`, at least 0, draws."""
        spec = self._need.objective
        # As for `experts.Segments`: 2**64 counter values for each iteration.
        raw = [int(x) for x in np.random.Philox(counter=int(iteration) << 64, key=self._seed).random_raw(4)]
        epoch = raw[1] % (spec.expert_epochs + 1)
        later = epoch + raw[2] % (min(spec.later_epochs, spec.expert_epochs - epoch) + 1)
        return Choice(raw[0] % self._experts.count, epoch, later, raw[3] % max(spec.draws, 1))

    def weights(self, expert: int, epoch: int) -> np.ndarray:
        """Returns flat weights, float32 `[p]`, of an expert after an epoch, or of the mix that stands for it."""
        spec = self._need.objective
        if spec.networks == "experts":
            return self._experts.row(expert, epoch)
        share = np.float32(epoch / spec.expert_epochs)
        return (1 - share) * self._experts.row(expert, 0) + share * self._experts.row(expert, spec.expert_epochs)

    def batch(self, step: int) -> Any:
        """Returns the `ExpertNetwork` of iteration `step`.

        Raises:
            ValueError: Weights are damaged.
            OSError: Statistics cannot be written.
        """
        spec, choice = self._need.objective, self.choice(step)
        weights = self.weights(choice.expert, choice.epoch)
        later = self.weights(choice.expert, choice.later) if spec.later_epochs else None
        kept = self._statistics(choice, weights) if spec.draws else None
        return ExpertNetwork(weights, later, np.int32(choice.draw), kept)

    def _statistics(self, choice: Choice, weights: np.ndarray) -> np.ndarray:
        """Reads those of a network, or computes and keeps them; what is damaged is computed anew."""
        if self._means is not None:
            return self._means[choice.expert]
        file = self._folder / f"{choice.expert}-{choice.epoch}-{choice.draw}.npz"
        try:
            # A zip file has a checksum.
            with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
                return arrays["statistics"]
        except (FileNotFoundError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            found = np.stack([self._of_class(weights, choice.draw, label) for label in range(self._source.num_classes)])
        data = io.BytesIO()
        np.savez(data, statistics=found)
        self._folder.mkdir(parents=True, exist_ok=True)
        files.write_bytes(file, data.getvalue())
        return found

    def _of_class(self, weights: np.ndarray, draw: int, label: int) -> np.ndarray:
        """Returns mean statistics, float32 `[s]`, summed over batches in float64."""
        source, need, members = self._source, self._need, self._members[label]
        key = jax.random.split(draw_key(draw), source.num_classes)[label]
        sums: Any = 0.0
        for first in range(0, len(members), _BATCH):
            chosen = members[first : first + _BATCH]
            total = _sum(
                weights,
                key,
                draw_key(draw),
                source.images[np.resize(chosen, _BATCH)],
                np.arange(_BATCH) < len(chosen),
                source.whitening,
                network=need.network,
                augment=need.augment,
                spec=need.objective,
            )
            sums = sums + np.asarray(total, np.float64)
        mean: np.ndarray = sums / len(members)
        return mean.astype(np.float32)


def shapes(need: ExpertNetworks, source: Source, num_params: int) -> ExpertNetwork:
    """Returns shapes and dtypes of what `Networks` draws; computes nothing."""
    spec, weights = need.objective, jax.ShapeDtypeStruct((num_params,), jnp.float32)
    kept = None
    if spec.draws:
        one = jax.ShapeDtypeStruct((1, *source.images.shape[1:]), jnp.float32)
        params = jax.eval_shape(need.network.init, jax.eval_shape(lambda: jax.random.key(0)))
        features = jax.eval_shape(lambda *x: need.network.outputs(*x)[1].reshape(-1), params, one)
        per_class = jax.eval_shape(lambda x: statistics(spec, draw_key(0), x), features)
        kept = jax.ShapeDtypeStruct((source.num_classes, *per_class.shape), jnp.float32)
    later = weights if spec.later_epochs else None
    return ExpertNetwork(weights, later, jax.ShapeDtypeStruct((), jnp.int32), kept)


@functools.partial(jax.jit, static_argnames=("network", "augment", "spec"))
def _sum(
    weights: jax.Array,
    key: jax.Array,
    key_draw: jax.Array,
    images: jax.Array,
    counts: jax.Array,
    whitening: Whitening,
    *,
    network: Network,
    augment: DsaSpec,
    spec: DistributionSpec,
) -> jax.Array:
    """Returns the sum of statistics, `[s]`, over those images of a batch that count."""
    seen = dsa(key, inputs(images, whitening), augment, siamese=True)
    features = network.outputs(flattener(network)[1](weights), seen)[1].reshape(len(seen), -1)
    return jnp.sum(counts[:, None] * statistics(spec, key_draw, features), 0)


def _identity(need: ExpertNetworks, source: Source) -> str:
    """Returns the hash of all that statistics depend on beside the experts in whose folder they are."""
    spec = need.objective
    mixed = spec.expert_epochs if spec.networks == "interpolated" else 0
    distance = (spec.distance, spec.frequencies if spec.distance == "characteristic" else spec.variance > 0)
    unit = ("normalize",) if spec.distance == "mean" and spec.normalize else ()
    digest = hashlib.sha256(repr((mixed, distance, need.augment, *unit)).encode())
    for array in (source.labels, *jax.tree.leaves(source.whitening)):
        digest.update(np.ascontiguousarray(array).data)
    for first in range(0, len(source.images), _BATCH):
        digest.update(np.ascontiguousarray(source.images[first : first + _BATCH]).data)
    return digest.hexdigest()[:16]
