"""A model is loaded and written within its own memory and little more, whatever the mesh."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxformers.families import read_config
from jaxformers.hub.layout import parts
from jaxformers.hub.safetensors import Deferred, open_tensors, release, write_tensors
from jaxformers.models.params import model_spec

ONE_BILLION = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
SHARD = 500_000_000
# Reports bytes: what the process holds before, and its peak while it loads and while it writes.
CHILD = """
import sys
import jax

jax.config.update("jax_num_cpu_devices", 8)
import jaxformers as jf


def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


source, destination = sys.argv[1:]
mesh = jf.make_mesh(jf.MeshConfig(fsdp=8))
jax.block_until_ready(jax.device_put(0.0))
before = memory("VmRSS")
model = jax.block_until_ready(jf.load(source, mesh=mesh))
assert model.params["embed"].sharding.num_devices == 8
loading = memory("VmHWM")
forget_peak()
jf.save_pretrained(model, destination, max_shard_bytes=500_000_000)
print(before, loading, memory("VmHWM"))
"""

# The same while a base is read that an adapter is to be trained on, kept in nf4.
PACKING = """
import sys
import jax
from jaxformers.api import find_model
from jaxformers.hub.targets import Wish, plan_adapter
from jaxformers.parallel.mesh import single_device_mesh
from jaxformers.train.build import Trainer


def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


found, mesh = find_model(sys.argv[1]), single_device_mesh()
trainer = Trainer(found.config, mesh, 32, adapter=plan_adapter(found.config, Wish(base="nf4")))
jax.block_until_ready(jax.device_put(0.0))
before = memory("VmRSS")
params = jax.block_until_ready(found.read_params(mesh, dtype="float32", keep=trainer.keep))
print(before, memory("VmHWM"), sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def random_checkpoint(directory: Path, config: dict, *, max_shard_bytes: int) -> None:
    """bfloat16 weights that repeat one megabyte of noise."""
    noise = np.random.default_rng(0).standard_normal(2**19, np.float32).astype(ml_dtypes.bfloat16)
    cfg = read_config(config)
    shapes = {part.source.name: part.disk_shape() for part in parts(cfg)}
    tensors = {
        name: Deferred(shape, noise.dtype, lambda shape=shape: np.resize(noise, prod(shape)).reshape(shape))
        for name, shape in shapes.items()
    }
    write_tensors(directory, tensors, max_shard_bytes=max_shard_bytes)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read as Linux tells it"
)
def test_two_gigabytes_on_eight_devices_need_little_more_than_themselves(tmp_path):
    source, destination = tmp_path / "source", tmp_path / "destination"
    random_checkpoint(source, ONE_BILLION, max_shard_bytes=SHARD)
    files = sorted(source.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    model, largest = sum(file.stat().st_size for file in files), files[-1].stat().st_size
    assert model > 2e9
    child = subprocess.run(
        [sys.executable, "-c", CHILD, source, destination], check=True, capture_output=True, text=True
    )
    before, loading, writing = map(int, child.stdout.split())
    print(f"model {model / 1e9:.2f} GB, peaks {(loading - before) / 1e9:.2f} and {(writing - before) / 1e9:.2f} GB")
    # On CPU the devices' memory is the host's, so the local part of the model is all of it.
    assert loading - before < model + 1.15 * largest
    assert writing - before < model + 1.15 * largest
    theirs, ours = open_tensors(source), open_tensors(destination)
    assert all(np.array_equal(ours[name].view(np.uint16), theirs[name].view(np.uint16)) for name in theirs)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read as Linux tells it"
)
def test_a_base_in_few_bits_is_never_whole_in_float32(tmp_path):
    config = ONE_BILLION | {"num_hidden_layers": 6}
    random_checkpoint(tmp_path, config, max_shard_bytes=SHARD)
    shapes = [4 * prod(spec.shape) for spec in jax.tree.leaves(model_spec(read_config(config)))]
    child = subprocess.run([sys.executable, "-c", PACKING, tmp_path], check=True, capture_output=True, text=True)
    before, peak, kept = map(int, child.stdout.split())
    print(f"float32 {sum(shapes) / 1e9:.2f} GB, kept {kept / 1e9:.2f} GB, peak {(peak - before) / 1e9:.2f} GB")
    assert kept < 0.5 * sum(shapes)
    assert peak - before < min(kept + 3 * max(shapes), sum(shapes))


def resident(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        int(next(field for field in lines if field.startswith("Rss")).split()[1]) * 1024
        for line in lines
        if line.endswith(str(path))
    )


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what is in memory is read as Linux tells it")
def test_a_view_that_was_read_can_be_let_go_and_read_again(tmp_path):
    write_tensors(tmp_path, {"a": np.arange(10**6, dtype=np.int32), "b": np.ones((1000, 1000), np.float32)})
    tensors = open_tensors(tmp_path)
    file = tmp_path / "model.safetensors"
    before = resident(file)
    assert tensors["a"].sum() == 499999500000
    assert resident(file) > before + 3_900_000
    release(tensors["a"].reshape(1000, 1000).T)
    assert resident(file) < before + 300_000
    assert tensors["a"].sum() == 499999500000
    release(np.ones(5))  # of no file
    release(tensors["a"][:0])
