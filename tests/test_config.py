"""Configurations: merging, types, the options of a method, --help, and one clear sentence for whatever is wrong."""

import ast
import io
import os
import re
import runpy
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import checkpoint
import config as config_py
import predict
from config import DATA, DEFAULTS, LOOK, MACHINE, ROOT, TESTING, TRAINING, find_method, load_config, methods, name_of, parse
from model import VBA

SAMPLES = sorted((Path(__file__).parent.parent / 'sample_configs').glob('*.py'))
SCRIPTS = dict(train='train.py', eval='eval.py', predict='predict.py', data='tools/check.py')  # where docstring and options are
OURS = [path for path in (*Path(ROOT).glob('*.py'), *Path(ROOT, 'tools').glob('*.py'))
        if re.search(r'argv\[1:\], OPTIONS', path.read_text())]  # that have options of their own
IDEA = '''
from torch import nn


class Method(nn.Module):
    sees = ('image',)
    options = dict(
        scale=10.0,                # what cosines are multiplied by
        kind='plain',              # of mean: 'plain', or 'best'
    )
    choices = dict(kind=('plain', 'best'))
'''


def fails(argv, *words, **more):
    with pytest.raises(SystemExit) as error:
        load_config([str(arg) for arg in argv], **more)
    assert all(word in str(error.value) for word in words), error.value


def sample(tmp_path, text):
    path = tmp_path / 'sample.py'
    path.write_text(text)
    return str(path)


@pytest.fixture
def idea(tmp_path):
    path = tmp_path / 'my_idea.py'
    path.write_text(IDEA)
    return str(path)


# ---- Merging

@pytest.mark.parametrize('path', SAMPLES, ids=lambda path: path.stem)
def test_samples_are_whole(path):
    config = load_config([str(path)])
    method = config['method']
    assert set(config) == {*DEFAULTS, *find_method(method)[0].options} and config['dataset'] == path.stem
    assert (method != 'vba') == config['closed_set']
    assert os.path.isabs(config['data_root']) and config['out_dir'] == os.path.join(ROOT, 'runs', f'{path.stem}_{method}')
    assert set(load_config([str(path), '--method=mean_pool'])) == set(DEFAULTS)


def test_order_of_merging(tmp_path):
    path = sample(tmp_path, "config = dict(lr=1, shot=3)")
    config = load_config([path, '--shot=2', '--dataset=a=b', '--annotations=None'])
    assert config['lr'] == 1.0 and type(config['lr']) is float
    assert config['shot'] == 2 and config['dataset'] == 'a=b' and config['annotations'] is None


def test_a_checkpoint_comes_before_the_sample_and_a_scripts_own_options_before_both(tmp_path):
    path, own = sample(tmp_path, "config = dict(shot=3)"), dict(top=1, way=7, method='mean_pool')
    saved = dict(method='vba', shot=2, way=2, temp=20.0)
    config = load_config([path, '--top=4'], own, saved)
    assert [config[key] for key in ('method', 'shot', 'way', 'temp', 'top', 'levels')] == ['vba', 3, 2, 20.0, 4, 4]
    config = load_config([path], own)
    assert [config[key] for key in ('method', 'shot', 'way', 'top')] == ['mean_pool', 3, 7, 1] and 'temp' not in config


def test_sections_share_no_option():
    assert len(DEFAULTS) == sum(map(len, (DATA, LOOK, TRAINING, TESTING, MACHINE)))


def test_relative_paths_start_where_they_are_written(tmp_path, monkeypatch, idea):
    monkeypatch.chdir(tmp_path)
    path = sample(tmp_path, "config = dict(data_root='clips')")
    assert load_config([path])['data_root'] == os.path.join(ROOT, 'clips')
    assert load_config([path, '--data_root=clips'])['data_root'] == str(tmp_path / 'clips')
    assert load_config(['--method=my_idea.py'])['method'] == idea
    path = sample(tmp_path, "config = dict(method='methods/mean_pool.py')")
    assert load_config([path])['method'] == os.path.join(ROOT, 'methods', 'mean_pool.py')


def test_nothing_in_a_sample_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails([sample(tmp_path, "config = dict(lr=open('stolen', 'w'))")], 'plain values', 'line 1')
    assert not os.path.exists('stolen')


# ---- Methods

def test_options_of_a_method_hold_while_it_is_chosen(tmp_path):
    path = sample(tmp_path, "config = dict(vba=dict(temp=50.0, cross_video=False), shot=2)")
    config = load_config([path])
    assert (config['temp'], config['cross_video'], config['levels'], config['shot']) == (50.0, False, 4, 2)
    assert 'vba' not in config and load_config([path, '--temp=3'])['temp'] == 3.0
    config = load_config([path, '--method=mean_pool'])
    assert not {'temp', 'cross_video', 'vba', 'levels'} & set(config) and config['shot'] == 2
    path = sample(tmp_path, "config = dict(method='mean_pool', vba=dict(temp=50.0))")
    assert 'temp' not in load_config([path]) and load_config([path, '--method=vba'])['temp'] == 50.0
    for text in ('lr=1e-3, vba=dict(lr=1e-2)', 'vba=dict(lr=1e-2), lr=1e-3'):  # it wins wherever it stands
        path = sample(tmp_path, f'config = dict({text})')
        assert load_config([path])['lr'] == 1e-2 and load_config([path, '--method=mean_pool'])['lr'] == 1e-3


@pytest.mark.parametrize('text, words', [
    ("vba=dict(tmep=50.0)", ("'tmep'", "'temp'", 'method=vba')), ("vba=dict(temp='hot')", ('temp', 'float')),
    ("vba=dict(loss='none')", ('loss', "'pairwise'")), ("nothing=dict(a=1)", ("'nothing'",)),
    ("vbas=dict(temp=1.0)", ("'vbas'",)),
    ("mean_pool=dict(temp=1.0), method='mean_pool'", ("'temp'", 'method=mean_pool')), ("lr=dict(a=1)", ('lr', 'float')),
    ("temp=1.0, method='mean_pool'", ("'temp'", 'method=mean_pool')), ("method='nothing'", ("'nothing'",)),
    ("method=3", ('method=3', 'str')), ("vba=3", ("'vba'",)), ("vba=3, method='mean_pool'", ("'vba'",))])
def test_what_is_wrong_in_a_sample_is_named(tmp_path, text, words):
    fails([sample(tmp_path, f'config = dict({text})')], *words)


def test_a_method_by_path(tmp_path, idea):
    config = load_config([f'--method={idea}', '--scale=2'])
    assert config['method'] == idea and config['scale'] == 2.0 and config['kind'] == 'plain' and 'temp' not in config
    assert config['out_dir'].endswith('unnamed_my_idea') and name_of(idea) == 'my_idea'
    method, path = find_method(idea)
    assert method.__name__ == 'Method' and path == idea
    path = sample(tmp_path, f"config = dict(method={idea!r}, my_idea=dict(scale=3), vba=dict(temp=1.0))")
    assert load_config([path])['scale'] == 3.0
    fails([f'--method={idea}', '--kind=worst'], 'kind', "'best'")
    fails([f'--method={idea}', '--scale=much'], 'scale', 'float')
    fails([f'--method={idea}', '--temp=1.0'], "'temp'", 'method=my_idea')
    fails(['--scale=2.0'], "'scale'", 'method=vba')


def test_methods_that_are_none(tmp_path):
    fails(['--method=nothing'], "no method 'nothing'", 'vba', 'mean_pool', 'zero_shot', 'my_idea.py')
    fails([f'--method={tmp_path / "nothing.py"}'], 'There is no method', 'nothing.py')
    (tmp_path / 'empty.py').write_text('x = 1')
    fails([f'--method={tmp_path / "empty.py"}'], 'empty.py defines no class Method')
    assert methods() == ['vba', *sorted(path.stem for path in Path(ROOT, 'methods').glob('*.py'))]


def test_every_method_is_whole():
    for name in methods():
        method, path = find_method(name)
        assert os.path.isfile(path) and all(callable(getattr(method, part)) for part in ('video', 'scores'))
        options, choices = getattr(method, 'options', {}), getattr(method, 'choices', {})
        assert set(choices) <= set(options) and all(options[key] in values for key, values in choices.items())


# ---- --help

def comments_of(path, name):
    """{option: comment} of the `name = dict(...)` in a file."""
    text = Path(path).read_text()
    by_line = {token.start[0]: token.string.removeprefix('# ') for token in tokenize.generate_tokens(io.StringIO(text).readline)
               if token.type == tokenize.COMMENT}
    (found,) = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)
                and getattr(node.targets[0], 'id', '') == name and isinstance(node.value, ast.Call)]
    return {each.arg: by_line.get(each.value.end_lineno) for each in found.keywords}


def common():
    return {key: comment for name in ('DATA', 'LOOK', 'TRAINING', 'TESTING', 'MACHINE')
            for key, comment in comments_of(config_py.__file__, name).items()}


def own_of(script):
    """A script's own options and their comments."""
    path = Path(ROOT, SCRIPTS[script])
    return (runpy.run_path(str(path))['OPTIONS'], comments_of(path, 'OPTIONS')) if path in OURS else ({}, {})


def run(monkeypatch, script, *argv):
    """A script from its command line -> what it stops with."""
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(os.path.join(ROOT, f'{script}.py'), run_name='__main__')
    return stop.value.code


def docstring(script):
    """As Python has it: from 3.13 on without its indentation."""
    return compile(Path(ROOT, SCRIPTS[script]).read_text(), script, 'exec').co_consts[0]


def assert_says(out, options, comments):
    """Each option stands on a line with its default and its comment."""
    lines = out.splitlines()
    for key, value in options.items():
        assert any(line.split() == [*f'--{key}={value}'.split(), *comments[key].split()] for line in lines), key


def test_every_option_has_a_comment(idea):
    found = [common(), comments_of(idea, 'options')]
    found += [comments_of(path, 'OPTIONS') for path in OURS]
    assert {'eval.py', 'predict.py', 'check.py'} <= {path.name for path in OURS} and set(common()) == set(DEFAULTS)
    for method, path in map(find_method, methods()):
        if options := getattr(method, 'options', {}):
            found.append(comments_of(path, 'options'))
            assert set(found[-1]) == set(options)
    assert [key for comments in found for key, comment in comments.items() if not comment] == []


@pytest.mark.parametrize('script', SCRIPTS)
def test_help(monkeypatch, capsys, idea, script):
    assert not run(monkeypatch, script, '--help')
    out, (own, comments) = capsys.readouterr().out, own_of(script)
    assert out.startswith(docstring(script)) and bool(own) == (script != 'train')
    assert_says(out, {key: value for key, value in DEFAULTS.items() if key not in own}, common())
    assert_says(out, own, comments)
    if script == 'predict':  # mean_pool has no options
        assert '--temp=' not in out
    else:
        assert_says(out, VBA.options, comments_of(os.path.join(ROOT, 'model.py'), 'options'))
    run(monkeypatch, script, f'--method={idea}', '--help')
    out = capsys.readouterr().out
    assert_says(out, dict(scale=10.0, kind='plain'), comments_of(idea, 'options'))
    assert '--temp=' not in out and 'my_idea' in out


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_says_each_option_once(monkeypatch, capsys, script):
    run(monkeypatch, script, '--help')
    keys = re.findall(r'^  --(\w+)=', capsys.readouterr().out, re.M)
    own = own_of(script)[0]
    expected = {*DEFAULTS, *own, *(VBA.options if script != 'predict' else {})}
    assert sorted(keys) == sorted(expected)


@pytest.mark.parametrize('script', SCRIPTS)
def test_without_arguments_it_says_what_to_type(monkeypatch, script):
    said = run(monkeypatch, script)
    assert said.startswith(docstring(script)) and f'python {script}.py ' in said and '--help' in said.splitlines()[-1]


def test_help_of_a_real_process(tmp_path):
    asked, bare = (subprocess.run([sys.executable, os.path.join(ROOT, 'data.py'), *argv], cwd=tmp_path, text=True,
                                  capture_output=True) for argv in (['--help'], []))
    assert asked.returncode == 0 and not asked.stderr and asked.stdout.startswith(docstring('data'))
    assert_says(asked.stdout, DEFAULTS | VBA.options | own_of('data')[0],
                common() | comments_of(os.path.join(ROOT, 'model.py'), 'options') | own_of('data')[1])
    assert bare.returncode == 1 and not bare.stdout and bare.stderr.startswith(docstring('data'))
    assert not os.listdir(tmp_path)


# ---- What is wrong

@pytest.mark.parametrize('option, words', [
    ('--shots=1', ("'shots'", "'shot'")), ('--lr', ('lr', 'float')), ('--lr=fast', ('lr', 'float')),
    ('--query=', ('--query= is empty',)),
    ('--way=2.5', ('way', 'int')), ('--cross_video=True', ('cross_video', "'inductive'")),
    ('--way=0', ('way', 'positive')), ('--lr=-1', ('lr', 'negative')), ('--weight_decay=-1', ('weight_decay', 'negative')),
    ('--flip=1', ('flip', 'bool')),
    ('--splits=3', ('splits', 'int')), ('--device=cuda:1', ('device', "'cuda'")),
    ('--test_shots=[1,0]', ('test_shots', 'positive')), ('--test_shots=[]', ('test_shots', 'positive')),
    ('--templates=[]', ('templates', 'strings')), ('--query=[1]', ('query', 'strings')),
    ('--seed=-1', ('seed', 'negative')), ('--image_size=-64', ('image_size', 'positive')),
    ('--drops={1:"a"}', ('drops', 'steps and factors')), ('--temp=0', ('temp', 'positive')), ('--vba=3', ("'vba'",)),
    ('--window=-1', ('window', 'negative')), ('--stride=0', ('stride', 'positive')), ('--top=0', ('top', 'positive')),
])
def test_what_is_wrong_is_named(option, words):
    fails([option], *words, own=predict.OPTIONS | dict(method='vba'))


def test_files_that_are_none(tmp_path):
    fails(['nowhere.py'], 'nowhere.py')
    fails([sample(tmp_path, 'x = 1')], 'config = dict(...)')
    fails([sample(tmp_path, 'config = dict(')], 'sample.py')
    fails(['a.py', 'b.py'], 'a.py b.py: expected one sample config')
    fails(['--query', 'a.mp4', 'b.mp4'], 'b.mp4: expected one sample config', 'in quotes')  # a pattern that the shell expanded


@pytest.mark.parametrize('argv, given', [
    ('--query|my clip.mp4|--json', (None, dict(query='my clip.mp4', json=True))),
    ('--resume|a.py|--lr|-1', ('a.py', dict(resume=True, lr=-1))), ('a.py|--resume', ('a.py', dict(resume=True))),
    ('--method|my_idea.py|--dataset=x=y', (None, dict(method='my_idea.py', dataset='x=y')))])
def test_a_space_or_nothing_for_the_equals_sign(argv, given):
    assert parse(argv.split('|')) == given


def test_an_option_of_another_script_is_refused():
    fails(['--query=clips'], "'query'")
    fails(['--sheet=a.png'], "'sheet'", own=predict.OPTIONS)
    with pytest.raises(SystemExit, match="'probe'"):
        checkpoint.configure(['--probe=True'], predict.OPTIONS)


def test_a_sample_takes_over_the_values_of_its_base(tmp_path):
    (tmp_path / 'first.py').write_text('config = dict(lr=0.5, shot=2, vba=dict(temp=50.0))')
    (tmp_path / 'second.py').write_text("config = dict(base='first.py', shot=3)")
    config = load_config([str(tmp_path / 'second.py')])
    assert (config['lr'], config['shot'], config['temp']) == (0.5, 3, 50.0) and 'base' not in config
    (tmp_path / 'third.py').write_text("config = dict(base='none.py')")
    with pytest.raises(SystemExit, match='Cannot read the config .*none.py'):
        load_config([str(tmp_path / 'third.py')])
