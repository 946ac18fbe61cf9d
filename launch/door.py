"""What every door shares: flags with a config file, processes, and errors as one line."""

import contextlib
import difflib
import errno
import logging as standard
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from glm_jax.errors import Interrupted, UserError
from glm_jax.parallel import processes

FLAGS = flags.FLAGS
_ARGUMENTS: list[str] = []
# What the system may refuse without a mistake of ours: a full disk, no permission, a wrong path.
THEIRS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
          errno.EISDIR, errno.ENOENT, errno.EFBIG}
flags.DEFINE_bool("verbose", False, "print the traceback of an error, and what libraries log")


class _Terminated(KeyboardInterrupt):
    """SIGTERM: cleans up and ends as Ctrl-C does."""


class _Lines(standard.Formatter):
    """What is logged, as a user reads it: without the time and place that a developer wants."""

    def format(self, record: standard.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= standard.WARNING else ""
        return level + super().format(record)


class _Words(tuple_parser.TupleParser):
    """Tuples as a user types them: `q_proj,k_proj` or `0.6,0.4` or `()`."""

    def parse(self, argument: Any) -> tuple[Any, ...]:
        if isinstance(argument, str) and not argument.startswith(("(", "[")):
            return tuple(_number(word.strip()) for word in argument.split(",") if word.strip())
        return super().parse(argument)


def _number(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def flags_with_config() -> flags.FlagValues:
    """Defines `--config=file.py[:variant]`, `--config.field=value` and `--workdir`."""
    config_flags.register_flag_parser_for_type(tuple, _Words())
    config_flags.DEFINE_config_file("config", None, "the experiment: a file of configs/",
                                    lock_config=True)
    flags.DEFINE_string("workdir", None, "the run folder; runs/<config name> by default")
    flags.mark_flag_as_required("config")
    flags_of_processes()
    return FLAGS


def flags_of_processes() -> None:
    """Defines what `joined` reads."""
    flags.DEFINE_bool("cluster", False, "this is one of the processes that Cloud TPU, Slurm or a "
                      "JobSet of Kubernetes has started: see docs/pods.md")
    flags.DEFINE_string("coordinator", None, "instead: host:port of process 0")
    flags.DEFINE_integer("processes", None, "how many there are", lower_bound=1)
    flags.DEFINE_integer("process", None, "the number of this one, from 0", lower_bound=0)
    flags.DEFINE_integer("heartbeat", processes.HEARTBEAT_SECONDS, "seconds without a sign of life "
                         "after which a process counts as dead and the others end", lower_bound=2)


def flags_of_mesh() -> None:
    """Defines what `joined` and `on_mesh` read."""
    flags_of_processes()
    flags.DEFINE_string("mesh", "", "where the model lies: sizes by axis, such as fsdp=4,tensor=2; "
                        "by default in parts on all devices that there are")


PATHS = ("model", "adapter", "data", "file", "json")  # flags; what lies there may be a copy


@contextlib.contextmanager
def on_mesh(folder: str, axis: str = "") -> Iterator[Any]:
    """The mesh for the model of a folder (see `mesh_for`); within, the rules of its run hold.

    Raises:
      UserError: where another process has other flags or another model; only paths may differ.
    """
    from glm_jax.parallel.mesh import use_rules
    from glm_jax.train.load import hashes, mesh_for
    asked = {flag.name: flag.value for flag in FLAGS.get_flags_for_module(sys.argv[0])}
    if not processes.alone():
        same = {name: value for name, value in asked.items() if name not in PATHS}
        processes.check_same("flags and model", {
            "mesh": FLAGS.mesh} | same | hashes(folder, asked.get("adapter")))
    mesh, rules = mesh_for(folder, FLAGS.mesh, axis)
    with use_rules(rules):
        yield mesh


@contextlib.contextmanager
def joined(again: str = processes.AGAIN) -> Iterator[None]:
    """Within: one of several processes, where the flags say so; the first one alone speaks.

    Args:
      again: what to do when one of them has died.
    """
    given: dict[str, Any] = {name: FLAGS[name].value
                             for name in ("coordinator", "processes", "process")}
    missing = [name for name, value in given.items() if value is None]
    if FLAGS.cluster and len(missing) < 3:
        raise UserError("--cluster: the cluster says what --coordinator, --processes and --process "
                        "would; leave out one or the other")
    if not FLAGS.cluster and len(missing) == 3:
        yield
        return
    if not FLAGS.cluster and missing:
        which = " and ".join(f"--{name}" for name in missing)
        raise UserError(f"{which} {'are' if len(missing) > 1 else 'is'} missing: --coordinator, "
                        "--processes and --process go together")
    if not FLAGS.cluster and given["process"] >= given["processes"]:
        raise UserError(f"--process={given['process']}: the last of --processes="
                        f"{given['processes']} has the number {given['processes'] - 1}")
    port = re.fullmatch(r".+:(\d+)", given["coordinator"] or "cluster:1")
    if port is None or not 0 < int(port[1]) < 2**16:
        raise UserError(f"--coordinator={given['coordinator']}: host:port is wanted, of process 0")
    with processes.joined(**given, heartbeat=FLAGS.heartbeat, again=again):
        if not processes.speaks() and not FLAGS.verbose:
            standard.disable(standard.WARNING)
        with _one_prints():
            yield


@contextlib.contextmanager
def _one_prints() -> Iterator[None]:
    """Within: `print` is the first process' alone, without what gloo writes beside it."""
    sys.stdout.flush()
    with (open(os.dup(1), "w", encoding=sys.stdout.encoding) as kept,
          open(os.devnull, "w") as nowhere,
          contextlib.redirect_stdout(kept if processes.speaks() else nowhere)):
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 1)


def config_name() -> str:
    """`sentiment-full-smoke` for `--config=configs/sentiment.py:full,smoke`."""
    file, _, variant = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    return "-".join([Path(file).stem, *filter(None, variant.split(","))])


def start_devices(cpu_devices: int) -> None:
    """Simulates `cpu_devices` devices on the CPU; before the first array. 0 leaves it as it is."""
    import jax
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)


def console() -> Any:
    from rich.console import Console
    return Console(soft_wrap=True, quiet=not processes.speaks())


def arguments() -> list[str]:
    """What stands on the command line besides flags; UserError where that is not UTF-8."""
    for number, argument in enumerate(_ARGUMENTS, 1):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"argument {number} is not UTF-8 at its character {error.start + 1}: "
                            f"{argument[:40]!a}") from None
    return list(_ARGUMENTS)


def read_stdin() -> str:
    """All of standard input; UserError where that is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 at byte {error.start}") from None


def column(given: str | None, trained: Any, kind: str) -> str:
    """The column of the texts or labels (`kind`): as given, else the run's own, else its kind."""
    own = trained.config.task.get(kind) if trained.config is not None else None
    return str(given or own or kind)


def run(main: Callable[[], None], arguments: bool = False) -> None:
    """Parses the flags and runs `main`; whatever a user can mend ends in one message, exit code 2.

    Flags first, then heavy imports: `main` imports what it needs, so `--help` is quick.

    Args:
      arguments: whether the door takes any besides flags (see the function of that name).
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    signal.signal(signal.SIGTERM, _terminate)
    with processes.ending():
        try:
            app.run(lambda _: _guarded(main), flags_parser=lambda argv: _parse(argv, arguments))
        except _Terminated as error:
            _leave(str(error), 128 + signal.SIGTERM)
        except KeyboardInterrupt:
            _leave("stopped", 130)


def _terminate(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second one ends the program at once
    raise _Terminated("stopped by SIGTERM")


def _guarded(main: Callable[[], None]) -> None:
    logging.get_absl_handler().setFormatter(_Lines())
    logging.set_verbosity(logging.INFO if FLAGS.verbose else logging.WARNING)
    if not FLAGS.verbose:  # the hub's client tells of each of its many tries, then fails
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _leave(str(error), 2)
    except BrokenPipeError:  # `predict.py … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in THEIRS:
            raise
        _leave(f"{error.filename or 'writing a file'}: {error.strerror}", 2)
    except Interrupted as error:
        if processes.speaks():
            _leave(str(error), 128 + error.signal)
        sys.exit(128 + error.signal)
    except Exception as error:
        if type(error).__name__ == "JaxRuntimeError" and "out of memory" in str(error).lower():
            _leave("a device has not enough memory for these lengths and this batch "
                   f"({str(error).splitlines()[0].rpartition(': ')[2]})", 2)
        raise


def _leave(message: str, code: int) -> None:
    if code == 2 and FLAGS.is_parsed() and FLAGS.verbose:
        raise
    print(message if code > 2 else f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _parse(argv: list[str], arguments: bool) -> list[str]:
    if {"--help", "-help", "-h"}.intersection(argv[1:]):
        print(f"{sys.modules['__main__'].__doc__}{FLAGS.main_module_help()}\n"  # its own flags
              f"{FLAGS.module_help(__name__)}\n")  # and those that all doors share
        sys.exit(0)
    end = argv.index("--") if "--" in argv else len(argv)  # what follows is no flag
    argv = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), argument)
            for argument in argv[:end]] + argv[end:]  # --max-shard-size is --max_shard_size
    try:
        rest = FLAGS(argv)
        if "config" in FLAGS:
            _ = FLAGS.config.seed  # a file that is not there is an error only when it is read
        if arguments:
            _ARGUMENTS.extend(rest[1:])
        elif len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}; options begin with --")
        return rest
    except Exception as error:
        if "--verbose" in argv:
            raise
        print(f"error: {_explain(error, argv)}", file=sys.stderr)
        sys.exit(2)


def _explain(error: Exception, argv: list[str]) -> str:
    """One line for what went wrong while flags were parsed."""
    text = str(error)
    if "UserError: " in text:  # raised in a config file; the flag library quotes the traceback
        return text.rsplit("UserError: ", 1)[1].strip()
    file, _, variant = _config_argument(argv).partition(":")
    if "config" in FLAGS and not file:
        return "--config=FILE is wanted: one of configs/, such as --config=configs/sentiment.py"
    if file and not Path(file).is_file():
        return f"--config={file}: no such file"
    if isinstance(error, KeyError | AttributeError):
        known = list(_flat(runpy.run_path(file)["get_config"](variant)))
        for argument in argv[1:]:
            found = re.match(r"--?config\.([\w.]+)", argument)
            if found and found[1] not in known:
                near = _nearest(found[1], known)
                hint = f"; did you mean --config.{near}?" if near else ""
                return f"--config.{found[1]}: the config has no such field{hint}"
    if isinstance(error, KeyError):
        text = str(error.args[0])
    if missing := re.match(r"flag --(\w+)=None: ", text):
        return f"--{missing[1]} is wanted: {FLAGS[missing[1]].help}"
    if no_number := re.match(r"flag (--[\w.]+=.*): (?:invalid literal for int|could not convert)",
                             text):
        whole = "whole " if "int()" in text else ""
        return f"{no_number[1]}: a {whole}number is wanted"
    return text.strip().rsplit("\n", 1)[-1] or type(error).__name__


def _nearest(name: str, known: list[str]) -> str:
    """The field whose last word is that of `name`, its initials, or spelt nearly so; or ""."""
    own, last = name.rpartition(".")[2], {field: field.rpartition(".")[2] for field in known}
    short = {field: "".join(re.findall(r"(?:^|_)(.)", word)) for field, word in last.items()
             if "_" in word}
    found = ([field for field in known if own in (last[field], short.get(field))] or
             [field for field in known
              if last[field] in difflib.get_close_matches(own, last.values(), 1, 0.75)])
    return next(iter(difflib.get_close_matches(name, found, 1, 0)), "")


def _config_argument(argv: list[str]) -> str:
    """What `--config` is given on a command line."""
    for argument, after in pairwise([*argv[1:], ""]):
        if found := re.fullmatch(r"--?config(?:=(.*))?", argument):
            return after if found[1] is None else found[1]
    return ""


def _flat(config: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of the fields of a config."""
    for name, value in config.items():
        yield from _flat(value, f"{prefix}{name}.") if hasattr(value, "items") else [prefix + name]
