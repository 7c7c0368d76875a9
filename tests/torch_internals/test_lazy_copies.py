"""Copies that are made when somebody writes: what they are copies of stays what it was, however it is written to."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hookattn.torch_internals import allocation, lazy_copies
from hookattn.torch_internals.lazy_copies import WriteWatch, is_lazy, snapshots
from tests.reference import draw, same_bits
from tests.writes import WRITES, Write

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:There is a performance drop")

B, H, T, D = 2, 3, 4, 5
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are copied at once; here they stand for large ones."""
    monkeypatch.setattr(lazy_copies, "SMALL", -1)


def snapshot(x: Tensor, cache: bool = False, copy: bool = False) -> Tensor:
    with torch.no_grad():
        return snapshots([x], [cache], copy)[0]


def own() -> dict[str, Tensor]:
    """A tensor, and what else there is of its memory."""
    x = draw(B, H, T, D, seed=1)
    return {"x": x, "base": x.view(-1).unflatten(0, (1, B, H, T * D)), "view": x.transpose(0, 1)}


def third() -> dict[str, Tensor]:
    """Keys in the middle of a fused projection."""
    base = draw(B, T, 3 * H * D, seed=1)
    q, k, v = base.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    return {"x": k, "q": q, "v": v, "base": base.unsqueeze(1), "view": k.permute(3, 2, 1, 0)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [own, third], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", WRITES)
def test_copies_stay_what_they_are(name: str, layout: Callable[[], dict[str, Tensor]], mode: str) -> None:
    for written in layout():
        with MODES[mode]():
            alone, tensors = layout(), layout()
            before = {n: x.clone() for n, x in tensors.items()}
            made = dict(zip(tensors, snapshots(list(tensors.values()), [False] * len(tensors)), strict=True))
            assert all(map(is_lazy, made.values()))
            for each in (alone, tensors):
                torch.manual_seed(0)
                WRITES[name](each[written])
        assert same_bits(made, before), f"a write to {written} changed what was copied"
        if alone["x"].untyped_storage().nbytes():  # else nobody can read it any more
            assert same_bits(tensors, alone), f"a write to {written} went astray"
            assert not same_bits(alone, before), "this is no write"


def test_a_tensor_that_is_swapped_is_no_longer_shared() -> None:
    x, other = draw(T, D), draw(T, D, seed=2)
    made, before = snapshot(x), x.clone()
    torch.utils.swap_tensors(x, other)
    x.add_(1)
    other.zero_()
    assert torch.equal(made, before)


# ------------------------------------------------------------------------------------------------ lazy or real


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_has_its_storage_to_itself_is_copied_lazily(dtype: torch.dtype) -> None:
    x = draw(B, H, T, D).to(dtype)
    for one in (x, x.transpose(1, 2), x[..., ::2], x[:, :, 1:], x[:, :2], x[:, :1].expand(B, H, T, D)[:, :, :0], x[:0]):
        made, before = snapshot(one), one.clone()
        assert is_lazy(made) == (one.numel() > 0) and made.shape == one.shape and made.dtype == dtype
        x.zero_()
        assert torch.equal(made.to(torch.float64), before.to(torch.float64))
        x.copy_(draw(B, H, T, D).to(dtype))


def test_small_tensors_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    few, more = draw(lazy_copies.SMALL // 4), draw(lazy_copies.SMALL // 4 + 1)
    assert not is_lazy(snapshot(few)) and is_lazy(snapshot(more))
    assert not any(map(is_lazy, snapshots([few, few[::2]], [False] * 2)))
    made, before = snapshot(few), few.clone()
    few.zero_()
    assert torch.equal(made, before)


def test_expanded_axes_count_once() -> None:
    x = draw(B, 16, T, D)
    assert not is_lazy(snapshot(x[:, :1].expand(B, 32, T, D))), "a sixteenth of its storage, however often repeated"
    assert is_lazy(snapshot(x.mean(1, keepdim=True).expand(B, 16, T, D)))


def test_a_small_view_of_a_large_storage_is_copied_and_lets_go_of_it() -> None:
    x = draw(8, H, T, D)
    made = snapshot(x[:2])
    assert not is_lazy(made) and not is_lazy(x)
    assert made.untyped_storage().nbytes() == x[:2].nbytes


def test_views_that_cover_a_storage_together_are_lazy() -> None:
    base = draw(B, T, 3 * H * D)
    q, k, v = base.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    assert all(map(is_lazy, snapshots([q, k, v], [False, True, True])))
    assert is_lazy(base) and {x.stride() for x in snapshots([q, k, v], [False] * 3)} == {q.stride()}
    assert not is_lazy(snapshot(draw(B, T, 3 * H * D).chunk(3, -1)[1]))


def test_a_cache_that_was_written_to_keeps_its_address() -> None:
    cache = torch.zeros(B, H, 8, D)
    cache.index_copy_(2, torch.tensor([0]), draw(B, H, 1, D))
    address = cache.data_ptr()
    made, before = snapshot(cache, cache=True), cache.clone()
    assert not is_lazy(made) and not is_lazy(cache)
    cache.index_copy_(2, torch.tensor([1]), draw(B, H, 1, D, seed=2))
    assert cache.data_ptr() == address and torch.equal(made, before)
    assert is_lazy(snapshot(cache)), "what is no cache is copied lazily, written to or not"
    with torch.inference_mode():  # nobody counts writes to this one
        uncounted = torch.zeros(B, H, 8, D).add_(1)
        made = snapshot(uncounted, cache=True)
        uncounted.zero_()
    assert torch.equal(made, torch.ones(B, H, 8, D))


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_stays_where_it_is(mode: str) -> None:
    query = nn.Parameter(draw(T, H * D))
    with MODES[mode]():
        for x in (query, query.unflatten(-1, (H, D)).transpose(0, 1).expand(B, H, T, D), query[1:]):
            made, before = snapshot(x), x.detach().clone()
            assert not is_lazy(made) and not is_lazy(query) and torch.equal(made, before)
    address = query.data_ptr()
    torch.optim.SGD([query], lr=1.0, weight_decay=0.5).step()
    query.grad = torch.ones_like(query)
    torch.optim.SGD([query], lr=1.0).step()
    # As sharded training does, which frees a parameter between two uses.
    query.untyped_storage().resize_(0)
    query.untyped_storage().resize_(query.nbytes)
    query.data.fill_(1)
    assert torch.equal(made, before) and address


class Kin(Tensor):
    """A tensor of another class."""


def from_file(path: Path) -> Tensor:
    path.write_bytes(bytes(4 * T * D))
    return torch.from_file(str(path), shared=True, size=T * D)


FOREIGN: dict[str, Callable[[Path], Tensor]] = {
    "numpy": lambda _: torch.from_numpy(np.ones((T, D), np.float32)),
    "frombuffer": lambda _: torch.frombuffer(bytearray(4 * T * D), dtype=torch.float32),
    "mapped": lambda path: from_file(path / "tensor"),
    "shared": lambda _: torch.ones(T, D).share_memory_(),
    "dlpack": lambda _: torch.from_dlpack(np.ones((T, D), np.float32)),
    "subclass": lambda _: torch.ones(T, D).as_subclass(Kin),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_memory_that_is_not_torchs_is_copied(kind: str, tmp_path: Path) -> None:
    x = FOREIGN[kind](tmp_path)
    made, before = snapshot(x), x.clone()
    assert not is_lazy(made) and not is_lazy(x)
    x.add_(2)
    assert torch.equal(made, before) and not torch.equal(made, x)


def test_inside_vmap_copies_are_real() -> None:
    x, made = draw(B, T, D), []

    def row(one: Tensor) -> Tensor:
        made.extend(snapshots([one], [False]))
        return one.add_(1) - made[-1]

    assert torch.allclose(torch.vmap(row)(x), torch.ones(B, T, D)) and not is_lazy(x)


@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
def test_what_numpy_made_an_array_of_before_is_copied(view: bool) -> None:
    # numpy writes without torch's knowing; and the two would part if torch's first write moved the tensor.
    x = draw(T, D)
    array = (x[1:] if view else x).numpy()
    made, before = snapshot(x), x.clone()
    assert not is_lazy(made)
    array[...] = 3
    assert torch.equal(made, before)
    x.fill_(4)
    assert (array == 4).all()


def test_a_raw_address_from_before_writes_unseen_and_copy_helps() -> None:
    # A known limit: an alias by DLPack leaves no trace on the tensor.
    for copied in (False, True):
        x = draw(T, D)
        alias = torch.from_dlpack(x)
        made, before = snapshot(x, copy=copied), x.clone()
        alias.fill_(3)
        assert torch.equal(made, before) == copied
        x.fill_(4)
        assert torch.equal(alias, x) == copied, "the first write of torch's moves a tensor that was copied lazily"


RESIZES: dict[str, Write] = {
    "resize_": lambda x: x.resize_(2 * T, 2 * D),
    "out=": lambda x: torch.ones(2 * T, 2 * D, out=x.resize_(0)),
    "storage, to more": lambda x: x.untyped_storage().resize_(8 * T * D),
    "storage, to the same": lambda x: x.untyped_storage().resize_(4 * T * D),
    "storage, to less": lambda x: (x.resize_(2, D), x.untyped_storage().resize_(8 * D)),
    "storage, freed and back": lambda x: (x.untyped_storage().resize_(0), x.untyped_storage().resize_(4 * T * D)),
}


@pytest.mark.parametrize("name", RESIZES)
def test_a_storage_that_is_resized_is_refused_by_torch_and_copy_helps(name: str) -> None:
    # A known limit of torch from 2.13 on: it takes a storage for lazily copied after it was given another memory.
    for copied in (False, True):
        x = draw(T, D)
        made, before = snapshot(x, copy=copied), x.clone()
        try:
            RESIZES[name](x)
            x.fill_(7)
        except RuntimeError as error:
            assert not copied and "COW.cpp" in str(error), error
            assert is_lazy(made) and not is_lazy(snapshot(x)), "and what is refused can be copied all the same"
        else:
            assert x.eq(7).all()
        assert torch.equal(made, before)


def test_a_storage_that_was_written_to_since_can_be_resized() -> None:
    x = draw(T, D)
    made, before = snapshot(x), x.clone()
    x.add_(1)
    x.resize_(2 * T, 2 * D).fill_(7)
    assert torch.equal(made, before) and x.eq(7).all()


def test_copy_makes_real_copies_of_all() -> None:
    x = draw(T, D)
    made = snapshot(x, copy=True)
    assert torch.equal(made, x) and not is_lazy(made) and not is_lazy(x)


def test_a_torch_without_lazy_clones_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_copies, "_lazy_clone", None)
    assert not is_lazy(snapshot(draw(T, D)))


# ------------------------------------------------------------------------------------------------ memory, threads


def test_reading_makes_no_copy() -> None:
    x = draw(B, H, T, D)
    made = snapshot(x)
    address = torch._C._data_address(x)
    readings = (x.shape, x.stride(), len(x), repr(x), x.tolist(), x.sum(), x @ x.mT, x.softmax(-1), x.clone(), x[0, 0])
    readings += (x.double(), x.reshape(-1), x.contiguous(), torch.equal(x, made), x.untyped_storage().nbytes(), hash(x))
    assert readings and copy.deepcopy(made) is not made
    assert is_lazy(x) and is_lazy(made) and torch._C._data_address(made) == torch._C._data_address(x) == address


def test_copies_of_copies_are_each_their_own() -> None:
    x = draw(T, D)
    first, before = snapshot(x), x.clone()
    second = snapshot(first)
    x.zero_()
    third = snapshot(x)
    second.add_(1)
    x.fill_(5)
    assert torch.equal(first, before) and torch.equal(second, before + 1) and torch.equal(third, torch.zeros(T, D))


@contextlib.contextmanager
def resident(page: int = 4096) -> Iterator[Callable[[], float]]:
    """How many MiB more are resident than at the beginning of the block."""
    found = Path("/proc/self/statm")
    if not found.exists():
        pytest.skip("only Linux says how much memory is resident")
    gc.collect()

    def now() -> int:
        return int(found.read_text().split()[1]) * page

    start = now()
    yield lambda: (now() - start) / 2**20


def test_memory_is_held_once_and_given_back() -> None:
    # So large that the allocator asks the system for each, and gives it back at once: glibc keeps up to 64 MiB.
    with resident() as more:
        x = torch.ones(20 << 20)
        made = snapshot(x)
        assert 75 < more() < 85, "a lazy copy takes no memory"
        x.zero_()
        assert 155 < more() < 165, "until somebody writes"
        del x
        assert 75 < more() < 85
        del made
        assert more() < 5
        x = torch.ones(20 << 20)
        made = snapshot(x)
        del x
        assert 75 < more() < 85, "the copy holds the memory when the other is gone"
        made.add_(1)
        assert 75 < more() < 85, "which is then its own: nothing is copied"
        del made
        assert more() < 5
        x = torch.ones(20 << 20)
        small = snapshot(x[:16])
        del x
        assert more() < 5 and small.sum() == 16, "a small view holds nothing but itself"


def test_a_real_copy_of_a_small_view_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(allocation, "copies", lambda several: [made.append(x.numel()) or x.clone() for x in several])
    snapshots([draw(8, D)[:2], draw(T, D), draw(T, D)[:1]], [False] * 3)
    assert made == [2 * D, D]


def test_threads_write_while_others_copy() -> None:
    base = [torch.full((1 << 14,), float(i)) for i in range(24)]
    made: list[Tensor] = []
    stop = threading.Event()

    def write() -> None:
        mine = [snapshot(x) for x in base]
        while not stop.is_set():
            for x in mine:
                x.add_(1)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        made += [snapshot(x) for x in base]
    stop.set()
    for thread in threads:
        thread.join()
    assert all(bool((x == i % 24).all()) for i, x in enumerate(made))


# ------------------------------------------------------------------------------------------------ who writes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [own, third], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", WRITES)
def test_a_watch_sees_every_write(name: str, layout: Callable[[], dict[str, Tensor]], mode: str) -> None:
    with MODES[mode]():
        tensors = layout()
        x = tensors["x"]
        with torch.no_grad():
            watch = WriteWatch(x)
        assert repr(x) and torch.equal(x @ x.mT, x.clone() @ x.mT) and not watch.written(x)
        assert not watch.written(x.view(x.shape)), "another tensor of the same elements"
        if name in ("set_", ".data =", "freed storage"):
            return  # what is no write to the memory
        WRITES[name](x)
        assert watch.written(x)


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_a_watch_where_no_lazy_copy_can_be_made(mode: str) -> None:
    with MODES[mode]():
        for x in (torch.from_numpy(np.ones(3)), torch.ones(3).share_memory_(), torch.ones(3).as_subclass(Kin)):
            watch = WriteWatch(x)
            assert not watch.written(x)
            x[1] = 5
            assert watch.written(x) and not WriteWatch(x).written(x)
