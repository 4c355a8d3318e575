"""Made-up comparisons that hold all that a report shows, with numbers like those of real ones."""

import dataclasses
from functools import cache

import numpy as np

from jdrop.statistics import (
    EnsembleCurve,
    Interval,
    crossed_interval,
    equivalence_test,
    mean_interval,
)
from jdrop.study.analyses import (
    Ambiguity,
    Cell,
    CoAdaptation,
    Diversity,
    Exact,
    Influence,
    LearningCurve,
    MaskCurve,
    Overfitting,
    TuningCurve,
)
from jdrop.study.methods import METHODS
from jdrop.study.results import (
    Comparison,
    Cost,
    MethodResult,
    Point,
    Reliability,
    RiskCoverage,
)
from jdrop.study.scores import CURVE_SCORES

REPLICATES, EXAMPLES = 5, 400
SIZES = {"plain": 10, "dropout": 5, "monte-carlo": 50}
MARGINS = {
    "classification": {"nll": 0.01, "calibrated_nll": 0.01, "brier": 0.005, "error": 0.005},
    "regression": {"calibrated_nll": 0.01, "crps": 0.5, "mse": 60.0},
}
SPECS = {
    # The mean margin of the logits, the spread between networks, the epochs, and a seed.
    "plain": (4.4, 1.6, 20, 1),
    "dropout": (4.6, 0.9, 75, 2),
    "monte-carlo": (4.4, 1.0, 75, 3),
    "weight-scaling": (4.55, 0.95, 75, 8),
    "weight-decay": (4.6, 0.9, 75, 4),
    "early-stopping": (4.4, 1.5, 21, 5),
    "wide": (4.45, 1.5, 20, 6),
    "logistic-regression": (3.2, 0.0, None, 7),
}


def _losses(task, margins):
    """By score, the losses of the average of members `[replicate, member, example]`."""
    if task == "regression":
        errors = 90 * np.tanh((margins - 4.4) / 5).mean(1)
        squares = errors**2
        return {
            "calibrated_nll": 4.6 + squares / 3200,
            "crps": 0.56 * np.abs(errors),
            "mse": squares,
        }
    right = (1 / (1 + np.exp(-margins))).mean(1)
    return {
        "nll": -np.log(right),
        "calibrated_nll": -0.97 * np.log(right),
        "brier": 2 * (1 - right) ** 2,
        "error": (right < 0.5).astype(float),
    }


def _by_size(task, name, example_margins):
    """By score, `[replicate, size, example]`, of a method's averages."""
    shift, spread, _, seed = SPECS[name]
    count = SIZES.get(name, 1)
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(REPLICATES, count, EXAMPLES))
    margins = shift - 4.4 + example_margins + spread * noise
    groups = [_losses(task, margins[:, :size]) for size in range(1, count + 1)]
    return {score: np.stack([group[score] for group in groups], 1) for score in groups[0]}


def _method(task, name, losses, references, epochs):
    scores = CURVE_SCORES[task]
    curves = {score: EnsembleCurve(references["plain"][score]) for score in scores}
    single = {score: references["plain"][score][:, 0] for score in scores}
    ensemble = {score: references["plain"][score][:, -1] for score in scores}
    headline = {score: references["dropout"][score][:, 0] for score in scores}
    points = []
    known = METHODS.get(name)
    table = {"plain": [1, 5, 10], "dropout": [1, 5], "monte-carlo": [50]}.get(name, [1])
    for size in range(1, losses[scores[0]].shape[1] + 1):
        at_size = {score: losses[score][:, size - 1] for score in scores}
        networks = 1 if name == "monte-carlo" else size
        width = 5 if name == "wide" else 1
        profile = {}
        if task == "classification" and size in table:
            profile = {"ece": at_size["error"] * 0.5}
        cost = Cost(
            train_flops=1e9 * networks * width * (epochs or 1),
            search_flops=4e9 * networks * (epochs or 0),
            train_seconds=0.2 * networks * width,
            predict_flops=2e5 * size * width,
            predict_seconds=1e-6 * size * width,
            parameters=26_000 * networks * width,
            bytes=104_000 * networks * width,
        )
        points.append(
            Point(
                size=size,
                epochs=epochs,
                weight_decay=1.0 if name == "weight-decay" else None,
                cost=cost if known else None,
                scores={s: crossed_interval(at) for s, at in {**at_size, **profile}.items()},
                over_seeds={s: mean_interval(list(at_size[s].mean(1))) for s in scores},
                minus_single={s: crossed_interval(at_size[s] - single[s]) for s in scores},
                minus_ensemble={s: crossed_interval(at_size[s] - ensemble[s]) for s in scores},
                minus_headline={s: crossed_interval(at_size[s] - headline[s]) for s in scores},
                worth={s: curves[s].equivalent(at_size[s]) for s in scores},
                against_ensemble={
                    s: equivalence_test(at_size[s] - ensemble[s], MARGINS[task][s]) for s in scores
                },
                reliability=_reliability() if profile else None,
                risk_coverage=_risk_coverage() if profile else None,
            )
        )
    return MethodResult(
        name=name,
        label=known.label.replace("{budget}", "5") if known else name.replace("-", " "),
        explanation=known.explanation.replace("{budget}", "5") if known else "A linear model.",
        unit=known.unit if known else "networks",
        points=points,
        table=table,
        is_control=bool(known and known.group.is_control),
        is_baseline=known is None,
    )


def _reliability():
    confidence = np.linspace(0.1, 0.99, 10)
    return Reliability(confidence.tolist(), (confidence**1.3).tolist(), [0.1] * 10)


def _risk_coverage():
    coverage = np.linspace(0.01, 1, 30)
    return RiskCoverage(coverage.tolist(), (0.04 * coverage**3).tolist())


def influence(method_losses, plain_losses, against, score):
    """What the evaluation finds about the examples that carry a difference."""
    differences = np.sort((method_losses - plain_losses).mean(0))
    total = differences.mean()
    leading = np.sort(-np.sign(total) * differences)
    half = int(np.argmax(leading.cumsum() <= -abs(differences.sum()) / 2)) + 1
    return Influence(
        method="dropout",
        size=1,
        against=against,
        score=score,
        difference=float(total),
        share_better=float((differences < 0).mean()),
        share_worse=float((differences > 0).mean()),
        half=half,
        without={str(count): float(differences[count:].mean()) for count in (1, 5, 10)},
        largest_group=None,
        largest_group_share=None,
        without_largest_group=None,
        differences=differences.tolist(),
        cumulative=(differences.cumsum() / len(differences)).tolist(),
    )


@cache
def comparison(task="classification"):
    """Methods, their differences and all analyses, from simulated losses."""
    rng = np.random.default_rng(7)
    example_margins = 4.4 + 2.2 * rng.standard_t(4, size=EXAMPLES)
    names = [name for name in SPECS if task == "classification" or name != "early-stopping"]
    losses = {name: _by_size(task, name, example_margins) for name in names}
    scores = CURVE_SCORES[task]
    main = scores[0]
    methods = [_method(task, name, losses[name], losses, SPECS[name][2]) for name in names]
    same_epochs = [
        _method(task, name, losses[name], losses, 50) for name in names if SPECS[name][2]
    ]
    dropout = methods[1].points[0]
    plain = losses["plain"][main]
    interval = dropout.scores[main]
    layers = {"Dropout_0": interval, "Dropout_1": interval}
    hidden_units = CoAdaptation(
        correlation=layers,
        zero_share=layers,
        sparseness=layers,
        activation_counts={"Dropout_0": [0.9, 0.1], "Dropout_1": [0.8, 0.2]},
        activation_min={"Dropout_0": 0.0, "Dropout_1": -1.0},
        activation_max={"Dropout_0": 1.0, "Dropout_1": 1.0},
        deleted=[0.0, 0.5, 1.0],
        deletion={main: [0.2, 0.5, 1.0]},
        features=[[0.0, 1.0, -1.0, 0.5]] * 3,
    )
    first = "mse" if task == "regression" else "nll"
    second = "mse" if task == "regression" else "error"
    gaps = {name: dropout.scores[name] for name in {first, second}}
    enumerated = {name: dropout.scores.get(name, interval) for name in ("nll", "brier", "error")}
    epochs = list(range(1, 51))
    masks = [1, 2, 5, 10, 20, 50]
    candidates = [5, 10, 20, 30, 50, 75, 100]
    both = ("plain", "dropout")
    spread = Ambiguity(dropout.scores[main], dropout.scores[main], dropout.scores[main])
    return Comparison(
        task=task,
        command="jdrop compare --dataset made-up",
        settings={"replicates": REPLICATES, "epochs": 50, "budget": 5},
        data={
            "name": "made up",
            "train_size": 500,
            "test_size": EXAMPLES,
            "num_classes": 10,
            "label_noise": 0.0,
            "ood_name": None,
            "group_name": None,
            "num_groups": None,
            "groups_in_training": False,
        },
        versions={"jdrop": "0.2.0"},
        seconds={"training": 12.0},
        margins=MARGINS[task],
        replicates=REPLICATES,
        methods=methods,
        same_epochs=same_epochs,
        tuning=[
            TuningCurve(
                method=name,
                size=size,
                weight_decay=None,
                epochs=candidates,
                losses=[0.1 + 0.02 * abs(np.log(e / chosen)) + shift for e in candidates],
                chosen=chosen,
            )
            for name, size, chosen, shift in (
                ("plain", 1, 20, 0.04),
                ("plain", 10, 30, 0.02),
                ("dropout", 1, 100, 0.0),
            )
        ],
        influence=[
            influence(losses["dropout"][main][:, 0], plain[:, 0], 1, main),
            influence(losses["dropout"][main][:, 0], plain[:, -1], SIZES["plain"], main),
        ],
        diversity=[
            Diversity(name, 5, interval, interval, interval, interval, {"arithmetic NLL": spread})
            for name in ("plain", "dropout", "monte-carlo")
        ],
        mask_curve=MaskCurve(
            num_masks=masks,
            scores={
                score: [dropout.scores[score].mean * (1 + 0.3 / count) for count in masks]
                for score in scores
            },
            weight_scaling={s: 1.04 * dropout.scores[s].mean for s in scores},
            minus_weight_scaling=methods[2].points[-1].minus_headline,
            masks_needed={score: dropout.worth[score] for score in scores},
        ),
        exact=Exact(4, 16, *[enumerated] * 5) if task == "classification" else None,
        overfitting=[
            Overfitting(networks, size, gaps, gaps, gaps)
            for networks in both
            for size in (125, 500)
        ],
        learning_curves={
            networks: LearningCurve(
                epochs,
                {first: [1 / epoch for epoch in epochs]},
                {first: [level + 0.5 / epoch for epoch in epochs]},
            )
            for networks, level in zip(both, (0.15, 0.12), strict=True)
        },
        co_adaptation=dict.fromkeys(both, hidden_units),
        sweep=[
            Cell(
                {"rate": rate},
                {
                    "plain": methods[0].points[0].scores,
                    "ensemble": methods[0].points[-1].scores,
                    "dropout": dropout.scores,
                },
                dropout.worth,
            )
            for rate in (0.1, 0.5)
        ],
        left_out=["Nothing was trained."],
    )


def with_given(full, name):
    """The same with a single given network, of any name."""
    point = full.method("dropout").points[0]
    over_seeds = {
        score: Interval(interval.mean, None, None, 1)
        for score, interval in point.over_seeds.items()
    }
    given = MethodResult(
        name=name,
        label=f"{name}, {{n}}",
        explanation="Given predictions.",
        unit="networks",
        points=[dataclasses.replace(point, over_seeds=over_seeds, epochs=None)],
        table=[1],
        retrained=False,
    )
    return dataclasses.replace(full, methods=[*full.methods, given])


def with_point(full, name, **changes):
    """The same with changes to a method's first point."""
    method = full.method(name)
    first = dataclasses.replace(method.points[0], **changes)
    changed = dataclasses.replace(method, points=[first, *method.points[1:]])
    methods = [changed if other.name == name else other for other in full.methods]
    return dataclasses.replace(full, methods=methods)


def with_refusal(comparison, name, reason):
    """A method whose verdicts and worths are refused."""
    point = comparison.method(name).points[0]
    tests = {
        score: dataclasses.replace(test, refusal=reason, p_value=None)
        for score, test in point.against_ensemble.items()
    }
    worth = {s: dataclasses.replace(w, refusal=reason) for s, w in point.worth.items()}
    return with_point(comparison, name, against_ensemble=tests, worth=worth)


def with_verdict(comparison, name, low, high):
    """A method whose 90 % interval against all plain networks is changed."""
    point = comparison.method(name).points[0]
    test = point.against_ensemble["nll"]
    difference = Interval((low + high) / 2, low, high, 5)
    changed = dataclasses.replace(test, difference=difference, p_value=0.01)
    tests = {**point.against_ensemble, "nll": changed}
    return with_point(comparison, name, against_ensemble=tests)


def without_costs(full):
    """The same as an evaluation of given predictions returns it: no costs, epochs or theory."""
    methods = [
        dataclasses.replace(
            method,
            points=[dataclasses.replace(p, cost=None, epochs=None) for p in method.points],
        )
        for method in full.methods
        if not (method.is_control or method.is_baseline or method.name == "weight-scaling")
    ]
    return dataclasses.replace(
        full,
        methods=methods,
        same_epochs=None,
        tuning=[],
        influence=[],
        exact=None,
        overfitting=[],
        learning_curves={},
        co_adaptation={},
        sweep=[],
        data={**full.data, "train_size": None},
    )
