"""What the command lines of `gsdd_jax.uses` share: a folder with its config, results beside it, plots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, MinLen
from typing_extensions import Doc

from gsdd_jax import files, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.codecs.base import CENTER, SPREAD
from gsdd_jax.data import DataSpec
from gsdd_jax.training import EvalSpec
from gsdd_jax.uses.summary import Learner
from train import compilation_cache
from train import config as configs
from train.errors import ConfigError
from train.pictures import drawable
from train.progress import Progress
from train.rundir import environment, write_json

CONFIG, RESULT, TABLE, PLOT = "config.yaml", "result.json", "table.md", "plot.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UseConfig:
    """What all uses are told."""

    name: Annotated[str, Doc("name of the experiment")]
    seeds: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1), Doc("each a repetition, with draws of its own")]
    data: DataSpec
    augment: DsaSpec = DsaSpec()
    training: Annotated[EvalSpec, Doc("how networks are trained; its steps are set")]

    def learner(self, network: Any, channels: int) -> Learner:
        """Returns what all networks have in common; they see images through constants that need no data."""
        seen = whiten.meanstd_of((CENTER,) * channels, (SPREAD,) * channels)
        return Learner(network=network, training=self.training, augment=self.augment, whitening=seen)


C = TypeVar("C", bound=UseConfig)


def start(
    command: str, doc: str | None, cls: type[C], argv: Sequence[str] | None
) -> tuple[C, Path, Callable[[str], None]]:
    """Reads a command line and its config; returns it, the folder of the results, and what says how far it is.

    The folder is made or continued.
    """
    parser = configs.parser(command, doc, out="runs/NAME; what is finished there is kept", such_as="training.steps=100")
    args = parser.parse_intermixed_args(argv)
    compilation_cache.enable()
    config = configs.load(args.config, args.overrides, smoke=args.smoke, cls=cls)
    out = Path(args.out) if args.out else Path("runs") / config.name
    text = configs.to_yaml(config)
    if (out / CONFIG).exists() and (out / CONFIG).read_text() != text:
        raise ConfigError(f"--out: {out} holds an experiment with other settings, see {out / CONFIG}; expected another")
    out.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out / CONFIG, text.encode())
    return config, out, Progress(quiet=args.quiet).say


def finish(out: Path, config: UseConfig, table: str, **results: Any) -> None:
    """Writes the results and their table, and prints the table."""
    known = environment() | {"seed": list(config.seeds), "n": len(config.seeds), "name": config.name}
    write_json(out / RESULT, known | results | {"settings": dataclasses.asdict(config)})
    files.write_bytes(out / TABLE, table.encode())
    print(table, end="")


def spread(values: Sequence[float]) -> str:
    """Writes mean and standard deviation of shares, in percent."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{100 * mean:.1f}"
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{100 * mean:.1f} ± {100 * std:.1f}"


def plot(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], x: str, y: str) -> None:
    """Draws a panel for each title: lines by their names, over 1, 2, ..."""
    if not drawable(path.name):
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, values in lines.items():
            axis.plot(range(1, len(values) + 1), values, marker="o", label=name)
        axis.set(title=title, xlabel=x)
        axis.set_xticks(range(1, 1 + max(map(len, lines.values()))))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(y)
    axes[-1].legend(fontsize="small")
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
