"""X-CLIP: its size, its parts against slow references, what it begins as, what must not matter, and how it trains."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import encoding
import train
from clip_loader import CLIP
from config import find_method, load_config
from model import Episode, QuickGELU, Step, ViT, cosine, look, trainable_state

T, WIDTH, DIM, PATCHES = 3, 128, 128, 4
CLASSES = ['walk', 'run', 'jump', 'sit']
PARTS = dict(messages='messages.', mit=('integrate.', 'positional_embedding'), prompts=('prompts.', 'ln_context.', 'alpha'),
             context=('ln_patches.', 'to_context'))


def tiny_clip(embed_dim=DIM, text_width=64):
    torch.manual_seed(0)
    return CLIP(32, 16, WIDTH, 2, embed_dim, 514, 24, text_width, 1).requires_grad_(False)


def built(fresh=False, **options):
    """A tiny CLIP and the method beside it, with weights as after some training."""
    clip = tiny_clip()
    config = load_config(['--method=xclip', '--device=cpu', f'--frames={T}'])
    method = checkpoint.build(config | options, clip, CLASSES)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad and not fresh:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return clip, method.eval()


def videos(count, seed=2):
    return torch.randint(256, (count, T, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def alone(count, answers=None, names=CLASSES):
    """An episode for each video, without supports: its one query is told from all classes."""
    every = torch.arange(len(names)).expand(count, -1)
    index = torch.arange(count)[:, None] if answers is None else None
    return Episode(torch.empty(0, dtype=torch.int64), every, names, False, answers, index)


def few_shot():
    """Two episodes in training, 2-way 2-shot with one query a class: 12 videos."""
    return Episode(torch.tensor([0, 0, 1, 1]), torch.tensor([[2, 0], [1, 3]]), CLASSES, answers=torch.tensor([[0, 1]] * 2))


@torch.no_grad()
def logits(method, seen, names=CLASSES):
    """(V, names)"""
    return method.scores(method.video(seen), alone(len(seen), names=names))[:, 0]


# ---- Size

@pytest.mark.parametrize('finetune, tower', [(8e-6, 86_192_640), (0.0, 0)])
def test_parameter_counts(finetune, tower):
    """B/16 and 8 frames, as published: 35.45, 3.16, 6.30 and 0.39, in all 45.3 M beside the tower."""
    config = load_config(['--method=xclip', f'--finetune={finetune}'])
    with torch.device('meta'):
        clip = SimpleNamespace(visual=ViT(224, 16, 768, 12, 512), texts=lambda names, templates: None)
        trained = {key: p for key, p in find_method('xclip')[0](clip, ['a name'], config).named_parameters() if p.requires_grad}
    count = {part: sum(p.numel() for key, p in trained.items() if key.startswith(names)) for part, names in PARTS.items()}
    assert count == dict(messages=35_453_952, mit=3_156_480, prompts=6_303_232, context=394_752)
    assert sum(p.numel() for p in trained.values()) == 45_308_416 + tower


def test_how_it_begins():
    _, method = built(fresh=True)
    linear = [x for part in (method.integrate, method.prompts) for x in part.modules() if isinstance(x, nn.Linear)]
    assert len(linear) == 3 + 2 * 6 and all(0.018 < x.weight.std() < 0.022 for x in linear)
    assert not any(x.bias.any() for x in linear if x.bias is not None)
    assert method.alpha.tolist() == pytest.approx([0.1] * DIM) and 0.9 < method.to_context.std() < 1.1
    assert 0.015 < method.positional_embedding.std() < 0.025
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, 2)
    for message in method.messages:
        assert message.gate is None and not message.attn.out_proj.bias.any()
        for name, x in theirs.state_dict().items():
            assert message.attn.state_dict()[name].std().item() == pytest.approx(x.std().item(), rel=0.05)


# ---- Against slow references

def torchs(attention):
    """PyTorch's attention with these weights: tokens first, (tokens, batch, dim)."""
    module = nn.MultiheadAttention(attention.out_proj.in_features, attention.heads)
    module.load_state_dict(attention.state_dict())
    return lambda q, x: module(q, x, x, need_weights=False)[0]


def block_by_frames(message, block, x):
    """One video (T, 1+L, D), frame after frame; the message is a token as the others are until the attention is over."""
    sent = torch.stack([message.write(frame[0]) for frame in x])  # (T, D)
    h = message.ln(sent)
    sent = sent + torchs(message.attn)(h[:, None], h[:, None])[:, 0]
    frames = []
    for frame, own in zip(x, sent):
        tokens = torch.cat([frame, own[None]])
        h = block.ln_1(tokens)[:, None]
        tokens = (tokens + torchs(block.attn)(h, h)[:, 0])[:-1]
        frames.append(tokens + block.mlp(block.ln_2(tokens)))
    return torch.stack(frames)


def heads_by_loops(layer, text, context):
    """One text (D,) looks at (L, D)."""
    found = []
    for first in range(0, DIM, 64):
        part = slice(first, first + 64)
        q, k, v = layer.q.weight[part] @ text, context @ layer.k.weight[part].T, context @ layer.v.weight[part].T
        found.append((k @ q / 8).softmax(0) @ v)
    return layer.out(torch.cat(found))


@torch.no_grad()
def test_a_block_by_frames():
    _, method = built()
    block, message = method.tower.transformer.resblocks[1], method.messages[1]
    x = torch.randn(2, T, 1 + PATCHES, WIDTH)
    found = message(x.flatten(0, 1), block, 2).view_as(x)
    for video, own in zip(x, found):
        torch.testing.assert_close(own, block_by_frames(message, block, video), rtol=1e-4, atol=1e-4)
    assert (found - block(x.flatten(0, 1)).view_as(x)).abs().max() > 0.1


@torch.no_grad()
def test_the_whole_by_loops():
    clip, method = built()
    seen, texts = videos(2), clip.texts(CLASSES, ['{}'])
    for video, found in zip(seen, logits(method, seen)):
        x = method.tower.embed(method.tower.normalise(video))
        for message, block in zip(method.messages, method.tower.transformer.resblocks):
            x = block_by_frames(message, block, x)
        z = method.tower.ln_post(x[:, 0]) @ method.tower.proj  # (T, D)
        y, part = z + method.positional_embedding, method.integrate
        h = part.ln_1(y)[:, None]
        y = y + torchs(part.attn)(h, h)[:, 0]
        y = y + part.mlp.c_proj(QuickGELU()(part.mlp.c_fc(part.ln_2(y))))
        vector = (y + z).sum(0) / T
        context = sum(method.ln_patches(frame[1:]) @ method.to_context for frame in x) / T
        context = method.ln_context(context)
        for text, score in zip(texts * DIM ** 0.5, found):
            t = text
            for layer in method.prompts:
                t = t + heads_by_loops(layer, layer.ln_1(t), context)
                t = t + layer.mlp(layer.ln_2(t))
            expected = clip.logit_scale.exp() * F.cosine_similarity(vector, text + method.alpha * t, dim=0)
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_frozen_tower_answers_as_one_that_trains_at_the_same_weights():
    _, tuned = built(fresh=True)
    clip, frozen = built(fresh=True, finetune=0.0)
    assert (tuned.sees, frozen.sees) == (('pixels',), (0,))
    seen = videos(3)
    torch.testing.assert_close(logits(frozen, *look(clip.visual, seen, (0,))), logits(tuned, seen), rtol=1e-4, atol=1e-4)


# ---- Zero start

@torch.no_grad()
def clips_answer(clip, seen):
    image = look(clip.visual, seen, ('image',))[0]
    return clip.logit_scale.exp() * cosine(image.mean(1), clip.texts(CLASSES, ['{}']))


@pytest.mark.parametrize('finetune', [8e-6, 0.0])
def test_zero_start_is_clip(finetune):
    clip, method = built(fresh=True, zero_start=True, finetune=finetune)
    clip.logit_scale.fill_(3.0)
    seen = videos(5)
    shown, expected = look(clip.visual, seen, method.sees), clips_answer(clip, seen)
    torch.testing.assert_close(logits(method, *shown), expected, rtol=1e-5, atol=1e-5)
    clip, published = built(fresh=True, finetune=finetune)
    clip.logit_scale.fill_(3.0)
    assert (logits(published, *shown) - expected).abs().max() > 0.01

    loss, _ = Step(method.train())(shown, alone(5, torch.tensor([[0], [1], [2], [3], [0]])))  # and can leave it
    loss.backward()
    ways_in = [method.alpha, method.positional_embedding, method.integrate.attn.out_proj.weight,
               method.integrate.mlp.c_proj.weight, *(message.gate for message in method.messages)]
    assert all(p.grad.abs().sum() > 0 for p in ways_in)


@torch.no_grad()
def test_the_gate():
    """0 is CLIP's block, 1 the published one."""
    _, method = built(zero_start=True)
    message, block = method.messages[0], method.tower.transformer.resblocks[0]
    x = torch.randn(2 * T, 1 + PATCHES, WIDTH)
    message.gate.fill_(0.0)
    torch.testing.assert_close(message(x, block, 2), block(x), rtol=0, atol=0)
    message.gate.fill_(1.0)
    gated = message(x, block, 2)
    message.gate = None
    torch.testing.assert_close(gated, message(x, block, 2))


# ---- What must not matter

def test_a_video_is_scored_alone():
    _, method = built()
    seen, others = videos(4), videos(4, seed=3)
    first = logits(method, seen)
    mixed = logits(method, torch.cat([others[:2], seen[1:2], others[3:]]))
    torch.testing.assert_close(mixed[2], first[1], rtol=1e-4, atol=1e-4)
    assert (mixed[0] - first[0]).abs().max() > 0.01


def test_only_the_places_of_integration_know_the_order_of_frames():
    """Messages have no place in time, and the context is a mean over time."""
    _, method = built()
    seen = videos(4)
    turned = seen[:, [2, 0, 1]]
    assert (logits(method, turned) - logits(method, seen)).abs().max() > 0.01
    torch.testing.assert_close(method.video(turned)[1], method.video(seen)[1], rtol=1e-4, atol=1e-4)
    nn.init.zeros_(method.positional_embedding)
    torch.testing.assert_close(logits(method, turned), logits(method, seen), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_frames_hear_of_each_other_by_messages_alone():
    _, method = built()
    x, block = torch.randn(T, 1 + PATCHES, WIDTH), method.tower.transformer.resblocks[0]
    cls, patch = x.clone(), x.clone()
    cls[0, 0] += torch.randn(WIDTH)
    patch[0, 1:] += torch.randn(WIDTH)
    before, by_cls, by_patch = (method.messages[0](y, block, 1) for y in (x, cls, patch))
    assert (by_cls[1:] - before[1:]).abs().max() > 1e-3
    torch.testing.assert_close(by_patch[1:], before[1:])


def test_names_are_read_one_by_one():
    """Other names beside it, in another order, or never trained with: a name's logit stays."""
    _, method = built()
    seen = videos(3)
    first = logits(method, seen)
    others = logits(method, seen, ['swim', 'jump', 'walk'])
    torch.testing.assert_close(others[:, [2, 1]], first[:, [0, 2]], rtol=1e-4, atol=1e-4)
    assert (others[:, 0] - first.T).abs().max(1).values.min() > 0.01


@torch.no_grad()
def test_ways_of_an_episode_are_scored_as_among_all_names():
    """Queries alone: the supports say nothing."""
    _, method = built()
    seen = videos(6)
    index = torch.tensor([[0, 1, 2, 3, 4], [5, 4, 3, 2, 0]])
    ways = Episode(torch.tensor([0, 1, 1]), torch.tensor([[2, 0], [3, 1]]), CLASSES, False, index=index)
    expected = ways.of_ways(logits(method, seen)[index[:, 3:]])
    torch.testing.assert_close(method.scores(method.video(seen), ways), expected, rtol=1e-4, atol=1e-4)


# ---- Training

@pytest.mark.parametrize('options', [{}, dict(finetune=0.0), dict(zero_start=True)])
@pytest.mark.parametrize('closed', [True, False])
def test_a_step_trains_all_that_trains_and_the_test_answers_from_half_precision(options, closed):
    clip, method = built(**options)
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    optimizer = train.optimizer_of(dict(method='xclip', lr=1e-3, weight_decay=0.02), method)
    shown = look(clip.visual, videos(12), method.sees)
    episode = alone(12, torch.arange(12)[:, None] % 4) if closed else few_shot()
    loss, answer = Step(method.train())(shown, episode)
    assert answer.shape == ((12, 1, 4) if closed else (2, 2, 2)) and loss.isfinite()
    loss.backward()
    trained = {key: p for key, p in method.named_parameters() if p.requires_grad}
    assert any(key.startswith('tower.') for key in trained) == (method.finetune > 0)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    then = {key: p.clone() for key, p in trained.items()}
    optimizer.step()
    assert not any(torch.equal(then[key], p) for key, p in trained.items())
    assert all(torch.equal(before[key], value) for key, value in clip.state_dict().items())

    with torch.no_grad():
        kept = method.eval().video(*shown)
        assert [x.shape for x in kept] == [(12, DIM), (12, PATCHES, DIM)]
        half = [encoding.stored(x) for x in kept]
        assert [x.dtype for x in half] == [torch.float32, torch.float16]
        torch.testing.assert_close(method.scores(half, alone(12)), method.scores(kept, alone(12)), rtol=1e-2, atol=1e-2)


def test_the_loss_is_smoothed():
    _, method = built(smoothing=0.3)
    kept = method.video(videos(3))
    loss, scores = method.loss(kept, alone(3, torch.tensor([[1], [3], [0]])))
    log_p = scores[:, 0].log_softmax(-1)
    expected = -(0.7 * log_p[range(3), [1, 3, 0]] + 0.3 * log_p.mean(1)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize('finetune', [1e-5, 1e-3, 0.0])  # 1e-3: as lr
def test_rates_and_decay(finetune):
    _, method = built(finetune=finetune)
    optimizer = train.optimizer_of(dict(method='xclip', lr=1e-3, weight_decay=0.02), method)
    found = {id(p): (group['lr'], group['weight_decay']) for group in optimizer.param_groups for p in group['params']}
    trained = {key: p for key, p in method.named_parameters() if p.requires_grad}
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(found) == len(trained)
    for key, p in trained.items():
        still = p.ndim < 2 or key in ('positional_embedding', 'tower.positional_embedding')
        assert found[id(p)] == (finetune if key.startswith('tower.') else 1e-3, 0.0 if still else 0.02), key


@pytest.mark.parametrize('finetune', [1e-5, 0.0])
def test_a_checkpoint_holds_what_trains(finetune, tmp_path):
    clip, method = built(finetune=finetune)
    shown = look(clip.visual, videos(2), method.sees)
    assert any(key.startswith('tower.') for key in trainable_state(method)) == (finetune > 0)
    assert not any(key.startswith('clip.') for key in trainable_state(method))
    config = load_config(['--method=xclip', '--device=cpu', f'--frames={T}', f'--finetune={finetune}'])
    clip.weights_hash, path = 'x', str(tmp_path / 'best.pt')
    checkpoint.save(path, method, clip, config)
    again = checkpoint.rebuild(config, clip, checkpoint.load(path), path)
    torch.testing.assert_close(logits(again, *shown), logits(method, *shown))


def test_it_compiles_in_one_graph():
    torch._dynamo.reset()
    _, method = built(zero_start=True)
    seen, episode = [videos(4)], alone(4, torch.tensor([[0], [1], [2], [3]]))
    loss, _ = torch.compile(Step(method), fullgraph=True, backend='eager')(seen, episode)
    torch.testing.assert_close(loss, Step(method)(seen, episode)[0])


@torch.no_grad()
def test_scores_are_float32_under_autocast():
    _, method = built(fresh=True)
    seen = videos(4)
    with torch.autocast('cpu', torch.bfloat16):
        found = logits(method, seen)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(method, seen), rtol=0.05, atol=0.2)


# ---- Refusals and help

def test_refusals():
    config = load_config(['--method=xclip', '--device=cpu'])
    with pytest.raises(SystemExit, match='text tower'):
        checkpoint.build(config, CLIP(32, 16, 64, 1, 64).requires_grad_(False), CLASSES)
    with pytest.raises(SystemExit, match='16 wide'):
        checkpoint.build(config, tiny_clip(embed_dim=16), CLASSES)


def test_help_has_a_comment_for_each_option(capsys):
    with pytest.raises(SystemExit):
        load_config(['--method=xclip', '--help'], script=train)
    own = capsys.readouterr().out.partition('of the method xclip:\n')[2].partition('\n\n')[0].splitlines()
    assert len(own) == len(find_method('xclip')[0].options) and all(line[33:].strip() for line in own)
