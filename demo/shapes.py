"""Moving shapes: a small video dataset, drawn on the spot, whose classes differ only in time.

    python demo/shapes.py --out data/moving_shapes --per_class 30      # one folder of H.264 clips per class

In reading order: what can change (the six channels), the motions and their splits, the drawing, clips, captioned stills.

One shape moves before a plain background among small squares that mean nothing. Its state is a point in a space of six
channels, and a class is a path through that space, say 'move right then grow'. The path played backwards is the path of
another class ('shrink then move left') of the same split, so no single frame and no bag of frames tells the two apart.
What the shape, its colour, the place, the size, the speed and the length are is drawn anew for every clip, over the same
ranges in every class.
"""

import argparse
import itertools
import multiprocessing
import os

import av
import numpy as np
from tqdm import tqdm

SIDE = 64  # frames are SIDE x SIDE pixels

# ---- The six channels: place, heading (clockwise, degrees), log of the radius, opacity, hue (degrees)

X, Y, TURN, GROW, FADE, HUE = np.eye(6)
MIDDLE = np.array([32, 32, 0, np.log(9), 0.68, 0])
REACH = np.array([19, 19, 110, np.log(1.6), 0.32, 100])  # every clip stays within MIDDLE +- REACH ...
ROUND = np.array([0, 0, 1, 0, 0, 1], bool)  # ... but for heading and hue, which go round and may start anywhere

# ---- Motions: functions of time u (T,) in [0, 1] and a phase in degrees -> (T, 6), a full swing of a channel being 1


def path(*steps):
    """Go along each step in turn, in equal times; a step is a vector over the channels, zero for a pause."""
    corners = np.cumsum([np.zeros(6), *steps], axis=0)
    times = np.linspace(0, 1, len(corners))
    return lambda u, phase: np.stack([np.interp(u, times, channel) for channel in corners.T], axis=1)


def arc(sweep, start=None, radius=(1, 1)):
    """Go round a centre by `sweep` degrees (clockwise if positive) from `start`, or from the clip's phase."""

    def motion(u, phase):
        angle = np.radians((phase if start is None else start) + sweep * u)[:, None]
        return 0.5 * np.interp(u, (0, 1), radius)[:, None] * (np.cos(angle) * X + np.sin(angle) * Y)

    return motion


def speeding(step):
    """Along `step`, from rest ever faster."""
    return lambda u, phase: u[:, None] ** 2 * step


def slowing(step):
    """Along `step`, ever slower to rest: `speeding(-step)` backwards."""
    return lambda u, phase: (1 - (1 - u[:, None]) ** 2) * step


MOVES = {'move right': X, 'move left': -X, 'move down': Y, 'move up': -Y}
CHANGES = {
    'spin clockwise': TURN, 'spin counter-clockwise': -TURN, 'grow': GROW, 'shrink': -GROW, 'fade in': FADE, 'fade out': -FADE,
}  # fmt: skip
STEPS = MOVES | CHANGES
MOTIONS = {name: path(step) for name, step in STEPS.items()}
MOTIONS |= {'rainbow forward': path(HUE), 'rainbow backward': path(-HUE)}
for (a, da), (b, db) in itertools.permutations(STEPS.items(), 2):
    if abs(da @ db) == 0:  # different channels: one after the other, and both at once
        MOTIONS[f'{a} then {b}'] = path(da, db)
        if list(STEPS).index(a) < list(STEPS).index(b):
            MOTIONS[f'{a} and {b}'] = path(da + db)
for a, da in STEPS.items():
    MOTIONS[f'{a} and back'] = path(da, -da)
for a, da in MOVES.items():
    aside = Y * abs(da[0]) + X * abs(da[1])
    MOTIONS[f'wait then {a}'] = path(0 * da, da)
    MOTIONS[f'{a} then wait'] = path(da, 0 * da)
    MOTIONS[f'{a} speeding up'] = speeding(da)
    MOTIONS[f'{a} slowing down'] = slowing(da)
    MOTIONS[f'zigzag: {a}'] = path(*[da / 4 + side * aside / 2 for side in (1, -1, 1, -1)])
    MOTIONS[f'{a} and rainbow forward'] = path(da + HUE)
    MOTIONS[f'{a} and rainbow backward'] = path(da - HUE)
for turn, sign in (('clockwise', 1), ('counter-clockwise', -1)):
    MOTIONS[f'orbit {turn}'] = arc(360 * sign)
    MOTIONS[f'spiral out {turn}'] = arc(360 * sign, radius=(0.2, 1))
    MOTIONS[f'spiral in {turn}'] = arc(360 * sign, radius=(1, 0.2))
    for start, side in ((0, 'right'), (90, 'bottom'), (180, 'left'), (270, 'top')):
        MOTIONS[f'half circle {turn} from the {side}'] = arc(180 * sign, start)

SPLITS = dict(
    val=[
        'move right and move up', 'move left and move down',
        'move left then move down', 'move up then move right',
        'move down then shrink', 'grow then move up',
        'spin clockwise then move right', 'move left then spin counter-clockwise',
        'move left and fade in', 'move right and fade out',
    ],
    test=[
        'move right and move down', 'move left and move up',
        'move right then move up', 'move down then move left',
        'move left then grow', 'shrink then move right',
        'move up then spin clockwise', 'spin counter-clockwise then move down',
        'fade out then grow', 'shrink then fade in',
        'move down and grow', 'move up and shrink',
        'spin clockwise and fade in', 'spin counter-clockwise and fade out',
        'half circle clockwise from the left', 'half circle counter-clockwise from the right',
    ],
)  # fmt: skip
SPLITS['train'] = [name for name in MOTIONS if name not in SPLITS['val'] + SPLITS['test']]

# ---- Drawing: signed distances in a shape's own frame (radius 1, heading along +x, the nose white), over a ground


def box(x, y, left, right, half):
    """Signed distance of points to the box [left, right] x [-half, half]."""
    return np.maximum(np.abs(x - (left + right) / 2) - (right - left) / 2, np.abs(y) - half)


def wedge(x, y, left, half):
    """Signed distance of points to the triangle with its tip at (1, 0) and its base at x = left."""
    long, wide = 1 - left, half
    return np.maximum(left - x, ((x - 1) * wide + np.abs(y) * long) / np.hypot(long, wide))


SHAPES = {
    'triangle': lambda x, y: wedge(x, y, -0.7, 0.8),
    'arrow': lambda x, y: np.minimum(wedge(x, y, 0, 0.85), box(x, y, -1, 0.1, 0.28)),
    'moon': lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.55, y)),
    'dome': lambda x, y: np.maximum(np.hypot(x + 0.3, y) - 1, -0.3 - x),
    'hammer': lambda x, y: np.minimum(box(x, y, 0.3, 0.9, 0.85), box(x, y, -1, 0.4, 0.22)),
    'key': lambda x, y: np.minimum(np.hypot(x - 0.45, y) - 0.52, box(x, y, -1, 0.2, 0.2)),
}
GROUNDS = {
    'black': (15, 15, 15), 'grey': (75, 75, 75), 'navy': (20, 30, 85), 'brown': (85, 50, 25), 'green': (25, 70, 35),
    'plum': (75, 25, 75),
}  # fmt: skip
SPECKS = 5  # at most so many small squares


def rgb(hue, saturation=1.0):
    """Colours (..., 3), 0 to 255, of hues in degrees."""
    wheel = np.clip(np.abs((np.asarray(hue)[..., None] / 60 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return 255 * (1 - np.asarray(saturation)[..., None] * (1 - wheel))


def draw(shape, state, ground, saturation, specks, noise):
    """Draw n frames.

    shape (n,) indices into SHAPES, state (n, 6) the channels, ground (n, 3) colour, saturation (n,), specks (n, SPECKS, 4):
    x, y, half side (0: none) and hue, noise (n, SIDE, SIDE) added to every colour. Returns (n, SIDE, SIDE, 3) uint8.
    """
    pixels = np.arange(SIDE, dtype=np.float32) + 0.5
    state, specks = state.astype(np.float32), specks.astype(np.float32)
    x, y, turn, grow, fade, hue = state.T

    # specks: a square is its columns times its rows, so all of them together are one sum
    half = specks[..., 2:3]
    columns, rows = (np.clip(half + 0.5 - np.abs(pixels - specks[..., i : i + 1]), 0, 1) * (half > 0) for i in (0, 1))
    colour = rgb(specks[..., 3], 0.8) - ground[:, None]  # (n, SPECKS, 3), as differences from the ground
    paint = (columns[..., None] * colour[:, :, None]).reshape(len(state), SPECKS, SIDE * 3).astype(np.float32)
    frames = ground[:, None, None] + np.einsum('nky,nkp->nyp', rows, paint).reshape(len(state), SIDE, SIDE, 3)

    # the shape: pixels into its own frame, distance to its edge, one pixel of antialiasing
    size, angle = np.exp(grow), np.radians(turn)
    cos, sin = ((f(angle) / size)[:, None, None] for f in (np.cos, np.sin))
    right, down = pixels[None, None, :] - x[:, None, None], pixels[None, :, None] - y[:, None, None]
    ahead, aside = cos * right + sin * down, cos * down - sin * right  # (n, SIDE, SIDE)
    cover = np.empty_like(ahead)
    for index in np.unique(shape):
        here = shape == index
        distance = list(SHAPES.values())[index](ahead[here], aside[here])
        cover[here] = np.clip(0.5 - distance * size[here, None, None], 0, 1) * fade[here, None, None]
    nose = np.clip(0.5 + (ahead - 0.25) * size[:, None, None], 0, 1)  # what lies further ahead is white
    colour = rgb(hue, saturation)[:, None, None].astype(np.float32)
    frames += cover[..., None] * (colour + nose[..., None] * (255 - colour) - frames)
    return np.clip(frames + noise[..., None], 0, 255).astype(np.uint8)


def appearance(rng, shape, ground):
    """The looks of n scenes whose shape and ground are given as indices (n,), as `draw` wants them."""
    n, grounds = len(shape), np.array(list(GROUNDS.values()))
    specks = rng.uniform((0, 0, 1, 0), (SIDE, SIDE, 2.5, 360), size=(n, SPECKS, 4))
    specks[..., 2] *= rng.random((n, SPECKS)) < 0.5
    ground = (grounds[ground] + rng.uniform(-9, 9, (n, 3))).astype(np.float32)
    return dict(shape=shape, ground=ground, saturation=rng.uniform(0.6, 0.9, n), specks=specks)


def noise(rng, n, scenes=1):
    """Grain (n, SIDE, SIDE) of a strength drawn once for each of `scenes` scenes."""
    strength = rng.uniform(0, 5, (scenes, 1, 1)).astype(np.float32)
    return rng.standard_normal((n, SIDE, SIDE), np.float32) * strength


# ---- Clips


def trajectory(name, u, phase=0.0, swing=1.0, offset=0.0):
    """The states (T, 6) that motion `name` goes through at times u (T,), all within MIDDLE +- REACH.

    swing in (0, 2/3] scales the motion; offset, (6,) or a number in [-1, 1], places it in the room that it leaves. Raises
    KeyError for an unknown name.
    """
    motion = MOTIONS[name]
    whole = motion(np.linspace(0, 1, 65), phase)
    mean = whole.mean(0)  # the mean state, which a bag of frames could tell, follows the same law in every class
    room = np.where(ROUND, 180 / REACH, 1 - 2 * swing * np.abs(whole - mean).max(0))
    return MIDDLE + REACH * (offset * room + 2 * swing * (motion(u, phase) - mean))


def clip(name, seed, number):
    """Clip `number` of a class: frames (20..32, SIDE, SIDE, 3) uint8 and a frame rate. The same arguments, the same clip."""
    rng = np.random.default_rng([seed, number, *name.encode()])
    n, rate = int(rng.integers(20, 33)), int(rng.choice([10, 12, 15, 24, 25, 30]))
    begin, end = rng.uniform((0, 0.9), (0.1, 1))
    u = np.clip((np.linspace(0, 1, n) - begin) / (end - begin), 0, 1)
    state = trajectory(name, u, rng.uniform(0, 360), rng.uniform(0.5, 0.66), rng.uniform(-1, 1, 6))
    look = appearance(rng, rng.integers(len(SHAPES), size=1), rng.integers(len(GROUNDS), size=1))
    look = {key: np.repeat(value, n, axis=0) for key, value in look.items()}
    drift = rng.uniform(-20, 20, (SPECKS, 2)) * (rng.random((SPECKS, 1)) < 0.4)  # some specks move too
    look['specks'][..., :2] += np.linspace(-0.5, 0.5, n)[:, None, None] * drift
    return draw(state=state, noise=noise(rng, n), **look), rate


def write_clip(job):
    """Encode one clip to its path, through a temporary name, so that a file under its own name is whole."""
    path, name, seed, number = job
    frames, rate = clip(name, seed, number)
    temporary = f'{path}.{os.getpid()}.tmp'
    with av.open(temporary, 'w', format='mp4') as container:
        # without mbtree: with it x264 gives other bytes each time on some processors
        options = dict(crf='20', preset='veryfast', threads='1', mbtree='0')
        stream = container.add_stream('libx264', rate, options=options)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, 'yuv420p'
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        container.mux(stream.encode())
    os.replace(temporary, path)


def write_dataset(out, per_class, seed=0, workers=2, names=None):
    """Write `per_class` clips of every class (or of `names`) to out/<class>/<number>.mp4; files already there stay."""
    jobs = []
    for name, number in itertools.product(names or MOTIONS, range(per_class)):
        path = os.path.join(out, name, f'{number:04d}.mp4')
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            jobs.append((path, name, seed, number))
    with multiprocessing.get_context('forkserver').Pool(workers) as pool:  # a fork may inherit locked locks, and hang
        for _ in tqdm(pool.imap_unordered(write_clip, jobs, chunksize=16), total=len(jobs), unit='clip', disable=None):
            pass


# ---- Captioned stills, to pretrain an image encoder on

WORDS = dict(
    size=['tiny', 'small', 'medium', 'large', 'huge'],
    fade=['faint', 'pale', 'clear', 'solid'],
    colour=['red', 'gold', 'lime', 'green', 'cyan', 'blue', 'violet', 'pink'],
    shape=list(SHAPES),
    row=['topmost', 'top', 'upper', 'middle', 'lower', 'bottom', 'lowest'],
    column=['leftmost', 'far left', 'left', 'centre', 'right', 'far right', 'rightmost'],
    heading=['right', 'down right', 'down', 'down left', 'left', 'up left', 'up', 'up right'],
    ground=list(GROUNDS),
)
CAPTION = 'a {size} {fade} {colour} {shape}, {row} {column}, turned {heading}, on {ground}'


def stills(rng, n, alike=1):
    """n captioned stills with the looks of the clips: frames (n, SIDE, SIDE, 3) uint8 and a list of n captions.

    alike > 1 draws groups of so many stills that share each attribute with probability 1/2, so that their captions differ in
    few words and every word counts; n must be a multiple of it.
    """
    shape, ground = rng.integers(len(SHAPES), size=n), rng.integers(len(GROUNDS), size=n)
    place = rng.uniform(-1, 1, (n, 6))  # within MIDDLE +- REACH; heading and hue anywhere
    for values in (shape, ground, *place.T):
        shared = np.repeat(rng.random(n // alike) < 0.5, alike) & (alike > 1)
        values[shared] = np.repeat(values[::alike], alike)[shared]
    state = MIDDLE + np.where(ROUND, 180, REACH) * place
    x, y, turn, grow, fade, hue = place.T
    picks = dict(shape=shape, ground=ground)
    for key, values in dict(size=grow, fade=fade, row=y, column=x).items():
        picks[key] = np.minimum((values + 1) / 2 * len(WORDS[key]), len(WORDS[key]) - 1).astype(int)
    for key, values in dict(heading=turn, colour=hue).items():
        picks[key] = np.rint(values * 4).astype(int) % 8
    captions = [CAPTION.format(**{key: WORDS[key][pick[i]] for key, pick in picks.items()}) for i in range(n)]
    look = appearance(rng, shape, ground)
    return draw(state=state, noise=noise(rng, n, n), **look), captions


def still(rng):
    """One captioned still: frame (SIDE, SIDE, 3) uint8 and its caption."""
    frames, captions = stills(rng, 1)
    return frames[0], captions[0]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='data/moving_shapes')
    parser.add_argument('--per_class', type=int, default=30)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=2)
    write_dataset(**vars(parser.parse_args()))
