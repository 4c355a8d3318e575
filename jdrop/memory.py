"""How many members of an ensemble fit into the memory of a device at once."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

USABLE = 0.8
"""The part of the free memory that a program may take; allocators lose some between arrays."""


@dataclass(frozen=True)
class MembersAtOnce:
    """How many members a device trains at once, and the memory behind the choice.

    Attributes:
        choice: to give as `members_at_once`.
        num_members: of a device.
        bytes_of_all: that a program with all members at once needs; infinite if the compiler has
            refused to make it.
        bytes_of_choice: that the chosen program needs.
        usable_bytes: of the device.
    """

    choice: int
    num_members: int
    bytes_of_all: float
    bytes_of_choice: float
    usable_bytes: float

    @property
    def log_level(self) -> int:
        """A warning if the members are in chunks, which is slower."""
        return logging.WARNING if self.choice < self.num_members else logging.DEBUG

    def __str__(self) -> str:
        """The choice and its reason in a sentence."""
        of_all, of_choice, usable = (
            f"{num_bytes / 2**30:.3g} GiB"
            for num_bytes in (self.bytes_of_all, self.bytes_of_choice, self.usable_bytes)
        )
        if self.bytes_of_choice > self.usable_bytes:
            return (
                f"members_at_once={self.choice}, but even that needs {of_choice} of a device's "
                f"memory, of which {usable} are usable; take a smaller batch."
            )
        return (
            f"members_at_once={self.choice}: the {self.num_members} members of a device need "
            f"{of_all} at once and {of_choice} in such chunks, and {usable} are usable."
        )


def choose_members_at_once(
    lower: Callable[[int], Any], num_members: int, device: Any
) -> MembersAtOnce:
    """All members of a device, halved until their program fits into its memory.

    JAX keeps the compiled programs: the chosen one is not compiled again when it runs.

    Args:
        lower: `lower(members_at_once)` lowers the program.
        num_members: of a device.
        device: one of the `jax.Device`s that run the program.
    """
    usable_bytes = _usable_bytes(device)
    choice = num_members
    bytes_of_all = bytes_of_choice = _planned_bytes(lower(choice))
    while bytes_of_choice > usable_bytes and choice > 1:
        choice = -(-choice // 2)
        bytes_of_choice = _planned_bytes(lower(choice))
    return MembersAtOnce(choice, num_members, bytes_of_all, bytes_of_choice, usable_bytes)


def _planned_bytes(lowered: Any) -> float:
    """The memory that a program takes on a device beside its arguments.

    It is infinite if the compiler refuses the program for its memory, as that of a TPU does.
    """
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return float(memory.temp_size_in_bytes + outputs)


def _usable_bytes(device: Any) -> float:
    """The memory of a device that a program may still take.

    A CPU does not say what is free: its devices share the memory of the machine equally.
    """
    memory = device.memory_stats()
    if memory and "bytes_limit" in memory:
        return USABLE * (memory["bytes_limit"] - memory["bytes_in_use"])
    return USABLE * machine_memory() / len(device.client.local_devices())


def machine_memory() -> float:
    """The bytes of memory that the machine has; infinite where the system does not say."""
    if not hasattr(os, "sysconf"):  # On Windows.
        return math.inf
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
