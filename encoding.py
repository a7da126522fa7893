"""From videos to what the aggregator needs of them, each video read and encoded once. In reading order:

    frozen_parts, encode_frozen    what the frozen part of a model makes of a split
    encode                         that -> Q*_0 and the tokens of the other levels
    encode_split                   both for a test, kept in memory or in a file
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import clip_loader
import ranks
from config import MODEL_OPTIONS, resolve_device
from decode import stamp
from model import trainable_state

ENCODE_VIDEOS = 16  # videos encoded at a time
PROBES = ('reversed', 'still', 'shuffled')  # orders of frames that the queries of a test may be given


@torch.no_grad()
def frozen_parts(model, split, reader, device, autocast, draw=None, first=0, head=True):
    """Runs the frozen part of the model over this rank's share of a split's videos from index `first` on.

    Yields, of some at a time that could be read, their indices, what VBA.frozen gives (n, T, *, D), and `pooled` (n, embed_dim)
    float32: the unit-length mean over frames of plain CLIP's features, None where head=False. draw: None for test frames; a
    number for that random draw of frames, crop and flip.
    """
    (rank, world), count = ranks.rank_of(), len(split.videos)
    size = max(1, min(ENCODE_VIDEOS, count // world))
    jobs = [np.arange(i, min(i + size, count)) for i in range(first, count, size)]
    begin, end = len(jobs) * rank // world, len(jobs) * (rank + 1) // world
    clips, jobs = reader.stream(split, jobs[begin:end], draw is not None, (draw or 0) * len(jobs) + begin), jobs[begin:end]
    for frames, indices in ranks.progress(clips, f'encoding {split.name} videos', len(jobs), unit_scale=size, unit='video'):
        if len(indices):
            with autocast:
                parts, features = model.frozen(frames.to(device, non_blocking=True), head)
            yield indices, parts, F.normalize(F.normalize(features.float(), dim=-1).mean(1), dim=-1) if head else None


def encode_frozen(model, split, reader, device, autocast, draw=None):
    """What `frozen_parts` gives of a whole split -> `videos`, the split without the videos that could not be read, and
    `frozen`, tensors (V, T, *, D) in memory, not on the GPU, float16 from CUDA and in training, else float32."""
    read, frozen = [], []
    for indices, parts, _ in frozen_parts(model, split, reader, device, autocast, draw, head=False):
        frozen.append([(x.half() if x.is_cuda or draw is not None else x.float()).cpu() for x in parts])
        read.append(indices)
    if not read:
        sys.exit(f'None of {len(split.videos)} {split.name} videos could be read.')
    read = ranks.gather_rows(torch.from_numpy(np.concatenate(read)))
    return subset(split, read), [ranks.gather_rows(torch.cat(parts)) for parts in zip(*frozen)]


def subset(split, indices):
    """The split with these videos alone."""
    return dataclasses.replace(split, videos=[split.videos[i] for i in indices], labels=split.labels[indices])


@torch.no_grad()
def encode(model, frozen, autocast):
    """`frozen` of encode_frozen -> what the aggregator needs of each video, whatever its episode.

    Returns `start` (V, D), Q*_0; and `tokens`, S-1 tensors (V, T*L, D) for the other levels, of frozen's device and dtype.
    Where no level looks at other videos the whole answer is the video's own: `start` is then Q_S and `tokens` is empty.
    """
    starts, tokens = [], []
    for parts in zip(*(x.split(ENCODE_VIDEOS) for x in frozen)):
        with autocast:
            kept = model.tokens(model.kept(parts))
            q = model.start(kept[0])
            if not model.mode:
                q, kept = model.aggregate(q[None], [k[None] for k in kept[1:]], len(q), False)[0], kept[:1]
        starts.append(q.float())
        tokens.append([k.to(parts[0]) for k in kept[1:]])
    return torch.cat(starts), [torch.cat(level) for level in zip(*tokens)]


def encode_split(config, clip, model, tested, split, reader, device, autocast):
    """Reads and encodes each video of a split once, for the models `tested`, whose frozen part is that of `model` -> a dict:

    videos (the split without those that could not be read), missing (how many could not), pooled (V, embed_dim), text
    (classes, embed_dim) where CLIP can read the class names, and kept: for each model what `encode` gives, tokens in half
    precision. With config['probe'] a video has 1 + len(PROBES) rows in `kept`, one after the other, else one.

    Each row is a record in memory or, if features_gb is too little or features_dir is given, in a file that grows by whole
    records: an interrupted run goes on from there, and the next one has nothing to encode.
    """
    began, (_, world), cuda = time.time(), ranks.rank_of(), torch.device(device).type == 'cuda'
    dim, embed_dim = clip.visual.proj.shape
    frames = list(range(config['frames']))
    orders = [frames]
    if tested and config['probe']:
        shuffled = np.random.default_rng(config['seed']).permutation(len(frames)).tolist()
        orders += [frames[::-1], [len(frames) // 2] * len(frames), shuffled]
    levels = config['levels'] - 1 if config['cross_video'] else 0
    length = len(frames) * (clip.visual.grid ** 2 + config['cls_token'])
    record = np.dtype([('index', 'i4'), ('pooled', 'f4', (embed_dim,)), ('start', 'f4', (len(tested), dim)),
                       ('tokens', 'f2', (len(tested), levels, length, dim))])
    size = len(orders) * record.itemsize  # of a video
    store, last = io.BytesIO(), -1
    if world == 1 and (config['features_dir'] or len(split.videos) * size > config['features_gb'] * 1e9):
        store, last = open_features(config, features_name(config, clip, tested, split), record, len(orders))
    for indices, parts, pooled in frozen_parts(model, split, reader, device, autocast, first=last + 1):
        rows = np.empty((len(indices), len(orders)), record)
        rows['index'], rows['pooled'] = indices[:, None], pooled.cpu()[:, None]
        for (o, order), (m, each) in itertools.product(enumerate(orders), enumerate(tested)):
            start, tokens = encode(each, [x[:, order] for x in parts], autocast)
            rows['start'][:, o, m] = start.cpu()
            for i, level in enumerate(tokens):
                rows['tokens'][:, o, m, i] = level.half().cpu()
        try:
            store.write(rows.tobytes())
            store.flush()
        except OSError as error:
            sys.exit(f'Cannot write the features into {store.name}: {error.strerror}; --features_dir= names another folder.')

    if isinstance(store, io.BytesIO):
        own = torch.from_numpy(np.frombuffer(store.getbuffer(), np.uint8) if store.tell() else np.empty(0, np.uint8))
        records, where = ranks.gather_rows(own).numpy().view(record), 'in memory'
    else:
        store.close()
        where = store.name
        records = np.memmap(where, record, 'c') if os.path.getsize(where) else np.empty(0, record)
    read = records['index'][::len(orders)]
    if not len(read):
        sys.exit(f'None of the {len(split.videos)} {split.name} videos could be read.')
    if (np.diff(read) <= 0).any():
        sys.exit(f'{where} was written by two runs at once: delete it.')
    kept = [(torch.from_numpy(records['start'][:, m]).to(device),
             [torch.from_numpy(records['tokens'][:, m, i]) for i in range(levels)]) for m in range(len(tested))]
    if cuda and records.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
        kept, where = [(start, [level.to(device) for level in tokens]) for start, tokens in kept], 'on the GPU'
    print(f'encoded {len(split.videos) - last - 1} of {len(split.videos)} {split.name} videos in {time.time() - began:.0f} s; '
          f'features: {size:,} bytes a video, {where}', flush=True)
    encoded = dict(videos=subset(split, read), missing=len(split.videos) - len(read), kept=kept,
                   pooled=torch.from_numpy(records['pooled'][::len(orders)]).to(device))
    if clip.vocab_size:
        try:
            encoded['text'] = clip_loader.zero_shot_weights(
                clip, clip_loader.tokenizer_of(clip), split.classes, config['templates']).to(device)
        except (OSError, ValueError) as error:
            print(f'no clip-zero-shot row: {error}')
    return encoded


def features_name(config, clip, tested, split):
    """A name that is another as soon as anything is that the features depend on."""
    about = [clip.weights_hash, clip.act, clip.visual.image_size, str(resolve_device(config)[1]), bool(config['cache_dir']),
             [config[key] for key in (*MODEL_OPTIONS, 'frozen_dtype', 'test_sampling', 'seed', 'probe')],
             [stamp(video) for video in split.videos]]
    digest = hashlib.sha256(json.dumps(about).encode())
    for model in tested:
        for name, value in trainable_state(model).items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return f'features_{split.name}_{digest.hexdigest()[:16]}.bin'


def open_features(config, name, record, orders):
    """-> a file of records to append to, without half a video at its end, and the index of the last video in it, or -1."""
    path = os.path.join(config['features_dir'] or config['out_dir'], name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, 'ab')
    except OSError as error:
        sys.exit(f'Cannot write the features into {path}: {error.strerror}; --features_dir= names another folder.')
    file.truncate(file.tell() // (orders * record.itemsize) * (orders * record.itemsize))
    return file, int(np.memmap(path, record, 'r')['index'][-1]) if os.path.getsize(path) else -1
