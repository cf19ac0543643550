"""The chat page: one file without outside resources, and the policy that lets it run nothing but its own script."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files


@functools.cache
def page() -> str:
    """The page's HTML."""
    return files("jaxformers.serve").joinpath("static/index.html").read_text(encoding="utf-8")


@functools.cache
def content_security_policy() -> str:
    """The value of the page's Content-Security-Policy header: its script and style by their hashes, requests to its own
    server, and nothing else."""
    allowed = {
        "default-src": "'none'",
        "script-src": _hash("script"),
        "style-src": _hash("style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{directive} {source}" for directive, source in allowed.items())


def _hash(tag: str) -> str:
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
