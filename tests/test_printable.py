"""What of a text is written as it is, and what as a number."""

from __future__ import annotations

import json
import sys
import unicodedata
import warnings
from dataclasses import replace

import pytest
import torch

import hookattn
from hookattn.calls.certificate import UNVERIFIED
from hookattn.calls.site import Site
from hookattn.errors import HookattnError
from hookattn.printable import json_text, printable

REAL = [
    "layers.0.attn", "Ġthe Ċ ▁cat ##ing </w>", "déjà vu ŝ ø", "naïve e\u0301", "猫が好き 我 안녕", "שלום العربية",
    "नमस्ते क्\u200dष",
    "نمی\u200cخواهم", "ไทย", "👨\u200d👩\u200d👧 ❤\ufe0f 👍🏽 🇩🇪 1\ufe0f⃣ ™\ufe0f", "∑ √ × … “quotes”",
    "葛\U000e0100", "\u0600 1",
    "a\u00a0b", "\ue0b0",
]  # fmt: skip
ESCAPED = {
    "\x1b]52;c;ZXZpbA==\x07": r"\x1b]52;c;ZXZpbA==\x07",
    "\x9b2J\x85\x7f": r"\x9b2J\x85\x7f",
    "a\nb\tc\rd": r"a\nb\tc\rd",
    "\u202ecod.exe\u2066\u200e": r"\u202ecod.exe\u2066\u200e",
    "a\u2028b\u2029c": r"a\u2028b\u2029c",
    "x\ud800y": r"x\ud800y",
    "ad\u200dmin\u200b\ufeff\xad": r"ad\u200dmin\u200b\ufeff\xad",
    "\U000e0068i": r"\U000e0068i",
    "👍\ufe0f\ufe01\U000e0101": "👍\ufe0f" + r"\ufe01\U000e0101",
    "a\ufe0f": r"a\ufe0f",
    "x\u3164\uffa0\u115f": r"x\u3164\uffa0\u115f",
    "\ufff9\uffff": r"\ufff9\uffff",
}


@pytest.mark.parametrize("text", REAL)
def test_real_text_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("text", ESCAPED)
def test_what_has_no_shape_is_a_number(text: str) -> None:
    assert printable(text) == ESCAPED[text]
    assert printable(printable(text)) == ESCAPED[text], "it stays the same the second time"


def test_every_character_of_unicode() -> None:
    """No character that Unicode counts as a control, a format, half of a pair or a break is alone written as it is."""
    signs = "ARABIC|SYRIAC|KAITHI"
    for code in range(sys.maxunicode + 1):
        c = chr(code)
        kind = unicodedata.category(c)
        if kind in ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn"):
            visible = unicodedata.name(c, "").partition(" ")[0] in signs.split("|") and c != "\u061c"
            assert (
                printable(f"a{c}b") == (f"a{c}b") or not printable(f"a{c}b").isascii()
                if visible
                else (printable(f"a{c}b").isascii() and len(printable(f"a{c}b")) > 3)
            ), hex(code)
        elif kind[0] in "LNPS":
            assert len(printable(c)) == 1 or "FILLER" in unicodedata.name(c), hex(code)


def test_lines_are_kept_where_they_may_be() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


@pytest.mark.parametrize("text", [*REAL, *ESCAPED])
def test_json_holds_the_text_itself(text: str) -> None:
    made = json_text({text: [text, 1.5, None]})
    assert json.loads(made) == {text: [text, 1.5, None]}
    assert printable(made, keep="\n") == made


HOSTILE = "\x1b[2J\x9b\u202e\u2028\ud800\x07"


def test_errors_and_warnings_are_printable() -> None:
    kinds = [x for x in vars(hookattn).values() if isinstance(x, type) and issubclass(x, (HookattnError, UserWarning))]
    assert len(kinds) > 15
    for kind in kinds:
        said = str(kind(f"{HOSTILE}\nsecond line"))
        assert printable(said, keep="\n") == said and said.endswith("\nsecond line"), kind
    # Not pytest.warns, which hands the raw text on to the process that reports, and that takes no lone surrogate.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn(hookattn.SkippedWarning(HOSTILE), stacklevel=1)
    assert str(caught[0].message) == printable(HOSTILE)


def test_what_a_prompt_shows_is_printable() -> None:
    model = torch.nn.MultiheadAttention(8, 2).eval()
    x = torch.randn(3, 1, 8)
    trace = hookattn.trace(model, (x, x, x))
    call = trace[0]
    call.site, call.tap, call.notes = Site(HOSTILE, 0, HOSTILE, HOSTILE, HOSTILE, HOSTILE), HOSTILE, (HOSTILE,)
    call.certificate = replace(UNVERIFIED, status=HOSTILE, basis=HOSTILE)
    trace.model = {"class": HOSTILE}
    trace.notes.append(HOSTILE)
    trace.path = HOSTILE
    for thing in (trace, call, call.certificate, call.site, call.site.label, trace.notes, trace.model):
        for said in (str(thing), repr(thing)):
            assert printable(said) == said
    with pytest.raises(hookattn.SelectionError) as caught:
        trace["none"]
    assert printable(str(caught.value)) == str(caught.value)
