"""Export the attention of one text for bertviz."""

import torch

from .samples import AnalysisOptions, check_texts, make_batches
from .watch import run_watched


@torch.no_grad()
def attention_maps(model, batch: dict) -> dict[str, dict]:
    """Return {module: {"weights" (H, N, M) of the first text, "kind", "layer"}}: whole maps, for short texts."""
    maps: dict[str, dict] = {}

    def keep(call):
        weights = torch.cat([rows.weights[:1] for rows in call.blocks()], dim=2)[0]
        maps[call.name] = {"weights": weights.float().cpu(), "kind": call.kind, "layer": call.layer}

    run_watched(model, batch, keep)
    return maps


def to_bertviz(model, tokenizer, text: str, *, max_length: int = 128) -> dict:
    """Return keyword arguments for bertviz: `head_view(**to_bertviz(model, tokenizer, text))`, also `model_view`.

    "attention": a tuple of one tensor (1, H, N, N) per layer, and "tokens"; of an encoder-decoder "encoder_attention",
    "decoder_attention", "cross_attention", "encoder_tokens" and "decoder_tokens", the text being its own target; and,
    as bertviz needs as many layers of one part as of the other, "include_layers" where the parts differ.
    Raises `ValueError` for an empty text or a model without attention weights.
    """
    text = check_texts(text)[0]
    batch = make_batches(model, tokenizer, [text], AnalysisOptions(max_length=max_length))[0]
    maps = attention_maps(model, batch)

    def layers(kind: str, decoder: bool | None = None):
        return tuple(
            entry["weights"][None]
            for name, entry in maps.items()
            if entry["kind"] == kind and decoder in (None, "decoder" in name)
        )

    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    if not model.config.is_encoder_decoder:
        return {"attention": layers("self"), "tokens": tokens}
    attentions = {
        "encoder_attention": layers("self", False),
        "decoder_attention": layers("self", True),
        "cross_attention": layers("cross"),
    }
    counts = set(map(len, attentions.values()))
    limits = {"include_layers": list(range(min(counts)))} if len(counts) > 1 else {}
    decoder_tokens = tokenizer.convert_ids_to_tokens(batch["decoder_input_ids"][0].tolist())
    return {**attentions, "encoder_tokens": tokens, "decoder_tokens": decoder_tokens, **limits}
