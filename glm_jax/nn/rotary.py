"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the GLM family's layouts."""

import jax
import jax.numpy as jnp


def rotary_table(positions: jax.Array, dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for the first `dim` features of a head.

    Args:
      positions: `[batch, length]` int32.
      dim: how many features rotate (even).
      theta: the base of the frequencies.

    Returns:
      Two arrays `[batch, length, dim / 2]` float32.
    """
    frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate_interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates adjacent pairs (x0, x1), (x2, x3) … of the leading features; the rest pass.

    Args:
      x: `[batch, length, heads, head_dim]`.
      cos, sin: `[batch, length, dim / 2]`, with `dim <= head_dim`.
    """
    dim = 2 * cos.shape[-1]
    cos, sin = (t.astype(x.dtype)[:, :, None, :] for t in (cos, sin))
    pairs = x[..., :dim].reshape(*x.shape[:-1], dim // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack((even * cos - odd * sin, odd * cos + even * sin), axis=-1)
    rotated = rotated.reshape(*x.shape[:-1], dim)
    return rotated if dim == x.shape[-1] else jnp.concatenate((rotated, x[..., dim:]), axis=-1)


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + dim / 2}) of all features; arguments as above."""
    cos, sin = (t.astype(x.dtype)[:, :, None, :] for t in (cos, sin))
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)
