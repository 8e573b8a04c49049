import torch

import ceilings

DEVICE = "cpu"


def test_ceilings_are_positive():
    assert ceilings.copy_bandwidth(DEVICE, num_bytes=2**16, seconds=0.001) > 0
    assert ceilings.read_bandwidth(DEVICE, num_bytes=2**16, seconds=0.001) > 0
    assert ceilings.matmul_rate(torch.float32, DEVICE, size=64, seconds=0.001) > 0


def test_environment():
    found = ceilings.environment(DEVICE)
    assert set(found) == {"device", "torch", "cuda", "triton", "date"}
    assert found["torch"] == torch.__version__
