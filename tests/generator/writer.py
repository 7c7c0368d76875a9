"""The words of which the sources of cases are made: variables with named axes, and spellings of what is done to them.

An axis of a variable is a group of atoms, ``("b", "h")`` for one that is folded of both, and ``()`` for one of size 1.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Group = tuple[str, ...]
Axes = tuple[Group, ...]


def axes(text: str) -> Axes:
    """``"b t (h d) 1"`` as groups."""
    return tuple(
        tuple(part.strip("()").split()) if part.startswith("(") else (() if part == "1" else (part,))
        for part in re.findall(r"\([^)]*\)|\S+", text)
    )


def pattern(groups: Axes) -> str:
    """The other way round, as einops reads it."""
    return " ".join("1" if not g else g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)


def atoms(groups: Iterable[Group]) -> list[str]:
    return [a for g in groups for a in g]


@dataclass(frozen=True)
class Var:
    """A tensor of the source: its name there and its axes."""

    name: str
    axes: Axes
    contiguous: bool = False

    def at(self, atom: str) -> int:
        """The number of the axis that is this atom, alone."""
        return self.axes.index((atom,))

    def has(self, atom: str) -> bool:
        return any(atom in g for g in self.axes)


class Writer:
    """Collects the lines of a forward.

    Attributes:
        features: what was drawn, by name; the groups of failures are made by it.
        sizes: for each atom its size.
    """

    def __init__(self, rng: random.Random, sizes: dict[str, int], features: dict[str, str]) -> None:
        self.rng = rng
        self.sizes = sizes
        self.features = features
        self.lines: list[str] = []
        self.indent = 0
        self.count = 0

    # ------------------------------------------------------------------------------------------------- choices

    def draw(self, name: str, options: dict[str, float]) -> str:
        """One of the options, by weight, noted as a feature; what was fixed beforehand stays."""
        if name in self.features and self.features[name] in options:
            return self.features[name]
        self.features[name] = self.some(options)
        return self.features[name]

    def some(self, options: dict[str, float]) -> str:
        return self.rng.choices(list(options), list(options.values()))[0]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    # --------------------------------------------------------------------------------------------------- lines

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def new(self, expression: str, groups: Axes, stem: str = "y", contiguous: bool = False) -> Var:
        self.count += 1
        var = Var(f"{stem}{self.count}", groups, contiguous)
        self.line(f"{var.name} = {expression}")
        return var

    def size(self, group: Group) -> str:
        """The size of a group as the source says it."""
        return " * ".join(a.upper() for a in group) or "1"

    def sizes_of(self, groups: Axes, hole: bool = True) -> str:
        """The arguments of a view; now and then one of them is left to torch."""
        words = [self.size(g) for g in groups]
        numbers = [self.number(g) for g in groups]
        if hole and words and self.chance(0.4) and all(numbers):
            words[self.rng.randrange(len(words))] = "-1"
        return ", ".join(words)

    def number(self, group: Group) -> int:
        n = 1
        for a in group:
            n *= self.sizes[a]
        return n

    # ------------------------------------------------------------------------------------------------- layouts

    def move(self, var: Var, to: Axes, stem: str = "y") -> Var:
        """The same tensor in other axes: split, permuted, merged, each in one of its spellings."""
        if var.axes == to:
            return var
        assert sorted(atoms(var.axes)) == sorted(atoms(to)), (var, to)
        if () not in var.axes and () not in to and self.chance(0.12):
            lengths = "".join(f", {a}={a.upper()}" for a in self.unknown(var.axes) | self.unknown(to))
            return self.new(f"rearrange({var.name}, '{pattern(var.axes)} -> {pattern(to)}'{lengths})", to, stem=stem)
        units = self.units(var.axes, to)
        var = self.split(var, tuple(units), stem)
        wanted = [g for t in to for g in self.pieces(t, units)]
        var = self.permute(var, tuple(wanted), stem)
        return self.merge(var, to, stem)

    def unknown(self, groups: Axes) -> set[str]:
        return {a for g in groups if len(g) > 1 for a in g}

    def units(self, source: Axes, to: Axes) -> list[Group]:
        """What the axes of the source have to be split into so that the target is made of whole pieces."""
        made: list[Group] = []
        for g in source:
            whole = any("".join(f"<{a}>" for a in g) in "".join(f"<{a}>" for a in t) for t in to)
            made += [g] if len(g) <= 1 or whole else [(a,) for a in g]
        return made

    def pieces(self, group: Group, units: list[Group]) -> list[Group]:
        if not group:
            return [()]
        found, rest = [], list(group)
        while rest:
            unit = next(u for u in units if u and list(u) == rest[: len(u)])
            found.append(unit)
            rest = rest[len(unit) :]
        return found

    def split(self, var: Var, units: Axes, stem: str) -> Var:
        units = tuple(g for g in units if g)
        source = tuple(g for g in var.axes if g)
        if source != var.axes:
            ones = [i for i, g in enumerate(var.axes) if not g]
            var = (
                self.new(f"{var.name}.squeeze({ones[0]})", source, stem)
                if len(ones) == 1
                else self.shape(var, source, stem)
            )
        if units == source:
            return var
        parted = [i for i, g in enumerate(source) if g not in units]
        if len(parted) == 1 and self.chance(0.3):
            i = parted[0]
            inside = [(a,) for a in source[i]]
            if self.chance(0.5):
                i -= len(source)
            return self.new(f"{var.name}.unflatten({i}, ({self.sizes_of(tuple(inside))}))", units, stem, var.contiguous)
        return self.shape(var, units, stem)

    def shape(self, var: Var, to: Axes, stem: str) -> Var:
        form = self.some({"reshape": 3, "torch": 1, **({"view": 5} if var.contiguous else {"contiguous": 1})})
        text = {
            "reshape": f"{var.name}.reshape({self.sizes_of(to)})",
            "torch": f"torch.reshape({var.name}, ({self.sizes_of(to)}{',' if len(to) == 1 else ''}))",
            "view": f"{var.name}.view({self.sizes_of(to)})",
            "contiguous": f"{var.name}.contiguous().view({self.sizes_of(to)})",
        }[form]
        return self.new(text, to, stem, form in ("view", "contiguous") or var.contiguous)

    def permute(self, var: Var, to: Axes, stem: str) -> Var:
        source = [g for g in var.axes if g]
        wanted = [g for g in to if g]
        order = [source.index(g) for g in wanted]
        if order != list(range(len(order))):
            moved = [i for i, o in enumerate(order) if i != o]
            n = len(order)
            if len(moved) == 2:
                i, j = (m - n if self.chance(0.3) else m for m in moved)
                options = {
                    f"{var.name}.transpose({i}, {j})": 5,
                    f"torch.transpose({var.name}, {i}, {j})": 1,
                    f"{var.name}.swapaxes({i}, {j})": 1,
                    f"{var.name}.permute({', '.join(map(str, order))})": 2,
                }
                if moved == [n - 2, n - 1]:
                    options[f"{var.name}.mT"] = 2
            else:
                options = {
                    f"{var.name}.permute({', '.join(map(str, order))})": 5,
                    f"torch.permute({var.name}, ({', '.join(map(str, order))}))": 1,
                    f"torch.movedim({var.name}, ({', '.join(map(str, order))}), {tuple(range(n))})": 0.5,
                    f"torch.einsum('{self.letters(source)}->{self.letters(source, wanted)}', {var.name})": 0.5,
                }
            var = self.new(self.some(options), tuple(wanted), stem)
        if () in to:
            var = self.new(var.name + self.nones(to), to, stem)
        return var

    def letters(self, source: Sequence[Group], wanted: Sequence[Group] | None = None) -> str:
        names = dict(zip(source, "abcdefgh", strict=False))
        return "".join(names[g] for g in (wanted or source))

    def nones(self, to: Axes) -> str:
        """The index that adds axes of size 1."""
        words = [":" if g else "None" for g in to]
        while words and words[-1] == ":":
            words.pop()
        return f"[{', '.join(words)}]"

    def merge(self, var: Var, to: Axes, stem: str) -> Var:
        if var.axes == to:
            return var
        merged = [i for i, g in enumerate(to) if g not in var.axes]
        if len(merged) == 1 and self.chance(0.5):
            i = merged[0]
            j = i + len(var.axes) - len(to)
            if self.chance(0.4) and j == len(var.axes) - 1:
                return self.new(f"{var.name}.flatten({i})", to, stem)
            return self.new(f"{var.name}.flatten({i}, {j})", to, stem)
        return self.shape(replace(var, contiguous=False), to, stem)

    # ----------------------------------------------------------------------------------------------- broadcasts

    def fit(self, var: Var, to: Axes, stem: str = "m") -> Var:
        """A tensor with some of the atoms, as it broadcasts against axes; what lies in part in a fold is expanded."""
        have = set(atoms(var.axes))
        order = [a for a in atoms(to) if a in have]
        assert sorted(order) == sorted(have), (var, to)
        mixed = [g for g in to if any(a in have for a in g) and not all(a in have for a in g)]
        if not mixed:
            groups = tuple(g if g and g[0] in have else () for g in to)
            leading = 0
            while leading < len(groups) and not groups[leading]:
                leading += 1
            if self.chance(0.3):
                groups = groups[leading:]
            var = self.move(var, tuple(g for g in groups if g), stem)
            return self.new(var.name + self.nones(groups), groups, stem) if () in groups else var
        var = self.move(var, tuple((a,) for a in order), stem)
        inside = set(atoms(mixed))
        full = tuple((a,) if a in have else () for a in atoms(to))
        if () in full:
            var = self.new(var.name + self.nones(full), full, stem)
        lengths = ", ".join(a.upper() if a in inside or a in have else "1" for a in atoms(to))
        var = self.new(f"{var.name}.expand({lengths})", full, stem)
        groups = tuple(g if any(a in have for a in g) else () for g in to)
        return self.new(f"{var.name}.reshape({self.sizes_of(groups, hole=False)})", groups, stem)

    def einsum(self, inputs: Sequence[Var], to: Axes, stem: str = "y") -> Var:
        """An einsum over folded or plain axes, in letters that people use."""
        names: dict[Group, str] = {}
        free = iter("nmzuxyklaq")
        taken: set[str] = set()
        for g in [g for v in inputs for g in v.axes] + list(to):
            if g in names:
                continue
            letter = g[0] if len(g) == 1 and g[0] not in taken else next(c for c in free if c not in taken)
            names[g] = letter
            taken.add(letter)
        text = ",".join("".join(names[g] for g in v.axes) for v in inputs) + "->" + "".join(names[g] for g in to)
        called = ", ".join(v.name for v in inputs)
        return self.new(f"torch.einsum('{text}', {called})", to, stem)
