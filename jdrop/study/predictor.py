"""Predicts with trained networks, and measures what a prediction costs."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import ensemble
from jdrop.network import Network, Variables
from jdrop.study.data import (
    Dataset,
    Progress,
    chunks,
    join,
    num_examples,
    outputs_of_tokens,
    shapes_of,
    take,
)
from jdrop.study.data.streams import with_length
from jdrop.study.parts import MethodPredictions
from jdrop.study.programs import count_flops
from jdrop.study.settings import Settings

FLOPS_BATCH = 100  # The compiler counts the operations for so many examples at once.

TIMED_PASSES = 5  # Or fewer, if a method has fewer masks.


class Predictor:
    """Predicts for the test inputs and the out-of-distribution inputs of a data set.

    Args:
        settings: gives the replicates and the number of masks.
        data: the examples.
        progress: is called as masks are drawn.
    """

    def __init__(self, settings: Settings, data: Dataset, progress: Progress) -> None:
        self.settings = settings
        self._data, self._progress = data, progress
        # Inputs of one chunk go through the networks in one pass.
        self._inputs = data.test_inputs
        if data.ood_inputs is not None:
            self._inputs = join(data.test_inputs, data.ood_inputs)

    def predict(
        self,
        key: Array | None,
        network: Network,
        variables: Variables,
        inputs: Any,
        labels: np.ndarray,
    ) -> np.ndarray:
        """Predictions of networks `[replicate, member, example, ...]`.

        With labels per token these are predictions of the tokens that have a label.

        Args:
            key: consumed; every network draws masks of its own. None: without dropout.
            network: the architecture.
            variables: of all members of all replicates, with a leading axis.
            inputs: `[example, ...]`, a pytree of such arrays, or a stream.
            labels: of these inputs; they say which tokens have a label.
        """
        return self.predict_passes([key], network, variables, inputs, labels, next)

    def predict_passes(
        self,
        keys: Sequence[Array | None],
        network: Network,
        variables: Variables,
        inputs: Any,
        labels: np.ndarray,
        combine: Callable[[Iterator[np.ndarray]], np.ndarray],
    ) -> np.ndarray:
        """What `combine` makes of the predictions of several passes, `[replicate, ..., example]`.

        Reads the inputs once, chunk by chunk. If there are several chunks, each has masks of its
        own.

        Args:
            keys: of the passes; see `predict`.
            network: the architecture.
            variables: of all members of all replicates, with a leading axis.
            inputs: `[example, ...]`, a pytree of such arrays, or a stream.
            labels: of these inputs; they say which tokens have a label.
            combine: is called for each chunk with the predictions of the passes, one after another;
                returns an array whose third axis is that of the examples.
        """
        slices = self._chunks(keys[0], variables, inputs)
        num_passes = len(slices) * len(keys)

        def passes(index: int, rows: slice) -> Iterator[np.ndarray]:
            chunk = jax.tree.map(jnp.asarray, take(inputs, rows))
            for key_index, key in enumerate(keys):
                if key is not None and len(slices) > 1:
                    key = jax.random.fold_in(key, index)
                member_outputs = self._member_outputs(key, network, variables, chunk)
                outputs = np.asarray(outputs_of_tokens(member_outputs, labels[rows]))
                by_member = outputs.reshape(-1, self.settings.replicates, *outputs.shape[1:])
                yield np.ascontiguousarray(by_member.swapaxes(0, 1))
                if key is not None:
                    done = index * len(keys) + key_index + 1
                    self._progress("sampling masks", done, num_passes)

        combined = [combine(passes(index, rows)) for index, rows in enumerate(slices)]
        return combined[0] if len(combined) == 1 else np.concatenate(combined, 2)

    def read(
        self,
        key: Array | None,
        network: Network,
        variables: Variables,
        *,
        epochs: int,
        weight_decay: float | None,
    ) -> MethodPredictions:
        """What a method predicts for the test inputs and the out-of-distribution inputs.

        Args:
            key: consumed; for a method whose members are masks of one network in each replicate.
                None for a method whose members are networks without dropout.
            network: the architecture.
            variables: of all members of all replicates, or of one network in each replicate, with
                a leading axis.
            epochs: how many epochs the networks trained.
            weight_decay: of their training.
        """
        keys: list[Array | None] = [None]
        if key is not None:
            keys = [jax.random.fold_in(key, index) for index in range(self.settings.num_samples)]
        outputs, ood_outputs = self._split(
            self.predict_passes(
                keys,
                network,
                variables,
                self._inputs,
                self._data.test_labels,
                lambda passes: np.concatenate([*passes], 1),
            )
        )
        return MethodPredictions(
            epochs=epochs,
            weight_decay=weight_decay,
            outputs=outputs,
            ood_outputs=ood_outputs,
            predict_flops=self._flops(
                network, variables, None if key is None else jax.random.key(0)
            ),
            predict_seconds=self._seconds(keys[:TIMED_PASSES], network, variables),
        )

    def _chunks(self, key: Array | None, variables: Variables, inputs: Any) -> list[slice]:
        """Examples that go through the networks together."""
        # Masks must not depend on how many networks there are, so neither may their chunks.
        num_networks = 1 if key is not None else len(jax.tree.leaves(variables)[0])
        return chunks(inputs, num_networks * self._data.output_bytes)

    def _member_outputs(
        self, key: Array | None, network: Network, variables: Variables, inputs: Any
    ) -> Array:
        """Predictions `[member, example, ...]`, in regression without an axis of outputs."""
        regression = self._data.is_regression
        outputs = ensemble.predict(key, network, variables, inputs, regression=regression)
        return outputs.reshape(outputs.shape[:2]) if regression else outputs

    def _split(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The predictions for the test inputs and for the out-of-distribution inputs."""
        if self._data.ood_inputs is None:
            return outputs, None
        num_test = len(self._data.test_labels)
        return outputs[:, :, :num_test], outputs[:, :, num_test:]

    def _flops(self, network: Network, variables: Variables, key: Array | None) -> float:
        """Floating-point operations for one network and example."""
        member = jax.tree.map(lambda leaf: np.asarray(leaf)[0], variables)
        inputs = with_length(shapes_of(self._inputs), FLOPS_BATCH)
        return count_flops(lambda v, x: network(v, x, key), member, inputs) / FLOPS_BATCH

    def _seconds(
        self, keys: Sequence[Array | None], network: Network, variables: Variables
    ) -> float:
        """The mean time of a pass for one network and example, without reading the example."""
        num_networks = len(jax.tree.leaves(variables)[0])
        rows = self._chunks(keys[0], variables, self._inputs)[0]
        chunk = jax.tree.map(jnp.asarray, take(self._inputs, rows))
        jax.block_until_ready(chunk)
        start = time.perf_counter()
        for key in keys:
            pass_key = None if key is None else jax.random.clone(key)
            jax.block_until_ready(self._member_outputs(pass_key, network, variables, chunk))
        seconds = (time.perf_counter() - start) / len(keys)
        return seconds / (num_networks * num_examples(chunk))
