"""Train the experts of an objective: ``python -m train.experts --config configs/NAME.yaml [key=value ...]``.

Runs that share a folder of experts (``experts.path``) train them once. An interrupted training is continued by the
same command. ``train.distill`` does all of this by itself where experts are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from train import compilation_cache, stages
from train import config as configs
from train import experiment as experiments
from train.errors import ConfigError, exit_cleanly
from train.progress import Progress
from train.stopping import on_sigterm


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    out = "the folder of experts.path, else that of the run"
    args = configs.parser("experts", __doc__, out=out).parse_intermixed_args(argv)
    with exit_cleanly(debug=args.debug), on_sigterm():
        compilation_cache.enable()
        config: configs.RunConfig = configs.load(args.config, [*args.overrides, "experts.train=true"], smoke=args.smoke)
        folder = Path(args.out) if args.out else experiments.expert_path(config, experiments.run_path(config))
        experiment = experiments.prepare(config)
        if experiment.expert_window is None:
            raise ConfigError(
                f"objective.name: expected trajectory, or distribution with objective.networks=experts or "
                f"interpolated; found {config.objective.name!r}, which needs no experts"
            )
        experts = stages.expert_stage(experiment, folder, progress=Progress(quiet=args.quiet))
        print(f"{folder}: {experts.count} experts, {experts.epochs} epochs, {experts.num_params} weights each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
