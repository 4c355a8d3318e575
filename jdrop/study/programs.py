"""The compiled programs that train networks of the study, and what a network costs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdrop import train
from jdrop.batching import MemberMap
from jdrop.convolutions import has_convolution
from jdrop.network import Network, Variables
from jdrop.study.data import Dataset, is_too_large, shapes_of
from jdrop.study.data.streams import with_length, with_sharding
from jdrop.study.streaming import compile_streamed_epoch
from jdrop.study.training_losses import loss_fn_of
from jdrop.train import TrainState, train_step


@dataclass(frozen=True)
class Programs:
    """The compiled programs that train a number of networks on data of one shape.

    Each program takes the indices of the networks, `[network]`: a network depends on the key and
    on its index, not on the networks beside it.

    Attributes:
        num_networks: how many networks the programs train: those that were asked for, rounded up
            to a multiple of the devices. Surplus networks are discarded.
        init: `init(key, indices, inputs)`: the state of the networks before their first step.
        fit_epoch: `fit_epoch(key, indices, state, inputs, labels, rows)`: the state after an epoch,
            and the mean loss of each network, `[network, 1]`.
        num_parameters: of one network.
        num_bytes: of the variables of one network.
        epoch_flops: floating-point operations in an epoch of one network.
    """

    num_networks: int
    init: Callable[..., Any]
    fit_epoch: Callable[..., Any]
    num_parameters: int
    num_bytes: int
    epoch_flops: float


def compile_programs(
    network: Network,
    optimizer: optax.GradientTransformation,
    data: Dataset,
    batch_size: int,
    num_networks: int,
) -> Programs:
    """Compiles the programs for the devices of this process.

    Args:
        network: the architecture.
        optimizer: any optax optimizer.
        data: the examples; their shapes and dtypes matter.
        batch_size: how many examples each step of a network takes.
        num_networks: how many networks train together.
    """
    batch_size = min(batch_size, len(data.train_labels))
    devices = jax.local_devices()[:num_networks]
    mesh = Mesh(np.array(devices), "member")
    on_members = NamedSharding(mesh, PartitionSpec("member"))
    replicated = NamedSharding(mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    inputs = with_sharding(shapes_of(data.train_inputs), replicated)
    labels = with_sharding(data.train_labels, replicated)
    example = with_sharding(with_length(inputs, 1), replicated)
    num_networks = -(-num_networks // len(devices)) * len(devices)
    indices = jax.ShapeDtypeStruct((num_networks,), np.int32, sharding=on_members)

    def init_network(shared: Any, index: Array) -> TrainState:
        key, inputs = shared
        variables = network.init(jax.random.fold_in(key, index), inputs)
        return TrainState.create(network, variables, optimizer, loss_fn_of(data))

    def init(key: Array, indices: Array, inputs: Any) -> TrainState:
        # One after another, as `init_ensemble` does.
        return MemberMap("scan", mesh=mesh)(init_network, (key, inputs), indices)

    lowered_init = jax.jit(init, out_shardings=on_members).lower(key, indices, example)
    state = jax.eval_shape(init, key, indices, example)
    step_flops, num_parameters, num_bytes = _costs(state, inputs, labels, batch_size)
    state = with_sharding(state, on_members)
    rows = jax.ShapeDtypeStruct(
        (num_networks, len(data.train_labels)), np.int32, sharding=on_members
    )
    batching = batching_by_rule(network, state.variables, example)
    compile_epoch = compile_streamed_epoch if is_too_large(data.train_inputs) else _compile_epoch
    # Runs once: optimizing the program takes longer than running it.
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    return Programs(
        num_networks=num_networks,
        init=lowered_init.compile(compiler_options=options),
        fit_epoch=compile_epoch(key, indices, state, inputs, labels, rows, batch_size, batching),
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        epoch_flops=step_flops * (len(data.train_labels) // batch_size),
    )


def _compile_epoch(
    key: Any,
    indices: Any,
    state: Any,
    inputs: Any,
    labels: Any,
    rows: Any,
    batch_size: int,
    batching: str,
) -> Callable[..., Any]:
    """An epoch of all networks on data that the device holds, as `fit_ensemble` trains them."""
    sharding = rows.sharding

    def fit_network(shared: Any, index: Array, state: TrainState, rows: Array) -> Any:
        key, inputs, labels = shared
        return train.fit(
            jax.random.fold_in(key, index),
            state,
            inputs,
            labels,
            num_epochs=1,
            batch_size=batch_size,
            rows=rows,
        )

    def fit_epoch(
        key: Array, indices: Array, state: TrainState, inputs: Any, labels: Array, rows: Array
    ) -> Any:
        map_networks = MemberMap(batching, mesh=sharding.mesh)
        return map_networks(fit_network, (key, inputs, labels), indices, state, rows)

    jitted = jax.jit(fit_epoch, out_shardings=sharding)
    return jitted.lower(key, indices, state, inputs, labels, rows).compile()


def batching_by_rule(network: Network, variables: Variables, inputs: Any) -> str:
    """How a device trains its members: "scan" for convolutions on a CPU, "vmap" otherwise.

    Batched convolutions are several times slower on a CPU. The choice is by rule, not by time, so
    that a run can be repeated exactly.

    Args:
        network: the architecture.
        variables: shapes and dtypes of all members.
        inputs: shapes and dtypes of an example batch.
    """
    if jax.default_backend() != "cpu":
        return "vmap"
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), variables)

    def predict(variables: Variables, inputs: Any) -> Any:
        return network(variables, inputs, None)

    return "scan" if has_convolution(predict, member, inputs) else "vmap"


def _costs(
    state: TrainState,
    inputs: Any,
    labels: jax.ShapeDtypeStruct,
    batch_size: int,
) -> tuple[float, int, int]:
    """FLOPs of a training step, parameters, and bytes of the variables, of one network."""
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype),
        (inputs, labels),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(member.variables["params"]))
    leaves = jax.tree.leaves(member.variables)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return count_flops(train_step, key, member, batch), num_parameters, num_bytes


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of a call, as the compiler counts them."""
    lowered = jax.jit(function).lower(*args)
    # Some backends count only what they have compiled.
    analysis: Any = lowered.cost_analysis() or lowered.compile().cost_analysis()
    return float(analysis["flops"])
