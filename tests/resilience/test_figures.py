"""What the README's table is made with runs, by itself and in small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from figures import overhead

FIGURES = Path(__file__).with_name("figures.py")


def test_what_checksums_add_to_a_save_is_measured():
    share = re.fullmatch(r"([\d.]+)% of the seconds of a save \(0.001 GB\)", overhead(0.001))
    assert 0 < float(share[1]) < 100


@pytest.mark.slow
def test_the_table_has_a_figure_for_each_kind_of_harm():
    command = [sys.executable, str(FIGURES), "--kills", "2", "--harms", "10", "--flips", "1", "--gigabytes", "0.001"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(FIGURES.parents[2])}
    )
    assert done.returncode == 0, done.stderr
    _, _, *found = (line.split(" | ")[1].strip(" |") for line in done.stdout.splitlines()[2:])
    for said, expected in zip(found, ("10 of 10 found", "1 of 1 caught", "1 of 8 updates"), strict=False):
        assert said.startswith(expected)
