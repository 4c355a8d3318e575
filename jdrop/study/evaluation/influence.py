"""Which test examples carry a difference between two methods."""

from collections.abc import Sequence

import numpy as np

from jdrop.study.analyses import Influence

REMOVED = (1, 5, 10)
"""Counts of examples without which the difference is computed again."""

MAX_DIFFERENCES = 1001
"""Points of a curve over the examples."""


def influence(
    losses: np.ndarray,
    reference: np.ndarray,
    groups: np.ndarray | None,
    group_labels: Sequence[str] | None,
    *,
    method: str,
    size: int,
    against: int,
    score: str,
) -> Influence:
    """Computes what each example contributes to a mean difference.

    Args:
        losses: of the method, `[replicate, example]`.
        reference: of the averages of plain networks, `[replicate, example]`.
        groups: `[example]`, numbers from 0; None without groups.
        group_labels: the groups by their number; None without groups.
        method: name of the method.
        size: of its average.
        against: how many plain networks are averaged.
        score: name of the loss.
    """
    differences = (losses - reference).mean(0)
    num_examples = len(differences)
    mean = float(differences.mean())
    sign = -1.0 if mean < 0 else 1.0
    # The examples that carry most of the difference come first.
    carried = np.cumsum(np.sort(sign * differences)[::-1])
    total = sign * mean * num_examples
    half = None if mean == 0 else int(np.argmax(carried >= total / 2)) + 1
    without = {
        str(count): sign * float(total - carried[count - 1]) / (num_examples - count)
        for count in REMOVED
        if count < num_examples
    }
    largest_group = largest_group_share = without_largest_group = None
    if groups is not None and group_labels is not None and mean != 0:
        sums = np.bincount(groups, weights=differences) / (mean * num_examples)
        largest_group = group_labels[int(sums.argmax())]
        largest_group_share = float(sums.max())
        without_largest_group = float(differences[groups != sums.argmax()].mean())
    ordered = np.sort(differences)
    num_places = min(num_examples, MAX_DIFFERENCES)
    places = np.linspace(0, num_examples - 1, num_places).round().astype(int)
    return Influence(
        method=method,
        size=size,
        against=against,
        score=score,
        difference=mean,
        share_better=float((differences < 0).mean()),
        share_worse=float((differences > 0).mean()),
        half=half,
        without=without,
        largest_group=largest_group,
        largest_group_share=largest_group_share,
        without_largest_group=without_largest_group,
        differences=ordered[places].tolist(),
        cumulative=(np.cumsum(ordered)[places] / num_examples).tolist(),
    )
