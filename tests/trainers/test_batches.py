"""Training batches: times, noise and known tokens."""

import doctest

import pytest
import torch

from modeling_flm.trainers import DataCollatorForFLM
from modeling_flm.trainers.batches import (
    TimePairs,
    draw_known_masks,
    draw_noise,
    example_seed,
    low_discrepancy_uniforms,
    make_flow_batch,
    stratified_uniforms,
)


class TestNoise:
    def test_stratified_uniforms_have_one_point_per_stratum(self):
        points = stratified_uniforms(1000, 3, 3, 0, 7)
        for times in points.T:
            assert torch.equal((times.sort().values * 1000).floor().long(), torch.arange(1000))
            assert not torch.equal(times, times.sort().values)
        assert torch.corrcoef(points.T).triu(1).abs().max() < 5 / 1000**0.5
        assert torch.equal(points, stratified_uniforms(1000, 3, 3, 0, 7))
        assert not torch.equal(points, stratified_uniforms(1000, 3, 3, 0, 8))

    def test_stratified_uniforms_are_uniform_within_strata(self):
        times = torch.stack([stratified_uniforms(4, 1, 0, step)[:, 0] for step in range(5000)])
        inside = (times * 4) % 1
        assert abs(inside.mean() - 0.5) < 5 * (1 / 12 / inside.numel()) ** 0.5
        assert abs(times[:, 0].mean() - 0.5) < 5 * (1 / 12 / 5000) ** 0.5  # each position, over all strata

    def test_low_discrepancy_uniforms_are_even_in_every_part(self):
        times = low_discrepancy_uniforms(0, 1000, 1)[:, 0]
        assert torch.equal(low_discrepancy_uniforms(400, 100, 1)[:, 0], times[400:500])
        for part in (times[:50], times[313:363], times):
            gaps = part.sort().values.diff()
            assert gaps.max() < 3 / len(part)

    def test_low_discrepancy_uniforms_fill_the_square(self):
        points = low_discrepancy_uniforms(0, 400, 2)
        cells = (points * 10).floor().long()
        counts = torch.bincount(cells[:, 0] * 10 + cells[:, 1], minlength=100)
        assert counts.min() >= 2 and counts.max() <= 6  # 4 on average

    def test_draw_noise_depends_on_the_seed_alone(self):
        seeds = [example_seed(0, 1, position) for position in range(6)]
        assert len(set(seeds)) == 6
        noise = draw_noise(seeds, 5, 3, device=torch.device("cpu"))
        assert torch.equal(noise[2:4], draw_noise(seeds[2:4], 5, 3, device=torch.device("cpu")))
        noise = draw_noise([example_seed(9, n) for n in range(2000)], 10, device=torch.device("cpu")).flatten()
        assert abs(noise.mean()) < 5 / len(noise) ** 0.5
        assert abs(noise.var() - 1) < 5 * (2 / len(noise)) ** 0.5


class TestKnownTokens:
    def test_prompt_kinds_prefix_infill_random(self):
        seeds = [example_seed(0, n) for n in range(6000)]
        lengths = 3 + torch.arange(6000) % 8
        real = torch.arange(10) < lengths[:, None]
        known = draw_known_masks(seeds, real, 10, 0.75)
        assert not (known & ~real).any()
        # A part of the examples, with less padding, has the same masks.
        assert torch.equal(draw_known_masks(seeds[5:9], real[5:9, :6], 10, 0.75), known[5:9, :6])
        assert not draw_known_masks(seeds, real, 10, 0.0).any()

        num_known, has_prompt = known.sum(dim=1), known.any(dim=1)
        assert abs(has_prompt.double().mean() - 0.75) < 4 * (0.75 * 0.25 / 6000) ** 0.5
        assert (num_known < lengths).all()
        assert not draw_known_masks(
            seeds, real & (torch.arange(10) < 1), 10, 1.0
        ).any()  # or no token would be learned

        full = known[has_prompt & (lengths == 10)].tolist()
        sizes = torch.tensor([sum(row) for row in full])
        assert (torch.bincount(sizes, minlength=10)[1:] > len(full) / 9 / 2).all()  # every number of known tokens
        is_prefix = [row == sorted(row, reverse=True) for row in full]
        gaps = ["".join("01"[token] for token in row).strip("1") for row in full]
        is_context = ["1" not in gap for gap in gaps]  # includes prefixes
        # A third of each pattern; one random subset in four happens to match another.
        assert 0.3 < sum(is_prefix) / len(full) < 0.5
        assert 0.62 < sum(is_context) / len(full) < 0.82

    def test_prompt_kind_independent(self):
        seeds = [example_seed(0, n) for n in range(4000)]
        real = torch.ones(4000, 40, dtype=torch.bool)
        real[:, 30:] = torch.arange(4000)[:, None] % 2 == 0
        known = draw_known_masks(seeds, real, 40, 1.0, ["independent"])
        assert not (known & ~real).any()
        assert torch.equal(draw_known_masks(seeds[5:9], real[5:9], 40, 1.0, ["independent"]), known[5:9])
        # With a uniform probability, the number of known tokens among n is uniform from 0 to n.
        counts = torch.bincount(known[::2].sum(dim=1), minlength=41).double()
        assert ((counts - 2000 / 41) ** 2 / (2000 / 41)).sum() < 90  # chi-square with 40 degrees of freedom: 1e-5
        # Tokens are independent given the probability f, so their covariance is E f^2 - (E f)^2 = 1/12.
        first, second = known[:, :2].double().T
        assert abs(first.mean() - 0.5) < 0.04 and abs((first * second).mean() - 1 / 3) < 0.04

    def test_prompt_kinds_are_equally_likely(self):
        seeds = [example_seed(1, n) for n in range(4000)]
        real = torch.ones(4000, 20, dtype=torch.bool)
        only = {kind: draw_known_masks(seeds, real, 20, 1.0, [kind]) for kind in ("prefix", "infill", "independent")}
        known = draw_known_masks(seeds, real, 20, 1.0, list(only))
        is_kind = torch.stack([(known == mask).all(dim=1) for mask in only.values()])
        assert is_kind.any(dim=0).all()
        assert (is_kind.double().mean(dim=1) > 0.3).all()


class TestFlowBatch:
    def test_make_flow_batch_example(self):
        text = make_flow_batch.__doc__.replace("```", "")
        example = doctest.DocTestParser().get_doctest(text, {}, "make_flow_batch", None, None)
        assert example.examples and doctest.DocTestRunner().run(example).failed == 0

    @staticmethod
    def make(rows: slice = slice(None), **options):
        input_ids = torch.arange(8 * 6).view(8, 6)
        examples = [{"input_ids": row[: 6 - n % 3].tolist()} for n, row in enumerate(input_ids)][rows]
        uniforms = stratified_uniforms(8, 4, 3)[rows]
        options = {"prompt_fraction": 0.8, "max_length": 6, **options}
        return make_flow_batch(DataCollatorForFLM()(examples), uniforms, range(8)[rows], (3, 0), **options).with_noise(
            5, 6
        )

    @pytest.mark.parametrize("time_sampler", [None, TimePairs(boundary_probability=0.3)])
    def test_make_flow_batch_depends_on_the_position_alone(self, time_sampler):
        whole = self.make(time_sampler=time_sampler)
        parts = [self.make(slice(start, start + 2), time_sampler=time_sampler) for start in (0, 2, 4, 6)]
        for start, part in zip((0, 2, 4, 6), parts):
            length = part.input_ids.shape[1]
            for name in ("input_ids", "labels", "tau_s", "tau_t", "tau_u", "noise"):
                if whole[name] is not None:
                    assert torch.equal(part[name], whole[name][start : start + 2, :length]), name
            assert {group: [start + row for row in rows] for group, rows in part.groups.items()} == {
                group: [row for row in rows if start <= row < start + 2] for group, rows in whole.groups.items()
            }
        assert not torch.equal(whole.noise[0], whole.noise[1])

    def test_prompt_fraction_makes_tokens_known(self):
        batch = self.make(prompt_fraction=1.0, prompt_kinds=["prefix"], time_sampler=TimePairs())
        known = batch.tau_s == 1
        assert known[:, 0].all() and (batch.tau_t == 1)[known].all() and (batch.tau_u == 1)[known].all()
        assert torch.equal(batch.mask, (batch.attention_mask == 1) & ~known)
        assert torch.equal(batch.labels[batch.mask], batch.input_ids[batch.mask])
        plain = self.make(prompt_fraction=0.0)
        assert plain.tau_s.shape == (8,) and (plain.tau_s < 1).all()

    def test_prompts_from_labels_leave_out_padding(self):
        input_ids = torch.ones(2, 12, dtype=torch.long)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[1, 9:] = 0
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :5] = -100
        examples = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        batch = make_flow_batch(examples, torch.rand(2, 1) / 2, range(2), (0,), prompts_from_labels=True)
        assert batch.tau_s[:, :5].eq(1).all() and batch.tau_s[:, 5:].lt(1).all()
        assert torch.equal(batch.labels, labels)

    def test_select(self):
        batch = self.make(time_sampler=TimePairs())
        part = batch.select(torch.tensor([5, 2]))
        assert len(part) == 2 and part.noise is None
        for name in ("input_ids", "labels", "tau_s", "tau_t", "tau_u", "attention_mask"):
            assert torch.equal(part[name], batch[name][[5, 2]])
