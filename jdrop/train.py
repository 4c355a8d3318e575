"""Training of one network: its state, one step, and a whole fit as a pure function of a key.

`jdrop.ensemble` maps these functions over keys to train many networks.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jdrop.annotations import Float, Shaped
from jdrop.network import ApplyFn, Network, Variables, check_network

__all__ = ["Batch", "LossFn", "TrainState", "cross_entropy", "fit", "train_step"]

LossFn = Callable[[Array, Array], Array]
"""`loss_fn(outputs, labels)` -> one loss for each example, `[batch]`."""

Batch = tuple[Array, Array]
"""Inputs `[batch, ...]` and labels `[batch, ...]`."""


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Shaped[Array, "..."]
) -> Float[Array, " batch"]:
    r"""The negative log-likelihood of integer labels: $-\log \mathrm{softmax}(z)_y$, in nats.

    The loss and its gradient are NaN if a label is not a class index.

    Args:
        logits: float, `[batch, classes]`.
        labels: integer class indices, `[batch]`.

    Raises:
        ValueError: labels that are not one integer for each example.

    Example:
        >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
        Array([1.3862944], dtype=float32)
    """
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {logits.shape[:-1]}, got {labels.dtype} of shape "
            f"{labels.shape}; turn one-hot labels into integers with `labels.argmax(-1)`."
        )
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    # In a narrow dtype, such as int8, the number of classes could overflow.
    wide = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    is_class = (wide >= 0) & (wide < logits.shape[-1])
    # Multiply, so that the gradient is NaN too.
    return losses * jnp.where(is_class, 1, jnp.nan).astype(losses.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """One network in training. In an ensemble every array has a leading member axis.

    Attributes:
        variables: collections of arrays; the optimizer updates `params`.
        opt_state: the optimizer's state.
        step: the count of steps so far.
        network: the network in training.
        optimizer: any optax optimizer.
        loss_fn: one loss for each example, from outputs and labels.
    """

    variables: Variables
    opt_state: Any
    step: Shaped[Any, "..."]
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
            loss_fn: `loss_fn(outputs, labels)` -> `[batch]`; training minimises its mean.

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


def train_step(key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, Float[Array, ""]]:
    """One step of dropout training: draw masks, take the gradient of the loss, update params.

    A network with a `step_rule` takes the step of that rule instead.

    Args:
        key: the key of this step's masks; it is consumed.
        state: the network before the step.
        batch: inputs and labels.

    Returns:
        The network after the step, and the mean loss of the batch before it.

    Raises:
        TypeError: no key, which would train without dropout.

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
    inputs, labels = batch
    params = state.variables["params"]

    def mean_loss(params: Any, key: Array) -> tuple[Array, Variables]:
        variables = {**state.variables, "params": params}
        outputs, variables = state.network.apply_train(variables, inputs, key)
        return jnp.mean(state.loss_fn(outputs, labels)), variables

    (loss, variables), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, key)

    def loss_with_same_masks(params: Any) -> Array:
        return mean_loss(params, jax.random.clone(key))[0]

    extra_args = _accepted_args(
        state.optimizer, {"value": loss, "grad": grads, "value_fn": loss_with_same_masks}
    )
    updates, opt_state = state.optimizer.update(grads, state.opt_state, params, **extra_args)
    variables = {**variables, "params": optax.apply_updates(params, updates)}
    return replace(state, variables=variables, opt_state=opt_state, step=state.step + 1), loss


def _accepted_args(
    optimizer: optax.GradientTransformation, extra_args: dict[str, Any]
) -> dict[str, Any]:
    """The extra arguments that the optimizer's update accepts, for instance for a line search."""
    parameters = inspect.signature(optimizer.update).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return extra_args
    return {name: value for name, value in extra_args.items() if name in parameters}


@partial(jax.jit, static_argnames=("num_epochs", "batch_size"))
def fit(
    key: Array,
    state: TrainState,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    num_epochs: int,
    batch_size: int,
    rows: ArrayLike | None = None,
) -> tuple[TrainState, Float[Array, " epoch"]]:
    """Trains one network for some epochs: a scan of `train_step` over shuffled batches.

    Each epoch shuffles the examples. If `batch_size` does not divide their number, each epoch
    leaves out the examples that remain. The order of an epoch and the masks of a step depend on
    the key and on the index of the epoch or step, counted from the first step of `state`. So a fit
    in parts, each with a clone of the same key, equals the fit in one.

    Args:
        key: consumed.
        state: the network to train further.
        inputs: all training inputs, `[example, ...]`.
        labels: all training labels, `[example, ...]`.
        num_epochs: how many passes over the examples.
        batch_size: how many examples each step takes.
        rows: integers `[row]`, the examples of an epoch; an example may occur several times. By
            default an epoch has every example once. Whether an index is that of an example is not
            checked, as usual in JAX.

    Returns:
        The trained network, and the mean training loss of each epoch.

    Raises:
        ValueError: a batch size that is not in [1, rows]; unequal numbers of inputs and labels; a
            state with a member axis; a negative number of epochs; rows that are no integers.

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
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
    if state.step.ndim:
        raise ValueError(
            "state must be of one network, got one with a member axis; train an ensemble with "
            "`jdrop.ensemble.fit_ensemble`."
        )
    if num_epochs < 0:
        raise ValueError(f"num_epochs must be at least 0, got {num_epochs}.")
    num_examples = inputs.shape[0]
    if labels.shape[0] != num_examples:
        raise ValueError(
            f"inputs and labels must hold the same number of examples, "
            f"got {num_examples} and {labels.shape[0]}."
        )
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
    steps_per_epoch = num_rows // batch_size
    order_key, mask_key, shuffle_key = jax.random.split(key, 3)

    def step(state: TrainState, batch_rows: Array) -> tuple[TrainState, Array]:
        step_key = jax.random.fold_in(mask_key, state.step)
        return train_step(step_key, state, (inputs[batch_rows], labels[batch_rows]))

    def epoch(state: TrainState, _: None) -> tuple[TrainState, Array]:
        index = state.step // steps_per_epoch
        if state.network.step_rule is not None:
            epoch_key = jax.random.fold_in(shuffle_key, index)
            state = state.network.step_rule.start_epoch(epoch_key, state)
        order = jax.random.permutation(jax.random.fold_in(order_key, index), rows)
        batches = order[: steps_per_epoch * batch_size].reshape(steps_per_epoch, batch_size)
        state, losses = jax.lax.scan(step, state, batches)
        return state, jnp.mean(losses)

    return jax.lax.scan(epoch, state, length=num_epochs)
