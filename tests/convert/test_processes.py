"""Two processes of four devices each: what each reads of a folder, and what both write together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from glm_jax.convert.hf import save_model
from tests.convert.test_hf import read
from tests.convert.test_streaming import CHATGLM, FAMILY

PROCESS = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
folder, out, rank, port = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
from pathlib import Path
from glm_jax.convert import hf
from glm_jax.convert.released import Released
from glm_jax.errors import UserError
from glm_jax.parallel.mesh import make_mesh

total = 0
def counted(self, name, index=(), read=Released.read):
    global total
    array = read(self, name, index)
    total += array.nbytes
    return array
Released.read = counted

def load(name):
    global total
    total = held = whole = 0
    model = hf.load_model(f"{folder}/{name}", mesh=make_mesh({"fsdp": 4, "expert": 2}))
    for param in hf.flat(model).values():
        array = param.get_value()
        parts = {str(shard.index): shard.data.nbytes for shard in array.addressable_shards}
        held, whole = held + sum(parts.values()), whole + array.nbytes
    assert total == held, (total, held)  # to the byte: float32 in the file, too
    assert held < 0.6 * whole, (held, whole)
    return model

load("glm4_moe")
model = load("chatglm")
hf.save_model(model, f"{out}/chatglm", max_shard_bytes=20000)
assert Path(out, "chatglm/config.json").is_file()  # whole behind it, in both
for wrong in (lambda: hf.load_model(f"{folder}/chatglm"),
              lambda: hf.save_model(model, f"{out}/other")):
    try:
        wrong()
    except UserError as error:
        print(error)
"""


def test_each_process_reads_what_its_devices_hold_and_one_writes(tiny, tmp_path):
    fields = {name: value for name, value in CHATGLM.items() if name != "model_type"}
    save_model(tiny(model_type="chatglm", **fields), tmp_path / "in/chatglm")
    save_model(tiny(**FAMILY["glm4_moe"]), tmp_path / "in/glm4_moe")
    (tmp_path / "out/other").mkdir(parents=True)
    (tmp_path / "out/other/notes.txt").write_text("precious")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [subprocess.Popen(
        [sys.executable, "-c", PROCESS, tmp_path / "in", tmp_path / "out", str(rank), str(port)],
        cwd=Path(__file__).parents[2], env={**os.environ, "JAX_PLATFORMS": "cpu"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]
    messages: list[list[str]] = []
    try:
        for process in both:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            messages.append(out.splitlines()[-2:])
    finally:
        for process in both:
            process.kill()
    assert read(tmp_path / "out/chatglm") == read(tmp_path / "in/chatglm")
    assert [(one[0], one[1].replace(str(tmp_path), "tmp")) for one in messages] == [
        ("mesh: one device lies in 1 of 2 processes; take sizes that reach into all of them", last)
        for last in ("tmp/out/other: is there already and is more than a checkpoint folder "
                     "(without a config); name another, or remove it first",
                     "the first process can't write; its message says why")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["chatglm", "other"]
