"""The training of ONE network: its state, one step, and a whole fit as a pure function of a key.

Nothing here knows of ensembles: `jdrop.ensemble` maps these functions over keys.
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
from jdrop.thinned import freeze_deleted

LossFn = Callable[[Array, Array], Array]
"""`loss_fn(outputs, labels)` -> one loss for each example, `[batch]`."""

Batch = tuple[Array, Array]
"""Inputs `[batch, ...]` and labels `[batch, ...]`."""


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Shaped[Array, "..."]
) -> Float[Array, " batch"]:
    r"""The negative log-likelihood of integer labels: $-\log \mathrm{softmax}(z)_y$, in nats.

    NaN for a label that is no class.

    Raises:
        ValueError: labels that are not one integer for each example.
    """
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {logits.shape[:-1]}, got {labels.dtype} of shape "
            f"{labels.shape}; turn one-hot labels into integers with `labels.argmax(-1)`."
        )
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    # Not in the dtype of the labels, in which the number of classes may be another number.
    wide = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    is_class = (wide >= 0) & (wide < logits.shape[-1])
    # As a factor it makes the gradient NaN too.
    return losses * jnp.where(is_class, 1, jnp.nan).astype(losses.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """One network in training. In an ensemble every array has a leading member axis.

    Attributes:
        variables: collections of arrays; `params` is what the optimizer changes.
        opt_state: the optimizer's state.
        step: how many steps have been made.
        network: what is trained.
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
            loss_fn: `loss_fn(outputs, labels)` -> `[batch]`; its mean is made small.

        Raises:
            TypeError: a module instead of a network made of it.
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
    """One step of dropout training: thin the network, run it forward and backward, restore it.

    A network of `jdrop.thinned.thin` is thinned in earnest: the kept units are taken out, trained
    as a network of its own, and put back, while the deleted ones stay as they were. Any other
    draws masks, and what they drop is multiplied by 0.

    Args:
        key: the key of this step's masks; it is consumed.
        state: the network before the step.
        batch: inputs and labels.

    Returns:
        The network after the step, and the mean loss of the batch before it.

    Raises:
        TypeError: no key, which would train without dropout.
        ValueError: a batch that cannot be divided into the groups of a thinned network.

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
    thinning = state.network.thinning
    if thinning is None:
        return _update(key, state, batch)
    if thinning.num_groups > 1:
        return _update_of_groups(key, state, batch)
    draw_key, mask_key = jax.random.split(key)
    kept = thinning.draw(draw_key)
    places = _places(state)
    whole = state.variables, state.opt_state
    variables, opt_state = thinning.take(places, whole, kept)
    thinned = replace(
        state, variables=variables, opt_state=opt_state, network=thinning.network(kept)
    )
    thinned, loss = _update(mask_key, thinned, batch)
    part = thinned.variables, thinned.opt_state
    variables, opt_state = thinning.put(places, whole, part, kept)
    return replace(state, variables=variables, opt_state=opt_state, step=thinned.step), loss


def _places(state: TrainState) -> tuple[Any, Any]:
    """Where the units of thinned layers are, in the variables and in the optimizer's state."""
    thinning, params = state.network.thinning, state.variables["params"]
    return thinning.places, thinning.places_in_state(state.optimizer, state.opt_state, params)


def _update(key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
    """The step of a network as it is."""
    inputs, labels = batch

    def mean_loss(params: Any, key: Array) -> tuple[Array, Variables]:
        variables = {**state.variables, "params": params}
        outputs, variables = state.network.apply_train(variables, inputs, key)
        return jnp.mean(state.loss_fn(outputs, labels)), variables

    return _minimize(key, state, mean_loss)


def _update_of_groups(key: Array, state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
    """The step of a network that is thinned for each group of the batch in its own way."""
    thinning = state.network.thinning
    size, num_groups = len(batch[1]), thinning.num_groups
    if size % num_groups:
        raise ValueError(
            f"a batch of {size} examples cannot be divided into {num_groups} groups of equal size; "
            "choose batch_size as a multiple of num_groups."
        )
    groups = jax.tree.map(lambda array: array.reshape(num_groups, -1, *array.shape[1:]), batch)
    draw_key, mask_key = jax.random.split(key)
    kept = jax.vmap(thinning.draw)(jax.random.split(draw_key, num_groups))

    def mean_loss(params: Any, key: Array) -> tuple[Array, Variables]:
        def of_group(kept: Any, key: Array, inputs: Array, labels: Array) -> Array:
            variables = {**state.variables, "params": params}
            variables = thinning.take(thinning.places, variables, kept)
            outputs, _ = thinning.network(kept).apply_train(variables, inputs, key)
            return jnp.mean(state.loss_fn(outputs, labels))

        losses = jax.vmap(of_group)(kept, jax.random.split(key, num_groups), *groups)
        return jnp.mean(losses), state.variables

    of_groups = jax.vmap(thinning.entries)(kept)
    in_any = jax.tree.map(lambda entries: jnp.any(entries, 0), of_groups)
    frozen = replace(state, optimizer=freeze_deleted(state.optimizer))
    stepped, loss = _minimize(mask_key, frozen, mean_loss, kept=in_any)
    return replace(stepped, optimizer=state.optimizer), loss


def _minimize(
    key: Array,
    state: TrainState,
    mean_loss: Callable[[Any, Array], tuple[Array, Variables]],
    **offered: Any,
) -> tuple[TrainState, Array]:
    """One update by the gradient of `mean_loss(params, key)`, which also gives the variables."""
    params = state.variables["params"]
    (loss, variables), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, key)
    offered |= {
        "value": loss,
        "grad": grads,
        # The masks are those of the gradient: a line search needs one function.
        "value_fn": lambda params: mean_loss(params, jax.random.clone(key))[0],
    }
    asked = inspect.signature(state.optimizer.update).parameters.values()
    if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in asked):
        offered = {p.name: offered[p.name] for p in asked if p.name in offered}
    updates, opt_state = state.optimizer.update(grads, state.opt_state, params, **offered)
    variables = {**variables, "params": optax.apply_updates(params, updates)}
    return replace(state, variables=variables, opt_state=opt_state, step=state.step + 1), loss


@partial(jax.jit, static_argnames=("num_epochs", "batch_size"))
def fit(
    key: Array,
    state: TrainState,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    num_epochs: int,
    batch_size: int,
) -> tuple[TrainState, Float[Array, " epoch"]]:
    """Trains one network for some epochs: a scan of `train_step` over shuffled batches.

    Each epoch goes through the examples in a new order; the examples left over when `batch_size`
    does not divide their number sit that epoch out. Where units are deleted in blocks, each epoch
    begins by putting them in a new order, which changes no output. The orders of an epoch and the
    masks of a step depend on the key and on the number of the epoch or step, counted from the
    first step of `state`. So a fit in parts, each with a clone of the same key, equals the fit in
    one.

    Args:
        key: consumed.
        state: the network to go on with.
        inputs: all training inputs, `[example, ...]`.
        labels: all training labels, `[example, ...]`.
        num_epochs: how many passes over the examples.
        batch_size: how many examples a step sees.

    Returns:
        The trained network, and the mean training loss of each epoch.

    Raises:
        ValueError: a batch size that is not in [1, examples]; unequal numbers of inputs and labels;
            a state with a member axis; a negative number of epochs.

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
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must lie in [1, {num_examples}], the number of examples, got {batch_size}."
        )
    steps_per_epoch = num_examples // batch_size
    order_key, mask_key, shuffle_key = jax.random.split(key, 3)

    def step(state: TrainState, rows: Array) -> tuple[TrainState, Array]:
        return train_step(
            jax.random.fold_in(mask_key, state.step), state, (inputs[rows], labels[rows])
        )

    def epoch(state: TrainState, _: None) -> tuple[TrainState, Array]:
        number = state.step // steps_per_epoch
        state = _shuffled(jax.random.fold_in(shuffle_key, number), state)
        order = jax.random.permutation(jax.random.fold_in(order_key, number), num_examples)
        rows = order[: steps_per_epoch * batch_size].reshape(steps_per_epoch, batch_size)
        state, losses = jax.lax.scan(step, state, rows)
        return state, jnp.mean(losses)

    return jax.lax.scan(epoch, state, length=num_epochs)


def _shuffled(key: Array, state: TrainState) -> TrainState:
    """The same network with the units of thinned layers in another order."""
    thinning = state.network.thinning
    if thinning is None or not thinning.shuffles:
        return state
    variables, opt_state = thinning.shuffled(
        key, _places(state), (state.variables, state.opt_state)
    )
    return replace(state, variables=variables, opt_state=opt_state)
