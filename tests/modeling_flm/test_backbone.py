"""Attention: implementations, softcap, and weights computed in chunks."""

import pytest
import torch
import torch.nn.functional as F
from small_models import build_flm
from transformers import AutoModel

from modeling_flm import utils_flm


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

    @pytest.mark.slow
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


def test_eager_attention_holds_the_weights_of_a_chunk(flm, monkeypatch):
    state, tau = torch.randn(6, 12, 32), torch.full((6,), 0.5)
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[2:, 7:] = 0
    with torch.no_grad():
        expected, expected_masked = flm.encode(state, tau), flm.encode(state, tau, attention_mask=mask)
    monkeypatch.setitem(utils_flm.CHUNK_ELEMENTS, "cpu", 2 * 4 * 12**2)  # two texts, four heads
    softmax, seen = F.softmax, []
    monkeypatch.setattr(
        F, "softmax", lambda weights, **kwargs: seen.append(len(weights)) or softmax(weights, **kwargs)
    )
    with torch.no_grad():
        torch.testing.assert_close(flm.encode(state, tau), expected)
        torch.testing.assert_close(flm.encode(state, tau, attention_mask=mask), expected_masked)
        assert seen == [2] * 3 * 2 * 2
        weights = flm(inputs_embeds=state, timesteps=tau, output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (6, 4, 12, 12)
    seen.clear()
    flm.encode(state, tau)
    assert seen == [6] * 2
