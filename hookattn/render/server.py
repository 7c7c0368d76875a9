"""A local page for trace files of any size: the viewer reads the parts it shows by HTTP Range requests."""

from __future__ import annotations

import html
import os
import re
import secrets
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from ..errors import RenderError
from ..optional import extra_named
from ..store.scratch import scratch
from . import html_shell
from .guard import NO_FRAMES, Guard
from .opened_file import Changed, OpenedFile
from .options import viewer_options
from .trace_files import TraceLike, as_trace, title_of, trace_file

HOST = "127.0.0.1"
PORT = 8765
"""The first port that is tried where none is asked for."""
_TRIED = 100
_BIN = "application/octet-stream"
_AT_ONCE = 1 << 26  # bytes of an answer that is made before it is sent

_OPEN = f"""
  const {{ mount, served }} = await import("./{html_shell.MODULE}");
  const got = await fetch("options");
  if (!got.ok) throw new Error(await got.text());
  const {{ compare, ...options }} = await got.json();
  return {{ mount, source: await served("trace"), compare: compare && await served("compare"), options }};
"""


def application(
    path: str, *, token: str, compare: str | None = None, options: Mapping[str, Any] | None = None
) -> ASGIApp:
    """The ASGI application: under ``/<token>/`` the page, ``options``, ``trace``, ``compare`` and the viewer's module.

    Requests without the token are refused, and so are those of other origins and under other names than this machine's
    own; see :mod:`hookattn.render.guard`.

    Args:
        path: a trace file. It is held open: whatever takes its name later is not served.
        token: who knows it may read the trace; ``secrets.token_urlsafe()`` makes one.
        compare: a second file.
        options: what :func:`hookattn.render.options.viewer_options` returns.

    Raises:
        TraceFileError: one of the two is no trace file.
        RenderError: a token that is too short, or has other characters than those of a URL's path.
    """
    files = {"trace": path} | ({} if compare is None else {"compare": compare})
    opened = {name: OpenedFile(file) for name, file in files.items()}
    text = html_shell.module_script(_OPEN)
    page = html_shell.page_head(title_of(as_trace(path))) + html_shell.page_tail(text)
    policy = html_shell.content_policy(text, module="'self' blob:", connect="'self'")
    headers = {"content-security-policy": f"{policy}; {NO_FRAMES}"}
    under: dict[str, Callable[[Request], Response]] = {
        "": lambda request: HTMLResponse(page, headers=headers),
        html_shell.MODULE: lambda request: Response(html_shell.viewer_module(), media_type="text/javascript"),
        "options": lambda request: JSONResponse({**(options or {}), "compare": compare is not None}),
        **{name: _file_endpoint(file) for name, file in opened.items()},
    }
    app = Starlette(routes=[Route(f"/{token}/{name}", answer) for name, answer in under.items()])
    app.router.redirect_slashes = False
    return Guard(app, token)


def _file_endpoint(file: OpenedFile) -> Callable[[Request], Response]:
    """Parts of a file, as long as it is as it was opened."""

    def answer(request: Request) -> Response:
        try:
            file.check()
            return _range_response(request, file)
        except Changed:
            said = "The file has changed since it was opened. Start hookattn view again to see what it holds now."
            return PlainTextResponse(said, 412)
        except OSError as error:
            return PlainTextResponse(f"{file.name} cannot be read any more: {error.strerror or error}.", 410)

    return answer


def _range_response(request: Request, file: OpenedFile) -> Response:
    """The asked range of a file.

    Raises:
        Changed, OSError: see :class:`OpenedFile`.
    """
    headers = {"etag": file.tag, "accept-ranges": "bytes", "x-name": quote(file.name)}
    # The viewer holds the header of the file it opened. A part of another file would be decoded by that header, so that
    # each request says which file it is of.
    for named in ("if-range", "if-match"):  # to the former the standard would answer with the whole, large as it may be
        if request.headers.get(named, file.tag) not in (file.tag, "*"):
            raise Changed
    start, end, status = 0, file.size, 200
    given = request.headers.getlist("range")
    if given:
        # One range with a start, which is all the viewer asks for.
        asked = re.fullmatch(r"bytes=([0-9]{1,18})-([0-9]{0,18})", given[0]) if len(given) == 1 else None
        if asked is not None:
            start, end, status = int(asked[1]), min(file.size, int(asked[2] or file.size) + 1), 206
        if asked is None or start >= end:
            return Response(status_code=416, headers={**headers, "content-range": f"bytes */{file.size}"})
        headers["content-range"] = f"bytes {start}-{end - 1}/{file.size}"
    headers["content-length"] = str(end - start)
    if request.method == "HEAD":
        return Response(None, status, headers, media_type=_BIN)
    if end - start <= _AT_ONCE:  # so that a file that is being written to is found out before the answer begins
        return Response(b"".join(file.read(start, end)), status, headers, media_type=_BIN)
    return StreamingResponse(file.read(start, end), status, headers, media_type=_BIN)


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


def open_in_browser(url: str, stack: ExitStack) -> None:
    """Open an address that nobody else may learn.

    A browser gets its address as an argument, and the arguments of a process are there for every user to see. So it
    gets that of a file, which only this user may read and which leads on; it goes when the stack is closed.
    """
    folder = stack.enter_context(scratch())
    file = Path(folder, "view.html")
    said = html.escape(url)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as made:
        made.write(
            f'<!doctype html>\n<meta charset="utf-8">\n<meta http-equiv="refresh" content="0; url={said}">\n'
            f'<title>hookattn</title>\n<p><a href="{said}">The viewer</a></p>\n'
        )
    webbrowser.open(file.as_uri())


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

    The address holds a token that is made anew each time: who does not know it gets no answer.

    Args:
        trace: a trace, or the path of a trace file; one that is not in a file is written to a temporary one.
        compare: a second one, for the compare view.
        port: which; by default the first free one from 8765 on.
        open_browser: whether the page opens in the browser.
        ready: is called with the page's address, the token in it, once it answers.
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

        from .connections import uvicorn_config

    with ExitStack() as stack:
        first = as_trace(trace)
        path = stack.enter_context(trace_file(first))
        second = None if compare is None else stack.enter_context(trace_file(compare))
        options = viewer_options(state=state, scores=scores, images=images, theme=theme, trace=first)
        token = secrets.token_urlsafe()
        app = application(path, token=token, compare=second, options=options)
        listening = stack.enter_context(listen(port))
        url = f"http://{HOST}:{listening.getsockname()[1]}/{token}/"
        ready(url)
        if open_browser:
            open_in_browser(url, stack)  # it waits in the socket's queue until the server runs
        if threading.current_thread() is threading.main_thread():
            # uvicorn stops on SIGTERM and then raises it again, which by default ends the process before the cleanup.
            stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _exit_on_signal))
        server = uvicorn.Server(uvicorn_config(app))
        with suppress(KeyboardInterrupt):  # uvicorn passes it on once it has stopped
            server.run(sockets=[listening])
