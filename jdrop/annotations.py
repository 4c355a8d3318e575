"""Shape annotations: jaxtyping's where it is installed, plain `jax.Array` where it is not.

The tests install jaxtyping and check every annotated call; the library itself needs only jax.
"""

try:
    from jaxtyping import Bool, Float, Inexact, Integer, Shaped, UInt32
except ImportError:

    class _Unshaped:
        """Stands for `Kind[Array, "shape"]` and keeps only the array type."""

        def __class_getitem__(cls, item):  # type: ignore[no-untyped-def]
            return item[0]

    Bool = Float = Inexact = Integer = Shaped = UInt32 = _Unshaped  # type: ignore[assignment]

__all__ = ["Bool", "Float", "Inexact", "Integer", "Shaped", "UInt32"]
