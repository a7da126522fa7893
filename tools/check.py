"""Before you train: finds and opens every video of a config's lists.

    python data.py sample_configs/diving48.py [--key=value ...]
    python data.py sample_configs/diving48.py --sheet=clips.png
"""

import hashlib
import json
import os
import sys
from contextlib import closing
from fractions import Fraction

import av
import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from config import load_config
from data import SPLITS, Split, groups_of, list_videos, load_splits, read_verdicts, sizes_of, try_episodes, verdict_file
from decode import IMAGES, stamp
from reader import ClipReader

FIRST_BYTES = 2 ** 18  # of a file, that tell it from others of its size
OPTIONS = dict(
    sheet=None,                # write this PNG of training and test clips as the model sees them, instead of the check
)


def look_alike(video):
    """What two copies of a video share, without reading them whole: size and a hash of the first bytes, or of a folder of
    images their number and the one in the middle. None where it cannot be read."""
    path, size = video.path, stamp(video)[1]
    try:
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if name.lower().endswith(IMAGES))
            path, size = os.path.join(path, names[len(names) // 2]), len(names)
        with open(path, 'rb') as file:
            return size, hashlib.sha256(file.read(FIRST_BYTES)).digest(), video.start, video.end
    except OSError:
        return None


def find_twice(listing):
    """Videos that are the same in two classes or splits, for each such video [(split, class, path), ...]."""
    by_size, copies = {}, {}
    for split, (classes, listed) in listing.items():
        for label, _, video in listed:
            if video:
                by_size.setdefault(stamp(video)[1], []).append((split, classes[label], video))
    for some in by_size.values():
        for split, name, video in some if len(some) > 1 else ():  # a size that no other has needs no look
            copies.setdefault(look_alike(video), []).append((split, name, video.path))
    copies.pop(None, None)
    return [places for places in copies.values() if len({place[:2] for place in places}) > 1]


def check(config):
    """Finds and opens every video of the splits, on all cores, and prints what is missing, unreadable or too short.

    Verdicts are kept as they come: a second run opens only what is new. Stops with status 1 if no model can be trained.
    """
    checkpoint.make_folder(config['out_dir'])
    listing, verdicts = list_videos(config), read_verdicts(config)
    found = {video: stamp(video) for _, listed in listing.values() for _, _, video in listed if video}
    todo = [video for video, key in found.items() if key not in verdicts]
    try:
        os.makedirs(os.path.dirname(verdict_file(config)), exist_ok=True)
        file = open(verdict_file(config), 'a', encoding='ascii')
    except OSError as error:
        sys.exit(f'Cannot write {verdict_file(config)} ({error.strerror}): set cache_dir to a folder that can be written.')
    with closing(ClipReader(config | dict(workers=config['workers'] or None, resize=config['resize'] or 256), 1)) as reader:
        with file:
            for video, frames, note, problem in tqdm(reader.check(todo), 'videos', len(todo), disable=not todo):
                verdict = verdicts[found[video]] = frames, note, problem and problem.removeprefix(video.path + ': ')
                file.write('\n' + json.dumps([found[video], *verdict]))
                file.flush()

    print(f'split    classes  listed   found missing unreadable damaged  below {config["frames"]} frames')
    bad, splits = [], {}
    for split, (classes, listed) in listing.items():
        counts, good = dict(missing=0, unreadable=0, damaged=0, short=0), []
        for label, name, video in listed:
            frames, note, problem = verdicts[found[video]] if video else (0, None, 'missing')
            counts['missing'] += video is None
            counts['unreadable'] += video is not None and problem is not None
            counts['damaged'] += note is not None
            counts['short'] += problem is None and frames < config['frames']
            if problem or note:
                bad.append(f'{split}\t{classes[label]}\t{video.path if video else name}\t{problem or note}')
            if not problem:
                good.append((label, video))
        print(f'{split:8}{len(classes):8}{len(listed):8}{len(listed) - counts["missing"]:8}{counts["missing"]:8}'
              f'{counts["unreadable"]:11}{counts["damaged"]:8}  {counts["short"]}')
        groups = groups_of(config, split) if split != 'train' or config['train_groups'] else []
        splits[split] = Split(split, classes, [video for _, video in good], np.array([label for label, _ in good], np.int64),
                              [] if config['closed_set'] else groups)
    twice = find_twice(listing)
    for (split, name, path), *others in twice:
        bad += [f'{split}\t{name}\t{path}\tthe same video as {other} ({of}, {other_name})' for of, other_name, other in others]
    report = os.path.join(config['out_dir'], 'check.txt')
    with open(report, 'w', encoding='utf-8', errors='surrogateescape') as file:
        file.writelines(line + '\n' for line in bad)
    if twice:
        print(f'Warning: {len(twice)} videos are there twice, in two classes or splits, such as '
              + ' and '.join(f'{path} ({split}, {name})' for split, name, path in twice[0][:2]))
    for line in bad[:5]:
        print('  ' + line.replace('\t', '  '))
    if bad:
        print(f'All {len(bad)} of them, one a line: {report}')

    stop = None
    for use in SPLITS:
        _, shot, queries = max(sizes_of(config, use, splits[use]), key=sum)
        few = [f'{name!r} ({len(found)})' for name, found in zip(splits[use].classes, splits[use].members)
               if len(found) < shot + queries]
        if few and not config['closed_set']:
            print(f'{use}: {len(few)} classes have fewer than the {shot} + {queries} videos of an episode: '
                  f'{", ".join(few[:5])}{", ..." if len(few) > 5 else ""}')
        try:
            try_episodes(config, use, splits[use])
        except SystemExit as error:
            print(f'{use}: {error}')
            stop = stop or error
    if stop:
        sys.exit(f'{config["dataset"] or "This"} cannot be trained: {stop}')
    print(f'{config["dataset"] or "This"} can be trained.')


def contact_sheet(config, path):
    """Writes a PNG of training and then of test clips as the model sees them, one a row."""
    splits, size = load_splits(config), checkpoint.load_clip(config).visual.image_size
    shown, names = [], []
    with closing(ClipReader(config, size)) as reader:
        for split in [splits[name] for name in ('train', 'test') if splits[name].videos]:
            clips = [i for members in split.members[:config['way']] for i in members[:2]]
            frames, indices = next(reader.stream(split, [(0, clips)], split.name == 'train'))
            shown.append(frames)
            names += [f'{split.classes[split.labels[i]]} ({split.name})' for i in indices]
    rows = torch.cat(shown).permute(0, 3, 1, 4, 2).reshape(len(names) * size, -1, 3).contiguous().numpy()  # (n H, T W, 3)
    codec = av.CodecContext.create('png', 'w')
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *rows.shape[:2], 'rgb24', Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(rows, 'rgb24')
    with open(path, 'wb') as file:
        file.write(b''.join(bytes(packet) for packet in codec.encode(frame) + codec.encode(None)))
    print(f'{path}: a clip a row, ' + ', '.join(names))


def main():
    config = load_config(sys.argv[1:], OPTIONS, script=sys.modules[__name__])
    if config['sheet']:
        contact_sheet(config, config['sheet'])
    else:
        check(config)
