"""Dropout for JAX, and the instrument that tells how many networks a dropout network is worth.

`import jdrop` costs what `import jax` costs. What needs more is imported by its own name:
`jdrop.linen` and `jdrop.nnx` (Flax layers), `jdrop.train`, `jdrop.ensemble`, `jdrop.inference`,
`jdrop.metrics`, and `jdrop.study` (the comparison).
"""

from jdrop.attention import dot_product_attention as dot_product_attention
from jdrop.functional import apply_mask as apply_mask
from jdrop.functional import dropout as dropout
from jdrop.functional import keep_mask as keep_mask
from jdrop.functional import scale_weights as scale_weights
