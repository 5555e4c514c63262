"""Native retrieval attention: the metric's own attention where all blocks are seen, the definition where few are, a
cache that can be cut; and `landmark` as the code of before had it.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distattn_hf import AttentionFactory, DistAttnConfig
from distattn_hf.core.derived_cache import DerivedLayer
from distattn_hf.core.inputs import AttentionInputs
from distattn_hf.core.metrics import get_metric
from distattn_hf.core.retrieval import Retrieval, Search, first_keys
from tests.core.test_retrieval import by_loops
from tests.tolerances import CACHED_LOGITS, assert_close

from .choices import FORMS, make_config, make_model, tokens

OLD = Path(__file__).parent.parent / "fixtures" / "old_checkpoints" / "landmark"
FEW = {"window_size": 2, "num_sinks": 1, "block_size": 2, "num_blocks": 2}


def model_of(form: str, mechanism: str, metric: str | None, options: dict):
    """A model of four heads and two key heads in float64; the mechanism of the form "cross" is cross-attention's."""
    config = make_config("dot", "rotary", form, num_attention_heads=4, num_key_value_heads=2)
    names = ("cross_mechanism", "cross_metric", "cross_options") if form == "cross" else ("mechanism", "metric")
    for name, value in zip((*names, "mechanism_options")[:3], (mechanism, metric, options), strict=True):
        setattr(config, name, value)
    torch.manual_seed(0)
    return type(make_model("dot", "rotary", form))(config).double().eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", [None, "l1", "cosine", "sqeuclidean"])
def test_with_all_blocks_it_is_the_metrics_attention(form, metric):
    ids = tokens(length=20)
    mask = torch.ones_like(ids)
    mask[0, -4:] = mask[1, :3] = 0
    inputs, kept = {"input_ids": ids, "attention_mask": mask}, mask.bool()
    if form == "cross":
        inputs["decoder_input_ids"], kept = tokens(length=7, seed=1), torch.ones(3, 7, dtype=torch.bool)
    exact = model_of(form, *(("dot", None, {}) if metric is None else ("distance", metric, {})))
    logits = []
    for blocks in (10, 1):
        model = model_of(form, "retrieval", metric, {**FEW, "num_blocks": blocks})
        missing, unexpected = model.load_state_dict(exact.state_dict(), strict=False)
        assert not unexpected
        assert all("log_lambda" in name for name in missing)
        with torch.no_grad():
            logits.append(model(**inputs).logits[kept])
    with torch.no_grad():
        expected = exact(**inputs).logits[kept]
    assert_close(logits[0], expected, "float64")
    assert (logits[1] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("metric", ["dot", "l1"])
def test_single_keys_are_the_k_nearest_and_a_querys_own(is_causal, metric):
    """What the guide calls "topk", by torch.topk over all distances."""
    options = {"window_size": 1, "num_sinks": 0, "block_size": 1, "far_field": False, "num_blocks": 4}
    layer = AttentionFactory.create("retrieval", 16, 2, is_causal=is_causal, metric=metric, **options).double().eval()
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    query, key, value = (layer._heads(p, x) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    nearness = query @ key.mT if metric == "dot" else -torch.cdist(query, key, p=1)
    logits = nearness * layer.distattn.lam().double()[:, None, None] * 8**-0.5
    own = torch.eye(23, dtype=torch.bool)
    others = logits.masked_fill(own | (torch.ones(23, 23).triu(1).bool() & is_causal), float("-inf"))
    chosen = torch.zeros_like(others, dtype=torch.bool).scatter(-1, others.topk(4).indices, True)
    chosen = chosen & (others > float("-inf")) | own
    weights = logits.masked_fill(~chosen, float("-inf")).softmax(-1)
    expected = layer.o_proj((weights @ value).transpose(1, 2).flatten(2))
    found = layer(x, output_attentions=True)
    assert_close(found[0], expected, "float64")
    assert_close(found[1], weights, "float64")


def test_without_blocks_to_open_far_keys_count_by_groups():
    """What the guide calls hierarchical with two fixed levels: keys of one far block change nothing but its sums."""
    options = {"window_size": 2, "num_sinks": 0, "block_size": 4, "num_blocks": 0}
    layer = AttentionFactory.create("retrieval", 16, 2, is_causal=True, **options).double().eval()
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    with torch.no_grad():
        output = layer(x)
        plain = AttentionFactory.create("retrieval", 16, 2, is_causal=True, **options, far_field=False).double().eval()
        plain.load_state_dict(layer.state_dict())
        # Far keys count, and in what order they stand in their block does not.
        assert (plain(x) - output)[:, -1].abs().max() > 1e-3
        order = torch.tensor([*range(8), 10, 8, 11, 9, *range(12, 24)])
        assert_close(layer(x[:, order])[:, -1], output[:, -1], "float64")
        other = x.clone()
        other[:, 8] += 1.0
        assert (layer(other) - output)[:, -1].abs().max() > 1e-4


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_a_layer_is_the_definition(is_causal, metric):
    """The loops over queries and blocks, on the layer's own projections, with padding; and with a cache, causal."""
    layer = AttentionFactory.create("retrieval", 16, 2, is_causal=is_causal, metric=metric, **FEW).double().eval()
    x, keep = torch.randn(2, 19, 16, dtype=torch.float64), torch.ones(2, 19, dtype=torch.bool)
    keep[0, :3] = keep[1, 5] = False
    query, key, value = (layer._heads(p, x) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    inputs = AttentionInputs(
        query, key, value, get_metric(metric), layer.distattn.lam().double(), 8**-0.5, None, keep[:, None, None],
        None, is_causal,
    )  # fmt: skip
    expected, weights = by_loops(Retrieval(inputs, Search(**FEW, min_weight=0.0), first_keys(keep)))
    found, found_weights = layer(x, attention_mask=keep, output_attentions=True)
    assert_close(found, layer.o_proj(expected.transpose(1, 2).flatten(2)), "float64")
    assert_close(found_weights, weights, "float64")
    # Some key that causality and padding leave is not read.
    weights = by_loops(Retrieval(inputs, Search(**FEW, min_weight=0.0, far_field=False), first_keys(keep)))[1]
    seen = keep[:, None, None] & torch.ones(19, 19).bool().tril() if is_causal else keep[:, None, None]
    assert ((weights == 0) & seen).any()


@pytest.mark.parametrize("metric", ["dot", "l1"])
def test_a_cache_that_is_cut_and_goes_on_otherwise(metric):
    """As assisted generation does: what was taken back leaves nothing behind, in the codes either."""
    model, ids = model_of("causal", "retrieval", metric, FEW), tokens(length=24)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        assert all(type(layer) is DerivedLayer for layer in cache.layers)
        kept = ["codes", ("summaries", 0)] if metric == "dot" else [("summaries", 0)]
        assert all({n: d.counted for n, d in x.derived.items()} == dict.fromkeys(kept, 24) for x in cache.layers)
        cache.crop(-9)
        other = torch.cat([ids[:, :15], tokens(length=5, seed=4)], dim=1)
        step = model(other[:, 15:], past_key_values=cache).logits
        assert_close(step, model(other, use_cache=False).logits[:, 15:], "float64")


def test_assisted_generation_is_greedy():
    model = model_of("causal", "retrieval", "dot", FEW)
    ids = tokens(batch=1, length=6).repeat(1, 3)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        greedy = model.generate(ids, **options)
        assisted = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert assisted.tolist() == greedy.tolist()


def test_what_its_config_says():
    assert DistAttnConfig(mechanism="retrieval").metric == "dot"
    assert DistAttnConfig(mechanism="Retrieval", metric="manhattan").metric == "l1"
    for options, says in (
        ({"window_size": 0}, "window_size must be an integer >= 1 with mechanism='retrieval', got 0"),
        ({"num_candidates": 4}, "AttentionSpec has no field 'num_candidates'"),
        ({"landmarks": "kmeans"}, "'landmarks' is no option of mechanism 'retrieval'"),
    ):
        with pytest.raises(ValueError, match=says):
            DistAttnConfig(mechanism="retrieval", mechanism_options=options)


def test_an_old_landmark_checkpoint_gives_the_same_numbers():
    """Saved, with its logits, by the code of before landmark attention was a way to choose the blocks of retrieval."""
    stored = load_file(OLD / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(OLD).eval()
    assert model.config.mechanism == "landmark"
    ids, mask = stored["input_ids"], stored["attention_mask"]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        given = model.generate(ids[1:], attention_mask=mask[1:], max_new_tokens=8, do_sample=False, eos_token_id=None)
    torch.testing.assert_close(logits, stored["logits"], rtol=0, atol=CACHED_LOGITS)
    assert given.tolist() == stored["continuation"].tolist()
