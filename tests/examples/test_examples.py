"""The example scripts on little data."""

import json
import os
import random
import subprocess
import sys
import sysconfig
import textwrap

import grammar
import pytest
import quickstart
from example_scripts import run_here
from transformers import AutoModel

from modeling_flm.trainers.commands.command_line import friendly_errors


class TestGrammar:
    def test_samples_are_valid_stories_of_25_to_35_words(self):
        rng = random.Random(0)
        stories = [grammar.sample_story(rng) for _ in range(2000)]
        assert all(map(grammar.is_valid, stories))
        assert len(set(stories)) > 1980
        assert 25 <= len(stories[0].split()) <= 35
        for choices in grammar._CHOICES.values():
            assert all(any(f" {word} " in f" {story} " for story in stories) for word in choices)

    @pytest.mark.parametrize(
        "old, new",
        [
            ("mia the", "tom the"),  # the name is copied
            ("one day she", "one day he"),  # the pronoun agrees
            ("gives the", "sells the"),  # the verbs agree
            ("a red ball", "a blue ball"),  # the color is copied
            ("the red ball", "the red hat"),  # the thing is copied
            ("hugo thanks", "nora thanks"),  # the friend is copied
            ("thanks mia", "thanks anna"),
            ("brave", "red"),  # a word of another slot
            (" lives in", " in"),
            ("mia .", "mia . ."),
            ("mia .", "mia"),
            ("lives", "[UNK]"),
        ],
    )
    def test_breaking_a_rule_is_noticed(self, old, new):
        story = (
            "mia the brave fox lives in a forest . one day she finds a red ball and gives the red ball to hugo . "
            "hugo thanks mia ."
        )
        assert grammar.is_valid(story)
        assert old in story
        assert not grammar.is_valid(story.replace(old, new, 1))

    def test_script_prints_stories(self, capsys):
        run_here("grammar", "--num_stories", 3)
        stories = capsys.readouterr().out.splitlines()
        assert len(set(stories)) == 3 and all(map(grammar.is_valid, stories))

    def test_free_choices_are_free(self):
        story = (
            "leo the shy bear lives in a castle . one evening he buys a blue hat and sells the blue hat to rosa . "
            "rosa hugs leo ."
        )
        assert grammar.is_valid(story)


class TestQuickstart:
    options = ["--max_steps", 8, "--distillation_steps", 4, "--num_samples", 4, "--batch_size", 8]
    options += ["--hidden_size", 32, "--num_hidden_layers", 1, "--num_attention_heads", 2]

    def test_stories(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(quickstart, "NUM_STORIES", 500)
        monkeypatch.chdir(tmp_path)
        run_here("quickstart", *self.options)
        output = capsys.readouterr().out
        table = [line.split() for line in output.splitlines() if line.split()[:1] in (["FLM"], ["FMLM"])]
        assert [(row[0], int(row[1])) for row in table] == [
            *(("FLM", steps) for steps in (1, 2, 4, 8, 16, 64)),
            *(("FMLM", steps) for steps in (1, 2, 4, 8)),
        ]
        assert all(row[2].endswith("%") and row[3].endswith("%") for row in table)
        picture = (tmp_path / "outputs/quickstart/quickstart.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
        assert "FLMModel" in (tmp_path / "outputs/quickstart/flm/config.json").read_text()
        # The last lines are code that works as printed.
        code = textwrap.dedent(output.split("without this package:\n")[1])
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", code]
        loaded = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
        assert loaded.returncode == 0, loaded.stderr
        assert loaded.stdout.strip().startswith("['")

    def test_own_texts(self, corpus, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        run_here("quickstart", "--train_file", corpus, "--vocab_size", 300, "--length", 24, *self.options)
        assert "examples of 24 tokens, with a vocabulary of 300" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "texts, flags, message",
        [
            ("a b\n", ["--length", 2], "--length must be at least 3"),
            ("a b\nc d\n", ["--length", 60], r"use a --length of at most \d"),
            ("a b\n", ["--vocab_size", 10], "--vocab_size must be at least 260"),
            ("a b\n", ["--distillation_steps", 0], "--distillation_steps must be at least 1"),
            ("a b\n", ["--num_samples", 0], "--num_samples must be at least 1"),
            ("a b\n", ["--num_hidden_layers", 0], "--num_hidden_layers must be at least 1"),
            ("a b\n", ["--num_attention_heads", 3], "--hidden_size must be a multiple of twice --num_attention_heads"),
            ("a b\n", ["--learning_rate", "nan"], "--learning_rate must be at least 0, got nan"),
            ("a b\n", ["--seed", -1], "--seed must be at least 0 and below 4294967296"),
            ("a b\n", ["--output_dir", "texts.jsonl/out"], "--output_dir: texts.jsonl/out is a file, or within one"),
            ("a b\n", ["--dataset", "x"], "Pass either --dataset or --train_file"),
            ("a b\n", ["--text_column", "x"], "--text_column is 'x', but the dataset has the columns"),
            ("a b\n", ["--dataset", "./missing"], "--dataset: "),
            (None, [], "--text_column 'text' has None"),
        ],
    )
    def test_odd_arguments(self, texts, flags, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        rows = [{"text": line} for line in (texts or "a b").splitlines()] + [{"text": None}] * (texts is None)
        (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        texts = [] if "./missing" in flags else ["--train_file", "texts.jsonl"]
        flags = [*texts, *self.options, *flags]
        arguments = quickstart.make_parser().parse_args(list(map(str, flags)))
        with pytest.raises(SystemExit, match=f"^error: .*{message}"), friendly_errors(flags=vars(arguments)):
            quickstart.main(arguments)
        assert not (tmp_path / "outputs").exists()


def test_steering_and_any_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "NUM_STORIES", 500)
    options = [*TestQuickstart.options, "--max_steps", 2, "--distillation_steps", 1, "--prompt_steps", 1]
    options += ["--num_samples", 2, "--output_dir", tmp_path]
    run_here("steering", *options)
    rows = json.loads((tmp_path / "steering.json").read_text())
    assert {row["part"] for row in rows} == {"guidance", "gamma", "reward", "prefix", "half"}
    output = capsys.readouterr().out
    assert len([line for line in output.splitlines() if "  valid " in line]) == len(rows)
    assert {
        line.rpartition("/")[2] for line in output.splitlines() if line.startswith(("Training", "Distilling"))
    } == {*("flm", "weak", "flm_prompts", "fmlm", "fmlm_prompts")}

    run_here("any_order", *options)
    assert f"Distilling {tmp_path / 'fmlm_plus'}\n" in (output := capsys.readouterr().out)
    assert output.count("Distilling") == 1 and "Training" not in output  # the other models are there already
    rows = json.loads((tmp_path / "any_order.json").read_text())
    assert {row["model"] for row in rows} == {"flm", "fmlm", "fmlm_plus", "fmlm_prompts"}
    rounds = [row["forward_passes"] for row in rows if row["part"] == "rounds, no threshold"]
    assert rounds == [2, 4, 8] * 2
    assert all(row["forward_passes"] <= 8 for row in rows if row["part"].startswith("rounds"))
    assert AutoModel.from_pretrained(tmp_path / "fmlm_plus").config.per_token_timesteps
    for name in ("steering", "any_order"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_python_corpus(tmp_path, monkeypatch, capsys):
    (tmp_path / "test").mkdir()
    for name, source in (
        ("good.py", f'"""{"Words. " * 20}"""'),
        ("old.py", "print 1"),
        ("test/test_it.py", '"""No."""'),
    ):
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    run_here("python_corpus", tmp_path / "corpus.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert ("Words. " * 20).strip() in [text.strip() for text in texts] and "No." not in texts
    assert any("assert" in text for text in texts)  # the help topics
    assert f"{len(texts):,} texts" in capsys.readouterr().out
