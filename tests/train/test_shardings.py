"""Where everything lies, as text that a change shows in as a diff: shardings.txt.

Small models of the families on a few meshes, then what the configs train on the slices that they
are for. `python -m tests.train.test_shardings` writes it anew.
"""

import contextlib
import dataclasses
import importlib
import math
import os
import re
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax.adapters import lora, partition
from glm_jax.convert.hf import init_model
from glm_jax.infer.cache import empty_cache
from glm_jax.models import architecture_of, as_batch
from glm_jax.nn.loss import cross_entropy
from glm_jax.parallel import mesh as rules
from glm_jax.train.plan import pieces
from glm_jax.train.step import by_path, init_state, make_step

FILE = Path(__file__).with_name("shardings.txt")
MESHES = ({"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 2, "sequence": 2},
          {"fsdp": 2, "expert": 4})
WHOLE = {"vocab_size": 72, "hidden_size": 32, "num_attention_heads": 8}
FAMILIES = {  # BERT's 67 tokens do not divide
    "glm": {"model_type": "glm", "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8,
            "intermediate_size": 48},
    "chatglm6b": {"model_type": "chatglm", "position_encoding_2d": True, "num_layers": 2,
                  "inner_hidden_size": 48, "mask_token_id": 60, "gmask_token_id": 61,
                  "bos_token_id": 62},
    "glm4_moe": {"model_type": "glm4_moe", "num_hidden_layers": 2, "num_key_value_heads": 2,
                 "head_dim": 8, "intermediate_size": 48, "first_k_dense_replace": 1,
                 "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "bert": {"model_type": "bert", "num_hidden_layers": 2, "intermediate_size": 48,
             "vocab_size": 67, "max_position_embeddings": 40},
}


CONFIGS = {  # by file and variant: meshes
    "sentiment": {"fsdp": 4, "tensor": 2}, "sentiment:full": {"fsdp": 4, "tensor": 2},
    "chat": {"fsdp": 4, "sequence": 2}, "pretrain": {"data": 2, "fsdp": 4},
    "pod:chatglm3-6b-lora": {"fsdp": 8}, "pod:glm-4-9b-full": {"fsdp": 16},
    "pod:glm-4-32b-lora": {"fsdp": 16}, "pod:glm-4-32b-full": {"fsdp": 16, "expert": 4},
    "pod:glm-4.5-air-lora": {"fsdp": 16, "expert": 4},
    "pod:glm-4.5-lora": {"fsdp": 16, "expert": 8},
}


def loss(model, batch, key):
    hidden, _ = model(batch, key=key)
    if model.head == "mlm":  # which no task trains
        return jnp.sum(model.logits(hidden))
    return cross_entropy(hidden, model.vocabulary_kernel(), batch.targets, batch.weights)


def line(what, shape, spec):
    return f"  {what} {list(shape)}: {', '.join(str(part) for part in spec) or '-'}"


def arrays(title, tree):
    """A line for each array."""
    def spec(x):
        return tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [line(f"{title} {jax.tree_util.keystr(path, simple=True, separator='.')}", x.shape,
                 spec(x)) for path, x in paths]


def named(sizes):
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def lines(state, frozen, trace):
    """Of a step: where its arrays lie, and what tracing it pins."""
    trained = arrays("trained", state["trainable"])
    moments = arrays("optimizer", state["optimizer"])
    same = {each.removeprefix("  trained ") for each in trained}
    own = [each for each in moments if re.split(r"\.[mn]u\.", each)[-1] not in same]
    out = [*trained, f"  optimizer: {len(moments) - len(own)} moments as what they belong to", *own]
    out += arrays("frozen", by_path(frozen))
    with pinned() as seen:
        trace()
    return out + seen


@contextlib.contextmanager
def pinned():
    """A list that has a line, behind the block, for each layout that was asked for within."""
    seen, plain = {}, rules.partition

    def recorded(axes, shape, sizes, gathered=False, spread=False):
        spec = plain(axes, shape, sizes, gathered, spread)
        kind = "computed with" if gathered else "spread" if spread else "activation"
        seen[line(f"{kind} {'/'.join(axis or '.' for axis in axes)}", shape, spec)] = None
        return spec
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "partition", recorded)
        yield found
    found += seen


def of_family(family, method, sizes):
    """The lines of one model, what trains of it, and one mesh. Nothing is computed."""
    raw, mesh = WHOLE | FAMILIES[family], rules.make_mesh(sizes)
    architecture = architecture_of(raw)
    model = init_model(architecture, architecture.config.from_dict(raw),
                       "mlm" if family == "bert" else "lm", mesh=mesh, abstract=True)
    if method == "lora":
        layers = r"(dense_)?layers\..*" if family == "glm4_moe" else "all-linear"  # experts too
        lora.attach(model, lora.LoRAConfig(r=4, target_modules=layers))
    graphdef, trainable, frozen = partition(model, ("adapter",) if method == "lora" else (".*",))
    optimizer = optax.adamw(1e-3)
    state = init_state(by_path(trainable), optimizer, mesh)
    tokens = np.tile(np.arange(1, 17), (8, 1))
    batch = dataclasses.replace(as_batch(model.config, tokens), targets=tokens,
                                weights=np.ones((8, 16), np.float32))
    with jax.set_mesh(mesh):
        step = make_step(graphdef, trainable, loss, optimizer, state, seed=0)
        out = lines(state, frozen, lambda: step.trace(state, frozen, jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), batch)))
        if family != "bert":
            with pinned() as cache:
                jax.eval_shape(lambda: empty_cache(model.config, 8, 32, jnp.bfloat16))
            out += [each.replace("activation", "cache", 1) for each in cache]
    return [f"{family} {method} on {named(sizes)}", *out]


def of_config(name, sizes):
    """The lines of a config in `configs/` on devices that are nowhere."""
    file, _, variant = name.partition(":")
    config = importlib.import_module(f"configs.{file}").get_config(variant)
    config.mesh.update({axis: sizes.get(axis, 1) for axis in rules.AXES})
    mesh = rules.abstract_mesh(sizes, math.prod(sizes.values()))
    with rules.use_rules(config.mesh.rules), jax.sharding.use_abstract_mesh(mesh):
        made = pieces(config, mesh)
        out = lines(made.state, made.parts.frozen,
                    lambda: made.step.trace(made.state, made.parts.frozen, made.batch))
        return [f"configs/{name} on {named(sizes)}", *arrays("batch", made.batch), *out]


def everything():
    parts = [of_family(family, method, sizes) for family in FAMILIES
             for method in ("full", "lora") for sizes in MESHES]
    parts += [of_config(name, sizes) for name, sizes in CONFIGS.items()]
    return "\n".join("\n".join(part) + "\n" for part in parts)


def test_everything_lies_where_it_did():
    assert everything() == FILE.read_text(), (
        "a sharding changed: write it anew with `python -m tests.train.test_shardings` and read "
        "`git diff tests/train/shardings.txt`")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    FILE.write_text(everything())
