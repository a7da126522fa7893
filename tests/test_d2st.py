"""D2ST-Adapter: published sizes, the sampler against PyTorch's, a fresh one that changes nothing, and what must not matter."""

import pytest
import torch
import torch.nn.functional as F

import checkpoint
from clip_loader import CLIP
from config import load_config
from methods.d2st import Adapter, Deformable, interpolation
from methods.hyrsm import bi_mhm
from model import Episode, Step, look

NAMES = list('abcd')


def built(trained=True, **options):
    torch.manual_seed(0)
    clip = CLIP(64, 16, 64, 4, 16).requires_grad_(False)
    config = load_config(['--method=d2st', '--device=cpu', '--frames=8', '--levels=2'])
    method = checkpoint.build(config | options, clip, NAMES)
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad and trained:
                p.add_(0.1 * torch.randn_like(p))
    return clip, method.eval()


def test_published_size():
    with torch.device('meta'):
        assert sum(p.numel() for p in Adapter(768, 8, 14, True).parameters()) == 606_192


@pytest.mark.parametrize('grid, counts, kernels, strides', [
    (14, (2, 4, 4), (4, 5, 5), (4, 3, 3)), (14, (8, 2, 2), (1, 7, 7), (1, 7, 7)),
    (7, (2, 4, 4), (4, 4, 4), (4, 1, 1)), (7, (8, 2, 2), (1, 4, 4), (1, 3, 3)),
    (16, (2, 4, 4), (4, 4, 4), (4, 4, 4)), (16, (8, 2, 2), (1, 8, 8), (1, 8, 8))])
def test_32_points(grid, counts, kernels, strides):
    """Those of ViT-B/16, B/32 and L/14, and how far each may be moved."""
    path = Adapter(64, 8, grid, True).paths[counts[0] == 8][1]
    assert (path.around.kernel_size, path.around.stride) == (kernels, strides)
    assert path.around(torch.zeros(1, 4, 8, grid, grid)).shape[2:] == counts and len(path.centres) == 32
    assert path.reach.tolist() == ([1, .5, .5] if counts[0] == 2 else [.25, 1, 1])


@pytest.mark.parametrize('size, n, index', [(8, 2, [1.75, 5.25]), (14, 4, [1.625, 4.875, 8.125, 11.375]), (14, 2, [3.25, 9.75]),
                                            (8, 8, [0.4375, 1.3125, 2.1875, 3.0625, 3.9375, 4.8125, 5.6875, 6.5625])])
def test_centres_by_hand(size, n, index):
    """A volume whose cells hold their own index along one axis, read at the centres."""
    path = Deformable(16, (size, 4, 4), (n, 1, 1), False)
    found = interpolation(path.centres, (size, 4, 4)) @ torch.arange(size).repeat_interleave(16).float()
    torch.testing.assert_close(found, torch.tensor(index))


def test_interpolation_is_grid_sample():
    """At any places, outside too, with its gradients."""
    torch.manual_seed(0)
    sizes, places = (3, 4, 5), (2.6 * torch.rand(2, 7, 3, dtype=torch.float64) - 1.3).requires_grad_()
    volume = torch.randn(2, 6, *sizes, dtype=torch.float64, requires_grad=True)
    ours = interpolation(places, sizes) @ volume.flatten(2).transpose(1, 2)  # (2, 7, 6)
    other = F.grid_sample(volume, places.flip(-1)[:, :, None, None], align_corners=True)[..., 0, 0].transpose(1, 2)
    torch.testing.assert_close(ours, other)
    for one, two in zip(*(torch.autograd.grad(x.square().sum(), (places, volume)) for x in (ours, other))):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize('offsets', [True, False])
def test_a_fresh_one_changes_nothing(offsets):
    clip, method = built(trained=False, offsets=offsets)
    frames = torch.randint(256, (3, 8, 3, 64, 64), dtype=torch.uint8)
    blocks = clip.visual.transformer.resblocks
    x, = look(clip.visual, frames, method.sees)
    expected = clip.visual.ln_post(blocks[3](blocks[2](x.flatten(0, 1)))[:, 0]).view(3, 8, 64)
    assert torch.equal(method.video(x)[0], expected)


def test_every_token_sees_the_whole_video():
    _, method = built()
    x = torch.randn(2, 8, 17, 64, requires_grad=True)
    adapter = method.adapters[0]
    adapter(x)[0, 0, 0].sum().backward()  # frame 0's class token
    assert (x.grad[0, :, 1:].abs().sum((-1, -2)) > 0).all()  # all frames
    assert x.grad[1].abs().sum() == 0  # not another video


def test_points_that_stay_are_points_moved_by_nothing():
    _, free = built()
    _, fixed = built(offsets=False)
    fixed.load_state_dict(free.state_dict(), strict=False)
    seen = torch.randn(2, 8, 17, 64)
    assert (free.video(seen)[0] - fixed.video(seen)[0]).abs().max() > 1e-3
    for adapter in free.adapters:
        for path in adapter.paths:
            torch.nn.init.zeros_(path[1].move[2].weight)
    torch.testing.assert_close(free.video(seen)[0], fixed.video(seen)[0])


@pytest.mark.parametrize('offsets', [True, False])
def test_all_that_trains_has_a_gradient(offsets):
    _, method = built(offsets=offsets)
    episode = Episode(torch.tensor([0, 0, 1, 1]), torch.tensor([[2, 0], [1, 3]]), NAMES, answers=torch.tensor([[0, 1]] * 2))
    loss, scores = torch.compile(Step(method), fullgraph=True, backend='eager')([torch.randn(12, 8, 17, 64)], episode)
    loss.backward()
    assert scores.shape == (2, 2, 2)
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in method.blocks.parameters())


def test_supports_are_averaged_and_a_set_has_no_order():
    _, method = built()
    kept = torch.randn(5, 8, 64)
    episode = Episode(torch.tensor([0, 0, 1]), torch.tensor([[2, 0]]), NAMES, False, index=torch.arange(5)[None])
    scores = method.scores((kept,), episode)
    classes = torch.stack([kept[:2].mean(0), kept[2]])
    expected = [[-bi_mhm(1 - F.cosine_similarity(query[:, None], one[None], dim=-1)) for one in classes] for query in kept[3:]]
    torch.testing.assert_close(scores[0], torch.tensor(expected))
    torch.testing.assert_close(method.scores((torch.cat([kept[:3], kept[3:].flip(1)]),), episode), scores)
    assert bi_mhm(1 - torch.tensor([[.9, .3], [.6, .8]])).item() == pytest.approx(0.6)
