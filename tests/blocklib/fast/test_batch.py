"""What the layers of a batch share on our kernels."""

from __future__ import annotations

import pytest
import torch

from puzzle.blocklib.fast.batch import CachePool


def test_caches_from_a_pool():
    """Caches of one point do not share memory, hold noise, and the next point takes the same memory again."""
    pool = CachePool(4 * 1000, torch.float32, torch.device("cpu"))
    first, second = pool.take((10, 30)), pool.take((700,))
    assert pool.num_bytes == 4000
    assert first.std() > 0.5
    assert first.data_ptr() + first.nbytes == second.data_ptr()
    with pytest.raises(ValueError, match="does not fit"):
        pool.take((1,))
    pool.used = 0
    assert pool.take((10, 30)).data_ptr() == first.data_ptr()
