"""What a text encoder's embeddings keep when every token reads few keys of a long text: retrieval, and the control."""

from dataclasses import dataclass
from functools import cache

from ..benchmark.measure import only_errors
from ..conversion.convert import convert
from ..conversion.observe import read_share
from ..core.attention_spec import AttentionSpec
from ..data.sources import read_texts
from ..evaluation.score import EvaluationOptions, embedding_agreement
from ..storage.models import load_checkpoint


@dataclass(frozen=True)
class Options:
    """checkpoint: an encoder. data: held-out text, articles joined to `texts` texts of `length` tokens. students:
    "retrieval", the best blocks for each token; "window", its neighbours; both beside its own block and the first, in
    all `keys` keys. block_sizes: of both.
    """

    checkpoint: str = "minilm"
    data: str = "news"
    students: tuple[str, ...] = ("retrieval", "window")
    block_sizes: tuple[int, ...] = (4, 8, 16)
    keys: int = 128
    length: int = 512
    texts: int = 32

    def __post_init__(self):
        if unknown := [name for name in self.students if name not in ("retrieval", "window")]:
            raise ValueError(f"students must be among retrieval, window, got {unknown[0]!r}")
        for name in ("keys", "length", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")
        for size in self.block_sizes:
            if size < 1 or self.keys % (2 * size) or self.keys < 4 * size:
                raise ValueError(f"block_sizes must divide keys / 2 = {self.keys / 2:g}, twice or more, got {size!r}")

    def spec(self, student: str, block_size: int) -> AttentionSpec:
        """Return the spec with which every query reads its own block, the first, and others, `keys` keys in all."""
        others = self.keys // block_size - 2
        near = {"mechanism": "retrieval", "block_size": block_size, "num_sinks": 1, "min_weight": 0.0}
        if student == "retrieval":
            return AttentionSpec(window_size=1, num_blocks=others, **near)
        return AttentionSpec(window_size=others // 2 * block_size + 1, num_blocks=0, far_field=False, **near)


QUICK = {"block_sizes": (8,), "keys": 32, "length": 64, "texts": 2}
AXES = ("students", "block_sizes")


@only_errors("transformers")
def run(options: Options, results) -> None:
    """Measure the mean cosine with the untouched model's embeddings of the same texts, and the keys that were read."""

    @cache
    def loaded():
        model, tokenizer = load_checkpoint(options.checkpoint)
        return model, tokenizer, _texts(tokenizer, options)

    for student in options.students:
        for block_size in options.block_sizes:

            def measure(student=student, block_size=block_size) -> dict:
                model, tokenizer, texts = loaded()
                converted = convert(model, options.spec(student, block_size))
                asked = EvaluationOptions(max_length=options.length, progress=False)
                ids = tokenizer(texts[0], truncation=True, max_length=options.length, return_tensors="pt").input_ids
                share = read_share(converted, ids, ids.shape[1])
                cosine = embedding_agreement(converted, model, tokenizer, texts, asked)
                return {"cosine": cosine, "keys_read": share * ids.shape[1]}

            results.row({"student": student, "block_size": block_size}, measure)


def _texts(tokenizer, options: Options) -> list[str]:
    """Return texts that have at least `length` tokens: articles one after another."""
    texts, parts, count = [], [], 0
    for article in read_texts(options.data, split="test"):
        parts.append(article)
        count += len(tokenizer(article, add_special_tokens=False, verbose=False).input_ids)
        if count >= options.length:
            texts.append("\n".join(parts))
            parts, count = [], 0
        if len(texts) == options.texts:
            return texts
    raise ValueError(f"data has {len(texts)} texts of length={options.length} tokens, fewer than texts={options.texts}")
