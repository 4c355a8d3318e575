"""Trains MANY networks at once, and predicts with them: `jdrop.train` mapped over keys.

Member `i` depends only on the key and `i`, not on the number of members.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jdrop import train
from jdrop.annotations import Float
from jdrop.batching import (
    STEPS_TO_TIME,
    Batching,
    MemberMap,
    check_concrete,
    is_traced,
    member_map,
    remember_choice,
    time_batchings,
)
from jdrop.memory import MembersAtOnce, choose_members_at_once
from jdrop.meshes import batch_spec, count_on_device, place
from jdrop.network import ApplyFn, Network, Variables
from jdrop.network import predict as predict_member
from jdrop.train import Batch, LossFn, TrainState, count_members, cross_entropy, split_batch

__all__ = [
    "Batching",
    "choose_batching",
    "fit_ensemble",
    "init_ensemble",
    "member_keys",
    "predict",
    "train_step",
]


def member_keys(key: Array, ensemble_size: int) -> Array:
    """Returns the keys of the members, `fold_in(key, i)`: a larger ensemble keeps the first keys.

    Raises:
        ValueError: fewer than 1 member.

    Example:
        >>> few, many = member_keys(jax.random.key(0), 2), member_keys(jax.random.key(0), 5)
        >>> bool(jnp.all(few == many[:2]))
        True
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, _indices(ensemble_size))


def _indices(ensemble_size: int) -> Array:
    """The indices of the members."""
    if ensemble_size < 1:
        raise ValueError(f"ensemble_size must be at least 1, got {ensemble_size}.")
    return jnp.arange(ensemble_size)


def init_ensemble(
    key: Array,
    network: Any,
    optimizer: optax.GradientTransformation,
    inputs: Any,
    *,
    ensemble_size: int,
    loss_fn: LossFn = cross_entropy,
    mesh: Mesh | None = None,
) -> TrainState:
    """Makes networks before their first step, each with its own initial weights.

    Args:
        key: consumed.
        network: a network with an `init_fn`.
        optimizer: any optax optimizer.
        inputs: example inputs, `[batch, ...]` or any pytree of such arrays; their shapes and dtypes
            matter.
        ensemble_size: the number of members.
        loss_fn: see `TrainState.create`.
        mesh: devices, each of which makes and holds its own members; see `fit_ensemble`.

    Returns:
        A `TrainState` in which every array has a leading member axis.

    Raises:
        TypeError: a network that is not a `Network`; a mesh that is none.
        ValueError: fewer than 1 member; a network without an `init_fn`; a mesh without the axis
            "member", or with axes other than "member" and "batch".
    """
    if not isinstance(network, Network):
        raise TypeError(
            f"network must be a jdrop.network.Network, got {type(network).__name__}; make one "
            "with `jdrop.linen.as_network` or `jdrop.nnx.as_network`."
        )

    # One member after another: on a CPU, orthogonal initial weights of several members at once, as
    # recurrent cells have, can wait for each other forever.
    members = member_map("scan", mesh)
    (key, inputs), indices = place(members.mesh, (key, inputs), _indices(ensemble_size))
    return _init_ensemble(key, indices, inputs, network, optimizer, loss_fn, members)


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _init_ensemble(
    key: Array,
    indices: Array,
    inputs: Any,
    network: Network,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    members: MemberMap,
) -> TrainState:
    def init_member(shared: Any, index: Array) -> TrainState:
        key, inputs = shared
        variables = network.init(jax.random.fold_in(key, index), inputs)
        return TrainState.create(network, variables, optimizer, loss_fn)

    return members(init_member, (key, inputs), indices)


def train_step(
    key: Array,
    state: TrainState,
    batch: Batch,
    *,
    member_batches: bool = False,
    batching: str = "vmap",
    mesh: Mesh | None = None,
) -> tuple[TrainState, Any]:
    """One step of all members: `jdrop.train.train_step`, mapped over them, for a loop of your own.

    The function is compiled once for each shape of the batch. Give it a new key at each step, such
    as `fold_in(key, step)`.

    Args:
        key: consumed; member `i` draws its masks from `fold_in(key, i)`.
        state: from `init_ensemble`, or from an earlier step.
        batch: a tuple of inputs and labels, each an array `[batch, ...]` or any pytree of such
            arrays. All members share the batch.
        member_batches: whether each member has its own batch, `[member, batch, ...]`.
        batching: "vmap", "scan" or "auto"; see `fit_ensemble`. In a loop `choose_batching` before
            the loop is better than "auto", which looks up its choice at every step.
        mesh: devices among which the members, and the examples of a batch, are divided; see
            `fit_ensemble`.

    Returns:
        The members after the step, and the mean loss of each before it, `[member]`; with a
        `loss_fn` that returns `(losses, aux)`, a tuple as in `jdrop.train.train_step`.

    Raises:
        TypeError: no key, which would train without dropout.
        ValueError: a state without a member axis; batches for another number of members; an unknown
            `batching`, or "auto" inside `jax.jit` or with several processes; a mesh with other
            axes; the errors of `jdrop.train.train_step`.

    Example:
        >>> def init_fn(key, inputs):
        ...     return {"params": jax.random.normal(key, (inputs.shape[1], 2))}
        >>> network = Network(lambda variables, x, key: x @ variables["params"], init_fn)
        >>> inputs, labels = jnp.eye(4), jnp.array([0, 1, 0, 1])
        >>> init_key, train_key = jax.random.split(jax.random.key(0))
        >>> state = init_ensemble(init_key, network, optax.adam(0.1), inputs, ensemble_size=3)
        >>> for step, rows in enumerate([slice(0, 2), slice(2, 4)]):  # A loader of two batches.
        ...     step_key = jax.random.fold_in(train_key, step)
        ...     state, losses = train_step(step_key, state, (inputs[rows], labels[rows]))
        >>> losses.shape, state.step.tolist()
        ((3,), [2, 2, 2])
    """
    if key is None:
        raise TypeError("train_step needs a key: without one it would train without dropout.")
    members = member_map(batching, mesh)
    data = _place_step(members, key, state, batch, member_batches)
    if batching == "auto":
        check_concrete(data)
        choice = remember_choice(lambda: _time_steps(*data, members), data, "train_step", members)
        members = members.by(choice)
    return _train_step(*data, members)


def _place_step(
    members: MemberMap, key: Array, state: TrainState, batch: Batch, member_batches: bool
) -> tuple[Any, Any]:
    """What the members of a step share, and what each has, on the devices that read it.

    Raises if batches are those of another number of members.
    """
    num_members = count_members(state)
    shapes = [jnp.shape(array) for array in jax.tree.leaves(batch)]
    if member_batches and any(shape[:1] != (num_members,) for shape in shapes):
        raise ValueError(
            f"each array of batch must be [member, batch, ...] with the {num_members} members of "
            f"the state, got the shapes {shapes}; leave out `member_batches` if all members share "
            "the batch."
        )
    of_members = (_indices(num_members), state)
    if member_batches:
        return place(members.mesh, (key,), (*of_members, batch))
    return place(members.mesh, (key, batch), of_members)


@partial(jax.jit, static_argnums=2)
def _train_step(shared: Any, of_members: Any, members: MemberMap) -> tuple[TrainState, Any]:
    def step(
        shared: tuple[Any, ...], index: Array, state: TrainState, *own_batch: Batch
    ) -> tuple[TrainState, Any]:
        key, batch = shared + own_batch
        batch = split_batch(batch, batch_spec(members.mesh))
        return train.train_step(jax.random.fold_in(key, index), state, batch)

    return members(step, shared, *of_members)


def choose_batching(
    key: Array,
    state: TrainState,
    batch: Batch,
    *,
    member_batches: bool = False,
    mesh: Mesh | None = None,
) -> Batching:
    """Times `train_step` with each `batching`, and chooses the faster.

    Compiles both programs and runs each four times. The choice may differ from run to run if both
    are equally fast. The results of training then differ by rounding.

    Args:
        key: of a step; it is not consumed.
        state: of all members. It stays as it is.
        batch: as in `train_step`.
        member_batches: as in `train_step`.
        mesh: as in `train_step`.

    Returns:
        The choice and the times; printed, a sentence that says both.

    Raises:
        ValueError: arrays inside `jax.jit`, where nothing can be timed; several processes, each of
            which might choose differently; the errors of `train_step`.

    Example:
        >>> def init_fn(key, inputs):
        ...     return {"params": jax.random.normal(key, (inputs.shape[1], 2))}
        >>> network = Network(lambda variables, x, key: x @ variables["params"], init_fn)
        >>> batch = jnp.eye(4), jnp.array([0, 1, 0, 1])
        >>> init_key, train_key = jax.random.split(jax.random.key(0))
        >>> state = init_ensemble(init_key, network, optax.adam(0.1), batch[0], ensemble_size=3)
        >>> batching = choose_batching(train_key, state, batch)
        >>> batching.choice in ("vmap", "scan")
        True
        >>> state, losses = train_step(train_key, state, batch, batching=batching.choice)
    """
    check_concrete((key, state, batch))
    members = member_map("auto", mesh)
    return _time_steps(*_place_step(members, key, state, batch, member_batches), members)


def _time_steps(shared: Any, of_members: Any, members: MemberMap) -> Batching:
    """Times a step with each batching, and consumes no key."""
    key, *batch = shared
    return time_batchings(
        lambda batching: _train_step(
            (jax.random.clone(key), *batch), of_members, members.by(batching)
        )
    )


def fit_ensemble(
    key: Array,
    state: TrainState,
    inputs: Any,
    labels: Any,
    *,
    num_epochs: int,
    batch_size: int,
    rows: ArrayLike | None = None,
    batching: str = "vmap",
    members_at_once: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Any]:
    """Trains all members in one program: `jdrop.train.fit`, mapped over their keys.

    Every member sees all examples, or its `rows` of them, in its own order and with its own masks.
    All members share one copy of the data. A member equals the same member trained alone, up to the
    rounding of batched products.

    Args:
        key: consumed.
        state: from `init_ensemble`, or from an earlier call of this function.
        inputs: all training inputs, an array `[example, ...]` or any pytree of such arrays.
        labels: all training labels, an array `[example, ...]` or any pytree of such arrays.
        num_epochs: the number of passes over the examples.
        batch_size: the number of examples in a step of a member.
        rows: integers `[member, row]`, the examples of each member's epochs, for bagging or
            cross-validation; see `jdrop.train.fit`.
        batching: "vmap" trains all members at once: their operations become batched ones. "scan"
            trains one member after another, which is several times faster for convolutions on a
            CPU. "auto" times both for a few steps, logs its choice and the times to the logger
            `jdrop`, and remembers the choice for these shapes. The results differ by rounding, so
            a choice by time is not exactly reproducible: give "vmap" or "scan" for that.
        members_at_once: with "vmap", how many members a device trains at once, one such chunk after
            another; results differ by rounding. By default all, or as many as fit into the memory
            of the device if that is fewer: a warning of the logger `jdrop` then says how many, and
            why. The first choice for these shapes is kept for the whole process. Inside `jax.jit`,
            and over several processes, the default is all.
        mesh: devices with the axis "member", over which the members are divided, such as
            `jax.make_mesh((8,), ("member",))`. Each device holds the data once, and the state of
            its own members; no step communicates between members. If the devices do not divide
            the members, each device holds the state of all between calls; train a multiple of the
            devices to avoid that. With a second axis, "batch", the examples of each batch are
            divided too. Member `i` is the same on any number of devices: exactly with "scan" and
            without "batch", else up to rounding.

    Returns:
        The trained members, and the mean training loss of each member and epoch, `[member, epoch]`;
        with a `loss_fn` that returns `(losses, aux)`, a tuple as in `jdrop.train.fit`.

    Raises:
        ValueError: a state without a member axis; rows for another number of members; an unknown
            `batching`, or "auto" inside `jax.jit` or with several processes; `members_at_once`
            below 1 or with "scan"; a mesh with other axes; the errors of `jdrop.train.fit`.

    Example:
        >>> def init_fn(key, inputs):
        ...     return {"params": jax.random.normal(key, (inputs.shape[1], 2))}
        >>> network = Network(lambda variables, x, key: x @ variables["params"], init_fn)
        >>> inputs, labels = jnp.eye(4), jnp.array([0, 1, 0, 1])
        >>> init_key, fit_key = jax.random.split(jax.random.key(0))
        >>> state = init_ensemble(init_key, network, optax.adam(0.1), inputs, ensemble_size=3)
        >>> state, losses = fit_ensemble(
        ...     fit_key, state, inputs, labels, num_epochs=2, batch_size=2
        ... )
        >>> predict(None, network, state.variables, inputs).shape
        (3, 4, 2)
    """
    data, members = plan_fit(
        key, state, inputs, labels, num_epochs, batch_size, rows, batching, members_at_once, mesh
    )
    return fit_members(*data, num_epochs, batch_size, members)


def plan_fit(
    key: Array,
    state: TrainState,
    inputs: Any,
    labels: Any,
    num_epochs: int,
    batch_size: int,
    rows: ArrayLike | None,
    batching: str,
    members_at_once: int | None,
    mesh: Mesh | None,
) -> tuple[tuple[Any, Any], MemberMap]:
    """What `fit_members` takes, from the arguments of `fit_ensemble`, with every choice made."""
    num_members = count_members(state)
    member_rows = None if rows is None else jnp.asarray(rows)
    if member_rows is not None and member_rows.shape[:1] != (num_members,):
        raise ValueError(
            f"rows must be [member, row] with the {num_members} members of the state, got the "
            f"shape {member_rows.shape}."
        )
    members = member_map(batching, mesh, members_at_once)
    data = place(members.mesh, (key, inputs, labels), (_indices(num_members), state, member_rows))
    # Several processes could choose differently, and would then run different programs.
    spans_processes = members.mesh is not None and members.mesh.is_multi_process
    if batching != "scan" and members_at_once is None and not (spans_processes or is_traced(data)):
        choose = partial(_choose_members_at_once, *data, num_epochs, batch_size, members)
        choice = remember_choice(choose, data, "members_at_once", num_epochs, batch_size, members)
        members = replace(members, members_at_once=choice)
    if batching == "auto":
        check_concrete(data)
        choice = remember_choice(
            lambda: _time_fits(*data, batch_size, members), data, "batching", batch_size, members
        )
        members = members.by(choice)
    return data, members


def _choose_members_at_once(
    shared: Any, of_members: Any, num_epochs: int, batch_size: int, members: MemberMap
) -> MembersAtOnce:
    """Chooses how many members a device trains at once from the memory that a fit needs."""

    def lower(members_at_once: int) -> Any:
        chunked = replace(members, batching="vmap", members_at_once=members_at_once)
        return fit_members.lower(shared, of_members, num_epochs, batch_size, chunked)

    indices, *_ = of_members
    device = min(indices.devices(), key=lambda device: device.id)
    return choose_members_at_once(lower, count_on_device(members.mesh, len(indices)), device)


def _time_fits(shared: Any, of_members: Any, batch_size: int, members: MemberMap) -> Batching:
    """Times a fit of a few steps with each batching."""
    key, inputs, labels = shared
    indices, state, rows = of_members
    # Raises the errors of the whole fit, with its own numbers, before anything is timed.
    fit_members.eval_shape(shared, of_members, 1, batch_size, members.by("vmap"))
    num_examples = jax.tree.leaves((inputs, labels))[0].shape[0]
    every_row = jnp.broadcast_to(jnp.arange(num_examples), (len(indices), num_examples))
    few = (every_row if rows is None else rows)[:, : STEPS_TO_TIME * batch_size]
    _, few = place(members.mesh, (), few)

    def run(batching: str) -> Any:
        data = (jax.random.clone(key), inputs, labels), (indices, state, few)
        return fit_members(*data, 1, batch_size, members.by(batching))

    return time_batchings(run, num_steps=few.shape[1] // batch_size)


@partial(jax.jit, static_argnums=(2, 3, 4))
def fit_members(
    shared: Any, of_members: Any, num_epochs: int, batch_size: int, members: MemberMap
) -> tuple[TrainState, Any]:
    """Trains the members whose indices, states and rows are `of_members`."""

    def fit_member(shared: Any, index: Array, state: TrainState, rows: Array | None) -> Any:
        key, inputs, labels = shared
        return train.fit(
            jax.random.fold_in(key, index),
            state,
            inputs,
            labels,
            num_epochs=num_epochs,
            batch_size=batch_size,
            rows=rows,
            batch_sharding=batch_spec(members.mesh),
        )

    return members(fit_member, shared, *of_members)


def predict(
    key: Array | None,
    network: ApplyFn,
    variables: Variables,
    inputs: Any,
    *,
    regression: bool = False,
    members_at_once: int = 1,
    mesh: Mesh | None = None,
) -> Float[Array, "member batch ..."]:
    """Predicts with each member: log-probabilities of the classes, or outputs of a regression.

    Args:
        key: consumed; member `i` draws masks from `fold_in(key, i)`. None: all members are read
            without dropout.
        network: an `apply_fn`; it returns logits `[batch, class]`, or with `regression` anything.
        variables: of all members, with a leading member axis: `state.variables`.
        inputs: `[batch, ...]`, or any pytree of such arrays.
        regression: whether to return the outputs as they are; they cannot be told from logits if
            there are several.
        members_at_once: how many members a device reads at once. One takes the least memory: the
            activations of a single network for all inputs.
        mesh: devices, each of which predicts with its own members; see `fit_ensemble`.

    Returns:
        `[member, batch, class]` log-probabilities, at least float32; average them with
        `jdrop.inference.pool`. With `regression` the outputs, `[member, batch, ...]`; average them
        with `outputs.mean(0)`.

    Raises:
        TypeError: a network whose outputs are not one array.
        ValueError: arrays whose first axes differ, or that have none: variables of one network;
            outputs without a class axis or of a single class, unless `regression`;
            `members_at_once` below 1; a mesh with other axes.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(variables)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "variables must have a leading member axis, the same for every array, as in the state "
            "of an ensemble; predict with a single network by `jdrop.network.predict`."
        )
    ((num_members,),) = sizes
    if members_at_once == 1:
        members = member_map("scan", mesh)
    else:
        members = member_map("vmap", mesh, members_at_once)
    data = place(members.mesh, (key, inputs), (_indices(num_members), variables))
    return _predict(*data, network, regression, members)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _predict(
    shared: Any, of_members: Any, network: ApplyFn, regression: bool, members: MemberMap
) -> Array:
    def predict_one(shared: Any, index: Array, variables: Variables) -> Array:
        key, inputs = shared
        inputs = split_batch(inputs, batch_spec(members.mesh))
        member_key = None if key is None else jax.random.fold_in(key, index)
        return predict_member(member_key, network, variables, inputs, regression=regression)

    return members(predict_one, shared, *of_members)
