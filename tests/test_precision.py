"""Under JAX_ENABLE_X64 all is computed in float32 as without; traced only."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_codecs
import test_determinism

from gsdd_jax import experts, fitting, training, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.nets import NetSpec, build

KEY = functools.partial(jax.random.key, 0)
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
LABELS = np.arange(16, dtype=np.int32) % 2


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def traced(function: Callable, *args: Any) -> Any:
    """Returns the shapes that a function returns, of which none may be wider than 32 bits."""
    found = jax.eval_shape(function, *args)
    wide = {jax.tree_util.keystr(p): x.dtype for p, x in jax.tree.leaves_with_path(found) if x.dtype == jnp.float64}
    assert not wide
    return found


def dtypes(tree: Any) -> list[Any]:
    return [x.dtype for x in jax.tree.leaves(tree)]


# The first of each codec.
@pytest.mark.parametrize("name", {spec.name: name for name, spec in reversed(test_codecs.SPECS.items())}.values())
def test_a_codec_starts_decodes_and_is_fitted_in_float32(name):
    codec = test_codecs.make(test_codecs.SPECS[name])
    images = np.zeros((codec.num_images, *codec.image_shape))
    params = traced(codec.init, KEY(), images)
    images = np.float32(images)
    traced(lambda p: codec.decode(p, np.arange(2), key=KEY()), params)
    traced(jax.grad(lambda p: codec.regularize(p) + codec.decode(p).sum(), allow_int=True), params)
    traced(codec.quantize, params)
    state = traced(lambda: fitting.init_fit(KEY(), images, codec=codec, steps=5))
    assert dtypes(traced(lambda s: fitting.fit_steps(s, images, codec=codec, steps=5, count=2)[0], state)) == dtypes(
        state
    )


@pytest.mark.parametrize("name", [name for name in test_determinism.CASES if "," in name or name == "gaussian"])
def test_an_outer_step_keeps_the_dtypes_of_its_state(name):
    begin, step, data = test_determinism.programs(name, "{}")
    codec, start = test_determinism.codec_of(test_determinism.CASES[name].codec)
    images = np.zeros((codec.num_images, *codec.image_shape), np.float32)
    state = traced(lambda: begin(start(KEY(), images)))
    assert dtypes(traced(step, state, data, KEY())[0]) == dtypes(state)
    # Nor is anything in between computed in 64 bits, but for numbers of the program, and labels on optax's way to a sum
    # of 1.
    if "kernel ridge" not in name:
        assert not re.search(r"f64\[\d", str(jax.make_jaxpr(step)(state, data, KEY())))


@pytest.mark.parametrize("name", ["convnet", "vit"])
def test_networks_have_weights_and_logits_in_float32(name):
    network = build(NetSpec(name=name), IMAGES.shape[1:], 2)
    traced(lambda: network.apply(network.init(KEY()), jnp.zeros(IMAGES.shape, jnp.float32))[0])
    traced(network.init, KEY())


@pytest.mark.parametrize(("optimizer", "schedule"), [("sgd", "step"), ("adam", "warmup_cosine")])
def test_networks_and_experts_are_trained_in_float32(optimizer, schedule):
    network = build(NetSpec(depth=1, width=2), IMAGES.shape[1:], 2)
    seen = {"network": network, "augment": DsaSpec()}
    seen |= {"whitening": whiten.fit("meanstd", IMAGES)}
    spec = training.EvalSpec(steps=3, batch=4, optimizer=optimizer, schedule=schedule, ema=0.9)
    for labels in (LABELS, np.eye(2, dtype=np.float32)[LABELS]):
        train = functools.partial(training.train_network, images=IMAGES, labels=jnp.asarray(labels), spec=spec, **seen)
        traced(train, KEY())
    theta = jnp.zeros(network.num_params, jnp.float32)
    expert = experts.ExpertSpec(batch=4, epochs=1, momentum=0.9, weight_decay=5e-4, schedule="cosine", cutmix=0.5)
    seen["spec"] = expert
    traced(
        lambda theta: experts.train_epoch(
            theta, expert.optimizer().init(theta), KEY(), 0, jnp.asarray(IMAGES), jnp.asarray(LABELS), 0.1, **seen
        ),
        theta,
    )


def test_whitening_is_float32():
    small = IMAGES[:, :4, :4]
    for kind in ("meanstd", "zca"):
        whitening = whiten.fit(kind, small)
        assert set(dtypes(whitening)) == {jnp.dtype(jnp.float32)}
        traced(whitening, np.float32(small))
