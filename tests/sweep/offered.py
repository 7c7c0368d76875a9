"""The attentions that an eager model hands out itself, against the weights of a trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import hookattn

from .cases import run

if TYPE_CHECKING:
    from .check import Row

TOLERANCE = 1e-4
# What a model hands out as attentions and is not the weights that met the values: (type, part of the name, why).
NOT_WEIGHTS = (
    ("chameleon_vqgan", "attentions", "hands out the attention's output under this name"),
    ("florence_vision", "attentions", "hands out the attention's output under this name"),
    ("granite_speech", "attentions", "hands out the attention's output under this name"),
    (
        "groupvit",
        "vision_model_output.attentions",
        "hands out the assignment of patches to groups: a softmax over groups",
    ),
    ("groupvit_vision", "attentions", "hands out the assignment of patches to groups: a softmax over groups"),
    ("minimax", "attentions", "hands out the state of its linear attention among its attentions"),
    ("mm-grounding-dino", "decoder_attentions[2]", "deformable sampling"),
    ("grounding-dino", "decoder_attentions[2]", "deformable sampling"),
    ("sam", "mask_decoder_attentions", "hands out the attention's output under this name"),
    ("sam2", "attentions", "hands out the attention's output under this name"),
    ("sam2", "vision_attentions", "hands out the attention's output under this name"),
    ("big_bird", "attentions", "puts its blocks together to one matrix, which no kernel formed"),
    ("bigbird_pegasus", "encoder_attentions", "puts its blocks together to one matrix, which no kernel formed"),
    ("radio", "attentions", "puts the images of a batch together to one matrix, which no kernel formed"),
    ("rf_detr", "cross_attentions", "deformable sampling"),
    ("prophetnet", "cross_attentions", "hands out the scores before the softmax"),
    ("prophetnet", "encoder_attentions", "hands out the scores before the softmax"),
    ("squeezebert", "attentions", "hands out the scores before the softmax"),
    ("wavlm", "attentions", "hands out the mean over its heads, once for each"),
    ("yoso", "attentions", "hands out the attention's output under this name"),
)
# Models that compute a band of the scores, and hand it out as it is stored: columns count from the query.
BANDS = ("longformer", "led")


def compare_offered(
    row: Row, model: nn.Module, inputs: dict[str, Any], trace: hookattn.Trace, alive: Tensor | None = None
) -> None:
    """Find for each tensor of ``output_attentions=True`` the call that it is of, and note the largest distance.

    Args:
        row: gets the result.
        model: the eager model.
        inputs: its inputs.
        trace: what is compared with it.
        alive: the batch entries that are compared; None: all.
    """
    try:
        output = run(model, inputs, output_attentions=True)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError) as error:
        row.notes.append(f"offers no attentions: {type(error).__name__}")
        return
    offered: list[tuple[str, Tensor]] = []
    for name, x in attentions(output):
        if not any(x.shape == y.shape and x.equal(y) for _, y in offered):  # some are handed out under two names
            offered.append((name, x))
    free = list(range(len(trace)))
    for name, theirs in offered:
        deformable = any("eformable" in x for x in row.skipped)
        why = (
            "deformable sampling"
            if deformable
            else next((w for t, part, w in NOT_WEIGHTS if row.model_type.startswith(t) and name.startswith(part)), "")
        )
        if why.startswith("hands out the scores"):
            theirs = theirs.softmax(-1)
        fits = {i: d for i in free if (d := distance(trace[i], theirs, alive)) is not None}
        if row.model_type in BANDS and not name.startswith(("decoder", "cross")):
            fits = {i: d for i in free if (d := band_distance(trace[i], theirs, "global" in name)) is not None}
            note = "hands out a band as it is stored: compared as the sorted values of each row"
            row.notes += [note] if note not in row.notes else []
        best = min(fits, key=lambda i: fits[i], default=-1)
        if why and (best < 0 or fits[best] > TOLERANCE):
            if not any(why in note for note in row.notes):
                row.notes.append(f"{name}: {why}")
            continue
        if not fits:
            row.problems.append(f"offered: {name} of shape {tuple(theirs.shape)} fits no call")
            continue
        row.compared += 1
        row.offered = max(row.offered or 0.0, fits[best])
        if fits[best] > TOLERANCE:
            row.problems.append(f"offered: {name} {tuple(theirs.shape)} is {fits[best]:.2g} from the nearest call")
        elif trace[best].weights.shape[-2:] == theirs.shape[-2:]:
            free.remove(best)
    if not offered:
        row.notes.append("offers no attentions")


def distance(call: hookattn.Call, theirs: Tensor, alive: Tensor | None = None) -> float | None:
    """The largest distance over the rows that may attend to anything; None where the shapes do not fit."""
    mine = call.weights
    if theirs.dim() == mine.dim() and theirs.stride(1) == 0 and theirs.shape == mine.shape and mine.shape[1] > 1:
        mine = mine.mean(1, keepdim=True).expand_as(mine)
    t, s = theirs.shape[-2:]
    if (
        theirs.dim() == 4
        and mine.shape[:2] == theirs.shape[:2]
        and (t, s) != mine.shape[-2:]
        and t <= mine.shape[2]
        and s <= mine.shape[3]
    ):
        # A prompt that the model adds and cuts off again, or one softmax over several sequences that it splits.
        parts = [mine[:, :, -t:, -s:], mine[:, :, :t, :s]]
        return min((part.double() - theirs.double()).abs().max().item() for part in parts)
    if theirs.shape != mine.shape:
        if theirs.numel() != mine.numel() or theirs.shape[-2:] != mine.shape[-2:]:
            return None
        orders = [theirs, theirs.transpose(1, 2)] if theirs.dim() == 5 else [theirs]  # blocks before or after the heads
        theirs = min((x.reshape(mine.shape) for x in orders), key=lambda x: (mine - x).abs().sum().item())
    rows = call.mask.expand_as(mine).any(-1)
    if alive is not None and len(rows) == len(alive):
        rows = rows & alive[:, None, None]
    if not rows.any():
        return 0.0
    gap = (mine.double() - theirs.double()).abs()[rows].max().item()
    return gap if gap == gap else float("inf")


def band_distance(call: hookattn.Call, theirs: Tensor, columns: bool) -> float | None:
    """The largest distance of a dense call from a stored band, whose columns are others: row by row, in falling order.

    Args:
        call: the call, B H T S.
        theirs: B H T n; or B H S T, where ``columns``. Rows of zeros are those of another softmax, and are left out.
        columns: whether a column of theirs is a query.
    """
    theirs = theirs.transpose(-1, -2) if columns else theirs
    mine = call.weights
    if mine.shape[:3] != theirs.shape[:3] or mine.shape[3] < theirs.shape[3]:
        return None
    theirs = nn.functional.pad(theirs, (0, mine.shape[3] - theirs.shape[3]))
    rows = theirs.ne(0).any(-1)
    gap = mine.double().sort(-1).values - theirs.double().sort(-1).values
    return gap.abs()[rows].max().item() if rows.any() else None


def attentions(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor under a key that names attentions."""
    if isinstance(output, Tensor):
        if "attention" in name and output.dim() >= 3 and output.is_floating_point():
            yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from attentions(value, f"{name}.{key}" if name else key)
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            yield from attentions(value, f"{name}[{i}]")
