"""Training and testing as a user runs them: the scripts themselves, on a few tiny clips and a tiny CLIP with random weights."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import train
from clip_loader import CLIP
from config import load_config
from encoding import encode, encode_frozen, encode_split, subset
from model import class_scores, log_scores

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
    write_dataset(str(root / 'clips'), 6, workers=1, names=names)
    torch.manual_seed(0)
    clip = CLIP(32, 16, 128, 3, 32, vocab_size=514, context_length=40, text_width=64, text_layers=1)
    torch.save(clip.state_dict(), root / 'clip.pt')
    (root / 'config.py').write_text(f'''config = dict(
    dataset='tiny', data_root={str(root / 'clips')!r}, clip={str(root / 'clip.pt')!r}, resize=32, frames=4, levels=2,
    flip=False, way=2, shot=2, queries=2, meta_batch=2, max_iters=6, eval_interval=3, log_interval=2, val_episodes=10,
    test_shots=[1, 2], test_episodes=30, lr=1e-3, splits=dict(train={names[:4]}, val={names[4:6]}, test={names[6:]}))
''')
    return root


class Result:
    """What one call of a script printed, and its exit message or None."""

    def __init__(self, output, error):
        self.output, self.error = output, error


def run(script, world, *options, check=True):
    """A script's main() in this process, which spares it the imports."""
    output, error, handlers = io.StringIO(), None, [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    argv, sys.argv = sys.argv, [script.__name__, str(world / 'config.py'), *SPEED, *options]
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
        (method, shot) for shot in (1, 2) for method in ('clip-mean-pool', 'clip-zero-shot', 'vba-joint', 'vba-inductive')]
    for row in rows:
        assert {'dataset', 'split', 'way', 'queries', 'episodes', 'episodes_hash', 'accuracy', 'ci95', 'frames', 'sampling',
                'backbone', 'weights_hash', 'seed', 'seconds', 'missing'} <= set(row)
        assert row['split'] == 'test' and row['transductive'] == (row['method'] == 'vba-joint')
        assert row['text'] == (row['method'] == 'clip-zero-shot')
    assert 'validation' in output


def test_checkpoint_holds_only_what_trains(trained):
    checkpoint = torch.load(trained[0] / 'last.pt', weights_only=True)
    assert not any(name.startswith('visual.') for name in checkpoint['model'])
    assert len(checkpoint['optimizer']['state']) == len(checkpoint['model'])
    assert checkpoint['config']['dataset'] == 'tiny' and len(checkpoint['weights_hash']) == 64


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


def test_a_signal_ends_the_run_after_the_step(world, trained, tmp_path, monkeypatch):
    def validate(*args, validate=evaluation.validate):
        os.kill(os.getpid(), signal.SIGTERM)  # during the validation after step 3
        return validate(*args)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, 'validate', validate)
        result = run(train, world, f'--out_dir={tmp_path}', check=False)
    assert 'Stopped at step 4 by a signal' in result.error and 'encoded' not in result.output
    run(train, world, f'--out_dir={tmp_path}', '--resume=True')
    assert losses(tmp_path) == losses(trained[0]) and same(tmp_path / 'last.pt', trained[0] / 'last.pt')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
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


def test_full_disk_is_told_at_the_start(world, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=1000))
    assert 'GB free, but the checkpoints need' in run(train, world, f'--out_dir={tmp_path}', check=False).error


def test_resume_with_other_options_names_them(world, trained):
    result = run(train, world, f'--out_dir={trained[0]}', '--resume=True', '--lr=0.5', check=False)
    assert 'lr=0.001 (now 0.5)' in result.error


def test_kept_features_train_like_frames(world, tmp_path):
    """Where there is but one draw of a video, what the frozen part made of it, in half precision, trains as its frames do."""
    options = ['--temporal_adapter=False', '--augment=none', '--cache_frames=4', '--max_iters=2']
    for name, kept in (('frames', 0), ('one', 1), ('two', 2), ('again', 2)):
        run(train, world, f'--out_dir={tmp_path / name}', f'--cache_prefix={kept}', *options)
    assert losses(tmp_path / 'one')[0][1] == pytest.approx(losses(tmp_path / 'frames')[0][1], rel=1e-2)
    assert losses(tmp_path / 'two') == losses(tmp_path / 'again')


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


def rows_of(out_dir):
    """results.json without what depends on the clock or the place."""
    return [{k: v for k, v in row.items() if k not in ('seconds', 'checkpoint')}
            for row in json.loads((out_dir / 'results.json').read_text())]


def test_features_in_a_file_are_reused_and_continued(world, trained, tmp_path):
    """features_dir: the same table; a second test encodes nothing; a file cut in the middle of a video goes on from there."""
    ckpt = f'--ckpt={trained[0] / "best.pt"}'
    first = run(evaluation, world, ckpt, f'--features_dir={tmp_path}', f'--out_dir={tmp_path / "1"}')
    assert 'encoded 12 of 12 test videos' in first.output and rows_of(tmp_path / '1') == rows_of(trained[0])
    again = run(evaluation, world, ckpt, f'--features_dir={tmp_path}', f'--out_dir={tmp_path / "2"}', '--test_shots=[2]')
    assert 'encoded 0 of 12' in again.output
    file, = tmp_path.glob('features_test_*.bin')
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 12 * 7 + 5])
    cut = run(evaluation, world, ckpt, f'--features_dir={tmp_path}', f'--out_dir={tmp_path / "3"}')
    assert 'encoded 5 of 12' in cut.output and file.read_bytes() == whole and rows_of(tmp_path / '3') == rows_of(trained[0])
    run(evaluation, world, ckpt, f'--features_dir={tmp_path}', f'--out_dir={tmp_path / "4"}', '--probe=True')
    assert len(list(tmp_path.glob('*.bin'))) == 2  # other features, another file


def test_features_that_exceed_memory_go_into_a_file(world, trained, tmp_path):
    result = run(evaluation, world, f'--ckpt={trained[0] / "best.pt"}', '--features_gb=0', f'--out_dir={tmp_path}')
    assert str(tmp_path / 'features_test_') in result.output and rows_of(tmp_path) == rows_of(trained[0])


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
    for seed in (1, 2):
        run(train, world, f'--out_dir={tmp_path / f"seed{seed}"}', f'--seed={seed}', '--max_iters=3')
    result = run(evaluation, world, f'--ckpt={tmp_path}/seed*/best.pt', '--test_shots=[1]', f'--out_dir={tmp_path}')
    rows = json.loads((tmp_path / 'results.json').read_text())
    for mode in ('vba-joint', 'vba-inductive'):
        one, two, both = (row for row in rows if row['method'] == mode)
        assert one['checkpoint'].endswith('seed1/best.pt') and two['checkpoint'].endswith('seed2/best.pt')
        assert both['accuracy'] == pytest.approx((one['accuracy'] + two['accuracy']) / 2)
        assert both['spread'] == pytest.approx(abs(one['accuracy'] - two['accuracy']) / 2 ** 0.5)
    assert '2 checkpoints' in result.output
    alone = run(evaluation, world, f'--ckpt={tmp_path}/seed2/best.pt', '--test_shots=[1]', f'--out_dir={tmp_path / "alone"}')
    expected = [row['accuracy'] for row in json.loads((tmp_path / 'alone' / 'results.json').read_text())]
    assert expected == [row['accuracy'] for row in (rows[0], rows[1], rows[4], rows[5])] and alone.error is None
    run(train, world, f'--out_dir={tmp_path / "seed3"}', '--levels=1', '--max_iters=3')
    assert 'levels=2, not 1' in run(evaluation, world, f'--ckpt={tmp_path}/seed*/best.pt', check=False).error


def test_several_ways_from_one_encoding(world):
    run(evaluation, world, '--test_split=train', '--test_ways=[2, 4]', '--test_shots=[1]', f'--out_dir={world / "ways"}')
    assert [row['way'] for row in rows_of(world / 'ways') if row['method'] == 'clip-mean-pool'] == [2, 4]


def test_another_datasets_results_lie_beside_the_checkpoint(world, trained, tmp_path):
    """A test across datasets: the checkpoint's model, the other config's data, and no other run's results overwritten."""
    other = tmp_path / 'other.py'
    other.write_text((world / 'config.py').read_text().replace("dataset='tiny'", "dataset='other', levels=1, temp=5.0"))
    before = (trained[0] / 'results.json').read_text()
    argv, sys.argv = sys.argv, ['eval.py', str(other), *SPEED, f'--ckpt={trained[0] / "best.pt"}']
    try:
        evaluation.main()
    finally:
        sys.argv = argv
    rows = json.loads((trained[0] / 'results_other.json').read_text())
    assert {row['dataset'] for row in rows} == {'other'} and rows[-1]['trained_on'] == 'tiny'
    assert (trained[0] / 'results.json').read_text() == before


def torchrun(world, script, *options, processes=2):
    """A script in several processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}', ROOT / script,
               world / 'config.py', *SPEED, *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def test_two_processes_train_and_test_as_one(world, trained, tmp_path):
    """The same episodes on two ranks: the same losses, weights and table up to rounding; resuming too."""
    result = torchrun(world, 'train.py', f'--out_dir={tmp_path}', '--max_iters=3')
    assert result.returncode == 0, result.stderr
    result = torchrun(world, 'train.py', f'--out_dir={tmp_path}', '--resume=True')
    assert result.returncode == 0 and result.stdout.count('validation') == 1, result.stderr
    for (number, loss, accuracy), (other, expected, right) in zip(losses(tmp_path)[1:], losses(trained[0])[1:], strict=True):
        assert (number, accuracy) == (other, pytest.approx(right)) and loss == pytest.approx(expected, rel=1e-3)
    ours, theirs = (torch.load(path / 'last.pt', weights_only=True)['model'] for path in (tmp_path, trained[0]))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-4)
    run(evaluation, world, f'--ckpt={tmp_path / "best.pt"}', f'--out_dir={tmp_path / "alone"}')
    assert rows_of(tmp_path / 'alone') == rows_of(tmp_path)


@pytest.mark.parametrize('options', [['--temporal_adapter=True', '--frozen_dtype=bfloat16'], ['--temporal_adapter=False'],
                                     ['--temporal_adapter=False', '--cache_prefix=1', '--augment=none']])
def test_half_precision_through_training_and_test(world, tmp_path, monkeypatch, options):
    """Autocast in bfloat16, on the CPU here, goes through every place that it goes through on CUDA."""
    for script in (train, evaluation):
        monkeypatch.setattr(script, 'resolve_device', lambda config: ('cpu', torch.bfloat16))
    run(train, world, f'--out_dir={tmp_path}', '--max_iters=3', *options)
    run(evaluation, world, f'--ckpt={tmp_path / "best.pt"}', f'--out_dir={tmp_path / "again"}', *options[:2])
    assert rows_of(tmp_path / 'again') == rows_of(tmp_path) and len(rows_of(tmp_path)) == 8
    assert not torch.is_autocast_enabled('cpu')


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


@pytest.mark.parametrize('option, words', [('--test_shots=[1,9]', '9 supports'), ('--levels=4', '3 blocks')])
def test_what_cannot_end_well_is_refused_before_training(world, tmp_path, option, words):
    for script in (train, evaluation):
        result = run(script, world, option, f'--out_dir={tmp_path}', check=False)
        assert words in result.error and 'encoded' not in result.output
    assert not list(tmp_path.iterdir())


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
    for x, y in zip(whole['optimizer']['state'].values(), parts['optimizer']['state'].values()):
        torch.testing.assert_close(y['exp_avg'], x['exp_avg'], rtol=1e-3, atol=1e-6)


def test_eval_without_checkpoint_is_training_free(world):
    run(evaluation, world, f'--out_dir={world / "free"}')
    rows = json.loads((world / 'free' / 'results.json').read_text())
    assert {row['method'] for row in rows} == {'clip-mean-pool', 'clip-zero-shot'}


def test_eval_refuses_another_model_and_other_weights(world, trained, tmp_path):
    ckpt = f'--ckpt={trained[0] / "best.pt"}'
    result = run(evaluation, world, ckpt, '--levels=1', check=False)
    assert 'levels=2, not 1' in result.error
    torch.manual_seed(1)
    torch.save(CLIP(32, 16, 128, 3, 32).state_dict(), tmp_path / 'other.pt')
    result = run(evaluation, world, ckpt, f'--clip={tmp_path / "other.pt"}', check=False)
    assert 'other CLIP weights' in result.error
    (tmp_path / 'text.pt').write_text('no checkpoint')
    result = run(evaluation, world, f'--ckpt={tmp_path / "text.pt"}', check=False)
    assert 'is not a checkpoint' in result.error


@pytest.mark.parametrize('mode', ['joint', 'inductive', False])
def test_cached_episodes_equal_the_model_on_frames(world, mode):
    """The test's cache against the model run on each episode's frames anew."""
    config = load_config([str(world / 'config.py'), *SPEED, f'--cross_video={mode}'])
    clip = evaluation.load_clip(config)
    model = evaluation.build(config, clip).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05 * p.requires_grad)
    split = data.load_splits(config)['test']
    reader, autocast = data.ClipReader(config, 32), torch.autocast('cpu', enabled=False)
    encoded = encode_split(config, clip, model, [model], split, reader, 'cpu', autocast)
    (start, tokens), = encoded['kept']
    episodes = evaluation.draw_episodes(split, 2, 2, 1, 0, 5)
    scores = evaluation.vba(model, start, tokens, 2, 2, mode, 10.0, autocast)(torch.from_numpy(episodes))
    for episode, cached in zip(episodes, scores):
        frames, _ = next(reader.stream(split, [episode], train=False))
        with torch.no_grad():
            expected = class_scores(log_scores(model(frames[None], 4), 4, 10.0), torch.tensor([0, 0, 1, 1]), 2)[0]
        torch.testing.assert_close(cached, expected, rtol=1e-2, atol=1e-3)  # kept in half precision
        assert (cached.argmax(-1) == expected.argmax(-1)).all()
    reader.close()


def test_episode_list_depends_on_seed_and_videos_alone(world):
    split = data.load_splits(load_config([str(world / 'config.py')]))['train']
    episodes, again, others = (evaluation.draw_episodes(split, 3, 2, 1, seed, 20) for seed in (7, 7, 8))
    name = evaluation.hash_of(split, episodes)
    assert np.array_equal(episodes, again) and evaluation.hash_of(split, others) != name
    assert evaluation.hash_of(subset(split, np.arange(len(split.videos))[::-1]), episodes) != name
    for episode in episodes:
        classes = split.labels[episode]
        assert (classes[:6].reshape(3, 2) == classes[6:, None]).all() and len(set(classes)) == 3 and len(set(episode)) == 9


def test_interval_by_hand():
    mean, half = evaluation.interval(np.array([0.0, 1.0, 1.0, 0.0]))
    assert mean == 50 and half == pytest.approx(196 * (1 / 3) ** 0.5 / 2)


def test_mean_pool_by_hand():
    pooled = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [0.9, 0.1], [0.1, 0.9]]), dim=-1)
    scores = evaluation.mean_pool(pooled, 1, 2)(torch.tensor([[0, 1, 3]]))
    prototype = (pooled[0] + pooled[1]) / (pooled[0] + pooled[1]).norm()
    torch.testing.assert_close(scores[0, 0, 0], prototype @ pooled[3])
    episodes = np.array([[0, 2, 3, 4]])
    assert evaluation.predict(evaluation.mean_pool(pooled, 2, 1), episodes, 2, 2, 'cpu', '').tolist() == [[0, 1]]


def test_probe_reverses_shuffles_and_stills_the_queries_alone(world, trained, monkeypatch):
    """Rows 1, 2, 3 of each video are its frames reversed, the middle one repeated, shuffled; queries alone are of these."""
    asked, predict = {}, evaluation.predict

    def spy(scores, episodes, n_support, dim, device, note):
        asked[note] = episodes
        return predict(scores, episodes, n_support, dim, device, note)

    monkeypatch.setattr(evaluation, 'predict', spy)
    options = [f'--ckpt={trained[0] / "best.pt"}', *SPEED, '--probe=True', '--test_shots=[1]']
    config, (checkpoint,) = evaluation.configure(options)
    clip, autocast = evaluation.load_clip(config), torch.autocast('cpu', enabled=False)
    model = evaluation.build(config, clip)
    evaluation.restore(model, clip, checkpoint, 'best.pt')
    split, reader = data.load_splits(config)['test'], data.ClipReader(config, 32)
    kept = encode_split(config, clip, model, [model], split, reader, 'cpu', autocast)
    _, frozen = encode_frozen(model, split, reader, 'cpu', autocast)
    shuffled = np.random.default_rng(config['seed']).permutation(4)
    (start, tokens), = kept['kept']
    for row, order in enumerate(([0, 1, 2, 3], [3, 2, 1, 0], [2, 2, 2, 2], shuffled)):
        expected, level = encode(model, [x[:, order] for x in frozen], autocast)
        torch.testing.assert_close(start[row::4], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokens[0][row::4], level[0].half(), rtol=1e-2, atol=1e-2)
    evaluation.evaluate(config, clip, [model], kept, 'cpu', autocast)
    for row, probe in enumerate(('reversed', 'still', 'shuffled'), 1):
        plain, probed = asked['vba-joint 1-shot'], asked[f'vba-joint, queries {probe} 1-shot']
        assert (probed[:, :2] == plain[:, :2]).all() and (probed[:, 2:] == plain[:, 2:] + row).all() and not (plain % 4).any()
