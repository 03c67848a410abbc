"""Models, trainers and samplers on a CUDA device."""

import pytest
import torch
from small_models import build_flm
from train_tiny import build, build_packed
from transformers import CompileConfig

from modeling_flm import BridgeSampler, FlowMapSampler, FMLMModel, StochasticFlowMapSampler
from modeling_flm.losses import linear_loss, softmax_cross_entropy


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_logits(dtype, tolerance):
    model = FMLMModel.from_flm(build_flm()).eval()
    batch = [torch.randint(53, (3, 12)), torch.tensor([0.1, 0.5, 0.7]), torch.tensor([0.1, 0.9, 1.0])]
    expected = model(*batch).logits
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        logits = model.cuda()(*(tensor.cuda() for tensor in batch)).logits
    assert logits.dtype == torch.float32
    assert (logits.cpu() - expected).abs().max() < tolerance * expected.abs().max()


def test_a_cpu_generator_gives_the_same_noise():
    model = build_flm()
    expected = model.generate(num_samples=8, num_steps=4, generator=torch.Generator().manual_seed(0))
    tokens = model.cuda().generate(num_samples=8, num_steps=4, generator=torch.Generator().manual_seed(0))
    assert tokens.is_cuda
    assert (tokens.cpu() == expected).float().mean() > 0.99  # except for near ties


def test_prompt_mask_gamma_guidance_scale_and_reward_give_the_texts_of_the_cpu():
    model, weak = build_flm(), build_flm(hidden_size=16)
    input_ids, prompt_mask = torch.randint(53, (8, 12)), torch.rand(8, 12) < 0.5
    options = {"prompt_mask": prompt_mask, "gamma": 0.3, "guidance_scale": 2.0, "num_steps": 4}
    options |= {"reward": lambda delta: delta[..., 3].sum(dim=-1), "reward_scale": 1.0}
    texts = [
        network.generate(input_ids, guidance_model=weak, generator=torch.Generator().manual_seed(0), **options).cpu()
        for network in (model, model.cuda())  # the guide stays where it is
    ]
    assert (texts[0] == texts[1]).float().mean() > 0.99
    assert torch.equal(texts[1][prompt_mask], input_ids[prompt_mask])


def test_trains(tmp_path):
    trainer = build(tmp_path, max_steps=20, use_cpu=False, bf16=True)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


@pytest.fixture
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("preset", [None, "single_stage", "two_network", "second_stage"])
@pytest.mark.parametrize("bf16", [False, True])
def test_no_training_step_waits(preset, bf16, tmp_path, request):
    trainer = build_packed(tmp_path, preset, use_cpu=False, bf16=bf16)
    batches = iter(trainer.get_train_dataloader())
    model = trainer.accelerator.prepare_model(trainer.model).train()
    for step in range(3):
        (batch,), count = trainer.get_batch_samples(batches, 1, trainer.args.device)
        if step == 2:
            request.getfixturevalue("waiting_is_an_error")
        trainer.training_step(model, batch, count)


@pytest.mark.parametrize("sampler", [FlowMapSampler(), StochasticFlowMapSampler(0.5), BridgeSampler()])
def test_no_step_of_the_sampler_waits(sampler, request):
    model = build_flm(attn_logit_softcapping=None).cuda()
    state = torch.randn(4, 12, 32, device="cuda")
    times = (torch.full((4,), tau, device="cuda") for tau in (0.2, 0.6, 0.2, 0.6))
    drawn = {"uniforms": torch.rand(4, 12, device="cuda"), "noise": torch.randn_like(state)}
    inputs = (model, sampler, state, tuple(times), model.state_embedding.float(), None, [])
    step = lambda: model._step(*inputs, **drawn, is_last=False, with_tokens=True)  # noqa: E731
    with torch.no_grad():
        step()
        request.getfixturevalue("waiting_is_an_error")
        step()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_sampling(mode):
    model = build_flm(attn_logit_softcapping=None).cuda()
    prior = torch.randn(8, 12, model.state_embedding.shape[1])
    for num_steps in (1, 4):
        expected = model.generate(prior_state=prior, num_steps=num_steps)
        config = CompileConfig(fullgraph=True, mode=mode)
        for _ in range(4):  # CUDA graphs are recorded, then replayed
            tokens = model.generate(prior_state=prior, num_steps=num_steps, compile_config=config)
            assert (tokens == expected).float().mean() > 0.99


def test_head_loss_takes_the_memory_of_a_chunk():
    hidden_states = torch.randn(16, 1024, 64, device="cuda", requires_grad=True)
    head = torch.nn.Linear(64, 50258, device="cuda")
    labels = torch.randint(50258, (16, 1024), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = linear_loss(
        lambda outputs, chunk, workspace: softmax_cross_entropy(outputs, labels[:, chunk]),
        torch.ones(16, 1024, device="cuda"), hidden_states, head.weight, head.bias,
    )  # fmt: skip
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * 1024 * 50258 * 4 / 2  # half of the logits in float32
