"""The card's graph: its code as it stands, and that the mask and the bias are what decides."""

import re
from pathlib import Path

import torch

CARD = Path(__file__).parents[1] / "model_cards" / "beyond_text.md"


def test_the_karate_club():
    (code,) = re.findall(r"^```python\n(.*?)^```", CARD.read_text(encoding="utf-8"), re.M | re.S)
    names = {}
    exec(compile(code, str(CARD), "exec"), names)
    assert names["accuracy"] > 0.9
    model, neighbours = names["model"].eval(), names["neighbours"]
    weights = model.layers[0](
        model.nodes.weight[None], attention_mask=neighbours, position_bias=names["edge_bias"], output_attentions=True
    )[1]
    assert not bool(weights.masked_select(~neighbours[:, None]).any()), "nobody sees who is no neighbour"
    # An edge's weight multiplies that of its key, as compared with another neighbour.
    without = model.layers[0](model.nodes.weight[None], attention_mask=neighbours, output_attentions=True)[1]
    edges = names["weights"]
    node = int((edges > 0).sum(-1).argmax())
    first, second = edges[node].topk(2).indices.tolist()
    torch.testing.assert_close(
        weights[0, :, node, first] / weights[0, :, node, second],
        without[0, :, node, first] / without[0, :, node, second] * edges[node, first] / edges[node, second],
    )
