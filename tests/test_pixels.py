"""Every function that takes images: uint8 and floating point in [0,1] give the same result, all else one message."""

import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import codecs, data, evaluation, experts, fitting, labels, pixels, training, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.batches import hold
from gsdd_jax.match import distribution_loss, feature_mmd, gradient_loss
from gsdd_jax.nets import NetSpec, build

SHAPE = (8, 8, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), dtype=np.uint8)
LABELS = np.array([0, 1, 0, 1, 0, 1], np.int32)
NETWORK = build(NetSpec(depth=1, width=4), SHAPE, 2)
KEY = jax.random.key(0)
PARAMS = NETWORK.init(jax.random.key(5))
EXPERT = experts.ExpertSpec(batch=6)
THETA = experts.flattener(NETWORK)[0](PARAMS)
WHITENING = whiten.fit("meanstd", IMAGES)
PLAIN = DsaSpec(strategy="none")
TRANSFORM = {"whitening": WHITENING}
LOSS = {"network": NETWORK, **TRANSFORM}


def _loss(loss: Callable, real: jax.Array, **more: object) -> jax.Array:
    key = [] if loss is feature_mmd else [KEY]
    return loss(*key, jnp.asarray(real).reshape(2, 3, *SHAPE), jnp.full((2, 2, *SHAPE), 0.5), **LOSS, **more)


def _pixel_codec() -> codecs.Codec:
    return codecs.make(
        codecs.PixelSpec(images_per_class=3), image_shape=SHAPE, num_classes=2, bytes_per_class=3 * 64 * 4
    )


def _moved(images: np.ndarray) -> jax.Array:
    state = fitting.init_fit(KEY, IMAGES, codec=_pixel_codec(), steps=1)
    return fitting.fit_steps(state, images, codec=_pixel_codec(), steps=1, count=1)[1]


# What takes real images, and what it makes of them.
REAL = {
    "whiten.fit": lambda x: whiten.fit("meanstd", x).std,
    "hold": lambda x: pixels.as_float(hold(x, LABELS, 2).images),
    "HostSampler": lambda x: pixels.as_float(
        data.HostSampler(x, LABELS, num_classes=2, batch=2, seed=0).batch(0), "batch"
    ),
    "solid_targets": lambda x: fitting.solid_targets(x, 2),
    "data.check": lambda x: pixels.as_float(data.check(data.Dataset("toy", x, LABELS, x, LABELS, ("a", "b")))[1]),
    "accuracy": lambda x: evaluation.accuracy(PARAMS, x, jnp.asarray(LABELS), **LOSS),
}
# What takes decoded or normalized images too.
ANY = {
    "distribution_loss": jax.jit(lambda x: _loss(distribution_loss, x, augment=PLAIN, class_chunk=1)),
    "gradient_loss": jax.jit(lambda x: _loss(gradient_loss, x, augment=PLAIN, class_chunk=1, params=PARAMS)),
    "feature_mmd": jax.jit(lambda x: _loss(feature_mmd, x, params=PARAMS)),
    "codec.init": lambda x: _pixel_codec().init(KEY, x)["images"],
    "init_fit": lambda x: fitting.init_fit(KEY, x, codec=_pixel_codec(), steps=1).params["images"],
    "fit_steps": _moved,
    "psnr": lambda x: fitting.psnr(x, IMAGES[::-1]),
    "whitening": lambda x: WHITENING(x),
    "training.inputs": lambda x: training.inputs(jnp.asarray(x), WHITENING),
    "label": lambda x: labels.label(jax.tree.map(lambda leaf: leaf[None], PARAMS), x, **LOSS),
    "train_epoch": lambda x: experts.train_epoch(
        THETA,
        EXPERT.optimizer().init(THETA),
        KEY,
        0,
        jnp.asarray(x),
        jnp.asarray(LABELS),
        0.1,
        augment=PLAIN,
        spec=EXPERT,
        **LOSS,
    )[0],
}


@pytest.mark.parametrize("door", [*REAL, *ANY])
def test_bytes_and_floats_of_the_same_images_give_the_same_result(door: str) -> None:
    take = (REAL | ANY)[door]
    expected = np.asarray(take(IMAGES))
    np.testing.assert_allclose(take(IMAGES / 255), expected, rtol=1e-4, atol=1e-5)
    # The images count: those of another set give something else.
    assert np.abs(np.asarray(take(np.tile(IMAGES[:1] // 2, (6, 1, 1, 1)))) - expected).max() > 1e-4


@pytest.mark.parametrize("form", [np.int64, bool])
@pytest.mark.parametrize("door", [*REAL, *ANY])
def test_other_dtypes_are_refused_everywhere(door: str, form: type) -> None:
    with pytest.raises(TypeError, match=rf": found {np.dtype(form)}|found int32|found uint32"):
        (REAL | ANY)[door](IMAGES.astype(form))


def _at(value: float) -> np.ndarray:
    images = IMAGES / 255
    images[0, 0, 0, 0] = value
    return images


@pytest.mark.parametrize("images", [IMAGES * 1.0, IMAGES / 127.5 - 1, _at(np.nan)])
@pytest.mark.parametrize("door", REAL)
def test_values_outside_are_refused_of_real_images(door: str, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"found float64 from .* to .* of shape .*floating point \(0 to 1\)"):
        REAL[door](images)


def test_bytes_in_floating_point_are_refused_of_any_images() -> None:
    for images in (IMAGES * 1.0, jnp.asarray(IMAGES, jnp.float32)):
        for door in ("codec.init", "init_fit"):
            with pytest.raises(ValueError, match=r"found float\d\d from 0 to 255 of shape \[6, 8, 8, 1\]"):
                ANY[door](images)
    # Decoded images leave [0,1], normalized ones too.
    np.testing.assert_array_equal(pixels.check(np.float32(IMAGES / 50 - 1), real=False), np.float32(IMAGES / 50 - 1))


def test_test_images_without_transform_are_what_the_network_sees() -> None:
    normal = np.asarray(WHITENING(IMAGES))
    assert normal.min() < -1 and normal.max() > 1.1
    hits = evaluation.accuracy(PARAMS, normal, jnp.asarray(LABELS), network=NETWORK)
    assert hits == evaluation.accuracy(PARAMS, IMAGES, jnp.asarray(LABELS), **LOSS)


def test_experts_take_both_forms_alike(tmp_path) -> None:
    refused = types.SimpleNamespace()
    with pytest.raises(ValueError, match="images: found float64 from 0 to 255"):
        experts.train_experts(
            tmp_path / "experts", IMAGES * 1.0, LABELS, origin=refused, spec=refused, objective=refused, **TRANSFORM
        )
    assert not (tmp_path / "experts").exists()


def test_number_of_labels_is_checked_with_the_images() -> None:
    with pytest.raises(ValueError, match="labels: found 4 of them for 6 images"):
        hold(IMAGES, LABELS[:4], 2)


def test_forms_are_kept_and_precision_is_float32() -> None:
    assert pixels.check(IMAGES) is IMAGES
    assert pixels.check(IMAGES / 255).dtype == np.float32
    assert pixels.as_float(np.float16([0.5])).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"found uint8 of shape \[0, 8, 8, 1\]; expected .*, none of them 0"):
        pixels.check(IMAGES[:0])
