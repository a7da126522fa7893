"""Your own clips: two or three classes of plainly coloured videos, made on the spot, and a tiny CLIP of random weights."""

import csv
import json
import multiprocessing
import shutil
import sys
import weakref
from collections import deque
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip_loader
import eval as evaluation
import predict
from config import DEFAULTS
from decode import UnreadableVideo, Video
from model import class_scores, log_scores, trainable_state
from reader import ClipMaker

COLOURS = dict(blue=(20, 30, 220), green=(30, 200, 40), red=(220, 30, 20))
OPTIONS = dict(frames=4, resize=32, levels=2, workers=0, device='cpu')


def write_video(path, pictures, rate=10, times=None):
    """Colours (n, 3), one a frame, as a video of flat frames; times: pts in 1/1000 s for a variable frame rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate, options=dict(crf='12', bf='2', g='7'))
        stream.width, stream.height, stream.pix_fmt = 48, 32, 'yuv420p'
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, colour in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), colour, np.uint8), 'rgb24')
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shades(name, n, seed):
    """n colours near one of COLOURS."""
    return np.clip(COLOURS[name] + np.random.default_rng(seed).integers(-15, 16, (n, 3)), 0, 255)


def random_clip():
    torch.manual_seed(0)
    return clip_loader.CLIP(32, 16, 64, 3, 16).float().eval()


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder of examples (blue 3, green 1, red 2), queries, weights and a checkpoint whose every part has a say."""
    root = tmp_path_factory.mktemp('world')
    for name, shots in dict(blue=3, green=1, red=2).items():
        for i in range(shots):
            write_video(root / 'examples' / name / f'{i}.mp4', shades(name, 12, i))
    for i, name in enumerate(COLOURS):
        write_video(root / 'queries' / f'{name}.mp4', shades(name, 15, 10 + i))
    clip = random_clip()
    torch.save(clip.state_dict(), root / 'clip.pt')
    for mode in ('joint', False):
        config = dict(DEFAULTS, **OPTIONS, clip=str(root / 'clip.pt'), cross_video=mode, temp=20.0)
        model = evaluation.build(config, clip)
        for p in trainable_state(model).values():
            p += 0.05 * torch.randn_like(p)
        torch.save(dict(model=trainable_state(model), config=config, weights_hash=clip_loader.weights_hash(clip.visual)),
                   root / f'{mode}.pt')
    return root


@pytest.fixture
def call(world, monkeypatch, capsys):
    """predict.py with options -> exit status or message, stdout, stderr. Without a checkpoint these weights are named."""
    def run(**options):
        if 'ckpt' not in options:
            options = dict(clip=world / 'clip.pt', resize=32, frames=4, levels=2) | options
        options = dict(support=world / 'examples', workers=0, device='cpu') | options
        monkeypatch.setattr(sys, 'argv', ['predict.py', *(f'--{key}={value}' for key, value in options.items())])
        try:
            status = predict.main()
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr()
        return SimpleNamespace(status=status, out=out.out, err=out.err,
                               rows=[json.loads(line) for line in out.out.splitlines() if line[:1] == '{'])
    return run


def loaded(world, mode):
    checkpoint = torch.load(world / f'{mode}.pt', weights_only=True)
    model = evaluation.build(checkpoint['config'], random_clip())
    model.load_state_dict(checkpoint['model'], strict=False)
    return model, checkpoint['config']


# ---- Scores

def test_unequal_shots_by_hand():
    torch.manual_seed(1)
    support, query, labels, temp = torch.randn(6, 8), torch.randn(2, 8), torch.tensor([0, 0, 0, 1, 2, 2]), 7.0
    support, query = F.normalize(support, dim=-1), F.normalize(query, dim=-1)
    trained, untrained = (predict.score(support, query, labels, temp, kind) for kind in (True, False))
    for m in range(2):
        e = [np.exp(temp * float(query[m] @ s)) for s in support]
        means = [(e[0] + e[1] + e[2]) / 3, e[3], (e[4] + e[5]) / 2]
        assert np.allclose(trained[m], np.array(means) / sum(means), atol=1e-6)
        prototypes = [support[:3].mean(0), support[3], support[4:].mean(0)]
        e = [np.exp(temp * float(query[m] @ p / p.norm())) for p in prototypes]
        assert np.allclose(untrained[m], np.array(e) / sum(e), atol=1e-6)


def test_equal_shots_are_those_of_the_test():
    torch.manual_seed(2)
    features, labels = F.normalize(torch.randn(8, 16), dim=-1), torch.arange(3).repeat_interleave(2)
    cosines = evaluation.mean_pool(features, 3, 2)(torch.arange(8)[None])[0]
    assert torch.allclose(predict.score(features[:6], features[6:], labels, 9.0, False), (9 * cosines).softmax(-1), atol=1e-6)
    means = class_scores(log_scores(features[None], 6, 9.0), labels, int(labels.max()) + 1)[0]
    assert torch.allclose(predict.score(features[:6], features[6:], labels, 9.0, True), 2 * means, atol=1e-6)


@pytest.mark.parametrize('mode', ['joint', False])
@torch.no_grad()
def test_examples_first_then_queries_is_the_inductive_model(world, mode):
    model, _ = loaded(world, mode)
    frames = torch.randint(0, 256, (9, 4, 3, 32, 32), dtype=torch.uint8)  # 5 examples, 4 queries
    autocast = torch.autocast('cpu', enabled=False)
    features = predict.follow(model, *predict.encode_frames(model, frames[:5], True, 'cpu', autocast))
    together = predict.follow(model, *predict.encode_frames(model, frames[5:], True, 'cpu', autocast), features)[-1]
    alone = torch.cat([predict.follow(model, *predict.encode_frames(model, frame[None], True, 'cpu', autocast), features)[-1]
                       for frame in frames[5:]])
    model.mode = mode and 'inductive'
    whole = model(frames[None], 5)[0]
    assert torch.allclose(features[-1], whole[:5], atol=1e-5) and torch.allclose(together, whole[5:], atol=1e-5)
    assert torch.allclose(together, alone, atol=1e-5)
    if mode:  # and it matters: the joint model's answer differs
        model.mode = 'joint'
        assert not torch.allclose(together, model(frames[None], 5)[0, 5:], atol=1e-3)


def test_mean_pooled_features_are_those_of_the_test(world):
    model, _ = loaded(world, 'joint')
    frames = torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    autocast = torch.autocast('cpu', enabled=False)
    features, tokens = predict.encode_frames(model, frames, False, 'cpu', autocast)
    by_frame = F.normalize(model.visual(model.normalise(frames.flatten(0, 1))), dim=-1).unflatten(0, (3, 4))
    assert torch.allclose(features, F.normalize(by_frame.mean(1), dim=-1), atol=1e-5) and not tokens


# ---- Whole clips

@pytest.mark.parametrize('ckpt', [None, 'joint', 'False'])
def test_clips_are_labelled_alone_as_together(world, call, ckpt):
    options = dict(ckpt=world / f'{ckpt}.pt') if ckpt else {}
    result = call(query=world / 'queries', json=True, top=3, **options)
    assert not result.status and [row['query'].split('/')[-1] for row in result.rows] == ['blue.mp4', 'green.mp4', 'red.mp4']
    for row in result.rows:
        assert sum(item['score'] for item in row['classes']) == pytest.approx(1, abs=1e-5)
        (alone,) = call(query=row['query'], json=True, top=3, **options).rows
        assert {i['name']: pytest.approx(i['score'], abs=1e-4) for i in row['classes']} == {
            i['name']: i['score'] for i in alone['classes']}
    if not ckpt:
        assert [row['classes'][0]['name'] for row in result.rows] == ['blue', 'green', 'red']
        text = call(query=str(world / 'queries' / '*.mp4')).out
        assert 'clip-mean-pool, 3 classes, 1 to 3 examples each' in text and 'green.mp4: green ' in text


def test_a_failing_query_is_named_and_the_rest_go_on(world, call, tmp_path):
    (tmp_path / 'empty.mp4').touch()
    paths = [str(tmp_path / 'empty.mp4'), str(world / 'queries' / 'red.mp4'), str(tmp_path / 'none.mp4')]
    result = call(query=paths, json=True)
    assert result.status == '2 of 3 queries could not be read.'
    assert 'empty.mp4' in result.rows[0]['error'] and 'none.mp4: No such file' in result.rows[2]['error']
    assert result.rows[1]['classes'][0]['name'] == 'red' and 'empty.mp4' in result.err
    assert call(query=paths[0]).status == '1 of 1 queries could not be read.'


def test_saved_examples_give_the_same_and_need_no_clips(world, call, tmp_path):
    for mode in (dict(), dict(ckpt=world / 'joint.pt')):
        kept = tmp_path / f'kept{len(mode)}.pt'
        first = call(query=world / 'queries', top=3, save_support=kept, **mode)
        second = call(query=world / 'queries', top=3, support=kept, **mode)
        assert first.out == second.out and not second.status and 'red' in first.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['kept0.pt', 'kept1.pt']


def test_saved_examples_of_something_else(world, call, tmp_path):
    kept, query = tmp_path / 'kept.pt', world / 'queries' / 'red.mp4'
    call(save_support=kept)
    assert 'resize 32 (now 40)' in call(support=kept, query=query, resize=40).status
    assert 'checkpoint None (now ' in call(support=kept, query=query, ckpt=world / 'joint.pt').status
    clip = random_clip()
    clip.visual.proj.data.neg_()
    torch.save(clip.state_dict(), tmp_path / 'other.pt')
    assert 'weights' in call(support=kept, query=query, clip=tmp_path / 'other.pt').status
    assert 'is no file of --save_support' in call(support=query, query=query).status
    assert 'There is no ' in call(support=tmp_path / 'none', query=query).status


def test_an_unreadable_example_is_left_out_but_not_a_class(call, world, tmp_path):
    for name in ('red', 'blue'):
        for i in range(2):
            write_video(tmp_path / name / f'{i}.mp4', shades(name, 6, i))
    (tmp_path / '.hidden').mkdir()
    (tmp_path / 'red' / '1.mp4').write_bytes(b'no video')
    result = call(support=tmp_path, query=world / 'queries' / 'red.mp4')
    assert not result.status and '2 classes, 1 to 2 examples' in result.out and str(tmp_path / 'red' / '1.mp4') in result.err
    (tmp_path / 'red' / '0.mp4').unlink()
    assert "Class 'red' has no clip that could be read" in call(support=tmp_path, query=world / 'queries' / 'red.mp4').status
    (tmp_path / 'blue' / '0.mp4').unlink()
    (tmp_path / 'blue' / '1.mp4').unlink()
    (tmp_path / 'red' / '1.mp4').unlink()
    assert "Class 'blue' has no clip" in call(support=tmp_path, query=world / 'queries' / 'red.mp4').status  # nor has red
    assert 'holds 0 class folders' in call(support=tmp_path / 'red', query=world / 'queries' / 'red.mp4').status


# ---- Long videos

def grey(i):
    return np.full(3, 4 * i)


def frames_of(clip):
    """Which frame of a video of greys 0, 4, 8, ... each frame of a clip is."""
    return (clip.float().mean((1, 2, 3)) / 4).round().int().tolist()


def reference(times, length, window, stride, frames):
    """Windows and their frames the slow way: for each wanted second the last frame that has begun by then."""
    width, start, found = min(window, length), 0, []
    while True:
        last = start + width > length - 1e-6
        start = length - width if last else start
        wanted = [start + (i + 0.5) * width / frames for i in range(frames)]
        found.append((start, start + width, [max(j for j, time in enumerate(times) if time <= t + 1e-6) for t in wanted]))
        if last:
            return found
        start += stride


@pytest.mark.parametrize('kind', ['constant.mp4', 'constant.avi', 'constant.h264', 'variable.mp4', 'variable.mkv', 'late.mkv'])
@pytest.mark.parametrize('window, stride', [(2, 1), (1.3, 0.2), (0.5, 1.7), (60, 1)])
def test_windows_take_the_frames_of_their_seconds(tmp_path, kind, window, stride):
    n, rate = 60, 25 if kind == 'constant.h264' else 10  # raw H.264 has no time stamps, and 25 is what is assumed
    times = np.arange(n) * 1000 / rate
    if not kind.startswith('constant'):
        times = np.cumsum(np.random.default_rng(3).integers(20, 400, n)) + (5000 if kind == 'late.mkv' else 0)
    stamps = None if kind.startswith('constant') else times.tolist()
    path = write_video(tmp_path / kind, map(grey, range(n)), rate, stamps)
    config = dict(DEFAULTS, **OPTIONS, window=float(window), stride=float(stride))
    found = [(start, end, frames_of(clip)) for start, end, clip in predict.windows(str(path), config, 32)]
    times = (times - times[0]) / 1000
    for got, expected in zip(found, reference(times, found[-1][1], window, stride, 4), strict=True):
        assert got[:2] == pytest.approx(expected[:2]) and got[2] == expected[2]
    assert 0 < found[-1][1] - times[-1] < 0.5 and found[0][0] == 0  # to the end of the last frame


def test_one_window_over_all_is_the_clip(tmp_path):
    path = str(write_video(tmp_path / 'clip.mp4', map(grey, range(24))))
    config = dict(DEFAULTS, **OPTIONS, window=60.0, stride=1.0)
    ((_, _, clip),) = predict.windows(path, config, 32)
    assert torch.equal(clip, ClipMaker(config, 32).clip(Video(path), None))


def test_rotated(tmp_path, monkeypatch):
    path = str(write_video(tmp_path / 'clip.mp4', map(grey, range(12))))
    convert = predict.Converter.__call__
    monkeypatch.setattr(predict.Converter, '__call__', lambda self, frame: np.rot90(convert(self, frame)))  # as it does
    config = dict(DEFAULTS, **OPTIONS, window=60.0, stride=1.0)
    assert [frames_of(clip) for *_, clip in predict.windows(path, config, 32)] == [[1, 4, 7, 10]]


def test_a_frame_on_show_for_an_hour(tmp_path, monkeypatch):
    """What a slide show makes, or a wild time stamp: the windows come one after another, none waits in memory."""
    path = str(write_video(tmp_path / 'slides.mkv', [grey(1), grey(9), grey(5)], times=[0, 1000, 3_601_000]))
    lengths = []

    class Watched(deque):
        def append(self, item):
            super().append(item)
            lengths.append(len(self))

    monkeypatch.setattr(predict, 'deque', Watched)
    config = dict(DEFAULTS, **OPTIONS, window=2.0, stride=1.0)
    found = [frames_of(clip) for *_, clip in predict.windows(path, config, 32)]
    assert 3600 <= len(found) <= 3602 and found[0] == [1, 1, 9, 9] and found[1800] == [9] * 4
    assert max(lengths) <= 3


def test_memory_is_flat(tmp_path, monkeypatch):
    held, most, made, crop = weakref.WeakSet(), [], [], ClipMaker.crop

    def counted(self, frames, rng):
        picture = crop(self, frames, rng)[0].clone()
        held.add(picture)
        most.append(len(held))
        made.append(1)
        return [picture]

    monkeypatch.setattr(ClipMaker, 'crop', counted)
    config = dict(DEFAULTS, **OPTIONS, window=2.0, stride=1.0)
    peaks = []
    for n in (60, 600):
        path = write_video(tmp_path / f'{n}.mp4', [grey(i % 60) for i in range(n)])
        most.clear(), made.clear()
        count = sum(1 for _ in predict.windows(str(path), config, 32))
        assert count == n // 10 - 1 and len(made) <= 4 * count
        peaks.append(max(most))
    assert peaks[0] == peaks[1] <= 8  # T frames of each of the two windows that are open at a time


@pytest.mark.parametrize('ckpt', [None, 'joint'])
def test_timeline_of_two_halves(world, call, tmp_path, ckpt):
    path = write_video(tmp_path / 'long.mp4', [*shades('red', 100, 5), *shades('blue', 100, 6)])
    options = dict(ckpt=world / f'{ckpt}.pt') if ckpt else {}
    options |= dict(query=path, window=2.0, stride=0.5, csv=tmp_path / 'timeline.csv')
    (row,) = call(json=True, **options).rows
    with open(tmp_path / 'timeline.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 37 and float(rows[-1]['end']) == 20
    for window in rows:
        scores = {name: float(window[name]) for name in COLOURS}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-3) and window['class'] == max(scores, key=scores.get)
    parts = row['timeline']
    assert parts[0]['start'] == 0 and parts[-1]['end'] == 20
    assert all(a['end'] == b['start'] and a['name'] != b['name'] for a, b in zip(parts, parts[1:]))
    if not ckpt:  # random aggregators know no colours
        assert [part['name'] for part in parts if part['end'] - part['start'] > 2.01] == ['red', 'blue']
        assert max(part['end'] for part in parts if part['name'] == 'red') == pytest.approx(10, abs=1)
        assert min(part['start'] for part in parts if part['name'] == 'blue') == pytest.approx(10, abs=1)
        text = call(**options).out.splitlines()
        assert text[-len(parts)].split()[-1] == 'red' and len(text) == len(parts) + 2


def test_windows_of_what_cannot_be_read(world, call, tmp_path):
    (tmp_path / 'empty.mp4').touch()
    paths = [str(tmp_path / 'empty.mp4'), str(world / 'queries' / 'red.mp4')]
    result = call(query=paths, json=True, window=0.5)
    assert result.status == '1 of 2 queries could not be read.' and 'empty.mp4' in result.rows[0]['error']
    assert result.rows[1]['timeline'][0]['name'] == 'red'


def test_windows_from_their_own_process_and_its_death(tmp_path):
    path = write_video(tmp_path / 'long.mp4', shades('red', 300, 5))
    config = dict(DEFAULTS, **OPTIONS, window=2.0, stride=0.5)
    here, apart = list(predict.windows(str(path), config, 32)), list(predict.windows_apart(str(path), config, 32))
    assert len(here) == 57
    for (start, end, clip), (other_start, other_end, other) in zip(here, apart, strict=True):
        assert (start, end) == (other_start, other_end) and torch.equal(clip, other)
    slide = predict.windows_apart(str(path), config, 32)
    next(slide)
    multiprocessing.active_children()[-1].kill()
    with pytest.raises(UnreadableVideo, match='crashed'):
        list(slide)


@pytest.mark.parametrize('ckpt', ['joint', None])
def test_half_precision_ends_where_it_should(world, call, monkeypatch, ckpt):
    """Autocast as on CUDA: scores are computed in float32, outside of it."""
    inside = []
    monkeypatch.setattr(predict, 'resolve_device', lambda config: ('cpu', torch.bfloat16))
    monkeypatch.setattr(predict, 'score', lambda *args, score=predict.score: inside.append(
        torch.is_autocast_enabled('cpu')) or score(*args))
    result = call(query=world / 'queries', json=True, **(dict(ckpt=world / f'{ckpt}.pt') if ckpt else {}))
    assert result.status is None and result.rows and inside and not any(inside)


def test_clips_outside_of_class_folders_are_named(call, world, tmp_path):
    shutil.copytree(world / 'examples', tmp_path / 'examples')
    shutil.copy(world / 'queries' / 'red.mp4', tmp_path / 'examples' / 'loose.mp4')
    result = call(support=tmp_path / 'examples', query=world / 'queries')
    assert result.status is None and '1 clips outside of class folders, such as loose.mp4' in result.err


def test_merge():
    rows = [(0, 2, 'a', 0.5), (1, 3, 'a', 0.7), (2, 4, 'b', 0.9), (3, 5, 'a', 0.8), (7, 9, 'b', 0.6)]
    assert list(predict.merge(rows)) == [(0, 2.5, 'a', 0.6), (2.5, 3.5, 'b', 0.9), (3.5, 5, 'a', 0.8), (7, 9, 'b', 0.6)]
    assert list(predict.merge([])) == []


def test_needs(call, world):
    assert 'needs --support' in call().status
    assert 'Cannot write' in call(query=world / 'queries', csv=world / 'none' / 'x.csv').status
    assert 'Cannot write' in call(save_support=world / 'none' / 'x.pt').status
    assert 'window=-1' in call(query=world, window=-1.0).status
