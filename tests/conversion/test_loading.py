"""A user's own subclass loads what was saved: nothing that was loaded is initialised again."""

import pytest
import torch
from torch import nn
from transformers import LlamaModel, initialization

from distattn_hf import AttentionSpec, DistAttnForCausalLM, convert, revert
from distattn_hf.core.families import loaded_kept
from tests.conversion.models import FAMILIES, gpt2, token_batch
from tests.native.choices import make_model

FILL = 7.0


def in_place(weight):
    weight.data.normal_()


def through_a_view(weight):
    with torch.no_grad():
        weight.T[:] = torch.randn_like(weight.T)


def new_data(weight):
    weight.data = torch.randn_like(weight)


def by_transformers(weight):
    initialization.normal_(weight)


WAYS = [in_place, through_a_view, new_data, by_transformers]


def own_class(base: type, write=in_place) -> type:
    """What a user writes: a class of their own, which initialises every linear layer, and sets new heads to `FILL`."""

    class Own(base):
        def _init_weights(self, module):
            super()._init_weights(module)
            if isinstance(module, nn.Linear):
                write(module.weight)
            if isinstance(module, New):
                module.weight.data.fill_(FILL)
            # From above, as GPT-2 and T5 themselves do.
            for child in module.children():
                if isinstance(child, nn.Linear):
                    write(child.weight)

    return Own


class New(nn.Embedding):
    """A part that the checkpoint lacks."""


def same(model, again) -> bool:
    expected, got = model.state_dict(), again.state_dict()
    return all(torch.equal(got[name].float(), tensor.to(got[name].dtype).float()) for name, tensor in expected.items())


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_subclass_of_a_converted_class(tmp_path, family, tied, write):
    student = convert(FAMILIES[family](tie_word_embeddings=tied), AttentionSpec("l2", transform="maps"), init="plain")
    student.save_pretrained(tmp_path)
    again, info = own_class(type(student), write).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same(student, again)
    batch = token_batch(student)
    assert torch.equal(again.eval()(**batch).logits, student(**batch).logits)


def test_a_subclass_of_a_converted_base_model(tmp_path):
    student = convert(FAMILIES["llama"](LlamaModel), AttentionSpec("l2", transform="maps"), init="plain")
    student.save_pretrained(tmp_path)
    again, info = own_class(type(student)).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same(student, again)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("mechanism", "form"), [("l2", "causal"), ("nystrom", "cross"), ("linformer", "cross")])
def test_a_subclass_of_a_native_class(tmp_path, mechanism, form, tied):
    model = make_model(mechanism, "relative", form, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again, info = own_class(type(model)).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same(model, again)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}])
def test_with_another_dtype_and_a_device_map(tmp_path, options):
    student = convert(gpt2(tie_word_embeddings=False), AttentionSpec("l2", transform="scalar"), init="plain")
    student.save_pretrained(tmp_path)
    again = own_class(type(student)).from_pretrained(tmp_path, **options)
    assert again.lm_head.weight.dtype == options.get("dtype", torch.float32)
    assert same(student, again)


@pytest.mark.parametrize("kind", ["converted", "native"])
def test_what_is_missing_is_initialised_as_the_subclass_says(tmp_path, kind):
    if kind == "converted":
        model = convert(gpt2(), AttentionSpec("l2"), init="plain")
    else:
        model = make_model("l2", "none", "causal")
    model.save_pretrained(tmp_path)

    class WithHead(own_class(type(model))):
        def __init__(self, config):
            super().__init__(config)
            self.new = New(3, 5)
            self.twice = self.lm_head
            self.post_init()

    again, info = WithHead.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"new.weight"}
    assert bool((again.new.weight == FILL).all())
    assert again.twice is again.lm_head
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_missing_linear_layer_is_the_subclasss_too(tmp_path):
    student = convert(gpt2(), AttentionSpec("l2"), init="plain")
    student.transformer.save_pretrained(tmp_path)

    class Untied(type(student)):
        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                module.weight.data.fill_(FILL)

    student.config.tie_word_embeddings = False
    again = Untied.from_pretrained(tmp_path, config=student.config)
    assert bool((again.lm_head.weight == FILL).all())
    assert same(student.transformer, again.transformer)


def test_converting_and_reverting_a_users_own_class():
    teacher = own_class(type(gpt2()))(gpt2(tie_word_embeddings=False).config).eval()
    batch = token_batch(teacher)
    student = convert(teacher, AttentionSpec("sqeuclidean"), init="exact")
    assert torch.allclose(student(**batch).logits, teacher(**batch).logits, atol=1e-4)
    assert torch.equal(revert(student)(**batch).logits, teacher(**batch).logits)


def test_from_scratch_initialises_everything():
    Own = own_class(DistAttnForCausalLM)
    config = make_model("l2", "none", "causal", tie_word_embeddings=False).config
    torch.manual_seed(1)
    model = Own(config)
    assert 0.9 < float(model.lm_head.weight.detach().std()) < 1.1


def test_quantised_and_sharded_tensors_are_kept_by_what_they_are_made_of():
    class Pair(torch.Tensor):
        """A tensor made of two."""

        @staticmethod
        def __new__(cls, first, second):
            return torch.Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype)

        def __init__(self, first, second):
            self.first, self.second = first, second

        def __tensor_flatten__(self):
            return ["first", "second"], None

        __tensor_unflatten__ = None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.detach.default:
                return cls(args[0].first, args[0].second)
            raise NotImplementedError(func)

    module = nn.Module()
    parts = torch.zeros(3), torch.zeros(3)
    module.weight = nn.Parameter(Pair(*parts), requires_grad=False)
    module.weight._is_hf_initialized = True
    with loaded_kept(module):
        parts[0].normal_()
        parts[1].add_(1)
    assert not any(part.any() for part in parts)
