"""Frames of a video, exactly. In reading order:

    Video, UnreadableVideo, stamp      a clip of a file or of a folder of images
    sample_indices                     which frames: TSN
    read_frames, decode                those frames, whatever the container, and no more work than they need
    decode_image, encode_images        JPEG and PNG
"""

import os
import re
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

VIDEOS = ('.mp4', '.avi', '.webm', '.mkv', '.mov', '.m4v', '.mpg', '.mpeg', '.wmv', '.flv', '.3gp', '.ts', '.ogv', '.gif')
IMAGES = ('.jpg', '.jpeg', '.png')


class Video(NamedTuple):
    """A file or a folder of numbered images. The clip is frames start .. end - 1; None: from the first, to the last.

    at, place: which view of it a test takes, of several: where in each of its T parts the frame lies, and where along the
    longer side the crop does.
    """
    path: str
    start: int | None = None
    end: int | None = None
    at: float = 0.5
    place: float = 0.5


class UnreadableVideo(Exception):
    """Its message names the path and says what is wrong."""


def stamp(video):
    """What tells a video from others, and from itself once its file has changed or gone."""
    part = video[1:3] if (video.at, video.place) == (0.5, 0.5) else video[1:]
    try:
        status = os.stat(video.path)
    except OSError:
        return video.path, None, None, *part
    return video.path, status.st_size, status.st_mtime_ns, *part


def clip_range(video, n):
    """First frame and end of the clip in a video of n frames."""
    first, end = video.start or 0, min(n, video.end or n)
    if first >= end:
        raise ValueError(f'its clip begins at frame {first} and ends at {video.end}, but it has {n} frames')
    return first, end


def sample_indices(n, frames, rng=None, at=0.5):
    """TSN: n frames in `frames` equal parts, one frame of each -> (frames,) int64, sorted. n < frames repeats indices.

    rng None takes each part's middle, or what lies `at` this share of it; a numpy Generator a random frame of each.
    """
    edges = np.arange(frames + 1) * n // frames
    low, high = edges[:-1], np.maximum(edges[:-1] + 1, edges[1:])
    return low + ((high - low) * at).astype(np.int64) if rng is None else rng.integers(low, high)


def read_frames(path, pick, short_side, notes=None):
    """Frames of a video file or a folder of images -> uint8 (len(indices), h, w, 3), RGB, the right way up.

    pick: function from the number n of frames to sorted indices (repeats allowed). The short side becomes `short_side` unless
    it is smaller already. Exact: frame i is the i-th frame that decoding everything in order yields.
    Raises UnreadableVideo. What decodes of a damaged file is used; `notes`, a list, is told what is wrong with it.
    """
    try:
        if os.path.isdir(path):
            names = sorted((name for name in os.listdir(path) if name.lower().endswith(IMAGES)), key=number_in)
            indices = list(pick(len(names))) if names else []
            pictures = {i: read_image(os.path.join(path, names[i]), short_side) for i in set(indices)}
        else:
            with av.open(f'file:{path}', metadata_errors='ignore') as container:
                pictures, indices = decode(container, pick, short_side, [] if notes is None else notes)
        if not pictures:
            raise ValueError('no frame could be decoded')
        if len({picture.shape for picture in pictures.values()}) > 1:
            raise ValueError('its images are of different sizes')
        return np.stack([pictures[i] for i in indices])
    except Exception as error:  # a damaged file can make a demuxer or decoder raise anything
        raise UnreadableVideo(f'{path}: {getattr(error, "strerror", None) or error or type(error).__name__}') from error


def number_in(name):
    """Sorts frame2.jpg before frame10.jpg."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


class Converter:
    """Decoded frames -> uint8 (h, w, 3), all of the size that the first one gets. One thread: swscale's own choice is slow."""

    def __init__(self, short_side):
        self.short_side, self.size, self.reformatter, self.damaged = short_side, None, VideoReformatter(), False

    def __call__(self, frame):
        if self.size is None:
            scale = min(1, self.short_side / min(frame.width, frame.height))
            self.size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        self.damaged |= frame.is_corrupt
        picture = self.reformatter.reformat(frame, *self.size, 'rgb24', interpolation='BILINEAR', threads=1).to_ndarray()
        return np.rot90(picture, frame.rotation // 90)


def decode(container, pick, short_side, notes):
    """An open container -> {index: picture}, indices. All packets first: their number is n, headers are not to be trusted."""
    stream = container.streams.best('video')
    if stream is None:
        raise ValueError('no video stream')
    codec, convert, packets = stream.codec_context, Converter(short_side), []
    codec.thread_count = 1  # workers fill the cores
    try:
        packets.extend(packet for packet in container.demux(stream) if packet.size)
    except av.FFmpegError as error:
        notes.append(f'cut short: {error.strerror}')  # what came before is used
    missing = missing_seconds(container, stream, packets)
    if missing and not notes:
        notes.append(f'cut short: {missing:.1f} s less than its header says')
    shown = [packet for packet in packets if not packet.is_discard]
    # XviD begins with packets of one byte that hold no frame; that they do not, the count below makes sure
    empty = sum(packet.size == 1 for packet in shown) if codec.name == 'mpeg4' else 0
    indices = list(pick(len(shown) - empty)) if len(shown) > empty else []
    pts = sorted(packet.pts for packet in shown if packet.pts is not None)
    if (codec.name in ('h264', 'hevc') and container.format.name != 'avi'  # avi has no pts, what it shows is made up
            and len(set(pts)) == len(packets) and not any(packet.is_corrupt for packet in packets)):
        pictures = decode_some(codec, packets, [pts[i] for i in dict.fromkeys(indices)], convert)
        if pictures is not None:
            return {i: pictures[pts[i]] for i in indices}, indices
        codec.flush_buffers()
    pictures, count, fed = decode_in_order(codec, packets, indices, convert, to_end=empty)
    if count != fed - empty:  # not a frame for each packet: count all frames, then choose again
        codec.flush_buffers()
        count = decode_in_order(codec, packets, None, convert)[1]
        codec.flush_buffers()
        indices = list(pick(count)) if count else []
        pictures = decode_in_order(codec, packets, indices, convert)[0]
    if convert.damaged:
        notes.append('damaged frames')
    return pictures, indices


def missing_seconds(container, stream, packets):
    """How much shorter the packets are than the header promises, 0 if not clearly so."""
    promised = (float(stream.duration * stream.time_base) if stream.duration else
                container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0)
    times = [packet.dts if packet.pts is None else packet.pts for packet in packets]
    times = [time for time in times if time is not None]
    if not times or not promised:
        return 0
    missing = promised - float((max(times) - min(times) + (packets[-1].duration or 0)) * stream.time_base)
    return missing if missing > max(0.3, 0.05 * promised) else 0


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


def decode_in_order(codec, packets, wanted, convert, to_end=False):
    """The frames `wanted` (None: only count), counted as they come out, whatever their pts -> {index: picture}, the frames that
    came out of the packets that went in, and how many these were: without to_end it stops at the last wanted one."""
    pictures, count, fed, last = {}, 0, 0, float('inf') if wanted is None or to_end else max(wanted, default=-1)
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


def encode_images(frames, quality=3):
    """uint8 (n, h, w, 3) -> n JPEGs as bytes; quality is ffmpeg's q, 2 is the finest."""
    codec = av.CodecContext.create('mjpeg', 'w')
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *frames.shape[1:3], 'yuvj420p', Fraction(1, 25)
    codec.qmin = codec.qmax = quality
    codec.thread_count = 1
    pictures = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), 'rgb24') for frame in frames)
    return [bytes(packet) for picture in pictures for packet in codec.encode(picture.reformat(format='yuvj420p', threads=1))]
