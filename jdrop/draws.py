"""Where a function draws random numbers, from which keys, and what reads them; from its jaxpr.

Keys are followed by *values*: integers that are equal where two arrays are computed in the same way
from the same arrays. So two draws use the same key if their keys have the same value. What is made
of a draw is followed to the first weights that it meets. Nothing here computes an array.
"""

import importlib.util
import itertools
import sysconfig
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
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

OUTPUTS = "outputs"
"""What reads an array that meets no weights."""

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
        read_by: the names of the first weights that meet what is made of the random numbers.
    """

    tag: str
    key: int
    shape: tuple[Any, ...] | None
    path: str
    line: str
    is_constant: bool
    num_turns: int | None
    read_by: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """The path, and the line in brackets, as far as they are known."""
        return f"{self.path} ({self.line})" if self.path and self.line else self.path or self.line

    @property
    def site(self) -> str:
        """The tag, or a name of a key without one."""
        return self.tag or f"key {self.key}"


@dataclass(frozen=True)
class Draws:
    """What a function draws.

    Attributes:
        draws: in their order. Those that reach no output are left out.
        tags: the names of tagged arrays that are no keys; for each the names of the first weights
            that meet what is made of it.
    """

    draws: tuple[Draw, ...]
    tags: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Argument:
    """An array that a jaxpr takes.

    Attributes:
        weight: its name, if it is a weight.
        is_constant: whether a key that is made of it counts as one that is made of no argument.
    """

    weight: str = ""
    is_constant: bool = False


def read_draws(function: Callable[..., Any], *arguments: Any, weights: Sequence[str] = ()) -> Draws:
    """Lists the places where a function draws random numbers that reach its outputs.

    Args:
        function: takes and returns pytrees of arrays.
        *arguments: arrays, or their shapes and dtypes.
        weights: the names of the first arrays, which are weights.

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
    others = itertools.repeat("", len(closed.jaxpr.invars) - len(weights))
    arguments_of_jaxpr = [Argument(weight) for weight in (*weights, *others)]
    return read_jaxpr(closed, [True] * len(closed.jaxpr.outvars), arguments_of_jaxpr)


def read_jaxpr(
    closed: ClosedJaxpr, is_output: Sequence[bool], arguments: Sequence[Argument]
) -> Draws:
    """Lists the places where a jaxpr draws random numbers that reach its outputs.

    Args:
        closed: the jaxpr.
        is_output: whether each result of it counts as an output.
        arguments: the arrays that it takes.
    """
    jaxpr, used_consts, used = dce_jaxpr_consts(closed.jaxpr, list(is_output))
    reader = _Reader()
    values = [reader.of_constant(const) for const in itertools.compress(closed.consts, used_consts)]
    for argument, var in zip(itertools.compress(arguments, used), jaxpr.invars, strict=True):
        weights = frozenset((argument.weight,)) - {""}
        from_input = not weights and not _is_key(var.aval)
        values.append(reader.new(_Origin(not argument.is_constant, from_input, weights=weights)))
    for result in reader.read(jaxpr, values, _Place()):
        reader.add_readers(reader.origins[result].sites, {OUTPUTS})
    draws = tuple(replace(draw, read_by=reader.readers_of(draw.site)) for draw in reader.draws)
    return Draws(draws, {name: reader.readers_of(name) for name in reader.tags})


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
        from_input: whether arguments that are neither weights nor keys are among it.
        loops: the loops in whose turns it changes.
        tag: the name of the tagged key among it, or "".
        key: the value of that key before it was tagged.
        weights: the names of the weights among it, unless it is made of an input.
        sites: the draws and the tags among it that have met no weights yet.
    """

    from_argument: bool = False
    from_input: bool = False
    loops: frozenset[int] = frozenset()
    tag: str = ""
    key: int | None = None
    weights: frozenset[str] = frozenset()
    sites: frozenset[str] = frozenset()


@dataclass(eq=False)
class _Reader:
    origins: list[_Origin] = field(default_factory=list)
    values: dict[Hashable, int] = field(default_factory=dict)
    key_of_words: dict[int, int] = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    readers: dict[str, set[str]] = field(default_factory=dict)
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
        from_input = any(origin.from_input for origin in origins)
        weights = frozenset().union(*(origin.weights for origin in origins))
        sites = frozenset().union(*(origin.sites for origin in origins))
        if sites and weights:
            self.add_readers(sites, weights)
            sites = frozenset()
        if from_input:
            weights = frozenset()
        return self.new(
            _Origin(from_argument, from_input, loops, tagged.tag, tagged.key, weights, sites)
        )

    def add_readers(self, sites: Collection[str], names: Collection[str]) -> None:
        """Keeps what reads these draws and tags."""
        for site in sites:
            self.readers.setdefault(site, set()).update(names)

    def readers_of(self, site: str) -> tuple[str, ...]:
        """What reads a draw or a tag."""
        return tuple(sorted(self.readers.get(site, ())))

    def of_constant(self, constant: Any) -> int:
        """The value of an array that is known."""
        if jax.dtypes.issubdtype(getattr(constant, "dtype", None), jax.dtypes.prng_key):
            constant = jax.random.key_data(constant)
        content = np.asarray(constant)
        return self._equal(("constant", content.dtype.str, content.shape, content.tobytes()), ())

    def _equal(self, description: Hashable, inputs: Sequence[int], site: str = "") -> int:
        """The value with this description, made of these, and perhaps by a draw."""
        if description not in self.values:
            self.values[description] = self.made_of(inputs)
        value = self.values[description]
        return self._with_sites(value, {site}) if site else value

    def _with_sites(self, value: int, sites: Collection[str]) -> int:
        """The same value, of which these draws and tags are among the origins."""
        origin = self.origins[value]
        self.origins[value] = replace(origin, sites=origin.sites | frozenset(sites))
        return value

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
        if name in COPIES and num_outputs == len(inputs):
            return inputs
        if name == "random_wrap" and inputs[0] in self.key_of_words:
            return [self.key_of_words[inputs[0]]]
        match name:
            case "scan":
                return self._read_scan(equation, inputs, place)
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
            site = self._add(inputs[0], None, place) if equation.outvars[0] in hashed else ""
            words = self._equal((name, inputs[0]), inputs, site)
            self.key_of_words[words] = inputs[0]
            return [words]
        is_draw = name in DRAWS
        site = self._add(inputs[0], equation.outvars[0].aval.shape, place) if is_draw else ""
        description = (name, repr(sorted(params.items(), key=str)), *inputs)
        return [self._equal((*description, index), inputs, site) for index in range(num_outputs)]

    def _tagged(self, equation: Any, value: int) -> int:
        name = equation.params["name"].removeprefix(TAG)
        tagged = self.new(self.origins[value])
        if _is_key(equation.outvars[0].aval):
            self.origins[tagged] = replace(self.origins[tagged], tag=name, key=value)
        else:
            self.tags.add(name)
        return self._with_sites(tagged, {name})

    def _add(self, key: int, shape: tuple[Any, ...] | None, place: _Place) -> str:
        """Keeps a draw, and returns its site."""
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
        return self.draws[-1].site

    def _call(self, called: ClosedJaxpr, inputs: Sequence[int], place: _Place) -> list[int]:
        constants = [self.of_constant(const) for const in called.consts]
        return self.read(called.jaxpr, [*constants, *inputs], place)

    def _read_scan(self, equation: Any, inputs: list[int], place: _Place) -> list[int]:
        params, body = equation.params, equation.params["jaxpr"].jaxpr
        # Only scanned inputs and stacked outputs have one axis more outside of the scan.
        # Versions of JAX keep the numbers of constants and carries in different parameters.
        num_carry = _num_alike(equation.outvars, body.outvars)
        num_consts = _num_alike(equation.invars, body.invars) - num_carry
        first_result = num_consts + num_carry
        kept = [
            body.outvars[i] is body.invars[num_consts + i] for i in range(num_carry)
        ]  # A carry that no turn changes.
        place, loop = self._enter_loop(place, params["length"])
        changing = [
            value if i < num_consts or (i < first_result and kept[i - num_consts])
            else self._changing(value, loop)
            for i, value in enumerate(inputs)
        ]  # fmt: skip
        results = self._read_turns(params["jaxpr"], changing, num_consts, num_carry, place)
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
        results = self._read_turns(
            params["body_jaxpr"], [*constants, *changing], num_body, len(carry), place
        )
        return [self.made_of([result], without_loop=loop) for result in results]

    def _read_turns(
        self, body: ClosedJaxpr, inputs: list[int], num_consts: int, num_carry: int, place: _Place
    ) -> list[int]:
        """The results of a turn; in the next one, weights may read what this one has drawn."""
        results = self._call(body, inputs, place)
        new_sites = [self.origins[result].sites for result in results[:num_carry]]
        if any(new_sites):
            carry = inputs[num_consts : num_consts + num_carry]
            carried = [
                self._with_sites(self.new(self.origins[value]), sites)
                for value, sites in zip(carry, new_sites, strict=True)
            ]
            draws = list(self.draws)
            others = inputs[:num_consts], inputs[num_consts + num_carry :]
            self._call(body, [*others[0], *carried, *others[1]], place)
            self.draws = draws  # The next turn draws at the same places.
        return results

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


def _num_alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many arrays have as many axes outside of a loop as inside of it."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(outer.aval.shape) == len(inner.aval.shape) for outer, inner in pairs)


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
