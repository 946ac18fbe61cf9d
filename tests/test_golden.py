"""Our numbers against fixtures that the reference implementations wrote.

Each folder under $GLM_JAX_GOLDEN is one test: every array in it is checked under the name that it
has there, and an array that nothing asked for is a failure, so no case is passed over in silence.
A folder of a family that this library does not have yet is skipped by name. What each comparison
found lies in `MEASURED`, which benchmarks/fidelity.py reads.
"""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import glm_jax
from glm_jax.adapters.lora import merge
from glm_jax.adapters.peft import adapter_tensors, load_adapter
from glm_jax.convert.hf import load_model, tensors
from glm_jax.convert.released import Released
from glm_jax.data import blanks
from glm_jax.data.bpe import GLM4_WORDS
from glm_jax.data.chat import encode_chat, render
from glm_jax.errors import UserError
from glm_jax.infer.cache import empty_cache
from glm_jax.infer.generate import generate, left_padded, prefill, step
from glm_jax.models import architecture_of, as_batch, chatglm6b, head_of
from glm_jax.models.glm2021 import choices_batch
from glm_jax.nn import compute
from glm_jax.nn.batch import Batch, blank_batch, causal_batch, visible
from glm_jax.nn.layers import apart, scan
from glm_jax.nn.loss import classification_loss, cross_entropy

HERE = Path(__file__).resolve().parent
DEFAULTS = (HERE.parents[1] / "shared/golden/public", HERE / "golden")


def golden_root() -> Path:
    if "GLM_JAX_GOLDEN" in os.environ:
        return Path(os.environ["GLM_JAX_GOLDEN"])
    return next((folder for folder in DEFAULTS if folder.is_dir()), DEFAULTS[-1])


ROOT = golden_root()
FOLDERS = sorted(p for p in ROOT.iterdir() if p.is_dir()) if ROOT.is_dir() else []


@pytest.fixture(autouse=True)
def rolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are scanned, as in a deep model: most of the time here goes into compiling them.

    So are those of a deep one when it generates; of the others they are apart, as always on a CPU.
    """
    monkeypatch.setattr(compute, "UNROLLED", 0)
    monkeypatch.setattr("glm_jax.infer.generate.apart", lambda model: (
        model if model.config.num_hidden_layers > 8 else apart(model)))


def test_layers_are_scanned_here():
    assert compute.Compute().unroll == 0


def test_there_is_something_to_check():
    assert ROOT.is_dir(), f"GLM_JAX_GOLDEN: {ROOT} is not a folder"
    assert FOLDERS, f"GLM_JAX_GOLDEN: {ROOT} holds no folders"


def test_a_refused_config_of_a_family_that_is_there_is_no_skip(tmp_path: Path):
    for name, fields in {"known": {"model_type": "glm", "num_hidden_layers": 1, "hidden_act": "x"},
                         "unknown": {"model_type": "glm5"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
        assert kind(tmp_path / name) is check_model


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder(folder: Path):
    if reason := run(folder):
        pytest.skip(f"{folder.name}: {reason}")


def run(folder: Path) -> str | None:
    """Checks a folder; why not, where it can't be yet."""
    assert any(folder.iterdir()), f"{folder} is empty"
    check = kind(folder)
    if isinstance(check, str):
        return check
    if isinstance(check, JsonCheck):
        return check.run(folder)
    if check is check_blanks:
        return check_blanks(folder)
    others = {p.name for p in folder.rglob("*.np*")} - {"inputs.npz", "outputs.npz"}
    compare(check, folder)
    if TABLES in others:
        check_tables(folder)
    # The released code of ChatGLM-6B with a constant where the number of layers belongs.
    for name in filter(LITERAL.fullmatch, others):
        literal = int(LITERAL.fullmatch(name)[1])
        compare(functools.partial(check, alpha_layers=literal // 2), folder, name)
    unknown = {name for name in others if name != TABLES and not LITERAL.fullmatch(name)}
    assert not unknown, f"no check knows {unknown}"
    return None


Check = Callable[..., None]
LATER = ("glm4v", "glm4_moe_lite", "glm_moe_dsa")
BLANKS = "blank_infilling.json"
TABLES, LITERAL = "rotary_tables.npz", re.compile(r"outputs_literal_alpha(\d+)\.npz")


def compare(check: Check, folder: Path, expected: str = "outputs.npz") -> None:
    """Runs a check on the arrays of a folder; it must ask for every one."""
    inputs, outputs = Arrays(folder / "inputs.npz"), Arrays(folder / expected)
    check(folder, inputs, outputs)
    assert not inputs.unread and not outputs.unread, \
        f"no check asked for {sorted(inputs.unread)} {sorted(outputs.unread)}"


@dataclasses.dataclass
class JsonCheck:
    """A check of what expected.json holds: it gets the folder and the contents."""

    run_on: Callable[[Path, Any], None]

    def run(self, folder: Path) -> None:
        self.run_on(folder, read_config(folder, "expected.json"))


def kind(folder: Path) -> "Check | JsonCheck | str":
    """How a folder is checked, or why it can't be yet: by what it holds, not by its name."""
    holds = {p.name for p in folder.iterdir()}
    if "adapter" in holds:
        with open(folder / "adapter/adapter_config.json") as file:
            adapter = json.load(file)
        unsupported = [name for name in ("use_dora",) if adapter.get(name)]
        if adapter.get("peft_type") != "LORA" or unsupported:
            return f"adapter not supported yet: {adapter.get('peft_type')} {unsupported}"
        return unsupported_family(folder / "base") or check_adapter
    if "config.json" in holds:
        return unsupported_family(folder) or check_model
    if holds & {"tokenizer.model", "ice_text.model"}:
        return JsonCheck(check_tokenizer)
    if BLANKS in holds:
        return check_blanks
    if "expected.json" in holds:
        return JsonCheck(check_chat)
    return f"kind not supported yet: it holds {sorted(holds)}"


def unsupported_family(folder: Path) -> str | None:
    """Why not, of what later work takes; whatever else is refused is a failure."""
    config = read_config(folder)
    if config.get("model_type") in LATER:
        with pytest.raises(UserError, match="model_type"):
            architecture_of(config)
        return f"family not supported yet: {config['model_type']}"
    if config.get("pre_seq_len"):
        return "a released prefix (P-tuning v2) is not supported yet"
    return None


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    with open(folder / name) as file:
        return json.load(file)


class Arrays:
    """The arrays of one file; remembers which were not read."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            self.all = {name: file[name] for name in file.files}
        assert self.all, f"{path} is empty"
        self.unread = set(self.all)

    def __contains__(self, name: str) -> bool:
        return name in self.all

    def __getitem__(self, name: str) -> np.ndarray:
        self.unread.discard(name)
        return self.all[name]

    def get(self, name: str) -> np.ndarray | None:
        return self[name] if name in self.all else None

    def matching(self, pattern: str) -> Iterator[tuple[str, re.Match[str]]]:
        for name in self.all:
            if found := re.fullmatch(pattern, name):
                yield name, found


class Measured(NamedTuple):
    """What one comparison found.

    Attributes:
      kind: `forward`, `loss`, `gradient`, `generation` (error: tokens that differ) or `round trip`
        (tensors that differ).
      what: the name of the array.
      error: the largest absolute one; of a gradient, as a share of its largest number.
      share: the largest share of what the tolerance allows.
      count: how many numbers, tokens or tensors were compared.
    """

    kind: str
    what: str
    error: float
    share: float
    count: int


MEASURED: list[Measured] = []


def close(kind: str, ours: Any, theirs: Any, what: str, rtol: float, atol: float,
          unit: float = 1) -> None:
    """Asserts |ours - theirs| <= atol + rtol * |theirs|, and notes the error in units of `unit`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    error = np.abs(ours - theirs)
    MEASURED.append(Measured(kind, what, float(error.max() / unit),
                             float((error / (atol + rtol * np.abs(theirs))).max()), error.size))
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=what)


# The tolerances of the fixtures' README.
def same(ours: Any, theirs: np.ndarray, what: str, mask: np.ndarray | None = None) -> None:
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, f"{what}: {ours.shape}, not {theirs.shape}"
    real = np.ones(theirs.shape[:1], bool) if mask is None else mask.astype(bool)
    assert real.any(), what
    close("forward", ours[real], theirs[real], what, rtol=1e-4, atol=1e-4)


def same_loss(ours: Any, theirs: np.ndarray, what: str, summed: float = 0) -> None:
    """`summed` is the sum of the terms' sizes where the loss is no mean: what float32 rounds of."""
    close("loss", ours, theirs, what, rtol=0, atol=1e-5 + summed * np.finfo(np.float32).eps)


def same_gradient(ours: np.ndarray, theirs: np.ndarray, what: str, of_all: float = 0) -> None:
    """`of_all` is the largest of all gradients of the loss.

    Some are zero but for rounding: a key's bias moves all scores of a query alike.
    """
    largest = np.abs(theirs).max()
    if largest < 1e-6 * of_all:
        assert ours.shape == theirs.shape and np.abs(ours).max() < 1e-6 * of_all, what
        return
    assert ours.shape == theirs.shape and largest > 0, what
    close("gradient", ours, theirs, what, rtol=1e-3, atol=1e-5 * largest, unit=largest)


# --- models ---------------------------------------------------------------------------------

def check_model(folder: Path, inputs: Arrays, outputs: Arrays, **fields: Any) -> None:
    model = load_model(folder, **special_ids(folder, inputs), **fields)
    check_config(folder, model)
    for _, found in inputs.matching(r"(?:(\w+)_)?input_ids"):
        name = found[1] or ""
        if name in ("gen_source", "choice"):
            continue
        batch, mask = case(model, inputs, name, outputs)
        expected = f"{name}_prefill" if name == "gen" else name
        if not check_forward(model, expected, batch, mask, outputs) and name != "gen":
            width = max(inputs.all[other].shape[1] for other, _ in inputs.matching(".*input_ids"))
            check_padding(model, batch, mask, width)
    if not read_config(folder).get("quantization_bit"):
        check_export(folder, model)
    check_losses(model, inputs, outputs)
    if "gen_tokens" in outputs:
        check_generation(model, inputs, outputs)
    check_dequantised(folder, model, outputs)
    if "choice_logprobs" in outputs:
        check_choices(model, inputs, outputs)


def check_export(folder: Path, model: Any) -> None:
    """What we would write is what was read: the same names, and the same bytes."""
    released = Released(folder)
    theirs = {name: released.read(name) for name in released.shapes}
    ours = dict(tensors(model))
    assert ours.keys() == theirs.keys()
    differ = [name for name, array in theirs.items()
              if (ours[name].dtype, ours[name].shape) != (array.dtype, array.shape)
              or ours[name].tobytes() != array.tobytes()]
    MEASURED.append(Measured("round trip", folder.name, len(differ), len(differ), len(theirs)))
    assert not differ, differ


def special_ids(folder: Path, inputs: Arrays) -> dict[str, int]:
    """The ids that GLM (2021) leaves to its tokenizer, as the positions show them."""
    if architecture_of(read_config(folder)).name != "glm2021":
        return {}
    starts, blanks = set(), set()
    for name, found in inputs.matching(r"(\w+)_position_ids"):
        tokens = inputs.all[f"{found[1]}_input_ids"]
        for row, (place, block) in zip(tokens, inputs.all[name], strict=True):
            at = int(np.argmax(block == 1))
            starts.add(int(row[at]))
            blanks.add(int(row[place[at]]))
    assert len(starts) == 1 and 1 <= len(blanks) <= 3
    names = ("mask_token_id", "gmask_token_id", "smask_token_id")
    return {"sop_token_id": starts.pop(), **dict(zip(names, sorted(blanks), strict=False))}


def check_config(folder: Path, model: Any) -> None:
    """Both spellings of the config give the same, and what we write gives it again."""
    raw = read_config(folder)
    architecture = architecture_of(raw)
    assert model.head == head_of(raw, architecture)
    spellings = [model.config.to_dict()]
    if (folder / "config_v5.json").exists():
        spellings.append(read_config(folder, "config_v5.json"))
    for spelling in spellings:
        assert architecture_of(spelling) is architecture
        again = architecture.config.from_dict(spelling)
        for field, value in vars(model.config).items():
            if field not in ("extra", "id2label"):  # names of labels; num_labels counts them
                assert getattr(again, field) == value, field


def case(model: Any, inputs: Arrays, name: str, outputs: Arrays | None = None
         ) -> tuple[Batch, np.ndarray]:
    """The batch of a case from its tokens, and `[batch, length]` which of them are real.

    Mask and positions, where the reference gives them, must be those of our batch.
    """
    def get(kind: str) -> np.ndarray | None:
        key = named(name, kind)
        here = inputs.get(key)
        return outputs.get(key) if here is None and outputs is not None else here

    tokens, mask, positions = get("input_ids"), get("attention_mask"), get("position_ids")
    segments, types, length = get("segment_ids"), get("token_type_ids"), tokens.shape[1]
    places = None if positions is None else positions[..., :length]
    real, seen = np.ones_like(tokens), None
    if mask is not None and mask.ndim == 1:  # the length of what sees itself both ways
        at = np.arange(length)
        seen = (at < mask[:, None, None]) | (at <= at[:, None])
        real = ((at < mask[:, None]) | (places[:, 1] > 0)).astype(int)
    elif mask is not None and mask.ndim == 4:  # True: may not be seen; 1: may
        seen = (~mask if mask.dtype == bool else mask.astype(bool))[:, 0, :length, :length]
        real = seen[:, -1].astype(int)
    elif mask is not None:
        real = mask
    if model.config.streams == 1:
        batch = jax.jit(functools.partial(as_batch, model.config))(tokens, real)
        if segments is not None:
            batch = causal_batch(tokens, segments=segments * real)
        if positions is not None:
            batch = dataclasses.replace(batch, positions=positions[:, None])
        return dataclasses.replace(batch, token_types=types), real
    batch = as_batch(model.config, tokens, real)
    own = real.astype(bool)
    if places is not None:
        for stream in range(2):
            np.testing.assert_array_equal(batch.positions[:, stream][own], places[:, stream][own])
    if seen is not None:
        ours = visible(batch.segments, batch.order, batch.segments, batch.order)
        np.testing.assert_array_equal(ours[own], seen[own])
    return batch, real


def named(name: str, kind: str) -> str:
    return f"{name}_{kind}" if name else kind


def check_forward(model: Any, name: str, batch: Batch, mask: np.ndarray, outputs: Arrays) -> bool:
    """Logits by the scanned layers; what lies between by the same layers, one by one.

    Returns whether anything was expected.
    """
    asked = len(outputs.unread)
    hidden, logits = forward(model, batch)
    if named(name, "logits") in outputs:
        same(logits, outputs[named(name, "logits")], named(name, "logits"),
             None if model.head == "sequence" else mask)
    for kind in ("final_norm", "last_hidden_state"):
        if named(name, kind) in outputs:
            same(hidden, outputs[named(name, kind)], named(name, kind), mask)
    if named(name, "pooler_output") in outputs:
        same(model.pool(hidden[:, 0]), outputs[named(name, "pooler_output")], name)
    if named(name, "word_embeddings") in outputs:
        same(model.embed_tokens(batch.tokens, model.dtype),
             outputs[named(name, "word_embeddings")], name)
    kinds = r"hidden|mems|attn_out|mlp_out|attn_block|cache_k|cache_v|router_\w+"
    inner = list(outputs.matching(rf"{named(name, '')}(({kinds})_\d+)"))
    if inner:
        seen = trace(model, batch)
        for key, found in inner:
            where = mask
            if found[1].startswith("cache"):
                if outputs.all[key].shape[:2] == mask.T.shape:  # [length, batch, heads, head_dim]
                    where = mask.T
                else:  # [batch, heads, length, head_dim]
                    where = np.repeat(mask[:, None], outputs.all[key].shape[1], axis=1)
                    seen[found[1]] = seen[found[1]].transpose(1, 2, 0, 3)
            elif found[1].startswith("router"):  # [batch * length, …]
                where = mask.reshape(-1)
            same(seen[found[1].replace("mems", "hidden")], outputs[key], key, where)
    return len(outputs.unread) < asked


def check_padding(model: Any, batch: Batch, mask: np.ndarray, width: int) -> None:
    """Where nothing is expected: padding on the right, and other tokens in it, change nothing."""
    hidden, logits = forward(model, batch)
    more, length = width - mask.shape[1], mask.shape[1]
    wider = jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)]), batch)
    tokens = jnp.where(wider.segments > 0, wider.tokens, 1)
    here, there = forward(model, dataclasses.replace(wider, tokens=tokens))
    same(here[:, :length], hidden, "hidden states with other padding", mask)
    if model.head == "sequence":
        same(there, logits, "logits with other padding")
    else:
        same(there[:, :length], logits, "logits with other padding", mask)


@jax.jit
def forward(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    hidden, _ = model(batch)
    return hidden, classify(model, batch) if model.head == "sequence" else model.logits(hidden)


def classify(model: Any, batch: Batch) -> jax.Array:
    """One row of logits a text: at the rightmost token whose id is not the padding's, or as told.

    ChatGLM's is the last, BERT's the first.
    """
    real = batch.tokens != model.config.pad_token_id
    real |= getattr(model.config, "pools_last", False)
    at = jnp.max(jnp.arange(real.shape[1]) * real, axis=1)
    if architecture_of(model.config.to_dict()).pool == "first":
        at = jnp.argmax(batch.segments > 0, axis=1)
    return model.classify(dataclasses.replace(batch, pool_index=at[:, None]))[:, 0]


LISTENED = {"self_attn": "attn_out", "mlp": "mlp_out", "attention_layernorm": "attn_block"}


@jax.jit
def trace(model: Any, batch: Batch) -> dict[str, jax.Array]:
    """Runs the layers unrolled, with a cache, and notes what goes in and comes out of each."""
    seen: dict[str, jax.Array] = {}
    first = 0  # layer of the stack

    def unrolled(layers: nnx.Module, call: Any, x: jax.Array, *per_layer: Any, **_: Any) -> Any:
        nonlocal first
        graphdef, state = nnx.split(layers)
        outs = []
        for i in range(jax.tree.leaves(state)[0].shape[0]):
            layer, inputs = jax.tree.map(lambda a, i=i: a[i], (state, per_layer))
            layer, n = nnx.merge(graphdef, layer), first + i
            seen[f"hidden_{n}"] = x
            with contextlib.ExitStack() as stack:
                for part, kind in LISTENED.items():
                    if hasattr(layer, part):
                        stack.enter_context(listen(getattr(layer, part), f"{kind}_{n}"))
                if hasattr(layer.mlp, "gate"):
                    router = layer.mlp.gate
                    stack.enter_context(listen(router, f"router_weights_{n}"))
                    stack.enter_context(listen(router, f"router_logits_{n}", "logits"))
                x, out = call(layer, x, *inputs)
            outs.append(out)
        first += len(outs)
        seen[f"hidden_{first}"] = x
        return x, jax.tree.map(lambda *a: jnp.stack(a), *outs)

    def listen(module: nnx.Module, name: str, method: str = "__call__") -> Any:
        real = getattr(type(module), method)

        def call(self: Any, *args: Any) -> Any:
            out = real(self, *args)
            if self is module:
                if name.startswith("router_weights"):  # by expert, as the reference sorts them
                    order = jnp.argsort(out[1], axis=-1)
                    weights, experts = (jnp.take_along_axis(a, order, axis=-1) for a in out)
                    seen[name] = weights.reshape(-1, weights.shape[-1])
                    seen[name.replace("weights", "indices")] = experts.reshape(seen[name].shape)
                elif name.startswith("router"):
                    seen[name] = out.reshape(-1, out.shape[-1])
                else:
                    seen[name] = out[0] if isinstance(out, tuple) else out
            return out
        return mock.patch.object(type(module), method, call)

    homes = [module for name, module in sys.modules.items()
             if name.startswith("glm_jax.") and getattr(module, "scan", None) is scan]
    cache = empty_cache(model.config, *batch.tokens.shape, model.dtype)
    with contextlib.ExitStack() as stack:
        for home in homes:
            stack.enter_context(mock.patch.object(home, "scan", unrolled))
        _, cache = model(batch, cache)
    assert seen
    for i in range(cache.keys.shape[0]):
        seen[f"cache_k_{i}"] = cache.keys[i].transpose(1, 0, 2, 3)
        seen[f"cache_v_{i}"] = cache.values[i].transpose(1, 0, 2, 3)
    return seen


def check_losses(model: Any, inputs: Arrays, outputs: Arrays) -> None:
    ours: dict[str, np.ndarray] = {}
    largest = max((np.abs(outputs.all[name]).max() for name, _ in outputs.matching("grad::.+")),
                  default=0)
    found_all = [*outputs.matching(r"(?:(\w+)_)?loss|grad::(.+)")]
    for (key, found), after in zip(found_all, [*found_all[1:], None], strict=False):
        if found[2]:  # of the loss that stands before it in the file
            same_gradient(ours[found[2]], outputs[key], key, largest)
            continue
        wanted = after is not None and after[1][2] is not None
        loss, gradients = loss_and_gradients(model, inputs, found[1] or "", wanted)
        summed = 0.0
        if model.head == "base":
            summed = sum(np.abs(outputs[name]).sum() for name in ("last_hidden_state",
                                                                  "pooler_output"))
        same_loss(loss, outputs[key], key, summed)
        ours = released_tensors(gradients) if wanted else {}
    if not {"loss_regression", "loss_multilabel"} & set(outputs.all):
        return
    side = next(side for side in ("right", "left") if f"{side}_input_ids" in inputs)
    logits = np.asarray(glm_jax.forward(model, inputs[f"{side}_input_ids"],
                                        inputs.get(f"{side}_attention_mask")), np.float64)
    if "loss_regression" in outputs:
        loss = np.mean((logits - inputs["labels_regression"]) ** 2)
        same_loss(loss, outputs["loss_regression"], "loss_regression")
    if "loss_multilabel" in outputs:
        labels = inputs["labels_multilabel"]
        loss = np.mean(np.logaddexp(0, logits) - labels * logits)
        same_loss(loss, outputs["loss_multilabel"], "loss_multilabel")


def check_dequantised(folder: Path, model: Any, outputs: Arrays) -> None:
    """Unpacked weights are exact, and as near to what was packed as so many bits allow."""
    ours = dict(tensors(model))
    for key, found in outputs.matching(r"dequant::(.+)"):
        np.testing.assert_array_equal(ours[found[1]], outputs[key], key)
    for key, found in outputs.matching(r"original::(.+)"):
        largest = np.abs(outputs[key]).max(axis=1, keepdims=True)
        step = largest / (2 ** (read_config(folder)["quantization_bit"] - 1) - 1)
        # the scale is rounded to float16, which moves the outermost values
        limit = step / 2 + largest * 2**-10
        assert (np.abs(ours[found[1]] - outputs[key]) <= limit).all(), key
    assert "quantization_bit" not in model.config.to_dict()


def loss_and_gradients(model: Any, inputs: Arrays, name: str, wanted: bool
                       ) -> tuple[np.ndarray, Any]:
    """The loss of a case by the head's rule, and where wanted a model that holds the gradients."""
    graphdef, state = nnx.split(model)

    def run(state: Any) -> jax.Array:
        return mean_loss(nnx.merge(graphdef, state), inputs, name)

    if not wanted:
        return jax.device_get(jax.jit(run)(state)), None
    run = jax.jit(jax.value_and_grad(run))
    loss, gradients = jax.device_get(run(state))
    return loss, nnx.merge(graphdef, gradients)


def released_tensors(model: Any) -> dict[str, np.ndarray]:
    """A model's tensors by Hugging Face's names, and with adapters also by PEFT's."""
    found = dict(tensors(model))
    adapters = adapter_tensors(model)
    if adapters:
        found |= {f"base_model.model.{name}": array for name, array in found.items()}
    return found | adapters


def mean_loss(model: Any, inputs: Arrays, name: str) -> jax.Array:
    batch, mask = case(model, inputs, name)
    hidden, _ = model(batch)
    if model.head == "base":  # nothing is learned there: any sum has gradients
        return (jnp.sum(hidden * inputs["proj"] * mask[..., None])
                + jnp.sum(model.pool(hidden[:, 0])))
    own = named(name, "labels")
    labels = jnp.asarray(inputs[own if own in inputs else "labels"], jnp.int32)
    if model.head == "sequence":
        return classification_loss(classify(model, batch)[:, None], labels[:, None],
                                   jnp.ones((len(labels), 1))) / len(labels)
    # GLM (2021) predicts a token at its own place: its inputs are shifted already.
    if model.head == "lm" and architecture_of(model.config.to_dict()).name != "glm2021":
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    weights = (labels != -100).astype(jnp.float32)
    targets = jnp.maximum(labels, 0)
    total = (cross_entropy(hidden, model.vocabulary_kernel(), targets, weights)
             if model.head == "lm" else classification_loss(model.logits(hidden), targets, weights))
    return total / weights.sum()


def check_generation(model: Any, inputs: Arrays, outputs: Arrays) -> None:
    batch, mask = case(model, inputs, "gen")
    tokens, expected = inputs["gen_input_ids"], outputs["gen_tokens"]
    length, count = tokens.shape[1], expected.shape[1]
    if model.config.streams == 1:  # generation counts them over the real tokens
        ours = np.asarray(causal_batch(tokens, mask).positions)
        np.testing.assert_array_equal(ours[:, 0][mask == 1],
                                      np.asarray(batch.positions)[:, 0][mask == 1])
    out = generate(model, tokens, mask, max_new_tokens=count)
    differ = int((out.tokens != expected).sum())
    MEASURED.append(Measured("generation", "gen_tokens", differ, differ, expected.size))
    np.testing.assert_array_equal(out.tokens, expected)
    if "gen_scores" not in outputs:
        return
    positions, seen = inputs.get("gen_position_ids"), inputs.get("gen_attention_mask")
    logits, cache = prefill(*nnx.split(model), tokens, mask, slots=length + count)
    logits, advance = [logits], jax.jit(step)
    for i in range(count - 1):
        now, cache = advance(model, jnp.asarray(expected[:, i], jnp.int32), cache)
        logits.append(now)
        if positions is not None and positions.shape[-1] > length:
            np.testing.assert_array_equal(cache.positions, positions[..., length + i])
    same(np.stack(logits, axis=1), outputs["gen_scores"], "gen_scores")
    if "gen_source_input_ids" in inputs:  # what the reference made the prompt and the mask from
        source, own = inputs["gen_source_input_ids"], inputs["gen_source_attention_mask"]
        np.testing.assert_array_equal(tokens[:, :-1] * own, source * own)
        np.testing.assert_array_equal(mask[:, :-1], own)
        assert (tokens[:, -1] == model.config.start_token_id).all()
        used = np.arange(length + count - 1)
        ours = np.asarray(visible(*(cache.segments, cache.order) * 2))[:, used][:, :, used]
        rows = np.asarray(cache.segments)[:, used] > 0
        np.testing.assert_array_equal(ours[rows], seen[:, 0][:, used][:, :, used][rows] == 1)


def check_choices(model: Any, inputs: Arrays, outputs: Arrays) -> None:
    """Choices that stand behind one source there stand behind a source each here."""
    tokens, seen = inputs["choice_input_ids"], inputs["choice_attention_mask"][:, 0] == 1
    positions, names = inputs["choice_position_ids"], sorted(
        name for name, _ in inputs.matching(r"choice_ids_\d+"))
    source, = inputs["choice_source"]
    choices = [inputs[name] for name in names]
    batch = choices_batch(model.config, source, choices)
    for row, name in enumerate(names):
        places = inputs[name.replace("ids", "indices")]
        used = np.concatenate((np.arange(len(source)), places))
        here = slice(len(used))
        np.testing.assert_array_equal(batch.tokens[row, here], tokens[0, used])
        np.testing.assert_array_equal(batch.positions[row, :, here], positions[0][:, used])
        ours = np.asarray(visible(*(batch.segments, batch.order) * 2))[row, here, here]
        np.testing.assert_array_equal(ours, seen[0][used][:, used])
        assert not np.delete(seen[0][places], used, axis=1).any()  # nothing else is seen there
    scores = jax.jit(lambda model, batch: model.score(batch))(model, batch)
    same(scores[None], outputs["choice_logprobs"], "choice_logprobs")


def check_tables(folder: Path) -> None:
    """The frequencies and the rotary tables of ChatGLM-6B, computed in float32 and float16."""
    tables = Arrays(folder / TABLES)
    config = chatglm6b.ChatGLM6BConfig.from_dict(read_config(folder))
    rounded = chatglm6b.inverse_frequencies(config)
    np.testing.assert_array_equal(rounded.astype(np.float32), tables["inv_freq_used"])
    np.testing.assert_allclose(rounded, tables["inv_freq_fp32"], rtol=1e-3)
    assert (rounded != tables["inv_freq_fp32"]).any()
    for dtype, kind in ((jnp.float32, "fp32model"), (jnp.float16, "fp16model")):
        for which, name in enumerate((f"cos_{kind}", f"sin_{kind}")):
            positions = np.arange(len(tables[name]))[None]
            ours = np.tile(chatglm6b.rotary_table(positions, rounded, dtype)[which][0], (1, 2))
            np.testing.assert_allclose(ours.astype(np.float32), tables[name], rtol=0,
                                       atol=1e-6 if dtype == jnp.float32 else 5e-4, err_msg=name)
    assert not tables.unread, tables.unread


def check_blanks(folder: Path) -> None:
    """Pre-training data: how a piece is put together, and whole batches, draw by draw."""
    with open(folder / BLANKS) as file:
        cases = json.load(file)
    ids, ends = cases.pop("special_ids"), cases.pop("sentence_end_token_ids")
    special = blanks.Special(ids["ENC"], ids["eos"], ids["MASK"], ids["gMASK"], ids["sMASK"],
                             ids["sop"], ids["eop"], ids["dBLOCK"], frozenset(ends))
    np.testing.assert_allclose(blanks.Mixture().length_weights, cases.pop("block_length_weights"),
                               rtol=1e-12)
    for one in cases.pop("sample_spans"):
        spans = blanks.place_spans(one["span_lengths"], one["total_length"],
                                   random.Random(one["rng_seed"]), one["offset"])
        assert spans == list(map(tuple, one["spans"]))
    for one in cases.pop("assemble"):
        own = {"generation": "gmask", "gap_sentence": "smask"} if one["task_mask"] else {}
        piece = blanks.assemble(np.array(one["tokens"]),
                                list(map(tuple, one["spans_in_emission_order"])),
                                getattr(special, own.get(one["task"], "mask")), special)
        check_piece(piece, one["out_tokens"], one["out_targets"], one["out_loss_mask"],
                    one["out_position_ids"], one["out_sep"])
    for one in cases.pop("construct"):
        texts = [blanks.Text(np.array(s["text"]), np.array(s["loss_mask"])) for s in one["samples"]]
        mode, pieces = blanks.construct(texts, blanks.Mixture(**one["kwargs"]), special,
                                        one["max_seq_length"], random.Random(one["rng_seed"]))
        assert mode == one["mode"]
        expected = [one[name] for name in ("text", "target", "loss_mask", "position_id",
                                           "attention_mask")]
        for piece, *arrays in zip(pieces, *expected, strict=True):
            check_piece(piece, *arrays)
    assert not cases, f"no check knows {sorted(cases)}"


def check_piece(piece: Any, tokens: Any, targets: Any, weights: Any, positions: Any, sep: int
                ) -> None:
    """A piece against the reference's arrays, which may be padded with zeros."""
    for ours, theirs in ((piece.tokens, tokens), (piece.targets, targets), (piece.weights, weights),
                         (piece.positions, positions)):
        padding = np.shape(theirs)[-1] - len(piece.tokens)
        whole = np.pad(ours, [(0, 0)] * (ours.ndim - 1) + [(0, padding)])
        np.testing.assert_array_equal(whole, theirs)
    causal = np.arange(len(piece.tokens)) - sep + 1
    np.testing.assert_array_equal(piece.order, np.maximum(causal, 0))


# --- adapters -------------------------------------------------------------------------------

def check_adapter(folder: Path, inputs: Arrays, outputs: Arrays) -> None:
    model = load_model(folder / "base")
    check_config(folder / "base", model)
    batch, mask = case(model, inputs, "right")
    same(forward(model, batch)[1], outputs["base_logits"], "base_logits", mask)
    load_adapter(model, folder / "adapter")
    check_forward(model, "right", batch, mask, outputs)
    check_losses(model, inputs, outputs)
    if "gen_tokens" in outputs:
        check_generation(model, inputs, outputs)
    merge(model)
    check_forward(model, "right", batch, mask, outputs)
    ours = released_tensors(model)
    for name, found in outputs.matching(r"merged::(.+)"):
        same(ours[found[1]], outputs[name], name)


# --- tokenizers and chat --------------------------------------------------------------------

def read_case(case: dict[str, Any], known: str, optional: str = "") -> list[Any]:
    """The fields of a case in the order of `known`; one that no check knows is a failure."""
    names = known.split()
    extra = case.keys() - {*names, *optional.split()}
    assert not extra, f"no check asked for {sorted(extra)}"
    return [case[name] for name in names] + [case.get(name) for name in optional.split()]


def check_tokenizer(folder: Path, expected: dict[str, Any]) -> None:
    tokenizer = glm_jax.load_tokenizer(folder)
    special, size, texts, batch, pattern, chats, prompt = read_case(
        expected, "special_ids vocab_size encode", "batch pattern chat chat_prompt")
    assert texts and (chats or prompt), "nothing to check"
    assert tokenizer.vocab_size == size
    assert {name: tokenizer.token_id(name) for name in special} == special
    if pattern is not None:
        assert pattern == GLM4_WORDS
    for case in texts:
        check_text(tokenizer, case, special)
    if batch is not None:
        check_batch(tokenizer, batch)
    for case in chats or []:
        query, history, role, ids, text = read_case(case, "query history role input_ids decoded")
        messages = history + [{"role": role, "content": query}]
        found, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
        assert found == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    if prompt is not None:
        check_rounds(tokenizer, prompt)


def check_text(tokenizer: Any, case: dict[str, Any], special: dict[str, int]) -> None:
    text, ids, framed, decoded, pair, same_ids = read_case(
        case, "text ids ids_with_special decoded", "pair sp_ids")
    assert same_ids in (None, ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == decoded
    if pair is not None:  # the fixtures pair a text with its own first two tokens
        other = tokenizer.encode("x", add_special_tokens=False)
        ours = tokenizer.encode("", pair="x")
        end = ours[len(tokenizer.encode("")) + len(other):]
        assert ours == tokenizer.encode("") + other + end
        assert framed + ids[:2] + end == pair
    if set(ids) & set(special.values()):
        # The released code takes special tokens from any text; so do we, but only when told.
        assert tokenizer.encode(text, False, parse_special=True) == ids
        assert tokenizer.encode(text, parse_special=True) == framed
        safe = tokenizer.encode(text, add_special_tokens=False)
        assert not set(safe) & set(special.values())
        assert tokenizer.decode(safe) == decoded
        return
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode(text) == framed
    assert tokenizer.encode_batch([text, text]) == [framed, framed]


def check_batch(tokenizer: Any, case: dict[str, Any]) -> None:
    texts, ids, positions, mask, hidden = read_case(
        case, "texts input_ids position_ids", "attention_mask attention_mask_true_is_masked")
    assert (mask is None) != (hidden is None)
    tokens, real = left_padded(tokenizer.encode_batch(texts))
    batch = causal_batch(tokens, real)
    if np.ndim(positions) == 3:  # two-dimensional positions: ChatGLM-6B
        blanks = [(tokenizer.token_id(name),) for name in ("[MASK]", "[gMASK]")]
        batch = blank_batch(tokens, real, tokenizer.token_id("<sop>"), blanks, unstarted=True)
    np.testing.assert_array_equal(np.where(real, tokens, tokenizer.pad_id), ids)
    np.testing.assert_array_equal(batch.positions.reshape(np.shape(positions)), positions)
    if mask is not None:
        np.testing.assert_array_equal(batch.segments, mask)
        return
    seen = visible(batch.segments, batch.order, batch.segments, batch.order)
    own = real > 0  # what padding sees is of no consequence either
    np.testing.assert_array_equal(seen[own], ~np.array(hidden, bool)[:, 0][own])


def check_rounds(tokenizer: Any, case: dict[str, Any]) -> None:
    history, query, prompt, ids = read_case(case, "history query prompt ids")
    turns = [text for pair in history for text in pair] + [query]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text}
                for i, text in enumerate(turns)]
    rendered = render(messages, template=tokenizer.version, add_generation_prompt=True)
    assert rendered.replace("[gMASK]", "").replace("<sop>", "").removeprefix("sop") == prompt
    assert encode_chat(tokenizer, messages, add_generation_prompt=True)[0] == ids


def check_chat(folder: Path, expected: list[dict[str, Any]]) -> None:
    assert expected
    for case in expected:
        template, name, messages, tools, prompt, how, rendered = read_case(
            case, "template case messages tools add_generation_prompt kwargs rendered")
        assert render(messages, tools, template=template, add_generation_prompt=prompt,
                      **how) == rendered, f"{template} {name}"
