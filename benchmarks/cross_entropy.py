"""The loss of a large vocabulary in chunks, beside log_softmax over all its logits, in one run.

    python benchmarks/cross_entropy.py --json=cross_entropy.json

Value and gradient in float32 on one device, with a frozen head and with a trained one. The two
sides alternate. Memory is XLA's own count of what a program holds besides its arguments and
results; seconds are medians of rounds; how far apart the results are is relative to the largest.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.throughput import machine  # noqa: E402
from glm_jax.nn.loss import cross_entropy  # noqa: E402

HEADS: dict[str, Any] = {"frozen": 0, "trained": (0, 1)}  # what is differentiated


def plain(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
          ) -> jax.Array:
    logp = jax.nn.log_softmax(hidden @ kernel)
    return -jnp.sum(weights * jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0])


def measure(head: str, args: tuple[jax.Array, ...], rounds: int) -> dict[str, Any]:
    sides = {name: jax.jit(jax.value_and_grad(f, HEADS[head])).lower(*args).compile()
             for name, f in (("ours", cross_entropy), ("plain", plain))}
    results = {name: jax.tree.map(np.asarray, side(*args)) for name, side in sides.items()}
    apart = float(np.max([np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(
        *map(jax.tree.leaves, results.values()), strict=True)]))  # NaN if there is one
    del results
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            jax.block_until_ready(side(*args))
            seconds[name].append(time.perf_counter() - started)
    memory = {name: side.memory_analysis().temp_size_in_bytes for name, side in sides.items()}
    return {"bytes": memory, "seconds": seconds, "relative difference": apart,
            "memory ratio": memory["ours"] / memory["plain"],
            "time ratio": statistics.median(
                a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151552)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", help="where to write the figures")
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    arrays = (jnp.asarray(draw.standard_normal((1, args.tokens, args.hidden), np.float32)),
              jnp.asarray(draw.standard_normal((args.hidden, args.vocabulary), np.float32)
                          / np.float32(args.hidden**0.5)),
              jnp.asarray(draw.integers(0, args.vocabulary, (1, args.tokens)), jnp.int32),
              jnp.ones((1, args.tokens)))
    print(f"vocabulary {args.vocabulary}, {args.tokens} tokens, hidden {args.hidden}\n")
    print("| head | MB | plain | ratio | seconds | plain | ratio | apart |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    found = {"machine": machine(), "sizes": vars(args)}
    for head in HEADS:
        row = found[head] = measure(head, arrays, args.rounds)
        cells = [f"{row['bytes'][name] / 1e6:.0f}" for name in ("ours", "plain")]
        cells += [f"1/{1 / row['memory ratio']:.1f}"]
        cells += [f"{statistics.median(row['seconds'][name]):.1f}" for name in ("ours", "plain")]
        cells += [f"{row['time ratio']:.2f}", f"{row['relative difference']:.0e}"]
        print("| " + " | ".join([head, *cells]) + " |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
