"""Which linear layers an adapter's `target_modules` names, by our paths or by PyTorch's."""

import re
from typing import Any

from flax import nnx

from glm_jax.adapters import nearest
from glm_jax.errors import UserError
from glm_jax.models import architecture_of
from glm_jax.models.weights import Weight
from glm_jax.nn.layers import Linear

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "score")  # which `all-linear` leaves out

Target = tuple[str, ...] | str


def linears(model: nnx.Module) -> dict[str, Any]:
    """Every linear layer by its dotted path; stacked ones are one."""
    found = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)
             if isinstance(module, Linear)}
    return dict(sorted(found.items()))


def is_routed(layer: Any) -> bool:
    """Whether a linear layer is that of routed experts, a kernel for each.

    `all-linear` leaves them out: with r=8 they are 97 % of what trains of GLM-4.5-Air. PEFT's
    of transformers 5 means fused experts, the router and attention, but no other MLP.
    """
    return "experts" in layer.axes


def weight_table(model: Any) -> list[Weight]:
    """The weight table of a model."""
    return architecture_of(model.config.to_dict()).weights(model.config, model.head)


def torch_names(model: Any) -> dict[str, list[str]]:
    """What PyTorch calls each linear layer, by our path: a name for each layer of a stack.

    Those that a released checkpoint joins (`query_key_value`) have one name together.
    """
    layers = linears(model)
    return {path: [name.removesuffix(".weight")
                   for _, name in row.names(layers[path].kernel.get_value().shape)]
            for paths, row in modules(model).items() for path in paths}


def modules(model: Any) -> dict[tuple[str, ...], Weight]:
    """The table row of each of PyTorch's linear layers, by our paths of what it joins."""
    layers, found = linears(model), {}
    for row in weight_table(model):
        paths = tuple(path.removesuffix(".kernel") for path in row.paths)
        if (row.read and row.name.endswith(".weight")
                and all(path in layers for path in paths)):
            found[paths] = row
    return found


def groups(model: Any, target_modules: Target) -> list[tuple[str, ...]]:
    """The layers, by path, that `target_modules` names together: their adapters share one A.

    Those are the joined ones, named as PyTorch does.
    """
    names = torch_names(model)
    return [paths for paths in modules(model) if len(paths) > 1
            and (target_modules == ALL_LINEAR
                 or any(matches(target_modules, name) for name in names[paths[0]]))]


def matches(target: Target, name: str) -> bool:
    """Whether PEFT's `target_modules` means this module: ends of names, or one expression."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in target)


def find(model: Any, target_modules: Target, excluded: tuple[str, ...] = (), *,
         strict: bool = True) -> dict[str, Any]:
    """The linear layers that `target_modules` names, by path.

    Args:
      target_modules: ends of paths, or one regular expression for whole paths, or `all-linear`.
      excluded: modules that are never adapted, since they train whole.
      strict: each end must match something; otherwise one match in all is enough, as in PEFT.

    Raises:
      UserError: when a target matches nothing, or only some layers of a stack.
    """
    layers = {path: layer for path, layer in linears(model).items()
              if not matches(excluded, path)}
    if target_modules == ALL_LINEAR:
        return {path: layer for path, layer in layers.items()
                if path not in HEADS and not is_routed(layer)}
    names = torch_names(model)
    ends: list[Target] = ([target_modules] if isinstance(target_modules, str)
                          else [(end,) for end in target_modules])
    try:
        idle = [end for end in ends if not any(
            matches(end, name) for path in layers for name in (path, *names.get(path, ())))]
    except re.error as error:
        raise UserError(f"target_modules: {target_modules!r} is not a regular expression: {error}"
                        ) from None
    if idle and (strict or len(idle) == len(ends)):
        target = idle[0] if isinstance(idle[0], str) else idle[0][0]
        joined = {path for paths in modules(model) if len(paths) > 1 for path in paths}
        raise UserError(f"target_modules: {target!r} matches no linear layer; " + nearest(
            target, (name.rpartition(".")[2] for path in layers
                     for name in (names[path] if path in joined else (path,)))))
    chosen = {}
    for path, layer in layers.items():
        covered = [matches(target_modules, name) for name in names.get(path, ())]
        if matches(target_modules, path) or (covered and all(covered)):
            chosen[path] = layer
        elif any(covered):
            raise UserError(f"target_modules: {path} is named in layer {covered.index(True)} but "
                            f"not in layer {covered.index(False)}; adapters on part of a stack are "
                            "not supported")
    return chosen
