"""TRX (Perrett et al. 2021): pairs and triples of frames, and of each class a prototype made for the query's own tuples.

A tuple of frames in order shows a part of an action. Each of a query's tuples looks, by attention, for tuples of a class that
are like it, at whatever times these are, and is compared with what it finds.
"""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn

from model import Frames


class Tuples(nn.Module):
    """All tuples of `size` frames in order, as keys and values: P of them, 28 pairs or 56 triples of 8 frames."""

    def __init__(self, frames, size, dim, width):
        super().__init__()
        index = torch.tensor(list(combinations(range(frames), size)))  # (P, size)
        self.register_buffer('index', index, persistent=False)
        self.key, self.value = nn.Linear(size * dim, width), nn.Linear(size * dim, width)
        self.ln_key = nn.LayerNorm(width)  # of the values there is none in use, as in the authors' code

    def forward(self, x):
        """Frames (V, T, D) -> keys and values (V, P, width)."""
        x = x[:, self.index].flatten(2)  # (V, P, size * D)
        return self.ln_key(self.key(x)), self.value(x)


class Method(nn.Module):
    options = dict(
        width=1152,             # of keys and values
        finetune=0.0,           # learning rate of a copy of CLIP's image tower that trains too, as published; 0: it is frozen
    )

    def __init__(self, clip, names, config):
        super().__init__()
        self.frames = Frames(clip, config['finetune'])
        self.sees = self.frames.sees
        frames, dim = config['frames'], clip.visual.proj.shape[1]
        if frames < 3:
            raise ValueError(f'frames={frames}, but it compares triples of frames.')
        self.register_buffer('place', 0.1 * sinusoid(frames, dim), persistent=False)
        self.dropout = nn.Dropout(0.1)
        self.tuples = nn.ModuleList(Tuples(frames, size, dim, config['width']) for size in (2, 3))

    def video(self, seen):
        """CLIP's image features (V, T, D) -> keys and values of pairs, keys and values of triples."""
        x = self.dropout(self.frames(seen) + self.place)
        return sum((tuples(x) for tuples in self.tuples), ())

    def scores(self, kept, episode):
        """Minus the squared distance of a query's tuples to each class's prototypes of them, the mean of pairs and triples."""
        taken = [episode.take(x) for x in kept]
        return -(distances(*taken[:2], episode) + distances(*taken[2:], episode)) / 2

    def groups(self, lr):
        return self.frames.groups(dict(params=[p for name, p in self.named_parameters() if not name.startswith('frames.')]))


def distances(keys, values, episode):
    """Keys and values (E, B, P, width) -> squared distances of queries to classes (E, M, N), a mean over tuples."""
    (support_keys, query_keys), (support_values, query_values) = episode.split(keys), episode.split(values)
    found = []
    for way in range(episode.classes.shape[1]):
        own = episode.labels == way
        # softmax over all tuples of all supports of the class, at once for the tuples of all queries
        prototypes = F.scaled_dot_product_attention(*(
            x.flatten(1, 2).unsqueeze(1) for x in (query_keys, support_keys[:, own], support_values[:, own])))
        apart = query_values.float() - prototypes.view_as(query_values).float()  # (E, M, P, width)
        found.append(apart.square().sum(-1).mean(-1))
    return torch.stack(found, -1)


def sinusoid(frames, dim):
    """Places in time as sines and cosines (T, D), of Vaswani et al. 2017."""
    angles = torch.arange(frames)[:, None] * 10000 ** (-torch.arange(0, dim, 2) / dim)  # (T, D/2)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
