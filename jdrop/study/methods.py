"""The methods that a comparison compares: an entry of `METHODS` for each.

An entry says which networks to train, which of them predict, and how tables and figures show the
method. A new method needs a new entry and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import numpy as np
import optax

from jdrop.network import Variables
from jdrop.study.models import FIXED_MASKS, Model, ModelError
from jdrop.study.settings import Settings
from jdrop.study.training import NetworkSpec, first_members
from jdrop.thinned import ThinningError, thin

WEIGHT_DECAYS = (0.0, 0.1, 1.0, 10.0)
"""Weight decays of AdamW, among which cross-validation chooses for the plain network."""

EXACT_KEY_INDEX, OVERFITTING_KEY_INDEX, SWEEP_KEY_INDEX, TUNING_KEY_INDEX = 8, 9, 10, 12
"""Children of the run's key that belong to no group of networks."""


class LeftOutError(ModelError):
    """A model for which a method cannot be trained; the report says the message."""


@dataclass(frozen=True)
class NetworkGroup:
    """Networks that are trained together, for one method or several.

    Attributes:
        name: of the part of the run folder that stores them.
        key_index: which child of the run's key they are trained with. Recorded numbers depend on
            it, so it never changes, and each group has its own.
        make_spec: the spec from the settings, the model and example inputs `[batch, ...]`. Raises
            `LeftOutError` if the model does not allow the method.
        is_control: whether the group is trained only if `Settings.controls` is True.
    """

    name: str
    key_index: int
    make_spec: Callable[[Settings, Model, Any], NetworkSpec]
    is_control: bool = True


def _all_members(variables: Variables, replicates: int) -> Variables:
    return variables


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: as results hold it.
        label: as tables show it; `{n}` is the size of an average, `{budget}` is in the settings.
        explanation: what the method is, in a sentence or two; may hold `{budget}`.
        group: the networks; methods that share a group share the training.
        epochs: `epochs(settings)`: how many, unless cross-validation chooses them.
        members: `members(variables, replicates)`: the networks of the group that predict, all by
            default.
        draws_masks: whether the members of an average are masks drawn for one network.
        unit: what a member is.
        weight_decays: those of the group that the method may have; cross-validation chooses.
        tuned_as: the method whose epochs this one has, if it predicts with the same networks.
        stops_early: whether cross-validation chooses the epochs even where all others have the
            epochs of the settings.
        only_same_epochs: whether the method says nothing where each method has its own epochs. If
            this holds for all methods of a group, a tuned run leaves the group out.
        table_sizes: `table_sizes(num_members, budget)`: sizes of averages that tables show.
        color: in figures, each method's own; colors remain distinct for color-blind readers (Okabe
            and Ito, then Tol).
        marker: in figures; markers remain distinct in grey.
        is_curve: whether figures show all sizes; otherwise the largest one only.
    """

    name: str
    label: str
    explanation: str
    group: NetworkGroup
    epochs: Callable[[Settings], int] = lambda settings: settings.epochs
    members: Callable[[Variables, int], Variables] = _all_members
    draws_masks: bool = False
    unit: Literal["networks", "masks"] = "networks"
    weight_decays: tuple[float, ...] = ()
    tuned_as: str | None = None
    stops_early: bool = False
    only_same_epochs: bool = False
    table_sizes: Callable[[int, int], tuple[int, ...]] = lambda num_members, budget: (num_members,)
    color: str = "#444444"
    marker: str = "h"
    is_curve: bool = False

    def members_with(
        self, weight_decay: float | None, variables: Variables, replicates: int
    ) -> Variables:
        """The networks of the group that predict, among those with this weight decay."""
        if weight_decay is not None:
            start = WEIGHT_DECAYS.index(weight_decay) * replicates
            variables = jax.tree.map(lambda leaf: leaf[start : start + replicates], variables)
        return self.members(variables, replicates)


@cache
def adam(learning_rate: float) -> optax.GradientTransformation:
    """Adam; the same object for equal rates, so that equal programs are compiled once."""
    return optax.adam(learning_rate)


# Networks to train.


def _plain(settings: Settings, model: Model, inputs: Any) -> NetworkSpec:
    optimizer = adam(settings.learning_rate)
    return NetworkSpec(model.plain, settings.ensemble_size, settings.epochs, optimizer, record=True)


def _dropout(settings: Settings, model: Model, inputs: Any) -> NetworkSpec:
    optimizer = adam(settings.learning_rate)
    return NetworkSpec(model.dropout, settings.budget, settings.epochs, optimizer, record=True)


def _thinned(settings: Settings, model: Model, inputs: Any) -> NetworkSpec:
    try:
        network = thin(model.dropout, inputs)
    except ThinningError as error:
        raise LeftOutError(f"Thinned training was left out: {error}") from error
    return NetworkSpec(network, 1, settings.epochs, adam(settings.learning_rate))


def _check_width(model: Model) -> None:
    if "width_factor" not in model.changeable:
        raise LeftOutError(
            "Small and wide networks were left out: the model's factory takes no width_factor."
        )


def _small(settings: Settings, model: Model, inputs: Any) -> NetworkSpec:
    _check_width(model)
    num_parameters = model.num_parameters(inputs) / settings.budget
    try:
        width = model.width_for(num_parameters, inputs)
    except ModelError as error:
        raise LeftOutError(f"Small networks were left out: {error}") from error
    network = model.plain_network(width_factor=width)
    return NetworkSpec(network, settings.budget, settings.epochs, adam(settings.learning_rate))


def _wide(settings: Settings, model: Model, inputs: Any) -> NetworkSpec:
    _check_width(model)
    try:
        width = model.width_for(model.num_parameters(inputs) * settings.budget, inputs)
    except ModelError as error:
        raise LeftOutError(f"Wide networks were left out: {error}") from error
    network = model.plain_network(width_factor=width)
    return NetworkSpec(network, 1, settings.epochs, adam(settings.learning_rate))


def _long_epochs(settings: Settings) -> int:
    return settings.budget * settings.epochs


def _long(settings: Settings, model: Model, inputs: Any) -> NetworkSpec:
    epochs = _long_epochs(settings)
    return NetworkSpec(model.dropout, 1, epochs, adam(settings.learning_rate))


def _regularised(settings: Settings, model: Model, inputs: Any) -> NetworkSpec:
    adamw = optax.inject_hyperparams(optax.adamw)(settings.learning_rate, weight_decay=0.0)
    members = len(WEIGHT_DECAYS)
    return NetworkSpec(model.plain, members, settings.epochs, adamw, weight_decays=WEIGHT_DECAYS)


def _check_dropout_layers(model: Model, inputs: Any) -> None:
    if not model.sites(inputs):
        raise LeftOutError(
            "Fixed masks and Masksembles were left out: the model has no dropout layer, only "
            "dropout of attention weights."
        )


def _fixed_masks(settings: Settings, model: Model, inputs: Any) -> NetworkSpec:
    _check_dropout_layers(model, inputs)
    optimizer = adam(settings.learning_rate)
    return NetworkSpec(model.masked(None), settings.budget, settings.epochs, optimizer)


def _masksembles(settings: Settings, model: Model, inputs: Any) -> NetworkSpec:
    _check_dropout_layers(model, inputs)
    optimizer = adam(settings.learning_rate)
    return NetworkSpec(model.masked(settings.budget), 1, settings.epochs, optimizer)


# Networks that predict.


def separate_masks(variables: Variables, replicates: int) -> Variables:
    """Masksembles as networks with one mask each.

    Args:
        variables: of R networks with M masks each.
        replicates: R.

    Returns:
        Variables of R M networks: R with their first mask, R with their second, ...
    """
    masks = jax.tree.map(
        lambda mask: np.swapaxes(mask, 0, 1).reshape(-1, *mask.shape[2:]), variables[FIXED_MASKS]
    )
    num_masks = jax.tree.leaves(variables[FIXED_MASKS])[0].shape[1]
    repeated = jax.tree.map(
        lambda leaf: np.tile(leaf, (num_masks, *(1,) * (leaf.ndim - 1))),
        {name: value for name, value in variables.items() if name != FIXED_MASKS},
    )
    return {**repeated, FIXED_MASKS: masks}


# The table.

_DROPOUT_NETWORKS = NetworkGroup("dropout", 1, _dropout, is_control=False)
_REGULARISED_NETWORKS = NetworkGroup("regularised", 5, _regularised)

METHODS = {
    method.name: method
    for method in (
        Method(
            name="plain",
            label="{n} plain",
            explanation="Networks trained without dropout, averaged.",
            group=NetworkGroup("plain", 0, _plain, is_control=False),
            table_sizes=lambda num_members, budget: (1, min(budget, num_members), num_members),
            color="#0072B2",
            marker="o",
            is_curve=True,
        ),
        Method(
            name="dropout",
            label="{n} dropout",
            explanation="Networks trained with dropout. Each predicts once, without dropout (weight"
            " scaling); the predictions are averaged.",
            group=_DROPOUT_NETWORKS,
            table_sizes=lambda num_members, budget: (1, num_members),
            color="#D55E00",
            marker="s",
            is_curve=True,
        ),
        Method(
            name="monte-carlo",
            label="dropout, {n} masks",
            explanation="One network trained with dropout. It predicts with masks drawn anew; the "
            "predictions are averaged.",
            group=_DROPOUT_NETWORKS,
            members=first_members,
            draws_masks=True,
            unit="masks",
            color="#009E73",
            marker="^",
            is_curve=True,
        ),
        Method(
            name="weight-scaling",
            label="same, no masks",
            explanation="The networks of the masks above. Each predicts once, without dropout "
            "(weight scaling).",
            group=_DROPOUT_NETWORKS,
            members=first_members,
            tuned_as="monte-carlo",
            color="#7F5A2A",
            marker="d",
        ),
        Method(
            name="dropout-thinned",
            label="thinned dropout",
            explanation="A network trained with dropout that deletes blocks of units, the same for "
            "the whole batch. Training computes only the thinned network. The network "
            "predicts without dropout (weight scaling).",
            group=NetworkGroup("dropout-thinned", 11, _thinned, is_control=False),
            color="#000000",
            marker="p",
        ),
        Method(
            name="small",
            label="{n} small plain",
            explanation="Narrow networks without dropout, averaged. Together they have the "
            "parameters of one network.",
            group=NetworkGroup("small", 2, _small),
            color="#56B4E9",
            marker="v",
        ),
        Method(
            name="wide",
            label="{n} wide plain",
            explanation="A network without dropout that has the parameters of {budget} networks.",
            group=NetworkGroup("wide", 3, _wide),
            color="#332288",
            marker="D",
        ),
        Method(
            name="long",
            label="dropout, {budget}x epochs",
            explanation="A network trained with dropout for {budget} times the epochs, predicting "
            "by weight scaling.",
            group=NetworkGroup("long", 4, _long),
            epochs=_long_epochs,
            only_same_epochs=True,
            color="#882255",
            marker="P",
        ),
        Method(
            name="early-stopping",
            label="early stopping",
            explanation="A network without dropout, trained for the epochs that cross-validation "
            "on the training examples chose.",
            group=_REGULARISED_NETWORKS,
            weight_decays=WEIGHT_DECAYS[:1],
            stops_early=True,
            only_same_epochs=True,
            color="#8C8C8C",
            marker="<",
        ),
        Method(
            name="weight-decay",
            label="weight decay",
            explanation="A network without dropout trained by AdamW, with the weight decay that "
            "cross-validation on the training examples chose.",
            group=_REGULARISED_NETWORKS,
            weight_decays=WEIGHT_DECAYS,
            color="#999933",
            marker=">",
        ),
        Method(
            name="fixed-masks",
            label="{n} with fixed masks",
            explanation="Thinned networks with separate weights, averaged. Each keeps one mask for "
            "its whole training: dropout without shared weights.",
            group=NetworkGroup("fixed-masks", 6, _fixed_masks),
            color="#CC79A7",
            marker="X",
        ),
        Method(
            name="masksembles",
            label="Masksembles, {n}",
            explanation="One network trained with a few fixed masks in turn. It predicts with each "
            "mask; the predictions are averaged.",
            group=NetworkGroup("masksembles", 7, _masksembles),
            members=separate_masks,
            unit="masks",
            color="#E69F00",
            marker="*",
        ),
    )
}
"""The methods by name, in the order of the tables."""


def network_groups() -> tuple[NetworkGroup, ...]:
    """The groups of all methods, in the order of the methods."""
    return tuple({method.group.name: method.group for method in METHODS.values()}.values())


def methods_of(group: NetworkGroup) -> tuple[Method, ...]:
    """The methods that predict with the networks of a group."""
    return tuple(method for method in METHODS.values() if method.group.name == group.name)
