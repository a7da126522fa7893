"""Tests of data.py: decoding, sampling, episodes, and the worker processes."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

import data
import decode
import reader
from config import DEFAULTS
from make_clips import KINDS, picture, write_clip, write_folder

# ---- Decoding


@pytest.fixture(scope='session')
def kinds(tmp_path_factory):
    """{name: path} of one clip of each kind."""
    folder = tmp_path_factory.mktemp('kinds')
    return {name: write_clip(folder / name, **args) for name, args in KINDS.items()}


def sequential(path):
    """Every frame, decoded in order by PyAV's plainest means."""
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])


@pytest.mark.parametrize('name', KINDS)
def test_decoding_equals_sequential_decoding(kinds, name):
    expected = sequential(kinds[name])
    assert len(expected) == KINDS[name].get('frames', 30)
    for frames, seed in ((8, None), (8, 0), (8, 1), (3, 2), (1, 3), (1, None), (100, None)):
        rng = None if seed is None else np.random.default_rng(seed)
        indices = decode.sample_indices(len(expected), frames, rng)
        got = decode.read_frames(kinds[name], lambda n, i=indices: i, 1000)
        assert got.dtype == np.uint8 and np.array_equal(got, expected[indices])
    for i in range(len(expected)):
        assert np.array_equal(decode.read_frames(kinds[name], lambda n, i=i: [i], 1000)[0], expected[i])


def test_the_number_of_frames_is_counted_not_read_from_the_header(kinds):
    for name in KINDS:
        seen = []
        decode.read_frames(kinds[name], lambda n, seen=seen: seen.append(n) or [0], 1000)
        assert seen[-1] == KINDS[name].get('frames', 30), name


@pytest.mark.parametrize('places, content, counts', [
    ((28, 11, 5), b'\0\0\1\xb6\x50\xdf', [33, None]), ((2, 1), b'\x7f', [None])])
def test_packets_without_a_frame(kinds, tmp_path, places, content, counts):
    """XviD's placeholders: the frames that come out are counted, not the packets; those of one byte cost no second decoding."""
    path = str(tmp_path / 'placeholders.avi')
    with av.open(kinds['xvid.avi']) as source, av.open(path, 'w') as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [bytes(packet) for packet in source.demux(video=0) if packet.size]
        for i in places:
            packets.insert(i, content)
        for i, data_of in enumerate(packets):
            packet = av.Packet(data_of)
            packet.pts = packet.dts = i
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), i == 0
            target.mux(packet)
    expected, seen = sequential(kinds['xvid.avi'] if content == b'\x7f' else path), []
    got = decode.read_frames(path, lambda n: seen.append(n) or decode.sample_indices(n, 8), 1000)
    assert len(expected) < 33 and seen == [count or len(expected) for count in counts]
    assert np.array_equal(got, expected[decode.sample_indices(len(expected), 8)])


def test_short_side(kinds):
    assert decode.read_frames(kinds['gops.mp4'], lambda n: [0, 5], 24).shape == (2, 24, 32, 3)
    assert decode.read_frames(kinds['odd_444.mp4'], lambda n: [0], 51).shape == (1, 51, 67, 3)
    assert decode.read_frames(kinds['odd_444.mp4'], lambda n: [0], 500).shape == (1, 51, 67, 3)  # never enlarged


def test_rotation_is_applied(kinds, tmp_path):
    """The matrix that phones write: shown turned clockwise by 90 degrees."""
    upright = decode.read_frames(kinds['gops.mp4'], lambda n: [0, 9], 1000)
    content = bytearray(open(kinds['gops.mp4'], 'rb').read())
    at = content.index(b'tkhd') + 44
    one, zero, minus, last = ((v).to_bytes(4, 'big', signed=True) for v in (0x10000, 0, -0x10000, 0x40000000))
    content[at:at + 36] = zero + one + zero + minus + zero + zero + zero + zero + last
    path = tmp_path / 'turned.mp4'
    path.write_bytes(content)
    turned = decode.read_frames(str(path), lambda n: [0, 9], 1000)
    assert np.array_equal(turned, np.rot90(upright, -1, (1, 2)))


def test_folder_of_images(tmp_path):
    path = write_folder(tmp_path / 'clip', 12, ext='.png')
    got = decode.read_frames(path, lambda n: decode.sample_indices(n, 12), 1000)
    assert np.array_equal(got, np.stack([picture(i) for i in range(12)]))  # img_2 before img_10
    path = write_folder(tmp_path / 'jpg', 3)
    got = decode.read_frames(path, lambda n: [0, 2], 1000)
    assert np.abs(got.astype(int) - np.stack([picture(0), picture(2)])).mean() < 12


def test_images_of_different_sizes_are_named(tmp_path):
    path = write_folder(tmp_path / 'clip', 3)
    os.replace(write_folder(tmp_path / 'other', 1, size=(80, 48)) + '/img_1.jpg', f'{path}/img_2.jpg')
    with pytest.raises(decode.UnreadableVideo, match='different sizes'):
        decode.read_frames(path, lambda n: range(n), 1000)


def test_unreadable_videos_are_named(tmp_path):
    (tmp_path / 'empty.mp4').touch()
    (tmp_path / 'text.mp4').write_text('no video')
    (tmp_path / 'folder.mp4').mkdir()
    for name in ('empty.mp4', 'text.mp4', 'folder.mp4', 'missing.mp4'):
        with pytest.raises(decode.UnreadableVideo, match=name):
            decode.read_frames(str(tmp_path / name), lambda n: decode.sample_indices(n, 8), 256)


def test_what_decodes_of_a_cut_file_is_used(kinds, tmp_path):
    for name in ('long_gop.mkv', 'open_gop.ts', 'xvid.avi', 'fragmented.mp4'):
        content = open(kinds[name], 'rb').read()
        path = tmp_path / name
        path.write_bytes(content[:len(content) * 6 // 10])
        expected, counts = sequential(kinds[name]), []
        got = decode.read_frames(str(path), lambda n, c=counts: c.append(n) or decode.sample_indices(n, 8), 1000)
        assert 5 < counts[-1] < len(expected), name
        indices = decode.sample_indices(counts[-1], 8)
        assert np.array_equal(got[:6], expected[indices[:6]]), name  # the very last frames may be damaged


# ---- Sampling

def test_sample_indices():
    for n in (1, 3, 7, 8, 9, 16, 100, 301):
        middle, edges = decode.sample_indices(n, 8), [t * n // 8 for t in range(9)]
        drawn = np.stack([decode.sample_indices(n, 8, np.random.default_rng(seed)) for seed in range(300)])
        assert (drawn[:, 1:] >= drawn[:, :-1]).all()
        for t in range(8):
            part = range(edges[t], max(edges[t] + 1, edges[t + 1]))
            assert middle[t] == part[len(part) // 2] and set(drawn[:, t]) <= set(part)
            assert len(part) > 20 or set(drawn[:, t]) == set(part)
    assert decode.sample_indices(16, 8).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert decode.sample_indices(3, 8).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def fake_split(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    videos = [decode.Video(f'{i}.mp4') for i in range(sum(sizes))]
    return data.Split('train', [f'class {i}' for i in range(len(sizes))], videos, labels)


def test_episodes():
    split = fake_split([6, 10, 7, 30, 9, 8])
    counts = np.zeros(len(split.videos))
    for number in range(400):
        drawn = data.episode(split, 3, 2, 4, 42, number)
        assert drawn.dtype == np.int64 and len(set(drawn.tolist())) == 18
        support, query = split.labels[drawn[:6]].reshape(3, 2), split.labels[drawn[6:]].reshape(3, 4)
        assert (support == support[:, :1]).all() and (query == support[:, :1]).all() and len(set(support[:, 0])) == 3
        assert np.array_equal(drawn, data.episode(split, 3, 2, 4, 42, number))
        counts[drawn] += 1
    per_class = [counts[members].sum() for members in split.members]
    assert np.allclose(per_class, 400 * 18 / 6, rtol=0.15)  # classes are equally likely whatever their size
    assert not np.array_equal(data.episode(split, 3, 2, 4, 42, 0), data.episode(split, 3, 2, 4, 43, 0))


def test_episodes_of_groups():
    """Even ones lie within one group, odd ones have no two classes of one."""
    split = dataclasses.replace(fake_split([6] * 9), groups=[[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    seen = set()
    for number in range(100):
        classes = split.labels[data.episode(split, 3, 1, 1, 42, number)[:3]]
        groups = set(classes // 3)
        assert len(set(classes)) == 3 and len(groups) == (1 if number % 2 == 0 else 3)
        seen |= {(number % 2, label) for label in classes}
    assert len(seen) == 18  # any class in either
    assert split.most_ways == 3 and fake_split([6] * 9).most_ways == 9
    with pytest.raises(SystemExit, match='9 classes in 3 groups, the smallest of 3, too few for 4-way'):
        data.episode(split, 4, 1, 1, 42, 0)
    assert data.fit_episode(dict(lower=True), split, 5, 1, 1) == (3, 1, 1)


def test_impossible_episodes_stop_with_a_sentence():
    with pytest.raises(SystemExit, match='has 2 classes'):
        data.episode(fake_split([5, 5]), 3, 1, 1, 0, 0)
    with pytest.raises(SystemExit, match="'class 1' of split train has 3 videos"):
        data.episode(fake_split([5, 3]), 2, 2, 2, 0, 0)


# ---- Which videos there are

def make_config(root, **options):
    return dict(DEFAULTS, data_root=str(root), resize=48, cache_gb=0.01, device='cpu', **options)


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """Three classes of six clips: four files, one folder of frames, and one that cannot be read."""
    root = tmp_path_factory.mktemp('data')
    for k, name in enumerate(('Turn_Left', 'jump', 'Roll Over')):
        (root / name).mkdir()
        for i in range(4):
            write_clip(root / name / f'{i}.mp4', frames=10 + 9 * i + k, options=dict(preset='ultrafast'))
        write_folder(root / name / '4', 9)
        (root / name / '5.avi').write_bytes(b'RIFF' + bytes(100))
    return root


def test_folder_per_class(folder):
    splits = data.load_splits(make_config(folder, splits=dict(train=['turn left', 'Jump'], test=['roll_over'])))
    train = splits['train']
    assert train.classes == ['turn left', 'Jump'] and train.labels.tolist() == [0] * 6 + [1] * 6
    assert [os.path.relpath(v.path, folder) for v in train.videos[:6]] == [f'Turn_Left/{n}' for n in
                                                                          ('0.mp4', '1.mp4', '2.mp4', '3.mp4', '4', '5.avi')]
    assert splits['val'].classes == [] and len(splits['test'].videos) == 6


def test_loose_videos_are_named_and_no_class(folder, capsys):
    write_clip(folder / 'loose.gif', codec='gif', pix_fmt='rgb8')
    with pytest.raises(SystemExit, match="has 3 classes"):
        data.list_videos(make_config(folder, splits=dict(train=0.5, val=0.5)))
    err = capsys.readouterr().err
    assert '1 videos outside of class folders' in err and 'loose.gif' in err


def test_groups_of_classes(folder):
    groups = [['turn left', 'Jump'], ['roll_over']]
    split = data.load_splits(make_config(folder, splits=dict(test=groups)))['test']
    assert split.classes == ['turn left', 'Jump', 'roll_over'] and split.groups == [[0, 1], [2]]
    assert data.load_splits(make_config(folder, splits=dict(test=sum(groups, []))))['test'].groups == []
    with pytest.raises(SystemExit, match="'roll_over' stands in none"):
        data.load_splits(make_config(folder, splits=dict(test=[['turn left', 'Jump'], 'roll_over'])))


def test_fractions_and_bad_splits(folder, tmp_path):
    by_class = {f'c{i}': [(f'C{i}', None, None)] for i in range(20)}
    parts = dict(train=0.6, val=0.2, test=0.2)
    splits = data.split_classes(make_config(folder, splits=parts), by_class)
    assert [len(splits[split]) for split in data.SPLITS] == [12, 4, 4] and len(set(sum(splits.values(), []))) == 20
    assert splits == data.split_classes(make_config(folder, splits=parts), by_class)
    assert splits != data.split_classes(dict(make_config(folder, splits=parts), seed=7), by_class)
    few = data.split_classes(make_config(folder, splits=parts), {f'c{i}': by_class[f'c{i}'] for i in range(6)})
    assert [len(few[split]) for split in data.SPLITS] == [2, 2, 2]
    for options, message in ((dict(splits=dict(train=['turn lfet'])), "'turn lfet' of split train has no video.*Turn_Left"),
                             (dict(splits=dict(train=['jump'], test=['Jump'])), 'stands in train and in test'),
                             (dict(splits=dict(train=0.9, test=0.9)), '1.8'), (dict(splits=dict(trian=['jump'])), 'trian'),
                             (dict(splits=parts), 'has 3 classes, too few for 3 splits'), (dict(), 'splits is not set'),
                             *((dict(splits=part), 'in a list, or give a fraction for each') for part in (
                                 dict(train='jump'), dict(train=0.5, val=['jump']), dict(train=None))),
                             (dict(splits=dict(train=3)), 'add up to 3, more than 1')):
        with pytest.raises(SystemExit, match=message):
            data.load_splits(make_config(folder, **options))
    with pytest.raises(SystemExit, match='no folder'):
        data.load_splits(make_config(tmp_path / 'nowhere', splits=parts))


def test_prepare_makes_missing_data_once(tmp_path):
    script = tmp_path / 'make.py'
    script.write_text('import os, sys\nfor c in "ab": os.makedirs(f"{sys.argv[2]}/{c}/1"), '
                      'open(f"{sys.argv[2]}/{c}/1/1.jpg", "w")\n')
    config = make_config(tmp_path / 'made', splits=dict(train=['a'], val=['b']), prepare=f'{script} --level=hard --n=1')
    script.write_text(script.read_text() + 'assert sys.argv[3:] == ["--level=hard", "--n=1"]\n')
    assert len(data.load_splits(config)['train'].videos) == 1 and os.listdir(tmp_path / 'made')
    script.unlink()
    data.load_splits(config)  # does not need the script again


# ---- Clips

def test_one_crop_and_one_flip_for_the_whole_clip():
    """A still video stays still; another seed gives another crop."""
    maker = reader.ClipMaker(make_config('', augment='crop'), 32)
    still = np.repeat(picture(0)[None], 8, 0)
    clips = [maker.crop(still, np.random.default_rng(seed)) for seed in range(20)]
    assert all(clip.shape == (8, 3, 32, 32) and clip.dtype == torch.uint8 for clip in clips)
    assert all((clip == clip[:1]).all() for clip in clips)
    assert len({clip.numpy().tobytes() for clip in clips}) == 20


def test_flip_and_centre_crop():
    ramp = np.tile(np.arange(64, dtype=np.uint8)[:, None], (8, 48, 1, 3))  # brighter to the right
    maker = reader.ClipMaker(make_config('', augment='crop'), 32)

    def rising(seeds):
        clips = [maker.crop(ramp, np.random.default_rng(seed)) for seed in range(seeds)]
        return sum((clip[..., -1] > clip[..., 0]).all().item() for clip in clips)

    assert 70 < rising(200) < 130
    maker.config['flip'] = False
    assert rising(50) == 50
    assert np.array_equal(maker.crop(ramp, None)[0, 0, 0], np.arange(16, 48))  # 32 of 48, nothing scaled
    small = reader.ClipMaker(dict(maker.config, resize=48), 48)
    assert np.array_equal(small.crop(ramp, None)[0].permute(1, 2, 0), ramp[0][:, 8:56])


def test_what_is_kept_changes_nothing(kinds):
    kept, anew = (reader.ClipMaker(dict(make_config('', cache_frames=16), cache_gb=gb), 32) for gb in (1.0, 0.0))
    for name in ('gops.mp4', 'five_frames.mp4', 'vp9.webm'):
        for seed in (None, [1, 2], [1, 3], [1, 2]):
            video = decode.Video(kinds[name])
            assert torch.equal(kept.clip(video, seed), anew.clip(video, seed))
    assert len(kept.store.kept) == 6 and len(anew.store.kept) == 0
    bounded = reader.ClipMaker(dict(kept.config, cache_gb=2e-4), 32)
    for name in kinds:
        bounded.clip(decode.Video(kinds[name]), [0])
    assert 0 < sum(frames.nbytes for frames in bounded.store.kept.values()) <= 200_000


def test_a_file_that_changes_is_read_again(kinds, tmp_path):
    maker, path = reader.ClipMaker(make_config(''), 32), tmp_path / 'clip.mp4'
    path.write_bytes(open(kinds['gops.mp4'], 'rb').read())
    before = maker.clip(decode.Video(str(path)), None)
    path.write_bytes(open(kinds['five_frames.mp4'], 'rb').read())
    assert not torch.equal(maker.clip(decode.Video(str(path)), None), before)


def test_start_and_end_bound_the_clip(kinds):
    maker = reader.ClipMaker(make_config(''), 48)
    expected = sequential(kinds['gops.mp4'])[20:36]
    got = maker.frames(decode.Video(kinds['gops.mp4'], 20, 36))
    assert np.array_equal(got, expected[decode.sample_indices(16, 8)])
    with pytest.raises(decode.UnreadableVideo, match='begins at frame 80'):
        maker.frames(decode.Video(kinds['gops.mp4'], 80, 90))


# ---- Workers

def jobs_of(split, count, first=0):
    return ((k, np.stack([data.episode(split, 2, 2, 1, 0, 2 * k), data.episode(split, 2, 2, 1, 0, 2 * k + 1)]))
            for k in range(first, first + count))


def read(config, folder, count=6, first=0, between=None):
    """Training batches and the test clips, as (frames, indices)."""
    split = data.load_splits(config)['train']
    clips = reader.ClipReader(config, 32)
    try:
        stream, train = clips.stream(split, jobs_of(split, count, first), True), []
        for batch in stream:
            train.append(batch)
            if between:
                between(clips)
        test = list(clips.stream(split, [(0, np.arange(7)), (1, np.arange(7, len(split.videos)))], False))
    finally:
        clips.close()
    return train, test, split


@pytest.fixture(scope='session')
def splits_option():
    return dict(train=['Turn_Left', 'jump', 'Roll Over'])


@pytest.fixture(scope='session')
def in_process(folder, splits_option):
    return read(make_config(folder, splits=splits_option, workers=0), folder)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) and np.array_equal(i, j) for (x, i), (y, j) in zip(a, b))


def test_unreadable_videos_are_replaced_or_left_out(in_process, folder, splits_option, capsys):
    train, test, split = in_process
    broken = [i for i, video in enumerate(split.videos) if video.path.endswith('5.avi')]
    asked = [indices for _, indices in jobs_of(split, 6)]
    assert any(np.isin(job, broken).any() for job in asked)
    for (frames, indices), job in zip(train, asked):
        assert frames.shape == (2, 6, 8, 3, 32, 32) and indices.shape == job.shape
        assert np.array_equal(split.labels[indices], split.labels[job]) and not np.isin(indices, broken).any()
        assert all(len(set(row)) == 6 for row in indices.tolist())
        assert np.array_equal(indices[~np.isin(job, broken)], job[~np.isin(job, broken)])
    assert [indices.tolist() for _, indices in test] == [[i for i in range(7) if i not in broken],
                                                         [i for i in range(7, 18) if i not in broken]]
    assert all(len(frames) == len(indices) for frames, indices in test)
    read(make_config(folder, splits=splits_option, workers=0), folder)
    assert capsys.readouterr().err.count('5.avi') == 3  # one warning each
    with pytest.raises(SystemExit, match='5.avi'):
        read(make_config(folder, splits=splits_option, workers=0, strict=True), folder)


def test_number_of_decoding_processes(monkeypatch):
    monkeypatch.setattr(reader.os, 'sched_getaffinity', lambda pid: range(24), raising=False)
    assert [reader.worker_count(dict(workers=n)) for n in (None, 0, 3)] == [16, 0, 3]
    monkeypatch.setattr(reader, 'RANKS', 3)
    assert reader.worker_count(dict(workers=None)) == 5
    alone = reader.ClipReader(dict(DEFAULTS, workers=0, device='cpu', cache_gb=3.0), 32)
    assert alone.maker.store.room == 1e9  # its share of cache_gb


@pytest.mark.parametrize('workers', [1, 2])
def test_batches_do_not_depend_on_the_workers(in_process, folder, splits_option, workers):
    train, test, _ = read(make_config(folder, splits=splits_option, workers=workers), folder)
    assert same(train, in_process[0]) and same(test, in_process[1])


def test_a_stream_can_start_at_any_job(in_process, folder, splits_option):
    train, _, _ = read(make_config(folder, splits=splits_option, workers=2), folder, 3, first=3)
    assert same(train, in_process[0][3:])


def test_a_video_is_cropped_anew_in_every_job(in_process):
    config, split = make_config(''), in_process[2]
    (first, _), (second, _) = reader.ClipReader(dict(config, workers=0), 32).stream(split, [(0, [0, 0]), (1, [0, 0])], True)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], second[0])


def test_killed_workers_are_replaced(in_process, folder, splits_option):
    alive = []

    def kill(clips):
        alive.append([worker.process for worker in clips.workers])
        if len(alive) == 1:
            for process in alive[0]:
                os.kill(process.pid, signal.SIGKILL)

    train, test, _ = read(make_config(folder, splits=splits_option, workers=2), folder, between=kill)
    assert alive[-1] != alive[0]
    assert same(train, in_process[0]) and same(test, in_process[1])


def hanging(path):
    """A folder whose one image is a pipe that nobody writes to: reading it blocks for ever."""
    path.mkdir()
    os.mkfifo(path / '1.jpg')
    return decode.Video(str(path))


def test_a_video_that_hangs_the_decoder_is_given_up(folder, splits_option, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reader, 'TIME_LIMIT', 4)
    videos = [hanging(tmp_path / 'pipe'), *(decode.Video(str(folder / 'jump' / f'{i}.mp4')) for i in range(3))]
    split = data.Split('train', ['x'], videos, np.zeros(4, np.int64))
    clips = reader.ClipReader(make_config(folder, workers=1), 32)
    next(clips.stream(split, [(0, [1])], True))  # the process is up
    started = time.monotonic()
    (_, indices), = clips.stream(split, [(0, [0, 1, 2])], True)
    clips.close()
    assert indices.tolist() == [3, 1, 2] and time.monotonic() - started < 20
    assert 'pipe: not decoded within 4 s' in capsys.readouterr().err


def test_a_video_that_workers_die_on_twice_is_given_up(folder, tmp_path, capsys):
    videos = [decode.Video(str(folder / 'jump' / '0.mp4')), hanging(tmp_path / 'pipe')]
    clips, killed = reader.ClipReader(make_config(folder, workers=1), 32), []

    def kill():
        while len(killed) < 2:
            process = clips.workers[0].process
            if process is not None and process.pid and process not in killed:
                killed.append(process)
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.1)

    killer = threading.Thread(target=kill)
    stream = clips.stream(data.Split('test', ['x'], videos, np.zeros(2, np.int64)), [(0, [1]), (1, [0])], False)
    killer.start()
    results = [indices.tolist() for _, indices in stream]
    killer.join()
    clips.close()
    assert results == [[], [0]] and 'pipe: the decoder crashed on it; left out' in capsys.readouterr().err


def test_workers_end_when_the_run_is_killed(tmp_path):
    """Even one that is in the midst of a blocked read."""
    video = hanging(tmp_path / 'pipe')
    script = ('import decode, reader; from config import DEFAULTS; clips = reader.ClipReader(dict(DEFAULTS, workers=2, '
              f'device="cpu"), 32); list(clips.check([decode.Video({video.path!r})]))')
    run = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, cwd=os.path.dirname(reader.__file__))
    writer = None
    while writer is None and run.poll() is None:
        with contextlib.suppress(OSError):  # no one reads yet
            writer = os.open(os.path.join(video.path, '1.jpg'), os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.1)
    run.kill()
    try:
        run.communicate(timeout=20)  # ends when the last process that inherited the pipe has
    finally:
        os.close(writer)


def test_ctrl_c_while_a_process_starts(folder, monkeypatch):
    """It goes through as it is, and what starts the processes does not hear of it."""
    clips = reader.ClipReader(make_config(folder, workers=1), 32)
    context = clips.workers[0].context

    def start(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(context.Process, 'start', start)
        with pytest.raises(KeyboardInterrupt):
            list(clips.check([decode.Video(str(folder / 'jump' / '0.mp4'))]))
    clips.close()
    script = ('import re, reader; from multiprocessing import forkserver; from config import DEFAULTS; '
              'reader.ClipReader(dict(DEFAULTS, workers=1, device="cpu"), 32); pid = forkserver._forkserver._forkserver_pid; '
              'print(re.search("SigBlk:(.*)", open(f"/proc/{pid}/status").read())[1])')
    if os.path.exists('/proc/self/status'):
        run = subprocess.run([sys.executable, '-c', script], stdout=subprocess.PIPE, cwd=os.path.dirname(reader.__file__))
        assert int(run.stdout, 16) & 1 << signal.SIGINT - 1


def test_streams_interleave_and_may_be_left_early(in_process, folder, splits_option):
    config = make_config(folder, splits=splits_option, workers=2)
    split = data.load_splits(config)['train']
    clips = reader.ClipReader(config, 32)
    stream = clips.stream(split, jobs_of(split, 6), True)
    train = [next(stream), next(stream)]
    next(clips.stream(split, jobs_of(split, 6), True))  # begun and dropped
    test = list(clips.stream(split, [(0, np.arange(7)), (1, np.arange(7, 18))], False))
    train += stream
    processes = [worker.process for worker in clips.workers]
    clips.close()
    assert same(train, in_process[0]) and same(test, in_process[1])
    assert not any(process.is_alive() for process in processes)
