"""Embeddings are pooled as a sentence-transformers folder says, and what cannot be done here is refused by name."""

import json
import re

import pytest
import torch
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from distattn_hf import load_checkpoint
from distattn_hf.analysis.analyse import AnalyseOptions
from distattn_hf.analysis.samples import TextLoss
from distattn_hf.evaluation.score import EvaluationOptions, compare_models, describe_scores, embed
from distattn_hf.storage.pooling import POOLINGS, read_pooling
from tests.conversion.test_companions import TEXTS, sentence_transformer
from tests.test_cli import distattn

PAIRS = ["the cat sat. on the mat", "dog ran. far away the", "home dog. the mat sat sat"]


def set_files(folder, **files):
    """Change JSON files of a folder: modules, or the pooling's config."""
    names = {"modules": "modules.json", "pooling": "1_Pooling/config.json"}
    for key, content in files.items():
        (folder / names[key]).write_text(json.dumps(content))
    for name in ("pytorch_model.bin", "2_Normalize/weights.bin"):
        (folder / name).unlink(missing_ok=True)


def modules(*kinds):
    return [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", [*POOLINGS, "mean_sqrt_len_tokens"])
def test_embeddings_are_those_of_sentence_transformers(tmp_path, pooling, side):
    import sentence_transformers as library

    folder = sentence_transformer(tmp_path / "teacher", "cls_token")
    size = json.loads((folder / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"]
    set_files(folder, pooling={"word_embedding_dimension": size, "pooling_mode": pooling})
    model, tokenizer = load_checkpoint(folder)
    tokenizer.padding_side = side
    reference = library.SentenceTransformer(str(folder), device="cpu")
    reference.tokenizer.padding_side = side
    options = EvaluationOptions(progress=False, pooling=read_pooling(folder))
    with torch.no_grad():
        found = embed(model, tokenizer, TEXTS, options)
    torch.testing.assert_close(found, torch.tensor(reference.encode(TEXTS)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mode", "expected"), [("cls_token", "cls"), ("mean_tokens", "mean"), ("max_tokens", "max")])
def test_the_files_of_older_versions_are_read(tmp_path, mode, expected):
    assert read_pooling(sentence_transformer(tmp_path / "teacher", mode)) == expected


def test_a_folder_without_modules_is_mean_pooled(tmp_path):
    folder = sentence_transformer(tmp_path / "teacher", "cls_token")
    (folder / "modules.json").unlink()
    assert read_pooling(folder) == read_pooling("minilm") == "mean"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": modules("Transformer", "Pooling", "Dense", "Normalize")}, "modules Transformer, Pooling, Dense"),
        ({"modules": modules("WordEmbeddings", "Pooling")}, "modules WordEmbeddings, Pooling; .* Transformer, Pooling"),
        ({"modules": modules("Transformer", "Normalize", "Pooling")}, "modules Transformer, Normalize, Pooling"),
        ({"modules": modules("Transformer")}, "modules Transformer;"),
        ({"pooling": {"pooling_mode": "weightedmean"}}, "by weightedmean; .* one of mean, cls, max, lasttoken"),
        ({"pooling": {"pooling_mode": ["cls", "mean"]}}, "pools embeddings by cls and mean"),
        ({"pooling": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}}, "by max and cls"),
    ],
)
def test_what_is_not_done_here_is_refused(tmp_path, files, message):
    folder = sentence_transformer(tmp_path / "teacher", "cls_token")
    set_files(folder, **files)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))} .*{message}.*sentence-transformers"):
        read_pooling(folder)


def test_each_model_is_pooled_in_its_own_way(tmp_path):
    model, tokenizer = load_checkpoint(sentence_transformer(tmp_path / "teacher", "cls_token"))
    both = {"a": (model, tokenizer), "b": (model, tokenizer)}
    options = EvaluationOptions(progress=False)
    with CaptureLogger(logging.get_logger("distattn_hf.evaluation.score")) as log:
        found = compare_models(both, PAIRS, options, {"a": "cls", "b": "mean"})
    assert "different ways: a by cls, b by mean" in log.out
    assert found["a"]["embedding_cosine"] < 0.999
    same = compare_models(both, PAIRS, options, {"a": "cls", "b": "cls"})
    assert same["a"]["embedding_cosine"] == pytest.approx(1)
    assert "cosine of cls-pooled embeddings" in describe_scores("embedding", found["a"], "cls")


def test_the_importance_of_heads_is_measured_on_the_same_embeddings(tmp_path):
    model, tokenizer = load_checkpoint(sentence_transformer(tmp_path / "teacher", "cls_token"))
    values = [TextLoss(model, tokenizer, PAIRS, AnalyseOptions(pooling=p)).value(model) for p in ("mean", "cls")]
    assert abs(values[0] - values[1]) > 1e-4
    for options in (EvaluationOptions, AnalyseOptions):
        with pytest.raises(ValueError, match="pooling must be one of mean, cls, max, lasttoken, got 'sum'"):
            options(pooling="sum")


@pytest.mark.parametrize(("mode", "said"), [("cls_token", "cls"), ("mean_tokens", "mean")])
def test_the_command_line_evaluates_by_the_folders_own_pooling(tmp_path, mode, said):
    folder = sentence_transformer(tmp_path / "teacher", mode)
    (tmp_path / "text.txt").write_text("\n\n".join(PAIRS))
    given = ("evaluate", folder, "--data", tmp_path / "text.txt")
    assert f"by cosine of {said}-pooled embeddings" in distattn(*given).stdout
    set_files(folder, modules=modules("Transformer", "Pooling", "Dense"))
    assert "Dense" in distattn(*given, check=False).stderr
