"""Trains converted models on rows that are split over the processes of torchrun; `losses` does it in one process."""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from distattn_hf import AttentionSpec
from distattn_hf.core.configuration_distattn import config_class_for
from distattn_hf.core.modeling_converted import model_class_for
from distattn_hf.training.long_sequences import sequence_parallel, stretch_of, sum_gradients
from tests.conversion.models import FAMILIES, token_batch

STEPS = 5
NYSTROM = {"mechanism": "nystrom", "num_landmarks": 4, "window_size": 6, "num_sinks": 2}
RETRIEVAL = {
    "mechanism": "retrieval",
    "block_size": 4,
    "window_size": 4,
    "num_blocks": 2,
    "min_weight": 0.02,
    "num_sinks": 1,
}
# (family, specs, tokens of a row, gradient checkpointing)
CASES = {
    "nystrom": ("llama", [NYSTROM], 47, False),
    "nystrom, no lift": ("gpt2", [{**NYSTROM, "lift": False, "transform": "scalar"}], 31, False),
    "nystrom, checkpointing": ("llama", [NYSTROM], 47, True),
    "retrieval": ("llama", [RETRIEVAL], 93, False),
    "retrieval by l2": ("gpt2", [{**RETRIEVAL, "metric": "l2", "transform": "maps"}], 93, False),
    "layers of both": ("llama", [{**NYSTROM, "layers": [0]}, {**RETRIEVAL, "layers": [1]}], 61, False),
}


def build(case: str) -> torch.nn.Module:
    """A converted model in float64 with random λ, α and landmarks."""
    family, specs, _, checkpointing = CASES[case]
    teacher = FAMILIES[family]()
    data = {key: value for key, value in teacher.config.to_dict().items() if key not in ("model_type", "dtype")}
    data |= {name: 0.0 for name in data if name.endswith("dropout") or name.endswith("pdrop")}
    block = {"specs": [AttentionSpec(**spec).to_dict() for spec in specs]}
    torch.manual_seed(1)
    model = model_class_for(type(teacher))(
        config_class_for(type(teacher.config)).from_dict({**data, "distattn": block})
    )
    for name, parameter in model.named_parameters():
        if ".distattn." in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.double().train()


def batch_of(case: str, model: torch.nn.Module) -> dict:
    batch = token_batch(model, CASES[case][2], padded=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1, 20:24] = -100
    return {**batch, "labels": labels}


def losses(case: str, split: bool) -> dict:
    """{losses of the steps, the parameters after them} of one process, or of this one's stretches."""
    model = build(case)
    batch = batch_of(case, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        with sequence_parallel(model) if split else nullcontext():
            loss = model(**(stretch_of(batch) if split else batch)).loss
            loss.backward()
        loss = loss.detach()
        if split:
            sum_gradients(model)
            dist.all_reduce(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return {"losses": found, "parameters": {name: p.detach() for name, p in model.named_parameters()}}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {case: losses(case, split=True) for case in CASES}
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]))
    dist.barrier()  # none ends while another waits for it
    dist.destroy_process_group()
