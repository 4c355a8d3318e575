"""Spreads the members of an ensemble, and the examples of their batches, over a mesh of devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MEMBER_AXIS, BATCH_AXIS = "member", "batch"


def check_mesh(mesh: Any) -> Mesh:
    """The mesh with axes over which the compiler partitions.

    `jax.make_mesh` makes axes that are part of the types of arrays. Networks would have to be
    written for those.

    Raises:
        TypeError: something other than a `jax.sharding.Mesh`.
        ValueError: a mesh without the axis "member", or with axes other than "member" and "batch".
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}; make one with "
            '`jax.make_mesh((jax.device_count(),), ("member",))`.'
        )
    if MEMBER_AXIS not in mesh.axis_names or {*mesh.axis_names} - {MEMBER_AXIS, BATCH_AXIS}:
        raise ValueError(
            "mesh must have the axis 'member', and may have the axis 'batch' besides, got "
            f"{mesh.axis_names}."
        )
    return Mesh(mesh.devices, mesh.axis_names)


def place(mesh: Mesh | None, shared: Any, members: Any) -> tuple[Any, Any]:
    """Puts arrays where `map_over_mesh` reads them; without a mesh they stay where they are.

    Args:
        mesh: from `check_mesh`, or None.
        shared: arrays that all members share; each device holds a copy.
        members: arrays with a leading member axis. Each device holds those of its members. If the
            devices do not divide the members, each device holds all.
    """
    if mesh is None:
        return shared, members
    on_each = NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec(MEMBER_AXIS))
    return (
        _put(shared, on_each),
        _put(members, on_each if _count_missing(mesh, members) else spread),
    )


def _put(arrays: Any, sharding: NamedSharding) -> Any:
    """Puts arrays on the devices of a sharding, which may be those of several processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)

    def put(leaf: Any) -> Any:
        # JAX puts typed keys on devices of its own process only, but their words on any.
        if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            return jax.device_put(leaf, sharding)
        words = jax.device_put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))

    return jax.tree.map(put, arrays)


def map_over_mesh(mesh: Mesh, f: Callable[..., Any], shared: Any, members: Any) -> Any:
    """Calls `f(shared, members)` on each device with the members of this device.

    The program of a device holds nothing of the other members, so no communication with them
    either. If the devices do not divide the members, the last member is repeated on the way in, and
    the repetitions are dropped on the way out.
    """
    num_missing = _count_missing(mesh, members)

    def pad(leaf: Any) -> Any:
        count = leaf.shape[0]
        return leaf[jnp.minimum(jnp.arange(count + num_missing), count - 1)]

    # The axes that are left out, "batch", are those over which the compiler partitions.
    map_slices = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(MEMBER_AXIS)),
        out_specs=PartitionSpec(MEMBER_AXIS),
        axis_names={MEMBER_AXIS},
        # Networks have loops that start from constants, which the check would refuse.
        check_vma=False,
    )
    if not num_missing:
        return map_slices(shared, members)
    outputs = map_slices(shared, jax.tree.map(pad, members))
    outputs = jax.tree.map(lambda leaf: leaf[:-num_missing], outputs)
    return jax.lax.with_sharding_constraint(outputs, NamedSharding(mesh, PartitionSpec()))


def batch_spec(mesh: Mesh | None) -> PartitionSpec | None:
    """How the arrays of a batch lie on the mesh; None if all devices of a member hold all."""
    return PartitionSpec(BATCH_AXIS) if mesh and BATCH_AXIS in mesh.axis_names else None


def count_on_device(mesh: Mesh | None, num_members: int) -> int:
    """How many members a device trains."""
    return num_members if mesh is None else -(-num_members // mesh.shape[MEMBER_AXIS])


def _count_missing(mesh: Mesh, members: Any) -> int:
    """How many members more there would be if each device had as many as the first."""
    num_members = jax.tree.leaves(members)[0].shape[0]
    return -num_members % mesh.shape[MEMBER_AXIS]
