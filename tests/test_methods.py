"""Methods behind the seam: those of methods/, and the one that the README shows whole."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_train_eval import run, same, world  # noqa: F401

import checkpoint
import eval as evaluation
import predict
import testing
import train
from clip_loader import CLIP
from config import DEFAULTS, ROOT, find_method, methods, name_of
from model import Episode, Step, look

README = Path(__file__).resolve().parent.parent / 'README.md'


def built(name, embed_dim=16, **options):
    torch.manual_seed(0)
    clip = CLIP(32, 16, 64, 2, embed_dim, vocab_size=514, context_length=24, text_width=64, text_layers=1).requires_grad_(False)
    method, _ = find_method(name)
    return clip, method(clip, ['a', 'b'], DEFAULTS | getattr(method, 'options', {}) | options)


def episode(videos, names=('a', 'b', 'c'), classes=(2, 0)):
    """A 2-way episode: three supports, two of the second way, then queries."""
    return Episode(torch.tensor([0, 1, 1]), torch.tensor([classes]), list(names), False, index=torch.arange(videos)[None])


def test_mean_pool_by_hand():
    _, method = built('mean_pool')
    frames = F.normalize(torch.randn(5, 4, 16), dim=-1)
    pooled = F.normalize(frames.mean(1), dim=-1)
    expected = torch.stack([pooled[0], F.normalize(pooled[1] + pooled[2], dim=0)])
    scores = method.scores(method.video(3 * frames), episode(5))  # lengths say nothing
    torch.testing.assert_close(scores[0] / 100, pooled[3:] @ expected.T)


def test_concat_by_hand():
    """The mean over frames of the cosine of frame t to frame t; a reversed query is another one."""
    _, method = built('concat')
    frames = F.normalize(torch.randn(5, 4, 16), dim=-1)
    support = torch.stack([frames[0], (frames[1] + frames[2]) / 2])  # (2, 4, 16)
    lengths = support.flatten(1).norm(dim=1)
    expected = torch.einsum('mtd,ntd->mn', frames[3:], support) / 2 / lengths  # a query is of length 2
    scores = method.scores(method.video(7 * frames), episode(5))
    torch.testing.assert_close(scores[0] / 100, expected)
    reversed_queries = torch.cat([frames[:3], frames[3:].flip(1)])
    assert not torch.allclose(method.scores(method.video(reversed_queries), episode(5)), scores, atol=1)


@torch.no_grad()
def test_changes_by_hand():
    """What is the same in all frames of a clip says nothing; the rest is compared frame by frame, or as the matrix says."""
    _, method = built('changes', frames=4)
    frames = F.normalize(torch.randn(5, 4, 16), dim=-1)
    moved = torch.stack([clip - clip.mean(0) for clip in frames])
    support = torch.stack([moved[0], (moved[1] + moved[2]) / 2]).flatten(1)
    expected = 20 * F.cosine_similarity(moved[3:].flatten(1)[:, None], support[None], dim=-1)
    torch.testing.assert_close(method.scores(method.video(7 * frames), episode(5))[0], expected)
    _, layered = built('changes', frames=4, layer=16)  # as it starts, it changes nothing
    torch.testing.assert_close(layered.scores(layered.video(frames), episode(5))[0], expected)
    layered.matrix.copy_(torch.eye(4).flip(0))  # the first frame of a query meets the last one of a class
    turned = torch.cat([frames[:3], frames[3:].flip(1)])
    torch.testing.assert_close(layered.scores(layered.video(turned), episode(5))[0], expected)


def test_rows_that_train_nothing_are_so_beside_any_method():
    """Whatever an option of the same name means to the method that is tested."""
    clip, _ = built('matrix')
    clip.weights_hash = ''
    rows = testing.untrained(DEFAULTS | dict(method='matrix', layer=8), clip, ['a', 'b', 'c'])
    assert [name_of(row.config['method']) for row in rows] == ['mean_pool', 'concat', 'changes', 'zero_shot']


def test_matrix_by_hand():
    """64 numbers for 8 frames; a sum over pairs of frames, written as loops."""
    _, method = built('matrix', frames=4)
    assert [p.shape for p in method.parameters()] == [(4, 4)] and built('matrix')[1].matrix.numel() == 64
    with torch.no_grad():
        method.matrix.copy_(torch.randn(4, 4))
        frames = torch.randn(5, 4, 16)
        scores = method.scores(method.video(frames), episode(5))
        unit = F.normalize(frames, dim=-1)
        moved = F.normalize(unit - unit[:3].mean((0, 1)), dim=-1)
        classes = [moved[0], F.normalize(moved[1] + moved[2], dim=-1)]
        for m, query in enumerate(moved[3:]):
            for n, prototype in enumerate(classes):
                pairs = [method.matrix[a, b] * (query[a] @ prototype[b]) for a in range(4) for b in range(4)]
                torch.testing.assert_close(scores[0, m, n], sum(pairs), rtol=1e-4, atol=1e-5)


def test_matrix_on_a_layer():
    """8.6 k numbers on 128 features; frames that the layer makes alike are alike."""
    _, method = built('matrix', embed_dim=128, layer=64)
    assert sum(p.numel() for p in method.parameters()) == 2 * 128 + 128 * 64 + 64 + 8 * 8
    with torch.no_grad():
        method.layer[1].weight[:, 64:] = 0
        frames = torch.randn(2, 8, 128)
        frames -= frames.mean(-1, keepdim=True)
        other = frames.clone()
        other[..., 64:] = frames[..., 64:].flip(-1)  # the same mean and deviation
        torch.testing.assert_close(method.video(frames)[0], method.video(other)[0])


def test_zero_shot_by_hand():
    """The texts of the episode's own classes, in the order of its ways; supports play no part."""
    clip, method = built('zero_shot', templates=['a {}'])
    frames = torch.randn(5, 4, 16)
    texts = clip.texts(['a', 'b', 'c'], ['a {}'])
    query = F.normalize(F.normalize(frames[3:], dim=-1).mean(1), dim=-1)
    scores = method.scores(method.video(frames), episode(5))
    torch.testing.assert_close(scores[0] / 100, query @ texts[[2, 0]].T)


def test_vba_frames_by_hand():
    """A vector a frame, of that frame's tokens and those beside it alone; a sum over pairs of frames, written as loops."""
    plain = dict(frames=4, levels=2, layer=0, cls_token=False, gate=False)
    _, method = built('vba_frames', **plain, matching='fixed', temp=3.0)
    assert method.sees == (1, 2) and built('vba_frames', **plain, matching=False)[1].matrix.requires_grad is False
    seen = [torch.randn(5, 4, 5, 64) for _ in range(2)]
    other = [torch.cat([torch.randn(5, 1, 5, 64), x[:, 1:]], 1) for x in seen]  # another frame 0
    with torch.no_grad():
        method.matrix.copy_(torch.randn(4, 4))
        (x,), (y,) = method.video(*seen), method.video(*other)
        torch.testing.assert_close(x[:, 2:], y[:, 2:])
        assert (x[:, 0] - y[:, 0]).norm(dim=-1).min() > 0.01
        scores = method.scores((x,), episode(5))
        unit = F.normalize(x, dim=-1)
        moved = F.normalize(unit - unit[:3].mean(0), dim=-1)
        for m, query in enumerate(moved[3:]):
            alike = torch.stack([sum(method.matrix[a, b] * (query[a] @ support[b]) for a in range(4) for b in range(4))
                                 for support in moved[:3]])
            share = (3 * alike).softmax(0)
            torch.testing.assert_close(scores[0, m].exp(), torch.stack([share[0], (share[1] + share[2]) / 2]), rtol=1e-4,
                                       atol=1e-6)


@torch.no_grad()
def test_vba_frames_gates_and_own_matching_by_hand():
    """Of each level the query is mixed with its frame's class token; pairs of frames count what the query's matrix says."""
    _, method = built('vba_frames', frames=4, levels=2, gate=True)
    _, plain = built('vba_frames', frames=4, levels=2)
    plain.load_state_dict(method.state_dict(), strict=False)
    seen = [torch.randn(5, 4, 5, 64) for _ in range(2)]
    method.gamma.fill_(9.0)  # a gate that lets nothing of the class token in
    torch.testing.assert_close(method.video(*seen), plain.video(*seen))
    method.gamma.copy_(torch.tensor([0.3, -9.0]))  # and at last one that lets in nothing else
    last = method.tokens[1](method.downs[1](seen[1])[:, :, 0])
    (x,) = method.video(*seen)
    torch.testing.assert_close(x, last)
    method.gamma[1] = 9.0
    (q,) = method.video(*seen)
    method.gamma[1] = 0.1  # sigmoid(1) = 0.7311 of the query
    torch.testing.assert_close(method.video(*seen)[0], 0.7311 * q + 0.2689 * last, rtol=1e-3, atol=1e-3)
    scores = method.scores((x,), episode(5))
    for m in (3, 4):
        matrix = (method.matching.weight @ (x[m].mean(0) + x[:3].mean((0, 1)))).view(4, 4)
        alike = [F.cosine_similarity(x[m][:, None], way[None], dim=-1) for way in (x[0], (x[1] + x[2]) / 2)]
        torch.testing.assert_close(scores[0, m - 3], torch.stack([(matrix * a).sum() for a in alike]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('cls_token', [False, True])
def test_vba_frames_sees_the_class_token_when_asked(cls_token):
    _, method = built('vba_frames', frames=4, levels=2, cls_token=cls_token)
    x = torch.randn(2, 4, 5, 64, requires_grad=True)
    method.video(x, x)[0].square().sum().backward()
    assert (x.grad[:, :, 0].abs().sum() > 0) == cls_token and x.grad[:, :, 1:].abs().sum() > 0


@pytest.mark.parametrize('name', methods())
def test_kept_features_know_all_files_that_made_them(name):
    """Whatever of methods/ a method imports, in whatever words, is among its sources."""
    path = find_method(name)[1]
    imported = {module for node in ast.walk(ast.parse(Path(path).read_text())) for module in (
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else
        [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)] if isinstance(node, ast.ImportFrom) else [])}
    borrowed = {os.path.join(ROOT, *module.split('.')) + '.py' for module in imported if module.startswith('methods')}
    assert {file for file in borrowed if os.path.exists(file)} <= set(checkpoint.sources(path))


@pytest.mark.parametrize('name', ['mean_pool', 'zero_shot', 'concat', 'changes', 'matrix', 'vba', 'vba_frames'])
def test_nothing_outside_an_episode_has_a_say(name):
    """A query's scores move neither with the other queries nor with a video that no episode holds."""
    _, method = built(name, frames=4, levels=1, cross_video='inductive', temporal_adapter=False)
    shape = (6, 4, 16) if method.sees == ('image',) else (6, 4, 5, 64)
    seen = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    other = seen.clone()
    other[4:] = torch.randn(shape, generator=torch.Generator().manual_seed(1))[4:]
    with torch.no_grad():
        first, second = (method.eval().scores(method.video(x), episode(5))[0, 0] for x in (seen, other))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize('name', ['matrix', 'vba', 'vba_frames', 'readme'])
def test_methods_compile_in_one_graph(name, tmp_path):
    """As on a GPU; torch.compile looks a method's file up by the name of its module."""
    torch._dynamo.reset()
    path = tmp_path / 'train.py'  # named as one of ours
    path.write_text(readmes_method())
    clip, method = built(str(path) if name == 'readme' else name, frames=4, levels=1, dropout=0.0)
    seen = look(clip.visual, torch.randint(256, (10, 4, 3, 32, 32), dtype=torch.uint8), method.sees)
    ways = Episode(torch.tensor([0, 1, 1]), torch.tensor([[1, 0]] * 2), ['a', 'b'], answers=torch.tensor([[0, 1]] * 2))
    loss, scores = torch.compile(Step(method), fullgraph=True, backend='eager')(seen, ways)
    expected, _ = Step(method)(seen, ways)
    torch.testing.assert_close(loss, expected)
    assert scores.shape == (2, 2, 2)


INIT = 'def __init__(self, clip, names, config):\n        super().__init__()'


@pytest.mark.parametrize('sees, more, said', [
    ('images', '', "sees=('images',) may hold"), (3, '', 'numbers of blocks, 0 to 2'),
    ('image', '\n        self.tower = clip.visual.requires_grad_()', 'it must train a copy')])
def test_methods_that_cannot_be(tmp_path, sees, more, said):
    text = f'from torch import nn\n\n\nclass Method(nn.Module):\n    sees = ({sees!r},)\n\n    {INIT}{more}\n'
    (tmp_path / 'bad.py').write_text(text)
    clip = CLIP(32, 16, 64, 2, 16).requires_grad_(False)
    with pytest.raises(SystemExit) as stopped:
        checkpoint.build(DEFAULTS | dict(method=str(tmp_path / 'bad.py')), clip, [])
    assert said in str(stopped.value)


def readmes_method():
    text, = re.findall(r'```python\n(.*?)```', README.read_text(), re.S)
    return text


def test_the_readmes_method_trains_tests_and_predicts(world, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Exactly its text, in a file outside of this repository."""
    (tmp_path / 'my_idea.py').write_text(readmes_method())
    named, out = f'--method={tmp_path / "my_idea.py"}', tmp_path / 'run'
    run(train, world, named, '--depth=2', f'--out_dir={out}')
    saved = torch.load(out / 'best.pt', weights_only=True)
    assert saved['config']['depth'] == 2 and 'blocks.layers.1.linear1.weight' in saved['model']
    run(train, world, named, '--depth=2', f'--out_dir={tmp_path / "resumed"}', '--max_iters=3')
    run(train, world, named, '--depth=2', f'--out_dir={tmp_path / "resumed"}', '--resume=True')
    assert same(tmp_path / 'resumed' / 'last.pt', out / 'last.pt')  # its dropout too
    run(evaluation, world, named, f'--ckpt={out / "best.pt"}', f'--out_dir={tmp_path / "again"}', '--probe=True')
    rows, again = (json.loads((folder / 'results.json').read_text()) for folder in (out, tmp_path / 'again'))
    accuracy = {(row['method'], row['shot']): row['accuracy'] for row in again}
    assert {row['method'] for row in rows} == {'mean_pool', 'concat', 'changes', 'zero_shot', 'my_idea'}
    assert all(row['accuracy'] == accuracy[row['method'], row['shot']] for row in rows)
    assert ('my_idea, queries reversed', 1) in accuracy and not any(row['transductive'] for row in rows)

    for name in ('grow', 'shrink'):
        shutil.copytree(world / 'clips' / name, tmp_path / 'examples' / name)
    monkeypatch.setattr('sys.argv', ['predict.py', named, f'--ckpt={out / "best.pt"}', f'--support={tmp_path / "examples"}',
                                     f'--query={world / "clips" / "grow" / "0000.mp4"}', '--workers=0', '--device=cpu'])
    predict.main()
    printed = capsys.readouterr().out
    assert 'my_idea, 2 classes, 6 examples each' in printed and re.search(r'0000.mp4: (grow|shrink) [01]\.\d+', printed)
