"""The three verbs of the library: fit, distill, evaluate; arrays and specs in, sets and numbers out.

They know neither paths nor logs. Each is a short composition of pure pieces, which stay reachable for programs of your
own: `codecs.make`, `nets.build`, `match.make`, `distillation.make_step`. What is left open is as in the best configs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsdd_jax import codecs, distillation, evaluation, fitting, match, nets, pixels, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.codecs import Codec
from gsdd_jax.data.sampling import class_index
from gsdd_jax.errors import InputError
from gsdd_jax.experts import Experts
from gsdd_jax.labels import LabelSpec, check_learned, pack
from gsdd_jax.labels import nbytes as label_nbytes
from gsdd_jax.merged import MergedSet
from gsdd_jax.nets import Network
from gsdd_jax.synset import SynSet
from gsdd_jax.training import EvalSpec
from gsdd_jax.whiten import Whitening

# ``(step, metrics)``: called after each step with its number, from 1, and device scalars.
OnStep = Callable[[int, dict[str, jax.Array]], None]
# How networks are trained for a test: 200 epochs, as in the best config of CIFAR-10.
TRAINING = EvalSpec(epochs=200, batch=64, lr=0.01, seeds=3)
# Side of the last feature map of the default ConvNet.
_LAST_SIDE = 4
# How often a progress bar shows a number, for each of which the device is waited for.
_SHOWN = 50


class Accuracy(NamedTuple):
    """Test accuracies of networks that were trained on a set, in [0, 1]; as a number, their mean.

    Attributes:
        mean: Over the networks; NaN if one diverged, and the spread too.
        std: Of the sample of networks; 0 for one.
        networks: Of each of them.
        per_class: Of each class, mean over the networks; None for a class without test images.
    """

    mean: float
    std: float
    networks: tuple[float, ...]
    per_class: tuple[float | None, ...]

    def __float__(self) -> float:
        """Returns the mean."""
        return self.mean

    def __str__(self) -> str:
        """Returns mean and spread in percent."""
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} % (n = {len(self.networks)})"


def fit(
    key: jax.Array,
    images: Any,
    labels: Any,
    *,
    codec: Any,
    bytes_per_class: int | None = None,
    steps: int = 300,
    select: str = "random",
    class_names: Sequence[str] = (),
    progress: bool = True,
    on_step: OnStep | None = None,
) -> SynSet:
    """Fits a set to real images, some of each class: the start of a distillation, and what it is compared with.

    Source: GSDD, Eq. 8 and appendix B.3.

    Args:
        key: Decides which images are fitted, and where the fit starts; consumed.
        images: Training images ``[N, h, w, c]``, uint8 or floating point in [0,1], of NumPy or JAX.
        labels: Integers ``[N]``, each of the classes 0 to k - 1.
        codec: A spec such as ``PackedGaussians(images_per_class=20, num_points=22)``, or a codec made from one.
        bytes_per_class: The budget, for what the spec leaves open.
        steps: Of Adam on the mean squared error.
        select: Which real images: ``random`` or the ``first`` of each class.
        class_names: One per class; their numbers if empty.
        progress: Show a bar.
        on_step: Called with ``psnr``, the mean in dB over all images before the step.

    Returns:
        The set.

    Raises:
        ValueError, TypeError: Images, labels, sizes or settings that do not fit; the message names the argument.
    """
    _check_count("steps", steps)
    if select not in ("random", "first"):
        raise InputError(f"select: expected random or first, found {select!r}")
    images, labels, classes = _training_set(images, labels, class_names)
    made = _codec(codec, images, labels, bytes_per_class, LabelSpec())
    params = _fitted(key, images, labels, made, steps=steps, select=select, progress=progress, on_step=on_step)
    return _set_of(made, params, classes, _normalization("meanstd", None, images))


def distill(
    key: jax.Array,
    images: Any,
    labels: Any,
    *,
    codec: Any,
    objective: Any = None,
    network: Any = None,
    bytes_per_class: int | None = None,
    steps: int = 200,
    start: SynSet | None = None,
    fit_steps: int = 300,
    augment: DsaSpec | None = None,
    whitening: str | Whitening = "meanstd",
    schedule: str | optax.Schedule = "cosine",
    optimizer: optax.GradientTransformation | None = None,
    mmd: match.MmdSpec | None = None,
    experts: Experts | None = None,
    label_spec: LabelSpec | None = None,
    class_names: Sequence[str] = (),
    on_host: bool = False,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> SynSet:
    """Distills a training set into a small one: fits a codec to real images, then matches.

    Args:
        key: Decides everything that is drawn; consumed.
        images: Training images ``[N, h, w, c]``, uint8 or floating point in [0,1], of NumPy or JAX.
        labels: Integers ``[N]``, each of the classes 0 to k - 1.
        codec: A spec such as ``PackedGaussians(images_per_class=20, num_points=22)``, or a codec made from one.
        objective: A spec such as ``GradientMatching()``; distribution matching if None.
        network: What matches: anything that `nets.build` takes, such as a Flax module; a ConvNet of width 64 if None.
        bytes_per_class: The budget, for what the codec's spec leaves open.
        steps: Outer steps.
        start: A set of the same codec to begin with, in place of a fit.
        fit_steps: Of the fit.
        augment: DSA settings; those of DSA if None.
        whitening: What networks see images through: ``meanstd``, ``zca``, ``none``, or any callable pytree.
        schedule: Of the codec's learning rate: ``cosine`` to 0, ``constant``, or a factor by step.
        optimizer: Any optax transformation for the codec's parameters; the codec's own if None.
        mmd: The MMD term (D3).
        experts: Those of trajectory matching, or whose networks match; see `gsdd_jax.experts`.
        label_spec: How labels that the objective learns are written, within the budget: ``LabelSpec(kind="soft",
            teacher="learned", ...)``; hard ones if None.
        class_names: One per class; their numbers if empty.
        on_host: Draw real images on the host; what is compiled then serves training sets of any number of images.
        progress: Show a bar.
        on_step: Called with the metrics of `distillation.make_step`.

    Returns:
        The set; its ``meta`` holds the normalization, so that `evaluate` needs to be told nothing.

    Raises:
        ValueError, TypeError: Images, labels, sizes or settings that do not fit; the message names the argument.
        FloatingPointError: The distillation diverged; the message names the step.
    """
    for name, value, kind in (
        ("augment", augment, DsaSpec),
        ("optimizer", optimizer, optax.GradientTransformation),
        ("mmd", mmd, match.MmdSpec),
        ("start", start, SynSet),
        ("label_spec", label_spec, LabelSpec),
    ):
        _check_kind(name, value, kind)
    for name, count in (("steps", steps), ("fit_steps", fit_steps)):
        _check_count(name, count)
    images, labels, classes = _training_set(images, labels, class_names)
    label_spec = label_spec or LabelSpec()
    made = _codec(codec, images, labels, bytes_per_class, label_spec)
    if optimizer is not None:
        made = made._replace(optimizer=lambda: optimizer)
    key_fit, key_distill = jax.random.split(key)
    net = _network(network, made.image_shape, made.num_classes)
    ipc = round(_bytes_per_class(made) / (4 * math.prod(made.image_shape)), 2)
    spec = match.resolved(match.DistributionSpec() if objective is None else objective, ipc)
    matched = match.make(spec, codec=made, network=net, augment=augment, mmd=mmd)
    check_learned(label_spec, matched)
    seen = _whitening(whitening, images)
    params = _start(start, made) if start is not None else None
    if params is None:
        params = _fitted(key_fit, images, labels, made, steps=fit_steps, select="random", progress=progress)
    source = match.Source(images, labels, made.num_classes, seen, _seed(key_distill), experts)
    state, losses = distillation.init_state(matched, params), []
    factor = _schedule(schedule, steps)
    with distillation.Loop(matched, state, key_distill, source, last=steps, schedule=factor, on_host=on_host) as loop:
        with _bar("distill", steps, shown=progress) as advance:
            for step in range(1, steps + 1):
                metrics = loop.take(1)
                losses.append(metrics["loss"])
                if on_step is not None:
                    on_step(step, metrics)
                advance(lambda metrics=metrics: f"loss {float(metrics['loss']):.4g}")
        state = loop.state
    _check_finite(losses, state.params)
    meta = {"objective": spec.name, **_normalization(whitening, seen, images)}
    found = _set_of(made, state.params, classes, meta)
    if label_spec.kind == "hard":
        return found
    soft = pack(state.learned["labels"], label_spec)
    size = found.bytes_per_class + soft.nbytes // made.num_classes
    return dataclasses.replace(found, soft=soft, bytes_per_class=size)


def evaluate(
    key: jax.Array,
    synset: SynSet | MergedSet,
    test_images: Any,
    test_labels: Any,
    *,
    network: Any = None,
    training: EvalSpec = TRAINING,
    augment: DsaSpec | None = None,
    whitening: Whitening | None = None,
    progress: bool = True,
) -> Accuracy:
    """Trains fresh networks on a set, with its soft labels where it has any, and tests each once, at its end.

    Args:
        key: Decides weights, batches and augmentations; consumed.
        synset: The set.
        test_images: ``[n, h, w, c]``, uint8 or floating point in [0,1]; the set is rendered at their size.
        test_labels: Integers ``[n]``.
        network: What is trained: anything that `nets.build` takes; a ConvNet of width 64 if None.
        training: How, and how many networks: ``seeds``.
        augment: DSA settings; those of DSA if None.
        whitening: What networks see images through; that of the set if None.
        progress: Show a bar.

    Raises:
        ValueError, TypeError: Images or labels that do not fit, or a set whose whitening has to be given.
    """
    if not isinstance(synset, SynSet | MergedSet):
        raise InputError(f"synset: expected a set, such as one that load reads, found {synset!r}")
    _check_kind("training", training, EvalSpec)
    _check_kind("augment", augment, DsaSpec)
    test_images = _gray_levels(test_images, "test_images")
    test_labels, classes = np.asarray(test_labels), len(synset.class_names)
    if np.issubdtype(test_labels.dtype, np.integer) and not ((test_labels >= 0) & (test_labels < classes)).all():
        bad = test_labels[(test_labels < 0) | (test_labels >= classes)][0]
        raise InputError(f"test_labels: expected 0 to {classes - 1}, the classes of the set; found {bad}")
    seen = _whitening_of(synset) if whitening is None else whitening
    net = _network(network, test_images.shape[1:], classes)
    images = synset.images(test_images.shape[1:-1])
    soft = synset.soft_labels
    training_set = images, jnp.asarray(synset.labels) if soft is None else soft
    keys, tested = jax.random.split(key, training.seeds), []
    with _bar("evaluate", training.seeds, shown=progress) as advance:
        for first in range(0, training.seeds, training.parallel):
            group = keys[first : first + training.parallel]
            tested.append(
                evaluation.evaluate_networks(
                    group,
                    *training_set,
                    jnp.asarray(test_images),
                    jnp.asarray(test_labels),
                    network=net,
                    spec=training,
                    augment=augment or DsaSpec(),
                    whitening=seen,
                )
            )
            last = tested[-1].accuracies
            advance(lambda last=last: f"accuracy {100 * float(last[-1]):.1f} %", len(group))
    accuracies, hits = (np.concatenate(parts).tolist() for parts in zip(*tested, strict=True))
    summary = evaluation.summarize(accuracies, range(len(accuracies)))
    counts = np.bincount(test_labels, minlength=classes)
    per_class = evaluation.summarize_classes(hits, counts)["per_class"]
    return Accuracy(summary["mean"], summary["std"], tuple(accuracies), tuple(per_class))


def _training_set(
    images: Any, labels: Any, class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Checks a training set; returns it as NumPy arrays, and the names of its classes."""
    images, labels = _gray_levels(images, "images"), np.asarray(labels)
    if labels.shape != images.shape[:1]:
        raise InputError(f"labels: expected one per image, {list(images.shape[:1])}; found shape {list(labels.shape)}")
    num_classes = len(class_names) or int(labels.max(initial=0)) + 1
    class_index(labels, num_classes)
    return images, labels, tuple(class_names) or tuple(map(str, range(num_classes)))


def _check_kind(name: str, value: Any, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{name}: expected {kind.__module__.partition('.')[0]}'s {kind.__name__}, found {value!r}")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or value < 0:
        raise InputError(f"{name}: expected a whole number of at least 0, found {value!r}")


def _gray_levels(images: Any, name: str) -> np.ndarray:
    """Returns images as NumPy arrays; floats that are gray levels as such, so that either form gives the same bits."""
    images = np.asarray(pixels.check(images, name))
    if images.dtype == np.uint8:
        return images
    levels = np.clip(np.round(images * 255.0), 0, 255)
    return levels.astype(np.uint8) if np.abs(images * 255.0 - levels).max() < 1e-3 else images


def _codec(
    codec: Any, images: np.ndarray, labels: np.ndarray, bytes_per_class: int | None, label_spec: LabelSpec
) -> Codec:
    shape, num_classes = images.shape[1:], int(labels.max()) + 1
    if not isinstance(codec, Codec):
        return codecs.make(
            codec,
            image_shape=shape,
            num_classes=num_classes,
            bytes_per_class=bytes_per_class,
            label_bytes=label_nbytes(label_spec, 1, num_classes),
        )
    if (codec.image_shape, codec.num_classes) != (shape, num_classes):
        raise InputError(
            f"codec: made for {codec.num_classes} classes of images {list(codec.image_shape)}; found {num_classes} "
            f"classes of {list(shape)}"
        )
    return codec


def _bytes_per_class(codec: Codec) -> int:
    stored = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in codec.layout().values())
    return -(-stored // codec.num_classes)


def _network(network: Any, image_shape: tuple[int, ...], num_classes: int) -> Network:
    if network is None:
        depth = max(2, round(math.log2(min(image_shape[-3:-1]) / _LAST_SIDE)))
        network = nets.NetSpec(name="convnet" if len(image_shape) == 3 else "convnet3d", depth=depth, width=64)
    return nets.build(network, image_shape, num_classes)


def _fitted(
    key: jax.Array,
    images: np.ndarray,
    labels: np.ndarray,
    codec: Codec,
    *,
    steps: int,
    select: str,
    progress: bool,
    on_step: OnStep | None = None,
) -> Any:
    key_select, key_init = jax.random.split(key)
    chosen = fitting.select_images(
        key_select, labels, codec.images_per_class, how=select, num_classes=codec.num_classes
    )
    targets = pixels.as_float(images[chosen])
    steps = 0 if codec.fitted_by_init else steps
    begin: Any = jax.jit(fitting.init_fit, static_argnames=("codec", "steps"))
    step_fit: Any = jax.jit(fitting.fit_steps, static_argnames=("codec", "steps", "count"), donate_argnums=0)
    state = begin(key_init, targets, codec=codec, steps=max(steps, 1))
    with _bar("fit", steps, shown=progress) as advance:
        for step in range(1, steps + 1):
            state, psnr = step_fit(state, targets, codec=codec, steps=steps, count=1)
            if on_step is not None:
                on_step(step, {"psnr": psnr})
            advance(lambda psnr=psnr: f"PSNR {float(psnr):.2f} dB")
    return state.params


def _start(start: SynSet, codec: Codec) -> Any:
    like = jax.eval_shape(
        codec.init, jax.random.key(0), jax.ShapeDtypeStruct((codec.num_images, *codec.image_shape), jnp.float32)
    )
    found = jax.tree.map(jnp.shape, start.params)
    if start.codec.name != codec.name or found != jax.tree.map(jnp.shape, like):
        raise InputError(
            f"start: expected a set of the {codec.name} codec with {codec.images_per_class} images per class as codec "
            f"says, found {start.codec.spec}"
        )
    # Its arrays are donated to the first step.
    return jax.tree.map(jnp.copy, start.params)


def _set_of(codec: Codec, params: Any, class_names: tuple[str, ...], meta: dict[str, Any]) -> SynSet:
    """Returns the set of parameters at stored precision."""
    stored = jax.jit(lambda params: codec.dequantize(codec.quantize(params)))(params)
    return SynSet(codec, stored, _bytes_per_class(codec), class_names, meta)


def _whitening(whitening: str | Whitening, images: np.ndarray) -> Whitening:
    if not isinstance(whitening, str) and not callable(whitening):
        raise InputError(f"whitening: expected meanstd, zca, none or a callable pytree, found {whitening!r}")
    return whiten.fit(whitening, images) if isinstance(whitening, str) else whitening  # type: ignore[arg-type]


def _normalization(whitening: str | Whitening, seen: Whitening | None, images: np.ndarray) -> dict[str, Any]:
    """Returns what a set says of the normalization that its networks expect."""
    channels = seen if isinstance(seen, whiten.MeanStd) else whiten.fit("meanstd", images)
    assert isinstance(channels, whiten.MeanStd)
    kind = whitening if isinstance(whitening, str) else "meanstd" if seen is channels else "custom"
    constants = {"channel_mean": np.asarray(channels.mean).tolist(), "channel_std": np.asarray(channels.std).tolist()}
    return {"whiten": kind, **constants}


def _whitening_of(synset: SynSet | MergedSet) -> Whitening:
    kind, meta = synset.meta.get("whiten"), synset.meta
    if kind == "none":
        return whiten.Identity()
    if kind == "meanstd" and "channel_mean" in meta:
        return whiten.meanstd_of(meta["channel_mean"], meta["channel_std"])
    raise InputError(
        f"whitening: the set was made through {kind!r}, which is not part of it; expected it as an argument, such as "
        "whiten.fit('zca', training_images)"
    )


def _schedule(schedule: str | optax.Schedule, steps: int) -> optax.Schedule | None:
    if callable(schedule):
        return schedule
    if schedule not in ("cosine", "constant"):
        raise InputError(f"schedule: expected cosine, constant or a function of the step, found {schedule!r}")
    return distillation.cosine(steps) if schedule == "cosine" else None


def _seed(key: jax.Array) -> int:
    """Returns a seed for what the host draws."""
    return int(jax.random.bits(jax.random.fold_in(key, 1), (), jnp.uint32))


def _check_finite(losses: Sequence[jax.Array], params: Any) -> None:
    finite = np.isfinite(np.asarray(losses, np.float32)) if losses else np.ones(0, bool)
    if not finite.all():
        raise FloatingPointError(
            f"distill: loss not finite in step {int(np.argmin(finite)) + 1}; try a smaller learning rate of the codec"
        )
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
        raise FloatingPointError("distill: parameters not finite after the last step; try a smaller learning rate")


@contextmanager
def _bar(name: str, total: int, *, shown: bool) -> Iterator[Callable[..., None]]:
    """Shows a bar; yields a function that moves it on, with what gives its text where it is time for one."""
    from tqdm import tqdm  # which sets are made without  # noqa: TID251

    with tqdm(desc=name, total=total, disable=not (shown and total)) as bar:

        def advance(text: Callable[[], str], count: int = 1) -> None:
            bar.update(count)
            if not bar.disable and bar.n % max(total // _SHOWN, 1) == 0:
                bar.set_postfix_str(text())

        yield advance
