"""Every codec of the registry keeps one contract; then what is special to each."""

import dataclasses
import json
import re
import struct
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import gsdd_jax
from gsdd_jax import SynSet, codecs, storage
from gsdd_jax.codecs import (
    DownscaleSpec,
    FactorSpec,
    FrequencySpec,
    Gaussian3DSpec,
    GaussianSpec,
    LatentSpec,
    MemorySpec,
    NeuralFieldSpec,
    PackedFrequencySpec,
    PackedGaussian3DSpec,
    PackedGaussianSpec,
    PaletteSpec,
    PixelSpec,
    SparseEpitomeSpec,
    SpectralSpec,
    StaticDynamicSpec,
)
from gsdd_jax.codecs import gaussian as gaussian_codec
from gsdd_jax.gaussians import Gaussians
from gsdd_jax.render import render
from gsdd_jax.spacetime import Gaussians3D, render_video

SHAPE, CLASSES = (6, 8, 3), 2
BUDGET = 2 * 6 * 8 * 3 * 4  # two float32 images per class

# Every codec of the registry, in its ways to store that share no code. A new line needs a name and a spec that fits
# BUDGET with at least two images per class. If the first axis of every leaf is the image, and all is written in the
# spec's dtype, that is all; otherwise the codec needs a line in TRAITS.
SPECS: dict[str, codecs.CodecSpec] = {
    "gaussian": GaussianSpec(images_per_class=3, num_points=5, cutoff=0.0),
    "packed": PackedGaussianSpec(images_per_class=3, num_points=5, cutoff=0.0, bits_chroma=5),
    "packed coded": PackedGaussianSpec(images_per_class=3, num_points=4, order="kept", bits_gaussian=200),
    "pixel": PixelSpec(),
    "pixel uint8": PixelSpec(dtype="uint8", optimizer="adam", images_per_class=3),
    "palette": PaletteSpec(bits=3, images_per_class=3),
    "downscale": DownscaleSpec(factor=2),
    "downscale padded": DownscaleSpec(factor=3, dtype="bfloat16", optimizer="adam", images_per_class=9),
    "downscale uint8": DownscaleSpec(factor=2, dtype="uint8", images_per_class=8),
    "frequency": FrequencySpec(coefficients=5, images_per_class=3),
    "frequency bits": FrequencySpec(coefficients=9, images_per_class=2, mask="variance", dtype="bfloat16"),
    "packed frequency": PackedFrequencySpec(coefficients=7, images_per_class=3, bits=7),
    "memory": MemorySpec(bases=3, images_per_class=4),
    "spectral": SpectralSpec(
        matrices=2, rank_height=4, rank_width=5, rank_channels=2, images_per_class=4, dtype="bfloat16"
    ),
    # Slow waves, since 6 by 8 pixels cannot show DDiF's.
    "neural field": NeuralFieldSpec(layers=2, width=5, omega0=5.0, images_per_class=3),
    "factor": FactorSpec(hallucinators=2, base_channels=1, images_per_class=4, dtype="bfloat16"),
    "sparse epitome": SparseEpitomeSpec(
        patch=2, width=6, blocks=1, heads=2, tokens=4, nonzeros=20, images_per_class=3, dtype="bfloat16"
    ),
    "latent": LatentSpec(decoder="medium", width=8, latent_dim=4, images_per_class=3, dtype="bfloat16"),
    "static dynamic": StaticDynamicSpec(factor=2, images_per_class=3),
    "gaussian3d": Gaussian3DSpec(images_per_class=3, num_points=5, cutoff=0.0),
    "packed gaussian3d": PackedGaussian3DSpec(images_per_class=3, num_points=5, cutoff=0.0, bits_chroma=5),
    "packed gaussian3d fitted": PackedGaussian3DSpec(images_per_class=3, num_points=4, ranges="fitted", order="kept"),
    "neural field of videos": NeuralFieldSpec(layers=2, width=5, omega0=3.0, images_per_class=3),
}
# Codecs that are of no images.
ONLY_VIDEOS = ("gaussian3d", "packed_gaussian3d", "static_dynamic")
# Of codecs that cannot draw SHAPE, and of videos.
VIDEO = (4, 6, 8, 3)
SHAPES = {"latent": (8, 8, 3), "static dynamic": (3, 4, 4, 3), "neural field of videos": VIDEO} | {
    name: VIDEO for name, spec in SPECS.items() if spec.name in ("gaussian3d", "packed_gaussian3d")
}

Part = Callable[[codecs.Codec, int], Any]


class Traits(NamedTuple):
    """What is special about a codec's leaves.

    parts: Of a leaf whose first axis is not the image: ``(codec, i)`` to the index of the part of it that image ``i``
        is made from. Images may share parts, and all of them the whole leaf.
    fixed: Leaves that training leaves alone, whole numbers that the start settles.
    following: Leaves without a gradient that ``project`` derives from the others.
    sampled: Some leaves are seen only where decode has a key.
    blind: The start does not look at the images.
    written: Dtypes on disk of arrays that are not written in the precision of the spec; leaves of the same name are so
        from the start.
    """

    parts: Mapping[str, Part] = {}
    fixed: Collection[str] = ()
    following: Collection[str] = ()
    sampled: bool = False
    blind: bool = False
    written: Mapping[str, str] = {}


def whole(codec: codecs.Codec, i: int) -> Any:
    return ...


def of_class(codec: codecs.Codec, i: int) -> Any:
    return i // codec.images_per_class


def cell(codec: codecs.Codec, i: int) -> Any:
    f = codec.spec.factor
    height, width = (int(np.ceil(length / f)) for length in SHAPE[:2])
    y, x = divmod(i % f**2, f)
    return i // f**2, slice(y * height, (y + 1) * height), slice(x * width, (x + 1) * width)


def combined(codec: codecs.Codec) -> int:
    """Returns how many images are made from one and the same tensor or base."""
    return codec.spec.matrices if codec.name == "spectral" else codec.spec.hallucinators


def quotient(codec: codecs.Codec, i: int) -> Any:
    return i // combined(codec)


def remainder(codec: codecs.Codec, i: int) -> Any:
    return i % combined(codec)


# By the name of a codec, or of one of `SPECS`.
TRAITS: dict[str, Traits] = {
    **dict.fromkeys(
        ("packed_gaussian", "packed_gaussian3d"),
        Traits({"low": whole, "step": whole}, written={"low": "bfloat16", "step": "bfloat16"}),
    ),
    "packed coded": Traits(
        {"low": whole, "step": whole}, following=["low", "step"], written={"low": "bfloat16", "step": "bfloat16"}
    ),
    "palette": Traits(following=["palettes"], written={"palettes": "uint8"}),
    "downscale": Traits({"canvases": cell}),
    "frequency": Traits({"index": of_class}, fixed=["index"], written={"index": "uint8"}),
    "packed_frequency": Traits(
        {"index": of_class, "low": of_class, "step": of_class},
        fixed=["index"],
        following=["low", "step"],
        written={"index": "uint8", "low": "bfloat16", "step": "bfloat16"},
    ),
    "memory": Traits({"bases": whole}),
    "spectral": Traits({"tensors": quotient, "rows": remainder, "columns": remainder, "channels": remainder}),
    "factor": Traits(
        {"base": quotient} | dict.fromkeys(("conv", "conv_bias", "deconv", "deconv_bias", "scale", "shift"), remainder)
    ),
    "sparse_epitome": Traits(
        dict.fromkeys(("epitome", "mix", "mix_bias", "mlp", "mlp_bias"), whole)
        | dict.fromkeys(("norm_scale", "norm_shift", "out", "out_bias"), whole),
        written={"indices": "uint16"},
    ),
    "latent": Traits(
        dict.fromkeys(("linear", "linear_bias", "up0", "up0_bias", "scale0", "shift0"), whole)
        | dict.fromkeys(("up1", "up1_bias", "scale1", "shift1", "out", "out_bias"), whole),
        sampled=True,
        blind=True,
    ),
}


class Case(NamedTuple):
    codec: codecs.Codec
    images: np.ndarray
    started: Any
    params: Any
    decode: Any  # jitted
    traits: Traits


def make(spec, **changes) -> codecs.Codec:
    """Makes a codec of the images, or videos, that a spec of `SPECS` is of."""
    shape = next((SHAPES[name] for name, one in SPECS.items() if one == spec and name in SHAPES), SHAPE)
    settings = {"image_shape": shape, "num_classes": CLASSES, "bytes_per_class": BUDGET} | changes
    return codecs.make(spec, **settings)


@pytest.fixture(scope="module", params=SPECS)
def case(request) -> Case:
    codec = make(SPECS[request.param])
    images = np.random.default_rng(0).uniform(0, 1, (codec.num_images, *codec.image_shape)).astype(np.float32)
    started = jax.jit(codec.init)(jax.random.key(0), images)
    # Off the start, so that no leaf is a constant that rounds to itself.
    rng, traits = np.random.default_rng(1), TRAITS.get(request.param, TRAITS.get(codec.name, Traits()))
    params = change(
        started, traits, lambda x: (x * rng.normal(1, 0.1, x.shape) + rng.normal(0, 0.01, x.shape)).astype(np.float32)
    )
    return Case(codec, images, started, jax.jit(codec.project)(params), jax.jit(codec.decode), traits)


def untrained(traits: Traits) -> set[str]:
    return {*traits.fixed, *traits.following}


def leaves(params) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in flat}


def change(params, traits, how, *, only=None):
    """Applies ``how`` to all leaves that training changes, or to one of them; in NumPy, which compiles nothing."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return how(np.asarray(leaf)) if name not in untrained(traits) and only in (None, name) else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def trained_leaves(params, traits) -> dict[str, np.ndarray]:
    return {name: leaf for name, leaf in leaves(params).items() if name not in untrained(traits)}


def part_of(case: Case, name: str, i: int) -> Any:
    """Returns the index of the numbers of a leaf that image ``i`` is made from."""
    return case.traits.parts[name](case.codec, i) if name in case.traits.parts else i


def parts(case: Case, name: str) -> np.ndarray:
    """Returns ``[n, *shape of the leaf]``: which of its numbers each image is made from."""
    shape = leaves(case.params)[name].shape
    chosen = np.zeros((case.codec.num_images, *shape), bool)
    for i in range(case.codec.num_images):
        chosen[i][part_of(case, name, i)] = True
    return chosen


def key_of(case: Case) -> Any:
    """Returns a key where some leaves are seen only with one."""
    return jax.random.key(8) if case.traits.sampled else None


def bits(x) -> bytes:
    return np.asarray(x).tobytes()


def test_contract_table_covers_the_registry():
    assert {spec.name for spec in SPECS.values()} == set(codecs.SPECS)
    assert all(codecs.SPECS[spec.name] is type(spec) for spec in SPECS.values())


def test_params_are_float32_masters_of_every_image(case):
    codec = case.codec
    assert codec.num_images == CLASSES * codec.images_per_class
    for name, leaf in leaves(case.started).items():
        assert leaf.dtype == np.float32, name
        assert np.isfinite(leaf).all(), name
        assert name in case.traits.parts or leaf.shape[0] == codec.num_images, name
        assert parts(case, name).any(0).all(), name
        assert name not in case.traits.fixed or (leaf == leaf.round()).all(), name
    assert {*case.traits.parts, *untrained(case.traits)} <= leaves(case.started).keys()
    assert {*case.traits.written} <= leaves(codec.quantize(case.started)).keys()
    hints = typing.get_type_hints(type(codec.spec), include_extras=True)
    left = [name for name, hint in hints.items() if any(f"; 0 = {what}" in str(hint) for what in ("as many", "those"))]
    assert left and all(getattr(codec.spec, name) > 0 for name in left), "left to the budget"
    again = make(codec.spec, image_shape=codec.image_shape)
    assert (again.spec, again.num_images, again.layout()) == (codec.spec, codec.num_images, codec.layout())
    value = codec.regularize(case.params)
    assert value.shape == () and np.isfinite(value)


def test_start_resembles_the_images_it_was_made_from_unless_it_is_blind(case):
    if case.traits.blind:
        other = jax.jit(case.codec.init)(jax.random.key(0), 1 - case.images)
        assert all(bits(leaf) == bits(leaves(case.started)[name]) for name, leaf in leaves(other).items())
        return
    started = np.asarray(case.decode(case.started))
    # By two, since two images may start from one base, and their own one is then that of the first.
    wrong = np.roll(case.images, 2, axis=0)
    assert np.mean((started - case.images) ** 2) < np.mean((started - wrong) ** 2)


def test_an_index_has_the_images_of_all_and_its_gradient_reaches_every_leaf_of_them_alone(case):
    n, weights = case.codec.num_images, np.random.default_rng(2).normal(size=case.images.shape).astype(np.float32)

    @jax.jit
    def both(params, index):
        images, pull = jax.vjp(lambda p: case.codec.decode(p, index, key=key_of(case)), params)
        return images, pull(weights)[0]

    _, grads = both(case.params, np.arange(n))
    assert all(np.isfinite(grad).all() for grad in leaves(grads).values())
    for name, grad in leaves(grads).items():
        if name in untrained(case.traits):
            assert not grad.any(), name
            continue
        for i, chosen in enumerate(parts(case, name)):
            assert np.abs(grad[chosen]).max() > 1e-4, (name, i)

    index = np.resize([2, 0], n)
    images, grads = both(case.params, index)
    for name, grad in trained_leaves(grads, case.traits).items():
        first, _, third, *_ = parts(case, name)
        assert grad[first].any() and grad[third].any() and not grad[~(first | third)].any(), name
    if case.traits.sampled:
        images = jax.jit(lambda params, index: case.codec.decode(params, index))(case.params, index)
    decoded = case.decode(case.params)
    assert decoded.shape == case.images.shape and decoded.dtype == jnp.float32 and np.isfinite(decoded).all()
    np.testing.assert_allclose(images, np.asarray(decoded)[index], rtol=0, atol=1e-6)
    assert both._cache_size() == 1


def test_images_depend_on_every_leaf_and_only_on_their_own_part_of_it(case):
    before, rng = np.asarray(case.decode(case.params, key=key_of(case))), np.random.default_rng(6)
    for name in trained_leaves(case.params, case.traits):
        part = part_of(case, name, 1)
        shift = np.zeros(leaves(case.params)[name].shape, np.float32)
        shift[part] = rng.uniform(0.05, 0.15, shift.shape)[part]
        moved = change(case.params, case.traits, lambda x, shift=shift: x + shift, only=name)
        after, chosen = np.asarray(case.decode(moved, key=key_of(case))), parts(case, name)
        assert np.abs(after[1] - before[1]).max() > 1e-3, name
        others = [i for i in range(case.codec.num_images) if not (chosen[i] & chosen[1]).any()]
        np.testing.assert_array_equal(after[others], before[others], err_msg=name)


def test_nbytes_is_what_is_stored_and_fits_the_budget(case):
    written = case.codec.pack(case.codec.quantize(case.params))
    assert case.codec.nbytes(case.params) == sum(np.asarray(x).nbytes for x in written.values())
    layout = {name: (x.shape, np.dtype(x.dtype)) for name, x in case.codec.layout().items()}
    assert layout == {name: (x.shape, np.dtype(x.dtype)) for name, x in written.items()}
    assert case.codec.nbytes(case.params) <= CLASSES * BUDGET
    assert case.codec.nbytes(jax.eval_shape(lambda: case.params)) == case.codec.nbytes(case.params)


def test_exported_file_holds_exactly_the_counted_bytes_and_loads_to_the_same_images(case, tmp_path):
    sizes = SynSet(case.codec, case.params, BUDGET, ("a", "b")).save(tmp_path)
    raw = (tmp_path / "synset.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    tensors = json.loads(raw[8 : 8 + length])
    tensors.pop("__metadata__", None)
    spans = [t["data_offsets"][1] - t["data_offsets"][0] for t in tensors.values()]
    assert sum(spans) == len(raw) - 8 - length == sizes["payload"] == case.codec.nbytes(case.params)
    assert sizes["header"] == 8 + length
    loaded = gsdd_jax.load(tmp_path)
    assert loaded.codec is case.codec
    assert bits(case.decode(loaded.params)) == bits(case.decode(case.params))
    assert loaded.save(tmp_path / "again") == sizes
    for file in ("synset.safetensors", "manifest.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    # More classes than the file has bytes, whatever the codec.
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest |= {"num_classes": 60_000, "class_names": ["x"] * 60_000, "bytes_per_class": 1 << 39}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json: (codec: .* bytes of arrays are no such set|codec.)"):
        gsdd_jax.load(tmp_path)


def test_stored_and_loaded_params_decode_to_the_same_bits(case):
    stored = case.codec.quantize(case.params)
    for name, leaf in leaves(stored).items():
        assert str(leaf.dtype) == case.traits.written.get(name, getattr(case.codec.spec, "dtype", "uint16")), name
    back = case.codec.unpack(case.codec.pack(stored))
    assert {k: (bits(x), x.dtype) for k, x in back.items()} == {k: (bits(x), x.dtype) for k, x in stored.items()}
    loaded = case.codec.dequantize(stored)
    assert jax.tree.structure(loaded) == jax.tree.structure(case.params)
    assert bits(case.decode(loaded)) == bits(case.decode(case.params))
    before, after = leaves(case.params), leaves(loaded)
    rounds = getattr(case.codec.spec, "dtype", "codes") != "float32"
    for name in before.keys() - case.traits.written.keys():
        assert (bits(after[name]) != bits(before[name])) == rounds, name
    assert all(bits(after[name]) == bits(before[name]) for name in case.traits.fixed)


def test_gaussians_of_a_codec_draw_its_images_and_vmap_is_a_loop(case):
    many = jax.tree.map(lambda x: np.stack([x, np.float32(0.9) * x]), case.params)
    vmapped = jax.vmap(case.codec.decode)
    g = jax.jit(case.codec.gaussians)(case.params)
    if case.codec.name not in ("gaussian", "packed_gaussian"):
        assert g is None
        assert jax.eval_shape(vmapped, many).shape == (2, *case.images.shape)
        return
    # They alone have a rule of their own under vmap.
    for one, alone in zip(jax.jit(vmapped)(many), range(2), strict=True):
        expected = case.decode(jax.tree.map(lambda x, i=alone: x[i], many))
        np.testing.assert_allclose(one, expected, rtol=0, atol=2e-6)
    spec = case.codec.spec
    drawn = jax.jit(lambda g: render(g, supersample=spec.supersample, cutoff=spec.cutoff))(g)
    np.testing.assert_allclose(drawn, case.decode(case.params), rtol=0, atol=1e-6)


def test_decode_at_another_size_shows_the_same_picture(case):
    *frames, h, w, _ = case.codec.image_shape
    size = (*frames, 2 * h, 3 * w)
    large = np.asarray(jax.jit(lambda p: case.codec.decode(p, size=size))(case.params))
    assert large.shape == (case.codec.num_images, *size, 3)
    small, native = large.reshape(*large.shape[:-3], h, 2, w, 3, 3).mean((-4, -2)), np.asarray(case.decode(case.params))
    # The same picture up to blur: far nearer to its own original than to the next image.
    assert np.mean((small - native) ** 2) < 0.3 * np.mean((small - np.roll(native, 1, axis=0)) ** 2)
    if frames:
        longer = jax.eval_shape(lambda p: case.codec.decode(p, size=(7, h, w)), case.params)
        assert longer.shape == (case.codec.num_images, 7, h, w, 3)


def test_training_step_compiles_once_and_moves_all_but_the_fixed_leaves(case):
    codec, rng = case.codec, np.random.default_rng(3)
    grads = change(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), case.params),
        case.traits,
        lambda x: rng.normal(size=x.shape).astype(np.float32),
    )

    @jax.jit
    def step(params, state):
        updates, state = codec.optimizer().update(grads, state, params)
        return codec.project(optax.apply_updates(params, updates)), state

    params, state = case.params, jax.jit(codec.optimizer().init)(case.params)
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
    before, after = leaves(case.params), leaves(params)
    assert {name for name in before if bits(before[name]) == bits(after[name])} == set(case.traits.fixed)


# Gaussians


@pytest.fixture(scope="module")
def gaussians() -> Gaussians:
    rng = np.random.default_rng(4)
    shape = (CLASSES * 3, 5)
    return Gaussians(
        jnp.asarray(rng.uniform(-0.95, 0.95, (*shape, 2)), jnp.float32),
        jnp.asarray(rng.uniform(-0.2, 1.5, (*shape, 3)), jnp.float32),
        jnp.asarray(rng.uniform(-0.5, 1, (*shape, 3)), jnp.float32),
        jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32),
        size=SHAPE[:2],
    )


def rounded(g: Gaussians) -> Gaussians:
    """bfloat16, by NumPy's own rounding."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(jnp.bfloat16).astype(np.float32)), g)


def test_gaussian_decode_draws_the_rounded_parameters_and_its_gradient_passes_straight_through(gaussians):
    weights = np.random.default_rng(5).normal(size=(gaussians.num_images, *SHAPE)).astype(np.float32)
    codec = make(SPECS["gaussian"])

    @jax.jit
    def both(params):
        images, pull = jax.vjp(codec.decode, params)
        return images, codec.decode(params, size=(9, 20)), pull(weights)[0]

    native, large, grads = both(gaussians)
    for decoded, size in ((native, None), (large, (9, 20))):
        np.testing.assert_allclose(decoded, oracle.render(rounded(gaussians), size).images, rtol=0, atol=1e-5)
        assert np.abs(decoded - oracle.render(gaussians, size).images).max() > 1e-3
    expected = oracle.render(rounded(gaussians), v=weights).gradient
    for name, grad in leaves(grads).items():
        np.testing.assert_allclose(grad, expected[name], rtol=0, atol=1e-4 * np.abs(expected[name]).max(), err_msg=name)


def test_gaussians_in_space_and_time_are_drawn_as_rounded():
    rng = np.random.default_rng(5)
    leaves = rng.uniform(-0.9, 0.9, (6, 5, 3)), rng.uniform(-1, 2, (6, 5, 6)), rng.uniform(0, 1, (6, 5, 3))
    g = Gaussians3D(*(jnp.asarray(x, jnp.float32) for x in leaves), jnp.ones((6, 5)), size=VIDEO[:-1])
    codec = make(SPECS["gaussian3d"], image_shape=VIDEO)
    for size in (None, (7, 9, 5)):
        expected = jax.jit(render_video, static_argnames=("size", "cutoff"))(rounded(g), size=size, cutoff=0.0)
        found = jax.jit(lambda p, size=size: codec.decode(p, jnp.array([4, 1]), size=size))(g)
        np.testing.assert_allclose(found, expected[np.array([4, 1])], rtol=0, atol=1e-6)
    assert np.abs(codec.decode(g) - render_video(g, cutoff=0.0)).max() > 1e-3


REMEDY = re.compile(r"codec\.(\w+) of at most (\d+)")


@pytest.mark.parametrize("name", SPECS)
def test_a_refusal_names_the_largest_settings_and_the_least_budget_that_fit(name):
    settings = {"image_shape": SHAPES.get(name, SHAPE)}
    codec = make(SPECS[name], **settings)
    spec, least = codec.spec, -(-storage.nbytes(codec.layout()) // CLASSES)
    assert make(spec, **settings, bytes_per_class=least) is make(spec, **settings, bytes_per_class=None) is codec
    with pytest.raises(ValueError, match="^codec.*") as caught:
        make(spec, **settings, bytes_per_class=least - 1)
    assert str(caught.value).endswith(f"at least {least} bytes per class")
    found = {name: int(most) for name, most in REMEDY.findall(str(caught.value))}
    for setting, most in found.items():
        smaller = dataclasses.replace(spec, **{setting: most})
        assert make(smaller, **settings, bytes_per_class=least - 1).spec == smaller
    # As many, too, where the number is left to the budget; all canvases have nine images or none.
    if name != "downscale padded":
        left_open = make(dataclasses.replace(spec, images_per_class=0), **settings, bytes_per_class=least - 1)
        assert left_open.images_per_class == found["images_per_class"] < spec.images_per_class


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GaussianSpec(num_points=65, images_per_class=1), "of at most 64, or at least 1170 bytes"),
        (GaussianSpec(), "codec.num_points and codec.images_per_class: expected at least 1 of one of them, found 0"),
        (PackedGaussianSpec(num_points=4097), "codec.num_points: expected at most 4096, found 4097"),
        (Gaussian3DSpec(num_points=3), r"codec.name: gaussian3d is of videos \[t, h, w, c\], found images \[6, 8, 3\]"),
        (PackedGaussian3DSpec(num_points=3), "codec.name: packed_gaussian3d is of videos"),
        (DownscaleSpec(factor=5), r"codec.factor: 5 x 5 cells of 2x2 pixels leave .* of 6x8; .* smaller .* is 3"),
        (DownscaleSpec(images_per_class=6), "codec.images_per_class: expected a multiple of 4, found 6"),
        (FrequencySpec(coefficients=49), "codec.coefficients: expected at most 48, found 49"),
        (MemorySpec(bases=5, images_per_class=2), "codec.bases: 4 images need at most as many bases, found 5"),
        (MemorySpec(bases=4, factor=8), "codec.bases: expected at most 3, found 4"),
        (SpectralSpec(rank_width=9, rank_height=5), "codec.rank_width: expected at most 8, found 9"),
        (FactorSpec(base_channels=2), "codec.base_channels: expected one of 1, 3, found 2"),
        (NeuralFieldSpec(width=20), "codec.width: 4344 bytes .* codec.width of at most 13, or at least 2172 bytes"),
    ],
)
def test_impossible_settings_say_what_is_possible(spec, message):
    with pytest.raises(ValueError, match=message):
        make(spec)


def test_projection_keeps_centers_inside_and_nothing_else(gaussians):
    far = dataclasses.replace(gaussians, mean=gaussians.mean * 3)
    projected = make(SPECS["gaussian"]).project(far)
    limit = np.float32(1 - 1e-3)
    assert np.abs(far.mean).max() > 1 and np.abs(projected.mean).max() <= limit
    inside = np.abs(np.asarray(far.mean)) < limit
    np.testing.assert_array_equal(np.asarray(projected.mean)[inside], np.asarray(far.mean)[inside])
    np.testing.assert_array_equal(np.asarray(projected.mean)[~inside], np.sign(np.asarray(far.mean)[~inside]) * limit)
    for name in ("cholesky", "color", "opacity"):
        assert bits(getattr(projected, name)) == bits(getattr(far, name))


def test_boundary_loss_is_the_mean_log_barrier(gaussians):
    x = np.asarray(gaussians.mean, np.float64)
    expected = np.mean(-np.log(1 - x**2))
    np.testing.assert_allclose(gaussian_codec.boundary_loss(gaussians), expected, rtol=1e-5)
    np.testing.assert_allclose(make(SPECS["gaussian"]).regularize(gaussians), 0.1 * expected, rtol=1e-5)
    weighted = make(GaussianSpec(images_per_class=3, num_points=5, boundary=2.0)).regularize(gaussians)
    np.testing.assert_allclose(weighted, 2 * expected, rtol=1e-5)
    assert make(GaussianSpec(images_per_class=3, num_points=5, boundary=0.0)).regularize(gaussians) == 0


def test_boundary_loss_pushes_centers_inwards_and_never_overflows(gaussians):
    grads = jax.grad(gaussian_codec.boundary_loss)(gaussians)
    x = np.asarray(gaussians.mean, np.float64)
    np.testing.assert_allclose(grads.mean, 2 * x / (1 - x**2) / x.size, rtol=1e-4)
    assert (np.asarray(grads.mean) * x > 0).all(), "a step against the gradient must reduce |x|"
    for name in ("cholesky", "color", "opacity"):
        assert not np.asarray(getattr(grads, name)).any()
    # On the edge as projected, whose bfloat16 is 1: still finite, still inwards. And beyond it finite at least.
    edge = dataclasses.replace(gaussians, mean=jnp.full_like(gaussians.mean, 1 - 1e-3))
    grad = np.asarray(jax.grad(gaussian_codec.boundary_loss)(edge).mean)
    assert np.isfinite(grad).all() and (grad > 0).all()
    beyond = dataclasses.replace(gaussians, mean=jnp.full_like(gaussians.mean, 1.5))
    assert np.isfinite(gaussian_codec.boundary_loss(beyond))
    assert np.isfinite(jax.grad(gaussian_codec.boundary_loss)(beyond).mean).all()


def numpy_adam(gradients, rate) -> np.ndarray:
    """Adam with the default betas; ``rate`` maps the number of the step, from 0, to a learning rate."""
    m = v = np.zeros_like(gradients[0])
    moved = np.zeros_like(gradients[0])
    for t, g in enumerate(gradients):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        moved -= rate(t) * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
    return moved


def assert_moved(found, gradients, rate, **options) -> None:
    expected = numpy_adam([np.asarray(g, np.float64) for g in gradients], rate)
    # Steps of opposite sign cancel, so the error is relative to the rate, not to the sum.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * rate(0) * len(gradients), **options)


def run_optimizer(transformation, params, gradients):
    state, total, update = (
        transformation.init(params),
        jax.tree.map(np.zeros_like, params),
        jax.jit(transformation.update),
    )
    for grads in gradients:
        updates, state = update(grads, state, params)
        total = jax.tree.map(lambda a, b: a + np.asarray(b), total, updates)
    return total


def random_gradients(params, count):
    rng = np.random.default_rng(6)
    return [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params) for _ in range(count)]


def test_distillation_is_adam_with_the_configured_rate_of_each_leaf(gaussians):
    codec = make(GaussianSpec(images_per_class=3, num_points=5, lr=0.02, lr_mean=0.0, lr_cholesky=3.0, lr_color=0.5))
    gradients = random_gradients(gaussians, 4)
    total = run_optimizer(codec.optimizer(), gaussians, gradients)
    for name, rate in {"mean": 0, "cholesky": 0.06, "color": 0.01, "opacity": 0.01}.items():
        assert_moved(getattr(total, name), [getattr(g, name) for g in gradients], lambda t, r=rate: r, err_msg=name)


def test_fitting_is_adam_with_rates_per_leaf_on_a_cosine(gaussians):
    codec, steps = make(SPECS["gaussian"]), 5
    gradients = random_gradients(gaussians, steps)
    total = run_optimizer(codec.fitter(steps), gaussians, gradients)
    spacing = np.sqrt(6 * 8 / 5)
    rates = {"mean": 0.05 * spacing / 4, "cholesky": 0.1 * 0.6 * spacing / np.sqrt(np.pi), "color": 0.015, "opacity": 0}
    for name, rate in rates.items():

        def cosine(t, rate=rate):
            return rate * (0.98 * 0.5 * (1 + np.cos(np.pi * t / steps)) + 0.02)

        assert_moved(getattr(total, name), [getattr(g, name) for g in gradients], cosine, err_msg=name)


def test_videos_are_fitted_at_rates_per_mean_spacing_of_each_axis():
    rates = gaussian_codec.fit_rates((4, 6, 8), 3)
    spacing = (4 * 6 * 8 / 3) ** (1 / 3)
    np.testing.assert_allclose(rates["mean"], 0.05 * spacing / np.array([4, 4, 2]), rtol=1e-6)
    assert rates["cholesky"] == pytest.approx(0.1 * 0.6 * spacing / np.sqrt(np.pi))


# Pixels


def test_pixels_are_the_images_themselves():
    codec = make(PixelSpec())
    images = np.random.default_rng(9).uniform(0, 1, (4, *SHAPE)).astype(np.float32)
    assert codec.images_per_class == codec.spec.images_per_class == 2
    params = codec.init(jax.random.key(0), images)
    assert bits(codec.decode(params)) == bits(images)
    assert bits(codec.project(params)["images"]) == bits(images)
    assert codec.regularize(params) == 0
    assert [make(PixelSpec(dtype=dtype)).images_per_class for dtype in ("float32", "bfloat16", "uint8")] == [2, 4, 8]


def test_bytes_of_pixels_stay_where_they_have_a_gradient_and_others_where_they_are():
    images = np.random.default_rng(9).uniform(-3, 4, (4, *SHAPE)).astype(np.float32)
    for dtype, expected in (("uint8", images.clip(-1, 2)), ("bfloat16", images), ("float32", images)):
        codec = make(PixelSpec(dtype=dtype, images_per_class=2))
        projected = codec.project({"images": images})
        np.testing.assert_array_equal(projected["images"], expected)
        # Not what is shown changes, only what it is learned from.
        assert bits(codec.decode(projected)) == bits(codec.decode({"images": images}))
        slope = jax.grad(lambda params, codec=codec: codec.decode(params).sum())(projected)
        assert (np.asarray(slope["images"]) == 1).all()


def test_pixels_are_trained_by_sgd_with_momentum_one_half_or_adam_and_never_fitted():
    params = {"images": jnp.zeros((4, *SHAPE))}
    gradients = random_gradients(params, 3)
    a, b, c = (np.asarray(g["images"], np.float64) for g in gradients)
    velocity = [a, 0.5 * a + b, 0.25 * a + 0.5 * b + c]
    total = run_optimizer(make(PixelSpec(lr=0.3)).optimizer(), params, gradients)
    np.testing.assert_allclose(total["images"], -0.3 * sum(velocity), rtol=1e-5, atol=1e-6)
    adam = run_optimizer(make(PixelSpec(optimizer="adam", lr=0.3)).optimizer(), params, gradients)
    assert_moved(adam["images"], [g["images"] for g in gradients], lambda t: 0.3)
    assert not np.asarray(run_optimizer(make(PixelSpec()).fitter(3), params, gradients)["images"]).any()
