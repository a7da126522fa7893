"""Moving shapes: a small video dataset, drawn on the spot, whose classes differ only in the order of what happens.

    python demo/shapes.py --out data/moving_shapes                       # one folder of H.264 clips per class
    python demo/shapes.py --out data/moving_shapes_hard --level=hard     # or easy

In reading order: what can change (the five channels), the motions, their groups and splits, the levels, the drawing, clips,
captioned stills.

The actor is the coloured shape with a white nose. Its state is a point in a space of five channels, and a class is a way
through that space: from a start straight to a corner, then straight to an end. Classes of the same net change, the end less
the start, are a group, and a group lies whole in one split: within it only what happens in between tells the classes apart.
The way played backwards is the way of another class of the same split, which no bag of frames tells from it, and the mean
state of a clip is drawn around the same middle in every class, so an average of frames tells nothing. All else (the shape, its
colour, place, speed and onset, the ground, another shape's own motion) is drawn anew for every clip, over the same ranges in
every class.
"""

import argparse
import itertools
import multiprocessing
import os

import av
import numpy as np
from tqdm import tqdm

SIDE = 64  # frames are SIDE x SIDE pixels

# ---- The five channels: place, heading (clockwise, degrees), log of the radius, opacity

X, Y, TURN, GROW, FADE = np.eye(5)
MIDDLE = np.array([32, 32, 0, np.log(9), 0.6])
REACH = np.array([21, 21, 120, np.log(1.8), 0.4])  # every clip stays within MIDDLE +- REACH ...
ROUND = np.array([0, 0, 1, 0, 0], bool)  # ... but for the heading, which goes round and may start anywhere

# ---- Motions: name -> its net change and its corner, both seen from the start, vectors over the channels

STEPS = {
    'move right': X, 'move left': -X, 'move down': Y, 'move up': -Y, 'spin clockwise': TURN, 'spin counter-clockwise': -TURN,
    'grow': GROW, 'shrink': -GROW, 'fade in': FADE, 'fade out': -FADE,
}  # fmt: skip
DETOURS = (('move right', 'move left'), ('move down', 'move up'), ('grow', 'shrink'), ('fade in', 'fade out'))


def straight(name, net):
    """The three motions of a net change that know no other channel."""
    return {name: (net, net / 2), f'{name}, too far and back': (net, 1.5 * net), f'back first, then {name}': (net, -net / 2)}


MOTIONS, GROUPS = {}, {}  # GROUPS: the name of a net change -> its motions
for (a, da), (b, db) in itertools.combinations(STEPS.items(), 2):
    if da @ db == 0:  # two channels: one after the other, or both at once
        net = da + db
        GROUPS[f'{a} and {b}'] = {f'{a} then {b}': (net, da), f'{b} then {a}': (net, db)} | straight(f'{a} and {b}', net)
for a, da in STEPS.items():
    aside = next(pair for pair in DETOURS if STEPS[pair[0]] @ da == 0)  # both ways round
    GROUPS[a] = straight(a, da) | {f'{a} by way of {b}': (da, da / 2 + STEPS[b]) for b in aside}
GROUPS['there and back'] = {f'{a} and back': (0 * da, da) for a, da in STEPS.items()}
for group in GROUPS.values():
    MOTIONS |= group

HELD_OUT = dict(  # groups; each beside the one that is it played backwards
    val=[
        'move right and spin counter-clockwise', 'move left and spin clockwise',
        'move down and fade in', 'move up and fade out',
        'spin clockwise and grow', 'spin counter-clockwise and shrink',
    ],
    test=[
        'move right and move down', 'move left and move up',
        'move left and grow', 'move right and shrink',
        'move up and spin clockwise', 'move down and spin counter-clockwise',
        'grow and fade out', 'shrink and fade in',
        'move down', 'move up',
    ],
)  # fmt: skip
HELD_OUT['train'] = [name for name in GROUPS if name not in HELD_OUT['val'] + HELD_OUT['test']]
SPLITS = {split: [list(GROUPS[name]) for name in names] for split, names in HELD_OUT.items()}  # lists of groups
FOR_TRAINING = {name for group in SPLITS['train'] for name in group}

# ---- Levels: the bounds between which each clip draws its own value, or a share of the clips

LEVELS = ('easy', 'default', 'hard')
BOUNDS = dict(  # a value for each level
    seconds=((1.5, 3), (1.5, 6), (1.5, 6)),        # length of a clip
    part=((0.8, 1), (1 / 3, 1), (1 / 3, 1)),       # share of it in which the actor moves; it rests before and after
    corner=((0.5, 0.5), (0.4, 0.6), (0.3, 0.7)),   # share of the motion's time until its corner
    contrast=((0, 0), (0, 0.6), (0, 1)),           # of the ground's texture: 1 goes all the way to its second colour
    flow=(0, 6, 12),                               # pixels by which the texture drifts, at most
    camera=(0, 2, 4),                              # pixels by which the camera sways to each side, at most
    second=(0, 0.5, 1),                            # share of clips with a second shape: grey, without a nose, moving too
    bar=(0, 0.25, 0.5),                            # share of clips in which a bar passes before all
    crf=(20, 27, 33),                              # x264's, higher is coarser
)  # fmt: skip
RATES = (8, 10, 12, 15)  # frames a second


def bounds_of(level):
    """'easy', 'default' or 'hard' -> its column of BOUNDS. Raises ValueError for another name."""
    return {key: values[LEVELS.index(level)] for key, values in BOUNDS.items()}


# ---- Drawing: signed distances in a shape's own frame (radius 1, heading along +x), over a ground


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
TEXTURES = (  # of points (p, q) in radians, -1 to 1
    lambda p, q: np.sin(p),  # stripes
    lambda p, q: np.sin(p) * np.sin(q),  # checks
    lambda p, q: np.sin(p + 1.5 * np.sin(q)),  # waves
    lambda p, q: np.sin(np.hypot(p, q)),  # rings
    lambda p, q: (np.sin(p) + np.sin(0.5 * p + 0.87 * q) + np.sin(0.5 * p - 0.87 * q)) / 3,  # cells
)
KNOWN = dict(textures=(0, 1, 2), pairs=(1, 2, 4, 5))  # of stills and training clips; a pair of ground colours: places apart
HELD = dict(textures=(3, 4), pairs=(3,))  # of the clips of other classes alone
SPECKS = 5  # at most so many small squares
PIXELS = np.arange(SIDE, dtype=np.float32) + 0.5


def rgb(hue, saturation=1.0):
    """Colours (..., 3), 0 to 255, of hues in degrees."""
    wheel = np.clip(np.abs((np.asarray(hue)[..., None] / 60 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return 255 * (1 - np.asarray(saturation)[..., None] * (1 - wheel))


def draw_ground(ground, texture, grating, specks):
    """n grounds, (n, SIDE, SIDE, 3) float32, 0 to 255.

    ground (n, 2, 3) two colours, texture (n,) indices into TEXTURES, grating (n, 5): angle, radians a pixel, contrast, and the
    texture's shift in pixels (x, y); specks (n, SPECKS, 4): x, y, half side (0: none) and hue.
    """
    angle, scale, contrast, right, down = grating.astype(np.float32).T[:, :, None, None]
    x, y = PIXELS - right, PIXELS[:, None] - down
    p, q = scale * (np.cos(angle) * x + np.sin(angle) * y), scale * (np.cos(angle) * y - np.sin(angle) * x)
    value = np.empty_like(p)
    for index in np.unique(texture):
        here = texture == index
        value[here] = TEXTURES[index](p[here], q[here])
    first, second = ground.astype(np.float32)[:, :, None, None].swapaxes(0, 1)  # (n, 1, 1, 3) each
    frames = first + (contrast * (1 + value) / 2)[..., None] * (second - first)

    # specks: a square is its columns times its rows, so all of them together are one sum
    specks = specks.astype(np.float32)
    half = specks[..., 2:3]
    columns, rows = (np.clip(half + 0.5 - np.abs(PIXELS - specks[..., i:i + 1]), 0, 1) * (half > 0) for i in (0, 1))
    colour = (rgb(specks[..., 3], 0.8) - ground[:, :1]).astype(np.float32)  # (n, SPECKS, 3), as differences from the ground
    paint = (columns[..., None] * colour[:, :, None]).reshape(len(specks), SPECKS, SIDE * 3)
    return frames + (rows.swapaxes(1, 2) @ paint).reshape(frames.shape)


def draw_shape(frames, state, shape, body, nose):
    """Paint one shape over each of n frames, in place.

    state (n, 5) the channels, shape (n,) indices into SHAPES, body (n, 3) its colour and nose (n, 3) that of what lies ahead.
    """
    x, y, turn, grow, fade = state.astype(np.float32).T
    # pixels into the shape's own frame, distance to its edge, one pixel of antialiasing
    size, angle = np.exp(grow), np.radians(turn)
    cos, sin = ((f(angle) / size)[:, None, None] for f in (np.cos, np.sin))
    right, down = PIXELS[None, None, :] - x[:, None, None], PIXELS[None, :, None] - y[:, None, None]
    ahead, aside = cos * right + sin * down, cos * down - sin * right  # (n, SIDE, SIDE)
    cover = np.empty_like(ahead)
    for index in np.unique(shape):
        here = shape == index
        distance = list(SHAPES.values())[index](ahead[here], aside[here])
        cover[here] = np.clip(0.5 - distance * size[here, None, None], 0, 1) * fade[here, None, None]
    share = np.clip(0.5 + (ahead - 0.25) * size[:, None, None], 0, 1)[..., None]  # of the nose
    body, nose = (colour.astype(np.float32)[:, None, None] for colour in (body, nose))
    frames += cover[..., None] * (body + share * (nose - body) - frames)


def draw(state, shape, colour, second, second_shape, grey, bar, noise, **ground):
    """Draw n frames, (n, SIDE, SIDE, 3) uint8.

    state, shape and colour (n, 3) of the actor; second, second_shape and grey (n,) of the second shape, which is not there
    where its opacity is 0; bar (n,) the middle of a bar in pixels from the left; noise (n, SIDE, SIDE) added to every colour;
    the rest as in draw_ground.
    """
    frames = draw_ground(**ground)
    there = second[:, 4] > 0
    if there.any():
        some, plain = frames[there], np.repeat(grey[there, None], 3, axis=1)
        draw_shape(some, second[there], second_shape[there], plain, plain)
        frames[there] = some
    draw_shape(frames, state, shape, colour, np.full((len(frames), 3), 255))
    cover = np.clip(5.5 - np.abs(PIXELS - bar[:, None]), 0, 1)[:, None, :, None]
    frames += cover * (40 - frames)
    return np.clip(frames + noise[..., None], 0, 255).astype(np.uint8)


def appearance(rng, shape, ground, hue, contrast=(0, 1), looks=KNOWN):
    """The looks of n scenes as `draw` wants them, but for what moves. shape, ground and hue (n,) are given."""
    n, grounds = len(shape), np.array(list(GROUNDS.values()))
    specks = rng.uniform((0, 0, 1, 0), (SIDE, SIDE, 2.5, 360), size=(n, SPECKS, 4))
    specks[..., 2] *= rng.random((n, SPECKS)) < 0.5
    pair = np.stack([ground, (ground + rng.choice(looks['pairs'], n)) % len(GROUNDS)], 1)
    low = (0, 2 * np.pi / 28, contrast[0], 0, 0)
    high = (np.pi, 2 * np.pi / 9, contrast[1], SIDE, SIDE)
    return dict(
        shape=shape, colour=rgb(hue, rng.uniform(0.6, 0.9, n)), specks=specks,
        second_shape=rng.integers(len(SHAPES), size=n), grey=rng.uniform(110, 190, n),
        ground=grounds[pair] + rng.uniform(-9, 9, (n, 1, 3)), texture=rng.choice(looks['textures'], n),
        grating=rng.uniform(low, high, (n, 5)),
    )  # fmt: skip


def noise(rng, n, scenes=1):
    """Grain (n, SIDE, SIDE) of a strength drawn once for each of `scenes` scenes."""
    strength = rng.uniform(0, 5, (scenes, 1, 1)).astype(np.float32)
    return rng.standard_normal((n, SIDE, SIDE), np.float32) * strength


# ---- Clips


def course(rng, name, n, part, corner):
    """The states (n, 5) of a shape in n frames: it rests, goes through motion `name`, and rests; all within MIDDLE +- REACH.

    part and corner as in BOUNDS. Raises KeyError for an unknown name.
    """
    net, bend = MOTIONS[name]
    moving = rng.uniform(*part)
    onset = rng.uniform(0, 1 - moving)
    times = onset, onset + moving * rng.uniform(*corner), onset + moving
    way = np.stack([np.interp(np.linspace(0, 1, n), times, channel) for channel in np.stack([0 * net, bend, net]).T], 1)
    way = rng.uniform(0.6, 0.8) * (way - way.mean(0))  # the mean, which a bag of frames could tell, says nothing
    room = np.where(ROUND, 180 / REACH, 1 - np.abs(way).max(0))
    return MIDDLE + REACH * (rng.uniform(-1, 1, 5) * room + way)


def clip(name, seed, number, level='default'):
    """Clip `number` of a class: frames (n, SIDE, SIDE, 3) uint8 and a frame rate. The same arguments, the same clip."""
    rng, bounds = np.random.default_rng([seed, number, *name.encode()]), bounds_of(level)
    rate = int(rng.choice(RATES))
    n = round(rate * rng.uniform(*bounds['seconds']))
    u = np.linspace(-0.5, 0.5, n)[:, None]
    state = course(rng, name, n, bounds['part'], bounds['corner'])
    second = course(rng, rng.choice(list(MOTIONS)), n, bounds['part'], bounds['corner'])
    second[:, 4] *= rng.random() < bounds['second']
    one = [rng.integers(len(some), size=1) for some in (SHAPES, GROUNDS)]
    look = appearance(rng, *one, rng.uniform(0, 360, 1), bounds['contrast'], KNOWN if name in FOR_TRAINING else HELD)
    look = {key: np.repeat(value, n, axis=0) for key, value in look.items()}
    look['specks'][..., :2] += u[:, None] * rng.uniform(-20, 20, (SPECKS, 2)) * (rng.random((SPECKS, 1)) < 0.4)
    look['grating'][:, 3:] += u * rng.uniform(-1, 1, 2) * bounds['flow']
    middle = -10 + (SIDE + 20) * (u[:, 0] - rng.uniform(-0.4, 0.2)) / 0.2  # a bar is on its way for a fifth of the clip
    look['bar'] = np.where(rng.random() < bounds['bar'], middle, -SIDE)
    swing, cycles, phase = rng.uniform(0, bounds['camera'], 2), rng.uniform(0.3, 1.2, 2), rng.random(2)
    sway = swing * np.sin(2 * np.pi * (u * cycles + phase))  # (n, 2)
    for moved in (state[:, :2], second[:, :2], look['grating'][:, 3:], look['specks'][..., :2].swapaxes(0, 1)):
        moved += sway
    return draw(state=state, second=second, noise=noise(rng, n), **look), rate


def write_clip(job):
    """Encode one clip to its path, through a temporary name, so that a file under its own name is whole."""
    path, name, seed, number, level = job
    frames, rate = clip(name, seed, number, level)
    temporary = f'{path}.{os.getpid()}.tmp'
    with av.open(temporary, 'w', format='mp4') as container:
        # without mbtree: with it x264 gives other bytes each time on some processors
        options = dict(crf=str(bounds_of(level)['crf']), preset='veryfast', threads='1', mbtree='0')
        stream = container.add_stream('libx264', rate, options=options)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, 'yuv420p'
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        container.mux(stream.encode())
    os.replace(temporary, path)


def write_dataset(out, per_class=20, seed=0, workers=2, names=None, level='default'):
    """Write `per_class` clips of every class (or of `names`) to out/<class>/<number>.mp4; files already there stay."""
    jobs = []
    for name, number in itertools.product(names or MOTIONS, range(per_class)):
        path = os.path.join(out, name, f'{number:04d}.mp4')
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            jobs.append((path, name, seed, number, level))
    start = 'forkserver' if hasattr(os, 'fork') else 'spawn'  # a fork may inherit locked locks, and hang
    with multiprocessing.get_context(start).Pool(workers) as pool:
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
    """n captioned stills of actors: frames (n, SIDE, SIDE, 3) uint8 and a list of n captions. Half have a second shape, which
    the caption does not mention, a tenth a bar; textures and pairs of ground colours are those of training clips.

    alike > 1 draws groups of so many stills that share each attribute with probability 1/2, so that their captions differ in
    few words and every word counts; n must be a multiple of it.
    """
    shape, ground = rng.integers(len(SHAPES), size=n), rng.integers(len(GROUNDS), size=n)
    colour = rng.uniform(-1, 1, n)
    place = rng.uniform(-1, 1, (n, 5))  # within MIDDLE +- REACH; heading anywhere
    for values in (shape, ground, colour, *place.T):
        shared = np.repeat(rng.random(n // alike) < 0.5, alike) & (alike > 1)
        values[shared] = np.repeat(values[::alike], alike)[shared]
    x, y, turn, grow, fade = place.T
    picks = dict(shape=shape, ground=ground)
    for key, values in dict(size=grow, fade=fade, row=y, column=x).items():
        picks[key] = np.minimum((values + 1) / 2 * len(WORDS[key]), len(WORDS[key]) - 1).astype(int)
    for key, values in dict(heading=turn, colour=colour).items():
        picks[key] = np.rint(values * 4).astype(int) % 8
    captions = [CAPTION.format(**{key: WORDS[key][pick[i]] for key, pick in picks.items()}) for i in range(n)]
    state, second = (MIDDLE + np.where(ROUND, 180, REACH) * where for where in (place, rng.uniform(-1, 1, (n, 5))))
    second[:, 4] *= rng.random(n) < 0.5
    bar = np.where(rng.random(n) < 0.1, rng.uniform(0, SIDE, n), -SIDE)
    look = appearance(rng, shape, ground, 180 * colour)
    return draw(state=state, second=second, bar=bar, noise=noise(rng, n, n), **look), captions


def still(rng):
    """One captioned still: frame (SIDE, SIDE, 3) uint8 and its caption."""
    frames, captions = stills(rng, 1)
    return frames[0], captions[0]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='data/moving_shapes')
    parser.add_argument('--level', choices=LEVELS, default='default')
    parser.add_argument('--per_class', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--groups', type=int, help='the motions of the first groups of each split alone')
    options = vars(parser.parse_args())
    count = options.pop('groups')
    names = [name for groups in SPLITS.values() for group in groups[:count] for name in group]
    write_dataset(**options, names=names)
