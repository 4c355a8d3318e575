"""Shape annotations: those of jaxtyping if it is installed, otherwise plain `jax.Array`.

The library itself needs only jax. The tests need jaxtyping, which checks every annotated call.
"""

from typing import Any

try:
    from jaxtyping import Bool, Float, Inexact, Integer, Shaped, UInt32
except ImportError:

    class _Unshaped:
        """Takes the place of `Float[Array, "shape"]` and keeps only the array type."""

        def __class_getitem__(cls, item):  # type: ignore[no-untyped-def]
            return item[0]

    Bool = Float = Inexact = Integer = Shaped = UInt32 = _Unshaped  # type: ignore[assignment]

__all__ = ["Bool", "Float", "Inexact", "Integer", "Shape", "Shaped", "UInt32"]

Shape = tuple[Any, ...]
"""The sizes of the axes of an array: integers, or symbolic in an export with `jax.export`."""
