"""The layers that the models share: linear, embedding, norms, activations, and stacks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from glm_jax.nn.compute import LINEAR, PLAIN, Compute
from glm_jax.nn.matmul import matmul
from glm_jax.parallel.mesh import constrain, platform

Product = Callable[[jax.Array, jax.Array], jax.Array]  # (x, kernel) to x times kernel


class Linear(nnx.Module):
    """y = x W + b, with an optional adapter (see glm_jax/adapters) that stands in for x W.

    Parameters: `kernel [in, out]`, `bias [out]`; their logical axes are `axes`. With `experts`
    there is a kernel for each, `[experts, in, out]`, and the caller gives the product.
    """

    def __init__(self, in_features: int, out_features: int, axes: tuple[str, ...], *,
                 bias: bool = False, experts: int = 0, std: float = 0.02, rngs: nnx.Rngs):
        self.axes = axes
        shape = (*[experts] * bool(experts), in_features, out_features)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape), axes=axes)
        if bias:
            self.bias = nnx.Param(jnp.zeros(out_features), axes=axes[1:])

    def __call__(self, x: jax.Array, key: jax.Array | None = None,
                 product: Product | None = None, low: Any = None) -> jax.Array:
        """`[..., in] -> [..., out]` in the dtype of `x`.

        Args:
          key: for an adapter's dropout.
          product: of experts.
          low: what an adapter shares with those of other layers: see `of_one_input`.
        """
        if product is not None:  # nothing to pin: each device has its own experts by now
            kernel = self.kernel[...].astype(x.dtype)
            return (self.adapter(x, kernel, key, product) if hasattr(self, "adapter")
                    else product(x, kernel))
        kernel = constrain(self.kernel[...].astype(x.dtype), *self.axes, gathered=True)
        y = (self.adapter(x, kernel, key, low=low) if hasattr(self, "adapter")
             else matmul(x, kernel))
        y = checkpoint_name(y, LINEAR)
        if hasattr(self, "bias"):
            y = y + self.bias[...].astype(x.dtype)
        return y


def of_one_input(layers: Sequence[Linear], x: jax.Array, keys: Sequence[jax.Array | None]
                 ) -> list[jax.Array]:
    """`x [..., in]` through each of the layers: `[..., out]`. Adapters share what they can."""
    adapters = {n: layer.adapter for n, layer in enumerate(layers) if hasattr(layer, "adapter")}
    lows: dict[int, Any] = {}
    if adapters:
        first, *_ = adapters.values()
        found = first.lows([*adapters.values()], x, [keys[n] for n in adapters])
        lows = dict(zip(adapters, found, strict=True))
    return [layer(x, key, low=lows.get(n))
            for n, (layer, key) in enumerate(zip(layers, keys, strict=True))]


class Embedding(nnx.Module):
    """A table `embedding [vocabulary, hidden]`."""

    def __init__(self, size: int, features: int, *, std: float = 0.02, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (size, features)),
                                   axes=("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """`[batch, length]` int32 `-> [batch, length, hidden]`.

        The table stays where it lies: each device looks up its part of the rows, for the tokens of
        all devices that share the table. Where their caller wants them whole, the rows move.
        """
        table = constrain(self.embedding[...].astype(dtype), "vocab", "embed")
        rows = table[constrain(tokens, "batch", "length", spread=True)]
        return constrain(rows, "batch", "length", "embed", spread=True)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang and Sennrich 2019), the mean in float32, as Hugging Face's."""

    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...].astype(x.dtype), self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale; for the derivative only `x` is kept, in its dtype."""
    return scale * _by_rms(x, eps)[0].astype(x.dtype)


def _by_rms(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide * inverse, inverse


def _rms_norm_backward(eps: float, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale = saved
    normed, inverse = _by_rms(x, eps)
    dy = dy.astype(jnp.float32)
    dnormed = dy * scale.astype(jnp.float32)
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))
    dscale = jnp.sum(dy * normed, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(lambda x, scale, eps: (rms_norm(x, scale, eps), (x, scale)), _rms_norm_backward)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias (Ba et al. 2016), in float32."""

    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(features), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        wide = wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) with the error function (Hendrycks and Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The same paper's approximation of `gelu` by a hyperbolic tangent."""
    return jax.nn.gelu(x, approximate=True)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (Shazeer 2020); for the derivative nothing else is kept."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    return dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


def stack(layer: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers as one module whose parameters have a leading layer axis."""
    return nnx.split_rngs(splits=count)(nnx.vmap(layer, in_axes=0, out_axes=0))(rngs)


def apart(model: nnx.Module) -> nnx.Module:
    """`model` with each stack as a list of layers, for decoding on a CPU; as it is elsewhere.

    A CPU's matrix products can't read a slice of a stack in place: each token would copy all
    weights. The layers' arrays are views of the stack's memory, no copies.
    """
    used = {device for p in jax.tree.leaves(nnx.state(model)) for device in p.devices()}
    if len(used) > 1 or used.pop().platform != "cpu":
        return model
    model = nnx.merge(*nnx.split(model))
    for name in ("dense_layers", "layers"):
        if hasattr(model, name):
            graphdef, state = nnx.split(getattr(model, name))
            views = jax.tree.map(np.asarray, state)
            count = len(jax.tree.leaves(views)[0])
            setattr(model, name, nnx.List([nnx.merge(graphdef, jax.tree.map(
                lambda view, i=i: jax.device_put(view[i], may_alias=True), views))
                for i in range(count)]))
    return model


def scan(layers: nnx.Module, call: Callable[..., tuple[jax.Array, Any]], x: jax.Array,
         *per_layer: Any, unroll: bool = True, compute: Compute = PLAIN
         ) -> tuple[jax.Array, Any]:
    """Runs stacked layers one after another: `x, y = call(layer, x, *slices of per_layer)`.

    One compiled body serves all layers: compile time and the number of collectives don't grow
    with depth. A few layers on one device (`compute.unroll`) are compiled one by one: that saves
    the copies in and out of the stacks in training; in a decoding loop it costs more, and
    `unroll=False` leaves it. Returns the last `x` and the stacked `y`; of layers that are `apart`
    tuples of each layer's `y`. What is kept of each layer for the derivative is `compute.remat`'s.
    """
    if isinstance(layers, nnx.List):
        ys = []
        for i, layer in enumerate(layers):
            x, y = call(layer, x, *(tuple(part[i] for part in one) if isinstance(one, tuple)
                                    else None if one is None else one[i] for one in per_layer))
            ys.append(y)
        return x, jax.tree.map(lambda *parts: parts, *ys)
    graphdef, state = nnx.split(layers)
    count = len(jax.tree.leaves(state)[0])
    mesh = jax.sharding.get_abstract_mesh()
    few = (unroll and count <= compute.unroll and (mesh.empty or mesh.size == 1)
           # Outside of a loop XLA undoes what is to be computed again, but for GPUs; and what is
           # to wait in the host's memory stays.
           and (compute.remat == "none" or (platform() == "gpu" and compute.remat != "offload")))

    def body(x: jax.Array, inputs: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        own = inputs[0] if mesh.empty or mesh.size == 1 else jax.tree.map(_summed, inputs[0])
        return call(nnx.merge(graphdef, own), x, *inputs[1:])

    return jax.lax.scan(compute.layer(body, few), x, (state, *per_layer),
                        unroll=count if few else 1)


@jax.custom_vjp
def _summed(parameter: jax.Array) -> jax.Array:
    """As it is; its gradient is summed over devices before it leaves the layer.

    Where gradients of micro-batches add up, XLA would sum those of all layers at once after the
    loop, and hold two whole gradients more.
    """
    return parameter


_summed.defvjp(lambda parameter: (parameter, None),
               lambda _, gradient: (jax.lax.optimization_barrier(gradient),))
