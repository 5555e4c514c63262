"""Sequences from IgLM itself: the only data its checkpoint comes with."""

import torch

_FORBIDDEN = [0, 1, *range(25, 33)]


def sample_sequences(model, tokenizer, count: int, seed: int) -> dict[str, torch.Tensor]:
    """`count` antibody sequences sampled from the model at temperature 1, padded on the right."""
    torch.manual_seed(seed)
    chains = tokenizer.convert_tokens_to_ids(["[HEAVY]", "[LIGHT]"])
    species = tokenizer.convert_tokens_to_ids(["[HUMAN]", "[MOUSE]", "[RABBIT]", "[CAMEL]"])
    start = torch.tensor([[chains[i % 2], species[i % 4]] for i in range(count)])
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), max_length=150, do_sample=True, top_k=0, eos_token_id=2,
        pad_token_id=0, bad_words_ids=[[i] for i in _FORBIDDEN],
    )  # fmt: skip
    ended = ((ids == 2).cumsum(-1) - (ids == 2).int()) > 0
    return {"input_ids": ids.masked_fill(ended, 0), "attention_mask": (~ended).long()}


@torch.no_grad()
def perplexity(model, batch) -> float:
    """Perplexity per real token."""
    logits = model(**batch).logits[:, :-1]
    labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).exp())
