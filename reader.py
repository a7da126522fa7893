"""Clips, many at once. In reading order:

    ClipMaker                          one video -> one clip: frames, what is kept of them, crop, flip and jitter
    MemoryStore, DiskStore             frames that are kept, so that they are not decoded again
    ClipReader, Job, Worker, work      the same for whole episodes, in processes that may crash without harm
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections import deque, namedtuple
from multiprocessing import connection, forkserver, resource_tracker
from types import SimpleNamespace

import av
import numpy as np
import torch
import torch.nn.functional as F

from decode import UnreadableVideo, Video, clip_range, decode_image, encode_images, read_frames, sample_indices, stamp

RANKS = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # that torchrun started on this machine
START = 'forkserver' if hasattr(os, 'fork') else 'spawn'  # how processes start; Windows knows the second alone
TIME_LIMIT = 60  # seconds that one video may take before its worker is killed and the video counts as unreadable


class ClipMaker:
    """Turns one video into one clip, and keeps decoded frames in its share of cache_gb: what fits is not decoded twice.

    Of a training video `cache_frames` evenly spaced frames are kept (all, if it has no more), and TSN draws among those of each
    part; a draw is the same whether the frames were kept or not. Of a test video the T test frames are kept.
    What is kept stays: under uniform sampling a full cache serves its share of the videos, where eviction would only churn.
    """

    def __init__(self, config, image_size, processes=1):
        self.config, self.image_size, room = config, image_size, config['cache_gb'] * 1e9
        self.store = DiskStore(config['cache_dir'], room, processes) if config['cache_dir'] else MemoryStore(room / processes)

    def clip(self, video, seed):
        """Video, seed (a list of ints for a training clip; None: test frames, centre crop) -> uint8 (T, 3, H, W)."""
        if seed is None:
            return self.crop(self.frames(video), None, video.place)
        return self.crop(self.frames(video, [*seed, 0]), np.random.default_rng([*seed, 1]))

    def frames(self, video, seed=None):
        """(T, h, w, 3): TSN frames, in training random ones by the seed."""
        config = self.config
        number, most = config['frames'], max(config['cache_frames'], config['frames'])
        if seed is not None:
            what = ('candidates', most)
        else:  # random test frames are one fixed draw for a video, so that features can be kept
            what = ('middle', number) if config['test_sampling'] == 'middle' else ('random', number, config['seed'])

        def keep(n):  # what is kept of a video of n frames
            first, end = clip_range(video, n)
            if seed is not None:
                return np.arange(first, end) if end - first <= most else first + sample_indices(end - first, most)
            rng = np.random.default_rng([config['seed'], crc(video)]) if what[0] == 'random' else None
            return first + sample_indices(end - first, number, rng, video.at)

        def draw(n):  # what is drawn of n kept ones
            return np.arange(n) if seed is None else sample_indices(n, number, np.random.default_rng(seed))

        key = (*stamp(video), config['resize'], *what)
        frames = self.store.read(key, draw)
        if frames is not None:
            return frames
        if self.store.room > 0:
            kept = read_frames(video.path, keep, config['resize'])
            self.store.write(key, kept)
            drawn = kept[draw(len(kept))]
        else:
            drawn = read_frames(video.path, lambda n: keep(n)[draw(len(keep(n)))], config['resize'])
        return self.store.like_kept(drawn)

    def check(self, video):
        """Reads the test frames -> number of frames of the clip, and what is wrong though it can be read, or None."""
        numbers, notes = [], []

        def pick(n):
            first, end = clip_range(video, n)
            numbers.append(end - first)
            return first + sample_indices(end - first, self.config['frames'])

        read_frames(video.path, pick, self.config['resize'], notes)
        return numbers[-1], '; '.join(notes) or None

    def crop(self, frames, rng, place=0.5):
        """(T, h, w, 3) -> (T, 3, H, W): in training one random crop and one decision to flip for the whole clip.

        The crop covers 0.5 to 1 of the area at an aspect of 3/4 to 4/3: gentler than ImageNet's 0.08, near the field's 224/256.
        Otherwise the centre, or another `place` along the longer side: image_size of `resize`, as if the short side were
        `resize`, so that nothing is scaled twice.
        """
        size, (height, width) = self.image_size, frames.shape[1:3]
        if rng is None or self.config['augment'] == 'none':
            h = w = max(1, round(min(height, width) * min(1, size / self.config['resize'])))
            top = int((height - h) * (place if height > width else 0.5))
            left = int((width - w) * (place if width >= height else 0.5))
        else:
            area, aspect = height * width * rng.uniform(0.5, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            h = int(np.clip(round((area / aspect) ** 0.5), 1, height))
            w = int(np.clip(round((area * aspect) ** 0.5), 1, width))
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        clip = torch.from_numpy(frames[:, top:top + h, left:left + w]).permute(0, 3, 1, 2)
        if (h, w) != (size, size):
            clip = F.interpolate(clip, (size, size), mode='bilinear', antialias=True)
        if rng is not None and self.config['flip'] and rng.random() < 0.5:
            clip = clip.flip(3)
        return jitter(clip, rng) if rng is not None and self.config['augment'] == 'randaug' else clip


def jitter(clip, rng):
    """uint8 (T, 3, H, W) -> the same with one draw of colour and geometry for the whole clip: brightness, contrast and
    saturation 0.7 to 1.3, hue up to 18 degrees, turned up to 10 degrees, sheared up to 0.1, 0.9 to 1.1 of the size."""
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, 3)
    hue, turn = np.radians(rng.uniform((-18, -10), (18, 10)))
    grey, cross = np.full((3, 3), 1 / 3), np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3 ** 0.5
    colour = np.cos(hue) * (np.eye(3) - grey) + grey + np.sin(hue) * cross  # a rotation about the grey axis
    colour = (saturation * np.eye(3) + (1 - saturation) * np.array([0.299, 0.587, 0.114])) @ colour
    colour, shift = brightness * contrast * colour, 128 * (1 - contrast)
    shear, scale = rng.uniform(-0.1, 0.1, 2), rng.uniform(0.9, 1.1)
    place = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0]])
    place[:, :2] = place[:, :2] @ np.array([[1, shear[0]], [shear[1], 1]]) / scale
    grid = F.affine_grid(torch.tensor(place, dtype=torch.float32)[None], (1, 1, *clip.shape[2:]), align_corners=False)
    moved = F.grid_sample(clip.float().flatten(0, 1)[None], grid, padding_mode='reflection', align_corners=False)
    moved = torch.tensor(colour, dtype=torch.float32) @ moved.view(*clip.shape[:2], -1)
    return moved.add_(shift).round_().clamp_(0, 255).byte().view(clip.shape)


class MemoryStore:
    """Frames kept in memory as they are."""

    def __init__(self, room):
        self.room, self.kept = room, {}

    def read(self, key, choose):
        """-> frames choose(number of frames kept) of `key`, or None."""
        return self.kept[key][choose(len(self.kept[key]))] if key in self.kept else None

    def write(self, key, frames):
        """Keeps frames (n, h, w, 3) if there is room."""
        self.room -= frames.nbytes
        if self.room >= 0:
            self.kept[key] = frames

    def like_kept(self, frames):
        """Frames as `read` gives them if they have been kept, so that no result depends on what fits."""
        return frames


class DiskStore:
    """Frames kept in a folder as JPEGs. Each process appends to files of its own and reads those of all that came before.

    A video's line in the index is written after its frames: a crash leaves a video out, never half in.
    At short side 256 and ffmpeg's q 3 a frame takes some 12 KB (a training video of 32 frames 390 KB) at 40 dB PSNR.
    """

    def __init__(self, folder, room, processes):
        os.makedirs(folder, exist_ok=True)
        self.folder, self.index, self.mine = folder, {}, f'{time.time_ns()}-{os.getpid()}'
        names = os.listdir(folder)
        self.room = (room - sum(os.path.getsize(os.path.join(folder, name)) for name in names)) / processes
        for name in names:
            if name.endswith('.index'):
                with open(os.path.join(folder, name), encoding='ascii') as file:
                    self.index.update((tuple(key), (name[:-6], *place)) for key, *place in
                                      (json.loads(line) for line in file if line.endswith('\n')))

    def read(self, key, choose):
        if key not in self.index:
            return None
        name, offset, sizes = self.index[key]
        rows, starts = choose(len(sizes)).tolist(), np.cumsum([offset, *sizes])
        try:
            pictures = {}
            with open(os.path.join(self.folder, name + '.jpegs'), 'rb') as file:
                for i in set(rows):
                    file.seek(starts[i])
                    pictures[i] = decode_image(file.read(sizes[i]), float('inf'))
        except (OSError, av.FFmpegError, IndexError):  # lost in a crash of the machine, or deleted
            del self.index[key]
            return None
        return np.stack([pictures[i] for i in rows])

    def write(self, key, frames):
        images = encode_images(frames)
        sizes = [len(image) for image in images]
        self.room -= sum(sizes)
        if self.room > 0:
            try:
                with open(os.path.join(self.folder, self.mine + '.jpegs'), 'ab') as file:
                    offset = file.tell()
                    file.write(b''.join(images))
                with open(os.path.join(self.folder, self.mine + '.index'), 'a', encoding='ascii') as file:
                    file.write(json.dumps([key, offset, sizes]) + '\n')
                self.index[key] = self.mine, offset, sizes
            except OSError as error:
                self.room = 0
                print(f'Warning: nothing more is kept in {self.folder}: {error.strerror}', file=sys.stderr, flush=True)

    def like_kept(self, frames):
        return np.stack([decode_image(image, float('inf')) for image in encode_images(frames)])


def worker_count(config):
    """`workers`, or the cores that this process may use, at most 16, shared out to the ranks of torchrun."""
    if config['workers'] is not None:
        return config['workers']
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, min(cores, 16) // RANKS)


def crc(video):
    """The same number for the same path in every process, which hash() is not."""
    return zlib.crc32(os.fsencode(video.path))


# A video's clip that is wanted for a place of a job. seed: as ClipMaker.clip has it; 'check': not a clip but a verdict
Task = namedtuple('Task', 'job place video seed')


class ClipReader:
    """Reads clips in `workers` processes (0: in this one) and hands them over in order.

    A video always goes to the same worker, so each worker's cache is its own and nothing is decoded twice. A worker that
    crashes or exceeds TIME_LIMIT on a video is replaced, the video counts as unreadable, and the run goes on.
    """

    def __init__(self, config, image_size):
        self.config, self.shape = config, (config['frames'], 3, image_size, image_size)
        self.bad = {}  # Video -> why it cannot be read
        self.pin = config['device'] != 'cpu' and torch.cuda.is_available()
        count = worker_count(config)
        slots = int(np.clip(256e6 // (np.prod(self.shape) * max(count, 1)), 4, 64))  # clips a worker may be ahead
        self.ahead = count * slots
        self.maker = None if count else ClipMaker(config, image_size, RANKS)
        # forkserver: forking this process would copy torch's threads' locks, spawning would import torch for every worker
        context = multiprocessing.get_context(START)
        context.set_forkserver_preload(['torch', 'av', 'reader'])
        if count and START == 'forkserver':
            resource_tracker.ensure_running()  # else forkserver starts it, and it lets Ctrl-C through again
            # Ctrl-C is this process's to handle, not that of those which it starts
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                forkserver.ensure_running()  # it imports while the caller goes on
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.workers = [Worker(context, slots, self.shape, (config, image_size, count * RANKS)) for _ in range(count)]

    def stream(self, split, jobs, train):
        """Yields (frames uint8 (n, T, 3, H, W), indices int64 (n,)) for each job, (number, array of indices into split.videos).

        A job is an episode (n,) or several (E, n), and the frames have this shape too; `number` is that of its first episode.
        train: random frames, crop and flip by (seed, number of the episode, place in it) alone; an unreadable video is replaced
        by another of its class that is not in its episode, and indices say which. Not train: test frames and centre crop; jobs
        have one axis, and unreadable videos are missing from frames and indices. Either way each of them is warned of once.
        """
        if train and self.config['flip']:
            warn_of_sides(split)
        opened = deque()
        try:
            for number, indices in jobs:
                job = Job(split, number, indices, self.config['seed'] if train else None, self.shape, self.pin)
                opened.append(job)
                for place in range(job.indices.size):
                    self.submit(job.task(place))
                while opened and sum(job.indices.size for job in opened) - opened[0].indices.size >= self.ahead:
                    yield self.finish(opened.popleft())
            while opened:
                yield self.finish(opened.popleft())
        finally:  # of a stream that is left early, what is not begun is not wanted
            for worker in self.workers:
                worker.waiting = deque(task for task in worker.waiting if task.job not in opened)

    def check(self, videos):
        """Yields (video, number of frames, what is wrong though it can be read or None, why it cannot be read or None)."""
        job = SimpleNamespace(done={})
        for place, video in enumerate(videos):
            self.submit(Task(job, place, video, 'check'))
        for _ in videos:
            while not job.done:
                self.pump()
            place, (verdict, error) = job.done.popitem()
            yield videos[place], *(verdict or (0, None)), error

    def submit(self, task):
        """Has a task done, in time or, without workers, at once."""
        if task.video in self.bad:
            self.settle(task, None, self.bad[task.video])
        elif self.workers:
            worker = self.workers[crc(task.video) % len(self.workers)]
            worker.waiting.append(task)
            worker.feed()
        else:
            self.settle(task, *attempt(self.maker, task.video, task.seed))

    def settle(self, task, result, error):
        """Takes in what has become of a task: a clip or a verdict, or else what is wrong."""
        if isinstance(result, torch.Tensor):  # torch's threads would wait for cores that workers keep busy
            task.job.frames[task.place].numpy()[:], result = result.numpy(), None
        if error and task.seed != 'check' and task.video not in self.bad:
            self.bad[task.video] = error
            if self.config['strict']:
                sys.exit(f'Unreadable video {error} (strict=False leaves such videos out).')
            outcome = 'left out' if task.seed is None else 'another of its class takes its place'
            print(f'Warning: unreadable video {error}; {outcome}.', file=sys.stderr, flush=True)
        task.job.done[task.place] = result, error

    def finish(self, job):
        """Waits for all clips of a job -> frames, indices. In training replaces those that failed, until none has."""
        while True:
            while len(job.done) < job.indices.size:
                self.pump()
            failed = sorted(place for place, (_, error) in job.done.items() if error)
            if not failed or job.seed is None:
                return job.result(failed)
            job.replace(failed)
            for place in failed:
                self.submit(job.task(place))

    def pump(self):
        """Takes in what workers have finished, looks after those that died or hang, and gives them more to do."""
        started = [worker for worker in self.workers if worker.process is not None]
        ready = connection.wait([worker.conn for worker in started], timeout=0.5)
        for worker in started:
            for answer in worker.answers(worker.conn in ready):
                self.settle(*answer)
            worker.feed()

    def close(self):
        """Ends the workers."""
        for worker in self.workers:
            worker.stop()


class Job:
    """An array of videos that are wanted together. The rows of its last axis are episodes; seed None: of a test."""

    def __init__(self, split, number, indices, seed, shape, pin):
        self.split, self.number, self.indices, self.seed = split, number, np.array(indices, np.int64), seed
        self.frames = torch.empty(self.indices.size, *shape, dtype=torch.uint8, pin_memory=pin)
        self.used = [set(row) for row in self.indices.reshape(-1, self.indices.shape[-1]).tolist()]  # that an episode has seen
        self.tries = 0  # how often videos have been replaced
        self.done = {}  # place -> (None, why it cannot be read or None)

    def task(self, place):
        video = self.split.videos[self.indices.flat[place]]
        return Task(self, place, video, None if self.seed is None else self.seed_of(place))

    def seed_of(self, place):
        row, column = divmod(place, self.indices.shape[-1])
        return [self.seed, self.number + row, column, self.tries]

    def replace(self, places):
        """Puts other videos of the same classes in places, in an order that depends on the job alone."""
        self.tries += 1
        for place in places:
            used = self.used[place // self.indices.shape[-1]]
            label = self.split.labels[self.indices.flat[place]]
            others = [i for i in self.split.members[label].tolist() if i not in used]
            if not others:
                sys.exit(f'Class {self.split.classes[label]!r} of split {self.split.name} has too few readable videos for an '
                         f'episode: leave it out, or lower the shots or the queries.')
            chosen = others[np.random.default_rng([*self.seed_of(place), 2]).integers(len(others))]
            used.add(chosen)
            self.indices.flat[place] = chosen
            del self.done[place]

    def result(self, failed):
        """-> frames (*, T, 3, H, W), indices (*), without the places that failed."""
        if failed:
            keep = np.setdiff1d(np.arange(self.indices.size), failed)
            return self.frames[torch.from_numpy(keep)], self.indices[keep]
        return self.frames.unflatten(0, self.indices.shape), self.indices


class Worker:
    """This side of one decoding process. It writes clips into slots of shared memory; only words go through the pipe."""

    def __init__(self, context, slots, shape, args):
        self.context, self.shape, self.args = context, (slots, *shape), args
        self.waiting, self.sent = deque(), deque()  # tasks; (slot, task) for those that the process has, in order
        self.slots = itertools.cycle(range(slots))
        self.process, self.deaths, self.crashed = None, 0, set()

    def feed(self):
        """Sends tasks as long as slots are free."""
        while self.waiting and len(self.sent) < self.shape[0]:
            if self.process is None:
                self.start()
            if not self.sent:
                self.since = time.monotonic()
            slot, task = next(self.slots), self.waiting.popleft()
            self.sent.append((slot, task))
            with contextlib.suppress(OSError):  # dead: `answers` will notice
                self.conn.send((slot, tuple(task.video), task.seed))  # a plain tuple pickles in half the time

    def answers(self, ready):
        """Yields (task, result, error) of what is finished; a clip is to be copied before the next `feed`."""
        died = hung = False
        try:
            while ready and self.conn.poll():
                result, error = self.conn.recv()
                slot, task = self.sent.popleft()
                self.since, self.deaths = time.monotonic(), 0
                yield task, result if result or error else self.arena[slot], error
            hung = self.sent and time.monotonic() - self.since > TIME_LIMIT
        except (EOFError, OSError):
            died = True
        if died or hung:
            yield from self.give_up(died)

    def give_up(self, died):
        """Ends a process that died or hangs, and yields the answer to what it was at; a first death is tried again."""
        self.stop()
        self.deaths += 1
        if self.deaths > 9:
            sys.exit('Decoding processes die as soon as they start; run with --workers=0 to see why.')
        tasks = [task for _, task in self.sent]
        self.sent.clear()
        if tasks:
            video = tasks[0].video
            if died and video not in self.crashed:
                self.crashed.add(video)  # the process may have been killed for another's sake
            else:
                reason = 'the decoder crashed on it' if died else f'not decoded within {TIME_LIMIT} s'
                yield tasks.pop(0), None, f'{video.path}: {reason}'
        self.waiting.extendleft(reversed(tasks))

    def start(self):
        memory = self.context.RawArray('B', int(np.prod(self.shape)))
        self.arena = torch.frombuffer(memory, dtype=torch.uint8).view(self.shape)
        self.conn, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, memory, self.shape, *self.args), daemon=True)
        process.start()  # may be interrupted
        self.process = process
        theirs.close()

    def stop(self):
        if self.process is not None:
            self.conn.close()
            self.process.kill()
            self.process.join()
            self.process = None


def work(conn, memory, shape, config, image_size, processes):
    """A decoding process: takes (slot, video, seed), fills the slot, answers (verdict or None, what is wrong or None)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process by closing the pipe
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    arena = torch.frombuffer(memory, dtype=torch.uint8).view(shape)
    maker = ClipMaker(config, image_size, processes)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has closed the pipe, or is gone
        while True:
            slot, video, seed = conn.recv()
            result, error = attempt(maker, Video(*video), seed)
            if isinstance(result, torch.Tensor):
                arena[slot], result = result, None
            conn.send((result, error))


def end_with_parent():
    """Ends this process when the parent is gone, even one that was killed while this process waits for a file."""
    multiprocessing.parent_process().join()
    os._exit(0)


def attempt(maker, video, seed):
    """-> a clip or a verdict, and None; or None, and what is wrong."""
    try:
        return maker.check(video) if seed == 'check' else maker.clip(video, seed), None
    except UnreadableVideo as error:
        return None, str(error)


def warn_of_sides(split):
    """Says which classes name a side, for a mirrored clip of those is of another class."""
    side = re.compile(r'(?<![a-z])(left|right|((anti|counter)[- _]?)?clockwise)(?![a-z])')
    sided = [name for name in split.classes if side.search(re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', name).lower())]
    if sided:
        print(f'Warning: flip is on, but {len(sided)} classes of {split.name} name a side: {", ".join(map(repr, sided[:5]))}'
              f'{", ..." if len(sided) > 5 else ""}. Set flip=False.', file=sys.stderr, flush=True)
