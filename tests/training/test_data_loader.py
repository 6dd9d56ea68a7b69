"""The loader reads ahead, and yields what torch's yields."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import data
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from danon.training import DataLoader
from danon.training import data_loader as module

SLOW_ITEM_S = 0.05


class Squares(Dataset[Tensor]):
    """Squares of the first numbers; one of them fails if asked for."""

    def __init__(self, size: int = 10, broken: int | None = None) -> None:
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        if index == self.broken:
            raise KeyError(f"item {index}")
        return torch.tensor(index * index)


class Recorded(Squares):
    """Squares, with the numbers of those that were read."""

    def __init__(self, size: int = 10) -> None:
        super().__init__(size)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return super().__getitem__(index)


def prefetchers() -> list[threading.Thread]:
    return [x for x in threading.enumerate() if x.name == "danon-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert prefetchers() == []


def loader(dataset: Any = None, prefetch: int = 2, **kw: Any) -> DataLoader[Any]:
    made: DataLoader[Any] = DataLoader(Squares() if dataset is None else dataset, **kw)
    made.set_prefetch(prefetch, pin_prefetch=False)
    return made


def lists(batches: Any) -> list[Any]:
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2, "prefetch_factor": 3}])
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_batches_and_their_order_are_those_of_torch(prefetch: int, workers: dict[str, int]) -> None:
    ours, theirs = [], []
    for kind, into in ((loader, ours), (data.DataLoader, theirs)):
        torch.manual_seed(3)
        extra = {"prefetch": prefetch} if kind is loader else {}
        made = kind(Squares(), batch_size=3, shuffle=True, **extra, **workers)
        assert len(made) == 4
        for _ in range(2):  # another order in each pass
            for batch in made:
                into.append(batch.tolist())
                torch.rand(3)  # a training draws as well
    assert ours == theirs and len(ours) == 8 and ours[:4] != ours[4:]


def test_numbers_drawn_after_the_beginning_do_not_move() -> None:
    orders = []
    for kind in (loader, data.DataLoader):
        torch.manual_seed(0)
        batches = iter(kind(Squares(), batch_size=4, shuffle=True))
        torch.rand(1)  # between iter and the first next
        orders.append(lists(batches))
    assert orders[0] == orders[1]


def test_batches_are_read_while_one_is_used() -> None:
    dataset = Recorded()
    batches = iter(loader(dataset, prefetch=2, batch_size=1))
    next(batches)
    deadline = time.monotonic() + 10
    while len(dataset.read) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert dataset.read == [0, 1, 2]  # the first, and two ahead: no more


class Slow(Squares):
    def __getitem__(self, index: int) -> Tensor:
        time.sleep(SLOW_ITEM_S)
        return super().__getitem__(index)


def test_reading_and_training_take_the_time_of_one_of_them() -> None:
    seconds = []
    for prefetch in (0, 2):
        start = time.perf_counter()
        for _ in loader(Slow(8), prefetch=prefetch, batch_size=1):
            time.sleep(SLOW_ITEM_S)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 0.8 * seconds[0]  # 9 of 16 parts


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("broken", [0, 5])
def test_error_comes_in_the_place_of_its_batch(broken: int, workers: int) -> None:
    def events(made: Any) -> list[Any]:
        batches, seen = iter(made), []
        while True:
            try:
                seen.append(next(batches).tolist())
            except StopIteration:
                return seen
            except KeyError as error:
                seen.append(str(error).splitlines()[-1])

    kw = {"batch_size": 2, "num_workers": workers}
    ours = events(loader(Squares(broken=broken), **kw))
    assert ours == events(data.DataLoader(Squares(broken=broken), **kw))
    assert sum("item" in str(event) for event in ours) == 1 and len(ours) == 5


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}])
def test_loop_that_breaks_leaves_no_thread_and_no_worker(workers: dict[str, int]) -> None:
    before = set(torch.multiprocessing.active_children())  # of other tests
    for batch in loader(Squares(1000), **workers):
        assert len(prefetchers()) <= 1
        if batch == 9:
            break
    assert prefetchers() == []
    assert set(torch.multiprocessing.active_children()) <= before


def test_loop_that_raises_leaves_no_thread() -> None:
    def train() -> None:
        for batch in loader(Squares(1000)):
            1 / int(batch != 4)

    with pytest.raises(ZeroDivisionError):
        train()
    assert prefetchers() == []


def test_iterator_that_is_not_begun_has_no_thread() -> None:
    batches = iter(loader())
    assert prefetchers() == []
    del batches


def test_iterator_that_ended_stays_ended() -> None:
    batches = iter(loader(batch_size=5))
    assert len(list(batches)) == 2 and prefetchers() == []
    with pytest.raises(StopIteration):
        next(batches)
    empty = iter(loader(Squares(0)))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(empty)


def test_persistent_workers_begin_anew_after_an_early_end() -> None:
    made = loader(Squares(20), batch_size=2, num_workers=1, persistent_workers=True)
    early = iter(made)
    first = next(early).tolist()
    assert lists(made) == lists(data.DataLoader(Squares(20), batch_size=2))
    assert first == [0, 1]
    with pytest.raises(StopIteration):  # its workers read for the other one
        next(early)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor(i) for i in range(5))


def test_stream_without_length() -> None:
    assert lists(loader(Stream(), batch_size=2)) == [[0, 1], [2, 3], [4]]


def test_gradients_are_recorded_as_in_the_loop() -> None:
    weight = torch.ones(1, requires_grad=True)

    class Computed(Squares):
        def __getitem__(self, index: int) -> Tensor:
            return weight * index

    with torch.no_grad():
        assert [b.requires_grad for b in loader(Computed(3), collate_fn=sum)] == [False] * 3
    assert [b.requires_grad for b in loader(Computed(3), collate_fn=sum)] == [True] * 3


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_wrong_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"num_prefetch = .*: must be an integer >= 0"):
        loader().set_prefetch(value)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without one")
def test_pinning_without_an_accelerator_is_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    module._can_pin.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            made: DataLoader[Any] = DataLoader(Squares(), batch_size=5, pin_memory=True)
            made.set_prefetch(num_prefetch=2, pin_prefetch=True)
            assert len(lists(made)) == 2
    assert caplog.messages == [
        "pinned memory needs an accelerator such as a CUDA GPU, and there is none: batches are "
        "not pinned"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_are_pinned() -> None:
    made: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(6)), batch_size=2)
    assert [batch[0].is_pinned() for batch in made] == [False] * 3
    made.set_prefetch(num_prefetch=2, pin_prefetch=True)
    assert [batch[0].is_pinned() for batch in made] == [True] * 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_snippet_of_the_specification() -> None:
    dataset = Squares(100)
    loader = DataLoader(dataset, batch_size=32, num_workers=4, pin_memory=True, prefetch_factor=2)
    loader.set_prefetch(num_prefetch=2, pin_prefetch=True)
    assert torch.cat(list(loader)).tolist() == [i * i for i in range(100)]
