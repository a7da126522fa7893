"""What CLIP shows of a split's videos, and what a method makes of each, as arrays for other programs.

    python tools/extract.py sample_configs/diving48.py --out=clip.npz                     CLIP's image features alone
    python tools/extract.py --ckpt=runs/diving48_vba/best.pt --test_split=train --out=vba.npz     and what VBA keeps of a video

In Python: `found = numpy.load('vba.npz')`. Arrays: `image` (V, T, embed_dim), CLIP's features of the frames; `video_0`, ... (V,
...), what the method's `video` returns; `names` (V,), the videos' paths; `labels` (V,) int64; `classes`, the labels' names.
"""

import sys
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
    checkpoint.freeze(config, clip)
    sees = list(dict.fromkeys(['image', *(method.sees if found else ())]))
    reader = ClipReader(config, clip.visual.image_size)
    try:
        shown = encoding.keep_seen(config, clip, data.load_splits(config)[config['test_split']], reader, sees)
    finally:
        reader.close()
    seen = dict(zip(sees, (x[shown.rows] for x in shown.tensors)))
    arrays = dict(image=seen['image'])
    if found:
        kept = encoding.videos(config, method, [seen[what] for what in method.sees])
        arrays |= {f'video_{i}': x for i, x in enumerate(kept)}
    arrays = {name: x.float().cpu().numpy() for name, x in arrays.items()}
    try:
        with checkpoint.whole(config['out'], 'wb') as file:
            np.savez(file, **arrays, names=[video.path for video in shown.split.videos], labels=shown.split.labels,
                     classes=shown.split.classes)
    except OSError as error:
        sys.exit(f'Cannot write {config["out"]}: {error.strerror}.')
    print(f'{config["out"]}: ' + ', '.join(f'{name} {x.shape}' for name, x in arrays.items()))


if __name__ == '__main__':
    main()
