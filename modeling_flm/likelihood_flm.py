# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""A lower bound on the log-likelihood, computed in the space of the network's states."""

from dataclasses import dataclass
from numbers import Integral

import torch
from transformers.utils import ModelOutput

from .flow import interpolate, times_with_known
from .joint_noise import JointNoise
from .known_tokens_flm import is_begin
from .posterior_flm import Reader
from .time_reparameterization import ReparameterizedTime, TimeMap
from .utils_flm import in_evaluation_mode


# Training rarely draws times later than this.
_LAST_TAU = 1 - 1e-4
# A signal of this many standard deviations of the noise identifies a token: the argmax of 50,000 noisy entries is then wrong
# with a probability below 1e-3.
_DECODING_SIGNAL = 8.0
_NUM_KNOTS = 2048
_NUM_LAST = 2  # states at the last level; two, to estimate their variance


@dataclass
class FLMLikelihoodOutput(ModelOutput):
    """
    Output of [`~FLMLikelihoodMixin.log_likelihood_bound`].

    Args:
        log_likelihood (`torch.DoubleTensor` of shape `(num_texts,)`):
            Estimate of a lower bound on the log-probability of each sequence, in nats.
        standard_error (`torch.DoubleTensor` of shape `(num_texts,)`):
            Standard error of the estimate, in nats.
        num_tokens (`torch.LongTensor` of shape `(num_texts,)`):
            Number of tokens that the bound covers: tokens that are neither padding nor known.
    """

    log_likelihood: torch.DoubleTensor | None = None
    standard_error: torch.DoubleTensor | None = None
    num_tokens: torch.LongTensor | None = None


class SignalLevels:
    r"""
    Distribution of the signal-to-noise ratios \\(a = \frac{t}{1-t}\\) at which the bound is evaluated. Half of it is uniform in
    the reparameterized time, where one-hot tokens become recognizable, and half is uniform in \\(\log(1 + a)\\), for tokens that
    become recognizable later in the network's states.

    Args:
        vocab_size (`int`): The size of the vocabulary.
        end (`float`): The largest ratio.
        device (`torch.device`): The device of the ratios.
    """

    def __init__(self, vocab_size: int, end: float, device: torch.device):
        a = torch.expm1(torch.linspace(0, torch.log1p(torch.tensor(end)).item(), _NUM_KNOTS, dtype=torch.float64))
        a = a * end / a[-1]
        tau = ReparameterizedTime(vocab_size).t_to_tau(a / (1 + a))
        share = (tau / tau[-1] + a.log1p() / a[-1].log1p()) / 2
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.a, self.share = (values.to(device, dtype) for values in (a, share))

    def __call__(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps uniform variables of any shape to ratios, and returns these and their inverse densities."""
        uniforms = uniforms.to(self.share)
        knot = torch.searchsorted(self.share, uniforms, right=True).clamp(1, len(self.a) - 1)
        slope = (self.a[knot] - self.a[knot - 1]) / (self.share[knot] - self.share[knot - 1])
        return self.a[knot - 1] + slope * (uniforms - self.share[knot - 1]), slope


def last_signal(time_map: TimeMap, whitening: torch.Tensor | None, embedding: torch.Tensor) -> float:
    """
    Signal-to-noise ratio at which the integral ends and the network decodes the tokens: where every token can be identified
    from its state, or where training ends, whichever comes first.

    Args:
        time_map ([`ReparameterizedTime`] or [`IdentityTime`]): The time map of the model.
        whitening (`torch.Tensor` of shape `(embedding_size, embedding_size)`, *optional*): See `whitening_of`.
        embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`): The token embedding.
    """
    t = time_map.tau_to_t(torch.tensor(_LAST_TAU, dtype=torch.float64)).item()
    decoded = _DECODING_SIGNAL
    if whitening is not None:
        decoded /= (embedding.to(whitening) @ whitening).norm(dim=1).min().clamp(min=1e-6).item()
    return min(t / (1 - t), decoded)


def whitening_of(noise: JointNoise) -> torch.Tensor | None:
    r"""
    The matrix \\(C^{-\top}\\) that whitens the noise of a network's states. `None` if the vocabulary is not larger than the
    states, which then contain everything.
    """
    if noise.cholesky is None:
        return None
    identity = torch.eye(noise.size, dtype=noise.cholesky.dtype, device=noise.cholesky.device)
    whitening = torch.linalg.solve_triangular(noise.cholesky, identity, upper=False).mT
    return whitening.to(noise.embeddings[0].device, torch.float32)


def squared_error(tokens: torch.LongTensor, embedding: torch.Tensor, whitening: torch.Tensor | None) -> Reader:
    r"""
    Reads the squared error of the denoiser's mean in the whitened states, \\(\|(x_1 - D)\,E\,C^{-\top}\|^2\\), or without
    whitening in one-hot space, \\(\|x_1 - D\|^2\\).

    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The clean tokens.
        embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`): The token embedding.
        whitening (`torch.Tensor` of shape `(embedding_size, embedding_size)`, *optional*): See `whitening_of`.
    """

    def read(probabilities: torch.Tensor, chunk: slice) -> torch.Tensor:
        tokens_here = tokens[:, chunk].to(probabilities.device)
        with torch.autocast(probabilities.device.type, enabled=False):
            if whitening is None:
                difference = probabilities.clone()
                difference.scatter_add_(-1, tokens_here[..., None], -torch.ones_like(difference[..., :1]))
            else:
                weight = embedding.to(probabilities)
                difference = (weight[tokens_here] - probabilities @ weight) @ whitening.to(probabilities)
            return difference.square().sum(dim=-1)

    return read


def negative_log_probability(tokens: torch.LongTensor) -> Reader:
    """Reads the negative log-probability of `tokens`, of shape `(batch_size, sequence_length)`."""

    def read(probabilities: torch.Tensor, chunk: slice) -> torch.Tensor:
        chosen = probabilities.gather(-1, tokens[:, chunk, None].to(probabilities.device)).squeeze(-1)
        return -chosen.clamp(min=torch.finfo(chosen.dtype).tiny).log()

    return read


class FLMLikelihoodMixin:
    """Gives a model of one network its `log_likelihood_bound()`."""

    # Cached between calls, with a fingerprint of the embedding
    _likelihood_space: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor | None, SignalLevels]] | None = None

    @torch.no_grad()
    @in_evaluation_mode
    def log_likelihood_bound(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        num_times: int = 32,
        batch_size: int = 64,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> FLMLikelihoodOutput:
        r"""
        Estimates a lower bound on the log-likelihood of sequences: the variational bound of a diffusion model in continuous
        time. With the signal-to-noise ratio \\(a = \frac{t}{1-t}\\), and states whitened to noise of variance 1,

        \\(-\log p(x_1) \le \int_0^{a_1} a\; \mathrm{E}\,\|(x_1 - D_t)\,E\,C^{-\top}\|^2\, da \;-\; \mathrm{E} \log D_{t_1}(x_1)\\)

        1. For each sequence, draw `num_times` ratios, one per stratum, and add the last ratio, where training ends or every
           token can be identified from its own state.
        2. Noise the sequence to these levels. Known tokens stay clean and have the time 1.
        3. Predict the tokens: by the denoiser \\(D_t\\) of an FLM, or the diagonal \\(\delta_{t,t}\\) of a flow map.
        4. Sum the squared errors to the integral, and at the last ratio, the log-probabilities.

        With an exact denoiser the bound is tight, except for the dependence between tokens that remains at the last level. It
        does not cover a flow map's jumps. If the vocabulary is larger than the network is wide, and the model's schedule ends
        before rare tokens can be identified, the bound is loose.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_texts, sequence_length)`): The sequences.
            attention_mask (`torch.Tensor` of shape `(num_texts, sequence_length)`, *optional*): 1 for tokens, 0 for padding.
            prompt_mask (`torch.Tensor` of shape `(num_texts, sequence_length)`, *optional*):
                1 for known tokens: the bound is on the conditional likelihood of the others. A BOS token at the start is always
                known if the model's texts begin with one (`generation_config.bos_token_id`), as in prompts of [`FLMPipeline`].
            num_times (`int`, *optional*, defaults to 32):
                Number of noise levels per sequence, at least 2. Each takes a forward pass, and so do two more at the end.
            batch_size (`int`, *optional*, defaults to 64):
                Maximum number of noised sequences per forward pass. Changes speed and memory, not the result.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of times and noise, or one for each sequence. By default the global generator of the model's device.

        Returns:
            [`FLMLikelihoodOutput`]: For each sequence the bound in nats, its standard error, and the number of tokens.

        Raises:
            `ValueError`: if an argument has an invalid value or shape.

        Example:

        ```python
        >>> batch = tokenizer(["The cat sat.", "The dog ran."], padding=True, return_tensors="pt")
        >>> output = model.log_likelihood_bound(batch.input_ids, attention_mask=batch.attention_mask)
        >>> perplexity = (-output.log_likelihood.sum() / output.num_tokens.sum()).exp()
        ```
        """
        self._check_texts(input_ids, attention_mask, prompt_mask, num_times, batch_size)
        embedding = self.state_embedding.float()
        device, (num_texts, length) = embedding.device, input_ids.shape
        input_ids = input_ids.to(device)
        attention_mask, known = (None if m is None else m.to(device).bool() for m in (attention_mask, prompt_mask))
        begin = is_begin(input_ids, attention_mask, self.generation_config)
        if begin.any():
            known = begin if known is None else known | begin
        counted = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            counted &= attention_mask
            # Padding may have any value, such as -100
            input_ids = input_ids.masked_fill(~attention_mask, 0)
        if known is not None:
            counted &= ~known
        factor, whitening, levels = self._get_likelihood_space(embedding)

        # 1. Signal-to-noise ratios. Each sequence has a generator of its own, so that its bound does not depend on the batch
        sources = generator if isinstance(generator, list) else [generator] * num_texts
        if len(sources) != num_texts:
            raise ValueError(
                f"`generator` has {len(sources)} generators for {num_texts} sequences: pass one for each."
            )
        generators = []
        for source in sources:
            place = device if source is None else source.device
            seed = int(torch.randint(2**62, (), generator=source, device=place))
            generators.append(torch.Generator(place).manual_seed(seed))
        uniforms = [torch.rand(num_times, generator=each, device=each.device) for each in generators]
        strata = torch.arange(num_times, device=device)
        a, inverse_density = levels((torch.stack(uniforms).to(device) + strata) / num_times)
        a = torch.cat([a, levels.a[-1:].expand(num_texts, _NUM_LAST)], dim=1)

        results = []
        num_states = a.numel()
        # Always the same number of variables, whatever the padding of the batch
        longest = max(length, self.config.max_position_embeddings)
        for start in range(0, num_states, batch_size):
            index = torch.arange(start, min(start + batch_size, num_states), device=device)
            text, number = index // a.shape[1], index % a.shape[1]
            drawn = [
                torch.randn(longest, len(factor), generator=generators[row], device=generators[row].device)[:length]
                for row in text.tolist()
            ]
            # 2. Noised sequences
            tokens, ratio = input_ids[text], a[text, number]
            known_here, attended = (None if mask is None else mask[text] for mask in (known, attention_mask))
            t = times_with_known(ratio / (1 + ratio), known_here)
            with torch.autocast(device.type, enabled=False):
                state = interpolate(torch.stack(drawn).to(device) @ factor, embedding[tokens], t)
            # 3. Predictions
            tau = self.time_map.t_to_tau(t).float()
            posterior = self.posterior(state, tau, tau, attended)
            # 4. Errors
            error, surprise = posterior.read(
                squared_error(tokens, embedding, whitening), negative_log_probability(tokens)
            )
            result = torch.where((number < num_times)[:, None], error, surprise)
            results.append((result * counted[text]).to(a.dtype).sum(dim=1))
        results = torch.cat(results).view(num_texts, -1)
        integrand = results[:, :num_times] * a[:, :num_times] * inverse_density
        last = results[:, num_times:]
        variance = spread(integrand) + spread(last)
        return FLMLikelihoodOutput(
            log_likelihood=-(integrand.mean(dim=1) + last.mean(dim=1)),
            standard_error=variance.sqrt(),
            num_tokens=counted.sum(dim=1),
        )

    def _get_likelihood_space(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, SignalLevels]:
        """Returns the factor of the noise, the whitening and the levels, cached while the embedding does not change."""
        fingerprint = embedding.sum(dim=0)
        known = None if self._likelihood_space is None else self._likelihood_space[0]
        if known is None or known.device != fingerprint.device or not torch.equal(known, fingerprint):
            noise = JointNoise(embedding)
            whitening = whitening_of(noise)
            levels = SignalLevels(len(embedding), last_signal(self.time_map, whitening, embedding), embedding.device)
            self._likelihood_space = (fingerprint, (noise.factor(0), whitening, levels))
        return self._likelihood_space[1]

    def _check_texts(self, input_ids, attention_mask, prompt_mask, num_times, batch_size):
        """Raises a `ValueError` that names an invalid argument."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError("`input_ids` must be an integer tensor of shape (num_texts, sequence_length).")
        if input_ids.numel() == 0:
            raise ValueError(f"`input_ids` has no tokens: its shape is {tuple(input_ids.shape)}.")
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"`input_ids` has sequences of {input_ids.shape[1]} tokens, but the model has at most "
                f"{self.config.max_position_embeddings} positions: split the texts."
            )
        for name, mask in (("attention_mask", attention_mask), ("prompt_mask", prompt_mask)):
            if mask is not None and mask.shape != input_ids.shape:
                raise ValueError(
                    f"`{name}` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got {tuple(mask.shape)}."
                )
        tokens = input_ids if attention_mask is None else input_ids[attention_mask.bool().to(input_ids.device)]
        if tokens.numel() and not (0 <= tokens.min() and tokens.max() < self.config.vocab_size):
            raise ValueError(
                f"`input_ids` must be tokens in [0, {self.config.vocab_size}), got values in "
                f"[{tokens.min()}, {tokens.max()}]. Does the tokenizer belong to a different model?"
            )
        if not isinstance(num_times, Integral) or num_times < 2:
            raise ValueError(f"`num_times` must be an integer of at least 2, got {num_times!r}.")
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")


def spread(values: torch.Tensor) -> torch.Tensor:
    """
    Variance of the mean of stratified values of shape `(num_texts, num_values)`, from second differences of neighbors, so that
    a trend across the strata does not count.
    """
    differences = values.diff(n=2, dim=1) if values.shape[1] > 2 else values.diff(dim=1)
    per_value = differences.square().mean(dim=1) / (6 if values.shape[1] > 2 else 2)
    return per_value / values.shape[1]


__all__ = ["FLMLikelihoodMixin", "FLMLikelihoodOutput"]
