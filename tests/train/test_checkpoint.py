"""Checkpoints: what was saved comes back, and nothing that is damaged or half-written does."""

import errno
import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from glm_jax.errors import UserError
from glm_jax.parallel.mesh import make_mesh
from glm_jax.train import checkpoint
from glm_jax.train.checkpoint import Checkpoints
from glm_jax.train.optimizer import make_optimizer
from glm_jax.train.step import init_state


class Moments(NamedTuple):
    mu: dict
    count: jax.Array


def make_state(seed: float = 0.0, best: float = float("-inf")) -> dict:
    kernel = jnp.arange(32, dtype=jnp.float32).reshape(4, 8) + seed
    return {
        "params": {"layers.q_proj.lora_a": kernel, "score": jnp.full((3,), seed, jnp.bfloat16)},
        "optimizer": (Moments({"layers.q_proj.lora_a": kernel * 2}, jnp.int32(7)), ()),
        "key": jax.random.key_data(jax.random.key(int(seed))),
        "best_metric": best,
        "patience": 2,
        "done": False,
    }


def abstract(state: dict) -> dict:
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x

    return jax.tree.map(leaf, state)


def make_iterator():
    return iter(grain.MapDataset.range(40).shuffle(seed=1).batch(4).repeat().to_iter_dataset())


def assert_same(got: dict, want: dict) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, leaf in jax.tree_util.tree_leaves_with_path(got):
        expected = dict(jax.tree_util.tree_leaves_with_path(want))[path]
        assert type(leaf) is type(expected) or isinstance(leaf, jax.Array), path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected), str(path))


def save(folder: Path, *steps: int, best: tuple[int, ...] = ()) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, make_state(step), best=step in best)
    checkpoints.wait()
    return checkpoints


def data_file(folder: Path, step: int) -> Path:
    """The largest file of a step: array values."""
    files = (p for p in (folder / str(step)).rglob("*") if p.is_file())
    return max(files, key=lambda p: p.stat().st_size)


def test_everything_comes_back_and_the_data_goes_on(tmp_path):
    iterator = make_iterator()
    for _ in range(13):  # into the second epoch
        next(iterator)
    checkpoints, state = Checkpoints(tmp_path), make_state(3, best=0.125)
    checkpoints.save(13, state, iterator)
    ahead = [next(iterator) for _ in range(9)]  # while it is being written
    checkpoints.close()

    again = make_iterator()
    step, restored = Checkpoints(tmp_path).restore(abstract(make_state()), again)
    assert step == 13
    assert_same(restored, state)
    np.testing.assert_array_equal([next(again) for _ in range(9)], ahead)


def test_nothing_saved_is_none(tmp_path):
    assert Checkpoints(tmp_path / "new").restore(make_state()) is None


def test_arrays_may_be_donated_at_once(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    checkpoints, x = Checkpoints(tmp_path), jnp.arange(1_000_000)
    for i in range(0, 12, 3):
        checkpoints.save(i, {"x": x})
        for _ in range(3):
            x = step(x)
        x.block_until_ready()
        checkpoints.wait()
        _, got = checkpoints.restore({"x": jax.ShapeDtypeStruct((1_000_000,), jnp.int32)}, step=i)
        np.testing.assert_array_equal(got["x"], np.arange(i, 1_000_000 + i))


def test_keeps_the_last_steps_and_their_best(tmp_path):
    checkpoints = save(tmp_path, 10, 20, 30, 40, best=(10, 20))
    assert (checkpoints.steps(), checkpoints.whole_best()[0]) == ([20, 30, 40], 20)
    # 50 has a new best, but falling back to 40 must still find 20.
    checkpoints.save(50, make_state(50), best=True)
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.whole_best()[0]) == ([20, 40, 50], 50)
    checkpoints.save(60, make_state(60))
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.whole_best()[0]) == ([50, 60], 50)
    assert checkpoints.restore(make_state(), step="best")[0] == 50
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"50", "50.sha256.json", "60", "60.sha256.json"}


def test_an_older_step_is_deleted_only_when_the_newer_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "KEPT", 1)
    checkpoints = save(tmp_path, 10)

    def cut_short(path, value):
        assert (tmp_path / "10.sha256.json").exists() and (tmp_path / "10").is_dir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json_atomic", cut_short)
    checkpoints.save(20, make_state(20))
    with pytest.raises(UserError, match=r"checkpoint 20 .* no space left .* MiB are free"):
        checkpoints.wait()
    assert checkpoints.steps() == [10]
    assert checkpoints.restore(make_state())[0] == 10


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_a_damaged_step_falls_back_with_one_warning(tmp_path, harm, caplog):
    save(tmp_path, 10, 20, best=(10, 20))
    harm(data_file(tmp_path, 20))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"20.*; delete .*20 and run again"):
        checkpoints.restore(make_state(), step=20)
    with caplog.at_level(logging.WARNING):
        step, state = checkpoints.restore(make_state())
    assert step == 10
    assert_same(state, make_state(10))
    (record,) = caplog.records
    assert str(data_file(tmp_path, 20).parent) in record.message or harm is Path.unlink
    assert "checkpoint 20 is not used" in record.message
    assert checkpoints.whole_best()[0] == 10

    # The run gets to 20 again, and writes it anew over the damaged one.
    checkpoints.save(20, make_state(21))
    checkpoints.wait()
    assert_same(Checkpoints(tmp_path).restore(make_state(), step=20)[1], make_state(21))


def test_a_damaged_best_falls_back_to_the_one_before_then_to_the_last_whole(tmp_path):
    save(tmp_path, 10, 20, 30, 40, best=(10, 40))
    flip(data_file(tmp_path, 40))
    assert Checkpoints(tmp_path).whole_best()[0] == 10
    assert Checkpoints(tmp_path).restore(make_state(), step="best")[0] == 10
    flip(data_file(tmp_path, 10))
    assert Checkpoints(tmp_path).whole_best() == (-1, {})
    assert Checkpoints(tmp_path).restore(make_state(), step="best")[0] == 30


def test_no_good_step_left_is_an_error(tmp_path):
    save(tmp_path, 10, 20)
    flip(data_file(tmp_path, 20))
    (tmp_path / "10.sha256.json").write_text('{"best": fal')
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(.*10\.sha256\.json"):
        Checkpoints(tmp_path).restore(make_state())


def test_a_step_without_checksums_is_not_trusted_and_is_cleaned_up(tmp_path):
    save(tmp_path, 10, 20)
    (tmp_path / "20.sha256.json").unlink()
    leftover = tmp_path / "30.orbax-checkpoint-tmp"
    leftover.mkdir()
    mine = tmp_path / "notes.txt"
    mine.write_text("not a checkpoint")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [10]
    assert checkpoints.restore(make_state())[0] == 10
    assert leftover.exists()  # reading alone deletes nothing: a run may be writing here
    checkpoints.save(15, make_state(15))
    checkpoints.wait()
    assert not leftover.exists() and not (tmp_path / "20").exists() and mine.exists()
    assert checkpoints.steps() == [10, 15]


def test_steps_of_an_abandoned_past_go(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "KEPT", 3)
    save(tmp_path, 10, 20, 30, best=(30,))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(make_state(), step=10)[0] == 10
    checkpoints.save(20, make_state(99))
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.whole_best()[0]) == ([10, 20], -1)
    assert_same(checkpoints.restore(make_state())[1], make_state(99))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["params"].update({"layers.q_proj.lora_a": jnp.zeros((4, 9))}),
         r"'params.layers.q_proj.lora_a' is float32\[4, 8\] in the checkpoint and float32\[4, 9\]"),
        (lambda s: s["params"].update({"score": jnp.zeros(3)}),
         r"'params.score' is bfloat16\[3\] in the checkpoint and float32\[3\] here"),
        (lambda s: s["params"].update({"new": jnp.zeros(3)}), "'params.new' is not in the check"),
        (lambda s: s["params"].pop("score"), "'params.score' is only in the checkpoint"),
        (lambda s: s.pop("patience"), "'patience' is only in the checkpoint"),
    ],
)  # fmt: skip
def test_another_tree_is_refused_by_name(tmp_path, change, message):
    checkpoints, other = save(tmp_path, 10), make_state()
    change(other)
    with pytest.raises(UserError, match=message):
        checkpoints.restore(abstract(other))


def test_other_data_is_refused(tmp_path):
    checkpoints, iterator = Checkpoints(tmp_path), make_iterator()
    checkpoints.save(1, make_state(), iterator)
    packed = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source([{"a": np.ones(2)}]).to_iter_dataset(),
        length_struct={"a": 4},
        num_packing_bins=1,
    )
    with pytest.raises(UserError, match="the data can't go on from position"):
        checkpoints.restore(make_state(), iter(packed))


def test_a_failed_write_names_its_real_cause(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"checkpoint 1 could not be written to .*run"):
        checkpoints.save(1, make_state())


def run_python(code: str, *args: object) -> str:
    process = start_python(code, *args)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def start_python(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=Path(__file__).parents[2],  # on the path of `python -c`: glm_jax and tests import
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_device_to_eight(tmp_path):
    save(tmp_path, 10).close()
    out = run_python(
        """
        import sys
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        import jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from glm_jax.train.checkpoint import Checkpoints
        from tests.train.test_checkpoint import assert_same, make_state
        mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
        def leaf(x):
            if not isinstance(x, jax.Array):
                return x
            spec = P("fsdp", "tensor") if x.ndim == 2 else P()
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        state = make_state(10)
        step, got = Checkpoints(sys.argv[1]).restore(jax.tree.map(leaf, state))
        assert_same(got, state)
        print(step, got["params"]["layers.q_proj.lora_a"].sharding.shard_shape((4, 8)))
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(20, got)
        checkpoints.close()
        """,
        tmp_path,
    )
    assert out.split() == ["10", "(1,", "4)"]
    step, state = Checkpoints(tmp_path).restore(abstract(make_state()))  # and back to one
    assert step == 20
    assert_same(state, make_state(10))


@pytest.mark.parametrize("fields", [
    {"name": "adafactor"}, {"state_dtype": "int8"}, {"state_dtype": "bfloat16"}])
def test_each_optimizer_goes_on_bit_for_bit(tmp_path, fields):
    """On the mesh that it was saved on; on another each array comes back as it was."""
    optimizer = make_optimizer(ConfigDict({
        "weight_decay": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip_norm": 1.0, **fields}),
        lambda step: 1e-2)
    kernel = np.random.default_rng(0).normal(size=(2, 128, 128)).astype(np.float32)

    def begin(sizes):
        mesh = make_mesh(sizes)
        where = NamedSharding(mesh, P(None, "fsdp", "tensor"))
        return init_state({"layers.q_proj.kernel": jax.device_put(kernel, where)}, optimizer, mesh)
    state = begin({"fsdp": 4, "tensor": 2})

    @jax.jit
    def step(state):
        params = state["trainable"]
        gradient = jax.tree.map(jnp.sin, params)
        updates, new = optimizer.update(gradient, state["optimizer"], params)
        return state | {"trainable": optax.apply_updates(params, updates), "optimizer": new}
    for _ in range(2):
        state = step(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {"state": state})
    checkpoints.wait()
    for sizes in ({"fsdp": 4, "tensor": 2}, {"fsdp": 2}):
        fresh = begin(sizes)
        restored = checkpoints.restore({"state": fresh})[1]["state"]
        assert_same(restored, state)
        for got, wanted in zip(*map(jax.tree.leaves, (restored, fresh)), strict=True):
            assert got.sharding == wanted.sharding
        if sizes["fsdp"] == 4:
            assert_same(step(restored), step(state))
    checkpoints.close()


def test_kill_during_a_save_leaves_a_folder_that_restores(tmp_path):
    code = """
        import sys
        import jax.numpy as jnp
        from glm_jax.train.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        for step in range(1, 10_000):
            checkpoints.save(step, {"x": jnp.full((300_000,), step, jnp.float32), "step": step})
            print(step, flush=True)
    """
    for after in (3, 7):
        process = start_python(code, tmp_path)
        assert process.stdout is not None
        for line in process.stdout:  # the save of this step has just begun
            if int(line) >= after:
                break
        time.sleep(0.004 * after)
        process.kill()
        process.communicate()
        abstract_state = {"x": jax.ShapeDtypeStruct((300_000,), jnp.float32), "step": 0}
        step, state = Checkpoints(tmp_path).restore(abstract_state)
        assert step >= after - 1
        assert state["step"] == step and np.all(np.asarray(state["x"]) == step)


def test_checksums_are_those_of_sha256sum(tmp_path):
    save(tmp_path, 10)
    sums = json.loads((tmp_path / "10.sha256.json").read_text())
    name = str(data_file(tmp_path, 10).relative_to(tmp_path / "10"))
    out = subprocess.run(["sha256sum", data_file(tmp_path, 10)], capture_output=True, check=True)
    assert sums["files"][name] == out.stdout.split()[0].decode()
    assert len(sums["files"]) == sum(p.is_file() for p in (tmp_path / "10").rglob("*"))


def test_a_full_disk_is_one_line(tmp_path):
    """A file size limit stands in for the full disk: it fails in the same thread of Orbax."""
    out = run_python(
        """
        import resource, signal, sys
        import jax, jax.numpy as jnp
        from glm_jax.errors import UserError
        from glm_jax.train.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"x": jnp.arange(1000)})
        checkpoints.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sys.stderr = sys.stdout
        checkpoints.save(2, {"x": jax.random.normal(jax.random.key(0), (100_000,))})
        try:
            checkpoints.wait()
        except UserError as error:
            print(error)
        checkpoints.close()
        """,
        tmp_path,
    )
    (line,) = out.splitlines()
    assert line.startswith(f"checkpoint 2 could not be written to {tmp_path}: ")
    assert "File too large" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "1.sha256.json"]
    assert Checkpoints(tmp_path).steps() == [1]


def test_tensorstores_own_words_for_a_full_disk(tmp_path):
    error = ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")
    explained = Checkpoints(tmp_path)._explained(3, error)
    assert isinstance(explained, UserError)
    assert f"{tmp_path}: no space left on the device" in str(explained)


def test_two_processes_to_one(tmp_path):
    code = """
        import sys
        import jax
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", 2, int(sys.argv[2]))
        import jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from glm_jax.train.checkpoint import Checkpoints
        from tests.train.test_checkpoint import make_iterator
        mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
        x = jax.make_array_from_callback(
            (8, 4), NamedSharding(mesh, P("fsdp")), lambda i: jnp.arange(32.0).reshape(8, 4)[i]
        )
        iterator = make_iterator()
        for _ in range(5):
            next(iterator)
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(5, {"x": x, "best": 0.5}, iterator)
        assert checkpoints.restore({"x": x, "best": 0.0}, iterator)[0] == 5
        checkpoints.close()
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: run_python(code, tmp_path, rank, port), range(2)))
    iterator, expected = make_iterator(), make_iterator()
    abstract_state = {"x": jax.ShapeDtypeStruct((8, 4), jnp.float32), "best": 0.0}
    step, state = Checkpoints(tmp_path).restore(abstract_state, iterator)
    assert (step, state["best"]) == (5, 0.5)
    np.testing.assert_array_equal(state["x"], np.arange(32.0).reshape(8, 4))
    for _ in range(5):
        next(expected)
    np.testing.assert_array_equal(next(iterator), next(expected))
