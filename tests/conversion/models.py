"""Small models with random weights large enough that attention is far from uniform, one per family."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 64
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


# ten times the usual deviation, so that the softmax has something to decide
_SPREAD = {"initializer_range": 0.2}


def gpt2(cls=GPT2LMHeadModel, **kwargs):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=VOCAB, n_positions=128, **SPECIAL, **_SPREAD, **kwargs
    )
    return cls(config).eval()


def bert(cls=BertForMaskedLM, **kwargs):
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=VOCAB,
        max_position_embeddings=128, pad_token_id=0, **_SPREAD, **kwargs,
    )  # fmt: skip
    return cls(config).eval()


def t5(cls=T5ForConditionalGeneration, **kwargs):
    torch.manual_seed(0)
    config = T5Config(
        num_layers=2, num_decoder_layers=2, num_heads=4, d_model=32, d_kv=8, d_ff=64, vocab_size=VOCAB,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, initializer_factor=2.0, **kwargs,
    )  # fmt: skip
    return cls(config).eval()


def llama(cls=LlamaForCausalLM, **kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=VOCAB, max_position_embeddings=256, **SPECIAL, **_SPREAD, **kwargs,
    )  # fmt: skip
    return cls(config).eval()


FAMILIES = {"gpt2": gpt2, "bert": bert, "t5": t5, "llama": llama}
CLASSIFIER = BertForSequenceClassification


def token_batch(model, length: int = 20, padded: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of random tokens; with `padded`, the first has 7 padding tokens (left for decoders, right otherwise)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        side = slice(None, 7) if model.can_generate() and not model.config.is_encoder_decoder else slice(-7, None)
        ids[0, side], mask[0, side] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, VOCAB, (2, length // 2), generator=generator)
    return batch
