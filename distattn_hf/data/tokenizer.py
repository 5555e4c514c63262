"""A tokenizer learned from text, for a model that is trained from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .config import is_integer

PADDING, START, END, MASK = "<pad>", "<s>", "</s>", "<mask>"
# Every byte has a token, so no text is unknown.
LEAST_VOCABULARY = 256 + 4


def byte_level_bpe(texts: Iterable[str], vocab_size: int, *, add_end: bool = False) -> PreTrainedTokenizerFast:
    """Train byte-level BPE of at most vocab_size tokens, of which 0 to 3 are <pad>, <s>, </s> and <mask>.

    add_end: every text ends with </s>, as sequence-to-sequence models expect. Source: Sennrich et al., 2016; bytes as
    in GPT-2 (Radford et al., 2019). Raises `ValueError` for fewer tokens than there are bytes.
    """
    if not is_integer(vocab_size, LEAST_VOCABULARY):
        raise ValueError(
            f"vocab_size must be an integer >= {LEAST_VOCABULARY} (256 bytes and 4 marks), got {vocab_size!r}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING, START, END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bytes_of_text = processors.ByteLevel(trim_offsets=False)
    if add_end:
        end = processors.TemplateProcessing(
            single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
        )
        tokenizer.post_processor = processors.Sequence([bytes_of_text, end])
    else:
        tokenizer.post_processor = bytes_of_text
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PADDING, bos_token=START, eos_token=END, mask_token=MASK
    )
