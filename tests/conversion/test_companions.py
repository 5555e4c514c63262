"""What lies beside a checkpoint's weights goes along with a conversion."""

import json
import os

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertModel, BertTokenizerFast

from distattn_hf import AttentionSpec, convert, load_checkpoint, revert
from distattn_hf.hub import build_card
from distattn_hf.hub.folder import read_folder
from distattn_hf.hub.push import choose_card
from distattn_hf.storage.companions import Source
from distattn_hf.storage.folders import save_checkpoint
from tests.conversion.models import bert

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["the", "cat", "sat", "on", "mat", "dog", "ran", "far", "away", "home"],
]
TEXTS = ["the cat sat on the mat", "dog ran", "the dog ran far far away home the cat"]
LEFT = ["README.md", "modeling_old.py", "onnx/model.onnx", "optimizer.pt", "pytorch_model.bin"]


def sentence_transformer(folder, pooling: str):
    """A sentence-transformers folder by hand: encoder, pooling, Normalize, and what else such folders hold."""
    torch.manual_seed(0)
    bert(BertModel).save_pretrained(folder)
    BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(folder)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens")}
    size = AutoModel.from_pretrained(folder).config.hidden_size
    files = {
        "modules.json": json.dumps(modules),
        "config_sentence_transformers.json": json.dumps({"prompts": {"query": "q: "}}),
        "sentence_bert_config.json": json.dumps({"max_seq_length": 16, "do_lower_case": False}),
        "1_Pooling/config.json": json.dumps({"word_embedding_dimension": size, **modes}),
        "2_Normalize/weights.bin": "a module may have weights",
        "LICENSE": "Apache License\n                           Version 2.0, January 2004\n",
        "README.md": "---\nlanguage: en\n---\n\n# the teacher\n",
        ".gitattributes": "hidden",
        **{name: "old" for name in LEFT if name != "README.md"},
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def source(tmp_path):
    return sentence_transformer(tmp_path / "teacher", "cls_token")


def convert_folder(source, out):
    model, tokenizer = load_checkpoint(source)
    student = convert(model, AttentionSpec("sqeuclidean"), init="exact")
    return save_checkpoint(student, tokenizer, out, source=Source(source))


def test_files_that_do_not_depend_on_the_attention_are_copied(source, tmp_path):
    assert convert_folder(source, tmp_path / "out") == LEFT
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
                 "1_Pooling/config.json", "2_Normalize/weights.bin", "LICENSE"):  # fmt: skip
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "distattn_bert"
    assert not [name for name in (*LEFT, ".gitattributes") if (tmp_path / "out" / name).exists()]


LINKS = {
    "link_inside.txt": "LICENSE",
    "shared": "notes",
    "hub/in_cache.txt": "../../models--a--b/blobs/0123",
    "private.txt": "../elsewhere/private.txt",
    "private_folder": "../elsewhere",
    "hub_folder": "../models--a--b/blobs",
    "around": ".",
    "broken.txt": "nowhere",
    "itself.txt": "itself.txt",
}
LEFT_LINKS = [
    "around (a link to a folder that it is in)",
    "broken.txt (a link to nothing)",
    "hub_folder (a link out of the folder)",
    "itself.txt (a link to nothing)",
    "private.txt (a link out of the folder)",
    "private_folder (a link out of the folder)",
]


def add_links(folder):
    """Links of every kind, and what they lead to beside the folder."""
    for name in ("elsewhere/private.txt", "models--a--b/blobs/0123"):
        (folder.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / name).write_text("the content")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("a")
    for name, target in LINKS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)


def test_links_are_followed_within_the_folder_and_to_the_hub_cache(source, tmp_path):
    add_links(source)
    left = convert_folder(source, tmp_path / "out")
    assert sorted(left) == sorted(LEFT_LINKS + LEFT)
    assert not (tmp_path / "out" / "private_folder").exists()
    for name, target in (("link_inside.txt", "LICENSE"), ("shared/a.txt", "notes/a.txt")):
        assert not (tmp_path / "out" / name).is_symlink()
        assert (tmp_path / "out" / name).read_bytes() == (source / target).read_bytes()
    assert (tmp_path / "out" / "hub" / "in_cache.txt").read_text() == "the content"


def test_links_out_of_the_folder_are_not_pushed(source, tmp_path):
    (source / "2_Normalize" / "weights.bin").unlink()
    convert_folder(source, tmp_path / "out")
    add_links(tmp_path / "out")
    (tmp_path / "out" / "README.md").symlink_to("../elsewhere/private.txt")
    found = read_folder(tmp_path / "out")
    assert {"link_inside.txt", "hub/in_cache.txt"} <= set(found.files)
    assert found.left_out == sorted(["README.md (a link out of the folder)", *LEFT_LINKS])
    card, _ = choose_card(found, "me/x", False, "mit", None, None, None)
    assert "the content" not in card
    for name, where in (("2_Normalize", "../elsewhere"), ("model.safetensors", "../elsewhere/private.txt")):
        place = tmp_path / "out" / name
        place.unlink(missing_ok=True)
        place.symlink_to(where)
        with pytest.raises(ValueError, match=rf"'{name}'.* \(a link out of the folder\)"):
            read_folder(tmp_path / "out")
        place.unlink()


def test_a_snapshot_of_the_hub_cache_is_a_source_like_any_other(source, tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    for number, file in enumerate(f for f in sorted(source.rglob("*")) if f.is_file()):
        blob = cache / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        place = snapshot / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    assert convert_folder(snapshot, tmp_path / "out") == LEFT
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()


def test_revert_brings_them_back(source, tmp_path):
    convert_folder(source, tmp_path / "out")
    model, tokenizer = load_checkpoint(tmp_path / "out")
    save_checkpoint(revert(model), tokenizer, tmp_path / "again", source=Source(tmp_path / "out"))
    assert (tmp_path / "again" / "1_Pooling" / "config.json").is_file()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "bert"
    assert not (tmp_path / "again" / "distattn_report.json").exists()
    assert not list((tmp_path / "again").glob("*.py"))


def test_the_card_knows_licence_and_library(source, tmp_path):
    """Nothing is asked of the Hub, and nothing given: the licence was noted at the conversion."""
    convert_folder(source, tmp_path / "out")
    (tmp_path / "out" / "2_Normalize" / "weights.bin").unlink()
    card = build_card(tmp_path / "out", "me/x")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "sentence-transformers")
    assert card.data.pipeline_tag == "sentence-similarity"
    assert "sentence-transformers" in card.data.tags
    assert 'SentenceTransformer("me/x")' in card.text
    for arguments in ('"me/x"', '"me/x", trust_remote_code=True'):
        assert card.text.count(f"AutoTokenizer.from_pretrained({arguments})") == 1
    assert str(tmp_path) not in str(card)
    assert "1_Pooling/config.json" in read_folder(tmp_path / "out").files


def test_a_pickle_of_a_module_is_not_left_out_in_silence(source, tmp_path):
    convert_folder(source, tmp_path / "out")
    with pytest.raises(ValueError, match="'2_Normalize/weights.bin' of a module that modules.json names"):
        read_folder(tmp_path / "out")


@pytest.mark.parametrize(("front", "known"), [("license: mit", "mit"), ("license: other\nlicense_name: own", "other")])
def test_the_front_matter_comes_before_the_licence_file(source, tmp_path, front, known):
    (source / "README.md").write_text(f"---\n{front}\n---\n")
    convert_folder(source, tmp_path / "out")
    (tmp_path / "out" / "2_Normalize" / "weights.bin").unlink()
    assert build_card(tmp_path / "out", "me/x").data.license == known
    assert build_card(tmp_path / "out", "me/x", license="bsd-3-clause").data.license == "bsd-3-clause"


def test_the_error_for_a_wrapper_names_the_model_in_it():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = bert(BertModel)

    with pytest.raises(ValueError, match=r"got Sequential, which holds one: .* model\[0\].model = convert\("):
        convert(nn.Sequential(Module()), AttentionSpec("l2"), init="plain")


@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens"])
def test_embeddings_of_sentence_transformers_are_the_teachers(tmp_path, pooling):
    import sentence_transformers as library

    source = sentence_transformer(tmp_path / "teacher", pooling)
    (source / "pytorch_model.bin").unlink()
    (source / "2_Normalize" / "weights.bin").unlink()
    convert_folder(source, tmp_path / "out")
    teacher = library.SentenceTransformer(str(source), device="cpu")
    student = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert type(student[0].model).__name__ == "DistAttnBertModel"
    expected, found = teacher.encode(TEXTS), student.encode(TEXTS)
    assert float((expected * found).sum(-1).min()) > 1 - 1e-5
    with pytest.raises(ValueError, match=r"got SentenceTransformer, .* model\[0\].model = convert\(model\[0\].model"):
        convert(teacher, AttentionSpec("l2"), init="plain")
    teacher[0].model = convert(teacher[0].model, AttentionSpec("sqeuclidean"), init="exact")
    assert float((expected * teacher.encode(TEXTS)).sum(-1).min()) > 1 - 1e-5
