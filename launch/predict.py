"""Classifies texts: from arguments, a file, or standard input (one a line).

    python launch/predict.py --model=runs/sentiment 房间很干净，下次还会来
    python launch/predict.py --model=runs/sentiment/adapter --file=texts.txt --jsonl

A .csv, .tsv, .jsonl or .parquet file is read by its column (--text); any other by its lines.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from glm_jax.parallel import processes
from launch import door

door.flags_of_mesh()
MODEL = flags.DEFINE_string("model", None, "a run folder, an adapter or a model", required=True)
FILE = flags.DEFINE_string("file", "", "a file of texts")
TEXT = flags.DEFINE_string("text", None, "column of the texts in --file; the run's own by default")
JSONL = flags.DEFINE_bool("jsonl", False, "one JSON object a line: text, label, probabilities")


def main() -> None:
    with door.joined():
        texts = processes.shared("texts", given)
        with door.on_mesh(MODEL.value) as mesh:
            answer(texts, mesh)


def given() -> list[str]:
    """The texts of the arguments, or of standard input."""
    from glm_jax.data.records import check_texts, split_texts
    from glm_jax.errors import UserError

    texts = door.arguments()
    check_texts(texts, "argument {}")
    if not texts and not FILE.value:
        texts = split_texts(door.read_stdin(), "standard input")
    if not texts and not FILE.value:
        raise UserError("no text: give one as an argument, --file, or standard input")
    return texts


def answer(texts: list[str], mesh: Any) -> None:
    from glm_jax.data.records import read_texts
    from glm_jax.train.load import classifier, load_trained

    trained = load_trained(MODEL.value, mesh)
    texts += processes.shared("texts of the file", lambda: read_texts(
        FILE.value, door.column(TEXT.value, trained, "text")) if FILE.value else [])
    task, run = classifier(trained, mesh)
    for text, p in zip(texts, task.probabilities(run, texts), strict=True):
        label = trained.labels[p.argmax()]
        by_label = {name: float(x) for name, x in zip(trained.labels, p, strict=True)}
        if JSONL.value:
            print(json.dumps({"text": text, "label": label, "probabilities": by_label},
                             ensure_ascii=False))
        else:
            shares = "  ".join(f"{name} {x:.3f}" for name, x in by_label.items())
            line = text.replace("\r", r"\r").replace("\n", r"\n")  # a text may hold several
            print(f"{label}\t{shares}\t{line}")


if __name__ == "__main__":
    door.run(main, arguments=True)
