"""Losses with crossed effects of replicates and examples, and another way to their interval."""

import math

from scipy import stats


def crossed_effects(rng, replicates, examples, replicate_std, example_std, interaction_std):
    """Losses of mean 0 with normal effects of the given standard deviations."""
    return (
        replicate_std * rng.normal(size=(replicates, 1))
        + example_std * rng.normal(size=(1, examples))
        + interaction_std * rng.normal(size=(replicates, examples))
    )


def skewed_quantile(quantile, skewness):
    return quantile + max(skewness, 0) * (2 * quantile**2 + 1) / 6


def interval_from_variance_components(values, level=0.95):
    """The interval from variance components, each estimated by a difference of sums.

    Skewness is that of SciPy's unbiased k-statistics.
    """
    r, n = values.shape
    correction = values.sum() ** 2 / (r * n)
    between_r = sum(values[i].sum() ** 2 for i in range(r)) / n - correction
    between_n = sum(values[:, j].sum() ** 2 for j in range(n)) / r - correction
    within = (values**2).sum() - correction - between_r - between_n
    ms_r, ms_n = between_r / (r - 1), between_n / (n - 1)
    ms_rn = within / ((r - 1) * (n - 1))
    interaction = ms_rn
    replicate = (ms_r - ms_rn) / n
    example = (ms_n - ms_rn) / r
    variance = replicate / r + max(example, 0) / n + interaction / (r * n)
    terms = [(ms_r / (r * n), r - 1)]
    if example > 0:
        terms += [(ms_n / (r * n), n - 1), (ms_rn / (r * n), (r - 1) * (n - 1))]
    freedom = variance**2 / sum(term**2 / degrees for term, degrees in terms)
    quantile = stats.t.ppf((1 + level) / 2, max(freedom, min(r, n) - 1))
    cumulant = sum(
        stats.kstat(values.mean(axis), 3) / values.shape[1 - axis] ** 2
        for axis in (0, 1)
        if values.shape[1 - axis] > 2
    )
    skewness = 2 * cumulant / variance**1.5
    return (
        values.mean() - skewed_quantile(quantile, -skewness) * math.sqrt(variance),
        values.mean() + skewed_quantile(quantile, skewness) * math.sqrt(variance),
    )
