"""Simulated studies whose true equivalents are known exactly, for `scripts/coverage.py`.

A method is an average of `l` independent plain networks. Its true equivalent is then `l`, whatever
the distribution of losses. For a fraction such as 1.5 its loss is a mixture of the losses of the
averages of 1 and 2 networks, as the curve between two sizes is.
"""

import math
from dataclasses import dataclass

import numpy as np

from jdrop.statistics import group_losses

SCORES = ("NLL", "Brier", "error")

NUM_CLASSES = 4

NUM_EXAMPLES = 500
"""Examples in the test set of a study."""

LARGEST = 10
"""Plain networks of a replicate, and so the largest ensemble."""

TRUTHS = (1.0, 1.5, 2.0, 5.0, 9.5, 10.0, 15.0)
"""Networks in the average that is the method. 15 lie beyond the largest ensemble."""

SIMULATORS = {
    "gauss": "normal logits and noise",
    "heavy": "logits of Student's t with 2 degrees of freedom, noise with 3, lognormal scales",
    "rare": "networks differ on one example in twenty only",
    "sharp": "each network multiplies its logits by a lognormal factor, of standard deviation 0.5",
    "groups": "blocks of 4 to 16 examples share most of their logits and noise",
}

SHARED_STD, ADVANTAGE = 1.5, 1.5
"""The standard deviation of shared logits, and the amount added to those of the correct class."""

NOISE_STD, OFFSET_STD = 3.0, 0.2
"""Standard deviations of a plain network: its noise, and its offset for all examples."""


@dataclass(frozen=True)
class Study:
    """The losses of a study.

    Attributes:
        plain: `[score, replicate, size, example]`, of ensembles.
        methods: `[score, replicate, truth, example]`, of the methods in the order of `TRUTHS`.
    """

    plain: np.ndarray
    methods: np.ndarray


def simulate(name: str, rng: np.random.Generator, num_replicates: int) -> Study:
    """Draws the test set and the networks of a study, and computes their losses."""
    num_method = math.ceil(max(TRUTHS))
    probs, groups = draw_networks(name, rng, num_replicates, LARGEST + num_method)
    plain = losses_by_size(probs[:, :, :LARGEST])
    methods = method_losses(probs[:, :, LARGEST:])
    if groups is None:
        return Study(plain, methods)
    return Study(group_losses(plain, groups), group_losses(methods, groups))


def draw_networks(
    name: str, rng: np.random.Generator, num_replicates: int, num_networks: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Probabilities `[class, replicate, network, example]`, the correct class first, and groups."""
    each = (NUM_CLASSES, num_replicates, num_networks)
    groups = draw_groups(rng) if name == "groups" else None
    if name == "heavy":
        shared = SHARED_STD / 2 * rng.standard_t(2, (NUM_CLASSES, NUM_EXAMPLES))
        scale = np.exp(0.5 * rng.standard_normal(NUM_EXAMPLES))
        noise = NOISE_STD / 2 * scale * rng.standard_t(3, (*each, NUM_EXAMPLES))
    else:
        shared = SHARED_STD * normal_by_group(rng, (NUM_CLASSES,), groups)
        noise = NOISE_STD * normal_by_group(rng, each, groups)
    shared[0] += ADVANTAGE
    noise += OFFSET_STD * rng.standard_normal((*each, 1))
    if name == "rare":
        noise *= rng.random(NUM_EXAMPLES) < 0.05
    logits = shared[:, None, None] + noise
    if name == "sharp":
        logits *= np.exp(0.5 * rng.standard_normal((*each[1:], 1)))
    logits -= logits.max(0)
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(0), groups


def draw_groups(rng: np.random.Generator) -> np.ndarray:
    """Groups `[example]` of 4 to 16 examples, the last one of fewer."""
    sizes = rng.integers(4, 17, NUM_EXAMPLES)
    return np.repeat(np.arange(NUM_EXAMPLES), sizes)[:NUM_EXAMPLES]


def normal_by_group(
    rng: np.random.Generator, shape: tuple[int, ...], groups: np.ndarray | None
) -> np.ndarray:
    """Standard normal `[..., example]`; the examples of a group have a correlation of 0.8."""
    own = rng.standard_normal((*shape, NUM_EXAMPLES), np.float32)
    if groups is None:
        return own
    of_groups = rng.standard_normal((*shape, groups.max() + 1), np.float32)
    return np.float32(math.sqrt(0.8)) * of_groups[..., groups] + np.float32(math.sqrt(0.2)) * own


def losses(probs: np.ndarray) -> np.ndarray:
    """Losses `[score, ...]` of probabilities `[class, ...]`."""
    correct = probs[0]
    brier = 1 - 2 * correct + (probs**2).sum(0)
    nll = -np.log(np.maximum(correct, 1e-30))
    return np.stack([nll, brier, correct < probs[1:].max(0)]).astype(np.float64)


def losses_by_size(probs: np.ndarray) -> np.ndarray:
    """Losses `[score, replicate, size, example]` of ensembles.

    The networks of a replicate lie on a circle. Each size is a mean over all groups of neighbours.
    """
    total = np.zeros_like(probs)
    by_size = []
    for size in range(1, probs.shape[2] + 1):
        total += np.roll(probs, 1 - size, axis=2)
        by_size.append(losses(total / size).mean(2))
    return np.stack(by_size, 2)


def method_losses(probs: np.ndarray) -> np.ndarray:
    """Losses `[score, replicate, truth, example]` of averages of the first networks."""
    by_truth = []
    for truth in TRUTHS:
        share = truth % 1
        size = int(truth)
        below, above = (losses(probs[:, :, : size + more].mean(2)) for more in (0, 1))
        by_truth.append((1 - share) * below + share * above if share else below)
    return np.stack(by_truth, 2)
