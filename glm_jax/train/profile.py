"""A trace of a few steps for TensorBoard's profiler or Perfetto."""

from pathlib import Path
from typing import Any

import jax
from absl import logging

from glm_jax.parallel import processes


class Profile:
    """Traces `steps` steps behind the first `start` into `workdir/profile`; of process 0.

    What compiles and warms up lies in the first steps, so `start` leaves these out.

    Args:
      config: with `start` and `steps`; 0 steps: no trace.
    """

    def __init__(self, config: Any, workdir: Path):
        self.folder, self.done = workdir / "profile", 0
        steps = config.steps if processes.speaks() else 0  # files are named by host: two may share
        self.first, self.last = config.start, config.start + steps
        self.running = False

    def before_step(self) -> None:
        if self.done == self.first < self.last:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after_step(self, result: Any) -> None:
        self.done += 1
        if self.running and self.done == self.last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what there is; at the end of the run at the latest."""
        if not self.running and self.done <= self.first < self.last:
            logging.warning("%s: no trace: profile.start=%d steps come before it, counted from "
                            "where a run goes on, and %d were made", self.folder, self.first,
                            self.done)
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            logging.info("%s: a trace of steps %d to %d", self.folder, self.first + 1, self.done)
