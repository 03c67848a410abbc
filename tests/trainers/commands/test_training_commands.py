"""`flm-train` and `flm-distill` on little data, their help and their errors."""

import json
import math
import shutil
from contextlib import nullcontext
from itertools import permutations
from pathlib import Path

import pytest
import yaml
from example_scripts import run_elsewhere, run_here
from peers.masked_diffusion import new_masked_model
from processes import launcher
from small_models import build_flm
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model
from transformers.trainer_utils import TrainOutput

from modeling_flm import FMLMModel
from modeling_flm.trainers import FLMTrainer, train_tokenizer
from modeling_flm.trainers.commands import train, training


TINY = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,conditioning_size=16,dropout=0.0"


class TestTrainingScripts:
    def arguments(self, corpus, output_dir, **overrides):
        options = {
            "train_file": str(corpus),
            "train_tokenizer": "word",
            "vocab_size": 100,
            "block_size": 16,
            "config_overrides": TINY,
            "output_dir": str(output_dir),
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "use_cpu": True,
            **overrides,
        }
        return {name: value for name, value in options.items() if value is not None}

    @staticmethod
    def flags(options):
        return [str(part) for name, value in options.items() for part in (f"--{name}", value)]

    @staticmethod
    def log(checkpoint):
        return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]

    @classmethod
    def losses(cls, checkpoint):
        return [row["loss"] for row in cls.log(checkpoint) if "loss" in row]

    def test_files_of_metrics_have_no_nan(self, corpus, tmp_path, monkeypatch):
        metrics = {"train_loss": math.nan, "eval_loss": math.inf, "epoch": 1.0}
        monkeypatch.setattr(FLMTrainer, "train", lambda trainer, **options: TrainOutput(1, math.nan, metrics))
        monkeypatch.setattr(FLMTrainer, "evaluate", lambda trainer: metrics)
        monkeypatch.setattr(FLMTrainer, "_initial_global_step", -1, raising=False)  # `train` would set it
        run_here("flm-train", *self.flags(self.arguments(corpus, tmp_path)))
        for name in ("train", "eval", "all"):
            stored = json.loads((tmp_path / f"{name}_results.json").read_text(), parse_constant=pytest.fail)
            assert stored == {"train_loss": None, "eval_loss": None, "epoch": 1.0}

    def test_flags_then_resume_then_go_on_from_the_model(self, corpus, tmp_path, capsys):
        options = self.arguments(corpus, tmp_path / "out")
        run_elsewhere("flm-train", *self.flags(options))
        output = tmp_path / "out"
        names = {path.name for path in output.iterdir()}
        assert {
            "model.safetensors",
            "tokenizer.json",
            "train_results.json",
            "eval_results.json",
            "checkpoint-6",
        } <= names
        assert json.loads((output / "config.json").read_text())["max_position_embeddings"] == 16
        assert json.loads((output / "generation_config.json").read_text())["bos_token_id"] == 1
        losses = self.losses(output / "checkpoint-6")

        run_here("flm-train", *self.flags({**options, "resume_from_checkpoint": output / "checkpoint-3"}))
        assert self.losses(output / "checkpoint-6") == losses

        more = self.arguments(corpus, tmp_path / "more", config_overrides=None, train_tokenizer=None, block_size=None)
        run_here("flm-train", *self.flags({**more, "model_name_or_path": output, "max_steps": 1}))
        assert "FLMModel: " in capsys.readouterr().out
        assert json.loads((tmp_path / "more" / "config.json").read_text())["max_position_embeddings"] == 16

    def test_one_text_a_line(self, tmp_path, caplog):
        """Lines of several lengths, distilled as well: samples are whole lines, and end where they end."""
        lines = [f"go {' '.join(['on'] * (n % 4))}" for n in range(60)]
        (tmp_path / "lines.txt").write_text("\n".join(lines))
        options = self.arguments(
            tmp_path / "lines.txt", tmp_path / "flm", packing="lines", block_size=None, max_steps=1
        )
        run_here("flm-train", *self.flags(options))
        distilled = {"teacher": tmp_path / "flm", "output_dir": tmp_path / "fmlm", "max_steps": 1, "report_to": "none", "use_cpu": True}  # fmt: skip
        run_here("flm-distill", *self.flags(distilled))
        for folder in (tmp_path / "flm", tmp_path / "fmlm"):
            assert json.loads((folder / "generation_config.json").read_text())["pad_after_eos"] is True
            assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 5  # and EOS
            assert json.loads((folder / "data_settings.json").read_text())["packing"] == "lines"
        assert "joined and cut" not in caplog.text
        # Resuming keeps the length, even if there are longer lines now
        (tmp_path / "lines.txt").write_text("\n".join([*lines, "go on on on on on"]))
        run_here("flm-train", *self.flags({**options, "resume_from_checkpoint": "true", "max_steps": 2}))
        assert json.loads((tmp_path / "flm" / "config.json").read_text())["max_position_embeddings"] == 5
        assert "1 of 5" in caplog.text and "do not fit in 5 tokens" in caplog.text
        packed = {**options, "packing": "wrapped", "output_dir": tmp_path / "packed", "block_size": 10}
        run_here("flm-train", *self.flags(packed))
        assert "Texts are joined and cut into blocks: the first blocks have the ends of" in caplog.text

    def test_texts_of_one_length_end_at_eos(self, tmp_path):
        (tmp_path / "lines.txt").write_text("go on\ngo up\n" * 20)
        options = self.arguments(
            tmp_path / "lines.txt", tmp_path / "out", packing="lines", block_size=None, max_steps=1
        )
        run_here("flm-train", *self.flags(options))
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["pad_after_eos"] is True

    def test_prompts_and_answers(self, tmp_path):
        rows = [{"question": f"{n} and {n} is", "answer": f"{2 * n}"} for n in range(30)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = self.arguments(
            tmp_path / "pairs.jsonl", tmp_path / "out", packing="lines", block_size=None, max_steps=1
        )
        options |= {"prompt_column": "question", "text_column": "answer"}
        run_here("flm-train", *self.flags(options))
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["per_token_timesteps"] is True and config["max_position_embeddings"] == 6
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert {"and", "58"} <= set(tokenizer.get_vocab())
        with pytest.raises(SystemExit, match="--prompt_column needs sequences of one text each: pass --packing lines"):
            run_here("flm-train", *self.flags({**options, "packing": "wrapped", "output_dir": tmp_path / "other"}))

    def test_what_is_there_is_not_overwritten(self, corpus, tmp_path):
        for name in ("model.safetensors", "checkpoint-3"):
            (tmp_path / name).mkdir()
            (tmp_path / name).touch()
            with pytest.raises(SystemExit, match=f"error: --output_dir: .* already has a training .{name}"):
                run_here("flm-train", *self.flags(self.arguments(corpus, tmp_path, resume_from_checkpoint=False)))
            (tmp_path / name).rmdir()

    @pytest.mark.parametrize("kind", ["bpe", "char"])
    def test_resuming_keeps_the_tokenizer(self, kind, corpus, tmp_path, caplog):
        """Also if the texts have changed, from which another one would be trained."""
        options = self.arguments(
            corpus, tmp_path / "out", train_tokenizer=kind, vocab_size=280, max_steps=2, save_steps=1
        )
        run_here("flm-train", *self.flags(options))
        before = (tmp_path / "out" / "tokenizer.json").read_text()
        records = [tmp_path / "out" / name for name in ("train_results.json", "data_settings.json")]
        contents = [path.read_text() for path in records]
        grown = tmp_path / "grown.txt"
        grown.write_text(corpus.read_text() + "\nsizzling jazz quiz: zigzag\n" * 3000)
        options |= {"train_file": grown, "resume_from_checkpoint": True}
        run_here("flm-train", *self.flags(options))  # is finished
        assert [path.read_text() for path in records] == contents
        run_here("flm-train", *self.flags({**options, "max_steps": 3}))
        assert len(self.losses(tmp_path / "out" / "checkpoint-3")) == 3
        assert f"with other data arguments: --train_file from {corpus} to {grown}." in caplog.text
        assert (tmp_path / "out" / "tokenizer.json").read_text() == before
        train_tokenizer(grown.read_text().splitlines(), kind, 280).save_pretrained(tmp_path / "other")
        options |= {"train_tokenizer": None, "tokenizer_name": tmp_path / "other"}
        options = {name: value for name, value in options.items() if value is not None}
        message = "error: --resume_from_checkpoint: .*checkpoint-3 has (a model of another size|other tokens)"
        with pytest.raises(SystemExit, match=message):
            run_here("flm-train", *self.flags({**options, "max_steps": 4}))

    @pytest.mark.parametrize(
        "kind, asked, size, message",
        [
            *((kind, kind, 300, None) for kind in ("bpe", "char", "word", "text8")),
            *(
                (kind, other, 300, "train_tokenizer` is")
                for kind, other in permutations(("bpe", "char", "word", "text8"), 2)
            ),
            ("word", "word", 8, "`vocab_size` is 8, but the resumed training has a tokenizer of 9 tokens"),
        ],
    )
    def test_resuming_with_another_type_of_tokenizer(self, kind, asked, size, message, tmp_path):
        train_tokenizer(["a b c d e"], kind, 300).save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        arguments = train.ModelArguments(train_tokenizer=asked, vocab_size=size)
        with nullcontext() if message is None else pytest.raises(ValueError, match=message):
            train.check_trained_tokenizer(tokenizer, arguments)

    def test_train_tokenizer_is_for_training(self, corpus, tmp_path):
        options = self.arguments(corpus, tmp_path / "out", do_eval=True)
        with pytest.raises(SystemExit, match="error: --train_tokenizer is for a new training"):
            run_here("flm-train", *self.flags(options))

    def test_dropping_all_blocks_is_refused(self, corpus, tmp_path):
        options = self.arguments(corpus, tmp_path / "out", dataloader_drop_last=True, per_device_train_batch_size=4096)
        with pytest.raises(SystemExit, match="error: Nothing was trained: .* --dataloader_drop_last drops"):
            run_here("flm-train", *self.flags(options))
        assert not (tmp_path / "out" / "model.safetensors").exists()

    def test_one_long_document_is_split_by_position(self, corpus, tmp_path):
        document = tmp_path / "document.txt"
        document.write_text(" ".join(corpus.read_text().split()))
        options = self.arguments(document, tmp_path / "out", max_steps=1, validation_split_percentage=10)
        run_here("flm-train", *self.flags(options))
        assert "eval_loss" in json.loads((tmp_path / "out" / "eval_results.json").read_text())
        # What is left to evaluate on may be too short for a block
        document.write_text(document.read_text()[:300])
        options["output_dir"] = tmp_path / "short"
        with pytest.raises(
            SystemExit, match="Validation texts: .* A larger --validation_split_percentage .* and 0 none"
        ):
            run_here("flm-train", *self.flags(options))
        run_here("flm-train", *self.flags({**options, "validation_split_percentage": 0}))
        assert not (tmp_path / "short" / "eval_results.json").exists()

    def test_yaml_file_with_flags_over_it_and_a_stream(self, corpus, tmp_path):
        options = self.arguments(corpus, tmp_path / "out", validation_file=str(corpus), streaming=True, train_tokenizer="bpe", vocab_size=280)  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
        run_here("flm-train", tmp_path / "config.yaml", "--max_steps", 2, "--save_steps", 2)
        assert (tmp_path / "out" / "checkpoint-2").is_dir() and not (tmp_path / "out" / "checkpoint-3").exists()
        assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 280

    @pytest.mark.slow
    def test_under_accelerate_launch(self, corpus, tmp_path):
        options = self.arguments(corpus, tmp_path / "two", per_device_train_batch_size=2, vocab_size=60)
        run_elsewhere("flm-train", *self.flags(options), launcher=launcher())
        one = self.arguments(corpus, tmp_path / "one", per_device_train_batch_size=4, vocab_size=60)
        run_here("flm-train", *self.flags(one))
        losses = [self.losses(tmp_path / name / "checkpoint-6") for name in ("one", "two")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"train_tokenizer": None}, "Pass --tokenizer_name, --train_tokenizer or --model_name_or_path"),
            ({"config_overrides": "hiden_size=3"}, "FLMConfig has no hiden_size"),
            ({"train_file": None}, "pass --dataset_name or --train_file"),
            ({"block_size": 5000}, "too few tokens for a single block"),
            (
                {"validation_split_percentage": 99, "train_split": "train[:20]"},
                "--validation_split_percentage: 99 % of",
            ),
            (
                {"eval_strategy": "epoch", "validation_split_percentage": 0},
                "--eval_strategy needs validation texts: pass --validation_file",
            ),
            ({"report_to": "no_such"}, "--report_to: no_such is not supported"),
            ({"config_overrides": "hidden_size=10,num_attention_heads=4"}, "error: .*`hidden_size` .10. must be"),
            (
                {"config_overrides": "attn_logit_softcapping=null", "attn_implementation": "flash_attention_2"},
                "error: .*[Ff]lash",
            ),
        ],
    )
    def test_mistakes_are_explained(self, corpus, tmp_path, overrides, message):
        with pytest.raises(SystemExit, match=message):
            run_here("flm-train", *self.flags(self.arguments(corpus, tmp_path, **overrides)))

    @pytest.mark.parametrize("error", [ValueError("a bug"), OSError("a bug"), TypeError("`block_size`")])
    def test_errors_that_are_not_about_a_flag_keep_their_traceback(self, error, corpus, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(training, "pack_dataset", fail)
        with pytest.raises(type(error)) as raised:
            run_here("flm-train", *self.flags(self.arguments(corpus, tmp_path)))
        assert raised.value is error


class TestHelp:
    COMMANDS = ["train", "distill", "generate", "evaluate", "publish", "convert"]

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_has_the_examples(self, command, capsys):
        with pytest.raises(SystemExit) as end:
            run_here(f"flm-{command}", "-h")
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert f"\n    flm-{command} " in text  # an example, of the docstring
        assert len(text.splitlines()) < 200

    def test_flags_of_transformers_are_accepted_but_not_listed(self, corpus, tmp_path, capsys):
        with pytest.raises(SystemExit):
            run_here("flm-train", "-h")
        text = capsys.readouterr().out
        assert all(
            name in text for name in ("--train_tokenizer", "--ema_decay", "--learning_rate", "TrainingArguments")
        )
        assert "--adam_beta1" not in text
        (*_, args) = train.make_parser().parse_args_and_config(["--output_dir", str(tmp_path), "--adam_beta1", "0.5"])
        assert args.adam_beta1 == 0.5

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["nowhere.yaml"], "error: .*nowhere.yaml"),
            (["--train_file", "nowhere.txt", "--train_tokenizer", "char"], "error: .*nowhere.txt"),
            (["--ema_decay", 2, "--train_tokenizer", "char"], "error: .*--ema_decay"),
            (["--train_file", "empty.txt", "--train_tokenizer", "char"], "error: --train_file: empty.txt is empty"),
            (
                ["--train_file", "half.jsonl", "--train_tokenizer", "char"],
                "error: --train_file: half.jsonl cannot be read: JSON",
            ),
            (["--train_file", "text.md", "--train_tokenizer", "char"], "error: --train_file must be a txt, .*text.md"),
            (["--train_file", "text.txt", "--tokenizer_name", "/no/folder"], "error: --tokenizer_name: .* /no/folder"),
            (["--model_name_or_path", "./no"], "error: --model_name_or_path: there is no folder ./no"),
            (
                ["--config_overrides", "a=[", "--train_file", "text.txt", "--train_tokenizer", "char"],
                "error: .*parsing",
            ),
            (
                ["--resume_from_checkpoint", "nope"],
                "error: --resume_from_checkpoint: nope is not a complete checkpoint",
            ),
            (["--resume_from_checkpoint", "true"], "error: --resume_from_checkpoint: there is no checkpoint in"),
            (["--train_file", "text.txt", "--preset", "any_order"], "error: --preset .*--model_type fmlm"),
            (["--train_file", "text.txt", "--target", "teacher"], "error: --target .*--model_type fmlm"),
            (["--max_stps", 3], r"error: unknown arguments --max_stps \(did you mean --max_steps\?\)"),
            (["--max_steps", 3, "settings.yaml"], r"error: .*settings.yaml \(must come before the flags\)"),
            (["half.yaml"], "error: half.yaml cannot be read"),
            (["list.yaml"], "error: list.yaml must have settings such as"),
            (["integer.yaml"], "error: argument --max_steps.*1.5"),
            (["number.yaml"], "error: argument --learning_rate.*fast"),
            (["lists.yaml"], "error: unknown arguments 17"),
            (["boolean.yaml"], "error: argument --streaming.*7"),
            (["typo.yaml"], r"error: unknown arguments --learning_rat \(did you mean --learning_rate\?\)"),
        ],
    )
    def test_errors_are_a_line(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        texts = {
            "empty.txt": "",
            "text.txt": "a b",
            "text.md": "a",
            "half.jsonl": '{"text": "a"}\n{"text": ',
            "half.yaml": "a: [",
        }
        texts |= {
            "settings.yaml": "seed: 1",
            "list.yaml": "- a",
            "integer.yaml": "max_steps: 1.5",
            "typo.yaml": "learning_rat: 1",
        }
        texts |= {
            "number.yaml": "learning_rate: fast",
            "lists.yaml": "block_size: [16, 17]",
            "boolean.yaml": "streaming: 7",
        }
        for name, text in texts.items():
            Path(name).write_text(text)
        if "--model_name_or_path" in arguments:
            arguments = [*arguments, "--train_file", "text.txt"]
        with pytest.raises(SystemExit, match=message) as error:
            run_here("flm-train", *arguments, "--output_dir", tmp_path, "--use_cpu")
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory) -> Path:
    training = TestTrainingScripts()
    folder = tmp_path_factory.mktemp("teacher") / "flm"
    options = training.arguments(corpus, folder, max_steps=2, save_steps=2, prompt_fraction=0.5)
    run_here("flm-train", *training.flags(options))
    return folder


class TestDistillationScript:
    settings = {
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
    }

    def distill(self, output, **overrides):
        """The configuration of a student, and the first row of its log."""
        run_here("flm-distill", *TestTrainingScripts.flags({**self.settings, "output_dir": output, **overrides}))
        config = json.loads((output / "config.json").read_text())
        return config, TestTrainingScripts.log(output)[0]

    def test_teacher_gives_tokenizer_and_data(self, teacher, tmp_path):
        config, log = self.distill(tmp_path, teacher=teacher, prompt_fraction=0.5)
        assert config["architectures"] == ["FMLMModel"] and config["max_position_embeddings"] == 16
        assert config["per_token_timesteps"]
        assert {"loss_diagonal", "loss_off_diagonal"} <= log.keys()
        for name in ("tokenizer.json", "data_settings.json"):
            assert (tmp_path / name).read_text() == (teacher / name).read_text()

    def test_teachers_of_other_kinds(self, teacher, tmp_path):
        self.distill(tmp_path / "fmlm", teacher=teacher)
        GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
        for name, message in (("fmlm", "must be an `FLMModel`, got `FMLMModel`"), ("gpt2", "got a GPT2Model")):
            for file in ("tokenizer.json", "tokenizer_config.json", "data_settings.json"):
                shutil.copy(teacher / file, tmp_path / name)
            with pytest.raises(SystemExit, match=f"error: --teacher.*{message}"):
                self.distill(tmp_path / "out", teacher=tmp_path / name)

    def test_preset_two_network_then_second_stage(self, teacher, tmp_path):
        options = {"preset": "two_network", "boundary_probability": 0.0}
        config, log = self.distill(tmp_path / "two", teacher=teacher, **options)
        assert config["architectures"] == ["FMLMTwoNetworkModel"] and config["learned_loss_weighting"]
        assert "loss_diagonal" not in log
        config, log = self.distill(tmp_path / "second", teacher=tmp_path / "two", preset="second_stage")
        assert config["architectures"] == ["FMLMModel"] and not config["learned_loss_weighting"]

    def test_preset_distribution_matching(self, teacher, tmp_path):
        self.distill(tmp_path / "fmlm", teacher=teacher)
        for student in ({}, {"student": tmp_path / "fmlm"}):
            out = tmp_path / f"matched-{len(student)}"
            config, log = self.distill(out, teacher=teacher, preset="distribution_matching", save_steps=2, **student)
            assert config["architectures"] == ["FMLMModel"] and "loss_auxiliary" in log
            assert (out / "checkpoint-2" / "auxiliary.safetensors").is_file()

    def test_preset_self_distillation(self, teacher, tmp_path):
        options = {"preset": "self_distillation", "block_size": 12, "dropout": 0.0}
        config, log = self.distill(tmp_path, teacher=teacher, **options)
        assert config["architectures"] == ["FMLMModel"] and config["dropout"] == 0.0

    def test_train_file_stands_in_for_the_data_of_the_teacher(self, teacher, corpus, tmp_path):
        other = tmp_path / "other.jsonl"
        other.write_text("\n".join(json.dumps({"story": line}) for line in corpus.read_text().splitlines()))
        self.distill(tmp_path / "out", teacher=teacher, train_file=other)
        data = json.loads((tmp_path / "out" / "data_settings.json").read_text())
        assert data["train_file"] == str(other) and data["block_size"] == 16

    def test_yaml_file_over_the_preset(self, teacher, tmp_path):
        settings = {**self.settings, "teacher": str(teacher), "diagonal_fraction": 1.0}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        run_elsewhere("flm-distill", tmp_path / "config.yaml", "--output_dir", tmp_path / "yaml")
        log = TestTrainingScripts.log(tmp_path / "yaml")[0]
        assert "loss_diagonal" in log and "loss_off_diagonal" not in log


def test_scripts_go_on_from_models_without_boundaries(tmp_path, monkeypatch):
    """As those of the quickstart are, whose tokenizer has no BOS and EOS tokens."""
    stories = [" ".join(f"w{(start + n) % 30}" for n in range(12)) for start in range(40)]
    tokenizer = train_tokenizer(stories, "word", 100)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    build_flm(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    (tmp_path / "stories.txt").write_text("\n".join(stories))
    seen, train = [], FLMTrainer.train
    monkeypatch.setattr(FLMTrainer, "train", lambda self, **options: seen.append(self) or train(self, **options))
    flags = {
        **TestDistillationScript.settings,
        "train_file": tmp_path / "stories.txt",
        "validation_split_percentage": 0,
    }
    for script, name in (("flm-train", "model_name_or_path"), ("flm-distill", "teacher")):
        own = {name: tmp_path / "model", "output_dir": tmp_path / script}
        run_here(script, *TestTrainingScripts.flags({**flags, **own}))
        texts = AutoTokenizer.from_pretrained(tmp_path / script).batch_decode(seen[-1].train_dataset[:]["input_ids"])
        assert texts == stories


class TestFlowMapScript:
    """FMLM+ without a trained FLM, and with one as the teacher of the diagonal."""

    def train(self, script, output, **overrides):
        settings = {**TestDistillationScript.settings, "output_dir": output, **overrides}
        run_here(script, *TestTrainingScripts.flags(settings))
        model = AutoModel.from_pretrained(output)
        return model, json.loads((output / "training.json").read_text())["arguments"]

    def test_from_scratch(self, corpus, tmp_path):
        data = TestTrainingScripts().arguments(corpus, tmp_path)
        names = ("train_file", "train_tokenizer", "vocab_size", "block_size", "config_overrides")
        data = {"model_type": "fmlm", **{name: data[name] for name in names if name in data}}
        model, arguments = self.train("flm-train", tmp_path / "plus", **data)
        assert type(model) is FMLMModel and model.config.per_token_timesteps
        assert model.config.time_reparameterization is None
        assert (arguments["prompt_fraction"], arguments["prompt_kinds"]) == (1.0, ["independent"])
        assert model.generate(num_rounds=2).shape == (1, 16)
        masked = new_masked_model(model.config)
        masked.save_pretrained(tmp_path / "masked")
        data = {**data, "masked_model": tmp_path / "masked", "tokenizer_name": tmp_path / "plus"}
        del data["train_tokenizer"], data["config_overrides"]
        again, arguments = self.train("flm-train", tmp_path / "again", masked_probability=0.5, **data)
        assert again.config.vocab_size == model.config.vocab_size and arguments["masked_probability"] == 0.5
        with pytest.raises(SystemExit, match="--masked_probability needs"):
            del data["masked_model"]
            self.train("flm-train", tmp_path / "no", **data, masked_probability=0.5)

    def test_from_a_teacher(self, teacher, tmp_path):
        model, arguments = self.train("flm-distill", tmp_path, teacher=teacher, preset="any_order")
        assert model.config.per_token_timesteps and model.config.time_reparameterization is None
        assert arguments["prompt_kinds"] == ["independent"]
        # It goes on in this preset, and a student that counts time differently does not.
        options = {"teacher": teacher, "preset": "any_order", "student": tmp_path}
        self.train("flm-distill", tmp_path / "again", **options)
        self.train("flm-distill", tmp_path / "other", teacher=teacher)
        with pytest.raises(SystemExit, match="--student: time_reparameterization differs"):
            self.train("flm-distill", tmp_path / "no", **{**options, "student": tmp_path / "other"})
