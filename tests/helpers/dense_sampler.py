"""A reference sampler with one-hot states."""

import torch
from small_models import two_time_denoiser


def dense_delta(model, x, tau_s, tau_t, **masks):
    """The two-time denoiser of a one-hot state."""
    state = x @ model.state_embedding
    return two_time_denoiser(model(inputs_embeds=state, timesteps=tau_s, target_timesteps=tau_t, **masks))


@torch.no_grad()
def dense_sample(model, x, num_steps, choose):
    """The sampler with one-hot states, where `choose` makes the two-time denoiser."""
    tau = torch.linspace(0, 1, num_steps + 1)
    t = model.time_map.tau_to_t(tau)
    for step in range(num_steps):
        delta = choose(x, tau[step].expand(len(x)), tau[step + 1].expand(len(x)))
        if step < num_steps - 1:
            share = (t[step + 1] - t[step]) / (1 - t[step])
            x = (1 - share) * x + share * delta
    return delta.argmax(-1)
