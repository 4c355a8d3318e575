"""Chooses the epochs and the weight decay of each method by cross-validation on training examples.

The same rule holds for all methods. The training examples are dealt out to folds. The networks of
replicate `r` leave out fold `r`; they are as many, and of the same program, as the networks that
are compared. At each candidate count of epochs the average of a replicate's networks is scored on
the fold that they leave out. The choice is the candidate with the smallest mean loss over
replicates, so all replicates share one choice. An average has its own choice at each size. The
networks that are compared then train on all training examples.

An epoch of the cross-validation has as many steps as one of the comparison: the examples that are
not left out are repeated up to the number of all examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax import Array

from jdrop.network import Variables
from jdrop.study.data import (
    Dataset,
    folds,
    generator,
    labels_of_tokens,
    sequences_of_tokens,
    strata,
)
from jdrop.study.methods import METHODS, Method, NetworkGroup, methods_of
from jdrop.study.parts import TuningPart
from jdrop.study.predictor import Predictor
from jdrop.study.resampled_choices import LeftOutPart, resampled_choices, store_losses
from jdrop.study.run_folder import RunFolder
from jdrop.study.settings import Settings
from jdrop.study.training import NetworkSpec, Trainer, Validation

EPOCH_FACTORS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
"""Candidates for the epochs of a method, as multiples of the epochs of the settings."""

WORST = float(np.finfo(np.float32).max)
"""The loss of networks that all diverged: a number that JSON holds."""

MIN_FOLDS = 5
"""Folds of the training examples, at least; with more replicates each has its own fold."""


@dataclass(frozen=True, order=True)
class Choice:
    """How a method trains.

    Attributes:
        epochs: how many.
        weight_decay: of AdamW; None for Adam.
    """

    epochs: int
    weight_decay: float | None = None


def needs_search(group: NetworkGroup, settings: Settings) -> bool:
    """Whether cross-validation chooses something for a method of the group."""
    return settings.tune or any(method.weight_decays for method in methods_of(group))


def candidates(settings: Settings) -> tuple[int, ...]:
    """The counts of epochs to choose from: beyond those of the settings only if all are tuned."""
    counts = {max(1, round(factor * settings.epochs)) for factor in EPOCH_FACTORS}
    last = max(counts) if settings.tune else settings.epochs
    return tuple(sorted(count for count in counts if count <= last))


def cross_validate(
    key: Array,
    group: NetworkGroup,
    spec: NetworkSpec,
    settings: Settings,
    data: Dataset,
    trainer: Trainer,
    predictor: Predictor,
    run_folder: RunFolder,
) -> TuningPart | None:
    """Trains the networks of a group on parts of the training examples, and scores the rest.

    Training goes on beyond the epochs of the settings only while a method is best at the last
    candidate.

    Args:
        key: consumed.
        group: the networks.
        spec: of these networks.
        settings: gives the replicates, the epochs and the seed.
        data: the examples; those of the test set are not read.
        trainer: trains the networks.
        predictor: predicts with them.
        run_folder: keeps the losses of the left-out examples meanwhile.

    Returns:
        None where `Trainer.fit_networks` returns None.
    """
    replicates = settings.replicates
    labels = data.train_labels
    fold_of_example = folds(
        strata(labels) if data.is_per_token else labels,
        data.train_groups,
        data.test_groups,
        num_folds=max(MIN_FOLDS, replicates),
        seed=settings.seed,
    )
    # Few groups form fewer folds than there are replicates.
    fold_of_replicate = np.arange(replicates) % (fold_of_example.max() + 1)
    # What is scored may be the tokens of an example.
    fold_of_label = fold_of_example[sequences_of_tokens(labels)]
    left_out = [np.flatnonzero(fold_of_label == fold) for fold in fold_of_replicate]
    kept = [np.flatnonzero(fold_of_example != fold) for fold in fold_of_replicate]
    train_key, mask_key = jax.random.split(key)
    rng_seed = (settings.seed, group.key_index)

    def rows(epoch: int) -> np.ndarray:
        rng = np.random.default_rng((*rng_seed, epoch))
        # Which examples occur twice changes with the epoch.
        of_replicates = [np.resize(rng.permutation(rows), len(labels)) for rows in kept]
        return np.tile(np.stack(of_replicates), (spec.members, 1))

    scored_labels = labels_of_tokens(labels)
    units = _units(data, left_out)
    name = f"tuning-{group.name}"

    def losses(epoch: int, variables: Variables) -> dict[str, list[list[float]]]:
        means, part = {}, LeftOutPart({}, {})
        for method in methods_of(group):
            if method.tuned_as is not None:
                continue
            of_settings = [
                _predict_training_examples(
                    jax.random.clone(mask_key),
                    method.members_with(decay, variables, replicates),
                    method,
                    spec,
                    data,
                    predictor,
                )
                for decay in method.weight_decays or (None,)
            ]
            means[method.name] = [
                average_losses(outputs, scored_labels, left_out) for outputs in of_settings
            ]
            sizes = table_sizes(method, of_settings[0].shape[1], settings)
            part.sizes[method.name] = sizes
            part.losses[method.name] = [
                _add_up(example_losses(outputs, scored_labels, left_out, sizes), units)
                for outputs in of_settings
            ]
        store_losses(run_folder, name, epoch, part)
        return means

    epochs = candidates(settings)
    trained = trainer.fit_networks(
        train_key,
        spec,
        data,
        checkpoint=name,
        description=f"{group.name} networks, cross-validation",
        validation=Validation(rows, epochs, losses, _is_enough, min_epochs=settings.epochs),
    )
    if trained is None:
        return None
    scored = trained.log.validation
    return TuningPart(
        epochs=list(epochs[: len(scored)]),
        losses={
            name: [
                [candidate[name][setting] for candidate in scored]
                for setting in range(len(scored[0][name]))
            ]
            for name in scored[0]
        },
        epoch_flops=trained.epoch_flops,
        resampled=resampled_choices(
            run_folder, name, epochs[: len(scored)], generator(settings.seed, "resamples")
        ),
    )


def _is_enough(scored: Sequence[Mapping[str, Sequence[Sequence[float]]]]) -> bool:
    """Whether no method may become better by more epochs than were scored."""
    for name in scored[0]:
        curves = np.array([candidate[name] for candidate in scored])  # [candidate, setting, size]
        if (curves.min(1).argmin(0) == len(scored) - 1).any():
            return False
    return True


def _predict_training_examples(
    key: Array,
    variables: Variables,
    method: Method,
    spec: NetworkSpec,
    data: Dataset,
    predictor: Predictor,
) -> np.ndarray:
    """The outputs of a method's networks, see `average_losses`; an average of masks is a member."""
    networks_and_data = spec.network, variables, data.train_inputs, data.train_labels
    if not method.draws_masks:
        return predictor.predict(None, *networks_and_data)
    num_masks = predictor.settings.num_samples

    def pool(passes: Iterator[np.ndarray]) -> np.ndarray:
        if data.is_regression:
            return sum(passes, np.zeros(())) / num_masks
        return _log(sum(map(np.exp, passes), np.zeros(())) / num_masks)

    keys = [jax.random.fold_in(key, index) for index in range(num_masks)]
    return predictor.predict_passes(keys, *networks_and_data, pool)


def average_losses(
    outputs: np.ndarray, labels: np.ndarray, left_out: Sequence[np.ndarray]
) -> list[float]:
    """The mean losses of averages on left-out examples, by size.

    The losses are NLL or squared errors. Groups with a network that diverged are kept out; where
    none is left, the loss is `WORST`. So a setting at which many networks diverge is judged by
    those that are left. At each size they are means over all groups of neighbours, where the
    members of a replicate lie on a circle.

    Args:
        outputs: `[replicate, member, example, class]` log-probabilities, or
            `[replicate, member, example]` targets.
        labels: `[example]`.
        left_out: for each replicate, the indices of the examples that its networks left out.
    """
    num_members = outputs.shape[1]
    losses = np.full((len(outputs), num_members), np.nan)
    for replicate, rows in enumerate(left_out):
        members = _scored_outputs(outputs[replicate], labels, rows)
        total = np.zeros_like(members)
        for size in range(1, num_members + 1):
            total += np.roll(members, 1 - size, axis=0)
            loss = _losses(total / size, labels[rows], outputs)
            losses[replicate, size - 1] = _mean_of_finite(loss.mean(1), np.nan)
    return [_mean_of_finite(values, WORST) for values in losses.T]


def example_losses(
    outputs: np.ndarray, labels: np.ndarray, left_out: Sequence[np.ndarray], sizes: Sequence[int]
) -> np.ndarray:
    """What each training example contributes to `average_losses` at some sizes.

    A replicate whose networks all diverged takes the mean loss of the others, so that all examples
    have a loss.

    Args:
        outputs: see `average_losses`.
        labels: `[example]`.
        left_out: see `average_losses`.
        sizes: of the averages.

    Returns:
        float64 `[size, example]`; the sum over the examples is the mean loss. Examples that no
        replicate left out have 0.
    """
    num_members = outputs.shape[1]
    contributions = np.zeros((len(sizes), len(labels)))
    for contribution, size in zip(contributions, sizes, strict=True):
        of_replicates = []
        for replicate, rows in enumerate(left_out):
            members = _scored_outputs(outputs[replicate], labels, rows)
            # All groups of all members are the same.
            starts = np.arange(num_members if size < num_members else 1)
            groups = (starts[:, None] + np.arange(size)) % num_members
            losses = np.stack(
                [_losses(members[group].mean(0), labels[rows], outputs) for group in groups]
            )
            is_finite = np.isfinite(losses).all(1)
            kept = losses[is_finite] if is_finite.any() else np.full((1, len(rows)), np.nan)
            of_replicates.append(kept.mean(0))
        mean = _mean_of_finite(np.array([losses.mean() for losses in of_replicates]), WORST)
        for rows, losses in zip(left_out, of_replicates, strict=True):
            share = 1 / (len(rows) * len(left_out))
            contribution[rows] += share * np.where(np.isnan(losses), mean, losses)
    return contributions


def _scored_outputs(outputs: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The probabilities of the labels, or the predicted targets, `[member, row]`."""
    chosen = outputs[:, rows].astype(np.float64)
    if chosen.ndim == 2:
        return chosen
    # Only the probability of the label matters to the NLL.
    return np.exp(chosen[:, np.arange(len(rows)), labels[rows]])


def _losses(averages: np.ndarray, labels: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The losses of averaged `_scored_outputs`; squared errors if the outputs are targets."""
    return (averages - labels) ** 2 if outputs.ndim == 3 else -_log(averages)


def _units(data: Dataset, left_out: Sequence[np.ndarray]) -> np.ndarray:
    """What a resample draws: the group of each label, from 0, or -1 if it is left out nowhere.

    The tokens of a sequence are a group, and so are the training examples of a group of the user.
    """
    groups = sequences_of_tokens(data.train_labels)
    if data.train_groups is not None:
        groups = data.train_groups[groups]
    units = np.full(len(groups), -1)
    scored = np.unique(np.concatenate(left_out))
    units[scored] = np.unique(groups[scored], return_inverse=True)[1]
    return units


def _add_up(losses: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The losses `[size, example]` added up within each unit, float32 `[size, unit]`."""
    scored = units >= 0
    sums = [np.bincount(units[scored], of_size[scored]) for of_size in losses]
    return np.stack(sums).astype(np.float32)


def _mean_of_finite(values: np.ndarray, otherwise: float) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else otherwise


def _log(probs: np.ndarray) -> np.ndarray:
    # A loss that JSON can hold, worse than every other.
    return np.log(np.maximum(probs, np.finfo(np.float32).tiny))


def table_sizes(method: Method, num_members: int, settings: Settings) -> list[int]:
    """The sizes that tables show, rising; the members are those that cross-validation scored."""
    if method.unit == "masks":
        return [num_members]
    return sorted({*method.table_sizes(num_members, settings.budget)})


def own_choice(method: Method, size: int, part: TuningPart) -> Choice:
    """The epochs and the weight decay with the smallest loss at a size."""
    curves = _curves(method, part)[:, :, size - 1]
    setting, candidate = np.unravel_index(int(curves.argmin()), curves.shape)
    return _choice(method, int(setting), part.epochs[candidate])


def choice_at(method: Method, epochs: int, part: TuningPart) -> Choice:
    """The weight decay with the smallest loss of one network after so many epochs."""
    curves = _curves(method, part)[:, :, 0]
    setting = int(curves[:, part.epochs.index(epochs)].argmin())
    return _choice(method, setting, epochs)


def _curves(method: Method, part: TuningPart) -> np.ndarray:
    """Losses `[setting, candidate, size]`."""
    return np.asarray(part.losses[method.tuned_as or method.name])


def _choice(method: Method, setting: int, epochs: int) -> Choice:
    return Choice(epochs, method.weight_decays[setting] if method.weight_decays else None)


def search_flops(method: Method, size: int, settings: Settings, part: TuningPart) -> float:
    """Floating-point operations of the cross-validation of one network, over all weight decays.

    The group's search may go on for the sake of another method or size; that is not counted. Nor
    are the predictions of left-out examples.
    """
    best = _curves(method, part)[:, :, size - 1].min(0)  # [candidate]
    for scored, epochs in enumerate(part.epochs, 1):
        if epochs >= settings.epochs and best[:scored].argmin() < scored - 1:
            break
    return max(1, len(method.weight_decays)) * epochs * part.epoch_flops


def searches(
    method: Method, sizes: Sequence[int], settings: Settings, part: TuningPart
) -> dict[int, float]:
    """By size, `search_flops`; an average of masks is of one network, tuned at its largest size."""
    if METHODS[method.tuned_as or method.name].unit == "masks":
        largest = _curves(method, part).shape[2]
        return dict.fromkeys(sizes, search_flops(method, largest, settings, part))
    return {size: search_flops(method, size, settings, part) for size in sizes}


def same_epochs_choice(method: Method, settings: Settings, part: TuningPart | None) -> Choice:
    """How a method trains where all have the epochs of the settings."""
    if part is None or not method.weight_decays:
        return Choice(method.epochs(settings))
    if method.stops_early:
        return own_choice(method, 1, _until(settings.epochs, part))
    return choice_at(method, settings.epochs, part)


def _until(epochs: int, part: TuningPart) -> TuningPart:
    """The cross-validation as if it had ended after so many epochs."""
    count = sum(candidate <= epochs for candidate in part.epochs)
    losses = {name: [curve[:count] for curve in curves] for name, curves in part.losses.items()}
    return TuningPart(part.epochs[:count], losses, part.epoch_flops)


def own_choices(
    method: Method, sizes: Sequence[int], settings: Settings, part: TuningPart | None
) -> dict[int, Choice]:
    """How a method trains for its averages of each size, where each method has its own epochs."""
    if part is None:
        return {size: same_epochs_choice(method, settings, None) for size in sizes}
    if METHODS[method.tuned_as or method.name].unit == "masks":
        # An average of masks is of one network, so all its sizes have the choice of the largest.
        largest = own_choice(method, _curves(method, part).shape[2], part)
        return dict.fromkeys(sizes, largest)
    return {size: own_choice(method, size, part) for size in sizes}


def all_choices(method: Method, settings: Settings, part: TuningPart | None) -> list[Choice]:
    """Every way in which a method trains, by rising epochs."""
    choices = {same_epochs_choice(method, settings, part)}
    if settings.tune and not method.only_same_epochs:
        sizes = [1] if part is None else range(1, _curves(method, part).shape[2] + 1)
        choices |= {*own_choices(method, sizes, settings, part).values()}
    return sorted(choices, key=lambda choice: (choice.epochs, choice.weight_decay or 0.0))
