"""What the benchmarks run on here: a toy model and a few reviews."""

from pathlib import Path

import pytest

from benchmarks.throughput import ROOT, random_model

WORDS = {"good": "很好吃服务也热情", "bad": "太差了再也不来"}


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random GLM of two tiny layers and the tokenizer of glm-nano-zh."""
    return random_model(tmp_path_factory.mktemp("toy") / "model",
                        str(ROOT / "glm_jax/assets/glm-nano-zh"), hidden_size=32,
                        intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=1, head_dim=16)


@pytest.fixture(scope="session")
def toy_reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 120 reviews that differ in their first letters, two classes."""
    path = tmp_path_factory.mktemp("toy") / "reviews.csv"
    rows = [f"{chr(0x4E00 + 97 * n)}{chr(0x5000 + 31 * n)}{chr(0x6000 + 7 * n)}{text},{label}"
            for n in range(60) for label, text in WORDS.items()]
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return path
