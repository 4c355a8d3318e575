"""The scores and costs of the study: their names, units and definitions for readers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """How tables and figures show a score.

    Attributes:
        title: its name for readers.
        unit: "%", "nats" or "".
        definition: a phrase.
    """

    title: str
    unit: str
    definition: str

    @property
    def scale(self) -> int:
        """The factor between a stored value and the shown one."""
        return 100 if self.unit == "%" else 1

    @property
    def difference_unit(self) -> str:
        """The unit of a difference of two scores: percentages differ by points."""
        return "points" if self.unit == "%" else self.unit

    @property
    def title_with_unit(self) -> str:
        """The title, then the unit where there is one."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


SCORES = {
    "nll": Score("NLL", "nats", "mean negative log-likelihood of the test labels"),
    "perplexity": Score("perplexity", "", "exponential of the NLL per token"),
    "calibrated_nll": Score(
        "calibrated NLL",
        "nats",
        "NLL at the temperature (in regression: with the noise) fitted on the other half of the "
        "test examples, mean over several two-fold splits",
    ),
    "brier": Score(
        "Brier",
        "",
        "squared distance between the probabilities and the one-hot label, summed over classes",
    ),
    "error": Score("error", "%", "share of examples whose most probable class is wrong"),
    "crps": Score("CRPS", "", "continuous ranked probability score, in the unit of the target"),
    "mse": Score("MSE", "", "mean squared error of the average, in the squared unit of the target"),
    "rmse": Score(
        "RMSE", "", "square root of the MSE and of its interval's ends, in the unit of the target"
    ),
    "coverage": Score(
        "coverage of 95 %",
        "%",
        "share of targets in the central 95 % interval, with the noise fitted on the other half of "
        "the test examples, mean over several two-fold splits; 95 is right",
    ),
    "ece": Score("ECE", "%", "calibration error of the top class, 15 bins of equal width"),
    "ece_equal_mass": Score(
        "ECE, equal mass", "%", "calibration error of the top class, 15 bins of equal mass"
    ),
    "debiased_ece": Score(
        "ECE, debiased",
        "%",
        "root mean squared calibration error, with its bias subtracted (Kumar 2019)",
    ),
    "aurc": Score("AURC", "%", "error of the k most confident predictions, averaged over all k"),
    "entropy": Score("entropy", "nats", "mean entropy of the predictions"),
    "mutual_information": Score(
        "mutual information",
        "nats",
        "entropy of the average minus the mean entropy of its members",
    ),
    "auroc_entropy": Score(
        "OOD AUROC, entropy",
        "%",
        "probability that an out-of-distribution input has the larger entropy",
    ),
    "auroc_mutual_information": Score(
        "OOD AUROC, MI",
        "%",
        "probability that an out-of-distribution input has the larger mutual information",
    ),
}
"""All scores, by their name in the results."""

CURVE_SCORES = {
    "classification": ("nll", "calibrated_nll", "brier", "error"),
    "regression": ("calibrated_nll", "crps", "mse"),
}
"""By task, the scores that are means over examples.

A method has a worth in plain networks in each of these scores. The first is the main score, which
the summary sentence reports.
"""

COSTS = {
    "train_flops": "training FLOPs",
    "train_seconds": "training seconds",
    "predict_flops": "inference FLOPs per example",
    "predict_seconds": "inference seconds per example",
    "parameters": "parameters",
    "bytes": "bytes",
}
"""The attributes of `jdrop.study.results.Cost`, with their titles."""
