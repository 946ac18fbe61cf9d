"""Configs: both spellings, what is refused, and the way back; which architecture a folder holds."""

import json

import pytest

from glm_jax.errors import UserError
from glm_jax.models import architecture_of, head_of
from glm_jax.models.glm import GlmConfig

OLD = {"model_type": "glm", "hidden_size": 64, "num_hidden_layers": 3, "rope_theta": 5000000.0,
       "partial_rotary_factor": 1.0, "torch_dtype": "bfloat16", "eos_token_id": [1, 2]}
NEW = {"model_type": "glm", "hidden_size": 64, "num_hidden_layers": 3, "dtype": "bfloat16",
       "eos_token_id": [1, 2], "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default",
                                                   "partial_rotary_factor": 1.0}}


def test_both_spellings_are_one_config():
    assert GlmConfig.from_dict(OLD) == GlmConfig.from_dict(NEW)
    config = GlmConfig.from_dict(NEW)
    assert (config.rope_theta, config.partial_rotary_factor, config.hidden_size) == (5e6, 1.0, 64)


def test_what_released_files_leave_out_has_the_released_value():
    config = GlmConfig.from_dict({"model_type": "glm"})
    assert config.partial_rotary_factor == 0.5  # which is absent in them all
    assert (config.vocab_size, config.rms_norm_eps, config.pad_token_id) == (151552, 1.5625e-07,
                                                                             151329)


@pytest.mark.parametrize("raw", [OLD, NEW])
def test_the_older_spelling_is_written_and_nothing_is_lost(raw):
    config = GlmConfig.from_dict(raw)
    written = json.loads(json.dumps(config.to_dict()))
    assert OLD.items() <= written.items()
    assert not {"rope_parameters", "dtype"} & set(written)
    assert GlmConfig.from_dict(written) == config


def test_transformers_reads_what_is_written():
    from transformers import GlmConfig as Reference
    config = GlmConfig.from_dict({**NEW, "id2label": {"0": "差", "1": "好", "2": "中"}})
    theirs = Reference(**config.to_dict())
    assert theirs.rope_parameters["rope_theta"] == 5e6
    assert theirs.rope_parameters["partial_rotary_factor"] == 1.0
    assert (theirs.num_labels, theirs.id2label[2], theirs.label2id["中"]) == (3, "中", 2)


def test_the_number_of_classes_survives_without_names():
    config = GlmConfig.from_dict({"model_type": "glm", "num_labels": 5})
    assert GlmConfig.from_dict(config.to_dict()).num_labels == 5


@pytest.mark.parametrize(("fields", "message"), [
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: 'silu'"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling"),
    ({"hidden_size": "64"}, "hidden_size must be int, not '64'"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be int"),
    ({"rms_norm_eps": None}, "rms_norm_eps must be float"),
    ({"partial_rotary_factor": 2}, "partial_rotary_factor must be above 0 and at most 1, not 2"),
    ({"eos_token_id": "a"}, "eos_token_id must be a token's number, not 'a'"),
    ({"eos_token_id": [1, "a"]}, "eos_token_id must be a token's number, not [1, 'a']"),
    ({"pad_token_id": [1]}, "pad_token_id must be int"),
    ({"id2label": ["a", "b"]}, "id2label must be a table"),
])
def test_what_is_not_computed_is_refused(fields, message):
    with pytest.raises(UserError, match=r"config\.json") as error:
        GlmConfig.from_dict({**OLD, **fields})
    assert message in str(error.value)


def test_a_config_can_be_a_static_argument():
    config = GlmConfig.from_dict({**OLD, "id2label": {"0": "a", "1": "b"}})
    assert hash(config) == hash(GlmConfig.from_dict({**NEW, "id2label": {"0": "a", "1": "b"}}))


@pytest.mark.parametrize(("config", "name"), [
    (OLD, "glm"), (NEW, "glm"),
    # GLM of 2021 has the same model_type, and other fields
    ({"model_type": "glm", "num_layers": 12, "block_position_encoding": True}, "glm2021"),
    ({"model_type": "glm4", "num_hidden_layers": 2}, "glm4"),
    ({"model_type": "glm4_moe", "num_hidden_layers": 2}, "glm4_moe"),
    ({"model_type": "chatglm", "num_layers": 2, "multi_query_group_num": 2}, "chatglm"),
    ({"model_type": "chatglm", "num_layers": 28, "position_encoding_2d": True}, "chatglm6b"),
    ({"model_type": "bert"}, "bert"),
    ({"model_type": "roberta", "num_hidden_layers": 2}, None),
    ({}, None),
])
def test_the_fields_tell_the_architecture(config, name):
    if name:
        assert architecture_of(config).name == name
    else:
        with pytest.raises(UserError, match=r"here.json.* not supported; supported: glm"):
            architecture_of(config, "here.json")


@pytest.mark.parametrize(("classes", "head"), [
    (["GlmForCausalLM"], "lm"), (["GlmForSequenceClassification"], "sequence"),
    (["GlmForTokenClassification"], "token"), (None, "lm"),
])
def test_the_class_tells_the_head(classes, head):
    assert head_of({**OLD, "architectures": classes}, architecture_of(OLD)) == head
