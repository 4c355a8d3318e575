"""The losses on which networks are trained, and the scores of single examples."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import metrics
from jdrop.network import Network, Variables
from jdrop.study.data import Dataset, chunks, labels_of_tokens, take
from jdrop.train import LossFn, cross_entropy, weighted


def squared_error(outputs: Array, targets: Array) -> Array:
    """The loss of regression: one squared error for each example."""
    return (outputs.reshape(targets.shape) - targets) ** 2


def token_cross_entropy(outputs: Array, labels: Array) -> Array:
    """The mean cross-entropy of all tokens of a batch that have a label, a scalar.

    A long sequence has more weight than a short one, as is usual for language models.

    Args:
        outputs: logits `[sequence, length, class]`.
        labels: `[sequence, length]`, below 0 where there is no label.
    """
    return _weighted_cross_entropy(outputs, (labels, labels >= 0))


_weighted_cross_entropy = weighted(cross_entropy)


def loss_fn_of(data: Dataset) -> LossFn:
    """The loss on which the networks of a data set are trained."""
    if data.is_regression:
        return squared_error
    return token_cross_entropy if data.is_per_token else cross_entropy


def example_losses(outputs: Array, labels: Array) -> dict[str, Array]:
    """Scores of each example from a network's outputs, by name.

    With labels per token the scores `[sequence, length]` are 0 at positions without a label. Those
    of the tokens are scaled, so that the mean over all positions is the mean over tokens.
    """
    if labels.ndim > 1:
        flat = example_losses(
            outputs.reshape(-1, outputs.shape[-1]), jnp.maximum(labels, 0).reshape(-1)
        )
        weights = (labels >= 0) / jnp.mean(labels >= 0)
        return {
            name: jnp.where(labels >= 0, weights * losses.reshape(labels.shape), 0)
            for name, losses in flat.items()
        }
    if jnp.issubdtype(labels.dtype, jnp.integer):
        losses = metrics.losses(jax.nn.log_softmax(outputs), labels)
        return {"nll": losses["nll"], "error": losses["error"]}
    return {"mse": squared_error(outputs, labels)}


@partial(jax.jit, static_argnames="network")
def _losses(network: Network, variables: Variables, inputs: Any, labels: Array) -> dict[str, Array]:
    """Scores `[member, example]` of networks without dropout."""
    return jax.lax.map(
        lambda member: example_losses(network(member, inputs, None), labels), variables
    )


def mean_losses(
    network: Network, variables: Variables, inputs: Any, labels: Any, output_bytes: int
) -> dict[str, float]:
    """Mean scores over members and examples.

    Args:
        network: the architecture.
        variables: of all members, with a leading axis.
        inputs: `[example, ...]`, a pytree of such arrays, or a stream.
        labels: `[example]`, or `[example, length]` of tokens.
        output_bytes: see `Dataset`.
    """
    totals: dict[str, float] = {}
    num_scored = 0
    for rows in chunks(inputs, output_bytes):
        # Means are over tokens with a label, of which a chunk may have none.
        if not (in_chunk := len(labels_of_tokens(np.asarray(labels[rows])))):
            continue
        chunk = jax.tree.map(jnp.asarray, (take(inputs, rows), labels[rows]))
        for name, values in _losses(network, variables, *chunk).items():
            totals[name] = totals.get(name, 0.0) + in_chunk * float(values.mean())
        num_scored += in_chunk
    return {name: total / num_scored for name, total in totals.items()}
