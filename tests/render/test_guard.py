"""Who is answered by the viewer's server, and for how long it waits."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")

from starlette.testclient import TestClient

from hookattn.errors import RenderError
from hookattn.render.server import HOST, application, listen, open_in_browser
from tests.render.test_server import client, path, ten_gigabytes
from tests.serving import TOKEN, Serving

__all__ = ["path"]  # a fixture

ROUTES = ("", "trace", "options", "hookattn-viewer.js", "compare", "none")
GUARDED = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def assert_guarded(answer: Any) -> None:
    assert {name: answer.headers.get(name) for name in GUARDED} == GUARDED
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "access-control-allow-origin" not in answer.headers and "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "127.0.0.1:8765:1", "", "[::1]"]
)
def test_only_this_machine_by_its_own_name_may_ask(path: Path, host: str) -> None:
    asker = client(path)
    for name in ("127.0.0.1:8765", "localhost:9000", "localhost", "LOCALHOST"):
        assert asker.get("trace", headers={"host": name}).status_code == 200
    for route in ROUTES:
        answer = asker.get(route, headers={"host": host})
        assert answer.status_code == 400 and TOKEN not in answer.text, route
        assert_guarded(answer)
    listening = listen(0)
    assert listening.getsockname()[0] == "127.0.0.1"
    listening.close()


@pytest.mark.parametrize(
    "before",
    [
        "",
        "/",
        "//",
        f"{TOKEN}x",
        TOKEN[:-1],
        TOKEN.upper(),
        f"%20{TOKEN}",
        f"x/{TOKEN}",
        f"?token={TOKEN}",
        f"..;/{TOKEN}",
        "\ud800é",
    ],
)
def test_who_lacks_the_token_gets_nothing(path: Path, before: str) -> None:
    asker = TestClient(application(str(path), token=TOKEN), base_url=f"http://{HOST}:8765")
    for route in ROUTES:
        answer = asker.get(f"http://{HOST}:8765/{quote(before, safe='/?=%;.', errors='surrogatepass')}/{route}")
        assert answer.status_code == 403 and "open the whole address" in answer.text, route
        assert TOKEN not in answer.text and TOKEN not in str(answer.headers)
        assert_guarded(answer)
    assert asker.get(f"/{TOKEN}").status_code == 404


@pytest.mark.parametrize("token", ["", "short", "a" * 15, "a" * 300, "with/slash/in/it/and/more", "é" * 20, None])
def test_a_token_is_long_and_of_one_piece(path: Path, token: Any) -> None:
    with pytest.raises(RenderError, match="token: expected 16"):
        application(str(path), token=token)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "https://127.0.0.1:8765"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
        {"sec-fetch-site": "same-origin", "sec-fetch-mode": "navigate", "sec-fetch-dest": "frame"},
        {"sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "object"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_pages_of_other_origins_get_nothing(path: Path, headers: dict[str, str]) -> None:
    """Even where they know the token."""
    asker = client(path)
    for route in ROUTES:
        answer = asker.get(route, headers=headers)
        assert answer.status_code == 403, route
        assert_guarded(answer)


def test_its_own_page_and_a_followed_link_are_answered(path: Path) -> None:
    asker = client(path)
    for headers in (
        {"origin": "http://127.0.0.1:8765"},
        {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
        {"sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
    ):
        for route in ("", "trace", "options", "hookattn-viewer.js"):
            answer = asker.get(route, headers=headers)
            assert answer.status_code == 200
            assert_guarded(answer)


def test_what_is_no_reading_is_refused(path: Path) -> None:
    asker = client(path)
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"):
        answer = asker.request(method, "trace")
        assert answer.status_code == 405 and answer.headers["allow"] == "GET, HEAD"
        assert_guarded(answer)
    assert asker.request("GET", "trace", content=b"x").status_code == 400
    assert asker.get("trace?" + "x" * 3000).status_code == 414
    for route in (
        "../pyproject.toml",
        "%2e%2e/trace",
        "trace/../../etc/passwd",
        "trace/",
        "trace%00",
        "/etc/passwd",
        "TRACE",
    ):
        answer = asker.get(f"http://{HOST}:8765/{TOKEN}/{route}")
        assert answer.status_code in (403, 404) and len(answer.content) < 200, route


def test_the_address_is_no_argument_of_a_process(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = f"http://{HOST}:1/{TOKEN}/"
    with ExitStack() as stack:
        open_in_browser(url, stack)
        assert len(opened) == 1 and opened[0].startswith("file:") and TOKEN not in opened[0]
        file = Path(url2pathname(urlsplit(opened[0]).path))
        assert f"url={url}" in file.read_text() and file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700
    assert not file.parent.exists()


def test_who_never_finishes_is_cut_off(path: Path) -> None:
    head = f"GET /{TOKEN}/trace HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n".encode()
    with Serving(path, 0.5) as serving:
        whole = serving.talk(head + b"\r\n")
        assert whole.startswith(b"HTTP/1.1 200") and whole.endswith(path.read_bytes())
        began = time.monotonic()
        assert serving.talk(b"") == serving.talk(head) == b""
        assert serving.talk(*(b"X-%d: a\r\n" % i for i in range(99)), pause=0.1) == b"", "also one byte after another"
        # A request that goes on after the first was answered.
        kept = head.replace(b"Connection: close\r\n", b"")
        answer = serving.talk(kept + b"\r\n", kept)
        assert answer.count(b"HTTP/1.1") == 1
        assert time.monotonic() - began < 20
        assert serving.talk(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 4")
        assert serving.talk(head + b"\r\n").endswith(path.read_bytes()), "others are answered as before"


def test_who_takes_nothing_is_cut_off_and_who_is_slow_is_not(path: Path) -> None:
    big = ten_gigabytes(path)
    ask_for = f"GET /{TOKEN}/trace HTTP/1.1\r\nHost: localhost\r\n"
    with Serving(big, 0.5) as serving:
        with (
            serving.connect() as stuck,
            serving.connect() as slow,
        ):
            for one in (stuck, slow):
                one.sendall(f"{ask_for}Range: bytes=0-{1 << 30}\r\n\r\n".encode())
            taken = 0
            for _ in range(50):  # longer than the one that takes nothing is waited for
                time.sleep(0.1)
                more = len(slow.recv(200_000))
                assert more, "it goes on for who takes something now and then"
                taken += more
            assert taken > 1 << 20
            got = 0
            with suppress(ConnectionError):
                while more := len(stuck.recv(1 << 20)):
                    got += more
            assert got < 1 << 26, "of a gigabyte, what was on its way"
        assert serving.connections <= 1
