"""Attention of a sequence that is split over the processes of torchrun: each runs its stretch of every case.

Writes outputs and gradients of the rank's own rows, and what it sent; `whole` gives the same in one process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import distattn_hf
from distattn_hf.core.nystrom_hybrid import WindowBias
from distattn_hf.functional import sequence_parallel
from distattn_hf.functional.sequence_exchange import count_traffic

BATCH, HEADS, SIZE, VALUE_SIZE, LANDMARKS = 2, 4, 6, 5, 7
# Lengths of the stretches by number of processes: uneven, and of four, two shorter than the window and the sinks.
LENGTHS = {2: (19, 30), 4: (3, 90, 2, 75)}
NYSTROM = {"window_size": 6, "num_sinks": 4, "lam": 0.7}
RETRIEVAL = {"block_size": 4, "num_blocks": 2, "min_weight": 0.02, "window_size": 5, "num_sinks": 2}
# (function, options, dtype, padding: left and where else, key heads)
CASES = {
    "nystrom": ("nystrom", NYSTROM, torch.float64, None, 2),
    "nystrom, float32": ("nystrom", NYSTROM, torch.float32, None, 4),
    "nystrom, left padding": ("nystrom", NYSTROM, torch.float64, "left", 4),
    "nystrom, padding anywhere": ("nystrom", NYSTROM, torch.float64, "anywhere", 1),
    "nystrom, no window": ("nystrom", {"num_sinks": 2, "lam": 0.7}, torch.float64, "left", 2),
    "nystrom, a long window": ("nystrom", {**NYSTROM, "window_size": 40, "lift": True}, torch.float64, None, 2),
    "nystrom, window alone": ("nystrom", {"window_size": 9, "regularisation": 0.1}, torch.float64, None, 2),
    "nystrom, position bias": ("nystrom", {**NYSTROM, "bias": True}, torch.float64, "left", 2),
    "retrieval": ("retrieval", RETRIEVAL, torch.float64, None, 2),
    "retrieval, float32": ("retrieval", RETRIEVAL, torch.float32, "left", 2),
    "retrieval, left padding": ("retrieval", RETRIEVAL, torch.float64, "left", 1),
    "retrieval, l2": ("retrieval", {**RETRIEVAL, "metric": "l2", "lam": 0.5}, torch.float64, "anywhere", 4),
    "retrieval, no far field": ("retrieval", {**RETRIEVAL, "far_field": False}, torch.float64, None, 2),
}


def problem(case: str, processes: int) -> tuple[dict, dict]:
    """({query, key, value, mask, weights of a loss}, {landmarks, options}) of the whole sequence."""
    function, options, dtype, padding, key_heads = CASES[case]
    length, made = sum(LENGTHS[processes]), torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    tokens = {
        "query": draw(BATCH, HEADS, length, SIZE), "key": draw(BATCH, key_heads, length, SIZE),
        "value": draw(BATCH, key_heads, length, VALUE_SIZE), "loss": draw(BATCH, HEADS, length, VALUE_SIZE),
    }  # fmt: skip
    keep = torch.ones(BATCH, length, dtype=torch.bool)
    if padding:
        # All of the first process's tokens of the first row, and more.
        keep[0, : LENGTHS[processes][0] + 3] = False
    if padding == "anywhere":
        keep &= torch.rand(BATCH, length, generator=made) > 0.2
    tokens["value"] = tokens["value"].masked_fill(~keep[:, None, :, None], float("nan"))
    options = dict(options)
    if options.pop("bias", False):
        options["position_bias"] = WindowBias(draw(HEADS, 2 * options["window_size"] - 1), draw(HEADS), draw(HEADS))
    if function == "nystrom":
        options["landmarks"] = draw(HEADS, LANDMARKS, SIZE)
    return tokens | {"mask": keep}, options


def run(tokens: dict, options: dict, attention) -> dict:
    """{output, gradients} of a loss of the output of one attention."""
    leaves = {name: tokens[name].clone().requires_grad_() for name in ("query", "key", "value")}
    if "landmarks" in options:
        options = {**options, "landmarks": options["landmarks"].clone().requires_grad_()}
    output = attention(**leaves, mask=tokens["mask"], **options)
    (output * tokens["loss"]).sum().backward()
    found = {"output": output.detach()} | {name: tensor.grad for name, tensor in leaves.items()}
    return found | ({"landmarks": options["landmarks"].grad} if "landmarks" in options else {})


def whole(case: str, processes: int) -> dict:
    """What one process finds."""
    function = distattn_hf.nystrom_attention if CASES[case][0] == "nystrom" else distattn_hf.retrieval_attention
    tokens, options = problem(case, processes)
    return run(tokens, {**options, "is_causal": True}, function)


def stretch(tensor: torch.Tensor, rank: int, lengths, axis: int) -> torch.Tensor:
    return tensor.split(list(lengths), dim=axis)[rank]


def own(case: str) -> dict:
    """What this process finds of its stretch: gradients, and the output without any, by the kernels."""
    rank, lengths = dist.get_rank(), LENGTHS[dist.get_world_size()]
    tokens, options = problem(case, len(lengths))
    tokens = {name: stretch(tensor, rank, lengths, 1 if name == "mask" else 2) for name, tensor in tokens.items()}
    function = getattr(sequence_parallel, f"{CASES[case][0]}_attention")
    with count_traffic() as traffic, torch.no_grad():
        untrained = function(**{n: tokens[n] for n in ("query", "key", "value", "mask")}, **options)
    found = run(tokens, options, function)
    if "landmarks" in found:
        dist.all_reduce(found["landmarks"])
    return found | {"no_grad": untrained, "sent": traffic.sent, "rounds": traffic.rounds}


def refusals() -> dict[str, str]:
    """What each rank says where one has bad arguments, or others than the rest: none may wait for another."""
    rank, said = dist.get_rank(), {}
    query = torch.randn(1, 2, 5, 4)
    points = torch.randn(2, 3, 4)
    for name, changed, options in (
        ("one negative window", {}, {"window_size": -1 if rank == 0 else 3}),
        ("other windows", {}, {"window_size": 3 + rank}),
        ("other sinks", {}, {"num_sinks": 1 + rank}),
        ("other dtypes", {"dtype": torch.float64} if rank == 0 else {}, {}),
        ("no tokens", {"rows": 0} if rank == 1 else {}, {}),
    ):
        tensor = query[:, :, : changed.get("rows", 5)].to(changed.get("dtype", torch.float32))
        try:
            sequence_parallel.nystrom_attention(tensor, tensor, tensor, landmarks=points, **options)
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    return said


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.save(
        {"cases": {case: own(case) for case in CASES}, "refusals": refusals()},
        Path(sys.argv[1]) / f"{dist.get_rank()}.pt",
    )
    dist.barrier()  # none ends while another waits for it
    dist.destroy_process_group()
