"""A random ChatGLM3-6B-shaped checkpoint to Hugging Face's `glm` and back, beside `cp`.

    python benchmarks/conversion.py scratch --json=conversion.json

Needs 38 GB of disk at full size; what it writes is removed at the end. Each step is a process of
its own, whose peak memory (VmHWM) counts everything resident: the interpreter, JAX, mapped files.
`cp` copies what is converted, once before and once after it; the disk is synced ahead of each.
`import` loads the checkpoint over eight simulated devices, whose memory is the host's here.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sides import resident  # noqa: E402

STEPS = ("write", "glm", "back", "hash", "import")
DEVICES = 8


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder that is not there yet")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=13696)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=65024)
    parser.add_argument("--max-shard-size", default="2GB")
    parser.add_argument("--steps", default=",".join(STEPS), help="some of %(default)s")
    parser.add_argument("--keep", action="store_true", help="leave the folders there")
    parser.add_argument("--json", default="", help="where to write the figures")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- each of these is a process -----------------------------------------------------------------

def write(args: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint: bfloat16 of random sign and fraction, between 2^-7 and 2^-5."""
    import ml_dtypes
    import numpy as np
    from flax import nnx

    from glm_jax.convert.hf import Conversion
    from glm_jax.convert.parameters import flat, planned
    from glm_jax.convert.written import size_in_bytes
    from glm_jax.models import architecture_of

    raw = {"model_type": "chatglm", "num_layers": args.layers, "hidden_size": args.hidden,
           "ffn_hidden_size": args.inner, "num_attention_heads": args.heads, "kv_channels": 128,
           "padded_vocab_size": args.vocabulary, "multi_query_group_num": 2, "seq_length": 8192}
    architecture = architecture_of(raw)
    config = architecture.config.from_dict(raw)
    abstract = flat(nnx.eval_shape(lambda: architecture.model(config, "lm", rngs=nnx.Rngs(0))))
    random, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)

    class Random:
        def __init__(self, shape: tuple[int, ...]):
            self.shape = shape

        def dtype(self, place: tuple[int, ...]) -> np.dtype:
            return dtype

        def at(self, place: tuple[int, ...]) -> np.ndarray:
            shape = self.shape[len(place):]
            bits = np.frombuffer(random.bytes(2 * int(np.prod(shape))), np.uint16)
            return ((bits & 0x80FF) | 0x3C00).view(dtype).reshape(shape[::-1]).T

    parameters = {path: Random(param.get_value().shape) for path, param in abstract.items()}
    tensors = planned(architecture.weights(config, "lm"), parameters, None, dtype, args.layers)
    Conversion(config, "lm", dtype, tensors, "chatglm").write(
        args.scratch / "chatglm", size_in_bytes(args.max_shard_size))
    return {"GB": sum(tensor.bytes for tensor in tensors) / 1e9, "tensors": len(tensors)}


def convert(source: str, to: str, architecture: str) -> Callable[[argparse.Namespace],
                                                                 dict[str, Any]]:
    def step(args: argparse.Namespace) -> dict[str, Any]:
        from glm_jax.convert.hf import conversion
        from glm_jax.convert.written import size_in_bytes
        conversion(args.scratch / source, architecture).write(
            args.scratch / to, size_in_bytes(args.max_shard_size))
        return {}
    return step


def hashes(args: argparse.Namespace) -> dict[str, Any]:
    """Whether every tensor came back: its name, shape, type and bytes."""
    from glm_jax.convert.released import Released

    def of(folder: Path) -> dict[str, str]:
        released, found = Released(folder), {}
        for name in sorted(released.shapes):
            array = released.read(name)
            digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
            digest.update(array.reshape(-1).view("u1").data)
            found[name] = digest.hexdigest()
        return found

    one, two = of(args.scratch / "chatglm"), of(args.scratch / "back")
    return {"tensors": len(one), "equal": one == two,
            "sha256 of all": hashlib.sha256(json.dumps(one).encode()).hexdigest()}


def sharded(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    import jax.numpy as jnp

    from glm_jax.convert.hf import load_model
    from glm_jax.convert.parameters import flat
    from glm_jax.parallel.mesh import make_mesh
    model = load_model(args.scratch / "chatglm", dtype=jnp.bfloat16,
                       mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    arrays = [param.get_value() for param in flat(model).values()]
    jax.block_until_ready(arrays)
    held = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    return {"arrays GB": held / 1e9}


CHILDREN = {"write": write, "glm": convert("chatglm", "glm", "glm"),
            "back": convert("glm", "back", "chatglm"), "hash": hashes, "import": sharded}


# --- and this starts them -----------------------------------------------------------------------

def run(step: str, args: argparse.Namespace) -> dict[str, Any]:
    source = {"glm": "chatglm", "back": "glm"}.get(step)
    before = copy(args.scratch, source) if source else 0.0
    seconds, done = timed([sys.executable, __file__, *sys.argv[1:], f"--child={step}"])
    found = {"seconds": seconds, **json.loads(done.splitlines()[-1])}
    return found | {"cp seconds": [before, copy(args.scratch, source)]} if source else found


def copy(scratch: Path, source: str) -> float:
    seconds, _ = timed(["cp", "-r", str(scratch / source), str(scratch / "copy")])
    shutil.rmtree(scratch / "copy")
    return seconds


def timed(command: list[str]) -> tuple[float, str]:
    """The seconds that a command takes, and what it prints."""
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    args = flags()
    if args.child:
        start = time.perf_counter()
        found = CHILDREN[args.child](args)
        print(json.dumps({"own seconds": time.perf_counter() - start,
                          "peak GB": resident() * 2**20 / 1e9,
                          "CPU seconds": time.process_time(), **found}))
        return
    args.scratch.mkdir(parents=True, exist_ok=args.keep)
    figures: dict[str, Any] = {"load at the start": os.getloadavg()[0]}
    try:
        for step in args.steps.split(","):
            figures[step] = run(step, args)
            print(step, *(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in figures[step].items()), sep="  ", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    finally:
        if not args.keep:
            shutil.rmtree(args.scratch)
    if not figures.get("hash", {}).get("equal", True):
        sys.exit("the tensors that came back are not those that were written")


if __name__ == "__main__":
    main()
