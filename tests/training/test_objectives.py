"""The objectives against computations written out here, and gradients only where they belong."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AlbertConfig, AlbertModel, BertModel

from distattn_hf import AttentionSpec, CalibrationOptions, convert
from distattn_hf.conversion.beyond import take_beyond
from distattn_hf.data.batches import label_loss
from distattn_hf.training.objectives import (
    AttentionTransfer,
    Distillation,
    encoder_distance,
    logits_divergence,
    relative_error,
)
from distattn_hf.training.stages import Stage, StageOptions, frozen_copy, set_trainable
from tests.conversion.models import CLASSIFIER, FAMILIES, bert, gpt2, llama, t5
from tests.training.rows import collate, rows

TASK = {"gpt2": "causal-lm", "llama": "causal-lm", "bert": "masked-lm", "t5": "seq2seq"}


def plain(model, metric="l2", **kwargs):
    return convert(model, AttentionSpec(metric, transform="scalar", **kwargs), init="plain")


def batch_for(family, count=4):
    return collate(rows(TASK[family], count))


def attention_only(student):
    set_trainable(student, "attention", "causal-lm")
    return AttentionTransfer(student)


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_transfer_loss_is_what_a_double_loop_in_float64_gives():
    """BERT, one layer's worth of arithmetic in plain loops: softmax(q·k/√d) against softmax(-λ·‖q/α - α(k-c)‖/√d)."""
    teacher = bert().double()
    student = plain(bert()).double()
    for state in student.attention_states.values():
        with torch.no_grad():
            state.groups[0].log_alpha.fill_(math.log(0.7))
            state.groups[0].shift.normal_(std=0.3)
    batch = batch_for("bert")
    inputs = {}
    for name, module in teacher.named_modules():
        if name.endswith("attention.self"):
            module.register_forward_hook(
                lambda module, arguments, kwargs, output, name=name: inputs.__setitem__(
                    name.removeprefix("bert."), (module, arguments[0] if arguments else kwargs["hidden_states"])
                ),
                with_kwargs=True,
            )
    with torch.no_grad():
        teacher(**{k: v for k, v in batch.items() if k != "labels"})
    layers = []
    for name, (module, hidden) in inputs.items():
        group = student.attention_states[name].groups[0]
        lam, alpha, shift = group.log_lambda.exp(), group.log_alpha.exp(), group.shift
        heads = []
        for h in range(4):
            part = slice(8 * h, 8 * h + 8)
            ratios = []
            for b in range(len(hidden)):
                length = int(batch["attention_mask"][b].sum())
                q, k, v = (layer(hidden[b])[:length, part] for layer in (module.query, module.key, module.value))
                above = below = 0.0
                for i in range(length):
                    dots = torch.stack([q[i] @ k[j] for j in range(length)]) / math.sqrt(8)
                    distances = torch.stack(
                        [(q[i] / alpha[h] - alpha[h] * (k[j] - shift[h])).square().sum().sqrt() for j in range(length)]
                    )
                    target = dots.softmax(0) @ v
                    output = (-lam[h] * distances / math.sqrt(8)).softmax(0) @ v
                    above, below = above + (output - target).square().sum(), below + target.square().sum()
                ratios.append(above / below)
            heads.append(sum(ratios) / len(ratios))
        layers.append(sum(heads) / len(heads))
    expected = sum(layers) / len(layers)
    loss = attention_only(student)(student, batch)
    assert float(expected.detach()) > 0.01
    # Two ways of the same float64 arithmetic.
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_transfer_trains_attention_parameters_alone_and_hands_on_the_teachers_output(family):
    teacher = FAMILIES[family]()
    before = copy.deepcopy(teacher.state_dict())
    student, batch = plain(teacher), batch_for(family)
    transfer, seen = attention_only(student), []
    student.register_forward_hook(lambda module, arguments, output: seen.append(output.logits))
    transfer(student, batch).backward()
    found = gradients(student)
    expected = {n for n, _ in student.named_parameters() if ".distattn." in n}
    # λ, α and shift of every module: all of them matter to l2.
    assert set(found) == expected
    assert all(float(g.abs().sum()) > 0 for g in found.values())
    teacher.eval()
    logits = teacher(**batch).logits
    # Two kernels for the same dot products; logits are of size 1 to 10.
    torch.testing.assert_close(seen[0], logits[:, -seen[0].shape[1] :], rtol=1e-3, atol=5e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(state.observer is None for state in student.attention_states.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_graph_through_the_model_and_recomputing_gives_the_same_gradients(family):
    student, batch = plain(FAMILIES[family](), "l1"), batch_for(family)
    transfer = attention_only(student)
    loss = transfer(student, batch)
    loss.backward()
    expected = gradients(student)
    student.zero_grad()
    transfer.recompute = True
    again = transfer(student, batch)
    again.backward()
    assert torch.equal(loss, again)
    for name, gradient in gradients(student).items():
        assert torch.equal(gradient, expected[name]), name
    # The model's own output hangs on no parameter.
    seen = []
    student.register_forward_hook(lambda module, arguments, output: seen.append(output))
    transfer(student, batch)
    assert not seen[0].logits.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    student = plain(FAMILIES[family]())
    transfer, batch = attention_only(student), batch_for(family)
    if family == "gpt2" or family == "llama":
        batch["attention_mask"][0, :4] = 0
    loss = transfer(student, batch)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"][batch["attention_mask"] == 0] = 7
    assert not torch.equal(changed["input_ids"], batch["input_ids"])
    torch.testing.assert_close(transfer(student, changed), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_batch_is_the_mean_over_its_halves(family):
    """What makes several processes, or several parts of a step, equal to one large batch."""
    student = plain(FAMILIES[family]())
    transfer, batch = attention_only(student), batch_for(family)
    halves = [transfer(student, {k: v[i : i + 2] for k, v in batch.items()}) for i in (0, 2)]
    torch.testing.assert_close(transfer(student, batch), sum(halves) / 2, rtol=1e-6, atol=1e-7)


def test_sequences_without_a_valid_query_do_not_count():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    valid = torch.tensor([[1, 1, 1, 0, 0], [0] * 5, [1] * 5])
    expected = relative_error(student[[0, 2]], teacher[[0, 2]], valid[[0, 2]])
    torch.testing.assert_close(relative_error(student, teacher, valid), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_transfer_of_projections_reaches_them_and_nothing_else(family):
    teacher = FAMILIES[family]()
    student = plain(teacher)
    set_trainable(student, "attention+qk", TASK[family])
    frozen = frozen_copy(student, teacher)
    before = copy.deepcopy(frozen.state_dict())
    transfer = AttentionTransfer(student, frozen)
    loss = transfer(student, batch_for(family))
    loss.backward()
    names = {n for n, g in gradients(student).items() if float(g.abs().sum()) > 0 and ".distattn." not in n}
    marks = {"gpt2": ("c_attn",), "llama": ("q_proj", "k_proj"), "bert": (".query.", ".key."), "t5": (".q.", ".k.")}
    assert names
    assert all(any(mark in name for mark in marks[family]) for name in names)
    # With the teacher's own projections it is the loss of the student that trains attention parameters alone.
    only = attention_only(plain(teacher))
    torch.testing.assert_close(loss, only(only.student, batch_for(family)), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())
    if family == "gpt2":
        weight = student.transformer.h[0].attn.c_attn.weight.grad
        assert float(weight[:, 64:].abs().sum()) == 0.0  # the value's part of the fused projection


def test_projections_that_moved_are_still_compared_with_the_teachers():
    teacher = llama()
    student = plain(teacher)
    set_trainable(student, "attention+qk", "causal-lm")
    frozen = frozen_copy(student, teacher)
    batch = batch_for("llama")
    before = AttentionTransfer(student, frozen)(student, batch)
    with torch.no_grad():
        student.model.layers[0].self_attn.q_proj.weight.mul_(-1.0)
    assert float(AttentionTransfer(student, frozen)(student, batch).detach()) > float(before.detach()) + 1e-3


def test_transfer_has_no_dropout_whatever_mode_the_trainer_left():
    student, batch = plain(gpt2()), batch_for("gpt2")
    transfer = attention_only(student)
    expected = transfer(student, batch)
    assert student.config.resid_pdrop > 0
    assert torch.equal(transfer(student.train(), batch), expected)


def test_shared_layers_count_once_for_each_use():
    torch.manual_seed(0)
    config = AlbertConfig(
        num_hidden_layers=3, num_attention_heads=4, hidden_size=32, embedding_size=16, intermediate_size=64,
        vocab_size=64, initializer_range=0.2,
    )  # fmt: skip
    student = plain(AlbertModel(config).eval())
    assert len(student.attention_states) == 1
    transfer, calls = attention_only(student), []
    original = transfer._observer

    def counting(inputs, targets, losses):
        calls.append(losses)
        return original(inputs, targets, losses)

    transfer._observer = counting
    loss = transfer(student, collate(rows("embedding", 4)))
    assert len(calls[0]) == 3
    torch.testing.assert_close(loss, torch.stack(calls[0]).mean())


def test_heads_that_are_not_converted_do_not_dilute_the_loss():
    batch = batch_for("llama")
    some = attention_only(plain(llama(), heads=[1], layers=[0]))
    student = plain(llama())
    every, seen = attention_only(student), []
    original = every._observer

    def observer(inputs, targets, losses):
        inner = original(inputs, targets, losses)

        def observe(state, query, key, value, call):
            if not seen:
                from distattn_hf.conversion.observe import teacher_attention
                from distattn_hf.training.objectives import student_attention

                target = teacher_attention(query, key, value, call)
                seen.append(relative_error(student_attention(state, query, key, value, call), target, None)[1])
            return inner(state, query, key, value, call)

        return observe

    every._observer = observer
    every(every.student, batch)
    torch.testing.assert_close(some(some.student, batch), seen[0], rtol=1e-5, atol=1e-7)


def test_nystrom_heads_transfer():
    model = gpt2()
    text = [row["input_ids"].tolist() for row in rows("causal-lm", 8, 64)]
    # Such short texts attend exactly where the model is used; what trains is the far field all the same.
    spec = AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=4, num_sinks=1, exact_below=100)
    student = convert(
        model, spec, calibration={"input_ids": torch.tensor(text)}, options=CalibrationOptions(steps=2, progress=False)
    )
    transfer, batch = attention_only(student), collate(rows("causal-lm", 4, 48))
    loss = transfer(student, batch)
    loss.backward()
    expected = gradients(student)
    assert {n.split(".")[-1] for n in expected} >= {"landmarks", "interpolation_map", "landmark_bias", "key_gain"}
    student.zero_grad()
    transfer.recompute = True
    transfer(student, batch).backward()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("train", ["attention", "attention+qk"])
def test_modules_that_max_error_left_exact_count_for_nothing(train):
    """One layer has no converted head: the loss is that of the other, and the layer above still gets its input."""
    teacher = gpt2()
    data = batch_for("gpt2")
    spec = AttentionSpec(mechanism="nystrom", num_landmarks=4, window_size=4, num_sinks=1)
    options = CalibrationOptions(steps=1, progress=False)
    student = convert(teacher, spec, calibration={"input_ids": data["input_ids"]}, options=options)

    def loss():
        stage = Stage("transfer", student, teacher, "causal-lm", StageOptions(train=train))
        return stage.loss(student, data)[0].item()

    both = loss()
    name, state = next(iter(student.attention_states.items()))
    take_beyond(student, name, state, [{}], list(range(state.num_heads)))
    second = loss()
    assert math.isfinite(second)
    # Every layer gets the teacher's input, so the other layer's loss is what it was.
    first = 2 * both - second
    other = convert(teacher, spec, calibration={"input_ids": data["input_ids"]}, options=options)
    name, state = list(other.attention_states.items())[1]
    take_beyond(other, name, state, [{}], list(range(state.num_heads)))
    student = other
    assert loss() == pytest.approx(first, rel=1e-4)


def test_transfer_refuses_what_it_cannot_train():
    with pytest.raises(ValueError, match="needs a converted model, got GPT2LMHeadModel"):
        AttentionTransfer(gpt2())
    with pytest.raises(ValueError, match=r"'transformer.wte.weight' requires gradients"):
        AttentionTransfer(plain(gpt2()))
    with pytest.raises(ValueError, match="teacher and student differ"):
        frozen_copy(plain(gpt2()), bert())


def test_divergence_of_logits_in_float64():
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 11, dtype=torch.float64), torch.randn(7, 11, dtype=torch.float64)
    expected = 0.0
    for s, t in zip(student / 2.0, teacher / 2.0, strict=True):
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        expected = expected + (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(logits_divergence(student, teacher, 2.0), 4.0 * expected, rtol=1e-12, atol=0)


def test_divergence_of_many_rows_is_computed_in_parts(monkeypatch):
    torch.manual_seed(0)
    student, teacher = torch.randn(10, 5, requires_grad=True), torch.randn(10, 5)
    whole = logits_divergence(student, teacher)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr("distattn_hf.training.objectives._ROWS", 4)
    parts = logits_divergence(student, teacher)
    (got,) = torch.autograd.grad(parts, student)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_leaves_out_what_has_no_label(family):
    teacher = FAMILIES[family]()
    student, batch = plain(teacher), batch_for(family)
    batch["labels"][1, 2:5] = -100
    loss, output = Distillation(teacher, TASK[family], temperature=1.5, task_weight=0.25)(student, batch)
    arguments = {k: v for k, v in batch.items() if k != "labels" or family == "t5"}
    theirs, mine, labels = teacher(**arguments).logits, student(**arguments).logits, batch["labels"]
    torch.testing.assert_close(output.logits, mine, rtol=1e-5, atol=1e-5)
    if TASK[family] == "causal-lm":
        theirs, mine, labels = theirs[:, :-1], mine[:, :-1], labels[:, 1:]
    total = count = 0.0
    for s, t, label in zip(mine.flatten(0, 1), theirs.flatten(0, 1), labels.flatten(), strict=True):
        if int(label) != -100:
            p, q = (t / 1.5).softmax(-1), (s / 1.5).softmax(-1)
            total += 0.75 * 2.25 * (p * (p.log() - q.log())).sum() - 0.25 * s.log_softmax(-1)[label]
            count += 1
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-5)


def test_distillation_counts_labels_of_the_whole_step():
    teacher = gpt2()
    student, batch = plain(teacher), collate(rows("causal-lm", 4))
    batch["labels"][0, 3:] = -100
    distil = Distillation(teacher, "causal-lm")
    whole = distil(student, batch)[0]
    items = (batch["labels"][:, 1:] != -100).sum()
    parts = [distil(student, {k: v[i : i + 2] for k, v in batch.items()}, items)[0] for i in (0, 2)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-7)
    means = [distil(student, {k: v[i : i + 2] for k, v in batch.items()})[0] for i in (0, 2)]
    assert abs(float((sum(means) / 2 - whole).detach())) > 1e-4


def test_hidden_states_of_every_layer_and_no_padding():
    teacher, batch = bert(), batch_for("bert")
    student = plain(teacher)
    bare = Distillation(teacher, "masked-lm")(student, batch)[0]
    loss = Distillation(teacher, "masked-lm", hidden_weight=2.0)(student, batch)[0]
    arguments = {k: v for k, v in batch.items() if k != "labels"}
    mine, theirs = (m(**arguments, output_hidden_states=True).hidden_states[1:] for m in (student, teacher))
    keep = batch["attention_mask"].bool()
    expected = sum(F.mse_loss(a[keep], b[keep]) for a, b in zip(mine, theirs, strict=True)) / len(mine)
    torch.testing.assert_close(loss - bare, 2.0 * expected, rtol=1e-3, atol=1e-6)


def test_an_encoder_without_head():
    teacher = bert(BertModel)
    student, batch = plain(teacher), collate(rows("embedding", 4))
    loss = Distillation(teacher, "embedding")(student, batch)[0]
    mine, theirs = (m(**batch).last_hidden_state for m in (student, teacher))
    expected = []
    for b, mask in enumerate(batch["attention_mask"].bool()):
        a, c = mine[b][mask], theirs[b][mask]
        expected.append((1 - F.cosine_similarity(a, c, dim=-1)).mean() + F.mse_loss(a, c))
    torch.testing.assert_close(loss, sum(expected) / len(expected), rtol=1e-5, atol=1e-6)
    assert float(encoder_distance(mine, mine, None).detach()) == pytest.approx(0.0, abs=1e-6)


def test_the_teacher_is_not_changed_and_gets_no_gradient():
    teacher = llama()
    before = copy.deepcopy(teacher.state_dict())
    stage = Stage("distillation", plain(teacher), teacher, "causal-lm", StageOptions())
    stage.loss(stage.model, batch_for("llama"))[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_label_loss_is_transformers_own():
    batch = batch_for("bert")
    student = plain(bert())
    output = student(**batch)
    count = (batch["labels"] != -100).sum()
    torch.testing.assert_close(label_loss(output.logits, batch["labels"], count), output.loss)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"hidden_weight": -1.0}, "hidden_weight must be >= 0, got -1.0"),
        ({"task_weight": 1.5}, r"task_weight must be in \[0, 1\], got 1.5"),
        ({"task": "chess"}, "task must be one of causal-lm"),
        ({"task": "embedding", "task_weight": 0.5}, "task_weight must be 0 for an encoder"),
    ],
)
def test_distillation_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        Distillation(bert(), **{"task": "masked-lm", **options})


def test_regression_is_refused():
    with pytest.raises(ValueError, match="problem_type='regression'"):
        Distillation(bert(CLASSIFIER, problem_type="regression"), "sequence-classification")


def test_padding_of_the_decoder_does_not_count():
    """Targets that are padded and targets that are cut off there: the decoder's own attention, and to the encoder."""
    student = plain(t5())
    transfer, batch = attention_only(student), batch_for("t5")
    batch["labels"][:, 6:] = -100
    padded = transfer(student, batch)
    torch.testing.assert_close(transfer(student, {**batch, "labels": batch["labels"][:, :6]}), padded)
    mask = (batch["labels"] != -100).long()
    torch.testing.assert_close(transfer(student, {**batch, "decoder_attention_mask": mask}), padded)


def test_distillation_goes_without_dropout_unless_asked():
    teacher = gpt2(resid_pdrop=0.5)
    student, batch = plain(teacher), batch_for("gpt2")
    distil = Distillation(teacher, "causal-lm")
    student.train()
    first = distil(student, batch)[0]
    assert torch.equal(first, distil(student.train(), batch)[0])
    distil.dropout = True
    assert not torch.equal(distil(student.train(), batch)[0], distil(student.train(), batch)[0])
    # Checkpointing needs training mode: it would otherwise quietly not be there.
    distil.dropout = False
    student.train()
    student.activation_checkpointing_enable()
    distil(student, batch)
    assert student.training
