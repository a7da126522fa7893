"""From videos on disk to episodes of frames. In reading order:

    Video, Split, load_splits          which videos there are, their classes, and which classes train, validate and test
    episode                            the N-way K-shot sampler
    sample_indices, read_frames        which frames of a video, and those frames exactly, whatever the container
    ClipMaker                          one video -> one clip: decoding, its cache, crop and flip
    ClipReader, Worker, work           many clips at once, in processes that may crash without harm
"""

import difflib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import connection, forkserver
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter

VIDEOS = ('.mp4', '.avi', '.webm', '.mkv', '.mov', '.m4v', '.mpg', '.mpeg', '.wmv', '.flv', '.3gp', '.ts', '.ogv')
IMAGES = ('.jpg', '.jpeg', '.png')
TIME_LIMIT = 60  # seconds that one video may take before its worker is killed and the video counts as unreadable


# ---- Which videos there are

class Video(NamedTuple):
    """A file or a folder of numbered images. The clip is frames start .. end - 1; None: from the first, to the last."""
    path: str
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class Split:
    """The videos of some classes: videos[i] is of class classes[labels[i]]; labels int64."""
    name: str
    classes: list
    videos: list
    labels: np.ndarray

    @cached_property
    def members(self):
        """For each class the indices of its videos."""
        return [np.flatnonzero(self.labels == label) for label in range(len(self.classes))]


def load_splits(config):
    """The configuration -> dict(train=Split, val=Split, test=Split). Stops with one sentence where the data does not fit."""
    prepare(config)
    videos = list_folders(config['data_root'])  # [(class name, Video), ...]
    if not videos:
        sys.exit(f'{config["data_root"]} holds no videos: expected a folder per class with videos or folders of images in it.')
    by_class = {}
    for name, video in sorted(videos, key=lambda item: item[1].path):
        by_class.setdefault(plain(name), []).append((name, video))
    return {split: make_split(split, names, by_class) for split, names in split_classes(config, by_class).items()}


def prepare(config):
    """Makes the data where it is missing and the config names a script for it (the demo), whole or not at all."""
    root = config['data_root']
    if os.path.isdir(root):
        return
    if not config['prepare']:
        sys.exit(f'There is no folder {root}: set data_root to where the videos of {config["dataset"] or "the dataset"} are.')
    print(f'{root} is not there: running {config["prepare"]} to make it.', flush=True)
    part = root.rstrip('/') + '.part'
    shutil.rmtree(part, ignore_errors=True)
    if subprocess.run([sys.executable, config['prepare'], '--out', part]).returncode:
        sys.exit(f'{config["prepare"]} failed, so there is no data in {root}: see its message above.')
    os.replace(part, root)


def list_folders(root):
    """Walks a folder -> [(class name, Video), ...]. A folder of images is one video; the class is the folder above a video."""
    folders, names = [], []
    for entry in os.scandir(root):
        (folders if entry.is_dir() else names).append(entry.path)
    videos = [path for path in names if path.lower().endswith(VIDEOS)]
    if not videos and any(path.lower().endswith(IMAGES) for path in names):
        return [(os.path.basename(os.path.dirname(root)), Video(root))]
    return ([(os.path.basename(root), Video(path)) for path in videos]
            + [item for folder in sorted(folders) for item in list_folders(folder)])


def plain(name):
    """Class names are the same if their letters and digits are."""
    return re.sub(r'[\W_]', '', str(name)).lower()


def split_classes(config, by_class):
    """-> dict(train=[class name, ...], val=..., test=...), from lists, from fractions, or from folders of these names."""
    splits = config['splits']
    if splits is None:
        root = os.path.join(config['data_root'], '')
        splits = {split: [items[0][0] for items in by_class.values() if items[0][1].path.startswith(root + split + os.sep)]
                  for split in ('train', 'val', 'test')}
        if not splits['train']:
            sys.exit('splits is not set: name the classes, splits=dict(train=[...], val=[...], test=[...]), or give fractions, '
                     'splits=dict(train=0.6, val=0.2, test=0.2).')
    wrong = set(splits) - {'train', 'val', 'test'}
    if wrong:
        sys.exit(f'splits may hold train, val and test, not {", ".join(sorted(map(str, wrong)))}.')
    if any(isinstance(part, float) for part in splits.values()):
        names = [by_class[key][0][0] for key in sorted(by_class)]
        random.Random(config['seed']).shuffle(names)
        ends = np.cumsum([splits.get(split, 0) for split in ('train', 'val', 'test')])
        if ends[-1] > 1 + 1e-9:
            sys.exit(f'splits: the fractions add up to {ends[-1]:g}, more than 1.')
        ends = [0, *np.round(ends * len(names)).astype(int)]
        splits = {split: sorted(names[a:b]) for split, a, b in zip(('train', 'val', 'test'), ends, ends[1:])}
    seen = {}
    for split, names in splits.items():
        for name in names:
            if plain(name) in seen:
                sys.exit(f'splits: class {name!r} stands in {seen[plain(name)]} and in {split}.')
            seen[plain(name)] = split
    return {split: splits.get(split, []) for split in ('train', 'val', 'test')}


def make_split(split, names, by_class):
    """Split `split` of the classes `names`, in their order, each class's videos sorted by path."""
    videos, labels = [], []
    for label, name in enumerate(names):
        if plain(name) not in by_class:
            near = [by_class[key][0][0] for key in difflib.get_close_matches(plain(name), by_class, 3, 0.5)]
            sys.exit(f'Class {name!r} of split {split} has no video; ' + (f'near names: {", ".join(map(repr, near))}.' if near
                     else f'the data has {len(by_class)} classes, such as {next(iter(by_class.values()))[0][0]!r}.'))
        found = [video for _, video in by_class[plain(name)]]
        videos += found
        labels += [label] * len(found)
    return Split(split, [str(name) for name in names], videos, np.array(labels, np.int64))


# ---- Episodes

def episode(split, way, shot, queries, seed, number):
    """Episode `number` of seed `seed` -> (way * (shot + queries),) int64, indices into split.videos.

    The supports first, class by class, then the queries, class by class; no video twice. A function of its arguments alone.
    """
    if len(split.classes) < way:
        sys.exit(f'Split {split.name} has {len(split.classes)} classes, too few for {way}-way episodes: lower way.')
    smallest = min(split.members, key=len)
    if len(smallest) < shot + queries:
        name = split.classes[split.labels[smallest[0]]]
        sys.exit(f'Class {name!r} of split {split.name} has {len(smallest)} videos, too few for'
                 f' {shot} supports and {queries} queries: lower the shots or the queries, or leave the class out.')
    rng = np.random.default_rng([seed, number])
    classes = rng.choice(len(split.classes), way, replace=False)
    drawn = np.stack([rng.choice(split.members[c], shot + queries, replace=False) for c in classes])
    return np.concatenate([drawn[:, :shot].ravel(), drawn[:, shot:].ravel()])


# ---- Frames

def sample_indices(n, frames, rng=None):
    """TSN: n frames in `frames` equal parts, one frame of each -> (frames,) int64, sorted. n < frames repeats indices.

    rng None takes each part's middle, a numpy Generator a random frame of each.
    """
    edges = np.arange(frames + 1) * n // frames
    low, high = edges[:-1], np.maximum(edges[:-1] + 1, edges[1:])
    return (low + high) // 2 if rng is None else rng.integers(low, high)


class UnreadableVideo(Exception):
    """Its message names the path and says what is wrong."""


def read_frames(path, pick, short_side):
    """Frames of a video file or a folder of images -> uint8 (len(indices), h, w, 3), RGB, the right way up.

    pick: function from the number n of frames to sorted indices (repeats allowed). The short side becomes `short_side` unless
    it is smaller already. Exact: frame i is the i-th frame that decoding everything in order yields.
    Raises UnreadableVideo. What decodes of a damaged file is used.
    """
    try:
        if os.path.isdir(path):
            names = sorted((name for name in os.listdir(path) if name.lower().endswith(IMAGES)), key=number_in)
            indices = list(pick(len(names))) if names else []
            pictures = {i: read_image(os.path.join(path, names[i]), short_side) for i in set(indices)}
        else:
            with av.open(f'file:{path}', metadata_errors='ignore') as container:
                pictures, indices = decode(container, pick, short_side)
        if not pictures:
            raise ValueError('no frame could be decoded')
        return np.stack([pictures[i] for i in indices])
    except Exception as error:  # a damaged file can make a demuxer or decoder raise anything
        raise UnreadableVideo(f'{path}: {getattr(error, "strerror", None) or error or type(error).__name__}') from error


def number_in(name):
    """Sorts frame2.jpg before frame10.jpg."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


def read_image(path, short_side):
    """One image file -> uint8 (h, w, 3)."""
    with open(path, 'rb') as file:
        return decode_image(file.read(), short_side)


def decode_image(data, short_side):
    """The bytes of a JPEG or PNG -> uint8 (h, w, 3)."""
    codec = av.CodecContext.create('png' if data[:4] == b'\x89PNG' else 'mjpeg', 'r')
    codec.thread_count = 1
    frames = codec.decode(av.Packet(data)) + codec.decode(None)
    return Converter(short_side)(frames[0])


class Converter:
    """Decoded frames -> uint8 (h, w, 3), all of the size that the first one gets. One thread: swscale's own choice is slow."""

    def __init__(self, short_side):
        self.short_side, self.size, self.reformatter = short_side, None, VideoReformatter()

    def __call__(self, frame):
        if self.size is None:
            scale = min(1, self.short_side / min(frame.width, frame.height))
            self.size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        picture = self.reformatter.reformat(frame, *self.size, 'rgb24', interpolation='BILINEAR', threads=1).to_ndarray()
        return np.rot90(picture, frame.rotation // 90)


def decode(container, pick, short_side):
    """An open container -> {index: picture}, indices. All packets first: their number is n, headers are not to be trusted."""
    stream = container.streams.best('video')
    if stream is None:
        raise ValueError('no video stream')
    codec, convert, packets = stream.codec_context, Converter(short_side), []
    codec.thread_count = 1  # workers fill the cores
    try:
        packets.extend(packet for packet in container.demux(stream) if packet.size)
    except av.FFmpegError:
        pass  # cut short: what came before is used
    shown = [packet for packet in packets if not packet.is_discard]
    indices = list(pick(len(shown))) if shown else []
    pts = sorted(packet.pts for packet in shown if packet.pts is not None)
    if (codec.name in ('h264', 'hevc') and container.format.name != 'avi'  # avi has no pts, what it shows is made up
            and len(set(pts)) == len(packets) and not any(packet.is_corrupt for packet in packets)):
        pictures = decode_some(codec, packets, [pts[i] for i in dict.fromkeys(indices)], convert)
        if pictures is not None:
            return {i: pictures[pts[i]] for i in indices}, indices
        codec.flush_buffers()
    pictures, count, fed = decode_in_order(codec, packets, indices, convert)
    if count != fed:  # not a frame for each packet: count all frames, then choose again
        codec.flush_buffers()
        count = decode_in_order(codec, packets, None, convert)[1]
        codec.flush_buffers()
        indices = list(pick(count)) if count else []
        pictures = decode_in_order(codec, packets, indices, convert)[0]
    return pictures, indices


def decode_some(codec, packets, wanted, convert):
    """The frames with the pts in `wanted` (sorted) -> {pts: picture}; None if one does not come out whole.

    Decodes no group of pictures without a wanted frame, and no frame that is neither wanted nor referred to.
    """
    place = {packet.pts: i for i, packet in enumerate(packets)}
    keys = [(packet.pts, i) for i, packet in enumerate(packets) if packet.is_keyframe]
    targets, pictures, latest, position = set(wanted), {}, -float('inf'), 0
    # hevc: a picture that its own temporal layer does not refer to may be referred to by a higher one
    skip = 'NONREF' if codec.name == 'h264' else 'DEFAULT'

    def take(frames):
        nonlocal latest
        for frame in frames:
            if frame.is_corrupt or frame.pts is None or frame.pts <= latest:
                raise ValueError('frames are damaged or out of order')
            latest = frame.pts
            if latest in targets:
                pictures[latest] = convert(frame)

    try:
        for pts in wanted:
            start = max((i for key, i in keys if key <= pts), default=0)
            if start > position:  # on to a later group of pictures
                take(codec.decode(None))
                codec.flush_buffers()
                position = start
            for packet in packets[position:place[pts] + 1]:
                codec.skip_frame = 'DEFAULT' if packet.pts in targets else skip
                take(codec.decode(packet))
            position = max(position, place[pts] + 1)
        take(codec.decode(None))
    except (av.FFmpegError, ValueError):
        return None
    finally:
        codec.skip_frame = 'DEFAULT'
    return pictures if len(pictures) == len(targets) else None


def decode_in_order(codec, packets, wanted, convert):
    """The frames `wanted` (None: only count), counted as they come out, whatever their pts -> {index: picture}, the frames that
    came out of the packets that went in, and how many these were: it stops at the last wanted one."""
    pictures, count, fed, last = {}, 0, 0, float('inf') if wanted is None else max(wanted, default=-1)
    targets = set(wanted or [])
    for packet in [*packets, None]:
        if packet is not None and count > last:
            continue  # on to the end: the decoder still holds frames
        fed += packet is not None
        try:
            for frame in codec.decode(packet):
                if count in targets:
                    pictures[count] = convert(frame)
                count += 1
        except av.FFmpegError:
            pass  # a damaged packet
    return pictures, count, fed


# ---- Clips

class ClipMaker:
    """Turns one video into one clip, and keeps decoded frames in at most `room` bytes so that they are not decoded again.

    Of a training video `cache_frames` evenly spaced frames are kept (all, if it has no more), and TSN draws among those of each
    part; a draw is the same whether the frames were kept or not. Of a test video the T test frames are kept.
    What is kept stays: under uniform sampling a full cache serves its share of the videos, where eviction would only churn.
    """

    def __init__(self, config, image_size, room):
        self.config, self.image_size, self.room, self.cache = config, image_size, room, {}

    def clip(self, video, seed):
        """Video, seed (a list of ints for a training clip; None: middle frames, centre crop) -> uint8 (T, 3, H, W)."""
        if seed is None:
            return self.crop(self.frames(video), None)
        return self.crop(self.frames(video, [*seed, 0]), np.random.default_rng([*seed, 1]))

    def frames(self, video, seed=None):
        """(T, h, w, 3): TSN frames, in training random ones by the seed."""
        config = self.config
        number = config['frames']

        def choose(n):
            if seed is not None:
                return sample_indices(n, number, np.random.default_rng(seed))
            random_test = config['test_sampling'] == 'random'  # one fixed draw for a video, so that features can be kept
            return sample_indices(n, number, np.random.default_rng([config['seed'], crc(video)]) if random_test else None)

        def candidates(n):
            most = max(config['cache_frames'], number)
            return np.arange(n) if seed is None or n <= most else sample_indices(n, most)

        def pick(n, drawn=True):
            first, end = video.start or 0, min(n, video.end or n)
            if first >= end:
                raise ValueError(f'its clip begins at frame {first} and ends at {video.end}, but it has {n} frames')
            kept = candidates(end - first)
            return first + (kept[choose(len(kept))] if drawn else kept)

        if self.room <= 0:
            return read_frames(video.path, pick, config['resize'])
        key = (*video, seed is None)
        kept = self.cache.get(key)
        if kept is None:
            kept = read_frames(video.path, lambda n: pick(n, drawn=seed is None), config['resize'])
            self.room -= kept.nbytes
            if self.room >= 0:
                self.cache[key] = kept
        return kept if seed is None else kept[choose(len(kept))]

    def crop(self, frames, rng):
        """(T, h, w, 3) -> (T, 3, H, W): in training one random crop and one decision to flip for the whole clip.

        The crop covers 0.5 to 1 of the area at an aspect of 3/4 to 4/3: gentler than ImageNet's 0.08, near the field's 224/256.
        Otherwise the centre: image_size of `resize`, as if the short side were `resize`, so that nothing is scaled twice.
        """
        size, (height, width) = self.image_size, frames.shape[1:3]
        if rng is None or self.config['augment'] == 'none':
            h = w = max(1, round(min(height, width) * min(1, size / self.config['resize'])))
            top, left = (height - h) // 2, (width - w) // 2
        else:
            area, aspect = height * width * rng.uniform(0.5, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            h = int(np.clip(round((area / aspect) ** 0.5), 1, height))
            w = int(np.clip(round((area * aspect) ** 0.5), 1, width))
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        clip = torch.from_numpy(frames[:, top:top + h, left:left + w]).permute(0, 3, 1, 2)
        if (h, w) != (size, size):
            clip = F.interpolate(clip, (size, size), mode='bilinear', antialias=True)
        return clip.flip(3) if rng is not None and self.config['flip'] and rng.random() < 0.5 else clip


def crc(video):
    """The same number for the same path in every process, which hash() is not."""
    return zlib.crc32(os.fsencode(video.path))


# ---- Many clips at once

class ClipReader:
    """Reads clips in `workers` processes (0: in this one) and hands them over in order.

    A video always goes to the same worker, so each worker's cache is its own and nothing is decoded twice. A worker that
    crashes or exceeds TIME_LIMIT on a video is replaced, the video counts as unreadable, and the run goes on.
    """

    def __init__(self, config, image_size):
        self.config = config
        self.shape = (config['frames'], 3, image_size, image_size)
        self.bad = {}  # path -> why it cannot be read
        self.pin = config['device'] != 'cpu' and torch.cuda.is_available()
        count, room = config['workers'], config['cache_gb'] * 1e9
        slots = int(np.clip(256e6 // (np.prod(self.shape) * max(count, 1)), 4, 64))  # clips a worker may be ahead
        self.maker = None if count else ClipMaker(config, image_size, room)
        # forkserver: forking this process would copy torch's threads' locks, spawning would import torch for every worker
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['torch', 'av', 'data'])
        if count:
            forkserver.ensure_running()  # it imports while the caller goes on
        self.workers = [Worker(context, slots, self.shape, (config, image_size, room / count)) for _ in range(count)]
        self.ahead = count * slots

    def stream(self, split, jobs, train, first=0):
        """Yields (frames uint8 (n, T, 3, H, W), indices int64 (n,)) for each job, an array of indices into split.videos.

        A job may have any shape (..., n), which the frames then have too; its rows are episodes. train: random frames, crop and
        flip by (seed, job number from `first` on, place in the job) alone; an unreadable video is replaced by another of its
        class that is not in its episode, and indices say which. Not train: test frames and centre crop; jobs have one axis, and
        unreadable videos are missing from frames and indices. Either way each unreadable video is warned of once.
        """
        numbered, opened = enumerate(jobs, first), deque()
        try:
            while True:
                while not opened or sum(job.indices.size for job in list(opened)[1:]) < self.ahead:
                    number, indices = next(numbered, (None, None))
                    if number is None:
                        break
                    opened.append(Job(split, np.array(indices, np.int64), train, number, self.shape, self.pin))
                    self.submit(opened[-1], range(opened[-1].indices.size))
                if not opened:
                    return
                job = opened[0]
                self.finish(job)
                opened.popleft()
                yield job.result()
        finally:
            for job in opened:
                job.dropped = True

    def submit(self, job, places, urgent=False):
        """Puts clips of a job into their workers' queues."""
        for place in places:
            video = job.split.videos[job.indices.flat[place]]
            seed = [self.config['seed'], job.number, place, job.tries[place]] if job.train else None
            if video.path in self.bad:
                job.failed.append(place)
            elif self.workers:
                job.pending += 1
                queue = self.workers[crc(video) % len(self.workers)].waiting
                (queue.appendleft if urgent else queue.append)((job, place, video, seed))
            else:
                try:
                    job.frames[place] = self.maker.clip(video, seed)
                except UnreadableVideo as error:
                    self.fail(job, place, video, str(error))
        for worker in self.workers:
            worker.feed()

    def finish(self, job):
        """Waits for all clips of a job; in training replaces those that failed, in an order that depends on the job alone."""
        while True:
            while job.pending:
                self.pump()
            if not job.failed or not job.train:
                return
            places, job.failed = sorted(job.failed), []
            for place in places:
                job.replace(place, self.config['seed'])
            self.submit(job, places, urgent=True)

    def fail(self, job, place, video, reason):
        job.failed.append(place)
        if video.path not in self.bad:
            self.bad[video.path] = reason
            if self.config['strict']:
                sys.exit(f'Unreadable video {reason} (strict=False leaves such videos out).')
            print(f'Warning: unreadable video {reason};', 'another of its class takes its place.' if job.train else 'left out.',
                  file=sys.stderr, flush=True)

    def pump(self):
        """Takes in what workers have finished, looks after those that died or hang, and gives them more to do."""
        started = [worker for worker in self.workers if worker.process is not None]
        ready = connection.wait([worker.conn for worker in started], timeout=0.5)
        for worker in started:
            alive = True
            while alive and worker.conn in ready and worker.conn.poll():
                try:
                    slot, error = worker.conn.recv()
                except (EOFError, OSError):
                    alive = False
                    break
                job, place, video, _ = worker.take(slot)
                job.pending -= 1
                if error:
                    self.fail(job, place, video, error)
                elif not job.dropped:
                    job.frames[place] = worker.arena[slot]
            hung = alive and worker.sent and worker.conn not in ready and time.monotonic() - worker.since > TIME_LIMIT
            if hung or not alive:
                guilty = worker.restart(forgive=not hung)
                if guilty:
                    job, place, video, _ = guilty
                    job.pending -= 1
                    self.fail(job, place, video, f'{video.path}: ' + (f'not decoded within {TIME_LIMIT} s' if hung else
                                                                      'the decoder crashed on it'))
            worker.feed()

    def close(self):
        """Ends the workers."""
        for worker in self.workers:
            worker.stop()
        self.workers = []


class Job:
    """An array of videos that are wanted together. The rows of its last axis are episodes."""

    def __init__(self, split, indices, train, number, shape, pin):
        self.split, self.indices, self.train, self.number = split, indices, train, number
        self.frames = torch.empty(indices.size, *shape, dtype=torch.uint8, pin_memory=pin)
        self.tries = [0] * indices.size  # how often a place has been given another video
        self.used = [set(row) for row in indices.reshape(-1, indices.shape[-1]).tolist()]  # videos that an episode has seen
        self.pending, self.failed, self.dropped = 0, [], False

    def replace(self, place, seed):
        """Puts another video of the same class in a place."""
        used = self.used[place // self.indices.shape[-1]]
        label = self.split.labels[self.indices.flat[place]]
        others = [i for i in self.split.members[label].tolist() if i not in used]
        if not others:
            sys.exit(f'Class {self.split.classes[label]!r} of split {self.split.name} has too few readable videos for an '
                     f'episode: leave it out, or lower the shots or the queries.')
        self.tries[place] += 1
        chosen = others[np.random.default_rng([seed, self.number, place, self.tries[place], 2]).integers(len(others))]
        used.add(chosen)
        self.indices.flat[place] = chosen

    def result(self):
        if self.failed:
            keep = np.setdiff1d(np.arange(self.indices.size), self.failed)
            return self.frames[torch.from_numpy(keep)], self.indices[keep]
        return self.frames.unflatten(0, self.indices.shape), self.indices


class Worker:
    """This side of one decoding process. It writes clips into slots of shared memory; only words go through the pipe."""

    def __init__(self, context, slots, shape, args):
        self.context, self.shape, self.args = context, (slots, *shape), args
        self.free, self.waiting, self.sent = list(range(slots)), deque(), {}  # sent: slot -> task, in order
        self.process, self.deaths, self.crashed = None, 0, set()

    def feed(self):
        """Sends tasks as long as slots are free."""
        while self.waiting and self.free:
            task = self.waiting.popleft()
            job, _, video, seed = task
            if job.dropped:
                continue
            if self.process is None:
                self.start()
            if not self.sent:
                self.since = time.monotonic()
            slot = self.free.pop()
            self.sent[slot] = task
            try:
                self.conn.send((slot, tuple(video), seed))
            except OSError:
                return  # dead: pump will notice

    def take(self, slot):
        """The task that a slot was for; the slot is free again once the caller has copied it, before the next feed."""
        self.since, self.deaths = time.monotonic(), 0
        self.free.append(slot)
        return self.sent.pop(slot)

    def start(self):
        memory = self.context.RawArray('B', int(np.prod(self.shape)))
        self.arena = torch.frombuffer(memory, dtype=torch.uint8).view(self.shape)
        self.conn, theirs = self.context.Pipe()
        self.process = self.context.Process(target=work, args=(theirs, memory, self.shape, *self.args), daemon=True)
        self.process.start()
        theirs.close()

    def restart(self, forgive):
        """A new process for one that died or hangs -> the task it was at. forgive: a first death is tried again (None)."""
        self.stop()
        self.deaths += 1
        if self.deaths > 9:
            sys.exit('Decoding processes die as soon as they start; run with --workers=0 to see why.')
        tasks = list(self.sent.values())
        self.free += self.sent
        self.sent = {}
        guilty = tasks.pop(0) if tasks else None
        if guilty and forgive and guilty[2].path not in self.crashed:  # it may have been killed for another's sake
            self.crashed.add(guilty[2].path)
            tasks.insert(0, guilty)
            guilty = None
        self.waiting.extendleft(reversed(tasks))
        return guilty

    def stop(self):
        if self.process is not None:
            self.conn.close()
            self.process.kill()
            self.process.join()
            self.process = None


def work(conn, memory, shape, config, image_size, room):
    """A decoding process: takes (slot, video, seed), fills the slot, answers (slot, None or what is wrong)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process by closing the pipe
    torch.set_num_threads(1)
    arena = torch.frombuffer(memory, dtype=torch.uint8).view(shape)
    maker = ClipMaker(config, image_size, room)
    while True:
        try:
            slot, video, seed = conn.recv()
        except (EOFError, OSError):
            return
        error = None
        try:
            arena[slot] = maker.clip(Video(*video), seed)
        except UnreadableVideo as unreadable:
            error = str(unreadable)
        conn.send((slot, error))
