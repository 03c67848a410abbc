# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Distil a trained flow-based language model into a flow map, which writes a whole text in one forward pass.

    flm-distill --teacher outputs/flm --preset single_stage --output_dir outputs/fmlm

The data are those that the teacher was trained with, where its folder says which, unless flags name others.
The presets are the paper's recipes: single_stage; two_network and then, with its result as the teacher, second_stage; and
self_distillation, which needs no trained teacher (here --teacher gives only the architecture and the tokenizer); and any_order,
FMLM+ with the teacher as its denoiser (`flm-train-fmlm` needs none). Every flag
can also stand in a YAML file, given as the first argument; flags after it take precedence, and both over the preset.
"""

from argparse import Namespace
from dataclasses import dataclass, field

from transformers import AutoModel, PreTrainedModel, set_seed

from modeling_flm import FMLMModel, FMLMTwoNetworkModel

from .. import PRESETS, FMLMTrainer, FMLMTrainingArguments
from .command_line import ScriptParser, check_kind, check_model, explained
from .training import (
    DataArguments,
    check_output_dir,
    load_datasets,
    load_model,
    load_tokenizer,
    pack_datasets,
    read_data_settings,
    run,
)


@dataclass
class DistillationArguments:
    """Which model to distil, and how."""

    teacher: str = field(metadata={"help": "Name or folder of a trained model, with its tokenizer."})
    preset: str = field(default="single_stage", metadata={"help": "The recipe.", "choices": list(PRESETS)})
    student: str | None = field(
        default=None, metadata={"help": "A flow map to go on from. By default a new one starts from the teacher."}
    )
    dropout: float | None = field(default=None, metadata={"help": "Dropout of the student. By default the teacher's."})
    learned_loss_weighting: bool | None = field(
        default=None, metadata={"help": "Learn the weight of each time's loss. By default only for two_network."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flex_attention or flash_attention_2."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run code that comes with the models."}
    )


def get_student(
    arguments: DistillationArguments, teacher: PreTrainedModel, options: dict, prompt_fraction: float
) -> PreTrainedModel:
    """A flow map for the preset: loaded, new, or with the weights of the teacher."""
    told = {"per_token_timesteps": True} if prompt_fraction > 0 else {}
    if arguments.preset == "any_order":
        told |= {"time_reparameterization": None}
    if arguments.student is not None:
        return load_model("student", arguments.student, told, **options)
    overrides = {"dropout": arguments.dropout, "learned_loss_weighting": arguments.learned_loss_weighting}
    overrides = {name: value for name, value in overrides.items() if value is not None} | told
    # What the second stage imitates has the FLM in it.
    flow = teacher.flow if isinstance(teacher, FMLMTwoNetworkModel) else teacher
    model_class = FMLMTwoNetworkModel if arguments.preset == "two_network" else FMLMModel
    try:
        student = model_class.from_flm(flow, **overrides)
    except TypeError as error:  # a teacher of another kind than the preset's
        raise ValueError(str(error)) from error
    return FMLMModel(student.config) if arguments.preset == "self_distillation" else student


def find_defaults(chosen: Namespace) -> dict:
    """The data of the teacher, and the preset."""
    check_model("--teacher", chosen.teacher)
    return {**read_data_settings(chosen.teacher, chosen), **PRESETS[chosen.preset]}


def make_parser() -> ScriptParser:
    arguments = [DistillationArguments, DataArguments, FMLMTrainingArguments]
    return ScriptParser(arguments, description=__doc__, find_defaults=find_defaults)


def distill(arguments: DistillationArguments, data_args: DataArguments, training_args: FMLMTrainingArguments):
    with explained(DistillationArguments, DataArguments, FMLMTrainingArguments):
        check_output_dir(training_args)
        set_seed(training_args.seed)
        options = {"trust_remote_code": arguments.trust_remote_code}
        if arguments.attn_implementation is not None:
            options["attn_implementation"] = arguments.attn_implementation
        teacher = AutoModel.from_pretrained(arguments.teacher, **options)
        check_kind("--teacher", teacher)
        tokenizer = load_tokenizer(arguments.teacher)
        student = get_student(arguments, teacher, options, training_args.prompt_fraction)
        packed = pack_datasets(
            load_datasets(data_args), data_args, tokenizer, teacher.config.max_position_embeddings, training_args
        )
        needs_teacher = arguments.preset not in ("two_network", "self_distillation")
        trainer = FMLMTrainer(
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
