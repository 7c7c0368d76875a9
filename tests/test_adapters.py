"""The built-in adapters through the checks that everyone else's go through, and what they say of each architecture."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import hookattn_adapters
import pytest
import torch
from torch import Tensor, nn

from hookattn import Adapter
from hookattn.inspection import Plan, make_plan
from hookattn.registry import using
from hookattn.testing import check_adapter

transformers = pytest.importorskip("transformers")

BY_NAME: dict[str, Adapter] = {adapter.name: adapter for adapter in hookattn_adapters.ADAPTERS}
SHARED = BY_NAME["transformers-shared"]
SMALL: dict[str, Any] = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
WORDS: dict[str, Any] = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT: dict[str, Any] = {**SMALL, "vocab_size": 60, "initializer_range": 0.3}
CROSS: dict[str, Any] = {"is_decoder": True, "add_cross_attention": True}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, **WORDS}
LLAMA: dict[str, Any] = {
    **SMALL,
    **WORDS,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "attention_dropout": 0.1,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 60,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 2.0,
}
VIT: dict[str, Any] = {**SMALL, "image_size": 8, "patch_size": 4, "initializer_range": 0.3}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(length: int = 6) -> Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length))


def padded(side: str) -> dict[str, Tensor]:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, slice(4, None) if side == "right" else slice(0, 2)] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def encoded(**more: Any) -> dict[str, Tensor]:
    return {"input_ids": ids(), "encoder_hidden_states": seeded(2, 9, 32), **more}


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Family(NamedTuple):
    """An adapter's name, a model's class and options, inputs, and its sites: stack, kind, path without the layer."""

    adapter: str
    model: str
    options: dict[str, Any]
    inputs: Callable[[], Any]
    sites: tuple[str, ...]

    def build(self, implementation: str) -> nn.Module:
        kind = getattr(transformers, self.model)
        config = kind.config_class(**self.options)
        config._attn_implementation = implementation
        return kind(config).eval()  # type: ignore[no-any-return]

    def plan(self, implementation: str) -> Plan:
        with using(BY_NAME[self.adapter], SHARED):
            return make_plan(self.build(implementation))

    def eager(self, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        """What the model itself returns in eager mode with ``output_attentions``."""
        twin: Any = copy.deepcopy(model)
        twin.set_attn_implementation("eager")
        with torch.no_grad():
            made = twin(**(inputs if isinstance(inputs, dict) else {"input_ids": inputs}), output_attentions=True)
        found = {}
        for stack, kind, path in map(str.split, self.sites):
            own = f"{stack}_attentions" if "encoder_attentions" in made else "attentions"
            weights = made["cross_attentions" if kind == "cross" else own]
            found.update({path.format(i): x for i, x in enumerate(weights)})
        return found


SITES = {
    "bert": ("encoder self encoder.layer.{}.attention.self",),
    "bert-decoder": (
        "decoder self bert.encoder.layer.{}.attention.self",
        "decoder cross bert.encoder.layer.{}.crossattention.self",
    ),
    "gpt2": ("decoder self transformer.h.{}.attn",),
    "gpt2-cross": ("decoder self transformer.h.{}.attn", "decoder cross transformer.h.{}.crossattention"),
    "llama": ("decoder self model.layers.{}.self_attn",),
    "t5": (
        "encoder self encoder.block.{}.layer.0.SelfAttention",
        "decoder self decoder.block.{}.layer.0.SelfAttention",
        "decoder cross decoder.block.{}.layer.1.EncDecAttention",
    ),
    "vit": ("vision self vit.layers.{}.attention",),
}
# fmt: off
FAMILIES = {name: Family(*row, SITES[name]) for name, *row in (
    ("bert", "bert", "BertModel", BERT, lambda: padded("right")),
    ("bert-decoder", "bert", "BertLMHeadModel", {**BERT, **CROSS}, encoded),
    ("gpt2", "gpt2", "GPT2LMHeadModel", GPT2, ids),
    ("gpt2-cross", "gpt2", "GPT2LMHeadModel", {**GPT2, "add_cross_attention": True}, encoded),
    ("llama", "llama", "LlamaForCausalLM", LLAMA, lambda: padded("left")),
    ("t5", "t5", "T5ForConditionalGeneration", T5, lambda: {"input_ids": ids(7), "decoder_input_ids": ids(4)}),
    ("vit", "vit", "ViTForImageClassification", VIT, lambda: {"pixel_values": seeded(2, 3, 8, 8)}),
)}
# fmt: on
EACH = pytest.mark.parametrize("family", list(FAMILIES.values()), ids=list(FAMILIES))
BOTH = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


@BOTH
@EACH
def test_the_adapter_holds_to_the_contract(family: Family, implementation: str) -> None:
    told = check_adapter(
        BY_NAME[family.adapter],
        lambda: family.build(implementation),
        family.inputs,
        beside=[SHARED],
        weights=family.eager,
    )
    reads, writes = family.adapter != "vit", any(site.startswith("decoder") for site in family.sites)
    assert {name for name, said in told.items() if said != "passed"} == {
        "more inputs",
        *(() if reads else ("padding",)),
        *(() if writes else ("cache",)),
    }, told


@BOTH
@EACH
def test_the_sites_have_their_names(family: Family, implementation: str) -> None:
    found = list(family.plan(implementation).sites.values())
    wanted = {(stack, kind, i, path.format(i)) for stack, kind, path in map(str.split, family.sites) for i in range(2)}
    assert {(s.stack, s.kind, s.layer, s.path) for s in found} == wanted
    assert {s.axes for s in found} == {BY_NAME[family.adapter].axes}
    assert {s.layers for s in found} == {2} and len(found) == len(wanted)


@BOTH
@EACH
def test_the_function_mode_stays_closed(family: Family, implementation: str) -> None:
    plan = family.plan(implementation)
    assert plan.watch_all is False
    assert plan.sealed == (set() if implementation == "eager" else set(plan.sites))


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
    told = {family.adapter for family in FAMILIES.values()}
    for path in Path(__file__).parent.rglob("test_*.py"):
        told |= examined(path.read_text())
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
    assert all(len(path.read_text().splitlines()) < 60 for path in folder.glob("*.py"))
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
        plan = make_plan(model.decoder)
    assert [(s.stack, s.kind) for s in plan.sites.values()] == [("decoder", "self"), ("decoder", "cross")] * 2


def test_an_encoder_and_a_decoder_of_one_family() -> None:
    bert = {**SMALL, "vocab_size": 60}
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**bert), transformers.BertConfig(**bert, is_decoder=True, add_cross_attention=True)
    )
    with using(*hookattn_adapters.ADAPTERS):
        plan = make_plan(transformers.EncoderDecoderModel(config=config))
    found = {(s.stack, s.kind) for s in plan.sites.values()}
    assert found == {("encoder", "self"), ("decoder", "self"), ("decoder", "cross")}
    assert plan.watch_all  # the class that joins the two is nobody's


def test_a_class_that_an_adapter_has_not_heard_of_is_watched() -> None:
    class Older(type(BY_NAME["vit"])):  # type: ignore[misc]
        attention = {}

    model = FAMILIES["vit"].build("sdpa")
    with using(Older(), BY_NAME["transformers-shared"]):
        plan = make_plan(model)
    assert plan.watch_all and not plan.sites
    assert [path for path, _ in plan.suspects] == ["vit.layers.0.attention", "vit.layers.1.attention"]


def test_describe_names_what_is_covered() -> None:
    told = BY_NAME["gpt2"].describe()
    assert told == {
        "name": "gpt2",
        "covers": ["transformers.models.gpt2.modeling_gpt2"],
        "attention": {"GPT2Attention": "self"},
    }
