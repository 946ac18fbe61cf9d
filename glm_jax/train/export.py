"""What a finished run leaves: an adapter in PEFT's format or a Hugging Face model."""

import json
from pathlib import Path
from typing import Any

from glm_jax.adapters.lora import LoRAConfig
from glm_jax.adapters.peft import save_adapter
from glm_jax.convert.hf import save_model
from glm_jax.data.tokenizer import Tokenizer
from glm_jax.models import architecture_of


def export(config: Any, model: Any, lora_config: LoRAConfig | None, tokenizer: Tokenizer,
           workdir: Path) -> str:
    """Writes `adapter/` when an adapter was trained, else `model/`, with the tokenizer.

    Returns the folder's name; "" for an architecture that Hugging Face does not have.
    """
    files = model_files(model, tokenizer, config.batch.length)
    if lora_config is not None:
        save_adapter(model, workdir / "adapter", lora_config, base=config.model.path, files=files)
        return "adapter"
    if not architecture_of(model.config.to_dict()).classes:
        return ""
    save_model(model, workdir / "model", files=files)
    return "model"


def model_files(model: Any, tokenizer: Tokenizer, length: int) -> dict[str, bytes]:
    """What a folder for PyTorch holds besides weights and config.

    Args:
      length: where a classifier's texts are cut: `model_max_length` of the tokenizer's config.
    """
    files = dict(tokenizer.files)
    if model.head == "lm":
        return files | {"generation_config.json": generation_config(model.config)}
    fields = {**tokenizer.config, "model_max_length": length}
    return files | {"tokenizer_config.json":
                    (json.dumps(fields, ensure_ascii=False, indent=2) + "\n").encode()}


def generation_config(config: Any) -> bytes:
    """What `generate` of transformers reads: where a text ends, and what fills a batch."""
    fields = {"eos_token_id": config.extra.get("eos_token_id"), "pad_token_id": config.pad_token_id}
    return (json.dumps(fields, indent=2) + "\n").encode()
