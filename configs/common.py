"""What all experiments share: every field that the trainer reads, with its default."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from glm_jax.errors import UserError


def get_config() -> ConfigDict:
    return ConfigDict({
        "seed": 0,
        "steps": 0,  # of the whole run; 0: from epochs
        "epochs": 1.0,
        "max_skipped": 20,  # steps in a row with a loss that is not finite, before the run stops
        "trainable": ("adapter", "score"),  # patterns of parameter paths
        "model": {
            "path": "glm_jax/assets/glm-nano-zh",  # a Hugging Face folder
            "tokenizer": "",  # a folder; model.path when empty
            "init": "pretrained",  # or "random": the config of model.path, or model.config
            "config": {},
            "dtype": "float32",  # or "bfloat16": what is computed in; trained parameters: float32
            "attention": "auto",  # its kernel: of the devices, or reference cudnn splash
            "remat": "none",  # what is computed again, not kept: none attention dots full offload
            "unroll": 8,  # so many layers, or fewer, are no loop: quicker, but long to compile
            "matmul_precision": "",  # of JAX; "BF16_BF16_F32": rounds what products take to bf16
        },
        "adapter": {
            "name": "lora",  # or "" for none
            "r": 8, "alpha": 16, "dropout": 0.0, "rslora": False,
            "targets": ("all-linear",),  # all but heads and routed experts; or names
        },
        "batch": {
            "rows": 8, "length": 256,  # tokens a row; several examples are packed into it
            "examples": 32,  # at most, in a row
            "accumulate": 1,  # micro-batches that the rows are taken in
        },
        "optimizer": {
            "name": "adamw",  # or "adafactor": mean squares by rows and columns only
            "state_dtype": "float32",  # of the moments; or bfloat16, int8
            "offload": False,  # whether they lie in the host's memory between steps
            "learning_rate": 1e-3, "schedule": "linear", "final": 0.0,
            "warmup": 0.1,  # steps, or below 1 a fraction of them
            "weight_decay": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip_norm": 1.0,
            "ema": 0.0,  # decay of the running average of the parameters that is judged; 0: none
        },
        "eval": {
            "every": 100,  # steps; at the end too
            "metric": "accuracy",  # on dev: what early stopping and the choice of the best look at
            "patience": 0,  # evaluations without a better one before the run stops; 0: never
        },
        "checkpoint": {"every": 0},  # steps; besides one with each evaluation
        "profile": {"start": 10, "steps": 0},  # a trace of so many steps, behind the first `start`
        "log": {"every": 10, "tensorboard": True, "wandb_project": ""},
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1, "expert": 1,
                 "cpu_devices": 0,  # so many simulated devices on a CPU
                 "rules": {}},  # rows in place of those of parallel/mesh.py, {"mlp": ("tensor",)}
    })


def variants(argument: str, known: Sequence[str]) -> list[str]:
    """The variants named behind the colon of `--config=file.py:a,b`, in the order of `known`."""
    names = [name for name in argument.split(",") if name]
    for name in names:
        if name not in known:
            raise UserError(f"--config=…:{name}: no such variant; there are {', '.join(known)}")
    return [name for name in known if name in names]
