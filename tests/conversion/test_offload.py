"""Layers offloaded to the CPU or the disk give what they give in memory: parameters are read in `forward` alone."""

import pytest
import torch
from accelerate.hooks import attach_align_device_hook

from distattn_hf import AttentionSpec, convert, fold_alpha, register_metric, revert
from distattn_hf.analysis.watch import capture
from distattn_hf.conversion.report_of_model import current_report
from distattn_hf.core.configuration_distattn import config_class_for
from distattn_hf.core.metrics import METRICS
from distattn_hf.core.modeling_converted import model_class_for
from tests.conversion.models import FAMILIES, gpt2, token_batch
from tests.native.choices import ENCODINGS, FORMS, HAS, make_model, possible, tokens
from tests.pairs import pairwise

LAYERS = {
    "gpt2": ["transformer.h.1"],
    "bert": ["bert.encoder.layer.1"],
    "llama": ["model.layers.1"],
    # The first layers own the position bias.
    "t5": ["encoder.block.0", "decoder.block.0"],
}
NYSTROM = {"mechanism": "nystrom", "num_landmarks": 4, "window_size": 8, "num_sinks": 2}
SPECS = {
    **{name: {"metric": name, "transform": "scalar"} for name in METRICS if "dot" not in name},
    "lp": {"metric": "lp", "p": 3.0, "transform": "scalar"},
    "maps": {"metric": "l2", "transform": "maps"},
    "one lambda": {"metric": "l1", "lam": 0.7, "learnable_lambda": False},
    "fixed lambdas": {"metric": "l2", "learnable_lambda": False},
    "some heads": {"metric": "l2", "heads": (0, 3)},
    "nystrom": NYSTROM,
    "retrieval": {"mechanism": "retrieval", "block_size": 4, "window_size": 4, "num_blocks": 1},
    "retrieval by l2": {"metric": "l2", "mechanism": "retrieval", "block_size": 4, "window_size": 4, "num_blocks": 1},
    "nystrom, exact below": {**NYSTROM, "exact_below": 12},
    "nystrom, some heads": {**NYSTROM, "heads": (0, 1), "lift": False, "transform": "scalar"},
}


def student_of(family: str, **options):
    """A converted model with random λ, α, maps and landmarks, without a fit."""
    teacher = FAMILIES[family]()
    if family == "t5" and "mechanism" in options:
        options["window_size"] = teacher.config.relative_attention_max_distance
    data = {key: value for key, value in teacher.config.to_dict().items() if key != "model_type"}
    block = {"specs": [AttentionSpec(**options).to_dict()]}
    config = config_class_for(type(teacher.config)).from_dict({**data, "distattn": block})
    student = model_class_for(type(teacher))(config).eval()
    for name, parameter in student.named_parameters():
        if ".distattn." in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return student


def _inside(name: str, places: dict[str, str]) -> bool:
    return any(f"{name}.".startswith(f"{place}.") for place in places)


def offloaded(folder, model, parts: list[str], place: str):
    """The model of a folder, with `parts` of it on the disk or the CPU, from where hooks load what runs.

    Where there is no GPU, transformers itself offloads to the disk only.
    """
    model.save_pretrained(folder)
    if place == "disk":
        places = dict.fromkeys(parts, "disk")
        for name, _ in model.named_modules():
            if not any(f"{part}.".startswith(f"{name}.") for part in parts) and name and not _inside(name, places):
                places[name] = "cpu"
        again = type(model).from_pretrained(folder, device_map=places, offload_folder=folder / "offload").eval()
    else:
        again = type(model).from_pretrained(folder).eval()
        for part in map(again.get_submodule, parts):
            weights = {name: tensor.clone() for name, tensor in part.state_dict().items()}
            attach_align_device_hook(part, torch.device("cpu"), True, weights_map=weights, offload_buffers=True)
    assert any(parameter.is_meta for parameter in again.parameters())
    return again


@pytest.mark.parametrize(("family", "name", "place"), pairwise(FAMILIES, SPECS, ["cpu", "disk"]))
def test_offloaded_layers_change_nothing(tmp_path, family, name, place):
    student = student_of(family, **SPECS[name])
    again = offloaded(tmp_path, student, LAYERS[family], place)
    batch = token_batch(student, padded=True)
    with torch.no_grad():
        for options in ({}, {"output_attentions": True}):
            assert torch.equal(again(**batch, **options).logits, student(**batch, **options).logits)


@pytest.mark.parametrize(
    ("family", "name", "place"),
    pairwise(["gpt2", "llama", "t5"], ["l1", "maps", "nystrom", "nystrom, some heads"], ["cpu", "disk"]),
)
def test_offloaded_layers_generate_the_same(tmp_path, family, name, place):
    student = student_of(family, **SPECS[name])
    again = offloaded(tmp_path, student, LAYERS[family], place)
    batch = token_batch(student, padded=True)
    batch.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(again.generate(**batch, **settings), student.generate(**batch, **settings))


def test_a_registered_metric(tmp_path):
    register_metric("offloaded", lambda q, k: (q[..., None, :] - k[..., None, :, :]).abs().pow(1.5).sum(-1))
    student = student_of("gpt2", metric="offloaded", transform="scalar")
    again = offloaded(tmp_path, student, LAYERS["gpt2"], "disk")
    batch = token_batch(student)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, student(**batch).logits)


@pytest.mark.parametrize(("encoding", "mechanism", "place"), pairwise(["relative", "none"], HAS, ["cpu", "disk"]))
def test_native_mechanisms(tmp_path, encoding, mechanism, place):
    for form in FORMS:
        if possible(mechanism, encoding, form):
            _compare_native(tmp_path / form, make_model(mechanism, encoding, form), form, place)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("form", FORMS)
def test_native_encodings(tmp_path, form, encoding):
    _compare_native(tmp_path, make_model("l2", encoding, form), form, "disk")


def _compare_native(folder, model, form: str, place: str) -> None:
    stacks = ["model.encoder", "model.decoder"] if form == "cross" else ["model"]
    parts = [f"{stack}.{part}" for stack in stacks for part in ("layers.0", "positions")]
    ids = tokens()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if form == "cross":
        batch["decoder_input_ids"] = tokens(length=6, seed=1)
    again = offloaded(folder, model, parts, place)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ["maps", "nystrom"])
def test_weights_of_offloaded_layers_can_be_looked_at(tmp_path, name):
    student = student_of("gpt2", **SPECS[name])
    again = offloaded(tmp_path, student, LAYERS["gpt2"], "disk")
    batch = token_batch(student)
    maps = [{k: call.full() for k, call in capture(model, batch).items()} for model in (student, again)]
    assert maps[0].keys() == maps[1].keys()
    assert all(torch.equal(weights, maps[1][key]) for key, weights in maps[0].items())


def test_what_needs_the_weights_here_says_so(tmp_path):
    student = convert(gpt2(), AttentionSpec("l2", transform="scalar"), init="plain")
    again = offloaded(tmp_path, student, LAYERS["gpt2"], "disk")
    for call in (revert, fold_alpha):
        with pytest.raises(ValueError, match="'transformer.h.1.* is on the meta device .*load the model fully"):
            call(again)
    with pytest.raises(ValueError, match="'h.1.attn': its λ and α are offloaded"):
        current_report(again)
    again.save_pretrained(tmp_path / "again")
    batch = token_batch(student)
    saved = type(student).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(saved(**batch).logits, student(**batch).logits)
