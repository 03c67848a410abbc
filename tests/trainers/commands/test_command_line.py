"""Settings of YAML files, as the flags would have them, and numbers out of range."""

import math

import pytest
from example_scripts import run_here

from modeling_flm.trainers.commands import train


def parse(path, *flags):
    """All arguments of flm-train from a YAML file."""
    flags = ["--output_dir", str(path.parent / "out"), "--use_cpu", *flags]
    parsed = train.make_parser().parse_args_and_config([str(path), *flags])
    return {name: value for each in parsed for name, value in vars(each).items()}


@pytest.mark.parametrize(
    "line, expected",
    [
        ("eval_strategy: no", "no"),
        ("save_strategy: no", "no"),
        ("save_strategy: 'no'", "no"),
        ("streaming: no", False),
        ("streaming: 'no'", False),
        ("streaming: off", False),
        ("streaming: On", True),
        ("streaming: true", True),
        ("run_name: on", "on"),
        ("run_name: 2026-01-02", "2026-01-02"),
        ("run_name: 007", "007"),
        ("run_name: 1_0", "1_0"),
        ("run_name: 'null'", "null"),
        ("seed: 010", 10),
        ("seed: 1_000", 1000),
        ("learning_rate: 1e-3", 0.001),
        ("learning_rate: .5", 0.5),
        ("max_grad_norm: inf", math.inf),
        ("ema_decay: null", None),
        ("ema_decay: ~", None),
        ("ema_decay: None", None),
        ("ema_decay: none", None),
        ("tokenizer_name: None", None),
        ("report_to: none", []),
        ("prompt_kinds: [prefix, random]", ["prefix", "random"]),
        ("lr_scheduler_kwargs: {min_lr: 0.5, flag: no}", {"min_lr": 0.5, "flag": False}),
    ],
)
def test_yaml_settings_are_what_the_flags_would_be(line, expected, tmp_path):
    (tmp_path / "settings.yaml").write_text(line)
    assert parse(tmp_path / "settings.yaml")[line.split(":")[0]] == expected


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_yaml_with_a_merge_and_a_byte_order_mark(start, tmp_path):
    (tmp_path / "settings.yaml").write_text(
        f"{start}fsdp_config: &base {{a: 1}}\nlr_scheduler_kwargs: {{<<: *base, a: 2}}"
    )
    assert parse(tmp_path / "settings.yaml")["lr_scheduler_kwargs"] == {"a": 2}


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1\nmax_steps: 2\nseed: 3", "settings.yaml cannot be read: seed is there twice, in lines 1 and 3"),
        ("max_steps: 2\nmax-steps: 3", "settings.yaml: max_steps and max-steps are the same setting; leave one out"),
        ("model: a\nmodel_name_or_path: b", "settings.yaml: model and model_name_or_path are the same setting"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "a is there twice"),
        ("learning_rate:", "settings.yaml: learning_rate has no value; leave out the line, or write `learning_rate: null`"),
        ("seed:   # later", "settings.yaml: seed has no value"),
        ("max_steps: 1:30", "argument --max_steps.*: invalid int value: '1:30'"),
        ("max_steps: 1e3", "argument --max_steps.*: invalid int value: '1e3'"),
        ("warmup_steps:\t1", "settings.yaml cannot be read: .*cannot start any token"),
        ("no: 1", "unknown arguments --no"),
        ("config_overrides: 'dropout=0.1,dropout=0.2'", "--config_overrides: dropout is there twice"),
    ],
)  # fmt: skip
def test_yaml_mistakes(text, message, tmp_path):
    (tmp_path / "settings.yaml").write_text(text)
    (tmp_path / "text.txt").write_text("a b c\n" * 99)
    flags = ["--train_file", tmp_path / "text.txt", "--train_tokenizer", "char", "--vocab_size", "20"]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run_here("flm-train", tmp_path / "settings.yaml", "--output_dir", tmp_path / "out", "--use_cpu", *flags)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("max_train_samples", 0, "at least 1, got 0"),
        ("max_eval_samples", -1, "at least 1, got -1"),
        ("block_size", 0, "at least 1, got 0"),
        ("preprocessing_num_workers", -1, "at least 0, got -1"),
        ("validation_split_percentage", -1, "at least 0 and below 100, got -1"),
        ("validation_split_percentage", 100, "at least 0 and below 100, got 100"),
        ("seed", -1, "at least 0 and below 4294967296, got -1"),
        ("seed", 2**32, "at least 0 and below 4294967296, got 4294967296"),
        ("data_seed", -1, "at least 0 and below 4294967296, got -1"),
        ("max_steps", 0, "above 0, got 0"),
        ("num_train_epochs", 0, "above 0, got 0"),
        ("num_train_epochs", "nan", "above 0, got nan"),
        ("learning_rate", -1, "at least 0, got -1"),
        ("weight_decay", -1, "at least 0, got -1"),
        ("adam_beta1", -1, "at least 0 and below 1, got -1"),
        ("adam_beta2", 1, "at least 0 and below 1, got 1"),
        ("adam_epsilon", -1, "at least 0, got -1"),
        ("max_grad_norm", "nan", "at least 0, got nan"),
        ("gradient_accumulation_steps", 0, "at least 1, got 0"),
        ("eval_accumulation_steps", 0, "at least 1, got 0"),
        ("per_device_train_batch_size", -1, "at least 1, got -1"),
        ("dataloader_num_workers", -1, "at least 0, got -1"),
        ("save_steps", -1, "at least 0, got -1"),
        ("sample_steps", -1, "at least 0, got -1"),
    ],
)
def test_numbers_out_of_range(name, value, message, tmp_path):
    with pytest.raises(SystemExit, match=f"error: --{name} must be {message}"):
        run_here("flm-train", "--output_dir", tmp_path, "--use_cpu", f"--{name}", value)


@pytest.mark.parametrize("name, value", [("seed", -1), ("num_samples", 0), ("batch_size", -1)])
def test_numbers_of_generate(name, value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_here("flm-generate", tmp_path, f"--{name}", value)
    assert f"error: --{name} must be at least" in capsys.readouterr().err
