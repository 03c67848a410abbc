"""The joint noise against a float64 reference, an orthonormal basis from a QR decomposition, and against dense noise."""

import pytest
import torch
import torch.nn.functional as F
from tensors import noise_factors, relative_error

from modeling_flm import joint_noise
from modeling_flm.flow import interpolate
from modeling_flm.joint_noise import JointNoise, noise_size


VOCAB_SIZE, SIZE = 3000, 24  # several chunks of rows, one of them smaller


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(joint_noise, "_ROWS", 700)
    monkeypatch.setattr(joint_noise, "_COLUMNS", 10)  # which ends within embeddings


def embeddings_of(case: str) -> list[torch.Tensor]:
    def draw(size: int = SIZE) -> torch.Tensor:
        # Columns have different scales and means, and tokens different norms, as in trained models.
        columns = torch.logspace(-2, 0, size)
        return columns * (torch.randn(VOCAB_SIZE, size) + 0.5) / torch.arange(1, VOCAB_SIZE + 1)[:, None] ** 0.3

    first = draw()
    if case.startswith("distance"):
        distance = float(case.split()[1])
        second = first + distance * draw()
        return [first, second, second + distance * draw()]
    return {
        "one": [first],
        "two": [first, draw()],
        "three": [first, draw(), draw()],
        "equal": [first, first.clone(), first.clone()],
        "scaled": [first, 1.01 * first],
        "far": [first, 1e-3 * draw(), 1e3 * draw()],
        "widths": [first, draw(10), draw(), draw(10)],
        "bfloat16": [first.bfloat16(), first.bfloat16(), draw().bfloat16()],
        "float64": [first.double(), draw()],
        "low rank": [torch.randn(VOCAB_SIZE, 5) @ torch.randn(5, SIZE)],
        "dead column": [first * (torch.arange(SIZE) != 3), first],
        "tiny": [1e-6 * first, 1e-6 * first],
    }[case]


DISTANCES = ["distance 1e-2", "distance 1e-4", "distance 1e-6"]
REGULAR = ["one", "two", "three", "far", "widths", "float64", *DISTANCES]
SINGULAR = ["equal", "scaled", "bfloat16", "low rank", "dead column", "tiny"]


def check_covariances(factors: list[torch.Tensor], embeddings: list[torch.Tensor], tolerance: float):
    factors, embeddings = [torch.cat([x.double() for x in tensors], dim=1) for tensors in (factors, embeddings)]
    expected = embeddings.T @ embeddings
    scale = expected.diagonal().sqrt().clamp(min=1e-3 * expected.diagonal().mean().sqrt())
    assert ((factors.T @ factors - expected) / (scale[:, None] * scale)).abs().max() < tolerance


@pytest.mark.parametrize("case", REGULAR + SINGULAR)
@pytest.mark.parametrize("frozen", [(), (1,), (1, 0)])
def test_covariances(case, frozen):
    embeddings = embeddings_of(case)
    frozen = frozen if len(embeddings) > 1 else ()
    noise = JointNoise(*embeddings, frozen=frozen)
    # bfloat16 embeddings are exact here: rounding of their states is not part of the noise.
    factors = [noise.factor(index) for index in range(len(embeddings))]
    assert noise.size == sum(factor.shape[1] for factor in factors)
    check_covariances(factors, embeddings, 1e-5 if case in SINGULAR else 2e-6)


@pytest.mark.parametrize("case", DISTANCES)
def test_differences_between_states_of_nearly_equal_embeddings(case):
    first, second, third = embeddings_of(case)
    distance = float(case.split()[1])
    r1, r2, r3 = (factor.double() for factor in noise_factors(first, second, third))
    check_covariances([r2 - r1, r3 - r2], [second.double() - first, third.double() - second], 2e-6 + 5e-7 / distance)


@pytest.mark.parametrize("case", REGULAR)
def test_factors_and_gradients_equal_an_orthonormal_basis(case):
    # With A = QR, x_0 given all states is ε Qᵀ: the factors are Qᵀ E_i, and the gradient in E_i is Q times the gradient in them.
    embeddings = [embedding.requires_grad_() for embedding in embeddings_of(case)]
    basis, triangle = torch.linalg.qr(torch.cat([embedding.detach().double() for embedding in embeddings], dim=1))
    basis = basis * triangle.diagonal().sign()
    for factor, embedding in zip(noise_factors(*embeddings), embeddings):
        expected = basis.T @ embedding.detach().double()
        assert (factor - expected).norm() < 1e-6 * expected.norm()
        gradient = torch.randn_like(factor)
        (value,) = torch.autograd.grad(factor, embedding, gradient)
        expected = basis @ gradient.double()
        assert (value - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("case", REGULAR)
def test_gradients_of_factors_and_tokens_add_up(case):
    embeddings = [embedding.requires_grad_() for embedding in embeddings_of(case)]
    noise, input_ids = JointNoise(*embeddings), torch.randint(len(embeddings[0]), (2, 5))
    input_ids[1, :2] = input_ids[0, 0]  # repeated tokens
    for index, embedding in enumerate(embeddings):
        factor, tokens = noise.factor_and_tokens(index, embedding, input_ids)
        assert torch.equal(tokens, embedding[input_ids])
        gradients = torch.randn_like(factor), torch.randn_like(tokens)
        (value,) = torch.autograd.grad((factor, tokens), embedding, gradients)
        (of_factor,) = torch.autograd.grad(noise_factors(*embeddings)[index], embedding, gradients[0])
        (of_tokens,) = torch.autograd.grad(embedding[input_ids], embedding, gradients[1])
        torch.testing.assert_close(value, of_factor + of_tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", REGULAR + SINGULAR)
def test_mean_gradient_equals_dense_noise(case):
    # The mean of any loss depends on the covariances alone: it is enough that their derivatives, E_jᵀ dE_i, are right.
    embeddings = [embedding.float().requires_grad_() for embedding in embeddings_of(case)]
    factors = noise_factors(*embeddings)
    for factor, embedding in zip(factors, embeddings):
        for other_factor, other in zip(factors, embeddings):
            weight = torch.randn(factor.shape[1], other.shape[1]) / (embedding.detach().norm(dim=0)[:, None] + 1e-6)
            covariance = factor.T @ other_factor.detach()
            (gradient,) = torch.autograd.grad((weight * covariance).sum(), embedding, retain_graph=True)
            expected = other.detach() @ weight.T
            assert (gradient - expected).norm() < (1e-3 if case in SINGULAR else 1e-5) * expected.norm()


def test_one_embedding_has_the_cholesky_factor():
    (embedding,) = embeddings_of("one")
    expected = torch.linalg.cholesky(embedding.double().T @ embedding.double()).T.float()
    assert ((noise_factors(embedding)[0] - expected).norm(dim=0) / expected.norm(dim=0)).max() < 1e-6


def test_equal_embeddings_have_equal_states():
    first, second, third = noise_factors(*embeddings_of("equal"))
    for other in (second, third):
        assert (first - other).norm() < 3e-7 * first.norm()


def test_frozen_gram_is_not_computed_again():
    first, second, third = embeddings_of("three")
    before = JointNoise(first, second, third, frozen=(2, 0))
    assert before.frozen_gram.shape == (2 * SIZE, 2 * SIZE)
    second += 1
    expected = JointNoise(first, second, third, frozen=(2, 0))
    noise = JointNoise(first, second, third, frozen=(2, 0), frozen_gram=before.frozen_gram)
    for index in range(3):
        assert torch.equal(noise.factor(index), expected.factor(index))
    with pytest.raises(AssertionError):  # it is used as it is
        torch.testing.assert_close(
            JointNoise(first, second, third, frozen=(2, 0), frozen_gram=2 * before.frozen_gram).factor(2),
            expected.factor(2),
        )


def test_products_are_in_float32_whatever_is_allowed(monkeypatch):
    embedding = embeddings_of("one")[0].requires_grad_()
    seen = []
    basis = joint_noise._basis

    def seeing(*args):
        seen.append([backend.matmul.fp32_precision for backend in (torch.backends.cuda, torch.backends.mkldnn)])
        return basis(*args)

    monkeypatch.setattr(joint_noise, "_basis", seeing)
    expected = noise_factors(embedding)[0]
    allowed = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            factor = noise_factors(embedding)[0]
            torch.autograd.grad(factor, embedding, torch.ones_like(factor))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = allowed
    assert torch.equal(factor, expected) and seen == [["ieee", "ieee"]] * 3


def test_embeddings_without_a_factorization_give_nan():
    first, second = embeddings_of("two")
    first[3, 3] = torch.inf
    assert all(factor.isnan().all() for factor in noise_factors(first, second))


class TestDenseNoise:
    """Against noise of V dimensions, computed by the test."""

    @pytest.fixture(autouse=True)
    def small_blocks(self):
        """Overrides the fixture above: these embeddings are small."""

    @pytest.mark.parametrize(
        "vocab_size, sizes", [(300, [16]), (300, [16, 24]), (20, [16, 24]), (10, [16]), (40, [16, 24, 8])]
    )
    def test_factors_give_the_covariance_of_dense_noise(self, vocab_size, sizes):
        embeddings = [torch.randn(vocab_size, size) for size in sizes]
        factors = noise_factors(*embeddings)
        width = noise_size(*embeddings)
        assert width == min(vocab_size, sum(sizes))
        for first, e1 in zip(factors, embeddings):
            assert first.shape == (width, e1.shape[1])
            for second, e2 in zip(factors, embeddings):
                assert relative_error(first.T @ second, e1.T @ e2) < 1e-6

    @pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
    def test_factors_of_coinciding_embeddings(self, scale):
        # A student at its initialization and its teacher: the same noise must reach both.
        embedding = scale * torch.randn(300, 16)
        first, second = noise_factors(embedding, embedding.clone())
        assert relative_error(first.T @ second, embedding.T @ embedding) < 1e-6
        noise = torch.randn(1000, first.shape[0])
        assert relative_error(noise @ first, noise @ second) < 1e-5

    def test_factors_of_different_vocabularies_are_refused(self):
        with pytest.raises(ValueError, match="share one vocabulary"):
            noise_factors(torch.randn(10, 4), torch.randn(11, 4))

    def test_mean_gradient_equals_dense_noise_and_is_less_noisy(self):
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

    def test_gradient_is_the_conditional_expectation_of_the_dense_one(self):
        # For given noise n = eps R, the dense gradient is (x0 | x0 E = n)ᵀ g with E[x0 | n] = n (EᵀE)⁻¹ Eᵀ.
        embedding = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
        (factor,) = noise_factors(embedding)
        eps, upstream = torch.randn(2, 100, 6, dtype=torch.float64)
        noise = eps @ factor
        (gradient,) = torch.autograd.grad((noise * upstream).sum(), embedding)
        gram = (embedding.T @ embedding).detach()
        conditional = noise.detach() @ torch.linalg.solve(gram, embedding.T.detach())
        torch.testing.assert_close(gradient, conditional.T @ upstream, rtol=1e-6, atol=1e-8)
