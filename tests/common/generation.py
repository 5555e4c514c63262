"""What `generate` promises, checked on every class that generates.

They cover what transformers' `GenerationTesterMixin` covers, which its releases do not ship, and take its place for the
mixin that asks for it. Most compare one way of generating with another that must give the same tokens.
"""

import inspect
from copy import deepcopy

import torch
from transformers import StaticCache, set_seed

NEW_TOKENS = 5
PROMPT = 7
BATCH = 3


class GenerationTests:
    """Mixin for a test case with a `model_tester` and `all_generative_model_classes`."""

    def generators(self):
        """(model, inputs) for each class that generates: weights large enough for attention to matter, no end token."""
        for model_class in self.all_generative_model_classes:
            set_seed(0)
            config = self.model_tester.get_config()
            config.initializer_range, config.initializer_factor = 0.3, 1.0
            # A random model with tied embeddings repeats its last token.
            config.tie_word_embeddings = False
            if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
                config.is_decoder = True
            model = model_class(config).eval()
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
            ids = torch.randint(2, config.vocab_size, (BATCH, PROMPT))
            yield model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def generate(self, model, inputs, **options):
        """`generate` with NEW_TOKENS new tokens, greedy unless told otherwise."""
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
        return model.generate(**inputs, **options)

    def full_forward(self, model, inputs, sequences, **options):
        """The outputs of one forward pass over everything generated so far, without a cache."""
        if model.config.is_encoder_decoder:
            inputs = {**inputs, "decoder_input_ids": sequences}
        else:
            new = torch.ones(len(sequences), sequences.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.long)
            inputs = {"input_ids": sequences, "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1)}
        with torch.no_grad():
            return model(**inputs, use_cache=False, **options)

    def assert_same(self, model, left, right):
        assert left.tolist() == right.tolist(), type(model).__name__

    def test_greedy_is_the_best_token_of_a_full_forward(self):
        for model, inputs in self.generators():
            sequences = self.generate(model, inputs)
            logits = self.full_forward(model, inputs, sequences).logits
            self.assert_same(model, logits[:, -NEW_TOKENS - 1 : -1].argmax(-1), sequences[:, -NEW_TOKENS:])
            self.assert_same(model, self.generate(model, inputs, use_cache=False), sequences)

    def test_greedy_output_dictionary(self):
        for model, inputs in self.generators():
            output = self.generate(
                model,
                inputs,
                return_dict_in_generate=True,
                output_logits=True,
                output_attentions=True,
                output_hidden_states=True,
            )
            full = self.full_forward(model, inputs, output.sequences, output_attentions=True)
            logits = torch.stack(output.logits, dim=1)
            torch.testing.assert_close(logits, full.logits[:, -NEW_TOKENS - 1 : -1], rtol=1e-4, atol=1e-4)
            decoder = model.config.is_encoder_decoder
            steps = output.decoder_attentions if decoder else output.attentions
            expected = full.decoder_attentions if decoder else full.attentions
            assert len(steps) == NEW_TOKENS
            assert len(steps[0]) == self.model_tester.num_hidden_layers
            # The last step's weights are the last row but one of the full forward's, whose last token no step has seen.
            for layer, weights in enumerate(expected):
                torch.testing.assert_close(steps[-1][layer][:, :, -1], weights[:, :, -2, :-1], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))

    def test_sampling_follows_the_seed(self):
        for model, inputs in self.generators():
            drawn = []
            for seed in (1, 1, 2):
                set_seed(seed)
                drawn.append(self.generate(model, inputs, do_sample=True, top_k=50, num_return_sequences=2))
            assert len(drawn[0]) == 2 * BATCH
            self.assert_same(model, drawn[0], drawn[1])
            assert drawn[0].tolist() != drawn[2].tolist()

    def test_beam_search(self):
        for model, inputs in self.generators():
            beams = {"num_beams": 3, "num_return_sequences": 2}
            output = self.generate(model, inputs, **beams, return_dict_in_generate=True, output_scores=True)
            self.assert_same(model, output.sequences, self.generate(model, inputs, use_cache=False, **beams))
            # A beam's score is the mean log probability of its tokens.
            repeated = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
            logits = self.full_forward(model, repeated, output.sequences).logits[:, -NEW_TOKENS - 1 : -1]
            tokens = output.sequences[:, -NEW_TOKENS:, None]
            scores = logits.log_softmax(-1).gather(-1, tokens).sum(dim=(1, 2)) / NEW_TOKENS
            torch.testing.assert_close(output.sequences_scores, scores, rtol=1e-4, atol=1e-4)

    def test_beam_sampling(self):
        for model, inputs in self.generators():
            sequences = self.generate(model, inputs, do_sample=True, num_beams=2, num_return_sequences=2)
            assert len(sequences) == 2 * BATCH

    def test_assisted_decoding_is_greedy(self):
        for model, inputs in self.generators():
            inputs = {name: value[:1] for name, value in inputs.items()}
            expected = self.generate(model, inputs)
            other = deepcopy(model)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            for assistant in (model, other):
                self.assert_same(model, self.generate(model, inputs, assistant_model=assistant), expected)
            self.generate(model, inputs, assistant_model=other, do_sample=True)

    def test_prompt_lookup_is_greedy(self):
        for model, inputs in self.generators():
            inputs = {name: value[:1] for name, value in inputs.items()}
            expected = self.generate(model, inputs)
            self.assert_same(model, self.generate(model, inputs, prompt_lookup_num_tokens=2), expected)

    def test_static_cache(self):
        for model, inputs in self.generators():
            expected = self.generate(model, inputs)
            self.assert_same(model, self.generate(model, inputs, cache_implementation="static"), expected)

    def test_prefill_in_chunks(self):
        for model, inputs in self.generators():
            if model.config.is_encoder_decoder:
                self.skipTest("an encoder-decoder's prompt is not prefilled")
            self.assert_same(model, self.generate(model, inputs, prefill_chunk_size=3), self.generate(model, inputs))

    def test_padding_changes_nothing(self):
        for model, inputs in self.generators():
            expected = self.generate(model, inputs)[:, -NEW_TOKENS:]
            sides = ("left", "right") if model.config.is_encoder_decoder else ("left",)
            for side in sides:
                padding = torch.full((BATCH, 3), 5)
                padded = {}
                for name, value in inputs.items():
                    extra = padding if name == "input_ids" else torch.zeros_like(padding)
                    padded[name] = torch.cat([extra, value] if side == "left" else [value, extra], dim=1)
                for options in ({}, {"num_beams": 1, "cache_implementation": "static"}, {"use_cache": False}):
                    self.assert_same(model, self.generate(model, padded, **options)[:, -NEW_TOKENS:], expected)

    def test_rows_do_not_see_each_other(self):
        for model, inputs in self.generators():
            together = self.generate(model, inputs)
            for row in range(BATCH):
                alone = self.generate(model, {name: value[row : row + 1] for name, value in inputs.items()})
                self.assert_same(model, alone[0], together[row])

    def test_continue_from_a_cache(self):
        for model, inputs in self.generators():
            expected = self.generate(model, inputs)
            first = self.generate(model, inputs, max_new_tokens=2, return_dict_in_generate=True)
            rest = {"past_key_values": first.past_key_values, "max_new_tokens": NEW_TOKENS - 2}
            if model.config.is_encoder_decoder:
                # Without the mask `generate` would feed all the ids again, cache or not.
                mask = torch.ones_like(first.sequences)
                longer = {**inputs, "decoder_input_ids": first.sequences, "decoder_attention_mask": mask}
            else:
                longer = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
            self.assert_same(model, self.generate(model, longer, **rest), expected)

    def test_generate_from_embeddings(self):
        for model, inputs in self.generators():
            if "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
                continue
            reader = model.get_encoder() if model.config.is_encoder_decoder else model
            embeddings = reader.get_input_embeddings()(inputs["input_ids"])
            embedded = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
            if model.config.is_encoder_decoder:
                start = model.generation_config.decoder_start_token_id
                embedded["decoder_input_ids"] = torch.full((BATCH, 1), start)
            for options in ({}, {"cache_implementation": "static"}):
                sequences = self.generate(model, embedded, **options)
                self.assert_same(model, sequences[:, -NEW_TOKENS:], self.generate(model, inputs)[:, -NEW_TOKENS:])

    def test_generate_without_a_prompt(self):
        for model, _ in self.generators():
            if model.config.is_encoder_decoder:
                self.skipTest("an encoder-decoder needs encoder inputs")
            sequences = model.generate(bos_token_id=3, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert sequences.shape == (1, NEW_TOKENS + 1)
            assert sequences[0, 0] == 3

    def test_eager_generates_the_same(self):
        for model, inputs in self.generators():
            expected = self.generate(model, inputs)
            model.set_attn_implementation("eager")
            self.assert_same(model, self.generate(model, inputs), expected)

    def test_four_dimensional_masks(self):
        for model, inputs in self.generators():
            if model.config.is_encoder_decoder:
                self.skipTest("decoder-only models take a mask with a row for each query")
            expected = self.full_forward(model, inputs, inputs["input_ids"]).logits
            causal = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)
            additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
            for mask in (causal, additive):
                with torch.no_grad():
                    logits = model(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).logits
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    def test_logits_to_keep(self):
        for model, inputs in self.generators():
            if "logits_to_keep" not in inspect.signature(model.forward).parameters:
                continue
            full = self.full_forward(model, inputs, inputs["input_ids"]).logits
            last = self.full_forward(model, inputs, inputs["input_ids"], logits_to_keep=2).logits
            torch.testing.assert_close(last, full[:, -2:])

    def test_compiled_decoding_step(self):
        for model, inputs in self.generators():
            if model.config.is_encoder_decoder:
                self.skipTest("its step takes encoder outputs and two caches; test_compile covers the model")
            expected = self.generate(model, inputs)
            cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW_TOKENS)
            forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
            ids, start, tokens = inputs["input_ids"], 0, []
            with torch.no_grad():
                for _ in range(NEW_TOKENS):
                    positions = torch.arange(start, start + ids.shape[1])[None].expand(BATCH, -1)
                    mask = torch.ones(BATCH, start + ids.shape[1], dtype=torch.long)
                    output = forward(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
                    start += ids.shape[1]
                    ids = output.logits[:, -1:].argmax(-1)
                    tokens.append(ids)
            torch.compiler.reset()
            self.assert_same(model, torch.cat(tokens, dim=1), expected[:, -NEW_TOKENS:])
