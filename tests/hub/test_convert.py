"""Conversion of published checkpoints: what comes out, from where, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub.constants
import oracle
import pytest
import torch
from hub_server import TOKEN, Fault, File, Repository
from oracle import FLM, STAGE_1, STAGE_2, published
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from modeling_flm.hub.checkpoints import CheckpointError
from modeling_flm.hub.convert import convert, main
from modeling_flm.trainers import train_tokenizer


RELEASED = oracle.FIXTURES / "released"


class TestPublishedValues:
    @pytest.mark.parametrize(
        "prefix, name, arguments, num_steps",
        [
            ("flm", "FLMModel", ["--checkpoint", FLM], (1, 2, 5)),
            ("stage1", "FMLMTwoNetworkModel", ["--checkpoint", FLM, "--correction", STAGE_1], (1, 2, 4)),
            ("stage2", "FMLMModel", ["--checkpoint", STAGE_2], (1, 2, 4)),
        ],
    )
    def test_tokens_through_the_auto_classes(self, prefix, name, arguments, num_steps, tmp_path):
        values = oracle.values()
        main([*map(str, arguments), "--output", str(tmp_path / "model")])
        model = AutoModel.from_pretrained(tmp_path / "model")
        assert type(model).__name__ == name
        for steps in num_steps:
            tokens = model.generate(prior_state=values["prior_state"] @ model.state_embedding, num_steps=steps)
            assert torch.equal(tokens, values[f"{prefix}.tokens_{steps}"])

    @pytest.mark.slow
    def test_logits_with_remote_code(self, tmp_path):
        values = oracle.values()
        for prefix, checkpoint in (("flm", FLM), ("stage2", STAGE_2)):
            main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / prefix)])
            model = convert(checkpoint)
            if prefix == "flm":
                times = {"timesteps": values["flm.tau"]}
                t = values["flm.t"]
            else:
                times = {"timesteps": values["stage2.tau_s"], "target_timesteps": values["stage2.tau_t"]}
                t = model.time_map.tau_to_t(values["stage2.tau_s"])
            t, one_hot = t[:, None, None], torch.nn.functional.one_hot(values["input_ids"], 67).float()
            batch = {"inputs_embeds": ((1 - t) * values["noise"] + t * one_hot) @ model.state_embedding, **times}
            torch.save({key: value.detach() for key, value in batch.items()}, tmp_path / prefix / "batch.pt")
        script = """
import sys, torch
sys.modules["modeling_flm"] = None
from transformers import AutoModel
for name in ("flm", "stage2"):
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    batch = torch.load(f"{name}/batch.pt")
    torch.save(model(**batch).logits.detach(), f"{name}/logits.pt")
"""
        environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
        for prefix in ("flm", "stage2"):
            logits, expected = torch.load(tmp_path / prefix / "logits.pt"), values[f"{prefix}.logits"]
            assert (logits - expected).abs().max() / expected.abs().max() < 1e-4

    def test_raw_weights(self):
        values = oracle.values()
        for raw, name in ((False, "ema"), (True, "raw")):
            embedding = convert(FLM, raw_weights=raw).embed_tokens.weight[:2]
            assert torch.equal(embedding, values[f"flm.{name}_weight_check"])
        assert not torch.equal(values["flm.ema_weight_check"], values["flm.raw_weight_check"])

    def test_settings(self):
        sizes, config = oracle.read_json("values_tiny.json"), convert(STAGE_2).config
        assert config.num_attention_heads == sizes["num_heads"]
        assert config.max_position_embeddings == sizes["length"]
        assert config.attn_logit_softcapping == sizes["softcap"]
        assert config.learned_loss_weighting and not convert(FLM).training
        for model in (convert(FLM), convert(STAGE_2), convert(FLM, correction=STAGE_1)):
            assert model.config.final_logit_softcapping is None  # of the first published code
            assert model.generation_config.gamma is None

    def test_tokenizer(self, tmp_path):
        train_tokenizer([" ".join(f"w{n}" for n in range(63))], "word", vocab_size=100).save_pretrained(tmp_path / "t")
        arguments = ["--checkpoint", str(FLM), "--tokenizer", str(tmp_path / "t")]
        main([*arguments, "--output", str(tmp_path / "model")])
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        model = AutoModel.from_pretrained(tmp_path / "model")
        assert len(tokenizer) == model.config.vocab_size == 67
        for config in (model.config, model.generation_config):
            assert config.eos_token_id == tokenizer.eos_token_id
            assert config.pad_token_id == tokenizer.pad_token_id


class TestOtherCheckpoints:
    @pytest.mark.parametrize("algorithm", ["fmlm", "dos_denoiser", "something_new"])
    def test_algorithms_of_the_second_version(self, algorithm, tmp_path):
        torch.save(published(algorithm=algorithm), tmp_path / "x.ckpt")
        model = convert(tmp_path / "x.ckpt", raw_weights=True)
        expected = convert(STAGE_2, raw_weights=True).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    def test_compiled_model(self, tmp_path):
        content = published()
        weights = content["state_dict"].items()
        content["state_dict"] = {name.replace("backbone.", "backbone._orig_mod."): tensor for name, tensor in weights}
        torch.save(content, tmp_path / "x.ckpt")
        assert convert(tmp_path / "x.ckpt", raw_weights=True).config.num_hidden_layers == 2

    def test_flags_in_the_place_of_a_configuration(self, tmp_path):
        content = published()
        del content["hyper_parameters"]
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match="num_attention_heads.*--num_heads"):
            convert(tmp_path / "x.ckpt", raw_weights=True)
        with pytest.raises(CheckpointError, match="max_position_embeddings.*--length"):
            convert(tmp_path / "x.ckpt", raw_weights=True, num_heads=3)
        options = {"raw_weights": True, "num_heads": 3, "length": 12}
        with pytest.raises(CheckpointError, match="logits are capped: pass `--final_logit_softcapping 30`"):
            convert(tmp_path / "x.ckpt", **options)
        for softcap in (30.0, None):
            config = convert(tmp_path / "x.ckpt", final_logit_softcapping=softcap, **options).config
            assert config.max_position_embeddings == 12 and config.final_logit_softcapping == softcap

    def test_no_averages(self, tmp_path):
        torch.save(published(), tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match="--raw_weights"):
            convert(tmp_path / "x.ckpt")

    def test_half_precision_becomes_single(self, tmp_path):
        content = published()
        content["state_dict"] = {name: tensor.bfloat16() for name, tensor in content["state_dict"].items()}
        torch.save(content, tmp_path / "x.ckpt")
        assert convert(tmp_path / "x.ckpt", raw_weights=True).dtype == torch.float32

    @pytest.mark.parametrize(
        "name, value, message",
        [
            ("backbone.blocks.1.attn_out.weight", None, r"missing: layers.1.self_attn.o_proj.weight \(48, 48\)"),
            ("backbone.surprise", torch.zeros(3), r"unknown: 'surprise' \(3,\)"),
            (
                "backbone.output_layer.linear.bias",
                torch.zeros(5),
                r"wrong shape: lm_head.bias \(5,\), expected \(67,\)",
            ),
            ("backbone.blocks.7.norm1.weight", torch.zeros(48), r"missing: layers.2.mlp.down_proj.bias"),
            ("backbone.vocab_embed.embedding", None, "no embed_tokens.weight"),
        ],
    )
    def test_tensors_that_do_not_fit(self, name, value, message, tmp_path):
        torch.save(published(**{name: value}), tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "x.ckpt", raw_weights=True)

    @pytest.mark.parametrize("factor, dtype", [(float("nan"), torch.float32), (1e300, torch.float64)])
    def test_weights_that_are_not_finite(self, factor, dtype, tmp_path):
        name = "backbone.vocab_embed.embedding"
        weight = published()["state_dict"][name].to(dtype) * factor
        torch.save(published(**{name: weight}), tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match="x.ckpt.* weights that are NaN or infinite, in embed_tokens.weight"):
            convert(tmp_path / "x.ckpt", raw_weights=True)

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
            (b"<html>", "a web page"),
            (b"", "empty"),
        ],
    )
    def test_files_with_other_content(self, content, message, tmp_path):
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"x.ckpt is .*{message}"):
            convert(tmp_path / "x.ckpt")

    @pytest.mark.parametrize("number", ["²", "0", "9" * 5000])
    def test_numbers_of_flags(self, number, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["--checkpoint", str(FLM), "--output", str(tmp_path / "out"), "--num_heads", number])
        assert "must be a positive number below 10 million, got " in capsys.readouterr().err

    def test_wrong_roles(self):
        with pytest.raises(CheckpointError, match="pass it as `--correction`"):
            convert(STAGE_1)
        with pytest.raises(CheckpointError, match="`--checkpoint` must be an FLM"):
            convert(STAGE_2, correction=STAGE_1)
        with pytest.raises(CheckpointError, match="a flow map by itself"):
            convert(FLM, correction=STAGE_2)
        with pytest.raises(CheckpointError, match="is not a flow map"):
            convert(FLM, correction=FLM)
        with pytest.raises(CheckpointError, match="no such file"):
            convert("nowhere.ckpt")


def released_folder(tmp_path, name: str = "flm_hub", settings: dict | None = None, **tensors):
    """Copies a folder of `PyTorchModelHubMixin`, with changes of settings and tensors."""
    folder = tmp_path / "published"
    shutil.copytree(RELEASED / name, folder)
    if tensors:
        weights = load_file(folder / "model.safetensors") | tensors
        save_file({name: x for name, x in weights.items() if x is not None}, folder / "model.safetensors")
    if settings is not None:
        content = json.loads((folder / "config.json").read_text())
        for section, values in settings.items():
            content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
        (folder / "config.json").write_text(json.dumps(content))
    return folder


class TestHubFolders:
    """Folders as `PyTorchModelHubMixin` writes them; the values that come out are in `test_released.py`."""

    @pytest.mark.parametrize("gamma", [0.0, 0.8, 1])
    def test_gamma_becomes_the_default_of_generate(self, gamma, tmp_path):
        model = convert(released_folder(tmp_path, "fmlm_hub", {"sampling": {"gamma": gamma}}))
        assert model.generation_config.gamma == gamma
        model.save_pretrained(tmp_path / "model")
        reloaded = AutoModel.from_pretrained(tmp_path / "model")
        tokens, expected = (
            each.generate(num_samples=4, num_steps=4, generator=torch.Generator().manual_seed(0), **options)
            for each, options in ((reloaded, {}), (model, {"gamma": gamma}))
        )
        assert torch.equal(tokens, expected)

    @pytest.mark.parametrize("gamma", [-0.1, 2, "much", [1], True])
    def test_gamma_that_makes_no_sense_is_left_out(self, gamma, tmp_path):
        model = convert(released_folder(tmp_path, settings={"sampling": {"gamma": gamma}}))
        assert model.generation_config.gamma is None

    def test_nothing_but_the_vocabulary_in_the_settings(self, tmp_path):
        folder = released_folder(tmp_path)
        (folder / "config.json").write_text('{"vocab_size": 53}')
        with pytest.raises(CheckpointError, match="num_attention_heads.*--num_heads"):
            convert(folder)
        model = convert(folder, num_heads=2, length=12)
        assert model.config == convert(RELEASED / "flm_hub").config
        assert model.generation_config.gamma is None

    @pytest.mark.parametrize(
        "source, softcap, expected",
        [
            (FLM, "auto", None),
            (FLM, 30.0, 30.0),
            (RELEASED / "flm.ckpt", "auto", 30.0),
            (RELEASED / "flm_hub", "auto", 30.0),
            (RELEASED / "flm_hub", None, None),
        ],
    )
    def test_final_logit_softcapping(self, source, softcap, expected):
        assert convert(source, final_logit_softcapping=softcap).config.final_logit_softcapping == expected

    @pytest.mark.parametrize(
        "algorithm, gamma, expected",
        [("flm", None, None), ("flm", 0.0, 30.0), ("dos", None, 30.0), ("flm_distill_double", None, None)],
    )
    def test_final_logit_softcapping_by_algorithm_and_gamma(self, algorithm, gamma, expected, tmp_path):
        content = published(algorithm=algorithm)
        content["hyper_parameters"]["config"]["sampling"] = {} if gamma is None else {"gamma": gamma}
        torch.save(content, tmp_path / "x.ckpt")
        config = convert(tmp_path / "x.ckpt", raw_weights=True).config
        assert config.final_logit_softcapping == expected

    @pytest.mark.parametrize("value, expected", [("none", None), ("25", 25.0)])
    def test_final_logit_softcapping_flag(self, value, expected, tmp_path):
        flags = ["--checkpoint", str(FLM), "--output", str(tmp_path / "out"), "--final-logit-softcapping", value]
        main(flags)
        assert AutoModel.from_pretrained(tmp_path / "out").config.final_logit_softcapping == expected

    @pytest.mark.parametrize("value", ["0", "-3", "nan", "inf", "thirty"])
    def test_final_logit_softcapping_flag_that_makes_no_sense(self, value, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["--checkpoint", str(FLM), "--output", str(tmp_path / "out"), "--final-logit-softcapping", value])
        assert "must be a positive number or `none`" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "name, settings, tensors, message",
        [
            ("flm_hub", {"algo": {"backbone": "dimamba"}}, {}, "its backbone is a Mamba"),
            ("flm_hub", {}, {"blocks.0.mixer.in_proj.weight": torch.zeros(3)}, "its backbone is a Mamba"),
            ("flm_hub", {}, {"cond_map.embedding_table.weight": torch.zeros(3, 16)}, "class-conditional"),
            ("flm_hub", {"model": {"use_pos_emb": True}}, {}, "`use_pos_emb`"),
            ("flm_hub", {}, {"pos_embed.weight": torch.zeros(12, 32)}, "`use_pos_emb`"),
            ("flm_hub", {"algo": {"causal_attention": True}}, {}, "its attention is causal"),
            ("flm_hub", {"algo": {"double_temb": True}}, {}, "without the tensors of its second time embedding"),
            (
                "flm_hub",
                {"model": {"n_blocks": 3}},
                {},
                "`model.n_blocks: 3`, but its tensors have 2: some are missing",
            ),
            ("flm_hub", {"model": {"hidden_size": 64}}, {}, "`model.hidden_size: 64`, but its tensors have 32"),
            ("flm_hub", {"algo": {"name": "mdlm"}}, {}, "a model of 'mdlm'"),
            ("flm_hub", {"algo": {"name": "duo_base"}}, {}, "a model of 'duo_base'"),
            ("fmlm_hub", {"algo": {"name": "mdlm"}}, {}, "a model of 'mdlm', which is neither"),
            ("fmlm_hub", {"algo": {"name": "fmlm_masked"}}, {}, "a model of 'fmlm_masked'"),
            ("flm_hub", {"model_type": "bert"}, {}, "a model of transformers .'bert'."),
            ("flm_hub", {}, {"vocab_embed.embedding": None}, "no embed_tokens.weight"),
            ("flm_hub", {}, {"surprise": torch.zeros(3)}, r"unknown: 'surprise' \(3,\)"),
        ],
    )
    def test_what_is_refused(self, name, settings, tensors, message, tmp_path):
        with pytest.raises(CheckpointError, match=message):
            convert(released_folder(tmp_path, name, settings, **tensors))

    @pytest.mark.parametrize("algorithm", [{"name": "fmlm_plus"}, {"skip_time_reparam": True}], ids=str)
    def test_any_order_is_told_by_the_algorithm(self, algorithm, tmp_path):
        """FMLM and FMLM+ have the same tensors."""
        model = convert(released_folder(tmp_path, "fmlm_hub", {"algo": algorithm}))
        assert model.config.per_token_timesteps and model.config.time_reparameterization is None
        flm = convert(released_folder(tmp_path / "flm", "flm_hub", {"algo": {"skip_time_reparam": True}}))
        assert flm.config.time_reparameterization is None and not flm.config.per_token_timesteps
        other = convert(released_folder(tmp_path / "other", "fmlm_hub", {"algo": {"skip_time_reparam": False}}))
        assert not other.config.per_token_timesteps and other.config.time_reparameterization == "argmax"

    def test_a_name_says_nothing_of_the_tensors(self, tmp_path):
        """The second time embedding makes a flow map, whatever the training was called."""
        for name in ("dos_denoiser", "dos", "something_new"):
            model = convert(released_folder(tmp_path / name, "fmlm_hub", {"algo": {"name": name}}))
            assert type(model).__name__ == "FMLMModel"

    def test_raw_weights_are_not_there(self):
        with pytest.raises(CheckpointError, match="averaged weights only: leave out `--raw_weights`"):
            convert(RELEASED / "flm_hub", raw_weights=True)

    def test_half_precision_becomes_single(self, tmp_path):
        weights = load_file(RELEASED / "flm_hub" / "model.safetensors")
        folder = released_folder(tmp_path, **{name: tensor.bfloat16() for name, tensor in weights.items()})
        model = convert(folder)
        assert model.dtype == torch.float32
        assert torch.equal(model.embed_tokens.weight, weights["vocab_embed.embedding"].bfloat16().float())

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
    def test_types_of_numbers_that_are_no_weights(self, dtype, tmp_path):
        name = "output_layer.linear.weight"
        weight = load_file(RELEASED / "flm_hub" / "model.safetensors")[name].to(dtype)
        with pytest.raises(
            CheckpointError, match="lm_head.weight cannot be read: ValueError: its type must be one of"
        ):
            convert(released_folder(tmp_path, **{name: weight}))

    def test_paths(self, tmp_path, capsys):
        folder = released_folder(tmp_path)
        assert convert(f"{folder}/").config.vocab_size == 53
        with pytest.raises(CheckpointError, match="`--revision` only applies to Hub repositories"):
            convert(folder, revision="main")
        shutil.copy(RELEASED / "flm.ckpt", folder / "flm.ckpt")
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="has no model.safetensors.*To convert flm.ckpt, name the file"):
            convert(folder)
        (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
        with pytest.raises(SystemExit):
            main(["--checkpoint", str(FLM), "--output", str(tmp_path / "dangling")])
        assert "already exists" in capsys.readouterr().err

    @pytest.mark.parametrize("content", ["{}", "[]", "garbage"])
    def test_tokenizer_that_is_damaged(self, content, tmp_path, capsys):
        train_tokenizer(["a b c"], "word", vocab_size=100).save_pretrained(tmp_path / "t")
        (tmp_path / "t" / "tokenizer.json").write_text(content)
        flags = ["--checkpoint", str(FLM), "--tokenizer", str(tmp_path / "t"), "--output", str(tmp_path / "out")]
        with pytest.raises(SystemExit):
            main(flags)
        assert "--tokenizer: " in capsys.readouterr().err.splitlines()[-1]

    def test_says_what_it_took_for_the_cap(self, tmp_path, capsys):
        for name, source, told in (("a", FLM, "without a cap"), ("b", RELEASED / "flm.ckpt", "capped at 30.0")):
            main(
                [
                    "--checkpoint",
                    str(source),
                    "--output",
                    str(tmp_path / name),
                    "--tokenizer",
                    str(self.words(tmp_path, name)),
                ]
            )
            assert f"logits {told}" in capsys.readouterr().out

    @staticmethod
    def words(tmp_path, name):
        size = {"a": 63, "b": 49}[name]
        tokenizer = train_tokenizer([" ".join(f"w{n}" for n in range(size))], "word", vocab_size=100)
        tokenizer.save_pretrained(tmp_path / f"words_{name}")
        return tmp_path / f"words_{name}"

    @pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
    def test_missing_file(self, filename, tmp_path):
        folder = released_folder(tmp_path)
        (folder / filename).unlink()
        with pytest.raises(CheckpointError, match=f"has no {filename}"):
            convert(folder)

    def test_a_file_in_the_place_of_its_folder(self):
        with pytest.raises(CheckpointError, match="pass the folder"):
            convert(RELEASED / "flm_hub" / "model.safetensors")

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_weights(self, share, tmp_path):
        path = released_folder(tmp_path) / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match="model.safetensors is (truncated or damaged|empty)"):
            convert(path.parent)

    @pytest.mark.parametrize(
        "content",
        [b"", b"\xff\xfe", b"{", b"[" * 10**6, b'{"algo": ' * 10**5, b"[1]", b"9" * 10**5, b" " * 2**23],
        ids=["empty", "binary", "open", "nested list", "nested dictionary", "list", "number", "large"],
    )
    def test_settings_that_are_none(self, content, tmp_path):
        folder = released_folder(tmp_path)
        (folder / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match="config.json (cannot be read|is not a dictionary)"):
            convert(folder)

    @pytest.mark.parametrize("heads", [0, -1, True, "two", 10**30, None])
    def test_sizes_that_make_no_sense(self, heads, tmp_path):
        with pytest.raises(CheckpointError, match="does not record a valid `num_attention_heads`"):
            convert(released_folder(tmp_path, settings={"model": {"n_heads": heads}}))

    @pytest.mark.slow
    def test_memory(self, tmp_path):
        """A model of the released size takes at most half of its file beyond the file itself."""
        sizes = {"n_blocks": 12, "hidden_size": 768, "cond_dim": 128, "n_heads": 12, "length": 1024}
        folder = released_folder(tmp_path, settings={"model": sizes, "vocab_size": 50258})
        small, weights = load_file(folder / "model.safetensors"), {}
        shapes = {53: 50258, 32: 768, 16: 128, 128: 3072, 96: 2304, 192: 4608, 64: 1536, 256: 256, 8: 32}
        for name, tensor in small.items():
            for block in range(12) if ".0." in name and "blocks" in name else [0]:
                weights[name.replace("blocks.0.", f"blocks.{block}.")] = torch.ones([shapes[n] for n in tensor.shape])
        save_file(weights, folder / "model.safetensors")
        size = (folder / "model.safetensors").stat().st_size
        assert size > 6.7e8
        script = """
import json, sys
from modeling_flm.hub.convert import main
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
before = status("VmRSS")
main(["--checkpoint", sys.argv[1], "--output", sys.argv[2]])
print(json.dumps(status("VmHWM") - before))
"""
        command = [sys.executable, "-c", script, str(folder), str(tmp_path / "out")]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        assert int(output.splitlines()[-1]) < 1.5 * size


REPO_ID = "me/flm-tiny"


class TestHub:
    """`--checkpoint` is the name of a repository, on a Hub of the loopback interface."""

    @pytest.fixture
    def repository(self, server):
        files = {path.name: File(path.read_bytes()) for path in (RELEASED / "flm_hub").iterdir()}
        files["model.safetensors"].is_lfs = True
        server.repositories[REPO_ID] = Repository()
        server.repositories[REPO_ID].commit("main", files, "first")
        return server.repositories[REPO_ID]

    @pytest.fixture
    def waits_not(self, monkeypatch):
        monkeypatch.setattr("time.sleep", lambda seconds: None)

    def change(self, repository, **changes) -> str:
        """Another commit, in which files are changed or, by `None`, left out."""
        files = {**repository.commits[repository.branches["main"]], **changes}
        return repository.commit("main", {name: file for name, file in files.items() if file is not None}, "next")

    def refuse(self, tmp_path, capsys, match, *flags, checkpoint=REPO_ID):
        with pytest.raises(SystemExit, match=match) as error:
            main(["--checkpoint", checkpoint, "--output", str(tmp_path / "out"), *flags])
        assert "\n" not in str(error.value)  # one line
        assert not (tmp_path / "out").exists()

    def test_by_name(self, repository, server, tmp_path, capsys):
        main(["--checkpoint", REPO_ID, "--output", str(tmp_path / "out")])
        model, expected = AutoModel.from_pretrained(tmp_path / "out"), convert(RELEASED / "flm_hub")
        assert all(torch.equal(x, expected.state_dict()[name]) for name, x in model.state_dict().items())
        assert "FLMModel with 40,501 parameters" in capsys.readouterr().out
        downloads = {request.split("/")[-1] for request in server.requests if request.startswith("GET")}
        assert {"config.json", "model.safetensors"} <= downloads and "README.md" not in downloads

    def test_revision(self, repository, tmp_path, capsys):
        first = repository.branches["main"]
        files = {path.name: File(path.read_bytes()) for path in (RELEASED / "fmlm_hub").iterdir()}
        second = self.change(repository, **files)
        for revision, name in ((first, "FLMModel"), (second, "FMLMModel"), ("main", "FMLMModel")):
            main(["--checkpoint", REPO_ID, "--revision", revision, "--output", str(tmp_path / revision)])
            assert type(AutoModel.from_pretrained(tmp_path / revision)).__name__ == name
        self.refuse(tmp_path, capsys, "has no revision 'v9': pass another `--revision`", "--revision", "v9")
        self.refuse(tmp_path, capsys, "`--revision` is empty: name a branch", "--revision", "")
        self.refuse(
            tmp_path, capsys, "`--revision` only applies to Hub repositories", "--revision", "v9", checkpoint=str(FLM)
        )

    def test_offline_from_the_cache(self, repository, server, tmp_path, monkeypatch, capsys):
        convert(REPO_ID)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        requests = len(server.requests)
        assert torch.equal(convert(REPO_ID).lm_head.bias, convert(RELEASED / "flm_hub").lm_head.bias)
        assert len(server.requests) == requests
        self.refuse(tmp_path, capsys, "config.json is not in the cache", checkpoint="me/another")

    @pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
    def test_missing_file(self, filename, repository, tmp_path, capsys):
        self.change(repository, **{filename: None})
        self.refuse(tmp_path, capsys, f"{REPO_ID} has no {filename}")

    def test_truncated_file(self, repository, tmp_path, capsys):
        content = repository.commits[repository.branches["main"]]["model.safetensors"].content
        self.change(repository, **{"model.safetensors": File(content[:1000], is_lfs=True)})
        self.refuse(tmp_path, capsys, "model.safetensors is truncated or damaged")

    def test_connection_that_breaks(self, repository, server, tmp_path, capsys, waits_not):
        server.faults.append(Fault("GET .*model.safetensors", "cut", count=100))
        self.refuse(tmp_path, capsys, "(could not download model.safetensors|model.safetensors is not in the cache)")
        server.faults.clear()
        assert convert(REPO_ID).config.vocab_size == 53  # nothing of it is left in the cache

    def test_token(self, repository, tmp_path, capsys):
        repository.private = True
        self.refuse(
            tmp_path, capsys, "neither on this machine nor on the Hub. If it is private, log in with `hf auth login`"
        )
        self.refuse(tmp_path, capsys, "does not accept the token .* another `--token`", "--token", "hf_wrong")
        main(["--checkpoint", REPO_ID, "--token", TOKEN, "--output", str(tmp_path / "out")])
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_gated(self, repository, tmp_path, capsys):
        repository.gated = True
        self.refuse(tmp_path, capsys, "is gated: ask for access on its page, and log in")
        self.refuse(tmp_path, capsys, "is gated: ask for access on its page, and log in", "--token", TOKEN)

    def test_no_such_repository(self, server, tmp_path, capsys):
        self.refuse(tmp_path, capsys, "me/nothing is neither on this machine nor on the Hub", checkpoint="me/nothing")

    def test_no_connection(self, repository, server, tmp_path, capsys, waits_not):
        server.faults.append(Fault("config.json", "500", count=1000))
        self.refuse(tmp_path, capsys, "(could not download config.json|config.json is not in the cache)")

    def test_tokenizer_that_the_settings_name(self, repository, server, tmp_path):
        tokenizer = train_tokenizer([" ".join(f"w{n}" for n in range(49))], "word", vocab_size=100)
        other = train_tokenizer(["a b c"], "word", vocab_size=100)
        for name, saved in (("tokenizer", tokenizer), ("other", other)):
            saved.save_pretrained(tmp_path / name)
            server.repositories[f"me/{name}"] = Repository()
            files = {path.name: File(path.read_bytes()) for path in (tmp_path / name).iterdir()}
            server.repositories[f"me/{name}"].commit("main", files, "first")

        # In a process of its own, as the tokenizers of transformers remember where the Hub is.
        script = """
import sys
from modeling_flm.hub.convert import main
for name in sys.argv[1:]:
    main(["--checkpoint", "me/flm-tiny", "--revision", name, "--output", name])
main(["--checkpoint", "me/flm-tiny", "--revision", "other", "--tokenizer", "me/tokenizer", "--output", "given"])
"""
        # The last four cannot be loaded, or belong to other models.
        names = {"right": "me/tokenizer", "other": "me/other", "none": None, "path": "../tokenizer", "nothing": "me/x"}
        for branch, name in names.items():
            content = json.loads((RELEASED / "flm_hub" / "config.json").read_text())
            content["data"]["tokenizer_name_or_path"] = name
            files = repository.commits[repository.branches["main"]]
            repository.commit(branch, files | {"config.json": File(json.dumps(content).encode())}, branch)
        folder = tmp_path / "run"
        folder.mkdir()
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", script, *names]
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        has_tokenizer = {path.name: (path / "tokenizer.json").is_file() for path in folder.iterdir()}
        assert has_tokenizer == {name: name in ("right", "given") for name in (*names, "given")}
        assert "me/other, which has 7 tokens, but the model has 53: pass `--tokenizer`" in process.stderr
        assert "Could not load me/x, the tokenizer that the checkpoint names" in process.stderr
        for name in ("right", "given"):
            assert AutoTokenizer.from_pretrained(folder / name).get_vocab() == tokenizer.get_vocab()
            config = AutoModel.from_pretrained(folder / name).config
            assert config.eos_token_id == tokenizer.eos_token_id and config.pad_token_id == tokenizer.pad_token_id


class TestCommand:
    @pytest.mark.parametrize("flag", ["--num-heads", "--length"])
    @pytest.mark.parametrize("value", ["0", "-1", "x"])
    def test_flags_that_make_no_sense(self, flag, value, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["--checkpoint", str(FLM), "--output", str(tmp_path / "out"), flag, value])
        assert "must be a positive number" in capsys.readouterr().err

    def test_paths_that_are_not_there(self, tmp_path, capsys):
        (tmp_path / "file").touch()
        for flags in (
            ["--output", tmp_path / "file" / "out"],
            ["--output", tmp_path / "o", "--tokenizer", "./nowhere"],
        ):
            with pytest.raises(SystemExit):
                main(["--checkpoint", str(FLM), *map(str, flags)])
            assert f"error: {flags[-2]}: " in capsys.readouterr().err

    def test_output_that_exists(self, tmp_path, capsys):
        (tmp_path / "out").mkdir()
        with pytest.raises(SystemExit):
            main(["--checkpoint", str(FLM), "--output", str(tmp_path / "out")])
        assert "already exists" in capsys.readouterr().err
        assert list((tmp_path / "out").iterdir()) == []

    def test_tokenizer_of_another_size(self, tmp_path, capsys):
        train_tokenizer(["a b c"], "word", vocab_size=100).save_pretrained(tmp_path / "t")
        with pytest.raises(SystemExit):
            main(["--checkpoint", str(FLM), "--tokenizer", str(tmp_path / "t"), "--output", str(tmp_path / "out")])
        assert "the model has 67" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
