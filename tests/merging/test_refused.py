"""What does not make a whole is refused in words that say which rank, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn import Shard
from tests import tiny_models
from tests.merging.cuts import cut, same_trace

Ranks = list[hookattn.Trace]


def traced(seed: int = 5, model: Any = None, **options: Any) -> hookattn.Trace:
    ids = torch.randint(6, 60, (3, 5), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return hookattn.trace(model or tiny_models.llama(), {"input_ids": ids}, **options)


def ranks(counts: tuple[int, ...] = (2, 2), **options: Any) -> Ranks:
    return cut(traced(**options), "H", counts)


def reshard(trace: hookattn.Trace, **values: Any) -> hookattn.Trace:
    calls = []
    for call in trace:
        calls.append(replace(call))
        calls[-1].shards = tuple(replace(s, **values) for s in call.shards)
    return replace(trace, calls=calls)


def of_another_run(other: Ranks) -> Ranks:
    return [ranks()[0], other[1]]


def without_a_call(trace: hookattn.Trace) -> hookattn.Trace:
    return replace(trace, calls=trace.calls[:1])


def named(found: Ranks, **values: Any) -> Ranks:
    return [replace(found[0], **values), *found[1:]]


def scaled(found: Ranks) -> Ranks:
    for call in found[1]:
        call.scale = 0.1
    return found


def whole_in_one(found: Ranks) -> Ranks:
    found[0].calls[1] = traced()[1]
    return found


def both_whole(found: Ranks) -> Ranks:
    found[0].calls[1], found[1].calls[1] = traced()[1], traced(6)[1]
    return found


def hidden(found: Ranks) -> Ranks:
    """The padding of other inputs."""
    for call in found[0]:
        call.fields["mask"] = torch.rand(1, 1, 5, 5) > 0.5
    return found


REFUSED: dict[str, tuple[Callable[[], Ranks], str]] = {
    "a rank is missing": (lambda: ranks()[:1], r"rank 1 of 2 on tp is missing.*merge those of all ranks"),
    "several are": (lambda: ranks((1, 1, 1, 1))[1:3], r"ranks 0, 3 of 4 on tp are missing"),
    "the middle one is": (lambda: [*ranks((1, 2, 1))[:1], *ranks((1, 2, 1))[2:]], r"rank 1 of 3 on tp is missing"),
    "numbers are": (lambda: [reshard(ranks()[0], index=0, count=1, mesh="")], r"heads 2 3 of 4 are in none"),
    "a rank is there twice": (lambda: [ranks()[0], *ranks()], r"rank 0 of 2 on tp is there twice.*trace 0.*trace 1"),
    "shards overlap": (
        lambda: [ranks((3, 1))[0], ranks()[1]],
        r"trace 0 and trace 1 overlap: both have the heads 2",
    ),
    "a start is not known": (
        lambda: [ranks()[0], reshard(ranks()[1], start=None)],
        r"trace 1 has is not known.*Shard\('H'",
    ),
    "how many there are is not known": (
        lambda: [reshard(r, of=None, groups_of=None, group_start=None, count=1, index=0) for r in ranks()],
        r"how many heads the whole model has is not known",
    ),
    "which key heads is not known": (
        lambda: [reshard(r, groups_of=None, group_start=None) for r in ranks()],
        r"which key heads trace 0 has is not known.*groups_of",
    ),
    "nothing is sharded": (
        lambda: [traced(), traced()],
        r"nothing is sharded: trace 0 and trace 1 both have the whole",
    ),
    "one trace has all": (lambda: [traced()], r"nothing to merge"),
    "other inputs": (
        lambda: cut(traced(), "H", (1, 3))[:1] + cut(traced(6), "H", (1, 3))[1:],
        r"key head 0 is in trace 0 and in trace 1, and its k differ",
    ),
    "another mask": (lambda: hidden(ranks()), r"the mask, which all heads have in common, differs"),
    "other lengths": (
        lambda: [ranks()[0], cut(_shorter(), "H", (2, 2))[1]],
        r"the shape of q is .* in trace 0 and .* in trace 1",
    ),
    "other tokens": (
        lambda: named(ranks(tokens=[["a"] * 5] * 3), tokens=[["b"] * 5] * 3),
        r"the tokens of batch entry 0 differ between trace 0 and trace 1",
    ),
    "another model": (lambda: named(ranks(), model={"class": "Other"}), r"the model's class differs: 'Other'"),
    "another configuration": (
        lambda: named(ranks(), model={**ranks()[0].model, "config": {"layers": 7}}),
        r"the model's configuration differs: .* in trace 0 and .* in trace 1",
    ),
    "another selection": (lambda: named(ranks(), selection={"layers": [0]}), r"what was selected differs"),
    "other fields": (
        lambda: [ranks()[0], ranks(capture=("q", "k", "v", "mask"))[1]],
        r"what was selected differs: capture",
    ),
    "fields that are gone": (
        lambda: [ranks()[0], _without(ranks()[1], "output")],
        r"output is in trace 0, and was not captured in trace 1",
    ),
    "another kernel": (
        lambda: [ranks()[0], ranks(model=tiny_models.llama("eager"))[1]],
        r"tap is sdpa in trace 0 and eager in trace 1",
    ),
    "another scale": (lambda: scaled(ranks()), r"the scale is .* in trace 0 and 0.1 in trace 1"),
    "a call that one has not": (
        lambda: [ranks()[0], without_a_call(ranks()[1])],
        r"layers.1.self_attn \(step 0\) is in trace 0 and not in trace 1",
    ),
    "a whole call that one has not": (
        lambda: [whole_in_one(ranks())[0], without_a_call(ranks()[1])],
        r"layers.1.self_attn \(step 0\) is in trace 0 and not in trace 1",
    ),
    "a call that one has whole": (
        lambda: whole_in_one(ranks()),
        r"is cut along nothing in trace 0, and along heads in trace 1",
    ),
    "whole calls that differ": (lambda: both_whole(ranks()), r"is whole in trace 0 and in trace 1, and its q differ"),
    "other meshes": (
        lambda: [ranks()[0], reshard(ranks()[1], mesh="other")],
        r"the mesh of its shard is tp in trace 0",
    ),
    "stages of other steps": (
        lambda: [
            replace(traced(), calls=[replace(c, step=i) for i in (0, 1) for c in traced().calls[:1]]),
            replace(traced(), calls=traced().calls[1:]),
        ],
        r"step 1 is in trace 0 and not in trace 1",
    ),
    "no calls": (lambda: [hookattn.Trace(), hookattn.Trace()], r"expected traces of attention calls"),
    "nothing": (list, r"traces is empty"),
}


def _shorter() -> hookattn.Trace:
    ids = torch.randint(6, 60, (3, 4))
    with torch.no_grad():
        return hookattn.trace(tiny_models.llama(), {"input_ids": ids})


def _without(trace: hookattn.Trace, name: str) -> hookattn.Trace:
    for call in trace:
        del call.fields[name]
    return trace


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("backwards", [False, True])
def test_refused(what: str, backwards: bool) -> None:
    make, words = REFUSED[what]
    found = make()
    if backwards:
        with pytest.raises(hookattn.MergeError):
            hookattn.merge(found[::-1])
    else:
        with pytest.raises(hookattn.MergeError, match=words):
            hookattn.merge(found)


def test_two_axes_of_which_one_rank_is_missing() -> None:
    four = [part for rank in ranks() for part in cut(rank, "T", (2, 3), "cp")]
    for i in range(4):
        tp, cp = divmod(i, 2)
        with pytest.raises(hookattn.MergeError, match=f"rank {tp} of 2 on tp is missing"):
            hookattn.merge([*four[:i], *four[i + 1 :]])
        del cp
    with pytest.raises(hookattn.MergeError, match="rank 1 of 2 on cp is missing"):
        hookattn.merge([four[0], four[2]])


def test_files_name_the_ones_that_are_missing(tmp_path: Path) -> None:
    paths = [r.save(tmp_path / f"run.rank{i:02d}-of-02.safetensors") for i, r in enumerate(ranks())]
    with pytest.raises(hookattn.MergeError, match=r"rank 1 of 2 is missing: run\.rank01-of-02\.safetensors"):
        hookattn.merge(paths[:1])
    with pytest.raises(hookattn.MergeError, match=r"rank00-of-02.* is there twice"):
        hookattn.merge([*paths, paths[0]])
    stage = replace(traced(), calls=traced().calls[:1]).save(tmp_path / "stage.rank01-of-03.safetensors")
    other = replace(traced(), calls=traced().calls[1:]).save(tmp_path / "stage.rank02-of-03.safetensors")
    with pytest.raises(hookattn.MergeError, match=r"rank 0 of 3 is missing: stage\.rank00-of-03"):
        hookattn.merge([stage, other])


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    paths = [Path(r.save(tmp_path / f"{i}.safetensors")) for i, r in enumerate(ranks())]
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    with pytest.raises(hookattn.CorruptFileError, match=r"1\.safetensors"):
        hookattn.merge(paths)


def test_replicas_by_their_checksums_and_by_their_numbers(tmp_path: Path) -> None:
    """Files whose headers do not say that copies are the same are read, and rounding is no other run."""
    found = cut(traced(), "H", (1, 1, 1, 1))
    found[1][0].fields["k"] = found[1][0].k * (1 + 1e-7)
    paths = [r.save(tmp_path / f"{i}.safetensors") for i, r in enumerate(found)]
    same_trace(hookattn.merge(paths), traced())
    found[1][0].fields["k"] = found[1][0].k * 1.01
    paths = [r.save(tmp_path / f"{i}.safetensors") for i, r in enumerate(found)]
    with pytest.raises(
        hookattn.MergeError, match=r"key head 0 is in 0\.safetensors and in 1\.safetensors, and its k differ"
    ):
        hookattn.merge(paths)


def test_layers_of_a_stage_that_is_missing_are_told() -> None:
    trace = traced(model=tiny_models.gpt2(n_layer=3))
    stages = [replace(trace, calls=[trace[i]]) for i in (0, 2)]
    assert any("no trace has a call of layers 1 of 3" in note for note in hookattn.merge(stages).notes)


@pytest.mark.parametrize("wrong", [None, 3, [3], [None], {"a": 1}, [traced, 1]])
def test_something_else(wrong: Any) -> None:
    with pytest.raises(hookattn.InputError, match="traces"):
        hookattn.merge(wrong)


def test_steps_are_batches_or_steps() -> None:
    with pytest.raises(hookattn.SelectionError, match="steps"):
        hookattn.merge(ranks(), steps="layers")
    with pytest.raises(hookattn.MergeError, match="did not run in step 1"):
        trace = traced()
        hookattn.merge(replace(trace, calls=[*trace.calls, replace(trace[0], step=1)]), steps="batches")


def test_a_shard_may_be_all() -> None:
    trace = traced()
    for call in trace:
        call.shards = (Shard("H", 0, 4, 0, 2),)
    same_trace(hookattn.merge([trace]), traced())
