"""The benchmarks: the dense formulation computes what the library does, measurements measure, and every script runs."""

import json
import os
import re
import shutil
import subprocess
import sys

import dense
import distillation_presets
import measure
import memory_plan
import pytest
import quickstart
import samplers
import torch
from distilling import build_batch, compute_loss, joint_noise
from example_scripts import run_here
from markdown_pages import check_command
from places import BENCHMARKS, KEPT_MODEL, ROOT
from train_tiny import build_packed
from transformers import AutoModel, AutoTokenizer

from modeling_flm import FMLMModel, FMLMTwoNetworkModel
from modeling_flm.trainers.evaluation import generate_samples


CPU = torch.device("cpu")


class TestDense:
    input_ids = torch.arange(72).view(6, 12) % 53
    tau_s, tau_t = torch.linspace(0.0, 0.7, 6), torch.linspace(0.3, 1.0, 6)

    @pytest.fixture
    def noise(self, monkeypatch) -> torch.Tensor:
        noise = torch.randn(6, 12, 53)
        monkeypatch.setattr(torch, "randn_like", lambda *args: noise.clone())
        return noise

    def test_flm(self, flm, noise):
        t = flm.time_map.tau_to_t(self.tau_s)[:, None, None]
        state = ((1 - t) * noise) @ flm.state_embedding + t * flm.embed_tokens(self.input_ids)
        expected = flm(inputs_embeds=state, timesteps=self.tau_s, labels=self.input_ids).loss
        torch.testing.assert_close(dense.flm_loss(flm, self.input_ids, self.tau_s), expected)

    @pytest.mark.parametrize("preset", ["single_stage", "self_distillation", "two_network", "second_stage"])
    def test_distillation(self, preset, noise, tmp_path):
        # V is below the joint width of all networks: projected noise is one-hot noise.
        trainer = build_packed(tmp_path, preset, vocab_size=53)
        model, teacher = trainer.model.eval(), trainer.teacher
        has_diagonal = preset in ("single_stage", "self_distillation")
        diagonal = [0, 1, 2] if has_diagonal else []
        tau_t = torch.where(torch.arange(6) < len(diagonal), self.tau_s, self.tau_t)
        groups = {"diagonal": diagonal, "off_diagonal": list(range(len(diagonal), 6))}
        batch = build_batch(self.input_ids, noise, self.tau_s, tau_t, **groups)
        if joint_noise(trainer).size != 53:  # then the noise of the library is another: take the dense states
            state = dense.noised(model, self.input_ids, self.tau_s)[1]
            for network in {model, teacher} - {None}:
                network.make_state = lambda *args, network=network: state @ network.state_embedding
        expected, _ = compute_loss(trainer, batch)
        loss = dense.distillation_loss(preset, model, teacher, self.input_ids, self.tau_s, self.tau_t)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("model_class", [None, FMLMModel, FMLMTwoNetworkModel])
    def test_generation(self, model_class, flm, monkeypatch):
        model = flm if model_class is None else model_class.from_flm(flm).eval()
        prior = torch.randn(6, 12, 53)
        monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: prior)
        for num_steps in (1, 3):
            tokens = dense.generate(model, 6, 12, num_steps)
            state = prior @ model.state_embedding
            assert torch.equal(tokens, model.generate(prior_state=state, num_steps=num_steps, gamma=0))


class TestMeasures:
    def test_memory(self):
        size = 64 * 2**20
        peak = measure.peak_memory(lambda: torch.ones(size // 4), CPU)
        assert 0.9 * size < peak < 1.2 * size
        kept = torch.ones(size // 4)
        assert measure.peak_memory(lambda: kept.sum(), CPU) < 0.1 * size

    def test_cost(self):
        ceilings = measure.Ceilings(CPU, repeats=1)
        first, second = torch.randn(30, 40), torch.randn(40, 50)
        with measure.Cost(ceilings) as cost:
            first @ second
        assert cost.flops == {torch.float32: 2 * 30 * 40 * 50}
        assert cost.bytes == 4 * (30 * 40 + 40 * 50 + 30 * 50)
        with measure.Cost(ceilings) as cost:
            assert first[:10].view(400).shape == (400,)  # a view, for free
            assert (first + 1).T.shape == (40, 30)
        assert cost.bytes == 2 * first.nbytes and not cost.flops[torch.float32]
        assert cost.limit == cost.bytes / ceilings.bandwidth
        third = torch.randn(30, 50)
        with measure.Cost(ceilings) as cost:
            third.addmm_(first, second)
        assert cost.flops == {torch.float32: 2 * 30 * 40 * 50}
        assert cost.bytes == 4 * (30 * 40 + 40 * 50 + 2 * 30 * 50)
        with measure.Cost(ceilings) as cost:
            third.copy_(third.clone())
        assert cost.bytes == 4 * third.nbytes
        parameter = torch.nn.Parameter(third)
        parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        optimizer.step()
        with measure.Cost(ceilings) as cost:
            optimizer.step()
        assert 6 * third.nbytes <= cost.bytes < 8 * third.nbytes + 100
        table, rows = torch.randn(1000, 8), torch.arange(3)
        with measure.Cost(ceilings) as cost:
            torch.nn.functional.embedding(rows, table)
        assert cost.bytes == 2 * 3 * 8 * 4

    def test_plan(self, capsys, monkeypatch):
        counts = memory_plan.count("170M", vocab_size=50258)
        assert counts.parameters == pytest.approx(170e6, rel=0.01)
        # Of a block with hidden size d and an MLP four times as wide, for each token: its input (4d bytes), two normalized
        # inputs of products (2d each), query, key, value (6d), attention (2d), MLP before and after GELU (16d), ...
        assert 40 * 768 < counts.saved_per_token < 80 * 768
        monkeypatch.setattr(memory_plan, "SHAPES", {"170M": (768, 12, 12)})
        run_here(memory_plan)
        assert "| 170M | 8 | FSDP2 |" in capsys.readouterr().out


@pytest.mark.slow
def test_performance(tmp_path):
    suites = "train distill generate sample gpt2 head growth noise batch".split()
    sizes = "--vocab_sizes 200 300 --lengths 8 --hidden_sizes 64 --batch_sizes 2 --num_hidden_layers 1".split()
    options = "--num_steps 1 2 --repeats 1 --memory 0.01 --device cpu".split()
    command = [sys.executable, BENCHMARKS / "performance.py", *suites, *sizes, *options]
    command += ["--output", tmp_path / "measured.json"]
    result = subprocess.run(command, check=True, timeout=900, capture_output=True, text=True)
    rows = json.loads((tmp_path / "measured.json").read_text())["records"]
    contenders = {}
    for row in rows:
        contenders.setdefault(row["suite"], set()).add(row["contender"])
        assert row.get("seconds", 1) > 0 and row.get("peak_gib", 0) >= 0
        assert f"| {row['contender']} |" in result.stdout
    assert contenders["train"] == contenders["distill"] == contenders["batch"] == {"library", "dense"}
    assert {"library", "all logits", "its products alone"} <= contenders["head"]
    assert contenders["gpt2: one sample"] == {"one-step flow map", "GPT-2 with KV cache"}
    assert {row["num_steps"] for row in rows if row["suite"] in ("generate", "sample")} == {1, 2}
    assert contenders["sample"] == {"library"}
    assert {"plain product", "one network, made", "student and teacher, backward"} <= contenders["noise"]


@pytest.mark.slow
def test_export(capsys):
    options = "--batch_sizes 1 --repeats 2 --no_compile --precisions float32 --num_steps 1 4".split()
    run_here("export", "--models", KEPT_MODEL, *options)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in row] for row in rows]
    (agreement,) = (row[2:] for row in rows if row[0] == "float32")
    assert agreement == ["100.00%", "100.00%"]
    ratios = {row[1]: float(row[3]) for row in rows if row[0] == "1"}
    assert ratios.keys() == {"PyTorch, eager", "ONNX Runtime, float32"} and ratios["PyTorch, eager"] == 1


def test_distillation_presets(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "NUM_STORIES", 500)
    sizes = "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2".split()
    options = "--max_steps 2 --distillation_steps 2 --num_samples 2 --batch_size 8".split()
    args = quickstart.make_parser().parse_args(sizes)
    tokenizer, _, length = quickstart.load_stories(args.seed)
    flm = quickstart.new_flm(args, tokenizer, length)
    flm.save_pretrained(tmp_path / "flm")
    FMLMModel.from_flm(flm).save_pretrained(tmp_path / "fmlm")
    folders = ["--teacher", tmp_path / "flm", "--student", tmp_path / "fmlm", "--output_dir", tmp_path]
    run_here(distillation_presets, *sizes, *options, "--matching_steps", 2, *folders)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| preset", *(f"| `{preset}`" for preset in distillation_presets.PRESETS)]
    for row in rows[1:]:
        assert len(row) == len(rows[0])
        assert all(0 <= float(cell.strip(" |")) <= 100 for cell in row[1:])


@pytest.mark.browser
def test_page(capsys):
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None or not (ROOT / "tests" / "browser" / "node_modules").is_dir():
        pytest.fail("The page is measured with Chromium and two packages of npm: see `make test-browser`.")
    run_here("page", "--repeats", 1)
    rows = re.findall(r"^\| (.+) \| (\d+) \((\d+) to (\d+)\) \|$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 3
    for _, median, least, most in rows:
        assert 0 < int(median) == int(least) == int(most)


def test_commands_of_the_gpu_script(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^measure \w+ (.+)$", (BENCHMARKS / "gpu.sh").read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        check_command(f"python benchmarks/performance.py {line} --device cuda --dtype bfloat16")


def test_samplers(tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("unable\nable\n")
    check = tmp_path / "checks.py"
    check.write_text("def has_a(text):\n    return 'a' in text\n")
    options = (
        f"--check {check}:has_a --train_file {words} --reference_file {words} --num_steps 1 4 --num_samples 5".split()
    )
    run_here("samplers", "--model", KEPT_MODEL, *options, "--samplers", "gamma=0", "gamma=1", "bridge@0.7")
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    (by_steps, *passed), (headings, *figures) = rows[:4], rows[4:]
    assert by_steps == ["sampler", "1", "4"] and len(figures) == 3 * 2 + 1
    assert headings[2:5] == ["passed, %", "distinct, %", "entropy"]
    assert figures[-1][:4] == ["reference", "", "100.0", "100.0"] and figures[-1][-2] == "100.0"  # training texts
    assert [row[2] for row in figures[:6]] == [cell for row in passed for cell in row[1:]]
    assert figures[0][2:] == figures[2][2:]  # in one step, gamma has no effect
    model, tokenizer = AutoModel.from_pretrained(KEPT_MODEL).eval(), AutoTokenizer.from_pretrained(KEPT_MODEL)
    texts = tokenizer.batch_decode(
        generate_samples(model, range(5), 0, num_steps=4, gamma=1.0), skip_special_tokens=True
    )
    assert float(figures[3][2]) == 20 * sum("a" in text for text in texts)


@pytest.mark.parametrize("sampler", ["gamma", "gamma=x", "euler", "bridge@hot"])
def test_samplers_by_name(sampler):
    with pytest.raises(SystemExit, match="--samplers` must be gamma=G or bridge"):
        samplers.parse_sampler(sampler)
