"""`benchmarks.frequency_gradient` against SciPy's transforms and descent on pixels in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft

from benchmarks import frequency_gradient as bench
from gsdd_jax import codecs
from gsdd_jax.codecs import FrequencySpec

H, W = 6, 8
DRAWN = np.random.default_rng(0)
# Some bright and some dark, so that the mean of an image varies most.
IMAGES = jnp.asarray(DRAWN.uniform(0, 0.3, (8, H, W, 3)) + DRAWN.uniform(0, 0.7, (8, 1, 1, 1)), jnp.float32)
LABELS = np.arange(len(IMAGES)) % 2


def test_scale_is_that_of_the_two_transforms_of_scipy():
    x = np.random.default_rng(0).normal(size=(5, 7))
    ratio = fft.dctn(x, norm=None) / fft.dctn(x, norm="ortho")
    np.testing.assert_allclose(bench.unnormalized(np.arange(35), (5, 7)), ratio.reshape(-1), rtol=1e-6)


def test_closed_form_is_what_the_codec_stores():
    rows = bench.rows(IMAGES, LABELS, coefficients=9, steps=2)
    spec = FrequencySpec(coefficients=9, mask="variance", images_per_class=len(IMAGES) // 2)
    codec = codecs.make(spec, image_shape=IMAGES.shape[1:], num_classes=2, bytes_per_class=1 << 20)
    of_classes = np.concatenate([IMAGES[0::2], IMAGES[1::2]])
    drawn = np.asarray(codec.decode(codec.init(None, of_classes)), np.float64)
    psnr = np.mean(-10 * np.log10(np.mean((drawn - of_classes) ** 2, axis=(1, 2, 3))))
    plain = [row["closed_form"] for row in rows if not row["normalized"]]
    assert plain == pytest.approx([psnr] * 4, abs=0.01)
    assert all(value <= row["closed_form"] + 1e-4 for row in rows for value in row["psnr"].values() if value)
