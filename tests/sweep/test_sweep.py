"""A tenth of the sweep over every model type of transformers, and that no type is left without a row.

The whole of it is `make coverage`. Its rows hold for the transformers that docs/coverage.md names. What a later one has
besides is reported as new; what the named one has and the page lacks is a failure. Types that are known to be red are
in ``KNOWN_RED`` with the reason, and have to stay red until the entry goes: a mend shows.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from hookattn.taps.eager.replay import Run
from tests.sweep import check as checking
from tests.sweep.axes import untrue, watch_inputs
from tests.sweep.beside import check_beside, little_recognised
from tests.sweep.cases import build, inputs_of
from tests.sweep.check import FLAT, Row, check
from tests.sweep.classes import model_types
from tests.sweep.pool import Worker, run_all
from tests.sweep.report import Coverage, read, write
from tests.sweep.results import Results
from tests.sweep.table import RECIPES
from tests.versions import PAGE, NewInDependencyWarning, newer

COVERAGE = read(PAGE)
HERE = version("transformers")
# What issue and experience say is hard: sinks, merged softmaxes, folded heads, baddbmm, buckets, bands, blocks, sums of
# products, masks of -100, latent attention, soft-caps, hybrids.
HARD = """gpt_oss t5gemma2 xglm trocr fsmt vits bloom reformer hiera longt5 prophetnet deberta deberta-v2 xlnet
funnel sew-d swin diffllama nystromformer deepseek_v3 gemma2 mpt t5 beit wav2vec2-conformer perceiver qwen3_next llava
clip detr seamless_m4t whisper mixtral mllama longformer led big_bird granite_speech rf_detr""".split()
# type -> (implementation, what is wrong)
KNOWN_RED: dict[str, tuple[str, str]] = {}
# Of the types that have a row, so that a release of transformers leaves the choice as it is.
TENTH = sorted((set(COVERAGE.types[14::18]) | set(HARD) - set(KNOWN_RED)) & set(model_types()))
NEW = sorted(set(model_types()) - set(COVERAGE.types)) if newer(HERE, COVERAGE.transformers) else []


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", [t for t in TENTH if t not in KNOWN_RED])
def test_a_type(model_type: str, implementation: str) -> None:
    row = check(model_type, implementation)
    assert row.status != "red", "\n".join(row.problems)
    if row.status == "unbuilt":
        assert row.reason, "not run, and no reason is given"
        assert model_type not in HARD, row.reason
        if row.reason.startswith("needs "):
            pytest.skip(row.reason)
        if model_type not in COVERAGE.unrun:  # an argument has another name, say, that the rules have to follow
            said = f"{model_type} ran for docs/coverage.md, and does not with transformers {HERE}: {row.reason}"
            (pytest.xfail if newer(HERE, COVERAGE.transformers) else pytest.fail)(said)


@pytest.mark.parametrize("model_type", sorted(KNOWN_RED))
def test_a_known_red_type_is_still_red(model_type: str) -> None:
    implementation, why = KNOWN_RED[model_type]
    row = check(model_type, implementation)
    assert row.status == "red", f"{model_type} is {row.status} now: take it out of KNOWN_RED ({why})"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", NEW)
def test_a_type_that_is_newer_than_the_page(model_type: str, implementation: str) -> None:
    """It is run as the others are; what does not hold of it is reported, and no failure before the page names it."""
    row = check(model_type, implementation)
    if row.status == "red":
        pytest.xfail(f"new in transformers {HERE}: {model_type} in {implementation}: {'; '.join(row.problems)}")


# Attention that is written in ways of its own, where what is learned may go wrong: one of each, not of the tenth above
# but for the first, so that both together cost no more than they tell.
LEARNED = """gpt2 llama t5 bart mixtral gptj bloom codegen deberta-v2 xlnet swinv2 gpt_neo mpnet wavlm speecht5
gemma3n_audio exaone4_5_vision""".split()


@pytest.mark.parametrize("model_type", [t for t in LEARNED if t in model_types()])
def test_what_is_recognised_of_a_type_is_what_following_makes(model_type: str) -> None:
    row = check_beside(model_type)
    assert row.status == "green", row.problems or row.reason


@pytest.mark.slow
def test_what_is_recognised_of_every_type_is_what_following_makes() -> None:
    rows: list[dict[str, Any]] = []
    run_all([(t, "eager") for t in model_types()], 2, 120, rows.append, "--beside")
    red = [f"{row['model_type']}: {row['problems'][0]}" for row in rows if row["status"] == "red"]
    assert not red, "\n".join(red)
    assert sum(row["status"] == "green" for row in rows) > 0.9 * len(rows)


def test_a_replay_that_goes_wrong_makes_a_red_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that turns the values of a call round, say."""
    honest = Run.ingredients

    def lies(self: Run, made: Any) -> Any:
        given = honest(self, made)
        return dataclasses.replace(given, values=[v.flip(-1) for v in given.values])

    monkeypatch.setattr(Run, "ingredients", lies)
    row = check_beside("gpt2")
    assert row.status == "red", row


def test_what_is_little_recognised_is_told_with_its_reasons() -> None:
    row = {"model_type": "bert", "status": "green", "recognised": 1, "followed": 3, "why": {"a loop": 2}}
    assert little_recognised([row, {**row, "recognised": 90}, {**row, "status": "red"}]).splitlines() == [
        "1 types: a loop",
        " 25% of 4 bert: 2 × a loop",
    ]


def of_rows(page: Coverage, types: Iterable[str], here: str) -> tuple[list[str], list[str]]:
    """What is wrong with the rows of a page, and what is only newer than it.

    Args:
        page: what the page says.
        types: the model types that are installed.
        here: the version of transformers that they are of.
    """
    wrong, new, types = [], [], list(types)
    if len(page.types) != page.count:
        wrong.append(f"the page says that it has {page.count} types, and has rows of {len(page.types)}")
    lacking = [t for t in types if t not in set(page.types)]
    gone = [t for t in page.types if t not in set(types)]
    if newer(here, page.transformers):
        new += [f"new in transformers {here}, without a row: {', '.join(lacking)}"] if lacking else []
        new += [f"gone from transformers {here}: {', '.join(gone)}"] if gone else []
    elif newer(page.transformers, here):
        # An older one maps fewer types. What it has, the page has too, unless a later one let it go.
        new += [f"no row, and in transformers {here}: {', '.join(lacking)}"] if lacking else []
    else:
        wrong += [f"no row in docs/coverage.md (run `make coverage`): {', '.join(lacking)}"] if lacking else []
        wrong += [f"a row of what transformers {here} does not map: {', '.join(gone)}"] if gone else []
    return wrong, new


def test_every_type_has_a_row() -> None:
    wrong, new = of_rows(COVERAGE, model_types(), HERE)
    for line in new:
        warnings.warn(NewInDependencyWarning(f"{line} (`make coverage` makes the page anew)"), stacklevel=1)
    assert not wrong, "; ".join(wrong)


# Called by a wrong name, as the page says: the kind of what pools into groups and the numbers of its sites; attention
# over the depth of a network, which has positions where the interface has heads.
KNOWN_RED = [f"`groupvit{x}`" for x in ("", "_vision_model")] + [
    f"`inkling2{x}`" for x in ("", "_loop", "_loop_text", "_text")
]


def test_no_other_row_is_red() -> None:
    other = [row for row in COVERAGE.red if row.split()[0] not in KNOWN_RED]
    assert not other, f"red in docs/coverage.md: {', '.join(other)}"


def test_a_release_is_new_and_a_lost_row_is_wrong() -> None:
    page = Coverage("5.1.0", 3, ("bert", "gpt2", "vit"), (), ())
    assert of_rows(page, ["vit", "bert", "gpt2"], "5.1.0") == ([], [])
    assert of_rows(page, ["vit", "bert", "gpt2", "dory"], "5.2.0") == (
        [],
        ["new in transformers 5.2.0, without a row: dory"],
    )
    assert of_rows(page, ["vit", "bert"], "5.10.0") == ([], ["gone from transformers 5.10.0: gpt2"])
    assert of_rows(page, ["bert"], "5.0.9") == ([], []), "an older one maps fewer"
    lost = Coverage("5.1.0", 3, ("bert", "vit"), (), ())
    count = "the page says that it has 3 types, and has rows of 2"
    assert of_rows(lost, ["vit", "bert", "gpt2"], "5.1.0")[0] == [
        count,
        "no row in docs/coverage.md (run `make coverage`): gpt2",
    ]
    assert of_rows(lost, ["vit", "bert", "gpt2"], "5.2.0")[0] == [count], "a newer one does not hide it"
    swapped = Coverage("5.1.0", 3, ("bert", "gpt3", "vit"), (), ())
    wrong, new = of_rows(swapped, ["vit", "bert", "gpt2"], "5.1.0")
    assert wrong[1:] == ["a row of what transformers 5.1.0 does not map: gpt3"] and "gpt2" in wrong[0] and not new


def test_a_page_is_read_as_it_is_written(tmp_path: Path) -> None:
    rows = [
        Row("bert", "eager").to_json() | {"model": "BertModel", "calls": 1, "flat": 0.5},
        Row("bert", "sdpa", status="red").to_json() | {"problems": ["unseen: x"]},
        *(Row("gone-away", i, status="unbuilt").to_json() | {"reason": "no `class`"} for i in ("eager", "sdpa")),
    ]
    write(tmp_path / "page.md", rows, 1.0)
    assert read(tmp_path / "page.md") == Coverage(
        HERE, 2, ("bert", "gone-away"), ("gone-away",), ("`bert` in sdpa: unseen: x",)
    )


def test_every_recipe_is_of_a_type() -> None:
    others = set(RECIPES) - set(model_types())
    if COVERAGE.transformers != HERE:
        others -= set(COVERAGE.types)  # of the page's transformers and not of this one
    assert not others


def test_attention_is_far_from_uniform() -> None:
    assert check("llama", "eager").flat < 0.8 < FLAT


def test_a_wrong_record_makes_a_red_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that hides a little more than the model's own: the sweep has to see it."""
    honest = checking.hookattn.trace

    def lies(*args: object, **kwargs: object) -> object:
        trace = honest(*args, **kwargs)  # type: ignore[arg-type]
        call = trace[0]
        call.fields["q"] = call.q.flip(2)
        call.fields["weights"] = call.weights.flip(2)
        return trace

    monkeypatch.setattr(checking.hookattn, "trace", lies)
    row = check("bert", "eager")
    assert row.status == "red", row
    assert any("invariant" in p for p in row.problems)


@pytest.mark.parametrize("pair", [(1, 2), (0, 1)], ids=["heads and queries", "batch and heads"])
def test_exchanged_axes_are_seen(pair: tuple[int, int]) -> None:
    """However consistent a record is with itself, the module knows its heads."""
    model, config = build("gpt2", "eager")
    inputs = inputs_of("gpt2", model, config)
    trace = checking.hookattn.trace(model, inputs)
    given = watch_inputs(model, lambda: model(**inputs))
    assert untrue(model, config, trace, given) == []
    trace[0].fields["weights"] = trace[0].weights.transpose(*pair)
    assert [p.partition(":")[0] for p in untrue(model, config, trace, given)][:1] == ["axes"]


def test_a_kind_and_a_layer_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checking.hookattn.trace

    def lies(*args: object, **kwargs: object) -> object:
        trace = honest(*args, **kwargs)  # type: ignore[arg-type]
        for call in trace:
            call.site = dataclasses.replace(call.site, kind="self", layer=7 - call.index)
        return trace

    monkeypatch.setattr(checking.hookattn, "trace", lies)
    row = check("t5", "eager")
    assert {p.partition(":")[0] for p in row.problems} >= {"kind", "layer"}, row.problems


def test_a_part_runs_in_the_model_that_builds_it() -> None:
    row = check("t5_gemma_module", "eager")
    assert (row.status, row.model) == ("green", "T5GemmaModel")


def test_what_has_no_forward_runs_by_its_encoder() -> None:
    assert check("chameleon_vqgan", "eager").calls == 1


def test_a_call_that_is_left_out_makes_a_red_row(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checking.hookattn.trace

    def lies(*args: object, **kwargs: object) -> object:
        trace = honest(*args, **kwargs)  # type: ignore[arg-type]
        trace.calls.pop()
        return trace

    monkeypatch.setattr(checking.hookattn, "trace", lies)
    row = check("bert", "sdpa")
    assert any(p.startswith("unseen") for p in row.problems), row.problems


@pytest.mark.slow
def test_a_crash_costs_its_own_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, object]] = []
    seen: list[Worker] = []
    start = Worker.run

    def run(self: Worker, case: tuple[str, str], timeout: float) -> dict[str, object]:
        seen.append(self)
        if case[0] == "bert":
            self.process.kill()
            self.process.wait()
            return {"model_type": case[0], "status": "red"}
        return start(self, case, timeout)

    monkeypatch.setattr(Worker, "run", run)
    run_all([("bert", "eager"), ("llama", "eager")], 1, 60, rows.append)
    assert [r["status"] for r in rows] == ["red", "green"]
    assert len({id(w) for w in seen}) == 3, "tried twice, each time in a worker of its own"


def test_results_resume_only_of_the_same_sources(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Results(path).add(Row("bert", "eager").to_json())
    assert ("bert", "eager") in Results(path, resume=True)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({"torch": "another"}), *lines[1:]]) + "\n")
    assert ("bert", "eager") not in Results(path, resume=True)
