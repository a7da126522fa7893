"""Configurations: merging, types, and one clear sentence for whatever is wrong."""

import os
from pathlib import Path

import pytest

from config import DEFAULTS, ROOT, load_config

SAMPLES = sorted((Path(__file__).parent.parent / 'sample_configs').glob('*.py'))


def fails(argv, *words):
    with pytest.raises(SystemExit) as error:
        load_config(argv)
    assert all(word in str(error.value) for word in words), error.value


def sample(tmp_path, text):
    path = tmp_path / 'sample.py'
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize('path', SAMPLES, ids=lambda path: path.stem)
def test_samples_are_whole(path):
    config = load_config([str(path)])
    assert set(config) == set(DEFAULTS) and config['dataset'] == path.stem
    assert os.path.isabs(config['data_root']) and config['out_dir'] == os.path.join(ROOT, 'runs', path.stem)


def test_order_of_merging(tmp_path):
    path = sample(tmp_path, "config = dict(lr=1, shot=3)")
    config = load_config([path, '--shot=2', '--dataset=a=b', '--annotations=None'])
    assert config['lr'] == 1.0 and type(config['lr']) is float
    assert config['shot'] == 2 and config['dataset'] == 'a=b' and config['annotations'] is None


def test_relative_paths_start_where_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = sample(tmp_path, "config = dict(data_root='clips')")
    assert load_config([path])['data_root'] == os.path.join(ROOT, 'clips')
    assert load_config([path, '--data_root=clips'])['data_root'] == str(tmp_path / 'clips')


def test_nothing_in_a_sample_is_run(tmp_path):
    fails([sample(tmp_path, "config = dict(lr=open('stolen', 'w'))")], 'plain values', 'line 1')
    assert not os.path.exists('stolen')


@pytest.mark.parametrize('option, words', [
    ('--shots=1', ("'shots'", "'shot'")), ('--lr', ('--key=value',)), ('--lr=fast', ('lr', 'float')),
    ('--way=2.5', ('way', 'int')), ('--cross_video=True', ('cross_video', "'inductive'")),
    ('--way=0', ('way', 'positive')), ('--flip=1', ('flip', 'bool')),
    ('--splits=3', ('splits', 'int')), ('--device=cuda:1', ('device', "'cuda'")),
    ('--test_shots=[1,0]', ('test_shots', 'positive')), ('--test_shots=[]', ('test_shots', 'positive')),
    ('--templates=[]', ('templates', 'strings')), ('--query=[1]', ('query', 'strings')),
    ('--seed=-1', ('seed', 'negative')), ('--image_size=-64', ('image_size', 'positive')),
])
def test_what_is_wrong_is_named(option, words):
    fails([option], *words)


def test_files_that_are_none(tmp_path):
    fails(['nowhere.py'], 'nowhere.py')
    fails([sample(tmp_path, 'x = 1')], 'config = dict(...)')
    fails([sample(tmp_path, 'config = dict(')], 'sample.py')
