"""The changes that can be made to a module, and the module with one of them made."""

from __future__ import annotations

import difflib
import functools
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

from . import ROOT

NEEDS_ARGUMENTS = {"VariableReplacer", "VariableInserter"}
COMPARED = (("Eq", "NotEq"), ("Is", "IsNot"), ("In", "NotIn"), ("Lt", "LtE", "Gt", "GtE"))
"""Comparisons, each with those it may become. Across these kinds an equality of names would become an order of names,
and ``is`` an equality, which differs for no None and no bool."""

FREE = re.compile(r"(overload|override|final|cache|lru_cache|runtime_checkable|contextlib\.|contextmanager)\b")
"""Decorators without which nothing that can be looked at changes, or without which no caller gets anywhere."""


ORDERED = frozenset(
    "permute movedim moveaxis view reshape expand unflatten flatten narrow select "
    "where matmul bmm sub div full ones zeros new_zeros new_ones tril triu diagonal roll range arange clamp".split()
)
"""Calls whose arguments are of one type and have an order, which those of ``transpose`` have not. Elsewhere a type
checker notices an exchange, and most runs fail."""


class SwapArguments(Operator):
    """Two neighbours among the positional arguments of a call, in the other order: axes of a permutation, say."""

    def pairs(self, node: Any) -> Iterator[tuple[int, int]]:
        if node.type != "arglist" or node.parent.type != "trailer":
            return
        called = node.parent.get_previous_leaf()
        if called is None or called.value not in ORDERED:
            return
        plain = [
            i
            for i, child in enumerate(node.children)
            if child.type != "argument" and getattr(child, "value", None) != ","
        ]
        for a, b in pairwise(plain):
            if node.children[a].get_code(False) != node.children[b].get_code(False):
                yield a, b

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        for a, b in self.pairs(node):
            yield node.children[a].start_pos, node.children[b].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        a, b = list(self.pairs(node))[index]
        one, other = node.children[a], node.children[b]
        first, second = one.get_first_leaf(), other.get_first_leaf()
        first.prefix, second.prefix = second.prefix, first.prefix
        node.children[a], node.children[b] = other, one
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class SwapAxes(Operator):
    """Two neighbours among the axes that an einops pattern or an einsum equation gives, in the other order."""

    PATTERN = re.compile(r"^(['\"].*->\s*\S*?)(\w)(\s*)(\w)(\s*['\"])$")

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "string" and self.PATTERN.match(node.value):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = self.PATTERN.sub(r"\1\4\3\2\5", node.value)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


def _fits(name: str) -> bool:
    kind, _, of = name.partition("_")
    return kind != "ReplaceComparisonOperator" or any(set(of.split("_")) <= set(one) for one in COMPARED)


@functools.lru_cache(maxsize=1)
def operators() -> dict[str, type[Operator]]:
    """By name."""
    provider = OperatorProvider()
    known = {name: provider[name] for name in provider if name not in NEEDS_ARGUMENTS and _fits(name)}
    return known | {"SwapArguments": SwapArguments, "SwapAxes": SwapAxes}


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        path: of the module, relative to the root.
        operator: that makes the change.
        occurrence: which of the places that the operator can change.
        line: at which the change begins.
        end: the line at which it ends.
    """

    path: str
    operator: str
    occurrence: int
    line: int
    end: int

    def source(self) -> str:
        """The module with the change made."""
        return _mutated((ROOT / self.path).read_text(), self.operator, self.occurrence)

    def lines(self) -> tuple[str, str]:
        """What it changes and what it makes of it, without indentation."""
        before, after = (ROOT / self.path).read_text().splitlines(), self.source().splitlines()
        out: tuple[list[str], list[str]] = ([], [])
        for tag, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            if tag != "equal":
                out[0].extend(line.strip() for line in before[a:b])
                out[1].extend(line.strip() for line in after[c:d])
        return "\n".join(out[0]), "\n".join(out[1])

    def diff(self) -> str:
        """As a patch says it, with a line around."""
        before, after = (ROOT / self.path).read_text().splitlines(), self.source().splitlines()
        return "\n".join(list(difflib.unified_diff(before, after, lineterm="", n=1))[2:])


@functools.lru_cache(maxsize=8)
def _mutated(source: str, operator: str, occurrence: int) -> str:
    code = mutate_code(source, operators()[operator](), occurrence)
    assert isinstance(code, str)
    return code


def _says_nothing(node: Any, name: str) -> bool:
    """Whether no run of the code meets the change: annotations aren't evaluated, nor is what type checkers read."""
    inner = node
    while node is not None:
        parent = node.parent
        if parent is None:
            return False
        if node.type == "argument" and node.children[0].get_code().strip() == "strict":
            return True  # of zip(): it checks, and changes nothing
        if parent.type == "annassign" and node is parent.children[1]:
            return True
        if parent.type == "tfpdef" and node is parent.children[-1]:
            return True
        if parent.type == "param" and parent.annotation is node:
            return True
        if parent.type == "funcdef" and parent.annotation is node:
            return True
        if node.type == "if_stmt" and node.children[1].get_code().strip() == "TYPE_CHECKING":
            return True
        if node.type in ("decorator", "decorators"):
            if name != "RemoveDecorator":
                return True
            return FREE.search(inner.get_code()) is not None
        node = parent
    return False


def sites(path: str) -> list[list[Mutant]]:
    """The places of a module where something can be changed, and the changes that can be made at each."""
    known = {name: operator() for name, operator in operators().items()}
    counts: dict[str, int] = defaultdict(int)
    found: dict[tuple[Any, ...], list[Mutant]] = defaultdict(list)
    for node in ast_nodes(get_ast((ROOT / path).read_text())):
        for name, operator in known.items():
            for start, stop in operator.mutation_positions(node):
                one = Mutant(path, name, counts[name], start[0], stop[0])
                counts[name] += 1
                if not _says_nothing(node, name):
                    found[(start, stop, name.split("_")[0])].append(one)
    return list(found.values())


def sample(paths: list[str], number: int, seed: int) -> list[Mutant]:
    """So many mutants: each place is as likely as any other, and so are the changes at one place.

    A larger number with the same seed holds the smaller one.
    """
    chance = random.Random(seed)
    places = [place for path in paths for place in sites(path)]
    chance.shuffle(places)
    return [place[random.Random(f"{seed} {place[0]}").randrange(len(place))] for place in places[:number]]
