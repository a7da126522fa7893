"""Every common option, once, with its default. A script's configuration is these, its own options and those of the method,
then a sample config, then --key=value.

    python train.py sample_configs/diving48.py --lr=1e-4 --out_dir=runs/fast
    python train.py --help                       every option, with its default

A sample config is a Python file that holds one `config = dict(...)` of plain values. It is read, never executed. A dict in it
with the name of a method, `vba=dict(temp=50.0)`, holds while that method is chosen; `base='ucf101.py'` names a sample config
beside it whose values it takes over. Relative paths in it start at this repository, those on the command line at the current
folder. The result is a plain dict.
"""

import ast
import difflib
import importlib.util
import os
import re
import shutil
import sys

from tools import console

DATA = dict(  # which videos, and where they are
    dataset='',                # the name printed beside every number
    data_root='data',          # the folder that holds the videos
    annotations=None,          # None: one folder per class in data_root; else list or JSON file(s), see README
    splits=None,               # dict(train=[class, ...], val=[...], test=[...]); or lists of groups of classes; or fractions
    closed_set=False,          # all classes are known: those of splits' train (None: all), and splits are of their videos
    holdout=dict(val=0.1, test=0.2),  # with closed_set: the shares of a class's videos, where the lists do not say
    prepare=None,              # a script of ours, with its options, that makes the data when data_root does not exist
    fetch='',                  # what to get and where to put it: said when the data is not there
    clip='ViT-B/32',           # CLIP weights: a name or a file
    lower=False,               # where classes are few or small, lower way, shot and queries instead of stopping
    strict=False,              # stop at the first video that cannot be read instead of replacing it
)
LOOK = dict(  # what the frozen CLIP sees of a video
    frames=8,                  # T, frames sampled per video
    resize=None,               # short side of a decoded frame; None: 256/224 of the crop, which is the backbone's image size
    image_size=None,           # side of the frames' crop; None: the weights' own, another interpolates their positions
    norm='clip',               # pixel mean and std: 'clip', or 'imagenet' as in the thesis
    act=None,                  # 'quick_gelu' or 'gelu'; None: what the weights' source used
)
TRAINING = dict(
    method='vba',              # vba, a file of methods/ without .py, or the path of a file
    augment='crop',            # training clips: 'none' (centre crop), 'crop' (random resized), 'randaug' (and more)
    flip=True,                 # mirror half of the training clips; wrong where classes name a side or a turn
    cache_frames=32,           # evenly spaced frames of a video kept for training to choose from (TSN within each part)
    cache_prefix=0,            # N > 0: run N random draws of each training video through the frozen CLIP once and for all
    way=5,                     # N, classes of an episode
    shot=5,                    # K, supports per class in training
    queries=5,                 # queries per class in training
    train_groups=False,        # draw half of the training episodes within groups of classes too, where splits has groups
    per_class=0,               # with closed_set: training videos of each class, drawn by the seed; 0: all
    meta_batch=3,              # episodes a step, with closed_set videos; shared out where torchrun starts several processes
    max_iters=1000,            # steps
    lr=3e-5,                   # AdamW's learning rate
    weight_decay=0.02,         # AdamW's weight decay
    warmup_iters=0,            # steps over which the rate rises from 0
    decay='constant',          # then: 'constant', or 'cosine' to 0 at max_iters
    drops={},                  # of the constant rate: {350: 0.1, 525: 0.01} is a tenth of it from step 350, then a hundredth
    grad_clip=1.0,             # largest norm of the gradient; 0: no clipping
    val_episodes=200,          # episodes of a validation, the same each time, 5-way 1-shot
    seed=42,                   # of everything that is random
)
TESTING = dict(
    test_split='test',         # the split that is tested; with closed_set also 'unseen', the classes of splits' test, by name
    test_sampling='middle',    # frame taken from each of the T parts in testing: 'middle', or 'random' (HyRSM, CLIP-FSAR)
    test_ways=None,            # ways to test, for example [5, 10]; None: way
    test_shots=[1, 5],         # shots to test
    test_queries=1,            # queries per class in a test episode
    test_episodes=10000,       # episodes a test
    views=1,                   # with closed_set: clips of a test video, evenly spaced, whose answers are averaged
    crops=1,                   # with closed_set: crops along the longer side of each of these
    templates=['a video of {}.'],  # texts about a class name for zero_shot; their features are averaged
)
MACHINE = dict(  # no result depends on these but by rounding; a checkpoint does not bring them
    device='auto',             # 'cuda' (CUDA_VISIBLE_DEVICES=1 picks another), 'cpu', 'mps' (Apple's); 'auto': CUDA or the CPU
    dtype='auto',              # of autocast: 'float16' (auto on CUDA), 'bfloat16' or, without it, 'float32' (auto elsewhere)
    compile='auto',            # torch.compile: True, False; 'auto': on CUDA
    deterministic=False,       # bit-equal runs on CUDA, slower
    micro_batch=0,             # episodes that a process computes at a time, adding up gradients; 0: all its share at once
    workers=None,              # decoding processes; None: one a core, at most 16, shared out to torchrun's; 0: in the main one
    cache_gb=4.0,              # memory for decoded frames, all workers together; 0 decodes anew each time
    cache_dir=None,            # a folder that keeps decoded frames between runs
    features_gb=8.0,           # memory for what is kept of the videos of a split; more goes into a file in out_dir
    features_dir=None,         # a folder that keeps it between runs
    eval_interval=200,         # steps between validations
    log_interval=10,           # steps between log lines
    out_dir=None,              # checkpoints, log and results; None: runs/<dataset>_<method>
    resume=False,              # go on from out_dir's last checkpoint
    overwrite=False,           # begin anew where out_dir holds a checkpoint, and replace it
)
DEFAULTS = DATA | LOOK | TRAINING | TESTING | MACHINE

CHOICES = dict(
    test_sampling=('middle', 'random'), augment=('none', 'crop', 'randaug'), norm=('clip', 'imagenet'),
    act=(None, 'quick_gelu', 'gelu'), decay=('constant', 'cosine'), dtype=('auto', 'float16', 'bfloat16', 'float32'),
    device=('auto', 'cuda', 'cpu', 'mps'), compile=('auto', True, False),
    test_split=('train', 'val', 'test', 'unseen'),
)
TYPES = dict(annotations=(str, list, dict), classes=(str, list), ckpt=(str, list), query=(str, list), splits=dict,
             test_ways=list, image_size=int, resize=int, workers=int, unknown=(int, float))  # besides None; others are texts
POSITIVE = ('frames', 'resize', 'image_size', 'cache_frames', 'way', 'shot', 'queries', 'meta_batch',
            'eval_interval', 'val_episodes', 'log_interval', 'test_queries', 'test_episodes', 'top', 'stride', 'temp', 'seeds',
            'jobs', 'lam', 'width', 'views', 'crops', 'smooth')
NOT_NEGATIVE = ('workers', 'cache_gb', 'features_gb', 'cache_prefix', 'micro_batch', 'warmup_iters', 'grad_clip', 'max_iters',
                'seed', 'window', 'least', 'per_class', 'prefix', 'postfix', 'layer', 'layers', 'finetune', 'lr',
                'weight_decay')
PATHS = ('data_root', 'annotations', 'prepare', 'cache_dir', 'out_dir', 'features_dir', 'ckpt', 'support',
         'save_support', 'csv', 'report', 'episodes_file', 'sheet', 'draw', 'out')
ROOT = os.path.dirname(os.path.abspath(__file__))


def methods():
    """The names that `method` knows besides paths."""
    return ['vba', *sorted(file[:-3] for file in os.listdir(os.path.join(ROOT, 'methods')) if file.endswith('.py'))]


def name_of(method):
    """A method's name: that of its file, without folder and .py."""
    return os.path.basename(method).removesuffix('.py')


def find_method(method):
    """'vba', the name of a file in methods/, or the path of a file -> its class and the file. Stops where there is none."""
    if method == 'vba':
        import model
        return model.VBA, model.__file__
    path = method if method.endswith('.py') else os.path.join(ROOT, 'methods', f'{method}.py')
    if not os.path.isfile(path):
        sys.exit(f'There is no method {method!r}; there are {", ".join(methods())}, and the path of a file such as my_idea.py.')
    name = f'method {path}'  # torch.compile looks modules up by name: one that no other has
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    if not hasattr(sys.modules[name], 'Method'):
        sys.exit(f'{path} defines no class Method.')
    return sys.modules[name].Method, path


def load_config(argv, own=None, saved=None, script=None):
    """['sample.py', '--key=value', ...] -> the whole configuration, checked: DEFAULTS, `own` (options of the script alone),
    those of the method, `saved` (a checkpoint's), the sample config if one is named, the command line; what is later wins.

    At --help it prints every option, after the docstring of `script`, a module, else of the main one, and ends. Stops with one
    sentence at an unknown key, a wrong type or an impossible value.
    """
    console.begin()
    script = script or sys.modules['__main__']
    if not argv:
        sys.exit(f'{script.__doc__}\n--help prints every option.')
    sample, given = parse(argv)
    layers = [(read_sample(sample), ROOT, sample)] if sample else []
    layers.append((given, os.getcwd(), 'command line'))
    defaults = {**DEFAULTS, **(own or {})}
    name = (saved or defaults)['method']
    for settings, folder, source in layers:
        name = checked('method', settings.get('method', name), '', {}, folder, source)
    method, file = find_method(name)
    options, choices = getattr(method, 'options', {}), CHOICES | getattr(method, 'choices', {})
    if '--help' in argv:
        print(script.__doc__)
        console.print_options('of this script', own or {}, script.__file__)
        console.print_options(f'of the method {name_of(name)}', options, file)
        for title, section in dict(data=DATA, look=LOOK, training=TRAINING, test=TESTING, machine=MACHINE).items():
            console.print_options(title, {key: section[key] for key in section if key not in (own or {}) | options}, __file__)
        sys.exit()
    defaults |= options
    config = defaults | {key: value for key, value in (saved or {}).items() if key in defaults}
    for settings, folder, source in layers:
        for key, value in unfold(settings, defaults, name_of(name)).items():
            if key not in defaults:
                near = difflib.get_close_matches(key, defaults, 1)
                sys.exit(f'{source}: there is no option {key!r} with method={name_of(name)}'
                         + (f'; did you mean {near[0]!r}?' if near else '.'))
            config[key] = checked(key, value, defaults[key], choices, folder, source)
    config['method'] = name
    if config['views'] > 1 and config['test_sampling'] == 'random':
        sys.exit("views: random frames are one draw a video; several views need test_sampling='middle'.")
    closed = [key for key in ('per_class', 'views', 'crops') if config[key] != DEFAULTS[key]]
    closed += ['test_split'] * (config['test_split'] == 'unseen')
    if closed and not config['closed_set']:
        sys.exit(f'{closed[0]}={config[closed[0]]!r} needs closed_set=True.')
    if config['out_dir'] is None:
        config['out_dir'] = os.path.join(ROOT, 'runs', f'{config["dataset"] or "unnamed"}_{name_of(name)}')
    return config


def saved_config(saved, path, trusted=None):
    """The options that a checkpoint at `path` holds, checked: a stranger's may hold anything. One that is newer than the
    checkpoint has its default; relative paths start at this repository. Stops where its method is a file that is neither the
    repository's nor `trusted`: a stranger's checkpoint must not choose what code is run."""
    code = checked('method', saved['method'], '', {}, ROOT, path)
    if trusted and name_of(code) == name_of(trusted):  # it may lie elsewhere now
        code = trusted
    if code not in methods() and os.path.dirname(code) != ROOT and code != trusted:
        sys.exit(f'{path} is of a method outside this repository: say --method={code} if you trust that file.')
    method = find_method(code)[0]
    defaults, choices = DEFAULTS | getattr(method, 'options', {}), CHOICES | getattr(method, 'choices', {})
    own = {key: checked(key, saved.get(key, default), default, choices, ROOT, path) for key, default in defaults.items()
           if key not in (*MACHINE, 'prepare')}
    return own | dict(method=code)


def parse(argv):
    """Arguments -> the sample config's path or None, and {key: value}; --key=value, --key value, or --key, which is True."""
    words = []
    for arg in argv:
        sample = arg.endswith('.py') and words[-1:] != ['--method']
        if words and re.fullmatch(r'--\w+', words[-1]) and not arg.startswith('--') and not sample:
            words[-1] += '=' + arg
        else:
            words.append(arg)
    files = [word for word in words if not word.startswith('--')]
    if len(files) > 1 or not all(file.endswith('.py') for file in files):
        sys.exit(f'{" ".join(files)}: expected one sample config, a .py file. Options are written --key=value, patterns in '
                 'quotes.')
    given = {}
    for word in words:
        if word in files or word == '--help':
            continue
        key, equals, text = word[2:].partition('=')
        if equals and not text:
            sys.exit(f'--{key}= is empty: give it a value, or leave it out.')
        try:
            given[key] = ast.literal_eval(text) if equals else True
        except (ValueError, SyntaxError):
            given[key] = text
    return files[0] if files else None, given


def unfold(settings, defaults, method):
    """Settings with the options of the chosen method in the place of the dicts of methods; they win over the others."""
    flat = {key: value for key, value in settings.items()
            if key in defaults or key not in (method, *methods()) or not isinstance(value, dict)}
    own = settings.get(method)
    return flat | own if isinstance(own, dict) else flat


def read_sample(path):
    """The dict of `config = dict(...)` in a Python file, by parsing: nothing is run."""
    try:
        with open(path, encoding='utf-8') as file:
            tree = ast.parse(file.read(), path)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        sys.exit(f'Cannot read the config {path}: {error}')
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'config' and is_dict_call(node.value):
            found = {item.arg: plain_value(item.value, path) for item in node.value.keywords}
            base = found.pop('base', None)
            if base and (not isinstance(base, str) or base == os.path.basename(path)):
                sys.exit(f'{path}: base={base!r} must name another sample config beside it.')
            return {**read_sample(os.path.join(os.path.dirname(path), base)), **found} if base else found
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


def checked(key, value, default, choices, folder, source):
    """One value, of the type of its default or one of its choices -> the same; relative paths start at `folder`."""
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if key in choices:
        if not any(value == c and type(value) is type(c) for c in choices[key]):
            sys.exit(f'{source}: {key}={value!r} must be one of {", ".join(map(repr, choices[key]))}.')
    elif default is None or key in TYPES:
        if value is not None and not isinstance(value, TYPES.get(key, str)):
            sys.exit(f'{source}: {key}={value!r} is of the wrong type, {type(value).__name__}.')
    elif type(value) is not type(default):
        sys.exit(f'{source}: {key}={value!r} must be of type {type(default).__name__}, as its default {default!r} is.')
    if isinstance(value, list):
        kind = type(default[0]) if isinstance(default, list) else int if key == 'test_ways' else str
        value = [float(v) if kind is float and type(v) is int else v for v in value]
        if not value or any(type(v) is not kind or (kind is int and v <= 0) for v in value):
            sys.exit(f'{source}: {key}={value!r} must be a list of '
                     + {int: 'positive integers.', float: 'numbers.', str: 'strings.'}[kind])
    if key == 'holdout' and not (set(value) == set(default) and all(type(share) in (int, float) for share in value.values())
                                 and min(value.values()) >= 0 and sum(value.values()) < 1):
        sys.exit(f'{source}: holdout={value!r} must be shares of the videos, such as {default!r}.')
    if key == 'drops' and not all(type(step) is int and type(factor) in (int, float) for step, factor in value.items()):
        sys.exit(f'{source}: {key}={value!r} must be steps and factors, such as {{350: 0.1}}.')
    if key in POSITIVE and value not in (None, default) and value <= 0:  # a method's own default may be 0
        sys.exit(f'{source}: {key}={value!r} must be positive.')
    if key in NOT_NEGATIVE and value not in (None, default) and value < 0:
        sys.exit(f'{source}: {key}={value!r} must not be negative.')
    if key in PATHS and value is not None:
        value = each_text(lambda path: os.path.join(folder, os.path.expanduser(path)), value)
    elif (key == 'clip' and os.path.isfile(os.path.join(folder, value))) or (key == 'method' and value.endswith('.py')):
        value = os.path.abspath(os.path.join(folder, os.path.expanduser(value)))
    return value


def each_text(change, value):
    """A value with `change` made to it where it is a text, and to every text in it where it is a list or a dict."""
    if isinstance(value, dict):
        return {key: each_text(change, item) for key, item in value.items()}
    if isinstance(value, list):
        return [each_text(change, item) for item in value]
    return change(value) if isinstance(value, str) else value


def resolve(config):
    """Puts what 'auto' stands for into `device` and `dtype`. Stops where there is no such device."""
    import torch
    if config['device'] == 'auto':
        config['device'] = 'cuda' if torch.cuda.is_available() else 'cpu'
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not there[config['device']]:
        sys.exit(f'--device={config["device"]}: PyTorch sees no such device here; use --device=cpu.')
    if config['compile'] == 'auto':
        compiler = os.environ.get('CC') or any(map(shutil.which, ('cc', 'gcc', 'clang')))  # which Triton needs
        config['compile'] = config['device'] == 'cuda' and bool(compiler)
        if config['device'] == 'cuda' and not compiler:
            print('There is no C compiler here, so nothing is compiled (--compile=False): slower.', file=sys.stderr)
    if config['dtype'] == 'auto':
        config['dtype'] = 'float16' if config['device'] == 'cuda' else 'float32'


def amp(config):
    """A new autocast context in config['dtype']; one that is entered twice is never left."""
    import torch
    device = config['device'].partition(':')[0]
    return torch.autocast(device, getattr(torch, config['dtype']), enabled=config['dtype'] != 'float32')
