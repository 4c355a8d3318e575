"""Networks of classes for several seeds: trained, read, and averaged over all subsets of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jdrop import ensemble, inference, metrics
from jdrop.network import Network, Variables
from jdrop.statistics import EnsembleCurve, EnsembleEquivalent
from jdrop.study.data import Dataset, Progress
from jdrop.study.models import Model
from jdrop.study.reproduce.protocol import labelled

SCORES = ("nll", "error")


@dataclass(frozen=True)
class Training:
    """How networks train, and with how many masks the dropout networks are read.

    Attributes:
        optimizer: any optax optimizer.
        num_networks: of each sort, plain and with dropout.
        num_epochs: how many passes over the examples.
        batch_size: an epoch leaves out the examples that fill no batch.
        num_samples: how many masks.
        batching: see `jdrop.ensemble.fit_ensemble`.
    """

    optimizer: optax.GradientTransformation
    num_networks: int
    num_epochs: int
    batch_size: int
    num_samples: int
    batching: str


@dataclass(frozen=True)
class Scores:
    """The NLL, in nats, and the error, in percent, of plain networks and of dropout networks.

    Attributes:
        values: by method and score, such as "one-nll", a value for each network. The methods: "one"
            plain network; the "average" of all, with the values of `losses_of_averages`; one
            dropout network by weight "scaling", and by "masks".
        worth: by reading and score, such as "masks-nll", how many plain networks a dropout network
            is worth; empty with a single network.
    """

    values: dict[str, list[float]]
    worth: dict[str, EnsembleEquivalent]


def compare(
    key: Array, model: Model, data: Dataset, training: Training, progress: Progress
) -> Scores:
    """Trains networks without dropout and networks with it, and scores both.

    Args:
        key: consumed; network `i` of either sort depends on the key and on `i` alone.
        model: of which both sorts are made.
        data: the examples.
        training: of both sorts.
        progress: is called after each epoch, and with the networks that are read.
    """
    plain_key, dropout_key, mask_key = jax.random.split(key, 3)
    variables = fit(plain_key, model.plain, data, training, labelled(progress, "plain"))
    plain = read_deterministic(model.plain, variables, data.test_inputs)
    variables = fit(dropout_key, model.dropout, data, training, labelled(progress, "dropout"))
    readings = {
        "scaling": read_deterministic(model.dropout, variables, data.test_inputs),
        "masks": read_monte_carlo(
            mask_key, model.dropout, variables, data.test_inputs, training.num_samples, progress
        ),
    }
    return score(plain, readings, data.test_labels)


def score(plain: Array, readings: Mapping[str, Array], labels: np.ndarray) -> Scores:
    """Scores predictions; see `Scores`.

    Args:
        plain: log-probabilities `[network, example, class]` of networks without dropout.
        readings: by name, those of as many dropout networks.
        labels: `[example]`.
    """
    averages = losses_of_averages(plain, labels)
    losses = {name: losses_of_each(log_probs, labels) for name, log_probs in readings.items()}
    losses["one"] = {score: by_size[:, 0] for score, by_size in averages.items()}
    losses["average"] = {score: by_size[:, -1] for score, by_size in averages.items()}
    factors = {"nll": 1, "error": 100}
    return Scores(
        values={
            f"{method}-{score}": (factor * by_score[score].mean(1)).tolist()
            for method, by_score in losses.items()
            for score, factor in factors.items()
        },
        worth={
            f"{name}-{score}": EnsembleCurve(averages[score]).equivalent(losses[name][score])
            for name in readings
            for score in SCORES
            if len(plain) > 1
        },
    )


def fit(
    key: Array, network: Network, data: Dataset, training: Training, progress: Progress
) -> Variables:
    """Trains networks on all training examples.

    Args:
        key: consumed; network `i` depends on the key and on `i` alone.
        network: what to train.
        data: the examples.
        training: how.
        progress: is called after each epoch.
    """
    init_key, fit_key = jax.random.split(key)
    inputs, labels = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)
    state = ensemble.init_ensemble(
        init_key, network, training.optimizer, inputs[:1], ensemble_size=training.num_networks
    )
    for epoch in range(training.num_epochs):
        progress("epochs", epoch, training.num_epochs)
        # A fit in parts, with clones of one key, equals the fit in one.
        state, _ = ensemble.fit_ensemble(
            jax.random.clone(fit_key),
            state,
            inputs,
            labels,
            num_epochs=1,
            batch_size=training.batch_size,
            batching=training.batching,
        )
        jax.block_until_ready(state.step)
    progress("epochs", training.num_epochs, training.num_epochs)
    return state.variables


def read_deterministic(network: Network, variables: Variables, inputs: np.ndarray) -> Array:
    """The log-probabilities of each network with all units, `[member, example, class]`."""
    return ensemble.predict(None, network, variables, jnp.asarray(inputs), members_at_once=1)


def read_monte_carlo(
    key: Array,
    network: Network,
    variables: Variables,
    inputs: np.ndarray,
    num_samples: int,
    progress: Progress,
) -> Array:
    """The log-probabilities of each network, averaged over masks, `[member, example, class]`.

    Args:
        key: consumed; the masks of network `i` depend on the key and on `i` alone.
        network: with dropout.
        variables: of all networks.
        inputs: `[example, ...]`.
        num_samples: how many masks.
        progress: is called with the networks that are read.
    """
    num_networks = jax.tree.leaves(variables)[0].shape[0]
    averages = []
    for index, member_key in enumerate(ensemble.member_keys(key, num_networks)):
        progress("networks read with masks", index, num_networks)
        member = jax.tree.map(lambda leaf, index=index: leaf[index], variables)
        average = inference.monte_carlo(
            member_key, network, member, jnp.asarray(inputs), num_samples=num_samples
        )
        averages.append(jax.block_until_ready(average))
    progress("networks read with masks", num_networks, num_networks)
    return jnp.stack(averages)


def losses_of_each(log_probs: Array, labels: np.ndarray) -> dict[str, np.ndarray]:
    """By score, the losses of each network, `[member, example]`, float64.

    Args:
        log_probs: `[member, example, class]`.
        labels: `[example]`.
    """
    losses = jax.vmap(metrics.losses, in_axes=(0, None))(log_probs, jnp.asarray(labels))
    return {score: np.asarray(losses[score], np.float64) for score in SCORES}


def losses_of_averages(log_probs: Array, labels: np.ndarray) -> dict[str, np.ndarray]:
    r"""By score, jackknife values of the losses of averages, `[network, size, example]`, float64.

    $$v_i(l) = \bar L(l) + (n - 1) \left(\frac{1}{n} \sum_j \bar L_{-j}(l) - \bar L_{-i}(l)\right)$$

    Here $\bar L(l)$ is the mean loss of the averaged probabilities of $l$ networks, over all
    subsets of the $n$. $\bar L_{-i}(l)$ is the same without network $i$; for $l = n$ it is the loss
    of the average of all other networks. So the mean of the values is $\bar L(l)$, and Student's
    interval of them is the jackknife's, over the choice of all networks. The values of single
    networks, $l = 1$, are their own losses.

    Intervals of the jackknife tend to be too wide, those of errors above all: Efron and Stein 1981,
    doi:10.1214/aos/1176345462.

    Args:
        log_probs: `[network, example, class]` of the $n$ networks.
        labels: `[example]`.
    """
    num_networks = len(log_probs)

    def losses_of_subset(members: Array) -> dict[str, Array]:
        losses = metrics.losses(inference.pool(log_probs[members]), jnp.asarray(labels))
        return {score: losses[score] for score in SCORES}

    values: dict[str, list[np.ndarray]] = {score: [] for score in SCORES}
    without = dict.fromkeys(SCORES, np.zeros((1, 1)))
    for size in range(1, num_networks + 1):
        subsets = np.array(list(combinations(range(num_networks), size)))
        lacks = np.stack([(subsets != index).all(1) for index in range(num_networks)])
        for score, losses in jax.lax.map(losses_of_subset, jnp.asarray(subsets)).items():
            of_subsets = np.asarray(losses, np.float64)
            if size < num_networks:
                without[score] = lacks @ of_subsets / lacks.sum(1, keepdims=True)
            deviations = without[score].mean(0) - without[score]
            values[score].append(of_subsets.mean(0) + (num_networks - 1) * deviations)
    return {score: np.stack(of_sizes, 1) for score, of_sizes in values.items()}
