"""DD-Ranking's scores against values worked out by hand, and their properties."""

import doctest
import math

import pytest

from gsdd_jax import ddranking
from gsdd_jax.ddranking import augmentation_robust_score, label_robust_score

E = math.e


def test_examples_in_docstrings_hold():
    result = doctest.testmod(ddranking)
    assert result.attempted == 2 and result.failed == 0


@pytest.mark.parametrize(
    ("full", "syn", "random", "weight", "exponent"),
    [(1, 1, 1, 0.5, 0), (1, 0, 1, 0.5, -1), (0, 1, 0, 0.5, 1), (0.75, 0.5, 0.25, 0.5, 0), (0.75, 0.5, 0.25, 1, 0.25)],
)
def test_label_robust_score_equals_its_definition(full, syn, random, weight, exponent):
    score = label_robust_score(full=full, syn_hard=syn, syn=syn, random=random, weight=weight)
    assert score == pytest.approx((E**exponent - 1 / E) / (E - 1 / E), abs=1e-12)


def test_label_robust_score_tells_hard_labels_from_the_own_recipe():
    # a = 0.5 * (0.75 - 0.25) - 0.5 * (1 - 0.5) = 0; with soft labels not counted it is -0.125.
    assert label_robust_score(full=1, syn_hard=0.5, syn=0.75, random=0.25) == pytest.approx(0.268941, abs=1e-6)
    assert label_robust_score(full=1, syn_hard=0.5, syn=0.5, random=0.25) == pytest.approx(0.2189487, abs=1e-6)


def test_augmentation_robust_score_equals_its_definition():
    accuracies = {"syn": 0.5, "random": 0.25, "syn_plain": 0.25, "random_plain": 0.5}
    assert augmentation_robust_score(**accuracies) == pytest.approx((1 - 1 / E) / (E - 1 / E))
    augmented = augmentation_robust_score(**accuracies, weight=1)
    assert augmented == pytest.approx((E**0.25 - 1 / E) / (E - 1 / E))
    assert augmentation_robust_score(**accuracies, weight=0) < augmented


@pytest.mark.parametrize("value", [54.2, -0.1, math.nan])
def test_percent_and_other_numbers_outside_the_unit_interval_are_refused_by_name(value):
    good = {"full": 0.5, "syn_hard": 0.5, "syn": 0.5, "random": 0.5}
    # The accuracy with hard labels is the argument `syn` of the recovery.
    for name, reported in (("full", "full"), ("syn_hard", "syn"), ("syn", "syn"), ("random", "random")):
        with pytest.raises(ValueError, match=rf"^{reported}: {value}, must be a fraction in \[0, 1\]"):
            label_robust_score(**good | {name: value})
    good = {"syn": 0.5, "random": 0.5, "syn_plain": 0.5, "random_plain": 0.5}
    for name in good:
        with pytest.raises(ValueError, match=rf": {value}, must be a fraction in \[0, 1\]"):
            augmentation_robust_score(**good | {name: value})
    with pytest.raises(ValueError, match=rf"^weight: {value}, must be"):
        augmentation_robust_score(**good, weight=value)
