import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from jdrop import metrics


def test_the_entropy_equals_scipy(predictions, wide_probs):
    log_probs, _ = predictions
    expected = scipy.stats.entropy(wide_probs[0], axis=1)
    np.testing.assert_allclose(metrics.entropy(log_probs[0]), expected, rtol=1e-5)


def test_the_mutual_information_equals_scipy_and_stays_in_its_bounds(predictions, wide_probs):
    log_probs, _ = predictions
    information = metrics.mutual_information(log_probs)
    entropy_of_average = scipy.stats.entropy(wide_probs.mean(0), axis=1)
    expected = entropy_of_average - scipy.stats.entropy(wide_probs, axis=2).mean(0)
    np.testing.assert_allclose(information, expected, rtol=1e-4, atol=1e-6)
    assert ((information > 0) & (information < math.log(7))).all()
    np.testing.assert_allclose(
        metrics.mutual_information(log_probs[::-1]), information, rtol=1e-5, atol=1e-6
    )


def test_the_mutual_information_of_equal_members_is_0_and_never_negative(predictions):
    log_probs, _ = predictions
    same = jnp.tile(log_probs[:1], (7, 1, 1))
    information = metrics.mutual_information(same)
    np.testing.assert_allclose(information, 0, atol=1e-6)
    assert (information >= 0).all()
    certain = jnp.log(jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]]))
    assert metrics.mutual_information(certain).tolist() == [0]


def test_classes_of_probability_0_add_no_uncertainty():
    log_probs = jnp.log(jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(metrics.entropy(log_probs), [math.log(2), 0], atol=1e-7)
    contrary = jnp.log(jnp.array([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]))
    assert float(metrics.mutual_information(contrary)[0]) == pytest.approx(math.log(2))


def test_the_uncertainty_of_nan_predictions_is_nan():
    log_probs = jnp.array([[math.nan, math.nan], [-math.log(2), -math.log(2)]])
    assert jnp.isnan(metrics.entropy(log_probs)).tolist() == [True, False]
    members = jnp.stack([log_probs, log_probs[::-1]])
    assert jnp.isnan(metrics.mutual_information(members)).all()


def test_the_auroc_equals_scikit_learn(rng):
    scores = jnp.asarray(rng.normal(size=250).round(1))
    truth = np.arange(250) >= 100
    expected = sklearn.metrics.roc_auc_score(truth, scores)
    assert float(metrics.auroc(scores[:100], scores[100:])) == pytest.approx(expected, rel=1e-5)


def test_risk_coverage_is_the_error_of_the_most_confident_predictions(predictions):
    log_probs, labels = predictions
    risks = np.asarray(metrics.risk_coverage(log_probs[0], labels))
    probs = np.exp(np.asarray(log_probs[0], np.float64))
    order = np.argsort(-probs.max(1))
    wrong = (probs.argmax(1) != np.asarray(labels))[order]
    np.testing.assert_allclose(risks, [wrong[:k].mean() for k in range(1, 301)], rtol=1e-5)
    assert risks[-1] == pytest.approx(float(metrics.error(log_probs[0], labels)))


def test_nan_scores_and_predictions_make_auroc_error_and_risk_coverage_nan():
    for negatives, positives in (([0.1, jnp.nan], [0.4]), ([0.1], [0.4, jnp.nan])):
        assert jnp.isnan(metrics.auroc(jnp.array(negatives), jnp.array(positives)))
    broken = jnp.full((2, 3), jnp.nan)
    assert jnp.isnan(metrics.error(broken, jnp.zeros(2, int)))
    assert jnp.isnan(metrics.risk_coverage(broken, jnp.zeros(2, int))).all()
