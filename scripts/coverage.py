"""Measures how often the 95 % interval of an ensemble equivalent contains the true equivalent.

Studies are simulated. The logits of an example have a part that all networks share, noise of each
network, and an offset of each network for all examples. A dropout network has less noise and a
smaller offset, as if it were an average of networks. The true equivalents are computed from the
same distribution, with many more examples.
"""

import math
from collections.abc import Iterator

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from jdrop.statistics import EnsembleCurve, EnsembleEquivalent

SCORES = ("NLL", "Brier", "error")

NUM_CLASSES = 4

NUM_EXAMPLES = 500
"""Examples in the test set of a study."""

LARGEST = 10
"""Networks of a replicate, and so the largest ensemble."""

REPLICATES = (3, 5)

SHARED_STD, ADVANTAGE = 1.5, 1.5
"""The standard deviation of shared logits, and the amount added to those of the correct class."""

NOISE_STD, OFFSET_STD = 3.0, 0.2
"""Standard deviations of a plain network: its noise, and its offset for all examples."""

PRECISIONS = (2.5, 7.0, 15.0, 40.0)
"""For dropout networks, the factors by which the variances of noise and offset are smaller."""

BATCH_SIZE = 20_000
"""Examples in a batch for the true equivalents."""


def draw_shared_logits(rng: np.random.Generator, num_examples: int) -> np.ndarray:
    """Shared logits `[class, example]`. The correct class is always the first."""
    shared = SHARED_STD * rng.standard_normal((NUM_CLASSES, num_examples), np.float32)
    shared[0] += ADVANTAGE
    return shared


def draw_networks(
    rng: np.random.Generator,
    shared: np.ndarray,
    num_replicates: int,
    num_networks: int,
    noise_std: float,
    offset_std: float,
) -> np.ndarray:
    """Probabilities `[class, replicate, network, example]` of independent networks."""
    shape = NUM_CLASSES, num_replicates, num_networks
    noise = np.float32(noise_std) * rng.standard_normal((*shape, shared.shape[1]), np.float32)
    noise += np.float32(offset_std) * rng.standard_normal((*shape, 1), np.float32)
    exponentials = np.exp(shared[:, None, None] + noise)
    return exponentials / exponentials.sum(0)


def losses(probs: np.ndarray) -> np.ndarray:
    """Losses `[score, ...]` of probabilities `[class, ...]`."""
    correct = probs[0]
    brier = 1 - 2 * correct + (probs**2).sum(0)
    return np.stack([-np.log(correct), brier, correct < probs[1:].max(0)]).astype(np.float64)


def losses_by_size(probs: np.ndarray) -> np.ndarray:
    """Losses `[score, replicate, size, example]` of ensembles.

    The networks of a replicate lie on a circle. Each size is a mean over all groups of neighbours.
    """
    total = np.zeros_like(probs)
    by_size = []
    for size in range(1, probs.shape[2] + 1):
        total += np.roll(probs, 1 - size, axis=2)
        by_size.append(losses(total / np.float32(size)).mean(2))
    return np.stack(by_size, 2)


def true_equivalents(
    rng: np.random.Generator, num_batches: int
) -> dict[tuple[str, float], tuple[float, float]]:
    """True equivalents and their standard errors, by score and precision.

    Each example gets networks of its own, so that all examples are independent. The sum of noise
    and offset on an example has the same distribution as in a study, and so has every loss.
    """
    deviation = math.hypot(NOISE_STD, OFFSET_STD)
    differences: dict[float, list] = {precision: [] for precision in PRECISIONS}
    for _ in range(num_batches):
        shared = draw_shared_logits(rng, BATCH_SIZE)
        plain = losses_by_size(draw_networks(rng, shared, 1, LARGEST, deviation, 0.0))
        for precision in PRECISIONS:
            noise_std = deviation / math.sqrt(precision)
            method = losses(draw_networks(rng, shared, 1, 1, noise_std, 0.0))
            differences[precision].append((plain - method).mean((1, 3)))
    return {
        (score, precision): crossing(np.stack(differences[precision])[:, index])
        for precision in PRECISIONS
        for index, score in enumerate(SCORES)
    }


def crossing(differences: np.ndarray) -> tuple[float, float]:
    """The size where the mean over batches of `differences[batch, size]` is 0, and its error."""
    mean = differences.mean(0)
    below = np.flatnonzero(mean <= 0)
    if len(below) == 0:
        return math.inf, math.nan
    right = int(below[0])
    if right == 0:
        return 1.0, math.nan
    slope = mean[right - 1] - mean[right]
    share = mean[right - 1] / slope
    at_crossing = (1 - share) * differences[:, right - 1] + share * differences[:, right]
    return right + share, at_crossing.std(ddof=1) / math.sqrt(len(at_crossing)) / slope


def simulate_study(
    rng: np.random.Generator, num_replicates: int
) -> Iterator[tuple[tuple[str, float], EnsembleEquivalent]]:
    """The equivalents that a study estimates, by score and precision."""
    shared = draw_shared_logits(rng, NUM_EXAMPLES)
    plain = draw_networks(rng, shared, num_replicates, LARGEST, NOISE_STD, OFFSET_STD)
    curves = [EnsembleCurve(score_losses) for score_losses in losses_by_size(plain)]
    for precision in PRECISIONS:
        scale = math.sqrt(precision)
        dropout = draw_networks(
            rng, shared, num_replicates, 1, NOISE_STD / scale, OFFSET_STD / scale
        )
        method_losses = losses(dropout)[:, :, 0]
        for score, curve, score_losses in zip(SCORES, curves, method_losses, strict=True):
            yield (score, precision), curve.equivalent(score_losses)


@click.command(help=__doc__)
@click.option("--studies", default=500, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option(
    "--batches",
    default=50,
    show_default=True,
    type=click.IntRange(min=2),
    help=f"Batches of {BATCH_SIZE:,} examples for the true equivalents.",
)
def main(studies: int, seed: int, batches: int) -> None:
    """Prints the coverage by score, number of replicates and true equivalent."""
    truth_rng, study_rng = np.random.default_rng(seed).spawn(2)
    truths = true_equivalents(truth_rng, batches)
    table = Table(
        *("score", "replicates", "truth", "±", "coverage in %", "±", "median width", "censored %"),
        title=f"{studies} studies of {NUM_EXAMPLES} examples, up to {LARGEST} networks",
        caption="±: a standard error of the simulation. Censored: the interval has no upper end. "
        "An interval can miss a truth beyond the largest ensemble on one side only, so 97.5 % or "
        "more contain it.",
    )
    for num_replicates in REPLICATES:
        equivalents: dict[tuple[str, float], list[EnsembleEquivalent]] = {
            score_and_precision: [] for score_and_precision in truths
        }
        for _ in range(studies):
            for score_and_precision, equivalent in simulate_study(study_rng, num_replicates):
                equivalents[score_and_precision].append(equivalent)
        for score_and_precision in sorted(truths):
            truth, error = truths[score_and_precision]
            estimates = equivalents[score_and_precision]
            covered = np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])
            censored = [estimate.high == math.inf for estimate in estimates]
            widths = [
                math.inf if is_censored else estimate.high - estimate.low
                for estimate, is_censored in zip(estimates, censored, strict=True)
            ]
            table.add_row(
                score_and_precision[0],
                str(num_replicates),
                f"{truth:.2f}" if math.isfinite(truth) else f">{LARGEST}",
                f"{error:.3f}" if math.isfinite(error) else "",
                f"{100 * covered:.1f}",
                f"{100 * math.sqrt(covered * (1 - covered) / studies):.1f}",
                f"{np.median(widths):.2f}",
                f"{100 * np.mean(censored):.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
