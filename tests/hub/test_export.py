"""Export to ONNX: the tokens of every kind of model, known tokens, other sizes, precisions, and what is refused."""

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from places import KEPT_MODEL
from small_models import build_model
from transformers import GPT2Config, GPT2Model

from modeling_flm import FMLMModel
from modeling_flm.hub.export import ExportError, FlowStep, compare, export_onnx, main, write_tokens
from modeling_flm.joint_noise import JointNoise


def open_session(folder: Path, name: str = "model.onnx") -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "onnx" / name, providers=["CPUExecutionProvider"])


def draw_noise(step: FlowStep, num_samples: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_samples, length, step.noise_size, generator=torch.Generator().manual_seed(seed))


# A vocabulary larger than the embedding, and a smaller one; caps; flow maps; two networks; a time for each token
MODELS = {
    "flm": ("flm", {}),
    "fmlm": ("fmlm", {"final_logit_softcapping": None}),
    "few tokens": ("fmlm", {"vocab_size": 20, "attn_logit_softcapping": None}),
    "two networks": ("two_network", {}),
    "two networks, few tokens": ("two_network", {"vocab_size": 50}),
    "per token": ("fmlm", {"per_token_timesteps": True}),
    "no reparameterization": ("flm", {"time_reparameterization": None}),
}


@pytest.fixture(
    scope="module",
    params=[name if name == "few tokens" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def exported(request, tmp_path_factory):
    kind, options = MODELS[request.param]
    torch.manual_seed(0)
    model = build_model(kind, **{"attn_logit_softcapping": 50.0, **options})
    folder = tmp_path_factory.mktemp("exported")
    export_onnx(model, folder, check=False)
    return model, FlowStep(model), open_session(folder)


class TestTokens:
    @pytest.mark.parametrize("num_steps", [1, 3])
    @pytest.mark.parametrize("shape", [(1, 12), (5, 7)], ids=str)
    def test_are_those_of_generate(self, exported, num_steps, shape):
        model, step, session = exported
        noise = draw_noise(step, *shape)
        drafts = write_tokens(session, noise.numpy(), num_steps)
        expected = model.generate(
            num_samples=shape[0],
            length=shape[1],
            num_steps=num_steps,
            prior_state=noise @ step.factor,
            output_drafts=True,
            return_dict_in_generate=True,
        )
        assert np.array_equal(drafts[-1], expected.sequences.numpy())
        assert np.array_equal(drafts.swapaxes(0, 1), expected.drafts.numpy())

    @pytest.mark.parametrize("num_steps", [1, 3])
    def test_with_known_ones(self, exported, num_steps):
        model, step, session = exported
        noise = draw_noise(step, 4, 12)
        generator = torch.Generator().manual_seed(2)
        input_ids = torch.randint(model.config.vocab_size, (4, 12), generator=generator)
        mask = torch.rand(4, 12, generator=generator) < torch.tensor([0.0, 0.3, 0.8, 1.0])[:, None]
        tokens = write_tokens(session, noise.numpy(), num_steps, input_ids.numpy(), mask.numpy())[-1]
        expected = model.generate(
            input_ids, prompt_mask=mask, num_steps=num_steps, prior_state=noise @ step.factor, length=12
        )
        assert np.array_equal(tokens, expected.numpy())
        # What the state is there does not matter
        noise[mask] = 7.0
        assert np.array_equal(
            tokens, write_tokens(session, noise.numpy(), num_steps, input_ids.numpy(), mask.numpy())[-1]
        )

    @pytest.mark.parametrize("gamma", [0.5, 1.0])
    @pytest.mark.parametrize("num_steps", [1, 4])
    def test_with_new_noise_at_every_step(self, exported, num_steps, gamma):
        model, step, session = exported
        noise = draw_noise(step, 5, 12)
        step_noise = torch.randn(num_steps - 1, *noise.shape, generator=torch.Generator().manual_seed(2))
        tokens = write_tokens(session, noise.numpy(), num_steps, gamma=gamma, step_noise=step_noise.numpy())[-1]
        new = iter(step_noise @ step.factor)
        options = {"prior_state": noise @ step.factor, "noise_source": lambda samples: next(new)[samples]}
        expected = model.generate(num_samples=5, num_steps=num_steps, gamma=gamma, **options)
        assert np.array_equal(tokens, expected.numpy())

    def test_draws_new_noise_itself(self, exported):
        _, step, session = exported
        noise = draw_noise(step, 5, 12).numpy()
        first, second = (write_tokens(session, noise, 3, gamma=1.0) for _ in range(2))
        assert np.array_equal(first[0], second[0]) and not np.array_equal(first[1:], second[1:])

    @pytest.mark.parametrize(
        "options, message",
        [
            *(({"gamma": gamma}, "`gamma` must be a number in") for gamma in (-0.1, 1.5, math.nan, "1")),
            ({"num_steps": 0}, "`num_steps` must be an integer of at least 1"),
            (
                {"num_steps": 3, "gamma": 0.5, "step_noise": np.zeros((1, 2, 3, 4))},
                "`step_noise` must have the shape .2, 2, 3, 4.",
            ),
        ],
    )
    def test_arguments_that_cannot_be_used(self, options, message):
        with pytest.raises(ValueError, match=message):
            write_tokens(None, np.zeros((2, 3, 4), np.float32), **options)

    def test_has_named_axes(self, exported):
        _, step, session = exported
        inputs = {each.name: each.shape for each in session.get_inputs()}
        assert inputs == {
            "state": ["batch_size", "sequence_length", step.noise_size],
            "timesteps": ["batch_size"],
            "target_timesteps": ["batch_size"],
            "input_ids": ["batch_size", "sequence_length"],
            "prompt_mask": ["batch_size", "sequence_length"],
            "gamma": ["batch_size"],
            "noise": ["batch_size", "sequence_length", step.noise_size],
        }
        outputs = {each.name: each.shape for each in session.get_outputs()}
        assert outputs == {"next_state": inputs["state"], "tokens": inputs["input_ids"]}


@pytest.mark.parametrize("sizes", [[(50, 8)], [(50, 8), (50, 8)], [(10, 16)]], ids=str)
def test_coordinates_of_tokens_are_their_embeddings(sizes):
    embeddings = [
        torch.randn(size, generator=torch.Generator().manual_seed(index)) for index, size in enumerate(sizes)
    ]
    noise = JointNoise(*embeddings)
    coordinates = noise.coordinates()
    if sizes[0][0] <= sum(width for _, width in sizes):
        assert coordinates is None
        return
    assert coordinates.shape == (sizes[0][0], noise.size)
    torch.testing.assert_close(coordinates.mT @ coordinates, torch.eye(noise.size), atol=1e-5, rtol=0)
    for index, embedding in enumerate(embeddings):
        torch.testing.assert_close(coordinates @ noise.factor(index), embedding, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
class TestPrecisions:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("kept")
        lines = []
        main([str(KEPT_MODEL), "--output", str(folder)], report=lines.append)
        assert [line.split(":")[0].split("/")[-1] for line in lines] == [
            "model.onnx",
            "model_fp16.onnx",
            "model_int8.onnx",
        ]
        assert lines[0].endswith("100.00% of its tokens are equal to PyTorch's")
        return folder

    @pytest.mark.parametrize(
        ("name", "least", "most_bytes"),
        [("model.onnx", 1.0, 4.5), ("model_fp16.onnx", 0.995, 2.8), ("model_int8.onnx", 0.98, 1.5)],
    )
    def test_tokens_of_a_trained_model(self, folder, name, least, most_bytes):
        model = FMLMModel.from_pretrained(KEPT_MODEL, dtype=torch.float32)
        step = FlowStep(model)
        session = open_session(folder, name)
        noise = draw_noise(step, 200, 16, seed=5)
        for num_steps in (1, 4):
            tokens = write_tokens(session, noise.numpy(), num_steps)[-1]
            expected = model.generate(num_samples=200, num_steps=num_steps, prior_state=noise @ step.factor, gamma=0)
            assert (tokens == expected.numpy()).mean() >= least
        content = (folder / "onnx" / name).read_bytes()
        assert len(content) < most_bytes * model.num_parameters()
        assert str(KEPT_MODEL.parents[2]).encode() not in content and b"site-packages" not in content

    def test_what_has_8_bits(self, tmp_path):
        model = build_model("fmlm", attn_logit_softcapping=None)
        export_onnx(model, tmp_path, ["int8"], check=False)
        assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model_int8.onnx"]
        weights = onnx.load(tmp_path / "onnx" / "model_int8.onnx").graph.initializer
        names = {each.name for each in weights if each.data_type == onnx.TensorProto.FLOAT and len(each.dims) == 2}
        scales = {name for name in names if name.endswith("_scales")}
        times = {f"model.{kind}time_embedding.linear_{index}.weight" for kind in ("", "target_") for index in (1, 2)}
        assert names - scales == {"factor", "coordinates", *times}
        assert len(scales) == 5 * model.config.num_hidden_layers + 2  # a modulation and the head come after the blocks

    def test_is_compared_without_what_only_generate_has(self, tmp_path):
        model = build_model("fmlm", attn_logit_softcapping=None)
        model.generation_config.gamma = 0.5
        model.generation_config.return_dict_in_generate = True
        assert export_onnx(model, tmp_path) == {"float32": 1.0}
        assert model.generation_config.gamma == 0.5

    def test_large_weights_in_files_of_their_own(self, tmp_path, monkeypatch):
        monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
        model = build_model("fmlm", attn_logit_softcapping=None)
        export_onnx(model, tmp_path, ["float32", "int8"], check=False)
        names = ["model.onnx", "model_int8.onnx"]
        assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == sorted(
            [*names, *(f"{name}.data" for name in names)]
        )
        step = FlowStep(model)
        assert compare(open_session(tmp_path), step) == 1
        assert open_session(tmp_path, "model_int8.onnx").get_inputs()[0].shape[2] == step.noise_size


class TestErrors:
    def test_unknown_precision(self, tmp_path):
        with pytest.raises(ExportError, match="`precisions` must be some of float32, float16, int8"):
            export_onnx(build_model("flm"), tmp_path, ["int4"])
        with pytest.raises(ExportError, match=r"`precisions` must be some of float32, float16, int8, got \[\]"):
            export_onnx(build_model("flm"), tmp_path, [])
        assert not (tmp_path / "onnx").exists()

    def test_another_model(self, tmp_path):
        with pytest.raises(ExportError, match="`model` is a `GPT2Model`, not a flow-based language model"):
            export_onnx(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)), tmp_path)

    def test_too_little_agreement_leaves_what_was_there(self, tmp_path, monkeypatch):
        monkeypatch.setattr("modeling_flm.hub.export.compare", lambda *args: 0.5)
        (tmp_path / "onnx").mkdir()
        (tmp_path / "onnx" / "model.onnx").write_bytes(b"before")
        with pytest.raises(ExportError, match="float32 reproduces only 50.0% of PyTorch's tokens.*`precisions`"):
            export_onnx(build_model("flm"), tmp_path)
        assert (tmp_path / "onnx" / "model.onnx").read_bytes() == b"before"
        assert [path.name for path in tmp_path.iterdir()] == ["onnx"]

    def test_command(self, tmp_path):
        with pytest.raises(SystemExit, match="error: .*nothing-here"):
            main(["--model", str(tmp_path / "nothing-here"), "--output", str(tmp_path)])
