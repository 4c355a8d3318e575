"""Dropout for Flax linen, and the adapter that makes a linen module a `Network`.

Replace `flax.linen.Dropout` by `jdrop.linen.Dropout` and the rest of a project stays as it is.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze
from jax import Array
from jax.typing import ArrayLike

from jdrop import attention, functional
from jdrop.network import AtDropout, Network, Variables, drops_units, mode_flags


class Dropout(nn.Module):
    """Drops each element of its inputs with probability `rate`; see `jdrop.dropout`.

    The constructor and the call take what those of `flax.linen.Dropout` take, with the same
    meaning. In addition the rate may be given at the call, and may then be traced.

    Masks given and recorded: where the variable collection `masks` holds a `mask` for this layer,
    the layer applies it and draws nothing. The value is one Boolean array, used at every call, or
    a tuple with one for each call of the layer in a pass; each is broadcastable to the inputs. A
    layer applied with `masks` mutable, and none given, draws and records such a tuple (but not
    during `init`). So `module.apply(variables | {"masks": masks}, ...)` replays a pass. With
    `mutable=True`, which makes every collection mutable, masks are among what comes back: leave
    them out of the variables of the next step, or they are replayed for ever. Attention layers
    take no part in it: theirs are drawn.

    Attributes:
        rate: the probability to drop, in [0, 1]; at 1 the output is zeros.
        broadcast_dims: axes along which one decision is shared.
        deterministic: whether to return the inputs as they are; here or at the call.
        rng_collection: the name of the rng stream that keys are made from.

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
        >>> y, drawn = MLP().apply(
        ...     variables, x, train=True, rngs={"dropout": jax.random.key(1)}, mutable=["masks"]
        ... )
        >>> replayed = MLP().apply(variables | drawn, x, train=True)
        >>> bool(jnp.array_equal(y, replayed))
        True
    """

    rate: ArrayLike
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
        """Applies dropout, or returns the inputs as they are.

        Args:
            inputs: float or complex, any shape.
            deterministic: whether to return the inputs as they are; here or in the constructor.
            rng: the key for the mask; made from `rng_collection` if not given.
            rate: instead of the constructor's; may be traced, a scalar or broadcastable to
                `inputs`.
        """
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        rate = functional.check_rate(self.rate if rate is None else rate, allow_one=True)
        if deterministic or functional.is_static(rate, 0):
            return inputs
        if functional.is_static(rate, 1):
            return jnp.zeros_like(inputs)

        assert self.scope is not None  # Flax binds a module before it calls it.
        # Flax counts the calls of a layer here, through every lifted transformation; so do we.
        counters = self.scope.rng_counters
        drawn, used = counters.get("masks drawn", 0), counters.get("masks used", 0)
        if self.has_variable("masks", "mask") and not drawn:
            mask = functional.mask_of_call(self.get_variable("masks", "mask"), used)
            counters["masks used"] = used + 1
            return functional.apply_mask(mask, inputs, rate)

        key = self.make_rng(self.rng_collection) if rng is None else rng
        if self.is_initializing() or not self.is_mutable_collection("masks"):
            return functional.draw_and_apply(key, inputs, rate, self.broadcast_dims)
        mask = functional.draw_mask_like(key, inputs, rate, self.broadcast_dims)
        self.put_variable("masks", "mask", (*self.get_variable("masks", "mask", ()), mask))
        counters["masks drawn"] = drawn + 1
        return functional.apply_mask(mask, inputs, rate)


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """Flax's layer, with the attention of `jdrop.dot_product_attention`.

    Arguments, parameters and calls are those of `flax.linen.MultiHeadDotProductAttention`. Of the
    weights, which Flax holds in whole, and keeps with their masks for the backward pass, only
    blocks are in memory. Each example and head has a mask of its own, where in Flax they share one
    unless `broadcast_dropout=False`. Masks of attention are neither recorded nor replayed.

    Raises:
        ValueError: a rate out of [0, 1); `sow_weights=True` at the call; products of one's own, as
            for quantisation.

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
        functional.check_rate(self.dropout_rate)
        super().__post_init__()


_passes = itertools.count()


def as_network(module: Any, *, at_dropout: AtDropout | None = None) -> Network:
    """What the rest of jdrop needs of a linen module: see `jdrop.network.Network`.

    The module's `__call__` takes the inputs and, if it has modes, flags named `deterministic`,
    `train`, `training` or `is_training`. Variables are linen's collections. Training updates every
    collection but `params` and `masks`, batch statistics for instance. With a key and outside
    training, masks are drawn while batch and spectral normalisation use their running statistics.

    Args:
        module: any linen module whose output is one array.
        at_dropout: `at_dropout(name, inputs, rate)`, called in place of every dropout layer, be it
            of jdrop or Flax, whether the network has a key or not. It gives what the layer then
            gives out: the inputs for a network without dropout, a part of them for a thinned
            network. The name is the layer's path, as in "block/Dropout_0". Attention layers then
            drop nothing.

    Raises:
        TypeError: a class, or something else that is not a linen module.
        ValueError: a call with another argument that is True or False by default; put the module
            into one that fixes it.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> network = as_network(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]))
        >>> variables = network.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> network(variables, jnp.ones((4, 3)), None).shape
        (4, 2)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be an instance of a linen module, got {module!r}; call its class first."
        )
    if at_dropout is None:

        def thin(at_dropout: AtDropout) -> Network:
            return _network(module, partial(_thin, at_dropout))

        return _network(module, None, thin)
    return _network(module, partial(_replace_dropout, at_dropout))


def _network(
    module: nn.Module,
    interceptor: Callable[..., Any] | None,
    thin: Callable[[AtDropout], Network] | None = None,
) -> Network:
    """The network of a module whose methods are called through `interceptor`."""
    mode = partial(mode_flags, type(module).__call__)
    mode(training=False)  # Raises now, not at the first call.

    def rngs(key: Array) -> dict[str, Array]:
        params_key, dropout_key = jax.random.split(key)
        return {"params": params_key, "dropout": dropout_key}

    def call(bound: nn.Module, inputs: Array, **flags: bool) -> Any:
        if interceptor is None:
            return bound(inputs, **flags)
        assert bound.scope is not None
        # `nn.jit` takes these flags for a part of what it compiles. Without a number it would give
        # this pass what it compiled for another, in which `at_dropout` is another or does another.
        bound.scope.flags = freeze({**bound.scope.flags, "pass": next(_passes)})
        with nn.intercept_methods(interceptor):
            return bound(inputs, **flags)

    def init(key: Array, inputs: Array) -> Variables:
        return dict(module.init(rngs(key), inputs, **mode(training=False), method=call))

    def apply(variables: Variables, inputs: Array, key: Array | None) -> Any:
        if key is None:
            return module.apply(variables, inputs, **mode(training=False), method=call)
        with nn.intercept_methods(_use_running_statistics):
            flags = mode(training=True)
            return module.apply(variables, inputs, **flags, rngs=rngs(key), method=call)

    def apply_train(variables: Variables, inputs: Array, key: Array) -> tuple[Array, Variables]:
        mutable = [name for name in variables if name not in ("params", "masks")]
        flags = mode(training=True)
        outputs, updates = module.apply(
            variables, inputs, **flags, rngs=rngs(key), mutable=mutable, method=call
        )
        return outputs, {**variables, **updates}

    return Network(apply, init, apply_train, thin)


def _replace_dropout(
    at_dropout: AtDropout, next_method: Callable[..., Any], args: Any, kwargs: Any, context: Any
) -> Any:
    """Calls `at_dropout` where a dropout layer would be called, and drops nothing in attention."""
    module = context.module
    if context.method_name != "__call__":
        return next_method(*args, **kwargs)
    if isinstance(module, nn.MultiHeadDotProductAttention):
        return _with_attribute(module, "dropout_rate", 0.0, next_method, args, kwargs)
    if not isinstance(module, Dropout | nn.Dropout):
        return next_method(*args, **kwargs)
    return _call_at(at_dropout, module, args, kwargs)


def _thin(
    at_dropout: AtDropout, next_method: Callable[..., Any], args: Any, kwargs: Any, context: Any
) -> Any:
    """Calls `at_dropout` at dropout layers, and lets other layers take weights of fewer units."""
    module = context.module
    if context.method_name != "__call__":
        return next_method(*args, **kwargs)
    if isinstance(module, Dropout | nn.Dropout):
        inputs = _dropout_inputs(args, kwargs)
        given = args[1] if len(args) > 1 else kwargs.get("deterministic")
        is_off = nn.merge_param("deterministic", module.deterministic, given)
        outputs = None
        if not is_off and drops_units(module.broadcast_dims, inputs):
            outputs = _call_at(at_dropout, module, args, kwargs)
        return next_method(*args, **kwargs) if outputs is None else outputs
    kernel = module.variables.get("params", {}).get("kernel")
    if kernel is None:
        return next_method(*args, **kwargs)
    # Flax holds the shape of given weights against these numbers.
    match module:
        case nn.Dense() | nn.Conv() | nn.ConvTranspose(transpose_kernel=False):
            features = kernel.shape[-1]
        case nn.DenseGeneral(features=tuple() | list() as made_for):
            features = kernel.shape[-len(made_for) :]
        case nn.DenseGeneral():
            features = kernel.shape[-1]
        case _:
            return next_method(*args, **kwargs)
    return _with_attribute(module, "features", features, next_method, args, kwargs)


def _call_at(at_dropout: AtDropout, module: Any, args: Any, kwargs: Any) -> Any:
    rate = module.rate if kwargs.get("rate") is None else kwargs["rate"]
    return at_dropout("/".join(module.path), _dropout_inputs(args, kwargs), rate)


def _dropout_inputs(args: Any, kwargs: Any) -> Array:
    inputs: Array = args[0] if args else kwargs["inputs"]
    return inputs


def _with_attribute(
    module: nn.Module, name: str, value: Any, call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Calls a method while an attribute of its frozen module has another value."""
    before = getattr(module, name)
    object.__setattr__(module, name, value)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(module, name, before)


def _use_running_statistics(
    next_method: Callable[..., Any], args: Any, kwargs: Any, context: Any
) -> Any:
    """Makes every normalisation use its running statistics, whatever its flags say."""
    module = context.module
    if context.method_name != "__call__":
        return next_method(*args, **kwargs)
    if isinstance(module, nn.SpectralNorm):
        return next_method(*args, **{**kwargs, "update_stats": False})
    if not isinstance(module, nn.BatchNorm):
        return next_method(*args, **kwargs)
    # Flax wants the flag in one place; the second argument of the call is the flag too.
    kwargs = {**kwargs, "use_running_average": True}
    return _with_attribute(module, "use_running_average", None, next_method, args[:1], kwargs)
