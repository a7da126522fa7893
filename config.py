"""Every option, once, with its default. A script's configuration is DEFAULTS, then a sample config, then --key=value.

    python train.py sample_configs/diving48.py --lr=1e-4 --out_dir=runs/fast

A sample config is a Python file that holds one `config = dict(...)` of plain values. It is read, never executed. Relative
paths in it start at this repository, those on the command line at the current folder. The result is a plain dict.
"""

import ast
import difflib
import os
import sys

DEFAULTS = dict(
    # data
    dataset='',                # the name printed beside every number
    data_root='data',          # the folder that holds the videos
    annotations=None,          # None: one folder per class in data_root; else list or JSON file(s), see README
    splits=None,               # dict(train=[class, ...], val=[...], test=[...]); fractions such as 0.6 draw classes by the seed
    prepare=None,              # a script of ours that makes the data when data_root does not exist
    fetch='',                  # what to get and where to put it: said when the data is not there
    frames=8,                  # T, frames sampled per video
    resize=256,                # short side of a decoded frame; the crop is the backbone's image size
    test_sampling='middle',    # frame taken from each of the T parts in testing: 'middle', or 'random' (HyRSM, CLIP-FSAR)
    augment='crop',            # training clips: 'none' (centre crop), 'crop' (random resized), 'randaug' (and more)
    flip=True,                 # mirror half of the training clips; wrong where classes name a side or a turn
    norm='clip',               # pixel mean and std: 'clip', or 'imagenet' as in the thesis
    workers=None,              # decoding processes; None: one a core, at most 16, shared out to torchrun's; 0: in the main one
    cache_frames=32,           # evenly spaced frames of a video kept for training to choose from (TSN within each part)
    cache_gb=4.0,              # memory for decoded frames, all workers together; 0 decodes anew each time
    cache_dir=None,            # a folder that keeps decoded frames between runs
    lower=False,               # where classes are few or small, lower way, shot and queries instead of stopping
    cache_prefix=0,            # N > 0: run N random draws of each training video through the frozen blocks once and for all
    strict=False,              # stop at the first video that cannot be read instead of replacing it
    sheet=None,                # data.py: write this PNG of training clips as the model sees them, instead of the check
    # model
    clip='ViT-B/32',           # CLIP weights: a name or a file
    act=None,                  # 'quick_gelu' or 'gelu'; None: what the weights' source used
    image_size=None,           # side of the frames' crop; None: the weights' own, another interpolates their positions
    levels=4,                  # S, last blocks whose outputs feed the aggregator
    temporal_adapter=True,     # adapters in the kept blocks (thesis 3.2.2)
    cls_token=False,           # the aggregator sees the class token too
    cross_video='joint',       # attention across an episode's videos: 'joint' (transductive), 'inductive' or False
    alpha_init='random',       # the temporal embedding's kernel at the start: 'random', or 'zero' as in the adapters
    attn_proj=True,            # False: equation 3.15 to the letter, one head and no projections
    mlp_order='serial',        # 'parallel': the MLP reads the same input as the attention, as 3.19 and 3.22 are printed
    temp=100.0,                # Temp in (3.7)
    loss='class',              # 'pairwise': (3.8), (3.9) over all pairs
    # training
    way=5,                     # N, classes of an episode
    shot=5,                    # K, supports per class in training
    queries=5,                 # queries per class in training
    meta_batch=3,              # episodes a step, shared out where torchrun starts several processes
    micro_batch=0,             # episodes that a process computes at a time, adding up gradients; 0: all its share at once
    recompute=False,           # compute adapted blocks again in backward: less memory, slower
    max_iters=1000,            # steps
    lr=3e-5,                   # AdamW's learning rate
    weight_decay=0.02,         # AdamW's weight decay
    warmup_iters=0,            # steps over which the rate rises from 0
    decay='constant',          # then: 'constant', or 'cosine' to 0 at max_iters
    grad_clip=1.0,             # largest norm of the gradient; 0: no clipping
    eval_interval=200,         # steps between validations
    val_episodes=200,          # episodes of a validation, the same each time, 5-way 1-shot
    log_interval=10,           # steps between log lines
    seed=42,                   # of everything that is random
    deterministic=False,       # bit-equal runs on CUDA, slower
    device='auto',             # 'cuda' (CUDA_VISIBLE_DEVICES=1 picks another), 'cpu'; 'auto': CUDA where there is one
    dtype='auto',              # autocast on CUDA: 'float16' (auto), 'bfloat16' or 'float32'; a CPU computes in float32
    compile='auto',            # torch.compile: True, False; 'auto': on CUDA
    frozen_dtype='float32',    # of the weights before the first adapter: 'bfloat16' or 'float16' where the hardware has it
    out_dir=None,              # checkpoints, log and results; None: runs/<dataset>
    resume=False,              # go on from out_dir's last checkpoint
    # testing
    ckpt=None,                 # a checkpoint; eval.py also takes several, a list or a pattern; None: training-free
    test_split='test',         # the split whose classes are tested
    test_ways=None,            # ways to test, for example [5, 10]; None: way
    test_shots=[1, 5],         # shots to test
    test_queries=1,            # queries per class in a test episode
    test_episodes=10000,       # episodes a test
    episodes_file=None,        # the test's episodes: read from this file if it is there, else written into it
    features_gb=8.0,           # memory for the test videos' features; more go into a file in out_dir, which stays there
    features_dir=None,         # a folder that keeps the features between tests (with torchrun they are all in memory)
    attention=None,            # a clip to draw: its frames above each level's attention, and its scores
    probe=False,               # also test with the queries' frames reversed, shuffled, or the middle one repeated
    templates=['a video of {}.'],  # texts about a class name for clip-zero-shot; their features are averaged
    # predict.py
    support=None,              # a folder per class with clips or folders of frames, or the file of an earlier save_support
    query=None,                # what to label: a clip, a folder of clips, a pattern such as clips/*.mp4, or a list of these
    top=1,                     # classes printed for each query, best first
    json=False,                # print one JSON object a line instead
    save_support=None,         # a file to keep the encoded examples in
    window=0.0,                # seconds of a window that slides over each query; 0: one label for the whole clip
    stride=1.0,                # seconds from one window to the next
    csv=None,                  # a file for the scores of every window
)

CHOICES = dict(
    test_sampling=('middle', 'random'), augment=('none', 'crop', 'randaug'), norm=('clip', 'imagenet'),
    act=(None, 'quick_gelu', 'gelu'), cross_video=('joint', 'inductive', False), mlp_order=('serial', 'parallel'),
    alpha_init=('random', 'zero'),
    loss=('class', 'pairwise'), decay=('constant', 'cosine'), dtype=('auto', 'float16', 'bfloat16', 'float32'),
    device=('auto', 'cuda', 'cpu'), compile=('auto', True, False),
    frozen_dtype=('float32', 'bfloat16', 'float16'), test_split=('train', 'val', 'test'),
)
TYPES = dict(attention=str, annotations=(str, list), episodes_file=str, features_dir=str, test_ways=list, image_size=int,
             splits=dict, prepare=str, sheet=str, cache_dir=str, workers=int, out_dir=str,
             ckpt=(str, list), support=str, query=(str, list), save_support=str, csv=str)  # besides None
POSITIVE = ('frames', 'resize', 'image_size', 'cache_frames', 'levels', 'temp', 'way', 'shot', 'queries', 'meta_batch',
            'eval_interval', 'val_episodes', 'log_interval', 'test_queries', 'test_episodes', 'top', 'stride')
NOT_NEGATIVE = ('workers', 'cache_gb', 'features_gb', 'cache_prefix', 'micro_batch', 'warmup_iters', 'grad_clip', 'max_iters',
                'seed')
PATHS = ('attention', 'data_root', 'annotations', 'prepare', 'cache_dir', 'sheet', 'out_dir', 'ckpt', 'support', 'query',
         'save_support', 'csv', 'episodes_file', 'features_dir')
MODEL_OPTIONS = ('act', 'image_size', 'levels', 'temporal_adapter', 'cls_token', 'cross_video', 'alpha_init', 'attn_proj',
                 'mlp_order', 'frames', 'norm', 'temp', 'resize')  # a checkpoint brings them with it
ROOT = os.path.dirname(os.path.abspath(__file__))


def load_config(argv, base=DEFAULTS):
    """['sample.py', '--key=value', ...] -> the whole configuration, checked: `base`, the file if one is named, the options.

    Stops with one sentence at an unknown key, a wrong type or an impossible value.
    """
    config = dict(base)
    files = [arg for arg in argv if not arg.startswith('--')]
    if len(files) > 1:
        sys.exit(f'Expected one sample config, got {len(files)}: {" ".join(files)}. Options are written --key=value.')
    for path in files:
        for key, value in read_sample(path).items():
            set_option(config, key, value, ROOT, path)
    for arg in argv:
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            if not equals:
                sys.exit(f'{arg}: options are written --key=value, for example --{key or "lr"}=1.')
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text
            set_option(config, key, value, os.getcwd(), 'command line')
    if config['out_dir'] is None:
        config['out_dir'] = os.path.join(ROOT, 'runs', config['dataset'] or 'unnamed')
    return config


def read_sample(path):
    """The dict of `config = dict(...)` in a Python file, by parsing: nothing is run."""
    try:
        with open(path, encoding='utf-8') as file:
            tree = ast.parse(file.read(), path)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        sys.exit(f'Cannot read the config {path}: {error}')
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'config' and is_dict_call(node.value):
            return {item.arg: plain_value(item.value, path) for item in node.value.keywords}
    sys.exit(f'{path} has no `config = dict(...)`.')


def is_dict_call(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict' and not node.args


def plain_value(node, path):
    """A syntax node -> its value: a literal, or dict(key=...) of literals."""
    if is_dict_call(node):
        return {item.arg: plain_value(item.value, path) for item in node.keywords}
    try:
        return ast.literal_eval(node)
    except ValueError:
        sys.exit(f'{path}, line {node.lineno}: only plain values (numbers, strings, lists, dicts) may stand in a config, '
                 f'not {ast.unparse(node)}.')


def set_option(config, key, value, folder, source):
    """Checks one value and sets it; relative paths start at `folder`."""
    if key not in DEFAULTS:
        near = difflib.get_close_matches(key, DEFAULTS, 1)
        sys.exit(f'{source}: there is no option {key!r}' + (f'; did you mean {near[0]!r}?' if near else '.'))
    default = DEFAULTS[key]
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if key in CHOICES:
        if not any(value == c and type(value) is type(c) for c in CHOICES[key]):
            sys.exit(f'{source}: {key}={value!r} must be one of {", ".join(map(repr, CHOICES[key]))}.')
    elif key in TYPES:
        if value is not None and not isinstance(value, TYPES[key]):
            sys.exit(f'{source}: {key}={value!r} is of the wrong type, {type(value).__name__}.')
    elif type(value) is not type(default):
        sys.exit(f'{source}: {key}={value!r} must be of type {type(default).__name__}, as its default {default!r} is.')
    if isinstance(value, list):
        kind = int if key in ('test_ways', 'test_shots') else str
        if not value or any(type(v) is not kind or (kind is int and v <= 0) for v in value):
            sys.exit(f'{source}: {key}={value!r} must be a list of {"positive integers" if kind is int else "strings"}.')
    if key in POSITIVE and value is not None and value <= 0:
        sys.exit(f'{source}: {key}={value!r} must be positive.')
    if key in NOT_NEGATIVE and value is not None and value < 0:
        sys.exit(f'{source}: {key}={value!r} must not be negative.')
    if key in PATHS and value is not None:
        value = ([os.path.join(folder, os.path.expanduser(v)) for v in value] if isinstance(value, list)
                 else os.path.join(folder, os.path.expanduser(value)))
    elif key == 'clip' and os.path.isfile(os.path.join(folder, value)):
        value = os.path.join(folder, value)
    config[key] = value


def resolve_device(config):
    """The device and autocast dtype that 'auto' stands for: ('cuda' or 'cpu', torch.dtype). A CPU computes in float32."""
    import torch
    device = config['device']
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cuda' and not torch.cuda.is_available():
        sys.exit(f'--device={device}: PyTorch sees no CUDA device here; use --device=cpu.')
    if device == 'cpu':
        return device, torch.float32
    return device, getattr(torch, 'float16' if config['dtype'] == 'auto' else config['dtype'])
