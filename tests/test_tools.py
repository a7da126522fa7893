"""Small tools beside training: open-set test, extracted features, pictures of runs."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import torch

import data
import testing
from config import DEFAULTS, ROOT
from decode import Video
from tools import open_set, plot, tables

CONFIG = DEFAULTS | dict(device='cpu', dtype='float32', way=3, test_shots=[2], test_queries=2, test_episodes=40)


def split_of(name, classes, videos):
    labels = np.repeat(np.arange(classes), videos)
    return data.Split(name, [str(c) for c in range(classes)], [Video(f'{i}.mp4') for i in range(len(labels))], labels,
                      [list(range(classes))])


def test_auroc_is_the_share_of_pairs():
    rng = np.random.default_rng(0)
    known, unknown = rng.integers(0, 9, 50), rng.integers(0, 6, 70)  # with many equal ones
    pairs = [(k > u) + 0.5 * (k == u) for k in known for u in unknown]
    assert np.isclose(open_set.auroc(known, unknown), np.mean(pairs)) and np.mean(pairs) > 0.55


def test_half_of_the_queries_are_of_other_classes():
    split = dataclasses.replace(split_of('test', 8, 6), groups=[])
    episodes = open_set.draw(split, 3, 2, 2, 0, 50)
    labels = split.labels[episodes]  # (50, 3 * 2 + 2 * 3 * 2)
    for supports, known, unknown in zip(labels[:, :6], labels[:, 6:12], labels[:, 12:]):
        assert len(set(supports)) == 3 and (known == supports).all() and len(set(unknown)) == 3
        assert not set(unknown) & set(supports)
    assert all(len(set(episode)) == 18 for episode in episodes)


class Nearest(torch.nn.Module):
    """Less the distance of a query's number to that of a class's supports."""

    def scores(self, kept, episode):
        support, query = episode.split(episode.take(kept[0]))
        return -(query - episode.by_class(support).transpose(1, 2)).abs()  # (E, M, N)


def test_the_threshold_comes_from_the_validation_classes(tmp_path, capsys):
    """Numbers that are those of the classes, the validation's with noise; then numbers that say nothing."""
    rng, sides = np.random.default_rng(0), {}
    config = CONFIG | dict(out_dir=str(tmp_path))
    for name, noise in (('val', 0.1), ('test', 0.0)):
        split = split_of(name, 8, 6)
        told = torch.tensor(split.labels + noise * rng.standard_normal(48))[:, None].float()
        blind = torch.tensor(rng.standard_normal(48))[:, None].float()
        tested = [testing.Tested(config, Nearest(), '', path, tensors=[x])
                  for path, x in (('told.pt', told), ('blind.pt', blind))]
        sides[name] = split, tested, np.arange(48)
    open_set.test(config, sides['val'], sides['test'])
    told, blind = json.load(open(tmp_path / 'open_set.json'))
    assert told['auroc'] == 100 and -0.5 < told['threshold'] < 0
    assert told['known_refused'] == 0 and told['unknown_refused'] == 100
    assert abs(blind['auroc'] - 50) < 12 and blind['unknown_refused'] < 25
    assert '3-way 2-shot' in capsys.readouterr().out


def row_of(method, right):
    """A row of a test of three classes, 2-way; right: of each episode which queries are."""
    return dict(method=method, checkpoint=None, way=2, shot=1, episodes_hash='0', split='test', classes=['hop', 'run', 'sit'],
                confusion=[[8, 2, 0], [5, 5, 0], [0, 0, 10]]), np.array(right, bool)


def test_paired_differences_by_hand(capsys):
    """Episodes with 1, 0.5 and 0 more right: a mean of a half, an interval of 1.96 * 0.5 / sqrt(3)."""
    rows, rights = zip(row_of('one', [[0, 0], [1, 0], [1, 1]]), row_of('two', [[1, 1], [1, 1], [1, 1]]))
    tables.print_pairs(rows, rights)
    assert capsys.readouterr().out == '2-way 1-shot  two - one: +50.00 ± 56.58 points (paired)\n'


def test_a_checkpoint_beside_the_same_method_untrained(capsys):
    (row, right), (trained, other) = row_of('changes', [[0], [1]]), row_of('changes', [[1], [1]])
    tables.print_pairs([row, trained | dict(checkpoint='runs/best.pt')], [right, other])
    assert 'changes (runs/best.pt) - changes: ' in capsys.readouterr().out


def test_mistakes_are_of_other_classes(capsys):
    tables.print_mistakes(row_of('one', [[1]])[0])
    assert [line.strip() for line in capsys.readouterr().out.splitlines()[1:]] == [
        'run for hop: 50.0 % of its queries', 'hop for run: 20.0 % of its queries']


def test_runs_of_one_name_are_drawn_each(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot.pictures, 'curves', lambda logs, out: drawn.extend(logs.values()))
    for name in ('a', 'b'):
        (tmp_path / name / 'seed0').mkdir(parents=True)
        (tmp_path / name / 'seed0' / 'log.jsonl').touch()
    monkeypatch.setattr(sys, 'argv', ['plot.py', str(tmp_path / 'a' / 'seed0'), str(tmp_path / 'b' / 'seed0')])
    plot.main()
    assert len(set(drawn)) == 2


def test_runs_side_by_side(tmp_path):
    for name, steps in (('one', 500), ('two', 3)):
        (tmp_path / name).mkdir()
        lines = [json.dumps(dict(iter=i, loss=2 / i, accuracy=i / 9)) + '\n' for i in range(1, steps)]
        (tmp_path / name / 'log.jsonl').write_text(''.join(lines) + '{"iter": 9')
    run = subprocess.run([sys.executable, f'{ROOT}/tools/plot.py', tmp_path / 'one', tmp_path / 'two', tmp_path,
                          f'--out={tmp_path / "runs.png"}'], capture_output=True, text=True)
    assert run.returncode == 0 and 'one: no results.json' in run.stdout, run.stderr
    assert (tmp_path / 'runs.png').read_bytes()[1:4] == b'PNG'
    run = subprocess.run([sys.executable, f'{ROOT}/tools/plot.py', tmp_path], capture_output=True, text=True)
    assert run.returncode == 1 and 'None of these' in run.stderr and 'Traceback' not in run.stderr
