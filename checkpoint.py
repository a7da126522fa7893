"""A CLIP and a method: built from a configuration, saved, loaded, told from others.

In reading order: load_clip, build, rebuild; save, load, restore; configure (checkpoints of a command line);
fingerprint and the lists of options that must match; make_folder, whole, save_json (files that are whole or not there).
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

import clip_loader
from config import LOOK, MACHINE, ROOT, TRAINING, each_text, find_method, load_config, name_of, parse, saved_config
from model import trainable_state
from tools.weights import read_saved


def load_clip(config):
    """The CLIP that a config names; where config['resize'] is None, it becomes what fits it. Stops with one sentence where its
    weights are not to be had or not right."""
    try:
        clip = clip_loader.load_clip(config['clip'], config['act'], config['image_size'], config['norm'])
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    config['resize'] = config['resize'] or round(clip.visual.image_size * 256 / 224)
    return clip


def build(config, clip, names):
    """The method that a config names, beside a CLIP; names: the classes it trains on. New parts are initialised from
    config['seed']. Stops with one sentence where the method refuses (ValueError, OSError)."""
    name, depth = name_of(config['method']), len(clip.visual.transformer.resblocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config['seed'])
        try:
            method = find_method(config['method'])[0](clip, names, config)
        except (OSError, ValueError) as error:
            sys.exit(f'method={name}: {error}')
    wrong = [what for what in method.sees if what not in ('pixels', 'image', *range(depth + 1))]
    if wrong or not method.sees:
        sys.exit(f"method={name}: sees={method.sees!r} may hold 'pixels', 'image' and numbers of blocks, 0 to {depth}.")
    closed_set, text = getattr(method, 'closed_set', False), getattr(method, 'text', False)
    if config['closed_set'] and not closed_set:
        sys.exit(f'method={name} needs supports, and with closed_set=True there are none.')
    if closed_set and not text and not config['closed_set']:
        sys.exit(f'method={name} answers with the classes that it was trained on alone: it needs closed_set=True.')
    if any(p.requires_grad for p in clip.parameters()):
        sys.exit(f'method={name} trains parts of the CLIP that all methods share: it must train a copy.')
    method.names = list(names)
    return method


def rebuild(config, clip, checkpoint, path):
    """The method of a checkpoint, ready to answer, on config['device']."""
    method = build(config | dict(seed=checkpoint['config']['seed']), clip, checkpoint['names'])
    restore(method, clip, checkpoint, path)
    return method.to(config['device']).eval()


def save(path, method, clip, config, **more):
    """Writes what trains of a method and what it takes to build it again, here or in another clone of the repository: paths
    inside it are relative to it. more: what else train.py goes on from."""
    config = {key: value for key, value in config.items() if key not in MACHINE}
    config = each_text(lambda text: text.removeprefix(os.path.join(ROOT, '')), config)
    content = dict(model=trainable_state(method), config=config, names=method.names, weights_hash=clip.weights_hash, **more)
    with whole(path, 'wb') as file:
        torch.save(content, file)


def load(path, trusted=None):
    """The dict that `save` wrote, its config as `saved_config` gives it. Stops with one sentence when there is none or it is no
    checkpoint, or where its method is a file that is neither this repository's nor `trusted`."""
    try:
        checkpoint = read_saved(path)
        checkpoint['model'], checkpoint['weights_hash'], checkpoint['names'], checkpoint['config']['method']
    except FileNotFoundError:
        sys.exit(f'There is no checkpoint {path}; train.py writes best.pt and last.pt into its out_dir.')
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f'{path} is not a checkpoint of train.py: {type(error).__name__}: {error}')
    return checkpoint | dict(config=saved_config(checkpoint['config'], path, trusted))


def restore(method, clip, checkpoint, path):
    """Fills a method's trainable parameters. Stops when the checkpoint belongs to other weights or another method."""
    if checkpoint['weights_hash'] != clip.weights_hash:
        sys.exit(f'{path} was trained beside other CLIP weights (clip={checkpoint["config"]["clip"]!r}, hash '
                 f'{checkpoint["weights_hash"][:12]}) than those loaded (hash {clip.weights_hash[:12]}).')
    missing, unexpected = method.load_state_dict(checkpoint['model'], strict=False)
    missing = set(missing) & set(trainable_state(method))
    if missing or unexpected:
        sys.exit(f'{path} holds another model: missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}.')


def configure(argv, own):
    """The command line -> the test's config, and [(path, checkpoint, its own config), ...].

    A checkpoint brings what makes its method; those of its options that it calls `answering` the command line may change.
    Without a sample config the first one brings all its options but those on the command line. Stops where the command line
    asks for another method than the checkpoint's.
    """
    sample, given = parse(argv)
    listed = given.get('ckpt') or []
    patterns = listed if isinstance(listed, list) else [listed]
    paths = sum((sorted(glob.glob(os.path.expanduser(path))) or [path] for path in patterns), [])
    paths = [os.path.join(path, 'best.pt') if os.path.isdir(path) else path for path in paths]
    code = os.path.abspath(given['method']) if str(given.get('method')).endswith('.py') else None
    saved = [load(path, trusted=code) for path in paths]
    brought = saved[0]['config'] if saved else None
    if saved and sample:  # a test across data sets
        brought = made(brought)
    config = load_config(argv, own, brought)
    config['ckpt'] = paths
    found = []
    for path, each in zip(paths, saved):
        theirs = made(each['config'])
        answering = getattr(find_method(theirs['method'])[0], 'answering', ())
        theirs |= {key: config[key] for key in answering if key in given}
        changed = [key for key in theirs if key in given and config[key] != theirs[key] and key != 'method']
        if changed:
            sys.exit(f'{path} is of another model: ' + ', '.join(
                f'{key}={theirs[key]!r}, not {config[key]!r}' for key in changed))
        clip = {} if 'clip' in given else dict(clip=each['config']['clip'])  # it may lie elsewhere here: its hash is checked
        found.append((path, each, {**config, **theirs, **clip}))
    if 'method' in given and found and config['method'] not in [own['method'] for *_, own in found]:
        sys.exit(f'{", ".join(paths)}: no checkpoint of method={config["method"]}.')
    if 'out_dir' not in given:  # results lie beside the checkpoints, not among those of another run on this data set
        folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
        config['out_dir'] = os.path.commonpath(folders or [os.path.join(ROOT, 'runs', config['dataset'] or 'unnamed')])
    return config, found


def made(config):
    """The options of a checkpoint that make its method."""
    return {key: config[key] for key in ('method', *LOOK, *options_of(config))}


def options_of(config):
    """The options of its method, with their defaults."""
    return getattr(find_method(config['method'])[0], 'options', {})


def training_options(config):
    """The options that a resumed run must share with the run it goes on from."""
    most = () if config['decay'] == 'cosine' else ('max_iters',)  # under a constant rate it may go on for longer
    data = ('dataset', 'splits', 'closed_set', 'holdout')
    return [key for key in (*data, *LOOK, *TRAINING, *options_of(config)) if key not in most]


def fingerprint(config, clip, method=None):
    """A dict of all that decides what CLIP shows of a video, and what a method makes of it: features kept somewhere serve
    another run if it is equal."""
    files = [os.path.join(ROOT, name) for name in ('model.py', 'decode.py', 'reader.py')]
    keys = (*LOOK, 'test_sampling', 'dtype', 'seed')
    found = dict({key: config[key] for key in keys}, weights=clip.weights_hash, act=clip.act, image_size=clip.visual.image_size)
    if method is not None:
        files += sources(find_method(config['method'])[1])
        found |= dict(method=name_of(config['method']), names=method.names, templates=config['templates'],
                      parameters=clip_loader.weights_hash(trainable_state(method)),
                      **{key: config[key] for key in options_of(config)})
    return found | dict(code=hashlib.sha256(b''.join(Path(file).read_bytes() for file in files)).hexdigest())


def sources(path):
    """A method's file, and those of methods/ that it imports from."""
    borrowed = re.findall(r'^from methods\.(\w+) import', Path(path).read_text(encoding='utf-8'), re.M)
    return [path, *(each for name in borrowed for each in sources(os.path.join(ROOT, 'methods', f'{name}.py')))]


# ---- Files

def make_folder(folder):
    """Makes an out_dir. Stops where nothing can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        sys.exit(f'Cannot write into out_dir={folder}: {error.strerror}; --out_dir= names another folder.')


@contextlib.contextmanager
def whole(path, mode='w'):
    """A file to write that gets its name at the end: whole or not there. Stops with one sentence where it cannot be written."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(path + '.tmp', mode, encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
        os.replace(path + '.tmp', path)
    except OSError as error:
        sys.exit(f'Cannot write {path}: {error.strerror or error}.')


def save_json(path, content):
    with whole(path) as file:
        json.dump(content, file, indent=1)
