"""Exact averages over all masks of small networks, and ensembles of masked networks.

Warde-Farley et al. 2014.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jdrop import apply_mask, ensemble, inference, metrics
from jdrop.network import DropoutSite, Network, Variables, predict
from jdrop.study.data import Dataset, Progress, images
from jdrop.study.models import MLP, Model
from jdrop.study.reproduce import published
from jdrop.study.reproduce.protocol import Measure, Options, PartResult, Protocol

RATE = 0.5
INPUT_RATE = 0.2
"""Of the networks on ten digits alone: masks of many inputs cannot be enumerated."""

SMALL_UNITS = (10, 10)
NUM_SMALL_NETWORKS = 10
NUM_SMALL_EPOCHS = 30
SMALL_BATCH_SIZE = 100
LEARNING_RATES = (5e-4, 5e-3)
WEIGHT_DECAYS = (1e-6, 1e-2)
MAX_TEST_EXAMPLES = 300
NUM_TOY_EXAMPLES = 500

LARGE_UNITS = (128, 128)
NUM_SEEDS = 5
NUM_LARGE_EPOCHS = 40
LARGE_BATCH_SIZE = 50
LARGE_TRAIN_SIZE = 2000
LARGE_LEARNING_RATE = 1e-3
UNTIED_SIZES = (1, 5, 20)

TOY, DIGITS_2_3, DIGITS_4_9 = "toy", "MNIST 2, 3", "MNIST 4, 9"
TEN_DIGITS = "MNIST, ten digits"
SMALL_PARTS = (TOY, DIGITS_2_3, DIGITS_4_9)


@dataclass(frozen=True)
class Examples:
    """The examples of a task of classification.

    Attributes:
        train_inputs: `[example, feature]`, float32.
        train_labels: `[example]`, int32.
        test_inputs: `[example, feature]`, float32.
        test_labels: `[example]`, int32.
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray


def make_protocol() -> Protocol:
    """The protocol, on a toy problem, two pairs of digits, and all digits."""
    num_units = sum(SMALL_UNITS)
    rates, decays = (
        f"between {low:g} and {high:g}" for low, high in (LEARNING_RATES, WEIGHT_DECAYS)
    )
    sizes = {f"untied-{size}": size for size in UNTIED_SIZES}
    return Protocol(
        name="warde-farley",
        title="Exact averages over masks, and networks with untied masks",
        paper="Warde-Farley et al. 2014, An empirical analysis of dropout in piecewise linear "
        "networks",
        url="https://arxiv.org/abs/1312.6197",
        summary=(
            f"Networks of two hidden layers with {SMALL_UNITS[0]} rectifiers each train with "
            f"dropout at {RATE:g} on hidden units, {NUM_SMALL_NETWORKS} on each task of two "
            "classes. Each network has another learning rate and weight decay.",
            f"All 2^{num_units} masks of a network give its exact arithmetic and geometric "
            "averages. Weight scaling stands beside them.",
            f"On ten digits, one dropout network stands beside ensembles of {UNTIED_SIZES[-1]} "
            "networks. Each of these has one fixed mask, drawn before its training, and weights of "
            f"its own. {NUM_SEEDS} seeds repeat this.",
            "An interval is over networks, or over seeds. The test examples are the same for all, "
            "and so their choice adds nothing to it.",
            "No clear difference means that an interval holds 0; it does not prove equality. If "
            "all six such differences were 0, at least one interval would miss it with a "
            "probability of about 0.26.",
        ),
        leaves_open=(
            "The paper's tables and figures were not read for this protocol. Its statements are "
            "what we remember of the paper, without numbers. That the geometric average is close "
            "to the arithmetic one is in Goodfellow et al. 2016, Deep Learning, section 7.12.",
            "Data sets, hyperparameters and epochs of the paper are not known here beyond two "
            f"layers of {SMALL_UNITS[0]} units, a toy problem and pairs of digits. The choices "
            f"here: Adam, learning rates {rates}, weight decays {decays}, both log-uniform, "
            f"{NUM_SMALL_EPOCHS} epochs and batches of {SMALL_BATCH_SIZE}. The epochs of the paper "
            "in this report are these.",
            "The toy problem of the paper is not known. Here the class is the sign of the product "
            f"of two normal inputs, which are seen with noise; {NUM_TOY_EXAMPLES} examples train.",
            f"Inputs of the small networks are not dropped, since {num_units} hidden units are "
            f"what can be enumerated. At most {MAX_TEST_EXAMPLES} test examples of each task, "
            "evenly spaced, are read, to save time.",
            "The paper has one sigmoid output. The two outputs with a softmax here give the same "
            "predictions, but other steps of training.",
            f"Ensembles of the paper have up to 360 networks, here {UNTIED_SIZES[-1]}. These "
            f"have two layers of {LARGE_UNITS[0]} units, train on {LARGE_TRAIN_SIZE:,} digits "
            f"for {NUM_LARGE_EPOCHS} epochs, and drop inputs at {INPUT_RATE:g}. Dropout and untied "
            "networks share all settings; none is tuned for either.",
        ),
        replicate="seed",
        spread="standard error",
        measures={
            "weight-scaling": Measure("error WS", "Weight scaling; percent of the test examples."),
            "geometric": Measure("error GM", "The exact geometric average, in percent."),
            "arithmetic": Measure("error AM", "The exact arithmetic average, in percent."),
            "scaling-difference": Measure(
                "error WS − GM",
                "The paired difference; below 0, weight scaling is better.",
                is_difference=True,
            ),
            "pool-difference": Measure(
                "error AM − GM",
                "The paired difference; below 0, the arithmetic average is better.",
                is_difference=True,
            ),
            "scaling-nll-difference": Measure(
                "NLL WS − GM", "The same for the NLL, in nats.", is_difference=True
            ),
            "pool-nll-difference": Measure(
                "NLL AM − GM", "The same for the NLL, in nats.", is_difference=True
            ),
            "dropout": Measure(
                "error dropout", "One dropout network, read by weight scaling; in percent."
            ),
            **{
                name: Measure(
                    f"error untied, {size}",
                    "The average of so many networks with a fixed mask each, in percent.",
                )
                for name, size in sizes.items()
            },
            "untied-difference": Measure(
                f"error untied, {UNTIED_SIZES[-1]} − dropout",
                "The paired difference; above 0, the dropout network is better.",
                is_difference=True,
            ),
            "untied-nll-difference": Measure(
                f"NLL untied, {UNTIED_SIZES[-1]} − dropout",
                "The same for the NLL, in nats.",
                is_difference=True,
            ),
        },
        published=published.WARDE_FARLEY,
        parts=(*SMALL_PARTS, TEN_DIGITS),
        files=tuple(f"mnist/{file}.gz" for file in images.FILES),
        run_part=_run_part,
    )


def _run_part(part: str, options: Options, progress: Progress) -> PartResult:
    index = (*SMALL_PARTS, TEN_DIGITS).index(part)
    part_key = jax.random.fold_in(jax.random.key(options.seed), index)
    if part == TEN_DIGITS:
        data = load_digits(options.data_dir, LARGE_TRAIN_SIZE)
        examples = Examples(
            data.train_inputs, data.train_labels, data.test_inputs, data.test_labels
        )
        num_epochs, of_paper = options.epochs(NUM_LARGE_EPOCHS), NUM_LARGE_EPOCHS
        values = compare_untied(part_key, examples, options.count(NUM_SEEDS), num_epochs, progress)
    else:
        if part == TOY:
            examples = toy_problem(NUM_TOY_EXAMPLES, MAX_TEST_EXAMPLES)
        else:
            pair = (2, 3) if part == DIGITS_2_3 else (4, 9)
            examples = pair_of_digits(load_digits(options.data_dir, None), pair)
        num_epochs, of_paper = options.epochs(NUM_SMALL_EPOCHS), NUM_SMALL_EPOCHS
        values = compare_exact(
            part_key, examples, options.count(NUM_SMALL_NETWORKS), num_epochs, progress
        )
    return PartResult({part: values}, num_epochs, of_paper, seconds=0.0)


def load_digits(data_dir: Path, train_size: int | None) -> Dataset:
    """MNIST; with a train size, a stratified subset of the training examples."""
    return images.load("mnist", train_size=train_size, label_noise=0.0, seed=0, data_dir=data_dir)


def pair_of_digits(data: Dataset, pair: tuple[int, int]) -> Examples:
    """The examples of two digits, with the labels 0 and 1; see `MAX_TEST_EXAMPLES`."""
    is_train, is_test = (np.isin(labels, pair) for labels in (data.train_labels, data.test_labels))
    test_rows = np.flatnonzero(is_test)
    # The first half of MNIST's test images is easier than the second.
    spaced = np.linspace(0, len(test_rows) - 1, min(len(test_rows), MAX_TEST_EXAMPLES))
    test_rows = test_rows[spaced.astype(int)]
    return Examples(
        train_inputs=data.train_inputs[is_train],
        train_labels=(data.train_labels[is_train] == pair[1]).astype(np.int32),
        test_inputs=data.test_inputs[test_rows],
        test_labels=(data.test_labels[test_rows] == pair[1]).astype(np.int32),
    )


def toy_problem(num_train: int, num_test: int) -> Examples:
    """Two normal inputs with noise; the class is the sign of the product without noise."""
    generator = np.random.default_rng(0)
    clean = generator.normal(size=(num_train + num_test, 2))
    inputs = (clean + 0.3 * generator.normal(size=clean.shape)).astype(np.float32)
    labels = (clean.prod(1) > 0).astype(np.int32)
    return Examples(inputs[:num_train], labels[:num_train], inputs[num_train:], labels[num_train:])


def compare_exact(
    key: Array, examples: Examples, num_networks: int, num_epochs: int, progress: Progress
) -> dict[str, list[float]]:
    """Trains small dropout networks, and reads each by weight scaling and by all masks.

    Args:
        key: consumed; network `i` depends on the key and on `i` alone.
        examples: of two classes.
        num_networks: how many networks, each with another learning rate and weight decay.
        num_epochs: how many passes over the examples.
        progress: is called with the networks that are read.

    Returns:
        By measure, a value for each network.
    """
    network = Model(lambda: MLP(SMALL_UNITS, 2, RATE)).dropout
    setting_key, fit_key = jax.random.split(key)
    variables = _fit(
        fit_key,
        network,
        examples,
        draw_settings(setting_key, num_networks),
        num_epochs=num_epochs,
        batch_size=min(SMALL_BATCH_SIZE, len(examples.train_labels)),
    )
    inputs, labels = jnp.asarray(examples.test_inputs), jnp.asarray(examples.test_labels)
    scores: dict[str, list[float]] = {}
    for index in range(num_networks):
        progress("networks with all masks", index, num_networks)
        member = jax.tree.map(lambda leaf, index=index: leaf[index], variables)
        averages = average_all_masks(network, member, inputs)
        readings = {
            "weight-scaling": predict(None, network, member, inputs),
            "geometric": averages.geometric,
            "arithmetic": averages.arithmetic,
        }
        for name, log_probs in readings.items():
            _append_scores(scores, name, log_probs, labels)
    progress("networks with all masks", num_networks, num_networks)
    for difference, reading in (("scaling", "weight-scaling"), ("pool", "arithmetic")):
        scores[f"{difference}-difference"] = _minus(scores[reading], scores["geometric"])
        scores[f"{difference}-nll-difference"] = _minus(
            scores[f"{reading}-nll"], scores["geometric-nll"]
        )
    return _without_nll(scores)


@partial(jax.jit, static_argnums=0)
def average_all_masks(
    network: Network, variables: Variables, inputs: Array
) -> inference.Enumerated:
    """The exact averages over all masks of two hidden layers.

    The average over the masks of the second layer, averaged over those of the first, is the average
    over all masks. So the first layer's units are computed once for each mask of that layer. A
    linear layer follows the second mask, so weight scaling of the second layer is exactly its
    geometric average.

    Args:
        network: an `MLP` of two hidden layers with dropout on hidden units.
        variables: of one network.
        inputs: `[batch, feature]`.
    """
    first, second = ({f"Dropout_{layer}": np.full(SMALL_UNITS[layer], RATE)} for layer in (0, 1))

    def log_probs(masks: dict[str, Array]) -> Array:
        def apply_given(site: DropoutSite, units: Array) -> Array:
            if site.name not in masks:
                return units
            return apply_mask(masks[site.name][None], units, site.rate)

        return predict(None, network.replace_dropout(apply_given), variables, inputs)

    def average_second(masks: dict[str, Array]) -> Array:
        return inference.enumerate_masks(
            lambda others: log_probs({**masks, **others}), second, chunk_size=1024
        ).arithmetic

    return inference.Enumerated(
        arithmetic=inference.enumerate_masks(average_second, first, chunk_size=1).arithmetic,
        geometric=inference.enumerate_masks(log_probs, first).geometric,
    )


def compare_untied(
    key: Array, examples: Examples, num_seeds: int, num_epochs: int, progress: Progress
) -> dict[str, list[float]]:
    """Trains a dropout network and networks with fixed masks for each seed.

    Args:
        key: consumed; what belongs to seed `i` depends on the key and on `i` alone.
        examples: of ten classes.
        num_seeds: how many dropout networks, and ensembles.
        num_epochs: how many passes over the examples.
        progress: is called when networks are trained.

    Returns:
        By measure, a value for each seed.
    """
    model = Model(lambda: MLP(LARGE_UNITS, 10, RATE, INPUT_RATE))
    dropout_key, untied_key = jax.random.split(key)
    inputs, labels = jnp.asarray(examples.test_inputs), jnp.asarray(examples.test_labels)

    def train_and_predict(key: Array, network: Network, num_networks: int) -> Array:
        settings = np.full(num_networks, LARGE_LEARNING_RATE), np.zeros(num_networks)
        batch_size = min(LARGE_BATCH_SIZE, len(examples.train_labels))
        variables = _fit(
            key, network, examples, settings, num_epochs=num_epochs, batch_size=batch_size
        )
        return ensemble.predict(None, network, variables, inputs)

    num_networks = max(UNTIED_SIZES)
    dropout = train_and_predict(dropout_key, model.dropout, num_seeds)
    progress("trained networks", num_seeds, num_seeds * (1 + num_networks))
    untied = train_and_predict(untied_key, model.masked(None), num_seeds * num_networks)
    progress("trained networks", num_seeds * (1 + num_networks), num_seeds * (1 + num_networks))
    untied = untied.reshape(num_seeds, num_networks, *untied.shape[1:])
    scores: dict[str, list[float]] = {}
    for one, members in zip(dropout, untied, strict=True):
        _append_scores(scores, "dropout", one, labels)
        for size in UNTIED_SIZES:
            pooled = inference.pool(members[:size])
            _append_scores(scores, f"untied-{size}", pooled, labels)
    largest = f"untied-{num_networks}"
    scores["untied-difference"] = _minus(scores[largest], scores["dropout"])
    scores["untied-nll-difference"] = _minus(scores[f"{largest}-nll"], scores["dropout-nll"])
    return _without_nll(scores)


Settings = tuple[np.ndarray, np.ndarray]
"""The learning rate and the weight decay of each network."""


def draw_settings(key: Array, num_networks: int) -> Settings:
    """Draws settings log-uniformly; more networks keep the first ones.

    Args:
        key: consumed.
        num_networks: how many networks.
    """
    keys = ensemble.member_keys(key, num_networks)
    uniform = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys))
    learning_rates, weight_decays = (
        low * (high / low) ** share
        for (low, high), share in zip((LEARNING_RATES, WEIGHT_DECAYS), uniform.T, strict=True)
    )
    return learning_rates, weight_decays


def _fit(
    key: Array,
    network: Network,
    examples: Examples,
    settings: Settings,
    *,
    num_epochs: int,
    batch_size: int,
) -> Variables:
    """Trains networks with Adam, each with its settings."""
    init_key, fit_key = jax.random.split(key)
    learning_rates, weight_decays = (jnp.asarray(values, jnp.float32) for values in settings)
    inputs, labels = jnp.asarray(examples.train_inputs), jnp.asarray(examples.train_labels)
    optimizer = optax.inject_hyperparams(_adamw)(learning_rate=0.0, weight_decay=0.0)
    state = ensemble.init_ensemble(
        init_key, network, optimizer, inputs[:1], ensemble_size=len(learning_rates)
    )
    hyperparams = {"learning_rate": learning_rates, "weight_decay": weight_decays}
    state = replace(state, opt_state=state.opt_state._replace(hyperparams=hyperparams))
    state, _ = ensemble.fit_ensemble(
        fit_key, state, inputs, labels, num_epochs=num_epochs, batch_size=batch_size
    )
    return state.variables


def _adamw(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, weight_decay=weight_decay)


def _append_scores(
    scores: dict[str, list[float]], name: str, log_probs: Array, labels: Array
) -> None:
    """Appends the error in percent and the NLL of a reading."""
    scores.setdefault(name, []).append(100 * float(metrics.error(log_probs, labels)))
    scores.setdefault(f"{name}-nll", []).append(float(metrics.nll(log_probs, labels)))


def _minus(one: list[float], other: list[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _without_nll(scores: dict[str, list[float]]) -> dict[str, list[float]]:
    """The scores without the NLL of single readings, of which only differences are shown."""
    return {name: values for name, values in scores.items() if not name.endswith("-nll")}
