"""A tokenizer of letters, files of each kind and small configs: what the tests of training data share."""

import logging

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    T5Config,
)

from distattn_hf.data.datasets import DataArguments, build_data
from distattn_hf.data.tasks import TASKS

LETTERS = "abcdefghij"
TEXTS = ["abc", "de", "fghij", "a", "jihgfedcba", "bb"]
SPECIAL = ["<pad>", "<end>", "<mask>", "<unk>"]


def make_tokenizer(*, end=True, pad=True, closing=False):
    """Letters one by one: <pad> 0, <end> 1, <mask> 2, <unk> 3, a 4, b 5, ...; `closing` puts <end> after each text."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    if closing:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    names = {"unk_token": "<unk>", "mask_token": "<mask>"}
    names |= {"eos_token": "<end>"} if end else {}
    names |= {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def ids(text):
    return [4 + LETTERS.index(letter) for letter in text]


DECODER = GPT2Config(vocab_size=20, n_positions=64, n_embd=8, n_layer=1, n_head=2)
ENCODER = BertConfig(vocab_size=20, max_position_embeddings=64, num_labels=3)
BOTH = T5Config(vocab_size=20, d_model=8, num_layers=1, num_heads=2)
CONFIGS = dict.fromkeys(TASKS, ENCODER) | {"causal-lm": DECODER, "seq2seq": BOTH}


def texts(*values):
    return [{"text": value} for value in values or TEXTS]


def build(task, tokenizer=None, config=None, **arguments):
    return build_data(DataArguments(**arguments), task, tokenizer or make_tokenizer(), config or CONFIGS[task])


def column(rows, name="input_ids"):
    return [list(row[name]) for row in rows]


def packed(documents, length):
    """The oracle: one long list, cut into rows."""
    stream = [i for text in documents for i in (*ids(text), 1)]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


class propagating:
    """transformers' loggers do not pass on what they say, and caplog listens at the root."""

    def __init__(self, caplog):
        self.caplog, self.logger = caplog, logging.getLogger("distattn_hf.data.datasets")

    def __enter__(self):
        self.logger.addHandler(self.caplog.handler)

    def __exit__(self, *details):
        self.logger.removeHandler(self.caplog.handler)
