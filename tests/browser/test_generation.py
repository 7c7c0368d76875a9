"""A generation in the viewer: each step's queries and keys at their positions, and the steps one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from tests.browser.conftest import rows_of_table, show, state

pytest.importorskip("transformers")
from tests import tiny_models as tiny
from tests.generation.test_stitch import mistral

pytestmark = pytest.mark.browser
Open = Callable[..., Any]
WORDS = [f"Ġw{i}" for i in range(30)]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def generated(
    model: Any, *, prompt: int = 6, tokens: list[str] | None = None, queries: Any = None, **options: Any
) -> tuple[Any, Any]:
    """A generation's trace, and the positions that the model itself gave the queries of each step."""
    given: list[list[int]] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        given.append(kwargs.get("position_ids", args[-1])[0].tolist())

    hook = model.model.rotary_emb.register_forward_pre_hook(keep, with_kwargs=True)
    ids = tiny.ids(prompt, batch=1)
    if "prompt_lookup_num_tokens" in options:
        ids = torch.cat([ids, ids], 1)  # so that there is something to look up
    with hook, hookattn.tracing(model, tokens=tokens, queries=queries) as trace:
        model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})
    return trace, given


POSITIONS = """async () => { const { Trace, served } = await import("/hookattn-viewer.js");
  const trace = await Trace.open(await served("/trace.safetensors"));
  return trace.calls.map(c => Array.from({length: c.extents.T}, (_, t) => c.past + (c.queries?.[t] ?? t))); }"""


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (tiny.llama, {}),
        (tiny.llama, {"cache_implementation": "static"}),
        (tiny.llama, {"use_cache": False}),
        (tiny.llama, {"prefill_chunk_size": 2}),
        (tiny.llama, {"prompt": 1}),
        (tiny.llama, {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12, "min_new_tokens": 12}),
        (mistral, {}),
        (mistral, {"prompt": 2}),
        (tiny.llama, {"queries": [0]}),
        (tiny.llama, {"queries": [-1, 0], "use_cache": False}),
        (tiny.llama, {"queries": [0], "cache_implementation": "static"}),
        (mistral, {"queries": [0]}),
    ],
    ids=[
        "dynamic",
        "static",
        "none",
        "chunks",
        "one token",
        "candidates",
        "window",
        "window filling",
        "first row",
        "first and last, none",
        "first row, static",
        "first row, window",
    ],
)
def test_queries_have_the_positions_that_the_model_gave_them(
    open_page: Open, tmp_path: Path, model: Callable[[], Any], options: dict[str, Any]
) -> None:
    trace, given = generated(model(), **options)
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")))
    expected = [[given[c.step][i] for i in c.queries or range(len(given[c.step]))] for c in trace]
    assert page.evaluate(POSITIONS) == expected
    if "prompt_lookup_num_tokens" in options:
        ends = [positions[-1] for positions in given]
        assert any(after[0] <= end for end, after in zip(ends, given[1:], strict=False)), "nothing was rejected"


def test_tokens_of_a_step_are_where_they_were_fed(open_page: Open, tmp_path: Path) -> None:
    trace, _ = generated(tiny.llama(), tokens=WORDS[:12])
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")), "{state: {step: 3, layer: 1, heads: [2]}}")
    table = rows_of_table(page)
    weights = trace.select(step=3, layer=1)[0].weights[0, 2, 0]
    assert {q for q, _, _ in table} == {"8 “w8”"}
    assert {k: w for _, k, w in table} == pytest.approx({f"{s} “w{s}”": w for s, w in enumerate(weights.tolist())})
    # The query stands beside its own key.
    ys = page.locator("[data-view=head] text", has_text="w8").evaluate_all("all => all.map(t => t.getAttribute('y'))")
    assert len(ys) == 2 and ys[0] == ys[1]


def test_the_prompt_has_names_when_what_follows_has_none(open_page: Open, tmp_path: Path) -> None:
    trace, _ = generated(tiny.llama(), tokens=WORDS[:6])
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")), "{state: {step: 2, heads: [0]}}")
    found = {(q, k) for q, k, _ in rows_of_table(page)}
    assert found == {("7 “7”", f"{s} “{f'w{s}' if s < 6 else s}”") for s in range(8)}


def test_steps_are_gone_through_and_the_rest_stays(open_page: Open, tmp_path: Path) -> None:
    trace, _ = generated(tiny.llama(), tokens=WORDS[:12])
    options = "{state: {view: 'matrix', layer: 1, heads: [3], query: 4, key: 2, zoom: [0, 0, 4, 4]}}"
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")), options)
    assert page.get_by_label("Step", exact=True).get_attribute("aria-valuetext") == "0: 6 queries"
    page.keyboard.press("Tab")
    page.keyboard.press("'")
    page.wait_for_function("viewer.state.step === 1")
    kept = {"view": "matrix", "layer": 1, "heads": [3], "query": None, "key": 2, "zoom": None}
    assert {name: state(page)[name] for name in kept} == kept
    assert page.get_by_label("Step", exact=True).get_attribute("aria-valuetext") == "1: “w6”"
    page.keyboard.press(";")
    page.wait_for_function("viewer.state.step === 0")
    page.get_by_label("Step", exact=True).focus()
    page.keyboard.press("End")
    page.wait_for_function("viewer.state.step === 5")


def test_a_locked_key_stays_when_the_window_moves(open_page: Open, tmp_path: Path) -> None:
    trace, given = generated(mistral(), tokens=WORDS[:12])
    first, last = trace.select(step=3, layer=0)[0], trace.select(step=4, layer=0)[0]
    assert first.k.shape[2] == last.k.shape[2] < given[3][0]  # the oldest key falls out in each step
    options = "{state: {step: 3, layer: 0, key: 1}}"
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")), options)
    page.locator(".as-table summary", has_text="queries of 6 “w6”").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("'")
    page.wait_for_function("viewer.state.step === 4 && viewer.state.key === 0")
    page.keyboard.press("'")
    page.wait_for_function("viewer.state.step === 5 && viewer.state.key === null")


def test_steps_are_played_to_the_last(open_page: Open, tmp_path: Path) -> None:
    trace, _ = generated(tiny.llama(), tokens=WORDS[:12])
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")), "{state: {heads: [1], layer: 1}}")
    page.get_by_role("button", name="Play the steps").click()
    page.wait_for_function("viewer.state.step === 2")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(900)
    assert state(page)["step"] == 2
    page.keyboard.press("p")
    page.wait_for_function("viewer.state.step === 5")
    page.get_by_role("button", name="Play the steps").wait_for()
    page.keyboard.press("p")
    page.wait_for_function("viewer.state.step === 1")
    assert (state(page)["layer"], state(page)["heads"]) == (1, [1])


def test_a_stitched_generation_is_one_picture(open_page: Open, tmp_path: Path) -> None:
    trace, _ = generated(tiny.llama(), tokens=WORDS[:11])
    whole = trace.stitch()
    page = show(open_page(), Path(whole.save(tmp_path / "t.safetensors")), "{state: {heads: [1], query: 9}}")
    assert page.get_by_label("Step", exact=True).count() == 0
    weights = trace.select(step=4, layer=0)[0].weights[0, 1, 0]
    found = {k: w for _, k, w in rows_of_table(page)}
    expected = {f"{s} “w{s}”": w for s, w in enumerate(weights.tolist())}
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_keys_that_a_window_dropped_are_counted_of_selected_rows(open_page: Open, tmp_path: Path) -> None:
    trace, given = generated(mistral(), tokens=WORDS[:12], queries=[-1])
    call = trace.select(step=3, layer=0)[0]
    last, s = given[3][0], call.k.shape[2]
    assert s <= last, "nothing was dropped"
    page = show(open_page(), Path(trace.save(tmp_path / "t.safetensors")), "{state: {step: 3, layer: 0, heads: [0]}}")
    names = [f"{j} “w{j}”" for j in range(last + 1 - s, last + 1)]
    table = rows_of_table(page)
    assert {q for q, _, _ in table} == {names[-1]} and {k for _, k, _ in table} <= set(names)
    assert names[-1] in {k for _, k, _ in table}
