"""The tests of transformers that cannot hold for a converted model, and why: {test, or class.test: reason}.

They run all the same and are expected to fail (`xfail(strict=True)`), so an entry that no longer belongs here fails.
"""

_NAMES = (
    "compares config._attn_implementation with the words 'sdpa' and 'eager'; a converted model's says 'distattn' or "
    "'distattn_eager', by which transformers finds our function. Instead: test_attention_implementation_requests"
)

NOT_APPLICABLE = {
    "test_can_set_attention_dynamically": _NAMES,
    "test_sdpa_can_dispatch_non_composite_models": _NAMES,
    "T5CommonTest.test_model_base_model_prefix": (
        "T5ForConditionalGeneration holds no T5Model under its base_model_prefix; transformers' own class fails, too"
    ),
}
