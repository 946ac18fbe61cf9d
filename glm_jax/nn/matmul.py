"""The product of activations and a kernel, and its two derivatives.

`jax.default_matmul_precision("BF16_BF16_F32")` asks for float32 arrays to be rounded to bfloat16
where they are multiplied, and for sums in float32. XLA does so on TPU and GPU, but ignores it on a
CPU; here the inputs are cast, for the sake of CPUs that multiply bfloat16 faster (AVX512-BF16).
"""

from typing import Any

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any = None) -> jax.Array:
    """`[..., in] @ [in, out] -> [..., out]`, in the dtype of `x` unless another is given."""
    if not rounds(x):
        return jnp.matmul(x, kernel, preferred_element_type=dtype)
    return _matmul(x, kernel)


def over_outputs(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """The derivative of `matmul` for x: `[..., out]` and `[in, out]` to `[..., in]`."""
    if not rounds(dy):
        return jnp.einsum("...o,io->...i", dy, kernel)
    return jnp.einsum("...o,io->...i", _half(dy), _half(kernel), preferred_element_type=dy.dtype)


def over_tokens(x: jax.Array, dy: jax.Array) -> jax.Array:
    """That for the kernel: `[..., in]` and `[..., out]` to `[in, out]`, float32."""
    if not rounds(x) or x.ndim != 3:
        return jnp.einsum("...i,...o->io", x, dy, preferred_element_type=jnp.float32)
    # XLA would fold a transposition of only two axes into the product, and is slow at that.
    first = jnp.transpose(_half(x), (2, 0, 1)).reshape(x.shape[-1], -1)
    return jnp.matmul(first, _half(dy).reshape(first.shape[1], -1),
                      preferred_element_type=jnp.float32)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(_half(x), _half(kernel), preferred_element_type=x.dtype)


_matmul.defvjp(lambda x, kernel: (_matmul(x, kernel), (x, kernel)),
               lambda saved, dy: (over_outputs(dy, saved[1]), over_tokens(saved[0], dy)))


def rounds(x: jax.Array) -> bool:
    """Whether products of `x` round what they take."""
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return bool(x.dtype == jnp.float32 and asked == "BF16_BF16_F32")


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)
