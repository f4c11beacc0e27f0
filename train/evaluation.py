"""The tests of a run: fresh networks on every arm's images, and the field's habit of testing while distilling."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import codecs, distillation, evaluation, pixels
from train import compressed, stopping
from train.checkpoint import Checkpoints
from train.errors import DivergedError, UserError
from train.experiment import Experiment, random_codec, real_images
from train.labeling import Labeler, probabilities
from train.progress import Progress
from train.rundir import RunDir, write_json

EVALUATION = "evaluation.json"
# Of images: soft labels [n, k], or [n]; None where the order says all, as many of each class.
Labels = jax.Array | np.ndarray | None


def evaluate_stage(
    experiment: Experiment,
    arm: str,
    images: jax.Array | None,
    *,
    run: RunDir,
    progress: Progress,
    labels: Labels | Callable[[jax.Array], Labels] = None,
    test: str = "",
    seeds: Sequence[int] = (),
    lr: float | None = None,
    iteration: int | None = None,
) -> dict[str, Any]:
    """Trains fresh networks on an arm's images and tests them; finished networks are kept in evaluation.json.

    Args:
        experiment: The experiment.
        arm: Row of the table. ``random_real``, ``same_number`` and random compressed images are drawn anew for each
            network; ``full_data`` takes the training set.
        images: ``[n, h, w, c]`` class-major images in [0,1], for the other arms.
        run: Run directory.
        progress: Progress bars.
        labels: Of the images, or what gives images theirs.
        test: Name of the test where an arm has several; that of the arm if empty.
        seeds: Of the networks; 0, 1, ... as config.evaluate says if empty.
        lr: Learning rate in place of that of config.evaluate.
        iteration: Outer steps that the images are from, where a run that is extended has others later.

    Returns:
        ``{"mean", "std", "n", "seeds", "per_class", "balanced", "accuracies", "seconds", "images", "labels", "steps",
        "images_seen", "lr"}``, where ``images_seen`` counts those of all steps of one network, and ``labels`` is hard
        or soft.
    """
    config, dataset = experiment.config, experiment.dataset
    spec, test = evaluation_spec(experiment, arm), test or arm
    seeds = seeds or range(spec.seeds)
    path, known = run.path / EVALUATION, known_tests(run)
    entry = known.get(test, {})
    if not entry or entry.get("iteration") != iteration:
        entry = known[test] = {"accuracies": {}, "seconds": 0.0}
        entry |= {} if iteration is None else {"iteration": iteration}
    left = [seed for seed in seeds if str(seed) not in entry["accuracies"]]
    files = compressed.ARMS.get(arm)
    # Tests of a row have one quality.
    chosen = known.get(arm, entry)
    if left and files is not None and "quality" not in chosen:
        tried = chosen.setdefault("qualities", {})
        with progress.phase(f"quality {arm}", total=len(config.baselines.compressed_qualities), done=len(tried)) as bar:

            def keep() -> None:
                write_json(path, known)
                stopping.raise_if_requested()
                bar.advance(1)

            chosen["quality"] = compressed.choose_quality(experiment, files, spec, tried, keep)
    # Each network of random real images has a training set of its own.
    together = 1 if arm.startswith("random_") or arm == "same_number" else spec.parallel
    with progress.phase(f"test {test}", total=len(seeds), done=len(seeds) - len(left)) as bar:
        for group in (left[i : i + together] for i in range(0, len(left), together)):
            began = time.perf_counter()
            if files is None:
                training = _training_set(experiment, arm, images, labels, group[0])
            else:
                training, size = compressed.training_set(
                    experiment, dataset, files, chosen["quality"], group[0] if files.select == "random" else 0
                )
                if callable(labels) and (given := labels(pixels.as_float(training[0]))) is not None:
                    training = training[0], jnp.asarray(given)
                entry["bytes_per_class"] = max(size, entry.get("bytes_per_class", 0))
            tested = evaluation.evaluate_networks(
                jnp.stack([experiment.key("evaluate", seed) for seed in group]),
                *training,
                jnp.asarray(dataset.test_images),
                jnp.asarray(dataset.test_labels),
                network=experiment.network,
                spec=spec,
                augment=config.augment,
                whitening=experiment.whitening,
                lr=lr,
            )
            for seed, accuracy, hits in zip(group, *map(np.asarray, tested), strict=True):
                if not np.isfinite(accuracy):
                    rate = spec.lr if lr is None else lr
                    raise DivergedError(
                        f"test {test}: network {seed} diverged at a learning rate of {rate:g}; what was distilled is "
                        f"kept: python -m train.evaluate --run {run.path} evaluate.lr=... tests it"
                    )
                entry["accuracies"][str(seed)] = float(accuracy)
                entry.setdefault("hits", {})[str(seed)] = hits.tolist()
            entry["seconds"] += time.perf_counter() - began
            entry["images"] = len(training[0])
            entry["labels"] = "hard" if training[1].ndim == 1 else "soft"
            write_json(path, known)
            stopping.raise_if_requested()
            bar.advance(len(group), f"accuracy {100 * float(np.mean(list(entry['accuracies'].values()))):.1f} %")
    values = [entry["accuracies"][str(seed)] for seed in seeds]
    steps = spec.num_steps(entry["images"])
    # Networks that were tested before this was counted do not know it.
    hits = [entry.get("hits", {}).get(str(seed)) for seed in seeds]
    counts = np.bincount(dataset.test_labels, minlength=dataset.num_classes)
    return {
        **evaluation.summarize(values, seeds),
        **({} if None in hits else evaluation.summarize_classes(hits, counts)),
        "accuracies": values,
        "seconds": entry["seconds"],
        "images": entry["images"],
        # Tests of before may not know it.
        **({"labels": entry["labels"]} if "labels" in entry else {}),
        "steps": steps,
        "images_seen": steps * min(spec.batch, entry["images"]),
        "lr": spec.lr if lr is None else lr,
        **{key: entry[key] for key in ("quality", "qualities", "bytes_per_class") if key in entry},
    }


def known_tests(run: RunDir) -> dict[str, Any]:
    """Reads the networks that a run has tested, by arm.

    Raises:
        UserError: The file is damaged.
    """
    path = run.path / EVALUATION
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it and run the same command again; networks will be tested anew"
        ) from error


def _training_set(
    experiment: Experiment,
    arm: str,
    images: jax.Array | None,
    labels: Labels | Callable[[jax.Array], Labels],
    seed: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns images and labels that a network is trained on."""
    dataset = experiment.dataset
    if arm == "full_data":
        return jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    if arm == "random_real":
        codec = random_codec(experiment)
        real = real_images(experiment, codec, purpose="random_real", how="random", index=seed)
        images = as_stored(codec, codec.init(experiment.key("start"), real))
    if arm == "same_number":
        images = real_images(experiment, experiment.codec, purpose="same_number", how="random", index=seed)
    assert images is not None
    labels = labels(images) if callable(labels) else labels
    if labels is not None:
        return images, jnp.asarray(labels)
    return images, jnp.repeat(jnp.arange(dataset.num_classes, dtype=jnp.int32), len(images) // dataset.num_classes)


def evaluation_spec(experiment: Experiment, arm: str) -> evaluation.EvalSpec:
    """Returns the training recipe of an arm: the same for all, but for the full data where the config says so."""
    spec, baselines = experiment.config.evaluate.training(), experiment.config.baselines
    if arm != "full_data":
        return spec
    return dataclasses.replace(
        spec, steps=baselines.full_data_steps or spec.steps, seeds=baselines.full_data_seeds or spec.seeds
    )


def evaluation_lr(experiment: Experiment, state: distillation.State) -> float | None:
    """Returns the learning rate that a distilled set brings along, if the config asks for it."""
    if experiment.config.evaluate.lr_from == "syn_lr" and "syn_lr" in state.learned:
        return float(state.learned["syn_lr"])
    return None


class PeriodicTests:
    """Tests on the test set while a set is distilled, and keeps the best state: ``evaluate.protocol=paper``.

    This is how the field reports (MTT, GSDD): the mean over the networks of one test, maximized over the tests. It
    selects on test data and is biased upwards; results carry the name of the protocol.

    Args:
        experiment: The experiment.
        codec: Of the arm.
        arm: "distilled" or "pixel".
        iterations: Outer steps of the arm; the state after the last is always tested.
        label: Gives images their soft labels, or None.
        run: Run directory; None in a process that only takes the steps between the tests.
        progress: Progress bars.
    """

    def __init__(
        self,
        experiment: Experiment,
        codec: codecs.Codec,
        arm: str,
        iterations: int,
        *,
        label: Labeler,
        run: RunDir | None,
        progress: Progress,
    ):
        self._experiment, self._codec, self._arm = experiment, codec, arm
        self._iterations, self._every = iterations, experiment.config.evaluate.test_every
        self._label, self._run, self._progress = label, run, progress

    def due(self, step: int) -> bool:
        """Tells whether the state after so many steps is to be tested."""
        return step == self._iterations or (step > 0 and step % self._every == 0)

    def until_due(self, step: int) -> int:
        """Returns how many outer steps are left before the next test."""
        return min(self._every - step % self._every, self._iterations - step)

    def test(self, step: int, state: distillation.State) -> None:
        """Tests a state and keeps it if it is the best so far; a state that was tested before costs nothing."""
        if self._run is None:
            return
        count = self._experiment.config.evaluate.seeds
        images = as_stored(self._codec, state.params)
        entry = evaluate_stage(
            self._experiment,
            f"{self._arm} after {step}",
            images,
            labels=probabilities(self._label(images, learned=state.learned)),
            run=self._run,
            progress=self._progress,
            # Fresh networks in every test.
            seeds=range(step * count, (step + 1) * count),
            lr=evaluation_lr(self._experiment, state),
        )
        with self._checkpoints() as checkpoints:
            latest = checkpoints.latest()
            mean = -1.0 if latest is None else checkpoints.restore(latest, state)[1]["entry"]["mean"]
            if (latest is None or step > latest) and entry["mean"] > mean:
                checkpoints.save(step, state, {"entry": entry})

    def best(self, like: distillation.State) -> tuple[distillation.State, dict[str, Any]]:
        """Returns the best state and its row for the table, with the number of the tests it was chosen from."""
        assert self._run is not None
        with self._checkpoints() as checkpoints:
            step = checkpoints.latest()
            assert step is not None
            state, meta = checkpoints.restore(step, like)
        # Runs that were extended have had more: after what used to be their last iteration.
        made = sum(name.startswith(f"{self._arm} after ") for name in known_tests(self._run))
        return state, meta["entry"] | {"iteration": step, "tests": max(made, 1, -(-self._iterations // self._every))}

    def _checkpoints(self) -> Checkpoints:
        assert self._run is not None
        return Checkpoints(self._run.checkpoints_path / f"{self._arm}-best", keep=1)


def as_stored(codec: codecs.Codec, params: Any) -> jax.Array:
    """Returns the images as they come back from disk."""
    return _through_disk(params, codec.quantize, codec.dequantize, codec.decode)


@partial(jax.jit, static_argnames=("quantize", "dequantize", "decode"))
def _through_disk(params: Any, quantize: Any, dequantize: Any, decode: Any) -> jax.Array:
    return decode(dequantize(quantize(params)))
