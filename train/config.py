"""Run configurations: a YAML file, its smoke block and overrides in; one frozen dataclass, or one clear line, out."""

import argparse
import contextlib
import dataclasses
import difflib
import fnmatch
import functools
import importlib
import json
import textwrap
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, MinLen
from typing_extensions import Doc

import gsdd_jax
from gsdd_jax import codecs, match, schema
from gsdd_jax.augment import DsaSpec
from gsdd_jax.codecs import PaletteSpec, PixelSpec
from gsdd_jax.data import DataSpec
from gsdd_jax.evaluation import EvalSpec
from gsdd_jax.exchange import FORMER_NAMES, renamed
from gsdd_jax.experts import ExpertSpec
from gsdd_jax.fitting import FitSpec
from gsdd_jax.labels import LabelSpec
from gsdd_jax.match import DistributionSpec, MmdSpec
from gsdd_jax.nets import NetSpec
from gsdd_jax.schema import TAG, Registered, build, describe, has_tag, show
from train import commands, yaml12
from train.errors import ConfigError, UserError
from train.rundir import HISTORY, differences, flatten, plain

__all__ = ["ConfigError", "RunConfig", "describe", "load", "to_yaml"]

T = TypeVar("T")
Place = tuple[str, ...]

SMOKE, IMPORTS = "smoke", "imports"
# Those of the checkout, which a wheel has as well.
CONFIGS = Path(gsdd_jax.__file__).with_name("configs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSpec:
    """Cadence of the distillation loop."""

    iterations: Annotated[int, Ge(0), Doc("Outer steps (GSDD, tables 10 and 11: 20,000 for distribution matching).")]
    schedule: Annotated[
        Literal["constant", "cosine"],
        Doc("Learning rate of the codec over the iterations: constant as in the references, or falling to 0."),
    ] = "constant"
    log_every: Annotated[int, Ge(1), Doc("Outer steps between lines of metrics.jsonl.")] = 10
    checkpoint_every: Annotated[int, Ge(1), Doc("Outer steps (and fitting steps) between checkpoints.")] = 100
    devices: Annotated[
        int,
        Ge(0),
        Doc(
            "devices that share out the classes (or the segments of trajectory matching) of an outer step; 0 = all of "
            "all processes"
        ),
    ] = 1
    data: Annotated[
        Literal["device", "host"],
        Doc("Where real images are drawn: on the device, or on the host for sets that do not fit the device."),
    ] = "device"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(ExpertSpec):
    """The experts of an objective: how they are trained, where they are kept."""

    path: Annotated[
        str, Doc("Folder of experts that runs may share, subtasks each in it; '' = experts in the run directory.")
    ] = ""
    train: Annotated[bool, Doc("Train those that are missing; false = say with which command.")] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvalSpec):
    """How sets are tested: how networks are trained, when, and what is reported."""

    protocol: Annotated[
        Literal["trusted", "paper"],
        Doc(
            "trusted: the last set, tested once. paper: the best of the tests of every test_every iterations on the "
            "test set, as the field reports; biased upwards."
        ),
    ] = "trusted"
    test_every: Annotated[
        int, Ge(1), Doc("Outer steps between the tests of protocol=paper (GSDD: 500, or 2,000 for DM).")
    ] = 500
    overlap: Annotated[
        Literal["refuse", "allow"],
        Doc(
            "Where half or more of the test images are training images, pixel for pixel: refuse the run, or allow it; "
            "any number of them is said below every table."
        ),
    ] = "refuse"
    lr_from: Annotated[
        Literal["lr", "syn_lr"],
        Doc("Learning rate: lr, or for sets of trajectory matching the step size they learned (MTT)."),
    ] = "lr"

    def training(self) -> EvalSpec:
        """Returns how networks are trained, without the rest."""
        return EvalSpec(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EvalSpec)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineSpec:
    """What stands beside the distilled set in the table of results, trained as config.evaluate says."""

    fit_only: Annotated[bool, Doc("The fitted images before distillation.")] = True
    random_real: Annotated[bool, Doc("Real images stored by pixel_codec, drawn anew for each network.")] = True
    pixel: Annotated[bool, Doc("Pixels at the same bytes under the same objective, from real images.")] = True
    pixel_codec: Annotated[
        Any,
        Registered({"pixel": PixelSpec, "palette": PaletteSpec}, "pixel"),
        Doc("Their codec, and how random real images are stored; without a name it is pixel."),
    ] = PixelSpec()
    pixel_iterations: Annotated[int, Ge(0), Doc("Their outer steps; 0 = distill.iterations.")] = 0
    hard_labels: Annotated[bool, Doc("Test every row that has soft labels with hard ones as well.")] = True
    compressed: Annotated[
        tuple[Literal["webp", "avif", "jpeg"], ...],
        Doc("Real images as such files, as many as the budget holds without headers: see gsdd_jax.compressed."),
    ] = ()
    compressed_select: Annotated[
        tuple[Literal["random", "kmeans"], ...], Doc("How they are chosen: anew for each network, or by k-means.")
    ] = ("random",)
    compressed_qualities: Annotated[
        tuple[Annotated[int, Ge(0), Le(100)], ...],
        MinLen(1),
        Doc("Their qualities, of which the best on held-out training images is taken."),
    ] = (0, 10, 20, 40)
    same_number: Annotated[
        bool, Doc("As many random real images as distilled ones, uncompressed: not at equal bytes, but a ceiling.")
    ] = False
    full_data: Annotated[bool, Doc("The whole training set.")] = True
    full_data_steps: Annotated[int, Ge(0), Doc("Its training steps per network; 0 = as config.evaluate.")] = 0
    full_data_seeds: Annotated[int, Ge(0), Doc("Its number of networks; 0 = as config.evaluate.")] = 0

    def off(self) -> "BaselineSpec":
        """Returns the settings with every row left out."""
        rows: Any = {f.name: False for f in dataclasses.fields(self) if isinstance(f.default, bool)}
        return dataclasses.replace(self, compressed=(), **rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One experiment, complete: data, parameterization, matching, evaluation."""

    name: Annotated[str, Doc("Name of the experiment, shown in reports.")]
    imports: Annotated[
        tuple[str, ...],
        Doc("Python modules with codecs and objectives of your own, which they register; imported before all else."),
    ] = ()
    seed: Annotated[int, Ge(0), Doc("Root of every random key of the run.")] = 0
    subtasks: Annotated[
        int, Ge(1), Doc("Independent runs that the classes are split into, to be merged with train.merge.")
    ] = 1
    subtask: Annotated[int, Ge(0), Doc("Which of them this run is, from 0; each has a block of the classes.")] = 0
    ipc: Annotated[float, Gt(0), Doc("Budget per class, counted in fp32 pixel images of the dataset's size.")]
    whiten: Annotated[
        Literal["zca", "meanstd", "none"], Doc("Normalization of real and synthetic images before any network.")
    ] = "meanstd"
    data: DataSpec
    codec: Annotated[Any, Registered(codecs.SPECS), Doc("The parameterization of the distilled images.")]
    network: NetSpec = NetSpec()
    augment: DsaSpec = DsaSpec()
    fit: FitSpec = FitSpec()
    objective: Annotated[Any, Registered(match.SPECS), Doc("What is matched between real and distilled images.")] = (
        DistributionSpec()
    )
    mmd: MmdSpec = MmdSpec()
    experts: ExpertsConfig = ExpertsConfig()
    labels: LabelSpec = LabelSpec()
    distill: DistillSpec
    evaluate: EvaluateConfig = EvaluateConfig()
    baselines: BaselineSpec = BaselineSpec()

    def __post_init__(self) -> None:
        """Checks what no single field can say."""
        if self.subtask >= self.subtasks:
            raise ValueError(
                f"subtask: expected a number below {self.subtasks}, the number of subtasks; found {self.subtask}"
            )


def compare(
    path: Path,
    held: RunConfig,
    config: RunConfig,
    *,
    asked: RunConfig,
    may_change: Collection[str],
    extendable: Collection[str] = (),
    extend: bool = False,
) -> dict[str, tuple[Any, Any]]:
    """Compares a resolved config with that of a run directory, and returns the keys that extend it with both values.

    Settings that came later have their defaults in `held`, which leave a run as it was without them; and what `config`
    had before anything was filled in, `asked`, counts as well, for a version may have filled in less. Of the dotted
    keys that differ, `may_change` and all below may, and `extendable` where the run is to be extended.

    Raises:
        UserError: Any other key differs; the message names each, with both values.
    """
    before, now, meant = (plain(dataclasses.asdict(one)) for one in (held, config, asked))
    differing, unfilled = differences(before, now), differences(before, meant)
    apart = [key for key in differing if key in unfilled and not covered(key, may_change)]
    refused = [key for key in apart if not (extend and covered(key, extendable))]
    if refused:
        there = "; ".join("{} is {} there and {} now".format(key, *differing[key]) for key in refused)
        way = "; add --extend to go on with the new values" if all(covered(k, extendable) for k in refused) else ""
        way = f"; --extend takes {', '.join(extendable)}" if extend else way
        raise UserError(
            f"{path} holds a run with another config: {there}. Put the old values back to continue that run, or choose "
            f"another run directory{way} (free to change: {', '.join(sorted(may_change))})"
        )
    return {key: (flatten(before).get(key), flatten(now).get(key)) for key in apart}


def covered(key: str, keys: Collection[str]) -> bool:
    """Tells whether a dotted key is one of these or below it; "*" stands for any letters."""
    return any(fnmatch.fnmatchcase(key, one) or fnmatch.fnmatchcase(key, f"{one}.*") for one in keys)


def load(
    path: str | PathLike[str],
    overrides: Sequence[str] = (),
    *,
    smoke: bool = False,
    cls: type[T] = RunConfig,  # type: ignore[assignment]
) -> T:
    """Reads a configuration file and validates it.

    Args:
        path: YAML file, or the name of a config of `CONFIGS`, unless a file is called so. Its `smoke:` block holds the
            keys that shrink the experiment for a quick test.
        overrides: settings that replace those of the file and its smoke block, each `section.key=value` with the value
            in YAML; a list element is addressed by its number. One that chooses another spec for a section by its name,
            such as `codec.name=pixel`, begins that section anew, without what is said there of the former spec: shared
            keys such as `lr` have another scale. Overrides of the section hold in any order.
        smoke: lay the smoke block over the rest; otherwise it is left out.
        cls: the dataclass to build.

    Raises:
        ConfigError: malformed YAML or override, unknown key, wrong type, value out of range, missing key, or no smoke
            block where one is asked for. One line, with the key, what was found and what is allowed.
        FileNotFoundError: no such file, and no config of this name.
    """
    path = _found(path)
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    data = yaml12.parse(text, source=source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected keys with values, found {show(data)}")
    block = data.pop(SMOKE, None)
    data.pop(HISTORY, None)
    try:
        data, block = renamed(data), renamed(block)
    except ValueError as error:
        raise ConfigError(f"{error} (in {source})") from None
    if smoke:
        if not isinstance(block, dict) or not block:
            raise ConfigError(f"{source}: a smoke test needs the block 'smoke:' with the keys that shrink the run")
        for key, value in flatten(block).items():
            data = _put(data, key.split("."), value)
    asked = [_parsed_override(override) for override in overrides]
    # What is said of another spec than the one that is asked for does not hold.
    for section, name in {place[:-1]: value for place, value in asked if place[-1] == TAG}.items():
        held = functools.reduce(_inside, section, data)
        if isinstance(held, dict) and held.get(TAG, name) != name and has_tag(cls, section):
            data = _put(data, section, {})
    for place, value in asked:
        data = _put(data, place, value)
    if added := [*["its smoke block"] * smoke, *overrides]:
        source += f" with {textwrap.shorten(', '.join(added), 200, placeholder=' ...')}"
    # Anything else is refused below.
    if isinstance(modules := data.get(IMPORTS), list):
        for name in modules:
            _import(name, source)
    try:
        return build(cls, data)
    except ValueError as error:
        raise ConfigError(f"{error} (in {source})") from None


def _found(name: str | PathLike[str]) -> Path:
    """Returns the file of a config, which a folder of the same name does not hide."""
    path, shipped = Path(name), {file.stem: file for file in CONFIGS.glob("*.yaml")}
    if path.exists() and not (path.is_dir() and str(name) in shipped):
        return path
    if str(name) in shipped:
        return shipped[str(name)]
    near = difflib.get_close_matches(path.stem, shipped, n=5) or ["digits"]
    raise FileNotFoundError(f"{name}: no such file or directory, and no config of this name, such as {', '.join(near)}")


def _import(name: Any, source: str) -> None:
    try:
        importlib.import_module(name)
    # A module may raise anything.
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{IMPORTS}: expected Python modules, found {name!r}: {why} (in {source})") from error
    schema.forget()


def to_yaml(config: Any) -> str:
    """Writes a configuration with every default filled in; `load` reads it back to an equal object."""
    return yaml12.dump(plain(dataclasses.asdict(config)))


def parser(
    command: str, doc: str | None, *, out: str, such_as: str = "distill.iterations=100", **more: Any
) -> argparse.ArgumentParser:
    """Returns a command line with what all commands about a config take; `out` is the default of --out, in words."""
    made = commands.parser(command, doc, **more)
    made.add_argument("--config", required=True, metavar="FILE", help="experiment: a file, or a name such as digits")
    made.add_argument("--out", metavar="DIR", help=f"default: {out}")
    made.add_argument("--smoke", action="store_true", help="shrink the experiment by the config's smoke block")
    made.add_argument("--quiet", action="store_true", help="no progress")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"such as {such_as}")
    return made


def _parsed_override(override: str) -> tuple[Place, Any]:
    key, equals, text = override.partition("=")
    root, *rest = (part.strip() for part in key.split("."))
    place = (root, *(FORMER_NAMES.get(part, part) for part in rest))
    if not equals or not all(place):
        raise ConfigError(f"override '{override}': expected section.key=value, such as distill.iterations=100")
    value = yaml12.parse(text, source=f"override '{override}'")
    try:
        return place, renamed(value, ".".join(place))
    except ValueError as error:
        raise ConfigError(f"{error} (in override {override})") from None


def choices(override: str) -> list[str]:
    """Splits ``key=v1,v2`` into ``key=v1`` and ``key=v2``; commas within lists, mappings and quotes stay."""
    key, equals, text = override.partition("=")
    with contextlib.suppress(ConfigError):
        values = yaml12.parse(f"[{text}]", source=override)
        if equals and len(values) > 1:
            return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for value in values]
    return [override]


def _inside(data: Any, part: str) -> Any:
    if isinstance(data, list):
        data = {str(number): value for number, value in enumerate(data)}
    return data.get(part) if isinstance(data, dict) else None


def _put(data: Any, place: Sequence[str], value: Any) -> Any:
    """Returns the data with another value; list elements are addressed by number, missing sections made."""
    head, *rest = place
    inner = _put(_inside(data, head), rest, value) if rest else value
    if isinstance(data, list) and head.isdecimal() and int(head) < len(data):
        return [*data[: int(head)], inner, *data[int(head) + 1 :]]
    return {**(data if isinstance(data, dict) else {}), head: inner}
