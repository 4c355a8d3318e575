"""Examples that belong together: all examples of one writer, patient or molecule."""

import numpy as np


def group_losses(losses: np.ndarray, groups: np.ndarray) -> np.ndarray:
    r"""Values of groups of examples, which every other function here takes as if of examples.

    Examples of one group are not independent, but the groups are. The value of the group $g$ is

    $$v_g = m + \frac{G}{N} \sum_{n \in g} (\ell_n - m)$$

    with the mean $m$ of all $N$ examples and $G$ groups. The mean of the values is $m$, and
    their variance gives the cluster-robust variance of $m$, for groups of unequal sizes too: $m$ is
    a ratio of two sums over groups, and $v_g - m$ is the influence of a group on it. Values are
    linear in the losses, so differences of values are values of differences.

    Args:
        losses: `[..., example]`.
        groups: `[example]`: the group of each example, as integers or names. There are at least 2
            groups.

    Returns:
        float64 `[..., group]`, groups in ascending order.

    Raises:
        ValueError: if the shapes do not fit, or there are fewer than 2 groups.

    Example:
        >>> group_losses(np.array([1.0, 3.0, 5.0, 3.0]), np.array([7, 7, 9, 9]))
        array([2., 4.])
        >>> group_losses(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1]))
        array([1.66666667, 4.33333333])

    Reference:
        Cochran 1977, "Sampling Techniques", section 9A; Cameron and Miller 2015,
        doi:10.3368/jhr.50.2.317.
    """
    losses = np.asarray(losses, np.float64)
    index, num_groups = group_indices(groups, losses.shape[-1] if losses.ndim else 0)
    if num_groups < 2:
        raise ValueError(f"groups must hold at least 2 groups, got {num_groups}.")
    num_examples = len(index)
    mean = losses.mean(-1, keepdims=True)
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(num_groups))
    sums = np.add.reduceat((losses - mean)[..., order], starts, axis=-1)
    return mean + num_groups / num_examples * sums


def group_indices(groups: np.ndarray, num_examples: int) -> tuple[np.ndarray, int]:
    """The groups of examples numbered from 0, and how many groups there are.

    Raises:
        ValueError: if there is not one group for each example.
    """
    groups = np.asarray(groups)
    if groups.shape != (num_examples,) or num_examples == 0:
        raise ValueError(
            f"groups must hold one group for each of the {num_examples} examples, got the shape "
            f"{groups.shape}."
        )
    names, index = np.unique(groups, return_inverse=True)
    return index, len(names)
