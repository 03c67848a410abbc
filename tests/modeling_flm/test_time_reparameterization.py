"""The time map against the published code's table, and against quadrature of its definition."""

import math

import numpy as np
import oracle
import pytest
import torch

from modeling_flm import IdentityTime, ReparameterizedTime
from modeling_flm.time_reparameterization import translate_tau


def hit_probability(t: float, vocab_size: int) -> float:
    """P(t) by Gauss-Legendre quadrature on chunks, independent of the table's trapezoid rule."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(-10, 10, 201)
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    z = (middle[:, None] + half[:, None] * nodes).ravel()
    w = (half[:, None] * weights).ravel()
    log_cdf = torch.special.log_ndtr(torch.from_numpy(z + t / (1 - t))).numpy()
    return float(np.sum(w * np.exp(-0.5 * z**2 + (vocab_size - 1) * log_cdf)) / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("vocab_size", oracle.read_json("time_reparameterization.json"))
def test_matches_published_table(vocab_size):
    table = oracle.read_json("time_reparameterization.json")[vocab_size]
    time = ReparameterizedTime(int(vocab_size))
    tau = torch.tensor(table["tau"], dtype=torch.float64)
    exact = torch.tensor(table["t_exact"], dtype=torch.float64)
    published = torch.tensor(table["t_official"], dtype=torch.float64)
    torch.testing.assert_close(time.tau_to_t(tau), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(time.tau_to_t(tau), published, rtol=0, atol=5e-4)
    torch.testing.assert_close(time.t_to_tau(exact), tau, rtol=0, atol=1e-6)
    # float32 times, as models use them
    torch.testing.assert_close(time.tau_to_t(tau.float()), exact.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [2, 3, 1000, 50258, 262144])
def test_exact_in_both_directions_up_to_the_ends(vocab_size):
    time = ReparameterizedTime(vocab_size)
    t = torch.tensor([1e-4, 0.03, 0.2, 0.35, 0.5, 0.62, 0.7, 0.77, 0.81, 0.84], dtype=torch.float64)
    hit = torch.tensor([hit_probability(x, vocab_size) for x in t.tolist()], dtype=torch.float64)
    tau = (hit - 1 / vocab_size) * vocab_size / (vocab_size - 1)
    torch.testing.assert_close(time.t_to_tau(t), tau, rtol=0, atol=1e-9)
    torch.testing.assert_close(time.tau_to_t(tau), t, rtol=0, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [2, 30522, 262144])
def test_monotone_and_pinned(vocab_size):
    time = ReparameterizedTime(vocab_size)
    for dtype in (torch.float32, torch.float64):
        tau = torch.linspace(0, 1, 100_001, dtype=dtype)
        t = time.tau_to_t(tau)
        assert t.dtype == dtype
        assert (t.diff() > 0).all()
        assert t[0] == 0 and t[-1] == 1
        assert t[-2] < 0.95  # 1 - t stays well away from 0 everywhere else
        back = time.t_to_tau(torch.linspace(0, 1, 1001, dtype=dtype))
        assert (back.diff() >= 0).all() and back[0] == 0 and back[-1] == 1


@pytest.mark.parametrize("vocab_size", [2, 1000, 262144])
def test_derivative_matches_finite_differences(vocab_size):
    time = ReparameterizedTime(vocab_size)
    t = torch.linspace(0.01, 0.9, 400, dtype=torch.float64)
    step = 1e-5
    numeric = (time.t_to_tau(t + step) - time.t_to_tau(t - step)) / (2 * step)
    torch.testing.assert_close(time.dtau_dt(t), numeric, rtol=1e-4, atol=1e-6)
    near_one = time.dtau_dt(torch.tensor([0.95, 0.99, 1 - 1e-6, 1 - 6e-8, 1.0]))
    assert (near_one < 1e-10).all() and near_one[-1] == 0


def test_works_under_the_meta_device_of_from_pretrained():
    with torch.device("meta"):
        time = ReparameterizedTime(77)
        t = time.tau_to_t(torch.tensor([0.5], device="cpu"))
    assert t.device.type == "cpu" and 0 < t < 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="vocab_size"):
        ReparameterizedTime(1)
    with pytest.raises(TypeError, match="`tau` must be a floating point tensor"):
        ReparameterizedTime(5).tau_to_t(torch.tensor([0, 1]))


def test_translation():
    tau = torch.linspace(0, 1, 11)
    time = ReparameterizedTime(53)
    assert translate_tau(tau, time, ReparameterizedTime(53)) is tau
    torch.testing.assert_close(translate_tau(tau, time, IdentityTime()), time.tau_to_t(tau))
    torch.testing.assert_close(translate_tau(time.tau_to_t(tau), IdentityTime(), time), tau, rtol=0, atol=1e-5)
