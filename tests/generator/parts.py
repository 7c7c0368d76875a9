"""What the forward of a case is made of, in the order in which it is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from .writer import Axes, Group, Var, Writer, atoms, axes, pattern

if TYPE_CHECKING:
    from .source import Builder


def write_forward(b: Builder) -> Var:
    f, w = b.features, b.write
    b.heads = _heads(b)
    x, context = _inputs(b)
    if f["windows"] == "as batch":
        x = context = _windows_as_batch(b, x)
    if f.get("pick of") == "x":
        same = x is context
        x = _pick(b, x, "t")
        _resize(b, x, "t", len(b.t["picked"]))
        if same:
            context = x
            w.line("S = T")
            b.sizes["s"] = b.sizes["t"]
    q, k, v = _PROJECTIONS[f["projection"]](b, x, context) if f["kind"] != "pool" else _pooled(b, context)
    q, k = _positions(b, q, k)
    q, k, v = _pick_after(b, q, k, v)
    o = _attend(b, q, k, v)
    return _output(b, o)


def _heads(b: Builder) -> Group:
    f = b.features
    if f["heads"] == "grouped":
        return tuple(f["group order"].split())
    if f["heads"] == "one" and b.write.draw("one head axis", {"yes": 1, "no": 1}) == "no":
        return ()
    return ("h",)


def _key_heads(b: Builder) -> Group:
    return {"own": ("h",), "shared": (), "one": b.heads, "grouped": ("g",)}[b.features["heads"]]


# ------------------------------------------------------------------------------------------------------- inputs


def _inputs(b: Builder) -> tuple[Var, Var]:
    f, w = b.features, b.write
    layout = f["input"]
    tokens = "t"
    if f["windows"] != "none":
        tokens = "(w t)" if w.draw("window order", {"w t": 3, "t w": 1}) == "w t" else "(t w)"
    x_axes = axes(layout.replace("t", tokens))
    b.out_like = x_axes
    b.inputs, b.input_axes = {}, {}
    z = b.sizes
    x = b.t["x"]
    if layout == "b i y x":
        b.inputs["x"] = x.transpose(1, 2).reshape(z["b"], z["i"], z["y"], z["x"])
        b.input_axes["x"] = axes(layout)
        return Var("x", x_axes, True), Var("x", x_axes, True)
    if f["kind"] != "pool":
        given = rearrange(x, f"b n i -> {_plain(layout).replace('t', 'n')}", **({"b": 1} if "b" not in layout else {}))
        b.inputs["x"] = given.contiguous()
        b.input_axes["x"] = x_axes
    xv = Var("x", x_axes, True)
    if f["kind"] == "self":
        return xv, xv
    c_axes = axes(layout.replace("t", "s").replace("i", "j"))
    b.inputs["context"] = rearrange(
        b.t["context"],
        f"b s j -> {_plain(layout).replace('t', 's').replace('i', 'j')}",
        **({"b": 1} if "b" not in layout else {}),
    ).contiguous()
    b.input_axes["context"] = c_axes
    return xv, Var("context", c_axes, True)


def _plain(layout: str) -> str:
    return layout if "b" in layout else f"(b {layout.split()[0]}) {layout.split()[1]}"


def _windows_as_batch(b: Builder, x: Var) -> Var:
    w = b.write
    order = w.draw("window batch", {"b w": 3, "w b": 1})
    folded = w.move(x, axes(f"({order}) t i"), "x")
    w.line("B = B * W")
    b.sizes["b"] *= b.sizes["w"]
    return Var(folded.name, axes("b t i"))


# -------------------------------------------------------------------------------------------------- projections


def _lead(x: Var) -> Axes:
    return tuple(g for g in x.axes if g not in (("i",), ("j",)))


def _flat(weight: Tensor, heads: Group, order: str) -> Tensor:
    return rearrange(weight, "h d i -> (h d) i" if order == "h d" else "h d i -> (d h) i")


def _flat_bias(bias: Tensor | None, order: str) -> Tensor | None:
    return None if bias is None else (bias if order == "h d" else bias.T).reshape(-1)


def _width(heads: Group, width: str, order: str) -> Group:
    return (*heads, width) if order == "h d" else (width, *heads)


def _widths_last(b: Builder, x: Var) -> Var:
    """For a linear layer: its width is the last axis."""
    width = next(g for g in x.axes if g in (("i",), ("j",)))
    if x.axes[-1] == width:
        return x
    return b.write.move(x, (*_lead(x), width), "x")


def _separate(b: Builder, x: Var, context: Var) -> tuple[Var, Var, Var]:
    w, order = b.write, b.write.draw("width order", {"h d": 9, "d h": 1})
    made = []
    same = x is context
    x = _widths_last(b, x)
    context = x if same else _widths_last(b, context)
    for name, source, heads, width in (
        ("q", x, b.heads, "d"),
        ("k", context, _key_heads(b), "d"),
        ("v", context, _key_heads(b), "e"),
    ):
        layer = b.linear(f"to_{name}", _flat(b.t[f"w{name}"], heads, order), _flat_bias(b.t.get(f"b{name}"), order))
        groups = (*_lead(source), _width(heads, width, order))
        made.append(w.new(f"{layer}({source.name})", groups, name, contiguous=source.contiguous))
    return tuple(made)


def _low_rank(b: Builder, x: Var, context: Var) -> tuple[Var, Var, Var]:
    w, z = b.write, b.sizes
    same = x is context
    x = _widths_last(b, x)
    context = x if same else _widths_last(b, context)
    down_q, down_c = b.randn(z["c"], b.t["wq"].shape[2], scale=0.6), b.randn(z["c"], b.t["wk"].shape[2], scale=0.6)
    made = []
    latent_q = w.new(f"{b.linear('down_q', down_q, None)}({x.name})", (*_lead(x), ("c",)), "c")
    latent = w.new(f"{b.linear('down_c', down_c, None)}({context.name})", (*_lead(context), ("c",)), "c")
    for name, source, heads, width, down in (
        ("q", latent_q, b.heads, "d", down_q),
        ("k", latent, _key_heads(b), "d", down_c),
        ("v", latent, _key_heads(b), "e", down_c),
    ):
        up = b.randn(*b.t[f"w{name}"].shape[:2], z["c"], scale=0.9)
        b.t[f"w{name}"] = torch.einsum("hdc,ci->hdi", up.double(), down.double())
        layer = b.linear(f"up_{name}", _flat(up, heads, "h d"), _flat_bias(b.t.get(f"b{name}"), "h d"))
        made.append(w.new(f"{layer}({source.name})", (*source.axes[:-1], (*heads, width)), name))
    return tuple(made)


def _fused_chunk(b: Builder, x: Var, context: Var) -> tuple[Var, Var, Var]:
    w = b.write
    x = _widths_last(b, x)
    order = w.draw("fused order", {"n h d": 3, "h n d": 1})
    qkv = _fused(b, x, order)
    if order == "h n d":
        heads = [(a,) for a in b.heads]
        words = ", ".join([*(w.size(g) for g in _lead(x)), *(w.size(g) for g in heads), "3 * D"])
        qkv = w.new(f"{qkv}.reshape({words})", (*_lead(x), *heads, ("n", "d")), "qkv")
        groups: Axes = (*qkv.axes[:-1], ("d",))
        qkv_name = qkv.name
    else:
        groups = (*_lead(x), (*b.heads, "d"))
        qkv_name = qkv
    names = _names3(w)
    w.line(
        f"{', '.join(names)} = "
        + w.some(
            {
                f"{qkv_name}.chunk(3, -1)": 3,
                f"{qkv_name}.chunk(3, dim={len(groups) - 1})": 1,
                f"torch.chunk({qkv_name}, 3, -1)": 1,
                f"torch.tensor_split({qkv_name}, 3, -1)": 0.5,
            }
        )
    )
    return _three(names, groups)


def _three(names: list[str], groups: Axes) -> tuple[Var, Var, Var]:
    """q, k and v that were one tensor: the width of v has its own name."""
    q, k, v = names
    return Var(q, groups), Var(k, groups), Var(v, tuple(tuple("e" if a == "d" else a for a in g) for g in groups))


def _names3(w: Writer) -> list[str]:
    w.count += 1
    return [f"{n}{w.count}" for n in "qkv"]


def _fused(b: Builder, x: Var, order: str) -> str:
    """A linear layer whose width is n (q, k or v), heads and d in this order."""
    parts = torch.stack([b.t["wq"], b.t["wk"], b.t["wv"]])
    weight = rearrange(parts, f"n h d i -> ({order}) i")
    bias = None
    if "bq" in b.t:
        bias = rearrange(torch.stack([b.t["bq"], b.t["bk"], b.t["bv"]]), f"n h d -> ({order})")
    return b.write.new(f"{b.linear('to_qkv', weight, bias)}({x.name})", (), "qkv").name


def _fused_view(b: Builder, x: Var, context: Var) -> tuple[Var, Var, Var]:
    w = b.write
    x = _widths_last(b, x)
    order = w.draw("fused order", {"n h d": 4, "h n d": 2, "h d n": 1})
    b.sizes["n"] = 3
    group = tuple(a for letter in order.split() for a in (b.heads if letter == "h" else (letter,)))
    qkv = Var(_fused(b, x, order), (*_lead(x), group), x.contiguous)
    w.line("N = 3")
    plain = tuple((a,) for a in atoms(qkv.axes))
    if w.chance(0.6):  # as in most vision transformers: moved at once, then taken apart
        rest = [g for g in plain if g not in (("n",), ("d",))]
        t = next(g for g in rest if g == ("t",))
        heads = [(a,) for a in b.heads]
        lead = [g for g in rest if g != t and g not in heads]
        order_of = w.some({"b h t": 4, "b t h": 1, "h b t": 1})
        chosen = {"b h t": [*lead, *heads, t], "b t h": [*lead, t, *heads], "h b t": [*heads, *lead, t]}[order_of]
        qkv = w.move(qkv, (("n",), *chosen, ("d",)), "qkv")
        if w.chance(0.25):
            folded = (("n",), tuple(atoms(chosen[:-1])), chosen[-1], ("d",)) if chosen[-1] == t else qkv.axes
            qkv = w.move(qkv, folded, "qkv")
    else:
        qkv = w.split(qkv, plain, "qkv")
    i = qkv.at("n")
    groups = tuple(g for g in qkv.axes if g != ("n",))
    names = _names3(w)
    options = {f"{qkv.name}.unbind({i})": 3, f"torch.unbind({qkv.name}, {i})": 1}
    at = ", ".join([":"] * i)
    options["[" + ", ".join(f"{qkv.name}[{at + ', ' if at else ''}{j}]" for j in range(3)) + "]"] = 2
    options["[" + ", ".join(f"{qkv.name}.select({i}, {j})" for j in range(3)) + "]"] = 1
    if i == 0:
        options[f"{qkv.name}"] = 1
    w.line(f"{', '.join(names)} = {w.some(options)}")
    return _three(names, groups)


def _fused_split(b: Builder, x: Var, context: Var) -> tuple[Var, Var, Var]:
    w = b.write
    x = _widths_last(b, x)
    parts = [("q", b.heads, "d"), ("k", _key_heads(b), "d"), ("v", _key_heads(b), "e")]
    weight = torch.cat([_flat(b.t[f"w{n}"], h, "h d") for n, h, _ in parts])
    bias = torch.cat([b.t[f"b{n}"].reshape(-1) for n, _, _ in parts]) if "bq" in b.t else None
    qkv = w.new(f"{b.linear('to_qkv', weight, bias)}({x.name})", (), "qkv").name
    ends = [0]
    for n, _, _ in parts:
        ends.append(ends[-1] + b.t[f"w{n}"].shape[0] * b.t[f"w{n}"].shape[1])
    groups = [(*_lead(x), (*h, width)) for _, h, width in parts]
    names = _names3(w)
    lengths = [j - i for i, j in itertools.pairwise(ends)]
    slices = [f"{qkv}[..., {i}:{j}]" for i, j in itertools.pairwise(ends)]
    narrow = [f"{qkv}.narrow(-1, {i}, {n})" for i, n in zip(ends, lengths, strict=False)]
    w.line(
        f"{', '.join(names)} = "
        + w.some(
            {
                f"{qkv}.split({lengths}, -1)": 3,
                f"torch.split({qkv}, {lengths}, dim=-1)": 2,
                ", ".join(slices): 3,
                ", ".join(narrow): 1,
            }
        )
    )
    return tuple(Var(n, g) for n, g in zip(names, groups, strict=True))


def _per_head_parameters(b: Builder, x: Var, context: Var) -> tuple[Var, Var, Var]:
    w = b.write
    made = []
    for name, source, heads, width in (
        ("q", x, b.heads, "d"),
        ("k", context, _key_heads(b), "d"),
        ("v", context, _key_heads(b), "e"),
    ):
        inside = "j" if ("j",) in source.axes else "i"
        weight = b.t[f"w{name}"]
        b.t.pop(f"b{name}", None)
        groups = [(a,) for a in heads]
        order = w.some({"h i d": 2, "i h d": 2, "h d i": 1})
        places = {"h": groups, "i": [(inside,)], "d": [(width,)]}
        axes_of = tuple(g for letter in order.split() for g in places[letter])
        if not heads:
            weight, order = weight[0], order.replace("h ", "")
            value = rearrange(weight, f"d i -> {order}")
        elif len(heads) == 2:
            first, second = (b.sizes[a] for a in heads)
            weight = weight.unflatten(0, (first, second))
            value = rearrange(weight, f"h k d i -> {order.replace('h', 'h k')}")
        else:
            value = rearrange(weight, f"h d i -> {order}")
        b.params[f"w_{name}"] = value.contiguous()
        lead = list(_lead(source))
        t = next(g for g in lead if "t" in g or "s" in g)
        rest = [g for g in lead if g != t]
        chosen = w.some({"b t h": 2, "b h t": 2, "h b t": 1})
        to = {"b t h": [*rest, t, *groups], "b h t": [*rest, *groups, t], "h b t": [*groups, *rest, t]}[chosen]
        made.append(w.einsum([source, Var(f"self.w_{name}", axes_of)], (*to, (width,)), name))
    return tuple(made)


def _per_head_linears(b: Builder, x: Var, context: Var) -> tuple[Var, Var, Var]:
    w = b.write
    made = []
    same = x is context
    x = _widths_last(b, x)
    context = x if same else _widths_last(b, context)
    for name, source, heads, width in (
        ("q", x, b.heads, "d"),
        ("k", context, _key_heads(b), "d"),
        ("v", context, _key_heads(b), "e"),
    ):
        weight, bias = b.t[f"w{name}"], b.t.get(f"b{name}")
        layers = []
        for i in range(weight.shape[0]):
            layers.append(nn.Linear(weight.shape[2], weight.shape[1], bias=bias is not None))
            with torch.no_grad():
                layers[-1].weight.copy_(weight[i])
                if bias is not None:
                    layers[-1].bias.copy_(bias[i])
        b.modules[f"to_{name}"] = nn.ModuleList(layers)
        lead = list(_lead(source))
        if not heads:
            made.append(w.new(f"self.to_{name}[0]({source.name})", (*lead, (width,)), name))
            continue
        place = w.rng.randrange(len(lead) + 1)
        form = w.some({"stack": 3, "cat": 1})
        if form == "stack":
            to = (*lead[:place], heads, *lead[place:], (width,))
            text = f"torch.stack([to(h) for to in self.to_{name} for h in [{source.name}]], {place})"
            text = f"torch.stack([to({source.name}) for to in self.to_{name}], {place})"
        else:
            to = (*lead, (*heads, width))
            text = f"torch.cat([to({source.name}) for to in self.to_{name}], -1)"
        made.append(w.new(text, to, name))
    return tuple(made)


def _convolution(b: Builder, x: Var, context: Var) -> tuple[Var, Var, Var]:
    w, f = b.write, b.features
    two = f["input"] == "b i y x"
    same = x is context

    def channels_first(source: Var) -> Var:
        if two:
            return source
        lead = list(_lead(source))
        t = next(g for g in lead if "t" in g or "s" in g)
        width = next(g for g in source.axes if g in (("i",), ("j",)))
        return w.move(source, (*[g for g in lead if g != t], width, t), "x")

    x = channels_first(x)
    context = x if same else channels_first(context)

    def layer(name: str, weight: Tensor, bias: Tensor | None) -> str:
        kind = nn.Conv2d if two else nn.Conv1d
        made = kind(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
        with torch.no_grad():
            made.weight.copy_(weight.reshape(made.weight.shape))
            if bias is not None:
                made.bias.copy_(bias)
        b.modules[name] = made
        return f"self.{name}"

    fused = same and f["heads"] in ("own",) and b.sizes["d"] == b.sizes["e"] and w.chance(0.5)
    f["convolution"] = ("2d" if two else "1d") + (" fused" if fused else "")
    if fused:
        parts = [_flat(b.t[f"w{n}"], b.heads, "h d") for n in "qkv"]
        bias = torch.cat([b.t[f"b{n}"].reshape(-1) for n in "qkv"]) if "bq" in b.t else None
        dim = w.some({"1": 3, "-3" if two else "-2": 1})
        if not two and x.axes[0] != ("b",):
            dim = "-2"
        names = _names3(w)
        w.line(f"{', '.join(names)} = {layer('to_qkv', torch.cat(parts), bias)}({x.name}).chunk(3, {dim})")
        made = list(_three(names, _after_conv(x, two, (*b.heads, "d"))))
    else:
        made = []
        for name, source, heads, width in (
            ("q", x, b.heads, "d"),
            ("k", context, _key_heads(b), "d"),
            ("v", context, _key_heads(b), "e"),
        ):
            bias = b.t.get(f"b{name}")
            called = layer(
                f"to_{name}", _flat(b.t[f"w{name}"], heads, "h d"), None if bias is None else bias.reshape(-1)
            )
            made.append(w.new(f"{called}({source.name})", _after_conv(source, two, (*heads, width)), name, True))
    if not two:
        return tuple(made)
    flat = []
    for var in made:  # b (h d) y x, whose rows and columns are one axis of tokens from here on
        s = "t" if var is made[0] else "s"
        text = w.some({f"{var.name}.flatten(2)": 3, f"{var.name}.reshape(B, -1, T)": 1})
        flat.append(w.new(text, (("b",), var.axes[1], (s,)), var.name[0]))
    return tuple(flat)


def _after_conv(x: Var, two: bool, width: Group) -> Axes:
    if two:
        return (("b",), width, ("y",), ("x",))
    return tuple(width if g in (("i",), ("j",)) else g for g in x.axes)


def _latent(b: Builder, x: Var, context: Var) -> tuple[Var, Var, Var]:
    w = b.write
    same = x is context
    x = _widths_last(b, x)
    context = x if same else _widths_last(b, context)
    c = w.new(
        f"{b.linear('to_c', b.t['wc'], None)}({context.name})", (*_lead(context), ("c",)), "c", context.contiguous
    )
    q = w.new(
        f"{b.linear('to_q', _flat(b.t['wq'], b.heads, 'h d'), None)}({x.name})", (*_lead(x), (*b.heads, "d")), "q"
    )
    lead = [(a,) for a in atoms(_lead(x))]
    q = w.split(q, (*lead, ("h",), ("d",)), "q")
    b.params["up"] = b.t["up"]
    b.params["uv"] = b.t["uv"]
    t = ("t",)
    rest = [g for g in lead if g != t]
    to = {"b t h": [*rest, t, ("h",)], "b h t": [*rest, ("h",), t], "h b t": [("h",), *rest, t]}[
        w.some({"b t h": 3, "b h t": 2, "h b t": 1})
    ]
    q = w.einsum([q, Var("self.up", axes("h d c"))], (*to, ("c",)), "q")
    return q, c, c


def _pooled(b: Builder, context: Var) -> tuple[Var, Var, Var]:
    w, _z = b.write, b.sizes
    context = _widths_last(b, context)
    queries = b.t["queries"]
    form = w.draw("learned queries", {"t h d": 2, "h t d": 2, "t (h d)": 2})
    if b.heads == ():
        q_axes = axes("t d")
        value = queries[:, 0]
    elif len(b.heads) == 2:
        q_axes = (("t",), (*b.heads, "d"))
        value = queries.flatten(1)
    else:
        value = rearrange(queries, f"t h d -> {form}")
        q_axes = axes(form)
    b.params["query"] = value.contiguous()
    q = Var("self.query", q_axes)
    made = [q]
    for name, heads, width in (("k", _key_heads(b), "d"), ("v", _key_heads(b), "e")):
        layer = b.linear(f"to_{name}", _flat(b.t[f"w{name}"], heads, "h d"), _flat_bias(b.t.get(f"b{name}"), "h d"))
        made.append(w.new(f"{layer}({context.name})", (*_lead(context), (*heads, width)), name, context.contiguous))
    if b.features["input"] != "t i" and w.draw("queries for each sequence", {"expanded": 1, "shared": 1}) == "expanded":
        made[0] = w.new(f"{q.name}.expand(B, {', '.join(['-1'] * len(q.axes))})", (("b",), *q.axes), "q")
    return tuple(made)


_PROJECTIONS = {
    "separate": _separate,
    "low rank": _low_rank,
    "fused chunk": _fused_chunk,
    "fused view": _fused_view,
    "fused split": _fused_split,
    "per-head parameters": _per_head_parameters,
    "per-head linears": _per_head_linears,
    "convolution": _convolution,
    "latent": _latent,
}


# ---------------------------------------------------------------------------------------------------- positions


def _rename_tokens(var: Var) -> Var:
    """Keys have their own atom for positions; in self-attention it is the one of the tokens up to here."""
    return Var(var.name, tuple(tuple("s" if a == "t" else a for a in g) for g in var.axes), var.contiguous)


def _widths_apart(b: Builder, var: Var, last: bool) -> Var:
    w = b.write
    plain = tuple((a,) for a in atoms(var.axes))
    if last and plain[-1] != ("d",):
        plain = (*[g for g in plain if g != ("d",)], ("d",))
    if all(len(g) == 1 for g in var.axes) and (not last or var.axes[-1] == ("d",)):
        return var
    if var.axes[-1] == ("d",) and w.chance(0.5):
        return var
    return w.move(var, plain, var.name[0])


def _positions(b: Builder, q: Var, k: Var) -> tuple[Var, Var]:
    f, w = b.features, b.write
    form = f["positions"]
    if form == "none":
        return q, k
    if w.chance(0.4):  # in the layout of the product, rather than as it was projected
        q, k = (_shuffled(b, y) for y in (q, k))
    if form in ("halves", "pairs", "complex"):
        q, k = (_widths_apart(b, y, last=True) for y in (q, k))
        return _rotate(b, q, "t"), _rotate(b, k, "s" if k.has("s") else "t")
    if form == "normalised":
        made = []
        q, k = (_widths_apart(b, y, last=False) for y in (q, k))
        for y in (q, k):
            i = y.at("d")
            dim = f"{i - len(y.axes) if w.chance(0.7) else i}"
            made.append(
                w.new(
                    w.some(
                        {
                            f"F.normalize({y.name}, dim={dim})": 2,
                            f"{y.name} / {y.name}.norm(dim={dim}, keepdim=True)": 1,
                            f"{y.name} * {y.name}.pow(2).sum({dim}, keepdim=True).rsqrt()": 1,
                        }
                    ),
                    y.axes,
                    y.name[0],
                )
            )
        return made[0], made[1]
    made = []
    q, k = (_widths_apart(b, y, last=False) for y in (q, k))
    for y in (q, k):
        tokens = "s" if y.has("s") else "t"
        n, name = b.sizes[tokens], f"p{y.name[0]}"
        b.t[name] = b.params[name] = b.randn(n, b.sizes["d"], scale=0.7)
        pos = w.fit(Var(f"self.{name}", ((tokens,), ("d",))), y.axes, "p")
        made.append(w.new(f"{y.name} + {pos.name}", y.axes, y.name[0]))
    return made[0], made[1]


def _shuffled(b: Builder, var: Var) -> Var:
    """Another order of the plain axes, now and then with the leading ones folded."""
    w = b.write
    plain = [(a,) for a in atoms(var.axes)]
    tokens = [g for g in plain if g in (("t",), ("s",))]
    width = [g for g in plain if g in (("d",), ("e",), ("c",))]
    heads = [g for g in plain if g in (("h",), ("g",), ("r",))]
    lead = [g for g in plain if g not in tokens + width + heads]
    form = w.some({"b h t": 5, "b t h": 3, "h b t": 2, "(b h) t": 3, "(h b) t": 1})
    to = {
        "b h t": [*lead, *heads, *tokens],
        "b t h": [*lead, *tokens, *heads],
        "h b t": [*heads, *lead, *tokens],
        "(b h) t": [tuple(atoms([*lead, *heads])), *tokens],
        "(h b) t": [tuple(atoms([*heads, *lead])), *tokens],
    }[form]
    return w.move(var, (*[g for g in to if g], *width), var.name[0])


def _rotate(b: Builder, y: Var, tokens: str) -> Var:
    f, w, z = b.features, b.write, b.sizes
    pairs = z["d"] // 2
    z["p"] = pairs
    n = z[tokens]
    angles = torch.outer(torch.arange(n, dtype=torch.float64), 1.7 ** -torch.arange(pairs, dtype=torch.float64))
    b.t["rotary"] = True
    to = tuple(("p",) if g == ("d",) else g for g in y.axes)
    where = w.draw("angles", {"buffer": 1, "computed": 1})
    upper = tokens.upper()
    if f["positions"] == "complex":
        if where == "buffer":
            b.buffers[f"freqs_{tokens}"] = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
            table = Var(f"self.freqs_{tokens}", ((tokens,), ("p",)))
        else:
            line = f"torch.outer(torch.arange({upper}).float(), 1.7 ** -torch.arange({pairs}).float())"
            angle = w.new(line, ((tokens,), ("p",)), "a")
            table = w.new(f"torch.polar(torch.ones_like({angle.name}), {angle.name})", angle.axes, "f")
        table = w.fit(table, to, "f")
        paired = w.some(
            {
                f"{y.name}.unflatten(-1, (-1, 2))": 1,
                f"{y.name}.float().reshape(*{y.name}.shape[:-1], -1, 2)": 2,
            }
        )
        turned = w.new(f"torch.view_as_complex({paired}.contiguous()) * {table.name}", to, "z")
        return w.new(f"torch.view_as_real({turned.name}).flatten(-2)", y.axes, y.name[0])
    made = []
    for name, value in (("cos", angles.cos()), ("sin", angles.sin())):
        if where == "buffer":
            b.buffers[f"{name}_{tokens}"] = value.float()
            table = Var(f"self.{name}_{tokens}", ((tokens,), ("p",)))
        else:
            line = f"torch.outer(torch.arange({upper}).float(), 1.7 ** -torch.arange({pairs}).float()).{name}()"
            table = w.new(line, ((tokens,), ("p",)), name[0])
        made.append(w.fit(table, to, name[0]))
    cos, sin = (m.name for m in made)
    n1 = y.name
    if f["positions"] == "halves":
        if w.chance(0.5):
            w.line(f"{n1}a, {n1}b = {n1}.chunk(2, -1)")
            text = f"torch.cat([{n1}a * {cos} - {n1}b * {sin}, {n1}b * {cos} + {n1}a * {sin}], -1)"
        else:
            half = f"torch.cat([-{n1}[..., {pairs}:], {n1}[..., :{pairs}]], -1)"
            text = f"{n1} * torch.cat([{cos}, {cos}], -1) + {half} * torch.cat([{sin}, {sin}], -1)"
    else:
        w.line(f"{n1}a, {n1}b = {n1}[..., 0::2], {n1}[..., 1::2]")
        text = f"torch.stack([{n1}a * {cos} - {n1}b * {sin}, {n1}b * {cos} + {n1}a * {sin}], -1).flatten(-2)"
    return w.new(text, y.axes, n1[0])


# -------------------------------------------------------------------------------------------------------- picks


def _pick(b: Builder, var: Var, tokens: str, index: list[int] | None = None) -> Var:
    """Some of the tokens; the size that the source knows changes with it."""
    f, w, rng = b.features, b.write, b.rng
    n = b.sizes[tokens]
    key = "picked" if tokens == "t" else "picked keys"
    form = f["pick"]
    if index is None:
        if form == "slice":
            index = list(range(n))[
                rng.choice([slice(1, None), slice(0, max(1, n - 1)), slice(None, None, 2)]) if n > 1 else slice(None)
            ]
        elif form == "flip":
            index = list(range(n))[::-1]
        elif form == "roll":
            index = [(i - 1) % n for i in range(n)]
        elif form == "boolean":
            index = sorted(rng.sample(range(n), rng.randint(1, n)))
        else:
            index = [rng.randrange(n) for _ in range(rng.choice([n, max(1, n - 1), max(1, n - 2)]))]
    b.t[key] = index
    i = var.at(tokens)
    before = ":, " * i
    after = len(var.axes) - i - 1
    name = var.name
    at = f"torch.tensor({index})"
    if form == "slice":
        step = index[1] - index[0] if len(index) > 1 else 1
        text = w.some(
            {
                f"{name}[{before}{index[0]}:{index[-1] + 1}{f':{step}' if step > 1 else ''}]": 3,
                **({f"{name}.narrow({i}, {index[0]}, {len(index)})": 1} if step == 1 else {}),
            }
        )
    elif form == "index":
        text = f"{name}[{before}{at}]"
    elif form == "index_select":
        text = w.some({f"{name}.index_select({i}, {at})": 1, f"torch.index_select({name}, {i}, {at})": 1})
    elif form in ("gather", "take_along_dim"):
        shape = ", ".join(["1"] * i + [str(len(index))] + ["1"] * after)
        sizes = ", ".join(w.size(g) if j != i else str(len(index)) for j, g in enumerate(var.axes))
        expanded = f"{at}.view({shape}).expand({sizes})"
        text = (
            f"{name}.gather({i}, {expanded})"
            if form == "gather"
            else f"torch.take_along_dim({name}, {at}.view({shape}), {i})"
        )
    elif form == "boolean":
        keep = [j in index for j in range(n)]
        text = f"{name}[{before}torch.tensor({keep})]"
    elif form == "flip":
        text = f"{name}.flip({i})"
    else:
        text = w.some({f"{name}.roll(1, {i})": 1, f"torch.roll({name}, 1, {i})": 1})
    made = w.new(text, var.axes, name[0])
    return made


def _pick_after(b: Builder, q: Var, k: Var, v: Var) -> tuple[Var, Var, Var]:
    f, w = b.features, b.write
    k, v = _rename_tokens(k), _rename_tokens(v)
    if f["pick"] == "none" or f["pick of"] == "x":
        return q, k, v
    if w.chance(0.6):
        q, k, v = (_shuffled(b, y) for y in (q, k, v))
    at = None
    if f["pick of"] in ("all", "queries"):
        q = _pick(b, q, "t")
        at = b.t["picked"]
    if f["pick of"] in ("all", "keys"):
        same = k.name == v.name
        k = _pick(b, k, "s", at if f["pick of"] == "all" and f["kind"] == "self" else None)
        v = k if same else _pick(b, v, "s", b.t["picked keys"])
        _resize(b, k, "s", len(b.t["picked keys"]))
    if at is not None:
        _resize(b, q, "t", len(at))
    return q, k, v


def _resize(b: Builder, var: Var, atom: str, n: int) -> None:
    b.sizes[atom] = n
    if (atom,) in var.axes:
        b.write.line(f"{atom.upper()} = {var.name}.shape[{var.at(atom)}]")
    else:
        b.write.line(f"{atom.upper()} = {n}")


# ------------------------------------------------------------------------------------------------------ products


def _attend(b: Builder, q: Var, k: Var, v: Var) -> Var:
    from .core import attend

    return attend(b, q, k, v)


# -------------------------------------------------------------------------------------------------------- output


def _output(b: Builder, o: Var) -> Var:
    f, w = b.features, b.write
    wo = b.t["wo"]
    heads = b.heads
    if f["projection"] == "latent":
        plain = tuple((a,) for a in atoms(o.axes))
        o = w.move(o, plain, "o")
        to = tuple(("e",) if g == ("c",) else g for g in o.axes)
        o = w.einsum([o, Var("self.uv", axes("h e c"))], to, "o")
    if f["windows"] == "as batch":
        order = f["window batch"]
        w.line("B = B // W")
        b.sizes["b"] //= b.sizes["w"]
        o = Var(
            o.name,
            tuple(
                tuple(order.split())
                if g == ("b",)
                else tuple(x for a in g for x in (order.split() if a == "b" else (a,)))
                for g in o.axes
            ),
        )
    out = tuple(g for g in b.out_like if g not in (("i",),))
    if f["input"] == "b i y x":
        out = axes("b t")
    form = w.draw("out", {"merged": 80, "einsum": 10, "none": 10})
    if form == "none":
        return w.move(o, (*out, (*heads, "e")), "o")
    if form == "einsum" and heads:
        plain = tuple((a,) for a in atoms(o.axes))
        o = w.move(o, plain, "o")
        groups = tuple((a,) for a in heads)
        value = wo.unflatten(1, [b.sizes[a] for a in heads]) if len(heads) == 2 else wo
        b.params["w_o"] = value.movedim(0, -1).contiguous()
        to = tuple((a,) for a in atoms(out))
        return w.einsum([o, Var("self.w_o", (*groups, ("e",), ("f",)))], (*to, ("f",)), "o")
    o = w.move(o, (*out, (*heads, "e")), "o")
    layer = b.linear("to_out", wo.flatten(1), None)
    return w.new(f"{layer}({o.name})", (*out, ("f",)), "o")


__all__ = ["Sequence", "math", "pattern", "write_forward"]
