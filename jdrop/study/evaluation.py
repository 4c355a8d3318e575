"""From what networks predicted to what that says: scores, equivalents, diversity. No training.

Everything is scored for each replicate apart, and by example where a score is a mean over them:
replicates and examples are what the intervals are over.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax import Array
from jax.typing import ArrayLike

from jdrop import inference, metrics
from jdrop.statistics import (
    EnsembleCurve,
    Interval,
    bootstrap_weights,
    crossed_interval,
    equivalence_test,
    mean_interval,
)
from jdrop.study import bootstrap
from jdrop.study.results import (
    CURVE_SCORES,
    Ambiguity,
    Cell,
    CoAdaptation,
    Comparison,
    Cost,
    Diversity,
    Exact,
    LearningCurve,
    MaskCurve,
    Method,
    Overfitting,
    Point,
    Reliability,
    RiskCoverage,
)
from jdrop.study.run import Part, Run, versions
from jdrop.study.tables import Predictions

DEFAULT_MARGINS = {"nll": 0.01, "calibrated_nll": 0.01, "brier": 0.005, "error": 0.005}
"""Differences that are held to be none, in classification."""

AMBIGUITIES = ("arithmetic NLL", "geometric NLL", "arithmetic Brier", "MSE")

NUM_DRAWS = 1000  # Of the bootstrap.

PADDING = 10  # Of members to equal shapes: few programs to compile.

NUM_HALVINGS = 5  # For calibration, as Ashukha et al. 2020.

MASK_SIZES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)
"""Numbers of masks at which all scores are taken."""

NUM_MASK_ORDERS = 5
"""Orders of the masks whose first ones are averaged; networks have as many orders as networks."""

KINDS = {
    "plain": ("{n} plain", "Networks trained without dropout, averaged."),
    "dropout": (
        "{n} dropout",
        "Networks trained with dropout, each read once without it (weight scaling), averaged.",
    ),
    "monte-carlo": (
        "dropout, {n} masks",
        "One network trained with dropout, read with masks drawn anew and averaged.",
    ),
    "dropout-thinned": (
        "thinned dropout",
        "A network trained with dropout that deletes units in blocks, the same for the whole "
        "batch, and computes only the thinned network; read without dropout (weight scaling).",
    ),
    "small": (
        "{n} small plain",
        "Narrow networks without dropout, averaged, that have one network's parameters in all.",
    ),
    "wide": (
        "{n} wide plain",
        "A network without dropout that has the parameters of {budget}.",
    ),
    "long": (
        "dropout, {budget}x epochs",
        "A network trained with dropout for {budget} times the epochs, read by weight scaling.",
    ),
    "early-stopping": (
        "early stopping",
        "A network without dropout as it was when a tenth of the training examples, held out, had "
        "the smallest loss; it is not trained again on all of them.",
    ),
    "weight-decay": (
        "weight decay",
        "A network without dropout trained by AdamW, with the decay that was best on a tenth of "
        "the training examples, held out; it is not trained again on all of them.",
    ),
    "fixed-masks": (
        "{n} with fixed masks",
        "Thinned networks with weights of their own, each with one mask for its whole life, "
        "averaged: dropout without shared weights.",
    ),
    "masksembles": (
        "Masksembles, {n}",
        "One network trained with a few fixed masks in turn, read with each and averaged.",
    ),
}
"""By method: its label, and what it is."""


@dataclass(frozen=True)
class Reading:
    """What one method predicted.

    Attributes:
        name: of the method.
        outputs: `[replicate, member, example, ...]`; a member is a network or a mask.
        ood_outputs: the same for inputs of another kind.
        unit: what a member is, "networks" or "masks".
        cost: of one member; None where it is not known.
        table: sizes that tables show.
        sizes: how many members are averaged.
        retrained: see `Method.retrained`.
    """

    name: str
    outputs: np.ndarray
    ood_outputs: np.ndarray | None
    unit: str
    cost: Cost | None
    table: tuple[int, ...]
    sizes: tuple[int, ...]
    retrained: bool = True

    @property
    def trainings(self) -> int:
        """Of how many trainings the spread is known."""
        return len(self.outputs) if self.retrained else 1


@jax.jit
def _classification_losses(
    key: Array,
    log_probs: Array,
    labels: Array,
    calibrate: Array,
    num_members: ArrayLike,
    num_orders: ArrayLike,
) -> dict[str, Array]:
    """Losses `[size, example]` of averages of members, each size a mean over orders of them.

    Members from `num_members` on are there to make shapes equal; so are the sizes beyond.
    """
    pool = inference.POOLS["arithmetic"]
    sizes = jnp.arange(1, len(log_probs) + 1)

    def add_one(carry: Any, step: tuple[Array, Array, Array]) -> tuple[Any, dict[str, Array]]:
        member, size, calibrated = step
        total = size.astype(log_probs.dtype)
        carry = pool.add(carry, log_probs[member], jnp.ones_like(total), total)
        pooled = pool.finish(carry, total)
        losses = metrics.losses(pooled, labels)
        losses["calibrated_nll"] = jax.lax.cond(
            calibrated,
            lambda: metrics.calibrated_losses(
                jax.random.clone(key), pooled, labels, num_repeats=NUM_HALVINGS
            ),
            lambda: jnp.full_like(losses["nll"], jnp.nan),
        )
        return carry, losses

    def order(number: Array) -> dict[str, Array]:
        start = number * num_members // num_orders
        # Neighbours on a circle of all members: each is in equally many averages of a size.
        members = (start + sizes - 1) % num_members
        return jax.lax.scan(add_one, pool.start(log_probs[0]), (members, sizes, calibrate))[1]

    sums = jax.lax.fori_loop(
        0,
        num_orders,
        lambda number, sums: jax.tree.map(jnp.add, sums, order(number)),
        jax.tree.map(jnp.zeros_like, jax.eval_shape(order, 0)),
    )
    return jax.tree.map(lambda values: values / num_orders, sums)


@partial(jax.jit, static_argnames="size")
def _regression_losses(
    key: Array, means: Array, targets: Array, starts: Array, *, size: int
) -> dict[str, Array]:
    """Losses `[example]` of averages of so many members: a mean over groups of them."""
    num_members, num_examples = means.shape

    def group(start: Array) -> dict[str, Array]:
        members = means[(start + jnp.arange(size)) % num_members]

        def crps(fitted: Array, scored: Array) -> Array:
            scale = metrics.fit_scale(members[:, fitted], targets[fitted])
            return metrics.crps_losses(members[:, scored], targets[scored], scale)

        return {
            "calibrated_nll": metrics.calibrated_mixture_losses(
                jax.random.clone(key), members, targets, num_repeats=NUM_HALVINGS
            ),
            "crps": metrics.mean_over_halvings(
                jax.random.clone(key), crps, num_examples, NUM_HALVINGS
            ),
            "mse": metrics.squared_losses(members, targets),
        }

    return jax.tree.map(lambda values: values.mean(0), jax.lax.map(group, starts))


def losses_by_size(reading: Reading, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Losses `[replicate, size, example]` of a method, for its sizes, by score.

    The average of a size is not of the first members alone: it is a mean over several groups of
    the replicate's members, in which each counts alike.
    """
    num_members = reading.outputs.shape[1]
    num_orders = num_members
    if reading.unit == "masks":
        num_orders = min(num_members, NUM_MASK_ORDERS)
    regression = np.issubdtype(labels.dtype, np.floating)
    key = jax.random.key(0)  # One for all that is compared.
    given = jnp.asarray(labels)
    found = []
    for outputs in reading.outputs:
        if regression:
            members = jnp.asarray(outputs)
            starts = jnp.arange(num_orders) * num_members // num_orders
            sizes = [
                _regression_losses(jax.random.clone(key), members, given, starts, size=size)
                for size in reading.sizes
            ]
            found.append(jax.tree.map(lambda *values: np.stack(values), *sizes))
        else:
            padded = -(-num_members // PADDING) * PADDING
            calibrate = np.isin(np.arange(1, padded + 1), reading.sizes)
            members = jnp.asarray(np.resize(outputs, (padded, *outputs.shape[1:])))
            losses = _classification_losses(
                jax.random.clone(key), members, given, calibrate, num_members, num_orders
            )
            at = np.asarray(reading.sizes) - 1
            found.append({name: np.asarray(values)[at] for name, values in losses.items()})
    return {name: np.stack([one[name] for one in found]).astype(np.float64) for name in found[0]}


def evaluate(run: Run, margins: Mapping[str, float] | None = None) -> Comparison:
    """What the predictions in a folder say.

    Args:
        run: a run that is complete.
        margins: by score, the largest difference that is held to be none; the others are
            `DEFAULT_MARGINS`, in regression 0.01 nats, a hundredth of the targets' standard
            deviation for the CRPS, and for the MSE as much times twice the RMSE of all plain
            networks averaged, which moves the RMSE by that hundredth.

    Raises:
        ValueError: a part of the run is missing.
    """
    data = _needed(run, "data")
    labels = data.arrays["test_labels"]
    facts = data.facts
    task = facts["task"]
    scale = facts["target_scale"]
    readings = _readings(run, facts)
    if task == "regression":
        labels = labels * scale + facts["target_mean"]
        plain = next(reading for reading in readings if reading.name == "plain")
        default = _regression_margins(plain, labels, scale)
    else:
        default = DEFAULT_MARGINS
    all_margins = _margins(default, margins)
    methods, losses = _methods(readings, labels, all_margins, run.about["budget"])
    end = _needed(run, "run").facts
    return Comparison(
        task=task,
        command=end.get("command", "unknown"),
        settings=run.about,
        data=facts,
        versions=end["versions"],
        seconds=end["seconds"],
        margins=all_margins,
        replicates=len(readings[0].outputs),
        methods=methods,
        diversity=_all_diversity(readings, labels),
        mask_curve=_mask_curve(readings, losses, labels),
        exact=_exact(run.part("exact"), labels),
        overfitting=_overfitting(run, readings, labels, facts),
        learning_curves=_learning_curves(run, scale),
        co_adaptation=_co_adaptation(run),
        sweep=_sweep(run.part("sweep"), labels, facts),
        left_out=[*end["left_out"], *_unreliable(readings, methods, labels)],
    )


def of_predictions(
    predictions: Predictions,
    name: str,
    replicates: int,
    margins: Mapping[str, float] | None = None,
    command: str = "jdrop.study.evaluation.of_predictions",
) -> Comparison:
    """What given predictions say; nothing is trained.

    The networks of each method are dealt out to as many replicates as are asked for, or to fewer
    where a replicate would have no network of a method, or less than two plain ones. A method of
    which there is only one network has it in all replicates: its intervals hold for that one.
    `left_out` says which of these was done, and which networks are in no replicate.

    Args:
        predictions: of every method.
        name: of the data.
        replicates: how many groups of networks stand for whole repetitions, at least 2.
        margins: see `evaluate`.
        command: what made it, for the report.
    """
    labels = predictions.labels
    plain = predictions.log_probs["plain"]
    several = [len(members) for members in predictions.log_probs.values() if len(members) > 1]
    asked, replicates = replicates, min(replicates, len(plain) // 2, *several)
    left_out = ["Costs, training and the claims of the theory are not in predictions."]
    if replicates < asked:
        left_out.append(
            f"There are {replicates} replicates, not {asked}: each has two plain networks at "
            "least, and one of every method of which more than one was given."
        )
    readings = []
    for method, members in predictions.log_probs.items():
        masks = method == "monte_carlo"
        alone = len(members) == 1
        if alone:
            members = np.repeat(members, replicates, 0)
            left_out.append(
                f"{method} is one network: its intervals hold for that, not for training it anew."
            )
        # Of masks a replicate takes those of one network.
        size = 1 if masks else len(members) // replicates
        if over := len(members) - size * replicates:
            left_out.append(
                f"The last {over} of {method} are in none of the {replicates} replicates, which "
                "are of equal size."
            )
        dealt = members[: size * replicates].reshape(size, replicates, *members.shape[1:])
        dealt = dealt[0] if masks else dealt.swapaxes(0, 1)
        most = dealt.shape[1]
        reading = _reading(
            method.replace("_", "-"),
            np.ascontiguousarray(dealt),
            None,
            "masks" if masks else "networks",
            None,
            (most,) if masks else (1, most),
            {"task": "classification"},
        )
        readings.append(replace(reading, retrained=not alone))
    order = {method: place for place, method in enumerate(KINDS)}
    readings.sort(key=lambda reading: order.get(reading.name, len(order)))
    all_margins = _margins(DEFAULT_MARGINS, margins)
    methods, losses = _methods(readings, labels, all_margins, readings[0].outputs.shape[1])
    mask_curve = _mask_curve(readings, losses, labels)
    if mask_curve is None and {"dropout", "monte_carlo"} <= {*predictions.log_probs}:
        left_out.append(
            "How many masks reach weight scaling is not said: that is a question about the same "
            "networks, and of dropout and monte_carlo one is a single network."
        )
    return Comparison(
        task="classification",
        command=command,
        settings={"replicates": replicates},
        data={
            "name": name,
            "train_size": None,
            "test_size": len(labels),
            "num_classes": plain.shape[-1],
            "label_noise": 0.0,
            "ood_name": None,
        },
        versions=versions(),
        seconds={},
        margins=all_margins,
        replicates=replicates,
        methods=methods,
        diversity=_all_diversity(readings, labels),
        mask_curve=mask_curve,
        exact=None,
        overfitting=[],
        learning_curves={},
        co_adaptation={},
        sweep=[],
        left_out=[*left_out, *_unreliable(readings, methods, labels)],
    )


def _regression_margins(plain: Reading, labels: np.ndarray, scale: float) -> dict[str, float]:
    """Differences that are held to be none, in regression: see `evaluate`."""
    step = 0.01 * scale
    rmse = float(np.sqrt(np.mean((plain.outputs.mean(1, dtype=np.float64) - labels) ** 2)))
    # Where the root moves by a small step, the square moves by the step times twice the root.
    return {"calibrated_nll": 0.01, "crps": step, "mse": 2 * step * rmse}


def _margins(default: Mapping[str, float], given: Mapping[str, float] | None) -> dict[str, float]:
    unknown = set(given or ()) - set(default)
    if unknown:
        raise ValueError(
            f"margins must be of {', '.join(default)}, got one of {', '.join(sorted(unknown))}."
        )
    return {**default, **(given or {})}


def _needed(run: Run, name: str) -> Part:
    part = run.part(name)
    if part is None:
        raise ValueError(
            f"{run.folder} holds no complete run: the part {name!r} is missing. Give the command "
            "that began it again, and it goes on."
        )
    return part


def _readings(run: Run, facts: Mapping[str, Any]) -> list[Reading]:
    """Every method that the run has predictions of, in the order of `KINDS`."""
    readings = {}
    budget = run.about["budget"]

    def add(name: str, part: Part, prefix: str, table: Sequence[int], **changes: Any) -> None:
        outputs = part.arrays[f"{prefix}outputs"]
        others = part.arrays.get(f"{prefix}ood_outputs")
        unit = "masks" if name in ("monte-carlo", "masksembles") else "networks"
        cost = _cost(part.facts, masks=name == "monte-carlo", **changes)
        readings[name] = _reading(name, outputs, others, unit, cost, table, facts)

    other_ways = {"monte-carlo", "early-stopping", "weight-decay"}  # Of the same networks.
    for name in KINDS:
        part = None if name in other_ways else run.part(name)
        if part is None:
            continue
        members = part.arrays["outputs"].shape[1]
        table = {
            "plain": (1, min(budget, members), members),
            "dropout": (1, members),
        }.get(name, (members,))
        add(name, part, "", table)
        if "sampled_outputs" in part.arrays:
            add("monte-carlo", part, "sampled_", (part.arrays["sampled_outputs"].shape[1],))
    regularised = run.part("regularised")
    if regularised is not None:
        add("early-stopping", regularised, "early_", (1,))
        decays = regularised.arrays["outputs"]
        num_decays, replicates = decays.shape[1], len(decays)
        loss = np.reshape(regularised.facts["last_loss"], (num_decays, replicates))
        best = loss.argmin(0)
        chosen = {
            name: array[np.arange(replicates), best][:, None]
            for name, array in regularised.arrays.items()
            if name in ("outputs", "ood_outputs")
        }
        add("weight-decay", Part(chosen, regularised.facts), "", (1,), trainings=num_decays)
    return [readings[name] for name in KINDS if name in readings]


def _reading(
    name: str,
    outputs: np.ndarray,
    ood_outputs: np.ndarray | None,
    unit: str,
    cost: Cost | None,
    table: Sequence[int],
    facts: Mapping[str, Any],
) -> Reading:
    members = outputs.shape[1]
    sizes = sorted({*(s for s in MASK_SIZES if s <= members), members})
    if facts["task"] == "regression":
        outputs = outputs * facts["target_scale"] + facts["target_mean"]
    return Reading(
        name=name,
        outputs=outputs,
        ood_outputs=ood_outputs,
        unit=unit,
        cost=cost,
        table=tuple(sorted({*table})),
        sizes=tuple(sizes) if unit == "masks" else tuple(range(1, members + 1)),
    )


def _cost(facts: Mapping[str, Any], *, masks: bool, trainings: int = 1) -> Cost:
    """Of one network, or of one mask."""
    num_networks = facts["num_networks"]
    return Cost(
        train_flops=trainings * facts["train_flops"],
        train_seconds=trainings * facts["train_seconds"] / num_networks,
        predict_flops=facts["sample_flops" if masks else "predict_flops"],
        predict_seconds=facts["sample_seconds" if masks else "predict_seconds"],
        parameters=facts["num_parameters"],
        bytes=facts["num_bytes"],
    )


def _cost_of_size(reading: Reading, size: int) -> Cost | None:
    cost = reading.cost
    if cost is None:
        return None
    kept = 1 if reading.unit == "masks" else size
    return Cost(
        train_flops=kept * cost.train_flops,
        train_seconds=kept * cost.train_seconds,
        predict_flops=size * cost.predict_flops,
        predict_seconds=size * cost.predict_seconds,
        parameters=kept * cost.parameters,
        bytes=kept * cost.bytes,
    )


def _methods(
    readings: Sequence[Reading], labels: np.ndarray, margins: Mapping[str, float], budget: int
) -> tuple[list[Method], dict[str, dict[str, np.ndarray]]]:
    """Every method with all its points, and the losses behind them."""
    losses = {reading.name: losses_by_size(reading, labels) for reading in readings}
    task = "regression" if np.issubdtype(labels.dtype, np.floating) else "classification"
    names = CURVE_SCORES[task]
    curves = {name: EnsembleCurve(losses["plain"][name]) for name in names}
    weights = None
    if task == "classification":
        weights = bootstrap_weights(np.random.default_rng(0), len(labels), NUM_DRAWS)
    methods = []
    for reading in readings:
        label, about = KINDS.get(reading.name, (reading.name + ", {n}", "Given predictions."))
        points = []
        for index, size in enumerate(reading.sizes):
            of_size = {name: losses[reading.name][name][:, index] for name in names}
            largest = {name: losses["plain"][name][:, -1] for name in names}
            point = Point(
                size=size,
                cost=_cost_of_size(reading, size),
                scores={name: crossed_interval(of_size[name]) for name in names},
                over_seeds={
                    name: mean_interval(list(of_size[name].mean(1)[: reading.trainings]))
                    for name in names
                },
                worth={name: curves[name].equivalent(of_size[name]) for name in names},
                against_ensemble={
                    name: equivalence_test(of_size[name] - largest[name], margins[name])
                    for name in names
                },
            )
            if size in reading.table:
                point = _with_profile(point, reading, labels, weights)
            points.append(point)
        methods.append(
            Method(
                name=reading.name,
                label=label.replace("{budget}", str(budget)),
                about=about.replace("{budget}", str(budget)),
                unit=reading.unit,
                points=points,
                table=list(reading.table),
                retrained=reading.retrained,
            )
        )
    return methods, losses


def _unreliable(
    readings: Sequence[Reading], methods: Sequence[Method], labels: np.ndarray
) -> list[str]:
    """A sentence on the points of the table whose calibration is not to be relied on, if any."""
    if np.issubdtype(labels.dtype, np.floating):
        return []
    given, found = jnp.asarray(labels), []
    for reading, method in zip(readings, methods, strict=True):
        for size in reading.table:
            starts = range(0, reading.outputs.shape[1] - size + 1, size)
            groups = (one[start : start + size] for one in reading.outputs for start in starts)
            if any(bool(_ends_at_a_bound(_log_mean(group), given)) for group in groups):
                found.append(method.title(size))
    if not found:
        return []
    return [
        f"The calibrated scores of {'; '.join(found)} are unreliable: on some half of the test "
        "examples the fit of the temperature ends at 1/20 or 20, the bounds of its search, as "
        "where every one of them is classified rightly."
    ]


def _log_mean(members: np.ndarray) -> Array:
    """The average of members. In numpy, since each number of them would be compiled for."""
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(np.exp(members, dtype=np.float64).mean(0)), jnp.float32)


@jax.jit
def _ends_at_a_bound(log_probs: Array, labels: Array) -> Array:
    """Whether the temperature of a half does, of those that `calibrated_nll` is scored with."""

    def score(fitted: Array, scored: Array) -> Array:
        temperature = metrics.fit_temperature(log_probs[fitted], labels[fitted])
        at_a_bound = jnp.abs(jnp.log(temperature)) > 0.999 * math.log(20)
        return jnp.broadcast_to(at_a_bound, scored.shape).astype(jnp.float32)

    return metrics.mean_over_halvings(jax.random.key(0), score, len(labels), NUM_HALVINGS).any()


def _with_profile(
    point: Point, reading: Reading, labels: np.ndarray, weights: np.ndarray | None
) -> Point:
    """The point with the scores that are no means over examples: of the first members."""
    members = reading.outputs[:, : point.size]
    if weights is None:
        profile = _regression_profile(point.scores["mse"], members, labels)
        return replace(point, scores={**point.scores, **profile})
    others = None
    if reading.ood_outputs is not None:
        others = reading.ood_outputs[:, : point.size]
    found, curves = bootstrap.scores(members, others, labels, weights)
    share = curves["share"]
    with np.errstate(invalid="ignore"):
        reliability = Reliability(
            confidence=(np.nansum(share * curves["confidence"], 0) / share.sum(0)).tolist(),
            accuracy=(np.nansum(share * curves["accuracy"], 0) / share.sum(0)).tolist(),
            share=share.mean(0).tolist(),
        )
    risk = curves["risk"].mean(0)
    at = np.unique(np.linspace(0, len(risk) - 1, 101).round().astype(int))
    return replace(
        point,
        scores={**point.scores, **found},
        reliability=reliability,
        risk_coverage=RiskCoverage(((at + 1) / len(risk)).tolist(), risk[at].tolist()),
    )


def _regression_profile(
    mse: Interval, members: np.ndarray, targets: np.ndarray
) -> dict[str, Interval]:
    """The root of the MSE, and how many targets lie in intervals fitted without them."""
    ends = [None if end is None else math.sqrt(max(end, 0)) for end in (mse.low, mse.high)]
    rmse = Interval(math.sqrt(mse.mean), ends[0], ends[1], mse.num_replicates)
    inside = np.stack([_are_inside(jnp.asarray(one), jnp.asarray(targets)) for one in members])
    return {"rmse": rmse, "coverage": crossed_interval(inside.astype(np.float64))}


@jax.jit
def _are_inside(means: Array, targets: Array) -> Array:
    """By example, how often it lies in the 95 % interval fitted on the other half of them."""

    def score(fitted: Array, scored: Array) -> Array:
        scale = metrics.fit_scale(means[:, fitted], targets[fitted])

        def one(mean: Array, target: Array) -> Array:
            return metrics.interval_coverage(mean[:, None], target[None], scale)

        return jax.vmap(one, in_axes=(1, 0))(means[:, scored], targets[scored])

    return metrics.mean_over_halvings(jax.random.key(0), score, len(targets), NUM_HALVINGS)


def _all_diversity(readings: Sequence[Reading], labels: np.ndarray) -> list[Diversity]:
    """Of every method with several members, at the number that all of them have."""
    several = [reading for reading in readings if reading.outputs.shape[1] > 1]
    size = min((reading.outputs.shape[1] for reading in several), default=0)
    return [_diversity(reading, size, labels) for reading in several]


@partial(jax.jit, static_argnames="regression")
def _diversity_values(members: Array, labels: Array, *, regression: bool) -> dict[str, Any]:
    if regression:
        return {"MSE": metrics.squared_ambiguity(members, labels)}
    return {
        "disagreement": metrics.disagreement(members),
        "pairwise_kl": metrics.pairwise_kl(members),
        "q_statistic": metrics.q_statistic(members, labels),
        "mutual_information": metrics.mutual_information(members).mean(),
        **{kind: metrics.ambiguity(members, labels, kind) for kind in AMBIGUITIES[:3]},
    }


def _diversity(reading: Reading, size: int, labels: np.ndarray) -> Diversity:
    regression = np.issubdtype(labels.dtype, np.floating)
    values = [
        jax.tree.map(
            float,
            _diversity_values(
                jnp.asarray(outputs[:size]), jnp.asarray(labels), regression=bool(regression)
            ),
        )
        for outputs in reading.outputs[: reading.trainings]
    ]
    intervals = jax.tree.map(lambda *of_replicates: mean_interval(of_replicates), *values)
    numbers = ("disagreement", "pairwise_kl", "q_statistic", "mutual_information")
    return Diversity(
        method=reading.name,
        size=size,
        **{name: intervals.get(name) for name in numbers},
        ambiguity={kind: Ambiguity(*intervals[kind]) for kind in AMBIGUITIES if kind in intervals},
    )


def _mask_curve(
    readings: Sequence[Reading],
    losses: Mapping[str, Mapping[str, np.ndarray]],
    labels: np.ndarray,
) -> MaskCurve | None:
    """How many masks reach weight scaling of the same networks."""
    by_name = {reading.name: reading for reading in readings}
    if "monte-carlo" not in by_name or "dropout" not in by_name:
        return None
    if by_name["monte-carlo"].retrained != by_name["dropout"].retrained:
        return None  # One network was given, of which more is not known.
    task = "regression" if np.issubdtype(labels.dtype, np.floating) else "classification"
    names = [name for name in CURVE_SCORES[task]]
    sampled = by_name["monte-carlo"]
    read_once = replace(
        by_name["dropout"], outputs=by_name["dropout"].outputs[:, :1], sizes=(1,), table=(1,)
    )
    once = losses_by_size(read_once, labels)
    needed = {}
    for name in names:
        curve = EnsembleCurve(losses["monte-carlo"][name], sizes=sampled.sizes)
        needed[name] = curve.equivalent(once[name][:, 0])
    return MaskCurve(
        num_masks=list(sampled.sizes),
        scores={name: losses["monte-carlo"][name].mean((0, 2)).tolist() for name in names},
        weight_scaling={name: float(once[name].mean()) for name in names},
        masks_needed=needed,
    )


def _exact(part: Part | None, labels: np.ndarray) -> Exact | None:
    """Weight scaling, and the two averages over all masks."""
    if part is None:
        return None
    given = jnp.asarray(labels[: part.arrays["geometric"].shape[1]])
    log_probs = {
        name: jnp.asarray(part.arrays[name])
        for name in ("weight_scaling", "geometric", "arithmetic")
    }
    names = ("nll", "brier", "error")
    losses = {
        name: jax.tree.map(
            lambda values: np.asarray(values, np.float64),
            jax.vmap(metrics.losses, in_axes=(0, None))(array, given),
        )
        for name, array in log_probs.items()
    }

    def intervals(name: str, less: str | None = None) -> dict[str, Interval]:
        return {
            score: crossed_interval(
                losses[name][score] - (losses[less][score] if less is not None else 0)
            )
            for score in names
        }

    return Exact(
        num_units=part.facts["num_units"],
        num_masks=part.facts["num_masks"],
        weight_scaling=intervals("weight_scaling"),
        geometric=intervals("geometric"),
        arithmetic=intervals("arithmetic"),
        nonlinearity_gap=intervals("weight_scaling", "geometric"),
        pool_gap=intervals("geometric", "arithmetic"),
    )


def _mean_losses(outputs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Mean losses `[replicate]` of single networks, `outputs[replicate, 1, example, ...]`."""
    if np.issubdtype(labels.dtype, np.floating):
        return {"mse": ((outputs[:, 0] - labels) ** 2).mean(1, dtype=np.float64)}
    losses = jax.vmap(metrics.losses, in_axes=(0, None))(
        jnp.asarray(outputs[:, 0]), jnp.asarray(labels)
    )
    return {
        name: np.asarray(losses[name], np.float64).mean(1) for name in ("nll", "brier", "error")
    }


def _overfitting(
    run: Run, readings: Sequence[Reading], labels: np.ndarray, facts: Mapping[str, Any]
) -> list[Overfitting]:
    """Training and test scores of one network, by kind and number of training examples."""
    found = []

    def add(kind: str, train: np.ndarray, train_labels: np.ndarray, test: np.ndarray) -> None:
        if facts["task"] == "regression":
            scale, mean = facts["target_scale"], facts["target_mean"]
            train, train_labels = train * scale + mean, train_labels * scale + mean
        on_train, on_test = _mean_losses(train, train_labels), _mean_losses(test, labels)
        found.append(
            Overfitting(
                networks=kind,
                train_size=len(train_labels),
                train={name: mean_interval(list(on_train[name])) for name in on_train},
                test={name: mean_interval(list(on_test[name])) for name in on_test},
                gap={
                    name: mean_interval(list(on_test[name] - on_train[name])) for name in on_train
                },
            )
        )

    fewer = run.part("overfitting") or Part({}, {"sizes": []})
    for kind in ("plain", "dropout"):
        for size in fewer.facts["sizes"]:
            test = fewer.arrays[f"{kind}_{size}_test"]
            if facts["task"] == "regression":
                test = test * facts["target_scale"] + facts["target_mean"]
            train = fewer.arrays[f"{kind}_{size}_train"]
            add(kind, train, fewer.arrays[f"labels_{size}"], test)
        train = _needed(run, kind).arrays["train_outputs"]
        test = next(reading.outputs for reading in readings if reading.name == kind)
        train_labels = _needed(run, "data").arrays["train_labels"]
        add(kind, train[:, :1], train_labels, test[:, :1])
    return found


def _learning_curves(run: Run, scale: float) -> dict[str, LearningCurve]:
    curves = {}
    for kind in ("plain", "dropout"):
        facts = _needed(run, kind).facts
        unit = {"mse": scale**2}

        def column(part: str, name: str, facts: Any = facts, unit: Any = unit) -> list[float]:
            return [values[name] * unit.get(name, 1) for values in facts[part]]

        names = [name for name in ("nll", "error", "mse") if name in facts["train"][0]]
        curves[kind] = LearningCurve(
            epochs=facts["epochs"],
            train={name: column("train", name) for name in names},
            test={name: column("test", name) for name in names},
        )
    return curves


def _co_adaptation(run: Run) -> dict[str, CoAdaptation]:
    adapter = pydantic.TypeAdapter(CoAdaptation)

    def validated(facts: dict[str, Any]) -> CoAdaptation:
        # Runs of before it was kept counted from 0.
        from_zero = dict.fromkeys(facts["activation_max"], 0.0)
        return adapter.validate_python({"activation_min": from_zero, **facts})

    found = {kind: _needed(run, kind).facts.get("co_adaptation") for kind in ("plain", "dropout")}
    return {kind: validated(facts) for kind, facts in found.items() if facts}


def _sweep(part: Part | None, labels: np.ndarray, facts: Mapping[str, Any]) -> list[Cell]:
    """The verdict at every place of the grid."""
    if part is None:
        return []
    cells = []
    for index, at in enumerate(part.facts["cells"]):
        losses = {}
        for kind in ("plain", "dropout"):
            outputs = part.arrays[f"{kind}_{index}"]
            reading = _reading(kind, outputs, None, "networks", None, (), facts)
            losses[kind] = losses_by_size(reading, labels)
        points = {
            "plain": (losses["plain"], 0),
            "ensemble": (losses["plain"], -1),
            "dropout": (losses["dropout"], 0),
        }
        cells.append(
            Cell(
                at=at,
                scores={
                    name: {
                        score: crossed_interval(values[:, size])
                        for score, values in of_kind.items()
                    }
                    for name, (of_kind, size) in points.items()
                },
                worth={
                    score: EnsembleCurve(values).equivalent(losses["dropout"][score][:, 0])
                    for score, values in losses["plain"].items()
                },
            )
        )
    return cells
