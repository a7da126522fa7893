"""Files as people have them, of every container and codec: each frame is the one that plain decoding in order gives.

The fast half makes a small clip for each way in which a file can mislead, the slow half a zoo with ffmpeg's own encoders:
    pip install imageio-ffmpeg; python -m pytest -m slow tests/test_zoo.py
"""

import contextlib
import os
import subprocess
import zlib

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

import decode
from make_clips import KINDS, X264, write_clip, write_folder
from tools import timeline


def in_order(path):
    """All frames of a file as a new decoder gives them, in the size of the first and not turned."""
    frames = []
    with av.open(f'file:{path}') as container:
        stream = container.streams.best('video')
        stream.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames += stream.decode(packet)
            except av.FFmpegError:
                pass  # a damaged packet
    size = dict(width=frames[0].width, height=frames[0].height, interpolation='BILINEAR')
    return np.stack([frame.to_ndarray(format='rgb24', **size) for frame in frames])


def same_frames(path, expected):
    """Whether each of many draws gives the expected frames, out of as many; -> what was noted."""
    middle, drawn = (lambda n: decode.sample_indices(n, 8)), (lambda n: decode.sample_indices(n, 8, np.random.default_rng(n)))
    notes = []
    for pick in (middle, drawn, range, lambda n: [0], lambda n: [n // 3], lambda n: [n // 2, n // 2 + 1], lambda n: [n - 1]):
        numbers = []
        got = decode.read_frames(path, lambda n, pick=pick, numbers=numbers: numbers.append(n) or list(pick(n)), 1000, notes)
        assert numbers[-1] == len(expected) and np.array_equal(got, expected[list(pick(len(expected)))])
    return sorted(set(notes))


# ---- One small clip for each way to mislead

def copy(target, sources, times=lambda i, packet: (packet.pts, packet.dts), first=0, turn=None, **options):
    """Writes the packets of files, from number `first` on and with other pts and dts, into another container."""
    with contextlib.ExitStack() as stack, av.open(target, 'w', options=options) as out:
        streams = [stack.enter_context(av.open(source)).streams.video[0] for source in sources]
        packets = [packet for stream in streams for packet in stream.container.demux(stream) if packet.size]
        stream = out.add_stream_from_template(streams[0])
        if turn:
            turn = BitStreamFilterContext(turn, streams[0])
            packets = [turned for packet in packets for turned in turn.filter(packet)]
        for i, packet in enumerate(packets[first:]):
            (packet.pts, packet.dts), packet.stream = times(i, packet), stream
            out.mux(packet)
    return target


def later(seconds):
    """For copy: all times are that much later."""
    def times(i, packet):
        shift = round(seconds(i) / packet.time_base)
        return packet.pts + shift, packet.dts + shift
    return times


def made(folder, name, **args):
    return write_clip(folder / f'source_{name}', **(args or KINDS[name]))


def bytes_of(path):
    with av.open(path) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def no_padding(folder):
    """MPEG-4 whose decoder finds out about its encoder as it goes, and remembers: a second decoding shows other frames."""
    for width in range(64, 200, 2):
        packets = bytes_of(made(folder, 'm.avi', codec='mpeg4', size=(width, 48)))
        if packets[1].endswith(b'\x7f'):
            break
    packets[1] = packets[1][:-1]
    packets.insert(20, b'\0\0\1\xb6\x50\xdf')  # no frame: all are counted, then decoded again
    (folder / 'raw.m4v').write_bytes(b''.join(packets))
    return str(folder / 'raw.m4v')


def early_placeholder(folder):
    packets = bytes_of(made(folder, 'xvid.avi'))
    (folder / 'early.m4v').write_bytes(b''.join(packets[:25] + [b'\0\0\1\xb6\x50\xdf'] + packets[25:]))
    return str(folder / 'early.m4v')


def cut_open_gop(folder):
    return copy(f'{folder}/cut.ts', [made(folder, 'open_gop.ts')], first=9)


def pts_of_decoding(folder):
    return copy(f'{folder}/pts.mp4', [made(folder, 'gops.mp4')], lambda i, packet: (512 * i, 512 * i))


def pts_that_leap(folder):
    """Negative times in flv, which has 32 bits for them."""
    source = made(folder, 'source.flv', frames=40, options=dict(X264, bf='3', g='12'))
    return copy(f'{folder}/leap.flv', [source], later(lambda i: -0.5), avoid_negative_ts='disabled')


def sizes(folder, codec, ext):
    sources = [made(folder, f'{size}.{ext}', codec=codec, size=size, frames=20, options=dict(g='10'))
               for size in ((64, 48), (48, 48), (48, 64))]
    return copy(f'{folder}/sizes.{ext}', sources, later(lambda i: i // 20 * 0.8))


def borrowed_quantizers(folder):
    """MPEG-2 that says once, at its fourth keyframe, how it quantizes from there on; the later ones have no header."""
    source = made(folder, 'm.mkv', codec='mpeg2video', frames=60, options=dict(g='6', bf='2'))
    with av.open(source) as file, av.open(f'{folder}/borrowed.mkv', 'w') as out:
        stream, keyframes = out.add_stream_from_template(file.streams.video[0]), 0
        for packet in file.demux(video=0):
            content, keyframes = bytes(packet), keyframes + packet.is_keyframe
            if packet.is_keyframe and keyframes == 4:
                content = content[:11] + bytes([content[11] | 1]) + bytes(range(20, 84)) + content[12:]
            elif packet.is_keyframe and keyframes > 4:
                content = content[content.index(b'\0\0\1\xb8'):]
            changed = av.Packet(content)
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe, changed.stream = packet.is_keyframe, stream
            if content:
                out.mux(changed)
    return f'{folder}/borrowed.mkv'


def hidden_frame(folder):
    source = made(folder, 'vp8.webm')
    content, packet = bytearray(open(source, 'rb').read()), bytes_of(source)[20]
    content[content.index(packet)] &= 0b11101111
    (folder / 'hidden.webm').write_bytes(content)
    return str(folder / 'hidden.webm')


@pytest.mark.parametrize('make', [
    no_padding, borrowed_quantizers, hidden_frame, cut_open_gop, pts_of_decoding, pts_that_leap, early_placeholder,
    pytest.param(lambda folder: sizes(folder, 'libx264', 'ts'), id='sizes_h264'),
    pytest.param(lambda folder: sizes(folder, 'mpeg2video', 'mpg'), id='sizes_mpeg2'),
    pytest.param(lambda folder: sizes(folder, 'libvpx-vp9', 'webm'), id='sizes_vp9')])
@pytest.mark.parametrize('kept', [decode.KEPT_BYTES, 0])
def test_files_that_mislead(make, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, 'KEPT_BYTES', kept)
    path = make(tmp_path)
    same_frames(path, in_order(path))


@pytest.mark.parametrize('name', ['gops.mp4', 'open_gop.ts', 'xvid.avi', 'vp9_altref.webm', 'hevc_open_layers.mkv'])
def test_packets_that_are_read_again(name, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, 'KEPT_BYTES', 0)
    path = write_clip(tmp_path / name, **KINDS[name])
    assert same_frames(path, in_order(path)) == []


@pytest.mark.parametrize('name, most', [
    ('gops.mp4', 8), ('hevc.mp4', 8), ('vp8.webm', 12), ('vp9.webm', 12), ('mpeg2.mpg', 5)])
def test_what_no_wanted_frame_needs_is_not_decoded(name, most, tmp_path, monkeypatch):
    path, seen, see = made(tmp_path, name), [], decode.Converter.see
    expected = in_order(path)
    monkeypatch.setattr(decode, 'decode_in_order', lambda *args: pytest.fail('decoded in order'))
    assert same_frames(path, expected) == []
    monkeypatch.setattr(decode.Converter, 'see', lambda self, frame: seen.append(1) or see(self, frame))
    decode.read_frames(path, lambda n: [n - 1], 1000)
    assert len(seen) <= most


TURNS = {  # (a, b, c, d): column x, row y is shown at column a x + c y, row b x + d y -> what becomes of a frame
    (1, 0, 0, 1): lambda x: x, (-1, 0, 0, 1): np.fliplr, (1, 0, 0, -1): np.flipud, (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, 1, -1, 0): lambda x: np.rot90(x, -1), (0, -1, 1, 0): np.rot90, (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(x.swapaxes(0, 1), 2),
    (.985, .174, -.174, .985): lambda x: x, (.174, -.985, .985, .174): np.rot90}  # by 10 degrees, by 80


@pytest.mark.parametrize('matrix', TURNS)
def test_mirrored_and_turned(matrix, tmp_path):
    path = write_clip(tmp_path / 'clip.mp4', frames=9, options=X264)
    expected = in_order(path)
    content = bytearray(open(path, 'rb').read())
    at = content.index(b'tkhd') + 44
    a, b, c, d = (round(v * 0x10000).to_bytes(4, 'big', signed=True) for v in matrix)
    content[at:at + 36] = a + b + bytes(4) + c + d + bytes(12) + (0x40000000).to_bytes(4, 'big')
    (tmp_path / 'clip.mp4').write_bytes(content)
    same_frames(path, np.stack([TURNS[matrix](frame) for frame in expected]))


def test_turned_by_what_only_some_frames_say(tmp_path):
    path = copy(f'{tmp_path}/turned.mp4', [made(tmp_path, 'gops.mp4')],
                turn='h264_metadata=display_orientation=insert:rotate=90')
    same_frames(path, np.rot90(in_order(path), 1, (1, 2)))


def test_what_is_noted(tmp_path):
    """Damage that no frame shows by itself is; a clip that starts late is not."""
    late = copy(f'{tmp_path}/late.mkv', [made(tmp_path, 'gops.mp4')], later(lambda i: 5))
    assert same_frames(late, in_order(late)) == []

    def notes(path, content):
        open(path, 'wb').write(content)
        told = []
        decode.read_frames(os.path.dirname(path) if path.endswith('.jpg') else path, lambda n: range(n), 1000, told)
        return told

    cut = write_clip(tmp_path / 'cut.avi', codec='mjpeg', pix_fmt='yuvj420p', frames=60)
    content = open(cut, 'rb').read()
    assert not notes(cut, content) and 'less than its header says' in notes(cut, content[:len(content) * 7 // 10])[0]
    image = os.path.join(write_folder(tmp_path / 'images', 3), 'img_2.jpg')
    content = open(image, 'rb').read()
    assert not notes(image, content) and 'damaged: ' in notes(image, content[:len(content) * 7 // 10])[0]
    content = bytearray(open(write_clip(tmp_path / 'flv.flv', **KINDS['flash.flv']), 'rb').read())
    content[len(content) // 2:len(content) // 2 + 400] = bytes(400)
    assert 'damaged: ' in notes(f'{tmp_path}/flv.flv', content)[0]


def test_other_files_and_pipes_are_not_read(tmp_path):
    write_clip(tmp_path / 'other.ts', **KINDS['open_gop.ts'])
    (tmp_path / 'list.mp4').write_text('ffconcat version 1.0\nfile other.ts\n')
    os.mkfifo(tmp_path / 'pipe.mp4')
    for name, problem in (('list.mp4', 'not on whitelist'), ('pipe.mp4', 'not a regular file')):
        with pytest.raises(decode.UnreadableVideo, match=f'{name}: .*{problem}'):
            decode.read_frames(str(tmp_path / name), lambda n: [0], 256)
        for reads in (timeline.measure, lambda path: next(timeline.timed_frames(path, None))):
            with pytest.raises((OSError, ValueError)):
                reads(str(tmp_path / name))


def test_frames_of_too_many_pixels_are_refused(tmp_path):
    def chunk(kind, content):
        return len(content).to_bytes(4, 'big') + kind + content + zlib.crc32(kind + content).to_bytes(4, 'big')

    (tmp_path / 'images').mkdir()
    side = (16000).to_bytes(4, 'big')
    (tmp_path / 'images' / '1.png').write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', side + side + bytes([1, 0, 0, 0, 0]))
        + chunk(b'IDAT', zlib.compress(bytes(16000 * 2001))) + chunk(b'IEND', b''))
    source = made(tmp_path, 'vp8.webm', codec='libvpx', frames=1)
    content, (packet,) = bytearray(open(source, 'rb').read()), bytes_of(source)
    at = content.index(packet) + 6
    content[at:at + 4] = (16000).to_bytes(2, 'little') * 2  # the header of the file says 64 x 48
    (tmp_path / 'lies.webm').write_bytes(content)
    for name in ('images', 'lies.webm'):
        with pytest.raises(decode.UnreadableVideo, match=f'{name}: .*max pixel'):
            decode.read_frames(str(tmp_path / name), lambda n: [0], 256)


# ---- The zoo

CODECS = {  # name: (ffmpeg's options, containers)
    'h264': ('libx264 -preset veryfast -bf 3 -g 12 -sc_threshold 0', 'mp4 mkv mov ts flv avi 3gp m4v'),
    'h264_open': ('libx264 -preset veryfast -bf 2 -x264-params keyint=9:scenecut=0:open-gop=1', 'mp4 mkv ts flv avi'),
    'h264_plain': ('libx264 -preset veryfast -bf 0 -g 20', 'mp4 mkv ts flv avi'),
    'h264_fields': ('libx264 -preset veryfast -flags +ilme+ildct -x264-params tff=1:keyint=12:bframes=2', 'ts mp4'),
    'h264_refresh': ('libx264 -preset veryfast -x264-params intra-refresh=1:keyint=12:bframes=2', 'ts mp4'),
    'hevc': ('libx265 -preset ultrafast -x265-params keyint=10:bframes=3:log-level=0', 'mp4 mkv ts'),
    'hevc_open': ('libx265 -preset ultrafast -x265-params keyint=9:open-gop=1:bframes=3:b-pyramid=1:log-level=0', 'mp4 mkv ts'),
    'xvid': ('libxvid -bf 2 -g 12 -b:v 300k', 'avi mp4 mkv m4v ts'),
    'xvid_long': ('libxvid -bf 2 -g 250 -b:v 300k', 'avi mkv ts'),
    'mpeg4': ('mpeg4 -bf 2 -g 12 -q:v 4', 'avi mp4 mkv m4v ts mov 3gp'),
    'mpeg2': ('mpeg2video -bf 2 -g 12 -q:v 4', 'mpg ts mkv avi mp4'),
    'mpeg2_fields': ('mpeg2video -flags +ilme+ildct+cgop -sc_threshold 1000000000 -bf 3 -g 15 -b:v 60k', 'mpg ts mkv'),
    'mpeg1': ('mpeg1video -bf 2 -g 12 -q:v 4', 'mpg mkv'),
    'vp8': ('libvpx -deadline good -cpu-used 5 -auto-alt-ref 1 -lag-in-frames 12 -g 20', 'webm mkv'),
    'vp9': ('libvpx-vp9 -deadline realtime -cpu-used 8 -g 20', 'webm mkv mp4'),
    'vp9_altref': ('libvpx-vp9 -deadline good -cpu-used 5 -auto-alt-ref 1 -lag-in-frames 12 -g 20', 'webm mp4'),
    'av1': ('libsvtav1 -preset 12 -g 20', 'mp4 webm mkv'),
    'wmv2': ('wmv2 -g 12 -q:v 4', 'wmv avi'),
    'flv1': ('flv -g 12 -q:v 4', 'flv'),
    'theora': ('libtheora -g 12 -q:v 6', 'ogv mkv'),
    'mjpeg': ('mjpeg -q:v 4 -pix_fmt yuvj420p', 'avi mov mkv')}
COPIES = {  # name: (options before and after the source, sources, containers)
    'cut': ('-ss 0.47', '', 'h264.ts h264_open.ts h264_open.mkv hevc.mkv hevc_open.mkv mpeg2.ts vp9.webm', 'mp4 mkv ts flv'),
    'cut_later': ('-ss 1.3', '', 'h264.ts h264_open.ts h264_open.mkv hevc.mkv hevc_open.mkv mpeg2.ts', 'mp4 mkv ts flv'),
    'made_up': ('-fflags +genpts', '', 'h264.avi h264_open.avi mpeg4.avi mpeg2.avi', 'mp4 mkv ts flv'),
    'raw': ('', '-f m4v', 'xvid.avi xvid_long.avi mpeg4.avi', 'm4v'),
    'remuxed': ('', '', 'xvid.avi xvid_long.avi mpeg4.avi', 'mpg mp4'),
    'unpacked': ('', '-bsf:v mpeg4_unpack_bframes', 'xvid.avi', 'avi mkv'),
    'late': ('', '-output_ts_offset 5', 'h264.mp4 mpeg4.mp4 vp9.webm flv1.flv', 'mkv ts mp4 avi flv'),
    'early': ('', '-avoid_negative_ts disabled -output_ts_offset -0.5', 'h264.mp4 h264_open.mp4', 'flv mkv mp4'),
    'fragmented': ('', '-movflags frag_keyframe+empty_moov', 'h264.mp4 vp9.mp4 av1.mp4', 'mp4')}


@pytest.mark.slow
def test_zoo(tmp_path):
    ffmpeg = pytest.importorskip('imageio_ffmpeg').get_ffmpeg_exe()

    def write(name, options):
        """Where ffmpeg makes a file of it that holds a frame."""
        path = f'{tmp_path}/{name}'
        subprocess.run([ffmpeg, '-loglevel', 'quiet', *options.split(), path], stdin=subprocess.DEVNULL)
        try:
            files[name] = path, in_order(path)
        except (OSError, AttributeError, IndexError, av.FFmpegError):
            left_out.append(name)

    files, left_out, wrong = {}, [], {}
    source = '-f lavfi -i testsrc2=s=160x120:r=25:d=3 -pix_fmt yuv420p -c:v '
    for codec, (options, containers) in CODECS.items():
        for ext in containers.split():
            write(f'{codec}.{ext}', source + options)
    for kind, (before, after, sources, containers) in COPIES.items():
        for name in sources.split():
            for ext in containers.split():
                write(f'{kind}_{name}.{ext}', f'{before} -i {tmp_path}/{name} -an -c copy {after}')
    for name, (path, expected) in files.items():
        try:
            same_frames(path, expected)
        except (AssertionError, decode.UnreadableVideo) as error:
            wrong[name] = str(error)[:200]
    print(f'{len(files)} files, {len(left_out)} that ffmpeg does not make: {" ".join(left_out)}')
    assert not wrong and len(files) > 110
