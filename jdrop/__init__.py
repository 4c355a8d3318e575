"""Dropout for JAX, and the instrument that tells how many networks a dropout network is worth.

Functions of an explicit key: `dropout`, `keep_mask`, `apply_mask`, `scale_weights`,
`dot_product_attention`, and for branches `drop_path`, `drop_branch` and `depth_linear_rates`.
`audit` lists what a Flax model drops, and what is wrong with it. `compare` runs the comparison with
ensembles.

Modules: `jdrop.linen` and `jdrop.nnx` (Flax layers), `jdrop.network`, `jdrop.train`,
`jdrop.ensemble`, `jdrop.early_stopping`, `jdrop.thinned`, `jdrop.inference`, `jdrop.metrics`,
`jdrop.statistics`, `jdrop.auditing` and `jdrop.study` (the comparison). Python imports them,
`audit` and `compare` at their first use, so that `import jdrop` costs what `import jax` costs.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from jdrop.attention import dot_product_attention
from jdrop.functional import apply_mask, dropout, keep_mask, scale_weights
from jdrop.stochastic_depth import depth_linear_rates, drop_branch, drop_path

if TYPE_CHECKING:
    from jdrop.auditing import audit
    from jdrop.study.comparison import compare

__all__ = [
    "apply_mask",
    "audit",
    "auditing",
    "compare",
    "depth_linear_rates",
    "dot_product_attention",
    "drop_branch",
    "drop_path",
    "dropout",
    "early_stopping",
    "ensemble",
    "inference",
    "keep_mask",
    "linen",
    "metrics",
    "network",
    "nnx",
    "scale_weights",
    "statistics",
    "study",
    "thinned",
    "train",
]


_STUDY_PACKAGES = ("click", "jinja2", "matplotlib", "orbax", "pydantic", "rich", "scipy", "sklearn")
"""What `compare` imports beyond the library."""


def __getattr__(name: str) -> Any:
    if name == "compare":
        try:
            return importlib.import_module("jdrop.study.comparison").compare
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"jdrop.compare needs packages that are not installed: {error}; install them with "
                "`pip install 'jdrop[study]'`."
            ) from error
    if name == "audit":
        return importlib.import_module("jdrop.auditing").audit
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jdrop")
    if name in __all__:
        return importlib.import_module(f"jdrop.{name}")
    raise AttributeError(f"module 'jdrop' has no attribute {name!r}")


def __dir__() -> list[str]:
    module_attributes = ["__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"]
    names = {*__all__, *module_attributes}
    # `help` gets every name, and fails if one cannot be imported.
    if any(importlib.util.find_spec(package) is None for package in _STUDY_PACKAGES):
        names.remove("compare")
    return sorted(names)
