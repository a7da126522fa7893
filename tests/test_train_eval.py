"""Training and testing as a user runs them: the scripts themselves, on a few tiny clips and a tiny CLIP with random weights."""

import contextlib
import errno
import fcntl
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import config as config_py
import data
import encoding
import eval as evaluation
import testing
import train
from clip_loader import CLIP
from config import MACHINE, find_method, load_config, resolve
from model import CHUNK, Episode, bring, look
from reader import ClipReader
from tools import extract
from tools.claim import claimed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'demo'))
SPEED = ['--device=cpu', '--workers=0']


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    """A folder with eight classes of six clips, a tiny CLIP and a config."""
    from shapes import write_dataset
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp('world')
    names = ['move right', 'move left', 'move up', 'move down', 'grow', 'shrink', 'fade in', 'fade out']
    write_dataset(str(root / 'clips'), 6, workers=1, names=names, level='easy')
    torch.manual_seed(0)
    clip = CLIP(32, 16, 128, 3, 32, vocab_size=514, context_length=40, text_width=64, text_layers=1)
    torch.save(clip.state_dict(), root / 'clip.pt')
    (root / 'config.py').write_text(f'''config = dict(
    dataset='tiny', data_root={str(root / 'clips')!r}, clip={str(root / 'clip.pt')!r}, resize=32, frames=4, vba=dict(levels=2),
    flip=False, way=2, shot=2, queries=2, meta_batch=2, max_iters=6, eval_interval=3, log_interval=2, val_episodes=10,
    test_shots=[1, 2], test_episodes=30, lr=1e-3, splits=dict(train={names[:4]}, val={names[4:6]}, test={names[6:]}))
''')
    return root


class Result:
    """What one call of a script printed, and its exit message or None."""

    def __init__(self, output, error):
        self.output, self.error = output, error


def run(script, world, *options, check=True):
    """A script's main() in this process, which spares it the imports. world: its folder, or a config's path."""
    output, error, handlers = io.StringIO(), None, [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    sample = str(world / 'config.py' if world.is_dir() else world)
    argv, sys.argv = sys.argv, [script.__name__, sample, *SPEED, *options]
    try:
        with contextlib.redirect_stdout(output):
            script.main()
    except SystemExit as stopped:
        error = str(stopped)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])
    assert not check or error is None, error
    return Result(output.getvalue(), error)


def log(out_dir):
    return [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]


def losses(out_dir):
    return [(entry['iter'], entry['loss'], entry['accuracy']) for entry in log(out_dir)]


def same(a, b):
    """Checkpoints with the same trained parameters, optimiser and counters, bit for bit."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    optimizers = zip(*(c['optimizer']['state'].values() for c in (a, b)))
    return (a['state'] == b['state'] and all(torch.equal(a['model'][name], b['model'][name]) for name in a['model'])
            and all(torch.equal(x[key], y[key]) for x, y in optimizers for key in x))


def rows_of(out_dir):
    """results.json without what depends on the clock or the place."""
    return [{k: v for k, v in row.items() if k not in ('seconds', 'checkpoint')}
            for row in json.loads((out_dir / 'results.json').read_text())]


def with_empty(world, tmp_path, *names):
    """The clips, and beside them these files that nothing can be read from -> the option that names their folder."""
    for folder in (world / 'clips').iterdir():
        (tmp_path / 'clips' / folder.name).mkdir(parents=True)
        for file in folder.iterdir():
            (tmp_path / 'clips' / folder.name / file.name).symlink_to(file)
    for name in names:
        (tmp_path / 'clips' / name).touch(exist_ok=False)
    return f'--data_root={tmp_path / "clips"}'


@pytest.fixture(scope='session')
def trained(world):
    out_dir = world / 'whole'
    result = run(train, world, f'--out_dir={out_dir}')
    return out_dir, result.output


def test_training_writes_what_it_promises(world, trained):
    out_dir, output = trained
    assert [entry['iter'] for entry in log(out_dir)] == [2, 4, 6]
    rows = json.loads((out_dir / 'results.json').read_text())
    assert [(row['method'], row['shot']) for row in rows] == [
        (method, shot) for shot in (1, 2)
        for method in ('mean_pool', 'concat', 'changes', 'zero_shot', 'vba joint', 'vba inductive')]
    for row in rows:
        assert {'dataset', 'split', 'way', 'queries', 'episodes', 'episodes_hash', 'accuracy', 'ci95', 'frames', 'sampling',
                'backbone', 'weights_hash', 'seed', 'seconds', 'missing'} <= set(row)
        assert row['split'] == 'test' and row['transductive'] == (row['method'] == 'vba joint')
        assert row['text'] == (row['method'] == 'zero_shot')
        assert (row['checkpoint'] == str(out_dir / 'best.pt')) == (row['parameters'] > 0) == row['method'].startswith('vba')
    assert 'validation' in output and not list(out_dir.glob('features_*'))


def test_checkpoint_holds_only_what_trains(world, trained):
    saved = torch.load(trained[0] / 'last.pt', weights_only=True)
    assert not any(name.startswith(('visual.', 'blocks.', 'clip.')) for name in saved['model'])
    assert len(saved['optimizer']['state']) == len(saved['model'])
    assert saved['config']['dataset'] == 'tiny' and saved['config']['levels'] == 2 and len(saved['weights_hash']) == 64
    assert saved['names'] == ['move right', 'move left', 'move up', 'move down']


def test_a_checkpoint_leaves_the_machine_alone(world, trained, tmp_path):
    """Its config says nothing of where it was made, and without a sample config all the rest comes from it."""
    saved = torch.load(trained[0] / 'best.pt', weights_only=True)
    assert not {'device', 'dtype', 'out_dir', 'workers', 'features_dir', 'resume'} & set(saved['config'])
    assert not set(saved['config']) & set(MACHINE)
    options = [f'--ckpt={trained[0] / "best.pt"}', '--test_shots=[2]']
    config, ((path, _, own),) = checkpoint.configure(options, evaluation.OPTIONS)
    assert config['out_dir'] == str(trained[0]) and path == str(trained[0] / 'best.pt')
    assert (config['dataset'], config['test_episodes'], config['test_shots'], own['levels']) == ('tiny', 30, [2], 2)


def test_same_seed_same_run_and_another_seed_another(world, trained):
    run(train, world, f'--out_dir={world / "again"}', '--workers=1')
    assert losses(world / 'again') == losses(trained[0]) and same(world / 'again' / 'last.pt', trained[0] / 'last.pt')
    run(train, world, f'--out_dir={world / "other"}', '--seed=1', '--max_iters=2')
    assert losses(world / 'other')[0] != losses(trained[0])[0]


def test_resumed_run_equals_the_uninterrupted_one(world, trained):
    out_dir = world / 'resumed'
    run(train, world, f'--out_dir={out_dir}', '--max_iters=3')
    run(train, world, f'--out_dir={out_dir}', '--resume=True')
    assert losses(out_dir)[1:] == losses(trained[0])[1:] and same(out_dir / 'last.pt', trained[0] / 'last.pt')
    assert rows_of(out_dir) == rows_of(trained[0])


def test_a_signal_ends_the_run_after_the_step(world, trained, tmp_path, monkeypatch):
    def validate(*args, validate=testing.validate):
        os.kill(os.getpid(), signal.SIGTERM)  # during the validation after step 3
        return validate(*args)

    with monkeypatch.context() as patched:
        patched.setattr(testing, 'validate', validate)
        result = run(train, world, f'--out_dir={tmp_path}', check=False)
    assert 'Stopped at step 4 by a signal' in result.error and 'test videos' not in result.output
    run(train, world, f'--out_dir={tmp_path}', '--resume=True')
    assert losses(tmp_path) == losses(trained[0]) and same(tmp_path / 'last.pt', trained[0] / 'last.pt')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_killed_run_resumes_bit_for_bit(world, trained, number):
    out_dir = world / f'killed{int(number)}'
    process = subprocess.Popen([sys.executable, ROOT / 'train.py', world / 'config.py', *SPEED, f'--out_dir={out_dir}'],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while process.poll() is None and not (out_dir / 'last.pt').exists():
        time.sleep(0.01)
    process.send_signal(number)
    process.wait()
    run(train, world, f'--out_dir={out_dir}', '--resume=True')
    assert losses(out_dir) == losses(trained[0]) and same(out_dir / 'last.pt', trained[0] / 'last.pt')


def test_full_disk_is_told_at_the_start(world, trained, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=1000))
    refused = run(train, world, f'--out_dir={tmp_path / "new"}', check=False)
    assert 'GB free, but the checkpoints need' in refused.error and not (tmp_path / 'new').exists()
    shutil.copytree(trained[0], tmp_path / 'old')  # its two checkpoints are replaced: room for a third is what is missing
    size = (tmp_path / 'old' / 'last.pt').stat().st_size
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=1.5 * size))
    run(train, world, f'--out_dir={tmp_path / "old"}', '--resume=True')


def test_a_disk_that_fills_is_told_in_a_sentence(world, tmp_path, monkeypatch, capsys):
    """What torch.save says then names no file."""
    def save(content, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, 'save', save)
    full = run(train, world, f'--out_dir={tmp_path}', check=False)
    assert full.error == f'Cannot write {tmp_path / "best.pt"}: No space left on device.'
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'log.jsonl')
    sys.excepthook(OSError, error, None)  # as it is since load_config
    assert capsys.readouterr().err == 'Cannot write log.jsonl: No space left on device.\n'
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == 'Stopped by Ctrl-C.\n'
    sys.excepthook(ValueError, ValueError('a fault'), None)
    assert 'ValueError: a fault' in capsys.readouterr().err


def test_a_folder_with_a_checkpoint_is_kept(world, trained, tmp_path):
    """Neither a training after the first nor one beside it gets in; where a run could not begin nothing is left."""
    before = {path.name: path.read_bytes() for path in trained[0].iterdir() if path.is_file()}
    refused = run(train, world, f'--out_dir={trained[0]}', check=False)
    assert f'{trained[0]} holds last.pt' in refused.error and '--overwrite=True' in refused.error
    assert {path.name: path.read_bytes() for path in trained[0].iterdir() if path.is_file()} == before
    with pytest.raises(KeyError), claimed(str(tmp_path / 'new'), False, False):
        beside = run(train, world, f'--out_dir={tmp_path / "new"}', check=False)
        assert 'is in use by another training' in beside.error and not os.listdir(tmp_path / 'new')
        raise KeyError
    assert not os.listdir(tmp_path)
    shutil.copytree(trained[0], tmp_path / 'old')
    with claimed(str(tmp_path / 'old'), False, True):  # what a killed run leaves is never half of another
        assert not {'last.pt', 'best.pt'} & set(os.listdir(tmp_path / 'old'))
    (tmp_path / 'file').touch()
    assert 'Cannot write into out_dir=' in run(train, world, f'--out_dir={tmp_path / "file"}', check=False).error


def test_resume_with_other_options_names_them(world, trained):
    result = run(train, world, f'--out_dir={trained[0]}', '--resume=True', '--lr=0.5', '--levels=1', check=False)
    assert 'lr=0.001 (now 0.5)' in result.error and 'levels=2 (now 1)' in result.error and result.error.count('(now') == 2


def test_kept_features_train_like_frames(world, tmp_path):
    """Where there is but one draw of a video, what the frozen part made of it, in half precision, trains as its frames do."""
    options = ['--temporal_adapter=False', '--augment=none', '--cache_frames=4', '--max_iters=2']
    for name, kept in (('frames', 0), ('one', 1), ('two', 2), ('again', 2)):
        run(train, world, f'--out_dir={tmp_path / name}', f'--cache_prefix={kept}', *options)
    assert losses(tmp_path / 'one')[0][1] == pytest.approx(losses(tmp_path / 'frames')[0][1], rel=1e-2)
    assert losses(tmp_path / 'two') == losses(tmp_path / 'again')


def test_features_dir_spares_a_second_training_the_encoding(world, tmp_path):
    """Validation and draws are kept for all runs that see the same of the videos, whatever they make of it."""
    options = ['--cache_prefix=2', '--max_iters=2']
    run(train, world, *options, f'--out_dir={tmp_path / "none"}')
    shared = [*options, f'--features_dir={tmp_path / "kept"}']
    first = run(train, world, *shared, f'--out_dir={tmp_path / "1"}')
    assert first.output.count('encoded 24 of 24 train videos') == 2 and 'encoded 12 of 12 val videos' in first.output
    again = run(train, world, *shared, f'--out_dir={tmp_path / "2"}')
    other = run(train, world, *shared, f'--out_dir={tmp_path / "3"}', '--lr=2e-3')
    for output in (again.output, other.output):
        assert output.count('encoded 0 of 24 train videos') == 2 and 'encoded 0 of 12 val videos' in output
    assert 'encoded 0 of 12 test videos' in again.output and 'encoded 12 of 12 test videos' in other.output
    assert losses(tmp_path / 'none') == losses(tmp_path / '1') == losses(tmp_path / '2')
    assert rows_of(tmp_path / 'none') == rows_of(tmp_path / '1') == rows_of(tmp_path / '2')
    randaug = run(train, world, *shared, f'--out_dir={tmp_path / "4"}', '--augment=randaug')  # other draws, the same validation
    assert randaug.output.count('encoded 24 of 24 train videos') == 2 and 'encoded 0 of 12 val videos' in randaug.output


def test_learning_rates_by_hand():
    config = dict(warmup_iters=2, decay='constant', drops={}, max_iters=10)
    assert [train.learning_rate(config, i, 1.0) for i in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    config['drops'] = {4: 0.1, 6: 0.01}
    assert [train.learning_rate(config, i, 2.0) for i in (3, 4, 5, 6, 99)] == [2.0, 0.2, 0.2, 0.02, 0.02]
    config['decay'] = 'cosine'
    assert [round(train.learning_rate(config, i, 1.0), 6) for i in (1, 2, 6, 10)] == [1.0, 1.0, 0.5, 0.0]


def test_loss_that_is_not_finite_stops(world):
    result = run(train, world, f'--out_dir={world / "nan"}', '--lr=1e30', '--grad_clip=0.0', check=False)
    assert 'The loss is nan at step' in result.error and '.mp4' in result.error


def test_eval_from_checkpoint_gives_the_same_table(world, trained):
    out_dir, _ = trained
    expected = json.loads((out_dir / 'results.json').read_text())
    run(evaluation, world, f'--ckpt={out_dir / "best.pt"}', f'--out_dir={world / "eval"}')
    rows = json.loads((world / 'eval' / 'results.json').read_text())
    for row, other in zip(rows, expected, strict=True):
        assert {k: v for k, v in row.items() if k != 'seconds'} == {k: v for k, v in other.items() if k != 'seconds'}


# ---- What is kept of the videos

def test_features_in_a_file_are_reused_and_continued(world, trained, tmp_path, monkeypatch):
    """features_dir: the same table; a second test encodes nothing; a file that lacks a block goes on from there."""
    monkeypatch.setattr(encoding, 'BLOCK', 4)
    options = [f'--ckpt={trained[0] / "best.pt"}', f'--features_dir={tmp_path}']
    first = run(evaluation, world, *options, f'--out_dir={tmp_path / "1"}')
    assert 'encoded 12 of 12 test videos' in first.output and rows_of(tmp_path / '1') == rows_of(trained[0])
    again = run(evaluation, world, *options, f'--out_dir={tmp_path / "2"}', '--test_shots=[2]')
    assert 'encoded 0 of 12' in again.output and rows_of(tmp_path / '2') == rows_of(trained[0])[6:]
    file, = tmp_path.glob('features_test_*.bin')
    sizes = (128, 512, 256, 128, 512, 4096)  # bytes a video: mean_pool, concat, changes, zero_shot, vba (two)
    whole = file.read_bytes()
    assert len(whole) == 64 + 12 * sum(sizes) and whole[:12] == bytes([encoding.DONE] * 12)
    for undone in (slice(4, 8), slice(6, 7)):  # a block; a video, and with it its block
        broken, start = bytearray(whole), 64
        broken[undone] = bytes(len(whole[undone]))
        for size in sizes:
            broken[start + 4 * size:start + 8 * size] = b'\xff' * 4 * size  # nan
            start += 12 * size
        file.write_bytes(broken)
        cut = run(evaluation, world, *options, f'--out_dir={tmp_path / "3"}')
        assert 'encoded 4 of 12' in cut.output and file.read_bytes() == whole and rows_of(tmp_path / '3') == rows_of(trained[0])
    run(evaluation, world, *options, f'--out_dir={tmp_path / "4"}', '--probe=True')
    assert len(list(tmp_path.glob('*.bin'))) == 2  # other features, another file


def test_features_file_that_was_cut_off_is_no_whole_one(world, trained, tmp_path):
    """Its states are at its start: what they call done may be gone."""
    options = [f'--ckpt={trained[0] / "best.pt"}', f'--features_dir={tmp_path}', '--test_shots=[2]']
    run(evaluation, world, *options, f'--out_dir={tmp_path / "1"}')
    file, = tmp_path.glob('features_test_*.bin')
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 12 * 7 + 5])
    cut = run(evaluation, world, *options, f'--out_dir={tmp_path / "2"}')
    assert 'encoded 0 of' not in cut.output
    assert file.read_bytes() == whole and rows_of(tmp_path / '2') == rows_of(tmp_path / '1') == rows_of(trained[0])[6:]


def test_interrupted_encoding_goes_on(world, trained, tmp_path, monkeypatch):
    """Stopped in the middle of the second block of three."""
    monkeypatch.setattr(encoding, 'BLOCK', 4)
    calls = itertools.count()

    def videos(*args, videos=encoding.videos):
        if next(calls) == 5 * 2 + 1:  # of five methods, black frames once, then block by block
            raise KeyboardInterrupt
        return videos(*args)

    options = [f'--ckpt={trained[0] / "best.pt"}', f'--features_dir={tmp_path}', f'--out_dir={tmp_path}']
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encoding, 'videos', videos)
        run(evaluation, world, *options)
    assert 'encoded 8 of 12' in run(evaluation, world, *options).output and rows_of(tmp_path) == rows_of(trained[0])


def test_features_that_exceed_memory_go_into_a_file(world, trained, tmp_path):
    result = run(evaluation, world, f'--ckpt={trained[0] / "best.pt"}', '--features_gb=0', f'--out_dir={tmp_path}')
    assert str(tmp_path / 'features_test_') in result.output and rows_of(tmp_path) == rows_of(trained[0])
    (tmp_path / 'file').touch()
    stopped = run(evaluation, world, f'--features_dir={tmp_path / "file"}', f'--out_dir={tmp_path}', check=False)
    assert 'Cannot write the features into' in stopped.error and '--features_dir=' in stopped.error


def test_unreadable_test_videos_leave_the_rows_of_the_others(world, trained, tmp_path, capfd):
    """The table of the clips that can be read: these are drawn from as if there were no others."""
    options = [f'--ckpt={trained[0] / "best.pt"}', f'--features_dir={tmp_path}',
               with_empty(world, tmp_path, 'fade in/0002x.mp4', 'fade out/0.mp4')]
    first = run(evaluation, world, *options, f'--out_dir={tmp_path / "1"}')
    assert 'encoded 14 of 14' in first.output and capfd.readouterr().err.count('left out') == 2
    assert rows_of(tmp_path / '1') == [{**row, 'missing': 2} for row in rows_of(trained[0])]
    again = run(evaluation, world, *options, f'--out_dir={tmp_path / "2"}')  # what could not be read is tried again
    assert 'encoded 14 of 14' in again.output and rows_of(tmp_path / '2') == rows_of(tmp_path / '1')


@pytest.mark.parametrize('block, kept', [(16, 0), (4, 2), (16, 2)])
def test_unreadable_training_and_validation_videos(world, tmp_path, monkeypatch, capfd, block, kept):
    """The rest of the class is enough for episodes: the run ends well, and says once of each video what takes its place."""
    monkeypatch.setattr(encoding, 'BLOCK', block)
    options = [with_empty(world, tmp_path, 'move right/0002x.mp4', 'grow/0.mp4'), f'--cache_prefix={kept}', '--max_iters=4']
    run(train, world, *options, f'--out_dir={tmp_path / "run"}')
    said = capfd.readouterr().err
    assert said.count('another of its class takes its place') == 1 and said.count('left out') == 1
    assert len(rows_of(tmp_path / 'run')) == 12 and all(row['missing'] == 0 for row in rows_of(tmp_path / 'run'))
    assert all(np.isfinite(loss) for _, loss, _ in losses(tmp_path / 'run'))


# ---- Several checkpoints, lists of episodes, other data

def test_episodes_saved_and_loaded(world, trained, tmp_path):
    """Another seed with the saved list gives the first seed's test; what the list lacks is said."""
    options = [f'--ckpt={trained[0] / "best.pt"}', f'--episodes_file={tmp_path / "episodes.json"}']
    run(evaluation, world, *options, f'--out_dir={tmp_path / "1"}')
    run(evaluation, world, *options, f'--out_dir={tmp_path / "2"}', '--seed=5')
    first, second = rows_of(tmp_path / '1'), rows_of(tmp_path / '2')
    assert [{**row, 'seed': 42} for row in second] == first
    assert 'has no 2-way 3-shot episodes' in run(evaluation, world, *options, '--test_shots=[3]', check=False).error
    (tmp_path / 'episodes.json').write_text((tmp_path / 'episodes.json').read_text().replace('0003', '9999'))
    assert "such as 'fade in/9999.mp4'" in run(evaluation, world, *options, check=False).error.replace('out', 'in')
    (tmp_path / 'episodes.json').write_text('[1]')
    assert 'is no file of --episodes_file' in run(evaluation, world, *options, check=False).error


def test_several_checkpoints_give_each_and_all(world, trained, tmp_path):
    """All that differ by their seeds alone are averaged, and only these."""
    for seed, levels in ((1, 2), (2, 2), (3, 1)):
        run(train, world, f'--out_dir={tmp_path / f"seed{seed}"}', f'--seed={seed}', f'--levels={levels}', '--max_iters=3')
    result = run(evaluation, world, f'--ckpt={tmp_path}/seed*/best.pt', '--test_shots=[1]', f'--out_dir={tmp_path}')
    rows = json.loads((tmp_path / 'results.json').read_text())
    for mode in ('vba joint', 'vba inductive'):
        one, two, three, both = (row for row in rows if row['method'] == mode)
        assert [row['checkpoint'] for row in (one, two, three)] == [f'{tmp_path}/seed{seed}/best.pt' for seed in (1, 2, 3)]
        assert both['checkpoint'] == [one['checkpoint'], two['checkpoint']]
        assert both['accuracy'] == pytest.approx((one['accuracy'] + two['accuracy']) / 2)
        assert both['spread'] == pytest.approx(abs(one['accuracy'] - two['accuracy']) / 2 ** 0.5)
    assert result.output.count('2 checkpoints') == 2 and '3 checkpoints' not in result.output
    run(evaluation, world, f'--ckpt={tmp_path}/seed2/best.pt', '--test_shots=[1]', f'--out_dir={tmp_path / "alone"}')
    assert rows_of(tmp_path / 'alone') == [rows_of(tmp_path)[i] for i in (0, 1, 2, 3, 6, 7)]


def test_checkpoints_of_different_options_meet_in_the_same_episodes(world, trained, tmp_path):
    """Each gets the rows that it gets alone; the videos are encoded once for those that see the same."""
    for option in ('levels=1', 'frames=2'):
        run(train, world, f'--out_dir={tmp_path / option}', f'--{option}', '--max_iters=3', '--test_shots=[1]')
    folders = [trained[0], tmp_path / 'levels=1', tmp_path / 'frames=2']
    result = run(evaluation, world, f'--ckpt={[str(folder / "best.pt") for folder in folders]}', '--test_shots=[1]',
                 f'--out_dir={tmp_path}')
    expected = rows_of(trained[0])[:6] + rows_of(folders[1])[4:] + rows_of(folders[2])[4:]
    assert rows_of(tmp_path) == expected and [row['frames'] for row in expected] == [4] * 8 + [2] * 2
    assert len({row['episodes_hash'] for row in expected}) == 1 and result.output.count('encoded 12 of 12') == 2
    assert result.output.count('(paired)') == 10 * 9 // 2 and 'checkpoints, spread' not in result.output
    rows = json.loads((tmp_path / 'results.json').read_text())
    name = [row['method'] + (f' ({os.path.relpath(row["checkpoint"])})' if row['checkpoint'] else '') for row in rows]
    for i, j in itertools.combinations(range(9), 2):
        said, = re.findall(re.escape(f'{name[j]} - {name[i]}: ') + '([+-][0-9.]+) ± ', result.output)
        assert float(said) == pytest.approx(rows[j]['accuracy'] - rows[i]['accuracy'], abs=0.0051)


def test_within_and_across_groups_are_the_halves_of_a_test(world):
    """By hand from the episodes: even ones are within a group, odd ones across."""
    groups = [['move right', 'move left'], ['move up', 'move down'], ['grow', 'shrink']]
    result = run(evaluation, world, f'--splits={dict(test=groups)}', '--test_shots=[1]', f'--out_dir={world / "groups"}')
    rows = json.loads((world / 'groups' / 'results.json').read_text())
    for row in rows:
        assert row['accuracy'] == pytest.approx((row['within'] + row['across']) / 2)
        assert f'within groups {row["within"]:.2f} ± {row["within_ci95"]:.2f}, across groups' in result.output
    assert 'within groups' in next(text for text in result.output.splitlines() if 'paired' in text)
    config = load_config([str(world / 'config.py'), f'--splits={dict(test=groups)}'])
    episodes = testing.draw_episodes(data.load_splits(config)['test'], 2, 1, 1, 42, 30)
    assert all((a // 2 == b // 2) == (i % 2 == 0) for i, (a, b) in enumerate(episodes[:, :2] // 6))


@pytest.mark.parametrize('grouped', [True, False])
def test_training_episodes_keep_to_groups_on_request(world, tmp_path, monkeypatch, grouped):
    """Of groups of two, 2-way: each second episode is of one group, else of any two classes."""
    groups = [['move right', 'move left'], ['move up', 'move down']]
    splits = dict(train=groups, val=['grow', 'shrink'], test=['fade in', 'fade out'])
    drawn = []

    def draw(split, *sizes, episode=data.episode):
        found = episode(split, *sizes)
        if split.name == 'train':
            drawn.append(tuple(sorted(split.labels[found[:4:2]] // 2)))
        return found

    monkeypatch.setattr(data, 'episode', draw)
    run(train, world, f'--splits={splits}', f'--train_groups={grouped}', '--max_iters=30', '--meta_batch=1',
        f'--out_dir={tmp_path}')
    numbers = drawn[1:31]  # the first is a trial
    assert ([len(set(groups)) for groups in numbers] == [1, 2] * 15) == grouped


def test_episodes_that_were_not_drawn_by_groups_are_refused(world, tmp_path):
    names = ['move right', 'move left', 'move up', 'move down']
    listed, groups = f'--episodes_file={tmp_path / "episodes.json"}', [names[:2], names[2:]]
    own = ['--test_shots=[1]', f'--out_dir={tmp_path}', listed]
    run(evaluation, world, f'--splits={dict(test=names)}', *own)
    refused = run(evaluation, world, f'--splits={dict(test=groups)}', *own, check=False)
    assert 'was not drawn by the groups that splits has now' in refused.error
    (tmp_path / 'episodes.json').unlink()
    for _ in range(2):  # drawn by groups and written, then read
        run(evaluation, world, f'--splits={dict(test=groups)}', *own)


def test_several_ways_from_one_encoding(world):
    run(evaluation, world, '--test_split=train', '--test_ways=[2, 4]', '--test_shots=[1]', f'--out_dir={world / "ways"}')
    assert [row['way'] for row in rows_of(world / 'ways') if row['method'] == 'mean_pool'] == [2, 4]


def test_another_datasets_results_lie_beside_the_checkpoint(world, trained, tmp_path):
    """A test across datasets: the checkpoint's model, the other config's data, and no other run's results overwritten."""
    other = tmp_path / 'other.py'
    other.write_text((world / 'config.py').read_text().replace("dataset='tiny'", "dataset='other'")
                     .replace('levels=2', 'levels=1, temp=5.0'))
    before = (trained[0] / 'results.json').read_text()
    run(evaluation, other, f'--ckpt={trained[0] / "best.pt"}')
    rows = json.loads((trained[0] / 'results_other.json').read_text())
    assert {row['dataset'] for row in rows} == {'other'} and rows[-1]['trained_on'] == 'tiny'
    assert [row['accuracy'] for row in rows] == [row['accuracy'] for row in rows_of(trained[0])]
    assert (trained[0] / 'results.json').read_text() == before


# ---- Methods of one's own

METHOD = '''from torch import nn

from model import cosine


class Method(nn.Module):
    sees = ('image',)
    options = dict(width=8)

    def __init__(self, clip, names, config):
        super().__init__()
        self.map = nn.Linear(clip.visual.proj.shape[1], config['width'])

    def video(self, image):
        return (self.map(image).mean(1),)

    def scores(self, kept, episode):
        support, query = episode.split(episode.take(kept[0]))
        return 10 * cosine(query, episode.by_class(support))
'''


def test_a_method_of_ones_own(world, trained, tmp_path):
    """A file trains and is tested by its path; a checkpoint alone never runs it; beside vba it keeps its rows."""
    (tmp_path / 'mine.py').write_text(METHOD)
    mine = f'--method={tmp_path / "mine.py"}'
    run(train, world, mine, '--width=16', '--max_iters=3', f'--out_dir={tmp_path / "run"}')
    rows = rows_of(tmp_path / 'run')
    assert [row['method'] for row in rows] == 2 * ['mean_pool', 'concat', 'changes', 'zero_shot', 'mine']
    assert rows[4]['parameters'] == 33 * 16
    assert not rows[4]['transductive'] and not rows[4]['text']
    ckpt = f'--ckpt={tmp_path / "run" / "best.pt"}'
    for options in ([], ['--method=vba']):
        refused = run(evaluation, world, ckpt, *options, f'--out_dir={tmp_path / "none"}', check=False)
        assert f'say {mine} if you trust that file' in refused.error and 'encoded' not in refused.output
    run(evaluation, world, ckpt, mine, f'--out_dir={tmp_path / "eval"}')
    assert rows_of(tmp_path / 'eval') == rows
    run(train, world, mine, '--width=16', '--max_iters=4', f'--out_dir={tmp_path / "run"}', '--resume=True')
    assert 'width=16, not 8' in run(evaluation, world, ckpt, mine, '--width=8', check=False).error

    both = [str(trained[0] / 'best.pt'), str(tmp_path / 'eval' / 'kept.pt')]
    torch.save(torch.load(tmp_path / 'run' / 'best.pt', weights_only=True), both[1])
    result = run(evaluation, world, f'--ckpt={both}', mine, '--test_shots=[1]', f'--out_dir={tmp_path / "both"}')
    together = rows_of(tmp_path / 'both')
    assert [row['method'] for row in together] == [
        'mean_pool', 'concat', 'changes', 'zero_shot', 'vba joint', 'vba inductive', 'mine']
    assert together[:6] == rows_of(trained[0])[:6] and 'mine - vba joint' in result.output


def test_method_that_is_none_is_told(world, tmp_path):
    stopped = run(train, world, '--method=mean_pol', check=False)
    assert "There is no method 'mean_pol'" in stopped.error and 'mean_pool' in stopped.error
    (tmp_path / 'empty.py').touch()
    assert 'defines no class Method' in run(train, world, f'--method={tmp_path / "empty.py"}', check=False).error


@pytest.mark.parametrize('script', ['train.py', 'eval.py'])
def test_script_alone_says_what_to_type(script, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [script])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name='__main__')
    assert f'python {script} sample_configs/' in str(stopped.value) and '--help' in str(stopped.value)


# ---- Several processes

def torchrun(world, script, *options, processes=2):
    """A script in several processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}', ROOT / script,
               world / 'config.py', *SPEED, *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=120)


ENDING = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
train.main()
names = [open(f'/proc/self/task/{{task}}/comm').read().strip() for task in os.listdir('/proc/self/task')]
sys.exit(f'left: {{names}}' if any('gloo' in name for name in names) else 0)
"""


def test_two_processes_train_and_test_as_one(world, trained, tmp_path):
    """The same episodes on two ranks: the same losses, weights and table up to rounding; resuming too. No thread of gloo is
    left at the end: one that drops the last tensor while Python ends would abort the process."""
    (tmp_path / 'ending.py').write_text(ENDING)
    result = torchrun(world, tmp_path / 'ending.py' if os.path.exists('/proc/self/task') else 'train.py',
                      f'--out_dir={tmp_path}', '--max_iters=3')
    assert result.returncode == 0, result.stderr
    result = torchrun(world, 'train.py', f'--out_dir={tmp_path}', '--resume=True')
    assert result.returncode == 0 and result.stdout.count('validation') == 1, result.stderr
    for (number, loss, accuracy), (other, expected, right) in zip(losses(tmp_path)[1:], losses(trained[0])[1:], strict=True):
        assert (number, accuracy) == (other, pytest.approx(right)) and loss == pytest.approx(expected, rel=1e-3)
    ours, theirs = (torch.load(path / 'last.pt', weights_only=True)['model'] for path in (tmp_path, trained[0]))
    for name in ours:
        if name.endswith('video_attn.in_proj_bias'):  # b_k adds the same to all logits: its gradient is rounding alone
            ours[name][128:256] = theirs[name][128:256]
        assert (ours[name] - theirs[name]).abs().mean() < 1e-5, name  # AdamW makes much of single gradients near 0
    assert 'in memory' in result.stdout and not list(tmp_path.glob('*.bin'))  # the file that they shared
    run(evaluation, world, f'--ckpt={tmp_path / "best.pt"}', f'--out_dir={tmp_path / "alone"}')
    assert rows_of(tmp_path / 'alone') == rows_of(tmp_path)


@pytest.mark.cuda
def test_two_processes_on_one_card(world, tmp_path):
    """Or on two, where there are: the losses of one process."""
    options = ['--device=cuda', '--dtype=float32', '--max_iters=3']
    run(train, world, *options, f'--out_dir={tmp_path / "one"}')
    result = torchrun(world, 'train.py', *options, f'--out_dir={tmp_path / "two"}')
    assert result.returncode == 0, result.stderr
    for (*_, loss, _), (*_, expected, _) in zip(losses(tmp_path / 'two'), losses(tmp_path / 'one'), strict=True):
        assert loss == pytest.approx(expected, rel=1e-2)


def test_two_processes_fill_one_file(world, trained, tmp_path):
    """Each its block of it, to the same bits as one process, which then has nothing left to encode."""
    options = [f'--ckpt={trained[0] / "best.pt"}', '--test_split=train', f'--features_dir={tmp_path}']
    result = torchrun(world, 'eval.py', *options, f'--out_dir={tmp_path / "two"}')
    assert result.returncode == 0, result.stderr
    file, = tmp_path.rglob('*.bin')
    whole = file.read_bytes()
    again = run(evaluation, world, *options, f'--out_dir={tmp_path / "one"}')
    assert 'encoded 0 of 24 train videos' in again.output and rows_of(tmp_path / 'one') == rows_of(tmp_path / 'two')
    run(evaluation, world, *options[:2], f'--out_dir={tmp_path / "memory"}')
    assert rows_of(tmp_path / 'memory') == rows_of(tmp_path / 'two')
    file.unlink()
    run(evaluation, world, *options, f'--out_dir={tmp_path / "one"}')
    assert file.read_bytes() == whole


@pytest.mark.parametrize('options, rows', [
    (['--temporal_adapter=True'], 12), (['--temporal_adapter=False', '--cross_video=inductive'], 10),
    (['--temporal_adapter=False', '--cache_prefix=1', '--augment=none'], 12)])
def test_half_precision_through_training_and_test(world, tmp_path, monkeypatch, options, rows):
    """Autocast in bfloat16, on the CPU here, goes through every place that it goes through on CUDA."""
    dtypes = set()

    def forward(*args, forward=train.Step.forward):
        dtypes.add(torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu'))
        return forward(*args)

    monkeypatch.setattr(train.Step, 'forward', forward)
    run(train, world, '--dtype=bfloat16', f'--out_dir={tmp_path}', '--max_iters=3', *options)
    ckpt = f'--ckpt={tmp_path / "best.pt"}'
    run(evaluation, world, '--dtype=bfloat16', ckpt, f'--out_dir={tmp_path / "again"}', *options[:2])
    assert rows_of(tmp_path / 'again') == rows_of(tmp_path) and len(rows_of(tmp_path)) == rows
    assert dtypes == {torch.bfloat16} and not torch.is_autocast_enabled('cpu')


def test_one_row_where_queries_never_see_each_other(world, tmp_path):
    for mode in ('inductive', False):
        run(train, world, f'--cross_video={mode}', '--max_iters=1', '--test_shots=[1]', f'--out_dir={tmp_path / str(mode)}')
        assert [(row['method'], row['transductive']) for row in rows_of(tmp_path / str(mode))] == [
            ('mean_pool', False), ('concat', False), ('changes', False), ('zero_shot', False), ('vba', False)]


def test_features_for_other_programs(world, trained, tmp_path):
    run(extract, world, f'--ckpt={trained[0] / "best.pt"}', f'--out={tmp_path / "x.npz"}')
    found = np.load(tmp_path / 'x.npz')
    assert found['image'].shape == (12, 4, 32) and found['video_0'].shape == (12, 128) and found['image'].std() > 0
    assert found['classes'][found['labels']].tolist() == [Path(name).parent.name for name in found['names']]


def test_queries_of_classes_that_were_not_shown(world, trained, tmp_path):
    run(evaluation, world, f'--ckpt={trained[0] / "best.pt"}', '--open_set=True', f'--out_dir={tmp_path}')
    rows = json.loads((tmp_path / 'open_set.json').read_text())
    assert [(row['shot'], row['method']) for row in rows] == list(itertools.product(
        (1, 2), ('mean_pool', 'concat', 'changes', 'zero_shot', 'vba')))
    assert all(0 <= row['auroc'] <= 100 and math.isfinite(row['threshold']) and row['way'] == 1 for row in rows)


def test_two_trainings_that_share_a_features_file_make_it_in_turn(tmp_path):
    """While one has it half made the other waits, and then takes it as it is."""
    path, specs, found = str(tmp_path / 'x.bin'), [((3,), np.dtype(np.uint8))], []
    with open(path, 'ab') as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: found.extend(encoding.columns(path, 64, specs)), daemon=True)
        other.start()
        first.write(b'x' * 100)  # half of it
        first.flush()
        other.join(0.5)
        assert not found and os.path.getsize(path) == 100
        first.write(b'x' * 92)
    other.join(20)
    assert (found[0] == ord('x')).all() and found[0].shape == (64, 3)


def test_steps_that_a_scaler_leaves_out_do_not_count_until_they_are_too_many():
    state, split = dict(loss=0.0, correct=0.0, steps=0), SimpleNamespace(videos=[SimpleNamespace(path='a.mp4')])
    for number, loss in enumerate([1.0, math.nan, math.inf, 2.0, math.nan, math.nan]):
        numbers = [loss, 0.5, number == 1]
        stopped = train.settle(state, split, 2, number, torch.tensor(numbers), None, np.zeros(1, int))
        assert stopped == (number == 1)
    assert (state['loss'], state['correct'], state['steps']) == (3.0, 1.0, 2)
    with pytest.raises(SystemExit, match='The loss is nan at step 6.*a.mp4'):
        train.settle(state, split, 2, 6, torch.tensor([math.nan, 0.5, 0.0]), None, np.zeros(1, int))


@pytest.mark.cuda
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_cuda_trains_and_is_deterministic_on_request(world, tmp_path, dtype):
    """Two runs give the same bits; a test of the checkpoint on the CPU gives nearly the same table."""
    for name in ('a', 'b'):
        run(train, world, '--device=cuda', f'--dtype={dtype}', '--deterministic=True', '--temporal_adapter=True',
            f'--out_dir={tmp_path / name}')
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b') and same(tmp_path / 'a' / 'last.pt', tmp_path / 'b' / 'last.pt')
    run(evaluation, world, f'--ckpt={tmp_path / "a" / "best.pt"}', f'--out_dir={tmp_path / "cpu"}')
    for row, other in zip(rows_of(tmp_path / 'a'), rows_of(tmp_path / 'cpu'), strict=True):
        assert row['episodes_hash'] == other['episodes_hash'] and abs(row['accuracy'] - other['accuracy']) < 10


@pytest.mark.parametrize('scripts, option, words', [
    ((train, evaluation), '--test_shots=[1,9]', '9 supports'), ((train,), '--levels=4', '3 blocks')])
def test_what_cannot_end_well_is_refused_before_training(world, tmp_path, scripts, option, words):
    for script in scripts:
        result = run(script, world, option, f'--out_dir={tmp_path}', check=False)
        assert words in result.error and 'encoded' not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('split, few', [('val', 'grow'), ('test', 'fade in')])
def test_a_split_of_one_class_is_refused_before_training(world, tmp_path, split, few):
    """Also where episodes may be lowered: of one class every answer is right."""
    splits = dict(train=['move right', 'move left'], val=['grow', 'shrink'], test=['fade in', 'fade out']) | {split: [few]}
    for lower, words in ((True, 'is too small for any episode'), (False, 'has 1 classes, too few for 2-way')):
        refused = run(train, world, f'--splits={splits}', f'--lower={lower}', f'--out_dir={tmp_path}', check=False)
        assert f'Split {split} {words}' in refused.error and 'encoded' not in refused.output


def test_fractions_tell_which_classes_they_dealt(world):
    config = load_config([str(world / 'config.py'), "--splits={'train': 0.5, 'val': 0.25, 'test': 0.25}"])
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        splits = data.load_splits(config)
    assert output.getvalue().splitlines() == [f'Split {name}, {count} classes: {", ".join(splits[name].classes)}'
                                              for name, count in (('train', 4), ('val', 2), ('test', 2))]


def test_meta_batch_that_does_not_divide_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train.ranks, 'rank_of', lambda: (0, 2))
    stopped = run(train, world, f'--out_dir={tmp_path}', '--meta_batch=3', check=False)
    assert 'cannot be shared out evenly to 2 processes' in stopped.error


def test_dead_rank_ends_the_run_with_a_message(world, tmp_path):
    process = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'train.py',
         world / 'config.py', *SPEED, f'--out_dir={tmp_path}', '--max_iters=100000'],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while process.poll() is None and not (tmp_path / 'last.pt').exists():
        time.sleep(0.05)
    children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode and 'SIGKILL' in error
    torch.load(tmp_path / 'last.pt', weights_only=True)  # whole


def test_micro_batches_add_up_to_the_whole(world, tmp_path):
    """Two episodes and then one give the gradients of three at once: AdamW's first moment after a step is a tenth of them."""
    for size in (0, 2):
        run(train, world, f'--out_dir={tmp_path / str(size)}', f'--micro_batch={size}', '--meta_batch=3', '--max_iters=1',
            '--log_interval=1', '--grad_clip=0')
    whole, parts = (torch.load(tmp_path / name / 'last.pt', weights_only=True) for name in ('0', '2'))
    assert losses(tmp_path / '2')[0][1:] == pytest.approx(losses(tmp_path / '0')[0][1:], rel=1e-4)
    for x, y in zip(whole['optimizer']['state'].values(), parts['optimizer']['state'].values(), strict=True):
        torch.testing.assert_close(y['exp_avg'], x['exp_avg'], rtol=1e-3, atol=1e-6)


# ---- The test itself

def test_eval_without_checkpoint_is_training_free(world):
    run(evaluation, world, f'--out_dir={world / "free"}')
    rows = json.loads((world / 'free' / 'results.json').read_text())
    assert {row['method'] for row in rows} == {'mean_pool', 'concat', 'changes', 'zero_shot'}


class Gone(io.StringIO):
    """Standard output whose reader has gone."""
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_results_are_written_whatever_becomes_of_the_output(world, trained, tmp_path, monkeypatch):
    """Nobody reads on, no picture can be drawn: results.json is whole. Where it cannot lie is told before anything is read."""
    expected = rows_of(trained[0])
    monkeypatch.setattr(sys, 'argv', ['eval.py', *SPEED, f'--ckpt={trained[0] / "best.pt"}', f'--out_dir={tmp_path / "head"}'])
    with contextlib.redirect_stdout(Gone()):
        evaluation.main()
    assert rows_of(tmp_path / 'head') == expected
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(evaluation.pictures, 'confusion', lambda *_: 1 / 0)
        run(evaluation, world, f'--ckpt={trained[0] / "best.pt"}', f'--out_dir={tmp_path / "picture"}')
    assert rows_of(tmp_path / 'picture') == expected
    (tmp_path / 'file').touch()
    refused = run(evaluation, world, f'--out_dir={tmp_path / "file"}', check=False)
    assert f'Cannot write into out_dir={tmp_path / "file"}' in refused.error and 'encoded' not in refused.output
    done = run(evaluation, world, f'--out_dir={tmp_path / "told"}')
    assert f'wrote {tmp_path / "told" / "results.json"}' in done.output


def test_eval_refuses_another_model_and_other_weights(world, trained, tmp_path):
    ckpt = f'--ckpt={trained[0] / "best.pt"}'
    assert 'levels=2, not 1' in run(evaluation, world, ckpt, '--levels=1', check=False).error
    assert 'frames=4, not 2' in run(evaluation, world, ckpt, '--frames=2', check=False).error
    run(evaluation, world, ckpt, '--method=vba', '--test_shots=[1]', '--test_episodes=2', f'--out_dir={tmp_path}')
    assert 'no checkpoint of method=mean_pool' in run(evaluation, world, ckpt, '--method=mean_pool', check=False).error
    torch.manual_seed(1)
    torch.save(CLIP(32, 16, 128, 3, 32).state_dict(), tmp_path / 'other.pt')
    result = run(evaluation, world, ckpt, f'--clip={tmp_path / "other.pt"}', check=False)
    assert 'other CLIP weights' in result.error
    (tmp_path / 'text.pt').write_text('no checkpoint')
    result = run(evaluation, world, f'--ckpt={tmp_path / "text.pt"}', check=False)
    assert 'is not a checkpoint' in result.error
    assert 'There is no checkpoint' in run(evaluation, world, f'--ckpt={tmp_path / "none.pt"}', check=False).error


def test_options_that_change_the_answer_alone_may_be_others_in_a_test(world, tmp_path):
    run(train, world, '--method=clip_fsar', f'--out_dir={tmp_path}', '--max_iters=2')
    rows = {}
    for answer in ('visual', 'text'):
        run(evaluation, world, f'--ckpt={tmp_path / "best.pt"}', f'--answer={answer}')
        rows[answer] = json.loads((tmp_path / 'results.json').read_text())[-1]
    assert rows['visual']['episodes_hash'] == rows['text']['episodes_hash']
    assert rows['visual']['confusion'] != rows['text']['confusion']
    refused = run(evaluation, world, f'--ckpt={tmp_path / "best.pt"}', '--lam=0.1', check=False)
    assert 'is of another model: lam=0.5, not 0.1' in refused.error


def test_an_option_newer_than_a_checkpoint_has_its_default(world, trained, tmp_path):
    saved = torch.load(trained[0] / 'best.pt', weights_only=True)
    for key in ('cls_token', 'drops', 'norm'):  # one of VBA's, common ones
        del saved['config'][key]
    torch.save(saved, tmp_path / 'best.pt')
    run(evaluation, world, f'--ckpt={tmp_path / "best.pt"}')
    assert rows_of(tmp_path) == rows_of(trained[0])


@pytest.mark.parametrize('option, words', [
    (dict(frames='8'), "frames='8' must be of type int"), (dict(temp='hot'), 'temp'), (dict(clip=[3]), 'clip=[3]'),
    (dict(method=[3]), 'method=[3]'), (dict(method='../x.py'), 'a method outside this repository')])
def test_options_that_no_training_wrote_are_told(world, trained, tmp_path, option, words):
    saved = torch.load(trained[0] / 'best.pt', weights_only=True)
    torch.save(saved | dict(config=saved['config'] | option), tmp_path / 'best.pt')
    stopped = run(evaluation, world, f'--ckpt={tmp_path / "best.pt"}', check=False)
    assert stopped.error.startswith(str(tmp_path / 'best.pt')) and words in stopped.error


def test_a_checkpoint_goes_with_another_clone(world, trained, tmp_path, monkeypatch):
    """Trained in one clone, tested in another that is all there is then; what lies in neither stays where it is."""
    def clone(name):
        for path in (*ROOT.glob('*.py'), ROOT / 'methods', world / 'clip.pt', world / 'clips'):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / path.name).symlink_to(path)
        for module in (config_py, checkpoint):
            monkeypatch.setattr(module, 'ROOT', str(tmp_path / name))

    clone('first')
    sample = tmp_path / 'first' / 'sample.py'
    sample.write_text((world / 'config.py').read_text().replace(f'{world}/', ''))
    run(train, sample, f'--out_dir={tmp_path / "out"}')
    shutil.rmtree(tmp_path / 'first')
    clone('second')
    monkeypatch.setattr(sys, 'argv', ['eval.py', *SPEED, f'--ckpt={tmp_path / "out" / "best.pt"}'])
    (tmp_path / 'out' / 'results.json').unlink()
    evaluation.main()
    assert rows_of(tmp_path / 'out') == rows_of(trained[0])
    assert checkpoint.load(str(tmp_path / 'out' / 'best.pt'))['config']['data_root'] == str(tmp_path / 'second' / 'clips')
    assert checkpoint.load(str(trained[0] / 'best.pt'))['config']['data_root'] == str(world / 'clips')


def test_a_damaged_checkpoint_is_refused_and_torchs_advice_not_passed_on(world, trained, tmp_path):
    """A bit of a weight in the file of a checkpoint and of a CLIP; other files, which torch advises to load by force."""
    for path, option in ((trained[0] / 'best.pt', 'ckpt'), (world / 'clip.pt', 'clip')):
        with zipfile.ZipFile(path) as archive:
            entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        content = bytearray(path.read_bytes())
        content[entry.header_offset + 1000] ^= 1
        (tmp_path / 'one.pt').write_bytes(content)
        stopped = run(evaluation, world, f'--{option}={tmp_path / "one.pt"}', check=False)
        assert f'the checksum of {entry.filename} in it is wrong' in stopped.error
        for content in (b'<!DOCTYPE html><html>', pickle.dumps(Path('x'), 2), pickle.dumps(dict(model=1), 2), b''):
            (tmp_path / 'one.pt').write_bytes(content)
            stopped = run(evaluation, world, f'--{option}={tmp_path / "one.pt"}', check=False)
            assert str(tmp_path / 'one.pt') in stopped.error
            assert not any(word in stopped.error for word in ('weights_only', 'False', 'trust', '\n'))


def encoded(world, *options, shaken=False, saved=None):
    """A test of vba up to the point where its videos are encoded -> config, clip, split, reader, Tested, rows of the videos."""
    config = load_config([str(world / 'config.py'), *SPEED, *options], evaluation.OPTIONS)
    resolve(config)
    clip = checkpoint.load_clip(config)
    model = checkpoint.build(config, clip, []).eval()
    if saved:
        checkpoint.restore(model, clip, checkpoint.load(saved), saved)
    with torch.no_grad():
        for p in model.parameters() if shaken else ():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05 * p.requires_grad)
    clip.to(config['device'])
    split, reader = data.load_splits(config)['test'], ClipReader(config, 32)
    (tested,), rows = testing.encode(config, clip, [testing.Tested(config, model, clip.weights_hash, saved)], split, reader)
    return config, clip, split, reader, tested, rows


@pytest.mark.parametrize('mode, joint', [('joint', True), ('joint', False), ('inductive', False), (False, False)])
def test_cached_episodes_equal_the_model_on_frames(world, mode, joint):
    """What is kept of a test's videos against the model run on each episode's frames anew."""
    config, clip, split, reader, tested, rows = encoded(world, f'--cross_video={mode}', '--temp=10', shaken=True)
    model, episodes = tested.method, testing.draw_episodes(split, 2, 2, 1, 0, 5)
    labels, classes, _ = testing.ways_of(split, episodes, 2, 2)
    found = testing.answers(config, model, tested.tensors, rows[episodes], labels, classes, split.classes, joint, '')
    some = Episode(torch.from_numpy(labels), torch.from_numpy(classes), split.classes, joint)
    with torch.no_grad():
        scores = model.scores(tested.tensors, some._replace(index=torch.from_numpy(rows[episodes])))
        for i, episode in enumerate(episodes):
            frames, _ = next(reader.stream(split, [(0, episode)], train=False))
            kept = model.video(*bring(look(clip.visual, frames, model.sees), 'cpu'))
            expected, = model.scores(kept, some._replace(classes=some.classes[i:i + 1]))
            torch.testing.assert_close(scores[i], expected, rtol=1e-2, atol=1e-3)  # kept in half precision
            assert (found[i] == expected.argmax(-1).numpy()).all()
    reader.close()


def test_episode_list_depends_on_seed_and_videos_alone(world):
    split = data.load_splits(load_config([str(world / 'config.py')]))['train']
    episodes, again, others = (testing.draw_episodes(split, 3, 2, 1, seed, 20) for seed in (7, 7, 8))
    name = testing.hash_of(split, episodes)
    assert np.array_equal(episodes, again) and testing.hash_of(split, others) != name
    assert testing.hash_of(encoding.subset(split, np.arange(len(split.videos))[::-1]), episodes) != name
    for episode in episodes:
        classes = split.labels[episode]
        assert (classes[:6].reshape(3, 2) == classes[6:, None]).all() and len(set(classes)) == 3 and len(set(episode)) == 9


def test_interval_by_hand():
    mean, half = testing.interval(np.array([0.0, 1.0, 1.0, 0.0]))
    assert mean == 50 and half == pytest.approx(196 * (1 / 3) ** 0.5 / 2)


def test_mean_pool_by_hand():
    """Videos of two frames; the pooled ones have length 1 only where the frames agree."""
    method = find_method('mean_pool')[0](None, [], {})
    directions = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [0.9, 0.1], [0.1, 0.9]])
    kept = method.video(torch.stack([directions, 3 * directions], 1))
    pooled = torch.nn.functional.normalize(directions, dim=-1)
    torch.testing.assert_close(kept[0], pooled)
    one = Episode(torch.tensor([0, 0]), torch.tensor([[0]]), ['a'], False, index=torch.tensor([[0, 1, 3]]))
    prototype = (pooled[0] + pooled[1]) / (pooled[0] + pooled[1]).norm()
    torch.testing.assert_close(method.scores(kept, one)[0, 0, 0], 100 * prototype @ pooled[3])
    found = testing.answers(dict(device='cpu', dtype='float32'), method, list(kept), np.array([[0, 2, 3, 4], [2, 0, 3, 4]]),
                            np.array([0, 1]), np.array([[0, 1], [1, 0]]), ['a', 'b'], False, '')
    assert found.tolist() == [[0, 1], [1, 0]]
    split = data.Split('test', ['a', 'b', 'c'], [], np.array([2, 2, 2, 1, 1, 1]))
    two = np.array([[0, 3, 1, 2, 4, 5], [3, 0, 4, 5, 1, 2]])  # 2-way 1-shot, 2 queries a class
    labels, classes, right = testing.ways_of(split, two, 2, 1)
    assert labels.tolist() == [0, 1] and classes.tolist() == [[2, 1], [1, 2]] and right.tolist() == [[0, 0, 1, 1]] * 2


def test_probe_reverses_shuffles_and_stills_the_queries_alone(world, trained, monkeypatch):
    """Rows 1, 2, 3 of each video are its frames reversed, the middle one repeated, shuffled; queries alone are of these."""
    asked, answers = {}, testing.answers

    def spy(config, method, tensors, index, *rest, best):
        asked[rest[-1]] = index
        return answers(config, method, tensors, index, *rest, best)

    monkeypatch.setattr(testing, 'answers', spy)
    config, clip, split, reader, tested, rows = encoded(
        world, '--probe=True', '--test_shots=[1]', saved=str(trained[0] / 'best.pt'))
    frames, _ = next(reader.stream(split, [(0, np.arange(12))], train=False))
    seen = look(clip.visual, frames, tested.method.sees)
    shuffled = np.random.default_rng(config['seed']).permutation(4)
    for row, order in enumerate(([0, 1, 2, 3], [3, 2, 1, 0], [2, 2, 2, 2], shuffled)):
        start, tokens = encoding.videos(config, tested.method, [x[:, order] for x in seen])
        torch.testing.assert_close(tested.tensors[0][row::4], start, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tested.tensors[1][row::4], tokens, rtol=1e-2, atol=1e-2)
    found, *_ = testing.evaluate(config, [tested], split, rows, 0)
    assert [row['method'] for row in found] == ['vba joint', *(f'vba joint, queries {probe}' for probe in testing.PROBES),
                                                'vba inductive']
    for row, probe in enumerate(('reversed', 'still', 'shuffled'), 1):
        plain, probed = asked['vba joint'], asked[f'vba joint, queries {probe}']
        assert (probed[:, :2] == plain[:, :2]).all() and (probed[:, 2:] == plain[:, 2:] + row).all() and not (plain % 4).any()
    reader.close()


# ---- Other machines

WINDOWS = '''
import os, select, sys
for module, names in ((os, ('fork', 'pread', 'posix_fallocate', 'sched_getaffinity', 'setsid', 'killpg')),
                      (select, ('poll', 'epoll'))):
    for name in names:
        delattr(module, name)
sys.modules['fcntl'] = None  # cannot be imported
os.O_TEMPORARY, real_open, real_close, temporary = 1 << 30, os.open, os.close, {}

def open_file(path, flags, *rest, **more):
    file = real_open(path, flags & ~os.O_TEMPORARY, *rest, **more)
    if flags & os.O_TEMPORARY:
        temporary[file] = path
    return file

def close_file(file):
    real_close(file)
    if file in temporary:
        os.remove(temporary.pop(file))

os.open, os.close = open_file, close_file
'''


def test_without_what_posix_alone_has(world, tmp_path):
    """As on Windows no fork, no fcntl, no poll, in this process and in all that it starts: training, a second one beside it,
    kept frames and features, timelines."""
    (tmp_path / 'sitecustomize.py').write_text(WINDOWS)
    environment = os.environ | dict(PYTHONPATH=str(tmp_path))

    def call(*words):
        return subprocess.run([sys.executable, *words, '--device=cpu', '--workers=1'], cwd=ROOT, env=environment, text=True,
                              capture_output=True)

    out_dir, sample = tmp_path / 'out', str(world / 'config.py')
    options = [f'--cache_dir={tmp_path / "frames"}', f'--features_dir={tmp_path / "features"}']
    result = call('train.py', sample, *options, f'--out_dir={out_dir}')
    assert result.returncode == 0, result.stderr
    run(train, world, *options, f'--out_dir={tmp_path / "here"}')
    assert rows_of(out_dir) == rows_of(tmp_path / 'here') and not (out_dir / 'in_use').exists()
    (out_dir / 'in_use').touch()
    again = call('train.py', sample, f'--out_dir={out_dir}', '--resume=True')
    assert again.returncode == 1 and again.stderr.endswith('--out_dir= names another folder.\n'), again.stderr
    clips = world / 'clips'
    answered = call('predict.py', f'--ckpt={out_dir / "best.pt"}', f'--support={clips}', '--window=0.5',
                    f'--query={clips / "grow" / "0000.mp4"}')
    assert answered.returncode == 0 and ' s   ' in answered.stdout, answered.stderr
    assert 'Traceback' not in result.stderr + again.stderr + answered.stderr  # of a worker, say


class AppleToCPU(torch.overrides.TorchFunctionMode):
    """Puts on the CPU what is sent to 'mps'."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def here(x):
            return 'cpu' if isinstance(x, (str, torch.device)) and str(x) == 'mps' else x

        return function(*map(here, args), **{key: here(x) for key, x in (kwargs or {}).items()})


def test_apples_device(world, trained, tmp_path, monkeypatch):
    """On demand alone, in float32, not compiled; and nothing on the way takes what is not the CPU for CUDA."""
    asked = [dict(load_config([str(world / 'config.py'), *words])) for words in ([], ['--device=mps'])]
    with pytest.raises(SystemExit, match='--device=mps: PyTorch sees no such device here'):
        resolve(dict(asked[1]))
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for config in asked:
        resolve(config)
    assert [config['device'] for config in asked] == ['cpu', 'mps'] and not asked[1]['compile']
    assert asked[1]['dtype'] == 'float32' and {'cpu', 'cuda', 'mps'} == set(CHUNK) == set(testing.QUERY_BYTES)

    with AppleToCPU():
        run(train, world, '--device=mps', f'--out_dir={tmp_path / "out"}')
    assert rows_of(tmp_path / 'out') == rows_of(trained[0])
