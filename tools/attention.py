"""Where VBA looks: one clip's frames above each level's cross-frame attention, and its scores among the classes of the test.

    python tools/attention.py --ckpt=runs/diving48_vba/best.pt --draw=clip.mp4

Writes attention.png beside the checkpoint.
"""

import os
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint  # noqa: E402
import data  # noqa: E402
import encoding  # noqa: E402
from config import amp, resolve  # noqa: E402
from decode import UnreadableVideo, Video  # noqa: E402
from model import VBA, Episode, bring, inductive_mask, look  # noqa: E402
from reader import ClipMaker, ClipReader  # noqa: E402
from tools import pictures  # noqa: E402

OPTIONS = dict(
    ckpt=None,                 # a checkpoint of VBA
    draw=None,                 # the clip
)


@torch.no_grad()
def attention(model, kept, seen):
    """What `video` keeps of examples (V, ...) and what CLIP shows of one clip -> each level's attention over the clip's tokens
    (T*L,), averaged over heads; the clip is the one query of an inductive episode."""
    start, *later = (x.to(seen[0].device, torch.float32) for x in kept)
    tokens = [level.tokens(a) for level, a in zip(model.levels, model.kept(seen))]  # of the clip, (1, T*L, D)
    n_support = len(start) if model.cross_video else 0
    mask = inductive_mask(n_support + 1, n_support, start.device)
    q, support, weights = model.query, start, []
    for i, (level, x) in enumerate(zip(model.levels, tokens)):
        weights.append(level.frame_attn.folded_weights(level.ln_frame(q), x, level.ln_tokens)[0].mean(0).float())
        q = level.cross_frame(q, x)
        if model.cross_video:
            support = support if i == 0 else level.cross_frame(support, later[i - 1])
            both = level.cross_video(torch.cat([support, q]), mask)
            support, q = both[:-1], both[-1:]
    return weights


def main():
    config, found = checkpoint.configure(sys.argv[1:], OPTIONS)
    if len(found) != 1 or not config['draw']:
        sys.exit('tools/attention.py needs --ckpt=<a checkpoint of VBA> and --draw=<a clip>.')
    resolve(config)
    (path, saved, own), = found
    own |= dict(device=config['device'], dtype=config['dtype'])
    clip = checkpoint.load_clip(own)
    model = checkpoint.rebuild(own, clip, saved, path)
    if not isinstance(model, VBA):
        sys.exit(f'{path} is of method={own["method"]}, not of VBA.')
    clip.to(own['device'])
    split = data.load_splits(own)['test']
    examples = encoding.subset(split, np.concatenate([members[:max(own['test_shots'])] for members in split.members]))
    try:
        frames = ClipMaker(own | dict(cache_gb=0.0, cache_dir=None), clip.visual.image_size).clip(Video(config['draw']), None)
    except UnreadableVideo as error:
        sys.exit(f'--draw: {error}')
    with closing(ClipReader(own, clip.visual.image_size)) as reader:
        shown = encoding.keep_seen(own | dict(features_dir=None), clip, examples, reader, model.sees)
    kept = encoding.videos(own, model, [x[shown.rows] for x in shown.tensors])
    labels = torch.from_numpy(shown.split.labels).to(own['device'])
    with amp(own):
        seen = bring(look(clip.visual, frames[None].to(own['device']), model.sees), own['device'])
        weights = attention(model, kept, seen)
        both = [torch.cat([x.to(y), y]) for x, y in zip(kept, encoding.videos(own, model, seen))]
        ways = Episode(labels, torch.arange(len(split.classes), device=own['device'])[None], split.classes, joint=False,
                       index=torch.arange(len(both[0]), device=own['device'])[None])
        scores = model.scores(both, ways)[0, 0].softmax(-1)
    grid = clip.visual.grid
    patches = [weight.unflatten(0, (len(frames), -1))[:, -grid ** 2:].unflatten(1, (grid, grid)).cpu().numpy()  # no class token
               for weight in weights]
    path = os.path.join(config['out_dir'], 'attention.png')
    pictures.save(draw(frames, patches, dict(zip(split.classes, scores.tolist()))), path)
    print(f'wrote {path}')


def draw(frames, weights, scores):
    """One clip's frames (T, 3, H, W) uint8 above each level's attention, a list of (T, grid, grid), and scores by class -> a
    figure."""
    levels, count = len(weights), len(frames)
    figure = pictures.plt.figure(figsize=(1.3 * count + 3.4, 1.3 * (levels + 1)))
    grid = figure.add_gridspec(levels + 1, count + 3, wspace=0.05, hspace=0.05)
    images = frames.permute(0, 2, 3, 1).numpy()
    height, width = images.shape[1:3]
    for t in range(count):
        axes = figure.add_subplot(grid[0, t])
        axes.imshow(images[t])
        axes.set_axis_off()
    top = max(float(w.max()) for w in weights)
    for level, weight in enumerate(weights, 1):
        for t in range(count):
            axes = figure.add_subplot(grid[level, t])
            axes.imshow(images[t].mean(-1), cmap='gray', alpha=0.4)
            image = axes.imshow(weight[t], extent=(0, width, height, 0), vmin=0, vmax=top, cmap='inferno', alpha=0.75,
                                interpolation='bilinear')
            axes.set_xticks([])
            axes.set_yticks([])
            if t == 0:
                axes.set_ylabel(f'level {level - 1}')
    bar = figure.add_axes((grid[0, count].get_position(figure).x0 + 0.01, 0.12, 0.012, 0.55))
    figure.colorbar(image, cax=bar, label='attention')
    axes = figure.add_subplot(grid[:, count + 2])
    best = sorted(scores.items(), key=lambda item: item[1])[-8:]
    axes.barh(range(len(best)), [score for _, score in best])
    axes.set_yticks(range(len(best)), pictures.readable(name for name, _ in best))
    axes.yaxis.tick_right()
    axes.set(xlim=(0, 1), xlabel='score')
    return figure


if __name__ == '__main__':
    main()
