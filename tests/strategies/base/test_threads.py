"""The server's threads compute alone, whatever PyTorch has in the thread that asks them."""

import torch

from strategies.base.threads import in_threads


def test_each_of_the_threads_has_one_of_pytorchs_and_the_one_that_asks_keeps_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = list(in_threads(lambda item: (item, torch.get_num_threads()), range(20)))
        assert found == [(item, 1) for item in range(20)]
        nested = list(
            in_threads(lambda _: list(in_threads(lambda _: torch.get_num_threads(), range(2))), range(4))
        )
        assert nested == [[1, 1]] * 4
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
