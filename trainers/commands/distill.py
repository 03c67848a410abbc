# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Distill a trained flow-based language model into a flow map, which generates a whole text in one forward pass.

    flm-distill --teacher outputs/flm --preset single_stage --output_dir outputs/fmlm

Trains on the teacher's training data, if its folder records them; flags override them. The presets are the
paper's recipes: single_stage; two_network, then second_stage with its result as the teacher; self_distillation, which takes
only the architecture and the tokenizer from --teacher; and any_order, an FMLM+ with the teacher as its denoiser (flm-train
--model_type fmlm needs no teacher). distribution_matching improves texts of few steps afterwards:

    flm-distill --teacher outputs/flm --student outputs/fmlm --preset distribution_matching --max_steps 1000 --output_dir outputs/matched

Every flag can also be set in a YAML file, passed as the first argument. Flags take
precedence over the file, and both over the preset.
"""

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModel, PreTrainedModel, set_seed

from modeling_flm import FMLMModel, FMLMTwoNetworkModel

from .. import PRESETS, DistributionMatchingTrainer, FMLMTrainer, FMLMTrainingArguments
from .command_line import ScriptParser, check_model, check_model_type, errors_about, friendly_errors
from .training import (
    DataArguments,
    check_chosen,
    check_output_dir,
    check_prompts,
    check_reports,
    load_datasets,
    load_model,
    load_pretrained,
    load_tokenizer,
    pack_datasets,
    read_data_settings,
    run,
)


@dataclass
class DistillationArguments:
    """The model to distill, and the recipe."""

    teacher: str = field(metadata={"help": "Name or folder of a trained model with its tokenizer."})
    preset: str = field(default="single_stage", metadata={"help": "The recipe.", "choices": list(PRESETS)})
    student: str | None = field(
        default=None,
        metadata={"help": "A flow map to continue training. By default a new one starts from the teacher."},
    )
    dropout: float | None = field(default=None, metadata={"help": "Dropout of the student. By default the teacher's."})
    learned_loss_weighting: bool | None = field(
        default=None, metadata={"help": "Learn a loss weight for each time. By default only for two_network."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flex_attention or flash_attention_2."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code of the loaded models."})


def get_student(
    arguments: DistillationArguments, teacher: PreTrainedModel, options: dict[str, Any], has_prompts: bool
) -> PreTrainedModel:
    """The flow map for the preset: loaded, new, or with the weights of the teacher."""
    required_settings = {"per_token_timesteps": True} if has_prompts else {}
    if arguments.preset == "any_order":
        required_settings |= {"time_reparameterization": None}
    if arguments.student is not None:
        return load_model("student", arguments.student, required_settings, **options)
    overrides = {"dropout": arguments.dropout, "learned_loss_weighting": arguments.learned_loss_weighting}
    overrides = {name: value for name, value in overrides.items() if value is not None} | required_settings
    # The teacher of the second stage contains the FLM.
    flow = teacher.flow if isinstance(teacher, FMLMTwoNetworkModel) else teacher
    model_class = FMLMTwoNetworkModel if arguments.preset == "two_network" else FMLMModel
    with errors_about("teacher", TypeError):
        student = model_class.from_flm(flow, **overrides)
    return FMLMModel(student.config) if arguments.preset == "self_distillation" else student


def find_defaults(chosen: Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The data of the teacher, the preset, and the settings of a YAML file."""
    check_model("teacher", chosen.teacher)
    settings = check_chosen(chosen, settings)
    return {**read_data_settings(chosen.teacher, chosen), **PRESETS[chosen.preset], **settings}


def make_parser() -> ScriptParser:
    arguments = [DistillationArguments, DataArguments, FMLMTrainingArguments]
    return ScriptParser(arguments, find_defaults, description=__doc__)


def distill(arguments: DistillationArguments, data_args: DataArguments, training_args: FMLMTrainingArguments):
    with friendly_errors(DistillationArguments, DataArguments, FMLMTrainingArguments):
        check_output_dir(training_args)
        check_reports(training_args)
        check_prompts(data_args, training_args)
        set_seed(training_args.seed)
        options = {
            "attn_implementation": arguments.attn_implementation,
            "trust_remote_code": arguments.trust_remote_code,
        }
        teacher = load_pretrained("teacher", AutoModel, arguments.teacher, **options)
        check_model_type("teacher", teacher)
        tokenizer = load_tokenizer("teacher", arguments.teacher)
        student = get_student(arguments, teacher, options, training_args.has_prompts)
        packed = pack_datasets(
            load_datasets(data_args), data_args, tokenizer, teacher.config.max_position_embeddings, training_args
        )
        needs_teacher = arguments.preset not in ("two_network", "self_distillation")
        trainer_class = DistributionMatchingTrainer if arguments.preset == "distribution_matching" else FMLMTrainer
        trainer = trainer_class(
            model=student,
            args=training_args,
            teacher=teacher if needs_teacher else None,
            train_dataset=packed["train"],
            eval_dataset=packed.get("validation"),
            processing_class=tokenizer,
        )
    run(trainer, data_args)


def main(arguments: list[str] | None = None):
    distill(*make_parser().parse_args_and_config(arguments))


if __name__ == "__main__":
    main()
