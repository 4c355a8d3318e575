"""Finds what belongs to the units of a layer, in every array of a network, by reading its jaxpr.

Units run along one axis of an activation. From there they are followed through the operations of
the network in both directions, up to the arrays of its variables: the columns of the weights that
make them, their biases and statistics, the rows of the weights that read them. An operation that
mixes units otherwise than by such a product, as layer normalisation does, or that adds what is not
theirs, as a residual connection does, has no part for some of them: there the network cannot be
thinned, and the error says so.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

MARK = "jdrop dropout "
"""Begins the names under which dropout layers stand in a jaxpr."""


def _names(of_primitives: str) -> frozenset[str]:
    return frozenset(of_primitives.split())


ELEMENTWISE = _names(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp "
    "convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge "
    "gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg "
    "nextafter not or pow real reduce_precision rem round rsqrt select_n sign sin sinh sqrt square "
    "stop_gradient sub tan tanh xor"
)
ZERO_OF_ZERO = _names(
    "abs asin asinh atan atanh broadcast_in_dim cbrt ceil convert_element_type copy div erf "
    "erf_inv expm1 floor imag log1p name neg real reduce_max reduce_min reduce_precision "
    "reduce_prod reduce_sum reduce_window_max reduce_window_min reduce_window_sum reshape round "
    "sign sin sinh slice split sqrt square squeeze stop_gradient tan tanh transpose"
)
"""Operations that give 0 where their first input is 0."""

REARRANGED = _names(
    "broadcast_in_dim convert_element_type copy name neg reduce_precision reshape squeeze "
    "stop_gradient transpose"
)
"""Operations through which a factor of their input is a factor of what they give."""

REDUCTIONS = _names(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum"
)
PARTIAL = _names(
    "concatenate pad reduce_window_max reduce_window_min reduce_window_sum slice split"
)
CALLS = _names(
    "checkpoint closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr jit "
    "pjit remat remat2"
)
HINTS = {
    **dict.fromkeys(REDUCTIONS, " Layer normalisation and softmax go over all units."),
    "reshape": " Drop channels before they are flattened; group normalisation goes over groups.",
    "scan": " Layers within loops, as recurrent ones, cannot be thinned.",
}
"""What may be behind an operation that cannot be done with a part of the units."""


class ThinningError(ValueError):
    """A network of which no part can be trained alone; the message says why and what can be."""


@dataclass(frozen=True)
class Place:
    """Where the units of a layer lie in an array: unit `u` at `(index // inner) % size == u`.

    Attributes:
        units: the number of the layer among those thinned.
        axis: along which axis.
        inner: neighbouring indices that are of one unit; after a convolution is flattened, a
            channel also comes back again and again.
        reads: whether these are weights that read the units.
    """

    units: int
    axis: int
    inner: int
    reads: bool


@dataclass(frozen=True)
class Found:
    """The units of one layer.

    Attributes:
        size: how many there are.
        places: where they are, by number of the leaf of the variables.
        is_input: whether they are inputs of the network, none of which a variable makes.
    """

    size: int
    places: dict[int, list[Place]]
    is_input: bool


@dataclass(frozen=True, eq=False)
class _Operation:
    name: str
    params: dict[str, Any]
    inputs: list[int]
    outputs: list[int]


@dataclass(frozen=True)
class _Mark:
    """Units in one array of the jaxpr; see `Place`."""

    array: int
    axis: int
    inner: int
    reads: bool


@dataclass(frozen=True)
class _Step:
    """From one array to another: of an operation, or from a variable to what it becomes.

    One that crosses goes from one factor of a product to the other, over a sum over the units.
    """

    operation: _Operation | None
    here: _Mark
    there: _Mark
    crosses: bool


def mark(name: str, x: Any) -> Any:
    """Stands in the place of a dropout layer in the jaxpr that is read."""
    return checkpoint_name(x, MARK + name)


class Structure:
    """The operations of a network in training, calls inlined, with dropout layers marked.

    Args:
        closed: the jaxpr of a function of the variables' leaves and the inputs, which gives the
            outputs and as many leaves again, those of the variables after it.
        num_leaves: how many leaves the variables have.

    Attributes:
        numbers: all numbers that the network computes with and does not take from arrays, in order.
    """

    def __init__(self, closed: ClosedJaxpr, num_leaves: int) -> None:
        self.numbers: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._literals: dict[int, np.ndarray] = {}
        self._operations: list[_Operation] = []
        jaxpr = closed.jaxpr
        self.numbers += [repr(np.asarray(c).tolist()) for c in closed.consts if np.size(c) == 1]
        ids = {var: self._add(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)}
        self._constants = {ids[var] for var in jaxpr.constvars}
        given = [ids[var] for var in jaxpr.invars]
        results = self._inline(jaxpr, ids)
        self._leaves, self._inputs = given[:num_leaves], set(given[num_leaves:])
        cut = len(results) - num_leaves
        self._results, self._leaves_after = set(results[:cut]), results[cut:]
        self._uses: dict[int, list[tuple[_Operation, bool, int]]] = {}
        for operation in self._operations:
            for is_output, arrays in ((False, operation.inputs), (True, operation.outputs)):
                for position, array in enumerate(arrays):
                    self._uses.setdefault(array, []).append((operation, is_output, position))

    def _add(self, aval: Any) -> int:
        self._shapes.append(tuple(getattr(aval, "shape", ())))
        return len(self._shapes) - 1

    def _inline(self, jaxpr: Jaxpr, ids: dict[Any, int]) -> list[int]:
        """Lists the operations of a jaxpr whose variables `ids` knows, and gives its results."""

        def read(atom: Any) -> int:
            if isinstance(atom, Literal):
                array = self._add(atom.aval)
                self._literals[array] = np.asarray(atom.val)
                self.numbers.append(repr(self._literals[array].tolist()))
                return array
            return ids[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            if equation.primitive.name in CALLS and inner is not None:
                constants: list[int] = []
                if isinstance(inner, ClosedJaxpr):
                    constants = [self._add(var.aval) for var in inner.jaxpr.constvars]
                    self._constants.update(constants)
                    inner = inner.jaxpr
                variables = (*inner.constvars, *inner.invars)
                results = self._inline(inner, dict(zip(variables, constants + inputs, strict=True)))
                ids.update(zip(equation.outvars, results, strict=True))
                continue
            outputs = [self._add(var.aval) for var in equation.outvars]
            if equation.primitive.name in ("broadcast_in_dim", "convert_element_type", "copy"):
                self._literals.update(
                    (outputs[0], self._literals[array])
                    for array in inputs[:1]
                    if array in self._literals
                )
            ids.update(zip(equation.outvars, outputs, strict=True))
            self._operations.append(
                _Operation(equation.primitive.name, equation.params, inputs, outputs)
            )
        return [read(atom) for atom in jaxpr.outvars]

    @property
    def changes_state(self) -> bool:
        """Whether training changes variables otherwise than by the optimizer."""
        return self._leaves != self._leaves_after

    @cached_property
    def sites(self) -> dict[str, list[_Operation]]:
        """The calls of dropout layers by name, those within loops and branches left out."""
        sites: dict[str, list[_Operation]] = {}
        for operation in self._operations:
            if (name := _site_of(operation)) is not None:
                sites.setdefault(name, []).append(operation)
        return sites

    def units_of_site(self, number: int, name: str) -> Found:
        """What belongs to the units that a dropout layer drops, along its last axis.

        Args:
            number: what its units are to be called in `Place`s.
            name: of the layer.

        Raises:
            ThinningError: units that cannot be taken out.
        """
        sites = self.sites.get(name, [])
        if not sites:
            raise ThinningError(
                f"{name}: it is called within a loop or a branch, of which no part can be taken "
                "out; name a layer outside it in `rates`."
            )
        if len(sites) > 1:
            raise ThinningError(
                f"the dropout layer {name!r} is called more than once in a pass; give each call a "
                "layer of its own."
            )
        (site,) = sites
        (before,), (after,) = site.inputs, site.outputs
        shape = self._shapes[after]
        if len(shape) < 2:
            raise ThinningError(
                f"{name}: its inputs have shape {shape}, without axes for examples and units."
            )
        is_input = not self._depends_on_variables(before)
        start = _Mark(after, len(shape) - 1, 1, reads=False)
        starts = [start] if is_input else [start, replace(start, array=before)]
        steps = self._follow(name, *starts, size=shape[-1])
        self._check_zeros(name, start, steps)
        return Found(shape[-1], self._places(number, start, steps), is_input)

    def units_of_leaf(self, number: int, name: str, leaf: int, *, scaled: bool) -> Found:
        """What belongs to the units that an array of weights makes, along its last axis.

        Args:
            number: what its units are to be called in `Place`s.
            name: of the layer.
            leaf: the array.
            scaled: whether the arrays that read the units are to be scaled.

        Raises:
            ThinningError: units that cannot be taken out, or cannot be scaled.
        """
        shape = self._shapes[self._leaves[leaf]]
        if not shape:
            raise ThinningError(f"{name}: it is a single number, which makes no units.")
        start = _Mark(self._leaves[leaf], len(shape) - 1, 1, reads=False)
        steps = self._follow(name, start, size=shape[-1])
        if scaled:
            self._check_factors(name, steps)
        return Found(shape[-1], self._places(number, start, steps), is_input=False)

    def _follow(self, name: str, *starts: _Mark, size: int) -> list[_Step]:
        """Every step from one array to another, on all ways from where units are known to be."""
        site = next(iter(self.sites.get(name, ())), None)
        steps: list[_Step] = []
        marks, pending = {*starts}, [*starts]
        while pending:
            here = pending.pop()
            if here.array in self._results or here.array in self._inputs:
                kind = "outputs" if here.array in self._results else "inputs"
                raise ThinningError(f"{name}: its units are among the {kind} of the network.")
            if here.array in self._constants:
                raise ThinningError(
                    f"{name}: its units are combined with an array that is no variable."
                )
            found: list[_Step] = []
            for operation, is_output, position in self._uses.get(here.array, ()):
                if operation is site:
                    continue
                if (site_here := _site_of(operation)) is not None:
                    raise ThinningError(
                        f"{name}: its units are those of the dropout layer {site_here!r} too; name "
                        f"{site_here!r} in `rates` in its place, or give it the rate 0 there."
                    )
                links = self._links(name, operation, is_output, position, here, size)
                found += [_Step(operation, here, link, crosses) for link, crosses in links]
            for pair in zip(self._leaves, self._leaves_after, strict=True):
                for one, other in (pair, pair[::-1]):
                    if here.array == one:
                        link = _Mark(other, here.axis, here.inner, here.reads)
                        found.append(_Step(None, here, link, crosses=False))
            steps += found
            new = {step.there for step in found} - marks
            marks |= new
            pending += new
        return steps

    def _places(self, number: int, start: _Mark, steps: Sequence[_Step]) -> dict[int, list[Place]]:
        marks = {start, *(step.there for step in steps)}
        by_array: dict[int, list[Place]] = {}
        for found in sorted(marks, key=lambda mark: (mark.array, mark.axis, mark.reads)):
            place = Place(number, found.axis, found.inner, found.reads)
            by_array.setdefault(found.array, []).append(place)
        return {
            leaf: by_array[array] for leaf, array in enumerate(self._leaves) if array in by_array
        }

    def _links(
        self,
        name: str,
        operation: _Operation,
        is_output: bool,
        position: int,
        here: _Mark,
        size: int,
    ) -> Iterator[tuple[_Mark, bool]]:
        """Where units are in the other arrays of an operation, and whether a sum over them is read.

        Raises:
            ThinningError: an operation that has no part for some of the units.
        """
        kind, params, axis = operation.name, operation.params, here.axis
        shape = self._shapes[here.array]
        others = operation.inputs if is_output else operation.outputs

        def at(array: int, axis: int, inner: int = here.inner) -> tuple[_Mark, bool]:
            return _Mark(array, axis, inner, here.reads), False

        def across(array: int, axis: int) -> tuple[_Mark, bool]:
            return _Mark(array, axis, here.inner, not here.reads), True

        if kind in ELEMENTWISE:
            for array in (*operation.inputs, *operation.outputs):
                other = self._shapes[array]
                if len(other) == len(shape) and other[axis] == shape[axis]:
                    yield at(array, axis)
            return
        if kind == "random_bits" and is_output:
            return
        if kind == "broadcast_in_dim":
            dims = [int(dim) for dim in params["broadcast_dimensions"]]  # Of NumPy, under `vmap`.
            if not is_output:
                yield at(others[0], dims[axis])
            elif axis in dims:
                source = dims.index(axis)
                if self._shapes[others[0]][source] == shape[axis]:
                    yield at(others[0], source)
            return
        if kind == "reshape":
            moved = _reshaped(shape, self._shapes[others[0]], axis, here.inner, size)
            if moved is not None:
                yield at(others[0], *moved)
                return
        elif kind == "transpose":
            order = [int(source) for source in params["permutation"]]
            yield at(others[0], order[axis] if is_output else order.index(axis))
            return
        elif kind == "squeeze":
            kept = [a for a in range(len(shape) + len(params["dimensions"]) * is_output)]
            kept = [a for a in kept if a not in params["dimensions"]]
            yield at(others[0], kept[axis] if is_output else kept.index(axis))
            return
        elif kind in REDUCTIONS:
            rank = len(self._shapes[operation.inputs[0]])
            kept = [a for a in range(rank) if a not in params["axes"]]
            if is_output or axis in kept:
                yield at(others[0], kept[axis] if is_output else kept.index(axis))
                return
        elif kind == "dot_general":
            yield from self._links_of_product(operation, is_output, position, axis, at, across)
            return
        elif kind == "conv_general_dilated":
            found = self._links_of_convolution(operation, is_output, position, axis, at, across)
            if links := list(found):
                yield from links
                return
        elif kind in PARTIAL and self._is_whole(operation, axis):
            arrays = (*operation.inputs, *operation.outputs)
            yield from (at(array, axis) for array in arrays if self._shapes[array])
            return
        raise ThinningError(
            f"{name}: its units go through `{kind}`, which cannot be done with a part of them; "
            "units can be taken out between products with weights, where all between the products "
            f"is done to each unit alone.{HINTS.get(kind, '')}"
        )

    def _links_of_product(
        self, operation: _Operation, is_output: bool, position: int, axis: int, at: Any, across: Any
    ) -> Iterator[tuple[_Mark, bool]]:
        contracted, batched = operation.params["dimension_numbers"]
        ranks = [len(self._shapes[array]) for array in operation.inputs]
        # The axes of the result in order: (operand, axis of the operand).
        of_result: list[tuple[tuple[int, int], ...]] = [
            ((0, left), (1, right)) for left, right in zip(*batched, strict=True)
        ]
        for side in (0, 1):
            used = (*contracted[side], *batched[side])
            of_result += [((side, a),) for a in range(ranks[side]) if a not in used]
        result = operation.outputs[0]
        if is_output:
            for side, source in of_result[axis]:
                yield at(operation.inputs[side], source)
        elif axis in contracted[position]:
            partner = contracted[1 - position][contracted[position].index(axis)]
            yield across(operation.inputs[1 - position], partner)
        else:
            for target, sources in enumerate(of_result):
                if (position, axis) in sources:
                    yield at(result, target)
                    yield from (at(operation.inputs[side], source) for side, source in sources)

    def _links_of_convolution(
        self, operation: _Operation, is_output: bool, position: int, axis: int, at: Any, across: Any
    ) -> Iterator[tuple[_Mark, bool]]:
        params = operation.params
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            return
        numbers = params["dimension_numbers"]
        (images, kernel), result = operation.inputs, operation.outputs[0]
        if is_output and axis == numbers.out_spec[1]:
            yield at(kernel, numbers.rhs_spec[0])
        elif not is_output and position == 0 and axis == numbers.lhs_spec[1]:
            yield across(kernel, numbers.rhs_spec[1])
        elif not is_output and position == 1 and axis == numbers.rhs_spec[1]:
            yield across(images, numbers.lhs_spec[1])
        elif not is_output and position == 1 and axis == numbers.rhs_spec[0]:
            yield at(result, numbers.out_spec[1])

    def _is_whole(self, operation: _Operation, axis: int) -> bool:
        """Whether an operation on parts of arrays leaves an axis as it is."""
        params = operation.params
        match operation.name:
            case "pad":
                return params["padding_config"][axis] == (0, 0, 0)
            case "slice":
                arrays = (operation.inputs[0], operation.outputs[0])
                strides = params["strides"]
                sizes = {self._shapes[array][axis] for array in arrays}
                return len(sizes) == 1 and (strides is None or strides[axis] == 1)
            case "concatenate":
                return params["dimension"] != axis
            case "split":
                return params["axis"] != axis
        windows = [params[key][axis] for key in ("window_dimensions", "window_strides")]
        return windows == [1, 1] and tuple(params["padding"][axis]) == (0, 0)

    def _depends_on_variables(self, array: int) -> bool:
        reached = set(self._leaves)
        for operation in self._operations:
            if not reached.isdisjoint(operation.inputs):
                reached.update(operation.outputs)
        return array in reached

    def _check_zeros(self, name: str, dropped: _Mark, steps: Sequence[_Step]) -> None:
        """Raises where a unit that is dropped gives something to one of its readers.

        Followed from the dropout layer on is where arrays are 0 if its output is.
        """
        ways: dict[int, list[_Step]] = {}
        for step in steps:
            ways.setdefault(id(step.operation), []).append(step)
        zeros = {dropped}
        for operation in self._operations:
            sources: dict[_Mark, set[int]] = {}
            for step in ways.get(id(operation), ()):
                if step.here in zeros and step.there.array in operation.outputs:
                    sources.setdefault(step.there, set()).add(step.here.array)
            zeros.update(there for there, of in sources.items() if self._gives_zero(operation, of))
        for step in steps:
            factors = (replace(mark, reads=False) for mark in (step.here, step.there))
            if step.crosses and zeros.isdisjoint(factors):
                raise ThinningError(
                    f"{name}: a unit that it drops still gives something to the next layer, "
                    "because it is read beside the dropout layer too, or because what follows the "
                    "dropout layer is not, or not known to be, 0 for a 0; to take the unit out "
                    "would not be to drop it. Put the dropout layer last, right before the weights."
                )

    def _gives_zero(self, operation: _Operation, zeros: set[int]) -> bool:
        """Whether an operation gives 0 where these of its inputs, at least one, are 0."""
        inputs = operation.inputs

        def lies(array: int, low: float, high: float) -> bool:
            value = self._literals.get(array, np.array(np.nan))
            return array in zeros or low <= float(value.real) <= high

        match operation.name:
            case "mul" | "dot_general" | "conv_general_dilated":
                return True
            case "select_n":
                return all(lies(array, 0.0, 0.0) for array in inputs[1:])
            case "add" | "add_any" | "sub" | "concatenate" | "pad":
                return all(lies(array, 0.0, 0.0) for array in inputs)
            case "max":
                return all(lies(array, -math.inf, 0.0) for array in inputs)
            case "min":
                return all(lies(array, 0.0, math.inf) for array in inputs)
            case "clamp":
                low, x, high = inputs
                return x in zeros and lies(low, -math.inf, 0.0) and lies(high, 0.0, math.inf)
            case "integer_pow":
                return bool(operation.params["y"] > 0)
            case "pow":
                return inputs[0] in zeros and lies(inputs[1], math.ulp(0.0), math.inf)
        return operation.name in ZERO_OF_ZERO and inputs[0] in zeros

    def _check_factors(self, name: str, steps: Sequence[_Step]) -> None:
        """Raises where to scale the arrays that read units is not to scale what they read."""
        reading = {step.here.array for step in steps if step.here.reads}
        for step in steps:
            if step.crosses or not step.here.reads:
                continue
            if step.operation is None:
                passes = step.here.array == step.there.array
            elif step.operation.name == "mul":
                passes = sum(array in reading for array in step.operation.inputs) == 1
            else:
                passes = step.operation.name in REARRANGED
            if not passes:
                raise ThinningError(
                    f"{name}: what reads its units is computed, or changed in training, and cannot "
                    "be scaled in their place. Put a dropout layer behind the units, or choose "
                    "scale=False."
                )


def _site_of(operation: _Operation) -> str | None:
    """The name of the dropout layer that an operation stands for."""
    name = str(operation.params.get("name"))
    is_site = operation.name == "name" and name.startswith(MARK)
    return name.removeprefix(MARK) if is_site else None


def _reshaped(
    shape: Sequence[int], new: Sequence[int], axis: int, inner: int, size: int
) -> tuple[int, int] | None:
    """Where units are after a reshape: `(axis, inner)`; None where they are torn apart."""
    stride = inner * math.prod(shape[axis + 1 :])
    for place, length in enumerate(new):
        of_axis = math.prod(new[place + 1 :])
        new_inner, rest = divmod(stride, of_axis)
        if not rest and new_inner and length % (new_inner * size) == 0:
            return place, new_inner
    return None
