"""The linear probe: one layer on mean-pooled CLIP, which knows no order of frames. The least that trains on a closed set."""

import torch.nn.functional as F
from torch import nn


class Method(nn.Module):
    sees = ('image',)
    closed_set = True

    def __init__(self, clip, names, config):
        super().__init__()
        self.head = nn.Linear(clip.visual.proj.shape[1], len(names))

    def video(self, image):
        """CLIP's image features (V, T, D) -> the mean over frames, each of length 1, itself of length 1, (V, D)."""
        mean = F.normalize(image.float(), dim=-1).mean(1)
        return (F.normalize(mean, dim=-1),)

    def scores(self, kept, episode):
        """The layer's logits. Its inputs are stretched to about 1 each: a layer's start and usual rates are made for such."""
        _, query = episode.split(episode.take(kept[0]))
        return episode.of_ways(self.head(query * query.shape[-1] ** 0.5))
