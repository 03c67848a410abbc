# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Who writes the texts of an evaluation: flow-based models and causal language models, by one interface."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from accelerate import Accelerator
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_flm import BridgeSamplerConfig, FLMConfig

from ..batches import example_seed
from .arguments import GENERATION, EvaluationArguments
from .report import describe_sampling
from .samples import SAMPLES_STREAM, generate_samples


@dataclass(frozen=True)
class Setting:
    """What the rows of a table differ in; `None` is what the model says itself."""

    num_steps: int | None = None
    sampler: str | None = None
    temperature: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """What was chosen."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def name(self) -> str:
        """For files, such as "4" for four steps, or "bridge_4_t0.9"."""
        parts = [self.sampler, self.num_steps, None if self.temperature is None else f"t{self.temperature:g}"]
        return "_".join(str(part) for part in parts if part is not None)


@dataclass
class Sample:
    """
    A text of a model.

    Args:
        tokens (`list[int]`): Its tokens, with padding.
        num_tokens (`int`): How many there are up to its end.
        num_forward_passes (`int`): How many passes of each network it took.
    """

    tokens: list[int]
    num_tokens: int
    num_forward_passes: int


def is_flow_based(name: str, revision: str = "main") -> bool:
    """Whether the model of this name, or in this folder, is one of this library. Reads its configuration only."""
    return isinstance(AutoConfig.from_pretrained(name, revision=revision), FLMConfig)


def _load(name: str, revision: str, args: EvaluationArguments, device: torch.device, auto_class) -> PreTrainedModel:
    options = {"revision": revision, "dtype": args.dtype}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    return auto_class.from_pretrained(name, **options).to(device).eval()


def _end(tokens: list[int], eos_token_ids: set[int], start: int = 0) -> int:
    """The number of tokens up to the first end token from `start` on, with it."""
    return next((place + 1 for place in range(start, len(tokens)) if tokens[place] in eos_token_ids), len(tokens))


class TextSource:
    """
    Writes texts with the arguments of an evaluation. Subclasses define the attributes below, and the methods.

    - `model`, `tokenizer` and `length`, the number of tokens of a text.
    - `settings`, the rows of the table.
    - `networks`, how many networks take each forward pass.
    - `sampling`, a description of how texts are made.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    length: int
    settings: list[Setting]
    networks: int
    sampling: dict[str, Any]

    def batches(self, indices: range, num_processes: int, process_index: int, batch_size: int) -> Iterator[list[int]]:
        """The numbers of the texts that a process writes, a batch at a time."""
        raise NotImplementedError

    def warm_up(self, setting: Setting):
        """Writes something short, so that what happens once only takes no time later."""
        raise NotImplementedError

    def write(self, setting: Setting, indices: list[int], seed: int) -> list[Sample]:
        """The texts with these numbers, in one batch."""
        raise NotImplementedError

    def cpu(self):
        """Leaves the accelerator to the scorer."""
        self.model.cpu()


class FlowSource(TextSource):
    """A flow-based model, maybe with a worse one as its guide. The text of a number and seed does not depend on its batch."""

    def __init__(self, args: EvaluationArguments, accelerator: Accelerator):
        self.args = args
        self.model = _load(args.model, args.revision, args, accelerator.device, AutoModel)
        self.guidance_model = None
        if args.guidance_model is not None:
            guide = (args.guidance_model, args.guidance_revision)
            self.guidance_model = _load(*guide, args, accelerator.device, AutoModel)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
        self.length = args.length or self.model.generation_config.length or self.model.config.max_position_embeddings
        if args.protocol == "published":
            self.length = args.length = args.max_length = self.model.config.max_position_embeddings
        self.settings = [
            Setting(*values)
            for values in product(args.num_steps, args.samplers or [None], args.temperatures or [None])
        ]
        self.sampling = describe_sampling(args, self.model)
        self._check_temperatures()
        self.warm_up(self.settings[0])  # what cannot be generated shows at once
        networks = [self.model] + ([self.guidance_model] if "guidance_model" in self.sampling else [])
        self.networks = sum(len(network.embeddings) for network in networks)

    def _is_bridge(self, setting: Setting) -> bool:
        return (setting.sampler or self.sampling.get("sampler")) == "bridge"

    def _check_temperatures(self):
        """Refuses temperatures where nothing depends on them."""
        if self.args.temperatures is None or "guidance_model" in self.sampling or "num_rounds" in self.sampling:
            return
        if any(setting.num_steps == 1 and not self._is_bridge(setting) for setting in self.settings):
            raise ValueError(
                "`temperatures` change nothing in one step of the flow map, whose text is the most likely token at every "
                "place: leave 1 out of `num_steps`, or pass `samplers` bridge."
            )

    def _options(self, setting: Setting) -> dict[str, Any]:
        """The arguments of `generate()` but for the steps."""
        options = {name: getattr(self.args, name) for name in (*GENERATION, "batch_size")}
        options["guidance_model"] = self.guidance_model
        if setting.temperature is not None:
            options["temperature"] = setting.temperature
        if setting.sampler == "bridge":
            options |= {"sampler_config": BridgeSamplerConfig(), "gamma": None}
        elif setting.sampler == "flow_map":  # also where the model's own sampler is another
            options["gamma"] = self.sampling.get("gamma", 0.0)
        return {name: value for name, value in options.items() if value is not None}

    def batches(self, indices, num_processes, process_index, batch_size):
        mine = list(indices[process_index::num_processes])
        for start in range(0, len(mine), batch_size):
            yield mine[start : start + batch_size]

    def warm_up(self, setting):
        generate_samples(self.model, [0], 0, num_steps=1, **self._options(setting))

    def write(self, setting, indices, seed):
        options = {**self._options(setting), "num_steps": setting.num_steps, "batch_size": len(indices)}
        if self.args.timestep_grid is not None:
            options["timestep_grid"] = self.args.timestep_grid
        output = generate_samples(self.model, indices, seed, return_dict_in_generate=True, **options)
        ends = set()
        if self.sampling.get("pad_after_eos"):
            eos = self.model.generation_config.eos_token_id
            ends = set(eos if isinstance(eos, list) else [eos])
        columns = (output.sequences.tolist(), output.num_forward_passes.tolist())
        # As in `generate()`, a token that also begins texts does not end them there.
        start = int(self.model.generation_config.bos_token_id in ends)
        return [Sample(tokens, _end(tokens, ends, start), passes) for tokens, passes in zip(*columns)]

    def cpu(self):
        super().cpu()
        if self.guidance_model is not None:
            self.guidance_model.cpu()


class CausalSource(TextSource):
    """
    A causal language model, by its own `generate()`: each token is drawn from what it says of the tokens before it, from its
    BOS token on. Texts have `length` tokens, as those of flow-based models, and go on after an end token as theirs do unless
    `pad_after_eos` says otherwise. They depend on the size of the batches, but not on the number of processes.

    Raises:
        `ValueError`: for arguments of flow-based models, and models that cannot write as many tokens.
    """

    networks = 1

    def __init__(self, args: EvaluationArguments, accelerator: Accelerator, passed: list[str]):
        if passed:
            raise ValueError(f"`model` is a causal language model, which has no `{'`, `'.join(passed)}`: leave out.")
        if args.update_card:
            raise ValueError("`update_card` is for flow-based models: leave it out.")
        self.model = _load(args.model, args.revision, args, accelerator.device, AutoModelForCausalLM)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
        context = getattr(self.model.config, "max_position_embeddings", None) or 1024
        self.length = args.length or context
        if self.length > context:
            raise ValueError(f"`length` is {self.length}, but the model reads {context} tokens.")
        if args.protocol == "published":
            self.length = args.length = args.max_length = context
        self.settings = [Setting(temperature=temperature) for temperature in args.temperatures or [None]]
        own = self.model.generation_config
        candidates = [self.tokenizer.bos_token_id, own.bos_token_id, self.tokenizer.eos_token_id]
        self.start = next((token for token in candidates if token is not None), None)
        eos = self.tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        self.ends = (
            set(eos if isinstance(eos, list) else [] if eos is None else [eos]) if args.pad_after_eos else set()
        )
        if self.start is None:
            raise ValueError("`model` has no BOS token, which texts must begin with.")
        if args.pad_after_eos and not self.ends:
            raise ValueError("`pad_after_eos` needs an `eos_token_id` in the model's generation_config.json.")
        # In the place of the model's own, whose temperature and top-k would be taken where none are passed.
        self.model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=args.temperature or 1.0,
            top_k=args.top_k or 0,
            top_p=args.top_p or 1.0,
            max_new_tokens=self.length,
            bos_token_id=self.start,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=min(self.ends, default=self.start),
        )
        values = {name: getattr(args, name) for name in ("protocol", "temperature", "top_k", "top_p", "pad_after_eos")}
        values |= {"length": self.length, "max_length": args.max_length, "scorer_dtype": args.scorer_dtype}
        values |= {"dtype": str(self.model.dtype).removeprefix("torch."), "tokenizer": args.tokenizer}
        usual = {"dtype": "float32", "pad_after_eos": False}
        self.sampling = {"sampler": "ancestral"}
        self.sampling |= {name: value for name, value in values.items() if value not in (None, usual.get(name))}

    def batches(self, indices, num_processes, process_index, batch_size):
        starts = range(0, len(indices), batch_size)
        for start in starts[process_index::num_processes]:
            yield list(indices[start : start + batch_size])

    def warm_up(self, setting):
        self._generate(1, seed=0, max_new_tokens=1)

    def _generate(self, num_texts: int, seed: int, **options) -> torch.LongTensor:
        """The tokens of a batch, without the BOS token. Leaves the global generator as it was."""
        device = self.model.device
        input_ids = torch.full((num_texts, 1), self.start, device=device)
        forked = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
        with torch.random.fork_rng(**forked):
            torch.manual_seed(seed)
            return self.model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)[:, 1:]

    def write(self, setting, indices, seed):
        options = {} if setting.temperature is None else {"temperature": setting.temperature}
        rows = self._generate(len(indices), example_seed(seed, SAMPLES_STREAM, indices[0]), **options).tolist()
        lengths = [_end(tokens, self.ends) for tokens in rows]
        return [Sample(tokens, length, length) for tokens, length in zip(rows, lengths)]


def load_source(args: EvaluationArguments, accelerator: Accelerator, passed: list[str]) -> TextSource:
    """
    What writes the texts of `args.model`.

    Args:
        args ([`EvaluationArguments`]): The arguments, which [`check_arguments`] has completed.
        accelerator ([`~accelerate.Accelerator`]): Where the model runs.
        passed (`list[str]`): Which arguments of flow-based models the user has passed.
    """
    if is_flow_based(args.model, args.revision):
        return FlowSource(args, accelerator)
    return CausalSource(args, accelerator, passed)
