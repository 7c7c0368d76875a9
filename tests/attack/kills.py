"""SIGKILL at random moments, in a save, in a stream and in a survey: names are of whole files, and nothing is left.

A process is forked, and killed after a random while. What must be true afterwards: under the final name is the old file
or a new one that is whole, nothing unfinished is left once the next run has written there, and a survey that goes on
gives the table that it would have given.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.analyze.survey import Batch, survey

from . import Figure


class _Model(nn.Module):
    """A few layers of attention; ids are embedded where there are any."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.layers = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in layer(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x


def _ids(n: int, seed: int) -> Tensor:
    return torch.randint(0, 32, (1, n), generator=torch.Generator().manual_seed(seed))


class _Target:
    """What is done until it is killed, and how its end is judged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        torch.manual_seed(0)
        self.model = _Model(3, 32).eval()

    def begin(self) -> None:
        """What is there before."""

    def work(self) -> None:
        """What is killed."""
        raise NotImplementedError

    def problem(self, killed: bool) -> str | None:
        """What is wrong with what is there; None: nothing."""
        raise NotImplementedError


class _Save(_Target):
    """Saving over an older file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with torch.no_grad():
            self.old, self.new = (hookattn.trace(self.model, _ids(n, n)).certify() for n in (7, 160))

    def begin(self) -> None:
        self.old.save(self.out)

    def work(self) -> None:
        self.new.save(self.out)

    def problem(self, killed: bool) -> str | None:
        lengths = (7, 160) if killed else (160,)
        return _whole(self.out, lengths, 3)


class _Stream(_Save):
    """Streaming over an older file."""

    def work(self) -> None:
        with torch.no_grad(), hookattn.tracing(self.model, to=self.out):
            self.model(_ids(160, 160))


class _Survey(_Target):
    """A survey that goes on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.examples = [" ".join(str(i) for i in range(1, 2 + n % 7)) for n in range(12)]
        self.out = folder / "expected.parquet"
        _done(self.work)
        self.expected = self.out.read_bytes()
        self.out.unlink()
        self.out = folder / "out.parquet"

    def encode(self, texts: Sequence[Any]) -> Iterator[Batch]:
        """One example a batch."""
        for text in texts:
            yield Batch({"input_ids": torch.tensor([[int(x) for x in text.split()]])}, 1)

    def work(self) -> None:
        with torch.no_grad():
            survey(self.model, self.examples, self.encode, self.out, measures=["entropy", "first_token"], batch=2)

    def problem(self, killed: bool) -> str | None:
        if killed and not self.out.exists():
            return None
        same = self.out.read_bytes() == self.expected
        return None if same else "the table is another than that of a survey that nobody killed"


def _whole(path: Path, lengths: Sequence[int], calls: int) -> str | None:
    try:
        trace = hookattn.load(path)
        for call in trace:
            assert all(call.get(name) is not None for name in ("q", "weights", "output"))
            assert call.q.shape[2] in lengths and call.certificate.faithful
            assert all(place is None or place.file.intact(place.name) for place in call.fields.values())  # type: ignore
        assert len(trace) == calls
    except Exception as error:  # noqa: BLE001  whatever it is, the file is not whole
        return f"{type(error).__name__}: {str(error)[:120]}"
    return None


def _forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001  whatever it is, this is no place to go on from
            os._exit(1)
        os._exit(0)
    return child


def _done(work: Callable[[], None]) -> None:
    """Run something in a process to its end: not in this one, whose forks would lack the threads of what it used."""
    assert os.waitpid(_forked(work), 0)[1] == 0, work


def _killed(work: Callable[[], None], after: float) -> bool:
    """Run something in a process that is killed after some seconds; whether it was not done by then."""
    child = _forked(work)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)  # it is there until it is waited for
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def attack(rounds: int, seed: int = 0) -> Sequence[Figure]:
    """So many kills, a third of them in each."""
    r = random.Random(seed)
    broken: list[str] = []
    left: list[str] = []
    unequal: list[str] = []
    hits, unfinished = 0, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has none of the others
    try:
        for kind in (_Save, _Stream, _Survey):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                target = kind(folder)
                target.begin()
                before = set(os.listdir(folder))
                begun = time.monotonic()
                _done(target.work)
                took = time.monotonic() - begun
                for i in range(rounds // 3):
                    where = f"{kind.__name__[1:].lower()} {i}"
                    if kind is _Survey:
                        target.out.unlink(missing_ok=True)
                    target.begin()
                    # Twice as long as it took: on a machine with other work, the end has to be met as well.
                    hits += _killed(target.work, r.uniform(0, 2 * took) * r.choice((1, 0.5)))
                    unfinished += any(x.endswith(".partial") for x in os.listdir(folder))
                    if (wrong := target.problem(True)) is not None:
                        broken.append(f"{where}: {wrong}")
                    _done(target.work)
                    if (wrong := target.problem(False)) is not None:
                        unequal.append(f"{where}: {wrong}")
                    expected = before | {target.out.name}
                    if found := set(os.listdir(folder)) - expected:
                        left.append(f"{where}: {sorted(found)[:3]}")
    finally:
        torch.set_num_threads(threads)
    return (
        Figure("processes killed before they were done", hits),
        Figure("of these left something unfinished", unfinished),
        Figure("final names that were neither the old nor a whole new file", len(broken), 0, tuple(broken[:5])),
        Figure("next runs that gave something else", len(unequal), 0, tuple(unequal[:5])),
        Figure("left over after the next run", len(left), 0, tuple(left[:5])),
    )
