"""TWS (Zhang et al., Chinese Journal of Computers 2024): a tuned CLIP whose frames send each other messages in every block.

A frame's message is made of its class token and, by a temporal weighted shift, of those of the frames beside it. In training an
auxiliary branch tells the classes from the covariance of all patches; the answer is that of video and text alone. There is no
published code: numbers in brackets are the paper's equations, and what it leaves open is said where it is decided.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from model import Block, cosine, cross_entropy
from tools.weights import read_saved


class TWS(nn.Module):
    """(5)-(8): messages of a video's frames (V, T, D) -> the same weighted by channel and shifted in time."""

    def __init__(self, dim, zero_start):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim).uniform_(-1, 1))  # as a convolution in D groups starts
        self.bias = nn.Parameter(torch.zeros(dim))
        # One token more takes attention from the others whatever it says, so no start of the message gives CLIP's answer. The
        # gate does: it mixes what a block attends to without the message, at 0, and with it, at 1. At 0 the gate alone has a
        # gradient; after its first step all have.
        self.gate = nn.Parameter(torch.zeros(())) if zero_start else None

    def forward(self, messages):
        return shift(self.weight * messages + self.bias)


def shift(x):
    """Of channels (V, T, D) the first D/8 from the frame before and the last D/8 from the frame after; from beyond the ends
    zeros, as in TSM."""
    part = x.shape[-1] // 8
    past, present, future = x.split([part, x.shape[-1] - 2 * part, part], -1)
    return torch.cat([F.pad(past[:, :-1], (0, 0, 1, 0)), present, F.pad(future[:, 1:], (0, 0, 0, 1))], -1)


def with_message(block, message, tws, x, frames):
    """(3), (4), (9), (10): CLIP's block over the tokens of each frame (V*T, 1+L, D) and its message, dropped before the MLP."""
    m = message(x[:, 0].unflatten(0, (-1, frames)))  # (V, T, D)
    m = (m + tws(m)).flatten(0, 1).unsqueeze(1)  # (V*T, 1, D)
    h = block.ln_1(torch.cat([x, m], 1))  # (V*T, 1+L+1, D)
    own = h[:, :-1]
    heard = block.attn(own, h, h)  # what the message attends to would be dropped
    if tws.gate is not None:
        alone = block.attn(own, own, own)
        heard = alone + tws.gate * (heard - alone)
    x = x + heard
    return x + block.mlp(block.ln_2(x))


class TemporalTransformer(nn.Module):
    """Trained places in time and one block over the frames of (..., T, embed_dim), which starts as X-CLIP's does: the paper has
    no numbers of layers and heads."""

    def __init__(self, frames, dim, zero_start=False):
        super().__init__()
        self.place = nn.Parameter(torch.empty(frames, dim))
        self.block = Block(dim, 'quick_gelu')
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        if zero_start:  # then it gives what it is given
            for p in (self.place, self.block.attn.out_proj.weight, self.block.mlp.c_proj.weight):
                nn.init.zeros_(p)

    def forward(self, x):
        return self.block((x + self.place).flatten(0, -3)).view_as(x)


class Auxiliary(nn.Module):
    """(18)-(20): patch features (V, T, L, embed_dim) and video vectors (V, embed_dim) -> logits (V, classes)."""

    def __init__(self, dim, classes, config):
        super().__init__()
        width = config['width']
        self.iterations = config['iterations']
        self.temporal = TemporalTransformer(config['frames'], dim)  # over T at each place of a frame: over T*L costs L times it
        self.reduce = nn.Linear(dim, width, bias=False)  # which a covariance does not see
        self.dropout = nn.Dropout(0.5)  # the paper has no rate
        self.of_patches = nn.Linear(width * (width + 1) // 2, classes)
        self.of_video = nn.Linear(dim, classes)

    def forward(self, patches, v):
        x = self.reduce(self.temporal(patches.transpose(1, 2))).flatten(1, 2)  # (V, L*T, width)
        with torch.autocast(x.device.type, enabled=False):
            root = square_root(covariance(x.float()), self.iterations)  # (V, width, width)
        row, column = torch.triu_indices(*root.shape[1:], device=root.device)
        return self.of_patches(self.dropout(root[:, row, column])) + self.of_video(v)


def covariance(x):
    """Vectors (V, n, width) -> (V, width, width)."""
    x = x - x.mean(1, keepdim=True)
    return x.transpose(1, 2) @ x / x.shape[1]


def square_root(sigma, iterations):
    """The root of covariances (V, width, width) by Newton-Schulz steps (iSQRT-COV, Li et al. 2018). Few steps stop short of it:
    the smaller an eigenvalue beside the trace, the more."""
    one = torch.eye(sigma.shape[-1], device=sigma.device)
    trace = sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    y, z = sigma / trace, one
    for _ in range(iterations):
        m = (3 * one - z @ y) / 2
        y, z = y @ m, m @ z
    return trace.sqrt() * y


class Method(nn.Module):
    options = dict(
        stage=2,                # 1: without messages and with CLIP frozen, the other new parts train; 2: all trains
        start='',               # best.pt of a run of stage 1, whose parts stage 2 starts with
        finetune=8e-6,          # learning rate of what was CLIP's; lr is that of new parts, and ten times it that of the shift
        zero_start=False,       # True: at the start the answer is CLIP's; False: new parts start at random, as published
        descriptions='',        # a file of a line `class<TAB>sentence` a class, of tests too; '': names are the texts
        candidates='all',       # texts that a video is told from: of 'all' classes, or as published of its 'batch'
        contrast=0.5,           # weight of the loss between videos and texts; that of the auxiliary branch makes it 1
        width=128,              # that patches are reduced to before their covariance
        iterations=5,           # of the covariance's square root
    )
    answering = ('start', 'descriptions')  # a trained method needs no start: its file may be gone
    choices = dict(stage=(1, 2), candidates=('all', 'batch'))
    text = closed_set = True

    def __init__(self, clip, names, config):
        super().__init__()
        visual, tuned, zero_start = clip.visual, config['stage'] == 2, config['zero_start']
        (dim, embed_dim), depth = visual.proj.shape, len(visual.transformer.resblocks)
        if embed_dim % 64:
            raise ValueError(f"CLIP's features are {embed_dim} wide, which heads of 64 cannot share.")
        self.sees = ('pixels',) if tuned else (depth,)
        self.clip, self.finetune, self.candidates, self.contrast = (
            clip, config['finetune'], config['candidates'], config['contrast'])
        self.file = config['descriptions']
        self.described = sentences(self.file) if self.file else {}
        clip.texts(self.wording(names) or ['a name'], ['{}'])  # fails here where CLIP cannot read them, or one is too long
        self.tower = copy.deepcopy(visual).float().requires_grad_(tuned)
        self.logit_scale = nn.Parameter(clip.logit_scale.detach().clone(), requires_grad=tuned)  # -log(gamma)
        self.messages = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth if tuned else 0))
        self.shifts = nn.ModuleList(TWS(dim, zero_start) for _ in self.messages)
        self.end = TemporalTransformer(config['frames'], embed_dim, zero_start)
        self.auxiliary = Auxiliary(embed_dim, len(names), config)
        if config['start']:
            self.begin(config['start'])

    def begin(self, path):
        """Fills what stage 1 trains from its checkpoint."""
        own = {name: x.shape for name, x in self.state_dict().items() if name.startswith(('end.', 'auxiliary.'))}
        try:
            state = read_saved(path)['model']
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f'start={path} is no checkpoint of train.py: {type(error).__name__}: {error}') from error
        if own != {name: x.shape for name, x in state.items()}:
            raise ValueError(f'start={path} is no checkpoint of stage 1 with as many classes and frames and this width.')
        self.load_state_dict(state, strict=False)

    def wording(self, names):
        """Class names -> their texts. A text that is too long for CLIP is refused: so all of it is read, or it is shortened in
        the file."""
        if self.file and (missing := [name for name in names if name not in self.described]):
            raise SystemExit(f'{self.file} has no line for the class {missing[0]!r}.')  # also where a test names new ones
        return [self.described.get(name, name) for name in names]

    def tokens(self, frames):
        """Frames (V, T, 3, H, W) -> the tokens after the last block (V, T, 1+L, D)."""
        x = self.tower.embed(self.tower.normalise(frames.flatten(0, 1)))  # (V*T, 1+L, D)
        for block, message, tws in zip(self.tower.transformer.resblocks, self.messages, self.shifts):
            x = with_message(block, message, tws, x, frames.shape[1])
        return x.unflatten(0, frames.shape[:2])

    def video(self, seen):
        """Frames, in stage 1 the tokens after CLIP's last block -> (12) vectors of videos (V, embed_dim); in training also the
        auxiliary logits (V, classes)."""
        x = self.tokens(seen) if self.messages else seen  # (V, T, 1+L, D)
        x = x if self.training else x[:, :, :1]  # patches are for the auxiliary branch alone
        x = self.tower.ln_post(x) @ self.tower.proj  # (V, T, 1+L or 1, embed_dim)
        v = self.end(x[:, :, 0]).mean(1)
        return (v, self.auxiliary(x[:, :, 1:], v)) if self.training else (v,)

    def logits(self, v, names):
        """(15), (16): vectors of videos (E, B, embed_dim) -> their similarities to all names' texts (E, B, C)."""
        return self.logit_scale.exp() * cosine(v, self.clip.texts(self.wording(names), ['{}']))

    def scores(self, kept, episode):
        """The similarities of a query to the texts of its episode's classes."""
        _, query = episode.split(episode.take(kept[0]))
        return episode.of_ways(self.logits(query, episode.names))

    def loss(self, kept, episode):
        """(17), (21), (22): every video, supports too, told from all training classes, by texts and by the auxiliary branch."""
        v, auxiliary = (episode.take(x) for x in kept)  # (E, B, embed_dim), (E, B, classes)
        logits, truth = self.logits(v, episode.names), episode.truth()
        # where each class is a candidate once, a video has one right text, and its multi-hot truth is a plain class
        contrast = cross_entropy(logits, truth) if self.candidates == 'all' else among_batch(logits, truth)
        loss = self.contrast * contrast + (1 - self.contrast) * cross_entropy(auxiliary, truth)
        return loss, episode.of_ways(episode.split(logits)[1])

    def groups(self, lr):
        """Rates as published: 8e-6 of CLIP's parts, 8e-3 of the shift, 8e-4 of the others, with one weight decay. Which of them
        the linear layers of the messages had is not clear; ten times lr is much for a matrix."""

        def of(*prefixes):
            return [p for name, p in self.named_parameters() if p.requires_grad and name.startswith(prefixes)]

        return [dict(params=of('messages.', 'end.', 'auxiliary.')), dict(params=of('shifts.'), lr=10 * lr),
                dict(params=of('tower.', 'logit_scale'), lr=self.finetune)]


def among_batch(logits, truth):
    """Logits (E, B, C) and classes (E, B) -> the cross-entropy among the texts of these videos: a class's is there as often as
    its videos, each time right."""
    logits, truth = logits.flatten(0, 1), truth.flatten()
    same = (truth[:, None] == truth).float()  # (E*B, E*B)
    return F.cross_entropy(logits[:, truth].float(), same / same.sum(1, keepdim=True))


def sentences(path):
    """A file of lines `class<TAB>sentence` -> {class: sentence}."""
    with open(path, encoding='utf-8') as file:
        rows = [line.strip().split('\t') for line in file if line.strip()]
    if wrong := [row for row in rows if len(row) != 2]:
        raise ValueError(f'{path}: lines must be class<TAB>sentence, not {wrong[0]!r}.')
    return dict(rows)
