"""The viewer's server as ``hookattn view`` runs it, in a thread, for tests that talk to it."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from hookattn.render.connections import PATIENCE, uvicorn_config
from hookattn.render.server import HOST, application, listen

TOKEN = "a-token_of-this-test"


class Serving:
    """Serves a file while the block runs.

    Attributes:
        port: where.
        url: the whole address, the token in it.
    """

    def __init__(self, path: Path, patience: float = PATIENCE, **options: Any) -> None:
        app = application(str(path), token=TOKEN, **options)
        self._listening = listen(0)
        self.port: int = self._listening.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}/{TOKEN}/"
        self._server = uvicorn.Server(uvicorn_config(app, patience))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True)

    def __enter__(self) -> Serving:
        self._thread.start()
        return self

    def __exit__(self, *why: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listening.close()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._server.server_state.connections)

    def connect(self) -> socket.socket:
        """A connection."""
        return socket.create_connection((HOST, self.port), 10)

    def talk(self, *pieces: bytes, pause: float = 0.0) -> bytes:
        """What comes back until the connection ends.

        Args:
            pieces: are sent one after another,
            pause: with so many seconds between.
        """
        got = b""
        with self.connect() as asking:
            try:
                for piece in pieces:
                    asking.sendall(piece)
                    if pause:
                        time.sleep(pause)
                while data := asking.recv(1 << 16):
                    got += data
            except OSError:  # it was cut off
                pass
        return got
