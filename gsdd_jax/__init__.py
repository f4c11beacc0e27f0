"""Dataset distillation with sparse 2-D Gaussians (GSDD) in JAX.

The verbs: `fit`, `distill`, `evaluate`, `load`. Their pure pieces: `make_codec`, `make_network`, `make_objective`,
`init_state`, `make_step`, `device_data`; usable under ``jit``, ``lax.scan`` and ``vmap``.

Glossary: *real* / *syn* (synthetic) images; *ipc*, a budget in float32 pixel images per class; *codec*, a
parameterization of images; *budget*, bytes per class; *expert* / *student*, networks trained on real / synthetic
images; *syn_lr*, the learned step size of a student.

Dimension letters: ``n`` images, ``m`` Gaussians per image, ``h w c`` pixels, ``k`` classes, ``t`` frames or inner
steps, ``p`` flat weights. Images are ``[n, h, w, c]`` float32 around [0,1], videos ``[n, t, h, w, c]``; image ``i``
of a distilled set has label ``i // images_per_class``, unless the set is a merged one, whose parts may hold more
and fewer.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

# Without JAX a distilled set can still be read: `decode_numpy` and `torch_dataset` do not need it.
if find_spec("jax") is not None:
    from gsdd_jax import codecs, whiten
    from gsdd_jax.augment import DsaSpec as Dsa
    from gsdd_jax.codecs import GaussianSpec as SparseGaussians
    from gsdd_jax.codecs import PackedGaussianSpec as PackedGaussians
    from gsdd_jax.codecs import PixelSpec as Pixels
    from gsdd_jax.codecs import make as make_codec
    from gsdd_jax.gaussians import Gaussians
    from gsdd_jax.merged import MergedSet, load
    from gsdd_jax.render import render
    from gsdd_jax.synset import SynSet

__all__ = [
    "Accuracy",
    "ConvNet",
    "DistributionMatching",
    "Dsa",
    "Gaussians",
    "GradientMatching",
    "KernelRidgeRegression",
    "MergedSet",
    "Mmd",
    "PackedGaussians",
    "Pixels",
    "SparseGaussians",
    "SynSet",
    "Training",
    "TrajectoryMatching",
    "codecs",
    "device_data",
    "distill",
    "evaluate",
    "fit",
    "init_state",
    "load",
    "make_codec",
    "make_network",
    "make_objective",
    "make_step",
    "match",
    "nets",
    "render",
    "whiten",
]

if TYPE_CHECKING:
    from gsdd_jax import match, nets
    from gsdd_jax.learning import *
else:

    def __getattr__(name: str) -> Any:
        """Imports what needs networks, hence Flax and Optax, when it is asked for: reading a set does not."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in ("match", "nets"):
            return importlib.import_module(f"gsdd_jax.{name}")
        return getattr(importlib.import_module("gsdd_jax.learning"), name)

    def __dir__() -> list[str]:
        """Lists what is public, imported or not."""
        return [*globals(), *__all__]
