"""Both names of a model's cache, at both ends of the declared range, and an error where neither is understood."""

import configparser
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, GenerationConfig

from distattn_hf.core import compatibility
from distattn_hf.core.attention_spec import NEWEST_TESTED, OLDEST_TESTED
from distattn_hf.core.compatibility import CACHE_NAME, cache_of, check_transformers, given_cache, one_cache
from distattn_hf.core.nystrom_cache import NystromLayer, use_nystrom_cache
from tests.conversion.models import VOCAB
from tests.conversion.nystrom_cases import student_of
from tests.native.choices import CAUSAL, make_model, tokens

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("cache", "past_key_values")
GREEDY = GenerationConfig(max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)


@pytest.fixture(autouse=True)
def fresh_check():
    check_transformers.cache_clear()
    yield
    check_transformers.cache_clear()


@pytest.mark.parametrize("mechanism", CAUSAL)
def test_native_models_generate_with_a_cache_what_they_generate_without(mechanism):
    model = make_model(mechanism, "rotary", "causal").eval()
    prompt = tokens(length=24)
    with_cache = model.generate(prompt, generation_config=GREEDY, use_cache=True)
    assert with_cache.equal(model.generate(prompt, generation_config=GREEDY, use_cache=False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mechanism", ["dot", "l2", "nystrom", "linear"])
def test_native_models_take_a_cache_under_both_names(mechanism, name):
    model = make_model(mechanism, "rotary", "causal").eval()
    ids = tokens(length=24)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :16], use_cache=True)
    rest = model(ids[:, 16:], **{name: cache_of(first)}).logits
    torch.testing.assert_close(rest, whole[:, 16:], rtol=1e-4, atol=1e-4)


def test_a_cache_under_two_names_is_refused():
    model = make_model("dot", "rotary", "causal")
    with pytest.raises(ValueError, match="two names of one argument"):
        model(tokens(length=4), cache=DynamicCache(), past_key_values=DynamicCache())
    assert one_cache(None, None) is None


@pytest.mark.parametrize("mechanism", ["dot", "l2", "linear"])
def test_a_cache_under_an_unknown_name_is_refused(mechanism):
    model = make_model(mechanism, "rotary", "causal")
    with pytest.raises(ValueError, match="'kv_store'"):
        model(tokens(length=4), kv_store=DynamicCache())


def test_a_cache_is_found_by_its_kind():
    """Whatever a later transformers calls it: an attention module that hands it on gets the cache of constant size."""
    student, cache = student_of("llama"), DynamicCache()
    module = next(iter(student.attention_modules().values()))
    use_nystrom_cache(module, (), {"hidden_states": torch.zeros(1, 2, 3), "kv_store": cache})
    assert isinstance(cache.layers[0], NystromLayer)
    assert given_cache({"cache": None, "kv_store": cache}) is cache
    with pytest.raises(ValueError, match="past_key_value must be a transformers Cache, got tuple"):
        given_cache({"past_key_value": ((), ())})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_cache_that_is_not_found_is_an_error_and_not_a_full_cache(family, monkeypatch):
    """As when transformers hides the cache from the hook: the keys of earlier tokens arrive all the same."""
    student = student_of(family)
    monkeypatch.setattr("distattn_hf.core.nystrom_cache.given_cache", lambda arguments: None)
    ids = torch.randint(3, VOCAB, (1, 12))
    with pytest.raises(RuntimeError, match="a cache that was not found.*tested with transformers"):
        student.generate(ids, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("changed", ["create_causal_mask", "create_bidirectional_mask", "sdpa_mask"])
@pytest.mark.parametrize("make", [lambda: make_model("l2", "rotary", "causal"), lambda: type(student_of("gpt2"))])
def test_a_changed_interface_is_an_error_when_a_model_is_made(changed, make, monkeypatch):
    made = make()
    config = made.config if isinstance(made, nn.Module) else student_of("gpt2").config
    check_transformers.cache_clear()
    monkeypatch.setattr(compatibility, changed, lambda config, inputs_embeds: None)
    with pytest.raises(RuntimeError, match="tested with transformers .* to .*, and this is"):
        (type(made) if isinstance(made, nn.Module) else made)(config)


def test_a_renamed_output_is_an_error(monkeypatch):
    monkeypatch.setattr(compatibility, "CACHE_NAME", "kv_store")
    monkeypatch.setattr(compatibility, "create_causal_mask", lambda **names: None)
    with pytest.raises(RuntimeError, match="kv_store"):
        check_transformers()


def test_the_cache_name_is_the_installed_one():
    assert CACHE_NAME in inspect.signature(transformers.LlamaModel.forward).parameters


@pytest.mark.parametrize(("version", "warned"), [("5.25.0", True), ("5.23.0", False), (NEWEST_TESTED, False)])
def test_a_newer_transformers_is_warned_of_at_import(version, warned):
    code = f"import transformers; transformers.__version__ = {version!r}; import distattn_hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (f"this is {version}" in done.stderr) is warned


def test_what_is_declared_is_what_is_tested():
    """setup.cfg's range of transformers, the constraints of both ends, and what the code says of itself."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    declared = next(line for line in setup["options"]["install_requires"].split("\n") if "transformers" in line)
    oldest, newest = OLDEST_TESTED, NEWEST_TESTED
    major, minor, _ = newest.split(".")
    assert declared == f"transformers>={oldest.removesuffix('.0')},<{major}.{int(minor) + 1}"
    pinned = (ROOT / "scripts/constraints.txt").read_text().split()
    assert f"transformers=={newest}" in pinned
    assert f"transformers=={oldest}" in (ROOT / "scripts/constraints-oldest.txt").read_text().split()


@pytest.mark.parametrize("mechanism", ["dot", "l2", "linear"])
def test_continuous_batching_is_refused(mechanism):
    model = make_model(mechanism, "rotary", "causal").eval()
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch(inputs=[[5, 6, 7]], generation_config=GREEDY, progress_bar=False)
    with pytest.raises(ValueError, match="continuous batching"):
        student_of("llama").generate_batch(inputs=[[5, 6, 7]], generation_config=GREEDY, progress_bar=False)


@pytest.mark.parametrize(
    "make", [lambda: make_model("nystrom", "rotary", "causal").eval(), lambda: student_of("llama")]
)
def test_assisted_generation_with_nystrom_is_refused_before_it_begins(make):
    with pytest.raises(ValueError, match="takes tokens back"):
        make().generate(tokens(1, 8), prompt_lookup_num_tokens=3, max_new_tokens=4, do_sample=False)
    plain = make_model("l2", "rotary", "causal").eval()
    prompt, options = tokens(1, 8), {"max_new_tokens": 8, "do_sample": False}
    found = plain.generate(prompt, prompt_lookup_num_tokens=3, **options)
    assert found.equal(plain.generate(prompt, **options))
