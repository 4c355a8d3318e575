"""Epochs whose batches are read as they are needed, of data that the device does not hold."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jdrop.batching import MemberMap
from jdrop.study.data import take
from jdrop.study.data.streams import with_sharding
from jdrop.train import Batch, TrainState, begin_epoch, fit_step

READ_AHEAD = 2
"""The number of batches that are read while the device works, and of steps that wait for it."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class StreamedEpoch:
    """An epoch of all networks, equal to one of `fit_ensemble` with the same key, up to rounding.

    Every step reads a batch for each network, puts it on the device, and trains all networks on
    their batches.

    Attributes:
        begin: the compiled `_begin_networks`.
        step: the compiled `fit_step` of all networks, `[network, batch, ...]`.
        sharding: divides the networks among the devices.
    """

    begin: Callable[..., Any]
    step: Callable[..., Any]
    sharding: NamedSharding

    def __call__(
        self,
        key: Array,
        indices: np.ndarray,
        state: TrainState,
        inputs: Any,
        labels: np.ndarray,
        rows: np.ndarray,
    ) -> tuple[TrainState, Array]:
        """Trains for an epoch; see `jdrop.ensemble.fit_ensemble`.

        Args:
            key: consumed.
            indices: of the networks, `[network]`.
            state: of all networks.
            inputs: a stream, or arrays in the memory of the machine.
            labels: `[example]`.
            rows: `[network, row]`.

        Returns:
            The state after the epoch, and the mean loss of each network, `[network, 1]`.
        """

        def read(step_rows: np.ndarray) -> Batch:
            flat = step_rows.reshape(-1)
            batch = jax.tree.map(
                lambda array: array.reshape(*step_rows.shape, *array.shape[1:]),
                (take(inputs, flat), labels[flat]),
            )
            return jax.device_put(batch, self.sharding)

        state, mask_keys, batches = self.begin(key, indices, state, rows)
        losses: list[Array] = []
        for batch in read_ahead(read, np.asarray(batches).swapaxes(0, 1)):
            state, loss = self.step(mask_keys, state, batch)
            losses.append(loss)
            # Else all batches of the epoch would wait on the device.
            jax.block_until_ready(losses[-READ_AHEAD:][0])
        return state, jnp.stack(losses, 1).mean(1, keepdims=True)


def compile_streamed_epoch(
    key: Any,
    indices: Any,
    state: Any,
    inputs: Any,
    labels: Any,
    rows: Any,
    batch_size: int,
    batching: str,
) -> StreamedEpoch:
    """Compiles the programs of an epoch.

    Args:
        key: the type of the key of `StreamedEpoch`, and so are the other arguments; the rows have
            the sharding of the networks.
        indices: of the networks.
        state: of all networks, with its sharding.
        inputs: of all examples.
        labels: of all examples.
        rows: `[network, row]`.
        batch_size: how many examples each step of a network takes.
        batching: "vmap" or "scan"; see `jdrop.ensemble.fit_ensemble`.
    """
    sharding = rows.sharding

    def step_networks(*networks: Any) -> tuple[TrainState, Any]:
        step_all = MemberMap(batching, mesh=sharding.mesh)
        return step_all(lambda _, *network: fit_step(*network), (), *networks)

    begin = jax.jit(partial(_begin_networks, batch_size=batch_size), out_shardings=sharding)
    step = jax.jit(step_networks, out_shardings=sharding)
    state, mask_keys, _ = with_sharding(jax.eval_shape(begin, key, indices, state, rows), sharding)
    batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(
            (rows.shape[0], batch_size, *array.shape[1:]), array.dtype
        ),
        (inputs, labels),
    )
    return StreamedEpoch(
        begin.lower(key, indices, state, rows).compile(),
        step.lower(mask_keys, state, with_sharding(batch, sharding)).compile(),
        sharding,
    )


def _begin_networks(
    key: Array, indices: Array, state: TrainState, rows: Array, *, batch_size: int
) -> tuple[TrainState, Array, Array]:
    """What `fit_ensemble` does before the first step of an epoch, for all networks.

    Returns:
        The state; the keys of the masks, `[network]`; and the rows of each step,
        `[network, step, batch]`.
    """

    def begin(index: Array, state: TrainState, rows: Array) -> tuple[TrainState, Array, Array]:
        order_key, mask_key, shuffle_key = jax.random.split(jax.random.fold_in(key, index), 3)
        state, batches = begin_epoch(order_key, shuffle_key, state, rows, batch_size)
        return state, mask_key, batches

    return jax.vmap(begin)(indices, state, rows)


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields `read(item)` for each item; a thread reads the next ones in the meantime."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for item in items:
            waiting.append(reader.submit(read, item))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
