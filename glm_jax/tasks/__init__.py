"""The tasks: each tells how a record becomes arrays, what the loss is and which metrics count."""

from collections.abc import Callable, Mapping, Sized
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from glm_jax.data.packing import Shape, Source, once
from glm_jax.nn.batch import Batch

Run = Callable[[Batch], Any]  # a compiled `predict` on the parameters as they are now


class Evaluation(NamedTuple):
    """What a split gave.

    Attributes:
      metrics: by name.
      report: what the report shows of it (see train/report.py): per class, confusion, rows.
    """

    metrics: dict[str, float]
    report: dict[str, Any]


class Task(Protocol):
    """What the trainer asks of a task.

    Attributes:
      head: of the model.
      labels: the classes by number; none for a language model.
      shape, pad_id: of its batches.
      final: the split that the finished model is measured on.
      metrics: the names of what `evaluate` gives.
    """

    @property
    def head(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def final(self) -> str: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...
    def fingerprint(self) -> str: ...
    def about(self) -> str: ...  # a line on its data, for the terminal
    def source(self, split: str) -> Source: ...
    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> jax.Array: ...
    def predict(self, model: Any, batch: Batch) -> Any: ...
    def evaluate(self, run: Run, split: str) -> Evaluation: ...


def sizes(splits: Mapping[str, Sized]) -> str:
    """`train 1,600, dev 200`"""
    return ", ".join(f"{name} {len(rows):,}" for name, rows in splits.items())


def each(run: Run, source: Source, shape: Shape, pad_id: int) -> np.ndarray:
    """What `run` gives for each example, `[examples, …]`, in the order of `source`.

    The result of `run` is `[batch, examples, …]`, as the batch's `labels` are.
    """
    out: dict[int, np.ndarray] = {}
    for rows, batch in once(source, shape, pad_id):
        result = np.asarray(run(batch))
        for r, row in enumerate(rows):
            out.update((index, result[r, n]) for n, index in enumerate(row))
    return np.stack([out[i] for i in range(len(out))])
