"""A local page for trace files of any size: the viewer reads the parts it shows by HTTP Range requests."""

from __future__ import annotations

import errno
import os
import socket
import stat
import webbrowser
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..errors import RenderError
from ..store import LazyFile
from . import shell
from .options import viewer_options
from .stored import TraceLike, opened, stored, title_of

HOST = "127.0.0.1"
PORT = 8765
"""The first port that is tried where none is asked for."""
_TRIED = 100
_BIN = "application/octet-stream"

_OPEN = """
  const got = await fetch("options");
  if (!got.ok) throw new Error(await got.text());
  const { compare, ...options } = await got.json();
  return { source: await served("trace"), compare: compare && await served("compare"), options };
"""


class _Part(FileResponse):
    chunk_size = 1 << 20  # a head of a long context is many megabytes


def application(path: str, *, compare: str | None = None, options: Mapping[str, Any] | None = None) -> Starlette:
    """The ASGI application: ``/``, ``/options``, ``/trace``, ``/compare`` and the viewer's module.

    It answers requests to this machine by its own name only, so that no page elsewhere can read the trace by a name
    that resolves to it.

    Args:
        path: a trace file. It is opened anew for each request.
        compare: a second one.
        options: what :func:`hookattn.render.options.viewer_options` returns.

    Raises:
        TraceFileError: one of the two is no trace file.
    """
    files = {"/trace": path} | ({} if compare is None else {"/compare": compare})
    for name in files.values():
        LazyFile(name).close()
    text = shell.script(f'import {{ mount, served }} from "./{shell.MODULE}";', _OPEN)
    page = shell.head(title_of(opened(path))) + shell.tail(text)
    policy = {"content-security-policy": shell.policy(text, module="'self' blob:", connect="'self'")}
    routes = [
        Route("/", _fixed(lambda: HTMLResponse(page, headers=policy))),
        Route(f"/{shell.MODULE}", _fixed(lambda: Response(shell.module(), media_type="text/javascript"))),
        Route("/options", _fixed(lambda: JSONResponse({**(options or {}), "compare": compare is not None}))),
        *(Route(route, _ranges(name)) for route, name in files.items()),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts])


def _fixed(make: Callable[[], Response]) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        return _guarded(make())

    return answer


def _guarded(response: Response) -> Response:
    response.headers.update(
        {
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            "cross-origin-resource-policy": "same-origin",
        }
    )
    return response


def _ranges(path: str) -> Callable[[Request], Response]:
    """Parts of a file, as long as it is the one that the reader began with."""
    name = quote(os.path.basename(path))

    def answer(request: Request) -> Response:
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode) or not os.access(path, os.R_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            return _guarded(PlainTextResponse(f"{path} cannot be read any more: {error.strerror}.", 410))
        tag = f'"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"'
        wanted = request.headers.get("if-range") or request.headers.get("if-match") or tag
        if wanted not in (tag, "*"):  # the whole of a large file would be the standard's answer to the former
            return _guarded(PlainTextResponse(f"{path} has changed since it was opened.", 412, {"etag": tag}))
        return _guarded(_Part(path, headers={"etag": tag, "x-name": name}, media_type=_BIN, stat_result=found))

    return answer


def listen(port: int | None = None) -> socket.socket:
    """A listening socket on this machine alone.

    Args:
        port: which; None: the first free one from 8765 on; 0: any.

    Raises:
        RenderError: the port is taken, or none is free.
    """
    for tried in range(PORT, PORT + _TRIED) if port is None else (port,):
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if os.name == "posix":  # elsewhere it would share the port with whoever has it
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((HOST, tried))
            made.listen()
            return made
        except (OSError, OverflowError) as error:
            made.close()
            if port is not None:
                why = getattr(error, "strerror", None) or error
                raise RenderError(f"port {port}: {why}. Choose another one, or none to get a free one.") from error
    raise RenderError(f"no port from {PORT} to {PORT + _TRIED - 1} is free; ask for another one.")


def serve(
    trace: TraceLike,
    *,
    compare: TraceLike | None = None,
    port: int | None = None,
    open_browser: bool = True,
    ready: Callable[[str], object] = print,
    state: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
    theme: str = "auto",
) -> None:
    """Serve the viewer on this machine until interrupted (Ctrl-C). A trace file of any size opens at once.

    Args:
        trace: a trace, or the path of a trace file; one that is not in a file is written to a temporary one.
        compare: a second one, for the compare view.
        port: which; by default the first free one from 8765 on.
        open_browser: whether the page opens in the browser.
        ready: is called with the page's address once it answers.
        state: the selection shown first.
        scores: analyzer scores by which heads are sorted.
        images: what the patches of a vision model were cut of.
        theme: ``"light"``, ``"dark"`` or ``"auto"``.

    Raises:
        RenderError: the port is taken, or options of another form.
        TraceFileError: no trace file.
    """
    import uvicorn

    with ExitStack() as stack:
        path = stack.enter_context(stored(trace))
        second = None if compare is None else stack.enter_context(stored(compare))
        options = viewer_options(state=state, scores=scores, images=images, theme=theme)
        app = application(path, compare=second, options=options)
        listening = stack.enter_context(listen(port))
        url = f"http://{HOST}:{listening.getsockname()[1]}/"
        ready(url)
        if open_browser:
            webbrowser.open(url)  # it waits in the socket's queue until the server runs
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
        with suppress(KeyboardInterrupt):  # uvicorn passes it on once it has stopped
            server.run(sockets=[listening])
