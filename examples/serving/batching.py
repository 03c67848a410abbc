# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Texts of concurrent requests, written together."""

import asyncio
import logging
import time

from generators import Abandoned, CausalWriter, FlowWriter, Text


logger = logging.getLogger("ray.serve")


class Batcher:
    """
    Writes texts in batches: while one is written texts are collected, and the next one has all that go together with the text
    that has waited longest.

    Args:
        writer ([`FlowWriter`] or [`CausalWriter`]): What writes a batch.
        max_batch_size (`int`): The most texts of a batch.
        max_wait (`float`): The seconds that a text waits for others if nothing is being written.
    """

    def __init__(self, writer: FlowWriter | CausalWriter, max_batch_size: int, max_wait: float):
        self.writer, self.max_batch_size, self.max_wait = writer, max_batch_size, max_wait
        self.waiting: list[tuple[Text, asyncio.Future, float]] = []
        self.arrived = asyncio.Event()
        self.task: asyncio.Task | None = None

    async def write(self, text: Text) -> tuple[list[int] | None, int | None]:
        """The tokens of a text after its prompt, or `None` if that failed; and for the first one of a batch its size."""
        if self.task is None:
            self.task = asyncio.create_task(self._run())
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((text, future, time.monotonic()))
        self.arrived.set()
        try:
            return await future
        except asyncio.CancelledError:
            text.is_abandoned = True
            raise

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
            texts = [text for text, _ in batch]
            # In a thread, so that this one takes what comes meanwhile
            rows = await asyncio.to_thread(self._write, texts)
            sizes = [None if rows is None else len(texts)] + [None] * (len(texts) - 1)
            for (_, future), row, size in zip(batch, rows or [None] * len(texts), sizes):
                if not future.done():
                    future.set_result((row, size))

    def _next_batch(self) -> list[tuple[Text, asyncio.Future]]:
        """Takes it from what is waiting."""
        waiting = [row for row in self.waiting if not row[0].is_abandoned]
        batch, self.waiting = [], []
        for text, future, since in waiting:
            if len(batch) < self.max_batch_size and self.writer.group(text) == self.writer.group(waiting[0][0]):
                batch.append((text, future))
            else:
                self.waiting.append((text, future, since))
        return batch

    def _write(self, texts: list[Text]) -> list[list[int]] | None:
        try:
            return self.writer.write(texts)
        except Abandoned:
            return None
        except Exception:  # of these texts alone, such as memory that ran out
            logger.exception("A batch of %d texts failed.", len(texts))
            return None
