"""Tests marked `cuda` are skipped where there is no CUDA device."""

import pytest
import torch

torch.set_num_threads(1)  # several test processes share the cores


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('cuda'):
                item.add_marker(pytest.mark.skip(reason='no CUDA device'))
