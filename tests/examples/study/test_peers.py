"""The peers of the study, tested against an exact distribution."""

import math
from types import SimpleNamespace

import pytest
import torch
from peers.autoregressive import (
    AutoregressiveTrainer,
    autoregressive_log_likelihood,
    autoregressive_samples,
    new_gpt2,
)
from peers.masked_diffusion import (
    MaskedDiffusionTrainer,
    ancestral_samples,
    masked_log_likelihood,
    masked_logits,
    new_masked_model,
)
from peers.uniform_diffusion import (
    UniformDiffusionTrainer,
    noised_tokens,
    uniform_log_likelihood,
    uniform_loss,
    uniform_samples,
)
from safetensors.torch import load_file
from small_models import without_zeros
from transformers import TrainingArguments

from modeling_flm import FLMConfig, FLMModel
from modeling_flm.time_reparameterization import ReparameterizedTime
from modeling_flm.trainers import EMACallback


TEXTS = torch.tensor([[0, 0], [1, 1], [0, 3]])  # of four tokens; token 2 does not occur
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
ENTROPY = -(WEIGHTS * WEIGHTS.log()).sum().item()
JOINT = torch.zeros(4, 4).index_put(tuple(TEXTS.T), WEIGHTS)


class ExactMaskedModel:
    """The optimal masked diffusion model of a few texts over four tokens; the mask is the fifth token."""

    texts, weights = TEXTS, WEIGHTS
    config = SimpleNamespace(vocab_size=5, per_token_timesteps=False)
    device = torch.device("cpu")

    def __call__(self, tokens, timesteps):
        fits = ((tokens[:, None] == self.texts) | (tokens[:, None] == 4)).all(-1)  # (batch_size, num_texts)
        chances = torch.where(fits.any(1, keepdim=True), fits * self.weights, self.weights)
        one_hot = torch.nn.functional.one_hot(self.texts, 5).float()
        logits = torch.einsum("bn,nlv->blv", chances / chances.sum(1, keepdim=True), one_hot).log()
        return SimpleNamespace(logits=logits)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_positions_of_masks():
    """In a fully masked sequence, a network with only relative positions predicts the same at all positions."""
    config = FLMConfig(
        vocab_size=20, max_position_embeddings=6, attn_logit_softcapping=None, hidden_size=16, num_attention_heads=2
    )
    known = torch.zeros(1, 6, dtype=torch.bool)
    for with_positions in (False, True):
        model = without_zeros(new_masked_model(config, with_positions)).eval()
        logits = masked_logits(model, torch.zeros(1, 6, dtype=torch.long), known)
        assert torch.allclose(logits[:, :1].expand_as(logits), logits, atol=1e-4) != with_positions
        shorter = masked_logits(model, torch.zeros(1, 4, dtype=torch.long), known[:, :4])
        assert torch.isfinite(shorter).all() and shorter.shape == (1, 4, 20)


class TestMaskedDiffusion:
    def test_bound_is_the_log_likelihood(self):
        """Of each text, because every order of two tokens gives the same product of conditionals."""
        model = ExactMaskedModel()
        for text, weight in zip(model.texts, model.weights):
            bound = masked_log_likelihood(model, text.expand(4000, 2), num_times=32, generator=generator())
            assert bound.mean().item() == pytest.approx(math.log(weight), abs=4 * bound.std().item() / 4000**0.5)
            assert bound.std() < 1

    def test_conditional_bound(self):
        text, known = torch.tensor([[0, 3]]).expand(100, 2), torch.tensor([[1, 0]]).expand(100, 2)
        bounds = masked_log_likelihood(ExactMaskedModel(), text, 32, generator(), prompt_mask=known)
        # At any masked fraction, because the only unknown token is predicted from the known one
        expected = math.log(0.2 / 0.7)
        assert bounds.mean().item() == pytest.approx(expected, abs=4 * bounds.std().item() / 10)

    @pytest.mark.parametrize("num_steps", [1, 2, 8, 64])
    def test_ancestral_samples(self, num_steps):
        """Two tokens are sampled independently if they are unmasked in the same step, with probability 1 / num_steps."""
        model = ExactMaskedModel()
        tokens = ancestral_samples(model, 20_000, 2, num_steps, generator=generator())
        first, second = torch.tensor([0.7, 0.3, 0, 0]), torch.tensor([0.5, 0.3, 0, 0.2])
        expected = JOINT + (first[:, None] * second - JOINT) / num_steps
        shares = torch.zeros(4, 4).index_put(tuple(tokens.T), torch.tensor(1 / 20_000), accumulate=True)
        assert ((shares - expected).abs() < 4.5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-7).all()

    def test_temperature(self):
        tokens = ancestral_samples(ExactMaskedModel(), 20_000, 2, 1, temperature=0.5, generator=generator())
        expected = torch.tensor([0.7, 0.3]).square()
        check_shares(tokens[:, 0], torch.cat([expected / expected.sum(), torch.zeros(2)]))


def check_shares(tokens: torch.Tensor, expected: torch.Tensor):
    """Checks that the frequencies of tokens match probabilities within 4.5 standard errors."""
    shares = torch.bincount(tokens.flatten(), minlength=len(expected)) / tokens.numel()
    assert ((shares - expected).abs() <= 4.5 * (expected * (1 - expected) / tokens.numel()).sqrt() + 1e-7).all()


class ExactUniformModel:
    """The optimal uniform-state diffusion model: it predicts each token from the other noised token."""

    config = SimpleNamespace(vocab_size=4)
    device = torch.device("cpu")

    def __call__(self, tokens, timesteps):
        levels = timesteps[:, None, None]
        likely = levels * (tokens[:, None] == TEXTS) + (1 - levels) / 4  # (batch_size, num_texts, 2)
        chances = WEIGHTS[:, None] * likely.flip(-1)
        one_hot = torch.nn.functional.one_hot(TEXTS, 4).float()
        logits = torch.einsum("bnl,nlv->blv", chances / chances.sum(1, keepdim=True), one_hot).log()
        return SimpleNamespace(logits=logits)


class TestUniformDiffusion:
    @pytest.mark.parametrize("level", [0.02, 0.3, 0.9])
    def test_loss_is_the_limit_of_small_steps(self, level):
        """The limit is the divergence between the two posteriors of a step, as matrices, divided by its length."""
        step, x, i = 1e-5, 2, torch.arange(5)
        level = torch.tensor(level, dtype=torch.float64)
        logits = torch.randn(5, dtype=torch.float64, generator=generator())

        def posterior(prediction):
            """Posterior of the token at `level + step`, with a row for each token at `level`."""
            kept = level / (level + step)
            after = kept * torch.eye(5) + (1 - kept) / 5
            joint = after * ((level + step) * prediction + (1 - level - step) / 5)
            return joint / joint.sum(1, keepdim=True)

        of_text, of_model = posterior(torch.nn.functional.one_hot(torch.tensor(x), 5)), posterior(logits.softmax(0))
        expected = (of_text * (of_text / of_model).log()).sum(1) / step
        losses = uniform_loss(
            logits.expand(5, 1, 5).float(), torch.full((5, 1), x), i[:, None], level.float().expand(5, 1)
        )
        torch.testing.assert_close(losses[:, 0].double(), expected, rtol=2e-3, atol=1e-4)

    def test_bound_is_the_entropy(self):
        texts = TEXTS[torch.multinomial(WEIGHTS, 20_000, replacement=True, generator=generator())]
        bounds = uniform_log_likelihood(ExactUniformModel(), texts, num_times=32, generator=generator())
        assert -bounds.mean().item() == pytest.approx(ENTROPY, abs=4 * bounds.std().item() / len(texts) ** 0.5)
        assert bounds.std() < 3

    def test_samples_of_one_step_are_independent_and_of_many_are_right(self):
        model, marginals = ExactUniformModel(), (JOINT.sum(1), JOINT.sum(0))
        errors = {}
        for num_steps in (1, 4, 16, 64):
            tokens = uniform_samples(model, 20_000, 2, num_steps, generator=generator())
            shares = torch.zeros(4, 4).index_put(tuple(tokens.T), torch.tensor(1 / 20_000), accumulate=True)
            errors[num_steps] = (shares - JOINT).abs().sum().item() / 2
            if num_steps == 1:
                for position, expected in enumerate(marginals):
                    check_shares(tokens[:, position], expected)
                assert (shares - marginals[0][:, None] * marginals[1]).abs().max() < 0.02
        assert errors[1] > 0.3
        assert errors[4] < errors[1] / 2 and errors[16] < errors[4] / 2 and errors[64] < 0.03

    def test_a_single_token_is_right_at_any_number_of_steps(self):
        """The network of a single token predicts the token frequencies."""
        chances = torch.tensor([0.6, 0.3, 0.1, 0.0])

        class Model(ExactUniformModel):
            def __call__(self, tokens, timesteps):
                return SimpleNamespace(logits=chances.log().expand(*tokens.shape, 4))

        for num_steps in (1, 3, 8):
            check_shares(uniform_samples(Model(), 20_000, 1, num_steps, generator=generator()), chances)

    def test_levels_are_the_times_of_gaussian_states(self):
        """The argmax of a state is the clean token with the probability of the level, and is otherwise uniform."""
        levels = torch.full((20_000, 1), 0.4)
        t = ReparameterizedTime(5).tau_to_t(levels)[..., None]
        noise = torch.randn(20_000, 1, 5, generator=generator())
        of_states = (t * torch.nn.functional.one_hot(torch.tensor([[2]]), 5) + (1 - t) * noise).argmax(-1)
        for tokens in (of_states, noised_tokens(torch.full((20_000, 1), 2), levels, 5, generator())):
            check_shares(tokens, torch.tensor([0.12, 0.12, 0.52, 0.12, 0.12]))


class TestAutoregressive:
    config = FLMConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=3
    )

    def test_as_many_parameters(self):
        for config in (
            self.config,
            FLMConfig(vocab_size=500, hidden_size=96, num_hidden_layers=4, num_attention_heads=4),
        ):
            wanted, model = FLMModel(config).num_parameters(), new_gpt2(config)
            block = model.transformer.h[0]
            assert abs(model.num_parameters() - wanted) <= sum(each.numel() for each in block.parameters()) / 2

    def test_conditional_likelihoods_add_up(self):
        torch.manual_seed(0)
        model = new_gpt2(FLMConfig(vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
        texts = torch.randint(4, (5, 6))
        known = (torch.arange(6) < 2).expand(5, 6)
        begins = autoregressive_log_likelihood(model, texts[:, :2])
        ends = autoregressive_log_likelihood(model, texts, prompt_mask=known)
        torch.testing.assert_close(begins + ends, autoregressive_log_likelihood(model, texts))

    def test_samples_have_the_likelihoods_of_all_texts(self):
        torch.manual_seed(0)
        model = new_gpt2(self.config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
        chances = autoregressive_log_likelihood(model, texts).exp()
        assert chances.sum().item() == pytest.approx(1, abs=1e-5)
        tokens = autoregressive_samples(model, 20_000, 3, generator=generator())
        check_shares(tokens @ torch.tensor([16, 4, 1]), chances)


@pytest.mark.parametrize("peer", ["autoregressive", "masked", "uniform"])
def test_training_reaches_the_entropy(peer, tmp_path):
    config = FLMConfig(
        vocab_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2,
        dropout=0.0,
    )
    new_model, trainer_class, log_likelihood = {
        "autoregressive": (new_gpt2, AutoregressiveTrainer, autoregressive_log_likelihood),
        "masked": (new_masked_model, MaskedDiffusionTrainer, masked_log_likelihood),
        "uniform": (FLMModel, UniformDiffusionTrainer, uniform_log_likelihood),
    }[peer]
    torch.manual_seed(0)
    texts = TEXTS[torch.multinomial(WEIGHTS, 2000, replacement=True)]
    args = TrainingArguments(
        output_dir=tmp_path,
        max_steps=250,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        warmup_steps=20,
        report_to=[],
    )
    dataset = [{"input_ids": text, "labels": text} for text in texts]
    trainer = trainer_class(new_model(config), args, train_dataset=dataset)
    trainer.train()
    model = trainer.model.eval()
    options = {} if peer == "autoregressive" else {"num_times": 32, "generator": generator()}
    bounds = log_likelihood(model, texts, **options)
    error = bounds.std().item() / len(texts) ** 0.5
    assert ENTROPY - 4 * error < -bounds.mean().item() < 1.08 * ENTROPY + 4 * error


@pytest.mark.parametrize("peer", ["autoregressive", "masked", "uniform"])
def test_resuming_equals_an_uninterrupted_training(peer, tmp_path):
    config = FLMConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=2
    )
    new_model, trainer_class = {
        "autoregressive": (new_gpt2, AutoregressiveTrainer),
        "masked": (new_masked_model, MaskedDiffusionTrainer),
        "uniform": (FLMModel, UniformDiffusionTrainer),
    }[peer]

    def new_trainer():
        torch.manual_seed(0)
        args = TrainingArguments(
            output_dir=tmp_path, max_steps=6, save_steps=3, per_device_train_batch_size=4, report_to=[], seed=3
        )
        dataset = [{"input_ids": text, "labels": text} for text in TEXTS.repeat(10, 1)]
        return trainer_class(new_model(config), args, train_dataset=dataset, ema=EMACallback(0.9))

    trainer = new_trainer()
    trainer.train()
    trainer.save_model(tmp_path / "whole")
    resumed = new_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed.save_model(tmp_path / "resumed")
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    # The saved weights are the average.
    assert any(
        not torch.equal(whole[name], tensor) for name, tensor in trainer.model.state_dict().items() if name in whole
    )
