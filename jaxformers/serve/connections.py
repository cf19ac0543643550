"""Connections that are given up on: heads that never end, and readers that never read."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxformers.serve.served import Limits


def bounded_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, which waits without end for a request's head and for a stalled reader, with bounds."""

    class Bounded(H11Protocol):
        """Closes a connection whose request does not begin in time, or whose peer takes nothing in time."""

        _head: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._head = _cancelled(self._head)
            elif self._head is None and not self.transport.is_closing():
                self._await_head()

        def on_response_complete(self) -> None:
            self._head = _cancelled(self._head)
            super().on_response_complete()

        def _await_head(self) -> None:
            self._head = self.loop.call_later(limits.header_seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = _cancelled(self._stalled)
            self._stalled = self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._stalled = _cancelled(self._stalled)
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head, self._stalled = _cancelled(self._head), _cancelled(self._stalled)
            super().connection_lost(exc)

    return Bounded


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
