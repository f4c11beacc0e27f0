"""Expert trajectories: the weights of networks trained on real images, epoch by epoch; trained, stored, read.

A folder of experts holds `manifest.json` and one array `[expert, epoch, p]` per group of experts, as a `.npy` file of
little-endian float32. Epoch 0 is the initialization. A group is written beside its final name and appears in the
manifest once it is whole, so a killed training continues with the first group that is missing. A step of trajectory
matching reads two rows and nothing else; every row is checked against its CRC-32.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt, Le, Lt
from jax import lax
from typing_extensions import Doc

from gsdd_jax import files, pixels
from gsdd_jax.augment import DsaSpec
from gsdd_jax.errors import InputError
from gsdd_jax.match.distribution import DistributionSpec
from gsdd_jax.match.trajectory import TrajectorySpec, flattener
from gsdd_jax.nets import NetSpec, Network, build
from gsdd_jax.training import lr_factor, optimizer, training_batch
from gsdd_jax.whiten import Whitening

FORMAT = "gsdd_jax experts 1"
MANIFEST = "manifest.json"
_ROW = np.dtype("<f4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """How experts are trained: SGD, by default without momentum and weight decay at a constant rate (MTT).

    Raises:
        ValueError: The rate is to fall, but the number of epochs is open.
    """

    count: Annotated[int, Ge(1), Doc("number of experts (MTT: 100)")] = 100
    batch: Annotated[int, Ge(1), Doc("real images per step (MTT: 256)")] = 256
    epochs: Annotated[
        int, Ge(0), Doc("epochs of each, on which the schedule depends; 0 = as many as the objective can use")
    ] = 0
    lr: Annotated[float, Gt(0), Doc("learning rate (MTT: 0.01)")] = 0.01
    momentum: Annotated[float, Ge(0), Lt(1), Doc("momentum (MTT: 0; DANCE: 0.9)")] = 0.0
    weight_decay: Annotated[
        float, Ge(0), Doc("times the weight, added to the gradient; all weights (MTT: 0; DANCE: 5e-4)")
    ] = 0.0
    schedule: Annotated[
        Literal["constant", "multistep", "cosine"],
        Doc("learning rate: constant (MTT), times 0.2 at 2/3 and 5/6 of all steps, or along a cosine to 0"),
    ] = "constant"
    cutmix: Annotated[
        float, Ge(0), Le(1), Doc("probability that a batch is mixed by CutMix, beta 1 (MTT: 0; DANCE: 0.5)")
    ] = 0.0
    seed: Annotated[int, Ge(0), Le(2**32 - 1), Doc("expert i has the random key fold_in(key(seed), i)")] = 0
    method: Annotated[
        Literal["auto", "map", "vmap"],
        Doc("a group's experts one after the other or side by side; auto = map on CPU, vmap elsewhere"),
    ] = "auto"
    group: Annotated[
        int, Ge(0), Doc("experts per training program and file; bounds memory with vmap; 0 = 1 with map, 10 with vmap")
    ] = 0

    def __post_init__(self) -> None:
        """Checks what no single field can say."""
        if self.schedule != "constant" and not self.epochs:
            raise InputError(
                f"experts.epochs: 0, must be at least 1 with schedule {self.schedule}, which depends on it"
            )

    def resolved(self, platform: str) -> "ExpertSpec":
        """Fills in `method` and `group` for a platform ("cpu", "gpu", "tpu")."""
        # Measured on CPU only (benchmarks/results/trajectory.json); a GPU is not filled by one batch of 32 px.
        method = self.method if self.method != "auto" else "map" if platform == "cpu" else "vmap"
        return dataclasses.replace(self, method=method, group=self.group or (1 if method == "map" else 10))

    def static(self) -> "ExpertSpec":
        """Returns the settings with neutral values where compiled training does not depend on them."""
        return dataclasses.replace(self, count=1, lr=1.0, seed=0, group=0)

    def optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer without its rate, see `training.optimizer`."""
        return optimizer("sgd", momentum=self.momentum, weight_decay=self.weight_decay)

    def last_epoch(self, objective: TrajectorySpec | DistributionSpec) -> int:
        """Returns how many epochs new experts are trained for."""
        return self.epochs or objective.last_epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What experts belong to; with another one they are refused."""

    network: NetSpec
    image_shape: tuple[int, ...]
    num_classes: int
    dataset: Annotated[str, Doc("fingerprint of the data set")]
    whiten: Annotated[str, Doc("kind of whitening; its numbers follow from the data set")]
    augment: DsaSpec

    def build(self) -> Network:
        """Builds the network."""
        return build(self.network, self.image_shape, self.num_classes)


# What decides the weights of an expert, but for rounding.
_RECIPE = [field for field in dataclasses.fields(ExpertSpec) if field.name not in ("count", "method", "group")]


class IncompleteError(InputError):
    """Experts are missing that the same training would add."""


class _Static(NamedTuple):
    """What the compiled epoch depends on, and hashes by."""

    network: Network
    augment: DsaSpec
    spec: ExpertSpec


def expert_keys(seed: int, experts: range) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of the initialization and of the training of some experts, `[g]` each."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(experts))
    keys = jax.vmap(jax.random.split)(keys)
    return keys[:, 0], keys[:, 1]


def train_epoch(
    theta: jax.Array,
    state: optax.OptState,
    key: jax.Array,
    epoch: jax.Array | int,
    images: jax.Array,
    labels: jax.Array,
    lr: jax.Array | float,
    *,
    network: Network,
    augment: DsaSpec,
    spec: ExpertSpec,
    whitening: Whitening | None = None,
) -> tuple[jax.Array, optax.OptState, jax.Array]:
    """Trains a network for one epoch by SGD on cross entropy.

    One pass over a fresh permutation; batches have one fixed size, and what fills up the last one has weight 0, so that
    it takes the same mean as the reference's shorter batch (CutMix draws from it, too). A fresh DSA draw per step, with
    parameters per image. Pure; works under `jit` and `vmap`.

    Args:
        theta: Flat weights `[p]`.
        state: What `spec.optimizer()` made of them, or returned after the epoch before.
        key: The expert's training key; the epoch's randomness is `fold_in(key, epoch)`.
        epoch: Epochs done before.
        images: `[n, h, w, c]`, uint8 (divided by 255 batch by batch) or float.
        labels: int `[n]`.
        lr: Learning rate, before the schedule.
        network: What to train.
        augment: DSA settings.
        spec: Optimizer, schedule, CutMix, and images per step: all of them if there are fewer.
        whitening: Applied to each batch before augmentation.

    Returns:
        Weights and state after the epoch, and the mean of the losses of all images.
    """
    n = images.shape[0]
    batch = min(spec.batch, n)
    steps = -(-n // batch)
    descent = spec.optimizer()
    flatten, unflatten = flattener(network)
    key_order, key_augment = jax.random.split(jax.random.fold_in(key, epoch))
    order = jnp.resize(jax.random.permutation(key_order, n), (steps, batch))
    weight = (jnp.arange(steps * batch) < n).astype(jnp.float32).reshape(steps, batch)

    batch_of = partial(
        training_batch, key_augment, steps=steps, network=network, augment=augment, mix=spec.cutmix, whitening=whitening
    )

    def step(carry: tuple[jax.Array, optax.OptState], t: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        theta, state = carry
        index, w = order[t], weight[t]
        value, grads = network.loss_and_gradient(unflatten(theta), *batch_of(t, images[index], labels[index]), w)
        direction, state = descent.update(flatten(grads), state, theta)
        rate = lr * lr_factor(epoch * steps + t, spec.schedule, steps=spec.epochs * steps)
        return (theta - rate * direction, state), value * w.sum()

    (theta, state), losses = lax.scan(step, (theta, state), jnp.arange(steps))
    return theta, state, losses.sum() / n


@partial(jax.jit, static_argnames="static")
def train_group(
    theta: jax.Array,
    state: optax.OptState,
    keys: jax.Array,
    epoch: jax.Array | int,
    images: jax.Array,
    labels: jax.Array,
    lr: jax.Array | float,
    whitening: Whitening | None,
    *,
    static: _Static,
) -> tuple[jax.Array, optax.OptState, jax.Array]:
    """Trains a group `[g, p]` for one epoch, by `lax.map` or `vmap` over its keys `[g]`; see `train_epoch`."""

    def one(theta: jax.Array, state: optax.OptState, key: jax.Array) -> tuple[jax.Array, optax.OptState, jax.Array]:
        return train_epoch(theta, state, key, epoch, images, labels, lr, whitening=whitening, **static._asdict())

    group = theta, state, keys
    return jax.vmap(one)(*group) if static.spec.method == "vmap" else lax.map(lambda x: one(*x), group)


@partial(jax.jit, static_argnames="network")
def _initial(key: jax.Array, *, network: Network) -> jax.Array:
    return flattener(network)[0](network.init(key))


def train_experts(
    path: str | os.PathLike[str],
    images: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    origin: Origin,
    spec: ExpertSpec,
    objective: TrajectorySpec | DistributionSpec,
    whitening: Whitening | None = None,
    on_epoch: Callable[[range, int, np.ndarray], None] | None = None,
) -> "Experts":
    """Trains the experts that a folder lacks, and opens it.

    Expert i depends on the seed and i, and on its group only up to rounding; with an unchanged spec an interrupted and
    continued training leaves the bits of an undisturbed one. Unless `spec` says how many, only epochs that `objective`
    can use are trained; a folder that holds more of them keeps on doing so.

    Args:
        path: The folder; made if absent.
        images: Real training images as in `train_epoch`, all on the device.
        labels: int `[n]`.
        origin: What the experts belong to; names network and augmentation.
        spec: How many, how trained.
        objective: Decides the number of epochs where `spec` does not.
        whitening: As in `train_epoch`.
        on_epoch: Called with the experts of the group, the epochs they have done, and their mean losses `[g]`.

    Returns:
        The experts, as `Experts.open`.

    Raises:
        ValueError: The folder holds experts of another origin or training, or too few epochs; another process trains
            there; or an expert diverged. As `Experts.open`, too.
        OSError: The disk is full or not writable; finished groups stay.
    """
    images = pixels.check(images, real=whitening is not None)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    network = origin.build()
    resolved = spec.resolved(jax.default_backend())
    static = _Static(network, origin.augment, resolved.static())
    with _locked(folder):
        files.remove_leftovers([folder])
        if (folder / MANIFEST).exists():
            manifest = _read_manifest(folder)
            _refuse_other(folder, manifest, origin, spec)
        else:
            manifest = _new_manifest(origin, spec, objective)
        _refuse_past(folder, manifest["epochs"], objective)
        device_images, device_labels = jnp.asarray(images), jnp.asarray(labels)
        while (first := _finished(manifest)) < spec.count:
            group = range(first, min(first + resolved.group, spec.count))
            advance = partial(
                train_group,
                images=device_images,
                labels=device_labels,
                lr=jnp.float32(spec.lr),
                whitening=whitening,
                static=static,
            )
            trajectory = _trajectory(spec, group, network, advance, manifest["epochs"], on_epoch)
            chunk = _write_chunk(folder, group, manifest, trajectory)
            chunk |= {"method": resolved.method, "platform": jax.default_backend()}
            manifest["chunks"].append(chunk)
            _write_manifest(folder, manifest)
    return Experts.open(folder, origin=origin, spec=spec, objective=objective)


def _trajectory(
    spec: ExpertSpec,
    group: range,
    network: Network,
    advance: Callable[..., tuple[jax.Array, optax.OptState, jax.Array]],
    epochs: int,
    on_epoch: Callable[[range, int, np.ndarray], None] | None,
) -> Iterator[np.ndarray]:
    """Yields the weights `[g, p]` of a group at epoch 0, 1, ..., epochs."""
    key_init, keys = expert_keys(spec.seed, group)
    theta = jnp.stack([_initial(key, network=network) for key in key_init])
    state = spec.optimizer().init(theta)
    yield np.asarray(theta)
    for epoch in range(epochs):
        theta, state, losses = advance(theta, state, keys, jnp.int32(epoch))
        rows = np.asarray(theta)
        if not np.isfinite(rows).all():
            bad = group[int(np.argmin(np.isfinite(rows).all(1)))]
            raise InputError(
                f"expert {bad}: weights not finite after epoch {epoch + 1}; lower the experts' lr, in another folder"
            )
        if on_epoch is not None:
            on_epoch(group, epoch + 1, np.asarray(losses))
        yield rows


class Experts:
    """A folder of finished experts; made by `open` or `train_experts`.

    Attributes:
        path: The folder.
        count: Number of experts that may be drawn, as asked for; the folder may hold more.
        epochs: Last epoch of each; there are `epochs + 1` rows per expert.
        num_params: p.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], count: int):
        self.path, self.count = path, count
        self.epochs, self.num_params = manifest["epochs"], manifest["num_params"]
        self._rows: list[tuple[Path, int, list[int]]] = []
        for chunk in manifest["chunks"]:
            file = path / chunk["file"]
            offset = _payload_offset(file, (len(chunk["crc32"]), self.epochs + 1, self.num_params))
            for place, crcs in enumerate(chunk["crc32"]):
                self._rows.append((file, offset + place * len(crcs) * self._row_bytes, crcs))

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        origin: Origin,
        spec: ExpertSpec,
        objective: TrajectorySpec | DistributionSpec,
    ) -> "Experts":
        """Opens experts for one use; reads the manifest and the headers of the arrays.

        Args:
            path: The folder.
            origin: What they must belong to.
            spec: How they must have been trained, and at least how many.
            objective: What must be within their epochs.

        Raises:
            FileNotFoundError: There is no manifest, or an array is missing.
            ValueError: Another origin or training, too few experts or epochs, or damaged files.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        _refuse_other(folder, manifest, origin, spec)
        _refuse_past(folder, manifest["epochs"], objective)
        if _finished(manifest) < spec.count:
            raise IncompleteError(
                f"{folder}: half written: {_finished(manifest)} of {spec.count} experts are finished; train the rest "
                "with the same settings, or lower their count"
            )
        return cls(folder, manifest, spec.count)

    def row(self, expert: int, epoch: int) -> np.ndarray:
        """Reads the flat weights of an expert after so many epochs, float32 `[p]`.

        Raises:
            IndexError: No such expert or epoch.
            ValueError: The row is damaged.
        """
        for name, value, stop in (("expert", expert, self.count), ("epoch", epoch, self.epochs + 1)):
            if not 0 <= value < stop:
                raise IndexError(f"{name}: {value}, must be 0 to {stop - 1} in {self.path}")
        file, offset, crcs = self._rows[expert]
        with file.open("rb") as stream:
            stream.seek(offset + epoch * self._row_bytes)
            data = stream.read(self._row_bytes)
        if zlib.crc32(data) != crcs[epoch]:
            raise InputError(f"{file}: damaged: the checksum of expert {expert}, epoch {epoch} does not match")
        return np.frombuffer(data, _ROW)

    @property
    def _row_bytes(self) -> int:
        return self.num_params * _ROW.itemsize


class Segments:
    """Draws the segments of each iteration as a pure function of `(seed, iteration)`; for `data.prefetch`.

    Expert and start are uniform and independent; the reference goes through its experts in shuffled order. A resumed
    run repeats the draws of an undisturbed one.

        for iteration, segments in prefetch(Segments(experts, spec, seed=0), first):  # [segments, 2, p]
    """

    def __init__(self, experts: Experts, objective: TrajectorySpec, *, seed: int):
        """Checks that all segments are there.

        Args:
            experts: Where to read.
            objective: Its windows, `expert_epochs` and `segments` count.
            seed: 0 to 2**64 - 1.

        Raises:
            ValueError: A segment may end past the last epoch, or the seed is out of range.
        """
        _refuse_past(experts.path, experts.epochs, objective)
        if not 0 <= seed < 2**64:
            raise InputError(f"seed must be in 0 to 2**64 - 1, found {seed}")
        self._experts, self._objective, self._seed = experts, objective, seed

    def choice(self, iteration: int) -> list[tuple[int, int]]:
        """Returns `(expert, start epoch)` of each segment of an iteration.

        Raises:
            ValueError: `iteration` is negative.
        """
        if iteration < 0:
            raise InputError(f"iteration must be at least 0, found {iteration}")
        low, high = self._objective.start_window(iteration)
        # An iteration owns the 2**64 counter values above iteration * 2**64; NumPy keeps the raw stream fixed.
        raw = np.random.Philox(counter=int(iteration) << 64, key=self._seed).random_raw(2 * self._objective.segments)
        return [(int(a) % self._experts.count, low + int(b) % (high - low)) for a, b in raw.reshape(-1, 2)]

    def batch(self, step: int) -> np.ndarray:
        """Reads the segments of iteration `step`: float32 `[segments, 2, p]`, each a start and a target.

        Raises:
            ValueError: A row is damaged, an expert did not move in between, or `step` is negative.
        """
        pairs = []
        for expert, start in self.choice(step):
            stop = start + self._objective.expert_epochs
            pair = self._experts.row(expert, start), self._experts.row(expert, stop)
            # In float32, as the loss divides by it.
            if not np.sum(np.square(pair[0] - pair[1])) > 0:
                raise InputError(f"{self._experts.path}: expert {expert} did not move from epoch {start} to {stop}")
            pairs.append(pair)
        return np.stack([np.stack(pair) for pair in pairs])


class FinalWeights:
    """The weights, after its last epoch, of the expert that the first of `Segments` of the same seed is from."""

    def __init__(self, experts: Experts, objective: TrajectorySpec, *, seed: int):
        """Checks as `Segments` does."""
        self._experts, self._segments, self._epoch = (
            experts,
            Segments(experts, objective, seed=seed),
            objective.last_epoch,
        )

    def batch(self, step: int) -> np.ndarray:
        """Reads those of iteration `step`: float32 `[p]`."""
        expert, _ = self._segments.choice(step)[0]
        return self._experts.row(expert, self._epoch)


def _described(origin: Origin, spec: ExpertSpec) -> dict[str, Any]:
    """What must agree between experts and their use, as JSON holds it."""
    theta = jax.eval_shape(origin.build().init, jax.eval_shape(lambda: jax.random.key(0)))
    leaves = jax.tree_util.tree_flatten_with_path(theta)[0]
    layout = [[jax.tree_util.keystr(path, simple=True, separator="."), list(leaf.shape)] for path, leaf in leaves]
    recipe = {field.name: getattr(spec, field.name) for field in _RECIPE}
    described = dataclasses.asdict(origin) | {"experts": recipe, "layout": layout}
    return json.loads(json.dumps(described))


def _new_manifest(origin: Origin, spec: ExpertSpec, objective: TrajectorySpec | DistributionSpec) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "origin": _described(origin, spec),
        "num_params": origin.build().num_params,
        "epochs": spec.last_epoch(objective),
        "chunks": [],
    }


def _finished(manifest: dict[str, Any]) -> int:
    return sum(len(chunk["crc32"]) for chunk in manifest["chunks"])


def _refuse_other(folder: Path, manifest: dict[str, Any], origin: Origin, spec: ExpertSpec) -> None:
    wanted, found = (dict(_leaves(tree)) for tree in (_described(origin, spec), manifest["origin"]))
    # Settings that came later leave networks and training by default as they were without them.
    later = {f"experts.{field.name}": field.default for field in _RECIPE}
    later |= {f"network.{field.name}": field.default for field in dataclasses.fields(NetSpec)}
    found = later | found
    different = [key for key in wanted | found if wanted.get(key) != found.get(key)]
    if different:
        key = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise InputError(
            f"{folder}: these experts do not belong to this run: {key}: expected {wanted.get(key)!r}, found "
            f"{found.get(key)!r}{more}; name another folder for the experts"
        )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _refuse_past(folder: Path, epochs: int, objective: TrajectorySpec | DistributionSpec) -> None:
    if objective.last_epoch > epochs:
        if not isinstance(objective, TrajectorySpec):
            raise InputError(
                f"{folder}: these experts end at epoch {epochs}; expected objective.expert_epochs of at most that, "
                f"found {objective.expert_epochs}, or train others in another folder"
            )
        most = epochs + 1 - objective.expert_epochs
        allowed = f"objective.max_start_epoch may be up to {most}" if most > 0 else "no window fits"
        raise InputError(
            f"{folder}: max_start_epoch {objective.max_start_epoch} with expert_epochs {objective.expert_epochs} "
            f"reaches epoch {objective.last_epoch}, but these experts end at epoch {epochs}; {allowed}, or train "
            "others in another folder"
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        if manifest["format"] != FORMAT:
            raise InputError(f"{file}: format: expected {FORMAT!r}, found {manifest['format']!r}")
        shape = manifest["epochs"], manifest["num_params"]
        if not isinstance(manifest["origin"], dict) or any(type(x) is not int or x < 1 for x in shape):
            raise InputError(f"epochs and num_params are {shape}")
        if any(len(crcs) != shape[0] + 1 for chunk in manifest["chunks"] for crcs in chunk["crc32"]):
            raise InputError("checksums are missing")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: no experts here (expected {MANIFEST}); train them first") from error
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: damaged manifest ({type(error).__name__}: {error})") from error
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    files.write_bytes(folder / MANIFEST, json.dumps(manifest).encode())


def _write_chunk(
    folder: Path, group: range, manifest: dict[str, Any], trajectory: Iterator[np.ndarray]
) -> dict[str, Any]:
    """Writes an array `[expert, epoch, p]` as its epochs come in; returns its entry in the manifest."""
    name = f"experts-{group.start:05d}.npy"
    shape = len(group), manifest["epochs"] + 1, manifest["num_params"]
    crcs: list[list[int]] = [[] for _ in group]
    with files.replacing(folder / name) as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": _ROW.str, "fortran_order": False, "shape": shape})
        offset = stream.tell()
        for epoch, rows in enumerate(trajectory):
            for place, row in enumerate(rows):
                # Plain writes, not a memory map: there, a full disk kills the process instead of raising OSError.
                data = row.astype(_ROW).tobytes()
                stream.seek(offset + (place * shape[1] + epoch) * len(data))
                stream.write(data)
                crcs[place].append(zlib.crc32(data))
    return {"file": name, "crc32": crcs}


def _payload_offset(file: Path, shape: tuple[int, int, int]) -> int:
    """Returns where the data of an array begin, once its header and its size are as they should be."""
    try:
        with file.open("rb") as stream:
            np.lib.format.read_magic(stream)
            found = np.lib.format.read_array_header_1_0(stream)
            offset, size = stream.tell(), stream.seek(0, os.SEEK_END)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: missing, although {MANIFEST} names it") from error
    except ValueError as error:
        raise InputError(f"{file}: damaged header ({error})") from error
    expected = offset + int(np.prod(shape)) * _ROW.itemsize
    if found != (shape, False, _ROW) or size != expected:
        raise InputError(
            f"{file}: damaged: expected {_ROW.name} {list(shape)} in {expected} bytes, found {found[2].name} "
            f"{list(found[0])} in {size} bytes"
        )
    return offset


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training into the folder; a killed process releases it."""
    try:
        with filelock.FileLock(folder / ".lock", timeout=0, thread_local=False):
            yield
    except filelock.Timeout as error:
        raise InputError(f"{folder}: another process trains experts there; wait for it to end") from error
