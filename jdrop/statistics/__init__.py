"""The uncertainty of results from random runs: intervals, ensemble equivalents, equivalence tests.

Arrays in, numbers out, in double precision. Two things are random: the replicates, which are whole
repetitions of the training with other seeds, and the test examples. Losses `[replicate, example]`
hold every example in every replicate. So both effects are crossed, and an interval covers both. If
examples belong to groups, such as writers or patients, `group_losses` makes losses of groups.
"""

from jdrop.statistics.groups import group_losses
from jdrop.statistics.intervals import (
    Interval,
    bootstrap_interval,
    bootstrap_weights,
    crossed_interval,
    mean_interval,
)
from jdrop.statistics.tost import EquivalenceTest, equivalence_test
from jdrop.statistics.worth import EnsembleCurve, EnsembleEquivalent

__all__ = [
    "EnsembleCurve",
    "EnsembleEquivalent",
    "EquivalenceTest",
    "Interval",
    "bootstrap_interval",
    "bootstrap_weights",
    "crossed_interval",
    "equivalence_test",
    "group_losses",
    "mean_interval",
]
