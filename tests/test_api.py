"""The verbs of the library: what users hand in, what comes back, and what is said of what does not fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gsdd_jax as gsdd
from gsdd_jax import codecs

CLASSES, SHAPE, KEY = 2, (8, 8, 1), jax.random.key(0)
RNG = np.random.default_rng(0)
LABELS = np.arange(24) % CLASSES
# The classes differ in brightness.
IMAGES = (RNG.integers(0, 100, (24, *SHAPE)) + 120 * LABELS[:, None, None, None]).astype(np.uint8)
PIXELS = gsdd.Pixels(images_per_class=1, optimizer="adam", lr=0.05)
MATCHING = gsdd.DistributionMatching(batch_real=4, class_chunk=2)
PLAIN = gsdd.Dsa(strategy="none")


class Linen(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(4)(x.reshape(len(x), -1))))


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden, self.last = nnx.Linear(64, 4, rngs=rngs), nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def distill(images=IMAGES, labels=LABELS, **settings):
    usual = {"codec": PIXELS, "objective": MATCHING, "network": Linen(CLASSES), "steps": 3, "augment": PLAIN}
    return gsdd.distill(KEY, images, labels, **{**usual, "progress": False} | settings)


def bits(synset):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(synset.params)]


def test_a_flax_module_distills_the_same_from_bytes_floats_numpy_and_jax(tmp_path):
    seen, network = [], Nnx
    made = distill(network=network, on_step=lambda step, metrics: seen.append((step, float(metrics["loss"]))))
    assert [step for step, _ in seen] == [1, 2, 3] and all(np.isfinite(loss) for _, loss in seen)
    assert bits(made) == bits(distill(jnp.asarray(IMAGES, jnp.float32) / 255, jnp.asarray(LABELS), network=network))
    # It moved from the real images that it began as, which are what a fit alone leaves.
    assert bits(made) != bits(distill(network=network, steps=0))
    accuracy = gsdd.evaluate(
        KEY, made, IMAGES / 255, LABELS, network=network, training=gsdd.Training(steps=60, lr=0.1, seeds=2),
        augment=PLAIN, progress=False,
    )  # fmt: skip
    assert float(accuracy) == accuracy.mean > 0.9 and len(accuracy.networks) == 2 and len(accuracy.per_class) == 2
    assert str(accuracy).endswith("% (n = 2)")
    made.save(tmp_path / "set")
    again = gsdd.load(tmp_path / "set")
    assert (again.images() == made.images()).all() and again.meta["objective"] == "distribution"


def test_a_budget_in_bytes_fills_what_the_codec_leaves_open_and_a_fit_is_a_set():
    psnr = []
    made = gsdd.fit(
        KEY, IMAGES, LABELS, codec=gsdd.SparseGaussians(num_points=4), bytes_per_class=200, steps=5,
        class_names=("dark", "bright"), progress=False, on_step=lambda step, metrics: psnr.append(metrics["psnr"]),
    )  # fmt: skip
    # Four Gaussians of seven numbers in two bytes each are 56 bytes.
    assert made.codec.images_per_class == 3 and made.nbytes == 2 * 3 * 56 and made.class_names == ("dark", "bright")
    assert psnr[-1] > psnr[0]
    # It is a start for a distillation; its arrays stay.
    before = bits(made)
    after = distill(codec=made.codec, start=made, class_names=made.class_names)
    assert bits(made) == before != bits(after)


def test_the_codec_can_have_any_optax_optimizer_and_schedule():
    still = distill(optimizer=optax.set_to_zero())
    assert bits(still) == bits(distill(steps=0))
    halved = distill(
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05)), schedule=lambda step: 0.5
    )
    assert bits(halved) != bits(still)


def test_whitening_comes_with_the_set_or_is_asked_for():
    training = gsdd.Training(steps=1, seeds=1)
    rest = {"network": Linen(CLASSES), "training": training, "augment": PLAIN, "progress": False}
    shifted = jax.tree_util.Partial(lambda by, x: x - by, jnp.float32(0.5))
    made = distill(whitening=shifted, steps=1)
    with pytest.raises(ValueError, match="whitening: the set was made through 'custom', which is not part of it"):
        gsdd.evaluate(KEY, made, IMAGES, LABELS, **rest)
    gsdd.evaluate(KEY, made, IMAGES, LABELS, whitening=shifted, **rest)


def test_a_step_runs_under_scan_and_a_distillation_under_vmap_over_seeds():
    codec = gsdd.make_codec(PIXELS, image_shape=SHAPE, num_classes=CLASSES)
    network = gsdd.make_network(Linen(CLASSES), SHAPE, CLASSES)
    objective = gsdd.make_objective(MATCHING, codec=codec, network=network, augment=PLAIN)
    step, data = gsdd.make_step(objective), gsdd.device_data(IMAGES, LABELS, gsdd.whiten.fit("meanstd", IMAGES))
    assert gsdd.make_objective(MATCHING, codec=codec, network=network, augment=PLAIN) is objective

    def whole(key):
        state = gsdd.init_state(objective, codec.init(key, IMAGES[:2]))
        return jax.lax.scan(lambda state, _: step(state, data, key), state, None, length=3)

    keys = jax.random.split(KEY, 2)
    states, metrics = jax.jit(jax.vmap(whole))(keys)
    assert metrics["loss"].shape == (2, 3) and states.step.tolist() == [3, 3]
    state = gsdd.init_state(objective, codec.init(KEY, IMAGES[:2]))
    for _ in range(3):
        state, one = jax.jit(step)(state, data, keys[1])
    np.testing.assert_allclose(one["loss"], metrics["loss"][1, -1], rtol=1e-4)


WRONG = {
    "steps": ({"steps": -1}, ValueError, "steps: expected a whole number of at least 0, found -1"),
    "codec": ({"codec": "pixel"}, TypeError, "codec: expected a spec such as PackedGaussianSpec.*, found 'pixel'"),
    "objective": ({"objective": "dm"}, ValueError, "objective.name: expected one of distribution, .*; found 'dm'"),
    "optimizer": ({"optimizer": "adam"}, TypeError, "optimizer: expected optax's GradientTransformation, found 'adam'"),
    "labels": ({"labels": LABELS[:5]}, ValueError, r"labels: expected one per image, \[24\]; found shape \[5\]"),
    "gap": ({"labels": LABELS * 2}, ValueError, "class 1 has no images"),
    "images": ({"images": IMAGES.astype(int)}, TypeError, "images: found int64"),
    "names": ({"class_names": ("a", "b", "c")}, ValueError, "class 2 has no images"),
    "schedule": ({"schedule": "linear"}, ValueError, "schedule: expected cosine, constant or a function .*'linear'"),
    "whitening": ({"whitening": "pca"}, ValueError, "whiten: unknown kind 'pca'; allowed: zca, meanstd, none"),
    "open": ({"codec": gsdd.Pixels()}, ValueError, "codec.images_per_class: expected at least 1, or a budget"),
    "other codec": (
        {"codec": codecs.make(PIXELS, image_shape=(4, 4, 1), num_classes=2)},
        ValueError,
        r"codec: made for 2 classes of images \[4, 4, 1\]; found 2 classes of \[8, 8, 1\]",
    ),
    "experts": ({"objective": gsdd.TrajectoryMatching()}, ValueError, "experts: this objective needs trained"),
    "network": ({"network": Linen(5)}, ValueError, "expected logits of 2 classes, found 5"),
    "diverging": ({"optimizer": optax.sgd(1e38)}, FloatingPointError, "loss not finite in step [23]; try a smaller"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_clear_error(name):
    change, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        distill(**change)


def test_test_labels_of_other_classes_are_refused():
    made = distill(steps=0)
    for labels, found in ((LABELS + 7, 7), (LABELS - 1, -1)):
        with pytest.raises(ValueError, match=f"test_labels: expected 0 to 1, the classes of the set; found {found}"):
            gsdd.evaluate(KEY, made, IMAGES, labels, network=Linen(CLASSES), progress=False)


def test_a_start_of_another_size_is_refused():
    small = gsdd.fit(KEY, IMAGES, LABELS, codec=gsdd.Pixels(images_per_class=2), progress=False)
    with pytest.raises(ValueError, match="start: expected a set of the pixel codec with 1 images per class"):
        distill(start=small)


def test_progress_is_shown_where_it_is_asked_for_and_nowhere_else(capsys):
    distill(steps=2)
    assert capsys.readouterr() == ("", "")
    distill(steps=2, progress=True)
    shown = capsys.readouterr()
    assert "distill" in shown.out + shown.err


def test_gradient_matching_takes_its_loops_from_the_size_of_the_set():
    made = distill(objective=gsdd.GradientMatching(batch_real=2, class_chunk=2), steps=1)
    assert made.meta["objective"] == "gradient"
    spec = gsdd.match.resolved(gsdd.GradientMatching(), 1.0)
    assert (spec.outer_loop, spec.inner_loop) == (1, 1)
