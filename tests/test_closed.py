"""The closed set: splits of videos, batches, several views, unseen classes by name, as the scripts run them."""

import collections
import json
import os

import numpy as np
import pytest
import torch
from test_data import make_config
from test_train_eval import losses, rows_of, run, same, trained, with_empty, world  # noqa: F401 (fixtures)

import data
import eval as evaluation
import predict
import testing
import train
from decode import Video
from reader import ClipMaker
from tools import check

CLOSED = ['--closed_set=True', "--holdout={'val': 0.2, 'test': 0.3}", '--meta_batch=4', '--cache_prefix=1', '--lr=0.1',
          '--max_iters=40', '--eval_interval=20', '--log_interval=20']


def videos(split):
    return {(split.classes[label], os.path.basename(video.path)) for label, video in zip(split.labels, split.videos)}


# ---- Splits of videos

def test_each_split_has_other_videos_of_the_same_classes(world):  # noqa: F811
    names = ['move right', 'grow', 'fade in']
    config = make_config(world / 'clips', closed_set=True, splits=dict(train=names, test=['shrink']))
    splits = data.load_splits(config)
    assert all(splits[split].classes == names for split in data.SPLITS) and splits['unseen'].classes == ['shrink']
    assert {split: len(splits[split].videos) for split in splits} == dict(train=12, val=3, test=3, unseen=6)  # of 6: 1, 1, 4
    assert len(videos(splits['train']) | videos(splits['val']) | videos(splits['test'])) == 18
    for seed in range(5):  # the draw of K is of the seed, and what is held out is not
        few = data.load_splits(config | dict(per_class=2, seed=seed))
        assert videos(few['test']) == videos(splits['test']) and videos(few['train']) < videos(splits['train'])
        assert collections.Counter(few['train'].labels.tolist()) == {0: 2, 1: 2, 2: 2}
    draws = [videos(data.load_splits(config | dict(per_class=2, seed=seed))['train']) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for splits, words in ((dict(train=names, test=names[:1]), 'stands in train and in test'), (dict(train=0.5), 'holdout')):
        with pytest.raises(SystemExit, match=words):
            data.load_splits(config | dict(splits=splits))
    every = data.load_splits(make_config(world / 'clips', closed_set=True))
    assert len(every['train'].classes) == 8 and not every['unseen'].videos


@pytest.fixture
def lists(world, tmp_path):  # noqa: F811
    """Official lists of two classes of six clips, as UCF101 and HMDB51 have them."""
    (tmp_path / 'classInd.txt').write_text('1 grow\n2 shrink\n')
    train_list = [f'{name}/{i:04}.mp4 {label}' for label, name in enumerate(('grow', 'shrink'), 1) for i in range(4)]
    (tmp_path / 'trainlist01.txt').write_text('\n'.join(train_list))
    (tmp_path / 'testlist01.txt').write_text('\n'.join(f'{name}/{i:04}.mp4' for name in ('grow', 'shrink') for i in (4, 5)))
    for name in ('grow', 'shrink'):
        for split, numbers in ((1, '112200'), (2, '221100')):
            lines = ''.join(f'{i:04}.mp4 {n} \n' for i, n in enumerate(numbers))
            (tmp_path / f'{name}_test_split{split}.txt').write_text(lines)
    return tmp_path


def test_official_lists_say_whose_a_video_is(world, lists):  # noqa: F811
    ucf = dict(train=[str(lists / 'trainlist01.txt'), str(lists / 'classInd.txt')], test=str(lists / 'testlist01.txt'))
    config = make_config(world / 'clips', closed_set=True, annotations=ucf, holdout=dict(val=0.25, test=0.5))
    splits = data.load_splits(config)
    assert {split: len(splits[split].videos) for split in data.SPLITS} == dict(train=6, val=2, test=4)
    assert splits['train'].classes == ['grow', 'shrink']
    assert {name for _, name in videos(splits['test'])} == {'0004.mp4', '0005.mp4'}
    hmdb = data.load_splits(config | dict(annotations=str(lists / '*_test_split1.txt'), holdout=dict(val=0.0, test=0.5)))
    assert {name for _, name in videos(hmdb['train'])} == {'0000.mp4', '0001.mp4'} and not hmdb['val'].videos
    assert {name for _, name in videos(hmdb['test'])} == {'0002.mp4', '0003.mp4'}  # 0 is of neither
    for wrong, words in ((str(lists / '*_test_split?.txt'), 'stands in two splits'), (dict(tset='x'), "not of 'tset'"),
                         (dict(train=str(lists / 'none.txt')), 'There is no'),
                         (dict(train=str(lists / 'trainlist01.txt')), 'none gives names')):
        with pytest.raises(SystemExit, match=words):
            data.load_splits(config | dict(annotations=wrong))


def test_each_epoch_has_each_video_once():
    split = data.Split('train', ['a'], [Video(str(i)) for i in range(7)], np.zeros(7, np.int64))
    stream = [data.shuffled(split, 3, number)[0] for number in range(21)]
    epochs = [stream[:7], stream[7:14], stream[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert stream != [data.shuffled(split, 4, number)[0] for number in range(21)]


# ---- Views

def test_views_of_a_video_by_hand(tmp_path):
    split = data.Split('test', ['a'], [Video('x'), Video('y')], np.zeros(2, np.int64))
    assert data.views(split, 1, 1).videos == split.videos
    seen = data.views(split, 2, 3)
    assert [(v.path, v.at, v.place) for v in seen.videos[:7]] == [
        *(('x', at, place) for at in (0.25, 0.75) for place in (0.0, 0.5, 1.0)), ('y', 0.25, 0.0)]
    from make_clips import write_folder
    folder = write_folder(tmp_path / 'clip', 20, size=(64, 32), ext='.png')
    maker = ClipMaker(make_config(tmp_path) | dict(frames=2, resize=32, cache_gb=0.0), 32)
    middle = maker.frames(Video(folder))
    early, late = (maker.frames(Video(folder, at=at)) for at in (0.25, 0.75))
    every = ClipMaker(make_config(tmp_path) | dict(frames=20, resize=32, cache_gb=0.0), 32).frames(Video(folder))
    for found, numbers in ((middle, (5, 15)), (early, (2, 12)), (late, (7, 17))):
        assert np.array_equal(found, every[list(numbers)])
    left, centre, right = (maker.clip(Video(folder, place=place), None) for place in (0.0, 0.5, 1.0))
    whole = torch.from_numpy(middle).permute(0, 3, 1, 2)
    assert torch.equal(left, whole[..., :32]) and torch.equal(centre, whole[..., 16:48]) and torch.equal(right, whole[..., 32:])


class Told(torch.nn.Module):
    """A method whose kept tensors are its scores."""
    names, sees, text, closed_set = list('abcdef'), ('image',), False, True

    def scores(self, kept, episode):
        return episode.of_ways(episode.take(kept[0]))


def test_the_table_of_a_closed_set_by_hand():
    """Four videos of two views among six classes. Views are averaged as probabilities: a sure one outweighs an unsure one."""
    unsure, sure = [0.1, 0, 0, 0, 0, 0], [0, 9.0, 0, 0, 0, 0]
    second = [0, 0, 5.0, 4.0, 0, 0]
    last = [5.0, 4, 3, 2, 1, 0]
    kept = torch.tensor([unsure, sure, second, second, last, last, last, unsure])
    labels = np.array([1, 3, 5, 0])
    split = data.Split('test', list('abcdef'), [Video(str(i)) for i in range(4)], labels)
    config = make_config('x', closed_set=True, views=2, dataset='hand', method='told', dtype='float32')
    tested = testing.Tested(config, Told(), 'hash', 'best.pt', 'hand', [kept])
    (row,), (right,), _ = testing.evaluate(config, [tested], split, np.arange(8))
    assert right[:, 0].tolist() == [True, False, False, True] and row['accuracy'] == 50 and row['top5'] == 75
    assert row['per_class'] == [100, 100, None, 0, None, 0] and row['class_mean'] == 50 and row['views'] == 2
    assert np.array(row['confusion'])[3, 2] == 1 and np.sum(row['confusion']) == 4
    assert row['ci95'] == pytest.approx(196 * np.std([1, 0, 0, 1], ddof=1) / 2)
    rows, _, _ = testing.evaluate(config, [tested], split, np.array([0, 1, 2, 4, 5, 6, 7]))  # a view of the second is missing
    assert rows[0]['videos'] == 3 and rows[0]['missing'] == 1
    others = data.Split('test', list('abcdeg'), split.videos, labels)  # one of them was not trained on
    assert testing.evaluate(config, [tested], others, np.arange(8))[0] == []


# ---- The scripts

@pytest.fixture(scope='module')
def closed(world):  # noqa: F811
    out_dir = world / 'closed'
    output = run(train, world, '--method=linear', *CLOSED, f'--out_dir={out_dir}').output
    return out_dir, output


def test_a_linear_probe_learns_and_is_tested(world, closed):  # noqa: F811
    out_dir, output = closed
    assert 'validation:' in output and '4 classes, 4 videos' in output
    listed = json.loads((out_dir / 'train_videos.json').read_text())
    assert len(listed['videos']) == 12 and f'12 training videos of 4 classes ({listed["hash"]})' in output
    rows = rows_of(out_dir)
    assert [(row['method'], row['split'], row['videos'], row['way']) for row in rows] == [
        ('zero_shot', 'test', 8, 4), ('linear', 'test', 8, 4)]
    assert rows[1]['parameters'] == 33 * 4 and rows[1]['train_shot'] is not None
    entries = losses(out_dir)
    assert entries[-1][1] < entries[0][1]
    again = run(evaluation, world, *CLOSED[:2], f'--ckpt={out_dir / "best.pt"}', f'--out_dir={world / "again"}', '--views=2',
                '--probe=True')
    assert 'linear, queries reversed' in again.output and 'views: 2' in again.output


def test_videos_that_were_trained_on_are_told(world, closed, capsys):  # noqa: F811
    run(evaluation, world, '--closed_set=True', "--holdout={'val': 0.1, 'test': 0.6}", f'--ckpt={closed[0] / "best.pt"}',
        f'--out_dir={world / "again"}')
    assert 'best.pt trained on 8 of these 16 videos' in capsys.readouterr().err
    run(evaluation, world, *CLOSED[:2], f'--ckpt={closed[0] / "best.pt"}', f'--out_dir={world / "again"}')
    assert 'trained on' not in capsys.readouterr().err


def test_folders_of_splits_are_kept_apart(world, tmp_path):  # noqa: F811
    for split, numbers in (('train', (0, 1, 2)), ('val', (3,)), ('test', (4, 5))):
        for name in ('grow', 'shrink'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in numbers:
                (tmp_path / split / name / f'{i}.mp4').symlink_to(world / 'clips' / name / f'{i:04}.mp4')
    splits = data.load_splits(make_config(tmp_path, closed_set=True))
    assert {split: sorted({name for _, name in videos(splits[split])}) for split in data.SPLITS} == dict(
        train=['0.mp4', '1.mp4', '2.mp4'], val=['3.mp4'], test=['4.mp4', '5.mp4'])


def test_a_resumed_run_is_the_same(world, closed):  # noqa: F811
    out_dir, parts = closed[0], world / 'parts'
    run(train, world, '--method=linear', *CLOSED, '--max_iters=20', f'--out_dir={parts}')
    run(train, world, '--method=linear', *CLOSED, f'--out_dir={parts}', '--resume=True')
    assert losses(parts) == losses(out_dir) and same(parts / 'last.pt', out_dir / 'last.pt')


def test_unseen_classes_by_their_names(world):  # noqa: F811
    out_dir = world / 'named'
    run(train, world, '--method=efficient_prompt', *CLOSED, '--max_iters=2', '--prefix=2', '--postfix=2',
        f'--out_dir={out_dir}')
    rows = [(row['method'], row['split'], row['way'], row['videos']) for row in rows_of(out_dir)]
    assert rows == [('zero_shot', 'test', 4, 8), ('efficient_prompt', 'test', 4, 8),
                    ('zero_shot', 'unseen', 2, 12), ('efficient_prompt', 'unseen', 2, 12)]
    told = run(evaluation, world, *CLOSED[:2], f'--ckpt={out_dir / "best.pt"}', '--test_split=unseen',
               f'--out_dir={world / "told"}')
    assert 'tiny unseen  2-way  efficient_prompt' in told.output
    # the same checkpoint in few-shot episodes, where it reads names and looks at no support
    run(evaluation, world, '--closed_set=False', f'--ckpt={out_dir / "best.pt"}', f'--out_dir={world / "few"}')
    assert ('efficient_prompt', 2) in {(row['method'], row['shot']) for row in rows_of(world / 'few')}


def test_a_video_that_cannot_be_read_is_left_out(world, tmp_path):  # noqa: F811
    root = with_empty(world, tmp_path, 'grow/a.mp4', 'grow/b.mp4', 'grow/c.mp4')
    run(evaluation, world, root, '--closed_set=True', "--holdout={'val': 0.0, 'test': 0.9}", '--views=2', '--splits=None',
        '--method=zero_shot', f'--out_dir={tmp_path}')
    (row,) = json.loads((tmp_path / 'results_test.json').read_text())
    assert row['videos'] + row['missing'] == 7 * 5 + 8 and row['missing'] > 0 and row['way'] == 8


@pytest.mark.parametrize('options, words', [
    (['--method=vba'], 'needs supports'), (['--method=linear', '--closed_set=False'], 'needs closed_set=True'),
    (['--method=linear', "--holdout={'val': 0.5, 'test': 0.6}"], 'shares of the videos'),
    (['--method=linear', "--holdout={'test': 0.6}"], 'shares of the videos'),
    (['--method=linear', "--holdout={'val': 0.0, 'test': 0.6}"], 'Split val has no video'),
    (['--method=linear', '--views=2', '--test_sampling=random'], 'several views need'),
    (['--method=matrix', '--closed_set=False', '--per_class=2'], 'per_class=2 needs closed_set=True'),
])  # fmt: skip
def test_what_does_not_fit_is_told(world, options, words, tmp_path):  # noqa: F811
    assert words in run(train, world, *CLOSED, *options, f'--out_dir={tmp_path}', check=False).error


def test_predict_answers_with_its_own_classes_or_by_name(world, closed, capsys, monkeypatch):  # noqa: F811
    query = str(next((world / 'clips' / 'grow').iterdir()))

    def call(*options):
        monkeypatch.setattr('sys.argv', ['predict.py', '--device=cpu', '--workers=0', f'--query={query}', *options])
        try:
            predict.main()
        except SystemExit as stopped:
            return str(stopped)
        return capsys.readouterr().out

    own = call(f'--ckpt={closed[0] / "best.pt"}', '--top=9', '--json=True')
    classes = json.loads(own)['classes']
    assert {each['name'] for each in classes} == {'move right', 'move left', 'move up', 'move down'}
    assert sum(each['score'] for each in classes) == pytest.approx(1)
    by_name = [f'--clip={world / "clip.pt"}', '--method=zero_shot', '--closed_set=True', '--resize=32', '--frames=4']
    assert 'zero_shot, 3 classes, no examples each' in call(*by_name, '--classes=grow, shrink,fade in')
    assert 'reads no names' in call(f'--ckpt={closed[0] / "best.pt"}', '--classes=a,b')
    assert '--classes= must name the classes' in call(*by_name)
    assert 'takes no --support' in call(f'--ckpt={closed[0] / "best.pt"}', f'--support={world / "clips"}')
    long = 30 * 'move right and '
    assert 'longer than' in call(*by_name, f'--classes=grow,{long}') and '2 classes' in call(*by_name, "--classes=['a, b','c']")


def test_the_check_counts_each_split(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr('sys.argv', ['data.py', str(world / 'config.py'), '--device=cpu', *CLOSED[:2], f'--out_dir={tmp_path}',
                                     f'--cache_dir={tmp_path / "cache"}'])
    check.main()
    rows = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines() if line}
    assert [rows[split] for split in (*data.SPLITS, 'unseen')] == [['4', '12'], ['4', '4'], ['4', '8'], ['2', '12']]
