"""Checkpoints of a run, with checksums: the one file that knows Orbax.

    checkpoints/200/               Orbax: arrays by their dotted paths, scalars, the data's position
    checkpoints/200.sha256.json    written last: the SHA-256 of every file; is it the best?

A step without its `.sha256.json` is half-written and never trusted.
"""

import copy
import errno
import json
import logging
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from glm_jax.errors import UserError
from glm_jax.files import sha256, write_json_atomic
from glm_jax.parallel.processes import all_raise

# What the loop counts and saves beside the arrays.
COUNTERS: dict[str, Any] = {"best": 0.0, "best_step": 0, "stale": 0, "seconds": 0.0}
KEPT = 2  # of the last steps; of one alone a damaged step would leave none
_SUMS = ".sha256.json"
# What may lie in the folder because of us: `200`, `200.sha256.json`, `200.orbax-checkpoint-tmp`.
_OURS = re.compile(r"(\d+)(\..*)?")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}

_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves, verifies, keeps and restores the steps of one run.

    Kept are the last `KEPT` steps, and for each of them the best step so far, so that falling back
    to an older step finds its own best.
    Every process calls every method; process 0 hashes and deletes.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._damaged: set[int] = set()
        # Orbax prints a traceback for each of its threads that fails; the error is raised here too.
        logging.getLogger("absl").addFilter(_not_from_orbax_threads)

    def save(self, step: int, state: Any, data_iterator: Any = None, *, best: bool = False) -> None:
        """Starts to save `state` and returns; writing goes on while the next steps run.

        `state` is a pytree of jax arrays and Python numbers, strings and booleans. Its arrays may
        be donated as soon as this returns: Orbax holds a copy, or on CPU a reference that makes
        JAX decline the donation once. `data_iterator` is Grain's. `best` marks the step as the best
        so far. What went wrong with the save before this one is raised here, as in `wait`.
        """
        self.wait()
        named = dict(_named(state))
        arrays = {name: leaf for name, leaf in named.items() if isinstance(leaf, jax.Array)}
        scalars = {name: leaf for name, leaf in named.items() if name not in arrays}
        # A copy: Orbax writes it later, and Grain gives out the object that it goes on with.
        position = None if data_iterator is None else copy.deepcopy(data_iterator.get_state())
        try:
            self._clean(also=step)
            self.folder.mkdir(parents=True, exist_ok=True)
            # Not Grain's own handler: its file is named after the process, so a run could not go
            # on with another number of them. Each has the same position, so one is enough.
            response = ocp.save_checkpointables_async(
                self.folder / str(step), {"state": arrays},
                custom_metadata={"scalars": scalars, "data": position})
        except Exception as error:
            raise self._explained(step, error) from error
        self._pending = step, self._writer.submit(self._finish, step, response, best)

    def wait(self) -> None:
        """Returns when nothing is being written; raises what went wrong.

        A full disk is a UserError with the folder and its free space; older steps stay whole.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            raise self._explained(step, error) from error

    def close(self) -> None:
        """Waits for the last save and ends the writing thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def steps(self) -> list[int]:
        """The steps that are whole, oldest first."""
        found = (_OURS.fullmatch(path.name) for path in self.folder.glob(f"*{_SUMS}"))
        steps = {int(match[1]) for match in found if match and match[2] == _SUMS}
        return sorted(s for s in steps - self._damaged if (self.folder / str(s)).is_dir())

    def restore(self, abstract_state: Any, data_iterator: Any = None,
                step: int | Literal["best"] | None = None) -> tuple[int, Any] | None:
        """Loads a step into the shape of `abstract_state`; None when nothing was ever saved.

        The array leaves of `abstract_state` have shape, dtype and sharding (`jax.ShapeDtypeStruct`,
        or arrays): the mesh may differ from the one that saved. Its other leaves are placeholders.
        `data_iterator` is set to the saved position. Every file is checked first: without `step`, a
        damaged one is skipped with a warning for the step before; "best" is the newest best that is
        whole, the last whole step where none is.

        Raises UserError if no step is whole, if the asked one is damaged or absent, or if the tree,
        a shape or a dtype differs from what was saved (the parameter is named).
        """
        self.wait()
        chosen = _from_process_0(lambda: self._choose(step))
        if chosen < 0:
            return None
        path = self.folder / str(chosen)
        saved = self._metadata(chosen)
        scalars, position = saved.custom_metadata["scalars"], saved.custom_metadata["data"]
        if step == "best" and (best := scalars.get("host.best_step")) not in (None, 0, chosen):
            _log.warning("%s: its best step, %s, is not whole: step %d stands in", self.folder,
                         best, chosen)
        _check_same(path, {**saved.metadata, **scalars}, dict(_named(abstract_state)))
        wanted = {n: _abstract(x) for n, x in _named(abstract_state) if hasattr(x, "shape")}
        arrays = ocp.load(path, wanted, checkpointable_name="state")
        if data_iterator is not None:
            try:
                data_iterator.set_state(position)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}: the data can't go on from position {position} ({error}); it differs "
                    "from what the run started with: restore that data, or take a new --workdir"
                    ) from error
        leaves = [arrays[n] if n in arrays else scalars[n] for n, _ in _named(abstract_state)]
        return chosen, jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

    def whole_best(self) -> tuple[int, dict[str, Any]]:
        """The newest whole best step, -1 for none, and its scalars; warns of damaged ones."""
        step = _from_process_0(lambda: self._whole(self._bests()))
        return step, self._metadata(step).custom_metadata["scalars"] if step >= 0 else {}

    def _metadata(self, step: int) -> Any:
        return ocp.metadata(self.folder / str(step), "state")

    def _sums(self, step: int) -> Path:
        return self.folder / f"{step}{_SUMS}"

    def _read_sums(self, step: int) -> dict[str, Any] | None:
        try:
            sums = json.loads(self._sums(step).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return sums if isinstance(sums, dict) and isinstance(sums.get("files"), dict) else None

    def _bests(self) -> list[int]:
        return [step for step in self.steps() if (self._read_sums(step) or {}).get("best")]

    def _finish(self, step: int, response: Any, best: bool) -> None:
        """In the writing thread: hashes the files that Orbax wrote, then drops older steps."""
        response.result()
        if jax.process_index() == 0:
            path = self.folder / str(step)
            files = {str(f.relative_to(path)): sha256(f) for f in path.rglob("*") if f.is_file()}
            write_json_atomic(self._sums(step), {"best": best, "files": files})
            self._damaged.discard(step)
            self._prune(step)

    def _prune(self, newest: int) -> None:
        steps = [step for step in self.steps() if step <= newest]  # later ones: an abandoned past
        keep, bests = set(steps[-KEPT:]), self._bests()
        keep |= {max((best for best in bests if best <= step), default=step) for step in keep}
        for step in self.steps():
            if step not in keep:
                self._drop(step)

    def _drop(self, step: int) -> None:
        self._sums(step).unlink(missing_ok=True)  # first: from here on the step isn't trusted
        shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def _clean(self, also: int | None = None) -> None:
        """Deletes what an interrupted save left, damaged steps, and the step `also`."""
        if jax.process_index() != 0 or not self.folder.is_dir():
            return
        whole = set(self.steps()) - {also}
        for path in self.folder.iterdir():
            match = _OURS.fullmatch(path.name)
            if match and not (int(match[1]) in whole and match[2] in (None, _SUMS)):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _choose(self, wanted: int | Literal["best"] | None) -> int:
        """The step to restore, checked; -1 for none. Raises UserError."""
        steps = self.steps()
        if isinstance(wanted, int):
            if wanted not in steps:
                has = f"it has {', '.join(map(str, steps)) or 'none'}"
                raise UserError(f"{self.folder} has no checkpoint '{wanted}': {has}")
            if fault := self._fault(wanted):
                raise UserError(f"{fault}; delete {self.folder / str(wanted)} and run again")
            return wanted
        step = self._whole(self._bests()) if wanted == "best" else -1
        if step < 0 and (step := self._whole(self.steps())) < 0 and steps:
            raise UserError(f"no checkpoint in {self.folder} is whole ({self._fault(steps[0])}); "
                            "delete that folder to start again, or put back a copy of it")
        return step

    def _whole(self, steps: list[int]) -> int:
        """The last of these steps that is whole, -1 for none; warns of each that is not."""
        for step in reversed(steps):
            fault = self._fault(step)
            if fault is None:
                return step
            self._damaged.add(step)
            _log.warning("%s: checkpoint %d is not used, looking for the one before", fault, step)
        return -1

    def _fault(self, step: int) -> str | None:
        """What is wrong with the files of a step, or None."""
        sums = self._read_sums(step)
        if sums is None:
            return f"{self._sums(step)} is damaged"
        for name, digest in sorted(sums["files"].items()):
            path = self.folder / str(step) / name
            if not path.is_file():
                return f"{path} is missing"
            if sha256(path) != digest:
                return f"{path} has changed since it was written"
        return None

    def _explained(self, step: int, error: BaseException) -> Exception:
        """The error to raise for a save that failed; frees what the save had written."""
        self._clean()
        causes = _causes(error)
        found = (re.search(r"os_error_code='(\d+)'", str(cause)) for cause in causes)
        codes = {int(match[1]) for match in found if match}  # TensorStore's way to say it
        codes |= {cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno}
        where = f"checkpoint {step} could not be written to {self.folder}"
        if codes & _DISK_FULL:
            free = shutil.disk_usage(self.folder).free / 2**20
            return UserError(f"{where}: no space left on the device, {free:.0f} MiB are free. The "
                             "checkpoints before it are whole: free some space and run the same "
                             "command again")
        return (UserError if codes else RuntimeError)(f"{where}: {causes[-1]}")


def _not_from_orbax_threads(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what led to it; the last is the root, which Orbax hides."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [error, *_causes(cause)] if cause else [error]


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their dotted paths, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding Orbax asks for the saved one, which another number of devices can't give.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_same(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError naming what differs: Orbax would cast a dtype without a word."""

    def kind(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" if hasattr(leaf, "shape") else "a scalar"

    faults = [f"'{name}' is not in the checkpoint" for name in wanted if name not in saved]
    faults += [f"'{name}' is only in the checkpoint" for name in saved if name not in wanted]
    for name in wanted.keys() & saved.keys():
        was, now = kind(saved[name]), kind(wanted[name])
        if was != now:
            faults.append(f"'{name}' is {was} in the checkpoint and {now} here")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise UserError(
            f"{path} was made by a different run: {'; '.join(sorted(faults)[:3])}{more}. Use the "
            "config that the run was started with, or a new --workdir")


def _from_process_0(choose: Callable[[], int]) -> int:
    """What process 0 answers, on every process; its UserError is an error on every process."""
    answer = -1
    with all_raise("process 0 can't restore that checkpoint: see its message"):
        if jax.process_index() == 0:
            answer = choose()
    return int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
