"""Our numbers against fixtures that the reference implementations wrote.

Each folder under $GLM_JAX_GOLDEN is one test: every array in it is checked under the name that it
has there, and an array that nothing asked for is a failure, so no case is passed over in silence.
A folder of a family that this library does not have yet is skipped by name.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
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
from glm_jax.data.bpe import GLM4_WORDS
from glm_jax.data.chat import encode_chat, render
from glm_jax.data.packing import left_padded
from glm_jax.errors import UserError
from glm_jax.infer.cache import empty_cache
from glm_jax.infer.generate import generate, prefill, step
from glm_jax.models import architecture_of, head_of
from glm_jax.nn.batch import Batch, causal_batch, visible
from glm_jax.nn.layers import scan
from glm_jax.nn.loss import classification_loss, cross_entropy

HERE = Path(__file__).resolve().parent
DEFAULTS = (HERE.parents[1] / "shared/golden/public", HERE / "golden")


def golden_root() -> Path:
    if "GLM_JAX_GOLDEN" in os.environ:
        return Path(os.environ["GLM_JAX_GOLDEN"])
    return next((folder for folder in DEFAULTS if folder.is_dir()), DEFAULTS[-1])


ROOT = golden_root()
FOLDERS = sorted(p for p in ROOT.iterdir() if p.is_dir()) if ROOT.is_dir() else []


def test_there_is_something_to_check():
    assert ROOT.is_dir(), f"GLM_JAX_GOLDEN: {ROOT} is not a folder"
    assert FOLDERS, f"GLM_JAX_GOLDEN: {ROOT} holds no folders"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder(folder: Path):
    assert any(folder.iterdir()), f"{folder} is empty"
    check = kind(folder)
    if isinstance(check, str):
        pytest.skip(f"{folder.name}: {check}")
    if isinstance(check, JsonCheck):
        return check.run(folder)
    inputs, outputs = Arrays(folder / "inputs.npz"), Arrays(folder / "outputs.npz")
    others = {p.name for p in folder.rglob("*.np*")} - {"inputs.npz", "outputs.npz"}
    assert not others, f"no check knows {others}"
    check(folder, inputs, outputs)
    assert not inputs.unread and not outputs.unread, \
        f"no check asked for {sorted(inputs.unread)} {sorted(outputs.unread)}"


Check = Callable[[Path, "Arrays", "Arrays"], None]


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
    if "expected.json" in holds:
        return JsonCheck(check_chat)
    return f"kind not supported yet: it holds {sorted(holds)}"


def unsupported_family(folder: Path) -> str | None:
    config = read_config(folder)
    try:
        architecture_of(config)
    except UserError as error:
        return f"family not supported yet: {error}"
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


# The tolerances of the fixtures' README.
def same(ours: Any, theirs: np.ndarray, what: str, mask: np.ndarray | None = None) -> None:
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, f"{what}: {ours.shape}, not {theirs.shape}"
    real = np.ones(theirs.shape[:1], bool) if mask is None else mask.astype(bool)
    assert real.any(), what
    np.testing.assert_allclose(ours[real], theirs[real], rtol=1e-4, atol=1e-4, err_msg=what)


def same_loss(ours: Any, theirs: np.ndarray, what: str) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=what)


def same_gradient(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    largest = np.abs(theirs).max()
    assert ours.shape == theirs.shape and largest > 0, what
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * largest, err_msg=what)


# --- models ---------------------------------------------------------------------------------

def check_model(folder: Path, inputs: Arrays, outputs: Arrays) -> None:
    model = load_model(folder)
    check_config(folder, model)
    for name, found in inputs.matching(r"(\w+)_input_ids"):
        if found[1] == "gen":
            continue
        batch, mask = case(inputs, found[1])
        check_forward(model, found[1], batch, mask, outputs)
        assert f"{found[1]}_logits" in outputs, f"{name} has no expected logits"
    check_losses(model, inputs, outputs)
    if "gen_tokens" in outputs:
        check_generation(model, inputs, outputs)
    check_dequantised(folder, model, outputs)


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


def case(inputs: Arrays, name: str) -> tuple[Batch, np.ndarray]:
    """The batch of a case, from whatever of mask, positions and segments is there."""
    tokens, mask = inputs[f"{name}_input_ids"], inputs.get(f"{name}_attention_mask")
    segments = inputs.get(f"{name}_segment_ids")
    if segments is None:
        segments = np.ones_like(tokens)
    real = np.ones_like(tokens) if mask is None else mask
    batch = jax.jit(causal_batch)(tokens, positions=inputs.get(f"{name}_position_ids"),
                                  segments=segments * real)
    return batch, real


def check_forward(model: Any, name: str, batch: Batch, mask: np.ndarray, outputs: Arrays) -> None:
    """Logits by the scanned layers; what lies between by the same layers, one by one."""
    hidden, logits = forward(model, batch)
    same(logits, outputs[f"{name}_logits"], f"{name}_logits",
         None if model.head == "sequence" else mask)
    if f"{name}_final_norm" in outputs:
        same(hidden, outputs[f"{name}_final_norm"], f"{name}_final_norm", mask)
    inner = list(outputs.matching(
        rf"{name}_((hidden|attn_out|mlp_out|cache_k|cache_v|router_\w+)_\d+)"))
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
            same(seen[found[1]], outputs[key], key, where)


@jax.jit
def forward(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    hidden, _ = model(batch)
    return hidden, classify(model, batch) if model.head == "sequence" else model.logits(hidden)


def classify(model: Any, batch: Batch) -> jax.Array:
    """One row of logits a text: at the rightmost token whose id is not the padding's, or last."""
    real = (batch.tokens != model.config.pad_token_id) | model.config.pools_last
    last = jnp.max(jnp.arange(real.shape[1]) * real, axis=1)
    return model.classify(dataclasses.replace(batch, pool_index=last[:, None]))[:, 0]


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
                stack.enter_context(listen(layer.self_attn, f"attn_out_{n}"))
                stack.enter_context(listen(layer.mlp, f"mlp_out_{n}"))
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

    home = sys.modules[type(model).__module__]
    assert home.scan is scan
    cache = empty_cache(model.config, *batch.tokens.shape, model.dtype)
    with mock.patch.object(home, "scan", unrolled):
        _, cache = model(batch, cache)
    for i in range(cache.keys.shape[0]):
        seen[f"cache_k_{i}"] = cache.keys[i].transpose(1, 0, 2, 3)
        seen[f"cache_v_{i}"] = cache.values[i].transpose(1, 0, 2, 3)
    return seen


def check_losses(model: Any, inputs: Arrays, outputs: Arrays) -> None:
    for key, found in outputs.matching(r"(\w+)_loss"):
        loss, gradients = loss_and_gradients(model, inputs, found[1])
        same_loss(loss, outputs[key], key)
        ours = released_tensors(gradients)
        for name, grad in outputs.matching(r"grad::(.+)"):
            same_gradient(ours[grad[1]], outputs[name], name)
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


def loss_and_gradients(model: Any, inputs: Arrays, name: str) -> tuple[np.ndarray, Any]:
    """The mean loss of a case by the head's rule, and a model that holds the gradients."""
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def run(state: Any) -> jax.Array:
        return mean_loss(nnx.merge(graphdef, state), inputs, name)

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
    batch, _ = case(inputs, name)
    own = f"{name}_labels"
    labels = jnp.asarray(inputs[own if own in inputs else "labels"], jnp.int32)
    if model.head == "sequence":
        return classification_loss(classify(model, batch)[:, None], labels[:, None],
                                   jnp.ones((len(labels), 1))) / len(labels)
    hidden, _ = model(batch)
    if model.head == "lm":
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    weights = (labels != -100).astype(jnp.float32)
    targets = jnp.maximum(labels, 0)
    total = (cross_entropy(hidden, model.vocabulary_kernel(), targets, weights)
             if model.head == "lm" else classification_loss(model.logits(hidden), targets, weights))
    return total / weights.sum()


def check_generation(model: Any, inputs: Arrays, outputs: Arrays) -> None:
    tokens, mask = inputs["gen_input_ids"], inputs.get("gen_attention_mask")
    expected, positions = outputs["gen_tokens"], inputs.get("gen_position_ids")
    if positions is not None:  # ours are counted over the real tokens
        ours = np.asarray(causal_batch(tokens, mask).positions)[:, 0]
        np.testing.assert_array_equal(ours[mask == 1], positions[mask == 1])
    count = expected.shape[1]
    out = generate(model, tokens, mask, max_new_tokens=count)
    np.testing.assert_array_equal(out.tokens, expected)
    if "gen_scores" not in outputs:
        return
    logits, cache = prefill(*nnx.split(model), tokens, mask, slots=tokens.shape[1] + count)
    logits, advance = [logits], jax.jit(step)
    for i in range(count - 1):
        now, cache = advance(model, jnp.asarray(expected[:, i], jnp.int32), cache)
        logits.append(now)
    same(np.stack(logits, axis=1), outputs["gen_scores"], "gen_scores")


# --- adapters -------------------------------------------------------------------------------

def check_adapter(folder: Path, inputs: Arrays, outputs: Arrays) -> None:
    model = load_model(folder / "base")
    check_config(folder / "base", model)
    batch, mask = case(inputs, "right")
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
    how: dict[str, Any] = {}
    if np.ndim(positions) == 3:  # two-dimensional positions: ChatGLM-6B
        how = {"blanks": [tokenizer.token_id(name) for name in ("[MASK]", "[gMASK]")],
               "start": tokenizer.token_id("<sop>")}
    batch = left_padded(tokenizer.encode_batch(texts), tokenizer.pad_id, **how)
    np.testing.assert_array_equal(batch.tokens, ids)
    np.testing.assert_array_equal(batch.positions.reshape(np.shape(positions)), positions)
    if mask is not None:
        np.testing.assert_array_equal(batch.segments, mask)
        return
    seen = visible(batch.segments, batch.order, batch.segments, batch.order)
    real = batch.segments > 0  # what padding sees is of no consequence
    np.testing.assert_array_equal(seen[real], ~np.array(hidden, bool)[:, 0][real])


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
