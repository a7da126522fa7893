"""TS-FSAR's ladder, correlations and matching: golden values, sizes, slow references, and what must not matter."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import train
from clip_loader import CLIP
from config import find_method, load_config
from methods.ladder import correlations, pair_weights, similarities
from model import Episode, Step, look

METRICS = ['tsm', 'dcm', 'bimhm', 'cosine']
T, DIM = 4, 64
NAMES = ['a', 'b', 'c', 'd']


def built(trained=True, **options):
    """A CLIP of four blocks and a ladder beside it, with weights as after some training."""
    torch.manual_seed(0)
    clip = CLIP(32, 16, DIM, 4, 16).requires_grad_(False)
    config = load_config(['--method=ladder', '--device=cpu', f'--frames={T}', '--width=64'])
    method = checkpoint.build(config | options, clip, NAMES)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.1 * trained * torch.randn_like(p))
    return clip, method.eval()


def tokens(method, videos, frames=T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(videos, frames, 5, DIM, generator=generator) for _ in method.sees]


def few_shot(videos, labels=(0, 1, 1), classes=(2, 0)):
    return Episode(torch.tensor(labels), torch.tensor([classes]), NAMES, False, index=torch.arange(videos)[None])


@torch.no_grad()
def scores(method, seen, *ways):
    """Scores (M, N) of one episode of all videos: supports, then queries."""
    return method.scores(method.video(*seen), few_shot(len(seen[0]), *ways))[0]


def rows(seen, index):
    return [x[list(index)] for x in seen]


# ---- Golden values, computed in float64

def test_correlations_golden_values():
    x = torch.tensor([[math.sin(3 * p + c) for c in range(3)] for p in range(4)], dtype=torch.float64)
    r = correlations(x)
    assert r.tolist() == pytest.approx([-0.627334, 0.257877, 0.369457, -0.241299, -0.016578, -0.352879], abs=1e-6)
    torch.testing.assert_close(correlations(x + torch.randn(4, 1).double()), r)  # what all channels share
    assert correlations(x.float()).tolist() == pytest.approx(r.tolist(), abs=1e-5)
    ratio = correlations(2 * x) / r
    assert ratio.min().item() == pytest.approx(1.593, abs=1e-3) and ratio.max().item() == pytest.approx(1.762, abs=1e-3)
    assert correlations(x[:, :1].repeat(1, 3)).abs().max() < 1e-12  # all channels alike
    assert correlations(1000 * torch.randn(5, 1) + 1e-3 * torch.randn(5, 64)).isfinite().all()  # rounding gives squares below 0


@torch.no_grad()
def test_the_whole_answer_golden_values():
    """Two supports and a query, two frames, four patches, three channels; the ladder's tokens are given."""
    _, method = built(frames=2)
    z = torch.sin(0.7 * torch.arange(3 * 2 * 5 * 3, dtype=torch.float64) + 0.3).view(3, 2, 5, 3)
    method.ladder.forward = lambda seen: z
    method.matching = torch.nn.Linear(3, 4, bias=False)
    method.matching.weight.copy_(torch.cos(0.5 * torch.arange(12)).view(4, 3))
    kept, ways = method.video(z), few_shot(3, (0, 1))
    r = kept[1]
    weights = torch.tensor([-0.305850, -0.768083, 0.999920, -0.331572])  # of patches, by the class token
    torch.testing.assert_close(r[0, 0], correlations(weights[:, None] * z[0, 0, 1:].float()), rtol=1e-4, atol=1e-6)
    assert r[0, 0].tolist() == pytest.approx([-0.262456, 0.083774, 0.178682, -0.139929, 0.056155, -0.234837], abs=1e-5)
    alike = similarities(r[None, 2:], r[None, :2], 0.01)[0, 0]
    assert alike[0].flatten().tolist() == pytest.approx([0.947716, 0.951641, 0.955926, 0.957803], abs=1e-5)
    assert alike[1].flatten().tolist() == pytest.approx([0.956618, 0.950554, 0.965085, 0.958276], abs=1e-5)
    matrix = pair_weights(method.matching, *ways.split(ways.take(kept[0])))
    assert matrix.shape == (1, 1, 2, 2)
    assert matrix.flatten().tolist() == pytest.approx([-0.489220, 0.300402, 0.531720, -0.225177], abs=1e-5)
    assert method.scores(kept, ways).flatten().tolist() == pytest.approx([0.114842, 0.114924], abs=1e-5)
    lengths = r[:, 0].norm(dim=-1)
    with_itself = similarities(r[:, None, :1], r[:, None, :1], 0.01).flatten()
    torch.testing.assert_close(with_itself, lengths ** 2 / (lengths ** 2 + 0.01))
    assert lengths[0].item() == pytest.approx(0.430941, abs=1e-5) and with_itself[0].item() == pytest.approx(0.948904, abs=1e-5)


@torch.no_grad()
def test_gates_golden_values():
    """A ladder whose side blocks change nothing: s = (1 - g) u_1 + g s, three times."""
    _, method = built(trained=False, levels=3)
    ladder = method.ladder
    for block in ladder.sides:
        block.attn.out_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.zero_()
    ladder.gamma.copy_(torch.tensor([0.0, 0.05, 0.1]))
    seen = tokens(method, 2)
    u = [down(x) for down, x in zip(ladder.downs, seen)]
    expected = u[0]
    for gate, level in zip((0.5, 0.622459, 0.731059), u):
        expected = gate * expected + (1 - gate) * level
    torch.testing.assert_close(ladder(seen), expected, rtol=1e-4, atol=1e-5)


# ---- Sizes

@pytest.mark.parametrize('dim, depth, options, count', [
    (768, 12, dict(), 12_069_388), (768, 12, dict(levels=4), 3_968_004), (128, 6, dict(levels=4, width=64), 237_828),
    (128, 6, dict(levels=4, width=64, metric='bimhm'), 233_732)])
def test_parameter_counts(dim, depth, options, count):
    """The published ladder and matching; the same beside four blocks; and beside the demo's CLIP."""
    blocks = [None] * depth
    visual = SimpleNamespace(proj=torch.empty(dim, 1), transformer=SimpleNamespace(resblocks=blocks))
    config = load_config(['--method=ladder']) | options
    with torch.device('meta'):
        method = find_method('ladder')[0](SimpleNamespace(visual=visual), [], config)
    assert sum(p.numel() for p in method.parameters()) == count


def test_what_it_sees():
    """At 12 blocks the 7th, 9th and 11th attend over time."""
    assert built()[1].sees == (0, 1, 2, 3, 4) and built(levels=5)[1].sees == (0, 1, 2, 3, 4)
    _, method = built(levels=2)
    assert method.sees == (3, 4) and len(method.ladder.sides) == 2
    ladder = type(method.ladder)(DIM, 64, range(13), 12)
    assert [m + 1 for m, over_time in enumerate(ladder.over_time) if over_time] == [7, 9, 11]
    assert type(method.ladder)(DIM, 64, range(9, 13), 12).over_time == [True, False, True, False]


@pytest.mark.parametrize('options, said', [
    (dict(levels=6), 'has 4 blocks and so 5 levels'), (dict(levels=-1), 'levels=-1'), (dict(width=96), 'heads are 64 wide')])
def test_settings_that_cannot_be(options, said):
    with pytest.raises(SystemExit, match=said):
        built(**options)


# ---- Slow references

@torch.no_grad()
@pytest.mark.parametrize('levels', [0, 2])
def test_the_ladder_by_loops(levels):
    """Attention frame by frame, or place by place over time."""
    _, method = built(levels=levels)
    seen, ladder = tokens(method, 2), method.ladder
    u = []
    for x, (norm, linear) in zip(seen, ladder.downs):
        u.append(F.layer_norm(x, (DIM,), norm.weight, norm.bias) @ linear.weight.T)
    s, gates = u[0], torch.sigmoid(ladder.gamma / 0.1)
    for i, side in enumerate(ladder.sides):
        out = torch.empty_like(s)
        for v in range(2):
            if (4 - len(ladder.sides) + i) in (1, 3):  # blocks from 0, of four: the second and the last are within frames
                for t in range(T):
                    out[v, t] = side(s[v, t])
            else:
                for place in range(5):
                    out[v, :, place] = side(s[v, :, place])
        s = gates[i] * out + (1 - gates[i]) * u[i + (levels == 0)]
    torch.testing.assert_close(ladder(seen), s)
    torch.testing.assert_close(method.video(*seen)[0], s[:, :, 0])


def alike(x, y, floor):
    """Cosines of frames (T, P) and (T', P), one by one."""
    return torch.stack([torch.stack([a @ b / (a.norm() * b.norm() + floor) for b in y]) for a in x])


@torch.no_grad()
@pytest.mark.parametrize('merge', ['before', 'after'])
@pytest.mark.parametrize('metric', METRICS)
def test_scores_by_loops(metric, merge):
    _, method = built(metric=metric, merge=merge, levels=2)
    seen = tokens(method, 5)
    kept = method.video(*seen)
    frames, compared, floor = kept[0], kept[-1], 0.01 if metric == 'dcm' else 0.0
    members = [[0], [1, 2]]
    expected = torch.zeros(2, 2)
    for m in range(2):
        if metric in ('tsm', 'dcm'):
            task = frames[3 + m].mean(0) + frames[:3].flatten(0, 1).mean(0)
            matrix = (method.matching.weight @ task).view(T, T)
        for n in range(2):
            prototypes = [compared[i] for i in members[n]]
            if merge == 'before':
                prototypes = [sum(prototypes) / len(prototypes)]
            for prototype in prototypes:
                c = alike(compared[3 + m], prototype, floor)
                found = dict(cosine=c.trace(), bimhm=-((1 - c).min(0).values.sum() + (1 - c).min(1).values.sum()))
                expected[m, n] += (found[metric] if metric in found else (matrix * c).sum()) / len(prototypes)
    torch.testing.assert_close(scores(method, seen), expected, rtol=1e-4, atol=1e-5)


# ---- What must and must not matter

@pytest.mark.parametrize('metric', METRICS)
def test_queries_do_not_see_each_other_and_order_does_not_matter(metric):
    _, method = built(trained=False, metric=metric, levels=2)
    seen = tokens(method, 7)
    first = scores(method, seen)
    torch.testing.assert_close(scores(method, rows(seen, [0, 1, 2, 6, 4, 3, 5])), first[[3, 1, 0, 2]])
    other = [torch.cat([x[:4], y]) for x, y in zip(seen, tokens(method, 3, seed=2))]
    torch.testing.assert_close(scores(method, other)[0], first[0])
    assert not torch.allclose(scores(method, other)[1:], first[1:], atol=1e-3)
    torch.testing.assert_close(scores(method, rows(seen, [1, 0, 2, 3, 4, 5, 6]), (1, 0, 1)), first)  # supports
    torch.testing.assert_close(scores(method, seen, (1, 0, 0), (0, 2)), first.flip(1))  # ways


@pytest.mark.parametrize('metric', METRICS)
def test_merge_makes_no_difference_with_one_shot(metric):
    before, after = (built(metric=metric, merge=merge, levels=2)[1] for merge in ('before', 'after'))
    seen = tokens(before, 5)
    torch.testing.assert_close(scores(before, seen, (0, 1)), scores(after, seen, (0, 1)))
    assert not torch.allclose(scores(before, seen), scores(after, seen), atol=1e-4)


@pytest.mark.parametrize('metric, ordered', [('tsm', True), ('dcm', True), ('bimhm', False), ('cosine', False)])
def test_only_the_learned_matching_knows_when_frames_are(metric, ordered):
    """The frames of all videos in another order, the same for all; and a query's alone in another."""
    _, method = built(metric=metric, levels=2)
    seen = tokens(method, 5)
    turned = [x.flip(1) for x in seen]
    assert torch.allclose(scores(method, turned), scores(method, seen), atol=1e-4) != ordered
    queries_turned = [torch.cat([x[:3], x[3:].flip(1)]) for x in seen]
    assert torch.allclose(scores(method, queries_turned), scores(method, seen), atol=1e-4) == (metric == 'bimhm')


@pytest.mark.parametrize('metric', METRICS)
def test_identical_frames_have_finite_scores_and_gradients(metric):
    """All videos the same still picture; and one whose patches are all the same."""
    _, method = built(metric=metric, levels=2)
    picture = torch.randn(1, 1, 5, DIM)
    for still in (picture.expand(12, T, 5, DIM), picture[:, :, :1].expand(12, T, 5, DIM)):
        kept = method.video(still, still)
        loss, answer = Step(method)([still, still], in_training())
        assert all(x.isfinite().all() for x in kept) and answer.isfinite().all()
        method.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in method.parameters())


# ---- A step and a test

def in_training():
    """Two episodes, 2-way 2-shot with one query a class."""
    return Episode(torch.tensor([0, 0, 1, 1]), torch.tensor([[2, 0], [1, 3]]), NAMES, answers=torch.tensor([[0, 1]] * 2))


@pytest.mark.parametrize('merge', ['before', 'after'])
@pytest.mark.parametrize('metric', METRICS)
def test_a_step_trains_all_and_the_test_answers_from_half_precision(metric, merge):
    clip, method = built(trained=False, metric=metric, merge=merge)
    optimizer = train.optimizer_of(dict(method='ladder', lr=1e-2, weight_decay=0.02), method)
    frames = torch.randint(256, (12, T, 3, 32, 32), dtype=torch.uint8)
    seen = look(clip.visual, frames, method.sees)
    torch.compiler.reset()  # eight forms of one function are more than it keeps
    loss, answer = torch.compile(Step(method.train()), fullgraph=True, backend='eager')(seen, in_training())
    assert answer.shape == (2, 2, 2) and loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())
    before = [p.clone() for p in method.parameters()]
    optimizer.step()
    assert not any(torch.equal(x, p) for x, p in zip(before, method.parameters()))

    index = torch.tensor([[0, 4, 1, 2], [5, 6, 7, 8], [9, 3, 2, 11]])
    with torch.no_grad():
        kept = method.eval().video(*seen)
        assert [x.shape[1:] for x in kept] == [(T, 64), (T, 64 * 65 // 2)][:len(kept)]
        ways = Episode(torch.tensor([0, 1]), torch.tensor([[0, 1], [3, 2], [1, 0]]), NAMES, False, index=index)
        exact = method.scores(kept, ways)
        torch.testing.assert_close(method.scores([x.half() for x in kept], ways), exact, rtol=1e-2, atol=1e-2)
        for e, row in enumerate(index):  # several episodes at once, and each alone
            alone = ways._replace(classes=ways.classes[e:e + 1], index=row[None])
            torch.testing.assert_close(method.scores(kept, alone)[0], exact[e])


@pytest.mark.parametrize('metric', METRICS)
def test_scores_are_in_float32_under_autocast(metric):
    """In training what is kept is the ladder's, of half precision inside; a test reads it in float32."""
    _, method = built(metric=metric, levels=2)
    seen = tokens(method, 12)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        kept = method.video(*seen)
        inside = method.scores(kept, few_shot(12))
    with torch.no_grad():
        torch.testing.assert_close(method.scores(kept, few_shot(12)), inside, rtol=0, atol=0)
    assert all(x.dtype == torch.float32 for x in (*kept, inside))
    if metric == 'dcm':  # bfloat16's own products would be off by a hundredth
        torch.manual_seed(0)
        z = torch.randn(2, T, 5, 64)
        method.ladder.forward = lambda seen: z
        with torch.autocast('cpu', torch.bfloat16):
            inside = method.video(z)[1]
        torch.testing.assert_close(inside, method.video(z)[1], rtol=0, atol=0)


@pytest.mark.parametrize('metric', ['dcm', 'bimhm'])
def test_it_compiles_in_one_graph(metric):
    torch._dynamo.reset()
    _, method = built(metric=metric, levels=2)
    seen = tokens(method, 12)
    loss, _ = torch.compile(Step(method), fullgraph=True, backend='eager')(seen, in_training())
    torch.testing.assert_close(loss, Step(method)(seen, in_training())[0])


def test_half_of_the_matrix_of_channels_is_kept():
    """By loops, in float64: distances of two channels, the means of their rows and columns taken off."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    a = [[(((x[:, k] - x[:, i]) ** 2).sum().item() / 10 + 1e-5) ** 0.4 for i in range(4)] for k in range(4)]
    mean = [sum(row) / 4 for row in a]
    expected = [a[k][i] - mean[k] - mean[i] + sum(mean) / 4 for k in range(4) for i in range(k, 4)]
    assert correlations(x).tolist() == pytest.approx(expected, abs=1e-12)
