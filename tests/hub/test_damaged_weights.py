"""Damaged files of weights: every way to load a model names the file, and says what to do."""

import json
import math
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from datasets import Dataset
from example_scripts import run_here
from generators import load_generator
from oracle import SCORER
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import build_flm
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_flm import FLMModel, FMLMModel
from modeling_flm.trainers import (
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
    load_gen_ppl,
    load_texts,
    train_tokenizer,
)
from modeling_flm.trainers.commands import evaluate as command
from modeling_flm.trainers.evaluation import evaluate_likelihood
from modeling_flm.trainers.evaluation.harness import FLMHarnessModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = train_tokenizer([" ".join(f"w{n}" for n in range(50))], "word", vocab_size=53)
    tokenizer.save_pretrained(folder)
    build_flm(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


DAMAGES = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a pointer of Git LFS.*git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html>Not found</html>", "a web page: download or copy the file again"),
    "empty": (b"", "empty: download or copy the file again"),
    "text": (b"not found", "truncated or damaged: download or copy the file again"),
    "truncated": (None, "truncated or damaged: download or copy the file again"),
}  # fmt: skip


def damage(path: Path, how: str) -> str:
    """Damages a file, and returns the expected message."""
    content, message = DAMAGES[how]
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    return f"{path} is {message}"


@pytest.mark.parametrize("how", DAMAGES)
def test_from_pretrained(how, folder):
    message = damage(folder / "model.safetensors", how)
    for load in (AutoModel.from_pretrained, FLMModel.from_pretrained):
        with pytest.raises(OSError, match=message):
            load(folder)


def test_model_of_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    damage(folder / "model.safetensors", "page")
    cached = tmp_path / "models--me--tiny"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    with pytest.raises(OSError, match=f"{cached}/snapshots/abc/model.safetensors is a web page"):
        AutoModel.from_pretrained("me/tiny", cache_dir=tmp_path)


def test_sharded_weights(folder):
    AutoModel.from_pretrained(folder).save_pretrained(folder / "sharded", max_shard_size="40KB")
    shard = sorted((folder / "sharded").glob("*.safetensors"))[1]
    message = damage(shard, "truncated")
    with pytest.raises(OSError, match=message):
        AutoModel.from_pretrained(folder, subfolder="sharded")


def test_adapter(folder):
    adapted = get_peft_model(AutoModel.from_pretrained(folder), LoraConfig(target_modules=["qkv_proj"]))
    adapted.save_pretrained(folder / "adapter")
    message = damage(folder / "adapter" / "adapter_model.safetensors", "pointer")
    for load in (AutoModel.from_pretrained, FLMModel.from_pretrained):
        with pytest.raises(OSError, match=message):
            load(folder / "adapter")


@pytest.mark.parametrize(
    "command",
    [
        ["flm-generate", "MODEL"],
        ["flm-generate", "GOOD", "--guidance_model", "MODEL", "--guidance_scale", "2"],
        ["flm-train", "--model", "MODEL", "--train_file", "TEXTS", "--output_dir", "OUT", "--use_cpu"],
        ["flm-distill", "--teacher", "MODEL", "--train_file", "TEXTS", "--output_dir", "OUT", "--use_cpu"],
        ["flm-evaluate", "--model", "MODEL", "--output_dir", "OUT", "--num_samples", "2"],
        ["flm-publish", "--model", "MODEL", "--repo_id", "me/tiny", "--dry_run", "OUT"],
        ["flm-export", "--model", "MODEL", "--output", "OUT"],
        ["flm-convert", "--checkpoint", "RELEASED", "--output", "OUT"],
    ],
)
def test_commands(command, folder, saved, tmp_path):
    (tmp_path / "texts.txt").write_text("w1 w2 w3\n" * 50)
    message = damage(folder / "model.safetensors", "truncated")
    shutil.copytree(folder, tmp_path / "released")
    (tmp_path / "released" / "config.json").write_text('{"vocab_size": 53}')
    places = {"MODEL": folder, "GOOD": saved, "TEXTS": tmp_path / "texts.txt", "OUT": tmp_path / "out"}
    places["RELEASED"] = tmp_path / "released"
    if command[0] == "flm-convert":
        message = message.replace(str(folder), str(tmp_path / "released"))
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run_here(*(places.get(part, part) for part in command))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["pointer", "empty", "text"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_json_files(name, how, folder):
    message = damage(folder / name, how)
    with pytest.raises(SystemExit, match=f"error: --model: {message}"):
        run_here("flm-generate", folder)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_in_config(**settings):
    return lambda folder: edit(folder / "config.json", lambda config: config.update(settings))


def take_other_tokenizer(folder):
    train_tokenizer([" ".join(f"w{n}" for n in range(90))], "word", vocab_size=90).save_pretrained(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (set_in_config(num_hidden_layers=5), "do not match its configuration, missing keys: layers"),
        (set_in_config(num_hidden_layers=1), "do not match its configuration, unexpected keys: layers"),
        (set_in_config(vocab_size=60), "weights have other sizes than its config.json"),
        (
            lambda folder: edit(folder / "config.json", lambda config: config.pop("vocab_size")),
            "weights have other sizes than its config.json",
        ),
        (set_in_config(hidden_size="x"), "cannot be loaded: .*'hidden_size' expected int"),
        (set_in_config(model_type=None), "cannot be loaded: "),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded: "),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded: it has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded: "),
        (take_other_tokenizer, "has 90 tokens, but the model has 53: it belongs to another model"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["flm-generate", "--model", "MODEL"],
        ["flm-distill", "--teacher", "MODEL", "--train_file", "TEXTS", "--output_dir", "OUT", "--use_cpu"],
        ["flm-evaluate", "--model", "MODEL", "--output_dir", "OUT", "--num_samples", "2", "--scorer", SCORER],
        ["evaluate_likelihood", "--model", "MODEL", "--text_file", "TEXTS"],
    ],
)
def test_folders_whose_files_do_not_fit(command, change, message, folder, tmp_path):
    (tmp_path / "texts.txt").write_text("w1 w2 w3\n" * 50)
    change(folder)
    places = {"MODEL": folder, "TEXTS": tmp_path / "texts.txt", "OUT": tmp_path / "out"}
    # The script catches errors of `main`.
    with pytest.raises((SystemExit, ValueError), match=f"(error: {command[1]}|`model`): .*{message}"):
        run_here(*(places.get(part, part) for part in command))


OTHER_MODELS = [
    *(
        (flag, "tokenizer.json", how)
        for flag in ("--model", "--scorer", "--mauve_model", "--tokenizer")
        for how in DAMAGES
    ),
    *((flag, "config.json", how) for flag in ("--model", "--scorer", "--mauve_model") for how in DAMAGES),
    *(
        (flag, "model.safetensors", how)
        for flag in ("--model", "--scorer", "--mauve_model")
        for how in (*DAMAGES, "other", "bin")
    ),
]


@pytest.mark.parametrize("flag, name, how", OTHER_MODELS)
def test_models_of_other_libraries(flag, name, how, saved, folder, tmp_path, monkeypatch):
    """One line, and nothing is generated."""
    monkeypatch.setattr(command, "generate_texts", lambda *args, **kwargs: pytest.fail("generates"))
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=53)
    GPT2LMHeadModel(config).save_pretrained(folder)
    if how == "other":  # weights of a part of the model
        save_file({"wte.weight": torch.zeros(53, 8)}, folder / name, metadata={"format": "pt"})
        message = "lacks weights|missing keys"
    elif how == "bin":
        (folder / name).unlink()
        (folder / "pytorch_model.bin").write_bytes(b"PK")
        message = f"{folder}"
    else:
        message = damage(folder / name, how)
    (tmp_path / "texts.txt").write_text("w1 w2 w3\n" * 5)
    options = {"--samples_file": tmp_path / "texts.txt"} if flag == "--tokenizer" else {"--model": saved}
    options |= {"--scorer": SCORER, "--reference_file": tmp_path / "texts.txt", flag: folder}
    options |= {"--output_dir": tmp_path / "out", "--num_samples": "2"}
    with pytest.raises(SystemExit, match=f"error: {flag}: .*({message})") as error:
        run_here("flm-evaluate", *(part for option in options.items() for part in option))
    assert "\n" not in str(error.value)


def use_in_trainer(folder, method="train"):
    args = FLMTrainingArguments(folder / "out", max_steps=1, use_cpu=True, report_to=[])
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8})
    return getattr(FLMTrainer(str(folder), args, train_dataset=dataset, eval_dataset=dataset), method)()


def distill(folder):
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8})
    args = FMLMTrainingArguments(folder / "out", max_steps=1, use_cpu=True, report_to=[])
    student = FMLMModel.from_flm(build_flm())
    return FMLMTrainer(student, args, teacher=AutoModel.from_pretrained(folder), train_dataset=dataset).train()


FINITE = {
    "train": use_in_trainer,
    "evaluate": lambda folder: use_in_trainer(folder, "evaluate"),
    "teacher": distill,
    "evaluate_likelihood": lambda folder: evaluate_likelihood(
        AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), ["w1 w2"]
    ),
    "harness": lambda folder: FLMHarnessModel(str(folder)),
    "flm-generate": lambda folder: run_here("flm-generate", folder),
    "flm-evaluate": lambda folder: run_here("flm-evaluate", "--model", folder, "--output_dir", folder / "out"),
    "flm-publish": lambda folder: run_here("flm-publish", folder, "--repo_id", "me/tiny", "--dry_run", folder / "out"),
    "flm-export": lambda folder: run_here("flm-export", folder),
    "server": lambda folder: load_generator(str(folder), "cpu", "float32"),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("use", FINITE)
def test_weights_that_are_not_finite(use, value, folder):
    weights = load_file(folder / "model.safetensors")
    weights["layers.1.mlp.up_proj.weight"][3, 2] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        (SystemExit, ValueError, OSError), match=f"{folder}. has weights that are NaN or infinite, in layers.1.mlp.up"
    ):
        FINITE[use](folder)


@pytest.mark.parametrize(
    "use", ["train", "evaluate", "teacher by name", "harness", *(each for each in FINITE if "-" in each), "server"]
)
def test_missing_weights(use, folder):
    """Random weights would take their place."""
    set_in_config(num_hidden_layers=5)(folder)
    uses = {
        **FINITE,
        "teacher by name": lambda folder: FMLMTrainer(FMLMModel.from_flm(build_flm()), teacher=str(folder)),
    }
    with pytest.raises(
        (SystemExit, ValueError, OSError), match=f"{folder} do not match its configuration, missing keys: layers"
    ):
        uses[use](folder)


def test_adapters_without_their_weights(folder):
    adapted = get_peft_model(AutoModel.from_pretrained(folder), LoraConfig(target_modules=["qkv_proj"]))
    adapted.save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_model.safetensors"
    for weights, message in (({"x": torch.zeros(1)}, "Found missing adapter keys"), (None, "truncated or damaged")):
        path.write_bytes(b"x") if weights is None else save_file(weights, path)
        with pytest.raises(SystemExit, match=message):
            run_here(
                "flm-publish",
                folder / "adapter",
                "--tokenizer",
                folder,
                "--repo_id",
                "me/tiny",
                "--dry_run",
                folder / "out",
            )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scorers_with_weights_that_are_not_finite(value, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=53))
    model.transformer.wte.weight.data[50, 1] = value  # of a token that the texts may not have
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`model_id`: {tmp_path} has weights that are NaN or infinite"):
        load_gen_ppl().compute(predictions=["a text"], model_id=str(tmp_path), device="cpu")


@pytest.mark.parametrize("how", DAMAGES)
def test_harness(how, folder):
    message = damage(folder / "model.safetensors", how)
    with pytest.raises(ValueError, match=f"`pretrained`: {message}"):
        FLMHarnessModel(str(folder))


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: FLMHarnessModel(str(folder), revision="v1"),
        lambda folder: run_here("flm-generate", folder, "--revision", "v1"),
        lambda folder: run_here("flm-evaluate", "--model", folder, "--revision", "v1", "--output_dir", folder / "out"),
        lambda folder: run_here(
            *("flm-generate", folder, "--guidance_model", folder, "--guidance_revision", "v1", "--guidance_scale", "2")
        ),
    ],
)
def test_folders_have_no_revision(use, folder):
    with pytest.raises((SystemExit, ValueError), match=f"{folder} is a folder, which has no revision 'v1': leave out"):
        use(folder)


@pytest.mark.parametrize("command", [("flm-generate",), ("flm-evaluate", "--model")])
def test_empty_revisions_are_refused(command, tmp_path):
    options = ("--output_dir", tmp_path / "out") if command[0] == "flm-evaluate" else ()
    with pytest.raises(SystemExit, match="the revision is empty: name a branch, tag or commit, or leave it out"):
        run_here(*command, "me/flm", "--revision", "", *options)


@pytest.mark.parametrize("source", ["train_file", "dataset_name"])
def test_local_texts_have_no_revision(source, tmp_path):
    (tmp_path / "a.txt").write_text("a b")
    with CaptureLogger(logging.get_logger("modeling_flm.trainers.data.loading")) as log:
        texts = load_texts(**{source: str(tmp_path)}, dataset_revision="v1", validation_percentage=0)
    assert f"`dataset_revision` is ignored: {tmp_path} is local" in log.out and texts["train"]["text"] == ["a b"]
