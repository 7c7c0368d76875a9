"""One case: its parameters, the source of its forward, and what it computes, all drawn from one seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .core import Unwritable
from .parts import write_forward
from .truth import Truth, compute
from .writer import Axes, Var, Writer, atoms, axes, pattern

LEAD = ("b", "w", "h", "g", "r", "t")


@dataclass
class Case:
    """What was drawn."""

    seed: int
    features: dict[str, str]
    sizes: dict[str, int]
    module: nn.Module
    inputs: tuple[Tensor, ...]
    source: str
    out_axes: Axes
    truth: Truth = field(repr=False)


class Attention(nn.Module):
    """Its forward is written for each case."""


class Mixer(nn.Module):
    """The same, in a class that is not named after attention."""


class Plain(nn.Module):
    """The plainest attention there is, which runs beside the one that is judged."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.p(x).chunk(3, -1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Beside(nn.Module):
    """A plain attention, then the one that is judged."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.plain = Plain()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        self.plain(torch.ones(1, 3, 8))
        return self.inner(*inputs)


def build(seed: int, fixed: dict[str, str] | None = None) -> Case:
    """The case of a seed; ``fixed`` sets features that are drawn otherwise."""
    for attempt in range(100):
        try:
            return Builder(seed, fixed or {}, attempt).build()
        except Unwritable:
            continue
    raise RuntimeError(f"nothing can be written with {fixed}")


class Builder:
    """Draws a case, one feature after the other, and writes its source as it goes."""

    def __init__(self, seed: int, fixed: dict[str, str], attempt: int = 0) -> None:
        self.seed = seed
        self.rng = random.Random(f"{seed}/{attempt}")
        self.more = random.Random(
            f"{seed}/{attempt}/more"
        )  # what came later: seeds that have none of it stay as they were
        self.features: dict[str, str] = dict(fixed)
        self.sizes: dict[str, int] = {}
        self.write = Writer(self.rng, self.sizes, self.features)
        self.generator = torch.Generator().manual_seed(seed)
        self.params: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self.t: dict[str, Any] = {}  # what the truth is computed from

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    # ---------------------------------------------------------------------------------------------------- build

    def build(self) -> Case:
        self.choose()
        self.extents()
        self.weights()
        out = write_forward(self)
        w = self.write
        w.line(f"return {out.name}")
        body = "\n".join("    " + line for line in w.lines)
        used = {a for a in "bthgrdewcsijp" if f"{a.upper()}" in _words(body)}
        prelude = self.prelude(used)
        arguments = ", ".join(self.inputs)
        source = f"def forward(self, {arguments}):\n" + "".join(f"    {line}\n" for line in prelude) + body + "\n"
        module = self.module(source)
        truth = compute(self.t, self.features, self.sizes)
        if self.features["beside"] == "yes":
            module = Beside(module)
        return Case(
            self.seed,
            self.features,
            dict(self.sizes),
            module.eval(),
            tuple(self.inputs.values()),
            source,
            out.axes,
            truth,
        )

    def module(self, source: str) -> nn.Module:
        cls = Attention if self.features["class"] == "Attention" else Mixer
        made = type(cls.__name__, (cls,), {})()
        for name, value in self.params.items():
            made.register_parameter(name, nn.Parameter(value))
        for name, value in self.buffers.items():
            made.register_buffer(name, value)
        for name, child in self.modules.items():
            made.add_module(name, child)
        names: dict[str, Any] = dict(_NAMES)
        exec(compile(source, f"<case {self.seed}>", "exec"), names)
        type(made).forward = names["forward"]
        return made

    def prelude(self, used: set[str]) -> list[str]:
        lines = []
        known = {
            g[0]: (name, i)
            for name, groups in self.input_axes.items()
            if name in ("x", "context")
            for i, g in enumerate(groups)
            if len(g) == 1
        }
        for a, other in (
            ("b", "1"),
            ("t", str(self.first["t"])),
            ("s", "T" if self.features["kind"] == "self" else ""),
        ):
            if a in known:
                lines.append(f"{a.upper()} = {known[a][0]}.shape[{known[a][1]}]")
            else:
                lines.append(f"{a.upper()} = {other}")
        lines += [f"{a.upper()} = {self.sizes[a]}" for a in "hgrdewcijp" if a in used and a in self.sizes]
        return lines

    # --------------------------------------------------------------------------------------------------- choices

    def choose(self) -> None:
        d = self.write.draw
        d("class", {"Attention": 1, "Mixer": 1})
        d("beside", {"no": 3, "yes": 1})
        d("kind", {"self": 75, "cross": 20, "pool": 5})
        d("heads", {"own": 55, "shared": 20, "grouped": 15, "one": 10})
        f = self.features
        if f["heads"] == "grouped":
            d("group order", {"g r": 2, "r g": 1})
        d("input", {"b t i": 70, "t b i": 12, "t i": 8, "b i t": 5, "b i y x": 5})
        projections = {"separate": 35, "per-head parameters": 12, "per-head linears": 5, "low rank": 4}
        if f["input"] in ("b i t", "b i y x"):
            projections = {"convolution": 1}
        elif f["kind"] == "self":
            projections |= {"fused chunk": 14, "fused view": 14, "fused split": 8, "convolution": 4}
        if f["kind"] != "pool" and f["heads"] == "shared" and "separate" in projections:
            projections |= {"latent": 15}
        if f["heads"] in ("grouped", "shared"):
            projections.pop("fused view", None)
            projections.pop("fused chunk", None)
        if f["kind"] != "self" and f["input"] == "b i y x":
            f["input"] = "b i t"
        d("projection", projections)
        d("score", {"dot": 84, "additive": 5, "distance": 4, "cosine": 3, "bilinear": 4})
        if f["projection"] == "latent":
            f["score"] = "dot"
        if f["heads"] == "shared" and f["score"] == "bilinear":
            f["score"] = "dot"
        d("windows", {"none": 80, "as batch": 10, "axis before heads": 5, "axis after heads": 5})
        if f["kind"] != "self" or f["input"] == "b i y x" or f["projection"] in ("latent",):
            f["windows"] = "none"
        if f["input"] == "t i" and f["windows"] == "as batch":
            f["windows"] = "axis before heads"
        d("positions", {"none": 55, "halves": 12, "pairs": 8, "complex": 9, "normalised": 8, "learned": 8})
        if f["projection"] == "latent" or f["kind"] == "pool":
            f["positions"] = "none"
        d("bias", {"none": 78, "learned": 8, "alibi": 7, "relative": 7})
        if f["windows"] != "none" or f["kind"] != "self":
            f["bias"] = "learned" if f["bias"] != "none" else "none"
        d(
            "pick",
            {
                "none": 75,
                "slice": 5,
                "index": 5,
                "gather": 3,
                "index_select": 4,
                "boolean": 3,
                "flip": 3,
                "roll": 3,
                "take_along_dim": 2,
            },
        )
        d("pick of", {"x": 3, "all": 4, "keys": 3, "queries": 3})
        if f["kind"] == "pool" or f["windows"] != "none" or f["input"] in ("b i y x", "b i t"):
            f["pick"] = "none"
        if f["pick"] == "none":
            f.pop("pick of")
        d("mask", {"none": 45, "causal": 25, "padding": 14, "window": 6, "causal padding": 6, "any": 4})
        d(
            "normalizer",
            {
                "softmax": 86,
                "sigmoid": 3,
                "relu": 2,
                "relu squared": 2,
                "softmax1": 2,
                "sparsemax": 2,
                "none": 1,
                "late": 2,
            },
        )
        d("chunking", {"none": 88, "heads": 5, "queries": 4, "batch": 3})
        if f["chunking"] == "batch" and f["input"] == "t i":
            f["chunking"] = "none"
        if f["chunking"] == "heads" and f["heads"] in ("grouped", "one"):
            f["chunking"] = "none"

        options = ["none"] * 18
        if f["chunking"] != "none":
            options += ["buffer"] * 8
        elif f["score"] == "dot" and f["normalizer"] == "softmax":
            options += ["softcap", "sinks", "temperature", "top-k", "sdpa", "sdpa"]
        chosen = self.more.choice(options)
        if chosen == "top-k" and f["pick"] in ("index", "gather", "index_select", "take_along_dim"):
            chosen = "none"  # a key that is there twice: which of them is among the largest is nobody's choice
        f.setdefault("more", chosen)
        if f["more"] not in options:
            f["more"] = "none"

    def extents(self) -> None:
        f, rng = self.features, self.rng
        some = (1, 2, 2, 3, 3, 4, 5, 6)
        z = self.sizes
        z["b"] = rng.choice((1, 2, 2, 3, 4))
        z["t"] = rng.choice((1, 2, 3, 4, 5, 6, 7, 8))
        z["s"] = rng.choice((1, 2, 3, 4, 5, 6, 7)) if f["kind"] != "self" else z["t"]
        heads = {"own": rng.choice((2, 2, 3, 4, 1)), "shared": rng.choice((2, 3, 4)), "one": 1}
        if f["heads"] == "grouped":
            z["g"], z["r"] = rng.choice(((2, 2), (2, 3), (3, 2), (2, 1), (4, 2)))
            z["h"] = z["g"] * z["r"]
        else:
            z["h"] = heads[f["heads"]]
        z["d"] = 2 * rng.choice((1, 2, 2, 3, 4))
        z["e"] = z["d"] if rng.random() < 0.8 else rng.choice(some)
        z["w"] = rng.choice((1, 2, 2, 3, 4))
        z["c"] = rng.choice((2, 3, 4, 6))
        z["i"] = rng.choice((4, 6, 8))
        z["j"] = z["i"] if rng.random() < 0.5 else rng.choice((4, 5, 7))
        # Small numbers that differ do not show what is exchanged where two extents agree, as they often do.
        if rng.random() < 0.35:
            a, b = rng.sample(["b", "t", "h", "d", "s"], 2)
            if not (f["heads"] in ("grouped", "one") and "h" in (a, b)) and a != "d":
                z[a] = min(z[b], 6)
        if f["kind"] == "self":
            z["s"] = z["t"]
        if f["input"] == "t i":
            z["b"] = 1
        if f["input"] == "b i y x":
            z["y"], z["x"] = rng.choice(((1, 1), (1, 2), (2, 2), (2, 3), (3, 2)))
            z["t"] = z["s"] = z["y"] * z["x"]
        if f["projection"] in ("fused chunk", "fused view", "latent", "fused split") and f["heads"] != "grouped":
            z["e"] = z["d"]
        if f["projection"] == "fused split" and f["heads"] in ("grouped", "shared"):
            z["e"] = z["d"]
        if f["score"] in ("distance", "cosine", "bilinear") and f["projection"] == "latent":
            f["score"] = "dot"
        self.first = dict(z)

    # --------------------------------------------------------------------------------------------------- weights

    def weights(self) -> None:
        """The parameters in their own axes: what the truth is computed from, whatever the module makes of them."""
        z, f = self.sizes, self.features
        x_width = z["i"]
        c_width = z["j"] if f["kind"] != "self" else z["i"]
        if f["kind"] != "self" and f["projection"] == "convolution":
            z["j"] = c_width = x_width
        h, d, e = z["h"], z["d"], z["e"]
        g = {"own": h, "shared": 1, "one": 1, "grouped": z.get("g", 1)}[f["heads"]]
        tokens = z["t"] * (z["w"] if f["windows"] != "none" else 1)
        self.t["x"] = self.randn(z["b"], tokens, x_width)
        if f["kind"] != "self":
            self.t["context"] = self.randn(z["b"], z["s"], c_width)
        gain = 1.6
        latent = f["projection"] == "latent"
        self.t["wq"] = self.randn(h, d, x_width, scale=gain / math.sqrt(x_width))
        if latent:
            self.t["wc"] = self.randn(z["c"], c_width, scale=gain / math.sqrt(c_width))
            self.t["up"] = self.randn(h, d, z["c"], scale=0.7)
            self.t["uv"] = self.randn(h, d, z["c"], scale=0.7)
        else:
            self.t["wk"] = self.randn(g, d, c_width, scale=gain / math.sqrt(c_width))
            self.t["wv"] = self.randn(g, e, c_width, scale=1 / math.sqrt(c_width))
        if f["kind"] == "pool":
            self.t["queries"] = self.randn(z["t"], h, d)
        f_width = self.rng.choice((x_width, 5))
        z["f"] = f_width
        self.t["wo"] = self.randn(f_width, h, e, scale=1 / math.sqrt(h * e))
        bias = self.write.draw("projection bias", {"yes": 3, "no": 1}) == "yes"
        if bias and not latent:
            self.t["bq"], self.t["bk"], self.t["bv"] = (self.randn(*n, scale=0.3) for n in ((h, d), (g, d), (g, e)))

    def linear(self, name: str, weight: Tensor, bias: Tensor | None) -> str:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        with torch.no_grad():
            made.weight.copy_(weight)
            if bias is not None:
                made.bias.copy_(bias)
        self.modules[name] = made
        return f"self.{name}"


def _words(text: str) -> set[str]:
    import re

    return set(re.findall(r"\b[A-Z]\b", text))


def _names() -> dict[str, Any]:
    from einops import rearrange, repeat

    return {"torch": torch, "F": torch.nn.functional, "math": math, "nn": nn, "rearrange": rearrange, "repeat": repeat}


_NAMES = _names()
__all__ = ["LEAD", "Builder", "Case", "Var", "atoms", "axes", "build", "pattern"]
