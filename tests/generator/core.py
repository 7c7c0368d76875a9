"""From q, k and v to what each head returns: layouts, products, biases, masks, normalizers, cuts to pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .writer import Axes, Group, Var, Writer, atoms

if TYPE_CHECKING:
    from .source import Builder

S: Group = ("s",)


@dataclass
class Extra:
    """A tensor that joins the scores: a bias or a mask."""

    var: Var
    how: str


def attend(b: Builder, q: Var, k: Var, v: Var) -> Var:
    f = b.features
    layout = _layout(b, q)
    extras = _bias(b) + _mask(b)
    if f["more"] in ("sinks", "top-k", "sdpa") and f["keys"] != "last":
        f["more"] = "none"
    if f["chunking"] == "none":
        return _body(b, q, k, v, layout, extras)
    atom = {"heads": "h", "queries": "t", "batch": "b"}[f["chunking"]]
    return _loop(b, atom, q, k, v, layout, extras)


# -------------------------------------------------------------------------------------------------------- layout


def _layout(b: Builder, q: Var) -> Axes:
    """The axes of the scores."""
    f, w = b.features, b.write
    have = set(atoms(q.axes)) | ({"b"} if f["input"] != "t i" else set())
    batch: list[Group] = [("b",)] if "b" in have else []
    heads: list[Group] = [(a,) for a in b.heads]
    orders = {"b h t": 45, "b t h": 20, "h b t": 14, "h t b": 8, "t b h": 4, "t h b": 4}
    if f["projection"] == "latent":
        orders |= {"b t h": 60}
    if f["score"] in ("bilinear",):
        orders = {"b h t": 3, "b t h": 1, "h b t": 1}
    order = w.draw("layout", orders)
    parts: dict[str, list[Group]] = {"b": batch, "h": heads, "t": [("t",)]}
    if f["windows"] == "axis before heads":
        parts["b"] = [*batch, ("w",)]
    elif f["windows"] == "axis after heads":
        parts["h"] = [*heads, ("w",)]
    found = [g for letter in order.split() for g in parts[letter]]
    folds = {"none": 65, "leading": 25, "some": 10}
    if f["chunking"] != "none":
        folds = {"none": 1}
    fold = w.draw("folded", folds)
    if fold == "leading" and len(found) > 2:
        found = [tuple(atoms(found[:-1])), found[-1]]
    elif fold == "some" and len(found) > 1:
        i = w.rng.randrange(len(found) - 1)
        found = [*found[:i], (*found[i], *found[i + 1]), *found[i + 2 :]]
    else:
        f["folded"] = "none"
    last = [S] if w.draw("keys", {"last": 92, "before queries": 8}) == "last" else None
    if last is None:
        if len(found[-1]) > 1 or f["score"] not in ("dot", "bilinear"):
            f["keys"] = "last"
        else:
            return (*found[:-1], S, found[-1])
    return (*found, S)


# ------------------------------------------------------------------------------------------------ bias and masks


def _bias(b: Builder) -> list[Extra]:
    f, w, z = b.features, b.write, b.sizes
    h, t, s = z["h"], z["t"], z["s"]
    heads = (b.heads,) if b.heads else ()
    form = f["bias"]
    if form == "none":
        return []
    if form == "learned":
        value = b.randn(h, t, s)
        b.t["bias"] = value
        b.params["bias"] = value if heads else value[0]
        return [Extra(Var("self.bias", (*heads, ("t",), S)), "bias")]
    if form == "alibi":
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(h)])
        away = (torch.arange(s)[None] - torch.arange(t)[:, None]).float()
        b.t["bias"] = slopes[:, None, None] * away
        b.buffers["slopes"] = slopes
        w.line("away = torch.arange(S)[None] - torch.arange(T)[:, None]")
        if not heads:
            return [Extra(w.new("self.slopes * away", (("t",), S), "bias"), "bias")]
        return [Extra(w.new("self.slopes[:, None, None] * away", (*heads, ("t",), S), "bias"), "bias")]
    n = max(t, s)
    table = b.randn(2 * n - 1, h)
    index = torch.arange(t)[:, None] - torch.arange(s)[None] + n - 1
    b.t["bias"] = table[index].permute(2, 0, 1)
    b.params["table"] = table if heads else table[:, 0]
    w.line(f"index = torch.arange(T)[:, None] - torch.arange(S)[None] + {n - 1}")
    if not heads:
        return [Extra(w.new("self.table[index]", (("t",), S), "bias"), "bias")]
    made = w.new(w.some({"self.table[index]": 1, "F.embedding(index, self.table)": 1}), (("t",), S, heads[0]), "bias")
    return [Extra(w.move(made, (*heads, ("t",), S), "bias"), "bias")]


def _mask(b: Builder) -> list[Extra]:
    f, w, z, rng = b.features, b.write, b.sizes, b.rng
    t, s = z["t"], z["s"]
    form = f["mask"]
    if form == "none":
        return []
    if (f["windows"] != "none" and "padding" in form) or (f["input"] == "t i" and "padding" in form):
        form = f["mask"] = "causal"
    allowed = None
    made: list[Var] = []
    if "causal" in form or form == "window":
        width = 1 + rng.randrange(2)
        i, j = torch.arange(t)[:, None], torch.arange(s)[None]
        keep = (j <= i) if "causal" in form else (i - j).abs() <= width
        if form == "window" and not keep.any(-1).all():
            keep, form = j <= i, "causal"
            f["mask"] = "causal"
        allowed = keep[None, None]
        if "causal" in form:
            options = {
                "torch.ones(T, S, dtype=torch.bool).tril()": 3,
                "torch.tril(torch.ones(T, S)).bool()": 1,
                "~torch.triu(torch.ones(T, S, dtype=torch.bool), 1)": 1,
                "torch.arange(S)[None] <= torch.arange(T)[:, None]": 1,
                "self.keep[:T, :S]": 2,
            }
        else:
            options = {
                f"(torch.arange(T)[:, None] - torch.arange(S)[None]).abs() <= {width}": 2,
                "self.keep[:T, :S]": 1,
            }
        text = w.some(options)
        if "self.keep" in text:
            b.buffers["keep"] = torch.zeros(t + 1, s + 1, dtype=torch.bool)
            b.buffers["keep"][:t, :s] = keep
        made.append(w.new(text, (("t",), S), "keep"))
    if "padding" in form:
        lengths = [rng.randint(1, s) for _ in range(z["b"])]
        present = torch.arange(s)[None] < torch.tensor(lengths)[:, None]
        allowed = present[:, None, None] if allowed is None else allowed & present[:, None, None]
        if "causal" in form or rng.random() < 0.7:
            b.inputs["present"] = present
            b.input_axes["present"] = (("b",), S)
            made.append(Var("present", (("b",), S)))
        else:
            b.inputs["lengths"] = torch.tensor(lengths)
            b.input_axes["lengths"] = (("b",),)
            made.append(w.new("torch.arange(S)[None] < lengths[:, None]", (("b",), S), "keep"))
    if form == "any":
        groups: Axes = (("t",), S)
        shape: tuple[int, ...] = (t, s)
        full: tuple[int, ...] = (1, 1, t, s)
        if "axis" in f["windows"] and rng.random() < 0.6:
            groups, shape, full = (("w",), *groups), (z["w"], t, s), (z["w"], 1, t, s)
            b.t["mask by window"] = True
        elif f["windows"] == "none" and b.heads and rng.random() < 0.3:
            groups, shape, full = (b.heads, *groups), (z["h"], t, s), (1, z["h"], t, s)
        keep = torch.rand(shape, generator=b.generator) < 0.6
        keep[..., 0] = True
        allowed = keep.reshape(full)
        b.buffers["any"] = keep
        made.append(Var("self.any", groups))
    b.t["mask"] = allowed
    if len(made) == 2 and w.chance(0.5):
        first, second = made
        first = w.fit(first, (("b",), ("t",), S), "keep")
        second = w.fit(second, (("b",), ("t",), S), "keep")
        made = [w.new(f"{first.name} & {second.name}", (("b",), ("t",), S), "keep")]
    forms = {"fill": 35, "finfo": 12, "-1e9": 12, "add": 18, "where": 10, "in place": 8, "multiply add": 5}
    how = w.draw("mask by", forms)
    return [Extra(_additive(b, m) if how in ("add", "multiply add") else m, how) for m in made]


def _additive(b: Builder, mask: Var) -> Var:
    w = b.write
    fill = w.some({"float('-inf')": 3, "-1e9": 1, "torch.finfo(torch.float32).min": 1})
    if b.features["mask by"] == "multiply add":
        fill = "-1e9"
        return w.new(f"(1.0 - {mask.name}.float()) * {fill}", mask.axes, "add")
    return w.new(
        w.some(
            {
                f"torch.zeros({mask.name}.shape).masked_fill(~{mask.name}, {fill})": 2,
                f"torch.where({mask.name}, 0.0, {fill})": 1,
            }
        ),
        mask.axes,
        "add",
    )


# ---------------------------------------------------------------------------------------------------------- loops


def _loop(b: Builder, atom: str, q: Var, k: Var, v: Var, layout: Axes, extras: list[Extra]) -> Var:
    w, z, rng = b.write, b.sizes, b.rng
    n = z[atom]
    chunk = rng.randint(1, max(1, n - 1)) if atom == "t" or rng.random() < 0.2 else 1
    drop = atom != "t" and chunk == 1 and w.chance(0.7)  # by a number, which takes the axis away
    b.features["chunks"] = "by number" if drop else "by slice"
    q, k, v = (_plain_order(b, y, atom) for y in (q, k, v))
    if drop and layout[-1] == (atom,):
        drop = False
    upper = atom.upper()
    buffer = b.features["more"] == "buffer"
    if not buffer:
        w.line("parts = []")
    w.line(f"for i in range({upper}):" if drop else f"for i in range(0, {upper}, {chunk}):")
    w.indent += 1

    def cut(y: Var) -> Var:
        if not y.has(atom):
            return y
        at = ":, " * y.axes.index((atom,))
        if drop:
            return w.new(f"{y.name}[{at}i]", tuple(g for g in y.axes if g != (atom,)), y.name[0])
        return w.new(f"{y.name}[{at}i:i + {chunk}]", y.axes, y.name[0])

    whole_k = k
    q, k = cut(q), cut(k)
    v = k if v.name == whole_k.name else cut(v)
    extras = [
        Extra(cut(w.move(e.var, tuple((a,) for a in atoms(e.var.axes)), "m")) if e.var.has(atom) else e.var, e.how)
        for e in extras
    ]
    inner = tuple(g for g in layout if not (drop and g == (atom,)))
    before = z[atom]
    z[atom] = 1 if drop else 0  # 0: what a view may not leave to torch to say
    if not drop:
        if (atom,) not in q.axes:
            raise Unwritable("queries without the axis that is cut")
        w.line(f"{upper}_, {upper} = {upper}, {q.name}.shape[{q.at(atom)}]")
    o = _body(b, q, k, v, inner, extras)
    o = w.move(o, tuple((a,) for a in atoms(o.axes)), "o")
    made = o.axes
    if buffer:  # written into what is there already
        place = b.more.randrange(len(made) + 1) if drop else made.index((atom,))
        made = (*made[:place], (atom,), *made[place:]) if drop else made
        sizes = ", ".join(f"{upper}_" if g == (atom,) and not drop else w.size(g) for g in made)
        w.line(f"if i == 0: made = {b.more.choice(('torch.zeros', 'torch.empty'))}({sizes})")
        at = ":, " * place
        w.line(f"made[{at}i] = {o.name}" if drop else f"made[{at}i:i + {chunk}] = {o.name}")
    else:
        w.line(f"parts.append({o.name})")
    if not drop:
        w.line(f"{upper} = {upper}_")
    w.indent -= 1
    z[atom] = before
    if buffer:
        return Var("made", made)
    if drop:
        place = rng.randrange(len(o.axes))
        return w.new(f"torch.stack(parts, {place})", (*o.axes[:place], (atom,), *o.axes[place:]), "o")
    return w.new(f"torch.cat(parts, {o.at(atom)})", o.axes, "o")


def _plain_order(b: Builder, y: Var, atom: str) -> Var:
    """In axes of one atom each, the natural order of what is split: batch, heads, tokens, width."""
    w = b.write
    plain = [(a,) for a in atoms(y.axes)]
    width = [g for g in plain if g[0] in "dec"]
    rest = [g for g in plain if g not in width]
    if w.chance(0.7):
        rest.sort(key=lambda g: "bwhgrts".index(g[0]))
    return w.move(y, (*rest, *width), y.name[0])


# ----------------------------------------------------------------------------------------------------------- body


def _body(b: Builder, q: Var, k: Var, v: Var, layout: Axes, extras: list[Extra]) -> Var:
    f, w = b.features, b.write
    k, v = _repeated(b, k, v, layout)
    if not q.has("b") and any("b" in g and len(g) > 1 for g in layout):
        q = _repeat(b, q, "b")
    if f["more"] == "sdpa":
        o = _fused(b, q, k, v, layout, extras)
        if o is not None:
            return o
        f["more"] = "none"
    score = {"dot": _dot, "additive": _additive_score, "distance": _distance, "cosine": _cosine, "bilinear": _bilinear}
    scores = score[f["score"]](b, q, k, layout)
    if f["more"] == "softcap":
        b.t["softcap"] = cap = b.more.choice((1.5, 3.0, 5.0))
        scores = w.new(f"{cap} * torch.tanh({scores.name} / {cap})", scores.axes, "s")
    if f["more"] == "temperature":
        scores = _temperature(b, scores)
    extras = list(extras)
    if f["normalizer"] not in ("softmax", "late", "softmax1", "sparsemax", "sigmoid"):
        extras = [Extra(_boolean(b, e), "zero") if e.how != "bias" else e for e in extras]
    for e in extras:
        if e.how != "zero":
            scores = _join(b, scores, e)
    weights, late = _normalize(b, scores)
    for e in extras:
        if e.how == "zero":
            weights = _join(b, weights, e)
    if f["normalizer"] in ("softmax", "sigmoid"):
        form = w.draw("dropout", {"none": 3, "function": 1})
        if form == "function":
            weights = w.new(f"F.dropout({weights.name}, 0.1, self.training)", weights.axes, "w")
    o = _values(b, weights, v)
    if late is not None:
        total = w.fit(late, o.axes, "z")
        o = w.new(f"{o.name} / {total.name}", o.axes, "o")
    return o


def _fused(b: Builder, q: Var, k: Var, v: Var, layout: Axes, extras: list[Extra]) -> Var | None:
    """torch's own kernel, with heads and batch in the order of the layout; None: it does not take this layout."""
    f, w, z = b.features, b.write, b.sizes
    if f["projection"] == "latent":
        return None
    qa, ka, va = (_sided(layout, y, ("d",), False) for y in (q, k, v))
    if ka[-1] != () or () in ka[:-1] or () in qa or len(layout) < 3:
        return None
    scale = z["d"] ** -0.5 if f["positions"] != "normalised" else 4.0
    b.t["scale"], f["scale"] = scale, "scores"
    q1, k1 = w.move(q, (*qa, ("d",)), "q"), w.move(k, (*ka[:-1], S, ("d",)), "k")
    v1 = w.move(v, (*va[:-1], S, ("e",)), "v")
    words = []
    terms = []
    for e in extras:
        m = w.fit(e.var, layout, "m").name
        boolean = e.how not in ("bias", "add", "multiply add")
        terms.append((m, boolean))
    if len(terms) == 1 and terms[0][1]:
        words.append(f"attn_mask={terms[0][0]}")
    elif terms:
        spelled = [f"torch.zeros({m}.shape).masked_fill(~{m}, float('-inf'))" if boolean else m for m, boolean in terms]
        words.append(f"attn_mask={' + '.join(spelled)}")
    if scale != z["d"] ** -0.5 or b.more.random() < 0.3:
        words.append(f"scale={scale!r}")
    called = ", ".join([q1.name, k1.name, v1.name, *words])
    rows = [g for g in layout if g != S]
    return w.new(f"F.scaled_dot_product_attention({called})", (*rows, ("e",)), "o")


def _temperature(b: Builder, scores: Var) -> Var:
    """A learned factor for each head, as cosine attention has it."""
    w = b.write
    h = b.sizes["h"]
    value = 0.5 + torch.rand(h, generator=b.generator)
    b.t["temperature"] = value
    b.params["temperature"] = value if b.heads else value[0]
    if not b.heads:
        return w.new(f"{scores.name} * self.temperature", scores.axes, "s")
    return _join(b, scores, Extra(Var("self.temperature", (b.heads,)), "times"))


def _with_sinks(b: Builder, scores: Var) -> Var:
    """A learned logit for each head, which takes its share and is dropped."""
    w = b.write
    b.t["sinks"] = b.randn(b.sizes["h"])
    b.params["sinks"] = b.t["sinks"] if b.heads else b.t["sinks"][:1]
    column = Var("self.sinks", (b.heads,) if b.heads else ((),))
    if b.heads:
        column = w.fit(column, scores.axes, "m")
    n = len(scores.axes)
    lacking = n - len(column.axes)
    index = ", ".join(["None"] * lacking + ["..."]) if lacking else "..."
    sizes = ", ".join([*(w.size(g) for g in scores.axes[:-1]), "1"])
    full = w.new(f"torch.cat([{scores.name}, {column.name}[{index}].expand({sizes})], -1)", (), "s")
    weights = w.new(f"{full.name}.softmax(-1)", (), "w")
    return w.new(f"{weights.name}[..., :-1]", scores.axes, "w")


def _top(b: Builder, scores: Var) -> Var:
    """The few largest of each row."""
    w = b.write
    n = b.more.randint(1, max(1, b.sizes["s"] - 1))
    b.t["top"] = n
    w.line(f"top, at = {scores.name}.topk({n}, -1)")
    if b.more.random() < 0.5:
        return w.new(f"torch.zeros_like({scores.name}).scatter(-1, at, top.softmax(-1))", scores.axes, "w")
    text = f"{scores.name}.masked_fill({scores.name} < top[..., -1:], float('-inf'))"
    return w.new(f"{text}.softmax(-1)", scores.axes, "w")


def _boolean(b: Builder, e: Extra) -> Var:
    if e.how in ("add", "multiply add"):
        return b.write.new(f"{e.var.name} == 0", e.var.axes, "keep")
    return e.var


def _repeated(b: Builder, k: Var, v: Var, layout: Axes) -> tuple[Var, Var]:
    """Keys and values as the layout needs them: an axis of it is all theirs, or none of it."""
    w, f = b.write, b.features
    have = set(atoms(k.axes)) | {"s"}
    mixed = [g for g in layout if any(a in have for a in g) and not all(a in have for a in g)]
    missing = [a for g in mixed for a in g if a not in have and a in ("r", "h", "g", "w", "b")]
    if any("t" in g for g in mixed):
        raise Unwritable("queries folded with an axis of the keys")
    absent = {"grouped": "r", "shared": "h"}.get(f["heads"], "")
    whole = [g for g in layout if absent in g and set(g) <= have | {absent}]
    if whole and not missing and f["chunking"] != "heads" and w.chance(0.5 if absent == "r" else 0.15):
        missing = [absent]
    f["keys repeated"] = "yes" if missing else "no"
    if not missing:
        return k, v
    made = []
    same = k.name == v.name
    for y in (k,) if same else (k, v):
        for a in missing:
            y = _repeat(b, y, a)
        made.append(y)
    return made[0], made[-1]


def _repeat(b: Builder, y: Var, atom: str) -> Var:
    w, f, _z = b.write, b.features, b.sizes
    y = w.move(y, tuple((a,) for a in atoms(y.axes)), y.name[0])
    n = atom.upper()
    if atom == "r" and ("g",) in y.axes and w.chance(0.5):
        i = y.at("g")
        if f["group order"] == "g r":
            to = (*y.axes[:i], ("g", "r"), *y.axes[i + 1 :])
            return w.new(
                w.some(
                    {
                        f"{y.name}.repeat_interleave({n}, {i})": 2,
                        f"torch.repeat_interleave({y.name}, {n}, dim={i})": 1,
                    }
                ),
                to,
                y.name[0],
            )
        to = (*y.axes[:i], ("r", "g"), *y.axes[i + 1 :])
        times = ["1"] * len(y.axes)
        times[i] = n
        return w.new(
            w.some(
                {
                    f"{y.name}.repeat({', '.join(times)})": 2,
                    f"torch.cat([{y.name}] * {n}, {i})": 1,
                }
            ),
            to,
            y.name[0],
        )
    lead = [i for i, g in enumerate(y.axes) if g == ("g",)]
    place = lead[0] + w.rng.randrange(2) if lead else y.axes.index(S) if S in y.axes and w.chance(0.7) else 0
    one = w.new(f"{y.name}.unsqueeze({place})", (*y.axes[:place], (), *y.axes[place:]), y.name[0])
    words = ["-1"] * len(one.axes)
    words[place] = n
    to = (*one.axes[:place], (atom,), *one.axes[place + 1 :])
    times = ["1"] * len(words)
    times[place] = n
    return w.new(
        w.some(
            {
                f"{one.name}.expand({', '.join(words)})": 3,
                f"{one.name}.repeat({', '.join(times)})": 1,
            }
        ),
        to,
        y.name[0],
    )


class Unwritable(Exception):
    """What was drawn cannot be combined; the seed is drawn again."""


def _sided(layout: Axes, y: Var, width: Group, keys: bool) -> Axes:
    """The axes of one operand as they broadcast against the layout: all of a group, or 1."""
    have = set(atoms(y.axes))
    groups = tuple(g if all(a in have for a in g) else () for g in layout if g != S)
    return groups


def _scaled(b: Builder, q: Var, k: Var) -> tuple[Var, Var, str]:
    """The scale, where people put it; what is left to do to the scores."""
    w, z, f = b.write, b.sizes, b.features
    width = z["c"] if f["projection"] == "latent" else z["d"]
    value = width**-0.5 if f["positions"] != "normalised" else 4.0
    b.t["scale"] = value
    where = w.draw("scale", {"scores": 50, "query": 25, "both": 8, "key": 3, "none": 5})
    b.t["scale q"], b.t["scale k"] = 1.0, 1.0
    root = w.some({"D ** -0.5": 1, f"{value!r}": 2}) if width == z["d"] and value == z["d"] ** -0.5 else f"{value!r}"
    if where == "query":
        b.t["scale q"] = value
        q = w.new(w.some({f"{q.name} * {root}": 2, f"{q.name} / {1 / value!r}": 1}), q.axes, "q")
    elif where == "key":
        b.t["scale k"] = value
        k = w.new(f"{k.name} * {root}", k.axes, "k")
    elif where == "both":
        b.t["scale q"] = b.t["scale k"] = value**0.5
        q = w.new(f"{q.name} * {value**0.5!r}", q.axes, "q")
        k = w.new(f"{k.name} * {value**0.5!r}", k.axes, "k")
    elif where == "none":
        b.t["scale"] = 1.0
    text = w.some({f" * {root}": 2, f" / {1 / value!r}": 2, f".mul({root})": 1, f".div({1 / value!r})": 1})
    return q, k, text if where == "scores" else ""


def _dot(b: Builder, q: Var, k: Var, layout: Axes) -> Var:
    f, w = b.features, b.write
    width: Group = ("c",) if f["projection"] == "latent" else ("d",)
    q, k, after = _scaled(b, q, k)
    qa, ka = _sided(layout, q, width, False), _sided(layout, k, width, True)
    rows = [i for i, g in enumerate(layout) if g != S]
    last = layout[rows[-1]]
    options = {"einsum": 30.0, "sum": 4.0}
    if ka[-1] == () and qa[-1] == last:
        options |= {"matmul": 45, "@": 0, "transposed": 3}
        lead_k, lead_q = ka[:-1], qa[:-1]
        if len(layout) == 3 and lead_k[0] != () and lead_q[0] != ():
            options |= {"bmm": 40, "baddbmm": 8}
    f.pop("product", None) if f.get("product") not in (None, *options) else None
    product = w.draw("product", options)
    if product == "einsum":
        q = w.move(q, (*list(_einsum_order(b, qa)), width), "q")
        k = w.move(k, (*list(_einsum_order(b, (*ka, S))), width), "k")
        scores = w.einsum([q, k], layout, "s")
    elif product == "sum":
        q1 = _with_ones(w, q, (*_at(layout, qa, ()), width))
        k1 = _with_ones(w, k, (*_at(layout, ka, S), width))
        text = w.some({f"({q1.name} * {k1.name}).sum(-1)": 2, f"torch.mul({q1.name}, {k1.name}).sum(dim=-1)": 1})
        scores = w.new(text, layout, "s")
    else:
        scores = _matmul(b, q, k, layout, qa, ka, width, product)
    if after:
        scores = w.new(f"{scores.name}{after}", scores.axes, "s")
    return scores


def _einsum_order(b: Builder, groups: Axes) -> list[Group]:
    """An einsum takes its operands in any order."""
    found = [g for g in groups if g]
    if b.write.chance(0.3):
        b.rng.shuffle(found)
    return found


def _at(layout: Axes, groups: Axes, keys: Group) -> Axes:
    """Groups of an operand in the places of the layout, with 1 (or the keys) where the keys are."""
    rest = iter(groups)
    return tuple(keys if g == S else next(rest) for g in layout)


def _with_ones(w: Writer, y: Var, to: Axes) -> Var:
    y = w.move(y, tuple(g for g in to if g), y.name[0])
    return w.new(y.name + w.nones(to), to, y.name[0]) if () in to else y


def _matmul(b: Builder, q: Var, k: Var, layout: Axes, qa: Axes, ka: Axes, width: Group, product: str) -> Var:
    w = b.write
    q1 = _with_ones(w, q, (*qa, width))
    swapped = layout[-1] != S
    natural = w.chance(0.3)
    if natural:  # the keys come with their width before their positions
        k1 = _with_ones(w, k, (*ka[:-1], width, S))
        kt = k1.name
        k_rows = None
    else:
        k1 = _with_ones(w, k, (*ka[:-1], S, width))
        n = len(k1.axes)
        kt = k1.name + w.some(
            {".transpose(-1, -2)": 4, ".transpose(-2, -1)": 3, ".mT": 2, f".transpose({n - 2}, {n - 1})": 1}
        )
        k_rows = k1.name
    if swapped:
        left, right = (k_rows or f"{kt}.mT"), f"{q1.name}.transpose(-1, -2)"
    else:
        left, right = q1.name, kt
    if product == "transposed" and not swapped:
        left, right = (k_rows or f"{kt}.mT"), f"{q1.name}.mT"
        return w.new(f"torch.matmul({left}, {right}).transpose(-1, -2)", layout, "s")
    if product == "baddbmm":
        rows, columns = w.size(layout[1]), w.size(layout[2])
        text = f"torch.baddbmm(torch.empty({w.size(layout[0])}, {rows}, {columns}), {left}, {right}, beta=0, alpha=1.0)"
        if w.chance(0.3):
            text = f"torch.zeros({w.size(layout[0])}, {rows}, {columns}).baddbmm({left}, {right})"
        return w.new(text, layout, "s")
    if product == "bmm":
        return w.new(w.some({f"torch.bmm({left}, {right})": 3, f"{left}.bmm({right})": 1}), layout, "s")
    spelled = {f"{left} @ {right}": 3, f"torch.matmul({left}, {right})": 3, f"{left}.matmul({right})": 1}
    return w.new(w.some(spelled), layout, "s")


def _pairs(b: Builder, q: Var, k: Var, layout: Axes) -> tuple[Var, Var]:
    """q and k as they broadcast against each other, with the width last."""
    w = b.write
    qa, ka = _sided(layout, q, ("d",), False), _sided(layout, k, ("d",), True)
    return _with_ones(w, q, (*_at(layout, qa, ()), ("d",))), _with_ones(w, k, (*_at(layout, ka, S), ("d",)))


def _additive_score(b: Builder, q: Var, k: Var, layout: Axes) -> Var:
    w, z = b.write, b.sizes
    q1, k1 = _pairs(b, q, k, layout)
    heads = any("h" in g or "g" in g for g in layout) and w.chance(0.5) and b.features["chunking"] != "heads"
    vector = b.randn(z["h"], z["d"]) if heads else b.randn(z["d"])
    b.t["vector"] = b.params["vector"] = vector
    both = w.new(f"torch.tanh({q1.name} + {k1.name})", (*layout, ("d",)), "a")
    if heads:
        vec = w.fit(Var("self.vector", (b.heads, ("d",))), both.axes, "u")
        return w.new(f"({both.name} * {vec.name}).sum(-1)", layout, "s")
    return w.new(
        w.some(
            {
                f"({both.name} * self.vector).sum(-1)": 1,
                f"{both.name} @ self.vector": 2,
                f"F.linear({both.name}, self.vector[None]).squeeze(-1)": 1,
            }
        ),
        layout,
        "s",
    )


def _distance(b: Builder, q: Var, k: Var, layout: Axes) -> Var:
    w, _f = b.write, b.features
    qa, ka = _sided(layout, q, ("d",), False), _sided(layout, k, ("d",), True)
    options = {"differences": 2}
    if layout[-1] == S and ka[-1] == ():
        options |= {"cdist": 2, "expanded": 2}
    form = w.draw("distance", options)
    if form == "differences":
        q1, k1 = _pairs(b, q, k, layout)
        return w.new(f"-({q1.name} - {k1.name}).pow(2).sum(-1)", layout, "s")
    q1, k1 = _with_ones(w, q, (*qa, ("d",))), _with_ones(w, k, (*ka[:-1], S, ("d",)))
    if form == "cdist":
        return w.new(f"-torch.cdist({q1.name}, {k1.name}).pow(2)", layout, "s")
    lengths = f"{q1.name}.pow(2).sum(-1, keepdim=True) - {k1.name}.pow(2).sum(-1)[..., None, :]"
    return w.new(f"2 * {q1.name} @ {k1.name}.mT - {lengths}", layout, "s")


def _cosine(b: Builder, q: Var, k: Var, layout: Axes) -> Var:
    q1, k1 = _pairs(b, q, k, layout)
    return b.write.new(f"F.cosine_similarity({q1.name}, {k1.name}, dim=-1) * 4.0", layout, "s")


def _bilinear(b: Builder, q: Var, k: Var, layout: Axes) -> Var:
    w, z = b.write, b.sizes
    heads = b.heads == ("h",) and any("h" in g for g in layout) and not any(len(g) > 1 and "h" in g for g in layout)
    heads = heads and b.features["chunking"] != "heads"
    value = b.randn(z["h"], z["d"], z["d"], scale=0.5) if heads else b.randn(z["d"], z["d"], scale=0.5)
    b.t["matrix"] = b.params["matrix"] = value
    qa, ka = _sided(layout, q, ("d",), False), _sided(layout, k, ("d",), True)
    q = w.move(q, (*[g for g in qa if g], ("d",)), "q")
    k = w.move(k, (*[g for g in ka if g], S, ("d",)), "k")
    k = Var(k.name, (*k.axes[:-1], ("c",)))
    m = Var("self.matrix", (*([("h",)] if heads else []), ("d",), ("c",)))
    return w.einsum([q, m, k], layout, "s")


# ------------------------------------------------------------------------------------------------------- joining


def _join(b: Builder, y: Var, e: Extra) -> Var:
    """A bias or a mask, joined to the scores (or to weights, which are set to zero)."""
    w = b.write
    have = set(atoms(e.var.axes))
    mixed = any(any(a in have for a in g) and not all(a in have for a in g) for g in y.axes)
    target, back = y, None
    if mixed and w.chance(0.6):
        back = y.axes
        target = w.move(y, tuple((a,) for a in atoms(y.axes)), "s")
    m = w.fit(e.var, target.axes, "m").name
    n = target.name
    inverted = f"~{m}"
    if e.how == "in place":
        if back is not None:
            target = w.new(f"{n}.clone()", target.axes, "s")
            n = target.name
        w.line(
            f"{n}.masked_fill_({inverted}, float('-inf'))"
            if w.chance(0.6)
            else f"{n} += torch.zeros({m}.shape).masked_fill({inverted}, float('-inf'))"
        )
        made = target
    else:
        text = {
            "bias": w.some({f"{n} + {m}": 4, f"{n}.add({m})": 1, f"torch.add({n}, {m})": 1}),
            "fill": w.some(
                {
                    f"{n}.masked_fill({inverted}, float('-inf'))": 3,
                    f"{n}.masked_fill({m} == 0, -torch.inf)": 1,
                    f"torch.masked_fill({n}, {inverted}, -math.inf)": 1,
                }
            ),
            "finfo": f"{n}.masked_fill({inverted}, torch.finfo({n}.dtype).min)",
            "-1e9": f"{n}.masked_fill({m} == 0, -1e9)",
            "add": f"{n} + {m}",
            "multiply add": f"{n} + {m}",
            "where": w.some(
                {
                    f"torch.where({m}, {n}, float('-inf'))": 2,
                    f"torch.where({m}, {n}, torch.tensor(-1e9))": 1,
                    f"torch.where({inverted}, torch.full_like({n}, -torch.inf), {n})": 1,
                }
            ),
            "times": f"{n} * {m}",
            "zero": w.some({f"{n} * {m}": 1, f"{n}.masked_fill({inverted}, 0.0)": 1}),
        }[e.how]
        made = w.new(text, target.axes, "s")
    return made if back is None else w.move(made, back, "s")


# ---------------------------------------------------------------------------------------------------- normalizers


def _normalize(b: Builder, scores: Var) -> tuple[Var, Var | None]:
    f, w, z = b.features, b.write, b.sizes
    n = scores.name
    i = scores.at("s")
    dim = str(i - len(scores.axes)) if w.chance(0.8) else str(i)
    form = f["normalizer"]
    if f["more"] == "sinks":
        return _with_sinks(b, scores), None
    if f["more"] == "top-k":
        return _top(b, scores), None
    if form == "softmax":
        spelled = w.draw(
            "softmax", {"method": 40, "function": 20, "float32": 15, "module": 5, "exp": 8, "log": 6, "logsumexp": 6}
        )
        text = {
            "method": f"{n}.softmax({dim})" if w.chance(0.5) else f"{n}.softmax(dim={dim})",
            "function": w.some({f"torch.softmax({n}, dim={dim})": 1, f"F.softmax({n}, {dim})": 1}),
            "float32": f"F.softmax({n}, dim={dim}, dtype=torch.float32).to({n}.dtype)",
            "module": f"self.softmax({n})",
            "log": w.some({f"{n}.log_softmax({dim}).exp()": 1, f"torch.exp(F.log_softmax({n}, {dim}))": 1}),
            "logsumexp": f"({n} - {n}.logsumexp({dim}, keepdim=True)).exp()",
            "exp": "",
        }[spelled]
        if spelled == "module":
            b.modules["softmax"] = torch.nn.Softmax(dim=int(dim))
        if spelled == "exp":
            top = w.some(
                {
                    f"{n}.amax({dim}, keepdim=True)": 2,
                    f"{n}.max({dim}, keepdim=True).values": 1,
                    f"{n}.max(dim={dim}, keepdim=True)[0]": 1,
                }
            )
            e = w.new(
                w.some(
                    {
                        f"({n} - {top}).exp()": 2,
                        f"torch.exp({n} - {top})": 1,
                        f"torch.exp({n})": 0 if f["score"] == "distance" else 1,
                    }
                ),
                scores.axes,
                "e",
            )
            text = w.some(
                {
                    f"{e.name} / {e.name}.sum({dim}, keepdim=True)": 2,
                    f"{e.name} / {e.name}.sum({dim}).unsqueeze({dim})": 1,
                }
            )
        return w.new(text, scores.axes, "w"), None
    if form == "late":
        one = w.some({f"{n}.amax({dim}, keepdim=True)": 1, "0.0": 0 if f["score"] == "distance" else 0.3})
        e = w.new(f"({n} - {one}).exp()", scores.axes, "e")
        total = w.new(f"{e.name}.sum({dim})", tuple(g for g in scores.axes if g != S), "z")
        return e, total
    if form == "softmax1":
        spelled = w.draw("softmax1", {"exp": 2, "max": 1, "column": 1})
        if spelled == "exp":
            e = w.new(f"{n}.exp()", scores.axes, "e")
            text = f"{e.name} / (1 + {e.name}.sum({dim}, keepdim=True))"
        elif spelled == "max":
            top = w.new(f"{n}.amax({dim}, keepdim=True).clamp(min=0)", (), "m").name
            e = w.new(f"({n} - {top}).exp()", scores.axes, "e")
            text = f"{e.name} / ((-{top}).exp() + {e.name}.sum({dim}, keepdim=True))"
        else:
            column = f"torch.zeros_like({n}.narrow({dim}, 0, 1))"
            text = f"torch.cat([{n}, {column}], {dim}).softmax({dim}).narrow({dim}, 0, S)"
        return w.new(text, scores.axes, "w"), None
    if form == "sparsemax":
        name = n
        e = w.new(f"{name}.sort({dim}, descending=True).values", scores.axes, "u").name
        c = w.new(f"{e}.cumsum({dim}) - 1", scores.axes, "c").name
        shape = ", ".join("-1" if j == i else "1" for j in range(len(scores.axes)))
        r = w.new(f"torch.arange(1, S + 1).view({shape})", scores.axes, "r").name
        k = w.new(f"({e} * {r} > {c}).sum({dim}, keepdim=True)", scores.axes, "n").name
        return w.new(f"({name} - {c}.gather({dim}, {k} - 1) / {k}).clamp(min=0)", scores.axes, "w"), None
    if form == "relu squared":
        w.line("n = float(S)")
    text = {
        "sigmoid": w.some({f"{n}.sigmoid()": 1, f"torch.sigmoid({n} - {math.log(4)!r})": 1}),
        "relu": w.some({f"{n}.relu()": 1, f"F.relu({n}) / S": 1}),
        "relu squared": w.some({f"torch.relu({n}) ** 2 / n": 1, f"F.relu({n}).square() / n": 1}),
        "none": f"{n} / S",
    }[form]
    b.t["normalizer shift"] = math.log(4) if " - " in text else 0.0
    b.t["normalizer divisor"] = z["s"] if "/ S" in text or "/ n" in text else 1
    return w.new(text, scores.axes, "w"), None


# --------------------------------------------------------------------------------------------------------- values


def _values(b: Builder, weights: Var, v: Var) -> Var:
    f, w = b.features, b.write
    width: Group = ("c",) if f["projection"] == "latent" else ("e",)
    layout = weights.axes
    if layout[-1] != S and w.chance(0.4):
        weights = w.new(f"{weights.name}.transpose(-1, -2)", (*layout[:-2], layout[-1], S), "w")
        layout = weights.axes
    if len(layout) > 3 and all(len(g) == 1 for g in layout) and layout[-1] == S and w.chance(0.06):
        rest = list(layout[:-1])
        b.rng.shuffle(rest)
        weights = w.move(weights, (*rest, S), "w")
        layout = weights.axes
    va = _sided(layout, v, width, True)
    rows = [g for g in layout if g != S]
    options = {"einsum": 30.0, "sum": 3.0}
    if va[-1] == ():
        options |= {"matmul": 50}
        if len(layout) == 3 and va[0] != ():
            options |= {"bmm": 40}
    like = f.get("product")
    if like in ("einsum", "bmm", "matmul") and like in options:
        options[like] *= 4
    f.pop("value product", None) if f.get("value product") not in (None, *options) else None
    product = w.draw("value product", options)
    if product == "einsum":
        v = w.move(v, (*_einsum_order(b, (*va, S)), width), "v")
        to = [*rows, width]
        if w.chance(0.3):
            to = [*b.rng.sample(rows, len(rows)), width]
        return w.einsum([weights, v], tuple(to), "o")
    if product == "sum":
        v1 = _with_ones(w, v, (*_at(layout, va, S), width))
        i = layout.index(S) - len(layout) - 1
        return w.new(f"({weights.name}[..., None] * {v1.name}).sum({i})", (*rows, width), "o")
    v1 = _with_ones(w, v, (*va[:-1], S, width))
    left = weights.name if layout[-1] == S else f"{weights.name}.mT"
    if product == "bmm":
        return w.new(w.some({f"torch.bmm({left}, {v1.name})": 3, f"{left}.bmm({v1.name})": 1}), (*rows, width), "o")
    spelled = {f"{left} @ {v1.name}": 3, f"torch.matmul({left}, {v1.name})": 3, f"{left}.matmul({v1.name})": 1}
    return w.new(w.some(spelled), (*rows, width), "o")
