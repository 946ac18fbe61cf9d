"""Fine-tuning on one GPU, beside Transformers + PEFT: tokens a second, peak memory, MFU.

    python benchmarks/gpu.py                      wants a card of 80 GB
    python benchmarks/gpu.py --size=toy           a CPU does; the figures mean nothing

A `glm4` of 1.9 B by LoRA and in full, one of 9.4 B (GLM-4-9B-0414's shape) by LoRA; random weights,
bfloat16, rows of 2,048 tokens filled with texts of about 400. Each side trains on the same tokens
in a process of its own. Ours keeps the texts of a row apart, and so do `theirs` and `compiled` (by
`position_ids`, from which Transformers makes sdpa's mask); `joined` is `compiled` where a row is
read as one text: less work for sdpa, and another loss. All compute the loss of every token, clip,
and use AdamW; in full fine-tuning weights and moments are float32. Theirs takes the rows of a step
at once where they fit, else with gradient checkpointing; `torch.compile` is on its layers and its
loss.

MFU counts the same operations for all (glm_jax/train/flops.py: 4N a token for LoRA, 6N in full,
and the pairs that texts kept apart have), against the peak of the card in bfloat16.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
HEADS = {"num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552}
SHAPES: dict[str, dict[str, int]] = {
    "2b": {**HEADS, "hidden_size": 2048, "intermediate_size": 6912, "num_hidden_layers": 24,
           "num_attention_heads": 16},
    "9b": {**HEADS, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
           "num_attention_heads": 32},
    "toy": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1003},
}
SIDES = ("ours", "theirs", "compiled", "joined")
KINDS = {"attention": "cudnn|sdpa|fmha|flash|dot_product_attention",  # by name or operation
         "products": "gemm|nvjet|cutlass|xmma|cublas|dot_general", "copies": "copy|memcpy|memset"}


class Job(NamedTuple):
    """One line of the table.

    Attributes:
      shape: of the model, one of `SHAPES`.
      lora: else all parameters train.
      rows, length: of a step.
      remat, unroll: of ours (`model.remat`, `model.unroll`).
      dtype: what is computed in.
    """

    shape: str
    lora: bool
    rows: int
    length: int = 2048
    remat: str = "none"
    unroll: int = 0
    dtype: str = "bfloat16"


JOBS = {"lora-2b": Job("2b", True, 8, unroll=24), "full-2b": Job("2b", False, 8, remat="dots"),
        "lora-9b": Job("9b", True, 4, remat="dots")}


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), help="some of %(default)s")
    parser.add_argument("--sides", default=",".join(SIDES), help="some of %(default)s")
    parser.add_argument("--size", choices=("real", "toy"), default="real")
    parser.add_argument("--steps", type=int, default=8, help="that are timed, after two")
    parser.add_argument("--rows", type=int, default=0, help="of a step; 0: each job's")
    parser.add_argument("--remat", default="", help="model.remat of ours; '': each job's")
    parser.add_argument("--unroll", type=int, default=-1, help="model.unroll; -1: each job's")
    parser.add_argument("--json", default="", help="where to write the figures")
    parser.add_argument("--profile", action="store_true",
                        help="trace two steps more of ours: time by kind, and the slowest kernels")
    parser.add_argument("--alone", action="store_true", help="one job and side, in this process")
    return parser.parse_args()


def job_of(name: str, args: argparse.Namespace) -> Job:
    job = JOBS[name]
    if args.size == "toy":
        job = job._replace(shape="toy", rows=2, length=64)
    return job._replace(rows=args.rows or job.rows, remat=args.remat or job.remat,
                        unroll=job.unroll if args.unroll < 0 else args.unroll)


def texts(job: Job) -> list[list[np.ndarray]]:
    """Token ids of the texts of each row; the last text of a row is cut where the row ends."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(job.rows):
        left, row = job.length, []
        while left:
            size = min(left, int(np.clip(rng.lognormal(5.7, 0.8), 16, job.length)))
            row.append(rng.integers(10, SHAPES[job.shape]["vocab_size"], size).astype(np.int32))
            left -= size
        rows.append(row)
    return rows


class Ours:
    """glm-jax: the trainer's step, over arrays made on the device."""

    def __init__(self, job: Job):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from configs import common
        from glm_jax.data.packing import Piece, assemble, shape_for
        from glm_jax.files import write_json_atomic
        from glm_jax.models import architecture_of
        from glm_jax.nn.loss import cross_entropy
        from glm_jax.parallel.mesh import make_mesh, put
        from glm_jax.train.chips import chip_of
        from glm_jax.train.flops import training_flops
        from glm_jax.train.setup import make_parts, make_training
        from glm_jax.train.step import by_path

        raw = {"model_type": "glm4", "tie_word_embeddings": False, **SHAPES[job.shape]}
        config = common.get_config()
        config.adapter.update(name="lora" if job.lora else "", targets=TARGETS)
        config.trainable = ("adapter",) if job.lora else (".*",)
        config.batch.update(rows=job.rows, length=job.length)
        self.jax, self.mesh = jax, make_mesh({"data": 1})
        with tempfile.TemporaryDirectory() as folder:
            write_json_atomic(Path(folder) / "config.json", raw)
            config.model.update(path=folder, dtype=job.dtype, remat=job.remat,
                                unroll=job.unroll)
            parts = make_parts(config, "lm", [], self.mesh, None, abstract=True)

        def fill(path: Any, x: Any) -> Any:
            """Norms one, B zero, the rest normal; the layers of a stack alike: it is quick."""
            x, name = x.get_value(), str(path[-1])
            if name in ("scale", "lora_b"):
                return jnp.full(x.shape, name == "scale", x.dtype, device=x.sharding)
            one = 0.02 * jax.random.normal(jax.random.key(len(path)), x.shape[-2:], x.dtype)
            return jax.device_put(jnp.broadcast_to(one, x.shape), x.sharding)

        trainable, self.frozen = (
            nnx.map_state(lambda path, x: x.replace(fill(path, x)), state)
            for state in (parts.trainable, parts.frozen))
        parts = parts._replace(trainable=trainable)
        model = nnx.merge(*parts[:3])
        self.flops, self.kernel = training_flops(model, by_path(trainable)), model.compute.kernel
        chip = chip_of(jax.devices()[0].device_kind)
        self.peak = chip and chip.flops

        def loss(model: Any, batch: Any, key: Any) -> Any:
            return cross_entropy(model(batch, key=key)[0], model.vocabulary_kernel(),
                                 batch.targets, batch.weights)

        pieces = [[Piece(t, np.append(t[1:], 0).astype(np.int32),
                         np.append(np.ones(len(t) - 1), 0).astype(np.float32)) for t in row]
                  for row in texts(job)]
        shape = shape_for(architecture_of(raw).config.from_dict(raw), job.rows, job.length,
                          max(map(len, pieces)))
        self.batch = put(assemble(pieces, shape, 0), self.mesh)
        self.state, self.function = make_training(config, parts, loss, lambda step: 1e-4, self.mesh)

    def step(self) -> float:
        """Trains once more on the batch; its loss, when it is done."""
        with self.jax.set_mesh(self.mesh):
            self.state, self.metrics = self.function(self.state, self.frozen, self.batch)
        return float(self.metrics["loss"])

    def profile(self, steps: int = 2) -> dict[str, Any]:
        """Milliseconds a step by kind of kernel, and the ten slowest, how often, and their source.

        What lies outside of the loss and its derivative is counted as the optimizer's.
        """
        with self.jax.set_mesh(self.mesh):
            text = self.function.lower(self.state, self.frozen, self.batch).compile().as_text()
        sources = {re.sub(r"\W", "_", name): source for name, source in re.findall(
            r'^ *(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', text, re.MULTILINE)}
        with tempfile.TemporaryDirectory() as folder:
            with self.jax.profiler.trace(folder):
                for _ in range(steps):
                    self.step()
            file = next(Path(folder).rglob("*.xplane.pb"))
            planes = list(self.jax.profiler.ProfileData.from_file(str(file)).planes)
        planes = [plane for plane in planes if plane.name.startswith("/device:GPU")] or planes
        kernels: dict[str, list[float]] = {}
        for event in (event for plane in planes for line in plane.lines for event in line.events
                      if line.name.startswith("Stream") or "hlo_op" in dict(event.stats)):
            kernels.setdefault(str(dict(event.stats).get("hlo_op", event.name)), []).append(
                event.duration_ns / 1e6 / steps)
        kinds, rows = dict[str, float](), []
        for name, times in kernels.items():
            source = sources.get(re.sub(r"\W", "_", name), "")
            what = f"{name} {source.rsplit('/', 1)[-1]}".lower()
            kind = next((kind for kind, names in KINDS.items() if re.search(names, what)),
                        "elementwise" if "jvp(" in source else "optimizer" if source else "other")
            kinds[kind] = kinds.get(kind, 0) + sum(times)
            rows.append((sum(times), len(times) // steps, name[:60], source[-60:]))
        return {"kinds": kinds, "slowest": sorted(rows, reverse=True)[:10]}

    def facts(self) -> dict[str, Any]:
        device = self.jax.devices()[0]
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        flops = self.flops.of(float(self.metrics["tokens"]), float(self.metrics["pairs"]))
        return {"device": device.device_kind, "peak_bytes": memory, "flops": flops,
                "peak_flops": self.peak, "attention": self.kernel}


class Theirs:
    """Transformers + PEFT in the plain loop that the Trainer runs with `bf16=True`."""

    def __init__(self, job: Job, side: str, checkpoint: bool):
        import torch
        import transformers
        from peft import LoraConfig, get_peft_model
        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.torch, self.job = torch, job
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = transformers.Glm4Config(tie_word_embeddings=False, use_cache=False,
                                         pad_token_id=0, **SHAPES[job.shape])
        with torch.device(self.device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa",
                dtype=torch.bfloat16 if job.lora else torch.float32)
        layers = model.model.layers
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if job.lora:
            model = get_peft_model(model, LoraConfig(
                r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS),
                task_type="CAUSAL_LM"))
            if checkpoint:
                model.enable_input_require_grads()
        if side != "theirs":
            for layer in layers:
                layer.compile()
            inner = model.base_model.model if job.lora else model
            inner.loss_function = torch.compile(inner.loss_function)
        model.train()
        self.model = model
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, weight_decay=0.01, fused=True)

        def rows(of: Callable[[np.ndarray], np.ndarray]) -> Any:
            found = np.stack([np.concatenate([of(text) for text in row]) for row in texts(job)])
            return torch.from_numpy(found.astype(np.int64)).to(self.device)

        tokens = rows(lambda text: text)
        self.inputs = {"input_ids": tokens, "labels": tokens}
        if side != "joined":  # a text's first token is not learned from the text before it
            self.inputs |= {"labels": rows(lambda text: np.append(-100, text[1:])),
                            "position_ids": rows(lambda text: np.arange(len(text)))}

    def step(self) -> float:
        torch = self.torch
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(**self.inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def facts(self) -> dict[str, Any]:
        cuda = self.torch.cuda
        return {"device": cuda.get_device_name() if self.device == "cuda" else "cpu",
                "peak_bytes": cuda.max_memory_allocated() if self.device == "cuda" else 0}


def alone(side: str, job: Job, steps: int, profile: bool = False) -> dict[str, Any]:
    """Seconds of each timed step, losses, what the side says of its device, and its profile."""
    started = time.perf_counter()
    checkpoint = False
    runner: Any = None
    while True:
        try:
            runner = Ours(job) if side == "ours" else Theirs(job, side, checkpoint)
            losses = [runner.step() for _ in range(2)]
            break
        except RuntimeError as error:
            if side == "ours" or checkpoint or "out of memory" not in str(error):
                raise
        # Beyond the except block: the error's traceback holds the activations.
        torch = runner.torch if runner else sys.modules["torch"]
        runner, checkpoint = None, True
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ready, seconds = time.perf_counter() - started, []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(runner.step())
        seconds.append(time.perf_counter() - started)
    return {"job": job._asdict(), "seconds": seconds, "losses": losses, "ready_s": ready,
            "checkpointing": checkpoint if side != "ours" else job.remat, **runner.facts(),
            "profile": runner.profile() if profile and side == "ours" else None,
            "tokens_a_second": job.rows * job.length / statistics.median(seconds)}


def measure(name: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--alone", f"--jobs={name}", f"--sides={side}",
               f"--size={args.size}", f"--steps={args.steps}", f"--rows={args.rows}",
               f"--remat={args.remat}", f"--unroll={args.unroll}",
               *["--profile"] * args.profile]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False,
                         env={**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"})
    if out.returncode:
        return {"error": f"{shlex.join(command)}: {out.stderr[-3000:]}"}
    return dict(json.loads(out.stdout.splitlines()[-1]))


def main() -> None:
    args = flags()
    jobs, sides = args.jobs.split(","), args.sides.split(",")
    for what, asked, known in (("jobs", jobs, JOBS), ("sides", sides, SIDES)):
        if unknown := set(asked) - set(known):
            sys.exit(f"--{what}: no {', '.join(unknown)}; there are {', '.join(known)}")
    if args.alone:
        print(json.dumps(alone(sides[0], job_of(jobs[0], args), args.steps, args.profile)))
        return
    from rich.console import Console
    from rich.table import Table

    from glm_jax.files import write_json_atomic
    names = ("jax", "jaxlib", "torch", "transformers", "peft")
    versions = {name: importlib.metadata.version(name) for name in names}
    command = shlex.join(["python", *sys.argv])
    results: dict[str, dict[str, Any]] = {name: {} for name in jobs}
    for name in jobs:
        for side in sides:
            found = results[name][side] = measure(name, side, args)
            print(name, side, "failed" if "error" in found else
                  f"{found['tokens_a_second']:,.0f} tokens/s", file=sys.stderr, flush=True)
            if args.json:
                write_json_atomic(args.json, {"command": command, "versions": versions,
                                              "results": results})
    console = Console(soft_wrap=True, width=110)
    table = Table("", "side", "tokens/s", "ours is", "peak GB", "MFU", "recomputes", "ready after")
    for name, by_side in results.items():
        ours = by_side.get("ours", {})
        for side, found in by_side.items():
            if "error" in found:
                table.add_row(name, side, "failed")
                console.print(found["error"])
                continue
            rate = found["tokens_a_second"]
            flops, peak = ours.get("flops"), ours.get("peak_flops")
            tokens = found["job"]["rows"] * found["job"]["length"]
            mfu = f"{flops / tokens * rate / peak:.1%}" if flops and peak else ""
            ratio = f"{ours['tokens_a_second'] / rate:.2f}×" if "tokens_a_second" in ours else ""
            table.add_row(name, side, f"{rate:,.0f}", ratio, f"{found['peak_bytes'] / 1e9:.1f}",
                          mfu, str(found["checkpointing"]), f"{found['ready_s']:.0f} s")
    console.print(table)
    for name, by_side in results.items():
        if found := by_side.get("ours", {}).get("profile"):
            console.print(name, *(f"{kind} {ms:.2f} ms" for kind, ms in found["kinds"].items()),
                          sep=" · ")
            for ms, times, kernel, source in found["slowest"]:
                console.print(f"{ms:9.2f} ms {times:5d} × {kernel} ({source})", markup=False)
    console.print(command, *(f"{k} {v}" for k, v in versions.items()), sep=" · ")


if __name__ == "__main__":
    main()
