"""Five training steps of each case under FSDP2, as one of several processes of torchrun; writes what they found."""

import sys

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from distattn_hf.core.parameters import HeadParameters
from tests.conversion.models import token_batch
from tests.conversion.test_offload import LAYERS, student_of

NYSTROM = {"mechanism": "nystrom", "num_landmarks": 4, "window_size": 8, "num_sinks": 2}
# (family, spec, whether each group of heads is a unit of its own, checkpointing)
CASES = {
    "scalar": ("llama", {"metric": "l2", "transform": "scalar"}, False, False),
    "scalar, units of heads": ("llama", {"metric": "l2", "transform": "scalar"}, True, False),
    "maps": ("llama", {"metric": "l2", "transform": "maps"}, True, False),
    "maps, checkpointing": ("gpt2", {"metric": "l2", "transform": "maps"}, True, True),
    "nystrom": ("llama", NYSTROM, True, False),
    "nystrom, exact below": ("llama", {**NYSTROM, "exact_below": 12}, True, False),
    "nystrom, position bias": ("t5", NYSTROM, True, False),
}


STEPS = 5


def steps(model, batch: dict, gather=lambda tensor: tensor) -> tuple[list[torch.Tensor], dict]:
    """(losses of five steps on a batch, gradients of the first of them), each gathered to what all processes hold."""
    batch = {**batch, "labels": batch.get("decoder_input_ids", batch["input_ids"])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, gradients = [], {}
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients = gradients or {n: gather(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def build(case: str):
    family, options, *_ = CASES[case]
    torch.manual_seed(0)
    # In float64, where five steps leave rounding small.
    model = student_of(family, **options).double()
    return model, token_batch(model)


def sharded(case: str, mesh) -> tuple[list[float], dict]:
    """(mean losses, {name: gradient of the first step}) where each process has a row of the batch."""
    family, _, groups, checkpointing = CASES[case]
    model, batch = build(case)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    if groups:
        for module in [m for m in model.modules() if isinstance(m, HeadParameters)]:
            fully_shard(module, mesh=mesh)
    for layer in LAYERS[family]:
        for part in model.get_submodule(layer.rpartition(".")[0]):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rank = mesh.get_rank()
    own = {name: tensor[rank : rank + 1] for name, tensor in batch.items()}
    losses, gradients = steps(model, own, lambda gradient: gradient.full_tensor())
    losses = torch.stack(losses)
    torch.distributed.all_reduce(losses)
    return (losses / mesh.size()).tolist(), gradients


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    devices = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    found = {}
    for name in CASES:
        try:
            found[name] = sharded(name, devices)
        except Exception as error:  # the test of this case shows it
            found[name] = repr(error)
    if torch.distributed.get_rank() == 0:
        torch.save(found, sys.argv[1])
    torch.distributed.barrier()  # none ends while another waits for it
    torch.distributed.destroy_process_group()
