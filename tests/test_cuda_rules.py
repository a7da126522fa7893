"""What a CPU can say of CUDA: the dtypes and devices of every method, by CUDA's own rules, on tensors without content.

A product of float16 and float32, or of tensors on two devices, fails with these as it would with real ones. What only a card
can tell, backward too, is left to the tests marked `cuda`.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import checkpoint
from config import DEFAULTS, ROOT, amp, find_method, methods
from encoding import stored
from model import Episode, Step, bring, look

NAMES = ['jump', 'run', 'swim']
BY_CONTENT = 'trx', 'efficient_prompt'  # take sizes from contents, which are not there; so does VBA in a test
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@pytest.fixture(scope='module')
def cuda(tmp_path_factory):
    """Lets tensors without content lie on cuda:0: PyTorch asks a guard which device is at work, and a CPU build has none."""
    if not torch.cuda.is_available():
        if not shutil.which('g++'):
            pytest.skip('no C++ compiler')
        folder, torch_folder = tmp_path_factory.mktemp('guard'), os.path.dirname(torch.__file__)
        (folder / 'guard.cpp').write_text(GUARD)
        subprocess.run(['g++', '-std=c++20', '-shared', '-fPIC', f'-I{torch_folder}/include', folder / 'guard.cpp',
                        '-o', folder / 'guard.so', f'-L{torch_folder}/lib', '-lc10'], check=True)
        ctypes.CDLL(str(folder / 'guard.so'))
    with mock.patch('torch.cuda.amp.common.amp_definitely_not_available', lambda: False), \
            mock.patch('torch.cuda.is_bf16_supported', lambda: True):
        yield 'cuda:0'


def up_to_unknown_sizes(they_are):
    return contextlib.suppress(*([DataDependentOutputException, DynamicOutputShapeException] if they_are else []))


def moved(module, device):
    """A module whose parameters and buffers lie on the device, without content."""
    for part in module.modules():
        for name, p in [*part.named_parameters(recurse=False)]:
            setattr(part, name, nn.Parameter(torch.empty_like(p, device=device), p.requires_grad))
        for name, x in [*part.named_buffers(recurse=False)]:
            setattr(part, name, torch.empty_like(x, device=device))
    return module


@pytest.mark.parametrize('name, options', [*((name, {}) for name in methods()), ('vba', dict(temporal_adapter=False))])
def test_every_method_follows_the_rules_of_cuda(cuda, name, options):
    """A step, and a test whose features wait on the CPU."""
    found = find_method(name)[0]
    closed = getattr(found, 'closed_set', False)
    config = DEFAULTS | getattr(found, 'options', {}) | options | dict(
        clip=os.path.join(ROOT, 'demo', 'tiny_clip.pt'), method=name, closed_set=closed, device=cuda, dtype='float16')
    clip = checkpoint.load_clip(config)
    method, size = checkpoint.build(config, clip, NAMES), clip.visual.image_size
    queries = (6, 1) if closed else (1, 3)  # (E, M)
    with FakeTensorMode(allow_non_fake_inputs=True), amp(config):
        moved(clip.visual, cuda), moved(method, cuda)
        frames = torch.empty(6, config['frames'], 3, size, size, dtype=torch.uint8, device=cuda)
        classes = torch.arange(3, device=cuda)
        episode = Episode(classes[:0 if closed else 3], classes.expand(queries[0], -1), NAMES,
                          answers=torch.zeros(queries, dtype=torch.int64, device=cuda))
        seen = look(clip.visual, frames, method.sees)
        assert {x.dtype for x in seen} <= {torch.float16, torch.uint8}
        with up_to_unknown_sizes(name in BY_CONTENT):
            loss, scores = Step(method)(seen, episode)
            assert loss.dtype == torch.float32 and loss.device == scores.device == frames.device
        with up_to_unknown_sizes(name in (*BY_CONTENT, 'vba')), torch.no_grad():
            kept = [stored(x).cpu() for x in method.video(*bring(seen, cuda))]
            index = torch.arange(6, device=cuda).reshape(queries[0], -1)
            scores = method.scores(kept, episode._replace(answers=None, index=index))
            assert scores.device == frames.device and scores.shape == (*queries, 3)
