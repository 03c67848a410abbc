"""The joint noise against a reference in float64: an orthonormal basis of the columns of all embeddings, from their QR."""

import pytest
import torch
from tensors import noise_factors

from modeling_flm import joint_noise
from modeling_flm.joint_noise import JointNoise


VOCAB_SIZE, SIZE = 3000, 24  # several chunks of rows, one of them smaller


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(joint_noise, "_ROWS", 700)
    monkeypatch.setattr(joint_noise, "_COLUMNS", 10)  # which ends within embeddings


def embeddings_of(case: str) -> list[torch.Tensor]:
    def draw(size: int = SIZE) -> torch.Tensor:
        # Columns have different scales and means, and tokens different norms, as those of trained models.
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
    # bfloat16 embeddings are taken as they are: what their states are rounded to is not the noise's.
    factors = [noise.factor(index, embedding.float()) for index, embedding in enumerate(embeddings)]
    assert noise.size == sum(factor.shape[1] for factor in factors)
    check_covariances(factors, embeddings, 1e-5 if case in SINGULAR else 2e-6)


@pytest.mark.parametrize("case", DISTANCES)
def test_states_of_nearly_coinciding_embeddings_differ_by_what_they_should(case):
    first, second, third = embeddings_of(case)
    distance = float(case.split()[1])
    r1, r2, r3 = (factor.double() for factor in noise_factors(first, second, third))
    check_covariances([r2 - r1, r3 - r2], [second.double() - first, third.double() - second], 2e-6 + 5e-7 / distance)


@pytest.mark.parametrize("case", REGULAR)
def test_factors_and_gradients_equal_those_of_an_orthonormal_basis(case):
    # With A = QR, x_0 given all states is ε Qᵀ: the factors are Qᵀ E_i, and the gradient in E_i is Q times that in them.
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


@pytest.mark.parametrize("case", REGULAR + SINGULAR)
def test_mean_gradient_is_that_of_dense_noise(case):
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
