"""A sequence of which two or four processes hold stretches gets the attention of one process, forward and backward."""

import sys

import pytest
import torch

from distattn_hf.core.retrieval_far import BEGINNING
from tests.sequence_worker import BATCH, CASES, HEADS, LANDMARKS, LENGTHS, SIZE, VALUE_SIZE, problem, whole
from tests.tolerances import assert_close
from tests.training.test_distributed import start

KINDS = {torch.float64: ("float64", "float64"), torch.float32: ("float32_forward", "float32_gradient")}


@pytest.fixture(scope="module", params=LENGTHS, ids=lambda number: f"{number} processes")
def found(request, tmp_path_factory):
    """What each of so many processes found."""
    folder = tmp_path_factory.mktemp("sequence")
    start(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(request.param), "--rdzv-backend",
          "c10d", "--rdzv-endpoint", "localhost:0", "-m", "tests.sequence_worker", str(folder))  # fmt: skip
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_stretches_are_the_whole(found, case):
    ranks = [each["cases"][case] for each in found]
    expected, dtype = whole(case, len(found)), CASES[case][2]
    forward, backward = KINDS[dtype]
    assert dtype != torch.float64 or expected["output"].dtype == dtype
    for name, tensor in expected.items():
        # Each rank has the landmarks' whole gradient by now; of the rest its own rows.
        actual = ranks[0][name] if name == "landmarks" else torch.cat([rank[name] for rank in ranks], dim=2)
        assert tensor.isfinite().all()
        assert_close(actual, tensor, forward if name == "output" else backward, name)
    untrained = torch.cat([rank["no_grad"] for rank in ranks], dim=2)
    assert_close(untrained, expected["output"], forward, "without gradients")


def test_what_ranks_disagree_in_is_refused_by_all_of_them(found):
    said = [each["refusals"] for each in found]
    own, *others = (each["one negative window"] for each in said)
    assert own == "window_size must be an integer >= 0, got -1"
    assert others == ["ranks [0] refused their arguments: their own errors say why"] * len(others)
    for name, words in {
        "other windows": "window_size must be the same on all ranks, got [3, 4",
        "other sinks": "first tokens asked for must be the same on all ranks, got [1, 2",
        "other dtypes": "dtype (0: torch.float64, 1: torch.float32, 2: torch.float16, 3: torch.bfloat16) must be the",
        "no tokens": "each rank must hold at least one token, got lengths [5, 0",
    }.items():
        assert all(each[name].startswith(words) for each in said), name


@pytest.mark.parametrize("case", ["nystrom", "nystrom, float32", "nystrom, a long window", "retrieval"])
def test_the_bytes_that_are_counted_are_those_of_the_formula(found, case):
    function, options, dtype, _, key_heads = CASES[case]
    processes, lengths, width = len(found), LENGTHS[len(found)], dtype.itemsize
    starts = [sum(lengths[:rank]) for rank in range(processes + 1)]
    reach = options["window_size"] - 1 if function == "nystrom" else sum(lengths)
    row = BATCH * key_heads * (SIZE + VALUE_SIZE + 1) * width
    summed = 2 * (processes - 1) / processes
    for rank, each in enumerate(found):
        sent, rounds = each["cases"][case]["sent"], each["cases"][case]["rounds"]
        # Each later rank wants so many of the tokens before it, of which this one holds some.
        rows = sum(
            max(0, starts[rank + 1] - max(starts[rank], starts[later] - reach)) for later in range(rank + 1, processes)
        )
        if function == "nystrom":
            state = BATCH * HEADS * LANDMARKS * (VALUE_SIZE + 1) * width
            # To the next rank, and then by doubling, what all but the first have gathered.
            times = {2: [1, 0], 4: [1, 3, 2, 0]}[processes][rank]
            sinks = summed * BATCH * key_heads * options["num_sinks"] * (SIZE + VALUE_SIZE) * width
            assert (sent["halo"], sent["sinks"], sent["state"]) == (rows * row, sinks, times * state)
            assert (rounds["halo"], rounds["state"]) == (1, {2: 1, 4: 3}[processes])
        else:
            beginning = summed * BATCH * HEADS * BEGINNING * SIZE * width
            assert (sent["keys"], sent["beginning"], rounds["keys"]) == (rows * row, beginning, 1)


def test_padding_holds_nan_in_these_cases():
    """A rank that passed on what stands at padding would spoil the others."""
    for case, (_, _, _, padding, _) in CASES.items():
        tokens, _ = problem(case, 2)
        assert tokens["value"].isnan().any() == (padding is not None)
