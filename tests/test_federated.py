"""Federated distillation: blocks of classes, subtasks as runs of their own, and what merges them."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import assert_same, ends, findings, refused, start

import gsdd_jax
from gsdd_jax import MergedSet, SynSet, codecs, data, labels, whiten
from gsdd_jax.codecs import DownscaleSpec, LatentSpec, PaletteSpec, PixelSpec
from train import config as configs
from train import evaluate, merge, stages
from train import experiment as experiments
from train.errors import ConfigError
from train.progress import Progress
from train.rundir import RunDir

TOY = """
name: toy
ipc: 2
data: {source: digits, per_class: 8, test_limit: 50}
network: {depth: 1, width: 4}
augment: {strategy: none}
codec: {name: gaussian, images_per_class: 2, num_points: 5, lr: 0.01}
fit: {steps: 0}
objective: {name: distribution, batch_real: 4, class_chunk: 10}
distill: {iterations: 4, log_every: 1, checkpoint_every: 2}
evaluate: {steps: 4, batch: 8, lr: 0.1, seeds: 2}
baselines: {fit_only: false, pixel: false, full_data: false}
"""


def load(toy: Path, *overrides: str) -> configs.RunConfig:
    return configs.load(toy, overrides)


# Blocks of classes


def test_blocks_are_consecutive_and_differ_by_at_most_one_class():
    for classes, count, edges in ((10, 3, [0, 3, 6, 10]), (7, 4, [0, 1, 3, 5, 7]), (3, 1, [0, 3])):
        blocks = data.class_blocks(classes, count)
        assert blocks == tuple(range(a, b) for a, b in zip(edges, edges[1:], strict=False))
    with pytest.raises(ValueError, match="subtasks: expected 1 to 10, the number of classes; found 0"):
        data.class_blocks(10, 0)


def synthetic(classes: int = 5) -> data.Dataset:
    """Images that say which they are, in an order that mixes the classes."""
    random = np.random.default_rng(0)
    train, test = (random.permutation(np.repeat(np.arange(classes, dtype=np.int32), n)) for n in (6, 3))
    images = np.arange(len(train) + len(test), dtype=np.uint8)[:, None, None, None] * np.ones((2, 2, 1), np.uint8)
    names = tuple(f"class {i}" for i in range(classes))
    return data.Dataset("toy", images[: len(train)], train, images[len(train) :], test, names)


def test_blocks_partition_a_dataset_and_keep_its_order():
    whole = synthetic()
    parts = [data.take_classes(whole, block) for block in data.class_blocks(5, 2)]
    assert [part.class_names for part in parts] == [("class 0", "class 1"), ("class 2", "class 3", "class 4")]
    assert [part.name for part in parts] == ["toy[0:2]", "toy[2:5]"]
    for split in ("train", "test"):
        images, labels = getattr(whole, f"{split}_images"), getattr(whole, f"{split}_labels")
        seen = 0
        for first, part in zip((0, 2), parts, strict=True):
            own = [i for i, label in enumerate(labels) if first <= label < first + part.num_classes]
            np.testing.assert_array_equal(getattr(part, f"{split}_images"), images[own])
            np.testing.assert_array_equal(getattr(part, f"{split}_labels"), labels[own] - first)
            assert getattr(part, f"{split}_labels").dtype == labels.dtype
            seen += len(own)
        assert seen == len(labels)


# A subtask as an experiment


def test_whitening_of_every_subtask_is_that_of_the_whole_training_set(toy):
    config = load(toy, "subtasks=5", "subtask=1")
    made, every = experiments.prepare(config), data.load(config.data)
    alone = whiten.fit("meanstd", made.dataset.train_images)
    for own, whole, of_block in zip(made.whitening, whiten.fit("meanstd", every.train_images), alone, strict=True):
        np.testing.assert_array_equal(own, whole)
        assert not np.array_equal(own, of_block)
    mean = every.train_images.mean() / 255
    np.testing.assert_allclose(made.channels.mean, [mean], rtol=1e-6)


def test_experts_are_bound_to_the_block_and_to_the_whole(toy):
    found = {
        experiments.prepare(load(toy, f"subtasks={k}", f"subtask={i}")).data_identity()
        for k, i in ((1, 0), (2, 0), (2, 1), (4, 0))
    }
    assert len(found) == 4
    few = experiments.prepare(load(toy, "subtasks=2", "data.per_class=7")).data_identity()
    block = data.take_classes(data.load(load(toy).data), range(5))
    # A dataset of just these classes is whitened by other numbers.
    assert few not in found and block.fingerprint() not in found
    assert experiments.prepare(load(toy)).data_identity() == data.load(load(toy).data).fingerprint()


def test_experts_of_subtasks_start_from_other_weights(toy, tmp_path, monkeypatch):
    trajectory = "objective={name: trajectory, syn_steps: 2, batch_syn: 10, expert_epochs: 1, max_start_epoch: 2}"
    monkeypatch.setattr(stages, "train_experts", lambda folder, images, labels, **wanted: wanted)
    seeds = []
    for k, i in ((1, 0), (3, 0), (3, 1), (3, 2)):
        made = experiments.prepare(load(toy, trajectory, "experts.seed=5", f"subtasks={k}", f"subtask={i}"))
        wanted = stages.expert_stage(made, tmp_path, progress=Progress(quiet=True))
        assert wanted["origin"].dataset == made.data_identity()
        assert wanted["origin"].num_classes == made.dataset.num_classes
        seeds.append(wanted["spec"].seed)
    assert seeds[:2] == [5, 5] and len(set(seeds)) == 3


def test_subtasks_draw_from_keys_and_seeds_of_their_own(toy):
    subtasks = [load(toy, "subtasks=3", f"subtask={i}") for i in range(3)]
    keys = {
        tuple(jax.random.key_data(experiments.run_key(config, purpose, index)).tolist())
        for config in (load(toy), *subtasks)
        for purpose in experiments.PURPOSES
        for index in (0, 1)
    }
    assert len(keys) == 4 * 2 * len(experiments.PURPOSES)
    assert len({experiments.prepare(config).host_seed for config in subtasks}) == 3
    # Without subtasks, those of every version.
    place = experiments.PURPOSES.index(purpose := experiments.PURPOSES[-1])
    before = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), place), 3)
    assert experiments.run_key(load(toy, "seed=7"), purpose, 3) == before
    assert experiments.prepare(load(toy, "seed=7")).host_seed == 7


def test_subtasks_have_directories_of_their_own(toy):
    config = load(toy, "subtasks=3", "subtask=1")
    assert experiments.run_path(load(toy)) == Path("runs/toy")
    assert experiments.run_path(config) == Path("runs/toy/subtask1")
    assert experiments.expert_path(config, Path("run")) == Path("run/experts")
    shared = load(toy, "subtasks=3", "subtask=1", "experts.path=shared")
    assert experiments.expert_path(shared, Path("run")) == Path("shared/subtask1")
    assert experiments.expert_path(load(toy, "experts.path=shared"), Path("run")) == Path("shared")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["subtasks=3", "subtask=3"], "subtask: expected a number below 3, the number of subtasks; found 3"),
        (["subtasks=11"], "subtasks: expected 1 to 10, the number of classes; found 11 .digits."),
    ],
)
def test_subtask_that_there_is_not_is_refused(toy, overrides, message):
    with pytest.raises(ConfigError, match=message):
        experiments.prepare(load(toy, *overrides))


# Sets in parts

SHAPE, BUDGET = (6, 8, 3), 1152
PALETTE, CANVASES = PaletteSpec(shared="set"), DownscaleSpec(factor=2)
# As many images as the bytes hold: more of them where more classes share the decoder.
LATENT = LatentSpec(decoder="small", width=4, latent_dim=3, dtype="bfloat16")


def part(spec, names: tuple[str, ...], budget: int = BUDGET, shape: tuple[int, int, int] = SHAPE) -> SynSet:
    """A set of some classes at the start of its fit, at stored precision."""
    codec = codecs.make(spec, image_shape=shape, num_classes=len(names), bytes_per_class=budget)
    images = np.random.default_rng(ord(names[0][0])).uniform(0, 1, (codec.num_images, *shape)).astype(np.float32)
    params = jax.jit(codec.init)(jax.random.key(ord(names[0][0])), images)
    return SynSet(codec, codec.dequantize(codec.quantize(params)), budget, names, {"of": names[0]})


# What a codec writes is tested in test_codecs.py: here, one that shares parameters between images, and one whose number
# of images depends on that of the classes.
@pytest.mark.parametrize(("spec", "shape"), [(PALETTE, SHAPE), (LATENT, (8, 8, 3))], ids=["palette", "latent"])
def test_merged_set_is_its_parts_to_the_bit(spec, shape, tmp_path):
    parts = part(spec, ("cat", "naïve 犬"), shape=shape), part(spec, ("a", "b", "c"), shape=shape)
    sizes = MergedSet(parts, {"dataset": "toy"}).save(tmp_path)
    found = gsdd_jax.load(tmp_path)
    assert isinstance(found, MergedSet) and len(found.parts) == 2
    images = np.asarray(found.images())
    np.testing.assert_array_equal(images, np.concatenate([np.asarray(one.images()) for one in parts]))
    first, second = (one.codec.images_per_class for one in parts)
    counts = [first] * 2 + [second] * 3
    assert found.labels.tolist() == [label for label, count in enumerate(counts) for _ in range(count)]
    assert found.labels.dtype == np.int32
    assert found.class_names == ("cat", "naïve 犬", "a", "b", "c") and found.bytes_per_class == BUDGET
    assert found.nbytes == sizes["payload"] == sum(one.nbytes for one in parts)
    assert found.meta == {"dataset": "toy"} and [one.meta for one in found.parts] == [{"of": "cat"}, {"of": "a"}]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") == sizes["file"]
    assert sum(path.stat().st_size for path in files if path.suffix == ".json") == sizes["manifest"]
    assert spec is not LATENT or first < second
    assert not np.array_equal(images[:first], images[2 * first : 3 * first])
    # A part is a set of its own.
    (folder,) = tmp_path.glob("part1-*")
    np.testing.assert_array_equal(gsdd_jax.load(folder).images(), parts[1].images())


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def merged() -> MergedSet:
    return MergedSet((part(CANVASES, ("a",)), part(CANVASES, ("b", "c"))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: (part(PixelSpec(), ("a",)), part(PixelSpec(), ("b",), shape=(4, 4, 3))),
            r"part 1 has images \(4, 4, 3\), part 0 has \(6, 8, 3\); expected the same",
        ),
        (
            lambda: (part(PixelSpec(), ("a", "b")), part(PixelSpec(), ("b",))),
            "parts: class 'b' is there twice; expected every class in one part",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        MergedSet(make())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("parts"), "manifest.json: parts: missing; expected a list"),
        (
            lambda m: m.update(parts=["../part0"]),
            "manifest.json: parts.0: expected text, found '../part0' .String should match",
        ),
        (lambda m: m.update(parts=m["parts"][:1] * 2), "manifest.json: parts: class 'a' is there twice"),
        (lambda m: m.update(class_names=["x", "b", "c"]), r"class_names: expected those of the parts, \['a', 'b'"),
        (
            lambda m: m.update(format="gsdd_jax merged/2"),
            "manifest.json: labels: expected labels, labels_file and labels_sha256",
        ),
        (lambda m: m.update(format="gsdd_jax merged/3"), "json: format: expected .* found 'gsdd_jax merged/3'"),
    ],
)
def test_damaged_manifest_of_a_merged_set_is_named(merged, tmp_path, change, message):
    merged.save(tmp_path)
    edit_manifest(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        gsdd_jax.load(tmp_path)


def of_all_classes(merged: MergedSet, dtype: str = "float32", top_k: int = 0) -> MergedSet:
    rows = np.random.default_rng(5).dirichlet(np.ones(3), len(merged.labels)).astype(np.float32)
    return dataclasses.replace(merged, soft=labels.pack(rows, labels.LabelSpec(dtype=dtype, top_k=top_k)))


@pytest.mark.parametrize(("dtype", "top_k"), [("float32", 0), ("uint8", 2)])
def test_labels_of_the_whole_are_read_as_they_were_written_and_counted(merged, tmp_path, dtype, top_k):
    whole = of_all_classes(merged, dtype, top_k)
    sizes = whole.save(tmp_path)
    found = gsdd_jax.load(tmp_path)
    np.testing.assert_array_equal(found.soft_labels, whole.soft_labels)
    np.testing.assert_allclose(np.sum(found.soft_labels, 1), 1, rtol=1e-6)
    each = (top_k or 3) * (np.dtype(jnp.dtype(dtype)).itemsize + bool(top_k))
    assert sizes["labels"] == each * len(merged.labels)
    assert sizes["payload"] == found.nbytes == merged.nbytes + sizes["labels"]
    on_disk = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
    assert sizes["file"] == sum(on_disk) == sizes["header"] + sizes["payload"]
    # Without them, as before.
    merged.save(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "manifest.json").read_text())["format"] == "gsdd_jax merged/1"
    assert gsdd_jax.load(tmp_path / "plain").soft_labels is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(labels_file="../x"), "labels_file: expected text, found '../x'"),
        (lambda m: m.update(labels_sha256="0" * 64), "sha256: the manifest expects 0000"),
        (lambda m: m["labels"].update(top_k=1), r"labels: .*expected .*\[6, 1\]|label_indices"),
    ],
)
def test_damaged_labels_of_the_whole_are_named(merged, tmp_path, change, message):
    of_all_classes(merged).save(tmp_path)
    edit_manifest(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        gsdd_jax.load(tmp_path)


def test_missing_parts_and_labels_are_named_and_labels_of_whole_and_part_exclude_each_other(merged, tmp_path):
    whole, first = of_all_classes(merged), merged.parts[0]
    own = labels.pack(np.ones((len(first.labels), 1)), labels.LabelSpec())
    with pytest.raises(ValueError, match="soft: parts have soft labels of their own; expected either, found both"):
        dataclasses.replace(whole, parts=(dataclasses.replace(first, soft=own), merged.parts[1]))
    whole.save(tmp_path)
    (file,), (folder,) = tmp_path.glob("labels-*.safetensors"), tmp_path.glob("part1-*")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="missing, although manifest.json is there"):
        gsdd_jax.load(tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=f"{folder}: missing, although manifest.json names it"):
        gsdd_jax.load(tmp_path)


# The command lines


class Killed(BaseException):
    """The process ends here."""


def started(where: Path, toy: Path, *arguments: str) -> int:
    """Runs train.distill in a working directory, into the default run directory."""
    with contextlib.chdir(where):
        return start(toy, None, *arguments)


def merging(*arguments) -> int:
    return ends(merge, *arguments, "--quiet")


@pytest.fixture(scope="module")
def subtasks(toy, tmp_path_factory) -> list[Path]:
    """Two finished subtasks, of which the second was killed once; read only."""
    where = tmp_path_factory.mktemp("federated")
    assert started(where, toy, "subtasks=2", "subtask=0") == 0
    append = RunDir.append

    def killed(self, phase, step, **values):
        append(self, phase, step, **values)
        if (phase, step) == ("main-distill", 3):
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunDir, "append", killed)
        started(where, toy, "subtasks=2", "subtask=1")
    failed = where / "runs" / "toy" / "subtask1"
    shutil.copytree(failed, where / "failed")
    assert started(where, toy, "subtasks=2", "subtask=1") == 0
    return [where / "runs" / "toy" / "subtask0", failed]


@pytest.fixture(scope="module")
def whole(subtasks) -> Path:
    """The run directory of both together; read only."""
    with contextlib.chdir(subtasks[0].parents[2]):
        # In any order.
        assert merging(*reversed(subtasks)) == 0
    return subtasks[0].parent / "merged"


def test_subtask_says_what_it_is_of(subtasks, toy):
    meta = gsdd_jax.load(subtasks[1]).meta
    every = data.load(load(toy).data)
    assert meta["subtask"]["classes"] == [5, 6, 7, 8, 9]
    assert (meta["subtask"]["subtasks"], meta["subtask"]["subtask"]) == (2, 1)
    assert meta["subtask"]["dataset_sha256"] == every.fingerprint() and meta["subtask"]["codec"]["num_points"] == 5
    assert meta["dataset"] == "digits[5:10]"
    # Normalization of the whole.
    np.testing.assert_allclose(meta["channel_mean"], [every.train_images.mean() / 255], rtol=1e-6)


def test_failed_subtask_run_again_alone_gives_the_same_bits(subtasks, toy, tmp_path):
    assert start(toy, tmp_path / "again", "subtasks=2", "subtask=1") == 0
    assert_same(findings(subtasks[1]), findings(tmp_path / "again"))


def test_merged_run_is_all_classes_and_its_parts_to_the_bit(subtasks, whole):
    found, parts = gsdd_jax.load(whole), [gsdd_jax.load(path) for path in subtasks]
    assert found.class_names == tuple(str(digit) for digit in range(10))
    assert found.labels.tolist() == [label for label in range(10) for _ in range(2)]
    np.testing.assert_array_equal(found.images(), np.concatenate([np.asarray(one.images()) for one in parts]))
    assert found.meta["subtasks"] == 2 and found.meta["channel_mean"] == parts[0].meta["channel_mean"]
    assert "subtask" not in found.meta and found.meta["name"] == "toy"


def test_merged_result_and_table_say_what_it_cost(subtasks, whole):
    result = json.loads((whole / "result.json").read_text())
    own = [json.loads((path / "result.json").read_text()) for path in subtasks]
    seconds = [one["seconds"] for one in own]
    assert result["subtask_seconds"] == {"sum": pytest.approx(sum(seconds)), "longest": max(seconds)}
    assert [one["accuracy"]["mean"] for one in result["subtasks"]] == [one["accuracy"]["mean"] for one in own]
    assert result["accuracy"]["n"] == 2 and result["accuracy"]["bytes_per_class"] == 2 * 5 * 7 * 2
    assert result["random_real"]["images_per_class"] == 2 and result["full_data"] is None
    assert (result["num_classes"], result["dataset"], result["gpc"]) == (10, "digits", 2)
    text = (whole / "table.md").read_text()
    assert f"{100 * result['accuracy']['mean']:.1f}" in text and "| **gaussian, distilled** | 2 | 140 |" in text
    assert "| 0 | 0 to 4 | 2 | 700 |" in text and "| 1 | 5 to 9 | 2 | 700 |" in text
    assert f"| all, one after the other | | | 1,400 | | {sum(seconds):.1f} |" in text
    assert f"| all, side by side | | | | | {max(seconds):.1f} |" in text
    assert "10 classes × 2 Gaussian images in 512 bytes per class" in (whole / "report.html").read_text()
    assert (whole / "images.png").read_bytes().startswith(b"\x89PNG")


def test_merged_set_and_subtask_are_evaluated_like_any_other(subtasks, whole, capsys):
    for run in (whole, subtasks[1]):
        assert evaluate.main(["--run", str(run), "--quiet"]) == 0
        # The same networks as those of the run itself.
        expected = json.loads((run / "result.json").read_text())["accuracy"]["accuracies"]
        assert json.loads(capsys.readouterr().out)["accuracies"] == expected


def test_merge_again_computes_nothing_and_an_interrupted_one_is_continued(subtasks, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "merged")
    monkeypatch.setattr(merge, "evaluate_stage", None)
    assert merging(*subtasks, "--out", tmp_path / "merged") == 0
    monkeypatch.undo()
    (tmp_path / "merged" / "result.json").unlink()
    table = (tmp_path / "merged" / "table.md").read_bytes()
    assert merging(*subtasks, "--out", tmp_path / "merged") == 0
    assert (tmp_path / "merged" / "table.md").read_bytes() == table


# What is named


@pytest.fixture
def copies(subtasks, tmp_path) -> list[Path]:
    """The two subtasks, to be spoiled."""
    paths = [tmp_path / path.name for path in subtasks]
    for path, copy in zip(subtasks, paths, strict=True):
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns("checkpoints"))
    return paths


def with_command(run: Path, command: str) -> None:
    """Writes how a run was started; in this process it was by pytest."""
    environment = json.loads((run / "environment.json").read_text())
    environment[0]["command"] = command
    (run / "environment.json").write_text(json.dumps(environment))


def edit_config(run: Path, before: str, after: str) -> None:
    text = (run / "config.yaml").read_text()
    assert text.count(before) == 1
    (run / "config.yaml").write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["subtask1", "subtask1"], "subtask 1 is there twice: RUN/subtask1 and RUN/subtask1; leave one of them out"),
        (["subtask0", "failed"], "RUN/failed: not finished; continue with: the command that wrote it"),
        (
            ["subtask0"],
            "missing of 2 subtasks: 1; start each by the command of RUN/subtask0, with its own subtask and --out",
        ),
        (["codec.lr=1"], "override 'codec.lr=1': the set is made already; expected a setting of name, data"),
        (
            ["labels.kind=hard"],
            "labels.kind: a merged set is labeled by a teacher of all classes; expected soft, found",
        ),
        (["data.per_class=7"], "data: other images, labels or class names than the subtasks were made from: SHA-256"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_merged_is_one_line(subtasks, tmp_path, capsys, arguments, message):
    where = subtasks[0].parent
    runs = {"subtask0": subtasks[0], "subtask1": subtasks[1], "failed": where.parents[1] / "failed"}
    given = [runs.get(argument, argument) for argument in arguments]
    line = refused(
        capsys, merging(*(given if given[0] in runs.values() else subtasks + given), "--out", tmp_path / "x")
    )
    assert message.replace("RUN/failed", str(runs["failed"])).replace("RUN", str(where)) in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("batch_real: 4", "batch_real: 5", "objective.batch_real is 4 there and 5 here; expected runs of one "),
        ('"dataset_sha256": "', '"dataset_sha256": "0', 'dataset_sha256 is "'),
    ],
)
def test_mismatch_names_the_key_and_both_values(copies, capsys, before, after, message):
    if before.startswith('"'):
        file = copies[1] / "export" / "manifest.json"
        manifest = json.loads(file.read_text())
        subtask = json.dumps(manifest["meta"]["subtask"])
        assert subtask.count(before) == 1, subtask
        manifest["meta"]["subtask"] = json.loads(subtask.replace(before, after))
        file.write_text(json.dumps(manifest))
    else:
        edit_config(copies[1], before, after)
    assert f"{copies[1]} does not belong to {copies[0]}: {message}" in refused(capsys, merging(*copies))


def test_subtasks_may_differ_in_what_follows_from_their_size_and_the_merge_in_its_tests(copies, tmp_path):
    for before, after in (
        ("num_points: 5", "num_points: 4"),
        ("log_every: 1", "log_every: 2"),
        ("name: toy", "name: a"),
    ):
        edit_config(copies[1], before, after)
    settings = ["evaluate.seeds=1", "baselines.random_real=false"]
    assert merging(*copies, *settings, "--out", tmp_path / "merged") == 0
    result = json.loads((tmp_path / "merged" / "result.json").read_text())
    assert (result["accuracy"]["n"], result["random_real"], result["name"]) == (1, None, "toy")
    assert configs.load(tmp_path / "merged" / "config.yaml").evaluate.seeds == 1


def test_run_with_a_damaged_result_is_continued_with_its_own_command(copies, capsys):
    (copies[1] / "result.json").write_text("{half")
    with_command(copies[1], "python -m train.distill --config a.yaml subtasks=2 subtask=1")
    line = refused(capsys, merging(*copies))
    assert line.endswith(
        f"{copies[1]}: not finished; continue with: python -m train.distill --config a.yaml subtasks=2 subtask=1\n"
    )


def test_what_is_no_subtask_is_named(subtasks, whole, copies, tmp_path, capsys):
    assert f"{tmp_path}: expected a run directory" in refused(capsys, merging(tmp_path))
    assert f"{whole}: subtasks: expected a run of one of several subtasks, found 1" in refused(capsys, merging(whole))
    assert "RUN: expected run directories of subtasks, found none" in refused(capsys, merging("evaluate.seeds=1"))
    file = copies[0] / "export" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["meta"]["subtask"]
    file.write_text(json.dumps(manifest))
    assert f"{copies[0]}: the exported set is not the one of a subtask" in refused(capsys, merging(*copies))


def test_one_teacher_of_all_classes_labels_the_merged_set(subtasks, tmp_path, capsys):
    relabeled = ["labels.kind=soft", "labels.teacher_steps=30", "labels.dtype=uint8", "labels.top_k=3"]
    out = tmp_path / "merged"
    assert merging(*subtasks, *relabeled, "baselines.random_real=false", "--out", out) == 0
    capsys.readouterr()
    found = gsdd_jax.load(out)
    probabilities = np.asarray(found.soft_labels)
    # The teacher knows the classes of the other subtask, as those of the subtasks do not.
    assert probabilities.shape == (20, 10) and (probabilities[:10, 5:] > 0).any() and (probabilities[10:, :5] > 0).any()
    result = json.loads((out / "result.json").read_text())
    assert result["protocol"]["labels"]["agreement"] == np.mean(probabilities.argmax(1) == found.labels) > 0.1
    assert result["accuracy"]["label_bytes_per_class"] == 2 * 6
    images = [gsdd_jax.load(path).images() for path in subtasks]
    np.testing.assert_array_equal(found.images(), np.concatenate(images))


def test_labels_of_the_whole_have_to_fit_the_budget(toy):
    # 48 pixels of 3 channels in float32 for each image: 576 bytes, two in a budget of 1,160 leave 8.
    parts = (part(PixelSpec(), ("a",), budget=1160), part(PixelSpec(), ("b", "c"), budget=1160))
    whole = MergedSet(parts)
    images, left = len(whole.labels), 3 * 1160 - whole.nbytes
    assert 0 < left < 12 * images
    with pytest.raises(ConfigError, match=f"{images} labels of 12 bytes need {12 * images} bytes.* leaves {left}"):
        merge._check_labels(load(toy, "labels.kind=soft"), whole)
    merge._check_labels(load(toy, "labels.kind=soft", "labels.dtype=uint8", "labels.top_k=1"), whole)


def test_tests_of_one_merge_do_not_stand_for_another(subtasks, copies, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "merged")
    old = gsdd_jax.load(copies[0])
    SynSet(
        old.codec,
        jax.tree.map(lambda x: x * 0.5, old.params),
        *(getattr(old, name) for name in ("bytes_per_class", "class_names", "meta")),
    ).save(copies[0] / "export")
    line = refused(capsys, merging(*copies, "--out", tmp_path / "merged"))
    assert f"{tmp_path / 'merged'} holds another set than these subtasks make: delete it" in line
