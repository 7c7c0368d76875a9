"""What a check complains of: where, what was expected, what there is, how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Failure:
    """One thing that is not as promised.

    Attributes:
        where: path of the call or module.
        what: the promise.
        expected: what it says.
        got: what there is.
        mend: what to change.
        check: the check that found it.
    """

    where: str
    what: str
    expected: str = ""
    got: str = ""
    mend: str = ""
    check: str = ""

    def __str__(self) -> str:
        told = f"{self.where}: {self.what}"
        if self.expected or self.got:
            parts = (("expected", self.expected), ("got", self.got))
            told += ": " + ", ".join(f"{word} {said}" for word, said in parts if said)
        return told + (f". {self.mend[:1].upper()}{self.mend[1:]}." if self.mend else "")


def of_check(failures: Iterable[Failure], check: str) -> list[Failure]:
    """The same, with the check that found them."""
    return [replace(f, check=check) for f in failures]


def require(failures: Iterable[Failure]) -> None:
    """Raise AssertionError with all of them, if there are any."""
    found = list(failures)
    if found:
        raise AssertionError("\n".join(map(str, found)))


def listing(title: str, failures: Iterable[Failure]) -> str:
    """All failures: each check's together, and what is said of several calls once, so that it fits a terminal."""
    said: dict[str, dict[Failure, list[str]]] = {}
    for f in failures:
        places = said.setdefault(f.check, {}).setdefault(replace(f, where=""), [])
        if f.where not in places:
            places.append(f.where)
    lines = [title]
    for check, several in said.items():
        lines.append(f"\n{check}")
        for f, places in several.items():
            more = [f"and {len(places) - _SHOWN} more"] if len(places) > _SHOWN else []
            lines += [f"  {place}" for place in (*places[:_SHOWN], *more)]
            lines.append(f"    {f.what}")
            lines += [
                f"    {word:<9} {x}" for word, x in (("expected", f.expected), ("got", f.got), ("mend", f.mend)) if x
            ]
    return "\n".join(lines)
