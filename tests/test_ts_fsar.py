"""TS-FSAR with its texts: published size, golden values of its losses and of its fused answer, and what must not matter."""

import pytest
import torch
import torch.nn.functional as F

import checkpoint
from clip_loader import CLIP
from config import load_config
from methods.ts_fsar import Method, distilled
from model import Episode, Step

NAMES = ['a', 'b', 'c']
TEMPLATES = load_config(['--device=cpu'])['templates']


def built(**options):
    torch.manual_seed(0)
    clip = CLIP(32, 16, 64, 2, 16, vocab_size=514, context_length=24, text_width=64, text_layers=1).requires_grad_(False)
    config = load_config(['--method=ts_fsar', '--device=cpu', '--frames=4', '--levels=2', '--width=64'])
    return clip, checkpoint.build(config | options, clip, NAMES).eval()


def seen(videos):
    return [torch.randn(videos, 4, 5, 64), torch.randn(videos, 4, 5, 64), torch.randn(videos, 4, 16)]


def few_shot(videos, classes=(2, 0)):
    return Episode(torch.tensor([0, 1, 1]), torch.tensor([classes]), NAMES, False, index=torch.arange(videos)[None])


def test_published_size(monkeypatch):
    """With 64 training classes at ViT-B/16; the text tower makes no difference, so a small one stands in."""
    monkeypatch.setattr(Method, 'texts', lambda self, names: None)  # it would read values
    with torch.device('meta'):
        clip = CLIP(224, 16, 768, 12, 512, 514, 24, 64, 1).requires_grad_(False)
        method = Method(clip, [str(i) for i in range(64)], load_config(['--method=ts_fsar', '--device=cpu']))
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == 15_357_964


def test_distilled_golden_value():
    logits, teacher = torch.tensor([[1., 0, -1], [0, 2, 1]]), torch.tensor([[2., 1, 0], [0, 0, 3]], requires_grad=True)
    found = distilled(logits, teacher, 4.0)
    found.backward()
    assert found.item() == pytest.approx(0.718963, abs=1e-6) and teacher.grad.any()


def test_fusion_golden_value(monkeypatch):
    """softmax[1, 0, 0] ** .5 * softmax[0, 2, 0] ** .1 * softmax[0, 0, .5] ** .4"""
    _, method = built(fusion=[0.5, 0.1, 0.4], temp=1.0)
    monkeypatch.setattr(method.base, 'scores', lambda kept, episode: torch.tensor([[[1., 0, 0]]]))
    monkeypatch.setattr(method, 'texts', lambda names: torch.eye(3))
    episode = Episode(torch.arange(3), torch.arange(3)[None], NAMES, False, index=torch.arange(4)[None])
    clip, ladder = torch.zeros(4, 3), torch.zeros(4, 3)
    clip[3, 1], ladder[3, 2] = 2.0, 0.5
    found = method.scores((torch.zeros(4, 1), torch.zeros(4, 1), clip, ladder), episode)
    assert found.exp().flatten().tolist() == pytest.approx([0.361524, 0.267823, 0.267823], abs=1e-6)


@torch.no_grad()
def test_without_texts_the_answer_is_the_ladders_and_queries_do_not_see_each_other():
    _, method = built()
    x = seen(7)
    scores = method.scores(method.video(*x), few_shot(7))
    base = method.base
    expected = base.scores(base.video(*x[:2]), few_shot(7)).log_softmax(-1)
    torch.testing.assert_close(scores, expected)
    _, fused = built(fusion=[0.4, 0.3, 0.3])
    whole, part = (fused.scores(fused.video(*(y[:count] for y in x)), few_shot(count)) for count in (7, 5))
    torch.testing.assert_close(whole[:, :2], part)
    assert (whole - scores).abs().max() > 1e-3
    other = fused.scores(fused.video(*x), few_shot(7, (1, 0)))
    assert (other - whole)[..., 0].abs().max() > 1e-3  # another name


def test_all_that_trains_has_a_gradient_and_the_loss_is_its_parts():
    clip, method = built(of_channels=3.0, of_ladder=0.5, distill=0.2, soften=2.0)
    x, answers = seen(5), torch.tensor([[1, 0]])
    episode = Episode(torch.tensor([0, 1, 1]), torch.tensor([[2, 0]]), NAMES, answers=answers)
    loss, scores = torch.compile(Step(method), fullgraph=True, backend='eager')(x, episode)
    loss.backward()
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in clip.parameters())
    frames, channels, by_clip, by_ladder = method.video(*x)
    truth, texts = torch.tensor([2, 0, 0, 0, 2]), clip.texts(NAMES, TEMPLATES)
    torch.testing.assert_close(by_ladder.norm(dim=-1), torch.ones(5))
    channels, by_clip, by_ladder = method.classify(channels.mean(1)), 50 * by_clip @ texts.T, 50 * by_ladder @ texts.T
    teacher, student = (by_clip / 2).softmax(-1), (channels / 2).softmax(-1)
    learned = 4 * (teacher * (teacher / student).log()).sum() / 5
    expected = (F.cross_entropy(scores[0], answers[0]) + 3 * F.cross_entropy(channels, truth)
                + 0.5 * F.cross_entropy(by_ladder, truth) + 0.2 * (learned + F.cross_entropy(by_clip, truth)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_descriptions_stand_for_names(tmp_path):
    file = tmp_path / 'descriptions.txt'
    file.write_text('a\tlong a\nb\tlong b\nc\tlong c\n')
    clip, method = built(descriptions=str(file))
    torch.testing.assert_close(method.texts(['c', 'a']), clip.texts(['long c', 'long a'], TEMPLATES))
    with pytest.raises(ValueError, match="no line for the class 'd'"):
        method.texts(['a', 'd'])
    with pytest.raises(SystemExit, match='three exponents'):
        built(fusion=[1.0])
    assert load_config(['--method=ts_fsar', '--device=cpu', '--fusion=[1,0,0.5]'])['fusion'] == [1.0, 0.0, 0.5]
    with pytest.raises(SystemExit, match='must be a list of numbers'):
        load_config(['--method=ts_fsar', '--device=cpu', '--fusion=["a"]'])

