"""The demo's clips and stills say what they show; sees.py reads what is there."""

import json
import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

DEMO = Path(__file__).resolve().parent.parent / 'demo'
sys.path.insert(0, str(DEMO))
import predict  # noqa: E402
import sees  # noqa: E402
import shapes  # noqa: E402
from clip_loader import CLIP  # noqa: E402
from config import DEFAULTS, read_sample  # noqa: E402
from model import VBA  # noqa: E402


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])


def test_every_class_is_in_one_group_and_every_group_in_one_split():
    groups = [group for split in shapes.SPLITS.values() for group in split]
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(shapes.MOTIONS) and len(set(names)) == len(names)
    assert {split: len(groups) for split, groups in shapes.SPLITS.items()} == dict(train=35, val=6, test=10)
    assert min(map(len, groups)) == 5  # 5-way episodes within a group


def test_groups_are_the_classes_of_equal_net_change():
    nets = [[shapes.MOTIONS[name][0] for name in group] for split in shapes.SPLITS.values() for group in split]
    assert all(np.allclose(net, group[0]) for group in nets for net in group)
    assert len({tuple(np.round(group[0], 6) + 0.0) for group in nets}) == len(nets)


@pytest.mark.parametrize('split', shapes.SPLITS)
def test_every_class_has_its_reversal_in_its_own_split(split):
    names = [name for group in shapes.SPLITS[split] for name in group]
    for name in names:
        net, corner = shapes.MOTIONS[name]
        backwards = [other for other, (end, bend) in shapes.MOTIONS.items()
                     if np.allclose(end, -net) and np.allclose(bend, corner - net)]
        assert len(backwards) == 1 and backwards[0] in names
        assert backwards[0] != name or name.endswith('and back')


def test_no_two_classes_are_the_same_motion():
    assert len({tuple(np.round(np.concatenate(motion), 6) + 0.0) for motion in shapes.MOTIONS.values()}) == len(shapes.MOTIONS)


@pytest.mark.parametrize('level', shapes.LEVELS)
def test_every_class_stays_within_the_same_ranges_around_the_same_middle(level):
    bounds, rng = shapes.bounds_of(level), np.random.default_rng(0)
    for name in shapes.MOTIONS:
        states = np.stack([shapes.course(rng, name, 40, bounds['part'], bounds['corner']) for _ in range(20)])
        away = (states - shapes.MIDDLE) / shapes.REACH
        assert np.abs(away[..., ~shapes.ROUND]).max() <= 1 + 1e-6
    for name in ('move right then grow', 'grow then move right', 'move right, too far and back'):
        states = [shapes.course(rng, name, 40, bounds['part'], bounds['corner']).mean(0) for _ in range(500)]
        away = (np.mean(states, 0) - shapes.MIDDLE) / shapes.REACH
        assert np.abs(away[~shapes.ROUND]).max() < 0.06


@pytest.mark.parametrize('name, channel, sign', [
    ('move right', 0, 1), ('move down', 1, 1), ('spin clockwise', 2, 1), ('shrink', 3, -1), ('fade in', 4, 1),
])  # fmt: skip
def test_a_motion_does_what_its_name_says(name, channel, sign):
    states = shapes.course(np.random.default_rng(1), name, 40, (1, 1), (0.5, 0.5))
    change = states[-1] - states[0]
    assert sign * change[channel] > 0 and np.allclose(np.delete(change, channel), 0)
    steps = sign * np.diff(states[:, channel])
    assert (steps > -1e-9).all()
    beyond = shapes.course(np.random.default_rng(1), f'{name}, too far and back', 41, (1, 1), (0.5, 0.5))[:, channel] * sign
    assert beyond.argmax() == 20 and beyond[0] < beyond[-1] < beyond[20]


def test_drawing_moves_and_turns_clockwise_with_y_down():
    """White domes on black: their centres of mass lie where the state says, their round sides where they head."""
    state = np.array([(44, 20, 0, np.log(12), 1), (20, 44, 90, np.log(12), 1), (32, 32, 180, np.log(12), 1)])
    frames, white = np.zeros((3, 64, 64, 3), np.float32), np.full((3, 3), 255)
    shapes.draw_shape(frames, state, np.full(3, list(shapes.SHAPES).index('dome')), white, white)
    light = frames.mean(-1) / frames.mean(-1).sum((1, 2), keepdims=True)
    x, y = (light.sum(1) * (np.arange(64) + 0.5)).sum(1), (light.sum(2) * (np.arange(64) + 0.5)).sum(1)
    assert np.abs(x - state[:, 0]).max() < 2.5 and np.abs(y - state[:, 1]).max() < 2.5
    for frame, axis in ((frames[0], 1), (frames[1], 0)):  # heading right, heading down: the round side is the far one
        lit = frame.any(-1).nonzero()[axis]
        assert lit.max() - 44 > 44 - lit.min()


def test_stills_tell_the_actor_from_the_second_shape():
    """The second shape is grey all over; the actor has colour, and a white nose."""
    rng = np.random.default_rng(0)
    look = shapes.appearance(rng, *rng.integers(6, size=(2, 1)), rng.uniform(0, 360, 1), (0, 0))
    look |= dict(specks=np.zeros((1, 5, 4)), ground=np.zeros((1, 2, 3)), noise=np.zeros((1, 64, 64)), bar=np.array([-64.0]))
    state, second = np.array([[16, 32, 0, np.log(9), 1.0]]), np.array([[48, 32, 0, np.log(9), 1.0]])
    (frame,) = shapes.draw(state=state, second=second, **look)
    spread = frame.max(-1).astype(int) - frame.min(-1)
    assert spread[:, :32].max() > 80 and frame[:, :32].min(-1).max() == 255
    assert spread[:, 32:].max() == 0 and 100 < frame[:, 32:].max() < 200
    second[:, 4] = 0
    assert shapes.draw(state=state, second=second, **look)[0, :, 32:].max() == 0


def test_the_looks_of_held_out_classes_are_in_no_still_and_no_training_clip(monkeypatch):
    seen, original = [], shapes.appearance

    def appearance(*args):
        look = original(*args)
        seen.append(set(look['texture']))
        return look

    monkeypatch.setattr(shapes, 'appearance', appearance)
    shapes.stills(np.random.default_rng(0), 200)
    for number in range(20):
        shapes.clip('move right then grow', 0, number)
    known = set().union(*seen)
    seen.clear()
    for number in range(20):
        shapes.clip('move left then grow', 0, number)
    held = set().union(*seen)
    assert known == set(shapes.KNOWN['textures']) and held and not known & held
    pairs = {kind: {frozenset((i, (i + step) % 6)) for i in range(6) for step in looks['pairs']}
             for kind, looks in dict(known=shapes.KNOWN, held=shapes.HELD).items()}
    assert not pairs['known'] & pairs['held']


def test_clips_decode_to_their_frames_and_are_the_same_for_the_same_seed(tmp_path):
    names = ['grow and back', 'move right then grow']
    for folder in 'ab':
        shapes.write_dataset(tmp_path / folder, 2, seed=5, workers=1, names=names)
    files = sorted((tmp_path / 'a').rglob('*.*'))
    assert [f'{file.parent.name}/{file.name}' for file in files] == [
        f'{name}/{number}.mp4' for name in names for number in ('0000', '0001')
    ]
    for file in files:
        assert file.read_bytes() == (tmp_path / 'b' / file.relative_to(tmp_path / 'a')).read_bytes()
        frames, rate = shapes.clip(file.parent.name, 5, int(file.stem))
        decoded = decode(file)
        assert decoded.shape == frames.shape and 1.4 * rate <= len(frames) <= 6.1 * rate
        assert np.abs(decoded.astype(int) - frames).mean() < 12
        with av.open(str(file)) as container:
            assert container.streams.video[0].average_rate == rate
    assert not np.array_equal(shapes.clip('move right', 5, 0)[0][0], shapes.clip('move right', 6, 0)[0][0])


def test_levels_are_the_same_scene_ever_harder_to_read(tmp_path):
    easy, default, hard = (shapes.clip('move up', 0, 3, level) for level in shapes.LEVELS)
    assert easy[1] == default[1] == hard[1] and len(easy[0]) <= len(default[0]) == len(hard[0])
    assert not np.array_equal(default[0], hard[0])
    sizes = []
    for level in shapes.LEVELS[1:]:
        shapes.write_dataset(tmp_path / level, 2, workers=1, names=['move up'], level=level)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / level).rglob('*.mp4')))
    assert sizes[1] < sizes[0]
    with pytest.raises(ValueError):
        shapes.clip('move up', 0, 3, 'harder')


@pytest.mark.parametrize('key', [key for key in shapes.BOUNDS if key != 'crf'])
def test_each_bound_of_a_level_acts(monkeypatch, key):
    """The easy clips, and the same with this one bound as in the hard ones: some clip of eight is another."""
    before = [shapes.clip('move up', 0, number, 'easy')[0] for number in range(8)]
    easy, *others, hard = shapes.BOUNDS[key]
    monkeypatch.setitem(shapes.BOUNDS, key, (hard, *others, hard))
    if key == 'flow':  # of a texture that can be seen
        monkeypatch.setitem(shapes.BOUNDS, 'contrast', ((1, 1),) * 3)
        monkeypatch.setitem(shapes.BOUNDS, 'flow', (easy, *others, hard))
        before = [shapes.clip('move up', 0, number, 'easy')[0] for number in range(8)]
        monkeypatch.setitem(shapes.BOUNDS, 'flow', (hard, *others, hard))
    after = [shapes.clip('move up', 0, number, 'easy')[0] for number in range(8)]
    assert not all(np.array_equal(a, b) for a, b in zip(before, after))


def test_the_configs_of_the_demo_name_the_same_groups():
    whole, closed = (read_sample(str(DEMO.parent / 'sample_configs' / name)) for name in
                     ('moving_shapes.py', 'moving_shapes_closed.py'))
    assert whole['splits'] == shapes.SPLITS and '--groups=4' in closed['prepare']
    assert closed['splits'] == {split: sum(shapes.SPLITS[split][:4], []) for split in ('train', 'test')}
    assert closed['clip'] == whole['clip'] and closed['cache_prefix'] == 2  # taken over


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


# ---- sees.py

def test_what_there_is_to_know_of_a_class():
    assert sees.changes('move left then grow').tolist() == [0, 1, 1, 2, 1]
    assert [sees.kind(name) for name in shapes.SPLITS['test'][0]] == [0, 1, 2, 3, 4]
    assert sees.KINDS[sees.kind('back first, then move left and grow')] == 'back first, then both'
    assert sees.kind('grow and back') == sees.kind('move up by way of move left') == -1


def test_probe_reads_what_is_linear_and_nothing_else():
    x, held = (torch.randn(n, 10, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (400, 300))

    def both(x):
        return torch.stack([(x[:, 0] > 0).long(), (x[:, 1] > 0).long()], 1)

    def product(x):
        return (x[:, :1] * x[:, 1:2] > 0).long()
    assert sees.probe(x, both(x), held, both(held), 1.0) > 90
    assert 40 < sees.probe(x, product(x), held, product(held), 1.0) < 60


@pytest.mark.parametrize('cross_video', ['joint', False])
def test_gaze_is_a_share_of_each_frame(cross_video):
    torch.manual_seed(0)
    config = DEFAULTS | VBA.options | dict(frames=3, levels=2, temporal_adapter=False, cross_video=cross_video)
    model = VBA(CLIP(32, 16, 64, 2, 16), [], config)
    seen = [torch.randn(4, 3, 5, 64) for _ in range(2)]
    shares = sees.gaze(model, seen)
    assert shares.shape == (4, 2, 3)
    torch.testing.assert_close(shares.sum(2), torch.ones(4, 2))
    torch.testing.assert_close(sees.gaze(model, [x[1:2] for x in seen]), shares[1:2])  # each video alone


def test_fewer_motions_to_train_on(tmp_path):
    (tmp_path / 'fewer.py').write_text(sees.fewer(4))
    config, whole = read_sample(str(tmp_path / 'fewer.py')), read_sample(sees.SAMPLE)
    assert config['splits']['train'] == whole['splits']['train'][::4] and config['splits']['test'] == whole['splits']['test']
    assert {key: value for key, value in config.items() if key != 'splits'} == {
        key: value for key, value in whole.items() if key != 'splits'}


def test_mistakes_within_groups_alone(tmp_path, capsys):
    """Ten classes of two groups: what is right, or of another group, counts for nothing."""
    classes = sum(shapes.SPLITS['test'][:2], [])
    confusion = 100 * np.eye(10, dtype=int)
    confusion[0, 1], confusion[5, 7], confusion[0, 9] = 3, 1, 50
    rows = [dict(method='vba', shot=1, checkpoint='best.pt', transductive=False, classes=classes, confusion=confusion.tolist())]
    (tmp_path / 'results.json').write_text(json.dumps(rows))
    sees.mistakes(tmp_path / 'results.json')
    assert '| one then the other | 0 | 75 | 25 | 0 | 0 |' in capsys.readouterr().out


def test_the_checkpoint_that_comes_along_answers_before_any_training(tmp_path, monkeypatch, capsys):
    """Of three unseen motions, four clips each, from five examples: by chance four of the twelve are right."""
    names = ['move left then grow', 'shrink and fade in, too far and back', 'move up by way of move right']
    shapes.write_dataset(str(tmp_path / 'support'), 9, workers=1, names=names)
    for name in names:
        (tmp_path / 'query' / name).mkdir(parents=True)
        for number in range(5, 9):
            clip = f'{name}/{number:04}.mp4'
            (tmp_path / 'support' / clip).rename(tmp_path / 'query' / clip)
    monkeypatch.setattr('sys.argv', [
        'predict.py', f'--ckpt={DEMO}/ladder.pt', f'--support={tmp_path / "support"}', f'--query={tmp_path / "query"}',
        '--json', '--workers=0', '--device=cpu'])
    predict.main()
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [os.path.basename(os.path.dirname(answer['query'])) == answer['classes'][0]['name'] for answer in answers]
    assert len(right) == 12 and sum(right) >= 8
