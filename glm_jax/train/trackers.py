"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal."""

import datetime
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from glm_jax.errors import UserError
from glm_jax.files import finite, write_text_atomic

Values = Mapping[str, float]


class Sink(Protocol):
    """One place that rows go to."""

    def log(self, step: int, values: Values) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """Hands every row to all its sinks. `values` are Python numbers: nothing waits for a device."""

    def __init__(self, *sinks: Sink):
        self.sinks = sinks

    def log(self, step: int, values: Values) -> None:
        for sink in self.sinks:
            sink.log(step, values)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def open_tracker(folder: Path, total_steps: int, restored_step: int | None = None, *,
                 config: Mapping[str, Any] | None = None, tensorboard: bool = True,
                 wandb_project: str = "", about: str = "") -> Tracker:
    """The tracker of the run in `folder`; on a process other than 0, one that does nothing.

    Rows after `restored_step` are dropped, all of them when it is None (a run from the start).
    `about` is what the terminal shows first.
    Raises UserError if `wandb_project` is set and wandb isn't installed.
    """
    if jax.process_index() != 0:
        return Tracker()
    folder.mkdir(parents=True, exist_ok=True)
    cut(folder / "metrics.jsonl", restored_step)
    sinks: list[Sink] = [Jsonl(folder / "metrics.jsonl")]
    if tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", restored_step))
    if wandb_project:
        sinks.append(WeightsAndBiases(folder, wandb_project, config or {}))
    sinks.append(Terminal(total_steps, restored_step or 0, about=about))
    return Tracker(*sinks)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a line torn by a crash is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def cut(path: Path, step: int | None) -> None:
    """Drops, in one move, the rows after `step` (None: every row) and a torn last line."""
    if path.exists():
        kept = [r for r in read_rows(path) if step is not None and r["step"] <= step]
        write_text_atomic(path, "".join(_line(row) for row in kept))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(dict(row)), ensure_ascii=False, allow_nan=False) + "\n"


class Jsonl:
    """One JSON object a row: `step`, then the values unrounded; NaN and infinity become null."""

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def log(self, step: int, values: Values) -> None:
        self._file.write(_line({"step": step, **values}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard scalars; an earlier run's events after `restored_step` are hidden."""

    def __init__(self, folder: Path, restored_step: int | None):
        # tensorboardX imports torch for its types if it can: two seconds and a lot of memory.
        hidden = "torch" not in sys.modules
        if hidden:
            sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            from tensorboardX import SummaryWriter
        finally:
            if hidden:
                del sys.modules["torch"]
        purge = 0 if restored_step is None else restored_step + 1
        # The suffix: names of the same second would be the same, and the later run's file win.
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=5,
                                     filename_suffix=f".{purge}")

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if math.isfinite(value):  # it warns of any other
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def import_wandb() -> Any:
    """The package wandb. Raises UserError if it isn't installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("logging to Weights & Biases needs its package: `pip install wandb`, or "
                        "leave the project empty in the config") from error
    return wandb


class WeightsAndBiases:
    """Weights & Biases. A resumed run goes on under the id that lies in its folder."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]):
        path = folder / "wandb_id"
        if not path.exists():
            write_text_atomic(path, uuid.uuid4().hex[:12])
        self._run = import_wandb().init(
            project=project, name=folder.name, id=path.read_text(encoding="utf-8").strip(),
            resume="allow", dir=str(folder), config=dict(config))

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Terminal:
    """A progress bar; where nobody watches (a pipe, a file), one plain line a row instead.

    A row with `eval/` values is a line of its own in both.
    """

    def __init__(self, total_steps: int, first_step: int, console: Console | None = None, *,
                 about: str):
        self._console = console or Console(soft_wrap=True)
        self._total, self._first, self._start = total_steps, first_step, 0.0
        self._bar: Progress | None = None
        self._print(about)
        if first_step:
            self._print(f"going on from step {first_step} of {total_steps}")
        if self._console.is_terminal and os.environ.get("TERM") != "dumb":
            self._bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(None),
                TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(),
                console=self._console, expand=True)
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, numbers="")
            self._bar.start()

    def log(self, step: int, values: Values) -> None:
        evals = {name: value for name, value in values.items() if name.startswith("eval/")}
        if evals:
            self._print(f"step {step}  " + "  ".join(f"{n} {v:.4f}" for n, v in evals.items()))
        if "train/loss" not in values:
            return
        numbers = (f"loss {values['train/loss']:.4f}  "
                   f"{values['train/tokens_per_second']:,.0f} tokens/s")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            if self._start:  # the first steps compile, and say nothing of the others
                each = (time.monotonic() - self._start) / max(step - self._first, 1)
                left = datetime.timedelta(seconds=round(each * max(self._total - step, 0)))
                numbers += f"  {left} left"
            else:
                self._start, self._first = time.monotonic(), step
            self._print(f"step {step}/{self._total}  {numbers}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)
