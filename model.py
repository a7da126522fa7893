"""The network. In reading order:

    Attention, MLP, Block, Transformer     the parts of CLIP, with OpenAI's parameter names
    ViT, look                              CLIP's image tower (thesis 3.2), and what it shows of a video while it is frozen
    Episode, Step                          which videos meet; what trains: from what CLIP shows to loss and scores
    TemporalAdapter                        depthwise convolution over time in a bottleneck (Fig. 3.8)
    Level, VBA                             the Video Bypass Aggregator beside the frozen tower (3.1.2, 3.3, equations 3.6-3.23)

VBA is one method, and methods/ holds others. A method is an nn.Module with

    sees                        what it needs of the frozen CLIP, as `look` takes it
    options, choices            its own options with their defaults, and what those may be, as in config.py
    answering                   those options that change the answer alone: a test may set them anew
    text, transductive          whether it reads class names; whether queries of an episode may see each other
    closed_set                  whether it answers without supports, S = 0: by the classes it trained on or by names
    takes                       of how many of the kept tensors `scores` takes copies for its episodes, if not of all
    __init__(clip, names, config)          names: the training classes
    video(*seen)                what is kept of V videos, each alone: a tuple of (V, ...)
    scores(kept, episode)       logits (E, M, N), higher is better
    loss(kept, episode)         a scalar, and the scores; without it their cross-entropy
    groups(lr)                  AdamW's parameter groups; without it one of all that trains

of which sees, __init__, video and scores are all it needs.

Letters in shape comments: E episodes in a batch, B videos of an episode (supports first), V videos, T frames, L tokens of a
frame, D width of the ViT, N ways, K shots, M queries; S supports of an episode, and in VBA levels (last blocks whose outputs
are kept).
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

NORMS = dict(  # mean and standard deviation of RGB in 0..1
    clip=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    imagenet=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)
CHUNK = dict(cpu=24, cuda=512, mps=512)  # that the frozen blocks take at a time: on a CPU small enough for its caches
FOLDED_ROWS = 4096  # uses of videos that `folded_by_video` takes at a time: 150 MB at width 768


def dtype_beside(weight):
    """The dtype of a matrix product with `weight`: autocast's where it is on, else its own. Autocast itself leaves sums and
    norms in float32; tokens that are kept, or added to from block to block, are turned to this dtype to take half of that."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), written so that autograd keeps one tensor and not two."""

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


ACTIVATIONS = dict(quick_gelu=QuickGELU, gelu=nn.GELU)


class Attention(nn.Module):
    """Multi-head attention: the parameters, names and function of nn.MultiheadAttention (rows of in_proj: q, k, v).

    proj=False is equation 3.15 to the letter: one head and no projections, so all its matrices are fixed to the identity.
    """

    def __init__(self, dim, heads, proj=True):
        super().__init__()
        self.heads = heads if proj else 1
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        if not proj:
            with torch.no_grad():
                self.in_proj_weight.copy_(torch.eye(dim).repeat(3, 1))
                self.out_proj.weight.copy_(torch.eye(dim))
            self.requires_grad_(False)

    def forward(self, q, k, v, mask=None):
        """q (..., M, D), k and v (..., N, D), mask (M, N) true where q may look -> (..., M, D)."""
        if q is k is v:  # one product, which reads the tokens once
            q, k, v = F.linear(q, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for x in (q, k, v))  # (..., heads, tokens, D/heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(-3, -2).flatten(-2))

    def folded(self, q, x, ln):
        """One query q (..., D) a video over its tokens ln(x): what forward(q, ln(x), ln(x)) gives, ~55x cheaper.

        x (..., N, D) is already standardised (LayerNorm without its scale and shift); `ln` holds scale and shift, which fold
        into the query and the pooled value just as W_k and W_v do, so no token is ever projected.
        """
        return self.unfold(self.folded_weights(q, x, ln) @ x, ln)

    def folded_weights(self, q, x, ln):
        """The attention (..., heads, N) of `folded`."""
        return (self.fold(q, ln) @ x.transpose(-1, -2)).softmax(-1)

    def fold(self, q, ln):
        """q (..., D) -> what meets the tokens, (..., heads, D). b_k and the shift of ln add the same to every logit, so they
        cancel."""
        (wq, wk, _), bq = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)[0]
        q = F.linear(q, wq, bq).unflatten(-1, (self.heads, -1))  # (..., heads, D/heads)
        return torch.einsum('...hd,hdw->...hw', q, wk.unflatten(0, (self.heads, -1))) * ln.weight / math.sqrt(q.shape[-1])

    def unfold(self, pooled, ln):
        """Weighted sums of tokens (..., heads, D) -> (..., D)."""
        wv, bv = self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]
        out = torch.einsum('...hw,hdw->...hd', pooled * ln.weight + ln.bias, wv.unflatten(0, (self.heads, -1)))
        return self.out_proj(out.flatten(-2) + bv)

    @torch.no_grad()
    def folded_by_video(self, q, x, ln, index):
        """`folded` of q (U, D) over tokens x[index], for x (V, N, D) and index (U,): one product a video instead of a copy of
        its tokens for each use. x may be in half precision, or elsewhere: a video's tokens come over when it is its turn.

        For index 3 0 3 1: sorted by video the uses are 1, 3, 0, 2, and videos 0, 1, 3 have 1, 1 and 2 of them.
        """
        out, order = torch.empty_like(q), index.argsort(stable=True)
        for rows in order.split(FOLDED_ROWS):
            folded = self.fold(q[rows], ln)  # (n, heads, D)
            videos, uses = index[rows].unique_consecutive(return_counts=True)
            for video, part in zip(videos.tolist(), folded.split(uses.tolist())):
                tokens = x[video].to(part.device).to(dtype_beside(part))  # over in half precision
                part.copy_((part @ tokens.T).softmax(-1) @ tokens)
            out[rows] = self.unfold(folded, ln).to(out.dtype)
        return out


class MLP(nn.Module):
    def __init__(self, dim, act='quick_gelu'):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.act = ACTIVATIONS[act]()
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, dim, act):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, dim // 64)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, act)

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, dim, layers, act):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(dim, act) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ViT(nn.Module):
    """CLIP's image tower. Parameter names are those below `visual.` in OpenAI's state dicts."""

    def __init__(self, image_size, patch_size, width, layers, output_dim, act='quick_gelu'):
        super().__init__()
        self.image_size, self.norm = image_size, 'clip'
        self.grid = image_size // patch_size  # patches on a side; L = grid^2
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(self.grid ** 2 + 1, width) * width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, act)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width ** -0.5)

    def normalise(self, frames):
        """Pixels (..., 3, H, W) uint8 -> float, in the dtype that the first product takes."""
        mean, std = torch.tensor(NORMS[self.norm], device=frames.device).view(2, 3, 1, 1)
        return ((frames / 255 - mean) / std).to(dtype_beside(self.conv1.weight))

    def embed(self, images):
        """Normalised images (B, 3, H, W) -> tokens (B, 1+L, D), the class token first."""
        patch = self.conv1.kernel_size[0]
        patches = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, grid, grid, patch, patch)
        x = F.linear(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), self.conv1.weight.flatten(1))  # (B, L, D)
        x = torch.cat([self.class_embedding.to(x).expand(len(x), 1, -1), x], 1)
        return self.ln_pre(x + self.positional_embedding.to(x))

    def head(self, x):
        """Tokens of the last block (B, 1+L, D) -> image features (B, output_dim)."""
        return self.ln_post(x[:, 0]) @ self.proj

    def forward(self, images):
        """Normalised images (B, 3, H, W) -> image features (B, output_dim)."""
        return self.head(self.transformer(self.embed(images)))


@torch.no_grad()
def look(visual, frames, sees):
    """What the frozen image tower shows of videos: frames (V, T, 3, H, W) uint8 -> for each of `sees` a tensor:

    'pixels': the frames; 'image': CLIP's image features (V, T, embed_dim); a number m: the tokens after m blocks, the class
    token first, (V, T, 1+L, D).
    """
    if set(sees) == {'pixels'}:
        return [frames]
    blocks, pixels = visual.transformer.resblocks, frames.flatten(0, 1)
    depth = len(blocks) if 'image' in sees else max(m for m in [*sees] if m != 'pixels')
    shown = []
    for chunk in pixels.split(CHUNK[pixels.device.type]):
        images = visual.normalise(chunk)
        x = visual.embed(images).to(images)  # (chunk, 1+L, D)
        found = {'pixels': chunk, 0: x}
        for m, block in enumerate(blocks[:depth], 1):
            x = block(x)
            if m in sees:
                found[m] = x
        if 'image' in sees:
            found['image'] = visual.head(x)
        shown.append([found[what] for what in sees])
    return [x.unflatten(0, frames.shape[:2]) for x in joined(shown)]


def joined(chunks):
    """Chunks, each a list of tensors (n, ...) -> one list of tensors; a single chunk is not copied."""
    return chunks[0] if len(chunks) == 1 else [torch.cat(parts) for parts in zip(*chunks)]


def bring(seen, device):
    """Tensors of `look`, wherever they waited, on the device and in autocast's dtype or float32; pixels stay bytes."""
    kind = torch.device(device).type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return [x.to(device, x.dtype if x.dtype == torch.uint8 else dtype) for x in seen]


def last_blocks(visual, levels):
    """The last `levels` blocks of an image tower. ValueError: it is not that deep."""
    blocks = visual.transformer.resblocks
    if not 0 < levels <= len(blocks):
        raise ValueError(f'levels={levels}, but the image tower has {len(blocks)} blocks.')
    return blocks[len(blocks) - levels:]


def frame_layer(dim):
    """A trained layer over frame features (..., dim); it starts as the identity of the normalised features."""
    layer = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
    nn.init.eye_(layer[1].weight)
    nn.init.zeros_(layer[1].bias)
    return layer


class Frames(nn.Module):
    """CLIP's image features of frames: those of the frozen tower, or of a copy of it that trains at a rate of its own, `lr`."""

    def __init__(self, clip, lr):
        super().__init__()
        self.sees, self.lr = ('pixels',) if lr else ('image',), lr
        self.tower = copy.deepcopy(clip.visual).float().requires_grad_() if lr else None

    def forward(self, seen):
        """What `look` shows of videos -> (V, T, embed_dim)."""
        return self.tower(self.tower.normalise(seen.flatten(0, 1))).unflatten(0, seen.shape[:2]) if self.tower else seen

    def groups(self, *others):
        """AdamW's groups: the tower's beside others."""
        return [*others, dict(params=list(self.parameters()), lr=self.lr)] if self.tower else list(others)


class Episode(NamedTuple):
    """Which videos meet: E episodes at a time, each of B videos, S supports and then M queries."""
    labels: torch.Tensor  # (S,) int64, the way 0..N-1 of each support; ways may have unequal numbers
    classes: torch.Tensor  # (E, N) int64, which of `names` the ways are
    names: list  # class names
    joint: bool = True  # may queries see each other?
    answers: torch.Tensor | None = None  # (E, M) int64, the way of each query; in training alone
    index: torch.Tensor | None = None  # (E, B) int64, rows of what is kept; None, in training: as they lie, E times B of them

    def take(self, x):
        """What is kept of videos (V, ...) -> of the episodes' videos (E, B, ...): in training a view; else a copy, on the
        device, half precision turned to float32."""
        if self.index is None:
            return x.unflatten(0, (len(self.classes), -1))
        dtype = torch.float32 if x.is_floating_point() else x.dtype
        return x[self.index.to(x.device)].to(self.index.device, dtype)

    def split(self, x):
        """(E, B, ...) -> supports (E, S, ...), queries (E, M, ...)."""
        return x[:, :len(self.labels)], x[:, len(self.labels):]

    def truth(self):
        """Of every video its class among `names`, (E, B) int64; in training alone."""
        return torch.cat([self.classes[:, self.labels], self.classes.gather(1, self.answers)], 1)

    def of_ways(self, logits):
        """Logits over all of `names` (E, M, C) -> over the ways (E, M, N)."""
        return logits.gather(2, self.classes[:, None].expand(-1, logits.shape[1], -1))

    def by_class(self, x):
        """Supports (E, S, ...) -> the mean of each way's (E, N, ...), in float32 whatever autocast does."""
        members = F.one_hot(self.labels, self.classes.shape[1]).float()  # (S, N)
        shares = (members / members.sum(0)).T  # (N, S)
        with torch.autocast(x.device.type, enabled=False):
            return (shares @ x.float().flatten(2)).unflatten(2, x.shape[2:])


def cosine(x, y):
    """x (..., M, D), y (..., N, D) -> cosines (..., M, N), in float32 whatever autocast does."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x.float(), dim=-1) @ F.normalize(y.float(), dim=-1).transpose(-2, -1)


def cross_entropy(scores, answers):
    """Logits (E, M, N) and ways (E, M) -> their mean negative log-likelihood."""
    return F.cross_entropy(scores.float().flatten(0, 1), answers.flatten())


class Step(nn.Module):
    """What trains of a step: all that DistributedDataParallel and torch.compile wrap."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, seen, episode):
        """What `look` shows of E*B videos, episode after episode; Episode -> loss, scores (E, M, N)."""
        kept = self.method.video(*bring(seen, episode.labels.device))
        if hasattr(self.method, 'loss'):
            return self.method.loss(kept, episode)
        scores = self.method.scores(kept, episode)
        return cross_entropy(scores, episode.answers), scores


class TemporalAdapter(nn.Module):
    """Bottleneck on (..., T, L, D): D -> 2D/3, depthwise convolution over T (kernel 3), -> D (Fig. 3.8; no residual inside).

    Biases start at 0, and the depthwise kernel with standard deviation `std`: a new adapter, std 0, gives exactly 0.
    """

    def __init__(self, dim, std=0.0):
        super().__init__()
        hidden = dim * 2 // 3
        self.down = nn.Linear(dim, hidden)
        self.kernel = nn.Parameter(torch.randn(3, hidden) * std)  # taps at t-1, t, t+1
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.up = nn.Linear(hidden, dim)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        frames = x.shape[-3]
        x = F.pad(self.down(x), (0, 0, 0, 0, 1, 1))  # (..., T+2, L, 2D/3)
        x = sum(x.narrow(-3, tap, frames) * self.kernel[tap] for tap in range(3)) + self.bias
        return self.up(x)


class Level(nn.Module):
    """One level of the aggregator: equations 3.14-3.22 for one kept block of the backbone."""

    def __init__(self, dim, config):
        super().__init__()
        heads, proj = dim // 64, config['attn_proj']
        self.serial = config['mlp_order'] == 'serial'
        self.alpha = TemporalAdapter(dim, std=float(config['alpha_init'] == 'random'))
        self.beta = nn.Parameter(torch.zeros(config['frames'], 1, dim))
        self.ln_tokens = nn.LayerNorm(dim)
        self.ln_frame, self.ln_frame_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.frame_attn, self.frame_mlp = Attention(dim, heads, proj), MLP(dim)
        if config['cross_video']:
            self.ln_video, self.ln_video_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.video_attn, self.video_mlp = Attention(dim, heads, proj), MLP(dim)

    def tokens(self, a):
        """A_i (..., T, L, D) -> the standardised tokens of A*_i (..., T*L, D): (3.14), and the LayerNorm of 3.15-3.18 but
        for its scale and shift, which `Attention.folded` applies."""
        a = a + self.alpha(a) + self.beta.to(a)
        return F.layer_norm(a, a.shape[-1:]).to(a).flatten(-3, -2)

    def cross_frame(self, q, tokens, index=None):
        """Q_i (..., D), tokens (..., T*L, D) -> Q*_i (..., D): (3.15)-(3.19).

        index (E, B), in testing: the tokens are those of all videos, (V, T*L, D), and index says whose.
        """
        h = self.ln_frame(q)
        if index is None:
            h = self.frame_attn.folded(h, tokens, self.ln_tokens)
        else:
            h = self.frame_attn.folded_by_video(h.flatten(0, 1), tokens, self.ln_tokens, index.flatten()).view_as(q)
        return self.update(q, h, self.ln_frame_mlp, self.frame_mlp)

    def cross_video(self, q, mask):
        """Q*_i (..., B, D), mask (B, B) or None -> Q_{i+1} (..., B, D): (3.20)-(3.22). The value is not normalised."""
        h = self.ln_video(q)
        return self.update(q, self.video_attn(h, h, q, mask), self.ln_video_mlp, self.video_mlp)

    def update(self, q, attended, ln, mlp):
        h = q + attended
        return h + mlp(ln(h if self.serial else q))


def start_small(levels):
    """Scales down what the branches of new levels add, as in GPT-2.

    Q_0 then outweighs it: cosines start near 1 and the loss near log N. Where videos differ much from the start, by looks and
    not by class, at Temp 100 the loss is dozens, and the fastest way down is to make all videos the same, from where no
    gradient leads back.
    """
    branches = [module for name, module in levels.named_modules() if name.endswith(('attn.out_proj', 'mlp.c_proj'))]
    for branch in branches:
        if branch.weight.requires_grad:
            branch.weight.data *= len(branches) ** -0.5


class VBA(nn.Module):
    """The Video Bypass Aggregator beside a frozen ViT."""

    options = dict(
        levels=4,               # last blocks whose outputs feed the aggregator
        temporal_adapter=True,  # adapters in these blocks (thesis 3.2.2)
        cls_token=False,        # the aggregator sees the class token too
        cross_video='joint',    # attention across an episode's videos: 'joint' (transductive), 'inductive' or False
        alpha_init='random',    # the temporal embedding's kernel at the start: 'random', or 'zero' as in the adapters
        attn_proj=True,         # False: equation 3.15 to the letter, one head and no projections
        mlp_order='serial',     # 'parallel': the MLP reads the same input as the attention, as 3.19 and 3.22 are printed
        temp=100.0,             # Temp in (3.7)
        loss='class',           # 'pairwise': (3.8), (3.9) over all pairs
        recompute=False,        # compute adapted blocks again in backward: less memory, slower
    )
    takes = 1  # the tokens are read by index, see `Level.cross_frame`
    choices = dict(cross_video=('joint', 'inductive', False), alpha_init=('random', 'zero'), mlp_order=('serial', 'parallel'),
                   loss=('class', 'pairwise'))

    def __init__(self, clip, names, config):
        """clip: its image tower is `visual`; config: `options` and `frames`. ValueError: a tower that is not that deep."""
        super().__init__()
        dim, depth, levels = clip.visual.proj.shape[0], len(clip.visual.transformer.resblocks), config['levels']
        blocks = last_blocks(clip.visual, levels)
        self.sees = (depth - levels,) if config['temporal_adapter'] else tuple(range(depth - levels + 1, depth + 1))
        self.transductive = config['cross_video'] == 'joint'
        self.cross_video, self.pairwise = bool(config['cross_video']), config['loss'] == 'pairwise'
        self.first = 0 if config['cls_token'] else 1  # the first token that the aggregator sees
        self.temp, self.recompute = config['temp'], config['recompute']
        self.query = nn.Parameter(torch.randn(1, dim))  # Q_0
        self.adapters = nn.ModuleList(TemporalAdapter(dim) for _ in range(levels if config['temporal_adapter'] else 0))
        self.levels = nn.ModuleList(Level(dim, config) for _ in range(levels))
        start_small(self.levels)
        self.blocks = blocks if self.adapters else []  # frozen: gradients pass through them to the adapters

    def kept(self, seen):
        """What CLIP shows -> A, a list of S tensors (V, T, L, D): the outputs of the last S blocks."""
        if not self.adapters:
            return [x[:, :, self.first:] for x in seen]

        def adapted(x, adapter, block):
            patches = x[:, :, 1:]  # (V, T, L, D)
            x = torch.cat([x[:, :, :1], patches + adapter(patches)], 2)
            return block(x.flatten(0, 1)).view_as(x)  # a frame alone

        x, outputs = seen[0], []
        for part in zip(self.adapters, self.blocks):
            x = checkpoint(adapted, x, *part, use_reentrant=False) if self.recompute else adapted(x, *part)
            outputs.append(x[:, :, self.first:])
        return outputs

    def video(self, *seen):
        """Tokens (V, T, 1+L, D) -> Q*_0 (V, D), which all share Q_0 and so depends on the video alone, and the tokens of the
        other levels (V, T*L, D). Without cross-video attention the whole answer does: then Q_S alone."""
        q, later = self.query, []
        for i, (level, a) in enumerate(zip(self.levels, self.kept(seen))):
            tokens = level.tokens(a)
            if i == 0 or not self.cross_video:
                q = level.cross_frame(q.expand(len(tokens), -1), tokens)
            else:
                later.append(tokens)
        return q, *later

    def features(self, kept, episode):
        """What `video` gives -> Q_S (E, B, D): (3.23). Queries see each other only if both the model and the episode say so."""
        start, *tokens = kept
        q = episode.take(start)  # (E, B, D)
        if not self.cross_video:
            return q
        joint = self.transductive and episode.joint
        mask = None if joint else inductive_mask(q.shape[1], len(episode.labels), q.device)
        for i, level in enumerate(self.levels):
            if i > 0:
                x = tokens[i - 1] if episode.index is not None else episode.take(tokens[i - 1])
                q = level.cross_frame(q, x, episode.index)
            q = level.cross_video(q, mask)
        return q

    def similarities(self, kept, episode):
        """(3.6): Temp * cosine, (E, M, S) float32."""
        support, query = episode.split(self.features(kept, episode))
        return self.temp * cosine(query, support)

    def scores(self, kept, episode):
        """The logarithm of (3.10), a class's mean score, but for what (3.7) divides the scores of all classes by: where no
        video sees another it depends on no other class. argmax is (3.11)."""
        return class_scores(self.similarities(kept, episode), episode)

    def loss(self, kept, episode):
        log_score = self.similarities(kept, episode).log_softmax(-1)  # (3.7)
        scores = class_scores(log_score, episode)
        return pairwise_loss(log_score, episode) if self.pairwise else cross_entropy(scores, episode.answers), scores


def inductive_mask(videos, n_support, device=None):
    """(B, B), true where the row's video may look: at every support, and at itself."""
    index = torch.arange(videos, device=device)
    return (index < n_support) | (index == index[:, None])


def class_scores(log_score, episode):
    """(3.10): log scores (E, M, S) -> the logarithm of the mean score of each way's supports, (E, M, N).

    In log space: at Temp 100 the exponential of a log score is often 0.
    """
    members = F.one_hot(episode.labels, episode.classes.shape[1]).bool()  # (S, N)
    by_way = log_score.unsqueeze(-1).masked_fill(~members, -math.inf)  # (E, M, S, N)
    return by_way.logsumexp(-2) - members.sum(0).log()


def pairwise_loss(log_score, episode):
    """(3.8), (3.9): over all (support, query) pairs -log(score) if the classes agree, else -log(1 - score), their mean.

    1 - score is the sum of all other scores: summed in log space it stays finite where `1 - score` rounds to 0.
    """
    same = episode.answers.unsqueeze(-1) == episode.labels  # (E, M, S)
    itself = torch.eye(len(episode.labels), dtype=torch.bool, device=log_score.device)
    others = log_score.unsqueeze(-2).masked_fill(itself, -math.inf).logsumexp(-1)  # (E, M, S)
    return -torch.where(same, log_score, others).mean()


def trainable_state(method):
    """The parameters that train and the buffers, by name: all that a checkpoint holds of a method."""
    frozen = {name for name, p in method.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: x for name, x in method.state_dict().items() if name not in frozen}
