"""Your own clips: two or three classes of plainly coloured videos, made on the spot, and a tiny CLIP of random weights."""

import base64
import csv
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import weakref
from collections import deque
from fractions import Fraction
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import unquote

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import clip_loader
import predict
import testing
from config import DEFAULTS, ROOT, find_method
from data import Split
from decode import UnreadableVideo, Video
from model import VBA, Episode, bring, look, trainable_state
from reader import ClipMaker
from tools import pictures, timeline

COLOURS = dict(blue=(20, 30, 220), green=(30, 200, 40), red=(220, 30, 20))
OPTIONS = dict(frames=4, resize=32, workers=0, device='cpu', dtype='float32')
CONFIG = DEFAULTS | dict(unknown=None) | OPTIONS


def write_video(path, pictures, rate=10, times=None):
    """Colours (n, 3), one a frame, as a video of flat frames; times: pts in 1/1000 s for a variable frame rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate, options=dict(crf='12', bf='2', g='7'))
        stream.width, stream.height, stream.pix_fmt = 48, 32, 'yuv420p'
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, colour in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), colour, np.uint8), 'rgb24')
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shades(name, n, seed):
    """n colours near one of COLOURS."""
    return np.clip(COLOURS[name] + np.random.default_rng(seed).integers(-15, 16, (n, 3)), 0, 255)


def random_clip(**text):
    torch.manual_seed(0)
    return clip_loader.CLIP(32, 16, 64, 3, 16, **text).float().eval()


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder of examples (blue 3, green 1, red 2), queries, weights and a checkpoint whose every part has a say."""
    root = tmp_path_factory.mktemp('world')
    for name, shots in dict(blue=3, green=1, red=2).items():
        for i in range(shots):
            write_video(root / 'examples' / name / f'{i}.mp4', shades(name, 12, i))
    for i, name in enumerate(COLOURS):
        write_video(root / 'queries' / f'{name}.mp4', shades(name, 15, 10 + i))
    torch.save(random_clip().state_dict(), root / 'clip.pt')
    text = dict(vocab_size=514, context_length=24, text_width=64, text_layers=1)
    torch.save(random_clip(**text).state_dict(), root / 'text.pt')
    for name, mode in (('joint', 'joint'), ('other', 'joint'), ('False', False)):  # `other` differs by its parameters alone
        config = CONFIG | VBA.options | dict(clip=str(root / 'clip.pt'), levels=2, cross_video=mode, temp=20.0)
        clip = checkpoint.load_clip(config)
        method = checkpoint.build(config, clip, ['a', 'b'])
        for p in trainable_state(method).values():
            p += 0.05 * torch.randn_like(p)
        checkpoint.save(str(root / f'{name}.pt'), method, clip, config)
    return root


@pytest.fixture
def call(world, monkeypatch, capsys):
    """predict.py with options -> exit status or message, stdout, stderr. Without a checkpoint these weights are named."""
    def run(**options):
        if 'ckpt' not in options:
            options = dict(clip=world / 'clip.pt', resize=32, frames=4) | options
        options = dict(support=world / 'examples', workers=0, device='cpu') | options
        monkeypatch.setattr(sys, 'argv', ['predict.py', *(f'--{key}={value}' for key, value in options.items())])
        try:
            status = predict.main()
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr()
        return SimpleNamespace(status=status, out=out.out, err=out.err,
                               rows=[json.loads(line) for line in out.out.splitlines() if line[:1] == '{'])
    return run


def options_for(world, name):
    """Of a method: a checkpoint's name, 'mean_pool' or 'zero_shot'."""
    untrained = dict(mean_pool={}, zero_shot=dict(method='zero_shot', clip=world / 'text.pt'))
    return untrained.get(name, dict(ckpt=world / f'{name}.pt'))


def loaded(world, name, **options):
    """A method as predict.py builds it -> its config, CLIP and itself."""
    if name in ('mean_pool', 'zero_shot'):
        config = CONFIG | dict(method=name, clip=str(world / ('text.pt' if name == 'zero_shot' else 'clip.pt'))) | options
    else:
        saved = checkpoint.load(str(world / f'{name}.pt'))
        config = CONFIG | saved['config'] | options
    clip = checkpoint.load_clip(config)
    method = checkpoint.build(config, clip, []).eval()
    if name not in ('mean_pool', 'zero_shot'):
        checkpoint.restore(method, clip, saved, name)
    return config, clip, method


def clips(n):
    return torch.randint(0, 256, (n, 4, 3, 32, 32), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)


# ---- Scores

def cosines_by_hand(x, y):
    return [[float(a @ b / a.norm() / b.norm()) for b in y.double()] for a in x.double()]


def vba_by_hand(support, query, labels, temp):
    """(3.6), (3.10): the mean over a class's examples of exp(temp * cosine), over the sum of these means."""
    e = np.exp(temp * np.array(cosines_by_hand(query, support)))
    means = np.stack([e[:, labels == c].mean(1) for c in labels.unique()], 1)
    return means / means.sum(1, keepdims=True)


def mean_pool_by_hand(support, query, labels):
    """100, as in CLIP, times the cosine to the mean of a class's examples, each of length 1."""
    units = support.double() / support.double().norm(dim=1, keepdim=True)
    prototypes = torch.stack([units[labels == c].mean(0) for c in labels.unique()])
    e = np.exp(100 * np.array(cosines_by_hand(query, prototypes)))
    return e / e.sum(1, keepdims=True)


def both(temp):
    """The method that trains and the one that does not, made to keep of a video one vector."""
    clip, config = random_clip(), VBA.options | dict(frames=4, levels=2, temp=temp, cross_video=False)
    return VBA(clip, [], config), find_method('mean_pool')[0](clip, [], config)


def labelled_as(method, support, query, labels):
    """What predict.py says where these are the vectors of examples and queries."""
    return predict.label(CONFIG, method, dict(classes=['a', 'b', 'c'], labels=labels, kept=[support]), [query])


def test_unequal_shots_by_hand():
    torch.manual_seed(1)
    support, query, labels, temp = 3 * torch.randn(6, 8), torch.randn(2, 8), torch.tensor([0, 0, 0, 1, 2, 2]), 7.0
    trained, untrained = (labelled_as(method, support, query, labels) for method in both(temp))
    support, query = F.normalize(support, dim=-1), F.normalize(query, dim=-1)
    for m in range(2):
        e = [np.exp(temp * float(query[m] @ s)) for s in support]
        means = [(e[0] + e[1] + e[2]) / 3, e[3], (e[4] + e[5]) / 2]
        assert np.allclose(trained[m], np.array(means) / sum(means), atol=1e-6)
        prototypes = [support[:3].mean(0), support[3], support[4:].mean(0)]
        e = [np.exp(100 * float(query[m] @ p / p.norm())) for p in prototypes]
        assert np.allclose(untrained[m], np.array(e) / sum(e), atol=1e-4)
    assert np.allclose(trained, vba_by_hand(support, query, labels, temp), atol=1e-6)
    assert np.allclose(untrained, mean_pool_by_hand(support, query, labels), atol=1e-4)


def test_labels_need_no_order():
    torch.manual_seed(1)
    support, query, labels, order = torch.randn(6, 8), torch.randn(2, 8), torch.tensor([0, 0, 0, 1, 2, 2]), [4, 0, 3, 1, 5, 2]
    for method in both(7.0):
        expected = labelled_as(method, support, query, labels)
        assert torch.allclose(labelled_as(method, support[order], query, labels[order]), expected, atol=1e-5)


@pytest.mark.parametrize('which', [0, 1])
def test_none_of_these_is_below_the_raw_score(which):
    """By hand: one more class of a fixed logit; the others keep their shares."""
    torch.manual_seed(3)
    support, query, labels = torch.randn(6, 8), torch.randn(2, 8), torch.tensor([0, 0, 1, 1, 2, 2])
    method, labels_of = both(7.0)[which], lambda config: predict.label(
        config, method, dict(classes=['a', 'b', 'c'], labels=labels, kept=[support]), [query])
    episode = Episode(labels, torch.arange(3)[None], ['a', 'b', 'c'], joint=False, index=torch.arange(8)[None])
    raw = method.scores([torch.cat([support, query])], episode)[0]
    best = raw.amax(1).tolist()
    found, plain = labels_of(CONFIG | dict(unknown=sum(best) / 2)), labels_of(CONFIG | dict(unknown=None))
    assert found.shape == (2, 4) and [row.argmax() == 3 for row in found] == [value < sum(best) / 2 for value in best]
    assert torch.allclose(found.sum(1), torch.ones(2)) and plain.shape == (2, 3)
    assert torch.allclose(found[:, :3] / found[:, :3].sum(1, keepdim=True), plain, atol=1e-5)


def test_none_of_these_is_an_answer(world, call, tmp_path):
    query = world / 'queries' / 'red.mp4'
    (row,) = call(query=query, unknown=1000, json=True, csv=tmp_path / 'out.csv', report=tmp_path / 'r.html').rows
    assert row['classes'] == [dict(name='none of these', score=1.0)] and 'none of these' in (tmp_path / 'out.csv').read_text()
    assert '/red/' in ''.join(Page(tmp_path / 'r.html').words)  # the nearest example all the same
    (row,) = call(query=query, unknown=0.5, json=True).rows
    assert row['classes'][0]['name'] == 'red'
    assert call(query=query, unknown=1000, window=0.5, json=True).rows[0]['timeline'][0]['name'] == 'none of these'


def test_equal_shots_are_those_of_the_test():
    torch.manual_seed(2)
    features, labels, names = torch.randn(26, 16), torch.arange(3).repeat_interleave(2), ['a', 'b', 'c']
    index, classes, (trained, untrained) = torch.arange(26)[None], torch.arange(3)[None], both(9.0)
    episode = Episode(labels, classes, names, joint=False, index=index)
    for method in (trained, untrained):
        ours = labelled_as(method, features[:6], features[6:], labels)
        drawn = index.numpy(), labels.numpy(), classes.numpy()
        (answers,) = testing.answers(CONFIG, method, [features], *drawn, names, False, '').tolist()
        assert ours.argmax(1).tolist() == answers and len(set(answers)) == 3
        assert torch.allclose(ours, method.scores([features], episode)[0].softmax(-1), atol=1e-6)


@pytest.mark.parametrize('name', ['joint', 'False'])
@torch.no_grad()
def test_examples_first_then_queries_is_the_inductive_model(world, name):
    config, clip, method = loaded(world, name)
    frames, labels = clips(9), torch.tensor([0, 0, 1, 1, 2])  # 5 examples, 4 queries
    kept, queries = (predict.encode(config, clip, method, part) for part in (frames[:5], frames[5:]))
    examples = dict(classes=['a', 'b', 'c'], labels=labels, kept=kept)
    together = predict.label(config, method, examples, queries)
    alone = torch.cat([predict.label(config, method, examples, [x[i:i + 1] for x in queries]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)

    exact = method.video(*bring(look(clip.visual, frames, method.sees), 'cpu'))  # as in training
    halved = [exact[0], *(x.half().float() for x in exact[1:])]  # tokens are kept in half precision

    def whole(kept, joint):
        return method.scores(kept, Episode(labels, torch.arange(3)[None], ['a', 'b', 'c'], joint))[0].softmax(-1)

    assert torch.allclose(together, whole(halved, False), atol=1e-5)
    assert torch.allclose(together, whole(exact, False), atol=1e-4)
    assert torch.allclose(together, whole(halved, True), atol=1e-3) == (name == 'False')  # and it matters


@torch.no_grad()
def test_mean_pooled_features_are_those_of_the_test(world):
    config, clip, method = loaded(world, 'mean_pool')
    frames = clips(3)
    (kept,) = predict.encode(config, clip, method, frames)
    by_frame = F.normalize(clip.visual(clip.visual.normalise(frames.flatten(0, 1))), dim=-1).unflatten(0, (3, 4))
    assert torch.allclose(F.normalize(kept, dim=-1), F.normalize(by_frame.mean(1), dim=-1), atol=1e-5)


@torch.no_grad()
def test_zero_shot_looks_at_class_names_alone(world, call):
    config, clip, method = loaded(world, 'zero_shot')
    result = call(query=world / 'queries', json=True, top=3, **options_for(world, 'zero_shot'))
    texts = clip.texts(['blue', 'green', 'red'], ['a video of {}.'])
    for row in result.rows:
        maker = ClipMaker(config, 32)
        image = F.normalize(clip.visual(clip.visual.normalise(maker.clip(Video(row['query']), None))), dim=-1).mean(0)
        expected = (100 * texts @ F.normalize(image, dim=0)).softmax(0).tolist()
        assert {i['name']: i['score'] for i in row['classes']} == pytest.approx(dict(zip(COLOURS, expected)), abs=1e-4)
    assert len(result.rows) == 3 and result.rows[0]['method'] == 'zero_shot'


# ---- Methods

def test_a_method_that_must_be_trained_is_refused(call, world):
    result = call(query=world / 'queries', method='vba', levels=2)
    assert result.status == 'method=vba must be trained: --ckpt= names its checkpoint.'
    assert 'no checkpoint of method=mean_pool' in call(query=world, ckpt=world / 'joint.pt', method='mean_pool').status
    assert 'temp=20.0, not 3.0' in call(query=world, ckpt=world / 'joint.pt', temp=3.0).status
    assert 'takes one checkpoint, not 2' in call(query=world, ckpt=[str(world / 'joint.pt'), str(world / 'False.pt')]).status


def test_a_method_of_ones_own(call, world, tmp_path):
    shutil.copy(f'{ROOT}/methods/mean_pool.py', tmp_path / 'my_idea.py')
    ours, theirs = (call(query=world / 'queries', json=True, top=3, **options).rows
                    for options in (dict(method=tmp_path / 'my_idea.py'), {}))
    assert [row['classes'] for row in ours] == [row['classes'] for row in theirs] and len(ours) == 3
    assert ours[0]['method'] == 'my_idea' and theirs[0]['method'] == 'mean_pool'


@pytest.mark.parametrize('options, words', [
    (dict(method='zero_shot'), 'image tower alone'),
    (dict(method='zero_shot', clip='text.pt', templates=['a video']), 'needs {}'),
    (dict(method='vba', levels=0), 'method=vba: levels=0, but the image tower has 3 blocks.'),
    (dict(method=3), 'method=3'), (dict(method='nothing'), "no method 'nothing'")])
def test_a_method_that_cannot_be_is_one_sentence(call, world, options, words):
    options = options | (dict(clip=world / options['clip']) if 'clip' in options else {})
    assert words in call(query=world / 'queries', **options).status


@pytest.mark.parametrize('end', ['.py', ''])
def test_a_strangers_checkpoint_chooses_no_code(call, world, tmp_path, end):
    (tmp_path / 'idea.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")\nfrom model import VBA as Method\n')
    saved = torch.load(world / 'joint.pt', weights_only=True)
    torch.save(saved | dict(config=saved['config'] | dict(method=str(tmp_path / 'idea') + end)), tmp_path / 'theirs.pt')
    result = call(query=world / 'queries', ckpt=tmp_path / 'theirs.pt')
    assert not (tmp_path / 'ran').exists() and 'outside this repository' in result.status
    if end:
        result = call(query=world / 'queries', ckpt=tmp_path / 'theirs.pt', method=tmp_path / 'idea.py')
        assert (tmp_path / 'ran').exists() and result.status is None and 'idea, 3 classes' in result.out


# ---- Whole clips

@pytest.mark.parametrize('name', ['mean_pool', 'joint', 'False'])
def test_clips_are_labelled_alone_as_together(world, call, name):
    options = options_for(world, name)
    result = call(query=world / 'queries', json=True, top=3, **options)
    assert not result.status and [row['query'].split('/')[-1] for row in result.rows] == ['blue.mp4', 'green.mp4', 'red.mp4']
    for row in result.rows:
        assert sum(item['score'] for item in row['classes']) == pytest.approx(1, abs=1e-5)
        (alone,) = call(query=row['query'], json=True, top=3, **options).rows
        assert {i['name']: pytest.approx(i['score'], abs=1e-4) for i in row['classes']} == {
            i['name']: i['score'] for i in alone['classes']}
    assert result.rows[0]['method'] == ('mean_pool' if name == 'mean_pool' else 'vba')
    if name == 'mean_pool':
        assert [row['classes'][0]['name'] for row in result.rows] == ['blue', 'green', 'red']
        text = call(query=str(world / 'queries' / '*.mp4')).out
        assert 'mean_pool, 3 classes, 1 to 3 examples each' in text and 'green.mp4: green ' in text


def test_a_failing_query_is_named_and_the_rest_go_on(world, call, tmp_path):
    (tmp_path / 'empty.mp4').touch()
    paths = [str(tmp_path / 'empty.mp4'), str(world / 'queries' / 'red.mp4'), str(tmp_path / 'none.mp4')]
    result = call(query=paths, json=True)
    assert result.status == '2 of 3 queries could not be read.'
    assert 'empty.mp4' in result.rows[0]['error'] and 'none.mp4: No such file' in result.rows[2]['error']
    assert result.rows[1]['classes'][0]['name'] == 'red' and 'empty.mp4' in result.err
    assert call(query=paths[0]).status == '1 of 1 queries could not be read.'


def test_queries_are_named_as_the_user_named_them(world, call, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    names = ['./queries/red.mp4', str(world / 'queries' / 'blue.mp4'), '../' + world.name + '/queries/green.mp4']
    result = call(query=names, csv=tmp_path / 'out.csv', json=True)
    with open(tmp_path / 'out.csv', newline='') as file:
        assert [row['query'] for row in csv.DictReader(file)] == names == [row['query'] for row in result.rows]
    assert [row['query'] for row in call(query='queries/', json=True).rows] == [f'queries/{name}.mp4' for name in COLOURS]


def test_names_that_are_not_utf_8(world, tmp_path):
    """As a process of its own: what is printed and written are the very bytes of the names."""
    folder = os.fsencode(tmp_path) + b'/caf\xe9'
    try:
        shutil.copytree(world / 'examples', os.fsdecode(folder))
    except OSError:
        pytest.skip('this file system takes UTF-8 alone')
    os.rename(folder + b'/red', folder + b'/r\xf6t')
    run = subprocess.run([sys.executable, f'{ROOT}/predict.py', b'--support=' + folder, b'--query=' + folder + b'/r\xf6t/0.mp4',
                          f'--clip={world / "clip.pt"}', '--resize=32', '--frames=4', '--workers=0', '--device=cpu',
                          f'--csv={tmp_path / "out.csv"}'], capture_output=True)
    assert run.returncode == 0 and folder + b'/r\xf6t/0.mp4: r\xf6t ' in run.stdout, run.stderr
    assert (tmp_path / 'out.csv').read_bytes().splitlines()[1].startswith(folder + b'/r\xf6t/0.mp4,,,r\xf6t,')


def test_a_test_of_names_that_are_not_utf_8(tmp_path):
    names = ['caf\udce9', 'red']
    split = Split('test', names, [Video('cl\udcefp.mp4'), Video('b.mp4')], np.arange(2))
    assert testing.hash_of(split, np.zeros((1, 2), int)) != testing.hash_of(split, np.ones((1, 2), int))
    row = dict(confusion=[[1, 0], [0, 1]], classes=names, method='m', shot=1, accuracy=50.0)
    pictures.confusion(row, str(tmp_path / 'c.png'))
    assert (tmp_path / 'c.png').stat().st_size > 1000


def test_a_folder_for_a_checkpoint_is_its_best(world, call, tmp_path):
    shutil.copy(world / 'joint.pt', tmp_path / 'best.pt')
    (row,) = call(ckpt=tmp_path, query=world / 'queries' / 'red.mp4', json=True).rows
    assert row['method'] == 'vba'
    assert 'There is no checkpoint' in call(ckpt=world, query=world / 'queries').status


@pytest.mark.parametrize('name', ['mean_pool', 'zero_shot', 'joint', 'False'])
def test_saved_examples_give_the_same_and_need_no_clips(world, call, tmp_path, name):
    shutil.copytree(world / 'examples', tmp_path / 'examples')
    options = options_for(world, name) | dict(top=3, json=True)
    first = call(support=tmp_path / 'examples', query=world / 'queries', save_support=tmp_path / 'first.pt', **options)
    assert call(support=tmp_path / 'examples', save_support=tmp_path / 'second.pt', **options).status is None  # without a query
    shutil.rmtree(tmp_path / 'examples')
    again = call(support=tmp_path / 'first.pt', query=world / 'queries', save_support=tmp_path / 'third.pt', **options)
    assert len(first.rows) == 3 and {len(row['classes']) for row in first.rows} == {3} and again.rows == first.rows
    for kept in ('second', 'third'):
        assert call(support=tmp_path / f'{kept}.pt', query=world / 'queries', **options).rows == first.rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ['first.pt', 'second.pt', 'third.pt']


@pytest.mark.parametrize('name', ['mean_pool', 'joint'])
def test_what_is_kept_is_that_of_the_examples_that_can_be_read(world, call, tmp_path, name):
    shutil.copytree(world / 'examples', tmp_path / 'examples')
    (tmp_path / 'examples' / 'blue' / '1.mp4').write_bytes(b'no video')
    call(support=tmp_path / 'examples', save_support=tmp_path / 'kept.pt', **options_for(world, name))
    saved = torch.load(tmp_path / 'kept.pt', weights_only=True)
    assert saved['classes'] == ['blue', 'green', 'red'] and saved['labels'].tolist() == [0, 0, 1, 2, 2]
    config, clip, method = loaded(world, name)
    paths = [world / 'examples' / path for path in ('blue/0.mp4', 'blue/2.mp4', 'green/0.mp4', 'red/0.mp4', 'red/1.mp4')]
    frames = torch.stack([ClipMaker(config, 32).clip(Video(str(path)), None) for path in paths])
    for ours, expected in zip(saved['kept'], predict.encode(config, clip, method, frames), strict=True):
        assert torch.allclose(ours.float(), expected.float(), atol=1e-3 if ours.dtype == torch.float16 else 1e-5)


def test_saved_examples_of_something_else(world, call, tmp_path):
    kept, of_joint, query = tmp_path / 'kept.pt', tmp_path / 'joint.pt', world / 'queries' / 'red.mp4'
    call(save_support=kept)
    call(save_support=of_joint, ckpt=world / 'joint.pt')
    assert 'otherwise: resize 32 (now 40).' in call(support=kept, query=query, resize=40).status
    assert 'otherwise: dtype float32 (now bfloat16).' in call(support=kept, query=query, dtype='bfloat16').status
    status = call(support=kept, query=query, **options_for(world, 'zero_shot')).status
    assert 'otherwise: method mean_pool (now zero_shot)' in status and 'weights' not in status
    status = call(support=kept, query=query, ckpt=world / 'joint.pt').status
    assert 'method mean_pool (now vba)' in status and 'levels None (now 2)' in status and 'parameters' in status
    assert 'method vba (now mean_pool)' in call(support=of_joint, query=query).status
    status = call(support=of_joint, query=query, ckpt=world / 'other.pt').status
    assert 'otherwise: parameters ' in status and ',' not in status
    assert 'cross_video joint (now False)' in call(support=of_joint, query=query, ckpt=world / 'False.pt').status
    clip = random_clip()
    clip.visual.proj.data.neg_()
    torch.save(clip.state_dict(), tmp_path / 'other.pt')
    assert 'otherwise: weights' in call(support=kept, query=query, clip=tmp_path / 'other.pt').status
    assert 'is no file of --save_support' in call(support=query, query=query).status
    assert 'is no file of --save_support' in call(support=world / 'joint.pt', query=query).status
    assert 'There is no ' in call(support=tmp_path / 'none', query=query).status


def test_saved_examples_of_a_method_that_was_edited(world, call, tmp_path):
    """A reader works on `video` and calls again: what the old code kept is something else."""
    with open(f'{ROOT}/methods/mean_pool.py') as file:
        code = file.read()
    mine, options = tmp_path / 'mine.py', dict(query=world / 'queries' / 'red.mp4', method=tmp_path / 'mine.py')
    mine.write_text(code)
    call(save_support=tmp_path / 'kept.pt', **options)
    assert call(support=tmp_path / 'kept.pt', **options).status is None
    mine.write_text(code.replace('.mean(1)', '.amax(1)'))
    assert 'encoded otherwise' in str(call(support=tmp_path / 'kept.pt', **options).status)


def test_an_unreadable_example_is_left_out_but_not_a_class(call, world, tmp_path):
    for name in ('red', 'blue'):
        for i in range(2):
            write_video(tmp_path / name / f'{i}.mp4', shades(name, 6, i))
    (tmp_path / '.hidden').mkdir()
    (tmp_path / 'red' / '1.mp4').write_bytes(b'no video')
    result = call(support=tmp_path, query=world / 'queries' / 'red.mp4')
    assert not result.status and 'mean_pool, 2 classes, 1 to 2 examples each' in result.out
    assert str(tmp_path / 'red' / '1.mp4') in result.err
    (tmp_path / 'red' / '0.mp4').unlink()
    assert "Class 'red' has no clip that could be read" in call(support=tmp_path, query=world / 'queries' / 'red.mp4').status
    (tmp_path / 'blue' / '0.mp4').unlink()
    (tmp_path / 'blue' / '1.mp4').unlink()
    (tmp_path / 'red' / '1.mp4').unlink()
    assert "Class 'blue' has no clip" in call(support=tmp_path, query=world / 'queries' / 'red.mp4').status  # nor has red
    assert 'holds 0 class folders' in call(support=tmp_path / 'red', query=world / 'queries' / 'red.mp4').status


# ---- Long videos

def grey(i):
    return np.full(3, 4 * i)


def frames_of(clip):
    """Which frame of a video of greys 0, 4, 8, ... each frame of a clip is."""
    return (clip.float().mean((1, 2, 3)) / 4).round().int().tolist()


def reference(times, length, window, stride, frames):
    """Windows and their frames the slow way: for each wanted second the last frame that has begun by then."""
    width, start, found = min(window, length), 0, []
    while True:
        last = start + width > length - 1e-6
        start = length - width if last else start
        wanted = [start + (i + 0.5) * width / frames for i in range(frames)]
        found.append((start, start + width, [max(j for j, time in enumerate(times) if time <= t + 1e-6) for t in wanted]))
        if last:
            return found
        start += stride


@pytest.mark.parametrize('kind', ['constant.mp4', 'constant.avi', 'constant.h264', 'variable.mp4', 'variable.mkv', 'late.mkv'])
@pytest.mark.parametrize('window, stride', [(2, 1), (1.3, 0.2), (0.5, 1.7), (60, 1)])
def test_windows_take_the_frames_of_their_seconds(tmp_path, kind, window, stride):
    n, rate = 60, 25 if kind == 'constant.h264' else 10  # raw H.264 has no time stamps, and 25 is what is assumed
    times = np.arange(n) * 1000 / rate
    if not kind.startswith('constant'):
        times = np.cumsum(np.random.default_rng(3).integers(20, 400, n)) + (5000 if kind == 'late.mkv' else 0)
    stamps = None if kind.startswith('constant') else times.tolist()
    path = write_video(tmp_path / kind, map(grey, range(n)), rate, stamps)
    config = dict(CONFIG, window=float(window), stride=float(stride))
    found = [(start, end, frames_of(clip)) for start, end, clip in timeline.windows(str(path), config, 32)]
    times = (times - times[0]) / 1000
    for got, expected in zip(found, reference(times, found[-1][1], window, stride, 4), strict=True):
        assert got[:2] == pytest.approx(expected[:2]) and got[2] == expected[2]
    assert 0 < found[-1][1] - times[-1] < 0.5 and found[0][0] == 0  # to the end of the last frame


def test_one_window_over_all_is_the_clip(tmp_path):
    path = str(write_video(tmp_path / 'clip.mp4', map(grey, range(24))))
    config = dict(CONFIG, window=60.0, stride=1.0)
    ((_, _, clip),) = timeline.windows(path, config, 32)
    assert torch.equal(clip, ClipMaker(config, 32).clip(Video(path), None))


def test_rotated(tmp_path, monkeypatch):
    path = str(write_video(tmp_path / 'clip.mp4', map(grey, range(12))))
    convert = timeline.Converter.__call__
    monkeypatch.setattr(timeline.Converter, '__call__', lambda self, frame: np.rot90(convert(self, frame)))  # as it does
    config = dict(CONFIG, window=60.0, stride=1.0)
    assert [frames_of(clip) for *_, clip in timeline.windows(path, config, 32)] == [[1, 4, 7, 10]]


def test_a_frame_on_show_for_an_hour(tmp_path, monkeypatch):
    """What a slide show makes, or a wild time stamp: the windows come one after another, none waits in memory."""
    path = str(write_video(tmp_path / 'slides.mkv', [grey(1), grey(9), grey(5)], times=[0, 1000, 3_601_000]))
    lengths = []

    class Watched(deque):
        def append(self, item):
            super().append(item)
            lengths.append(len(self))

    monkeypatch.setattr(timeline, 'deque', Watched)
    config = dict(CONFIG, window=2.0, stride=1.0)
    found = [frames_of(clip) for *_, clip in timeline.windows(path, config, 32)]
    assert 3600 <= len(found) <= 3602 and found[0] == [1, 1, 9, 9] and found[1800] == [9] * 4
    assert max(lengths) <= 3


def test_memory_is_flat(tmp_path, monkeypatch):
    held, most, made, crop = weakref.WeakSet(), [], [], ClipMaker.crop

    def counted(self, frames, rng):
        picture = crop(self, frames, rng)[0].clone()
        held.add(picture)
        most.append(len(held))
        made.append(1)
        return [picture]

    monkeypatch.setattr(ClipMaker, 'crop', counted)
    config = dict(CONFIG, window=2.0, stride=1.0)
    peaks = []
    for n in (60, 600):
        path = write_video(tmp_path / f'{n}.mp4', [grey(i % 60) for i in range(n)])
        most.clear(), made.clear()
        count = sum(1 for _ in timeline.windows(str(path), config, 32))
        assert count == n // 10 - 1 and len(made) <= 4 * count
        peaks.append(max(most))
    assert peaks[0] == peaks[1] <= 8  # T frames of each of the two windows that are open at a time


@pytest.mark.parametrize('name', ['mean_pool', 'joint'])
def test_timeline_of_two_halves(world, call, tmp_path, name):
    path = write_video(tmp_path / 'long.mp4', [*shades('red', 100, 5), *shades('blue', 100, 6)])
    options = options_for(world, name) | dict(query=path, window=2.0, stride=0.5, csv=tmp_path / 'timeline.csv')
    (row,) = call(json=True, **options).rows
    with open(tmp_path / 'timeline.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 37 and float(rows[-1]['end']) == 20
    for window in rows:
        scores = {name: float(window[name]) for name in COLOURS}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-3) and window['class'] == max(scores, key=scores.get)
    parts = row['timeline']
    assert parts[0]['start'] == 0 and parts[-1]['end'] == 20
    assert all(a['end'] == b['start'] and a['name'] != b['name'] for a, b in zip(parts, parts[1:]))
    if name == 'mean_pool':  # random aggregators know no colours
        assert [part['name'] for part in parts if part['end'] - part['start'] > 2.01] == ['red', 'blue']
        assert max(part['end'] for part in parts if part['name'] == 'red') == pytest.approx(10, abs=1)
        assert min(part['start'] for part in parts if part['name'] == 'blue') == pytest.approx(10, abs=1)
        text = call(**options).out.splitlines()
        assert text[-len(parts)].split()[-1] == 'red' and len(text) == len(parts) + 2


def test_windows_of_what_cannot_be_read(world, call, tmp_path):
    (tmp_path / 'empty.mp4').touch()
    paths = [str(tmp_path / 'empty.mp4'), str(world / 'queries' / 'red.mp4')]
    result = call(query=paths, json=True, window=0.5)
    assert result.status == '1 of 2 queries could not be read.' and 'empty.mp4' in result.rows[0]['error']
    assert result.rows[1]['timeline'][0]['name'] == 'red'


def test_windows_from_their_own_process_and_its_death(tmp_path):
    path = write_video(tmp_path / 'long.mp4', shades('red', 300, 5))
    config = dict(CONFIG, window=2.0, stride=0.5)
    here, apart = list(timeline.windows(str(path), config, 32)), list(timeline.windows_apart(str(path), config, 32))
    assert len(here) == 57
    for (start, end, clip), (other_start, other_end, other) in zip(here, apart, strict=True):
        assert (start, end) == (other_start, other_end) and torch.equal(clip, other)
    slide = timeline.windows_apart(str(path), config, 32)
    next(slide)
    multiprocessing.active_children()[-1].kill()
    with pytest.raises(UnreadableVideo, match='crashed'):
        list(slide)


@pytest.mark.parametrize('name', ['mean_pool', 'joint'])
def test_half_precision_is_computed_in(world, call, monkeypatch, name):
    """And it is over where the call is: an autocast that is entered twice is never left."""
    inside = []
    monkeypatch.setattr(predict, 'look', lambda *args: inside.append(
        torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu')) or look(*args))
    half, full = (call(query=world / 'queries', json=True, top=3, dtype=dtype, **options_for(world, name))
                  for dtype in ('bfloat16', 'float32'))
    assert inside[:len(inside) // 2] == [torch.bfloat16] * (len(inside) // 2) and not any(inside[len(inside) // 2:]) and inside
    assert half.status is None and half.rows != full.rows and not torch.is_autocast_enabled('cpu')
    assert all(sum(item['score'] for item in row['classes']) == pytest.approx(1, abs=1e-5) for row in half.rows)


@pytest.mark.parametrize('name', ['mean_pool', 'joint'])
@torch.no_grad()
def test_half_precision_ends_where_it_should(world, monkeypatch, name):
    """Autocast as on CUDA: from features on, scores are computed in float32."""
    config, clip, method = loaded(world, name, dtype='bfloat16')
    frames, labels, found = clips(9), torch.tensor([0, 0, 0, 1, 2]), []
    examples = dict(classes=['a', 'b', 'c'], labels=labels, kept=predict.encode(config, clip, method, frames[:5]))
    if name == 'mean_pool':
        (query,) = predict.encode(config, clip, method, frames[5:])
        expected = mean_pool_by_hand(examples['kept'][0], query, labels)
    else:
        features = method.features
        monkeypatch.setattr(method, 'features', lambda *args: found.append(features(*args)) or found[-1])
    scores = predict.label(config, method, examples, predict.encode(config, clip, method, frames[5:]))
    if found:
        expected = vba_by_hand(found[0][0, :5], found[0][0, 5:], labels, 20.0)
        assert found[0].dtype == torch.float32
    assert scores.dtype == torch.float32 and np.allclose(scores, expected, atol=1e-4)


def test_clips_outside_of_class_folders_are_named(call, world, tmp_path):
    shutil.copytree(world / 'examples', tmp_path / 'examples')
    shutil.copy(world / 'queries' / 'red.mp4', tmp_path / 'examples' / 'loose.mp4')
    result = call(support=tmp_path / 'examples', query=world / 'queries')
    assert result.status is None and '1 clips outside of class folders, such as loose.mp4' in result.err


def test_merge():
    rows = [(0, 2, 'a', 0.5), (1, 3, 'a', 0.7), (2, 4, 'b', 0.9), (3, 5, 'a', 0.8), (7, 9, 'b', 0.6)]
    assert list(timeline.merge(rows)) == [(0, 2.5, 'a', 0.6), (2.5, 3.5, 'b', 0.9), (3.5, 5, 'a', 0.8), (7, 9, 'b', 0.6)]
    apart = [(0, 2, 'a', 0.5), (2, 4, 'a', 0.7), (5, 7, 'a', 0.9), (8, 10, 'b', 0.8)]  # a stride above the window
    assert list(timeline.merge(apart)) == [(0, 4, 'a', 0.6), (5, 7, 'a', 0.9), (8, 10, 'b', 0.8)]
    assert list(timeline.merge([])) == []


class Page(HTMLParser):
    """The elements of an HTML page, [(tag, attributes), ...], and its words."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, words):
        self.words.append(words)

    def of(self, name):
        return [attrs for tag, attrs in self.elements if tag == name]


@pytest.mark.parametrize('name', ['mean_pool', 'joint'])
def test_report_of_clips(world, call, tmp_path, monkeypatch, name):
    """Each query beside the example that is nearest: a copy of one is nearest to this one. Each is encoded once."""
    encoded = []
    monkeypatch.setattr(predict, 'encode', lambda *args, encode=predict.encode: encoded.append(len(args[-1])) or encode(*args))
    (tmp_path / 'none.mp4').touch()
    shutil.copytree(world / 'examples', tmp_path / 'a <b> & c')
    copies = [tmp_path / f'copy_{label}.mp4' for label in ('blue', 'red')]
    for copied, label in zip(copies, ('blue', 'red')):
        shutil.copy(world / 'examples' / label / '1.mp4', copied)
    options = options_for(world, name) | dict(json=True, report=tmp_path / 'out' / 'report.html')
    options['support'] = tmp_path / 'a <b> & c'
    result = call(query=[str(path) for path in (*copies, tmp_path / 'none.mp4')], top=3, **options)
    assert encoded[-1] == 2
    page = Page(tmp_path / 'out' / 'report.html')
    assert [f'/{label}/1.mp4' in ''.join(page.words) for label in ('blue', 'green', 'red')] == [True, False, True]
    widths = [float(bar['style'].split(':')[1].rstrip('%')) / 100 for bar in page.of('i')]
    assert widths == pytest.approx([item['score'] for row in result.rows[:2] for item in row['classes']], abs=6e-4)
    pictures = [base64.b64decode(image['src'].removeprefix('data:image/jpeg;base64,')) for image in page.of('img')]
    assert len(pictures) == 4 and all(av.open(io.BytesIO(image)).streams.video[0].width == 4 * 32 for image in pictures)
    assert 'none.mp4' in ''.join(page.words) and len(page.of('section')) == 3 and not page.of('b')
    assert not [attrs for _, attrs in page.elements if 'http' in str(attrs.get('src'))]
    call(query=copies[0], save_support=tmp_path / 'kept.pt', **options)
    assert call(**(options | dict(support=tmp_path / 'kept.pt', query=copies[0]))).status is None
    assert '/blue/1.mp4' in ''.join(Page(tmp_path / 'out' / 'report.html').words)


def test_report_of_a_long_video(world, call, tmp_path):
    path = write_video(tmp_path / 'a 100% long.mp4', [*shades('red', 60, 5), *shades('blue', 60, 6)])
    (row,) = call(query=path, window=2.0, stride=2.0, json=True, report=tmp_path / 'out' / 'report.html').rows
    page = Page(tmp_path / 'out' / 'report.html')
    (video,) = page.of('video')
    assert (tmp_path / 'out' / unquote(video['src'])).resolve() == path
    stretches = [attrs for attrs in page.of('b') if 'data-start' in attrs]
    assert [float(each['data-start']) for each in stretches] == [part['start'] for part in row['timeline']] == [0, 6]
    assert 'left:50.000%;width:50.000%' in stretches[1]['style'] and 'blue' in stretches[1]['title']
    assert 'Cannot write' in call(query=path, window=2.0, report=world / 'clip.pt' / 'report.html').status


@pytest.mark.parametrize('smooth, least, expected', [
    (1, 0.0, 'a0-4 b4-5 a5-9 c9-10 b10-14'), (1, 2.0, 'a0-10 b10-14'), (3, 0.0, 'a0-9 b9-14'), (1, 99.0, 'a0-14')])
def test_smooth_timelines_and_short_stretches(smooth, least, expected):
    rows = [(i, i + 1, [0.0 + (name == each) for each in 'abc']) for i, name in enumerate('aaaabaaaacbbbb')]
    rows[9][2][1] = 0.9  # c is nearly b
    found = timeline.stretches(iter(rows), 'abc', dict(smooth=smooth, least=least, stride=1.0))
    assert ' '.join(f'{name}{start:g}-{end:g}' for start, end, name, _ in found) == expected
    assert not list(timeline.stretches([], 'abc', dict(smooth=smooth, least=least, stride=1.0)))


def test_needs(call, world):
    assert 'needs --support' in call().status
    assert 'Cannot write' in call(query=world / 'queries', csv=world / 'none' / 'x.csv').status
    assert 'Cannot write' in call(save_support=world / 'clip.pt' / 'x.pt').status  # no folder
    assert 'window=-1' in call(query=world, window=-1.0).status
    assert 'stride=0' in call(query=world, window=1.0, stride=0).status
