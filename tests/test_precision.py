"""Under JAX_ENABLE_X64 all is computed in float32 as without; traced only, but for one comparison of bits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_codec_objectives
import test_codecs

from gsdd_jax import codecs, distillation, experts, fitting, match, training, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.match import DistributionSpec
from gsdd_jax.nets import NetSpec, build

KEY = functools.partial(jax.random.key, 0)
OBJECTIVES = test_codec_objectives.OBJECTIVES | {"distribution": DistributionSpec(batch_real=4, batch_syn=2)}
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", test_codecs.SPECS)
def test_a_codec_starts_decodes_and_is_fitted_in_float32(name, dtype):
    codec = test_codecs.make(test_codecs.SPECS[name])
    images = np.zeros((codec.num_images, *codec.image_shape), dtype)
    params = traced(codec.init, KEY(), images)
    if dtype == np.float64:
        return
    traced(lambda p: codec.decode(p, np.arange(2), key=KEY()), params)
    traced(jax.grad(lambda p: codec.regularize(p) + codec.decode(p).sum(), allow_int=True), params)
    traced(codec.quantize, params)
    state = traced(lambda: fitting.init_fit(KEY(), images, codec=codec, steps=5))
    assert dtypes(traced(lambda s: fitting.fit_steps(s, images, codec=codec, steps=5, count=2)[0], state)) == dtypes(
        state
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_outer_step_keeps_the_dtypes_of_its_state(name):
    codec = test_codecs.make(test_codecs.SPECS["packed"])
    objective, data = objective_and_data(codec, name)
    step = distillation.make_step(objective)
    images = np.zeros((codec.num_images, *codec.image_shape), np.float32)
    state = traced(lambda: distillation.init_state(objective, codec.init(KEY(), images)))
    assert dtypes(traced(step, state, data, KEY())[0]) == dtypes(state)


def objective_and_data(codec: codecs.Codec, name: str) -> tuple[Any, Any]:
    network, data = test_codec_objectives.setting(codec.image_shape)
    made = match.make(OBJECTIVES[name], codec=codec, network=network, augment=DsaSpec(strategy="none"))
    return made, data(made)


@pytest.mark.parametrize("name", ["convnet", "alexnet", "vgg11", "resnet18", "vit"])
def test_networks_have_weights_and_logits_in_float32(name):
    network = build(NetSpec(name=name), IMAGES.shape[1:], 2)
    traced(lambda: network.apply(network.init(KEY()), jnp.zeros(IMAGES.shape, jnp.float32))[0])
    traced(network.init, KEY())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["step", "cosine", "warmup_cosine"])
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


def test_a_step_is_that_of_a_run_without_up_to_the_rounding_of_adam():
    codec = test_codecs.make(test_codecs.SPECS["packed"])
    images = np.random.default_rng(1).uniform(0, 1, (codec.num_images, *codec.image_shape)).astype(np.float32)
    objective, data = objective_and_data(codec, "distribution")
    step = distillation.make_step(objective)

    def taken() -> list[np.ndarray]:
        state = distillation.init_state(objective, jax.jit(codec.init)(KEY(), images))
        after, metrics = jax.device_get(jax.jit(step)(state, data, KEY()))
        return [metrics["loss"], metrics["grad_norm"], *jax.tree.leaves(after.params)]

    with jax.enable_x64(False):
        expected = taken()
    found = taken()
    assert found[:2] == expected[:2]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
