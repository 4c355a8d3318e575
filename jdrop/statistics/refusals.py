"""When data are too few for a claim, whatever an interval says."""

import numpy as np

MIN_REPLICATES = 3
"""With 2 replicates a standard error has a single degree of freedom, and no skewness shows."""

MIN_EXAMPLES = 10
"""The fewest examples, or groups of examples."""

MIN_EFFECTIVE_EXAMPLES = 3
"""The fewest effective examples; see `effective_examples`.

With fewer, the next test set may hold none of those that carry the difference, or twice as many. A
tail that no test example shows cannot be refused.
"""


def refusal(losses: np.ndarray, negligible: float = 0.0) -> str | None:
    """Says why differences allow no claim: too few replicates or examples, or few that matter.

    Args:
        losses: `[replicate, example]`: differences between two methods, of examples or of groups.
        negligible: a mean absolute deviation between examples that is as good as none.

    Returns:
        A sentence, or None if a claim can be made.

    Example:
        >>> refusal(np.zeros((2, 100)))
        'There are 2 replicates: a claim needs at least 3.'
    """
    return refusal_of_means(len(losses), losses.mean(0), negligible)


def refusal_of_means(num_replicates: int, means: np.ndarray, negligible: float) -> str | None:
    """The same, from the number of replicates and the means `[example]` over them."""
    if num_replicates < MIN_REPLICATES:
        return f"There are {num_replicates} replicates: a claim needs at least {MIN_REPLICATES}."
    if len(means) < MIN_EXAMPLES:
        return (
            f"There are {len(means)} test examples or groups: a claim needs at least "
            f"{MIN_EXAMPLES}."
        )
    if np.abs(means - means.mean()).mean() <= negligible:
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
