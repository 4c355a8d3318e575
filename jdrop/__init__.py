"""Dropout for JAX, and the instrument that tells how many networks a dropout network is worth.

`import jdrop` costs what `import jax` costs. What needs more is imported by its own name:
`jdrop.linen` and `jdrop.nnx` (Flax layers), `jdrop.train`, `jdrop.ensemble`, `jdrop.inference`,
`jdrop.metrics`, and `jdrop.study` (the comparison), of which `jdrop.compare` is the function.
"""

from typing import TYPE_CHECKING, Any

from jdrop.attention import dot_product_attention as dot_product_attention
from jdrop.functional import apply_mask as apply_mask
from jdrop.functional import dropout as dropout
from jdrop.functional import keep_mask as keep_mask
from jdrop.functional import scale_weights as scale_weights

if TYPE_CHECKING:
    from jdrop.study.comparison import compare as compare


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: the study needs much more than the library does.
    if name == "compare":
        from jdrop.study.comparison import compare

        return compare
    raise AttributeError(f"module 'jdrop' has no attribute {name!r}")
