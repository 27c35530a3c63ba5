"""Tests of the loader that reads ahead: the same batches, errors that are raised, and a thread that ends."""

import threading
import time

import pytest
import torch
from torch.utils.data import Dataset

from halfbyte.trainer.data.prefetch import PrefetchingLoader
from halfbyte.trainer.errors import DataError

CPU = torch.device("cpu")


class Slow(Dataset[int]):
    def __init__(self, pause: float = 0.0, wrong: int = -1) -> None:
        self.pause, self.wrong, self.read = pause, wrong, 0

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> int:
        time.sleep(self.pause)
        self.read += 1
        if number == self.wrong:
            raise DataError(f"number {number} is damaged")
        return number


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "halfbyte: data"]


def test_batches_come_in_order_in_every_pass() -> None:
    loader = PrefetchingLoader(Slow(), device=CPU, batch_size=2)
    assert len(loader) == 10
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[n, n + 1] for n in range(0, 20, 2)]
    loader.close()
    assert readers() == []


def test_a_step_does_not_wait_for_what_was_read_meanwhile() -> None:
    loader = PrefetchingLoader(Slow(pause=0.02), device=CPU, batch_size=1)
    batches = iter(loader)
    next(batches)
    waited = 0.0
    for _ in range(8):
        time.sleep(0.04)
        began = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - began
    loader.close()
    assert waited < 8 * 0.02 / 2, "reading one after the other takes 0.16 s"


def test_an_error_comes_after_the_batches_before_it() -> None:
    loader = PrefetchingLoader(Slow(wrong=5), device=CPU, batch_size=1)
    batches = iter(loader)
    assert [int(next(batches)) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="number 5 is damaged"):
        next(batches)
    loader.close()


def test_reading_stops_a_few_batches_ahead_and_ends_with_close() -> None:
    data = Slow()
    loader = PrefetchingLoader(data, device=CPU, batch_size=1)
    next(iter(loader))
    time.sleep(0.3)
    assert 2 <= data.read <= 7
    loader.close()
    assert readers() == []
    assert data.read <= 12
