import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import codecs, data, distillation, match, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.batches import Data, hold
from gsdd_jax.codecs import GaussianSpec
from gsdd_jax.gaussians import Gaussians
from gsdd_jax.match import DistributionSpec, distribution_loss
from gsdd_jax.nets import NetSpec, build

CLASSES, SHAPE, GPC, POINTS = 2, (8, 8, 1), 3, 4
NETWORK = build(NetSpec(depth=1, width=8), SHAPE, CLASSES)
AUGMENT = DsaSpec(strategy="crop")
KEY = jax.random.key(7)
LIMIT = np.float32(1 - 1e-3)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    """Two of the ten classes."""
    full = data.load(data.DataSpec(per_class=20, test_limit=10))
    keep = full.train_labels < CLASSES
    return full._replace(train_images=full.train_images[keep], train_labels=full.train_labels[keep])


@pytest.fixture(scope="module")
def on_device(digits) -> Data:
    held = hold(digits.train_images, digits.train_labels, CLASSES)
    return Data(whiten.fit("meanstd", digits.train_images), held, {})


def make_codec(**changes) -> codecs.Codec:
    spec = GaussianSpec(images_per_class=GPC, num_points=POINTS, **{"lr": 0.02, "boundary": 0.1} | changes)
    return codecs.make(spec, image_shape=SHAPE, num_classes=CLASSES, bytes_per_class=GPC * POINTS * 7 * 2)


def make_objective(codec, **settings):
    spec = DistributionSpec(**{"batch_real": 6} | settings)
    return match.make(spec, codec=codec, network=NETWORK, augment=AUGMENT)


def make_step(codec, **objective):
    return distillation.make_step(make_objective(codec, **objective))


def init_state(codec, params):
    return distillation.init_state(make_objective(codec), params)


def keys_of(number):
    """The keys of a step: of its first need, and of its loss."""
    key_batch, key_loss, _ = jax.random.split(jax.random.fold_in(KEY, number), 3)
    return jax.random.fold_in(key_batch, 0), key_loss


@pytest.fixture(scope="module")
def codec() -> codecs.Codec:
    return make_codec()


@pytest.fixture(scope="module")
def start(codec, digits) -> distillation.State:
    chosen = np.concatenate([np.flatnonzero(digits.train_labels == label)[:GPC] for label in range(CLASSES)])
    targets = jnp.asarray(digits.train_images[chosen], jnp.float32) / 255
    params = jax.jit(codec.init)(jax.random.key(0), targets)
    # Some centers at the border, so that the projection has something to do.
    mean = params.mean.at[:, 0].set(LIMIT).at[:, 1].set(-LIMIT)
    params = Gaussians(mean, params.cholesky, params.color, params.opacity, size=params.size)
    return init_state(codec, params)


@pytest.fixture(scope="module")
def step(codec):
    return jax.jit(make_step(codec))


@pytest.fixture(scope="module")
def composed(codec, on_device):
    """``(params, number of the step) -> (loss, gradient)``, composed by hand from the parts."""

    def loss(params, number):
        key_real, key_loss = keys_of(number)
        _, key_loss = jax.random.split(key_loss)
        value = distribution_loss(
            key_loss,
            on_device.held.images[data.sample_classes(key_real, on_device.held.table, 6)],
            codec.decode(params).reshape(CLASSES, GPC, *SHAPE),
            network=NETWORK,
            augment=AUGMENT,
            whitening=on_device.whitening,
            class_chunk=CLASSES,
        )
        return value - 0.1 * jnp.mean(jnp.log(1 - params.mean**2)), value

    def loss_and_gradient(params, number):
        grads, value = jax.grad(loss, has_aux=True)(params, number)
        return value, grads

    return jax.jit(loss_and_gradient)


def test_schedule_scales_the_update_and_nothing_else(codec, start, step, on_device):
    plain, _ = step(start, on_device, KEY)
    scheduled = jax.jit(distillation.make_step(make_objective(codec), schedule=lambda taken: 0.25 / (1 + taken)))
    first, _ = scheduled(start, on_device, KEY)
    np.testing.assert_allclose(
        first.params.color - start.params.color, 0.25 * (plain.params.color - start.params.color), rtol=0, atol=1e-6
    )
    # Two programs, which may round differently.
    for ours, same in zip(jax.tree.leaves(first.opt_state), jax.tree.leaves(plain.opt_state), strict=True):
        np.testing.assert_allclose(ours, same, rtol=1e-5, atol=1e-7)
    # The second step has half of that.
    again, _ = step(first, on_device, KEY)
    second, _ = scheduled(first, on_device, KEY)
    np.testing.assert_allclose(
        second.params.color - first.params.color, 0.125 * (again.params.color - first.params.color), rtol=0, atol=1e-6
    )


def test_first_steps_are_adam_on_the_composed_gradient(composed, codec, start, step, on_device):
    state = start
    m = v = {name: 0.0 for name in ("mean", "cholesky", "color", "opacity")}
    for t in range(2):
        loss, grads = composed(state.params, t)
        after, metrics = step(state, on_device, KEY)
        assert metrics["loss"] == pytest.approx(float(loss), rel=1e-4)
        assert metrics["regularizer"] == pytest.approx(float(codec.regularize(state.params)), rel=1e-5)
        own = {name: np.asarray(getattr(grads, name), np.float64) for name in m}
        norm = np.sqrt(sum(np.sum(g**2) for g in own.values()))
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
        m = {name: 0.9 * m[name] + 0.1 * g for name, g in own.items()}
        v = {name: 0.999 * v[name] + 0.001 * g**2 for name, g in own.items()}
        for name in own:
            size = (m[name] / (1 - 0.9 ** (t + 1))) / (np.sqrt(v[name] / (1 - 0.999 ** (t + 1))) + 1e-8)
            expected = np.asarray(getattr(state.params, name), np.float64) - 0.02 * size
            if name == "mean":
                expected = np.clip(expected, -LIMIT, LIMIT)
            found = np.asarray(getattr(after.params, name), np.float64)
            # The first step of Adam is a sign: where the gradient is as small as its rounding, anything goes.
            clear = np.abs(own[name]) > 1e-4 * np.abs(own[name]).max()
            assert clear.mean() > 0.9
            np.testing.assert_allclose(found[clear], expected[clear], rtol=0, atol=1e-4, err_msg=f"{name}, step {t}")
        assert after.step == t + 1
        state = after
    assert np.abs(np.asarray(state.params.mean)).max() <= LIMIT


def test_steps_of_one_key_draw_anew(step, start, on_device):
    # The same parameters, so that only what is drawn can differ.
    losses = {float(step(start._replace(step=jnp.int32(i)), on_device, KEY)[1]["loss"]) for i in range(5)}
    assert len(losses) == 5


def test_large_steps_are_projected_compile_once_and_donate_their_state(start, on_device):
    codec = make_codec(lr=0.5, boundary=0.0)
    step = jax.jit(make_step(codec), donate_argnums=0)
    state = jax.tree.map(jnp.copy, init_state(codec, start.params))
    first = jax.tree.leaves(state.params)[0]
    for _ in range(4):
        state, _ = step(state, on_device, KEY)
    assert step._cache_size() == 1
    assert first.is_deleted()
    before, after = (np.abs(np.asarray(params.mean)) for params in (start.params, state.params))
    assert after.max() == LIMIT and ((after == LIMIT) & (before < LIMIT)).any()


def test_host_batches_give_the_step_of_the_same_images_on_the_device(codec, start, step, on_device):
    images = on_device.held.images[data.sample_classes(keys_of(0)[0], on_device.held.table, 6)]
    batch = Data(on_device.whitening, None, {"real": jnp.asarray(np.asarray(images))})
    by_host, host_metrics = jax.jit(make_step(codec))(start, batch, KEY)
    by_device, metrics = step(start, on_device, KEY)
    assert host_metrics["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(by_host.params), jax.tree.leaves(by_device.params), strict=True):
        assert np.mean(np.abs(np.asarray(a - b)) > 1e-5) < 0.01


def test_batch_syn_moves_only_the_drawn_images_of_each_class(codec, start, on_device):
    step = jax.jit(make_step(codec, batch_syn=2))
    drawn = set()
    for number in range(16):
        # Fresh momenta, so that only this step's gradient moves anything.
        after, _ = step(start._replace(step=jnp.int32(number)), on_device, KEY)
        moved = np.any(np.asarray(after.params.color != start.params.color), axis=(1, 2)).reshape(CLASSES, GPC)
        assert (moved.sum(1) == 2).all()
        for name in ("cholesky", "opacity"):
            change = np.asarray(getattr(after.params, name) != getattr(start.params, name))
            assert not change.reshape(CLASSES, GPC, -1)[~moved].any(), name
        # The barrier is of all images.
        assert np.any(np.asarray(after.params.mean != start.params.mean), axis=(1, 2)).all()
        drawn |= {(label, tuple(np.flatnonzero(row))) for label, row in enumerate(moved)}
    # Both classes come to draw every pair.
    assert len(drawn) == 6


def test_batch_syn_of_all_images_is_the_whole_set(codec, start, on_device):
    # Traced, not compiled: the same program as without the setting.
    def program(**objective):
        return str(jax.make_jaxpr(make_step(codec, **objective))(start, on_device, KEY))

    def without_addresses(text):
        return [line.split(" at 0x")[0] for line in text.splitlines()]

    assert without_addresses(program(batch_syn=GPC + 2)) == without_addresses(program())
    assert without_addresses(program(batch_syn=2)) != without_addresses(program())


def test_distillation_of_gaussians_lowers_the_loss_on_fixed_keys(step, start, on_device):
    def held_out(state) -> float:
        return np.mean([float(step(state, on_device, jax.random.key(100 + i))[1]["loss"]) for i in range(10)])

    state = start
    for _ in range(60):
        state, _ = step(state, on_device, KEY)
    assert held_out(state) < 0.9 * held_out(start)
