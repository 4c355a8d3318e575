"""The tables of the page."""

from jdrop.statistics import Interval
from jdrop.study.analyses import Influence
from jdrop.study.report.numbers import (
    MARK,
    difference_text,
    ends_text,
    interval_text,
    mean_text,
    p_value_text,
    score_text,
    share_text,
    signed_text,
    significant,
)
from jdrop.study.report.sentence import second_score
from jdrop.study.results import Comparison, MethodResult, Point
from jdrop.study.scores import SCORES

PROFILE_SCORES = (
    "ece",
    "ece_equal_mass",
    "debiased_ece",
    "aurc",
    "entropy",
    "mutual_information",
    "auroc_entropy",
    "auroc_mutual_information",
    "rmse",
    "coverage",
)
"""Scores that are not means over examples."""

Rows = list[list[str]]


def score_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: the scores, the epochs and the weight decay of each method."""
    scores = comparison.curve_scores
    scores += ("perplexity",) if comparison.is_per_token else ()
    points = [point for _, point in comparison.table]
    has_epochs = any(point.epochs is not None for point in points)
    has_decay = any(point.weight_decay is not None for point in points)
    header = ["method", *(SCORES[score].title_with_unit for score in scores)]
    header += ["epochs"] * has_epochs + ["weight decay"] * has_decay
    rows = []
    for method, point in comparison.table:
        row = [method.title(point.size)]
        row += [
            _marked(score, point, score_text(score, point.over_seeds[score])) for score in scores
        ]
        row += ["" if point.epochs is None else f"{point.epochs}"] * has_epochs
        row += ["" if point.weight_decay is None else f"{point.weight_decay:g}"] * has_decay
        rows.append(row)
    return header, rows


def cost_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: what training and a prediction cost; empty where it is unknown."""
    plain_cost = comparison.single.cost
    if not comparison.has_costs or plain_cost is None:
        return [], []
    header = ["method", "training", "search", "training with search", "prediction"]
    header += ["parameters", "training seconds"]
    rows = []
    for method, point in comparison.table:
        if (cost := point.cost) is None:
            continue
        ratios = (
            cost.train_flops / plain_cost.train_flops,
            cost.search_flops / plain_cost.train_flops,
            (cost.train_flops + cost.search_flops) / plain_cost.train_flops,
            cost.predict_flops / plain_cost.predict_flops,
        )
        row = [method.title(point.size), *(f"{ratio:.2f}" for ratio in ratios)]
        row += [f"{cost.parameters:,}", significant(cost.train_seconds, max_decimals=2)]
        rows.append(row)
    return header, rows


def _marked(score: str, point: Point, text: str) -> str:
    return text + MARK if score in point.unreliable else text


def score_note(comparison: Comparison) -> str:
    """Explains the intervals of the score table, and which networks its rows average."""
    main_score = comparison.curve_scores[0]
    names = {method.name for method in comparison.methods}
    sentences = [
        "±: half the 95 % interval for new trainings, on these test examples.",
        "With new trainings and new test examples the interval is wider: one plain network has "
        f"{score_text(main_score, comparison.single.scores[main_score], unit=True)} in "
        f"{SCORES[main_score].title}.",
        "Intervals are for the mean over trainings on these training examples. Each interval "
        "stands alone: it is not widened for multiple comparisons.",
    ]
    if not all(method.retrained for method in comparison.methods if not method.is_baseline):
        sentences.append(
            "A row without ± is of one given network. The intervals of its worth hold for this "
            "network, not for training it anew."
        )
    sentences.append("Scores are means over all networks of a replicate.")
    if {"dropout", "weight-scaling"} <= names:
        same = comparison.method("weight-scaling").title(1)
        sentences.append(
            "Masks are drawn for the first dropout network of each replicate only. The row "
            f"“{same}” is of these networks too, without masks."
        )
    if comparison.mask_curve is not None:
        difference = comparison.mask_curve.minus_weight_scaling[main_score]
        sentences.append(
            f"For the same networks, all masks minus weight scaling is "
            f"{difference_text(main_score, difference, unit=True)} in {SCORES[main_score].title}."
        )
    profiled = "ECE, AURC, AUROC, entropy and mutual information are"
    if comparison.task == "regression":
        profiled = "Coverage is"
    sentences.append(
        f"{profiled} of the first networks of each replicate, as many as the row says."
    )
    if any(point.unreliable for _, point in comparison.table):
        sentences.append(
            f"Scores marked {MARK} are unreliable and have no worth. Calibration fits a "
            "temperature on half of the test examples. It fails where every prediction of a half "
            "is right, and where the halves are small."
        )
    return " ".join(sentences)


def difference_table(comparison: Comparison, score: str) -> tuple[list[str], Rows]:
    """Returns header and rows: the differences in a score to plain networks, and the verdicts."""
    shown_as = SCORES[score]
    unit = f", {shown_as.difference_unit}" if shown_as.difference_unit else ""
    header = [
        "method",
        f"{shown_as.title} − one plain{unit}",
        f"{shown_as.title} − average of {comparison.ensemble.size}{unit}",
        "its 90 % interval",
        "enough?",
        "p",
    ]
    rows = []
    for method, point in comparison.table:
        test = point.against_ensemble[score]
        row = [
            method.title(point.size),
            _difference(point, comparison.single, score, point.minus_single[score]),
            _difference(point, comparison.ensemble, score, point.minus_ensemble[score]),
        ]
        is_reference = point is comparison.ensemble
        row += ["" if is_reference else ends_text(score, test.difference)]
        row += ["" if is_reference else test.verdict]
        row += ["" if is_reference else p_value_text(test)]
        rows.append(row)
    return header, rows


def _difference(point: Point, reference: Point, score: str, difference: Interval) -> str:
    if point is reference:
        return ""
    return _marked(score, point, difference_text(score, difference))


def worth_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: the worth of each method in each score."""
    scores = comparison.curve_scores
    rows = [
        [
            method.title(point.size),
            *("n/a" if score in point.unreliable else str(point.worth[score]) for score in scores),
        ]
        for method, point in comparison.table
        if method.name != "plain"
    ]
    return ["method", *(SCORES[score].title for score in scores)], rows


def epochs_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: each method at its own epochs, beside the same epochs for all."""
    if comparison.same_epochs is None:
        return [], []
    score = comparison.curve_scores[0]
    shown_as = SCORES[score]
    own = {method.name: method for method in comparison.methods}
    same_for_all = comparison.settings["epochs"]
    columns = (f"vs average of {comparison.ensemble.size}", "worth", "enough?")
    header = ["method", *(f"own: {column}" for column in ("epochs", *columns))]
    same_columns = (shown_as.title_with_unit, *columns)
    header += [f"{same_for_all} epochs: {column}" for column in same_columns]
    rows = []
    for method in comparison.same_epochs:
        if method.is_baseline:
            continue
        for size in method.table:
            row = [method.title(size)]
            if method.name in own:
                point = own[method.name].point(size)
                row.append("" if point.epochs is None else f"{point.epochs}")
                row += _view_cells(method, point, comparison.ensemble.size, score)
            else:
                row += [""] * 4
            point = method.point(size)
            row.append(mean_text(score, point.scores[score]))
            row += _view_cells(method, point, comparison.ensemble.size, score)
            rows.append(row)
    return header, rows


def _view_cells(method: MethodResult, point: Point, largest: int, score: str) -> list[str]:
    is_plain = method.name == "plain"
    is_reference = is_plain and point.size == largest
    return [
        "" if is_reference else difference_text(score, point.minus_ensemble[score]),
        "" if is_plain else str(point.worth[score]),
        "" if is_reference else point.against_ensemble[score].verdict,
    ]


def sweep_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: the scores, and the worth, at each combination of swept settings."""
    cells = comparison.sweep
    if not cells:
        return [], []
    scores = list(dict.fromkeys((comparison.curve_scores[0], second_score(comparison))))
    names = list(cells[0].at)
    largest = cells[0].worth[scores[0]].largest
    networks = {"plain": "one plain", "ensemble": f"{largest} plain", "dropout": "one dropout"}
    header = [name.replace("_", " ") for name in names]
    header += [
        f"{SCORES[score].title_with_unit}: {title}"
        for score in scores
        for title in networks.values()
    ]
    header.append(f"worth in {SCORES[scores[0]].title}")
    rows = []
    for cell in cells:
        row = [f"{cell.at[name]:g}" for name in names]
        row += [
            score_text(score, cell.scores[name][score]) for score in scores for name in networks
        ]
        rows.append([*row, str(cell.worth[scores[0]])])
    return header, rows


def influence_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: which test examples carry the headline's differences."""
    found = comparison.influence
    if not found:
        return [], []
    header = ["difference", "all examples", "better on", "worse on", "gains", "losses"]
    header += ["half comes from"]
    header += [f"without the top {count}" for count in found[0].without]
    has_groups = any(result.largest_group is not None for result in found)
    header += [f"without one {comparison.data['group_name']}"] if has_groups else []
    rows = []
    for result in found:
        method = comparison.method(result.method).title(result.size)
        against = comparison.method("plain").title(result.against)
        score, half = result.score, result.half
        gains, losses = gains_and_losses(result)
        row = [f"{SCORES[score].title}: {method} − {against}"]
        row += [signed_text(score, result.difference)]
        row += [share_text(result.share_better), share_text(result.share_worse)]
        row += [signed_text(score, gains), signed_text(score, losses)]
        row.append("" if half is None else f"{half:,} example{'' if half == 1 else 's'}")
        row += [signed_text(score, without) for without in result.without.values()]
        if has_groups:
            rest = result.without_largest_group
            text = "" if rest is None else f"{result.largest_group}: {signed_text(score, rest)}"
            row.append(text)
        rows.append(row)
    return header, rows


def gains_and_losses(result: Influence) -> tuple[float, float]:
    """The sums of the negative and of the positive differences, over the number of examples."""
    # The running sum of the sorted differences falls while they are negative, then rises.
    gains = min(0.0, min(result.cumulative))
    return gains, result.difference - gains


def profile_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: calibration, selective prediction, detection."""
    scores = [
        score
        for score in PROFILE_SCORES
        if any(score in point.scores for _, point in comparison.table)
    ]
    rows = []
    for method, point in comparison.table:
        cells = [
            score_text(score, point.scores[score]) if score in point.scores else "n/a"
            for score in scores
        ]
        rows.append([method.title(point.size), *cells])
    return ["method", *(SCORES[score].title_with_unit for score in scores)], rows


def diversity_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Returns header and rows: how much the members of averages differ."""
    results = comparison.diversity
    if not results:
        return [], []
    ambiguities = list(results[0].ambiguity)
    measures = [
        ("disagreement", "disagreement, %", 100, 2),
        ("pairwise_kl", "pairwise KL, nats", 1, None),
        ("q_statistic", "Q", 1, 3),
        ("mutual_information", "MI, nats", 1, None),
    ]
    measures = [measure for measure in measures if getattr(results[0], measure[0]) is not None]
    header = ["members", *(title for _, title, _, _ in measures)]
    header += [f"{name}: members − diversity = pool" for name in ambiguities]
    rows = []
    for result in results:
        row = [comparison.method(result.method).title(str(result.size))]
        row += [
            interval_text(getattr(result, name), scale, max_decimals=max_decimals)
            for name, _, scale, max_decimals in measures
        ]
        for name in ambiguities:
            terms = result.ambiguity[name]
            # One count of decimals, so that the sum is seen to be right.
            row.append(
                f"{terms.members.mean:.4f} − {terms.diversity.mean:.4f} = {terms.pool.mean:.4f}"
            )
        rows.append(row)
    return header, rows
