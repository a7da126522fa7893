"""The methods that VBA is compared with: golden values, numbers of parameters, slow references, and what must not matter."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import train
from clip_loader import CLIP
from config import find_method, load_config
from methods.otam import align, one_way
from model import Episode, Step, look

ROOT = Path(__file__).resolve().parent.parent
NAMES = ['proto', 'matching', 'otam', 'trx', 'hyrsm', 'clip_fsar']
T, DIM = 4, 16
CLASSES = ['a', 'b', 'c', 'd']  # of the training split


def small(name):
    return dict(width=8) if name == 'trx' else {}


def built(name, **options):
    """A tiny CLIP and a method beside it, with weights as after some training."""
    torch.manual_seed(0)
    clip = CLIP(32, 16, 64, 2, DIM, vocab_size=514, context_length=24, text_width=64, text_layers=1).requires_grad_(False)
    config = load_config([f'--method={name}', '--device=cpu', f'--frames={T}'])
    method = checkpoint.build(config | small(name) | options, clip, CLASSES)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return clip, method.eval()


def features(*shape, seed=1):
    return torch.randn(*shape, T, DIM, generator=torch.Generator().manual_seed(seed))


def scores(method, seen, labels=(0, 1, 1), classes=(2, 0), names=CLASSES):
    """Scores (M, N) of one episode of videos (V, T, DIM): supports, then queries."""
    with torch.no_grad():
        ways = Episode(torch.tensor(labels), torch.tensor([classes]), list(names), False, index=torch.arange(len(seen))[None])
        return method.scores(method.video(seen), ways)[0]


def in_training():
    """Two episodes, 2-way 2-shot with one query a class."""
    return Episode(torch.tensor([0, 0, 1, 1]), torch.tensor([[2, 0], [1, 3]]), CLASSES, answers=torch.tensor([[0, 1]] * 2))


# ---- All of them

@pytest.mark.parametrize('name', NAMES)
def test_a_step_trains_all_that_trains_and_the_test_answers_from_half_precision(name):
    clip, method = built(name)
    frozen = {key: value.clone() for key, value in clip.state_dict().items()}
    optimizer = train.optimizer_of(dict(method=name, lr=1e-2, weight_decay=0.02), method)
    frames = torch.randint(256, (12, T, 3, 32, 32), dtype=torch.uint8)
    seen = look(clip.visual, frames, method.sees)
    loss, answer = Step(method.train())(seen, in_training())
    assert answer.shape == (2, 2, 2) and loss.isfinite()
    loss.backward()
    trained = {key: p for key, p in method.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    before = {key: p.clone() for key, p in trained.items()}
    optimizer.step()
    assert not any(torch.equal(before[key], p) for key, p in trained.items())
    assert all(torch.equal(frozen[key], value) for key, value in clip.state_dict().items())

    index = torch.tensor([[0, 4, 1, 2], [5, 6, 7, 8], [9, 3, 2, 11]])
    with torch.no_grad():
        kept = method.eval().video(*seen)
        half = [x.half() if x.ndim > 2 else x for x in kept]
        ways = Episode(torch.tensor([0, 1]), torch.tensor([[0, 1], [3, 2], [1, 0]]), CLASSES, False, index=index)
        torch.testing.assert_close(method.scores(half, ways), method.scores(kept, ways), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('name', NAMES)
def test_queries_do_not_see_each_other_and_order_does_not_matter(name):
    _, method = built(name)
    seen = features(7)
    first = scores(method, seen)
    torch.testing.assert_close(scores(method, seen[[0, 1, 2, 6, 4, 3, 5]]), first[[3, 1, 0, 2]])  # queries in another order
    other = torch.cat([seen[:4], features(3, seed=2)])
    torch.testing.assert_close(scores(method, other)[0], first[0])
    assert not torch.allclose(scores(method, other)[1:], first[1:], atol=1e-3)
    torch.testing.assert_close(scores(method, seen[[1, 0, 2, 3, 4, 5, 6]], (1, 0, 1)), first)  # supports in another order
    torch.testing.assert_close(scores(method, seen, (1, 0, 0), (0, 2)), first.flip(1))  # ways in another order
    assert not torch.allclose(first[:, 0], first[:, 1], atol=1e-3)


@pytest.mark.parametrize('name', NAMES)
def test_ways_may_have_unequal_shots(name):
    """A support given twice says what it says once, but to matching, which counts supports."""
    _, method = built(name)
    seen = features(5)
    once, twice = scores(method, seen[[0, 1, 3, 4]], (0, 1)), scores(method, seen[[0, 1, 1, 3, 4]])
    if name == 'matching':
        torch.testing.assert_close(twice.diff() - once.diff(), torch.full((2, 1), math.log(2)))
    else:
        torch.testing.assert_close(twice, once)
    assert not torch.allclose(scores(method, seen), once, atol=1e-3)


@pytest.mark.parametrize('name, ordered', list(zip(NAMES, [False, False, True, True, True, True])))
def test_which_methods_know_the_order_of_frames(name, ordered):
    _, method = built(name)
    seen = features(5)
    turned = torch.cat([seen[:3], seen[3:].flip(1)])
    assert torch.allclose(scores(method, turned), scores(method, seen), atol=1e-3) != ordered


@pytest.mark.parametrize('name', NAMES)
def test_help_has_a_comment_for_each_option(name, capsys):
    with pytest.raises(SystemExit):
        load_config([f'--method={name}', '--help'], script=train)
    own = capsys.readouterr().out.partition(f'of the method {name}:\n')[2].partition('\n\n')[0].splitlines()
    assert len(own) == len(find_method(name)[0].options) and all(line[33:].strip() for line in own)


def test_a_method_that_borrows_from_another_is_found_from_any_folder(tmp_path):
    found = subprocess.run([sys.executable, str(ROOT / 'train.py'), '--method=clip_fsar', '--help'], cwd=tmp_path, text=True,
                           capture_output=True, env={**os.environ, 'PYTHONPATH': ''})
    assert found.returncode == 0 and '--beta=0.9' in found.stdout, found.stderr


@pytest.mark.parametrize('name', ['otam', 'hyrsm', 'clip_fsar'])  # trx picks a class's supports by mask: one graph a way
def test_they_compile_in_one_graph(name):
    torch._dynamo.reset()
    clip, method = built(name)
    seen = [features(12)]
    loss, _ = torch.compile(Step(method), fullgraph=True, backend='eager')(seen, in_training())
    torch.testing.assert_close(loss, Step(method)(seen, in_training())[0])


@pytest.mark.parametrize('name, dim, count', [
    ('trx', 2048, 23_602_176), ('hyrsm', 512, 2_657_856), ('hyrsm', 768, 5_952_832), ('hyrsm', 2048, 42_088_512),
    ('clip_fsar', 512, 3_149_825), ('clip_fsar', 1024, 8_394_753), ('otam', 512, 263_680), ('proto', 512, 263_680)])
def test_parameter_counts(name, dim, count):
    """As published: TRX 23.6 M, HyRSM 2.66, 5.95 and 42.1 M with 64 classes, CLIP-FSAR 3.15 and 8.39 M."""
    clip = SimpleNamespace(visual=SimpleNamespace(proj=torch.empty(1, dim)), texts=lambda names, templates: None)
    config = load_config([f'--method={name}'])
    with torch.device('meta'):
        method = find_method(name)[0](clip, ['a name'] * 64, config)
    assert sum(p.numel() for p in method.parameters()) == count


@pytest.mark.parametrize('name, rates', [('trx', [0.1]), ('hyrsm', [0.05, 0.1, 0.1, 0.2]), ('clip_fsar', [0.05, 0.05, 0.2])])
def test_each_dropout_acts_in_training(name, rates):
    found = []
    for i in range(len(rates)):
        _, method = built(name)
        parts = [(m, 'p') for m in method.modules() if isinstance(m, torch.nn.Dropout)]
        parts += [(method.inter, 'dropout')] if name == 'hyrsm' else []  # on the attention
        found.append(getattr(*parts[i]))
        for j, (module, rate) in enumerate(parts):
            if j != i:
                setattr(module, rate, 0.0)
        assert not torch.equal(scores(method.train(), features(5)), scores(method, features(5)))
        assert torch.equal(scores(method.eval(), features(5)), scores(method, features(5)))
    assert sorted(found) == rates


@pytest.mark.parametrize('name', ['otam', 'trx', 'hyrsm', 'clip_fsar'])
def test_a_tuned_tower(name, tmp_path):
    """It begins as CLIP's, trains at its own rate, leaves CLIP as it was, and lies in the checkpoint."""
    frames = torch.randint(256, (12, T, 3, 32, 32), dtype=torch.uint8)
    clip, frozen = built(name)
    frozen_scores = scores(frozen, *look(clip.visual, frames, frozen.sees))
    clip, method = built(name, finetune=1e-3)
    assert method.sees == ('pixels',)
    config = load_config([f'--method={name}', f'--frames={T}', '--device=cpu']) | small(name) | dict(finetune=1e-3)
    fresh = checkpoint.build(config, clip, CLASSES)
    own = {key: x for key, x in frozen.state_dict().items() if not key.startswith('clip.')}
    fresh.load_state_dict(own, strict=False)
    torch.testing.assert_close(scores(fresh.eval(), frames), frozen_scores, rtol=1e-3, atol=1e-4)

    optimizer = train.optimizer_of(dict(method=name, lr=1e-2, weight_decay=0.0), method)
    before, theirs = clip.visual.proj.clone(), method.frames.tower.proj.clone()
    loss, _ = Step(method.train())([frames], in_training())
    loss.backward()
    assert all(p.grad is not None for p in method.frames.parameters())
    optimizer.step()
    assert torch.equal(clip.visual.proj, before)
    moved = (method.frames.tower.proj - theirs).abs()
    assert 0.5e-3 < moved.max() < 2e-3  # AdamW's first step is as long as the rate
    trained = [p for p in method.parameters() if p.requires_grad]
    assert sorted(id(p) for group in optimizer.param_groups for p in group['params']) == sorted(map(id, trained))

    clip.weights_hash, path = 'x', str(tmp_path / 'best.pt')
    checkpoint.save(path, method, clip, config)
    again = checkpoint.rebuild(config, clip, checkpoint.load(path), path)
    torch.testing.assert_close(scores(again, frames), scores(method.eval(), frames))


# ---- proto and matching

def test_proto_by_hand():
    """Fresh, its layer is a LayerNorm."""
    _, method = built('proto')
    torch.nn.init.eye_(method.layer[1].weight)
    torch.nn.init.zeros_(method.layer[1].bias)
    method.layer[0].reset_parameters()
    seen = features(5)
    pooled = F.normalize(F.layer_norm(seen, (DIM,)).mean(1), dim=-1)
    expected = torch.stack([pooled[0], F.normalize(pooled[1] + pooled[2], dim=0)])
    torch.testing.assert_close(scores(method, seen) / 20, pooled[3:] @ expected.T)


def test_fresh_layers_change_no_direction():
    for name in ('proto', 'matching', 'otam'):
        clip, _ = built(name)
        method = checkpoint.build(load_config([f'--method={name}']), clip, [])
        assert torch.equal(method.layer[1].weight, torch.eye(DIM)) and not method.layer[1].bias.any()


def test_matching_by_hand():
    """(3.6), (3.7) and a sum for each class."""
    _, method = built('matching', temp=3.0)
    seen = features(6)
    vectors = method.video(seen)[0]
    share = (3 * F.cosine_similarity(vectors[4:, None], vectors[None, :4], dim=-1)).softmax(1)  # (M, S)
    expected = torch.stack([share[:, 0] + share[:, 2], share[:, 1] + share[:, 3]], 1)
    found = scores(method, seen, (0, 1, 0, 1))
    torch.testing.assert_close(found.softmax(1), expected)


# ---- OTAM

ONES = torch.ones(8, 8)
PLACE = torch.arange(8.0)
DISTANCES = dict(zero=0 * ONES, one=ONES, same=1 - torch.eye(8), turned=1 - torch.eye(8).flip(1),
                 shifted=1 - torch.diag(ONES[0, 1:], 1), apart=(PLACE[:, None] - PLACE).abs() / 8,
                 rising=torch.arange(64.0).view(8, 8) / 64)


@pytest.mark.parametrize('name, hard, both_hard, soft, both_soft', [  # lam 0.1 and 0.5, one direction and both
    ('zero', -0.843555, -1.687110, -4.217775, -8.435549), ('one', 7.250832, 14.501664, 4.203567, 8.407134),
    ('same', -0.000023, -0.000045, -0.373293, -0.746586), ('turned', 6.286745, 12.573490, 3.353996, 6.707992),
    ('shifted', 0.930667, 1.861327, 0.327414, 0.572540), ('apart', -0.146516, -0.293032, -2.804614, -5.609228),
    ('rising', 0.331830, 3.369022, -1.292401, -1.502808)])
def test_otam_golden_values(name, hard, both_hard, soft, both_soft):
    d = DISTANCES[name]
    found = [x for lam in (0.1, 0.5) for x in (one_way(d, lam), one_way(d, lam) + one_way(d.T, lam))]
    assert torch.stack(found).tolist() == pytest.approx([hard, both_hard, soft, both_soft], abs=1e-5)


def test_long_alignments_are_finite_and_so_are_their_gradients():
    for frames, expected in ((16, 11.4201), (32, 23.0385)):
        d = torch.full((frames, frames), 0.8, requires_grad=True)
        cost = one_way(d, 0.1)
        cost.backward()
        assert cost.item() == pytest.approx(expected, abs=1e-4) and d.grad.isfinite().all()


def cost_by_loops(d, lam):
    """The recursion as written, cell by cell, in Python's floats."""
    def softmin(*costs):
        return -lam * math.log(sum(math.exp(-cost / lam) for cost in costs))

    rows, columns = d.shape
    padded = [[0.0, *row, 0.0] for row in d.tolist()]
    table = [[0.0] * (columns + 2) for _ in range(rows)]
    for m in range(1, columns + 2):
        table[0][m] = padded[0][m] + table[0][m - 1]
    for n in range(1, rows):
        for m in range(1, columns + 2):
            ways = [table[n - 1][m - 1], table[n][m - 1]] + ([table[n - 1][m]] if m in (1, columns + 1) else [])
            table[n][m] = padded[n][m] + softmin(*ways)
    return table[-1][-1]


def test_align_by_loops():
    """Each support with each query; rows are the query's frames in one direction, the support's in the other."""
    support, query = features(2, 3), features(2, 4, seed=2)
    found = align(support, query, 0.3)
    for e in range(2):
        for s in range(3):
            for m in range(4):
                d = 1 - F.cosine_similarity(query[e, m][:, None], support[e, s][None], dim=-1)
                assert found[e, s, m].item() == pytest.approx(cost_by_loops(d, 0.3) + cost_by_loops(d.T, 0.3), abs=1e-4)
    long = torch.rand(3, 5)
    assert one_way(long, 0.3).item() == pytest.approx(cost_by_loops(long, 0.3), abs=1e-5)


def test_otam_is_the_mean_over_supports_and_keeps_float32_under_autocast():
    _, method = built('otam')
    seen = features(5)
    kept, = method.video(seen)
    cost = align(kept[None, :3], kept[None, 3:], 0.1)[0]  # (S, M)
    expected = -torch.stack([cost[0], (cost[1] + cost[2]) / 2], 1)
    found = scores(method, seen)
    torch.testing.assert_close(found, expected)
    ways = Episode(torch.tensor([0, 1, 1]), torch.tensor([[2, 0]]), CLASSES, False, index=torch.arange(5)[None])
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(method.scores((kept,), ways)[0], found)


# ---- TRX

def test_trx_by_loops():
    _, method = built('trx')
    seen, labels = features(5), [0, 1, 1]
    kept = method.video(seen)
    assert [x.shape for x in kept] == [(5, 6, 8), (5, 6, 8), (5, 4, 8), (5, 4, 8)]  # pairs and triples of four frames
    x, triples = seen[0] + method.place, method.tuples[1]
    third = torch.cat([x[0], x[2], x[3]])  # of 012, 013, 023, 123
    torch.testing.assert_close(kept[2][0, 2], triples.ln_key(triples.key(third)))
    torch.testing.assert_close(kept[3][0, 2], triples.value(third))
    expected = torch.zeros(2, 2)
    for keys, values in (kept[:2], kept[2:]):
        for m in range(2):
            for way in range(2):
                own = [i for i in range(3) if labels[i] == way]
                k, v = torch.cat([keys[i] for i in own]), torch.cat([values[i] for i in own])
                for key, value in zip(keys[3 + m], values[3 + m]):
                    weights = (k @ key / 8 ** 0.5).softmax(0)
                    expected[m, way] -= (value - weights @ v).square().sum() / len(keys[0]) / 2
    torch.testing.assert_close(scores(method, seen), expected)


def test_trx_places():
    _, method = built('trx')
    expected = [[0.1 * f(t / 10000 ** (i / DIM)) for i in range(0, DIM, 2) for f in (math.sin, math.cos)] for t in range(T)]
    torch.testing.assert_close(method.place, torch.tensor(expected))
    with pytest.raises(SystemExit, match='triples'):
        built('trx', frames=2)


# ---- HyRSM

def test_bi_mhm_golden_values():
    bi_mhm = sys.modules[find_method('hyrsm')[0].__module__].bi_mhm
    assert [bi_mhm(DISTANCES[name]).item() for name in ('one', 'same', 'shifted', 'rising')] == [16, 0, 2, 3.9375]


def test_hyrsm_places_and_scale():
    """The published code's places; at a fresh attention whose output is 0, frames are only scaled, placed and cut at 0."""
    _, method = built('hyrsm', position_a=4.0, position_b=0.5)
    expected = torch.zeros(T, DIM)
    for t in range(T):
        for i in range(0, DIM, 2):
            expected[t, i] = math.sin(t / 10000 ** (2 * i / DIM))
            expected[t, i + 1] = math.cos(t / 10000 ** (2 * (i + 1) / DIM))
    torch.nn.init.zeros_(method.intra.out.weight)
    torch.nn.init.zeros_(method.intra.out.bias)
    seen = features(2)
    torch.testing.assert_close(method.video(seen)[0], F.relu(2 * seen + expected / 2))


def attend(attention, x):
    """8 heads over tokens (n, D), written as loops."""
    q, k, v = attention.qkv(x).chunk(3, -1)
    size = x.shape[1] // 8
    heads = []
    for first in range(0, x.shape[1], size):
        part = slice(first, first + size)
        heads.append((q[:, part] @ k[:, part].T / size ** 0.5).softmax(-1) @ v[:, part])
    return attention.out(torch.cat(heads, 1))


@pytest.mark.parametrize('merge', ['before', 'after'])
@torch.no_grad()
def test_hyrsm_by_loops(merge):
    _, method = built('hyrsm', merge=merge)
    seen = features(5)
    frames, = method.video(seen)
    x = seen[4] * (DIM / 10) ** 0.5 + method.place
    torch.testing.assert_close(frames[4], F.relu(x + attend(method.intra, method.ln_intra(x))))
    rows = [frames[0], (frames[1] + frames[2]) / 2] if merge == 'before' else list(frames[:3])
    expected = torch.zeros(2, len(rows))
    for m, query in enumerate(frames[3:]):
        tokens = torch.stack([*(row.mean(0) for row in rows), query.mean(0)])
        z = F.relu(method.ln_inter(attend(method.inter, tokens) + tokens))
        fused = [F.normalize(method.fuse(torch.cat([x, token.expand(T, -1)], 1)), dim=1) for x, token in zip([*rows, query], z)]
        for n in range(len(rows)):
            d = 1 - fused[n] @ fused[-1].T
            expected[m, n] = -d.min(0).values.sum() - d.min(1).values.sum()
    if merge == 'after':
        expected = torch.stack([expected[:, 0], expected[:, 1:].mean(1)], 1)
    torch.testing.assert_close(scores(method, seen), expected, rtol=1e-4, atol=1e-5)


def test_hyrsm_merges_alike_with_one_shot():
    seen = features(5)
    before, after = (built('hyrsm', merge=merge)[1] for merge in ('before', 'after'))
    torch.testing.assert_close(scores(before, seen, (0, 1)), scores(after, seen, (0, 1)))
    assert not torch.allclose(scores(before, seen), scores(after, seen), atol=1e-3)


def test_hyrsms_auxiliary_loss():
    """Every frame of every video, told from all four training classes."""
    _, method = built('hyrsm')
    kept, ways = method.video(features(12)), in_training()
    true = [2, 2, 0, 0, 2, 0, 1, 1, 3, 3, 1, 3]  # supports and queries of both episodes
    log_p = method.classify(kept[0]).log_softmax(-1)
    frames = -torch.stack([log_p[v, t, c] for v, c in enumerate(true) for t in range(T)]).mean()
    few_shot = F.cross_entropy(method.scores(kept, ways).flatten(0, 1), torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(method.loss(kept, ways)[0], few_shot + 0.15 * frames)


@pytest.mark.parametrize('name, norms', [('hyrsm', ['ln_inter', 'ln_intra']), ('clip_fsar', ['ln'])])
def test_norms_do_not_decay(name, norms):
    _, method = built(name)
    groups = method.groups(1e-3)
    names = {id(p): key for key, p in method.named_parameters() if p.requires_grad}
    assert sorted(id(p) for group in groups for p in group['params']) == sorted(names)
    still = [names[id(p)] for group in groups if group.get('weight_decay') == 0 for p in group['params']]
    assert sorted(still) == [f'{norm}.{part}' for norm in norms for part in ('bias', 'weight')]


# ---- CLIP-FSAR

@pytest.mark.parametrize('merge', ['before', 'after'])
@torch.no_grad()
def test_clip_fsar_by_loops(merge):
    clip, method = built('clip_fsar', merge=merge)
    seen, texts = features(5), clip.texts(CLASSES, ['a photo of {}'])

    def transformed(x):
        x = x + attend(method.attention, method.ln(x))
        return x + method.mlp(x)

    if merge == 'before':
        ways = [transformed(torch.cat([x, texts[[c]]]))[:T] for x, c in ((seen[0], 2), ((seen[1] + seen[2]) / 2, 0))]
    else:
        first, second, third = (transformed(torch.cat([x, texts[[c]]]))[:T] for x, c in zip(seen[:3], (2, 0, 0)))
        ways = [first, (second + third) / 2]
    expected = -align(torch.stack(ways)[None], torch.stack([transformed(x) for x in seen[3:]])[None], 0.5)[0].T
    torch.testing.assert_close(scores(method, seen), expected, rtol=1e-4, atol=1e-4)
    renamed = scores(method, seen, names=['a', 'b', 'another', 'd'])
    assert not torch.allclose(renamed[:, 0], expected[:, 0], atol=1e-4)
    torch.testing.assert_close(renamed[:, 1], expected[:, 1], rtol=1e-4, atol=1e-4)


def test_clip_fsars_three_answers():
    seen = features(5)
    clip, method = built('clip_fsar', scale=7.0)
    visual = scores(method, seen)
    method.answer = 'text'
    text = scores(method, seen)
    names = clip.texts(CLASSES, ['a photo of {}'])[[2, 0]]
    torch.testing.assert_close(text, method.scale.detach() * F.cosine_similarity(seen[3:].mean(1)[:, None], names, dim=-1))
    method.answer = 'combined'
    p = text.softmax(-1) ** 0.9 * ((T + visual) / T).softmax(-1) ** 0.1  # visual scores are minus distances
    torch.testing.assert_close(scores(method, seen).softmax(-1), p / p.sum(-1, keepdim=True))
    assert built('clip_fsar', answer='text')[1].answer == 'text'


def test_clip_fsars_video_text_loss():
    """Every video, supports too, against the names of all four training classes; the few-shot part is the visual one."""
    clip, method = built('clip_fsar', answer='text', video_text=1.2, scale=5.0)
    seen, ways = features(12), in_training()
    kept = method.video(seen)
    true = torch.tensor([2, 2, 0, 0, 2, 0, 1, 1, 3, 3, 1, 3])
    named = method.scale * F.normalize(seen.mean(1), dim=-1) @ clip.texts(CLASSES, ['a photo of {}']).T
    few_shot = F.cross_entropy(method.visual_scores(kept, ways).flatten(0, 1), torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(method.loss(kept, ways)[0], few_shot + 1.2 * F.cross_entropy(named, true))


# ---- Recipes

@pytest.mark.parametrize('data, hyrsm, clip_fsar', [  # learning rate, episodes on each of 4 GPUs, weight of the second loss
    ('kinetics', (2.2e-5, 1200, 0.4), (1e-5, 5000, 1.5)), ('hmdb51', (5e-5, 2000, 0.15), (1e-5, 5000, 1.2)),
    ('ucf101', (5e-5, 2500, 0.15), (2e-6, 3000, 1.5)), ('ssv2_small', (1e-4, 20000, 0.15), (5e-5, 30000, 3.0)),
    ('ssv2_full', (1e-4, 40000, 0.6), (5e-5, 30000, 3.0))])
def test_published_recipes(data, hyrsm, clip_fsar):
    for method, published, weight in (('hyrsm', hyrsm, 'auxiliary'), ('clip_fsar', clip_fsar, 'video_text')):
        config = load_config([str(ROOT / f'sample_configs/{data}.py'), f'--method={method}'])
        assert (config['lr'], config['max_iters'] * config['meta_batch'] / 4, config[weight]) == published
        assert config['shot'] == 1 and config['warmup_iters'] < config['max_iters']
    assert load_config([str(ROOT / f'sample_configs/{data}.py')])['shot'] == 5  # VBA's stays
