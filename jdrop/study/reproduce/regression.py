"""Networks of one hidden layer for the splits of a table: all trained at once, then read.

A network predicts a normal distribution, so its outputs are a tuple `(mean, variance)`, each
`[batch]`, of standardised targets.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from scipy.special import logsumexp

import jdrop
from jdrop.batching import MemberMap
from jdrop.inference import RunningAverage
from jdrop.meshes import check_mesh, place
from jdrop.network import Network, Variables
from jdrop.orders import shuffle
from jdrop.study.data import Progress
from jdrop.study.reproduce.uci import Splits
from jdrop.train import LossFn, TrainState, gaussian_nll, train_step, weighted

MAX_REPORTS = 40
"""How often a training, or a reading by masks, reports its progress."""


@dataclass(frozen=True)
class Members:
    """The settings of each network, arrays with a leading member axis.

    Attributes:
        split: int, whose training rows the network sees.
        rate: float, of the dropout on the inputs and on the hidden layer; 0 for a plain network.
        weight_decay: float, the factor of the weights that is added to their gradient.
        noise_variance: float, of the standardised targets, where the network does not predict it.
    """

    split: np.ndarray
    rate: np.ndarray
    weight_decay: np.ndarray
    noise_variance: np.ndarray

    def __len__(self) -> int:
        return len(self.split)


@dataclass(frozen=True)
class Readings:
    """The predictions of each network for the test rows of its split, float64.

    Attributes:
        mean: `[member, row]`, the predicted standardised target.
        log_density: `[member, row]`, of the standardised target, in nats.
        variance: `[member, row]`, of the predicted distribution.
    """

    mean: np.ndarray
    log_density: np.ndarray
    variance: np.ndarray


def one_hidden_layer(num_units: int, *, predicts_variance: bool = False) -> Network:
    """A network `dropout -> dense -> rectifier -> dropout -> dense`.

    Its variables hold the rate of dropout and the variance of the noise beside the parameters. So
    one program trains networks of several rates.

    Args:
        num_units: of the hidden layer.
        predicts_variance: whether a second output gives the variance, by softplus plus 1e-6.
    """
    num_outputs = 2 if predicts_variance else 1

    def init_fn(key: Array, inputs: Array) -> Variables:
        hidden_key, output_key = jax.random.split(key)
        init = jax.nn.initializers.glorot_uniform()
        params = {
            "hidden": _dense(init(hidden_key, (inputs.shape[-1], num_units))),
            "output": _dense(init(output_key, (num_units, num_outputs))),
        }
        return {"params": params, "rate": jnp.zeros(()), "noise_variance": jnp.ones(())}

    def apply_fn(variables: Variables, inputs: Array, key: Array | None) -> tuple[Array, Array]:
        params: Any = variables["params"]
        x = inputs
        if key is not None:
            input_key, hidden_key = jax.random.split(key)
            x = jdrop.dropout(input_key, x, variables["rate"])
        x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        if key is not None:
            x = jdrop.dropout(hidden_key, x, variables["rate"])
        outputs = x @ params["output"]["kernel"] + params["output"]["bias"][None]
        if predicts_variance:
            return outputs[:, 0], jax.nn.softplus(outputs[:, 1]) + 1e-6
        return outputs[:, 0], jnp.broadcast_to(variables["noise_variance"], outputs.shape[:1])

    return Network(apply_fn, init_fn)


def _dense(kernel: Array) -> dict[str, Array]:
    return {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}


def squared_error(outputs: tuple[Array, Array], labels: Array) -> Array:
    """The squared error of the mean; the variance does not count."""
    return (outputs[0] - labels) ** 2


def adam_with_penalty(learning_rate: float) -> optax.GradientTransformation:
    """Adam on the gradient of the loss with a penalty of the squared kernels, as Keras has it.

    The factor is the hyperparameter `weight_decay` of each network. Biases have no penalty.
    """

    def make(weight_decay: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask=_is_kernel), optax.adam(learning_rate)
        )

    return optax.inject_hyperparams(make)(weight_decay=0.0)


def _is_kernel(params: Any) -> Any:
    return {layer: {"kernel": True, "bias": False} for layer in params}


def penalty(length_scale: float, rate: Any, num_rows: int, precision: Any) -> Any:
    r"""The weight decay of a dropout network with a prior: $l^2 (1 - p) / (N \tau)$.

    The published loss has $\lambda \sum w^2$ with $\lambda = l^2 (1 - p) / (2 N \tau)$, whose
    gradient is $2 \lambda w$.

    Args:
        length_scale: $l$ of the prior of the weights.
        rate: $p$, of dropout.
        num_rows: $N$, of the training part.
        precision: $\tau$, of the targets in their own unit.

    Reference:
        Gal and Ghahramani 2016, arXiv:1506.02142, equation 7.
    """
    return length_scale**2 * (1 - rate) / (num_rows * precision)


def members_with_prior(
    splits: Splits, networks_per_split: int, rate: Any, precision: Any, length_scale: float
) -> Members:
    """Dropout networks with a prior and with noise of one precision.

    Networks of one split lie side by side, so that fewer splits change no network.

    Args:
        splits: the examples.
        networks_per_split: how many networks each split has.
        rate: of dropout, a number or `[member]`.
        precision: of the targets in their own unit, a number or `[member]`.
        length_scale: of the prior; see `penalty`.
    """
    split = np.repeat(np.arange(splits.num_splits), networks_per_split)
    num_rows = splits.train_targets.shape[1]
    decay = penalty(length_scale, rate, num_rows, precision)
    return Members(
        split=split,
        rate=np.broadcast_to(rate, split.shape),
        weight_decay=np.broadcast_to(decay, split.shape),
        noise_variance=1 / (precision * splits.target_scale[split] ** 2),
    )


def fit(
    key: Array,
    network: Network,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    splits: Splits,
    members: Members,
    *,
    num_epochs: int,
    batch_size: int,
    progress: Progress,
) -> Variables:
    """Trains all members at once, each on the training rows of its split.

    Each epoch has every row once, in a new order. The last batch holds the rows that remain, as in
    Keras; `jdrop.train.fit` would leave them out.

    Args:
        key: consumed.
        network: from `one_hidden_layer`.
        optimizer: from `adam_with_penalty`.
        loss_fn: one loss for each row.
        splits: the examples.
        members: the settings of each network.
        num_epochs: how many passes over the rows.
        batch_size: rows of a step.
        progress: is called with the epochs that are done.

    Returns:
        The variables of all members, with a leading member axis.
    """
    mapped = _on_all_devices(len(members))
    if not np.any(members.rate):
        network = _without_masks(network)  # Masks of rate 0 take time and change nothing.
    init_key, fit_key = jax.random.split(key)
    shared, of_members = place(
        mapped.mesh,
        (init_key, splits.train_inputs[0, :1]),
        (jnp.arange(len(members)), *(jnp.asarray(array) for array in _settings(members))),
    )
    state = _init(shared, of_members, network, optimizer, weighted(loss_fn), mapped)
    (key, *data), of_members = place(
        mapped.mesh,
        (fit_key, splits.train_inputs, splits.train_targets),
        (jnp.arange(len(members)), jnp.asarray(members.split)),
    )
    for start, count in _chunks(num_epochs):
        shared = (jax.random.clone(key), *data, jnp.asarray(start))
        state = _fit_epochs(shared, (*of_members, state), count, batch_size, mapped)
        jax.block_until_ready(state.step)
        progress("epochs", start + count, num_epochs)
    return state.variables


def _without_masks(network: Network) -> Network:
    return Network(lambda variables, inputs, key: network(variables, inputs, None), network.init_fn)


def _settings(members: Members) -> tuple[np.ndarray, ...]:
    settings = (members.rate, members.weight_decay, members.noise_variance)
    return tuple(np.asarray(values, np.float32) for values in settings)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _init(
    shared: Any,
    of_members: Any,
    network: Network,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    mapped: MemberMap,
) -> TrainState:
    def init_member(
        shared: Any, index: Array, rate: Array, weight_decay: Array, noise_variance: Array
    ) -> TrainState:
        key, inputs = shared
        variables = network.init(jax.random.fold_in(key, index), inputs)
        variables = {**variables, "rate": rate, "noise_variance": noise_variance}
        state = TrainState.create(network, variables, optimizer, loss_fn)
        hyperparams = {**state.opt_state.hyperparams, "weight_decay": weight_decay}
        return replace(state, opt_state=state.opt_state._replace(hyperparams=hyperparams))

    return mapped(init_member, shared, *of_members)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _fit_epochs(
    shared: Any, of_members: Any, count: int, batch_size: int, mapped: MemberMap
) -> TrainState:
    def fit_member(shared: Any, index: Array, split: Array, state: TrainState) -> TrainState:
        key, inputs, targets, start = shared
        order_key, mask_key = jax.random.split(jax.random.fold_in(key, index))
        inputs, targets = inputs[split], targets[split]
        num_rows = len(targets)
        num_steps = -(-num_rows // batch_size)
        # Rows of weight 0 fill the last batch up.
        num_missing = num_steps * batch_size - num_rows
        weights = jnp.ones(num_rows)

        def batches(array: Array) -> Array:
            widths = [(0, num_missing)] + [(0, 0)] * (array.ndim - 1)
            return jnp.pad(array, widths).reshape(num_steps, batch_size, *array.shape[1:])

        def step(state: TrainState, batch: Any) -> tuple[TrainState, None]:
            step_key = jax.random.fold_in(mask_key, state.step)
            return train_step(step_key, state, batch)[0], None

        def epoch(state: TrainState, epoch_index: Array) -> tuple[TrainState, None]:
            order = shuffle(jax.random.fold_in(order_key, epoch_index), jnp.arange(num_rows))
            labels = batches(targets[order]), batches(weights)
            return jax.lax.scan(step, state, (batches(inputs[order]), labels))

        return jax.lax.scan(epoch, state, start + jnp.arange(count))[0]

    return mapped(fit_member, shared, *of_members)


def read_deterministic(
    network: Network, variables: Variables, splits: Splits, members: Members
) -> Readings:
    """Reads the networks without dropout: weight scaling.

    Args:
        network: of all members.
        variables: of all members.
        splits: with the test rows.
        members: the settings of each network.
    """
    mapped = _on_all_devices(len(members))
    data = place(mapped.mesh, _test_rows(splits), (jnp.asarray(members.split), variables))
    return Readings(*map(_as_double, _read_deterministic(*data, network, mapped)))


@partial(jax.jit, static_argnums=(2, 3))
def _read_deterministic(
    shared: Any, of_members: Any, network: Network, mapped: MemberMap
) -> tuple[Array, Array, Array]:
    def read(shared: Any, split: Array, variables: Variables) -> tuple[Array, Array, Array]:
        inputs, targets = (array[split] for array in shared)
        outputs = network(variables, inputs, None)
        return outputs[0], -gaussian_nll(outputs, targets), outputs[1]

    return mapped(read, shared, *of_members)


def read_monte_carlo(
    key: Array,
    network: Network,
    variables: Variables,
    splits: Splits,
    members: Members,
    *,
    num_samples: int,
    progress: Progress,
) -> Readings:
    r"""Reads the networks with sampled masks, a mask for each row and sample.

    The log-density is that of the mixture, $\log \frac{1}{T} \sum_t \mathcal{N}(y; \mu_t, v_t)$.
    The variance is the mean of $v_t$ plus the variance of $\mu_t$, which is summed from deviations:
    a mean square minus a squared mean would lose a small variance in float32. Memory does not grow
    with the number of samples.

    Args:
        key: consumed; a sample of a member depends on the key and on both indices alone.
        network: of all members.
        variables: of all members.
        splits: with the test rows.
        members: the settings of each network.
        num_samples: T, how many masks.
        progress: is called with the samples that are done.
    """
    mapped = _on_all_devices(len(members))
    inputs, targets = _test_rows(splits)
    rows = jnp.zeros((len(members), inputs.shape[1]))
    start = (rows, rows, rows, jax.vmap(RunningAverage.start)(rows))
    (key, *data), (*of_members, averages) = place(
        mapped.mesh,
        (key, inputs, targets),
        (jnp.arange(len(members)), jnp.asarray(members.split), variables, start),
    )
    for first, count in _chunks(num_samples):
        shared = (jax.random.clone(key), *data, jnp.asarray(first))
        averages = _add_samples(shared, (*of_members, averages), count, network, mapped)
        jax.block_until_ready(averages)
        progress("masks", first + count, num_samples)
    mean, variance_of_means, noise_variance, mixture = averages
    return Readings(
        mean=_as_double(mean),
        log_density=_as_double(mixture.log_probs()),
        variance=_as_double(noise_variance) + _as_double(variance_of_means),
    )


@partial(jax.jit, static_argnums=(2, 3, 4))
def _add_samples(
    shared: Any, of_members: Any, count: int, network: Network, mapped: MemberMap
) -> Any:
    def read(shared: Any, index: Array, split: Array, variables: Variables, averages: Any) -> Any:
        key, inputs, targets, first = shared
        member_key = jax.random.fold_in(key, index)
        inputs, targets = inputs[split], targets[split]

        def add(sample: Array, averages: Any) -> Any:
            mean, variance_of_means, noise_variance, mixture = averages
            outputs = network(variables, inputs, jax.random.fold_in(member_key, sample))
            share = 1 / (mixture.num_added + 1)
            next_mean = mean + share * (outputs[0] - mean)
            square = (outputs[0] - mean) * (outputs[0] - next_mean)
            return (
                next_mean,
                variance_of_means + share * (square - variance_of_means),
                noise_variance + share * (outputs[1] - noise_variance),
                mixture.add(-gaussian_nll(outputs, targets)),
            )

        return jax.lax.fori_loop(first, first + count, add, averages)

    return mapped(read, shared, *of_members)


def pooled(readings: Readings, ensemble_size: int) -> Readings:
    """The mixtures of networks that lie side by side, `[mixture, row]`.

    Args:
        readings: of all networks.
        ensemble_size: how many networks a mixture has.
    """
    shape = (-1, ensemble_size, readings.mean.shape[1])
    means = readings.mean.reshape(shape)
    return Readings(
        mean=means.mean(1),
        log_density=logsumexp(readings.log_density.reshape(shape), 1) - math.log(ensemble_size),
        variance=readings.variance.reshape(shape).mean(1) + means.var(1),
    )


def rmse(mean: np.ndarray, targets: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The root mean squared error of each member, `[member]`, in the targets' own unit.

    Args:
        mean: `[member, row]`, predicted standardised targets.
        targets: `[member, row]`, standardised.
        scale: `[member]`, the standard deviation of the training targets.
    """
    return scale * np.sqrt(np.mean((mean - targets) ** 2, 1))


def log_likelihood(log_density: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The mean log-density of each member's rows, `[member]`, of targets in their own unit.

    Args:
        log_density: `[member, row]`, of standardised targets.
        scale: `[member]`, the standard deviation of the training targets.
    """
    return np.mean(log_density, 1) - np.log(scale)


def _test_rows(splits: Splits) -> tuple[Array, Array]:
    return jnp.asarray(splits.test_inputs), jnp.asarray(splits.test_targets)


def _as_double(array: Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _on_all_devices(num_members: int) -> MemberMap:
    """All members at once, divided among the devices."""
    devices = jax.devices()[:num_members]
    return MemberMap(mesh=check_mesh(Mesh(np.array(devices), "member")))


def _chunks(total: int) -> list[tuple[int, int]]:
    """The first index and the length of each chunk, after which progress is reported."""
    size = max(1, -(-total // MAX_REPORTS))
    return [(start, min(size, total - start)) for start in range(0, total, size)]
