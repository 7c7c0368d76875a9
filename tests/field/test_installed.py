"""A library of the field that is installed can be imported. Its own tests are skipped where it is missing, and so they
are where something that it imports is missing: that is red here."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from tests.field.common import torchvision_stand_in

LISTED = Path(__file__).with_name("libraries.txt").read_text().split()
# What the tests beside this one import, where that is more than the module that is named as the distribution is.
MODULES = {
    "diffusers": "diffusers.models.attention_processor",
    "fair-esm": "esm",
    "open_clip_torch": "open_clip",
    "sentence-transformers": "sentence_transformers.models",
    "torch-geometric": "torch_geometric.nn",
    "torchtune": "torchtune.models.gemma2",
    "transformer-lens": "transformer_lens.model_bridge.sources._bridge_builder",
}


def imported(library: str) -> ModuleType:
    """The module of an installed library.

    Raises:
        metadata.PackageNotFoundError: it is not installed.
        ImportError: it is, and it or something that it imports can't be imported.
    """
    metadata.version(library)
    name = MODULES.get(library, library.replace("-", "_"))
    with torchvision_stand_in():
        return importlib.import_module(name)


@pytest.mark.parametrize("library", LISTED)
def test_an_installed_library_can_be_imported(library: str) -> None:
    try:
        imported(library)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{library} is not installed")


def test_one_that_lacks_what_it_imports_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hookattn_broken").mkdir()
    (tmp_path / "hookattn_broken" / "__init__.py").write_text("import hookattn_broken_needs_this\n")
    about = tmp_path / "hookattn_broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hookattn-broken\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="hookattn_broken_needs_this"):
        imported("hookattn-broken")
    with pytest.raises(metadata.PackageNotFoundError):
        imported("hookattn-not-installed")
