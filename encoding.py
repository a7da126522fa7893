"""From videos to what is kept of them: each is read and encoded once. In reading order:

    videos             what a method keeps of videos, from what CLIP shows of them
    keep               anything made of what CLIP shows, for all videos of a split, in memory or in a file
    keep_seen          what CLIP shows itself
    columns, on_gpu    where that lies
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import torch

import ranks
from checkpoint import fingerprint
from config import amp
from data import Split
from decode import stamp
from model import bring, look

BLOCK = 16  # videos encoded at a time
DONE = 1  # state of a video in a file of what is kept; 0: not yet, or it could not be read, which is tried again


class Kept(NamedTuple):
    """What is kept of a split's videos."""
    split: Split  # the split without the videos that could not be read
    rows: np.ndarray  # where in `tensors` each of these lies
    tensors: list  # (V, ...), a row for each video of the whole split


@torch.no_grad()
def videos(config, method, seen):
    """What `method.video` gives of videos: tensors of `look` (V, T, ...) -> tensors (V, ...), where `seen` lies; one number or
    one vector a video in float32, more in half precision."""
    parts = []
    for chunk in zip(*(x.split(BLOCK) for x in seen)):
        with amp(config):
            kept = method.video(*bring(chunk, config['device']))
        parts.append([stored(x).to(seen[0].device) for x in kept])
    return [torch.cat(columns) for columns in zip(*parts)]


def stored(x):
    """Videos' (V, ...) as it is kept."""
    if not x.is_floating_point():
        return x
    return x.float() if x.ndim <= 2 else x.half()


@torch.no_grad()
def keep(config, clip, split, reader, sees, make, about, draw=None):
    """Reads each video of a split and keeps what `make` gives for it -> Kept.

    sees: as for `look`; make: what it shows, a list of (n, T, ...) -> what is kept, a list of tensors (n, ...); about: plain
    values that are others as soon as `make` is, for the name of the file; draw: None for test frames, a number for that random
    draw of frames, crop and flip. It lies in memory if it fits into features_gb, else in a file in out_dir, or in features_dir
    if that is given; the processes of a machine share one file, each writes its part, and an interrupted run goes on.
    """
    began, count = time.time(), len(split.videos)
    black = torch.zeros(1, config['frames'], 3, *2 * [clip.visual.image_size], dtype=torch.uint8, device=config['device'])
    with amp(config):
        seen = look(clip.visual, black, sees)
    specs = [(x.shape[1:], x.cpu().numpy().dtype) for x in make(seen)]
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)  # of a video
    rank, world = ranks.local()
    stays = bool(config['features_dir']) or count * size > config['features_gb'] * 1e9
    path = None
    if stays or world > 1:
        path = os.path.join(config['features_dir'] or config['out_dir'], name_for(split, sees, about, draw, config))
    with ranks.rank_0_first():
        state, *found = columns(path, count, [((), np.dtype(np.uint8)), *specs])

    blocks = [np.arange(i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]
    blocks = [block for block in blocks if (state[block] != DONE).any()]
    ranks.barrier()  # all have seen what is left to do
    own = blocks[rank::world]
    if draw is None:
        jobs = [(0, block) for block in own]
    else:  # each video an episode of its own: if it cannot be read, any other of its class takes its place
        jobs = [(draw * count + block[0], block[:, None]) for block in own]
    clips = reader.stream(split, jobs, train=draw is not None)
    for block, (frames, indices) in zip(own, ranks.progress(
            clips, f'encoding {split.name} videos', len(own), unit_scale=BLOCK, unit='video')):
        read = indices if draw is None else block
        if len(read):
            frames = (frames if draw is None else frames[:, 0]).to(config['device'], non_blocking=True)  # (n, T, 3, H, W)
            with amp(config):
                seen = look(clip.visual, frames, sees)
            for column, x in zip(found, make(seen)):
                column[read] = x.cpu().numpy()
        state[read] = DONE
    ranks.barrier()

    rows = np.flatnonzero(state == DONE)
    if not len(rows):
        sys.exit(f'None of the {count} {split.name} videos could be read.')
    where = f'in {path}' if stays else 'in memory'
    if path and not stays and rank == 0:
        with contextlib.suppress(PermissionError):  # Windows keeps a file that is mapped
            os.remove(path)  # it lives on where it is mapped
    tensors = [torch.from_numpy(column) for column in found]
    if on_gpu(config, size * count):
        tensors, where = [x.to(config['device']) for x in tensors], 'on the GPU'
    print(f'encoded {sum(map(len, blocks))} of {count} {split.name} videos in {time.time() - began:.0f} s; '
          f'{size:,} bytes a video, {where}', flush=True)
    return Kept(subset(split, rows), rows, tensors)


def keep_seen(config, clip, split, reader, sees, draw=None):
    """What CLIP shows of a split's videos, as `keep`."""
    return keep(config, clip, split, reader, sees, lambda seen: [stored(x) for x in seen], fingerprint(config, clip), draw)


def subset(split, indices):
    """The split with these videos alone."""
    return dataclasses.replace(split, videos=[split.videos[i] for i in indices], labels=split.labels[indices])


def name_for(split, sees, about, draw, config):
    """A file's name that is another as soon as anything is that its content depends on."""
    augmented = [config[key] for key in ('augment', 'flip', 'cache_frames')] if draw is not None else None
    text = json.dumps([about, sees, draw, augmented, bool(config['cache_dir']), [stamp(video) for video in split.videos]])
    return f'features_{split.name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}{ranks.machine()}.bin'


def columns(path, count, specs):
    """Arrays (count, *shape) for each (shape, dtype) of specs, one after another in one file, or in memory if path is None:
    zeros, or what an earlier run left there. Stops with one sentence where the disk has no room."""
    lengths = [count * math.prod(shape) * dtype.itemsize for shape, dtype in specs]
    sizes = [math.ceil(length / 64) * 64 for length in lengths]  # each begins at a multiple of 64 bytes
    if path is None:
        whole = np.zeros(sum(sizes), np.uint8)
    else:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, 'ab') as file:
                with contextlib.suppress(ImportError, OSError):  # Windows, or a file system without locks
                    import fcntl
                    fcntl.flock(file, fcntl.LOCK_EX)  # of two trainings that share features_dir one makes it
                if file.seek(0, os.SEEK_END) not in (0, sum(sizes)):  # not whole
                    file.truncate(0)
                if hasattr(os, 'posix_fallocate'):
                    os.posix_fallocate(file.fileno(), 0, sum(sizes))  # a full disk is told now, not by a signal later
                file.truncate(sum(sizes))
            whole = np.memmap(path, np.uint8, 'r+')
        except OSError as error:
            sys.exit(f'Cannot write the features into {path}: {error.strerror}; --features_dir= names another folder.')
    return [whole[first:first + length].view(dtype).reshape(count, *shape)
            for (shape, dtype), length, first in zip(specs, lengths, np.cumsum([0, *sizes]))]


def on_gpu(config, size):
    """Whether that many bytes may stay on the GPU: half of what is free there, or kept for later by PyTorch's allocator."""
    if not config['device'].startswith('cuda'):
        return False
    kept = torch.cuda.memory_reserved(config['device']) - torch.cuda.memory_allocated(config['device'])
    return size < 0.5 * (torch.cuda.mem_get_info(config['device'])[0] + kept)
