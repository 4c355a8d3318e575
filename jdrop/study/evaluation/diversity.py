"""How much the members of each method differ."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import metrics
from jdrop.statistics import mean_interval
from jdrop.study.analyses import Ambiguity, Diversity
from jdrop.study.evaluation.readings import Reading, is_regression

CLASSIFICATION_AMBIGUITIES = ("arithmetic NLL", "geometric NLL", "arithmetic Brier")
"""Losses and pools whose ambiguity is computed; in regression it is the MSE's."""


def diversity_of_methods(readings: Sequence[Reading], labels: np.ndarray) -> list[Diversity]:
    """Measures each method with several members, at the largest size that they all have."""
    several = [reading for reading in readings if reading.outputs.shape[1] > 1]
    size = min((reading.outputs.shape[1] for reading in several), default=0)
    return [_diversity(reading, size, labels) for reading in several]


def _diversity(reading: Reading, size: int, labels: np.ndarray) -> Diversity:
    values = [
        jax.tree.map(
            float,
            _diversity_values(
                jnp.asarray(outputs[:size]),
                jnp.asarray(labels),
                regression=is_regression(labels),
            ),
        )
        for outputs in reading.outputs[: reading.num_independent]
    ]
    intervals = jax.tree.map(lambda *replicates: mean_interval(replicates), *values)
    measures = ("disagreement", "pairwise_kl", "q_statistic", "mutual_information")
    ambiguities = ("MSE",) if is_regression(labels) else CLASSIFICATION_AMBIGUITIES
    return Diversity(
        method=reading.name,
        size=size,
        **{measure: intervals.get(measure) for measure in measures},
        ambiguity={name: Ambiguity(*intervals[name]) for name in ambiguities},
    )


@partial(jax.jit, static_argnames="regression")
def _diversity_values(members: Array, labels: Array, *, regression: bool) -> dict[str, Any]:
    if regression:
        return {"MSE": metrics.squared_ambiguity(members, labels)}
    return {
        "disagreement": metrics.disagreement(members),
        "pairwise_kl": metrics.pairwise_kl(members),
        "q_statistic": metrics.q_statistic(members, labels),
        "mutual_information": metrics.mutual_information(members).mean(),
        **{name: metrics.ambiguity(members, labels, name) for name in CLASSIFICATION_AMBIGUITIES},
    }
