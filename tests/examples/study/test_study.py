"""The study: its texts, tables and stages, at small scale."""

import json
import math
import random
import re
from pathlib import Path

import grammar
import pytest
import study
import study_data
import study_report
import torch
import wordnet
from example_scripts import run_here
from study_data import LABELS
from study_models import STUDY_MODELS

from modeling_flm import FMLMModel
from modeling_flm.trainers import train_tokenizer


DATA = {
    "noun": [
        "  1 This software and database is being provided to you, the LICENSEE",
        '00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived to have its own existence; "an example"  ',
        "00002137 03 n 02 abstraction 0 abstract_entity 0 001 @ 00001740 n 0000 | a general concept; formed by features  ",
    ],
    "verb": [
        "00001740 29 v 04 breathe 0 take_a_breath 0 respire 0 suspire 3 001 * 00005041 v 0000 01 + 02 00 | draw air  "
    ],
    "adj": [
        '00014358 00 s 01 galore(ip) 0 001 & 00013887 a 0000 | in great numbers; "whiskey galore"; "daffodils galore"  '
    ],
    "adv": [
        '00001740 02 r 01 a_cappella 0 001 ;u 07054433 n 0000 | without musical accompaniment; "they performed a cappella"  '
    ],
}


@pytest.fixture
def folder(tmp_path):
    for part, lines in DATA.items():
        (tmp_path / f"data.{part}").write_text("\n".join(lines) + "\n")
    return tmp_path


class TestWordNet:
    def test_definitions(self, folder):
        assert list(wordnet.definitions(wordnet.find_wordnet(folder))) == [
            "entity: that which is perceived to have its own existence",
            "abstraction: a general concept; formed by features",
            "breathe: draw air",
            "galore: in great numbers",
            "a cappella: without musical accompaniment",
        ]

    def test_headwords(self, folder):
        words = ["entity", "abstraction", "breathe", "respire", "suspire", "galore"]
        assert list(wordnet.headwords(folder)) == words
        run_here("wordnet", folder / "words.txt", "--headwords", "--folder", folder)
        assert (folder / "words.txt").read_text().splitlines() == words

    def test_error_names_the_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"No WordNet in {tmp_path}: install it"):
            wordnet.find_wordnet(tmp_path)


def test_characters():
    assert study_data.to_characters("Élan vital: 2 kinds; see  'A-frame'") == "lan vital kinds see a frame"


def test_texts_end_at_their_first_eos_token():
    tokenizer = train_tokenizer(["red ball", "blue hat"], "word", 20)
    red, blue, end = tokenizer.convert_tokens_to_ids(["red", "blue", tokenizer.eos_token])
    sequences = [[red, end, blue, end], [red, blue, red, blue], [end, red, red, red]]
    assert study_data.decode(sequences, tokenizer) == ["red", "red blue red blue", ""]
    tokenizer.bos_token = tokenizer.eos_token  # then the first token begins a text
    assert study_data.decode(sequences, tokenizer)[2] == "red red red"


def test_long_real_words():
    texts = ["ghe cat that what rou", "of that thot"]
    assert study_report.long_real_words(texts, {"cat", "that", "what"}, is_packed=True) == 1
    assert study_report.long_real_words(texts, {"that"}, is_packed=False) == 2 / 4
    assert study_report.long_real_words(["a be"], {"a"}, is_packed=False) == 0


def test_spread():
    assert study_report.spread([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert study_report.spread([2.0, None], 2) == "2.00"
    assert study_report.spread([None], 2) == "-"


def test_peers_at_the_entropy_of_a_flow_map():
    def texts(model, num_steps, temperature, entropy, perplexity):
        scores = {"gen_ppl": perplexity, "entropy": entropy, "token_counts": [10] * 4}
        scores |= {"perplexities": [perplexity] * 4, "entropies": [entropy] * 4}
        row = {"model": model, "seed": 0, "fraction": 1.0, "num_steps": num_steps, "temperature": temperature}
        return {**row, "scores": scores}

    rows = [texts("fmlm", 1, 1.0, 2.5, 50.0), texts("fmlm", 8, 1.0, 2.5, 40.0)]
    rows += [texts("mdlm", 1, 0.8, 2.0, 10.0), texts("mdlm", 1, 1.0, 3.0, 1000.0), texts("mdlm", 2, 1.0, 2.4, 60.0)]
    args = study_report.StudyArguments("outputs", models=["mdlm", "fmlm"])
    assert study_report.peers_table(rows, args)[2:] == ["| 1 | 0 | 2.500 | 50.0 | MDLM | 100.0 | - |"]


@pytest.mark.parametrize("stage", ["search", "train", "sample", "report"])
def test_stages_need_texts(stage, tmp_path):
    with pytest.raises(SystemExit, match="run the stage `data` first"):
        study.main([stage, "--output_dir", str(tmp_path)])


def test_unknown_models_and_stages(tmp_path):
    with pytest.raises(SystemExit, match="there is no model gpt3; choose from gpt2, mdlm"):
        study.main(["train", "--output_dir", str(tmp_path), "--only", "gpt3"])
    with pytest.raises(SystemExit, match="pass a stage first: data, search"):
        study.main(["--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .*nowhere.txt"):
        study.main(["data", "--output_dir", str(tmp_path), "--train_file", "nowhere.txt"])


def flags(tmp_path: Path, **overrides) -> list[str]:
    """The arguments of a tiny study on stories of the grammar."""
    rng = random.Random(0)
    (tmp_path / "stories.txt").write_text("\n".join(grammar.sample_story(rng)[:20] for _ in range(400)))
    options = {
        "output_dir": tmp_path / "study",
        "train_file": tmp_path / "stories.txt",
        "description": "stories of a grammar",
        "vocab_size": 40,
        "length": 24,
        "num_held_out": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "seeds": 0,
        "batch_size": 8,
        "warmup_steps": 1,
        "search_steps": 1,
        "scorer_hidden_size": 16,
        "scorer_num_hidden_layers": 1,
        "scorer_max_steps": 1,
        "num_samples": 6,
        "num_steps": [1, 2],
        "temperatures": [0.7, 1.0],
        "num_times": 2,
        "num_likelihood_texts": 8,
        **overrides,
    }
    lists = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return [str(part) for name, values in lists.items() for part in (f"--{name}", *values)]


def test_one_step_of_each_stage(tmp_path, capsys):
    """Packed characters; the teacher, its student and a peer."""
    models = ["gpt2", "flm", "fmlm", "fmlm_gamma_0"]
    options = {"tokenizer": "text8", "models": models, "learning_rates": 1e-3, "temperatures": 1.0}
    arguments = flags(tmp_path, **options, max_steps=1, distillation_steps=1)
    study.main(["data", *arguments])
    with pytest.raises(SystemExit, match="gpt2 needs the learning rate of gpt2: run the stage `search` first"):
        study.main(["train", *arguments])
    for stage in ("search", "train", "sample", "report"):
        study.main([stage, *arguments])
    report = (tmp_path / "study" / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert all(f"| {label} | {steps} | " in report for label in ("FLM", "FMLM", "FMLM, gamma 0") for steps in (1, 2))
    assert "| GPT-2 | 24 | " in report
    # One flow map, sampled with new noise and along the flow: one step is the same.
    paths = (tmp_path / "study/models" / f"{name}-0/after-1/samples.jsonl" for name in ("fmlm", "fmlm_gamma_0"))
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    assert rows[0][0]["texts"] == rows[1][0]["texts"] and [row.get("num_steps") for row in rows[1]] == [1, 2]
    likelihoods = re.findall(r"\| (?:≤ )?(\d+\.\d\d) \| [\d.]+ \| (?:≤ )?([\d.]+) \|\n", report)
    assert len(likelihoods) == 3
    for nats, bits in likelihoods:  # blocks of 24 letters
        assert float(bits) == pytest.approx(float(nats) / 24 / math.log(2), abs=1e-3)


@pytest.mark.slow
def test_all_models(tmp_path):
    """Texts of different lengths; snapshots, resuming, and the model to keep."""
    options = {"tokenizer": "char", "learning_rates": [1e-3, 2e-3], "prompt_fraction": 0.5, "save_steps": 2}
    options |= {"max_steps": 8, "distillation_steps": 4, "description": "stories", "keep_dir": tmp_path / "kept"}
    arguments = flags(tmp_path, **options)
    for stage in study.STAGES:
        study.main([stage, *arguments])
    folder = tmp_path / "study"
    report = (folder / "report.md").read_text()
    for name, study_model in STUDY_MODELS.items():
        num_steps = [24] if name == "gpt2" else [1, 2]
        assert all(f"| {LABELS[name]} | {steps} | " in report for steps in num_steps)
        for part in study.FRACTIONS:
            trained = study_model.weights_of or name
            model = study_model.load(folder / "models" / f"{trained}-0" / study.snapshot_name(part))
            assert model.num_parameters() > 0
    assert "| FMLM, passes | seed | entropy | perplexity | at its entropy | 1 | 2 |" in report
    assert (folder / "study.png").stat().st_size > 10_000
    kept, whole = (
        FMLMModel.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "kept", folder / "models" / "fmlm-0" / "after-1")
    )
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], weight, rtol=1 / 128, atol=1e-6)
    record = json.loads((tmp_path / "kept" / "training.json").read_text())
    assert record["data"]["source"] == "stories" and record["arguments"]["prompt_fraction"] == 0.5
    # Running a stage again changes nothing.
    before = {path: path.stat().st_mtime_ns for path in (folder / "models").rglob("*") if path.is_file()}
    for stage in ("data", "search", "train", "sample"):
        study.main([stage, *arguments])
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "models").rglob("*") if path.is_file()}
    rows = json.loads((folder / "report.json").read_text())
    assert {row["num_steps"] for row in rows if row["model"] == "mdlm" and row["fraction"] == 1} == {1, 2}
