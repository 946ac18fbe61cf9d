"""Pre-training: the loss against a plain one, evaluation, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from glm_jax.data.corpus import Document, TokenCorpus, write_tokens, write_vectors
from glm_jax.data.packing import Batches, Shape, once
from glm_jax.data.tokenizer import load_tokenizer
from glm_jax.errors import UserError
from glm_jax.tasks.pretrain import Pretrain, cosines
from glm_jax.train.loop import train
from glm_jax.train.step import batch_weight

SHAPE = Shape(2, 48, 48)


def write(folder, base, longest, copies=1):
    draw = np.random.default_rng(0)
    tokenizer = load_tokenizer(base)
    for split, count in (("train", 60), ("dev", 5)):
        texts = ["".join(draw.choice(list("房间干净早餐差床单脏"), draw.integers(3, longest)))
                 for _ in range(count)]
        write_tokens(folder, split, [Document(text, 0) for text in texts * copies],
                     tokenizer)
    return folder


@pytest.fixture
def corpus(base, tmp_path):
    return write(tmp_path / "corpus", base, 120)


def make(base, corpus, mixture=(0.4, 0.2, 0.4), summaries=0.0, shape=SHAPE,
         smoothing=0.0):
    config = ConfigDict({"corpus": str(corpus), "mixture": mixture, "summaries": summaries,
                         "summary_weight": 7.0, "label_smoothing": smoothing})
    return Pretrain(config, load_tokenizer(base), shape, seed=0)


def test_the_busiest_expert_is_a_metric(base, corpus, tiny):
    task = make(base, corpus)
    model = tiny(model_type="glm4_moe", vocab_size=320, intermediate_size=48, head_dim=8,
                 num_hidden_layers=3, num_key_value_heads=2, n_routed_experts=4,
                 moe_intermediate_size=8, num_experts_per_tok=2, first_k_dense_replace=1)
    seen = []

    def run(batch):
        seen.append((np.asarray(task.predict(model, batch)), model.with_expert_load(batch)[1]))
        return seen[-1][0]
    metrics = task.evaluate(run, "dev").metrics
    load = sum(np.asarray(load) for _, load in seen)
    assert load.shape == (2, 4) and len(seen[0][0]) == 4 + 8
    assert load.sum() == 2 * 2 * sum((b.segments > 0).sum() for b in batches_of(task))
    assert metrics["expert_load"] == pytest.approx(load.max() / load.mean()) and load.max() > 0
    assert tuple(metrics) == (*task.metrics, "expert_load")


def batches_of(task):
    return [batch for _, batch in once(task.source("dev"), SHAPE, task.pad_id)]


def test_the_loss_and_the_perplexity(base, corpus, tiny):
    task, model = make(base, corpus), tiny("lm", vocab_size=320)
    batch = Batches(task.source("train"), SHAPE, task.pad_id, 0)[1]
    assert set(np.unique(batch.segments)) > {0, 1} and 0 < batch.weights.sum() < batch.weights.size
    hidden, _ = model(batch)
    logp = jax.nn.log_softmax(model.logits(hidden))
    own = np.take_along_axis(np.asarray(logp), batch.targets[..., None], -1)[..., 0]
    wanted = -(own * batch.weights).sum()
    assert float(task.loss(model, batch, None)) == pytest.approx(float(wanted), rel=1e-4)
    smoothed = 0.9 * wanted - 0.1 * (logp.mean(-1) * batch.weights).sum()
    assert float(make(base, corpus, smoothing=0.1).loss(model, batch, None)) == pytest.approx(
        float(smoothed), rel=1e-4)
    loss, weight, *none = make(base, corpus, smoothing=0.1).predict(model, batch)  # unsmoothed
    assert (float(loss), float(weight)) == pytest.approx((wanted, batch.weights.sum()), rel=1e-4)
    assert none == [0, 0] and batch.vectors is None

    result = task.evaluate(
        lambda b: jnp.stack([2.0 * b.weights.sum(), b.weights.sum(), 0.0, 0.0]), "dev")
    assert result.metrics == pytest.approx({"loss": 2.0, "perplexity": np.exp(2.0)})
    assert tuple(result.metrics) == task.metrics


@pytest.fixture
def taught(base, tmp_path):
    """A corpus with vectors of 6 features for some of its short documents, each there twice."""
    draw, corpus = np.random.default_rng(1), write(tmp_path / "taught", base, 14, copies=2)
    documents = {split: TokenCorpus(corpus, split).short(30, 40) for split in ("train", "dev")}
    vectors = {split: draw.normal(size=(len(found), 6)) * [9, 1, 3, 1, 1, 1] + 5
               for split, found in documents.items()}
    write_vectors(corpus, documents, vectors)
    return corpus


def test_summaries_learn_the_direction_of_their_vectors(base, taught):
    shape = SHAPE._replace(features=4, examples=6)
    task = make(base, taught, summaries=0.7, shape=shape)
    batches = Batches(task.source("train"), shape, task.pad_id, 0)
    batch = next(b for b in map(batches.__getitem__, range(20))
                 if 1 < b.label_weights.sum() < b.segments.max(axis=1).sum())
    smask = task.tokenizer.token_id("[sMASK]")
    row, place = np.nonzero(batch.label_weights)
    assert (batch.tokens[row, batch.pool_index[row, place]] == smask).all()
    assert (batch.tokens == smask).sum() == len(row)
    hidden = np.zeros((2, 48, 4), np.float32)
    hidden[row, batch.pool_index[row, place]] = draws = np.random.default_rng(0).normal(
        size=(len(row), 4))
    wanted = [a @ b / np.linalg.norm(a) / np.linalg.norm(b)
              for a, b in zip(draws, batch.vectors[row, place], strict=True)]
    assert float(cosines(jnp.asarray(hidden), batch)) == pytest.approx(sum(wanted), rel=1e-4)

    class Fixed:
        """A model whose hidden states are given."""
        def __call__(self, batch, key=None):
            return jnp.asarray(hidden), None

        def vocabulary_kernel(self):
            return jnp.ones((4, 320))

    loss, _, cosine, count = task.predict(Fixed(), batch)
    assert (float(cosine), float(count)) == pytest.approx((sum(wanted), len(row)), rel=1e-4)
    whole = float(task.loss(Fixed(), batch, None))
    assert whole == pytest.approx(float(loss) + 7 * (len(row) - sum(wanted)), rel=1e-4)
    result = task.evaluate(lambda b: jnp.asarray([2.0, 1.0, 3.0, 4.0]), "dev")
    assert result.metrics["cosine"] == pytest.approx(0.75)


def test_a_step_divides_by_the_tokens_of_a_batch_with_vectors(base, taught):
    shape = SHAPE._replace(features=4, examples=6)
    task = make(base, taught, summaries=1.0, shape=shape)
    batch = Batches(task.source("train"), shape, task.pad_id, 0)[0]
    assert float(batch_weight(batch)) == batch.weights.sum() != batch.label_weights.sum()


def test_vectors_lie_along_their_principal_axes_and_copies_share_them(taught):
    corpus = TokenCorpus(taught, "train")
    vectors, of = corpus.vectors()
    assert sorted(set(of)) == [-1, *range(40)] and (corpus.lengths[of >= 0] <= 30).all()
    assert (np.bincount(of[of >= 0]) == 2).all()
    spread = vectors.std(axis=0)
    assert (np.diff(spread) < 0).all()
    np.testing.assert_allclose(np.corrcoef(vectors.T), np.eye(6), atol=2e-2)
    assert 2 < (spread[0] / spread[-1]) < 5  # the root of a ratio of about 10


def test_vectors_of_another_corpus_are_refused(base, taught):
    with pytest.raises(UserError, match=r"no sentence vectors there\. .*launch/embed.py"):
        (taught / "dev.vectors.npy").unlink()
        make(base, taught, summaries=0.5).fingerprint()
    write_tokens(taught, "train", [Document("房间" * 20, 0)], load_tokenizer(base))
    with pytest.raises(UserError, match="of another corpus"):
        make(base, taught, summaries=0.5).source("train")


def test_dev_is_read_left_to_right_whatever_the_mixture(base, corpus):
    source = make(base, corpus, (0, 0, 1)).source("dev")
    special = load_tokenizer(base).token_id("[gMASK]")
    assert all(source.piece(i, 0).tokens[0] == special for i in range(len(source.size)))


def test_the_fingerprint_and_what_the_terminal_says(base, corpus):
    assert make(base, corpus).about() == "train 60, dev 5 documents"
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
