"""A model that trains on rows that two or four processes hold stretches of is the model of one process."""

import re
import sys

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForSequenceClassification, OPTConfig, OPTForCausalLM

from distattn_hf import AttentionSpec, DistAttnConfig, DistAttnForCausalLM, convert
from distattn_hf.training.long_sequences import sequence_parallel, stretch_of
from tests.conversion.models import FAMILIES, token_batch
from tests.conversion.test_offload import student_of
from tests.tolerances import assert_close
from tests.training.long_sequences_worker import CASES, NYSTROM, STEPS, losses
from tests.training.test_distributed import start


@pytest.fixture(scope="module", params=(2, 4), ids=lambda number: f"{number} processes")
def split(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "found.pt"
    start(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(request.param), "--rdzv-backend",
          "c10d", "--rdzv-endpoint", "localhost:0", "-m", "tests.training.long_sequences_worker", str(out))  # fmt: skip
    return torch.load(out)


@pytest.mark.parametrize("case", CASES)
def test_five_steps_on_stretches_are_five_steps_on_whole_rows(split, case):
    found, expected = split[case], losses(case, split=False)
    # transformers takes the logits of a loss to float32, whatever the model's dtype.
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert len(set(expected["losses"])) == STEPS
    assert abs(expected["losses"][-1] - expected["losses"][0]) > 0.05
    for name, parameter in expected["parameters"].items():
        # Five steps of Adam, 0.01 each, the first of which are about signs of gradients that float32 rounded.
        assert float((found["parameters"][name] - parameter).abs().max()) < 1e-4, name


def test_without_a_process_group_it_says_what_to_call():
    model = convert(FAMILIES["llama"](), AttentionSpec(mechanism="retrieval"))
    with sequence_parallel(model), pytest.raises(ValueError, match="call torch.distributed.init_process_group first"):
        model(**token_batch(model))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_process_is_a_group_too(alone):
    model = student_of("llama", **NYSTROM).double()
    batch = token_batch(model, 30, padded=True)
    with torch.no_grad():
        expected = model(**batch).logits
        with sequence_parallel(model):
            found = model(**stretch_of(batch)).logits
            with pytest.raises(ValueError, match="no past_key_values|no cache|no use_cache"):
                model(**batch, use_cache=True)
            with pytest.raises(ValueError, match="needs input_ids or inputs_embeds by name"):
                model(attention_mask=batch["attention_mask"])
            with pytest.raises(ValueError, match=re.escape("attention_mask must be (B, N) = (2, 30), got (2, 29)")):
                model(batch["input_ids"], attention_mask=batch["attention_mask"][:, 1:])
            with pytest.raises(ValueError, match="output_attentions is not available under sequence_parallel"):
                model(**batch, output_attentions=True)
        assert_close(found, expected, "float64")
        # Afterwards the model is as before.
        assert torch.equal(model(**batch).logits, expected)
        assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape == (2, 32)
    with pytest.raises(ValueError, match="each rank must hold at least one token, got rows of 0 tokens for 1 ranks"):
        stretch_of({"input_ids": batch["input_ids"][:, :0]})


def retrieving(model):
    return convert(model, AttentionSpec(mechanism="retrieval"))


def opt():
    return OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                  word_embed_proj_dim=16)
    )  # fmt: skip


def classifier():
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: FAMILIES["llama"](), "got LlamaForCausalLM, which is not converted"),
        (lambda: retrieving(opt()), "PositionalEmbedding counts positions by the mask"),
        (lambda: retrieving(classifier()), "its head may join tokens of all ranks"),
        (lambda: student_of("llama", metric="l2"), "'layers.0.self_attn' has heads of exact attention; convert all"),
        (lambda: student_of("llama", **NYSTROM, layers=[1]), "'layers.0.self_attn' is not converted"),
        (lambda: student_of("llama", **NYSTROM, heads=(0, 1)), "has heads of exact attention"),
        (lambda: student_of("llama", **NYSTROM, exact_below=12), "exact_below=12 tokens, which no rank holds"),
        (lambda: student_of("bert", **NYSTROM), "is not causal self-attention|takes no position_ids|its head may join"),
        (lambda: student_of("t5", **NYSTROM), "takes no position_ids|attention modules"),
        (
            lambda: DistAttnForCausalLM(
                DistAttnConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, is_decoder=True)
            ),
            "got DistAttnForCausalLM, mechanism 'dot', which is not converted",
        ),
    ],
)
def test_other_models_are_refused_by_name(model, words):
    """Where tokens meet in any other way, stretches would be texts of their own."""
    with pytest.raises(ValueError, match=words), sequence_parallel(model()):
        pytest.fail("this model must be refused")
