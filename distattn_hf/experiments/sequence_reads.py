"""How much of the earlier text the queries of one device's stretch read in retrieval heads: what fetching would save.

Sequence parallelism sends all earlier keys and values to a device. The other way is to send what the choice of blocks
needs of all of them (codes, means, what stands for a block that is not read), and then the keys of the chosen blocks.
Measured here, in one process, on text: of the keys before a stretch those that lie in a block that one of the stretch's
queries reads, by key head, over all stretches together (bytes are theirs), and in the last one. Modelled: the bytes of
both ways for 2**20 tokens, on as many devices and with the share of each row.
"""

from dataclasses import dataclass
from functools import cache

import torch

from ..benchmark.measure import only_errors
from ..conversion.convert import convert
from ..conversion.observe import keys_read
from ..core.attention_spec import AttentionSpec
from ..data.sources import read_texts
from ..storage.models import load_checkpoint
from .long_context import MADE, made_checkpoint, made_texts
from .sequence_speed import MODELLED_LENGTH, THERE, Shape


def share_read(read: torch.Tensor, processes: int) -> tuple[float, float]:
    """Return the share of earlier keys that stretches read: of all stretches together, and of the last one.

    read: bool (pieces, H, N), which keys each of so many equal pieces of a text reads; processes divides pieces.
    """
    length = read.shape[2]
    stretches = read.unflatten(0, (processes, -1)).any(1)
    counts = torch.stack([own[:, : number * length // processes].sum() for number, own in enumerate(stretches)])
    earlier = torch.tensor([number * length // processes for number in range(processes)]) * read.shape[1]
    return float(counts.sum() / earlier.sum()), float(counts[-1] / earlier[-1])


def measure(model, ids: torch.Tensor, processes: tuple[int, ...], modules: list[str]) -> dict[int, dict]:
    """Return for each number of processes the shares of the earlier keys that their stretches read."""
    pieces, length = max(processes), ids.shape[1]
    starts = [piece * length // pieces for piece in range(pieces)]
    read = torch.cat([of_module for _, of_module in keys_read(model, ids, starts, modules)], dim=1)
    found = {}
    for count in processes:
        together, last = share_read(read, count)
        each = [share_read(read[:, [head]], count)[0] for head in range(read.shape[1])]
        found[count] = {"share": together, "last": last, "least_head": min(each), "most_head": max(each)}
    return found


def fetched(shape: Shape, length: int, devices: int, share: float, cluster_keys: bool) -> dict:
    """Return the bytes that the busiest device would send forward if it sent chosen blocks alone.

    Of each key what a choice needs, as the mechanism has it: four bits a coordinate, one scale, and by blocks of 16 the
    mean; of alike keys also a byte of variance a coordinate, its unit, and the value and bias that stand for a block;
    of the text key, value and bias of each query head that do. Then the share of the rows.
    """
    others = (devices - 1) * (length // devices)
    beside = shape.size + (shape.size + 2) * shape.width if cluster_keys else 0
    codes = shape.key_heads * (shape.size // 2 + shape.width + (shape.size * shape.width + beside) / 16)
    summaries = 0 if cluster_keys else shape.heads * (2 * shape.size + 1) * shape.width / 16
    whole = shape.sent("retrieval", length, devices)["keys"]
    return {"gathered": whole, "choosing": int(others * (codes + summaries)), "rows": int(share * whole)}


@dataclass(frozen=True)
class Options:
    """checkpoint: a causal model, data: what is read of; "made", of both: as in `long_context`. lengths: tokens of it.
    processes: numbers of stretches. modules: about how many attention modules are looked at.
    """

    checkpoint: str = "smollm2-135m"
    data: str = "news"
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8000)
    processes: tuple[int, ...] = (2, 4, 8)
    modules: int = 10

    def __post_init__(self):
        if not self.processes or (bad := [n for n in self.processes if n < 2 or max(self.processes) % n]):
            got = bad[0] if self.processes else "none"
            raise ValueError(f"processes must be at least 2 and divide the largest of them, got {got}")
        if not self.lengths or (bad := [length for length in self.lengths if length < 64 * max(self.processes)]):
            raise ValueError(f"lengths must be at least 64 tokens a process, got {bad[0] if self.lengths else 'none'}")
        if bad := [length for length in self.lengths if length % max(self.processes)]:
            raise ValueError(f"lengths must be multiples of the largest of processes, got {bad[0]}")
        if self.modules < 1:
            raise ValueError(f"modules must be >= 1, got {self.modules!r}")


QUICK = {"checkpoint": MADE, "data": MADE, "lengths": (128, 256), "processes": (2,), "modules": 1}
# Pieces are as many as the largest of processes: those of the others are whole ones of them.
AXES = ("lengths", "processes")


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Measure a row for each length and number of processes, with blocks of alike keys and of the text."""

    @cache
    def opened():
        teacher, tokenizer = made_checkpoint() if options.checkpoint == MADE else load_checkpoint(options.checkpoint)
        text = "\n\n".join(made_texts() if options.data == MADE else read_texts(options.data, split="test"))
        # Characters enough for any tokenizer, and no more: a whole corpus takes a while.
        ids = tokenizer(text[: 16 * max(options.lengths)], return_tensors="pt").input_ids
        if ids.shape[1] < max(options.lengths):
            raise ValueError(
                f"lengths must be at most the {ids.shape[1]:,} tokens of data={options.data}, got "
                f"{max(options.lengths):,}"
            )
        return teacher.eval(), ids

    @cache
    def measured(length: int, clustered: bool) -> dict[int, dict]:
        teacher, ids = opened()
        model = convert(teacher, AttentionSpec(mechanism="retrieval", cluster_keys=clustered))
        names = list(model.attention_states)
        modules = names[:: max(1, len(names) // options.modules)]
        (spec,) = set(model.config.attention_specs)
        said = {"modules": len(modules), "min_weight": spec.min_weight, "num_blocks": spec.num_blocks}
        shares = measure(model, ids[:, :length], options.processes, modules)
        return {count: {**own, **said} for count, own in shares.items()}

    for clustered in (True, False):
        for length in options.lengths:
            for count in options.processes:

                def values(length=length, count=count, clustered=clustered):
                    found = measured(length, clustered)[count]
                    return {**found, **fetched(THERE, MODELLED_LENGTH, count, found["share"], clustered)}

                results.row({"length": length, "cluster_keys": clustered, "processes": count}, values)
