"""A local page for trace files of any size: the viewer reads the parts it shows by HTTP Range requests."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from io import FileIO
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import RenderError
from ..optional import extra_named
from ..store import LazyFile
from . import html_shell
from .options import viewer_options
from .trace_files import TraceLike, as_trace, title_of, trace_file

HOST = "127.0.0.1"
PORT = 8765
"""The first port that is tried where none is asked for."""
_TRIED = 100
_BIN = "application/octet-stream"
_CHUNK, _AT_ONCE = 1 << 20, 1 << 26  # bytes of one read, and of an answer that is made before it is sent

_OPEN = """
  const got = await fetch("options");
  if (!got.ok) throw new Error(await got.text());
  const { compare, ...options } = await got.json();
  return { source: await served("trace"), compare: compare && await served("compare"), options };
"""


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
    text = html_shell.module_script(f'import {{ mount, served }} from "./{html_shell.MODULE}";', _OPEN)
    page = html_shell.page_head(title_of(as_trace(path))) + html_shell.page_tail(text)
    policy = {"content-security-policy": html_shell.content_policy(text, module="'self' blob:", connect="'self'")}
    routes = [
        Route("/", _text_endpoint(lambda: HTMLResponse(page, headers=policy))),
        Route(
            f"/{html_shell.MODULE}",
            _text_endpoint(lambda: Response(html_shell.viewer_module(), media_type="text/javascript")),
        ),
        Route("/options", _text_endpoint(lambda: JSONResponse({**(options or {}), "compare": compare is not None}))),
        *(Route(route, _file_endpoint(name)) for route, name in files.items()),
    ]
    # A page elsewhere may let its own name resolve to this machine (DNS rebinding), and is then of one origin with us.
    # Its requests name that host, and are refused.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts])


def _text_endpoint(make: Callable[[], Response]) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        return _with_guards(make())

    return answer


def _with_guards(response: Response) -> Response:
    # The trace changes under one address; pages elsewhere may neither guess its type nor embed it.
    response.headers.update(
        {
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            "cross-origin-resource-policy": "same-origin",
        }
    )
    return response


def _file_endpoint(path: str) -> Callable[[Request], Response]:
    """Parts of a file, as long as it is the one that the reader began with."""

    def answer(request: Request) -> Response:
        try:
            if not os.path.isfile(path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - the answer closes it
        except OSError as error:
            return _with_guards(PlainTextResponse(f"{path} cannot be read any more: {error.strerror}.", 410))
        with ExitStack() as stack:
            stack.enter_context(file)
            return _with_guards(_range_response(request, file, stack))

    return answer


def _range_response(request: Request, file: FileIO, stack: ExitStack) -> Response:
    """The asked range of an open file, whose owner, ``stack``, passes to the answer where that reads it."""
    found = os.fstat(file.fileno())
    size, tag = found.st_size, f'"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"'
    headers = {"etag": tag, "accept-ranges": "bytes", "x-name": quote(os.path.basename(file.name))}
    # The viewer holds the header of the file it opened. A part of another file would be decoded by that header, so that
    # each request says which file it is of, by inode, size and time of change.
    wanted = request.headers.get("if-range") or request.headers.get("if-match") or tag
    changed = PlainTextResponse(f"{file.name} has changed since it was opened.", 412, headers)
    if wanted not in (tag, "*"):  # to the former the standard would answer with the whole, large as it may be
        return changed
    start, end, status = 0, size, 200
    # One range with a start, which is all the viewer asks for; the standard lets a server answer others with the whole.
    asked = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", request.headers.get("range", ""))
    if asked is not None:
        start, end, status = int(asked[1]), min(size, int(asked[2] or size) + 1), 206
        if start >= end:
            return Response(status_code=416, headers={**headers, "content-range": f"bytes */{size}"})
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    if request.method == "HEAD":
        return Response(None, status, headers, media_type=_BIN)
    if end - start <= _AT_ONCE:  # so that a file that is being cut short is found out before the answer begins
        data = b"".join(_chunks(file, start, end, stack))
        return Response(data, status, headers, media_type=_BIN) if len(data) == end - start else changed
    return StreamingResponse(_chunks(file, start, end, stack.pop_all()), status, headers, media_type=_BIN)


def _chunks(file: FileIO, start: int, end: int, owner: ExitStack) -> Iterator[bytes]:
    with owner:
        file.seek(start)
        while start < end and (data := file.read(min(_CHUNK, end - start))):
            start += len(data)
            yield data


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


def _exit_on_signal(number: int, frame: object) -> None:
    sys.exit(128 + number)


def serve(
    trace: TraceLike,
    *,
    compare: TraceLike | None = None,
    port: int | None = None,
    open_browser: bool = True,
    ready: Callable[[str], object] = print,
    state: Mapping[str, Any] | None = None,
    scores: Any = None,
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
        scores: by which heads are sorted: the table of :func:`hookattn.analyze.report`, or plain data.
        images: what the patches of a vision model were cut of.
        theme: ``"light"``, ``"dark"`` or ``"auto"``.

    Raises:
        RenderError: the port is taken, or options of another form.
        TraceFileError: no trace file.
        ModuleNotFoundError: uvicorn is not installed.
    """
    with extra_named():
        import uvicorn

    with ExitStack() as stack:
        first = as_trace(trace)
        path = stack.enter_context(trace_file(first))
        second = None if compare is None else stack.enter_context(trace_file(compare))
        options = viewer_options(state=state, scores=scores, images=images, theme=theme, trace=first)
        app = application(path, compare=second, options=options)
        listening = stack.enter_context(listen(port))
        url = f"http://{HOST}:{listening.getsockname()[1]}/"
        ready(url)
        if open_browser:
            webbrowser.open(url)  # it waits in the socket's queue until the server runs
        if threading.current_thread() is threading.main_thread():
            # uvicorn stops on SIGTERM and then raises it again, which by default ends the process before the cleanup.
            stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _exit_on_signal))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
        with suppress(KeyboardInterrupt):  # uvicorn passes it on once it has stopped
            server.run(sockets=[listening])
