"""Models with sinks and caps in what surrounds a model: offload, torch.compile, one module in several layers."""

import copy

import pytest
import torch

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.conversion import calibrate
from distattn_hf.core import interface
from tests.conversion.absolute_models import FAMILIES, gpt_oss
from tests.conversion.models import token_batch
from tests.conversion.test_offload import offloaded
from tests.pairs import pairwise
from tests.tolerances import CACHED_LOGITS

every_family = pytest.mark.parametrize("family", FAMILIES)
SPECS = {
    "l2": {"metric": "l2", "transform": "scalar", "softening": "fit"},
    "maps": {"metric": "l1", "transform": "maps"},
    "cosine": {"metric": "cosine", "transform": "scalar"},
    "chebyshev": {"metric": "chebyshev", "transform": "scalar", "softening": "fit"},
    "some heads": {"metric": "l2", "heads": (0, 3), "transform": "scalar"},
}


def student_of(family, name):
    """A converted model whose origins, shifts and all else that a fit sets are random."""
    teacher = FAMILIES[family]()
    if name == "exact":
        return convert(teacher, AttentionSpec(), init="exact")
    options = CalibrationOptions(steps=1, progress=False)
    student = convert(teacher, AttentionSpec(**SPECS[name]), calibration=[token_batch(teacher)], options=options)
    for parameter_name, parameter in student.named_parameters():
        if ".distattn." in parameter_name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return student.eval()


@pytest.mark.parametrize(("name", "family", "place"), pairwise(["exact", *SPECS], FAMILIES, ["cpu", "disk"]))
def test_offloaded_layers_change_nothing(tmp_path, family, name, place):
    """An origin or a sink that is read outside a module's forward would be on the meta device."""
    student = student_of(family, name)
    again = offloaded(tmp_path, student, ["model.layers.1"], place)
    batch = token_batch(student, padded=True)
    with torch.no_grad():
        for options in ({}, {"output_attentions": True}):
            assert torch.equal(again(**batch, **options).logits, student(**batch, **options).logits)
        steps = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert torch.equal(again.generate(**batch, **steps), student.generate(**batch, **steps))


# Tracing takes 6 s each: sinks and caps, each with a distance that is shifted and with one that is not.
@pytest.mark.parametrize(
    ("family", "name"), [("gpt_oss", "exact"), ("gpt_oss", "l2"), ("gemma2", "cosine"), ("gemma2", "l2")]
)
def test_compiled_models_keep_one_graph(family, name):
    """torch.compile gives what eager gives, and breaks the graph nowhere: no sink or shift is read as a number."""
    student = student_of(family, name)
    if family == "gpt_oss":
        student.set_experts_implementation("batched_mm")  # a loop over experts has a graph each
    batch, results = token_batch(student, padded=True), []
    real = batch["attention_mask"].bool()
    torch.compiler.reset()
    for run in (student, torch.compile(student, fullgraph=True, backend="aot_eager")):
        student.zero_grad()
        with torch.no_grad():
            without_gradient = run(**batch, use_cache=False).logits[real]
        logits = run(**batch, use_cache=False).logits[real]
        logits.square().mean().backward()
        gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        results.append((without_gradient, logits, gradients))
    (*expected, expected_gradients), (*actual, gradients) = results
    for mine, theirs in zip(actual, expected, strict=True):
        assert float((mine - theirs).detach().abs().max()) <= CACHED_LOGITS
    assert gradients.keys() == expected_gradients.keys()
    for key, theirs in expected_gradients.items():
        torch.testing.assert_close(gradients[key], theirs, rtol=1e-3, atol=1e-5, msg=key)


def sharing(model):
    """The model with one attention module in both its layers."""
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    return model


@pytest.mark.parametrize("name", ["exact", "l2", "cosine"])
@every_family
def test_a_module_of_several_layers_gets_the_gradients_of_all_its_uses(family, name):
    """Two modules of equal weights, one in each layer: their gradients sum to those of one module in both."""
    student = sharing(student_of(family, name))
    apart = copy.deepcopy(student)
    apart.model.layers[1].self_attn = copy.deepcopy(apart.model.layers[0].self_attn)
    batch = token_batch(student, padded=True)
    for model in (student, apart):
        model(**batch, use_cache=False).logits[batch["attention_mask"].bool()].square().mean().backward()
    shared = dict(student.model.layers[0].self_attn.named_parameters())
    first, second = (dict(layer.self_attn.named_parameters()) for layer in apart.model.layers)
    assert any(name.endswith(("sinks", "origin", "logit_shift")) for name in shared) or (family, name) == (
        "gemma2",
        "exact",
    )
    for key, parameter in shared.items():
        expected = first[key].grad + second[key].grad
        assert bool((second[key].grad != 0).any()), key
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5, msg=key)


def test_a_fit_has_the_sink_of_each_use(monkeypatch):
    """Of sinks that differ from use to use (Inkling makes them from its inputs) a fit takes not the last for all."""
    student = sharing(convert(gpt_oss(), AttentionSpec("l2", softening=0), init="plain"))
    student.config.use_cache = False
    fits, uses = [], iter(range(100))

    def sink_of(arguments):
        sink = arguments["s_aux"][None, :, None, None] + 5.0 * (next(uses) % 2)
        return sink + torch.linspace(0, 1, 20)[None, None, :, None]

    def recorded(group, data, options):
        fits.append(data)
        return original(group, data, options)

    original = calibrate.fit_group
    monkeypatch.setattr(calibrate, "fit_group", recorded)
    monkeypatch.setattr(interface, "sink_of", sink_of)
    calibrate.calibrate(student, token_batch(student), CalibrationOptions(steps=0, progress=False))
    (data,) = fits
    own = student.model.layers[0].self_attn.sinks.detach()[:, None] + torch.linspace(0, 1, 20)
    assert data.sink_logit.shape == (4, 4, 20, 1)
    for item in range(4):
        torch.testing.assert_close(data.sink_logit[item, ..., 0], own + 5.0 * (item >= 2))
