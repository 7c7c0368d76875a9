"""The atlas: each square has the number of its head, whatever the table looks like."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hookattn
from hookattn import analyze, render
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.errors import HookattnError, RenderError, SelectionError
from hookattn.render.palette import GRID, ROLES

matplotlib = pytest.importorskip("matplotlib")


def table_of(layers: int = 3, heads: int = 5, **more: object) -> pd.DataFrame:
    rows = [(n, h) for n in range(layers) for h in range(heads)]
    made = pd.DataFrame(rows, columns=["layer", "head"])
    made["entropy"], made["sink"] = made["layer"] + made["head"] / 10, made["head"] / 8
    made.attrs["units"] = {"entropy": "nats", "sink": "share"}
    return made.assign(**more) if more else made


def images(figure: object) -> dict[str, object]:
    return {i.get_gid(): i for axes in figure.axes for i in axes.images}  # type: ignore[attr-defined]


def test_each_square_has_the_number_of_its_head() -> None:
    trace = hookattn.trace(load_pretrained(), example_tokens(0))
    table = analyze.measure(trace, ["entropy", "previous_token"])
    found = images(render.atlas(table.sample(frac=1, random_state=0), title="demo"))
    assert set(found) == {"atlas-entropy", "atlas-previous_token"}
    for name in ("entropy", "previous_token"):
        np.testing.assert_array_equal(found[f"atlas-{name}"].get_array(), table[name].to_numpy().reshape(2, 4))


def test_the_colours_end_where_the_measure_does() -> None:
    table = table_of()
    found = images(render.atlas(table))
    assert found["atlas-sink"].get_clim() == (0, 1) and found["atlas-entropy"].get_clim() == (0, 2.4)
    found = images(render.atlas(table, "entropy", largest={"entropy": 9}))
    assert set(found) == {"atlas-entropy"} and found["atlas-entropy"].get_clim() == (0, 9)
    table["distance_correlation"] = -0.5
    table.attrs["units"]["distance_correlation"] = "correlation"
    assert images(render.atlas(table))["atlas-distance_correlation"].get_clim() == (-1, 1)


def test_what_is_not_there_is_not_coloured() -> None:
    table = table_of().drop(index=[1])
    table.loc[3, "sink"] = np.nan
    array = images(render.atlas(table))["atlas-sink"].get_array()
    assert array.mask.sum() == 2 and array.mask[0, 1] and array.mask[0, 3]


def test_layers_of_several_stacks_have_rows_of_their_own() -> None:
    both = pd.concat([table_of(stack="encoder", kind="self"), table_of(stack="decoder", kind="cross")])
    figure = render.atlas(both, "sink")
    assert images(figure)["atlas-sink"].get_array().shape == (6, 5)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"{where} {n}" for where in ("encoder self", "decoder cross") for n in range(3)]


def test_a_layer_without_a_number_is_called_by_its_path() -> None:
    made = pd.DataFrame({"layer": [None, None], "head": [0, 0], "path": ["a.attn", "b.attn"], "sink": [0.1, 0.2]})
    labels = [label.get_text() for label in render.atlas(made).axes[0].get_yticklabels()]
    assert labels == ["a.attn", "b.attn"]


def test_the_largest_models_are_drawn(tmp_path: object) -> None:
    figure = render.atlas(table_of(126, 128))
    width, height = figure.get_size_inches()
    assert width < 10 and height < 6 and images(figure)["atlas-sink"].get_array().shape == (126, 128)


@pytest.mark.parametrize(
    ("table", "options", "error", "said"),
    [
        (3, {}, RenderError, "expected a table"),
        (pd.DataFrame({"a": [1]}), {}, RenderError, "got one of a"),
        (table_of().iloc[:0], {}, RenderError, "no heads"),
        (table_of(), {"measures": "sinks"}, RenderError, "no column 'sinks'; it has entropy, sink"),
        (table_of(), {"measures": []}, RenderError, "no measure"),
        (pd.concat([table_of(), table_of()]), {}, RenderError, "expected one row for each layer and head"),
        (table_of(), {"largest": {"sink": 0}}, SelectionError, "largest['sink']=0"),
        (table_of(), {"largest": 3}, HookattnError, "largest=3"),
        (table_of(), {"title": 3}, HookattnError, "title=3"),
        (table_of().assign(sink="x"), {"measures": "sink"}, RenderError, "sink has no numbers"),
        (table_of().assign(head=-1), {}, RenderError, "head"),
    ],
)
def test_what_cannot_be_drawn_is_told(table: object, options: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        render.atlas(table, **options)
    assert said in str(caught.value)


def test_roles_have_the_hue_of_the_viewer_and_the_strength_of_their_score() -> None:
    trace = hookattn.trace(load_pretrained(), example_tokens(0))
    table = analyze.report(trace)
    figure = render.atlas(trace)
    array = images(figure)["atlas-role"].get_array()
    for row in table.itertuples():
        seen = array[row.layer, row.head, :3]
        if not row.role:
            assert matplotlib.colors.to_hex(seen) == GRID
            continue
        role = row.role.split("; ")[0]
        score = float(row.evidence.split("; ")[0].split()[1])
        np.testing.assert_allclose(seen, 1 - score * (1 - np.array(matplotlib.colors.to_rgb(ROLES[role]))), atol=1e-6)
    said = {t.get_text() for t in figure.texts}
    roles = table["role"].str.split("; ").explode()
    assert {f"{role}  {n}" for role, n in roles[roles != ""].value_counts().items()} < said
    assert f"no clear role  {(table['role'] == '').sum()}" in said
    assert set(images(render.atlas(table))) == {"atlas-role"}
    assert set(images(render.atlas(trace, "entropy"))) == {"atlas-entropy"}
    with pytest.raises(RenderError, match="roles have no largest"):
        render.atlas(trace, largest={"entropy": 2})


def test_the_hues_of_roles_are_the_viewer_s() -> None:
    source = Path(render.__file__).parent / "viewer" / "src"
    hues = dict(
        re.findall(r"--r(\d+): (#\w+)", (source / "ui" / "style.css").read_text("utf-8").partition("@media")[0])[:11]
    )
    names = re.search(r"export const ALL[^=]*= \[(.*?)\]", (source / "data" / "roles.ts").read_text("utf-8"), re.DOTALL)
    assert names
    found = {name: hues[str(n)] for n, name in enumerate(re.findall(r'"([^"]+)"', names[1]))}
    assert found == ROLES and {role.name for role in analyze.ROLES} == {*ROLES}
