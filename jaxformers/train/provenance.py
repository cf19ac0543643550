"""What a checkpoint says of where it came from: the libraries that wrote it, compared with those that read it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("jaxformers", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@cache
def library_versions() -> Mapping[str, str]:
    """The version of each library that writes or computes what a checkpoint holds; those not installed are left out."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def version_note(written: Mapping[str, str]) -> str | None:
    """A line on the libraries that are of another version now than when a checkpoint was written, None where none."""
    now = library_versions()
    changed = [f"{name} {was} (now {now[name]})" for name, was in written.items() if name in now and now[name] != was]
    return f"note: the checkpoint was written with {', '.join(changed)}" if changed else None
