"""The interpolant and the flow map: composition, precision, and every factor of the papers."""

import pytest
import torch

from modeling_flm.flow import (
    bridge_coefficients,
    correction_coefficient,
    denoising_direction,
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


def test_flow_of_a_low_precision_state_keeps_its_times():
    noise, clean = torch.randn(2, 64, 5, 3).to(torch.bfloat16)
    s = torch.linspace(0, 0.999, 64)
    t = 1 - (1 - s) * 0.9
    for function, times in ((interpolate, (t,)), (flow_map, (s, t))):
        value = function(noise, clean, *times)
        expected = function(noise.double(), clean.double(), *(time.double() for time in times))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
        # The dtype follows the state, not the times.
        assert function(noise.float(), clean.float(), *(time.double() for time in times)).dtype == torch.float32
        assert function(noise.double(), clean.double(), *times).dtype == torch.float64


class TestFactors:
    """Every factor in s and t: equal to the formulas of the papers, and exact for known tokens."""

    s, u, t = torch.rand(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(dim=0).values

    def test_factors_equal_the_formulas_of_the_papers(self):
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
        direction = denoising_direction(state, delta, s)
        assert not direction[known].any() and direction[~known].all()
        for row in range(3):  # the others as with one time for the text
            alone = flow_map(state, delta, times_of_row(s, known, row), times_of_row(t, known, row))
            assert torch.equal(flow_map(state, delta, s, t)[row][~known[row]], alone[row][~known[row]])


def times_of_row(times: torch.Tensor, known: torch.BoolTensor, row: int) -> torch.Tensor:
    """Time of the unknown tokens, one per sequence."""
    return times[row][~known[row]][:1].expand(len(times))
