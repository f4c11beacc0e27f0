"""Networks and codecs of others: nothing is taken for granted that the interfaces do not ask for."""

import dataclasses
import math
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from annotated_types import Ge, Gt
from command_line import ROOT
from flax import nnx
from objectives import data_of
from typing_extensions import Doc

import gsdd_jax
from gsdd_jax import codecs, distillation, evaluation, match, nets, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.codecs.base import Codec, Spec, arrays
from gsdd_jax.match import DistributionSpec, GradientSpec, MmdSpec, TrajectorySpec, distribution_loss, gradient_loss
from gsdd_jax.nets import Network
from train import config as configs
from train import experiment as experiments
from train import report, results
from train.rundir import RunDir

SHAPE, CLASSES = (8, 8, 1), 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatSpec(Spec):
    """A codec's settings, none of which has a name of ours but those that the registry asks for."""

    name: Annotated[Literal["flat"], Doc("the parameterization")] = "flat"
    images_per_class: Annotated[int, Ge(0), Doc("images per class")] = 0
    rate: Annotated[float, Gt(0), Doc("learning rate")] = 0.05

    def layout(self, image_shape, num_classes):
        (h, w, c), n = image_shape, num_classes * self.images_per_class
        return arrays("float32", {"small": (n, h // 2, w // 2, c), "shift": (n, c)})


def make(spec, image_shape, num_classes):
    """A quarter of the pixels and a shift, in float32."""
    h, w, c = image_shape
    n = num_classes * spec.images_per_class

    def init(key, images):
        del key
        return {"small": images[:, ::2, ::2], "shift": jnp.zeros((n, c))}

    def decode(params, index=None, *, size=None, key=None):
        del key
        chosen = params if index is None else jax.tree.map(lambda x: x[index], params)
        images = jax.image.resize(chosen["small"], (len(chosen["small"]), *(size or (h, w)), c), "nearest")
        return images + chosen["shift"][:, None, None]

    def quantize(params):
        return params

    return Codec(
        name="flat",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        quantize=quantize,
        dequantize=quantize,
        nbytes=lambda params: 4 * sum(math.prod(x.shape) for x in params.values()),
        layout=lambda: spec.layout(image_shape, num_classes),
        optimizer=lambda: optax.adam(spec.rate),
        fitter=lambda steps: optax.adam(0.01),
    )


def small(images):
    return images.reshape(len(images), -1)


def network(apply=None, init=None, classes=CLASSES):
    """One layer on the pixels, with a list of weights that have no names at all."""
    pixels = math.prod(SHAPE)

    def draw(key):
        a, b = jax.random.split(key)
        return [jax.random.normal(a, (pixels, 5)) / 8, jnp.zeros(5), {"w": jax.random.normal(b, (5, classes))}]

    def outputs(params, images):
        features = nn.relu(small(images) @ params[0] + params[1])
        return features @ params[2]["w"], features

    return Network(init or draw, apply or outputs, pixels * 5 + 5 + 5 * classes)


NORMAL = whiten.MeanStd(jnp.full(1, 0.3), jnp.full(1, 0.4))
SETTINGS = {"augment": DsaSpec(strategy="none")}
OBJECTIVES = {
    "distribution": DistributionSpec(batch_real=4),
    "gradient": GradientSpec(batch_real=4, outer_loop=2, inner_loop=1),
    "trajectory": TrajectorySpec(syn_steps=2, expert_epochs=1, max_start_epoch=1),
}


def flat():
    return make(FlatSpec(images_per_class=2), SHAPE, CLASSES)


@pytest.mark.parametrize("name", ["gradient", "trajectory"])
def test_a_step_of_every_objective_moves_a_foreign_codec_by_a_foreign_network(name):
    codec, net, objective = flat(), network(), OBJECTIVES[name]
    # With the MMD term beside trajectory matching.
    mmd = MmdSpec(weight=float(name == "trajectory"), samples=2)
    objective = match.make(objective, codec=codec, network=net, mmd=mmd, **SETTINGS)
    step = distillation.make_step(objective)
    images = np.random.default_rng(1).uniform(size=(codec.num_images, *SHAPE)).astype(np.float32)
    state = distillation.init_state(objective, codec.init(None, jnp.asarray(images)))
    real = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
    data = data_of(objective, real, np.arange(12) % CLASSES, NORMAL)
    moved, metrics = jax.jit(step)(state, data, jax.random.key(0))
    assert float(metrics["loss"]) > 1e-3 and float(metrics["grad_norm"]) > 1e-4
    assert all((moved.params[leaf] != state.params[leaf]).any() for leaf in ("small", "shift"))


def test_a_foreign_network_is_trained_and_tested():
    images = np.zeros((6, *SHAPE), np.float32)
    labels = np.arange(6) % CLASSES
    images[np.arange(6), labels] = 1
    found = evaluation.evaluate_networks(
        jax.random.split(jax.random.key(1), 1), images, labels, images, labels, network=network(),
        spec=evaluation.EvalSpec(steps=100, lr=0.1), augment=DsaSpec(strategy="none"),
    )  # fmt: skip
    assert found.accuracies.tolist() == [1.0]


WRONG = {
    "logits alone": (lambda p, x: network().apply(p, x)[0], r"found a (ArrayImpl|\w*Tracer)"),
    "features first": (lambda p, x: (small(x)[0], small(x)), "found a tuple of shapes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_outputs_that_are_no_logits_and_features_are_refused_by_every_user_of_a_network(name):
    apply, what = WRONG[name]
    wrong, good = network(apply), network()
    # Two images, as many as there are outputs: a batch of logits must not be taken for a pair.
    syn, real = jnp.zeros((CLASSES, 2, *SHAPE)), jnp.zeros((CLASSES, 2, *SHAPE), jnp.uint8)
    settings = {**SETTINGS, "whitening": NORMAL, "network": wrong, "class_chunk": 1}
    images, labels = jnp.zeros((2, *SHAPE)), jnp.arange(2)
    params = good.init(jax.random.key(0))
    calls = {
        "distribution": lambda: distribution_loss(jax.random.key(0), real, syn, **settings),
        "gradient": lambda: gradient_loss(jax.random.key(0), real, syn, params=params, **settings),
        "accuracy": lambda: evaluation.accuracy(params, images, labels, network=wrong),
        "train_network": lambda: evaluation.train_network(
            jax.random.key(0), images, labels, network=wrong, spec=evaluation.EvalSpec(steps=1), augment=DsaSpec()
        ),
        "label": lambda: gsdd_jax.labels.label(jax.tree.map(lambda x: x[None], params), images, network=wrong),
        "make": lambda: match.make(OBJECTIVES["trajectory"], codec=flat(), network=wrong, **SETTINGS),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=rf"^network.apply: expected a pair \(logits .*{what}"):
            call()


def test_weights_that_cannot_be_trained_and_wrong_counts_are_named():
    def with_counter(key):
        return {"net": network().init(key), "norm": {"count": jnp.zeros((), jnp.int32)}}

    counted = network(lambda p, x: network().apply(p["net"], x), with_counter)
    with pytest.raises(TypeError, match=r"network.init: \['norm'\]\['count'\] is int32; expected floating-point"):
        counted.check(SHAPE, CLASSES)
    with pytest.raises(ValueError, match="network.num_params: expected 340, as many as init returns; found 7"):
        network()._replace(num_params=7).check(SHAPE, CLASSES)
    with pytest.raises(ValueError, match="expected logits of 4 classes, found 3"):
        network().check(SHAPE, 4)


class Dense(nn.Module):
    """An ordinary Flax module, as others write it, with an embedding in place of a kernel."""

    classes: int

    @nn.compact
    def __call__(self, images):
        table = self.param("embedding", nn.initializers.normal(0.1), (math.prod(images.shape[1:]), 4))
        features = nn.relu(small(images) @ table)
        return features @ self.param("w", nn.initializers.normal(0.5), (4, self.classes)), features


class Linen(nn.Module):
    """A module as Flax users write it; `extra` is what is special about it."""

    extra: str = ""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(2, (3, 3), strides=2, name="conv")(images)
        if self.extra == "statistics":
            x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.relu(nn.Dense(5, name="hidden")(small(x)))
        if self.extra.startswith("sown"):
            self.sow("intermediates", "features", 2 * x)
        if self.extra == "sown twice":
            self.sow("intermediates", "features", x)
        x = nn.Dropout(0.5, deterministic=self.extra != "random")(x)
        if self.extra == "no dense":
            return x[:, :CLASSES]
        out = (nn.remat(nn.Dense) if self.extra == "remat" else nn.Dense)(CLASSES, name="out")
        return (out(x), small(images)) if self.extra == "pair" else out(x)


class Nnx(nnx.Module):
    """The same for nnx."""

    def __init__(self, extra: str = "", *, rngs: nnx.Rngs):
        self.extra = extra
        self.conv = nnx.Conv(1, 2, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(32, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(5, CLASSES, rngs=rngs)
        if extra == "statistics":
            self.norm = nnx.BatchNorm(2, rngs=rngs)
        if extra == "constant":
            self.shift = jnp.ones(2)

    def __call__(self, images):
        x = nnx.relu(self.hidden(small(self.conv(images))))
        if self.extra.startswith("sown"):
            self.sow(nnx.Intermediate, "features", 2 * x)
        if self.extra == "sown twice":
            self.sow(nnx.Intermediate, "features", x)
        x = self.dropout(x, deterministic=False if self.extra == "random" else None)
        if self.extra == "no dense":
            return x[:, :CLASSES]
        logits = nnx.remat(lambda out, x: out(x))(self.out, x) if self.extra == "remat" else self.out(x)
        return (logits, small(images)) if self.extra == "pair" else logits


def flax_modules(extra):
    return Linen(extra), lambda rngs: Nnx(extra, rngs=rngs)


@pytest.mark.parametrize("extra", ["", "sown", "pair"])
def test_a_module_of_linen_and_of_nnx_gives_the_logits_and_features_of_numpy(extra):
    found = [nets.build(module, SHAPE, CLASSES) for module in flax_modules(extra)]
    keys = jax.random.split(jax.random.key(0), 2)
    params = jax.vmap(found[0].init)(keys)
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(found[1].init, keys[0]))
    assert [net.num_params for net in found] == [20 + 165 + 18] * 2
    images = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    outputs = [jax.jit(jax.vmap(net.apply, (0, None)))(params, images) for net in found]

    for i in range(2):
        p = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i], np.float64), params)
        # At stride 2, "SAME" pads 8 px by one row and one column behind the last.
        padded = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))
        taps = [padded[:, i : i + 7 : 2, j : j + 7 : 2] @ p["conv"]["kernel"][i, j] for i in range(3) for j in range(3)]
        x = np.maximum(small(sum(taps)) @ p["hidden"]["kernel"], 0)
        features = {"": x, "sown": 2 * x, "pair": small(images)}[extra]
        for logits_found, features_found in outputs:
            np.testing.assert_allclose(logits_found[i], x @ p["out"]["kernel"], atol=1e-5)
            np.testing.assert_allclose(features_found[i], features, atol=1e-5)


@pytest.mark.parametrize("module", flax_modules(""), ids=["linen", "nnx"])
def test_ordinary_convolutions_are_those_that_are_fast_in_loops(module):
    net = nets.build(module, SHAPE, CLASSES)
    shapes = jax.eval_shape(net.init, jax.random.key(0)), jax.ShapeDtypeStruct((2, *SHAPE), jnp.float32)
    assert "name=_conv" in str(jax.make_jaxpr(net.apply)(*shapes))


def test_a_class_and_a_function_of_rngs_draw_by_the_initializers_of_the_module():
    by_class, by_function = (nets.build(module, SHAPE, CLASSES) for module in (Nnx, lambda r: Nnx(rngs=r)))
    linen, again = (nets.build(Linen(), SHAPE, CLASSES) for _ in range(2))
    assert linen is again and nets.build(Nnx, SHAPE, CLASSES) is by_class
    assert nets.build(by_class, SHAPE, CLASSES) is by_class
    drawn = [net.init(jax.random.key(1)) for net in (by_class, by_function, linen)]
    for a, b in zip(jax.tree.leaves(drawn[0]), jax.tree.leaves(drawn[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    for params in drawn:
        assert (params["hidden"]["bias"] == 0).all()
        np.testing.assert_allclose(params["hidden"]["kernel"].std(), 1 / math.sqrt(32), rtol=0.2)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("statistics", r"network: .* keeps (batch_stats.BatchNorm_0.mean|norm.mean) beside its weights; .*GroupNorm"),
        ("constant", "network: .* keeps shift beside its weights"),
        ("random", r"network: .* draws random numbers when it is called: [dD]ropout.*expected .*deterministic=True"),
        ("sown twice", "network: logits come alone, and 2 arrays were sown as 'features'; expected one, or"),
        ("no dense", r"network: logits come alone, and 0 arrays .* or \(logits, features\) as outputs"),
        ("remat", "network: logits come alone, and 0 arrays .* outside of remat"),
    ],
)
def test_a_module_that_is_no_function_of_weights_and_images_is_refused(extra, message):
    for module in flax_modules(extra)[extra == "constant" :]:
        with pytest.raises(ValueError, match=f"^{message}"):
            nets.build(module, SHAPE, CLASSES)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Nnx(rngs=nnx.Rngs(0)), r"this Nnx has its weights already.*such as lambda rngs: Nnx\(..., rngs=rngs\)"),
        (Linen, "expected a NetSpec, .* found the class Linen"),
        ("convnet", "expected a NetSpec, .* found 'convnet'"),
        (lambda rngs: Linen(), "expected <lambda> to return a flax.nnx module, found Linen"),
    ],
)
def test_what_is_no_network_is_refused(network, message):
    with pytest.raises(TypeError, match=f"^network: {message}"):
        nets.build(network, SHAPE, CLASSES)


@pytest.fixture
def config(monkeypatch):
    """A tiny run of the toys, registered by their names; a config file would need them in the unions of specs too."""
    monkeypatch.setitem(codecs.SPECS, "flat", FlatSpec)
    monkeypatch.setitem(nets._NETWORKS, "dense", lambda spec, shape, classes: Dense(classes))
    few = ["data.per_class=8", "data.test_limit=20", "ipc=2", "baselines.pixel=false"]
    tiny = configs.load(ROOT / "configs" / "digits.yaml", few, smoke=True)
    return dataclasses.replace(tiny, codec=FlatSpec(images_per_class=2), network=nets.NetSpec(name="dense"))


def test_a_set_of_a_foreign_codec_is_saved_read_counted_and_reported(config, tmp_path):
    experiment = experiments.prepare(config)
    codec, dataset = experiment.codec, experiment.dataset
    made = gsdd_jax.SynSet(codec, codec.init(None, jnp.ones((20, *SHAPE))), 512, dataset.class_names)
    tested = {"images": 20, "images_seen": 4, "mean": 0.5, "std": 0.0, "n": 1, "seconds": 1.0, "steps": 2}
    with RunDir(tmp_path) as run:
        sizes = made.save(tmp_path / "export")
        result = results.collect(
            experiment, {"distilled": tested}, made=made, sizes=sizes, environment=run.record_environment(), run=run,
            fit_psnr=None,
        )  # fmt: skip
    assert (gsdd_jax.load(tmp_path).images() == made.images()).all()
    # 16 pixels and a shift, four bytes each.
    assert result["accuracy"]["bytes_per_class"] == 2 * 17 * 4 and result["num_points"] is None
    assert result["budget"]["this run: 2 images of flat, float32"] == "2 images: 34 floats, 136 bytes"
    assert "| **flat, distilled** | 2 | 136 | 50.0 | 1 | 2 |" in results.table(result)
    assert "2 flat images" in report.write(tmp_path, result, {}).read_text()


@pytest.mark.parametrize(
    "layout, what",
    [
        ({"x": jax.ShapeDtypeStruct((20, 17), jnp.complex64)}, "array 'x': expected one of .*found ShapeDtypeStruct"),
        ({"x": jax.ShapeDtypeStruct((20, 16), jnp.float32)}, "expected 1280 bytes, as in its layout, found 1360 by"),
    ],
)
def test_a_codec_whose_sets_no_file_could_hold_is_refused_at_the_start(config, monkeypatch, layout, what):
    monkeypatch.setattr(FlatSpec, "layout", lambda *_: layout)
    codecs._built.cache_clear()
    with pytest.raises(ValueError, match=f"codec.name: sets of 'flat' could not be read back: {what}"):
        experiments.prepare(config)
