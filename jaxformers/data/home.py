"""Where on this machine caches live. Knows nothing of what is in them."""

import os
from pathlib import Path


def cache_root(cache_dir: Path | None = None) -> Path:
    """Where caches live: the given folder, else $JAXFORMERS_CACHE, else this system's folder for them."""
    if cache_dir is not None:
        return cache_dir.expanduser()
    if named := os.environ.get("JAXFORMERS_CACHE"):
        return Path(named).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "jaxformers"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxformers"
