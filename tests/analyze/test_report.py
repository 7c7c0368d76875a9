"""The table of all heads, what they are called, and why."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import hookattn
from hookattn import analyze
from hookattn.analyze.chance import Chance
from hookattn.analyze.tables.roles import Role, evidence_measures, roles_of
from hookattn.cli.commands import app
from hookattn.demo import encoder
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.errors import MeasureError, SelectionError
from tests.analyze.build import case, given, previous, uniform


@pytest.fixture(scope="module")
def causal() -> hookattn.Trace:
    ids = example_tokens(0)
    with torch.no_grad():
        return hookattn.trace(load_pretrained(), ids, tokens=[str(i) for i in ids[0].tolist()])


@pytest.fixture(scope="module")
def pair() -> hookattn.Trace:
    source = encoder.directory()
    if source is None:
        pytest.skip("the encoder is not installed")
    model, tokenizer = encoder.load(source)
    inputs = tokenizer(*encoder.PAIR, return_tensors="pt")
    with torch.no_grad():
        return hookattn.trace(model, inputs, tokens=tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]))


def with_role(table: pd.DataFrame, role: str) -> set[tuple[int, int]]:
    fits = table[[role in roles.split("; ") for roles in table.role]]
    return set(zip(fits.layer, fits["head"], strict=True))


def test_the_small_causal_model(causal: hookattn.Trace) -> None:
    table = analyze.report(causal)
    assert with_role(table, "previous token") == {(0, 0), (0, 1), (0, 3)}
    assert with_role(table, "induction") == {(1, 0), (1, 1), (1, 2), (1, 3)}
    # In the first copy there is nothing to copy: the heads rest on the first token.
    assert with_role(table, "first token") == {(1, 0), (1, 1), (1, 2), (1, 3)}
    nameless = table[(table.layer == 0) & (table["head"] == 2)].iloc[0]
    assert nameless.role == nameless.evidence == ""
    first = table.iloc[0]
    w = causal[0].weights[0, 0].double()
    assert first.evidence == f"previous_token {float(w.diagonal(-1).sum() / len(w)):.2f} (uniform 0.07)"


def test_the_sentence_encoder(pair: hookattn.Trace) -> None:
    table = analyze.report(pair)
    assert (2, 9) in with_role(table, "same word in the other sentence")
    assert with_role(table, "previous token") == {(0, 2)} and with_role(table, "next token") == {(1, 8)}
    assert with_role(table, "separators") == {(0, 5)}
    assert table["induction"].notna().all()  # the words repeat


def test_the_same_numbers_as_measure_by_measure(causal: hookattn.Trace) -> None:
    table = analyze.report(causal)
    for name in table.attrs["units"]:
        if name in analyze.MEASURES:
            pd.testing.assert_series_equal(table[name], analyze.measure(causal, name)[name])


def test_chosen_measures_stand_beside_the_evidence(causal: hookattn.Trace) -> None:
    table = analyze.report(causal, [analyze.LocalMass(2), "entropy"])
    expected = {"local_mass(window=2)", "entropy", *(m.key for m in evidence_measures())}
    assert set(table.attrs["units"]) | set(table.attrs["left_out"]) == expected


def test_what_is_not_defined_is_left_out_with_the_reason() -> None:
    table = analyze.report(case().trace)  # no tokens
    assert "induction" not in table and "tokens" in table.attrs["left_out"]["induction"]
    crossing = analyze.report(case(cross=True, s=7).trace)
    assert "previous_token" not in crossing and "one sequence" in crossing.attrs["left_out"]["previous_token"]
    assert crossing.entropy.notna().all()


def test_from_statistics_alone() -> None:
    ids = example_tokens(0)
    trace = hookattn.trace(load_pretrained(), ids, capture=analyze.capture())
    table = analyze.report(trace)
    assert "previous token" in set(table.role)
    assert "'mask' of blocks.0.attn was not captured" in table.attrs["left_out"]["normalised_entropy"]
    assert all("uniform" not in why for why in table.evidence)  # no mask was kept that could tell


def test_nothing_to_report_on() -> None:
    with pytest.raises(MeasureError, match="no calls"):
        analyze.report(hookattn.Trace())
    with pytest.raises(MeasureError, match=r"nothing can be measured: .*captured"):
        analyze.report(case(keep=("q", "k", "v")).trace)
    with pytest.raises(SelectionError, match="no measure 'x'"):
        analyze.report(case().trace, ["x"])


# ------------------------------------------------------------------------------------------------------------ roles


def level(weights: Tensor, name: str) -> float:
    return float(analyze.measure(given(weights), name)[name][0])


@pytest.mark.parametrize("name", ["previous_token", "first_token", "entropy", "mean_distance"])
def test_chance_is_uniform_attention(name: str) -> None:
    made = case(h=4, causal=True, pad=(0, 4))
    mask = made.mask
    even = mask / mask.sum(-1, keepdim=True).clamp_min(1)
    view = analyze.View(made.trace[0], made.trace)
    expected = analyze.measure(given(even, mask), name)[name][0]
    assert Chance(analyze.registry.resolve([name])).of(view)[name] == pytest.approx(expected, abs=1e-6)


def test_chance_is_of_each_call_own_mask() -> None:
    trace = given([uniform(4), uniform(9), uniform(9)])
    chance = Chance(analyze.registry.resolve(["first_token"]))
    got = [chance.of(analyze.View(c, trace))["first_token"] for c in trace]
    assert got == pytest.approx([level(uniform(n), "first_token") for n in (4, 9, 9)])


def test_a_share_that_chance_explains_is_no_evidence() -> None:
    role = Role("first token", analyze.FirstToken(), 0.5)
    assert role.evidence({"first_token": 0.6}, {"first_token": 0.25}) == "first_token 0.60 (uniform 0.25)"
    assert role.evidence({"first_token": 0.6}, {"first_token": 0.31}) is None
    assert role.evidence({"first_token": 0.6}, {}) == "first_token 0.60"
    assert role.evidence({"first_token": 0.49}, {}) is None
    assert role.evidence({"first_token": float("nan")}, {}) is None
    assert role.evidence({}, {}) is None
    # Two tokens: uniform attention gives the first a share of 0.75.
    assert "first token" not in set(analyze.report(given(uniform(2))).role)


def test_the_closer_role_stands_for_the_wider() -> None:
    table = analyze.report(given(previous(12)))
    assert table.role.tolist() == ["previous token"]
    scores = {"local_mass(window=2)": 0.9, "previous_token": 0.4, "next_token": 0.4}
    assert [r.name for r, _ in roles_of(scores, {})] == ["neighbours"]


# ------------------------------------------------------------------------------------------------------ command line


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, ["heads", *map(str, args)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def file(causal: hookattn.Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heads") / "run.safetensors"
    causal.save(path)
    return path


def test_the_command(file: Path) -> None:
    made = run(file)
    assert made.exit_code == 0, made.output
    lines = made.stdout.splitlines()
    assert len(lines) == 3 + 8 + 4 and "previous_token 0.96 (uniform 0.07)" in lines[3]
    assert "induction 0.95 (uniform 0.03)" in lines[7] and "first_token 0.52 (uniform 0.09)" in lines[8]
    assert "left out separators, " in made.stderr


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_in_a_narrow_terminal(file: Path, columns: int) -> None:
    made = CliRunner().invoke(app, ["heads", str(file), "--sort", "induction"], env={"COLUMNS": str(columns)})
    lines = [line.rstrip() for line in made.stdout.splitlines()]
    assert max(map(len, lines)) <= columns and "…" not in made.stdout and len(lines) <= 25
    assert lines[2].split()[:3] == ["1", "2", "1.00"] and any("previous token  previous_token" in x for x in lines)


def test_sorted_and_cut(file: Path) -> None:
    table = analyze.report(hookattn.load(file))
    for sort, best in (("induction", table.induction.idxmax()), ("-entropy", table.entropy.idxmin())):
        made = run(file, "--sort", sort, "--top", 3, "--csv")
        rows = pd.read_csv(io.StringIO(made.stdout))
        assert len(rows) == 3
        assert (rows.layer[0], rows["head"][0]) == (table.layer[best], table["head"][best])


def test_every_output_says_the_same(file: Path, tmp_path: Path) -> None:
    table = analyze.report(hookattn.load(file))
    csv, parquet = tmp_path / "h.csv", tmp_path / "h.parquet"
    made = run(file, "--json", "--csv", csv, "--parquet", parquet)
    assert made.exit_code == 0, made.output
    data = json.loads(made.stdout)
    assert [h["role"] for h in data["heads"]] == table.role.tolist()
    assert [h["entropy"] for h in data["heads"]] == table.entropy.tolist()
    for frame in (pd.read_csv(csv, keep_default_na=False), pd.read_parquet(parquet)):
        assert frame.role.tolist() == table.role.tolist()
        assert frame.induction.tolist() == pytest.approx(table.induction.tolist())


def test_the_command_says_what_is_wrong(file: Path, tmp_path: Path) -> None:
    for args, message in (
        ((file, "--sort", "separators"), "--sort separators: it is not defined here"),
        ((file, "--sort", "nope"), "--sort nope: there are entropy, "),
        ((file, "--measures", "nope"), "no measure 'nope'"),
        ((file, "--csv", tmp_path / "no" / "x.csv"), "cannot be written"),
        ((tmp_path / "no.safetensors",), "no.safetensors"),
    ):
        made = run(*args)
        assert made.exit_code == 1 and message in made.stderr, made.output
