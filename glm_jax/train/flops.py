"""How many floating-point operations training takes by formula, whatever the program does.

A matrix of n numbers that a token is multiplied with takes 2n forward, 2n for the derivative of
what went in, and 2n for its own derivative where it trains. With N numbers a token full fine-tuning
takes 6N, and LoRA 4N and 6 for each number of the adapter (Kaplan et al. 2020, arXiv:2001.08361,
section 2.1). Attention takes 4 · heads · head_dim a layer for each pair of a token and one that it
sees, and twice that for the derivatives: what the mask hides is not counted, so a causal row has
half of length² pairs (PaLM, arXiv:2204.02311, appendix B, counts all). The vocabulary's matrix
counts only where logits are computed, an expert's as often as tokens choose it. Norms, activations,
the optimizer, and what remat computes again are not counted.

    MFU = operations of a step / (seconds · devices · `Chip.flops`)
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from glm_jax.convert.parameters import flat

ONCE = ("pooler", "score")  # heads of classifiers: a product an example, not a token


class Flops(NamedTuple):
    """Operations of training.

    Attributes:
      token: for each token.
      pair: for each pair of a token and one that it sees, itself included.
    """

    token: float
    pair: float

    def of(self, tokens: float, pairs: float) -> float:
        return self.token * tokens + self.pair * pairs


def training_flops(model: Any, trainable: Collection[str]) -> Flops:
    """What training takes; `forward_flops` and the derivatives.

    Args:
      model: with its adapter; its parameters may be abstract.
      trainable: the paths of the parameters that train.
    """
    forward = forward_flops(model)
    heads = (*ONCE, "lm_head", "norm", "transform")
    deep = any(path.split(".")[0] not in heads for path in trainable)
    trained = sum(size for path, size in _matrices(model).items() if path in trainable)
    return Flops((1 + deep) * forward.token + 2 * trained, (3 if deep else 1) * forward.pair)


def forward_flops(model: Any) -> Flops:
    """What a model's outputs alone take."""
    config = model.config
    heads = getattr(config, "num_attention_heads", 0)
    width = heads and heads * config.head_dim * config.num_hidden_layers
    return Flops(2 * sum(_matrices(model).values()), 4 * width)


def _matrices(model: Any) -> dict[str, float]:
    """By path, how many numbers of each matrix a token is multiplied with."""
    config, sizes = model.config, {}
    parameters = flat(model)
    for path, parameter in parameters.items():
        head, kind = path.split(".")[0], path.split(".")[-1]
        size: float = parameter.get_value().size
        if kind == "embedding":
            tied = head == "embed_tokens" and model.head in ("lm", "mlm")
            size *= tied and "lm_head.kernel" not in parameters
        if (kind not in ("kernel", "embedding", "lora_a", "lora_b")
                or (head in ONCE and model.head in ("sequence", "base"))
                or (head == "lm_head" and model.head != "lm")):
            continue
        if ".experts." in path:
            size *= config.num_experts_per_tok / config.n_routed_experts
        sizes[path] = size
    return sizes
