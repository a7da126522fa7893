"""VBA with a query vector for each frame instead of one for the video, and a learned matching of the frames of two videos.

Not of the thesis: what its aggregator reaches where it keeps the order of what it saw. Its levels are VBA's own, equations
3.14-3.19, each query looking at its own frame's tokens, which hear of the frames beside it through the temporal embedding;
there is no cross-video attention. Width, gates and the queries' own matching are TS-FSAR's (methods/ladder.py).
"""

import torch
import torch.nn.functional as F
from torch import nn

from methods.ladder import pair_weights, similarities
from model import Level, class_scores, last_blocks, start_small


class Method(nn.Module):
    options = dict(
        levels=4,               # last blocks whose outputs feed the aggregator
        layer=64,               # width of a trained linear layer in front and of the aggregator; 0: none, that of CLIP
        cls_token=True,         # the aggregator sees the class token too
        gate=False,             # between levels each query is mixed with its frame's class token
        matching='query',       # weights of pairs of frames: of each 'query' its own, or 'fixed' ones; False: frame t meets
                                # frame t alone
        temp=100.0,             # factor of the similarities, (3.7); those of 'query' have none
    )
    choices = dict(matching=('query', 'fixed', False))

    def __init__(self, clip, names, config):
        super().__init__()
        dim, depth, levels = clip.visual.proj.shape[0], len(clip.visual.transformer.resblocks), config['levels']
        last_blocks(clip.visual, levels)
        self.sees = tuple(range(depth - levels + 1, depth + 1))
        self.first = 0 if config['cls_token'] else 1  # the first token that the aggregator sees
        self.temp, frames, width = config['temp'], config['frames'], config['layer'] or dim
        if width % 64:
            raise ValueError(f'layer={width}, but heads are 64 wide.')

        def narrow(dim):
            return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width, bias=False))

        form = dict(frames=frames, attn_proj=True, mlp_order='serial', alpha_init='random', cross_video=False)
        self.query = nn.Parameter(torch.randn(frames, width))  # Q_0 of each frame
        self.downs = nn.ModuleList(narrow(dim) if config['layer'] else nn.Identity() for _ in range(levels))
        self.levels = nn.ModuleList(Level(width, form) for _ in range(levels))
        start_small(self.levels)
        self.gamma = nn.Parameter(torch.zeros(levels)) if config['gate'] else None
        self.tokens = nn.ModuleList(narrow(width) for _ in range(levels if config['gate'] else 0))
        self.matching = nn.Linear(width, frames ** 2, bias=False) if config['matching'] == 'query' else None
        matrix = torch.eye(frames) / frames  # [query's frame, support's frame]
        self.matrix = None if self.matching else nn.Parameter(matrix, requires_grad=config['matching'] == 'fixed')

    def video(self, *seen):
        """Tokens of each level (V, T, 1+L, D) -> a vector a frame (V, T, width)."""
        q = self.query
        for i, (level, down, a) in enumerate(zip(self.levels, self.downs, seen)):
            a = down(a)
            part = a[:, :, self.first:]
            tokens = level.tokens(part).view_as(part)  # (V, T, L, width)
            q = level.cross_frame(q.expand(len(a), -1, -1), tokens)
            if self.gamma is not None:
                gate = (self.gamma[i] / 0.1).sigmoid()
                q = gate * q + (1 - gate) * self.tokens[i](a[:, :, 0])
        return (q,)

    def scores(self, kept, episode):
        """The matching of a query's and a class's frames; or with `fixed` (3.6), (3.7) and (3.10) with a sum over pairs of
        frames of matrix times cosine, seen from the middle of the supports."""
        x = episode.take(kept[0]).float()  # (E, B, T, width)
        with torch.autocast(x.device.type, enabled=False):
            if self.matching is not None:
                support, query = episode.split(x)
                alike = similarities(query, episode.by_class(support), 1e-6)  # (E, M, N, T, T)
                return (pair_weights(self.matching, support, query).unsqueeze(2) * alike).sum((-2, -1))
            x = F.normalize(x, dim=-1)
            middle = episode.split(x)[0].mean(1, keepdim=True)  # (E, 1, T, width)
            support, query = episode.split(F.normalize(x - middle, dim=-1))
            weighted = torch.einsum('ab,esbd->esad', self.matrix, support)
            similarity = query.flatten(2) @ weighted.flatten(2).transpose(1, 2)  # (E, M, S)
        return class_scores((self.temp * similarity).log_softmax(-1), episode)
