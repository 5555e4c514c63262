"""Push to a Hub on the loopback interface by the real client, and load from it again in fresh processes, both ways."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file, save_file
from transformers import BertTokenizerFast, ViTConfig, ViTForImageClassification

from distattn_hf import AttentionSpec, convert
from distattn_hf.hub import check_reload
from distattn_hf.hub.card import is_unedited
from distattn_hf.hub.folder import read_folder
from tests.conversion.models import bert, gpt2, t5, token_batch
from tests.conversion.test_companions import sentence_transformer
from tests.hub.endpoint import Hub, Repository
from tests.without_package import HIDE_PACKAGE

TOKEN = "hf_ThisTokenMustNotBeSeen0123456789"

SCORECARD = {
    "version": 1,
    "task": "masked-lm",
    "metric": "perplexity",
    "greater_is_better": False,
    "data": {"train": "/srv/somebody/train.txt", "eval": "somebody/evaluation-texts"},
    "teacher": "minilm",
    "rows": [
        {"name": "teacher", "score": 26.04, "ratio": 1.0, "metrics": {"perplexity": 26.04}},
        {"name": "plain", "score": 1014.25, "ratio": 38.95},
        {
            "name": "distillation",
            "score": 26.913579,
            "ratio": 1.033,
            "metrics": {"perplexity": 26.913579, "loss": 3.2926},
            "trained_parameters": 1234567,
            "tokens": 200000,
            "seconds": 321.5,
        },
        {"name": "no_attention", "score": float("inf")},
    ],
}

# Run in a fresh interpreter with HF_ENDPOINT set. "remote" makes the package impossible to import.
FETCH = (
    HIDE_PACKAGE
    + """
import sys, torch
repo, auto, mode, expected = sys.argv[1:]
if mode == "package":
    import distattn_hf
else:
    hide_package()
import transformers
model = getattr(transformers, auto).from_pretrained(repo, trust_remote_code=mode == "remote").eval()
batch, logits = torch.load(expected)
with torch.no_grad():
    print("RESULT", torch.equal(model(**batch).logits, logits), type(model).__name__)
"""
)

PUSH = """
import sys
from distattn_hf.hub import push
print(push(sys.argv[1], sys.argv[2], license="mit", commit_message="a test").url)
"""

# Uploads without the reload check in front, one for each repository named on the command line.
UPLOAD = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from distattn_hf.hub.push import PushResult, Upload
folder, *repositories = sys.argv[1:]
for repo in repositories:
    files = {n: Path(folder) / n for n in ("config.json", "model.safetensors")}
    result = PushResult(None, Path(folder, "card.md").read_text(), [])
    private = repo.endswith("private")
    revision = "next" if repo.endswith("branch") else None
    try:
        Upload(HfApi(), repo, None).run(result, files, private, revision, "m", keep_remote_card=True)
        print(repo, "OK", *result.notes)
    except (ValueError, OSError) as error:
        print(repo, type(error).__name__, error)
"""


class World:
    """The server, a folder to work in, and everything that a process that knew the token has printed."""

    def __init__(self, hub: Hub, folder: Path):
        self.hub, self.folder, self.printed = hub, folder, []

    def python(self, code: str, *arguments, **options) -> subprocess.CompletedProcess:
        return self.run(["-c", code, *map(str, arguments)], **options)

    def distattn(self, *arguments, **options) -> subprocess.CompletedProcess:
        return self.run(["-m", "distattn_hf.cli", *map(str, arguments)], **options)

    def run(self, arguments: list[str], token: str = TOKEN, check: bool = True, home: Path | None = None):
        """A fresh process that knows the server and a token; `home` holds its caches."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home or self.folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, *arguments]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        self.printed.append(run.stdout + run.stderr)
        assert not check or run.returncode == 0, run.stderr[-3000:]
        return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A GPT-2 pushed from Python and a BERT with tokenizer and scorecard pushed from the command line."""
    folder = tmp_path_factory.mktemp("hub")
    with Hub(TOKEN) as hub:
        world = World(hub, folder)
        make(folder / "gpt2", gpt2(), AttentionSpec("sqeuclidean"), "exact")
        make(folder / "bert", bert(), AttentionSpec("l2"), "plain")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "distance", "attention"]
        BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder / "bert")
        (folder / "bert" / "distattn_scorecard.json").write_text(json.dumps(SCORECARD))
        # What training leaves, and what must never leave the machine.
        torch.save({}, folder / "bert" / "training_args.bin")
        (folder / "bert" / ".env").write_text(f"HF_TOKEN={TOKEN}")
        (folder / "bert" / "checkpoint-10").mkdir()
        (folder / "bert" / "checkpoint-10" / "trainer_state.json").write_text("{}")
        world.digest = digest(folder / "bert")
        world.url = world.python(PUSH, folder / "gpt2", "user/gpt2-exact").stdout.strip()
        world.push = world.distattn("push", folder / "bert", "user/bert-l2", "--private")
        yield world


def make(folder: Path, teacher, spec, init) -> None:
    student = convert(teacher, spec, init=init).eval()
    student.save_pretrained(folder)
    batch = token_batch(teacher, padded=True, seed=9)
    with torch.no_grad():
        torch.save((batch, student(**batch).logits), folder.parent / f"{folder.name}_expected.pt")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def copy_of(folder: Path, target: Path, *without: str) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())
    return target


# Each has passed the reload check, both ways, from its folder; test_push_to_hub_of_the_model_itself fetches one more.
@pytest.mark.parametrize(
    ("name", "repo", "auto", "architecture", "mode"),
    [
        ("gpt2", "user/gpt2-exact", "AutoModelForCausalLM", "DistAttnGPT2LMHeadModel", "remote"),
        ("bert", "user/bert-l2", "AutoModelForMaskedLM", "DistAttnBertForMaskedLM", "package"),
    ],
)
def test_what_was_pushed_loads_from_the_hub_bit_for_bit(world, tmp_path, name, repo, auto, architecture, mode):
    before = len(world.hub.requests)
    run = world.python(FETCH, repo, auto, mode, world.folder / f"{name}_expected.pt", home=tmp_path)
    assert f"RESULT True {architecture}" in run.stdout
    asked = [path.rpartition("/")[2] for method, path in world.hub.requests[before:] if method == "GET"]
    assert "model.safetensors" in asked
    assert ("modeling_converted.py" in asked) == (mode == "remote")


ADAPTER = """
import sys, torch, distattn_hf
from transformers import AutoModelForCausalLM
folder, repo = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained("somebody/gpt2").eval()
student = distattn_hf.convert(base, "l1", init="plain").eval()
print(student.save_adapter(folder)["base"])
ids = torch.arange(3, 20)[None]
with torch.no_grad():
    torch.save(({"input_ids": ids}, student(input_ids=ids).logits), folder + "_expected.pt")
from distattn_hf.hub import push
push(folder, repo, license="mit")
# What comes next is the same files, which were just checked; the test compares them.
sys.modules["distattn_hf.hub.push"].check_reload = lambda *arguments: None
student.save_pretrained(folder + "_whole")
push(folder + "_whole", repo + "-of-whole", license="mit", base_model="somebody/gpt2", adapter=True)
"""


def test_an_adapter_is_pushed_and_fetched_with_its_base(world, tmp_path):
    gpt2().save_pretrained(world.folder / "base")
    files = {file.name: file.read_bytes() for file in (world.folder / "base").iterdir()}
    world.hub.repositories["somebody/gpt2"] = Repository(revisions={"main": files})
    run = world.python(ADAPTER, world.folder / "adapter", "user/gpt2-adapter")
    assert run.stdout.strip() == "somebody/gpt2"
    pushed = world.hub.repositories["user/gpt2-adapter"].revisions["main"]
    assert "distattn_adapter.safetensors" in pushed
    assert "model.safetensors" not in pushed
    of_whole = world.hub.repositories["user/gpt2-adapter-of-whole"].revisions["main"]
    assert of_whole.keys() == pushed.keys()
    own, expected = (load(files["distattn_adapter.safetensors"]) for files in (of_whole, pushed))
    assert own.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in own.items())
    assert (world.folder / "adapter_whole" / "model.safetensors").is_file()
    for mode in ("package", "remote"):
        run = world.python(
            FETCH, "user/gpt2-adapter", "AutoModelForCausalLM", mode, world.folder / "adapter_expected.pt",
            home=tmp_path / mode,
        )  # fmt: skip
        assert "RESULT True DistAttnGPT2LMHeadModel" in run.stdout


def test_a_push_is_one_commit_and_large_files_go_by_lfs(world):
    repository = world.hub.repositories["user/gpt2-exact"]
    assert [commit["summary"] for commit in repository.commits] == ["a test"]
    assert world.url == f"{world.hub.url}/user/gpt2-exact/commit/{repository.sha}"
    weights = (world.folder / "gpt2" / "model.safetensors").read_bytes()
    assert repository.revisions["main"]["model.safetensors"] == weights
    assert world.hub.objects[hashlib.sha256(weights).hexdigest()] == weights


def test_only_what_belongs_to_the_checkpoint_is_uploaded(world):
    files = world.hub.repositories["user/bert-l2"].revisions["main"]
    left_out = {".env", "training_args.bin", "checkpoint-10/trainer_state.json"}
    assert set(files) == world.digest.keys() - left_out | {"README.md"}
    assert "left out of the upload" in world.push.stderr
    assert world.hub.repositories["user/bert-l2"].private
    assert not world.hub.repositories["user/gpt2-exact"].private


def test_the_local_folder_is_not_written_to(world):
    assert digest(world.folder / "bert") == world.digest


def test_the_card_on_the_hub(world, tmp_path):
    (tmp_path / "README.md").write_bytes(world.hub.repositories["user/bert-l2"].revisions["main"]["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    index = data.pop("model-index")
    assert data == {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "library_name": "transformers",
        "license": "apache-2.0",
        "metrics": ["perplexity"],
        "pipeline_tag": "fill-mask",
        "tags": ["distattn", "distance-attention", "l2"],
    }
    assert index[0]["name"] == "bert-l2"
    (result,) = index[0]["results"]
    assert result["dataset"] == {"name": "somebody/evaluation-texts", "type": "somebody/evaluation-texts"}
    assert result["task"] == {"type": "fill-mask"}
    assert {m["type"]: m["value"] for m in result["metrics"]} == SCORECARD["rows"][2]["metrics"]
    for text in (
        'AutoModelForMaskedLM.from_pretrained("user/bert-l2")',
        'AutoModelForMaskedLM.from_pretrained("user/bert-l2", trust_remote_code=True)',
        'AutoTokenizer.from_pretrained("user/bert-l2")',
        "| base model, as published | 26.04 | 1.000 |",
        "| **distillation (this checkpoint)** | 26.91 | 1.033 | 1,234,567 | 200,000 |",
        "up to distillation, on train.txt, 1,234,567 parameters trained, 200,000 tokens, 322 seconds",
        "2 attention modules converted",
    ):
        assert text in card.text, text
    assert "/srv/somebody" not in str(card)


def test_an_exact_checkpoint_without_scorecard_claims_no_score(world):
    card = ModelCard(world.hub.repositories["user/gpt2-exact"].revisions["main"]["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["distattn", "distance-attention", "sqeuclidean"],
    }
    assert "nothing, by construction" in card.text
    assert "None" not in card.text
    assert "| perplexity" not in card.text


def test_weights_with_nan_are_not_uploaded(world, tmp_path):
    folder = copy_of(world.folder / "gpt2", tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state["transformer.ln_f.weight"][0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    before = len(world.hub.requests)
    run = world.distattn("push", folder, "user/nan", "--license", "mit", check=False)
    assert run.returncode == 1
    assert "error: reload check: loading after import distattn_hf failed: ValueError: logits holds NaN" in run.stderr
    assert [r for r in world.hub.requests[before:] if r[1] != "/api/agent-harnesses"] == []
    assert "user/nan" not in world.hub.repositories


def damaged(folder: Path, damage: str) -> None:
    weights = folder / "model.safetensors"
    if damage == "parameter missing":
        state = load_file(weights)
        del state["transformer.h.1.mlp.c_fc.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    elif damage == "file missing":
        (folder / "metrics.py").unlink()
    elif damage == "other numbers":
        file = folder / "backend_sdpa.py"
        text = file.read_text()
        assert text.count("scaled_dot_product_attention(") >= 1
        file.write_text(text.replace("scaled_dot_product_attention(", "scaled_dot_product_attention(0.9 * ", 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("parameter missing", "missing keys in the weights: transformer.h.1.mlp.c_fc.weight"),
        ("file missing", "loading with trust_remote_code=True, without the package failed: .*metrics.py"),
        ("other numbers", "logits after import distattn_hf and with trust_remote_code=True.* differ"),
    ],
)
def test_a_damaged_checkpoint_fails_the_reload_check(world, tmp_path, damage, message):
    folder = copy_of(world.folder / "gpt2", tmp_path / "damaged")
    damaged(folder, damage)
    with pytest.raises(ValueError, match=message):
        check_reload(folder, "AutoModelForCausalLM")


def vit():
    config = ViTConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


@pytest.mark.parametrize(
    ("build", "auto_class"), [(t5, "AutoModelForSeq2SeqLM"), (vit, "AutoModelForImageClassification")]
)
def test_models_with_other_inputs_pass_the_reload_check(tmp_path, build, auto_class):
    convert(build(), AttentionSpec("l1"), init="plain").save_pretrained(tmp_path)
    assert read_folder(tmp_path).auto_class == auto_class
    check_reload(tmp_path, auto_class)


# The command line without the reload check.
UNCHECKED = """
import sys, distattn_hf.hub
sys.modules["distattn_hf.hub.push"].check_reload = lambda *arguments: None
from distattn_hf.cli import main
main()
"""


def test_a_wrong_token_is_one_clear_line(world):
    wrong = "hf_AnotherTokenThatMustNotBeSeen987654"
    before = digest(world.folder / "gpt2")
    arguments = ("push", world.folder / "gpt2", "user/new", "--license", "mit")
    run = world.python(UNCHECKED, *arguments, token=wrong, check=False)
    assert digest(world.folder / "gpt2") == before
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "push to 'user/new' failed while creating the repository: " in line
    assert "401" in line
    assert "check the token" in line
    assert "Traceback" not in run.stderr
    assert wrong not in run.stdout + run.stderr
    assert "user/new" not in world.hub.repositories


def test_errors_of_the_server_name_the_step_and_keep_the_token(world):
    card = "---\nlicense: mit\n---\n\n# ours\n"
    (world.folder / "gpt2" / "card.md").write_text(card)
    before = digest(world.folder / "gpt2")
    hub = world.hub
    hub.repositories["user/handwritten"] = Repository(revisions={"main": {"README.md": b"# by hand"}})
    hub.repositories["user/was-public-private"] = Repository()
    hub.failures = {
        ("POST", "user/broken/commit"): (500, {"error": "the disk is full"}),
        ("POST", "user/raced/commit"): (409, {"error": "A commit has happened since. Please refresh and try again."}),
        ("POST", "user/forbidden/preupload"): (403, {"error": "you may not write"}),
        ("POST", "user/echo/commit"): (400, {"error": f"bad header: Authorization: Bearer {TOKEN}"}),
    }
    names = ["broken", "raced", "forbidden", "echo", "handwritten", "was-public-private", "twice", "twice", "branch"]
    run = world.python(UPLOAD, world.folder / "gpt2", *(f"user/{name}" for name in names))
    hub.failures = {}
    lines = run.stdout.splitlines()
    expected = [
        ("user/broken OSError", "failed while uploading: ", "500", "the disk is full"),
        ("user/raced OSError", "failed while uploading: ", "409", "A commit has happened since"),
        ("user/forbidden OSError", "failed while uploading: ", "403", "you may not write", "check the token"),
        ("user/echo OSError", "failed while uploading: ", "Bearer <token>"),
        ("user/handwritten OK", "README.md of the repository was kept"),
        ("user/was-public-private ValueError", "exists and is public; nothing was uploaded"),
        ("user/twice OK",),
        ("user/twice OK",),
        ("user/branch OK",),
    ]
    assert len(lines) == len(expected), run.stdout
    for line, parts in zip(lines, expected, strict=True):
        assert line.startswith(parts[0])
        assert all(part in line for part in parts), line
    for name in ("broken", "raced", "forbidden", "echo", "was-public-private"):
        assert hub.repositories[f"user/{name}"].commits == []
        assert hub.repositories[f"user/{name}"].revisions == {"main": {}}
    kept = hub.repositories["user/handwritten"].revisions["main"]
    assert set(kept) == {"README.md", "config.json", "model.safetensors"}
    assert kept["README.md"] == b"# by hand"
    assert hub.repositories["user/twice"].revisions["main"]["README.md"] == card.encode()
    branches = hub.repositories["user/branch"].revisions
    assert branches["main"] == {}
    assert set(branches["next"]) == {"README.md", "config.json", "model.safetensors"}
    assert digest(world.folder / "gpt2") == before
    (world.folder / "gpt2" / "card.md").unlink()


def test_dry_run_prints_the_card_and_asks_nothing_of_the_hub(world):
    before = len(world.hub.requests)
    run = world.distattn("push", world.folder / "gpt2", "user/dry", "--license", "cc-by-4.0", "--dry-run")
    card = ModelCard(run.stdout)
    assert card.data.license == "cc-by-4.0"
    assert is_unedited(run.stdout)
    assert [r for r in world.hub.requests[before:] if r[1] != "/api/agent-harnesses"] == []


def test_push_to_hub_of_the_model_itself(world):
    """transformers' own method: its blank card, which a later push may replace, and the model as it is."""
    code = (
        "import sys, distattn_hf; from transformers import AutoModelForCausalLM as A; "
        "A.from_pretrained(sys.argv[1]).push_to_hub('user/direct')"
    )
    world.python(code, world.folder / "gpt2")
    files = world.hub.repositories["user/direct"].revisions["main"]
    assert {"config.json", "model.safetensors", "modeling_converted.py", "distattn_report.json"} <= set(files)
    expected = world.folder / "gpt2_expected.pt"
    run = world.python(FETCH, "user/direct", "AutoModelForCausalLM", "remote", expected)
    assert "RESULT True DistAttnGPT2LMHeadModel" in run.stdout
    assert is_unedited(files["README.md"].decode())
    assert not is_unedited(files["README.md"].decode() + "\nMy own words.\n")


def test_base_model_and_licence_from_the_hub(world):
    """Asked of the Hub: the card of the base model, whose own link to its licence stays a link."""
    front = "---\nlicense: other\nlicense_name: its-own\nlicense_link: LICENSE\nlanguage: fr\n---\n\n# base\n"
    world.hub.repositories["somebody/base"] = Repository(revisions={"main": {"README.md": front.encode()}})
    code = (
        "import sys; from distattn_hf.hub import build_card; "
        "print(build_card(sys.argv[1], 'user/x', base_model='somebody/base').data.to_dict())\n"
        "try: build_card(sys.argv[1], 'user/x', base_model='somebody/nothing', license='mit')\n"
        "except ValueError as error: print(error)"
    )
    first, second = world.python(code, world.folder / "gpt2").stdout.splitlines()
    for part in (
        "'base_model': 'somebody/base'",
        "'license': 'other'",
        "'license_name': 'its-own'",
        f"'license_link': '{world.hub.url}/somebody/base/blob/main/LICENSE'",
        "'language': 'fr'",
    ):
        assert part in first
    assert "base_model='somebody/nothing' is neither a folder" in second


def test_a_source_on_the_hub_brings_its_other_files(world, tmp_path):
    source = sentence_transformer(tmp_path / "teacher", "cls_token")
    files = {f.relative_to(source).as_posix(): f.read_bytes() for f in source.rglob("*") if f.is_file()}
    world.hub.repositories["somebody/st"] = Repository(revisions={"main": files})
    run = world.distattn("convert", "somebody/st", tmp_path / "out", "--init", "exact", home=tmp_path / "home")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_bytes() == files["1_Pooling/config.json"]
    assert "left behind in somebody/st: README.md, modeling_old.py, onnx/model.onnx" in run.stdout
    assert not world.hub.asked("onnx/model.onnx|optimizer.pt")
    report = json.loads((tmp_path / "out" / "distattn_report.json").read_text())
    assert report["source"] == {"name": "somebody/st", "license": "apache-2.0", "from": "LICENSE"}


def test_the_token_is_nowhere(world):
    """Runs last: over everything printed and everything uploaded in this file, and the folders."""
    assert len(world.printed) >= 2
    assert ("POST", "/api/repos/create") in world.hub.requests
    for text in world.printed:
        assert TOKEN not in text
    for repository in world.hub.repositories.values():
        for files in repository.revisions.values():
            assert not any(TOKEN.encode() in content for content in files.values())
    for name in ("gpt2", "bert"):
        written = [f for f in (world.folder / name).rglob("*") if f.is_file() and f.name != ".env"]
        assert not any(TOKEN.encode() in file.read_bytes() for file in written)
