"""Early stopping: each member of an ensemble keeps the state of its own best epoch."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jdrop.annotations import Float, Integer
from jdrop.batching import MemberMap, is_traced
from jdrop.ensemble import fit_members, plan_fit
from jdrop.losses import LossFn, compute_losses
from jdrop.meshes import MEMBER_AXIS, batch_spec, place
from jdrop.network import Variables
from jdrop.train import Batch, TrainState, count_examples, split_batch

__all__ = ["EarlyStoppingResult", "fit_with_early_stopping"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EarlyStoppingResult:
    """An ensemble after early stopping.

    Attributes:
        state: each member after its own best epoch: its variables, optimizer state and step.
        best_epoch: the epoch with the lowest validation loss of each member, `[member]`, counted
            from 1. It is 0 if no validation loss was finite; that member has its initial state.
        train_losses: the mean training loss of each member and epoch, `[member, epoch]`; NaN after
            the member has stopped. With a `loss_fn` that returns `(losses, aux)`, a tuple as in
            `jdrop.ensemble.fit_ensemble`.
        validation_losses: the mean validation loss of each member after each epoch,
            `[member, epoch]`; NaN after the member has stopped.
    """

    state: TrainState
    best_epoch: Integer[Array, " member"]
    train_losses: Any
    validation_losses: Float[Array, "member epoch"]


def fit_with_early_stopping(
    key: Array,
    state: TrainState,
    inputs: Any,
    labels: Any,
    *,
    validation_data: Any,
    num_epochs: int,
    patience: int,
    batch_size: int,
    validation_loss_fn: LossFn | None = None,
    rows: ArrayLike | None = None,
    batching: str = "vmap",
    members_at_once: int | None = None,
    mesh: Mesh | None = None,
) -> EarlyStoppingResult:
    r"""Trains all members, and restores each to its epoch with the lowest validation loss.

    Member $i$ with the validation losses $v_{i1}, v_{i2}, \dots$ stops after the first epoch $t$
    with

    $$t - \operatorname{argmin}_{s \le t} v_{is} \ge \text{patience}$$

    Of equal losses the first counts. A loss that is NaN or infinite is no improvement; without any
    finite loss a member stops after `patience` epochs. The state of a member equals that of
    `jdrop.ensemble.fit_ensemble` with the same key and `best_epoch` epochs, up to the rounding of
    batched products, and exactly with "scan". Members do not affect each other.

    A member that has stopped is computed further, and ignored, until half of the members have
    stopped. Then the others go on in a program of half the size, and so on: for K members the
    programs are compiled for at most $\lceil \log_2 K \rceil$ more sizes. Four states of all
    members are in memory at once: that given, the best one, and those before and after an epoch.

    Args:
        key: consumed.
        state: from `jdrop.ensemble.init_ensemble`, or from earlier training.
        inputs: all training inputs, an array `[example, ...]` or any pytree of such arrays.
        labels: all training labels, an array `[example, ...]` or any pytree of such arrays.
        validation_data: a tuple of inputs and labels of other examples. They are read without
            dropout, by one member at a time; all examples must fit into memory at once.
        num_epochs: the largest number of epochs.
        patience: the number of epochs without improvement after which a member stops, at least 1.
        batch_size: the number of examples in a training step of a member.
        validation_loss_fn: from the outputs of predictions and the labels, as `LossFn`; lower is
            better. By default the `loss_fn` of the state. A network of `as_network(...,
            outputs=...)` needs one if `loss_fn` reads other outputs too: predictions lack those.
        rows: integers `[member, row]`, the training examples of each member; see `fit_ensemble`.
        batching: "vmap", "scan" or "auto"; see `fit_ensemble`.
        members_at_once: see `fit_ensemble`.
        mesh: devices among which the members are divided; see `fit_ensemble`. The members left are
            divided anew when the program shrinks; their number stays a multiple of the devices of
            the axis "member".

    Returns:
        The members, their best epochs, and the losses of all epochs in which a member trained.

    Raises:
        TypeError: validation data that are not a tuple of two.
        ValueError: fewer than 1 epoch or a patience below 1; no validation examples, or unequal
            numbers of their inputs and labels; arrays inside `jax.jit` and other transformations;
            the errors of `fit_ensemble`.

    Example:
        >>> import optax
        >>> from jdrop.ensemble import init_ensemble
        >>> from jdrop.network import Network
        >>> def init_fn(key, inputs):
        ...     return {"params": jax.random.normal(key, (inputs.shape[1], 2))}
        >>> network = Network(lambda variables, x, key: x @ variables["params"], init_fn)
        >>> inputs, labels = jnp.eye(4), jnp.array([0, 1, 0, 1])
        >>> init_key, fit_key = jax.random.split(jax.random.key(0))
        >>> state = init_ensemble(init_key, network, optax.adam(0.1), inputs, ensemble_size=3)
        >>> result = fit_with_early_stopping(
        ...     fit_key,
        ...     state,
        ...     inputs,
        ...     labels,
        ...     validation_data=(inputs, labels),
        ...     num_epochs=5,
        ...     patience=2,
        ...     batch_size=2,
        ... )
        >>> result.best_epoch.tolist()  # Validation examples that are trained on only improve.
        [5, 5, 5]
        >>> result.validation_losses.shape, result.state.step.tolist()
        ((3, 5), [10, 10, 10])

    Reference:
        Goodfellow et al. 2016, Deep Learning, algorithm 7.1; Prechelt 1998,
        doi:10.1007/3-540-49430-8_3.
    """
    for name, value in {"num_epochs": num_epochs, "patience": patience}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    _check_not_transformed((key, state, inputs, labels, validation_data))
    # Arrays of NumPy would be copied to the device in each epoch.
    inputs, labels, validation_data = jax.tree.map(jnp.asarray, (inputs, labels, validation_data))
    _check_validation_data(validation_data)
    loss_fn = state.loss_fn if validation_loss_fn is None else validation_loss_fn
    (shared, of_members), members = plan_fit(
        key, state, inputs, labels, 1, batch_size, rows, batching, members_at_once, mesh
    )
    key, *train_data = shared
    indices, state, _ = of_members
    validation_data, _ = place(members.mesh, tuple(validation_data), indices)
    # Raises the errors of the validation before anything is trained.
    _validate.eval_shape(validation_data, state, loss_fn, members)

    num_members = len(indices)
    best_loss = np.full(num_members, np.inf)
    best_epoch = np.zeros(num_members, np.int32)
    running = np.ones(num_members, bool)
    positions = np.arange(num_members)  # Of the members in the program.
    # Of all members, and of those in the program. The latter is overwritten, so it is a copy.
    kept, best = state, jax.tree.map(jnp.copy, state)
    history = []
    for epoch in range(1, num_epochs + 1):
        after, train_losses = fit_members((key, *train_data), of_members, 1, batch_size, members)
        # A fit in parts with clones of one key equals the fit in one.
        key = jax.random.clone(key)
        losses = _to_host(
            (train_losses, _validate(validation_data, after, loss_fn, members)), members.mesh
        )
        of_members = (of_members[0], after, of_members[2])
        history.append(jax.tree.map(partial(_of_all_members, positions, running), losses))
        loss = losses[1][:, 0]
        improves = running[positions] & np.isfinite(loss) & (loss < best_loss[positions])
        best_loss[positions[improves]] = loss[improves]
        best_epoch[positions[improves]] = epoch
        best = _choose(improves, after, best)
        running = epoch - best_epoch < patience
        if not running.any():
            break

        size = _shrink(len(positions), int(running.sum()), members.mesh)
        if size < len(positions):
            kept = _replace_members(kept, positions, best)
            # The program may have room for members that have stopped: they are computed further.
            chosen = np.sort(np.argsort(~running[positions], kind="stable")[:size])
            positions = positions[chosen]
            _, (of_members, best) = place(members.mesh, (), _take((of_members, best), chosen))

    train_losses, validation_losses = jax.tree.map(
        lambda *epochs: jnp.asarray(np.concatenate(epochs, axis=1)), *history
    )
    return EarlyStoppingResult(
        state=_replace_members(kept, positions, best),
        best_epoch=jnp.asarray(best_epoch),
        train_losses=train_losses,
        validation_losses=validation_losses,
    )


def _check_not_transformed(arrays: Any) -> None:
    """Raises inside `jax.jit` and other transformations."""
    # There a new array is traced even if all arguments are constants.
    if is_traced((arrays, jnp.zeros(1))):
        raise ValueError(
            "fit_with_early_stopping cannot run inside jax.jit and other transformations, because "
            "it decides in Python after each epoch which members go on; call it outside, or train "
            "a fixed number of epochs with `jdrop.ensemble.fit_ensemble`."
        )


def _check_validation_data(data: Any) -> None:
    """Raises if the data are not inputs and labels of the same examples, at least one."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise TypeError(
            f"validation_data must be a tuple (inputs, labels), got {type(data).__name__}"
            f"{f' of {len(data)}' if isinstance(data, tuple | list) else ''}."
        )
    inputs, labels = data
    if not count_examples(inputs, labels, prefix="validation "):
        raise ValueError("validation_data must hold at least 1 example, got 0.")


@partial(jax.jit, static_argnums=(2, 3))
def _validate(data: Batch, state: TrainState, loss_fn: LossFn, members: MemberMap) -> Array:
    """The mean loss of each member without dropout, `[member, 1]`, read one after another."""

    def validate_member(data: Batch, variables: Variables) -> Array:
        inputs, labels = split_batch(data, batch_spec(members.mesh))
        outputs = state.network(variables, inputs, None)
        losses, _ = compute_losses(loss_fn, outputs, labels)
        return jnp.mean(losses, dtype=jnp.promote_types(losses.dtype, jnp.float32))[None]

    return members.by("scan")(validate_member, data, state.variables)


def _to_host(losses: Any, mesh: Mesh | None) -> Any:
    """The losses as arrays of NumPy, in every process."""
    if mesh is not None:
        losses = jax.device_put(losses, NamedSharding(mesh, PartitionSpec()))
    return jax.device_get(losses)


def _of_all_members(positions: np.ndarray, running: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The losses of an epoch, with NaN for members that did not train in it."""
    shape = (len(running), *losses.shape[1:])
    of_all = np.full(shape, np.nan, losses.dtype)
    of_all[positions] = losses
    of_all[~running] = np.nan
    return of_all


def _shrink(size: int, num_running: int, mesh: Mesh | None) -> int:
    """The size of the next program: halved as long as the running members fit into it.

    Only such sizes occur, so that runs with other keys can use the same compiled programs.
    """
    num_devices = 1 if mesh is None else mesh.shape[MEMBER_AXIS]
    while True:
        per_device = -(-size // num_devices)
        half = -(-per_device // 2) * num_devices
        if half < num_running or half >= size:
            return size
        size = half


@partial(jax.jit, donate_argnums=2)
def _choose(is_new: Array, new: Any, old: Any) -> Any:
    """The new arrays for the members for which `is_new` is True; overwrites those of the others."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(jnp.expand_dims(is_new, range(1, new.ndim)), new, old)

    return jax.tree.map(choose, new, old)


@jax.jit
def _take(tree: Any, positions: Array) -> Any:
    """The arrays of the members at these positions."""
    return jax.tree.map(lambda array: array[positions], tree)


@jax.jit
def _replace_members(tree: Any, positions: Array, new: Any) -> Any:
    """The arrays with those of the members at these positions replaced."""
    return jax.tree.map(lambda array, some: array.at[positions].set(some), tree, new)
