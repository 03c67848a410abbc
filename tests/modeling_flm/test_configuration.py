"""The configuration: invalid sizes, saving and loading."""

import pytest
import torch
from transformers import AutoConfig

from modeling_flm import FLMConfig, FLMModel, FMLMModel


class TestConfig:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"vocab_size": 1}, "vocab_size"),
            ({"num_hidden_layers": -1}, "`num_hidden_layers` must be at least 1, got -1"),
            ({"max_position_embeddings": 0}, "`max_position_embeddings` must be at least 1"),
            ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1"),
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

    def test_another_model_type_is_refused(self, tmp_path):
        flm = FLMModel(FLMConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        flm.save_pretrained(tmp_path / "flm")
        FMLMModel.from_flm(flm).save_pretrained(tmp_path / "fmlm")
        with pytest.raises(ValueError, match="'flm', not 'fmlm'.*`FMLMModel.from_flm"):
            FMLMModel.from_pretrained(tmp_path / "flm")
        with pytest.raises(ValueError, match="'fmlm', not 'flm'.*`AutoModel`"):
            FLMModel.from_pretrained(tmp_path / "fmlm")

    def test_misspelled_fields_are_suggested(self, caplog):
        FLMConfig(hidden_sise=3, num_layers=2, id2label={0: "a"}, my_own=1)
        assert "no `hidden_sise`: did you mean `hidden_size`?" in caplog.text
        assert "did you mean `num_hidden_layers`?" in caplog.text and caplog.text.count("did you mean") == 2

    def test_time_reparameterization_end_is_refused_unless_none(self, caplog):
        assert "time_reparameterization_end" not in FLMConfig(time_reparameterization_end=None).to_dict()
        assert "did you mean" not in caplog.text
        with pytest.raises(ValueError, match="`time_reparameterization_end` is not supported"):
            FLMConfig.from_dict({**FLMConfig().to_dict(), "time_reparameterization_end": 60.0})

    def test_saves_and_loads(self, tmp_path):
        config = FLMConfig(vocab_size=100, attn_logit_softcapping=None, eos_token_id=2)
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}
