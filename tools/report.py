"""What `predict.py --report=report.html` writes: one page that any browser shows, with nothing fetched from elsewhere.

Of each clip its frames, its best scores as bars and beside them the frames of the example that it is most like; of a long
video a coloured timeline, of which a click jumps to that place. The page names the long videos by where they lie seen from it.

In reading order: page (collects what is answered, then writes), clip_part, video_part (a query each), picture, frames_of.
"""

import base64
import html
import os
import urllib.parse

import numpy as np
import torch

from checkpoint import whole
from config import name_of
from decode import UnreadableVideo, Video, encode_images
from reader import ClipMaker
from tools import timeline

BARS = 8  # classes shown for a clip, best first
STYLE = '''
body {font: 15px sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222}
section {border-top: 1px solid #ccc; padding: 1em 0}
h2 {font-size: 1em}
img {width: 100%; display: block; margin-bottom: .5em}
video {height: 360px; max-width: 100%; display: block}
figure {margin: 0}
figcaption {color: #666}
.columns {display: grid; grid-template-columns: 1fr 1fr; gap: 2em}
.bar {display: grid; grid-template-columns: 1fr 9em 3.5em; gap: .7em; margin: 2px 0}
.bar span {background: #eee}
.bar i {display: block; height: 100%; background: #4a7ab5}
.line {position: relative; height: 36px; background: #eee; margin: .7em 0}
.line b {position: absolute; height: 100%; cursor: pointer}
.key {display: inline-block; margin-right: 1.2em}
.key b {display: inline-block; width: 1em; height: 1em; vertical-align: -2px}
.error {color: #b00}
'''
SCRIPT = '''
for (const stretch of document.querySelectorAll('.line b'))
  stretch.onclick = () => { stretch.closest('section').querySelector('video').currentTime = stretch.dataset.start }
'''


def page(config, examples, classes, size, rows, label):
    """Passes on what `labelled` of predict.py yields, then writes config['report'].

    classes: the names of the N scores; size: of the model's frames; label: function (examples, what is kept of M clips) ->
    scores (M, N).
    """
    maker, windows, parts = ClipMaker(config, size), {}, []
    for row in rows:
        yield row
        path, start, end, scores, clip, kept = row
        if isinstance(scores, str):
            parts.append(f'<section><h2>{text(path)}</h2><p class=error>{text(scores)}</section>')
        elif start is None:
            parts.append(clip_part(examples, classes, maker, path, scores, clip, kept, label))
        else:
            windows.setdefault(path, []).append((start, end, scores))
    parts += [video_part(config, classes, path, spans) for path, spans in windows.items()]
    title = f'{name_of(config["method"])}, {len(examples["classes"])} classes'
    content = (f'<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>'
               f'{"".join(parts)}<script>{SCRIPT}</script>\n')
    with whole(config['report'], 'wb') as file:
        file.write(content.encode(errors='replace'))


def clip_part(examples, classes, maker, path, scores, clip, kept, label):
    """HTML of one clip (T, 3, H, W) uint8, its scores (N,) and what is kept of it."""
    best = sorted(zip(scores, classes), reverse=True)[:BARS]
    bars = ''.join(f'<div class=bar>{text(name)}<span><i style="width:{100 * value:.1f}%"></i></span>{value:.3f}</div>'
                   for value, name in best)
    near = ''
    if len(examples['labels']):
        names = [examples['classes'][i] for i in examples['labels'].tolist()]
        alone = dict(examples, classes=names, labels=torch.arange(len(names)))  # each example a class of its own
        i = label(alone, kept)[0].argmax().item()
        about = f'nearest example: {names[i]}, {os.path.relpath(examples["paths"][i])}'
        near = f'<figure>{frames_of(examples["paths"][i], maker)}<figcaption>{text(about)}</figcaption></figure>'
    return f'<section><h2>{text(path)}</h2><div class=columns><div>{picture(clip)}{bars}</div>{near}</div></section>'


def video_part(config, classes, path, spans):
    """HTML of one long video and its windows (start, end, scores (N,))."""
    stretches = list(timeline.stretches(spans, classes, config))
    length, names = spans[-1][1], list(dict.fromkeys(name for _, _, name, _ in stretches))
    colours = {name: f'hsl({360 * i / len(names):.0f} 60% 60%)' for i, name in enumerate(names)}
    line = ''
    for start, end, name, value in stretches:
        place = f'left:{100 * start / length:.3f}%;width:{100 * (end - start) / length:.3f}%;background:{colours[name]}'
        line += f'<b data-start={start:.3f} title="{start:.1f} to {end:.1f} s: {text(name)} {value:.3f}" style="{place}"></b>'
    key = ''.join(f'<span class=key><b style="background:{colours[name]}"></b> {text(name)}</span>' for name in names)
    link = urllib.parse.quote(os.fsencode(os.path.relpath(path, os.path.dirname(os.path.abspath(config['report'])))))
    return (f'<section><h2>{text(path)}</h2><video src="{link}" controls preload=metadata></video>'
            f'<div class=line>{line}</div>{key}</section>')


def frames_of(path, maker):
    """The frames of an example as they were encoded, if it is still there."""
    try:
        return picture(maker.clip(Video(path), None))
    except UnreadableVideo as error:
        return f'<p class=error>{text(str(error))}'


def picture(clip):
    """A clip (T, 3, H, W) uint8 -> HTML of its frames side by side."""
    strip = np.concatenate(list(clip.permute(0, 2, 3, 1).numpy()), axis=1)  # (H, T*W, 3)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(encode_images(strip[None])[0]).decode()}">'


def text(name):
    return html.escape(str(name))
