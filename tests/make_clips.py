"""Small video files for the tests, of every kind that people have."""

from fractions import Fraction

import av
import numpy as np


def picture(i, width=64, height=48):
    """Frame i of every test clip, uint8 (height, width, 3): a moving gradient, another in each frame, and some noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(i).integers(0, 24, (height, width, 1))
    return ((np.stack([3 * x + 5 * i, 4 * y + 11 * i, 2 * x + 2 * y - 7 * i], -1) + noise) % 256).astype(np.uint8)


def write_clip(path, frames=30, size=(64, 48), codec='libx264', pix_fmt='yuv420p', options=None, times=None, mux=None):
    """Writes picture(0), picture(1), ... as a video file; times: pts in 1/1000 s for a variable frame rate."""
    with av.open(str(path), 'w', options=mux or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), 'rgb24')
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def write_folder(path, frames=12, size=(64, 48), ext='.jpg'):
    """Writes the same pictures as a folder of numbered images, without leading zeros."""
    path.mkdir(parents=True)
    for i in range(frames):
        av.VideoFrame.from_ndarray(picture(i, *size), 'rgb24').save(str(path / f'img_{i + 1}{ext}'))
    return str(path)


X264, X265, VP9 = dict(preset='veryfast'), dict(preset='ultrafast'), dict(deadline='realtime')
ALTREF = {'auto-alt-ref': '1', 'lag-in-frames': '12', 'cpu-used': '5', 'deadline': 'good'}
KINDS = {  # name of the file -> arguments of write_clip
    'gops.mp4': dict(options={**X264, 'bf': '3', 'g': '10', 'x264-params': 'scenecut=0:b-pyramid=normal'}, frames=60),
    'open_gop.mp4': dict(options={**X264, 'bf': '2', 'x264-params': 'keyint=9:scenecut=0:open-gop=1'}, frames=50),
    'open_gop.ts': dict(options={**X264, 'bf': '2', 'x264-params': 'keyint=9:scenecut=0:open-gop=1'}, frames=40),
    'long_gop.mkv': dict(options=dict(X264, bf='2', g='250'), frames=45),
    'intra.mov': dict(options=dict(X264, g='1')),
    'h264.avi': dict(options=dict(X264, bf='2', g='10')),  # avi has no pts
    'raw.h264': dict(options=dict(X264, bf='2', g='10')),
    'fragmented.mp4': dict(options=dict(X264, bf='2', g='10'), mux=dict(movflags='frag_keyframe+empty_moov')),
    'odd_444.mp4': dict(options=X264, pix_fmt='yuv444p', size=(67, 51)),
    'ten_bit.mp4': dict(options=X264, pix_fmt='yuv420p10le'),
    'grey.mp4': dict(options=X264, pix_fmt='gray'),
    'variable_rate.mp4': dict(options=dict(X264, bf='2', g='10'),
                              times=np.cumsum(np.random.default_rng(0).integers(5, 90, 30)).tolist()),
    'one_frame.mp4': dict(options=X264, frames=1),
    'five_frames.mp4': dict(options=dict(X264, bf='2'), frames=5),
    'xvid.avi': dict(codec='mpeg4', options=dict(bf='2', g='12'), size=(65, 49)),
    'vp8.webm': dict(codec='libvpx', options=dict(VP9, g='10')),
    'vp9.webm': dict(codec='libvpx-vp9', options={**VP9, 'cpu-used': '8', 'g': '10'}, size=(67, 51)),
    'vp9_altref.webm': dict(codec='libvpx-vp9', options=ALTREF, frames=40),
    'vp8_altref.webm': dict(codec='libvpx', options=ALTREF, frames=40),
    'alpha.webm': dict(codec='libvpx-vp9', options=VP9, pix_fmt='yuva420p'),
    'hevc.mp4': dict(codec='libx265', options={**X265, 'x265-params': 'keyint=10:bframes=3:log-level=0'}, frames=40),
    'hevc_open_layers.mkv': dict(codec='libx265', frames=40, options={
        **X265, 'x265-params': 'keyint=9:open-gop=1:bframes=3:b-pyramid=1:temporal-layers=3:log-level=0'}),
    'mpeg2.mpg': dict(codec='mpeg2video', options=dict(bf='2', g='12')),
    'mjpeg.avi': dict(codec='mjpeg', pix_fmt='yuvj420p'),
    'flash.flv': dict(codec='flv'),
    'animation.gif': dict(codec='gif', pix_fmt='rgb8'),
}
