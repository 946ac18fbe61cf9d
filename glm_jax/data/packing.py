"""From examples to batches: what goes into which row, decided ahead, so that a position is enough.

Every batch is a function of (seed, step): the order of the data depends neither on the mesh nor
on the number of processes, and a Grain iterator resumes at once by its position.
"""

import bisect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from glm_jax.errors import UserError
from glm_jax.models import architecture_of
from glm_jax.nn.batch import Batch

WINDOW = 4096  # examples that are packed together: more fill rows better, fewer mix better


class Piece(NamedTuple):
    """One example as arrays: what a task makes of a record.

    Attributes:
      tokens: `[length]` int32.
      targets, weights: `[length]`, what each position predicts and how much it counts.
      label, label_weight: the class of the whole example.
      vector: `[features]` float32, what its pooled hidden state should point along, if anything.
      positions, order: `[streams, length]` and `[length]` int32 (see `Batch`); what the shape says
        where they are left out.
    """

    tokens: np.ndarray
    targets: np.ndarray | None = None
    weights: np.ndarray | None = None
    label: int = 0
    label_weight: float = 1.0
    vector: np.ndarray | None = None
    positions: np.ndarray | None = None
    order: np.ndarray | None = None


class Source(Protocol):
    """Examples by number; an epoch may see another rendering of the same example."""

    def lengths(self, epoch: int) -> np.ndarray: ...
    def piece(self, index: int, epoch: int) -> Piece: ...


class Shape(NamedTuple):
    """The static shape of a batch: rows, their length, and how many examples a row may hold.

    Attributes:
      lay: gives tokens `[1, length]` of an example their positions and order; causal when None.
      pool: which token of an example stands for it, `last` or `first`.
      features: of the examples' vectors; 0: they have none.
      own: the rows that this process fills, of several; None: all.
    """

    rows: int
    length: int
    examples: int
    lay: Callable[[np.ndarray], Batch] | None = None
    pool: str = "last"
    features: int = 0
    own: frozenset[int] | None = None

    @property
    def causal(self) -> int:
        """As of the batches: where the model lays the examples, not these themselves."""
        laid = None if self.lay is None else self.lay(np.zeros((1, 1), np.int32))
        return self.examples if laid is not None and laid.causal else 0

    def place(self, piece: Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, positions and order of a piece, cut to a row."""
        tokens = piece.tokens[:self.length]
        count = np.arange(len(tokens), dtype=np.int32)
        positions, order = piece.positions, piece.order
        if positions is None or order is None:
            laid = None if self.lay is None else self.lay(tokens[None])
            positions, order = ((count[None], count) if laid is None else
                                (np.asarray(laid.positions[0]), np.asarray(laid.order[0])))
        return tokens, positions[:, :len(tokens)], order[:len(tokens)]


def shape_for(config: Any, rows: int, length: int, examples: int) -> Shape:
    """The shape of batches for the model of `config`."""
    row = architecture_of(config.to_dict())
    return Shape(rows, length, examples, lambda tokens: row.batch(config, tokens, None), row.pool)


def best_fit(lengths: np.ndarray, order: np.ndarray, shape: Shape) -> list[list[int]]:
    """Packs examples into rows: the longest first, each into the fullest row that takes it.

    Args:
      lengths: of all examples; those longer than a row count as a row (they are cut).
      order: the examples to pack, by number.

    Returns:
      The examples of each row.
    """
    rows: list[list[int]] = []
    takes: list[tuple[int, int, list[int]]] = []  # rows by space, the last filled first
    for turn, index in enumerate(order[np.argsort(-lengths[order], kind="stable")]):
        need = min(int(lengths[index]), shape.length)
        at = bisect.bisect_left(takes, (need,))
        if at == len(takes):
            rows.append([])
            takes.append((shape.length, 0, rows[-1]))
        space, _, row = takes.pop(at)
        row.append(int(index))
        if len(row) < shape.examples:
            bisect.insort(takes, (space - need, -turn, row))
    return rows


def plan(lengths: np.ndarray, shape: Shape, rng: np.random.Generator | None
         ) -> list[list[list[int]]]:
    """One epoch: the examples of each row of each batch. Without `rng` nothing is shuffled.

    The last batch may have fewer rows; `assemble` leaves the others empty.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    rows = [row for start in range(0, len(order), WINDOW)
            for row in best_fit(lengths, order[start:start + WINDOW], shape)]
    if rng is not None:
        rows = [rows[i] for i in rng.permutation(len(rows))]
    return [rows[i:i + shape.rows] for i in range(0, len(rows), shape.rows)]


def assemble(rows: Sequence[Sequence[Piece]], shape: Shape, pad_id: int) -> Batch:
    """The arrays of one batch; positions begin anew in each example."""
    size = (shape.rows, shape.length)
    placed = [[shape.place(piece) for piece in row] for row in rows]
    streams = next((len(places) for row in placed for _, places, _ in row), 1)
    tokens = np.full(size, pad_id, np.int32)
    positions = np.zeros((shape.rows, streams, shape.length), np.int32)
    segments, targets = (np.zeros(size, np.int32) for _ in range(2))
    order = np.arange(shape.length, dtype=np.int32) + np.zeros_like(segments)
    weights = np.zeros(size, np.float32)
    pool = (shape.rows, shape.examples)
    pool_index, labels = np.zeros(pool, np.int32), np.zeros(pool, np.int32)
    label_weights = np.zeros(pool, np.float32)
    vectors = np.zeros((*pool, shape.features), np.float32)
    per_token = False
    for r, row in enumerate(rows):
        at = 0
        for n, piece in enumerate(row):
            own, places, seen = placed[r][n]
            length = len(own)
            here = slice(at, at + length)
            tokens[r, here], positions[r, :, here], order[r, here] = own, places, at + seen
            segments[r, here] = n + 1
            if piece.targets is not None and piece.weights is not None:
                per_token = True
                targets[r, here] = piece.targets[:length]
                weights[r, here] = piece.weights[:length]
            pool_index[r, n] = at if shape.pool == "first" else at + length - 1
            at += length
            labels[r, n] = piece.label
            label_weights[r, n] = piece.label_weight
            if shape.features:
                label_weights[r, n] = piece.vector is not None
                vectors[r, n] = 0 if piece.vector is None else piece.vector
    learned: dict[str, Any] = {"targets": targets, "weights": weights} if per_token else {}
    if shape.features:
        learned |= {"pool_index": pool_index, "label_weights": label_weights, "vectors": vectors}
    elif not per_token:
        learned = {"pool_index": pool_index, "labels": labels, "label_weights": label_weights}
    return Batch(tokens, positions, segments, order, causal=shape.causal, **learned)


class Batches:
    """Batch number `step` of an endless shuffled stream, for any step (a Grain source)."""

    def __init__(self, source: Source, shape: Shape, pad_id: int, seed: int):
        self.source, self.shape, self.pad_id, self.seed = source, shape, pad_id, seed
        self._lock = threading.Lock()
        self._plans: dict[int, list[list[list[int]]]] = {}
        self._ends: list[int] = []  # the step at which each epoch ends

    def _plan(self, epoch: int) -> list[list[list[int]]]:
        if epoch not in self._plans:
            rng = np.random.default_rng((self.seed, epoch))
            lengths = self.source.lengths(epoch)
            if not len(lengths):
                raise UserError("there is nothing to train on: no text in the training data")
            self._plans[epoch] = plan(lengths, self.shape, rng)
            self._plans.pop(epoch - 2, None)
        return self._plans[epoch]

    def epoch_steps(self, epoch: int) -> int:
        """How many batches an epoch has."""
        with self._lock:
            return len(self._plan(epoch))

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number in the epoch."""
        with self._lock:
            while not self._ends or self._ends[-1] <= step:
                steps = len(self._plan(len(self._ends)))
                self._ends.append((self._ends[-1] if self._ends else 0) + steps)
            epoch = int(np.searchsorted(self._ends, step, side="right"))
            return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, step: int) -> Batch:
        epoch, number = self.locate(step)
        with self._lock:
            rows = self._plan(epoch)[number]
        return _read(self.source, rows, epoch, self.shape, self.pad_id)


def stream(batches: Batches) -> Any:
    """A Grain iterator over `batches`, with prefetching threads; its state is a position."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def once(source: Source, shape: Shape, pad_id: int) -> Iterator[tuple[list[list[int]], Batch]]:
    """Every example once, in batches: the examples' numbers by row and place, and the arrays."""
    for rows in plan(source.lengths(0), shape, None):
        yield rows, _read(source, rows, 0, shape, pad_id)


def _read(source: Source, rows: Sequence[Sequence[int]], epoch: int, shape: Shape, pad_id: int
          ) -> Batch:
    """The batch of these examples; rows that are others' stay empty.

    But for the first one, which shows to every process what arrays the batch has.
    """
    own = shape.own if shape.own is None else shape.own | {0}
    return assemble([[source.piece(i, epoch) for i in row] if own is None or r in own else []
                     for r, row in enumerate(rows)], shape, pad_id)
