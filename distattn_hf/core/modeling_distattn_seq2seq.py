"""The native encoder-decoder: cross-attention and self-attention by any mechanism that has the form."""

from typing import Unpack

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.models.bart.modeling_bart import shift_tokens_right
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .compatibility import CACHE_NAME, cache_of, one_cache
from .configuration_native import DistAttnSeq2SeqConfig
from .modeling_distattn import DistAttnModel, check_padding_mask
from .native_attention import DistAttnAttention
from .native_layers import CallArguments, DistAttnPreTrainedModel, register_heads


class DistAttnDecoder(DistAttnModel):
    """A causal decoder with cross-attention to an encoder's output."""

    config_class = DistAttnSeq2SeqConfig
    _has_cross_attention = True
    _can_record_outputs = {
        **DistAttnModel._can_record_outputs,
        "cross_attentions": OutputRecorder(DistAttnAttention, index=1, layer_name="cross_attn"),
    }

    _output_class = BaseModelOutputWithPastAndCrossAttentions

    def _run(self, hidden_states, position_bias, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs):
        """Pass the layers the encoder's hidden states (B, M, D) and its padding mask (B, M), too."""
        if encoder_hidden_states is None:
            raise ValueError("a decoder of an encoder-decoder model needs encoder_hidden_states")
        cache = kwargs[CACHE_NAME]
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise ValueError(
                "past_key_values of an encoder-decoder model must be an EncoderDecoderCache, which has room for the "
                f"encoder's keys, too; got {type(cache).__name__}"
            )
        check_padding_mask("encoder_attention_mask", encoder_attention_mask, encoder_hidden_states)
        kwargs["encoder_attention_mask"] = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        return super()._run(hidden_states, position_bias, encoder_hidden_states, **kwargs)

    def _new_cache(self):
        return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))


class _Seq2Seq(DistAttnPreTrainedModel):
    """Base class of both encoder-decoder classes."""

    config_class = DistAttnSeq2SeqConfig

    def resize_token_embeddings(self, *args, **kwargs):
        """Resize as transformers does, the decoder's embeddings, too, where they are not the encoder's."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if not self.config.tie_word_embeddings:
            self.get_decoder().resize_token_embeddings(*args, **kwargs)
        return embeddings


class DistAttnSeq2SeqModel(_Seq2Seq):
    """Encoder and decoder, with shared embeddings where config.tie_word_embeddings."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: DistAttnSeq2SeqConfig):
        super().__init__(config)
        self.encoder = DistAttnModel(config.part(is_decoder=False))
        self.decoder = DistAttnDecoder(config.part(is_decoder=True))
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value
        if self.config.tie_word_embeddings:
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[CallArguments],
    ) -> Seq2SeqModelOutput:
        """Return the decoder's hidden states (B, N, D) for decoder_input_ids (B, N), given input_ids (B, M)."""
        cache = one_cache(past_key_values, cache)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        # The encoder has read them.
        kwargs.pop("global_attention_mask", None)
        if self.config.type_vocab_size:
            kwargs.pop("token_type_ids", None)
        outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            cache=cache,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: cache_of(outputs)},
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class DistAttnForConditionalGeneration(_Seq2Seq, GenerationMixin):
    """Predicts the next token of an answer to a text."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: DistAttnSeq2SeqConfig):
        super().__init__(config)
        self.model = DistAttnSeq2SeqModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels (B, N) one to the right, beginning with the start token."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(f"labels need decoder_start_token_id and pad_token_id, got {start!r} and {pad!r}")
        return shift_tokens_right(labels, pad, start)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[CallArguments],
    ) -> Seq2SeqLMOutput:
        """Return logits (B, N, vocab_size), and the mean loss of labels (B, N); -100 is left out.

        Without decoder inputs the labels are shifted to the right and become those. num_items_in_batch: how many labels
        the loss is a mean over, where the batch is a part of one (transformers' Trainer says it).
        """
        cache = one_cache(past_key_values, cache)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=cache,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            flat = logits.flatten(0, 1).float(), labels.flatten().to(logits.device)
            loss = fixed_cross_entropy(*flat, num_items_in_batch)
        other_outputs = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **other_outputs)


register_heads(
    DistAttnSeq2SeqConfig, AutoModel=DistAttnSeq2SeqModel, AutoModelForSeq2SeqLM=DistAttnForConditionalGeneration
)
