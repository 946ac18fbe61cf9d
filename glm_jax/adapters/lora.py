"""LoRA (Hu et al. 2021, arXiv:2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).

y = W x + b + s B A x, with s = alpha / r, or alpha / sqrt(r) for rsLoRA. Names are PEFT's.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from glm_jax.adapters.targets import ALL_LINEAR, find, groups, linears
from glm_jax.errors import UserError
from glm_jax.nn.compute import LINEAR
from glm_jax.nn.layers import Product
from glm_jax.nn.matmul import matmul, over_outputs, over_tokens, rounds
from glm_jax.parallel.mesh import constrain, make_mesh, platform, sharding, split_over


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how; fields and defaults are PEFT's.

    Attributes:
      r: the rank.
      lora_alpha, use_rslora: the scale is lora_alpha / r, with `use_rslora` lora_alpha / sqrt(r).
      lora_dropout: on the input of A only.
      target_modules: names of linear layers, each the end of a path (`q_proj`, `mlp.down_proj`),
        or one regular expression for whole paths, or `all-linear`: every one but the head and
        the routed experts, which are adapted where they are named.
      modules_to_save: modules that train whole and are saved beside the adapter: the head.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise UserError(f"lora: r must be a positive whole number, not {self.r!r}")
        for name in ("lora_alpha", "lora_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"lora: {name} must be a number, not {value!r}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora: lora_dropout must be at least 0 and below 1, "
                            f"not {self.lora_dropout!r}")
        if not self.target_modules:
            raise UserError(f"lora: target_modules is empty; {ALL_LINEAR!r} adapts every layer")
        if not isinstance(self.target_modules, str):
            targets = tuple(self.target_modules)
            object.__setattr__(self, "target_modules",
                               ALL_LINEAR if targets == (ALL_LINEAR,) else targets)
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))

    @property
    def scale(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The patterns for `adapters.partition`."""
        return ("adapter", *self.modules_to_save)


class LoRA(nnx.Module):
    """The adapter of one linear layer: parameters `lora_a [in, r]` and `lora_b [r, out]`.

    Beside stacked layers, and experts, both have their leading axes too.
    """

    def __init__(self, lora_a: Any, lora_b: Any, axes: tuple[str, ...], config: LoRAConfig):
        self.axes, self.scale, self.dropout = axes[-2:], config.scale, config.lora_dropout
        self.lora_a = nnx.Param(lora_a, axes=(*axes[:-1], "rank"))
        self.lora_b = nnx.Param(lora_b, axes=(*axes[:-2], "rank", axes[-1]))

    def __call__(self, x: jax.Array, kernel: jax.Array, key: jax.Array | None = None,
                 product: Product | None = None, low: "Callable[[], Low] | None" = None
                 ) -> jax.Array:
        """`x [..., in]` through the layer's `kernel [in, out]` and the adapter: `[..., out]`.

        Args:
          low: one of `lows`, where other layers have the same input.
        """
        drops = key is not None and self.dropout > 0
        scale = self.scale / (1 - self.dropout) if drops else self.scale
        if product is not None:
            narrow = product(_dropped(x, self.mask(x, key)), self.lora_a[...].astype(x.dtype))
            return product(x, kernel) + scale * product(narrow, self.lora_b[...].astype(x.dtype))
        b = constrain(self.lora_b[...], "rank", self.axes[1], gathered=True)
        few = x.size // x.shape[-1] * sum(kernel.shape) < kernel.size  # as when decoding
        # A small change is lost when its sum with the kernel is rounded to bfloat16.
        if not (drops or few or rounds(x)) and x.dtype == jnp.float32:
            a = constrain(self.lora_a[...], self.axes[0], "rank", gathered=True)
            return folded(x, kernel, a, b, scale)
        all_low, begin = (low or self.lows([self], x, [key])[0])()
        end = begin + b.shape[0]
        # Nothing is appended to an axis that a mesh splits: activations would move for it.
        if (platform() == "gpu" and not few and kernel.shape[0] < kernel.shape[1]
                and not split_over(self.axes[0], kernel.shape[0], gathered=True)):
            b = jnp.pad(b, ((begin, all_low.shape[-1] - end), (0, 0)))  # zero for the others' part
            return appended(x, all_low, kernel, b, scale)
        return lora(matmul(x, kernel), all_low[..., begin:end], b, scale)

    @staticmethod
    def lows(adapters: Sequence["LoRA"], x: jax.Array, keys: Sequence[jax.Array | None]
             ) -> list[Callable[[], "Low"]]:
        """For layers with one input `[..., in]`: what their A's make of it, in one product.

        With dropout each has an input of its own; but those that share A, since a checkpoint joins
        their layers, drop the same, as PEFT does. Nothing is computed before it is asked for.
        """
        ids = [id(adapter.lora_a) for adapter in adapters]
        apart = keys[0] is not None and adapters[0].dropout > 0

        @functools.cache
        def joined(*of: int) -> jax.Array:
            a = [constrain(adapters[n].lora_a[...], adapters[n].axes[0], "rank", gathered=True)
                 for n in of]
            mask = adapters[of[0]].mask(x, keys[of[0]])
            return checkpoint_name(thin(x, jnp.concatenate(a, axis=-1), mask), LINEAR)

        def low(one: int) -> Low:
            of = (one,) if apart else tuple(dict.fromkeys(ids.index(other) for other in ids))
            return Low(joined(*of), of.index(one) * adapters[one].lora_a.shape[-1])
        return [functools.partial(low, ids.index(one)) for one in ids]

    def mask(self, x: jax.Array, key: jax.Array | None) -> jax.Array | None:
        """Of dropout on `x [..., in]`; none without."""
        if key is None or not self.dropout:
            return None
        return dropout_mask(key, x.shape, self.dropout)

    def merged(self, kernel: jax.Array) -> jax.Array:
        """W + s A B in float32, in the kernel's dtype and layout."""
        a, b = (p[...].astype(jnp.float32) for p in (self.lora_a, self.lora_b))
        delta = self.scale * jnp.matmul(a, b, precision="highest")
        whole = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
        return jax.device_put(whole, kernel.sharding)


class Low(NamedTuple):
    """Thin products of layers with one input, `[tokens, r + r + …]`, and where a layer's begins."""

    all: jax.Array
    begin: int


@jax.custom_vjp
def thin(x: jax.Array, a: jax.Array, mask: jax.Array | None) -> jax.Array:
    """(mask * x) a, in the dtype of `x`, of all tokens on one axis; the gradient of a in its own.

    Its derivative and that of `lora` are written out for CPU's sake: there sums over tokens run an
    order of magnitude slower unless the thin matrix is transposed first, which XLA undoes where it
    can.

    Args:
      x: `[..., in]`; a: `[in, r]`.
      mask: like `x`, bool, False where an input is dropped; none without dropout.
    """
    return _rows(_dropped(x, mask)) @ a.astype(x.dtype)


def _thin_backward(saved: Any, dlow: jax.Array) -> tuple[Any, ...]:
    x, a, mask = saved  # x as it came: layers that share an input then share its copy
    da = jax.lax.optimization_barrier(_over_tokens(dlow, _rows(_dropped(x, mask)), a.dtype)).T
    dx = jnp.matmul(dlow, a.astype(dlow.dtype).T).reshape(x.shape)
    return _dropped(dx, mask), da, None


thin.defvjp(lambda x, a, mask: (thin(x, a, mask), (x, a, mask)), _thin_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lora(y: jax.Array, low: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """y + scale * low b, in the dtype of `y`: `[..., out]`, `thin`'s `[tokens, r]`, `[r, out]`."""
    return y + ((scale * low) @ b.astype(low.dtype)).reshape(y.shape).astype(y.dtype)


def _backward(scale: float, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    low, b = saved
    rows = _rows(dy)
    dlow = jnp.matmul(rows, (scale * b).astype(rows.dtype).T).astype(low.dtype)
    return dy, dlow, _over_tokens(scale * low, rows, b.dtype)


lora.defvjp(lambda y, low, b, scale: (lora(y, low, b, scale), (low, b)), _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def appended(x: jax.Array, low: jax.Array, kernel: jax.Array, b: jax.Array, scale: float
             ) -> jax.Array:
    """`lora` of x kernel as one product, `[x, scale * low] [kernel, b]`.

    On a GPU a layer that gives more than it takes is done sooner: what the thin product gives need
    not be written, nor read for the sum. The gradient of the kernel `[in, out]` is computed only
    when it is asked for.
    """
    y = matmul(jnp.concatenate([_rows(x), scale * low], axis=-1),
               jnp.concatenate([kernel, b.astype(x.dtype)]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _appended_forward(x: Any, low: Any, kernel: Any, b: Any, scale: float
                      ) -> tuple[jax.Array, Any]:
    arrays = x.value, low.value, kernel.value, b.value
    return appended(*arrays, scale), (*arrays, () if kernel.perturbed else None)


def _appended_backward(scale: float, saved: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, low, kernel, b, trained = saved
    _, dlow, db = _backward(scale, (low, b), dy)
    dkernel = None if trained is None else over_tokens(x, dy).astype(kernel.dtype)
    return over_outputs(dy, kernel), dlow, dkernel, db


appended.defvjp(_appended_forward, _appended_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def folded(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float
           ) -> jax.Array:
    """x (kernel + scale * a b), and in the derivative too: two thin products less over all tokens.

    A CPU's step is shorter than with `lora`. For float32; `kernel [in, out]`, whose gradient is
    computed only when it is asked for.
    """
    y = _rows(x) @ (kernel + (scale * a) @ b)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _folded_forward(x: Any, kernel: Any, a: Any, b: Any, scale: float) -> tuple[jax.Array, Any]:
    arrays = x.value, kernel.value, a.value, b.value
    trained = () if kernel.perturbed else None
    return folded(*arrays, scale), (*arrays, _rows(x.value) @ a.value, trained)


def _folded_backward(scale: float, saved: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, kernel, a, b, low, trained = saved
    rows, dy = _rows(x), _rows(dy)
    dx = jnp.matmul(dy, (kernel + (scale * a) @ b).T).reshape(x.shape)
    dlow = jnp.matmul(dy, (scale * b).T)
    db = _over_tokens(scale * low, dy, b.dtype)
    da = jax.lax.optimization_barrier(_over_tokens(dlow, rows, a.dtype)).T
    tokens = tuple(range(rows.ndim - 1))
    return dx, None if trained is None else jnp.tensordot(rows, dy, (tokens, tokens)), da, db


folded.defvjp(_folded_forward, _folded_backward, symbolic_zeros=True)


def _dropped(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, 0)


def _rows(x: jax.Array) -> jax.Array:
    """All tokens on one axis, unless a mesh splits rows between devices: that would gather them."""
    split = jax.sharding.get_abstract_mesh().shape.get("sequence", 1) > 1
    return x if split else x.reshape(-1, x.shape[-1])


def _over_tokens(thin: jax.Array, wide: jax.Array, dtype: Any) -> jax.Array:
    """`[..., r]` and `[..., n]` to `[r, n]`, summed over the tokens."""
    first = jax.lax.optimization_barrier(jnp.moveaxis(thin, -1, 0))
    tokens = tuple(range(wide.ndim - 1))
    return jax.lax.dot_general(first, wide, ((tuple(n + 1 for n in tokens), tokens), ((), ())),
                               preferred_element_type=dtype)


def dropout_mask(key: jax.Array, shape: Sequence[int], rate: float) -> jax.Array:
    """A bool array, False with probability `rate`, to 1/65536; `key` is one, or one for each row.

    Two values from each random word: the generator is what dropout costs on a CPU.
    """
    half = (shape[-1] + 1) // 2
    draw = functools.partial(jax.random.bits, shape=(*shape[key.ndim:-1], half), dtype=jnp.uint32)
    words = jax.vmap(draw)(key) if key.ndim else draw(key)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*shape[:-1], 2 * half)
    return halves[..., :shape[-1]] >= round(rate * 2**16)


def attach(model: nnx.Module, config: LoRAConfig, *, seed: int = 0, strict: bool = True
           ) -> dict[str, Any]:
    """Adds LoRA to the target layers of a model, in place, and returns these by path.

    A is uniform as PEFT's, B zero, in float32; they compute in the dtype of the activations. What
    an adapter begins with depends on `seed` and its path only: not on other targets or the mesh.
    That of an abstract model (`convert.hf.init_model`) is abstract.

    Args:
      model: with stacked layers, without adapters.
      strict: each target must match something; otherwise one match in all is enough, as in PEFT.

    Raises:
      UserError: for a target that matches no linear layer, or some layers of a stack only.
    """
    layers = find(model, config.target_modules, config.modules_to_save, strict=strict)
    if adapted := [path for path, layer in layers.items() if hasattr(layer, "adapter")]:
        raise UserError(f"lora: {adapted[0]} has an adapter already; merge or detach it first")
    mesh = _mesh_of(layers.values())
    for path, layer in layers.items():
        kernel = layer.kernel.get_value()
        *stack, inputs, outputs = kernel.shape
        *lead, into, out = layer.axes
        shapes = (*stack, inputs, config.r), (*stack, config.r, outputs)
        places = [sharding(axes, shape, mesh) for axes, shape in zip(
            ((*lead, into, "rank"), (*lead, "rank", out)), shapes, strict=True)]
        if isinstance(kernel, jax.ShapeDtypeStruct):
            a, b = (jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
                    for shape, place in zip(shapes, places, strict=True))
        else:
            # On the host: compiling the generator of jax.random for every shape takes seconds.
            random = np.random.Generator(np.random.PCG64([seed, zlib.crc32(path.encode())]))
            bound = inputs ** -0.5  # kaiming_uniform_(a=sqrt(5)) of torch
            a, b = jax.device_put((random.uniform(-bound, bound, shapes[0]).astype(np.float32),
                                   np.zeros(shapes[1], np.float32)), tuple(places))
        layer.adapter = LoRA(a, b, layer.axes, config)
    for first, *others in groups(model, config.target_modules):
        for path in others:
            if path in layers:  # the same parameter: its gradient is the sum over the group
                layers[path].adapter.lora_a = layers[first].adapter.lora_a
    return layers


def merge(model: nnx.Module) -> None:
    """Folds every adapter into its layer's kernel and removes it, in place."""
    for layer in linears(model).values():
        if hasattr(layer, "adapter"):
            layer.kernel.set_value(layer.adapter.merged(layer.kernel.get_value()))
    detach(model)


def merged(model: Any) -> Any:
    """A copy with every adapter folded in; the model itself stays as it is."""
    copy = nnx.merge(*nnx.split(model), copy=True)
    merge(copy)
    return copy


def detach(model: nnx.Module) -> None:
    """Removes every adapter, in place: the base is left as it was."""
    for layer in linears(model).values():
        if hasattr(layer, "adapter"):
            del layer.adapter


def _mesh_of(layers: Iterable[Any]) -> Mesh | AbstractMesh:
    """The mesh that the kernels of these layers lie on; one device when they lie on none."""
    for layer in layers:
        where = layer.kernel.get_value().sharding
        if isinstance(where, NamedSharding):
            return where.mesh
    return make_mesh({"data": 1})
