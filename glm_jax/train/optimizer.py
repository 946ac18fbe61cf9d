"""AdamW over the trainable parameters: schedules, clipping, weight-decay groups."""

from collections.abc import Mapping
from typing import Any

import optax

from glm_jax.errors import UserError

DECAYED = ("kernel", "embedding", "lora_a", "lora_b")  # matrices; not biases, not norm scales


def make_schedule(config: Any, steps: int) -> optax.Schedule:
    """The learning rate by step: linear warm-up, then constant, linear, cosine or exponential.

    Args:
      config: `learning_rate`, `schedule`, `warmup` (a fraction of all steps when below 1, else
        steps), `final` (the rate at the end as a fraction of the peak).
      steps: of the whole run.
    """
    peak, warmup = config.learning_rate, config.warmup
    warmup = int(warmup * steps if warmup < 1 else warmup)
    if warmup >= steps:
        raise UserError(f"optimizer.warmup={config.warmup}: {warmup} warm-up steps leave none of "
                        f"the {steps} steps of the run; lower it, or raise steps or epochs")
    rest, end = steps - warmup, peak * config.final
    shapes = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final),
        "exponential": lambda: optax.exponential_decay(peak, rest, max(config.final, 1e-6)),
    }
    if config.schedule not in shapes:
        raise UserError(f"optimizer.schedule={config.schedule!r}: choose one of "
                        + ", ".join(shapes))
    after = shapes[config.schedule]()
    if not warmup:
        return after
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clips the norm of all trainable gradients together, then AdamW (Loshchilov and Hutter 2019).

    The tree it is given is `{dotted path: array}`; matrices decay, biases and norms don't.
    """
    def decayed(params: Mapping[str, Any]) -> dict[str, bool]:
        return {path: path.rsplit(".", 1)[-1] in DECAYED for path in params}

    adamw = optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps,
                        weight_decay=config.weight_decay, mask=decayed)
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
