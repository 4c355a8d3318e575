"""Averages over masks beside weight scaling: sampled masks, and all masks of a small network."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jdrop import metrics
from jdrop.statistics import EnsembleCurve, Interval, crossed_interval
from jdrop.study.analyses import Exact, MaskCurve
from jdrop.study.evaluation.losses import losses_by_size
from jdrop.study.evaluation.ranges import possible
from jdrop.study.evaluation.readings import Reading, in_groups, is_regression, reading_of
from jdrop.study.parts import ExactPart
from jdrop.study.scores import CURVE_SCORES


def mask_curve(
    readings: Sequence[Reading],
    losses: Mapping[str, Mapping[str, np.ndarray]],
    labels: np.ndarray,
    groups: np.ndarray | None,
) -> MaskCurve | None:
    """Computes how many masks score as well as weight scaling of the same networks.

    Args:
        readings: the predictions of all methods.
        losses: by method and score, `[replicate, size, example]`.
        labels: `[example]`.
        groups: `[example]`, see `jdrop.statistics.group_losses`.

    Returns:
        None without masks and weight scaling, or if only one of them was given as a single network:
        the masks are then of other networks.
    """
    by_name = {reading.name: reading for reading in readings}
    sampled = by_name.get("monte-carlo")
    scaled = by_name.get("weight-scaling", by_name.get("dropout"))
    if sampled is None or scaled is None or sampled.retrained != scaled.retrained:
        return None
    scores = CURVE_SCORES["regression" if is_regression(labels) else "classification"]
    first_networks = reading_of("weight-scaling", scaled.outputs[:, :1])
    scaled_losses = {
        score: in_groups(values[:, 0], groups)
        for score, values in losses_by_size(first_networks, labels).items()
    }
    sampled_losses = {score: in_groups(losses["monte-carlo"][score], groups) for score in scores}
    masks_needed = {
        score: EnsembleCurve(sampled_losses[score], sizes=sampled.sizes).equivalent(
            scaled_losses[score]
        )
        for score in scores
    }
    return MaskCurve(
        num_masks=list(sampled.sizes),
        scores={score: sampled_losses[score].mean((0, 2)).tolist() for score in scores},
        weight_scaling={score: float(scaled_losses[score].mean()) for score in scores},
        minus_weight_scaling={
            score: crossed_interval(sampled_losses[score][:, -1] - scaled_losses[score])
            for score in scores
        },
        masks_needed=masks_needed,
    )


def score_enumerated(
    part: ExactPart | None, labels: np.ndarray, groups: np.ndarray | None
) -> Exact | None:
    """Scores weight scaling and the two averages over all masks. Returns None without them."""
    if part is None:
        return None
    # Only the first test examples are enumerated.
    num_examples = part.geometric.shape[1]
    enumerated_labels = jnp.asarray(labels[:num_examples])
    enumerated_groups = None if groups is None else groups[:num_examples]
    if enumerated_groups is not None and len(np.unique(enumerated_groups)) < 2:
        enumerated_groups = None
    predictions = {
        "weight_scaling": part.weight_scaling,
        "geometric": part.geometric,
        "arithmetic": part.arithmetic,
    }
    losses = {
        name: jax.tree.map(
            lambda values: in_groups(np.asarray(values, np.float64), enumerated_groups),
            jax.vmap(metrics.losses, in_axes=(0, None))(jnp.asarray(log_probs), enumerated_labels),
        )
        for name, log_probs in predictions.items()
    }
    scores = ("nll", "brier", "error")

    def intervals(name: str) -> dict[str, Interval]:
        return {score: possible(score, crossed_interval(losses[name][score])) for score in scores}

    def gap_intervals(name: str, subtracted: str) -> dict[str, Interval]:
        return {
            score: crossed_interval(losses[name][score] - losses[subtracted][score])
            for score in scores
        }

    return Exact(
        num_units=part.num_units,
        num_masks=part.num_masks,
        weight_scaling=intervals("weight_scaling"),
        geometric=intervals("geometric"),
        arithmetic=intervals("arithmetic"),
        nonlinearity_gap=gap_intervals("weight_scaling", "geometric"),
        pool_gap=gap_intervals("geometric", "arithmetic"),
    )
