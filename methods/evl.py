"""EVL (Lin et al. 2022): a decoder beside the frozen CLIP, one query vector that looks at all tokens of its last blocks.

The ancestor of VBA's aggregator, for a closed set of classes. Each level reads the tokens of one block, to which three parts
add what time tells: T-Conv, T-PE and T-CA, each an option. The class token stays among the tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import Attention, QuickGELU, last_blocks


class TemporalConv(nn.Module):
    """T-Conv: depthwise convolution over T (kernel 3) of tokens (V, T, 1+L, D)."""

    def __init__(self, dim, init):
        super().__init__()
        bound = 3 ** -0.5 if init == 'default' else 0.0  # nn.Conv1d's, of kernel and bias
        self.kernel = nn.Parameter(torch.empty(3, dim).uniform_(-bound, bound))  # taps at t-1, t, t+1
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def forward(self, x):
        frames, kernel = x.shape[1], self.kernel.to(x)
        padded = F.pad(x, (0, 0, 0, 0, 1, 1))  # (V, T+2, 1+L, D)
        return sum(padded.narrow(1, tap, frames) * kernel[tap] for tap in range(3)) + self.bias.to(x)


class TemporalCrossAttention(nn.Module):
    """T-CA: where the frozen block's own attention would look from a patch, in the frame before and in the frame after.

    For patch q of frame t, with A[q, k] its attention to patch k of a neighbouring frame, the mean over heads, and W a table
    of a vector for each offset between two patches, it is sum_k A[q, k] W[offset(q, k)].
    """

    def __init__(self, block, grid):
        super().__init__()
        self.ln, self.attn = block.ln_1, block.attn
        self.register_buffer('offsets', offsets(grid), persistent=False)
        tables = torch.zeros(2, (2 * grid - 1) ** 2, self.attn.out_proj.in_features)  # for the frame before, and after
        self.tables = nn.Parameter(tables)

    def forward(self, x):
        """What the block reads (V, T, 1+L, D) -> the same shape; 0 at the class token and where there is no neighbour."""
        dim, heads = x.shape[-1], self.attn.heads
        qk = F.linear(self.ln(x[:, :, 1:]), self.attn.in_proj_weight[:2 * dim], self.attn.in_proj_bias[:2 * dim])
        q, k = qk.unflatten(-1, (2, heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (V, T, heads, L, D/heads)
        before = self.by_offset(q[:, 1:], k[:, :-1]) @ self.tables[0]  # (V, T-1, L, D)
        after = self.by_offset(q[:, :-1], k[:, 1:]) @ self.tables[1]
        return F.pad(before, (0, 0, 1, 0, 1, 0)) + F.pad(after, (0, 0, 1, 0, 0, 1))

    def by_offset(self, q, k):
        """Patches of frames and of their neighbours (V, T-1, heads, L, D/heads) -> the attention between them by offset,
        (V, T-1, L, offsets): one product with W then takes the place of a table (L, L, D) of its rows."""
        attention = (q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)).softmax(-1).mean(2).to(q)  # (V, T-1, L, L)
        found = attention.new_zeros(*attention.shape[:-1], self.tables.shape[1])
        return found.scatter(-1, self.offsets.expand_as(attention), attention)


def offsets(grid):
    """For patches q and k of a frame, row by row: which of the (2 * grid - 1)^2 offsets leads from k to q, (L, L) int64."""
    patch = torch.arange(grid ** 2)
    place = torch.stack([patch // grid, patch % grid])  # row and column
    row, column = place[:, :, None] - place[:, None] + grid - 1  # each 0 .. 2 * grid - 2
    return row * (2 * grid - 1) + column


class Level(nn.Module):
    """What time adds to the tokens of one block, and a decoder layer over them."""

    def __init__(self, dim, block, grid, config):
        super().__init__()
        self.conv = TemporalConv(dim, config['t_conv_init']) if config['t_conv'] else None
        self.place = nn.Parameter(torch.zeros(config['frames'], 1, dim)) if config['t_pe'] else None
        self.across = TemporalCrossAttention(block, grid) if config['t_ca'] else None
        self.ln_query, self.ln_tokens, self.ln_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, dim // 64)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), QuickGELU(), nn.Dropout(0.5), nn.Linear(4 * dim, dim))
        for weight in (*self.attn.in_proj_weight.data.chunk(3), self.mlp[0].weight, self.mlp[3].weight):
            nn.init.xavier_uniform_(weight)  # of q, k and v each by itself
        for linear in (self.mlp[0], self.mlp[3]):
            nn.init.normal_(linear.bias, std=1e-6)

    def tokens(self, x, read):
        """What the block gives and what it reads, (V, T, 1+L, D) each -> the decoder's tokens (V, T*(1+L), D), standardised:
        LayerNorm but for its scale and shift, which `Attention.folded` applies."""
        found = x
        if self.conv is not None:
            found = found + self.conv(x)
        if self.place is not None:
            found = found + self.place.to(x)
        if self.across is not None:
            found = found + self.across(read)
        return F.layer_norm(found, found.shape[-1:]).to(x).flatten(1, 2)

    def forward(self, q, x, read):
        """The query (V, D) -> the same, having looked at the tokens."""
        q = q + self.attn.folded(self.ln_query(q), self.tokens(x, read), self.ln_tokens)
        return q + self.mlp(self.ln_mlp(q))


class Method(nn.Module):
    options = dict(
        levels=4,               # last blocks whose tokens the decoder reads; as published 12 for Something-Something
        t_conv=True,            # T-Conv: a convolution over time is added to the tokens
        t_pe=True,              # T-PE: a trained code of a frame's place in time
        t_ca=True,              # T-CA: where patches look in the frames beside theirs; published sizes are without it
        t_conv_init='default',  # of T-Conv: 'default', PyTorch's random one, as published, or 'zero', as T-PE and T-CA have
    )
    choices = dict(t_conv_init=('default', 'zero'))
    closed_set = True

    def __init__(self, clip, names, config):
        super().__init__()
        visual, levels = clip.visual, config['levels']
        dim, depth = visual.proj.shape[0], len(visual.transformer.resblocks)
        blocks = last_blocks(visual, levels)
        self.sees = tuple(range(depth - levels + (not config['t_ca']), depth + 1))
        self.query = nn.Parameter(torch.zeros(dim))  # as in the authors' code: the first attention begins uniform
        self.levels = nn.ModuleList(Level(dim, block, visual.grid, config) for block in blocks)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Dropout(0.5), nn.Linear(dim, len(names)))

    def video(self, *seen):
        """Tokens after each of the last blocks (V, T, 1+L, D), with T-CA also those before the first -> the query that has
        looked at all of them (V, D)."""
        q = self.query.expand(len(seen[0]), -1)
        for level, x, read in zip(self.levels, seen[-len(self.levels):], seen):  # `read` is for T-CA alone
            q = level(q, x, read)
        return (q,)

    def scores(self, kept, episode):
        """The head's logits of the classes."""
        _, query = episode.split(episode.take(kept[0]))  # (E, M, D)
        return episode.of_ways(self.head(query))
