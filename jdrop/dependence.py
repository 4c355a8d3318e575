"""What the outputs of a function depend on, read from its jaxpr, and where it consumes a key.

Nothing here computes an array: functions are traced with shapes and dtypes.
"""

import importlib.util
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr_consts


@dataclass(frozen=True, eq=False)
class TracedFunction:
    """The jaxpr of a function of several arguments that returns a tuple of outputs.

    Attributes:
        jaxpr: without its constants.
        arguments: for each array that the jaxpr takes, the index of the argument that holds it.
        outputs: for each array that it returns, the index of the output that holds it.
    """

    jaxpr: Jaxpr
    arguments: tuple[int, ...]
    outputs: tuple[int, ...]

    def depends(self, outputs: Collection[int], arguments: Collection[int]) -> bool:
        """Whether any of these outputs is computed from any of these arguments.

        True is certain except where an array goes through a primitive that JAX cannot look into,
        such as a while loop. False is certain.
        """
        _, used = self._needed_for(outputs)
        return any(used[i] and argument in arguments for i, argument in enumerate(self.arguments))

    def consumptions(self, outputs: Collection[int], argument: int) -> tuple[str, ...]:
        """Lists where the keys in an argument become random numbers that reach these outputs.

        Returns:
            The path of the linen module, if there is one, and the line of the program.
        """
        jaxpr, used = self._needed_for(outputs)
        kept = (a for a, is_used in zip(self.arguments, used, strict=True) if is_used)
        keys = {var for var, a in zip(jaxpr.invars, kept, strict=True) if a == argument}
        return tuple(dict.fromkeys(_consumptions(jaxpr, keys, path="", line="")))

    def _needed_for(self, outputs: Collection[int]) -> tuple[Jaxpr, list[bool]]:
        """The part of the jaxpr that computes these outputs, and which arrays it takes."""
        jaxpr, _, used = dce_jaxpr_consts(self.jaxpr, [o in outputs for o in self.outputs])
        return jaxpr, used


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
        closed.jaxpr,
        tuple(owners[i] for i in arrays),
        tuple(i for i, output in enumerate(shapes) for _ in jax.tree.leaves(output)),
    )


def _consumptions(jaxpr: Jaxpr, keys: set[Any], path: str, line: str) -> Iterator[str]:
    """The equations of a jaxpr that turn keys into something else.

    Args:
        jaxpr: only what is needed for the outputs of interest.
        keys: the variables of the jaxpr that hold keys; it gains those that are made of them.
        path: of the module around the jaxpr.
        line: of the program that called the jaxpr.
    """
    for equation in jaxpr.eqns:
        given = [isinstance(v, Literal) or v not in keys for v in equation.invars]
        if all(given):
            continue
        scope = str(equation.source_info.name_stack)
        here = "/".join(part for part in (path, scope) if part)
        at = _line(equation.source_info) or line
        inner = list(_jaxprs_of(equation.params))
        for called in inner:
            # The arrays of a branch or a loop body are the last ones that its equation takes.
            pairs = zip(reversed(called.invars), reversed(equation.invars), strict=False)
            taken = {v for v, w in pairs if not isinstance(w, Literal) and w in keys}
            yield from _consumptions(called, taken, here, at)
        made = {v for v in equation.outvars if _is_key(v.aval)}
        keys |= made
        if not inner and not made:
            yield f"{here} ({at})" if here and at else here or at or "the pass"


def _is_key(aval: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(aval, "dtype", None), jax.dtypes.prng_key)


def _jaxprs_of(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs that an equation calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            called = item.jaxpr if isinstance(item, ClosedJaxpr) else item
            if isinstance(called, Jaxpr):
                yield called


@cache
def _libraries() -> tuple[str, ...]:
    """The folders of programs that are not the user's."""
    specs = (importlib.util.find_spec(name) for name in ("flax", "jax", "jaxlib", "jdrop"))
    return tuple(f"{Path(spec.origin).parent}/" for spec in specs if spec and spec.origin)


def _line(source_info: Any) -> str:
    """The innermost line of the user's program that led to an equation, "file:line"; or ""."""
    for frame in getattr(source_info.traceback, "frames", ()):
        if not frame.file_name.startswith((*_libraries(), "<")):
            return f"{frame.file_name}:{frame.line_num}"
    return ""
