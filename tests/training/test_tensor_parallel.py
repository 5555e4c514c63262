"""Two processes that split a converted model's heads train it as one does: λ, α, ε, maps and landmarks go with them."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from distattn_hf import AttentionSpec, convert
from distattn_hf.core.tensor_parallel import STYLE, plan_by_heads
from tests.conversion.models import VOCAB
from tests.conversion.test_offload import student_of
from tests.training.tensor_parallel_worker import CASES, REFUSED, losses
from tests.training.test_distributed import start


def qwen3_of(options: dict, key_heads: int = 2):
    """A converted model that normalises the queries and keys of each head."""
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=key_heads,
        head_dim=8, intermediate_size=32, max_position_embeddings=64, pad_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return convert(Qwen3ForCausalLM(config), AttentionSpec(**options), init="plain")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder of the models, what two processes found)"""
    folder = tmp_path_factory.mktemp("tensor-parallel")
    for case, options in {**CASES, **{case: options for case, (options, _) in REFUSED.items()}}.items():
        torch.manual_seed(0)
        student = qwen3_of(options) if case.startswith("norms") else student_of("llama", **options)
        for name, fixed in student.named_buffers():
            if ".distattn." in name:
                fixed += 0.3 * torch.randn_like(fixed)
        student.save_pretrained(folder / case)
    start(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
          "--rdzv-endpoint", "localhost:0", "-m", "tests.training.tensor_parallel_worker", str(folder))  # fmt: skip
    return folder, torch.load(folder / "found.pt")


@pytest.mark.parametrize("case", CASES)
def test_five_steps_on_two_processes_are_five_steps_on_one(two, case):
    folder, found = two
    expected = losses(folder / case)
    # λ, α and landmarks stay in float32, and a loss is taken in float32.
    torch.testing.assert_close(found[case]["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[case]["generated"], expected["generated"])
    assert found[case]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert abs(expected["losses"][-1] - expected["losses"][0]) > 0.05
    saved = load_file(folder / case / "trained" / "model.safetensors")
    trained = [name for name in saved if ".distattn." in name]
    assert bool(trained) == (case != "retrieval")
    for name, tensor in saved.items():
        # Five steps of Adam of 0.01 each, the first of which are about signs.
        assert float((tensor - expected["parameters"][name]).abs().max()) < 1e-3, name


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_as_it_loads(two, case):
    said = two[1][case]
    assert said.startswith("tensor parallelism cannot split the converted attention module 'model.layers.0.self_attn'")
    assert REFUSED[case][1] in said


PLAN = {f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
PLAN |= {"model.layers.*.self_attn.o_proj": "rowwise", "model.layers.*.mlp.up_proj": "colwise"}


def test_a_plan_names_all_that_a_group_has():
    found = plan_by_heads(student_of("llama", **CASES["nystrom"]), PLAN, 2)
    group = "model.layers.*.self_attn.distattn.groups.*"
    names = ("landmarks", "interpolation_map", "landmark_bias", "interpolation_bias", "key_gain")
    assert found.keys() == {"model.layers.*.self_attn.distattn", group, *(f"{group}.{name}" for name in names)}
    assert set(found.values()) == {STYLE}


def test_modules_that_a_plan_leaves_whole_stay_whole():
    assert plan_by_heads(student_of("llama", metric="l2"), {"model.layers.*.mlp.up_proj": "colwise"}, 2) == {}


@pytest.mark.parametrize(
    ("plan", "ranks", "words"),
    [
        (PLAN, 3, "4 heads are no multiple of 3 ranks"),
        (
            PLAN | {"model.layers.*.self_attn.q_proj": "colwise_gather_output"},
            2,
            "the plan has {'q_proj': 'colwise_gather_output'}, and its heads are split only where projections are",
        ),
    ],
)
def test_plans_that_split_heads_in_another_way_are_refused(plan, ranks, words):
    with pytest.raises(
        ValueError, match="cannot split the converted attention module 'model.layers.0.self_attn': "
    ) as e:
        plan_by_heads(student_of("llama", metric="l2"), plan, ranks)
    assert words in str(e.value)


def test_fewer_key_heads_than_ranks_are_refused():
    with pytest.raises(ValueError, match="'model.layers.0.self_attn': 1 key heads are no multiple of 2 ranks"):
        plan_by_heads(qwen3_of({"metric": "l2"}, key_heads=1), PLAN, 2)


def test_a_norm_over_all_heads_is_no_norm_of_heads():
    student = qwen3_of({"metric": "l2"})
    plan = PLAN | {"model.layers.*.self_attn.q_norm": "replicated_with_grad_allreduce"}
    assert plan_by_heads(student, plan, 2)
    student.model.layers[0].self_attn.q_norm.weight = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match="the plan has {'q_norm': 'replicated_with_grad_allreduce'}"):
        plan_by_heads(student, plan, 2)
