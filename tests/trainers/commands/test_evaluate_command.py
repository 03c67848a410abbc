"""`flm-evaluate`: its figures, sampling flags, sweeps, files, causal models, cards and the published protocol."""

import json
import math
import random
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import Dataset
from example_scripts import run_here
from hub_server import TOKEN, File, Repository, metadata_problems
from huggingface_hub import EvalResult, ModelCard
from oracle import SCORER
from processes import run_processes
from small_models import build_flm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from modeling_flm import BridgeSamplerConfig, FMLMModel, FMLMTwoNetworkModel, StochasticFlowMapSamplerConfig
from modeling_flm.hub import card as hub_card
from modeling_flm.hub.card import add_results
from modeling_flm.hub.records import read_records
from modeling_flm.trainers import (
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
    generate_samples,
    pack_tokens,
    train_tokenizer,
)
from modeling_flm.trainers.batches import example_seed
from modeling_flm.trainers.commands import evaluate as command
from modeling_flm.trainers.commands.evaluate import EvaluationArguments, check_arguments, complete_arguments
from modeling_flm.trainers.evaluation import (
    FlowSource,
    Setting,
    decode,
    describe_evaluation,
    load_source,
    measure_throughput,
    perplexity_at_entropy,
    self_bleu,
)


def build_flow_map(model_class):
    """A flow map that follows the flow unless a test passes a gamma."""
    model = model_class.from_flm(build_flm())
    model.generation_config.gamma = None
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "fmlm"
    build_flow_map(FMLMModel).save_pretrained(folder)
    words = "time back us was long some his him they your get well off have used about people first more".split()
    train_tokenizer([" ".join([*words, *(f"w{n}" for n in range(30))])], "word", 100).save_pretrained(folder)
    return folder


OPTIONS = ["--num_samples", "7", "--num_steps", "1", "3", "--seeds", "0", "5", "--scorer", SCORER]


def evaluate(*arguments):
    run_here("flm-evaluate", *arguments)


class TestFigures:
    def test_figures(self, folder, tmp_path, gen_ppl):
        (tmp_path / "reference.txt").write_text("time back us was\nlong some his him they\n")
        flags = [*OPTIONS, "--reference_file", tmp_path / "reference.txt", "--output_dir", tmp_path / "out"]
        evaluate("--model", folder, *flags)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        for row, num_steps in zip(results["results"], (1, 3)):
            tokens = [generate_samples(model, list(range(7)), seed, num_steps=num_steps) for seed in (0, 5)]
            tokens = torch.cat(tokens).tolist()
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            lines = (tmp_path / "out" / f"samples_{num_steps}.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            assert [row["text"] for row in rows] == texts and [row["tokens"] for row in rows] == tokens
            assert [(row["seed"], row["index"]) for row in rows] == [(s, i) for s in (0, 5) for i in range(7)]
            expected = gen_ppl(texts, token_ids=tokens)
            for name in ("gen_ppl", "entropy", "distinct_2", "num_tokens"):
                assert row[name] == pytest.approx(expected[name], rel=1e-6)
            low, high = row["gen_ppl_interval"]
            assert low < row["gen_ppl"] < high
            assert row["num_steps"] == row["num_forward_passes"] == num_steps and row["num_texts"] == 14
        reference = gen_ppl(["time back us was", "long some his him they"])
        assert results["results"][2]["gen_ppl"] == pytest.approx(reference["gen_ppl"], rel=1e-6)
        assert results["results"][2]["num_texts"] == 2
        assert results["sampling"] == {"gamma": 0.0}
        *table, empty, line = (tmp_path / "out" / "results.md").read_text().splitlines()
        assert line == f"14 texts, scored by {SCORER}, gamma 0.0." and empty == ""
        assert len(table) == 5 and table[2].startswith("| 1 | 1 |") and table[4].startswith("| reference |")
        with pytest.raises(SystemExit, match="has results already"):
            evaluate("--model", folder, *flags)

    @pytest.mark.slow
    def test_two_processes_give_the_same_table(self, folder, tmp_path):
        evaluate("--model", folder, *OPTIONS, "--output_dir", tmp_path / "one")
        flags = [*OPTIONS, "--output_dir", tmp_path / "two"]
        run_processes(run_here, "flm-evaluate", "--model", folder, *flags)
        results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
        for result in results:
            assert all(row.pop("seconds_per_text") > 0 for row in result["results"])
        assert results[0]["results"] == results[1]["results"]
        for name in ("samples_1.jsonl", "samples_3.jsonl"):
            assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()

    def test_scoring_errors_show_before_sampling(self, folder, tmp_path):
        (tmp_path / "reference.jsonl").write_text('{"id": 3, "story": "time back us was"}\n')
        reference = ["--reference_file", tmp_path / "reference.jsonl"]
        for flags, message in (
            (["--scorer", tmp_path / "nowhere"], "error: .*nowhere"),
            (["--max_length", 4096], "--max_length must be at least 2, and at most the 1024"),
            (["--reference_file", tmp_path / "nowhere.txt"], "error: .*nowhere"),
            ([*reference, "--text_column", "body"], "body"),
            ([*reference, "--text_column", "id"], "--text_column is 'id', which has Value"),
            (["--seeds", 1, 1], "--seeds must be different"),
            (["--num_steps", 2, 2], "--num_steps must be different"),
            (["--scorer_batch_size", 0], "--scorer_batch_size"),
        ):
            with pytest.raises(SystemExit, match=message):
                evaluate("--model", folder, *OPTIONS, "--output_dir", tmp_path / "out", *flags)
            assert not (tmp_path / "out").exists()
        flags = [*reference, "--output_dir", tmp_path / "out"]  # the file has a single column with texts
        evaluate("--model", folder, *OPTIONS, *flags)

    def test_two_networks_take_two_passes_and_the_reference_is_truncated(self, folder, tmp_path):
        build_flow_map(FMLMTwoNetworkModel).save_pretrained(tmp_path / "two")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "two")
        (tmp_path / "reference.txt").write_text(" ".join(["time back us was"] * 20))
        flags = [*OPTIONS, "--output_dir", tmp_path / "out", "--reference_file", tmp_path / "reference.txt"]
        evaluate("--model", tmp_path / "two", *flags, "--top_k", 5)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [row["num_forward_passes"] for row in results["results"][:2]] == [2, 6]
        assert results["results"][2]["entropy"] == pytest.approx(math.log(4))  # 12 tokens, the model's length
        assert results["sampling"] == {"gamma": 0.0, "top_k": 5}

    def test_results_go_into_the_card_of_a_folder(self, folder, tmp_path):
        copy = tmp_path / "model"
        AutoModel.from_pretrained(folder).save_pretrained(copy)
        AutoTokenizer.from_pretrained(folder).save_pretrained(copy)
        (copy / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
        evaluate("--model", copy, *OPTIONS, "--output_dir", tmp_path / "out", "--update_card")
        results = json.loads((copy / "evaluation.json").read_text())
        card = ModelCard.load(copy / "README.md")
        assert metadata_problems(card.content) == [] and card.text.strip() == "# Mine" and card.data.license == "mit"
        values = {(r.metric_type, r.metric_args["num_steps"]): r.metric_value for r in card.data.eval_results}
        assert values[("perplexity", 3)] == results["results"][1]["gen_ppl"]
        # Other metrics and other numbers of steps stay.
        other = {
            "task_type": "x",
            "dataset_type": "y",
            "dataset_name": "z",
            "metric_type": "accuracy",
            "metric_value": 1,
        }
        card.data.eval_results.append(EvalResult(**other))
        card.save(copy / "README.md")
        flags = [*OPTIONS, "--num_steps", 2, "--output_dir", tmp_path / "more", "--update_card"]
        evaluate("--model", copy, *flags)
        assert [row["num_steps"] for row in json.loads((copy / "evaluation.json").read_text())["results"]] == [1, 2, 3]
        again = ModelCard.load(copy / "README.md").data.eval_results
        assert sorted(r.metric_type for r in again) == ["accuracy", *["entropy"] * 3, *["perplexity"] * 3]
        assert all(r.metric_args["gamma"] == 0 for r in again if r.metric_type != "accuracy")

    def test_card_keeps_results_of_different_sampling_apart(self, folder, worse, tmp_path):
        copy = tmp_path / "model"
        AutoModel.from_pretrained(folder).save_pretrained(copy)
        AutoTokenizer.from_pretrained(folder).save_pretrained(copy)
        (copy / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
        flags = ["--model", copy, *OPTIONS, "--num_steps", 2, "--update_card", "--output_dir"]
        evaluate(*flags, tmp_path / "plain")
        evaluate(*flags, tmp_path / "gamma", "--gamma", 0.5, "--num_steps", 3)
        # The file has the last sampling parameters only; the card has both, with the parameters of each figure.
        assert [row["num_steps"] for row in json.loads((copy / "evaluation.json").read_text())["results"]] == [3]
        results = ModelCard.load(copy / "README.md").data.eval_results
        found = {(r.metric_args["num_steps"], r.metric_args["gamma"]) for r in results}
        assert found == {(2, 0.0), (3, 0.5)}
        evaluate(*flags, tmp_path / "guided", "--guidance_model", worse, "--guidance_scale", 2)
        (guided,) = [
            r.metric_args
            for r in ModelCard.load(copy / "README.md").data.eval_results
            if "guidance_scale" in r.metric_args and r.metric_type == "entropy"
        ]
        assert guided["guidance_model"] == "worse (a local model)" and guided["guidance_scale"] == 2
        (card_records,) = read_records(copy).values()
        for text in ((copy / "README.md").read_text(), json.dumps(card_records["sampling"])):
            assert str(worse) not in text and "worse" in text

    @pytest.mark.parametrize(
        "name, content", [("evaluation.json", "{"), ("README.md", "---\na: [\n---\n"), (None, "token")]
    )
    def test_cards_that_cannot_be_updated_are_refused_at_the_start(self, name, content, folder, tmp_path, monkeypatch):
        for path in folder.iterdir():
            (tmp_path / path.name).symlink_to(path)
        if name is None:  # the name of a repository, without a token
            monkeypatch.setattr(hub_card, "Path", lambda *parts: Path("/nowhere"))
            monkeypatch.delenv("HF_TOKEN", raising=False)
            monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        else:
            (tmp_path / name).write_text(content)
        monkeypatch.setattr(command, "generate_texts", None)
        with pytest.raises(SystemExit, match=f"error: --update_card: .*{name or content}"):
            evaluate("--model", tmp_path, *OPTIONS, "--update_card", "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_rows_without_a_score_do_not_go_into_the_card(self, folder, tmp_path, caplog):
        copy = tmp_path / "model"
        AutoModel.from_pretrained(folder).save_pretrained(copy)
        rows = [
            {"num_steps": 1, "gen_ppl": math.nan, "entropy": 1.0},
            {"num_steps": 2, "gen_ppl": 8.5, "entropy": 2.5},
        ]
        record = {"scorer": "gpt2", "num_samples": 3, "seeds": [0], "sampling": {}}
        add_results(str(copy), {**record, "results": rows[:1]})
        assert not (copy / "evaluation.json").exists() and "without a score are not stored" in caplog.text
        add_results(
            str(copy), {**record, "results": [{**rows[1], "self_bleu": math.nan}, {**rows[0], "gen_ppl": None}]}
        )
        stored = json.loads((copy / "evaluation.json").read_text(), parse_constant=pytest.fail)["results"]
        assert stored == [{**rows[1], "self_bleu": None}]
        assert read_records(copy)["evaluation.json"]["results"] == stored

    def test_results_go_into_the_card_on_the_hub(self, server, monkeypatch):
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)  # was made at import
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        repository = server.repositories["tester/tiny"] = Repository()
        repository.commit("main", {"README.md": File(b"---\nlicense: mit\n---\n# Mine\n")}, "By hand")
        for value in (9.5, 8.5):
            row = {"num_steps": 2, "gen_ppl": value, "entropy": 2.5}
            add_results("tester/tiny", {"scorer": "gpt2", "num_samples": 3, "results": [row]})
        contents = [files["README.md"].content.decode() for files in repository.commits.values()]
        assert len(contents) == 3
        for content, value in zip(contents[1:], (9.5, 8.5)):
            card = ModelCard(content)
            assert metadata_problems(content) == [] and card.text.strip() == "# Mine"
            assert {r.metric_value for r in card.data.eval_results} == {value, 2.5}


def directly(model, num_steps: int, **options) -> list[list[int]]:
    """The samples of `OPTIONS` from `generate()`: each has noise from its seed and index."""
    tokens = []
    for seed in (0, 5):
        generators = [torch.Generator().manual_seed(example_seed(seed, 2, index)) for index in range(7)]
        sequences = model.generate(num_samples=7, num_steps=num_steps, generator=generators, **options)
        tokens += sequences.tolist()
    return tokens


def read_tokens(path: Path) -> list[list[int]]:
    return [json.loads(line)["tokens"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def worse(tmp_path_factory) -> Path:
    """A guidance model."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "worse"
    build_flow_map(FMLMModel).save_pretrained(folder)
    return folder


class TestSampling:
    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 0.2},
            {"top_k": 2},
            {"top_p": 0.1},
            {"gamma": 0.9},
            {"length": 5},
            {"timestep_grid": [0.0, 0.9, 0.95, 1.0]},
            {"temperature": 0.5, "gamma": 1.0, "length": 9},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_flags_reach_generate(self, options, folder, tmp_path):
        flags = [*OPTIONS[:2], *OPTIONS[5:]]  # without the numbers of steps
        flags += [] if "timestep_grid" in options else ["--num_steps", 3]
        for name, value in options.items():
            flags += [f"--{name}", *(value if isinstance(value, list) else [value])]
        evaluate("--model", folder, *flags, "--output_dir", tmp_path / "out")
        model = AutoModel.from_pretrained(folder)
        tokens = read_tokens(tmp_path / "out" / "samples_3.jsonl")
        assert tokens == directly(model, 3, **options) != directly(model, 3)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["sampling"] == {"gamma": 0.0, **options}
        assert [row["num_steps"] for row in results["results"]] == [3]

    def test_pad_after_eos_reaches_generate(self, folder, tmp_path):
        model = AutoModel.from_pretrained(folder)
        plain = directly(model, 3)
        (eos, _), *_ = Counter(token for row in plain for token in row[:6]).most_common()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
        flags = [*OPTIONS, "--pad_after_eos", "--output_dir", tmp_path / "out"]
        evaluate("--model", tmp_path / "model", *flags)
        tokens = read_tokens(tmp_path / "out" / "samples_3.jsonl")
        assert tokens == directly(model, 3, pad_after_eos=True) != plain
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["sampling"] == {"gamma": 0.0, "pad_after_eos": True}

    def test_bos_token_that_is_the_eos_token(self, folder, tmp_path):
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        (both, _), *_ = Counter(row[0] for row in directly(model, 3)).most_common()
        model.generation_config.bos_token_id = model.generation_config.eos_token_id = both
        model.generation_config.pad_token_id = both
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        source = load_source(str(tmp_path / "model"), pad_after_eos=True)
        begun = [sample for sample in source.sample(Setting(3), range(7), 0) if sample.tokens[0] == both]
        assert begun
        for sample in begun:
            rest = sample.tokens[1:]
            assert sample.num_tokens == 1 + (rest.index(both) + 1 if both in rest else len(rest))

    @pytest.mark.parametrize("scale", [0, 3])
    def test_guidance_scale_takes_a_pass_as_well(self, scale, folder, worse, tmp_path):
        flags = ["--guidance_model", worse, "--guidance_scale", scale, "--output_dir", tmp_path / "out"]
        evaluate("--model", folder, *OPTIONS, *flags)
        model, guidance_model = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(worse)
        tokens = read_tokens(tmp_path / "out" / "samples_3.jsonl")
        guided = directly(model, 3, guidance_model=guidance_model, guidance_scale=3)
        assert tokens == (guided if scale else directly(model, 3)) and guided != directly(model, 3)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [row["num_forward_passes"] for row in results["results"]] == ([2, 6] if scale else [1, 3])
        described = {"guidance_model": str(worse), "guidance_scale": 3.0} if scale else {}
        assert results["sampling"] == {"gamma": 0.0, **described}

    def test_num_rounds_multiply_the_forward_passes(self, folder, tmp_path):
        flags = ["--num_rounds", 3, "--commit_budget", 5, "--output_dir", tmp_path / "out"]
        evaluate("--model", folder, *OPTIONS, *flags)
        options = {"num_rounds": 3, "commit_budget": 5}
        assert read_tokens(tmp_path / "out" / "samples_3.jsonl") == directly(
            AutoModel.from_pretrained(folder), 3, **options
        )
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [row["num_forward_passes"] for row in results["results"]] == [3, 9]
        assert results["sampling"] == {"gamma": 0.0, **options}

    def test_block_length_replaces_num_rounds_of_the_model(self, folder):
        source = load_source(str(folder))
        own = source.model.generation_config
        own.num_rounds, own.commit_threshold = 3, 0.5
        assert source.describe() == {"gamma": 0.0, "num_rounds": 3, "commit_threshold": 0.5}
        source = FlowSource(source.model, source.tokenizer, generate_kwargs={"block_length": 4})
        assert source.describe() == {"gamma": 0.0, "block_length": 4}

    def test_commit_budget_may_be_a_number(self, folder, tmp_path):
        for budget in (4, "4"):
            args = EvaluationArguments(str(tmp_path), str(folder), num_rounds=2, commit_budget=budget)
            check_arguments(args)
            assert complete_arguments(args).commit_budget == 4

    def test_guidance_of_two_networks_takes_three_passes(self, folder, worse, tmp_path):
        build_flow_map(FMLMTwoNetworkModel).save_pretrained(tmp_path / "two")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "two")
        flags = ["--guidance_model", worse, "--guidance_scale", 1, "--output_dir", tmp_path / "out"]
        evaluate("--model", tmp_path / "two", *OPTIONS, *flags)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [row["num_forward_passes"] for row in results["results"]] == [3, 9]

    def test_gamma_of_the_model_is_used_and_reported(self, folder, tmp_path):
        model = AutoModel.from_pretrained(folder)
        plain, fresh = directly(model, 3), directly(model, 3, gamma=0.8)
        model.generation_config.gamma, model.generation_config.temperature = 0.8, 1.0
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
        for name, flags, gamma, expected in (("own", [], 0.8, fresh), ("zero", ["--gamma", 0], 0.0, plain)):
            evaluate("--model", tmp_path / "model", *OPTIONS, *flags, "--output_dir", tmp_path / name)
            assert read_tokens(tmp_path / name / "samples_3.jsonl") == expected
            assert json.loads((tmp_path / name / "results.json").read_text())["sampling"] == {"gamma": gamma}
            assert f"gamma {gamma}." in (tmp_path / name / "results.md").read_text()

    def test_dtype_is_reported(self, folder, tmp_path):
        flags = [*OPTIONS, "--dtype", "bfloat16", "--scorer_dtype", "float32", "--output_dir", tmp_path / "out"]
        evaluate("--model", folder, *flags)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["sampling"] == {"gamma": 0.0, "scorer_dtype": "float32", "dtype": "bfloat16"}

    @pytest.mark.parametrize(
        "flags, message",
        [
            (["--timestep_grid", 0, 0.5, 1], "--timestep_grid sets the number of steps: remove --num_steps"),
            (["--gamma", 1.5], r"--gamma must be a number in \[0, 1\], got 1.5"),
            (["--temperature", 0], "--temperature must be a number above 0"),
            (["--top_p", 2], "--top_p must be a number above 0 and at most 1"),
            (["--top_k", 0], "--top_k must be an integer of at least 1"),
            (["--length", 13], "--length is 13, but the model has at most 12 positions"),
            (["--guidance_scale", 2], "--guidance_scale needs --guidance_model"),
            (["--guidance_revision", "step-1"], "--guidance_revision needs --guidance_model"),
            (["--guidance_model", "WORSE"], "--guidance_model needs a --guidance_scale, such as"),
            (
                ["--guidance_model", "OTHER", "--guidance_scale", 1],
                "--guidance_model has 40 tokens, but the model has 53",
            ),
            (
                ["--guidance_model", SCORER, "--guidance_scale", 1],
                "--guidance_model must be a flow-based language model",
            ),
            (["--pad_after_eos"], "--pad_after_eos needs an `eos_token_id`"),
        ],
    )
    def test_sampling_errors_show_before_sampling(self, flags, message, folder, worse, tmp_path):
        FMLMModel.from_flm(build_flm(vocab_size=40)).save_pretrained(tmp_path / "other")
        flags = [{"WORSE": worse, "OTHER": tmp_path / "other"}.get(flag, flag) for flag in flags]
        with pytest.raises(SystemExit, match=message) as error:
            evaluate("--model", folder, *OPTIONS, *flags, "--output_dir", tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    @pytest.mark.parametrize("times", [[0], [0, 0.5], [0, 0.7, 0.3, 1]])
    def test_timestep_grid_must_increase_from_0_to_1(self, times, tmp_path):
        with pytest.raises(SystemExit, match="--timestep_grid must increase from 0 to 1"):
            evaluate("--model", "x", "--timestep_grid", *times, "--output_dir", tmp_path / "out")

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as error:
            evaluate("-h")
        assert error.value.code == 0 and "95 % confidence" in " ".join(capsys.readouterr().out.split())


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


class TestSweep:
    def test_temperatures_and_samplers_reach_generate(self, folder, tmp_path, gen_ppl):
        lines = [f"time back us was long some his him they {last}" for last in ("your", "get", "well", "off")]
        (tmp_path / "reference.txt").write_text("\n".join(lines))
        flags = ["--temperatures", 0.3, 2, "--samplers", "flow_map", "bridge", "--gamma", 0.5]
        flags += ["--reference_file", tmp_path / "reference.txt", "--num_steps", 3, "--output_dir", tmp_path / "out"]
        evaluate("--model", folder, *OPTIONS, *flags)
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        curves, results = {}, results_of(tmp_path / "out")
        for row, (sampler, temperature) in zip(results["results"], product(("flow_map", "bridge"), (0.3, 2.0))):
            assert (row["num_steps"], row["sampler"], row["temperature"]) == (3, sampler, temperature)
            options = {"gamma": 0.5} if sampler == "flow_map" else {"sampler_config": BridgeSamplerConfig()}
            tokens = directly(model, 3, temperature=temperature, **options)
            assert read_tokens(tmp_path / "out" / f"samples_{sampler}_3_t{temperature:g}.jsonl") == tokens
            scored = gen_ppl(tokenizer.batch_decode(tokens, skip_special_tokens=True), token_ids=tokens)
            assert row["gen_ppl"] == pytest.approx(scored["gen_ppl"], rel=1e-6)
            curves.setdefault(sampler, []).append(scored)
        reference = gen_ppl(lines, token_ids=tokenizer(lines, add_special_tokens=False)["input_ids"])
        for row, (sampler, curve) in zip(results["at_reference_entropy"], curves.items()):
            assert (row["num_steps"], row["sampler"]) == (3, sampler)
            for name, value in perplexity_at_entropy([0.3, 2.0], curve, reference).items():
                assert row[name] == (None if value is None else pytest.approx(value, rel=1e-5))
        assert (tmp_path / "out" / "frontier.png").exists()
        report = (tmp_path / "out" / "results.md").read_text()
        assert "| steps | sampler | temperature |" in report and "at the reference's entropy" in report
        reached = [row["gen_ppl"] is not None for row in results["at_reference_entropy"]]
        assert reached == [False, True] and report.count("not reached: ") == 1

    @pytest.mark.parametrize(
        "flags, message",
        [
            (["--num_steps", 1, 4], "--temperatures have no effect in one step of the flow map"),
            (["--num_steps", 1, 4, "--samplers", "bridge", "flow_map"], "remove 1 from --num_steps, or"),
            (["--temperature", 1], "Pass either --temperatures or --temperature"),
            (["--update_card"], "--update_card .* remove --temperatures"),
            (["--samplers", "bridge", "--gamma", 0.5], "--gamma applies to --samplers flow_map only"),
            (["--batch_sizes", 0], "--batch_sizes must be at least 1"),
            (["--mauve_model", SCORER], "--mauve_model needs --reference_file"),
        ],
    )
    def test_temperatures_without_effect_are_refused(self, flags, message, folder, tmp_path):
        flags = ["--temperatures", 0.7, 1, *flags, "--output_dir", tmp_path / "out"]
        with pytest.raises(SystemExit, match=message):
            evaluate("--model", folder, "--scorer", SCORER, *flags)
        assert not (tmp_path / "out").exists()

    def test_one_step_of_the_bridge_has_a_temperature(self, folder, tmp_path):
        flags = ["--temperatures", 0.3, 2, "--samplers", "bridge", "--num_steps", 1, "--output_dir", tmp_path / "out"]
        evaluate("--model", folder, *OPTIONS, *flags)
        low, high = results_of(tmp_path / "out")["results"]
        assert low["entropy"] < high["entropy"]
        assert results_of(tmp_path / "out")["sampling"] == {"sampler": "bridge"}

    def test_samplers_of_the_model_are_reported(self, folder):
        source = load_source(str(folder))
        own = source.model.generation_config
        own.sampler_config = BridgeSamplerConfig()
        assert source.describe() == {"sampler": "bridge"}
        own.sampler_config = StochasticFlowMapSamplerConfig(0.6)
        assert source.describe() == {"gamma": 0.6}
        source = load_source(str(folder), gamma=0.0)
        own = source.model.generation_config
        for own.sampler_config in (StochasticFlowMapSamplerConfig(0.6), BridgeSamplerConfig()):
            assert source.describe() == {"gamma": 0.0}

    def test_reference_packing_wrapped_makes_blocks_of_the_model_s_length(self, folder, tmp_path, gen_ppl):
        lines = ["time back us was long", "some his him", "they your get well off have used", "time"] * 4
        (tmp_path / "reference.txt").write_text("\n".join(lines))
        flags = ["--reference_file", tmp_path / "reference.txt", "--reference_packing", "wrapped"]
        evaluate("--model", folder, *OPTIONS, *flags, "--output_dir", tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(lines, add_special_tokens=False)["input_ids"]
        blocks = pack_tokens(tokens, 12, tokenizer.bos_token_id, tokenizer.eos_token_id)
        expected = gen_ppl(tokenizer.batch_decode(blocks, skip_special_tokens=True), token_ids=blocks)
        row = results_of(tmp_path / "out")["results"][2]
        assert row["num_texts"] == len(blocks) > 4 and row["entropy"] == pytest.approx(expected["entropy"])
        assert row["gen_ppl"] == pytest.approx(expected["gen_ppl"], rel=1e-6)
        (tmp_path / "reference.txt").write_text("time\n")
        with pytest.raises(SystemExit, match="too few tokens for a single block"):
            evaluate("--model", folder, *OPTIONS, *flags, "--output_dir", tmp_path / "more")

    def test_batch_sizes_measure_throughput(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(command, "measure_throughput", partial(measure_throughput, min_seconds=0.0))
        flags = ["--batch_sizes", 1, 4, "--output_dir", tmp_path / "out"]
        evaluate("--model", folder, *OPTIONS, *flags)
        rows = results_of(tmp_path / "out")["throughput"]
        assert [(row["num_steps"], row["batch_size"]) for row in rows] == [(1, 1), (1, 4), (3, 1), (3, 4)]
        for row in rows:
            assert (
                row["tokens_per_second"] == pytest.approx(12 * row["texts_per_second"]) and row["texts_per_second"] > 0
            )
        assert "| steps | batch size | texts / s | tokens / s |" in (tmp_path / "out" / "results.md").read_text()

    def test_padding_after_eos_is_not_in_the_entropy(self, folder, tmp_path):
        model = AutoModel.from_pretrained(folder)
        (eos, _), *_ = Counter(token for row in directly(model, 3) for token in row[:6]).most_common()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
        evaluate("--model", tmp_path / "model", *OPTIONS, "--pad_after_eos", "--output_dir", tmp_path / "out")
        rows = [row[: row.index(eos) + 1] if eos in row else row for row in directly(model, 3)]
        frequencies = [np.unique(row, return_counts=True)[1] / len(row) for row in rows]
        entropy = np.mean([-(p * np.log(p)).sum() for p in frequencies])
        assert min(map(len, rows)) < 12
        assert results_of(tmp_path / "out")["results"][1]["entropy"] == pytest.approx(entropy)


class TestSamplesFile:
    TEXTS = ["time back us was long some his him", "time back us was long some well off", "have used czt 12", ""]

    @pytest.fixture(params=["txt", "jsonl", "parquet"])
    def samples_file(self, request, tmp_path) -> Path:
        path = tmp_path / f"samples.{request.param}"
        if request.param == "txt":
            path.write_text("\n".join([*self.TEXTS, ""]))
        elif request.param == "jsonl":
            path.write_text("".join(json.dumps({"id": 1, "body": text}) + "\n" for text in self.TEXTS))
        else:
            Dataset.from_dict({"id": [1] * 4, "body": self.TEXTS}).to_parquet(path)
        return path

    def test_samples_file(self, samples_file, tmp_path, gen_ppl):
        (tmp_path / "train.txt").write_text("back us was long some, and have used\nwell off time\n")
        (tmp_path / "reference.jsonl").write_text('{"body": "well off time"}\n{"body": "have used us"}\n')
        flags = ["--samples_file", samples_file, "--train_file", tmp_path / "train.txt", "--scorer", SCORER]
        flags += ["--reference_file", tmp_path / "reference.jsonl", "--mauve_model", SCORER, "--ngram_sizes", 2, 4]
        evaluate(*flags, "--text_column", "body", "--output_dir", tmp_path / "out")
        samples, reference = results_of(tmp_path / "out")["results"]
        assert (samples["source"], reference["source"]) == ("samples", "reference")
        expected = gen_ppl(self.TEXTS)
        for name in ("gen_ppl", "entropy", "distinct_2", "num_texts", "num_empty"):
            assert samples[name] == pytest.approx(expected[name], rel=1e-6)
        # Copied pairs: 4 of 7, 4 of 7 and "well off", 1 of 3; copied quadruples: 2 of 5 twice, and none of 1
        assert (samples["copied_2"], samples["copied_4"]) == (pytest.approx(10 / 17), pytest.approx(4 / 11))
        assert (samples["copied_texts"], reference["copied_texts"]) == (0, 0.5)
        words = "back us was long some and have used well off time".split()
        counted = [word for text in self.TEXTS for word in text.split() if word != "12"]
        assert samples["real_words"] == pytest.approx(sum(word in words for word in counted) / len(counted))
        assert 0 < samples["mauve"] <= 1 and len(samples["mauve_seeds"]) == 5 and "mauve" not in reference
        assert samples["self_bleu"] == self_bleu(self.TEXTS)[:3, 0].mean() > 0
        header, _, row, *_ = (tmp_path / "out" / "results.md").read_text().splitlines()
        for name in ("self-BLEU", "MAUVE", "copied 2-grams", "copied 4-grams", "copied texts", "real words"):
            assert f"| {name} |" in header
        assert header.count("|") == row.count("|")

    def test_tokenizer_sets_the_units_of_the_entropy(self, folder, tmp_path):
        (tmp_path / "samples.txt").write_text("time time back back\ntime back us was\n")
        flags = ["--samples_file", tmp_path / "samples.txt", "--scorer", SCORER, "--tokenizer", folder]
        evaluate(*flags, "--output_dir", tmp_path / "out")
        (row,) = results_of(tmp_path / "out")["results"]
        assert row["entropy"] == pytest.approx((math.log(2) + math.log(4)) / 2)
        evaluate(*flags, "--length", 2, "--output_dir", tmp_path / "cut")
        (row,) = results_of(tmp_path / "cut")["results"]
        assert row["entropy"] == pytest.approx((0 + math.log(2)) / 2)

    def test_words_file(self, samples_file, tmp_path):
        (tmp_path / "words.txt").write_text("Time\nback\nused\n")
        flags = ["--samples_file", samples_file, "--scorer", SCORER, "--words_file", tmp_path / "words.txt"]
        evaluate(*flags, "--text_column", "body", "--output_dir", tmp_path / "out")
        (row,) = results_of(tmp_path / "out")["results"]
        assert row["real_words"] == pytest.approx(5 / 19)

    @pytest.mark.parametrize("name", ["has_back.py:has_back", "has_back:has_back"])
    def test_check(self, name, samples_file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("has_back.py").write_text("def has_back(text):\n    return text.find('back') + 1\n")
        Path("reference.txt").write_text("a back\nback\n")
        flags = ["--samples_file", samples_file, "--scorer", SCORER, "--text_column", "body", "--check", name]
        evaluate(*flags, "--reference_file", "reference.txt", "--output_dir", tmp_path / "out")
        samples, reference = results_of(tmp_path / "out")["results"]
        assert samples["passed"] == 2 / 4 and reference["passed"] == 1
        # Wilson's interval of 2 in 4, from its definition: |p - 1/2| = z sqrt(p (1 - p) / 4)
        for end in samples["passed_interval"]:
            assert abs(end - 0.5) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 4))
        assert "| 50.0 % (15.0 - 85.0) |" in (tmp_path / "out" / "results.md").read_text()

    @pytest.mark.parametrize(
        "name, message",
        [
            ("is_valid", "--check must be a module and a function, such as checks:is_valid"),
            ("nothing_of_that_name:f", "--check: nothing_of_that_name cannot be imported"),
            ("missing.py:f", "--check: missing.py cannot be imported"),
            ("math:no_function", "--check: math has no function no_function"),
            ("math:sqrt", "--check failed for the text 'a text': TypeError"),
        ],
    )
    def test_checks_that_cannot_be_used_are_refused(self, name, message, samples_file, tmp_path):
        with pytest.raises(SystemExit, match=message):
            evaluate("--samples_file", samples_file, "--text_column", "body", "--scorer", SCORER, "--check", name, "--output_dir", tmp_path / "out")  # fmt: skip

    @pytest.mark.parametrize(
        "flags, message",
        [
            ([], "Pass either --model or --samples_file, and not both"),
            (["--samples_file", "x.txt", "--model", "y"], "Pass either --model or --samples_file, and not both"),
            (["--samples_file", "x.txt", "--num_steps", 2, "--top_k", 3], "Remove --num_steps, --top_k"),
            (["--samples_file", "x.txt", "--length", 4], "in tokens of --tokenizer: pass one"),
            (["--samples_file", "x.txt", "--reference_packing", "wrapped"], "makes blocks of --length tokens"),
            (["--samples_file", "x.txt", "--update_card"], "--update_card .* remove --samples_file"),
        ],
    )
    def test_contradictions_are_refused(self, flags, message, tmp_path):
        with pytest.raises(SystemExit, match=message):
            evaluate(*flags, "--output_dir", tmp_path / "out")

    @pytest.mark.parametrize(
        "texts, missing",
        [
            (["time back us was long"], {"self_bleu"}),
            (["time", "back"], {"copied_4"}),
            (["", " ", ""], {"gen_ppl", "gen_ppl_interval", "self_bleu", "distinct_3", "copied_4", "real_words"}),
            ([",", "!", "12"], {"copied_4", "copied_8", "real_words", "distinct_3"}),
        ],
    )
    def test_figures_that_do_not_exist_are_null(self, texts, missing, tmp_path):
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (tmp_path / "train.txt").write_text("back us was long some")
        flags = ["--samples_file", tmp_path / "samples.jsonl", "--train_file", tmp_path / "train.txt"]
        flags += ["--reference_file", tmp_path / "samples.jsonl"]
        evaluate(*flags, "--scorer", SCORER, "--output_dir", tmp_path / "out")
        results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
        for row in results["results"]:
            assert {name for name, value in row.items() if value is None or value == [None] * 2} >= missing
            assert row["num_texts"] == len(texts)
        markdown = (tmp_path / "out" / "results.md").read_text().lower()
        assert "nan" not in markdown and "none" not in markdown
        assert len({line.count("|") for line in markdown.splitlines() if "|" in line}) == 1
        assert not (tmp_path / "out" / "partial_results.json").exists()

    def test_cut_texts_and_unknown_tokens_are_in_the_table(self, folder, tmp_path):
        (tmp_path / "samples.txt").write_text("time back dragon\n\n" + "time " * 9 + "dragon\n")
        flags = ["--samples_file", tmp_path / "samples.txt", "--scorer", SCORER, "--tokenizer", folder]
        evaluate(*flags, "--max_length", 8, "--output_dir", tmp_path / "out")
        (row,) = results_of(tmp_path / "out")["results"]
        assert (row["num_truncated"], row["num_empty"], row["unknown_tokens"]) == (1, 1, pytest.approx(2 / 13))
        header, _, line, *_ = (tmp_path / "out" / "results.md").read_text().splitlines()
        assert line.endswith("| 15.4 % | 3 (1 empty, 1 cut for the scorer) |")
        assert header.endswith("| unknown tokens | texts |")

    @pytest.mark.parametrize(
        "texts, references, flags, message",
        [
            (["a b"], ["a b", "c d"], ["--mauve_model", SCORER], "--samples_file: --mauve_model compares at least 2"),
            (
                ["a b", "c d"],
                ["a b"],
                ["--mauve_model", SCORER],
                "--reference_file: --mauve_model compares at least 2",
            ),
            (["a b", "c d"], ["a", "b"], ["--mauve_model", "NOWHERE"], "--mauve_model: there is no folder .*nowhere"),
            (["a b", "c d"], ["a", "b"], ["--tokenizer", "NOWHERE"], "--tokenizer: there is no folder .*nowhere"),
            (
                ["a b", "c d"],
                ["a", "b"],
                ["--words_file", "POINTER"],
                "--words_file: .*pointer.txt is a pointer of Git LFS",
            ),
            (["a b", "c d"], ["a", "b"], ["--mauve_model", "FOLDER"], "--mauve_model: "),
            (
                ["a b", "C d"],
                ["a", "b"],
                ["--tokenizer", "LETTERS"],
                "--tokenizer: .samples.: the tokenizer does not know 'C'",
            ),
            (["a b", "c d"], ["a", "b"], ["--words_file", "MARKS"], "--words_file: .* has no words"),
            (["a b", "c d"], ["a", "b"], ["--output_dir", "MARKS"], "--output_dir: .*marks.txt"),
        ],
    )
    def test_what_would_fail_at_the_end_is_refused_at_the_start(
        self, texts, references, flags, message, folder, tmp_path, monkeypatch
    ):
        files = {"MARKS": tmp_path / "marks.txt", "FOLDER": folder, "NOWHERE": tmp_path / "nowhere"}
        files["POINTER"] = tmp_path / "pointer.txt"
        files["POINTER"].write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n")
        files["LETTERS"] = tmp_path / "letters"
        train_tokenizer([], "text8", 27).save_pretrained(files["LETTERS"])
        for name, lines in (("samples", texts), ("reference", references), ("marks", ["...", "!"])):
            (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        scored = []
        monkeypatch.setattr(command, "score", lambda texts, **options: scored.append(texts))
        all_flags = ["--samples_file", tmp_path / "samples.txt", "--reference_file", tmp_path / "reference.txt"]
        with pytest.raises(SystemExit, match=message):
            evaluate(
                *all_flags,
                "--output_dir",
                tmp_path / "out",
                *(files.get(flag, flag) for flag in flags),
                "--scorer",
                SCORER,
            )
        assert all(texts == ["a text"] for texts in scored) and not (tmp_path / "out").exists()

    def test_one_sample_has_no_mauve(self, folder, tmp_path):
        (tmp_path / "reference.txt").write_text("a b\nc d")
        flags = ["--reference_file", tmp_path / "reference.txt", "--mauve_model", SCORER, "--num_samples", 1]
        with pytest.raises(
            SystemExit, match="--num_samples: --mauve_model compares at least 2 texts of each kind, got 1"
        ):
            evaluate("--model", folder, *flags, "--scorer", SCORER, "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("stage", ["score", "repetition_figures", "mauve_figures"])
    def test_what_was_measured_stays_if_a_later_stage_fails(self, stage, tmp_path, monkeypatch):
        (tmp_path / "texts.txt").write_text("a b c\nc d e")
        function, calls = getattr(command, stage), []

        def fail_at_last(*args, **kwargs):
            calls.append(args)
            if stage == "score" and len(calls) < 3:  # the first is to try the scorer
                return function(*args, **kwargs)
            raise torch.OutOfMemoryError

        monkeypatch.setattr(command, stage, fail_at_last)
        flags = ["--samples_file", tmp_path / "texts.txt", "--reference_file", tmp_path / "texts.txt"]
        with pytest.raises(torch.OutOfMemoryError):
            evaluate(*flags, "--mauve_model", SCORER, "--scorer", SCORER, "--output_dir", tmp_path / "out")
        rows = json.loads((tmp_path / "out" / "partial_results.json").read_text())["results"]
        assert [row["source"] for row in rows] == ["samples", "reference"][: 1 if stage == "score" else 2]
        assert all(row["gen_ppl"] > 0 for row in rows)
        assert all(("self_bleu" in row) == (stage == "mauve_figures") for row in rows)
        assert not (tmp_path / "out" / "results.json").exists()


class TestCausalModel:
    """A causal language model generates as many tokens as a flow-based one."""

    FLAGS = ["--model", SCORER, "--length", 9, "--num_samples", 5, "--batch_size", 3, "--scorer", SCORER, "--seeds", 4]

    @staticmethod
    def ancestral(length: int, temperature: float, seed: int) -> list[list[int]]:
        """Inverse transform sampling, one text at a time and without a cache."""
        model, rows = AutoModelForCausalLM.from_pretrained(SCORER).eval(), []
        for index in range(5):
            generator = torch.Generator().manual_seed(example_seed(seed, 2, index))
            tokens = [0]  # its BOS token
            for _ in range(length):
                with torch.no_grad():
                    logits = model(torch.tensor([tokens])).logits[0, -1]
                cumulative = (logits / temperature).softmax(-1).cumsum(-1)
                tokens.append(int((cumulative <= torch.rand(1, generator=generator)).sum()))
            rows.append(tokens[1:])
        return rows

    @pytest.mark.parametrize("temperature", [None, 0.5])
    def test_causal_model_samples_ancestrally(self, temperature, tmp_path, gen_ppl):
        flags = [] if temperature is None else ["--temperatures", temperature]
        state = torch.get_rng_state()
        evaluate(*self.FLAGS, *flags, "--output_dir", tmp_path / "out")
        assert torch.equal(torch.get_rng_state(), state)
        suffix = "" if temperature is None else "_t0.5"
        tokens = read_tokens(tmp_path / "out" / f"samples{suffix}.jsonl")
        assert tokens == self.ancestral(9, temperature or 1.0, 4)
        (row,) = results_of(tmp_path / "out")["results"]
        texts = AutoTokenizer.from_pretrained(SCORER).batch_decode(tokens, skip_special_tokens=True)
        expected = gen_ppl(texts, token_ids=tokens)
        assert row["gen_ppl"] == pytest.approx(expected["gen_ppl"], rel=1e-6)
        assert row["entropy"] == pytest.approx(expected["entropy"])
        assert (row["source"], row["num_forward_passes"], row["num_texts"]) == ("ancestral", 9, 5)
        assert results_of(tmp_path / "out")["sampling"] == {"sampler": "ancestral", "length": 9}

    def test_pad_after_eos_ends_texts(self, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(SCORER)
        (common, _), *_ = Counter(sum(self.ancestral(9, 1.0, 4), [])).most_common()
        model.generation_config.eos_token_id = common
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(SCORER).save_pretrained(tmp_path / "model")
        flags = [*self.FLAGS, "--model", tmp_path / "model", "--output_dir"]
        evaluate(*flags, tmp_path / "whole")
        evaluate(*flags, tmp_path / "ended", "--pad_after_eos")
        whole, ended = (read_tokens(tmp_path / name / "samples.jsonl") for name in ("whole", "ended"))
        lengths = [row.index(common) + 1 if common in row else 9 for row in whole]
        assert min(lengths) < 9
        assert ended == [row[:length] for row, length in zip(whole, lengths)]
        (row,) = results_of(tmp_path / "ended")["results"]
        assert row["num_forward_passes"] == pytest.approx(np.mean(lengths))

    @pytest.mark.parametrize(
        "flags, message",
        [
            (
                ["--num_steps", 4, "--gamma", 0.1],
                "--num_steps, --gamma do not apply to causal language models. Remove",
            ),
            (["--length", 4096], "--length is 4096, but the model reads 1024"),
            (["--update_card"], "--update_card does not apply to causal language models"),
        ],
    )
    def test_flags_of_flow_based_models_are_refused(self, flags, message, tmp_path):
        with pytest.raises(SystemExit, match=message):
            evaluate(*self.FLAGS, *flags, "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestProtocol:
    def test_published_protocol(self, folder, tmp_path, gen_ppl):
        """Special tokens stay, and texts are truncated at the model's length although the scorer reads more."""
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        # Settings of the model that the protocol overrides
        model.generation_config.length, model.generation_config.pad_after_eos = 8, True
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        flags = [*OPTIONS, "--protocol", "published", "--output_dir", tmp_path / "out"]
        evaluate("--model", tmp_path / "model", *flags)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        tokens = directly(model, 3, length=12, pad_after_eos=False)
        assert read_tokens(tmp_path / "out" / "samples_3.jsonl") == tokens
        texts = tokenizer.batch_decode(tokens)
        lines = (tmp_path / "out" / "samples_3.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == texts
        assert texts != tokenizer.batch_decode(tokens, skip_special_tokens=True)
        (row,) = [row for row in results["results"] if row["num_steps"] == 3]
        expected, whole = (gen_ppl(texts, token_ids=tokens, max_length=length) for length in (12, 1024))
        assert row["gen_ppl"] == pytest.approx(expected["gen_ppl"], rel=1e-6)
        assert row["num_truncated"] == expected["num_truncated"] > 0
        assert abs(whole["gen_ppl"] / expected["gen_ppl"] - 1) > 1e-3
        assert row["entropy"] == pytest.approx(expected["entropy"]) and expected["num_tokens"] <= 14 * 12
        assert results["sampling"] == {
            "protocol": "published",
            "gamma": 0.0,
            "max_length": 12,
            "keep_special_tokens": True,
            "scorer_dtype": "float32",
        }
        line = (tmp_path / "out" / "results.md").read_text().splitlines()[-1]
        assert line.startswith(f"14 texts, scored by {SCORER}, protocol published,")
        assert "Not comparable with the published figures, which are for 1024 texts scored by gpt2-large." in line

    @pytest.mark.parametrize(
        "scorer, num_samples, is_published",
        [
            ("gpt2-large", 1024, True),
            ("openai-community/gpt2-large", 1024, True),
            ("gpt2", 1024, False),
            ("gpt2-large", 64, False),
        ],
    )
    def test_deviations_from_the_published_protocol_are_reported(self, scorer, num_samples, is_published):
        evaluation = {"scorer": scorer, "num_samples": num_samples, "sampling": {"protocol": "published"}}
        assert ("Not comparable" in describe_evaluation(evaluation)) != is_published
        evaluation["sampling"] = {}
        assert "Not comparable" not in describe_evaluation(evaluation)

    def test_published_defaults(self, tmp_path):
        args = EvaluationArguments(str(tmp_path), "x", protocol="published")
        before = vars(args).copy()
        check_arguments(args)
        assert vars(args) == before  # a check assigns nothing
        args = complete_arguments(args)
        assert (args.num_samples, args.scorer, args.scorer_dtype) == (1024, "gpt2-large", "float32")
        assert args.keep_special_tokens and not args.pad_after_eos
        plain = complete_arguments(EvaluationArguments(str(tmp_path), "x"))
        assert not plain.keep_special_tokens and plain.scorer_dtype is plain.pad_after_eos is None
        assert plain.num_steps == [1, 2, 4, 8]

    @pytest.mark.parametrize(
        "flags",
        [
            ["--keep_special_tokens", "false"],
            ["--max_length", 1024],
            ["--length", 8],
            ["--pad_after_eos"],
            ["--scorer_dtype", "bfloat16"],
        ],
    )
    def test_contradictions_are_refused(self, flags, folder, tmp_path):
        flags = [*OPTIONS, "--protocol", "published", *flags]
        with pytest.raises(
            SystemExit, match=f"{flags[len(OPTIONS) + 2]}: --protocol published .*; remove one of them"
        ):
            evaluate("--model", folder, *flags, "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_flags_that_agree_with_the_protocol_are_accepted(self, tmp_path):
        options = {"keep_special_tokens": True, "scorer_dtype": "float32", "pad_after_eos": False}
        check_arguments(EvaluationArguments(str(tmp_path), "x", protocol="published", **options))

    def test_scorer_with_a_short_context(self, folder, tmp_path):
        GPT2Config(n_positions=8).save_pretrained(tmp_path / "short")
        flags = [*OPTIONS, "--protocol", "published", "--scorer", tmp_path / "short", "--output_dir", tmp_path / "out"]
        with pytest.raises(SystemExit, match="the model's 12 tokens, but --scorer reads 8: pass one that reads more"):
            evaluate("--model", folder, *flags)
        assert not (tmp_path / "out").exists()

    def test_clean_up_bert_decodes_as_published(self, tmp_path):
        """The published evaluation decoded LM1B with the tokenizer class that is now the legacy one."""
        words = "[PAD] [UNK] [CLS] [SEP] [MASK] it ' s don t n re ve m ##s ##ing . , ? ! \" ( - he not".split()
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
        tokenizer, legacy = (
            AutoTokenizer.from_pretrained(tmp_path / "bert"),
            BertTokenizerLegacy(tmp_path / "vocab.txt"),
        )
        tokens = torch.randint(len(words), (500, 20)).tolist()
        tokens.append(legacy.convert_tokens_to_ids("[CLS] it ' s not , he don ' t . [SEP]".split()))
        texts = decode(tokenizer, tokens, keep_special_tokens=True, clean_up_bert=True)
        assert texts == legacy.batch_decode(tokens) and texts[-1] == "[CLS] it's not, he don't. [SEP]"
        assert decode(tokenizer, tokens, keep_special_tokens=True) == tokenizer.batch_decode(tokens) != texts


@pytest.mark.slow
def test_distilled_model_ranks_above_its_teacher_at_one_step(tmp_path):
    """
    In texts of one theme, whose words no other theme has, an FLM's single step chooses every word by itself: even a short
    training tells the two models apart, on any machine.
    """
    length = 12
    rng = random.Random(0)
    themes = [["anna", "fox", "runs", "home"], ["rain", "falls", "on", "stones"], ["old", "ships", "sail", "south"]]

    def sample_text() -> str:
        return " ".join(rng.choices(rng.choice(themes), k=length))

    texts = [sample_text() for _ in range(8000)]
    tokenizer = train_tokenizer(texts, "word", vocab_size=100)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokens = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
    dataset = Dataset.from_dict({"input_ids": tokens.tolist()})

    sizes = {"hidden_size": 64, "conditioning_size": 32, "max_position_embeddings": length, "dropout": 0.0}
    settings = {"max_steps": 400, "per_device_train_batch_size": 64, "learning_rate": 3e-3, "ema_decay": 0.98}
    settings |= {"save_strategy": "no", "use_cpu": True}
    common = {"train_dataset": dataset, "processing_class": tokenizer}
    trainer = FLMTrainer(
        build_flm(vocab_size=len(tokenizer), attn_logit_softcapping=None, **sizes),
        FLMTrainingArguments(str(tmp_path / "training"), **settings),
        **common,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "flm"))
    teacher = AutoModel.from_pretrained(tmp_path / "flm")
    trainer = FMLMTrainer(
        FMLMModel.from_flm(teacher),
        FMLMTrainingArguments.from_preset("single_stage", output_dir=str(tmp_path / "training"), **settings),
        teacher=teacher,
        **common,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "fmlm"))

    config = GPT2Config(vocab_size=len(tokenizer), n_positions=length, n_embd=64, n_layer=2, n_head=4)
    scorer = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=2e-3)
    for batch in tokens.split(32):
        scorer(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scorer.save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")

    (tmp_path / "data.txt").write_text("\n".join(sample_text() for _ in range(200)))
    figures = {}
    for name in ("flm", "fmlm"):
        flags = ["--num_steps", 1, 4, "--num_samples", 200, "--scorer", tmp_path / "scorer"]
        flags += ["--output_dir", tmp_path / name, "--reference_file", tmp_path / "data.txt"]
        evaluate("--model", tmp_path / name, *flags)
        rows = json.loads((tmp_path / name / "results.json").read_text())["results"]
        figures |= {(name, row.get("num_steps", "data")): row for row in rows}
    ppl = {key: row["gen_ppl"] for key, row in figures.items()}
    assert figures["fmlm", 1]["gen_ppl_interval"][1] < figures["flm", 1]["gen_ppl_interval"][0]
    assert ppl["flm", "data"] == ppl["fmlm", "data"] == min(ppl.values())
    assert min(row["entropy"] for row in figures.values()) > 1.0  # no model repeats a single token


def test_protocol_published_names_deviating_settings():
    evaluation = {"num_samples": 1024, "scorer": "gpt2-large", "sampling": {"protocol": "published", "gamma": 0.8}}
    assert "Not comparable" not in describe_evaluation(evaluation)
    evaluation["sampling"] |= {"temperature": 0.5, "top_p": 0.9}
    assert describe_evaluation(evaluation).endswith("scored by gpt2-large, without temperature, top_p.")
