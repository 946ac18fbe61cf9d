"""The architectures: one file each. `architecture_of` tells which one a `config.json` describes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from glm_jax.errors import UserError
from glm_jax.models import bert, chatglm, chatglm6b, conv_rnn, glm, glm4, glm4_moe, glm2021
from glm_jax.models.config import Config
from glm_jax.models.decoder import Decoder
from glm_jax.models.weights import Weight
from glm_jax.nn.batch import Array, Batch, causal_batch


class Architecture(NamedTuple):
    """A row of the registry.

    Attributes:
      name: ours, unique.
      matches: whether a `config.json` describes it (`glm` and `chatglm` each name two).
      config, model: its config class and its module, `model(config, head, dtype, rngs=…)`.
      weights: its weight table, for a config and a head.
      classes: the class that Hugging Face calls each head by, the usual head first; none when it
        has no such model.
      ignored: for a config, an expression for names that a checkpoint may hold besides.
      plain: a name without what checkpoints of one model differ in; they are read by these.
      batch: for a config, tokens and an attention mask `[batch, length]`, what the released
        tokenizer and model make of them.
      bits: of the quantised weights that its folders may hold.
      pool: which token of an example stands for it, `last` or `first`.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    config: type[Config]
    model: Callable[..., Any]
    weights: Callable[[Any, str], list[Weight]]
    classes: Mapping[str, str]
    ignored: Callable[[Any], str] = lambda config: ""
    plain: Callable[[str], str] = lambda name: name
    batch: Callable[[Any, Array, Array | None], Batch] = (
        lambda config, tokens, mask: causal_batch(tokens, mask))
    pool: str = "last"
    bits: tuple[int, ...] = ()


REGISTRY = (
    Architecture(
        "glm", lambda c: c.get("model_type") == "glm" and "num_hidden_layers" in c,
        glm.GlmConfig, Decoder, glm.weights,
        {"lm": "GlmForCausalLM", "sequence": "GlmForSequenceClassification",
         "token": "GlmForTokenClassification"}, glm.ignored),
    Architecture(
        "glm4", lambda c: c.get("model_type") == "glm4",
        glm4.Glm4Config, Decoder, glm.weights,
        {"lm": "Glm4ForCausalLM", "sequence": "Glm4ForSequenceClassification",
         "token": "Glm4ForTokenClassification"}, glm.ignored),
    Architecture(
        "glm4_moe", lambda c: c.get("model_type") == "glm4_moe",
        glm4_moe.Glm4MoeConfig, Decoder, glm4_moe.weights, {"lm": "Glm4MoeForCausalLM"},
        glm4_moe.ignored),
    Architecture(
        "chatglm", lambda c: c.get("model_type") == "chatglm" and "multi_query_group_num" in c,
        chatglm.ChatGLMConfig, Decoder, chatglm.weights,
        {"lm": "ChatGLMModel", "sequence": "ChatGLMForSequenceClassification",
         "token": "ChatGLMForTokenClassification"}, bits=(4, 8)),
    Architecture(
        "glm2021", lambda c: c.get("model_type") == "glm" and "num_layers" in c,
        glm2021.Glm2021Config, glm2021.Glm2021, glm2021.weights, {"lm": "GLMModel"},
        plain=glm2021.plain, batch=glm2021.as_batch),
    Architecture(
        "chatglm6b", lambda c: c.get("model_type") == "chatglm" and "position_encoding_2d" in c,
        chatglm6b.ChatGLM6BConfig, chatglm6b.ChatGLM6B, chatglm6b.weights,
        {"lm": "ChatGLMModel", "sequence": "ChatGLMForSequenceClassification",
         "token": "ChatGLMForTokenClassification"}, batch=chatglm6b.as_batch, bits=(4, 8)),
    Architecture(
        "bert", lambda c: c.get("model_type") == "bert",
        bert.BertConfig, bert.Bert, bert.weights, bert.CLASSES, ignored=bert.ignored,
        plain=bert.plain, batch=bert.as_batch, pool="first"),
    Architecture(
        "conv_rnn", lambda c: c.get("model_type") == "conv_rnn",
        conv_rnn.ConvRNNConfig, conv_rnn.ConvRNN, conv_rnn.weights, {}),
)


def architecture_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The registry's row for the contents of a `config.json`.

    Raises:
      UserError: when no architecture has these fields.
    """
    for row in REGISTRY:
        if row.matches(config):
            return row
    raise UserError(f"{where}: model_type {config.get('model_type')!r} with these fields is not "
                    f"supported; supported: {', '.join(row.name for row in REGISTRY)}")


def head_of(config: Mapping[str, Any], architecture: Architecture) -> str:
    """The head that the `architectures` field of a `config.json` names; else the usual one."""
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise UserError(f"config.json: architectures must be a list of class names, not {names!r}")
    usual = next(iter(architecture.classes), "lm")
    return next((h for h, name in architecture.classes.items() if name in names), usual)


def as_batch(config: Config, tokens: Array, attention_mask: Array | None = None) -> Batch:
    """The batch of plain tokens `[batch, length]` for the model of `config`."""
    return architecture_of(config.to_dict()).batch(config, tokens, attention_mask)
