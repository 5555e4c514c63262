"""Calibration data in every form a user has it, and models of every kind."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForConditionalGeneration,
    BertTokenizerFast,
    ViTConfig,
    ViTModel,
)

from distattn_hf import AttentionSpec, convert
from distattn_hf.conversion.calibrate import CalibrationOptions
from distattn_hf.data.batches import calibration_batch
from distattn_hf.data.sources import read_texts
from distattn_hf.data.tokenizer import byte_level_bpe
from tests.conversion.models import bert, gpt2, llama, t5, token_batch

QUICK = CalibrationOptions(steps=3, progress=False)
TEXTS = ["the cat sat on the mat and the dog sat on the log"] * 20
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(TEXTS[0].split()))]
TOKENIZER = BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)})


def bart():
    torch.manual_seed(0)
    config = BartConfig(
        encoder_layers=1, decoder_layers=1, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("build", [gpt2, bert, t5, llama, bart])
def test_strings(build):
    student = convert(build(), AttentionSpec("l2"), calibration=TEXTS, tokenizer=TOKENIZER, options=QUICK)
    assert all(g["divergence_after"] is not None for g in student.conversion_report["groups"])


@pytest.mark.parametrize(
    "data",
    [
        TEXTS[0],
        (text for text in TEXTS),
        Dataset.from_dict({"text": TEXTS, "label": [0] * 20}),
        Dataset.from_dict({"text": TEXTS}).map(lambda row: TOKENIZER(row["text"])),
        TOKENIZER(TEXTS[:2] + ["the cat"]),
        TOKENIZER(TEXTS[:2] + ["the cat"], padding=True, return_tensors="pt"),
        [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}, {"input_ids": [3, 4]}],
    ],
    ids=["string", "generator", "dataset", "tokenised dataset", "ragged lists", "BatchEncoding", "examples"],
)
def test_forms(data):
    student = convert(gpt2(), AttentionSpec("l2"), calibration=data, tokenizer=TOKENIZER, options=QUICK)
    assert student.conversion_report["groups"][0]["divergence_after"] is not None


def test_labels_of_a_sequence_to_sequence_example_become_its_decoder_input():
    model = t5()
    batch = calibration_batch(model, [{"input_ids": [3, 4, 5], "labels": [6, 7, 2]}])
    assert batch["decoder_input_ids"].tolist() == [[0, 6, 7]]


def test_the_cap_holds_for_one_big_batch_and_long_rows_are_cut():
    big = {"input_ids": torch.ones(400, 60, dtype=torch.long)}
    assert calibration_batch(gpt2(), big)["input_ids"].numel() <= 8192 + 60
    long = {"input_ids": torch.ones(1, 500, dtype=torch.long)}
    assert calibration_batch(gpt2(), long)["input_ids"].shape == (1, 128)


def test_a_dataset_dict_is_refused_by_name():
    with pytest.raises(ValueError, match="give one of its splits: \\['train'\\]"):
        calibration_batch(gpt2(), DatasetDict(train=Dataset.from_dict({"text": TEXTS})), TOKENIZER)


def test_the_name_of_a_file_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[0])
    with pytest.raises(ValueError, match="calibration is the name of the file .*read_texts"):
        calibration_batch(gpt2(), str(path), TOKENIZER)
    assert read_texts(str(path)) == TEXTS[:1]
    with pytest.raises(ValueError, match="calibration is 'news', one word.*read_texts"):
        calibration_batch(gpt2(), "news", TOKENIZER)


def test_texts_of_files_and_saved_data_sets(tmp_path):
    rows = Dataset.from_dict({"text": ["a cat", "null"], "number": [1, 2]})
    rows.to_csv(tmp_path / "rows.tsv", sep="\t")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict(test=rows).save_to_disk(tmp_path / "splits")
    for name, split in (("rows.tsv", "train"), ("saved", "train"), ("splits", "test")):
        assert read_texts(str(tmp_path / name), split=split) == ["a cat", "null"]
    with pytest.raises(ValueError, match="split must be one of test for .*, got 'train'"):
        read_texts(str(tmp_path / "splits"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json' cannot be read"):
        read_texts(str(tmp_path / "broken.json"))
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(ValueError, match="is of unknown kind '.xml'; give a file \\(.txt"):
        read_texts(str(tmp_path / "rows.xml"))


def test_a_vision_model_is_fitted_on_its_pixels():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=32, patch_size=8,
        initializer_range=0.2,
    )  # fmt: skip
    model = ViTModel(config).eval()
    data = {"pixel_values": torch.randn(8, 3, 32, 32)}
    student = convert(model, AttentionSpec("l2"), calibration=data, options=QUICK)
    groups = student.conversion_report["groups"]
    assert all(max(g["divergence_after"]) < max(g["divergence_before"]) for g in groups)


def test_layers_that_share_a_module_are_fitted_on_all_its_uses():
    """ALBERT: the held-out rows come from the last use; a fit on the first use alone never sees it."""
    torch.manual_seed(0)
    config = AlbertConfig(
        embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        vocab_size=64, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    teacher = AlbertModel(config).eval()
    batch = token_batch(bert(), length=32)
    options = CalibrationOptions(steps=0, rows=512, progress=False)
    student = convert(teacher, AttentionSpec("l2", transform="none"), calibration=[batch], options=options)
    reported = torch.tensor(student.conversion_report["groups"][0]["divergence_after"])
    with torch.no_grad():
        hidden = teacher(**batch, output_attentions=True, output_hidden_states=True)
        module = student.attention_states
        group = next(iter(module.values())).groups[0]
        attention = teacher.encoder.albert_layer_groups[0].albert_layers[0].attention
        divergences = []
        for use in range(2):
            state = hidden.hidden_states[use]
            query, key = (layer(state).view(2, 32, 4, 8).transpose(1, 2) for layer in (attention.query, attention.key))
            logits = -group.lam()[:, None, None] * 8**-0.5 * torch.cdist(query, key)
            expected = hidden.attentions[use]
            divergences.append((expected * (expected.log() - logits.log_softmax(-1))).sum(-1).mean(-1))
    # Held out is one of the four sequences (two uses of two rows), the last: the second use of the second row.
    torch.testing.assert_close(reported, divergences[1][1], rtol=0.15, atol=1e-3)
    assert not torch.allclose(divergences[0][1], divergences[1][1], rtol=0.3)


def test_the_mode_of_the_model_and_the_global_random_state_do_not_matter():
    batches = [token_batch(gpt2(), length=32, seed=s) for s in range(3)]
    states = []
    for seed, train in ((0, False), (1, True)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        teacher = gpt2()
        teacher.train(train)
        torch.manual_seed(seed)
        student = convert(teacher, AttentionSpec("l2"), calibration=batches, options=QUICK)
        assert torch.equal(torch.get_rng_state(), before)
        assert student.training is train
        states.append(student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_tokenizer_that_is_none_or_another_models_is_named():
    text = ["in the beginning " * 20]
    with pytest.raises(ValueError, match="tokenizer must be one, .* got 'my-model'"):
        convert(gpt2(), AttentionSpec("l2"), calibration=text, tokenizer="my-model")
    large = byte_level_bpe(["in the beginning"] * 3, 270)
    with pytest.raises(ValueError, match=r"tokenizer gives token \d+, and GPT2LMHeadModel embeds 64: it is another"):
        convert(gpt2(), AttentionSpec("l2"), calibration=text, tokenizer=large)
