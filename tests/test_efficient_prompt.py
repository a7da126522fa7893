"""Efficient-Prompt: its texts against CLIP's own and a slow reference, its frames by hand, what trains and what it answers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import train
from clip_loader import CLIP, Tokenizer, load_clip
from config import find_method, load_config
from model import Episode, Step, look, trainable_state

ROOT = Path(__file__).resolve().parent.parent
T, DIM, PLACES = 4, 16, 24
CLASSES = ['run', 'brush_hair', 'ApplyEyeMakeup', 'hop']
SMALL = dict(prefix=3, postfix=2)


def tiny_clip(dim=DIM, text_width=64, places=PLACES):
    torch.manual_seed(0)
    return CLIP(32, 16, 64, 2, dim, 514, places, text_width, 2).eval().requires_grad_(False)


def built(clip=None, names=CLASSES, **options):
    """A method beside a tiny CLIP, with weights as after some training."""
    clip = clip or tiny_clip()
    method = find_method('efficient_prompt')[0](clip, names, configured(**options))
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return clip, method.eval()


def configured(**options):
    return load_config(['--method=efficient_prompt', '--device=cpu', f'--frames={T}']) | SMALL | options


def features(videos, seed=1):
    return torch.randn(videos, T, DIM, generator=torch.Generator().manual_seed(seed))


def closed(answers, names=CLASSES, index=None):
    """Videos (E,), each alone with all names: no supports, one query."""
    count = len(answers)
    return Episode(torch.zeros(0, dtype=torch.int64), torch.arange(len(names)).expand(count, -1), list(names), True,
                   torch.tensor(answers)[:, None], index)


def few_shot():
    """Two episodes, 2-way 2-shot with one query a class."""
    return Episode(torch.tensor([0, 0, 1, 1]), torch.tensor([[2, 0], [1, 3]]), CLASSES, answers=torch.tensor([[0, 1]] * 2))


def text_of(clip, names):
    """CLIP's own features of names."""
    return clip.encode_text(Tokenizer()(names, clip.context_length))


# ---- Texts

def test_without_vectors_it_is_clip():
    """Names of unequal lengths, one of the 22 tokens that go in at most; and the cosines of zero_shot, but for the factor."""
    names = ['run', 'brush hair', 'apply eye makeup', 'a' * 22]
    clip, method = built(names=names, prefix=0, postfix=0, layers=0)
    assert not any(p.requires_grad for p in method.parameters())
    torch.testing.assert_close(method.encode(names), text_of(clip, names))

    seen = features(5)
    ways = closed([0] * 5, names, torch.arange(5)[:, None])
    found = method.scores(method.video(seen), ways)
    cosines = F.normalize(seen.mean(1), dim=1) @ F.normalize(text_of(clip, names), dim=1).T
    torch.testing.assert_close(found[:, 0], cosines / 0.07)
    zero_shot = find_method('zero_shot')[0](clip, names, dict(templates=['{}']))
    alike = F.normalize(seen, dim=-1)  # frames of one length: zero_shot gives all of them the same weight
    torch.testing.assert_close(method.scores(method.video(alike), ways), zero_shot.scores(zero_shot.video(alike), ways) / 7)


@torch.no_grad()
def slow_text(clip, method, name, prefix, filler):
    """The text of one name, place by place up to the last that CLIP has; `filler` stands behind the end."""
    tokenizer, word = Tokenizer(), clip.token_embedding.weight
    rows = [word[tokenizer.sot], *method.vectors[:prefix], *word[tokenizer.encode(name)], *method.vectors[prefix:]]
    end = len(rows)
    rows = [*rows, word[tokenizer.eot], *filler[:PLACES - end - 1]]
    x = torch.stack([row + place for row, place in zip(rows, clip.positional_embedding)])  # (PLACES, 64)
    for block in clip.transformer.resblocks:
        h, attn = block.ln_1(x), block.attn
        q, k, v = (h @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, 1)  # one head
        new = [((q[i] @ k[:i + 1].T / 8).softmax(0) @ v[:i + 1]) for i in range(PLACES)]
        x = x + attn.out_proj(torch.stack(new))
        x = x + block.mlp(block.ln_2(x))
    return clip.ln_final(x[end]) @ clip.text_projection


@pytest.mark.parametrize('prefix, postfix', [(3, 2), (0, 4), (5, 0)])
def test_texts_place_by_place(prefix, postfix):
    """Vectors, words, vectors, end; the feature is the end's, and what stands behind it is not seen."""
    clip, method = built(prefix=prefix, postfix=postfix)
    assert method.vectors.shape == (prefix + postfix, 64)
    expected = [slow_text(clip, method, name, prefix, torch.randn(PLACES, 64))
                for name in ('run', 'brush hair', 'apply eye makeup', 'hop')]
    found = method.encode(CLASSES)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    for i, name in enumerate(CLASSES):  # whatever the other names, and however long they are
        torch.testing.assert_close(method.encode([name])[0], found[i], rtol=1e-4, atol=1e-5)


def test_names_it_never_trained_on_get_the_same_vectors():
    clip, method = built()
    new = ['jump high', 'hop']
    found = method.texts(new)
    torch.testing.assert_close(found[0], slow_text(clip, method, 'jump high', 3, torch.zeros(PLACES, 64)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], method.texts(CLASSES)[3], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_vector_and_nothing_of_clip():
    clip, method = built()
    method.train().texts(CLASSES).square().sum().backward()
    assert (method.vectors.grad.abs().sum(1) > 0).all()
    assert all(p.grad is None for p in clip.parameters())


def test_the_text_tower_runs_once_a_step_and_once_a_test():
    clip, method = built()
    runs = []
    clip.transformer.register_forward_hook(lambda module, given, out: runs.append(len(out)))
    seen, step = features(6), Step(method.train())
    for _ in range(2):
        step([seen], closed([0, 1, 2, 3, 0, 1]))
    assert runs == [4, 4]  # all names, whatever the number of videos

    method.eval()
    kept, ways = method.video(seen), closed([0] * 6, index=torch.arange(6)[:, None])
    first = method.scores(kept, ways)
    assert torch.equal(method.scores(kept, ways), first) and runs == [4, 4, 4]
    other = method.scores(kept, closed([0] * 6, CLASSES[:3] + ['jump'], torch.arange(6)[:, None]))
    assert runs == [4, 4, 4, 4] and torch.equal(first.isclose(other).all(0)[0], torch.tensor([True, True, True, False]))
    assert not method.texts(CLASSES).requires_grad

    with torch.no_grad():  # a step of training between two tests
        method.train().vectors.neg_()
    changed = method.eval().scores(kept, ways)
    assert not torch.allclose(changed, first, atol=1e-3)
    with torch.no_grad():  # a checkpoint restored between two
        method.vectors.neg_()
    torch.testing.assert_close(method.eval().scores(kept, ways), first)


def test_names_that_are_too_long_are_refused_by_name():
    fits, too_long = 'a' * 17, 'b' * 18  # 3 + 2 vectors, start and end
    clip, method = built(names=['run', fits])
    torch.testing.assert_close(method.encode([fits])[0], slow_text(clip, method, fits, 3, []), rtol=1e-4, atol=1e-5)
    message = f"The class '{too_long}' between prefix=3 and postfix=2 is 25 tokens; CLIP reads 24. Lower these two"
    with pytest.raises(ValueError, match=message):
        built(names=['run', too_long])
    with pytest.raises(ValueError, match=message):
        method.texts([too_long])
    with pytest.raises(SystemExit, match="efficient_prompt: The class 'a name' between prefix=16 and postfix=16 is 39"):
        checkpoint.build(configured(prefix=16, postfix=16), clip, [])
    with pytest.raises(ValueError, match='text tower'):
        built(CLIP(32, 16, 64, 2, DIM))
    with pytest.raises(ValueError, match='8 heads'):
        built(tiny_clip(dim=12))
    built(tiny_clip(dim=12), layers=0)


def test_the_demos_names_fit_with_8_and_8():
    """23 places beside the longest of them, 47 tokens and start and end, of 72."""
    clip = load_clip(str(ROOT / 'demo/tiny_clip.pt'))
    splits = load_config([str(ROOT / 'sample_configs/moving_shapes.py'), '--method=zero_shot'])['splits']
    names = [name for groups in splits.values() for group in groups for name in group]
    for prefix, postfix in ((8, 8), (11, 12)):
        built(clip, names, prefix=prefix, postfix=postfix)
    with pytest.raises(ValueError, match='move right and spin counter-clockwise'):
        built(clip, names, prefix=12, postfix=12)


# ---- Frames

@torch.no_grad()
def test_frames_by_hand():
    """Two blocks of eight heads, PyTorch's attention and QuickGELU spelled out, and their mean."""
    _, method = built(layers=2)
    seen = features(3)
    x = seen + method.time
    for block in method.transformer.resblocks:
        h, attn = F.layer_norm(x, (DIM,), block.ln_1.weight, block.ln_1.bias).transpose(0, 1), block.attn  # (T, V, D)
        h, _ = F.multi_head_attention_forward(h, h, h, DIM, 8, attn.in_proj_weight, attn.in_proj_bias, None, None, False, 0.0,
                                              attn.out_proj.weight, attn.out_proj.bias)
        x = x + h.transpose(0, 1)
        h = block.mlp.c_fc(F.layer_norm(x, (DIM,), block.ln_2.weight, block.ln_2.bias))
        x = x + block.mlp.c_proj(h * torch.sigmoid(1.702 * h))
    torch.testing.assert_close(method.video(seen)[0], x.mean(1))
    assert not torch.allclose(method.video(seen.flip(1))[0], x.mean(1), atol=1e-3)
    torch.testing.assert_close(built(layers=0)[1].video(seen)[0], seen.mean(1))


def test_parameters_at_real_sizes_and_their_start():
    clip = tiny_clip(512, 512, 77)
    for layers in (0, 1, 3):
        method = find_method('efficient_prompt')[0](clip, CLASSES, configured(prefix=16, postfix=16, layers=layers, frames=16))
        trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
        assert trained['vectors'].numel() == 16_384
        places = 16 * 512 if layers else 0
        assert sum(p.numel() for p in trained.values()) == 16_384 + places + layers * 3_152_384
        assert not any(name.startswith('clip.') for name in trainable_state(method))
    assert method.vectors.std().item() == pytest.approx(0.01, rel=0.05)
    assert method.time.std().item() == pytest.approx(0.01, rel=0.05)
    theirs = torch.nn.MultiheadAttention(512, 8)
    for block in method.transformer.resblocks:
        for ours, published in ((block.attn.in_proj_weight, theirs.in_proj_weight),
                                (block.attn.out_proj.weight, theirs.out_proj.weight)):
            assert ours.abs().max().item() == pytest.approx(published.abs().max().item(), rel=0.01)
    options = find_method('efficient_prompt')[0].options
    assert options == dict(prefix=16, postfix=16, layers=1, temp=pytest.approx(100 / 7))


# ---- Steps and answers

def step_and_check(ways, videos, **options):
    clip, method = built(**options)
    frozen = {key: value.clone() for key, value in clip.state_dict().items()}
    optimizer = train.optimizer_of(dict(method='efficient_prompt', lr=1e-2, weight_decay=0.01), method)
    seen = look(clip.visual, torch.randint(256, (videos, T, 3, 32, 32), dtype=torch.uint8), method.sees)
    shown = seen[0].clone()
    loss, answer = Step(method.train())(seen, ways)
    loss.backward()
    trained = {key: p for key, p in method.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    before = {key: p.clone() for key, p in trained.items()}
    optimizer.step()
    assert not any(torch.equal(before[key], p) for key, p in trained.items())
    assert all(torch.equal(frozen[key], value) for key, value in clip.state_dict().items())
    assert torch.equal(shown, seen[0])
    after, _ = Step(method)(seen, ways)
    assert after < loss
    return loss, answer


@pytest.mark.parametrize('options', [{}, dict(layers=0), dict(prefix=0, postfix=0)])
def test_a_step_trains_all_that_trains_over_all_classes(options):
    loss, answer = step_and_check(closed([2, 0, 1, 3, 3, 0]), 6, **options)
    assert answer.shape == (6, 1, 4)
    torch.testing.assert_close(loss, F.cross_entropy(answer[:, 0], torch.tensor([2, 0, 1, 3, 3, 0])))


def test_a_step_trains_all_that_trains_over_the_ways_of_episodes():
    loss, answer = step_and_check(few_shot(), 12)
    assert answer.shape == (2, 2, 2)
    torch.testing.assert_close(loss, F.cross_entropy(answer.flatten(0, 1), torch.tensor([0, 1, 0, 1])))


def test_answers_are_of_queries_and_ways_alone():
    """With supports and without; names of a few-shot episode are picked from all; kept in half precision it is the same."""
    _, method = built()
    seen = features(8)
    kept = method.video(seen)
    cosines = F.normalize(kept[0], dim=1) @ F.normalize(method.texts(CLASSES), dim=1).T / 0.07  # (8, 4)
    index = torch.tensor([[3], [0], [7]])
    with torch.no_grad():
        torch.testing.assert_close(method.scores(kept, closed([0] * 3, index=index)), cosines[index])
        ways = Episode(torch.tensor([0, 1, 1]), torch.tensor([[2, 0], [1, 3]]), CLASSES, False,
                       index=torch.tensor([[0, 1, 2, 5, 4], [7, 6, 5, 4, 3]]))
        found = method.scores(kept, ways)
        torch.testing.assert_close(found, torch.stack([cosines[[5, 4]][:, [2, 0]], cosines[[4, 3]][:, [1, 3]]]))
        torch.testing.assert_close(method.scores([x.half() for x in kept], ways), found, rtol=1e-2, atol=1e-2)
        other = torch.cat([features(3, seed=2), seen[3:]])
        torch.testing.assert_close(method.scores(method.video(other), ways)[0], found[0])  # other supports


def test_autocast_leaves_answers_in_float32():
    _, method = built()
    seen = features(4)
    ways = closed([0] * 4, index=torch.arange(4)[:, None])
    exact = method.scores(method.video(seen), ways)
    with torch.autocast('cpu', torch.bfloat16):
        kept = method.eval().video(seen.bfloat16())
        found = method.scores(kept, ways)
    assert kept[0].dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.3)


def test_a_checkpoint_holds_what_trains_and_brings_the_answers_back(tmp_path):
    config, clip = configured(), tiny_clip()
    _, method = built(clip)
    method.names, clip.weights_hash, path = CLASSES, 'x', str(tmp_path / 'best.pt')
    checkpoint.save(path, method, clip, config)
    saved = checkpoint.load(path)
    assert {name.split('.')[0] for name in saved['model']} == {'vectors', 'time', 'transformer'}
    again = checkpoint.rebuild(config, clip, saved, path)
    seen, ways = features(4), closed([0] * 4, index=torch.arange(4)[:, None])
    torch.testing.assert_close(again.scores(again.video(seen), ways), method.scores(method.video(seen), ways))


def test_help_has_a_comment_for_each_option(capsys):
    with pytest.raises(SystemExit):
        load_config(['--method=efficient_prompt', '--help'], script=train)
    own = capsys.readouterr().out.partition('of the method efficient_prompt:\n')[2].partition('\n\n')[0].splitlines()
    assert len(own) == 4 and all(line[33:].strip() for line in own)
