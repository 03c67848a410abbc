# Copyright 2026 The modeling-flm authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Arguments of [`FLMTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class FLMTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`FLMTrainer`]: those of [`~transformers.TrainingArguments`], and the ones below.

    The defaults of `learning_rate` and `lr_scheduler_type` are the paper's; it also warms up for 2500 steps
    (`warmup_steps=2500`) and trains in bfloat16 (`bf16=True`) with a global batch of 512 texts.

    Parameters:
        ema_decay (`float`, *optional*, defaults to 0.9999):
            Decay of the exponential moving average of the weights, which warms up as
            `min(ema_decay, (1 + n) / (10 + n))` after `n` steps. Evaluation, samples, saved models and pushed models use
            the averaged weights; checkpoints hold both. `None` turns it off.
        sample_steps (`int`, *optional*, defaults to 0):
            Write samples to `samples.jsonl` in `output_dir` every so many optimizer steps. 0 writes none.
        sample_num_samples (`int`, *optional*, defaults to 4):
            The number of texts to write.
        sample_num_steps (`int`, *optional*, defaults to 32):
            The number of steps from noise to text for these samples.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "The learning rate schedule; see `transformers.SchedulerType`."},
    )
    ema_decay: float | None = field(
        default=0.9999,
        metadata={
            "help": "Decay of the moving average of the weights, warmed up as min(ema_decay, (1 + n) / (10 + n)). "
            "Evaluation and saved models use the averaged weights. `None` turns it off."
        },
    )
    sample_steps: int = field(
        default=0, metadata={"help": "Write samples to samples.jsonl every so many steps; 0 writes none."}
    )
    sample_num_samples: int = field(default=4, metadata={"help": "The number of texts to write."})
    sample_num_steps: int = field(default=32, metadata={"help": "The number of steps from noise to text for samples."})

    def __post_init__(self):
        super().__post_init__()
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, or `None`, got {self.ema_decay}.")
        if self.sample_steps < 0:
            raise ValueError(f"`sample_steps` must be at least 0, got {self.sample_steps}.")
        for name in ("sample_num_samples", "sample_num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
