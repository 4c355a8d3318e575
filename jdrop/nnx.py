"""Dropout for Flax nnx, and the adapter that makes an nnx module a `Network`.

Replace `flax.nnx.Dropout` by `jdrop.nnx.Dropout` and the rest of a project stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jdrop import attention, functional, stochastic_depth
from jdrop.calls import CallFn, ModeCheck, bind_call, output_chooser
from jdrop.network import AttentionDropout, Network, ReplaceFn, Variables, site_lister
from jdrop.nnx_network import filled, intercept, make_key, set_mode, stream_tags, unseeded
from jdrop.nnx_swap import swap_layers
from jdrop.swapping import RateChoice, Swap

__all__ = ["DropPath", "Dropout", "MultiHeadAttention", "as_network", "swap"]


class Dropout(nnx.Dropout):
    """Drops each element of its inputs with probability `rate`; see `jdrop.dropout`.

    The constructor and the call take the arguments of `flax.nnx.Dropout`, with the same meaning.
    In addition the call takes a rate, which may be traced. The layer is a `flax.nnx.Dropout`, so
    whatever selects layers by that class selects it too.

    Args:
        rate: the probability to drop, in [0, 1]; at 1 the output is zeros.
        broadcast_dims: the axes along which elements share one decision.
        deterministic: whether to return the inputs unchanged; the call's value takes precedence.
        rng_collection: the name of the rng stream that makes the keys.
        rngs: the source of keys; the layer forks it and keeps its own stream.

    Raises:
        ValueError: a rate out of range; no `deterministic` or no `rngs` in either place.
        TypeError: `rngs` of another type.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jdrop.nnx
        >>> layer = jdrop.nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.ones((2, 3)))
        >>> bool(jnp.all((y == 0) | (y == 2)))
        True
    """

    def __init__(
        self,
        rate: float | int,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        functional.check_rate(rate, allow_one=True)
        super().__init__(
            rate,
            broadcast_dims=broadcast_dims,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
        )

    def __call__(
        self,
        inputs: Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        rate: ArrayLike | None = None,
    ) -> Array:
        """Applies dropout, or returns the inputs unchanged.

        Args:
            inputs: float or complex, any shape.
            deterministic: takes precedence over the constructor's.
            rngs: a key or a source of keys; takes precedence over the constructor's.
            rate: instead of the constructor's; may be traced, a scalar or broadcastable to
                `inputs`.
        """
        deterministic = self._is_off(deterministic)
        rate = functional.check_rate(self.rate if rate is None else rate, allow_one=True)
        if deterministic or functional.is_number(rate, 0):
            return inputs
        if functional.is_number(rate, 1):
            return jnp.zeros_like(inputs)
        key = make_key(self, rngs)
        return functional.dropout(key, inputs, rate, broadcast_dims=self.broadcast_dims)

    def _is_off(self, deterministic: bool | None) -> bool:
        """Whether the layer is off, at a call with this `deterministic`."""
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            raise ValueError(
                "deterministic was given nowhere; pass it to the constructor, "
                "`Dropout(..., deterministic=True)`, to the call, `dropout(x, deterministic=True)`,"
                " or to a view of the model, `nnx.view(model, deterministic=True)`."
            )
        return deterministic


class DropPath(Dropout):
    """Drops the output of a branch, for each sample or for the batch; see `jdrop.drop_path`.

    Called as `layer(branch(x))`, it is dropout of whole samples. Called as `layer(x,
    branch=branch)`, it does not compute the branch of dropped samples; see `jdrop.drop_branch`.

    Args:
        rate: the probability to drop, in [0, 1]; at 1 the output is zeros.
        per_sample: whether each sample has its own decision, or the batch has one.
        deterministic: whether to drop nothing; the call's value takes precedence.
        rng_collection: the name of the rng stream that makes the keys.
        rngs: the source of keys; the layer forks it and keeps its own stream.

    Raises:
        ValueError: a rate out of range; no `deterministic` or no `rngs` in either place; a branch
            without `per_sample`.
        TypeError: `rngs` of another type.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jdrop.nnx
        >>> rngs, x = nnx.Rngs(0), jnp.ones((8, 3))
        >>> branch, drop = nnx.Linear(3, 3, rngs=rngs), jdrop.nnx.DropPath(0.25, rngs=rngs)
        >>> y = x + drop(branch(x))
        >>> y = x + drop(x, branch=branch)  # computes the branch of 6 samples
        >>> int((y == x).all(1).sum())
        2
    """

    def __init__(
        self,
        rate: float | int,
        *,
        per_sample: bool = True,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.per_sample = per_sample
        # The axes depend on the inputs.
        self.broadcast_dims: Any = None

    def __call__(
        self,
        inputs: Any,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        rate: ArrayLike | None = None,
        branch: Callable[[Any], Array] | None = None,
    ) -> Array:
        """Drops samples of the inputs, or of `branch(inputs)`.

        Args:
            inputs: float or complex, `[batch, ...]`; with a branch also a pytree of any arrays.
            deterministic: takes precedence over the constructor's.
            rngs: a key or a source of keys; takes precedence over the constructor's.
            rate: instead of the constructor's; without a branch it may be traced.
            branch: a module, or a function that calls modules; not computed for dropped samples.
                Where masks are recorded or replaced, it is computed for all samples.
        """
        stochastic_depth.check_branch(branch, self.per_sample)
        rate = functional.check_rate(self.rate if rate is None else rate, allow_one=True)
        if self._is_off(deterministic) or functional.is_number(rate, 0):
            return inputs if branch is None else branch(inputs)
        if functional.is_number(rate, 1):
            return jnp.zeros_like(inputs if branch is None else branch(inputs))
        key = make_key(self, rngs)
        if branch is not None:
            return stochastic_depth.drop_branch(key, branch, inputs, rate)
        return stochastic_depth.drop_path(key, inputs, rate, per_sample=self.per_sample)


class MultiHeadAttention(nnx.MultiHeadAttention):
    """Flax's layer, with the attention of `jdrop.dot_product_attention`.

    Arguments, parameters and calls are those of `flax.nnx.MultiHeadAttention`. Only blocks of the
    attention weights are in memory; Flax holds all of them, and keeps them and their masks for the
    backward pass. Each example and head has its own mask; in Flax they share one unless
    `broadcast_dropout=False`.

    Raises:
        ValueError: a rate out of [0, 1); `sow_weights=True` at the call.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jdrop.nnx
        >>> layer = jdrop.nnx.MultiHeadAttention(
        ...     num_heads=2, in_features=8, dropout_rate=0.1, decode=False, rngs=nnx.Rngs(0)
        ... )
        >>> layer(jnp.ones((3, 10, 8)), deterministic=False).shape
        (3, 10, 8)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *args: Any,
        broadcast_dropout: bool = False,
        attention_fn: Callable[..., Array] = attention.for_flax,
        dropout_rate: float | int = 0.0,
        **kwargs: Any,
    ) -> None:
        functional.check_rate(dropout_rate, name="dropout_rate")
        super().__init__(
            num_heads,
            in_features,
            *args,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
            attention_fn=attention_fn,
            **kwargs,
        )


def swap(
    model: Any,
    *,
    rate: RateChoice | None = None,
    after: Mapping[str, float] | None = None,
    rngs: nnx.Rngs | None = None,
) -> Any:
    """Puts jdrop's layers in place of Flax's, throughout a model that was not written for it.

    Dropout layers and attention layers of Flax become jdrop's. An attention layer keeps its
    `broadcast_dropout`; one with an `attention_fn` of its own keeps that function, and so does a
    subclass of a layer keep its call. Parameters and their paths stay.

    Args:
        model: any nnx module; it is changed in place.
        rate: the rate of all dropout layers, or `f(name, rate)` -> the new rate, by the path of the
            layer and its old rate. The rate 0 removes the dropout. It holds for attention layers
            too, unless their rate is 0.
        after: adds dropout after layers: the rate by the path of the layer, such as
            `{"blocks/0/linear": 0.5}`. Each becomes a layer `added_dropout` of that layer.
        rngs: the source of keys for the layers that are added.

    Returns:
        The model.

    Raises:
        TypeError: anything that is not an nnx module.
        ValueError: a rate out of range; a name in `after` that is no layer; `after` without `rngs`.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jdrop
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
        >>> model = swap(model, rate=0.25, after={"layers/0": 0.1}, rngs=rngs)
        >>> for site in jdrop.audit(model, jnp.ones((2, 3))).sites:
        ...     print(site.name, site.kind, site.rate)
        layers/0/added_dropout jdrop 0.1
        layers/1 jdrop 0.25
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx module, got {type(model).__name__}; make it first.")
    if after and rngs is None:
        raise ValueError(
            "rngs must be given with after: the layers that are added need keys; give "
            "`rngs=nnx.Rngs(0)`."
        )
    layers = {nnx.Dropout: Dropout, nnx.MultiHeadAttention: MultiHeadAttention}
    swap_layers(model, Swap(rate, dict(after or {})), layers, partial(Dropout, rngs=rngs))
    return model


def as_network(
    make_module: Any,
    call: CallFn | None = None,
    *,
    outputs: Callable[[Any], Any] | str | int | None = None,
    has_dropout: bool = True,
) -> Network:
    """Makes a `jdrop.network.Network` from an nnx module.

    The variables are `params` (the `nnx.Param`s of the module) and `state` (the rest except rngs,
    for instance batch statistics); each is nested dictionaries of arrays. Training updates `state`.
    A pass that draws masks outside training uses the running averages of batch normalisation. The
    names of the dropout sites are the paths of the layers, for instance "block/dropout".

    The module's call gets the mode, if it has one, by arguments named `deterministic`, `train`,
    `training`, `is_training` or `enable_dropout`. So do attributes with these names, of all modules
    inside and of a dataclass among their attributes. As in Flax, the attributes `deterministic` and
    `use_running_average` set the modes of the layers. An argument `rngs`, `key` or `rng` of the
    call gets the key. A dictionary whose keys are names of arguments gives inputs by name. A tuple
    gives them by position, if the call takes several. Other inputs are the first argument.

    Training is traced once, by `init` or at the first pass. If it draws no mask, or leaves all
    batch statistics as they are, an error shows the `call` to write. So does a prediction that
    draws masks, or uses the statistics of its batch.

    Args:
        make_module: makes the module from an argument named `rngs`: its class, or a function.
        call: `call(module, inputs, *, train, key)` returns the outputs. In prediction `train` is
            False and `key` None.
        outputs: what predictions are made of, among the outputs of the call: a function of them, a
            key or an index. By default all of them. A loss sees all of them.
        has_dropout: whether training must draw masks.

    Raises:
        TypeError: a module in place of the function that makes it.
        ValueError: a call with another argument whose default is True or False; at the first use, a
            module that its mode does not reach.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.linear, self.dropout = nnx.Linear(3, 2, rngs=rngs), nnx.Dropout(0.5)
        ...     def __call__(self, x, rngs=None):
        ...         return self.linear(self.dropout(x, rngs=rngs))
        >>> network = as_network(Net)
        >>> variables = network.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> network(variables, jnp.ones((4, 3)), None).shape
        (4, 2)
    """
    if isinstance(make_module, nnx.Module) or not callable(make_module):
        raise TypeError(
            f"make_module must be a function of rngs that makes the module, got "
            f"{type(make_module).__name__}; give the class, or `lambda rngs: MyModule(rngs=rngs)`."
        )
    abstract_model = nnx.eval_shape(lambda: make_module(rngs=nnx.Rngs(0)))
    bound = bind_call(type(abstract_model), nnx.Rngs) if call is None else call
    choose, check = output_chooser(outputs), ModeCheck(bound, has_dropout)
    graphdef, *states = nnx.split(abstract_model, nnx.Param, nnx.RngState, ...)
    abstract_params, abstract_rngs, abstract_state = states

    def merge(variables: Variables, key: Array | None, *, train: bool, updating: bool) -> Any:
        model = nnx.merge(
            graphdef,
            filled(abstract_params, variables["params"]),
            jax.tree.map(unseeded, abstract_rngs),
            filled(abstract_state, variables["state"]),
        )
        set_mode(model, train=train, updating=updating)
        if key is not None:
            tags = stream_tags(model)
            keys = dict(zip(tags, jax.random.split(key, len(tags)), strict=True))
            nnx.reseed(model, policy="match_shape", **keys)
        return model

    def run(model: nnx.Module, inputs: Any, key: Array | None) -> Any:
        """The outputs of a pass; it draws masks if it has a key."""
        if key is None:
            return bound(model, inputs, train=False, key=None)
        # Not a further child, so that masks do not depend on whether the call takes a key.
        num_streams = len(stream_tags(model))
        call_key = jax.random.fold_in(key, num_streams) if check.needs_key else None
        return bound(model, inputs, train=True, key=call_key)

    def state_after(model: nnx.Module) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(model, nnx.Param, nnx.RngState, ...)[-1])

    def batch_stats(variables: Variables) -> list[Any]:
        state = filled(abstract_state, variables["state"])
        return jax.tree.leaves(nnx.filter_state(state, nnx.BatchStat))

    def check_training(variables: Variables, inputs: Any, key: Array) -> None:
        if not check.is_done("training"):
            check.training(network(None, True), batch_stats, variables, inputs, key)

    def check_prediction(variables: Variables, inputs: Any) -> None:
        def run_listing(variables: Variables, inputs: Any, key: Array, sites: Any) -> Any:
            model = merge(variables, key, train=False, updating=False)
            intercept(model, site_lister(sites), True, running_averages=True)
            return run(model, inputs, None), batch_stats({"state": state_after(model)})

        if not check.is_done("prediction"):
            check.prediction(run_listing, variables, inputs, jax.random.key(0))

    def network(replace: ReplaceFn | None, attention_dropout: AttentionDropout) -> Network:
        """The network with `replace` called in place of its dropout layers."""

        def init(key: Array, inputs: Any) -> Variables:
            model = make_module(rngs=nnx.Rngs(key))
            params, _, state = nnx.state(model, nnx.Param, nnx.RngState, ...)
            variables = {"params": nnx.to_pure_dict(params), "state": nnx.to_pure_dict(state)}
            if replace is None:
                check_training(variables, inputs, key)
            return variables

        def apply(variables: Variables, inputs: Any, key: Array | None) -> Any:
            if replace is None:
                if key is None:
                    check_prediction(variables, inputs)
                else:
                    check_training(variables, inputs, key)
            model = merge(variables, key, train=key is not None, updating=False)
            intercept(model, replace, attention_dropout, running_averages=True)
            return choose(run(model, inputs, key))

        def apply_train(variables: Variables, inputs: Any, key: Array) -> tuple[Any, Variables]:
            if replace is None:
                check_training(variables, inputs, key)
            model = merge(variables, key, train=True, updating=True)
            intercept(model, replace, attention_dropout, running_averages=False)
            outputs = run(model, inputs, key)
            return outputs, {**variables, "state": state_after(model)}

        return Network(apply, init, apply_train, network, choose_fn=choose)

    return network(None, True)
