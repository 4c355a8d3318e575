"""What a network is to the rest of jdrop: a function of variables, inputs and a key."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Variables = dict[str, Any]
"""Collections of arrays; `params` is trained, `masks` (if any) replayed, the rest is state."""

ApplyFn = Callable[[Variables, Array, Array | None], Array]
"""`apply_fn(variables, inputs, key)` -> outputs, `[batch, class]` for a classifier.

With a key the network draws masks; `key=None` is the deterministic network. The mode is the
presence of the key, so no flag can disagree with it.
"""


AtDropout = Callable[[str, Array, ArrayLike], Any]
"""`at_dropout(name, inputs, rate)` -> outputs, in place of a dropout layer of that name."""


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
        thin: `thin(at_dropout)` is the network in training with `at_dropout` called in place of the
            dropout layers that drop units, or, where that gives None, with the layer as it is; its
            other layers take weights of fewer units than they were made for. For `jdrop.thinned`.
        thinning: how its training steps thin it; made by `jdrop.thinned.thin`.

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
    thin: Callable[[AtDropout], "Network"] | None = None
    thinning: Any = None

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


def drops_units(broadcast_dims: Iterable[int], inputs: Array) -> bool:
    """Whether a dropout layer decides for units, the last axis, one by one."""
    return {-1, inputs.ndim - 1}.isdisjoint(broadcast_dims)


def check_network(network: Any) -> None:
    """Raises the error that a module deserves which is given in place of a network."""
    of_flax = any(base.__module__.startswith("flax.") for base in type(network).__mro__)
    if of_flax or isinstance(network, type) or not callable(network):
        raise TypeError(
            f"network must be a function apply_fn(variables, inputs, key), got {network!r}; make "
            "one with `jdrop.linen.as_network` or `jdrop.nnx.as_network`."
        )


def network_log_probs(
    key: Array | None, network: ApplyFn, variables: Variables, inputs: Array
) -> Array:
    """Normalised log-probabilities of a network that gives logits.

    At least in float32: 16 bits are digits enough for logits, too few for what is averaged.
    """
    check_network(network)
    logits = network(variables, inputs, key)
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


MODE_FLAGS = {"deterministic": False, "train": True, "training": True, "is_training": True}
"""Arguments of a module's call that set its mode, and their value in training."""


def mode_flags(call: Callable[..., Any], *, training: bool) -> dict[str, Any]:
    """The mode flags among the arguments of a module's call, set.

    Raises:
        ValueError: an argument that is True or False by default and is no known flag, which might
            be one under another name: left as it is, the network would train without dropout.
    """
    flags = {}
    for name, parameter in inspect.signature(call).parameters.items():
        if name in MODE_FLAGS:
            flags[name] = MODE_FLAGS[name] == training
        elif isinstance(parameter.default, bool):
            raise ValueError(
                f"the module's call has an argument {name!r} that is {parameter.default} by "
                f"default; as_network sets {', '.join(MODE_FLAGS)} and cannot tell what it means. "
                "Rename it to one of these, or fix it in a module around yours."
            )
    return flags
