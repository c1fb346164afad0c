import threading
import time

import pytest
import torch

from deltakeeper.workers import map_in_order, one_thread_each


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_whatever_the_threads(workers):
    def work(item):
        time.sleep(0.001 * (item % 3))
        return item * item

    found = list(map_in_order(work, range(40), cost=lambda _: 1, workers=workers))
    assert found == [i * i for i in range(40)]


def test_costs_under_way_stay_below_the_limit():
    lock, running, peak = threading.Lock(), [0], [0]

    def work(item):
        with lock:
            running[0] += item
            peak[0] = max(peak[0], running[0])
        time.sleep(0.002)
        with lock:
            running[0] -= item
        return item

    items = [3, 1, 4, 20, 1, 5, 2, 6]
    assert list(map_in_order(work, items, cost=lambda i: i, workers=4, memory=8)) == items
    assert peak[0] <= 20  # the large one ran alone


def test_an_error_ends_the_work():
    def work(item):
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(map_in_order(work, range(100), cost=lambda _: 1, workers=2))


def test_torch_gets_its_threads_back():
    before = torch.get_num_threads()
    with one_thread_each() as had:
        assert torch.get_num_threads() == 1
        assert had == before
    assert torch.get_num_threads() == before
