"""torch_geometric: attention over edges, which is no dense B H T S and is listed as skipped."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter

_OVER_EDGES = """
    AGNNConv DenseGATConv FAConv FusedGATConv GATConv GATEConv GATv2Conv HANConv HEATConv HGTConv LPAttLayer
    PointTransformerConv RGATConv SuperGATConv TransformerConv
""".split()
_LINEAR = "PerformerAttention PolynormerAttention SGFormerAttention".split()


class TorchGeometric(Adapter):
    """torch_geometric.

    Graph convolutions weigh the edges of a sparse graph, each node's own number of them; no tap reads those, and they
    are named here so that ``trace.skipped`` lists them (``GeneralConv`` and ``HypergraphConv`` are not: they attend
    only if asked to). Dense attention beside them, of ``GPSConv``, set transformers and ``DNAConv``, is read.
    """

    name = "torch_geometric"
    covers = ("torch_geometric.nn",)
    attention = MappingProxyType(
        {**dict.fromkeys(_OVER_EDGES, "graph"), **dict.fromkeys(_LINEAR, "self"), "MultiHead": "self"}
    )
    axes = "nodes"
