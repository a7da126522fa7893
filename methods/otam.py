"""OTAM (Cao et al. 2020): a query and a support are as far apart as the cheapest alignment of their frames in order.

The least cost over all alignments is softened to -lam * log(sum(exp(-cost / lam))), which has a gradient everywhere. The metric
itself has no parameters; as published it trains the backbone, beside a frozen one it trains a layer over the frame features.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import Frames, cosine, frame_layer


def align(support, query, lam):
    """Frames (E, S, T, D), (E, M, T, D) -> costs (E, S, M) of aligning each support with each query, in both directions."""
    pairs = 1 - cosine(support.flatten(1, 2), query.flatten(1, 2))  # (E, S*T, M*T)
    pairs = pairs.unflatten(2, (-1, query.shape[2])).unflatten(1, (-1, support.shape[2]))  # (E, S, T, M, T)
    forth, back = pairs.permute(4, 2, 0, 1, 3), pairs.permute(2, 4, 0, 1, 3)  # (T, T, E, S, M) each
    return one_way(torch.stack([forth, back], 2), lam).sum(0)


def one_way(distance, lam):
    """Distances of frames (rows, columns, ...) -> the softened least cost (...) of giving each column a row, rows in order.

    A cell is reached from its left neighbour or from the one above that. Columns of zeros on both sides let a path begin and
    end in any row; along these it may also go straight down. The first row is summed and not softened, as in public code; the
    paper softens it too.
    """
    # Everything below is -cost / lam, so that softening is a logaddexp, which neither overflows nor meets log(0).
    cells = -distance / lam
    begun = torch.zeros_like(cells[0, 0])
    above = [begun, *cells[0].cumsum(0)]
    above.append(above[-1])
    for row in cells[1:]:
        here = [begun]
        for i, cell in enumerate([*row, begun], 1):
            best = torch.logaddexp(above[i - 1], here[i - 1])
            if i in (1, len(row) + 1):
                best = torch.logaddexp(best, above[i])
            here.append(cell + best)
        above = here
    return -lam * above[-1]


class Method(nn.Module):
    options = dict(
        lam=0.1,                # lambda, how soft the least cost is; CLIP-FSAR takes 0.5
        finetune=0.0,           # learning rate of a copy of CLIP's image tower that trains too, as published; 0: it is frozen
    )

    def __init__(self, clip, names, config):
        super().__init__()
        self.frames = Frames(clip, config['finetune'])
        self.sees = self.frames.sees
        dim = clip.visual.proj.shape[1]
        self.lam = config['lam']
        self.layer = frame_layer(dim)

    def video(self, seen):
        """CLIP's image features (V, T, D) -> the layer's, each of length 1, (V, T, D)."""
        return (F.normalize(self.layer(self.frames(seen)).float(), dim=-1),)

    def scores(self, kept, episode):
        """Minus the mean cost of aligning a query with each of a class's supports."""
        support, query = episode.split(episode.take(kept[0]))  # (E, S, T, D), (E, M, T, D)
        return -episode.by_class(align(support, query, self.lam)).transpose(1, 2)  # of (E, N, M)

    def groups(self, lr):
        return self.frames.groups(dict(params=[p for name, p in self.named_parameters() if not name.startswith('frames.')]))
