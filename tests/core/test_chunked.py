"""The chunked backend: blocks of any size give one result, and its memory grows with N, not with N·M."""

import pytest
import torch

from distattn_hf import distance_attention
from distattn_hf.core import backend_chunked
from distattn_hf.core.metrics import get_metric
from tests.tolerances import LINEAR_GROWTH, assert_close

from .cases import Case, evaluate, every_metric, make_tensors, upstream_gradient


def saved_bytes(case: Case, length: int, wanted: tuple[str, ...] = ("query", "key", "value"), **options) -> int:
    """Bytes of the storages that one forward pass keeps to differentiate by `wanted`, its own inputs left out."""
    arguments = make_tensors(length, head_dim=4, batch=1) | {name: make(length) for name, make in options.items()}
    for name in wanted:
        arguments[name].requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in arguments.values() if isinstance(t, torch.Tensor)}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The storage is kept as well, as a freed one's address would be used again.
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = case(**arguments)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


OPTIONS = {
    "full": {},
    "causal": {"is_causal": lambda length: True},
    "padding": {"mask": lambda length: torch.ones(1, length, dtype=torch.long)},
    "lambda per head": {"lam": lambda length: torch.tensor([0.5, 1.5])},
    "dropout": {"dropout_p": lambda length: 0.1},
}


@every_metric
@pytest.mark.parametrize("options", OPTIONS)
def test_memory_kept_for_backward_grows_linearly(metric, p, options):
    small, large = (saved_bytes(Case(metric, p, "chunked", blocks=True), n, **OPTIONS[options]) for n in (128, 256))
    # One (H, N, M) tensor in float32 would be more than all that is allowed here.
    assert large < 2 * 256 * 256 * 4
    assert large <= LINEAR_GROWTH * small


@every_metric
@pytest.mark.parametrize("wanted", ["query", "key", "value", "lam", "position_bias"])
def test_memory_grows_linearly_whichever_tensor_wants_a_gradient(metric, p, wanted):
    options = {"lam": lambda n: torch.tensor([0.5, 1.5]), "position_bias": lambda n: torch.randn(1, 2, 1, n)}
    case = Case(metric, p, "chunked", blocks=True)
    small, large = (saved_bytes(case, length, (wanted,), **options) for length in (128, 256))
    assert large <= LINEAR_GROWTH * small


@every_metric
def test_memory_of_the_reference_grows_quadratically(metric, p):
    """The measurement above can see an (N, M) tensor where there is one."""
    small, large = (saved_bytes(Case(metric, p, "reference"), length) for length in (128, 256))
    assert large >= 2 * 256 * 256 * 4
    assert large > 3 * small


@every_metric
def test_no_graph_no_recomputation(metric, p, monkeypatch):
    """Without gradients the checkpoint, which saves random states for nothing, is left out."""
    monkeypatch.setattr(backend_chunked, "checkpoint", None)
    case, tensors = Case(metric, p, "chunked", blocks=True), make_tensors(40, head_dim=8)
    assert case(**tensors).shape == (2, 2, 40, 8)
    with torch.no_grad():
        assert case(**{name: tensor.requires_grad_() for name, tensor in tensors.items()}).shape == (2, 2, 40, 8)


@every_metric
@pytest.mark.parametrize("only", ["query", "key", "value", "lam", "position_bias"])
def test_gradient_of_one_input_alone(metric, p, only):
    """A model with most parameters frozen: whichever tensor wants a gradient gets it through the blocks."""
    tensors = {**make_tensors(40, 20, 8), "lam": torch.tensor([0.5, 1.5]), "position_bias": torch.randn(1, 2, 40, 20)}
    case = Case(metric, p, "chunked", blocks=True)
    expected = evaluate(case, tensors)[only]
    tensors[only].requires_grad_()
    output = case(**tensors)
    (actual,) = torch.autograd.grad(output, tensors[only], upstream_gradient(output))
    assert_close(actual, expected, "float32_gradient")


@every_metric
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "is_causal"),
    [(16, 16, True), (17, 17, False), (17, 17, True), (32, 32, True), (40, 7, False), (7, 40, True), (50, 33, True)],
)
def test_blocks_give_what_one_block_gives(metric, p, num_queries, num_keys, is_causal):
    """Lengths at, below and above multiples of the block; a mask and a bias whose rows must go with their block."""
    tensors = make_tensors(num_queries, num_keys, 8, dtype=torch.float64)
    tensors["position_bias"] = torch.randn(2, 1, num_queries, num_keys, dtype=torch.float64)
    mask = torch.rand(1, 2, num_queries, num_keys) > 0.3
    expected = evaluate(Case(metric, p, "chunked"), tensors, mask=mask, is_causal=is_causal)
    actual = evaluate(Case(metric, p, "chunked", blocks=True), tensors, mask=mask, is_causal=is_causal)
    for name, value in expected.items():
        assert_close(actual[name], value, "float64", name)


@pytest.mark.parametrize(
    ("entries", "blocks"), [(1, 4), (2 * 2 * 10 * 20, 3), (2 * 2 * 10 * 49, 2), (2 * 2 * 10 * 50, 1), (2**21, 1)]
)
def test_block_holds_the_entries_it_may_and_at_least_16_queries(entries, blocks, monkeypatch):
    """(B, H, M) = (2, 2, 10) and 50 queries: the number of blocks is counted where the distances are asked for."""
    sizes, original = [], type(get_metric("l2")).fast_distance

    def counting(self, query, key, p=None):
        sizes.append(query.shape[-2])
        return original(self, query, key, p)

    monkeypatch.setattr(type(get_metric("l2")), "fast_distance", counting)
    monkeypatch.setattr(backend_chunked, "_BLOCK_ENTRIES", entries)
    distance_attention(**make_tensors(50, 10, 8), metric="l2", lam=1.0, backend="chunked")
    assert len(sizes) == blocks
    assert sum(sizes) == 50
