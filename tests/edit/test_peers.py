"""Edits against other libraries on the same weights: TransformerLens hook by hook, and the experiments of
docs/comparison-edits.md, whose page is the code that is in benchmarks/side_by_side/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from benchmarks.side_by_side import experiments, given
from benchmarks.side_by_side.experiments import LENS, LIBRARIES, NNSIGHT, OURS, TASKS, TOLERANCE
from hookattn import edit
from tests.field.common import drawn, gap, ids

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "comparison-edits.md"

GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 50, "n_positions": 32}
LLAMA = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50},
    **{"intermediate_size": 32, "max_position_embeddings": 32, "num_key_value_heads": 2, "head_dim": 8},
}
MODELS = {"gpt2": ("GPT2LMHeadModel", GPT2), "llama": ("LlamaForCausalLM", LLAMA)}


def plain(name: str, attention: str) -> nn.Module:
    cls, settings = MODELS[name]
    config = transformers.AutoConfig.for_model(name, **settings, attn_implementation=attention)
    return drawn(getattr(transformers, cls)(config))


def bridge(name: str) -> Any:
    builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    model: Any = plain(name, "eager")
    return builder.build_bridge_from_module(model, type(model).__name__, hf_config=model.config).eval()


Hook = Callable[[Tensor, Any], Tensor]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_run_with_hooks(name: str) -> None:
    lens, model = bridge(name), plain(name, "sdpa")
    here, there = ids(2, 7, 50, seed=1), ids(2, 7, 50, seed=2)
    with torch.no_grad():
        clean, corrupted = hookattn.trace(model, here), hookattn.trace(model, there)
        _, cache = lens.run_with_cache(there)

        def zero(x: Tensor, hook: Any) -> Tensor:
            x[:, 1] = 0
            return x

        def pattern(x: Tensor, hook: Any) -> Tensor:
            x[:, [0, 3]] = cache[hook.name][:, [0, 3]]
            return x

        def z(x: Tensor, hook: Any) -> Tensor:  # B T H E there
            x[:, 4, 2] = cache[hook.name][:, 4, 2]
            return x

        def values(x: Tensor, hook: Any) -> Tensor:
            x[:, :, 1] = cache[hook.name][:, :, 1]
            return x

        def scores(x: Tensor, hook: Any) -> Tensor:
            x[:, 2, 5, 3] += 1.5
            return x

        def hide(x: Tensor, hook: Any) -> Tensor:
            x[:, :, -1, 2] = -torch.inf
            return x

        cases: list[tuple[str, Hook, hookattn.edit.Edit]] = [
            ("hook_pattern", zero, edit.zero("weights", layer=1, heads=1)),
            ("hook_pattern", pattern, edit.patch("weights", corrupted, layer=1, heads=[0, 3])),
            ("hook_z", z, edit.patch("output", corrupted, layer=1, heads=2, queries=4)),
            ("hook_v", values, edit.patch("v", corrupted, layer=1, heads=1)),
            ("hook_attn_scores", scores, edit.add("scores", 1.5, layer=1, heads=2, queries=5, keys=3)),
            ("hook_attn_scores", hide, edit.knockout(layer=1, queries=-1, keys=2)),
        ]
        for hook, function, change in cases:
            theirs = lens.run_with_hooks(here, fwd_hooks=[(f"blocks.1.attn.{hook}", function)])
            ours = hookattn.edited(model, here, change)
            assert gap(theirs, clean.output.logits) > 1e-3, f"{hook}: it changes nothing"
            assert gap(ours.output.logits, theirs) < 1e-5, change
            assert [str(e) for call in ours.select(layer=1) for e in call.edits], change


@pytest.mark.parametrize("library", [LENS, NNSIGHT], ids=lambda library: library.name)
def test_the_experiments_agree(library: experiments.Library) -> None:
    if not library.installed:
        pytest.skip(f"{library.package} is not installed; `make compare` installs it")
    found = experiments.run(library)
    cannot = {"fused"} if library is LENS else set()
    assert set(found) == {task.name for task in TASKS} - cannot
    apart = experiments.apart(experiments.run(OURS), found)
    assert max(apart.values()) < TOLERANCE, apart


def test_each_experiment_does_something() -> None:
    found = experiments.run(OURS)
    model: Any = given.gpt2("sdpa")
    clean, other = (model(given.tokens(seed)).logits.detach() for seed in (1, 2))
    assert set(found) == {task.name for task in TASKS}
    for name, result in found.items():
        if name in ("gates", "weight_gradients"):
            assert result.isfinite().all() and result.abs().max() > 1e-2
        elif name == "generation":
            assert result.shape == (2, given.NEW, given.VOCABULARY)
            assert gap(result[:, 0], clean[:, -1]) < TOLERANCE  # the prompt is seen as it is
        else:
            before = other if name == "freeze_patterns" else clean
            assert gap(result, before) > 1e-2, name


def test_the_page_is_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    sections = text.split("\n## ")[1:]
    assert [s.split("\n")[0] for s in sections] == [f"{i}. {task.title}" for i, task in enumerate(TASKS, 1)]
    for section, task in zip(sections, TASKS, strict=True):
        blocks = [block.split("```")[0].strip() for block in section.split("```python\n")[1:]]
        written = [experiments.code(library, task) for library in LIBRARIES]
        assert blocks == [code for code in written if code is not None], f"{task.name}: run `make compare`"
        for library in LIBRARIES:
            assert f"**{library.name}**" in section
            assert task.notes.get(library.name, "").partition("{")[0] in section
