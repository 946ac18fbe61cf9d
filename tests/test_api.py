"""The public face: what `import glm_jax` gives, and what it costs."""

import json
import subprocess
import sys

import numpy as np
import pytest

import glm_jax
from glm_jax.adapters.lora import LoRAConfig, attach
from glm_jax.adapters.peft import save_adapter
from glm_jax.convert.hf import flat, save_model
from glm_jax.data.tokenizer import Tokenizer, tokenizer_files, train_tokenizer
from glm_jax.infer.beam import Beams, beam_search
from glm_jax.infer.generate import generate as generate_tokens
from glm_jax.parallel.mesh import make_mesh

TOKENS = np.random.default_rng(0).integers(1, 67, (2, 6))


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["这家酒店很好", "房间太小，服务很差"] * 50 + [chr(c) * 3 for c in range(19968, 20100)]
    return Tokenizer(tokenizer_files(train_tokenizer(texts, 320)))


@pytest.fixture(scope="module")
def folder(tiny, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("api") / "model"
    glm_jax.save_pretrained(tiny(vocab_size=320), out, tokenizer)
    return out


@pytest.fixture(scope="module")
def model(folder):
    return glm_jax.from_pretrained(folder)


def test_importing_is_quick_and_lists_what_there_is():
    code = ("import time; start = time.process_time(); import glm_jax, sys; "
            "seconds = time.process_time() - start; heavy = "
            "{'jax', 'flax', 'numpy', 'torch', 'transformers', 'tokenizers'} & set(sys.modules); "
            "import json; print(json.dumps([seconds, sorted(heavy), dir(glm_jax)]))")
    runs = [json.loads(subprocess.run([sys.executable, "-c", code], check=True, text=True,
                                      capture_output=True).stdout) for _ in range(3)]
    assert not runs[0][1]
    assert min(seconds for seconds, *_ in runs) < 0.05
    assert set(glm_jax.__all__) <= set(runs[0][2])


def test_every_name_is_there_and_no_other():
    for name in glm_jax.__all__:
        assert callable(getattr(glm_jax, name))
    with pytest.raises(AttributeError, match="no attribute 'from_pretraned'"):
        glm_jax.from_pretraned  # noqa: B018


def test_a_saved_model_comes_back_with_its_tokenizer(folder, model, tiny, tokenizer):
    for path, param in flat(tiny(vocab_size=320)).items():
        np.testing.assert_array_equal(param.get_value(), flat(model)[path].get_value())
    assert glm_jax.load_tokenizer(folder).encode("酒店") == tokenizer.encode("酒店")


def test_the_six_lines_of_the_readme(folder):
    model = glm_jax.from_pretrained(folder, dtype="bfloat16")
    tokenizer = glm_jax.load_tokenizer(folder)
    logits = glm_jax.forward(model, [tokenizer.encode("这家酒店")])
    text = glm_jax.generate(model, "这家酒店", tokenizer=tokenizer, max_new_tokens=4)
    assert logits.shape == (1, len(tokenizer.encode("这家酒店")), 320)
    assert isinstance(text, str)


def test_texts_and_tokens_generate_the_same(model, tokenizer):
    texts = ["这家酒店很好", "房间"]
    ids = tokenizer.encode_batch(texts)
    assert len(ids[0]) != len(ids[1])
    out = glm_jax.generate(model, ids, max_new_tokens=6, eos_token_id=())
    wanted = [tokenizer.decode(row.tolist()) for row in out.tokens]
    kwargs = {"tokenizer": tokenizer, "max_new_tokens": 6, "eos_token_id": ()}
    assert glm_jax.generate(model, texts, **kwargs) == wanted
    assert [glm_jax.generate(model, text, **kwargs) for text in texts] == wanted
    np.testing.assert_array_equal(out.tokens[1:], generate_tokens(
        model, np.array([ids[1]]), max_new_tokens=6).tokens)


def test_beams_and_the_cache_are_options(model, tokenizer):
    greedy = glm_jax.generate(model, TOKENS, max_new_tokens=5, eos_token_id=()).tokens
    small = glm_jax.generate(model, TOKENS, max_new_tokens=5, eos_token_id=(),
                             cache_dtype="float32", cache_length=11).tokens
    np.testing.assert_array_equal(small, greedy)
    wide, _ = beam_search(model, TOKENS, max_new_tokens=5, beams=Beams(4, 0.5))
    found = glm_jax.generate(model, TOKENS, max_new_tokens=5, eos_token_id=(), num_beams=4,
                             length_penalty=0.5)
    np.testing.assert_array_equal(found.tokens, wide.tokens)
    assert (found.tokens != greedy).any()
    for wrong, message in (({"num_beams": 2, "temperature": 1.0}, "don't go together"),
                           ({"num_beams": 0}, "num_beams must be at least 1"),
                           ({"cache_length": 10}, "don't fit into a cache of length 10"),
                           ({"cache_dtype": "int8"}, "dtype must be one of")):
        with pytest.raises(glm_jax.UserError, match=message):
            glm_jax.generate(model, TOKENS, max_new_tokens=5, **wrong)


def test_it_stops_where_the_config_says(model, folder):
    free = glm_jax.generate(model, TOKENS, max_new_tokens=5, eos_token_id=())
    stop = int(free.tokens[0, 1])
    assert glm_jax.generate(model, TOKENS, max_new_tokens=5, eos_token_id=stop).lengths[0] == 2
    raw = json.loads((folder / "config.json").read_text())
    for ids in (stop, [3, stop]):
        (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": ids}))
        again = glm_jax.from_pretrained(folder)
        assert glm_jax.generate(again, TOKENS, max_new_tokens=5).lengths[0] == 2
    (folder / "config.json").write_text(json.dumps(raw))


def test_forward_pools_at_the_rightmost_token_that_is_not_padding(tiny):
    """By the id, not by the mask: as Hugging Face does."""
    model, tokens = tiny("sequence"), TOKENS.copy()
    tokens[1, 4:] = 0
    logits = glm_jax.forward(model, tokens)
    assert logits.shape == (2, 3)
    np.testing.assert_allclose(logits[1:], glm_jax.forward(model, tokens[1:, :4]), rtol=1e-4)
    assert np.abs(logits[0] - glm_jax.forward(model, tokens[:1, :4])[0]).max() > 1e-3
    unpadded = tiny("sequence", pad_token_id=None)
    np.testing.assert_allclose(glm_jax.forward(unpadded, TOKENS[:1])[0], logits[0], rtol=1e-4)
    with pytest.raises(glm_jax.UserError, match="no pad_token_id"):
        glm_jax.forward(unpadded, TOKENS)


def test_a_mesh_by_its_sizes(folder, model):
    spread = glm_jax.from_pretrained(folder, mesh={"fsdp": 4, "tensor": 2})
    assert spread.norm.scale[...].sharding.mesh == make_mesh({"fsdp": 4, "tensor": 2})
    np.testing.assert_allclose(glm_jax.forward(spread, TOKENS), glm_jax.forward(model, TOKENS),
                               rtol=1e-3, atol=1e-4)


def test_an_adapter_is_put_on_top_and_merged_on_saving(tiny, tmp_path):
    from flax import nnx
    base = tiny()
    save_model(base, tmp_path / "base")
    model = glm_jax.from_pretrained(tmp_path / "base", head="sequence",
                                    id2label={0: "差", 1: "好", 2: "中"})
    config = LoRAConfig(r=2, target_modules=("q_proj", "down_proj"), modules_to_save=("score",))
    attach(model, config)
    for path, param in flat(model).items():
        if path.endswith("lora_b"):
            param.set_value(param.get_value() + 0.3)
    nnx.update(model, nnx.state(model))
    wanted = glm_jax.forward(model, TOKENS)
    save_adapter(model, tmp_path / "adapter", config, base="base")
    again = glm_jax.from_pretrained(tmp_path / "base", adapter=tmp_path)  # a run folder: its own
    assert again.config.id2label == {0: "差", 1: "好", 2: "中"}
    np.testing.assert_allclose(glm_jax.forward(again, TOKENS), wanted, rtol=1e-4, atol=1e-5)
    glm_jax.save_pretrained(again, tmp_path / "merged")
    merged = glm_jax.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(glm_jax.forward(merged, TOKENS), wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(glm_jax.forward(again, TOKENS), wanted, rtol=1e-4, atol=1e-5)
    plain = glm_jax.from_pretrained(tmp_path / "base", head="sequence", num_labels=3)
    assert np.abs(glm_jax.forward(plain, TOKENS) - wanted).max() > 1e-2


@pytest.mark.parametrize(("call", "message"), [
    (lambda f, m: glm_jax.from_pretrained(f, dtype="int8"), "dtype must be one of float32"),
    (lambda f, m: glm_jax.from_pretrained(f, dtype="flaot32"), "not 'flaot32'"),
    (lambda f, m: glm_jax.from_pretrained(f, dtyp="float32"), "'dtyp' is no field .* 'dtype'"),
    (lambda f, m: glm_jax.from_pretrained(f, mesh={"fsdp": 64}), "needs 64 devices"),
    (lambda f, m: glm_jax.from_pretrained(f, mesh={"fsd": 2}), "unknown axis 'fsd'"),
    (lambda f, m: glm_jax.from_pretrained(f, adapter=f / "no"), "no: no such folder"),
    (lambda f, m: glm_jax.from_pretrained(f / "no"), "no: no such folder"),
    (lambda f, m: glm_jax.load_tokenizer(f / "no"), "no: no such folder"),
    (lambda f, m: glm_jax.load_tokenizer(3), "folder must be a path, not 3"),
    (lambda f, m: glm_jax.generate(m, TOKENS, seed=2**70), "seed must be a whole number from 0 to"),
    (lambda f, m: glm_jax.from_pretrained(f, seed=-1), "seed must be a whole number from 0 to"),
    (lambda f, m: glm_jax.generate(m, TOKENS, top_pp=1), "unknown setting 'top_pp'"),
    (lambda f, m: glm_jax.generate(m, TOKENS, top_p=3.0, temperature=1), "top_p must be"),
    (lambda f, m: glm_jax.generate(m, "text"), "a text needs the tokenizer"),
    (lambda f, m: glm_jax.generate(m, []), "empty"),
    (lambda f, m: glm_jax.forward(m, [[1], [1, 2]]), "whole numbers of shape"),
    (lambda f, m: glm_jax.save_pretrained(m, f.parent), "more than a checkpoint"),
    (lambda f, m: glm_jax.from_pretrained(3), "folder must be a path, not 3"),
    (lambda f, m: glm_jax.from_pretrained(f, mesh="fsdp"), "mesh must be a mesh or its sizes"),
    (lambda f, m: glm_jax.from_pretrained(f, mesh={"fsdp": "2"}), "fsdp must be a whole number"),
    (lambda f, m: glm_jax.from_pretrained(f, head="both"), "glm has no head 'both'; it has lm,"),
    (lambda f, m: glm_jax.from_pretrained(f, seed="x"), "seed must be a whole number .*, not 'x'"),
    (lambda f, m: glm_jax.forward(f, TOKENS), "model must be what from_pretrained gives"),
    (lambda f, m: glm_jax.forward(m, TOKENS, [[1], [1, 2]]), "attention_mask has shape"),
    (lambda f, m: glm_jax.generate(m, None), "prompt must be a text, several, or token ids"),
    (lambda f, m: glm_jax.generate(m, [1, 2]), "each row of prompt must be a list"),
    (lambda f, m: glm_jax.generate(m, [["a"]]), "a token id must be a whole number, not 'a'"),
    (lambda f, m: glm_jax.generate(m, TOKENS, max_new_tokens=2.5), "max_new_tokens must be"),
    (lambda f, m: glm_jax.generate(m, TOKENS, eos_token_id=["x"]), "eos_token_id must be"),
    (lambda f, m: glm_jax.generate(m, "a", tokenizer="b"), "tokenizer must be what load_tok"),
    (lambda f, m: glm_jax.save_pretrained(m, f / "copy", tokenizer=f), "tokenizer must be what"),
])
def test_mistakes_are_one_clear_message(folder, model, call, message):
    with pytest.raises(glm_jax.UserError, match=message) as error:
        call(folder, model)
    assert "\n" not in str(error.value)
