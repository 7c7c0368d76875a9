"""The check of the built site's links sees what it has to: `make docs` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.project.site_links import main, problems_of_site

GOOD = {
    "index.html": '<h1 id="a-b">x</h1><a href="#a-b">.</a><a href="part/two.html#c%C3%A4">.</a><a href="part/">.</a>'
    '<a href="https://elsewhere.test/x">.</a><img src="data:image/png;base64,x"><img src="x.png">',
    "part/two.html": '<p id="cä"></p><a href="../index.html">.</a><link rel="stylesheet" href="../x.png">',
    "part/index.html": "",
    "x.png": "",
}


def site(folder: Path, **changed: str) -> Path:
    for name, text in {**GOOD, **changed}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


def test_a_site_whose_links_lead_somewhere(tmp_path: Path) -> None:
    assert problems_of_site(site(tmp_path)) == []
    assert main(str(tmp_path)) == 0


@pytest.mark.parametrize(("html", "message"), [
    ('<a href="three.html">.</a>', "which is not there"),
    ('<a href="part/two.html#ca">.</a>', "no such anchor"),
    ('<a href="#nowhere">.</a>', "no such anchor"),
    ('<a href="../outside.html">.</a>', "which is not there"),
    ('<img src="y.png">', "which is not there"),
    ('<script src="https://cdn.test/x.js"></script>', "fetches https://cdn.test/x.js"),
    ('<link href="//fonts.test/x.css">', "fetches //fonts.test/x.css"),
])  # fmt: skip
def test_what_a_site_must_not_have(tmp_path: Path, html: str, message: str) -> None:
    (tmp_path / "outside.html").write_text("")
    folder = site(tmp_path / "html", **{"index.html": html})
    (problem,) = problems_of_site(folder)
    assert problem.startswith("index.html ") and message in problem
    assert main(str(folder)) == 1


def test_a_folder_without_pages_is_no_site(tmp_path: Path) -> None:
    assert main(str(tmp_path)) == 1
