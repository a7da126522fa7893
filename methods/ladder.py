"""TS-FSAR (AAAI 2026): a narrow network climbs CLIP's levels as a ladder, and each query has its own matching of frames.

Left out are the published losses on texts and on training classes; and side blocks start at random, not as CLIP's made narrow.
"""

import torch
import torch.nn.functional as F
from torch import nn

from methods.hyrsm import bi_mhm
from model import Block


class Ladder(nn.Module):
    """What CLIP shows of some last levels, each (V, T, 1+L, D) -> tokens (V, T, 1+L, d).

    u_i = W_i LN_i(level i);  s_0 = u_0;  s_i = g_i Side_i(s_{i-1}) + (1 - g_i) u_i,  g_i = sigmoid(gamma_i / 0.1)

    Each block of CLIP that is seen has a side block; level 0, what enters the first, has none and starts the ladder. Where it
    is not seen, the first level that is starts it and comes in a second time. Nothing in it knows the order of frames.
    """

    def __init__(self, dim, width, sees, depth):
        super().__init__()
        blocks = [m for m in sees if m > 0]
        self.downs = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width, bias=False)) for _ in sees)
        self.sides = nn.ModuleList(Block(width, 'gelu') for _ in blocks)
        self.gamma = nn.Parameter(torch.zeros(len(blocks)))
        self.over_time = [depth - m in (1, 3, 5) for m in blocks]  # of 12 blocks the 7th, 9th and 11th

    def forward(self, seen):
        levels = [down(x) for down, x in zip(self.downs, seen)]  # (V, T, 1+L, d) each
        gates, s = (self.gamma / 0.1).sigmoid(), levels[0]
        for u, side, gate, over_time in zip(levels[-len(self.sides):], self.sides, gates, self.over_time):
            # attention within a frame, or over the frames at each token's place
            side_s = side(s.transpose(1, 2)).transpose(1, 2) if over_time else side(s)
            s = gate * side_s + (1 - gate) * u
        return s


def correlations(x):
    """Patches (..., L, d) -> how their channels depend on each other, (..., d(d+1)/2): alpha-distance covariance, alpha 0.8.

    A channel is a point with L coordinates. Of the distances ** alpha of all pairs of channels the means of row and column are
    taken off, and half of the symmetric matrix is kept, with its diagonal.
    """
    products = x.transpose(-2, -1) @ x  # (..., d, d)
    own = products.diagonal(dim1=-2, dim2=-1)
    squares = own.unsqueeze(-1) + own.unsqueeze(-2) - 2 * products  # of the distances
    a = (squares.clamp(min=0) / (2 * x.shape[-2]) + 1e-5) ** 0.4
    a = a - a.mean(-1, keepdim=True) - a.mean(-2, keepdim=True) + a.mean((-2, -1), keepdim=True)
    row, column = torch.triu_indices(*a.shape[-2:], device=x.device)
    return a[..., row, column]


def similarities(query, support, floor):
    """Frames (E, M, T, P), (E, n, T, P) -> cosines of all their pairs (E, M, n, T, T), smaller where vectors are short: `floor`
    is added to the product of two lengths."""
    products = torch.einsum('emap,enbp->emnab', query, support)
    lengths = torch.einsum('ema,enb->emnab', query.norm(dim=-1), support.norm(dim=-1))
    return products / (lengths + floor)


def pair_weights(layer, support, query):
    """What each query gives to pairs of frames, its own and a class's: `layer` makes it of its mean frame and the supports'.

    Frames (E, S, T, d), (E, M, T, d) -> (E, M, T, T) [query's frame, class's frame].
    """
    task = query.mean(2) + support.mean((1, 2)).unsqueeze(1)  # (E, M, d)
    return layer(task).unflatten(-1, (query.shape[2], -1))


class Method(nn.Module):
    options = dict(
        levels=0,               # last blocks whose outputs the ladder sees; 0: all, and what enters the first (published)
        width=256,              # of the ladder, whose heads are 64 wide
        metric='dcm',           # 'tsm': learned matching; 'dcm': that of channels' correlations (published); 'bimhm'; 'cosine'
        merge='before',         # supports of a class: averaged 'before' the metric (published) or 'after' it
    )
    choices = dict(metric=('tsm', 'dcm', 'bimhm', 'cosine'), merge=('before', 'after'))  # with 1 shot merge makes no difference

    def __init__(self, clip, names, config):
        super().__init__()
        dim, depth = clip.visual.proj.shape[0], len(clip.visual.transformer.resblocks)
        levels, width, frames = config['levels'], config['width'], config['frames']
        if not 0 <= levels <= depth + 1:
            raise ValueError(f'levels={levels}, but the image tower has {depth} blocks and so {depth + 1} levels.')
        if width % 64:
            raise ValueError(f'width={width}, but heads are 64 wide.')
        self.metric, self.merge = config['metric'], config['merge']
        self.sees = tuple(range(depth + 1))[-levels:]  # [-0:] is all
        self.ladder = Ladder(dim, width, self.sees, depth)
        self.matching = nn.Linear(width, frames ** 2, bias=False) if self.metric in ('tsm', 'dcm') else None

    def video(self, *seen):
        """Tokens of each level (V, T, 1+L, D) -> the ladder's class token of each frame (V, T, d); for dcm also how the
        channels of its patches depend on each other (V, T, d(d+1)/2)."""
        tokens = self.ladder(seen).float()
        frames, patches = tokens[:, :, 0], tokens[:, :, 1:]
        if self.metric != 'dcm':
            return (frames,)
        with torch.autocast(tokens.device.type, enabled=False):
            weights = F.cosine_similarity(patches, frames.unsqueeze(2), dim=-1)  # (V, T, L)
            return frames, correlations(weights.unsqueeze(-1) * patches)

    def scores(self, kept, episode):
        """How alike a query's frames and a class's are, summed: over both sets each frame's most alike (bimhm), over frames at
        the same time (cosine), or over all pairs, each times what the query's matrix says of it."""
        with torch.autocast(episode.labels.device.type, enabled=False):
            support, query = episode.split(episode.take(kept[-1]))  # (E, S, T, P), (E, M, T, P): P = d or d(d+1)/2
            if self.merge == 'before':
                support = episode.by_class(support)
            alike = similarities(query, support, 0.01 if self.metric == 'dcm' else 1e-6)  # (E, M, n, T, T), n = N or S
            if self.metric == 'bimhm':
                found = -bi_mhm(1 - alike)
            elif self.metric == 'cosine':
                found = alike.diagonal(dim1=-2, dim2=-1).sum(-1)
            else:
                weights = pair_weights(self.matching, *episode.split(episode.take(kept[0])))
                found = (weights.unsqueeze(2) * alike).sum((-2, -1))
            return found if self.merge == 'before' else episode.by_class(found.transpose(1, 2)).transpose(1, 2)
