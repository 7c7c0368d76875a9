"""What was derived is held up to a number of bytes, and no longer than what it was derived of."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

import hookattn
from hookattn.calls import deriving
from hookattn.calls.derived_cache import DERIVED_CACHE, DerivedCache
from tests.reference import draw

KB = 1 << 10


class Owner:
    def __init__(self) -> None:
        self.made: dict[str, Any] = {}


def kilobyte() -> Tensor:
    return torch.zeros(KB // 4)


def test_what_was_used_least_recently_goes_first() -> None:
    cache, owners = DerivedCache(4 * KB), [Owner() for _ in range(5)]
    first = [cache.get(owner, "x", kilobyte) for owner in owners[:4]]
    assert cache.size == 4 * KB
    assert cache.get(owners[0], "x", kilobyte) is first[0]
    cache.get(owners[4], "x", kilobyte)
    assert cache.size == 4 * KB and [("x" in owner.made) for owner in owners] == [True, False, True, True, True]
    assert cache.get(owners[1], "x", kilobyte) is not first[1]


def test_what_is_too_large_is_handed_out_and_not_held() -> None:
    cache, owner = DerivedCache(4 * KB), Owner()
    small = cache.get(owner, "small", kilobyte)
    assert cache.get(owner, "large", lambda: torch.zeros(KB)) is not cache.get(owner, "large", lambda: torch.zeros(KB))
    assert cache.get(owner, "small", kilobyte) is small and cache.size == KB


def test_it_goes_with_its_owner() -> None:
    cache, owner = DerivedCache(4 * KB), Owner()
    gone = weakref.ref(cache.get(owner, "x", kilobyte))
    cache.get(owner, "y", kilobyte)
    del owner
    assert gone() is None and cache.size == 0


def test_several_threads() -> None:
    cache, owners = DerivedCache(8 * KB), [Owner() for _ in range(16)]
    wrong: list[Any] = []

    def work(seed: int) -> None:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(seed)).tolist() * 40
        for i in order:
            value = cache.get(owners[i], "x", lambda i=i: torch.full((KB // 4,), float(i)))  # type: ignore[misc]
            if value[0] != i or cache.size < 0:
                wrong.append((i, value[0]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 0 < cache.size <= 8 * KB
    assert cache.size == KB * sum(bool(owner.made) for owner in owners)


def test_a_trace_that_nobody_holds_is_gone_with_what_was_derived_of_it() -> None:
    gc.collect()
    before = DERIVED_CACHE.size
    trace = hookattn.trace(torch.nn.MultiheadAttention(8, 2, batch_first=True), (draw(1, 6, 8, seed=1),) * 3)
    gc.disable()
    try:
        held = weakref.ref(trace[0].weights), weakref.ref(trace[0].mask)
        assert all(ref() is not None for ref in held)
        del trace
        assert all(ref() is None for ref in held) and DERIVED_CACHE.size == before, "without a garbage collection"
    finally:
        gc.enable()


def test_weights_are_derived_once_as_long_as_there_is_room(monkeypatch: Any) -> None:
    count = [0]
    derive = deriving.derive

    def counted(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return derive(*args, **options)

    class Two(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sdpa = torch.nn.functional.scaled_dot_product_attention
            return sdpa(sdpa(x, x, x), x, x)

    monkeypatch.setattr(deriving, "derive", counted)
    trace = hookattn.trace(Two(), draw(1, 2, 16, 4, seed=1))
    for _ in range(3):
        _ = trace[0].weights, trace[1].weights
    assert count == [2]
    monkeypatch.setattr(DERIVED_CACHE, "limit", DERIVED_CACHE.size - 1)
    trace[0].made.clear()
    for _ in range(3):
        _ = trace[0].weights
    assert count[0] >= 3
