"""What a reader must know before quoting the result: each kind of caution once."""

from collections.abc import Sequence

from jdrop.study.report.choices import choice_of, resamples_text
from jdrop.study.report.numbers import (
    difference_text,
    margin_text,
    mean_text,
    share_text,
    signed_text,
    significant,
)
from jdrop.study.report.sentence import second_score, subject
from jdrop.study.report.tables import gains_and_losses
from jdrop.study.results import Comparison, Point
from jdrop.study.scores import SCORES

STILL_FALLING = 0.01
"""The share by which a loss must fall over the last tenth of a training to be called falling."""

LARGE_MARGIN = 0.8
"""A margin is large from this multiple of what averaging all plain networks gains."""

NEARLY = 2 / 3
"""Gains and losses nearly cancel if the smaller is at least this share of the larger."""

MAX_NAMES = 4
"""Names in a list of methods; the plain and the dropout networks are the first."""


def cautions(comparison: Comparison) -> list[str]:
    """Returns the cautions, the gravest first. Only the main score is judged."""
    return [
        *_refusals(comparison),
        *_margin(comparison),
        *_simple_models(comparison),
        *_training_length(comparison),
        *_unsure_choices(comparison),
        *_same_epochs(comparison),
        *_influence(comparison),
        *_tokens(comparison),
        *_independence(comparison),
    ]


def _refusals(comparison: Comparison) -> list[str]:
    """The refusals of rows that the first sentence does not speak of."""
    score = comparison.curve_scores[0]
    headline = None if comparison.headline is None else comparison.headline[1]
    said = set()
    if headline is not None:
        said = {headline.against_ensemble[score].refusal, headline.worth[score].refusal}
    refused: dict[str, list[str]] = {}
    for method, point in comparison.table:
        reasons = {point.against_ensemble[score].refusal, point.worth[score].refusal}
        if method.name == "plain" or method.is_baseline:
            continue
        for reason in reasons - said - {None}:
            refused.setdefault(str(reason), []).append(method.title(point.size))
    titles = list(dict.fromkeys(title for names in refused.values() for title in names))
    if not titles:
        return []
    return [
        f"Verdict and worth of {_shortened(titles)} are refused where the data are too few. "
        f"{next(iter(refused))}"
    ]


def _margin(comparison: Comparison) -> list[str]:
    """Says if the margin is about as large as what the largest ensemble gains."""
    if comparison.headline is None:
        return []
    method, point = comparison.headline
    score = comparison.curve_scores[0]
    margin, gain = comparison.margins[score], comparison.single.minus_ensemble[score].mean
    # A verdict of "better" claims a difference that is larger than the margin.
    if margin < LARGE_MARGIN * gain or point.against_ensemble[score].verdict == "better":
        return []
    size = "about as large as" if margin * LARGE_MARGIN <= gain else "larger than"
    gained = signed_text(score, gain, unit=True).removeprefix("+")
    return [
        f"The margin, {margin_text(score, margin)}, is {size} what averaging "
        f"{comparison.ensemble.size} plain networks gains ({gained}). Within this margin, "
        f"“enough” does not show that {subject(method, point)} beats one plain network."
    ]


def _simple_models(comparison: Comparison) -> list[str]:
    """Says which networks the best simple model beats."""
    score = second_score(comparison) if comparison.task == "regression" else "nll"
    simple = [method for method in comparison.methods if method.is_baseline]
    if not simple:
        return []
    best = min(simple, key=lambda method: method.points[0].scores[score].mean)
    point = best.points[0]
    rows = [
        ("one plain network", comparison.single, point.minus_single),
        (f"the average of {comparison.ensemble.size}", comparison.ensemble, point.minus_ensemble),
    ]
    if comparison.headline is not None:
        method, headline = comparison.headline
        rows.append((subject(method, headline), headline, point.minus_headline))
    beaten, is_notable = [], False
    for name, network, differences in rows:
        difference = differences[score]
        if difference.mean >= 0:
            continue
        is_significant = difference.high is not None and difference.high < 0
        is_notable |= is_significant or network is rows[-1][1]
        doubt = "" if is_significant else "; not significant"
        beaten.append(f"{name} ({mean_text(score, network.scores[score], unit=True)}{doubt})")
    if not is_notable:
        return []
    number = mean_text(score, point.scores[score], unit=True)
    title = best.title(1)
    return [
        f"{title[0].upper()}{title[1:]} has a lower {SCORES[score].title}, {number}, than "
        f"{_listed(beaten)}. Networks that a simple model beats are poorly trained, and a worth "
        "in such networks says little."
    ]


def _training_length(comparison: Comparison) -> list[str]:
    """Says which methods were trained past their best epoch, and which were still improving."""
    if comparison.same_epochs is not None:
        return _choices(comparison)
    past, improving = [], []
    for networks, curves in comparison.learning_curves.items():
        losses = next(iter(curves.test.values()))
        best = curves.epochs[losses.index(min(losses))]
        late = losses[-max(1, len(losses) // 10) - 1]
        title = "plain networks" if networks == "plain" else f"{networks} networks"
        if best < 0.9 * curves.epochs[-1] and min(losses) < (1 - STILL_FALLING) * losses[-1]:
            past.append(f"{title} ({best})")
        elif losses[-1] < (1 - STILL_FALLING) * late:
            improving.append(title)
    last = max((curves.epochs[-1] for curves in comparison.learning_curves.values()), default=0)
    texts = []
    if past:
        texts.append(f"By their test loss, {_listed(past)} were past their best at {last} epochs.")
    if improving:
        texts.append(f"At {last} epochs, {_listed(improving)} were still improving.")
    return [" ".join(texts)] if texts else []


def _choices(comparison: Comparison) -> list[str]:
    """Says whose chosen epochs are fewer than those of the settings, and whose are the most."""
    epochs = comparison.settings["epochs"]
    past, last = [], []
    for curve in comparison.tuning:
        method = comparison.method(curve.method)
        if curve.chosen is None or curve.size not in (method.table[0], method.table[-1]):
            continue
        title = method.title(curve.size)
        if curve.chosen < epochs:
            past.append(f"{title} ({curve.chosen})")
        elif curve.chosen == curve.epochs[-1]:
            last.append(f"“{title}”" if "," in title else title)
    texts = []
    if past:
        texts.append(f"With the same {epochs} epochs, {_shortened(past)} would be past their best.")
    if last:
        most = max(curve.epochs[-1] for curve in comparison.tuning)
        texts.append(
            f"Cross-validation chose the most epochs that it tried, {most}, for "
            f"{_shortened(last)}: more may be better."
        )
    return [" ".join(texts)] if texts else []


def _unsure_choices(comparison: Comparison) -> list[str]:
    """Says which compared methods cross-validation might have trained otherwise."""
    if comparison.headline is None:
        return []
    method, point = comparison.headline
    ensemble = f"the average of {comparison.ensemble.size}"
    compared = [
        (subject(method, point), choice_of(comparison, method.name, point.size)),
        (ensemble, choice_of(comparison, "plain", comparison.ensemble.size)),
    ]
    texts: list[str] = []
    for name, choice in compared:
        if choice is None or choice.is_sure or choice.other is None:
            continue
        chosen, other = choice.chosen, choice.other
        resamples = "the resamples" if texts else resamples_text(comparison)
        more = signed_text("nll", other.loss - chosen.loss, unit=True).removeprefix("+")
        if comparison.task == "regression":  # Squared errors, in the unit of the target.
            more = significant(other.loss - chosen.loss)
        texts.append(
            f"For {name} it chose {chosen}. Of {resamples}, {share_text(chosen.share)} choose "
            f"these again, and {share_text(other.share)} choose {other}, where the left-out loss "
            f"is {more} higher."
        )
    if not texts:
        return []
    texts.insert(0, "Cross-validation is not sure of its choice.")
    texts.append("The intervals and the verdict do not include this chance.")
    score, same = comparison.curve_scores[0], _same_epochs_point(comparison)
    verdict = point.against_ensemble[score].verdict
    if same is not None and same.against_ensemble[score].verdict == verdict:
        texts.append(
            f"With the same {same.epochs} epochs for all methods the verdict is the same: "
            f"{verdict}."
        )
    return [" ".join(texts)]


def _same_epochs_point(comparison: Comparison) -> Point | None:
    """The headline's method where all methods train equally long."""
    if comparison.same_epochs is None or comparison.headline is None:
        return None
    method, point = comparison.headline
    same = next((m for m in comparison.same_epochs if m.name == method.name), None)
    return None if same is None else same.point(point.size)


def _verdicts_differ(comparison: Comparison, same: Point) -> bool:
    """Whether the headline's verdict is another one with the same epochs for all methods."""
    assert comparison.headline is not None
    score = comparison.curve_scores[0]
    points = (same, comparison.headline[1])
    verdict, own = (point.against_ensemble[score].verdict for point in points)
    return verdict != own and {verdict, own} != {"refused", "undecided"}


def _same_epochs(comparison: Comparison) -> list[str]:
    """Says if the verdict is another one when all methods train equally long."""
    other = _same_epochs_point(comparison)
    if other is None or not _verdicts_differ(comparison, other):
        return []
    score = comparison.curve_scores[0]
    verdict = other.against_ensemble[score].verdict
    return [
        f"With the same {other.epochs} epochs for all methods the verdict is another one: "
        f"{verdict}, {difference_text(score, other.minus_ensemble[score], unit=True)} to the "
        "average."
    ]


def _influence(comparison: Comparison) -> list[str]:
    """Says which test examples carry the difference to the average of all plain networks."""
    if not comparison.influence:
        return []
    found = comparison.influence[-1]
    score = found.score
    other = f"the average of {found.against}" if found.against > 1 else "one plain network"
    method = comparison.method(found.method)
    name = subject(method, method.point(found.size))
    text = (
        f"{name[0].upper()}{name[1:]} has the lower {SCORES[score].title} on "
        f"{share_text(found.share_better)} of the test examples, and {other} on "
        f"{share_text(found.share_worse)}."
    )
    gains, losses = gains_and_losses(found)
    if gains < 0 < losses:
        cancel = min(-gains, losses) >= NEARLY * max(-gains, losses)
        these = f"{'the' if cancel else 'The'} examples that favour {name} add up to"
        text += (
            f" {'Gains and losses nearly cancel: ' if cancel else ''}{these} "
            f"{signed_text(score, gains, unit=True)}, the others to {signed_text(score, losses)}."
        )
    if found.half is not None:
        difference = signed_text(score, found.difference, unit=True)
        text += (
            f" Half of the mean difference, {difference}, comes from "
            f"{_counted(found.half, 'example')}."
        )
    if found.difference != 0 and "5" in found.without:
        rest = signed_text(score, found.without["5"], unit=True)
        text += f" Without the 5 examples that contribute most to the difference, it is {rest}"
        if found.without_largest_group is not None:
            rest = signed_text(score, found.without_largest_group, unit=True)
            group = f"{comparison.data['group_name']} {found.largest_group}"
            text += f"; without {group}, it is {rest}"
        text += "."
    return [text]


def _tokens(comparison: Comparison) -> list[str]:
    """Says what an example is where labels are per token."""
    if not comparison.is_per_token:
        return []
    text = "An example of this report is a token with a label. Scores are means over tokens."
    if comparison.data["group_name"] == "sequence":
        text += (
            " If several sequences come from one text or author, the intervals are too narrow "
            "without groups."
        )
    return [text]


def _independence(comparison: Comparison) -> list[str]:
    data = comparison.data
    if data.get("group_name"):
        # Groups given as an array have no name of their own.
        name = "" if data["group_name"] == "group" else f" by {data['group_name']}"
        text = (
            f"The test examples lie in {data['num_groups']} groups{name}. "
            "Intervals and tests take the groups as independent, not the examples."
        )
        if data.get("groups_in_training"):
            text += (
                " The groups have training examples too, so the results are for known groups, not "
                "for new ones."
            )
        return [text]
    return [
        "Intervals and tests take the test examples as independent. If several come from one "
        "source, such as a writer or a patient, the intervals are too narrow without groups."
    ]


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    # Labels such as "dropout, 50 masks" hold a comma.
    comma = "; " if any("," in name for name in names) else ", "
    return f"{comma.join(names[:-1])} and {names[-1]}"


def _shortened(names: Sequence[str]) -> str:
    if len(names) <= MAX_NAMES:
        return _listed(names)
    return _listed([*names[: MAX_NAMES - 1], f"{len(names) - MAX_NAMES + 1} others"])


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
