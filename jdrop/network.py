"""What a network is to the rest of jdrop: a function of variables, inputs and a key."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array

Variables = dict[str, Any]
"""Collections of arrays; `params` is trained, `masks` (if any) replayed, the rest is state."""

ApplyFn = Callable[[Variables, Array, Array | None], Array]
"""`apply_fn(variables, inputs, key)` -> outputs, `[batch, class]` for a classifier.

With a key the network draws masks; `key=None` is the deterministic network. The mode is the
presence of the key, so no flag can disagree with it.
"""


@dataclass(frozen=True)
class Network:
    """An `apply_fn` that also knows how to be initialised and trained.

    Make one with `jdrop.linen.as_network` or `jdrop.nnx.as_network`, or from any function with
    `Network(apply_fn)`. Calling it calls `apply_fn`, so it goes wherever an `apply_fn` goes.

    Attributes:
        apply_fn: outputs from variables, inputs and a key or None; it changes no state, and batch
            statistics stay as they are even when masks are drawn.
        init_fn: variables from a key and example inputs.
        train_fn: outputs and updated variables from variables, inputs and a key: the network in
            training, batch statistics included. Without it, `apply_fn` is the network in training.

    Example:
        >>> import jax, jax.numpy as jnp, jdrop
        >>> def apply_fn(variables, inputs, key):
        ...     x = inputs if key is None else jdrop.dropout(key, inputs, 0.2)
        ...     return x @ variables["params"]
        >>> network = Network(apply_fn)
        >>> network({"params": jnp.ones((3, 2))}, jnp.ones((1, 3)), None)
        Array([[3., 3.]], dtype=float32)
    """

    apply_fn: ApplyFn
    init_fn: Callable[[Array, Array], Variables] | None = None
    train_fn: Callable[[Variables, Array, Array], tuple[Array, Variables]] | None = None

    def __call__(self, variables: Variables, inputs: Array, key: Array | None) -> Array:
        """The outputs of `apply_fn`."""
        return self.apply_fn(variables, inputs, key)

    def init(self, key: Array, inputs: Array) -> Variables:
        """Variables for inputs like these; the key is consumed."""
        if self.init_fn is None:
            raise ValueError(
                "this network has no init_fn; give one, `Network(apply_fn, init_fn)`, "
                "or make the variables yourself."
            )
        return self.init_fn(key, inputs)

    def apply_train(
        self, variables: Variables, inputs: Array, key: Array
    ) -> tuple[Array, Variables]:
        """Outputs in training and the variables with their state updated."""
        if self.train_fn is None:
            return self.apply_fn(variables, inputs, key), variables
        return self.train_fn(variables, inputs, key)
