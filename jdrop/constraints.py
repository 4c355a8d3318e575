"""Constraints on weights, as optax transformations that come last in an optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array


def max_norm(limit: float) -> optax.GradientTransformation:
    r"""Keeps the norm of the weights into each unit at most `limit`, after each update.

    $$w \leftarrow w \cdot \min\left(1, \frac{c}{\lVert w \rVert_2}\right)$$

    where $w$ are all weights into one unit: all axes of a kernel but its last. This is right for
    the kernels of dense layers and convolutions in Flax. Other layers have other axes, such as
    embeddings and the heads of attention: leave them out with `optax.masked`. Biases and other
    parameters with fewer than two axes are free. The transformation comes last in `optax.chain`,
    since it changes the update so that the new weights lie within the limit.
    `optax.multi_transform` gives layers limits of their own.

    Args:
        limit: $c$, above 0, in the unit of the weights. Usual are 3 and 4.

    Returns:
        An optax transformation; its update needs the parameters.

    Raises:
        ValueError: a limit that is not above 0; in an update, no parameters.

    Example:
        >>> optimizer = optax.chain(optax.sgd(0.1), max_norm(1.0))
        >>> params = {"kernel": jnp.array([[3.0, 0.1], [4.0, 0.2]]), "bias": jnp.array([5.0, 5.0])}
        >>> grads = jax.tree.map(jnp.zeros_like, params)
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].round(3)
        Array([[0.6, 0.1],
               [0.8, 0.2]], dtype=float32)

    Reference:
        Srebro and Shraibman 2005, doi:10.1007/11503415_37; Srivastava et al. 2014, JMLR 15:1929,
        section 5.1.
    """
    if not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit}; 3 or 4 is usual.")

    def init_fn(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update_fn(
        updates: Any, state: optax.EmptyState, params: Any = None
    ) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError(
                "max_norm needs the parameters; give them to `update(grads, state, params)`."
            )

        def constrained(update: Array, param: Array) -> Array:
            if param.ndim < 2:
                return update
            new = param + update
            norm = jnp.sqrt(jnp.sum(new**2, range(param.ndim - 1), keepdims=True))
            return new * jnp.minimum(1, limit / jnp.where(norm > 0, norm, limit)) - param

        return jax.tree.map(constrained, updates, params), state

    return optax.GradientTransformation(init_fn, update_fn)
