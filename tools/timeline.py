"""Windows that slide over long videos, and the timeline of their labels: what `predict.py --window=2.0` adds.

In reading order: measure, timed_frames, windows (from a file to clips in time); windows_apart, all_windows (the same from a
process of its own, for many files); stretches, merge (neighbours of one class are one stretch).
"""

import itertools
import math
import multiprocessing
import os
import signal
import sys
from collections import deque

import av
import numpy as np
import torch

from decode import Converter, UnreadableVideo, open_video
from reader import START, ClipMaker

WINDOW_LIMIT = 600  # seconds for a window, and before the first one for measuring the whole file


def measure(path):
    """A video file -> (pts of the first frame, length in seconds), by its packets: headers are not to be trusted.

    The pts is None where time stamps are missing (raw H.264): seconds are then the frame's number over the rate.
    """
    first, last, count, timed = math.inf, -math.inf, 0, True
    container, stream = open_video(path)
    with container:
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
    container, stream = open_video(path)
    with container:
        number = 0
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
    context = multiprocessing.get_context(START)
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


def all_windows(paths, config, image_size):
    """Yields (path, start, end, clip) for each window of each path, and (path, None, None, what is wrong) where it fails."""
    for path in paths:
        try:
            slide = windows if config['workers'] == 0 else windows_apart
            yield from ((path, *window) for window in slide(path, config, image_size))
        except UnreadableVideo as error:
            print(f'Warning: unreadable video {error}; left out.', file=sys.stderr, flush=True)
            yield path, None, None, str(error)


def stretches(rows, classes, config):
    """Windows (start, end, scores (N,)) in order -> yields (start, end, class, score), neighbours of one class joined.

    With config['smooth'] each window's scores are first the mean over that many windows around it; with config['least'] a
    stretch of fewer seconds goes to its neighbours, half to each. Both wait for the last window.
    """
    if config['smooth'] == 1 and not config['least']:
        yield from merge((start, end, classes[np.argmax(scores)], max(scores)) for start, end, scores in rows)
        return
    rows, smooth = list(rows), config['smooth']
    scores = [np.mean([near for *_, near in rows[max(0, i - (smooth - 1) // 2):i + smooth // 2 + 1]], 0)
              for i in range(len(rows))]
    best = np.array([each.argmax() for each in scores])
    while len(best):
        runs = list(itertools.pairwise([0, *np.flatnonzero(np.diff(best)) + 1, len(best)]))
        first, end = min(runs, key=lambda run: run[1] - run[0])
        if len(runs) == 1 or (end - first) * config['stride'] >= config['least']:
            break
        before, after = best[first - 1 if first else end], best[end if end < len(best) else first - 1]
        middle = (first + end + 1) // 2
        best[first:middle], best[middle:end] = before, after
    yield from merge((start, end, classes[i], each[i]) for (start, end, _), i, each in zip(rows, best, scores))


def merge(rows):
    """Windows (start, end, class, score) in order -> yields the same with neighbours of one class joined, scores averaged.

    Where windows of two classes overlap, the boundary is the middle of the overlap; where there are seconds between windows,
    which none has seen, the stretch ends.
    """
    run = None  # start, end, class, sum of scores, windows
    for start, end, name, value in rows:
        if run and run[2] == name and start < run[1] + 1e-6:
            run = [run[0], end, name, run[3] + value, run[4] + 1]
            continue
        if run:
            middle = (run[1] + start) / 2
            yield run[0], min(run[1], middle), run[2], run[3] / run[4]
            start = max(start, middle)
        run = [start, end, name, value, 1]
    if run:
        yield run[0], run[1], run[2], run[3] / run[4]
