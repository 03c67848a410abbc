"""Conventions of transformers and torch: arguments, embeddings, hooks, tracing, exports, threads, pickles."""

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from small_models import build_flm, build_model
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_flm import (
    FLMConfig,
    FLMGenerationConfig,
    FLMModel,
    FMLMConfig,
    FMLMModel,
    FMLMTwoNetworkConfig,
    FMLMTwoNetworkModel,
    time_reparameterization,
    utils_flm,
)


KINDS = ["flm", "fmlm", "two_network"]
CLASSES = {
    "flm": (FLMModel, FLMConfig),
    "fmlm": (FMLMModel, FMLMConfig),
    "two_network": (FMLMTwoNetworkModel, FMLMTwoNetworkConfig),
}


def fresh(kind, **options):
    """A model of the kind, with the weights of its own initialization."""
    model_class, config_class = CLASSES[kind]
    sizes = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return model_class(config_class(**sizes, conditioning_size=16, max_position_embeddings=12, **options))


@pytest.fixture
def inputs(batch):
    return {**batch, "target_timesteps": torch.ones(3)}


@pytest.fixture(params=KINDS)
def model(request):
    return build_model(request.param)


class TestOutputs:
    @pytest.mark.parametrize("with_labels", [False, True])
    def test_output_is_in_the_order_of_its_fields(self, model, with_labels, inputs):
        prediction = "probabilities" if isinstance(model, FMLMTwoNetworkModel) else "logits"
        names = [prediction, "last_hidden_state"]
        if with_labels:
            labels = inputs.pop("input_ids")
            inputs |= {"inputs_embeds": model.make_state(labels), "labels": labels}
            names = ["loss", prediction, "last_hidden_state", "token_losses"]
        output = model(**inputs)
        assert [*output] == names
        assert all(torch.equal(value, output[name]) for name, value in zip(names, model(**inputs, return_dict=False)))
        assert [*pickle.loads(pickle.dumps(output.__class__(**output)))] == names
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert [*output] == [*names, "hidden_states", "attentions"]
        assert [*output] == [field.name for field in dataclasses.fields(output) if field.name in output]

    def test_records_hidden_states_and_attentions(self, model, inputs):
        num_networks = len(model.embeddings)
        for output in (
            model(**inputs, output_hidden_states=True, output_attentions=True),
            type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config).__class__(
                    **{**model.config.to_dict(), "output_hidden_states": True, "output_attentions": True}
                ),
                state_dict=model.state_dict(),
            )(**inputs),
        ):
            assert [each.shape for each in output.hidden_states] == [(3, 12, 32 * num_networks)] * 3
            assert torch.equal(output.hidden_states[0], model.make_state(inputs["input_ids"]))
            assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
            assert [each.shape for each in output.attentions] == [(3, 4 * num_networks, 12, 12)] * 2
            torch.testing.assert_close(output.attentions[1].sum(-1), torch.ones(3, 4 * num_networks, 12))

    def test_cross_entropy_is_that_of_a_distribution(self, inputs):
        model = build_model("two_network")
        torch.nn.init.normal_(model.correction.lm_head.weight, std=10)  # far from the simplex
        labels = inputs.pop("input_ids")
        state = model.make_state(labels).detach().requires_grad_()
        output = model(inputs_embeds=state, labels=labels, **inputs)
        assert output.probabilities.min() < 0 and output.probabilities.max() > 1
        positive = output.probabilities.double().clamp(min=0)
        distribution = positive / positive.sum(-1, keepdim=True)
        chosen = distribution.gather(-1, labels[..., None])[..., 0]
        inside = chosen > 0
        torch.testing.assert_close(output.token_losses[inside].double(), -chosen[inside].log(), rtol=1e-4, atol=1e-5)
        assert (output.token_losses >= 0).all() and output.token_losses[~inside].min() > 80
        # Its gradient, where it has one
        weights = [model.correction.lm_head.bias]
        loss = (-chosen[inside].log()).sum() / labels.numel()
        labels = labels.masked_fill(~inside, -100)
        output = model(inputs_embeds=state, labels=labels, num_items_in_batch=labels.numel(), **inputs)
        expected, gradient = (torch.autograd.grad(value, weights)[0] for value in (loss, output.loss))
        torch.testing.assert_close(gradient, expected.float(), rtol=1e-4, atol=1e-4)


class TestArguments:
    @pytest.mark.parametrize(
        "name, value",
        [
            ("position_ids", torch.arange(12)[None]),
            ("past_key_values", ()),
            ("cu_seq_lens_q", torch.tensor([0, 4, 12])),
            ("seq_idx", torch.zeros(1, 12)),
            ("is_causal", True),
        ],
    )
    def test_arguments_that_would_be_ignored(self, flm, batch, name, value):
        with pytest.raises(ValueError, match=f"`{name}` is not supported: .*Pad sequences"):
            flm(**batch, **{name: value})
        for harmless in ({name: None}, {"use_cache": False, "token_type_ids": torch.zeros(3, 12)}):
            assert torch.equal(flm(**batch, **harmless).logits, flm(**batch).logits)

    def test_states_of_another_width(self, model, inputs):
        del inputs["input_ids"]
        width = sum(model.state_sizes)
        with pytest.raises(
            ValueError, match=rf"`inputs_embeds` must have shape \(batch_size, sequence_length, {width}\)"
        ):
            model(inputs_embeds=torch.randn(3, 12, 16), **inputs)

    @pytest.mark.parametrize(
        "arguments", [{}, {"new_num_tokens": 53}, {"new_num_tokens": 50, "pad_to_multiple_of": 53}]
    )
    def test_resizing_the_vocabulary_to_its_size(self, model, arguments):
        assert model.resize_token_embeddings(**arguments) is model.get_input_embeddings()

    @pytest.mark.parametrize("arguments", [{"new_num_tokens": 60}, {"pad_to_multiple_of": 64}])
    def test_the_vocabulary_cannot_be_resized(self, model, arguments):
        with pytest.raises(NotImplementedError, match="53 tokens and cannot get 6[04]: .*another `vocab_size`"):
            model.resize_token_embeddings(**arguments)

    def test_embeddings_of_the_network_that_is_trained(self):
        model = fresh("two_network")
        assert model.get_input_embeddings() is model.correction.embed_tokens
        assert model.get_output_embeddings() is model.correction.lm_head
        embedding, head = torch.nn.Embedding(53, 32), torch.nn.Linear(32, 53)
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)
        assert model.correction.embed_tokens is embedding and model.correction.lm_head is head

    def test_weights_without_a_folder(self, model, inputs):
        model.generation_config.num_steps = 3
        loaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
        assert loaded.generation_config == type(model)(model.config).generation_config

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0},
        ],
    )
    def test_rotary_parameters_that_would_be_ignored(self, rope):
        for settings in ({"rope_parameters": rope}, {"rope_scaling": rope}):
            with pytest.raises(StrictDataclassError, match="`rope_parameters` has .* only `rope_theta` can be set"):
                FLMConfig(**settings)

    @pytest.mark.parametrize(
        "name, value, hint",
        [
            ("inputs", torch.zeros(1, 3).long(), "pass `input_ids`"),
            ("use_cache", True, "leave it out: .*without a cache"),
            ("cache_implementation", "static", "leave it out: .*without a cache"),
            ("output_scores", True, "pass `output_drafts=True`.*`model.posterior`"),
            ("output_hidden_states", True, r"pass it to `model\(...\)`"),
            ("num_beams", 4, "leave it out: tokens are generated in parallel"),
            ("no_repeat_ngram_size", 2, "pass a `logits_processor`"),
        ],
    )
    def test_hints_for_generation_parameters_of_other_models(self, flm, name, value, hint):
        for call in (flm.generate, FLMGenerationConfig):
            with pytest.raises(ValueError, match=rf"`{name}` \({hint}"):
                call(**{name: value})
        with pytest.raises(AttributeError, match=rf"`{name}` \({hint}"):
            setattr(flm.generation_config, name, value)

    def test_generation_parameters_that_say_what_happens_anyway(self, flm):
        neutral = {"use_cache": False, "num_beams": 1, "output_scores": False, "repetition_penalty": 1.0}
        for name, value in neutral.items():
            setattr(flm.generation_config, name, value)
        assert flm.generation_config == FLMGenerationConfig(**neutral) == FLMGenerationConfig()
        assert flm.generate(num_steps=1, **neutral).shape == (1, 12)

    @pytest.mark.parametrize("learned_loss_weighting", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_names_of_what_stays_in_float32(self, kind, learned_loss_weighting, tmp_path):
        options = {} if kind == "flm" else {"learned_loss_weighting": learned_loss_weighting}
        model = fresh(kind, **options)
        names = {part for name, _ in model.named_parameters() for part in name.split(".")}
        assert model._keep_in_fp32_modules_strict <= names
        assert {name.removeprefix(".*") for name in model._keep_in_fp32_modules} <= names
        model.save_pretrained(tmp_path)
        for name, weight in type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).named_parameters():
            is_kept = not model._keep_in_fp32_modules_strict.isdisjoint(name.split("."))
            assert is_kept == (weight.dtype == torch.float32), name


class TestHooks:
    def test_hooks_see_the_same_outputs_without_gradients(self, model, inputs):
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
        seen = {name: [] for name in layers}
        for name, layer in layers.items():
            layer.register_forward_hook(lambda layer, args, output, name=name: seen[name].append(output))
        model(**inputs)
        with torch.no_grad():
            model(**inputs)
        for name, outputs in seen.items():
            half = len(outputs) // 2
            assert half or "loss_weighting" in name
            assert all(torch.equal(*pair) for pair in zip(outputs[:half], outputs[half:])), name

    def test_global_hooks_see_the_same_outputs_without_gradients(self, flm, batch):
        seen = []
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda layer, args, output: (
                seen.append(output) if layer in (flm.lm_head, flm.layers[1].mlp.up_proj) else None
            )
        )
        with hook:
            flm(**batch)
            with torch.no_grad():
                flm(**batch)
        assert len(seen) == 4 and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])

    def test_activations_are_overwritten_without_hooks(self, flm, batch, monkeypatch):
        calls = []
        monkeypatch.setattr(
            flm.layers[0].mlp.up_proj, "forward", lambda states: calls.append(torch.zeros(3, 12, 128) - 1) or calls[-1]
        )
        with torch.no_grad():
            flm(**batch)
        assert (calls[0] > -1).all()
        flm(**batch)
        assert (calls[1] == -1).all()


class TestTracing:
    """A program traced in a process that has not run the model, with and without gradients, for other sizes."""

    other = {
        "input_ids": torch.arange(45).view(5, 9),
        "timesteps": torch.linspace(0, 0.9, 5),
        "target_timesteps": torch.ones(5),
    }

    @pytest.fixture(autouse=True)
    def no_table_of_times(self, monkeypatch):
        monkeypatch.setattr(time_reparameterization, "_TABLES", {})

    @pytest.mark.parametrize(
        "kind, strict",
        [
            pytest.param(kind, strict, marks=[] if (kind, strict) == ("two_network", False) else pytest.mark.slow)
            for kind in KINDS
            for strict in (False, True)
        ],
    )
    def test_exports_any_batch_and_length(self, kind, strict, inputs):
        model = build_model(kind, num_hidden_layers=1)
        assert model.config._attn_implementation == "eager"
        sizes = [torch.export.Dim(name, min=1, max=2**16) for name in ("batch_size", "sequence_length")]
        shapes = {name: dict(enumerate(sizes[: value.dim()])) for name, value in inputs.items()}
        with torch.no_grad():
            program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict).module()
        for batch in (inputs, self.other):
            for name, value in program(**batch).items():
                torch.testing.assert_close(value, model(**batch)[name], rtol=1e-4, atol=1e-5)

    def test_strictly_exported_output_has_the_names_of_its_tensors(self, batch):
        flm = build_flm(num_hidden_layers=1)
        with torch.no_grad():
            program = torch.export.export(flm, (), batch, strict=True)
        torch.testing.assert_close(program.module()(**batch)["logits"], flm(**batch).logits)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("kind", KINDS)
    def test_torch_jit(self, kind, inputs):
        model = build_model(kind, num_hidden_layers=1)
        program = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
        for name, value in program(**self.other).items():
            torch.testing.assert_close(value, model(**self.other)[name], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_shapes_without_values(self, kind, inputs):
        expected = {name: value.shape for name, value in fresh(kind)(**inputs).items()}
        shapes = {name: (value.shape, value.dtype) for name, value in inputs.items()}
        on_meta = fresh(kind).to("meta")(**{name: value.to("meta") for name, value in inputs.items()})
        with FakeTensorMode():
            model = fresh(kind)
            fake = model(**{name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()})
            labels = torch.ones(3, 12, dtype=torch.long)
            state = model.make_state(labels, torch.rand(3), torch.randn(3, 12, 53 if kind == "two_network" else 32))
            output = model.train()(
                inputs_embeds=state, timesteps=torch.rand(3), target_timesteps=torch.ones(3), labels=labels
            )
            output.loss.backward()
        for output in (on_meta, fake):
            assert {name: value.shape for name, value in output.items()} == expected
        time = time_reparameterization.ReparameterizedTime(53).tau_to_t(torch.tensor(1.0))
        assert time.item() == 1, "a table without values was kept"


def test_generate_in_threads_restores_the_mode(flm):
    def generate(seed):
        return model.generate(num_samples=2, num_steps=6, generator=torch.Generator().manual_seed(seed))

    model = build_flm(dropout=0.5).train()
    model.norm.eval()
    expected, got = [generate(seed) for seed in range(4)], {}
    for _ in range(5):
        threads = [threading.Thread(target=lambda seed=seed: got.update({seed: generate(seed)})) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(got[seed], expected[seed]) for seed in range(4))
        assert {name for name, module in model.named_modules() if not module.training} == {"norm"}
    assert not utils_flm._MODES and not utils_flm._EVALUATING


def test_overlapping_evaluation_restores_the_mode(flm):
    model = fresh("two_network").train()
    first, second = utils_flm.evaluating(model, model.correction), utils_flm.evaluating(model.correction)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.training and not any(module.training for module in model.correction.modules())
    second.__exit__(None, None, None)
    assert all(module.training for module in model.correction.modules())
    assert not any(module.training for module in model.flow.modules())


def test_pickles_with_compiled_regions(model, inputs):
    model.compile_regions(backend="eager")
    with torch.no_grad():
        expected = model(**inputs)[0]
        for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            layers = [layer for layer in copied.modules() if hasattr(layer, "compiled")]
            assert layers and all(layer.compiled is not None for layer in layers)
            assert torch.equal(copied(**inputs)[0], expected)
