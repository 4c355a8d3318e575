"""A table with one rule per JAX primitive: how units pass through it.

To support another primitive, add one line to `RULES`. A primitive without a rule cannot be computed
with some of the units only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jdrop.thinned.jaxpr import Operation, Use
from jdrop.thinned.units import UnitAxis

Shapes = Sequence[tuple[int, ...]]
"""The shape of every array of the program."""

FollowRule = Callable[[Shapes, Use, UnitAxis], Sequence[UnitAxis] | None]
"""`follow(shapes, use, here)` -> where the same units lie in the arrays of the operation.

`here` is an axis of the array at `use`. If a product sums over the units, `reads` flips from one
factor to the other. None: the operation cannot be computed with some of the units only.
"""


@dataclass(frozen=True)
class Zeros:
    """The arrays that are 0 whenever the units are dropped, and the values of literals."""

    arrays: set[int]
    literals: dict[int, np.ndarray]

    def lies_within(self, array: int, low: float, high: float) -> bool:
        """Whether an array is 0, or a literal between two numbers."""
        value = self.literals.get(array, np.array(np.nan))
        return array in self.arrays or low <= float(value.real) <= high


ZeroRule = Callable[[Operation, Zeros], bool]
"""`gives_zero(operation, zeros)` -> whether the output is 0; at least one input is."""


@dataclass(frozen=True)
class Rule:
    """What a primitive does to units.

    Attributes:
        follow: where the units lie in its other arrays.
        gives_zero: whether its output is 0 when some of its inputs are.
        keeps_scale: scaling the input scales the output by the same factor.
    """

    follow: FollowRule
    gives_zero: ZeroRule
    keeps_scale: bool = False


# Where units lie.


def _follow_elementwise(shapes: Shapes, use: Use, here: UnitAxis) -> list[UnitAxis]:
    shape = shapes[here.array]
    return [
        replace(here, array=array)
        for array in (*use.operation.inputs, *use.operation.outputs)
        if len(shapes[array]) == len(shape) and shapes[array][here.axis] == shape[here.axis]
    ]


def _follow_moved(
    use: Use, here: UnitAxis, input_axes: Sequence[int | None]
) -> list[UnitAxis] | None:
    """For an operation that moves axes: `input_axes` has the input's axis for each output axis."""
    if use.is_output:
        axis = input_axes[here.axis]
        return [] if axis is None else [replace(here, array=use.operation.inputs[0], axis=axis)]
    if here.axis not in input_axes:
        return None
    return [replace(here, array=use.operation.outputs[0], axis=input_axes.index(here.axis))]


def _follow_broadcast(shapes: Shapes, use: Use, here: UnitAxis) -> list[UnitAxis] | None:
    source, target = (shapes[arrays[0]] for arrays in (use.operation.inputs, use.operation.outputs))
    input_axes: list[int | None] = [None] * len(target)
    for axis, output_axis in enumerate(use.operation.params["broadcast_dimensions"]):
        # An axis of size 1 that is repeated holds no units.
        if not use.is_output or source[axis] == target[output_axis]:
            input_axes[int(output_axis)] = axis
    return _follow_moved(use, here, input_axes)


def _follow_transpose(shapes: Shapes, use: Use, here: UnitAxis) -> list[UnitAxis] | None:
    return _follow_moved(use, here, [int(axis) for axis in use.operation.params["permutation"]])


def _follow_squeeze(shapes: Shapes, use: Use, here: UnitAxis) -> list[UnitAxis] | None:
    return _follow_moved(use, here, _remaining_axes(shapes, use, "dimensions"))


def _follow_reduction(shapes: Shapes, use: Use, here: UnitAxis) -> list[UnitAxis] | None:
    return _follow_moved(use, here, _remaining_axes(shapes, use, "axes"))


def _remaining_axes(shapes: Shapes, use: Use, removed: str) -> list[int]:
    rank = len(shapes[use.operation.inputs[0]])
    return [axis for axis in range(rank) if axis not in use.operation.params[removed]]


def _follow_reshape(shapes: Shapes, use: Use, here: UnitAxis) -> list[UnitAxis] | None:
    (target,) = use.operation.inputs if use.is_output else use.operation.outputs
    shape, new_shape = shapes[here.array], shapes[target]
    # How many elements lie between a unit and its neighbour, before and after.
    stride = here.inner * math.prod(shape[here.axis + 1 :])
    for axis, length in enumerate(new_shape):
        inner, remainder = divmod(stride, math.prod(new_shape[axis + 1 :]))
        if not remainder and inner and length % (inner * here.group.size) == 0:
            return [replace(here, array=target, axis=axis, inner=inner)]
    return None


def _follow_product(shapes: Shapes, use: Use, here: UnitAxis) -> list[UnitAxis]:
    (left, right), (result,) = use.operation.inputs, use.operation.outputs
    contracted, batched = use.operation.params["dimension_numbers"]
    # For each axis of the result, the axes of the factors: (factor, axis).
    sources: list[tuple[tuple[int, int], ...]] = [
        ((0, left_axis), (1, right_axis)) for left_axis, right_axis in zip(*batched, strict=True)
    ]
    for factor, array in enumerate((left, right)):
        used = (*contracted[factor], *batched[factor])
        sources += [((factor, axis),) for axis in range(len(shapes[array])) if axis not in used]

    def in_factors(result_axis: int) -> list[UnitAxis]:
        return [
            replace(here, array=use.operation.inputs[factor], axis=axis)
            for factor, axis in sources[result_axis]
        ]

    if use.is_output:
        return in_factors(here.axis)
    if here.axis in contracted[use.position]:
        other = 1 - use.position
        axis = contracted[other][contracted[use.position].index(here.axis)]
        array = use.operation.inputs[other]
        return [replace(here, array=array, axis=axis, reads=not here.reads)]
    return [
        unit_axis
        for result_axis, factor_axes in enumerate(sources)
        if (use.position, here.axis) in factor_axes
        for unit_axis in (replace(here, array=result, axis=result_axis), *in_factors(result_axis))
    ]


def _follow_convolution(shapes: Shapes, use: Use, here: UnitAxis) -> list[UnitAxis] | None:
    params = use.operation.params
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    (images, kernel), (result,) = use.operation.inputs, use.operation.outputs
    specs = params["dimension_numbers"]
    image_channels, result_channels = specs.lhs_spec[1], specs.out_spec[1]
    kernel_outputs, kernel_inputs = specs.rhs_spec[:2]
    if use.is_output:
        if here.axis == result_channels:
            return [replace(here, array=kernel, axis=kernel_outputs)]
    elif use.position == 0:
        if here.axis == image_channels:
            return [replace(here, array=kernel, axis=kernel_inputs, reads=not here.reads)]
    elif here.axis == kernel_inputs:
        return [replace(here, array=images, axis=image_channels, reads=not here.reads)]
    elif here.axis == kernel_outputs:
        return [replace(here, array=result, axis=result_channels)]
    return None


def _follow_random_bits(shapes: Shapes, use: Use, here: UnitAxis) -> list[UnitAxis] | None:
    return [] if use.is_output else None


def _follow_untouched(
    is_untouched: Callable[[Shapes, Operation, int], bool],
) -> FollowRule:
    """The rule of a primitive that changes some axes, and allows units along the others."""

    def follow(shapes: Shapes, use: Use, here: UnitAxis) -> list[UnitAxis] | None:
        if not is_untouched(shapes, use.operation, here.axis):
            return None
        arrays = (*use.operation.inputs, *use.operation.outputs)
        return [replace(here, array=array) for array in arrays if shapes[array]]

    return follow


def _not_padded(shapes: Shapes, operation: Operation, axis: int) -> bool:
    return bool(operation.params["padding_config"][axis] == (0, 0, 0))


def _not_sliced(shapes: Shapes, operation: Operation, axis: int) -> bool:
    strides = operation.params["strides"]
    sizes = {shapes[array][axis] for array in (operation.inputs[0], operation.outputs[0])}
    return len(sizes) == 1 and (strides is None or strides[axis] == 1)


def _not_concatenated(shapes: Shapes, operation: Operation, axis: int) -> bool:
    return bool(operation.params["dimension"] != axis)


def _not_split(shapes: Shapes, operation: Operation, axis: int) -> bool:
    return bool(operation.params["axis"] != axis)


def _not_windowed(shapes: Shapes, operation: Operation, axis: int) -> bool:
    params = operation.params
    windows = [params[key][axis] for key in ("window_dimensions", "window_strides")]
    return windows == [1, 1] and tuple(params["padding"][axis]) == (0, 0)


# Where outputs are 0.


def _never(operation: Operation, zeros: Zeros) -> bool:
    return False


def _if_any(operation: Operation, zeros: Zeros) -> bool:
    return True


def _if_first(operation: Operation, zeros: Zeros) -> bool:
    return operation.inputs[0] in zeros.arrays


def _if_all(operation: Operation, zeros: Zeros) -> bool:
    return all(zeros.lies_within(array, 0.0, 0.0) for array in operation.inputs)


def _if_all_cases(operation: Operation, zeros: Zeros) -> bool:
    return all(zeros.lies_within(array, 0.0, 0.0) for array in operation.inputs[1:])


def _if_none_above(operation: Operation, zeros: Zeros) -> bool:
    return all(zeros.lies_within(array, -math.inf, 0.0) for array in operation.inputs)


def _if_none_below(operation: Operation, zeros: Zeros) -> bool:
    return all(zeros.lies_within(array, 0.0, math.inf) for array in operation.inputs)


def _if_bounds_hold_zero(operation: Operation, zeros: Zeros) -> bool:
    low, x, high = operation.inputs
    return (
        x in zeros.arrays
        and zeros.lies_within(low, -math.inf, 0.0)
        and zeros.lies_within(high, 0.0, math.inf)
    )


def _if_integer_power_is_positive(operation: Operation, zeros: Zeros) -> bool:
    return bool(operation.params["y"] > 0)


def _if_power_is_positive(operation: Operation, zeros: Zeros) -> bool:
    base, power = operation.inputs
    return base in zeros.arrays and zeros.lies_within(power, math.ulp(0.0), math.inf)


def _rules(
    primitives: str, follow: FollowRule, gives_zero: ZeroRule, *, keeps_scale: bool = False
) -> dict[str, Rule]:
    """The same rule for several primitives."""
    return dict.fromkeys(primitives.split(), Rule(follow, gives_zero, keeps_scale))


RULES: dict[str, Rule] = {
    # Elementwise, by where the output is 0.
    **_rules(
        "convert_element_type copy name neg reduce_precision stop_gradient",
        _follow_elementwise,
        _if_first,
        keeps_scale=True,
    ),
    **_rules(
        "abs asin asinh atan atanh cbrt ceil div erf erf_inv expm1 floor imag log1p real round "
        "sign sin sinh sqrt square tan tanh",
        _follow_elementwise,
        _if_first,
    ),
    **_rules(
        "acos acosh and atan2 cos cosh digamma eq erfc exp exp2 ge gt is_finite le lgamma log "
        "logistic lt ne nextafter not or rem rsqrt xor",
        _follow_elementwise,
        _never,
    ),
    **_rules("mul", _follow_elementwise, _if_any, keeps_scale=True),
    **_rules("add add_any sub", _follow_elementwise, _if_all),
    **_rules("select_n", _follow_elementwise, _if_all_cases),
    **_rules("max", _follow_elementwise, _if_none_above),
    **_rules("min", _follow_elementwise, _if_none_below),
    **_rules("clamp", _follow_elementwise, _if_bounds_hold_zero),
    **_rules("integer_pow", _follow_elementwise, _if_integer_power_is_positive),
    **_rules("pow", _follow_elementwise, _if_power_is_positive),
    # Moved axes.
    **_rules("broadcast_in_dim", _follow_broadcast, _if_first, keeps_scale=True),
    **_rules("reshape", _follow_reshape, _if_first, keeps_scale=True),
    **_rules("squeeze", _follow_squeeze, _if_first, keeps_scale=True),
    **_rules("transpose", _follow_transpose, _if_first, keeps_scale=True),
    # Reductions over other axes than that of the units.
    **_rules("reduce_max reduce_min reduce_prod reduce_sum", _follow_reduction, _if_first),
    **_rules("argmax argmin reduce_and reduce_or", _follow_reduction, _never),
    # Products.
    **_rules("dot_general", _follow_product, _if_any),
    **_rules("conv_general_dilated", _follow_convolution, _if_any),
    # Changes along other axes than that of the units.
    **_rules("concatenate", _follow_untouched(_not_concatenated), _if_all),
    **_rules("pad", _follow_untouched(_not_padded), _if_all),
    **_rules("slice", _follow_untouched(_not_sliced), _if_first),
    **_rules("split", _follow_untouched(_not_split), _if_first),
    **_rules(
        "reduce_window_max reduce_window_min reduce_window_sum",
        _follow_untouched(_not_windowed),
        _if_first,
    ),
    **_rules("random_bits", _follow_random_bits, _never),
}

_HINT_OF_REDUCTIONS = " Layer normalisation and softmax go over all units."
HINTS = {
    **dict.fromkeys(("argmax", "argmin"), _HINT_OF_REDUCTIONS),
    **dict.fromkeys(("reduce_max", "reduce_min"), _HINT_OF_REDUCTIONS),
    **dict.fromkeys(("reduce_sum", "reduce_prod"), _HINT_OF_REDUCTIONS),
    "reshape": " Drop channels before they are flattened; group normalisation goes over groups.",
    "scan": " Layers within loops, as recurrent ones, cannot be thinned.",
}
"""The layers behind a primitive that cannot be computed with some of the units only."""
