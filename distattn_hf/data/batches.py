"""Turn texts, data sets or tokenised batches into padded batches for a model, and mask and count their tokens."""

import inspect
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .packing import pack

MAX_LENGTH = 512
MAX_TOKENS = 8192
# Columns as long as the source, which are cut where its padding begins.
_OF_SOURCE = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # name too long
        return False


def calibration_batch(
    model: PreTrainedModel, calibration, tokenizer=None, *, max_length=MAX_LENGTH, max_tokens=MAX_TOKENS, seed=0
) -> dict[str, Tensor]:
    """Make one batch of at most `max_tokens` tokens for `model`, from strings, a `Dataset` or tokenised batches.

    Decoders get text packed into rows of `max_length` tokens without padding, each beginning as the tokenizer begins a
    text; encoders get one text per row, padded; encoder-decoders get each text as source and as target. The texts are
    drawn in an order fixed by `seed`.

    Raises:
        ValueError: no data, strings without a tokenizer, a data set without a text column, or a batch without
            "input_ids".
    """
    if calibration is None:
        raise ValueError(
            'init="calibrated" needs calibration: strings, a datasets.Dataset or tokenised batches; got None'
        )
    if isinstance(calibration, str):
        if _is_file(calibration):
            raise ValueError(
                f"calibration is the name of the file {calibration!r}, which would be fitted on as text; give what is "
                "in it: distattn_hf.data.sources.read_texts(path)"
            )
        if not any(character.isspace() for character in calibration.strip()):
            raise ValueError(
                f"calibration is {calibration!r}, one word, which would be fitted on as text; of data of that name "
                f"give the texts: distattn_hf.data.sources.read_texts({calibration!r})"
            )
        calibration = [calibration]
    if isinstance(getattr(calibration, "column_names", None), dict):
        raise ValueError(f"calibration is a DatasetDict; give one of its splits: {list(calibration.column_names)}")
    if hasattr(calibration, "column_names") and "input_ids" not in (calibration.column_names or ()):
        from .sources import texts_of

        calibration = texts_of(calibration, None)
    if hasattr(calibration, "keys"):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise ValueError(
            f"calibration must be strings, a datasets.Dataset or tokenised batches, got {type(calibration)}"
        )
    items = list(calibration)
    max_length = length_for(model, max_length)
    if items and all(isinstance(item, str) for item in items):
        texts = [text for text in items if text.strip()]
        if not texts:
            raise ValueError(f"calibration holds no text: all {len(items)} strings are empty")
        if tokenizer is None:
            raise ValueError("calibration is text, so tokenizer must be given, got None")
        if not callable(tokenizer):
            raise ValueError(f"tokenizer must be one, as AutoTokenizer.from_pretrained gives it, got {tokenizer!r}")
        random.Random(seed).shuffle(texts)
        batch = _tokenise(model, texts, tokenizer, max_length, max_tokens)
        _check_tokens(model, batch["input_ids"])
        return _to_device(batch, model)
    if not items:
        raise ValueError("calibration is empty: give some text or tokenised batches")
    return _to_device(_merge(model, items, max_length, max_tokens), model)


def _check_tokens(model, ids: Tensor) -> None:
    """Raise `ValueError` for tokens beyond the model's table of embeddings, where it has one with rows."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    rows = 0 if weight is None or not weight.numel() else weight.shape[0]
    if rows and ids.numel() and (largest := int(ids.max())) >= rows:
        raise ValueError(f"tokenizer gives token {largest}, and {type(model).__name__} embeds {rows}: it is another's")


def length_for(model, max_length: int) -> int:
    """Return `max_length`, or the number of positions of the model where that is smaller."""
    limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    return min(max_length, limit) if isinstance(limit, int) and limit > 0 else max_length


def _to_device(batch, model):
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _tokenise(model, texts, tokenizer, max_length, max_tokens) -> dict[str, Tensor]:
    if model.config.is_encoder_decoder or not _is_decoder(model):
        count = max(2, max_tokens // max_length)
        # Short texts make short rows, so more of them fit.
        encoded = tokenizer(texts[: 8 * count], truncation=True, max_length=max_length)["input_ids"]
        rows, num_tokens = [], 0
        for row in encoded:
            if rows and num_tokens + len(row) > max_tokens:
                break
            rows.append(row)
            num_tokens += len(row)
        batch = pad_rows(rows, tokenizer.pad_token_id)
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = shift_right(model, batch["input_ids"])
        return batch
    return {"input_ids": pack(tokenizer, texts, max_length, max_tokens)[0]}


def _is_decoder(model) -> bool:
    return model.can_generate() or any(getattr(m, "is_causal", False) is True for m in model.modules())


def pad_rows(rows: list[list[int]], pad: int | None) -> dict[str, Tensor]:
    """Return token ids and mask (B, N) of rows, padded at the end: positions stay, no causal query sees padding."""
    width, pad = max(len(row) for row in rows), pad or 0
    ids = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def shift_right(model, labels: Tensor) -> Tensor:
    """Return decoder inputs for `labels` (B, N): the start token, then all but the last label; -100 becomes padding."""
    config = model.config
    decoder = getattr(config, "decoder", config)
    start, pad = (
        next((token_id for holder in (config, decoder) if (token_id := getattr(holder, name, None)) is not None), 0)
        for name in ("decoder_start_token_id", "pad_token_id")
    )
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad)


def _rows(value) -> list[Tensor]:
    """Return one tensor per example of a tensor, a nested list (ragged or not) or a single example."""
    if isinstance(value, Tensor):
        return list(value) if value.dim() > 1 else [value]
    if len(value) and isinstance(value[0], int | float):
        return [torch.as_tensor(value)]
    return [torch.as_tensor(row) for row in value]


def _real_length(mask: Tensor) -> int:
    """Return the length of a row without the padding at its end."""
    return len(mask) if mask.dim() != 1 or not bool(mask.any()) else int(mask.nonzero().max()) + 1


def real_tokens(batch: dict[str, Tensor]) -> int:
    """Count the tokens of a batch that are not padding; 0 for a batch without tokens."""
    if "input_ids" not in batch:
        return 0
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None or mask.dim() != 2 else int(mask.bool().sum())


def longest_row(batch: dict[str, Tensor]) -> int:
    """Return the row length of a batch, the longer one of source and target; 0 for a batch without tokens."""
    tensors = [batch.get(name) for name in ("input_ids", "decoder_input_ids", "labels")]
    return max((tensor.shape[1] for tensor in tensors if tensor is not None and tensor.dim() > 1), default=0)


def _merge(model, items, max_length: int, max_tokens: int) -> dict[str, Tensor]:
    """Merge tokenised examples or batches into one padded batch of the model's forward arguments, without labels."""
    main = model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    columns: dict[str, list[Tensor]] = {}
    num_tokens = 0
    for item in items:
        if not hasattr(item, "keys") or main not in item.keys():  # noqa: SIM118 (BatchEncoding)
            received = list(item.keys()) if hasattr(item, "keys") else type(item).__name__
            raise ValueError(f"calibration batches must hold {main!r}, got {received}")
        rows = {n: _rows(item[n]) for n in item.keys() if n in accepted and item[n] is not None}  # noqa: SIM118
        if main == "input_ids" and "attention_mask" not in rows:
            rows["attention_mask"] = [torch.ones_like(row) for row in rows[main]]
        for index in range(len(rows[main])):
            if num_tokens >= max_tokens:
                break
            length = min(_real_length(rows["attention_mask"][index]), max_length) if main == "input_ids" else None
            for name, values in rows.items():
                value = values[index]
                if length is not None:
                    value = value[: length if name in _OF_SOURCE else max_length]
                columns.setdefault(name, []).append(value)
            num_tokens += min(len(columns[main][-1]), max_length)
    if num_tokens == 0:
        raise ValueError("calibration is empty: its batches hold no tokens")
    if main != "input_ids":
        return {name: torch.stack(rows) for name, rows in columns.items() if name != "labels"}
    pad = getattr(model.config, "pad_token_id", None) or 0
    fill = {"input_ids": pad, "decoder_input_ids": pad, "labels": -100}
    batch = {n: pad_sequence(rows, batch_first=True, padding_value=fill.get(n, 0)) for n, rows in columns.items()}
    labels = batch.pop("labels", None)
    if labels is not None and model.config.is_encoder_decoder:
        batch.setdefault("decoder_input_ids", shift_right(model, labels))
    return batch


def forward_inputs(model, inputs: dict) -> dict:
    """Return the inputs without labels, with decoder inputs made from the labels where the model would make them."""
    inputs = dict(inputs)
    labels = inputs.pop("labels", None)
    if labels is not None and model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = shift_right(model, labels)
    return inputs


def query_mask(name: str, is_cross: bool, inputs: dict, encoder_decoder: bool) -> Tensor | None:
    """Return the mask (B, N) of the queries of attention module `name` that are not padding; None if unknown."""
    if not encoder_decoder or not (is_cross or "decoder" in name):
        return inputs.get("attention_mask")
    if inputs.get("decoder_attention_mask") is not None:
        return inputs["decoder_attention_mask"]
    labels = inputs.get("labels")
    return None if labels is None else labels != -100


def label_loss(logits: Tensor, labels: Tensor, count) -> Tensor:
    """Return the cross-entropy in nats of logits (..., classes), summed over labels (...) other than -100, / count."""
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.flatten().to(logits.device), reduction="sum", ignore_index=-100) / count
