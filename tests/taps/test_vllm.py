"""vLLM's kernels and its engine, by stand-ins of their signatures; tests/serving_vllm runs the real ones on a CPU."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import editing, trace, tracing
from hookattn.edit import scale
from hookattn.taps.batch import requests_of_batch
from tests.reference import check_call, draw
from tests.standins import (
    Calls,
    FlashOfVllm,
    Give,
    counted,
    ends,
    from_pages,
    give,
    packed,
    pad,
    pad_masks,
)

__all__ = ["give"]  # a fixture

H, G, D, SIZE = 4, 2, 8, 4
# Two prompts, one of which has keys from earlier steps, and a step of decoding.
QUERIES, KEYS = (5, 3, 1), (5, 9, 6)
TABLE = torch.tensor([[7, 2, 99, 99], [0, 5, 3, 99], [6, 1, 99, 99]], dtype=torch.int32)


def cache(seed: int) -> tuple[Tensor, Tensor]:
    """Pages as flash-attn and Triton have them: pages, tokens of a page, G, D."""
    return draw(8, SIZE, G, D, seed=seed), draw(8, SIZE, G, D, seed=seed + 1)


def columns(pool: Tensor) -> Tensor:
    """Keys as the CPU kernel stores them: pages, G, tokens of a page, D, of which a page of a head is D by tokens."""
    n, size, g, d = pool.shape
    return pool.permute(0, 2, 3, 1).reshape(n, g, size, d).contiguous()


def rows(pool: Tensor) -> Tensor:
    """Values as the CPU kernel stores them."""
    return pool.transpose(1, 2).contiguous()


def expected(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], entries: Sequence[int] = (0, 1, 2)) -> Any:
    """What a call has to have of some of its sequences."""
    parts = q.split(list(QUERIES))
    return {
        "q": pad([parts[i] for i in entries]),
        "k": pad([from_pages(k, TABLE[i], KEYS[i]) for i in entries]),
        "v": pad([from_pages(v, TABLE[i], KEYS[i]) for i in entries]),
        "scale": D**-0.5,
        "mask": pad_masks([counted(QUERIES[i], KEYS[i], *window) for i in entries]),
    }


# ------------------------------------------------------------------------------------------------- flash-attn


@pytest.fixture
def flash(give: Give) -> Any:
    return give("vllm.vllm_flash_attn.flash_attn_interface", FlashOfVllm).flash_attn_varlen_func


def given_flash(**more: Any) -> dict[str, Any]:
    """As vLLM calls it."""
    k, v = cache(2)
    return {
        "q": draw(sum(QUERIES), H, D, seed=1),
        "k": k,
        "v": v,
        "out": torch.empty(sum(QUERIES), H, D),
        "cu_seqlens_q": ends(QUERIES),
        "max_seqlen_q": max(QUERIES),
        "seqused_k": torch.tensor(KEYS, dtype=torch.int32),
        "max_seqlen_k": max(KEYS),
        "softmax_scale": D**-0.5,
        "causal": True,
        "alibi_slopes": None,
        "window_size": [-1, -1],
        "block_table": TABLE,
        "softcap": 0.0,
        "scheduler_metadata": torch.zeros(4, dtype=torch.int32),
        "fa_version": 3,
        "q_descale": torch.ones(3, G),
        "k_descale": torch.ones(1).expand(3, G),
        "v_descale": torch.ones(1).expand(3, G),
        "num_splits": 0,
        "s_aux": None,
    } | more


def test_flash_as_vllm_calls_it(flash: Any) -> None:
    given = given_flash()
    made = trace(Calls(flash), given, verify="full")
    assert len(made) == 1 and not made.skipped
    check_call(made[0], **expected(given["q"], given["k"], given["v"], (-1, 0)))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"k_descale": torch.full((3, G), 0.5)}, "k_descale is not 1"),
        ({"v_descale": torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]])}, "v_descale is not 1"),
        ({"k": cache(2)[0].to(torch.float8_e4m3fn), "v": cache(2)[1].to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
        ({"k": torch.zeros(8, SIZE, G, D, dtype=torch.uint8)}, "uint8"),
        ({"dynamic_causal": torch.ones(3)}, "argument dynamic_causal"),
        ({"mask_mod": print}, "argument mask_mod"),
        ({"q_v": torch.zeros(1)}, "argument q_v"),
        ({"output_scale": torch.ones(1)}, "argument output_scale"),
        ({"cp_world_size": 2}, "argument cp_world_size"),
    ],
)
def test_flash_with_what_is_not_known(flash: Any, more: dict[str, Any], reason: str) -> None:
    with pytest.warns(hookattn.SkippedWarning, match=reason):
        made = trace(Calls(flash), given_flash(**more))
    assert len(made) == 0 and reason in made.skipped[0].reason


def test_no_page_is_gathered_that_no_sequence_has(flash: Any) -> None:
    """A table has room for the longest sequence that a server takes."""
    wide = torch.full((3, 10_000_000), 99, dtype=torch.int32)  # of which the keys would be 10 GB
    wide[:, :4] = TABLE
    made = trace(Calls(flash), given_flash(block_table=wide), verify="full")
    assert made[0].k.shape == (3, G, max(KEYS), D)


@pytest.mark.parametrize("only", [None, ("b",), ("c", "a")])
def test_flash_of_some_requests(flash: Any, only: tuple[str, ...] | None) -> None:
    slopes = draw(3, H, seed=9).abs()
    given = given_flash(alibi_slopes=slopes)
    names = ("a", "b", "c")
    with requests_of_batch(names, only):
        made = trace(Calls(flash), given, verify="full")
    entries = [i for i, name in enumerate(names) if only is None or name in only]
    call = made[0]
    assert call.requests == tuple(names[i] for i in entries) and str(call.certificate).startswith("faithful")
    assert torch.equal(call.q, expected(given["q"], given["k"], given["v"], (-1, 0), entries)["q"])


# ------------------------------------------------------------------------------------------------------ Triton


class Triton:
    """``unified_attention`` of vLLM, which returns nothing."""

    @staticmethod
    def unified_attention(
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        cu_seqlens_q: Any,
        max_seqlen_q: Any,
        seqused_k: Any,
        max_seqlen_k: Any,
        softmax_scale: Any,
        causal: Any,
        window_size: Any,
        block_table: Any,
        softcap: Any,
        q_descale: Any,
        k_descale: Any,
        v_descale: Any,
        seq_threshold_3D: Any = None,
        num_par_softmax_segments: Any = None,
        softmax_segm_output: Any = None,
        softmax_segm_max: Any = None,
        softmax_segm_expsum: Any = None,
        alibi_slopes: Any = None,
        output_scale: Any = None,
        qq_bias: Any = None,
        sinks: Any = None,
        mm_prefix_range: Any = None,
        rswa_prefix_lens: Any = None,
        rswa_window: Any = None,
        use_alibi_sqrt: Any = False,
        kv_quant_mode: Any = 0,
        k_scale_cache: Any = None,
        v_scale_cache: Any = None,
        chunk_lookback: Any = -1,
        use_td: bool = False,
        mm_prefix_clamp_sliding_window: bool = False,
    ) -> None:
        causal = causal if isinstance(causal, bool) else bool(causal.all())
        # The left end of a window is what counts, at both sides where nothing is causal.
        window = (window_size[0], window_size[0])
        biased(out, q, k, v, cu_seqlens_q, seqused_k, block_table, softmax_scale, causal, window, softcap, sinks)
        if alibi_slopes is not None:
            with_slopes(out, q, k, v, cu_seqlens_q, seqused_k, block_table, softmax_scale, alibi_slopes, sinks, 0)


def biased(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    used: Tensor,
    table: Tensor,
    scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
) -> None:
    made = packed(q, k, v, starts, None, scale, causal, window, softcap, used_k=used, table=table, sink=sinks)
    out.copy_(made.view(out.shape))


def with_slopes(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    used: Tensor,
    table: Tensor,
    scale: float,
    slopes: Tensor,
    sinks: Tensor | None,
    own: int,
) -> None:
    """Causal, with slope·(j − place) added: the place is the query's own, or (``own`` 0) that of the first query."""
    for b in range(len(used)):
        first, last, s = int(starts[b]), int(starts[b + 1]), int(used[b])
        t = last - first
        keys, values = from_pages(k, table[b], s), from_pages(v, table[b], s)
        for h in range(H):
            for i in range(t):
                n = i + s - t + 1
                logits = keys[:n, h * G // H] @ q[first + i, h] * scale
                logits = logits + slopes[h] * (torch.arange(n) - (s - t + own * i))
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h].view(1)])
                out[first + i, h] = torch.softmax(logits, -1)[:n] @ values[:n, h * G // H]


@pytest.fixture
def triton(give: Give) -> Any:
    return give("vllm.v1.attention.ops.triton_unified_attention", Triton).unified_attention


class Written(nn.Module):
    """A call of a kernel that returns nothing; gives what it has written."""

    def __init__(self, kernel: Any, place: str) -> None:
        super().__init__()
        self.kernel, self.place = kernel, place

    def forward(self, **given: Any) -> Tensor:
        out = torch.empty(sum(QUERIES), H, D)
        self.kernel(**{**given, self.place: out})
        return out


def given_triton(**more: Any) -> dict[str, Any]:
    k, v = cache(4)
    return {
        "q": draw(sum(QUERIES), H, D, seed=3),
        "k": k,
        "v": v,
        "cu_seqlens_q": ends(QUERIES),
        "max_seqlen_q": max(QUERIES),
        "seqused_k": torch.tensor(KEYS, dtype=torch.int32),
        "max_seqlen_k": max(KEYS),
        "softmax_scale": D**-0.5,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": TABLE,
        "softcap": 0,
        "q_descale": None,
        "k_descale": torch.ones(3, G),
        "v_descale": torch.ones(3, G),
    } | more


@pytest.mark.parametrize(
    ("more", "window"),
    [
        ({}, (-1, 0)),
        ({"window_size": (3, 0)}, (3, 0)),
        ({"window_size": (2, -1), "causal": False}, (2, 2)),
        ({"causal": False}, (-1, -1)),
    ],
)
def test_triton(triton: Any, more: dict[str, Any], window: tuple[int, int]) -> None:
    given = given_triton(**more)
    made = trace(Written(triton, "out"), given, verify="full")
    assert len(made) == 1 and not made.skipped
    check_call(made[0], **expected(given["q"], given["k"], given["v"], window))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -1.0, 2.0, 0.0])])
def test_triton_counts_alibi_from_the_first_query(triton: Any, sinks: Tensor | None) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])
    made = trace(Written(triton, "out"), given_triton(alibi_slopes=slopes, sinks=sinks), verify="full")
    assert str(made[0].certificate).startswith("faithful")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"k_descale": torch.full((3, G), 0.5)}, "k_descale is not 1"),
        ({"causal": torch.ones(3, dtype=torch.bool)}, "causal differs"),
        ({"kv_quant_mode": 2}, "argument kv_quant_mode"),
        ({"qq_bias": torch.zeros(5, 5)}, "argument qq_bias"),
        ({"chunk_lookback": 1}, "argument chunk_lookback"),
        ({"use_alibi_sqrt": True}, "argument use_alibi_sqrt"),
    ],
)
def test_triton_with_what_is_not_known(triton: Any, more: dict[str, Any], reason: str) -> None:
    with pytest.warns(hookattn.SkippedWarning, match=reason):
        made = trace(Written(triton, "out"), given_triton(**more))
    assert len(made) == 0 and reason in made.skipped[0].reason


def test_an_output_is_exchanged_where_it_was_written(triton: Any) -> None:
    model, given = Written(triton, "out"), given_triton()
    plain = model(**given)
    with editing(model, scale("output", 2.0)):
        doubled = model(**given)
    torch.testing.assert_close(doubled, 2 * plain)
    with editing(model, scale("q", 0.0)):
        flat = model(**given)
    last = from_pages(given["v"], TABLE[2], KEYS[2]).mean(0).repeat_interleave(H // G, 0)
    torch.testing.assert_close(flat[-1], last)


# ------------------------------------------------------------------------------- the CPU kernel, in layers of vLLM


class CpuOps:
    """``cpu_attention_with_kv_cache`` of vLLM; a page of a head holds its keys as columns, and its values as rows."""

    @staticmethod
    def cpu_attention_with_kv_cache(
        query: Any,
        key_cache: Any,
        value_cache: Any,
        output: Any,
        query_start_loc: Any,
        seq_lens: Any,
        scale: Any,
        causal: Any,
        alibi_slopes: Any,
        sliding_window: Any,
        block_table: Any,
        softcap: Any,
        scheduler_metadata: Any,
        s_aux: Any,
        dynamic_causal: Any = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        kv_cache_dtype: str = "auto",
    ) -> None:
        n, g, size, d = key_cache.shape
        k, v = key_cache.reshape(n, g, d, size).permute(0, 3, 1, 2), value_cache.transpose(1, 2)
        window = (sliding_window - 1,) * 2 if sliding_window > 0 else (-1, -1)
        biased(output, query, k, v, query_start_loc, seq_lens, block_table, scale, causal, window, softcap, s_aux)
        if alibi_slopes is not None:
            with_slopes(output, query, k, v, query_start_loc, seq_lens, block_table, scale, alibi_slopes, s_aux, 1)


class Backend:
    """What a layer of vLLM was told to attend with."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_name(self) -> str:
        return self.name


class Layer(nn.Module):
    """vLLM's ``Attention``: it hands over to the operator, which finds it again by its name."""

    def __init__(self, engine: Engine, name: str, isa: str = "vec", backend: str = "CPU_ATTN", **given: Any) -> None:
        super().__init__()
        self.engine, self.layer_name, self.isa, self.given = engine, name, isa, given
        self.attn_backend = Backend(backend)

    def forward(self, query: Tensor) -> Tensor:
        output = torch.empty_like(query)
        self.engine.operator(query, None, None, output, self.layer_name)
        return output

    def attend(self, query: Tensor, output: Tensor) -> None:
        k, v = cache(6)
        given = {
            "query": query,
            "key_cache": columns(k),
            "value_cache": rows(v),
            "output": output,
            "query_start_loc": ends(QUERIES),
            "seq_lens": torch.tensor(KEYS, dtype=torch.int32),
            "scale": D**-0.5,
            "causal": True,
            "alibi_slopes": None,
            "sliding_window": -1,
            "block_table": TABLE,
            "softcap": 0,
            "scheduler_metadata": None,
            "s_aux": None,
        } | self.given
        for _ in range(given.pop("times", 1)):
            self.engine.kernel(**given)


class Model(nn.Module):
    def __init__(self, engine: Engine, **given: Any) -> None:
        super().__init__()
        self.attn = Layer(engine, "model.attn", **given)
        engine.layers["model.attn"] = self.attn

    def forward(self, query: Tensor) -> Tensor:
        return query + self.attn(query)


class Engine:
    """vLLM's modules with an operator, a kernel, a context and a runner."""

    def __init__(self, give: Give) -> None:
        self.layers: dict[str, nn.Module] = {}
        self.metadata: Any = {"model.attn": object()}
        engine = self

        class Operators:
            @staticmethod
            def unified_attention_with_output(
                query: Any, key: Any, value: Any, output: Any, layer_name: Any, output_scale: Any = None
            ) -> None:
                layer: Any = engine.layers[layer_name]
                if engine.metadata is None or engine.metadata[layer_name] is None:
                    return
                if layer.attn_backend.get_name() == "CPU_ATTN":
                    layer.attend(query, output)
                else:  # a compiled extension, say
                    output.copy_(query)

        class Context:
            @staticmethod
            def get_forward_context() -> Any:
                return types.SimpleNamespace(no_compile_layers=engine.layers, attn_metadata=engine.metadata)

        give("vllm.forward_context", Context)
        self.kernel = give("vllm._custom_ops", CpuOps).cpu_attention_with_kv_cache
        operators = give("vllm.model_executor.layers.attention.attention", Operators)
        self.operator = operators.unified_attention_with_output


@pytest.fixture
def engine(give: Give) -> Engine:
    return Engine(give)


QUERY = draw(sum(QUERIES), H, D, seed=8)


def cpu_call(engine: Engine, **given: Any) -> Any:
    made = trace(Model(engine, **given), QUERY, verify="full")
    assert len(made) == 1 and not made.skipped, made.skipped
    assert (made[0].tap, made[0].site.path) == ("vllm", "attn")
    return made[0]


@pytest.mark.parametrize("isa", ["vec", "vec16"])
@pytest.mark.parametrize(
    ("more", "window"),
    [
        ({}, (-1, 0)),
        ({"sliding_window": 3}, (2, 0)),
        ({"sliding_window": 1}, (0, 0)),
        ({"causal": False}, (-1, -1)),
        ({"causal": False, "sliding_window": 3}, (2, 2)),
    ],
)
def test_cpu(engine: Engine, isa: str, more: dict[str, Any], window: tuple[int, int]) -> None:
    k, v = cache(6)
    check_call(cpu_call(engine, isa=isa, **more), **expected(QUERY, k, v, window))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -1.0, 2.0, 0.0])])
def test_cpu_counts_alibi_from_the_query(engine: Engine, sinks: Tensor | None) -> None:
    call = cpu_call(engine, alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 1.0]), s_aux=sinks)
    assert str(call.certificate).startswith("faithful")


def test_cpu_softcap_and_sinks(engine: Engine) -> None:
    call = cpu_call(engine, softcap=2.0, s_aux=torch.tensor([0.3, -1.0, 2.0, 0.0]))
    assert call.softcap == 2.0 and str(call.certificate).startswith("faithful")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"isa": "neon"}, "for the instruction set 'neon' in torch.float32 is not known"),
        ({"isa": "amx"}, "for the instruction set 'amx' in torch.float32 is not known"),
        ({"kv_cache_dtype": "fp8"}, "argument kv_cache_dtype"),
        ({"k_scale": 0.5}, "argument k_scale"),
        ({"v_scale": 0.5}, "argument v_scale"),
        ({"dynamic_causal": torch.ones(3)}, "argument dynamic_causal"),
    ],
)
def test_cpu_with_what_is_not_known(engine: Engine, more: dict[str, Any], reason: str) -> None:
    with pytest.warns(hookattn.SkippedWarning, match=reason):
        made = trace(Model(engine, **more), QUERY)
    # One reason: what the kernel says, and not that a backend is unknown beside it.
    assert len(made) == 0 and [(s.path, reason in s.reason) for s in made.skipped] == [("attn", True)]


def test_the_kernel_outside_a_layer(engine: Engine) -> None:
    layer = Layer(engine, "alone")
    model = Written(lambda query, output: layer.attend(query, output), "output")
    with pytest.warns(hookattn.SkippedWarning, match="outside a layer of vLLM"):
        assert not len(trace(model, {"query": QUERY}))


def test_a_backend_that_no_tap_knows_is_named(engine: Engine) -> None:
    with pytest.warns(hookattn.SkippedWarning):
        made = trace(Model(engine, backend="FLASHINFER"), QUERY)
    (skipped,) = made.skipped
    assert skipped.path == "attn" and len(made) == 0
    for part in ("Layer", "FLASHINFER", "CPU_ATTN", "TRITON_ATTN", "attention_backend"):
        assert part in skipped.reason


@pytest.mark.parametrize("metadata", [None, {"model.attn": None}])
def test_a_run_that_measures_memory_attends_to_nothing(engine: Engine, metadata: Any) -> None:
    model, attends = Model(engine), engine.metadata
    with tracing(model) as made:
        engine.metadata = metadata
        model(QUERY)
        engine.metadata = attends
        model(QUERY)
    assert len(made) == 1 and not made.skipped


def test_attention_in_parts_is_said(engine: Engine) -> None:
    with pytest.warns(hookattn.SkippedWarning, match="2 parts that were merged"):
        made = trace(Model(engine, times=2), QUERY)
    assert len(made) == 2 and made.skipped[0].path == "attn"


# -------------------------------------------------------------------------------------------------- whose requests


def runner(give: Give, module: str, engine: Engine, model: nn.Module) -> Any:
    """The runner of one of the two modules, around a model."""

    class GPUModelRunner:
        def __init__(self) -> None:
            self.input_batch = types.SimpleNamespace(req_ids=["x"])
            self.vllm_config = types.SimpleNamespace(
                compilation_config=types.SimpleNamespace(
                    mode=types.SimpleNamespace(name="NONE"), cudagraph_mode=types.SimpleNamespace(name="NONE")
                )
            )
            self.graph = False

        def execute_model(self, scheduler_output: Any) -> Any:
            if module.endswith("gpu_model_runner"):
                self.input_batch.req_ids = list(scheduler_output.names)  # its order is settled in here
            else:
                self.prepare_inputs(scheduler_output)
            return QUERY if self.graph else model(QUERY)

        if not module.endswith("gpu_model_runner"):

            def prepare_inputs(self, scheduler_output: Any) -> Any:
                return types.SimpleNamespace(req_ids=list(scheduler_output.names))

    give(module, GPUModelRunner=GPUModelRunner)
    return GPUModelRunner()


RUNNERS = ["vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"]


def scheduled(*names: str) -> Any:
    return types.SimpleNamespace(names=names, total_num_scheduled_tokens=sum(QUERIES))


@pytest.mark.parametrize("module", RUNNERS)
def test_calls_know_their_requests(give: Give, engine: Engine, module: str) -> None:
    model = Model(engine)
    serves = runner(give, module, engine, model)
    with tracing(model) as made:
        serves.execute_model(scheduled("a", "b", "c"))
        serves.execute_model(scheduled("c", "a", "d"))
    assert [c.requests for c in made] == [("a", "b", "c"), ("c", "a", "d")]


@pytest.mark.parametrize("module", RUNNERS)
def test_who_serves_has_the_last_word(give: Give, engine: Engine, module: str) -> None:
    model = Model(engine)
    serves = runner(give, module, engine, model)
    with tracing(model) as made, requests_of_batch(["p", "q", "r"], ["r"]):
        serves.execute_model(scheduled("a", "b", "c"))
    assert made[0].requests == ("r",) and made[0].q.shape == (1, H, 1, D)


def test_sequences_that_fill_up_a_batch_are_of_nobody(give: Give, engine: Engine) -> None:
    filled = ends((*QUERIES, 0, 0))
    more = {
        "query_start_loc": filled,
        "seq_lens": torch.tensor([*KEYS, 0, 0], dtype=torch.int32),
        "block_table": torch.cat([TABLE, TABLE[:2]]),
    }
    model = Model(engine, **more)
    serves = runner(give, RUNNERS[0], engine, model)
    with tracing(model) as made:
        serves.execute_model(scheduled("a", "b", "c"))
    assert made[0].requests == ("a", "b", "c") and made[0].q.shape[0] == 3


@pytest.mark.parametrize("module", RUNNERS)
def test_a_batch_that_ran_out_of_sight_is_said(give: Give, engine: Engine, module: str) -> None:
    model = Model(engine)
    serves = runner(give, module, engine, model)
    serves.graph = True
    serves.vllm_config.compilation_config.cudagraph_mode.name = "FULL"
    with pytest.warns(hookattn.SkippedWarning, match="enforce_eager=True"), tracing(model) as made:
        serves.execute_model(scheduled("a", "b", "c"))
    assert "CUDA graphs FULL" in made.skipped[0].reason and len(made) == 0
