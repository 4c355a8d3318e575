"""What a comparison trains, and how; each setting is described once, beside its default."""

import dataclasses
import inspect
import operator
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jdrop.study.errors import UserError

SWEPT_TYPES = {"rate": float, "train_size": int, "width_factor": float, "label_noise": float}
"""By parameter that a comparison can sweep, the type of its values."""


def _setting(
    default: Any,
    description: str,
    *,
    minimum: int | None = None,
    above: int | None = None,
    maximum: int | None = None,
) -> Any:
    """A field with its description and bounds, of which `above` is excluded."""
    bounds = {"minimum": minimum, "above": above, "maximum": maximum}
    return dataclasses.field(default=default, metadata={"description": description, **bounds})


@dataclasses.dataclass(frozen=True)
class Settings:
    """How many networks a comparison trains, and how.

    NumPy and JAX scalars become Python numbers.

    Raises:
        UserError: a value of another type or out of bounds; the message names both.

    Example:
        >>> Settings(epochs=10).epochs
        10
    """

    replicates: int = _setting(
        5, "Repetitions of the whole comparison; intervals are over them.", minimum=2
    )
    ensemble_size: int = _setting(
        10, "Plain networks in each replicate: the largest ensemble.", minimum=2
    )
    budget: int = _setting(
        5,
        "Networks whose training cost each control method may use; also the dropout networks in "
        "each replicate.",
        minimum=2,
    )
    num_samples: int = _setting(50, "Masks of Monte-Carlo dropout.", minimum=2)
    epochs: int = _setting(
        50,
        "Passes over the training examples; tuned methods have between a tenth and twice as many.",
        minimum=1,
    )
    batch_size: int = _setting(50, "Examples in a training step.", minimum=1)
    learning_rate: float = _setting(2e-3, "Learning rate of Adam.", above=0, maximum=10**6)
    tune: bool = _setting(
        True,
        "Whether cross-validation on the training examples chooses the epochs of each method.",
    )
    controls: bool = _setting(
        True, "Whether to train the control methods, each as costly as several networks."
    )
    theory: bool = _setting(
        True,
        "Whether to test the theory of dropout: overfitting, co-adaptation of units, and all masks "
        "of a small network.",
    )
    seed: int = _setting(0, "Seed of everything that is random.", minimum=0, maximum=2**32 - 1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _as_python(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Settings":
        """Makes settings from values by name; settings without a value keep their default.

        Raises:
            UserError: a name that is no setting, or a value that its setting cannot have.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise UserError(f"settings must be among {', '.join(names)}, got {', '.join(unknown)}.")
        return cls(**values)


def checked_sweep(sweep: Mapping[str, Iterable[Any]] | None) -> dict[str, list[float]]:
    """Converts the values to sweep to Python floats.

    Args:
        sweep: by parameter in `SWEPT_TYPES`, its values; None sweeps nothing.

    Raises:
        UserError: an unknown parameter, no values, equal values, or values of another type.

    Example:
        >>> checked_sweep({"train_size": np.array([100, 200])})
        {'train_size': [100.0, 200.0]}
    """
    if not isinstance(sweep, Mapping | None):
        raise UserError(
            f"sweep must be a dict such as {{'rate': [0.1, 0.5]}}, got {type(sweep).__name__}."
        )
    checked: dict[str, list[float]] = {}
    for name, values in (sweep or {}).items():
        if name not in SWEPT_TYPES:
            raise UserError(f"sweep (--sweep) must name {' or '.join(SWEPT_TYPES)}, got {name!r}.")
        integers = SWEPT_TYPES[name] is int
        what = "integers" if integers else "numbers"
        try:
            if any(isinstance(value, str | bool) for value in (values, *values)):
                raise TypeError("a string or a Boolean")
            numbers = [float(operator.index(value) if integers else value) for value in values]
        except (OverflowError, TypeError, ValueError) as error:
            raise UserError(
                f"values of {name} to sweep must be a list of {what}, got {values!r}."
            ) from error
        if not numbers or len(set(numbers)) < len(numbers):
            raise UserError(
                f"values of {name} to sweep must be different {what}, got {values!r}; give each "
                "value once."
            )
        checked[name] = numbers
    return checked


def _as_python(field: dataclasses.Field, value: Any) -> Any:
    """Converts to a Python number or Boolean.

    Raises:
        UserError: another type, or a value out of bounds.
    """
    is_bool = isinstance(value, bool | np.bool_)
    if field.type is bool and is_bool:
        return bool(value)
    if field.type is not bool and not is_bool and not isinstance(value, str):
        try:
            number = operator.index(value) if field.type is int else float(value)
        except (OverflowError, TypeError, ValueError):
            pass
        else:
            if _is_within_bounds(field, number):
                return number
    raise UserError(
        f"{field.name} must be {_allowed(field)}, got {value!r}; the default is {field.default}."
    )


def _is_within_bounds(field: dataclasses.Field, number: int | float) -> bool:
    minimum, above, maximum = (field.metadata[name] for name in ("minimum", "above", "maximum"))
    # Written so that NaN fails: every setting has a lower bound.
    is_large_enough = number > above if minimum is None else number >= minimum
    return is_large_enough and (maximum is None or number <= maximum)


def _allowed(field: dataclasses.Field) -> str:
    """The values that a setting can have, in words."""
    if field.type is bool:
        return "True or False"
    words = {"minimum": "of at least", "above": "above", "maximum": "at most"}
    bounds = [
        f"{word} {field.metadata[name]:,}"
        for name, word in words.items()
        if field.metadata[name] is not None
    ]
    return f"{'an integer' if field.type is int else 'a number'} {' and '.join(bounds)}"


def _document_attributes() -> None:
    """Adds the section of attributes to the docstring of `Settings`, from the fields."""
    lines = ["Attributes:"]
    for field in dataclasses.fields(Settings):
        allowed = _allowed(field)
        text = (
            f"{field.name}: {field.metadata['description']} {allowed[0].upper()}{allowed[1:]}, "
            f"{field.default} by default."
        )
        lines.append(textwrap.fill(text, 100, initial_indent=4 * " ", subsequent_indent=8 * " "))
    Settings.__doc__ = "\n".join([inspect.cleandoc(Settings.__doc__ or ""), "", *lines])


_document_attributes()
