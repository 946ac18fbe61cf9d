"""Training: optimizer, step, loop, checkpoints, trackers, metrics and the report of a run."""
