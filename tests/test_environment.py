"""How a process is set up before jax is used: CPU devices get threads enough not to wait for each other for ever."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxformers.environment import THREADS_PER_CPU_DEVICE, give_cpu_devices_threads

THREADS = Path("/proc/self/task")
# More programs in flight than the 32 that XLA admits, each with a collective that all eight devices must come to.
RUNNING_AHEAD = """
import jax
import jax.numpy as jnp
from jaxformers.environment import set_up

jax.config.update("jax_num_cpu_devices", 8)
set_up()
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
columns, rows = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, "x"), ("x", None)))
step = jax.jit(lambda x, w: jnp.tanh(x @ w), out_shardings=columns)
x = jax.device_put(jnp.ones((512, 512)), columns)
w = jax.device_put(jnp.ones((512, 512)), rows)
for _ in range(100):
    x = step(x, w)
print(float(x[0, 0]))
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    """A process that is told about CPU devices by nothing but these variables."""
    told = ("XLA_FLAGS", "PJRT_NPROC", "JAX_NUM_CPU_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in told}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=False, env=environment | variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "enough"),
    [
        ({}, False),
        ({"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "--xla_force_host_platform_device_count=6"}, False),
        ({"JAX_NUM_CPU_DEVICES": "6"}, True),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=6"}, True),
    ],
)
def test_several_cpu_devices_get_threads_and_one_is_left_alone(variables, enough):
    code = "import os; from jaxformers.environment import set_up; set_up(); print(os.environ.get('PJRT_NPROC'))"
    threads = run(code, **variables).stdout.strip()
    if enough:
        assert int(threads) >= 6 * THREADS_PER_CPU_DEVICE
    else:
        assert threads == "None"


def test_a_number_of_threads_that_the_user_has_set_is_left_alone(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "11")
    give_cpu_devices_threads()
    assert os.environ["PJRT_NPROC"] == "11"


@pytest.mark.skipif(not THREADS.exists(), reason="needs Linux to list a process's threads")
def test_xla_starts_the_threads_that_it_is_told_to():
    assert len(jax.devices()) == 8
    names = [(thread / "comm").read_text().strip() for thread in THREADS.iterdir()]
    assert names.count("tf_XLAEigen") == int(os.environ["PJRT_NPROC"]) >= 8 * THREADS_PER_CPU_DEVICE


def test_steps_may_be_dispatched_far_ahead_of_the_devices():
    soon_given_up = "--xla_cpu_collective_call_terminate_timeout_seconds=60"
    outcome = run(RUNNING_AHEAD, JAX_PLATFORMS="cpu", XLA_FLAGS=soon_given_up)
    assert outcome.returncode == 0, outcome.stderr
    assert float(outcome.stdout) == 1
