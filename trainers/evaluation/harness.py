# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Flow-based language models in the lm-evaluation-harness:

    python -m modeling_flm.trainers.evaluation.harness --model flm --model_args pretrained=me/fmlm,num_times=64 --tasks arc_easy

Takes the arguments of `lm_eval`. Needs `pip install modeling-flm[lm-eval]`.
"""

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from modeling_flm import FLMGenerationConfig  # the import also registers the models of this library
from modeling_flm.hub.loading import load_checked
from modeling_flm.known_tokens_flm import begin_tokens, lengths_up_to_eos
from modeling_flm.pipeline_flm import encode_texts

from ..batches import example_seed
from .likelihood import LIKELIHOOD_STREAM, warn_of_unknown_tokens
from .samples import end_tokens, ends_texts, pad_tokens


@register_model("flm")
class FLMHarnessModel(TemplateLM):
    """
    A model for the lm-evaluation-harness. Likelihoods are variational bounds. All requests with the same context have the same
    noise, so that batches do not change the likelihoods, and the answers to one question are compared under equal noise. Texts begin
    with a known BOS token if the texts of the training did (`generation_config.bos_token_id`), as in the pipeline.

    Args:
        pretrained (`str`): Name or folder of an FLM or a flow map with its tokenizer.
        num_times (`int`, *optional*, defaults to 32): Number of noise levels for each text, see [`~FLMLikelihoodMixin.log_likelihood_bound`].
        num_steps (`int`, *optional*): Number of sampling steps where texts are generated.
        batch_size (`int`, *optional*, defaults to 64):
            Largest number of noised texts in a forward pass, at least 64: the harness passes 1 by default.
        max_batch_size (`int`, *optional*): Not used.
        device (`str`, *optional*): Device. By default an accelerator if there is one.
        seed (`int`, *optional*, defaults to 0): Seed of all noise.
        revision (`str`, *optional*): Branch, tag or commit of the model.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run code from the model's repository.
        append_eos (`bool`, *optional*):
            Whether to append an EOS token to each continuation, and padding up to the model's length. By default for models
            that were trained on one text per sequence (`generation_config.pad_after_eos`).
    """

    model_class = AutoModel

    def __init__(
        self,
        pretrained: str,
        num_times: int = 32,
        num_steps: int | None = None,
        batch_size: int | str = 64,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        revision: str | None = None,
        trust_remote_code: bool = False,
        append_eos: bool | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        if not isinstance(num_times, int) or num_times < 2:
            raise ValueError(f"`num_times` must be an integer of at least 2, got {num_times!r}.")
        FLMGenerationConfig(num_steps=num_steps)  # raises an error for numbers that `generate` cannot use
        found = torch.accelerator.current_accelerator(check_available=True)
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = found or "cpu"  # the harness passes CUDA by default
        self._device = torch.device(device)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            self.model = load_checked(self.model_class, pretrained, **options).to(self._device).eval()
            self.tokenizer = load_checked(AutoTokenizer, pretrained, **options)
        except OSError as error:
            raise ValueError(f"`pretrained`: {error}") from error
        self.num_times, self.num_steps, self.seed = num_times, num_steps, seed
        self.batch_size = max(64, int(batch_size))
        self.append_eos = ends_texts(self.model) if append_eos is None else append_eos
        if self.append_eos and self.tokenizer.eos_token_id is None:
            raise ValueError("`append_eos` needs a tokenizer with an end-of-sequence token.")

    @property
    def max_length(self) -> int:
        """Number of tokens of the model's texts."""
        return self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def begin(self) -> list[int]:
        """The known tokens that all texts begin with: the BOS token, or none."""
        return begin_tokens(self.model.generation_config)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        # Special tokens stay, since chat templates write them.
        options = {"split_special_tokens": False, "add_special_tokens": bool(add_special_tokens)}
        return encode_texts(self.tokenizer, [string], "requests", **options)[0]

    def _encode(self, text: str) -> list[int]:
        """Returns the tokens of a text without those that it begins with."""
        tokens, number = self.tok_encode(text), len(self.begin)
        return tokens[number:] if tokens[:number] == self.begin else tokens

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = []
        for context, continuation in (request.args for request in requests):
            known, rest = self._encode_pair(context, continuation) if context else ([], self._encode(continuation))
            known = known if known[: len(self.begin)] == self.begin else self.begin + known
            if self.append_eos:
                rest = rest + end_tokens(self.model, self.tokenizer, len(known) + len(rest))
            pairs.append(((context, continuation), known, rest))
        return self._loglikelihood_tokens(pairs, disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        lengths = [len(known) + len(rest) for _, known, rest in requests]
        if max(lengths, default=0) > self.max_length:
            raise ValueError(f"A request has {max(lengths)} tokens, but the model's texts have {self.max_length}.")
        texts = [text or context for context, text in dict.fromkeys(pair for pair, _, _ in requests)]
        warn_of_unknown_tokens(self.tokenizer, [rest for _, _, rest in requests], texts)
        # Nothing to predict has the probability 1
        results = {index: (0.0, True) for index, (_, _, rest) in enumerate(requests) if not rest}
        num_begin, first_with = len(self.begin), {}
        noise_of = [
            first_with.setdefault(tuple(known[num_begin:]) or index, index)
            for index, (_, known, _) in enumerate(requests)
        ]
        order = sorted(set(range(len(requests))) - results.keys(), key=lambda index: (lengths[index], index))
        rows_at_a_time = max(1, self.batch_size // 8)
        for start in tqdm(range(0, len(order), rows_at_a_time), desc="Likelihood", disable=disable_tqdm):
            indices = order[start : start + rows_at_a_time]
            texts = [requests[index][1] + requests[index][2] for index in indices]
            input_ids, attention_mask = pad_tokens(texts)
            num_known = torch.tensor([len(requests[index][1]) for index in indices])
            known = (torch.arange(input_ids.shape[1]) < num_known[:, None]).long()
            options = {"attention_mask": None if attention_mask.all() else attention_mask, "prompt_mask": known}
            numbers = [noise_of[index] for index in indices]
            values = self._bound(input_ids, **options, generator=self._generators(numbers))
            generated = self._generate(input_ids, **options, generator=self._generators(numbers)).cpu()
            matches = (generated == input_ids) | (attention_mask == 0)
            for row, index in enumerate(indices):
                results[index] = (values[row].item(), bool(matches[row].all()))
                self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        # Independent windows of the model's length
        windows, owners = [], []
        size = self.max_length - len(self.begin) - self.append_eos
        for owner, (string,) in enumerate(request.args for request in requests):
            tokens = self._encode(string)
            for start in range(0, len(tokens), size):
                window = tokens[start : start + size]
                if self.append_eos and start + size >= len(tokens):
                    window += end_tokens(self.model, self.tokenizer, len(self.begin) + len(window))
                windows.append(((string, ""), self.begin, window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[owner] += value
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        results = []
        for index, request in enumerate(tqdm(requests, desc="Generating", disable=disable_tqdm)):
            context, settings = request.args
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            tokens = self.begin + self._encode(context)[-(self.max_length - 1 - len(self.begin)) :]
            length = min(self.max_length, len(tokens) + settings.get("max_gen_toks", self.max_length))
            input_ids = torch.tensor([tokens], dtype=torch.long) if tokens else None
            generated = self._generate(input_ids, length=length, generator=self._generators([index]))
            new = generated[:, len(tokens) :]
            # What follows the end belongs to another text.
            new = new[0, : lengths_up_to_eos(new, self.model.generation_config.eos_token_id)]
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            for end in filter(None, until):
                text = text.split(end)[0]
            results.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return results

    def _bound(self, input_ids: torch.LongTensor, **options) -> torch.Tensor:
        """Returns the bound on the log-likelihood of the unknown tokens of each text."""
        output = self.model.log_likelihood_bound(
            input_ids, num_times=self.num_times, batch_size=self.batch_size, **options
        )
        return output.log_likelihood

    def _generate(self, input_ids: torch.LongTensor | None, **options) -> torch.LongTensor:
        """Returns the model's completions of the known tokens."""
        return self.model.generate(input_ids, num_steps=self.num_steps, batch_size=self.batch_size, **options)

    def _generators(self, indices: list[int]) -> list[torch.Generator]:
        seeds = [example_seed(self.seed, LIKELIHOOD_STREAM, index) for index in indices]
        return [torch.Generator().manual_seed(seed) for seed in seeds]


def main():
    """Runs `lm_eval`, with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("`pretrained`"):
            raise
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
