"""`exact_below`: queries that see few keys attend to all of them exactly, whatever is in batch or cache."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.storage.folders import change_options
from tests.tolerances import assert_close

from .models import bert, gpt2, llama, t5, token_batch

QUICK = CalibrationOptions(steps=2, progress=False)
LIMIT, LENGTH = 12, 60


def student_of(teacher, limit=LIMIT, **fields):
    window = 128 if teacher.config.is_encoder_decoder else 5
    spec = {"num_landmarks": 6, "window_size": window, "num_sinks": 2, "exact_below": limit, **fields}
    batches = [token_batch(teacher, 40, seed=seed) for seed in range(2)]
    return convert(teacher, AttentionSpec(mechanism="nystrom", **spec), calibration=batches, options=QUICK)


def padded(model, length=LENGTH):
    """A batch whose first row has 7 padding tokens, with the positions that generation gives them."""
    batch = token_batch(model, length, padded=True, seed=5)
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)}


@pytest.mark.parametrize("build", [gpt2, llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_first_queries_are_the_teachers_and_no_others(build, implementation):
    teacher = build()
    student = student_of(teacher)
    student.set_attn_implementation(implementation)
    batch = padded(teacher)
    with torch.no_grad():
        off = (student(**batch).logits - teacher(**batch).logits).abs().amax(-1)
    count = batch["attention_mask"].cumsum(-1)
    real = batch["attention_mask"].bool()
    assert off[real & (count <= LIMIT)].max() < 1e-5
    assert off[real & (count > LIMIT)].min() > 1e-3


def test_later_queries_are_as_without_it():
    """One layer: what the later queries see does not depend on how the earlier ones attended."""
    teacher = _one_layer()
    with_limit, without = student_of(teacher), student_of(teacher, limit=0)
    batch = padded(teacher)
    with torch.no_grad():
        off = (with_limit(**batch).logits - without(**batch).logits).abs().amax(-1)
    late = batch["attention_mask"].bool() & (batch["attention_mask"].cumsum(-1) > LIMIT)
    assert late.any()
    assert off[late].max() == 0
    assert off[batch["attention_mask"].bool() & ~late].max() > 1e-3


def _one_layer():
    from transformers import LlamaForCausalLM

    config = llama().config
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("build", [bert, t5], ids=["bert", "t5"])
def test_bidirectional_attention_goes_by_the_length_of_each_text(build):
    """The row with 7 padding tokens is short enough and equals the teacher; its neighbour is not."""
    teacher = build()
    student, without = student_of(teacher, limit=LENGTH - 7, window_size=128), student_of(teacher, limit=0)
    batch = token_batch(teacher, LENGTH, padded=True, seed=5)
    batch.pop("decoder_input_ids", None)
    models = [m.get_encoder() if build is t5 else m.bert for m in (student, teacher, without)]
    with torch.no_grad():
        ours, theirs, plain = (model(**batch).last_hidden_state for model in models)
    real = batch["attention_mask"].bool()
    assert (ours - theirs)[0][real[0]].abs().max() < 1e-5
    if build is bert:
        # The fit is the same with and without the limit, so the long row is, too.
        student = student_of(teacher, limit=LENGTH - 7)
        with torch.no_grad():
            ours = student.bert(**batch).last_hidden_state
        assert (ours - plain)[1].abs().max() < 1e-6
        assert (ours - theirs)[1].abs().max() > 1e-3


@pytest.mark.parametrize("build", [gpt2, llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("pieces", [[3, 8, 1, 1, 1, 20, 1, 1, 24], [60], [30, 30], [1] * 60], ids=str)
def test_pieces_give_what_the_whole_gives(build, pieces):
    student = student_of(build())
    batch = padded(student)
    outputs, cache, start = [], None, 0
    with torch.no_grad():
        whole = student(**batch).logits
        for size in pieces:
            end = start + size
            found = student(
                batch["input_ids"][:, start:end], attention_mask=batch["attention_mask"][:, :end],
                position_ids=batch["position_ids"][:, start:end], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache, start = found.past_key_values, end
            outputs.append(found.logits)
            kept = cache.layers[0].all_keys
            # Row 0 has 7 tokens of padding: the cache keeps all keys until that row, too, has more than LIMIT tokens.
            assert kept.shape[1] == (student.config.num_key_value_heads if build is llama else 4) * (end <= LIMIT + 7)
    real = batch["attention_mask"].bool()
    assert (torch.cat(outputs, 1) - whole)[real].abs().max() < 1e-4


def test_exact_heads_beside_it():
    """One query head of a group of two stays exact: its key head is kept in full, the others until the limit."""
    teacher = llama()
    student = student_of(teacher, heads=(0, 2, 3))
    batch = padded(teacher)
    with torch.no_grad():
        whole = student(**batch).logits
        first = student(batch["input_ids"][:, :30], attention_mask=batch["attention_mask"][:, :30],
                        position_ids=batch["position_ids"][:, :30], use_cache=True)  # fmt: skip
        rest = student(batch["input_ids"][:, 30:], attention_mask=batch["attention_mask"],
                       position_ids=batch["position_ids"][:, 30:], past_key_values=first.past_key_values)  # fmt: skip
    logits = torch.cat([first.logits, rest.logits], 1)
    assert (logits - whole)[batch["attention_mask"].bool()].abs().max() < 1e-4
    assert rest.past_key_values.layers[0].all_keys.shape[1:3] == (1, LENGTH)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_within_the_limit_is_the_teachers(options):
    teacher = llama()
    student = student_of(teacher, limit=100)
    batch = token_batch(teacher, 20, padded=True)
    ours, theirs = (m.generate(**batch, max_new_tokens=20, do_sample=False, **options) for m in (student, teacher))
    assert torch.equal(ours, theirs)


def test_gradients_within_the_limit_are_the_teachers():
    teacher = llama()
    student = student_of(teacher, limit=100)
    batch = token_batch(teacher, 20, padded=True)
    gradients = []
    for model in (student, teacher):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_saved_and_loaded(tmp_path):
    student = student_of(gpt2())
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = padded(student)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, student(**batch).logits)
    assert again.config.attention_specs[0].exact_below == LIMIT


def llama_of(positions):
    teacher = llama()
    teacher.config.max_position_embeddings = positions
    return teacher


def test_short_texts_without_it_are_said_to_lose_where_texts_can_be_longer(caplog):
    message = "where exact attention loses nothing"
    logger = logging.getLogger("distattn_hf.core.nystrom_heads")
    batch = token_batch(gpt2(), 20)
    # At 2,048 positions, exact_below=2048 would undo the conversion.
    for positions, limit, count in ((4096, 0, 1), (4096, 30, 0), (2048, 0, 0)):
        student = student_of(llama_of(positions), limit=limit)
        from transformers.utils.logging import warning_once

        warning_once.cache_clear()
        caplog.clear()
        with torch.no_grad(), caplog.at_level(logging.WARNING, logger=logger.name):
            student(**batch)
            student(**batch)
        assert sum(message in record.message for record in caplog.records) == count


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mechanism": "nystrom", "exact_below": -1}, "exact_below must be an integer >= 0, got -1"),
        ({"mechanism": "nystrom", "exact_below": 2.5}, "exact_below must be an integer >= 0, got 2.5"),
        ({"exact_below": 5}, "exact_below belongs to mechanism='nystrom'"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**fields)


@pytest.mark.parametrize("build", [bert, t5], ids=["bert", "t5"])
def test_a_text_that_is_all_padding_beside_a_long_one(build):
    """In float64: blocks differ with the batch, and T5's logits of size 14 round by 1e-4 in float32 either way."""
    student = student_of(build()).double()
    batch = token_batch(student, 40, seed=1)
    batch["attention_mask"][0] = 0
    alone = {name: tensor[1:] for name, tensor in batch.items()}
    with torch.no_grad():
        logits = student(**batch)[0]
        assert logits.isfinite().all()
        assert_close(logits[1:], student(**alone)[0], "float64")


def test_padding_right_after_the_last_exact_query():
    """A padding query sees as many tokens as the last real one: the cache may not forget them before."""
    student = student_of(llama())
    batch = token_batch(student, 30, seed=1)
    batch["attention_mask"][0, LIMIT : LIMIT + 4] = 0
    batch["attention_mask"][1, LIMIT : LIMIT + 4] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    outputs, cache = [], None
    with torch.no_grad():
        whole = student(**batch).logits
        for end in range(1, 31):
            found = student(
                batch["input_ids"][:, end - 1 : end], attention_mask=batch["attention_mask"][:, :end],
                position_ids=batch["position_ids"][:, end - 1 : end], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = found.past_key_values
            outputs.append(found.logits)
    real = batch["attention_mask"].bool()
    assert (torch.cat(outputs, 1) - whole)[real].abs().max() < 1e-4


@pytest.mark.parametrize(("positions", "expected"), [(256, 0), (2048, 0), (2049, 2048), (8192, 2048)])
def test_by_default_it_is_2048_for_models_of_longer_texts(positions, expected):
    student = student_of(llama_of(positions), limit=None)
    assert student.config.attention_specs[0].exact_below == expected
    assert student.attention_states["layers.0.self_attn"].groups[0].spec.exact_below == expected
    assert student_of(llama_of(positions), limit=3).config.attention_specs[0].exact_below == 3


def test_a_checkpoint_without_it_has_none():
    student = student_of(llama_of(8192))
    block = copy.deepcopy(student.config.distattn)
    del block["specs"][0]["exact_below"]
    config = type(student.config).from_dict({**student.config.to_dict(), "distattn": block})
    old = AutoModelForCausalLM.from_config(config).eval()
    old.load_state_dict(student.state_dict())
    student.set_attention_options(exact_below=0)
    batch = padded(student)
    with torch.no_grad():
        assert torch.equal(old(**batch).logits, student(**batch).logits)


@torch.no_grad()
def test_it_is_set_on_a_fitted_checkpoint_without_a_fit(tmp_path):
    teacher, batch = llama(), padded(llama())
    with_limit, student = student_of(teacher), student_of(teacher, limit=0)
    expected, before = with_limit(**batch).logits, student(**batch).logits
    student.save_pretrained(tmp_path / "zero")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "zero", exact_below=LIMIT).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    student.set_attention_options(exact_below=LIMIT)
    assert torch.equal(student(**batch).logits, expected)
    student.save_pretrained(tmp_path / "limit")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "limit").eval()
    assert again.config.attention_specs == with_limit.config.attention_specs
    assert torch.equal(again(**batch).logits, expected)
    again.set_attention_options(exact_below=0)
    assert torch.equal(again(**batch).logits, before)


@torch.no_grad()
def test_window_and_backend_are_set_without_a_fit():
    teacher, batch = llama(), padded(llama())
    linear = AttentionSpec(mechanism="nystrom", window_size=5, num_landmarks=6, layers=[0])
    specs = [linear, AttentionSpec("l2", layers=[1])]
    student = convert(teacher, specs, calibration=[token_batch(teacher, 40)], options=QUICK)
    student.set_attention_options(window_size=7, backend="chunked", exact_below=3)
    linear, exact = (state.groups[0].spec for state in student.attention_states.values())
    assert (linear.window_size, linear.exact_below, linear.backend) == (7, 3, "auto")
    assert (exact.backend, exact.window_size) == ("chunked", None)
    assert student.config.attention_specs == [linear, exact]
    assert bool(student(**batch).logits.isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact_below": -1}, "exact_below must be an integer >= 0, got -1"),
        ({"exact_below": None}, "exact_below must have a value, got None"),
        ({"num_landmarks": 8}, "num_landmarks cannot be set on a converted model; expected one of exact_below, window"),
        ({"num_sinks": 8}, "num_sinks=8 belongs to mechanism='retrieval', which this model does not have"),
        ({"exact_below": 4, "window_size": 3}, "window_size must be an integer >= 5, .* got 3; `distattn adapt`"),
        ({"exact_below": 4, "backend": "cpp"}, "backend='cpp' belongs to mechanism='distance', which this model"),
    ],
)
def test_options_that_cannot_be_set_change_nothing(options, message):
    student = student_of(llama())
    before = copy.deepcopy(student.config.distattn)
    with pytest.raises(ValueError, match=message):
        student.set_attention_options(**options)
    assert student.config.distattn == before
    specs = [group.spec for state in student.attention_states.values() for group in state.groups]
    assert specs == [student.config.attention_specs[0]] * 2
    plain = convert(llama(), AttentionSpec("l1"), init="plain")
    with pytest.raises(
        ValueError, match="exact_below=5 belongs to mechanism='nystrom', which this model does not have"
    ):
        plain.set_attention_options(exact_below=5)
    with pytest.raises(ValueError, match="backend 'sdpa' cannot run metric 'l1'"):
        plain.set_attention_options(backend="sdpa")


@torch.no_grad()
def test_a_cache_does_not_go_on_under_other_options():
    student, batch = student_of(llama()), token_batch(llama(), 20)
    for options in ({"exact_below": LIMIT + 1}, {"window_size": 9}):
        cache = student(**batch, use_cache=True).past_key_values
        student.set_attention_options(**options)
        (name,) = options
        with pytest.raises(ValueError, match=f"begun with {name}=.*the model has {name}=.*start with an empty cache"):
            student(batch["input_ids"][:, :1], past_key_values=cache)


def test_training_that_reaches_no_landmark_is_said(caplog):
    from transformers.utils.logging import warning_once

    student = student_of(llama(), limit=64)
    batch = token_batch(student, 40)
    for training in (False, True):
        warning_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="distattn_hf.core.nystrom_heads"):
            student.train(training)(**batch)
        assert ("no landmark is trained" in caplog.text) == training


def test_it_is_set_in_a_folder(tmp_path):
    student = student_of(llama(), limit=0)
    student.save_pretrained(tmp_path)
    assert [spec.exact_below for spec in change_options(tmp_path, exact_below=LIMIT)] == [LIMIT]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    student.set_attention_options(exact_below=LIMIT)
    batch = padded(student)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, student(**batch).logits)
    config = (tmp_path / "config.json").read_text()
    for options in ({}, {"window_size": 2}, {"backend": "cpp"}):
        with pytest.raises(ValueError, match="nothing to set|window_size must|belongs to mechanism='distance'"):
            change_options(tmp_path, **options)
    assert (tmp_path / "config.json").read_text() == config
    llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="is not the folder of a converted checkpoint"):
        change_options(tmp_path / "plain", exact_below=1)
