"""A trained model from whatever a user has: a run folder, a PEFT adapter, a Hugging Face folder."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from glm_jax.adapters.peft import adapter_folder, find_base, inspect_adapter, load_adapter
from glm_jax.convert.hf import load_model
from glm_jax.convert.released import read_json
from glm_jax.data.packing import Shape, shape_for
from glm_jax.data.records import Example, load_records
from glm_jax.data.tokenizer import Tokenizer, load_tokenizer, vocabulary_file
from glm_jax.errors import FETCH, UserError
from glm_jax.files import sampled_sha256, sha256_of_all
from glm_jax.infer.text import settings
from glm_jax.parallel.mesh import Rules, make_mesh
from glm_jax.tasks import Run, each
from glm_jax.tasks.classification import Classification, Texts
from glm_jax.train import setup
from glm_jax.train.checkpoint import COUNTERS, Checkpoints
from glm_jax.train.evaluation import predictor_of
from glm_jax.train.optimizer import make_optimizer, make_schedule
from glm_jax.train.step import by_path, init_state, judged

LENGTH = 512  # tokens of a text at most, where neither a run nor the tokenizer says less


class Trained(NamedTuple):
    """A model with its tokenizer.

    Attributes:
      labels: the classes by number; none for a language model.
      config: of the run, when it came from a run folder.
      lora_config: of the adapter that is attached, if any.
      base: the folder of the base model under the adapter.
      data: the hash of the data of the run.
    """

    model: Any
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    config: ConfigDict | None = None
    lora_config: Any = None
    base: str = ""
    data: str = ""

    @property
    def shape(self) -> Shape:
        """Of batches: texts are cut where training cut them."""
        if self.config is not None:
            batch = self.config.batch
            return shape_for(self.model.config, batch.rows, batch.length, batch.examples)
        length = min(LENGTH, int(self.tokenizer.config.get("model_max_length") or LENGTH))
        return shape_for(self.model.config, 8, length, 64)

    def splits(self) -> dict[str, list[Example]]:
        """The data of the run.

        Raises:
          UserError: when it is not what the run was trained on: the splits may have moved.
        """
        if self.config is None or not self.labels:
            raise UserError("only a run folder of a classification knows its data")
        task = Classification.load(self.config.task, self.tokenizer, self.shape)
        if task.fingerprint() != self.data:
            raise UserError(f"{self.config.task.train}: the data has changed since the run, and "
                            "what was trained on may be in the test split now: give --data")
        return task.examples

    def encode_texts(self, source: str, count: int) -> list[np.ndarray]:
        """Token ids of the first texts of a file or a named data set."""
        records = next(iter(load_records(source, label_field=None).values()))
        texts = [example.text for example in records[:count]]
        return [np.asarray(ids, np.int32)
                for ids in self.tokenizer.encode_batch(texts, length=self.shape.length)]


def hashes(model: str, adapter: str | None = None) -> dict[str, str]:
    """Of the files in a model's and an adapter's folder, of large ones by samples.

    With those of the base where the model is an adapter; a run's config.json has hashes of its own.
    """
    folders = {"model": Path(model)} | ({"adapter": adapter_folder(adapter)} if adapter else {})
    if (folders["model"] / "adapter_config.json").exists():
        folders["base"] = find_base(model)
    kinds = (".json", ".safetensors", ".bin", ".model", ".txt")
    return {f"{name} sha256": sha256_of_all(
        [path for path in sorted(folder.glob("*"))
         if path.suffix in kinds and path.name != "result.json"], sampled_sha256)
        for name, folder in folders.items()}


def mesh_for(folder: str | Path, asked: str = "", axis: str = "") -> tuple[Mesh, Rules]:
    """The mesh for the model of a folder, and the rules of its run: so that it need not fit on one.

    Args:
      asked: sizes by axis, `fsdp=4,tensor=2`.
      axis: where nothing is asked, all devices lie on it; without one as the run had them, if that
        takes all that are here, else on `fsdp`.

    Raises:
      UserError: for sizes that make no mesh here.
    """
    config, rules, own = Path(folder) / "config.json", {}, {}
    if config.is_file() and "identity" in (raw := read_json(config)):
        of_run = ConfigDict(raw["config"])
        own, rules = setup.mesh_sizes(of_run), of_run.mesh.rules.to_dict()
    if asked:
        return _asked_mesh(asked), rules
    if own and not axis:
        with contextlib.suppress(UserError):  # it was trained on more devices, or on others
            mesh = make_mesh(own)
            if mesh.size == jax.device_count():
                return mesh, rules
    return make_mesh({axis or "fsdp": -1}), rules


def _asked_mesh(asked: str) -> Mesh:
    sizes: dict[str, Any] = {}
    for part in asked.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if not equals or name in sizes:
            raise UserError(f"--mesh={asked}: each axis once with its size is wanted, such as "
                            "fsdp=4,tensor=2")
        sizes[name] = int(size) if size.removeprefix("-").isdecimal() else size
    try:
        return make_mesh(sizes)
    except UserError as error:  # the doors that load have no --config
        why = str(error).removeprefix("mesh: ").partition(" or simulate ")[0]
        raise UserError(f"--mesh={asked}: {why}") from None


def classifier(trained: Trained, mesh: Mesh) -> tuple[Classification, Run]:
    """The task and the compiled function that evaluation and prediction need.

    Raises:
      UserError: for a language model.
    """
    if trained.model.head != "sequence":
        raise UserError("this model does not classify texts; it was trained or exported with "
                        f"the head {trained.model.head!r}")
    task = Classification(None, trained.tokenizer, trained.shape, {}, trained.labels,
                          (1.0,) * len(trained.labels))
    return task, predictor_of(trained.model, task.predict, mesh)


def last_logits(trained: Trained, rows: Sequence[np.ndarray], mesh: Mesh) -> np.ndarray:
    """Logits at the last token of each row of token ids `[rows, classes or vocabulary]`."""
    run = predictor_of(trained.model, lambda model, batch: model.classify(batch), mesh)
    texts = Texts(list(rows), [0] * len(rows), (1.0,))
    return each(run, texts, trained.shape, trained.tokenizer.pad_id)


def load_trained(folder: str | Path, mesh: Mesh, step: int | None = None,
                 dtype: str | None = None) -> Trained:
    """Loads what is in `folder`, whichever kind of folder it is.

    Args:
      step: of a run folder; its best one by default, the last where none was evaluated yet.
      dtype: what to compute in; the run's own by default, float32 of any other folder.

    Raises:
      UserError: when it is none of the kinds, or damaged.
    """
    folder = Path(folder)
    if step is not None and not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: no run folder, so it has no step {step}")
    if (folder / "adapter_config.json").exists():
        return _adapter(folder, mesh, dtype or "float32")
    if not folder.exists():
        raise UserError(f"{folder}: no such folder. {FETCH}")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: neither a run folder nor an exported model or adapter: there "
                        "is no config.json and no adapter_config.json")
    raw = read_json(folder / "config.json")
    if "identity" in raw:
        return _run(folder, raw, mesh, step, dtype)
    model = load_model(folder, dtype=jnp.dtype(dtype or "float32"), mesh=mesh)
    return Trained(model, load_tokenizer(folder), labels_of(model))


def labels_of(model: Any) -> tuple[str, ...]:
    if model.head == "lm":
        return ()
    names = model.config.id2label or {i: f"LABEL_{i}" for i in range(model.config.num_labels)}
    return tuple(names[i] for i in sorted(names))


def _run(folder: Path, raw: dict[str, Any], mesh: Mesh, step: int | None,
         dtype: str | None) -> Trained:
    config, labels = ConfigDict(raw["config"]), tuple(raw["labels"])
    base, tokens = setup.folders(config)
    needed = [tokens] if config.model.init == "random" and config.model.config else [base, tokens]
    if missing := [place for place in needed if not place.is_dir()]:
        raise UserError(f"{folder}: it was trained on {missing[0]}, which is no folder here nor in "
                        "the project; start where it lies, or load an exported folder")
    was, now = raw["identity"], setup.model_hashes(config)
    if changed := [name for name in now if was.get(name, now[name]) != now[name]]:
        raise UserError(f"{config.model.path}: it has changed since {folder} was trained on it "
                        f"({changed[0]}); put the old one back, or load an exported folder")
    config.model.dtype = dtype or config.model.dtype
    tokenizer = setup.tokenizer_of(config)
    parts = setup.make_parts(config, "sequence" if labels else "lm", labels, mesh, tokenizer)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 2**31))
    state = init_state(by_path(parts.trainable), optimizer, mesh, config.optimizer.ema)
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        restored = checkpoints.restore({"state": state, "host": COUNTERS}, None,
                                       "best" if step is None else step)
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"{folder}: no checkpoint yet")
    model = parts.model(judged(restored[1]["state"]))
    return Trained(model, tokenizer, labels, config, parts.lora_config, config.model.path,
                   was["data sha256"])


def _adapter(folder: Path, mesh: Mesh, dtype: str) -> Trained:
    about, base = inspect_adapter(folder), find_base(folder)
    model = load_model(base, dtype=jnp.dtype(dtype), mesh=mesh, **about.base_fields)
    lora_config = load_adapter(model, folder)
    if ends := settings(folder, {}).get("eos_token_id"):  # where it was taught to end an answer
        model.config = setup.ending_at(model.config, ends)
    tokenizer = load_tokenizer(folder if vocabulary_file(folder) else base)
    return Trained(model, tokenizer, labels_of(model), None, lora_config, about.base)
