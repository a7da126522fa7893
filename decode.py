"""Frames of a video, exactly. In reading order:

    Video, UnreadableVideo, stamp      a clip of a file or of a folder of images
    sample_indices                     which frames: TSN
    read_frames                        those frames of a file or folder, and what is wrong with it
    open_video, Source, Converter      a file as often as it is decoded; decoded frames -> pictures
    decode                             decode_some, no more work than those frames need, or else decode_in_order
    decode_image, encode_images        JPEG and PNG
"""

import itertools
import logging
import os
import re
import stat
from collections import namedtuple
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter

VIDEOS = ('.mp4', '.avi', '.webm', '.mkv', '.mov', '.m4v', '.mpg', '.mpeg', '.wmv', '.flv', '.3gp', '.ts', '.ogv', '.gif')
IMAGES = ('.jpg', '.jpeg', '.png')
KEPT_BYTES = 64_000_000  # of a file's packets; those of a larger file are read again whenever it is decoded
DECODER = dict(max_pixels='64000000')  # of a frame; a header that promises more is refused before there is memory for it
# No playlist and no list of other files, whatever the name ends in
DEMUXER = dict(DECODER, protocol_whitelist='file', format_whitelist='mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,obu,'
               'ivf,asf,flv,ogg,gif,mjpeg,dv,rm,nut,mxf')
# A track's name that is not UTF-8 must not end the reading; from version 19 on PyAV sees to that itself
ANY_NAMES = dict(metadata_errors='ignore') if int(av.__version__.split('.')[0]) < 19 else {}
MPEG, SEQUENCE = ('mpeg1video', 'mpeg2video'), b'\0\0\1\xb3'  # what begins a packet with a size and quantizers of its own
Header = namedtuple('Header', 'pts dts duration size is_keyframe is_discard is_corrupt ends')  # of a packet

av.logging.set_level(av.logging.ERROR)  # of much damage FFmpeg tells in its log alone
av.logging.set_skip_repeated(False)  # the same in two files
logging.getLogger('libav').addHandler(logging.NullHandler())  # nothing on the screen


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
    notes = [] if notes is None else notes
    with av.logging.Capture() as log:
        try:
            if os.path.isdir(path):
                names = sorted((name for name in os.listdir(path) if name.lower().endswith(IMAGES)), key=number_in)
                indices = list(pick(len(names))) if names else []
                pictures = {i: decode_image(Path(path, names[i]).read_bytes(), short_side) for i in set(indices)}
            else:
                pictures, indices = decode(Source(path, notes), pick, short_side, notes, log)
            if not pictures:
                raise ValueError('no frame could be decoded')
            if len({picture.shape for picture in pictures.values()}) > 1:
                raise ValueError('its images are of different sizes')
            frames = np.stack([pictures[i] for i in indices])
        except Exception as error:  # a damaged file can make a demuxer or decoder raise anything
            problem = getattr(error, 'strerror', None) or error or type(error).__name__
            raise UnreadableVideo(f'{path}: {problem}' + (f' ({log[0][2].strip()})' if log else '')) from error
    if log:
        notes.append(f'damaged: {log[0][2].strip()}')
    return frames


def number_in(name):
    """Sorts frame2.jpg before frame10.jpg."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


def open_video(path):
    """A video file -> its open container, its video stream. ValueError: it has none, or is no file: reading a pipe may never
    end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError('not a regular file')
    container = av.open(f'file:{path}', options=DEMUXER, **ANY_NAMES)
    stream = container.streams.best('video')
    if stream is None:
        raise ValueError('no video stream')
    stream.codec_context.options = DECODER
    return container, stream


class Source:
    """A video file. `headers`: of all its packets, for their number is to be trusted and the file's own header is not."""

    def __init__(self, path, notes):
        self.path, self.headers, self.kept, size = path, [], [], 0
        self.open()
        for packet in self.demux(notes):
            known, content = [getattr(packet, name) for name in Header._fields[:-1]], bytes(packet)
            self.headers.append(Header(*known, content[:8] + content[-1:]))
            self.kept.append(packet)
            size += packet.size
            if size > KEPT_BYTES:
                self.kept.clear()
        self.is_new, self.pts = size <= KEPT_BYTES, [header.pts for header in self.headers]

    def open(self):
        self.container, self.stream = open_video(self.path)
        self.codec = self.stream.codec_context
        self.codec.thread_count = 1  # workers fill the cores

    def demux(self, notes):
        """Yields what packets can be read."""
        try:
            yield from (packet for packet in self.container.demux(self.stream) if packet.size)
        except av.FFmpegError as error:
            notes.append(f'cut short: {error.strerror}')

    def start(self):
        """-> a decoder that is new, for flush_buffers() does not make every one as new, and an iterator over all packets."""
        if not self.is_new:
            self.open()
        self.is_new = False
        return self.codec, iter(self.kept or self.demux([]))


class Converter:
    """Decoded frames -> uint8 (h, w, 3). The stream's first frame tells the size of all and how they are turned."""

    def __init__(self, short_side):
        self.short_side, self.size, self.reformatter = short_side, None, VideoReformatter()

    def see(self, frame):
        """Takes note of the frame if it is the first."""
        if self.size is None:
            scale = min(1, self.short_side / min(frame.width, frame.height))
            self.size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
            matrix = frame.side_data.get(Type.DISPLAYMATRIX)
            # column x, row y is shown at column a x + c y, row b x + d y
            self.matrix = (1, 0, 0, 1) if matrix is None else np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].tolist()

    def __call__(self, frame):
        self.see(frame)
        # threads: swscale's own choice is slow
        picture = self.reformatter.reformat(frame, *self.size, 'rgb24', interpolation='BILINEAR', threads=1).to_ndarray()
        a, b, c, d = self.matrix
        if abs(b) + abs(c) > abs(a) + abs(d):  # nearer to a quarter turn
            picture, a, d = picture.swapaxes(0, 1), c, b
        return picture[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


def decode(source, pick, short_side, notes, log):
    """A Source -> {index: picture}, indices. log: FFmpeg's, as it grows."""
    convert, missing, hides = Converter(short_side), missing_seconds(source), may_hide(source)
    if missing and not notes:
        notes.append(f'cut short: {missing:.1f} s less than its header says')
    sizes = [header.size for header in source.headers if not header.is_discard]
    empty = sizes.count(1) if source.codec.name == 'mpeg4' else 0  # XviD's hold no frame; the count makes sure that others do
    indices = list(pick(len(sizes) - empty)) if len(sizes) > empty else []
    if pts_tell(source) and not hides:
        pts, logged = sorted(source.pts), len(log)
        pictures = decode_some(source, [pts[i] for i in dict.fromkeys(indices)], convert)
        if pictures is not None and len(log) == logged:
            return {i: pictures[pts[i]] for i in indices}, indices
        del log[logged:]  # what is wrong with the file will be said again
    pictures, count, fed = decode_in_order(source, indices, convert, to_end=hides)
    if count != fed - empty:  # not a frame for each packet: count all frames, then choose again
        count = decode_in_order(source, [], convert, to_end=True)[1]
        indices = list(pick(count)) if count else []
        pictures = decode_in_order(source, indices, convert)[0]
    return pictures, indices


def missing_seconds(source):
    """How much shorter the packets are than the header promises, 0 if not clearly so."""
    container, stream, last = source.container, source.stream, source.headers[-1:]
    times = [header.dts if header.pts is None else header.pts for header in source.headers]
    times = [time for time in times if time is not None] or [0]
    begin, promised = 0, 0
    if container.format.name == 'avi':  # its duration is that of what is there
        promised = stream.frames
    elif stream.duration:
        begin, promised = min(times), stream.duration
    elif container.duration and len(container.streams) == 1:
        promised = container.duration / av.time_base / stream.time_base
    missing = promised - (max(times) - begin + sum(header.duration or 0 for header in last))
    return float(missing * stream.time_base) if missing > max(0.3 / stream.time_base, 0.05 * promised) else 0


def may_hide(source):
    """Whether there may be packets that no frame comes out of, beside XviD's empty ones."""
    codec, headers, ends = source.codec.name, source.headers, [header.ends for header in source.headers]
    if codec == 'mpeg4':
        return any(header.size < 10 for header in headers)
    if codec == 'vp8':  # a frame that is not shown
        return any(end[0] & 0b10000 == 0 for end in ends)
    if codec == 'vp9':  # the same, split off from the superframe of the next one
        return any(end[0] & 0b1010 == 0 and end[-1] >> 5 != 0b110 for end in ends)
    sizes = {end[4:7] for end in ends if codec in MPEG and end[:4] == SEQUENCE}
    return len(sizes) > 1  # where the size changes a frame is lost (as rarely where progressive_sequence does, unseen here)


def entries(source):
    """Numbers of the packets that decoding can begin with: keyframes, in MPEG-1 and 2 those with quantizers of their own."""
    return [i for i, header in enumerate(source.headers)
            if header.is_keyframe and (source.codec.name not in MPEG or header.ends[:4] == SEQUENCE)]


def pts_tell(source):
    """Whether the sorted pts number the frames: each packet has its own, that of the one frame which comes out of it."""
    codec, headers, pts = source.codec, source.headers, source.pts
    return (codec.name in ('h264', 'hevc', 'vp8', 'vp9', 'libdav1d', *MPEG)  # flush_buffers() makes these as new
            and source.container.format.name != 'avi'  # it has no pts, what it shows is made up
            and None not in pts and 0 < len(set(pts)) == len(pts)
            and not any(header.is_corrupt or header.is_discard for header in headers)
            and max(pts) - min(pts) < 2 ** 31  # else they leap in the midst of a group, as negative ones do in flv
            and entries(source)[:1] == [0] and pts[0] == min(pts)  # else it was cut out, and its first frames cannot be decoded
            and not (codec.has_b_frames and pts == sorted(pts)))  # made up, in the order of decoding


def decode_some(source, wanted, convert):
    """The frames with the pts in `wanted` (sorted) -> {pts: picture}; None if one does not come out whole.

    Decodes the first frame, no group of pictures without a wanted one, and no frame that is neither wanted nor referred to.
    """
    (codec, packets), keys, pts = source.start(), entries(source), source.pts
    place = {time: i for i, time in enumerate(pts)}
    times = sorted([pts[0], *wanted], key=place.get)
    last = {max(i for i in keys if pts[i] <= time): place[time] for time in times}  # packet of a group that is to be decoded
    targets, pictures, latest, end = set(wanted), {}, -float('inf'), -1
    # hevc: a picture that its own temporal layer does not refer to may be referred to by a higher one, if there is any
    record = codec.extradata or b''
    one_layer = codec.name == 'hevc' and record[:1] == b'\1' and len(record) > 21 and record[21] >> 3 & 7 == 1
    skip = 'NONREF' if one_layer or codec.name in ('h264', *MPEG) else 'DEFAULT'

    def feed(packet):
        nonlocal latest
        for frame in codec.decode(packet):
            if frame.is_corrupt or frame.pts is None or frame.pts <= latest:
                raise ValueError('frames are damaged or out of order')
            convert.see(frame)
            latest = frame.pts
            if latest in targets:
                pictures[latest] = convert(frame)

    try:
        for i, packet in enumerate(packets):
            if i in last:
                if i > end + 1:  # on to a later group of pictures
                    feed(None)
                    codec.flush_buffers()
                end = max(end, last[i])
            if i <= end:
                codec.skip_frame = 'DEFAULT' if packet.pts in targets else skip
                feed(packet)
        feed(None)
    except (av.FFmpegError, ValueError):
        return None
    return pictures if len(pictures) == len(targets) else None


def decode_in_order(source, wanted, convert, to_end=False):
    """The frames `wanted`, counted as they come out, whatever their pts -> {index: picture}, the frames that came out of the
    packets that went in, and how many these were: without to_end it stops at the last wanted one."""
    codec, packets = source.start()
    pictures, count, fed, last = {}, 0, 0, float('inf') if to_end else max(wanted, default=-1)
    until_last = itertools.takewhile(lambda packet: count <= last, packets)
    for packet in itertools.chain(until_last, [None]):  # None: the decoder still holds frames
        fed += packet is not None
        try:
            for frame in codec.decode(packet):
                convert.see(frame)
                if count in wanted:
                    pictures[count] = convert(frame)
                count += 1
        except av.FFmpegError:
            pass  # a damaged packet
    return pictures, count, fed


def decode_image(data, short_side):
    """The bytes of a JPEG or PNG -> uint8 (h, w, 3)."""
    codec = av.CodecContext.create('png' if data[:4] == b'\x89PNG' else 'mjpeg', 'r')
    codec.thread_count, codec.options = 1, DECODER
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
