"""Pictures and sound: rows, batches, scores, conversion and adaptation, beside the models' own numbers."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from distattn_hf import load_checkpoint, revert
from distattn_hf.data.datasets import DataArguments, build_data
from distattn_hf.data.features import collate_features
from distattn_hf.data.tasks import task_of
from distattn_hf.evaluation.classification import evaluate_labels
from distattn_hf.storage.models import load_processor
from distattn_hf.training.adapt import adapt
from distattn_hf.training.arguments import parse_config
from tests.conversion.models import bert
from tests.test_cli import distattn

COUNT = 24
NAMES = ("cat", "dog", "emu")
IDS = {name: number for number, name in enumerate(NAMES)}


def vit(**options):
    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=16, image_size=8, patch_size=2,
        num_channels=1, initializer_range=0.2, **{"id2label": dict(enumerate(NAMES)), "label2id": IDS, **options},
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def whisper():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=32, num_mel_bins=4, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=8,
        max_target_positions=16, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        init_std=0.2, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def wav2vec2():
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(4, 4), conv_kernel=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_labels=2, classifier_proj_size=8, mask_time_prob=0.0,
        initializer_range=0.2, feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config).eval()


def pixels(count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 1, 8, 8)).astype(np.float32)


def pictures(folder):
    """Two splits of ready pixels with labels by name."""
    features = Features({"pixel_values": _nested(3), "label": ClassLabel(names=list(NAMES))})
    data = Dataset.from_dict({"pixel_values": pixels(), "label": [i % 3 for i in range(COUNT)]}, features=features)
    DatasetDict(train=data.select(range(16)), validation=data.select(range(16, COUNT))).save_to_disk(folder)
    return str(folder)


def _nested(depth: int):
    from datasets import List

    return Value("float32") if depth == 0 else List(_nested(depth - 1))


def sounds(folder):
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(4, 16)).astype(np.float32) for _ in range(COUNT)]
    labels = [[1, *rng.integers(3, 32, size=2 + i % 3).tolist(), 2] for i in range(COUNT)]
    data = Dataset.from_dict({"input_features": features, "labels": labels})
    DatasetDict(train=data.select(range(16)), validation=data.select(range(16, COUNT))).save_to_disk(folder)
    return str(folder)


def test_heads_of_pictures_and_sound_have_tasks_of_their_own():
    assert [task_of(model) for model in (vit(), whisper(), wav2vec2())] == [
        "image-classification", "speech-recognition", "audio-classification",
    ]  # fmt: skip
    assert task_of(bert()) == "masked-lm"


@torch.no_grad()
def test_pictures_are_scored_as_scikit_learn_would(tmp_path):
    model = vit()
    data = pictures(tmp_path / "data")
    scores = evaluate_labels({"vit": (model, None)}, DataArguments(train_data=data, train_split="validation"))["vit"]
    taken = model(pixel_values=torch.from_numpy(pixels()[16:])).logits.argmax(-1).tolist()
    labels = [i % 3 for i in range(16, COUNT)]
    assert len(set(taken)) > 1
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, taken))
    assert scores["f1"] == pytest.approx(f1_score(labels, taken, average="macro"))
    assert scores["texts"] == COUNT - 16
    with pytest.raises(ValueError, match="task 'classification' needs one of the heads .*speech-recognition"):
        evaluate_labels({"whisper": (whisper(), None)}, DataArguments(train_data=data))


def test_names_of_classes_are_matched_with_the_models_own(tmp_path):
    model = vit(id2label={0: "dog", 1: "emu", 2: "cat"}, label2id={"dog": 0, "emu": 1, "cat": 2})
    rows = build_data(DataArguments(train_data=pictures(tmp_path / "data")), task_of(model), None, model.config)
    assert [row["labels"] for row in rows.train][:4] == [2, 0, 1, 2]
    assert rows.label_names == ["dog", "emu", "cat"]
    assert sorted(rows.train.column_names) == ["labels", "pixel_values"]
    assert len(rows.evaluation) == COUNT - 16


@torch.no_grad()
def test_images_go_through_the_models_processor(tmp_path):
    """RGB pictures in files, resized and scaled as the processor says."""
    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=2, initializer_range=0.2,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    model.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    rng = np.random.default_rng(0)
    shown = [Image.fromarray(rng.integers(0, 256, size=(12, 10), dtype=np.uint8)) for _ in range(6)]
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    Dataset.from_dict({"image": shown, "label": [0, 1] * 3}, features=features).save_to_disk(tmp_path / "data")
    loaded = load_processor(tmp_path / "vit")
    arguments = DataArguments(train_data=str(tmp_path / "data"))
    rows = build_data(arguments, "image-classification", loaded, model.config)
    batch = rows.collator(list(rows.train))
    expected = processor([picture.convert("RGB") for picture in shown], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [0, 1] * 3
    with pytest.raises(ValueError, match="has a column 'image', and the model comes without the files of a processor"):
        build_data(arguments, "image-classification", None, model.config)
    assert load_processor(_saved(vit(), tmp_path / "bare")) is None


def _saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def test_what_is_held_out_is_scored(tmp_path):
    """Of data with splits, not what a model was trained on; a split that is named, and data of one split, whole."""
    model = vit()
    splits = DatasetDict.load_from_disk(pictures(tmp_path / "data"))

    def scores(parts, **options):
        parts.save_to_disk(tmp_path / "scored")
        arguments = DataArguments(train_data=str(tmp_path / "scored"), **options)
        found = evaluate_labels({"vit": (model, None)}, arguments)["vit"]
        shutil.rmtree(tmp_path / "scored")
        return found

    held_out, trained = scores(splits["validation"]), scores(splits["train"])
    assert held_out["loss"] != trained["loss"]
    assert scores(splits) == held_out
    assert scores(DatasetDict(train=splits["train"], test=splits["validation"])) == held_out
    assert scores(DatasetDict(train=splits["train"], other=splits["validation"])) == trained
    others = DatasetDict(validation=splits["train"], other=splits["validation"])
    assert scores(others, train_split="other") == held_out


@torch.no_grad()
def test_sound_of_several_lengths_is_padded_with_a_mask(tmp_path):
    model = wav2vec2()
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False)
    waves = [np.random.default_rng(i).normal(size=200 + 40 * i).astype(np.float32) for i in range(4)]
    rows = [{"audio": {"array": wave, "sampling_rate": 16000}, "label": i % 2} for i, wave in enumerate(waves)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    data = build_data(DataArguments(train_data=str(tmp_path / "data")), task_of(model), extractor, model.config)
    batch = data.collator(list(data.train))
    expected = extractor(waves, sampling_rate=16000, padding=True, return_tensors="pt")
    torch.testing.assert_close(batch["input_values"], expected["input_values"])
    assert torch.equal(batch["attention_mask"].long(), expected["attention_mask"].long())
    alone = model(input_values=torch.from_numpy(waves[0])[None]).logits
    torch.testing.assert_close(model(**batch).logits[:1], alone, rtol=0, atol=1e-4)
    scores = evaluate_labels({"model": (model, extractor)}, DataArguments(train_data=str(tmp_path / "data")))
    taken = model(**batch).logits.argmax(-1).tolist()
    assert scores["model"]["accuracy"] == accuracy_score([0, 1, 0, 1], taken)
    rows[1]["audio"]["sampling_rate"] = 8000
    Dataset.from_list(rows).save_to_disk(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"must have one sampling rate, got \[8000, 16000\]"):
        build_data(DataArguments(train_data=str(tmp_path / "mixed")), task_of(model), extractor, model.config)


def test_rows_that_are_ready_get_a_mask_and_pictures_must_be_of_one_size():
    batch = collate_features([{"input_values": [1.0, 2.0], "labels": 0}, {"input_values": [3.0], "labels": 1}])
    assert batch["input_values"].tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [0, 1]
    batch = collate_features(
        [{"input_features": [[1.0]], "labels": [4, 5]}, {"input_features": [[2.0]], "labels": [6]}]
    )
    assert batch["labels"].tolist() == [[4, 5], [6, -100]]
    assert "attention_mask" not in batch
    with pytest.raises(ValueError, match="pixel_values must have one shape in all rows"):
        collate_features([{"pixel_values": np.zeros((1, 2, 2))}, {"pixel_values": np.zeros((1, 3, 2))}])


@torch.no_grad()
def test_speech_is_scored_by_the_tokens_of_its_transcripts(tmp_path):
    model, data = whisper(), sounds(tmp_path / "data")
    arguments = DataArguments(train_data=data, train_split="validation")
    scores = evaluate_labels({"whisper": (model, None)}, arguments, task="speech")["whisper"]
    rows = list(DatasetDict.load_from_disk(data)["validation"])
    total = count = 0
    for row in rows:
        sound, labels = torch.tensor(row["input_features"])[None], torch.tensor(row["labels"])[None]
        total += float(model(input_features=sound, labels=labels).loss) * labels.numel()
        count += labels.numel()
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)
    text = Dataset.from_list([{"input_features": row["input_features"], "text": "a b"} for row in rows])
    text.save_to_disk(tmp_path / "text")
    with pytest.raises(ValueError, match="label_column 'text' holds text, and the model comes without a tokenizer"):
        evaluate_labels({"whisper": (model, None)}, DataArguments(train_data=str(tmp_path / "text")), task="speech")


@pytest.mark.parametrize(("make", "write", "stages", "spec"), [
    (vit, pictures, ["transfer", "distillation", "task"], "l2"),
    (whisper, sounds, ["transfer", "task"], {"metric": "l2", "attention": "self"}),
    (vit, pictures, ["distillation"], {"mechanism": "retrieval", "window_size": 2, "block_size": 4, "num_blocks": 1}),
])  # fmt: skip
def test_they_are_adapted(tmp_path, make, write, stages, spec):
    teacher = _saved(make(), tmp_path / "teacher")
    retrieves = isinstance(spec, dict) and "mechanism" in spec
    card = adapt(parse_config({
        "teacher": teacher, "spec": spec, "train_data": write(tmp_path / "data"), "stages": stages, "max_steps": 3,
        "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True, "learning_rate": 1e-3, "save_strategy": "no",
        **({"init": "plain"} if retrieves else {"calibration_steps": 3, "controls": ["plain", "no_attention"]}),
    }))  # fmt: skip
    names = [row.name for row in card.rows]
    assert names == ["teacher", *([] if retrieves else ["plain"]), "calibrated", *stages,
                     *([] if retrieves else ["no_attention"])]  # fmt: skip
    assert card.row(stages[-1]).tokens is None
    assert card.row(stages[-1]).seconds > 0
    student, _ = load_checkpoint(tmp_path / "run" / "student")
    assert type(revert(student)) is type(make())
    changed = dict(student.named_parameters())
    untouched = dict(load_checkpoint(teacher)[0].named_parameters())
    moved = [name for name, p in untouched.items() if not torch.equal(p, changed[name])]
    assert bool(moved) == (stages != ["transfer"])
    if make is vit:
        data = build_data(DataArguments(train_data=str(tmp_path / "data")), card.task, None, student.config)
        batch = data.collator(list(data.evaluation))
        with torch.no_grad():
            taken = student(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        assert card.row(stages[-1]).score == pytest.approx(float((taken == batch["labels"]).float().mean()))


def test_the_commands_convert_and_score_pictures(tmp_path):
    teacher, data = _saved(vit(), tmp_path / "teacher"), pictures(tmp_path / "data")
    out = str(tmp_path / "student")
    distattn("convert", teacher, out, "--metric", "l2", "--calibration", data, "--steps", "3")
    scored = distattn("evaluate", out, "--against", teacher, "--task", "classification", "--data", data, "--json")
    rows = json.loads(scored.stdout)["rows"]
    assert [row["model"] for row in rows] == [out, teacher]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    text = tmp_path / "words.txt"
    text.write_text("some words")
    refused = distattn("convert", teacher, tmp_path / "other", "--metric", "l2", "--calibration", text, check=False)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_text_for_the_fit_of_a_model_of_pictures_is_refused(tmp_path):
    values = {
        "teacher": _saved(vit(), tmp_path / "teacher"), "spec": "l2", "train_data": pictures(tmp_path / "data"),
        "calibration_data": "news", "max_steps": 1, "output_dir": str(tmp_path / "run"), "use_cpu": True,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="calibration_data='news' is text, and task 'image-classification' reads none"):
        adapt(parse_config(values))
