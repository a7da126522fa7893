"""The demo's clips and stills say what they show."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest

DEMO = Path(__file__).resolve().parent.parent / 'demo'
sys.path.insert(0, str(DEMO))
import shapes  # noqa: E402

U = np.linspace(0, 1, 33)


COURSES = {name: shapes.trajectory(name, U, phase=70.0, swing=0.6, offset=0.3) for name in shapes.MOTIONS}


def backwards(name):
    """The classes that are `name` played backwards."""
    return [other for other, course in COURSES.items() if np.abs(course[::-1] - COURSES[name]).max() < 1e-6]


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])


def test_every_class_is_in_exactly_one_split():
    names = [name for split in shapes.SPLITS.values() for name in split]
    assert sorted(names) == sorted(shapes.MOTIONS)
    assert {split: len(names) for split, names in shapes.SPLITS.items()} == dict(train=158, val=10, test=16)


@pytest.mark.parametrize('split', shapes.SPLITS)
def test_every_class_has_its_reversal_in_its_own_split(split):
    for name in shapes.SPLITS[split]:
        (partner,) = backwards(name)
        assert partner in shapes.SPLITS[split]
        assert partner != name or name.endswith('and back')


def test_no_two_classes_are_the_same_motion():
    courses = np.stack(list(COURSES.values())).reshape(len(COURSES), -1)
    apart = np.abs(courses[:, None] - courses[None]).max(-1) + np.eye(len(courses))
    assert apart.min() > 1e-3


def test_every_class_stays_within_the_same_ranges():
    for name in shapes.MOTIONS:
        for offset in (-1, 1):
            away = np.abs(shapes.trajectory(name, U, 10.0, 0.66, offset) - shapes.MIDDLE) / shapes.REACH
            assert away[:, ~shapes.ROUND].max() <= 1 + 1e-6


@pytest.mark.parametrize('name, channel, sign', [
    ('move right', 0, 1), ('move down', 1, 1), ('spin clockwise', 2, 1), ('shrink', 3, -1), ('fade in', 4, 1),
])  # fmt: skip
def test_a_motion_does_what_its_name_says(name, channel, sign):
    change = COURSES[name][-1] - COURSES[name][0]
    assert sign * change[channel] > 0 and np.allclose(np.delete(change, channel), 0)


def test_drawing_moves_and_turns_clockwise_with_y_down():
    """White domes on black: their centres of mass lie where the state says, their round sides where they head."""
    state = np.stack([shapes.MIDDLE] * 3)
    state[:, :5] = [(44, 20, 0, np.log(12), 1), (20, 44, 90, np.log(12), 1), (32, 32, 180, np.log(12), 1)]
    dome = np.full(3, list(shapes.SHAPES).index('dome'))
    dark = dict(ground=np.zeros((3, 3), np.float32), specks=np.zeros((3, shapes.SPECKS, 4)), noise=np.zeros((3, 64, 64)))
    frames = shapes.draw(shape=dome, state=state, saturation=np.zeros(3), **dark)
    assert frames.shape == (3, 64, 64, 3) and frames.dtype == np.uint8
    light = frames.mean(-1) / frames.mean(-1).sum((1, 2), keepdims=True)
    x, y = (light.sum(1) * (np.arange(64) + 0.5)).sum(1), (light.sum(2) * (np.arange(64) + 0.5)).sum(1)
    assert np.abs(x - state[:, 0]).max() < 2.5 and np.abs(y - state[:, 1]).max() < 2.5
    for frame, axis in ((frames[0], 1), (frames[1], 0)):  # heading right, heading down: the round side is the far one
        lit = frame.any(-1).nonzero()[axis]
        assert lit.max() - 44 > 44 - lit.min()


def test_clips_decode_to_their_frames_and_are_the_same_for_the_same_seed(tmp_path):
    for folder in 'ab':
        shapes.write_dataset(tmp_path / folder, 2, seed=5, workers=1, names=['move right then grow', 'orbit clockwise'])
    files = sorted((tmp_path / 'a').rglob('*.*'))
    assert [f'{file.parent.name}/{file.name}' for file in files] == [
        f'{name}/{number}.mp4' for name in ('move right then grow', 'orbit clockwise') for number in ('0000', '0001')
    ]
    for file in files:
        assert file.read_bytes() == (tmp_path / 'b' / file.relative_to(tmp_path / 'a')).read_bytes()
        frames, rate = shapes.clip(file.parent.name, 5, int(file.stem))
        decoded = decode(file)
        assert decoded.shape == frames.shape and 20 <= len(frames) <= 32
        assert np.abs(decoded.astype(int) - frames).mean() < 12
        with av.open(str(file)) as container:
            assert container.streams.video[0].average_rate == rate
    assert not np.array_equal(shapes.clip('move right', 5, 0)[0][0], shapes.clip('move right', 6, 0)[0][0])


def test_writing_resumes(tmp_path):
    shapes.write_dataset(tmp_path, 2, workers=1, names=['grow'])
    kept, lost = tmp_path / 'grow/0000.mp4', tmp_path / 'grow/0001.mp4'
    whole = lost.read_bytes()
    kept.write_bytes(b'mine')
    lost.unlink()
    shapes.write_dataset(tmp_path, 3, workers=1, names=['grow'])
    assert kept.read_bytes() == b'mine' and lost.read_bytes() == whole
    assert len(list(tmp_path.rglob('*'))) == 4  # the folder and three clips, no temporary files


def test_captions_agree_with_the_drawing():
    """Stills of large solid shapes: the centre of mass of what differs from the ground lies on the side the words say."""
    frames, captions = shapes.stills(np.random.default_rng(0), 2000)
    assert frames.shape == (2000, 64, 64, 3) and len(set(captions)) > 1990
    centres = {'left': [], 'right': [], 'top': [], 'bottom': []}
    for frame, caption in zip(frames, captions):
        if not caption.startswith(('a huge solid', 'a large solid')):
            continue
        ground = np.median(frame.reshape(-1, 3), axis=0)
        differs = (np.abs(frame - ground).max(-1) > 60).nonzero()
        row, column = caption.split(', ')[1].split(' ', 1)
        for word, place in ((row, differs[0].mean()), (column.replace('far ', ''), differs[1].mean())):
            if word in centres:
                centres[word].append(place)
    assert min(map(len, centres.values())) > 10
    assert np.mean(centres['left']) < 28 and np.mean(centres['right']) > 36
    assert np.mean(centres['top']) < 28 and np.mean(centres['bottom']) > 36


def test_stills_alike_share_words():
    _, captions = shapes.stills(np.random.default_rng(0), 64, alike=16)
    common = [len(set(a.split()) & set(b.split())) for a, b in zip(captions[::16], captions[1::16])]
    _, captions = shapes.stills(np.random.default_rng(0), 64)
    assert np.mean(common) > np.mean([len(set(a.split()) & set(b.split())) for a, b in zip(captions[::2], captions[1::2])])


def test_one_still():
    frame, caption = shapes.still(np.random.default_rng(3))
    assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8 and caption.startswith('a ')
