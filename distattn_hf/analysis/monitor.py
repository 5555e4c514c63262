"""An opt-in monitor of attention modules: time, memory and weight statistics; no overhead while it is off."""

import threading
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from ..core.discovery import argument_names
from ..functional.row_statistics import ROW_NUMBERS, row_statistics
from .flops import FlopCounter


class PerformanceMonitor:
    """Monitors modules by forward hooks until `stop`.

    Args:
        modules: {name: attention module}, whose forward gives (output, weights or None, ...) or the output alone.
        statistics: ask each module for its weights (output_attentions=True, slow for most mechanisms) and record
            mean entropy, sparsity, largest weight and attended distance of their rows.
        flops: count floating-point operations (see `flops.FlopCounter`), which slows what is timed; not in compiled
            graphs.
        every: measure the first of so many calls of each module and let the others pass: for models in use.

    Raises `ValueError` for another `every` than an integer >= 1.
    """

    def __init__(self, modules: dict[str, nn.Module], statistics: bool = False, flops: bool = False, every: int = 1):
        if type(every) is not int or every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every!r}")
        self.statistics, self.flops, self.every = statistics, flops, every
        self._begun = dict.fromkeys(modules, 0)
        # Running calls by module and thread, as stacks since a module may call itself.
        self._open: dict[tuple[str, int], list[tuple]] = {}
        self._layers = {name: _layer_of(name, modules) for name in modules}
        self._stats: dict[str, dict] = {name: _empty() for name in modules}
        self._handles = []
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(partial(self._after, name), always_call=True))

    # Bound methods, so that the hooks of a copied or pickled model count for the copy.
    def _before(self, name: str, module, arguments, keywords):
        token, injected = None, False
        calls = self._open.setdefault((name, threading.get_ident()), [])
        self._begun[name] += 1
        if (self._begun[name] - 1) % self.every:
            calls.append(None)
            return None
        if self.statistics:
            if "output_attentions" in argument_names(type(module)):
                injected = not keywords.get("output_attentions")
                keywords = {**keywords, "output_attentions": True}
            # Modules of transformers models compute weights where a collector is active.
            token = _active_collector.set({**(_active_collector.get() or {}), "monitored_attentions": []})
        counter = FlopCounter().__enter__() if self.flops else None
        device = _device(module)
        _synchronise(device)
        calls.append(
            (time.perf_counter(), _mark_memory(device), token, injected, _tokens(arguments, keywords), counter)
        )
        return arguments, keywords

    def _after(self, name: str, module, arguments, output):
        call = self._open[name, threading.get_ident()].pop()
        if call is None:
            return None
        device = _device(module)
        _synchronise(device)
        started, memory_before, token, injected, tokens, counter = call
        if counter is not None:
            counter.__exit__(None, None, None)
        if token is not None:
            _active_collector.reset(token)
        if output is None:  # The module raised.
            return None
        stats = self._stats[name]
        stats["calls"] += 1
        stats["tokens"] += tokens
        stats["seconds"] += time.perf_counter() - started
        stats["flops"] += 0 if counter is None else counter.total
        peak = _peak_memory(device)
        if memory_before is not None and peak is not None:
            stats["peak_bytes"] = max(stats["peak_bytes"] or 0, peak - memory_before)
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if self.statistics and isinstance(weights, Tensor) and weights.dim() == 4:
            _add_rows(stats, weights.detach())
        # The caller of a layer that returns weights only on request gets what it asked for.
        return output[0] if injected and getattr(module, "gives_weights_on_request", False) else None

    def stats(self) -> dict[str, dict]:
        """Return {module name: numbers} of the calls measured so far, which JSON takes as they are.

        calls; seconds, of all calls; seconds_per_call; tokens, those of queries, padding included; tokens_per_second,
        of this module's own time; flops, of all calls, with the projections (None unless they are counted);
        peak_bytes, the largest rise of memory in one call: on CUDA allocated memory, on Linux resident memory (which
        misses memory that PyTorch had freed and reuses), elsewhere None. With statistics
        also entropy (nats), sparsity, maximum, distance (tokens), each a mean over the rows that see more than one
        key, and collapsed, the share of those rows with entropy < 0.1 or a weight > 0.95; None without weights. Keys
        of weight 0 count as unseen.
        """
        numbers = {}
        for name, stats in self._stats.items():
            calls, rows = stats["calls"], stats["rows"]
            numbers[name] = {
                "calls": calls,
                "seconds": stats["seconds"],
                "seconds_per_call": stats["seconds"] / calls if calls else None,
                "tokens": stats["tokens"],
                "tokens_per_second": stats["tokens"] / stats["seconds"] if stats["tokens"] else None,
                "peak_bytes": stats["peak_bytes"],
                "flops": stats["flops"] if self.flops else None,
            }
            if self.statistics:
                sums = {n: stats["sums"][n] / rows if rows else None for n in (*ROW_NUMBERS, "collapsed")}
                numbers[name] |= sums
        return numbers

    def layers(self) -> dict[str, dict]:
        """Return {layer: numbers}: what its attention modules took together; weights' statistics are by module.

        Names are "layer_0", ...; "encoder_layer_0" and "decoder_layer_0" where both are, or
        what stands before the number where two would have one name. calls: of the layer; seconds;
        avg_forward_time, seconds of one call's attention; tokens, tokens_per_second, flops, peak_bytes as in `stats`.
        """
        layers: dict[str, list[dict]] = {}
        for name, stats in self.stats().items():
            layers.setdefault(self._layers[name], []).append(stats)
        numbers = {}
        for layer, parts in layers.items():
            calls, tokens = (max(part[name] for part in parts) for name in ("calls", "tokens"))
            seconds = sum(part["seconds"] for part in parts)
            peaks = [part["peak_bytes"] for part in parts if part["peak_bytes"] is not None]
            numbers[layer] = {
                "calls": calls,
                "seconds": seconds,
                "avg_forward_time": seconds / calls if calls else None,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds if tokens else None,
                "peak_bytes": max(peaks, default=None),
                "flops": sum(part["flops"] for part in parts) if self.flops else None,
            }
        return numbers

    def reset(self) -> None:
        """Reset all counts."""
        self._stats = {name: _empty() for name in self._stats}
        self._begun = dict.fromkeys(self._begun, 0)

    def stop(self) -> None:
        """Remove the hooks; the counts stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _layer_of(name: str, names) -> str:
    """Return the layer that a module is in, by the first number in its name; the name itself without one."""
    stems = {stem for stem, number in map(_first_number, names) if number is not None}
    stem, number = _first_number(name)
    if number is None:
        return name
    kinds = [_kind_of(each) for each in stems]
    kind = "" if len(stems) == 1 else _kind_of(stem) if len(set(kinds)) == len(kinds) else stem
    return f"{kind}_layer_{number}".removeprefix("_")


def _kind_of(stem: str) -> str:
    return next((kind for kind in ("encoder", "decoder") if kind in stem.split(".")), stem)


def _first_number(name: str) -> tuple[str, str | None]:
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return (name, None) if place is None else (".".join(parts[:place]), parts[place])


def _tokens(arguments: tuple, keywords: dict) -> int:
    """Return B·N of the hidden states (B, N, D) that a module gets; 0 where it gets none."""
    states = next((t for t in (*arguments, *keywords.values()) if isinstance(t, Tensor) and t.dim() == 3), None)
    return 0 if states is None else states.shape[0] * states.shape[1]


def _empty() -> dict:
    return {
        "calls": 0,
        "seconds": 0.0,
        "tokens": 0,
        "peak_bytes": None,
        "flops": 0,
        "rows": 0,
        "sums": dict.fromkeys((*ROW_NUMBERS, "collapsed"), 0.0),
    }


def _add_rows(stats: dict, weights: Tensor) -> None:
    rows = row_statistics(weights, keep=weights > 0)
    counted = rows.counted()
    stats["rows"] += int(counted.sum())
    for name in (*ROW_NUMBERS, "collapsed"):
        stats["sums"][name] += float(getattr(rows, name)[counted].double().sum())


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark_memory(device: torch.device) -> int | None:
    """Reset the high-water mark and return the bytes in use; None where it cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident_bytes("VmRSS")
    except (OSError, KeyError):
        return None


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return resident_bytes("VmHWM")
    except (OSError, KeyError):
        return None


def resident_bytes(name: str) -> int:
    """Return the kernel's count of resident memory: "VmRSS" now, "VmHWM" the peak since the last reset. Linux only.

    Raises `OSError` or `KeyError` elsewhere.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines if ":" in line)[name].split()[0])
