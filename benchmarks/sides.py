"""The sides of throughput.py and packing.py: LoRA by glm-jax and by Transformers + PEFT alike.

LoRA on every linear layer, AdamW, clipped, float32. A side is built from a folder and a head:
"sequence", a review's class of two, or "lm", every next token. `feed` turns token rows into its
batch, `step` trains on it and returns the loss, finished. As a program it runs one side alone in a
fresh process and prints what it measured, as JSON (see `alone`).
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
RANK, ALPHA, LEARNING_RATE = 8, 16, 1e-3


class Ours:
    """glm-jax, through the trainer's own step."""

    def __init__(self, folder: str, head: str = "sequence", threads: int = 0):
        from ml_collections import ConfigDict

        from configs import common
        from glm_jax.convert.released import read_json
        from glm_jax.data.tokenizer import load_tokenizer
        from glm_jax.parallel.mesh import make_mesh
        from glm_jax.train.setup import make_parts, make_training

        self.head, self.pad_id = head, int(read_json(Path(folder) / "config.json")["pad_token_id"])
        config: ConfigDict = common.get_config()
        config.model.path = folder
        config.adapter.update(r=RANK, alpha=ALPHA, targets=TARGETS)
        config.trainable = ("adapter", "score") if head == "sequence" else ("adapter",)
        self.mesh = make_mesh()
        labels = ["0", "1"] if head == "sequence" else []
        parts = make_parts(config, head, labels, self.mesh, load_tokenizer(folder))
        self.frozen = parts.frozen
        self.state, self.function = make_training(config, parts, self.loss,
                                                  lambda step: LEARNING_RATE, self.mesh)

    def loss(self, model: Any, batch: Any, key: Any) -> Any:
        from glm_jax.nn.loss import classification_loss, cross_entropy
        if self.head == "sequence":
            return classification_loss(model.classify(batch, key), batch.labels,
                                       batch.label_weights)
        return cross_entropy(model(batch, key=key)[0], model.vocabulary_kernel(), batch.targets,
                             batch.weights)

    def feed(self, rows: list[np.ndarray], labels: list[int], length: int) -> Any:
        """One example a row, padded to `length`."""
        from glm_jax.data.packing import Shape, assemble
        return assemble([[self.piece(row, label)] for row, label in zip(rows, labels, strict=True)],
                        Shape(len(rows), length, 1), self.pad_id)

    def piece(self, row: np.ndarray, label: int) -> Any:
        from glm_jax.data.packing import Piece
        if self.head == "sequence":
            return Piece(row, label=label)
        weights = np.ones(len(row), np.float32)
        weights[-1] = 0
        return Piece(row, np.append(row[1:], 0).astype(np.int32), weights)

    def dispatch(self, batch: Any) -> Any:
        """Starts a step and returns its metrics, which may not be there yet."""
        import jax

        from glm_jax.parallel.mesh import put
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.function(self.state, self.frozen, put(batch, self.mesh))
        return metrics

    def step(self, batch: Any) -> float:
        return float(self.dispatch(batch)["loss"])


class Theirs:
    """Transformers + PEFT, in the plain loop that the Trainer runs."""

    def __init__(self, folder: str, head: str = "sequence", threads: int = 0,
                 compiled: bool = False):
        import torch
        import transformers
        from peft import LoraConfig, get_peft_model
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.torch, self.head = torch, head
        how = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        if head == "sequence":
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=2, **how)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
            model.config.use_cache = False
        self.pad_id = model.config.pad_token_id
        model = get_peft_model(model, LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS),
            modules_to_save=["score"] if head == "sequence" else None,
            task_type="SEQ_CLS" if head == "sequence" else "CAUSAL_LM"))
        model.train()
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE,
                                           weight_decay=0.01, fused=True)
        self.model = torch.compile(model, dynamic=True) if compiled else model

    def feed(self, rows: list[np.ndarray], labels: list[int], length: int = 0) -> Any:
        """One example a row, padded to `length`, or to the longest as the Trainer's collator."""
        torch = self.torch
        length = length or max(map(len, rows))
        tokens = np.full((len(rows), length), self.pad_id, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for r, row in enumerate(rows):
            tokens[r, :len(row)], mask[r, :len(row)] = row, 1
        target = np.where(mask, tokens, -100) if self.head == "lm" else np.array(labels)
        return {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask),
                "labels": torch.from_numpy(target)}

    def step(self, *parts: Any) -> float:
        """A step over micro-batches: the loss is the mean over all that they learn, as ours is."""
        first = int(self.head == "lm")  # the first token of a row is no target
        learned = [int((part["labels"][..., first:] >= 0).sum()) for part in parts]
        total = 0.0
        for part, count in zip(parts, learned, strict=True):
            loss = self.model(**part).loss * (count / sum(learned))
            loss.backward()
            total += float(loss.detach())
        self.torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def resident() -> float:
    """The most memory that this program has held so far, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss begins with the parent's
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def since_start() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def alone(side: str, folder: str, data: str, head: str, steps: int, threads: int) -> dict[str, Any]:
    """One side in this process: seconds to the first step, peak memory, dispatch time.

    Args:
      data: an .npz with `tokens [batches, rows, length]` (full rows) and `labels [batches, rows]`.
    """
    if side == "ours":
        import jax

        import glm_jax.train.loop  # noqa: F401  what the real trainer imports too
        jax.devices()
    else:
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers
        _ = transformers.AutoModelForCausalLM, transformers.GlmForSequenceClassification
    imported = resident()
    arrays = np.load(data)
    count, _, length = arrays["tokens"].shape
    runner: Any = (Ours if side == "ours" else Theirs)(folder, head, threads)
    batches = [runner.feed(list(arrays["tokens"][n].astype(np.int32)), list(arrays["labels"][n]),
                           length) for n in range(count)]
    losses = [runner.step(batches[0])]
    first = since_start()
    dispatch = []
    for n in range(1, steps):
        started = time.perf_counter()
        if side == "ours":
            metrics = runner.dispatch(batches[n % count])
            dispatch.append(time.perf_counter() - started)
            losses.append(float(metrics["loss"]))
        else:
            losses.append(runner.step(batches[n % count]))
    return {"first_step_s": first, "imports_mib": imported, "peak_mib": resident(),
            "losses": losses,
            "dispatch_ms": 1000 * statistics.median(dispatch) if dispatch else None}


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs one side of throughput.py alone.")
    parser.add_argument("side", choices=("ours", "theirs"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--head", default="sequence", choices=("sequence", "lm"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    result = alone(args.side, args.model, args.data, args.head, args.steps, args.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    from glm_jax.parallel.host import use_huge_pages
    use_huge_pages()
    main()
