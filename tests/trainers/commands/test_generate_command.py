"""`flm-generate`: output and errors, several processes, resuming, prompts from files, progress."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from example_scripts import run_elsewhere, run_here
from processes import launcher, run_processes
from small_models import build_flm
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model

from modeling_flm import BridgeSamplerConfig, FLMModel, utils_flm
from modeling_flm.trainers import train_tokenizer
from modeling_flm.trainers.batches import example_seed
from modeling_flm.trainers.commands.generate import main, split_batches_between_processes
from modeling_flm.trainers.commands.shards import TextShards
from modeling_flm.trainers.evaluation.samples import SAMPLES_STREAM


NUM_TEXTS = 11
OPTIONS = ["--num_samples", NUM_TEXTS, "--num_steps", 2, "--batch_size", 3, "--seed", 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([" ".join(f"w{n}" for n in range(49))], "word", vocab_size=100).save_pretrained(folder)
    torch.manual_seed(0)
    build_flm().save_pretrained(folder)
    return folder


def generate(*arguments):
    main([str(argument) for argument in arguments])


def read(*paths: Path) -> list[dict]:
    """The rows of files, in the order of their indices."""
    rows = [json.loads(line) for path in paths for line in path.read_text().split("\n") if line]
    return sorted(rows, key=lambda row: row["index"])


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> list[dict]:
    """The rows of a single uninterrupted process."""
    output = tmp_path_factory.mktemp("whole") / "x.jsonl"
    generate(folder, *OPTIONS, "--output", output)
    return read(output)


def interrupt_after(num_batches: int, monkeypatch):
    """Presses Ctrl-C after this many batches."""
    original, calls = FLMModel.generate, iter(range(100))

    def give_up(*args, **kwargs):
        if next(calls) == num_batches:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(FLMModel, "generate", give_up)


class TestProcesses:
    def test_two_processes_write_the_texts_of_one(self, folder, whole, tmp_path):
        run_processes(main, [str(part) for part in (folder, *OPTIONS, "--output", tmp_path / "x.jsonl")])
        names = ["x-00000.jsonl", "x-00001.jsonl", "x.settings.json"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        parts = [read(tmp_path / name) for name in names[:2]]
        assert [len(part) for part in parts] == [6, 5]
        assert sorted(parts[0] + parts[1], key=lambda row: row["index"]) == whole

    @pytest.mark.parametrize("num_texts, num_processes, batch_size", [(11, 2, 3), (64, 8, 64), (3, 8, 4), (0, 2, 4)])
    def test_every_text_is_in_one_batch(self, num_texts, num_processes, batch_size):
        shares = [
            split_batches_between_processes(range(num_texts), batch_size, index, num_processes)
            for index in range(num_processes)
        ]
        batches = [batch for share in shares for batch in share]
        assert sorted(index for batch in batches for index in batch) == list(range(num_texts))
        assert max(map(len, batches), default=0) <= batch_size
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        # A small remainder is spread over all processes
        assert len(batches) >= min(num_texts, num_processes)

    @pytest.mark.slow
    def test_several_machines(self, folder, whole, tmp_path):
        """Two machines without a shared folder."""
        machines = [tmp_path / "first", tmp_path / "second"]
        port = 29400 + os.getpid() % 500
        flags = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
        flags += ["--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no"]

        def run(rank: int) -> str:
            machines[rank].mkdir()
            start = ["-m", "accelerate.commands.launch", *flags, "--machine_rank", str(rank)]
            return run_elsewhere(
                "flm-generate", folder, *OPTIONS, "--output", "x.jsonl", launcher=start, cwd=machines[rank]
            )

        with ThreadPoolExecutor() as pool:
            outputs = list(pool.map(run, range(2)))
        assert all(f"{NUM_TEXTS} texts: x-0000{rank}.jsonl" in output for rank, output in enumerate(outputs))
        assert read(machines[0] / "x-00000.jsonl", machines[1] / "x-00001.jsonl") == whole
        # Each machine resumes its own file
        lines = (machines[1] / "x-00001.jsonl").read_text().splitlines(keepends=True)
        (machines[1] / "x-00001.jsonl").write_text("".join(lines[:2]))

        def resume(rank: int) -> str:
            start = ["-m", "accelerate.commands.launch", *flags, "--machine_rank", str(rank)]
            arguments = ("flm-generate", folder, *OPTIONS, "--output", "x.jsonl", "--resume")
            return run_elsewhere(*arguments, launcher=start, cwd=machines[rank])

        with ThreadPoolExecutor() as pool:
            list(pool.map(resume, range(2)))
        assert read(machines[0] / "x-00000.jsonl", machines[1] / "x-00001.jsonl") == whole

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_launcher_is_interrupted(self, number, folder, tmp_path):
        options = [
            "--num_samples",
            "60",
            "--num_steps",
            "100",
            "--batch_size",
            "2",
            "--output",
            str(tmp_path / "x.jsonl"),
        ]
        module = ["-m", "modeling_flm.trainers.commands.generate", str(folder), *options]
        process = subprocess.Popen(
            [sys.executable, *launcher(), *module], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        shards = [tmp_path / f"x-0000{index}.jsonl" for index in range(2)]
        deadline = time.time() + 120
        while not all(map(Path.exists, shards)) and time.time() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        message = process.communicate(timeout=120)[1]
        assert "of 30 texts are written, in process 0 of 2" in message
        assert "Repeat the command with --resume" in message
        before = read(*shards)
        assert 4 <= len(before) < 60
        # A single process resumes the files of two.
        generate(folder, *options, "--resume")
        files = sorted(path.name for path in tmp_path.iterdir())
        assert files == ["x-00000.jsonl", "x-00001.jsonl", "x.jsonl", "x.settings.json"]
        rows = read(*tmp_path.glob("*.jsonl"))
        assert [row["index"] for row in rows] == list(range(60))
        kept = {row["index"] for row in before}
        assert [row for row in rows if row["index"] in kept] == before

    def test_without_a_file_the_first_process_prints(self, folder, whole, tmp_path):
        run_processes(print_to, str(tmp_path), [str(part) for part in (folder, *OPTIONS)])
        printed = [(tmp_path / str(rank)).read_text().splitlines() for rank in range(2)]
        assert printed == [[row["text"] for row in whole], []]


def print_to(output: str, arguments: list[str]):
    """Runs the command with its output in a file named by the rank."""
    with open(Path(output, os.environ["RANK"]), "w") as sys.stdout:
        main(arguments)


class TestResume:
    def test_an_interrupted_command_is_resumed(self, folder, whole, tmp_path, monkeypatch, capsys):
        output = tmp_path / "x.jsonl"
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            interrupt_after(2, patch)
            generate(folder, *OPTIONS, "--output", output)
        assert end.value.code == 130
        message = f"Interrupted: 6 of 11 texts are written, to {output}. Repeat the command with --resume"
        assert message in capsys.readouterr().err
        assert read(output) == whole[:6]
        with output.open("a") as file:
            file.write(json.dumps(whole[6])[:40])  # the incomplete line of a killed process
        generate(folder, *OPTIONS, "--output", output, "--resume", "--batch_size", 4)
        assert "6 of 11 texts exist already" in capsys.readouterr().err
        assert read(output) == whole
        assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, "x.settings.json"]

    def test_more_texts_and_other_numbers_of_processes(self, folder, whole, tmp_path):
        output = tmp_path / "x.jsonl"
        generate(folder, *OPTIONS, "--output", output, "--num_samples", 4)
        run_processes(main, [str(part) for part in (folder, *OPTIONS, "--output", output, "--resume")])
        assert read(output) == whole[:4]
        assert read(*tmp_path.glob("*.jsonl")) == whole
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        generate(folder, *OPTIONS, "--output", output, "--resume")  # nothing is left
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize(
        "flags, message",
        [
            (["--seed", 6], "--seed was 5 and is 6"),
            (["--num_steps", 3], "--num_steps was 2 and is 3"),
            (["--prompt", "w1"], "--num_return_sequences was None and is 11"),
        ],
    )
    def test_other_settings_are_refused(self, flags, message, folder, tmp_path):
        generate(folder, *OPTIONS, "--output", tmp_path / "x.jsonl")
        before = (tmp_path / "x.jsonl").read_bytes()
        number = "--num_return_sequences" if "--prompt" in flags else "--num_samples"
        with pytest.raises(SystemExit, match=message):
            generate(folder, *OPTIONS[2:], *flags, number, 11, "--output", tmp_path / "x.jsonl", "--resume")
        assert (tmp_path / "x.jsonl").read_bytes() == before

    def test_line_separators_in_texts(self, tmp_path):
        shards = TextShards(tmp_path / "x.jsonl")
        for start in (0, 2):
            shards.append([{"index": index, "text": f"\u2028{index}\n"} for index in range(start, start + 2)], {})
        assert read(shards.path) == [{"index": index, "text": f"\u2028{index}\n"} for index in range(4)]
        assert shards.start({}, resume=True) == set(range(4))

    def test_damaged_files_are_named(self, tmp_path):
        shards = TextShards(tmp_path / "x.jsonl")
        shards.append([{"index": 0}], {})
        for line in (b"{", b"[]", b"{}", b"\xff"):
            shards.path.write_bytes(b'{"index": 0}\n' + line + b'\n{"index": 1')
            with pytest.raises(ValueError, match=f"`resume`: line 2 of {shards.path} is damaged: remove it"):
                shards.start({}, resume=True)
            assert shards.path.read_bytes().endswith(b'{"index": 1')
        shards.settings_path.write_text("{")
        with pytest.raises(ValueError, match=f"`resume`: {shards.settings_path} is truncated or damaged"):
            shards.start({}, resume=True)

    def test_other_files_are_left_alone(self, tmp_path):
        for name in ("x-1.jsonl", "xy.jsonl", "x-00001.txt", "x.csv"):
            (tmp_path / name).write_text("precious")
        assert TextShards(tmp_path / "x.jsonl").files() == []


class TestPrompts:
    prompts = ["w3 w4", "", "w5 w6 w7"]

    @pytest.fixture
    def expected(self, folder, tmp_path):
        """The texts of each prompt in a command of its own."""
        rows = []
        for number, prompt in enumerate(self.prompts):
            output = tmp_path / f"expected-{number}.jsonl"
            generate(folder, "--prompt", prompt, "--num_return_sequences", 6, "--num_steps", 2, "--output", output)
            rows += [{**row, "prompt": prompt} for row in read(output)[2 * number : 2 * number + 2]]
        return rows

    @pytest.mark.parametrize("source", ["txt", "jsonl", "parquet", "dataset"])
    def test_prompts_from_a_file_or_a_dataset(self, source, folder, expected, tmp_path):
        path = tmp_path / f"prompts.{source}"
        flags = ["--prompts_file", path]
        if source == "txt":
            path.write_text("\n".join(self.prompts) + "\n")
        else:
            columns = {"number": list(range(3)), "question": self.prompts, "title": ["a", "b", "c"]}
            dataset = Dataset.from_dict(columns)
            flags += ["--prompt_column", "question"]
            if source == "jsonl":
                dataset.to_json(path)
            elif source == "parquet":
                dataset.to_parquet(path)
            else:
                path.mkdir()
                dataset.to_parquet(path / "test-00000-of-00001.parquet")
                flags = ["--prompts_dataset", path, "--prompts_split", "test[:3]", "--prompt_column", "question"]
        output = tmp_path / "x.jsonl"
        number = ["--num_return_sequences", 2]
        generate(folder, *flags, *number, "--num_steps", 2, "--batch_size", 4, "--output", output)
        rows = read(output)
        assert rows == expected
        assert all(row["text"].startswith(row["prompt"]) for row in rows)

    def test_resume_needs_the_same_prompts(self, folder, tmp_path):
        path, output = tmp_path / "prompts.txt", tmp_path / "x.jsonl"
        path.write_text("w1\nw2\n")
        generate(folder, "--prompts_file", path, "--num_steps", 1, "--output", output)
        shutil.move(path, tmp_path / "moved.txt")
        generate(folder, "--prompts_file", tmp_path / "moved.txt", "--num_steps", 1, "--output", output, "--resume")
        path.write_text("w1\nw3\n")
        with pytest.raises(SystemExit, match="prompts_sha256"):
            generate(folder, "--prompts_file", path, "--num_steps", 1, "--output", output, "--resume")


class TestProgress:
    def shown(self, model, capsys, **options) -> str:
        model.generate(**options)
        return capsys.readouterr().err

    def test_steps_of_a_slow_batch(self, flm, monkeypatch, capsys):
        assert "step" not in self.shown(flm, capsys, num_steps=3)  # too fast to show
        monkeypatch.setattr(utils_flm, "PROGRESS_DELAY", 1e-9)
        assert "Steps: 100%" in (shown := self.shown(flm, capsys, num_steps=3)) and "3/3" in shown
        assert "Rounds: 100%" in (shown := self.shown(flm, capsys, num_rounds=2, num_steps=1)) and "2/2" in shown
        assert "Steps" not in self.shown(flm, capsys, num_steps=1)

    def test_texts(self, folder, capsys):
        generate(folder, *OPTIONS)
        assert "11/11" in capsys.readouterr().err


class TestGenerate:
    @pytest.fixture
    def folder(self, tmp_path):
        train_tokenizer([" ".join(f"w{n}" for n in range(49))], "word", vocab_size=100).save_pretrained(tmp_path / "m")
        build_flm().save_pretrained(tmp_path / "m")
        return tmp_path / "m"

    def generate(self, *arguments):
        run_here("flm-generate", *arguments)

    def expected(self, folder, num_samples=1, **options):
        model = AutoModel.from_pretrained(folder)
        seeds = [example_seed(7, SAMPLES_STREAM, index) for index in range(num_samples)]
        tokens = [model.generate(generator=torch.Generator().manual_seed(seed), **options)[0] for seed in seeds]
        texts = AutoTokenizer.from_pretrained(folder).batch_decode(tokens, skip_special_tokens=True)
        return [row.tolist() for row in tokens], texts

    def test_outputs(self, folder, tmp_path, capsys):
        options = ["--num_samples", 5, "--num_steps", 3, "--batch_size", 2, "--seed", 7]
        tokens, texts = self.expected(folder, num_samples=5, num_steps=3)
        self.generate(folder, *options)
        assert capsys.readouterr().out.splitlines() == texts
        columns = zip(range(5), texts, tokens)
        rows = [{"index": i, "text": a, "tokens": b, "num_forward_passes": 3, "seed": 7} for i, a, b in columns]
        self.generate(folder, *options, "--output", tmp_path / "new" / "x.jsonl")
        assert [json.loads(line) for line in (tmp_path / "new" / "x.jsonl").read_text().splitlines()] == rows

    @pytest.mark.parametrize(
        "flags, options",
        [
            (
                ("--num_rounds", 3, "--commit_threshold", 0.9, "--commit_budget", 2),
                {"num_rounds": 3, "commit_threshold": 0.9, "commit_budget": 2},
            ),
            (("--num_rounds", 3, "--commit_budget", "uniform"), {"num_rounds": 3}),
            (("--block_length", 5), {"block_length": 5}),
            (("--stability_threshold", 1, "--num_steps", 9), {"stability_threshold": 1, "num_steps": 9}),
            (("--confidence_threshold", 0.7, "--num_steps", 9), {"confidence_threshold": 0.7, "num_steps": 9}),
        ],
    )
    def test_rounds_blocks_and_thresholds(self, flags, options, folder, capsys):
        _, texts = self.expected(folder, num_samples=3, **{"num_steps": 2, **options})
        self.generate(folder, "--num_samples", 3, "--num_steps", 2, "--seed", 7, *flags)
        assert capsys.readouterr().out.splitlines() == texts

    def test_gamma_and_guidance_scale(self, folder, capsys):
        options = ("--num_return_sequences", 3, "--num_steps", 2, "--prompt", "w5 w6", "--gamma", 0.5)
        guidance = ("--guidance_model", folder, "--guidance_scale", 2.0)
        guided = run_elsewhere("flm-generate", folder, *options, *guidance).splitlines()
        assert len(guided) == 3 and all(text.startswith("w5 w6 ") for text in guided)
        self.generate(folder, *options)  # equal models change nothing
        assert capsys.readouterr().out.splitlines() == guided

    def test_live(self, folder, capsys):
        self.generate(folder, "--live", "--num_steps", 2, "--seed", 7)
        _, (text,) = self.expected(folder, num_steps=2)
        assert capsys.readouterr().out.rstrip().endswith(text.split()[-1])

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--output", "x.csv"], "must end in .jsonl"),
            (["--live", "--num_samples", 2], "--live shows one text"),
            (["--num_samples", 0], "--num_samples must be at least 1"),
            (["--guidance_revision", "step-1"], "--guidance_revision needs --guidance_model"),
            (["--resume"], "--resume continues a file"),
            (["--prompt", "a", "--prompts_file", "b.txt"], "exclude each other"),
            (["--prompt", "a", "--num_samples", 2], "pass --num_return_sequences"),
            (["--num_return_sequences", 2], "pass --num_samples"),
        ],
    )
    def test_mistakes_are_explained(self, arguments, message, folder, capsys):
        with pytest.raises(SystemExit):
            self.generate(folder, *arguments)
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        "flags, message",
        [
            (["--device", "cuda"], "--device: cuda is not available. Available devices: cpu"),
            (["--device", "gpu"], "--device must be a device such as cpu, .*got gpu"),
            (["--prompts_file", "nowhere.txt"], "nowhere.txt"),
            (["--prompts_file", "prompts.md"], "--prompts_file must be a txt"),
            (["--prompts_file", "empty.txt"], "--prompts_file: empty.txt is empty"),
            (["--prompts_file", "prompts.jsonl", "--prompt_column", "b"], "--prompt_column is 'b', but .*'a'"),
            (["--prompts_file", "numbers.jsonl", "--prompt_column", "a"], "--prompt_column"),
            (["--prompts_file", "long.txt"], r"Prompt 2 has 13 tokens, but texts have 12 \(--length\): 'w1 w1"),
        ],
    )
    def test_errors_are_a_line(self, flags, message, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        texts = {"prompts.md": "w1", "empty.txt": "", "prompts.jsonl": '{"a": "w1"}', "numbers.jsonl": '{"a": 1}'}
        texts["long.txt"] = "w1\n" + "w1 " * 13
        for name, text in texts.items():
            Path(name).write_text(text)
        with pytest.raises(SystemExit, match=message) as error:
            self.generate(folder, *flags, "--output", "x.jsonl")
        assert "\n" not in str(error.value) and not Path("x.jsonl").exists()

    def test_the_model_by_a_flag(self, folder, capsys):
        self.generate("--model", folder, "--seed", 7)
        assert capsys.readouterr().out.rstrip("\n") == self.expected(folder)[1][0]
        with pytest.raises(SystemExit):
            self.generate("--seed", 7)
        assert "name a MODEL, of the Hub or a folder" in capsys.readouterr().err

    def test_another_model(self, folder):
        GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
        with pytest.raises(SystemExit, match="error: --model must be an FLM or a flow map, got a GPT2Model"):
            self.generate(folder)

    def test_bridge(self, folder, capsys):
        self.generate(folder, "--seed", 7, "--num_steps", 3, "--sampler", "bridge")
        _, (text,) = self.expected(folder, num_steps=3, sampler_config=BridgeSamplerConfig())
        assert capsys.readouterr().out.rstrip("\n") == text
        with pytest.raises(SystemExit):
            self.generate(folder, "--sampler", "bridge", "--gamma", 0.5)
        assert "--gamma is a setting of --sampler flow_map" in capsys.readouterr().err

    def test_a_folder_that_is_not_there(self):
        with pytest.raises(SystemExit, match="error: --model: there is no folder /no/model"):
            self.generate("/no/model")

    def test_wrong_parameters_leave_no_file(self, folder, tmp_path):
        with pytest.raises(SystemExit, match="error: --num_steps must be an integer of at least 1"):
            self.generate(folder, "--num_steps", 0, "--output", tmp_path / "x.jsonl")
        assert not (tmp_path / "x.jsonl").exists()

    def test_a_file_is_not_overwritten(self, folder, tmp_path):
        (tmp_path / "x.jsonl").write_text("precious")
        for flags, message in (([], "exists already"), (["--resume"], "settings.json is missing")):
            with pytest.raises(SystemExit, match=message):
                self.generate(folder, "--output", tmp_path / "x.jsonl", *flags)
        assert (tmp_path / "x.jsonl").read_text() == "precious"
