"""What a swap does to the layers of a model, for linen and nnx alike."""

import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from jdrop import functional

RateChoice = float | Callable[[str, float], float]
"""A rate for all layers, or `f(name, rate)` -> the new rate of the layer with this path."""


@dataclass(frozen=True, eq=False)
class Swap:
    """What happens to the layers of one model.

    Attributes:
        rate: the rates of dropout and attention layers; None: as they are.
        after: the rates of dropout that is added after layers, by the paths of the layers.
    """

    rate: RateChoice | None
    after: Mapping[str, float]

    def __post_init__(self) -> None:
        """Checks the rates as far as they are known."""
        if isinstance(self.rate, numbers.Real):
            functional.check_rate(self.rate, allow_one=True)
        elif self.rate is not None and not callable(self.rate):
            raise TypeError(
                "rate must be a number or a function of a layer's path and rate, got "
                f"{type(self.rate).__name__}."
            )
        for name, rate in self.after.items():
            functional.check_rate(rate, allow_one=True, name=f"after[{name!r}]")

    def new_rate(self, name: str, rate: float, *, is_attention: bool = False) -> float:
        """The new rate of a layer.

        Raises:
            ValueError: a rate out of range.
        """
        # An attention layer has the rate 0 by default: it has no dropout that could be swapped.
        if self.rate is None or (is_attention and rate == 0):
            return rate
        new = self.rate(name, rate) if callable(self.rate) else self.rate
        functional.check_rate(new, allow_one=not is_attention, name=f"the new rate of {name}")
        return new

    def check_names(self, names: Iterable[str]) -> None:
        """Raises if dropout is added after a layer that is not among these."""
        known = set(names)
        unknown = [name for name in self.after if name not in known]
        if unknown:
            raise ValueError(
                f"after names {', '.join(unknown)}, but the model has no such layer; it has "
                f"{', '.join(sorted(known - {''})) or 'none'}."
            )
