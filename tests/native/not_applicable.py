"""The tests of transformers, and ours beside them, that cannot hold for a native model: {test, or class.test: reason}.

They run all the same and are expected to fail (`xfail(strict=True)`), so an entry that no longer belongs here fails.
"""

_NAMES = (
    "compares config._attn_implementation with the words 'sdpa' and 'eager'; where the mechanism is a distance it says "
    "'distattn' or 'distattn_eager', by which transformers finds our function. Instead: test_implementation_requests"
)
_ROPE = "scales rope_parameters, which do nothing in a config with another positional encoding than rotary"

NOT_APPLICABLE = {
    **{
        f"{name}CommonTest.{test}": _NAMES
        for name in ("Causal", "Seq2Seq", "Recurrent", "Ring")
        for test in ("test_can_set_attention_dynamically", "test_sdpa_can_dispatch_non_composite_models")
    },
    **{
        f"{name}CommonTest.{test}": reason
        for name in ("Recurrent", "Ring")
        for test, reason in (
            ("test_four_dimensional_masks", "a mechanism takes padding masks, and refuses others by name"),
            ("test_retain_grad_hidden_states_attentions", "weights are computed beside the output, not on its way"),
            ("test_greedy_output_dictionary", "wants the weights of all keys at every step, which the cache has not"),
        )
    },
    **{
        f"{name}CommonTest.test_model_rope_scaling_from_config_{number}_{kind}": _ROPE
        for name in ("Dot", "Encoder", "Seq2Seq", "Ring")
        for number, kind in enumerate(("linear", "dynamic", "yarn"))
    },
}
