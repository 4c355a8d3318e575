"""The values at which a comparison is swept, and whether the model and the data can take them."""

import math
from collections.abc import Mapping, Sequence

from jdrop.study.data import Dataset
from jdrop.study.models import Model, ModelError

Sweep = Mapping[str, Sequence[float]]
"""By parameter ("rate", "train_size", "width_factor", "label_noise"), its values."""


def check_sweep(sweep: Sweep, model: Model, data: Dataset) -> None:
    """Raises if a parameter cannot take a value that the sweep gives it.

    Raises:
        ModelError: a model without the parameter; a value out of range.
    """
    num_examples = len(data.train_labels)
    ranges = {
        "rate": (0, 1, "[0, 1)"),
        "label_noise": (0, 1, "[0, 1)"),
        "width_factor": (1e-9, math.inf, "(0, inf)"),
        "train_size": (2, num_examples + 1, f"[2, {num_examples}]"),
    }
    for name, values in sweep.items():
        if name in ("rate", "width_factor") and name not in model.changeable:
            raise ModelError(
                f"{name} cannot be swept: the model's factory takes no argument {name}."
            )
        minimum, end, allowed = ranges[name]
        wrong = [value for value in values if not minimum <= value < end]
        if wrong:
            raise ModelError(f"values of {name} to sweep must lie in {allowed}, got {wrong[0]}.")
