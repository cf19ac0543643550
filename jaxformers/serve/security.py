"""Who may ask: keys on every route but health, the names a server is called by, and who may listen where."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxformers.serve.errors import ApiError
from jaxformers.serve.served import Access

OPEN_PATHS = frozenset({"/health"})
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """Turns away whoever may not ask, before anything else is looked at.

    A key comes as a bearer token, or as the password of basic authentication, which is what a browser asks for.
    """

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._hosts = app, access.hosts
        self._keys = [_digest(key) for key in access.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self._app if refusal is None else refusal.response())(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._hosts and _without_port(headers.get("host", "")) not in self._hosts:
            return ApiError(f"this server answers to {', '.join(self._hosts)} alone", status=403, code="wrong_host")
        if not self._keys or scope["path"] in OPEN_PATHS:
            return None
        given = _given_key(headers.get("authorization", ""))
        if given is None:
            return _unauthorized("You didn't provide an API key.", code=None)
        known = [hmac.compare_digest(_digest(given), key) for key in self._keys]  # all of them, for equal time
        return None if any(known) else _unauthorized("Incorrect API key provided.", code="invalid_api_key")


def _unauthorized(message: str, *, code: str | None) -> ApiError:
    headers = {"WWW-Authenticate": 'Basic realm="jaxformers", charset="UTF-8"'}
    return ApiError(message, status=401, code=code, headers=headers)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given_key(authorization: str) -> str | None:
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return None


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def read_keys(given: Sequence[str], file: Path | None, environment: str | None) -> tuple[str, ...]:
    """The keys from options, from the lines of a file and from an environment variable.

    ValueError for a file without a key, and for a key that no header can carry.
    """
    keys = [*given, *([environment] if environment else [])]
    if file is not None:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"{file} holds no key; write one a line")
        keys += found
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("an API key must be printable ASCII characters without spaces, and not empty")
    return tuple(dict.fromkeys(keys))


def check_exposure(host: str, *, has_key: bool, insecure: bool) -> None:
    """Refuses, with a ValueError, to serve everyone without a key."""
    if not (is_loopback(host) or has_key or insecure):
        raise ValueError(
            f"host {host} can be reached from other machines, and no API key is set; "
            "give --api-key or --api-key-file, or --insecure to serve everyone"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host by this name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
