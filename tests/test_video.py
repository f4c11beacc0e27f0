"""Videos through what was made for images: codecs frame by frame, networks, augmentations, the three verbs."""

import dataclasses
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import gsdd_jax as gsdd
from gsdd_jax import augment, codecs, data, decode_numpy, evaluation, fitting, nets, whiten
from train import export, gallery, pictures

FRAMES, SIDE = 3, 8
SHAPE = (FRAMES, SIDE, SIDE, 1)


def videos(n: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    shape = (n, FRAMES, SIDE, SIDE, channels)
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


@pytest.mark.parametrize(
    "spec",
    [
        codecs.GaussianSpec(images_per_class=2, num_points=3),
        codecs.PackedGaussianSpec(images_per_class=2, num_points=3),
        codecs.PixelSpec(images_per_class=2, dtype="uint8"),
        codecs.DownscaleSpec(images_per_class=4, factor=2),
        codecs.FrequencySpec(images_per_class=2, coefficients=8),
    ],
    ids=lambda spec: spec.name,
)
def test_codecs_of_images_store_every_frame_as_an_image(spec):
    video = codecs.make(spec, image_shape=SHAPE, num_classes=2)
    per_class = spec.images_per_class * FRAMES
    image = codecs.make(
        type(spec)(**vars(spec) | {"images_per_class": per_class}), image_shape=SHAPE[1:], num_classes=2
    )
    targets = videos(2 * spec.images_per_class)
    params = video.init(jax.random.key(0), targets)
    frames = image.init(jax.random.key(0), targets.reshape(-1, *SHAPE[1:]))
    assert video.nbytes(params) == image.nbytes(frames)
    assert video.layout() == image.layout()
    drawn = np.asarray(image.decode(frames)).reshape(targets.shape)
    np.testing.assert_array_equal(video.decode(params), drawn)
    np.testing.assert_array_equal(video.decode(params, jnp.array([3, 1])), drawn[[3, 1]])
    larger = video.decode(params, jnp.array([2]), size=(5, 12, 10))
    assert larger.shape == (1, 5, 12, 10, 1)
    each = np.asarray(image.decode(frames, jnp.arange(6, 9), size=(12, 10)))
    middle = larger[0, 2]
    np.testing.assert_allclose(middle, each[1], atol=1e-5)


def test_static_and_dynamic_parts_hold_still_and_slow_videos():
    make = lambda **settings: codecs.make(  # noqa: E731
        codecs.StaticDynamicSpec(images_per_class=1, **settings), image_shape=SHAPE, num_classes=2
    )
    rows = np.linspace(0.2, 0.8, FRAMES * 16, dtype=np.float32).reshape(FRAMES, 4, 4, 1)
    small = jax.image.resize(np.stack([rows, rows[::-1]]), (2, *SHAPE), "linear")
    halves, still = make(factor=2), make(factor=0)
    params = halves.init(jax.random.key(0), small)
    assert halves.nbytes(params) == 2 * 4 * (SIDE**2 + FRAMES * 16)
    np.testing.assert_allclose(halves.decode(params), small, atol=1e-5)
    np.testing.assert_array_equal(halves.decode(params, jnp.array([1])), halves.decode(params)[1:])
    repeated = still.decode(still.init(jax.random.key(0), small))
    np.testing.assert_allclose(repeated, np.broadcast_to(small.mean(1, keepdims=True), small.shape), atol=1e-6)
    coarse = make(factor=2, dtype="uint8")
    written = coarse.quantize(params)
    np.testing.assert_allclose(coarse.decode(coarse.dequantize(written)), small, atol=1.01 / 85)
    assert still.decode(still.init(jax.random.key(0), small), size=(6, 4, 12)).shape == (2, 6, 4, 12, 1)


def test_static_and_dynamic_parts_refuse_images():
    with pytest.raises(ValueError, match=r"codec.name: static_dynamic is of videos .*, found images \[8, 8, 1\]"):
        codecs.make(codecs.StaticDynamicSpec(images_per_class=1), image_shape=SHAPE[1:], num_classes=2)


def test_a_fit_that_grows_draws_videos():
    codec = codecs.make(codecs.PackedGaussianSpec(images_per_class=1, num_points=4), image_shape=SHAPE, num_classes=2)
    targets = jnp.asarray(videos(2))
    start = fitting.init_fit(jax.random.key(0), targets, codec=codec, steps=8)
    state, _ = fitting.fit_steps(start, targets, codec=codec, steps=8, count=8)
    error = [float(fitting.psnr(codec.decode(each.params), targets).mean()) for each in (start, state)]
    assert error[1] > error[0]


def test_augmentation_changes_all_frames_of_a_video_alike():
    still = np.repeat(videos(4, channels=3)[:, :1], FRAMES, axis=1)
    for operation in ("crop", "cutout", "flip", "scale", "rotate"):
        spec = augment.DsaSpec(strategy=operation)
        for siamese in (False, True):
            one = augment.dsa(jax.random.key(1), still[:, 0], spec, siamese=siamese)
            every = augment.dsa(jax.random.key(1), still, spec, siamese=siamese)
            for frame in range(FRAMES):
                np.testing.assert_allclose(every[:, frame], one, atol=1e-6)
    assert np.abs(np.asarray(one) - still[:, 0]).max() > 0.1


def test_contrast_of_a_video_is_about_the_mean_of_all_its_frames():
    spec = augment.DsaSpec(strategy="color", brightness=0, saturation=0)
    moved = np.asarray(augment.dsa(jax.random.key(0), videos(2, channels=3), spec))
    gray = videos(2, channels=3).mean(-1, keepdims=True)
    mean = gray.mean((1, 2, 3, 4), keepdims=True)
    factor = (moved - mean)[..., :1] / (gray - mean)
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1, :1, :1], factor.shape), rtol=1e-3)


def test_cutmix_takes_the_same_box_of_all_frames():
    still = np.repeat(videos(4)[:, :1], FRAMES, axis=1)
    labels = jnp.eye(4, dtype=jnp.float32)
    mixed, _ = augment.cutmix(jax.random.key(0), jnp.asarray(still), labels, 1.0)
    alone, _ = augment.cutmix(jax.random.key(0), jnp.asarray(still[:, 0]), labels, 1.0)
    for frame in range(FRAMES):
        np.testing.assert_array_equal(mixed[:, frame], alone)


def test_zca_of_videos_decorrelates_their_numbers():
    rows = videos(400, seed=3)[:, :, :2, :2]
    white = np.asarray(whiten.fit("zca", rows, eps=1e-6)(rows)).reshape(400, -1)
    np.testing.assert_allclose(np.cov(white.T), np.eye(white.shape[1]), atol=2e-3)


def _oracle(params, video, pooling, norm):
    """The network of convnet3d in NumPy float64, for one video [t, h, w, c], one block and then the linear layer."""
    kernel, bias = (np.asarray(params["conv0"][name], np.float64) for name in ("kernel", "bias"))
    t, h, w, c = video.shape
    kernel = kernel.reshape(3, 3, 3, c, -1).transpose(2, 0, 1, 3, 4)  # [time, row, column, in, out]
    padded = np.pad(np.asarray(video, np.float64), ((1, 1), (1, 1), (1, 1), (0, 0)))
    x = np.zeros((t, h, w, kernel.shape[-1])) + bias
    for k, i, j in np.ndindex(3, 3, 3):
        x += padded[k : k + t, i : i + h, j : j + w] @ kernel[k, i, j]
    axes = (0, 1, 2) if norm == "instance" else (0, 1, 2, 3)
    if norm != "none":
        x = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    x = np.maximum(x, 0)
    if pooling != "none":
        cells = x[: t // 2 * 2, : h // 2 * 2, : w // 2 * 2].reshape(t // 2, 2, h // 2, 2, w // 2, 2, -1)
        x = cells.mean((1, 3, 5)) if pooling == "average" else cells.max((1, 3, 5))
    features = x.reshape(-1)
    return features @ np.asarray(params["linear"]["kernel"], np.float64) + np.asarray(
        params["linear"]["bias"]
    ), features


@pytest.mark.parametrize("pooling", ["average", "max", "none"])
@pytest.mark.parametrize("norm", ["instance", "layer", "none"])
def test_convnet3d_is_its_formula(pooling, norm):
    spec = nets.NetSpec(name="convnet3d", depth=1, width=4, pooling=pooling, norm=norm)
    network = nets.build(spec, (*SHAPE[:-1], 2), 3)
    params = network.init(jax.random.key(0))
    video = videos(2, channels=2)
    logits, features = network.outputs(params, jnp.asarray(video))
    for i in range(2):
        expected = _oracle(params, video[i], pooling, norm)
        np.testing.assert_allclose(logits[i], expected[0], atol=2e-5)
        np.testing.assert_allclose(features[i], expected[1], atol=2e-5)


def test_blocks_of_a_single_frame_pool_in_space_only():
    network = nets.build(nets.NetSpec(name="convnet3d", depth=3, width=4), SHAPE, 2)
    features = network.outputs(network.init(jax.random.key(0)), jnp.asarray(videos(1)))[1]
    assert features.shape == (1, 4)


def test_convnet3d_refuses_images():
    with pytest.raises(ValueError, match="network.name: convnet3d is for videos"):
        nets.build(nets.NetSpec(name="convnet3d"), (32, 32, 3), 10)


def test_networks_of_images_average_the_frames():
    of_images = nets.build(nets.NetSpec(depth=2, width=4), SHAPE[1:], 3)
    of_videos = nets.build(nets.NetSpec(depth=2, width=4), SHAPE, 3)
    params, video = of_images.init(jax.random.key(0)), jnp.asarray(videos(2))
    each = [of_images.outputs(params, video[:, frame]) for frame in range(FRAMES)]
    for got, parts in zip(of_videos.outputs(params, video), zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(got, sum(parts) / FRAMES, atol=1e-5)


def test_three_verbs_on_videos(tmp_path):
    """Two classes that no frame tells apart: the brighter half comes first, or last."""
    random = np.random.default_rng(0)
    labels = np.arange(60) % 2
    ramp = np.array([0.0, 0.2, 0.4], np.float32)
    level = np.where(labels[:, None] == 0, ramp, ramp[::-1]) + 0.3 * random.random((60, 1), np.float32)
    clips = (level[:, :, None, None, None] + 0.1 * random.random((60, *SHAPE), np.float32)).astype(np.float32)
    clips = np.round(clips * 255).astype(np.uint8)
    network = nets.NetSpec(name="convnet3d", depth=1, width=4, norm="none")
    found = gsdd.distill(
        jax.random.key(0),
        clips[:40],
        labels[:40],
        codec=codecs.PixelSpec(images_per_class=2, dtype="uint8"),
        network=network,
        steps=3,
        augment=augment.DsaSpec(strategy="none"),
        progress=False,
    )
    found.save(tmp_path)
    again = gsdd.load(tmp_path)
    assert again.codec.image_shape == SHAPE
    assert again.images().shape == (4, *SHAPE)
    np.testing.assert_array_equal(again.images(), found.images())
    training = evaluation.EvalSpec(steps=60, batch=4, lr=0.05, seeds=1)
    tested = gsdd.evaluate(
        jax.random.key(1),
        again,
        clips[40:],
        labels[40:],
        network=network,
        training=training,
        augment=augment.DsaSpec(strategy="none"),
        progress=False,
    )
    assert tested.mean > 0.9


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_videos_move(channels):
    frames = np.zeros((4, FRAMES, SIDE, SIDE, channels), np.float32)
    for t in range(FRAMES):
        frames[:, t, 2 * t : 2 * t + 2] = 1.0
    sheet = Image.open(io.BytesIO(pictures.grid(frames, np.array([0, 0, 1, 1]), ("a", "b"))))
    assert sheet.n_frames == FRAMES
    still = Image.open(io.BytesIO(pictures.grid(frames[:, 0], np.array([0, 0, 1, 1]), ("a", "b"))))
    assert sheet.size == still.size
    for t in range(FRAMES):
        sheet.seek(t)
        expected = Image.open(io.BytesIO(pictures.grid(frames[:, t], np.array([0, 0, 1, 1]), ("a", "b"))))
        np.testing.assert_array_equal(sheet.convert("RGBA"), expected.convert("RGBA"))


@pytest.mark.parametrize("form", ["png", "webp", "gif"])
def test_exported_videos_are_animated_files(form, tmp_path):
    codec = codecs.make(codecs.PixelSpec(images_per_class=1), image_shape=SHAPE, num_classes=2)
    # Gray levels that no palette has to merge.
    targets = np.round(videos(2) * 15) / 15
    made = gsdd.SynSet(codec, codec.init(jax.random.key(0), targets), 4 * FRAMES * SIDE**2, ("a", "b"))
    made.save(tmp_path / "set")
    assert export.main(["--run", str(tmp_path / "set"), "--to", form, "--out", str(tmp_path / "out")]) == 0
    for label, name in enumerate(("0_a", "1_b")):
        with Image.open(tmp_path / "out" / name / f"{label}.{form}") as file:
            assert file.n_frames == FRAMES
            for t in range(FRAMES):
                file.seek(t)
                shown = np.asarray(file.convert("RGB"))[..., :1] / 255
                np.testing.assert_allclose(shown, targets[label, t], atol=1 / 255)


def test_exported_movies_are_read_as_clips(tmp_path):
    pytest.importorskip("av")
    shape = (FRAMES, 15, 16, 1)
    codec = codecs.make(codecs.PixelSpec(images_per_class=1), image_shape=shape, num_classes=2)
    smooth = np.linspace(0.2, 0.8, 2 * FRAMES * 240, dtype=np.float32).reshape(2, *shape)
    gsdd.SynSet(codec, codec.init(None, smooth), 1 << 14, ("a", "b")).save(tmp_path / "set")
    assert export.main(["--run", str(tmp_path / "set"), "--to", "mp4", "--out", str(tmp_path / "train")]) == 0
    (tmp_path / "train" / "metadata.json").unlink()
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    found = data.load(data.DataSpec(source="clips", path=str(tmp_path)))
    assert found.train_images.shape[:4] == (2, FRAMES, 16, 16)
    np.testing.assert_allclose(found.train_images[:, :, :15, :, :1] / 255, smooth, atol=0.03)


def test_forms_of_images_refuse_videos(tmp_path, capsys):
    codec = codecs.make(codecs.PixelSpec(images_per_class=1), image_shape=SHAPE, num_classes=2)
    params = codec.init(jax.random.key(0), videos(2))
    gsdd.SynSet(codec, params, 4 * FRAMES * SIDE**2, ("a", "b")).save(tmp_path / "set")
    with pytest.raises(SystemExit):
        export.main(["--run", str(tmp_path / "set"), "--to", "huggingface", "--out", str(tmp_path / "out")])
    assert "--to: expected png, webp, gif, mp4 or npz for videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spec",
    [
        codecs.Gaussian3DSpec(images_per_class=2, num_points=4, start="uniform"),
        codecs.PackedGaussian3DSpec(images_per_class=2, num_points=4, start="uniform"),
        codecs.PackedGaussian3DSpec(images_per_class=2, num_points=4, start="uniform", order="kept", bits_chroma=5),
        codecs.PackedGaussianSpec(images_per_class=2, num_points=3),
        codecs.PixelSpec(images_per_class=2, dtype="uint8"),
    ],
    ids=["gaussian3d", "packed_gaussian3d", "kept", "frames", "pixel"],
)
def test_videos_are_read_without_jax(spec, tmp_path):
    codec = codecs.make(spec, image_shape=(*SHAPE[:-1], 3), num_classes=2)
    params = codec.init(jax.random.key(3), videos(4, channels=3))
    if "3d" in spec.name:
        # Moving, of any shape: raw zeros do not.
        shape = params.cholesky.shape
        cholesky = params.cholesky + jax.random.normal(jax.random.key(5), shape)
        params = codec.project(dataclasses.replace(params, cholesky=cholesky))
    made = gsdd.SynSet(codec, codec.dequantize(codec.quantize(params)), 1 << 14, ("a", "b"))
    made.save(tmp_path)
    for size in (None, (5, 12, 10)):
        found = decode_numpy.load(tmp_path, size)
        np.testing.assert_allclose(found.images, made.images(size), atol=3e-5)
        assert found.labels.tolist() == [0, 0, 1, 1]


def test_videos_of_the_torch_dataset_have_channels_first(tmp_path):
    pytest.importorskip("torch")
    from gsdd_jax.torch_dataset import DistilledSet

    codec = codecs.make(codecs.PixelSpec(images_per_class=1), image_shape=(*SHAPE[:-1], 3), num_classes=2)
    made = gsdd.SynSet(codec, codec.init(None, videos(2, channels=3)), 1 << 14, ("a", "b"))
    made.save(tmp_path)
    video, label = DistilledSet(tmp_path)[1]
    assert label == 1
    np.testing.assert_array_equal(video.numpy(), np.moveaxis(np.asarray(made.images()[1]), -1, 0))


def test_sizes_of_images_are_none_of_videos(tmp_path):
    codec = codecs.make(codecs.PixelSpec(images_per_class=1), image_shape=SHAPE, num_classes=2)
    made = gsdd.SynSet(codec, codec.init(None, videos(2)), 1 << 14, ("a", "b"))
    made.save(tmp_path)
    for draw in (made.images, lambda size: decode_numpy.load(tmp_path, size)):
        with pytest.raises(ValueError, match=r"size: expected \(frames, height, width\), found \(9, 5\)"):
            draw((9, 5))


def test_the_gallery_does_not_take_videos_for_images(tmp_path, capsys):
    codec = codecs.make(codecs.PixelSpec(images_per_class=1), image_shape=SHAPE, num_classes=2)
    gsdd.SynSet(codec, codec.init(None, videos(2)), 1 << 14, ("a", "b")).save(tmp_path)
    assert gallery.of_run(tmp_path) is None
    with pytest.raises(SystemExit):
        gallery.main([str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert "expected a set of images, found videos [3, 8, 8, 1]" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
