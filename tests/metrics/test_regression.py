import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics

from jdrop import metrics

SCALE = 0.4


@pytest.fixture
def ensemble(rng):
    """Means of 6 members, `[member, batch]`, and targets."""
    function = rng.normal(size=120)
    means = function + 0.4 * rng.normal(size=(6, 120))
    return jnp.asarray(means), jnp.asarray(function + 0.5 * rng.normal(size=120))


def in_float64(ensemble):
    means, targets = ensemble
    return np.asarray(means, np.float64), np.asarray(targets, np.float64)


def test_the_rmse_equals_scikit_learn(ensemble):
    means, targets = ensemble
    expected = sklearn.metrics.root_mean_squared_error(targets, means.mean(0))
    assert float(metrics.rmse(means, targets)) == pytest.approx(expected, rel=1e-5)
    squares = metrics.squared_losses(means, targets)
    assert float(squares.mean()) == pytest.approx(expected**2, rel=1e-5)
    assert squares.shape == (120,)


def mixture_losses_in_float64(means, targets, scale):
    return -np.log(scipy.stats.norm.pdf(targets, means, scale).mean(0))


def test_the_mixture_losses_equal_scipy(ensemble):
    expected = mixture_losses_in_float64(*in_float64(ensemble), SCALE)
    actual = metrics.mixture_losses(*ensemble, SCALE)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_the_mixture_loss_of_a_target_far_from_every_mean_is_finite():
    losses = metrics.mixture_losses(jnp.zeros((2, 1)), jnp.full(1, 100.0), 0.5)
    assert float(losses[0]) == pytest.approx(-scipy.stats.norm.logpdf(100, 0, 0.5), rel=1e-6)


def test_the_crps_equals_its_integral(ensemble):
    """The integral of the squared distance of the distribution function from a step function."""
    means, targets = in_float64(ensemble)
    actual = metrics.crps_losses(*ensemble, SCALE)

    def integrand(x, example):
        below = scipy.special.ndtr((x - means[:, example]) / SCALE).mean()
        return (below - (x >= targets[example])) ** 2

    for example in range(15):
        expected = sum(
            scipy.integrate.quad(integrand, *ends, args=(example,), limit=200)[0]
            for ends in [(-12, targets[example]), (targets[example], 12)]
        )
        assert float(actual[example]) == pytest.approx(expected, rel=1e-4), example


def test_the_crps_of_a_single_member_equals_the_formula_for_a_normal_distribution(ensemble):
    """Gneiting and Raftery 2007, equation 21."""
    means, targets = in_float64(ensemble)
    z = (targets - means[0]) / SCALE
    normal = scipy.stats.norm
    expected = SCALE * (z * (2 * normal.cdf(z) - 1) + 2 * normal.pdf(z) - 1 / math.sqrt(math.pi))
    actual = metrics.crps_losses(ensemble[0][:1], ensemble[1], SCALE)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_coverage_is_the_share_of_targets_between_two_quantiles(ensemble, level):
    means, targets = in_float64(ensemble)

    def quantile(probability, example_means):
        def distance(x):
            return scipy.special.ndtr((x - example_means) / SCALE).mean() - probability

        return scipy.optimize.brentq(distance, -20, 20)

    tail = (1 - level) / 2
    inside = [
        quantile(tail, example_means) <= target <= quantile(1 - tail, example_means)
        for example_means, target in zip(means.T, targets, strict=True)
    ]
    assert 0 < np.mean(inside) < 1
    actual = metrics.interval_coverage(*ensemble, SCALE, level)
    assert float(actual) == pytest.approx(np.mean(inside), rel=1e-6)


def best_scale(means, targets):
    minimum = scipy.optimize.minimize_scalar(
        lambda log_scale: mixture_losses_in_float64(means, targets, math.exp(log_scale)).mean(),
        bounds=(-3, 2),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return math.exp(minimum.x)


def test_the_scale_has_the_greatest_likelihood_for_near_and_far_members(ensemble):
    means, targets = in_float64(ensemble)
    for spread in (0.01, 1, 6):
        spread_means = means.mean(0) + spread * (means - means.mean(0))
        expected = best_scale(spread_means, targets)
        actual = metrics.fit_scale(jnp.asarray(spread_means, jnp.float32), ensemble[1])
        assert float(actual) == pytest.approx(expected, rel=1e-4), spread


def test_the_scale_of_a_single_member_is_its_rmse(ensemble):
    means, targets = ensemble
    expected = float(metrics.rmse(means[:1], targets))
    assert float(metrics.fit_scale(means[:1], targets)) == pytest.approx(expected, rel=1e-6)
    same = jnp.tile(means[:1], (6, 1))
    assert float(metrics.fit_scale(same, targets)) == pytest.approx(expected, rel=1e-6)


def test_scores_follow_the_unit_of_the_targets(ensemble):
    means, targets = ensemble
    scale = metrics.fit_scale(means, targets)
    thousandth = 0.001 * means, 0.001 * targets
    assert float(metrics.fit_scale(*thousandth)) == pytest.approx(0.001 * float(scale), rel=1e-4)
    losses = metrics.mixture_losses(*thousandth, 0.001 * scale)
    expected = metrics.mixture_losses(means, targets, scale) - math.log(1000)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        1000 * metrics.crps_losses(*thousandth, 0.001 * scale),
        metrics.crps_losses(means, targets, scale),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_scale_is_fitted_on_one_half_and_scored_on_the_other(ensemble, getkey):
    means, targets = in_float64(ensemble)
    key = getkey()
    (split_key,) = jax.random.split(jax.random.clone(key), 1)
    order = np.asarray(jax.random.permutation(split_key, 120))
    expected = np.empty(120)
    for fitted, scored in ((order[:60], order[60:]), (order[60:], order[:60])):
        scale = best_scale(means[:, fitted], targets[fitted])
        expected[scored] = mixture_losses_in_float64(means[:, scored], targets[scored], scale)
    actual = metrics.calibrated_mixture_losses(key, *ensemble, num_repeats=1)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_scale_for_an_example_does_not_depend_on_its_target(ensemble, getkey):
    """So the losses of all possible targets of an example are a density, with integral 1."""
    means, targets = ensemble[0][:, :9], ensemble[1][:9]
    key = getkey()
    grid = jnp.linspace(-15, 15, 601)

    def density(target):
        losses = metrics.calibrated_mixture_losses(
            jax.random.clone(key), means, targets.at[0].set(target), num_repeats=1
        )
        return jnp.exp(-losses[0])

    assert float(jnp.trapezoid(jax.vmap(density)(grid), grid)) == pytest.approx(1, rel=1e-4)


def test_the_squared_error_of_an_average_is_that_of_its_members_less_their_variance(ensemble):
    means, targets = in_float64(ensemble)
    split = metrics.squared_ambiguity(*ensemble)
    assert float(split.members - split.diversity) == pytest.approx(float(split.pool), rel=1e-5)
    expected = (
        np.mean([sklearn.metrics.mean_squared_error(targets, member) for member in means]),
        means.var(0).mean(),
        sklearn.metrics.mean_squared_error(targets, means.mean(0)),
    )
    np.testing.assert_allclose(split, expected, rtol=1e-5)
    same = metrics.squared_ambiguity(jnp.tile(ensemble[0][:1], (6, 1)), ensemble[1])
    assert float(same.diversity) == pytest.approx(0, abs=1e-12)
    assert float(same.pool) == pytest.approx(float(same.members), rel=1e-6)


SCORES = {
    "squared_losses": lambda means, targets, scale: metrics.squared_losses(means, targets),
    "mixture_losses": metrics.mixture_losses,
    "crps_losses": metrics.crps_losses,
    "interval_coverage": metrics.interval_coverage,
    "fit_scale": lambda means, targets, scale: metrics.fit_scale(means, targets),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_do_not_depend_on_the_order_or_the_count_of_equal_members(ensemble, name):
    means, targets = ensemble
    expected = SCORES[name](means, targets, SCALE)
    order = jnp.array([3, 0, 2, 5, 1, 4])
    np.testing.assert_allclose(
        SCORES[name](means[order], targets, SCALE), expected, rtol=1e-4, atol=1e-6
    )
    single = SCORES[name](means[:1], targets, SCALE)
    repeated = SCORES[name](jnp.tile(means[:1], (6, 1)), targets, SCALE)
    np.testing.assert_allclose(repeated, single, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mixture_losses", "crps_losses", "interval_coverage"])
def test_a_scale_that_is_not_positive_gives_nan(ensemble, name):
    for scale in (0.0, -0.4, math.nan):
        assert jnp.isnan(SCORES[name](*ensemble, scale)).all()


def test_a_level_outside_0_to_1_gives_nan(ensemble):
    for level in (0.0, 1.0, 95.0):
        assert jnp.isnan(metrics.interval_coverage(*ensemble, SCALE, level))


def test_nan_means_give_nan(ensemble):
    means, targets = ensemble
    broken = means.at[0, 0].set(jnp.nan)
    for name, score in SCORES.items():
        assert jnp.isnan(score(broken, targets, SCALE)).any(), name


def test_means_and_targets_that_do_not_match_raise(ensemble):
    means, targets = ensemble
    match = r"means must be \[member, batch\].*got the shapes \(120,\) and \(120,\)"
    with pytest.raises(ValueError, match=match):
        metrics.regression._checked(means[0], targets)
    with pytest.raises(ValueError, match="means must be"):
        metrics.regression._checked(means, targets[:1])
    with pytest.raises(ValueError, match="at least 2 members, got 1"):
        metrics.squared_ambiguity(means[:1], targets)
    with pytest.raises(ValueError, match="at least 2 examples"):
        metrics.calibrated_mixture_losses(jax.random.key(0), means[:, :1], targets[:1])
