"""The worth of a dropout network for each combination of the swept settings."""

from collections.abc import Iterable

import numpy as np

from jdrop.statistics import EnsembleCurve, crossed_interval
from jdrop.study.analyses import Cell
from jdrop.study.evaluation.losses import losses_by_size
from jdrop.study.evaluation.ranges import possible
from jdrop.study.evaluation.readings import Reading, in_groups, reading_of
from jdrop.study.parts import SweepCell


def score_sweep(
    swept: Iterable[SweepCell], labels: np.ndarray, groups: np.ndarray | None
) -> list[Cell]:
    """Scores one plain network, the plain ensemble and one dropout network in each cell."""

    def losses_in_groups(reading: Reading) -> dict[str, np.ndarray]:
        losses = losses_by_size(reading, labels)
        return {score: in_groups(values, groups) for score, values in losses.items()}

    cells = []
    for cell in swept:
        networks = reading_of("plain", cell.plain)
        plain = losses_in_groups(networks)
        dropout = losses_in_groups(reading_of("dropout", cell.dropout))
        losses = {
            "plain": {score: values[:, 0] for score, values in plain.items()},
            "ensemble": {score: values[:, -1] for score, values in plain.items()},
            "dropout": {score: values[:, 0] for score, values in dropout.items()},
        }
        cells.append(
            Cell(
                at=cell.values,
                scores={
                    name: {
                        score: possible(score, crossed_interval(values))
                        for score, values in scores.items()
                    }
                    for name, scores in losses.items()
                },
                worth={
                    score: EnsembleCurve(plain[score], networks.sizes).equivalent(values)
                    for score, values in losses["dropout"].items()
                },
            )
        )
    return cells
