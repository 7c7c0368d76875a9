"""A tenth of the sweep over every model type of transformers, and that no type is left without a row.

The whole of it is `make coverage`. Types that are known to be red are in ``KNOWN_RED`` with the reason, and have to
stay red until the entry goes: a mend shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.sweep import check as checking
from tests.sweep.check import FLAT, Row, check
from tests.sweep.classes import model_types
from tests.sweep.pool import Worker, run_all
from tests.sweep.results import Results
from tests.sweep.table import RECIPES

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
# What issue and experience say is hard: sinks, merged softmaxes, folded heads, baddbmm, buckets, bands, blocks, sums of
# products, masks of -100, latent attention, soft-caps, hybrids.
HARD = """gpt_oss t5gemma2 xglm trocr fsmt vits bloom reformer hiera longt5 prophetnet deberta deberta-v2 xlnet
funnel sew-d swin diffllama nystromformer deepseek_v3 gemma2 mpt t5 beit wav2vec2-conformer perceiver qwen3_next llava
clip detr seamless_m4t whisper mixtral mllama longformer led big_bird granite_speech rf_detr""".split()
# type -> (implementation, what is wrong)
KNOWN_RED: dict[str, tuple[str, str]] = {}
TENTH = sorted(set(model_types()[14::18]) | set(HARD) - set(KNOWN_RED))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", [t for t in TENTH if t not in KNOWN_RED])
def test_a_type(model_type: str, implementation: str) -> None:
    row = check(model_type, implementation)
    assert row.status != "red", "\n".join(row.problems)
    if row.status == "unbuilt":
        assert row.reason, "not run, and no reason is given"
        assert model_type not in HARD, row.reason


@pytest.mark.parametrize("model_type", sorted(KNOWN_RED))
def test_a_known_red_type_is_still_red(model_type: str) -> None:
    implementation, why = KNOWN_RED[model_type]
    row = check(model_type, implementation)
    assert row.status == "red", f"{model_type} is {row.status} now: take it out of KNOWN_RED ({why})"


def test_every_type_has_a_row() -> None:
    page = PAGE.read_text()
    missing = [t for t in model_types() if f"`{t}`" not in page]
    assert not missing, f"no row in docs/coverage.md (run `make coverage`): {', '.join(missing)}"


def test_every_recipe_is_of_a_type() -> None:
    assert not set(RECIPES) - set(model_types())


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


def test_a_call_that_is_left_out_makes_a_red_row(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checking.hookattn.trace

    def lies(*args: object, **kwargs: object) -> object:
        trace = honest(*args, **kwargs)  # type: ignore[arg-type]
        trace.calls.pop()
        return trace

    monkeypatch.setattr(checking.hookattn, "trace", lies)
    row = check("bert", "sdpa")
    assert any(p.startswith("unseen") for p in row.problems), row.problems


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
