"""CLIP-FSAR (Wang et al. 2023): a class's prototype hears its name, as one token more beside its frames; OTAM compares.

Equations and defaults are those of the published code; where the paper differs, the option says so.
"""

import torch
from torch import nn

from methods.hyrsm import Attention
from methods.otam import align
from model import Frames, cosine, cross_entropy


class Method(nn.Module):
    options = dict(
        merge='before',         # supports of a class: averaged 'before' the transformer (published for 5 shots) or 'after' it
        lam=0.5,                # lambda of OTAM
        video_text=1.5,         # weight of the video-text loss; the paper weighs the other one
        scale=1.0,              # of the video-text cosines at the start, trained on; the paper has a temperature, CLIP's is 100
        prompt='a photo of {}',  # what is read of a class's name
        answer='visual',        # 'text': by the name alone, as zero_shot; 'combined': by both
        beta=0.9,               # the text's share in the combined answer
        finetune=0.0,           # learning rate of a copy of CLIP's image tower that trains too, as published; 0: it is frozen
    )
    answering = ('answer', 'beta')
    choices = dict(merge=('before', 'after'), answer=('visual', 'text', 'combined'))  # with 1 shot merge makes no difference
    text = True

    def __init__(self, clip, names, config):
        super().__init__()
        self.frames = Frames(clip, config['finetune'])
        self.sees = self.frames.sees
        dim = clip.visual.proj.shape[1]
        self.clip, self.prompt, self.lam = clip, config['prompt'], config['lam']
        self.merge, self.video_text = config['merge'], config['video_text']
        self.answer, self.beta = config['answer'], config['beta']
        self.scale = nn.Parameter(torch.tensor(config['scale']))
        self.ln, self.attention = nn.LayerNorm(dim), Attention(dim, 0.0, 0.2)
        self.mlp = nn.Sequential(nn.Linear(dim, 2048), nn.GELU(), nn.Dropout(0.05), nn.Linear(2048, dim), nn.Dropout(0.05))
        clip.texts(names or ['a name'], [self.prompt])  # fails here where CLIP cannot read them

    def transformer(self, x):
        """Tokens (..., tokens, D) -> the same, each having looked at the others; there is no place in time."""
        x = x + self.attention(self.ln(x))
        return x + self.mlp(x)

    def video(self, seen):
        """CLIP's image features (V, T, D) -> the same, of which supports are made; and transformed, as queries are."""
        image = self.frames(seen)
        return image, self.transformer(image)

    def scores(self, kept, episode):
        """Logits as `answer` says; combined: p_text ** beta * p_visual ** (1 - beta)."""
        if self.answer == 'visual':
            return self.visual_scores(kept, episode)
        texts = self.clip.texts(episode.names, [self.prompt])[episode.classes]  # (E, N, D)
        text = self.scale * cosine(episode.split(episode.take(kept[0]))[1].mean(2), texts)
        if self.answer == 'text':
            return text
        frames = kept[0].shape[1]
        visual = self.visual_scores(kept, episode) / frames
        return self.beta * text.log_softmax(-1) + (1 - self.beta) * visual.log_softmax(-1)

    def visual_scores(self, kept, episode):
        """Minus the cost of aligning a query with a class's prototype, (E, M, N)."""
        support, _ = episode.split(episode.take(kept[0]))  # (E, S, T, D)
        _, query = episode.split(episode.take(kept[1]))  # (E, M, T, D)
        texts = self.clip.texts(episode.names, [self.prompt])[episode.classes].unsqueeze(2)  # (E, N, 1, D)
        if self.merge == 'before':
            support = episode.by_class(support)
        else:
            texts = texts[:, episode.labels]
        prototypes = self.transformer(torch.cat([support, texts], 2))[:, :, :-1]  # (E, N or S, T, D)
        if self.merge == 'after':
            prototypes = episode.by_class(prototypes)
        return -align(prototypes, query, self.lam).transpose(1, 2)

    def loss(self, kept, episode):
        """The cross-entropy of the visual scores, and of every video against the names of all training classes."""
        scores = self.visual_scores(kept, episode)
        videos = episode.take(kept[0]).mean(2)  # (E, B, D)
        named = self.scale * cosine(videos, self.clip.texts(episode.names, [self.prompt]))  # (E, B, classes)
        return cross_entropy(scores, episode.answers) + self.video_text * cross_entropy(named, episode.truth()), scores

    def groups(self, lr):
        """Without weight decay on the norm."""
        others = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith(('ln.', 'frames.'))]
        return self.frames.groups(dict(params=others), dict(params=list(self.ln.parameters()), weight_decay=0.0))
