"""torch_geometric: attention over edges is listed, dense attention over nodes is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hookattn_adapters.torch_geometric import TorchGeometric
from torch import Tensor, nn

import hookattn
from hookattn.testing import AdapterContract, check_clean
from tests.field.common import drawn, examine, seeded

geometric = pytest.importorskip("torch_geometric.nn")

EDGES = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 0]])
GRAPH = (seeded(4, 16), EDGES)


def convolution(name: str) -> nn.Module:
    torch.manual_seed(0)
    return drawn(getattr(geometric, name)(16, 8, heads=2))


@pytest.mark.parametrize("name", ["TransformerConv", "GATConv", "GATv2Conv"])
def test_attention_over_edges_is_listed_with_its_reason(name: str) -> None:
    model = convolution(name)
    plain = model(*GRAPH)
    with pytest.warns(hookattn.SkippedWarning):
        trace = hookattn.trace(model, GRAPH)
    assert torch.equal(plain, trace.output)
    assert len(trace) == 0
    ((path, reason),) = [(skipped.path, skipped.reason) for skipped in trace.skipped]
    assert path == ""
    assert reason.startswith(f"{name} ran, and no softmax over q·k was seen in it")
    assert "by the word of the adapter 'torch_geometric'" in reason  # it is no site by its name or by what it computes
    check_clean(model)


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return drawn(geometric.GPSConv(16, conv=geometric.TransformerConv(16, 8, heads=2), heads=2))


def test_dense_attention_beside_it_is_read() -> None:
    trace = examine(mixed(), GRAPH, calls=1, skipped=1)
    assert trace[0].site.path == "attn"
    assert [s.path for s in trace.skipped] == ["conv"]


def test_pooling_with_a_set_transformer() -> None:
    model = drawn(geometric.SetTransformerAggregation(16, heads=2))
    ragged = {"x": seeded(5, 16), "index": torch.tensor([0, 0, 0, 1, 1])}
    trace = examine(model, ragged, calls=3, sharp=0.5)
    assert [int(c.mask.expand_as(c.weights)[1, 0, 0].sum()) for c in trace] == [2, 2, 1]


def test_attention_over_layers_with_a_margin_for_nothing() -> None:
    trace = examine(drawn(geometric.DNAConv(16, heads=2)), (seeded(4, 3, 16), EDGES), calls=1, sharp=0.5)
    assert trace[0].sinks is not None  # its softmax has one more term, of a logit of 0
    assert trace[0].weights.sum(-1).max() < 1


def test_every_named_class_exists() -> None:
    homes = [geometric, geometric.attention, geometric.models.lpformer, geometric.models.attentive_fp]
    homes.append(geometric.conv.dna_conv)
    missing = {name for name in TorchGeometric.attention if not any(hasattr(home, name) for home in homes)}
    assert missing == set()


class Network(nn.Module):
    """As people stack them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(layers)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x, edge_index)
        return x


class TestContractBesideDense(AdapterContract):
    adapter = TorchGeometric()
    complete = False  # nn.MultiheadAttention is torch's, and the network is of this file
    skipped = ("TransformerConv",)

    def model(self) -> nn.Module:
        return Network(mixed(), mixed())

    def inputs(self) -> Any:
        return GRAPH


class TestContractDNA(AdapterContract):
    adapter = TorchGeometric()
    complete = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Network(drawn(geometric.DNAConv(16, heads=2), gain=4.0))

    def inputs(self) -> tuple[Tensor, Tensor]:
        return seeded(4, 3, 16), EDGES
