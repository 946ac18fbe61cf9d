"""ChatGLM2, ChatGLM3 and GLM-4 as Hugging Face's `glm`, and back: the same parameters, renamed."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from glm_jax.errors import UserError
from glm_jax.models import architecture_of
from glm_jax.models.chatglm import from_glm, to_glm

WAYS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("chatglm", "glm"): to_glm, ("glm", "chatglm"): from_glm}


def renamed(model: Any, name: str) -> Any:
    """The model under another architecture's config and names; the parameters are shared.

    Raises:
      UserError: where the two would not compute the same, naming the field of the config.
    """
    own = architecture_of(model.config.to_dict()).name
    if own == name:
        return model
    if (own, name) not in WAYS:
        raise UserError(f"model_type={own!r} can't be written as {name!r}; only chatglm and glm "
                        "are the same model under two names")
    if model.head != "lm":
        raise UserError(f"architectures: the {model.head} classifiers of chatglm and glm differ "
                        "(bias, and the token they look at): write it under its own name")
    again = nnx.merge(*nnx.split(model))
    again.config = WAYS[own, name](model.config)
    return again
