"""The native family: encoders and causal decoders to train from scratch, with any mechanism and positional encoding."""

from types import SimpleNamespace
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .compatibility import CACHE_NAME, cache_of, one_cache
from .configuration_native import DistAttnConfig
from .documents import Documents, beginnings_of
from .encodings import POSITIONAL_ENCODINGS, RelativeEncoding
from .mechanism_windows import global_tokens
from .native_attention import DistAttnAttention
from .native_layers import (
    COLUMNS,
    CallArguments,
    DistAttnLayer,
    DistAttnPreTrainedModel,
    check_arguments,
    make_norm,
    register_heads,
)


def positions_of(attention_mask: Tensor | None, num_queries: int, past: int | Tensor, device) -> Tensor:
    """Return positions (B or 1, N) of the last N tokens: padding, wherever it stands, is not counted."""
    index = torch.arange(num_queries, device=device) + past
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return index[None]
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.clamp(min=0)[:, index.clamp(max=positions.shape[1] - 1)]


def check_padding_mask(name: str, mask, embeddings: Tensor, past: int | Tensor = 0) -> None:
    """Raise `ValueError` for a padding mask that does not fit embeddings (B, N, D) with `past` tokens before them."""
    if not isinstance(mask, Tensor) or mask.dim() == 4 or isinstance(past, Tensor):
        return
    expected = (embeddings.shape[0], past + embeddings.shape[1])
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"{name} must have shape (B, M)={expected}, one entry for each token, those in the cache included; got "
            f"{tuple(mask.shape)}"
        )


class DistAttnModel(DistAttnPreTrainedModel):
    """Embeddings and layers: an encoder, or a causal decoder where config.is_decoder."""

    _can_record_outputs = {
        "hidden_states": DistAttnLayer,
        "attentions": OutputRecorder(DistAttnAttention, index=1, layer_name="self_attn"),
    }
    _output_class = BaseModelOutputWithPast

    def __init__(self, config: DistAttnConfig):
        super().__init__(config)
        scale = config.hidden_size**0.5 if config.scale_embedding else 1.0
        sizes = config.vocab_size, config.hidden_size, config.pad_token_id
        self.embed_tokens = BartScaledWordEmbedding(*sizes, embed_scale=scale)
        kinds = config.type_vocab_size
        self.token_type_embeddings = nn.Embedding(kinds, config.hidden_size) if kinds else None
        self.positions = POSITIONAL_ENCODINGS.get(config.positional_encoding).from_config(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            DistAttnLayer(config, index, self._has_cross_attention) for index in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[CallArguments],
    ) -> BaseModelOutputWithPast:
        """Return hidden states (B, N, D) of input_ids (B, N) or inputs_embeds (B, N, D); cache is past_key_values.

        token_type_ids: segments (B or 1, N), 0 where none are given, of a config with type_vocab_size.

        global_attention_mask: (B, M) of 0 and 1, as transformers' Longformer has it, for mechanisms of a pattern
        (local, strided, bigbird): tokens with 1 see what they may see, and all that may see them do. As attention_mask,
        of all tokens, those in the cache included.

        position_ids that start anew within a row mark documents of their own (packing): a causal model keeps them apart
        where no cache is in use (use_cache=False), and refuses them otherwise; an encoder never keeps them apart.
        """
        cache = one_cache(past_key_values, cache)
        if misnamed := [name for name, value in kwargs.items() if isinstance(value, Cache)]:
            raise ValueError(f"{misnamed[0]!r} holds a cache, which {type(self).__name__} takes as {CACHE_NAME!r}")
        given = input_ids if input_ids is not None else inputs_embeds
        marked = global_tokens(kwargs.pop("global_attention_mask", None), self.config.mechanism, given, cache)
        if marked is not None:
            kwargs["global_attention_mask"] = marked
        segments = None if self.token_type_embeddings is None else kwargs.pop("token_type_ids", None)
        arguments = self._prepare(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, segments)
        if marked is not None and isinstance(arguments["attention_mask"], Documents):
            raise ValueError(
                "global_attention_mask beside position_ids that start anew (packed documents): give one of them"
            )
        if marked is not None and arguments[CACHE_NAME] is not None:
            arguments[CACHE_NAME].distattn_has_global = True
        hidden_states = self._run(**arguments, **kwargs)
        return self._output_class(hidden_states, **{CACHE_NAME: arguments[CACHE_NAME]})

    def _prepare(self, input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, segments) -> dict:
        """Return what all layers get, and the embeddings."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.token_type_embeddings is not None:
            inputs_embeds = inputs_embeds + self._segments(segments, inputs_embeds)
        if not self.config.is_decoder:
            if cache is not None:
                raise ValueError("past_key_values needs is_decoder=True in the config: an encoder keeps no cache")
            use_cache = False
        is_new = bool(use_cache) and cache is None
        if is_new:
            cache = self._new_cache()
        self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        past = 0 if self_cache is None else self_cache.get_seq_length()
        num_queries, device = inputs_embeds.shape[1], inputs_embeds.device
        # Static caches count in a tensor that the layers will change.
        past = past.clone() if isinstance(past, Tensor) else past
        check_padding_mask("attention_mask", attention_mask, inputs_embeds, past)
        # Layers that keep fewer keys take the last part of mask and bias (rings of different reach).
        widths = [layer.get_mask_sizes(num_queries)[0] for layer in ([] if self_cache is None else self_cache.layers)]
        widest = widths.index(max(widths)) if widths else 0
        mask_of = {"config": self.config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        if self.config.is_decoder:
            mask_of |= {"position_ids": position_ids, CACHE_NAME: self_cache, "layer_idx": widest}
            mask = self._causal_mask(mask_of, is_new)
        else:
            mask = create_bidirectional_mask(**mask_of)
        if position_ids is None:
            position_ids = positions_of(attention_mask, num_queries, past, device)
        num_keys, cut = (num_queries, 0) if self_cache is None else self_cache.get_mask_sizes(num_queries, widest)
        return {
            "hidden_states": self.dropout(self.positions.embed(inputs_embeds, position_ids)),
            "position_bias": self._bias(num_queries, num_keys, past - cut, device),
            "position_embeddings": self.positions.rotation(inputs_embeds, position_ids),
            "attention_mask": mask,
            CACHE_NAME: cache,
            "use_cache": use_cache,
        }

    def _segments(self, segments: Tensor | None, embeddings: Tensor) -> Tensor:
        """Return the vectors of segments (B or 1, N), or of segment 0; raises `ValueError` for what cannot be."""
        if segments is None:
            return self.token_type_embeddings.weight[0]
        if segments.shape[-1:] != embeddings.shape[1:2] or segments.shape[0] not in (1, len(embeddings)):
            raise ValueError(
                f"token_type_ids must have shape (B, N)={tuple(embeddings.shape[:2])}, got {tuple(segments.shape)}"
            )
        kinds = self.config.type_vocab_size
        if not torch.compiler.is_compiling() and bool(((segments < 0) | (segments >= kinds)).any()):
            raise ValueError(
                f"token_type_ids must be from 0 to type_vocab_size - 1 = {kinds - 1}, got {segments.unique().tolist()}"
            )
        return self.token_type_embeddings(segments)

    def _causal_mask(self, mask_of: dict, is_new: bool):
        """Return the mask that transformers makes of its arguments, or what keeps packed documents apart without one.

        Positions that the caller gave may start anew. transformers looks for that where no mask is given; mechanisms
        for which no mask can tell documents apart get them cut out.
        """
        positions, mask, batch = mask_of["position_ids"], mask_of["attention_mask"], len(mask_of["inputs_embeds"])
        positions = positions if positions is None else positions.expand(batch, -1)
        cut_out = self.config.mechanism not in ("dot", "distance")
        flash = "flash" in self.config._attn_implementation
        by_mask = not cut_out and not (flash and mask is not None)
        begins = beginnings_of(positions, mask, mask_of[CACHE_NAME], is_new, by_mask)
        if cut_out:
            if begins is not None:
                return Documents(begins, None if mask is None else mask.bool())
            mask_of = {**mask_of, "position_ids": None}
        elif begins is not None and mask is not None:
            if flash:
                raise ValueError(
                    "position_ids start anew within a row (packed documents) beside attention_mask, which "
                    f"attn_implementation={self.config._attn_implementation!r} cannot follow: leave out "
                    "attention_mask, or use 'sdpa'"
                )
            mask_of = {**mask_of, "and_mask_function": packed_sequence_mask_function(begins.cumsum(-1))}
        return create_causal_mask(**mask_of)

    def _new_cache(self) -> Cache:
        return DynamicCache(config=self.config)

    def _bias(self, num_queries: int, num_keys: int, past, device):
        if self.config.mechanism == "nystrom" and isinstance(self.positions, RelativeEncoding):
            # No tensor, so that no (N, M) entries are made: see `bias_behind`.
            return SimpleNamespace(distattn_bias=self.positions.lazy_bias(past, device))
        return self.positions.bias(num_queries, num_keys, past, device)

    def _run(self, hidden_states, position_bias, encoder_hidden_states=None, **kwargs) -> Tensor:
        check_arguments(self, kwargs)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_bias, encoder_hidden_states, **kwargs)
        return self.norm(hidden_states)


def _require_decoder(model_class: str, config: DistAttnConfig, wanted: bool) -> None:
    if config.is_decoder is not wanted:
        task = "predicts the next token from those before" if wanted else "fills gaps from both sides"
        raise ValueError(f"{model_class} {task} and needs is_decoder={wanted} in its config, got {config.is_decoder}")


class DistAttnForCausalLM(DistAttnPreTrainedModel, GenerationMixin):
    """Predicts the next token from those before; raises `ValueError` unless config.is_decoder."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DistAttnConfig):
        _require_decoder("DistAttnForCausalLM", config, True)
        super().__init__(config)
        self.model = DistAttnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """Return the inputs of one call as transformers does; what is written is not global."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if (marked := inputs.get("global_attention_mask")) is not None:
            cache, ids = inputs.get(CACHE_NAME), inputs.get("input_ids")
            total = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
            total += 0 if cache is None else int(cache.get_seq_length())
            inputs["global_attention_mask"] = nn.functional.pad(marked, (0, total - marked.shape[1]))
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[CallArguments],
    ) -> CausalLMOutputWithPast:
        """Return logits (B, N, vocab_size), and the mean loss of labels (B, N), shifted here; -100 is left out."""
        cache = one_cache(past_key_values, cache)
        arguments = {"inputs_embeds": inputs_embeds, "use_cache": use_cache, "cache": cache, **kwargs}
        outputs = self.model(input_ids, attention_mask, position_ids, **arguments)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss, logits, cache_of(outputs), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DistAttnForMaskedLM(DistAttnPreTrainedModel):
    """Predicts masked tokens from both sides; raises `ValueError` where config.is_decoder."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DistAttnConfig):
        _require_decoder("DistAttnForMaskedLM", config, False)
        super().__init__(config)
        self.model = DistAttnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[CallArguments],
    ) -> MaskedLMOutput:
        """Return logits (B, N, vocab_size), and the mean loss of labels (B, N); -100 is left out."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class DistAttnForSequenceClassification(GenericForSequenceClassification, DistAttnPreTrainedModel):
    """Predicts a label for each text from its last token that is not padding."""

    # Its loss is a mean over the batch it gets, which Trainer must know to accumulate gradients.
    accepts_loss_kwargs = False


class DistAttnForTokenClassification(GenericForTokenClassification, DistAttnPreTrainedModel):
    """Predicts a label for each token."""

    accepts_loss_kwargs = False


class DistAttnForQuestionAnswering(GenericForQuestionAnswering, DistAttnPreTrainedModel):
    """Predicts the first and last token of the answer."""


class DistAttnForMultipleChoice(DistAttnPreTrainedModel):
    """Scores C texts, each read alone, from the last token that is not padding."""

    def __init__(self, config: DistAttnConfig):
        super().__init__(config)
        self.model = DistAttnModel(config)
        rate = config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(rate)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Unpack[CallArguments],
    ) -> MultipleChoiceModelOutput:
        """Return logits (B, C) of input_ids (B, C, N), and the mean loss of labels (B,).

        Without an attention_mask the last token is read.
        """
        model_inputs = input_ids if input_ids is not None else inputs_embeds
        if model_inputs is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        batch, choices, length = model_inputs.shape[:3]
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        named |= {name: kwargs.pop(name, None) for name in COLUMNS}
        flat = {name: None if t is None else t.reshape(-1, length) for name, t in named.items()}
        if inputs_embeds is not None:
            inputs_embeds = inputs_embeds.flatten(0, 1)
        outputs = self.model(**flat, inputs_embeds=inputs_embeds, **kwargs)
        last = torch.full((batch * choices,), length - 1, device=model_inputs.device)
        if flat["attention_mask"] is not None:
            last = (flat["attention_mask"].long() * torch.arange(length, device=model_inputs.device)).argmax(-1)
        rows = torch.arange(batch * choices, device=model_inputs.device)
        pooled = outputs.last_hidden_state[rows, last]
        logits = self.score(self.dropout(pooled)).view(batch, choices)
        loss = None if labels is None else fixed_cross_entropy(logits, labels, num_items_in_batch)
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)


register_heads(
    DistAttnConfig,
    AutoModel=DistAttnModel,
    AutoModelForCausalLM=DistAttnForCausalLM,
    AutoModelForMaskedLM=DistAttnForMaskedLM,
    AutoModelForSequenceClassification=DistAttnForSequenceClassification,
    AutoModelForTokenClassification=DistAttnForTokenClassification,
    AutoModelForQuestionAnswering=DistAttnForQuestionAnswering,
    AutoModelForMultipleChoice=DistAttnForMultipleChoice,
)
