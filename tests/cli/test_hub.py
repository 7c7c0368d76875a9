"""Models by their name on the hub, where it answers and where it does not. Nothing here leaves this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import hookattn

pytest.importorskip("click")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from click.testing import CliRunner  # noqa: E402
from huggingface_hub import constants  # noqa: E402

from hookattn.cli.commands import app  # noqa: E402

NAME = "somebody/small"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def silent(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, and a hub at a port where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    return cache


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers was asked to load, which it then says is nowhere."""
    names: list[str] = []

    def load(name: str, **_: Any) -> Any:
        names.append(name)
        raise OSError("there is no such repository")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", load)
    return names


def keep(cache: Path) -> Path:
    """A model and its tokenizer in the cache, as the hub's library lays them out."""
    folder = cache / "models--somebody--small"
    snapshot = folder / "snapshots" / ("0" * 40)
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=3, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(snapshot)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_hub_that_does_not_answer_is_asked_once(silent: Path, asked: list[str]) -> None:
    result = CliRunner().invoke(app, ["trace", NAME, "--text", "the cat", "-o", str(silent / "x.safetensors")])
    assert result.exit_code == 1 and asked == []
    assert f"{NAME}: it is no directory here, the hub ({constants.ENDPOINT}) does not answer" in result.stderr


def test_then_a_model_of_the_cache_is_loaded_from_there(silent: Path) -> None:
    keep(silent)
    path = silent / "x.safetensors"
    result = CliRunner().invoke(app, ["trace", NAME, "--text", "the cat the", "-o", str(path)])
    assert result.exit_code == 0, result.output
    trace = hookattn.load(path)
    assert len(trace) == 1 and trace[0].weights.shape == (1, 2, 3, 3) and trace.tokens == [["the", "cat", "the"]]


class Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.server.heads.append(self.path)  # type: ignore[attr-defined]
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths asked for of a hub that answers."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.heads = []
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.heads
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_answers_is_left_to_transformers(
    hub: list[str], cache: Path, asked: list[str], offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    keep(cache)
    result = CliRunner().invoke(app, ["trace", NAME, "--text", "the cat", "-o", str(cache / "x.safetensors")])
    assert result.exit_code == 1 and asked == [NAME]
    assert "the hub did not give it: there is no such repository" in result.stderr
    assert len(hub) == (0 if offline else 1)
