"""Training of one network: its state, one step, and a whole fit as a pure function of a key.

`jdrop.ensemble` maps these functions over keys to train many networks.
"""

import inspect
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec, Sharding
from jax.typing import ArrayLike

from jdrop.constraints import max_norm
from jdrop.convolutions import with_channels_last
from jdrop.losses import LossFn, compute_losses, cross_entropy, gaussian_nll, weighted
from jdrop.network import ApplyFn, Network, Variables, check_network
from jdrop.orders import shuffle

__all__ = [
    "Batch",
    "LossFn",
    "TrainState",
    "cross_entropy",
    "fit",
    "gaussian_nll",
    "max_norm",
    "train_step",
    "weighted",
]

Batch = tuple[Any, Any]
"""Inputs and labels, each an array `[batch, ...]` or any pytree of such arrays."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """One network in training. In an ensemble every array has a leading member axis.

    Attributes:
        variables: collections of arrays; the optimizer updates `params`.
        opt_state: the optimizer's state.
        step: the count of steps so far, an integer.
        network: the network in training.
        optimizer: any optax optimizer.
        loss_fn: one loss for each example, from outputs and labels; see `LossFn`.
    """

    variables: Variables
    opt_state: Any
    step: Any
    network: Network = field(metadata={"static": True})
    optimizer: optax.GradientTransformation = field(metadata={"static": True})
    loss_fn: LossFn = field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        network: ApplyFn,
        variables: Variables,
        optimizer: optax.GradientTransformation,
        loss_fn: LossFn = cross_entropy,
    ) -> "TrainState":
        """A state before its first step.

        Args:
            network: a `Network` or any `apply_fn(variables, inputs, key)`.
            variables: collections of arrays, `params` among them.
            optimizer: any optax optimizer.
            loss_fn: `loss_fn(outputs, labels)` -> `[batch]`; training minimises its mean. See
                `LossFn` for other losses.

        Raises:
            TypeError: a Flax module instead of a network.
            ValueError: variables without `params`.
        """
        check_network(network)
        if "params" not in variables:
            raise ValueError(
                f"variables must hold the collection 'params', got {sorted(variables)}; "
                "wrap bare parameters as {'params': params}."
            )
        return cls(
            variables=variables,
            opt_state=optimizer.init(variables["params"]),
            step=jnp.zeros((), jnp.int32),
            network=network if isinstance(network, Network) else Network(network),
            optimizer=optimizer,
            loss_fn=loss_fn,
        )


def train_step(key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
    """One step of dropout training: draw masks, take the gradient of the loss, update params.

    A network with a `step_rule` takes the step of that rule instead. The variables keep their
    structure: values that a module adds in training only, by `sow`, are left out.

    Args:
        key: the key of this step's masks; it is consumed.
        state: the network before the step.
        batch: a tuple of inputs and labels, each an array `[batch, ...]` or a pytree of such.

    Returns:
        The network after the step, and the mean loss of the batch before it; with a `loss_fn` that
        returns `(losses, aux)`, a tuple of the mean loss and `aux`.

    Raises:
        TypeError: no key, which would train without dropout; a `loss_fn` that returns no array.
        ValueError: losses that are not those of single examples, for instance because outputs
            `[batch, 1]` meet labels `[batch]`.

    Example:
        >>> import jdrop
        >>> def apply_fn(variables, inputs, key):
        ...     x = inputs if key is None else jdrop.dropout(key, inputs, 0.2)
        ...     return x @ variables["params"]
        >>> state = TrainState.create(apply_fn, {"params": jnp.zeros((3, 2))}, optax.sgd(0.1))
        >>> batch = jnp.ones((4, 3)), jnp.zeros(4, int)
        >>> state, loss = train_step(jax.random.key(0), state, batch)
        >>> int(state.step), round(float(loss), 4)
        (1, 0.6931)

    Reference:
        Hinton et al. 2012, arXiv:1207.0580.
    """
    if key is None:
        raise TypeError("train_step needs a key: without one it would train without dropout.")
    if state.network.step_rule is not None:
        return state.network.step_rule.step(key, state, batch)
    return with_channels_last(_take_step)(key, state, batch)


def _take_step(key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
    """The step of `train_step`, without a step rule."""
    inputs, labels = batch
    params = state.variables["params"]

    def mean_loss(params: Any, key: Array) -> tuple[Array, tuple[Variables, tuple[Any, ...]]]:
        variables = {**state.variables, "params": params}
        outputs, variables = state.network.apply_train(variables, inputs, key)
        losses, aux = compute_losses(state.loss_fn, outputs, labels)
        return jnp.mean(losses), (variables, aux)

    (loss, (variables, aux)), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, key)

    def loss_with_same_masks(params: Any) -> Array:
        return mean_loss(params, jax.random.clone(key))[0]

    extra_args = _accepted_args(
        state.optimizer, {"value": loss, "grad": grads, "value_fn": loss_with_same_masks}
    )
    updates, opt_state = state.optimizer.update(grads, state.opt_state, params, **extra_args)
    variables = {**variables, "params": optax.apply_updates(params, updates)}
    state = replace(state, variables=variables, opt_state=opt_state, step=state.step + 1)
    return state, (loss, *aux) if aux else loss


def _accepted_args(
    optimizer: optax.GradientTransformation, extra_args: dict[str, Any]
) -> dict[str, Any]:
    """The extra arguments that the optimizer's update accepts, for instance for a line search."""
    parameters = inspect.signature(optimizer.update).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return extra_args
    return {name: value for name, value in extra_args.items() if name in parameters}


@partial(jax.jit, static_argnames=("num_epochs", "batch_size", "batch_sharding"))
def fit(
    key: Array,
    state: TrainState,
    inputs: Any,
    labels: Any,
    *,
    num_epochs: int,
    batch_size: int,
    rows: ArrayLike | None = None,
    batch_sharding: Sharding | PartitionSpec | None = None,
) -> tuple[TrainState, Any]:
    """Trains one network for some epochs: a scan of `train_step` over shuffled batches.

    Each epoch shuffles the examples. If `batch_size` does not divide their number, each epoch
    leaves out the examples that remain. The order of an epoch and the masks of a step depend on
    the key and on the index of the epoch or step, counted from the first step of `state`. So a fit
    in parts, each with a clone of the same key, equals the fit in one.

    Args:
        key: consumed.
        state: the network to train further.
        inputs: all training inputs, an array `[example, ...]` or any pytree of such arrays.
        labels: all training labels, an array `[example, ...]` or any pytree of such arrays.
        num_epochs: how many passes over the examples.
        batch_size: how many examples each step takes.
        rows: integers `[row]`, the examples of an epoch; an example may occur several times. By
            default an epoch has every example once. Whether an index is that of an example is not
            checked, as usual in JAX.
        batch_sharding: splits each batch over devices, such as
            `NamedSharding(Mesh(jax.devices(), "batch"), PartitionSpec("batch"))`; the axes of the
            mesh must be of the type Auto. The results differ by rounding.

    Returns:
        The trained network, and the mean training loss of each epoch, `[epoch]`. With a `loss_fn`
        that returns `(losses, aux)`, a tuple of the mean loss and the mean of each array of `aux`
        over the steps of an epoch, `[epoch, ...]`.

    Raises:
        ValueError: a batch size that is not in [1, rows]; unequal numbers of inputs and labels; a
            state with a member axis; a negative number of epochs; rows that are no integers; the
            errors of `train_step`.

    Example:
        >>> network = Network(lambda variables, inputs, key: inputs @ variables["params"])
        >>> state = TrainState.create(network, {"params": jnp.zeros((3, 2))}, optax.sgd(0.1))
        >>> inputs, labels = jnp.eye(3), jnp.array([0, 1, 0])
        >>> state, losses = fit(
        ...     jax.random.key(0), state, inputs, labels, num_epochs=2, batch_size=1
        ... )
        >>> int(state.step), losses.shape
        (6, (2,))
    """
    if state.step.ndim:
        raise ValueError(
            "state must be of one network, got one with a member axis; train an ensemble with "
            "`jdrop.ensemble.fit_ensemble`."
        )
    if num_epochs < 0:
        raise ValueError(f"num_epochs must be at least 0, got {num_epochs}.")
    num_examples = count_examples(inputs, labels)
    rows = jnp.arange(num_examples) if rows is None else jnp.asarray(rows)
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(
            f"rows must be integers [row], the indices of examples, got {rows.dtype}"
            f"{list(rows.shape)}."
        )
    num_rows = rows.shape[0]
    if not 1 <= batch_size <= num_rows:
        raise ValueError(
            f"batch_size must lie in [1, {num_rows}], the number of examples of an epoch, got "
            f"{batch_size}."
        )
    order_key, mask_key, shuffle_key = jax.random.split(key, 3)

    def step(state: TrainState, batch_rows: Array) -> tuple[TrainState, Any]:
        batch = jax.tree.map(lambda array: array[batch_rows], data)
        return fit_step(mask_key, state, split_batch(batch, batch_sharding))

    def epoch(state: TrainState, _: None) -> tuple[TrainState, Any]:
        state, batches = begin_epoch(order_key, shuffle_key, state, rows, batch_size)
        state, losses = jax.lax.scan(step, state, batches)
        return state, jax.tree.map(partial(jnp.mean, axis=0), losses)

    data = (inputs, labels)
    return jax.lax.scan(epoch, state, length=num_epochs)


def begin_epoch(
    order_key: Array, shuffle_key: Array, state: TrainState, rows: Array, batch_size: int
) -> tuple[TrainState, Array]:
    """The state in which an epoch of `fit` begins, and the rows of its steps, `[step, batch]`.

    Args:
        order_key: of all epochs; the order depends on the index of the epoch too.
        shuffle_key: the same for a step rule's choices.
        state: of one network, after a whole number of epochs.
        rows: integers `[row]`, the examples of an epoch.
        batch_size: how many examples each step takes.
    """
    steps_per_epoch = rows.shape[0] // batch_size
    index = state.step // steps_per_epoch
    if state.network.step_rule is not None:
        epoch_key = jax.random.fold_in(shuffle_key, index)
        state = state.network.step_rule.start_epoch(epoch_key, state)
    order = shuffle(jax.random.fold_in(order_key, index), rows)
    return state, order[: steps_per_epoch * batch_size].reshape(steps_per_epoch, batch_size)


def fit_step(mask_key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
    """A step of `fit`: the masks depend on the index of the step too; see `train_step`."""
    return train_step(jax.random.fold_in(mask_key, state.step), state, batch)


def split_batch(batch: Any, batch_sharding: Sharding | PartitionSpec | None) -> Any:
    """The arrays of a batch, split over devices if there is a sharding."""
    if batch_sharding is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, batch_sharding)


def count_members(state: TrainState) -> int:
    """The number of members of a state. Raises if it is that of a single network."""
    if state.step.ndim != 1:
        raise ValueError(
            "state must have a member axis, as `init_ensemble` makes it, got one of a single "
            "network; train that with `jdrop.train.fit` or `jdrop.train.train_step`."
        )
    return state.step.shape[0]


def count_examples(inputs: Any, labels: Any, prefix: str = "") -> int:
    """The size of the first axis of every array. Raises if the sizes differ.

    Args:
        inputs: arrays `[example, ...]`.
        labels: arrays `[example, ...]`.
        prefix: what an error says before "inputs" and "labels".
    """
    sizes: dict[int, str] = {}
    for name, tree in {f"{prefix}inputs": inputs, f"{prefix}labels": labels}.items():
        for path, array in jax.tree_util.tree_leaves_with_path(tree):
            name_of_array = f"{name}{jax.tree_util.keystr(path)}"
            if not array.ndim:
                raise ValueError(
                    f"every array of {name} must have a leading axis of examples, got a scalar for "
                    f"{name_of_array}; make an array of a list of numbers with `jnp.array`."
                )
            sizes.setdefault(array.shape[0], name_of_array)
    if not sizes:
        raise ValueError(f"{prefix}inputs must hold at least 1 array, got {inputs!r}.")
    if len(sizes) > 1:
        counts = " and ".join(f"{size} in {name}" for size, name in sizes.items())
        raise ValueError(
            f"{prefix}inputs and {prefix}labels must hold the same number of examples, got "
            f"{counts}."
        )
    return next(iter(sizes))
