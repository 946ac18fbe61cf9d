"""Greedy generation: glm-jax beside transformers.generate, in one run.

    python benchmarks/generation.py --threads=2 --json=generation.json

The same folder, float32, prompts and number of new tokens: glm-nano-zh, and a GLM of about 100 M
random parameters. Transformers with its static cache and with its default, dynamic one, sdpa,
`inference_mode`. Sides take turns; figures are medians of rounds, after one that compiles. Each
round's tokens must be the same on all sides.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.throughput import machine  # noqa: E402
from glm_jax.parallel.host import use_huge_pages  # noqa: E402

NANO = ROOT / "glm_jax/assets/glm-nano-zh"
RANDOM = {"model_type": "glm", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
          "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 2,
          "head_dim": 64, "initializer_range": 0.05, "pad_token_id": 0, "eos_token_id": [1],
          "tie_word_embeddings": True, "max_position_embeddings": 1024}  # 97.7 M
SIDES = ("glm-jax", "transformers, static", "transformers, dynamic")


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="glm-nano-zh,random-100m", help="some of %(default)s, "
                        "or folders")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--json", default="", help="where to write the figures")
    return parser.parse_args()


def random_model(folder: Path) -> Path:
    from glm_jax.convert.hf import init_model, save_model
    from glm_jax.models import architecture_of
    architecture = architecture_of(RANDOM)
    config = architecture.config.from_dict(RANDOM)
    save_model(init_model(architecture, config, "lm", seed=1), folder / "random")
    return folder / "random"


def sides(folder: Path, new: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """By name: tokens `[batch, prompt]` to new ones `[batch, new]`."""
    import torch
    import transformers

    import glm_jax
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = glm_jax.from_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    def theirs(tokens: np.ndarray, **cache: Any) -> np.ndarray:
        given = torch.from_numpy(tokens.astype(np.int64))
        with torch.inference_mode():
            out = reference.generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                                     max_new_tokens=new, eos_token_id=None, pad_token_id=0, **cache)
        return out[:, tokens.shape[1]:].numpy()

    return dict(zip(SIDES, (
        lambda tokens: glm_jax.generate(model, tokens, max_new_tokens=new, eos_token_id=()).tokens,
        lambda tokens: theirs(tokens, cache_implementation="static"), theirs), strict=True))


def measure(folder: Path, name: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each side, by rounds."""
    run = sides(folder, args.new)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    draw = np.random.default_rng(0)
    speed: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(args.rounds + 1):
        tokens = draw.integers(20, vocabulary, (batch, args.prompt)).astype(np.int32)
        found = {}
        for side, generate in run.items():
            started = time.perf_counter()
            found[side] = generate(tokens)
            if number:
                speed[side].append(batch * args.new / (time.perf_counter() - started))
        for side in SIDES[1:]:
            np.testing.assert_array_equal(found[side], found[SIDES[0]], err_msg=side)
    ours = speed[SIDES[0]]
    ratios = {side: statistics.median(a / b for a, b in zip(ours, speed[side], strict=True))
              for side in SIDES[1:]}
    return {"model": name, "batch": batch, "tokens a second": speed, "ratios": ratios,
            "median": {side: statistics.median(values) for side, values in speed.items()}}


def main() -> None:
    args = flags()
    import torch
    torch.set_num_threads(args.threads)
    rows = []
    print(f"| model | batch | {' | '.join(SIDES)} | ours / static |\n|---|--:|{'--:|' * 4}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models.split(","):
            folder = {"glm-nano-zh": NANO}.get(name, Path(name))
            if name == "random-100m":
                folder = random_model(Path(scratch))
            for batch in map(int, args.batches.split(",")):
                row = measure(folder, name, batch, args)
                rows.append(row)
                cells = [f"{row['median'][side]:,.0f}" for side in SIDES]
                print(f"| {name} | {batch} | {' | '.join(cells)} | "
                      f"{row['ratios'][SIDES[1]]:.2f} |", flush=True)
    if args.json:
        from glm_jax.files import write_json_atomic
        write_json_atomic(args.json, {"machine": machine(), "arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    use_huge_pages()
    main()
