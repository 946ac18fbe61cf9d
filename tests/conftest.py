"""Every test runs on the CPU, simulated as eight devices, in exact float32, and offline."""

import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # it only compiles here: any number may at a time
# The tests, and what they start, compile the same few functions: once is enough.
COMPILED = tempfile.TemporaryDirectory()
os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name,
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
               "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
               # XLA's older emitter of loops takes a third of the time for small programs.
               "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
                            "--xla_cpu_use_fusion_emitters=false"}

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # tests compile more than they compute


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny(head="lm", mesh=None, **config fields)`: a small model with large random parameters.

    A GLM, unless a `model_type` is given.

    Not to be changed in place: equal arguments give the same model. Its parameters are large so
    that attention is far from uniform, where a wrong rotary or mask would not show.
    """
    from flax import nnx

    from glm_jax.convert.hf import init_model
    from glm_jax.models import architecture_of

    @functools.cache
    def make(head: str = "lm", mesh: Any = None, **fields: Any) -> Any:
        raw = {"vocab_size": 67, "hidden_size": 32, "num_attention_heads": 4,
               "initializer_range": 0.3, "pad_token_id": 0, "num_labels": 3} | fields
        if "model_type" not in fields:
            raw = {"model_type": "glm", "intermediate_size": 48, "num_hidden_layers": 2,
                   "num_key_value_heads": 2, "head_dim": 8} | raw
        architecture = architecture_of(raw)
        model = init_model(architecture, architecture.config.from_dict(raw), head, mesh=mesh)
        state = nnx.state(model)
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))

        def shake(p: jax.Array) -> jax.Array:  # norms are not one, biases not zero
            return jax.device_put(p + 0.1 * jax.random.normal(next(keys), p.shape), p.sharding)
        nnx.update(model, jax.tree.map(shake, state))
        return model

    return make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Hugging Face folder: a language model of two small layers, and its tokenizer."""
    import numpy as np

    from glm_jax.convert.hf import init_model, save_model
    from glm_jax.data.tokenizer import tokenizer_files, train_tokenizer
    from glm_jax.models import architecture_of

    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("房间干净服务周到早餐差床单脏"), 12)) for _ in range(200)]
    raw = {"model_type": "glm", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
           "head_dim": 8, "initializer_range": 0.1, "pad_token_id": 5, "eos_token_id": [5],
           "tie_word_embeddings": True, "max_position_embeddings": 128}
    architecture = architecture_of(raw)
    folder = tmp_path_factory.mktemp("tiny") / "base"
    model = init_model(architecture, architecture.config.from_dict(raw), "lm", seed=9)
    save_model(model, folder, files=tokenizer_files(train_tokenizer(texts, 320)))
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A .csv file of 240 made-up reviews, `text` and `label`, easy to tell apart."""
    import numpy as np

    draw = np.random.default_rng(1)
    words = {"好": ["喜欢", "满意", "干净", "周到", "舒服", "值得", "推荐", "方便"],
             "差": ["失望", "难吃", "肮脏", "冷漠", "吵闹", "后悔", "破旧", "糟糕"]}
    things = ["房间", "早餐", "前台", "床铺", "位置", "空调", "价格", "窗户", "走廊", "电梯",
              "网络", "水压", "屏幕", "键盘", "电池", "情节"]
    rows = []
    for number in range(240):
        label = ("好", "差")[number % 2]
        pairs = zip(draw.permutation(things), draw.choice(words[label], 5), strict=False)
        text = ",".join(thing + word for thing, word in pairs)[:int(draw.integers(8, 26))]
        rows.append(f'"{text}",{label}')
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def smoke(base: Any, reviews: Any) -> Callable[..., Any]:
    """`smoke("full", **{"eval.every": 3})`: the config of a quick run on `base` and `reviews`."""
    from configs.sentiment import get_config

    def make(variant: str = "", **fields: Any) -> Any:
        config = get_config(",".join(filter(None, (variant, "smoke"))))
        small = {"model.path": str(base), "task.train": str(reviews), "steps": 6, "mesh.data": 1,
                 "batch.length": 32, "batch.examples": min(3, config.batch.examples),
                 "eval.every": 3, "checkpoint.every": 2, "log.tensorboard": False}
        config.update_from_flattened_dict(small | fields)
        return config
    return make
