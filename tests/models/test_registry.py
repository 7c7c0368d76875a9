"""Adapters come in through ``register`` and through entry points; whatever is wrong with one is said by name."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import hookattn
from hookattn import Adapter, AdapterError, BrokenAdapterError, DuplicateAdapterError, UnsupportedConfigError
from hookattn.models import moved, registry

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that has read nothing yet, in an environment without the entry points of what is installed."""
    for name, value in (("_adapters", {}), ("_by_module", {}), ("_loaded", False)):
        monkeypatch.setattr(registry, name, value)
    found = registry.entry_points

    def others(group: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in found(group=group) if point.dist is None or point.dist.name != "hookattn"]

    monkeypatch.setattr(registry, "entry_points", others)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution on the path: a module, and the metadata that an installer writes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def make(distribution: str, module: str, source: str, *entries: str) -> None:
        header = "from hookattn import Adapter, UnsupportedConfigError\nfrom torch import nn\nimport torch\n"
        (tmp_path / f"{module}.py").write_text(header + textwrap.dedent(source))
        folder = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = "\n".join(entries or (f"main = {module}:ADAPTERS",))
        (folder / "entry_points.txt").write_text(f"[hookattn.adapters]\n{lines}\n")
        importlib.invalidate_caches()

    yield make
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def one(name: str, *covers: str) -> str:
    """Source of a class A and of ADAPTERS with an instance of it."""
    return f"""
        class A(Adapter):
            name = {name!r}
            covers = {covers!r}

        ADAPTERS = (A(),)
    """


def complaint(kind: type[AdapterError] = BrokenAdapterError) -> str:
    with pytest.raises(kind) as caught:
        hookattn.adapters()
    assert registry._loaded is False, "a later trace has to complain again"
    assert not registry._adapters, "half a registry is left"
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ entry points


def test_an_entry_point_brings_its_adapters(install: Install) -> None:
    install("zeta-models", "zeta_plugin", one("zeta", "zeta_models.modeling"))
    install("alpha-models", "alpha_plugin", one("alpha", "alpha_models"))
    found = hookattn.adapters()
    assert list(found) == ["alpha", "zeta"]
    assert {name: source for name, (_, source) in found.items()} == {"alpha": "alpha-models", "zeta": "zeta-models"}


def test_entry_points_are_read_once_and_not_on_import(install: Install) -> None:
    install("alpha-models", "alpha_plugin", one("alpha", "alpha_models"))
    assert "alpha_plugin" not in sys.modules
    hookattn.adapters()
    first = sys.modules["alpha_plugin"]
    hookattn.adapters()
    assert sys.modules["alpha_plugin"] is first and registry._loaded


def test_a_generator_of_adapters_will_do(install: Install) -> None:
    source = one("alpha", "alpha_models") + "    ADAPTERS = (a for a in (A(),))\n"
    install("alpha-models", "alpha_plugin", source)
    assert list(hookattn.adapters()) == ["alpha"]


@pytest.mark.parametrize(
    ("source", "entry", "said"),
    [
        ("import not_there_at_all", "main = broken_plugin:ADAPTERS", ("ModuleNotFoundError", "not_there_at_all")),
        ("raise RuntimeError('half installed')", "main = broken_plugin:ADAPTERS", ("RuntimeError", "half installed")),
        ("x = (", "main = broken_plugin:ADAPTERS", ("SyntaxError",)),
        ("", "main = broken_plugin:ADAPTERS", ("AttributeError", "ADAPTERS")),
        ("", "main = broken_nowhere:ADAPTERS", ("ModuleNotFoundError", "broken_nowhere")),
        ("ADAPTERS = 7", "main = broken_plugin:ADAPTERS", ("iterable of Adapter instances", "int")),
        ("class A(Adapter):\n    name = 'a'\nADAPTERS = A()", "main = broken_plugin:ADAPTERS", ("iterable", "got A")),
        ("class A(Adapter):\n    name = 'a'", "main = broken_plugin:A", ("iterable of Adapter instances",)),
        ("ADAPTERS = (1 // 0 for _ in 'x')", "main = broken_plugin:ADAPTERS", ("ZeroDivisionError", "read")),
    ],
    ids=["import", "raises", "syntax", "attribute", "module", "number", "bare-instance", "bare-class", "iterating"],
)
def test_a_broken_entry_point_names_its_distribution(
    install: Install, source: str, entry: str, said: tuple[str, ...]
) -> None:
    install("broken-models", "broken_plugin", source, entry)
    told = complaint()
    assert "'broken-models'" in told and "'main'" in told
    for word in said:
        assert word in told


@pytest.mark.parametrize(
    ("source", "old", "new"),
    [
        ("from hookattn.adapter import Adapter", "hookattn.adapter", "hookattn.models.adapter"),
        ("import hookattn.site", "hookattn.site", "hookattn.calls.site"),
        ("from hookattn import registry", "hookattn.registry", "hookattn.models.registry"),
        ("from hookattn.kernels.rows import strides", "hookattn.kernels", "hookattn.attention.kernels"),
        ("from hookattn.analyze.words import words", "hookattn.analyze.words", "hookattn.tokens.words"),
        ("from hookattn.render import tokens", "hookattn.render.tokens", "hookattn.tokens.display"),
        ("import hookattn\nhookattn.byte_level.decoded", "hookattn.byte_level", "hookattn.tokens.byte_level"),
        ("from hookattn.planning import observe", "hookattn.planning", "hookattn.planning.plan"),
        (
            "try:\n    import hookattn.record\nexcept ImportError as error:\n    raise RuntimeError('old') from error",
            "hookattn.record",
            "hookattn.attention.kernel_call",
        ),
    ],
)
def test_a_module_that_moved_is_named_with_its_new_place(install: Install, source: str, old: str, new: str) -> None:
    install("broken-models", "broken_plugin", source)
    told = complaint()
    assert "'broken-models'" in told and "Mend or uninstall" in told
    assert re.search(rf"(?<![\w.]){re.escape(old)} is [\w ;,]*(?:{re.escape(new)})", told), told
    assert "from hookattn import Adapter, Site" in told


def test_a_module_that_moved_is_named_where_adapters_are_made_late(install: Install) -> None:
    source = "def made():\n    from hookattn.adapter import Adapter\n    yield Adapter()\nADAPTERS = made()"
    install("broken-models", "broken_plugin", source)
    assert "hookattn.adapter is hookattn.models.adapter now" in complaint()


@pytest.mark.parametrize(
    "source",
    ["import hookattn.nothing", "from hookattn import nothing", "import not_hookattn.adapter", "import adapter_"],
)
def test_nothing_is_said_of_what_did_not_move(install: Install, source: str) -> None:
    install("broken-models", "broken_plugin", source)
    assert " now." not in complaint()


def test_modules_moved_to_where_they_are() -> None:
    for old, new in (moved.MOVED | moved.BECAME_PACKAGES).items():
        assert importlib.util.find_spec(new) is not None, f"{new}, where {old} is said to be, is not there"
    for old in moved.MOVED:
        parent, _, name = old.rpartition(".")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(old)
        assert name not in vars(importlib.import_module("hookattn")) or parent != "hookattn" or name in hookattn.__all__
    version = tuple(map(int, hookattn.__version__.split(".")[:2]))
    assert version < tuple(map(int, moved.GOES_IN.split("."))), "hookattn/models/moved.py goes with this version"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class A(Adapter):\n    name = 'a'\n    covers = ('m',)\nADAPTERS = (A,)", "(a class: register an instance)"),
        ("ADAPTERS = ('bert',)", "expected an Adapter instance, got 'bert'"),
        ("ADAPTERS = {'a': 1}", "expected an Adapter instance, got 'a'"),
        ("class A(Adapter):\n    covers = ('m',)\nADAPTERS = (A(),)", "has no name"),
        ("class A(Adapter):\n    name = 7\n    covers = ('m',)\nADAPTERS = (A(),)", "has no name"),
        ("class A(Adapter):\n    name = 'a'\nADAPTERS = (A(),)", "got ()"),
        ("class A(Adapter):\n    name = 'a'\n    covers = 'my.module'\nADAPTERS = (A(),)", "got 'my.module'"),
    ],
    ids=["class", "string", "mapping", "no-name", "number-name", "covers-nothing", "covers-a-string"],
)
def test_what_is_no_adapter_names_its_distribution(install: Install, source: str, said: str) -> None:
    install("broken-models", "broken_plugin", source)
    told = complaint()
    assert "distribution 'broken-models'" in told and said in told


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (("same", "a_models"), ("same", "b_models"), "the name 'same'"),
        (("a", "their_models"), ("b", "their_models"), "the module 'their_models'"),
        (("a", "their_models"), ("b", "their_models.bert"), "the module 'their_models.bert'"),
        (("a", "their_models.bert"), ("b", "their_models"), "the module 'their_models'"),
    ],
    ids=["name", "module", "below", "above"],
)
def test_duplicates_name_both_distributions(
    install: Install, first: tuple[str, str], second: tuple[str, str], said: str
) -> None:
    install("first-models", "first_plugin", one(*first))
    install("second-models", "second_plugin", one(*second))
    told = complaint(DuplicateAdapterError)
    assert "'first-models'" in told and "'second-models'" in told and said in told


def test_module_names_with_a_common_beginning_are_no_duplicates(install: Install) -> None:
    install("first-models", "first_plugin", one("a", "models.bert"))
    install("second-models", "second_plugin", one("b", "models.bert_generation"))
    assert list(hookattn.adapters()) == ["a", "b"]


def test_a_broken_plug_in_stops_a_trace_and_leaves_the_model_clean(install: Install) -> None:
    install("broken-models", "broken_plugin", "import not_there_at_all")
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 3, 8)
    with pytest.raises(BrokenAdapterError, match="broken-models"):
        hookattn.trace(model, (x, x, x))
    assert not model._forward_hooks and not model._forward_pre_hooks


# ---------------------------------------------------------------------------------------------------- register


class Mine(Adapter):
    name = "mine"
    covers = ("my_models",)


class Other(Adapter):
    name = "other"
    covers = ("my_models.vision",)


def test_register_and_unregister() -> None:
    mine = Mine()
    assert hookattn.register(mine) is mine
    assert hookattn.adapters()["mine"] == (mine, "register()")
    registry.unregister("mine")
    registry.unregister("never there")
    assert "mine" not in hookattn.adapters()


def test_what_is_installed_cannot_be_unregistered(install: Install) -> None:
    install("alpha-models", "alpha_plugin", one("alpha", "alpha_models"))
    hookattn.adapters()
    registry.unregister("alpha")
    assert "alpha" in hookattn.adapters()


def test_registering_twice_is_refused() -> None:
    hookattn.register(Mine())
    with pytest.raises(DuplicateAdapterError, match=r"register\(\): the name 'mine' is already claimed"):
        hookattn.register(Mine())
    with pytest.raises(DuplicateAdapterError, match=r"the module 'my_models.vision' .* adapter 'mine' of register\(\)"):
        hookattn.register(Other())
    assert list(hookattn.adapters()) == ["mine"]


def test_registering_what_is_installed_names_the_distribution(install: Install) -> None:
    install("alpha-models", "alpha_plugin", one("mine", "alpha_models"))
    with pytest.raises(DuplicateAdapterError, match="distribution 'alpha-models'"):
        hookattn.register(Mine())


@pytest.mark.parametrize("thing", [Mine, None, "mine", 3])
def test_registering_something_else_is_refused(thing: object) -> None:
    with pytest.raises(BrokenAdapterError, match=r"register\(\): expected an Adapter instance"):
        hookattn.register(thing)  # type: ignore[arg-type]


def test_using_puts_everything_back(install: Install) -> None:
    install("alpha-models", "alpha_plugin", one("alpha", "alpha_models"))
    hookattn.register(Mine())
    with registry.using(Other()):
        assert list(hookattn.adapters()) == ["other"]
    with pytest.raises(DuplicateAdapterError), registry.using(Mine(), Other()):
        raise AssertionError("not reached")
    assert list(hookattn.adapters()) == ["alpha", "mine"]


# -------------------------------------------------------------------------------------------------- end to end

MODELS = """
    class Att(nn.Module):
        def __init__(self, gate=False):
            super().__init__()
            self.qkv, self.gate = nn.Linear(8, 24), gate

        def forward(self, x):
            q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    class Tower(nn.Module):
        def __init__(self, gate=False):
            super().__init__()
            self.rows = nn.ModuleList([Att(gate) for _ in range(2)])

        def forward(self, x):
            for row in self.rows:
                x = x + row(x)
            return x

    class Towers(Adapter):
        name = "towers"
        covers = (__name__,)
        attention = {"Att": "pair"}
        stack = "tower"
        axes = "residues"

        def check(self, module):
            if module.gate:
                raise UnsupportedConfigError(f"gate={module.gate}: the towers adapter does not know gated attention.")

    ADAPTERS = [Towers()]
"""


def test_a_third_party_adapter_works_from_installation_to_trace(install: Install) -> None:
    install("tower-models", "tower_models", MODELS)
    models = importlib.import_module("tower_models")
    made = hookattn.trace(models.Tower(), torch.randn(1, 5, 8))
    assert [(c.site.path, c.site.layer, c.site.layers) for c in made] == [("rows.0", 0, 2), ("rows.1", 1, 2)]
    assert {(c.site.stack, c.site.kind, c.site.axes, c.site.module) for c in made} == {
        ("tower", "pair", "residues", "Att")
    }
    assert made.faithful and made.select(stack="tower", layer=-1)[0].site.path == "rows.1"


def test_an_adapter_refuses_what_it_does_not_know(install: Install) -> None:
    install("tower-models", "tower_models", MODELS)
    model = importlib.import_module("tower_models").Tower(gate=True)
    with pytest.raises(UnsupportedConfigError, match="gate=True"):
        hookattn.trace(model, torch.randn(1, 5, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
