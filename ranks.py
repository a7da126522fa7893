"""Several processes, as torchrun starts them: who is who, and what they share. One process alone is rank 0 of 1.

    torchrun --standalone --nproc_per_node=3 train.py sample_configs/diving48.py
"""

import contextlib
import gc
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm


def begin(config):
    """Joins the processes that torchrun started, if it did; config['device'] becomes this one's. Ranks above 0 print warnings
    alone."""
    if 'WORLD_SIZE' not in os.environ:
        return
    backend = 'gloo'
    if config['device'] == 'cuda':
        cards = torch.cuda.device_count()
        config['device'] = f'cuda:{int(os.environ["LOCAL_RANK"]) % cards}'
        torch.cuda.set_device(config['device'])
        if int(os.environ['LOCAL_WORLD_SIZE']) <= cards:  # NCCL takes no two processes on one card
            backend = 'cpu:gloo,cuda:nccl'
    from torch import _dynamo  # noqa: F401  training needs it, and imported later it would hold the group beyond its end
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may have clips to make; torchrun sees who died
    if dist.get_rank():
        sys.stdout = open(os.devnull, 'w', errors='surrogateescape')


def end():
    """Leaves the group, and ends its threads: one that is still at it when Python ends would abort the process."""
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel holds the group, and itself
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_first():
    """The others wait until rank 0 has been through the block: what it makes or fetches, they find."""
    rank, _ = rank_of()
    if rank > 0:
        barrier()
    yield
    if rank == 0:
        barrier()


def rank_of():
    """-> (this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(x):
    """The sum of all ranks' x, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def local():
    """-> (this process's number among those of its machine, how many these are)."""
    return (int(os.environ['LOCAL_RANK']), int(os.environ['LOCAL_WORLD_SIZE'])) if dist.is_initialized() else (0, 1)


def machine():
    """What tells this machine's files in a shared folder from those of others: '' if it is the only one."""
    alone = os.environ.get('LOCAL_WORLD_SIZE') == os.environ.get('WORLD_SIZE')
    return '' if alone else f'_machine{os.environ["GROUP_RANK"]}'


def barrier():
    """Waits until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def progress(items, note, total, **options):
    """A bar on the terminal, of rank 0 alone."""
    return tqdm(items, note, total, leave=False, disable=None if rank_of()[0] == 0 else True, **options)
