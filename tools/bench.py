"""Speed and memory, ours and others', side by side: contestants take turns in one run, whatever else the machine does.

    python tools/bench.py decode [--folder=clips]       frames of a file, against PyAV, decord, torchcodec, OpenCV if installed
    python tools/bench.py encode [--images=80]          the frozen ViT, against open_clip's if installed
    python tools/bench.py train [sample_configs/x.py]   a training step, against one that projects every token, and the floor;
                                                  of a config whose videos are there also with clips from the loader
    python tools/bench.py memory [sample_configs/x.py]  what a training step takes of a GPU, by count, without one
    python tools/bench.py methods [--meta_batch=1]      a training step of every method, from what the frozen tower showed
    python tools/bench.py eval [--videos=100]           test episodes from kept tokens, against encoding each episode anew

--help prints all options. Weights are random unless --clip= names some: speed is the same. On a CPU OMP_NUM_THREADS says how
many threads compute.
"""

import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import types
import weakref
from fractions import Fraction
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint  # noqa: E402
import data  # noqa: E402
import testing  # noqa: E402
import train as training  # noqa: E402
from config import DEFAULTS, ROOT, amp, find_method, load_config, methods, resolve  # noqa: E402
from decode import VIDEOS, Converter, Video, read_frames, sample_indices  # noqa: E402
from model import CHUNK, Episode, Step, bring, look  # noqa: E402
from reader import ClipMaker, ClipReader  # noqa: E402

OPTIONS = dict(
    folder='',                 # decode: of files of your own
    out='',                    # a JSON file for the table
    rounds=5,                  # turns that each contestant takes
    images=80,                 # encode: how many at a time
    videos=100,                # eval: how many are kept
    episodes=64,               # eval: how many are tested
    clip='random:ViT-B/32',    # weights, or a geometry with random ones
)
NAMES = [str(i) for i in range(64)]  # of the training classes
CALLS = dict(cpu=1, cuda=10, mps=1)  # steps in a turn
SIDE, FRAMES = 256, 8  # what `decode` reads: 8 frames, one a segment, short side 256


# ---- taking turns ----------------------------------------------------------------------------------------------------------

def race(contestants, rounds, calls=1):
    """{name: function} -> {name: seconds of a call (rounds,)}. One warm-up each, then A, B, ..., A, B, ..., `calls` times each
    turn; CUDA is waited for at its end: where it need not wait, a call is launched while the last one runs."""
    seconds = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, function in contestants.items():
            wait()
            began = time.perf_counter()
            for _ in range(calls):
                function()
            wait()
            if i:
                seconds[name].append((time.perf_counter() - began) / calls)
    return {name: np.array(times) for name, times in seconds.items()}


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rows_of(seconds, base, work, unit, **more):
    """Table rows: work per second at the fastest and the median round, and the speed-up over contestant `base` there."""
    return [{**more, 'method': name, f'{unit}/s best': work / times.min(), f'{unit}/s median': work / np.median(times),
             'ratio best': seconds[base].min() / times.min(), 'ratio median': np.median(seconds[base]) / np.median(times)}
            for name, times in seconds.items()]


def show(rows, out, **about):
    """Prints rows as a Markdown table below what they were measured on; --out= also gets them as JSON."""
    where = dict(machine=f'{cpu_name()}, {os.cpu_count()} cores', threads=torch.get_num_threads(),
                 gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, torch=torch.__version__,
                 python=platform.python_version(), commit=commit(), load=round(os.getloadavg()[0], 1), **about)
    print(', '.join(f'{key} {value}' for key, value in where.items()) + '\n')
    names = list(dict.fromkeys(name for row in rows for name in row))
    print('| ' + ' | '.join(names) + ' |\n|' + ' --- |' * len(names))
    for row in rows:
        values = (row.get(name, '') for name in names)
        print('| ' + ' | '.join(f'{value:.3g}' if isinstance(value, float) else str(value) for value in values) + ' |')
    if out:
        with open(out, 'w') as file:
            json.dump(dict(where=where, rows=rows), file, indent=1)


def cpu_name():
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            return next((line.split(': ')[1].strip() for line in file if line.startswith('model name')), platform.machine())
    return platform.processor() or platform.machine()


def commit():
    run = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT,
                         capture_output=True, text=True)
    return run.stdout.strip() or None


# ---- decode ----------------------------------------------------------------------------------------------------------------

FAMILIES = {  # file: (codec, size, frames, rate, encoder's options); g: frames from one keyframe to the next
    'h264_gop250.mp4': ('libx264', (340, 256), 300, 30, dict(preset='veryfast', bf='3', g='250')),  # as Kinetics
    'h264_gop30.mp4': ('libx264', (340, 256), 300, 30, dict(preset='veryfast', bf='3', g='30')),
    'h264_720p.mp4': ('libx264', (1280, 720), 180, 30, dict(preset='veryfast', bf='3', g='60')),
    'hevc_gop250.mp4': ('libx265', (340, 256), 300, 30, {'preset': 'veryfast', 'x265-params': 'keyint=250:log-level=0'}),
    'hevc_gop30.mp4': ('libx265', (340, 256), 300, 30, {'preset': 'veryfast', 'x265-params': 'keyint=30:log-level=0'}),
    'mpeg4_gop250.avi': ('mpeg4', (320, 240), 175, 25, dict(bf='2', g='250', b='600k')),  # as UCF101, HMDB51
    'mpeg4_gop12.mp4': ('mpeg4', (320, 240), 175, 25, dict(bf='2', g='12', b='600k')),
    'mpeg2_gop12.mpg': ('mpeg2video', (320, 240), 175, 25, dict(bf='2', g='12', b='1500k')),
    'vp8_gop30.webm': ('libvpx', (320, 240), 175, 25, {'deadline': 'realtime', 'cpu-used': '6', 'b': '300k', 'g': '30'}),
    'vp9_gop250.webm': ('libvpx-vp9', (427, 240), 48, 12, {'deadline': 'realtime', 'cpu-used': '6', 'b': '300k'}),  # as SSv2
    'vp9_gop30.webm': ('libvpx-vp9', (320, 240), 175, 25, {'deadline': 'realtime', 'cpu-used': '6', 'b': '300k', 'g': '30'}),
    'av1_gop250.mp4': ('libsvtav1', (320, 240), 175, 25, dict(preset='12', g='250')),
    'av1_gop30.mp4': ('libsvtav1', (320, 240), 175, 25, dict(preset='12', g='30')),
}


def make_clips():
    """The clips of FAMILIES, made once -> their paths: two textures that move against each other."""
    folder = os.path.join(tempfile.gettempdir(), 'bench_clips')
    os.makedirs(folder, exist_ok=True)
    for name, (codec, (width, height), count, rate, options) in FAMILIES.items():
        path, half = os.path.join(folder, name), os.path.join(folder, f'half_{name}')
        if os.path.exists(path):
            continue
        noise = torch.rand(2, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
        layers = F.interpolate(noise, (height, width), mode='bicubic').mul(255).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        with av.open(half, 'w') as container:
            stream = container.add_stream(codec, rate=Fraction(rate), options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
            for i in range(count):
                back, front = np.roll(layers[0], (i, 3 * i), (0, 1)), np.roll(layers[1], -4 * i, 1)
                back[height // 4:height // 2] = front[height // 4:height // 2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(back, 'rgb24')))
            container.mux(stream.encode(None))
        os.replace(half, path)
    return [os.path.join(folder, name) for name in FAMILIES]


def smaller(frames):
    """uint8 (n, h, w, 3) -> short side SIDE."""
    height, width = frames.shape[1:3]
    scale = min(1, SIDE / min(height, width))
    x = torch.as_tensor(frames).permute(0, 3, 1, 2)
    size = round(height * scale), round(width * scale)
    x = F.interpolate(x, size, mode='bilinear', antialias=True) if scale < 1 else x
    return x.permute(0, 2, 3, 1).numpy()


def with_ours(path):
    return read_frames(path, lambda n: sample_indices(n, FRAMES), SIDE)


def with_pyav(path):
    """Decodes every frame, in order, and converts those that are wanted."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        count = sum(packet.size > 0 for packet in container.demux(stream))
        wanted = set(sample_indices(count, FRAMES).tolist())
        container.seek(0)
        frames = [frame for i, frame in enumerate(container.decode(stream)) if i in wanted]
        return smaller(np.stack([frame.to_ndarray(format='rgb24', threads=1) for frame in frames]))


def with_decord(path):
    import decord
    reader = decord.VideoReader(path, num_threads=1)
    return smaller(reader.get_batch(sample_indices(len(reader), FRAMES)).asnumpy())


def with_torchcodec(path):
    from torchcodec.decoders import VideoDecoder
    decoder = VideoDecoder(path, dimension_order='NHWC', num_ffmpeg_threads=1, seek_mode='exact')
    return smaller(decoder.get_frames_at(sample_indices(len(decoder), FRAMES).tolist()).data)


def with_opencv(path):
    import cv2
    cv2.setNumThreads(1)
    capture, frames = cv2.VideoCapture(path), {}
    wanted = sample_indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), FRAMES)
    for i in range(wanted[-1] + 1):
        if capture.grab() and i in wanted:
            frames[i] = cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
    return smaller(np.stack([frames[i] for i in wanted]))


@functools.cache  # one in each process, as in training
def clip_maker():
    return ClipMaker({**DEFAULTS, 'resize': 256, 'cache_dir': os.path.join(tempfile.gettempdir(), 'bench_kept')}, 224)


def from_cache(path):
    return clip_maker().frames(Video(path), [0])


READERS = {'PyAV': with_pyav, 'ours': with_ours, 'ours, kept frames': from_cache, 'decord': with_decord,
           'torchcodec': with_torchcodec, 'OpenCV': with_opencv}


def right_frames(name, path):
    """How many of the frames are those of sequential decoding: ours to the bit, others' as near to them as to any frame, for
    each scales in its own way."""
    convert = Converter(SIDE)
    with av.open(path) as container:
        every = np.stack([convert(frame) for frame in container.decode(video=0)])
    wanted = sample_indices(len(every), FRAMES)
    got = READERS[name](path)
    if name == 'ours':
        return int(sum(np.array_equal(x, every[i]) for x, i in zip(got, wanted)))
    thumbnails = [F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2).float(), (64, 64), mode='area') for x in (got, every)]
    grey_levels = torch.cdist(*(x.flatten(1) for x in thumbnails), p=1) / thumbnails[0][0].numel()
    return int((grey_levels[range(len(got)), wanted[:len(got)]] < grey_levels.amin(1) + 0.1).sum())


def attempt(name, path):
    """'' if a reader reads this file, else why not: it is not installed, or it fails."""
    try:
        READERS[name](path)
    except Exception as error:
        return f'{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ""}'
    return ''


def work(task):
    """-> the seconds of all cores that it took."""
    name, path = task
    began = time.process_time()
    READERS[name](path)
    return time.process_time() - began


def decode(config):
    """Two processes (--workers=) read the same clip at once, as a loader's workers do, each with one thread; what counts
    is the time of all cores that it takes."""
    paths = make_clips()
    if config['folder']:
        folder = config['folder']
        if not os.path.isdir(folder):
            sys.exit(f'There is no folder {folder}.')
        paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.lower().endswith(VIDEOS)]
    workers, rows = config['workers'] or 2, []
    for path in paths:  # before the workers look for what is kept
        attempt('ours, kept frames', path)
    with get_context('spawn').Pool(workers, torch.set_num_threads, (1,)) as pool:
        for path in paths:
            failed = {name: pool.apply(attempt, (name, path)) for name in READERS}
            if failed['PyAV'] or failed['ours']:
                print(f'{path} left out: ' + (failed['PyAV'] or failed['ours']))
                continue
            spent = {name: [] for name in READERS if not failed[name]}
            race({name: lambda name=name, path=path, spent=spent: spent[name].append(
                np.mean(pool.map(work, [(name, path)] * 2 * workers, 1))) for name in spent}, config['rounds'])
            seconds = {name: np.array(rounds[1:]) for name, rounds in spent.items()}  # of all cores
            for row in rows_of(seconds, 'PyAV', 1, 'clips', clip=os.path.basename(path)):
                if row['method'] != 'ours, kept frames':  # training frames: others
                    row['right frames'] = f'{pool.apply(right_frames, (row["method"], path))} of {FRAMES}'
                rows.append(row)
            print(path, *(f'- {name}: {why}' for name, why in failed.items() if why), sep='\n', flush=True)
    packages = {name: version_of(name) for name in ('av', 'decord', 'torchcodec', 'opencv-python-headless')}
    show(rows, config['out'], workers=workers, **packages)


def version_of(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'none'


# ---- encode ----------------------------------------------------------------------------------------------------------------

class Anything(types.ModuleType):
    """A module that has every name: stands for torchvision."""
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith('__'):  # others that walk through sys.modules ask for __file__ and the like
            raise AttributeError(name)
        return sys.modules.get(f'{self.__name__}.{name}') or type(name, (), dict.fromkeys(('BICUBIC', 'BILINEAR')))


def open_clip_tower(visual):
    """open_clip's image tower with our weights, or None. It imports torchvision, of which nothing is used here."""
    if not importlib.util.find_spec('open_clip'):
        return None
    importlib.import_module('transformers')  # before the stand-in, which it would take for the real thing
    if 'torchvision' not in sys.modules and not importlib.util.find_spec('torchvision'):
        names = ['torchvision' + tail for tail in ('', '.transforms', '.transforms.functional', '.ops', '.ops.misc')]
        sys.modules.update({name: Anything(name) for name in names})
    import open_clip
    width, embed_dim = visual.proj.shape
    tower = open_clip.transformer.VisionTransformer(
        visual.image_size, visual.conv1.kernel_size[0], width, len(visual.transformer.resblocks), width // 64, 4.0,
        output_dim=embed_dim, act_layer=open_clip.transformer.QuickGELU)
    tower.load_state_dict(visual.state_dict())
    return tower.eval().to(visual.proj.device)


@torch.no_grad()
def encode(config):
    """Our tower from uint8 pixels, with the tokens that VBA sees; open_clip's tower from ready float images."""
    clip, device = checkpoint.load_clip(config), config['device']
    model = checkpoint.build({**config, 'temporal_adapter': False}, clip, [])
    visual = clip.visual.to(device)
    videos, size = -(-config['images'] // config['frames']), visual.image_size
    frames = torch.randint(256, (videos, config['frames'], 3, size, size), dtype=torch.uint8, device=device)
    sees = ('image', *model.sees)
    images, tower, contestants = visual.normalise(frames.flatten(0, 1)), open_clip_tower(visual), {}
    a, b = (torch.randn(shape, device=device).bfloat16() for shape in ((400, 768), (768, 768)))
    rate = 2 * a.numel() * 768 / race(dict(mm=lambda: a @ b), 1)['mm'].min() / 1e9
    print(f'a matrix product in bfloat16: {rate:.0f} GFLOP/s')
    for name, half in dict(fp32=False, bf16=True).items():
        if half and rate < 10:
            continue  # this processor only emulates it
        cast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half)
        if tower:
            contestants[f'open_clip, {name}'] = cast(lambda: tower(images))
        contestants[f'ours, {name}'] = cast(lambda: look(visual, frames, sees)[0].flatten(0, 1))
    base = next(iter(contestants))
    with FlopCounterMode(display=False) as counter:
        visual(torch.zeros(1, 3, size, size, device=device))
    flops, product = counter.get_total_flops(), machine(device, torch.float32)[0]
    print(f'{flops / 1e9:.2f} GFLOP an image, {product / 1e9:.0f} GFLOP/s in float32: that is {product / flops:.3g} images/s')
    rows = rows_of(race(contestants, config['rounds']), base, videos * config['frames'], 'images')
    reference = contestants[base]().float()
    for row in rows:
        row['lowest cosine'] = f'{F.cosine_similarity(contestants[row["method"]]().float(), reference).min():.6f}'
    show(rows, config['out'], device=device, images=videos * config['frames'], open_clip=version_of('open_clip_torch'))


# ---- train -----------------------------------------------------------------------------------------------------------------

class Projected(nn.Module):
    """Cross-frame attention as it is usually written: nn.MultiheadAttention, which projects every token to key and value."""

    def __init__(self, attention):
        super().__init__()
        self.mha = nn.MultiheadAttention(attention.out_proj.in_features, attention.heads, batch_first=True)
        self.mha.load_state_dict(attention.state_dict())

    def folded(self, q, x, ln):
        tokens = (x * ln.weight + ln.bias).flatten(0, -3)
        return self.mha(q.reshape(-1, 1, q.shape[-1]), tokens, tokens, need_weights=False)[0].view_as(q)


def projected(model):
    """A copy of a model that gives the same answers from unfolded attention."""
    model = copy.deepcopy(model)
    for level in model.levels:
        level.frame_attn = Projected(level.frame_attn).to(model.query.device)
    return model


def episodes_of(config):
    """The episodes of a step, as train.py makes them."""
    labels, answers = (torch.arange(config['way'], device=config['device']).repeat_interleave(config[n])
                       for n in ('shot', 'queries'))
    classes = torch.arange(config['way'], device=config['device'])
    return Episode(labels, classes.expand(config['meta_batch'], -1), NAMES, answers=answers.expand(config['meta_batch'], -1))


def stepper(config, visual, model, batches):
    """-> a function that does one step of train.py and returns the loss. batches: frames (V, T, 3, H, W), or lists of what
    `look` gave of them."""
    step, optimizer = training.wrapped(config, model), training.optimizer_of(config, model)
    scaler = torch.amp.GradScaler(config['device'], enabled=config['dtype'] == 'float16')
    shows = torch.compile(look) if config['compile'] else look
    episode, number = episodes_of(config), itertools.count()

    def one():
        batch = next(batches)

        def shown(part):
            own = [x.unflatten(0, (config['meta_batch'], -1))[part].flatten(0, 1) for x in
                   (batch if isinstance(batch, list) else [batch])]
            if isinstance(batch, list):
                return own
            with amp(config):
                return shows(visual, own[0], model.sees)

        numbers = training.gradients(config, step, scaler, shown, episode)
        training.update(config, model, optimizer, scaler, next(number))
        return numbers[0]
    return one


def count(config, visual, model, frames):
    """FLOPs of a step (multiply and add counted): frozen forward, trained part's forward, backward; and bytes that must move:
    float32 weights read, trained ones 9 times read or written (forward, backward, gradient, AdamW's two moments, update)."""
    flops, aten = [], torch.ops.aten
    attention = {  # PyTorch counts that of CUDA, not this
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}
    number, episode = config['meta_batch'], episodes_of({**config, 'meta_batch': 1})
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        seen = look(visual, frames[:len(frames) // number], model.sees)  # one episode stands for all
        flops.append(counter.get_total_flops())
        loss, _ = Step(model)(seen, episode)
        flops.append(counter.get_total_flops() - sum(flops))
        loss.backward()
        flops.append(counter.get_total_flops() - sum(flops))
    model.zero_grad()
    weights = 4 * sum(p.numel() * (9 if p.requires_grad else 1) for p in (*visual.parameters(), *model.parameters()))
    tokens = 3 * sum(x.nbytes for x in seen)  # written, read, read in backward
    return [number * f for f in flops], weights + number * tokens


def machine(device, dtype):
    """What the hardware gives here -> (FLOP/s of an MLP's product, bytes/s read and written in a copy), best of 5."""
    cuda = torch.device(device).type == 'cuda'
    rows = 2 ** 16 if cuda else 1200
    a, b = torch.randn(rows, 768, device=device, dtype=dtype), torch.randn(768, 3072, device=device, dtype=dtype)
    x = torch.randn(2 ** 28 if cuda else 2 ** 24, device=device)
    y = torch.empty_like(x)
    seconds = race(dict(mm=lambda: [a @ b for _ in range(4)], copy=lambda: [y.copy_(x) for _ in range(4)]), 5)
    return 8 * rows * 768 * 3072 / seconds['mm'].min(), 32 * x.numel() / seconds['copy'].min()


def train(config):
    """A step, forward to AdamW, with adapters off and on. The floor is the counted work at the measured rates.

    Without adapters also as with cache_prefix: from what the frozen tower showed. With the config's training clips: the same
    again and again from the cache of decoded frames, cropped anew, and others each time, decoded anew.
    """
    clip, rows, device, cuda = checkpoint.load_clip(config), [], config['device'], config['device'] == 'cuda'
    visual, dtype = clip.visual.to(device), getattr(torch, config['dtype'])
    videos = config['meta_batch'] * config['way'] * (config['shot'] + config['queries'])
    split = data.load_splits(config)['train'] if config['dataset'] and os.path.isdir(config['data_root']) else None
    size = visual.image_size
    frames = torch.randint(256, (videos, config['frames'], 3, size, size), dtype=torch.uint8, device=device)
    for adapter in (False, True):
        model = checkpoint.build({**config, 'temporal_adapter': adapter}, clip, []).to(device)
        flops, moved = count(config, visual, model, frames)
        theirs, _ = count(config, visual, projected(model), frames)
        contestants = {'ours': (copy.deepcopy, frames), 'nn.MultiheadAttention': (projected, frames)}
        if not adapter:
            kept = [x.half() for x in look(visual, frames, model.sees)]
            contestants |= {f'{name}, kept': (copied, kept) for name, (copied, _) in contestants.items()}
        steps, peaks, losses = {}, {}, []
        for name, (copied, batch) in contestants.items():
            before = torch.cuda.memory_allocated() if cuda else 0  # by those before it
            step = steps[name] = stepper(config, visual, copied(model), itertools.repeat(batch))
            losses.append(step().item())
            if cuda:  # with AdamW's moments, which the first step made
                torch.cuda.reset_peak_memory_stats()
                step()
                own = sum(x.nbytes for x in (batch if isinstance(batch, list) else [batch]))
                peaks[name] = (torch.cuda.max_memory_allocated() - before + own) / 1e9
        if max(losses) - min(losses) > 1e-2 * abs(losses[0]):
            sys.exit(f'The models are not equal: losses {losses} at the first step.')
        seconds = race(steps, config['rounds'], CALLS[torch.device(device).type])
        for name, cache_gb in (('ours, from the frame cache', config['cache_gb']), ('ours, decoding', 0.0)) if split else ():
            reader = ClipReader({**config, 'cache_gb': cache_gb}, size)
            jobs = training.jobs_of(config, split, (config['way'], config['shot'], config['queries']), 0)
            if cache_gb:  # the same videos, cropped anew
                first = next(jobs)[1]
                jobs = ((number, first) for number in itertools.count(0, config['meta_batch']))
            clips = training.on_device(reader.stream(split, jobs, True), device)
            batches = (frames.flatten(0, 1) for frames, _ in clips)
            # alone: in others' turns its workers would read ahead
            loaded = {name: stepper(config, visual, copy.deepcopy(model), batches)}
            seconds |= race(loaded, config['rounds'], CALLS[torch.device(device).type])
            reader.close()
        rate, bandwidth = machine(device, dtype)
        floor = max(sum(flops) / rate, moved / bandwidth)
        print(f'adapters {adapter}: {" + ".join(f"{f / 1e9:.1f}" for f in flops)} GFLOP (frozen + trained forward + backward; '
              f'{" + ".join(f"{f / 1e9:.1f}" for f in theirs)} with nn.MultiheadAttention), '
              f'{moved / 1e9:.2f} GB; {rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s: floor {1000 * floor:.0f} ms')
        for row in rows_of(seconds, 'nn.MultiheadAttention', videos, 'videos', adapters=adapter):
            median = np.median(seconds[row['method']])
            rows.append({**row, 'ms median': 1000 * median, 'of the floor': f'{100 * floor / median:.0f} %' if
                         row['method'] == 'ours' else '', 'peak GB': peaks.get(row['method'], '')})
    show(rows, config['out'], device=device, dtype=str(dtype), videos=videos, clip=config['clip'])


# ---- memory ----------------------------------------------------------------------------------------------------------------

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made within it that are still alive, and keeps their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.alive:
                self.add(x.untyped_storage())
        return result

    def add(self, storage):
        place, size = storage._cdata, storage.nbytes()

        def gone():
            self.alive.remove(place)
            self.now -= size

        self.alive.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, gone)


def step_bytes(visual, model, config):
    """The peak of a step on a GPU in half precision, counted on tensors without content: weights, gradients, AdamW's moments,
    two batches of frames, and all that forward and backward make. Not counted: CUDA's libraries, the allocator's gaps."""
    size, videos = visual.image_size, config['way'] * (config['shot'] + config['queries'])
    (visual, step), norm = copy.deepcopy((visual, Step(model))), F.layer_norm  # together: they may share blocks
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, \
            mock.patch('torch.nn.functional.layer_norm', lambda x, *args: norm(x.float(), *args)), \
            mock.patch.dict('model.CHUNK', cpu=CHUNK['cuda']):  # and a GPU's autocast norms in float32
        for module in (*visual.modules(), *step.modules()):
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(p), p.requires_grad))
        held = [torch.empty(2, *p.shape) for p in step.parameters() if p.requires_grad]
        held.append(torch.empty(2, config['meta_batch'] * videos, config['frames'], 3, size, size, dtype=torch.uint8))
        number = config['micro_batch'] or config['meta_batch']
        for i in range(0, config['meta_batch'], number):
            episode = episodes_of({**config, 'device': 'cpu', 'meta_batch': min(number, config['meta_batch'] - i)})
            with torch.autocast('cpu', torch.bfloat16):
                seen = look(visual, held[-1][0][i * videos:(i + number) * videos], model.sees)
                loss, _ = step(seen, episode)
            loss.backward()
    return live.peak


def memory(config):
    """What a step of train.py takes of a GPU, by count, no GPU needed: whole, by single episodes, with recomputing."""
    clip, rows = checkpoint.load_clip(config), []
    for adapter in (False, True):
        for more in ({}, dict(micro_batch=1), dict(micro_batch=1, recompute=True))[:2 + adapter]:
            each = {**config, 'temporal_adapter': adapter, **more}
            rows.append({'adapters': adapter, 'method': ', '.join(f'{key}={value}' for key, value in more.items()) or 'whole',
                         'GB': step_bytes(clip.visual, checkpoint.build(each, clip, []), each) / 1e9})
    show(rows, config['out'], clip=config['clip'], way=config['way'], shot=config['shot'], queries=config['queries'],
         meta_batch=config['meta_batch'])


# ---- methods ---------------------------------------------------------------------------------------------------------------

def methods_(config):
    """A step of every method that trains, with its own default options: from what the frozen tower showed; the whole of it
    counted in bytes, as in `memory`."""
    clip, steps, about = checkpoint.load_clip(config), {}, {}
    visual, device, size = clip.visual.to(config['device']), config['device'], clip.visual.image_size
    videos = config['meta_batch'] * config['way'] * (config['shot'] + config['queries'])
    frames = torch.randint(256, (videos, config['frames'], 3, size, size), dtype=torch.uint8, device=device)
    for name in methods():
        each = config | getattr(find_method(name)[0], 'options', {}) | dict(method=name, temporal_adapter=False)
        try:
            method = checkpoint.build(each, clip, NAMES).to(device)
        except SystemExit as error:
            print(f'no row {name}: {error}')
            continue
        if 'pixels' in method.sees and device == 'cpu':
            print(f'no row {name}: it trains a copy of the tower, which takes a GPU.')
            continue
        if any(p.requires_grad for p in method.parameters()):
            about[name] = dict(parameters=sum(p.numel() for p in method.parameters() if p.requires_grad), GB='')
            with contextlib.suppress(DynamicOutputShapeException):  # sizes that depend on labels, as in trx, are not counted
                about[name]['GB'] = step_bytes(visual, method, each) / 1e9
            steps[name] = stepper(each, visual, method, itertools.repeat([x.half() for x in look(visual, frames, method.sees)]))
    seconds = race(steps, config['rounds'], CALLS[torch.device(device).type])
    rows = rows_of(seconds, 'matrix', videos, 'videos')
    show([row | about[row['method']] for row in rows], config['out'], device=device, dtype=config['dtype'], videos=videos,
         clip=config['clip'])


# ---- eval ------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def eval_(config):
    """5-way 5-shot episodes with 1 and 5 queries a class from random tokens in memory; anew: encoding each one's videos,
    in proportion to the time that an episode of 5 takes."""
    clip, device = checkpoint.load_clip(config), config['device']
    model = checkpoint.build({**config, 'cross_video': 'joint'}, clip, []).to(device)
    visual = clip.visual.to(device)
    width, dim = visual.grid ** 2 * config['frames'], visual.proj.shape[0]
    kept = [torch.randn(config['videos'], dim, device=device),
            *(torch.randn(config['videos'], width, dim, device=device).half() for _ in range(config['levels'] - 1))]
    rows, rng = [], np.random.default_rng(0)
    frames = torch.randint(256, (5, config['frames'], 3, *2 * [visual.image_size]), dtype=torch.uint8)
    few = Episode(torch.arange(4, device=device), torch.arange(4, device=device)[None], list('abcd'))

    def anew():
        with amp(config):
            model.scores(model.video(*bring(look(visual, frames.to(device), model.sees), device)), few)

    for videos in (30, 50):
        episodes = np.stack([rng.permutation(config['videos'])[:videos] for _ in range(config['episodes'])])
        labels, classes = np.repeat(np.arange(5), 5), np.tile(np.arange(5), (len(episodes), 1))
        from_kept = functools.partial(testing.answers, config, model, kept, episodes, labels, classes, list('abcde'), True, '')
        seconds = race({'kept tokens': from_kept, 'each anew': anew}, config['rounds'])
        seconds['kept tokens'] /= len(episodes)
        seconds['each anew'] *= videos / 5
        rows += rows_of(seconds, 'each anew', 1, 'episodes', **{'videos an episode': videos})
    rate, bandwidth = machine(device, getattr(torch, config['dtype']))
    show(rows, config['out'], device=device, dtype=config['dtype'], clip=config['clip'],
         bytes_per_video=4 * dim + 2 * width * dim * (len(kept) - 1),
         GFLOPs_mm=round(rate / 1e9), GBs_copy=round(bandwidth / 1e9, 1))


def main():
    commands = dict(decode=decode, encode=encode, train=train, memory=memory, methods=methods_, eval=eval_)
    command, *argv = sys.argv[1:] or ['']
    if command not in commands and '--help' not in sys.argv:
        sys.exit(__doc__)
    config = load_config(['--method=vba', *(argv if command in commands else sys.argv[1:])], OPTIONS)
    resolve(config)
    commands[command](config)


if __name__ == '__main__':
    main()
