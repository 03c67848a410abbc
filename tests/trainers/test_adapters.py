"""Adapters of peft: sampler, noise, loss, average and saved folder all use them."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from places import ROOT
from safetensors.torch import load_file
from small_models import build_flm, build_model, two_time_denoiser, without_zeros
from train_tiny import build, distillation, logged
from transformers import AutoModel

from modeling_flm import FMLMModel, FMLMTwoNetworkModel
from modeling_flm.hub.publish import PublishError, assemble
from modeling_flm.trainers import FLMTrainer, FLMTrainingArguments, FMLMTrainer, train_tokenizer


SIZES = {"token_dim": 32, "num_transformer_submodules": 1, "num_attention_heads": 4, "num_layers": 2}
TARGETS = ["all-linear", "modulation", "lm_head", "embed_tokens", "time_embedding"]


def lora(targets: str | list[str] = "all-linear", **options) -> LoraConfig:
    if targets == "time_embedding":
        targets = r".*time_embedding\.linear_\d"
    elif targets != "all-linear":
        targets = [targets] if isinstance(targets, str) else targets
    return LoraConfig(target_modules=targets, r=3, lora_alpha=6, **options)


def randomize(model):
    """Gives the adapters of a model random weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def adapted(model, targets="all-linear", **options) -> PeftModel:
    return randomize(get_peft_model(copy.deepcopy(model), lora(targets, **options)))


def merged(model: PeftModel):
    return copy.deepcopy(model).merge_and_unload().eval()


def texts(model, **options) -> torch.Tensor:
    options = {"num_samples": 16, "num_steps": 3, **options}
    return model.generate(generator=torch.Generator().manual_seed(0), **options)


def inputs(model, batch) -> dict[str, torch.Tensor]:
    times = {"timesteps": batch["timesteps"]}
    if not type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__ == "FLMModel":
        times["target_timesteps"] = (batch["timesteps"] + 1) / 2
    return times


class TestModel:
    @pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
    @pytest.mark.parametrize("targets", TARGETS)
    def test_generate_equals_the_merged_model(self, kind, targets):
        base = build_model(kind)
        model = adapted(base, targets)
        expected = texts(merged(model))
        assert (texts(model) == expected).float().mean() > 0.99  # products are rounded differently
        assert not torch.equal(expected, texts(base))

    @pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
    @pytest.mark.parametrize("targets", TARGETS)
    def test_forward_equals_the_merged_model(self, kind, targets, batch):
        model = adapted(build_model(kind), targets)
        other = merged(model)
        noise = torch.randn(3, 12, min(53, sum(model.state_sizes)))
        outputs = []
        for each in (model, other):
            state = each.make_state(batch["input_ids"], batch["timesteps"], noise)
            outputs.append(each(inputs_embeds=state, labels=batch["input_ids"], **inputs(each, batch)))
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*map(two_time_denoiser, outputs), rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("kind", ["flm", "fmlm"])
    @pytest.mark.parametrize("targets", TARGETS)
    def test_gradients_equal_the_merged_model(self, kind, targets, batch, path):
        """The gradient of `scale * B @ A`, by the chain rule from the gradient of the merged weight."""
        model = adapted(build_model(kind), targets).double()
        other = merged(model).requires_grad_(True)
        noise = torch.randn(3, 12, 32, dtype=torch.float64)
        times = {name: tau.double() for name, tau in inputs(model, batch).items()}
        for each in (model, other):
            state = each.make_state(batch["input_ids"], times["timesteps"], noise)
            each(inputs_embeds=state, labels=batch["input_ids"], **times).loss.backward()
        gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
        layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
        assert layers
        for name, layer in layers.items():
            of_weight = gradients[f"{name}.weight"]
            if "default" in layer.lora_A:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            else:
                a, b, of_weight = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"], of_weight.T
            torch.testing.assert_close(a.grad, layer.scaling["default"] * b.T @ of_weight, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(b.grad, layer.scaling["default"] * of_weight @ a.T, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("targets", ["lm_head", "embed_tokens"])
    def test_modules_to_save_are_trained_and_sampled(self, targets, batch):
        base = build_flm()
        model = get_peft_model(copy.deepcopy(base), lora("qkv_proj", modules_to_save=[targets])).eval()
        assert torch.equal(texts(model), texts(base))
        layer = model.get_submodule(f"base_model.model.{targets}").modules_to_save["default"]
        with torch.no_grad():
            layer.weight.normal_(std=0.5)
        assert torch.equal(texts(model), texts(merged(model)))
        assert not torch.equal(texts(model), texts(base))
        state = model.make_state(batch["input_ids"], batch["timesteps"], torch.randn(3, 12, 32))
        model(inputs_embeds=state, timesteps=batch["timesteps"], labels=batch["input_ids"]).loss.backward()
        assert layer.weight.grad.any()

    def test_log_likelihood_bound_equals_the_merged_model(self, batch):
        model = adapted(build_flm(), ["embed_tokens", "lm_head", "qkv_proj"])
        values = [
            each.log_likelihood_bound(batch["input_ids"], num_times=8, generator=torch.Generator().manual_seed(0))
            for each in (model, merged(model))
        ]
        torch.testing.assert_close(values[0].log_likelihood, values[1].log_likelihood, rtol=1e-3, atol=1e-3)

    def test_task_type_of_a_causal_model(self):
        model = adapted(build_flm(), "all-linear", task_type="CAUSAL_LM")
        assert torch.equal(texts(model), texts(model.get_base_model()))
        with pytest.raises(NotImplementedError, match="call `generate`"):
            model.prepare_inputs_for_generation(None)

    def test_disable_adapter(self):
        base = build_flm()
        model = adapted(base, ["embed_tokens", "lm_head", "modulation"])
        with model.disable_adapter():
            assert torch.equal(texts(model), texts(base))

    def test_head_with_adapters_under_autocast(self, batch):
        model = adapted(build_flm(), "lm_head")
        state = model.make_state(batch["input_ids"])
        with torch.autocast("cpu", torch.bfloat16):
            output = model(inputs_embeds=state, timesteps=batch["timesteps"], labels=batch["input_ids"])
        assert output.loss.dtype == output.logits.dtype == torch.float32
        expected = F.cross_entropy(output.logits.flatten(0, 1), batch["input_ids"].flatten())
        torch.testing.assert_close(output.loss, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("model_class", [FMLMModel, FMLMTwoNetworkModel])
    def test_from_flm_needs_a_merged_teacher(self, model_class):
        model = adapted(build_flm())
        with pytest.raises(TypeError, match="Merge its adapters first, `teacher.merge_and_unload"):
            model_class.from_flm(model)
        with pytest.raises(ValueError, match="merge its adapters first"):
            model_class.from_flm(model.get_base_model())
        teacher = model.merge_and_unload()
        student = model_class.from_flm(teacher)
        flow = student if model_class is FMLMModel else student.flow
        assert (texts(FMLMModel.from_flm(teacher), gamma=0) == texts(teacher)).float().mean() > 0.99
        assert torch.equal(flow.layers[0].self_attn.qkv_proj.weight, teacher.layers[0].self_attn.qkv_proj.weight)


def with_adapter(model, how: str, targets="all-linear"):
    """Returns the model with an adapter."""
    if how == "add_adapter":
        model.add_adapter(lora(targets))
        return model
    return get_peft_model(model, lora(targets))


def build_adapted(path, how: str, targets="all-linear", distill=False, **options):
    """Returns a trainer as from `train_tiny`, of a model with an adapter, whose base is saved in `base`."""
    plain = distillation(path, **options) if distill else build(path, **options)
    without_zeros(plain.model).save_pretrained(Path(path, "base"))  # a zero head has no gradients
    model = with_adapter(AutoModel.from_pretrained(Path(path, "base")), how, targets)
    settings = {
        "train_dataset": plain.train_dataset,
        "eval_dataset": plain.eval_dataset,
        "processing_class": plain.processing_class,
    }
    if distill:
        return FMLMTrainer(model, plain.args, teacher=plain.teacher, **settings)
    return FLMTrainer(model, plain.args, **settings)


def adapter_weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters() if "lora_" in name}


class TestTraining:
    @pytest.mark.parametrize("how", ["peft", "add_adapter"])
    def test_only_the_adapter_is_trained_averaged_and_saved(self, how, tmp_path):
        trainer = build_adapted(tmp_path, how, targets=["qkv_proj", "lm_head", "embed_tokens", "modulation"])
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, before[name]) != ("lora_" in name), name
        losses = logged(trainer, "eval_loss")
        assert losses[-1] < losses[0]
        # Frozen weights exist once.
        for parameter, average in zip(trainer.model.parameters(), trainer.ema.averaged.parameters(), strict=True):
            assert (parameter is average) != parameter.requires_grad
        trainer.save_model()
        assert not (tmp_path / "model.safetensors").exists()
        loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path)
        averages = adapter_weights(trainer.ema.averaged)
        names = [name.removeprefix("base_model.model.") for name in averages]
        saved = {name.removeprefix("base_model.model."): value for name, value in adapter_weights(loaded).items()}
        assert all(torch.equal(saved[name], value) for name, value in zip(names, averages.values(), strict=True))
        checkpoint = load_file(tmp_path / "checkpoint-20" / "training_weights.safetensors")
        assert checkpoint.keys() == adapter_weights(trainer.model).keys()

    @pytest.mark.parametrize("distill", [False, True])
    @pytest.mark.parametrize("how", ["peft", "add_adapter"])
    def test_resumed_training_is_the_same(self, how, distill, tmp_path):
        options = {"distill": distill, "dropout": 0.1, "max_steps": 4, "save_steps": 2, "eval_strategy": "no"}
        if distill:
            options["target_network"] = "ema"
        straight = build_adapted(tmp_path / "straight", how, **options)
        before = adapter_weights(straight.model)
        straight.train()
        assert not any(torch.equal(value, before[name]) for name, value in adapter_weights(straight.model).items())
        first = build_adapted(tmp_path / "resumed", how, **options)
        first.train()
        resumed = build_adapted(tmp_path / "resumed", how, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
        assert resumed.ema.num_updates == 4
        for one, other in ((straight.model, resumed.model), (straight.ema.averaged, resumed.ema.averaged)):
            others = adapter_weights(other)
            assert all(torch.equal(value, others[name]) for name, value in adapter_weights(one).items())

    @pytest.mark.parametrize("how", ["peft", "add_adapter"])
    def test_best_model(self, how, tmp_path):
        options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
        trainer = build_adapted(tmp_path, how, **options)
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith(
            "checkpoint-10"
        )  # the loss falls, and the best is the largest
        best = load_file(Path(trainer.state.best_model_checkpoint, "adapter_model.safetensors"))
        trainer.save_model(tmp_path / "best")
        saved = load_file(tmp_path / "best" / "adapter_model.safetensors")
        assert all(torch.equal(saved[name], value) for name, value in best.items())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)

    @pytest.mark.parametrize("preset", ["single_stage", "two_network", "self_distillation"])
    def test_distillation_with_adapters(self, preset, tmp_path):
        trainer = build_adapted(
            tmp_path, "peft", ["qkv_proj", "lm_head", "embed_tokens"], True, preset=preset, max_steps=3
        )
        before = adapter_weights(trainer.model)
        trainer.train()
        changed = [
            name for name, value in adapter_weights(trainer.model).items() if not torch.equal(value, before[name])
        ]
        assert {name.split(".lora_")[0].split(".")[-1] for name in changed} == {"qkv_proj", "lm_head", "embed_tokens"}
        assert all("flow." not in name for name in changed)

    def test_teacher_with_adapters(self, tmp_path):
        plain = distillation(tmp_path, eval_strategy="no")
        teacher = adapted(plain.teacher)
        trainer = FMLMTrainer(plain.model, plain.args, teacher=teacher, train_dataset=plain.train_dataset)
        assert trainer.teacher is teacher.get_base_model()
        with pytest.raises(ValueError, match="cannot be `model` itself"):
            student = get_peft_model(plain.model, lora())
            FMLMTrainer(student, plain.args, teacher=student.get_base_model(), train_dataset=plain.train_dataset)

    def test_gradient_checkpointing(self, tmp_path):
        losses = []
        for kept in (False, True):
            options = {"max_steps": 3, "gradient_checkpointing": kept, "eval_strategy": "no", "save_strategy": "no"}
            trainer = build_adapted(tmp_path / str(kept), "peft", "qkv_proj", **options)
            trainer.train()
            losses.append(logged(trainer, "loss"))
        assert losses[0] == pytest.approx(losses[1])

    @pytest.mark.parametrize("distill", [False, True])
    @pytest.mark.parametrize("how", ["peft", "add_adapter"])
    @pytest.mark.parametrize("targets", ["qkv_proj", ["qkv_proj", "o_proj", "lm_head"]])
    def test_reentrant_checkpointing_trains_all_adapters(self, targets, how, distill, tmp_path):
        """Its blocks have a gradient only if their inputs do: `enable_input_require_grads` applies to noised states."""
        gradients = []
        for kept in (False, True):
            options = {"gradient_checkpointing": kept, "eval_strategy": "no", "save_strategy": "no", "max_steps": 2}
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": True} if kept else None
            trainer = build_adapted(tmp_path / str(kept), how, targets, distill, **options)
            trainer.train()
            gradients.append(adapter_weights(trainer.model))
        torch.testing.assert_close(*gradients)
        for name, value in gradients[1].items():
            assert "lora_A" in name or value.any(), name  # B starts at zero

    def test_samples_use_the_averaged_adapter(self, tmp_path):
        options = {"eval_strategy": "no", "learning_rate": 0.02, "ema_decay": 0.5}
        trainer = build_adapted(tmp_path, "peft", **options)
        trainer.train()
        with trainer.ema.applied(trainer.model):
            expected = texts(trainer.model)
        assert not torch.equal(expected, texts(trainer.model))
        trainer.save_model()
        loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path)
        assert torch.equal(texts(loaded), expected)

    def test_errors(self, tmp_path):
        args = FLMTrainingArguments(tmp_path, use_cpu=True, report_to=[])
        frozen = get_peft_model(build_flm(), lora(inference_mode=True))
        with pytest.raises(ValueError, match="no weights to train.*`is_trainable=True`"):
            FLMTrainer(frozen, args)
        virtual = get_peft_model(build_flm(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **SIZES))
        with pytest.raises(ValueError, match="PROMPT_TUNING, which adds virtual tokens: use one that adapts layers"):
            FLMTrainer(virtual, args)
        with pytest.raises(TypeError, match="must be a `FLMModel`.*got `Linear`"):
            FLMTrainer(torch.nn.Linear(2, 2), args)
        with pytest.raises(TypeError, match="is a flow map, `FMLMModel`"):
            FLMTrainer(get_peft_model(build_model("fmlm"), lora()), args)
        with pytest.raises(TypeError, match="must be a flow map, got `FLMModel`"):
            FMLMTrainer(get_peft_model(build_flm(), lora()))


class TestSavedAdapters:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        """A base model, and an adapter trained on it."""
        folder = tmp_path_factory.mktemp("adapter")
        trainer = build_adapted(
            folder, "peft", ["qkv_proj", "embed_tokens", "lm_head"], max_steps=2, learning_rate=0.1
        )
        trainer.train()
        trainer.save_model()
        return folder

    def test_auto_model_loads_adapters(self, folder):
        expected = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "base"), folder)
        assert torch.equal(texts(AutoModel.from_pretrained(folder)), texts(expected))

    def test_publishing_merges_adapters(self, folder, tmp_path):
        assemble(folder, tmp_path / "repository", "me/tiny", num_samples=1)  # loads it without this package and peft
        expected = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "base"), folder).merge_and_unload()
        published = AutoModel.from_pretrained(tmp_path / "repository").state_dict()
        assert published.keys() == AutoModel.from_pretrained(folder / "base").state_dict().keys()
        assert all(torch.equal(value, published[name]) for name, value in expected.state_dict().items())
        card = (tmp_path / "repository" / "README.md").read_text()
        assert "library_name: transformers" in card and "Trained with `FLMTrainer`" in " ".join(card.split())
        assert "The trained part is an adapter (LORA of rank 3), which is merged into" in " ".join(card.split())

    def test_publishing_needs_the_base_model(self, folder, tmp_path):
        copied = tmp_path / "adapter"
        shutil.copytree(folder, copied)
        config = json.loads((copied / "adapter_config.json").read_text())
        (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
        with pytest.raises(PublishError, match="does not name its base model.*merge_and_unload"):
            assemble(copied, tmp_path / "repository", "me/tiny")
        assert not (tmp_path / "repository").exists()


def test_documentation(tmp_path, monkeypatch):
    """The blocks of docs/adapters.md run in order, unchanged but for small models and few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    rows = [" ".join(f"w{n}" for n in torch.randint(40, (10,)).tolist()) + " owl end" for _ in range(16)]
    tokenizer = train_tokenizer(rows, "word", vocab_size=60)
    for kind in ("flm", "fmlm"):
        folder = tmp_path / "outputs" / "quickstart" / kind
        build_model(kind, vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (tmp_path / "stories.txt").write_text("\n".join(rows))
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        exec(block.replace("max_steps=100", "max_steps=2"), names)
    merged_tokens = texts(AutoModel.from_pretrained("owls-merged"))
    assert (texts(AutoModel.from_pretrained("owls")) == merged_tokens).float().mean() > 0.98
    assert not torch.equal(merged_tokens, texts(AutoModel.from_pretrained("outputs/quickstart/flm")))
