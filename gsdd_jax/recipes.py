"""How other architectures are trained on a distilled set: the recipes of the field, by name.

A recipe turns the training settings of a run into those of one network. What its source leaves open comes from the
run, so that nothing is made up here.
"""

import dataclasses
from typing import Literal, get_args

from gsdd_jax.errors import InputError
from gsdd_jax.training import EvalSpec

Recipe = Literal["config", "gsdd", "glad", "dance"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)

# GSDD, appendix B.2: "the remaining" networks have 1e-2; it lists VGG11 and ResNet18, ConvNet is counted among them.
_GSDD_LR = {"alexnet": 1e-3, "vit": 5e-5}
_GSDD_LR_REMAINING = 1e-2
_GLAD_LR = {"convnet": 1e-3, "alexnet": 1e-3, "vgg11": 1e-4, "resnet18": 1e-3, "vit": 1e-3}


def recipe_for(recipe: Recipe, network: str, run: EvalSpec) -> EvalSpec:
    """Returns how a recipe trains a network.

    - ``config``: as the run says, for every network alike.
    - ``gsdd``: appendix B.2 of GSDD: Adam, 1e-3 for AlexNet, 5e-5 for ViT, 1e-2 for the remaining ones, a cosine, three
      networks. The paper is silent on epochs, batch, weight decay and averaging of weights; we take those of the run.
    - ``glad``: the code of GLaD (Cazenavette et al. 2023), which many later papers copy: SGD with momentum 0.9 and
      weight decay 5e-4, batch 256, 1000 epochs, rate up to half time and down along a cosine, 1e-4 for VGG11 and 1e-3
      for the others, mean of the weights with decay 0.995 per epoch, five networks. Deviations: the networks are tested
      once, at the end, where GLaD reports the best of all its tests; its ViT drops out, ours does not.
    - ``dance``: the code of DANCE (Zhang et al. 2024), nearly that of IDC: SGD at 0.01 with momentum 0.9 and weight
      decay 5e-4, batch 64, 1500 epochs, times 0.2 at 2/3 and 5/6, CutMix with probability 0.5. Deviation: tested once,
      at the end, where DANCE reports the best of all its tests.

    DSA is no part of a recipe; it is that of the run (GLaD: DSA; DANCE: without cutout; GSDD does not say).

    Args:
        recipe: Name of the recipe.
        network: Name of the network, as in ``NetSpec``.
        run: Training settings of the run.

    Returns:
        The settings; ``parallel``, which changes no result but rounding, is the run's.

    Raises:
        ValueError: Unknown recipe, or a network for which it has no learning rate.
    """
    if recipe == "config":
        return run
    if recipe == "dance":
        return EvalSpec(
            epochs=1500,
            batch=64,
            lr=0.01,
            momentum=0.9,
            weight_decay=5e-4,
            schedule="multistep",
            cutmix=0.5,
            seeds=run.seeds,
            parallel=run.parallel,
        )
    if network not in _GLAD_LR:
        raise InputError(f"network: {network!r}, recipe {recipe} is for one of {', '.join(_GLAD_LR)}")
    if recipe == "gsdd":
        lr = _GSDD_LR.get(network, _GSDD_LR_REMAINING)
        return dataclasses.replace(run, optimizer="adam", lr=lr, schedule="cosine", warmup_steps=0, seeds=3)
    if recipe == "glad":
        return EvalSpec(
            epochs=1000,
            batch=256,
            lr=_GLAD_LR[network],
            momentum=0.9,
            weight_decay=5e-4,
            schedule="warmup_cosine",
            ema=0.995,
            seeds=5,
            parallel=run.parallel,
        )
    raise InputError(f"recipe: {recipe!r}, must be one of {', '.join(RECIPES)}")
