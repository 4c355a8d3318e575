"""What cross-validation chose, what it nearly chose, and how sure the choice is."""

from dataclasses import dataclass

from jdrop.study.report.numbers import share_text, significant
from jdrop.study.resampled_choices import NUM_RESAMPLES
from jdrop.study.results import Comparison

SURE = 2 / 3
"""The share of resamples that must choose the same, for a choice to be called sure."""


@dataclass(frozen=True)
class Candidate:
    """A candidate of the cross-validation.

    Attributes:
        epochs: of the training.
        weight_decay: of AdamW; None for Adam.
        loss: of left-out training examples.
        share: of the resamples that choose this candidate.
    """

    epochs: int
    weight_decay: float | None
    loss: float
    share: float

    def __str__(self) -> str:
        """Such as "20 epochs"."""
        text = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return text if self.weight_decay is None else f"{text}, weight decay {self.weight_decay:g}"


@dataclass(frozen=True)
class EpochChoice:
    """What cross-validation chose for a method at one size.

    Attributes:
        chosen: has the smallest loss.
        other: of the other candidates, the one that most resamples choose; None if none is chosen.
    """

    chosen: Candidate
    other: Candidate | None

    @property
    def is_sure(self) -> bool:
        """Whether enough resamples choose the same."""
        return self.chosen.share >= SURE


def choice_of(comparison: Comparison, method: str, size: int) -> EpochChoice | None:
    """The choice for a method at one size; None if it is unknown how sure that is."""
    candidates, chosen = [], None
    for curve in comparison.tuning:
        if (curve.method, curve.size) != (method, size) or curve.choice_shares is None:
            continue
        for epochs, loss, share in zip(
            curve.epochs, curve.losses, curve.choice_shares, strict=True
        ):
            candidate = Candidate(epochs, curve.weight_decay, loss, share)
            if epochs == curve.chosen:
                chosen = candidate
            elif share > 0:
                candidates.append(candidate)
    if chosen is None:
        return None
    return EpochChoice(chosen, max(candidates, key=lambda each: each.share, default=None))


def choices_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: the choice for each method, and how sure it is."""
    header = ["method", "chosen epochs", "loss", "share"]
    header += ["most frequent other", "loss − chosen", "its share"]
    rows = []
    for method, point in comparison.table:
        choice = choice_of(comparison, method.name, point.size)
        if choice is None:
            continue
        chosen, other = choice.chosen, choice.other
        row = [method.title(point.size), _settings(chosen), significant(chosen.loss)]
        row += [share_text(chosen.share)]
        if other is None:
            row += [""] * 3
        else:
            more = significant(other.loss - chosen.loss)
            row += [_settings(other), f"+{more}", share_text(other.share)]
        rows.append(row)
    return (header, rows) if rows else ([], [])


def _settings(candidate: Candidate) -> str:
    """Without the noun, which stands in the header."""
    return str(candidate).replace(" epochs", "").replace(" epoch", "")


def resamples_text(comparison: Comparison) -> str:
    """What is resampled, such as "1,000 resamples of the training examples"."""
    name = comparison.data.get("train_group_name")
    what = "tokens" if comparison.is_per_token else "examples"
    by = "" if name is None else " in whole groups" if name == "group" else f" by {name}"
    return f"{NUM_RESAMPLES:,} resamples of the training {what}{by}"
