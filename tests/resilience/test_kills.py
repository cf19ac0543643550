"""A process that dies in the middle of a save loses that save and nothing else, wherever in it it dies."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def killed(count: int, *options: str, seed: int) -> int:
    """How many of the kills hit a save."""
    command = [
        sys.executable,
        str(ROOT / "tests/resilience/kills.py"),
        "--kills",
        str(count),
        "--seed",
        str(seed),
        *options,
    ]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    survived, hit = re.match(r"(\d+) kills survived, (\d+) of them in the middle of a save", done.stdout).groups()
    assert int(survived) == count
    return int(hit)


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint_and_goes_on_from_it():
    assert killed(5, seed=1) >= 1


def test_a_process_killed_while_it_saves_locally_and_copies_leaves_whole_checkpoints_in_both_places():
    assert killed(5, "--local", seed=1) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--local",)])
def test_a_process_killed_at_sixty_random_moments_of_its_saves_leaves_a_whole_checkpoint_each_time(options):
    assert killed(60, *options, seed=2) >= 20
