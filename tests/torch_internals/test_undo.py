"""What is changed for a while is put back, wherever that is broken off."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hookattn.torch_internals import dispatch_modes, function_modes, undo
from hookattn.torch_internals.dispatch_modes import TorchDispatchMode
from hookattn.torch_internals.function_modes import ModeStack, beneath, open_modes
from hookattn.torch_internals.isolation import isolated, no_gradients

X = torch.ones(2)


class Mode(TorchFunctionMode):
    """Does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Below(TorchDispatchMode):
    """Does nothing, either."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


OURS, OTHER = Mode(), Mode()


def stack() -> ModeStack:
    made = ModeStack(lambda: OURS)
    assert made.mode is OURS
    return made


CHANGES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_gradients": no_gradients,
    "isolated": lambda: isolated(X),
    "aside": lambda: stack().aside(),
    "sealed": lambda: stack().sealed(),
    "opened": lambda: stack().opened(),
    "beneath": lambda: beneath(Mode()),
    "dispatch mode": lambda: dispatch_modes.opened(Below()),
}


def state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch._C._is_torch_function_all_disabled(),
        open_modes(),
        dispatch_modes.dispatch_modes(),
    )


class Hit(BaseException):
    """What breaks off."""


def broken_off(run: Callable[[], None], at: int) -> bool:
    """Run with an exception at the n-th line of the package; whether there were so many."""
    seen = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == at:
                sys.settrace(None)
                raise Hit
        return local

    def outside(frame: FrameType, event: str, _: Any) -> Any:
        return local if "torch_internals" in frame.f_code.co_filename else None

    sys.settrace(outside)
    try:
        run()
    except Hit:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("around", ["nothing", "modes", "autocast"])
def test_it_is_put_back_wherever_it_is_broken_off(name: str, around: str) -> None:
    """At each line of it in turn; what its own end could not put back, the end of a trace does."""
    modes = (OTHER, OURS, Mode()) if around == "modes" else ()
    with suppress(IndexError):
        for mode in modes:
            mode.__enter__()
        with torch.autocast("cpu", enabled=around == "autocast"):
            before, mark, broken = state(), undo.mark(), 0

            def run() -> None:
                with CHANGES[name]():
                    pass

            for at in itertools.count(1):
                if not broken_off(run, at):
                    break
                broken += 1
                undo.undo_since(mark)
                assert state() == before, f"at line event {at}"
                assert undo.mark() == mark
            assert broken
        for mode in reversed(modes):
            mode.__exit__(None, None, None)


def test_the_end_of_a_trace_can_be_broken_off_itself() -> None:
    mark, before = undo.mark(), state()
    for at in itertools.count(1):
        for change in (no_gradients(), isolated(X), dispatch_modes.opened(Below())):
            change.__enter__()
        more = broken_off(lambda: undo.undo_since(mark) and None, at)
        undo.undo_since(mark)
        assert state() == before and undo.mark() == mark
        if not more:
            break


def test_a_block_that_ends_late_puts_nothing_back() -> None:
    """Its exception was kept, its trace has put everything back, and the user has changed it since."""
    change, mark = no_gradients(), undo.mark()
    change.__enter__()
    undo.undo_since(mark)
    with torch.no_grad():
        change.__exit__(None, None, None)
        assert not torch.is_grad_enabled()


def test_the_end_of_a_block_puts_back_what_was_broken_off_inside_it() -> None:
    mark, before = undo.mark(), state()
    with stack().opened():
        with stack().opened(), no_gradients():
            isolated(X).__enter__()
            dispatch_modes.opened(Below()).__enter__()
            assert not torch.is_grad_enabled() and undo.mark() > mark + 2
        assert torch.is_grad_enabled() and undo.mark() == mark + 1
    assert state() == before and undo.mark() == mark


def test_changes_inside_each_other() -> None:
    mark = undo.mark()
    with no_gradients(), isolated(X), no_gradients():
        assert undo.mark() == mark + 3 and not torch.is_grad_enabled()
    assert undo.mark() == mark and torch.is_grad_enabled()


def test_modes_of_others_stay_where_they_are() -> None:
    ours, below, above = stack(), Mode(), Mode()
    with below:
        ours.push()
        with above:
            with ours.aside():
                assert open_modes() == [below, above]
            assert open_modes() == [below, OURS, above]
            ours.close()
            assert open_modes() == [below, above]
            ours.close()
        assert open_modes() == [below]


def test_a_kernel_that_leaves_a_mode_open_loses_it_and_no_other() -> None:
    ours, outer = stack(), Mode()
    with outer:
        ours.push()
        with ours.aside():
            Mode().__enter__()
        assert open_modes() == [outer, OURS]
        ours.close()
        with ours.opened():
            assert open_modes() == [outer, OURS]
            left = Mode()
            left.__enter__()
        assert open_modes() == [outer, left]  # ours is closed, and what a model opened is its own
        left.__exit__(None, None, None)
    assert not open_modes()


def test_autocast_and_gradients_are_left_as_they_were() -> None:
    def inside() -> Tensor:
        with isolated(X):
            return torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert inside().dtype == torch.float32 and not inside().requires_grad
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with torch.no_grad():
        inside()
        assert not torch.is_grad_enabled()
    assert function_modes.depth() == 0
