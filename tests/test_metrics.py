import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn.metrics

from jdrop import metrics
from jdrop.inference import POOLS, pool
from jdrop.train import cross_entropy


@pytest.fixture
def predictions(getkey):
    """Random predictions of 7 members, `[member, batch, class]`, and labels."""
    logit_key, label_key = jax.random.split(getkey())
    log_probs = jax.nn.log_softmax(2 * jax.random.normal(logit_key, (7, 300, 5)))
    return log_probs, jax.random.randint(label_key, (300,), 0, 5)


def ece_in_float64(log_probs, labels, num_bins):
    probs = np.exp(np.asarray(log_probs, np.float64))
    confidence, right = probs.max(1), probs.argmax(1) == np.asarray(labels)
    total = 0.0
    for b in range(num_bins):
        inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("kind", POOLS)
def test_scores_of_every_pool_equal_those_of_scikit_learn(predictions, kind):
    log_probs, labels = predictions
    pooled = pool(log_probs, kind)
    probs = np.exp(np.asarray(pooled, np.float64))
    probs /= probs.sum(1, keepdims=True)
    classes = list(range(5))
    expected = {
        "error": 1 - sklearn.metrics.accuracy_score(labels, probs.argmax(1)),
        "nll": sklearn.metrics.log_loss(labels, probs, labels=classes),
        "brier": sklearn.metrics.brier_score_loss(
            labels, probs, labels=classes, scale_by_half=False
        ),
        "ece": ece_in_float64(pooled, labels, 15),
    }
    for name, value in expected.items():
        assert float(getattr(metrics, name)(pooled, labels)) == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("num_bins", [1, 2, 10, 15])
def test_ece_equals_its_definition_in_float64(predictions, num_bins):
    log_probs, labels = predictions
    expected = ece_in_float64(log_probs[0], labels, num_bins)
    assert float(metrics.ece(log_probs[0], labels, num_bins=num_bins)) == pytest.approx(
        expected, rel=1e-4
    )


def test_a_confidence_of_exactly_one_is_counted():
    log_probs = jnp.array([[0.0, -math.inf], [0.0, -math.inf]])
    assert float(metrics.ece(log_probs, jnp.array([0, 1]))) == 0.5
    assert float(metrics.ece(log_probs, jnp.array([1, 1]))) == 1.0


def test_bins_are_closed_on_the_right():
    """Confidences 0.5 and 0.75 share the bin (0.25, 0.5] with nothing: one bin each of four."""
    log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
    labels = jnp.array([1, 0])
    # Bins (.25, .5] and (.5, .75]: |0 - .5| / 2 + |1 - .75| / 2.
    assert float(metrics.ece(log_probs, labels, num_bins=4)) == pytest.approx(0.375)


def test_scores_worked_by_hand():
    """Two examples, two classes: one right with 0.8, one wrong with 0.6."""
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
    """Jensen: NLL and Brier are convex in the probabilities, NLL also in their logarithms."""
    log_probs, labels = predictions
    for score in (metrics.nll, metrics.brier):
        members = jax.vmap(score, (0, None))(log_probs, labels)
        assert score(pool(log_probs), labels) <= members.mean()
    members = jax.vmap(metrics.nll, (0, None))(log_probs, labels)
    assert metrics.nll(pool(log_probs, "geometric"), labels) <= members.mean()


def test_huge_logits_score_finitely():
    log_probs = jax.nn.log_softmax(jnp.array([[1e4, -1e4], [-1e4, 1e4]]))
    labels = jnp.array([0, 0])
    for name in ("error", "nll", "brier", "ece"):
        assert math.isfinite(getattr(metrics, name)(log_probs, labels))


def test_no_bins_are_an_error(predictions):
    log_probs, labels = predictions
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        metrics.ece(log_probs[0], labels, num_bins=0)


@pytest.mark.parametrize("name", ["error", "nll", "brier", "ece"])
def test_what_is_not_one_prediction_for_each_label_is_an_error(predictions, name):
    """Shapes that would broadcast to a number that means nothing."""
    score = getattr(metrics, name)
    log_probs, labels = predictions
    # With the tests' type checks on, the annotations refuse them too, as a TypeError.
    for wrong in [(log_probs, labels), (log_probs[0], labels[:, None]), (log_probs[0], labels / 1)]:
        with pytest.raises((ValueError, TypeError)):
            score(*wrong)
    with pytest.raises(ValueError, match=r"log_probs must be \[batch, class\].*inference.pool"):
        metrics.scores.checked(log_probs, labels)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(300,\), got int32"):
        metrics.scores.checked(log_probs[0], labels[:, None])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_many_examples_lose_no_digits(dtype):
    """All wrong at a confidence of nine tenths: every score is known."""
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


@pytest.mark.parametrize("score", [metrics.error, metrics.nll, metrics.brier, metrics.ece])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_makes_every_score_nan(score, label):
    log_probs = jnp.log(jnp.full((4, 3), 1 / 3))
    assert jnp.isfinite(score(log_probs, jnp.array([0, 1, 2, 2])))
    assert jnp.isnan(score(log_probs, jnp.array([0, 1, 2, label])))


@pytest.mark.parametrize(("dtype", "classes"), [("uint8", 256), ("uint8", 300), ("int8", 200)])
def test_more_classes_than_the_dtype_of_the_labels_holds(dtype, classes):
    log_probs = jnp.log(jnp.full((3, classes), 1 / classes))
    labels = jnp.array([0, 7, 120], dtype)
    assert float(metrics.nll(log_probs, labels)) == pytest.approx(math.log(classes), rel=1e-5)
    assert jnp.isfinite(cross_entropy(log_probs, labels)).all()


def test_labels_of_any_integer_dtype():
    log_probs = jnp.log(jnp.array([[0.8, 0.2], [0.6, 0.4]]))
    assert float(metrics.error(log_probs, jnp.array([0, 1], jnp.uint8))) == 0.5


@pytest.fixture
def informed(predictions, getkey):
    """The same predictions, and labels that are likelier where the first member says so."""
    return predictions[0], jax.random.categorical(getkey(), predictions[0][0] / 2)


def test_the_temperature_minimises_the_nll(informed):
    log_probs, labels = informed

    def loss(log_temperature):
        tempered = jax.nn.log_softmax(log_probs[0] / np.exp(log_temperature))
        return float(metrics.nll(tempered, labels))

    expected = scipy.optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded")
    temperature = float(metrics.fit_temperature(log_probs[0], labels))
    assert loss(np.log(temperature)) <= expected.fun + 1e-6


@pytest.mark.parametrize("truth", [0.25, 1.0, 4.0])
def test_the_temperature_of_labels_drawn_from_the_prediction(truth, getkey):
    """Of logits that are too large by a factor, the temperature is that factor."""
    logits = 2 * jax.random.normal(getkey(), (20_000, 4))
    labels = jax.random.categorical(getkey(), logits)
    temperature = metrics.fit_temperature(jax.nn.log_softmax(logits * truth), labels)
    assert float(temperature) == pytest.approx(truth, rel=0.05)


def test_the_ends_of_the_temperature():
    right = jnp.log(jnp.array([[0.6, 0.4], [0.4, 0.6]]))
    assert float(metrics.fit_temperature(right, jnp.array([0, 1]))) == pytest.approx(1 / 20, rel=1e-3)
    assert float(metrics.fit_temperature(right, jnp.array([1, 0]))) == pytest.approx(20, rel=1e-3)
    impossible = jnp.log(jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    assert jnp.isfinite(metrics.fit_temperature(impossible, jnp.array([0, 1])))
    assert jnp.isnan(metrics.fit_temperature(right, jnp.array([0, 2])))


def test_the_calibrated_nll_fits_on_one_half_and_scores_the_other(informed, getkey):
    log_probs, labels = informed
    key = getkey()
    (halving,) = jax.random.split(jax.random.clone(key), 1)
    order = np.asarray(jax.random.permutation(halving, 300))
    losses = []
    for fitted, scored in ((order[:150], order[150:]), (order[150:], order[:150])):
        temperature = metrics.fit_temperature(log_probs[0, fitted], labels[fitted])
        tempered = jax.nn.log_softmax(log_probs[0, scored] / temperature)
        losses.append(float(metrics.nll(tempered, labels[scored])))
    actual = float(metrics.calibrated_nll(key, log_probs[0], labels, num_repeats=1))
    assert actual == pytest.approx(np.mean(losses), rel=1e-5)
    # Logits three times as large are the same after calibration.
    thrice = jax.nn.log_softmax(3 * log_probs[0])
    again = metrics.calibrated_nll(jax.random.clone(key), thrice, labels, num_repeats=1)
    assert float(again) == pytest.approx(actual, rel=1e-4)


@pytest.mark.parametrize(("examples", "repeats"), [(1, 5), (4, 0)])
def test_too_few_to_calibrate_are_an_error(examples, repeats, getkey):
    log_probs, labels = jnp.log(jnp.full((examples, 2), 0.5)), jnp.zeros(examples, int)
    with pytest.raises(ValueError, match="must"):
        metrics.calibrated_nll(getkey(), log_probs, labels, num_repeats=repeats)


def test_the_entropy_is_that_of_scipy(predictions):
    log_probs, _ = predictions
    expected = scipy.stats.entropy(np.exp(np.asarray(log_probs[0], np.float64)), axis=1)
    np.testing.assert_allclose(metrics.entropy(log_probs[0]), expected, rtol=1e-5)


def test_the_auroc_is_that_of_scikit_learn(getkey):
    scores = jnp.round(jax.random.normal(getkey(), (250,)), 1)
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
