"""The gap between test and training scores."""

from collections.abc import Iterable, Mapping

import numpy as np

from jdrop.statistics import Interval, mean_interval
from jdrop.study.analyses import Overfitting
from jdrop.study.evaluation.losses import mean_losses
from jdrop.study.evaluation.ranges import possible
from jdrop.study.parts import SubsetPredictions


def score_overfitting(
    subsets: Iterable[SubsetPredictions], labels: np.ndarray
) -> list[Overfitting]:
    """Scores single networks on their training examples and on the test examples.

    Args:
        subsets: predictions of single networks, for each method and training size.
        labels: of the test examples.
    """

    def intervals(scores: Mapping[str, np.ndarray]) -> dict[str, Interval]:
        return {
            score: possible(score, mean_interval(list(values))) for score, values in scores.items()
        }

    results = []
    for subset in subsets:
        train = mean_losses(subset.train_outputs, subset.train_labels)
        test = mean_losses(subset.test_outputs, labels)
        results.append(
            Overfitting(
                networks=subset.method,
                train_size=len(subset.train_labels),
                train=intervals(train),
                test=intervals(test),
                gap={score: mean_interval(list(test[score] - train[score])) for score in train},
            )
        )
    return results
