"""Error by keep probability, by training-set size and by number of masks: Srivastava et al. 2014.

Figures 9, 10 and 11 of the paper, with averages of plain networks beside.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import Array

from jdrop.study.data import Progress, images
from jdrop.study.reproduce import published
from jdrop.study.reproduce.protocol import Measure, Options, PartResult, Protocol
from jdrop.study.reproduce.srivastava_networks import (
    BATCH_SIZE,
    LEARNING_RATE,
    MAX_NORM,
    MAX_READ_EXAMPLES,
    MOMENTUM,
    Trainer,
    averages,
    make_network,
    mask_curve,
    training_rows,
    updates_per_epoch,
)

HIDDEN_A = (2048, 2048, 2048)
"""Hidden units of Figure 9a."""
KEPT_B = (256, 256, 512)
"""Hidden units of Figure 9b that are kept on average, at each keep probability."""
HIDDEN = (1024, 1024, 2048)
"""Hidden units of Figures 10 and 11."""

RATE, INPUT_RATE = 0.5, 0.2
"""Of Figures 10 and 11; Figure 9 drops no inputs."""
KEEP_PROBS = (0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
UPDATE_SHARES = {100: 0.1, 500: 0.2, 1000: 0.5, 5000: 1.0, 10_000: 1.0, 50_000: 1.0}
"""By training-set size of Figure 10, the share of the updates; the largest size is of Figure 9 and
Figure 11 too."""

NUM_UPDATES = 100_000
NUM_SEEDS = 5
ENSEMBLE_SIZE = 5
LARGEST_ENSEMBLE = 20
NUM_MASKS = 120
SHOWN_MASKS = (1, 10, 50, 120)
"""The numbers of masks in the table; the figure has all."""
Values = dict[str, dict[str, list[float]]]
"""By row of the table and by measure, a value for each seed."""


def row_9(panel: str, keep_prob: float) -> str:
    """The row of a point of Figure 9; the panel is "a" or "b"."""
    return f"Figure 9{panel}, keep {keep_prob:g}"


def row_10(train_size: int) -> str:
    """The row of a training-set size in Figure 10."""
    return f"Figure 10, {train_size:,} examples"


def row_11(count: int, averaged: str) -> str:
    """The row of a point of Figure 11; averaged are "masks" or "networks"."""
    return f"Figure 11, {count} {averaged if count > 1 else averaged[:-1]}"


PARTS_9 = {
    f"Figure 9, keep {', '.join(f'{keep_prob:g}' for keep_prob in keep_probs)}": keep_probs
    for keep_probs in ((0.1, 0.5, 1.0), (0.2, 0.4, 0.6, 0.8))
}
"""By part, its keep probabilities. A paired difference needs both points in one part."""


def parts() -> dict[str, int | tuple[float, ...]]:
    """By part, in the order of the run, its training-set size or its keep probabilities."""
    *smaller, largest = UPDATE_SHARES
    return {
        **{row_10(train_size): train_size for train_size in smaller},
        f"Figures 10 and 11, {largest:,} examples": largest,
        **PARTS_9,
    }


def make_protocol() -> Protocol:
    """The protocol, on MNIST."""
    sizes = ", ".join(f"{size:,}" for size in UPDATE_SHARES)
    shares = ", ".join(f"{share:g}" for share in UPDATE_SHARES.values())
    return Protocol(
        name="srivastava-figures",
        title="Dropout by rate, by training-set size and by number of masks",
        paper="Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from "
        "overfitting",
        url="https://jmlr.org/papers/v15/srivastava14a.html",
        summary=(
            f"Figure 9a: MNIST digits, {_dashed(HIDDEN_A)} rectified hidden units, no dropout of "
            "inputs; the error by the probability to keep a hidden unit. In Figure 9b "
            f"{_dashed(KEPT_B)} units are kept on average, so networks of a small keep "
            "probability are wide.",
            f"Figure 10: {_dashed(HIDDEN)} units, hidden units kept at {1 - RATE:g} and inputs at "
            f"{1 - INPUT_RATE:g}, and the same networks without dropout; {sizes} training "
            "examples.",
            "Figure 11: the dropout networks of Figure 10 with the most examples, read by weight "
            f"scaling and by averages of 1 to {NUM_MASKS} sampled masks.",
            "Dropout is that of the paper: training multiplies by the mask alone, and the test "
            "multiplies all units by the keep probability.",
            "What the paper lacks: the average of plain networks, which train without dropout but "
            f"are otherwise the same. Figures 9 and 10 have {ENSEMBLE_SIZE}, Figure 11 has 1 to "
            f"{LARGEST_ENSEMBLE}. Figure 9 averages plain networks of the units at keep 1.",
            "All errors are of the test examples; the training error of Figure 9 is of at most "
            f"{MAX_READ_EXAMPLES:,} training examples. In each figure, the error of one plain "
            "network is the mean over the plain networks of a seed.",
        ),
        leaves_open=(
            "The statements are summaries of the paper's text and figures, not quotes. They "
            "state two numbers: 2.7 and 1.7, the errors at keep 0.1.",
            "The number of updates, the batches and the learning rate of these figures are not "
            f"known. The choices here: {NUM_UPDATES:,} updates of {BATCH_SIZE} examples, gradient "
            f"descent with a learning rate of {LEARNING_RATE:g} that falls linearly to 0. The "
            f"momentum rises linearly from {MOMENTUM[0]:g} to {MOMENTUM[1]:g} in the first "
            f"tenth. The norm of the weights into a unit is at most {MAX_NORM:g}. Initial weights "
            "have the standard deviation 1/√(inputs). The epochs of the paper in this report are "
            "these. Networks with and without dropout share all settings; none is tuned.",
            f"Small training sets get fewer updates: the shares are {shares} for {sizes} examples.",
            "Each seed has its own random training sets of up to 10,000 examples, with the classes "
            "in proportion. A larger set holds the smaller ones, and all seeds share the set of "
            f"{max(UPDATE_SHARES):,}. Figures 9 and 11 take that one, since the paper's number of "
            "examples is not known here. The paper drew its sets at random.",
            "The network of Figure 11 is not known here; that of Figure 10 is taken.",
            "The paper's errors stand without intervals here.",
        ),
        replicate="seed",
        spread="standard error",
        measures=_measures(),
        published=published.SRIVASTAVA_FIGURES,
        parts=tuple(parts()),
        files=tuple(f"mnist/{file}.gz" for file in images.FILES),
        run_part=_run_part,
        describe_fraction=describe_fraction,
    )


def _measures() -> dict[str, Measure]:
    return {
        "dropout": Measure(
            "error dropout", "One dropout network, read by weight scaling; in percent."
        ),
        "plain": Measure("error plain", "One network without dropout; in percent."),
        "ensemble": Measure(
            f"error average of {ENSEMBLE_SIZE}",
            "The average of so many plain networks; in percent.",
        ),
        "difference": Measure(
            "error dropout − plain", "Below 0, dropout is better.", is_difference=True
        ),
        "ensemble-difference": Measure(
            f"error dropout − average of {ENSEMBLE_SIZE}",
            "Below 0, the dropout network is better.",
            is_difference=True,
        ),
        "ensemble-difference-nll": Measure(
            f"NLL dropout − average of {ENSEMBLE_SIZE}",
            "The same for the NLL, in nats.",
            is_difference=True,
        ),
        "flat-difference": Measure(
            "error minus that at keep 0.6",
            "Between two keep probabilities; 0 where the curve is flat.",
            is_difference=True,
        ),
        "panel-difference": Measure(
            "error 9b − 9a",
            "The wide network of Figure 9b minus that of Figure 9a.",
            is_difference=True,
        ),
        "monte-carlo": Measure(
            "error Monte-Carlo", "The average of so many sampled masks; in percent."
        ),
        "mask-difference": Measure(
            "error Monte-Carlo − WS",
            "Minus weight scaling of the same network; below 0, masks are better.",
            is_difference=True,
        ),
        "largest": Measure(
            f"error average of {LARGEST_ENSEMBLE}",
            "The average of so many plain networks; in percent.",
        ),
        "largest-difference": Measure(
            f"error Monte-Carlo − average of {LARGEST_ENSEMBLE}",
            f"The average of {NUM_MASKS} masks of one network minus that of so many networks.",
            is_difference=True,
        ),
    }


def units(of_paper: Sequence[int | float], fraction: float) -> tuple[int, ...]:
    """Hidden units of each layer: those of the paper times the square root of the fraction.

    Example:
        >>> units((1024, 1024, 2048), 0.0625)
        (256, 256, 512)
    """
    return tuple(max(1, round(count * math.sqrt(fraction))) for count in of_paper)


def units_b(keep_prob: float, fraction: float) -> tuple[int, ...]:
    """Hidden units of Figure 9b: equally many are kept on average at each keep probability.

    Example:
        >>> units_b(0.5, 1.0)
        (512, 512, 1024)
    """
    return units([count / keep_prob for count in KEPT_B], fraction)


def num_epochs(fraction: float, train_size: int) -> int:
    """The epochs of a training set: whole ones with about the wanted number of updates.

    Example:
        >>> num_epochs(1.0, 50_000)
        200
    """
    updates = fraction * UPDATE_SHARES[train_size] * NUM_UPDATES
    return max(1, round(updates / updates_per_epoch(train_size)))


def describe_fraction(fraction: float) -> str:
    """A sentence on what a fraction below 1 changes."""
    updates = ", ".join(
        f"{num_epochs(fraction, size) * updates_per_epoch(size):,}" for size in UPDATE_SHARES
    )
    sizes = ", ".join(f"{size:,}" for size in UPDATE_SHARES)
    return (
        f"A fraction of {fraction:g} of the updates, and hidden units times its square root, "
        f"{math.sqrt(fraction):.3g}: networks of {_dashed(units(HIDDEN_A, fraction))} units in "
        f"Figure 9a, with {_dashed(units(KEPT_B, fraction))} kept units in Figure 9b, and of "
        f"{_dashed(units(HIDDEN, fraction))} in Figures 10 and 11; {updates} updates for {sizes} "
        "examples. A difference from the paper may come from this."
    )


def _dashed(counts: Sequence[int]) -> str:
    return "-".join(map(str, counts))


def _run_part(part: str, options: Options, progress: Progress) -> PartResult:
    index, setting = list(parts()).index(part), parts()[part]
    key = jax.random.fold_in(jax.random.key(options.seed), index)
    num_seeds = options.count(NUM_SEEDS)
    train_size = setting if isinstance(setting, int) else max(UPDATE_SHARES)
    data = images.load(
        "mnist",
        train_size=max(UPDATE_SHARES),
        label_noise=0.0,
        seed=options.seed,
        data_dir=options.data_dir,
    )
    trainer = Trainer(
        data=data,
        rows=training_rows(data.train_labels, train_size, options.seed, num_seeds),
        num_epochs=num_epochs(options.fraction, train_size),
    )
    if isinstance(setting, int):
        hidden = units(HIDDEN, options.fraction)
        with_curves = train_size == max(UPDATE_SHARES)
        values = compare_size(key, trainer, hidden, train_size, with_curves, progress)
    else:
        values = compare_keep_probs(key, trainer, setting, options.fraction, progress)
    return PartResult(values, trainer.num_epochs, num_epochs(1.0, train_size), seconds=0.0)


def compare_size(
    key: Array,
    trainer: Trainer,
    hidden: tuple[int, ...],
    train_size: int,
    with_curves: bool,
    progress: Progress,
) -> Values:
    """Networks with and without dropout on training sets of one size, for Figures 10 and 11.

    Args:
        key: consumed; what belongs to seed `i` depends on the key and on `i` alone.
        trainer: of these training sets.
        hidden: units of each layer.
        train_size: for the name of the row.
        with_curves: whether to read the networks for Figure 11, which takes more plain networks.
        progress: is called with the networks that are trained.
    """
    dropout_key, plain_key, mask_key = jax.random.split(key, 3)
    num_plain = LARGEST_ENSEMBLE if with_curves else ENSEMBLE_SIZE
    total = trainer.num_seeds * (1 + num_plain)
    progress("trained networks", 0, total)
    network = make_network(hidden, RATE, INPUT_RATE)
    variables = trainer.train(dropout_key, network, 1)
    progress("trained networks", trainer.num_seeds, total)
    plain_network = make_network(hidden, 0.0, 0.0)
    plain = trainer.read(plain_network, trainer.train(plain_key, plain_network, num_plain))
    progress("trained networks", total, total)
    scores = {
        "dropout": trainer.score(trainer.read(network, variables)),
        "plain": trainer.score(plain),
        "ensemble": trainer.score(averages(plain, ENSEMBLE_SIZE)),
    }
    row = _named(scores)
    for name, other in (("difference", "plain"), ("ensemble-difference", "ensemble")):
        for suffix in ("", "-nll"):
            row[name + suffix] = _minus(row[f"dropout{suffix}"], row[other + suffix])
    values = {row_10(train_size): row}
    if with_curves:
        curve = [
            mask_curve(
                jax.random.fold_in(mask_key, seed),
                network,
                jax.tree.map(lambda leaf, seed=seed: leaf[seed], variables),
                trainer.inputs,
                trainer.labels,
                num_masks=NUM_MASKS,
            )
            for seed in range(trainer.num_seeds)
        ]
        values |= _rows_of_curves(trainer, np.array(curve), plain, row["dropout"])
    return values


def _rows_of_curves(
    trainer: Trainer, curve: np.ndarray, plain: Array, weight_scaling: list[float]
) -> Values:
    """The rows of Figure 11.

    Args:
        trainer: scores the averages of plain networks.
        curve: error and NLL of masks, `[seed, score, mask]`.
        plain: predictions of the plain networks, `[seed, network, example, class]`.
        weight_scaling: the error of each seed's dropout network.
    """
    values: Values = {}
    for count in range(1, curve.shape[2] + 1):
        errors, nlls = curve[:, :, count - 1].T.tolist()
        row = {"masks-curve": errors, "masks-curve-nll": nlls}
        if count in SHOWN_MASKS:
            row |= {"monte-carlo": errors, "mask-difference": _minus(errors, weight_scaling)}
        values[row_11(count, "masks")] = row
    for count in range(1, plain.shape[1] + 1):
        average = trainer.score(averages(plain, count))
        values[row_11(count, "networks")] = {
            "networks-curve": average["error"],
            "networks-curve-nll": average["nll"],
        }
    largest = row_11(plain.shape[1], "networks")
    errors = values[largest]["networks-curve"]
    values[largest] |= {
        "largest": errors,
        "largest-difference": _minus(curve[:, 0, -1].tolist(), errors),
    }
    return values


def compare_keep_probs(
    key: Array,
    trainer: Trainer,
    keep_probs: tuple[float, ...],
    fraction: float,
    progress: Progress,
) -> Values:
    """Networks of some keep probabilities, for both panels of Figure 9.

    Args:
        key: consumed; what belongs to seed `i` depends on the key and on `i` alone.
        trainer: of the training sets.
        keep_probs: at 1 there is no dropout, and plain networks are averaged.
        fraction: sets the hidden units, see `units`.
        progress: is called with the points that are complete.
    """
    values: Values = {}
    points = [(panel, keep_prob) for panel in "ab" for keep_prob in keep_probs]
    for index, (panel, keep_prob) in enumerate(points):
        progress("points", index, len(points))
        hidden = units(HIDDEN_A, fraction) if panel == "a" else units_b(keep_prob, fraction)
        network = make_network(hidden, 1 - keep_prob, 0.0)
        is_plain = keep_prob == 1
        variables = trainer.train(
            jax.random.fold_in(key, index), network, ENSEMBLE_SIZE if is_plain else 1
        )
        log_probs = trainer.read(network, variables)
        scores = {"plain" if is_plain else "dropout": trainer.score(log_probs)}
        if is_plain:
            scores["ensemble"] = trainer.score(averages(log_probs, ENSEMBLE_SIZE))
        row = _named(scores)
        row["training-error"] = trainer.training_errors(network, variables)
        values[row_9(panel, keep_prob)] = row
    progress("points", len(points), len(points))
    _add_differences(values, keep_probs)
    return values


def _add_differences(values: Values, keep_probs: tuple[float, ...]) -> None:
    """Adds the differences between points of Figure 9 to the rows."""
    for panel in "ab":
        rows = {keep_prob: values[row_9(panel, keep_prob)] for keep_prob in keep_probs}
        for keep_prob, row in rows.items():
            if 1.0 in rows and keep_prob < 1:
                row["difference"] = _minus(row["dropout"], rows[1.0]["plain"])
            if 0.6 in rows and keep_prob in (0.4, 0.8):
                row["flat-difference"] = _minus(row["dropout"], rows[0.6]["dropout"])
    if 0.1 in keep_probs:
        narrow, wide = (values[row_9(panel, 0.1)] for panel in "ab")
        wide["panel-difference"] = _minus(wide["dropout"], narrow["dropout"])


def _named(scores: Mapping[str, Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """The errors under the names of the readings, and the NLLs under these with "-nll"."""
    return {
        name + suffix: reading[kind]
        for name, reading in scores.items()
        for suffix, kind in (("", "error"), ("-nll", "nll"))
    }


def _minus(one: list[float], other: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]
