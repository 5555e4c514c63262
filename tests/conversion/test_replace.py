"""`replace_attention`: PyTorch's own modules, with PyTorch's own attention as the oracle."""

import pytest
import torch
from torch import nn

from distattn_hf import AttentionSpec, CalibrationOptions, DistanceMultiheadAttention, replace_attention

SIZE, HEADS = 32, 4


def multihead(**options):
    """Return PyTorch's layer in float64, with weights that make attention uneven."""
    layer = nn.MultiheadAttention(SIZE, HEADS, **options).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def padding():
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[1, 6:] = True
    return mask


def blocked():
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[:, 0] = True
    return mask


LAYERS = [
    {},
    {"batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"kdim": 24, "vdim": 20},
    {"bias": False},
]
CALLS = [
    {},
    {"key_padding_mask": padding()},
    {"attn_mask": blocked(), "key_padding_mask": padding()},
    {"attn_mask": torch.linspace(-2, 2, 12 * 63).view(12, 7, 9).double(), "average_attn_weights": False},
    {"key_padding_mask": padding().double() * -1.5, "attn_mask": blocked().double() * -1e9},
    {"attn_mask": blocked(), "need_weights": False},
]


@pytest.mark.parametrize("options", LAYERS, ids=lambda options: "-".join(options) or "default")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(call) or "no mask")
def test_the_exact_layer_is_pytorchs(options, call):
    layer = multihead(**options)
    exact = replace_attention(layer, "sqeuclidean", init="exact")
    sizes = (7, SIZE), (9, options.get("kdim", SIZE)), (9, options.get("vdim", SIZE))
    inputs = [torch.randn(3, *size).double() for size in sizes]
    inputs = inputs if options.get("batch_first") else [x.transpose(0, 1) for x in inputs]
    (expected, expected_weights), (output, weights) = layer(*inputs, **call), exact(*inputs, **call)
    assert torch.allclose(output, expected, atol=1e-10)
    assert (weights is None) == (expected_weights is None)
    assert weights is None or torch.allclose(weights, expected_weights, atol=1e-10)
    assert isinstance(exact, DistanceMultiheadAttention)
    assert type(layer) is nn.MultiheadAttention


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_the_causal_hint_hides_no_key_of_the_layers_own(options):
    layer = multihead(batch_first=True, **options)
    exact, x = replace_attention(layer, "sqeuclidean", init="exact"), torch.randn(2, 6, SIZE).double()
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    # PyTorch reads the mask where weights are asked for.
    expected, _ = layer(x, x, x, attn_mask=mask)
    for call in ({"attn_mask": mask}, {"attn_mask": mask, "need_weights": False}, {}):
        assert torch.allclose(exact(x, x, x, is_causal=True, **call)[0], expected, atol=1e-10)


def test_what_is_shared_stays_shared():
    """A layer in two places, a layer inside a shared one, and a weight of two layers; and a hook stays."""
    block, other, calls = nn.TransformerEncoderLayer(SIZE, HEADS), multihead(), []
    other.in_proj_weight = block.self_attn.in_proj_weight
    other.register_forward_hook(lambda *_: calls.append(1))
    model = nn.ModuleDict({"own": block.self_attn, "blocks": nn.ModuleList([block, block]), "other": other})
    plain = replace_attention(model, "l2", init="plain")
    assert plain["own"] is plain["blocks"][0].self_attn is plain["blocks"][1].self_attn
    assert plain["other"].in_proj_weight is plain["own"].in_proj_weight is not block.self_attn.in_proj_weight
    assert plain.replaced.keys() == {"own", "blocks.0.self_attn", "blocks.1.self_attn", "other"}
    plain["other"].float()(*[torch.randn(3, SIZE)] * 3)
    assert calls == [1]
    assert type(block.self_attn) is nn.MultiheadAttention


def test_code_of_a_subclass_is_not_lost():
    class Rotated(nn.MultiheadAttention):
        def forward(self, query, key, value, **options):
            return super().forward(-query, key, value, **options)

    with pytest.raises(ValueError, match="^0: .*Rotated is not torch.nn.MultiheadAttention itself"):
        replace_attention(nn.Sequential(Rotated(SIZE, HEADS)), init="plain")
    parametrised = multihead()
    nn.utils.parametrizations.weight_norm(parametrised, "in_proj_weight")
    with pytest.raises(ValueError, match="is not torch.nn.MultiheadAttention itself"):
        DistanceMultiheadAttention.from_multihead(parametrised, "l2")


def test_without_a_batch():
    layer, x = multihead(), torch.randn(5, SIZE).double()
    expected, output = layer(x, x, x), replace_attention(layer, "sqeuclidean", init="exact")(x, x, x)
    assert all(torch.allclose(*pair, atol=1e-10) for pair in zip(output, expected, strict=True))


def encoder():
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 2 * SIZE, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def test_an_encoder_takes_no_fused_path_past_it():
    """PyTorch's encoder computes dot products from the layer's weights where it may, of nested tensors with padding."""
    model, x = encoder(), torch.randn(3, 9, SIZE)
    exact, plain = replace_attention(model, "sqeuclidean", init="exact"), replace_attention(model, "l1", init="plain")
    for mask in (None, padding()):
        kept = slice(None) if mask is None else ~mask
        expected = model(x, src_key_padding_mask=mask)[kept]
        assert torch.allclose(exact(x, src_key_padding_mask=mask)[kept], expected, atol=1e-4)
        assert (plain(x, src_key_padding_mask=mask)[kept] - expected).abs().max() > 0.05
    assert exact.replaced == {"layers.0.self_attn": None, "layers.1.self_attn": None}


@torch.no_grad()
def test_a_decoder_and_its_causal_mask():
    model = nn.Transformer(SIZE, HEADS, 1, 1, SIZE, batch_first=True).eval()
    exact, x = replace_attention(model, "sqeuclidean", init="exact"), torch.randn(2, 6, SIZE)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    for hint in (None, True):
        expected = model(x, x, tgt_mask=causal, tgt_is_causal=hint)
        assert torch.allclose(exact(x, x, tgt_mask=causal, tgt_is_causal=hint), expected, atol=1e-5)
    assert len(exact.replaced) == 3


def test_a_fit_is_nearer_than_none_and_trains_and_reloads():
    model = encoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = [torch.randn(2, 12, SIZE), (torch.randn(2, 9, SIZE),), {"src": torch.randn(2, 12, SIZE)}]
    fitted = replace_attention(model, "l2", calibration=inputs, options=CalibrationOptions(steps=20))
    plain, x = replace_attention(model, "l2", init="plain"), torch.randn(2, 12, SIZE)
    with torch.no_grad():
        off = [(student(x) - model(x)).square().mean() for student in (fitted, plain)]
    assert off[0] < off[1] / 4
    assert all(0 < nats < 0.1 for nats in fitted.replaced.values())
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
    fitted.train()(x).square().sum().backward()
    assert all(layer.self_attn.distattn.log_alpha.grad.abs().sum() > 0 for layer in fitted.layers)
    again = replace_attention(encoder(), "l2", calibration=inputs, options=CalibrationOptions(steps=0))
    again.load_state_dict(fitted.state_dict())
    with torch.no_grad():
        assert again(x).equal(fitted.eval()(x))


def test_padding_of_a_calibration_input_changes_no_fit():
    """Inputs of two lengths, and the same as one padded batch: one fit."""
    layer, options = multihead(batch_first=True).float(), CalibrationOptions(steps=0)
    x = torch.randn(4, 9, SIZE)
    short, mask = x[2:, :6], torch.zeros(4, 9, dtype=torch.bool)
    mask[2:, 6:] = True
    apart = replace_attention(layer, "l2", calibration=[(x[:2],) * 3, (short,) * 3], options=options)
    together = replace_attention(
        layer, "l2", calibration=[{"query": x, "key": x, "value": x, "key_padding_mask": mask}], options=options
    )
    for name, tensor in apart.distattn.named_parameters():
        assert torch.allclose(tensor, together.distattn.get_parameter(name), atol=1e-5), name


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: replace_attention(nn.Linear(2, 2), init="plain"), "Linear holds no torch.nn.MultiheadAttention"),
        (lambda: replace_attention(multihead()), "calibration must hold inputs of the module, got 0"),
        (lambda: replace_attention(multihead(), init="plain", calibration=[1]), "calibration must hold tensors"),
        (lambda: replace_attention(multihead(), "nystrom"), "unknown metric 'nystrom'"),
        (lambda: replace_attention(multihead(), AttentionSpec(mechanism="retrieval")), "mechanism must be 'distance'"),
        (lambda: replace_attention(multihead(), AttentionSpec("l2", heads=[0])), "heads must be None"),
        (lambda: replace_attention(multihead(), "l2", init="exact"), "init='exact' needs metric 'sqeuclidean'"),
        (lambda: replace_attention(multihead(), "l2", init="best"), "init must be one of"),
    ],
)
def test_what_cannot_be_is_refused_by_name(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


def test_a_mask_of_another_shape_is_refused():
    layer, x = replace_attention(multihead(batch_first=True), init="plain"), torch.randn(2, 5, SIZE).double()
    with pytest.raises(ValueError, match=r"attn_mask must be bool or float of shape \(5, 5\) or \(8, 5, 5\)"):
        layer(x, x, x, attn_mask=torch.zeros(4, 5, 5))
