"""
The later published code, value by value: capped logits, gamma sampling and single-stage distillation, from what
`PyTorchModelHubMixin` writes and from checkpoint files.
"""

import os
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from distilling import build_batch, compute_loss, compute_targets, joint_noise, states
from released import FOLDER, SIZES, VALUES
from small_models import sampling
from tensors import relative_error
from transformers import AutoModel

from modeling_flm.flow import gamma_coefficients
from modeling_flm.hub.convert import convert, main
from modeling_flm.trainers import FMLMTrainer, FMLMTrainingArguments


SOURCES = {"flm": ("flm_hub", "flm.ckpt"), "fmlm": ("fmlm_hub", "fmlm.ckpt")}
ALL_SOURCES = [(kind, source) for kind, sources in SOURCES.items() for source in sources]


def build(kind: str, source: str | None = None):
    return convert(FOLDER / (source or SOURCES[kind][0]))


def noised(model, t: torch.Tensor) -> torch.Tensor:
    """The state of the recorded batch, from one-hot space."""
    t = t[:, None, None]
    one_hot = torch.nn.functional.one_hot(VALUES["input_ids"], SIZES["vocab_size"]).float()
    return ((1 - t) * VALUES["noise"] + t * one_hot) @ model.state_embedding


def recorded_noise(model) -> dict:
    """Arguments of `generate`: the recorded noise of the start and of each step."""
    noise = iter(VALUES["fmlm.fresh_noise"] @ model.state_embedding)
    prior_state = VALUES["prior_state"] @ model.state_embedding
    return {"prior_state": prior_state, "noise_source": lambda samples: next(noise)[samples]}


def arguments_of(kind: str) -> dict[str, torch.Tensor]:
    if kind == "flm":
        return {"timesteps": VALUES["flm.tau"]}
    return {"timesteps": VALUES["fmlm.tau_s"], "target_timesteps": VALUES["fmlm.tau_t"]}


class TestForward:
    @pytest.mark.parametrize("kind", SOURCES)
    def test_sources_are_equal(self, kind):
        first, second = (build(kind, source) for source in SOURCES[kind])
        assert all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())
        assert first.config.to_dict() == second.config.to_dict()

    @pytest.mark.parametrize("kind, source", ALL_SOURCES)
    def test_weights_are_the_averaged_ones(self, kind, source):
        embedding = build(kind, source).embed_tokens.weight[:2]
        assert torch.equal(embedding, VALUES[f"{kind}.ema_weight_check"])
        if source.endswith(".ckpt"):
            raw = convert(FOLDER / source, raw_weights=True).embed_tokens.weight[:2]
            assert torch.equal(raw, VALUES[f"{kind}.raw_weight_check"])

    @pytest.mark.parametrize("kind, source", ALL_SOURCES)
    def test_final_logit_softcapping(self, kind, source):
        model = build(kind, source)
        state = noised(model, VALUES[f"{kind}.t" if kind == "flm" else "fmlm.s"])
        output = model(inputs_embeds=state, **arguments_of(kind))
        torch.testing.assert_close(output.logits.log_softmax(-1), VALUES[f"{kind}.log_probs"], rtol=1e-3, atol=1e-4)
        model.config.final_logit_softcapping = None
        raw = model(inputs_embeds=state, **arguments_of(kind)).logits
        assert relative_error(raw, VALUES[f"{kind}.raw_logits"]) < 1e-4
        assert (raw.abs() > 45).float().mean() > 0.1  # where the cap counts
        torch.testing.assert_close(output.logits, 30 * torch.tanh(raw / 30))

    def test_flm_loss(self, path):
        model = build("flm")
        if path == "compiled":
            model.compile_regions(backend="aot_eager")
        state, labels = noised(model, VALUES["flm.t"]), VALUES["input_ids"]
        output = model(inputs_embeds=state, timesteps=VALUES["flm.tau"], labels=labels)
        torch.testing.assert_close(output.token_losses, VALUES["flm.loss_per_token"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(output.loss, VALUES["flm.loss_per_token"].mean(), rtol=1e-3, atol=1e-3)

    def test_times(self):
        time = build("fmlm").time_map
        for tau, t in (
            ("flm.tau", "flm.t"),
            ("fmlm.tau_s", "fmlm.s"),
            ("fmlm.tau_t", "fmlm.t"),
            ("psd.tau_u", "psd.u"),
        ):
            torch.testing.assert_close(time.tau_to_t(VALUES[tau]), VALUES[t], rtol=0, atol=1e-4)


class TestSampling:
    def test_flm_tokens(self, path):
        model = build("flm")
        prior = VALUES["prior_state"] @ model.state_embedding
        for num_steps in SIZES["flm_steps"]:
            tokens = model.generate(prior_state=prior, num_steps=num_steps, **sampling(path))
            assert torch.equal(tokens, VALUES[f"flm.tokens_{num_steps}"])

    @pytest.mark.parametrize("gamma", SIZES["gammas"])
    def test_gamma_tokens(self, gamma, path):
        model = build("fmlm")
        for num_steps in SIZES["fmlm_steps"]:
            options = {"num_steps": num_steps, "gamma": gamma, **sampling(path)}
            tokens = model.generate(**recorded_noise(model), **options)
            assert torch.equal(tokens, VALUES[f"fmlm.gamma{gamma}_tokens_{num_steps}"])

    @pytest.mark.parametrize("gamma", SIZES["gammas"])
    def test_gamma_states_and_times(self, gamma, monkeypatch):
        model = build("fmlm")
        states, targets, encode = [], [], model.encode

        def record(state, tau_s, tau_t, *args, **kwargs):
            states.append(state)
            targets.append(tau_t[0])
            return encode(state, tau_s, tau_t, *args, **kwargs)

        monkeypatch.setattr(model, "encode", record)
        model.generate(**recorded_noise(model), num_steps=4, gamma=gamma)
        expected = VALUES[f"fmlm.gamma{gamma}_state_after_step1"] @ model.state_embedding
        assert relative_error(states[1], expected) < 1e-4
        tau_tilde = VALUES[f"fmlm.gamma{gamma}_tau_tilde_4"]
        torch.testing.assert_close(torch.stack(targets), tau_tilde, rtol=0, atol=1e-4)

    def test_gamma_coefficients(self):
        t = torch.linspace(0, 1, 21, dtype=torch.float64)
        for gamma in (0.0, 0.3, 0.8, 1.0):
            u, excess, fresh = gamma_coefficients(t, gamma)
            torch.testing.assert_close(u, 1 - (1 - t) * (1 - gamma**2) ** 0.5)
            torch.testing.assert_close(excess, u - t)
            # What is left of the old noise and the new noise together are the noise at t.
            torch.testing.assert_close(((1 - u) ** 2 + fresh**2).sqrt(), 1 - t)
            assert u[-1] == 1 and excess[-1] == 0 and fresh[-1] == 0


class TestDistillation:
    def test_single_stage_targets_and_losses(self, tmp_path, path):
        args = FMLMTrainingArguments.from_preset(
            "single_stage", output_dir=tmp_path, use_cpu=True, report_to=[], disable_tqdm=True
        )
        trainer = FMLMTrainer(build("fmlm"), args, teacher=build("flm"))
        if path == "compiled":
            for network in (trainer.model, trainer.teacher):
                network.compile_regions(backend="aot_eager")
        input_ids, tau_s = VALUES["input_ids"], VALUES["psd.tau_s"]
        # V is below the joint width of the networks: noise is one-hot noise
        groups = {"diagonal": [0], "off_diagonal": [1], "boundary": [2]}
        batch = build_batch(input_ids, VALUES["noise"], tau_s, VALUES["psd.tau_t"], VALUES["psd.tau_u"], **groups)
        target, weights = compute_targets(trainer, batch)
        assert torch.equal(weights, torch.ones(3))
        torch.testing.assert_close(target[:1], VALUES["psd.diagonal_target"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(target[1:], VALUES["psd.offdiagonal_target"], rtol=1e-4, atol=1e-4)
        loss, output = compute_loss(trainer, batch)
        torch.testing.assert_close(output.token_losses, VALUES["psd.loss_per_token"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(loss, VALUES["psd.loss_per_token"].mean(), rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            state = states(trainer, batch)[0]
            logits = trainer.model(None, batch.tau_s, batch.tau_t, inputs_embeds=state).logits
            log_delta = logits.log_softmax(-1)
        torch.testing.assert_close(log_delta, VALUES["psd.log_probs"], rtol=1e-3, atol=1e-3)


class TestAnyOrder:
    """FMLM+: a time for every token, and no reparameterization."""

    def build(self):
        return convert(FOLDER / "fmlm_plus.ckpt")

    def test_weights_are_the_averaged_ones(self):
        model = self.build()
        assert type(model).__name__ == "FMLMModel" and model.config.per_token_timesteps
        assert model.config.time_reparameterization is None
        assert torch.equal(model.embed_tokens.weight[:2], VALUES["plus.ema_weight_check"])
        raw = convert(FOLDER / "fmlm_plus.ckpt", raw_weights=True)
        assert torch.equal(raw.embed_tokens.weight[:2], VALUES["plus.raw_weight_check"])

    def test_logits_with_times_that_differ_from_token_to_token(self):
        model = self.build()
        one_hot = torch.nn.functional.one_hot(VALUES["input_ids"], SIZES["vocab_size"]).float()
        tau = VALUES["plus.free_tau_s"]
        state = ((1 - tau)[..., None] * VALUES["plus.noise"] + tau[..., None] * one_hot) @ model.state_embedding
        zero, one = torch.zeros(3, 12), torch.ones(3, 12)
        for seen, *times, name in (
            (state, tau, VALUES["plus.free_tau_t"], "free_raw_logits"),
            (VALUES["plus.state"] @ model.state_embedding, VALUES["plus.tau_s"], VALUES["plus.tau_t"], "raw_logits"),
            (VALUES["prior_state"] @ model.state_embedding, zero, one, "posterior_raw_logits"),
        ):
            logits = model(inputs_embeds=seen, timesteps=times[0], target_timesteps=times[1]).logits
            expected = VALUES[f"plus.{name}"]
            torch.testing.assert_close(logits, 30 * torch.tanh(expected / 30), rtol=1e-4, atol=1e-3)
            model.config.final_logit_softcapping = None
            raw = model(inputs_embeds=seen, timesteps=times[0], target_timesteps=times[1]).logits
            assert relative_error(raw, expected) < 1e-4
            model.config.final_logit_softcapping = SIZES["logit_cap"]

    def test_targets_and_losses(self, tmp_path, path):
        args = FMLMTrainingArguments.from_preset(
            "any_order", output_dir=tmp_path, use_cpu=True, report_to=[], disable_tqdm=True
        )
        trainer = FMLMTrainer(self.build(), args)
        if path == "compiled":
            trainer.model.compile_regions(backend="aot_eager")
        input_ids, known = VALUES["input_ids"], VALUES["plus.is_context"]
        # The noise of d variables that gives the recorded states
        embedding = trainer.model.state_embedding.detach().double()
        factor = joint_noise(trainer).factor(0).detach().double()
        noise = torch.linalg.solve(factor.T, (VALUES["plus.noise"].double() @ embedding).mT).mT.float()
        groups = {"diagonal": [0], "off_diagonal": [1], "boundary": [2]}
        batch = build_batch(input_ids, noise, VALUES["plus.tau_s"], VALUES["plus.tau_t"], known=known, **groups)
        state = states(trainer, batch)[0]
        assert relative_error(state, VALUES["plus.state"] @ trainer.model.state_embedding) < 1e-4
        target, weights = compute_targets(trainer, batch)
        assert weights.eq(1).all()
        active = ~known[1:]
        torch.testing.assert_close(target[1:][active], VALUES["plus.offdiagonal_target"][active], rtol=1e-4, atol=1e-4)
        loss, output = compute_loss(trainer, batch)
        torch.testing.assert_close(output.token_losses, VALUES["plus.loss_per_token"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(loss, VALUES["plus.loss"], rtol=1e-3, atol=1e-3)


SCRIPT = """
import sys, torch
from pathlib import Path
sys.modules["modeling_flm"] = None
from transformers import AutoModel
for folder in Path().glob("*/batch.pt"):
    folder = folder.parent
    batch = torch.load(folder / "batch.pt")
    model = AutoModel.from_pretrained(folder / "model", trust_remote_code=True)
    results = {"logits": model(**batch["forward"]).logits.detach()}
    prior_state = batch["prior_state"] @ model.state_embedding
    for gamma in batch["gammas"]:
        noise = iter(batch["noise"] @ model.state_embedding)
        options = {"prior_state": prior_state, "noise_source": lambda samples: next(noise)}
        results[gamma] = model.generate(num_steps=2, gamma=gamma, **options)
    torch.save(results, folder / "results.pt")
"""


@pytest.mark.slow
def test_remote_code_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # where the tokenizer would be
    for kind, source in ALL_SOURCES:
        folder = tmp_path / source.replace(".", "_")
        main(["--checkpoint", str(FOLDER / source), "--output", str(folder / "model")])
        model = AutoModel.from_pretrained(folder / "model")
        assert model.config.final_logit_softcapping == SIZES["logit_cap"]
        assert model.config.attn_logit_softcapping == SIZES["attention_softcap"]
        state = noised(model, VALUES[f"{kind}.t" if kind == "flm" else "fmlm.s"]).detach()
        content = {
            "forward": {"inputs_embeds": state, **arguments_of(kind)},
            "prior_state": VALUES["prior_state"],
            "noise": VALUES["fmlm.fresh_noise"],
            "gammas": SIZES["gammas"] if kind == "fmlm" else [0.0],
        }
        torch.save(content, folder / "batch.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, cwd=tmp_path, env=environment)
    for kind, source in ALL_SOURCES:
        results = torch.load(tmp_path / source.replace(".", "_") / "results.pt")
        log_probs = results.pop("logits").log_softmax(-1)
        torch.testing.assert_close(log_probs, VALUES[f"{kind}.log_probs"], rtol=1e-3, atol=1e-4)
        for gamma, tokens in results.items():
            name = "flm.tokens_2" if kind == "flm" else f"fmlm.gamma{gamma}_tokens_2"
            assert torch.equal(tokens, VALUES[name])
