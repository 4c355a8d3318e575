"""Predicts with trained networks, and measures what a prediction costs."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import ensemble
from jdrop.network import Network, Variables
from jdrop.study.data import Dataset, num_examples, outputs_of_tokens
from jdrop.study.parts import MethodPredictions
from jdrop.study.settings import Settings
from jdrop.study.training import Progress, count_flops

FLOPS_BATCH = 100  # The compiler counts the operations for so many examples at once.


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
        # All inputs go through the networks in one pass.
        inputs = [data.test_inputs] + ([] if data.ood_inputs is None else [data.ood_inputs])
        self._inputs = jax.tree.map(lambda *arrays: jnp.asarray(np.concatenate(arrays)), *inputs)

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
            inputs: `[example, ...]`, or a pytree of such arrays.
            labels: of these inputs; they say which tokens have a label.
        """
        inputs = jax.tree.map(jnp.asarray, inputs)
        member_outputs = self._member_outputs(key, network, variables, inputs)
        outputs = np.asarray(outputs_of_tokens(member_outputs, labels))
        by_member = outputs.reshape(-1, self.settings.replicates, *outputs.shape[1:])
        return np.ascontiguousarray(by_member.swapaxes(0, 1))

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
        num_passes = 1 if key is None else self.settings.num_samples
        passes = []
        for index in range(num_passes):
            if index == 1:  # The first one compiles.
                start = time.perf_counter()
            pass_key = None if key is None else jax.random.fold_in(key, index)
            passes.append(
                self.predict(pass_key, network, variables, self._inputs, self._data.test_labels)
            )
            if key is not None:
                self._progress("sampling masks", index + 1, num_passes)
        if key is None:
            start = time.perf_counter()
            jax.block_until_ready(self._member_outputs(None, network, variables, self._inputs))
        seconds = (time.perf_counter() - start) / max(1, num_passes - 1)
        outputs, ood_outputs = self._split(np.concatenate(passes, 1))
        flops_key = None if key is None else jax.random.key(0)
        num_networks = len(jax.tree.leaves(variables)[0])
        return MethodPredictions(
            epochs=epochs,
            weight_decay=weight_decay,
            outputs=outputs,
            ood_outputs=ood_outputs,
            predict_flops=self._flops(network, variables, flops_key),
            predict_seconds=seconds / (num_networks * num_examples(self._inputs)),
        )

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
        inputs = jax.tree.map(
            lambda array: np.zeros((FLOPS_BATCH, *array.shape[1:]), array.dtype), self._inputs
        )
        return count_flops(lambda v, x: network(v, x, key), member, inputs) / FLOPS_BATCH
