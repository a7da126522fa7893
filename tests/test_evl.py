"""EVL and the linear probe: numbers of parameters, slow references, what must not matter and what must not be changed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import train
from clip_loader import CLIP
from config import find_method, load_config
from model import Episode, Step, look, trainable_state

NAMES = ['evl', 'linear']
T, WIDTH, GRID, DEPTH = 4, 128, 3, 3  # two heads
L = GRID ** 2
CLASSES = ['a', 'b', 'c', 'd', 'e']
PARTS = ['t_conv', 't_pe', 't_ca']
NONE = dict.fromkeys(PARTS, False)


def built(name, noise=0.1, frames=T, **options):
    """A tiny CLIP and a method beside it, with weights as after some training; noise=0: as they begin."""
    torch.manual_seed(0)
    clip = CLIP(GRID * 8, 8, WIDTH, DEPTH, 16).requires_grad_(False)
    config = load_config([f'--method={name}', '--device=cpu', '--closed_set=True', f'--frames={frames}'])
    small = dict(levels=2) if name == 'evl' else {}
    method = checkpoint.build(config | small | options, clip, CLASSES)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    return clip, method.eval()


def shown(clip, method, videos=3, frames=T):
    """What CLIP shows of random videos."""
    pixels = torch.randint(256, (videos, frames, 3, GRID * 8, GRID * 8), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(1))
    return look(clip.visual, pixels, method.sees)


def closed(answers=None, videos=3, index=None):
    """An episode of each video alone, without supports."""
    classes = torch.arange(5).expand(videos, -1)
    return Episode(torch.empty(0, dtype=torch.long), classes, CLASSES, answers=answers, index=index)


ANSWERS = torch.tensor([[2], [0], [4]])


# ---- Both

@pytest.mark.parametrize('name', NAMES)
def test_a_step_trains_all_that_trains_and_the_test_answers_from_half_precision(name):
    clip, method = built(name)
    assert method.closed_set and not getattr(method, 'text', False)
    frozen = {key: value.clone() for key, value in clip.state_dict().items()}
    seen = shown(clip, method)
    before_step = [x.clone() for x in seen]
    optimizer = train.optimizer_of(dict(method=name, lr=1e-2, weight_decay=0.05), method)
    loss, answer = Step(method.train())(seen, closed(ANSWERS))
    assert answer.shape == (3, 1, 5) and loss.isfinite()
    torch.testing.assert_close(loss, F.cross_entropy(answer[:, 0], ANSWERS[:, 0]))
    loss.backward()
    trained = {key: p for key, p in method.named_parameters() if p.requires_grad}
    assert set(trainable_state(method)) == set(trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    before = {key: p.clone() for key, p in trained.items()}
    optimizer.step()
    assert not any(torch.equal(before[key], p) for key, p in trained.items())
    assert all(torch.equal(frozen[key], value) for key, value in clip.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip(seen, before_step))  # what is shown is not written to

    with torch.no_grad():
        kept = method.eval().video(*seen)
        assert len(kept) == 1 and kept[0].ndim == 2  # one vector a video
        unchanged = kept[0].clone()
        expected = method.scores(kept, closed())
        index = torch.tensor([[2], [0], [2], [1]])
        torch.testing.assert_close(method.scores(kept, closed(videos=4, index=index)), expected[index[:, 0]])
        assert torch.equal(kept[0], unchanged)
        of_two = closed()._replace(classes=torch.tensor([[3, 0]] * 3))
        torch.testing.assert_close(method.scores(kept, of_two), expected[:, :, [3, 0]])
        half = method.scores(method.video(*(x.half().float() for x in seen)), closed())  # as a prefix cache keeps them
        torch.testing.assert_close(half, expected, rtol=1e-2, atol=1e-2)
        with torch.autocast('cpu', torch.bfloat16):
            near = method.scores(method.video(*(x.bfloat16() for x in seen)), closed())
        torch.testing.assert_close(near.float(), expected, rtol=0.1, atol=0.1)
        assert not torch.allclose(expected[0], expected[1], atol=0.1)  # more than those tolerances


@pytest.mark.parametrize('name', NAMES)
def test_each_video_alone(name):
    clip, method = built(name)
    seen = shown(clip, method)
    together, = method.video(*seen)
    for v in range(3):
        torch.testing.assert_close(method.video(*(x[v:v + 1] for x in seen))[0], together[v:v + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_it_compiles_in_one_graph(name):
    torch._dynamo.reset()
    clip, method = built(name)
    seen = shown(clip, method)
    loss, _ = torch.compile(Step(method), fullgraph=True, backend='eager')(seen, closed(ANSWERS))
    torch.testing.assert_close(loss, Step(method)(seen, closed(ANSWERS))[0])


def test_help_has_a_comment_for_each_option(capsys):
    with pytest.raises(SystemExit):
        load_config(['--method=evl', '--help'], script=train)
    own = capsys.readouterr().out.partition('of the method evl:\n')[2].partition('\n\n')[0].splitlines()
    assert len(own) == len(find_method('evl')[0].options) and all(line[33:].strip() for line in own)


# ---- The linear probe

def test_linear_by_hand():
    clip, method = built('linear')
    assert sum(p.numel() for p in method.parameters()) == 16 * 5 + 5
    image, = shown(clip, method)
    mean = sum(image[:, t] / image[:, t].norm(dim=-1, keepdim=True) for t in range(T)) / T
    pooled = mean / mean.norm(dim=-1, keepdim=True)
    expected = 4 * pooled @ method.head.weight.T + method.head.bias  # 4 = sqrt(16)
    torch.testing.assert_close(method.scores(method.video(image), closed())[:, 0], expected)
    stretched = image * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]  # a frame's length says nothing, nor its place
    torch.testing.assert_close(method.video(stretched.flip(1)), method.video(image))


# ---- EVL

@pytest.mark.parametrize('sizes, options, count', [  # 8 frames and 4 levels, unless options say otherwise
    ((224, 16, 768, 12, 512), dict(t_ca=False), 28_704_400), ((224, 16, 768, 12, 512), {}, 33_183_376),
    ((224, 16, 768, 12, 512), dict(t_ca=False, levels=1), 7_408_528),
    ((224, 16, 768, 12, 512), dict(t_ca=False, frames=32), 28_778_128),
    ((224, 32, 768, 12, 512), {}, 28_704_400 + 4 * 2 * 13 ** 2 * 768),
    ((224, 14, 1024, 24, 768), NONE, 4 * 12_598_272 + 1024 + 2 * 1024 + 1024 * 400 + 400)])
def test_parameter_counts(sizes, options, count):
    """As published without T-CA: 28.70 M, 7.41 M of one level, 28.78 M at 32 frames; on Kinetics-400."""
    config = load_config(['--method=evl']) | options
    with torch.device('meta'):
        method = find_method('evl')[0](CLIP(*sizes).requires_grad_(False), ['a name'] * 400, config)
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == count


def slow_tokens(level, block, x, read):
    """F + T-Conv(F) + T-PE + T-CA of one video (T, 1+L, D), by loops, PyTorch's own modules and the whole table of offsets."""
    conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
    conv.weight.data, conv.bias.data = level.conv.kernel.T[:, None].contiguous(), level.conv.bias
    found = x + conv(x.permute(1, 2, 0)).permute(2, 0, 1)  # of (L, D, T)
    found = found + level.place
    attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    attn.load_state_dict(block.attn.state_dict())
    patches = F.layer_norm(read[:, 1:], (WIDTH,), block.ln_1.weight, block.ln_1.bias)
    for step, table in zip((-1, 1), level.across.tables):
        rows = torch.empty(L, L, WIDTH)
        for q in range(L):
            for k in range(L):
                down, right = q // GRID - k // GRID, q % GRID - k % GRID
                rows[q, k] = table.view(2 * GRID - 1, 2 * GRID - 1, WIDTH)[down + GRID - 1, right + GRID - 1]
        for t in range(T):
            if 0 <= t + step < T:
                weights = attn(patches[t:t + 1], patches[t + step:t + step + 1], patches[t:t + 1])[1][0]  # means over heads
                change = torch.stack([sum(weights[q, k] * rows[q, k] for k in range(L)) for q in range(L)])
                found = torch.cat([found[:t], torch.cat([found[t, :1], found[t, 1:] + change])[None], found[t + 1:]])
    return found


def slow_layer(level, q, tokens):
    """The decoder layer on one query (D) and tokens (n, D)."""
    attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    attn.load_state_dict(level.attn.state_dict())
    memory = level.ln_tokens(tokens)[None]
    q = q + attn(level.ln_query(q)[None, None], memory, memory)[0][0, 0]
    h = level.mlp[0](level.ln_mlp(q))
    return q + level.mlp[3](h * torch.sigmoid(1.702 * h))


@torch.no_grad()
def test_against_a_slow_reference():
    clip, method = built('evl')
    assert method.sees == (1, 2, 3)
    for block in clip.visual.transformer.resblocks:  # sharper, else the attention is all but uniform
        block.attn.in_proj_weight *= 3
        block.ln_1.weight += torch.rand(WIDTH)
    method = rebuilt(method, clip)
    seen = shown(clip, method)
    blocks = clip.visual.transformer.resblocks[1:]
    for v in range(3):
        q = method.query
        for i, (level, block) in enumerate(zip(method.levels, blocks)):
            tokens = slow_tokens(level, block, seen[i + 1][v], seen[i][v])
            standard = level.tokens(seen[i + 1][v:v + 1], seen[i][v:v + 1])[0]
            torch.testing.assert_close(standard, F.layer_norm(tokens, (WIDTH,)).flatten(0, 1), rtol=1e-4, atol=1e-4)
            q = slow_layer(level, q, tokens.flatten(0, 1))
        torch.testing.assert_close(method.video(*seen)[0][v], q, rtol=1e-4, atol=1e-4)
        logits = method.head[2](method.head[0](q))
        torch.testing.assert_close(method.scores(method.video(*seen), closed())[v, 0], logits, rtol=1e-4, atol=1e-4)


def rebuilt(method, clip):
    """The same weights beside a CLIP that was changed."""
    config = load_config(['--method=evl', '--closed_set=True', f'--frames={T}']) | dict(levels=2)
    again = checkpoint.build(config, clip, CLASSES)
    again.load_state_dict(trainable_state(method), strict=False)
    return again.eval()


@torch.no_grad()
def test_t_ca_sees_motion():
    """Where each patch looks at the one that was to its left, T-CA adds the row of one step to the right; by hand."""
    clip, method = built('evl')
    across = method.levels[0].across
    a = torch.full((L, L), -1e4)
    for q in range(L):
        a[q, q - 1 if q % GRID else q] = 1e4  # the first column looks at itself
    found = across.by_offset(*factors(a))[0, 0] @ across.tables[0]
    table = across.tables[0].view(2 * GRID - 1, 2 * GRID - 1, WIDTH)
    for q in range(L):
        torch.testing.assert_close(found[q], table[GRID - 1, GRID - 1 + bool(q % GRID)])


def factors(logits):
    """q and k (1, 1, 1, L, L) of such logits (L, L)."""
    return logits[None, None, None] * math.sqrt(L), torch.eye(L)[None, None, None]


def test_new_temporal_parts_change_nothing():
    """T-Conv's zero start, T-PE's and T-CA's; and T-Conv's published start does."""
    clip, plain = built('evl', noise=0, **NONE)
    assert plain.sees == (2, 3) and not plain.query.any()
    torch.nn.init.normal_(plain.query)

    def kept(init):
        _, method = built('evl', noise=0, t_conv_init=init)
        missing, unexpected = method.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected and all('conv' in key or 'place' in key or 'across' in key for key in missing)
        return method.video(*shown(clip, method))[0]

    expected, = plain.video(*shown(clip, plain))
    torch.testing.assert_close(kept('zero'), expected)
    assert not torch.allclose(kept('default'), expected, atol=1e-2)


def test_t_conv_begins_as_conv1d_does():
    conv = built('evl', noise=0)[1].levels[0].conv
    own = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
    for x, y in ((conv.kernel, own.weight), (conv.bias, own.bias)):
        assert x.numel() == y.numel() and x.abs().max() < 3 ** -0.5
        assert x.std().item() == pytest.approx(y.std().item(), rel=0.15)


def test_the_published_start():
    """q, k, v and both layers of the MLP each in Xavier's bounds, biases all but 0; a query of 0 attends to all alike."""
    clip, method = built('evl', noise=0)
    level = method.levels[0]
    square, wide = math.sqrt(6 / (2 * WIDTH)), math.sqrt(6 / (5 * WIDTH))
    matrices = [*level.attn.in_proj_weight.chunk(3), level.attn.out_proj.weight]
    for weight, bound in [*((w, square) for w in matrices), (level.mlp[0].weight, wide), (level.mlp[3].weight, wide)]:
        assert 0.99 * bound < weight.abs().max() <= bound
    for bias in (level.mlp[0].bias, level.mlp[3].bias):
        assert 0 < bias.abs().max() < 1e-5
    seen = shown(clip, method)
    tokens = level.tokens(seen[1], seen[0])
    weights = level.attn.folded_weights(level.ln_query(method.query.expand(3, -1)), tokens, level.ln_tokens)
    torch.testing.assert_close(weights, torch.full((3, 2, T * (1 + L)), 1 / (T * (1 + L))))


@pytest.mark.parametrize('parts', [[], *([part] for part in PARTS), PARTS])
def test_each_part_knows_the_order_of_frames_and_without_them_it_does_not_matter(parts):
    clip, method = built('evl', **NONE | dict.fromkeys(parts, True))
    seen = shown(clip, method)
    turned = [x.flip(1) for x in seen]
    assert torch.allclose(method.video(*turned)[0], method.video(*seen)[0], atol=1e-4) != bool(parts)


@pytest.mark.parametrize('levels', [1, 3])
@pytest.mark.parametrize('t_ca', [False, True])
def test_which_blocks_it_sees(levels, t_ca):
    clip, method = built('evl', levels=levels, t_ca=t_ca)
    assert method.sees == tuple(range(DEPTH - levels + (not t_ca), DEPTH + 1)) and len(method.levels) == levels
    assert method.video(*shown(clip, method))[0].shape == (3, WIDTH)


@pytest.mark.parametrize('levels', [0, 4])
def test_impossible_levels(levels):
    with pytest.raises(SystemExit, match='the image tower has 3 blocks'):
        built('evl', levels=levels)


def test_one_frame_has_no_neighbours():
    clip, method = built('evl', frames=1)
    seen = shown(clip, method, frames=1)
    assert not method.levels[0].across(seen[0]).any()
    assert method.video(*seen)[0].isfinite().all()


def test_each_dropout_acts_in_training_at_half():
    """One in each level's MLP, between its layers, and one in the head, which does not touch what is kept."""
    for i in range(3):
        clip, method = built('evl')
        dropouts = [m for m in method.modules() if isinstance(m, nn.Dropout)]
        assert [m.p for m in dropouts] == [0.5] * 3
        for j, dropout in enumerate(dropouts):
            dropout.p = 0.5 if i == j else 0.0
        seen, in_head = shown(clip, method), i == 2
        assert torch.equal(method.train().video(*seen)[0], method.video(*seen)[0]) == in_head
        kept = method.eval().video(*seen)
        assert torch.equal(kept[0], method.video(*seen)[0])
        assert torch.equal(method.train().scores(kept, closed()), method.scores(kept, closed())) != in_head
