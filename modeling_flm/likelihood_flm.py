# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""A bound on the likelihood of texts, in the space that the network sees."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .flow import interpolate, times_with_known
from .joint_noise import JointNoise
from .posterior_flm import Reader
from .time_reparameterization import ReparameterizedTime, TimeMap
from .utils_flm import in_evaluation_mode


# Of the times that a network is trained at it hardly ever sees those beyond this one.
_LAST_TAU = 1 - 1e-4
# A token is decoded from its own state where its signal is this many standard deviations of the noise, whatever the vocabulary.
_DECODED = 8.0
_NUM_KNOTS = 2048
_NUM_LAST = 2  # states at the end of the way; two say how much their likelihood varies


@dataclass
class FLMLikelihoodOutput(ModelOutput):
    """
    Output of [`~FLMLikelihoodMixin.log_likelihood_bound`].

    Args:
        log_likelihood (`torch.DoubleTensor` of shape `(num_texts,)`):
            A lower bound of the logarithm of the probability of each text, in nats; estimated.
        standard_error (`torch.DoubleTensor` of shape `(num_texts,)`):
            The standard error of the estimate, in nats.
        num_tokens (`torch.LongTensor` of shape `(num_texts,)`):
            How many tokens each is the likelihood of: those that are neither padding nor known.
    """

    log_likelihood: torch.DoubleTensor | None = None
    standard_error: torch.DoubleTensor | None = None
    num_tokens: torch.LongTensor | None = None


class SignalLevels:
    r"""
    Where the bound is evaluated: ratios \\(a = \frac{t}{1-t}\\) of signal to noise, drawn where there is something to learn
    about tokens. Half of them are as likely as the largest entry of a noised one-hot vector changes there, and half are uniform in
    \\(\log(1 + a)\\), for tokens that show in the state of the network only later than in one-hot space.

    Args:
        vocab_size (`int`): The size of the vocabulary.
        end (`float`): The last ratio.
        device (`torch.device`): Where to draw.
    """

    def __init__(self, vocab_size: int, end: float, device: torch.device):
        a = torch.expm1(torch.linspace(0, torch.log1p(torch.tensor(end)).item(), _NUM_KNOTS, dtype=torch.float64))
        a = a * end / a[-1]
        tau = ReparameterizedTime(vocab_size).t_to_tau(a / (1 + a))
        share = (tau / tau[-1] + a.log1p() / a[-1].log1p()) / 2
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.a, self.share = (values.to(device, dtype) for values in (a, share))

    def __call__(self, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The ratios of uniform variables, of any shape, and their inverse densities."""
        uniforms = uniforms.to(self.share)
        knot = torch.searchsorted(self.share, uniforms, right=True).clamp(1, len(self.a) - 1)
        slope = (self.a[knot] - self.a[knot - 1]) / (self.share[knot] - self.share[knot - 1])
        return self.a[knot - 1] + slope * (uniforms - self.share[knot - 1]), slope


def last_signal(time_map: TimeMap, whitening: torch.Tensor | None, embedding: torch.Tensor) -> float:
    """
    The ratio of signal to noise where the bound leaves the rest to the network's own decoding: where every token can be read
    from its state, or where the network's training ends, whichever comes first.

    Args:
        time_map ([`ReparameterizedTime`] or [`IdentityTime`]): That of the model.
        whitening (`torch.Tensor` of shape `(embedding_size, embedding_size)`, *optional*): See `whitening_of`.
        embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`): The token embedding.
    """
    t = time_map.tau_to_t(torch.tensor(_LAST_TAU, dtype=torch.float64)).item()
    decoded = _DECODED
    if whitening is not None:
        decoded /= (embedding.to(whitening) @ whitening).norm(dim=1).min().clamp(min=1e-6).item()
    return min(t / (1 - t), decoded)


def whitening_of(noise: JointNoise) -> torch.Tensor | None:
    r"""
    The matrix \\(C^{-\top}\\) that makes the noise of one network's states independent in all directions; `None` where the
    noise has a direction for each token, so that the network sees all of it.
    """
    if noise.cholesky is None:
        return None
    identity = torch.eye(noise.size, dtype=noise.cholesky.dtype, device=noise.cholesky.device)
    whitening = torch.linalg.solve_triangular(noise.cholesky, identity, upper=False).mT
    return whitening.to(noise.embeddings[0].device, torch.float32)


def squared_error(tokens: torch.LongTensor, embedding: torch.Tensor, whitening: torch.Tensor | None) -> Reader:
    r"""
    Reads how far the mean of the denoiser is from the token in what the network sees: \\(\|(x_1 - D)\,E\,C^{-\top}\|^2\\), or
    \\(\|x_1 - D\|^2\\) where it sees everything.

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
    """Reads the negative logarithm of the probability of tokens, of shape `(batch_size, sequence_length)`."""

    def read(probabilities: torch.Tensor, chunk: slice) -> torch.Tensor:
        chosen = probabilities.gather(-1, tokens[:, chunk, None].to(probabilities.device)).squeeze(-1)
        return -chosen.clamp(min=torch.finfo(chosen.dtype).tiny).log()

    return read


class FLMLikelihoodMixin:
    """Gives a model of one network its `log_likelihood_bound()`."""

    # What is kept from one call to the next, with what identifies the embedding that it belongs to
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
        A bound on how likely the model finds texts, as their variational bound in continuous time: with the ratio of signal to
        noise \\(a = \frac{t}{1-t}\\), and in the coordinates in which the noise that the network sees has the variance 1,

        \\(-\log p(x_1) \le \int_0^{a_1} a\; \mathrm{E}\,\|(x_1 - D_t)\,E\,C^{-\top}\|^2\, da \;-\; \mathrm{E} \log D_{t_1}(x_1)\\)

        1. Of each text, `num_times` ratios are drawn, one of each stratum, and the last one, where the network's training ends
           or every token can be read from its own state.
        2. The text is noised that much. Known tokens are clean, and have the time 1.
        3. The denoiser \\(D_t\\) says what the text may be: that of an FLM, or the diagonal \\(\delta_{t,t}\\) of a flow map.
        4. The squared errors are added up to the integral, and at the last ratio, the logarithms of the probabilities.

        With an exact denoiser the bound is the likelihood, but for what the end leaves to tokens that depend on each other. It
        says nothing of a flow map's jumps. Where the vocabulary is larger than the width of the network, a model whose
        schedule ends before it can read rare tokens has a loose bound.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_texts, sequence_length)`): The texts.
            attention_mask (`torch.Tensor` of shape `(num_texts, sequence_length)`, *optional*): 1 for real tokens, 0 for padding.
            prompt_mask (`torch.Tensor` of shape `(num_texts, sequence_length)`, *optional*):
                1 where a token is known: the likelihood is that of the others, given these.
            num_times (`int`, *optional*, defaults to 32):
                How many times each text is noised, at least 2; a forward pass of a text each, and two more.
            batch_size (`int`, *optional*, defaults to 64):
                The most noised texts in a forward pass. It changes speed and memory, not the result.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of times and noise, or one for each text. By default the global one of the model's device.

        Returns:
            [`FLMLikelihoodOutput`]: for each text the bound in nats, its standard error, and the number of tokens.

        Raises:
            `ValueError`: if an argument has a value or a shape that cannot be used.

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
        counted = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            counted &= attention_mask
            # Padding may be of any value, such as -100
            input_ids = input_ids.masked_fill(~attention_mask, 0)
        if known is not None:
            counted &= ~known
        factor, whitening, levels = self._get_likelihood_space(embedding)

        # 1. Ratios of signal to noise. A text has a generator of its own, so that its likelihood is that in any batch.
        sources = generator if isinstance(generator, list) else [generator] * num_texts
        if len(sources) != num_texts:
            raise ValueError(f"`generator` has {len(sources)} generators for {num_texts} texts: pass as many.")
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
        # As many variables whatever the texts beside it are padded to
        longest = max(length, self.config.max_position_embeddings)
        for start in range(0, num_states, batch_size):
            index = torch.arange(start, min(start + batch_size, num_states), device=device)
            text, number = index // a.shape[1], index % a.shape[1]
            drawn = [
                torch.randn(longest, len(factor), generator=generators[row], device=generators[row].device)[:length]
                for row in text.tolist()
            ]
            # 2. Noised texts
            tokens, ratio = input_ids[text], a[text, number]
            known_here, attended = (None if mask is None else mask[text] for mask in (known, attention_mask))
            t = times_with_known(ratio / (1 + ratio), known_here)
            with torch.autocast(device.type, enabled=False):
                state = interpolate(torch.stack(drawn).to(device) @ factor, embedding[tokens], t)
            # 3. What they may be
            tau = self.time_map.t_to_tau(t).float()
            posterior = self.posterior(state, tau, tau, attended)
            # 4. How far that is from what they are
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
        """The factor of the noise, the whitening and the levels, made again only where the embedding has changed."""
        fingerprint = embedding.sum(dim=0)
        known = None if self._likelihood_space is None else self._likelihood_space[0]
        if known is None or known.device != fingerprint.device or not torch.equal(known, fingerprint):
            noise = JointNoise(embedding)
            whitening = whitening_of(noise)
            levels = SignalLevels(len(embedding), last_signal(self.time_map, whitening, embedding), embedding.device)
            self._likelihood_space = (fingerprint, (noise.factor(0), whitening, levels))
        return self._likelihood_space[1]

    def _check_texts(self, input_ids, attention_mask, prompt_mask, num_times, batch_size):
        """Raises a `ValueError` that names the argument."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError("`input_ids` must be an integer tensor of shape (num_texts, sequence_length).")
        if input_ids.numel() == 0:
            raise ValueError(f"`input_ids` has no tokens: its shape is {tuple(input_ids.shape)}.")
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"`input_ids` has texts of {input_ids.shape[1]} tokens, but the model was made for at most "
                f"{self.config.max_position_embeddings}: cut them into parts."
            )
        for name, mask in (("attention_mask", attention_mask), ("prompt_mask", prompt_mask)):
            if mask is not None and mask.shape != input_ids.shape:
                raise ValueError(
                    f"`{name}` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got {tuple(mask.shape)}."
                )
        tokens = input_ids if attention_mask is None else input_ids[attention_mask.bool().to(input_ids.device)]
        if tokens.numel() and not (0 <= tokens.min() and tokens.max() < self.config.vocab_size):
            raise ValueError(
                f"`input_ids` must be tokens in [0, {self.config.vocab_size}), got some in "
                f"[{tokens.min()}, {tokens.max()}]: was another tokenizer used?"
            )
        if not isinstance(num_times, int) or num_times < 2:
            raise ValueError(f"`num_times` must be an integer of at least 2, got {num_times!r}.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")


def spread(values: torch.Tensor) -> torch.Tensor:
    """
    The variance of the mean of stratified values of shape `(num_texts, num_values)`, from second differences of neighbours, in
    which a trend from one stratum to the next does not count.
    """
    differences = values.diff(n=2, dim=1) if values.shape[1] > 2 else values.diff(dim=1)
    per_value = differences.square().mean(dim=1) / (6 if values.shape[1] > 2 else 2)
    return per_value / values.shape[1]


__all__ = ["FLMLikelihoodMixin", "FLMLikelihoodOutput"]
