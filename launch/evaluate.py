"""Measures a trained classifier on a file, or on the test split that its run was made with.

    python launch/evaluate.py --model=runs/sentiment
    python launch/evaluate.py --model=runs/sentiment/adapter --data=my.csv --json=scores.json

--model is a run folder (its best checkpoint), an exported adapter, or a Hugging Face folder.
"""

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags, logging

from glm_jax.parallel import processes
from launch import door

door.flags_of_mesh()
MODEL = flags.DEFINE_string("model", None, "a run folder, an adapter or a model", required=True)
DATA = flags.DEFINE_string("data", "", "a file with texts and labels; the run's data when empty")
SPLIT = flags.DEFINE_enum("split", None, ["train", "dev", "test"], "test by default; of --data "
                          "that is not split, all rows are measured")
STEP = flags.DEFINE_integer("step", None, "a checkpoint of the run; the best one by default")
TEXT = flags.DEFINE_string("text", None, "column of the texts in --data; the run's own by default")
LABEL = flags.DEFINE_string("label", None, "column of the labels in --data; by default the run's")
JSON = flags.DEFINE_string("json", "", "also write the figures to this file")


def main() -> None:
    with door.joined(), door.on_mesh(MODEL.value) as mesh:
        measure(mesh)


def measure(mesh: Any) -> None:
    from glm_jax.data.records import load_records
    from glm_jax.data.split import pick
    from glm_jax.errors import UserError
    from glm_jax.files import write_json_atomic
    from glm_jax.tasks.classification import NOT_FINITE, check_labels
    from glm_jax.train.load import classifier, load_trained
    from glm_jax.train.report import result_table

    if JSON.value and not Path(JSON.value).parent.is_dir():
        raise UserError(f"--json={JSON.value}: there is no folder {Path(JSON.value).parent}")
    if JSON.value and Path(JSON.value).is_dir():
        raise UserError(f"--json={JSON.value}: a folder, not a file")
    trained = load_trained(MODEL.value, mesh, STEP.value)
    task, run = classifier(trained, mesh)
    if DATA.value:
        columns = (door.column(TEXT.value, trained, "text"),
                   door.column(LABEL.value, trained, "label"))
        found = load_records(DATA.value, *columns)
        if SPLIT.value and list(found) == ["all"]:
            raise UserError(f"--split={SPLIT.value}: {DATA.value} is not split; without --split "
                            "all its rows are measured, without --data a split of the run's own")
        examples = pick(found, SPLIT.value or "test", DATA.value)
        check_labels(examples, trained.labels, DATA.value)
        own = trained.config.task.train if trained.config is not None else ""
        if (not SPLIT.value and Path(own).resolve() == Path(DATA.value).resolve()
                and examples is pick(found, "train", own)):
            logging.warning("%s: the run was trained on rows of it, which make the scores too "
                            "good; without --data its test split is measured", DATA.value)
    elif trained.config is not None:
        examples = trained.splits()[SPLIT.value or "test"]
    else:
        raise UserError(f"{MODEL.value} does not say what data it was trained on: give --data")
    processes.check_same("data", {
        "data sha256": task._replace(examples={"": examples}).fingerprint()})
    name = DATA.value or SPLIT.value or "test"
    result = task.score(run, examples, name)
    if not math.isfinite(result.metrics["loss"]):
        raise UserError(f"{MODEL.value}: {NOT_FINITE}")
    door.console().print(result_table({name: result.metrics}, result.report, name))
    if JSON.value and processes.speaks():
        details = {k: v for k, v in result.report.items() if k != "rows"}
        write_json_atomic(JSON.value, {"model": MODEL.value, "data": name, **details})


if __name__ == "__main__":
    door.run(main)
