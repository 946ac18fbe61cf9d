"""Whether PyTorch computes the same: logits of an exported folder, by transformers and peft."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glm_jax.errors import UserError

CLASSES = {"lm": "AutoModelForCausalLM", "sequence": "AutoModelForSequenceClassification",
           "token": "AutoModelForTokenClassification"}


def torch_logits(folder: Path, head: str, rows: Sequence[np.ndarray], adapter: Path | None = None,
                 num_labels: int = 2) -> np.ndarray:
    """Logits `[rows, classes or vocabulary]` at the last token of each row, in float32.

    Args:
      folder: a Hugging Face folder; under an adapter, the base.
      rows: token ids of one text each.
      adapter: a PEFT folder on top of it.
      num_labels: of a classification head that the base does not have.

    Raises:
      UserError: where torch, transformers or peft is not installed.
    """
    try:
        import torch
        import transformers
        if adapter is not None:
            import peft
    except ImportError as error:
        raise UserError(f"--verify compares with PyTorch, but {error.name} is not installed: "
                        "pip install -r requirements-dev.lock") from None
    kind = getattr(transformers, CLASSES[head])
    fields = {} if head == "lm" or adapter is None else {"num_labels": num_labels}
    model = kind.from_pretrained(folder, dtype=torch.float32, **fields)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    model.eval()
    out = []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor(np.asarray(row, np.int64))[None]).logits
            out.append(logits.reshape(-1, logits.shape[-1])[-1].numpy())
    return np.stack(out)
