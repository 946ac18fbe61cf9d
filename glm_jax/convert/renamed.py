"""ChatGLM2, ChatGLM3 and GLM-4 as Hugging Face's `glm`, and back: the same parameters, renamed."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from glm_jax.errors import UserError
from glm_jax.models import architecture_of
from glm_jax.models.chatglm import from_glm, to_glm

WAYS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("chatglm", "glm"): to_glm, ("glm", "chatglm"): from_glm}


def renamed_config(config: Any, head: str, name: str) -> Any:
    """The config of the architecture `name` that computes the same with the same parameters.

    Raises:
      UserError: where there is none, naming the field of the config that stops it.
    """
    own = architecture_of(config.to_dict()).name
    if own == name:
        return config
    if (own, name) not in WAYS:
        raise UserError(f"model_type={own!r} can't be written as {name!r}; only chatglm and glm "
                        "are the same model under two names")
    if head != "lm":
        raise UserError(f"architectures: the {head} classifiers of chatglm and glm differ "
                        "(bias, and the token they look at): write it under its own name")
    return WAYS[own, name](config)


def renamed(model: Any, name: str) -> Any:
    """The model under another architecture's config and names; the parameters are shared.

    Raises:
      UserError: as `renamed_config`.
    """
    again = nnx.merge(*nnx.split(model))
    again.config = renamed_config(model.config, model.head, name)
    return again
