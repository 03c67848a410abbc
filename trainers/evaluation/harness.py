# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Flow-based language models in the lm-evaluation-harness:

    python -m modeling_flm.trainers.evaluation.harness --model flm --model_args pretrained=me/fmlm,num_times=64 --tasks arc_easy

takes what `lm_eval` takes. Needs `pip install modeling-flm[lm-eval]`.
"""

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

import modeling_flm  # noqa: F401  so that models of this library load without their own code

from ..batches import example_seed
from .likelihood import LIKELIHOOD_STREAM


@register_model("flm")
class FLMHarnessModel(TemplateLM):
    """
    A model for the lm-evaluation-harness. Likelihoods are variational bounds, with noise of their own for each context, so that
    batches do not change them, and the answers to one question differ by what they say and not by their noise.

    Args:
        pretrained (`str`): Name or folder of an FLM or a flow map with its tokenizer.
        num_times (`int`, *optional*, defaults to 32): How many times each text is noised, see [`~FLMLikelihoodMixin.log_likelihood_bound`].
        num_steps (`int`, *optional*): The number of steps from noise to text where texts are generated.
        batch_size (`int`, *optional*, defaults to 64):
            The most texts in a forward pass; at least 8 requests are taken at a time, and 64 of their noised versions, as the
            harness asks for 1 where nobody has said anything.
        max_batch_size (`int`, *optional*): Is not used.
        device (`str`, *optional*): Where to run. By default on an accelerator if there is one.
        seed (`int`, *optional*, defaults to 0): The seed of all noise.
        revision (`str`, *optional*): The branch, tag or commit.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run code that comes with the model.
        append_eos (`bool`, *optional*, defaults to `False`):
            Whether a text is over where a continuation is: an end-of-sequence token comes after it, and padding up to the model's
            length. For models that were trained on texts one by one, to whose eyes a text without an end is no text.
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
        append_eos: bool = False,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        found = torch.accelerator.current_accelerator(check_available=True)
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = found or "cpu"  # the harness asks for CUDA where nobody has said anything
        self._device = torch.device(device)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.model = self.model_class.from_pretrained(pretrained, **options).to(self._device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained, **options)
        self.num_times, self.num_steps, self.seed = num_times, num_steps, seed
        self.batch_size = max(64, int(batch_size))
        self.append_eos = append_eos
        if append_eos and self.tokenizer.eos_token_id is None:
            raise ValueError("`append_eos` needs a tokenizer with an end-of-sequence token.")

    @property
    def max_length(self) -> int:
        """The length of the texts that the model was trained on."""
        return self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"]

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = []
        for context, continuation in (request.args for request in requests):
            # Nothing needs to come before a text.
            known, rest = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            if self.append_eos:
                end = [self.tokenizer.eos_token_id]
                pad = end if self.tokenizer.pad_token_id is None else [self.tokenizer.pad_token_id]
                rest = rest + end + pad * (self.max_length - len(known) - len(rest) - 1)
            pairs.append(((context, continuation), known, rest))
        return self._loglikelihood_tokens(pairs, disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        results, first_with = {}, {}
        noise_of = [
            first_with.setdefault(tuple(known) or index, index) for index, (_, known, _) in enumerate(requests)
        ]
        order = sorted(range(len(requests)), key=lambda index: len(requests[index][1]) + len(requests[index][2]))
        rows_at_a_time = max(1, self.batch_size // 8)
        for start in tqdm(range(0, len(order), rows_at_a_time), desc="Likelihood", disable=disable_tqdm):
            indices = order[start : start + rows_at_a_time]
            texts = [requests[index][1] + requests[index][2] for index in indices]
            if longest := [len(text) for text in texts if len(text) > self.max_length]:
                raise ValueError(f"A request has {max(longest)} tokens, but the model's texts have {self.max_length}.")
            masks = torch.zeros(3, len(texts), max(map(len, texts)), dtype=torch.long)
            input_ids, attention_mask, known = masks
            for row, (index, text) in enumerate(zip(indices, texts)):
                input_ids[row, : len(text)] = torch.tensor(text)
                attention_mask[row, : len(text)] = 1
                known[row, : len(requests[index][1])] = 1
            options = {"attention_mask": None if attention_mask.all() else attention_mask, "prompt_mask": known}
            numbers = [noise_of[index] for index in indices]
            values = self._bound(input_ids, **options, generator=self._generators(numbers))
            written = self._write(input_ids, **options, generator=self._generators(numbers)).cpu()
            matches = (written == input_ids) | (attention_mask == 0)
            for row, index in enumerate(indices):
                results[index] = (values[row].item(), bool(matches[row].all()))
                self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        # Windows of the model's length, each by itself
        windows, owners = [], []
        for owner, (string,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(string)
            for start in range(0, len(tokens), self.max_length):
                windows.append(((string, ""), [], tokens[start : start + self.max_length]))
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
            tokens = self.tok_encode(context)[-(self.max_length - 1) :]
            length = min(self.max_length, len(tokens) + settings.get("max_gen_toks", self.max_length))
            input_ids = torch.tensor([tokens], dtype=torch.long) if tokens else None
            written = self._write(input_ids, length=length, generator=self._generators([index]))
            text = self.tokenizer.decode(written[0, len(tokens) :], skip_special_tokens=True)
            for end in filter(None, until):
                text = text.split(end)[0]
            results.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return results

    def _bound(self, input_ids: torch.LongTensor, **options) -> torch.Tensor:
        """Of the log-likelihoods of what is not known."""
        output = self.model.log_likelihood_bound(
            input_ids, num_times=self.num_times, batch_size=self.batch_size, **options
        )
        return output.log_likelihood

    def _write(self, input_ids: torch.LongTensor | None, **options) -> torch.LongTensor:
        """The model's own completions of what is known."""
        return self.model.generate(input_ids, num_steps=self.num_steps, batch_size=self.batch_size, **options)

    def _generators(self, indices: list[int]) -> list[torch.Generator]:
        seeds = [example_seed(self.seed, LIKELIHOOD_STREAM, index) for index in indices]
        return [torch.Generator().manual_seed(seed) for seed in seeds]


def main():
    """`lm_eval` with this model among those that it knows."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
