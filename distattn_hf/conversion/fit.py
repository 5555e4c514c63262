"""The rows of the calibration batch that a fit draws from, and those that it is judged on."""

import torch
from torch import Tensor


def split_sequences(valid: Tensor) -> tuple[list[int], list[int]]:
    """Return (sequences to fit on, sequences to report on) of rows worth a fit (B, N): an eighth is held out, whole.

    A single usable sequence is both.
    """
    usable = [i for i in range(len(valid)) if bool(valid[i].any())]
    held_out = max(1, len(usable) // 8) if len(usable) > 1 else 0
    return usable[: len(usable) - held_out], usable[len(usable) - held_out :] or usable


def draw_rows(valid: Tensor, sequences: list[int], count: int, generator: torch.Generator) -> Tensor:
    """Draw positions of valid rows, (len(sequences), count), with replacement."""
    rows = [torch.multinomial(valid[i].float().cpu(), count, replacement=True, generator=generator) for i in sequences]
    return torch.stack(rows).to(valid.device)
