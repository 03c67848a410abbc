"""Losses computed in chunks, against losses of all logits at once; memory and synchronization of a training step."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import build_flm, two_time_denoiser
from tensors import set_chunk
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_tiny import build_packed

from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel, utils_flm
from modeling_flm.joint_noise import JointNoise
from modeling_flm.losses import linear_loss, softcap_logits, softmax_cross_entropy, softmax_divergence
from modeling_flm.posterior_flm import Posterior
from modeling_flm.trainers import PRESETS
from modeling_flm.utils_flm import chunks


VOCAB_SIZE = 200


@pytest.mark.parametrize("num_positions", [1, 7, 20])
@pytest.mark.parametrize("kind", ["labels", "cross_entropy", "kl", "squared_error"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_linear_loss_equals_the_loss_of_all_logits(softcap, kind, num_positions, monkeypatch):
    set_chunk(monkeypatch, num_positions, 3, VOCAB_SIZE)
    head = torch.nn.Linear(16, VOCAB_SIZE)
    torch.nn.init.normal_(head.weight)
    hidden_states, weights = torch.randn(3, 20, 16, requires_grad=True), torch.rand(3, 20, requires_grad=True)
    leaves = [hidden_states, head.weight, head.bias, weights]
    labels = torch.randint(VOCAB_SIZE, (3, 20))
    target = labels if kind == "labels" else torch.randn(3, 20, VOCAB_SIZE).softmax(-1)
    logits = head(hidden_states)
    assert (logits.abs() > 6).any()  # so that a cap of 3 counts
    log_delta = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)
    expected = {
        "labels": lambda: F.nll_loss(log_delta.transpose(1, 2), labels, reduction="none"),
        "cross_entropy": lambda: -(target * log_delta).sum(-1),
        "kl": lambda: F.kl_div(log_delta, target, reduction="none").sum(-1),
        "squared_error": lambda: (log_delta.exp() - target).square().sum(-1),
    }[kind]()

    def function(outputs, chunk, workspace):
        assert outputs.shape[1] <= num_positions
        if kind == "labels":
            return softmax_cross_entropy(outputs, target[:, chunk], softcap, workspace)
        return softmax_divergence(kind, outputs, target[:, chunk], softcap, workspace)

    total, each = linear_loss(function, weights, hidden_states, head.weight, head.bias)
    torch.testing.assert_close(each, expected)
    assert not each.requires_grad
    torch.testing.assert_close(total, (weights * expected).sum())
    references = torch.autograd.grad(3 * (weights * expected).sum(), leaves, retain_graph=True)
    for value, reference in zip(torch.autograd.grad(3 * total, leaves, retain_graph=True), references):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="call `backward` once"):
        total.backward()
    # Frozen weights get no gradient, and nothing gets one under `no_grad`.
    head.requires_grad_(False)
    (gradient,) = torch.autograd.grad(
        linear_loss(function, weights.detach(), hidden_states, head.weight, head.bias)[0], hidden_states
    )
    reference = torch.autograd.grad((weights * expected).sum(), hidden_states)[0]
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not linear_loss(function, weights, hidden_states, head.weight, head.bias)[0].requires_grad


def test_divergences():
    target, logits = torch.randn(5, 7).softmax(-1), torch.randn(5, 7, requires_grad=True)
    log_delta = logits.log_softmax(-1)
    one_hot = F.one_hot(torch.arange(5), 7).float()
    for kind, expected in (
        ("kl", F.kl_div(log_delta, target, reduction="none").sum(-1)),
        ("cross_entropy", F.cross_entropy(logits, target, reduction="none")),
        ("squared_error", F.mse_loss(log_delta.exp(), target, reduction="none").sum(-1)),
    ):
        losses, gradients = softmax_divergence(kind, logits.detach().clone(), target)
        torch.testing.assert_close(losses, expected.detach())
        expected = torch.autograd.grad(expected.sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(gradients, expected)
        losses, gradients = softmax_divergence(kind, logits.detach().clone(), one_hot)
        assert torch.isfinite(losses).all() and torch.isfinite(gradients).all()


def test_products_are_in_the_precision_of_autocast():
    hidden_states, head = torch.randn(3, 20, 16, requires_grad=True), torch.nn.Linear(16, VOCAB_SIZE)
    labels = torch.randint(VOCAB_SIZE, (3, 20))
    seen = []

    def function(outputs, chunk, workspace):
        seen.append(outputs.dtype)
        return softmax_cross_entropy(outputs, labels[:, chunk])

    def run():
        total, each = linear_loss(function, torch.ones(3, 20), hidden_states, head.weight, head.bias)
        return total, each, *torch.autograd.grad(total, (hidden_states, head.weight))

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run()
    assert seen == [torch.float32, torch.bfloat16]
    for value, exact in zip(low, expected):
        assert value.dtype == torch.float32
        assert not torch.equal(value, exact)
        assert (value - exact).norm() < 0.01 * exact.norm()


def test_softcap_in_place():
    logits = torch.randn(2, 3, 5) * 10
    expected = 4 * torch.tanh(logits / 4)
    torch.testing.assert_close(softcap_logits(logits, 4.0), expected)
    assert softcap_logits(logits, None) is logits
    capped = softcap_logits(logits, 4.0, in_place=True)
    assert capped.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(capped, expected)


@pytest.mark.parametrize("divergence", ["labels", "cross_entropy", "kl", "squared_error"])
@pytest.mark.parametrize("model_class", [FLMModel, FMLMModel, FMLMTwoNetworkModel])
def test_divergence_to_tokens(model_class, divergence, monkeypatch):
    """Clean tokens as labels, and as one-hot targets of each divergence."""
    if model_class is FMLMTwoNetworkModel and divergence in ("cross_entropy", "kl"):
        pytest.skip("not a softmax")
    set_chunk(monkeypatch, 5, 3, 53)
    flm = build_flm(final_logit_softcapping=1.0, dropout=0.0)
    model = flm if model_class is FLMModel else model_class.from_flm(flm)
    if model_class is FMLMTwoNetworkModel:
        torch.nn.init.normal_(model.correction.lm_head.weight, std=0.01)
    model.train()
    input_ids, tau = torch.randint(53, (3, 12)), torch.tensor([0.1, 0.5, 0.7])
    times = {"timesteps": tau} | ({} if model_class is FLMModel else {"target_timesteps": torch.ones(3)})
    labels = input_ids.masked_fill(torch.rand(3, 12) < 0.2, -100)
    delta = two_time_denoiser(model(input_ids, **times))
    if divergence == "squared_error":
        losses = (delta - F.one_hot(input_ids, 53)).square().sum(-1)
    else:
        positive = delta.clamp(min=torch.finfo(torch.float32).tiny)
        distribution = positive / positive.sum(dim=-1, keepdim=True)
        losses = -distribution.gather(-1, input_ids[..., None])[..., 0].log()
    expected = losses[labels != -100].mean()
    parameter = model.correction.lm_head.bias if model_class is FMLMTwoNetworkModel else model.lm_head.bias
    (reference,) = torch.autograd.grad(expected, parameter)
    mask, taus = (labels != -100).float(), times.values()
    hidden_states = model.encode(model.make_state(input_ids), *taus)
    inputs = (mask, hidden_states, *taus)
    if divergence == "labels":
        total, _ = model.cross_entropy_loss(labels, *inputs)
    else:
        target = Posterior.of_tokens(input_ids, 53, model.chunks(hidden_states))
        total, _ = model.divergence_loss(divergence, target, *inputs)
    loss = total / mask.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, parameter)[0], reference, rtol=1e-3, atol=1e-5)


def test_chunks_cover_all_positions_within_the_budget(monkeypatch):
    monkeypatch.setitem(utils_flm.CHUNK_ELEMENTS, "cpu", 1000)
    for batch_size, length, vocab_size in ((1, 10, 100), (3, 17, 50), (5, 4, 2000), (2, 1000, 2)):
        pieces = chunks(batch_size, length, vocab_size, torch.device("cpu"))
        assert [n for chunk in pieces for n in range(chunk.start, chunk.stop)] == list(range(length))
        widths = [chunk.stop - chunk.start for chunk in pieces]
        assert max(widths) == 1 or max(widths) * batch_size * vocab_size <= 1000
        assert len(pieces) <= math.ceil(length / max(1, 1000 // (batch_size * vocab_size)))


def test_two_networks_against_labels(monkeypatch):
    flm = build_flm()
    model = FMLMTwoNetworkModel.from_flm(flm, dropout=0.0).train()
    torch.nn.init.normal_(model.correction.lm_head.weight)
    input_ids = torch.randint(53, (3, 12))
    batch = {"timesteps": torch.tensor([0.1, 0.5, 0.7]), "target_timesteps": torch.tensor([0.1, 0.9, 1.0])}
    batch["inputs_embeds"] = model.make_state(input_ids).detach()
    delta = model(**batch).probabilities
    positive = delta.clamp(min=torch.finfo(torch.float32).tiny)
    expected = -(positive / positive.sum(dim=-1, keepdim=True)).gather(-1, input_ids[..., None]).log().mean()
    expected.backward()
    gradient = model.correction.lm_head.weight.grad.clone()
    model.zero_grad()
    set_chunk(monkeypatch, 5, 3, 53)
    output = model(**batch, labels=input_ids)
    assert output.logits is None and output.probabilities is None
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model.correction.lm_head.weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_no_logits_with_labels_in_training(flm):
    batch = {"inputs_embeds": torch.randn(3, 12, 32), "timesteps": torch.rand(3)}
    labels = torch.randint(53, (3, 12))
    assert flm(**batch, labels=labels).logits is not None
    flm.train()
    assert flm(**batch).logits is not None
    assert flm(**batch, labels=labels).logits is None
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        flm(**batch, labels=torch.full((3, 12), -1))


def test_offloaded_weights(flm, tmp_path):
    input_ids, tau, noise = torch.randint(53, (3, 12)), torch.rand(3), torch.randn(3, 12, 32)

    def loss(model):
        return model(inputs_embeds=model.make_state(input_ids, tau, noise), timesteps=tau, labels=input_ids).loss

    expected = loss(flm)
    flm.save_pretrained(tmp_path)
    model = type(flm).from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert model.lm_head.weight.is_meta
    torch.testing.assert_close(loss(model), expected)


class Watch(TorchDispatchMode):
    """Records the size of the largest tensor, and operations for which the host waits for a device."""

    waiting = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.largest, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function._overloadpacket.__name__
        if name in self.waiting:
            self.waits.append(name)
        for leaf in [] if function.is_view else tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return output


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_training_step_holds_one_chunk_of_probabilities_and_does_not_synchronize(preset, tmp_path, monkeypatch):
    set_chunk(monkeypatch, 1, 8, VOCAB_SIZE)
    trainer = build_packed(tmp_path, preset, VOCAB_SIZE)
    trainer.create_optimizer_and_scheduler(1)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.model.train()
    trainer.model.time_map.tau_to_t(torch.zeros(1))  # makes the table, once
    with Watch() as watch:
        trainer.training_step(trainer.model, batches[0], count)
    # Eight texts of one position; all twelve of them would be too many, and so would the embeddings of four networks.
    assert 8 * VOCAB_SIZE <= watch.largest < min(8 * 12, 4 * 16) * VOCAB_SIZE
    assert watch.waits == []


def test_generate_holds_one_chunk_of_probabilities_and_steps_do_not_synchronize(monkeypatch):
    set_chunk(monkeypatch, 1, 8, VOCAB_SIZE)
    model = build_flm(vocab_size=VOCAB_SIZE, hidden_size=16, attn_logit_softcapping=None)
    model.generate(num_samples=8, num_steps=3)
    waits = []
    for num_steps in (1, 5):
        with Watch() as watch:
            model.generate(num_samples=8, num_steps=num_steps)
        assert watch.largest <= 8 * 12 * 64 < 8 * 12 * VOCAB_SIZE
        waits.append(watch.waits)
    # One check that the cached noise factor fits the embedding, and one that outputs are finite, for any number of steps
    assert waits[0] == waits[1] == ["equal", "_local_scalar_dense"]


def test_second_derivatives_are_refused(flm):
    flm.train()
    state = torch.randn(3, 12, 32)
    loss = flm(inputs_embeds=state, timesteps=torch.rand(3), labels=torch.randint(53, (3, 12))).loss
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, flm.lm_head.weight, create_graph=True)


def test_small_gradients_survive_float16():
    hidden_states = torch.randn(2, 4, 16)
    head = torch.nn.Linear(16, 50_000)
    target = torch.randn(2, 4, 50_000).softmax(-1)

    def gradient():
        def function(outputs, chunk, workspace):
            return softmax_divergence("squared_error", outputs, target[:, chunk])

        total, _ = linear_loss(function, torch.ones(2, 4), hidden_states, head.weight, head.bias)
        return torch.autograd.grad(total, head.bias)[0]

    expected = gradient()
    with torch.autocast("cpu", dtype=torch.float16):
        torch.testing.assert_close(gradient(), expected)


@pytest.mark.parametrize("preset", [None, "single_stage"])
def test_joint_noise_is_made_once_per_optimizer_step(preset, tmp_path, monkeypatch):
    made = []
    init = JointNoise.__init__
    monkeypatch.setattr(
        JointNoise, "__init__", lambda self, *args, **kwargs: made.append(len(args)) or init(self, *args, **kwargs)
    )
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = build_packed(tmp_path, preset, VOCAB_SIZE, **options, logging_steps=1)
    trainer.train()
    assert made == [1 if preset is None else 2] * 3
    trainer.evaluate(trainer.train_dataset)
    assert len(made) == 4


def test_cached_noise_factor_follows_the_embedding():
    model = build_flm(vocab_size=VOCAB_SIZE, hidden_size=16)
    model.generate()
    first = model._noise_factor[1]
    model.generate()
    assert model._noise_factor[1] is first
    model.embed_tokens.weight.data.mul_(2)  # which no version counter sees
    model.generate()
    torch.testing.assert_close(model._noise_factor[1], 2 * first)
    model.embed_tokens.weight.data[3, 3] = torch.inf
    with pytest.raises(ValueError, match="values that are not finite"):
        model.generate()
