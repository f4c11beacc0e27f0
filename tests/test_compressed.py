import io

import numpy as np
import pytest
from PIL import Image

from gsdd_jax import compressed

# Smooth, of different content: noise would fill files with its coefficients alone.
Y, X = np.mgrid[:16, :16] / 16
IMAGES = np.rint(
    127.5 + 127 * np.sin(np.arange(1, 13).reshape(12, 1, 1, 1) * (X + Y * Y)[..., None] + np.arange(3))
).astype(np.uint8)


def saved(image: np.ndarray, format: str, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, quality=quality, **compressed.OPTIONS[format])
    return file.getvalue()


@pytest.mark.parametrize("format", compressed.OPTIONS)
def test_only_what_tells_images_apart_is_counted(format):
    files = [saved(image, format, 30) for image in IMAGES[:2]]
    found = [compressed.compress(image, format, 30) for image in IMAGES[:2]]
    assert found[0][1] != found[1][1]
    # Padding to an even size; sizes in the unit's header of one byte or two.
    slack = {"webp": 1, "avif": 1, "jpeg": 0}[format]
    headers = [len(file) - size for file, (_, size) in zip(files, found, strict=True)]
    assert abs(headers[0] - headers[1]) <= slack
    if format == "webp":
        assert headers[0] - 30 in (0, 1)
    if format == "jpeg":
        assert files[0][: headers[0] - 2] == files[1][: headers[1] - 2] and files[0][-2:] == b"\xff\xd9"
    if format == "avif":
        # The last unit of the file, which ends it.
        assert files[0][-found[0][1] - 1] == found[0][1] & 127
    for file, (decoded, _) in zip(files, found, strict=True):
        np.testing.assert_array_equal(decoded, np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


@pytest.mark.parametrize("format", ["webp", "avif"])
def test_files_are_put_together_again_from_what_they_share_and_what_is_their_own(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    for images in (IMAGES[:3], [noise, noise[::-1]], [image[..., :1] for image in IMAGES[:3]]):
        files = [compressed.encode(image, format, 30) for image in images]
        cut = [compressed.strip(file, format) for file in files]
        assert len({shared for shared, _ in cut}) == 1
        for file, (shared, own) in zip(files, cut, strict=True):
            assert compressed.restore(shared, own, format) == file
            assert len(own) == compressed.PAYLOADS[format](file) + {"webp": 3, "avif": 0}[format]


def test_images_of_all_classes_fill_the_budget_and_no_more():
    candidates = [np.arange(6), np.arange(11, 5, -1)]
    sizes = [compressed.compress(image, "jpeg", 10)[1] for image in IMAGES]
    rounds = np.cumsum([sizes[a] + sizes[b] for a, b in zip(*candidates, strict=True)])
    images, spent = compressed.fill(IMAGES, candidates, "jpeg", 10, int(rounds[3]) - 1)
    assert len(images) == 2 * 3 and spent == rounds[2]
    np.testing.assert_array_equal(images[3], compressed.compress(IMAGES[11], "jpeg", 10)[0])
    assert compressed.fill(IMAGES, candidates, "jpeg", 10, int(rounds[0]) - 1)[0].shape == (0, 16, 16, 3)


@pytest.mark.parametrize("format", compressed.OPTIONS)
def test_frames_of_videos_are_counted_without_headers(format):
    """Two that stand still and then one of other content; no format needs more than for three images."""
    video = np.stack([IMAGES[0], IMAGES[0], IMAGES[5]])
    decoded, size = compressed.compress(video, format, 60)
    alone = [compressed.compress(image, format, 60) for image in video]
    assert decoded.shape == video.shape
    assert size <= sum(each for _, each in alone)
    for frame, (image, _) in zip(decoded, alone, strict=True):
        assert np.mean((frame.astype(float) - image) ** 2) < 60
    if format == "jpeg":
        np.testing.assert_array_equal(decoded, [image for image, _ in alone])
    else:
        file = io.BytesIO()
        first, *others = map(Image.fromarray, video)
        first.save(
            file, format, quality=60, save_all=True, append_images=others, duration=100, **compressed.OPTIONS[format]
        )
        # A still frame costs next to nothing, and containers of moving images more than those of still ones.
        assert size < 1.5 * (alone[0][1] + alone[2][1]) < len(file.getvalue())


def test_a_video_of_one_frame_is_an_image():
    decoded, size = compressed.compress(IMAGES[:1], "avif", 30)
    image, expected = compressed.compress(IMAGES[0], "avif", 30)
    np.testing.assert_array_equal(decoded, image[None])
    assert size == expected
