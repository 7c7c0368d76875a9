"""Servers of notebooks, each with a home of its own, and the way to what is shown in them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOMES = (
    "HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR",
)  # fmt: skip
"""What says where settings are read and written."""
PATIENCE = 90
"""Seconds that a server has to answer."""
SET_UP = """
import hookattn
from hookattn import render
from hookattn.demo.induction import example_tokens, load_pretrained
ids = example_tokens(0, length=8)
trace = hookattn.trace(load_pretrained(), ids, tokens=[[f"t{i}" for i in ids[0].tolist()]])
"""
"""The first cell of every notebook: two layers of four heads."""


def environment(folder: Path) -> dict[str, str]:
    """That of a server: no settings but its own, in ``folder``, and a proxy that leads nowhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON", "MARIMO"))}
    for name in HOMES:
        place = folder / name.lower()
        place.mkdir(parents=True, exist_ok=True)
        kept[name] = str(place)
    nowhere = "http://127.0.0.1:9"  # the port of discard, which nobody has
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        kept[name] = kept[name.upper()] = nowhere
    return {**kept, "no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "1"}


@contextmanager
def _running(command: list[str], folder: Path, where: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server; what it says is in ``folder``/log. It is asked to end, which ends its kernels too."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment(folder), cwd=where, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until(ready: Any, process: subprocess.Popen[bytes], folder: Path) -> Any:
    """What ``ready`` returns as soon as it is something."""
    end = time.monotonic() + PATIENCE
    while (found := ready()) is None:
        if process.poll() is not None or time.monotonic() > end:
            said = (folder / "log").read_text(errors="replace")
            raise RuntimeError(f"the server does not answer; it said:\n{said[-4000:]}")
        time.sleep(0.1)
    return found


def _answers(url: str) -> bool:
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


@contextmanager
def jupyterlab(folder: Path, notebooks: Path) -> Iterator[str]:
    """JupyterLab on a free port; yields its address, which ends in a slash.

    Args:
        folder: where its settings are.
        notebooks: what it shows.
    """
    # Otherwise it asks at its first start whether it may fetch news.
    asked = folder / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    asked.mkdir(parents=True)
    (asked / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [
        "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0",
        "--IdentityProvider.token=", f"--ServerApp.root_dir={notebooks}", "--ServerApp.terminals_enabled=False",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly",
        "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    with _running(command, folder, notebooks) as process:

        def address() -> str | None:
            for info in (folder / "jupyter_runtime_dir").glob("jpserver-*.json"):
                url = str(json.loads(info.read_text() or "{}").get("url", ""))
                if url and _answers(f"{url}api/status"):
                    return url
            return None

        yield _until(address, process, folder)


@contextmanager
def marimo(folder: Path, mode: str, notebook: Path) -> Iterator[str]:
    """marimo on a free port; yields its address.

    Args:
        folder: where its settings are.
        mode: ``"run"``, as an app, or ``"edit"``.
        notebook: a file of Python.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = ["marimo", "--yes", mode, str(notebook), "--headless", "--no-token", "--host", "127.0.0.1"]
    command += ["--port", str(port), *(["--skip-update-check"] if mode == "edit" else [])]
    with _running(command, folder, notebook.parent) as process:
        _until(lambda: _answers(f"{url}health") or None, process, folder)
        yield url


# ---------------------------------------------------------------------------------------------------- what is shown


def sizes(pictures: Any) -> list[tuple[int, int]]:
    """Columns and rows of the pictures of a locator, in pixels of their own; 0 0 of one that was not decoded."""
    found = pictures.evaluate_all("all => all.map(one => [one.naturalWidth, one.naturalHeight])")
    return [(int(columns), int(rows)) for columns, rows in found]


def view(viewer: Any) -> str:
    """Which view of a viewer is open, by the name of its tab."""
    return str(viewer.locator(".tabs [aria-selected=true]").inner_text())
