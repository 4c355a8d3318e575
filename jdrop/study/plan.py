r"""What an ensemble needs on many devices, worked out from what the compiler reports of one member.

Of one member the compiler reports, in bytes and floating-point operations (FLOPs):

| | of a measured model | of a model of $P$ parameters |
|---|---|---|
| $S$: weights, and two moments of Adam | counted | $12 P$ |
| $G$: gradients, and all else that does not grow with the batch | fit | $4 P$ |
| $A$: activations of a batch | fit | given, or 0 |
| $L$: the largest array of weights | counted | 0 |
| $D$: the training data | counted | 0 |
| $F$: FLOPs of a step with a batch of $b$ examples | counted | $6 P b$ |

"Fit" means that the program of a fit is compiled for a batch of $b$ and of $b / 2$ examples. It
takes $T(b) = G + A$ bytes beside its arguments and results, so $A = 2\,(T(b) - T(b / 2))$. The
factor 6 is a multiplication and an addition for each weight and example, once in the forward pass
and twice in the backward pass. It holds for dense layers. In a language model an example is a
token.

The compiler counts the body of a loop, such as `jax.lax.scan`, once, however often it runs. So $F$
and the hours of a scanned transformer are too few.

A device with $M$ members, of which $m$ train at once, needs the following bytes. It holds the
states before and after the fit, and it copies the members of a chunk:

$$ D + 2 M S + m\,(G + A) + [m < M]\, m S $$

The first of these ways in which a member fits is taken:

1. The axis "member": $N$ members on $n$ devices, so $M = \lceil N / n \rceil$.
2. The axis "batch": $d$ devices share the batches of a member. Then $A / d$ takes the place of $A$,
   and $M = \lceil N d / n \rceil$. It is also taken if there are more devices than members.
3. Inside the member: $d$ devices share its weights, moments, gradients and batches (FSDP). That
   takes a step of your own, which donates its state. A device needs $D + (S + G + A) / d + L$ bytes
   for one member after another; with $d = 1$ it needs no $L$.

If the members of a device do not fit together, they train in several fits, one after another. The
time is that of a device with the most members:

$$ M \cdot \text{steps} \cdot F / (d \cdot \text{FLOPs per second}) $$

Communication is not counted. No device reaches its peak in training, so give the FLOPs per second
that a short training reaches. Another backend may need other memory for the same program.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core.primitives import scan_p, while_p
from rich.console import Console
from rich.table import Table

from jdrop import ensemble
from jdrop.memory import USABLE
from jdrop.network import Network
from jdrop.study import command
from jdrop.study.data import Dataset, is_too_large, shapes_of
from jdrop.study.data.streams import with_length
from jdrop.study.methods import adam
from jdrop.study.models import Model
from jdrop.study.programs import count_flops
from jdrop.study.training_losses import loss_fn_of
from jdrop.train import train_step

AXES = {
    "member": "Each device trains its own members: a mesh of the axis 'member'.",
    "batch": "Devices share the batches of a member: a mesh of the axes 'member' and 'batch'.",
    "inside": "Devices share the arrays of a member (FSDP): your own step, jitted with shardings.",
    "none": "A member does not fit: take more devices, more memory, or a smaller batch.",
}
"""By axis, what to do. Masks do not depend on the sharding, so each gives the same networks."""

LOOP_CAUTION = (
    "The model has a loop, and the compiler counts the body of a loop once, so FLOPs and hours are "
    "too few."
)


@dataclass(frozen=True)
class MemberCost:
    """What a member takes, in bytes and FLOPs; see the head of this module.

    Attributes:
        num_parameters: P.
        state_bytes: S.
        gradient_bytes: G.
        activation_bytes: A.
        largest_bytes: L.
        data_bytes: D.
        step_flops: F.
        batch_size: b.
        steps: of the training of a member.
        has_loop: whether a step has a loop, whose body counts once in F.
    """

    num_parameters: int
    state_bytes: float
    gradient_bytes: float
    activation_bytes: float
    largest_bytes: float
    data_bytes: float
    step_flops: float
    batch_size: int
    steps: int
    has_loop: bool = False

    def device_bytes(self, members: int, at_once: int, devices_per_member: int = 1) -> float:
        """What a device needs for a fit: D + 2 M S + m (G + A / d), and m S if m < M.

        Args:
            members: M.
            at_once: m, which divides M.
            devices_per_member: d, which share a batch.

        Example:
            >>> cost = MemberCost(1, 12.0, 4.0, 8.0, 4.0, 100.0, 6.0, 1, 1)
            >>> cost.device_bytes(4, 4), cost.device_bytes(4, 2), cost.device_bytes(4, 4, 2)
            (244.0, 244.0, 228.0)
        """
        of_chunk = self.gradient_bytes + self.activation_bytes / devices_per_member
        if at_once < members:
            of_chunk += self.state_bytes
        return self.data_bytes + 2 * members * self.state_bytes + at_once * of_chunk

    def shared_bytes(self, devices_per_member: int) -> float:
        """What each device needs if d devices share one member: D + (S + G + A) / d + L."""
        of_member = self.state_bytes + self.gradient_bytes + self.activation_bytes
        largest = self.largest_bytes if devices_per_member > 1 else 0
        return self.data_bytes + of_member / devices_per_member + largest


@dataclass(frozen=True)
class Layout:
    """How members lie on devices.

    Attributes:
        num_devices: n.
        axis: "member", "batch", "inside", or "none" if a member does not fit.
        devices_per_member: d.
        members: M, of a device.
        fits: how many fits one after another train them.
        members_at_once: m, in one fit.
        device_bytes: that a device needs.
        seconds: that the training takes; None without FLOPs per second.
    """

    num_devices: int
    axis: str
    devices_per_member: int
    members: int
    fits: int
    members_at_once: int
    device_bytes: float
    seconds: float | None


def measure_member(
    network: Network,
    optimizer: optax.GradientTransformation,
    data: Dataset,
    *,
    batch_size: int,
    epochs: int,
) -> MemberCost:
    """Compiles the training of one member, and reads what the compiler reports. Computes nothing.

    Args:
        network: the architecture.
        optimizer: any optax optimizer.
        data: the examples; their shapes and dtypes matter.
        batch_size: at most the number of examples.
        epochs: passes over the examples.
    """
    batch_size = min(batch_size, len(data.train_labels))
    is_streamed = is_too_large(data.train_inputs)
    num_examples = len(data.train_labels)
    if is_streamed:  # They are not on the device, so few stand for all.
        num_examples = min(num_examples, 2 * batch_size)
    examples = with_length((shapes_of(data.train_inputs), data.train_labels), num_examples)
    key = jax.eval_shape(lambda: jax.random.key(0))
    init = partial(
        ensemble.init_ensemble,
        network=network,
        optimizer=optimizer,
        ensemble_size=1,
        loss_fn=loss_fn_of(data),
    )
    state = jax.eval_shape(
        lambda key, inputs: init(key, inputs=inputs), key, with_length(examples[0], 1)
    )

    def fit_bytes(batch_size: int) -> float:
        fit = partial(ensemble.fit_ensemble, num_epochs=1, batch_size=batch_size)
        memory: Any = jax.jit(fit).lower(key, state, *examples).compile().memory_analysis()
        return float(memory.temp_size_in_bytes)

    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    fit, half = fit_bytes(batch_size), batch_size // 2
    activations = 0.0
    if half:
        # A compiler may take less for a larger batch, if the activations are very few.
        added = max(0.0, fit - fit_bytes(half))
        activations = min(fit, added * batch_size / (batch_size - half))
    weights = jax.tree.leaves(member.variables["params"])
    step = key, member, with_length(examples, batch_size)
    return MemberCost(
        num_parameters=sum(leaf.size for leaf in weights),
        state_bytes=_num_bytes(member),
        gradient_bytes=fit - activations,
        activation_bytes=activations,
        largest_bytes=max(map(_num_bytes, weights)),
        data_bytes=0.0 if is_streamed else _num_bytes(examples),
        step_flops=count_flops(train_step, *step),
        batch_size=batch_size,
        steps=epochs * (len(data.train_labels) // batch_size),
        has_loop=_holds_loop(jax.make_jaxpr(train_step)(*step)),
    )


def _holds_loop(value: Any) -> bool:
    """Whether a jaxpr, or a parameter of an equation, holds a loop."""
    if isinstance(value, ClosedJaxpr):
        value = value.jaxpr
    if isinstance(value, Jaxpr):
        return any(
            equation.primitive in (scan_p, while_p)
            or any(map(_holds_loop, equation.params.values()))
            for equation in value.eqns
        )
    return type(value) is tuple and any(map(_holds_loop, value))


def member_of_size(
    num_parameters: int, *, activation_bytes: float, examples: int, batch_size: int, epochs: int
) -> MemberCost:
    """A float32 model that is known by its size only, with Adam; see the head of this module.

    Example:
        >>> cost = member_of_size(
        ...     10**9, activation_bytes=0.0, examples=10**6, batch_size=10**4, epochs=1
        ... )
        >>> (cost.state_bytes + cost.gradient_bytes) / 1e9, cost.step_flops, cost.steps
        (16.0, 60000000000000.0, 100)
    """
    batch_size = min(batch_size, examples)
    return MemberCost(
        num_parameters=num_parameters,
        state_bytes=12.0 * num_parameters,
        gradient_bytes=4.0 * num_parameters,
        activation_bytes=activation_bytes,
        largest_bytes=0.0,
        data_bytes=0.0,
        step_flops=6.0 * num_parameters * batch_size,
        batch_size=batch_size,
        steps=epochs * (examples // batch_size),
    )


def plan_layout(
    cost: MemberCost,
    num_members: int,
    num_devices: int,
    usable_bytes: float,
    flops_per_second: float | None = None,
) -> Layout:
    """Chooses the axis to shard, and how many members train at once.

    Args:
        cost: of a member.
        num_members: N.
        num_devices: n.
        usable_bytes: of the memory of each device.
        flops_per_second: that a device reaches.

    Example:
        >>> cost = MemberCost(1, 12.0, 4.0, 8.0, 4.0, 100.0, 6.0, 1, 10)
        >>> layout = plan_layout(cost, num_members=20, num_devices=8, usable_bytes=300.0)
        >>> layout.axis, layout.members, layout.members_at_once, layout.device_bytes
        ('member', 3, 3, 208.0)
    """
    # As many devices share a member as there are spare ones, but no more than can share a batch.
    divisors = [count for count in range(1, num_devices + 1) if num_devices % count == 0]
    for_batch = [count for count in divisors if cost.batch_size % count == 0]
    spare = max(count for count in for_batch if count == 1 or num_devices >= count * num_members)
    by_batch = [
        count
        for count in for_batch
        if count >= spare and cost.device_bytes(1, 1, count) <= usable_bytes
    ]
    inside = [count for count in divisors if cost.shared_bytes(count) <= usable_bytes]
    at_once, fits = 1, 1
    if by_batch:
        per_member = by_batch[0]
        axis = "member" if per_member == 1 else "batch"
        members = _ceil(num_members * per_member, num_devices)
        at_once, fits = _members_at_once(cost, members, per_member, usable_bytes)
        device_bytes = cost.device_bytes(_ceil(members, fits), at_once, per_member)
    else:
        axis, per_member = ("inside", inside[0]) if inside else ("none", num_devices)
        members = fits = _ceil(num_members * per_member, num_devices)
        device_bytes = cost.shared_bytes(per_member)
    seconds = None
    if flops_per_second is not None and axis != "none":
        seconds = members * cost.steps * cost.step_flops / (per_member * flops_per_second)
    return Layout(num_devices, axis, per_member, members, fits, at_once, device_bytes, seconds)


def _members_at_once(
    cost: MemberCost, members: int, per_member: int, usable_bytes: float
) -> tuple[int, int]:
    """How many members train at once, and in how many fits, so that a fit is as large as it can be.

    In one fit a device holds the states of all of its members; chunks must have equal sizes, or
    all states are copied once more. Several fits hold those of a fit only.
    """
    for at_once in range(members, 1, -1):
        if members % at_once == 0 and (
            cost.device_bytes(members, at_once, per_member) <= usable_bytes
        ):
            return at_once, 1
    bytes_of_none = cost.device_bytes(0, 0, per_member)
    bytes_of_member = cost.device_bytes(1, 1, per_member) - bytes_of_none
    fits = _ceil(members, int((usable_bytes - bytes_of_none) // bytes_of_member))
    return _ceil(members, fits), fits


def print_plan(options: Mapping[str, Any]) -> None:
    """Prints the plan that the options of `jdrop plan` ask for.

    Args:
        options: by name, see `jdrop.study.cli`.

    Raises:
        UserError: options that do not fit each other, the data or the model.
    """
    sizes = {name: options[name] for name in ("batch_size", "epochs")}
    if options["parameters"] is None:
        unused = {"ood": None, "groups": None, "label_noise": 0.0, "seed": 0}
        data = command.load_data({**options, **unused})
        if options["model"] is None:
            model = command.mlp_model(options, data)
        else:
            model = Model(command.load_object(options["model"]))
        cost = measure_member(model.dropout, adam(1e-3), data, **sizes)
        source = f"as compiled for {jax.default_backend()}"
    else:
        cost = member_of_size(
            int(options["parameters"]),
            activation_bytes=options["activations"] or 0.0,
            examples=options["train_size"],
            **sizes,
        )
        source = "by formula"
    layouts = [
        plan_layout(
            cost,
            options["members"],
            num_devices,
            USABLE * options["device_memory"],
            options["flops_per_second"],
        )
        for num_devices in options["devices"]
    ]
    if options["json"]:
        plan = {"member": cost, "layouts": layouts}
        print(json.dumps(plan, default=dataclasses.asdict, indent=1))
        return
    _print_table(cost, layouts, options["members"], options["device_memory"], source)


def _print_table(
    cost: MemberCost, layouts: list[Layout], num_members: int, memory: float, source: str
) -> None:
    console = Console(highlight=False)
    total = num_members * cost.steps * cost.step_flops
    console.print(
        f"A member, {source}: {cost.num_parameters:,} parameters; state {_text(cost.state_bytes)}, "
        f"gradients {_text(cost.gradient_bytes)}, activations of {cost.batch_size:,} examples "
        f"{_text(cost.activation_bytes)}, data {_text(cost.data_bytes)}; {cost.steps:,} steps of "
        f"{cost.step_flops:.3g} FLOPs. All {num_members:,} members: {total:.3g} FLOPs."
    )
    table = Table(title=f"{num_members:,} members on devices of {_text(memory)}")
    for column in ("devices", "axis", "per member", "members", "fits", "at once", "needs", "hours"):
        table.add_column(column, justify="left" if column == "axis" else "right")
    for layout in layouts:
        hours = "-" if layout.seconds is None else _short(layout.seconds / 3600)
        counts = (layout.devices_per_member, layout.members, layout.fits, layout.members_at_once)
        cells = (*(f"{count:,}" for count in counts), _text(layout.device_bytes), hours)
        table.add_row(f"{layout.num_devices:,}", layout.axis, *cells)
    console.print(table)
    if cost.has_loop:
        console.print(LOOP_CAUTION)
    for axis in dict.fromkeys(layout.axis for layout in layouts):
        console.print(f"{axis}: {AXES[axis]}")
    console.print(
        '"per member" are the devices that share a member, "members" those of such devices, "fits" '
        'run one after another, "at once" is members_at_once in a fit, "needs" is the memory of a '
        f"device, of which {USABLE:.0%} are usable. Hours need --flops-per-second."
    )


def _num_bytes(arrays: Any) -> float:
    leaves = jax.tree.leaves(arrays)
    return float(sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves))


def _text(count: float) -> str:
    """A size for people.

    Example:
        >>> _text(1.5 * 2**30)
        '1.5 GiB'
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    index = min(int(math.log2(max(count, 1)) // 10), len(units) - 1)
    return f"{_short(count / 2 ** (10 * index))} {units[index]}"


def _short(number: float) -> str:
    """Three digits, or all that are before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _ceil(count: int, by: int) -> int:
    return -(-count // by)
