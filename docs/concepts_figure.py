# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Draws docs/concepts.png: the exact flow of the texts "0 0" (70 %) and "1 1" (30 %), the reparameterized time, and a known token.

    python docs/concepts_figure.py
"""

from pathlib import Path

import matplotlib
import torch

from modeling_flm import ReparameterizedTime
from modeling_flm.flow import flow_map


matplotlib.use("Agg")  # draws to files, also where there is no screen
import matplotlib.pyplot as plt  # noqa: E402


TEXTS, SHARES = torch.eye(2)[torch.tensor([[0, 0], [1, 1]])], torch.tensor([0.7, 0.3])
NUM_STEPS = 400


def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Exact denoiser: the posterior mean of the texts given a noised one, with one time per token."""
    evidence = (t / (1 - t).clamp(min=1e-6) ** 2)[:, None] * torch.einsum("blv,klv->bkl", x, TEXTS)
    return torch.einsum("bk,klv->blv", (SHARES.log() + evidence.sum(-1)).softmax(-1), TEXTS)


def trajectories(x: torch.Tensor, known: torch.BoolTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Times, and the largest-entry difference of every token along the flow, of shape (steps, texts, 2)."""
    grid, path = torch.linspace(0, 0.999, NUM_STEPS + 1), []
    for s, t in zip(grid, grid[1:]):
        path.append(x[..., 1] - x[..., 0])
        s, t = (torch.where(known, 1.0, time) for time in (s, t))
        x = flow_map(x, denoise(x, s), s, t)
    return grid[:-1], torch.stack(path)


def main():
    generator = torch.Generator().manual_seed(1)
    figure, (flow, known, times) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    noise = torch.randn(24, 2, 2, generator=generator)

    nothing = torch.zeros(24, 2, dtype=torch.bool)
    t, path = trajectories(noise, nothing)
    for n in range(24):
        is_second = path[-1, n, 0] > 0
        flow.plot(t, path[:, n, 0], color="tab:orange" if is_second else "tab:blue", lw=1)
    flow.set(
        title="From noise to text: the first of two tokens", xlabel="t", ylabel="state: 'token 1' minus 'token 0'"
    )
    flow.text(0.98, 1.15, "text '1 1'", ha="right", color="tab:orange")
    flow.text(0.98, -2.2, "text '0 0'", ha="right", color="tab:blue")

    first = torch.tensor([[True, False]]).expand(24, -1)
    state = torch.where(first[..., None], torch.eye(2)[1], noise)
    t, path = trajectories(state, first)
    for n in range(8):
        known.plot(t, path[:, n, 1], color="tab:orange", lw=1, label="second token, from noise" if n == 0 else None)
    known.plot(t, path[:, 0, 0], color="black", lw=3, label="first token, known to be '1'")
    known.set(title="Known is a time: s = t = 1, and it stays", xlabel="t of the second token")
    known.legend(loc="lower right", fontsize=8)

    t = torch.linspace(0, 1, 400)
    for vocab_size in (2, 1000, 50258):
        times.plot(t, ReparameterizedTime(vocab_size).t_to_tau(t), label=f"V = {vocab_size}")
    times.set(title="When a token can be told", xlabel="t", ylabel="tau")
    times.legend(fontsize=8)
    for panel in (flow, known, times):
        panel.grid(alpha=0.3)
    figure.savefig(Path(__file__).with_name("concepts.png"), dpi=90)


if __name__ == "__main__":
    main()
