"""What a model takes is found by running it: caches and masks behind decorators, by other names, dropped unread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import hookattn
from hookattn import AdapterCheckError
from hookattn.testing import check_adapter

HEADS, WIDTH = 2, 8
Cache = list[Tensor]


class Attend(nn.Module):
    """Causal self-attention with a place for the keys and values of earlier tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def forward(self, x: Tensor, keep: Tensor | None = None, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        if cache:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        t, s = q.shape[2], k.shape[2]
        mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)[None, None]
        if keep is not None:
            mask = mask & keep[:, None, None].bool() | torch.eye(t, s, dtype=torch.bool)
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2), [k, v]


class Decoder(nn.Module):
    """Two layers; a subclass says how its forward is called and what it hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, HEADS * WIDTH)
        self.layers = nn.ModuleList([Attend(), Attend()])
        with torch.no_grad():
            for p in self.parameters():
                p *= 2.5

    def over(self, ids: Tensor, keep: Tensor | None, cache: list[Cache] | None) -> tuple[Tensor, list[Cache]]:
        x, made = self.embed(ids), []
        for i, layer in enumerate(self.layers):
            y, own = layer(x, keep, cache[i] if cache else None)
            x = x + y
            made.append(own)
        return x, made


def renamed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Takes the old name of the cache too; what ``inspect`` shows is the inner function."""

    @functools.wraps(forward)
    def taking(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            kwargs["cache"] = kwargs.pop("past_key_values")
        return forward(self, *args, **kwargs)

    return taking


class Named(Decoder):
    """Hands its cache out by name, and takes it back by that name and by an older one."""

    @renamed
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: list[Cache] | None = None,
        use_cache: bool = False,
    ) -> dict[str, Any]:
        x, made = self.over(input_ids, attention_mask, cache)
        return {"x": x, "cache": made} if use_cache else {"x": x}


class Hidden(Named):
    """Everything by name, behind a forward that shows none of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OtherName(Decoder):
    def forward(self, input_ids: Tensor, memories: Any = None, use_cache: bool = False) -> dict[str, Any]:
        x, made = self.over(input_ids, None, memories)
        return {"x": x, "memories": made} if use_cache else {"x": x}


class InATuple(Decoder):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        x, made = self.over(input_ids, None, past_key_values)
        return (x, made) if use_cache else (x,)


class Unasked(Decoder):
    """Always hands out a cache, and cannot be asked."""

    def forward(self, input_ids: Tensor, cache: Any = None) -> Any:
        return self.over(input_ids, None, cache)


class Made(NamedTuple):
    x: Tensor
    past_key_values: Any


class InANamedTuple(Decoder):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Made:
        x, made = self.over(input_ids, None, past_key_values)
        return Made(x, made if use_cache else None)


class Plain(Decoder):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.over(input_ids, None, None)[0]


class Dropping(Decoder):
    """Accepts every name and reads none of them."""

    def forward(self, input_ids: Tensor, **unread: Any) -> Tensor:
        return self.over(input_ids, None, None)[0]


class OneWay(Decoder):
    """Hands out a cache and drops what it is given back."""

    def forward(self, input_ids: Tensor, use_cache: bool = False, **unread: Any) -> dict[str, Any]:
        x, made = self.over(input_ids, None, None)
        return {"x": x, "past_key_values": made} if use_cache else {"x": x}


class Refusing(Decoder):
    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        if use_cache:
            raise NotImplementedError("use_cache=True is for the decoder alone")
        return self.over(input_ids, None, None)[0]


class Shifted(Named):
    """Its cached values have lost their order."""

    def over(self, ids: Tensor, keep: Tensor | None, cache: list[Cache] | None) -> tuple[Tensor, list[Cache]]:
        return super().over(ids, keep, cache and [[k, v.flip(2)] for k, v in cache])


class Breaking(Named):
    """Its forward over a cache is broken."""

    def over(self, ids: Tensor, keep: Tensor | None, cache: list[Cache] | None) -> tuple[Tensor, list[Cache]]:
        if cache:
            raise RuntimeError("no such rows")
        return super().over(ids, keep, cache)


class Leaky(Hidden):
    """Hides the first token alone, whatever the mask says."""

    def over(self, ids: Tensor, keep: Tensor | None, cache: list[Cache] | None) -> tuple[Tensor, list[Cache]]:
        if keep is not None:
            keep = torch.cat([keep[:, :1], torch.ones_like(keep[:, 1:])], 1)
        return super().over(ids, keep, cache)


class Toy(hookattn.Adapter):
    name = "toy-decoder"
    covers = (__name__,)
    attention: ClassVar[dict[str, str]] = {"Attend": "self"}
    stack = "decoder"


def ids() -> Tensor:
    return torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(3))


def by_name() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def told(kind: type[nn.Module], check: str = "cache", inputs: Callable[[], Any] = by_name) -> str:
    return check_adapter(Toy(), kind, inputs, only=[check])[check]


@pytest.mark.parametrize("inputs", [ids, by_name])
@pytest.mark.parametrize("kind", [Named, Hidden, OtherName, InATuple, InANamedTuple, Unasked])
def test_a_cache_is_found_by_whatever_name_it_goes(kind: type[nn.Module], inputs: Callable[[], Any]) -> None:
    steps: list[dict[str, Any]] = []

    class Watched(kind):  # type: ignore[misc, valid-type]
        def over(self, ids: Tensor, keep: Any, cache: Any) -> Any:
            steps.append({"tokens": ids.shape[1], "cached": 0 if not cache else cache[0][0].shape[2]})
            return super().over(ids, keep, cache)

    assert told(Watched, inputs=inputs) == "passed"
    assert {"tokens": 1, "cached": 5} in steps, "the last token met a cache of all that are before it"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Plain, ["Plain refuses use_cache=True (TypeError: ", "unexpected keyword", "returns nothing that could be"]),
        (Dropping, ["Dropping accepts use_cache=True", "returns nothing that could be one"]),
        (OneWay, ["OneWay accepts", "'past_key_values' back", "past_key_values= (accepted, and changes nothing)"]),
        (Refusing, ["Refusing refuses use_cache=True (NotImplementedError: use_cache=True is for the decoder alone)"]),
    ],
)
def test_a_model_without_a_cache_is_reported_as_that(kind: type[nn.Module], words: list[str]) -> None:
    said = told(kind)
    assert said.startswith("not run: the model takes no cache: ")
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("kind", "words"), [(Shifted, "weights as without a cache"), (Breaking, "RuntimeError: no such rows")]
)
def test_a_cache_that_is_wrong_fails(kind: type[nn.Module], words: str) -> None:
    with pytest.raises(AdapterCheckError) as error:
        told(kind)
    assert words in str(error.value)


def test_trying_leaves_nothing_on_the_model_that_is_checked() -> None:
    made: list[nn.Module] = []

    def counted() -> nn.Module:
        made.append(Named())
        return made[-1]

    assert check_adapter(Toy(), counted, by_name, only=["cache"]) == {"cache": "passed"}
    assert len(made) == 2, "one to try on, one to check"


@pytest.mark.parametrize("kind", [Named, Hidden])
def test_a_mask_is_found_behind_a_forward_that_shows_none(kind: type[nn.Module]) -> None:
    assert told(kind, "padding") == "passed"


def test_a_mask_that_hides_too_little_is_caught_there() -> None:
    with pytest.raises(AdapterCheckError, match="it may be attended to"):
        told(Leaky, "padding")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Plain, "the model takes no attention_mask: Plain refuses attention_mask= (TypeError: "),
        (Dropping, "the model takes no attention_mask: attention_mask= changes nothing that Dropping returns"),
    ],
)
def test_a_model_without_a_mask_is_reported_as_that(kind: type[nn.Module], words: str) -> None:
    assert told(kind, "padding").startswith(f"not run: {words}")


def test_ids_that_go_by_another_name() -> None:
    class Words(Decoder):
        def forward(self, words: Tensor, **unread: Any) -> Tensor:
            return self.over(words, None, None)[0]

    for check in ("cache", "padding"):
        said = told(Words, check, ids)
        assert (
            said.startswith("not run: the model does not take its inputs by the name input_ids (") and "words" in said
        )
