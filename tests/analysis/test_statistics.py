"""Statistics against plain loops over full maps in float64, for every metric, with padding; and what they cost."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.analysis.head_patterns import PATTERNS
from distattn_hf.analysis.samples import make_batches
from distattn_hf.analysis.statistics import AttentionStatistics, measure
from distattn_hf.analysis.watch import capture
from distattn_hf.functional.row_statistics import row_statistics
from tests.analysis.models import FIRST, PREVIOUS, UNIFORM, hand_built, letter_tokenizer
from tests.conversion.models import FAMILIES, token_batch
from tests.tolerances import assert_close

# Distances from q·k lose 2e-16 of squares of size up to 1e3, whose root and softmax follow; sums of 40 rows.
CLOSE = {"rel": 1e-8, "abs": 1e-8}
# Llama's own eager attention, which the test takes for the truth, has its softmax in float32: 6e-8 a weight.
CLOSE_FLOAT32 = {"rel": 1e-6, "abs": 1e-6}
SPECS = {
    "dot": None,
    "sqeuclidean": AttentionSpec("sqeuclidean"),
    "lifted": "exact",
    "l2": AttentionSpec("l2", transform="scalar"),
    "l1": AttentionSpec("l1"),
    "lp": AttentionSpec("lp", p=3.0),
    "cosine": AttentionSpec("cosine"),
    "chebyshev": AttentionSpec("chebyshev"),
    "some heads": AttentionSpec("l2", heads=(1, 2), layers="1"),
    "nystrom": AttentionSpec(
        "sqeuclidean", mechanism="nystrom", num_landmarks=4, window_size=4, num_sinks=1, exact_below=6
    ),
}


def student(family: str, name: str, batch: dict):
    """A model of the family in float64 with the named attention in every layer."""
    model, spec = FAMILIES[family](), SPECS[name]
    if name == "nystrom":
        options = CalibrationOptions(steps=2, progress=False)
        model = convert(model, spec, calibration=[batch], options=options)
    elif spec == "exact":
        model = convert(model, AttentionSpec("sqeuclidean"), init="exact")
    elif spec is not None:
        model = convert(model, spec, init="plain")
    return model.double()


def naive_rows(weights, keep, query_keep):
    """{name: mean over rows} of one head over a batch: weights (B, N, M), keep (B, N, M), query_keep (B, N)."""
    found = {"entropy": [], "sparsity": [], "maximum": [], "distance": [], "collapsed_rows": []}
    for item, rows in enumerate(weights):
        for i, row in enumerate(rows):
            kept = [j for j in range(len(row)) if keep[item, i, j]]
            if not query_keep[item, i] or len(kept) < 2:
                continue
            values = [row[j] for j in kept]
            root, length = math.sqrt(len(values)), math.sqrt(sum(v * v for v in values))
            found["entropy"].append(-sum(v * math.log(v) for v in values if v > 0))
            found["sparsity"].append((root - sum(values) / length) / (root - 1))
            found["maximum"].append(max(values))
            found["distance"].append(sum(row[j] * abs(i - j) for j in kept))
            found["collapsed_rows"].append(float(found["entropy"][-1] < 0.1 or max(values) > 0.95))
    return {name: sum(values) / len(values) for name, values in found.items()}, len(found["entropy"])


def naive_diversity(maps, keep, query_keep, head):
    """Mean KL(row of the head ‖ mean row of all heads): maps (B, H, N, M)."""
    total, count = 0.0, 0
    for item in range(len(maps)):
        for i in range(maps.shape[2]):
            if query_keep[item, i] and keep[item, i].sum() > 1:
                mean = maps[item, :, i].mean(0)
                row = maps[item, head, i]
                total += sum(w * math.log(w / m) for w, m in zip(row, mean) if w > 0)
                count += 1
    return total / count


@pytest.mark.parametrize(
    ("family", "name"),
    [*((family, name) for family in ("gpt2", "bert") for name in SPECS), ("llama", "dot"), ("llama", "nystrom")],
)
def test_statistics_are_those_of_full_maps(family, name):
    batch = token_batch(FAMILIES[family](), length=16, padded=True)
    if family == "llama":
        # Its own eager attention gives NaN for queries that see nothing, in float64: so padding to the right.
        batch = {key: value.flip(1) for key, value in batch.items()}
    model = student(family, name, batch)
    found = measure(model, [batch])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    query_keep = batch["attention_mask"].bool().numpy()
    keep = np.broadcast_to(query_keep[:, None, :], (2, 16, 16)).copy()
    if family != "bert":
        keep &= np.tril(np.ones((16, 16), dtype=bool))
    assert query_keep.sum() == 25, "the case must hold padding"
    assert found.num_tokens == 25
    assert found.num_texts == 2
    close = CLOSE_FLOAT32 if family == "llama" else CLOSE
    for module, weights in zip(found.modules, maps, strict=True):
        weights = weights.double().numpy()
        for statistics in found.of(module):
            expected, rows = naive_rows(weights[:, statistics.head], keep, query_keep)
            expected["diversity"] = naive_diversity(weights, keep, query_keep, statistics.head)
            actual = {key: getattr(statistics, key) for key in expected}
            assert actual == pytest.approx(expected, **close), (module, statistics.head)
            assert statistics.rows == rows


@pytest.mark.parametrize("name", ["sqeuclidean", "l2"])
def test_key_norm_share_is_a_ratio_of_variances(name):
    batch = token_batch(FAMILIES["gpt2"](), length=12, padded=True)
    model = student("gpt2", name, batch)
    for state in model.attention_states.values():
        for group in state.groups:
            if group.transform == "scalar":
                group.log_alpha.data.fill_(-0.3)
                group.shift.data.normal_()
    found = measure(model, [batch])
    for module, call in capture(model, batch).items():
        group = model.attention_states[module].groups[0]
        query, key = (t.detach().numpy() for t in group.map(call.query, call.key))
        lam = group.lam().detach().double().numpy()
        for head in range(4):
            above, below = 0.0, 0.0
            for item in range(2):
                for i in range(12):
                    kept = [j for j in range(i + 1) if batch["attention_mask"][item, j]]
                    if len(kept) < 2:
                        continue
                    weight = lam[head] * call.scaling
                    distance = [np.linalg.norm(query[item, head, i] - key[item, head, j]) for j in kept]
                    norms = np.array([np.sum(key[item, head, j] ** 2) for j in kept])
                    if name == "l2":
                        logits, term = -weight * np.array(distance), -weight * norms / (2 * np.mean(distance))
                    else:
                        logits, term = -weight * np.array(distance) ** 2, -weight * norms
                    above, below = above + np.var(term), below + np.var(logits)
            assert found.of(module)[head].key_norm_share == pytest.approx(above / below, **CLOSE)


def test_heads_without_a_key_norm_term_have_no_share():
    batch = token_batch(FAMILIES["gpt2"](), length=8)
    assert all(h.key_norm_share is None for h in measure(student("gpt2", "dot", batch), [batch]).heads)
    assert all(h.key_norm_share == 0.0 for h in measure(student("gpt2", "lifted", batch), [batch]).heads)
    mixed = measure(student("gpt2", "some heads", batch), [batch])
    first, second = mixed.modules
    assert [h.key_norm_share is None for h in mixed.of(first)] == [True] * 4
    assert [h.key_norm_share is None for h in mixed.of(second)] == [True, False, False, True]


def test_streaming_over_batches_is_one_batch():
    """Rows are weighed alike, whatever batch they come in."""
    model = FAMILIES["bert"]().double()
    batch = token_batch(model, padded=True)
    apart = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
    whole, parts = measure(model, [batch]).to_frame(), measure(model, apart).to_frame()
    for column in ("entropy", "distance", "diversity", "strength", "rows"):
        np.testing.assert_allclose(parts[column], whole[column], rtol=1e-10)


def test_blocks_of_queries_are_one_block(monkeypatch):
    from distattn_hf.analysis import weights as maps

    model = FAMILIES["gpt2"]().double()
    batch = token_batch(model, padded=True)
    whole = measure(model, [batch])
    monkeypatch.setattr(maps, "_BLOCK_ENTRIES", 1)
    for head, other in zip(measure(model, [batch]).heads, whole.heads, strict=True):
        assert head.entropy == pytest.approx(other.entropy, rel=1e-12)
        assert head.patterns == pytest.approx(other.patterns, rel=1e-10)


def test_row_statistics_of_rows_that_say_nothing_are_zero_with_finite_gradients():
    weights = torch.zeros(1, 3, 5, dtype=torch.float64)
    weights[0, 1, 2], weights[0, 2] = 1.0, 0.2
    keep = torch.tensor([[[False] * 5, [False, False, True, False, False], [True] * 5]])
    weights.requires_grad_(True)
    found = row_statistics(weights, keep, torch.tensor([4, 5, 6]))
    total = sum(getattr(found, name).sum() for name in ("entropy", "sparsity", "maximum", "distance"))
    total.backward()
    assert bool(weights.grad.isfinite().all())
    assert found.num_keys.tolist() == [[0, 1, 5]]
    assert_close(found.entropy.detach(), torch.tensor([[0.0, 0.0, math.log(5)]], dtype=torch.float64), "float64")
    assert_close(found.sparsity.detach(), torch.zeros(1, 3, dtype=torch.float64), "float64")
    assert_close(found.distance.detach(), torch.tensor([[0.0, 3.0, 4.0]], dtype=torch.float64), "float64")
    # One key is no choice: neither collapsed nor counted.
    assert found.collapsed.tolist() == [[False, False, False]]
    assert float(found.means()["maximum"].detach()) == pytest.approx(0.2)


def test_row_statistics_leaves_out_what_is_not_kept():
    """Also where a map carries weights there: a model's own may."""
    weights = torch.tensor([[0.5, 0.25, 0.25, 7.0]], dtype=torch.float64)
    found = row_statistics(weights, torch.tensor([True, True, True, False]), torch.tensor([1]))
    entropy = torch.tensor([1.5 * math.log(2)], dtype=torch.float64)
    assert_close(found.entropy, entropy, "float64")
    assert (float(found.maximum), float(found.distance), int(found.num_keys)) == (0.5, 0.75, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"weights must be float \(..., N, M\)"),
        ((torch.ones(2, 3).long(),), "weights must be float"),
        ((torch.ones(2, 3), torch.ones(2, 3)), "keep must be bool"),
        ((torch.ones(2, 3), torch.ones(4, 3).bool()), "keep must be bool and broadcast"),
        ((torch.ones(2, 3), None, torch.arange(3)), "query_positions must have 2 entries"),
        ((torch.ones(2, 3), None, None, torch.arange(2)), "key_positions must have 3 entries"),
    ],
)
def test_row_statistics_says_what_it_takes(arguments, message):
    with pytest.raises(ValueError, match=message):
        row_statistics(*arguments)


def test_hand_built_heads_are_named():
    tokenizer = letter_tokenizer()
    model = hand_built()
    texts = ["a b c d e f g h i j k l m a", "b a . d c b a e . f g h", "c c d d e e f f"]
    found = measure(model, make_batches(model, tokenizer, texts), tokenizer)
    heads = found.of(found.modules[0])
    assert [heads[i].pattern for i in (PREVIOUS, FIRST, UNIFORM)] == ["previous token", "first token", "uniform"]
    assert all(head.strength > 0.9 for head in heads), [head.strength for head in heads]
    assert [head.collapsed for head in heads] == [True, True, False]
    assert set(heads[0].patterns) == set(PATTERNS)
    assert found.pattern_counts() == {"previous token": 1, "first token": 1, "uniform": 1}


@pytest.mark.parametrize("pattern", ["diagonal", "block", "separator"])
def test_other_patterns_are_named(pattern):
    """Weights put where the pattern says, one map at a time."""
    from distattn_hf.analysis.head_patterns import Places, dominant_pattern, pattern_masses, pattern_strength

    letters = torch.tensor([[3, 4, 5, 6, 7, 2, 8, 9, 3, 4, 5, 2, 6, 7, 8, 9]])
    separators = letters == 2
    weights = torch.zeros(1, 1, 16, 16)
    segments = torch.tensor([0] * 6 + [1] * 6 + [2] * 4)
    for i in range(16):
        if pattern == "diagonal":
            weights[..., i, i] = 1.0
        elif pattern == "separator":
            weights[..., i, separators[0]] = 0.5
        else:
            mine = (segments == segments[i]) & ~separators[0]
            weights[..., i, mine] = 1 / int(mine.sum())
    keep = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    masses, counted = pattern_masses(weights, keep, 0, Places.of(keep[:, 0, 0], separators), True)
    rows = counted.expand(1, 1, 16)
    strengths = {n: pattern_strength(float(m[rows].mean()), float(c[rows].mean())) for n, (m, c) in masses.items()}
    name, strength = dominant_pattern(strengths)
    assert name == pattern, strengths
    assert strength > 0.4
    if pattern != "block":
        assert all(value < 0.1 for other, value in strengths.items() if other != pattern), strengths


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["dot", "l2", "nystrom"])
def test_a_long_text_needs_no_more_than_one_head_map(name):
    from transformers import GPT2Config, GPT2LMHeadModel

    length = 4096
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=length, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    batch = {"input_ids": torch.randint(0, 16, (1, length))}
    if name == "nystrom":
        short = {"input_ids": batch["input_ids"][:, :64]}
        model = convert(model, SPECS[name], calibration=[short], options=CalibrationOptions(steps=1, progress=False))
    elif name != "dot":
        model = convert(model, AttentionSpec(name), init="plain")
    with LargestTensor() as seen:
        found = measure(model, [batch])
    assert found.heads[0].rows == length - 1
    assert 4096 * 64 <= seen.largest <= length * length, "a block, and at most the map of one head"


def test_statistics_survive_json_and_become_a_frame():
    import json

    model, tokenizer = hand_built(), letter_tokenizer()
    found = measure(model, make_batches(model, tokenizer, ["a b c d e f"]), tokenizer)
    assert AttentionStatistics.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    frame = found.to_frame()
    assert list(frame["pattern"]) == [head.pattern for head in found.heads]
    assert frame.loc[0, "strength of previous token"] == found.heads[0].patterns["previous token"]
    assert found.grid("entropy")[0] == [head.entropy for head in found.heads]
    with pytest.raises(ValueError, match="version must be 1, got 2"):
        AttentionStatistics.from_dict({**found.to_dict(), "version": 2})
    with pytest.raises(ValueError, match="name must be one of"):
        found.grid("pattern")
    with pytest.raises(ValueError, match=r"module must be one of h\.0\.attn, got 'x'"):
        found.of("x")
    with pytest.raises(ValueError, match="batches is empty"):
        measure(model, [])
