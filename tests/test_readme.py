"""Every command of the README, run in order as a new user would: a fresh virtual environment and a fresh checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEST_COMMAND = "pip install -e '.[test]' && pytest -n 2"


def commands(language):
    return [block.strip() for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)]


def test_continuous_integration_runs_the_readmes_test_command():
    assert TEST_COMMAND in commands("sh")
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_readme_lists_every_model_type():
    from jaxformers.families import FAMILIES

    table = README.partition("## Models")[2].partition("For each,")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(FAMILIES)


@pytest.mark.slow
def test_every_command_runs_in_a_fresh_environment(tmp_path):
    checkout = tmp_path / "jaxformers"
    subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "PYTEST", "HF_"))}
    environment = keep | {
        "PATH": f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    scripts = [script for script in commands("sh") if script != TEST_COMMAND]
    scripts += [f"python - <<'END'\n{script}\nEND" for script in commands("python")]
    for script in scripts:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            check=False,
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, f"{script}\n{done.stderr[-3000:]}"
    assert (checkout / "runs" / "quickstart" / "checkpoints").is_dir()
    assert (checkout / "exports" / "copy" / "config.json").is_file()
