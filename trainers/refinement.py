# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Refinement in the loop: known tokens of training examples at the positions that refinement rounds of the model itself would commit."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from modeling_flm.flow import times_with_known
from modeling_flm.joint_noise import JointNoise
from modeling_flm.sampling_flm import PosteriorRefinement

from .batches import FlowBatch, draw_noise, draw_prompt_uniforms, example_seed
from .objectives import Autocast, posterior_of


# Part of a seed: the noise of a round
_ROUNDS = 3


def draw_num_rounds(seeds: Sequence[int], fraction: float, prompt_kinds: Sequence[str], num_rounds: int) -> list[int]:
    """
    Draws the number of rounds of each example: less than `num_rounds`, equally likely, for the prompts of the kind `"confident"`, and
    0 for all others. Arguments as for [`draw_known_masks`].
    """
    if "confident" not in prompt_kinds:
        return [0] * len(seeds)
    prompt_draw, kind_draw, size, _ = np.stack([draw_prompt_uniforms(seed, 4) for seed in seeds], axis=1)
    is_drawn = (prompt_draw < fraction) & (
        (kind_draw * len(prompt_kinds)).astype(int) == prompt_kinds.index("confident")
    )
    return np.where(is_drawn, (size * num_rounds).astype(int), 0).tolist()


@torch.no_grad()
def commit_confident(
    network: PreTrainedModel,
    batch: FlowBatch,
    rounds: Sequence[int],
    num_rounds: int,
    joint_noise: JointNoise,
    max_length: int,
    autocast: Autocast,
) -> FlowBatch:
    """
    Returns the batch with the tokens that are known after some refinement rounds: in each, the network predicts all unknown tokens
    from pure noise, and the most likely ones, in equal parts, become known. They have the tokens of the data.

    Args:
        network ([`~transformers.PreTrainedModel`]): The model, in evaluation mode.
        batch ([`FlowBatch`]): The batch.
        rounds (`Sequence[int]`): Number of rounds of each example.
        num_rounds (`int`): Number of rounds after which all tokens would be known.
        joint_noise ([`~modeling_flm.joint_noise.JointNoise`]): The noise of all networks.
        max_length (`int`): Length of the longest sequence of the training, so that padding does not change the result.
        autocast (`Callable[[], AbstractContextManager]`): Precision that networks run in.
    """
    rule, committed, device = PosteriorRefinement(num_rounds), torch.zeros_like(batch.mask), batch.input_ids.device
    length = batch.input_ids.shape[1]
    for round in range(max(rounds, default=0)):
        chosen = [row for row, count in enumerate(rounds) if count > round]
        rows = torch.tensor(chosen).to(device, non_blocking=True)
        part, is_open = batch.select(rows), (batch.mask & ~committed)[rows]
        seeds = [example_seed(batch.noise_seeds[row], _ROUNDS, round) for row in chosen]
        noise = draw_noise(seeds, max_length, joint_noise.size, device=device)[:, :length]
        start = (committed[rows] | part.known).float()  # noise, and known tokens
        state = network.make_state(part.input_ids, start, noise, joint_noise)
        confidence = posterior_of(network, state, start, torch.ones_like(start), part, autocast).confidence()
        committed[rows] = committed[rows] | rule.commit(round, confidence, is_open)
    times = {name: batch[name] for name in ("tau_s", "tau_t", "tau_u")}
    times = {name: None if tau is None else times_with_known(tau, committed) for name, tau in times.items()}
    return replace(batch, labels=batch.labels.masked_fill(committed, -100), **times)
