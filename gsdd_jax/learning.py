"""The public names that need networks, and so Flax and Optax: `gsdd_jax` imports them when one is asked for."""

from gsdd_jax.api import Accuracy, distill, evaluate, fit
from gsdd_jax.batches import device_data
from gsdd_jax.distillation import init_state, make_step
from gsdd_jax.match import DistributionSpec as DistributionMatching
from gsdd_jax.match import GradientSpec as GradientMatching
from gsdd_jax.match import KernelRidgeSpec as KernelRidgeRegression
from gsdd_jax.match import MmdSpec as Mmd
from gsdd_jax.match import TrajectorySpec as TrajectoryMatching
from gsdd_jax.match import make as make_objective
from gsdd_jax.nets import NetSpec as ConvNet
from gsdd_jax.nets import build as make_network
from gsdd_jax.training import EvalSpec as Training

__all__ = [
    "Accuracy",
    "ConvNet",
    "DistributionMatching",
    "GradientMatching",
    "KernelRidgeRegression",
    "Mmd",
    "Training",
    "TrajectoryMatching",
    "device_data",
    "distill",
    "evaluate",
    "fit",
    "init_state",
    "make_network",
    "make_objective",
    "make_step",
]
