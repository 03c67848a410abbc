"""The models: published values, starts of flow maps, saving and loading, precision, compilation."""

import json
import subprocess
import sys

import oracle
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from small_models import build_flm, two_time_denoiser
from transformers import AutoModel

from modeling_flm import FLMConfig, FLMModel, FMLMConfig, FMLMModel, FMLMTwoNetworkConfig, FMLMTwoNetworkModel
from modeling_flm.backbone_flm import FLMLayer
from modeling_flm.guidance_flm import Autoguidance
from modeling_flm.joint_noise import JointNoise


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
        batch = {"inputs_embeds": torch.randn(3, 12, 32), "timesteps": batch["timesteps"]}
        tokens = labels.clamp(min=0)
        output = flm(**batch, labels=labels)
        losses = -output.logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
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
            ({"input_ids": torch.ones(3, 4).long()}, "Pass `timesteps`.*use `FLMTrainer`"),
            (
                {"input_ids": torch.ones(3, 4).long(), "timesteps": torch.rand(3, 5)},
                r"`timesteps` must be a tensor of shape \(3,\), one time per sequence, or \(3, 4\), one per token, got \(3, 5\)",
            ),
            (
                {
                    "input_ids": torch.ones(3, 4).long(),
                    "timesteps": torch.rand(3),
                    "target_timesteps": torch.rand(3, 4),
                },
                "`target_timesteps` must have the shape of `timesteps`",
            ),
            (
                {"input_ids": torch.ones(3, 4).long(), "timesteps": 1},
                r"`timesteps` must be a tensor of shape \(3,\), .*got `1`",
            ),
            (
                {"input_ids": torch.ones(3, 4).long(), "timesteps": torch.tensor([0.0, 0.5, 5.0])},
                r"must be in \[0, 1\]",
            ),
            (
                {"input_ids": torch.ones(3, 4).long(), "timesteps": torch.tensor([0.0, -3.0, 1.0])},
                r"must be in \[0, 1\]",
            ),
            (
                {
                    "input_ids": torch.ones(3, 4).long(),
                    "timesteps": torch.tensor([0.1, 0.6, 1.0]),
                    "target_timesteps": torch.tensor([0.1, 0.5, 1.0]),
                },
                "`target_timesteps` at least `timesteps`",
            ),
            (
                {"input_ids": torch.ones(3, 4).long(), "timesteps": torch.rand(3), "labels": torch.ones(3, 4).long()},
                r"`labels` need noised states.*`inputs_embeds=model.make_state\(",
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

    def test_each_model_finds_its_part_of_a_joint_noise(self, flm, batch):
        flow_map = FMLMTwoNetworkModel.from_flm(build_flm())
        joint_noise = JointNoise.of_networks(flm, flow_map)
        noise = torch.randn(3, 12, 53)  # V is below the joint width: noise is one-hot noise
        for model in (flow_map, flm):
            state = model.make_state(batch["input_ids"], torch.zeros(3), noise, joint_noise)
            torch.testing.assert_close(state, noise @ model.state_embedding)
        with pytest.raises(ValueError, match="`JointNoise.of_networks`"):
            build_flm().make_state(batch["input_ids"], torch.zeros(3), noise, joint_noise)


class TestFlowMaps:
    @pytest.mark.parametrize("model_class", [FMLMModel, FMLMTwoNetworkModel])
    def test_starts_as_its_teacher(self, flm, model_class):
        model = model_class.from_flm(flm).eval()
        tau_s, tau_t = torch.tensor([0.1, 0.5, 0.7]), torch.tensor([0.1, 0.9, 1.0])
        input_ids = torch.randint(53, (3, 12))
        delta = two_time_denoiser(model(input_ids, tau_s, tau_t))
        assert torch.equal(delta, flm(input_ids, tau_s).logits.softmax(-1))
        noise = torch.randn(3, 12, 53)
        expected = flm.generate(prior_state=noise @ flm.state_embedding, num_steps=3)
        assert torch.equal(model.generate(prior_state=noise @ model.state_embedding, num_steps=3, gamma=0), expected)

    def test_copies_what_the_teacher_is(self, flm):
        flm.config.eos_token_id = 2
        student = FMLMModel.from_flm(flm, dropout=0.0, learned_loss_weighting=True)
        assert student.config.model_type == "fmlm" and student.config.eos_token_id == 2
        assert student.config.dropout == 0.0 and student.config.hidden_size == 32
        assert student.embed_tokens.weight.data_ptr() != flm.embed_tokens.weight.data_ptr()
        assert not student.target_time_embedding.linear_2.weight.any()
        assert student.target_time_embedding.linear_1.weight.any()
        with pytest.raises(ValueError, match="FMLMConfig has no field dorpout"):
            FMLMModel.from_flm(flm, dorpout=0.0)
        for size in (1, 3):
            with pytest.raises(ValueError, match="must leave all sizes as they are"):
                FMLMModel.from_flm(flm, num_hidden_layers=size)
        assert FMLMTwoNetworkModel.from_flm(flm).config.learned_loss_weighting
        sdpa = FMLMModel.from_flm(build_flm(attn_logit_softcapping=None))
        assert sdpa.config._attn_implementation == "sdpa"

    def test_one_step_by_default(self, flm):
        for model in (FMLMModel.from_flm(flm), FMLMTwoNetworkModel.from_flm(flm)):
            assert model.generate(return_dict_in_generate=True).num_forward_passes.eq(1).all()
            assert model.generate(num_steps=3, return_dict_in_generate=True).num_forward_passes.eq(3).all()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "model_class, config_class", [(FMLMModel, FMLMConfig), (FMLMTwoNetworkModel, FMLMTwoNetworkConfig)]
    )
    def test_saves_loads_checkpoints_and_compiles(self, model_class, config_class, flm, tmp_path):
        model = model_class.from_flm(flm, learned_loss_weighting=True).eval()
        torch.nn.init.normal_(
            model.get_submodule("correction" if "Two" in model_class.__name__ else "").lm_head.weight
        )
        batch = {
            "input_ids": torch.randint(53, (3, 12)),
            "timesteps": torch.tensor([0.1, 0.5, 0.7]),
            "target_timesteps": torch.tensor([0.1, 0.9, 1.0]),
        }
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
            "AutoConfig": f"configuration_flm.{config_class.__name__}",
            **dict.fromkeys(
                ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"), f"modeling_flm.{model_class.__name__}"
            ),
        }
        reloaded = AutoModel.from_pretrained(tmp_path)
        assert type(reloaded) is model_class and type(reloaded.config) is config_class
        output, expected = reloaded(**batch), model(**batch)
        assert torch.equal(two_time_denoiser(output), two_time_denoiser(expected))
        log_weights = [each.log_loss_weight(batch["timesteps"]) for each in (reloaded, model)]
        assert torch.equal(*log_weights) and log_weights[0].shape == (3,)
        assert reloaded.generation_config.num_steps == 1
        if model_class is FMLMTwoNetworkModel:
            reloaded.train()
            assert not any(p.requires_grad for p in reloaded.flow.parameters()) and not reloaded.flow.training
            assert all(p.requires_grad for p in reloaded.correction.parameters()) and reloaded.correction.training
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the default is in test_compile.py
        with torch.no_grad():
            output = compiled(**batch)
            torch.testing.assert_close(two_time_denoiser(output), two_time_denoiser(expected), rtol=1e-4, atol=1e-4)
        noise = torch.randn(3, 12, 53 if model_class is FMLMTwoNetworkModel else 32)
        input_ids = batch.pop("input_ids")

        def run():
            torch.manual_seed(0)
            state = model.make_state(input_ids, batch["timesteps"], noise)
            two_time_denoiser(model(inputs_embeds=state, **batch)).square().sum().backward()

        model.train()
        run()
        gradient = model.embeddings[-1].weight.grad.clone()
        model.zero_grad()
        model.activation_checkpointing_enable()
        run()
        torch.testing.assert_close(model.embeddings[-1].weight.grad, gradient)

    @pytest.mark.parametrize("model_class", [FMLMModel, FMLMTwoNetworkModel])
    def test_bfloat16(self, flm, model_class, tmp_path):
        flm.save_pretrained(tmp_path / "flm")
        teacher = FLMModel.from_pretrained(tmp_path / "flm", dtype=torch.bfloat16)
        model = model_class.from_flm(teacher, learned_loss_weighting=True).eval()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        batch = (torch.randint(53, (3, 12)), torch.tensor([0.1, 0.5, 0.7]), torch.tensor([0.1, 0.9, 1.0]))
        expected = teacher(*batch[:2]).logits
        tolerance = 0.03 * expected.abs().max().item()
        delta = two_time_denoiser(model(*batch))
        torch.testing.assert_close(delta.log(), expected.log_softmax(-1), rtol=0, atol=tolerance)
        model.save_pretrained(tmp_path / "model")
        low = model_class.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
        torch.testing.assert_close(two_time_denoiser(low(*batch)).log(), delta.log(), rtol=0, atol=tolerance)
        assert low.generate(num_samples=2).shape == (2, 12)

    def test_loss_against_labels_is_a_cross_entropy(self, flm):
        input_ids, tau = torch.randint(53, (3, 12)), torch.tensor([0.1, 0.5, 0.7])
        noise = torch.randn(3, 12, 32)
        expected = flm(None, tau, inputs_embeds=flm.make_state(input_ids, tau, noise), labels=input_ids).loss
        for model in (FMLMModel.from_flm(flm), FMLMTwoNetworkModel.from_flm(flm)):
            state = flm.make_state(input_ids, tau, noise).repeat(1, 1, len(model.state_sizes))
            loss = model.eval()(None, tau, torch.ones(3), inputs_embeds=state, labels=input_ids).loss
            torch.testing.assert_close(loss, expected)

    def test_needs_target_timesteps(self, flm):
        with pytest.raises(ValueError, match="Pass `target_timesteps`"):
            FMLMModel.from_flm(flm)(torch.ones(1, 3).long(), torch.rand(1))

    def test_processors_bind_the_correction_too(self, flm):
        from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

        model = FMLMTwoNetworkModel.from_flm(flm).eval()
        torch.nn.init.normal_(model.correction.lm_head.weight, std=10)
        tokens = model.generate(num_samples=20, num_steps=2, generator=torch.Generator().manual_seed(0))
        banned = tokens.unique()[:5].tolist()
        processor = LogitsProcessorList([SuppressTokensLogitsProcessor(banned, device="cpu")])
        tokens = model.generate(num_samples=20, num_steps=2, logits_processor=processor)
        assert not torch.isin(tokens, torch.tensor(banned)).any()


class TestFinalLogitSoftcapping:
    """A softcap of 0.5, low enough to matter, against outputs of the head that the test caps."""

    times = torch.tensor([0.1, 0.5, 0.7]), torch.tensor([0.1, 0.9, 1.0])

    @staticmethod
    def capped(model, hidden_states):
        return 0.5 * torch.tanh(model.head_outputs(hidden_states) / 0.5)

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
        raw = model.correction.head_outputs(correction)  # which no cap touches
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

        def delta(tau):
            return model.predict(model.encode(state, start, tau), start, tau)

        with torch.no_grad():  # as targets are made
            _, change = torch.func.jvp(delta, (end,), (torch.ones_like(end),))
            # Times are in float32 within the network: a wide difference.
            difference = (delta(end + 1e-3) - delta(end - 1e-3)) / 2e-3
        torch.testing.assert_close(change, difference, rtol=2e-2, atol=2e-2 * change.abs().max().item())

    @pytest.mark.parametrize("value", [0, -1.0])
    def test_invalid_softcaps(self, value):
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
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the default is in test_compile.py
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


def test_model_with_the_configuration_of_another_is_refused(flm):
    with pytest.raises(TypeError, match="to start from a trained FLM use `FMLMModel.from_flm"):
        FMLMModel(flm.config)
    with pytest.raises(TypeError, match="got an `FMLMConfig`: build an `FMLMModel` with it"):
        FLMModel(FMLMModel.from_flm(flm).config)
