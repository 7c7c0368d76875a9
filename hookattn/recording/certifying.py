"""When certificates are measured: a call's when it is first asked for, together with those of small calls like it.

Measuring takes several operations a call. A model of a few layers spends more time between its kernels than in them,
and small calls of one shape take as many operations together as one alone.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from ..attention.kernel_call import KernelCall
from ..attention.normalizers import SOFTMAX
from ..calls.call import Call
from ..calls.certificate import Certificate, tolerance
from ..calls.deriving import own_field, placed
from ..calls.extents import evenly_grouped
from ..calls.fields import Derived, Place, dtype_of, shape_of
from ..calls.mask_rule import MaskRule
from ..errors import UnfaithfulWarning
from ..torch_internals.frames import level_outside
from ..torch_internals.isolation import isolated
from .stacked import StackedCalls
from .verification import Measurement, measure, read_certificates, rows_to_check, score_rounding

# Up to this many scores and elements of q, k and v a call is small: Python takes longer than its arithmetic.
SMALL = 1 << 18
# So many scores are measured together at most.
_MOST_SCORES = 1 << 23

# So many paths of unfaithful calls are named in warnings.
_NAMED = 3
_VECTORS = ("q", "k", "v", "output")
_RECORDED = (*_VECTORS, "bias", "sinks", "scores", "weights", "applied")


class Extras(NamedTuple):
    """What a certificate is made of beside the fields of a call, where the kernel is no plain one.

    Attributes: those of a :class:`~hookattn.attention.kernel_call.KernelCall`.
    """

    undropped: Tensor | None
    outer_error: Tensor | None
    softmax_dtype: torch.dtype | None

    @classmethod
    def of(cls, call: KernelCall) -> Extras | None:
        """Those of a call; None: it has none."""
        if call.undropped is call.outer_error is None and call.softmax_dtype in (None, call.dtype):
            return None
        return cls(call.undropped, call.outer_error, call.softmax_dtype)


@dataclass(slots=True)
class Evidence:
    """Stands for the certificate of a call, from whose fields it will be measured.

    Attributes:
        certifier: who measures.
        extras: what else is needed for it.
    """

    certifier: Certifier
    extras: Extras | None

    def certificate(self, call: Call) -> Certificate:
        """Measured now, with those of small calls of the same shape."""
        return self.certifier.measured(call, self)


@dataclass(slots=True)
class Measured:
    """Stands for the certificate of a call that was measured, and not read from its device yet.

    Attributes:
        certifier: who measured it.
        measurement: what.
    """

    certifier: Certifier
    measurement: Measurement

    def certificate(self, call: Call) -> Certificate:
        """Read now."""
        return self.certifier.told(call, read_certificates([self.measurement])[0][0])


class Certifier:
    """Measures the calls of one trace.

    Args:
        full: check all rows, not a sample.
        warns: whether unfaithful calls are warned of: the first few paths, each once.
    """

    def __init__(self, full: bool, warns: bool = True):
        self.full, self._warns = full, warns
        self._taken = False  # whether anything was measured and not read yet
        # Weak references: a call that nobody holds needs no certificate, and holds its fields no longer.
        self._waiting: list[weakref.ref[Call]] = []
        self._by_shape: dict[Shape, deque[weakref.ref[Call]]] = {}
        self._warned: set[str] = set()

    def wait(self, call: Call, extras: Extras | None) -> None:
        """A call whose fields will not change; it is measured when somebody asks."""
        call.certificate = Evidence(self, extras)
        self._waiting.append(weakref.ref(call))

    def take(self, call: Call, kernel: KernelCall, mask: MaskRule) -> None:
        """A call that is measured now, as what it is measured by is not kept.

        Args:
            call: gets the certificate.
            kernel, mask: as :func:`~hookattn.recording.verification.measure` takes them.
        """
        self.tell(call, measure(kernel, mask, self.full))

    def tell(self, call: Call, measurement: Measurement) -> None:
        """A call that was measured."""
        self._taken = True
        call.certificate = Measured(self, measurement)

    def read(self, calls: Sequence[Call]) -> None:
        """Read what was measured of some calls, from each device at once."""
        if not self._taken:
            return
        self._taken = False
        waiting = [(call, found) for call in calls if isinstance(found := _pending(call), Measured)]
        read = read_certificates([found.measurement for _, found in waiting])
        for (call, _), certificates in zip(waiting, read, strict=True):
            call.certificate = self.told(call, certificates[0])

    def told(self, call: Call, certificate: Certificate) -> Certificate:
        """The certificate, once its reader is warned where it says that the call is unfaithful."""
        path = call.site.path
        if certificate.status == "unfaithful" and self._warns and path not in self._warned:
            text = f"{call.site.label} (step {call.step}, tap {call.tap}) is {certificate}"
            if len(self._warned) == _NAMED:
                self._warns = False
                text = "more calls are unfaithful; trace.certify() measures all, and each says so in its certificate"
            self._warned.add(path)
            warnings.warn(text, UnfaithfulWarning, stacklevel=level_outside(__package__.partition(".")[0]))
        return certificate

    def measured(self, call: Call, evidence: Evidence) -> Certificate:
        """The certificate of a call that waits; others like it get theirs, too."""
        shape = small_shape(call)
        if shape is None:
            with isolated(_tensor(call, "v")):
                found = measure(_kernel_call(call, evidence), _mask_rule(call), self.full)
            call.beside.pop("output", None)  # nothing follows from it
            return self.told(call, read_certificates([found])[0][0])
        several = [call, *self._alike(call, shape)]
        with isolated(_tensor(call, "q")):
            certificates = self._measured_together(several, shape)
        for one, certificate in sorted(zip(several, certificates, strict=True), key=lambda pair: pair[0].index):
            one.certificate = self.told(one, certificate)
            one.beside.pop("output", None)
        return certificates[0]

    def _alike(self, call: Call, shape: Shape) -> list[Call]:
        """Other calls that wait and can be measured together with this one."""
        new, self._waiting = self._waiting, []
        for ref in new:
            other = ref()
            if other is not None and (found := small_shape(other)) is not None:
                self._by_shape.setdefault(found, deque()).append(ref)
        several: list[Call] = []
        alike = self._by_shape.get(shape, deque())
        while alike and len(several) < _MOST_SCORES // shape.scores - 1:
            other = alike.popleft()()
            # Fields of a call may have been exchanged since.
            if other is not None and other is not call and small_shape(other) == shape:
                several.append(other)
        return several

    def _measured_together(self, several: Sequence[Call], shape: Shape) -> list[Certificate]:
        """N calls of one shape at once, with as few operations as will do.

        The mask is added to the scores as −∞, which is quicker than choosing, and the size of the scores is not looked
        at. Where that finds a call unfaithful, the quick way may be at fault: then the careful one has the last word.
        """
        certificates = read_certificates([self._measure_together(several, shape, False)])[0]
        if all(c.faithful for c in certificates):
            return certificates
        return read_certificates([self._measure_together(several, shape, True)])[0]

    def _measure_together(self, several: Sequence[Call], shape: Shape, careful: bool) -> Measurement:
        masked = _mask_rule(several[0]).complete()
        t, rows = shape.t, rows_to_check(shape.t, self.full, shape.scores)
        stacked = StackedCalls.of([[_tensor(c, n) for n in _VECTORS] for c in several], masked, shape.scale)
        calls = stacked.of_rows(rows)
        scores = calls.scores()
        largest = calls.largest_scores(scores) if careful else None
        maxima = calls.maxima(calls.weights(scores, careful), largest)
        rounding = score_rounding(shape.dtype, False) if careful else 0.0
        return Measurement.of(maxima, tolerance(shape.dtype), calls.q.shape[2], t, rounding=rounding)


class Shape(NamedTuple):
    """What small calls that are measured together have in common.

    Attributes:
        dtype, device: of q, k, v and output.
        shapes: theirs.
        scale: the kernel's own.
        mask: what tells it from others.
        t: queries.
        scores: how many there are.
    """

    dtype: torch.dtype
    device: torch.device
    shapes: tuple[Size, ...]
    scale: float
    mask: tuple[object, ...]
    t: int
    scores: int


def small_shape(call: Call) -> Shape | None:
    """What a call has in common with others; None: it is not small, or not plain. Nothing is read for it."""
    evidence = _pending(call)
    if not isinstance(evidence, Evidence) or evidence.extras is not None or call.softcap is not None:
        return None
    if type(call.scale) is not float or not call.scale or call.kv_heads is not None or call.own_scores:
        return None
    if call.normalizer != SOFTMAX:
        return None
    if any(placed(call, name) is not None for name in ("bias", "sinks")):
        return None
    if any(not isinstance(placed(call, name), Derived | None) for name in ("scores", "weights")):
        return None
    places = [placed(call, name) for name in _VECTORS]
    if any(x is None or isinstance(x, Derived) for x in places):
        return None
    kept: list[Place] = places  # type: ignore[assignment]
    shapes = tuple(map(shape_of, kept))
    dtypes = tuple(map(dtype_of, kept))
    if (found := _scores_of(shapes, dtypes)) is None or not isinstance(rule := placed(call, "mask"), MaskRule):
        return None
    mask = (rule.diagonal, rule.t, rule.s, id(rule.given), None if rule.rows is None else id(rule))
    return Shape(dtypes[0], rule.device, shapes, call.scale, mask, shapes[0][2], found)


@functools.lru_cache(maxsize=1024)
def _scores_of(shapes: tuple[Size, Size, Size, Size], dtypes: tuple[torch.dtype, ...]) -> int | None:
    """How many scores a call of q, k, v and output of these shapes has; None: it is not small or not plain."""
    q, k, v, output = shapes
    if len(set(dtypes)) > 1 or not len(q) == len(k) == len(v) == len(output) == 4:
        return None
    (b, h, t, d), s, e = q, k[2], v[3]
    good = output == (b, h, t, e) and k[0] == b and k[3] == d and v[:3] == k[:3] and k[1] and h % k[1] == 0
    scores = b * h * t * s
    return scores if good and scores and k.numel() and v.numel() and q.numel() and is_small(q, k, v) else None


def is_small(q: Size, k: Size, v: Size) -> bool:
    """Whether a call of these shapes, B H T D, B G S D and B G S E, has no more than :data:`SMALL` of anything."""
    return max(q.numel(), k.numel(), v.numel(), q[0] * q[1] * q[2] * k[2]) <= SMALL


def _pending(call: Call) -> object:
    """What stands for a call's certificate, without measuring it."""
    return call.__dict__["_certificate"]


def _tensor(call: Call, name: str) -> Tensor:
    found = own_field(call, name)
    assert found is not None
    return found


def _mask_rule(call: Call) -> MaskRule:
    rule = call.place("mask")
    assert isinstance(rule, MaskRule)
    return rule


def _kernel_call(call: Call, evidence: Evidence) -> KernelCall:
    """A kept call as its kernel's, its heads grouped evenly."""
    whole: dict[str, Any] = {name: own_field(call, name) for name in _RECORDED}
    for name in ("k", "v"):
        whole[name] = None if whole[name] is None else evenly_grouped(call, whole[name])
    made = KernelCall(scale=call.scale, tap=call.tap, **whole)  # type: ignore[arg-type]
    made.softcap, made.opaque, made.score, made.normalizer = call.softcap, call.own_scores, call.score, call.normalizer
    if evidence.extras is not None:
        made.undropped, made.outer_error, made.softmax_dtype = evidence.extras
    return made
