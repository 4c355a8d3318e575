"""How sure the choice of cross-validation is: which candidate other training examples would choose.

The left-out examples are resampled with replacement, and each resample chooses its own candidate.
The networks of the folds stay the same. So the shares hold the chance of the examples that score
the candidates, but not that of the trainings.

Until the part of the cross-validation is stored, the run's folder holds the losses of the examples,
as `slices/tuning-GROUP/losses-after-EPOCHS`. The process that scores a candidate stores them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jdrop.statistics import bootstrap_weights
from jdrop.study.parts import ResampledChoice
from jdrop.study.run_folder import RunFolder

NUM_RESAMPLES = 1000
"""How many resamples choose."""

RESAMPLES_AT_ONCE = 20
"""Their weights are in memory together: with 60,000 examples at most 35 MB."""


@dataclass(frozen=True)
class LeftOutPart:
    """The losses of left-out examples at one candidate count of epochs.

    Attributes:
        sizes: by name of the method, the sizes of its averages that tables show.
        losses: by name of the method, and by setting, float32 `[size, unit]`. A unit is a group of
            training examples, or one example. The sum over the units is the mean loss.
    """

    sizes: dict[str, list[int]]
    losses: dict[str, list[Any]]


def store_losses(run_folder: RunFolder, training: str, epochs: int, part: LeftOutPart) -> None:
    """Stores the losses at one candidate; equal arguments store the same again."""
    run_folder.store(_name(training, epochs), part)


def resampled_choices(
    run_folder: RunFolder, training: str, epochs: Sequence[int], rng: np.random.Generator
) -> dict[str, list[ResampledChoice]]:
    """In what share of resamples each candidate is chosen, by name of the method.

    Args:
        run_folder: holds the losses at each candidate.
        training: the part that the cross-validation is for.
        epochs: the candidates, rising.
        rng: NumPy's generator.

    Returns:
        An entry for each size of the stored losses. It is empty where losses are missing, as in
        cross-validation that an earlier version began.
    """
    names = [_name(training, count) for count in epochs]
    if not all(run_folder.is_complete(name) for name in names):
        return {}
    parts = [run_folder.require(name, LeftOutPart) for name in names]
    choices = {}
    for method, sizes in parts[0].sizes.items():
        # [setting, candidate, size, unit]
        losses = np.stack([np.stack(part.losses[method]) for part in parts], 1)
        shares = choice_shares(rng, losses.reshape(-1, *losses.shape[2:]))
        choices[method] = [
            ResampledChoice(size, of_size.reshape(losses.shape[:2]).tolist())
            for size, of_size in zip(sizes, shares.T, strict=True)
        ]
    return choices


def choice_shares(rng: np.random.Generator, losses: np.ndarray) -> np.ndarray:
    r"""In what share of bootstrap resamples each candidate has the smallest loss.

    With two candidates and many units, the share of the first is about $\Phi(-\bar d / s)$. Here
    $\bar d$ is the mean over the units of its loss minus the other's, and $s$ the standard error.

    Args:
        rng: NumPy's generator.
        losses: `[candidate, size, unit]`; the units are resampled, the same for all candidates and
            sizes.

    Returns:
        float64 `[candidate, size]`; the shares of a size add up to 1. Of equal losses the first
        candidate is chosen.

    Example:
        >>> losses = np.array([[[0.2, 0.5, 0.2]], [[0.3, 0.6, 0.3]]])
        >>> choice_shares(np.random.default_rng(0), losses).tolist()
        [[1.0], [0.0]]

    Reference:
        Efron 1979, doi:10.1214/aos/1176344552.
    """
    num_candidates, num_sizes, num_units = losses.shape
    columns = losses.reshape(-1, num_units).T.astype(np.float64)
    chosen = np.zeros((num_candidates, num_sizes))
    for _ in range(NUM_RESAMPLES // RESAMPLES_AT_ONCE):
        weights = bootstrap_weights(rng, num_units, RESAMPLES_AT_ONCE)
        sums = (weights @ columns).reshape(-1, num_candidates, num_sizes)
        candidates = np.arange(num_candidates)[:, None]
        chosen += (sums.argmin(1)[:, None] == candidates).sum(0)
    return chosen / NUM_RESAMPLES


def _name(training: str, epochs: int) -> str:
    return f"slices/{training}/losses-after-{epochs}"
