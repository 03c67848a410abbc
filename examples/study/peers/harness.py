# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
The lm-evaluation-harness with the models `peer_gpt2` and `peer_mdlm`, in addition to `flm` for flow-based models.

    python examples/study/peers/harness.py --model peer_mdlm --model_args pretrained=outputs/study_grammar/models/mdlm-0/after-1 \
        --tasks grammar --include_path outputs/grammar_task

Answers are scored by the exact likelihood of GPT-2, and by the bound of the masked diffusion model. Tasks that generate are not supported.
"""

import sys
from pathlib import Path
from typing import ClassVar

import torch
from lm_eval.api.registry import register_model
from transformers import GPT2LMHeadModel

from modeling_flm import FLMModel
from modeling_flm.sampling_flm import PosteriorRefinement
from modeling_flm.trainers.evaluation.harness import FLMHarnessModel, main


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers.autoregressive import autoregressive_log_likelihood, autoregressive_logits  # noqa: E402
from peers.masked_diffusion import masked_log_likelihood, unmask  # noqa: E402


class PeerHarnessModel(FLMHarnessModel):
    """
    Base class of the peers, which score answers. Texts of equal length form a batch.

    Args:
        kwargs: Arguments of [`~modeling_flm.trainers.evaluation.harness.FLMHarnessModel`].
    """

    begin: ClassVar[list[int]] = []  # texts of the study begin with no special token

    def _bound(self, input_ids, attention_mask, prompt_mask, generator):
        if attention_mask is None:
            return self._likelihoods(input_ids.to(self._device), prompt_mask.to(self._device), generator[0])
        rows = zip(input_ids, attention_mask.sum(dim=1), prompt_mask, generator)
        rows = [(ids[None, :length], None, known[None, :length], [each]) for ids, length, known, each in rows]
        return torch.cat([self._bound(*row) for row in rows])

    def _likelihoods(
        self, input_ids: torch.LongTensor, prompt_mask: torch.LongTensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Returns log-likelihoods of the unknown tokens, or lower bounds, for sequences of one length."""
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm: bool = False):
        raise NotImplementedError("Only likelihoods are supported: choose tasks that do not use `generate_until`.")


@register_model("peer_gpt2")
class GPT2HarnessModel(PeerHarnessModel):
    """A GPT-2 of `autoregressive.py`, with exact likelihoods."""

    model_class = GPT2LMHeadModel

    def _likelihoods(self, input_ids, prompt_mask, generator):
        return autoregressive_log_likelihood(self.model, input_ids, prompt_mask)

    @torch.no_grad()
    def _generate(self, input_ids, attention_mask, prompt_mask, generator):
        tokens = input_ids.to(self._device)
        known = prompt_mask.to(self._device).bool()
        for index in range(tokens.shape[1]):
            most_likely = autoregressive_logits(self.model, tokens[:, : index + 1])[:, -1].argmax(dim=-1)
            tokens[:, index] = torch.where(known[:, index], tokens[:, index], most_likely)
        return tokens


@register_model("peer_mdlm")
class MaskedHarnessModel(PeerHarnessModel):
    """A masked diffusion model of `masked_diffusion.py`, with its bound of the likelihood."""

    model_class = FLMModel

    def _likelihoods(self, input_ids, prompt_mask, generator):
        return masked_log_likelihood(self.model, input_ids, self.num_times, generator, prompt_mask)

    @torch.no_grad()
    def _generate(self, input_ids, attention_mask, prompt_mask, generator):
        rule = PosteriorRefinement(self.num_steps or input_ids.shape[1], None, "uniform", True)
        return unmask(self.model, input_ids.to(self._device), prompt_mask.to(self._device).bool(), rule)[0]


if __name__ == "__main__":
    main()
