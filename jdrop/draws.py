"""Where a function draws random numbers, and from which keys, read from its jaxpr.

Keys are followed by *values*: integers that are equal where two arrays are computed in the same way
from the same arrays. So two draws use the same key if their keys have the same value. Nothing here
computes an array.
"""

import importlib.util
import sysconfig
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr_consts

TAG = "jdrop site "
"""The prefix of the names that tag arrays in a jaxpr."""

DRAWS = frozenset(("random_bits", "random_gamma", "rng_bit_generator", "rng_uniform"))
"""The primitives that make random numbers of a key."""

COPIES = frozenset(("copy", "name", "optimization_barrier", "random_clone"))
"""The primitives that return their inputs."""


def tag(x: Array, name: str) -> Array:
    """Returns an array or a key, and leaves a name in the jaxpr."""
    return checkpoint_name(x, TAG + name)


@dataclass(frozen=True)
class Draw:
    """A place in a function where random numbers are made of a key.

    Attributes:
        tag: the name of the tagged key; "" for a key without one.
        key: the value of the key: equal for equal keys.
        shape: of the random numbers; None where they are hashed by hand.
        path: of the linen module, or "".
        line: of the user's program, such as "models.py:12", or "".
        is_constant: whether the key is made of no argument of the function.
        num_turns: how many turns of a loop draw from this key; None for a loop of unknown length.
    """

    tag: str
    key: int
    shape: tuple[Any, ...] | None
    path: str
    line: str
    is_constant: bool
    num_turns: int | None


@dataclass(frozen=True)
class Draws:
    """What a function draws.

    Attributes:
        draws: in their order. Those that reach no output are left out.
        tags: the names of tagged arrays that are no keys.
    """

    draws: tuple[Draw, ...]
    tags: frozenset[str]


def read_draws(function: Callable[..., Any], *arguments: Any) -> Draws:
    """Lists the places where a function draws random numbers that reach its outputs.

    Args:
        function: takes and returns pytrees of arrays.
        *arguments: arrays, or their shapes and dtypes.

    Example:
        >>> def function(key):
        ...     return jax.random.bits(jax.random.fold_in(key, 1)) + jax.random.bits(
        ...         jax.random.fold_in(key, 1), (2,)
        ...     )
        >>> first, second = read_draws(function, jax.random.key(0)).draws
        >>> first.key == second.key, second.shape
        (True, (2,))
    """
    # A key that is used twice is what to tell, not an error.
    with jax.debug_key_reuse(False):
        closed = jax.make_jaxpr(function)(*arguments)
    jaxpr, used_consts, used = dce_jaxpr_consts(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    consts = [c for c, is_used in zip(closed.consts, used_consts, strict=True) if is_used]
    reader = _Reader()
    values = [reader.of_constant(const) for const in consts]
    values += [reader.new(_Origin(from_argument=True)) for is_used in used if is_used]
    reader.read(jaxpr, values, _Place())
    return Draws(tuple(reader.draws), frozenset(reader.tags))


@dataclass(frozen=True)
class _Place:
    """Where a jaxpr is called.

    Attributes:
        path: of the module.
        line: of the user's program.
        loops: the loops around, from the outermost on: their identity and their number of turns.
    """

    path: str = ""
    line: str = ""
    loops: tuple[tuple[int, int | None], ...] = ()


@dataclass(frozen=True)
class _Origin:
    """What a value is made of.

    Attributes:
        from_argument: whether arguments of the function are among it.
        loops: the loops in whose turns it changes.
        tag: the name of the tagged key among it, or "".
        key: the value of that key before it was tagged.
    """

    from_argument: bool = False
    loops: frozenset[int] = frozenset()
    tag: str = ""
    key: int | None = None


@dataclass(eq=False)
class _Reader:
    origins: list[_Origin] = field(default_factory=list)
    values: dict[Hashable, int] = field(default_factory=dict)
    key_of_words: dict[int, int] = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    num_loops: int = 0

    def new(self, origin: _Origin) -> int:
        """A value that equals no other."""
        self.origins.append(origin)
        return len(self.origins) - 1

    def made_of(self, inputs: Sequence[int], without_loop: int | None = None) -> int:
        """A value that equals no other, made of these."""
        origins = [self.origins[value] for value in inputs]
        loops = frozenset().union(*(origin.loops for origin in origins)) - {without_loop}
        # A key that is made of a tagged key is still the tagged site's.
        tagged = next((origin for origin in origins if origin.tag), _Origin())
        from_argument = any(origin.from_argument for origin in origins)
        return self.new(_Origin(from_argument, loops, tagged.tag, tagged.key))

    def of_constant(self, constant: Any) -> int:
        """The value of an array that is known."""
        if jax.dtypes.issubdtype(getattr(constant, "dtype", None), jax.dtypes.prng_key):
            constant = jax.random.key_data(constant)
        content = np.asarray(constant)
        return self._equal(("constant", content.dtype.str, content.shape, content.tobytes()), ())

    def _equal(self, description: Hashable, inputs: Sequence[int]) -> int:
        """The value with this description, made of these."""
        if description not in self.values:
            self.values[description] = self.made_of(inputs)
        return self.values[description]

    def read(self, jaxpr: Jaxpr, values: Sequence[int], place: _Place) -> list[int]:
        """Follows the arrays of a jaxpr, and returns the values of its results.

        Args:
            jaxpr: without constants, unless their values lead the arguments'.
            values: of its constants and arguments.
            place: where it is called.
        """
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

        def value_of(atom: Any) -> int:
            return self.of_constant(atom.val) if isinstance(atom, Literal) else known[atom]

        hashed = _hashed_words(jaxpr)
        for equation in jaxpr.eqns:
            scope = str(equation.source_info.name_stack)
            here = replace(
                place,
                path="/".join(part for part in (place.path, scope) if part),
                line=_line_of(equation) or place.line,
            )
            inputs = [value_of(atom) for atom in equation.invars]
            outputs = self._read_equation(equation, inputs, here, hashed)
            known.update(zip(equation.outvars, outputs, strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    def _read_equation(
        self, equation: Any, inputs: list[int], place: _Place, hashed: set[Any]
    ) -> list[int]:
        name, params, num_outputs = equation.primitive.name, equation.params, len(equation.outvars)
        if name == "name" and params["name"].startswith(TAG):
            return [self._tagged(equation, inputs[0])]
        if name in DRAWS:
            self._add(inputs[0], equation.outvars[0].aval.shape, place)
        if name in COPIES and num_outputs == len(inputs):
            return inputs
        if name == "random_wrap" and inputs[0] in self.key_of_words:
            return [self.key_of_words[inputs[0]]]
        match name:
            case "scan":
                return self._read_scan(params, inputs, place)
            case "while":
                return self._read_while(params, inputs, place)
            case "cond":
                called = [self._call(branch, inputs[1:], place) for branch in params["branches"]]
                return [
                    self.made_of([inputs[0], *results]) for results in zip(*called, strict=True)
                ]
        called_jaxprs = list(_jaxprs_of(params))
        if len(called_jaxprs) == 1 and len(called_jaxprs[0].jaxpr.invars) == len(inputs):
            return self._call(called_jaxprs[0], inputs, place)
        for called_jaxpr in called_jaxprs:
            made_of_inputs = [self.made_of(inputs) for _ in called_jaxpr.jaxpr.invars]
            self._call(called_jaxpr, made_of_inputs, place)
        if called_jaxprs:
            return [self.made_of(inputs) for _ in range(num_outputs)]
        if name == "random_unwrap":
            if equation.outvars[0] in hashed:
                self._add(inputs[0], None, place)
            words = self._equal((name, inputs[0]), inputs)
            self.key_of_words[words] = inputs[0]
            return [words]
        description = (name, repr(sorted(params.items(), key=str)), *inputs)
        return [self._equal((*description, index), inputs) for index in range(num_outputs)]

    def _tagged(self, equation: Any, value: int) -> int:
        name = equation.params["name"].removeprefix(TAG)
        if not _is_key(equation.outvars[0].aval):
            self.tags.add(name)
            return value
        return self.new(replace(self.origins[value], tag=name, key=value))

    def _add(self, key: int, shape: tuple[Any, ...] | None, place: _Place) -> None:
        origin = self.origins[key]
        num_turns: int | None = 1
        for loop, length in place.loops:
            if loop not in origin.loops:
                num_turns = None if length is None or num_turns is None else num_turns * length
        self.draws.append(
            Draw(
                tag=origin.tag,
                key=key if origin.key is None else origin.key,
                shape=shape,
                path=place.path,
                line=place.line,
                is_constant=not origin.from_argument,
                num_turns=num_turns,
            )
        )

    def _call(self, called: ClosedJaxpr, inputs: Sequence[int], place: _Place) -> list[int]:
        constants = [self.of_constant(const) for const in called.consts]
        return self.read(called.jaxpr, [*constants, *inputs], place)

    def _read_scan(self, params: Any, inputs: list[int], place: _Place) -> list[int]:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        body, first_result = params["jaxpr"].jaxpr, num_consts + num_carry
        kept = [
            body.outvars[i] is body.invars[num_consts + i] for i in range(num_carry)
        ]  # A carry that no turn changes.
        place, loop = self._enter_loop(place, params["length"])
        changing = [
            value if i < num_consts or (i < first_result and kept[i - num_consts])
            else self._changing(value, loop)
            for i, value in enumerate(inputs)
        ]  # fmt: skip
        results = self._call(params["jaxpr"], changing, place)
        return [self.made_of([result], without_loop=loop) for result in results]

    def _read_while(self, params: Any, inputs: list[int], place: _Place) -> list[int]:
        num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
        body, carry = params["body_jaxpr"].jaxpr, inputs[num_cond + num_body :]
        place, loop = self._enter_loop(place, None)
        changing = [
            value if body.outvars[i] is body.invars[num_body + i] else self._changing(value, loop)
            for i, value in enumerate(carry)
        ]
        self._call(params["cond_jaxpr"], [*inputs[:num_cond], *changing], place)
        constants = inputs[num_cond : num_cond + num_body]
        results = self._call(params["body_jaxpr"], [*constants, *changing], place)
        return [self.made_of([result], without_loop=loop) for result in results]

    def _enter_loop(self, place: _Place, length: int | None) -> tuple[_Place, int]:
        self.num_loops += 1
        return replace(place, loops=(*place.loops, (self.num_loops, length))), self.num_loops

    def _changing(self, value: int, loop: int) -> int:
        origin = self.origins[value]
        return self.new(replace(origin, loops=origin.loops | {loop}))


def _hashed_words(jaxpr: Jaxpr) -> set[Any]:
    """The arrays of a jaxpr that are used for anything but to make a key of them."""
    used = {
        atom
        for equation in jaxpr.eqns
        if equation.primitive.name != "random_wrap"
        for atom in equation.invars
        if not isinstance(atom, Literal)
    }
    return used | {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}


def _is_key(aval: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(aval, "dtype", None), jax.dtypes.prng_key)


def _jaxprs_of(params: dict[str, Any]) -> Iterator[ClosedJaxpr]:
    """The jaxprs that an equation calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item
            elif isinstance(item, Jaxpr):
                yield ClosedJaxpr(item, ())


def _frames(equation: Any) -> Sequence[Any]:
    """The frames of the program that led to an equation, the innermost first."""
    return getattr(equation.source_info.traceback, "frames", ())


def _line_of(equation: Any) -> str:
    """The innermost line of the user's program that led to an equation, or ""."""
    for frame in _frames(equation):
        if not frame.file_name.startswith("<") and not any(
            _is_in(folder, frame.file_name) for folder in _libraries()
        ):
            return f"{Path(frame.file_name).name}:{frame.line_num}"
    return ""


@cache
def _libraries() -> tuple[str, ...]:
    """The folders of programs that are not the user's."""
    packages = ("beartype", "flax", "jax", "jaxlib", "jaxtyping", "jdrop")
    specs = map(importlib.util.find_spec, packages)
    folders = [f"{Path(spec.origin).parent}/" for spec in specs if spec and spec.origin]
    return (*folders, sysconfig.get_path("stdlib") + "/")


def _is_in(folder: str, file: str) -> bool:
    if not file.startswith(folder):
        return False
    # The standard library contains the folder of other packages.
    return "site-packages" in folder or "site-packages" not in file
