"""Trains a method beside a frozen CLIP, episode by episode, then tests the best checkpoint.

    python train.py sample_configs/moving_shapes.py
    python train.py sample_configs/diving48.py --data_root=/data/diving48/clips --lr=1e-5
    python train.py sample_configs/diving48.py --method=my_idea.py
    python train.py sample_configs/diving48.py --resume=True
    torchrun --standalone --nproc_per_node=3 train.py sample_configs/diving48.py

Writes into out_dir: log.jsonl, last.pt (to go on from), best.pt (best on the validation classes), results.json (the test);
with closed_set=True also train_videos.json. A folder that holds a checkpoint needs --resume=True or --overwrite=True.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import data
import encoding
import ranks
import testing
from config import amp, load_config, resolve
from model import Episode, Step, joined, look
from reader import ClipReader
from tools import pictures
from tools.claim import claimed


def learning_rate(config, i, lr):
    """The rate of step i: a linear rise to lr over warmup_iters, then constant but for drops, or a cosine to 0 at max_iters."""
    if i < config['warmup_iters']:
        return lr * (i + 1) / config['warmup_iters']
    if config['decay'] == 'constant':
        passed = [step for step in config['drops'] if step <= i]
        return lr * config['drops'][max(passed)] if passed else lr
    done = (i - config['warmup_iters']) / max(1, config['max_iters'] - config['warmup_iters'])
    return lr * (1 + math.cos(math.pi * done)) / 2


# ---- From episodes to what CLIP shows of them

def jobs_of(config, split, sizes, step):
    """Endless jobs from step number `step` on: this rank's share of a step's meta_batch episodes of sizes (way, shot, queries),
    or in a closed set (sizes empty) of its videos, B = 1, each a pure function of the seed and its number -> (number of the
    first, indices (E, B) into split.videos)."""
    rank, world = ranks.rank_of()
    share = config['meta_batch'] // world
    while True:
        first = step * config['meta_batch'] + rank * share
        numbers = range(first, first + share)
        draw = data.episode if sizes else data.shuffled
        yield first, np.stack([draw(split, *sizes, config['seed'], number) for number in numbers])
        step += 1


def episode_of(config, split, sizes, indices):
    """The Episode of videos (E, B) of a split, on the device: their ways and answers."""
    ways = testing.ways_of(split, indices, *sizes[:2])
    labels, classes, answers = (torch.from_numpy(x).to(config['device']) for x in ways)
    return Episode(labels, classes, split.classes, answers=answers)


def batches_of(config, clip, sees, split, reader, jobs):
    """Jobs -> (shown, indices (E, B) that were read).

    shown: a function from a slice of the E episodes to what CLIP shows of their videos, a list of tensors (E*B, T, ...) on the
    device: so that only the part that is computed with takes memory.
    """
    shows = torch.compile(look) if config['compile'] else look
    for frames, indices in on_device(reader.stream(split, jobs, True), config['device']):  # frames (E, B, T, 3, H, W)
        def shown(part, frames=frames):
            with amp(config):
                return shows(clip.visual, frames[part].flatten(0, 1), sees)
        yield shown, indices


def batches_kept(config, clip, sees, split, reader, jobs):
    """The same from cache_prefix random draws of each video, which CLIP has seen once and for all."""
    draws = [encoding.keep_seen(config, clip, split, reader, sees, draw).tensors for draw in range(config['cache_prefix'])]

    def batches():
        for first, indices in jobs:  # (E, B)
            episodes = []
            for i, rows in enumerate(torch.from_numpy(indices)):  # an episode is of one draw
                draw = draws[np.random.default_rng([config['seed'], first + i]).integers(len(draws))]
                episodes.append([x[rows.to(x.device)] for x in draw])
            yield lambda part, episodes=episodes: joined(episodes[part]), indices
    return batches()


def on_device(batches, device):
    """The same batches on the device: on CUDA the next one is copied there while this one is computed with."""
    if not device.startswith('cuda'):
        yield from ((frames.to(device), indices) for frames, indices in batches)
        return
    stream, before = torch.cuda.Stream(device), None
    for frames, indices in batches:  # endless
        with torch.cuda.stream(stream):
            batch = frames.to(device, non_blocking=True), indices
        if before:
            yield before
        torch.cuda.current_stream().wait_stream(stream)
        batch[0].record_stream(torch.cuda.current_stream())
        before = batch


# ---- A step

def wrapped(config, method):
    """The module that a step calls: compiled, and of several ranks with their gradients added up."""
    step, cuda = Step(method), config['device'].startswith('cuda')
    if ranks.rank_of()[1] > 1:
        step = torch.nn.parallel.DistributedDataParallel(
            step, [config['device']] if cuda else None, gradient_as_bucket_view=True)
    return torch.compile(step) if config['compile'] else step


def optimizer_of(config, method):
    """AdamW over the method's groups, or over all that trains."""
    trained = [p for p in method.parameters() if p.requires_grad]
    if not trained:
        sys.exit(f'method={config["method"]} has nothing to train; eval.py tests it.')
    groups = method.groups(config['lr']) if hasattr(method, 'groups') else trained
    return torch.optim.AdamW(groups, config['lr'], betas=(0.9, 0.999), weight_decay=config['weight_decay'], fused=True)


def gradients(config, step, scaler, shown, episode):
    """Forward and backward of E episodes, micro_batch at a time -> the loss and the share of right answers, (2,).

    shown: as in batches_of.
    """
    share = len(episode.answers)
    size, numbers = config['micro_batch'] or share, 0
    for i in range(0, share, size):
        of = slice(i, i + size)
        part = episode._replace(classes=episode.classes[of], answers=episode.answers[of])
        seen = shown(of)
        weight = len(part.answers) / share
        final = i + size >= share  # gradients of all ranks meet once a step
        with contextlib.nullcontext() if final or ranks.rank_of()[1] == 1 else step.no_sync():
            with amp(config):
                loss, scores = step(seen, part)
            scaler.scale(weight * loss).backward()
        right = (scores.detach().argmax(-1) == part.answers).float().mean()
        numbers = numbers + weight * torch.stack([loss.detach(), right])
    return numbers


def update(config, method, optimizer, scaler, i):
    """AdamW's step number i on the gradients there are."""
    for group in optimizer.param_groups:
        group['lr'] = learning_rate(config, i, group.setdefault('initial_lr', group['lr']))
    scaler.unscale_(optimizer)
    if config['grad_clip']:
        torch.nn.utils.clip_grad_norm_(method.parameters(), config['grad_clip'])
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


# ---- A run

def open_log(path, iteration):
    """The log, opened to append, without the lines that a resumed run is about to write again."""
    lines = []
    if iteration and os.path.exists(path):
        with open(path) as file:
            lines = [text for text in file if text.endswith('\n') and json.loads(text)['iter'] <= iteration]
    with checkpoint.whole(path) as file:
        file.writelines(lines)
    return open(path, 'a', buffering=1)


def check_room(config, method):
    """Stops where the disk is too full for the checkpoints."""
    folder = config['out_dir']
    needed = 3 * 12 * sum(p.numel() for p in method.parameters() if p.requires_grad)  # best.pt, last.pt and the next one:
    there = [os.path.join(folder, name) for name in ('best.pt', 'last.pt')]           # weights and AdamW's two moments
    free = shutil.disk_usage(folder).free + sum(os.path.getsize(path) for path in there if os.path.exists(path))
    if free < needed:
        sys.exit(f'out_dir={folder} has {free / 1e9:.2f} GB free, but the checkpoints need {needed / 1e9:.2f} GB.')


def validation_of(config, clip, sees, split, reader):
    """What CLIP shows of the validation's videos (Kept), its episodes (val_episodes, B), indices into these, and their way;
    in a closed set all its videos (V, 1) and None."""
    kept = encoding.keep_seen(config, clip, split, reader, sees)
    if config['closed_set']:
        return kept, np.arange(len(kept.rows))[:, None], None
    sizes, = data.try_episodes(config, 'val', kept.split)
    episodes = testing.draw_episodes(kept.split, *sizes, config['seed'], config['val_episodes'])
    needed, episodes = np.unique(episodes, return_inverse=True)  # the other videos need not be encoded each time
    rows = kept.rows[needed]
    kept = encoding.Kept(encoding.subset(kept.split, needed), np.arange(len(needed)), [x[rows] for x in kept.tensors])
    return kept, episodes.reshape(config['val_episodes'], -1), sizes[0]


def resume(config, path, method, clip, optimizer, scaler, state):
    """Goes on from a checkpoint, bit for bit. Stops where its options were others."""
    saved = checkpoint.load(path, config['method'])
    before = saved['config']
    changed = [key for key in checkpoint.training_options(config) if before[key] != config[key]]
    if changed:
        sys.exit(f'{path} was trained with other options: ' + ', '.join(
            f'{key}={before[key]!r} (now {config[key]!r})' for key in changed))
    checkpoint.restore(method, clip, saved, path)
    optimizer.load_state_dict(saved['optimizer'])
    if saved['scaler']:  # it was trained in half precision too
        scaler.load_state_dict(saved['scaler'])
    state.update(saved['state'])
    print(f'resumed at step {state["iter"]}')


def settle(state, split, skips, number, numbers, arrived, indices):
    """Adds a step's loss, accuracy and signals, on the CPU once they `arrived`, to the state -> whether a signal came. Ends
    where the loss is not finite; with `skips`, where it is not several times in a row: GradScaler left such a step out."""
    if arrived:
        arrived.synchronize()  # waits for this step alone, not for later ones
    loss, accuracy, stopped = numbers.tolist()
    state['skipped'] = 0 if math.isfinite(loss) else state['skipped'] + 1
    if 0 < state['skipped'] <= skips:
        return stopped > 0
    if state['skipped']:
        sys.exit(f'The loss is {loss} at step {number}; last.pt is the last good checkpoint. The videos: '
                 + ', '.join(split.videos[i].path for i in indices.flat))
    state.update(loss=state['loss'] + loss, correct=state['correct'] + accuracy, steps=state['steps'] + 1)
    return stopped > 0


def report(state, log, rates, waited, seconds, videos):
    """A line for people and one for the log over the steps since the last one, which took `seconds`, `waited` of them for data;
    videos: of one step; rates: what to log of the optimizer. The sums begin anew."""
    steps = max(1, state['steps'])
    entry = dict(iter=state['iter'], loss=state['loss'] / steps, accuracy=100 * state['correct'] / steps, **rates,
                 ms_data=1000 * waited / steps, ms_compute=1000 * (seconds - waited) / steps,
                 videos_per_s=videos * steps / seconds)
    print('step {iter}  loss {loss:.4f}  train accuracy {accuracy:.1f} %  {ms_data:.0f} + {ms_compute:.0f} ms (data + compute)'
          '  {videos_per_s:.0f} videos/s'.format(**entry), flush=True)
    log.write(json.dumps(entry) + '\n')
    state.update(loss=0.0, correct=0.0, steps=0)


@contextlib.contextmanager
def signals():
    """A list that the first Ctrl-C or SIGTERM fills: the step in progress ends, then the run is saved."""
    stop = []

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, before[number])  # a second one ends the process
        print('stopping after this step', flush=True)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


def run(config):
    """Trains in out_dir, validates, and tests the best checkpoint."""
    (rank, world), cuda, out_dir = ranks.rank_of(), config['device'].startswith('cuda'), config['out_dir']
    if config['meta_batch'] % world:
        sys.exit(f'meta_batch={config["meta_batch"]} episodes cannot be shared out evenly to {world} processes.')
    if config['deterministic']:
        os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
        torch.use_deterministic_algorithms(True)

    # data, CLIP and the method
    with ranks.rank_0_first():  # it makes or fetches what is missing
        splits, clip = data.load_splits(config), checkpoint.load_clip(config)
    if not config['train_groups']:
        splits['train'] = dataclasses.replace(splits['train'], groups=[])
    train, val, test = (splits[use] for use in data.SPLITS)
    for use in ('val', 'test'):
        data.try_episodes(config, use, splits[use])
    sizes = data.try_episodes(config, 'train', train)[0]
    method, tests = checkpoint.build(config, clip, train.classes).to(config['device']).train(), [test]
    if config['closed_set'] and getattr(method, 'text', False) and splits[data.UNSEEN].videos:
        checkpoint.build(config, clip, splits[data.UNSEEN].classes)  # stops here if it cannot read a name
        tests.append(splits[data.UNSEEN])
    clip.to(config['device'])
    check_room(config, method)
    print('\n'.join(f'{key} = {value!r}' for key, value in config.items() if key != 'splits'))
    print(f'{sum(p.numel() for p in method.parameters() if p.requires_grad) / 1e6:.2f} M parameters train beside '
          f'{sum(p.numel() for p in clip.visual.parameters()) / 1e6:.2f} M frozen ones')

    if config['closed_set'] and rank == 0:  # with per_class a draw, to be told and repeated
        names, drawn = testing.names_of(train), testing.hash_of(train, np.arange(len(train.videos)))
        checkpoint.save_json(os.path.join(out_dir, 'train_videos.json'), dict(hash=drawn, videos=names))
        print(f'{len(names)} training videos of {len(train.classes)} classes ({drawn}), listed in train_videos.json')

    optimizer = optimizer_of(config, method)
    scaler = torch.amp.GradScaler(torch.device(config['device']).type, enabled=config['dtype'] == 'float16')
    state = dict(iter=0, best=-1.0, skipped=0, loss=0.0, correct=0.0, steps=0)  # sums since the last log line
    last, best = os.path.join(out_dir, 'last.pt'), os.path.join(out_dir, 'best.pt')
    if config['resume']:
        resume(config, last, method, clip, optimizer, scaler, state)
    log = open_log(os.path.join(out_dir, 'log.jsonl'), state['iter']) if rank == 0 else open(os.devnull, 'w')

    def save(path):
        if rank == 0:
            checkpoint.save(path, method, clip, config, state=state, optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict())

    with contextlib.closing(ClipReader(config, clip.visual.image_size)) as reader:
        val_kept, val_episodes, val_way = validation_of(config, clip, method.sees, val, reader)
        jobs = jobs_of(config, train, sizes, state['iter'])
        batches = (batches_kept if config['cache_prefix'] else batches_of)(config, clip, method.sees, train, reader, jobs)
        step = wrapped(config, method)
        with signals() as stop:
            waited, began, unsettled, stopped = 0.0, time.perf_counter(), [], False
            skips = 5 if scaler.is_enabled() else 0
            while state['iter'] < config['max_iters'] and not stopped:
                now = time.perf_counter()
                shown, indices = next(batches)
                waited += time.perf_counter() - now
                torch.manual_seed(np.random.default_rng([config['seed'], state['iter'], rank]).integers(2 ** 62))  # for dropout
                numbers = gradients(config, step, scaler, shown, episode_of(config, train, sizes, indices))
                update(config, method, optimizer, scaler, state['iter'])
                state['iter'] += 1
                numbers = ranks.add_up(F.pad(numbers, (0, 1), value=len(stop))) / world
                numbers = numbers.to('cpu', non_blocking=cuda)
                arrived = torch.cuda.current_stream().record_event() if cuda else None
                unsettled.append((state['iter'], numbers, arrived, indices))

                logs = state['iter'] % config['log_interval'] == 0
                validates = state['iter'] % config['eval_interval'] == 0 or state['iter'] == config['max_iters']
                late = 1 if cuda and not logs and not validates else 0  # on CUDA a step late: so it need not wait
                while len(unsettled) > late:
                    stopped = settle(state, train, skips, *unsettled.pop(0)) or stopped
                if logs:
                    seconds = time.perf_counter() - began
                    rates = dict(lr=optimizer.param_groups[0]['lr'], scale=scaler.get_scale())
                    report(state, log, rates, waited, seconds, indices.size * world)
                    waited, began = 0.0, time.perf_counter()
                if validates:
                    now = time.perf_counter()
                    accuracy = testing.validate(config, method, val_kept, val_way, val_episodes)
                    of = (f'{val_way}-way 1-shot, {len(val_episodes)} episodes' if val_way else
                          f'{len(val.classes)} classes, {len(val_episodes)} videos')
                    print(f'step {state["iter"]}  validation: {100 * accuracy:.2f} % ({of})', flush=True)
                    if accuracy > state['best']:
                        state['best'] = float(accuracy)
                        save(best)
                    save(last)
                    began += time.perf_counter() - now
        if stopped:
            for waiting in unsettled:
                settle(state, train, skips, *waiting)
            with ranks.rank_0_first():  # torchrun ends all as soon as one ends
                save(last)
            sys.exit(f'Stopped at step {state["iter"]} by a signal; --resume=True goes on from {last}.')

        batches.close()  # nothing more is read ahead

        # the test is read once, here
        with ranks.rank_0_first():  # it may still be writing best.pt
            checkpoint.restore(method, clip, checkpoint.load(best, config['method']), best)
            tested = testing.untrained(config, clip, test.classes)
        tested.append(testing.Tested(config, method, clip.weights_hash, best, config['dataset']))
        rows = []
        for split in tests:
            encoded, rows_of_videos = testing.encode(config, clip, tested, split, reader)
            rows += testing.evaluate(config, encoded, split, rows_of_videos)[0]
        if rank == 0:
            checkpoint.save_json(os.path.join(out_dir, 'results.json'), rows)
            pictures.curves({'': os.path.join(out_dir, 'log.jsonl')}, os.path.join(out_dir, 'curve.png'))


def main():
    config = load_config(sys.argv[1:])
    resolve(config)
    ranks.begin(config)
    first = ranks.rank_of()[0] == 0
    with claimed(config['out_dir'], config['resume'], config['overwrite']) if first else contextlib.nullcontext():
        run(config)
    ranks.end()  # once nothing holds what it ends: the module that adds up gradients did


if __name__ == '__main__':
    main()
