"""AdamW or Adafactor over what trains: schedules, clipping, weight-decay groups, moments."""

from typing import Any

import jax.numpy as jnp
import optax

from glm_jax.errors import UserError
from glm_jax.train.moments import Skipping, chain, compact, each_layer

NAMES = ("adamw", "adafactor")
STATE_DTYPES = ("float32", "bfloat16", "int8")
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


def make_optimizer(config: Any, schedule: optax.Schedule) -> Skipping:
    """Clips the norm of all trainable gradients together, scales them, decays, and steps.

    Scaled is by Adam's moments (Loshchilov and Hutter 2019) or Adafactor's (Shazeer and Stern
    2018, arXiv:1804.04235): of the mean squares only the means over rows and over columns are kept,
    of each layer's matrices; each layer's update is cut to a root mean square of 1. Its learning
    rate, weight decay, `b1` (0: no first moment) and `eps` mean what AdamW's do; the means of
    squares forget as fast as that paper says, at least as fast as `b2` (Zhai et al. 2021).

    The tree it is given is `{dotted path: array}`; matrices decay, biases and norms don't.

    Raises:
      UserError: for an unknown optimizer or dtype, or one that would do nothing.
    """
    name, dtype = config.get("name", "adamw"), config.get("state_dtype", "float32")
    for field, value, known in (("name", name, NAMES), ("state_dtype", dtype, STATE_DTYPES)):
        if value not in known:
            raise UserError(f"optimizer.{field}={value!r}: choose one of {', '.join(known)}")
    if name == "adafactor" and not config.b1 and dtype != "float32":
        raise UserError(f"optimizer.state_dtype={dtype!r}: adafactor with optimizer.b1=0 has no "
                        "moment that it would be used for; leave it 'float32'")

    offload = config.get("offload", False)
    if offload and dtype == "int8":
        raise UserError("optimizer.offload: XLA can't bring int8 to a TPU's host and back; use "
                        "optimizer.state_dtype='bfloat16'")

    def is_matrix(path: str) -> bool:
        return path.rsplit(".", 1)[-1] in DECAYED

    def kept(path: str) -> str:  # embeddings as in the 8-bit paper: tokens differ too much
        return "float32" if dtype == "int8" and path.endswith("embedding") else dtype

    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    # Two axes of 128 at least are factored: below that there is nothing to save.
    factored = optax.chain(
        optax.scale_by_factored_rms(
            epsilon=max(config.eps**2, 1e-30),
            decay_rate_fn=lambda i, power: jnp.minimum(config.b2, 1 - (i + 1.0)**-power)),
        optax.clip_by_block_rms(1.0))

    def of(path: str) -> optax.GradientTransformation:
        if name == "adamw":
            return compact(adam, kept(path), path)
        mean = [compact(optax.ema(config.b1), kept(path), path)] if config.b1 else []
        return optax.chain(factored, *mean)

    scaled = adam if (name, dtype, offload) == ("adamw", "float32", False) else each_layer(
        of, lambda path: 1 + is_matrix(path), offload)
    optimizer = chain(
        scaled,
        optax.add_decayed_weights(config.weight_decay,
                                  mask=lambda params: {path: is_matrix(path) for path in params}),
        optax.scale_by_learning_rate(schedule))
    if not config.clip_norm:
        return optimizer
    return chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
