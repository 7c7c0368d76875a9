"""``hookattn ablate``: the numbers of the library, whatever ends it, and every way to hold it wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("rich")

from hookattn.analyze import head_ablation, log_probability
from hookattn.analyze.causal import ablation as ablating
from hookattn.demo.induction import example_tokens, load_pretrained
from tests.cli.test_commands import in_models, models, quiet, run

__all__ = ["models", "quiet"]

MODULE = """
import torch
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.demo.induction import InductionTransformer

def build(): return load_pretrained(), example_tokens(0)[:, :-1]
def alone(): return load_pretrained()
class Sum(InductionTransformer):
    def forward(self, x): return {"sum": super().forward(x).sum()}
def sums(): return Sum().eval(), example_tokens(0)
def last(y): return y[:, -1, 7].mean()
def vector(y): return y[0, -1]
def fails(y): raise KeyError("no luck")
number = 3
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = f"ablated_{tmp_path.name}".replace("-", "_")  # a module is imported once
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Path(name)


def wanted(**options: Any) -> pd.DataFrame:
    x = example_tokens(0)[:, :-1]
    model = load_pretrained()
    with torch.no_grad():
        token = int(model(x)[0, -1].argmax())
    assert token == int(example_tokens(0)[0, -1]), "the model copies"
    return head_ablation(model, x, log_probability(token), **options)


def test_the_heads_are_ranked_by_what_they_do_to_the_next_token(made: Path) -> None:
    found = json.loads(run("ablate", f"{made}:build", "--json").stdout)
    table = wanted()
    assert found["plain"] == pytest.approx(table.attrs["plain"], abs=1e-6)
    effects = {(row["layer"], row["head"]): row["effect"] for row in found["heads"]}
    assert effects == pytest.approx({(r.layer, r.head): r.effect for r in table.itertuples()}, abs=1e-5)
    sizes = [abs(row["effect"]) for row in found["heads"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 3
    assert (found["by"], found["file"]) == ("zero", None)
    lines = run("ablate", f"{made}:build", "--top", "3").stdout.splitlines()
    assert lines[0].startswith("log-probability of ") and len(lines) == 2 + 3
    assert lines[2].split()[:2] == [str(found["heads"][0]["layer"]), str(found["heads"][0]["head"])]


@pytest.mark.parametrize("options", [{"by": "mean"}, {"by": "resample", "seed": 4}, {"layers": [-1], "heads": [0, 2]}])
def test_the_options_are_those_of_the_library(made: Path, options: dict[str, Any]) -> None:
    given = [
        word
        for name, value in options.items()
        for word in (f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value))
    ]
    found = json.loads(run("ablate", f"{made}:build", "--json", "--batch", "1", *given).stdout)["heads"]
    table = wanted(batch=1, **options)
    assert {(r["layer"], r["head"]): r["value"] for r in found} == pytest.approx(
        {(r.layer, r.head): r.value for r in table.itertuples()}, abs=1e-5
    )


def test_a_metric_and_a_target_of_ones_own(made: Path) -> None:
    found = json.loads(run("ablate", f"{made}:build", "--json", "--metric", f"{made}:last").stdout)
    table = head_ablation(load_pretrained(), example_tokens(0)[:, :-1], lambda y: y[:, -1, 7].mean())
    assert found["plain"] == pytest.approx(table.attrs["plain"], abs=1e-5) and found["metric"] == f"{made}:last"
    found = json.loads(run("ablate", f"{made}:build", "--json", "--target", "7").stdout)
    table = head_ablation(load_pretrained(), example_tokens(0)[:, :-1], log_probability(7))
    assert found["plain"] == pytest.approx(table.attrs["plain"], abs=1e-5)


def test_texts_end_where_their_padding_begins(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_models(monkeypatch, models)
    several = json.loads(run("ablate", "gpt", "--text", "the cat sat on the mat", "--text", "the cat", "--json").stdout)
    single = [
        json.loads(run("ablate", "gpt", "--text", text, "--json").stdout)
        for text in ("the cat sat on the mat", "the cat")
    ]
    assert several["plain"] == pytest.approx(sum(x["plain"] for x in single) / 2, abs=1e-5)
    found = json.loads(run("ablate", "gpt", "--text", "the cat", "--target", "mat", "--json").stdout)
    assert found["metric"] == "log-probability of 'mat'"


@pytest.mark.parametrize("name", ["heads.parquet", "heads.csv"])
def test_killed_it_goes_on_where_it_stopped(made: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("ablate", f"{made}:build", "-o", name)
    runs: list[int] = []
    plain = ablating.Ablation._without

    def counted(self: Any, i: int, head: int) -> Any:
        runs.append(i)
        if len(runs) > 4 and stops:
            raise KeyboardInterrupt
        return plain(self, i, head)

    stops = True
    monkeypatch.setattr(ablating.Ablation, "_without", counted)
    stopped = run(*arguments, code=1)
    assert "stopped after 4 of 8 heads; the same command goes on from there" in stopped.stderr
    assert not Path(name).exists() and len(list(Path(f"{name}.parts").glob("*.parquet"))) == 1
    other = run(*arguments, "--by", "mean", code=1)
    assert "of another ablation (other by" in other.stderr
    stops = False
    runs.clear()
    assert f"wrote {name}" in run(*arguments).stdout
    assert runs == [1] * 4, "the first layer was done"
    table = pd.read_csv(name) if name.endswith("csv") else pd.read_parquet(name)
    assert not Path(f"{name}.parts").exists()
    assert list(table.columns) == [*"call step layer stack kind path head value effect".split()]
    assert table["effect"].tolist() == pytest.approx(wanted()["effect"].tolist(), abs=1e-5)
    runs.clear()
    if name.endswith("csv"):
        assert "it is there already" in run(*arguments, code=1).stderr
    else:
        assert len(json.loads(run(*arguments, "--json").stdout)["heads"]) == 8
    assert not runs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{}:build", "--metric", "{}:nothing"], "has no 'nothing'"),
        (["{}:build", "--metric", "no_such_module:f"], "there is no module 'no_such_module'"),
        (["{}:build", "--metric", "{}:number"], "expected a function"),
        (["{}:build", "--metric", "{}:vector"], "scalar"),
        (["{}:build", "--metric", "{}:fails"], "failed: KeyError"),
        (["{}:build", "--target", "999"], "the id of a token, from 0 to 127"),
        (["{}:build", "--target", " cat"], "the id of a token"),
        (["{}:build", "--layers", "9"], "no layer 9"),
        (["{}:build", "--heads", "4"], "no 4"),
        (["{}:build", "--by", "resample", "--over", "batch"], "there is one"),
        (["{}:alone"], "gives no inputs"),
        (["{}:sums"], "logits"),
        (["{}:build", "-o", "no/such/folder.parquet"], "does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_line(made: Path, arguments: list[str], said: str) -> None:
    result = run("ablate", *(a.format(made) for a in arguments), code=1)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0], result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    "arguments",
    [["gpt"], ["gpt", "--text", "a", "--inputs", "b"], ["gpt", "--text", "a", "--metric", "loss"],
     ["gpt", "--text", "a", "--metric", "m:f", "--target", "a"], ["gpt", "--text", "a", "--by", "noise"]],
)  # fmt: skip
def test_wrong_options_exit_with_2(arguments: list[str]) -> None:
    run("ablate", *arguments, code=2)
