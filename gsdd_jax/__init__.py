"""Dataset distillation with sparse 2-D Gaussians (GSDD) in JAX.

Glossary: *real* / *syn* (synthetic) images; *ipc*, a budget in float32 pixel images per class; *gpc*, Gaussian images
per class; *codec*, a parameterization of images; *budget*, bytes per class; *expert* / *student*, networks trained on
real / synthetic images; *syn_lr*, the learned step size of a student.

Dimension letters: ``n`` images, ``m`` Gaussians per image, ``h w c`` pixels, ``k`` classes, ``t`` inner steps, ``p``
flat weights. Images are ``[n, h, w, c]`` float32 around [0,1]; image ``i`` of a distilled set has label ``i //
images_per_class``, unless the set is a merged one, whose parts may hold more and fewer.
"""

from importlib.util import find_spec

# Without JAX a distilled set can still be read: `decode_numpy` and `torch_dataset` need NumPy alone.
if find_spec("jax") is not None:
    from gsdd_jax.gaussians import Gaussians
    from gsdd_jax.merged import MergedSet, load
    from gsdd_jax.render import render
    from gsdd_jax.synset import SynSet

__all__ = ["Gaussians", "MergedSet", "SynSet", "load", "render"]
