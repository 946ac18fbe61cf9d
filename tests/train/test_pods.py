"""The pod configs, compiled for their slices: what they hold and send, and no surprise in them."""

import re
import time
from pathlib import Path

import pytest

from configs.pod import get_config
from glm_jax.train import plan as plans
from glm_jax.train.chips import topology
from glm_jax.train.hlo import collectives
from glm_jax.train.plan import advised, make_plan, text

DOCS = Path(__file__).parents[2] / "docs" / "plans"
PODS = [("chatglm3-6b-lora", "v5e:2x4"), ("glm-4-9b-full", "v6e:4x4"),
        ("glm-4-9b-full", "v5p:2x2x4"), ("glm-4-32b-lora", "v6e:4x4"),
        ("glm-4-32b-full", "v5p:4x4x4"), ("glm-4.5-air-lora", "v5p:4x4x4"),
        ("glm-4.5-lora", "v5p:4x4x8")]
MARGIN = 0.03  # of the bytes sent: what the formula leaves out, and the table, which isn't gathered


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where"), PODS)
def test_each_fits_and_sends_what_its_layout_asks(monkeypatch, name, where):
    kept, own = [], plans._compile
    monkeypatch.setattr(plans, "_compile", lambda traced: kept.append(own(traced)) or kept[-1])
    config, on = get_config(name), topology(where)
    plan, by_hand = make_plan(config, on), make_plan(config, on, compiled=False)
    assert plan.fits and not plan.warnings
    assert plan.needs < 1.3 * by_hand.needs  # a whole stack, or all logits, would be far more
    sent, asked = (sum(size for _, size in p.sent.values()) for p in (plan, by_hand))
    assert sent == pytest.approx(asked, rel=MARGIN)
    layers = get_config(name).model.config
    counts = {layers.get("num_layers"), layers.get("num_hidden_layers")}
    counts |= {count - layers.get("first_k_dense_replace", 0) for count in counts if count}
    whole = [one for one in collectives(kept[0].text, [0] * on.chips)
             if any(len(shape) > 2 and shape[0] in counts for shape in one.shapes)]
    assert not whole

    def figures(shown):
        return [float(x) for line in shown.splitlines()[1:] if "GiB" in line or " GB " in line
                for x in re.findall(r"([\d.]+) (?:GiB|GB)", line)]
    written = (DOCS / f"{name}-{where.replace(':', '-')}.txt").read_text()
    assert figures(text(plan)) == pytest.approx(figures(written), rel=0.05, abs=0.05)


@pytest.mark.slow
def test_of_what_does_not_fit_the_compiler_says_how_much_and_a_change_is_found():
    config, on = get_config("chatglm3-6b-lora"), topology("v5e:2x4")
    config.batch.rows = 128
    plan = advised(config, on, make_plan(config, on))
    assert not plan.fits and plan.needs > on.memory
    assert re.fullmatch(r"--config\.batch\.accumulate=\d+ \([\d.]+ GiB\)", plan.advice)


def tiny(layers=4, rows=64):
    config = get_config("glm-4-9b-full")
    config.model.config.update(hidden_size=256, intermediate_size=512, num_hidden_layers=layers,
                               num_attention_heads=4, head_dim=64, vocab_size=2048)
    config.batch.update(rows=rows, length=256)
    return config


@pytest.mark.slow
def test_memory_falls_as_the_chips_grow():
    held = [make_plan(tiny(), topology(where)) for where in ("v5e:2x4", "v5e:4x4", "v5e:4x8",
                                                             "v5e:8x8")]
    for name in ("trained", "optimizer", "activations"):
        sizes = [plan.memory[name] * plan.chips for plan in held]
        assert max(sizes) < 1.1 * min(sizes), name


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth():
    """In seconds of the processor, which other work on the machine does not stretch."""
    taken = []
    for layers in (4, 16, 64):
        begun = time.process_time()
        make_plan(tiny(layers, rows=4), topology("v5e:2x2"))
        taken.append(time.process_time() - begun)
    assert max(taken) < 1.3 * min(taken), taken
