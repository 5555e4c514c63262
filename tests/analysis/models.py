"""A causal model whose three heads are built by hand, and a tokenizer of single letters."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

# Head size, positions, letters, and what each third of the hidden state holds.
SIZE = 16
POSITION, TOKEN, ANSWER = (slice(i * SIZE, (i + 1) * SIZE) for i in range(3))
LETTERS = "abcdefghijklm"
PREVIOUS, FIRST, UNIFORM = range(3)


def letter_tokenizer(**special) -> PreTrainedTokenizerFast:
    """[PAD] 0, [UNK] 1, "." 2, then the letters."""
    words = ["[PAD]", "[UNK]", ".", *LETTERS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **special)


@torch.no_grad()
def hand_built() -> GPT2LMHeadModel:
    """One layer: a previous-token head, which alone writes (the token it sees), a first-token head, a uniform head.

    So the model predicts that the token before the last comes again: right for "a b a b".
    """
    config = GPT2Config(
        n_layer=1, n_head=3, n_embd=3 * SIZE, n_positions=SIZE, vocab_size=SIZE, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.zero_()
    block, eye = model.transformer.h[0], torch.eye(SIZE)
    for norm in (block.ln_1, block.ln_2, model.transformer.ln_f):
        norm.weight.fill_(1.0)
    model.transformer.wpe.weight[:, POSITION] = eye
    model.transformer.wte.weight[:, TOKEN] = eye
    # (in, out), out: query, key and value of the three heads. Its unit makes the chosen key win by far.
    attention = block.attn.c_attn.weight.view(3 * SIZE, 3, 3, SIZE)
    attention[POSITION, 0, PREVIOUS] = 6 * eye
    attention[POSITION, 1, PREVIOUS] = eye.roll(1, 1)
    attention[POSITION, 1, FIRST, 0] = 6 * eye[0]
    block.attn.c_attn.bias.view(3, 3, SIZE)[0, FIRST, 0] = 6.0
    attention[TOKEN, 2, PREVIOUS] = eye
    block.attn.c_proj.weight[POSITION, ANSWER] = eye
    model.lm_head.weight[:, ANSWER] = eye
    return model
