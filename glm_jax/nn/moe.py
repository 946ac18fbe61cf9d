"""Mixture of experts: the router, and products of each token with its own experts' matrices.

A token's choices are sorted by expert and each expert's are padded to whole blocks of rows, so that
one layout serves `jax.lax.ragged_dot` (TPU, GPU) and a loop over the blocks that are in use (CPU,
where `ragged_dot` computes every expert for every row).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from glm_jax.nn.layers import Product
from glm_jax.nn.matmul import matmul, over_outputs, over_tokens
from glm_jax.parallel.mesh import partition

BLOCK = 128  # rows of one expert at a time, at most


def route(logits: jax.Array, bias: jax.Array, *, top_k: int, groups: int = 1, top_groups: int = 1,
          normalised: bool = True, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """DeepSeek-V3's choice of experts (arXiv:2412.19437, section 2.1.2).

    An expert's score is sigmoid(logit); `bias` is added for choosing only. Experts lie in equal
    groups; only the `top_groups` whose two best scores sum highest are chosen from.

    Args:
      logits: `[..., experts]` float32; bias: `[experts]` float32.
      normalised: the weights of a token's experts sum to one before `scale`.

    Returns:
      weights `[..., top_k]` float32 and experts `[..., top_k]` int32.
    """
    scores = jax.nn.sigmoid(logits)
    choice = jax.lax.stop_gradient(scores + bias)
    if groups > 1:
        grouped = choice.reshape(*choice.shape[:-1], groups, -1)
        best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        kept = jax.lax.top_k(best, top_groups)[1]
        allowed = jnp.any(kept[..., None] == jnp.arange(groups), axis=-2)
        choice = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice.shape)
    experts = jax.lax.top_k(choice, top_k)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if normalised:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * scale, experts


class Layout(NamedTuple):
    """Rows sorted by expert, in whole blocks.

    Attributes:
      block: rows a block.
      expert: `[blocks]` int32, whose block each is.
      used: scalar int32, how many blocks hold anything.
      sizes: `[experts]` int32, the rows of each expert, padding included.
    """

    block: int
    expert: jax.Array
    used: jax.Array
    sizes: jax.Array


def dispatch(x: jax.Array, weights: jax.Array, experts: jax.Array, count: int,
             run: Callable[[jax.Array, Product, jax.Array], jax.Array], numbers: jax.Array
             ) -> jax.Array:
    """The weighted sum over each token's experts of what `run` makes of the token.

    Args:
      x: `[tokens, hidden]`.
      weights, experts: `[tokens, k]`; choices outside of 0 … count - 1 add nothing.
      count: how many experts there are here.
      run: from rows `[rows, hidden]`, `product(rows [rows, in], kernels [count, in, out])`, which
        multiplies each row with its expert's kernel, and numbers `[rows]` int32 to
        `[rows, hidden]`. The numbers are of a token's n-th choice, wherever its row lies.
      numbers: `[tokens]` int32, of each token among those of all devices.

    Returns:
      `[tokens, hidden]` in the dtype of `x`.
    """
    tokens, k = experts.shape
    block, blocks = _blocks(tokens * k, count)
    flat = jnp.where((experts >= 0) & (experts < count), experts, count).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=count + 1)[:count].astype(jnp.int32)
    needed = (counts + block - 1) // block
    ends = jnp.cumsum(needed)
    # The row of each choice: where its expert's blocks begin, and its rank among that expert's.
    ranks = jnp.zeros(tokens * k, jnp.int32).at[order].set(
        jnp.arange(tokens * k, dtype=jnp.int32) - (jnp.cumsum(counts) - counts).at[flat[order]]
        .get(mode="fill", fill_value=0))
    begins = ((ends - needed) * block).at[flat].get(mode="fill", fill_value=blocks * block)
    row = jnp.where(flat < count, begins + ranks, blocks * block)
    choice = jnp.full(blocks * block, tokens * k).at[row].set(jnp.arange(tokens * k), mode="drop")
    expert = jnp.sum(ends <= jnp.arange(blocks)[:, None], axis=1, dtype=jnp.int32)
    layout = Layout(block, jnp.minimum(expert, count - 1), ends[-1], needed * block)
    rows = x.at[choice // k].get(mode="fill", fill_value=0)
    named = (numbers[:, None] * k + jnp.arange(k)).reshape(-1)
    out = run(rows, functools.partial(grouped, layout),
              named.at[choice].get(mode="fill", fill_value=0))
    back = out.at[row].get(mode="fill", fill_value=0).reshape(tokens, k, -1)
    return jnp.einsum("tkh,tk->th", back.astype(jnp.float32), weights).astype(x.dtype)


def _blocks(rows: int, experts: int) -> tuple[int, int]:
    """Rows a block and blocks that suffice: padding adds a quarter at most, but few tiny ones."""
    block = 1
    while block < BLOCK and 8 * block * experts <= rows:
        block *= 2
    return block, rows // block + min(experts, rows)


def grouped(layout: Layout, rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each row times its expert's kernel: `[rows, in]`, `[experts, in, out]` to `[rows, out]`.

    Its gradient for `kernel` is computed only when it is asked for. Rows of no expert are not
    defined.
    """
    return _grouped(layout.block, layout[1:], rows, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(block: int, where: Any, rows: jax.Array, kernel: jax.Array) -> jax.Array:
    def loop(where: Any, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return _each_block(block, where, rows, lambda x, i, e: matmul(x, kernel[e]),
                           kernel.shape[2])

    def ragged(where: Any, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, kernel, where[2])
    return jax.lax.platform_dependent(where, rows, kernel, cpu=loop, default=ragged)


def _forward(block: int, where: Any, rows: Any, kernel: Any) -> tuple[jax.Array, Any]:
    where = jax.tree.map(lambda leaf: leaf.value, where, is_leaf=lambda x: hasattr(x, "perturbed"))
    trained = () if kernel.perturbed else None
    return (_grouped(block, where, rows.value, kernel.value),
            (where, rows.value, kernel.value, trained))


def _backward(block: int, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    where, rows, kernel, trained = saved

    def loop(where: Any, rows: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
        dx = _each_block(block, where, dy, lambda d, i, e: over_outputs(d, kernel[e]),
                         kernel.shape[1])
        if trained is None:
            return (dx,)
        dys = dy.reshape(-1, block, dy.shape[1])

        def add(i: Any, total: jax.Array) -> jax.Array:
            x = jax.lax.dynamic_slice_in_dim(rows, i * block, block)
            return total.at[where[0][i]].add(over_tokens(x, dys[i]))
        zero = jnp.zeros(kernel.shape, jnp.float32)
        return dx, jax.lax.fori_loop(0, where[1], add, zero).astype(kernel.dtype)

    def ragged(where: Any, rows: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
        if trained is None:
            product = functools.partial(jax.lax.ragged_dot, rhs=kernel, group_sizes=where[2])
            return jax.vjp(product, rows)[1](dy)
        return jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, where[2]), rows, kernel)[1](dy)

    found = jax.lax.platform_dependent(where, rows, kernel, dy, cpu=loop, default=ragged)
    return None, found[0], found[1] if trained is not None else None


_grouped.defvjp(_forward, _backward, symbolic_zeros=True)


def _each_block(block: int, where: Any, rows: jax.Array, product: Callable[..., jax.Array],
                width: int) -> jax.Array:
    """`product(block of rows, its number, its expert)` for every block in use; zero elsewhere."""
    expert, used = where[:2]

    def body(i: Any, out: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(rows, i * block, block)
        return jax.lax.dynamic_update_slice_in_dim(
            out, product(x, i, expert[i]).astype(out.dtype), i * block, 0)
    return jax.lax.fori_loop(0, used, body, jnp.zeros((len(rows), width), rows.dtype))


def over_mesh(run: Callable[..., jax.Array], x: jax.Array, weights: jax.Array,
              experts: jax.Array, state: Any, count: int, common: Any = None) -> jax.Array:
    """`dispatch` with experts split over the mesh axis of that name, and tokens over theirs.

    The tokens that are split over `expert` too are gathered over it, each device computes what its
    own experts make of them, and the sums over experts are scattered back. Where nothing but
    features is split, over `tensor`, it is `dispatch`.

    Args:
      run: `run(state, common, rows, product, numbers)`, as in `dispatch`, for the experts of a
        state.
      x: `[batch, length, hidden]`; weights, experts: `[batch, length, k]`.
      state: arrays `[count, …]`; common: whatever all devices need alike.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def local(x: jax.Array, weights: jax.Array, experts: jax.Array, numbers: jax.Array,
              own: jax.Array, state: Any, common: Any) -> jax.Array:
        k = weights.shape[-1]
        out = dispatch(x.reshape(-1, x.shape[-1]), weights.reshape(-1, k),
                       experts.reshape(-1, k) - own[0], len(own),
                       functools.partial(run, state, common), numbers.reshape(-1))
        return out.reshape(x.shape)

    numbers = jnp.arange(x.shape[0] * x.shape[1], dtype=jnp.int32).reshape(x.shape[:2])
    args = x, weights, experts, numbers, jnp.arange(count), state, common
    manual = {name for name, size in mesh.shape.items() if name != "tensor" and size > 1}
    if not manual:  # XLA fails on a region that is manual in axes of one device only
        return local(*args)
    tokens = partition(("batch", "length", None), x.shape, mesh.shape)
    split = partition(("experts",), (count,), mesh.shape)

    apart = "expert" in jax.tree.leaves(tuple(tokens))  # else each has all tokens already

    def summed(*args: Any) -> jax.Array:
        if "expert" not in split:
            return local(*args)
        if not apart:
            return jax.lax.psum(local(*args), "expert")
        own = [jax.lax.all_gather(part, "expert", tiled=True) for part in args[:4]]
        return jax.lax.psum_scatter(local(*own, *args[4:]), "expert", tiled=True)
    specs = (tokens, tokens, tokens, PartitionSpec(*tokens[:2]), split, split, PartitionSpec())
    return jax.shard_map(summed, in_specs=specs, out_specs=tokens, axis_names=manual,
                         check_vma=False)(*args)
