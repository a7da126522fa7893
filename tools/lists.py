"""The lists that people have -> rows of class, path and the part of the file. README says which they are."""

import json
import os
import re
import sys

from decode import VIDEOS

# Dialects of text lists, the first that fits every line: kind, and what a line looks like.
DIALECTS = [(kind, re.compile(pattern)) for kind, pattern in (
    ('FineGym categories', r'Clabel:\s*(?P<number>\d+);.*?\) (?P<name>.+)'),
    ('list of split and class number', r'(?P<split>train|val|test)(?P<index>\d+)//?(?P<path>.+)'),
    ('list of path, tab, class', r'(?P<path>[^\t]+)\t\s*(?P<label>[^\t]+)'),
    ('list of path, comma, class', r'(?P<path>[^,]+),\s*(?P<label>[^/]+)'),
    ('list of path, space, class', r'(?P<path>.*\S)\s+(?P<label>[^/\s]+)(?<!' + ')(?<!'.join(map(re.escape, VIDEOS)) + ')'),
    ('list of class/video', r'(?P<path>(?:.*/)?(?P<label>[^/]+)/[^/]+)'),
)]


def read_list(path):
    """A list -> what kind it is, rows [(label, path, start, end, split), ...], class names {number: name} if it holds these.

    A label is a class name, a number (int), or (split, index in that split's list of classes); split: of single videos, where
    the list tells it, else None.
    """
    try:
        with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
            text = file.read()
        if text.lstrip()[:1] in ('[', '{'):
            return read_json(json.loads(text))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        sys.exit(f'Cannot read the annotations {path}: {type(error).__name__}: {error}')
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and re.fullmatch(r'(video|path|file)\w*[\s,]+(label|class)\w*', lines[0].lower()):
        lines = lines[1:]
    for kind, pattern in DIALECTS:
        matches = [match.groupdict() for match in map(pattern.fullmatch, lines) if match]
        if not matches or len(matches) < len(lines):
            continue
        if 'number' in matches[0]:
            return kind, [], {int(match['number']): match['name'] for match in matches}
        numbers = [match['path'] for match in matches]
        if numbers[0] in '01' and numbers == [str(int(numbers[0]) + i) for i in range(len(numbers))]:
            return 'list of class names', [], {int(match['path']): match['label'] for match in matches}
        hmdb = re.fullmatch(r'(.+)_test_split\d+\.txt', os.path.basename(path))  # one file a class; 1 and 2 are train and test
        if hmdb:
            of = {'1': 'train', '2': 'test'}
            return 'HMDB51 split', [(hmdb[1], match['path'], None, None, of.get(match['label'])) for match in matches], {}
        return kind, [((match['split'], int(match['index'])) if 'split' in match else
                       int(match['label']) if match['label'].isdigit() else match['label'], match['path'], None, None, None)
                      for match in matches], {}
    wrong = next((line for line in lines if not DIALECTS[-1][1].fullmatch(line)), '')
    sys.exit(f'{path} is in none of the known formats (see README); a line that does not fit: {wrong[:80]!r}.')


def read_json(items):
    """Diving48's and Something-Something's JSON, as read_list."""
    if isinstance(items, dict):
        return 'class names', [], {int(number): name for name, number in items.items()}
    if isinstance(items[0], list):
        return 'Diving48 vocabulary', [], {number: ' '.join(words) for number, words in enumerate(items)}
    if 'vid_name' in items[0]:
        rows = [(item['label'], item['vid_name'], item['start_frame'], item['end_frame'], None) for item in items]
        return 'Diving48 JSON', rows, {}
    if 'template' not in items[0]:
        raise ValueError('its entries have no label (no "template" or "vid_name")')
    rows = [(re.sub(r'[\[\]]', '', item['template']), item['id'], None, None, None) for item in items]
    return 'Something-Something JSON', rows, {}
