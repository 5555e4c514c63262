"""What a sequence over several devices costs: bytes and seconds measured here, and a model of 8 to 1,024 devices.

Measured: processes with gloo on this machine, one thread each, each holding a stretch of random float32 tokens. Outputs
are compared with one process's, and the bytes that each sent are compared with the model's formulas: the experiment
stops where they differ. Two processes and one run in turns, forward without gradients: CPU seconds of one over those of
the busier of two.

Modelled: one layer's forward pass of 2**20 tokens, bytes / bandwidth + rounds·latency + operations / rate, none of them
overlapping. Bandwidth, latency and rate are assumptions (options), not measurements; so is that each is reached.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, log2
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ..core.retrieval_far import BEGINNING
from ..functional import nystrom, retrieval_attention, sequence_parallel
from ..functional.sequence_exchange import count_traffic

MECHANISMS = ("nystrom", "retrieval")
# Queries that share one running sum of the far field.
BLOCK = 64


@dataclass(frozen=True)
class Shape:
    """One layer of a decoder, and how its heads attend: as `AttentionSpec` has it by default, block_size 16."""

    heads: int = 32
    key_heads: int = 8
    size: int = 128
    landmarks: int = 64
    window: int = 64
    sinks: int = 4
    blocks: int = 16
    width: int = 2  # bytes of a number

    def sent(self, mechanism: str, length: int, devices: int) -> dict[str, int]:
        """Return the bytes that the busiest device sends forward, by kind, of a batch of one row."""
        row = self.key_heads * (2 * self.size + 1) * self.width
        summed = 2 * (devices - 1) / devices * self.width
        if mechanism == "retrieval":
            beginning = int(summed * self.heads * BEGINNING * self.size)
            return {"keys": (devices - 1) * (length // devices) * row, "beginning": beginning}
        if mechanism == "exact":
            return {"keys": (devices - 1) * (length // devices) * 2 * self.key_heads * self.size * self.width}
        state = self.heads * self.landmarks * (self.size + 1) * 4
        return {
            "halo": (self.window - 1) * row,
            "sinks": int(summed * self.key_heads * self.sinks * 2 * self.size),
            "state": self._doublings(devices) * state,
        }

    @staticmethod
    def _doublings(devices: int) -> int:
        """Return how many sums the second device sends: to the next, and on to those 1, 2, 4, ... further."""
        return 1 + (ceil(log2(devices - 1)) if devices > 2 else 0)

    def rounds(self, mechanism: str, devices: int) -> int:
        """Return how often a device waits for others."""
        summed = 2 * ceil(log2(devices))
        return {"nystrom": 1 + summed + self._doublings(devices), "retrieval": 1 + summed, "exact": devices - 1}[
            mechanism
        ]

    def operations(self, mechanism: str, length: int, devices: int) -> float:
        """Return multiplications and additions of the busiest device, of products of matrices alone.

        Of exact attention half the square, which a ring with stretches in two halves divides evenly. Of retrieval the
        last stretch, which looks at codes of all keys and at one key for each block, and reads a few blocks.
        """
        own = length / devices
        if mechanism == "exact":
            return 4 * own * length / 2 * self.size * self.heads
        if mechanism == "retrieval":
            read = self.window + self.sinks + 16 * self.blocks
            return own * self.heads * self.size * (2 * length + 4 * length / 16 + 4 * read)
        # Features of queries and keys; sums of keys, twice; the block's own keys; what queries take from the sums.
        far = self.landmarks * (2 * self.size * 2 + 2 * (self.size + 1) * 3 + 2 * BLOCK)
        near = 4 * self.size * (self.window + BLOCK + self.sinks)
        return own * self.heads * (far + near)


def modelled(shape: Shape, length: int, devices: int, mechanism: str, bandwidth, latency, rate) -> dict:
    """Return bytes, rounds, operations and seconds of one layer on so many devices."""
    sent = shape.sent(mechanism, length, devices)
    rounds, operations = shape.rounds(mechanism, devices), shape.operations(mechanism, length, devices)
    moving, computing = sum(sent.values()) / bandwidth + rounds * latency, operations / rate
    return {
        "bytes": sum(sent.values()), "sent": sent, "rounds": rounds, "operations": operations,
        "seconds_moving": moving, "seconds_computing": computing, "seconds": moving + computing,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ measured here


def tokens_of(shape: Shape, length: int) -> dict[str, Tensor]:
    """Return random query (1, H, N, d), key and value, and landmarks."""
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, shape.key_heads, length, shape.size)
    return {
        "query": torch.randn(1, shape.heads, length, shape.size), "key": key, "value": value,
        "landmarks": torch.randn(shape.heads, shape.landmarks, shape.size),
    }  # fmt: skip


def arguments_of(shape: Shape, mechanism: str, tokens: dict[str, Tensor]) -> dict:
    """Return the arguments of a mechanism's function beside query, key and value."""
    options = {"window_size": shape.window, "num_sinks": shape.sinks}
    if mechanism == "nystrom":
        return {**options, "landmarks": tokens["landmarks"], "lift": True}
    # Of random keys none has a weight by which it would be read.
    return {**options, "num_blocks": shape.blocks, "min_weight": 0.0}


@torch.no_grad()
def run_alone(shape: Shape, mechanism: str, tokens: dict[str, Tensor]) -> Tensor:
    """Return the output of one process."""
    function = nystrom.nystrom_attention if mechanism == "nystrom" else retrieval_attention.retrieval_attention
    own = {name: tokens[name] for name in ("query", "key", "value")}
    return function(**own, **arguments_of(shape, mechanism, tokens), is_causal=True)


@torch.no_grad()
def _process(rank: int, size: int, folder: str, shape: Shape, length: int, pairs: int) -> None:
    """Run as one of `size` processes, and save outputs, traffic and, of two, CPU seconds beside those of one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    tokens, found = tokens_of(shape, length), {}
    stretch = slice(rank * (length // size), (rank + 1) * (length // size))
    own = {name: tokens[name][:, :, stretch] for name in ("query", "key", "value")}
    for mechanism in MECHANISMS:
        function = getattr(sequence_parallel, f"{mechanism}_attention")
        arguments = arguments_of(shape, mechanism, tokens)
        with count_traffic() as traffic:
            output = function(**own, **arguments)
        times = []
        for _ in range(pairs if size == 2 else 0):
            dist.barrier()
            # Of the processor: whatever else runs on the machine, waiting for the other process does not count.
            start = time.process_time()
            function(**own, **arguments)
            together = time.process_time() - start
            dist.barrier()
            start = time.process_time()
            if rank == 0:
                run_alone(shape, mechanism, tokens)
            times.append((time.process_time() - start, together))
        found[mechanism] = {"output": output, "sent": traffic.sent, "rounds": traffic.rounds, "times": times}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def measure(shape: Shape, length: int, size: int, pairs: int) -> dict[str, dict]:
    """Return values of each mechanism; raises `RuntimeError` where outputs or bytes are not what they should be."""
    with TemporaryDirectory() as folder:
        mp.spawn(_process, (size, folder, shape, length, pairs), nprocs=size)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]
    tokens, measured = tokens_of(shape, length), {}
    for mechanism in MECHANISMS:
        found = [rank[mechanism] for rank in ranks]
        expected = run_alone(shape, mechanism, tokens)
        error = float((torch.cat([each["output"] for each in found], dim=2) - expected).abs().max())
        sent = {kind: max(each["sent"][kind] for each in found) for kind in found[0]["sent"]}
        rounds = sum(number for kind, number in found[0]["rounds"].items() if kind != "shapes")
        asked = sent.pop("shapes")
        if error > 1e-5:
            raise RuntimeError(f"{mechanism} on {size} processes is not what one computes: {error:.1e}")
        if sent != shape.sent(mechanism, length, size) or rounds != shape.rounds(mechanism, size):
            raise RuntimeError(
                f"{mechanism} on {size} processes sent {sent} in {rounds} rounds, and the model says "
                f"{shape.sent(mechanism, length, size)} in {shape.rounds(mechanism, size)}"
            )
        values = {"error": error, "sent": sent, "rounds": rounds, "bytes": sum(sent.values()), "bytes_to_agree": asked}
        if times := list(zip(*(each["times"] for each in found))):
            values |= {"cpu_seconds_alone": median(first[0] for first, _ in times)}
            values |= {"ratio": median(first[0] / max(first[1], second[1]) for first, second in times)}
        measured[mechanism] = values
    return measured


@dataclass(frozen=True)
class Options:
    """length: tokens of what is measured. processes: numbers of them that hold a stretch each. pairs: of two processes
    and one, timed in turns. Assumed of a device: bandwidth, bytes a second that it sends; latency, seconds of a round;
    rate, operations a second in bfloat16.
    """

    length: int = 16384
    processes: tuple[int, ...] = (2, 4)
    pairs: int = 5
    bandwidth: float = 50e9
    latency: float = 1e-5
    rate: float = 2e14

    def __post_init__(self):
        if bad := [number for number in self.processes if number < 2 or self.length // number < 64]:
            raise ValueError(f"processes must be at least 2 with at least 64 tokens each, got {bad[0]}")
        if bad := [number for number in self.processes if self.length % number]:
            raise ValueError(f"length must be a multiple of processes, got {self.length} and {bad[0]}")
        for name in ("pairs", "bandwidth", "rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.latency < 0:
            raise ValueError(f"latency must be at least 0 seconds, got {self.latency!r}")


QUICK = {"length": 256, "processes": (2,), "pairs": 1}
AXES = ("length", "processes")
# What is measured, and what is modelled.
HERE, THERE, MODELLED_LENGTH = Shape(heads=8, key_heads=2, size=64, width=4), Shape(), 2**20
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)


def run(options: Options, results) -> None:
    """Measure a row for each mechanism and number of processes, and model one for each number of devices."""
    measured = {}

    def values(mechanism: str, size: int) -> dict:
        if size not in measured:
            measured[size] = measure(HERE, options.length, size, options.pairs)
        return {**measured[size][mechanism], "shape": asdict(HERE)}

    def modelled_values(mechanism: str, devices: int) -> dict:
        assumed = {"bandwidth": options.bandwidth, "latency": options.latency, "rate": options.rate}
        return {**modelled(THERE, MODELLED_LENGTH, devices, mechanism, **assumed), "shape": asdict(THERE)}

    for size in options.processes:
        for mechanism in MECHANISMS:
            key = {"part": "measured", "mechanism": mechanism, "processes": size, "length": options.length}
            results.row(key, partial(values, mechanism, size))
    for mechanism in (*MECHANISMS, "exact"):
        for devices in DEVICES:
            key = {"part": "modelled", "mechanism": mechanism, "devices": devices, "length": MODELLED_LENGTH}
            results.row(key, partial(modelled_values, mechanism, devices))
