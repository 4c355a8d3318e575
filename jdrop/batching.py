"""How one program trains the members of an ensemble, and which way is the faster.

All at once, in chunks or one after another; on one device or spread over several.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from jdrop.memory import MembersAtOnce
from jdrop.meshes import check_mesh, map_over_mesh

BATCHINGS = ("vmap", "scan")

ROUNDS = 3
"""How often each batching is timed; the fastest run counts."""

STEPS_TO_TIME = 3
"""The training steps of a fit that is timed."""

_logger = logging.getLogger("jdrop")

_remembered: dict[Any, Any] = {}
"""The choices that were measured, by everything that a program depends on."""


@dataclass(frozen=True)
class Batching:
    """The faster way to train the members of an ensemble, and the times behind the choice.

    Attributes:
        choice: "vmap" or "scan", to give as `batching`.
        seconds: by "vmap" and "scan", the time of a training step of all members.
    """

    choice: str
    seconds: dict[str, float]

    log_level: ClassVar[int] = logging.INFO

    def __str__(self) -> str:
        """The choice and its reason in a sentence."""
        vmap, scan = (f"{1e3 * self.seconds[name]:.3g} ms" for name in BATCHINGS)
        return (
            f"batching={self.choice!r} is the faster on {jax.default_backend()}: a training step "
            f"of all members takes {vmap} at once ('vmap') and {scan} one after another ('scan')."
        )


@dataclass(frozen=True)
class MemberMap:
    """Maps a function over the members of an ensemble.

    Attributes:
        batching: "vmap" or "scan": at once, or one member after another.
        members_at_once: with "vmap", how many members a device takes at once; None takes all.
        mesh: devices among which the members are divided, from `meshes.check_mesh`; None takes the
            device on which the arrays are.
    """

    batching: str = "vmap"
    members_at_once: int | None = None
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.batching not in (*BATCHINGS, "auto"):
            raise ValueError(f"batching must be 'vmap', 'scan' or 'auto', got {self.batching!r}.")
        count = self.members_at_once
        if count is not None and (self.batching == "scan" or count < 1):
            raise ValueError(
                "members_at_once must be at least 1, and None with batching='scan', which takes "
                f"one member at a time, got {count} with batching={self.batching!r}."
            )

    def __call__(self, f: Callable[..., Any], shared: Any, *members: Any) -> Any:
        """Calls `f(shared, *member)` for each member.

        Args:
            f: of one member.
            shared: any pytree of arrays, the same for all members.
            *members: pytrees of arrays, all with a leading member axis.
        """
        if self.mesh is None:
            return self._map_on_device(f, shared, members)
        return map_over_mesh(self.mesh, partial(self._map_on_device, f), shared, members)

    def by(self, batching: str) -> "MemberMap":
        """The same with another batching."""
        members_at_once = None if batching == "scan" else self.members_at_once
        return replace(self, batching=batching, members_at_once=members_at_once)

    def _map_on_device(self, f: Callable[..., Any], shared: Any, members: Any) -> Any:
        def of_member(member: Any) -> Any:
            return f(shared, *member)

        if self.batching == "scan":
            return jax.lax.map(of_member, members)
        num_members = jax.tree.leaves(members)[0].shape[0]
        if self.members_at_once is None or self.members_at_once >= num_members:
            return jax.vmap(of_member)(members)
        return jax.lax.map(of_member, members, batch_size=self.members_at_once)


def member_map(batching: str, mesh: Mesh | None, members_at_once: int | None = None) -> MemberMap:
    """How to map over members. Raises if a setting is not valid."""
    return MemberMap(batching, members_at_once, None if mesh is None else check_mesh(mesh))


def time_batchings(run: Callable[[str], Any], num_steps: int = 1) -> Batching:
    """Times both batchings in turn.

    Args:
        run: `run(batching)` takes training steps of all members.
        num_steps: how many.

    Raises:
        ValueError: several processes, each of which might choose differently.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"batching must be 'vmap' or 'scan' with several processes, got 'auto' with "
            f"{jax.process_count()}, each of which might choose differently."
        )
    for batching in BATCHINGS:  # Compiles.
        jax.block_until_ready(run(batching))
    seconds = dict.fromkeys(BATCHINGS, float("inf"))
    for _ in range(ROUNDS):
        for batching in BATCHINGS:
            start = time.perf_counter()
            jax.block_until_ready(run(batching))
            elapsed = time.perf_counter() - start
            seconds[batching] = min(seconds[batching], elapsed / num_steps)
    return Batching(min(BATCHINGS, key=seconds.__getitem__), seconds)


def is_traced(arrays: Any) -> bool:
    """Whether an array is inside a transformation such as `jax.jit`."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))


def check_concrete(arrays: Any) -> None:
    """Raises if an array is inside a transformation such as `jax.jit`, where nothing is timed."""
    if is_traced(arrays):
        raise ValueError(
            "batching must be 'vmap' or 'scan' inside jax.jit and other transformations, where "
            "training steps cannot be timed, got 'auto'; call `jdrop.ensemble.choose_batching` "
            "outside, and give its `choice`."
        )


def remember_choice(
    measure: Callable[[], Batching | MembersAtOnce], arrays: Any, *settings: Any
) -> Any:
    """The choice that was measured. Measures only the first time for such arrays and settings.

    Logs the choice and its reason.

    Args:
        measure: times the batchings, or plans the memory.
        arrays: all arrays that the program takes, in a pytree.
        settings: all else on which the program depends.
    """
    leaves, structure = jax.tree.flatten(arrays)
    # The structure holds the network, the optimizer and the loss of the state.
    types = tuple((jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves)
    program = (structure, types, jax.default_backend(), *settings)
    if program not in _remembered:
        measured = measure()
        _logger.log(measured.log_level, "%s", measured)
        _remembered[program] = measured.choice
    return _remembered[program]
