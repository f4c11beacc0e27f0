"""When to round packed Gaussians: in every step of distillation, or once at its end.

    python -m benchmarks.packed_later [--config FILE] [--runs DIR] [--out FILE] [key=value ...]

Both ways start from one fit and go on with the same randomness; networks are tested on held-out training images. The
same command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import record
from gsdd_jax import data, fitting
from gsdd_jax.codecs import Codec, packed
from gsdd_jax.render import render
from train import config as configs
from train import experiment as experiments
from train import stages
from train.errors import ConfigError, exit_cleanly
from train.evaluation import as_stored, evaluate_stage
from train.progress import Progress
from train.rundir import RunDir

CONFIG = "configs/cifar10_packed_dm_ipc1_cpu.yaml"
OUT = record.RESULTS / "packed_later.json"
# Before the first step of any fit.
NOT_BEGUN = -1.0


def unrounded(codec: Codec) -> Codec:
    """Returns a packed codec that draws its masters as they are; its grids follow them all the same."""
    assert codec.draft is not None
    draft = codec.draft

    def decode(params: Any, index: Any = None, *, size: Any = None, key: Any = None) -> jax.Array:
        del size, key
        # Not by the draft: that draws no more Gaussians than a fit has added by then.
        masters = packed.quantized(params if index is None else params[index], codec.spec, rounding=False)
        return render(masters, supersample=codec.spec.supersample, cutoff=codec.spec.cutoff)

    return codec._replace(decode=decode, project=lambda params: draft.project(params, jnp.float32(NOT_BEGUN)))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packed_later", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help="experiment with a packed codec")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/packed_later"), help="where the run directories are kept"
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    with exit_cleanly():
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Distills both ways, tests their sets and writes the record.

    Raises:
        ConfigError: The codec of the config is no packed one.
        UserError: The run directories hold runs of another config.
    """
    config: configs.RunConfig = configs.load(args.config, args.overrides)
    if config.codec.name != "packed_gaussian":
        raise ConfigError(f"codec.name: expected packed_gaussian, found {config.codec.name!r}")
    experiment = experiments.prepare(config, experiments.hold_out(data.load(config.data)))
    codec, progress = experiment.codec, Progress(quiet=True)
    targets = experiments.real_images(experiment, codec, purpose="select", how=config.fit.select)
    rows: dict[str, Any] = {}
    with RunDir(args.runs / "fit") as run:
        claim(run, experiment)
        fitted = stages.fit_stage(experiment, targets, run=run, progress=progress)
        psnr = float(fitting.psnr(as_stored(codec, fitted), targets).mean())
    for name, way in {"every step": codec, "at the end": unrounded(codec)}.items():
        with RunDir(args.runs / name.replace(" ", "_")) as run:
            claim(run, experiment)
            params = jax.tree.map(jnp.copy, fitted)
            arm = experiment.distilled()[0]._replace(codec=way)
            state, _ = stages.distill_stage(experiment, arm, params, run=run, progress=progress)
            images = {"rounded": as_stored(codec, state.params), "as trained": jax.jit(way.decode)(state.params)}
            rows[name] = {
                kind: evaluate_stage(experiment, kind, shown, run=run, progress=progress)
                for kind, shown in images.items()
                if kind == "rounded" or way is not codec
            }
            print(name, {kind: f"{100 * row['mean']:.1f}" for kind, row in rows[name].items()}, flush=True)
    record.write(
        args.out,
        rows,
        seed=config.seed,
        n=config.evaluate.seeds,
        config=args.config,
        overrides=args.overrides,
        iterations=config.distill.iterations,
        fit_psnr=psnr,
        held_out=len(experiment.dataset.test_labels),
    )


def claim(run: RunDir, experiment: experiments.Experiment) -> None:
    """Makes a run directory one of this experiment, or refuses it."""
    if run.config_path.exists():
        held: configs.RunConfig = configs.load(run.config_path)
        configs.compare(run.path, held, experiment.config, asked=experiment.asked, may_change=())
    run.configure(dataclasses.asdict(experiment.config))


if __name__ == "__main__":
    main()
