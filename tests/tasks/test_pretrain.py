"""Pre-training: the loss against a plain one, evaluation, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from glm_jax.data.corpus import Document, write_tokens
from glm_jax.data.packing import Batches, Shape
from glm_jax.data.tokenizer import load_tokenizer
from glm_jax.errors import UserError
from glm_jax.tasks.pretrain import Pretrain
from glm_jax.train.loop import train

SHAPE = Shape(2, 48, 48)


@pytest.fixture
def corpus(base, tmp_path):
    draw = np.random.default_rng(0)
    tokenizer = load_tokenizer(base)
    for split, count in (("train", 60), ("dev", 5)):
        texts = ["".join(draw.choice(list("房间干净早餐差床单脏"), draw.integers(3, 120)))
                 for _ in range(count)]
        write_tokens(tmp_path / "corpus", split, [Document(text, 0) for text in texts], tokenizer)
    return tmp_path / "corpus"


def make(base, corpus, mixture=(0.4, 0.2, 0.4)):
    config = ConfigDict({"corpus": str(corpus), "mixture": mixture})
    return Pretrain(config, load_tokenizer(base), SHAPE, seed=0)


def test_the_loss_and_the_perplexity(base, corpus, tiny):
    task, model = make(base, corpus), tiny("lm", vocab_size=320)
    batch = Batches(task.source("train"), SHAPE, task.pad_id, 0)[1]
    assert set(np.unique(batch.segments)) > {0, 1} and 0 < batch.weights.sum() < batch.weights.size
    hidden, _ = model(batch)
    logp = jax.nn.log_softmax(model.logits(hidden))
    own = np.take_along_axis(np.asarray(logp), batch.targets[..., None], -1)[..., 0]
    wanted = -(own * batch.weights).sum()
    assert float(task.loss(model, batch, None)) == pytest.approx(float(wanted), rel=1e-4)
    loss, weight = task.predict(model, batch)
    assert (float(loss), float(weight)) == pytest.approx((wanted, batch.weights.sum()), rel=1e-4)

    result = task.evaluate(lambda b: jnp.stack([2.0 * b.weights.sum(), b.weights.sum()]), "dev")
    assert result.metrics == pytest.approx({"loss": 2.0, "perplexity": np.exp(2.0)})
    assert tuple(result.metrics) == task.metrics


def test_dev_is_read_left_to_right_whatever_the_mixture(base, corpus):
    source = make(base, corpus, (0, 0, 1)).source("dev")
    special = load_tokenizer(base).token_id("[gMASK]")
    assert all(source.piece(i, 0).tokens[0] == special for i in range(len(source.size)))


def test_the_fingerprint(base, corpus):
    before = make(base, corpus).fingerprint()
    assert make(base, corpus, (1, 0, 0)).fingerprint() == before
    write_tokens(corpus, "train", [Document("房间" * 20, 0)], load_tokenizer(base))
    assert make(base, corpus).fingerprint() != before


@pytest.mark.parametrize("mixture", [(1, 1), (0, 0, 0), (1, -1, 1)])
def test_bad_mixtures(base, corpus, mixture):
    with pytest.raises(UserError, match="three shares are wanted"):
        make(base, corpus, mixture).source("train")


def test_no_corpus(base, tmp_path):
    with pytest.raises(UserError, match="no corpus there"):
        make(base, tmp_path / "absent").fingerprint()


def test_the_config_runs_and_learns(base, corpus, tmp_path):
    from configs.pretrain import get_config
    config = get_config("smoke")
    config.update_from_flattened_dict({
        "task.corpus": str(corpus), "model.tokenizer": str(base), "model.config.vocab_size": 320,
        "model.config.hidden_size": 32, "mesh.data": 1, "log.tensorboard": False})
    finished = train(config, tmp_path / "run")
    assert finished.result["steps"] == 20 and finished.result["exported"] == "model"
    assert finished.result["dev"]["perplexity"] < 200  # 320 tokens, nine of which occur
    files = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert files >= {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"}
