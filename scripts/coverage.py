"""How often does the 95 % interval of the ensemble equivalent hold the true one?

Studies are made up of predictions whose law is known: an example has logits that all networks
share; a network adds noise of its own to each, and an offset to those of all examples, by which
trainings differ. A dropout network has less of both, as if it were an average already. All studies
and the truth, for which there are as many examples as patience allows, come from this one law.
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
"""In the test set of a study."""

LARGEST = 10
"""Networks of a replicate, and in the largest average."""

REPLICATES = (3, 5)

SIGNAL, ADVANTAGE = 1.5, 1.5
"""Standard deviation of the logits that networks share; what that of the right class has more."""

OWN, OFFSET = 3.0, 0.2
"""Standard deviations of what a plain network adds: by example, and for all examples."""

PRECISIONS = (2.5, 7.0, 15.0, 40.0)
"""Of dropout networks: how many times less the variance of what they add is."""

BATCH = 20_000
"""Examples at a time for the truth."""


def signals(rng: np.random.Generator, num_examples: int) -> np.ndarray:
    """Logits `[class, example]`; the right class is everywhere the first."""
    shared = SIGNAL * rng.standard_normal((NUM_CLASSES, num_examples), np.float32)
    shared[0] += ADVANTAGE
    return shared


def networks(
    rng: np.random.Generator,
    shared: np.ndarray,
    replicates: int,
    number: int,
    own: float,
    offset: float,
) -> np.ndarray:
    """Probabilities `[class, replicate, network, example]` of so many independent networks."""
    shape = NUM_CLASSES, replicates, number
    noise = np.float32(own) * rng.standard_normal((*shape, shared.shape[1]), np.float32)
    noise += np.float32(offset) * rng.standard_normal((*shape, 1), np.float32)
    scores = np.exp(shared[:, None, None] + noise)
    return scores / scores.sum(0)


def losses(probs: np.ndarray) -> np.ndarray:
    """`[score, ...]` of probabilities `[class, ...]`."""
    right = probs[0]
    brier = 1 - 2 * right + (probs**2).sum(0)
    return np.stack([-np.log(right), brier, right < probs[1:].max(0)]).astype(np.float64)


def losses_by_size(probs: np.ndarray) -> np.ndarray:
    """`[score, replicate, size, example]` of averages of networks.

    Each size is a mean over all groups of neighbours on a circle of the replicate's networks.
    """
    total = np.zeros_like(probs)
    by_size = []
    for size in range(1, probs.shape[2] + 1):
        total += np.roll(probs, 1 - size, axis=2)
        by_size.append(losses(total / np.float32(size)).mean(2))
    return np.stack(by_size, 2)


def truths(rng: np.random.Generator, num_batches: int) -> dict[tuple[str, float], tuple]:
    """True equivalents and their standard errors, by score and precision.

    Every example meets networks of its own, so that all are independent. What a network adds to an
    example then has the same law as before, and with it all expectations.
    """
    deviation = math.hypot(OWN, OFFSET)
    differences: dict[float, list] = {precision: [] for precision in PRECISIONS}
    for _ in range(num_batches):
        shared = signals(rng, BATCH)
        plain = losses_by_size(networks(rng, shared, 1, LARGEST, deviation, 0.0))
        for precision in PRECISIONS:
            own = deviation / math.sqrt(precision)
            method = losses(networks(rng, shared, 1, 1, own, 0.0))
            differences[precision].append((plain - method).mean((1, 3)))
    return {
        (score, precision): crossing(np.stack(differences[precision])[:, index])
        for precision in PRECISIONS
        for index, score in enumerate(SCORES)
    }


def crossing(differences: np.ndarray) -> tuple[float, float]:
    """Where the mean over batches of `differences[batch, size]` is 0, and its standard error."""
    mean = differences.mean(0)
    below = np.flatnonzero(mean <= 0)
    if len(below) == 0:
        return math.inf, math.nan
    right = int(below[0])
    if right == 0:
        return 1.0, math.nan
    slope = mean[right - 1] - mean[right]
    share = mean[right - 1] / slope
    there = (1 - share) * differences[:, right - 1] + share * differences[:, right]
    return right + share, there.std(ddof=1) / math.sqrt(len(there)) / slope


def study(
    rng: np.random.Generator, replicates: int
) -> Iterator[tuple[tuple[str, float], EnsembleEquivalent]]:
    """The equivalents that one study finds."""
    shared = signals(rng, NUM_EXAMPLES)
    plain = losses_by_size(networks(rng, shared, replicates, LARGEST, OWN, OFFSET))
    curves = [EnsembleCurve(of_score) for of_score in plain]
    for precision in PRECISIONS:
        scale = math.sqrt(precision)
        method = losses(networks(rng, shared, replicates, 1, OWN / scale, OFFSET / scale))[:, :, 0]
        for score, curve, of_score in zip(SCORES, curves, method, strict=True):
            yield (score, precision), curve.equivalent(of_score)


@click.command(help=__doc__)
@click.option("--studies", default=500, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option(
    "--batches",
    default=50,
    show_default=True,
    type=click.IntRange(min=2),
    help=f"Of {BATCH:,} examples each, for the truth.",
)
def main(studies: int, seed: int, batches: int) -> None:
    """Prints coverage by score, replicates and truth."""
    of_truth, of_studies = np.random.default_rng(seed).spawn(2)
    true = truths(of_truth, batches)
    table = Table(
        *("score", "replicates", "truth", "±", "coverage in %", "±", "median width", "censored %"),
        title=f"{studies} studies of {NUM_EXAMPLES} examples, up to {LARGEST} networks",
        caption="±: one standard error of the simulation. Censored: the interval has no upper end. "
        "A truth beyond the largest average can be missed on one side only: 97.5 % or more.",
    )
    for replicates in REPLICATES:
        found: dict[tuple[str, float], list[EnsembleEquivalent]] = {key: [] for key in true}
        for _ in range(studies):
            for key, equivalent in study(of_studies, replicates):
                found[key].append(equivalent)
        for key in sorted(true):
            truth, error = true[key]
            covered = np.mean([one.low <= truth <= one.high for one in found[key]])
            censored = [one.high == math.inf for one in found[key]]
            widths = [
                math.inf if beyond else one.high - one.low
                for one, beyond in zip(found[key], censored, strict=True)
            ]
            table.add_row(
                key[0],
                str(replicates),
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
