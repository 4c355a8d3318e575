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

NUM_MASK_ORDERS = 5
"""Starting points on the circle of masks. Networks have as many starting points as members."""

PADDING = 10
"""Member counts are padded to a multiple, so that few programs are compiled."""


@jax.jit
def _classification_losses(
    key: Array,
    log_probs: Array,
    labels: Array,
    calibrate: Array,
    num_members: ArrayLike,
    num_orders: ArrayLike,
) -> dict[str, Array]:
    """Losses `[size, example]` of averages, at each size a mean over several orders of members.

    Members from `num_members` on, and larger sizes, are padding.
    """
    sizes = jnp.arange(1, len(log_probs) + 1)

    def add_member(
        average: RunningAverage, step: tuple[Array, Array]
    ) -> tuple[RunningAverage, dict[str, Array]]:
        member, calibrated = step
        average = average.add(log_probs[member])
        pooled = average.log_probs()
        losses = metrics.losses(pooled, labels)
        losses["calibrated_nll"] = jax.lax.cond(
            calibrated,
            lambda: metrics.calibrated_losses(
                jax.random.clone(key), pooled, labels, num_repeats=NUM_SPLITS
            ),
            lambda: jnp.full_like(losses["nll"], jnp.nan),
        )
        return average, losses

    def losses_of_order(index: Array) -> dict[str, Array]:
        start = index * num_members // num_orders
        # Neighbours on a circle: each member is in equally many averages of a size.
        members = (start + sizes - 1) % num_members
        start_average = RunningAverage.start(log_probs[0])
        return jax.lax.scan(add_member, start_average, (members, calibrate))[1]

    sums = jax.lax.fori_loop(
        0,
        num_orders,
        lambda index, sums: jax.tree.map(jnp.add, sums, losses_of_order(index)),
        jax.tree.map(jnp.zeros_like, jax.eval_shape(losses_of_order, 0)),
    )
    return jax.tree.map(lambda values: values / num_orders, sums)


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

    The losses at a size are means over several groups of the replicate's members. Each member is
    in equally many groups.
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
    num_orders = min(num_members, NUM_MASK_ORDERS) if unit == "masks" else num_members
    key = jax.random.key(0)  # All methods are scored on the same splits.
    losses_of_replicates = []
    for replicate_outputs in outputs:
        if is_regression(labels):
            members = jnp.asarray(replicate_outputs)
            starts = jnp.arange(num_orders) * num_members // num_orders
            losses_of_sizes = [
                _regression_losses(
                    jax.random.clone(key), members, jnp.asarray(labels), starts, size=size
                )
                for size in sizes
            ]
            losses = jax.tree.map(lambda *values: np.stack(values), *losses_of_sizes)
        else:
            padded_count = -(-num_members // PADDING) * PADDING
            calibrate = np.isin(np.arange(1, padded_count + 1), sizes)
            padded = np.resize(replicate_outputs, (padded_count, *replicate_outputs.shape[1:]))
            padded_losses = _classification_losses(
                jax.random.clone(key),
                jnp.asarray(padded),
                jnp.asarray(labels),
                calibrate,
                num_members,
                num_orders,
            )
            indices = np.asarray(sizes) - 1
            losses = {score: np.asarray(values)[indices] for score, values in padded_losses.items()}
        losses_of_replicates.append(losses)
    return {
        score: np.stack([losses[score] for losses in losses_of_replicates]).astype(np.float64)
        for score in losses_of_replicates[0]
    }


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
