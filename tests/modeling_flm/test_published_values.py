"""Values of the published code on tiny random weights, and recorded samples with prompts: equal token for token."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import FIXTURES
from released import FOLDER, SIZES, VALUES
from safetensors.torch import load_file
from small_models import build_model, sampling

from modeling_flm.hub.convert import convert


PROMPTED = load_file(FIXTURES / "prompted" / "values.safetensors")
IDS, EXISTS = PROMPTED["input_ids"], PROMPTED["attention_mask"]
INPUTS = {
    "prefix": {"input_ids": IDS[:, :5]},
    "padded_prefix": {"input_ids": IDS[:, :5], "attention_mask": PROMPTED["prefix_mask"]},
    "infill": {"input_ids": IDS, "prompt_mask": ~PROMPTED["infill_mask"]},
    "padded_infill": {"input_ids": IDS, "prompt_mask": ~PROMPTED["infill_mask"], "attention_mask": EXISTS},
    "lengths": {"attention_mask": EXISTS},
}
PATHS = ["whole", *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 7, "compiled"))]


class TestModels:
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
        model = oracle.flm()
        prior_state = values["prior_state"] @ model.state_embedding
        tokens = model.generate(prior_state=prior_state, num_steps=num_steps, **sampling(path))
        assert torch.equal(tokens, values[f"flm.tokens_{num_steps}"])

    @pytest.mark.parametrize("stage, build_model", [("stage1", oracle.two_network_fmlm), ("stage2", oracle.fmlm)])
    @pytest.mark.parametrize("num_steps", [1, 2, 4])
    def test_tokens_of_flow_maps(self, stage, build_model, num_steps, path):
        values = oracle.values()
        model = build_model()
        prior_state = values["prior_state"] @ model.state_embedding
        tokens = model.generate(prior_state=prior_state, num_steps=num_steps, **sampling(path))
        assert torch.equal(tokens, values[f"{stage}.tokens_{num_steps}"])


def known_of(name: str) -> dict:
    mask = SIZES["known"][name]
    return {} if mask is None else {"input_ids": VALUES["plus.known_ids"], "prompt_mask": VALUES[mask]}


class TestRounds:
    @pytest.mark.parametrize("name", SIZES["known"])
    def test_block_length(self, name, path):
        model = convert(FOLDER / "fmlm_plus.ckpt")
        prior_state = VALUES["prior_state"] @ model.state_embedding
        for block_length, num_steps in SIZES["block_settings"]:
            options = {"prior_state": prior_state, "block_length": block_length, "num_steps": num_steps}
            tokens = model.generate(**known_of(name), **options, fresh_noise=False, **sampling(path))
            assert torch.equal(tokens, VALUES[f"plus.block_{block_length}_{num_steps}_{name}_tokens"])

    @pytest.mark.parametrize("path", PATHS, indirect=True)
    @pytest.mark.parametrize("name", SIZES["known"])
    def test_num_rounds(self, name, path):
        model = convert(FOLDER / "fmlm_plus.ckpt")
        prior_state = VALUES["prior_state"] @ model.state_embedding
        settings = [(i, each) for i, each in enumerate(SIZES["refine_settings"]) if each["known"] == name]
        assert len(settings) == {"none": 48, "prompt": 60, "infill": 60}[name]
        if path == "compiled":  # which takes long for each number of texts
            settings = [(i, each) for i, each in settings if not each["fresh_noise"]][::9]
        for index, setting in settings:
            noise = iter(VALUES["plus.refine_noise"] @ model.state_embedding)
            budget = setting["top_k"]
            output = model.generate(
                **known_of(name),
                prior_state=prior_state,
                noise_source=lambda samples: next(noise)[samples],  # noqa: B023
                num_rounds=setting["rounds"],
                num_steps=setting["flow_steps"],
                commit_threshold=setting["threshold"],
                commit_budget="uniform" if budget == "uniform_budget" else budget,
                fresh_noise=setting["fresh_noise"],
                return_dict_in_generate=True,
                **sampling(path),
            )
            assert torch.equal(output.sequences, VALUES["plus.refine_tokens"][index]), setting
            committed = [(output.commit_rounds == round + 1).sum().item() / 3 for round in range(setting["rounds"])]
            expected = setting["newly_committed_per_round"]
            # After the last round everything is known, what the rule would have chosen and what not.
            assert committed[:-1] == pytest.approx(expected[:-1], abs=1e-3)
            finished_by = output.commit_rounds.amax(dim=1)
            assert torch.equal(output.num_forward_passes, finished_by * setting["flow_steps"])


def load_recorded(name: str):
    """The model of the recorded samples."""
    model = build_model("flm" if name == "weak" else name, **({"hidden_size": 16} if name == "weak" else {}))
    weights = {key.removeprefix(f"{name}."): PROMPTED[key] for key in PROMPTED if key.startswith(f"{name}.")}
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
@pytest.mark.parametrize("known", INPUTS)
@pytest.mark.parametrize("is_guided", [False, True])
def test_prompted_samples_equal_the_recorded_ones(kind, known, is_guided):
    model = load_recorded(kind)
    guidance = {"guidance_model": load_recorded("weak"), "guidance_scale": 1.5} if is_guided else {}
    networks = [model, *([guidance["guidance_model"]] if is_guided else [])]
    prior_state = torch.cat([PROMPTED["prior_state"] @ network.state_embedding for network in networks], dim=-1)
    for num_steps in (1, 2, 5):
        tokens = model.generate(**INPUTS[known], prior_state=prior_state, num_steps=num_steps, **guidance)
        name = "guided_tokens" if is_guided else "tokens"
        assert torch.equal(tokens, PROMPTED[f"{name}.{kind}.{known}.{num_steps}"])
