"""vLLM's CPU kernel by itself, with every argument that it has, and how it stores a page."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

import hookattn
from hookattn.taps import vllm as tap
from hookattn.taps.packed_kernels import running_layer

ops = pytest.importorskip("vllm._custom_ops")
G, H = 2, 4
SLOPES, SINKS = torch.tensor([0.5, 0.25, 0.125, 1.0]), torch.tensor([0.3, -1.0, 2.0, 0.0])


class Layer(nn.Module):
    """Writes keys into pages by vLLM's own operation, in any order, and attends to them."""

    def __init__(self, isa: str = "vec", **given: Any) -> None:
        super().__init__()
        self.isa, self.given = isa, given

    def forward(self, x: Tensor) -> Tensor:
        given = {"dtype": torch.float32, "d": 32, "page": 32, "queries": (7, 1, 5), "keys": (7, 40, 9), **self.given}
        dtype, d, page, queries, keys = (given.pop(n) for n in ("dtype", "d", "page", "queries", "keys"))
        causal, window = given.pop("causal", True), given.pop("window", -1)
        random = torch.Generator().manual_seed(3)
        pages = [-(-n // page) for n in keys]
        order = torch.randperm(sum(pages) + 2, generator=random)
        key_pages, value_pages = torch.zeros(len(order), G, 2 * page, d, dtype=dtype).chunk(2, dim=2)
        table = torch.zeros(len(keys), 8, dtype=torch.int32)
        for row, at, n, count in zip(table, accumulate(pages, initial=0), pages, keys, strict=False):
            row[:n] = order[at : at + n]
            slots = torch.tensor([int(row[i // page]) * page + i % page for i in range(count)])
            k, v = (torch.randn(count, G, d, generator=random).to(dtype) for _ in range(2))
            ops.cpu_attn_reshape_and_cache(2 * k, v, key_pages, value_pages, slots, self.isa)
        q = 2 * torch.randn(sum(queries), H, d, generator=random).to(dtype)
        starts = torch.tensor([0, *accumulate(queries)], dtype=torch.int32)
        used = torch.tensor(keys, dtype=torch.int32)
        plan = ops.cpu_attn_get_scheduler_metadata(
            len(keys), H, G, d, used, dtype, starts, causal, window, self.isa, False
        )
        output = torch.empty_like(q)
        token = running_layer.set(self)
        try:
            ops.cpu_attention_with_kv_cache(
                query=q,
                key_cache=key_pages,
                value_cache=value_pages,
                output=output,
                query_start_loc=starts,
                seq_lens=used,
                scale=d**-0.5,
                causal=causal,
                sliding_window=window,
                block_table=table,
                scheduler_metadata=plan,
                **{"alibi_slopes": None, "softcap": 0.0, "s_aux": None, **given},
            )
        finally:
            running_layer.reset(token)
        return output


CALLS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"causal": False, "queries": (6, 3), "keys": (9, 9)},
    {"window": 1},
    {"window": 4},
    {"window": 4, "causal": False},
    {"softcap": 5.0},
    {"s_aux": SINKS},
    {"s_aux": SINKS, "window": 3},
    {"alibi_slopes": SLOPES},
    {"alibi_slopes": SLOPES, "causal": False},
    {"alibi_slopes": SLOPES, "s_aux": SINKS},
    {"alibi_slopes": SLOPES, "s_aux": SINKS, "causal": False},
    {"alibi_slopes": SLOPES, "s_aux": SINKS, "softcap": 3.0, "window": 6},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "s_aux": SINKS.bfloat16()},
    {"isa": "vec16", "d": 80},
    {"isa": "vec16", "d": 112, "dtype": torch.bfloat16},
    {"page": 64, "d": 128},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_argument(call: dict[str, Any]) -> None:
    with torch.inference_mode():
        trace = hookattn.trace(Layer(**call), torch.zeros(1), verify="full")
    assert [c.certificate.status for c in trace] == ["faithful"] and not trace.skipped


@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("page", "d"), [(32, 32), (64, 128), (32, 64)])
def test_a_page_is_laid_out_as_vllm_writes_it(isa: str, dtype: torch.dtype, page: int, d: int) -> None:
    """That of AMX, too: what writes it runs on any processor, and the kernel that reads it only on some."""
    pages = tap._PAGES[isa]
    if dtype not in pages.dtypes:
        pytest.skip("nobody uses it")
    pools = torch.zeros(3, G, 2 * page, d, dtype=dtype).chunk(2, dim=2)
    k, v = (torch.randn(3 * page, G, d, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    ops.cpu_attn_reshape_and_cache(k, v, *pools, torch.arange(3 * page), isa)
    for pool, pattern, tile, written in (
        (pools[0], pages.keys, pages.key_tile, k),
        (pools[1], pages.values, pages.value_tile, v),
    ):
        read = rearrange(pool.reshape(1, 3, G, -1), pattern, **tap.sizes_of(tile, d))
        assert torch.equal(read[0], written)
