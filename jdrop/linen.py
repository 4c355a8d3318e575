"""Dropout for Flax linen, and the adapter that makes a linen module a `Network`.

Replace `flax.linen.Dropout` by `jdrop.linen.Dropout` and the rest of a project stays as it is.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze
from flax.errors import InvalidRngError, ModifyScopeVariableError
from jax import Array
from jax.typing import ArrayLike

from jdrop import attention, functional
from jdrop.calls import (
    CallFn,
    ModeCheck,
    bind_call,
    call_parameters,
    mode_attributes,
    output_chooser,
)
from jdrop.network import DropoutSite, Network, ReplaceFn, Variables

__all__ = ["Dropout", "MultiHeadDotProductAttention", "as_network"]


class Dropout(nn.Module):
    """Drops each element of its inputs with probability `rate`; see `jdrop.dropout`.

    The constructor and the call take the arguments of `flax.linen.Dropout`, with the same meaning.
    In addition the call takes a rate, which may be traced.

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
    return _Adapter(module, bound, output_chooser(outputs), ModeCheck(bound, has_dropout)).network(
        None, True
    )


@dataclass(frozen=True, eq=False)
class _Adapter:
    """Makes networks of one module.

    Attributes:
        module: the module in no particular mode.
        call: calls the module.
        choose: chooses what predictions are made of.
        check: looks whether the mode reaches the layers.
    """

    module: nn.Module
    call: CallFn
    choose: Callable[[Any], Any]
    check: ModeCheck

    @cached_property
    def modules(self) -> dict[bool, nn.Module]:
        """The module in prediction, False, and in training, True."""
        taken = {p.name for p in call_parameters(type(self.module)) or ()}
        attributes = {
            field.name: getattr(self.module, field.name)
            for field in dataclasses.fields(self.module)
            if field.init and field.name not in ("parent", "name", *taken)
        }
        changed = {train: mode_attributes(attributes, train=train) for train in (False, True)}
        return {
            train: self.module.clone(**changes) if changes else self.module
            for train, changes in changed.items()
        }

    def network(self, replace: ReplaceFn | None, attention_dropout: bool) -> Network:
        """The network, with `replace` called in place of its dropout layers."""

        def method(
            key: Array | None, *, train: bool, running_statistics: bool
        ) -> Callable[[nn.Module, Any], Any]:
            """What `module.apply` runs in place of the module's own call."""

            def run(bound: nn.Module, inputs: Any) -> Any:
                if replace is not None:
                    assert bound.scope is not None
                    # `nn.jit` caches by these flags; a fresh number keeps it from reusing a
                    # program compiled for another replacement.
                    bound.scope.flags = freeze({**bound.scope.flags, "pass": next(_passes)})
                elif not running_statistics:
                    return self.call(bound, inputs, train=train, key=key)
                interceptor = _Interceptor(replace, attention_dropout, running_statistics)
                with nn.intercept_methods(interceptor):
                    return self.call(bound, inputs, train=train, key=key)

            return run

        deterministic = method(None, train=False, running_statistics=False)

        def init(key: Array, inputs: Any) -> Variables:
            rngs, _ = self._keys(key)
            variables = dict(self.modules[False].init(rngs, inputs, method=deterministic))
            self._check_training(variables, inputs, key)
            return variables

        def predict(variables: Variables, inputs: Any) -> Any:
            try:
                return self.modules[False].apply(variables, inputs, method=deterministic)
            except (InvalidRngError, ModifyScopeVariableError) as error:
                error.add_note(
                    "The network has no key, so it must neither draw masks nor change batch "
                    f"statistics. {self.check.explain(inputs)}"
                )
                raise

        def apply(variables: Variables, inputs: Any, key: Array | None) -> Any:
            if key is None:
                return self.choose(predict(variables, inputs))
            if replace is None:
                self._check_training(variables, inputs, key)
            rngs, call_key = self._keys(key)
            sample = method(call_key, train=True, running_statistics=True)
            return self.choose(
                self.modules[True].apply(variables, inputs, rngs=rngs, method=sample)
            )

        def apply_train(variables: Variables, inputs: Any, key: Array) -> tuple[Any, Variables]:
            if replace is None:
                self._check_training(variables, inputs, key)
            rngs, call_key = self._keys(key)
            mutable = [name for name in variables if name != "params"]
            train = method(call_key, train=True, running_statistics=False)
            outputs, updates = self.modules[True].apply(
                variables, inputs, rngs=rngs, mutable=mutable, method=train
            )
            return outputs, {**variables, **updates}

        return Network(apply, init, apply_train, self.network)

    def _keys(self, key: Array) -> tuple[dict[str, Array], Array | None]:
        """The keys of the rng streams, and the key that the call gets."""
        params_key, dropout_key = jax.random.split(key)
        # Not a third child, so that masks do not depend on whether the call takes a key.
        call_key = jax.random.fold_in(key, 2) if self.check.needs_key else None
        return {"params": params_key, "dropout": dropout_key}, call_key

    def _check_training(self, variables: Variables, inputs: Any, key: Array) -> None:
        if not self.check.is_done("training"):
            network = self.network(None, True)
            self.check.training(network, _batch_stats, variables, inputs, key)


def _batch_stats(variables: Variables) -> Any:
    return variables.get("batch_stats", {})


_passes = itertools.count()


@dataclass(frozen=True)
class _Interceptor:
    """Stands between a module and the calls of its layers, in ONE pass.

    Attributes:
        replace: called in place of dropout layers; other layers then accept fewer units.
        attention_dropout: whether attention layers drop weights.
        running_statistics: whether batch and spectral normalisation use their running statistics,
            whatever their flags say.
        num_calls: how often each dropout layer was called in the pass so far.
        running: paths of the dropout layers whose own call is running. A call inside it comes from
            a subclass that calls its base class, and is no second call of the layer.
    """

    replace: ReplaceFn | None
    attention_dropout: bool
    running_statistics: bool
    num_calls: Counter[str] = field(default_factory=Counter)
    running: set[tuple[str, ...]] = field(default_factory=set)

    def __call__(
        self, next_method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        """Calls the layer itself, `next_method`, or what stands in its place."""
        layer = context.module
        if context.method_name != "__call__":
            return next_method(*args, **kwargs)
        changed: dict[str, Any] = {}
        match layer:
            case Dropout() | nn.Dropout() if self.replace is not None:
                return self._call_dropout(layer, next_method, args, kwargs)
            case nn.MultiHeadDotProductAttention() if not self.attention_dropout:
                changed = {"dropout_rate": 0.0}
            case nn.SpectralNorm() if self.running_statistics:
                return next_method(*args, **{**kwargs, "update_stats": False})
            case nn.BatchNorm() if self.running_statistics:
                # Flax accepts the flag either in the module or in the call, where it is the second
                # argument.
                changed = {"use_running_average": None}
                args, kwargs = args[:1], {**kwargs, "use_running_average": True}
            case _ if self.replace is not None:
                changed = _features_of_given_weights(layer)
        return _call_with_attributes(layer, changed, next_method, args, kwargs)

    def _call_dropout(
        self, layer: Any, own_call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Calls `replace` in place of a dropout layer, and the layer if `replace` returns None."""
        assert self.replace is not None
        if layer.path in self.running:
            return own_call(*args, **kwargs)
        outputs = self.replace(*self._site_and_inputs(layer, *args, **kwargs))
        if outputs is not None:
            return outputs
        self.running.add(layer.path)
        try:
            return own_call(*args, **kwargs)
        finally:
            self.running.remove(layer.path)

    def _site_and_inputs(
        self,
        layer: Any,
        inputs: Array,
        deterministic: bool | None = None,
        rng: Array | None = None,
        *,
        rate: ArrayLike | None = None,
    ) -> tuple[DropoutSite, Array]:
        name = "/".join(layer.path)
        index = self.num_calls[name]
        self.num_calls[name] += 1

        def make_key() -> Array:
            return layer.make_rng(layer.rng_collection) if rng is None else rng

        site = DropoutSite(
            name=name,
            index=index,
            shape=inputs.shape,
            rate=layer.rate if rate is None else rate,
            broadcast_dims=tuple(layer.broadcast_dims),
            deterministic=nn.merge_param("deterministic", layer.deterministic, deterministic),
            make_key=make_key,
        )
        return site, inputs


def _features_of_given_weights(layer: nn.Module) -> dict[str, Any]:
    """The attribute `features` that fits the weights given, against which Flax checks them."""
    kernel = layer.variables.get("params", {}).get("kernel")
    if kernel is None:
        return {}
    match layer:
        case nn.DenseGeneral(features=tuple() | list() as features):
            return {"features": kernel.shape[-len(features) :]}
        case nn.Dense() | nn.DenseGeneral() | nn.Conv() | nn.ConvTranspose(transpose_kernel=False):
            return {"features": kernel.shape[-1]}
        case _:
            return {}


def _call_with_attributes(
    layer: nn.Module, changed: dict[str, Any], call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Calls a method while attributes of its frozen module have other values."""
    before = {name: getattr(layer, name) for name in changed}
    try:
        for name, value in changed.items():
            object.__setattr__(layer, name, value)
        return call(*args, **kwargs)
    finally:
        for name, value in before.items():
            object.__setattr__(layer, name, value)
