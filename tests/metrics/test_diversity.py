import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jdrop import metrics
from jdrop.inference import pool

METHODS = ["arithmetic NLL", "geometric NLL", "arithmetic Brier"]
DIVERSITIES = {
    "disagreement": lambda log_probs, labels: metrics.disagreement(log_probs),
    "pairwise_kl": lambda log_probs, labels: metrics.pairwise_kl(log_probs),
    "q_statistic": metrics.q_statistic,
    **{
        method: lambda *given, method=method: metrics.ambiguity(*given, method).diversity
        for method in METHODS
    },
}


def test_disagreement_is_a_mean_over_pairs(predictions, wide_probs):
    votes = wide_probs.argmax(-1)
    expected = np.mean([np.mean(a != b) for a, b in itertools.combinations(votes, 2)])
    assert float(metrics.disagreement(predictions[0])) == pytest.approx(expected, rel=1e-5)


def test_pairwise_kl_is_a_mean_over_ordered_pairs(predictions, wide_probs):
    pairs = itertools.permutations(wide_probs, 2)
    expected = np.mean([scipy.special.rel_entr(p, q).sum(-1).mean() for p, q in pairs])
    assert float(metrics.pairwise_kl(predictions[0])) == pytest.approx(expected, rel=1e-5)


def test_pairwise_kl_is_infinite_if_only_some_members_rule_out_a_class():
    """Even if the other members' probability underflows to 0."""
    both_rule_out = jnp.log(jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]]))
    assert float(metrics.pairwise_kl(both_rule_out)) == 0
    first_rules_out = jnp.log(jnp.array([[[1.0, 0.0]], [[0.5, 0.5]]]))
    assert float(metrics.pairwise_kl(first_rules_out)) == math.inf
    tiny = jnp.array([[[0.0, -math.inf]], [[0.0, -1000.0]]])
    assert float(metrics.pairwise_kl(tiny)) == math.inf


def q_by_counting(correct):
    values = []
    for a, b in itertools.combinations(correct, 2):
        both, neither = np.sum(a & b), np.sum(~a & ~b)
        only_a, only_b = np.sum(a & ~b), np.sum(~a & b)
        total = both * neither + only_a * only_b
        if total:
            values.append((both * neither - only_a * only_b) / total)
    return np.mean(values)


def test_the_q_statistic_is_a_mean_over_pairs(informed):
    log_probs, labels = informed
    correct = np.asarray(log_probs.argmax(-1)) == np.asarray(labels)
    actual = float(metrics.q_statistic(log_probs, labels))
    assert actual == pytest.approx(q_by_counting(correct), rel=1e-4, abs=1e-6)
    # The last member is always correct, so Q of its pairs is 0/0.
    perfect = log_probs.at[-1].set(jnp.log(jnp.eye(5))[labels])
    actual = float(metrics.q_statistic(perfect, labels))
    assert actual == pytest.approx(q_by_counting(correct[:-1]), rel=1e-4, abs=1e-6)


def test_the_q_statistic_is_1_minus_1_or_nan_in_the_extremes():
    right = jnp.log(jnp.array([0.9, 0.1]))
    wrong = right[::-1]
    labels = jnp.zeros(2, int)
    same = jnp.stack([jnp.stack([right, wrong])] * 2)
    assert float(metrics.q_statistic(same, labels)) == 1
    assert float(metrics.q_statistic(same.at[1].set(same[1, ::-1]), labels)) == -1
    always = jnp.stack([jnp.stack([right, right])] * 2)
    assert math.isnan(metrics.q_statistic(always, labels))


def ambiguity_in_float64(probs, labels, method):
    truth, indices = np.eye(5)[labels], np.arange(len(labels))
    average = probs.mean(0)
    if method == "arithmetic Brier":
        return (
            np.mean([((p - truth) ** 2).sum(1).mean() for p in probs]),
            np.mean([((p - average) ** 2).sum(1).mean() for p in probs]),
            ((average - truth) ** 2).sum(1).mean(),
        )
    members = np.mean([-np.log(p[indices, labels]).mean() for p in probs])
    if method == "arithmetic NLL":
        ratios = [np.log(average[indices, labels] / p[indices, labels]).mean() for p in probs]
        return members, np.mean(ratios), -np.log(average[indices, labels]).mean()
    geometric = np.exp(np.log(probs).mean(0))
    geometric /= geometric.sum(1, keepdims=True)
    divergences = [scipy.special.rel_entr(geometric, p).sum(1).mean() for p in probs]
    return members, np.mean(divergences), -np.log(geometric[indices, labels]).mean()


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_a_pool_is_its_members_less_their_diversity(informed, wide_probs, method):
    log_probs, labels = informed
    split = metrics.ambiguity(log_probs, labels, method)
    assert float(split.members - split.diversity) == pytest.approx(float(split.pool), rel=1e-5)
    expected = ambiguity_in_float64(wide_probs, np.asarray(labels), method)
    np.testing.assert_allclose(split, expected, rtol=1e-5)
    pool_method, score_name = method.split()
    score = getattr(metrics, score_name.lower())(pool(log_probs, pool_method), labels)
    assert float(split.pool) == pytest.approx(float(score), rel=1e-6)


def test_only_the_diversity_of_the_arithmetic_nll_depends_on_the_labels(informed):
    log_probs, labels = informed
    others = (labels + 1) % 5
    for method in METHODS:
        before, after = (
            float(metrics.ambiguity(log_probs, chosen, method).diversity)
            for chosen in (labels, others)
        )
        assert (before == after) == (method != "arithmetic NLL"), method


@pytest.mark.parametrize("name", DIVERSITIES)
def test_diversity_does_not_depend_on_the_order_of_members(informed, name):
    log_probs, labels = informed
    diversity = DIVERSITIES[name]
    expected = float(diversity(log_probs, labels))
    order = jnp.array([3, 0, 6, 2, 5, 1, 4])
    assert float(diversity(log_probs[order], labels)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", DIVERSITIES)
def test_equal_members_have_no_diversity(informed, name):
    log_probs, labels = informed
    same = jnp.tile(log_probs[:1], (7, 1, 1))
    expected = 1 if name == "q_statistic" else 0
    assert float(DIVERSITIES[name](same, labels)) == pytest.approx(expected, abs=1e-6)
    if name in METHODS:
        split = metrics.ambiguity(same, labels, name)
        assert float(split.pool) == pytest.approx(float(split.members), rel=1e-6)


@pytest.mark.parametrize("name", DIVERSITIES)
def test_a_nan_prediction_makes_diversity_nan(informed, name):
    log_probs, labels = informed
    not_the_label = (int(labels[0]) + 1) % 5
    broken = log_probs.at[-1, 0, not_the_label].set(math.nan)
    assert math.isnan(DIVERSITIES[name](broken, labels))


@pytest.mark.parametrize("name", DIVERSITIES)
def test_the_diversity_of_a_single_member_raises(informed, name):
    log_probs, labels = informed
    with pytest.raises(ValueError, match="at least 2 members, got 1"):
        DIVERSITIES[name](log_probs[:1], labels)


def test_the_geometric_pool_alone_rules_out_what_a_single_member_rules_out():
    log_probs = jnp.log(jnp.array([[[1.0, 0.0]], [[0.5, 0.5]]]))
    arithmetic = metrics.ambiguity(log_probs, jnp.array([1]), "arithmetic NLL")
    assert (float(arithmetic.members), float(arithmetic.diversity)) == (math.inf, math.inf)
    assert float(arithmetic.pool) == pytest.approx(math.log(4))
    geometric = metrics.ambiguity(log_probs, jnp.array([1]), "geometric NLL")
    assert (float(geometric.members), float(geometric.pool)) == (math.inf, math.inf)
    # The geometric pool is certain of the first class.
    assert float(geometric.diversity) == pytest.approx(math.log(2) / 2)
    brier = metrics.ambiguity(log_probs, jnp.array([1]), "arithmetic Brier")
    np.testing.assert_allclose(brier, [1.25, 0.125, 1.125], rtol=1e-6)


def test_an_unknown_ambiguity_method_raises(informed):
    # In the tests jaxtyping may refuse the method first, with a TypeError.
    with pytest.raises((ValueError, TypeError)):
        metrics.ambiguity(*informed, "geometric Brier")
