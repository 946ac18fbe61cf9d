"""glm-jax: the GLM family in JAX and Flax. Fine-tune, evaluate, convert, generate.

    import glm_jax

    model = glm_jax.from_pretrained("folder")
    tokenizer = glm_jax.load_tokenizer("folder")
    print(glm_jax.generate(model, "这家酒店", tokenizer=tokenizer, max_new_tokens=20))

Nothing heavy is imported before one of these names is used.
"""

from typing import TYPE_CHECKING, Any

from glm_jax.errors import UserError

if TYPE_CHECKING:
    from glm_jax.api import forward, from_pretrained, generate, load_tokenizer, save_pretrained

__all__ = ["UserError", "forward", "from_pretrained", "generate", "load_tokenizer",
           "save_pretrained"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from glm_jax import api
        return getattr(api, name)
    raise AttributeError(f"module 'glm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
