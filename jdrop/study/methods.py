"""The methods that a comparison compares: an entry of `METHODS` for each.

An entry says which networks to train, how to predict with them, and how tables and figures show the
method. A new method needs a new entry and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax import Array

from jdrop.network import Variables
from jdrop.study.models import FIXED_MASKS, Model, ModelError
from jdrop.study.predictor import Predictor
from jdrop.study.run_folder import MethodPredictions
from jdrop.study.settings import Settings
from jdrop.study.training import NetworkSpec, TrainedNetworks, first_members
from jdrop.thinned import ThinningError, thin

WEIGHT_DECAYS = (0.0, 0.1, 1.0, 10.0)
"""Weight decays of AdamW, among which validation chooses for the plain network."""

EXACT_KEY_INDEX, OVERFITTING_KEY_INDEX, SWEEP_KEY_INDEX = 8, 9, 10
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


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: as results hold it.
        label: as tables show it; `{n}` is the size of an average, `{budget}` is in the settings.
        explanation: what the method is, in a sentence or two; may hold `{budget}`.
        group: the networks; methods that share a group share the training.
        predict: `predict(key, predictor, spec, trained)`: predictions with trained networks.
        unit: what a member is.
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
    predict: Callable[[Array, Predictor, NetworkSpec, TrainedNetworks], MethodPredictions]
    unit: Literal["networks", "masks"] = "networks"
    table_sizes: Callable[[int, int], tuple[int, ...]] = lambda num_members, budget: (num_members,)
    color: str = "#444444"
    marker: str = "h"
    is_curve: bool = False


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


def _long(settings: Settings, model: Model, inputs: Any) -> NetworkSpec:
    epochs = settings.budget * settings.epochs
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


# Predictions.


def _predict_with_all(
    key: Array, predictor: Predictor, spec: NetworkSpec, trained: TrainedNetworks
) -> MethodPredictions:
    """Weight scaling of every network."""
    return predictor.read_without_dropout(spec.network, trained.variables)


def _predict_with_sampled_masks(
    key: Array, predictor: Predictor, spec: NetworkSpec, trained: TrainedNetworks
) -> MethodPredictions:
    """Many masks of the first network of each replicate."""
    firsts = first_members(trained.variables, predictor.settings.replicates)
    return predictor.read_with_masks(key, spec.network, firsts)


def _predict_with_best_state(
    key: Array, predictor: Predictor, spec: NetworkSpec, trained: TrainedNetworks
) -> MethodPredictions:
    """The first network of each replicate, which has no weight decay, in its best state."""
    firsts = first_members(trained.best_variables, predictor.settings.replicates)
    return predictor.read_without_dropout(spec.network, firsts)


def _predict_with_best_weight_decay(
    key: Array, predictor: Predictor, spec: NetworkSpec, trained: TrainedNetworks
) -> MethodPredictions:
    """The network of each replicate whose weight decay is best on the held-out examples."""
    replicates = predictor.settings.replicates
    losses = np.reshape(trained.log.last_losses, (spec.members, replicates))
    chosen = losses.argmin(0) * replicates + np.arange(replicates)
    variables = jax.tree.map(lambda leaf: leaf[chosen], trained.variables)
    return predictor.read_without_dropout(spec.network, variables, networks_per_member=spec.members)


def _predict_with_each_mask(
    key: Array, predictor: Predictor, spec: NetworkSpec, trained: TrainedNetworks
) -> MethodPredictions:
    """Every fixed mask of Masksembles, one after another."""
    return predictor.read_without_dropout(spec.network, separate_masks(trained.variables))


def separate_masks(variables: Variables) -> Variables:
    """Masksembles as networks with one mask each.

    Args:
        variables: of R networks with M masks each.

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
            predict=_predict_with_all,
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
            predict=_predict_with_all,
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
            predict=_predict_with_sampled_masks,
            unit="masks",
            color="#009E73",
            marker="^",
            is_curve=True,
        ),
        Method(
            name="dropout-thinned",
            label="thinned dropout",
            explanation="A network trained with dropout that deletes blocks of units, the same for "
            "the whole batch. Training computes only the thinned network. The network "
            "predicts without dropout (weight scaling).",
            group=NetworkGroup("dropout-thinned", 11, _thinned, is_control=False),
            predict=_predict_with_all,
            color="#000000",
            marker="p",
        ),
        Method(
            name="small",
            label="{n} small plain",
            explanation="Narrow networks without dropout, averaged. Together they have the "
            "parameters of one network.",
            group=NetworkGroup("small", 2, _small),
            predict=_predict_with_all,
            color="#56B4E9",
            marker="v",
        ),
        Method(
            name="wide",
            label="{n} wide plain",
            explanation="A network without dropout that has the parameters of {budget} networks.",
            group=NetworkGroup("wide", 3, _wide),
            predict=_predict_with_all,
            color="#332288",
            marker="D",
        ),
        Method(
            name="long",
            label="dropout, {budget}x epochs",
            explanation="A network trained with dropout for {budget} times the epochs, predicting "
            "by weight scaling.",
            group=NetworkGroup("long", 4, _long),
            predict=_predict_with_all,
            color="#882255",
            marker="P",
        ),
        Method(
            name="early-stopping",
            label="early stopping",
            explanation="A network without dropout, taken at the epoch with the smallest loss on a "
            "held-out tenth of the training examples. It is not trained again on all of"
            " them.",
            group=_REGULARISED_NETWORKS,
            predict=_predict_with_best_state,
            color="#8C8C8C",
            marker="<",
        ),
        Method(
            name="weight-decay",
            label="weight decay",
            explanation="A network without dropout trained by AdamW, with the decay that was best "
            "on a held-out tenth of the training examples. It is not trained again on "
            "all of them.",
            group=_REGULARISED_NETWORKS,
            predict=_predict_with_best_weight_decay,
            color="#999933",
            marker=">",
        ),
        Method(
            name="fixed-masks",
            label="{n} with fixed masks",
            explanation="Thinned networks with separate weights, averaged. Each keeps one mask for "
            "its whole training: dropout without shared weights.",
            group=NetworkGroup("fixed-masks", 6, _fixed_masks),
            predict=_predict_with_all,
            color="#CC79A7",
            marker="X",
        ),
        Method(
            name="masksembles",
            label="Masksembles, {n}",
            explanation="One network trained with a few fixed masks in turn. It predicts with each "
            "mask; the predictions are averaged.",
            group=NetworkGroup("masksembles", 7, _masksembles),
            predict=_predict_with_each_mask,
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
