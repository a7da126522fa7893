"""What CLIP shows of a split's videos, and what a method makes of each, as arrays for other programs.

    python tools/extract.py sample_configs/diving48.py --out=clip.npz                     CLIP's image features alone
    python tools/extract.py --ckpt=runs/diving48_vba/best.pt --test_split=train --out=vba.npz     and what VBA keeps of a video

In Python: `found = numpy.load('vba.npz')`. Arrays: `image` (V, T, embed_dim), CLIP's features of the frames; `video_0`, ... (V,
...), what the method's `video` returns; `names` (V,), the videos' paths; `labels` (V,) int64; `classes`, the labels' names.
"""

import sys
from contextlib import closing
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint  # noqa: E402
import data  # noqa: E402
import encoding  # noqa: E402
from config import resolve  # noqa: E402
from reader import ClipReader  # noqa: E402

OPTIONS = dict(
    ckpt=None,                 # a checkpoint; None: what CLIP shows alone
    out=None,                  # the .npz file
)


def main():
    config, found = checkpoint.configure(sys.argv[1:], OPTIONS)
    if len(found) > 1 or not config['out']:
        sys.exit('tools/extract.py needs --out=<a file>, takes one --ckpt=.')
    path, saved, config = found[0] if found else (None, None, config)
    resolve(config)
    clip = checkpoint.load_clip(config)
    method = checkpoint.rebuild(config, clip, saved, path) if found else None
    clip.to(config['device'])
    sees = list(dict.fromkeys(['image', *(method.sees if found else ())]))

    def make(seen):  # what is kept of some videos
        own = [seen[sees.index(what)] for what in method.sees] if found else []
        return [encoding.stored(seen[0]), *(encoding.videos(config, method, own) if found else [])]

    about = ['image', checkpoint.fingerprint(config, clip, method)]
    with closing(ClipReader(config, clip.visual.image_size)) as reader:
        kept = encoding.keep(config, clip, data.load_splits(config)[config['test_split']], reader, sees, make, about)
    names = ['image', *(f'video_{i}' for i in range(len(kept.tensors) - 1))]
    arrays = {name: x[kept.rows].float().cpu().numpy() for name, x in zip(names, kept.tensors)}
    with checkpoint.whole(config['out'], 'wb') as file:
        np.savez(file, **arrays, names=[video.path for video in kept.split.videos], labels=kept.split.labels,
                 classes=kept.split.classes)
    print(f'{config["out"]}: ' + ', '.join(f'{name} {x.shape}' for name, x in arrays.items()))


if __name__ == '__main__':
    main()
