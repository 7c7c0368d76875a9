"""A trace that is broken off, that is not of the task or thread that runs the model, and that is forked."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn.recording import live
from hookattn.recording.session import Session
from hookattn.taps.active import current
from hookattn.torch_internals import forks
from hookattn.torch_internals.isolation import isolated
from tests.attack.forks import asked
from tests.attack.scenes import IDS, MODELS, PlainModel, left


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    hookattn.trace(made, IDS)
    return made


def raising(name: str, file: str, error: BaseException) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that raises as a function of the library begins; Python then forgets it."""

    def watch(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if event == "call" and code.co_name == name and code.co_filename.endswith(file):
            raise error
        return None

    return watch


def hit(model: nn.Module, watch: Any) -> BaseException | None:
    sys.settrace(watch)
    try:
        hookattn.trace(model, IDS)
    except BaseException as error:  # noqa: BLE001 - it is what is looked at
        return error
    finally:
        sys.settrace(None)
    return None


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("remove", "models/module_hooks.py"),
        ("remove", "code_patching.py"),
        ("close", "function_modes.py"),
        ("fits", "code_patching.py"),
        ("install", "models/module_hooks.py"),
        ("stop", "recording/session.py"),
        ("_detach", "recording/session.py"),
        ("close", "recording/session.py"),
    ],
)
def test_an_interrupt_as_it_begins_or_ends_leaves_nothing(
    model: nn.Module, name: str, file: str, tmp_path: Path
) -> None:
    error = hit(model, raising(name, file, KeyboardInterrupt()))
    assert isinstance(error, KeyboardInterrupt)
    del error
    assert not left(model, tmp_path)
    assert not hookattn.trace(model, IDS).notes


def test_a_trace_heals_what_an_earlier_one_could_not_end(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hit each time that it tries, it gives up; the next one ends it, and says so."""

    def interrupted(_: Session) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_detach", interrupted)
    error = hit(model, None)
    monkeypatch.undo()
    assert isinstance(error, KeyboardInterrupt)
    assert left(model, tmp_path)
    trace = hookattn.trace(model, IDS)
    assert any("was broken off as it ended" in note for note in trace.notes) and trace.calls
    assert not left(model, tmp_path)
    assert not hookattn.trace(model, IDS).notes


def test_what_is_hit_between_the_model_and_the_end_is_put_back_too(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As certificates are measured, the hooks are gone; gradients may be off, and are on again."""

    def measures(_: Session) -> None:
        isolated(IDS).__enter__()
        assert not torch.is_grad_enabled()
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "finish", measures)
    assert isinstance(hit(model, None), KeyboardInterrupt)
    assert not left(model, tmp_path)


def test_gradients_are_on_again_after_a_copy_found_no_memory(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from hookattn.recording import recorder

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for the copy")

    monkeypatch.setattr(recorder, "snapshots", full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = hit(model, None)
    assert torch.is_grad_enabled() and (error is None or "memory" in str(error))
    monkeypatch.undo()
    assert len(hookattn.trace(model, IDS).calls) == 2


def test_a_block_in_a_generator_that_is_closed(model: nn.Module, tmp_path: Path) -> None:
    def steps() -> Any:
        with hookattn.tracing(model):
            model(IDS)
            yield

    begun = steps()
    next(begun)
    begun.close()
    assert not left(model, tmp_path)


def test_a_block_that_another_thread_collects(model: nn.Module, tmp_path: Path) -> None:
    """Its mode is on the stack of a thread that nobody else can reach; it does nothing, and goes later."""
    block: list[Any] = []

    def begin() -> None:
        made = hookattn.tracing(model)
        made.__enter__()
        block.append(made)

    begin()
    thread = threading.Thread(target=lambda: (block.clear(), gc.collect()))
    thread.start()
    thread.join()
    model(IDS)
    assert current() is None
    assert hookattn.trace(model, IDS).calls
    assert not left(model, tmp_path)


def test_an_error_of_the_model_says_what_is_true(model: nn.Module, tmp_path: Path) -> None:
    for raised in (ValueError("theirs"), MemoryError(), torch.OutOfMemoryError()):

        def fails(*_: Any, raised: Exception = raised) -> None:
            raise raised

        handle = next(model.children()).register_forward_pre_hook(fails)
        with pytest.raises(type(raised)) as caught:
            hookattn.trace(model, IDS)
        handle.remove()
        assert caught.value.__notes__ == [
            "hookattn: raised by the model or the traced block itself; nothing is left on the model."
        ]
        assert not left(model, tmp_path)


def test_what_was_half_learned_is_forgotten() -> None:
    """An interrupt between an operation and what is made of it: the next trace has every call."""
    torch.manual_seed(0)
    model = PlainModel().eval()
    right = [call.weights for call in hookattn.trace(model, IDS).calls]
    for name, file in (("made", "replay.py"), ("_learn", "recogniser.py"), ("_happens", "recogniser.py")):
        fresh = PlainModel().eval()
        fresh.load_state_dict(model.state_dict())
        for _ in range(3):
            hit(fresh, raising(name, f"eager/{file}", KeyboardInterrupt()))
            trace = hookattn.trace(fresh, IDS)
            assert not trace.skipped and all(map(torch.equal, [c.weights for c in trace.calls], right))
            assert len(trace.calls) == 2


# ------------------------------------------------------------------------------------- tasks and threads


def test_a_block_is_of_its_task(model: nn.Module) -> None:
    """Another task uses the same model while the block waits; and traces it itself."""
    others = torch.tensor([[4, 5, 6, 7, 8, 9]])

    async def other() -> int:
        with hookattn.tracing(model) as trace:
            for _ in range(3):
                model(others)
                await asyncio.sleep(0)
        return len(trace.calls)

    async def traced() -> hookattn.Trace:
        with hookattn.tracing(model) as trace:
            for _ in range(2):
                await asyncio.sleep(0)
            model(IDS)
        return trace

    async def both() -> tuple[int, hookattn.Trace]:
        count, trace = await asyncio.gather(other(), traced())
        return count, trace

    count, trace = asyncio.run(both())
    assert count == 6
    assert [(c.step, c.k.shape[2]) for c in trace.calls] == [(0, 5), (0, 5)] and not trace.skipped


def test_a_task_that_the_block_starts_is_in_it(model: nn.Module) -> None:
    async def use() -> None:
        model(IDS)

    async def traced() -> hookattn.Trace:
        with hookattn.tracing(model) as trace:
            await asyncio.gather(use(), use())
        return trace

    assert [c.step for c in asyncio.run(traced()).calls] == [0, 0, 1, 1]


def test_a_context_that_is_carried_to_a_thread_carries_no_trace(model: nn.Module) -> None:
    async def traced() -> hookattn.Trace:
        with hookattn.tracing(model) as trace:
            await asyncio.to_thread(model, IDS[:, :3])
            model(IDS)
        return trace

    assert [c.k.shape[2] for c in asyncio.run(traced()).calls] == [5, 5]


def test_copies_of_a_model_in_threads_are_told(model: nn.Module) -> None:
    """As torch.nn.DataParallel makes them, one a device."""
    copies = [_replica(model) for _ in range(2)]

    def in_threads() -> None:
        threads = [threading.Thread(target=copy, args=(IDS,)) for copy in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with warnings.catch_warnings(), hookattn.tracing(model) as trace:
        warnings.simplefilter("ignore")
        in_threads()
    assert not trace.calls
    (skipped,) = trace.skipped
    assert "torch.nn.DataParallel" in skipped.reason


def _replica(module: nn.Module) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` makes, on the same device."""
    made = module._replicate_for_data_parallel()
    made._parameters = dict(module._parameters)
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else _replica(child)
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if isinstance(value, Tensor):
            vars(made)[name] = value
    return made


# ------------------------------------------------------------------------------------------------- forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_has_nothing_of_another_threads_trace(model: nn.Module, tmp_path: Path) -> None:
    """Whatever that thread was about, the child's own trace is whole."""
    inside, ends = threading.Event(), threading.Event()
    torch.set_num_threads(1)

    def traces() -> None:
        with hookattn.tracing(model):
            model(IDS)
            inside.set()
            ends.wait(60)

    thread = threading.Thread(target=traces)
    thread.start()
    inside.wait(60)

    def child() -> str:
        before = left(model, tmp_path)
        calls = len(hookattn.trace(model, IDS).calls)
        return "; ".join([*before, *left(model, tmp_path)]) if calls == 2 else f"{calls} calls"

    try:
        assert not asked(child)
    finally:
        ends.set()
        thread.join()
    assert not left(model, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_that_is_forked_in_a_block_can_go_on_in_it(model: nn.Module) -> None:
    torch.set_num_threads(1)
    with hookattn.tracing(model) as trace:
        model(IDS)

        def child() -> str:
            model(IDS)
            return "" if len(live.of_this_thread()) == 1 and trace is not None else "its trace is gone"

        assert not asked(child)
        model(IDS)
    assert [c.step for c in trace.calls] == [0, 0, 1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_lock_that_another_thread_has_is_free_in_a_child() -> None:
    lock, waited, has, ends = forks.lock(), forks.lock_of_all(), threading.Event(), threading.Event()

    def holds() -> None:
        with lock:
            has.set()
            ends.wait(60)

    thread = threading.Thread(target=holds)
    thread.start()
    has.wait(60)
    forks.watch(lambda: None)

    def child() -> str:
        return "" if lock.acquire(timeout=1) and waited.acquire(timeout=1) else "held"

    try:
        assert not asked(child)
        assert not lock.acquire(blocking=False)
    finally:
        ends.set()
        thread.join()
        forks._held.remove(waited)


def test_no_trace_is_kept_once_it_has_ended(model: nn.Module) -> None:
    hookattn.trace(model, IDS)
    assert not live._live
    gc.collect()
    assert not [x for x in gc.get_objects() if isinstance(x, Session)]
