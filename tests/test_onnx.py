"""Models written as ONNX with shapes that may change, run by onnxruntime beside the models themselves."""

from dataclasses import replace

import onnxruntime
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from distattn_hf import AttentionSpec, CalibrationOptions, DistAttnConfig, DistAttnModel, convert

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
NYSTROM = AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=4, num_sinks=1, exact_below=0)
EXACT = ("sqeuclidean", "l2", "l1", "cosine", "chebyshev", "lp")


def encoder():
    return BertModel(BertConfig(**SIZES)).eval()


def decoder():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def texts(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and a mask (B, N); the first row's second half is padding."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return torch.randint(0, 100, (rows, length)), mask


class Called(torch.nn.Module):
    """A model without a cache, by two positional inputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        options = {} if isinstance(self.model, BertModel) else {"use_cache": False}
        result = self.model(input_ids=ids, attention_mask=mask, **options)
        return result["logits"] if "logits" in result else result["last_hidden_state"]


def written(model, path):
    called = Called(model).eval()
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.onnx.export(called, texts(2, 12), dynamo=True, dynamic_shapes=(axes, axes), verbose=False)
    program.save(path)
    return called, onnxruntime.InferenceSession(path)


def fitted(model, spec):
    batch = dict(zip(("input_ids", "attention_mask"), texts(4, 64)))
    return convert(model, spec, calibration=[batch], options=CalibrationOptions(steps=3, progress=False))


@pytest.mark.parametrize("metric", EXACT)
def test_exact_metrics(metric, tmp_path):
    """Other numbers of rows and keys than it was written with; fitted, so softened and mapped."""
    spec = AttentionSpec(metric, p=3.0 if metric == "lp" else None)
    check(fitted(encoder(), spec), tmp_path)


@pytest.mark.parametrize("make", ["decoder", "native"])
def test_other_models(make, tmp_path):
    if make == "decoder":
        check(fitted(decoder(), AttentionSpec("l2")), tmp_path)
    else:
        check(DistAttnModel(DistAttnConfig(**SIZES, mechanism="l2")).eval(), tmp_path)


def check(model, folder):
    called, session = written(model, folder / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    for rows, length in ((2, 12), (3, 20), (1, 7)):
        given = texts(rows, length)
        expected = called(*given)
        output = torch.from_numpy(session.run(None, dict(zip(names, (t.numpy() for t in given))))[0])
        seen = given[1].bool()
        torch.testing.assert_close(output[seen], expected[seen], rtol=1e-4, atol=1e-5)


REFUSED = {
    "retrieval": ("retrieval", lambda model: convert(model, "retrieval")),
    "Nyström": ("Nyström", lambda model: fitted(model, NYSTROM)),
    # All heads exact for texts that are as short as the example: longer ones would not be.
    "Nyström, short": ("Nyström", lambda model: fitted(model, replace(NYSTROM, exact_below=64))),
}


@pytest.mark.parametrize("make", [encoder, decoder])
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_onnx_form_is_refused_by_name(name, make, tmp_path):
    """In whichever way the exporter tries to trace the model, and without its optimiser, which may fail instead."""
    attention, student_of = REFUSED[name]
    called, axes = Called(student_of(make())).eval(), {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as error:
        torch.onnx.export(called, texts(2, 12), dynamo=True, dynamic_shapes=(axes, axes), optimize=False, verbose=False)
    causes, cause = [], error.value
    while cause is not None:
        causes.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    assert any(f"{attention} attention has no ONNX form" in text for text in causes)
