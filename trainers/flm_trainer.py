# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Trainer of flow-based language models."""

import json
import shutil
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import HubStrategy, has_length
from transformers.utils import PushInProgress, logging

from modeling_flm import FLMModel, FLMOutput, FMLMModel
from modeling_flm.hub.publish import assemble, publish
from modeling_flm.hub.records import TRAINING_NAME
from modeling_flm.joint_noise import JointNoise, noise_size
from modeling_flm.posterior_flm import Posterior

from .adapters import network_of
from .averaging import AveragedTrainer, EMACallback
from .batches import (
    FlowBatch,
    TimePairs,
    UniformTimes,
    low_discrepancy_uniforms,
    make_flow_batch,
    stratified_uniforms,
)
from .callbacks import GenPPLCallback, SampleCallback
from .data import DataCollatorForFLM, begins_with_bos_token, check_dataset, check_length
from .distributed import (
    check_support,
    is_sharded,
    region_options,
    restore_class_name,
    through_forward,
    without_mixed_precision,
)
from .flm_config import FLMTrainingArguments
from .metrics import TokenMeans
from .pushing import push_checkpoint, repo_id, training_record


logger = logging.get_logger(__name__)

# What a dataset has of an example.
_COLUMNS = ("input_ids", "attention_mask", "labels")

# Streams of random numbers that must not meet.
_TRAIN, _EVAL = 0, 1


def _per_token(values: torch.Tensor) -> torch.Tensor:
    """Values of texts, or of tokens, so that they broadcast over tokens."""
    return values[:, None] if values.dim() == 1 else values


class FLMTrainer(AveragedTrainer):
    r"""
    Trains a flow-based language model by flow matching: tokens are noised along the interpolant at a random time, and the
    cross-entropy of the denoiser to the clean tokens is minimized (paper, denoiser objective).

    - Times are uniform in the reparameterized time, and stratified over the global batch.
    - The evaluation loss uses the same times and noise at every evaluation.
    - Evaluation, samples, `save_model` and `push_to_hub` use the moving average of the weights (`args.ema_decay`);
      `trainer.model` has the weights of the training. A checkpoint holds the averaged weights in `model.safetensors` and
      those of the training in `training_weights.safetensors`.

    Args:
        model ([`~transformers.PreTrainedModel`], `PeftModel` or `str`, *optional*):
            An [`FLMModel`], also within a `PeftModel` or with an adapter of `model.add_adapter`, or the name or path of one.
            Of a model with adapters these alone are trained, averaged and saved. Needed but with a `model_init`, which makes
            one at every training.
        args ([`FLMTrainingArguments`], *optional*):
            Arguments of the training.
        data_collator (`Callable`, *optional*):
            Makes batches with `input_ids`, `labels` and, where there is padding, `attention_mask`. By
            default a [`DataCollatorForFLM`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Examples with `input_ids`, for example from [`pack_dataset`].
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Examples to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. It is saved with the model and decodes samples.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks. They run after those of this trainer.
        kwargs:
            Further arguments of [`~transformers.Trainer`]. (`compute_metrics` gets logits of all tokens at random times, which take
            much memory and say little; `eval_likelihood_times` and `eval_gen_ppl_steps` are for figures that do.)

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
    divergence = "cross_entropy"
    groups: tuple[str, ...] = ()  # groups of examples, whose losses are logged separately
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
            model = AutoModel.from_pretrained(model, dtype=torch.float32)
        if model is None and kwargs.get("model_init") is None:
            raise ValueError("Pass a `model`, or as `model_init` a function that makes one.")
        if args is None:
            name = self.model_classes[0].__name__ if model is None else type(network_of(model)).__name__
            args = FLMTrainingArguments(output_dir=f"{name}-trained")
        if not isinstance(args, FLMTrainingArguments):
            raise TypeError(f"`args` must be `FLMTrainingArguments`, got `{type(args).__name__}`.")
        for name in ("sample_steps", "eval_gen_ppl_steps"):
            if getattr(args, name) > 0 and processing_class is None:
                raise ValueError(f"`{name}` needs a tokenizer to decode samples with: pass `processing_class`.")
        ignored = {
            "label_smoothing_factor": args.label_smoothing_factor,
            "neftune_noise_alpha": args.neftune_noise_alpha,
            "compute_loss_func": kwargs.get("compute_loss_func"),
        }
        for name, value in ignored.items():
            if value:
                raise ValueError(
                    f"`{name}` has no effect on `{type(self).__name__}`, whose loss is its own: leave it out."
                )
        if args.n_gpu > 1:
            raise ValueError(
                f"`{type(self).__name__}` needs a process for each device: start the script with `accelerate launch`."
            )
        # `Trainer` sets these, too, but `_check_model` looks at them before.
        self.args, self.processing_class = args, processing_class
        # Regions in the place of the wrapped model: targets and samples do not go through its `forward`.
        self._compile_options = region_options(args.torch_compile_backend, args.torch_compile_mode)
        if model is not None:  # otherwise `call_model_init` makes and checks it
            self._check_model(model)
        # Before those of the user, which see the new average of the weights, and the figures of samples in an evaluation.
        own_callbacks: list[TrainerCallback] = []
        ema = None if args.ema_decay is None else EMACallback(args.ema_decay)
        if ema is not None:
            logger.warning_once(
                f"Evaluation, samples, and saved and pushed models use the moving average of the weights "
                f"(ema_decay={args.ema_decay}). Checkpoints keep the weights of the training beside it."
            )
        if args.sample_steps > 0:
            own_callbacks.append(SampleCallback(processing_class, ema))
        if args.eval_gen_ppl_steps > 0:
            own_callbacks.append(GenPPLCallback(processing_class, self.log, ema))

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
        if getattr(data_collator, "mlm", False):
            raise ValueError(
                "`data_collator` masks tokens, as masked language models learn them: leave it out, or pass `mlm=False`. The noise of "
                "a flow is in its states, and not in its tokens."
            )
        if data_collator is None:
            config = self.model.config
            self.data_collator = DataCollatorForFLM(config.pad_token_id, config.vocab_size)
        if data_collator is None or args.remove_unused_columns:  # then examples are `input_ids`
            self._check_datasets()
        check_support(type(self).__name__, self.accelerator, self.is_deepspeed_enabled, self.is_fsdp_enabled)
        self._signature_columns = list(_COLUMNS)  # all else of an example is made here, whatever columns a dataset has
        self.model_accepts_loss_kwargs = True  # the loss is divided by the number of tokens in the global batch
        self._joint_noise: JointNoise | None = None
        self._frozen_gram: torch.Tensor | None = None  # what of the noise does not change
        self._means = self._new_means()
        if model is not None:
            self._compile_regions(network_of(model))

    @property
    def network(self) -> PreTrainedModel:
        """The flow-based language model itself, which `self.model` is or wraps."""
        return network_of(self.model)

    def _check_model(self, model: PreTrainedModel | nn.Module):
        """Raises an error where a model, or what it wraps, does not go with this trainer and its arguments."""
        network = network_of(model)
        if isinstance(network, FMLMModel) and FMLMModel not in self.model_classes:
            raise TypeError(f"`model` is a flow map, `{type(network).__name__}`: train it with `FMLMTrainer`.")
        if not isinstance(network, self.model_classes):
            names = " or ".join(f"`{model_class.__name__}`" for model_class in self.model_classes)
            raise TypeError(f"`model` must be a {names} for `{type(self).__name__}`, got `{type(network).__name__}`.")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "`model` has no weights to train. Those of a teacher were frozen for its student: "
                "`model.requires_grad_(True)`. Adapters are to be loaded with `is_trainable=True`."
            )
        if self.processing_class is not None and len(self.processing_class) > model.config.vocab_size:
            raise ValueError(
                f"`processing_class` has {len(self.processing_class)} tokens, but the model's `vocab_size` is "
                f"{model.config.vocab_size}. Build the model with `vocab_size=len(tokenizer)`."
            )
        if self.args.ema_decay is not None and any(
            p.requires_grad and p.dtype != torch.float32 for p in model.parameters()
        ):
            raise ValueError(
                f"`model` has weights in {model.dtype}, in which small steps of their moving average round away: load it "
                "with `dtype=torch.float32`, and pass `bf16=True` to train in mixed precision."
            )

    def _check_datasets(self):
        """Raises a `ValueError` where a dataset does not go with the model."""
        if self.train_dataset is not None:
            check_dataset("train_dataset", self.train_dataset, self.model.config)
        is_several = isinstance(self.eval_dataset, dict)
        for name, dataset in self.eval_dataset.items() if is_several else [(None, self.eval_dataset)]:
            if dataset is not None:
                check_dataset(f"eval_dataset[{name!r}]" if is_several else "eval_dataset", dataset, self.model.config)

    def call_model_init(self, trial=None):
        """As [`~transformers.Trainer.call_model_init`]; the model is checked, and compiled if `args` say so."""
        model = super().call_model_init(trial)
        self._check_model(model)
        self._compile_regions(network_of(model))
        return model

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        if self.ema is not None:
            self.ema.decay = self.args.ema_decay

    def _compile_regions(self, network: PreTrainedModel):
        if self._compile_options is not None:
            network.compile_regions(**self._compile_options)

    def _prepare_for_training(self, *args, **kwargs):
        self._decide_bos_token()  # `Trainer.train` has just made the special tokens of the tokenizer those of the model
        with without_mixed_precision(self.accelerator):
            return super()._prepare_for_training(*args, **kwargs)

    def _decide_bos_token(self):
        """Prompts begin with the BOS token if texts do. The first process looks at some, and all do what it says."""
        config = self.network.generation_config
        if config.bos_token_id is None:
            return
        is_kept = None
        if self.is_world_process_zero():
            collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
            is_kept = begins_with_bos_token(self.train_dataset, collate, config.bos_token_id)
        (is_kept,) = broadcast_object_list([is_kept])
        if not is_kept:
            config.bos_token_id = None

    # Batches

    @property
    def time_sampler(self) -> UniformTimes | TimePairs:
        """Draws the times of examples, see [`make_flow_batch`]."""
        return UniformTimes()

    def _positions(self, examples: dict[str, Any], index: int, batch_size: int) -> range:
        """Positions in the global batch of the examples of this process's batch number `index`."""
        first = (index * self.accelerator.num_processes + self.accelerator.process_index) * batch_size
        return range(first, first + len(examples["input_ids"]))

    def _make_batch(
        self, examples: dict[str, torch.Tensor], uniforms: torch.Tensor, positions: range, key: tuple[int, ...]
    ) -> FlowBatch:
        """Makes a batch of what the data collator made, with the prompts of `args`."""
        check_length("Texts of the dataset", examples["input_ids"].shape[1], self.model.config)
        prompts = {
            name: getattr(self.args, name) for name in ("prompt_fraction", "prompt_kinds", "prompts_from_labels")
        }
        max_length = self.network.config.max_position_embeddings
        return make_flow_batch(
            examples, uniforms, positions, key, self.time_sampler, max_length, **prompts, device=self.args.device
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Returns the batches of the next optimizer step, and the number of tokens that the loss counts in all of them."""
        self._joint_noise = None  # the weights have changed
        examples = list(islice(epoch_iterator, num_batches))
        batch_size = self._train_batch_size
        key = (self.args.seed, _TRAIN, self.state.global_step)
        num_examples = len(examples) * self.accelerator.num_processes * batch_size
        uniforms = stratified_uniforms(num_examples, self.time_sampler.num_uniforms, *key)
        batches = []
        for index, each in enumerate(examples):
            positions = self._positions(each, index, batch_size)
            batches.append(self._make_batch(each, uniforms[positions.start : positions.stop], positions, key))
        return super().get_batch_samples(iter(batches), len(batches), device)  # which counts

    def _with_noise(self, batch: FlowBatch) -> FlowBatch:
        """Draws the noise of a batch that has none: only now, so that no two batches hold theirs at once."""
        if batch.noise is not None:
            return batch
        weights = [embedding.weight for network in self._networks() for embedding in network.embeddings]
        return batch.with_noise(noise_size(*weights), self.network.config.max_position_embeddings)

    # The objective

    def _networks(self) -> list[PreTrainedModel]:
        """The networks that see a batch, the model first."""
        return [self.network]

    def _get_joint_noise(self) -> JointNoise:
        """The noise of all networks, made once for each optimizer step, or for each batch where weights are sharded."""
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
        What the model is to say of a batch, held constant.

        Args:
            batch ([`FlowBatch`]): The examples, with noise.
            joint_noise ([`~modeling_flm.joint_noise.JointNoise`]): The noise of all networks.

        Returns:
            `tuple[torch.LongTensor or Posterior, torch.Tensor]`: tokens or distributions, and what the loss is multiplied by,
            of the shape of `batch.tau_s`.
        """
        return batch.labels, torch.ones_like(batch.tau_s)

    def training_objective(
        self, batch: FlowBatch, num_items: torch.Tensor | int | None = None, with_logits: bool = False
    ) -> FLMOutput:
        r"""
        The loss of a batch, for every objective of the papers: a two-time denoiser, a target and a divergence. Runs within the
        wrapper's `forward`, so that DDP and FSDP2 see one forward pass.

        Args:
            batch ([`FlowBatch`]): The examples, with noise.
            num_items (`torch.Tensor` or `int`, *optional*):
                What to divide the summed loss by, where a batch is one of several. By default its number of tokens that are
                not known.
            with_logits (`bool`, *optional*, defaults to `False`): Whether the outputs of the head are wanted.

        Returns:
            [`FLMOutput`] with `loss` and `token_losses`.
        """
        model = self.network
        # 1. All networks see the same noise, each through its own embedding
        joint_noise = self._get_joint_noise()
        # 2. What there is to learn: the data, or what networks say of the same noised texts
        with torch.no_grad():
            target, weights = self.compute_targets(batch, joint_noise)
        # 3. What the model sees, and makes of it
        state = model.make_state(batch.input_ids, batch.tau_s, batch.noise, joint_noise)
        with self.accelerator.autocast():
            hidden_states = model.encode(state, batch.tau_s, batch.tau_t, batch.attention_mask)
            # 4. What each token counts: nothing if it is known; otherwise its weight, and in training a learned one
            mask = batch.mask.to(hidden_states.device, torch.float32)
            token_weights = mask * _per_token(weights)
            log_weight = model.log_loss_weight(batch.tau_s) if model.training else None
            learned = 1.0 if log_weight is None else torch.exp(-_per_token(log_weight))
            # 5. The divergence of target and model, a chunk of tokens at a time
            total, losses = model.loss(
                self.divergence, target, learned * token_weights, hidden_states, batch.tau_s, batch.tau_t
            )
            if log_weight is not None:
                total = total + (mask * _per_token(log_weight)).sum()
            # 6. Its mean over the tokens of the global batch
            count = mask.sum() if num_items is None else torch.as_tensor(num_items, device=total.device)
            output = FLMOutput(loss=total / count.clamp(min=1), token_losses=losses.to(mask.device) * token_weights)
            if with_logits:
                for name, value in model.head_outputs(hidden_states, batch.tau_s, batch.tau_t).items():
                    output[name] = value
        return output

    def compute_loss(
        self, model, inputs: FlowBatch, return_outputs=False, num_items_in_batch=None, with_logits: bool = False
    ):
        """
        As [`~transformers.Trainer.compute_loss`], for a [`FlowBatch`]; `with_logits` as for `training_objective`.
        """
        batch = self._with_noise(inputs)
        # In evaluation each process averages over its own tokens, and `evaluation_loop` puts the averages together.
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

    def _new_means(self) -> TokenMeans:
        return TokenMeans(("loss", *self.groups), self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if self.groups and "loss" in logs:
            means = self._means.pop(self.accelerator)
            logs.update({f"loss_{group}": mean for group, mean in means.items() if group in self.groups})
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """
        As [`~transformers.Trainer.evaluation_loop`], with the loss averaged over all tokens, each counted once (but for
        datasets without a length, of which several processes may see the last examples twice).
        """
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
        """As [`~transformers.Trainer.prediction_step`], at the times and with the noise that examples have in every evaluation."""
        positions = self._positions(inputs, self._eval_step, self.args.eval_batch_size)
        self._eval_step += 1
        labels = inputs["labels"].clone()
        dataset = self.callback_handler.eval_dataloader.dataset
        if has_length(dataset):
            # So that all processes have equal batches, the last ones are filled up with examples seen before.
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
        """Adds the bound on the likelihood of evaluation texts to the means; texts without labels do not count."""
        known = batch.tau_s == 1 if batch.tau_s.dim() == 2 else torch.zeros_like(batch.mask)
        generators = [torch.Generator().manual_seed(seed) for seed in batch.noise_seeds]
        with self.accelerator.autocast():
            output = through_forward(
                model,
                self.model,
                lambda: self.network.log_likelihood_bound(
                    batch.input_ids,
                    batch.attention_mask,
                    known,
                    num_times=self.args.eval_likelihood_times,
                    batch_size=len(known),
                    generator=generators,
                ),
            )
        counts = batch.mask.any(dim=1)
        self._means.add("nll", -output.log_likelihood * counts, output.num_tokens * counts)

    def _save(self, output_dir: str | None = None, state_dict=None):
        restore_class_name(self.model)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            path = Path(output_dir or self.args.output_dir, TRAINING_NAME)
            path.write_text(json.dumps(self._training_record(), indent=2) + "\n", encoding="utf-8")

    def _training_record(self) -> dict[str, Any]:
        """What a model card tells of the training."""
        return training_record(type(self).__name__, self.args, self.state.global_step, self.train_dataset)

    def create_model_card(self, model_name: str | None = None, **kwargs):
        """
        Saves the model, and writes its card to `README.md` beside it.

        Args:
            model_name (`str`, *optional*): The name of the repository. By default the one that `push_to_hub` takes.
            kwargs: The metadata of the card, see [`~modeling_flm.hub.card.build_card`].
        """
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            with tempfile.TemporaryDirectory() as folder:
                assemble(self.args.output_dir, Path(folder, "repository"), model_name or repo_id(self.args), **kwargs)
                shutil.copy(Path(folder, "repository", "README.md"), self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Saves the model and publishes it as [`~modeling_flm.hub.publish.publish`] does, with `args.hub_model_id`, `args.hub_token`,
        `args.hub_revision` and `args.hub_private_repo`, unless they are given here.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): The first line of the commit message.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait until it is published.
            token (`str`, *optional*): A token with the right to write.
            revision (`str`, *optional*): The branch to commit to.
            private (`bool`, *optional*): Whether a repository that is created is private.
            kwargs: The metadata of the card, see [`~modeling_flm.hub.card.build_card`].

        Returns:
            [`~huggingface_hub.CommitInfo`], or if not `blocking` a `Future` of it; nothing but on the first process.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return publish(
            self.args.output_dir,
            repo_id(self.args),
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision if revision is None else revision,
            token=token or self.args.hub_token,
            commit_message=commit_message,
            blocking=blocking,
            **kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str):
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_pushing and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        jobs = push_checkpoint(checkpoint_folder, self.args, self.hub_model_id, self.state.global_step)
        if jobs and is_pushing:
            self.push_in_progress.jobs.extend(jobs)
        elif jobs:
            self.push_in_progress = PushInProgress(jobs)
