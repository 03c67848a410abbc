"""What writes the texts of a batch, in this process."""

import generators
import pytest
import torch


class TestWriters:
    def test_draws_have_the_probabilities_of_the_model(self):
        scores = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
        texts = [generators.Text([0], 4, seed=seed, temperature=1.5) for seed in range(4000)]
        drawn = generators.DrawTokens(texts)(None, scores.repeat(4000, 1)).argmax(dim=1)
        share = torch.bincount(drawn, minlength=4) / 4000
        torch.testing.assert_close(share, (scores / 1.5).softmax(dim=0), atol=0.025, rtol=0)

    @pytest.mark.parametrize("name", ["fmlm", "gpt2"])
    def test_nobody_waits(self, name, models):
        writer = (generators.FlowWriter if name == "fmlm" else generators.CausalWriter)(
            models[name], models["tokenizer"]
        )
        texts = [generators.Text(writer.encode("the cat"), 16, seed) for seed in range(2)]
        texts[0].is_abandoned = True
        assert len(writer.write(texts)) == 2
        texts[1].is_abandoned = True
        with pytest.raises(generators.Abandoned):
            writer.write(texts)
