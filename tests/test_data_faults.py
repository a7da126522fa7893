"""Damaged files: hundreds of them, none may crash or hang a run. Each is read in a worker process, as in training."""

import os

import numpy as np
import pytest

import data
import decode
import reader
from config import DEFAULTS
from make_clips import KINDS, write_clip, write_folder

SECONDS = 5  # more than any of these small files may take


def damaged(content, seed):
    """Copies of a file's bytes, each damaged otherwise: {what was done: bytes}."""
    rng, size, copies = np.random.default_rng(seed), len(content), {}
    for part in (0.02, 0.1, 0.3, 0.5, 0.8, 0.97):
        copies[f'cut at {part}'] = content[:int(size * part)]
    for count in (1, 5, 50):
        changed = np.frombuffer(content, np.uint8).copy()
        changed[rng.integers(size, size=count)] = rng.integers(256, size=count)
        copies[f'{count} bytes changed'] = changed.tobytes()
    changed = np.frombuffer(content, np.uint8).copy()
    changed[rng.integers(min(size, 400), size=8)] = rng.integers(256, size=8)
    copies['header changed'] = changed.tobytes()
    start = rng.integers(size // 4, size // 2)
    copies['hole'] = content[:start] + content[start + size // 5:]
    copies['zeros'] = content[:start] + bytes(size // 5) + content[start + size // 5:]
    copies['noise'] = content[:start] + rng.bytes(size // 5) + content[start + size // 5:]
    copies['head of another'] = rng.bytes(64) + content[64:]
    return copies


@pytest.fixture(scope='module')
def faults(tmp_path_factory):
    """{what is wrong: path}."""
    root, files = tmp_path_factory.mktemp('faults'), {}

    def add(name, content):
        path = root / f'{len(files)}{os.path.splitext(name)[1]}'
        path.write_bytes(content)
        files[name] = str(path)

    for seed, (kind, args) in enumerate(KINDS.items()):
        source = write_clip(root / kind, **dict(args, frames=min(args.get('frames', 30), 24), times=None))
        for what, content in damaged(open(source, 'rb').read(), seed).items():
            add(f'{what}: {kind}', content)
    rng = np.random.default_rng(0)
    for ext in decode.VIDEOS:
        add(f'empty{ext}', b'')
        add(f'random{ext}', rng.bytes(5000))
        add(f'text{ext}', b'#EXTM3U\nhttp://localhost/x.ts\nffconcat version 1.0\nfile /etc/passwd\n')
    add('mp4 named .avi.avi', open(root / 'gops.mp4', 'rb').read())
    (root / 'folder.mp4').mkdir()
    files['folder.mp4'] = str(root / 'folder.mp4')
    images = write_folder(root / 'images', 10)
    for i, content in ((2, b''), (5, rng.bytes(300)), (7, open(f'{images}/img_7.jpg', 'rb').read()[:200])):
        folder = write_folder(root / f'images{i}', 10)
        open(f'{folder}/img_{i}.jpg', 'wb').write(content)
        files[f'folder whose image {i} is damaged'] = folder
    os.symlink(root / 'nowhere', root / 'dangling.mp4')
    files['dangling link.mp4'] = str(root / 'dangling.mp4')
    return files


def test_no_damaged_file_crashes_or_hangs_a_worker(faults, monkeypatch):
    assert len(faults) > 350
    monkeypatch.setattr(reader, 'TIME_LIMIT', SECONDS)
    names = {path: name for name, path in faults.items()}
    clips = reader.ClipReader(dict(DEFAULTS, workers=2, resize=48, device='cpu'), 1)
    try:
        verdicts = {names[video.path]: verdict for video, *verdict in clips.check([decode.Video(path) for path in names])}
    finally:
        clips.close()
    assert verdicts.keys() == faults.keys()
    assert not [name for name, verdict in verdicts.items() if 'crashed' in str(verdict) or 'not decoded' in str(verdict)]
    assert all(bool(problem) == (frames == 0) for frames, _, problem in verdicts.values())
    nothing = [f'{what}{ext}' for what in ('empty', 'random', 'text') for ext in decode.VIDEOS]
    assert all(verdicts[name][2] for name in ('folder.mp4', 'dangling link.mp4', *nothing))
    assert verdicts['mp4 named .avi.avi'] == [24, None, None]
    told = [name for name, (_, note, problem) in verdicts.items() if name.startswith('cut at 0.5') and (note or problem)]
    assert len(told) >= 15  # of 24: a stream without an index or a duration cannot tell


def test_training_on_damaged_files(faults, capsys):
    """Every batch is full, and of readable videos."""
    paths = sorted(faults.values())
    split = data.Split('train', ['a', 'b'], [decode.Video(path) for path in paths], np.arange(len(paths)) % 2)
    clips = reader.ClipReader(dict(DEFAULTS, workers=2, resize=48, device='cpu'), 32)
    try:
        for frames, indices in clips.stream(split, ((i, data.episode(split, 2, 5, 5, 0, i)) for i in range(10)), True):
            assert frames.shape == (20, 8, 3, 32, 32) and len(set(indices.tolist())) == 20
            assert not {split.videos[i] for i in indices} & clips.bad.keys()
    finally:
        clips.close()
    assert capsys.readouterr().err.count('Warning: unreadable video') == len(clips.bad)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_file_without_permission(tmp_path):
    path = write_clip(tmp_path / 'a.mp4', frames=9)
    os.chmod(path, 0)
    with pytest.raises(decode.UnreadableVideo, match='Permission denied'):
        decode.read_frames(path, lambda n: [0], 48)


def test_odd_names(tmp_path):
    for name in ('per%d cent 100%.mp4', 'colon:http:x.mp4', "quote'\" \n line.mp4", 'ü 視頻.mp4', '-dash.mp4', '[1]*?.mp4'):
        path = write_clip(tmp_path / 'clip.mp4', frames=9)
        os.rename(path, tmp_path / name)
        assert decode.read_frames(str(tmp_path / name), lambda n: range(n), 48).shape == (9, 48, 64, 3)
    name = os.fsencode(tmp_path) + b'/latin-\xfc.mp4'
    os.rename(write_clip(tmp_path / 'clip.mp4', frames=9), name)
    try:
        assert len(decode.read_frames(os.fsdecode(name), lambda n: range(n), 48)) == 9
    except decode.UnreadableVideo as error:
        assert 'latin' in str(error)
