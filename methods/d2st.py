"""D2ST-Adapter (ICCV 2025): behind CLIP's last blocks, adapters in which every token looks at 32 points of the whole video.

In one path the points lie dense in space, in the other dense in time, and each learns where to move them for a video. Bi-MHM
compares the sets of frames. Left out: CLIP's class embedding, which trains too as published.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from methods.hyrsm import bi_mhm
from model import cosine, cross_entropy, last_blocks

GROUPS = 4  # of channels: each is a head, and moves the points its own way


def interpolation(places, sizes):
    """Places (..., P, 3), -1 the first cell of an axis and 1 the last -> how much of each cell a point is made of, (..., P,
    cells): trilinear, nothing outside. Bit-equal on CUDA when run again, which the gradient of F.grid_sample is not."""
    shares = []
    for place, size in zip(places.unbind(-1), sizes):
        cell = (place.unsqueeze(-1) + 1) / 2 * (size - 1)  # (..., P, 1), from 0 to size - 1
        shares.append((1 - (cell - torch.arange(size, device=place.device)).abs()).relu())
    return torch.einsum('...t,...h,...w->...thw', *shares).flatten(-3)


class Deformable(nn.Module):
    """All tokens of a video attend to P points among its patches, of which there are `counts` along each axis (t, h, w)."""

    def __init__(self, dim, sizes, counts, offsets):
        super().__init__()
        counts = [min(n, size) for n, size in zip(counts, sizes)]
        self.sizes, self.offsets = sizes, offsets
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        centres = torch.cartesian_prod(*((torch.arange(n) + 0.5) / n * 2 - 1 for n in counts))  # of equal cells, (P, 3)
        self.register_buffer('centres', centres, persistent=False)
        self.register_buffer('reach', torch.tensor([min(1, 2 / n) for n in counts]), persistent=False)
        if offsets:
            part = dim // GROUPS
            strides = [size // n for n, size in zip(counts, sizes)]
            kernels = [size - (n - 1) * stride for n, size, stride in zip(counts, sizes, strides)]
            self.around = nn.Conv3d(part, part, kernels, strides, groups=part)  # what lies around each point
            self.move = nn.Sequential(nn.LayerNorm(part), nn.GELU(), nn.Linear(part, 3, bias=False), nn.Tanh())

    def places(self, q):
        """The patches' queries (V, groups, T*L, C/groups) -> where each group's points lie (V, groups, P, 3)."""
        volume = q.transpose(2, 3).flatten(0, 1).unflatten(2, self.sizes)  # (V*groups, C/groups, T, H, W)
        moved = self.move(self.around(volume).flatten(2).transpose(1, 2))  # (V*groups, P, 3), from -1 to 1
        return self.centres + self.reach * moved.unflatten(0, q.shape[:2])

    def forward(self, x):
        """(V, T, 1+L, C) -> the same."""
        def by_group(tokens):
            return tokens.unflatten(-1, (GROUPS, -1)).transpose(1, 2)  # (V, groups, tokens, C/groups)

        q = self.q(x)
        places = self.places(by_group(q[:, :, 1:].flatten(1, 2))) if self.offsets else self.centres  # (..., P, 3)
        points = interpolation(places, self.sizes).to(x) @ by_group(x[:, :, 1:].flatten(1, 2))
        points = points.transpose(1, 2).flatten(2)  # (V, P, C)
        found = F.scaled_dot_product_attention(by_group(q.flatten(1, 2)), by_group(self.k(points)), by_group(self.v(points)))
        return self.out(found.transpose(1, 2).flatten(2)).view_as(x)


class Adapter(nn.Module):
    """A bottleneck with a depthwise convolution and both paths; a new one changes nothing."""

    def __init__(self, dim, frames, grid, offsets):
        super().__init__()
        width, self.sizes = dim // 4, (frames, grid, grid)
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.conv = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.paths = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), Deformable(width, self.sizes, counts, offsets))
                                   for counts in ((2, 4, 4), (frames, 2, 2)))  # dense in space, dense in time

    def forward(self, x):
        """(V, T, 1+L, D) -> the same."""
        h = F.gelu(self.down(x))
        volume = h[:, :, 1:].flatten(1, 2).transpose(1, 2).unflatten(2, self.sizes)  # (V, D/4, T, H, W)
        near = self.conv(volume).flatten(3).permute(0, 2, 3, 1)  # (V, T, L, D/4)
        h = h + F.pad(near, (0, 0, 1, 0))  # nothing for the class token
        return x + F.gelu(self.up(F.gelu(h + sum(path(h) for path in self.paths) / 2)))


class Method(nn.Module):
    options = dict(
        levels=4,               # last blocks with an adapter behind them; published: all
        offsets=True,           # False: the points stay where they are
        auxiliary=0.5,          # weight of the loss that tells a video's class among all training classes; published: 0 to 2.5
    )

    def __init__(self, clip, names, config):
        super().__init__()
        visual, frames = clip.visual, config['frames']
        blocks, dim = last_blocks(visual, config['levels']), visual.proj.shape[0]
        self.sees, self.auxiliary = (len(visual.transformer.resblocks) - len(blocks),), config['auxiliary']
        self.blocks = blocks
        self.place = nn.Parameter(torch.zeros(frames, 1, dim))  # of a frame in time
        self.adapters = nn.ModuleList(Adapter(dim, frames, visual.grid, config['offsets']) for _ in blocks)
        self.ln_post = copy.deepcopy(visual.ln_post).float().requires_grad_()
        self.classify = nn.Linear(dim, len(names))

    def video(self, x):
        """Tokens (V, T, 1+L, D) -> the class token of each frame after the last block and adapter (V, T, D)."""
        x = x + self.place.to(x)
        for block, adapter in zip(self.blocks, self.adapters):
            x = adapter(block(x.flatten(0, 1)).view_as(x))
        return (self.ln_post(x[:, :, 0]),)

    def scores(self, kept, episode):
        """Minus the distance of a query's set of frames to each class's, whose supports are averaged frame by frame."""
        support, query = episode.split(episode.take(kept[0]))  # (E, S, T, D), (E, M, T, D)
        return -bi_mhm(1 - cosine(query.unsqueeze(2), episode.by_class(support).unsqueeze(1)))

    def loss(self, kept, episode):
        """The cross-entropy of the scores, and that of every video's class among all training classes."""
        scores, logits = self.scores(kept, episode), self.classify(episode.take(kept[0]).mean(2))  # (E, B, training classes)
        return cross_entropy(scores, episode.answers) + self.auxiliary * cross_entropy(logits, episode.truth()), scores
