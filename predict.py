"""Labels for your own clips, from a few examples of each class.

    python predict.py --support=my_examples/ --query=new.mp4                              mean-pooled CLIP, nothing trained
    python predict.py --support=my_examples/ --query=clips/ --ckpt=runs/diving48/best.pt --top=3
    python predict.py --support=my_examples/ --query=long.mp4 --window=2.0 --stride=1.0 --csv=timeline.csv

my_examples/ holds a folder for each class with one or more clips, which are video files or folders of numbered frames.

In reading order: examples (read_examples, save_examples, load_examples), from frames to scores (encode_frames, follow,
encode_examples, score), long videos (windows, windows_apart, merge), queries (find_queries, labelled, answer).
Queries never see each other (inductive), so a label does not depend on what else is asked.
"""

import csv
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
from collections import deque

import av
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import eval as evaluation
from config import resolve_device
from decode import VIDEOS, Converter, UnreadableVideo, Video, number_in
from encoding import encode
from model import class_scores, inductive_mask, log_scores
from reader import ClipMaker, ClipReader

BATCH = 16  # clips encoded at a time
WINDOW_LIMIT = 600  # seconds for a window, and before the first one for measuring the whole file


# ---- Examples

def read_examples(folder):
    """A folder with a folder for each class -> data.Split. Stops with one sentence when it has fewer than two classes."""
    entries = list(os.scandir(folder))
    loose = [entry.name for entry in entries if entry.name.lower().endswith(VIDEOS)]
    if loose:
        print(f'Warning: {folder} holds {len(loose)} clips outside of class folders, such as {loose[0]}; left out.',
              file=sys.stderr)
    names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    if len(names) < 2:
        sys.exit(f'{folder} holds {len(names)} class folders, not two or more with clips or folders of frames in each.')
    found = [sorted(video for _, video in data.list_folders(os.path.join(folder, name))) for name in names]
    labels = np.repeat(np.arange(len(names)), [len(videos) for videos in found])
    return data.Split('support', names, sum(found, []), labels)


def identity(config, clip):
    """What encoded examples depend on: they serve another call only if all of it is equal."""
    checkpoint = None
    if config['ckpt']:
        with open(config['ckpt'][0], 'rb') as file:
            checkpoint = hashlib.sha256(file.read()).hexdigest()
    return dict(checkpoint=checkpoint, weights=clip.weights_hash, act=clip.act, image_size=clip.visual.image_size,
                **{key: config[key] for key in ('frames', 'test_sampling', 'resize', 'norm', 'frozen_dtype')})


def save_examples(path, examples):
    """torch.save, whole or not at all."""
    try:
        torch.save(examples, path + '.tmp')
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where the folder is missing
        sys.exit(f'Cannot write {path}: {error}')


def load_examples(path, made, device):
    """The dict that save_examples wrote. Stops with one sentence when it is none or `made` differs."""
    try:
        examples = torch.load(path, map_location=device, weights_only=True)
        differing = [key for key in made if examples['made'].get(key) != made[key]]
    except FileNotFoundError:
        sys.exit(f'There is no {path}: support is a folder of classes, or a file written by --save_support.')
    except Exception as error:
        sys.exit(f'{path} is no file of --save_support ({type(error).__name__}), and no folder of classes.')
    if differing:
        def brief(value):
            return value[:12] if isinstance(value, str) else value
        sys.exit(f'The examples in {path} were encoded otherwise: ' + ', '.join(
            f'{key} {brief(examples["made"].get(key))} (now {brief(made[key])})' for key in differing) + '.')
    return examples


# ---- From frames to scores

@torch.no_grad()
def encode_frames(model, frames, trained, device, autocast):
    """Frames (V, T, 3, H, W) uint8 -> what encoding.encode gives: `start` (V, D), `tokens`; untrained: mean-pooled CLIP, []."""
    with autocast:
        frozen, features = model.frozen(frames.to(device), head=not trained)
    if trained:
        return encode(model, frozen, autocast)
    return F.normalize(F.normalize(features.float(), dim=-1).mean(1), dim=-1), []


@torch.no_grad()
def follow(model, q, tokens, supports=None):
    """VBA.aggregate in inductive mode, supports and queries apart: supports do not look at queries, so they go first, once.

    q (V, D) and tokens as of encoding.encode -> [Q*_0, ..., Q*_{S-1}, Q_S], each (V, D) float32. supports: this list of the
    supports, when q are queries. A model without cross-video attention: [Q_S], which is q.
    """
    if not model.mode:
        return [q]
    others = supports or [q[:0]] * len(model.levels)
    n = len(others[0])
    mask = inductive_mask(n + len(q), n, q.device) if supports else None  # supports all see each other
    path = []
    for i, level in enumerate(model.levels):
        if i > 0:
            q = level.cross_frame(q, tokens[i - 1])
        path.append(q.float())
        q = level.cross_video(torch.cat([others[i], path[-1]]), mask)[n:]
    return [*path, q.float()]


def jobs(split):
    """Indices of all its videos, BATCH at a time."""
    return [np.arange(i, min(i + BATCH, len(split.videos))) for i in range(0, len(split.videos), BATCH)]


def encode_examples(model, split, reader, trained, device, autocast):
    """A Split -> dict(classes, labels (V,), paths, features): the readable videos and what queries need to know of them."""
    starts, tokens, read = [], [], []
    for frames, indices in tqdm(reader.stream(split, jobs(split), train=False), 'encoding examples', leave=False, disable=None):
        if len(indices):
            start, levels = encode_frames(model, frames, trained, device, autocast)
            starts.append(start)
            tokens.append(levels)
            read.extend(indices.tolist())
    labels = torch.from_numpy(split.labels[read])
    for label, name in enumerate(split.classes):
        if label not in labels:
            sys.exit(f'Class {name!r} has no clip that could be read: each class needs one.')
    with autocast:
        features = follow(model, torch.cat(starts), [torch.cat(level) for level in zip(*tokens)])
    return dict(classes=split.classes, labels=labels.to(device), paths=[split.videos[i].path for i in read], features=features)


def score(support, query, labels, temp, trained):
    """Features (V, D) and (M, D), labels (V,) in 0..N-1 -> scores (M, N) that add up to 1 for each query.

    Trained: the mean over a class's examples of softmax(temp * cosine) over all examples, (3.6) and (3.10), over the sum of
    these means. Untrained: softmax(temp * cosine) over the classes' mean features. Either way a class gains nothing by having
    more examples.
    """
    if trained:
        features = torch.cat([support, query])[None]
        means = class_scores(log_scores(features, len(support), temp), labels, int(labels.max()) + 1)[0]
        return means / means.sum(-1, keepdim=True)
    members = F.one_hot(labels).to(support)  # (V, N)
    prototypes = F.normalize((members / members.sum(0)).T @ support, dim=-1)
    return (temp * query @ prototypes.T).softmax(-1)


# ---- Long videos

def measure(path):
    """A video file -> (pts of the first frame, length in seconds), by its packets: headers are not to be trusted.

    The pts is None where time stamps are missing (raw H.264): seconds are then the frame's number over the rate.
    """
    first, last, count, timed = math.inf, -math.inf, 0, True
    with av.open(f'file:{path}', metadata_errors='ignore') as container:
        stream = container.streams.best('video')
        if stream is None:
            raise ValueError('no video stream')
        step = 1 / frame_rate(stream)
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    count, timed = count + 1, timed and packet.pts is not None
                    if timed:
                        first = min(first, packet.pts)
                        last = max(last, packet.pts + (packet.duration or step / stream.time_base))
        except av.FFmpegError:
            pass  # cut short: what came before is used
        return (first, float((last - first) * stream.time_base)) if timed and count else (None, count * step)


def frame_rate(stream):
    return float(stream.average_rate or stream.guessed_rate or 25)


def timed_frames(path, first):
    """A video file and the pts of its first frame -> yields (decoded frame, its second) in order, but for what is damaged."""
    with av.open(f'file:{path}', metadata_errors='ignore') as container:
        stream, number = container.streams.best('video'), 0
        stream.thread_type = 'AUTO'
        packets = container.demux(stream)
        while True:
            try:
                for frame in stream.codec_context.decode(next(packets)):
                    counted = first is None or frame.pts is None
                    yield frame, number / frame_rate(stream) if counted else float((frame.pts - first) * stream.time_base)
                    number += 1
            except StopIteration:
                return
            except av.FFmpegError:
                pass


def windows(path, config, image_size):
    """Slides over a video file -> yields (start, end, clip uint8 (T, 3, H, W)) in order, times in seconds from the first frame.

    A window's T frames are those on show in the middles of its T equal parts of time, whatever the frame rate. The last window
    ends with the video; a video shorter than a window is one window. The video is decoded once, and of what is decoded only
    the cropped frames of windows that are not full yet are kept. Raises UnreadableVideo.
    """
    number, stride = config['frames'], config['stride']
    convert, maker = Converter(config['resize']), ClipMaker(config, image_size)
    opened, k, done = deque(), 0, 0  # opened: windows that are not full yet, (start, frames so far)
    try:
        if os.path.isdir(path):
            raise ValueError('a folder of frames has no seconds, windows need a video file')
        first, length = measure(path)
        width = min(config['window'], length)
        count = math.ceil((length - width) / stride - 1e-6) + 1
        frames = itertools.chain(timed_frames(path, first), [(None, math.inf)])
        for (frame, _), (_, until) in itertools.pairwise(frames):  # a frame is on show until the next one
            picture, more = None, True
            while more:
                for start, clip in opened:
                    while len(clip) < number and start + (len(clip) + 0.5) * width / number < until - 1e-6:
                        if picture is None:
                            picture = maker.crop(np.stack([convert(frame)]), None)[0]
                        clip.append(picture)
                while opened and len(opened[0][1]) == number:
                    start, clip = opened.popleft()
                    yield start, start + width, torch.stack(clip)
                    done += 1
                more = k < count and (start := min(k * stride, length - width)) < until
                if more:
                    opened.append((start, []))
                    k += 1
        if not done:
            raise ValueError('no frame could be decoded')
    except Exception as error:  # a damaged file can make a demuxer or decoder raise anything
        raise UnreadableVideo(f'{path}: {getattr(error, "strerror", None) or error or type(error).__name__}') from error


def windows_apart(path, config, image_size):
    """The same from a process of its own: a file that crashes the decoder, or on which it hangs, does no harm to this one."""
    context = multiprocessing.get_context('forkserver')
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send_windows, args=(theirs, path, config, image_size), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            if not ours.poll(WINDOW_LIMIT):
                raise UnreadableVideo(f'{path}: no window decoded within {WINDOW_LIMIT} s')
            match ours.recv():
                case start, end, frames:
                    yield start, end, torch.from_numpy(frames)
                case None:
                    return
                case error:
                    raise UnreadableVideo(error)
    except (EOFError, OSError):  # its end, between two windows or within one
        raise UnreadableVideo(f'{path}: the decoder crashed on it') from None
    finally:
        process.kill()
        process.join()


def send_windows(pipe, path, config, image_size):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    try:
        for start, end, clip in windows(path, config, image_size):
            pipe.send((start, end, clip.numpy()))
        pipe.send(None)
    except UnreadableVideo as error:
        pipe.send(str(error))


def merge(rows):
    """Windows (start, end, class, score) in order -> yields the same with neighbours of one class joined, scores averaged.

    Where windows of two classes overlap, the boundary is the middle of the overlap.
    """
    run = None  # start, end, class, sum of scores, windows
    for start, end, name, value in rows:
        if run and run[2] == name:
            run = [run[0], end, name, run[3] + value, run[4] + 1]
            continue
        if run:
            middle = (run[1] + start) / 2
            yield run[0], min(run[1], middle), run[2], run[3] / run[4]
            start = max(start, middle)
        run = [start, end, name, value, 1]
    if run:
        yield run[0], run[1], run[2], run[3] / run[4]


# ---- Queries

def find_queries(query):
    """A clip, a folder of clips (below it too), a folder of frames, a pattern, or a list of these -> paths. What is not there
    stays in the list, to be named when it is read."""
    paths = []
    for item in query if isinstance(query, list) else [query]:
        item = os.path.normpath(item)
        if os.path.isdir(item):
            found = sorted((video.path for _, video in data.list_folders(item)), key=number_in)
        else:
            found = [] if os.path.exists(item) else sorted(glob.glob(item), key=number_in)
        paths += found or [item]
    shorter = (min(path, os.path.relpath(path), key=len) for path in paths)
    return list(dict.fromkeys(shorter))


def whole_clips(paths, reader):
    """Yields (path, None, None, clip uint8 (T, 3, H, W), or what is wrong with it) for each path."""
    split = data.Split('query', [''], [Video(path) for path in paths], np.zeros(len(paths), np.int64))
    for job, (frames, read) in zip(jobs(split), reader.stream(split, jobs(split), train=False)):
        clips = dict(zip(read.tolist(), frames))
        yield from ((paths[i], None, None, clips[i] if i in clips else reader.bad[split.videos[i]]) for i in job)


def all_windows(paths, config, image_size):
    """Yields (path, start, end, clip) for each window of each path, and (path, None, None, what is wrong) where it fails."""
    for path in paths:
        try:
            slide = windows if config['workers'] == 0 else windows_apart
            yield from ((path, *window) for window in slide(path, config, image_size))
        except UnreadableVideo as error:
            print(f'Warning: unreadable video {error}; left out.', file=sys.stderr, flush=True)
            yield path, None, None, str(error)


def labelled(clips, label):
    """An iterator of (path, start, end, clip or a word) -> the same with a list of N scores for each clip, BATCH at a time."""
    while batch := list(itertools.islice(clips, BATCH)):
        good = [clip for *_, clip in batch if not isinstance(clip, str)]
        scores = iter(label(torch.stack(good)).tolist() if good else [])
        for *where, clip in batch:
            yield *where, clip if isinstance(clip, str) else next(scores)


def answer(config, classes, rows, method):
    """Prints what `labelled` yields, query by query, and writes --csv. Returns the paths that failed."""
    failed = {}

    def good(path, rows):  # -> (start, end, scores)
        for _, start, end, scores in rows:
            if isinstance(scores, str):
                failed[path] = scores
                continue
            span = [''] * 2 if start is None else [f'{start:.3f}', f'{end:.3f}']
            table.writerow([path, *span, classes[np.argmax(scores)], *(f'{score:.4f}' for score in scores)])
            yield start, end, scores

    try:
        file = open(config['csv'] or os.devnull, 'w', newline='', encoding='utf-8')
    except OSError as error:
        sys.exit(f'Cannot write {config["csv"]}: {error.strerror}.')
    with file:
        table = csv.writer(file)
        table.writerow(['query', 'start', 'end', 'class', *classes])
        for path, rows_of_path in itertools.groupby(rows, key=lambda row: row[0]):
            found, say = dict(query=path, method=method), (lambda *words: None) if config['json'] else print
            if config['window']:
                say(path)
                found['timeline'] = []
                for start, end, name, value in merge((start, end, classes[np.argmax(scores)], max(scores))
                                                     for start, end, scores in good(path, rows_of_path)):
                    found['timeline'].append(dict(start=start, end=end, name=name, score=value))
                    say(f'{start:9.1f} {end:9.1f} s   {value:.3f}  {name}')
            for _, _, scores in () if config['window'] else good(path, rows_of_path):
                best = sorted(zip(scores, classes), reverse=True)[:config['top']]
                found['classes'] = [dict(name=name, score=value) for value, name in best]
                say(path + ': ' + ', '.join(f'{name} {value:.3f}' for value, name in best))
            if config['json']:
                print(json.dumps(found | (dict(error=failed[path]) if path in failed else {})))
            sys.stdout.flush()
    return failed


def main():
    config, checkpoints = evaluation.configure(sys.argv[1:])
    if len(checkpoints) > 1:
        sys.exit(f'predict.py takes one checkpoint, not {len(checkpoints)}.')
    config.update(cache_gb=0.0, cache_dir=None)  # every clip is read once
    if not config['support'] or not (config['query'] or config['save_support']):
        sys.exit('predict.py needs --support=<a folder with a folder per class> and --query=<clips>.')
    if config['window'] < 0:
        sys.exit(f'window={config["window"]:g} must be positive, or 0 for one label a clip.')
    device, dtype = resolve_device(config)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype is not torch.float32)
    clip = evaluation.load_clip(config)
    model, trained, size = evaluation.build(config, clip), bool(checkpoints), clip.visual.image_size
    if trained:
        evaluation.restore(model, clip, checkpoints[0], config['ckpt'][0])
    else:
        model.mode = False  # plain CLIP's videos do not see each other
    model.to(device)

    reader = ClipReader(config, size)
    try:
        made = identity(config, clip)
        if os.path.isdir(config['support']):
            examples = encode_examples(model, read_examples(config['support']), reader, trained, device, autocast)
        else:
            examples = load_examples(config['support'], made, device)
        if config['save_support']:
            save_examples(config['save_support'], dict(examples, made=made))
        if not config['query']:
            return
        classes, labels, features = examples['classes'], examples['labels'], examples['features']

        def label(frames):  # uint8 (M, T, 3, H, W) -> scores (M, N)
            start, tokens = encode_frames(model, frames, trained, device, autocast)
            with autocast:  # not around the line above: an autocast that is entered twice is never left
                query = follow(model, start, tokens, features)[-1]
            return score(features[-1], query, labels, config['temp'], trained)

        method, counts = 'vba-inductive' if trained else 'clip-mean-pool', sorted(set(labels.bincount().tolist()))
        if not config['json']:
            print(f'{method}, {len(classes)} classes, {" to ".join(map(str, (counts[0], *counts[1:][-1:])))} examples each; '
                  f'scores: softmax({config["temp"]:g} * cosine), adding up to 1 over the classes', flush=True)
        paths = find_queries(config['query'])
        clips = all_windows(paths, config, size) if config['window'] else whole_clips(paths, reader)
        failed = answer(config, classes, labelled(clips, label), method)
    finally:
        reader.close()
    if failed:
        sys.exit(f'{len(failed)} of {len(paths)} queries could not be read.')


if __name__ == '__main__':
    main()
