"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the GLM family's layouts."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.errors import UserError

# What a YaRN config may say, and the values without.
YARN: Mapping[str, Any] = {"factor": None, "original_max_position_embeddings": None,
                           "beta_fast": 32, "beta_slow": 1, "attention_factor": None,
                           "truncate": True}


def rotary_table(positions: jax.Array, dim: int, theta: float,
                 scaling: Mapping[str, Any] | None = None) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for the first `dim` features of a head.

    Args:
      positions: `[batch, length]` int32.
      dim: how many features rotate (even).
      theta: the base of the frequencies.
      scaling: YaRN's settings; see `yarn`.

    Returns:
      Two arrays `[batch, length, dim / 2]` float32.
    """
    frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    factor = 1.0
    if scaling:
        shares, factor = yarn(dim, theta, scaling)
        frequencies = frequencies * shares
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def check_scaling(scaling: Mapping[str, Any] | None) -> None:
    """Raises a UserError for a `rope_scaling` that is not computed here."""
    if scaling is None:
        return
    where = f"config.json: rope_scaling={dict(scaling)!r}"
    if scaling.get("rope_type") != "yarn":
        raise UserError(f"{where} is not supported; supported: None, type 'yarn'")
    for name, value in scaling.items():
        if name not in ("type", "rope_type", *YARN):
            raise UserError(f"{where}: {name} is not supported; supported: {', '.join(YARN)}")
        if name in YARN and value is not None and (
                not isinstance(value, int | float) or (name != "truncate" and not value > 0)):
            raise UserError(f"{where}: {name} must be a number above 0")
    for name in ("factor", "original_max_position_embeddings"):
        if not scaling.get(name):
            raise UserError(f"{where}: {name} is missing")


def yarn(dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): slow frequencies are divided by `factor`.

    Features that turn more than `beta_fast` times in the original context keep their frequency,
    those that turn less than `beta_slow` times are interpolated, between them lies a ramp.

    Returns:
      What each frequency is multiplied with, `[dim / 2]` float32, and what cosines and sines are:
      0.1 ln(factor) + 1 unless `attention_factor` says otherwise.
    """
    given = {**YARN, **{name: v for name, v in scaling.items() if v is not None}}
    factor, context = given["factor"], given["original_max_position_embeddings"]

    def turning(times: float) -> float:  # the feature that turns so many times in the context
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(given["beta_fast"]), turning(given["beta_slow"])
    if given["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    scale = given["attention_factor"]
    if scale is None:
        scale = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return (ramp / factor + 1 - ramp).astype(np.float32), scale


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
    """As `rotate_interleaved`, with the pairs (x0, x[dim/2]), (x1, x[dim/2 + 1]) …"""
    half = cos.shape[-1]
    cos, sin = (t.astype(x.dtype)[:, :, None, :] for t in (cos, sin))
    low, high = x[..., :half], x[..., half:2 * half]
    return jnp.concatenate((low * cos - high * sin, high * cos + low * sin, x[..., 2 * half:]),
                           axis=-1)
