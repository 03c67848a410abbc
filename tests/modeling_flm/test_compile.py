"""Compiled training and sampling: equal values, no graph breaks, no recompilation after the first steps."""

import os

import pytest
import torch
from small_models import build_flm
from torch._dynamo.utils import counters
from train_tiny import build, build_packed, distillation, launch, logged
from transformers import CompileConfig

from modeling_flm import FMLMModel, FMLMTwoNetworkModel, utils_flm


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    # What `TrainingArguments` leaves behind in the process would compile the trainings of other tests.
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "preset, backend",
    [
        (None, "aot_eager"),
        ("single_stage", "aot_eager"),
        pytest.param("two_network", "aot_eager", marks=pytest.mark.slow),
        pytest.param("single_stage", "inductor", marks=pytest.mark.slow),
    ],
)
def test_training(preset, backend, tmp_path):
    options = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no"}
    trainers = []
    for compiling in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        torch.manual_seed(0)
        trainers.append(build_packed(tmp_path, preset, **options, **compiling))
        trainers[-1].train()
    eager, trainer = trainers
    assert logged(trainer, "loss") == pytest.approx(logged(eager, "loss"), rel=1e-4)
    trainer.evaluate(trainer.train_dataset)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled >= 2, "neither blocks nor losses were compiled"
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    assert counters["stats"]["unique_graphs"] == compiled
    assert not counters["graph_break"]
    # The weights have the names that they have without compiling.
    assert trainer.model.state_dict().keys() == eager.model.state_dict().keys()


@pytest.mark.parametrize(
    "options",
    [
        {"target": "lagrangian", "target_network": "ema"},
        pytest.param({"preset": "single_stage", "target_network": "ema"}, marks=pytest.mark.slow),
        pytest.param({"preset": "any_order"}, marks=pytest.mark.slow),
        pytest.param({"preset": "second_stage"}, marks=pytest.mark.slow),
        pytest.param(
            {"target": "eulerian", "divergence": "squared_error", "boundary_probability": 0.0}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_same_losses_with_padding_and_derivatives(options, tmp_path, monkeypatch):
    own = {"max_steps": 4, "save_strategy": "no", "eval_steps": 2, **options}
    eager = distillation(tmp_path, **own)
    eager.train()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")  # as `accelerate launch --dynamo_backend` does
    compiled = distillation(tmp_path, **own)
    compiled.train()
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    for name in ("loss", "loss_diagonal", "eval_loss"):
        assert logged(compiled, name) == pytest.approx(logged(eager, name), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_several_processes(fsdp, tmp_path):
    options = {"max_steps": 4, "eval_steps": 2, "save_strategy": "no", "ema_decay": 0.9}
    eager = build(tmp_path, per_device_train_batch_size=16, **options)
    eager.train()
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    log = launch(tmp_path, 2, fsdp=fsdp, **options, **compiled)[0]["log"]
    for name in ("loss", "grad_norm", "eval_loss"):
        assert logged(log, name) == pytest.approx(logged(eager, name), rel=1e-3)


@pytest.mark.parametrize(
    "model_class, backend",
    [
        (FMLMModel, "aot_eager"),
        pytest.param(None, "inductor", marks=pytest.mark.slow),
        pytest.param(FMLMTwoNetworkModel, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_generation(model_class, backend, monkeypatch):
    monkeypatch.setitem(utils_flm.CHUNK_ELEMENTS, "cpu", 4 * 5 * 53)  # three chunks
    model = build_flm()
    if model_class is not None:
        model = model_class.from_flm(model).eval()
    compile_config = CompileConfig(backend=backend, fullgraph=True, mode=None)

    def generate(num_steps, **options):
        generator = torch.Generator().manual_seed(0)
        return model.generate(num_samples=4, num_steps=num_steps, generator=generator, **options)

    expected = {num_steps: generate(num_steps) for num_steps in (1, 3)}
    assert torch.equal(generate(1, compile_config=compile_config), expected[1])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert torch.equal(generate(3, compile_config=compile_config), expected[3])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2  # a step to another state, and the last one, to a text
    for num_steps in (1, 3, 5):
        tokens = generate(num_steps, compile_config=compile_config)
        assert num_steps == 5 or torch.equal(tokens, expected[num_steps])
    assert counters["stats"]["unique_graphs"] == graphs
    with pytest.raises(ValueError, match="`compile_config` must be a `CompileConfig`, got `dict`"):
        model.generate(compile_config={"backend": backend})


def test_each_trainer_compiles_its_model(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainers = [build_packed(tmp_path, None, **compiled) for _ in range(2)]
    assert all(trainer.model.layers[0].compiled is not None for trainer in trainers)


def test_regions_after_outputs_were_recorded(flm):
    batch = (torch.randint(53, (3, 12)), torch.tensor([0.1, 0.5, 0.7]))
    expected = flm(*batch, output_hidden_states=True, output_attentions=True).logits
    flm.compile_regions(backend="eager")
    torch.testing.assert_close(flm(*batch).logits, expected)


def test_regions_and_copies(tmp_path):
    """A copy of a compiled model uses its own weights, and compilation leaves no trace in a saved model."""
    import copy

    model = build_flm()
    batch = (torch.randint(53, (3, 12)), torch.tensor([0.1, 0.5, 0.7]))
    expected = model(*batch).logits
    model.compile_regions(backend="aot_eager")
    torch.testing.assert_close(model(*batch).logits, expected)
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(model.layers[0].mlp.down_proj.weight)
    torch.testing.assert_close(copied(*batch).logits, expected)
    assert (model(*batch).logits - expected).abs().max() > 1e-3
    copied.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(*batch).logits, expected)
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ
