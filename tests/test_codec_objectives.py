"""Codecs learn under every objective: one outer step moves all that the images it saw are made from."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_codecs
from objectives import data_of
from test_codecs import CLASSES, TRAITS, Traits, leaves, parts, trained_leaves
from test_determinism import FIRST, codec_of

from gsdd_jax import codecs, distillation, match, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.match import GradientSpec, KernelRidgeSpec, TrajectorySpec
from gsdd_jax.nets import NetSpec, Network, build

# Distribution matching of every codec is in test_determinism.py. An objective knows of a codec no more than its images
# and their derivative, so that one of each kind meets the one that takes longest to compile.
OBJECTIVES = {
    # Some of the images of a class, where it has more.
    "gradient": GradientSpec(batch_real=4, batch_syn=2, outer_loop=1, inner_loop=1),
    "kernel_ridge": KernelRidgeSpec(batch_real=4, pool=1),
    # All images in the one step of the student; more are in test_trajectory.py and take longer to compile.
    "trajectory": TrajectorySpec(syn_steps=1, syn_lr=1.0, expert_epochs=1, max_start_epoch=1),
}
# A derivative written by hand, ranges that follow, one decoder of random images, and parts that some images share.
KINDS = {"gradient": ("gaussian", "packed_gaussian", "latent", "factor"), "kernel_ridge": ("packed_gaussian",)}
PAIRS = [(codec, name) for codec in FIRST for name in OBJECTIVES if codec in KINDS.get(name, FIRST)]


class Step(NamedTuple):
    before: test_codecs.Case
    after: Any  # parameters
    metrics: dict[str, np.ndarray]
    drawn: np.ndarray  # whole numbers, the images


@functools.cache
def setting(image_shape: tuple[int, int, int]) -> tuple[Network, Any]:
    """Returns a network, and what makes the data that an objective sees."""
    # Without a norm, whose second derivatives are most of what there is to compile.
    network = build(NetSpec(depth=1, width=6, norm="none"), image_shape, CLASSES)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (16, *image_shape), np.uint8), np.arange(16) % CLASSES
    whitening = whiten.fit("meanstd", images)
    return network, lambda objective: data_of(objective, images, labels, whitening)


def take(codec: codecs.Codec, params: Any, images: np.ndarray, name: str) -> Step:
    """Takes the first step of an objective from the codec's own start."""
    asked = []

    def decode(params, index=None, **options):
        asked.append(jnp.arange(codec.num_images) if index is None else index)
        return codec.decode(params, index, **options)

    network, data = setting(codec.image_shape)
    # Only the objective is to move anything: Gaussians have a loss on their borders, of all images.
    watched = codec._replace(decode=decode, regularize=lambda params: jnp.zeros(()))
    objective = match.make(OBJECTIVES[name], codec=watched, network=network, augment=DsaSpec(strategy="none"))
    step = distillation.make_step(objective)

    @jax.jit
    def first(params, given, key):
        state, metrics = step(distillation.init_state(objective, params), given, key)
        # What is drawn does not depend on what is differentiated, so it may leave the gradient.
        return state.params, metrics, jnp.concatenate(asked)

    after, metrics, drawn = jax.device_get(first(params, data(objective), jax.random.key(6)))
    traits = TRAITS.get(codec.name, Traits())
    return Step(test_codecs.Case(codec, images, params, params, None, traits), after, metrics, drawn)


@pytest.fixture(scope="module")
def started(request) -> tuple[codecs.Codec, Any, np.ndarray]:
    codec, start = codec_of(FIRST[request.param])
    images = np.random.default_rng(1).uniform(0, 1, (codec.num_images, *codec.image_shape)).astype(np.float32)
    return codec, jax.device_get(start(jax.random.key(3), images)), images


def test_pairs_cover_every_codec_and_every_objective():
    assert FIRST.keys() == codecs.SPECS.keys()
    assert {*OBJECTIVES, "distribution"} == match.SPECS.keys()
    assert {codec for codec, _ in PAIRS} == FIRST.keys() and {name for _, name in PAIRS} == OBJECTIVES.keys()
    assert all(match.SPECS[name] is type(spec) for name, spec in OBJECTIVES.items())


@pytest.mark.parametrize(("started", "name"), PAIRS, indirect=["started"])
def test_one_step_moves_every_leaf_of_every_image_drawn_and_nothing_else(started, name):
    codec = started[0]
    before, after, metrics, drawn = take(*started, name)
    assert all(np.isfinite(value).all() for value in metrics.values())
    each = getattr(OBJECTIVES[name], "batch_syn", 0) or codec.images_per_class
    assert np.bincount(np.unique(drawn) // codec.images_per_class).tolist() == [each] * CLASSES
    moved = {leaf: new - leaves(before.params)[leaf] for leaf, new in leaves(after).items()}
    trained = trained_leaves(moved, before.traits)
    changed = {leaf for leaf in moved if moved[leaf].any()}
    assert trained.keys() <= changed <= trained.keys() | {*before.traits.following}
    for leaf, by in trained.items():
        assert np.isfinite(by).all(), leaf
        chosen = parts(before, leaf)
        for i in drawn:
            assert by[chosen[i]].any(), (leaf, i)
        assert not by[~chosen[drawn].any(0)].any(), leaf
