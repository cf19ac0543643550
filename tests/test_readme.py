"""Every command of the README, run in order as a new user would: a fresh virtual environment and a fresh checkout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxformers.config import load_config
from jaxformers.data.corpus import open_corpus
from jaxformers.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEST_COMMAND = "pip install -e '.[test]' && pytest -n 2"


def commands(language):
    return [block.strip() for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)]


def test_continuous_integration_runs_the_readmes_test_command():
    assert TEST_COMMAND in commands("sh")
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_readme_holds_the_parity_matrix_of_the_tests():
    from families.matrix import planned, table

    assert table(planned()) in README, "run: python tests/families/matrix.py"


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
    assert (checkout / "exports" / "copy" / "config.json").is_file()
    run = checkout / "runs" / "quickstart"
    reached = validation_loss(run)
    assert reached < unigram_loss(run, tmp_path / "cache" / "jaxformers") - 1.5


def validation_loss(run):
    """Nats per token that the run reported last."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["validation_loss"] for line in lines if "validation_loss" in line][-1]


def unigram_loss(run, cache):
    """Nats per token that the frequencies of tokens in the training rows give on the run's validation rows."""
    config = load_config(run / "config.yaml", [f"data.cache_dir={cache}"])
    corpus = open_corpus(config.data, load_tokenizer(run / "tokenizer"))

    def targets(rows, count):
        return np.concatenate([row["targets"][row["weights"] > 0] for row in map(rows.__getitem__, range(count))])

    counts = 1 + np.bincount(targets(corpus.train, corpus.train.rows_per_epoch), minlength=config.tokenizer.vocab_size)
    rows = min(corpus.validation.rows_per_epoch, config.train.eval_batches * config.train.batch_size)
    return -np.log(counts / counts.sum())[targets(corpus.validation, rows)].mean()
