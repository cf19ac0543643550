"""One session for every test: eight CPU devices, strict dtypes, a persistent compilation cache, no network."""

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# XLA aborts the process when one of eight devices is late for a collective by 40 s, which a busy machine can be.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=180"
os.environ.setdefault("JAXFORMERS_CACHE", str(Path(tempfile.gettempdir()) / "jaxformers-tests"))

import jax
import pytest

from jaxformers.environment import give_cpu_devices_threads

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(Path(os.environ["JAXFORMERS_CACHE"]) / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
give_cpu_devices_threads()


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For programs that run for a moment: compiling them is all that they cost."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def small_disk(request, tmp_path) -> Iterator[Path]:
    """The root of an empty disk, as large as a module's DISK_SIZE says in mount's words."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.module.DISK_SIZE}", "tmpfs", str(mounted)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


class Outcome(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """What a user's mistake is answered with, checked to be that and nothing else."""
        assert (self.code, self.out) == (2, ""), self
        [line] = self.err.splitlines()
        assert line.startswith("jaxformers: ")
        return line.removeprefix("jaxformers: ")


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., Outcome]:
    """`command("inspect", path)`: the command line in this process."""
    from jaxformers import cli

    def call(*arguments, stdin: str | None = None) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["jaxformers", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return Outcome(code, *capsys.readouterr())

    return call
