"""When data are too few for a claim, whatever an interval says."""

from collections.abc import Collection

import numpy as np

MIN_REPLICATES = 3
"""With 2 replicates a standard error has a single degree of freedom, and no skewness shows."""

MIN_EXAMPLES = 10
"""The fewest examples, or groups of examples."""

MIN_EFFECTIVE_EXAMPLES = 3
"""The fewest effective examples in a tail against a claim; see `effective_examples`.

With fewer, the next test set may hold none of those that carry the difference, or twice as many. A
tail that no test example shows cannot be refused.
"""


def refusal(
    num_replicates: int,
    means: np.ndarray,
    claims: Collection[str],
    negligible: float = 0.0,
    limit: float = 0.0,
) -> str | None:
    """Says why differences allow no claim: too few replicates or examples, or few that matter.

    A claim that the mean is below a value errs if examples with large differences are rare, since
    the test set may hold too few. Rare small differences only make it careful. For a claim that the
    mean is above a value, it is the other way round. Where every example is beyond the limit on one
    side, few examples cannot carry the difference.

    Args:
        num_replicates: how many replicates there are.
        means: `[example]`: differences between two methods, averaged over replicates, of examples
            or of groups.
        claims: what is claimed: that the mean is "below" a value, "above" a value, both or none.
        negligible: a mean absolute deviation between examples that is as good as none.
        limit: the size of a difference that is claimed, not negative.

    Returns:
        A sentence, or None if the claims can be made.

    Example:
        >>> refusal(2, np.zeros(100), ["below"])
        'There are 2 replicates: a claim needs at least 3.'
    """
    if num_replicates < MIN_REPLICATES:
        return f"There are {num_replicates} replicates: a claim needs at least {MIN_REPLICATES}."
    if len(means) < MIN_EXAMPLES:
        return (
            f"There are {len(means)} test examples or groups: a claim needs at least "
            f"{MIN_EXAMPLES}."
        )
    if means.min() > limit or means.max() < -limit:
        return None
    deviations = means - means.mean()
    tail_against = "below" if (deviations**3).sum() > 0 else "above"
    if tail_against not in claims or np.abs(deviations).mean() <= negligible:
        return None
    effective = effective_examples(means)
    if effective < MIN_EFFECTIVE_EXAMPLES:
        return (
            f"A few test examples or groups carry the difference, {effective:.1f} effectively: a "
            f"claim needs at least {MIN_EFFECTIVE_EXAMPLES}."
        )
    return None


def effective_examples(means: np.ndarray) -> float:
    r"""How many examples effectively carry the variance: $(\sum_n d_n^2)^2 / \sum_n d_n^4$.

    The $d_n$ are deviations from the mean. If $k$ of many examples deviate equally and the others
    hardly at all, it is about $k$; for normal deviations it is a third of the examples. Infinite if
    no example deviates.
    """
    squares = (means - means.mean()) ** 2
    if squares.max() == 0:
        return np.inf
    # The largest square is divided out first, since fourth powers could underflow.
    squares = squares / squares.max()
    return float(squares.sum() ** 2 / (squares**2).sum())
