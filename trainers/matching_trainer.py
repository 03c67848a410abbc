# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Trainer for distribution matching: a flow map whose texts of few steps are distributed like the data's."""

import copy
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modeling_flm import FLMModel, FLMOutput, FMLMModel
from modeling_flm.flow import interpolate
from modeling_flm.joint_noise import JointNoise
from modeling_flm.posterior_flm import Posterior
from modeling_flm.utils_flm import evaluating, use_default_mode

from .batches import FlowBatch, MatchingTimes
from .fmlm_config import FMLMTrainingArguments
from .fmlm_trainer import FMLMTrainer
from .objectives import expected_embedding, posterior_of


# In a checkpoint: the auxiliary denoiser and its optimizer
AUXILIARY_NAME = "auxiliary.safetensors"
AUXILIARY_OPTIMIZER_NAME = "auxiliary_optimizer.pt"


class DistributionMatchingTrainer(FMLMTrainer):
    r"""
    Trains a flow map by distribution matching: its texts, noised to any time, become distributed like the data's. A flow map
    imitates where the flow of its teacher leads; here it may leave the path, and its few steps read much better. It prefers
    common texts, so compare the diversity as well.

    A training step:

    1. Texts \\(p = \delta_{s,1}(x_s)\\) from noise or, for sampling in several steps with `gamma=1`, from noised data.
    2. The texts are noised again, \\(x_u = (1 - u) z + u p\\).
    3. An auxiliary denoiser, a copy of the teacher at the start, learns to predict \\(p\\) from \\(x_u\\). Steps 1 to 3 are
       repeated `auxiliary_updates` times.
    4. The flow map follows the gradient of the Kullback-Leibler divergence of its noised texts from the data's,
       \\(\langle \nabla p,\, D_{\mathrm{aux}}(x_u) - D_{\mathrm{teacher}}(x_u) \rangle\\), divided for each text by the mean of
       \\(|p - D_{\mathrm{teacher}}|\\).

    Denoisers see states through the embedding of the teacher, so the inner product is taken in the space of these states. The
    logged `loss` is this inner product, which does not fall like other losses; `loss_auxiliary` is the cross-entropy of the
    auxiliary denoiser. Checkpoints hold it as well. Distributed training is by DDP.

    Args:
        model ([`FMLMModel`], `PeftModel` or `str`, *optional*):
            The flow map to train: a distilled one, or [`~FMLMModel.from_flm`].
        args ([`FMLMTrainingArguments`], *optional*):
            Training arguments. Defaults to the preset `"distribution_matching"`. Some hundreds of steps are enough.
        teacher ([`FLMModel`] or `str`):
            The trained FLM, or a flow map, whose denoiser stands for the data.
        kwargs:
            Further arguments of [`FLMTrainer`].

    Example:

    ```python
    >>> trainer = DistributionMatchingTrainer(
    ...     model=AutoModel.from_pretrained("path/to/fmlm"),
    ...     teacher=AutoModel.from_pretrained("path/to/flm"),
    ...     args=FMLMTrainingArguments.from_preset("distribution_matching", output_dir="matched", max_steps=1000),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```
    """

    model_classes = (FMLMModel,)
    groups = ("boundary", "off_diagonal", "auxiliary")
    targets = ("distribution_matching",)

    def __init__(self, model=None, args=None, teacher=None, **kwargs):
        if args is None:
            args = FMLMTrainingArguments.from_preset("distribution_matching", output_dir="FMLMModel-trained")
        super().__init__(model=model, args=args, teacher=teacher, **kwargs)
        if self.is_fsdp_enabled or args.fp16:
            raise ValueError(f"`{type(self).__name__}` supports neither FSDP nor `fp16`: use DDP and `bf16`.")
        self._start_auxiliary()

    def _check_model(self, model):
        super()._check_model(model)
        if not isinstance(self.teacher, FLMModel):
            raise ValueError("`teacher` must be an `FLMModel` or an `FMLMModel`, whose denoiser stands for the data.")

    def _start_auxiliary(self):
        """Makes the auxiliary denoiser, a copy of the teacher that reads the same states, and its optimizer."""
        args = self.args
        self.auxiliary = copy.deepcopy(self.teacher).float().requires_grad_(True)
        self.auxiliary.embed_tokens.requires_grad_(False)
        self.auxiliary_optimizer = torch.optim.AdamW(
            [parameter for parameter in self.auxiliary.parameters() if parameter.requires_grad],
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        # The tokens in whitened states of the teacher; `None` if these are as good as one-hot states
        self._coordinates = JointNoise.of_networks(self.teacher).coordinates()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self._start_auxiliary()  # in case of a second training
        if resume_from_checkpoint is not None:
            paths = [Path(resume_from_checkpoint, name) for name in (AUXILIARY_NAME, AUXILIARY_OPTIMIZER_NAME)]
            if missing := [path.name for path in paths if not path.is_file()]:
                raise ValueError(
                    f"`resume_from_checkpoint`: {resume_from_checkpoint} lacks {', '.join(missing)}: it is from another kind of "
                    "training. To start from its model, pass that as `model`."
                )
            self.auxiliary.load_state_dict(load_file(paths[0]))
            state = torch.load(paths[1], map_location=self.args.device, weights_only=True)
            self.auxiliary_optimizer.load_state_dict(state)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            weights = {name: value.contiguous() for name, value in self.auxiliary.state_dict().items()}
            save_file(weights, Path(output_dir, AUXILIARY_NAME), metadata={"format": "pt"})
            torch.save(self.auxiliary_optimizer.state_dict(), Path(output_dir, AUXILIARY_OPTIMIZER_NAME))
            use_default_mode(output_dir)

    # Batches

    @property
    def time_sampler(self) -> MatchingTimes:
        return MatchingTimes(self.args.boundary_probability, self.args.num_start_times)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As [`FLMTrainer.get_batch_samples`], with the updates of the auxiliary denoiser, by the same examples."""
        examples = list(islice(epoch_iterator, num_batches))
        samples = super().get_batch_samples(iter(examples), num_batches, device)
        for update in range(self.args.auxiliary_updates if examples else 0):
            self._update_auxiliary(self._make_batches(examples, self.state.global_step, 1 + update))
        return samples

    def _noise_size(self) -> int:
        return 2 * super()._noise_size()  # to start from, and to noise the texts again

    # Updates

    def _start_state(self, batch: FlowBatch) -> torch.Tensor:
        """Returns the states of the flow map to start from."""
        noise = batch.noise.chunk(2, dim=-1)[0]
        return self.network.make_state(batch.input_ids, batch.tau_s, noise, self._get_joint_noise())

    def _noise_again(self, texts: Posterior, batch: FlowBatch) -> torch.Tensor:
        """Returns the states of noised texts at `batch.tau_u`, for teacher and auxiliary denoiser."""
        teacher, joint_noise = self.teacher, self._get_joint_noise()
        clean = teacher.make_state(batch.input_ids)
        clean = torch.where(batch.known[..., None], clean, expected_embedding(texts, teacher, clean))
        (index,) = joint_noise.indices_of(teacher)
        noise = batch.noise.chunk(2, dim=-1)[1] @ joint_noise.factor(index)
        return interpolate(noise, clean, teacher.time_map.tau_to_t(batch.tau_u))

    def _update_auxiliary(self, batches: list[FlowBatch]):
        """Updates the auxiliary denoiser once, by the cross-entropy to the texts of the flow map."""
        args, auxiliary, optimizer = self.args, self.auxiliary, self.auxiliary_optimizer
        autocast, reduce = self.accelerator.autocast, self.accelerator.reduce
        num_items = reduce(sum(batch.mask.sum() for batch in batches), reduction="sum").clamp(min=1)
        for batch in map(self._with_noise, batches):
            with torch.no_grad(), evaluating(self.network):
                state = self._start_state(batch)
                texts = posterior_of(self.network, state, batch.tau_s, batch.tau_t, batch, autocast)
                state = self._noise_again(texts, batch)
            mask, times = batch.mask.to(state.dtype), (batch.tau_u, batch.tau_u)
            with autocast():
                hidden_states = auxiliary.encode(state, *times, batch.attention_mask)
                total, losses = auxiliary.divergence_loss("cross_entropy", texts, mask, hidden_states, *times)
            (total / num_items).backward()
            self._means.add("auxiliary", losses * mask, batch.mask)
        trained = [parameter for parameter in auxiliary.parameters() if parameter.grad is not None]
        if self.accelerator.num_processes > 1:
            for parameter in trained:
                parameter.grad = reduce(parameter.grad, reduction="sum")
        if args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        peak = args.learning_rate if args.auxiliary_learning_rate is None else args.auxiliary_learning_rate
        schedule = self._get_learning_rate() / args.learning_rate if args.learning_rate > 0 else 1.0
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule
        optimizer.step()
        optimizer.zero_grad()

    def training_objective(
        self, batch: FlowBatch, num_items: torch.Tensor | int | None = None, with_logits: bool = False
    ) -> FLMOutput:
        """As [`FLMTrainer.training_objective`], with the inner product of texts and the difference of the denoisers as the loss."""
        network, teacher, autocast = self.network, self.teacher, self.accelerator.autocast
        times = (batch.tau_s, batch.tau_t)
        # 1. Texts of the flow map
        state = self._start_state(batch)
        with autocast():
            hidden_states = network.encode(state, *times, batch.attention_mask)
        mask = batch.mask.to(hidden_states.device, torch.float32)
        with torch.no_grad():
            texts = network.posterior_of_features(hidden_states.detach(), *times).within(autocast)
            # 2. The texts noised again, and what the data's denoiser and the texts' own say about them
            state = self._noise_again(texts, batch)
            inputs = (state, batch.tau_u, batch.tau_u, batch, autocast)
            data = posterior_of(teacher, *inputs, num_iterations=self.args.teacher_iterations)
            own = posterior_of(self.auxiliary, *inputs)
            # 3. The weight of each text
            (distances,) = texts.combine(data, lambda p, d, chunk: p - d).read(lambda d, chunk: d.abs().sum(dim=-1))
            weights = mask.sum(dim=1) / (mask * distances).sum(dim=1).clamp(min=1e-3)
            gradient = own.combine(data, lambda own, data, chunk: own - data)
            if self._coordinates is not None:
                tokens = self._coordinates
                gradient = gradient.map(lambda difference, chunk: difference @ tokens @ tokens.mT)
        # 4. The inner product, one chunk of positions at a time
        token_weights = mask * weights[:, None]
        with autocast():
            total, losses = network.divergence_loss("inner_product", gradient, token_weights, hidden_states, *times)
            predictions = network.predictions(hidden_states, *times) if with_logits else {}
        count = mask.sum() if num_items is None else torch.as_tensor(num_items, device=total.device)
        return FLMOutput(loss=total / count.clamp(min=1), **predictions, token_losses=losses * token_weights)
