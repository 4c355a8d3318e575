"""Averages over masks beside weight scaling: sampled masks, and all masks of a small network."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jdrop import metrics
from jdrop.statistics import EnsembleCurve, Interval, crossed_interval
from jdrop.study.analyses import Exact, MaskCurve
from jdrop.study.evaluation.losses import losses_by_size
from jdrop.study.evaluation.readings import Reading, is_regression
from jdrop.study.parts import ExactPart
from jdrop.study.scores import CURVE_SCORES


def mask_curve(
    readings: Sequence[Reading],
    losses: Mapping[str, Mapping[str, np.ndarray]],
    labels: np.ndarray,
) -> MaskCurve | None:
    """Computes how many masks score as well as weight scaling of the same networks.

    Returns:
        None without both methods, or if only one of them was given as a single network: the masks
        are then of other networks.
    """
    by_name = {reading.name: reading for reading in readings}
    sampled, dropout = by_name.get("monte-carlo"), by_name.get("dropout")
    if sampled is None or dropout is None or sampled.retrained != dropout.retrained:
        return None
    scores = CURVE_SCORES["regression" if is_regression(labels) else "classification"]
    first_networks = replace(dropout, outputs=dropout.outputs[:, :1], sizes=(1,), table=(1,))
    scaled_losses = losses_by_size(first_networks, labels)
    masks_needed = {}
    for score in scores:
        curve = EnsembleCurve(losses["monte-carlo"][score], sizes=sampled.sizes)
        masks_needed[score] = curve.equivalent(scaled_losses[score][:, 0])
    return MaskCurve(
        num_masks=list(sampled.sizes),
        scores={score: losses["monte-carlo"][score].mean((0, 2)).tolist() for score in scores},
        weight_scaling={score: float(scaled_losses[score].mean()) for score in scores},
        masks_needed=masks_needed,
    )


def score_enumerated(part: ExactPart | None, labels: np.ndarray) -> Exact | None:
    """Scores weight scaling and the two averages over all masks. Returns None without them."""
    if part is None:
        return None
    # Only the first test examples are enumerated.
    enumerated_labels = jnp.asarray(labels[: part.geometric.shape[1]])
    predictions = {
        "weight_scaling": part.weight_scaling,
        "geometric": part.geometric,
        "arithmetic": part.arithmetic,
    }
    losses = {
        name: jax.tree.map(
            lambda values: np.asarray(values, np.float64),
            jax.vmap(metrics.losses, in_axes=(0, None))(jnp.asarray(log_probs), enumerated_labels),
        )
        for name, log_probs in predictions.items()
    }
    scores = ("nll", "brier", "error")

    def intervals(name: str) -> dict[str, Interval]:
        return {score: crossed_interval(losses[name][score]) for score in scores}

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
