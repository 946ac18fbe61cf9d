"""Fine-tunes a language model to answer: questions and answers, or whole chats, with LoRA.

    python launch/train.py --config=configs/chat.py

teaches glm-nano-zh what Chinese sayings, idioms and words mean; `result.json` has the loss and the
perplexity of a token of the answers on dev, and `adapter/` goes to PEFT or launch/generate.py.

Your own file, in the form of Alpaca, ShareGPT, OpenAI's messages or ADGEN (docs/training.md), and
another model, which answers in its own chat template:

    python launch/train.py --config=configs/chat.py --config.task.train=my.jsonl \\
        --config.model.path=path/to/chatglm3-6b --config.model.dtype=bfloat16

Variants, which compose: `full` trains all parameters, `smoke` 20 steps for tests.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    config = common.get_config()
    config.task = ConfigDict({
        "name": "instruction",
        "train": "questions",  # a file, a name of the `datasets` library, or the built-in rows
        "dev": "",  # cut from train by hash when empty
        "prompt": "", "answer": "",  # fields of a question and its answer, of a form of your own
        # How a conversation is shown: the tokenizer's own template ("chat"), one of data/templates,
        # or "plain": question, answer, end. Empty: "chat" for a model that was trained to.
        "template": "",
        "label_smoothing": 0.0,  # the share of each target that goes to all tokens alike
    })
    config.trainable = ("adapter",)
    config.epochs = 3.0
    config.batch.update(rows=8, length=512)
    config.optimizer.learning_rate = 2e-3
    config.eval.update(every=200, metric="loss", patience=3)
    for name in common.variants(variant, ("full", "smoke")):
        if name == "full":
            config.adapter.name = ""
            config.trainable = (".*",)
            config.optimizer.learning_rate = 5e-4
        if name == "smoke":
            config.steps = 20
            config.batch.update(rows=8, length=64)
            config.optimizer.warmup = 2
            config.eval.update(every=10, patience=0)
            config.checkpoint.every = 5
            config.log.every = 1
    return config
