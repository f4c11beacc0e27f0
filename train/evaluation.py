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

from gsdd_jax import codecs, distillation, evaluation, nets, pixels
from gsdd_jax.augment import DsaSpec
from train import compressed, stopping
from train.checkpoint import Checkpoints
from train.errors import DivergedError, UserError
from train.experiment import Experiment, random_codec, real_images
from train.labeling import Labeler, in_order, probabilities
from train.progress import Progress
from train.rundir import RunDir, write_json

EVALUATION = "evaluation.json"


def test_networks(
    experiment: Experiment,
    test: str,
    seeds: Sequence[int],
    training: Callable[[int], tuple[jax.Array, jax.Array]],
    *,
    spec: evaluation.EvalSpec,
    progress: Progress,
    remedy: str,
    alone: bool = False,
    entry: dict[str, Any] | None = None,
    keep: Callable[[], Any] = lambda: None,
    lr: float | None = None,
    network: nets.Network | None = None,
    augment: DsaSpec | None = None,
) -> dict[str, Any]:
    """Trains and tests a fresh network for every seed that `entry` has none of yet, and sums up all of them.

    `training` gives a seed images and labels; `spec.parallel` networks share those of the first of them, unless every
    seed is `alone`. What is found is added to `entry`, and `keep` is called whenever there is more of it. Rate, network
    and augmentation are those of `spec` and of the experiment, unless they are given. `remedy` is said where a network
    diverged.

    Returns:
        ``{"mean", "std", "n", "seeds", "per_class", "balanced", "accuracies", "seconds", "images", "labels", "steps",
        "images_seen", "lr"}``, where ``images_seen`` counts those of all steps of one network, and ``labels`` is hard
        or soft.

    Raises:
        DivergedError: The accuracy of a network is not known.
    """
    dataset, rate, entry = experiment.dataset, spec.lr if lr is None else lr, {} if entry is None else entry
    accuracies = entry.setdefault("accuracies", {})
    left = [seed for seed in seeds if str(seed) not in accuracies]
    together = 1 if alone else spec.parallel
    with progress.phase(f"test {test}", total=len(seeds), done=len(seeds) - len(left)) as bar:
        for group in (left[i : i + together] for i in range(0, len(left), together)):
            began = time.perf_counter()
            images, labels = training(group[0])
            tested = evaluation.evaluate_networks(
                jnp.stack([experiment.key("evaluate", seed) for seed in group]),
                images,
                labels,
                jnp.asarray(dataset.test_images),
                jnp.asarray(dataset.test_labels),
                network=network or experiment.network,
                spec=spec,
                augment=augment or experiment.config.augment,
                whitening=experiment.whitening,
                lr=lr,
            )
            for seed, accuracy, hits in zip(group, *map(np.asarray, tested), strict=True):
                if not np.isfinite(accuracy):
                    raise DivergedError(
                        f"test {test}: network {seed} diverged at a learning rate of {rate:g}; {remedy}"
                    )
                accuracies[str(seed)] = float(accuracy)
                entry.setdefault("hits", {})[str(seed)] = hits.tolist()
            entry["seconds"] = entry.get("seconds", 0.0) + time.perf_counter() - began
            entry |= {"images": len(images), "labels": "hard" if labels.ndim == 1 else "soft"}
            keep()
            bar.advance(len(group), f"accuracy {100 * float(np.mean(list(accuracies.values()))):.1f} %")
    values = [accuracies[str(seed)] for seed in seeds]
    # Networks that were tested before this was counted do not know it.
    hits = [entry.get("hits", {}).get(str(seed)) for seed in seeds]
    counts = np.bincount(dataset.test_labels, minlength=dataset.num_classes)
    steps = spec.num_steps(entry["images"])
    return {
        **evaluation.summarize(values, seeds),
        **({} if None in hits else evaluation.summarize_classes(hits, counts)),
        "accuracies": values,
        "steps": steps,
        "images_seen": steps * min(spec.batch, entry["images"]),
        "lr": rate,
        **{key: value for key, value in entry.items() if key not in ("accuracies", "hits", "iteration")},
    }


def evaluate_stage(
    experiment: Experiment,
    arm: str,
    images: jax.Array | None,
    *,
    run: RunDir,
    progress: Progress,
    labels: jax.Array | np.ndarray | Labeler | None = None,
    test: str = "",
    seeds: Sequence[int] = (),
    lr: float | None = None,
    iteration: int | None = None,
) -> dict[str, Any]:
    """Tests an arm of a run, as `test_networks`; finished networks are kept in evaluation.json.

    Args:
        experiment: The experiment.
        arm: Row of the table. ``random_real``, ``same_number`` and random compressed images are drawn anew for each
            network; ``full_data`` takes the training set.
        images: ``[n, h, w, c]`` class-major images in [0,1], for the other arms.
        run: Run directory.
        progress: Progress bars.
        labels: Of the images, soft ones ``[n, k]`` or ``[n]``, or what gives images theirs; None where the order says
            all, as many of each class.
        test: Name of the test where an arm has several.
        seeds: Of the networks; 0, 1, ... as config.evaluate says if empty.
        lr: Learning rate in place of that of config.evaluate.
        iteration: Outer steps that the images are from, where a run that is extended has others later.
    """
    spec, test, known = evaluation_spec(experiment, arm), test or arm, known_tests(run)
    entry = known.setdefault(test, {"accuracies": {}})
    if iteration is not None and entry.get("iteration") != iteration:
        entry = known[test] = {"accuracies": {}, "iteration": iteration}

    def keep() -> None:
        write_json(run.path / EVALUATION, known)
        stopping.raise_if_requested()

    files = compressed.ARMS.get(arm)
    if files is not None:
        # Tests of a row have one quality.
        quality = compressed.choose_quality(experiment, files, spec, known.setdefault(arm, entry), keep, progress)

    def training(seed: int) -> tuple[jax.Array, jax.Array]:
        if arm == "full_data":
            return jnp.asarray(experiment.dataset.train_images), jnp.asarray(experiment.dataset.train_labels)
        shown = images
        if files is not None:
            index = seed if files.select == "random" else 0
            shown, size = compressed.training_set(experiment, files, quality, index)
            entry["bytes_per_class"] = max(size, entry.get("bytes_per_class", 0))
        elif arm in ("random_real", "same_number"):
            codec = random_codec(experiment) if arm == "random_real" else experiment.codec
            shown = real_images(experiment, codec, purpose=arm, how="random", index=seed)
            if arm == "random_real":
                shown = as_stored(codec, codec.init(experiment.key("start"), shown))
        assert shown is not None
        given = probabilities(labels(pixels.as_float(shown))) if callable(labels) else labels
        if given is None:
            given = in_order(len(shown), experiment.dataset.num_classes)
        return shown, jnp.asarray(given)

    return test_networks(
        experiment,
        test,
        seeds or range(spec.seeds),
        training,
        spec=spec,
        progress=progress,
        remedy=f"what was distilled is kept: python -m train.evaluate --run {run.path} evaluate.lr=... tests it",
        alone=arm.startswith("random_") or arm == "same_number",
        entry=entry,
        keep=keep,
        lr=lr,
    )


def known_tests(run: RunDir) -> dict[str, Any]:
    """Reads the networks that a run has tested, by arm."""
    path = run.path / EVALUATION
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it and run the same command again; networks will be tested anew"
        ) from error


def evaluation_spec(experiment: Experiment, arm: str, spec: evaluation.EvalSpec | None = None) -> evaluation.EvalSpec:
    """Returns the training recipe of an arm: the same for all, but for the full data where the config says so."""
    spec, baselines = spec or experiment.config.evaluate.training(), experiment.config.baselines
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


@dataclasses.dataclass(frozen=True)
class PeriodicTests:
    """Tests on the test set while a set is distilled, and keeps the best state: ``evaluate.protocol=paper``.

    This is how the field reports (MTT, GSDD): the mean over the networks of one test, maximized over the tests. It
    selects on test data and is biased upwards; results carry the name of the protocol.

    The state after the last of the `iterations` is always tested. There is no `run` in a process that only takes the
    steps between the tests.
    """

    experiment: Experiment
    codec: codecs.Codec
    arm: str
    iterations: int
    label: Labeler
    run: RunDir | None
    progress: Progress

    def due(self, step: int) -> bool:
        """Tells whether the state after so many steps is to be tested."""
        return step == self.iterations or (step > 0 and step % self.experiment.config.evaluate.test_every == 0)

    def until_due(self, step: int) -> int:
        """Returns how many outer steps are left before the next test."""
        every = self.experiment.config.evaluate.test_every
        return min(every - step % every, self.iterations - step)

    def test(self, step: int, state: distillation.State) -> None:
        """Tests a state and keeps it if it is the best so far; a state that was tested before costs nothing."""
        if self.run is None:
            return
        count, images = self.experiment.config.evaluate.seeds, as_stored(self.codec, state.params)
        entry = evaluate_stage(
            self.experiment,
            f"{self.arm} after {step}",
            images,
            labels=probabilities(self.label(images, learned=state.learned)),
            run=self.run,
            progress=self.progress,
            # Fresh networks in every test.
            seeds=range(step * count, (step + 1) * count),
            lr=evaluation_lr(self.experiment, state),
        )
        checkpoints = self._best(self.run)
        latest = checkpoints.latest()
        mean = -1.0 if latest is None else checkpoints.restore(latest, state)[1]["entry"]["mean"]
        if (latest is None or step > latest) and entry["mean"] > mean:
            checkpoints.save(step, state, {"entry": entry})

    def best(self, like: distillation.State) -> tuple[distillation.State, dict[str, Any]]:
        """Returns the best state and its row for the table, with the number of the tests it was chosen from."""
        assert self.run is not None
        checkpoints = self._best(self.run)
        step = checkpoints.latest()
        assert step is not None
        state, meta = checkpoints.restore(step, like)
        # Runs that were extended have had more: after what used to be their last iteration.
        made = sum(name.startswith(f"{self.arm} after ") for name in known_tests(self.run))
        every = self.experiment.config.evaluate.test_every
        return state, meta["entry"] | {"iteration": step, "tests": max(made, 1, -(-self.iterations // every))}

    def _best(self, run: RunDir) -> Checkpoints:
        return Checkpoints(run.checkpoints_path / f"{self.arm}-best", keep=1)


@partial(jax.jit, static_argnames="codec")
def as_stored(codec: codecs.Codec, params: Any) -> jax.Array:
    """Returns the images as they come back from disk."""
    return codec.decode(codec.dequantize(codec.quantize(params)))
