"""The public face: load, run, generate with and save a model. `glm_jax` hands these out."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from glm_jax.adapters.lora import merged
from glm_jax.adapters.peft import inspect_adapter, load_adapter
from glm_jax.adapters.targets import linears
from glm_jax.convert.hf import load_model, save_model
from glm_jax.convert.renamed import renamed
from glm_jax.data.tokenizer import Tokenizer, load_tokenizer
from glm_jax.errors import UserError
from glm_jax.infer.generate import Room, check_tokens, left_padded
from glm_jax.infer.text import SETTINGS, ids_of, run
from glm_jax.models import architecture_of, as_batch
from glm_jax.nn.batch import Array, Batch
from glm_jax.parallel.mesh import make_mesh, use_mesh_of

__all__ = ["forward", "from_pretrained", "generate", "load_tokenizer", "save_pretrained"]

DTYPES = ("float32", "bfloat16", "float16")


def _want(name: str, value: Any, kinds: Any, wanted: str) -> None:
    """Raises a UserError unless an argument is of one of these kinds; a bool is no number."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{name} must be {wanted}, not {repr(value)[:60]}")


def _want_seed(seed: Any) -> None:
    wanted = f"a whole number from 0 to {2**32 - 1}"
    _want("seed", seed, int | np.integer, wanted)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be {wanted}, not {seed}")


def _want_model(model: Any) -> None:
    _want("model", model, nnx.Module, "what from_pretrained gives")


def from_pretrained(folder: str | Path, *, dtype: Any = "float32",
                    mesh: Mesh | Mapping[str, int] | None = None,
                    adapter: str | Path | None = None, **overrides: Any) -> Any:
    """The model of a Hugging Face folder, with the head that its `config.json` names.

    Args:
      dtype: `float32`, `bfloat16` or `float16`; what parameters are kept and computed in.
      mesh: a mesh, or its sizes (`{"fsdp": 4, "tensor": 2}`); one device by default.
      adapter: a PEFT folder, or a run's, to put on top.
      overrides: config fields that replace the file's (`rope_theta=5e6`), or `head`.

    Raises:
      UserError: for a folder that is missing, damaged or of a family not supported, another
        dtype, an unknown argument, or more devices than there are.
    """
    _want("folder", folder, str | Path, "a path")
    _want("mesh", mesh, Mesh | Mapping | None, "a mesh or its sizes by axis")
    where = mesh if isinstance(mesh, Mesh | None) else make_mesh(mesh)
    _want_seed(overrides.get("seed", 0))
    if adapter is not None:
        _want("adapter", adapter, str | Path, "a path")
        overrides = inspect_adapter(adapter).base_fields | overrides
    model = load_model(folder, dtype=_dtype(dtype), mesh=where, **overrides)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def _dtype(dtype: Any) -> Any:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return found


def forward(model: Any, tokens: Array, attention_mask: Array | None = None) -> jax.Array:
    """Logits, float32, as the Hugging Face class of this head computes them.

    Args:
      tokens: `[batch, length]` int.
      attention_mask: `[batch, length]`, 1 for real tokens; all are when left out.

    Returns:
      `[batch, length, vocabulary]` of a language model, `[batch, length, labels]` of a token
      classifier, `[batch, labels]` of a sequence classifier: those at the rightmost token that
      is not the padding token, ChatGLM's at the last position that `attention_mask` does not hide,
      BERT's at the first. Hidden states of a model without a head.

    Raises:
      UserError: for rows without tokens, ids outside the vocabulary, or too many tokens.
    """
    _want_model(model)
    rows, mask = check_tokens(model.config, tokens, attention_mask)
    graphdef, state = nnx.split(model)
    with use_mesh_of(state):
        logits = _forward(graphdef, state, as_batch(model.config, rows, mask))
    if model.head != "sequence":
        return logits
    if architecture_of(model.config.to_dict()).pool == "first":
        return logits[np.arange(len(rows)), np.argmax(mask, axis=1)]
    if getattr(model.config, "pools_last", False):
        last = np.max(np.arange(rows.shape[1]) * mask, axis=1)
        return logits[np.arange(len(rows)), last]
    pad = model.config.pad_token_id
    if pad is None and len(rows) > 1:
        raise UserError("the config has no pad_token_id, which tells where each row ends: "
                        "give one row at a time, or from_pretrained(…, pad_token_id=…)")
    last = np.max(np.arange(rows.shape[1]) * (rows != pad), axis=1)
    return logits[np.arange(len(rows)), last]


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, state: Any, batch: Batch) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return model.logits(model(batch)[0])


def generate(model: Any, prompt: str | Sequence[Any] | Array,
             attention_mask: Array | None = None, *, tokenizer: Tokenizer | None = None,
             max_new_tokens: int = 128, eos_token_id: int | Sequence[int] | None = None,
             seed: int = 0, **how: Any) -> Any:
    """Continues a prompt, greedily unless a temperature is given.

    Args:
      prompt: a text, several texts (both need `tokenizer`), lists of token ids, or tokens
        `[batch, length]`.
      attention_mask: with tokens: 1 for real ones, which may stand on either side.
      eos_token_id: where to stop; the config's by default, `()` for nowhere.
      how: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`; `num_beams` for beam
        search, with `length_penalty` and `early_stopping` (see `infer.beam`); `cache_dtype` and
        `cache_length` (see `infer.generate.Room`).

    Returns:
      The continuation as a text, a list of texts, or a `Generation` (tokens and lengths).

    Raises:
      UserError: for an unknown or impossible setting, or a model without an LM head.
    """
    known = (*SETTINGS, "cache_dtype", "cache_length")
    if unknown := [name for name in how if name not in known]:
        raise UserError(f"generate: unknown setting {unknown[0]!r}; there are {', '.join(known)}")
    _want_model(model)
    _want("tokenizer", tokenizer, Tokenizer | None, "what load_tokenizer gives")
    _want_seed(seed)
    cache_dtype = how.pop("cache_dtype", None)
    room = Room(None if cache_dtype is None else _dtype(cache_dtype), how.pop("cache_length", None))
    _want("cache_length", room.length, int | None, "a whole number")
    _want("prompt", prompt, str | Sequence | Array, "a text, several, or token ids")
    texts: Any = [prompt] if isinstance(prompt, str) else prompt
    is_text = (not isinstance(texts, Array) and len(texts) > 0
               and all(isinstance(text, str) for text in texts))
    tokens: Any = prompt
    if is_text:
        if tokenizer is None:
            raise UserError("generate: a text needs the tokenizer: generate(model, text, "
                            "tokenizer=glm_jax.load_tokenizer(folder))")
        tokens, attention_mask = left_padded(tokenizer.encode_batch(texts))
    elif not isinstance(prompt, Array) and attention_mask is None:
        for row in texts:
            _want("each row of prompt", row, Sequence | Array, "a list of token ids")
            for number in row:
                _want("a token id", number, int | np.integer, "a whole number")
        tokens, attention_mask = left_padded(texts)
    ids = model.config.extra.get("eos_token_id") if eos_token_id is None else eos_token_id
    out, _ = run(model, tokens, attention_mask, how, seed, max_new_tokens=max_new_tokens,
                 stop_ids=ids_of(ids), pad_id=model.config.pad_token_id or 0, room=room)
    if not is_text or tokenizer is None:
        return out
    found = [tokenizer.decode(row[:length].tolist())
             for row, length in zip(out.tokens, out.lengths, strict=True)]
    return found[0] if isinstance(prompt, str) else found


def save_pretrained(model: Any, folder: str | Path, tokenizer: Tokenizer | None = None, *,
                    architecture: str | None = None) -> None:
    """Writes a Hugging Face folder that transformers loads; whole or not at all.

    An adapter is merged into the weights that are written, not into `model`.

    Args:
      folder: a checkpoint that is there already is replaced, but for its README.md.
      architecture: `glm` writes a ChatGLM2, ChatGLM3 or GLM-4 in Hugging Face's naming,
        `chatglm` the other way; its own by default.

    Raises:
      UserError: when the folder can't be written, or holds something else, or the model is none
        of that architecture.
    """
    _want_model(model)
    _want("folder", folder, str | Path, "a path")
    _want("tokenizer", tokenizer, Tokenizer | None, "what load_tokenizer gives")
    if any(hasattr(layer, "adapter") for layer in linears(model).values()):
        model = merged(model)
    files = dict(tokenizer.files) if tokenizer is not None else {}
    if architecture is not None:
        model = renamed(model, architecture)
        files |= tokenizer.fast_files() if tokenizer is not None else {}
    save_model(model, folder, files=files)
