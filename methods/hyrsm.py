"""HyRSM (Wang et al. 2022): frames related within their video, videos within their task, and the sets of frames compared.

A task is the supports and one query: queries do not see each other, so it is inductive.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import Frames, cosine, cross_entropy


class Attention(nn.Module):
    """Self-attention (..., tokens, D) of 8 heads, with a bias in the output alone."""

    def __init__(self, dim, dropout, dropout_out):
        super().__init__()
        if dim % 8:
            raise ValueError(f"CLIP's features are {dim} wide, which 8 heads cannot share.")
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.dropout, self.dropout_out = dropout, nn.Dropout(dropout_out)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (8, -1)).transpose(-3, -2) for part in self.qkv(x).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.dropout_out(self.out(x.transpose(-3, -2).flatten(-2)))


class Method(nn.Module):
    options = dict(
        merge='before',         # supports of a class: averaged 'before' the inter-relation (published) or 'after' the metric
        auxiliary=0.15,         # weight of the loss that tells single frames' classes among all training classes
        position_a=10.0,        # features are multiplied by sqrt(D / position_a); Kinetics: D, so that they stay
        position_b=1.0,         # factor of the sines and cosines of frames' places; Kinetics: 0.01
        finetune=0.0,           # learning rate of a copy of CLIP's image tower that trains too, as published; 0: it is frozen
    )
    choices = dict(merge=('before', 'after'))  # with 1 shot it is the same

    def __init__(self, clip, names, config):
        super().__init__()
        self.frames = Frames(clip, config['finetune'])
        self.sees = self.frames.sees
        dim = clip.visual.proj.shape[1]
        self.merge, self.auxiliary = config['merge'], config['auxiliary']
        self.scale = math.sqrt(dim / config['position_a'])
        self.register_buffer('place', config['position_b'] * places(config['frames'], dim), persistent=False)
        self.dropout = nn.Dropout(0.1)
        self.ln_intra, self.intra = nn.LayerNorm(dim), Attention(dim, 0.0, 0.2)
        self.inter, self.ln_inter = Attention(dim, 0.1, 0.05), nn.LayerNorm(dim)
        nn.init.normal_(self.inter.qkv.weight, std=math.sqrt(2 / (dim + dim / 8)))
        nn.init.xavier_normal_(self.inter.out.weight)
        self.fuse = nn.Linear(2 * dim, dim)  # a frame beside its video's token
        self.classify = nn.Linear(dim, len(names))

    def video(self, seen):
        """CLIP's image features (V, T, D) -> frames related within their video (V, T, D)."""
        x = self.dropout(self.frames(seen) * self.scale + self.place)
        return (F.relu(x + self.intra(self.ln_intra(x))),)

    def scores(self, kept, episode):
        """Minus the distance of a query's set of frames to each class's, both as they are in the task of this query."""
        support, query = episode.split(episode.take(kept[0]))  # (E, S, T, D), (E, M, T, D)
        if self.merge == 'before':
            support = episode.by_class(support)
        distance = self.distances(support, query)  # (E, M, n), n = N or S
        if self.merge == 'after':
            distance = episode.by_class(distance.transpose(1, 2)).transpose(1, 2)
        return -distance

    def distances(self, support, query):
        """Frames of supports or classes (E, n, T, D) and queries (E, M, T, D) -> (E, M, n): inter-relation, then Bi-MHM."""
        queries, supports = query.shape[1], support.shape[1]
        tasks = torch.cat([support.mean(2)[:, None].expand(-1, queries, -1, -1), query.mean(2)[:, :, None]], 2)
        related = F.relu(self.ln_inter(self.inter(tasks) + tasks))  # (E, M, n + 1, D)
        # the fusing layer on [frame, token], a sum of two products, so that a support's frames are multiplied once
        of_frame, of_token = self.fuse.weight.chunk(2, 1)
        token = F.linear(related, of_token, self.fuse.bias).unsqueeze(-2)  # (E, M, n + 1, 1, D)
        support = F.linear(support, of_frame)[:, None] + token[:, :, :supports]  # (E, M, n, T, D)
        query = F.linear(query, of_frame)[:, :, None] + token[:, :, supports:]  # (E, M, 1, T, D)
        return bi_mhm(1 - cosine(support, query))

    def loss(self, kept, episode):
        """The cross-entropy of the scores, and that of each frame's class among all training classes."""
        scores = self.scores(kept, episode)
        logits = self.classify(episode.take(kept[0]))  # (E, B, T, classes)
        frames = cross_entropy(logits.flatten(1, 2), episode.truth().repeat_interleave(logits.shape[2], 1))
        return cross_entropy(scores, episode.answers) + self.auxiliary * frames, scores

    def groups(self, lr):
        """Without weight decay on the norms."""
        norms = [*self.ln_intra.parameters(), *self.ln_inter.parameters()]
        others = [p for name, p in self.named_parameters() if not name.startswith(('ln_', 'frames.'))]
        return self.frames.groups(dict(params=others), dict(params=norms, weight_decay=0.0))


def bi_mhm(distance):
    """Distances of frames (..., T, T') -> those of the sets (...): each frame's to its nearest of the other set, summed over
    both sets. The paper takes means, which are T times less; the code's sums are steeper logits."""
    return distance.amin(-1).sum(-1) + distance.amin(-2).sum(-1)


def places(frames, dim):
    """Places in time as sines and cosines (T, D), as the published code has them: exponents grow twice as fast as in Vaswani et
    al. 2017, and a cosine has another than its sine."""
    channel = torch.arange(dim)
    angles = torch.arange(frames)[:, None] / 10000 ** (2 * channel / dim)
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos())
