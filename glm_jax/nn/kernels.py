"""Attention by the kernels of GPUs (cuDNN) and TPUs (splash), and which kernel to take.

They are for tokens that see only each other, without a cache, and split over a mesh by rows and
heads. What padding sees is padding, and comes out finite.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import PartitionSpec

from glm_jax.errors import UserError
from glm_jax.nn.batch import Array, reach
from glm_jax.parallel.mesh import partition, ways

OF_PLATFORM = {"cpu": "reference", "gpu": "cudnn", "tpu": "splash"}
LANES = 128  # of a TPU: what its kernel's blocks are multiples of
BLOCK = 512  # queries or keys that splash takes at a time
EXACT = ("highest", "float32")  # the names of JAX's precision that splash knows beside `default`


def choose(asked: str, platform: str, dtype: Any, head_dim: int, length: int) -> str:
    """The kernel for `model.attention`, where it computes in `dtype` on a mesh of `platform`.

    `auto` is the platform's own, or the reference, with a log line, where that can't do it.

    Raises:
      UserError: for an unknown kernel, or one that can't do it.
    """
    if asked not in ("auto", *OF_PLATFORM.values()):
        raise UserError(f"model.attention={asked!r}: choose one of auto, "
                        + ", ".join(OF_PLATFORM.values()))
    kernel = OF_PLATFORM.get(platform, "reference") if asked == "auto" else asked
    wants, why = next(name for name in OF_PLATFORM if OF_PLATFORM[name] == kernel), ""
    if kernel != "reference" and wants != platform:
        why = f"it is for a {wants.upper()}, and the mesh is one of {platform.upper()}s"
    elif kernel == "cudnn":
        if dtype not in (jnp.bfloat16, jnp.float16):
            why = f"it computes in bfloat16 or float16, and model.dtype is {jnp.dtype(dtype)}"
        elif head_dim % 8 or head_dim > 128:
            why = f"heads must have a multiple of 8 features, at most 128, and have {head_dim}"
        elif length % 2:
            why = f"batch.length must be even, and is {length}"
    if why and asked != "auto":
        raise UserError(f"model.attention={asked!r}: {why}; use 'auto' or 'reference'")
    if why:
        logging.info("attention: the reference in place of %s: %s", kernel, why)
    return "reference" if why else kernel


def over_mesh(kernel: Callable[..., jax.Array], query: jax.Array, key: jax.Array,
              value: jax.Array, *sides: Array, length: str | None = None) -> jax.Array:
    """`kernel(query, key, value, *sides)` on each device's rows and heads.

    Args:
      query, key, value: as of `attention`. Key heads that the devices of `tensor` are too many
        for are repeated.
      sides: `[batch, length, …]`.
      length: "length" where devices have parts of rows, too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(query, key, value, *sides)
    spec = partition(("batch", length, "heads", None), query.shape, mesh.shape)
    shares = ways("heads", query.shape[2])
    repeat = shares // math.gcd(shares, key.shape[2])
    if repeat > 1:
        key, value = (jnp.repeat(x, repeat, axis=2) for x in (key, value))
    rows = PartitionSpec(*spec[:2])
    return jax.shard_map(kernel, in_specs=(spec, spec, spec, *(rows for _ in sides)),
                         out_specs=spec, check_vma=False)(query, key, value, *sides)


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: Array,
          implementation: Any = "cudnn", causal: bool = False) -> jax.Array:
    """`attention` by cuDNN's flash kernel; it wants a dense mask `[batch, queries, keys]`.

    Where the mask is known to be `causal`, the blocks of later keys are left out.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=jnp.asarray(mask)[:, None],
                                        is_causal=causal, implementation=implementation)


def packs() -> bool:
    """Whether cuDNN takes several texts in a row, each causal: on Hopper and later."""
    return all(float(device.compute_capability) >= 9 for device in jax.local_devices()
               if device.platform == "gpu")


def cudnn_packed(query: jax.Array, key: jax.Array, value: jax.Array, segments: Array, count: int
                 ) -> jax.Array:
    """`attention` by cuDNN where each segment is causal: its time grows with the examples' lengths.

    JAX's public function has no place for offsets yet, and the one below takes those of the keys
    for offsets of queries: heads of keys are repeated.

    Args:
      segments: `[batch, length]`, in at most `count` pieces a row; padding is one, too.
    """
    from jax._src.cudnn import fused_attention_stablehlo as lib

    segments = jnp.asarray(segments)
    length, heads = segments.shape[1], query.shape[2]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.vmap(lambda row: jnp.flatnonzero(row, size=count + 1, fill_value=length))(begins)
    sizes = jnp.where(starts < length, jnp.roll(starts, -1, axis=1) - starts, -1)[:, :-1]
    starts = jnp.where(starts < length, starts, -1).astype(jnp.int32)
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    sizes = sizes.astype(jnp.int32)
    return lib.dot_product_attention(
        query, key, value, q_seqlen=sizes, kv_seqlen=sizes, q_offsets=starts, kv_offsets=starts,
        scale=query.shape[-1]**-0.5, mask_type=lib.MaskType.PADDING_CAUSAL)


def _reaches(last: jax.Array, key: jax.Array) -> jax.Array:
    return key <= last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at(precision: str, kernel: Any, segments: Any, *arrays: jax.Array) -> jax.Array:
    """The kernel of three arrays, its products and their derivative's at JAX's `precision`."""
    with jax.default_matmul_precision(precision):
        out: jax.Array = kernel(*arrays, segments)
        return out


def _at_forward(precision: str, kernel: Any, segments: Any, *arrays: jax.Array) -> Any:
    with jax.default_matmul_precision(precision):
        return jax.vjp(lambda *arrays: kernel(*arrays, segments), *arrays)


def _at_backward(precision: str, pull: Any, dout: jax.Array) -> tuple[Any, ...]:
    with jax.default_matmul_precision(precision):
        return None, None, *pull(dout)


_at.defvjp(_at_forward, _at_backward)


def splash(query: jax.Array, key: jax.Array, value: jax.Array, segments: Array, order: Array,
           block: int = BLOCK, interpret: bool = False) -> jax.Array:
    """`attention` by JAX's splash kernel for TPUs, which leaves out blocks that nobody sees.

    Its masks are known when it is compiled, but for two things that it reads with the data: the
    segments, and a number for each query that keys are compared with, here the last key that the
    query reaches. Any batch comes down to these, prefixes and blanks too, and which blocks to take
    follows from them. The rows stand one behind another, as one long row.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as lib
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    batch, length, _, dim = query.shape
    whole = -(-length // LANES) * LANES
    block = math.gcd(whole, block)
    count = whole // block  # of blocks in a row

    def pad(x: Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, whole - length)] + [(0, 0)] * (x.ndim - 2))

    def joined(x: jax.Array) -> jax.Array:  # [heads, batch * length, dim]
        return pad(x).transpose(2, 0, 1, 3).reshape(x.shape[2], batch * whole, dim)

    segments = pad(segments)
    first, last = reach(segments, pad(order))
    row, index = jnp.arange(batch)[:, None, None], jnp.arange(count)
    low, high = first[:, ::block, None] // block, last[:, block - 1::block, None] // block
    seen = (low <= index) & (index <= high)  # [row, block of queries, block of keys]
    # A block that is left out names the nearest that isn't: nothing is fetched for it.
    keys = row * count + jnp.clip(index, low, high)
    start, stop = (jnp.argmax(x, axis=1)[:, None] for x in (seen, seen[:, ::-1]))
    queries = row * count + jnp.clip(index[:, None], start, count - 1 - stop)
    limits = (last + row[..., 0] * whole).reshape(-1)

    def blocks(x: jax.Array, by_key: bool) -> jax.Array:
        x = x.astype(jnp.int32)
        return (x.swapaxes(0, 1).reshape(1, count, -1) if by_key else x.reshape(1, -1, count))

    def mask(following: jax.Array, by_key: bool) -> Any:
        return info.MaskInfo(blocks(following, by_key), None, blocks(seen, by_key), None,
                             limits)  # type: ignore[arg-type]  # a traced array does

    sizes = lib.BlockSizes(block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
                           block_q_dq=block, block_kv_dq=block)
    kernel = lib.SplashAttentionKernel(
        mask(keys, False), mask(keys, False), mask(queries, True), block_sizes=sizes, is_mqa=False,
        save_residuals=False, mask_value=lib.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
        residual_checkpoint_name=None, mask_function=_reaches, interpret=interpret)
    flat = segments.reshape(-1)
    scaled = (query.astype(jnp.float32) * dim**-0.5).astype(query.dtype)
    config: Any = jax.config
    exact = query.dtype == jnp.float32 and config.jax_default_matmul_precision in EXACT
    out = _at("highest" if exact else "default", kernel, lib.SegmentIds(flat, flat),
              joined(scaled), joined(key), joined(value))
    return out.reshape(-1, batch, whole, dim).transpose(1, 2, 0, 3)[:, :length]
