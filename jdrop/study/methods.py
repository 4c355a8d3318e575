"""What is compared: a user's model, and the kinds of networks that are made of it.

Nothing is trained here. A kind of network is a `Training`: which network, how many, for how long.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop.network import Network, Variables
from jdrop.thinned import ThinningError, thin

WEIGHT_DECAYS = (0.0, 0.1, 1.0, 10.0)
"""Of AdamW, among which validation chooses for the plain network."""

CHANGES = ("rate", "width_factor")
"""What a function that makes a model may take, so that the comparison can change it."""


class ModelError(ValueError):
    """A model that cannot be compared; the message says why and what can."""


@dataclass(frozen=True)
class Settings:
    """How much is trained, and how.

    Attributes:
        replicates: whole repetitions of the comparison; intervals come from them.
        ensemble_size: plain networks in each replicate: the largest average.
        budget: how many networks the methods of equal budget may cost; the size of averages of
            dropout networks, too.
        num_samples: masks of Monte-Carlo dropout.
        epochs: passes over the training examples.
        batch_size: examples in a step.
        learning_rate: of Adam.
        controls: whether the methods of equal budget are trained.
        theory: whether the claims of the theory are tested: overfitting against the number of
            examples, co-adaptation, all masks of a small network.
        seed: of the networks.
    """

    replicates: int = 5
    ensemble_size: int = 10
    budget: int = 5
    num_samples: int = 50
    epochs: int = 50
    batch_size: int = 50
    learning_rate: float = 2e-3
    controls: bool = True
    theory: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("replicates", 2),
            ("ensemble_size", 2),
            ("budget", 2),
            ("num_samples", 2),
            ("epochs", 1),
            ("batch_size", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(
                f"learning_rate must be positive and finite, got {self.learning_rate}."
            )


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
    """An architecture, of which networks are made with dropout, without it, or wider.

    Args:
        model: a linen module; or what makes one: a class or a function, which may take `rate` and
            `width_factor` (by what the widths of its hidden layers are multiplied). For nnx the
            same, with an argument `rngs` too.

    Raises:
        ModelError: something else.
    """

    def __init__(self, model: Any) -> None:
        if isinstance(model, nnx.Module):
            raise ModelError(
                f"the model is an nnx module, {type(model).__name__}; give what makes it, its "
                "class or `lambda rngs: ...`, since each network needs weights of its own."
            )
        if isinstance(model, nn.Module):
            self._make: Callable[..., Any] = lambda: model
        elif callable(model):
            self._make = model
        else:
            raise ModelError(
                "the model must be a linen module, or a class or function that makes a linen or "
                f"nnx module, got {type(model).__name__}."
            )
        # Flax's classes are made by metaclasses, whose calls say nothing of the arguments.
        made_by = getattr(self._make, "__init__") if inspect.isclass(self._make) else self._make  # noqa: B009
        parameters = dict(inspect.signature(made_by).parameters)
        parameters.pop("self", None)
        self._at_width: dict[float, Model] = {}
        self._at_rate: dict[float, Network] = {}
        self.changes = frozenset(parameters) & frozenset(CHANGES)
        self._is_nnx = "rngs" in parameters
        missing = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name != "rngs"
        ]
        if missing:
            raise ModelError(
                f"what makes the model must need no arguments but rngs, got a parameter "
                f"{missing[0]!r} without a default; give it one, or use functools.partial."
            )

    def network(
        self,
        at_dropout: Callable[[str, Array, Any], Array] | None = None,
        **changes: Any,
    ) -> Network:
        """A network of this architecture.

        Args:
            at_dropout: in place of every dropout layer, see `jdrop.linen.as_network`.
            **changes: of `rate` and `width_factor`, those in `changes`.
        """
        make = partial(self._make, **changes)
        if self._is_nnx:
            return jdrop.nnx.as_network(make, at_dropout=at_dropout)
        module = make()
        if not isinstance(module, nn.Module):
            raise ModelError(
                "what makes the model must make a linen module, or an nnx module from an argument "
                f"named rngs, got {type(module).__name__}."
            )
        return jdrop.linen.as_network(module, at_dropout=at_dropout)

    def at_width(self, factor: float) -> "Model":
        """The model with hidden layers of other widths; for one factor always the same object."""
        if factor == 1:
            return self
        if factor not in self._at_width:
            self._at_width[factor] = Model(partial(self._make, width_factor=factor))
        return self._at_width[factor]

    @cached_property
    def plain(self) -> Network:
        """The network without dropout."""
        return self.network(_no_dropout)

    @cached_property
    def dropout(self) -> Network:
        """The network as it is."""
        return self.network()

    def at_rate(self, rate: float, inputs: Any) -> tuple[Network, bool]:
        """The network with dropout at a rate, and whether its variables hold that.

        Where the module takes a traced rate, one network serves all rates, so that it is compiled
        once: its rate is the collection `rate` of its variables, a scalar.

        Args:
            rate: in [0, 1).
            inputs: example inputs, `[batch, ...]`.
        """
        if rate not in self._at_rate:
            self._at_rate[rate] = self.network(rate=rate)
        if self._is_nnx:
            return self._at_rate[rate], False  # Its attributes are static.
        key = jax.eval_shape(lambda: jax.random.key(0))
        try:
            variables = jax.eval_shape(self._any_rate.init, key, inputs)
            jax.eval_shape(self._any_rate.apply_fn, variables, inputs, key)
        except (TypeError, ValueError):
            return self._at_rate[rate], False
        return self._any_rate, True

    @cached_property
    def _any_rate(self) -> Network:
        def apart(variables: Variables) -> tuple[Network, Variables]:
            variables = dict(variables)
            return self.network(rate=variables.pop("rate")), variables

        def apply(variables: Variables, inputs: Array, key: Array | None) -> Array:
            network, rest = apart(variables)
            return network(rest, inputs, key)

        def train(variables: Variables, inputs: Array, key: Array) -> tuple[Array, Variables]:
            network, rest = apart(variables)
            outputs, rest = network.apply_train(rest, inputs, key)
            return outputs, {**rest, "rate": variables["rate"]}

        def init(key: Array, inputs: Array) -> Variables:
            return {**self.dropout.init(key, inputs), "rate": jnp.zeros(())}

        return Network(apply, init, train)

    def sites(self, inputs: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
        """By dropout layer, the shape of one example there and the rate."""
        found: dict[str, tuple[tuple[int, ...], Any]] = {}

        def look(name: str, x: Array, rate: Any) -> Array:
            found[name] = x.shape[1:], rate
            return x

        network = self.network(look)

        def read(key: Array) -> Array:
            given = jnp.asarray(inputs)
            return network(network.init(key, given), given, None)

        jax.eval_shape(read, jax.eval_shape(lambda: jax.random.key(0)))
        return found

    def num_parameters(self, inputs: Any, **changes: Any) -> int:
        """How many parameters the network has."""
        network = self.network(_no_dropout, **changes)
        variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
        return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))

    def width_for(self, num_parameters: int | float, inputs: Any) -> float:
        """The width factor of the largest network with at most so many parameters.

        Raises:
            ModelError: even the narrowest has more.
        """
        share = num_parameters / self.num_parameters(inputs)
        low, high = min(1.0, share / 2), max(1.0, share)
        if self.num_parameters(inputs, width_factor=low) > num_parameters:
            raise ModelError(f"no width has as few as {num_parameters:.0f} parameters.")
        while self.num_parameters(inputs, width_factor=high) <= num_parameters:
            low, high = high, 2 * high
        for _ in range(20):
            middle = (low + high) / 2
            few_enough = self.num_parameters(inputs, width_factor=middle) <= num_parameters
            low, high = (middle, high) if few_enough else (low, middle)
        return low

    def masked(self, num_masks: int | None) -> Network:
        """The network with masks that are drawn once, at its initialisation, and stay.

        They are the collection `fixed masks`, one Boolean array for each dropout layer, shared by
        all examples. What they keep is not scaled: the masks belong to the network.

        Args:
            num_masks: None for one mask. Otherwise Masksembles: so many, of which example `i` of a
                batch sees number `i % num_masks`. Each keeps the same number of units, and each
                unit is in one of them at least.

        Reference:
            Warde-Farley et al. 2014, arXiv:1312.6197 (untied weights); Durasov et al. 2021,
            arXiv:2012.08334 (Masksembles).
        """

        def apart(variables: Variables) -> tuple[Network, Variables]:
            variables = dict(variables)
            masks = variables.pop("fixed masks")

            def apply_mask(name: str, x: Array, rate: Any) -> Array:
                mask = masks[name]
                of_example = jnp.arange(len(x)) % num_masks if num_masks else None
                return jnp.where(mask[of_example], x, 0)

            return self.network(apply_mask), variables

        def apply(variables: Variables, inputs: Array, key: Array | None) -> Array:
            network, rest = apart(variables)
            return network(rest, inputs, key)

        def train(variables: Variables, inputs: Array, key: Array) -> tuple[Array, Variables]:
            network, rest = apart(variables)
            outputs, rest = network.apply_train(rest, inputs, key)
            return outputs, {**rest, "fixed masks": variables["fixed masks"]}

        def init(key: Array, inputs: Array) -> Variables:
            init_key, mask_key = jax.random.split(key)
            masks = {}
            for index, (name, (shape, rate)) in enumerate(sorted(self.sites(inputs).items())):
                site_key = jax.random.fold_in(mask_key, index)
                if num_masks is None:
                    masks[name] = jdrop.keep_mask(site_key, shape, rate)
                else:
                    masks[name] = _covering_masks(site_key, shape, rate, num_masks)
            return {**self.plain.init(init_key, inputs), "fixed masks": masks}

        return Network(apply, init, train)


def _no_dropout(name: str, inputs: Array, rate: Any) -> Array:
    return inputs


def _covering_masks(key: Array, shape: tuple[int, ...], rate: Any, num_masks: int) -> Array:
    """Masks `[mask, *shape]` that keep equally many units each, and every unit somewhere."""
    owner_key, rest_key = jax.random.split(key)
    num_units = 1
    for length in shape:
        num_units *= length
    # Each unit is kept by the mask that owns it, and each mask by chance keeps others besides.
    owner = jax.random.permutation(owner_key, num_units) % num_masks
    owned = owner[None] == jnp.arange(num_masks)[:, None]
    order = jax.random.uniform(rest_key, (num_masks, num_units)) + owned
    kept = max(-(-num_units // num_masks), round((1 - float(rate)) * num_units))
    rank = jnp.argsort(jnp.argsort(-order, axis=1), axis=1)
    return (rank < kept).reshape(num_masks, *shape)


@dataclass(frozen=True)
class Training:
    """Networks of one kind.

    Attributes:
        name: of the kind.
        network: what is trained.
        members: networks in each replicate.
        epochs: passes over the training examples.
        optimizer: any optax optimizer.
        validate: whether a tenth of the training examples is held out, the best state by them is
            kept, and members differ in their weight decay: `WEIGHT_DECAYS`.
        watch: whether scores are taken while the networks train, and predictions on the training
            examples after it.
    """

    name: str
    network: Network
    members: int
    epochs: int
    optimizer: optax.GradientTransformation
    validate: bool = False
    watch: bool = False


TRAININGS = (
    "plain",
    "dropout",
    "small",
    "wide",
    "long",
    "regularised",
    "fixed-masks",
    "masksembles",
    "exact",
    "overfitting",
    "sweep",
    "dropout-thinned",
)
"""All kinds; a kind's place is its child of the key, so a new one belongs at the end."""


def trainings(settings: Settings, model: Model, inputs: Any) -> tuple[list[Training], list[str]]:
    """All kinds that a comparison trains, and a sentence on each that it leaves out.

    Args:
        settings: how much is trained.
        model: the architecture.
        inputs: example inputs, `[batch, ...]`.
    """
    adam = optax.adam(settings.learning_rate)
    make = partial(Training, epochs=settings.epochs, optimizer=adam)
    kinds = [
        make("plain", model.plain, settings.ensemble_size, watch=True),
        make("dropout", model.dropout, settings.budget, watch=True),
    ]
    left_out = []
    try:
        kinds.append(make("dropout-thinned", thin(model.dropout, inputs), 1))
    except ThinningError as error:
        left_out.append(f"Thinned training was left out: {error}")
    if not settings.controls:
        return kinds, [*left_out, "Methods of equal budget were not asked for."]
    if "width_factor" in model.changes:
        one = model.num_parameters(inputs)
        try:
            narrow = model.width_for(one / settings.budget, inputs)
            small = model.network(_no_dropout, width_factor=narrow)
            kinds.append(make("small", small, settings.budget))
        except ModelError as error:
            left_out.append(f"Small networks were left out: {error}")
        broad = model.width_for(one * settings.budget, inputs)
        kinds.append(make("wide", model.network(_no_dropout, width_factor=broad), 1))
    else:
        left_out.append(
            "Small and wide networks were left out: what makes the model takes no width_factor."
        )
    kinds.append(make("long", model.dropout, 1, epochs=settings.budget * settings.epochs))
    adamw = optax.inject_hyperparams(optax.adamw)(settings.learning_rate, weight_decay=0.0)
    kinds.append(
        make("regularised", model.plain, len(WEIGHT_DECAYS), optimizer=adamw, validate=True)
    )
    if model.sites(inputs):
        kinds.append(make("fixed-masks", model.masked(None), settings.budget))
        kinds.append(make("masksembles", model.masked(settings.budget), 1))
    else:
        left_out.append(
            "Fixed masks and Masksembles were left out: the model has no dropout layer, only "
            "dropout of attention weights."
        )
    return kinds, left_out
