"""Trains what a config describes; the same command again goes on where it stopped.

    python launch/train.py --config=configs/sentiment.py
    python launch/train.py --config=configs/sentiment.py:full,smoke --workdir=runs/try
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glm_jax.parallel.host import use_huge_pages
from launch import door

FLAGS = door.flags_with_config()


def main() -> None:
    from glm_jax.train.chips import GPU_SHARE

    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # JAX takes no two names of it
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))
    config = FLAGS.config
    door.start_devices(config.mesh.cpu_devices)
    from glm_jax.train.loop import train
    from glm_jax.train.report import result_table

    workdir = Path(FLAGS.workdir or f"runs/{door.config_name()}")
    with door.joined("the same commands go on from the last checkpoint"):
        result, final = train(config, workdir)
    split = "test" if "test" in result else "dev"
    door.console().print(result_table(result, final.report, split))
    folders = ", ".join(filter(None, [result["exported"], "result.json", "report.html"]))
    door.console().print(f"{workdir}: {folders}", markup=False)


if __name__ == "__main__":
    use_huge_pages()
    door.run(main)
