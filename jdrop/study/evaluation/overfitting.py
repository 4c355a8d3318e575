"""The gap between test and training scores."""

from collections.abc import Iterable

import numpy as np

from jdrop.statistics import mean_interval
from jdrop.study.analyses import Overfitting
from jdrop.study.evaluation.losses import mean_losses
from jdrop.study.parts import SubsetPredictions


def score_overfitting(
    subsets: Iterable[SubsetPredictions], labels: np.ndarray
) -> list[Overfitting]:
    """Scores single networks on their training examples and on the test examples.

    Args:
        subsets: predictions of single networks, for each method and training size.
        labels: of the test examples.
    """
    results = []
    for subset in subsets:
        train = mean_losses(subset.train_outputs, subset.train_labels)
        test = mean_losses(subset.test_outputs, labels)
        results.append(
            Overfitting(
                networks=subset.method,
                train_size=len(subset.train_labels),
                train={score: mean_interval(list(train[score])) for score in train},
                test={score: mean_interval(list(test[score])) for score in train},
                gap={score: mean_interval(list(test[score] - train[score])) for score in train},
            )
        )
    return results
