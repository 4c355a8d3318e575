"""Dropout for Flax linen, and the adapter that makes a linen module a `Network`.

Replace `flax.linen.Dropout` by `jdrop.linen.Dropout` and the rest of a project stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jdrop import attention, functional, stochastic_depth
from jdrop.calls import CallFn, ModeCheck, bind_call, output_chooser
from jdrop.linen_network import LinenAdapter
from jdrop.linen_swap import LinenSwap, swapped_module
from jdrop.network import Network
from jdrop.swapping import RateChoice

__all__ = [
    "DropPath",
    "Dropout",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "SelfAttention",
    "as_network",
    "swap",
]


class Dropout(nn.Dropout):
    """Drops each element of its inputs with probability `rate`; see `jdrop.dropout`.

    The constructor and the call take the arguments of `flax.linen.Dropout`, with the same meaning.
    In addition the call takes a rate, which may be traced. The layer is a `flax.linen.Dropout`, so
    whatever selects layers by that class selects it too.

    Attributes:
        rate: the probability to drop, in [0, 1]; at 1 the output is zeros.
        broadcast_dims: the axes along which elements share one decision.
        deterministic: whether to return the inputs unchanged; here or at the call.
        rng_collection: the name of the rng stream that makes the keys.

    Raises:
        ValueError: a rate out of range; `deterministic` given in both places or in neither.
        flax.errors.InvalidRngError: no rng for `rng_collection` and no `rng` at the call.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jdrop.linen
        >>> class MLP(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.relu(nn.Dense(8)(x))
        ...         x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        ...         return nn.Dense(2)(x)
        >>> x = jnp.ones((4, 3))
        >>> variables = MLP().init(jax.random.key(0), x, train=False)
        >>> MLP().apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)}).shape
        (4, 2)
    """

    rate: ArrayLike  # type: ignore[assignment]
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    def __post_init__(self) -> None:
        """Checks the rate as soon as it is known."""
        functional.check_rate(self.rate, allow_one=True)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        rate: ArrayLike | None = None,
    ) -> Array:
        """Applies dropout, or returns the inputs unchanged.

        Args:
            inputs: float or complex, any shape.
            deterministic: whether to return the inputs unchanged; here or in the constructor.
            rng: the key for the mask; by default made from `rng_collection`.
            rate: instead of the constructor's; may be traced, a scalar or broadcastable to
                `inputs`.
        """
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        rate = functional.check_rate(self.rate if rate is None else rate, allow_one=True)
        if deterministic or functional.is_number(rate, 0):
            return inputs
        if functional.is_number(rate, 1):
            return jnp.zeros_like(inputs)
        key = self.make_rng(self.rng_collection) if rng is None else rng
        return functional.dropout(key, inputs, rate, broadcast_dims=self.broadcast_dims)


class DropPath(Dropout):
    """Drops the output of a branch, for each sample or for the batch; see `jdrop.drop_path`.

    Called as `layer(branch(x))`, it is dropout of whole samples. Called as `layer(x,
    branch=branch)`, it does not compute the branch of dropped samples; see `jdrop.drop_branch`.

    Attributes:
        rate: the probability to drop, in [0, 1]; at 1 the output is zeros.
        deterministic: whether to drop nothing; here or at the call.
        rng_collection: the name of the rng stream that makes the keys.
        per_sample: whether each sample has its own decision, or the batch has one.

    Raises:
        ValueError: a rate out of range; `deterministic` given in both places or in neither; a
            branch without `per_sample`.
        flax.errors.InvalidRngError: no rng for `rng_collection` and no `rng` at the call.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jdrop, jdrop.linen
        >>> class ResNet(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         for rate in jdrop.depth_linear_rates(0.5, num_layers=3):
        ...             branch = nn.Sequential([nn.LayerNorm(), nn.Dense(3), nn.relu])
        ...             x = x + jdrop.linen.DropPath(rate, deterministic=not train)(branch(x))
        ...         return x
        >>> x = jnp.ones((4, 3))
        >>> variables = ResNet().init(jax.random.key(0), x, train=False)
        >>> ResNet().apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)}).shape
        (4, 3)
    """

    # The axes depend on the inputs, so nobody gives them.
    broadcast_dims: Any = field(default=None, init=False, repr=False)
    per_sample: bool = True

    @nn.compact
    def __call__(
        self,
        inputs: Any,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        rate: ArrayLike | None = None,
        branch: Callable[[Any], Array] | None = None,
    ) -> Array:
        """Drops samples of the inputs, or of `branch(inputs)`.

        Args:
            inputs: float or complex, `[batch, ...]`; with a branch also a pytree of any arrays.
            deterministic: whether to drop nothing; here or in the constructor.
            rng: the key for the mask; by default made from `rng_collection`.
            rate: instead of the constructor's; without a branch it may be traced.
            branch: a module, or a function that calls modules; not computed for dropped samples.
                Where masks are recorded or replaced, it is computed for all samples.
        """
        stochastic_depth.check_branch(branch, self.per_sample)
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        rate = functional.check_rate(self.rate if rate is None else rate, allow_one=True)
        if deterministic or functional.is_number(rate, 0):
            return inputs if branch is None else branch(inputs)
        if functional.is_number(rate, 1):
            return jnp.zeros_like(inputs if branch is None else branch(inputs))
        key = self.make_rng(self.rng_collection) if rng is None else rng
        if branch is not None:
            return stochastic_depth.drop_branch(key, branch, inputs, rate)
        return stochastic_depth.drop_path(key, inputs, rate, per_sample=self.per_sample)


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """Flax's layer, with the attention of `jdrop.dot_product_attention`.

    Arguments, parameters and calls are those of `flax.linen.MultiHeadDotProductAttention`. Only
    blocks of the attention weights are in memory; Flax holds all of them, and keeps them and their
    masks for the backward pass. Each example and head has its own mask; in Flax they share one
    unless `broadcast_dropout=False`.

    Raises:
        ValueError: a rate out of [0, 1); `sow_weights=True` at the call; custom products, as for
            quantisation.

    Example:
        >>> import jax, jax.numpy as jnp, jdrop.linen
        >>> layer = jdrop.linen.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.1)
        >>> x = jnp.ones((3, 10, 8))
        >>> variables = layer.init(jax.random.key(0), x, deterministic=True)
        >>> rngs = {"dropout": jax.random.key(1)}
        >>> layer.apply(variables, x, deterministic=False, rngs=rngs).shape
        (3, 10, 8)
    """

    broadcast_dropout: bool = False
    attention_fn: Callable[..., Array] = attention.for_flax

    def __post_init__(self) -> None:
        functional.check_rate(self.dropout_rate, name="dropout_rate")
        super().__post_init__()


class MultiHeadAttention(MultiHeadDotProductAttention, nn.MultiHeadAttention):
    """`MultiHeadDotProductAttention` by the other name that it has in Flax.

    The name of the class becomes the name of the layer, so it is part of the paths of parameters
    and of the keys of masks.

    Raises:
        ValueError: as `MultiHeadDotProductAttention`.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jdrop.linen
        >>> class Block(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return jdrop.linen.MultiHeadAttention(num_heads=2)(x)
        >>> list(Block().init(jax.random.key(0), jnp.ones((3, 10, 8)))["params"])
        ['MultiHeadAttention_0']
    """


class SelfAttention(MultiHeadDotProductAttention, nn.SelfAttention):
    """`MultiHeadDotProductAttention` of the inputs with themselves.

    Arguments, parameters and calls are those of `flax.linen.SelfAttention`. Flax calls the layer
    deprecated, and so does this one: each call warns.

    Raises:
        ValueError: as `MultiHeadDotProductAttention`.

    Example:
        >>> import warnings, jax, jax.numpy as jnp, jdrop.linen
        >>> layer, x = jdrop.linen.SelfAttention(num_heads=2), jnp.ones((3, 10, 8))
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", DeprecationWarning)
        ...     outputs, variables = layer.init_with_output(jax.random.key(0), x)
        >>> outputs.shape
        (3, 10, 8)
    """


def swap(
    module: Any,
    *,
    rate: RateChoice | None = None,
    after: Mapping[str, float] | None = None,
) -> Any:
    """Puts jdrop's layers in place of Flax's, throughout a module that was not written for it.

    Dropout layers and attention layers of Flax become jdrop's in every pass of the module. An
    attention layer keeps its `broadcast_dropout`; one with an `attention_fn` of its own keeps that
    function, and so does a subclass of a layer keep its call. Parameters and their names stay.

    Args:
        module: any linen module, made outside of other modules and not bound to variables.
        rate: the rate of all dropout layers, or `f(name, rate)` -> the new rate, by the path of the
            layer and its old rate. The rate 0 removes the dropout. It holds for attention layers
            too, unless their rate is 0.
        after: adds dropout after layers: the rate by the path of the layer, such as
            `{"block/Dense_0": 0.5}`. It is on wherever the pass has the rng stream "dropout",
            except in initialisation.

    Returns:
        A new module of a subclass of the class of `module`, with the same attributes.

    Raises:
        TypeError: a class, or anything else that is not a linen module.
        ValueError: a rate out of range; a module inside another one; at the first pass, a name in
            `after` that is no layer.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jdrop
        >>> module = nn.Sequential([nn.Dense(4), nn.Dropout(0.5, deterministic=False)])
        >>> swapped = swap(module, rate=0.25, after={"layers_0": 0.1})
        >>> for site in jdrop.audit(swapped, jnp.ones((2, 3))).sites:
        ...     print(site.name, site.kind, site.rate)
        layers_0/added_dropout jdrop 0.1
        layers_1 jdrop 0.25
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be an instance of a linen module, got {module!r}; call its class first."
        )
    if module.parent is not None:
        raise ValueError(
            f"module must belong to no other module, got one inside "
            f"{type(module.parent).__name__}; swap the outermost module."
        )
    layers = {
        nn.Dropout: Dropout,
        nn.MultiHeadAttention: MultiHeadAttention,
        nn.MultiHeadDotProductAttention: MultiHeadDotProductAttention,
        nn.SelfAttention: SelfAttention,
    }
    return swapped_module(module, LinenSwap(rate, dict(after or {}), layers, Dropout))


def as_network(
    module: Any,
    call: CallFn | None = None,
    *,
    outputs: Callable[[Any], Any] | str | int | None = None,
    has_dropout: bool = True,
) -> Network:
    """Makes a `jdrop.network.Network` from a linen module.

    The variables are linen's collections. Training updates every collection except `params`, for
    instance batch statistics. A pass that draws masks outside training uses the running statistics
    of batch and spectral normalisation. The names of the dropout sites are the paths of the layers,
    for instance "block/Dropout_0".

    The module's call gets the mode, if it has one, by arguments named `deterministic`, `train`,
    `training`, `is_training` or `enable_dropout`. So do attributes of the module, and of a
    dataclass among them, with these names. An argument `key` or `rng` gets the key. A dictionary
    whose keys are names of arguments gives inputs by name. A tuple gives them by position, if the
    call takes several. Other inputs are the first argument.

    Training is traced once, by `init` or at the first pass. If it draws no mask, or leaves all
    batch statistics as they are, an error shows the `call` to write.

    Args:
        module: any linen module.
        call: `call(module, inputs, *, train, key)` returns the outputs. It runs inside
            `module.apply`. In prediction and initialisation `train` is False and `key` None.
        outputs: what predictions are made of, among the outputs of the call: a function of them, a
            key or an index. By default all of them. A loss sees all of them.
        has_dropout: whether training must draw masks.

    Raises:
        TypeError: a class, or anything else that is not a linen module.
        ValueError: a call with another argument whose default is True or False; at the first use, a
            module that its mode does not reach.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> class Encoder(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, tokens, mask, eval_mode=True):
        ...         x = nn.Dropout(0.1)(nn.Embed(9, 4)(tokens), deterministic=eval_mode)
        ...         return {"logits": nn.Dense(2)((x * mask[..., None]).sum(1)), "features": x}
        >>> network = as_network(
        ...     Encoder(),
        ...     call=lambda module, inputs, *, train, key: module(**inputs, eval_mode=not train),
        ...     outputs="logits",
        ... )
        >>> inputs = {"tokens": jnp.ones((3, 5), int), "mask": jnp.ones((3, 5))}
        >>> variables = network.init(jax.random.key(0), inputs)
        >>> network(variables, inputs, None).shape
        (3, 2)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be an instance of a linen module, got {module!r}; call its class first."
        )
    bound = bind_call(type(module)) if call is None else call
    return LinenAdapter(
        module, bound, output_chooser(outputs), ModeCheck(bound, has_dropout)
    ).network(None, True)
