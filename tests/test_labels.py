"""Soft labels: what is written, what it costs, what networks learn from it, and whole runs with it."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from command_line import assert_same, findings, refused, start

import gsdd_jax
from gsdd_jax import SynSet, codecs, decode_numpy, labels, match, nets, training
from gsdd_jax import evaluation as library
from gsdd_jax.augment import DsaSpec
from gsdd_jax.codecs import LatentSpec, PixelSpec
from gsdd_jax.labels import LabelSpec
from gsdd_jax.nets import Network
from gsdd_jax.synset import SynSet as Exported
from train import config as configs
from train import evaluate, evaluation, labeling
from train import experiment as experiments
from train.errors import UserError
from train.progress import Progress
from train.rundir import RunDir


def soft(dtype: str = "float32", top_k: int = 0) -> LabelSpec:
    return LabelSpec(kind="soft", dtype=dtype, top_k=top_k)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def rows(n: int, k: int, sharpness: float = 3.0) -> np.ndarray:
    logits = sharpness * np.random.default_rng(n + k).normal(size=(n, k))
    return softmax(logits).astype(np.float32)


# What is written


def test_complete_float32_labels_keep_their_bits():
    p = rows(5, 7)
    packed = labels.pack(p, soft())
    assert packed.arrays["labels"].tobytes() == p.tobytes()
    assert np.asarray(packed.probabilities()).tobytes() == p.tobytes()


def test_bfloat16_labels_are_rounded_to_nearest_and_divided_by_their_sum():
    p = rows(5, 7)
    packed = labels.pack(p, soft("bfloat16"))
    rounded = p.astype(ml_dtypes.bfloat16)
    assert packed.arrays["labels"].tobytes() == rounded.tobytes()
    wide = rounded.astype(np.float64)
    expected = (wide / wide.sum(1, keepdims=True)).astype(np.float32)
    assert np.asarray(packed.probabilities()).tobytes() == expected.tobytes()


def test_steps_of_uint8_are_those_worked_out_by_hand():
    # 127.5, 76.5 and 51 steps: of two equal remainders the lower class gets the step that is left.
    packed = labels.pack(np.array([[0.5, 0.3, 0.2]]), soft("uint8"))
    assert packed.arrays["labels"].tolist() == [[128, 76, 51]]
    np.testing.assert_allclose(packed.probabilities(), [[128 / 255, 76 / 255, 51 / 255]], rtol=1e-7)


@pytest.mark.parametrize("sharpness", [3.0, 0.01])
def test_steps_of_uint8_add_up_to_255_and_none_is_off_by_one(sharpness):
    p = rows(20, 1000, sharpness)
    codes = labels.pack(p, soft("uint8")).arrays["labels"]
    assert (codes.sum(1, dtype=np.int64) == 255).all()
    assert np.abs(codes - 255 * p.astype(np.float64)).max() < 1


def test_top_k_keeps_the_largest_in_falling_order_and_spreads_the_rest_evenly():
    packed = labels.pack(np.array([[0.125, 0.5, 0.0625, 0.25, 0.0625]], np.float32), soft(top_k=2))
    assert packed.arrays["label_indices"].tolist() == [[1, 3]] and packed.arrays["labels"].tolist() == [[0.5, 0.25]]
    np.testing.assert_allclose(packed.probabilities(), [[1 / 12, 0.5, 1 / 12, 0.25, 1 / 12]], rtol=1e-7)
    # In steps: 102, 63.75 and, unwritten, 89.25, which are shared out too. Of equals, the lower classes.
    packed = labels.pack(np.array([[0.1, 0.4, 0.05, 0.25, 0.2]]), soft("uint8", top_k=2))
    assert packed.arrays["labels"].tolist() == [[102, 64]]
    np.testing.assert_allclose(packed.probabilities()[0], np.array([89 / 3, 102, 89 / 3, 64, 89 / 3]) / 255, rtol=1e-6)
    assert labels.pack(np.full((1, 4), 0.25), soft(top_k=2)).arrays["label_indices"].tolist() == [[0, 1]]


def test_codes_of_uint4_are_those_worked_out_by_hand():
    # 15 times the roots of 1, 1/4, 1/10 and 1/400 are 15, 7.5 (to even), 4.74 and 0.75; the last half byte is empty.
    packed = labels.pack(
        np.array([[0.2, 0.8, 0, 0], [0.08, 0.8, 0.002, 0.118]])[:, [1, 0, 2]] / [[1], [0.882]], soft("uint4")
    )
    assert packed.arrays["labels"].tolist() == [[0xF8, 0x00], [0xF5, 0x10]]
    np.testing.assert_allclose(
        packed.probabilities(), [[225 / 289, 64 / 289, 0], [225 / 251, 25 / 251, 1 / 251]], rtol=1e-6
    )


@pytest.mark.parametrize("spec", [soft("bfloat16"), soft("uint8"), soft("float32", 3), soft("bfloat16", 3)])
def test_what_is_read_sums_to_one_and_is_near_what_was_labeled(spec):
    p = rows(30, 12)
    read = np.asarray(labels.pack(p, spec).probabilities(), np.float64)
    np.testing.assert_allclose(read.sum(1), 1, atol=1e-6)
    kept = np.argsort(-p, 1)[:, :3]
    difference = np.take_along_axis(read - p, kept, 1)
    assert np.abs(difference).max() < {"float32": 1e-6, "bfloat16": 2**-8, "uint8": 1 / 255}[spec.dtype]


@pytest.mark.parametrize(
    ("spec", "k", "expected"),
    [
        (LabelSpec(), 10, 0),
        (soft(), 10, 6 * 10 * 4),
        (soft("bfloat16"), 10, 6 * 10 * 2),
        (soft("uint8"), 10, 6 * 10),
        (soft("float32", 3), 256, 6 * 3 * (4 + 1)),
        (soft("float32", 3), 257, 6 * 3 * (4 + 2)),
        (soft("uint8", 5), 1000, 6 * 5 * (1 + 2)),
        (soft("uint4"), 7, 6 * 4),
    ],
)
def test_bytes_are_those_counted_by_hand_and_those_of_the_arrays(spec, k, expected):
    assert labels.nbytes(spec, 6, k) == expected
    if spec.kind == "soft":
        assert labels.pack(rows(6, k), spec).nbytes == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: labels.nbytes(soft(top_k=4), 1, 4),
            r"labels.top_k: expected 0 \(all\) to 3 with 4 classes and .*float32, found 4",
        ),
        (
            lambda: labels.nbytes(soft("uint4", 2), 1, 4),
            r"top_k: expected 0 \(all\) with 4 classes and labels.dtype=uint4, found 2",
        ),
        (lambda: labels.nbytes(soft(top_k=1), 1, 65537), r"labels.top_k: expected 0 \(all\) with 65537 classes"),
        (lambda: labels.pack(np.ones(2) / 2, soft()), r"probabilities: shape \(2,\), must be \[n, k\]"),
        (lambda: labels.pack(np.array([[0.7, 0.5]]), soft()), "labels: row 0: .* with sum 1, found the sum 1.2"),
        (lambda: labels.pack(np.array([[1.5, -0.5]]), soft()), "labels: row 0: .* found a negative number or NaN"),
        (lambda: labels.pack(np.array([[np.nan, 0.5]]), soft()), "labels: row 0: .* found a negative number or NaN"),
        (lambda: labels.label({}, jnp.zeros((0, 2, 3, 1)), network=LINEAR), r"images: found float32 of shape \[0, 2"),
        (lambda: train(jnp.zeros((3, 5))), "labels: 5 classes, the network has 4"),
        (lambda: train(jnp.zeros((3, 4), int)), "labels: int32, must be floating point where there is a row per image"),
        (lambda: train(jnp.zeros((2, 4))), r"labels: shape \(2, 4\), must be \(3,\), one per image"),
    ],
)
def test_labels_that_cannot_be_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def train(rows):
    spec = library.EvalSpec(steps=1)
    training.train_network(jax.random.key(0), jnp.zeros((3, 2, 3, 1)), rows, network=LINEAR, spec=spec, augment=PLAIN)


# The teacher

LINEAR = Network(
    init=lambda key: {"w": jax.random.normal(key, (6, 4))},
    apply=lambda params, x: (x.reshape(len(x), -1) @ params["w"], x),
    num_params=24,
)


LINEAR_OF_16 = LINEAR._replace(init=lambda key: {"w": jax.random.normal(key, (16, 3))}, num_params=48)


def test_labels_are_the_mean_softmax_of_the_teachers_whatever_the_batch():
    rng = np.random.default_rng(0)
    images, weights = rng.uniform(size=(7, 2, 3, 1)), rng.normal(size=(2, 6, 4))
    seen = (images - 0.5).reshape(7, 6)
    expected = np.mean([softmax(seen @ w / 0.5) for w in weights], 0)
    found = [
        labels.label(
            {"w": jnp.asarray(weights, jnp.float32)},
            jnp.asarray(images, jnp.float32),
            network=LINEAR,
            temperature=0.5,
            whitening=jax.tree_util.Partial(lambda shift, x: x - shift, jnp.float32(0.5)),
            batch=batch,
        )
        for batch in (3, 500)
    ]
    for probabilities in found:
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_only_labels_whose_best_class_is_another_move_toward_their_own():
    p = np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]], np.float32)
    found = labels.toward_class(jnp.asarray(p), jnp.array([0, 2]), 0.75)
    np.testing.assert_allclose(found, [[0.6, 0.3, 0.1], [0.15, 0.075, 0.775]], rtol=1e-6)


def test_rows_come_back_as_the_nearest_probabilities():
    rows = jnp.array([[1.5, 0.5, 0.1], [0.4, 0.4, 0.0], [0.2, 0.5, 0.3]])
    # By hand: what is left positive is shifted alike until the sum is 1.
    np.testing.assert_allclose(
        labels.onto_simplex(rows), [[1, 0, 0], [7 / 15, 7 / 15, 1 / 15], [0.2, 0.5, 0.3]], atol=1e-6
    )


def learning(target: np.ndarray):
    """Makes objectives that learn labels: one step of theirs leads to a target, rows of any numbers."""

    def make(*arguments, **settings):
        def loss(key, learned, carry, synthetic, batch):
            return jnp.sum((learned["labels"] - target) ** 2), {}, carry

        return match_make(*arguments, **settings)._replace(
            loss=loss,
            init=lambda: ({"labels": jnp.eye(3)}, ()),
            optimizer=lambda: optax.sgd(0.5),
            project=lambda learned: {"labels": labels.onto_simplex(learned["labels"])},
        )

    match_make = match.make
    return make


def test_labels_that_an_objective_learns_end_in_the_set_within_its_budget(monkeypatch, tmp_path):
    target = np.array([[1.5, 0.5, 0.5], [0.1, 0.8, 0.1], [-1, 0.5, 0.5]])
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8)
    settings = {"codec": PixelSpec(), "bytes_per_class": 66, "network": LINEAR_OF_16, "steps": 1, "progress": False}
    learned = LabelSpec(kind="soft", teacher="learned", dtype="uint4")
    arguments = jax.random.key(0), images, np.arange(6) % 3
    with pytest.raises(ValueError, match="labels: the objective distribution learns no labels; expected another"):
        gsdd_jax.distill(*arguments, label_spec=learned, **settings)
    monkeypatch.setattr(match, "make", learning(target))
    with pytest.raises(ValueError, match="learns labels; expected kind=soft and teacher=learned, found kind=hard"):
        gsdd_jax.distill(*arguments, **settings)
    found = gsdd_jax.distill(*arguments, label_spec=learned, **settings)
    # An image of 64 bytes and a label of two for each class. 15 sqrt(1/8) = 5.3.
    assert found.save(tmp_path)["payload"] == 3 * found.bytes_per_class == 3 * 66
    assert found.soft.arrays["labels"].tolist() == [[0xF0, 0x00], [0x5F, 0x50], [0x0F, 0xF0]]
    np.testing.assert_array_equal(gsdd_jax.load(tmp_path).soft_labels, found.soft_labels)


# Training on soft labels

PLAIN = DsaSpec(strategy="none")


def test_cross_entropy_of_soft_labels_and_its_gradient_are_those_of_float64():
    rng = np.random.default_rng(1)
    logits, p = rng.normal(size=(6, 5)), rows(6, 5).astype(np.float64)
    value, grad = jax.value_and_grad(lambda x: nets.cross_entropy(x, jnp.asarray(p)).mean())(
        jnp.asarray(logits, jnp.float32)
    )
    assert float(value) == pytest.approx(-np.mean(np.sum(p * np.log(softmax(logits)), 1)), rel=1e-6)
    np.testing.assert_allclose(grad, (softmax(logits) * p.sum(1, keepdims=True) - p) / 6, atol=1e-7)


def test_one_hot_labels_train_as_hard_ones_do():
    images = jnp.asarray(np.random.default_rng(2).uniform(size=(8, 2, 3, 1)), jnp.float32)
    hard = jnp.arange(8) % 4
    settings = {"network": LINEAR, "spec": library.EvalSpec(steps=20, batch=4, lr=0.1), "augment": PLAIN}
    trained = [
        training.train_network(jax.random.key(0), images, one, **settings) for one in (hard, jax.nn.one_hot(hard, 4))
    ]
    np.testing.assert_allclose(trained[1]["w"], trained[0]["w"], atol=1e-6)
    assert not np.allclose(trained[0]["w"], LINEAR.init(jax.random.split(jax.random.key(0), 3)[0])["w"], atol=1e-3)


# The budget


def make(spec, label_spec, bytes_per_class, shape=(8, 8, 1), classes=10):
    budget = {"image_shape": shape, "num_classes": classes, "bytes_per_class": bytes_per_class}
    return codecs.make(spec, **budget, label_bytes=labels.nbytes(label_spec, 1, classes))


def test_pixels_and_their_labels_fill_the_budget():
    # 256 + 40 bytes each: 3 in 1024 bytes, where 4 would fit without labels.
    assert make(PixelSpec(), LabelSpec(), 1024).images_per_class == 4
    assert make(PixelSpec(), soft(), 1024).images_per_class == 3
    assert make(PixelSpec(), soft(), 888).images_per_class == 3
    assert make(PixelSpec(), soft(), 887).images_per_class == 2


def test_latents_beside_a_shared_decoder_give_way_to_labels():
    spec = LatentSpec(decoder="small", width=4, latent_dim=3)
    decoder = make(dataclasses.replace(spec, images_per_class=1), LabelSpec(), 10**5).layout()
    shared = 4 * sum(int(np.prod(leaf.shape)) for name, leaf in decoder.items() if "mean" not in name)
    shared -= 4 * 10 * 3  # log-variances
    # Mean and log-variance, 24 bytes, and a label of 20 bytes: 44 per latent.
    available = -(-(shared + 10 * 44 * 7) // 10)
    assert make(spec, soft("bfloat16"), available).images_per_class == 7
    assert make(spec, soft("bfloat16"), available - 1).images_per_class == 6


# The file


def labeled(spec: LabelSpec) -> SynSet:
    codec = make(PixelSpec(images_per_class=2), spec, 2000, shape=(4, 4, 1), classes=3)
    images = np.random.default_rng(3).uniform(size=(6, 4, 4, 1)).astype(np.float32)
    return SynSet(codec, codec.init(None, images), 2000, ("a", "b", "c"), {}, labels.pack(rows(6, 3), spec))


@pytest.mark.parametrize("spec", [soft(), soft("bfloat16"), soft("uint8", 2), soft("uint4")])
def test_labels_come_back_from_the_file_and_are_part_of_its_bytes(spec, tmp_path):
    made = labeled(spec)
    sizes = made.save(tmp_path)
    read = gsdd_jax.load(tmp_path)
    np.testing.assert_array_equal(read.soft_labels, made.soft_labels)
    assert read.soft_labels.dtype == jnp.float32 and read.soft_labels.shape == (6, 3)
    np.testing.assert_array_equal(decode_numpy.load(tmp_path).soft_labels, made.soft_labels)
    assert sizes["payload"] == made.nbytes == read.nbytes == 6 * 64 + sizes["labels"]
    assert sizes["labels"] == labels.nbytes(spec, 6, 3)
    assert (tmp_path / "synset.safetensors").stat().st_size == sizes["payload"] + sizes["header"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["labels"] == {"kind": "soft", "dtype": spec.dtype, "top_k": spec.top_k}
    assert read.save(tmp_path / "again") == sizes
    for name in ("synset.safetensors", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("spec", "damage", "message"),
    [
        (
            soft(),
            {"kind": "soft", "dtype": "float16", "top_k": 0},
            "labels.dtype: expected one of float32, bfloat16, uint8, uint4, found ",
        ),
        (
            soft(),
            {"kind": "soft", "dtype": "float32", "top_k": 3},
            r"labels.top_k: expected 0 \(all\) to 2 with 3 classes",
        ),
        (
            soft(),
            {"kind": "soft", "dtype": "float32", "top_k": True},
            "labels.top_k: expected an integer >= 0, found true",
        ),
        (soft(), None, "labels: expected nothing, found float32"),
        (
            soft(),
            {"kind": "soft", "dtype": "uint8", "top_k": 2},
            r"label_indices: expected uint8\[6, 2\], found nothing",
        ),
        (soft(), ("labels", np.nan), "labels: row 0: .* found a negative number or NaN"),
        (soft("uint8"), ("labels", 255), "labels: row 0: expected probabilities with sum 1, found the sum"),
        (soft("uint4"), ("labels", 0xEE), "labels: row 0: expected 3 codes of 4 bits, the largest 15, found"),
        (soft("uint8", 2), ("label_indices", 3), "label_indices: row 0: expected different classes of 0 to 2, found"),
        (soft("uint8", 2), ("label_indices", "twice"), "label_indices: row 0: expected different classes of 0 to 2"),
    ],
)
def test_damaged_labels_and_manifests_that_do_not_describe_them_are_refused(spec, damage, message, tmp_path):
    made = labeled(spec)
    if isinstance(damage, tuple):
        array = made.soft.arrays[damage[0]]
        array[0, 0] = array[0, 1] if damage[1] == "twice" else damage[1]
    made.save(tmp_path)
    if not isinstance(damage, tuple):
        manifest = json.loads((tmp_path / "manifest.json").read_text()) | {"labels": damage}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        gsdd_jax.load(tmp_path)


# Whole runs

TOY = """
name: toy
ipc: 1
data: {source: digits, per_class: 8, test_limit: 50}
network: {depth: 1, width: 4}
augment: {strategy: none}
codec: {name: downscale, factor: 2, dtype: bfloat16}
labels: {kind: soft, dtype: uint8, top_k: 4, teachers: 2, teacher_steps: 3}
fit: {steps: 1}
objective: {name: distribution, batch_real: 4}
distill: {iterations: 0}
evaluate: {steps: 2, batch: 16, seeds: 1}
baselines: {pixel_codec: {dtype: bfloat16}, full_data: false, random_real: false, hard_labels: false}
"""


def test_run_counts_labels_in_every_row_that_has_them(whole):
    result = json.loads((whole / "result.json").read_text())
    # Four images to a canvas of 128 bytes, each with a label of 8: two canvases would fit without labels.
    size = {"accuracy": (128 + 32, 32), "fit_only": (160, 32), "pixel": (128 + 8, 8)}
    for name, (whole_size, of_labels) in size.items():
        row = result[name]
        assert (row["bytes_per_class"], row["label_bytes_per_class"]) == (whole_size, of_labels), name
        assert whole_size <= result["bytes_per_class"] == 256
        # Two steps on all images, or on 16 at most.
        assert row["images_seen"] == 2 * min(16, 10 * row["images_per_class"])
        per_image = row["training_flops"] / row["images_seen"]
        assert per_image == result["accuracy"]["training_flops"] / result["accuracy"]["images_seen"] > 0, name
    assert result["budget"]["of these, labels (bytes)"] == 320
    assert 0 <= result["protocol"]["labels"]["agreement"] <= 1
    assert "| 4 | 160, labels 32 |" in (whole / "table.md").read_text()
    report = (whole / "report.html").read_text()
    assert "160<small>labels 32</small>" in report
    assert f"<small>{result['accuracy']['training_flops'] / 1e12:.3g} TFLOP</small>" in report


def test_exported_labels_are_the_mean_of_the_teachers_on_the_exported_images(whole, toy):
    exported = gsdd_jax.load(whole)
    experiment = experiments.prepare(configs.load(toy))
    with RunDir(whole) as run:
        label = labeling.label_stage(experiment, experts=None, run=run, progress=Progress(quiet=True))
    again = label(exported.images())
    for name, array in again.arrays.items():
        np.testing.assert_array_equal(exported.soft.arrays[name], array)
    assert exported.meta["labels"]["teachers"] == 2


def test_continued_run_has_the_bits_of_an_undisturbed_one_and_trains_no_teacher_again(
    toy, whole, tmp_path, monkeypatch
):
    trained = []
    train_network = library.train_network

    real = experiments.prepare(configs.load(toy)).dataset.train_images

    def count(key, images, *arguments, **settings):
        np.testing.assert_array_equal(images, real)
        trained.append(len(trained))
        return train_network(key, images, *arguments, **settings)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(library, "train_network", count)
        patch.setattr(Exported, "save", interrupt)
        assert start(toy, tmp_path / "run") == 130
    assert len(trained) == 2
    with monkeypatch.context() as patch:
        patch.setattr(labeling.evaluation, "train_network", count)
        assert start(toy, tmp_path / "run") == 0
    assert len(trained) == 2
    assert_same(findings(tmp_path / "run"), findings(whole))


@pytest.fixture
def answers(monkeypatch):
    """Replaces training: the labels of each call are recorded, accuracies are 0.5."""
    seen = []

    def fake(keys, images, labels, *_, **settings):
        seen.append(np.asarray(labels))
        return library.Tested(np.full(len(keys), 0.5, np.float32), np.zeros((len(keys), 10), np.int32))

    monkeypatch.setattr(library, "evaluate_networks", fake)
    return seen


def test_every_row_has_the_same_labels_and_is_tested_with_hard_ones_too(toy, tmp_path, answers):
    out = tmp_path / "run"
    assert start(toy, out, "baselines.random_real=true", "baselines.hard_labels=true") == 0
    result = json.loads((out / "result.json").read_text())
    for name in ("accuracy", "fit_only", "pixel", "random_real"):
        assert (result[name]["labels"], result[name]["hard_labels"]["labels"]) == ("soft", "hard"), name
    assert [one.ndim for one in answers] == [2] * 4 + [1] * 4
    # Of random real images at the same precision: four in steps of 1/255, the others alike.
    steps = 255 * np.sort(answers[3], 1)[:, -4:]
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    # As many images as fit without labels.
    assert answers[3].shape == (20, 10) and np.ptp(np.sort(answers[3], 1)[:, :6], 1).max() == 0
    assert (result["random_real"]["bytes_per_class"], result["random_real"]["label_bytes_per_class"]) == (272, 16)
    assert "steps each | TFLOP each | with hard labels, % |" in (out / "table.md").read_text()


def test_evaluation_of_a_run_trains_on_its_soft_labels_and_on_hard_ones(whole, tmp_path, answers):
    out = tmp_path / "out.json"
    settings = ["--quiet", "--out", str(out), "--networks", "convnet"]
    assert evaluate.main(["--run", str(whole), *settings, "baselines.hard_labels=true"]) == 0
    soft_ones, hard_ones = answers
    np.testing.assert_array_equal(soft_ones, gsdd_jax.load(whole).soft_labels)
    np.testing.assert_array_equal(hard_ones, np.repeat(np.arange(10), 4))
    entry = json.loads(out.read_text())["networks"]["convnet"]
    assert entry["mean"] == entry["hard_labels"]["mean"] == 0.5


def test_tests_while_distilling_train_on_soft_labels(toy, tmp_path, monkeypatch):
    experiment = experiments.prepare(configs.load(toy, ["evaluate.protocol=paper"]))
    p, given = rows(40, 10), []

    class SeenError(Exception):
        pass

    def record(*_, labels, **others):
        given.append(labels)
        raise SeenError

    monkeypatch.setattr(evaluation, "evaluate_stage", record)
    monkeypatch.setattr(evaluation, "as_stored", lambda codec, params: jnp.zeros((40, 8, 8, 1)))
    state = types.SimpleNamespace(params=None, learned={"labels": p})
    with RunDir(tmp_path / "run") as run:
        tests = evaluation.PeriodicTests(
            experiment,
            experiment.codec,
            "distilled",
            4,
            label=lambda images, learned: labels.pack(learned["labels"], soft()),
            run=run,
            progress=Progress(quiet=True),
        )
        with pytest.raises(SeenError):
            tests.test(4, state)
    np.testing.assert_array_equal(given, [p])


def test_experts_label_with_the_last_epoch_that_the_objective_uses(toy, tmp_path):
    settings = ["objective={name: trajectory, max_start_epoch: 3}", "labels.teacher=experts", "experts.count=2"]
    experiment = experiments.prepare(configs.load(toy, settings))
    p, asked = experiment.network.num_params, []

    def row(index, epoch):
        asked.append((index, epoch))
        return np.random.default_rng(index).normal(scale=0.3, size=p).astype(np.float32)

    with RunDir(tmp_path / "run") as run:
        experts = types.SimpleNamespace(row=row)
        label = labeling.label_stage(experiment, experts=experts, run=run, progress=Progress(quiet=True))
    # Starts up to epoch 2 and spans 2.
    assert asked == [(0, 4), (1, 4)]
    images = jnp.asarray(experiment.dataset.train_images[:6], jnp.float32) / 255
    seen = (np.asarray(images) - np.asarray(experiment.whitening.mean)) / np.asarray(experiment.whitening.std)
    unflatten = labeling.flattener(experiment.network)[1]
    apply = jax.jit(lambda theta, x: experiment.network.apply(unflatten(theta), x)[0])
    logits = [apply(row(i, 4), jnp.asarray(seen)) for i in range(2)]
    expected = np.mean([softmax(np.asarray(one, np.float64)) for one in logits], 0)
    found = label(images)
    for values, indices, whole_row in zip(*found.arrays.values(), expected, strict=True):
        values, indices = (values, indices) if values.max() > 9 else (indices, values)
        np.testing.assert_allclose(values / 255, whole_row[indices], atol=1.01 / 255)


def test_diverged_teacher_is_named_with_the_way_out(toy, tmp_path):
    experiment = experiments.prepare(configs.load(toy, ["evaluate.lr=1e30"]))
    with (
        RunDir(tmp_path / "run") as run,
        pytest.raises(UserError, match=r"labels: teacher 0 diverged at evaluate.lr=1e\+30; try a lower one"),
    ):
        labeling.label_stage(experiment, experts=None, run=run, progress=Progress(quiet=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["labels.teacher=experts"], "or interpolated, has experts, found 'distribution'; expected train"),
        (["labels.teacher=learned"], "labels: the objective distribution learns no labels; expected another teacher"),
        (
            ["labels.teacher=experts", "objective={name: trajectory}", "experts.count=1"],
            "labels.teachers: expected at most experts.count = 1, found 2",
        ),
        (["labels.top_k=10"], "labels.top_k: expected 0 (all) to 9 with 10 classes and labels.dtype="),
        (["labels.top_k=0", "labels.dtype=float32"], "expected labels of at most 32 bytes"),
        (
            ["baselines.pixel_codec.dtype=float32"],
            "baselines.pixel_codec: labels: 2640 bytes for images_per_class=1 and 10 labels of 8 bytes",
        ),
        (["labels.temperature=0"], "labels.temperature: expected a number > 0, found 0"),
    ],
)
def test_settings_that_contradict_are_refused_before_anything_is_computed(settings, message, toy, tmp_path, capsys):
    assert message in refused(capsys, start(toy, tmp_path / "run", *settings))
    assert not (tmp_path / "run").exists()
