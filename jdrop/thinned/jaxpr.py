"""A network's training pass as a flat list of operations, with its dropout layers tagged.

`read_program` traces the pass to a jaxpr and lists its operations in order. Calls, such as those of
`jax.jit` and `jax.checkpoint`, are replaced by the operations inside them. Arrays are integers:
indices into `Program.shapes`. An example stands at the head of `jdrop.thinned.follow`.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jdrop.network import Network, Variables

TAG = "jdrop dropout "
"""The prefix of the names that stand for dropout layers in a jaxpr."""

CALLS = frozenset(
    (
        "checkpoint",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "jit",
        "pjit",
        "remat",
        "remat2",
    )
)
"""The primitives that call another jaxpr once, with their own inputs."""

COPIES = frozenset(("broadcast_in_dim", "convert_element_type", "copy"))
"""The primitives whose output has the value of their input, if that is a literal."""


def tag_dropout(name: str, inputs: Any) -> Any:
    """Returns the inputs, and leaves the name of a dropout layer in the jaxpr."""
    return checkpoint_name(inputs, TAG + name)


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation on arrays.

    Attributes:
        primitive: the name of the JAX primitive.
        params: the parameters of the primitive.
        inputs: the arrays it takes.
        outputs: the arrays it returns.
    """

    primitive: str
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def dropout_layer(self) -> str | None:
        """The name of the dropout layer that the operation stands for, if any."""
        name = str(self.params.get("name"))
        is_tag = self.primitive == "name" and name.startswith(TAG)
        return name.removeprefix(TAG) if is_tag else None


class Use(NamedTuple):
    """An occurrence of an array among the inputs or outputs of an operation."""

    operation: Operation
    is_output: bool
    position: int


@dataclass(eq=False)
class Program:
    """The operations of a training pass, in order.

    Attributes:
        operations: without calls, which are replaced by what they call.
        shapes: of every array.
        literals: the values of arrays that are literals of the jaxpr, or copies of literals.
        constants: arrays that the pass neither takes nor computes.
        scalars: every literal and scalar constant of the pass in order, as text.
        leaves: the variables before the pass.
        leaves_after: the variables after the pass, in the same order.
        inputs: the inputs of the network.
        outputs: the outputs of the network.
    """

    operations: list[Operation] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    literals: dict[int, np.ndarray] = field(default_factory=dict)
    constants: set[int] = field(default_factory=set)
    scalars: list[str] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)
    leaves_after: list[int] = field(default_factory=list)
    inputs: set[int] = field(default_factory=set)
    outputs: set[int] = field(default_factory=set)

    @cached_property
    def uses(self) -> dict[int, list[Use]]:
        """For each array, the operations that take or return it."""
        uses: dict[int, list[Use]] = {}
        for operation in self.operations:
            for position, array in enumerate(operation.inputs):
                uses.setdefault(array, []).append(Use(operation, False, position))
            for position, array in enumerate(operation.outputs):
                uses.setdefault(array, []).append(Use(operation, True, position))
        return uses

    @cached_property
    def dropout_calls(self) -> dict[str, list[Operation]]:
        """The tagged calls of each dropout layer, except those inside loops and branches."""
        calls: dict[str, list[Operation]] = {}
        for operation in self.operations:
            if operation.dropout_layer is not None:
                calls.setdefault(operation.dropout_layer, []).append(operation)
        return calls

    def depends_on_variables(self, array: int) -> bool:
        """Whether an array is computed from the variables."""
        reached = set(self.leaves)
        for operation in self.operations:
            if not reached.isdisjoint(operation.inputs):
                reached.update(operation.outputs)
        return array in reached


def read_program(network: Network, variables: Variables, inputs: Any) -> Program:
    """Lists the operations of a network's training pass.

    Args:
        network: the network, whose dropout layers call `tag_dropout`.
        variables: the variables, or their shapes and dtypes.
        inputs: example inputs.
    """
    leaves, tree = jax.tree.flatten(variables)

    def train(leaves: list[Any], inputs: Any) -> tuple[Any, list[Any]]:
        before = jax.tree.unflatten(tree, leaves)
        outputs, after = network.apply_train(before, inputs, jax.random.key(0))
        return outputs, jax.tree.leaves(after)

    return flatten_jaxpr(jax.make_jaxpr(train)(leaves, inputs), len(leaves))


def flatten_jaxpr(closed: ClosedJaxpr, num_leaves: int) -> Program:
    """Lists the operations of a jaxpr.

    Args:
        closed: the jaxpr of a function of the variables' leaves and the inputs. The function
            returns the outputs and the leaves of the variables after the pass.
        num_leaves: how many leaves the variables have.
    """
    program = Program()
    jaxpr = closed.jaxpr
    program.scalars += [repr(np.asarray(c).tolist()) for c in closed.consts if np.size(c) == 1]
    arrays = {var: _add_array(program, var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)}
    program.constants = {arrays[var] for var in jaxpr.constvars}
    results = _inline(program, jaxpr, arrays)
    arguments = [arrays[var] for var in jaxpr.invars]
    program.leaves, program.inputs = arguments[:num_leaves], set(arguments[num_leaves:])
    num_outputs = len(results) - num_leaves
    program.outputs, program.leaves_after = set(results[:num_outputs]), results[num_outputs:]
    return program


def _add_array(program: Program, aval: Any) -> int:
    program.shapes.append(tuple(getattr(aval, "shape", ())))
    return len(program.shapes) - 1


def _inline(program: Program, jaxpr: Jaxpr, arrays: dict[Any, int]) -> list[int]:
    """Appends the operations of a jaxpr to the program, and returns the jaxpr's results.

    Args:
        program: the program so far.
        jaxpr: the jaxpr.
        arrays: the array of each variable of the jaxpr; it gains those that the jaxpr computes.
    """

    def array_of(atom: Any) -> int:
        if not isinstance(atom, Literal):
            return arrays[atom]
        array = _add_array(program, atom.aval)
        program.literals[array] = np.asarray(atom.val)
        program.scalars.append(repr(program.literals[array].tolist()))
        return array

    for equation in jaxpr.eqns:
        inputs = tuple(array_of(atom) for atom in equation.invars)
        called = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if equation.primitive.name in CALLS and called is not None:
            outputs = _inline_call(program, called, inputs)
        else:
            outputs = tuple(_add_array(program, var.aval) for var in equation.outvars)
            operation = Operation(equation.primitive.name, equation.params, inputs, outputs)
            program.operations.append(operation)
            if operation.primitive in COPIES and inputs[0] in program.literals:
                program.literals[outputs[0]] = program.literals[inputs[0]]
        arrays.update(zip(equation.outvars, outputs, strict=True))
    return [array_of(atom) for atom in jaxpr.outvars]


def _inline_call(
    program: Program, called: ClosedJaxpr | Jaxpr, inputs: tuple[int, ...]
) -> tuple[int, ...]:
    """Appends the operations of a called jaxpr, and returns the outputs of the call."""
    jaxpr = called.jaxpr if isinstance(called, ClosedJaxpr) else called
    constants: tuple[int, ...] = ()
    if isinstance(called, ClosedJaxpr):
        constants = tuple(_add_array(program, var.aval) for var in jaxpr.constvars)
        program.constants.update(constants)
    variables = (*jaxpr.constvars, *jaxpr.invars)
    arrays = dict(zip(variables, constants + inputs, strict=True))
    return tuple(_inline(program, jaxpr, arrays))
