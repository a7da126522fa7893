"""TS-FSAR whole (AAAI 2026): methods/ladder.py and beside it the texts of the classes, in training and if asked in the answer.

Beside the ladder CLIP's own image features hear of each other over time; both are held against the texts, and what channels
have to do with each other is made to tell the training classes. Blocks start at random, not as CLIP's made narrow.
"""

import torch.nn.functional as F
from torch import nn

from methods.ladder import Method as Ladder
from methods.tws import sentences
from model import cross_entropy


class Method(nn.Module):
    options = dict(
        levels=0,               # last blocks whose outputs the ladder sees; 0: all, and what enters the first (published)
        width=256,              # of the ladder, whose heads are 64 wide
        merge='before',         # supports of a class: averaged 'before' the metric (published) or 'after' it
        descriptions='',        # a file of a line `class<TAB>sentence` a class, of tests too; '': names are the texts
        alpha=1.6,              # share of attention over time in CLIP's features, 0 to 2; Kinetics, HMDB51, UCF101: 0.4
        temp=50.0,              # factor of the cosines with texts
        of_channels=2.0,        # weight of the loss that tells training classes by their channels' correlations
        of_ladder=0.1,          # that of the ladder's features and the texts
        distill=0.01,           # that of CLIP's features and the texts, and of what the channels learn of their answer
        soften=4.0,             # temperature of the latter
        dropout=0.0,            # of the correlations before the training classes are told
        fusion=[1.0, 0.0, 0.0],  # exponents in the answer: of the matching, of CLIP's features and of the ladder's with texts
    )
    answering = ('descriptions', 'fusion')
    choices = dict(merge=('before', 'after'))
    text = True

    def __init__(self, clip, names, config):
        super().__init__()
        self.base = Ladder(clip, names, config | dict(metric='dcm'))
        self.sees = (*self.base.sees, 'image')
        self.clip, self.config, width, dim = clip, config, config['width'], clip.visual.proj.shape[1]
        if len(config['fusion']) != 3:
            raise ValueError(f'fusion={config["fusion"]!r} must be three exponents.')
        self.described = sentences(config['descriptions']) if config['descriptions'] else {}
        self.texts(names or ['a name'])  # fails here where CLIP cannot read them
        self.ln, self.attention = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 8, batch_first=True)
        self.up = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim, bias=False))
        self.classify = nn.Linear(width * (width + 1) // 2, len(names), bias=False)

    def texts(self, names):
        """Class names -> their texts' features (N, embed_dim), of length 1. ValueError: one has no description."""
        if self.described and (missing := [name for name in names if name not in self.described]):
            raise ValueError(f'{self.config["descriptions"]} has no line for the class {missing[0]!r}.')
        return self.clip.texts([self.described.get(name, name) for name in names], self.config['templates'])

    def video(self, *seen):
        """What the ladder keeps, and two vectors of a video in the space of texts, of length 1: of CLIP's features, which look
        at each other over time, and of the ladder's class tokens; (V, embed_dim) each."""
        *levels, image = seen
        frames, channels = self.base.video(*levels)
        alpha, h = self.config['alpha'], self.ln(image)
        image = (2 - alpha) * image + alpha * self.attention(h, h, h, need_weights=False)[0]  # (V, T, embed_dim)
        return frames, channels, *(F.normalize(x.float().mean(1), dim=-1) for x in (image, self.up(frames)))

    def scores(self, kept, episode):
        """The logarithm of the three answers' product, each with its exponent."""
        matching, by_clip, by_ladder = self.config['fusion']
        found = matching * self.base.scores(kept[:2], episode).log_softmax(-1)
        if by_clip or by_ladder:
            texts = self.texts(episode.names)[episode.classes].transpose(1, 2)  # (E, embed_dim, N)
            for exponent, x in ((by_clip, kept[2]), (by_ladder, kept[3])):
                _, query = episode.split(episode.take(x))  # (E, M, embed_dim)
                found = found + exponent * (self.config['temp'] * query @ texts).log_softmax(-1)
        return found

    def loss(self, kept, episode):
        """The matching's cross-entropy, and three that tell every video's class among all training classes: by channels, and by
        the texts from CLIP's features, whose answer the channels learn too, and from the ladder's."""
        config, scores = self.config, self.base.scores(kept[:2], episode)
        _, channels, clip, narrow = (episode.take(x) for x in kept)
        truth, texts = episode.truth(), config['temp'] * self.texts(episode.names).T
        by_channels = self.classify(F.dropout(channels.mean(2), config['dropout'], self.training))  # (E, B, classes)
        by_clip, by_ladder = clip @ texts, narrow @ texts
        learned = distilled(by_channels.flatten(0, 1), by_clip.flatten(0, 1), config['soften'])
        loss = cross_entropy(scores, episode.answers) + config['of_channels'] * cross_entropy(by_channels, truth)
        loss = loss + config['of_ladder'] * cross_entropy(by_ladder, truth)
        return loss + config['distill'] * (learned + cross_entropy(by_clip, truth)), scores


def distilled(logits, teacher, soften):
    """How far softened answers are from the teacher's, (V, classes) each: Kullback-Leibler times soften ** 2. As published the
    teacher learns of it too."""
    return soften ** 2 * F.kl_div((logits.float() / soften).log_softmax(-1), (teacher.float() / soften).softmax(-1),
                                  reduction='batchmean')
