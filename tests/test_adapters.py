"""The built-in adapters through the suite that everyone else's go through, and what they say of each architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hookattn_adapters
import pytest
import torch
from torch import nn

from hookattn import Adapter
from hookattn.hooks import make_plan
from hookattn.registry import using
from hookattn.testing import AdapterContract

transformers = pytest.importorskip("transformers")

BY_NAME: dict[str, Adapter] = {adapter.name: adapter for adapter in hookattn_adapters.ADAPTERS}
SMALL: dict[str, Any] = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
WORDS: dict[str, Any] = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids(length: int = 6) -> torch.Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length))


def built(kind: type[nn.Module], config: Any, implementation: str) -> nn.Module:
    config._attn_implementation = implementation
    return kind(config).eval()


class Contract(AdapterContract):
    """One family: the adapter, the shared helper modules, sdpa."""

    beside = (BY_NAME["transformers-shared"],)
    implementation = "sdpa"
    sites: tuple[tuple[str, str, int, str], ...] = ()  # stack, kind, layer, path

    def test_the_sites_have_their_names(self) -> None:
        found = list(self._plan()[1].sites.values())
        assert tuple((s.stack, s.kind, s.layer, s.path) for s in found) == self.sites
        assert {s.axes for s in found} == {self.adapter.axes}
        assert {s.layers for s in found} == {2}

    def test_the_function_mode_stays_closed(self) -> None:
        plan = self._plan()[1]
        assert plan.watch_all is False
        fused = self.implementation != "eager"
        assert plan.sealed == (set(plan.sites) if fused else set())


class TestBert(Contract):
    adapter = BY_NAME["bert"]
    sites = tuple(("encoder", "self", i, f"encoder.layer.{i}.attention.self") for i in range(2))

    def model(self) -> nn.Module:
        config = transformers.BertConfig(**SMALL, vocab_size=60, initializer_range=0.3)
        return built(transformers.BertModel, config, self.implementation)

    def inputs(self) -> Any:
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, 4:] = 0
        return {"input_ids": ids(), "attention_mask": mask}


class TestBertEager(TestBert):
    implementation = "eager"


class TestBertDecoder(Contract):
    adapter = BY_NAME["bert"]
    sites = tuple(
        ("decoder", kind, i, f"bert.encoder.layer.{i}.{name}.self")
        for i in range(2)
        for kind, name in (("self", "attention"), ("cross", "crossattention"))
    )

    def model(self) -> nn.Module:
        config = transformers.BertConfig(
            **SMALL, vocab_size=60, initializer_range=0.3, is_decoder=True, add_cross_attention=True
        )
        return built(transformers.BertLMHeadModel, config, self.implementation)

    def inputs(self) -> Any:
        states = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids(), "encoder_hidden_states": states}


class TestGPT2(Contract):
    adapter = BY_NAME["gpt2"]
    sites = tuple(("decoder", "self", i, f"transformer.h.{i}.attn") for i in range(2))

    def model(self) -> nn.Module:
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **WORDS)
        return built(transformers.GPT2LMHeadModel, config, self.implementation)

    def inputs(self) -> Any:
        return ids()


class TestGPT2Eager(TestGPT2):
    implementation = "eager"


class TestGPT2Cross(Contract):
    adapter = BY_NAME["gpt2"]
    sites = tuple(
        ("decoder", kind, i, f"transformer.h.{i}.{name}")
        for i in range(2)
        for kind, name in (("self", "attn"), ("cross", "crossattention"))
    )

    def model(self) -> nn.Module:
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, add_cross_attention=True, **WORDS
        )
        return built(transformers.GPT2LMHeadModel, config, self.implementation)

    def inputs(self) -> Any:
        states = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids(), "encoder_hidden_states": states}


class TestLlama(Contract):
    adapter = BY_NAME["llama"]
    sites = tuple(("decoder", "self", i, f"model.layers.{i}.self_attn") for i in range(2))

    def model(self) -> nn.Module:
        config = transformers.LlamaConfig(
            **SMALL, **WORDS, num_key_value_heads=2, initializer_range=0.3, attention_dropout=0.1
        )
        return built(transformers.LlamaForCausalLM, config, self.implementation)

    def inputs(self) -> Any:
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, :2] = 0
        return {"input_ids": ids(), "attention_mask": mask}


class TestLlamaEager(TestLlama):
    implementation = "eager"


class TestT5(Contract):
    adapter = BY_NAME["t5"]
    sites = (
        *(("encoder", "self", i, f"encoder.block.{i}.layer.0.SelfAttention") for i in range(2)),
        *(
            ("decoder", kind, i, f"decoder.block.{i}.layer.{place}Attention")
            for i in range(2)
            for kind, place in (("self", "0.Self"), ("cross", "1.EncDec"))
        ),
    )

    def model(self) -> nn.Module:
        config = transformers.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            vocab_size=60,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            feed_forward_proj="gated-gelu",
            initializer_factor=2.0,
        )
        return built(transformers.T5ForConditionalGeneration, config, self.implementation)

    def inputs(self) -> Any:
        return {"input_ids": ids(7), "decoder_input_ids": ids(4)}


class TestT5Eager(TestT5):
    implementation = "eager"


class TestViT(Contract):
    adapter = BY_NAME["vit"]
    sites = tuple(("vision", "self", i, f"vit.layers.{i}.attention") for i in range(2))

    def model(self) -> nn.Module:
        config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, initializer_range=0.3)
        return built(transformers.ViTForImageClassification, config, self.implementation)

    def inputs(self) -> Any:
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


class TestViTEager(TestViT):
    implementation = "eager"


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
    model = TestT5().model()
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

    model = TestViT().model()
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
