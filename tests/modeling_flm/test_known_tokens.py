"""Samples with known tokens, against samples recorded when known tokens were clamped after every step."""

import pytest
import torch
from oracle import FIXTURES
from safetensors.torch import load_file
from small_models import build_model


VALUES = load_file(FIXTURES / "prompted" / "values.safetensors")
IDS, EXISTS = VALUES["input_ids"], VALUES["attention_mask"]
INPUTS = {
    "prefix": {"input_ids": IDS[:, :5]},
    "padded_prefix": {"input_ids": IDS[:, :5], "attention_mask": VALUES["prefix_mask"]},
    "infill": {"input_ids": IDS, "prompt_mask": ~VALUES["infill_mask"]},
    "padded_infill": {"input_ids": IDS, "prompt_mask": ~VALUES["infill_mask"], "attention_mask": EXISTS},
    "lengths": {"attention_mask": EXISTS},
}


def load(name: str):
    """The model of these samples."""
    model = build_model("flm" if name == "weak" else name, **({"hidden_size": 16} if name == "weak" else {}))
    weights = {key.removeprefix(f"{name}."): VALUES[key] for key in VALUES if key.startswith(f"{name}.")}
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
@pytest.mark.parametrize("known", INPUTS)
@pytest.mark.parametrize("is_guided", [False, True])
def test_prompted_samples_equal_the_recorded_ones(kind, known, is_guided):
    model = load(kind)
    guidance = {"guidance_model": load("weak"), "guidance_scale": 1.5} if is_guided else {}
    networks = [model, *([guidance["guidance_model"]] if is_guided else [])]
    prior_state = torch.cat([VALUES["prior_state"] @ network.state_embedding for network in networks], dim=-1)
    for num_steps in (1, 2, 5):
        tokens = model.generate(**INPUTS[known], prior_state=prior_state, num_steps=num_steps, **guidance)
        name = "guided_tokens" if is_guided else "tokens"
        assert torch.equal(tokens, VALUES[f"{name}.{kind}.{known}.{num_steps}"])
