"""Losses in training: one for each example, and what the training step makes of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jdrop.annotations import Float, Shaped

LossFn = Callable[[Any, Any], Any]
"""`loss_fn(outputs, labels)` -> one loss for each example, `[batch]`.

Losses may have further axes, `[batch, ...]`, such as one loss for each token; training minimises
the mean of all. A loss of the whole batch, a scalar, is minimised as it is. A tuple `(losses, aux)`
carries any pytree of arrays beside the losses, such as metrics.
"""


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Shaped[Array, "..."]
) -> Float[Array, "*batch"]:
    r"""The negative log-likelihood of integer labels: $-\log \mathrm{softmax}(z)_y$, in nats.

    The loss and its gradient are NaN if a label is not a class index.

    Args:
        logits: float, `[batch, classes]`; or `[batch, length, classes]`, for one label per token.
        labels: integer class indices, `[batch]` or `[batch, length]`. For padding, see `weighted`.

    Raises:
        ValueError: labels that are not one integer for each example.

    Example:
        >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
        Array([1.3862944], dtype=float32)
    """
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {logits.shape[:-1]}, got {labels.dtype} of shape "
            f"{labels.shape}; turn one-hot labels into integers with `labels.argmax(-1)`."
        )
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    # In a narrow dtype, such as int8, the number of classes could overflow.
    wide = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    is_class = (wide >= 0) & (wide < logits.shape[-1])
    # Multiply, so that the gradient is NaN too.
    return losses * jnp.where(is_class, 1, jnp.nan).astype(losses.dtype)


def gaussian_nll(outputs: Any, labels: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""The negative log-likelihood of a target under a normal distribution that is predicted.

    $$\frac{1}{2} \left(\log (2 \pi v) + \frac{(y - \mu)^2}{v}\right)$$

    in nats, where a network with two heads predicts the mean $\mu$ and the variance $v$ of each
    target. The variance may be `jax.nn.softplus` of an output, plus a small number.

    Args:
        outputs: a tuple `(mean, variance)` of floats, each of the shape of the labels. The loss is
            NaN if a variance is negative.
        labels: the targets, float, `[batch]` or `[batch, ...]`.

    Returns:
        One loss for each target, of the shape of the labels.

    Raises:
        TypeError: outputs that are not a tuple of two arrays.
        ValueError: a mean, variance or labels of another shape.

    Example:
        >>> gaussian_nll((jnp.zeros(1), jnp.ones(1)), jnp.ones(1))  # log(2 pi) / 2 + 1 / 2
        Array([1.4189385], dtype=float32)

    Reference:
        Nix and Weigend 1994, doi:10.1109/ICNN.1994.374138; Lakshminarayanan et al. 2017,
        arXiv:1612.01474, equation 1.
    """
    if not isinstance(outputs, tuple | list) or len(outputs) != 2:
        raise TypeError(
            "the network must return a tuple (mean, variance) for gaussian_nll, got "
            f"{type(outputs).__name__} with the arrays {jax.tree.map(jnp.shape, outputs)}."
        )
    mean, variance = outputs
    if not mean.shape == variance.shape == labels.shape:
        raise ValueError(
            "mean, variance and labels must have the same shape, got "
            f"{mean.shape}, {variance.shape} and {labels.shape}; take single outputs with "
            "`outputs[:, 0]`."
        )
    return 0.5 * (math.log(2 * math.pi) + jnp.log(variance) + (labels - mean) ** 2 / variance)


@dataclass(frozen=True)
class _Weighted:
    """A loss function with weights. Equal ones are equal, so that none is compiled twice."""

    loss_fn: LossFn

    def __call__(self, outputs: Any, labels: Any) -> Any:
        if not isinstance(labels, tuple | list) or len(labels) != 2:
            raise TypeError(
                "a weighted loss takes labels that are a tuple (labels, weights), got "
                f"{type(labels).__name__}."
            )
        labels, weights = labels

        def without_ignored(label: Array) -> Array:
            if label.shape[: weights.ndim] != weights.shape:
                return label
            return jnp.where(_expand(weights, label.ndim) != 0, label, jnp.zeros_like(label))

        # A zero weight alone would not do: 0 * NaN is NaN, in the loss and in its gradient.
        labels = jax.tree.map(without_ignored, labels)
        losses, aux = compute_losses(self.loss_fn, outputs, labels)
        if not losses.ndim or losses.shape[: weights.ndim] != weights.shape:
            raise ValueError(
                "weights must have the leading axes of the losses, [batch] or [batch, ...], got "
                f"weights of shape {weights.shape} and losses of shape {losses.shape}."
            )
        dtype = jnp.promote_types(losses.dtype, jnp.float32)
        weights = jnp.broadcast_to(_expand(weights, losses.ndim), losses.shape).astype(dtype)
        total = jnp.sum(weights)
        total_loss = jnp.sum(jnp.where(weights != 0, weights * losses, 0))
        # Without any weight the loss is 0, and so is its gradient.
        loss = (total_loss / jnp.where(total == 0, 1, total)).astype(losses.dtype)
        return (loss, *aux) if aux else loss


def _expand(array: Array, ndim: int) -> Array:
    """The array with axes of size 1 at the end."""
    return jnp.expand_dims(array, range(array.ndim, ndim))


def weighted(loss_fn: LossFn) -> LossFn:
    r"""A loss function with a weight for each example or token: $\sum_i w_i l_i / \sum_i w_i$.

    The labels in training are then a tuple `(labels, weights)`. An example of weight 0 has no
    effect on the gradient, and any number may stand for its label, such as -1 for padding. The
    weights of each batch are normalised by their sum in this batch; a batch whose weights are all
    0 has the loss 0.

    Args:
        loss_fn: returns one loss for each example or token, `[batch]` or `[batch, ...]`.

    Returns:
        `f(outputs, (labels, weights))` -> the weighted mean, a scalar. The weights are at least 0,
        Boolean or of any real dtype. Their shape is that of the losses or of their leading axes:
        `[batch, length]` for tokens, `[batch]` for whole sequences.

    Raises:
        TypeError: in training, labels that are not a tuple of labels and weights.
        ValueError: in training, weights of another shape; a `loss_fn` that returns a scalar.

    Example:
        >>> loss_fn = weighted(cross_entropy)
        >>> labels = jnp.array([[0, 1, -1], [1, -1, -1]])
        >>> logits = jnp.zeros((2, 3, 2))
        >>> round(float(loss_fn(logits, (labels, labels >= 0))), 4)
        0.6931
    """
    return _Weighted(loss_fn)


def compute_losses(loss_fn: LossFn, outputs: Any, labels: Any) -> tuple[Array, tuple[Any, ...]]:
    """The losses, and a tuple that holds the auxiliary outputs, if there are any.

    Raises if the losses are not those of the examples.
    """
    result = loss_fn(outputs, labels)
    losses, *aux = result if isinstance(result, tuple) else (result,)
    if not hasattr(losses, "shape") or len(aux) > 1:
        raise TypeError(
            "loss_fn must return an array of losses, [batch], or a tuple (losses, aux), got "
            f"{type(result).__name__} with the arrays {jax.tree.map(jnp.shape, result)}."
        )
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((outputs, labels))}
    if losses.ndim and (losses.shape[:1] not in sizes or _pairs(losses, loss_fn, outputs, labels)):
        raise ValueError(
            "loss_fn must return one loss for each example, [batch] or [batch, ...], got the shape "
            f"{losses.shape} for outputs of shape {jax.tree.map(jnp.shape, outputs)} and labels of "
            f"shape {jax.tree.map(jnp.shape, labels)}. Axes after the first must not depend on the "
            "size of the batch, as they do if [batch, 1] meets [batch]; give outputs and labels "
            "the same shape, for instance with `outputs[:, 0]`."
        )
    return losses, tuple(aux)


def _pairs(losses: Array, loss_fn: LossFn, outputs: Any, labels: Any) -> bool:
    """Whether the losses are those of pairs of examples, as where `[batch, 1]` meets `[batch]`.

    Then another axis than the first grows with the batch. This traces the loss with one example
    more, and only if an axis has the size of the batch.
    """
    batch_size, *sizes = losses.shape
    if batch_size not in sizes:
        return False

    def with_one_more(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = jnp.shape(leaf)
        if shape[:1] == (batch_size,):
            shape = (batch_size + 1, *shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    try:
        result = jax.eval_shape(loss_fn, *jax.tree.map(with_one_more, (outputs, labels)))
    except Exception:
        # It runs with this batch size alone, where two axes happen to have the same size.
        return True
    larger = result[0] if isinstance(result, tuple) else result
    return list(larger.shape[1:]) != sizes
