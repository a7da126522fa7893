"""tools/compare.py: what it trains, what it does not train again, and the arithmetic of its tables."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import compare

SAMPLE = str(Path(__file__).resolve().parent.parent / 'sample_configs' / 'moving_shapes.py')


def row(method, shot, accuracy, checkpoint=None, **more):
    return dict(method=method, shot=shot, accuracy=accuracy, ci95=0.5, checkpoint=checkpoint, text=False, transductive=False,
                parameters=1234 if checkpoint else 0, tuned=False, train_shot=5 if checkpoint else None) | more


def trained(method, first, second):
    return [row('mean_pool', 1, 20.0), row('mean_pool', 5, 21.0),
            row(method, 1, first, 'best.pt'), row(method, 5, second, 'best.pt')]


def test_table_and_differences_by_hand():
    found = {'matrix': [trained('matrix', 50.0, 60.0), trained('matrix', 54.0, 60.0)],
             'my_idea --depth=2': [trained('my_idea', 51.0, 70.0), trained('my_idea', 53.0, 72.0)]}
    lines = compare.table(found).splitlines()
    assert lines[0] == '| | trained numbers | protocol | 1-shot | 5-shot |'
    assert lines[2] == '| mean_pool | 0 | frozen | 20.0 ± 0.5 | 21.0 ± 0.5 |'  # the interval over episodes
    assert lines[3] == '| matrix | 1,234 | frozen, trained 5-shot | 52.0 ± 2.8 | 60.0 ± 0.0 |'  # the deviation over seeds
    assert lines[4] == '| my_idea --depth=2 | 1,234 | frozen, trained 5-shot | 52.0 ± 1.4 | 71.0 ± 1.4 |'
    # differences 1, -1: mean 0, standard deviation 1.414, divided by sqrt 2 and times 12.71
    assert compare.differences(found).splitlines()[2] == '| my_idea --depth=2 | +0.0 ± 12.7 | +11.0 ± 12.7 |'


def test_columns_of_groups():
    groups = dict(within=10.0, within_ci95=0.2, across=30.0, across_ci95=0.1)
    lines = compare.table({'vba': [[row('mean_pool', 1, 20.0, **groups), row('vba joint', 1, 20.0, 'best.pt', **groups)]]})
    assert lines.splitlines()[0].endswith('| 1-shot, within | 1-shot, across |')
    assert lines.splitlines()[2:] == ['| mean_pool | 0 | frozen | 10.0 ± 0.2 | 30.0 ± 0.1 |',
                                      '| vba joint | 1,234 | frozen, trained 5-shot | 10.0 ± 0.2 | 30.0 ± 0.1 |']


def test_the_protocol_of_a_row_by_hand():
    text = row('clip_fsar', 1, 20.0, 'best.pt', text=True, tuned=True, train_shot=1)
    assert compare.protocol(text) == 'CLIP tuned, text, trained 1-shot'
    assert compare.protocol(row('vba joint', 1, 20.0, 'best.pt', transductive=True)) == 'frozen, transductive, trained 5-shot'


def compared(monkeypatch, *arguments, ended=0):
    """compare.main() where a training only writes its results -> the commands."""
    commands = []

    def run(command, **rest):
        commands.append(command)
        own = dict(argument[2:].split('=', 1) for argument in command[3:])
        if not ended:
            rows = [dict(each, within=each['accuracy'], within_ci95=1.0, across=each['accuracy'], across_ci95=1.0)
                    for each in trained(own['method'], 50.0 + int(own['seed']), 60.0)]
            (Path(own['out_dir']) / 'results.json').write_text(json.dumps(rows))
        return SimpleNamespace(returncode=ended)

    monkeypatch.setattr(subprocess, 'run', run)
    monkeypatch.setattr(sys, 'argv', ['compare.py', SAMPLE, *arguments])
    compare.main()
    return commands


def test_every_row_with_every_seed_and_none_twice(monkeypatch, tmp_path, capsys):
    rows = ['matrix', 'vba --cross_video=False', f'--out={tmp_path}', '--max_iters=7']
    commands = compared(monkeypatch, *rows, '--seeds=1')
    assert [command[3] for command in commands] == ['--method=matrix', '--method=vba']
    assert all('--max_iters=7' in command and '--seed=0' in command and '--resume=False' in command for command in commands)
    assert '--cross_video=False' in commands[1] and '--cross_video=False' not in commands[0]
    commands = compared(monkeypatch, *rows, '--seeds=2')  # one seed more
    assert ['--seed=1' in command for command in commands] == [True, True]
    line = '| vba --cross_video=False | 1,234 | frozen, trained 5-shot | 50.5 ± 0.7 | 50.5 ± 0.7 | 60.0 ± 0.0 |'
    assert line in capsys.readouterr().out
    assert 'seeds 0 to 1' in (tmp_path / 'table.md').read_text()
    assert len({str(command[-2]) for command in commands}) == 2  # a folder each


def test_what_fails_is_told_and_what_was_interrupted_goes_on(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match='matrix: the training ended with exit status 3; .*output.txt tells why'):
        compared(monkeypatch, 'matrix', f'--out={tmp_path}', ended=3)
    next(tmp_path.glob('matrix*')).joinpath('last.pt').touch()
    assert '--resume=True' in compared(monkeypatch, 'matrix', f'--out={tmp_path}')[0]


def test_the_learning_rate_is_chosen_in_validation(monkeypatch, tmp_path, capsys):
    """Of three the middle one is best there; the others are not trained with a second seed."""
    best = {True: 0.9, False: 0.5}
    monkeypatch.setattr(compare.checkpoint, 'load', lambda path, trusted: dict(state=dict(best=best['lr_0.2' in path])))
    commands = compared(monkeypatch, 'matrix', 'proto --lr=0.3', '--lrs=[0.1,0.2,0.4]', '--seeds=2', f'--out={tmp_path}')
    assert [command[4:6] for command in commands] == [
        *([f'--lr={lr}', '--seed=0'] for lr in (0.1, 0.2, 0.4)), ['--lr=0.2', '--seed=1'], ['--lr=0.3', '--seed=0'],
        ['--lr=0.3', '--seed=1']]  # who names its rate keeps it
    assert '| matrix, lr=0.2 | 1,234 |' in capsys.readouterr().out and (tmp_path / 'table.png').exists()


def test_results_older_than_what_they_came_from_are_told(monkeypatch, tmp_path, capsys):
    compared(monkeypatch, 'matrix', f'--out={tmp_path}')
    assert not compared(monkeypatch, 'matrix', f'--out={tmp_path}') and 'changed' not in capsys.readouterr().err
    os.utime(next(tmp_path.glob('matrix*/results.json')), (0, 0))
    assert not compared(monkeypatch, 'matrix', f'--out={tmp_path}')
    told = capsys.readouterr()
    assert 'matrix.py changed: delete it to train it again' in told.out + told.err


@pytest.mark.parametrize('arguments, words', [
    (['matrix', '--max_itres=3'], "did you mean 'max_iters'"), ([], 'Name the rows after the config'),
    (['matrix --depth=3'], "no option 'depth' with method=matrix"), (['matricks'], "There is no method 'matricks'"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_trained(monkeypatch, tmp_path, arguments, words):
    with pytest.raises(SystemExit, match=words):
        compared(monkeypatch, *arguments, f'--out={tmp_path}')


def test_a_closed_set_has_columns_of_its_own():
    def closed(method, checkpoint, split, accuracy):
        return row(method, 2, accuracy, checkpoint, views=1, split=split)

    untrained = closed('zero_shot', None, 'test', 5.0)
    by_name = [untrained, closed('xclip', 'best.pt', 'test', 30.0),
               closed('zero_shot', None, 'unseen', 6.0), closed('xclip', 'best.pt', 'unseen', 8.0)]
    linear = [untrained, closed('linear', 'best.pt', 'test', 40.0)]
    lines = compare.table({'linear': [linear], 'xclip': [by_name]}).splitlines()
    assert lines[0] == '| | trained numbers | protocol | closed set | unseen classes |'
    assert lines[2] == '| zero_shot | 0 | frozen | 5.0 ± 0.5 | 6.0 ± 0.5 |'
    assert lines[3:] == ['| linear | 1,234 | frozen | 40.0 ± 0.5 |  |', '| xclip | 1,234 | frozen | 30.0 ± 0.5 | 8.0 ± 0.5 |']
