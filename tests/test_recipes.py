"""The recipes, from texts to a table, on miniatures of their datasets and tokenizers."""

import json
import random
import sys
from pathlib import Path

import datasets
import oracle
import pytest
import yaml
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModel, AutoTokenizer, BertTokenizer, GPT2Tokenizer


EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = EXAMPLES / "recipes"
sys.path.insert(0, str(EXAMPLES))
import distill_fmlm  # noqa: E402
import evaluate_gen_ppl  # noqa: E402
import grammar  # noqa: E402
import train_flm  # noqa: E402


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
    """Runs a script with a recipe and flags over it, as from the command line."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def run(script, recipe: str, **flags):
        arguments = [str(RECIPES / f"{recipe}.yaml")]
        for name, value in flags.items():
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        script.main()

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
    run(train_flm, "lm1b_flm", **flags)
    prepared = arrow_files(tmp_path / "cache")
    assert prepared
    run(train_flm, "lm1b_flm", **{**flags, "output_dir": "outputs/again"})
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

    run(distill_fmlm, "lm1b_two_network", **QUICK, eval_gen_ppl_steps=0)
    run(distill_fmlm, "lm1b_second_stage", **QUICK, **SCORED)
    assert "eval_gen_ppl_1" in logged("outputs/lm1b_second_stage")
    assert AutoModel.from_pretrained("outputs/lm1b_two_network").config.model_type == "fmlm_two_network"
    run(
        evaluate_gen_ppl,
        "evaluation",
        model="outputs/lm1b_second_stage",
        num_steps=[1, 2],
        num_samples=4,
        scorer=oracle.FIXTURES / "scorer_tiny",
        output_dir="outputs/evaluation",
    )
    table = Path("outputs/evaluation/results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["1", "2"]
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
    run(train_flm, "owt_flm", **flags)
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
        run(distill_fmlm, "owt_single_stage", **QUICK, eval_gen_ppl_steps=0)
        assert {"loss_diagonal", "loss_off_diagonal", "eval_loss"} <= logged("outputs/owt_single_stage").keys()


def test_text8(run, tmp_path):
    text = " ".join("".join(c for c in story if c.isalpha() or c == " ") for story in texts(300))
    for split, part in (("train", text[:30_000]), ("validation", text[30_000:])):
        Dataset.from_dict({"text": [part]}).to_parquet(tmp_path / "text8" / f"{split}.parquet")
    run(train_flm, "text8_flm", dataset_name="text8", config_overrides=TINY, **QUICK)
    model = AutoModel.from_pretrained("outputs/text8_flm")
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (27, 256)
    sample = AutoTokenizer.from_pretrained("outputs/text8_flm").decode(model.generate(num_steps=1)[0])
    assert len(sample) == 256
    run(distill_fmlm, "text8_single_stage", **QUICK)
    assert "eval_loss" in logged("outputs/text8_single_stage")
    assert AutoModel.from_pretrained("outputs/text8_single_stage").config.model_type == "fmlm"


def test_a_recipe_on_own_texts(run, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("\n".join(texts(200)))
    flags = {"train_tokenizer": "word", "train_file": "own.txt", "block_size": 16, "config_overrides": TINY}
    run(train_flm, "text8_flm", **{**flags, **QUICK}, preprocessing="lm1b")
    settings = json.loads(Path("outputs/text8_flm/data_settings.json").read_text())
    assert "dataset_name" not in settings and settings["train_file"] == str(tmp_path / "own.txt")


def test_values_of_a_file_are_checked_as_those_of_flags(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "RECIPES", tmp_path)
    (tmp_path / "bad.yaml").write_text("teacher: x\npreset: two_networks\noutput_dir: y\n")
    with pytest.raises(SystemExit, match="preset must be one of two_network"):
        run(distill_fmlm, "bad")
    (tmp_path / "scalar.yaml").write_text("num_steps: 0\n")  # one number, where several are possible
    with pytest.raises(SystemExit, match="must be at least 1"):
        run(evaluate_gen_ppl, "scalar", model="x", output_dir="y")


def test_global_batches_are_as_published():
    num_processes = yaml.safe_load((RECIPES / "ddp.yaml").read_text())["num_processes"]
    for path in RECIPES.glob("*_*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        batch, accumulation = (
            recipe[f"{name}"] for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        assert num_processes * batch * accumulation == 512, path
        assert f"{num_processes} x {batch} x {accumulation} = 512" in path.read_text()
        assert recipe["output_dir"] == f"outputs/{path.stem}"
        if "teacher" in recipe:
            assert (RECIPES / f"{Path(recipe['teacher']).name}.yaml").is_file()
