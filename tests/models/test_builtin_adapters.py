"""The built-in adapters through the checks that everyone else's go through, and what they say of each architecture."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hookattn_adapters
import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import Adapter
from hookattn.models.discovery import make_watch_plan
from hookattn.models.registry import using
from hookattn.testing import check_adapter
from hookattn.testing.case import same

transformers = pytest.importorskip("transformers")

from tests.families import ALIKE, BY_NAME, FAMILIES, SHARED, SMALL, Family, ids, left, seeded  # noqa: E402
from tests.sweep.weights import draw  # noqa: E402

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def copies(family: Family, implementation: str) -> Callable[[], nn.Module]:
    """Makes the same model again and again, built once."""
    return functools.partial(copy.deepcopy, family.build(implementation))


def cases(families: dict[str, Family]) -> pytest.MarkDecorator:
    """Each family in each implementation that it has."""
    rows = [pytest.param(f, i, id=f"{name}-{i}") for name, f in families.items() for i in f.implementations]
    return pytest.mark.parametrize(("family", "implementation"), rows)


# What can be wrong where the arithmetic is that of another family.
CHEAP = ("sites", "layers", "covered", "far from uniform", "invariants", "nothing missing", "as without the adapter")


@cases(FAMILIES)
def test_the_adapter_holds_to_the_contract(family: Family, implementation: str) -> None:
    apart = family.options.get("alibi") and implementation == "sdpa"  # in eager, Falcon adds its ALiBi twice
    told = check_adapter(
        BY_NAME[family.adapter],
        copies(family, implementation),
        family.inputs,
        beside=[SHARED],
        weights=None if apart else family.eager,
    )
    given = family.inputs()
    reads = isinstance(given, Tensor) or "input_ids" in given
    writes = any(stack == "decoder" for stack, *_ in family.said())
    assert {name for name, said in told.items() if said != "passed"} == {
        "more inputs",
        *(("weights",) if apart else ()),
        *(() if reads else ("padding",)),
        *(() if writes else ("cache",)),
    }, told


@cases(ALIKE)
def test_what_is_like_another_family(family: Family, implementation: str) -> None:
    first = implementation == family.implementations[0]
    check_adapter(
        BY_NAME[family.adapter],
        copies(family, implementation),
        family.inputs,
        beside=[SHARED],
        weights=family.eager,
        only=(*CHEAP, "weights") if first else ("invariants", "weights"),
    )


@cases(FAMILIES | ALIKE)
def test_the_sites_have_their_names(family: Family, implementation: str) -> None:
    plan = family.plan(implementation)
    found = list(plan.sites.values())
    wanted = {(stack, kind, i, path.format(i), axes) for stack, kind, path, axes in family.said() for i in range(2)}
    assert {(s.stack, s.kind, s.layer, s.path, s.axes) for s in found} == wanted
    assert {s.layers for s in found} == {2} and len(found) == len(wanted)
    assert plan.watch_all is False
    looked_up = implementation == "sdpa" and family.adapter != "falcon"  # which calls the kernel itself
    assert plan.sealed == (set(plan.sites) if looked_up else set())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_swin_is_numbered_through_its_stages(implementation: str) -> None:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4]
    )
    config._attn_implementation = implementation

    def build() -> nn.Module:
        model = transformers.SwinModel(config).eval()
        draw(model)
        return model

    def last_of_each_stage(model: Any, inputs: Any) -> dict[str, Tensor]:
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("eager")
        made = twin(**inputs, output_attentions=True).attentions
        return {f"encoder.layers.{i}.blocks.1.attention": x.detach() for i, x in enumerate(made)}

    def pixels() -> dict[str, Tensor]:
        return {"pixel_values": seeded(2, 3, 16, 16)}

    check_adapter(BY_NAME["swin"], build, pixels, beside=[SHARED], weights=last_of_each_stage)
    with using(BY_NAME["swin"], SHARED):
        sites = list(make_watch_plan(build()).sites.values())
    assert [(s.layer, s.layers, s.stack, s.axes) for s in sites] == [(i, 4, "vision", "windows") for i in range(4)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_siglip_pools_with_a_query_of_its_own(implementation: str) -> None:
    towers = Family("siglip", "siglip", {}, lambda: {"input_ids": ids(), "pixel_values": seeded(2, 3, 32, 32)}, ())
    make = copies(towers, implementation)
    check_adapter(BY_NAME["siglip"], make, towers.inputs, beside=[SHARED])
    told = [(s.stack, s.kind, s.layer, s.layers, s.axes) for s in towers.plan(implementation).sites.values()]
    assert told == [
        *(("text", "self", i, 2, "tokens") for i in range(2)),
        *(("vision", "self", i, 2, "patches") for i in range(2)),
        ("vision", "cross", 0, 1, "patches"),
    ]


def test_the_nan_that_falcon_makes_of_padding_is_shown_as_it_is() -> None:
    family = FAMILIES["falcon"]
    model: Any = family.build("eager").half()
    with torch.no_grad():
        own = model(**left(), output_attentions=True)
        with using(BY_NAME["falcon"], SHARED), pytest.warns(hookattn.UnfaithfulWarning, match=r"h\.1\.self_attention"):
            trace = hookattn.trace(model, left(), verify="full").certify()
    assert same(own[0], trace.output[0]) and own[0].isnan()[1].all() and not own[0].isnan()[0].any()
    first, second = trace
    for call, weights in zip(trace, own.attentions, strict=True):
        assert same(call.weights, weights) and not weights[0].isnan().any()
    lost = first.weights.isnan().any(-1)  # in the first layer rows that have nothing to attend to, and no others
    assert lost.any() and not (lost & first.mask.any(-1)).any() and (first.empty_rows | ~lost).all()
    assert first.certificate.faithful
    assert second.k.isnan()[1].any() and second.weights[1].isnan().all()  # which are keys of the next one
    assert not second.certificate.faithful and second.certificate.max_error != second.certificate.max_error
    expected = (second.scores[:1].double() + torch.zeros(6, 6).masked_fill(~second.mask[0, 0], -torch.inf)).softmax(-1)
    assert (second.weights[:1] - expected).abs().max() < 6e-3


def test_clip_has_two_towers() -> None:
    towers = Family("clip", "clip", {}, ids, ())
    told = [(s.stack, s.layer, s.axes) for s in towers.plan("sdpa").sites.values()]
    assert told == [(stack, i, axes) for stack, axes in (("text", "tokens"), ("vision", "patches")) for i in range(2)]


def test_albert_layers_inside_a_group_are_numbered() -> None:
    deeper = Family("albert", "albert", {"num_hidden_groups": 2, "inner_group_num": 2}, ids, ())
    assert [(s.layer, s.layers) for s in deeper.plan("sdpa").sites.values()] == [(i, 4) for i in range(4)]


def examined(source: str) -> set[str]:
    """The adapters that a test file hands to ``check_adapter`` or to a contract, by name or class name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("check_adapter") and node.args:
            given: ast.AST = node.args[0]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if not any(isinstance(t, ast.Name) and t.id == "adapter" for t in targets):
                continue
            given = node.value
        else:
            continue
        if isinstance(given, ast.Call):
            found.add(ast.unparse(given.func).split(".")[-1])
        elif isinstance(given, ast.Subscript) and isinstance(given.slice, ast.Constant):
            found.add(str(given.slice.value))
    return found


def without_a_case(adapters: Iterable[Adapter]) -> list[str]:
    """Those neither in the table above nor in a test file of their own that runs the checks."""
    told = {family.adapter for family in (FAMILIES | ALIKE).values()}
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        source = path.read_text()
        if "check_adapter" in source or "AdapterContract" in source:
            told |= examined(source)
    return [a.name for a in adapters if a.attention and not {a.name, type(a).__name__} & told]


def test_every_adapter_has_a_case() -> None:
    without = without_a_case(hookattn_adapters.ADAPTERS)
    assert not without, f"no line in FAMILIES and no check_adapter or contract in tests/ for {without}"

    class NobodysYet(Adapter):
        name = "nobodys-yet"
        attention = {"Att": "self"}

    assert without_a_case([*hookattn_adapters.ADAPTERS, NobodysYet()]) == ["nobodys-yet"]


def test_a_case_is_found_wherever_it_is_written() -> None:
    assert examined("check_adapter(Mine(), f, g)") == {"Mine"}
    assert examined("hookattn.testing.check_adapter(pack.Mine(x=1), f, g)") == {"Mine"}
    assert examined("check_adapter(BY_NAME['mine'], f, g)") == {"mine"}
    assert examined("class T(AdapterContract):\n    adapter = Mine()") == {"Mine"}
    assert examined("class T(AdapterContract):\n    adapter: ClassVar[Adapter] = BY_NAME['mine']") == {"mine"}
    assert examined("Mine(); adapters = Mine(); check_adapter") == set()


def test_the_pack_is_sorted_complete_and_free_of_clashes() -> None:
    folder = Path(hookattn_adapters.__file__).parent
    files = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert files == [type(adapter).__module__.split(".")[-1] for adapter in hookattn_adapters.ADAPTERS]
    assert all(len((folder / f"{name}.py").read_text().splitlines()) < 60 for name in files)
    with using(*hookattn_adapters.ADAPTERS):
        pass


def test_adapters_import_neither_transformers_nor_private_parts() -> None:
    for path in Path(hookattn_adapters.__file__).parent.glob("*.py"):
        source = path.read_text()
        assert "import transformers" not in source and "from transformers" not in source
        assert "from hookattn." not in source and "import hookattn." not in source


def test_a_part_of_a_model_has_the_same_names() -> None:
    model: Any = FAMILIES["t5"].build("sdpa")
    with using(*hookattn_adapters.ADAPTERS):
        plan = make_watch_plan(model.decoder)
    assert [(s.stack, s.kind) for s in plan.sites.values()] == [("decoder", "self"), ("decoder", "cross")] * 2


def test_an_encoder_and_a_decoder_of_one_family() -> None:
    bert = {**SMALL, "vocab_size": 60}
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**bert), transformers.BertConfig(**bert, is_decoder=True, add_cross_attention=True)
    )
    with using(*hookattn_adapters.ADAPTERS):
        plan = make_watch_plan(transformers.EncoderDecoderModel(config=config))
    found = {(s.stack, s.kind) for s in plan.sites.values()}
    assert found == {("encoder", "self"), ("decoder", "self"), ("decoder", "cross")}
    assert plan.watch_all  # the class that joins the two is nobody's


def test_a_class_that_an_adapter_has_not_heard_of_is_watched() -> None:
    class Older(type(BY_NAME["vit"])):  # type: ignore[misc]
        attention = {}

    model = FAMILIES["vit"].build("sdpa")
    with using(Older(), BY_NAME["transformers-shared"]):
        plan = make_watch_plan(model)
    assert plan.watch_all and not plan.sites
    assert [path for path, _ in plan.suspects] == ["vit.layers.0.attention", "vit.layers.1.attention"]


def test_describe_names_what_is_covered() -> None:
    told = BY_NAME["gpt2"].describe()
    assert told == {
        "name": "gpt2",
        "covers": ["transformers.models.gpt2.modeling_gpt2"],
        "attention": {"GPT2Attention": "self"},
    }
