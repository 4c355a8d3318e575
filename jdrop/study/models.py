"""A user's model, and the networks that the study makes of it."""

import inspect
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop.calls import ModeError
from jdrop.network import (
    AttentionDropout,
    DropoutSite,
    Network,
    ReplaceFn,
    Variables,
    consumed_keys,
    dropout_sites,
)
from jdrop.study.data import Dataset, take
from jdrop.study.errors import UserError

CHANGEABLE = ("rate", "width_factor")
"""Arguments through which the study changes a model, if the model's factory takes them."""

FIXED_MASKS = "fixed masks"
"""The collection of variables that holds the masks of `Model.masked`."""

RATE = "rate"
"""The collection of variables that holds the rate of `Model.at_rate`."""


class ModelError(UserError):
    """A model that cannot be compared; the message says why, and what can be."""


class MLP(nn.Module):
    """Dense layers with rectifiers, dropout on the inputs and after each hidden layer."""

    hidden: tuple[int, ...]
    num_outputs: int
    rate: Any = 0.5
    input_rate: float = 0.0
    width_factor: float = 1.0

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Outputs `[batch, output]` from inputs `[batch, ...]`."""
        x = x.reshape(len(x), -1)
        if self.input_rate:
            x = jdrop.linen.Dropout(self.input_rate)(x, deterministic=deterministic)
        for units in self.hidden:
            x = nn.relu(nn.Dense(max(1, round(units * self.width_factor)))(x))
            x = jdrop.linen.Dropout(self.rate)(x, deterministic=deterministic)
        return nn.Dense(self.num_outputs)(x)


class Model:
    """An architecture that makes networks with dropout, without it, at other rates and widths.

    Args:
        model: a linen module; a network, as `as_network` makes it; or a class or function that
            makes one of them. The factory may take `rate` and `width_factor`, which multiplies the
            widths of the hidden layers. A factory of an nnx module takes `rngs` too.

    Raises:
        ModelError: an nnx module instead of its factory; a factory with another argument that has
            no default; anything else.
    """

    def __init__(self, model: Any) -> None:
        if isinstance(model, nnx.Module):
            raise ModelError(
                f"the model is an nnx module, {type(model).__name__}; give its class or "
                "`lambda rngs: ...`, since each network needs weights of its own."
            )
        if isinstance(model, nn.Module | Network):
            self._factory: Callable[..., Any] = lambda: model
        elif callable(model):
            self._factory = model
        else:
            raise ModelError(
                "the model must be a linen module, or a class or function that makes a linen or "
                f"nnx module, or a network of `as_network`, got {type(model).__name__}."
            )
        # Flax's metaclasses hide the arguments of a class; its `__init__` shows them.
        is_class = inspect.isclass(self._factory)
        signed = getattr(self._factory, "__init__") if is_class else self._factory  # noqa: B009
        parameters = dict(inspect.signature(signed).parameters)
        parameters.pop("self", None)
        self._models_at_width: dict[float, Model] = {}
        self._networks_at_rate: dict[float, Network] = {}
        self.changeable = frozenset(parameters) & frozenset(CHANGEABLE)
        self._is_nnx = "rngs" in parameters
        required = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name != "rngs"
        ]
        if required:
            raise ModelError(
                "the model's factory must need no argument but rngs, got a parameter "
                f"{required[0]!r} without a default; give it one, or use functools.partial."
            )

    def network(self, **changes: Any) -> Network:
        """A network of this architecture.

        Args:
            **changes: values of `rate` and `width_factor`; only those in `changeable`.
        """
        factory = partial(self._factory, **changes)
        # At the rate 0 a model may leave its dropout layers out.
        rate = changes.get(RATE)
        has_dropout = not (isinstance(rate, int | float) and rate == 0)
        if self._is_nnx:
            return jdrop.nnx.as_network(factory, has_dropout=has_dropout)
        module = factory()
        if isinstance(module, Network):
            if module.init_fn is None or module.replace_fn is None:
                raise ModelError(
                    "a network must have an init_fn and a replace_fn to be compared; make it with "
                    "`jdrop.linen.as_network` or `jdrop.nnx.as_network`."
                )
            return _trained_on_choice(module)
        if not isinstance(module, nn.Module):
            raise ModelError(
                "the model's factory must make a linen module, an nnx module from an argument "
                f"named rngs, or a network of `as_network`, got {type(module).__name__}."
            )
        return jdrop.linen.as_network(module, has_dropout=has_dropout)

    def plain_network(self, **changes: Any) -> Network:
        """A network of this architecture without dropout; see `network`."""
        return self.network(**changes).replace_dropout(_keep_all)

    def at_width(self, factor: float) -> "Model":
        """The model with other widths of its hidden layers; the same object for equal factors."""
        if factor == 1:
            return self
        if factor not in self._models_at_width:
            self._models_at_width[factor] = Model(partial(self._factory, width_factor=factor))
        return self._models_at_width[factor]

    @cached_property
    def plain(self) -> Network:
        """The network without dropout."""
        return self.dropout.replace_dropout(_keep_all)

    @cached_property
    def dropout(self) -> Network:
        """The network with dropout at its own rate."""
        return self.network()

    def at_rate(self, rate: float, inputs: Any) -> tuple[Network, bool]:
        """The network with dropout at a rate, and whether its variables hold the rate.

        A module that takes a traced rate serves all rates with one network, compiled once. The
        variables of that network hold the rate, a scalar, as the collection `rate`.

        Args:
            rate: in [0, 1).
            inputs: example inputs, `[batch, ...]`.
        """
        if rate not in self._networks_at_rate:
            self._networks_at_rate[rate] = self.network(rate=rate)
        if self._is_nnx:  # Attributes of nnx modules are static.
            return self._networks_at_rate[rate], False
        key = jax.eval_shape(lambda: jax.random.key(0))
        try:
            variables = jax.eval_shape(self._network_at_any_rate.init, key, inputs)
            jax.eval_shape(self._network_at_any_rate.apply_fn, variables, inputs, key)
        except (TypeError, ValueError):
            return self._networks_at_rate[rate], False
        return self._network_at_any_rate, True

    @cached_property
    def _network_at_any_rate(self) -> Network:
        def init(key: Array, inputs: Any) -> Variables:
            return {**self.dropout.init(key, inputs), RATE: jnp.zeros(())}

        return _network_of_collection(RATE, lambda rate: self.network(rate=rate), init)

    def sites(self, inputs: Any) -> tuple[DropoutSite, ...]:
        """The dropout layers' calls in a training pass; see `jdrop.network.dropout_sites`."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        variables = jax.eval_shape(self.dropout.init, key, inputs)
        return dropout_sites(self.dropout, variables, inputs)

    def num_parameters(self, inputs: Any, **changes: Any) -> int:
        """How many parameters a network has; `changes` as in `network`."""
        network = self.network(**changes)
        variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
        return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))

    def width_for(self, num_parameters: int | float, inputs: Any) -> float:
        """The largest width factor whose network has at most `num_parameters` parameters.

        Raises:
            ModelError: even the narrowest network has more, or wider ones have equally many.
        """
        share = num_parameters / self.num_parameters(inputs)
        low, high = min(1.0, share / 2), max(1.0, share)
        if self.num_parameters(inputs, width_factor=low) > num_parameters:
            raise ModelError(f"no width has as few as {num_parameters:.0f} parameters.")
        while (largest := self.num_parameters(inputs, width_factor=high)) <= num_parameters:
            if self.num_parameters(inputs, width_factor=2 * high) == largest:
                raise ModelError(
                    f"width_factor={2 * high:g} gives no more parameters than {high:g}; multiply "
                    "the widths of the hidden layers by it."
                )
            low, high = high, 2 * high
        for _ in range(20):
            middle = (low + high) / 2
            fits = self.num_parameters(inputs, width_factor=middle) <= num_parameters
            low, high = (middle, high) if fits else (low, middle)
        return low

    def masked(self, num_masks: int | None) -> Network:
        """The network with masks that its initialisation draws and that never change.

        The collection `fixed masks` holds one Boolean array for each dropout layer, which all
        examples share. Kept units are not scaled: the masks belong to the network.

        Args:
            num_masks: None for one mask. Otherwise Masksembles with that many masks: example `i`
                of a batch sees mask `i % num_masks`. Each mask keeps equally many units, and at
                least one mask keeps each unit. The network also takes variables with one mask.

        Reference:
            Warde-Farley et al. 2014, arXiv:1312.6197 (untied weights); Durasov et al. 2021,
            arXiv:2012.08334 (Masksembles).
        """

        def network_with(masks: dict[str, Any]) -> Network:
            def apply_fixed_mask(site: DropoutSite, inputs: Array) -> Array:
                mask = masks[site.name]
                has_one_mask = mask.ndim < inputs.ndim
                index = None if has_one_mask else jnp.arange(len(inputs)) % len(mask)
                return jnp.where(mask[index], inputs, 0)

            return self.dropout.replace_dropout(apply_fixed_mask)

        def init(key: Array, inputs: Any) -> Variables:
            init_key, mask_key = jax.random.split(key)
            layers = {site.name: site for site in self.sites(inputs)}
            masks = {}
            for index, (name, site) in enumerate(sorted(layers.items())):
                layer_key = jax.random.fold_in(mask_key, index)
                shape = site.shape[1:]  # Without the batch axis.
                if num_masks is None:
                    masks[name] = jdrop.keep_mask(layer_key, shape, site.rate)
                else:
                    masks[name] = _covering_masks(layer_key, shape, site.rate, num_masks)
            return {**self.plain.init(init_key, inputs), FIXED_MASKS: masks}

        return _network_of_collection(FIXED_MASKS, network_with, init)


def _trained_on_choice(network: Network) -> Network:
    """The network whose outputs in training are those of its predictions."""
    choose, train, replace_fn = network.choose_fn, network.apply_train, network.replace_fn
    if choose is None:
        return network
    assert replace_fn is not None

    def apply_train(variables: Variables, inputs: Any, key: Array) -> tuple[Any, Variables]:
        outputs, updated = train(variables, inputs, key)
        return choose(outputs), updated

    def replace_dropout(f: ReplaceFn, attention_dropout: AttentionDropout) -> Network:
        return _trained_on_choice(replace_fn(f, attention_dropout))

    return Network(network.apply_fn, network.init_fn, apply_train, replace_dropout)


def _keep_all(site: DropoutSite, inputs: Array) -> Array:
    return inputs


def _network_of_collection(
    collection: str,
    make_network: Callable[[Any], Network],
    init: Callable[[Array, Any], Variables],
) -> Network:
    """A network that is made of one collection of its variables, which training leaves alone."""

    def split(variables: Variables) -> tuple[Network, Variables]:
        rest = {name: value for name, value in variables.items() if name != collection}
        return make_network(variables[collection]), rest

    def apply(variables: Variables, inputs: Any, key: Array | None) -> Array:
        network, rest = split(variables)
        return network(rest, inputs, key)

    def apply_train(variables: Variables, inputs: Any, key: Array) -> tuple[Array, Variables]:
        network, rest = split(variables)
        outputs, rest = network.apply_train(rest, inputs, key)
        return outputs, {**rest, collection: variables[collection]}

    return Network(apply, init, apply_train)


def _covering_masks(key: Array, shape: tuple[int, ...], rate: Any, num_masks: int) -> Array:
    """Masks `[mask, *shape]` that keep equally many units; at least one mask keeps each unit."""
    owner_key, order_key = jax.random.split(key)
    num_units = math.prod(shape)
    # Each unit is kept by the mask that owns it; chance decides what else a mask keeps.
    owner = jax.random.permutation(owner_key, num_units) % num_masks
    is_owned = owner[None] == jnp.arange(num_masks)[:, None]
    order = jax.random.uniform(order_key, (num_masks, num_units)) + is_owned
    num_kept = max(-(-num_units // num_masks), round((1 - float(rate)) * num_units))
    rank = jnp.argsort(jnp.argsort(-order, axis=1), axis=1)
    return (rank < num_kept).reshape(num_masks, *shape)


def check_model(model: Model, data: Dataset) -> int | None:
    """Raises if the model does not fit the data, draws no mask, or draws masks of its own.

    The passes are abstract: they compute nothing. So the initial weights do not matter, which may
    be zeros.

    Returns:
        The number of classes that the model tells apart, None in regression.

    Raises:
        ModelError: inputs that the model refuses; outputs of another shape than the labels ask
            for; a model that drops nothing in training; a plain network that still consumes keys.
    """
    labels = data.train_labels[:16]
    inputs = jax.tree.map(jnp.asarray, take(data.train_inputs, slice(16)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        network = model.dropout
        variables = jax.eval_shape(network.init, key, inputs)
        outputs = jax.eval_shape(lambda v, x: network(v, x, None), variables, inputs)
        dropout_keys = consumed_keys(network, variables, inputs)
        plain_keys = consumed_keys(model.plain, variables, inputs)
    except ModelError:
        raise
    except ModeError as error:
        raise ModelError(str(error)) from error
    except (Exception, SystemExit) as error:  # A user's model may raise anything.
        raise ModelError(
            f"the model cannot take inputs of shape {_shapes(inputs)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(outputs, jax.ShapeDtypeStruct):
        raise ModelError(
            f"the model must return one array, got {type(outputs).__name__}; choose the array to "
            "compare by `as_network(module, outputs=...)`, and give the network as the model."
        )
    _check_shape(outputs.shape, labels, data)
    if not dropout_keys:
        raise ModelError(
            "the model draws no mask: its outputs in training depend on no key. Put "
            "jdrop.linen.Dropout or jdrop.nnx.Dropout with a rate above 0 into it, and let its "
            "call take `deterministic` or `train`."
        )
    if plain_keys:
        raise ModelError(
            "the model without its dropout layers must draw nothing, since plain networks are "
            f"trained without dropout, but a key is consumed at {', '.join(plain_keys)}. Drop "
            "with the layers of jdrop or Flax instead, which the comparison can take out: "
            "Dropout, attention with a dropout rate, or DropPath of jdrop.linen or jdrop.nnx."
        )
    return None if data.is_regression else outputs.shape[-1]


def _shapes(inputs: Any) -> Any:
    """The shapes of examples."""
    return jax.tree.map(lambda array: array.shape[1:], inputs)


def _check_shape(shape: tuple[int, ...], labels: np.ndarray, data: Dataset) -> None:
    """Raises if outputs of this shape do not fit the labels."""
    allowed: tuple[Any, ...] = ((len(labels), data.num_classes),)
    if data.is_regression:
        allowed = ((len(labels),), (len(labels), 1))
    num_classes = data.num_classes or 1
    if not data.is_per_token:
        if shape not in allowed:
            raise ModelError(
                f"the model must give outputs of shape {' or '.join(map(str, allowed))} for "
                f"{len(labels)} examples, got {shape}."
            )
    # Not every class of a large vocabulary has a label.
    elif shape[:-1] != labels.shape or shape[-1] < num_classes:
        raise ModelError(
            f"the model must give outputs [example, length, class] of shape {labels.shape} and at "
            f"least {num_classes} classes, since the labels are per token, got {shape}; if the "
            "labels are one-hot, turn them into integers with `labels.argmax(-1)`."
        )
