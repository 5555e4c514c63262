"""How much of the earlier text the queries of one device's stretch read in retrieval heads: what fetching would save.

python -m distattn_hf.experiments.sequence_reads OUT.json [--lengths 1024,2048,4096,8000] [--processes 2,4,8]
    [--checkpoint smollm2-135m] [--data news] [--modules 10]

Sequence parallelism sends all earlier keys and values to a device. The other way is to send what the choice of blocks
needs of all of them (codes, means, what stands for a block that is not read), and then the keys of the chosen blocks.
Measured here, in one process, on text: of the keys before a stretch those that lie in a block that one of the stretch's
queries reads, by key head, over all stretches together (bytes are theirs), and in the last one. Modelled: the bytes of
both ways for 2**20 tokens, with the largest and the smallest share measured for so many devices.
"""

import argparse
from pathlib import Path

import torch

from ..benchmark.results import provenance
from ..conversion.convert import convert
from ..conversion.observe import keys_read
from ..core.attention_spec import AttentionSpec
from ..data.sources import read_texts
from ..storage.folders import write_json
from ..storage.models import load_checkpoint
from .sequence_speed import Shape


def share_read(read: torch.Tensor, processes: int) -> tuple[float, float]:
    """Return the share of earlier keys that stretches read: of all stretches together, and of the last one.

    read: bool (pieces, H, N), which keys each of so many equal pieces of a text reads; processes divides pieces.
    """
    length = read.shape[2]
    stretches = read.unflatten(0, (processes, -1)).any(1)
    counts = torch.stack([own[:, : number * length // processes].sum() for number, own in enumerate(stretches)])
    earlier = torch.tensor([number * length // processes for number in range(processes)]) * read.shape[1]
    return float(counts.sum() / earlier.sum()), float(counts[-1] / earlier[-1])


def measure(model, ids: torch.Tensor, processes: tuple[int, ...], modules: list[str]) -> list[dict]:
    """Return a row for each number of processes: shares of the earlier keys that their stretches read."""
    pieces, length = max(processes), ids.shape[1]
    starts = [piece * length // pieces for piece in range(pieces)]
    read = torch.cat([of_module for _, of_module in keys_read(model, ids, starts, modules)], dim=1)
    rows = []
    for count in processes:
        together, last = share_read(read, count)
        each = [share_read(read[:, [head]], count)[0] for head in range(read.shape[1])]
        rows.append(
            {"processes": count, "share": together, "last": last, "least_head": min(each), "most_head": max(each)}
        )
    return rows


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
    return {
        "devices": devices,
        "cluster_keys": cluster_keys,
        "gathered": whole,
        "choosing": int(others * (codes + summaries)),
        "rows": int(share * whole),
        "share": share,
    }


def main(given: argparse.Namespace) -> None:
    """Measure each length with blocks of alike keys and of the text, model, and write the file after each."""
    if bad := [n for n in given.processes if n < 2 or max(given.processes) % n]:
        raise ValueError(f"--processes must be at least 2 and divide the largest of them, got {bad[0]}")
    if bad := [length for length in given.lengths if length < 64 * max(given.processes)]:
        raise ValueError(f"--lengths must be at least 64 tokens a process, got {bad[0]}")
    if bad := [length for length in given.lengths if length % max(given.processes)]:
        raise ValueError(f"--lengths must be multiples of the largest of --processes, got {bad[0]}")
    teacher, tokenizer = load_checkpoint(given.checkpoint)
    text = "\n\n".join(read_texts(given.data, split="test"))
    # Characters enough for any tokenizer, and no more: a whole corpus takes a while.
    ids = tokenizer(text[: 16 * max(given.lengths)], return_tensors="pt").input_ids
    if ids.shape[1] < max(given.lengths):
        raise ValueError(f"--data {given.data} holds {ids.shape[1]} tokens, fewer than --lengths {max(given.lengths)}")
    found = {"provenance": provenance("cpu"), "checkpoint": given.checkpoint, "data": given.data, "measured": []}
    for clustered in (True, False):
        spec = AttentionSpec(mechanism="retrieval", cluster_keys=clustered)
        model = convert(teacher, spec)
        names = list(model.attention_states)
        modules = names[:: max(1, len(names) // given.modules)]
        found |= {"modules": modules, "min_weight": spec.min_weight, "num_blocks": spec.num_blocks}
        for length in given.lengths:
            for row in measure(model, ids[:, :length], given.processes, modules):
                found["measured"].append({"length": length, "cluster_keys": clustered, **row})
                print(found["measured"][-1], flush=True)
            found["modelled"] = [
                fetched(Shape(), 2**20, count, bound(row["share"] for row in rows), order)
                for count in given.processes
                for order in (True, False)
                for bound in (min, max)
                if (rows := [r for r in found["measured"] if r["processes"] == count and r["cluster_keys"] == order])
            ]
            write_json(given.out, found)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""

    def numbers(text):
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", default="1024,2048,4096,8000", type=numbers)
    parser.add_argument("--processes", default="2,4,8", type=numbers)
    parser.add_argument("--checkpoint", default="smollm2-135m")
    parser.add_argument("--data", default="news")
    parser.add_argument("--modules", default=10, type=int, help="about how many attention modules are looked at")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
