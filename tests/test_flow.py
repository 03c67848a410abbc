"""The projected noise and the flow map against the same in V dimensions, written out here."""

import pytest
import torch
import torch.nn.functional as F
from small_models import build_flm
from tensors import noise_factors, relative_error

from modeling_flm.flow import (
    bridge_coefficients,
    correction_coefficient,
    drift,
    eulerian_coefficient,
    flow_map,
    gamma_coefficients,
    interpolate,
    lagrangian_coefficient,
    remaining_noise,
    reward_coefficient,
    semigroup_weight,
    times_with_known,
)
from modeling_flm.joint_noise import noise_size


@pytest.mark.parametrize(
    "vocab_size, sizes", [(300, [16]), (300, [16, 24]), (20, [16, 24]), (10, [16]), (40, [16, 24, 8])]
)
def test_factors_give_the_covariance_of_dense_noise(vocab_size, sizes):
    embeddings = [torch.randn(vocab_size, size) for size in sizes]
    factors = noise_factors(*embeddings)
    width = noise_size(*embeddings)
    assert width == min(vocab_size, sum(sizes))
    for first, e1 in zip(factors, embeddings):
        assert first.shape == (width, e1.shape[1])
        for second, e2 in zip(factors, embeddings):
            assert relative_error(first.T @ second, e1.T @ e2) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
def test_factors_of_coinciding_embeddings(scale):
    # A student at its initialization and its teacher: the same noise must reach both.
    embedding = scale * torch.randn(300, 16)
    first, second = noise_factors(embedding, embedding.clone())
    assert relative_error(first.T @ second, embedding.T @ embedding) < 1e-6
    noise = torch.randn(1000, first.shape[0])
    assert relative_error(noise @ first, noise @ second) < 1e-5


def test_factors_of_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match="share one vocabulary"):
        noise_factors(torch.randn(10, 4), torch.randn(11, 4))


def test_mean_gradient_is_that_of_dense_noise_and_less_noisy():
    # The loss of a fixed nonlinear network on the noised state, differentiated in the embedding.
    vocab_size, size, draws = 30, 4, 40_000
    embedding = torch.randn(vocab_size, size, requires_grad=True)
    weight = torch.randn(size, vocab_size)
    tokens = torch.randint(vocab_size, (draws,))
    t = torch.full((draws,), 0.4)

    def gradients(noise_state):
        state = interpolate(noise_state, embedding[tokens], t)
        losses = F.cross_entropy(torch.tanh(state) @ weight, tokens, reduction="none")
        parts = losses.view(40, -1).mean(dim=1)
        return torch.stack([torch.autograd.grad(part, embedding, retain_graph=True)[0] for part in parts])

    dense = gradients(torch.randn(draws, vocab_size) @ embedding)
    (factor,) = noise_factors(embedding)
    projected = gradients(torch.randn(draws, size) @ factor)

    standard_error = (dense.var(dim=0) / len(dense) + projected.var(dim=0) / len(projected)).sqrt()
    deviations = (dense.mean(dim=0) - projected.mean(dim=0)) / standard_error
    assert deviations.abs().max() < 5
    assert deviations.pow(2).mean() < 1.5
    # The clean tokens' share of the gradient is common to both; the rest is far smaller.
    assert projected.var(dim=0).sum() < dense.var(dim=0).sum()


def test_gradient_is_the_conditional_expectation_of_the_dense_one():
    # For given noise n = eps R, the dense gradient is (x0 | x0 E = n)ᵀ g with E[x0 | n] = n (EᵀE)⁻¹ Eᵀ.
    embedding = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    (factor,) = noise_factors(embedding)
    eps, upstream = torch.randn(2, 100, 6, dtype=torch.float64)
    noise = eps @ factor
    (gradient,) = torch.autograd.grad((noise * upstream).sum(), embedding)
    gram = (embedding.T @ embedding).detach()
    conditional = noise.detach() @ torch.linalg.solve(gram, embedding.T.detach())
    torch.testing.assert_close(gradient, conditional.T @ upstream, rtol=1e-6, atol=1e-8)


def test_flow_map_is_linear_in_the_state_and_composes():
    s, u, t = torch.tensor([[0.1, 0.3], [0.4, 0.6], [0.8, 1.0]])
    state, clean = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    s, u, t = s.double(), u.double(), t.double()
    # Towards a fixed end the flow map is a straight line: two steps are one.
    two = flow_map(flow_map(state, clean, s, u), clean, u, t)
    torch.testing.assert_close(two, flow_map(state, clean, s, t))
    torch.testing.assert_close(flow_map(state, clean, s, s), state)
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(flow_map(state, clean, s, ones), clean)
    torch.testing.assert_close(flow_map(state, clean, ones, ones), state)
    # On the interpolant it carries I_s to I_t.
    noise = torch.randn_like(clean)
    torch.testing.assert_close(flow_map(interpolate(noise, clean, s), clean, s, t), interpolate(noise, clean, t))


def test_semigroup_weight_makes_two_maps_one():
    s, u, t = (torch.rand(3, 100, dtype=torch.float64)).sort(dim=0).values
    state, first, second = torch.randn(3, 100, 5, 3, dtype=torch.float64)
    weight = semigroup_weight(s, u, t)
    assert ((weight >= 0) & (weight <= 1)).all()
    combined = weight[:, None, None] * first + (1 - weight[:, None, None]) * second
    two_maps = flow_map(flow_map(state, first, s, u), second, u, t)
    torch.testing.assert_close(flow_map(state, combined, s, t), two_maps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("vocab_size", [53, 20])
@pytest.mark.parametrize("num_steps", [1, 3, 16])
def test_embedding_space_sampler_equals_the_dense_sampler(vocab_size, num_steps):
    model = build_flm(vocab_size=vocab_size)
    prior = torch.randn(4, 12, vocab_size)

    # The paper's sampler: one-hot states, dense updates, Euler steps of dx/dt = (D_t(x) - x) / (1 - t).
    x = prior
    tau = torch.linspace(0, 1, num_steps + 1)
    t = model.time_map.tau_to_t(tau)
    embedding = model.embed_tokens.weight.detach()
    drafts = []
    for step in range(num_steps):
        with torch.no_grad():
            denoised = model(inputs_embeds=x @ embedding, timesteps=tau[step].expand(4)).logits.softmax(-1)
        drafts.append(denoised.argmax(-1))
        x = x + (t[step + 1] - t[step]) * (denoised - x) / (1 - t[step])
    output = model.generate(prior_state=prior, num_steps=num_steps, return_dict_in_generate=True, output_drafts=True)
    assert torch.equal(output.sequences, x.argmax(-1))
    assert torch.equal(output.drafts, torch.stack(drafts, dim=1))
    assert output.num_forward_passes.eq(num_steps).all()
    # The same prior given as a state
    assert torch.equal(model.generate(prior_state=prior @ embedding, num_steps=num_steps), x.argmax(-1))


class TestFactors:
    """Every factor in s and t: as written in the papers, and exact where a token is known."""

    s, u, t = torch.rand(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(dim=0).values

    def test_factors_are_those_of_the_papers(self):
        s, u, t = self.s, self.u, self.t
        q = s + t - 2 * s * t
        for value, expected in (
            (remaining_noise(s, t), (1 - t) / (1 - s)),
            (semigroup_weight(s, u, t), (1 - t) * (u - s) / ((1 - u) * (t - s))),
            (lagrangian_coefficient(s, t), (1 - t) * (t - s) / (1 - s)),
            (eulerian_coefficient(s, t), (t - s) / (1 - t)),
            (correction_coefficient(s, t), (t - s) * (1 - s) / 2),
            (reward_coefficient(s, t), (1 - s) * (t - s) / t),
            (bridge_coefficients(s, t)[0], s * (1 - t) ** 2 / (t * (1 - s) ** 2)),
            (bridge_coefficients(s, t)[1], (t - s) * q / (t * (1 - s) ** 2)),
            (bridge_coefficients(s, t)[2] ** 2, (1 - t) ** 2 * (t - s) * q / (t**2 * (1 - s) ** 2)),
        ):
            torch.testing.assert_close(value, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_factors_are_exact_at_the_time_of_a_known_token(self, dtype):
        one = torch.ones(2, 3, dtype=dtype)
        for value, expected in (
            (remaining_noise(one, one), 1),
            (semigroup_weight(one, one, one), 1),
            (lagrangian_coefficient(one, one), 0),
            (eulerian_coefficient(one, one), 0),
            (correction_coefficient(one, one), 0),
            (reward_coefficient(one, one), 0),
            *zip(bridge_coefficients(one, one), (1, 0, 0)),
            *zip(gamma_coefficients(one, 0.7), (1, 0, 0)),
        ):
            assert torch.equal(value, torch.full_like(one, expected)) and value.dtype == dtype

    def test_factors_at_the_ends(self):
        zero, half, one = torch.zeros(1), torch.full((1,), 0.5), torch.ones(1)
        assert semigroup_weight(zero, half, one) == 0 and semigroup_weight(zero, one, one) == 1
        assert [value.item() for value in bridge_coefficients(zero, one)] == [0, 1, 0]
        assert [value.item() for value in bridge_coefficients(zero, half)] == [0, 0.5, 0.5]
        assert [value.item() for value in bridge_coefficients(zero, zero)] == [1, 0, 0]
        assert lagrangian_coefficient(zero, one) == 0

    def test_states_of_known_tokens_do_not_move(self):
        known = torch.rand(3, 5) < 0.5
        known[:, 0] = False
        times = [times_with_known(torch.rand(3), known) for _ in range(2)]
        s, t = torch.minimum(*times), torch.maximum(*times)
        noise, clean, delta = torch.randn(3, 3, 5, 4)
        state = interpolate(noise, clean, s)
        assert torch.equal(state[known], clean[known])
        assert torch.equal(flow_map(state, delta, s, t)[known], clean[known])
        assert not drift(state, delta, s)[known].any() and drift(state, delta, s)[~known].all()
        for row in range(3):  # the others as with one time for the text
            alone = flow_map(state, delta, times_of_row(s, known, row), times_of_row(t, known, row))
            assert torch.equal(flow_map(state, delta, s, t)[row][~known[row]], alone[row][~known[row]])


def times_of_row(times: torch.Tensor, known: torch.BoolTensor, row: int) -> torch.Tensor:
    """The time of the unknown tokens of a text, for all texts."""
    return times[row][~known[row]][:1].expand(len(times))
