"""What a reader must know before quoting the result: each kind of caution once."""

from collections.abc import Sequence

from jdrop.study.report.numbers import (
    difference_text,
    mean_text,
    share_text,
    signed_text,
)
from jdrop.study.report.sentence import second_score, subject
from jdrop.study.results import Comparison
from jdrop.study.scores import SCORES

STILL_FALLING = 0.01
"""The share by which a loss must fall over the last tenth of a training to be called falling."""

MAX_NAMES = 4
"""Names in a list of methods; the plain and the dropout networks are the first."""


def cautions(comparison: Comparison) -> list[str]:
    """Returns the cautions, the gravest first. Only the main score is judged."""
    return [
        *_refusals(comparison),
        *_simple_models(comparison),
        *_training_length(comparison),
        *_same_epochs(comparison),
        *_influence(comparison),
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
    past, improving = [], []
    if comparison.tuning:
        epochs = comparison.settings["epochs"]
        last = max(curve.epochs[-1] for curve in comparison.tuning)
        for curve in comparison.tuning:
            method = comparison.method(curve.method)
            if curve.chosen is None or curve.size not in (method.table[0], method.table[-1]):
                continue
            title = method.title(curve.size)
            if curve.chosen < epochs:
                past.append(f"{title} ({curve.chosen})")
            if curve.chosen == curve.epochs[-1]:
                improving.append(title)
        texts = []
        if past:
            texts.append(
                f"By cross-validation the {epochs} epochs of the settings are past the best of "
                f"{_shortened(past)}."
            )
        if improving:
            texts.append(
                f"At {last} epochs, the most that were tried, the left-out loss of "
                f"{_shortened(improving)} was still falling."
            )
        return [" ".join(texts)] if texts else []
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


def _same_epochs(comparison: Comparison) -> list[str]:
    """Says if the verdict is another one when all methods train equally long."""
    if comparison.same_epochs is None or comparison.headline is None:
        return []
    method, point = comparison.headline
    same = next((m for m in comparison.same_epochs if m.name == method.name), None)
    if same is None:
        return []
    score = comparison.curve_scores[0]
    other = same.point(point.size)
    verdict, own = (p.against_ensemble[score].verdict for p in (other, point))
    if verdict == own or {verdict, own} == {"refused", "undecided"}:
        return []
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
    who = f"the average of {found.against}" if found.against > 1 else "one plain network"
    method = comparison.method(found.method)
    subject_text = subject(method, method.point(found.size))
    text = (
        f"{subject_text[0].upper()}{subject_text[1:]} has the lower {SCORES[found.score].title} "
        f"on {share_text(found.share_better)} of the test examples, and {who} on "
        f"{share_text(found.share_worse)}."
    )
    if found.half is not None:
        difference = signed_text(found.score, found.difference)
        text += (
            f" Half of their mean difference, {difference}, comes from "
            f"{_counted(found.half, 'example')}"
        )
        if found.difference < 0 and "5" in found.without:
            rest = signed_text(found.score, found.without["5"], unit=True)
            text += f"; without the 5 examples that favour {subject_text} most it is {rest}"
        text += "."
    if found.largest_group is not None and found.largest_group_share is not None:
        text += (
            f" The {comparison.data['group_name']} {found.largest_group} alone carries "
            f"{share_text(found.largest_group_share)} of the difference."
        )
    return [text]


def _independence(comparison: Comparison) -> list[str]:
    data = comparison.data
    if data.get("group_name"):
        return [
            f"The test examples lie in {data['num_groups']} groups by {data['group_name']}. "
            "Intervals and tests take the groups as independent, not the examples."
        ]
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
