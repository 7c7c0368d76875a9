"""uvicorn as the viewer needs it: small requests, no logs of addresses, and no waiting for who never finishes."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 10.0
"""Seconds that a client may take for a request."""
_SLOWER = 6  # as many times that for taking some of an answer, which may go through a slow tunnel
_UNSENT = 1 << 18  # bytes that the system holds of an answer; with few it is soon seen whether they go anywhere
MOST = 200
"""Connections at once."""
_HEAD = 16_384  # bytes of a request, which has no body


def uvicorn_config(app: ASGIApp, patience: float = PATIENCE) -> uvicorn.Config:
    """How uvicorn runs the viewer's application.

    Args:
        app: see :func:`hookattn.render.server.application`.
        patience: seconds after which a connection is ended where no whole request came; six times that, where nothing
            of an answer was taken.
    """
    watched = _Watched(app)
    return uvicorn.Config(
        watched,
        http=_protocol(watched, patience),
        ws="none",
        lifespan="off",
        log_level="critical",  # of what others send, nothing is worth a line in the user's terminal
        access_log=False,  # its lines hold the address, and that the token
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=_HEAD,
        limit_concurrency=MOST,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
    )


@dataclass
class _Progress:
    """What was done for a client: how many requests began, whether one is being answered, bytes handed over."""

    begun: int = 0
    answering: bool = False
    sent: int = 0


class _Watched:
    """An application that keeps a record of what it does for each client."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.clients: dict[Any, _Progress] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        done = self.clients.get(scope.get("client"), _Progress())

        async def counting(message: Message) -> None:
            done.sent += len(message.get("body", b""))
            await send(message)

        done.begun += 1
        done.answering = True
        try:
            await self._app(scope, receive, counting)
        finally:
            done.answering = False


def _protocol(watched: _Watched, patience: float) -> type[asyncio.Protocol]:
    class Patient(H11Protocol):
        """HTTP/1.1 with a client that is looked at every so often, and cut off if nothing has moved since."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._peer = tuple((transport.get_extra_info("peername") or ())[:2])
            self._done = watched.clients[self._peer] = _Progress()
            self._before, self._times = (0, 0), 0
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)
            self._look = asyncio.get_running_loop().call_later(patience, self._look_at, transport)

        def connection_lost(self, exc: Exception | None) -> None:
            self._look.cancel()
            if watched.clients.get(self._peer) is self._done:
                del watched.clients[self._peer]
            super().connection_lost(exc)

        def _look_at(self, transport: asyncio.Transport) -> None:
            waiting, done = transport.get_write_buffer_size(), self._done
            now = (done.begun, done.sent - waiting)
            # Where an answer is being made and nothing waits to be taken, it is the server that takes its time.
            stuck = now == self._before and (waiting or not done.answering)
            self._times = self._times + 1 if stuck else 0
            if self._times >= (_SLOWER if waiting else 1):
                transport.abort()
                return
            self._before = now
            self._look = asyncio.get_running_loop().call_later(patience, self._look_at, transport)

    return Patient
