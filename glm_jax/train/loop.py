"""The training loop: resumes, trains, evaluates, keeps the best, stops early, and exports it."""

import contextlib
import functools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from glm_jax.convert.released import read_json
from glm_jax.data.packing import Batches, stream
from glm_jax.errors import Interrupted, UserError
from glm_jax.files import locked, sampled_sha256, write_json_atomic
from glm_jax.parallel import processes
from glm_jax.parallel.mesh import put, use_rules
from glm_jax.tasks import Evaluation
from glm_jax.train import setup
from glm_jax.train.checkpoint import COUNTERS, Checkpoints
from glm_jax.train.chips import chip_of
from glm_jax.train.evaluation import predictor
from glm_jax.train.export import export
from glm_jax.train.flops import Flops, training_flops
from glm_jax.train.optimizer import make_schedule
from glm_jax.train.profile import Profile
from glm_jax.train.report import write_report
from glm_jax.train.step import by_path, judged
from glm_jax.train.trackers import Tracker, import_wandb, open_tracker

LOWER_IS_BETTER = ("loss", "perplexity")
LOWER = "Lower optimizer.learning_rate, for which a new --workdir is wanted"


class Finished(NamedTuple):
    """What `result.json` holds, and the final evaluation with its rows."""

    result: dict[str, Any]
    final: Evaluation


def train(config: Any, workdir: Path) -> Finished:
    """Runs a config to its end in `workdir`, or goes on where it stopped.

    Raises:
      UserError: for bad input, a run folder of another config, or a loss that stays not finite.
      Interrupted: after SIGTERM or Ctrl-C.
    """
    started = time.monotonic()
    processes.check_same(  # before they compute together
        "config", setup.fields(config, setup.PLACES) | {"workdir": str(workdir)})
    run = setup.build(config)
    identity = setup.identity(config, run.task)
    processes.check_same("data", identity | setup.model_hashes(config, sampled_sha256))
    if processes.speaks():
        identity |= setup.model_hashes(config)  # reads all weights
        setup.check_same_run(workdir, identity)
    with (jax.set_mesh(run.mesh), use_rules(config.mesh.rules),
          setup.matmul_precision(config)):
        loop = Loop(config, workdir, run, started)
        if config.log.wandb_project:
            import_wandb()
        # From here on nothing is wrong with the config: a bad one leaves no folder behind.
        if not processes.speaks():
            processes.see(workdir)
            return loop.run()
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=workdir).close()
        except OSError as error:
            raise UserError(f"--workdir={workdir}: can't be written: {error.strerror}; name a "
                            "folder that can") from None
        with locked(workdir):
            write_json_atomic(workdir / "config.json", {
                "config": config.to_dict(), "identity": identity, "labels": list(run.task.labels)})
            processes.see(workdir)
            return loop.run()


class Loop:
    """One run; its `host` counters lie in each checkpoint beside the arrays."""

    def __init__(self, config: Any, workdir: Path, run: setup.Run, started: float):
        self.config, self.workdir, self.started = config, workdir, started
        self.mesh, self.task, self.parts = run.mesh, run.task, run.parts
        self.tokenizer = run.tokenizer
        task, parts = run.task, run.parts
        if config.eval.metric not in task.metrics:
            raise UserError(f"eval.metric={config.eval.metric!r}: choose one of "
                            + ", ".join(task.metrics))
        batches = Batches(task.source("train"), task.shape, task.pad_id, config.seed)
        steps = config.steps or max(1.0, config.epochs * batches.epoch_steps(0))
        if steps > setup.MOST["steps"]:
            raise UserError(f"epochs={config.epochs}: {steps:.3g} steps; at most "
                            f"{setup.MOST['steps']} are possible")
        self.steps = round(steps)
        if config.profile.steps and config.profile.start >= self.steps:
            raise UserError(f"profile.start={config.profile.start}: a trace begins behind so many "
                            f"steps, and there are {self.steps}")
        self.schedule = make_schedule(config.optimizer, self.steps)
        self.state, self.step_function = setup.make_training(config, parts, task.loss,
                                                             self.schedule, run.mesh)
        self.predict = predictor(parts.graphdef, parts.trainable, parts.frozen, task.predict,
                                 run.mesh)
        trained = by_path(parts.trainable)
        self.flops = training_flops(parts.model(trained), trained)
        self.data = stream(batches)
        self.checkpoints = Checkpoints(workdir / "checkpoints")
        self.worst = math.inf if config.eval.metric in LOWER_IS_BETTER else -math.inf
        self.host = COUNTERS | {"best": self.worst}
        self.first_step_seconds = 0.0

    def run(self) -> Finished:
        restored = self.checkpoints.restore({"state": self.state, "host": self.host}, self.data)
        step = 0
        if restored is not None:
            step, tree = restored
            self.state, self.host = tree["state"], tree["host"]
            best, then = self.checkpoints.whole_best()
            if self.host["best_step"] not in (0, best):  # damaged: an older one is the best now
                self.host.update({name: then.get(f"host.{name}", value) for name, value in
                                  (("best", self.worst), ("best_step", 0))})
        try:
            if not self.is_over(step):
                tracker = open_tracker(self.workdir, self.steps, None if restored is None else step,
                                       config=self.config.to_dict(),
                                       tensorboard=self.config.log.tensorboard,
                                       wandb_project=self.config.log.wandb_project,
                                       about=self.about())
                with (contextlib.closing(tracker), processes.asked_to_stop() as asked,
                      contextlib.closing(Profile(self.config.profile, self.workdir)) as profile):
                    step = self.train(step, tracker, profile, asked)
            elif self.config.profile.steps:
                logging.warning("%s: no trace: this run is over; profile a run of another "
                                "--workdir", self.workdir)
            self.checkpoints.wait()
            return self.finish(step)
        finally:
            self.checkpoints.close()

    def about(self) -> str:
        """What trains on what and where, for the terminal."""
        devices = self.mesh.devices.flat
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1)
        trained = setup.count(self.parts.trainable)
        return (f"{self.task.about()}\n"
                f"{self.workdir}: {trained:,} of {trained + setup.count(self.parts.frozen):,} "
                f"parameters train for {self.steps} steps, on {len(devices)} "
                f"{devices[0].device_kind}{f' ({mesh})' if mesh else ''}; compiling …")

    def train(self, step: int, tracker: Tracker, profile: Profile,
              asked: Callable[[int], int | None]) -> int:
        """Steps until the end, early stopping or a signal; returns the last step."""
        config = self.config
        log = Log(config, self.schedule, tracker, self.flops, list(self.mesh.devices.flat))
        before = self.host["seconds"]
        while not self.is_over(step):
            batch = put(next(self.data), self.mesh)
            log.before_step()
            profile.before_step()
            self.state, metrics = self.step_function(self.state, self.parts.frozen, batch)
            step += 1
            profile.after_step(metrics)
            log.put(step, metrics)  # reads the numbers of the step before, while this one runs
            if not self.first_step_seconds:
                jax.block_until_ready(metrics)
                self.first_step_seconds = time.monotonic() - self.started
                log.flush()
                log.restart_clock()  # compiling is not training either
            evaluate = step % config.eval.every == 0 or step == self.steps
            save = config.checkpoint.every and step % config.checkpoint.every == 0
            stop = asked(step)
            if evaluate or save or stop:
                log.flush()
                # What is not sound is not saved: good checkpoints would have to go for it.
                sound = not log.skipped_in_a_row and all(
                    bool(jnp.isfinite(x).all()) for x in self.state["trainable"].values())
                best = self.judge(step, tracker) if sound and evaluate else False
                self.host["seconds"] = before + time.monotonic() - self.started
                if sound := sound and best is not None:
                    self.checkpoints.save(step, {"state": self.state, "host": self.host},
                                          self.data, best=bool(best))
                log.restart_clock()
                if stop:
                    self.checkpoints.wait()
                    raise Interrupted(stop, step, sound)
        log.flush()
        return step

    def is_over(self, step: int) -> bool:
        """Whether this was the last step, by number or by early stopping."""
        patience = self.config.eval.patience
        return step >= self.steps or (patience > 0 and self.host["stale"] >= patience)

    def judge(self, step: int, tracker: Tracker) -> bool | None:
        """Evaluates on dev; whether this is the best so far, None for metrics not finite."""
        metrics = self.evaluate("dev").metrics
        tracker.log(step, {f"eval/{name}": value for name, value in metrics.items()})
        if not all(map(math.isfinite, metrics.values())):
            self.host["stale"] += 1
            return None
        name = self.config.eval.metric
        better = metrics[name] < self.host["best"] if name in LOWER_IS_BETTER else \
            metrics[name] > self.host["best"]
        if better:
            self.host.update(best=float(metrics[name]), best_step=step, stale=0)
        else:
            self.host["stale"] += 1
        return better

    def evaluate(self, split: str) -> Evaluation:
        return self.task.evaluate(functools.partial(self.predict, judged(self.state)), split)

    def finish(self, step: int) -> Finished:
        """Restores the best step, measures it on the final split, exports it and reports."""
        skipped, seconds = int(self.state["skipped"]), self.host["seconds"]
        restored = self.checkpoints.restore({"state": self.state, "host": self.host}, None, "best")
        if restored is None:
            raise UserError(f"{self.workdir}: no step with finite weights and metrics, so there is "
                            f"nothing to export. {LOWER}")
        taken, self.state, self.host = restored[0], restored[1]["state"], restored[1]["host"]
        name, task = self.config.eval.metric, self.task
        if taken != self.host["best_step"]:  # one that stands in for a best that is lost
            self.host.update(best_step=taken, best=self.evaluate("dev").metrics[name])
        final = self.evaluate(task.final)
        if not all(map(math.isfinite, final.metrics.values())):
            raise UserError(f"{self.workdir}: {task.final} gives {final.metrics} at step {taken}; "
                            f"nothing is exported. {LOWER}")
        trained = setup.count(self.parts.trainable)
        path, first = self.workdir / "result.json", round(self.first_step_seconds, 3)
        if not first and path.exists():  # the command again, after its end: all stays as it was
            first = read_json(path).get("seconds_to_first_step", first)
        result = {
            task.final: final.metrics, "best_step": self.host["best_step"],
            "best": {name: self.host["best"]}, "steps": step,
            "skipped_steps": skipped, "seconds": round(seconds, 3),
            "seconds_to_first_step": first,
            "parameters": {"trainable": trained,
                           "total": trained + setup.count(self.parts.frozen)}}
        exported = export(self.config, self.parts.model(judged(self.state)),
                          self.parts.lora_config, self.tokenizer, self.workdir)
        result["exported"] = exported
        if processes.speaks():
            write_json_atomic(path, result)
            write_report(self.workdir, final.report, task.final)
        return Finished(result, final)


class Log:
    """Hands each step's numbers on one step late, so that reading them stops nothing."""

    def __init__(self, config: Any, schedule: Callable[[int], Any], tracker: Tracker,
                 flops: Flops, devices: Sequence[Any]):
        self.config, self.schedule, self.tracker = config, schedule, tracker
        self.flops, self.devices = flops, len(devices)
        self.chip = chip_of(devices[0].device_kind)  # none of a CPU
        self.waiting: tuple[int, Any] | None = None
        self.ended: float | None = None  # when the step that waits was done, if that is known
        self.skipped_in_a_row = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Tokens are counted from now on: evaluating and saving is not training."""
        self.tokens, self.pairs, self.since = 0, 0.0, time.monotonic()

    def before_step(self) -> None:
        """Notes the time if the step that waits is done: on a CPU the next may run at once."""
        if self.waiting and self.waiting[1]["loss"].is_ready():
            self.ended = time.monotonic()

    def put(self, step: int, metrics: Any) -> None:
        self.flush()
        self.waiting = step, metrics

    def flush(self) -> None:
        """Reads the step that waits, logs it when its turn has come, and minds bad losses.

        Raises:
          UserError: when too many losses in a row were not finite.
        """
        if self.waiting is None:
            return
        step, metrics = self.waiting
        self.waiting = None
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        ended, self.ended = self.ended or time.monotonic(), None
        self.tokens += values["tokens"]
        self.pairs += values["pairs"]
        self.skipped_in_a_row = values["skipped_in_a_row"]
        if self.skipped_in_a_row:
            logging.warning("step %d: loss %s or its gradient is not finite; the step is skipped",
                            step, values["loss"])
            if values["skipped_in_a_row"] >= self.config.max_skipped:
                raise UserError(
                    f"the loss was not finite for {values['skipped_in_a_row']} steps in a row, up "
                    f"to step {step}; the last good checkpoint is kept. {LOWER}, or "
                    "look at the data of these steps")
        if step % self.config.log.every == 0:
            seconds = max(ended - self.since, 1e-9)
            rates = {"train/tokens_per_second": self.tokens / seconds,
                     "train/tokens_per_second_per_device": self.tokens / seconds / self.devices}
            if self.chip:
                rates["train/mfu"] = (self.flops.of(self.tokens, self.pairs)
                                      / (seconds * self.devices * self.chip.flops))
            self.tracker.log(step, {
                "train/loss": values["loss"], "train/grad_norm": values["grad_norm"],
                "train/learning_rate": float(self.schedule(step - 1 - values["skipped"])),
                "train/skipped": values["skipped"]} | rates)
            self.tokens, self.pairs, self.since = 0, 0.0, ended
