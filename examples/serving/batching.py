# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Batches of samples of concurrent requests."""

import asyncio
import logging
import time

from generators import CausalGenerator, FlowGenerator, SampleRequest


logger = logging.getLogger("ray.serve")


class Cancelled(Exception):
    """Raised to stop a batch whose clients have all disconnected or timed out."""


class Batcher:
    """
    Generates samples in batches. While one batch is generated, requests are collected; the next batch is the sample that has
    waited longest and all waiting samples that can share its batch.

    Args:
        generator ([`FlowGenerator`] or [`CausalGenerator`]): Generates a batch.
        max_batch_size (`int`): Largest number of samples in a batch.
        max_wait (`float`): Seconds that a sample waits for others while no batch is being generated.
    """

    def __init__(self, generator: FlowGenerator | CausalGenerator, max_batch_size: int, max_wait: float):
        self.generator, self.max_batch_size, self.max_wait = generator, max_batch_size, max_wait
        self.waiting: list[tuple[SampleRequest, asyncio.Future, float]] = []
        self.arrived = asyncio.Event()
        self.task: asyncio.Task | None = None

    async def generate(self, sample: SampleRequest) -> tuple[list[int] | None, int | None]:
        """
        Generates a sample. Cancelling this call cancels the sample.

        Returns:
            `tuple[list[int] | None, int | None]`: the new tokens, or `None` if the batch failed, and for the first sample of a
            batch the size of the batch.
        """
        if self.task is None:
            self.task = asyncio.create_task(self._run())
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((sample, future, time.monotonic()))
        self.arrived.set()
        return await future

    async def _run(self):
        while True:
            await self.arrived.wait()
            if len(self.waiting) < self.max_batch_size:
                await asyncio.sleep(self.waiting[0][2] + self.max_wait - time.monotonic())
            batch = self._next_batch()
            if not self.waiting:
                self.arrived.clear()
            if not batch:
                continue
            # In a thread, so that the event loop keeps accepting requests
            rows = await asyncio.to_thread(self._generate, *zip(*batch)) or [None] * len(batch)
            size = None if rows[0] is None else len(batch)
            for (_, future), row in zip(batch, rows):
                if not future.done():
                    future.set_result((row, size))
                size = None

    def _next_batch(self) -> list[tuple[SampleRequest, asyncio.Future]]:
        waiting = [row for row in self.waiting if not row[1].cancelled()]
        batch, self.waiting = [], []
        for sample, future, since in waiting:
            can_join = self.generator.batch_key(sample) == self.generator.batch_key(waiting[0][0])
            if can_join and len(batch) < self.max_batch_size:
                batch.append((sample, future))
            else:
                self.waiting.append((sample, future, since))
        return batch

    def _generate(self, samples: list[SampleRequest], futures: list[asyncio.Future]) -> list[list[int]] | None:
        def stop_if_cancelled():
            if all(future.cancelled() for future in futures):
                raise Cancelled

        try:
            return self.generator.generate(samples, stop_if_cancelled)
        except Cancelled:
            return None
        except Exception:  # concerns this batch alone, such as running out of memory
            logger.exception("A batch of %d samples failed.", len(samples))
            return None
