"""PEFT's folders: against its fixtures, and with peft itself on either side."""

import dataclasses
import functools
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from glm_jax.adapters import partition
from glm_jax.adapters.lora import LoRAConfig, attach, merged
from glm_jax.adapters.peft import (
    find_base,
    inspect_adapter,
    load_adapter,
    save_adapter,
    written_targets,
)
from glm_jax.adapters.targets import linears
from glm_jax.convert.hf import load_model, save_model, tensors
from glm_jax.errors import UserError
from glm_jax.nn.batch import causal_batch

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("GLM_JAX_GOLDEN") or ROOT.parent / "shared/golden/public")
LABELS = {0: "差评", 1: "好评", 2: "一般"}
TOKENS = np.random.default_rng(0).integers(2, 90, (4, 9))
TOKENS[1, 5:] = TOKENS[3, 2:] = 0
MASK = (TOKENS > 0).astype(np.int64)


def outputs(model, tokens=TOKENS, mask=MASK):
    """Logits, at every token or, of a sequence classifier, at the last real one."""
    every = np.asarray(_logits(*nnx.split(model), tokens, mask))
    last = np.max(np.arange(tokens.shape[1]) * mask, axis=1)
    return every[np.arange(len(tokens)), last] if model.head == "sequence" else every


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens, mask):
    model = nnx.merge(graphdef, state)
    return model.logits(model(causal_batch(tokens, mask))[0])


def same(ours, theirs, mask=MASK):
    real = np.ones(len(ours), bool) if ours.ndim == 2 else mask.astype(bool)
    assert np.abs(ours[real]).max() > 0.5  # not a comparison of zeros
    np.testing.assert_allclose(ours[real], theirs[real], rtol=1e-4, atol=1e-4)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def trained(make, shake):
    """`trained(head)`: a model with adapters that do something, and their config."""
    def make_trained(head="sequence", **fields):
        labels = {} if head == "lm" else {"id2label": LABELS}
        config = LoRAConfig(**{"r": 4, "lora_alpha": 6,
                               "modules_to_save": () if head == "lm" else ("score",), **fields})
        model = make(head, **labels)
        attach(model, config)
        shake(model)
        return model, config
    return make_trained


@pytest.fixture
def base(make, tmp_path):
    """A base folder without a head, as a pre-trained one is."""
    save_model(make(), tmp_path / "base")
    return tmp_path / "base"


# --- against the fixtures ---------------------------------------------------------------------

@pytest.mark.parametrize("name", ["peft_lora_glm", "peft_rslora_glm"])
def test_fixture(name, tmp_path):
    folder = GOLDEN / name
    if not folder.is_dir():
        pytest.skip(f"no fixture {name} in {GOLDEN}")
    given, expected = (np.load(folder / f"{kind}.npz") for kind in ("inputs", "outputs"))
    model = load_model(folder / "base")
    tokens, mask, labels = (given[f"right_{n}"] for n in ("input_ids", "attention_mask", "labels"))
    same(outputs(model, tokens, mask), expected["base_logits"], mask)
    config = load_adapter(model, folder / "adapter")
    same(outputs(model, tokens, mask), expected["right_logits"], mask)
    same(outputs(merged(model), tokens, mask), expected["right_logits"], mask)

    graphdef, trainable, frozen = partition(model, config.trainable)

    @jax.jit
    @jax.value_and_grad
    def step(trainable):
        whole = nnx.merge(graphdef, trainable, frozen, copy=True)
        found = jax.nn.log_softmax(whole.logits(whole(causal_batch(tokens, mask))[0])[:, :-1])
        wanted = labels[:, 1:]
        picked = jnp.take_along_axis(found, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * (wanted >= 0)) / jnp.sum(wanted >= 0)

    loss, gradient = step(trainable)
    np.testing.assert_allclose(loss, expected["right_loss"], atol=1e-5)
    gradients = {".".join(map(str, p)): np.asarray(v.get_value())
                 for p, v in nnx.to_flat_state(gradient)}
    names = [n for n in expected.files if n.startswith("grad::")]
    assert len(names) == 2 * len(config.target_modules)
    for full in names:
        module, letter = re.fullmatch(r".*layers\.0\.(.*)\.lora_([AB])\.weight", full).groups()
        modules = ([f"mlp.{name}_proj" for name in ("gate", "up")] if "gate_up" in module
                   else [module])
        paths = [f"layers.{name}.adapter.lora_{letter.lower()}" for name in modules]
        ours = np.concatenate([gradients[path][0].T for path in paths if path in gradients])
        np.testing.assert_allclose(ours, expected[full], rtol=1e-3,
                                   atol=1e-5 * np.abs(expected[full]).max(), err_msg=full)
    kernels = dict(tensors(merged(model)))
    for full in (n for n in expected.files if n.startswith("merged::")):
        np.testing.assert_allclose(kernels[full.removeprefix("merged::")], expected[full],
                                   rtol=1e-5, atol=1e-5, err_msg=full)

    save_adapter(model, tmp_path / "adapter", config, base="base")
    weights = "adapter_model.safetensors"  # byte by byte what peft wrote
    assert (tmp_path / "adapter" / weights).read_bytes() == \
        (folder / "adapter" / weights).read_bytes()


# --- with peft --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, "好": 2, "差": 3}, "<eos>")
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), pad_token="<pad>", eos_token="<eos>",
    ).save_pretrained(folder)
    return contents(folder)


@pytest.mark.parametrize("head", ["sequence", "token", "lm"])
def test_the_lines_in_the_readme_load_it_in_peft(head, trained, base, tokenizer_files, tmp_path,
                                                 monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    model, config = trained(head, lora_dropout=0.1)
    save_adapter(model, "adapter", config, base="base", files=tokenizer_files)
    code = Path("adapter/README.md").read_text(encoding="utf-8")
    code = code.split("```python\n")[1].split("```")[0]
    assert 'dtype="float32"' in code  # or PyTorch computes in what the base is kept in
    names: dict = {}
    exec(code, names)
    theirs = names["model"].eval()
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(MASK)).logits
    same(outputs(model), logits.numpy())
    assert names["tokenizer"]("好")["input_ids"] == [2]
    if head != "lm":
        assert theirs.config.id2label == LABELS
        assert theirs.config.label2id == {name: n for n, name in LABELS.items()}


@pytest.mark.parametrize("head", ["sequence", "lm"])
def test_what_peft_writes_loads_here(head, make, base, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind, task = {"sequence": ("SequenceClassification", "SEQ_CLS"),
                  "lm": ("CausalLM", "CAUSAL_LM")}[head]
    labels = {"num_labels": 3} if head == "sequence" else {}
    theirs = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(base, **labels)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", task_type=task, use_rslora=True)).eval()
    for name, weight in theirs.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(weight, std=0.3)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(MASK)).logits
    theirs.save_pretrained(tmp_path / "theirs")

    ours = load_model(base, head=head, **({"id2label": LABELS} if labels else {}))
    config = load_adapter(ours, tmp_path / "theirs")
    assert (config.r, config.lora_alpha, config.use_rslora) == (3, 5, True)
    assert config.modules_to_save == (("score",) if labels else ())
    same(outputs(ours), logits.numpy())


def test_a_pickled_file_loads_and_runs_no_code(trained, make, tmp_path):
    torch = pytest.importorskip("torch")
    model, config = trained("lm")
    save_adapter(model, tmp_path / "adapter", config, base="base")
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither adapter_model\.safetensors nor"):
        load_adapter(make(), tmp_path / "adapter")
    pickled = tmp_path / "adapter/adapter_model.bin"
    torch.save({name: torch.tensor(array) for name, array in weights.items()}, pickled)
    ours = make()
    load_adapter(ours, tmp_path / "adapter")
    np.testing.assert_array_equal(outputs(ours), outputs(model))
    torch.save({"x": Touch(tmp_path / "touched")}, pickled)
    with pytest.raises(UserError, match=r"adapter_model\.bin: damaged, or not only tensors"):
        load_adapter(make(), tmp_path / "adapter")
    assert not (tmp_path / "touched").exists()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# --- the folder -------------------------------------------------------------------------------

def test_equal_runs_give_equal_bytes_and_loading_gives_them_back(trained, make, tmp_path,
                                                                 monkeypatch):
    for where, base in (("one", Path("assets/nano")), ("two", tmp_path / "two/assets/nano"),
                        ("three", "./assets/nano/")):
        (tmp_path / where / "assets/nano").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / where)
        model, config = trained(target_modules=("v_proj", "q_proj", "down_proj"),
                                use_rslora=True, lora_dropout=0.05)
        save_adapter(model, f"runs/{where}", config, base=base, files={"tokenizer.json": b"{}"})
    one, two = contents(tmp_path / "one/runs/one"), contents(tmp_path / "two/runs/two")
    assert set(one) == {"adapter_config.json", "adapter_model.safetensors", "labels.json",
                        "README.md", "tokenizer.json"}
    assert one == two == contents(tmp_path / "three/runs/three")
    assert not any(str(tmp_path).encode() in content for content in one.values())
    about = inspect_adapter(tmp_path / "one/runs/one")
    assert about.base == "assets/nano" and about.head == "sequence" and about.id2label == LABELS
    assert find_base(tmp_path / "one/runs/one") == Path("assets/nano")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the base 'assets/nano' is not a folder"):
        find_base("one/runs/one")

    again = make("sequence", id2label=LABELS)
    loaded = load_adapter(again, "one/runs/one")
    assert loaded == dataclasses.replace(config,
                                         target_modules=tuple(sorted(config.target_modules)))
    np.testing.assert_array_equal(outputs(again), outputs(model))
    save_adapter(again, "again", loaded, base="assets/nano", files={"tokenizer.json": b"{}"})
    assert contents("again") == one


def test_a_base_elsewhere_is_written_relative_to_the_run(trained, tmp_path, monkeypatch):
    model, config = trained("lm")
    (tmp_path / "here").mkdir()
    (tmp_path / "models/nano").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    save_adapter(model, "adapter", config, base=tmp_path / "models/nano")
    assert inspect_adapter("adapter").base == "../models/nano"
    assert find_base("adapter").samefile(tmp_path / "models/nano")


def test_a_base_in_the_project_is_found_from_anywhere(trained, tmp_path, monkeypatch):
    model, config = trained("lm")
    save_adapter(model, tmp_path / "adapter", config, base="glm_jax/adapters")
    monkeypatch.chdir(tmp_path)
    assert find_base("adapter") == ROOT / "glm_jax/adapters"


@pytest.mark.parametrize(("targets", "written"), [
    (("v_proj", "q_proj"), ["q_proj", "v_proj"]),
    ("all-linear", ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]),
    (r".*\.[qv]_proj", r".*\.[qv]_proj"),
    (("layers.self_attn.q_proj",), ["q_proj"]),
    (r"layers\.self_attn\..*", ["k_proj", "o_proj", "q_proj", "v_proj"]),
    (r".*\.mlp\..*", r".*\.mlp\..*"),
])
def test_targets_are_written_so_that_peft_finds_the_same(trained, tmp_path, targets, written):
    model, config = trained(target_modules=targets)
    save_adapter(model, tmp_path / "adapter", config, base="base")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text()
                      )["target_modules"] == written


def test_layers_that_pytorch_does_not_name_are_refused(tiny):
    model = nnx.merge(*nnx.split(tiny(model_type="conv_rnn", head="sequence", num_attention_heads=2,
                                      num_hidden_layers=1)), copy=True)
    attach(model, LoRAConfig())
    with pytest.raises(UserError, match="has no name of its own in PyTorch"):
        written_targets(model, LoRAConfig())


def test_one_layer_is_a_stack_too(make, shake, tmp_path):
    model, again = make("sequence", num_hidden_layers=1), make("sequence", num_hidden_layers=1)
    config = LoRAConfig(r=2, modules_to_save=("score", "norm"))
    attach(model, config)
    shake(model)
    save_adapter(model, tmp_path / "adapter", config, base="base")
    load_adapter(again, tmp_path / "adapter")
    np.testing.assert_array_equal(outputs(again), outputs(model))


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, metadata={"format": "pt"})


def edit_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: edit_weights(f, lambda a: a.pop(f"{Q0}.lora_B.weight")),
     r"missing: \S*layers\.0\.self_attn\.q_proj\.lora_B\.weight \[32, 4\]"),
    (lambda f: edit_weights(f, lambda a: a.update({f"{Q0}.lora_magnitude_vector": np.ones(3)})),
     r"unexpected: \S*q_proj\.lora_magnitude_vector \[3\]"),
    (lambda f: edit_config(f, r=5), r"wrong shape: \S* is \[4, \d+\], \S.* want \[5, \d+\]"),
    (lambda f: edit_weights(f, lambda a: a.update({"base_model.model.score.weight":
                                                   np.ones((2, 32), np.float32)})),
     r"wrong shape: \S*score\.weight is \[2, 32\], .* want \[3, 32\]"),
    (lambda f: edit_weights(f, lambda a: a.update({f"{Q0}.lora_A.weight":
                                                   a[f"{Q0}.lora_A.weight"].astype(np.int32)})),
     r"no floating-point numbers: \S*q_proj\.lora_A\.weight is int32"),
    (lambda f: edit_config(f, use_dora=True), "use_dora=True is not supported"),
    (lambda f: edit_config(f, layers_to_transform=[0]), r"layers_to_transform=\[0\] is not"),
    (lambda f: edit_config(f, rank_pattern={"q_proj": 2}), "rank_pattern="),
    (lambda f: edit_config(f, bias="all"), "bias='all' is not supported"),
    (lambda f: edit_config(f, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    (lambda f: edit_config(f, invented_later=7), "invented_later=7 is not supported"),
    (lambda f: edit_config(f, peft_type="IA3"), "peft_type 'IA3' is not supported"),
    (lambda f: edit_config(f, task_type="CAUSAL_LM"), "task_type CAUSAL_LM needs a model with head "
     "'lm'; this one's is 'sequence'"),
    (lambda f: edit_config(f, target_modules=["query_key_value"]), "matches no linear layer"),
    (lambda f: edit_config(f, target_modules=None), "target_modules is empty"),
    (lambda f: edit_config(f, lora_alpha="x"), "lora_alpha must be a number"),
    (lambda f: edit_config(f, lora_dropout=None), "lora_dropout must be a number"),
    (lambda f: os.truncate(f / "adapter_model.safetensors", 700), "damaged or truncated"),
    (lambda f: (f / "adapter_config.json").write_text('{"r": 8,'), r"json:1: broken JSON"),
    (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    (shutil.rmtree, "no such folder"),
])
def test_a_damaged_folder_is_named_and_the_model_left_alone(trained, make, tmp_path, damage,
                                                            message):
    model, config = trained()
    folder = tmp_path / "adapter"
    save_adapter(model, folder, config, base="base")
    damage(folder)
    target = make("sequence", id2label=LABELS)
    with pytest.raises(UserError, match=message) as error:
        load_adapter(target, folder)
    assert str(folder) in str(error.value)
    assert not any(hasattr(layer, "adapter") for layer in linears(target).values())


@pytest.mark.parametrize("fields", [{"hidden_size": 40}, {"num_hidden_layers": 2},
                                    {"num_hidden_layers": 4}])
def test_another_base_is_refused(trained, make, tmp_path, fields):
    model, config = trained()
    save_adapter(model, tmp_path / "adapter", config, base="base")
    with pytest.raises(UserError, match=r"does not fit this model:\n  (missing|unexp|wrong)"):
        load_adapter(make("sequence", id2label=LABELS, **fields), tmp_path / "adapter")


def test_nothing_is_left_half_written(trained, tmp_path, monkeypatch):
    model, config = trained()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        save_adapter(model, tmp_path / "file/adapter", config, base="base")
    save_adapter(model, tmp_path / "runs/adapter", config, base="base")
    before = contents(tmp_path / "runs/adapter")
    monkeypatch.setattr(Path, "write_text", _full_disk)
    with pytest.raises(UserError, match="can't be written: No space left"):
        save_adapter(model, tmp_path / "runs/adapter", config, base="other")
    assert contents(tmp_path / "runs/adapter") == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["adapter"]


def _full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")
