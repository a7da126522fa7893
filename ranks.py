"""Several processes, as torchrun starts them: who is who, and what they share. One process alone is rank 0 of 1.

    torchrun --standalone --nproc_per_node=3 train.py sample_configs/diving48.py
"""

import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm


def begin(device):
    """Joins the processes that torchrun started, if it did -> this process's device. Ranks above 0 print warnings alone."""
    if 'WORLD_SIZE' not in os.environ:
        return device
    if device == 'cuda':
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
    backend = 'cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo'
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may have clips to make; torchrun sees who died
    if dist.get_rank():
        sys.stdout = open(os.devnull, 'w')
    return device


def end():
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_first():
    """The others wait until rank 0 has been through the block: what it makes or fetches, they find."""
    rank, world = rank_of()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def rank_of():
    """-> (this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(x):
    """The sum of all ranks' x, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_rows(x):
    """The rows of all ranks' tensors, which may have different numbers of them, rank after rank, on x's device."""
    rank, world = rank_of()
    if world == 1:
        return x
    counts = torch.zeros(world, dtype=torch.int64)
    counts[rank] = len(x)
    most = add_up(counts).max()
    padded = F.pad(x.cpu(), (0, 0) * (x.ndim - 1) + (0, most - len(x)))
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)]).to(x.device)


def progress(items, note, total, **options):
    """A bar on the terminal, of rank 0 alone."""
    return tqdm(items, note, total, leave=False, disable=None if rank_of()[0] == 0 else True, **options)
