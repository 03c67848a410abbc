"""Flow-based language models in the lm-evaluation-harness: against the model's own likelihoods, and on its command line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import grammar
import grammar_task
import pytest
import torch
from example_scripts import run_here
from peers.autoregressive import autoregressive_log_likelihood, new_gpt2
from peers.masked_diffusion import new_masked_model
from small_models import build_flm
from transformers import AutoTokenizer

from modeling_flm import FLMConfig
from modeling_flm.trainers import train_tokenizer
from modeling_flm.trainers.batches import example_seed


harness = pytest.importorskip("modeling_flm.trainers.evaluation.harness")
peers_harness = pytest.importorskip("peers.harness")

STORY = "max the clever bear lives in a village ."
CHOICES = ["village .", "forest .", "castle ."]


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = {word for choices in grammar._CHOICES.values() for word in choices} | set(grammar.TEMPLATE)
    tokenizer = train_tokenizer([" ".join(words)], "word", vocab_size=100)
    torch.manual_seed(0)
    build_flm(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["no BOS", "BOS"])
def model(folder, request):
    """Texts may begin with a BOS token."""
    model = harness.FLMHarnessModel(str(folder), num_times=4, num_steps=2)
    if request.param == "BOS":
        model.model.generation_config.bos_token_id = model.tokenizer.bos_token_id
    return model


def bound(model, tokens: list[int], num_known: int, number: int) -> float:
    """The bound with the noise of a request. BOS tokens are known only if they are counted here."""
    own, model.model.generation_config.bos_token_id = model.model.generation_config.bos_token_id, None
    known = (torch.arange(len(tokens)) < num_known).long()[None]
    generators = [torch.Generator().manual_seed(example_seed(0, harness.LIKELIHOOD_STREAM, number))]
    tokens = torch.tensor([tokens])
    output = model.model.log_likelihood_bound(tokens, prompt_mask=known, num_times=4, generator=generators)
    model.model.generation_config.bos_token_id = own
    return output.log_likelihood.item()


def begin(model) -> list[int]:
    token = model.model.generation_config.bos_token_id
    return [] if token is None else [token]


def test_loglikelihood_is_the_conditional_bound(model):
    context, bos = STORY.removesuffix(" village ."), begin(model)
    requests = [Request(context, " " + choice) for choice in CHOICES] + [Request("", STORY), Request("", CHOICES[0])]
    requests += [Request("[BOS]" + context, " " + CHOICES[0]), Request("", "[BOS]" + STORY)] if bos else []
    results = model.loglikelihood(requests, disable_tqdm=True)
    for index, (request, (value, is_greedy)) in enumerate(zip(requests, results)):
        tokens = bos + model.tok_encode("".join(request.args).removeprefix("[BOS]"))
        num_known = len(bos) + (7 if request.args[0] else 0)
        number = 0 if request.args[0] else index  # the noise belongs to the context
        assert value == pytest.approx(bound(model, tokens, num_known, number), rel=1e-4)
        assert is_greedy in (True, False)


@pytest.mark.parametrize(
    "argument, value",
    [("num_times", 1), ("num_times", "4"), ("num_steps", 0), ("batch_size", 0), ("batch_size", "auto")],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be an integer of at least"):
        harness.FLMHarnessModel("nowhere", **{argument: value})


def test_unknown_words_are_warned_of(model, caplog):
    model.loglikelihood([Request(STORY[:7], " dragon lives in a"), Request("", "max")], disable_tqdm=True)
    assert "1 of 5 tokens are [UNK]" in caplog.text
    caplog.clear()
    model.loglikelihood_rolling([Request("max the")], disable_tqdm=True)
    assert caplog.text == ""


def test_loglikelihood_of_nothing(model):
    requests = [Request("", ""), Request("max the", ""), Request("", "max the")]
    (empty, without_continuation, (value, _)) = model.loglikelihood(requests, disable_tqdm=True)
    assert empty == without_continuation == (0.0, True) and value < 0
    assert model.loglikelihood_rolling([Request("")], disable_tqdm=True) == [0.0]


def test_long_requests_are_refused_before_short_ones_are_scored(model, monkeypatch):
    monkeypatch.setattr(model, "_bound", None)
    requests = [Request("", STORY)] * 3 + [Request(STORY, " max the clever bear")]
    with pytest.raises(ValueError, match=f"A request has {13 + len(begin(model))} tokens, but .* have 12"):
        model.loglikelihood(requests, disable_tqdm=True)


def test_append_eos_ends_texts_after_the_continuation(folder, tmp_path):
    model = harness.FLMHarnessModel(str(folder), num_times=4, num_steps=2)
    whole = harness.FLMHarnessModel(str(folder), num_times=4, num_steps=2, append_eos=True)
    context = "max the clever bear lives"
    ((value, _),) = whole.loglikelihood([Request(context, " in a castle")], disable_tqdm=True)
    tokenizer = model.tokenizer
    tokens = model.tok_encode(f"{context} in a castle") + [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * 3
    known = torch.tensor([[1] * 5 + [0] * 7])
    generator = torch.Generator().manual_seed(example_seed(0, harness.LIKELIHOOD_STREAM, 0))
    output = model.model.log_likelihood_bound(
        torch.tensor([tokens]), prompt_mask=known, num_times=4, generator=[generator]
    )
    assert value == pytest.approx(output.log_likelihood.item(), rel=1e-4)
    model.model.generation_config.pad_after_eos = True  # as models trained on one text per sequence have
    model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert harness.FLMHarnessModel(str(tmp_path)).append_eos and not harness.FLMHarnessModel(str(folder)).append_eos
    (rolling,) = whole.loglikelihood_rolling([Request(f"{context} in a castle")], disable_tqdm=True)
    assert rolling == pytest.approx(bound(model, tokens, 0, 0), rel=1e-4)
    full = " ".join(["max"] * 12)  # the EOS token begins a second window
    first, second = ["max"] * 11, ["max", tokenizer.eos_token, *[tokenizer.pad_token] * 10]
    expected = sum(bound(model, tokenizer.convert_tokens_to_ids(row), 0, i) for i, row in enumerate((first, second)))
    assert whole.loglikelihood_rolling([Request(full)], disable_tqdm=True) == pytest.approx([expected], rel=1e-4)
    with pytest.raises(ValueError, match="A request has 13 tokens, but the model's texts have 12"):
        whole.loglikelihood([Request(STORY, " max the clever")], disable_tqdm=True)


def test_loglikelihood_rolling_adds_windows(model):
    long = f"{STORY} {STORY} {STORY}"  # 27 words, for texts of 12
    values = model.loglikelihood_rolling([Request(STORY), Request(long)], disable_tqdm=True)
    bos, tokens = begin(model), model.tok_encode(long)
    size = 12 - len(bos)
    windows = [tokens[:9], *(tokens[start : start + size] for start in range(0, 27, size))]
    expected = [bound(model, bos + window, len(bos), number) for number, window in enumerate(windows)]
    assert values == pytest.approx([expected[0], sum(expected[1:])], rel=1e-4)


def test_generate_until_begins_with_bos_tokens(model, monkeypatch):
    prompts, generate = [], model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda ids, **kwargs: prompts.append(ids) or generate(ids, **kwargs))
    contexts = ["", "max the", f"{STORY} {STORY}"]
    model.generate_until([Request(context, {}) for context in contexts], disable_tqdm=True)
    bos, tokens = begin(model), model.tok_encode(contexts[2])
    expected = [bos or None, bos + tokens[:2], bos + tokens[len(tokens) - 11 + len(bos) :]]
    assert [None if ids is None else ids[0].tolist() for ids in prompts] == expected


def test_generate_until_ends_with_the_text(model, monkeypatch):
    generate, eos = model.model.generate, model.tokenizer.eos_token_id
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", eos)

    def generate_two_texts(*args, **kwargs):
        tokens = generate(*args, **kwargs)
        tokens[:, 6], tokens[:, 7] = eos, tokens[:, 0]
        return tokens

    monkeypatch.setattr(model.model, "generate", generate_two_texts)
    (text,) = model.generate_until([Request("max the clever", {})], disable_tqdm=True)
    assert len(text.split()) <= 3


def test_generate_until_continues_and_stops(model):
    whole, short, stopped = model.generate_until(
        [
            Request("max the clever", {}),
            Request("max the clever", {"max_gen_toks": 2}),
            Request("max the clever", {"until": [" "]}),
        ],
        disable_tqdm=True,
    )
    assert len(whole.split()) <= 9 and len(short.split()) <= 2 and " " not in stopped


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("task")
    run_here("grammar_task", folder, "--num_questions", 200)
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


class TestGrammarTask:
    def test_one_ending_of_four_is_correct(self, questions):
        for row in questions:
            stories = [f"{row['context']} {choice}" for choice in row["choices"]]
            assert [grammar.is_valid(story) for story in stories] == [index == row["answer"] for index in range(4)]
        assert {row["answer"] for row in questions} == {0, 1, 2, 3}

    @pytest.mark.parametrize("kind", ["peer_gpt2", "peer_mdlm"])
    def test_peers(self, kind, questions, folder, tmp_path):
        """Likelihoods of a batch equal likelihoods of single texts."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = FLMConfig(vocab_size=len(tokenizer), max_position_embeddings=30, attn_logit_softcapping=None, **sizes)
        torch.manual_seed(0)
        {"peer_gpt2": new_gpt2, "peer_mdlm": new_masked_model}[kind](config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        model_class = {"peer_gpt2": peers_harness.GPT2HarnessModel, "peer_mdlm": peers_harness.MaskedHarnessModel}[
            kind
        ]
        model = model_class(str(tmp_path), num_times=2)
        row = questions[0]
        requests = [Request(row["context"], " " + choice) for choice in row["choices"]]
        values = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
        assert all(-28 * math.log(100) < value < 0 for value in values)
        if kind == "peer_gpt2":
            tokens = torch.tensor([model.tok_encode(f"{row['context']} {row['choices'][1]}")])
            known = torch.arange(tokens.shape[1])[None] < len(model.tok_encode(row["context"]))
            with torch.no_grad():
                expected = autoregressive_log_likelihood(model.model, tokens, known).item()
            assert values[1] == pytest.approx(expected, rel=1e-5)
            shorter = Request(row["context"], " " + row["choices"][1].rsplit(" ", 2)[0])
            mixed = model.loglikelihood([shorter, *requests], disable_tqdm=True)
            assert [value for value, _ in mixed[1:]] == pytest.approx(values, rel=1e-5) and mixed[0][0] > values[1]


@pytest.mark.slow
def test_command_line(folder, tmp_path):
    rows = [{"context": STORY.removesuffix(" village ."), "choices": CHOICES, "answer": 0}] * 3
    grammar_task.write_task(tmp_path, "places", rows)
    command = [sys.executable, "-m", "modeling_flm.trainers.evaluation.harness", "--model", "flm", "--tasks", "places"]
    command += ["--model_args", f"pretrained={folder},num_times=2,num_steps=1", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "results")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["places"]["acc,none"] <= 1
