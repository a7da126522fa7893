"""The language-video contrast with temporal weighted shift: golden values, slow references, what trains in which stage."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import train
from clip_loader import CLIP
from config import find_method, load_config
from methods.tws import among_batch, covariance, shift, square_root
from model import Episode, Step, look

T, DIM, EMBED, WIDTH, ITERATIONS = 4, 128, 64, 6, 3
CLASSES = ['a', 'b', 'c', 'd']
FRAMES = torch.randint(256, (12, T, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tiny_clip(embed=EMBED, layers=2, **text):
    torch.manual_seed(0)
    text = text or dict(vocab_size=514, context_length=24, text_width=64, text_layers=1)
    return CLIP(32, 16, DIM, layers, embed, **text).requires_grad_(False)


def config_of(**options):
    config = load_config(['--method=tws', '--device=cpu', f'--frames={T}', '--lr=1e-3'])
    return config | dict(width=WIDTH, iterations=ITERATIONS) | options


def built(shaken=True, clip=None, **options):
    """A tiny CLIP and the method beside it; shaken: with weights as after some training."""
    clip = clip or tiny_clip()
    method = checkpoint.build(config_of(**options), clip, CLASSES)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in method.parameters():
            if shaken and p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return clip, method.eval()


def closed(classes=(2, 0, 3, 2, 1, 2)):
    """A batch of training in a closed set: each video an episode without supports."""
    everything = torch.arange(len(CLASSES)).expand(len(classes), -1)
    return Episode(torch.tensor([], dtype=torch.int64), everything, CLASSES, answers=torch.tensor(classes)[:, None])


def few_shot():
    """Two episodes, 2-way 2-shot with one query a class."""
    return Episode(torch.tensor([0, 0, 1, 1]), torch.tensor([[2, 0], [1, 3]]), CLASSES, answers=torch.tensor([[0, 1]] * 2))


FEW_SHOT_CLASSES = (2, 2, 0, 0, 2, 0, 1, 1, 3, 3, 1, 3)  # of all its videos
BATCHES = {'closed': (closed, 6), 'few-shot': (few_shot, 12)}


def in_test(videos, names=CLASSES, classes=None):
    """Each video, by index, an episode without supports."""
    classes = torch.arange(len(names)) if classes is None else torch.tensor(classes)
    nothing = torch.tensor([], dtype=torch.int64)
    return Episode(nothing, classes.expand(videos, -1), names, False, index=torch.arange(videos)[:, None])


@torch.no_grad()
def scores(method, frames=FRAMES, **of):
    return method.scores(method.video(frames), in_test(len(frames), **of))[:, 0]


# ---- Shift, root, sizes

def test_shift_by_hand():
    x = torch.stack([10 * t + torch.arange(8.0) for t in range(3)])[None]
    expected = torch.tensor([[0, *range(1, 7), 17], [0, *range(11, 17), 27], [10, *range(21, 27), 0]])
    assert torch.equal(shift(x)[0], expected.float())
    assert torch.equal(shift(x[:, :1])[0, 0], torch.tensor([0.0, *range(1, 7), 0]))  # one frame has none beside it


@pytest.mark.parametrize('iterations, expected', [
    (1, (1.95357, 0.61309, 0.16107)), (3, (2, 0.94636, 0.32448)), (5, (2, 0.99997, 0.48111)), (7, (2, 1, 0.5))])
def test_square_root_golden_values(iterations, expected):
    """Also of a turned and a scaled covariance beside it in the batch."""
    sigma = torch.diag(torch.tensor([4, 1, 0.25]))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    plain, turned = square_root(torch.stack([sigma, 9 * turn @ sigma @ turn.T]), iterations)
    root = torch.diag(torch.tensor(expected))
    torch.testing.assert_close(plain, root, rtol=0, atol=2e-5)
    torch.testing.assert_close(turned, 3 * turn @ root @ turn.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize('iterations, error', [(3, 0.68), (5, 0.38), (7, 0.10)])
def test_few_iterations_are_not_the_root_of_white_noise(iterations, error):
    sigma = covariance(torch.randn(1, 392, 128, generator=torch.Generator().manual_seed(0)))[0]
    values, vectors = torch.linalg.eigh(sigma)
    root = vectors * values.sqrt() @ vectors.T
    assert ((square_root(sigma[None], iterations)[0] - root).norm() / root.norm()).item() == pytest.approx(error, abs=0.02)


def test_parameter_counts():
    """Of ViT-B/32 and 400 classes: 7.11 M for what passes messages."""
    config = load_config(['--method=tws'])
    with torch.device('meta'):
        clip = CLIP(224, 32, 768, 12, 512)
        clip.logit_scale, clip.texts = torch.empty(()), lambda names, templates: None
        method = find_method('tws')[0](clip, [str(i) for i in range(400)], config)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()}
    assert count['messages'] + count['shifts'] == 12 * 592_128 == 7_105_536
    place_and_block = 8 * 512 + 3_152_384
    assert count['end'] == place_and_block
    assert count['auxiliary'] == place_and_block + 512 * 128 + (8256 + 1) * 400 + (512 + 1) * 400
    assert count['tower'] == count['clip'] == 87_849_216


# ---- Slow references

def attend(attention, x):
    """Attention among tokens (n, D), head by head."""
    size = x.shape[1] // attention.heads
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, 1)
    heads = []
    for first in range(0, x.shape[1], size):
        part = slice(first, first + size)
        heads.append((q[:, part] @ k[:, part].T / size ** 0.5).softmax(1) @ v[:, part])
    return attention.out_proj(torch.cat(heads, 1))


def block_of(block, x, message=None):
    """A block over the tokens of one frame (n, D), and a message that attends too; its output is dropped before the MLP."""
    everything = x if message is None else torch.cat([x, message[None]])
    everything = everything + attend(block.attn, block.ln_1(everything))
    x = everything[:len(x)]
    return x + block.mlp(block.ln_2(x))


def features_of(method, frames):
    """One video (T, 3, H, W) -> features of all its tokens (T, 1+L, EMBED), message by message, channel by channel."""
    tower, share = method.tower, DIM // 8
    x = list(tower.embed(tower.normalise(frames)))
    for block, message, tws in zip(tower.transformer.resblocks, method.messages, method.shifts):
        m = [message(tokens[0]) for tokens in x]
        weighed = [tws.weight * each + tws.bias for each in m]
        for t in range(T):
            before = weighed[t - 1] if t > 0 else torch.zeros(DIM)
            after = weighed[t + 1] if t + 1 < T else torch.zeros(DIM)
            m[t] = m[t] + torch.cat([before[:share], weighed[t][share:-share], after[-share:]])
        x = [block_of(block, tokens, each) for tokens, each in zip(x, m)]
    return tower.ln_post(torch.stack(x)) @ tower.proj


def vector_of(method, features):
    return block_of(method.end.block, features[:, 0] + method.end.place).mean(0)


def auxiliary_of(head, patches, v):
    """Patches (T, L, EMBED) of one video and its vector -> logits, without dropout."""
    tokens = torch.cat([head.reduce(block_of(head.temporal.block, patches[:, i] + head.temporal.place))
                        for i in range(patches.shape[1])]).double()
    sigma = torch.cov(tokens.T, correction=0)
    y, z, one = sigma / sigma.trace(), torch.eye(WIDTH).double(), torch.eye(WIDTH).double()
    for _ in range(ITERATIONS):
        y, z = y @ (3 * one - z @ y) / 2, (3 * one - z @ y) / 2 @ z
    root = sigma.trace().sqrt() * y
    upper = torch.stack([root[i, j] for i in range(WIDTH) for j in range(i, WIDTH)]).float()
    return head.of_patches(upper) + head.of_video(v)


@torch.no_grad()
def test_videos_and_scores_by_loops():
    """Also: what is kept of a video does not depend on those beside it."""
    clip, method = built()
    kept, = method.video(FRAMES[:3])
    expected = torch.stack([vector_of(method, features_of(method, video)) for video in FRAMES[:3]])
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-4)
    texts = clip.texts(['d', 'b'], ['{}'])
    found = scores(method, FRAMES[:3], classes=(3, 1))
    named = method.logit_scale.exp() * F.cosine_similarity(expected[:, None], texts, dim=-1)
    torch.testing.assert_close(found, named, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_auxiliary_branch_by_loops():
    _, method = built()
    method.train().auxiliary.dropout.p = 0.0
    v, found = method.video(FRAMES[:3])
    expected = [auxiliary_of(method.auxiliary, features_of(method, video)[:, 1:], each) for video, each in zip(FRAMES, v)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('batch', BATCHES)
@pytest.mark.parametrize('candidates', ['all', 'batch'])
def test_the_loss_by_loops(batch, candidates):
    """Among the texts of the batch the truth of a video is its class's texts in equal parts."""
    clip, method = built(candidates=candidates, contrast=0.3)
    episode, videos = BATCHES[batch][0](), BATCHES[batch][1]
    true = episode.answers.flatten().tolist() if batch == 'closed' else FEW_SHOT_CLASSES
    with torch.no_grad():
        kept = method.train().video(FRAMES[:videos])
        loss, found = method.loss(kept, episode)
        logits = method.logit_scale.exp() * F.normalize(kept[0], dim=1) @ clip.texts(CLASSES, ['{}']).T
    expected = 0.0
    for i, c in enumerate(true):
        texts = CLASSES if candidates == 'all' else [CLASSES[k] for k in true]
        log_p = logits[i, [CLASSES.index(text) for text in texts]].log_softmax(0)
        right = [log_p[k] for k, text in enumerate(texts) if text == CLASSES[c]]
        expected -= (0.3 * sum(right) / len(right) + 0.7 * kept[1][i].log_softmax(0)[c]) / len(true)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    if batch == 'closed':
        torch.testing.assert_close(found[:, 0], logits)
    else:
        torch.testing.assert_close(found, torch.stack([logits[4:6][:, [2, 0]], logits[10:][:, [1, 3]]]))


def test_without_a_second_video_of_a_class_the_batch_is_told_apart_as_classes_are():
    logits, truth = torch.randn(4, 1, 4), torch.tensor([[2], [0], [3], [1]])
    torch.testing.assert_close(among_batch(logits, truth), F.cross_entropy(logits[:, 0], truth[:, 0]))
    assert among_batch(logits, torch.zeros_like(truth)).item() == pytest.approx(math.log(4))  # one class: all texts are right


# ---- Training

@pytest.mark.parametrize('batch', BATCHES)
@pytest.mark.parametrize('stage, zero_start', [(1, False), (2, False), (2, True)])
def test_a_step_trains_all_that_trains_and_leaves_clip(batch, stage, zero_start):
    clip, method = built(stage=stage, zero_start=zero_start)
    frozen = {key: value.clone() for key, value in clip.state_dict().items()}
    make, videos = BATCHES[batch]
    episode = make()
    seen = look(clip.visual, FRAMES[:videos], method.sees)
    loss, found = Step(method.train())(seen, episode)
    assert found.shape == (*episode.answers.shape, episode.classes.shape[1]) and loss.isfinite()
    loss.backward()
    trained = {key: p for key, p in method.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    parts = {key.split('.')[0] for key in trained}
    assert parts == {'end', 'auxiliary'} | ({'tower', 'messages', 'shifts', 'logit_scale'} if stage == 2 else set())
    optimizer = train.optimizer_of(dict(method='tws', lr=1e-3, weight_decay=0.0), method)
    assert sorted(id(p) for group in optimizer.param_groups for p in group['params']) == sorted(map(id, trained.values()))
    before = {key: p.detach().clone() for key, p in trained.items()}
    optimizer.step()  # AdamW's first step is as long as the rate
    trained.pop('auxiliary.temporal.block.mlp.c_proj.bias')  # it turns the covariance of nothing: its gradient is rounding
    for key, p in trained.items():
        rate = 8e-6 if key.startswith(('tower', 'logit_scale')) else 1e-2 if key.startswith('shifts') else 1e-3
        assert (p - before[key]).abs().max().item() == pytest.approx(rate, rel=0.1), key
    assert all(torch.equal(frozen[key], value) for key, value in clip.state_dict().items())


def test_answers_come_from_half_precision_and_the_auxiliary_branch_is_gone():
    _, method = built()
    method.auxiliary.forward = None  # calling it fails
    with torch.no_grad():
        kept = method.video(FRAMES)
        assert [x.shape for x in kept] == [(12, EMBED)]
        found = method.scores([x.half() for x in kept], in_test(12))
    torch.testing.assert_close(found[:, 0], scores(method), rtol=1e-2, atol=1e-2)


def test_dropout_acts_in_training_alone():
    _, method = built()
    with torch.no_grad():
        first, second = (method.train().video(FRAMES) for _ in range(2))
        assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
        torch.testing.assert_close(method.eval().video(FRAMES)[0], first[0])


def test_it_knows_the_order_of_frames():
    """By its messages, and by the end."""
    for part in ('shifts', 'end'):
        _, method = built()
        with torch.no_grad():
            if part == 'end':
                for tws in method.shifts:
                    tws.weight.zero_()
                    tws.bias.zero_()
            else:
                method.end.place.zero_()
        assert not torch.allclose(scores(method, FRAMES.flip(1)), scores(method), atol=1e-3)


def test_the_root_keeps_float32_under_autocast(monkeypatch):
    _, method = built()
    globals_ = type(method.auxiliary).forward.__globals__
    seen = []
    monkeypatch.setitem(globals_, 'square_root', lambda x, n: seen.append(x.dtype) or square_root(x, n))
    with torch.autocast('cpu', torch.bfloat16):
        loss, _ = Step(method.train())([FRAMES[:6]], closed())
    assert seen == [torch.float32] and loss.isfinite()


def test_it_compiles_in_one_graph():
    torch._dynamo.reset()
    _, method = built(clip=tiny_clip(layers=1), zero_start=True, candidates='batch')
    method.train().auxiliary.dropout.p = 0.0
    loss, _ = torch.compile(Step(method), fullgraph=True, backend='eager')([FRAMES[:6]], closed())
    torch.testing.assert_close(loss, Step(method)([FRAMES[:6]], closed())[0])


# ---- Starts

def clips_answer(clip, method):
    """Without training: the cosine of the mean of CLIP's frames with the texts."""
    image = look(clip.visual, FRAMES, ('image',))[0].mean(1)
    return clip.logit_scale.exp() * F.cosine_similarity(image[:, None], clip.texts(CLASSES, ['{}']), dim=-1)


def test_zero_start_is_clips_answer_and_leaves_it():
    clip, method = built(shaken=False, zero_start=True)
    torch.testing.assert_close(scores(method), clips_answer(clip, method), rtol=1e-5, atol=1e-4)
    _, random = built(shaken=False)
    assert not torch.allclose(scores(random), clips_answer(clip, method), atol=1e-2)
    optimizer = train.optimizer_of(dict(method='tws', lr=1e-3, weight_decay=0.0), method)
    for _ in range(2):
        optimizer.zero_grad()
        Step(method.train())([FRAMES[:6]], closed())[0].backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters() if p.requires_grad)
    assert not torch.allclose(scores(method.eval()), clips_answer(clip, method), atol=1e-3)


def test_a_gate_of_one_is_no_gate():
    _, open_ = built(zero_start=True)
    _, plain = built()
    with torch.no_grad():
        for tws in open_.shifts:
            tws.gate.fill_(1.0)
    plain.load_state_dict({key: x for key, x in open_.state_dict().items() if not key.endswith('gate')})
    torch.testing.assert_close(scores(open_), scores(plain))


def test_stage_1_is_clip_with_new_parts_after_it():
    clip, method = built(stage=1)
    assert method.sees == (2,) and not method.messages
    seen, = look(clip.visual, FRAMES, method.sees)
    image = look(clip.visual, FRAMES, ('image',))[0]
    expected = torch.stack([block_of(method.end.block, x + method.end.place).mean(0) for x in image])
    torch.testing.assert_close(method.video(seen)[0], expected, rtol=1e-4, atol=1e-4)
    fresh = built(stage=1, shaken=False, zero_start=True)[1]
    torch.testing.assert_close(scores(fresh, seen), clips_answer(clip, fresh), rtol=1e-5, atol=1e-4)


def test_stage_2_starts_where_stage_1_ended(tmp_path):
    clip, first = built(stage=1)
    clip.weights_hash, path = 'x', str(tmp_path / 'best.pt')
    checkpoint.save(path, first, clip, config_of(stage=1))
    _, second = built(shaken=False, clip=clip, start=path)
    for key, x in first.state_dict().items():
        if key.startswith(('end.', 'auxiliary.')):
            assert torch.equal(second.state_dict()[key], x), key
    assert torch.equal(second.tower.proj, clip.visual.proj) and second.messages[0].weight.requires_grad

    # a checkpoint of stage 2 holds all that it needs: it may be tested without the one of stage 1
    last, config = str(tmp_path / 'last.pt'), config_of(start=path)
    checkpoint.save(last, second, clip, config)
    again = checkpoint.rebuild(config | dict(start=''), clip, checkpoint.load(last), last)
    torch.testing.assert_close(scores(again), scores(second))
    assert 'start' in type(second).answering

    (tmp_path / 'text.pt').write_text('no checkpoint')
    stage = 'is no checkpoint of stage 1 .*width.$'
    for wrong, width, words in [(tmp_path / 'none.pt', WIDTH, "'$"), (last, WIDTH, f' {stage}'), (path, WIDTH + 1, f' {stage}'),
                                (tmp_path / 'text.pt', WIDTH, ' is no checkpoint of train.py: ')]:
        with pytest.raises(SystemExit, match=f'^method=tws: .*{wrong}{words}'):
            built(clip=clip, start=str(wrong), width=width)


# ---- Texts

def test_names_it_never_saw_and_ways_in_any_order():
    _, method = built()
    first = scores(method)
    renamed = scores(method, names=['a', 'never seen', 'c', 'd'])
    torch.testing.assert_close(renamed[:, [0, 2, 3]], first[:, [0, 2, 3]])
    assert not torch.allclose(renamed[:, 1], first[:, 1], atol=1e-3)
    torch.testing.assert_close(scores(method, classes=(3, 0)), first[:, [3, 0]])
    few = Episode(torch.tensor([0, 1]), torch.tensor([[3, 0]]), CLASSES, False, index=torch.tensor([[5, 6, 1, 2, 0]]))
    with torch.no_grad():
        torch.testing.assert_close(method.scores(method.video(FRAMES), few)[0], first[[1, 2, 0]][:, [3, 0]])  # queries alone


def test_descriptions(tmp_path):
    clip, plain = built()
    file = tmp_path / 'descriptions.tsv'
    file.write_text('d\tone word\n\n' + ''.join(f'{name}\t{name} is seen\n' for name in 'abc'))
    described = built(clip=clip, descriptions=str(file))[1]
    video = plain.video(FRAMES)[0]
    texts = clip.texts(['a is seen', 'b is seen', 'c is seen', 'one word'], ['{}'])
    expected = plain.logit_scale.exp() * F.cosine_similarity(video[:, None], texts, dim=-1)
    torch.testing.assert_close(scores(described), expected)
    assert 'descriptions' in type(plain).answering
    with pytest.raises(SystemExit, match="descriptions.tsv has no line for the class 'e'"):
        scores(described, names=['a', 'e'])

    for content, said in [('a\tb\n', "no line for the class 'b'"), ('', "no line for the class 'a'"),
                          ('a b\n', r"lines must be class<TAB>sentence, not \['a b'\]"),
                          (''.join(f'{name}\t{30 * name}\n' for name in CLASSES), 'Text of 32 tokens, longer than 24')]:
        file.write_text(content)
        with pytest.raises(SystemExit, match=said):
            built(clip=clip, descriptions=str(file))
    with pytest.raises(SystemExit, match='nowhere.tsv'):
        built(clip=clip, descriptions=str(tmp_path / 'nowhere.tsv'))


def test_clips_it_cannot_stand_beside():
    with pytest.raises(SystemExit, match='image tower alone'):
        built(clip=tiny_clip(vocab_size=None))
    with pytest.raises(SystemExit, match='16 wide'):
        built(clip=tiny_clip(16))


def test_help_has_a_comment_for_each_option(capsys):
    with pytest.raises(SystemExit):
        load_config(['--method=tws', '--help'], script=SimpleNamespace(__doc__='', __file__=train.__file__))
    own = capsys.readouterr().out.partition('of the method tws:\n')[2].partition('\n\n')[0].splitlines()
    assert len(own) == len(find_method('tws')[0].options) and all(line[33:].strip() for line in own)
