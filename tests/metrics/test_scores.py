import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from jdrop import metrics
from jdrop.inference import POOLS, pool
from jdrop.train import cross_entropy

pytestmark = pytest.mark.grid


@pytest.mark.parametrize("method", POOLS)
def test_scores_of_every_pool_equal_those_of_scikit_learn(predictions, method):
    log_probs, labels = predictions
    pooled = pool(log_probs, method)
    probs = np.exp(np.asarray(pooled, np.float64))
    probs /= probs.sum(1, keepdims=True)
    classes = list(range(5))
    expected = {
        "error": 1 - sklearn.metrics.accuracy_score(labels, probs.argmax(1)),
        "nll": sklearn.metrics.log_loss(labels, probs, labels=classes),
        "brier": sklearn.metrics.brier_score_loss(
            labels, probs, labels=classes, scale_by_half=False
        ),
    }
    for name, value in expected.items():
        assert float(getattr(metrics, name)(pooled, labels)) == pytest.approx(value, rel=1e-5), name


def test_losses_of_each_example_equal_numpy_and_average_to_the_scores(predictions, wide_probs):
    log_probs, labels = predictions
    losses = metrics.losses(log_probs[0], labels)
    truth = np.eye(5)[labels]
    expected = {
        "nll": -np.log(wide_probs[0][np.arange(300), labels]),
        "brier": ((wide_probs[0] - truth) ** 2).sum(1),
        "error": wide_probs[0].argmax(1) != labels,
    }
    assert losses.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(losses[name], values, rtol=2e-5, atol=1e-6, err_msg=name)
        assert losses[name].mean() == getattr(metrics, name)(log_probs[0], labels)


def test_scores_worked_by_hand():
    """The first example is classified correctly with 0.8, the second wrongly with 0.6."""
    log_probs = jnp.log(jnp.array([[0.8, 0.2], [0.6, 0.4]]))
    labels = jnp.array([0, 1])
    assert float(metrics.error(log_probs, labels)) == 0.5
    assert float(metrics.nll(log_probs, labels)) == pytest.approx(-math.log(0.8 * 0.4) / 2)
    assert float(metrics.brier(log_probs, labels)) == pytest.approx((0.08 + 0.72) / 2)


def test_a_uniform_prediction_scores_the_logarithm_of_the_number_of_classes():
    log_probs = jnp.full((6, 10), -math.log(10))
    labels = jnp.arange(6)
    assert float(metrics.nll(log_probs, labels)) == pytest.approx(math.log(10))
    assert float(metrics.brier(log_probs, labels)) == pytest.approx(0.9)


def test_averaging_never_scores_worse_than_the_mean_member(predictions):
    """By Jensen: NLL and Brier are convex in probabilities, and NLL in log-probabilities."""
    log_probs, labels = predictions
    for score in (metrics.nll, metrics.brier):
        members = jax.vmap(score, (0, None))(log_probs, labels)
        assert score(pool(log_probs), labels) <= members.mean()
    members = jax.vmap(metrics.nll, (0, None))(log_probs, labels)
    assert metrics.nll(pool(log_probs, "geometric"), labels) <= members.mean()


def test_huge_logits_score_finitely():
    log_probs = jax.nn.log_softmax(jnp.array([[1e4, -1e4], [-1e4, 1e4]]))
    labels = jnp.array([0, 0])
    for name in ("error", "nll", "brier", "ece", "debiased_ece"):
        assert math.isfinite(getattr(metrics, name)(log_probs, labels))


def test_the_nll_of_a_class_of_probability_0_is_infinite():
    log_probs = jnp.log(jnp.array([[1.0, 0.0], [1.0, 0.0]]))
    losses = metrics.losses(log_probs, jnp.array([0, 1]))
    assert {name: values.tolist() for name, values in losses.items()} == {
        "nll": [0, math.inf],
        "brier": [0, 2],
        "error": [0, 1],
    }


@pytest.mark.parametrize("name", ["error", "nll", "brier", "ece", "debiased_ece"])
def test_predictions_and_labels_of_other_shapes_or_dtypes_raise(predictions, name):
    """These shapes would broadcast, to a score without meaning."""
    score = getattr(metrics, name)
    log_probs, labels = predictions
    # In the tests jaxtyping may refuse the arrays first, with a TypeError.
    for wrong in [(log_probs, labels), (log_probs[0], labels[:, None]), (log_probs[0], labels / 1)]:
        with pytest.raises((ValueError, TypeError)):
            score(*wrong)
    with pytest.raises(ValueError, match=r"log_probs must be \[batch, class\].*inference.pool"):
        metrics.scores.checked(log_probs, labels)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(300,\), got int32"):
        metrics.scores.checked(log_probs[0], labels[:, None])
    with pytest.raises(ValueError, match=r"log_probs must be \[member, batch, class\].*\(300, 5\)"):
        metrics.scores.checked_members(log_probs[0])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_many_examples_lose_no_digits(dtype):
    """All examples are wrong at a confidence of 0.9, so every score is known."""
    n = 1_000_000 if dtype == jnp.float32 else 20_000
    log_probs = jnp.tile(jnp.log(jnp.array([[0.9, 0.1]])).astype(dtype), (n, 1))
    labels = jnp.ones(n, jnp.int32)
    confidence = float(jnp.exp(log_probs[0, 0].astype(jnp.float32)))
    assert float(metrics.ece(log_probs, labels)) == pytest.approx(confidence, rel=1e-4)
    assert float(metrics.error(log_probs, labels)) == 1
    assert float(metrics.nll(log_probs, labels)) == pytest.approx(-float(log_probs[0, 1]), rel=1e-4)
    other = float(jnp.exp(log_probs[0, 1].astype(jnp.float32)))
    brier = confidence**2 + (1 - other) ** 2
    assert float(metrics.brier(log_probs, labels)) == pytest.approx(brier, rel=1e-4)


def ambiguities(log_probs, labels):
    members = jnp.stack([log_probs, log_probs])
    methods = ("arithmetic NLL", "geometric NLL", "arithmetic Brier")
    return jnp.array([metrics.ambiguity(members, labels, method) for method in methods])


SCORES = {
    **{name: getattr(metrics, name) for name in ("error", "nll", "brier", "ece", "debiased_ece")},
    "losses": lambda *given: jnp.stack(list(metrics.losses(*given).values())),
    "reliability_curve": lambda *given: jnp.stack(metrics.reliability_curve(*given, num_bins=1)),
    "fit_temperature": metrics.fit_temperature,
    "calibrated_losses": lambda *given: metrics.calibrated_losses(jax.random.key(0), *given),
    "risk_coverage": metrics.risk_coverage,
    "q_statistic": lambda p, labels: metrics.q_statistic(jnp.stack([p, p]), labels),
    "ambiguity": ambiguities,
}


@pytest.mark.parametrize("name", SCORES)
def test_a_label_out_of_range_makes_every_score_nan(name):
    score = SCORES[name]
    log_probs = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 4))
    assert jnp.isfinite(score(log_probs, jnp.array([0, 1, 2, 0]))).all()
    for label in (-1, 3):
        assert jnp.isnan(score(log_probs, jnp.array([0, 1, 2, label]))).all(), label


@pytest.mark.parametrize(("dtype", "classes"), [("uint8", 256), ("uint8", 300), ("int8", 200)])
def test_labels_may_have_a_dtype_too_narrow_for_the_number_of_classes(dtype, classes):
    log_probs = jnp.log(jnp.full((3, classes), 1 / classes))
    labels = jnp.array([0, 7, 120], dtype)
    assert float(metrics.nll(log_probs, labels)) == pytest.approx(math.log(classes), rel=1e-5)
    assert float(metrics.brier(log_probs, labels)) == pytest.approx(1 - 1 / classes, rel=1e-5)
    assert jnp.isfinite(cross_entropy(log_probs, labels)).all()


def test_labels_may_have_an_unsigned_dtype():
    log_probs = jnp.log(jnp.array([[0.8, 0.2], [0.6, 0.4]]))
    assert float(metrics.error(log_probs, jnp.array([0, 1], jnp.uint8))) == 0.5
