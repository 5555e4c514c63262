"""Trains converted models whose heads are split over the processes of torchrun; `losses` does it in one process."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import distattn_hf  # noqa: F401 - registers with the Auto classes
from tests.conversion.models import token_batch

STEPS = 5
NYSTROM = {"mechanism": "nystrom", "num_landmarks": 4, "window_size": 8, "num_sinks": 2}
RETRIEVAL = {"mechanism": "retrieval", "block_size": 4, "window_size": 4, "num_blocks": 1, "min_weight": 0.02}
CASES = {
    "scalar": {"metric": "l2", "transform": "scalar"},
    "softened": {"metric": "l1", "transform": "scalar", "softening": "fit"},
    "maps": {"metric": "l2", "transform": "maps"},
    "norms of queries and keys": {"metric": "l2", "transform": "scalar"},
    "fixed lambdas": {"metric": "l2", "learnable_lambda": False},
    "nystrom": NYSTROM,
    "nystrom, exact below": {**NYSTROM, "exact_below": 12},
    "retrieval": RETRIEVAL,
    "retrieval by l2": {**RETRIEVAL, "metric": "l2", "transform": "maps"},
}
# What cannot be split, and what says so.
REFUSED = {
    "some heads": ({"metric": "l2", "heads": (0, 3)}, "some of its heads are converted in another way than the rest"),
    "some Nyström heads": (
        {**NYSTROM, "heads": (0, 1)},
        "some of its heads are converted in another way than the rest",
    ),
}


def losses(folder: Path, **options) -> dict:
    """{losses of five steps, logits, generated tokens}; the trained model is saved where it is split."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)
    batch = token_batch(model, padded=True)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        generated = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    # One tensor at a time: some are split and some are not.
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, foreach=False)
    found = []
    for _ in range(STEPS):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    if options:
        model.save_pretrained(folder / "trained")
    else:
        found_parameters = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {"losses": found, "logits": logits, "generated": generated} | (
        {} if options else {"parameters": found_parameters}
    )


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    folder, results = Path(sys.argv[1]), {}
    split = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=torch.distributed.get_world_size())}
    for case in CASES:
        results[case] = losses(folder / case, **split)
    for case in REFUSED:
        try:
            AutoModelForCausalLM.from_pretrained(folder / case, **split)
            results[case] = "loaded"
        except ValueError as error:
            results[case] = str(error)
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "found.pt")
    torch.distributed.barrier()  # none ends while another waits for it
    torch.distributed.destroy_process_group()
