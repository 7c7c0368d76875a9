"""A Trace as named tensors and one JSON document. docs/trace-format.md describes the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from ..attention.kernel_call import DERIVED, DOT, OUTPUT_GRADIENT
from ..calls.call import Call
from ..calls.certificate import UNVERIFIED, Certificate
from ..calls.key_history import Continued
from ..calls.trace_data import TraceData
from ..errors import TraceTooLargeError
from ..torch_internals.isolation import no_gradients
from ..version import __version__
from .agreement import derivable_of
from .call_writer import CallWriter, WrittenCall, stored_scale
from .format import encode_document
from .json_values import json_number, json_value
from .names import SHARED, own_name
from .ranks import claim
from .schema import CALL, CERTIFICATE, EDIT, LINK, SHARD, SITE, SKIPPED, to_entry
from .writer import StreamWriter

# What the header says at most: of a tensor beside its name; of a field that goes on from another beside the numbers of
# its batch entries; in the numbers of a certificate beyond zeros; beside the document and the tensors.
_OF_TENSOR, _OF_LINK, _OF_NUMBERS, _OF_FILE = 112, 80, 160, 256


def save(trace: TraceData, path: str | PathLike[str], *, compact: bool = False, linked: bool = True) -> str:
    """See :meth:`hookattn.Trace.save`. Each call's fields are derived, written and let go before those of the next.

    Args:
        trace, path, compact: as there.
        linked: whether keys and values may go on from those of an earlier call; else each call has them whole, for the
            viewer, which does not put them together. Such a file has no checksums: a page changes its header.
    """
    entries = []
    claim(path)
    with no_gradients(), StreamWriter(path, reserve=_header_size(trace, compact), checksums=linked) as file:
        writer = CallWriter(file, linked)
        for call in trace.calls:
            certificate = call.certificate  # before any number of the call is written
            try:
                written = writer.write(call, _left_out(call, compact))
            except TraceTooLargeError as error:
                error.add_note("hookattn: save(..., compact=True) leaves out scores and weights that can be derived.")
                raise
            entries.append(call_entry(call, written, certificate))
        return fspath(file.finish(document_of(trace, entries, compact)))


def _left_out(call: Call, compact: bool) -> set[str]:
    return {f for f in DERIVED if compact and f in call.derivable}


def _header_size(trace: TraceData, compact: bool) -> int:
    """How many bytes the header may take, before anything is derived or read: enough, and little more."""
    size = _text_size(encode_document(document_of(trace, [], compact))) + _OF_FILE
    common: set[int] = set()  # which fields that calls have in common were counted
    for i, call in enumerate(trace.calls):
        kept = {f: x for f, x in call.fields.items() if f not in _left_out(call, compact)}
        names = {f: None if x is None else own_name(i, call.site.path, f) for f, x in kept.items()}
        scale = own_name(i, call.site.path, "scale") if stored_scale(call) is not None else None
        has_gradient = call.gradient is not None and call.gradient.there is not None
        gradient = own_name(i, call.site.path, OUTPUT_GRADIENT.name) if has_gradient else None
        entry = call_entry(call, WrittenCall(i, names, scale=scale, gradient=gradient), UNVERIFIED)
        size += _text_size(encode_document(entry)) + _OF_NUMBERS
        own = [n for f, n in names.items() if n is not None and id(kept[f]) not in common]
        size += sum(
            _OF_TENSOR + len(n.encode("utf-8", "surrogatepass"))
            for n in (*own, scale or "", *([gradient] if gradient else ()))
        )
        common |= {id(x) for f, x in kept.items() if f in SHARED}
        size += sum(_OF_LINK + 8 * x.shape[0] for x in kept.values() if isinstance(x, Continued))
    return size


def _text_size(text: str) -> int:
    """The bytes of a text as a string of JSON."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def call_entry(
    call: Call, written: WrittenCall, certificate: Certificate, places: Mapping[int, int] | None = None
) -> dict[str, Any]:
    """A call in the document.

    Args:
        call: the call.
        written: where its tensors are.
        certificate: its certificate.
        places: the place of a call in the trace by its number, where these differ.
    """
    # What has no scale says 1, as it did before there was anything without: no reader has to know better.
    scale: Any = {"tensor": written.scale} if written.scale is not None else 1.0 if call.scale is None else call.scale
    links = {
        name: to_entry(LINK, link if places is None else link._replace(continues=places[link.continues]))
        for name, link in written.links.items()
    }
    there = written.fields | dict.fromkeys(written.links, "continued")
    own_scores = call.own_scores or call.score != DOT
    return to_entry(
        CALL,
        call,
        site=to_entry(SITE, call.site),
        scale=json_number(scale),
        fields=written.fields,
        # A call that was changed by hand may say more than holds of it.
        own_scores=own_scores,
        derivable=derivable_of(call.derivable, own_scores, call.normalizer, there, call.edits),
        certificate=to_entry(CERTIFICATE, certificate),
        continued=links or None,
        output_grad=written.gradient,
        edits=[to_entry(EDIT, edit) for edit in call.edits] or (),
        shards=[to_entry(SHARD, shard) for shard in call.shards] or (),
    )


def document_of(trace: TraceData, calls: list[dict[str, Any]], compact: bool) -> dict[str, Any]:
    """The document of a trace with these entries of its calls."""
    versions = {**trace.model.get("versions", {}), "hookattn": __version__}
    return {
        "model": json_value({**trace.model, "versions": versions}),
        "selection": json_value(trace.selection),
        "tokens": trace.tokens,
        **({"stack_tokens": trace.stack_tokens} if trace.stack_tokens else {}),
        **({"segments": trace.segments} if trace.segments is not None else {}),
        "notes": trace.notes,
        "compact": compact,
        "skipped": [to_entry(SKIPPED, s) for s in trace.skipped],
        "calls": calls,
    }
