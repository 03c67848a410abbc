"""The bound on the likelihood: against integrals on a grid, exact distributions, and itself in other batches."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from exact_flows import ExactFlowMap
from example_scripts import run_here
from small_models import build_flm, build_model
from tensors import set_chunk
from train_tiny import build, logged

from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.joint_noise import JointNoise
from modeling_flm.likelihood_flm import last_signal, whitening_of
from modeling_flm.trainers import train_tokenizer
from modeling_flm.trainers.evaluation import evaluate_likelihood


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts_of(flm, num_texts: int = 5) -> torch.LongTensor:
    return torch.randint(flm.config.vocab_size, (num_texts, 12), generator=generator(1))


def integral(model, token: int) -> float:
    """The bound of a text of one token: trapezoids over signal levels, Gauss-Hermite quadrature over two-dimensional noise."""
    embedding = model.state_embedding.double()
    vocab_size, width = embedding.shape
    if vocab_size <= width:  # one-hot space, of two tokens
        noise_map, errors_of = embedding, lambda delta: delta - torch.eye(vocab_size)[token]
        end = 8.0
    else:  # two columns: in the coordinates in which the noise is white
        covariance = embedding.T @ embedding
        values, vectors = torch.linalg.eigh(covariance)
        noise_map = (vectors * values.sqrt()) @ vectors.T
        inverse = (vectors / values.sqrt()) @ vectors.T
        errors_of = lambda delta: (delta - torch.eye(vocab_size)[token]).double() @ embedding @ inverse  # noqa: E731
        end = 8.0 / (embedding @ inverse).norm(dim=1).min().item()
    t = model.time_map.tau_to_t(torch.tensor(1 - 1e-4, dtype=torch.float64)).item()
    end = min(end, t / (1 - t))
    nodes, weights = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(24))
    noise = torch.tensor(list(itertools.product(nodes.tolist(), repeat=2)), dtype=torch.float64)
    weights = (weights[:, None] * weights).flatten() / (2 * math.pi)

    def expectation(a: float, function) -> float:
        t = a / (1 + a)
        state = (1 - t) * noise @ noise_map + t * embedding[token]
        tau = model.time_map.t_to_tau(torch.tensor([t], dtype=torch.float64)).float().expand(len(noise))
        with torch.no_grad():
            delta = model.posterior(state[:, None].float(), tau, tau).dense()[:, 0]
        return (weights * function(delta)).sum().item()

    levels = torch.linspace(0, end, 400, dtype=torch.float64)
    errors = [a * expectation(a, lambda delta: errors_of(delta).square().sum(-1)) for a in levels.tolist()]
    rest = expectation(end, lambda delta: -delta[:, token].log().double())
    return torch.trapezoid(torch.tensor(errors, dtype=torch.float64), levels).item() + rest


@pytest.mark.slow
@pytest.mark.parametrize("time_reparameterization", ["argmax", None])
@pytest.mark.parametrize(("vocab_size", "width"), [(2, 4), (4, 2)])
def test_log_likelihood_is_the_integral(vocab_size, width, time_reparameterization):
    torch.manual_seed(3)
    sizes = {"vocab_size": vocab_size, "hidden_size": width, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = build_flm(**sizes, max_position_embeddings=1, time_reparameterization=time_reparameterization)
    expected = integral(model, token=1)
    output = model.log_likelihood_bound(
        torch.ones(4000, 1, dtype=torch.long), num_times=128, batch_size=20_000, generator=generator()
    )
    error = output.log_likelihood.std().item() / math.sqrt(4000)
    assert error < 1.5e-3 * expected
    assert abs(-output.log_likelihood.mean().item() - expected) < 1e-3 * expected + 2 * error


class TestExactPosterior:
    texts, weights = ((0, 0), (1, 1), (0, 3)), (0.5, 0.3, 0.2)

    def sample(self, num_texts: int) -> torch.LongTensor:
        chosen = torch.multinomial(torch.tensor(self.weights), num_texts, replacement=True, generator=generator())
        return torch.tensor(self.texts)[chosen]

    def test_log_likelihood_is_the_entropy(self):
        model = ExactFlowMap(self.texts, self.weights)
        output = model.log_likelihood_bound(self.sample(4000), batch_size=20_000, generator=generator())
        entropy = -sum(weight * math.log(weight) for weight in self.weights)
        assert abs(-output.log_likelihood.mean().item() - entropy) < 0.005 * entropy + 3 * self.error(output)
        # Of each text as well, as they are so different
        assert (output.num_tokens == 2).all()

    def test_conditional_bounds_add_up(self):
        model, texts = ExactFlowMap(self.texts, self.weights), self.sample(4000)
        first = torch.tensor([[1, 0]]).expand(4000, 2)
        output = model.log_likelihood_bound(texts, prompt_mask=first, batch_size=20_000, generator=generator())
        # The first token is 0 with probability 0.7, and leaves a choice then.
        conditional = -0.5 * math.log(5 / 7) - 0.2 * math.log(2 / 7)
        of_first = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
        entropy = -sum(weight * math.log(weight) for weight in self.weights)
        assert conditional + of_first == pytest.approx(entropy)
        assert abs(-output.log_likelihood.mean().item() - conditional) < 0.005 * conditional + 3 * self.error(output)
        certain = output.log_likelihood[texts[:, 0] == 1]
        assert certain.abs().max() < 1e-6
        assert (output.num_tokens == 1).all()

    @staticmethod
    def error(output) -> float:
        return output.standard_error.square().sum().sqrt().item() / len(output.standard_error)


def test_standard_error_of_log_likelihood_is_that_of_repetitions(flm):
    text = texts_of(flm, 1).expand(400, -1)
    output = flm.log_likelihood_bound(text, num_times=16, batch_size=1024, generator=generator())
    ratio = output.standard_error.square().mean().sqrt() / output.log_likelihood.std()
    assert 0.85 < ratio < 1.3


def test_log_likelihood_does_not_depend_on_batches(flm):
    texts, mask = texts_of(flm), torch.ones(5, 12, dtype=torch.long)
    mask[1, 7:] = mask[3, 4:] = 0
    known = torch.zeros_like(mask)
    known[2, :6] = 1
    whole = flm.log_likelihood_bound(texts, mask, known, generator=generator())
    for batch_size in (1, 7):
        other = flm.log_likelihood_bound(texts, mask, known, batch_size=batch_size, generator=generator())
        torch.testing.assert_close(other.log_likelihood, whole.log_likelihood, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.standard_error, whole.standard_error, rtol=1e-3, atol=1e-4)
    fewer = flm.log_likelihood_bound(texts[:3], mask[:3], known[:3], generator=generator())
    torch.testing.assert_close(fewer.log_likelihood, whole.log_likelihood[:3], rtol=1e-4, atol=1e-4)
    assert whole.num_tokens.tolist() == [12, 7, 6, 4, 12]
    # What stands under padding does not matter, nor how much of it there is.
    padded = flm.log_likelihood_bound(texts.masked_fill(mask == 0, -100), mask, known, generator=generator())
    torch.testing.assert_close(padded.log_likelihood, whole.log_likelihood)
    generators = [generator(seed) for seed in (1, 3)]
    rows = torch.tensor([1, 3])
    long = flm.log_likelihood_bound(texts[rows], mask[rows], generator=generators)
    generators = [generator(seed) for seed in (1, 3)]
    short = flm.log_likelihood_bound(texts[rows, :7], mask[rows, :7], generator=generators)
    torch.testing.assert_close(short.log_likelihood, long.log_likelihood, rtol=1e-4, atol=1e-4)


def test_chunks_of_log_likelihood(flm, monkeypatch):
    whole = flm.log_likelihood_bound(texts_of(flm), generator=generator())
    set_chunk(monkeypatch, 7, 64, flm.config.vocab_size)
    chunked = flm.log_likelihood_bound(texts_of(flm), generator=generator())
    torch.testing.assert_close(chunked.log_likelihood, whole.log_likelihood, rtol=1e-4, atol=1e-4)


def test_log_likelihood_of_flow_maps_is_that_of_their_diagonal(flm):
    texts = texts_of(flm)
    expected = flm.log_likelihood_bound(texts, generator=generator()).log_likelihood
    for model in (FMLMModel.from_flm(flm), FMLMTwoNetworkModel.from_flm(flm)):
        # The start of a flow map is its teacher.
        value = model.log_likelihood_bound(texts, generator=generator()).log_likelihood
        torch.testing.assert_close(value, expected)


def test_log_likelihood_is_in_evaluation_mode_and_leaves_the_mode(flm):
    texts = texts_of(flm)
    flm.config.dropout = 0.5
    expected = flm.log_likelihood_bound(texts, generator=generator()).log_likelihood
    flm.train()
    flm.layers[0].eval()
    torch.testing.assert_close(flm.log_likelihood_bound(texts, generator=generator()).log_likelihood, expected)
    assert flm.training and flm.layers[1].training and not flm.layers[0].training


def test_known_tokens_have_no_log_likelihood(flm):
    texts = texts_of(flm)
    output = flm.log_likelihood_bound(texts, prompt_mask=torch.ones_like(texts), generator=generator())
    assert not output.log_likelihood.any() and not output.standard_error.any() and not output.num_tokens.any()


def test_last_signal_is_where_tokens_are_read_or_training_ends():
    published = build_flm(vocab_size=53, hidden_size=64)
    assert whitening_of(JointNoise(published.state_embedding)) is None
    assert 4 < last_signal(published.time_map, None, published.state_embedding) < 8
    model = build_flm(vocab_size=53, hidden_size=8, time_reparameterization=None)
    noise = JointNoise(model.state_embedding)
    leverage = torch.linalg.qr(model.state_embedding.double()).Q.norm(dim=1)
    value = last_signal(model.time_map, whitening_of(noise), model.state_embedding)
    assert value == pytest.approx(8 / leverage.min().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(2, 12)}, "`input_ids` must be an integer tensor"),
        ({"input_ids": torch.zeros(0, 12, dtype=torch.long)}, "`input_ids` has no tokens"),
        ({"input_ids": torch.full((2, 12), 53)}, r"`input_ids` must be tokens in \[0, 53\)"),
        ({"attention_mask": torch.ones(2, 3)}, "`attention_mask` must have the shape of `input_ids`"),
        ({"prompt_mask": torch.ones(2, 3)}, "`prompt_mask` must have the shape of `input_ids`"),
        ({"num_times": 1}, "`num_times` must be an integer of at least 2"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
    ],
)
def test_bad_arguments_of_log_likelihood(flm, arguments, message):
    with pytest.raises(ValueError, match=message):
        flm.log_likelihood_bound(**{"input_ids": torch.zeros(2, 12, dtype=torch.long), **arguments})


class TestTrainer:
    @pytest.mark.parametrize("prompt_fraction", [0.0, 1.0])
    def test_eval_nll_is_that_of_the_averaged_weights(self, prompt_fraction, tmp_path):
        options = {"eval_likelihood_times": 16, "prompt_fraction": prompt_fraction, "save_strategy": "no"}
        trainer = build(tmp_path, max_steps=5, ema_decay=0.9, **options)
        trainer.train()
        metrics = trainer.evaluate()
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_nll"]))
        for batch_size in (1, 4):
            trainer.args.per_device_eval_batch_size = batch_size
            assert trainer.evaluate()["eval_nll"] == pytest.approx(metrics["eval_nll"], rel=1e-4)
        if prompt_fraction == 0:  # the estimate of somebody else, with other noise
            trainer.save_model()
            model, rows = FLMModel.from_pretrained(tmp_path), list(trainer.eval_dataset["input_ids"])
            repeated = [torch.tensor([row] * 20) for row in rows]
            outputs = [model.log_likelihood_bound(row, num_times=16, generator=generator()) for row in repeated]
            nll = -sum(output.log_likelihood.mean().item() for output in outputs) / sum(map(len, rows))
            assert metrics["eval_nll"] == pytest.approx(nll, rel=0.1)

    def test_metric_for_best_model_takes_it(self, tmp_path):
        options = {"eval_likelihood_times": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_nll"}
        trainer = build(tmp_path, **options)
        assert trainer.args.greater_is_better is False
        trainer.train()
        assert trainer.state.best_metric == min(logged(trainer, "eval_nll"))
        with pytest.raises(ValueError, match="metric_for_best_model=.perplexity.* pass `eval_likelihood_times`"):
            build(tmp_path, metric_for_best_model="perplexity")
        with pytest.raises(ValueError, match="`eval_likelihood_times` must be at least 2, or 0"):
            build(tmp_path, eval_likelihood_times=1)


def tokenizer_and_model(tokenizer_type: str, texts: list[str], with_bos: bool, length: int = 12):
    """A tokenizer of 40 tokens, and a model whose texts may begin with its BOS token."""
    tokenizer = train_tokenizer(texts, tokenizer_type, 300 if tokenizer_type == "bpe" else 40)
    model = build_flm(vocab_size=len(tokenizer), max_position_embeddings=length)
    model.generation_config.bos_token_id = tokenizer.bos_token_id if with_bos else None
    return tokenizer, model


def nats_of(model, parts: list[list[int]], num_known: int) -> float:
    """The mean of the bound over many noises, for sequences whose first tokens are known."""
    model.generation_config.bos_token_id = None
    total = 0.0
    for part in parts:
        tokens = torch.tensor([part] * 6)
        known = (torch.arange(len(part)) < num_known).long().expand(6, -1)
        total -= (
            model.log_likelihood_bound(tokens, prompt_mask=known, num_times=64, generator=generator())
            .log_likelihood.mean()
            .item()
        )
    return total


LATIN = ["a b c d e", "a b c d e f g h i j k l", " ".join("abcdefghijklm" * 2) + " a b c d", ""]  # 5, 12 and 30 words


class TestEvaluateLikelihood:
    @pytest.mark.parametrize("with_bos", [False, True])
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_texts_begin_with_known_bos_tokens(self, with_bos, wrapped):
        tokenizer, model = tokenizer_and_model("word", LATIN, with_bos)
        figures = evaluate_likelihood(model, tokenizer, LATIN, num_times=64, wrapped=wrapped)
        begin, end = [tokenizer.bos_token_id] * with_bos, [tokenizer.eos_token_id] * wrapped
        inner = 12 - len(begin) - len(end)
        rows = [row + end for row in tokenizer(LATIN[:3])["input_ids"]]
        rows = [sum(rows, [])] if wrapped else rows
        parts = [row[start : start + inner] for row in rows for start in range(0, len(row), inner)]
        parts = [begin + part + (end if len(part) == inner else []) for part in parts]
        expected = nats_of(model, parts, num_known=len(begin))
        assert figures["nats_per_text"] * 3 == pytest.approx(expected, rel=5 * figures["relative_error"] + 0.02)
        assert figures["tokens"] == sum(map(len, parts)) - len(begin) * len(parts)
        assert figures["nats_per_token"] * figures["tokens"] == pytest.approx(figures["nats_per_text"] * 3)
        assert figures["bits_per_byte"] * math.log(2) * figures["bytes"] == pytest.approx(figures["nats_per_text"] * 3)
        assert math.log(figures["perplexity"]) == pytest.approx(figures["nats_per_token"])

    @pytest.mark.parametrize(
        ("tokenizer_type", "texts", "wrapped", "expected"),
        [  # texts, those of several parts, unknown tokens, words, bytes
            ("word", LATIN, False, (3, 1, 0, 47, sum(map(len, LATIN)))),
            ("word", ["a  b, c", "a"], False, (2, 0, 0, 4, 8)),
            ("word", ["a b", "x\u0300yz b"], False, (2, 0, 1, 4, 10)),
            ("char", ["ab" * 8, "ab", "ab"], False, (3, 1, 0, 3, 20)),
            ("char", ["ab" * 4, "ab", "ab"], True, (3, 1, 0, 3, 12)),  # blocks of 10 tokens
            ("char", ["ab\U0001f600"], False, (1, 0, 1, 1, 6)),
            ("bpe", ["我昨天在图书馆", "读书。"], False, (2, 1, 0, 10, 30)),
            ("bpe", ["我昨天在图书馆", "读书。"], True, (2, 2, 0, 10, 30)),
        ],
    )
    def test_words_and_bytes_are_those_of_the_texts(self, tokenizer_type, texts, wrapped, expected, caplog):
        """Pieces of cut texts are no texts, and their bytes may be no characters."""
        tokenizer, model = tokenizer_and_model(tokenizer_type, [*LATIN, ",b", "\x08"], wrapped)
        figures = evaluate_likelihood(model, tokenizer, texts, num_times=2, wrapped=wrapped)
        names = ("texts", "cut_texts", "unknown_tokens", "words", "bytes")
        assert tuple(figures[name] for name in names) == expected
        num_tokens = sum(map(len, tokenizer(texts)["input_ids"]))
        assert (f"{expected[2]} of {num_tokens} tokens are [UNK]" in caplog.text) == (expected[2] > 0)

    @pytest.mark.parametrize("with_bos", [False, True])
    def test_texts_end_as_in_the_training(self, with_bos):
        tokenizer, model = tokenizer_and_model("word", LATIN, with_bos)
        model.generation_config.pad_after_eos = True
        texts = ["a b c", "b"]
        figures = evaluate_likelihood(model, tokenizer, texts, num_times=64)
        begin = [tokenizer.bos_token_id] * with_bos
        rows = [[*begin, *row, tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]]
        parts = [row + [tokenizer.pad_token_id] * (12 - len(row)) for row in rows]
        expected = nats_of(model, parts, num_known=len(begin))
        assert figures["nats_per_text"] * 2 == pytest.approx(expected, rel=5 * figures["relative_error"] + 0.02)
        assert figures["tokens"] == 3 + 1 + 2  # with EOS, without padding
        assert evaluate_likelihood(model, tokenizer, ["a b " * 8], num_times=2)["cut_texts"] == 1

    def test_wrapped_blocks_end_with_the_eos_token_of_the_model(self):
        tokenizer, model = tokenizer_and_model("word", LATIN, True)
        expected = evaluate_likelihood(model, tokenizer, LATIN, num_times=2, wrapped=True)
        model.generation_config.eos_token_id, tokenizer.eos_token = [tokenizer.eos_token_id], None
        assert evaluate_likelihood(model, tokenizer, LATIN, num_times=2, wrapped=True) == expected

    def test_texts_without_words_have_no_likelihood_per_word(self):
        tokenizer, model = tokenizer_and_model("char", LATIN, True)
        figures = evaluate_likelihood(model, tokenizer, (text for text in ["  "]), num_times=2)
        assert figures["words"] == 0 and math.isnan(figures["nats_per_word"]) and figures["nats_per_text"] > 0

    @pytest.mark.parametrize("texts", ["a b", [[5, 6]], ["a", None]])
    def test_texts_must_be_strings(self, texts):
        tokenizer, model = tokenizer_and_model("word", LATIN, True)
        with pytest.raises(ValueError, match="`texts` must be a list of strings"):
            evaluate_likelihood(model, tokenizer, texts)

    @pytest.mark.parametrize("texts", [[], [""], ["", " "]])
    def test_texts_without_tokens(self, texts):
        tokenizer, model = tokenizer_and_model("word", LATIN, True)
        with pytest.raises(ValueError, match="`texts` have no tokens"):
            evaluate_likelihood(model, tokenizer, texts)

    @pytest.mark.parametrize("packing", ["texts", "wrapped"])
    def test_script(self, packing, tmp_path):
        tokenizer, model = tokenizer_and_model("word", LATIN, True)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "texts.txt").write_text("\n".join(LATIN) + "\n")
        arguments = ["--model", tmp_path / "model", "--text_file", tmp_path / "texts.txt", "--num_times", 4]
        arguments += ["--packing", packing, "--max_texts", 2, "--output_file", tmp_path / "figures.json"]
        run_here("evaluate_likelihood", *arguments)
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures == pytest.approx(
            evaluate_likelihood(model, tokenizer, LATIN[:2], num_times=4, wrapped=packing == "wrapped")
        )
        assert (figures["texts"], figures["cut_texts"]) == (2, 1)


@pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_bos_tokens_at_the_start_are_known(kind, padding):
    model = build_model(kind)
    texts, mask = texts_of(model), torch.ones(5, 12, dtype=torch.long)
    start = 0
    if padding == "right":
        mask[:, 7:] = 0
    elif padding == "left":
        mask[:, :4], start = 0, 4
    texts[:, start], texts[3, start], texts[:, start + 2] = 7, 8, 7
    mask = None if padding == "none" else mask
    known = torch.zeros_like(texts)
    known[:, start] = torch.tensor([1, 1, 1, 0, 1])
    plain = model.log_likelihood_bound(texts, mask, generator=generator())
    expected = model.log_likelihood_bound(texts, mask, known, generator=generator())
    model.generation_config.bos_token_id = 7
    for prompt_mask in (None, torch.zeros_like(texts), known):
        output = model.log_likelihood_bound(texts, mask, prompt_mask, generator=generator())
        assert torch.equal(output.log_likelihood, expected.log_likelihood)
        assert torch.equal(output.num_tokens, plain.num_tokens - known.sum(dim=1))


def test_texts_that_are_longer_than_those_of_the_model_are_refused(flm):
    with pytest.raises(ValueError, match="`input_ids` has sequences of 300 tokens, but the model has at most"):
        flm.log_likelihood_bound(torch.zeros(1, 300, dtype=torch.long))
