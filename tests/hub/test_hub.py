"""Publishing to a Hub, and loading from it, in this process and in others that have nothing of this package."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetInfo
from hub_server import TOKEN, Fault, File, LoopbackHub, Repository, metadata_problems
from huggingface_hub import ModelCard
from places import ROOT
from safetensors.torch import load_file, save_file
from small_models import build_flm
from transformers import AutoModel, BertConfig, BertModel
from transformers.utils import logging

from modeling_flm import FMLMModel, hub
from modeling_flm.hub.card import MARKER
from modeling_flm.hub.publish import PublishError, assemble, publish, publish_space
from modeling_flm.hub.records import to_json
from modeling_flm.trainers import (
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
    load_texts,
    pack_dataset,
    train_tokenizer,
)


def test_to_json_of_numpy():
    value = {
        "a": np.float32("nan"),
        "b": [np.int64(3), np.float64(0.5)],
        "c": np.array([1, 2]),
        "d": (np.bool_(True),),
    }
    assert json.loads(to_json(value)) == {"a": None, "b": [3, 0.5], "c": [1, 2], "d": [True]}


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        [1.5, math.nan],
        {"a": (math.nan, "NaN")},
        {"a": [{"b": math.inf}]},
        1e308,
        None,
        "ü",
    ],
)
def test_to_json_has_no_nan(value):
    text = to_json(value, indent=2)
    expected = json.loads(json.dumps(value), parse_constant=lambda name: None)
    assert json.loads(text, parse_constant=pytest.fail) == expected


REPO_ID = "tester/tiny"
PUBLISHED = {
    *("README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors", "training.json"),
    *("tokenizer.json", "tokenizer_config.json"),
    *(
        "configuration_flm.py",
        "generation_config_flm.py",
        "generation_flm.py",
        "known_tokens_flm.py",
        "likelihood_flm.py",
        "modeling_flm.py",
        "pipeline_flm.py",
        "utils_flm.py",
        "flow.py",
        "losses.py",
    ),
    *(
        "backbone_flm.py",
        "base_flm.py",
        "joint_noise.py",
        "guidance_flm.py",
        "posterior_flm.py",
        "randomness_flm.py",
        "sampling_flm.py",
        "time_reparameterization.py",
    ),
}


def tokenizer_of(vocab_size: int):
    return train_tokenizer([" ".join(f"w{n}" for n in range(vocab_size - 4))], "word", vocab_size=100)


def build_trainer(output_dir: Path, dataset: Dataset | None = None, **options) -> FLMTrainer:
    """A trainer that has made two steps."""
    tokenizer = tokenizer_of(53)
    if dataset is None:
        dataset = Dataset.from_dict({"input_ids": torch.randint(53, (16, 12)).tolist()})
    defaults = {"max_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = FLMTrainingArguments(output_dir, per_device_train_batch_size=4, **{**defaults, **options})
    model = build_flm(attn_logit_softcapping=None)
    trainer = FLMTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained") / "flm"
    build_trainer(folder).save_model()
    return folder


@pytest.fixture(scope="module")
def assembled(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assembled") / "repository"
    assemble(trained, folder, REPO_ID, language="en", datasets=["me/words"], tags="tiny")
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Without the check by another process, which other tests are about."""
    monkeypatch.setattr(hub.publish, "_check", lambda folder, num_samples: ["w1 w2 w3"] * num_samples)
    monkeypatch.setattr(hub.publish.time, "sleep", lambda seconds: None)


def run_elsewhere(script: str, folder: Path, server: LoopbackHub | None = None, **environment) -> str:
    """Runs a script in a process that can import nothing of this package."""
    blocked = "import sys; sys.modules['modeling_flm'] = None\n"
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", **environment}
    if server is not None:
        environment["HF_ENDPOINT"] = server.url
    command = [sys.executable, "-c", blocked + script]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_trainers_import_no_server_and_no_export():
    script = "import sys, modeling_flm.trainers; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = set(process.stdout.split())
    assert "modeling_flm.hub.publish" in imported
    assert not {"http.server", "onnx", "onnxruntime", "gradio", "modeling_flm.hub.export"} & imported


class TestAssemble:
    def test_files(self, assembled, trained):
        assert {path.name for path in assembled.iterdir()} == PUBLISHED
        assert (assembled / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
        expected = AutoModel.from_pretrained(trained).state_dict()
        for name, tensor in AutoModel.from_pretrained(assembled).state_dict().items():
            assert torch.equal(tensor, expected[name])

    def test_card(self, assembled):
        card = ModelCard.load(assembled / "README.md")
        assert metadata_problems(card.content) == []
        assert card.data.library_name == "transformers"
        assert card.data.pipeline_tag == "text-generation"
        assert card.data.license is None
        assert card.data.language == "en"
        assert card.data.datasets == ["me/words"]
        assert {"flm", "tiny", "arxiv:2602.16813"} <= set(card.data.tags)
        assert card.data.base_model is None and card.data.eval_results is None
        assert "| `learning_rate` | 0.0003 |" in card.text and "| `ema_decay` | 0.9999 |" in card.text
        assert "after 2 steps" in card.text and "37,706" not in card.text
        parameters = AutoModel.from_pretrained(assembled).num_parameters()
        assert f"| parameters | {parameters:,} |" in card.text
        assert not re.search(r"\{[{%]|None|Undefined", card.content)

    def test_card_says_what_the_model_was_trained_on(self, tmp_path, quick):
        (tmp_path / "corpus.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n" * 30)
        described = Dataset.from_dict(
            {"input_ids": [[5] * 12] * 1200}, info=DatasetInfo(description="stories of a grammar")
        )
        texts = load_texts(train_file=str(tmp_path / "corpus.txt"), validation_percentage=0)["train"]
        packed = pack_dataset(texts, tokenizer_of(53), block_size=12)
        unknown = Dataset.from_dict({"input_ids": [[5] * 12] * 20})
        for index, (dataset, expected) in enumerate(
            [(described, "on 1,200 texts (stories of a grammar)."), (packed, f"on {len(packed)} texts (corpus.txt)."),
             (unknown, "on 20 texts.")]
        ):  # fmt: skip
            folder = tmp_path / f"flm-{index}"
            build_trainer(folder, dataset).save_model()
            assemble(folder, tmp_path / f"out-{index}", REPO_ID)
            card = ModelCard.load(tmp_path / f"out-{index}" / "README.md")
            assert expected in " ".join(card.text.split()) and card.data.datasets is None
            assert str(tmp_path) not in card.content

    def test_card_of_a_dataset_of_the_hub(self):
        training = {
            "trainer": "FLMTrainer",
            "step": 3,
            "arguments": {},
            "data": {"source": "me/words", "num_examples": 7},
        }
        card = hub.card.build_card({"training.json": training}, "me/model", build_flm(), [])
        assert card.data.datasets == ["me/words"] and "on 7 texts of me/words." in card.text
        card = hub.card.build_card({"training.json": training}, "me/model", build_flm(), [], datasets="me/others")
        assert card.data.datasets == ["me/others"] and "me/words" not in card.content

    def test_licenses_are_identifiers(self, trained, tmp_path):
        with pytest.raises(PublishError, match="`license` must be a license identifier.*got 'Apache 2.0'"):
            assemble(trained, tmp_path / "out", REPO_ID, license="Apache 2.0")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("license", [None, "mit"])
    def test_card_asks_for_a_license(self, license, trained, tmp_path, quick, caplog):
        logging.get_logger().warning_once.__func__.cache_clear()
        assemble(trained, tmp_path / "out", REPO_ID, license=license, datasets="me/words")
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert metadata_problems(card.content) == [] and card.data.license == license
        assert ("The weights are licensed under mit." in card.text) == (license == "mit")
        assert ("No license is specified for the weights" in card.text) == (license is None)
        assert ("The card of tester/tiny is incomplete. Pass `license`, such as 'mit'" in caplog.text) == (
            license is None
        )

    def test_card_names_its_files_and_what_to_cite(self, assembled):
        text = ModelCard.load(assembled / "README.md").text
        for path in assembled.iterdir():
            named = "*.py" if path.suffix == ".py" else path.name
            assert f"`{named}`" in text or path.name == "README.md", path.name
        assert "`evaluation.json`" not in text  # there is none
        assert "eprint = {2602.16813}" in text and "library `modeling-flm`" in " ".join(text.split())
        assert "unconditionally" not in text
        assert "| `optim` | adamw_torch_fused |" in text and "| `adam_beta2` | 0.999 |" in text
        names = set(re.findall(r"^\| `(\w+)` \| [^|]+ \|$", text.split("## Files")[0], re.MULTILINE))
        known = {definition.name for definition in dataclasses.fields(FLMTrainingArguments)}
        assert {"max_steps", "per_device_train_batch_size", "warmup_steps"} <= names <= known

    @pytest.mark.parametrize("prompt_fraction", [0.0, 0.9, None])
    def test_card_says_whether_prompts_were_trained_for(self, prompt_fraction):
        training = {"trainer": "FLMTrainer", "step": 3, "arguments": {"prompt_fraction": prompt_fraction}}
        records = {} if prompt_fraction is None else {"training.json": training}
        text = hub.card.build_card(records, "me/model", build_flm(), []).text
        assert ("for which the model was trained" in text) == bool(prompt_fraction)

    def test_card_of_a_flow_map_in_any_order(self):
        any_order = {"per_token_timesteps": True, "time_reparameterization": None}
        for told in ({}, any_order):
            text = hub.card.build_card({}, "me/model", FMLMModel.from_flm(build_flm(), **told), []).text
            assert ("`num_rounds=4`" in text) == bool(told)

    def test_samples_of_the_card_are_what_its_seed_gives(self, assembled):
        card = ModelCard.load(assembled / "README.md").text
        samples = re.findall(r"```text\n(.*?)\n```", card, re.DOTALL)
        model = AutoModel.from_pretrained(assembled)
        tokens = model.generate(num_samples=3, generator=torch.Generator().manual_seed(0))
        assert samples == tokenizer_of(53).batch_decode(tokens, skip_special_tokens=True)

    def test_results_of_an_evaluation(self, trained, tmp_path, quick):
        rows = [
            {"num_steps": 1, "gen_ppl": 213.456, "entropy": 4.3},
            {"num_steps": 8, "gen_ppl": 98.7, "entropy": 4.25},
        ]
        evaluation = {"scorer": "gpt2-large", "num_samples": 1024, "results": rows}
        folder = copy(trained, tmp_path / "model")
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        assemble(folder, tmp_path / "out", REPO_ID)
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert metadata_problems(card.content) == []
        values = {(r.metric_type, r.metric_args["num_steps"]): r.metric_value for r in card.data.eval_results}
        assert values[("perplexity", 1)] == 213.456 and values[("entropy", 8)] == 4.25 and len(values) == 4
        assert "| 1 | 213.46 | 4.300 |" in card.text

    def test_paths_of_this_machine_stay_here(self, trained, tmp_path, quick):
        folder = copy(trained, tmp_path / "model")
        settings = {"train_file": "/home/me/x.txt", "dataset_name": "/data/y", "block_size": 12, "note": "/home/me"}
        (folder / "data_settings.json").write_text(
            json.dumps({**settings, "dataset_revision": "refs/convert/parquet"})
        )
        training = {**json.loads((folder / "training.json").read_text()), "teacher": "/home/me/teacher"}
        (folder / "training.json").write_text(json.dumps(training))
        row = {"num_steps": 1, "gen_ppl": 20.0, "entropy": 4.0}
        evaluation = {"scorer": "/home/me/gpt2", "num_samples": 3, "results": [row]}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        assemble(folder, tmp_path / "out", REPO_ID)
        public = {"block_size": 12, "dataset_revision": "refs/convert/parquet"}
        assert json.loads((tmp_path / "out" / "data_settings.json").read_text()) == public
        for path in (tmp_path / "out").iterdir():
            assert b"/home/me" not in path.read_bytes(), path
        assert "`gpt2 (a local model)`" in (tmp_path / "out" / "README.md").read_text()
        (folder / "data_settings.json").write_text(json.dumps({"dataset_name": "me/words"}))
        assemble(folder, tmp_path / "out2", REPO_ID)
        assert ModelCard.load(tmp_path / "out2" / "README.md").data.datasets == ["me/words"]

    def test_own_card_is_kept(self, trained, tmp_path, quick):
        folder = copy(trained, tmp_path / "model")
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
        assemble(folder, tmp_path / "out", REPO_ID)
        assert (tmp_path / "out" / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"
        (folder / "README.md").write_text(f"---\nlicense: mit\n---\n<!-- {MARKER} -->\n")
        assemble(folder, tmp_path / "out2", REPO_ID)
        assert "## Limits" in (tmp_path / "out2" / "README.md").read_text()
        (folder / "README.md").write_text("---\n- license\n- mit\n---\n# Mine\n")
        with pytest.raises(PublishError, match="metadata"):
            assemble(folder, tmp_path / "out3", REPO_ID)

    @pytest.mark.slow
    def test_a_repository_that_does_not_work_by_itself(self, trained, tmp_path, monkeypatch, server):
        from modeling_flm import FLMModel

        save = FLMModel.save_pretrained

        def save_without_the_sampler(self, folder, **kwargs):
            save(self, folder, **kwargs)
            Path(folder, "flow.py").write_text("import modeling_flm.trainers\n")

        monkeypatch.setattr(FLMModel, "save_pretrained", save_without_the_sampler)
        with pytest.raises(
            PublishError, match="does not work without this package(.|\n)*No module named 'modeling_flm.trainers'"
        ):
            publish(trained, REPO_ID, token=TOKEN)
        assert server.repositories == {}

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda folder: (folder / "config.json").unlink(), "not a model folder"),
            (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer"),
            (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
            (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "model.safetensors is truncated"),
            (lambda folder: change_weights(folder, "lm_head.weight", None), "missing keys: lm_head.weight"),
            (lambda folder: change_weights(folder, "extra", torch.zeros(2)), "unexpected keys: extra"),
            (lambda folder: (folder / "README.md").write_bytes(b"\xff\xfe---"), "README.md cannot be read"),
            (lambda folder: (folder / "README.md").write_text("---\nlicense: [\n---\n"), "README.md cannot be read"),
            *(
                (
                    lambda folder, name=name, text=text: (folder / name).write_text(text),
                    f"{name} is not a valid record",
                )
                for name, texts in {
                    "training.json": ["{", "[]", "null", '{"step": 1}'],
                    "data_settings.json": ["{", "[1]"],
                    "evaluation.json": [
                        "[]",
                        '{"scorer": "x"}',
                        '{"scorer": "x", "num_samples": 1, "results": [{"num_steps": 1, "gen_ppl": NaN, "entropy": 1}]}',
                    ],
                }.items()
                for text in texts
            ),
            (lambda folder: tokenizer_of(60).save_pretrained(folder), "60 tokens, but the model has 53"),
            (lambda folder: BertModel(BertConfig(hidden_size=24)).save_pretrained(folder), "`BertModel`"),
        ],
    )
    def test_errors(self, change, message, trained, tmp_path):
        folder = copy(trained, tmp_path / "model")
        change(folder)
        with pytest.raises(PublishError, match=message):
            assemble(folder, tmp_path / "out", REPO_ID)
        assert not (tmp_path / "out").exists()

    def test_output_that_exists(self, trained):
        with pytest.raises(PublishError, match="already exists"):
            assemble(trained, trained, REPO_ID)

    def test_samples_and_arguments_cannot_leave_their_places(self, trained, tmp_path, monkeypatch):
        sample = "a ``` b\n````\n# Heading\n<script>{{ 1 + 1 }}\x1b[2J"
        monkeypatch.setattr(hub.publish, "_check", lambda folder, num_samples: [sample])
        folder = copy(trained, tmp_path / "model")
        training = json.loads((folder / "training.json").read_text())
        training["arguments"]["note"] = "one\ntwo | three"
        (folder / "training.json").write_text(json.dumps(training))
        assemble(folder, tmp_path / "out", REPO_ID)
        card = (tmp_path / "out" / "README.md").read_text()
        shown = sample.replace("\x1b", "")
        assert f"`````text\n{shown}\n`````\n" in card
        assert "| `note` | one two \\| three |" in card

    def test_without_a_check_there_are_no_samples(self, trained, tmp_path):
        assemble(trained, tmp_path / "out", REPO_ID, check=False)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "## Samples" not in card and "\n## Training\n" in card

    def test_command(self, trained, tmp_path, monkeypatch):
        arguments = ["--model", str(trained), "--repo-id", REPO_ID, "--dry-run", str(tmp_path / "out")]
        arguments += ["--num-samples", "1", "--license", "cc-by-4.0"]
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # is not asked
        hub.publish.main(arguments)
        assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "cc-by-4.0"
        with pytest.raises(SystemExit, match="error: .* already exists: name another folder"):
            hub.publish.main(arguments)


def copy(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def change_weights(folder: Path, name: str, tensor: torch.Tensor | None):
    weights = load_file(folder / "model.safetensors")
    weights = {**weights, name: tensor}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class TestPublish:
    def test_publishes_in_one_commit_and_updates_in_place(self, trained, tmp_path, server, quick):
        publish(trained, REPO_ID, token=TOKEN)
        repository = server.repositories[REPO_ID]
        assert repository.messages == ["initial commit", "Publish the model"]
        assert set(server.files(REPO_ID)) == {*PUBLISHED, ".gitattributes"}
        assert not repository.private

        publish(trained, REPO_ID, token=TOKEN)  # nothing has changed
        assert len(repository.messages) == 2

        folder = copy(trained, tmp_path / "model")
        model = AutoModel.from_pretrained(folder)
        torch.nn.init.ones_(model.lm_head.bias)
        model.save_pretrained(folder)
        (folder / "training.json").unlink()
        before = server.files(REPO_ID)
        publish(folder, REPO_ID, token=TOKEN, commit_message="Better")
        after = server.files(REPO_ID)
        assert repository.messages[2:] == ["Better"]
        assert {name for name in after if after[name] != before[name]} == {"model.safetensors", "README.md"}
        assert before.keys() - after.keys() == {"training.json"}

    def test_files_of_others_are_left_alone(self, trained, server, quick):
        publish(trained, REPO_ID, token=TOKEN)
        repository = server.repositories[REPO_ID]
        others = {"plot.png": b"p", "last-checkpoint/model.safetensors": b"c", "handler.py": b"h"}
        others |= {"model-00001-of-00002.safetensors": b"stale", "tokenizer_notes.md": b"n"}
        files = repository.commits[repository.branches["main"]]
        repository.commit("main", {**files, **{n: File(c) for n, c in others.items()}}, "By hand")
        publish(trained, REPO_ID, token=TOKEN)
        left = set(server.files(REPO_ID)) - {*PUBLISHED, ".gitattributes"}
        assert left == {"plot.png", "last-checkpoint/model.safetensors", "handler.py", "tokenizer_notes.md"}

    @pytest.mark.slow
    def test_onnx(self, trained, server, quick):
        publish(trained, REPO_ID, token=TOKEN, onnx=["float32"])
        files = server.files(REPO_ID)
        assert files["onnx/model.onnx"] and "onnx" in ModelCard(files["README.md"].decode()).data.tags
        assert "| `onnx/model.onnx` | one step in ONNX, in float32" in files["README.md"].decode()
        assert set(files) - {".gitattributes"} == {*PUBLISHED, "onnx/model.onnx"}
        repository = server.repositories[REPO_ID]
        files = repository.commits[repository.branches["main"]]
        repository.commit("main", {**files, "onnx/model_q4.onnx": File(b"by hand")}, "By hand")
        publish(trained, REPO_ID, token=TOKEN)  # other weights, perhaps
        assert set(server.files(REPO_ID)) - {".gitattributes"} == {*PUBLISHED, "onnx/model_q4.onnx"}
        with pytest.raises(PublishError, match="`precisions` must be some of float32, float16, int8"):
            publish(trained, REPO_ID, token=TOKEN, onnx=["int4"])

    def test_space(self, server):
        commit = publish_space("tester/tiny", token=TOKEN)
        assert commit.commit_url.endswith(server.repositories["spaces/tester/tiny"].branches["main"])
        files = server.files("spaces/tester/tiny")
        assert set(files) - {".gitattributes"} == {
            "README.md",
            "index.html",
            "app.js",
            "flow.js",
            "tokenizer.js",
            "style.css",
        }
        assert (
            b'content="tester/tiny"' in files["index.html"]
            and ModelCard(files["README.md"].decode()).data.sdk == "static"
        )
        publish_space("tester/other", "tester/tiny", "dev", token=TOKEN)  # in its place
        page = server.files("spaces/tester/tiny")["index.html"]
        assert b'name="model" content="tester/other"' in page and b'name="revision" content="dev"' in page
        with pytest.raises(PublishError, match="The Space tester/tiny could not be published"):
            publish_space("tester/tiny", token="hf_wrong")

    def test_command_with_a_space(self, trained, tmp_path, server, quick, monkeypatch, capsys):
        exported = []
        monkeypatch.setattr(
            "modeling_flm.hub.export.export_onnx", lambda model, output, precisions: exported.append(precisions)
        )
        hub.publish.main([str(trained), "--repo_id", "tiny", "--token", TOKEN, "--space"])
        assert exported == [["float32", "float16", "int8"]]
        first, second = capsys.readouterr().out.split()[-2:]
        assert "tester/tiny/commit/" in first and "spaces/tester/tiny/commit/" in second
        assert b'content="tester/tiny"' in server.files("spaces/tester/tiny")["index.html"]
        output = str(tmp_path / "out")
        hub.publish.main([str(trained), "--repo_id", "me/tiny", "--dry_run", output, "--space", "--onnx", "int8"])
        assert exported[1:] == [["int8"]] and Path(f"{output}-space", "index.html").is_file()
        for arguments, message in (
            (["--dry_run", f"{output}/"], "out-space already exists: name another folder"),
            (["--private"], "cannot show a private model"),
        ):
            with pytest.raises(SystemExit):
                hub.publish.main([str(trained), "--repo_id", "me/tiny", "--space", *arguments])
            assert message in capsys.readouterr().err

    def test_a_card_that_was_changed_on_the_hub_is_left_alone(self, trained, server, quick):
        publish(trained, REPO_ID, token=TOKEN)
        repository = server.repositories[REPO_ID]
        files = repository.commits[repository.branches["main"]]
        for text, is_kept in (("---\nlicense: mit\n---\n# Mine\n", True), ("---\nlicense: mit\n---\n", False)):
            repository.commit("main", {**files, "README.md": File(text.encode())}, "By hand")
            publish(trained, REPO_ID, token=TOKEN)
            assert (server.files(REPO_ID)["README.md"].decode() == text) == is_kept

    def test_private_does_not_go_into_what_is_public(self, trained, server, quick):
        publish(trained, REPO_ID, token=TOKEN)
        with pytest.raises(PublishError, match="exists and is public"):
            publish(trained, REPO_ID, private=True, token=TOKEN)
        assert len(server.repositories[REPO_ID].messages) == 2

    def test_private_and_branch(self, trained, server, quick):
        publish(trained, "tiny", private=True, revision="feature/v2", token=TOKEN)
        repository = server.repositories[REPO_ID]  # the namespace is that of the account
        assert repository.private
        assert set(server.files(REPO_ID)) == {".gitattributes"}
        assert set(server.files(REPO_ID, "feature/v2")) == {*PUBLISHED, ".gitattributes"}

    @pytest.mark.parametrize(
        "pattern",
        ["POST .*/commit/", "PUT /lfs/", "POST .*/preupload/", "POST .*/objects/batch", "POST .*/validate-yaml"],
    )
    @pytest.mark.parametrize("action", ["500", "cut"])
    def test_passing_failures(self, pattern, action, trained, server, quick):
        server.faults.append(Fault(pattern, action))
        publish(trained, REPO_ID, token=TOKEN)
        assert server.faults[0].count == 0
        assert server.repositories[REPO_ID].messages == ["initial commit", "Publish the model"]
        assert set(server.files(REPO_ID)) == {*PUBLISHED, ".gitattributes"}
        weights = server.files(REPO_ID)["model.safetensors"]
        assert weights == (trained / "model.safetensors").read_bytes()

    @pytest.mark.parametrize("action", ["500", "cut"])
    def test_lasting_failure(self, action, trained, server, quick):
        publish(trained, REPO_ID, token=TOKEN)
        before = server.files(REPO_ID)
        server.faults.append(Fault("POST .*/commit/", action, count=100))
        with pytest.raises(
            PublishError, match=f"Nothing was uploaded: the files of {REPO_ID} are unchanged.*\n.*Error"
        ):
            publish(trained, REPO_ID, token=TOKEN, license="mit")
        assert server.files(REPO_ID) == before
        with pytest.raises(PublishError, match="if it is new, it is empty"):
            publish(trained, "tester/other", token=TOKEN)
        assert set(server.files("tester/other")) == {".gitattributes"}

    def test_metadata_that_the_hub_refuses(self, trained, server, quick):
        with pytest.raises(PublishError, match="`license` must be a license identifier"):
            publish(trained, REPO_ID, token=TOKEN, license="Do What You Want")
        assert server.uploads == {}

    @pytest.mark.parametrize("token", ["hf_wrong", None])
    def test_wrong_token(self, token, trained, server, quick, monkeypatch):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
        with pytest.raises(PublishError, match="hf auth login"):
            publish(trained, REPO_ID, token=token)
        assert server.repositories == {}

    def test_no_network(self, trained, monkeypatch, quick):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(PublishError, match="Could not reach the Hub at http://127.0.0.1:9.\nConnectError"):
            publish(trained, REPO_ID, token=TOKEN)

    def test_somebody_elses_namespace(self, trained, server, quick):
        with pytest.raises(PublishError, match="rights to create a model under this namespace"):
            publish(trained, "somebody/tiny", token=TOKEN)

    def test_name_that_is_none(self, trained, server):
        with pytest.raises(PublishError, match="`repo_id`"):
            publish(trained, "a/b/c", token=TOKEN)
        assert server.requests == []

    def test_trainer_gives_the_same(self, trained, tmp_path, server, quick):
        publish(trained, "tester/one", token=TOKEN, language="en")
        trainer = build_trainer(tmp_path / "one", hub_model_id="tester/two", hub_token=TOKEN)
        commit = trainer.push_to_hub(language="en")
        assert commit.oid == server.repositories["tester/two"].branches["main"]
        one, two = server.files("tester/one"), server.files("tester/two")
        assert one.keys() == two.keys() and server.repositories["tester/two"].messages[-1] == "End of training"
        ours = AutoModel.from_pretrained(tmp_path / "one").state_dict()
        assert all(torch.equal(x, ours[name]) for name, x in trainer.ema.averaged.state_dict().items())
        renamed = one["README.md"].replace(b"tester/one", b"tester/two").replace(b"# one", b"# two")
        assert two["README.md"] == renamed.replace(b"model_name: one", b"model_name: two")
        for name in one.keys() - {"model.safetensors", "README.md"}:
            assert two[name] == one[name], name
        assert trainer.push_to_hub(blocking=False).result(60).oid

    def test_trainer_pushes_during_training(self, tmp_path, server, quick):
        options = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": REPO_ID, "save_strategy": "steps"}
        options |= {"hub_strategy": "checkpoint"}
        trainer = build_trainer(tmp_path / "flm", save_steps=1, hub_always_push=True, **options)
        trainer.push_to_hub()
        messages = server.repositories[REPO_ID].messages
        assert {"Training in progress, step 1", "Training in progress, step 2", "End of training"} <= set(messages)
        # At no time is there more than what a repository needs, nor the token.
        for files in list(server.repositories[REPO_ID].commits.values())[1:]:
            assert {name for name in files if "/" not in name} <= {*PUBLISHED, ".gitattributes"}
            assert all(TOKEN.encode() not in file.content for file in files.values())
        assert "last-checkpoint/training_weights.safetensors" in files
        assert TOKEN.encode() not in (tmp_path / "flm" / "training_args.bin").read_bytes()
        files = server.files(REPO_ID)
        assert PUBLISHED < set(files)
        assert files["model.safetensors"] == (tmp_path / "flm" / "model.safetensors").read_bytes()

    def test_training_goes_on_without_the_hub(self, tmp_path, server, quick, caplog):
        server.faults.append(Fault("GET .*/whoami", "500", count=100))
        options = {"push_to_hub": True, "hub_token": TOKEN, "hub_model_id": REPO_ID, "save_strategy": "steps"}
        trainer = build_trainer(tmp_path / "flm", save_steps=1, **options)
        assert trainer.state.global_step == 2 and "The checkpoint of step 2 is not pushed" in caplog.text
        server.faults.clear()
        trainer.push_to_hub()
        assert PUBLISHED < set(server.files(REPO_ID))

    def test_student_names_its_teacher(self, tmp_path, quick, caplog):
        teacher = build_flm()
        tokenizer = tokenizer_of(53)
        for name, expected in (("me/teacher", "me/teacher"), (str(tmp_path), None), ("", None)):
            teacher.name_or_path = name
            args = FMLMTrainingArguments.from_preset(
                "single_stage", output_dir=tmp_path / "s", report_to=[], use_cpu=True
            )
            trainer = FMLMTrainer(FMLMModel.from_flm(teacher), args, teacher=teacher, processing_class=tokenizer)
            trainer.create_model_card()
            card = ModelCard.load(tmp_path / "s" / "README.md")
            assert card.data.base_model == expected
            assert ("Distilled with `FMLMTrainer` from an `FLMModel` (without a name on the Hub)" in card.text) == (
                expected is None
            )
            assert ("`base_model`, the name of the model" in caplog.text) == (expected is None)
            caplog.clear()
            logging.get_logger().warning_once.__func__.cache_clear()
            assert "fmlm" in card.data.tags and "| `target` | semigroup |" in card.text
            assert ("from [`me/teacher`](" in card.text) == (expected is not None)


LOAD = """
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
name, options = "tester/tiny", {"trust_remote_code": True}
generator = lambda: torch.Generator().manual_seed(5)
model = AutoModel.from_pretrained(name, **options)
assert type(model).__module__.startswith("transformers_modules"), type(model)
tokens = model.generate(num_samples=3, num_steps=4, generator=generator())
for auto_class in (AutoModelForCausalLM, AutoModelForMaskedLM):
    other = auto_class.from_pretrained(name, **options)
    assert torch.equal(other.generate(num_samples=3, num_steps=4, generator=generator()), tokens)
pipe = pipeline("text-generation", model=name, **options)
rows = pipe(num_samples=3, num_steps=4, generator=generator())
texts = AutoTokenizer.from_pretrained(name, **options).batch_decode(tokens, skip_special_tokens=True)
assert [row["generated_text"] for row in rows] == texts
torch.save({"tokens": tokens, "texts": texts}, "result.pt")
"""


def expected_result(folder: Path) -> dict:
    model = AutoModel.from_pretrained(folder)
    tokens = model.generate(num_samples=3, num_steps=4, generator=torch.Generator().manual_seed(5))
    return {"tokens": tokens, "texts": tokenizer_of(53).batch_decode(tokens, skip_special_tokens=True)}


class TestLoad:
    @pytest.fixture
    def published(self, assembled, server):
        repository = server.repositories[REPO_ID] = Repository()
        files = {p.name: File(p.read_bytes(), p.suffix == ".safetensors") for p in assembled.iterdir()}
        repository.commit("main", files, "Publish the model")
        return repository

    @pytest.mark.slow
    def test_by_name_and_then_offline(self, published, server, assembled, tmp_path):
        # The download breaks off in the middle, and goes on from there.
        server.faults.append(Fault("GET .*/resolve/.*/model.safetensors", "cut"))
        for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
            num_requests = len(server.requests)
            run_elsewhere(LOAD, tmp_path, server, **environment)
            result, expected = torch.load(tmp_path / "result.pt"), expected_result(assembled)
            assert torch.equal(result["tokens"], expected["tokens"]) and result["texts"] == expected["texts"]
            assert (len(server.requests) == num_requests) == ("HF_HUB_OFFLINE" in environment)
        assert server.faults[0].count == 0
        assert sum("GET" in request and "model.safetensors" in request for request in server.requests) == 2

    @pytest.mark.slow
    def test_loading_options(self, published, server, assembled, tmp_path):
        first = published.branches["main"]
        files = published.commits[first]
        config = files["config.json"].content.replace(
            b'"max_position_embeddings": 12', b'"max_position_embeddings": 9'
        )
        published.commit("main", {**files, "config.json": File(config)}, "Shorter")
        script = f"""
import torch
from transformers import AutoModel
load = lambda **options: AutoModel.from_pretrained("tester/tiny", trust_remote_code=True, **options)
length = lambda model: model.generate(num_steps=1).shape[1]
assert length(load()) == 9
assert length(load(revision="{first}")) == 12
model = load(dtype=torch.bfloat16)
assert model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
assert length(model) == 9
model = load(device_map="auto")
assert length(model) == 9
tokens = {{}}
for name in ("eager", "sdpa"):
    model = load(attn_implementation=name)
    assert model.config._attn_implementation == name
    tokens[name] = model.generate(num_steps=4, generator=torch.Generator().manual_seed(0))
assert torch.equal(tokens["eager"], tokens["sdpa"])
"""
        run_elsewhere(script, tmp_path, server)

    def test_code_of_the_card_runs_as_printed(self, published, server, assembled, tmp_path):
        blocks = re.findall(r"```python\n(.*?)```", (assembled / "README.md").read_text(), re.DOTALL)
        assert len(blocks) == 2
        output = run_elsewhere("print('between')\n".join(blocks), tmp_path, server)
        for texts in output.split("between"):
            assert len(re.findall(r"\bw\d+\b", texts)) > 4

    @pytest.mark.slow
    def test_private_needs_a_token(self, published, server, tmp_path):
        published.private = True
        script = """
from transformers import AutoModel
try:
    AutoModel.from_pretrained("tester/tiny", trust_remote_code=True, token="hf_wrong")
except OSError as error:
    print(error)
"""
        output = run_elsewhere(script + LOAD, tmp_path, server, HF_TOKEN=TOKEN)
        assert re.search("not a valid model identifier|Repository Not Found|Invalid credentials", output)
