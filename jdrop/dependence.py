"""What the outputs of a function depend on, read from its jaxpr, and where it consumes a key.

Nothing here computes an array: functions are traced with shapes and dtypes.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.interpreters.partial_eval import dce_jaxpr_consts

from jdrop.draws import Argument, read_jaxpr


@dataclass(frozen=True, eq=False)
class TracedFunction:
    """The jaxpr of a function of several arguments that returns a tuple of outputs.

    Attributes:
        closed: the jaxpr.
        arguments: for each array that the jaxpr takes, the index of the argument that holds it.
        outputs: for each array that it returns, the index of the output that holds it.
    """

    closed: ClosedJaxpr
    arguments: tuple[int, ...]
    outputs: tuple[int, ...]

    def depends(self, outputs: Collection[int], arguments: Collection[int]) -> bool:
        """Whether any of these outputs is computed from any of these arguments.

        True is certain except where an array goes through a primitive that JAX cannot look into,
        such as a while loop. False is certain.
        """
        jaxpr = self.closed.jaxpr
        _, _, used = dce_jaxpr_consts(jaxpr, [output in outputs for output in self.outputs])
        return any(used[i] and argument in arguments for i, argument in enumerate(self.arguments))

    def consumptions(self, outputs: Collection[int], argument: int) -> tuple[str, ...]:
        """Lists where the keys in an argument become random numbers that reach these outputs.

        Returns:
            The path of the linen module, if there is one, and the line of the program.
        """
        is_output = [output in outputs for output in self.outputs]
        arguments = [Argument(is_constant=other != argument) for other in self.arguments]
        draws = read_jaxpr(self.closed, is_output, arguments).draws
        return tuple(dict.fromkeys(d.place or "the pass" for d in draws if not d.is_constant))


def trace(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> TracedFunction:
    """Traces a function.

    Args:
        function: returns a tuple of pytrees.
        *arguments: pytrees of arrays, or of shapes and dtypes. Other leaves stay as they are.

    Example:
        >>> import jax.numpy as jnp
        >>> traced = trace(lambda x, y: (x + 1, x * y), jnp.ones(2), jnp.ones(2))
        >>> traced.depends(outputs=[0], arguments=[1]), traced.depends([1], [1])
        (False, True)
    """
    leaves, tree = jax.tree.flatten(arguments)
    owners = [i for i, argument in enumerate(arguments) for _ in jax.tree.leaves(argument)]
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}

    def call(arrays: dict[int, Any]) -> tuple[Any, ...]:
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return function(*jax.tree.unflatten(tree, filled))

    closed, shapes = jax.make_jaxpr(call, return_shape=True)(arrays)
    return TracedFunction(
        closed,
        tuple(owners[i] for i in arrays),
        tuple(i for i, output in enumerate(shapes) for _ in jax.tree.leaves(output)),
    )
