"""Networks whose training diverged: marked by NaN, and kept out of every average.

The parameters of such a network become NaN, and so do its predictions. So no network that trained
beside it changes, and whoever reads the predictions sees which networks are left.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from jdrop.network import Variables
from jdrop.study.errors import UserError


class DivergedError(UserError):
    """Training led to networks whose losses or predictions are not finite."""


def check_some_are_left(diverged: Collection[int], count: int, replicates: int, what: str) -> None:
    """Raises if a replicate has no network left.

    Args:
        diverged: the indices of the networks that diverged, of all members of all replicates.
        count: how many networks there are.
        replicates: how many replicates share them.
        what: the networks, for the error.

    Raises:
        DivergedError: the message says how many diverged.
    """
    left = {index % replicates for index in {*range(count)} - {*diverged}}
    if len(left) < replicates:
        raise DivergedError(
            f"training diverged: {len(diverged)} of {count} {what} have losses that are not "
            "finite, and a replicate has none left; take a smaller learning rate."
        )


def mark_diverged(
    variables: Variables, diverged: Collection[int], replicates: int, *, in_order: bool
) -> Variables:
    """Makes the floats of diverged networks NaN, and puts them behind the others.

    Args:
        variables: of all members of all replicates, with a leading axis.
        diverged: the indices of the networks that diverged.
        replicates: how many; network `i` belongs to replicate `i % replicates`.
        in_order: whether each network stays at its place, since it has settings of its own.

    Example:
        >>> variables = {"w": np.array([0.0, 1.0, 2.0, 3.0])}
        >>> mark_diverged(variables, [0], replicates=2, in_order=False)
        {'w': array([ 2.,  1., nan,  3.])}
    """
    if not diverged:
        return variables
    count = len(jax.tree.leaves(variables)[0])
    is_diverged = np.isin(np.arange(count), [*diverged])
    order = np.arange(count).reshape(-1, replicates)
    if not in_order:
        last = np.argsort(is_diverged.reshape(-1, replicates), axis=0, kind="stable")
        order = np.take_along_axis(order, last, axis=0)

    def mark(leaf: np.ndarray) -> np.ndarray:
        leaf = leaf[order.reshape(-1)]  # A copy.
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf[is_diverged[order.reshape(-1)]] = np.nan
        return leaf

    return jax.tree.map(mark, variables)


def num_diverged(outputs: np.ndarray) -> int:
    """How many members `[replicate, member, ...]` predict a NaN."""
    return int(_has_nan(outputs).sum())


def num_left(outputs: np.ndarray) -> int:
    """How many members without a NaN every replicate has; `outputs` as `num_diverged` takes them.

    Example:
        >>> num_left(np.array([[[1.0], [np.nan], [3.0]], [[1.0], [2.0], [3.0]]]))
        2
    """
    return int((~_has_nan(outputs)).sum(1).min())


def members_left(outputs: np.ndarray, count: int, of: np.ndarray | None = None) -> np.ndarray:
    """The first members of each replicate that predict no NaN.

    Args:
        outputs: `[replicate, member, ...]`.
        count: how many members of each replicate; at most `num_left(outputs)`.
        of: the same members' predictions for other inputs, which are returned instead.
    """
    order = np.argsort(_has_nan(outputs), axis=1, kind="stable")[:, :count]
    chosen = outputs if of is None else of
    return np.take_along_axis(chosen, order.reshape(*order.shape, *(1,) * (chosen.ndim - 2)), 1)


def _has_nan(outputs: np.ndarray) -> np.ndarray:
    return np.isnan(outputs).any(tuple(range(2, outputs.ndim)))
