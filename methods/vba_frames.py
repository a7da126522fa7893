"""VBA with a query vector for each frame instead of one for the video, and a learned matching of the frames of two videos.

Not of the thesis: what its aggregator reaches where it keeps the order of what it saw. Its levels are VBA's own, equations
3.14-3.19, each query looking at its own frame's tokens, which hear of the frames beside it through the temporal embedding;
there is no cross-video attention.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import Level, class_scores, start_small


class Method(nn.Module):
    options = dict(
        levels=4,               # last blocks whose outputs feed the aggregator
        temp=100.0,             # factor of the similarities, (3.7)
        matching=True,          # False: frame t meets frame t alone, and nothing is learned about it
    )

    def __init__(self, clip, names, config):
        super().__init__()
        dim, depth, levels = clip.visual.proj.shape[0], len(clip.visual.transformer.resblocks), config['levels']
        if not 0 < levels <= depth:
            raise ValueError(f'levels={levels}, but the image tower has {depth} blocks.')
        self.sees = tuple(range(depth - levels + 1, depth + 1))
        self.temp, frames = config['temp'], config['frames']
        form = dict(frames=frames, attn_proj=True, mlp_order='serial', alpha_init='random', cross_video=False)
        self.query = nn.Parameter(torch.randn(frames, dim))  # Q_0 of each frame
        self.levels = nn.ModuleList(Level(dim, form) for _ in range(levels))
        start_small(self.levels)
        self.matrix = nn.Parameter(torch.eye(frames) / frames, requires_grad=config['matching'])  # [query's, support's frame]

    def video(self, *seen):
        """Tokens of each level (V, T, 1+L, D) -> a vector a frame (V, T, D)."""
        q = self.query
        for level, a in zip(self.levels, seen):
            patches = a[:, :, 1:]
            tokens = level.tokens(patches).view_as(patches)  # (V, T, L, D)
            q = level.cross_frame(q.expand(len(a), -1, -1), tokens)
        return (q,)

    def scores(self, kept, episode):
        """(3.6), (3.7), (3.10) with a sum over pairs of frames of matrix times cosine, seen from the middle of the supports."""
        x = F.normalize(episode.take(kept[0]).float(), dim=-1)  # (E, B, T, D)
        middle = episode.split(x)[0].mean(1, keepdim=True)  # (E, 1, T, D)
        support, query = episode.split(F.normalize(x - middle, dim=-1))
        with torch.autocast(query.device.type, enabled=False):
            weighted = torch.einsum('ab,esbd->esad', self.matrix, support)
            similarity = query.flatten(2) @ weighted.flatten(2).transpose(1, 2)  # (E, M, S)
        return class_scores((self.temp * similarity).log_softmax(-1), episode)
