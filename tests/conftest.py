"""Tests marked `cuda` are skipped where there is no CUDA device."""

import os

import pytest
import torch

torch.set_num_threads(1)  # several test processes share the cores
os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'  # read at its first call, for the deterministic tests


@pytest.fixture(autouse=True)
def as_it_was():
    """A training with deterministic=True leaves this to the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('cuda'):
                item.add_marker(pytest.mark.skip(reason='no CUDA device'))
