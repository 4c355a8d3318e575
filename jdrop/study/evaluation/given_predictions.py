"""Deals networks whose predictions were given out to replicates."""

from collections.abc import Mapping

import numpy as np

from jdrop.study.errors import UserError
from jdrop.study.evaluation.readings import Reading, reading_of
from jdrop.study.methods import METHODS


def deal(log_probs: Mapping[str, np.ndarray], replicates: int) -> tuple[list[Reading], list[str]]:
    """Deals the networks of each method out to replicates of equal size.

    A replicate gets at least two plain networks and one network of each method with several; the
    count of replicates is lowered until this is possible. If a method has one network, all
    replicates share it. With "monte_carlo", a replicate gets the masks of one network.

    Args:
        log_probs: by method, `[member, example, class]`; of "monte_carlo"
            `[network, mask, example, class]`.
        replicates: how many replicates are wanted.

    Returns:
        The predictions of each method, in the order of `METHODS`, and sentences on lowered counts,
        shared networks and networks that are in no replicate.

    Raises:
        UserError: if the names of two methods differ only in "_" and "-", or masks are not named
            "monte_carlo".
    """
    several = [len(members) for members in log_probs.values() if len(members) > 1]
    dealt_replicates = min(replicates, len(log_probs["plain"]) // 2, *several)
    notes = []
    if dealt_replicates < replicates:
        notes.append(
            f"There are {dealt_replicates} replicates, not {replicates}: each has at least two "
            "plain networks, and one network of each method with several."
        )
    readings: dict[str, Reading] = {}
    for given_name, members in log_probs.items():
        name = given_name.replace("_", "-")
        if name in readings:
            raise UserError(
                f"names of methods must differ in more than '_' and '-', got {given_name!r} and a "
                "second name like it; rename one of them."
            )
        has_masks = given_name == "monte_carlo"
        if name == "monte-carlo" and not has_masks:
            raise UserError(f"masks must be named 'monte_carlo', got {given_name!r}; rename it.")
        is_shared = len(members) == 1
        if is_shared:
            members = np.repeat(members, dealt_replicates, 0)
            notes.append(
                f"{given_name} is one network: its intervals hold for this network, not for "
                "training it anew."
            )
        size = 1 if has_masks else len(members) // dealt_replicates
        if surplus := len(members) - size * dealt_replicates:
            notes.append(
                f"The last {surplus} of {given_name} are in none of the {dealt_replicates} "
                "replicates, which are of equal size."
            )
        # Neighbours go to different replicates.
        dealt = members[: size * dealt_replicates].reshape(
            size, dealt_replicates, *members.shape[1:]
        )
        dealt = dealt[0] if has_masks else dealt.swapaxes(0, 1)
        num_members = dealt.shape[1]
        readings[name] = reading_of(
            name,
            np.ascontiguousarray(dealt),
            unit="masks" if has_masks else "networks",
            table=(num_members,) if has_masks else (1, num_members),
            retrained=not is_shared,
            label=f"{name}, {{n}}",
            explanation="Given predictions.",
        )
    ranks = {name: rank for rank, name in enumerate(METHODS)}
    ordered = sorted(readings.values(), key=lambda reading: ranks.get(reading.name, len(ranks)))
    return ordered, notes
