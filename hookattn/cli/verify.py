"""``hookattn verify``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from ..calls.call import Call
from ..calls.edits import edits_in_words
from ..console.screen import Screen, counted, plain
from ..console.tables import print_beside
from ..store import LazyFile
from ..testing.recheck import CHECKS, STORED, Check, recheck
from ..traces import Trace, load
from .command import Command

Result = tuple[Call, dict[str, Check]]


@click.command(
    cls=Command,
    short_help="Recompute a trace file's invariants.",
    examples=("hookattn verify run.safetensors", "hookattn verify run.safetensors --json"),
)
@click.argument("file", type=click.Path())
@click.pass_obj
def verify(screen: Screen, file: str) -> None:
    """Recompute a trace FILE's invariants from the file alone, without the model; exit code 1 if one fails.

    \b
    scores    softcap(scale·q·kᵀ) + bias = scores, where the mask allows
    weights   softmax(where(mask, scores, −∞), sinks) = weights
    masked    a masked entry weighs 0
    rows      a row of weights sums to 1 (with sinks: to at most 1)
    output    weights @ v = output
    stored    the bytes have the checksums that were written with them (since format 1.3)

    A call whose normalizer is no softmax is held to that one, and one whose scores are no q·k to the rest. Which axis
    is which no check can tell: where a trace guessed it, that stands beside the certificate. Weights and outputs that
    an edit has set follow from nothing, and are left out; all others of the call are checked.

    A call also fails if its stored certificate, which was measured against the model's own kernel, is unfaithful.
    """
    trace = load(file)
    damaged = _damaged(file)
    results: list[Result] = []
    with screen.working("recomputing", total=len(trace)) as advance:
        for call in trace:
            results.append((call, recheck(call)))
            advance()
    passed = not damaged and all(_verdict(*result) != "FAIL" for result in results)
    if screen.as_json:
        screen.json(_json_results(trace, results, passed) | {"damaged": damaged})
    else:
        _print_results(screen, results, damaged)
    if not passed:
        click.get_current_context().exit(1)


def _damaged(path: str) -> list[str]:
    """The tensors of a file whose bytes do not have their checksum."""
    with LazyFile(path) as file:
        return [name for name in file if file.intact(name) is False]


def _verdict(call: Call, checks: dict[str, Check]) -> str:
    found = [check.passed for name, check in checks.items() if name != STORED]
    if False in found or checks[STORED].passed is False or call.certificate.status == "unfaithful":
        return "FAIL"
    return "pass" if True in found else "nothing to check"


def _json_results(trace: Trace, results: list[Result], passed: bool) -> dict[str, Any]:
    return {
        "file": trace.path,
        "passed": passed,
        "calls": [
            {
                "index": call.index,
                "step": call.step,
                "path": call.site.path,
                "result": _verdict(call, checks).lower(),
                "basis": dict(call.basis),
                "score": call.score,
                "normalizer": call.normalizer,
                "edits": [asdict(edit) for edit in call.edits],
                "checks": {
                    name: {"passed": None, "reason": check.reason}
                    if check.reason
                    else {"passed": check.passed, "error": check.error, "tolerance": check.tolerance}
                    for name, check in checks.items()
                },
                "certificate": {**call.certificate.to_json(), "faithful": call.certificate.faithful},
            }
            for call, checks in results
        ],
    }


def _certificate_cell(call: Call) -> str:
    """The verdict; what was edited stands below the table."""
    said = call.verdict.removesuffix(edits_in_words(call.edits)) if call.edits else call.verdict
    return f"{said}edited" if call.edits else said


def _check_cell(check: Check) -> Text:
    if check.reason:
        return Text("–", "dim")
    return Text(f"{check.error:.0e}" if check.error else "0", "green" if check.passed else "bold red")


def _print_results(screen: Screen, results: list[Result], damaged: list[str]) -> None:
    steps = len({call.step for call, _ in results}) > 1
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in ["", *(["step"] if steps else []), "path", *CHECKS, STORED, "certificate"]:
        table.add_column(name, overflow="fold", no_wrap=name != "path")
    styles = {"pass": "green", "FAIL": "bold red", "nothing to check": "yellow"}
    for call, checks in results:
        status, verdict = call.certificate.status, _verdict(call, checks)
        table.add_row(
            Text("–" if verdict == "nothing to check" else verdict, styles[verdict]),
            *([str(call.step)] if steps else []),
            plain(call.site.label),
            *map(_check_cell, checks.values()),
            plain(_certificate_cell(call), "bold red" if status == "unfaithful" else "yellow" if call.guessed else ""),
        )
    screen.out.print(table)
    screen.out.print(Text())
    for call, checks in results:
        for name, check in checks.items():
            if check.passed is False and name in CHECKS:
                said = f"{CHECKS[name]} is off by {check.error:.2e}, allowed {check.tolerance:.2e}"
                screen.out.print(plain(f"call {call.index}, {call.site.label}: {said}", "red"))
    for name in damaged:
        screen.out.print(plain(f"{name}: its bytes are not those that were written: the checksum is another", "red"))
    reasons = dict.fromkeys((n, check.reason) for _, checks in results for n, check in checks.items() if check.reason)
    for name, reason in reasons:
        screen.out.print(plain(f"– {name} not checked: {reason}", "dim"))
    print_beside(screen.out, [call for call, _ in results])
    verdicts = [_verdict(*result) for result in results]
    failed, empty = verdicts.count("FAIL"), verdicts.count("nothing to check")
    total = counted(len(verdicts), "call")
    if failed or damaged:
        screen.out.print(Text(f"{failed} of {total} failed", "bold red"))
    elif empty:
        screen.out.print(Text(f"{empty} of {total} could not be checked, the rest pass", "yellow"))
    else:
        screen.out.print(Text(f"{total}: all that the file holds agrees with itself", "green"))
