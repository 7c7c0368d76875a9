"""The statistics that a call may hold, as attributes of it: ``call.entropy`` beside ``call.get("entropy")``."""

from __future__ import annotations

from torch import Tensor

from ..statistics.base import Statistic


class CapturedStatistics:
    """What ``capture=`` can keep of a call beside its fields; letters: B H T S as in the documentation.

    Each is float32, or float64 of a kernel in that, and was computed beside the kernel. Of one that was captured with
    several parameters (``LocalMass(4)`` and ``LocalMass(16)``), the plain name is not clear: then
    ``call.get("local_mass(4)")`` names it. Reading one that was not captured raises
    :class:`hookattn.FieldNotCaptured`, which names the ``capture=`` that would have kept it.
    """

    def get(self, name: str | Statistic) -> Tensor | None:
        """A field by name."""
        raise NotImplementedError

    @property
    def entropy(self) -> Tensor | None:
        """B H T: −Σ_j w_j ln w_j over the keys, in nats."""
        return self.get("entropy")

    @property
    def lse(self) -> Tensor | None:
        """B H T: the logarithm of the softmax's denominator, sinks included."""
        return self.get("lse")

    @property
    def max_score(self) -> Tensor | None:
        """B H T: the largest score under the mask."""
        return self.get("max_score")

    @property
    def first_mass(self) -> Tensor | None:
        """B H T: the weight on the first n keys."""
        return self.get("first_mass")

    @property
    def local_mass(self) -> Tensor | None:
        """B H T: the weight on keys that are less than a window away."""
        return self.get("local_mass")

    @property
    def far_mass(self) -> Tensor | None:
        """B H T: the weight on keys that are a window away or more."""
        return self.get("far_mass")

    @property
    def previous_mass(self) -> Tensor | None:
        """B H T: the weight on the key before the query's own."""
        return self.get("previous_mass")

    @property
    def offset_mass(self) -> Tensor | None:
        """B H T: the weight on the key at an offset from the query's own."""
        return self.get("offset_mass")

    @property
    def segment_mass(self) -> Tensor | None:
        """B H T N: the weight on each of N sets of keys."""
        return self.get("segment_mass")

    @property
    def mean_distance(self) -> Tensor | None:
        """B H T: the mean distance of the keys, by their weights."""
        return self.get("mean_distance")

    @property
    def top_k(self) -> Tensor | None:
        """B H T k: the largest weights of each query."""
        return self.get("top_k")

    @property
    def top_k_keys(self) -> Tensor | None:
        """B H T k, int64: the keys that they are of, −1 where there are fewer."""
        return self.get("top_k_keys")

    @property
    def received(self) -> Tensor | None:
        """B H S: the weight that each key gets of all queries."""
        return self.get("received")
