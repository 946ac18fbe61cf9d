"""Whether a written folder is what it should be: its parameters, and what PyTorch computes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glm_jax.convert.hf import open_folder, stored
from glm_jax.errors import UserError

CLASSES = {"lm": "AutoModelForCausalLM", "sequence": "AutoModelForSequenceClassification",
           "token": "AutoModelForTokenClassification", "mlm": "AutoModelForMaskedLM",
           "qa": "AutoModelForQuestionAnswering", "base": "AutoModel"}


def different(folder: Path, out: Path) -> str:
    """The first parameter that two folders of one model differ in; "" where none does.

    Compared bit by bit in the dtype of `out`, a layer at a time; nothing is held.
    """
    ours, theirs = stored(open_folder(folder)), stored(open_folder(out))
    if lacking := sorted(ours.keys() ^ theirs.keys()):
        return lacking[0]
    for path, one in ours.items():
        for place in np.ndindex(*one.shape[:one.stacked]):
            two = np.ascontiguousarray(theirs[path].at(place))
            wanted = np.ascontiguousarray(one.at(place).astype(two.dtype))
            if not np.array_equal(wanted.view(np.uint8), two.view(np.uint8)):
                return ".".join(map(str, (path, *place)))
    return ""


def torch_has(name: str) -> bool:
    """Whether transformers has a class of its own, with no remote code."""
    import transformers
    return hasattr(transformers, name)


def want_torch(with_peft: bool = False) -> None:
    """Raises a UserError where what `--verify` compares with is not installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
        if with_peft:
            import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"--verify compares with PyTorch, but {error.name} is not installed: "
                        "pip install -r requirements-dev.lock") from None


def torch_logits(folder: Path, head: str, rows: Sequence[np.ndarray], adapter: Path | None = None,
                 num_labels: int = 2) -> list[np.ndarray]:
    """What PyTorch computes of each row, in float32.

    Args:
      folder: a Hugging Face folder; under an adapter, the base.
      rows: token ids of one text each.
      adapter: a PEFT folder on top of it.
      num_labels: of a classification head that the base does not have.

    Returns:
      logits `[tokens, classes or vocabulary]` of each row, `[1, classes]` of a text's classes;
      start and end `[tokens, 2]` of an answer; hidden states `[tokens, hidden]` without a head.
    """
    import torch
    import transformers
    kind = getattr(transformers, CLASSES[head])
    fields = {} if head == "lm" or adapter is None else {"num_labels": num_labels}
    model = kind.from_pretrained(folder, dtype=torch.float32, **fields)
    if adapter is not None:
        import peft
        model = peft.PeftModel.from_pretrained(model, adapter)
    model.eval()
    out = []
    with torch.no_grad():
        for row in rows:
            found = model(torch.tensor(np.asarray(row, np.int64))[None])
            if head == "qa":
                logits = torch.stack((found.start_logits, found.end_logits), dim=-1)
            else:
                logits = found.last_hidden_state if head == "base" else found.logits
            out.append(logits.reshape(-1, logits.shape[-1]).numpy())
    return out
