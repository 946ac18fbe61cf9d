"""Whether a config fits on chips that are not rented yet, and how fast it can be at best.

    python launch/plan.py --config=configs/pod.py:chatglm3-6b-lora --topology=v5e:2x4
    python launch/plan.py --config=configs/chat.py --topology=h100:8 --search
    python launch/plan.py --config=configs/pod.py:glm-4-9b-full --topology=v6e:4x4 --json=plan.json

Neither weights nor data nor chips are needed. docs/plans.md tells how to read the answer.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from launch import door

FLAGS = door.flags_with_config()
flags.DEFINE_string("topology", None, "chips: v5e:4x4, v5p:2x2x4, 2xv6e:4x4 (two slices), h100:8",
                    required=True)
flags.DEFINE_bool("search", False, "try meshes and model.remat, and rank them")
flags.DEFINE_integer("tries", 4, "how many of them are compiled, the most promising first",
                     lower_bound=1)
flags.DEFINE_string("json", None, "a file to write the plan into; '-' prints it in place of text")


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it only compiles
    from glm_jax.errors import UserError
    from glm_jax.files import write_json_atomic
    from glm_jax.train.chips import topology
    from glm_jax.train.plan import advised, make_plan, search, table, text

    where = topology(FLAGS.topology)
    if FLAGS.json and FLAGS.json != "-":  # before it compiles for minutes
        out = Path(FLAGS.json)
        if out.is_dir() or not os.access(out.parent, os.W_OK):
            raise UserError(f"--json={out}: a file is wanted, in a folder that is there and that "
                            "can be written into")
    if FLAGS.search:
        plans = search(FLAGS.config, where, FLAGS.tries)
        shown, found = table(plans), {"plans": [plan.to_dict() for plan in plans]}
    else:
        plan = advised(FLAGS.config, where, make_plan(FLAGS.config, where))
        shown, found = text(plan), plan.to_dict()
    if FLAGS.json == "-":
        import json
        print(json.dumps(found, indent=2))
        return
    if FLAGS.json:
        write_json_atomic(Path(FLAGS.json), found)
    print(shown)


if __name__ == "__main__":
    door.run(main)
