"""Labels for your own clips, from a few examples of each class.

    python predict.py --support=my_examples/ --query=new.mp4                              mean-pooled CLIP, nothing trained
    python predict.py --support=my_examples/ --query=clips/ --ckpt=runs/diving48_vba/best.pt --top=3
    python predict.py --support=my_examples/ --query=long.mp4 --window=2.0 --stride=1.0 --csv=timeline.csv
    python predict.py --query=new.mp4 --ckpt=runs/ucf101_xclip/best.pt --classes="juggle,jump,swim"

my_examples/ holds a folder for each class with one or more clips, which are video files or folders of numbered frames.

In reading order: examples (read_examples, encode_examples, load_examples), queries (find_queries, whole_clips, labelled),
answers (answer). Queries never see each other (inductive), so a label does not depend on what else is asked. What was trained
with closed_set=True needs no examples: it answers with its own classes, or where it reads text with those of --classes.
"""

import csv
import functools
import glob
import itertools
import json
import os
import sys
from contextlib import closing

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import encoding
from config import amp, name_of, resolve
from decode import VIDEOS, Video, number_in
from model import Episode, look
from reader import ClipReader
from tools import report, timeline

NONE = 'none of these'
BATCH = 16  # clips encoded at a time
OPTIONS = dict(
    support=None,              # a folder per class with clips or folders of frames, or the file of an earlier save_support
    classes=None,              # of what was trained with closed_set=True: 'a,b' or a list of names; None: its own
    query=None,                # what to label: a clip, a folder of clips, a pattern such as clips/*.mp4, or a list of these
    ckpt=None,                 # a checkpoint
    method='mean_pool',        # without a checkpoint: a method that needs no training
    unknown=None,              # a raw score, as eval.py --open_set=True finds one; below it the answer is 'none of these'
    top=1,                     # classes printed for each query, best first
    json=False,                # print one JSON object a line instead
    save_support=None,         # a file to keep the encoded examples in
    window=0.0,                # seconds of a window that slides over each query; 0: one label for the whole clip
    stride=1.0,                # seconds from one window to the next
    smooth=1,                  # windows whose scores are averaged around each one of a timeline
    least=0.0,                 # seconds; shorter stretches of a timeline go to their neighbours
    csv=None,                  # a file for the scores of every window
    report=None,               # an HTML page of frames, scores and the nearest examples, or of timelines
)


# ---- Examples

def read_examples(folder):
    """A folder with a folder for each class -> data.Split. Stops with one sentence when it has fewer than two classes."""
    entries = list(os.scandir(folder))
    loose = [entry.name for entry in entries if entry.name.lower().endswith(VIDEOS)]
    if loose:
        print(f'Warning: {folder} holds {len(loose)} clips outside of class folders, such as {loose[0]}; left out.',
              file=sys.stderr)
    names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    if len(names) < 2:
        sys.exit(f'{folder} holds {len(names)} class folders, not two or more with clips or folders of frames in each.')
    found = [sorted(video for _, video in data.list_folders(os.path.join(folder, name))) for name in names]
    labels = np.repeat(np.arange(len(names)), [len(videos) for videos in found])
    return data.Split('support', names, sum(found, []), labels)


def jobs(split):
    """All its videos, BATCH at a time, as ClipReader.stream takes them."""
    return [(0, np.arange(i, min(i + BATCH, len(split.videos)))) for i in range(0, len(split.videos), BATCH)]


@torch.no_grad()
def encode(config, clip, method, frames):
    """Frames (V, T, 3, H, W) uint8 -> what the method keeps of these videos, tensors (V, ...)."""
    with amp(config):
        seen = look(clip.visual, frames.to(config['device']), method.sees)
    return encoding.videos(config, method, seen)


def encode_examples(config, clip, method, split, reader):
    """A Split -> dict(classes, labels (V,) int64, kept): what the method keeps of the videos that can be read."""
    kept, read = [], []
    for frames, indices in tqdm(reader.stream(split, jobs(split), train=False), 'encoding examples', leave=False, disable=None):
        if len(indices):
            kept.append(encode(config, clip, method, frames))
            read.extend(indices.tolist())
    labels = torch.from_numpy(split.labels[read])
    for label, name in enumerate(split.classes):
        if label not in labels:
            sys.exit(f'Class {name!r} has no clip that could be read: each class needs one.')
    paths = [split.videos[i].path for i in read]
    return dict(classes=split.classes, labels=labels, paths=paths, kept=[torch.cat(parts) for parts in zip(*kept)])


def load_examples(path, made):
    """The dict that was saved with `made`, a fingerprint. Stops with one sentence when it is none or `made` differs."""
    try:
        examples = torch.load(path, map_location='cpu', weights_only=True)
        differing = [key for key in {**made, **examples['made']} if examples['made'].get(key) != made.get(key)]
    except FileNotFoundError:
        sys.exit(f'There is no {path}: support is a folder of classes, or a file written by --save_support.')
    except Exception as error:
        sys.exit(f'{path} is no file of --save_support ({type(error).__name__}), and no folder of classes.')
    if differing:
        sys.exit(f'The examples in {path} were encoded otherwise: ' + ', '.join(
            f'{key} {str(examples["made"].get(key))[:12]} (now {str(made.get(key))[:12]})' for key in differing) + '.')
    return examples


def own_classes(config, method):
    """What answers without examples, in the form of `encode_examples`: the classes named on the command line, or its own."""
    classes = config['classes'] or method.names
    if isinstance(classes, str):
        classes = [name.strip() for name in classes.split(',') if name.strip()]
    if not classes:
        sys.exit('Nothing was trained, so --classes= must name the classes.')
    if classes != method.names and not getattr(method, 'text', False):
        sys.exit(f'method={name_of(config["method"])} reads no names: it answers with the classes that it trained on alone.')
    return dict(classes=classes, labels=torch.zeros(0, dtype=torch.int64), kept=[])


def number_of(examples):
    """How many examples the classes have, in words."""
    if not len(examples['labels']):
        return 'no'
    counts = examples['labels'].bincount()
    return f'{counts.min()} to {counts.max()}' if counts.min() < counts.max() else str(counts.max().item())


@torch.no_grad()
def label(config, method, examples, kept):
    """Examples and what `encode` gives of M clips -> scores (M, N) that add up to 1 for each clip: one inductive episode. With
    config['unknown'] the last of N + 1 is that of 'none of these'."""
    if len(examples['labels']):
        kept = [torch.cat([x.to(y), y]) for x, y in zip(examples['kept'], kept)]
    index = torch.arange(len(kept[0]), device=config['device'])[None]  # (1, B)
    classes = torch.arange(len(examples['classes']), device=config['device'])[None]  # (1, N)
    labels = examples['labels'].to(config['device'])
    try:
        with amp(config):
            scores = method.scores(kept, Episode(labels, classes, examples['classes'], joint=False, index=index))
    except ValueError as error:  # of a name that it cannot read
        sys.exit(str(error))
    scores = scores[0].float()
    if config['unknown'] is not None:  # one more class, of this score everywhere
        scores = torch.cat([scores, torch.full_like(scores[:, :1], config['unknown'])], -1)
    return scores.softmax(-1)


# ---- Queries

def find_queries(query):
    """A clip, a folder of clips (below it too), a folder of frames, a pattern, or a list of these -> paths. What is not there
    stays in the list, to be named when it is read."""
    paths = []
    for item in query if isinstance(query, list) else [query]:
        item = os.path.expanduser(item)
        if os.path.isdir(item):
            found = sorted((video.path for _, video in data.list_folders(item)), key=number_in)
        else:
            found = [] if os.path.exists(item) else sorted(glob.glob(item), key=number_in)
        paths += found or [item]
    return list(dict.fromkeys(paths))


def whole_clips(paths, reader):
    """Yields (path, None, None, clip uint8 (T, 3, H, W), or what is wrong with it) for each path."""
    split = data.Split('query', [''], [Video(path) for path in paths], np.zeros(len(paths), np.int64))
    for (_, job), (frames, read) in zip(jobs(split), reader.stream(split, jobs(split), train=False)):
        clips = dict(zip(read.tolist(), frames))
        yield from ((paths[i], None, None, clips[i] if i in clips else reader.bad[split.videos[i]]) for i in job)


def labelled(clips, encode, label):
    """(path, start, end, clip or a word), ... -> (path, start, end, N scores or the word, clip, what is kept of it), ..."""
    for unread, run in itertools.groupby(clips, lambda row: isinstance(row[3], str)):
        if unread:
            yield from ((*row, None, None) for row in run)
            continue
        while batch := list(itertools.islice(run, BATCH)):
            kept = encode(torch.stack([clip for *_, clip in batch]))
            for i, (row, scores) in enumerate(zip(batch, label(kept).tolist())):
                path, start, end, clip = row
                yield path, start, end, scores, clip, [x[i:i + 1] for x in kept]


# ---- Answers

def answer(config, classes, rows, method):
    """Prints what `labelled` yields, query by query, and writes --csv. Returns the paths that failed."""
    failed = {}

    def good(path, rows):  # -> (start, end, scores)
        for _, start, end, scores, *_ in rows:
            if isinstance(scores, str):
                failed[path] = scores
                continue
            span = [''] * 2 if start is None else [f'{start:.3f}', f'{end:.3f}']
            table.writerow([path, *span, classes[np.argmax(scores)], *(f'{score:.4f}' for score in scores)])
            yield start, end, scores

    try:
        file = open(config['csv'] or os.devnull, 'w', newline='', encoding='utf-8', errors='surrogateescape')
    except OSError as error:
        sys.exit(f'Cannot write {config["csv"]}: {error.strerror}.')
    with file:
        table = csv.writer(file)
        table.writerow(['query', 'start', 'end', 'class', *classes])
        for path, rows_of_path in itertools.groupby(rows, key=lambda row: row[0]):
            found, say = dict(query=path, method=method), (lambda *words: None) if config['json'] else print
            if config['window']:
                say(path)
                found['timeline'] = []
                for start, end, name, value in timeline.stretches(good(path, rows_of_path), classes, config):
                    found['timeline'].append(dict(start=start, end=end, name=name, score=value))
                    say(f'{start:9.1f} {end:9.1f} s   {value:.3f}  {name}')
            for _, _, scores in () if config['window'] else good(path, rows_of_path):
                best = sorted(zip(scores, classes), reverse=True)[:config['top']]
                found['classes'] = [dict(name=name, score=value) for value, name in best]
                say(path + ': ' + ', '.join(f'{name} {value:.3f}' for value, name in best))
            if config['json']:
                print(json.dumps(found | (dict(error=failed[path]) if path in failed else {})))
            sys.stdout.flush()
    return failed


def main():
    config, found = checkpoint.configure(sys.argv[1:], OPTIONS)
    if len(found) > 1:
        sys.exit(f'predict.py takes one checkpoint, not {len(found)}.')
    path, saved, config = found[0] if found else (None, None, config)
    config.update(cache_gb=0.0, cache_dir=None)  # every clip is read once
    if config['closed_set'] and (config['support'] or config['save_support'] or not config['query']):
        sys.exit('With closed_set=True predict.py needs --query=<clips>, and takes no --support.')
    if config['classes'] and not config['closed_set']:
        sys.exit('--classes is for what was trained with closed_set=True; the classes are the folders of --support.')
    if not config['closed_set'] and (not config['support'] or not (config['query'] or config['save_support'])):
        sys.exit('predict.py needs --support=<a folder with a folder per class> and --query=<clips>.')
    resolve(config)
    clip = checkpoint.load_clip(config)
    if found:
        method = checkpoint.rebuild(config, clip, saved, path)
    else:
        method = checkpoint.build(config, clip, []).to(config['device']).eval()
        if any(p.requires_grad for p in method.parameters()):
            sys.exit(f'method={config["method"]} must be trained: --ckpt= names its checkpoint.')
    clip.to(config['device'])

    with closing(ClipReader(config, clip.visual.image_size)) as reader:
        made = checkpoint.fingerprint(config, clip, method)
        if config['closed_set']:
            examples = own_classes(config, method)
        elif os.path.isdir(config['support']):
            examples = encode_examples(config, clip, method, read_examples(config['support']), reader)
        else:
            examples = load_examples(config['support'], made)
        if config['save_support']:
            with checkpoint.whole(config['save_support'], 'wb') as file:
                torch.save(dict(examples, made=made), file)
        if not config['query']:
            return
        name, classes = name_of(config['method']), examples['classes'] + [NONE] * (config['unknown'] is not None)
        if not config['json']:
            known = f'{len(examples["classes"])} classes, {number_of(examples)} examples each'
            print(f'{name}, {known}; scores add up to 1 over the classes', flush=True)
        paths = find_queries(config['query'])
        size = clip.visual.image_size
        clips = timeline.all_windows(paths, config, size) if config['window'] else whole_clips(paths, reader)
        scored = labelled(clips, functools.partial(encode, config, clip, method),
                          functools.partial(label, config, method, examples))
        if config['report']:
            by_method = functools.partial(label, config | dict(unknown=None), method)
            scored = report.page(config, examples, classes, size, scored, by_method)
        failed = answer(config, classes, scored, name)
    if failed:
        sys.exit(f'{len(failed)} of {len(paths)} queries could not be read.')


if __name__ == '__main__':
    main()
