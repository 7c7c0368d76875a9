"""The viewer's module by itself: what it is built of, and that the numbers it reads and derives are the trace's own."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import hookattn
from tests import reference
from tests.browser.conftest import ORIGIN, VIEWER, serve

pytestmark = pytest.mark.browser
BUNDLE = VIEWER / "hookattn-viewer.js"
OPEN = """const { Trace, served } = await import("/hookattn-viewer.js");
const trace = await Trace.open(await served("/trace.safetensors"));
const pack = (x) => {
  const bytes = new Uint8Array(Float64Array.from(x).buffer);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
};
"""


# ---------------------------------------------------------------------------------------------------- the bundle


def test_the_bundle_is_of_these_sources() -> None:
    digest = hashlib.sha256()
    names = [p.relative_to(VIEWER).as_posix() for p in (VIEWER / "src").rglob("*.*")]
    for name in sorted([*names, "../palette.json", "build.mjs", "package-lock.json"]):
        digest.update(f"{name}\n".encode() + (VIEWER / name).read_bytes() + b"\n")
    said = BUNDLE.read_text("utf-8").rstrip().rsplit("\n", 1)[-1]
    assert said == f"// sources: {digest.hexdigest()}", "stale: run `npm run build` in hookattn/render/viewer"


def test_the_sources_build_the_bundle(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (VIEWER / "node_modules" / "esbuild").is_dir():
        pytest.skip("needs node, and `npm ci` in hookattn/render/viewer")
    subprocess.run([node, "build.mjs", "--out", tmp_path / "made.js"], cwd=VIEWER, check=True)
    assert (tmp_path / "made.js").read_bytes() == BUNDLE.read_bytes()
    subprocess.run([node, "node_modules/typescript/bin/tsc", "--noEmit"], cwd=VIEWER, check=True)


def test_the_bundle_is_small_and_reaches_nowhere() -> None:
    text = BUNDLE.read_text("utf-8")
    assert len(text.encode()) < 240_000
    allowed = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml", "http://www.w3.org/1998/Math/MathML"}
    assert set(re.findall(r"https?://[\w./-]+", text)) <= allowed
    assert not re.search(r"\beval\(|new Function\(|document\.write", text)
    sources = "".join(p.read_text("utf-8") for p in (VIEWER / "src").rglob("*.ts*"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|dangerously", sources, re.IGNORECASE)
    lock = (VIEWER / "package-lock.json").read_text()
    assert "resolved" not in lock and "http" not in re.sub(r'"url": "[^"]*"', "", lock)


# ------------------------------------------------------------------------------------------------------- numbers


def run(page: Any, trace: Path, body: str) -> Any:
    serve(page, {"index.html": "<!doctype html>", "hookattn-viewer.js": BUNDLE, "trace.safetensors": trace})
    page.goto(f"{ORIGIN}/index.html")
    return page.evaluate(f"async () => {{ {OPEN} {body} }}")


def unpack(text: str, *shape: int) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float64).reshape(shape)


def heads(page: Any, path: Path, field: str, call: int = 0) -> Tensor:
    """A field of one call as the viewer has it: B H rows cols, float64; None where it says that there is none."""
    body = f"""const call = trace.calls[{call}]; const out = []; const {{ B, H }} = call.extents;
    for (let b = 0; b < B; b++) for (let h = 0; h < H; h++) out.push(await trace.head(call, "{field}", b, h));
    return [B, H, out[0].rows, out[0].cols, pack(out.flatMap((m) => [...m.data]))];"""
    *shape, data = run(page, path, body)
    return unpack(data, *shape)


def attention(**changes: Any) -> hookattn.Trace:
    """A trace of one fused call on random q (2 4 5 8) and k, v of two heads (2 2 7 8), a ragged mask."""
    generator = torch.Generator().manual_seed(3)

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    dtype = changes.pop("model_dtype", torch.float32)
    shapes = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)
    parts = [torch.randn(shape, generator=generator).mul(2).to(dtype) for shape in shapes]
    mask = torch.rand(2, 1, 5, 7, generator=generator) > 0.3
    mask[0, 0, 2] = False
    return hookattn.trace(Attend(), (*parts, mask), **changes)


def content(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document of a trace file and its tensors, in memory of their own."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return json.loads(file.metadata()["hookattn"]), tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("field", ["q", "k", "v", "scores", "mask", "weights", "output"])
def test_each_number_is_read_as_it_is_stored(
    open_page: Callable[..., Any], tmp_path: Path, dtype: torch.dtype, field: str
) -> None:
    trace = attention(model_dtype=dtype)
    path = Path(trace.save(tmp_path / "t.safetensors"))
    expected = trace[0].get(field).double()
    if field in "kv":
        expected = expected.repeat_interleave(2, 1)
    if field == "mask":
        expected = expected.expand(2, 4, 5, 7)
    assert torch.equal(heads(open_page(), path, field), expected)


def test_weights_that_were_left_out_are_derived(open_page: Callable[..., Any], tmp_path: Path) -> None:
    trace = attention()
    path = Path(trace.save(tmp_path / "t.safetensors", compact=True))
    assert not any(name.endswith(("weights", "scores")) for name in content(path)[1])
    call = trace[0]
    scores, weights, _ = reference.reference_attention(call.q, call.k, call.v, scale=call.scale, mask=call.mask)
    mine = heads(open_page(), path, "weights")
    assert (mine - weights).abs().max() < 1e-6 and torch.all(mine[0, :, 2] == 0)
    assert (heads(open_page(), path, "scores") - scores).abs().max() < 1e-5


@pytest.mark.parametrize("workers", [True, False])
def test_large_heads_are_derived_beside_the_page_or_on_it(
    open_page: Callable[..., Any], tmp_path: Path, workers: bool
) -> None:
    """In several parts, of an odd number of rows and keys that no step divides, some of which see nothing."""
    generator = torch.Generator().manual_seed(4)
    q, k = (torch.randn(1, h, n, 64, generator=generator) for h, n in ((2, 1101), (1, 1099)))
    mask = torch.rand(1, 1, 1101, 1099, generator=generator) > 0.4
    mask[..., :7] = mask[..., 1090:] = False
    mask[:, :, [0, 500, 1100]] = False

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)

    call = (trace := hookattn.trace(Attend(), (q, k)))[0]
    page = open_page()
    page.add_init_script(
        """globalThis.jobs = 0; const post = Worker.prototype.postMessage;
        Worker.prototype.postMessage = function (...told) { jobs++; post.apply(this, told); };"""
        if workers
        else "globalThis.jobs = 0; delete globalThis.Worker;"
    )
    path = Path(trace.save(tmp_path / "t.safetensors", compact=True))
    mine = heads(page, path, "weights")
    assert page.evaluate("jobs") == (4 if workers else 0), "two heads in two parts"
    scores, weights, _ = reference.reference_attention(call.q, call.k, call.v, scale=call.scale, mask=call.mask)
    assert (mine - weights).abs().max() < 1e-6
    assert torch.all(mine[:, :, [0, 500, 1100]] == 0) and torch.all(mine[~mask.expand(mine.shape)] == 0)
    assert (heads(page, path, "scores") - scores).abs().max() < 2e-5
    rows = "const m = await trace.rows(trace.calls[0], 'weights', 0, 1, [3, 6], [499, 502]); return pack(m.data);"
    some = unpack(run(page, path, rows), 6, 1099)
    assert torch.equal(some, mine[0, 1, [3, 4, 5, 499, 500, 501]])


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "bloom", "t5"])
def test_sinks_softcap_window_and_bias_too(open_page: Callable[..., Any], tmp_path: Path, name: str) -> None:
    from tests import tiny_models

    model = getattr(tiny_models, name)("eager" if name != "t5" else "sdpa")
    tokens = {"input_ids": tiny_models.ids()}
    if name == "t5":
        tokens["decoder_input_ids"] = tiny_models.ids(5)
    trace = hookattn.trace(model, tokens)
    path = Path(trace.save(tmp_path / "t.safetensors", compact=True))
    for i, call in enumerate(trace):
        arguments = {name: getattr(call, name) for name in ("scale", "bias", "mask", "softcap", "sinks")}
        _, weights, _ = reference.reference_attention(call.q, call.k, call.v, **arguments)
        assert (heads(open_page(), path, "weights", i) - weights).abs().max() < 2e-6, call


def test_other_dtypes_and_codes(open_page: Callable[..., Any], tmp_path: Path) -> None:
    """Every 8-bit float, NaN and infinities among them, integers beyond float32, and coded weights."""
    trace = attention()
    path = Path(trace.save(tmp_path / "t.safetensors"))
    document, tensors = content(path)
    codes = torch.arange(256, dtype=torch.uint8)
    floats = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
    added = {str(d).removeprefix("torch."): codes.clone().view(d) for d in floats}
    added |= {"int64": torch.tensor([-(2**53), 2**40 + 1]), "int16": torch.tensor([-3, 300], dtype=torch.int16)}
    added["float16"] = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    name = document["calls"][0]["fields"]["weights"]
    tensors[name] = (tensors[name].sqrt() * 255).round().to(torch.uint8)
    document["coding"] = {name: {"kind": "sqrt8", "error": 0.004}}
    save_file({**tensors, **added}, path, {"hookattn": json.dumps(document)})
    page = open_page()
    for key, tensor in added.items():
        found = unpack(run(page, path, f"return pack((await trace.tensor('{key}')).data);"), -1)
        assert torch.equal(found.nan_to_num(-7.5), tensor.double().nan_to_num(-7.5)), key
    expected = (tensors[name].double() / 255) ** 2
    assert (heads(page, path, "weights") - expected).abs().max() < 1e-7


# -------------------------------------------------------------------------------------------------------- errors


def refused(page: Any, path: Path) -> str:
    serve(page, {"index.html": "<!doctype html>", "hookattn-viewer.js": BUNDLE, "trace.safetensors": path})
    page.goto(f"{ORIGIN}/index.html")
    body = f"async () => {{ try {{ {OPEN} }} catch (error) {{ return error.message; }} return 'opened'; }}"
    return str(page.evaluate(body))


def test_what_is_no_trace_is_refused_with_the_reason(open_page: Callable[..., Any], tmp_path: Path) -> None:
    path = Path(attention().save(tmp_path / "t.safetensors"))
    raw = path.read_bytes()
    document, tensors = content(path)
    assert refused(open_page(), path) == "opened"
    path.write_bytes(raw[:-8])
    assert "cut short" in refused(open_page(), path)
    path.write_bytes(b"\xff" * 64)
    assert "not a whole safetensors file" in refused(open_page(), path)
    save_file(tensors, path)
    assert "not a trace" in refused(open_page(), path)
    save_file(tensors, path, {"hookattn": json.dumps({**document, "format_version": [2, 0]})})
    assert "2.0" in refused(open_page(), path) and "1.x" in refused(open_page(), path)


def test_numbers_that_json_has_no_word_for_do_not_stop_it(open_page: Callable[..., Any], tmp_path: Path) -> None:
    path = Path(attention().save(tmp_path / "t.safetensors"))
    document, tensors = content(path)
    document["model"]["config"] = {"limit": float("inf"), "text": 'Infinity, "NaN"'}
    save_file(tensors, path, {"hookattn": json.dumps(document)})
    read = run(open_page(), path, "return trace.document.model.config;")
    assert read == {"limit": "Infinity", "text": 'Infinity, "NaN"'}


def test_a_file_that_changes_is_noticed(open_page: Callable[..., Any], tmp_path: Path) -> None:
    path = Path(attention().save(tmp_path / "t.safetensors"))
    page = open_page()
    run(page, path, "window.trace = trace;")
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    said = page.evaluate("() => trace.head(trace.calls[0], 'weights', 0, 0).catch((error) => error.message)")
    assert "has changed since it was opened" in said
