"""FreD's coefficients in integer codes, against SciPy's transform and grids laid by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft

from gsdd_jax import codecs
from gsdd_jax.codecs import FrequencySpec, PackedFrequencySpec, packed_frequency
from gsdd_jax.codecs.base import CENTER, SPREAD

SHAPE, CLASSES = (6, 8, 3), 2
IMAGES = np.random.default_rng(0).uniform(0, 1, (8, *SHAPE)).astype(np.float32)


def make(spec, budget=10_000):
    return codecs.make(spec, image_shape=SHAPE, num_classes=CLASSES, bytes_per_class=budget)


def test_images_are_those_of_the_nearest_codes_between_the_ends_of_each_coefficient():
    spec = PackedFrequencySpec(coefficients=9, images_per_class=4, bits=3)
    codec = make(spec)
    params = jax.jit(codec.init)(None, IMAGES)
    drawn = np.asarray(jax.jit(codec.decode)(params))
    places = np.asarray(params["index"]).astype(int)
    for label in range(CLASSES):
        pictures = (np.asarray(IMAGES[4 * label : 4 * label + 4], np.float64) - CENTER) / SPREAD
        numbers = fft.dctn(pictures, axes=(1, 2), norm="ortho").reshape(4, -1, 3)[:, places[label]]
        low, high = numbers.min(0), numbers.max(0)
        # Seven steps, a little longer than needed, since bfloat16 has to hold them.
        step = (high - low) / 7
        full = np.zeros((4, SHAPE[0] * SHAPE[1], 3))
        full[:, places[label]] = low + np.round((numbers - low) / step) * step
        expected = CENTER + SPREAD * fft.idctn(full.reshape(4, *SHAPE), axes=(1, 2), norm="ortho")
        # A code that lies halfway may fall to either side.
        assert np.mean(np.abs(drawn[4 * label : 4 * label + 4] - expected)) < 0.02
        rounded = np.asarray(packed_frequency.quantized(params, 3)["coefficients"])[4 * label : 4 * label + 4]
        assert np.abs(rounded - numbers).max() <= 0.51 * np.max(np.asarray(params["step"])[label])
        assert all(len(np.unique(rounded[:, j, k])) <= 8 for j in range(9) for k in range(3))


def test_many_bits_are_those_of_frequency_in_float32():
    plain = make(FrequencySpec(coefficients=9, images_per_class=4))
    coded = make(PackedFrequencySpec(coefficients=9, images_per_class=4, bits=16))
    first = plain.decode(plain.init(None, IMAGES))
    np.testing.assert_allclose(coded.decode(coded.init(None, IMAGES)), first, atol=1e-4)


def test_grids_follow_the_numbers_and_leave_out_what_is_not_finite():
    codec = make(PackedFrequencySpec(coefficients=5, images_per_class=4, bits=4))
    params = codec.init(None, IMAGES)
    moved = params | {"coefficients": 3.0 * params["coefficients"] + 1.0}
    followed = jax.jit(codec.project)(moved | {"coefficients": moved["coefficients"].at[0, 0, 0].set(jnp.nan)})
    low, step = np.asarray(followed["low"]), np.asarray(followed["step"])
    numbers = np.asarray(moved["coefficients"]).reshape(CLASSES, 4, 5, 3)
    finite = np.ones((CLASSES, 4, 5, 3), bool)
    finite[0, 0, 0, 0] = False
    inside_low = np.where(finite, numbers, np.inf).min(1)
    inside_high = np.where(finite, numbers, -np.inf).max(1)
    assert (low <= inside_low).all() and (low + 15 * step >= inside_high).all()
    # No coarser than bfloat16 asks for.
    assert (low + 15 * step - low <= 1.05 * (inside_high - inside_low) + 0.02 * np.abs(inside_low)).all()


def test_gradient_passes_straight_through_the_rounding():
    codec = make(PackedFrequencySpec(coefficients=5, images_per_class=4, bits=2))
    plain = make(FrequencySpec(coefficients=5, images_per_class=4))
    params = codec.init(None, IMAGES)
    weights = np.random.default_rng(1).normal(size=IMAGES.shape).astype(np.float32)
    found = jax.jit(jax.grad(lambda p: jnp.sum(weights * codec.decode(p))))(params)
    bare = {name: params[name] for name in ("coefficients", "index")}
    expected = jax.jit(jax.grad(lambda p: jnp.sum(weights * plain.decode(p))))(bare)
    np.testing.assert_allclose(found["coefficients"], expected["coefficients"], rtol=1e-5)
    assert not found["low"].any() and not found["step"].any()


def test_bytes_are_codes_of_so_many_bits_two_ends_of_each_grid_and_the_places():
    codec = make(PackedFrequencySpec(coefficients=7, images_per_class=3, bits=5))
    written = codec.pack(codec.quantize(codec.init(None, IMAGES[:6])))
    sizes = {name: np.asarray(x).nbytes for name, x in written.items()}
    grids = CLASSES * 7 * 3 * 2
    # 6 images of 21 codes in 5 bits are 630 bits; a bit for each of 48 places of a class beats 7 numbers.
    assert sizes == {"codes": 79, "low": grids, "step": grids, "mask": 12}


def test_bits_after_the_last_code_are_refused():
    spec = PackedFrequencySpec(coefficients=7, images_per_class=3, bits=5)
    codec = make(spec)
    written = codec.pack(codec.quantize(codec.init(None, IMAGES[:6])))
    written["codes"][-1] |= 1
    with pytest.raises(ValueError, match="codes: the 2 bits after the last code must be 0"):
        codec.unpack(written)
