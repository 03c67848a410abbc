# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Train a flow map without a trained FLM: FMLM+, which writes in any order, or one by self-distillation.

    flm-train-fmlm --train_file corpus.txt --train_tokenizer bpe --vocab_size 2048 --output_dir outputs/fmlm_plus

Texts and flags are as for `flm-train`, and the presets as for `flm-distill`. With --masked_model the flow
map starts from the weights of a masked diffusion model on the same network, whose last token is the mask, and with
--masked_probability it learns from it as well.
"""

from dataclasses import dataclass, field

from transformers import AutoModel, set_seed

from modeling_flm import FMLMModel

from .. import PRESETS, FMLMTrainer, FMLMTrainingArguments
from .command_line import ScriptParser, check_kind, explained
from .train import ModelArguments, get_model, load_data
from .training import DataArguments, check_output_dir, pack_datasets, run


@dataclass
class FlowMapArguments(ModelArguments):
    """Which flow map to train, with which tokenizer."""

    preset: str = field(
        default="any_order", metadata={"help": "The recipe.", "choices": ["any_order", "self_distillation"]}
    )
    masked_model: str | None = field(
        default=None, metadata={"help": "Name or folder of a masked diffusion model to start from."}
    )


def make_parser() -> ScriptParser:
    return ScriptParser(
        [FlowMapArguments, DataArguments, FMLMTrainingArguments],
        description=__doc__,
        find_defaults=lambda chosen: PRESETS[chosen.preset],
    )


def train_fmlm(model_args: FlowMapArguments, data_args: DataArguments, training_args: FMLMTrainingArguments):
    with explained(FlowMapArguments, DataArguments, FMLMTrainingArguments):
        check_output_dir(training_args)
        set_seed(training_args.seed)
        if training_args.masked_probability > 0 and model_args.masked_model is None:
            raise SystemExit("--masked_probability needs a --masked_model.")
        if model_args.masked_model is not None:
            if model_args.preset != "any_order":
                raise SystemExit("--masked_model is for --preset any_order.")
            for name in ("model_name_or_path", "config_overrides"):
                if getattr(model_args, name) is not None:
                    raise SystemExit(f"--{name} does not go with --masked_model, which gives weights and sizes.")
        dataset, tokenizer = load_data(model_args, data_args, training_args)
        any_order = {"per_token_timesteps": True, "time_reparameterization": None}
        told = any_order if model_args.preset == "any_order" else {}
        masked_model = None
        if model_args.masked_model is None:
            model = get_model(model_args, tokenizer, data_args.block_size, "fmlm", **told)
        else:
            options = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
            masked_model = AutoModel.from_pretrained(
                model_args.masked_model, trust_remote_code=model_args.trust_remote_code, **options
            )
            check_kind("--masked_model", masked_model)
            model = FMLMModel.from_masked(masked_model)
            if len(tokenizer) > model.config.vocab_size:
                raise SystemExit(
                    f"--tokenizer_name: it has {len(tokenizer)} tokens, but the flow map has {model.config.vocab_size}, those of "
                    "--masked_model without its last, the mask: name a tokenizer without the mask."
                )
        packed = pack_datasets(dataset, data_args, tokenizer, model.config.max_position_embeddings, training_args)
        trainer = FMLMTrainer(
            model=model,
            args=training_args,
            masked_teacher=masked_model if training_args.masked_probability > 0 else None,
            train_dataset=packed["train"],
            eval_dataset=packed.get("validation"),
            processing_class=tokenizer,
        )
    run(trainer, data_args)


def main(arguments: list[str] | None = None):
    train_fmlm(*make_parser().parse_args_and_config(arguments))


if __name__ == "__main__":
    main()
