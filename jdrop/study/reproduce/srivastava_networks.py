"""Networks of the figures of Srivastava et al. 2014: trained for all seeds at once, and read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jdrop import dropout, ensemble, inference, metrics
from jdrop.constraints import max_norm
from jdrop.inference import RunningAverage
from jdrop.network import DropoutSite, Network, Variables, predict
from jdrop.study.data import Dataset, images
from jdrop.study.data.dataset import stratified
from jdrop.study.models import MLP, Model

BATCH_SIZE = 100
LEARNING_RATE = 0.1
MOMENTUM = (0.5, 0.95)
MAX_NORM = 3.0

MAX_READ_EXAMPLES = 10_000
"""Of the training examples, for the training error."""


def training_rows(labels: np.ndarray, train_size: int, seed: int, num_seeds: int) -> np.ndarray:
    """The training examples of each seed, `[seed, row]`, classes in proportion.

    For a seed, a larger set holds the smaller ones. More seeds keep the first ones.

    Args:
        labels: of all examples, `[example]`.
        train_size: how many examples a seed has.
        seed: of the run.
        num_seeds: how many networks with dropout, and ensembles.
    """
    generators = [np.random.default_rng((seed, replicate)) for replicate in range(num_seeds)]
    return np.stack([np.flatnonzero(stratified(rng, labels, train_size)) for rng in generators])


def updates_per_epoch(train_size: int) -> int:
    """The updates of an epoch: a batch is at most the whole training set."""
    return train_size // min(BATCH_SIZE, train_size)


class Trainer:
    """Trains networks of all seeds at once, and reads them on the test examples.

    Args:
        data: all examples.
        rows: the training examples of each seed, `[seed, row]`.
        num_epochs: how many passes over them.
    """

    def __init__(self, data: Dataset, rows: np.ndarray, num_epochs: int) -> None:
        self.rows, self.num_epochs = rows, num_epochs
        self.train_inputs = jnp.asarray(data.train_inputs)
        self.train_labels = jnp.asarray(data.train_labels)
        self.inputs, self.labels = jnp.asarray(data.test_inputs), jnp.asarray(data.test_labels)

    @property
    def num_seeds(self) -> int:
        """How many seeds."""
        return len(self.rows)

    def train(self, key: Array, network: Network, networks_per_seed: int) -> Variables:
        """Variables of all networks, `[seed * network, ...]`; those of a seed lie side by side."""
        init_key, fit_key = jax.random.split(key)
        train_size = self.rows.shape[1]
        state = ensemble.init_ensemble(
            init_key,
            network,
            make_optimizer(self.num_epochs * updates_per_epoch(train_size)),
            self.train_inputs[:1],
            ensemble_size=self.num_seeds * networks_per_seed,
        )
        state, _ = ensemble.fit_ensemble(
            fit_key,
            state,
            self.train_inputs,
            self.train_labels,
            num_epochs=self.num_epochs,
            batch_size=min(BATCH_SIZE, train_size),
            rows=jnp.asarray(np.repeat(self.rows, networks_per_seed, axis=0)),
            # On CPUs, weights of one network at a time stay in the cache.
            batching="scan" if jax.default_backend() == "cpu" else "vmap",
        )
        return state.variables

    def read(self, network: Network, variables: Variables) -> Array:
        """Log-probabilities of the test examples, `[seed, network, example, class]`."""
        log_probs = ensemble.predict(None, network, variables, self.inputs)
        return log_probs.reshape(self.num_seeds, -1, *log_probs.shape[1:])

    def score(self, log_probs: Array) -> dict[str, list[float]]:
        """Error and NLL of predictions `[seed, network, example, class]`: means over networks."""
        errors, nlls = score(log_probs, self.labels)
        return {"error": errors.mean(1).tolist(), "nll": nlls.mean(1).tolist()}

    def training_errors(self, network: Network, variables: Variables) -> list[float]:
        """The error of each seed's networks on training examples, see `MAX_READ_EXAMPLES`."""
        inputs = self.train_inputs[:MAX_READ_EXAMPLES]
        log_probs = ensemble.predict(None, network, variables, inputs)
        errors, _ = score(log_probs, self.train_labels[:MAX_READ_EXAMPLES])
        return errors.reshape(self.num_seeds, -1).mean(1).tolist()


def score(log_probs: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    """Error in percent and NLL in nats of predictions `[..., example, class]`, each `[...]`."""
    flat = log_probs.reshape(-1, *log_probs.shape[-2:])
    errors = [100 * float(metrics.error(one, labels)) for one in flat]
    nlls = [float(metrics.nll(one, labels)) for one in flat]
    shape = log_probs.shape[:-2]
    return np.array(errors).reshape(shape), np.array(nlls).reshape(shape)


def make_optimizer(num_updates: int) -> optax.GradientTransformation:
    r"""Gradient descent with the schedules and the max-norm of the protocol.

    $$v_t = m_t v_{t-1} + g_t, \quad w_t = w_{t-1} - \eta_t v_t$$

    with the momentum $m_t$, the learning rate $\eta_t$ and the gradient $g_t$. Then the weights
    into each unit are scaled down to the limit.
    """
    descent = optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.linear_schedule(LEARNING_RATE, 0.0, num_updates),
        momentum=optax.linear_schedule(*MOMENTUM, max(1, num_updates // 10)),
    )
    return optax.chain(descent, max_norm(MAX_NORM))


def make_network(hidden: tuple[int, ...], rate: float, input_rate: float) -> Network:
    """A network with the paper's dropout, or without any if both rates are 0."""
    network = Model(lambda: MLP(hidden, images.NUM_CLASSES, rate, input_rate))
    if rate == input_rate == 0:
        return network.plain
    return network.dropout.replace_dropout(_drop_unscaled)


def _drop_unscaled(site: DropoutSite, inputs: Array) -> Array:
    if site.deterministic:
        # The same as to multiply the weights that read these units.
        return inputs * (1 - site.rate)
    return dropout(site.make_key(), inputs, site.rate, scale=False)


def averages(log_probs: Array, size: int) -> Array:
    """Averages of disjoint groups of a seed's networks, `[seed, group, example, class]`."""
    num_groups = log_probs.shape[1] // size
    groups = log_probs[:, : num_groups * size].reshape(
        len(log_probs), num_groups, size, *log_probs.shape[2:]
    )
    return jax.vmap(jax.vmap(inference.pool))(groups)


@partial(jax.jit, static_argnames=("network", "num_masks"))
def mask_curve(
    key: Array,
    network: Network,
    variables: Variables,
    inputs: Array,
    labels: Array,
    *,
    num_masks: int,
) -> tuple[Array, Array]:
    """Error in percent and NLL of the averages of 1, 2, ... masks, each `[mask]`.

    The average of `k` masks is that of `jdrop.inference.monte_carlo` with the same key.
    """

    def sampled(sample: Array) -> Array:
        return predict(jax.random.fold_in(key, sample), network, variables, inputs)

    def add(average: RunningAverage, sample: Array) -> tuple[RunningAverage, tuple[Array, Array]]:
        average = average.add(sampled(sample))
        log_probs = average.log_probs()
        return average, (100 * metrics.error(log_probs, labels), metrics.nll(log_probs, labels))

    samples = jnp.arange(num_masks)
    start = RunningAverage.start(jax.eval_shape(sampled, samples[0]))
    return jax.lax.scan(add, start, samples)[1]
