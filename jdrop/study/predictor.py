"""Predicts with trained networks, and measures what a prediction costs."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import ensemble
from jdrop.network import Network, Variables
from jdrop.study.data import Dataset
from jdrop.study.parts import MethodPredictions
from jdrop.study.settings import Settings
from jdrop.study.training import Progress, check_finite, count_flops

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
        self._inputs = jnp.asarray(np.concatenate(inputs))

    def predict(self, network: Network, variables: Variables, inputs: object) -> np.ndarray:
        """Predictions without dropout, `[replicate, member, example, ...]`.

        Raises:
            jdrop.study.training.DivergedError: predictions that are NaN.
        """
        outputs = np.asarray(self._member_outputs(None, network, variables, jnp.asarray(inputs)))
        check_finite(np.isnan(outputs).any(tuple(range(1, outputs.ndim))))
        by_member = outputs.reshape(-1, self.settings.replicates, *outputs.shape[1:])
        return np.ascontiguousarray(by_member.swapaxes(0, 1))

    def read_without_dropout(
        self, network: Network, variables: Variables, *, networks_per_member: int = 1
    ) -> MethodPredictions:
        """What a method predicts whose members are networks without dropout.

        Args:
            network: the architecture.
            variables: of all members of all replicates, with a leading axis.
            networks_per_member: how many networks were trained for each of these.
        """
        outputs, ood_outputs = self._split(self.predict(network, variables, self._inputs))
        start = time.perf_counter()  # The program is compiled now.
        jax.block_until_ready(self._member_outputs(None, network, variables, self._inputs))
        seconds = time.perf_counter() - start
        num_passes = outputs.shape[0] * outputs.shape[1] * len(self._inputs)
        return MethodPredictions(
            outputs=outputs,
            ood_outputs=ood_outputs,
            predict_flops=self._flops(network, variables, None),
            predict_seconds=seconds / num_passes,
            networks_per_member=networks_per_member,
        )

    def read_with_masks(
        self, key: Array, network: Network, variables: Variables
    ) -> MethodPredictions:
        """What a method predicts whose members are masks of one network.

        Args:
            key: consumed.
            network: the architecture.
            variables: of one network in each replicate, with a leading axis.
        """
        num_samples = self.settings.num_samples
        samples = []
        for index in range(num_samples):
            if index == 1:  # The first one compiles.
                start = time.perf_counter()
            sample_key = jax.random.fold_in(key, index)
            sampled = self._member_outputs(sample_key, network, variables, self._inputs)
            samples.append(np.asarray(sampled))
            self._progress("sampling masks", index + 1, num_samples)
        seconds = time.perf_counter() - start
        num_passes = (num_samples - 1) * len(samples[0]) * len(self._inputs)
        outputs, ood_outputs = self._split(np.stack(samples, 1))
        return MethodPredictions(
            outputs=outputs,
            ood_outputs=ood_outputs,
            predict_flops=self._flops(network, variables, jax.random.key(0)),
            predict_seconds=seconds / num_passes,
        )

    def _member_outputs(
        self, key: Array | None, network: Network, variables: Variables, inputs: Array
    ) -> Array:
        """Predictions `[member, example, ...]`, in regression without an axis of outputs."""
        regression = self._data.is_regression
        outputs = ensemble.predict(key, network, variables, inputs, regression=regression)
        return outputs.reshape(outputs.shape[:2]) if regression else outputs

    def _split(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The predictions for the test inputs and for the out-of-distribution inputs."""
        num_test = len(self._data.test_labels)
        ood_outputs = None if self._data.ood_inputs is None else outputs[:, :, num_test:]
        return outputs[:, :, :num_test], ood_outputs

    def _flops(self, network: Network, variables: Variables, key: Array | None) -> float:
        """Floating-point operations for one network and example."""
        member = jax.tree.map(lambda leaf: np.asarray(leaf)[0], variables)
        inputs = np.zeros((FLOPS_BATCH, *self._inputs.shape[1:]), self._inputs.dtype)
        return count_flops(lambda v, x: network(v, x, key), member, inputs) / FLOPS_BATCH
