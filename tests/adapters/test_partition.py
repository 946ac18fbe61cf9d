"""The trainable and the frozen part."""

import jax
import numpy as np
import pytest
from flax import nnx

from glm_jax.adapters import partition
from glm_jax.adapters.lora import LoRAConfig, attach
from glm_jax.errors import UserError


def paths(state):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def test_a_pattern_names_whole_parts_of_the_path(make):
    model = make("sequence")
    attach(model, LoRAConfig(target_modules=("q_proj",), modules_to_save=("score",)))
    everything = paths(nnx.state(model, nnx.Param))
    q_proj = "layers.self_attn.q_proj"
    adapter = {f"{q_proj}.adapter.lora_a", f"{q_proj}.adapter.lora_b"}
    for patterns, expected in (
            (("adapter", "score"), adapter | {"score.kernel"}),
            ((".*",), everything),
            (("norm",), {"norm.scale"}),
            (("layers.mlp",), {f"layers.mlp.{n}_proj.kernel" for n in ("gate", "up", "down")}),
            (("q_proj.(kernel|bias)",), {f"{q_proj}.kernel", f"{q_proj}.bias"})):
        graphdef, trainable, frozen = partition(model, patterns)
        assert paths(trainable) == expected, patterns
        assert paths(frozen) == everything - expected, patterns
        whole = nnx.merge(graphdef, trainable, frozen)
        for ours, theirs in zip(jax.tree.leaves(nnx.state(model)),
                                jax.tree.leaves(nnx.state(whole)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("patterns", "message"), [
    (("adapter", "score"), "'adapter' matches no parameter"),
    (("scor",), "did you mean 'score'"),
    (("(",), "not a regular expression"),
    ((), "nothing would train"),
])
def test_a_pattern_without_a_parameter_is_refused(make, patterns, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        partition(make("sequence"), patterns)
