"""Losses of averages of members: one value per replicate, size and example."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jdrop import metrics
from jdrop.inference import RunningAverage
from jdrop.study.evaluation.readings import Reading, State, is_regression

NUM_SPLITS = 5
"""Two-fold splits of the test examples for calibration, as in Ashukha et al. 2020."""

MASK_STARTS = 5
"""How many averages of masks are scored at each size, at most."""

NETWORK_STARTS = 20
"""How many averages of networks are scored at each size, if there are as many networks."""

PADDING = 10
"""Counts of members and sizes are padded to a multiple, so that few programs are compiled."""


@jax.jit
def _classification_losses(
    key: Array,
    log_probs: Array,
    labels: Array,
    num_members: ArrayLike,
    sizes: Array,
    num_starts: Array,
) -> dict[str, Array]:
    """Losses `[size, example]` of averages, at each size a mean over several groups of members.

    Members from `num_members` on are padding, and so are sizes with 0 starts.
    """

    def losses_of_group(start: Array, size: Array) -> dict[str, Array]:
        average = jax.lax.fori_loop(
            0,
            size,
            lambda step, average: average.add(log_probs[(start + step) % num_members]),
            RunningAverage.start(log_probs[0]),
        )
        pooled = average.log_probs()
        calibrated = metrics.calibrated_losses(
            jax.random.clone(key), pooled, labels, num_repeats=NUM_SPLITS
        )
        return {**metrics.losses(pooled, labels), "calibrated_nll": calibrated}

    def losses_of_size(of_size: tuple[Array, Array]) -> dict[str, Array]:
        size, num_starts = of_size
        sums = jax.lax.fori_loop(
            0,
            num_starts,
            lambda index, sums: jax.tree.map(
                jnp.add, sums, losses_of_group(index * num_members // num_starts, size)
            ),
            jax.tree.map(jnp.zeros_like, jax.eval_shape(losses_of_group, 0, size)),
        )
        return jax.tree.map(lambda values: values / num_starts, sums)

    return jax.lax.map(losses_of_size, (sizes, num_starts))


@partial(jax.jit, static_argnames="size")
def _regression_losses(
    key: Array, means: Array, targets: Array, starts: Array, *, size: int
) -> dict[str, Array]:
    """Losses `[example]` of averages of `size` members, a mean over several groups of members."""
    num_members, num_examples = means.shape

    def losses_of_group(start: Array) -> dict[str, Array]:
        members = means[(start + jnp.arange(size)) % num_members]

        def crps(fitted: Array, scored: Array) -> Array:
            scale = metrics.fit_scale(members[:, fitted], targets[fitted])
            return metrics.crps_losses(members[:, scored], targets[scored], scale)

        return {
            "calibrated_nll": metrics.calibrated_mixture_losses(
                jax.random.clone(key), members, targets, num_repeats=NUM_SPLITS
            ),
            "crps": metrics.mean_over_splits(jax.random.clone(key), crps, num_examples, NUM_SPLITS),
            "mse": metrics.squared_losses(members, targets),
        }

    losses = jax.lax.map(losses_of_group, starts)
    return jax.tree.map(lambda values: values.mean(0), losses)


def losses_by_size(reading: Reading, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Computes the losses `[replicate, size, example]` of a method by score.

    The losses at a size are means over several groups of the replicate's members, see
    `_num_starts`.
    """
    return losses_of_readings([reading], labels)[0]


def losses_of_readings(
    readings: Sequence[Reading], labels: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """Computes `losses_by_size` of several readings; averages that several share, only once."""
    sizes: dict[int, set[int]] = {}
    shared: dict[int, tuple[State, str]] = {}
    for reading in readings:
        for size, state in reading.states.items():
            sizes.setdefault(id(state), set()).add(size)
            shared[id(state)] = state, reading.unit
    by_state = {
        identity: _losses_of_state(state.outputs, sorted(sizes[identity]), unit, labels)
        for identity, (state, unit) in shared.items()
    }

    def assemble(reading: Reading) -> dict[str, np.ndarray]:
        rows = [
            {
                score: losses[:, sorted(sizes[id(state)]).index(size)]
                for score, losses in by_state[id(state)].items()
            }
            for size, state in reading.states.items()
        ]
        return {score: np.stack([row[score] for row in rows], 1) for score in rows[0]}

    return [assemble(reading) for reading in readings]


def _losses_of_state(
    outputs: np.ndarray, sizes: Sequence[int], unit: str, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Losses `[replicate, size, example]` of averages of the same members, by score."""
    num_members = outputs.shape[1]
    num_starts = [_num_starts(num_members, size, unit) for size in sizes]
    key = jax.random.key(0)  # All methods are scored on the same splits.
    losses_of_replicates = []
    for replicate_outputs in outputs:
        if is_regression(labels):
            members = jnp.asarray(replicate_outputs)
            losses_of_sizes = [
                _regression_losses(
                    jax.random.clone(key),
                    members,
                    jnp.asarray(labels),
                    jnp.arange(count) * num_members // count,
                    size=size,
                )
                for size, count in zip(sizes, num_starts, strict=True)
            ]
            losses = jax.tree.map(lambda *values: np.stack(values), *losses_of_sizes)
        else:
            shape = (num_members + -num_members % PADDING, *replicate_outputs.shape[1:])
            no_starts = (0, -len(sizes) % PADDING)
            padded_losses = _classification_losses(
                jax.random.clone(key),
                jnp.asarray(np.resize(replicate_outputs, shape)),
                jnp.asarray(labels),
                num_members,
                jnp.asarray(np.pad(sizes, no_starts)),
                jnp.asarray(np.pad(num_starts, no_starts)),
            )
            losses = {
                score: np.asarray(values)[: len(sizes)] for score, values in padded_losses.items()
            }
        losses_of_replicates.append(losses)
    return {
        score: np.stack([losses[score] for losses in losses_of_replicates]).astype(np.float64)
        for score in losses_of_replicates[0]
    }


def _num_starts(num_members: int, size: int, unit: str) -> int:
    """How many groups of neighbours are averaged, where the members lie on a circle.

    With up to 20 networks each one starts a group, so each is in equally many. With more, there are
    20 groups, or as many disjoint ones as there can be.
    """
    if unit == "masks":
        return min(num_members, MASK_STARTS)
    return max(min(num_members, NETWORK_STARTS), num_members // size)


def mean_losses(outputs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Computes mean losses `[replicate]` of single networks.

    Args:
        outputs: `[replicate, 1, example, ...]`.
        labels: `[example]`.
    """
    if is_regression(labels):
        return {"mse": ((outputs[:, 0] - labels) ** 2).mean(1, dtype=np.float64)}
    losses = jax.vmap(metrics.losses, in_axes=(0, None))(
        jnp.asarray(outputs[:, 0]), jnp.asarray(labels)
    )
    return {
        score: np.asarray(losses[score], np.float64).mean(1) for score in ("nll", "brier", "error")
    }
