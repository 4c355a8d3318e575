"""Dropout for Flax nnx, and the adapter that makes an nnx module a `Network`.

Replace `flax.nnx.Dropout` by `jdrop.nnx.Dropout` and the rest of a project stays as it is.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import Array
from jax.typing import ArrayLike

from jdrop import attention, functional
from jdrop.network import AtDropout, Network, Variables, drops_units, mode_flags

Module = TypeVar("Module", bound=nnx.Module)


class Mask(nnx.Variable[Any]):
    """The mask of one dropout layer: the counterpart of linen's variable collection `masks`.

    The value is one Boolean array, used at every call, or a tuple with one for each call of the
    layer in a pass.
    """


class Dropout(nnx.Module):
    """Drops each element of its inputs with probability `rate`; see `jdrop.dropout`.

    The constructor and the call take what those of `flax.nnx.Dropout` take, with the same meaning.
    In addition the rate may be given at the call, and may then be traced.

    Masks given and recorded: a layer of the view `nnx.view(model, record_masks=True)` keeps the
    masks that it draws in a variable of type `Mask`, so that `nnx.state(view, Mask)` are the masks
    of a pass; `replay_masks(model, masks)` is a view that applies them and draws nothing.

    Args:
        rate: the probability to drop, in [0, 1]; at 1 the output is zeros.
        broadcast_dims: axes along which one decision is shared.
        deterministic: whether to return the inputs as they are; the call's value goes first.
        rng_collection: the name of the rng stream that keys are made from.
        rngs: where keys come from; the layer forks it and keeps its own stream.

    Raises:
        ValueError: a rate out of range; no `deterministic` or no `rngs` in either place.
        TypeError: `rngs` of another type.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jdrop.nnx
        >>> layer = jdrop.nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 3))
        >>> recorder = nnx.view(layer, record_masks=True)
        >>> y = recorder(x)
        >>> masks = nnx.state(recorder, jdrop.nnx.Mask)
        >>> bool(jnp.array_equal(y, jdrop.nnx.replay_masks(layer, masks)(x)))
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
        self.rate = rate
        self.broadcast_dims = broadcast_dims
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        self.record_masks = False
        self.mask: Mask | None = nnx.data(None)
        if isinstance(rngs, nnx.Rngs):
            self.rngs = rngs[rng_collection].fork()
        elif isinstance(rngs, nnx.RngStream):
            self.rngs = rngs.fork()
        elif rngs is None:
            self.rngs = nnx.data(None)
        else:
            raise TypeError(f"rngs must be a Rngs, a RngStream or None, got {type(rngs).__name__}.")

    def __call__(
        self,
        inputs: Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        rate: ArrayLike | None = None,
    ) -> Array:
        """Applies dropout, or returns the inputs as they are.

        Args:
            inputs: float or complex, any shape.
            deterministic: goes before the constructor's.
            rngs: a key, or where keys come from; goes before the constructor's.
            rate: instead of the constructor's; may be traced, a scalar or broadcastable to
                `inputs`.
        """
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            raise ValueError(
                "deterministic was given nowhere; pass it to the constructor, "
                "`Dropout(..., deterministic=True)`, to the call, `dropout(x, deterministic=True)`,"
                " or to a view of the model, `nnx.view(model, deterministic=True)`."
            )
        rate = functional.check_rate(self.rate if rate is None else rate, allow_one=True)
        if deterministic or functional.is_static(rate, 0):
            return inputs
        if functional.is_static(rate, 1):
            return jnp.zeros_like(inputs)

        if self.mask is not None and not self.record_masks:
            given = self.mask.get_value()
            mask = functional.mask_of_call(given, 0)
            if isinstance(given, tuple) and len(given) > 1:
                # Turned by one at each call, a pass leaves the tuple as it found it.
                self.mask.set_value((*given[1:], given[0]))
            return functional.apply_mask(mask, inputs, rate)

        key = self._make_key(rngs)
        if not self.record_masks:
            return functional.draw_and_apply(key, inputs, rate, self.broadcast_dims)
        mask = functional.draw_mask_like(key, inputs, rate, self.broadcast_dims)
        drawn = () if self.mask is None else self.mask.get_value()
        self.mask = Mask((*drawn, mask))
        return functional.apply_mask(mask, inputs, rate)

    def _make_key(self, rngs: nnx.Rngs | nnx.RngStream | Array | None) -> Array:
        if rngs is None:
            rngs = self.rngs
        if rngs is None:
            raise ValueError(
                "rngs was given nowhere, and deterministic is False; pass it to the constructor, "
                "`Dropout(..., rngs=nnx.Rngs(0))`, or to the call, `dropout(x, rngs=key)`."
            )
        if isinstance(rngs, nnx.Rngs):
            return rngs[self.rng_collection]()
        if isinstance(rngs, nnx.RngStream):
            return rngs()
        if isinstance(rngs, jax.Array):
            return rngs
        raise TypeError(f"rngs must be a Rngs, a RngStream or a key, got {type(rngs).__name__}.")

    def set_view(self, deterministic: bool | None = None, record_masks: bool | None = None) -> None:
        """Called by `nnx.view`.

        Args:
            deterministic: whether to return the inputs as they are.
            record_masks: whether to keep the masks drawn from now on.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if record_masks is not None:
            self.record_masks = record_masks
            self.mask = nnx.data(None)


class MultiHeadAttention(nnx.MultiHeadAttention):
    """Flax's layer, with the attention of `jdrop.dot_product_attention`.

    Arguments, parameters and calls are those of `flax.nnx.MultiHeadAttention`. Of the weights,
    which Flax holds in whole, and keeps with their masks for the backward pass, only blocks are in
    memory. Each example and head has a mask of its own, where in Flax they share one unless
    `broadcast_dropout=False`. Masks of attention are neither recorded nor replayed.

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
        functional.check_rate(dropout_rate)
        super().__init__(
            num_heads,
            in_features,
            *args,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
            attention_fn=attention_fn,
            **kwargs,
        )


def replay_masks(model: Module, masks: Any) -> Module:
    """A view of `model` whose dropout layers apply these masks and draw nothing.

    A layer without a mask in `masks` draws as ever, and so does every attention layer.

    Args:
        model: any nnx module.
        masks: what `nnx.state(recorder, Mask)` gave, or nested dictionaries of the same form.

    Raises:
        ValueError: masks for a path at which the model has no `Dropout`; no masks at all.
    """
    if isinstance(masks, nnx.State):
        masks = nnx.to_pure_dict(masks)
    by_path = flatten_dict(masks)
    if not by_path:
        raise ValueError(
            "masks holds no mask; record some with a pass of `nnx.view(model, record_masks=True)`."
        )
    # What `nnx.view` does, except that it draws a key from each Rngs that the model holds.
    view = nnx.clone(model, variables=False)
    for path, module in nnx.iter_modules(view):
        if isinstance(module, Dropout):
            module.set_view(record_masks=False)
            site = (*path, "mask")
            if site in by_path:
                module.mask = Mask(by_path.pop(site))
    if by_path:
        raise ValueError(
            f"masks holds {', '.join('/'.join(map(str, site)) for site in by_path)}, "
            "but the model has no jdrop.nnx.Dropout there."
        )
    return view


def as_network(make_module: Any, *, at_dropout: AtDropout | None = None) -> Network:
    """What the rest of jdrop needs of an nnx module: see `jdrop.network.Network`.

    Variables are `params` (its `nnx.Param`s), `state` (all else but rngs and masks, batch
    statistics for instance) and, where masks are to be replayed, `masks`; each is nested
    dictionaries of arrays. Training updates `state`. With a key and outside training, masks are
    drawn while batch normalisation uses its running averages.

    Args:
        make_module: makes the module from an argument named `rngs`: its class, or a function. The
            module's call takes the inputs and, if it has modes, a flag named `deterministic`,
            `train`, `training` or `is_training`; its output is one array, and `deterministic` and
            `use_running_average` are the attributes of its layers that set their modes, as in
            Flax.
        at_dropout: `at_dropout(name, inputs, rate)`, called in place of every dropout layer, be it
            of jdrop or Flax, whether the network has a key or not. It gives what the layer then
            gives out: the inputs for a network without dropout, a part of them for a thinned
            network. The name is the layer's path, as in "block/dropout". Attention layers then
            drop nothing.

    Raises:
        TypeError: a module instead of what makes it.
        ValueError: a call with another argument that is True or False by default; put the module
            into one that fixes it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> network = as_network(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
        >>> variables = network.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> network(variables, jnp.ones((4, 3)), None).shape
        (4, 2)
    """
    if isinstance(make_module, nnx.Module) or not callable(make_module):
        raise TypeError(
            f"make_module must be a function of rngs that makes the module, got "
            f"{type(make_module).__name__}; give the class, or `lambda rngs: MyModule(rngs=rngs)`."
        )
    if at_dropout is None:

        def thin(at_dropout: AtDropout) -> Network:
            return _network(make_module, partial(_call_at_dropout, at_dropout, only_units=True))

        return _network(make_module, None, thin)
    return _network(make_module, partial(_replace_dropout, at_dropout))


def _network(
    make_module: Callable[..., Any],
    change: Callable[[nnx.Module], None] | None,
    thin: Callable[[AtDropout], Network] | None = None,
) -> Network:
    """The network of a module on which `change` is called before each pass."""
    abstract_model = nnx.eval_shape(lambda: make_module(rngs=nnx.Rngs(0)))
    flags = partial(mode_flags, type(abstract_model).__call__)
    flags(training=False)  # Raises now, not at the first call.
    graphdef, *states = nnx.split(abstract_model, nnx.Param, nnx.RngState, ...)
    abstract_params, abstract_rngs, abstract_state = states

    def init(key: Array, inputs: Array) -> Variables:
        model = make_module(rngs=nnx.Rngs(key))
        params, _, state = nnx.state(model, nnx.Param, nnx.RngState, ...)
        return {"params": nnx.to_pure_dict(params), "state": nnx.to_pure_dict(state)}

    def merge(variables: Variables, key: Array | None, *, training: bool) -> nnx.Module:
        model = nnx.merge(
            graphdef,
            _filled(abstract_params, variables["params"]),
            jax.tree.map(_unseeded, abstract_rngs),
            _filled(abstract_state, variables["state"]),
        )
        model.set_attributes(
            deterministic=key is None, use_running_average=not training, raise_if_not_found=False
        )
        if key is not None:
            nodes = [node for _, node in nnx.iter_graph(model)]
            tags = sorted({node.tag for node in nodes if isinstance(node, nnx.RngStream)})
            keys = dict(zip(tags, jax.random.split(key, len(tags)), strict=True))
            nnx.reseed(model, policy="match_shape", **keys)
        if "masks" in variables:
            model = replay_masks(model, variables["masks"])
        if change is not None:
            change(model)
        return model

    def apply(variables: Variables, inputs: Array, key: Array | None) -> Array:
        model = merge(variables, key, training=False)
        for _, module in nnx.iter_modules(model):
            if type(module) is nnx.BatchNorm:
                # A flag of the model's call may tell it to use those of the batch.
                object.__setattr__(module, "__class__", _BatchNormOfRunningAverages)
        return model(inputs, **flags(training=key is not None))

    def apply_train(variables: Variables, inputs: Array, key: Array) -> tuple[Array, Variables]:
        model = merge(variables, key, training=True)
        outputs = model(inputs, **flags(training=True))
        state = nnx.state(model, nnx.Param, nnx.RngState, Mask, ...)[-1]
        return outputs, {**variables, "state": nnx.to_pure_dict(state)}

    return Network(apply, init, apply_train, thin)


def _replace_dropout(at_dropout: AtDropout, model: nnx.Module) -> None:
    """Makes every dropout layer call `at_dropout`, and attention drop nothing."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.MultiHeadAttention):
            object.__setattr__(module, "dropout_rate", 0.0)
    _call_at_dropout(at_dropout, model)


def _call_at_dropout(at_dropout: AtDropout, model: nnx.Module, *, only_units: bool = False) -> None:
    """Makes dropout layers call `at_dropout`, and do as ever where that gives None.

    Those only, where asked for, that are on and drop units.
    """
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, Dropout | nnx.Dropout):
            name = "/".join(map(str, path))
            object.__setattr__(module, "at_dropout", partial(at_dropout, name))
            object.__setattr__(module, "only_units", only_units)
            object.__setattr__(module, "__class__", _replaced(type(module)))


@cache
def _replaced(layer: type) -> type:
    """What a dropout layer becomes when something else is to be called in its place.

    The same class for all layers of one, or what is compiled with it would be compiled anew.
    """

    def call(self: Any, inputs: Array, **given: Any) -> Array:
        is_off, rate = given.get("deterministic"), given.get("rate")
        is_off = self.deterministic if is_off is None else is_off
        outputs = None
        if not self.only_units or (not is_off and drops_units(self.broadcast_dims, inputs)):
            outputs = self.at_dropout(inputs, self.rate if rate is None else rate)
        return layer.__call__(self, inputs, **given) if outputs is None else outputs

    return type(f"Replaced{layer.__name__}", (layer,), {"__call__": call})


class _BatchNormOfRunningAverages(nnx.BatchNorm):
    """Uses its running averages whatever its call is told."""

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        return super().__call__(x, use_running_average=True, mask=mask)


def _filled(abstract: Any, values: dict[str, Any]) -> Any:
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, values)
    return state


def _unseeded(leaf: jax.ShapeDtypeStruct) -> Array:
    """Stands in the place of rng state until the streams are reseeded."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)
