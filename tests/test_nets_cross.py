"""AlexNet, VGG11, ResNet18 and ViT against NumPy in float64 and the reference's figures, and the layers they share."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.special import erf

from gsdd_jax.nets import NetSpec, build, layers

FAMILIES = ("alexnet", "vgg11", "resnet18", "vit")
# The sides at which gradients are computed. VGG11 takes no smaller images; ResNet18's are
# halved from an even and from odd sides, and its last map has room for a kernel; the others pool or cut as at 32 px.
SIDES = {"alexnet": 16, "vgg11": 32, "resnet18": 18, "vit": 16}
CLASSES = 10


# --- The networks once more, in NumPy -------------------------------------------------------------------------------


def conv(x, kernel, bias=0.0, *, stride=1):
    side, pad = kernel.shape[0], kernel.shape[0] // 2
    _, h, w, _ = x.shape
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    taps = itertools.product(range(side), range(side))
    columns = np.concatenate([x[:, i : i + h : stride, j : j + w : stride] for i, j in taps], -1)
    # As one matrix product: one for each row of pixels reads the kernel as often.
    out = columns.reshape(-1, columns.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return out.reshape(*columns.shape[:3], -1) + bias


def normalize(x, axes, scale, bias):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5) * scale + bias


def pool(x, rows, columns):
    """The maximum over each pair of a row range and a column range."""
    return np.stack([np.stack([x[:, a:b, c:d].max((1, 2)) for c, d in columns], 1) for a, b in rows], 1)


def halves(x):
    return pool(x, *([(2 * i, 2 * i + 2) for i in range(size // 2)] for size in x.shape[1:3]))


def grid(x, side):
    cells = ([(math.floor(i * s / side), math.ceil((i + 1) * s / side)) for i in range(side)] for s in x.shape[1:3])
    return pool(x, *cells)


def relu(x):
    return np.maximum(x, 0)


def frame(x):
    """The reference's wider first padding, for digits of 28 px."""
    margin = 2 if x.shape[1:] == (28, 28, 1) else 0
    return np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def alexnet(p, x):
    x = halves(relu(conv(frame(x), **p["conv0"])))
    x = halves(relu(conv(x, **p["conv1"])))
    x = relu(conv(relu(conv(x, **p["conv2"])), **p["conv3"]))
    return halves(relu(conv(x, **p["conv4"])))


def vgg11(p, x):
    small = max(x.shape[1:3]) <= 32
    x = frame(x)
    for index, letter in enumerate("MM-M-M-M"):
        x = relu(normalize(conv(x, **p[f"conv{index}"]), (1, 2), **p[f"norm{index}"]))
        x = halves(x) if letter == "M" else x
    return x if small else grid(x, 7)


def resnet18(p, x):
    def layer(x, name, stride=1):
        return normalize(conv(x, p[name]["kernel"], stride=stride), (1, 2), **p[f"{name}_norm"])

    x, stem = relu(layer(x, "stem")), p
    for block in range(8):
        p, stride = stem[f"block{block}"], 2 if block in (2, 4, 6) else 1
        y = layer(relu(layer(x, "conv0", stride)), "conv1")
        x = relu(y + (layer(x, "shortcut", 2) if stride == 2 else x))
    return x.mean((1, 2))


def vit(p, x):
    side, depth, norm = (4, 6, True) if max(x.shape[1:3]) <= 32 else (16, 10, False)

    def maybe(x, p, name):
        return normalize(x, -1, **p[name]) if norm else x

    _, h, w, _ = x.shape
    corners = itertools.product(range(0, h, side), range(0, w, side))
    patches = np.stack([x[:, i : i + side, j : j + side].reshape(len(x), -1) for i, j in corners], 1)
    x = patches @ p["embed"]["kernel"] + p["embed"]["bias"]
    x = np.concatenate([np.tile(p["cls"], (len(x), 1, 1)), x], 1) + p["position"]
    for block in range(depth):
        b = p[f"block{block}"]
        q, k, v = np.split(maybe(x, b, "norm0") @ b["qkv"]["kernel"], 3, axis=-1)
        heads = []
        for head in range(8):
            q1, k1, v1 = (z[..., 64 * head : 64 * head + 64] for z in (q, k, v))
            weights = np.exp(q1 @ k1.swapaxes(1, 2) / 8)
            heads.append(weights / weights.sum(-1, keepdims=True) @ v1)
        x = x + np.concatenate(heads, -1) @ b["out"]["kernel"] + b["out"]["bias"]
        y = maybe(x, b, "norm1") @ b["mlp0"]["kernel"] + b["mlp0"]["bias"]
        y = y * (1 + erf(y / math.sqrt(2))) / 2
        x = x + y @ b["mlp1"]["kernel"] + b["mlp1"]["bias"]
    return maybe(x[:, 0], p, "norm")


def reference(name, params, images):
    features = globals()[name](params, images).reshape(len(images), -1)
    return features @ params["linear"]["kernel"] + params["linear"]["bias"], features


# --- The networks and their gradients --------------------------------------------------------------------------------


def draw(network, seed, dtype):
    """Parameters of the usual size, but none at its initial value, so that a missing scale or bias shows."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        kind = path[-1].key
        if kind == "kernel":
            return rng.normal(size=shape.shape) / math.sqrt(3 * math.prod(shape.shape[:-1]))
        return (kind == "scale") + (1.0 if kind in ("cls", "position") else 0.1) * rng.normal(size=shape.shape)

    drawn = jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(network.init, jax.random.key(0)))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), drawn)


@pytest.mark.parametrize("name", FAMILIES)
def test_network_matches_numpy_and_its_gradient_finite_differences(name):
    network = build(NetSpec(name=name), (SIDES[name], SIDES[name], 3), CLASSES)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradient(params, images):
        logits, features = network.apply(params, images)
        return jnp.sum(jnp.sin(logits)) + jnp.sum(jnp.sin(features)), (logits, features)

    rng = np.random.default_rng(1)
    point = draw(network, 0, np.float64), rng.normal(size=(2, SIDES[name], SIDES[name], 3))
    with jax.enable_x64(True):
        grads, outputs = jax.tree.map(np.asarray, gradient(*point))
    for ours, theirs in zip(outputs, reference(name, *point), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9 * np.abs(theirs).max())

    # A random direction, turned in each leaf to the gradient's side: nothing cancels, and no leaf can be left out.
    def turned(leaf, g):
        direction = leaf.std() * rng.normal(size=leaf.shape)
        return direction if (direction * g).sum() > 0 else -direction

    direction = jax.tree.map(turned, point, grads)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda d, g: (d * g).sum(), direction, grads)))
    ends = [jax.tree.map(lambda a, d, step=step: a + step * d, point, direction) for step in (1e-7, -1e-7)]
    values = [sum(np.sin(output).sum() for output in reference(name, *end)) for end in ends]
    assert slope > 1
    np.testing.assert_allclose(slope, (values[0] - values[1]) / 2e-7, rtol=1e-5)


# Forms for larger images, odd sides, sides that differ, and digits.
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("alexnet", (28, 28, 1)),
        ("vgg11", (40, 33, 3)),
        ("resnet18", (11, 13, 2)),
        ("vit", (48, 32, 3)),
    ],
)
def test_network_matches_numpy_at_other_sizes(name, shape):
    network = build(NetSpec(name=name), shape, CLASSES)
    params = draw(network, 0, np.float32)
    images = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    outputs = jax.jit(network.apply)(params, images)
    expected = reference(name, jax.tree.map(lambda leaf: leaf.astype(np.float64), params), images.astype(np.float64))
    for ours, theirs in zip(outputs, expected, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


# --- Figures of the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "features", "count"),
    [
        ("alexnet", 32, 3_072, 1_872_202),
        ("alexnet", 128, 49_152, 2_333_002),
        ("vgg11", 32, 512, 9_231_114),
        ("vgg11", 128, 25_088, 9_476_874),
        ("resnet18", 32, 512, 11_173_962),
        ("vit", 32, 512, 9_523_722),
        ("vit", 128, 512, 16_176_650),
    ],
)
def test_network_has_the_reference_parameter_counts(name, size, features, count):
    network = build(NetSpec(name=name), (size, size, 3), CLASSES)
    params = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    logits, embedding = jax.eval_shape(network.apply, params, images)
    assert network.num_params == count == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert logits.shape == (2, CLASSES) and embedding.shape == (2, features)


@pytest.mark.parametrize(
    ("name", "fan_in", "unbiased"),
    [
        ("convnet", {"conv0": 27, "conv1": 1152, "linear": 2048}, []),
        ("alexnet", {"conv0": 75, "conv1": 3200, "conv2": 1728, "conv4": 1728, "linear": 3072}, []),
        ("vgg11", {"conv0": 27, "conv1": 576, "conv7": 4608, "linear": 512}, []),
        (
            "resnet18",
            {"stem": 27, "block2/conv0": 576, "block2/shortcut": 64, "block7/conv1": 4608, "linear": 512},
            ["stem", "block2/conv0", "block2/shortcut", "block7/conv1"],
        ),
        ("vit", {"embed": 48, "block0/qkv": 512, "block5/mlp1": 512, "linear": 512}, ["block0/qkv"]),
    ],
)
def test_initialization_has_the_reference_distribution(name, fan_in, unbiased):
    network = build(NetSpec(name=name), (32, 32, 3), CLASSES)
    tokens = ["cls", "position"] if name == "vit" else []

    @jax.jit
    def some(key):
        """Draws what is looked at: the rest takes long to compile."""
        params = network.init(key)
        drawn = [params.pop(kind) for kind in tokens]
        params = flatten_dict(params, sep="/", is_leaf=lambda _, leaf: not isinstance(next(iter(leaf.values())), dict))
        return {layer: leaf for layer, leaf in params.items() if layer in fan_in or "scale" in leaf}, drawn

    params, tokens = some(jax.random.key(0))
    for layer, inputs in fan_in.items():
        bound = 1 / math.sqrt(inputs)
        assert set(params[layer]) == ({"kernel"} if layer in unbiased else {"kernel", "bias"})
        for leaf in params[layer].values():
            assert np.abs(leaf).max() <= bound * (1 + 1e-6)
        kernel = np.asarray(params[layer]["kernel"])
        assert np.abs(kernel).max() > 0.99 * bound
        np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.03)
        np.testing.assert_allclose(kernel.mean(), 0, atol=0.05 * bound)
    for layer in params.values():
        if "scale" in layer:
            assert np.all(layer["scale"] == 1) and np.all(layer["bias"] == 0)
    for drawn in tokens:
        np.testing.assert_allclose([drawn.mean(), drawn.std()], [0, 1], atol=0.1)


# --- What fits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("alexnet", (7, 32, 3), "alexnet does not fit 7x32 px images, its three poolings need at least 8x8 px"),
        ("vgg11", (31, 32, 3), "vgg11 does not fit 31x32 px images, its five poolings need at least 32x32 px"),
        ("resnet18", (8, 8, 1), "resnet18 does not fit 8x8 px images, it needs at least 9x9 px"),
        ("vit", (30, 32, 3), "vit does not fit 30x32 px images, both sides must be divisible by 4 up to 32 px"),
        ("vit", (40, 32, 3), "vit does not fit 40x32 px images, both sides must be .* and by 16 beyond"),
    ],
)
def test_network_that_does_not_fit_the_images_is_refused(name, shape, message):
    with pytest.raises(ValueError, match=rf"^network\.name: {message}"):
        build(NetSpec(name=name), shape, CLASSES)


@pytest.mark.parametrize(("name", "field", "value"), [("alexnet", "depth", 5), ("vit", "norm", "none")])
def test_setting_of_the_convnet_is_refused_for_another_family(name, field, value):
    message = rf"network\.{field}: {value!r} is a setting of convnet, {name} has none; write network: {{name: {name}}}"
    with pytest.raises(ValueError, match=message):
        NetSpec(name=name, **{field: value})


# --- The shared layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (1, 5, 7, 2), (1, 1, 4, 1)])
def test_max_pool_equals_numpy_and_leaves_out_an_odd_rest(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    out = layers.max_pool(jnp.asarray(x))
    assert out.shape == (shape[0], shape[1] // 2, shape[2] // 2, shape[3])
    if out.size:
        np.testing.assert_array_equal(out, halves(x))


@pytest.mark.parametrize("size", [1, 4, 16])
def test_adaptive_max_pool_equals_numpy(size):
    x = np.random.default_rng(0).normal(size=(2, size, 3, 2)).astype(np.float32)
    np.testing.assert_array_equal(layers.adaptive_max_pool(jnp.asarray(x), 7), grid(x, 7))


def test_gradient_of_pooling_goes_to_the_first_of_equal_pixels():
    x = jnp.array([[1.0, 3.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0]])[None, ..., None]
    first = np.array([[0, 1, 1, 0], [0, 0, 0, 0]])[None, ..., None]
    np.testing.assert_array_equal(jax.grad(lambda x: layers.max_pool(x).sum())(x), first)
    # Two cells, each of the same two rows and two columns.
    x = x[..., 0].swapaxes(1, 2)[..., None]
    np.testing.assert_array_equal(
        jax.grad(lambda x: layers.adaptive_max_pool(x[:, :2], 1).sum())(x)[0, :2, :, 0], [[0, 1], [0, 0]]
    )


def test_nan_wins_every_pooling():
    for place in np.ndindex(2, 2):
        x = jnp.ones((1, 2, 2, 1)).at[0, *place, 0].set(jnp.nan)
        assert np.isnan(layers.max_pool(x)) and np.isnan(layers.adaptive_max_pool(x, 1))


def second_order(layer, *operands):
    """Compares the gradient of the squared norm of a gradient with finite differences of that norm, in float64."""
    rng = np.random.default_rng(0)

    def norm(operands):
        grads = jax.grad(lambda operands: jnp.sum(jnp.sin(layer(*operands))))(operands)
        return sum(jnp.sum(g**2) for g in grads)

    with jax.enable_x64(True):
        point = [rng.normal(size=shape) for shape in operands]
        direction = [rng.normal(size=shape) for shape in operands]
        value = jax.jit(norm)
        grads = jax.jit(jax.grad(norm))(point)
        step = 1e-6
        ends = [value([a + sign * step * d for a, d in zip(point, direction, strict=True)]) for sign in (1, -1)]
        slope = sum(float(jnp.sum(g * d)) for g, d in zip(grads, direction, strict=True))
    assert abs(slope) > 0.1
    np.testing.assert_allclose(slope, float(ends[0] - ends[1]) / (2 * step), rtol=1e-6)


def test_second_order_gradient_of_max_pool_matches_finite_differences():
    second_order(layers.max_pool, (2, 5, 6, 3))


def test_second_order_gradient_of_adaptive_max_pool_matches_finite_differences():
    second_order(lambda x: layers.adaptive_max_pool(x, 7), (2, 9, 4, 2))


def test_second_order_gradients_of_the_normalizations_match_finite_differences():
    for norm in (layers.InstanceNorm(), layers.LayerNorm()):
        second_order(
            lambda x, scale, bias, norm=norm: norm.apply({"params": {"scale": scale, "bias": bias}}, x),
            (2, 3, 4, 5), (5,), (5,),
        )  # fmt: skip
