import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jdrop import metrics
from jdrop.inference import pool

KINDS = ["arithmetic NLL", "geometric NLL", "arithmetic Brier"]
DIVERSITIES = {
    "disagreement": lambda log_probs, labels: metrics.disagreement(log_probs),
    "pairwise_kl": lambda log_probs, labels: metrics.pairwise_kl(log_probs),
    "q_statistic": metrics.q_statistic,
    **{kind: lambda *given, kind=kind: metrics.ambiguity(*given, kind).diversity for kind in KINDS},
}


def test_disagreement_is_a_mean_over_pairs(predictions, wide_probs):
    votes = wide_probs.argmax(-1)
    expected = np.mean([np.mean(a != b) for a, b in itertools.combinations(votes, 2)])
    assert float(metrics.disagreement(predictions[0])) == pytest.approx(expected, rel=1e-5)


def test_pairwise_kl_is_a_mean_over_ordered_pairs(predictions, wide_probs):
    pairs = itertools.permutations(wide_probs, 2)
    expected = np.mean([scipy.special.rel_entr(p, q).sum(-1).mean() for p, q in pairs])
    assert float(metrics.pairwise_kl(predictions[0])) == pytest.approx(expected, rel=1e-5)


def test_pairwise_kl_where_a_member_rules_out_a_class():
    """Infinite if another does not, were its probability too small for an exponential."""
    both = jnp.log(jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]]))
    assert float(metrics.pairwise_kl(both)) == 0
    one = jnp.log(jnp.array([[[1.0, 0.0]], [[0.5, 0.5]]]))
    assert float(metrics.pairwise_kl(one)) == math.inf
    tiny = jnp.array([[[0.0, -math.inf]], [[0.0, -1000.0]]])
    assert float(metrics.pairwise_kl(tiny)) == math.inf


def q_by_counting(right):
    values = []
    for a, b in itertools.combinations(right, 2):
        both, neither = np.sum(a & b), np.sum(~a & ~b)
        only_a, only_b = np.sum(a & ~b), np.sum(~a & b)
        total = both * neither + only_a * only_b
        if total:
            values.append((both * neither - only_a * only_b) / total)
    return np.mean(values)


def test_the_q_statistic_is_a_mean_over_pairs(informed):
    log_probs, labels = informed
    right = np.asarray(log_probs.argmax(-1)) == np.asarray(labels)
    actual = float(metrics.q_statistic(log_probs, labels))
    assert actual == pytest.approx(q_by_counting(right), rel=1e-4, abs=1e-6)
    # The last member is always right: its pairs are 0/0.
    perfect = log_probs.at[-1].set(jnp.log(jnp.eye(5))[labels])
    actual = float(metrics.q_statistic(perfect, labels))
    assert actual == pytest.approx(q_by_counting(right[:-1]), rel=1e-4, abs=1e-6)


def test_the_ends_of_the_q_statistic():
    right = jnp.log(jnp.array([0.9, 0.1]))
    wrong = right[::-1]
    labels = jnp.zeros(2, int)
    same = jnp.stack([jnp.stack([right, wrong])] * 2)
    assert float(metrics.q_statistic(same, labels)) == 1
    assert float(metrics.q_statistic(same.at[1].set(same[1, ::-1]), labels)) == -1
    always = jnp.stack([jnp.stack([right, right])] * 2)
    assert math.isnan(metrics.q_statistic(always, labels))


def ambiguity_in_float64(probs, labels, kind):
    truth, indices = np.eye(5)[labels], np.arange(len(labels))
    average = probs.mean(0)
    if kind == "arithmetic Brier":
        return (
            np.mean([((p - truth) ** 2).sum(1).mean() for p in probs]),
            np.mean([((p - average) ** 2).sum(1).mean() for p in probs]),
            ((average - truth) ** 2).sum(1).mean(),
        )
    members = np.mean([-np.log(p[indices, labels]).mean() for p in probs])
    if kind == "arithmetic NLL":
        ratios = [np.log(average[indices, labels] / p[indices, labels]).mean() for p in probs]
        return members, np.mean(ratios), -np.log(average[indices, labels]).mean()
    geometric = np.exp(np.log(probs).mean(0))
    geometric /= geometric.sum(1, keepdims=True)
    divergences = [scipy.special.rel_entr(geometric, p).sum(1).mean() for p in probs]
    return members, np.mean(divergences), -np.log(geometric[indices, labels]).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_pool_is_its_members_less_their_diversity(informed, wide_probs, kind):
    log_probs, labels = informed
    parts = metrics.ambiguity(log_probs, labels, kind)
    assert float(parts.members - parts.diversity) == pytest.approx(float(parts.pool), rel=1e-5)
    expected = ambiguity_in_float64(wide_probs, np.asarray(labels), kind)
    np.testing.assert_allclose(parts, expected, rtol=1e-5)
    of_pool, name = kind.split()
    score = getattr(metrics, name.lower())(pool(log_probs, of_pool), labels)
    assert float(parts.pool) == pytest.approx(float(score), rel=1e-6)


def test_which_diversity_depends_on_the_labels(informed):
    log_probs, labels = informed
    others = (labels + 1) % 5
    for kind in KINDS:
        before, after = (
            float(metrics.ambiguity(log_probs, chosen, kind).diversity)
            for chosen in (labels, others)
        )
        assert (before == after) == (kind != "arithmetic NLL"), kind


@pytest.mark.parametrize("name", DIVERSITIES)
def test_the_order_of_members_is_nothing(informed, name):
    log_probs, labels = informed
    diversity = DIVERSITIES[name]
    expected = float(diversity(log_probs, labels))
    order = jnp.array([3, 0, 6, 2, 5, 1, 4])
    assert float(diversity(log_probs[order], labels)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", DIVERSITIES)
def test_members_that_are_the_same_have_no_diversity(informed, name):
    log_probs, labels = informed
    same = jnp.tile(log_probs[:1], (7, 1, 1))
    expected = 1 if name == "q_statistic" else 0
    assert float(DIVERSITIES[name](same, labels)) == pytest.approx(expected, abs=1e-6)
    if name in KINDS:
        parts = metrics.ambiguity(same, labels, name)
        assert float(parts.pool) == pytest.approx(float(parts.members), rel=1e-6)


@pytest.mark.parametrize("name", DIVERSITIES)
def test_a_prediction_that_is_no_number_makes_diversity_none(informed, name):
    log_probs, labels = informed
    not_the_label = (int(labels[0]) + 1) % 5
    broken = log_probs.at[-1, 0, not_the_label].set(math.nan)
    assert math.isnan(DIVERSITIES[name](broken, labels))


@pytest.mark.parametrize("name", DIVERSITIES)
def test_one_member_has_no_diversity_to_speak_of(informed, name):
    log_probs, labels = informed
    with pytest.raises(ValueError, match="at least 2 members, got 1"):
        DIVERSITIES[name](log_probs[:1], labels)


def test_a_class_that_one_member_rules_out():
    """The average keeps it; the geometric one does not, and loses infinitely if it happens."""
    log_probs = jnp.log(jnp.array([[[1.0, 0.0]], [[0.5, 0.5]]]))
    kept = metrics.ambiguity(log_probs, jnp.array([1]), "arithmetic NLL")
    assert (float(kept.members), float(kept.diversity)) == (math.inf, math.inf)
    assert float(kept.pool) == pytest.approx(math.log(4))
    lost = metrics.ambiguity(log_probs, jnp.array([1]), "geometric NLL")
    assert (float(lost.members), float(lost.pool)) == (math.inf, math.inf)
    # The geometric average is certain of the first class.
    assert float(lost.diversity) == pytest.approx(math.log(2) / 2)
    brier = metrics.ambiguity(log_probs, jnp.array([1]), "arithmetic Brier")
    np.testing.assert_allclose(brier, [1.25, 0.125, 1.125], rtol=1e-6)


def test_an_unknown_kind_is_an_error(informed):
    # With the tests' type checks on, the annotations refuse it too, as a TypeError.
    with pytest.raises((ValueError, TypeError)):
        metrics.ambiguity(*informed, "geometric Brier")
