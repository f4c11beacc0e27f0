import jax
import numpy as np
import pytest

from gsdd_jax import codecs
from gsdd_jax.codecs import PaletteSpec

KEY = jax.random.key(0)


def make(spec: PaletteSpec, shape=(4, 5, 3), classes=2, budget=None) -> codecs.Codec:
    return codecs.make(spec, image_shape=shape, num_classes=classes, bytes_per_class=budget)


@pytest.mark.parametrize("shared", ["image", "class", "set"])
def test_colors_are_the_means_of_the_pixels_drawn_in_them(shared):
    codec = make(PaletteSpec(bits=2, images_per_class=3, shared=shared))
    images = np.random.default_rng(0).uniform(-0.2, 1.2, (6, 4, 5, 3)).astype(np.float32)
    params = codec.init(KEY, images)
    groups = images.astype(np.float64).reshape(len(params["palettes"]), -1, 3)
    colors = np.round(np.asarray(params["palettes"], np.float64) * 85) / 85
    after = codec.project(params)["palettes"]
    drawn = np.asarray(codec.decode(params)).reshape(groups.shape)
    for group, palette, moved, shown in zip(groups, colors, after, drawn, strict=True):
        chosen = ((group[:, None] - palette) ** 2).sum(-1).argmin(1)
        np.testing.assert_allclose(shown, palette[chosen], atol=1e-6)
        for i in range(4):
            np.testing.assert_allclose(moved[i], group[chosen == i].mean(0), atol=1e-6)
    # Lloyd's steps have brought the start, pixels themselves, nearer.
    start = codecs.palette.start(groups.astype(np.float32), 4)
    error = ((groups[:, :, None] - np.asarray(start)[:, None]) ** 2).sum(-1).min(-1).mean()
    assert ((drawn - groups) ** 2).sum(-1).mean() < 0.95 * error


def test_bytes_are_codes_and_palettes():
    # 2 bits of 1,024 pixels and 4 colors of 3 bytes: 268 for an image.
    many = make(PaletteSpec(bits=2), (32, 32, 3), 10, 12288)
    assert (many.images_per_class, many.nbytes(None)) == (12288 // 268, 10 * 45 * 268)
    # 3 bits of 64 pixels, and 8 bytes once: 10 digits per class in 256 bytes.
    digits = make(PaletteSpec(bits=3, shared="set"), (8, 8, 1), 10, 256)
    assert (digits.images_per_class, digits.nbytes(None)) == (10, 10 * 10 * 24 + 8)


def test_padding_is_checked():
    codec = make(PaletteSpec(bits=1, images_per_class=1), (1, 3, 1))
    arrays = codec.pack(codec.quantize(codec.init(KEY, np.zeros((2, 1, 3, 1), np.float32))))
    arrays["codes"] = arrays["codes"] | 1
    with pytest.raises(ValueError, match="codes: the 2 bits after the last code must be 0"):
        codec.unpack(arrays)
