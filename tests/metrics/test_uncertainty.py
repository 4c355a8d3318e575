import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from jdrop import metrics


def test_the_entropy_is_that_of_scipy(predictions, wide_probs):
    log_probs, _ = predictions
    expected = scipy.stats.entropy(wide_probs[0], axis=1)
    np.testing.assert_allclose(metrics.entropy(log_probs[0]), expected, rtol=1e-5)


def test_the_mutual_information_is_that_of_scipy(predictions, wide_probs):
    """The entropy of the average less the average entropy, and what bounds it."""
    log_probs, _ = predictions
    information = metrics.mutual_information(log_probs)
    of_average = scipy.stats.entropy(wide_probs.mean(0), axis=1)
    expected = of_average - scipy.stats.entropy(wide_probs, axis=2).mean(0)
    np.testing.assert_allclose(information, expected, rtol=1e-4, atol=1e-6)
    assert ((information > 0) & (information < math.log(7))).all()
    np.testing.assert_allclose(
        metrics.mutual_information(log_probs[::-1]), information, rtol=1e-5, atol=1e-6
    )


def test_members_that_agree_tell_nothing_of_each_other(predictions):
    """And rounding makes no information negative."""
    log_probs, _ = predictions
    same = jnp.tile(log_probs[:1], (7, 1, 1))
    information = metrics.mutual_information(same)
    np.testing.assert_allclose(information, 0, atol=1e-6)
    assert (information >= 0).all()
    certain = jnp.log(jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]]))
    assert metrics.mutual_information(certain).tolist() == [0]


def test_classes_ruled_out_add_nothing():
    log_probs = jnp.log(jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(metrics.entropy(log_probs), [math.log(2), 0], atol=1e-7)
    contrary = jnp.log(jnp.array([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]))
    assert float(metrics.mutual_information(contrary)[0]) == pytest.approx(math.log(2))


def test_predictions_that_are_nan_have_no_uncertainty():
    """Not 0, which would be certainty."""
    log_probs = jnp.array([[math.nan, math.nan], [-math.log(2), -math.log(2)]])
    assert jnp.isnan(metrics.entropy(log_probs)).tolist() == [True, False]
    members = jnp.stack([log_probs, log_probs[::-1]])
    assert jnp.isnan(metrics.mutual_information(members)).all()


def test_the_auroc_is_that_of_scikit_learn(rng):
    scores = jnp.asarray(rng.normal(size=250).round(1))
    truth = np.arange(250) >= 100
    expected = sklearn.metrics.roc_auc_score(truth, scores)
    assert float(metrics.auroc(scores[:100], scores[100:])) == pytest.approx(expected, rel=1e-5)


def test_risk_coverage_is_the_error_of_the_most_confident(predictions):
    log_probs, labels = predictions
    risks = np.asarray(metrics.risk_coverage(log_probs[0], labels))
    probs = np.exp(np.asarray(log_probs[0], np.float64))
    order = np.argsort(-probs.max(1))
    wrong = (probs.argmax(1) != np.asarray(labels))[order]
    np.testing.assert_allclose(risks, [wrong[:k].mean() for k in range(1, 301)], rtol=1e-5)
    assert risks[-1] == pytest.approx(float(metrics.error(log_probs[0], labels)))


def test_scores_that_are_no_numbers_give_none():
    for negatives, positives in (([0.1, jnp.nan], [0.4]), ([0.1], [0.4, jnp.nan])):
        assert jnp.isnan(metrics.auroc(jnp.array(negatives), jnp.array(positives)))
    broken = jnp.full((2, 3), jnp.nan)
    assert jnp.isnan(metrics.error(broken, jnp.zeros(2, int)))
    assert jnp.isnan(metrics.risk_coverage(broken, jnp.zeros(2, int))).all()
