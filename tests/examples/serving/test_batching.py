"""Batches of concurrent requests, in this process."""

import asyncio
import time
from collections.abc import Sequence

from batching import Batcher
from generators import Text


class LettersWriter:
    """Texts of which the first token says which ones go together, and takes its time."""

    def __init__(self):
        self.batches = []

    def group(self, text: Text) -> int:
        return text.prompt_ids[0]

    def write(self, texts: list[Text]) -> list[list[int]]:
        self.batches.append([text.seed for text in texts])
        if texts[0].seed == 99:
            raise ValueError("a text that cannot be written")
        time.sleep(0.1)
        return [[text.seed] for text in texts]


class TestBatcher:
    def run(self, groups: str, seeds: Sequence[int], max_batch_size: int = 3, leaves: tuple[int, ...] = ()):
        """The batches and the results of texts that come one after the other, of which some are not waited for."""
        writer = LettersWriter()

        async def send():
            batcher = Batcher(writer, max_batch_size, 0.02)
            texts = [Text([ord(group)], 4, seed) for group, seed in zip(groups, seeds)]
            tasks = [asyncio.create_task(batcher.write(text)) for text in texts]
            await asyncio.sleep(0.05)  # the first batch is being written
            for index in leaves:
                tasks[index].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

        return writer.batches, asyncio.run(send())

    def test_what_goes_together_is_written_together(self):
        batches, results = self.run("abaabbac", range(8))
        assert batches == [[0, 2, 3], [1, 4, 5], [6], [7]]
        assert results == [([0], 3), ([1], 3), ([2], None), ([3], None), ([4], None), ([5], None), ([6], 1), ([7], 1)]

    def test_what_comes_meanwhile_is_the_next_batch(self):
        writer = LettersWriter()

        async def send():
            batcher = Batcher(writer, 8, 0.0)
            tasks = []
            for seed in range(6):
                tasks.append(asyncio.create_task(batcher.write(Text([0], 4, seed))))
                await asyncio.sleep(0.015)
            await asyncio.gather(*tasks)

        asyncio.run(send())
        assert writer.batches == [[0], [1, 2, 3, 4, 5]]

    def test_nobody_waits(self):
        batches, results = self.run("aaaa", range(4), max_batch_size=1, leaves=(1, 2))
        assert batches == [[0], [3]]
        assert results[0] == ([0], 1) and results[3] == ([3], 1)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[1:3])

    def test_a_failure_is_of_its_batch_alone(self):
        batches, results = self.run("aab", [99, 1, 2])
        assert batches == [[99, 1], [2]]
        assert results == [(None, None), (None, None), ([2], 1)]
