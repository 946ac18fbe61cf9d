"""From a config to the parts of a run, and what a run folder belongs to."""

import json
import shutil

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import chat, pretrain
from glm_jax.convert.hf import init_model, save_model
from glm_jax.data.tokenizer import load_tokenizer
from glm_jax.errors import UserError
from glm_jax.models import architecture_of
from glm_jax.models.glm import GlmConfig
from glm_jax.parallel.mesh import make_mesh
from glm_jax.train import plan, setup
from glm_jax.train.chips import topology
from glm_jax.train.step import by_path, init_state


def dtypes(state):
    return {str(x.dtype) for x in by_path(state).values()}


def test_lora_in_bfloat16_trains_in_float32(smoke):
    run = setup.build(smoke(**{"model.dtype": "bfloat16"}))
    assert dtypes(run.parts.trainable) == {"float32"}
    assert dtypes(run.parts.frozen) == {"bfloat16"}
    assert run.parts.model(by_path(run.parts.trainable)).dtype == jnp.bfloat16
    assert run.task.labels == ("好", "差")
    assert run.parts.model(by_path(run.parts.trainable)).config.id2label == {0: "好", 1: "差"}


@pytest.mark.parametrize(("variant", "trained"), [
    ("full", "all"), ("head", {"score.kernel"}), ("scratch", "all"), ("conv-rnn", "all")])
def test_what_trains(smoke, variant, trained):
    parts = setup.build(smoke(variant, **{"model.dtype": "bfloat16"})).parts
    assert parts.lora_config is None
    if trained == "all":
        assert setup.count(parts.frozen) == 0 and dtypes(parts.trainable) == {"float32"}
    else:
        assert set(by_path(parts.trainable)) == trained


def test_what_is_computed_again_is_the_configs_choice(smoke):
    parts = setup.build(smoke(**{"model.remat": "dots"})).parts
    assert parts.model(by_path(parts.trainable)).compute.remat == "dots"
    with pytest.raises(UserError, match=r"model\.remat=.full.: conv_rnn has no stack of layers"):
        setup.build(smoke("conv-rnn", **{"model.remat": "full"}))


@pytest.mark.parametrize("variant", ["", "full"])
def test_the_abstract_parts_and_state_are_the_real_ones_without_arrays(smoke, variant):
    config = smoke(variant, **{"model.dtype": "bfloat16"})
    mesh = make_mesh({"fsdp": 4, "tensor": 2})

    def described(abstract):
        parts = setup.make_parts(config, "sequence", ("a", "b"), mesh, None, abstract)
        state = init_state(by_path(parts.trainable), optax.adamw(1e-3), mesh, 0.9)
        return jax.tree_util.tree_leaves_with_path(jax.tree.map(
            lambda x: (x.shape, str(x.dtype), x.sharding.spec, isinstance(x, jax.Array)),
            {"state": state, "frozen": by_path(parts.frozen)}), is_leaf=lambda x: type(x) is tuple
            and isinstance(x[-1], bool))
    real, abstract = described(False), described(True)
    assert all(leaf[-1] for _, leaf in real) and not any(leaf[-1] for _, leaf in abstract)
    assert [(path, leaf[:3]) for path, leaf in abstract] == \
        [(path, leaf[:3]) for path, leaf in real]


def test_scratch_does_not_begin_with_the_weights(smoke):
    scratch, full = (by_path(setup.build(smoke(v)).parts.trainable) for v in ("scratch", "full"))
    assert {k: v.shape for k, v in scratch.items()} == {k: v.shape for k, v in full.items()}
    assert (scratch["embed_tokens.embedding"] != full["embed_tokens.embedding"]).any()


def test_rules_of_the_config_say_how_parameters_lie(smoke):
    config = smoke(**{"mesh.fsdp": 2, "mesh.tensor": 2})
    config.mesh.rules = {"embed": None, "mlp": ["tensor", "fsdp"]}
    parts = setup.build(config).parts
    down = by_path(parts.frozen)["layers.mlp.down_proj.kernel"]
    assert tuple(down.sharding.spec) == (None, ("tensor", "fsdp"), None)
    config.mesh.rules = {"wide": None}
    with pytest.raises(UserError, match="'wide' is no axis of an array"):
        setup.build(config)


@pytest.mark.parametrize(("fields", "message"), [
    ({"batch.rows": 0}, "batch.rows=0: it must be at least 1"),
    ({"batch.accumulate": 0}, "batch.accumulate=0"),
    ({"model.remat": "some"}, "model.remat='some': choose one of none, attention, full, dots, off"),
    ({"model.remat": "offload"}, "model.remat='offload': a CPU's arrays lie in the host's memory"),
    ({"model.attention": "flash"}, "model.attention='flash': choose one of auto, reference, cudnn"),
    ({"model.attention": "splash"}, "model.attention='splash': it is for a TPU, and the mesh is one"
                                    " of CPUs; use 'auto'"),
    ({"optimizer.offload": True}, "optimizer.offload: a CPU's arrays lie in the host's memory"),
    ({"log.every": 0}, "log.every=0"),
    ({"max_skipped": 0}, "max_skipped=0"),
    ({"model.unroll": -1}, "model.unroll=-1: it must be at least 0"),
    ({"mesh.cpu_devices": 5000}, "mesh.cpu_devices=5000: it must be at most 4096"),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
    ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate=-1.0"),
    ({"task.label_smoothing": 1.0}, "task.label_smoothing=1.0: it must be below 1"),
    ({"task.label_smoothing": -0.1}, "task.label_smoothing=-0.1: it must be at least 0"),
    ({"steps": 0, "epochs": 0.0}, "epochs=0.0: it must be positive"),
    ({"batch.rows": 6, "batch.accumulate": 4}, "batch.rows=6 must be a multiple"),
    ({"mesh.data": 8, "batch.rows": 12}, "batch.rows=12 must be a multiple"),
    ({"mesh.data": 3, "mesh.fsdp": 3}, "needs 9 devices, but there are 8"),
    ({"task.name": "parsing"}, "choose 'classification', 'instruction'"),
    ({"model.init": "zeros", "adapter.name": ""}, "choose 'pretrained' or 'random'"),
    ({"adapter.dropout": 1.0}, "lora_dropout"),
    ({"model.init": "random"}, "an adapter on random weights"),
    ({"trainable": (0,)}, "'0' matches no parameter"),
    ({"adapter.targets": (0,)}, "'0' matches no linear layer"),
    ({"trainable": ("adapter", "score", "norm")}, "names norm.scale, which an adapter's folder"),
])
def test_bad_settings(smoke, fields, message):
    with pytest.raises(UserError) as error:
        setup.build(smoke(**fields))
    assert message in str(error.value)


@pytest.mark.parametrize(("fields", "message"), [
    ({"model_type": "bert", "max_position_embeddings": 20}, "length=32: .* only 20 positions"),
    ({"model_type": "glm", "num_layers": 1, "max_sequence_length": 20}, "21 .*; lower it to 20"),
    ({"model_type": "glm", "num_hidden_layers": 1, "max_position_embeddings": 20}, ""),
    ({"model_type": "chatglm", "position_encoding_2d": True, "max_sequence_length": 20}, "")])
def test_texts_longer_than_the_models_positions(smoke, caplog, fields, message):
    """An error where they are learned, before a model is made; a line where they are not."""
    config = smoke("full", **{"model.init": "random"})
    config.model.config = ConfigDict({"vocab_size": 320} | fields)

    def check(**how):
        config.update_from_flattened_dict(how)
        setup.check_positions(config, setup.make_task(config, setup.tokenizer_of(config)))
    if message:
        with pytest.raises(UserError, match=message):
            setup.build(config)
    else:
        check()
        said = [text for text in caplog.messages if "longer than the 20 positions" in text]
        assert [text.partition(":")[0] for text in said] == ["train", "dev", "test"]
    caplog.clear()
    check(**{"batch.length": 20})
    assert "positions" not in caplog.text


def test_the_width_of_summaries_is_the_models_where_its_config_leaves_it_out():
    config = pretrain.get_config()
    del config.model.config.hidden_size
    config.task.summaries = 0.5
    assert setup.make_task(config, None).shape.features == GlmConfig().hidden_size


@pytest.mark.parametrize(("fields", "name"), [
    ({"model_type": "glm", "num_layers": 1}, "glm2021"),
    ({"model_type": "chatglm", "position_encoding_2d": True}, "chatglm6b")])
def test_pretraining_is_for_one_position_a_token(smoke, fields, name):
    """With one stream for both a model would learn, and compute something else in PyTorch."""
    config = smoke("full", **{"model.init": "random", "task.name": "pretrain"})
    config.model.config = ConfigDict(fields)
    with pytest.raises(UserError, match=f"and {name} takes two"):
        setup.make_task(config, None)


@pytest.mark.parametrize(("template", "files", "taught"), [
    ("", None, 5), ("plain", [5], 5), ("chat", None, [5, 7]), ("", [5, 7], [5, 7]),
    ("plain", [5, 7], 5)])
def test_where_a_taught_model_ends(smoke, base, tmp_path, template, files, taught):
    """A config that says it already stays as it is: released code wants its one number."""
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": 5}))
    if files:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": files}))
    config = smoke("full", **{"model.path": str(folder)})
    config.task.update(name="instruction", template=template)
    parts = setup.make_parts(config, "lm", (), make_mesh({"data": 1}), load_tokenizer(folder))
    assert parts.model(by_path(parts.trainable)).config.extra["eos_token_id"] == taught


def test_conv_rnn_takes_one_example_a_row(smoke):
    with pytest.raises(UserError, match="one example a row"):
        setup.build(smoke("conv-rnn", **{"batch.examples": 2}))


def test_a_tokenizer_larger_than_the_model(smoke):
    config = smoke("conv-rnn")
    config.model.config.vocab_size = 300
    with pytest.raises(UserError, match="the tokenizer has 320 tokens, the model only 300"):
        setup.build(config)


def identity(config):
    return setup.identity(config, setup.build(config).task) | setup.model_hashes(config)


def test_what_a_run_folder_belongs_to(smoke, base, reviews, tmp_path):
    """Another mesh, other logging and other paths are the same run; all else is another."""
    import shutil
    first = identity(smoke())
    shutil.copytree(base, tmp_path / "moved")
    (tmp_path / "other.csv").write_bytes(reviews.read_bytes())
    moved = {"mesh.data": -1, "mesh.tensor": 2, "log.every": 7,
             "model.path": str(tmp_path / "moved"), "task.train": str(tmp_path / "other.csv")}
    assert identity(smoke(**moved)) == first

    (tmp_path / "other.csv").write_bytes(reviews.read_bytes().replace("电梯".encode(), b"x"))
    config = smoke(**moved, seed=1, trainable=("score", "adapter"))
    differ = {name for name, value in identity(config).items() if first[name] != value}
    assert differ == {"seed", "trainable", "data sha256"}

    weights = tmp_path / "moved" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert identity(config)["weights sha256"] != first["weights sha256"]
    for name in ("tokenizer", "config"):
        path = tmp_path / "moved" / f"{name}.json"
        path.write_text(path.read_text() + "\n")
    differ = {name for name, value in identity(config).items() if first[name] != value}
    assert differ >= {"tokenizer sha256", "model config sha256"}


def test_a_folder_of_another_run_is_refused(tmp_path):
    setup.check_same_run(tmp_path / "new", {"seed": 1})
    setup.check_same_run(tmp_path, {"seed": 1})  # empty, or with a log file in it
    (tmp_path / "config.json").write_text('{"identity": {"seed": 1, "steps": 4}}')
    setup.check_same_run(tmp_path, {"seed": 1, "steps": 4})
    with pytest.raises(UserError, match=r"different config \(seed: 1 there, 2 here; "
                                        r"steps: 4 there, 5 here\); give another --workdir"):
        setup.check_same_run(tmp_path, {"seed": 2, "steps": 5})
    (tmp_path / "config.json").write_text('{"model_type": "glm"}')
    with pytest.raises(UserError, match="not written by a run"):
        setup.check_same_run(tmp_path, {"seed": 1})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file, not a folder"):
        setup.check_same_run(tmp_path / "file", {"seed": 1})


@pytest.fixture
def moe(base, tmp_path):
    """The folder of a mixture of experts."""
    raw = {"model_type": "glm4_moe", "vocab_size": 320, "hidden_size": 16, "intermediate_size": 16,
           "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
           "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 8, "pad_token_id": 5}
    architecture, tokenizer = architecture_of(raw), load_tokenizer(base)
    model = init_model(architecture, architecture.config.from_dict(raw), "lm")
    model.layers.mlp.gate.e_score_correction_bias.set_value(jnp.full((1, 4), 0.1234567))
    save_model(model, tmp_path / "moe", files=tokenizer.files)
    return tmp_path / "moe"


def test_a_routers_bias_is_not_rounded_with_the_rest(smoke, moe):
    config = smoke(**{"model.path": str(moe), "model.dtype": "bfloat16",
                      "adapter.targets": ("q_proj",), "trainable": ("adapter",)})
    parts = setup.make_parts(config, "lm", (), make_mesh({"data": 1}), load_tokenizer(moe))
    frozen = {".".join(map(str, path)): param.get_value()
              for path, param in nnx.to_flat_state(parts.frozen)}
    assert frozen["layers.mlp.gate.e_score_correction_bias"][0, 0] == jnp.float32(0.1234567)
    assert frozen["layers.mlp.gate.kernel"].dtype == jnp.bfloat16


def test_experts_axis_of_a_model_without_experts_is_told(smoke, caplog):
    caplog.set_level("INFO", logger="absl")
    run = setup.build(smoke(**{"mesh.expert": 2}))
    assert run.mesh.shape["expert"] == 2 and "the model has no experts" in caplog.text
    caplog.clear()
    setup.build(smoke(**{"mesh.fsdp": 2}))
    assert "no experts" not in caplog.text


def test_experts_that_a_config_does_not_mention_are_the_familys(smoke, moe, caplog):
    caplog.set_level("INFO", logger="absl")
    file = moe / "config.json"
    raw = json.loads(file.read_text())
    assert setup.routed_experts(smoke(**{"model.path": str(moe)})) == raw.pop("n_routed_experts")
    file.write_text(json.dumps(raw))
    config = smoke(**{"model.path": str(moe), "mesh.expert": 2})
    assert setup.routed_experts(config) == 128
    with pytest.raises(UserError, match="no head 'sequence'"):  # told is what comes before
        setup.build(config)
    assert "no experts" not in caplog.text
    splits = [change["mesh.expert"] for change in plan._others(config, topology("h100:4"))]
    assert set(splits) == {1, 2, 4}
    assert setup.routed_experts(smoke()) == 0


def test_that_routed_experts_stay_frozen_is_told(smoke, moe, caplog):
    caplog.set_level("INFO", logger="absl")

    def trained(*targets):
        config = chat.get_config("smoke")
        config.update_from_flattened_dict({
            "model.path": str(moe), "task.template": "plain", "mesh.data": 1,
            "adapter.targets": targets})
        return by_path(setup.build(config).parts.trainable)
    assert not any(".experts." in path for path in trained("all-linear"))
    assert "'all-linear' leaves the routed experts frozen" in caplog.text
    caplog.clear()
    assert any(".experts." in path for path in trained("q_proj", "experts.down_proj"))
    setup.build(smoke())
    assert "routed experts" not in caplog.text
