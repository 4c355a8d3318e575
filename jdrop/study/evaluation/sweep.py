"""The worth of a dropout network for each combination of the swept settings."""

from collections.abc import Iterable

import numpy as np

from jdrop.statistics import EnsembleCurve, crossed_interval
from jdrop.study.analyses import Cell
from jdrop.study.evaluation.losses import losses_by_size
from jdrop.study.evaluation.readings import make_reading
from jdrop.study.parts import SweepCell


def score_sweep(swept: Iterable[SweepCell], labels: np.ndarray) -> list[Cell]:
    """Scores one plain network, the plain ensemble and one dropout network in each cell."""
    cells = []
    for cell in swept:
        plain = losses_by_size(make_reading("plain", cell.plain), labels)
        dropout = losses_by_size(make_reading("dropout", cell.dropout), labels)
        losses = {
            "plain": {score: values[:, 0] for score, values in plain.items()},
            "ensemble": {score: values[:, -1] for score, values in plain.items()},
            "dropout": {score: values[:, 0] for score, values in dropout.items()},
        }
        cells.append(
            Cell(
                at=cell.values,
                scores={
                    networks: {score: crossed_interval(values) for score, values in scores.items()}
                    for networks, scores in losses.items()
                },
                worth={
                    score: EnsembleCurve(values).equivalent(losses["dropout"][score])
                    for score, values in plain.items()
                },
            )
        )
    return cells
