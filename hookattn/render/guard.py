"""Who may ask the viewer's server, decided before anything is read: an ASGI middleware.

A server on 127.0.0.1 is reached by every user of the machine, and by every page that a browser on it shows. So the
address holds a token that only who started the server knows, and requests that no page of its own makes are refused.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RenderError

LONGEST = 2048
"""Bytes of an address that is answered."""
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,256}")
_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::\d{1,5})?", re.IGNORECASE)
_METHODS = ("GET", "HEAD")
NO_FRAMES = "frame-ancestors 'none'"

# Of every answer, refusals too. What is shown is somebody's own: nothing of it is kept, embedded, or told to other
# places, as the address would be by a Referer.
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": f"default-src 'none'; {NO_FRAMES}",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """Passes on to an application what its own page asks, under ``/<token>/``, and refuses everything else.

    ::

        400   a Host that is none of this machine's own names (a page elsewhere whose name resolves to it), or a body
        403   no token or another, a request of another origin, a page that would be in a frame
        405   neither GET nor HEAD
        414   a long address

    Args:
        app: what is guarded.
        token: of letters, digits, ``-`` and ``_``, at least 16 of them: ``secrets.token_urlsafe()``.

    Raises:
        RenderError: a token of another form.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise RenderError("token: expected 16 letters, digits, - and _ or more, as secrets.token_urlsafe() gives.")
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        why = next(self._reasons(scope), None)
        if why is None:
            await self._app(scope, receive, guarded)
            return
        status, said = why
        more = {"allow": ", ".join(_METHODS)} if status == 405 else {}
        await PlainTextResponse(said + "\n", status, {"connection": "close", **more})(scope, receive, guarded)

    def _reasons(self, scope: Scope) -> Iterator[tuple[int, str]]:
        """Why a request is refused; none: it is not."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            yield 400, "This is answered under the names 127.0.0.1 and localhost alone."
        if scope["method"] not in _METHODS:
            yield 405, "Only GET and HEAD are answered."
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            yield 400, "A request has no body."
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"") > LONGEST:
            yield 414, "The address is too long."
        token = scope["path"].split("/", 2)[1:2]
        given = token[0].encode("utf-8", "surrogatepass") if token else b""
        if not secrets.compare_digest(given, self._token):
            yield 403, "The address lacks its token: open the whole address that `hookattn view` printed."
        origin = headers.get("origin")
        if origin is not None and (not hosts or origin != f"http://{hosts[0]}"):
            yield 403, "Pages of other origins get no answer."
        # What browsers say of who asks. A link or an address bar may open the page; other places may ask nothing else.
        site, mode, place = (headers.get(f"sec-fetch-{x}") for x in ("site", "mode", "dest"))
        if site in ("cross-site", "same-site") and (mode, place) != ("navigate", "document"):
            yield 403, "Pages of other origins get no answer."
        if place in ("iframe", "frame", "embed", "object", "fencedframe"):
            yield 403, "The page is not shown inside of another."
