"""The architectures: one file each. `architecture_of` tells which one a `config.json` describes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from glm_jax.errors import UserError
from glm_jax.models import chatglm, conv_rnn, glm, glm4, glm4_moe
from glm_jax.models.config import Config
from glm_jax.models.decoder import Decoder
from glm_jax.models.weights import Weight


class Architecture(NamedTuple):
    """A row of the registry.

    Attributes:
      name: ours, unique.
      matches: whether a `config.json` describes it (`glm` and `chatglm` each name two).
      config, model: its config class and its module, `model(config, head, dtype, rngs=…)`.
      weights: its weight table, for a config and a head.
      classes: the class that Hugging Face calls each head by; none when it has no such model.
      ignored: for a config, an expression for names that a checkpoint may hold besides.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    config: type[Config]
    model: Callable[..., Any]
    weights: Callable[[Any, str], list[Weight]]
    classes: Mapping[str, str]
    ignored: Callable[[Any], str] = lambda config: ""


REGISTRY = (
    Architecture(
        "glm", lambda c: c.get("model_type") == "glm" and "num_hidden_layers" in c,
        glm.GlmConfig, Decoder, glm.weights,
        {"lm": "GlmForCausalLM", "sequence": "GlmForSequenceClassification",
         "token": "GlmForTokenClassification"}),
    Architecture(
        "glm4", lambda c: c.get("model_type") == "glm4",
        glm4.Glm4Config, Decoder, glm.weights,
        {"lm": "Glm4ForCausalLM", "sequence": "Glm4ForSequenceClassification",
         "token": "Glm4ForTokenClassification"}),
    Architecture(
        "glm4_moe", lambda c: c.get("model_type") == "glm4_moe",
        glm4_moe.Glm4MoeConfig, Decoder, glm4_moe.weights, {"lm": "Glm4MoeForCausalLM"},
        glm4_moe.ignored),
    Architecture(
        "chatglm", lambda c: c.get("model_type") == "chatglm" and "multi_query_group_num" in c,
        chatglm.ChatGLMConfig, Decoder, chatglm.weights,
        {"lm": "ChatGLMModel", "sequence": "ChatGLMForSequenceClassification"}),
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
    """The head that the `architectures` field of a `config.json` names; `lm` without the field."""
    names = config.get("architectures") or []
    return next((h for h, name in architecture.classes.items() if name in names), "lm")
