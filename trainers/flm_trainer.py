# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Trainer of flow-based language models.

A training step: `get_batch_samples` makes a [`FlowBatch`] of each batch of examples, `compute_loss` draws its noise, and
`training_objective` computes the loss.

Private parts of [`~transformers.Trainer`] that the trainers of this library rely on, which a new version may change:

- overridden here: `_prepare_for_training`; in `averaging.py`: `_save_optimizer_and_scheduler`, `_load_from_checkpoint`,
  `_load_best_model`; in `resuming.py`: `_init_training_state`, `_prepare_for_training`, `_run_epoch`; in `pushing.py`: `_save`,
  `_push_from_checkpoint`;
- called: `_get_collator_with_removed_columns`, `_move_model_to_device`, `_finish_current_push`;
- attributes: `_signature_columns`, `_train_batch_size`, `_initial_global_step`.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from modeling_flm import FLMModel, FLMOutput
from modeling_flm.hub.loading import load_checked
from modeling_flm.joint_noise import JointNoise, noise_size
from modeling_flm.posterior_flm import Posterior
from modeling_flm.utils_flm import evaluating

from .adapters import unwrap_model
from .averaging import AveragedTrainer, EMACallback
from .batches import (
    FlowBatch,
    TimePairs,
    UniformTimes,
    low_discrepancy_uniforms,
    make_flow_batch,
    stratified_uniforms,
)
from .callbacks import sampling_callbacks
from .checking import check_arguments, check_finite, check_model
from .data import DataCollatorForFLM, check_datasets, find_text_boundaries
from .distributed import check_support, is_sharded, region_options, through_forward, without_mixed_precision
from .flm_config import FLMTrainingArguments
from .metrics import TokenMeans
from .objectives import expected_embedding, posterior_of
from .refinement import commit_confident, draw_num_rounds
from .resuming import ResumableTrainer


logger = logging.get_logger(__name__)

# Columns of a dataset that are read.
_COLUMNS = ("input_ids", "attention_mask", "labels")

# Separates the random numbers of training and evaluation.
_TRAIN, _EVAL = 0, 1


def _per_token(values: torch.Tensor) -> torch.Tensor:
    """Values of sequences or of tokens, in a shape that broadcasts over tokens."""
    return values[:, None] if values.dim() == 1 else values


class FLMTrainer(AveragedTrainer, ResumableTrainer):
    r"""
    Trains a flow-based language model by flow matching: tokens are noised along the interpolant at a random time, and the
    cross-entropy of the denoiser to the clean tokens is minimized (paper, denoiser objective).

    - Times are uniform in the reparameterized time, and stratified over the global batch.
    - Every evaluation uses the same times and noise.
    - Evaluation, samples, `save_model` and `push_to_hub` use the moving average of the weights (`args.ema_decay`), while
      `trainer.model` has the training weights. A checkpoint holds the averaged weights in `model.safetensors` and the
      training weights in `training_weights.safetensors`.

    Args:
        model ([`~transformers.PreTrainedModel`], `PeftModel` or `str`, *optional*):
            An [`FLMModel`], also within a `PeftModel` or with an adapter of `model.add_adapter`, or its name or path. For a
            model with adapters, only the adapters are trained, averaged and saved. May be omitted if `model_init` is passed,
            which makes a model for every training.
        args ([`FLMTrainingArguments`], *optional*):
            Training arguments.
        data_collator (`Callable`, *optional*):
            Makes batches with `input_ids`, `labels` and, where there is padding, `attention_mask`. Defaults to
            [`DataCollatorForFLM`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Training examples with `input_ids`, for example from [`pack_dataset`].
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Evaluation examples.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. It is saved with the model and decodes samples.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks, which run after the trainer's own.
        kwargs:
            Further arguments of [`~transformers.Trainer`]. (`compute_metrics` receives the logits of all tokens at random times,
            which take much memory; prefer `eval_likelihood_times` and `eval_gen_ppl_steps`.)

    Example:

    ```python
    >>> trainer = FLMTrainer(
    ...     model=FLMModel(FLMConfig(vocab_size=len(tokenizer))),
    ...     args=FLMTrainingArguments(output_dir="flm", max_steps=1000),
    ...     train_dataset=pack_dataset(dataset, tokenizer, block_size=128),
    ...     processing_class=tokenizer,
    ... )
    >>> trainer.train()
    ```
    """

    model_classes: tuple[type[PreTrainedModel], ...] = (FLMModel,)
    groups: tuple[str, ...] = ("self_conditioned",)  # groups of examples with a logged loss each, where there are some
    teacher: PreTrainedModel | None = None  # frozen

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: FLMTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs,
    ):
        if isinstance(model, str):
            model = load_checked(AutoModel, model, dtype=torch.float32)
        if model is None and kwargs.get("model_init") is None:
            raise ValueError("Pass a `model`, or as `model_init` a function that makes one.")
        if args is None:
            name = self.model_classes[0].__name__ if model is None else type(unwrap_model(model)).__name__
            args = FLMTrainingArguments(output_dir=f"{name}-trained")
        if not isinstance(args, FLMTrainingArguments):
            raise TypeError(f"`args` must be `FLMTrainingArguments`, got `{type(args).__name__}`.")
        compute_loss_func = kwargs.get("compute_loss_func")
        check_arguments(type(self).__name__, args, processing_class, data_collator, compute_loss_func)
        # `_check_model` reads these before `Trainer` sets them.
        self.args, self.processing_class = args, processing_class
        # Compile regions instead of the wrapped model, because targets and samples do not call its `forward`.
        self._compile_options = region_options(args.torch_compile_backend, args.torch_compile_mode)
        if model is not None:  # otherwise `call_model_init` makes and checks it
            self._check_model(model)
        ema = None if args.ema_decay is None else EMACallback(args.ema_decay)
        if ema is not None:
            logger.warning_once(
                "Evaluation, samples, and saved and published models use the moving average of the weights "
                f"(ema_decay={args.ema_decay}). Checkpoints also keep the training weights."
            )
        # Before the user's callbacks, which then see the new average, and the figures of samples in an evaluation.
        own_callbacks = sampling_callbacks(args, processing_class, self.log, ema)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*own_callbacks, *(callbacks or [])],
            ema=ema,
            **kwargs,
        )
        config = self.model.config
        if data_collator is None:
            self.data_collator = DataCollatorForFLM(config.pad_token_id, config.vocab_size)
        if data_collator is None or args.remove_unused_columns:  # then examples have `input_ids`
            check_datasets(self.train_dataset, self.eval_dataset, config)
        check_support(type(self).__name__, self.accelerator, self.is_deepspeed_enabled, self.is_fsdp_enabled)
        if self.is_fsdp_enabled and args.prompt_fraction > 0 and "confident" in args.prompt_kinds:
            raise ValueError('`prompt_kinds`: "confident" runs the network between steps, which FSDP shards: use DDP.')
        self._signature_columns = list(_COLUMNS)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the number of tokens in the global batch
        self._joint_noise: JointNoise | None = None
        self._frozen_gram: torch.Tensor | None = None  # the teacher's part of the noise, which never changes
        self._means = TokenMeans(("loss", *self.groups), args.device)
        if model is not None:
            self._compile_regions(unwrap_model(model))

    @property
    def network(self) -> PreTrainedModel:
        """The flow-based language model itself, without wrappers of `self.model`."""
        return unwrap_model(self.model)

    def _check_model(self, model: PreTrainedModel | nn.Module):
        check_model(type(self).__name__, model, self.model_classes, self.args, self.processing_class)

    def call_model_init(self, trial=None):
        """As [`~transformers.Trainer.call_model_init`]. The model is checked, and compiled as `args` request."""
        model = super().call_model_init(trial)
        self._check_model(model)
        self._compile_regions(unwrap_model(model))
        return model

    def _compile_regions(self, network: PreTrainedModel):
        if self._compile_options is not None:
            network.compile_regions(**self._compile_options)

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        """As [`~transformers.Trainer.get_eval_dataloader`], with all examples, whatever `dataloader_drop_last` is."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _prepare_for_training(self, *args, **kwargs):
        if self.ema is not None:
            self.ema.decay = self.args.ema_decay  # a hyperparameter search may have changed it
        check_finite(*self._networks())
        self._decide_text_boundaries()
        with without_mixed_precision(self.accelerator):
            return super()._prepare_for_training(*args, **kwargs)

    def _decide_text_boundaries(self):
        """
        Adapts the generation configuration to the training examples, after `Trainer.train` has copied the tokenizer's special
        tokens to the model.
        """
        config = self.network.generation_config
        boundaries = None
        if self.is_world_process_zero():  # which decides for all
            collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
            boundaries = find_text_boundaries(self.train_dataset, collate, config)
        (boundaries,) = broadcast_object_list([boundaries])
        if boundaries is not None:
            boundaries.apply(config)

    # Batches

    @property
    def time_sampler(self) -> UniformTimes | TimePairs:
        """The sampler of the times of examples, see [`make_flow_batch`]."""
        return UniformTimes(self.network.config.self_conditioning)

    def _positions(self, examples: dict[str, torch.Tensor], index: int, batch_size: int) -> range:
        """Returns the positions in the global batch of the examples in batch number `index` of this process."""
        first = (index * self.accelerator.num_processes + self.accelerator.process_index) * batch_size
        return range(first, first + len(examples["input_ids"]))

    def _make_batch(
        self, examples: dict[str, torch.Tensor], uniforms: torch.Tensor, positions: range, key: tuple[int, ...]
    ) -> FlowBatch:
        """Makes a [`FlowBatch`] of collated examples."""
        args, max_length = self.args, self.network.config.max_position_embeddings
        batch = make_flow_batch(
            examples,
            uniforms,
            positions,
            key,
            self.time_sampler,
            max_length=max_length,
            prompt_fraction=args.prompt_fraction,
            prompt_kinds=args.prompt_kinds,
            prompts_from_labels=args.prompts_from_labels,
            prompt_dropout=args.prompt_dropout,
            pad_token_id=self.network.config.pad_token_id,
            device=args.device,
        )
        rounds = draw_num_rounds(batch.noise_seeds, args.prompt_fraction, args.prompt_kinds, args.confident_rounds)
        if not any(rounds):
            return batch
        joint_noise, autocast = self._get_joint_noise(), self.accelerator.autocast
        with evaluating(self.network):
            return commit_confident(
                self.network, batch, rounds, args.confident_rounds, joint_noise, max_length, autocast
            )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Returns the batches of the next optimizer step, and the number of tokens in the global batch that the loss counts."""
        self._joint_noise = None  # the weights have changed
        batches = self._make_batches(list(islice(epoch_iterator, num_batches)), self.state.global_step)
        return super().get_batch_samples(iter(batches), len(batches), device)  # counts the tokens

    def _make_batches(self, examples: list[dict[str, torch.Tensor]], *key: int) -> list[FlowBatch]:
        """Makes the batches of an optimizer step, with random numbers that depend on the seed of the training and on `key`."""
        batch_size, key = self._train_batch_size, (self.args.seed, _TRAIN, *key)
        num_examples = len(examples) * self.accelerator.num_processes * batch_size
        uniforms = stratified_uniforms(num_examples, self.time_sampler.num_uniforms, *key)
        batches = []
        for index, each in enumerate(examples):
            positions = self._positions(each, index, batch_size)
            batches.append(self._make_batch(each, uniforms[positions.start : positions.stop], positions, key))
        return batches

    def _with_noise(self, batch: FlowBatch) -> FlowBatch:
        """Draws the noise of a batch. Not earlier, so that the noise of one batch is held at a time."""
        if batch.noise is not None:
            return batch
        return batch.with_noise(self._noise_size(), self.network.config.max_position_embeddings)

    def _noise_size(self) -> int:
        """Returns the number of random numbers that a token needs."""
        return noise_size(*(embedding.weight for network in self._networks() for embedding in network.embeddings))

    # The objective

    def _networks(self) -> list[PreTrainedModel]:
        """Returns the networks that take a batch as input, the trained model first."""
        return [self.network]

    def _get_joint_noise(self) -> JointNoise:
        """Returns the noise of all networks, made once per optimizer step, or per batch if weights are sharded."""
        if self._joint_noise is None or is_sharded(self.model):
            self._joint_noise = JointNoise.of_networks(
                *self._networks(), frozen=self.teacher, frozen_gram=self._frozen_gram
            )
            self._frozen_gram = self._joint_noise.frozen_gram
        return self._joint_noise

    def compute_targets(
        self, batch: FlowBatch, joint_noise: JointNoise
    ) -> tuple[torch.LongTensor | Posterior, torch.Tensor]:
        r"""
        Returns the detached targets of a batch.

        Args:
            batch ([`FlowBatch`]): The examples, with noise.
            joint_noise ([`~modeling_flm.joint_noise.JointNoise`]): The noise of all networks.

        Returns:
            `tuple[torch.LongTensor or Posterior, torch.Tensor]`: tokens or distributions, and weights of the loss, of the shape of
            `batch.tau_s`.
        """
        return batch.labels, torch.ones_like(batch.tau_s)

    @torch.no_grad()
    def compute_estimate(self, batch: FlowBatch, state: torch.Tensor) -> torch.Tensor | None:
        """
        Returns the estimates of the text that a model with self-conditioning reads, of the shape of `state`: its own, at the same
        states, in the group `"self_conditioned"`, and 0 elsewhere. `None` for other models.
        """
        rows, network = batch.groups.get("self_conditioned"), self.network
        if not rows:
            return None
        rows = torch.tensor(rows).to(state.device, non_blocking=True)
        part, own_state, estimate = batch.select(rows), state[rows], torch.zeros_like(state)
        with evaluating(network):
            posterior = posterior_of(network, own_state, part.tau_s, part.tau_s, part, self.accelerator.autocast)
            estimate[rows] = expected_embedding(posterior, network, own_state)
        return estimate

    def compute_divergence(
        self,
        target: torch.LongTensor | Posterior,
        token_weights: torch.Tensor,
        hidden_states: torch.Tensor,
        batch: FlowBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns the weighted sum of the divergences of the model from the target of `compute_targets`, and the divergence of each
        token; `hidden_states` are the model's, from `encode`.
        """
        return self.network.cross_entropy_loss(target, token_weights, hidden_states, batch.tau_s, batch.tau_t)

    def training_objective(
        self, batch: FlowBatch, num_items: torch.Tensor | int | None = None, with_logits: bool = False
    ) -> FLMOutput:
        r"""
        Computes the loss of a batch, for every objective of the papers: a two-time denoiser, a target and a divergence. Runs
        within the wrapper's `forward`, so that DDP and FSDP2 see one forward pass.

        Args:
            batch ([`FlowBatch`]): The examples, with noise.
            num_items (`torch.Tensor` or `int`, *optional*):
                Divisor of the summed loss, if the batch is one of several. By default the number of tokens that the loss
                counts in the batch.
            with_logits (`bool`, *optional*, defaults to `False`): Whether to return the outputs of the head.

        Returns:
            [`FLMOutput`] with `loss` and `token_losses`.
        """
        model = self.network
        # 1. All networks see the same noise, each through its own embedding
        joint_noise = self._get_joint_noise()
        # 2. The target: the data, or predictions of networks at the same noised states
        with torch.no_grad():
            target, weights = self.compute_targets(batch, joint_noise)
        # 3. The model's noised state, and its backbone
        state = model.make_state(batch.input_ids, batch.tau_s, batch.noise, joint_noise)
        estimate = self.compute_estimate(batch, state)
        with self.accelerator.autocast():
            hidden_states = model.encode(state, batch.tau_s, batch.tau_t, batch.attention_mask, estimate)
            # 4. The weight of each token: 0 if it is known, otherwise the target's, and in training a learned one
            mask = batch.mask.to(hidden_states.device, torch.float32)
            token_weights = mask * _per_token(weights)
            log_weight = model.log_loss_weight(batch.tau_s) if model.training else None
            learned = 1.0 if log_weight is None else torch.exp(-_per_token(log_weight))
            # 5. The divergence of target and model, one chunk of positions at a time
            total, losses = self.compute_divergence(target, learned * token_weights, hidden_states, batch)
            if log_weight is not None:
                total = total + (mask * _per_token(log_weight)).sum()
            # 6. The mean over the tokens of the global batch
            count = mask.sum() if num_items is None else torch.as_tensor(num_items, device=total.device)
            loss, token_losses = total / count.clamp(min=1), losses.to(mask.device) * token_weights
            predictions = model.predictions(hidden_states, batch.tau_s, batch.tau_t) if with_logits else {}
        return FLMOutput(loss=loss, **predictions, token_losses=token_losses)

    def compute_loss(
        self, model, inputs: FlowBatch, return_outputs=False, num_items_in_batch=None, with_logits: bool = False
    ):
        """As [`~transformers.Trainer.compute_loss`], for a [`FlowBatch`]. `with_logits` as for `training_objective`."""
        batch = self._with_noise(inputs)
        # In evaluation each process averages over its own tokens, and `evaluation_loop` combines the averages.
        num_items = num_items_in_batch if model.training else None
        output = through_forward(model, self.model, lambda: self.training_objective(batch, num_items, with_logits))
        losses = output.token_losses.detach()
        self._means.add("loss", losses, batch.mask)
        for group, rows in batch.groups.items():
            rows = torch.tensor(rows, dtype=torch.long).to(losses.device, non_blocking=True)
            self._means.add(group, losses[rows], batch.mask[rows])
        loss = output.loss
        if num_items is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP and FSDP average over processes
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if self.groups and "loss" in logs:
            means = self._means.pop(self.accelerator)
            logs.update({f"loss_{group}": mean for group, mean in means.items() if group in self.groups})
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """
        As [`~transformers.Trainer.evaluation_loop`]. The loss is the mean over all tokens, each counted once. (In a dataset
        without a length, several processes may count the last examples twice.)
        """
        if not self.is_in_train:
            check_finite(*self._networks())
        self._eval_step = 0
        self._joint_noise = None  # the weights are the averaged ones
        means_of_training, self._means = self._means, TokenMeans(("loss", *self.groups, "nll"), self.args.device)
        with without_mixed_precision(self.accelerator):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._joint_noise = None
        means, self._means = self._means.pop(self.accelerator), means_of_training
        if "nll" in means:
            nll = means.pop("nll")
            output.metrics[f"{metric_key_prefix}_nll"] = nll
            output.metrics[f"{metric_key_prefix}_perplexity"] = float(np.exp(nll))
        for name, mean in means.items():
            output.metrics[f"{metric_key_prefix}_loss" + f"_{name}" * (name != "loss")] = mean
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As [`~transformers.Trainer.prediction_step`]. An example has the same times and noise in every evaluation."""
        positions = self._positions(inputs, self._eval_step, self.args.eval_batch_size)
        self._eval_step += 1
        labels = inputs["labels"].clone()
        dataset = getattr(self.callback_handler.eval_dataloader, "dataset", None)  # or a plain iterable of batches
        if has_length(dataset):
            # The last batches repeat examples, so that all processes have equal batches: do not count them twice.
            repeated = max(0, positions.stop - max(positions.start, len(dataset)))
            labels[len(positions) - repeated :] = -100
        uniforms = low_discrepancy_uniforms(positions.start, len(positions), self.time_sampler.num_uniforms)
        batch = self._make_batch({**inputs, "labels": labels}, uniforms, positions, (self.args.seed, _EVAL))
        if self.args.eval_likelihood_times > 0:
            self._add_likelihood(model, batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, batch, return_outputs=True, with_logits=not prediction_loss_only)
        if prediction_loss_only:
            return loss, None, None
        ignored = {"loss", *(self.model.config.keys_to_ignore_at_inference if ignore_keys is None else ignore_keys)}
        logits = tuple(value for name, value in output.items() if name not in ignored)
        return loss, logits[0] if len(logits) == 1 else logits, batch.labels

    def _add_likelihood(self, model: nn.Module, batch: FlowBatch):
        """Adds the likelihood bound of evaluation examples to the means. Examples without labels do not count."""
        generators = [torch.Generator().manual_seed(seed) for seed in batch.noise_seeds]
        with self.accelerator.autocast():
            output = through_forward(
                model,
                self.model,
                lambda: self.network.log_likelihood_bound(
                    batch.input_ids,
                    batch.attention_mask,
                    batch.known,
                    num_times=self.args.eval_likelihood_times,
                    batch_size=len(batch),
                    generator=generators,
                ),
            )
        counts = batch.mask.any(dim=1)
        self._means.add("nll", -output.log_likelihood * counts, output.num_tokens * counts)
