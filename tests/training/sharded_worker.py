"""One training step of each case under FSDP2, as one of several processes of torchrun; writes losses and gradients."""

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


def step(model, batch: dict) -> torch.Tensor:
    """The loss of a batch, before a step against its gradients."""
    batch = {**batch, "labels": batch.get("decoder_input_ids", batch["input_ids"])}
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def build(case: str):
    family, options, *_ = CASES[case]
    torch.manual_seed(0)
    model = student_of(family, **options)
    return model, token_batch(model)


def sharded(case: str, mesh) -> tuple[float, dict]:
    """(mean loss of the processes' rows, {name: gradient}) where each process has a row of the batch."""
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
    loss = step(model, {name: tensor[rank : rank + 1] for name, tensor in batch.items()})
    torch.distributed.all_reduce(loss)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss) / mesh.size(), gradients


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
    torch.distributed.destroy_process_group()
