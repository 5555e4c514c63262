"""Continuous batching (`generate_batch`, `transformers serve --continuous-batching`): exact metrics over paged caches.

transformers gathers the keys of all texts of a batch from their pages into one row, and masks those of the others.
"""

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .interface import EAGER_IMPLEMENTATION, distattn_attention_forward
from .parameters import DistanceAttentionState

# Of the names that continuous batching takes the one that it gives masks and that is meant for nothing else.
PAGED_IMPLEMENTATION = "paged|eager"
_plain_attention = ALL_ATTENTION_FUNCTIONS[PAGED_IMPLEMENTATION]


def paged_attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """Run attention of converted models, by each spec's backend, and transformers' own of all others."""
    converted = isinstance(getattr(module, "distattn", None), DistanceAttentionState)
    # Of a converted model the other modules, too: they may have a cap, which transformers' own leaves out here.
    if not converted and getattr(getattr(module, "config", None), "distattn", None) is None:
        return _plain_attention(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None:
        raise ValueError(
            f"attn_implementation={PAGED_IMPLEMENTATION!r} is for continuous batching alone, which gives masks; call "
            "set_attn_implementation('sdpa') on the model"
        )
    if (cache := kwargs.pop("cache", None)) is not None:
        # Before transformers 5.24 modules leave it to the attention.
        key, value = cache.update(key, value, module.layer_idx, kwargs)
    return distattn_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(PAGED_IMPLEMENTATION, paged_attention_forward)


def refuse_paged(config: PreTrainedConfig) -> None:
    """Raise `ValueError` where a model of this config, if it is a converted one, cannot use a paged cache."""
    if others := sorted({spec.mechanism for spec in getattr(config, "attention_specs", ())} - {"distance"}):
        reason = {
            "nystrom": "keeps running sums in place of keys",
            "retrieval": "chooses blocks of keys of one text, and its cache keeps the text's first queries",
        }[others[0]]
        raise ValueError(
            f"continuous batching has no form for mechanism={others[0]!r}, which {reason}; pages hold keys and values "
            "alone, of all texts together: use generate, or serve without it"
        )


class BatchesContinuously:
    """Mixin before `PreTrainedModel`: a converted model of exact metrics serves a paged cache."""

    def init_continuous_batching(self, *args, **kwargs):
        """Make transformers' manager, as the base class does; until it stops, attention runs over its paged cache.

        Raises `ValueError` for Nyström and retrieval attention, and for a model set to "eager".
        """
        refuse_paged(self.config)
        implementation = self.config._attn_implementation
        if implementation == EAGER_IMPLEMENTATION:
            raise ValueError(
                "continuous batching runs the backend of each AttentionSpec, not attn_implementation='eager'; call "
                "set_attn_implementation('sdpa') first"
            )
        # The names that it takes are fixed, and this one goes on to what the config says.
        super().set_attn_implementation(PAGED_IMPLEMENTATION)
        try:
            manager = super().init_continuous_batching(*args, **kwargs)
        except BaseException:
            self.set_attn_implementation(implementation)
            raise
        # What it sets when it stops.
        manager._original_attn_impl = implementation
        return manager
