"""The network. In reading order:

    Attention, MLP, Block, Transformer     the parts of CLIP, with OpenAI's parameter names
    ViT                                    CLIP's image tower (thesis 3.2)
    TemporalAdapter                        depthwise convolution over time in a bottleneck (Fig. 3.8)
    Level, VBA                             the Video Bypass Aggregator beside the frozen tower (3.3, equations 3.14-3.23)
    log_scores, class_scores, episode_loss from video features to predictions and loss (3.1.2, equations 3.6-3.11)

Letters in shape comments: E episodes in a batch, B videos of an episode (supports first), T frames, L tokens of a frame,
D width of the ViT, S levels (last blocks whose outputs are kept), N ways, K shots, M queries.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

NORMS = dict(  # mean and standard deviation of RGB in 0..1
    clip=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    imagenet=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)
CPU_CHUNK = 24  # images that the frozen blocks take at a time on a CPU: small enough for its caches
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
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (..., heads, tokens, D/heads)
                   for x, w, b in zip((q, k, v), weights, biases))
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
        its tokens for each use. x may be in half precision, or elsewhere: a video's tokens come over when it is its turn."""
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
        self.image_size = image_size
        self.grid = image_size // patch_size  # patches on a side; L = grid^2
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        self.positional_embedding = nn.Parameter(torch.randn(self.grid ** 2 + 1, width) * width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, act)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width ** -0.5)

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
        """Q_i (..., D), tokens (..., T*L, D) -> Q*_i (..., D): (3.15)-(3.19). index as in VBA.aggregate."""
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


class VBA(nn.Module):
    """The Video Bypass Aggregator beside a frozen ViT. Only what is not `visual` trains."""

    def __init__(self, visual, config):
        """visual: a ViT (frozen here); config: `levels`, `temporal_adapter`, `cls_token`, `cross_video`, `attn_proj`,
        `mlp_order`, `alpha_init`, `frames`, `norm`, `recompute`, `frozen_dtype` as in config.py."""
        super().__init__()
        dim = visual.proj.shape[0]
        self.visual = visual.requires_grad_(False)
        self.first = 0 if config['cls_token'] else 1  # the first token that the aggregator sees
        self.mode, self.recompute = config['cross_video'], config['recompute']
        self.query = nn.Parameter(torch.randn(1, dim))  # Q_0
        self.adapters = nn.ModuleList(
            TemporalAdapter(dim) for _ in range(config['levels'] if config['temporal_adapter'] else 0))
        self.levels = nn.ModuleList(Level(dim, config) for _ in range(config['levels']))
        branches = [module for name, module in self.levels.named_modules() if name.endswith(('attn.out_proj', 'mlp.c_proj'))]
        for branch in branches:
            # As in GPT-2. Q_0 then outweighs what the branches add: cosines start near 1 and the loss near log N. Where videos
            # differ much from the start, by looks and not by class, at Temp 100 the loss is dozens, and the fastest way
            # down is to make all videos the same, from where no gradient leads back.
            if branch.weight.requires_grad:
                branch.weight.data *= len(branches) ** -0.5
        blocks = visual.transformer.resblocks
        for part in (visual.conv1, visual.ln_pre, *blocks[:-len(self.levels)]) if self.adapters else [visual]:
            part.to(getattr(torch, config['frozen_dtype']))
        mean, std = torch.tensor(NORMS[config['norm']])
        self.register_buffer('mean', mean.view(3, 1, 1), persistent=False)
        self.register_buffer('std', std.view(3, 1, 1), persistent=False)

    def normalise(self, frames):
        """Pixels (..., 3, H, W) uint8 -> float, in the dtype that the first product takes."""
        return ((frames / 255 - self.mean) / self.std).to(dtype_beside(self.visual.conv1.weight))

    @torch.no_grad()
    def frozen(self, frames, head=False):
        """All of the backbone that no trained part comes before: frames (..., T, 3, H, W) uint8 -> list of (..., T, *, D).

        With adapters that is one tensor, the tokens (1+L) before the first kept block; without, A itself, S tensors of the
        outputs (L) of the kept blocks. head=True also gives the plain CLIP's image features (..., T, embed_dim), else None.
        """
        pixels = frames.flatten(0, -4)
        blocks, count = self.visual.transformer.resblocks, len(self.levels)
        outputs, features = [], []
        for chunk in pixels.split(CPU_CHUNK if pixels.device.type == 'cpu' else len(pixels)):
            images = self.normalise(chunk)
            x = self.visual.embed(images).to(images)  # (chunk, 1+L, D)
            for block in blocks[:-count]:
                x = block(x)
            x = x.to(dtype_beside(blocks[-1].ln_1.weight))
            kept = [x] if self.adapters else []
            if head or not self.adapters:
                for block in blocks[-count:]:
                    x = block(x)
                    if not self.adapters:
                        kept.append(x[:, self.first:])
            outputs.append(kept)
            features.append(self.visual.head(x) if head else None)
        outputs = [torch.cat(parts).unflatten(0, frames.shape[:-3]) for parts in zip(*outputs)]
        return outputs, torch.cat(features).unflatten(0, frames.shape[:-3]) if head else None

    def kept(self, frozen):
        """The list that `frozen` gave -> A, a list of S tensors (..., T, L, D): the outputs of the last S blocks."""
        frozen = [x.to(self.query.device, dtype_beside(self.query)) for x in frozen]
        if not self.adapters:
            return frozen
        shape = frozen[0].shape

        def adapted(x, adapter, block):
            patches = x[:, 1:].unflatten(0, (-1, shape[-3]))  # (B, T, L, D)
            return block(torch.cat([x[:, :1], (patches + adapter(patches)).flatten(0, 1)], 1))

        x = frozen[0].flatten(0, -3)  # (B*T, 1+L, D)
        outputs = []
        for part in zip(self.adapters, self.visual.transformer.resblocks[-len(self.levels):]):
            x = checkpoint(adapted, x, *part, use_reentrant=False) if self.recompute else adapted(x, *part)
            outputs.append(x[:, self.first:].unflatten(0, shape[:-2]))
        return outputs

    def tokens(self, kept):
        """A -> the aggregator's tokens, a list of S tensors (..., T*L, D). A video's tokens depend on that video alone."""
        return [level.tokens(a) for level, a in zip(self.levels, kept)]

    def start(self, tokens):
        """Tokens of level 0 (..., T*L, D) -> Q*_0 (..., D), which too depends on one video alone: all share Q_0."""
        return self.levels[0].cross_frame(self.query.expand(*tokens.shape[:-2], -1), tokens)

    def aggregate(self, q, tokens, n_support, mode, index=None):
        """Episodes' Q*_0 (E, B, D) and tokens of levels 1.. (E, B, T*L, D) -> video features Q_S (E, B, D): (3.23).

        mode: 'joint', every video of an episode sees every other; 'inductive', supports see supports and a query sees the
        supports and itself; False, none sees another. The first n_support of the B videos are the supports.
        index (E, B), in testing: tokens are those of all videos, (V, T*L, D), and index says whose.
        """
        mask = inductive_mask(q.shape[1], n_support, q.device) if mode == 'inductive' else None
        for i, level in enumerate(self.levels):
            if i > 0:
                q = level.cross_frame(q, tokens[i - 1], index)
            if mode:
                q = level.cross_video(q, mask)
        return q

    def forward(self, episodes, n_support):
        """Episodes, supports first -> video features Q_S (E, B, D).

        episodes: frames (E, B, T, 3, H, W) uint8, or the list that `frozen` gave of them.
        """
        frozen = episodes if isinstance(episodes, list) else self.frozen(episodes)[0]
        tokens = self.tokens(self.kept(frozen))
        return self.aggregate(self.start(tokens[0]), tokens[1:], n_support, self.mode)


def inductive_mask(videos, n_support, device=None):
    """(B, B), true where the row's video may look: at every support, and at itself."""
    index = torch.arange(videos, device=device)
    return (index < n_support) | (index == index[:, None])


def log_scores(features, n_support, temp):
    """(3.6), (3.7): features (E, B, D) -> log softmax(temp * cosine) over the supports, (E, M, N*K) float32."""
    features = F.normalize(features.float(), dim=-1)
    support, query = features[:, :n_support], features[:, n_support:]
    return (temp * query @ support.transpose(1, 2)).log_softmax(-1)


def class_scores(log_score, support_labels, way):
    """(3.10): log scores (E, M, N*K), labels (N*K,) in 0..way-1 -> mean score of each class's supports, (E, M, N).

    The prediction (3.11) is the argmax. Classes may have unequal numbers of supports.
    """
    members = F.one_hot(support_labels, way).to(log_score)  # (N*K, N)
    return log_score.exp() @ (members / members.sum(0))


def episode_loss(log_score, support_labels, query_labels, kind):
    """log_score (E, M, N*K) float32, labels (N*K,) and (M,) -> scalar, the mean over episodes.

    'class': -log(K * avg_score(true class)), averaged over queries.
    'pairwise': (3.8), (3.9), over all (support, query) pairs -log(score) if the classes agree, else -log(1 - score). There
    1 - score is the sum of all other scores: summed in log space it stays finite where `1 - score` rounds to 0.
    """
    same = query_labels[:, None] == support_labels  # (M, N*K)
    if kind == 'class':
        return -log_score.masked_fill(~same, -math.inf).logsumexp(-1).mean()
    itself = torch.eye(len(support_labels), dtype=torch.bool, device=log_score.device)
    others = log_score.unsqueeze(-2).masked_fill(itself, -math.inf).logsumexp(-1)  # (E, M, N*K)
    return -torch.where(same, log_score, others).mean()


def trainable_state(model):
    """The parameters that train, by name: all that a checkpoint holds of the model."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
