"""Several processes as one job: start-up, one of them that speaks, one end for all.

A process that fails tells the others why, and all end with that line; one that dies is missed. A
program that never joins others is the one process of its job.
"""

import collections
import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from glm_jax.errors import Interrupted, UserError

START_SECONDS = 300  # a process waits so long for all others to come, then ends
READ_SECONDS = 1800  # and so long for them to have read what process 0 has: data, weights
HEARTBEAT_SECONDS = 60  # one that gives no sign of life for so long is dead; --heartbeat
WATCH_SECONDS = 1  # between two looks for the dead; a message of a failure comes at once
TELL_SECONDS = 10  # a process that fails waits so long until all others have read why
LEAVE_SECONDS = 3  # which the others have to end before process 0 does, of a failure
SEE_SECONDS = 60  # what process 0 has written must be seen by the others within this
END_SECONDS = 600  # one that is done waits so long for the others to be
PART = 2**24  # characters that are handed on at a time: more would hold up the signs of life
UNREACHED = "process 0 died: it can't be reached"
GONE = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")  # what calls of process 0 end with then
AGAIN = "start all processes again"

_client: Any = None  # of the coordination service, between joining and parting
_again = AGAIN  # what to do when one has died
_ending = threading.Lock()
_used: collections.Counter[str] = collections.Counter()  # names that all have met by


def _state() -> Any:
    """JAX's own, for which it has no public name: the process's number, its client."""
    from jax._src import distributed
    return distributed.global_state


def speaks() -> bool:
    """Whether this process writes the logs, the files and the console of its job."""
    return _state().process_id == 0


def alone() -> bool:
    """Whether there is no other; by what was joined, where JAX would start the devices to say."""
    return bool(_state().num_processes == 1)


@contextlib.contextmanager
def joined(coordinator: str | None = None, processes: int | None = None, process: int | None = None,
           heartbeat: int = HEARTBEAT_SECONDS, again: str = AGAIN) -> Iterator[None]:
    """Within: one of several processes, which all come to the end of the block or end together.

    Before the first array. Without arguments Cloud TPU, Slurm or a JobSet of Kubernetes say who
    is who (`jax.distributed.initialize`).

    Args:
      coordinator: the address `host:port` of process 0, where it listens.
      processes: how many there are.
      process: the number of this one.
      heartbeat: seconds without a sign of life after which a process counts as dead.
      again: what to do then, for the message.

    Raises:
      UserError: when it can't join.
    """
    global _again
    _again = again
    watch = _join(coordinator, processes, process, heartbeat)
    try:
        check_same("flags of processes", {"processes": processes, "heartbeat": heartbeat})
        yield
    except Interrupted:  # by all, at the same step
        _part(watch)
        raise
    except BaseException as error:
        _tell(error, heartbeat)
        raise
    _part(watch)


def _join(coordinator: str | None, processes: int | None, process: int | None, heartbeat: int
          ) -> threading.Thread:
    """Joins the others; the thread that looks after them."""
    global _client
    import jax

    if coordinator and process == 0:
        _check_port(coordinator)
    # Else JAX aborts every process as soon as one is dead, before anybody could say which.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM: see asked_to_stop
    late = threading.Timer(START_SECONDS, _end, [  # ahead of JAX's own, which aborts
        f"not all processes came within {START_SECONDS} s: each must be started, with the same "
        "--coordinator and --processes and a --process of its own, and reach the coordinator"])
    late.daemon = True
    late.start()
    handle = ctypes.CDLL(None).signal
    handle.restype = ctypes.c_void_p
    before = ctypes.c_void_p(handle(signal.SIGABRT, _on_refusal))  # that of `faulthandler`
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=START_SECONDS + 60,
            cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=heartbeat)
    except Exception as error:
        cause = str(error).splitlines()[0]
        raise UserError(f"--coordinator={coordinator}: {cause}" if coordinator else
                        "--cluster: neither Cloud TPU nor Slurm nor a JobSet of Kubernetes says "
                        f"which process this is ({cause}); name --coordinator, --processes and "
                        "--process") from error
    finally:
        late.cancel()
        handle(signal.SIGABRT, before)
    _client = _state().client
    _check_number()
    watch = threading.Thread(target=_watch, args=(_client, heartbeat), daemon=True, name="watch")
    watch.start()
    if not speaks():
        handle(signal.SIGABRT, _on_abort)
    return watch


def _check_number() -> None:
    """Ends all where another process has joined with this one's number.

    JAX takes this one for that one started again, which would not be missed any more.
    """
    number = _state().process_id
    try:
        _client.key_value_set(f"number {number}", "taken")
    except Exception as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
        why = f"the number {number} is taken: start all again, each with a --process of its own"
        with contextlib.suppress(Exception):  # another one has failed before
            _client.key_value_set("failed", json.dumps([f"{number} (a second one)", why, 1]))
        _end(why)


def _check_port(coordinator: str) -> None:
    """Raises a UserError where process 0 can't listen: JAX would end by a segmentation fault."""
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator)  # as JAX has it
    port, both = int(address.rpartition(":")[2]), socket.has_dualstack_ipv6()
    try:
        socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET,
                             dualstack_ipv6=both).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UserError(f"--coordinator={coordinator}: process 0 can't listen at port {port} of "
                        f"this machine ({why}); name another port in all processes") from None


def _watch(client: Any, heartbeat: int) -> None:
    """Ends this process when another one fails or dies, whatever its main thread waits for."""
    everyone, broken = range(_state().num_processes), ""
    while _client is client:
        try:
            who, why, code = json.loads(
                client.blocking_key_value_get("failed", 1000 * WATCH_SECONDS))
            if who != _state().process_id:
                _told(client)
                _end(f"process {who} failed: {why}", code)
            return
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                broken = f"{type(error).__name__}: {error}"
                break
        try:
            dead = sorted(set(everyone) - set(client.get_live_nodes(everyone)))
        except Exception as error:
            broken = f"{type(error).__name__}: {error}"
            break
        if dead:
            time.sleep(WATCH_SECONDS)  # at the end all leave: this one may be about to
        if dead and _client is client:
            _end(f"process {dead[0]} died: nothing was heard of it for {heartbeat} s; {_again}")
    if _client is client:
        time.sleep(LEAVE_SECONDS)  # JAX most likely aborts: `_on_abort` ends behind its last word
        gone = any(word in broken for word in GONE)
        why = UNREACHED if gone else f"can't hear of the others: {broken.splitlines()[0]}"
        _end(f"{why}; {_again}")


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(signum: int) -> None:
    """JAX aborts a process that process 0 has left, at times before `_watch` sees it.

    From a thread of its own, so that no handler of Python's would run.
    """
    _reach_first()
    faulthandler.dump_traceback()  # something else is wrong; the process ends when this returns


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_refusal(signum: int) -> None:
    """JAX aborts a process that process 0 does not let join, too."""
    _reach_first()
    _end(f"process 0 refuses process {_state().process_id}: another one has come with that number, "
         "or process 0 has a lower --processes; start all again, with the same --processes and a "
         "--process of its own each")


def _reach_first() -> None:
    """Ends this process if process 0 can't be reached."""
    host, _, port = _state().coordinator_address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), WATCH_SECONDS) as service:
            service.recv(1)  # it speaks first; a process that hangs is connected to, and silent
    except OSError:
        _end(f"{UNREACHED}; {_again}")


def _tell(error: BaseException, heartbeat: int) -> None:
    """Says to the others why this process ends."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    if any((type(cause).__name__ == "JaxRuntimeError" or "Gloo" in str(cause))  # or a ValueError
           and "out of memory" not in str(cause).lower() for cause in causes):
        # Most likely another one's death broke what all compute together: `_watch` will know.
        time.sleep(heartbeat + 5 * WATCH_SECONDS)
    why = str(error) or "stopped"
    if not isinstance(error, UserError | KeyboardInterrupt):
        why = f"{type(error).__name__}: {why}"
    code = 2 if isinstance(error, UserError) else 1  # that of a door
    try:
        _client.key_value_set("failed", json.dumps([_state().process_id, why, code]))
    except Exception:  # another one has failed before: `_watch` says why, and ends this one
        time.sleep(2 * TELL_SECONDS)
    _told(_client)


def _told(client: Any) -> None:
    """Returns when all processes know of the failure, but soon."""
    with contextlib.suppress(Exception):
        client.wait_at_barrier("told", 1000 * TELL_SECONDS)
    if _state().process_id == 0:  # it has the service, without which the others' clients abort
        time.sleep(LEAVE_SECONDS)


def _part(watch: threading.Thread) -> None:
    """Leaves the others when all are here."""
    global _client
    import jax

    client = _client
    try:
        client.wait_at_barrier("end", 1000 * END_SECONDS)
    except Exception as error:
        if "DEADLINE_EXCEEDED" not in str(error):  # another one has died
            watch.join(END_SECONDS)  # it says which, and ends this one
        _end(f"not all processes came to the end within {END_SECONDS} s")
    _client = None
    while speaks() and len(client.get_live_nodes(range(_state().num_processes))) > 1:
        time.sleep(0.02)  # it has the service, without which the others' clients abort
    jax.distributed.shutdown()
    watch.join(TELL_SECONDS)  # Python's end aborts where a thread of it still waits in C++
    ctypes.CDLL(None).signal(signal.SIGABRT, signal.SIG_DFL)  # no `_on_abort` without a Python


def _end(message: str, code: int = 1) -> NoReturn:
    _ending.acquire()  # for good: one thread says why
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def shared(what: str, make: Callable[[], Any]) -> Any:
    """In every process what `make` gives in process 0, which alone calls it: a value of JSON.

    The others wait without a limit, as for a text that somebody types; `_watch` sees a failure.
    """
    client, what = _state().client, _once(what)
    if client is None:
        return make()
    if speaks():
        text = json.dumps(make())
        parts = [text[at:at + PART] for at in range(0, len(text), PART)]
        for number, part in enumerate(parts):
            client.key_value_set(f"{what}, part {number}", part)
        client.key_value_set(what, str(len(parts)))
    count = int(client.blocking_key_value_get(what, 2**31 - 1))
    return json.loads("".join(client.blocking_key_value_get(f"{what}, part {number}", 2**31 - 1)
                              for number in range(count)))


def _once(name: str) -> str:
    """The name, numbered: the service takes each once, and all come to the same in turn."""
    _used[name] += 1
    return f"{name} {_used[name]}"


@contextlib.contextmanager
def all_raise(elsewhere: str) -> Iterator[None]:
    """Within, by all: a UserError of process 0 is one in all, in the others with this message.

    One of another process is its own, of which `joined` tells the rest.
    """
    from jax.experimental import multihost_utils

    error = None
    try:
        yield
    except UserError as refused:
        error = refused
    if multihost_utils.broadcast_one_to_all(error is not None) or error:
        raise error or UserError(elsewhere)


def check_same(what: str, fields: Mapping[str, Any]) -> None:
    """Raises a UserError in a process where a field differs from process 0's.

    Elsewhere it returns when all have looked, so that nothing is begun that one of them can't join.
    """
    client, here = _state().client, json.loads(json.dumps(fields))
    if client is None:
        return
    there = shared(what, lambda: here)
    if other := [name for name in there | here if there.get(name) != here.get(name)]:
        shown = "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
                          for name in other[:5])
        raise UserError(f"another config, data or model than process 0 has ({shown}): start all "
                        "processes with the same command, on the same files")
    try:
        client.wait_at_barrier(_once(f"same {what}"), 1000 * READ_SECONDS)
    except Exception as error:
        if "DEADLINE_EXCEEDED" not in str(error):  # another one has ended: `_watch` says which
            raise
        raise UserError(f"not all processes had read the {what} within {READ_SECONDS} s of each "
                        "other") from error


def see(folder: Path) -> None:
    """Returns when process 0 has come here, and all see one folder, not each its own of that name.

    Raises:
      UserError: in a process that does not.
    """
    client, mark = _state().client, folder / ".seen"
    if client is None:
        return

    def write() -> str:
        mark.write_text(word := uuid.uuid4().hex, encoding="utf-8")
        return word

    word, end = shared("seen", write), time.monotonic() + SEE_SECONDS
    while not (mark.exists() and mark.read_text(encoding="utf-8") == word):
        if time.monotonic() > end:
            raise UserError(f"{folder}: what process 0 writes there is not to be seen here: "
                            "processes must share the run folder, on a network file system")
        time.sleep(0.5)
    client.wait_at_barrier(_once("all have seen"), 1000 * READ_SECONDS)
    if speaks():
        mark.unlink()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Around a whole program: one that ends without the others ends at once.

    What Python does at its end would wait for what it computes with them.
    """
    try:
        yield
    except BaseException as error:
        if _client is None:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[int], int | None]]:
    """Within: SIGTERM and Ctrl-C only leave a note; a second one ends the program at once.

    The function that is given is to be called with the number of each step, by all processes. It
    gives the signal, in all of them behind the same step, when any has had one.
    """
    import jax
    from jax.experimental import multihost_utils

    notes: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        notes.append(signum)
        before.close()

    def forward(signum: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.ExitStack() as before:
        for signum in (signal.SIGTERM, signal.SIGINT):
            before.callback(signal.signal, signum, signal.getsignal(signum))
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, note)
            signal.signal(signal.SIGINT, note)
            yield lambda step: notes[0] if notes else None
            return
        state = _state()
        jax.config.update("jax_enable_preemption_service", True)
        state.initialize_preemption_sync_manager()  # notes SIGTERM, and agrees on a step

        def close() -> None:
            state.preemption_sync_manager.shutdown()
            state.preemption_sync_manager = None
        before.callback(close)
        signal.signal(signal.SIGINT, forward)
        yield lambda step: (signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step)
                            else None)
