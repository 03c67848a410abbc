"""The recipes, run on miniatures of their datasets and tokenizers, and their settings."""

import json
import random
import sys
from pathlib import Path

import datasets
import grammar
import oracle
import published
import pytest
import study
import yaml
from datasets import Dataset
from example_scripts import EXAMPLES, run_here
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModel, AutoTokenizer, BertTokenizer, GPT2Tokenizer

from modeling_flm.trainers import FMLMTrainingArguments
from modeling_flm.trainers.commands import distill, evaluate, train
from modeling_flm.trainers.commands.evaluate import check_arguments, complete_arguments


RECIPES = EXAMPLES / "recipes"

TINY = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,conditioning_size=16"
QUICK = {
    "max_steps": 2,
    "warmup_steps": 0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "dataloader_num_workers": 0,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
SCORED = {
    "eval_gen_ppl_steps": 2,
    "eval_gen_ppl_num_samples": 3,
    "eval_gen_ppl_model": oracle.FIXTURES / "scorer_tiny",
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command with a recipe and further flags."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def run(script, recipe: str, **flags):
        arguments = [str(RECIPES / f"{recipe}.yaml")]
        for name, value in flags.items():
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        run_here(script, *arguments)

    return run


def texts(count: int, sentences: int = 1) -> list[str]:
    rng = random.Random(0)
    return [" ".join(grammar.sample_story(rng) for _ in range(sentences)) for _ in range(count)]


def arrow_files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}


def logged(folder: str) -> dict:
    (state,) = Path(folder).glob("checkpoint-*/trainer_state.json")
    return {key: value for row in json.loads(state.read_text())["log_history"] for key, value in row.items()}


def test_lm1b(run, tmp_path):
    for split, count in (("train", 200), ("test", 20)):
        Dataset.from_dict({"text": texts(count)}).to_parquet(tmp_path / "lm1b" / f"{split}.parquet")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({word for text in texts(500) for word in text.split()}),
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained("bert")

    data = {"dataset_name": "lm1b", "tokenizer_name": "bert", "block_size": 16, "preprocessing_num_workers": 2}
    flags = {**data, **QUICK, **SCORED, "config_overrides": TINY}
    run("flm-train", "lm1b_flm", **flags)
    prepared = arrow_files(tmp_path / "cache")
    assert prepared
    run("flm-train", "lm1b_flm", **{**flags, "output_dir": "outputs/again"})
    assert arrow_files(tmp_path / "cache") == prepared
    flm = AutoModel.from_pretrained("outputs/lm1b_flm")
    assert flm.config.vocab_size == len(words)
    assert (flm.config.bos_token_id, flm.config.eos_token_id, flm.config.pad_token_id) == (2, 3, 0)
    logs = logged("outputs/lm1b_flm")
    assert {
        "eval_loss",
        *(f"eval_{name}_{n}" for name in ("gen_ppl", "entropy") for n in (1, 2, 4, 32)),
    } <= logs.keys()
    assert all(torch_equal(flm, AutoModel.from_pretrained("outputs/again")))

    run("flm-distill", "lm1b_two_network", **QUICK, eval_gen_ppl_steps=0)
    run("flm-distill", "lm1b_second_stage", **QUICK, **SCORED)
    assert "eval_gen_ppl_1" in logged("outputs/lm1b_second_stage")
    assert AutoModel.from_pretrained("outputs/lm1b_two_network").config.model_type == "fmlm_two_network"
    run(
        "flm-evaluate",
        "evaluation_fmlm_lm1b",
        model="outputs/lm1b_second_stage",
        num_steps=[1, 2],
        num_samples=4,
        scorer=oracle.FIXTURES / "scorer_tiny",
        output_dir="outputs/evaluation",
    )
    *table, _, line = Path("outputs/evaluation/results.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == ["1", "2"]
    assert "protocol published" in line and "Not comparable with the published figures" in line
    sampling = json.loads(Path("outputs/evaluation/results.json").read_text())["sampling"]
    assert (sampling["gamma"], sampling["max_length"], sampling["dtype"]) == (0.8, 16, "bfloat16")
    assert {path.name for path in Path("outputs/evaluation").iterdir()} >= {"samples_1.jsonl", "results.png"}


def torch_equal(first, second):
    return ((tensor == second.state_dict()[name]).all() for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("streaming", [False, True])
def test_owt(streaming, run, tmp_path):
    Dataset.from_dict({"text": texts(60, sentences=3)}).to_parquet(tmp_path / "owt" / "train.parquet")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts(100), vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    (tmp_path / "gpt2").mkdir()
    tokenizer.save_model(str(tmp_path / "gpt2"))
    paths = {"vocab": str(tmp_path / "gpt2" / "vocab.json"), "merges": str(tmp_path / "gpt2" / "merges.txt")}
    GPT2Tokenizer(**paths).save_pretrained("gpt2")

    held_out = {"train_split": "train[10:]", "validation_split": "train[:10]"} if streaming else {}
    held_out = held_out or {"train_split": "train[:-10]", "validation_split": "train[-10:]"}
    data = {"dataset_name": "owt", "tokenizer_name": "gpt2", "block_size": 32, "streaming": streaming, **held_out}
    flags = {**data, **QUICK, "eval_gen_ppl_steps": 0, "config_overrides": TINY, "preprocessing_num_workers": 2}
    run("flm-train", "owt_flm", **flags)
    tokenizer = AutoTokenizer.from_pretrained("outputs/owt_flm")
    size = len(AutoTokenizer.from_pretrained("gpt2")) + 1
    assert len(tokenizer) == AutoModel.from_pretrained("outputs/owt_flm").config.vocab_size == size
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|endoftext|>",
        "<|endoftext|>",
        "[PAD]",
    )
    assert "eval_loss" in logged("outputs/owt_flm")
    if not streaming:
        run("flm-distill", "owt_single_stage", **QUICK, **SCORED)
        logs = logged("outputs/owt_single_stage")
        assert {"loss_diagonal", "loss_off_diagonal", "eval_loss"} <= logs.keys()
        (state,) = Path("outputs/owt_single_stage").glob("checkpoint-*/trainer_state.json")
        assert json.loads(state.read_text())["best_metric"] == logs["eval_gen_ppl_1"]


def test_text8(run, tmp_path):
    text = " ".join("".join(c for c in story if c.isalpha() or c == " ") for story in texts(300))
    for split, part in (("train", text[:30_000]), ("validation", text[30_000:])):
        Dataset.from_dict({"text": [part]}).to_parquet(tmp_path / "text8" / f"{split}.parquet")
    run("flm-train", "text8_flm", dataset_name="text8", config_overrides=TINY, **QUICK)
    model = AutoModel.from_pretrained("outputs/text8_flm")
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (27, 256)
    sample = AutoTokenizer.from_pretrained("outputs/text8_flm").decode(model.generate(num_steps=1)[0])
    assert len(sample) == 256
    run("flm-distill", "text8_single_stage", **QUICK)
    assert "eval_loss" in logged("outputs/text8_single_stage")
    assert AutoModel.from_pretrained("outputs/text8_single_stage").config.model_type == "fmlm"


def test_a_recipe_on_own_texts(run, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("\n".join(texts(200)))
    flags = {"train_tokenizer": "word", "train_file": "own.txt", "block_size": 16, "config_overrides": TINY}
    run("flm-train", "text8_flm", **{**flags, **QUICK}, preprocessing="lm1b")
    settings = json.loads(Path("outputs/text8_flm/data_settings.json").read_text())
    assert "dataset_name" not in settings and settings["train_file"] == str(tmp_path / "own.txt")


def test_values_of_a_file_are_checked_as_those_of_flags(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "RECIPES", tmp_path)
    (tmp_path / "bad.yaml").write_text("teacher: x\npreset: two_networks\noutput_dir: y\n")
    with pytest.raises(SystemExit, match="--preset: invalid choice"):
        run("flm-distill", "bad")
    (tmp_path / "scalar.yaml").write_text("num_steps: 0\n")  # a number instead of a list
    with pytest.raises(SystemExit, match="must be at least 1"):
        run("flm-evaluate", "scalar", model="x", output_dir="y")


EVALUATIONS = sorted(RECIPES.glob("evaluation_*.yaml"))
TRAININGS = sorted(path for path in RECIPES.glob("*_*.yaml") if path not in EVALUATIONS)


def test_global_batches_are_as_published():
    num_processes = yaml.safe_load((RECIPES / "ddp.yaml").read_text())["num_processes"]
    for path in TRAININGS:
        recipe = yaml.safe_load(path.read_text())
        batch, accumulation = (
            recipe[f"{name}"] for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        assert num_processes * batch * accumulation == 512, path
        assert f"{num_processes} x {batch} x {accumulation} = 512" in path.read_text()
        assert recipe["output_dir"] == f"outputs/{path.stem}"
        if "teacher" in recipe:
            assert (RECIPES / f"{Path(recipe['teacher']).name}.yaml").is_file()


def parse(script, path: Path, **flags) -> tuple:
    """Parses a recipe into the argument classes of its script."""
    arguments = [str(value) for name, value in flags.items() for value in (f"--{name}", value)]
    parser = script.make_parser()
    if script is distill:  # whose teacher does not exist
        parser.find_defaults = None
    return parser.parse_args_and_config([str(path), *arguments])


# The published numbers of steps, fraction of fresh noise, and repository of the weights
PUBLISHED_EVALUATIONS = {
    "evaluation_flm_lm1b": ([8, 16, 32, 64, 128, 256, 512, 1024], 0.0, "david3684/FLM-B-LM1B"),
    "evaluation_fmlm_lm1b": ([1, 2, 4, 8, 16, 32], 0.8, "david3684/FMLM-B-LM1B"),
    "evaluation_flm_owt": ([8, 16, 32, 64, 128, 256, 512, 1024], 0.0, "david3684/FLM-B-OWT"),
    "evaluation_fmlm_owt": ([1, 2, 4, 8, 16, 32], 1.0, "david3684/FMLM-B-OWT"),
}


def test_evaluations_of_the_released_models_are_as_published():
    assert [path.stem for path in EVALUATIONS] == sorted(PUBLISHED_EVALUATIONS)
    assert {f"evaluation_{name}" for name in published.PUBLISHED} == PUBLISHED_EVALUATIONS.keys()
    for path in EVALUATIONS:
        num_steps, gamma, repository = PUBLISHED_EVALUATIONS[path.stem]
        name = path.stem.removeprefix("evaluation_")
        assert list(published.PUBLISHED[name]) == num_steps
        assert published.repository(name, "david3684") == repository
        (args,) = parse(evaluate, path)
        check_arguments(args)
        args = complete_arguments(args)
        assert (args.num_steps, args.gamma, args.protocol) == (num_steps, gamma, "published")
        assert (args.scorer, args.scorer_dtype, args.num_samples) == ("gpt2-large", "float32", 1024)
        assert len(args.seeds) == 1 and args.keep_special_tokens
        assert (args.temperature, args.top_k, args.top_p, args.guidance_model) == (None, None, None, None)
        assert args.output_dir == f"outputs/{path.stem}"
        text = path.read_text()
        assert f"flm-convert --checkpoint {repository} --output {args.model}\n" in text
        assert f"examples/recipes/{path.name}\n" in text


@pytest.mark.parametrize("recipe", sorted((EXAMPLES / "study" / "recipes").iterdir()), ids=lambda path: path.stem)
def test_recipes_of_the_study(recipe, monkeypatch):
    seen = []
    monkeypatch.setitem(study.STAGES, "train", lambda data, args: seen.append(args))
    monkeypatch.setattr(study.Data, "load", lambda args: None)
    study.main(["train", str(recipe)])
    assert seen[0].output_dir == f"outputs/study_{recipe.stem}"
    assert seen[0].hidden_size % seen[0].num_attention_heads == 0
    assert f"examples/study/recipes/{recipe.name};" in recipe.read_text()


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_training_recipes_are_arguments_of_their_scripts(path):
    script = train if path.stem.endswith(("flm", "any_order")) else distill
    *_, args = parse(script, path, use_cpu=True)
    recipe = yaml.safe_load(path.read_text())
    assert args.max_steps == recipe["max_steps"] and args.adam_beta2 == recipe["adam_beta2"]
    assert f"examples/recipes/{path.name}\n" in path.read_text()


@pytest.mark.parametrize("data", ["lm1b", "owt"])
def test_single_stage_is_as_the_authors_now_train(data):
    path = RECIPES / f"{data}_single_stage.yaml"
    arguments, _, args = parse(distill, path, use_cpu=True)
    assert (args.max_steps, args.adam_beta1, args.adam_beta2, args.learning_rate) == (1_000_000, 0.9, 0.95, 3e-4)
    assert arguments.student is None and arguments.teacher == f"outputs/{data}_flm"  # starts from the teacher
    preset = FMLMTrainingArguments.from_preset(arguments.preset, output_dir="x", use_cpu=True)
    assert (preset.target, preset.divergence, preset.target_network) == ("semigroup", "cross_entropy", "student")
    assert (preset.diagonal_fraction, preset.boundary_probability) == (0.5, 1 / 32)
    assert (preset.intermediate_time, preset.time_sampling) == ("midpoint", "uniform_difference")
    assert not {"diagonal_fraction", "boundary_probability", "target"} & yaml.safe_load(path.read_text()).keys()
    # The best checkpoint at one step is kept.
    assert args.eval_steps == args.save_steps == args.eval_gen_ppl_steps
    assert args.metric_for_best_model == "eval_gen_ppl_1" and 1 in args.eval_gen_ppl_num_steps
    assert args.load_best_model_at_end and args.greater_is_better is False


def test_two_stages_are_marked_as_those_of_february():
    for path in TRAININGS:
        is_february = path.stem.endswith(("_two_network", "_second_stage"))
        assert path.read_text().startswith("# February's recipe (v1 of the paper)") == is_february, path


def test_the_model_may_come_first():
    arguments = ["me/model", "--output_dir", "out", "--num_steps", "2"]
    (args,) = evaluate.make_parser().parse_args_and_config(arguments)
    assert (args.model, args.num_steps, arguments[0]) == ("me/model", [2], "me/model")


def test_numbers_that_may_be_none(tmp_path):
    for text, expected in (("None", None), ("null", None), ("0.5", 0.5)):
        flags = ["--output_dir", str(tmp_path), "--ema_decay", text, "--use_cpu"]
        assert train.make_parser().parse_args_and_config(flags)[2].ema_decay == expected


def test_flags_that_are_cut_short_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="--learning_rat"):
        run_here("flm-train", "--train_file", "c.txt", "--output_dir", tmp_path, "--learning_rat", "3")
