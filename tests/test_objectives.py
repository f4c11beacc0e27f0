"""What every objective of the registry has to keep, and one from outside: compiled once, right gradient, vmap, resume.

That several devices take the step of one is in test_parallel.py, that every codec learns in test_codecs.py.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command_line import ROOT, refused, start
from objectives import data_of

from gsdd_jax import codecs, distillation, match, parallel, schema, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.match import (
    Batch,
    DistributionSpec,
    GradientSpec,
    KernelRidgeSpec,
    MmdSpec,
    Synthetic,
    TrajectorySpec,
)
from gsdd_jax.nets import NetSpec, build

DIGITS = ROOT / "configs" / "digits.yaml"
CLASSES, SHAPE, KEY = 2, (8, 8, 1), jax.random.key(5)
ROWS = {
    "distribution": (DistributionSpec(batch_real=4, batch_syn=1), None),
    "trained networks": (
        DistributionSpec(networks="experts", cross_entropy=1.0, later_epochs=1, draws=2, batch_syn=1),
        None,
    ),
    "characteristic": (
        DistributionSpec(
            networks="experts", cross_entropy=0.5, distance="characteristic", frequencies=8, batch_real=4, augment=False
        ),
        None,
    ),
    "gradient": (GradientSpec(batch_real=4, batch_syn=1, outer_loop=2, inner_loop=1), None),
    "kernel_ridge": (
        KernelRidgeSpec(
            batch_real=4, flip=True, learn_labels=True, pool=2, net_updates=2, regularization=1e-3, label_margin=3.0
        ),
        None,
    ),
    "trajectory and MMD": (
        TrajectorySpec(syn_steps=2, expert_epochs=1, max_start_epoch=1, lr_lr=0.1),
        MmdSpec(weight=0.5, samples=2, features="expert"),
    ),
}
IMAGES = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
LABELS = np.arange(12) % CLASSES


def network_of(dtype):
    """Without a norm, so that finite differences meet few kinks; its weights in a precision of choice."""
    network = build(NetSpec(depth=1, width=3, norm="none"), SHAPE, CLASSES)
    return network._replace(
        init=lambda key: jax.tree.map(lambda x: x.astype(dtype), network.init(key)),
        apply=lambda params, images: network.apply(params, images.astype(dtype)),
    )


def make(name, *, dtype=jnp.float32):
    spec, mmd = ROWS[name]
    pixels = codecs.PixelSpec(images_per_class=2, optimizer="adam", lr=0.01)
    codec = codecs.make(pixels, image_shape=SHAPE, num_classes=CLASSES, bytes_per_class=512)
    if dtype != jnp.float32:
        codec = codec._replace(
            decode=lambda params, index=None, **_: params["images"][jnp.arange(4) if index is None else index]
        )
    return match.make(spec, codec=codec, network=network_of(dtype), augment=DsaSpec(strategy="crop"), mmd=mmd)


def start_of(objective, seed=1):
    images = np.random.default_rng(seed).uniform(size=(objective.codec.num_images, *SHAPE))
    return distillation.init_state(objective, objective.codec.init(KEY, jnp.asarray(images, jnp.float32)))


def data(objective):
    return data_of(objective, IMAGES, LABELS, whiten.MeanStd(jnp.full(1, 0.4), jnp.full(1, 0.3)))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_rows_cover_the_registry():
    assert {spec.name for spec, _ in ROWS.values()} == match.SPECS.keys()


@functools.cache
def jitted(name):
    """An objective, its jitted step and its data."""
    objective = make(name)
    return objective, jax.jit(distillation.make_step(objective)), data(objective)


@pytest.mark.parametrize("name", ROWS)
def test_a_step_compiles_once_moves_what_it_should_and_a_resumed_run_repeats_its_bits(name):
    objective, step, given = jitted(name)
    states = [start_of(objective)]
    for _ in range(3):
        state, metrics = step(states[-1], given, KEY)
        states.append(state)
    assert step._cache_size() == 1
    assert all(np.isfinite(value) and value.shape == () for value in metrics.values())
    assert bits(states[1].params) != bits(states[0].params) and int(state.step) == 3
    scalars = {name for name, value in objective.init()[0].items() if value.ndim == 0}
    assert set(metrics) >= {"loss", "regularizer", "grad_norm", "param_norm", *scalars}
    # As through a checkpoint: only arrays survive, and the key is derived afresh.
    resumed = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), states[1])
    for _ in range(2):
        resumed, _ = step(resumed, given, jax.random.key(5))
    assert bits(resumed) == bits(states[3])


@pytest.mark.parametrize("name", ROWS)
def test_the_gradient_is_that_of_finite_differences_in_float64(name):
    with jax.enable_x64(True):
        objective = make(name, dtype=jnp.float64)
        given = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, data(objective)
        )
        shard = parallel.unsharded(CLASSES)
        inside = {key: need.draw(KEY, given.held, shard) for key, need in objective.needs.items()}
        batch = Batch(given.whitening, inside | given.drawn)
        learned, carry = objective.init()
        trained = {"images": jnp.asarray(np.random.default_rng(1).uniform(size=(4, *SHAPE)))}, learned
        trained = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), trained)
        rng = np.random.default_rng(2)
        along = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), trained)
        # Its size is known only to as many digits as steps of one size can tell.
        along = along[0], jax.tree.map(lambda x: 0.01 * x, along[1])

        @jax.jit
        def both(trained):
            def value(trained):
                return objective.loss(KEY, trained[1], carry, Synthetic(objective.codec, trained[0]), batch)[0]

            return jax.value_and_grad(value)(trained)

        slope = optax.tree.vdot(both(trained)[1], along)
        size = 1e-6
        ends = [both(jax.tree.map(lambda x, d, sign=sign: x + sign * size * d, trained, along))[0] for sign in (1, -1)]
        assert abs(float(slope)) > 1e-4
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * size), rtol=2e-5)


# One that carries something and one that learns something; one that does neither is in test_api.py.
@pytest.mark.parametrize("name", ["gradient", "trajectory and MMD"])
def test_vmap_over_keys_takes_the_step_of_each(name):
    objective, step, given = jitted(name)
    keys, start = jax.random.split(KEY, 2), start_of(objective)
    plain = distillation.make_step(objective)

    @jax.jit
    @jax.vmap
    def together(key):
        """Two steps, so that what is carried from one to the next is batched as well."""
        return jax.lax.scan(lambda state, _: plain(state, given, key), start, None, length=2)

    states, metrics = together(keys)
    each = []
    for i, key in enumerate(keys):
        wanted = start
        for j in range(2):
            wanted, expected = step(wanted, given, key)
            np.testing.assert_allclose(metrics["loss"][i, j], expected["loss"], rtol=1e-4)
        each.append(wanted)
        found = jax.tree.map(lambda x, i=i: x[i], states)
        # The first step of Adam is a sign: where the gradient is as small as its rounding, anything goes.
        close = np.abs(found.params["images"] - wanted.params["images"]) < 1e-4
        assert np.mean(close) > 0.98
    assert bits(each[0].params) != bits(each[1].params)


(TOY,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add_objective.md").read_text(), re.DOTALL)


def test_an_objective_from_outside_goes_through_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_objective.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    few = ["--smoke", "objective={name: mean_image, batch_real: 4}", "baselines.full_data=false", "distill.log_every=1"]
    few += [f"baselines.{name}=false" for name in ("pixel", "fit_only", "random_real")] + ["baselines.compressed=[]"]
    few += ["codec={name: pixel}", "fit.select=random", "evaluate.seeds=1", "data.per_class=8", "data.test_limit=20"]
    assert "objective.name: expected one of distribution, " in refused(capsys, start(DIGITS, out, *few))
    assert "imports: expected a list, each text, found 'toy'" in refused(
        capsys, start(DIGITS, out, *few, "imports=toy")
    )
    (tmp_path / "broken_objective.py").write_text("this is no Python")
    broken = refused(capsys, start(DIGITS, out, *few, "imports=[broken_objective]"))
    assert "imports: expected Python modules, found 'broken_objective': SyntaxError" in broken
    few.append("imports=[toy_objective]")
    try:
        assert start(DIGITS, out, *few) == 0
    finally:
        match.SPECS.pop("mean_image", None)
        sys.modules.pop("toy_objective", None)
        schema.forget()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["phase"] == "main-distill"]
    assert [line["steps_so_far"] for line in logged] == [0, 1, 2, 3] and logged[-1]["gain"] != 1
    assert json.loads((out / "result.json").read_text())["objective"] == "mean_image"
    assert "toy_objective" in (out / "config.yaml").read_text()
