"""The plug-in of vLLM on a worker that stands in for vLLM's own; tests/serving_vllm has it on vLLM itself."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hookattn
from hookattn.attention.kernel_call import KernelCall
from hookattn.errors import InputError
from hookattn.serving import vllm_plugin
from tests.serving_requests.batches import Request, Server, flash, request
from tests.standins import Give, give

__all__ = ["give"]


@pytest.fixture
def server(give: Give) -> Iterator[Server]:
    flash(give)
    yield Server()


def config(eager: bool = True, graphs: str = "NONE", ranks: int = 1, groups: int = 2) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=eager, get_total_num_kv_heads=lambda: groups),
        compilation_config=SimpleNamespace(mode=0, cudagraph_mode=SimpleNamespace(name=graphs)),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )


Wrapper = Callable[..., Any]


@pytest.fixture
def worker(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Wrapper]:
    """Makes a worker of vLLM's kind, around which the plug-in is."""

    class WorkerWrapperBase:
        vllm_config: Any = None

        def __init__(self, own: Any = None, rank: int = 0, second: bool = False):
            self.vllm_config, self.down = own or config(), False
            runner: Any = SimpleNamespace(model=server.model)
            if second:
                runner.prepare_inputs = lambda names: SimpleNamespace(req_ids=names)
            self.worker = SimpleNamespace(rank=rank, model_runner=runner)

        def init_device(self) -> None:
            pass

        def execute_model(self, scheduled: Any) -> str:
            runner, names = self.worker.model_runner, [r.name for r, _ in scheduled.batch]
            if hasattr(runner, "prepare_inputs"):
                runner.prepare_inputs(names)
            else:
                runner.input_batch = SimpleNamespace(req_ids=names)
            if names:
                server.step(scheduled.batch, named=False)
            return "output"

        def shutdown(self) -> None:
            self.down = True

    module = types.ModuleType("vllm.v1.worker.worker_base")
    module.WorkerWrapperBase = WorkerWrapperBase  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1", "vllm.v1.worker"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("HOOKATTN_VLLM", str(tmp_path))
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM may call it twice

    def make(*args: Any, **kwargs: Any) -> Any:
        made = WorkerWrapperBase(*args, **kwargs)
        if not kwargs.get("second"):
            made.worker.model_runner.input_batch = None
        made.init_device()
        return made

    yield make


def scheduled(
    *batch: tuple[Request, int],
    new: Sequence[tuple[Request, Any]] = (),
    finished: Sequence[str] = (),
    computed: int = 0,
) -> Any:
    return SimpleNamespace(
        batch=batch,
        finished_req_ids=set(finished),
        num_scheduled_tokens={r.name: n for r, n in batch},
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=r.name,
                num_computed_tokens=computed,
                sampling_params=SimpleNamespace(extra_args=asked),
                pooling_params=None,
            )
            for r, asked in new
        ],
    )


@pytest.mark.parametrize("second", [False, True])
def test_steps_of_a_worker_become_files(worker: Wrapper, tmp_path: Path, second: bool) -> None:
    made = worker(second=second)
    a, b, c = request("chat-1-0a1b2c3d", 6), request("b", 5), request("c", 4)
    asked = [(a, {"hookattn": {"capture": ["weights", "mask"]}}), (b, None), (c, {"hookattn": True, "other": 1})]
    assert made.execute_model(scheduled((b, 5), (a, 4), new=asked[:2])) == "output"
    made.execute_model(scheduled((a, 2), (c, 4), new=asked[2:], computed=3))
    made.execute_model(scheduled(finished=[a.name, "b"]))
    made.shutdown()
    assert made.down
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.rank0.safetensors", "chat-1.rank0.safetensors"]
    found = hookattn.load(tmp_path / "chat-1.rank0.safetensors")
    assert [tuple(call.weights.shape) for call in found] == [(1, 4, 4, 4)] * 2 + [(1, 4, 2, 6)] * 2
    assert found.notes == ["the request is 'chat-1' to its client"]
    assert ["its first 3 positions" in n for n in hookattn.load(tmp_path / "c.rank0.safetensors").notes] == [
        True,
        False,
    ]


def test_whole_graphs_are_refused(worker: Wrapper, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm.hookattn").propagate = True
    made = worker(config(eager=False, graphs="FULL_AND_PIECEWISE"))
    a = request("a", 4)
    assert made.execute_model(scheduled((a, 4), new=[(a, {"hookattn": True})])) == "output"
    for name in ("hookattn_vllm.rank0.error.json", "a.rank0.error.json"):
        assert "enforce_eager=True" in json.loads((tmp_path / name).read_text())["error"]
    assert "no request will be recorded" in caplog.text


@pytest.mark.parametrize("own", [config(), config(False), config(False, "PIECEWISE"), config(True, "FULL")])
def test_what_can_be_seen_is_not_refused(worker: Wrapper, tmp_path: Path, own: Any) -> None:
    worker(own)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ranks", "rank", "heads", "groups", "of_groups", "expected"),
    [
        (1, 0, 4, 2, 2, None),
        (2, 1, 2, 1, 2, (2, 4, 1, 2)),
        (2, 3, 2, 1, 2, (2, 4, 1, 2)),  # of a second pipeline stage
        (4, 3, 1, 1, 2, (3, 4, 1, 2)),  # two ranks have the same key head
        (4, 1, 2, 3, 7, (2, 8, None, None)),
    ],
)
def test_the_heads_of_a_rank(
    ranks: int, rank: int, heads: int, groups: int, of_groups: int, expected: tuple[Any, ...] | None
) -> None:
    x = torch.zeros(1, heads, 1, 2)
    call = KernelCall(x, x[:, :1], x.new_zeros(1, groups, 1, 2), x, 1.0, "tap")
    found = vllm_plugin._shard_of(config(ranks=ranks, groups=of_groups), rank)(call)
    assert (found and (found.start, found.of, found.group_start, found.groups_of)) == expected


def test_the_name_that_a_client_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = vllm_plugin._as_client_knows_it
    monkeypatch.delenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", raising=False)
    assert [shown(x) for x in ("a-b-01234567", "a-0123456", "a-0123456g", "01234567", "")] == [
        "a-b", "a-0123456", "a-0123456g", "01234567", ""
    ]  # fmt: skip
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    assert shown("a-01234567") == "a-01234567"


def test_nothing_happens_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOKATTN_VLLM", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # to import it would fail
    vllm_plugin.register()
    monkeypatch.setenv("HOOKATTN_VLLM", "somewhere")
    monkeypatch.setenv("HOOKATTN_VLLM_MAX_TOKENS", "none")
    with pytest.raises(InputError, match="HOOKATTN_VLLM_MAX_TOKENS"):
        vllm_plugin.register()


def test_importing_it_loads_no_vllm() -> None:
    code = "import sys, hookattn.serving.vllm_plugin as p; p.register(); assert 'vllm' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    )


def test_vllm_finds_it() -> None:
    own = [p for p in entry_points(group="vllm.general_plugins") if p.name == "hookattn"]
    if not own:
        pytest.skip("this package was installed before it had the entry point")
    assert own[0].load() is vllm_plugin.register


def test_an_engine_in_its_own_process_tells_of_the_last_request(
    worker: Wrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InprocClient:
        engine_core = SimpleNamespace(scheduler=SimpleNamespace(finished_req_ids=set()))

        def get_output(self) -> str:
            return "outputs"

    core = types.ModuleType("vllm.v1.engine.core_client")
    core.InprocClient = InprocClient  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, core.__name__, core)
    made = worker()
    a = request("a", 4)
    made.execute_model(scheduled((a, 4), new=[(a, {"hookattn": True})]))
    client = InprocClient()
    assert client.get_output() == "outputs" and not (tmp_path / "a.rank0.safetensors").exists()
    client.engine_core.scheduler.finished_req_ids.add("a")
    assert client.get_output() == "outputs" and (tmp_path / "a.rank0.safetensors").exists()
