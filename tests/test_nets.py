"""The ConvNet against NumPy and the reference's figures, and the convolution under every transform."""

import dataclasses
import math
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gsdd_jax.nets import NetSpec, build, cross_entropy, microbatch
from gsdd_jax.nets.conv import conv_general_dilated

SMALL = NetSpec(depth=2, width=6)


def conv(x, k, *, stride=1, padding=None, convolve=conv_general_dilated):
    """A convolution, by default with a padding of half its odd kernel, as the networks have it."""
    strides, padding = (stride, stride), padding or [(k.shape[0] // 2,) * 2] * 2
    return convolve(x, k, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


native_conv = partial(conv, convolve=partial(lax.conv_general_dilated, precision="highest"))


ACTIVATIONS = {
    "relu": lambda y: np.maximum(y, 0),
    "leaky_relu": lambda y: np.where(y > 0, y, 0.01 * y),
    "sigmoid": lambda y: 1 / (1 + np.exp(-y)),
}


def numpy_convnet(params, images, depth, norm, margin=0, activation="relu", pooling="average"):
    """The network in float64, written with loops."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.pad(np.asarray(images, np.float64), ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    for block in range(depth):
        conv = params[f"conv{block}"]
        n, h, w, _ = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = np.zeros((n, h, w, conv["kernel"].shape[3])) + conv["bias"]
        for row in range(h):
            for column in range(w):
                patch = padded[:, row : row + 3, column : column + 3]
                y[:, row, column] += np.einsum("nijc,ijco->no", patch, conv["kernel"])
        if norm != "none":
            axes = (1, 2) if norm == "instance" else (1, 2, 3)
            y = (y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + 1e-5)
            y = y * params[f"norm{block}"]["scale"] + params[f"norm{block}"]["bias"]
        x = y = ACTIVATIONS[activation](y)
        if pooling != "none":
            pool = {"average": np.mean, "max": np.max}[pooling]
            x = np.stack(
                [
                    [pool(z[i : i + 2, j : j + 2], (0, 1)) for i in range(0, h - 1, 2) for j in range(0, w - 1, 2)]
                    for z in y
                ]
            ).reshape(n, h // 2, w // 2, -1)
    features = x.reshape(len(x), -1)
    return features @ params["linear"]["kernel"] + params["linear"]["bias"], features


@pytest.mark.parametrize(
    ("depth", "size", "classes", "features", "count"),
    [
        (3, 32, 10, 2048, 320_010),
        (4, 64, 200, 2048, 857_160),
        (6, 128, 10, 512, 748_170),
    ],
)
def test_convnet_has_the_reference_parameter_counts(depth, size, classes, features, count):
    network = build(NetSpec(depth=depth), (size, size, 3), classes)
    params = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    logits, embedding = jax.eval_shape(network.apply, params, images)
    assert network.num_params == count == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert logits.shape == (2, classes) and embedding.shape == (2, features)


@pytest.mark.parametrize(
    ("settings", "shape", "margin"),
    [
        ({"norm": "none", "activation": "leaky_relu"}, (8, 12, 3), 0),
        ({"norm": "instance"}, (9, 6, 2), 0),
        ({"norm": "layer", "activation": "sigmoid", "pooling": "max"}, (9, 6, 2), 0),
        ({"norm": "instance", "pooling": "none"}, (3, 2, 2), 0),
        ({"norm": "instance"}, (28, 28, 1), 2),
    ],
)
def test_convnet_matches_numpy(settings, shape, margin):
    network = build(NetSpec(depth=2, width=5, **settings), shape, 4)
    params = jax.jit(network.init)(jax.random.key(0))
    # Off their initial values, so that a missing scale or bias shows.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)
    images = rng.normal(size=(3, *shape)).astype(np.float32)
    logits, features = jax.jit(network.apply)(params, images)
    expected_logits, expected_features = numpy_convnet(params, images, 2, margin=margin, **settings)
    assert features.shape == expected_features.shape
    np.testing.assert_allclose(features, expected_features, atol=2e-5)
    np.testing.assert_allclose(logits, expected_logits, atol=2e-5)


def test_parts_of_a_batch_give_what_the_whole_gives(monkeypatch):
    n = 11
    network = build(NetSpec(depth=1, width=3), (4, 4, 2), 5)
    # Maps of 4x4x3 floats: three images at a time, two of the eleven left over.
    monkeypatch.setattr(microbatch, "BYTES", 4 * 4 * 4 * 3 * 3)
    microbatch._most.cache_clear()
    params = network.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (n, 4, 4, 2))
    labels = jax.nn.softmax(jax.random.normal(jax.random.key(2), (n, 5)))
    weights = jnp.arange(1.0, n + 1)

    def whole(params, images):
        def loss(params):
            return jnp.sum(weights * cross_entropy(network.apply(params, images)[0], labels)) / weights.sum()

        return jax.value_and_grad(loss)(params)

    def parts(params, images):
        return network.loss_and_gradient(params, images, labels, weights)

    def squares(function):
        return lambda *args: sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(function(*args)))

    assert "scan" in str(jax.make_jaxpr(parts)(params, images))

    def twice(outputs, gradient):
        functions = outputs, gradient, *(jax.grad(squares(f), (0, 1)) for f in (outputs, gradient))
        return jax.jit(lambda *args: [f(*args) for f in functions])(params, images)

    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, twice(network.outputs, parts), twice(network.apply, whole))
    microbatch._most.cache_clear()


def test_equal_specs_build_the_same_network_object():
    assert build(SMALL, (8, 8, 3), 4) is build(dataclasses.replace(SMALL), (8, 8, 3), 4)
    assert build(SMALL, (8, 8, 3), 4) is not build(SMALL, (8, 8, 3), 5)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "shape"),
    [
        ((3, 3), 1, None, (6, 7)),
        ((5, 5), 2, None, (9, 6)),
        ((3, 3), 2, "SAME", (6, 7)),
        ((2, 4), 2, "VALID", (7, 8)),
        ((4, 1), 1, [(3, 0), (2, 1)], (5, 4)),
        ((2, 2), 2, [(0, 0), (-1, 5)], (5, 6)),
        # Maps with fewer pixels than the kernel, which the CPU treats apart.
        ((3, 3), 1, None, (2, 2)),
        ((5, 5), 3, "SAME", (1, 2)),
    ],
)
def test_conv_and_both_gradients_equal_those_of_jax(kernel, stride, padding, shape):
    rng = np.random.default_rng(0)
    x, k = (rng.normal(size=shape).astype(np.float32) for shape in ((4, *shape, 3), (*kernel, 3, 5)))

    @jax.jit
    def both(x, k):
        results = []
        for function in (conv, native_conv):
            y, pull = jax.vjp(partial(function, stride=stride, padding=padding), x, k)
            results.append((y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))))
        return results

    ours, theirs = both(x, k)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 2},
        {"rhs_dilation": (2, 1)},
        {"dimension_numbers": ("NCHW", "HWIO", "NHWC")},
        {"precision": "highest"},
        {"batch_group_count": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_conv_leaves_what_is_not_plain_to_jax(options):
    groups = options.get("feature_group_count", 1)
    x, k = jnp.zeros((2, 4, 4, 4)), jnp.zeros((3, 3, 4 // groups, 6))
    call = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    ours, theirs = (
        str(jax.make_jaxpr(lambda x, k, f=f: f(x, k, (1, 2), [(1, 1), (0, 2)], **call))(x, k))
        for f in (conv_general_dilated, lax.conv_general_dilated)
    )
    assert ours == theirs


@pytest.mark.parametrize("stride", [1, 2])
def test_second_and_third_derivatives_of_conv_equal_those_of_jax(stride):
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 2))
    k = 0.3 * jax.random.normal(jax.random.key(1), (3, 3, 2, 3))

    def third(function):
        def loss(x, k):
            return jnp.sum(jnp.sin(function(x, k, stride=stride)))

        def norm(x, k):
            return sum(jnp.sum(jnp.cos(g)) for g in jax.grad(loss, (0, 1))(x, k))

        def norm_of_norm(x, k):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(norm, (0, 1))(x, k))

        return jax.jit(lambda x, k: (jax.grad(norm, (0, 1))(x, k), jax.grad(norm_of_norm, (0, 1))(x, k)))(x, k)

    for ours, theirs in zip(jax.tree.leaves(third(conv)), jax.tree.leaves(third(native_conv)), strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=5e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("size", "side", "padding"),
    [((16, 17), 3, ((1, 1), (1, 1))), ((16, 19), 1, ((0, 0), (2, 0)))],
    ids=str,
)
def test_minimal_filtering_and_its_first_and_second_derivatives_are_those_of_jax_in_float64(size, side, padding):
    with jax.enable_x64():
        rng = np.random.default_rng(0)
        x, k = rng.normal(size=(2, *size, 64)), 0.05 * rng.normal(size=(side, 3, 64, 64))

        def derivatives(conv):
            def values(x, k):
                return conv(x, k, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

            def norm(x, k):
                return sum(jnp.sum(jnp.cos(g)) for g in jax.grad(lambda *a: jnp.sum(jnp.sin(values(*a))), (0, 1))(x, k))

            return jax.jit(lambda x, k: (values(x, k), jax.vjp(values, x, k)[1](values(x, k)), jax.grad(norm, 1)(x, k)))

        assert "stablehlo.convolution" not in derivatives(conv_general_dilated).lower(x, k).as_text()
        pairs = zip(
            jax.tree.leaves(derivatives(conv_general_dilated)(x, k)),
            jax.tree.leaves(derivatives(lax.conv_general_dilated)(x, k)),
            strict=True,
        )
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, atol=1e-12 * np.abs(theirs).max())


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_nested_vmap_equals_loops(stride):
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 5, 5, 2))
    k = jax.random.normal(jax.random.key(1), (3, 3, 3, 2, 4))

    def grads(function):
        return jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(function(x, k, stride=stride))), argnums=(0, 1)))

    ours = jax.jit(jax.vmap(jax.vmap(grads(conv)), in_axes=(0, None)))(x, k)
    for i in range(2):
        for j in range(3):
            for a, b in zip(ours, grads(native_conv)(x[i, j], k[j]), strict=True):
                np.testing.assert_allclose(a[i, j], b, atol=1e-4)


def convolutions(platform, *, batched=False):
    """The convolution lines of the exported gradient for one platform."""
    grad = jax.grad(lambda x, k: jnp.sum(jnp.sin(conv(x, k))), argnums=(0, 1))
    x, k = jnp.zeros((4, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    if batched:
        grad, x, k = jax.vmap(grad), jnp.stack([x, x]), jnp.stack([k, k])
    text = jax.export.export(jax.jit(grad), platforms=[platform])(x, k).mlir_module()
    return [line for line in text.splitlines() if "stablehlo.convolution" in line]


def test_convolutions_on_cpu_have_no_groups():
    for batched in (False, True):
        for line in convolutions("cpu", batched=batched):
            assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line
            assert "batch_group_count = 1" in line and "feature_group_count = 1" in line


def test_map_smaller_than_the_kernel_does_not_take_its_place_on_cpu():
    x, k = jnp.zeros((4, 2, 2, 9)), jnp.zeros((3, 3, 9, 5))
    grad = jax.grad(lambda x, k: jnp.sum(jnp.sin(conv(x, k))), argnums=(0, 1))
    with jax.default_device(jax.devices("cpu")[0]):
        assert " convolution(" not in jax.jit(grad).lower(x, k).compile().as_text()


def test_gpu_gradients_keep_the_form_that_cudnn_is_matched_by():
    assert any("[f, 0, 1, b]x[i, 0, 1, o]->[0, 1, b, f]" in line for line in convolutions("cuda"))
    assert any("feature_group_count = 2" in line for line in convolutions("cuda", batched=True))


@pytest.mark.parametrize(
    ("change", "shape", "classes", "message"),
    [
        ({"depth": 6}, (28, 28, 1), 10, r"network\.depth: 6 blocks .* largest that fits is 5"),
        ({"depth": 0}, (8, 8, 3), 10, r"network\.depth: 0, must be 1 to 7"),
        ({"width": 0}, (8, 8, 3), 10, r"network\.width: 0, must be at least 1"),
        ({"norm": "batch"}, (8, 8, 3), 10, r"network\.norm: 'batch', must be one of"),
        ({"name": "lenet"}, (8, 8, 3), 10, r"network\.name: 'lenet', must be one of \['alexnet', 'convnet', "),
        ({}, (8, 8), 10, r"image_shape: \(8, 8\), must be \(h, w, c\)"),
        ({}, (32, 32, 3), 0, "num_classes: 0, must be at least 1"),
    ],
)
def test_network_that_cannot_be_built_is_refused(change, shape, classes, message):
    with pytest.raises(ValueError, match=message):
        build(dataclasses.replace(NetSpec(), **change), shape, classes)


def test_images_of_another_shape_are_refused():
    network = build(SMALL, (8, 8, 3), 4)
    with pytest.raises(ValueError, match=r"images: shape \(2, 16, 16, 3\), this network was built for \[n, 8, 8, 3\]"):
        network.apply({}, np.zeros((2, 16, 16, 3)))
