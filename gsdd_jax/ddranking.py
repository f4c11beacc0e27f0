"""DD-Ranking's two scores (Li et al. 2025), from accuracies: what a set adds beyond its recipe of training.

An accuracy alone mixes the worth of a set with that of soft labels, augmentation and learning rate. Both scores compare
with random real images trained in the same way, and the first one with the full data as well.

Deviations from the published code, which departs from its own definition: accuracies are fractions, so that the scores
lie in [0, 1] (the code puts percent into the exponential), and they are those of the last weights (the code takes the
maximum over tests during training, a choice made on the test set).
"""

import math

from gsdd_jax.errors import InputError

_LOWEST, _HIGHEST = math.exp(-1), math.exp(1)


def hard_label_recovery(full: float, syn: float) -> float:
    """Returns HLR, how much accuracy is lost against the full data; both trained with hard labels.

    Args:
        full: Accuracy of networks trained on the full data, a fraction.
        syn: Accuracy of networks trained on the set with hard labels, a fraction.

    Returns:
        full - syn, in [-1, 1]; smaller is better.

    Raises:
        ValueError: An accuracy is not in [0, 1].
    """
    return _fraction("full", full) - _fraction("syn", syn)


def improvement_over_random(syn: float, random: float) -> float:
    """Returns IOR, how much accuracy is gained over random real images at the same ipc, trained by the same recipe.

    Args:
        syn: Accuracy of networks trained on the set, a fraction.
        random: Accuracy of networks trained on random real images, a fraction.

    Returns:
        syn - random, in [-1, 1]; larger is better.

    Raises:
        ValueError: An accuracy is not in [0, 1].
    """
    return _fraction("syn", syn) - _fraction("random", random)


def label_robust_score(*, full: float, syn_hard: float, syn: float, random: float, weight: float = 0.5) -> float:
    """Returns LRS: with a = weight * IOR - (1 - weight) * HLR, (e^a - e^-1) / (e - e^-1).

    Args:
        full: Accuracy of the full data with hard labels, a fraction.
        syn_hard: Accuracy of the set with hard labels.
        syn: Accuracy of the set under its own recipe; `syn_hard` again where its labels are hard.
        random: Accuracy of random real images at the same ipc under that recipe.
        weight: Share of IOR, 0 to 1.

    Returns:
        A number in [0, 1]; 0.269 where a = 0, such as where the three do equally well.

    Raises:
        ValueError: An accuracy or the weight is not in [0, 1].

    Examples:
        >>> round(label_robust_score(full=0.9, syn_hard=0.6, syn=0.6, random=0.4), 4)
        0.2482
    """
    weight = _fraction("weight", weight)
    gain, loss = improvement_over_random(syn, random), hard_label_recovery(full, syn_hard)
    return _normalized(weight * gain - (1 - weight) * loss)


def augmentation_robust_score(
    *, syn: float, random: float, syn_plain: float, random_plain: float, weight: float = 0.5
) -> float:
    """Returns ARS: with b = weight * IOR augmented + (1 - weight) * IOR plain, (e^b - e^-1) / (e - e^-1).

    Args:
        syn: Accuracy of the set, networks trained with augmentation, a fraction.
        random: Likewise of random real images at the same ipc.
        syn_plain: Accuracy of the set without augmentation.
        random_plain: Likewise of random real images.
        weight: Share of the augmented part, 0 to 1.

    Returns:
        A number in [0, 1]; 0.269 for a set that is worth as much as random images.

    Raises:
        ValueError: An accuracy or the weight is not in [0, 1].

    Examples:
        >>> round(augmentation_robust_score(syn=0.6, random=0.4, syn_plain=0.5, random_plain=0.4), 4)
        0.3378
    """
    weight = _fraction("weight", weight)
    plain = improvement_over_random(syn_plain, random_plain)
    return _normalized(weight * improvement_over_random(syn, random) + (1 - weight) * plain)


def _normalized(exponent: float) -> float:
    return (math.exp(exponent) - _LOWEST) / (_HIGHEST - _LOWEST)


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"{name}: {value}, must be a fraction in [0, 1]")
    return float(value)
