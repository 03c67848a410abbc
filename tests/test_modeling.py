"""The model: published values, saving and loading, attention, precision, compilation."""

import json
import subprocess
import sys

import oracle
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from small_models import build_flm, sampling, two_time_denoiser
from transformers import AutoConfig, AutoModel

from modeling_flm import FLMConfig, FLMModel, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.backbone_flm import FLMLayer
from modeling_flm.guidance_flm import Autoguidance


@pytest.fixture
def batch():
    return {"input_ids": torch.randint(53, (3, 12)), "timesteps": torch.tensor([0.1, 0.5, 0.9])}


class TestPublishedValues:
    def test_weights(self):
        weights, model = oracle.values(), oracle.flm()
        torch.testing.assert_close(model.state_embedding[:2], weights["flm.ema_weight_check"])

    def test_logits_and_loss(self, path):
        values, model = oracle.values(), oracle.flm()
        if path == "compiled":
            model.compile_regions()
        tau, input_ids = values["flm.tau"], values["input_ids"]
        t = model.time_map.tau_to_t(tau)
        torch.testing.assert_close(t, values["flm.t"], rtol=0, atol=5e-4)
        t = values["flm.t"][:, None, None]
        one_hot = F.one_hot(input_ids, model.config.vocab_size).float()
        state = ((1 - t) * values["noise"] + t * one_hot) @ model.state_embedding
        output = model(inputs_embeds=state, timesteps=tau, labels=input_ids)
        error = (output.logits - values["flm.logits"]).abs().max() / values["flm.logits"].abs().max()
        assert error < 1e-5
        losses = F.cross_entropy(output.logits.flatten(0, 1), input_ids.flatten(), reduction="none").view_as(input_ids)
        torch.testing.assert_close(losses, values["flm.loss_per_token"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.token_losses, values["flm.loss_per_token"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, values["flm.loss_per_token"].mean(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("num_steps", [1, 2, 5])
    def test_tokens(self, num_steps, path):
        values = oracle.values()
        tokens = oracle.flm().generate(prior_state=values["prior_state"], num_steps=num_steps, **sampling(path))
        assert torch.equal(tokens, values[f"flm.tokens_{num_steps}"])


class TestForward:
    def test_noises_clean_tokens(self, flm, batch):
        tau = batch["timesteps"]
        noise, t = torch.randn(3, 12, 32), flm.time_map.tau_to_t(tau)
        # V > d: noise enters through a square root of EᵀE
        embedding = flm.state_embedding.detach().double()
        root = torch.linalg.cholesky(embedding.T @ embedding).T
        clean = embedding[batch["input_ids"]]
        state = (1 - t[:, None, None]) * (noise.double() @ root) + t[:, None, None] * clean
        torch.testing.assert_close(flm.make_state(batch["input_ids"], tau, noise), state.float(), rtol=1e-4, atol=1e-5)
        # A token at the time 1 is clean.
        known = torch.rand(3, 12) < 0.5
        times = torch.where(known, 1.0, tau[:, None])
        expected = torch.where(known[..., None], clean, state).float()
        torch.testing.assert_close(flm.make_state(batch["input_ids"], times, noise), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(
            flm.make_state(batch["input_ids"], times, noise)[known], flm.make_state(batch["input_ids"])[known]
        )

    def test_clean_tokens_without_noise(self, flm, batch):
        expected = flm(inputs_embeds=flm.embed_tokens(batch["input_ids"]), timesteps=batch["timesteps"])
        assert torch.equal(flm(**batch).logits, expected.logits)

    def test_loss_ignores_and_averages(self, flm, batch):
        labels = batch["input_ids"].clone()
        labels[0, 3:] = -100
        output = flm(**batch, labels=labels)
        losses = -output.logits.log_softmax(-1).gather(-1, batch["input_ids"][..., None])[..., 0]
        kept = torch.cat([losses[0, :3], losses[1], losses[2]])
        torch.testing.assert_close(output.loss, kept.mean())
        torch.testing.assert_close(flm(**batch, labels=labels, num_items_in_batch=100).loss, kept.sum() / 100)
        assert flm(**batch, labels=torch.full_like(labels, -100)).loss == 0

    def test_padding_changes_nothing(self, flm, batch):
        state = torch.randn(3, 12, 32)
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[:, 7:] = 0
        masked = flm(inputs_embeds=state, timesteps=batch["timesteps"], attention_mask=mask).logits[:, :7]
        short = flm(inputs_embeds=state[:, :7], timesteps=batch["timesteps"]).logits
        torch.testing.assert_close(masked, short)

    def test_records_hidden_states_and_attentions(self, flm, batch):
        output = flm(**batch, output_hidden_states=True, output_attentions=True)
        assert [h.shape for h in output.hidden_states] == [(3, 12, 32)] * 3
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
        assert [a.shape for a in output.attentions] == [(3, 4, 12, 12)] * 2
        torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 4, 12))

    def test_the_vocabulary_cannot_be_resized(self, flm):
        with pytest.raises(NotImplementedError, match="another `vocab_size`"):
            flm.resize_token_embeddings(60)

    def test_other_rotary_base(self, flm, batch):
        other = build_flm(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
        other.load_state_dict(flm.state_dict())
        assert not torch.allclose(other(**batch).logits, flm(**batch).logits)

    def test_starts_uniform(self, batch):
        model = FLMModel(FLMConfig(vocab_size=53, hidden_size=32, num_attention_heads=4, num_hidden_layers=2))
        assert not model(**batch).logits.any()
        assert 0 < model.state_embedding.abs().max() <= 32**-0.5

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"timesteps": torch.rand(3)}, "either `input_ids`"),
            ({"input_ids": torch.ones(3, 4).long(), "inputs_embeds": torch.randn(3, 4, 32)}, "either `input_ids`"),
            ({"input_ids": torch.ones(3, 4).long()}, "Pass `timesteps`"),
            (
                {"input_ids": torch.ones(3, 4).long(), "timesteps": torch.rand(3, 5)},
                r"`timesteps` must have shape \(3,\), one time per text, or \(3, 4\), one per token, got \(3, 5\)",
            ),
            (
                {
                    "input_ids": torch.ones(3, 4).long(),
                    "timesteps": torch.rand(3),
                    "target_timesteps": torch.rand(3, 4),
                },
                "`target_timesteps` must have the shape of `timesteps`",
            ),
        ],
    )
    def test_bad_arguments(self, flm, arguments, message):
        with pytest.raises(ValueError, match=message):
            flm(**arguments)

    def test_bad_noise(self, flm, batch):
        with pytest.raises(ValueError, match="`noise` and `tau` go together"):
            flm.make_state(batch["input_ids"], batch["timesteps"])
        with pytest.raises(ValueError, match=r"`noise` must have shape \(3, 12, 32\)"):
            flm.make_state(batch["input_ids"], batch["timesteps"], torch.randn(3, 12, 53))


class TestConfig:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"vocab_size": 1}, "vocab_size"),
            ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size"),
            ({"hidden_size": 12, "num_attention_heads": 4}, "hidden_size"),
            ({"timestep_embedding_size": 255}, "timestep_embedding_size"),
            ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
            ({"tie_word_embeddings": True}, "tie_word_embeddings"),
            ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters"),
        ],
    )
    def test_bad_sizes(self, options, message):
        with pytest.raises(Exception, match=message):
            FLMConfig(**options)

    def test_size_of_the_published_models(self):
        with torch.device("meta"):
            model = FLMModel(FLMConfig(vocab_size=50258, max_position_embeddings=1024))
        assert 165e6 < model.num_parameters() < 175e6

    def test_saves_and_loads(self, tmp_path):
        config = FLMConfig(vocab_size=100, attn_logit_softcapping=None, eos_token_id=2)
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}


class TestFinalLogitSoftcapping:
    """A cap of 0.5, where it counts, against outputs of the head that are capped here."""

    times = torch.tensor([0.1, 0.5, 0.7]), torch.tensor([0.1, 0.9, 1.0])

    @staticmethod
    def capped(model, hidden_states):
        return 0.5 * torch.tanh(model.lm_head(hidden_states) / 0.5)

    def build(self, model_class):
        flm = build_flm(final_logit_softcapping=0.5)
        if model_class is FLMModel:
            return flm
        model = model_class.from_flm(flm).eval()
        if model_class is FMLMTwoNetworkModel:
            torch.nn.init.normal_(model.correction.lm_head.weight)
        return model

    def expected(self, model, state):
        hidden_states = model.encode(state, *self.times)
        if not isinstance(model, FMLMTwoNetworkModel):
            return self.capped(model, hidden_states).softmax(-1)
        s, t = (model.time_map.tau_to_t(tau)[:, None, None] for tau in self.times)
        flow, correction = hidden_states.chunk(2, dim=-1)
        raw = model.correction.lm_head(correction)  # which no cap touches
        assert raw.abs().max() > 1
        return self.capped(model.flow, flow).softmax(-1) + 0.5 * (t - s) * (1 - s) * raw

    @pytest.mark.parametrize("model_class", [FLMModel, FMLMModel, FMLMTwoNetworkModel])
    def test_posterior_and_forward(self, model_class, path):
        model = self.build(model_class)
        assert model.config.final_logit_softcapping == 0.5
        state = torch.randn(3, 12, model.state_embedding.shape[1])
        expected = self.expected(model, state)
        torch.testing.assert_close(model.posterior(state, *self.times).dense(), expected)
        output = model(inputs_embeds=state, timesteps=self.times[0], target_timesteps=self.times[1])
        torch.testing.assert_close(two_time_denoiser(output), expected)
        with torch.no_grad():  # in place
            torch.testing.assert_close(model.posterior(state, *self.times).dense(), expected)

    @pytest.mark.parametrize("model_class", [FLMModel, FMLMModel, FMLMTwoNetworkModel])
    def test_guidance(self, model_class):
        model, worse = self.build(model_class), build_flm(final_logit_softcapping=0.5, num_hidden_layers=1)
        both = Autoguidance(model, worse, 2.0)
        state = torch.randn(3, 12, both.state_embedding.shape[1])
        own, other = state.tensor_split([model.state_embedding.shape[1]], dim=-1)
        strong = self.expected(model, own)
        weak = self.capped(worse, worse.encode(other, self.times[0])).softmax(-1)
        delta = both.posterior(state, *self.times).dense()
        torch.testing.assert_close(delta, strong + 2.0 * (strong - weak))

    @pytest.mark.parametrize("model_class", [FLMModel, FMLMModel])
    def test_reward(self, model_class):
        model, seen = self.build(model_class), []

        def reward(soft_tokens):
            seen.append(soft_tokens.detach())
            return soft_tokens[..., 0].sum(dim=-1)

        state = torch.randn(3, 12, 32)
        model.generate(prior_state=state, num_steps=1, reward=reward, reward_scale=1.0)
        hidden_states = model.encode(state, torch.zeros(3), torch.ones(3))
        torch.testing.assert_close(seen[0], self.capped(model, hidden_states).softmax(-1))

    def test_derivative_in_time(self):
        model = self.build(FMLMModel).double()
        torch.nn.init.normal_(model.target_time_embedding.linear_2.weight)
        state = torch.randn(3, 12, 32, dtype=torch.float64)
        start, end = (tau.double() for tau in self.times)
        delta = lambda tau: model.predict(model.encode(state, start, tau), start, tau)  # noqa: E731
        with torch.no_grad():  # as targets are made
            _, change = torch.func.jvp(delta, (end,), (torch.ones_like(end),))
            # Times are in float32 within the network: a wide difference.
            difference = (delta(end + 1e-3) - delta(end - 1e-3)) / 2e-3
        torch.testing.assert_close(change, difference, rtol=2e-2, atol=2e-2 * change.abs().max().item())

    @pytest.mark.parametrize("value", [0, -1.0])
    def test_values_that_make_no_sense(self, value):
        with pytest.raises(StrictDataclassError, match="`final_logit_softcapping` must be positive, or `None` for no"):
            FLMConfig(final_logit_softcapping=value)


class TestSaving:
    def test_reloaded_model_is_bit_equal(self, flm, batch, tmp_path):
        flm.save_pretrained(tmp_path)
        reloaded = AutoModel.from_pretrained(tmp_path)
        assert type(reloaded) is FLMModel
        assert torch.equal(reloaded(**batch).logits, flm(**batch).logits)
        noise = torch.Generator().manual_seed(0)
        expected = flm.generate(num_samples=2, num_steps=3, generator=noise)
        assert torch.equal(reloaded.generate(num_samples=2, num_steps=3, generator=noise.manual_seed(0)), expected)
        assert not list(reloaded.buffers()), "buffers come back from `from_pretrained` as garbage"

    def test_loads_as_remote_code_in_a_process_without_the_package(self, flm, batch, tmp_path):
        flm.save_pretrained(tmp_path / "model")
        script = f"""
import sys
sys.path = [path for path in sys.path if path not in ("", {str(oracle.FIXTURES.parents[1])!r})]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
assert "modeling_flm" not in sys.modules and type(model).__module__.startswith("transformers_modules")
logits = model(torch.tensor({batch["input_ids"].tolist()}), torch.tensor({batch["timesteps"].tolist()})).logits
tokens = model.generate(num_samples=2, num_steps=4, generator=torch.Generator().manual_seed(7))
torch.save((logits, tokens), {str(tmp_path / "result.pt")!r})
"""
        environment = {"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
        logits, tokens = torch.load(tmp_path / "result.pt")
        assert torch.equal(logits, flm(**batch).logits)
        assert torch.equal(
            tokens, flm.generate(num_samples=2, num_steps=4, generator=torch.Generator().manual_seed(7))
        )

    def test_generation_config_is_saved(self, flm, tmp_path):
        flm.generation_config.num_steps = 3
        flm.generation_config.temperature = 0.7
        flm.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "generation_config.json").read_text())["num_steps"] == 3
        reloaded = AutoModel.from_pretrained(tmp_path)
        assert reloaded.generation_config.num_steps == 3
        assert reloaded.generation_config.temperature == 0.7
        assert reloaded.generate(return_dict_in_generate=True).num_forward_passes.eq(3).all()

    def test_device_map(self, flm, batch, tmp_path):
        flm.save_pretrained(tmp_path)
        expected = flm.generate(num_samples=2, num_steps=3, generator=torch.Generator().manual_seed(0))
        for device_map in ("auto", {"": "cpu"}):
            model = AutoModel.from_pretrained(tmp_path, device_map=device_map)
            assert torch.equal(model(**batch).logits, flm(**batch).logits)
            tokens = model.generate(num_samples=2, num_steps=3, generator=torch.Generator().manual_seed(0))
            assert torch.equal(tokens, expected)

    def test_weights_offloaded_to_disk(self, flm, batch, tmp_path):
        flm.save_pretrained(tmp_path / "model")
        device_map = {name: "disk" for name, _ in flm.named_children()} | {"time_embedding": "cpu", "norm": "cpu"}
        model = AutoModel.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert model.embed_tokens.weight.device.type == "meta"
        assert torch.equal(model(**batch).logits, flm(**batch).logits)
        expected = flm.generate(num_samples=2, num_steps=3, generator=torch.Generator().manual_seed(0))
        assert torch.equal(
            model.generate(num_samples=2, num_steps=3, generator=torch.Generator().manual_seed(0)), expected
        )


class TestAttention:
    def test_softcap_defaults_to_eager_and_refuses_sdpa(self, flm):
        assert flm.config._attn_implementation == "eager"
        with pytest.raises(ValueError, match="'sdpa'` cannot apply `attn_logit_softcapping=50.0`"):
            flm.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="attn_logit_softcapping"):
            AutoModel.from_config(flm.config, attn_implementation="sdpa")

    def test_no_softcap_defaults_to_sdpa_which_equals_eager(self, batch):
        model = build_flm(attn_logit_softcapping=None)
        assert model.config._attn_implementation == "sdpa"
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[1, 5:] = 0
        fast = model(**batch, attention_mask=mask).logits[:, :5]
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**batch, attention_mask=mask).logits[:, :5], fast)

    def test_softcap_is_applied(self, batch):
        hard = build_flm(attn_logit_softcapping=0.01)
        soft = build_flm(attn_logit_softcapping=None)
        soft.load_state_dict(hard.state_dict())
        hidden = torch.randn(3, 12, 32)
        attention = hard.layers[0].self_attn
        query = key = value = torch.randn(3, 4, 12, 8)
        from modeling_flm.backbone_flm import eager_attention_forward

        _, weights = eager_attention_forward(attention, query, key, value, None, scaling=10.0, softcap=0.01)
        logits = (query @ key.transpose(2, 3) * 10.0).double()
        expected = (0.01 * torch.tanh(logits / 0.01)).softmax(-1)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(
            hard(inputs_embeds=hidden, timesteps=batch["timesteps"]).logits,
            soft(inputs_embeds=hidden, timesteps=batch["timesteps"]).logits,
        )

    @pytest.mark.parametrize("softcap", [0.5, None])
    def test_flex_attention_equals_eager(self, batch, softcap):
        model = build_flm(attn_logit_softcapping=softcap, attn_implementation="eager").requires_grad_(False)
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[1, 5:] = 0
        for attention_mask in (None, mask):
            model.set_attn_implementation("eager")
            eager = model(**batch, attention_mask=attention_mask).logits
            model.set_attn_implementation("flex_attention")
            flex = model(**batch, attention_mask=attention_mask).logits
            torch.testing.assert_close(flex[0], eager[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(flex[1, :5], eager[1, :5], rtol=1e-4, atol=1e-5)

    def test_missing_flash_attention_is_a_clear_error(self, flm):
        if torch.cuda.is_available():
            pytest.skip("flash attention may be installed")
        with pytest.raises((ImportError, ValueError), match="(?i)flash.?attention"):
            flm.set_attn_implementation("flash_attention_2")


class TestPrecisionAndSpeed:
    def test_bfloat16_keeps_norms_and_head_in_float32(self, flm, batch, tmp_path):
        flm.save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            in_float32 = any(part in name for part in ("norm", "lm_head", "time_embedding"))
            assert parameter.dtype == (torch.float32 if in_float32 else torch.bfloat16), name
        output = model(**batch)
        assert output.logits.dtype == output.last_hidden_state.dtype == torch.float32
        expected = flm(**batch).logits
        assert (output.logits - expected).abs().max() < 0.03 * expected.abs().max()
        assert model.generate(num_samples=2, num_steps=3).shape == (2, 12)
        state = model.make_state(batch["input_ids"], torch.rand(3), torch.randn(3, 12, 32))
        assert state.dtype == torch.float32

    def test_autocast_keeps_state_and_head_in_float32(self, flm, batch):
        noise, tau = torch.randn(3, 12, 32), batch["timesteps"]
        inputs, weights = [], []
        flm.layers[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        flm.layers[0].mlp.register_forward_hook(lambda module, args, output: weights.append(output))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = flm(inputs_embeds=flm.make_state(batch["input_ids"], tau, noise), timesteps=tau)
        assert weights[0].dtype == torch.bfloat16
        assert output.logits.dtype == torch.float32
        exact = flm(inputs_embeds=flm.make_state(batch["input_ids"], tau, noise), timesteps=tau)
        assert torch.equal(inputs[0], inputs[1])
        assert (output.logits - exact.logits).abs().max() < 0.03 * exact.logits.abs().max()

    def test_activation_checkpointing_changes_no_gradient(self, flm, batch):
        def gradients():
            flm.zero_grad()
            input_ids, tau = batch.values()
            flm(inputs_embeds=flm.make_state(input_ids, tau, noise), timesteps=tau, labels=input_ids).loss.backward()
            return {name: parameter.grad.clone() for name, parameter in flm.named_parameters()}

        flm.config.dropout = 0.0
        for module in flm.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        noise = torch.randn(3, 12, 32)
        flm.train()
        expected = gradients()
        assert all(gradient.any() for gradient in expected.values())
        flm.activation_checkpointing_enable()
        assert any(layer.gradient_checkpointing for layer in flm.modules() if isinstance(layer, FLMLayer))
        calls = []
        flm.layers[0].norm1.register_forward_hook(lambda *args: calls.append(1))
        torch.testing.assert_close(gradients(), expected)
        assert len(calls) == 2, "the block was not computed again in the backward pass"

    @pytest.mark.slow
    def test_compiles_without_graph_breaks(self, batch):
        model = build_flm(dropout=0.0)
        compiled = torch.compile(model, fullgraph=True)
        input_ids, tau = batch.values()
        arguments = {
            "inputs_embeds": model.make_state(input_ids, tau, torch.randn(3, 12, 32)).detach(),
            "timesteps": tau,
        }
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
        expected = model(**arguments, labels=input_ids).loss
        expected.backward()
        gradient = model.layers[0].mlp.down_proj.weight.grad.clone()
        model.zero_grad()
        loss = compiled(**arguments, labels=input_ids).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(model.layers[0].mlp.down_proj.weight.grad, gradient, rtol=1e-3, atol=1e-5)
