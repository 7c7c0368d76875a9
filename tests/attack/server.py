"""The viewer's server is asked by who should get nothing: other users, other origins, garbage, and for another file."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

import hookattn
from tests.serving import TOKEN, Serving

from . import Figure

NOBODY = 65534
ROUTES = ("", "trace", "options", "hookattn-viewer.js", "compare", "none")
_WINDOW = 12  # bytes in a row that are of the file and not by chance
_HEADERS = (
    b"cache-control: no-store",
    b"referrer-policy: no-referrer",
    b"x-content-type-options: nosniff",
    b"frame-ancestors 'none'",
)


class Leaks:
    """What of a file is in answers."""

    def __init__(self, data: bytes) -> None:
        zeros = bytes(_WINDOW)
        self._windows = {data[i : i + _WINDOW] for i in range(len(data) - _WINDOW + 1)} - {zeros}
        self.bytes, self.asked, self.bare, self.examples = 0, 0, 0, []

    def judge(self, request: bytes, answer: bytes) -> None:
        """Count what one answer holds of the file, and whether its headers are whole."""
        self.asked += 1
        head, _, body = answer.partition(b"\r\n\r\n")
        found = sum(body[i : i + _WINDOW] in self._windows for i in range(max(0, len(body) - _WINDOW + 1)))
        if found or TOKEN.encode() in answer:
            self.bytes += len(body)
            self.examples.append(repr(request[:150]))
        # An answer to what is no HTTP at all is uvicorn's own.
        if head and not head.startswith(b"HTTP/1.1 400") and not all(x in head.lower() for x in _HEADERS):
            self.bare += 1
            self.examples.append(f"headers: {head[:150]!r}")


def traced(secret: str, path: Path, seed: int) -> Path:
    """A trace file whose document has a secret."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, x = torch.nn.MultiheadAttention(8, 2).eval(), torch.randn(3, 1, 8)
        with torch.no_grad():
            trace = hookattn.trace(model, (x, x, x), tokens=[secret, "b", "c"])
    path.unlink(missing_ok=True)
    made = Path(trace.save(path))
    made.chmod(0o600)
    return made


def line(path: str, *headers: str, method: str = "GET", host: str = "127.0.0.1") -> bytes:
    """A request."""
    rows = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    return ("\r\n".join(rows) + "\r\n\r\n").encode("utf-8", "surrogateescape")


def _wrong_token(draw: random.Random) -> bytes:
    kind = draw.randrange(6)
    token = [
        "",
        TOKEN[: draw.randrange(len(TOKEN))],
        TOKEN + draw.choice("ax-"),
        TOKEN.swapcase(),
        "".join(draw.choices("abcdefghijklmnop-_", k=draw.choice([1, 20, 43]))),
        TOKEN[:-1] + "%00",
    ][kind]
    path = draw.choice([f"/{token}/{{}}", "/{}", f"/{{}}?token={TOKEN}", f"//{{}}/{TOKEN}", f"/{token}/{{}};{TOKEN}"])
    return line(path.format(draw.choice(ROUTES)), *([f"Cookie: token={TOKEN}"] if draw.random() < 0.3 else []))


def _other_host(draw: random.Random) -> bytes:
    host = draw.choice(
        ["evil.example", "127.0.0.1.evil.example", "localhost.", "0.0.0.0", "[::1]", "127.1", "a@127.0.0.1", ""]
    )
    return line(f"/{TOKEN}/{draw.choice(ROUTES)}", host=host)


def _other_origin(draw: random.Random) -> bytes:
    said = draw.choice(
        [
            ["Origin: http://evil.example"],
            ["Origin: null"],
            ["Origin: http://127.0.0.1:1"],
            ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: script"],
            ["Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: cors", "Sec-Fetch-Dest: empty"],
            ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"],
        ]
    )
    return line(f"/{TOKEN}/{draw.choice(ROUTES)}", *said)


def _traversal(draw: random.Random) -> bytes:
    up = "".join(draw.choices(["../", "%2e%2e/", "..%2f", "..\\", "./", "//", "%252e/"], k=draw.randint(1, 6)))
    return line(f"/{TOKEN}/{up}{draw.choice(['etc/passwd', 'trace', 'other.safetensors', 'run.safetensors', ''])}")


def _no_range(draw: random.Random) -> bytes:
    wrong = draw.choice(
        ["bytes=0-1,2-3", "bytes=-5", "bytes=9-2",
         "bytes=99999999-", f"bytes={'9' * 400}-", "bytes=0-0x9", "bytes= 0-9",
         "w=0-9", "bytes=0-9\tx", "", "bytes=" + "0-1," * 2000, "bytes=1e1-", "bytes=+0-9"]
    )  # fmt: skip
    return line(f"/{TOKEN}/trace", f"Range: {wrong}")


def _no_reading(draw: random.Random) -> bytes:
    method = draw.choice(["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "X" * 50])
    return line(f"/{TOKEN}/trace", "Content-Length: 0", method=method)


def _garbage(draw: random.Random) -> bytes:
    kind = draw.randrange(4)
    if kind == 0:
        return draw.randbytes(draw.choice([1, 30, 500])) + b"\r\n\r\n"
    if kind == 1:
        return line("/" + "a" * draw.choice([3000, 20_000, 200_000]))
    if kind == 2:
        return line(
            f"/{TOKEN[:-1]}/trace", "X: " + "b" * draw.choice([10, 70_000]), "Upgrade: websocket", "Connection: Upgrade"
        )
    whole = bytearray(line(f"/{TOKEN[:-1]}_/trace"))
    for _ in range(draw.randint(1, 12)):
        whole[draw.randrange(len(whole) - 4)] = draw.randrange(256)
    return bytes(whole).replace(TOKEN.encode(), b"x")


KINDS: tuple[Callable[[random.Random], bytes], ...] = (
    _wrong_token, _other_host, _other_origin, _traversal, _no_range, _no_reading, _garbage,
)  # fmt: skip


def attack(rounds: int, seed: int = 0) -> Sequence[Figure]:
    """See :mod:`tests.attack`; a round is a request."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = traced(f"a secret of {seed}", Path(folder, "run.safetensors"), seed)
        data = path.read_bytes()
        leaks, unanswered = Leaks(data), 0
        with Serving(path, patience=0.5) as serving:

            def rightful() -> bool:
                answer = serving.talk(line(f"/{TOKEN}/trace", f"Range: bytes=0-{len(data)}"))
                return answer.startswith(b"HTTP/1.1 206") and answer.endswith(data)

            for n in range(rounds):
                request = KINDS[n % len(KINDS)](draw)
                leaks.judge(request, serving.talk(request))
                if n % 20 == 19:
                    unanswered += not rightful()
            other = _as_nobody(serving.port)
            held, unanswered_slow = _slow(serving, rightful)
        replaced = _replaced(Path(folder), max(4, rounds // 20), draw)
        trials = rounds // 20
    return [
        Figure("requests that are not for it", leaks.asked),
        Figure("bytes of the trace in their answers", leaks.bytes, 0, tuple(leaks.examples[:5])),
        Figure("answers without the headers that every answer has", leaks.bare, 0, tuple(leaks.examples[:5])),
        Figure(
            "rightful requests in between that were not answered", unanswered + unanswered_slow, 0, (f"{trials} made",)
        ),
        Figure("clients that never finish, still connected after six times the patience", held, 0),
        *other,
        *replaced,
    ]


def _as_nobody(port: int) -> list[Figure]:
    """Another user, who sees the port of the process and nothing else."""
    what = "routes asked for by another user of the machine"
    if not hasattr(os, "fork") or os.geteuid() != 0:
        return [Figure(f"{what} (not tried: it takes root to become one)", 0)]
    import socket

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # nothing but system calls: other threads of this process hold locks
        with suppress(BaseException):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            for route in ROUTES:
                with socket.socket() as asking:
                    asking.settimeout(10)
                    asking.connect(("127.0.0.1", port))
                    asking.sendall(b"GET /%s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n" % route.encode())
                    got = asking.recv(1 << 16)
                    os.write(writing, b"1" if got.startswith(b"HTTP/1.1 403") else b"0")
        os._exit(0)
    os.close(writing)
    said = b""
    while data := os.read(reading, 100):
        said += data
    os.close(reading)
    os.waitpid(child, 0)
    return [
        Figure(what, len(said)),
        Figure("of them not refused, or not asked", len(ROUTES) - said.count(b"1"), 0),
    ]


def _slow(serving: Serving, rightful: Callable[[], bool]) -> tuple[int, int]:
    """Clients that send half of a request: how many stay, and how many rightful requests go unanswered beside them."""
    pieces = [b"", b"GET", f"GET /{TOKEN}/trace HTTP/1.1\r\nHost: ".encode(), line(f"/{TOKEN}/")[:-2]]
    stuck = [serving.connect() for _ in range(40)]
    for n, one in enumerate(stuck):
        one.sendall(pieces[n % len(pieces)])
    missed = sum(not rightful() for _ in range(5))
    time.sleep(3.0)
    held = serving.connections
    for one in stuck:
        one.close()
    return held, missed


def _replaced(folder: Path, rounds: int, draw: random.Random) -> list[Figure]:
    """Another file under the name of the one that is served, or written into it; who knows the token asks on."""
    leaks = None
    tried = 0
    for n in range(rounds):
        path = traced("the first", folder / "a.safetensors", 1)
        other = traced("another secret, longer than the first", folder / "other.safetensors", 2)
        link = folder / "link.safetensors"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        first, second = path.read_bytes(), other.read_bytes()
        # What only the second has.
        leaks = leaks or Leaks(second)
        leaks._windows -= {first[i : i + _WINDOW] for i in range(len(first))}
        how = n % 4
        with Serving(link if how == 1 else path) as serving:
            if how == 0:
                other.replace(path)
            elif how == 1:
                link.unlink()
                link.symlink_to(other)
            elif how == 2:
                path.write_bytes(second)
            else:
                path.unlink()
                other.rename(path)
            for headers in ([], [f"Range: bytes={draw.randrange(50)}-{1 << 30}"], ["If-Range: *", "Range: bytes=0-"]):
                request = line(f"/{TOKEN}/trace", *headers)
                leaks.judge(request, serving.talk(request))
                tried += 1
    assert leaks is not None
    return [
        Figure("requests after another file took the name of the one that was opened", tried),
        Figure("bytes of the other file in their answers", leaks.bytes, 0, tuple(leaks.examples[:5])),
    ]
