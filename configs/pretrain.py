"""Pre-trains a small GLM on Chinese text, left to right mixed with blank infilling.

    python launch/corpus.py --out=corpus
    python launch/train.py --config=configs/pretrain.py --config.task.corpus=corpus

Made `glm_jax/assets/glm-nano-zh`; its model card has the tokens seen, the loss curve and the
held-out perplexity. `:smoke` runs a few steps of a much smaller model.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    config = common.get_config()
    config.task = ConfigDict({
        "name": "pretrain",
        "corpus": "corpus",  # a folder of launch/corpus.py
        "mixture": (0.6, 0.15, 0.25),  # left to right, continuation, infilling
        # The share of the documents with a teacher's vector (launch/embed.py) that are read left
        # to right and learn it behind their end, and how many tokens such a vector counts for.
        "summaries": 0.0, "summary_weight": 10.0,
        "label_smoothing": 0.0,  # the share of each target that goes to all tokens alike
    })
    config.model.init = "random"
    config.model.tokenizer = "corpus/tokenizer"
    config.model.config = ConfigDict({
        "model_type": "glm", "vocab_size": 16384, "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "attention_bias": True, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "pad_token_id": 5,
        "eos_token_id": [5],
    })
    config.adapter.name = ""
    config.trainable = (".*",)
    config.batch.update(rows=8, length=256)
    config.epochs = 1.0
    config.optimizer.update(learning_rate=3e-3, schedule="cosine", warmup=200, final=0.05,
                            weight_decay=0.1, b2=0.95, clip_norm=1.0)
    config.eval.update(every=500, metric="loss", patience=0)
    config.checkpoint.every = 250
    config.log.every = 10
    if common.variants(variant, ("smoke",)):
        config.steps = 20
        config.model.config.update(hidden_size=64, intermediate_size=112, num_hidden_layers=2,
                                   head_dim=16)
        config.batch.update(rows=8, length=64)
        config.optimizer.warmup = 2
        config.eval.every = config.checkpoint.every = 10
        config.log.every = 1
    return config
