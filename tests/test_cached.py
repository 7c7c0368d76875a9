"""What is worked out once, and by no lock kept from a forked child."""

from __future__ import annotations

import os
import threading

import pytest

from hookattn.cached import cached_property
from tests.attack.forks import asked


class Slow:
    """Works something out until it is let go on."""

    def __init__(self) -> None:
        self.begun, self.goes_on, self.times = threading.Event(), threading.Event(), 0

    @cached_property
    def made(self) -> int:
        self.times += 1
        self.begun.set()
        self.goes_on.wait(30)
        return self.times


def test_it_is_worked_out_once() -> None:
    slow = Slow()
    slow.goes_on.set()
    assert slow.made == slow.made == 1 and slow.times == 1
    assert isinstance(Slow.made, cached_property)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_no_thread_and_no_child_waits_for_another_object() -> None:
    slow, quick = Slow(), Slow()
    quick.goes_on.set()
    thread = threading.Thread(target=lambda: slow.made)
    thread.start()
    slow.begun.wait(30)
    try:
        assert quick.made == 1

        def child() -> str:
            mine = Slow()
            mine.goes_on.set()
            return "" if mine.made == 1 else "not made"

        assert not asked(child)
    finally:
        slow.goes_on.set()
        thread.join()
