"""Batches of concurrent requests, in this process."""

import asyncio
import time
from collections.abc import Callable, Sequence

from batching import Batcher, Cancelled
from generators import SampleRequest


FAILS = 99


def numbered(group: str, number: int) -> SampleRequest:
    """A sample that can share a batch with the others of its group, with its number as length."""
    return SampleRequest([ord(group)], number, None)


class SlowGenerator:
    """Generates the numbers of samples, and takes a while."""

    def __init__(self):
        self.batches = []

    def batch_key(self, sample: SampleRequest) -> int:
        return sample.prompt_ids[0]

    def generate(self, samples: list[SampleRequest], callback: Callable[[], None]) -> list[list[int]]:
        self.batches.append([sample.length for sample in samples])
        if samples[0].length == FAILS:
            raise ValueError("this sample fails")
        time.sleep(0.1)
        callback()
        return [[sample.length] for sample in samples]


class TestBatcher:
    def run(self, groups: str, numbers: Sequence[int], max_batch_size: int = 3, cancelled: tuple[int, ...] = ()):
        """Returns the batches and the results of samples that arrive one after the other."""
        generator = SlowGenerator()

        async def send():
            batcher = Batcher(generator, max_batch_size, 0.02)
            tasks = [asyncio.create_task(batcher.generate(numbered(*pair))) for pair in zip(groups, numbers)]
            await asyncio.sleep(0.05)  # the first batch is being generated
            for index in cancelled:
                tasks[index].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

        return generator.batches, asyncio.run(send())

    def test_equal_keys_share_a_batch(self):
        batches, results = self.run("abaabbac", range(8))
        assert batches == [[0, 2, 3], [1, 4, 5], [6], [7]]
        assert results == [([0], 3), ([1], 3), ([2], None), ([3], None), ([4], None), ([5], None), ([6], 1), ([7], 1)]

    def test_arrivals_during_a_batch_are_the_next_batch(self):
        generator = SlowGenerator()

        async def send():
            batcher = Batcher(generator, 8, 0.0)
            tasks = []
            for number in range(6):
                tasks.append(asyncio.create_task(batcher.generate(numbered("a", number))))
                await asyncio.sleep(0.015)
            await asyncio.gather(*tasks)

        asyncio.run(send())
        assert generator.batches == [[0], [1, 2, 3, 4, 5]]

    def test_cancelled_samples_are_left_out(self):
        batches, results = self.run("aaaa", range(4), max_batch_size=1, cancelled=(1, 2))
        assert batches == [[0], [3]]
        assert results[0] == ([0], 1) and results[3] == ([3], 1)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[1:3])

    def test_a_cancelled_batch_stops(self):
        stopped = []

        class Endless(SlowGenerator):
            def generate(self, samples, callback):
                try:
                    for _ in range(1000):
                        time.sleep(0.01)
                        callback()
                except Cancelled:
                    stopped.append(len(samples))
                    raise

        async def send():
            batcher = Batcher(Endless(), 8, 0.0)
            tasks = [asyncio.create_task(batcher.generate(numbered("a", number))) for number in range(2)]
            await asyncio.sleep(0.05)
            tasks[0].cancel()
            await asyncio.sleep(0.1)
            assert not stopped  # the other one is awaited
            tasks[1].cancel()
            while not stopped:
                await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(send(), 8))
        assert stopped == [2]

    def test_a_failure_concerns_its_batch_alone(self):
        batches, results = self.run("aab", [FAILS, 1, 2])
        assert batches == [[FAILS, 1], [2]]
        assert results == [(None, None), (None, None), ([2], 1)]
