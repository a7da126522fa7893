"""Trains the adapters and the aggregator beside a frozen CLIP, episode by episode, then tests the best checkpoint.

    python train.py sample_configs/moving_shapes.py
    python train.py sample_configs/diving48.py --data_root=/data/diving48/clips --lr=1e-5
    python train.py sample_configs/diving48.py --resume=True
    torchrun --standalone --nproc_per_node=3 train.py sample_configs/diving48.py

Writes into out_dir: log.jsonl, last.pt (to go on from), best.pt (best on the validation classes), results.json (the test).
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time

import numpy as np
import torch

import data
import eval as evaluation
import pictures
import ranks
from config import MODEL_OPTIONS, load_config, resolve_device
from encoding import encode_frozen, encode_split
from model import class_scores, episode_loss, log_scores, trainable_state

# options that a resumed run shares with the run it goes on from
FIXED = (*MODEL_OPTIONS, 'dataset', 'splits', 'augment', 'flip', 'cache_frames', 'cache_prefix', 'loss', 'way', 'shot',
         'queries', 'meta_batch', 'frozen_dtype', 'lr', 'weight_decay', 'warmup_iters', 'decay', 'grad_clip', 'val_episodes',
         'seed')


def learning_rate(config, i):
    """The rate of step i: a linear rise over warmup_iters, then constant or a cosine to 0 at max_iters."""
    if i < config['warmup_iters']:
        return config['lr'] * (i + 1) / config['warmup_iters']
    if config['decay'] == 'constant':
        return config['lr']
    done = (i - config['warmup_iters']) / max(1, config['max_iters'] - config['warmup_iters'])
    return config['lr'] * (1 + math.cos(math.pi * done)) / 2


def episodes_from(config, split, sizes, first, count):
    """Endless jobs (count, B): of each step's meta_batch episodes of sizes (way, shot, queries) `count` from number `first` on,
    each a pure function of the seed and its number."""
    while True:
        yield np.stack([data.episode(split, *sizes, config['seed'], number) for number in range(first, first + count)])
        first += config['meta_batch']


def cached(config, draws, jobs, first):
    """Like ClipReader.stream, from `draws`: lists of what the frozen part gave of every video, one list a draw of frames."""
    for indices in jobs:  # (E, B)
        chosen = [draws[np.random.default_rng([config['seed'], first + i]).integers(len(draws))] for i in range(len(indices))]
        rows = torch.from_numpy(indices).to(draws[0][0].device)
        yield [torch.stack([draw[i][row] for draw, row in zip(chosen, rows)]) for i in range(len(draws[0]))], indices
        first += config['meta_batch']


def on_device(batches, device):
    """The same batches on the device: on CUDA the next one is copied there while this one is computed with."""
    if torch.device(device).type == 'cpu':
        yield from batches
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


def part_of(episodes, i, size):
    """`size` episodes from number i on of a batch: of frames, or of the list of what the frozen part gave."""
    return [x[i:i + size] for x in episodes] if isinstance(episodes, list) else episodes[i:i + size]


def save(path, checkpoint):
    """torch.save, whole or not at all."""
    torch.save(checkpoint, path + '.tmp')
    os.replace(path + '.tmp', path)


def open_log(path, iteration):
    """The log, opened to append, without the lines that a resumed run is about to write again."""
    lines = []
    if iteration and os.path.exists(path):
        with open(path) as file:
            lines = [text for text in file if text.endswith('\n') and json.loads(text)['iter'] <= iteration]
    with open(path + '.tmp', 'w') as file:
        file.writelines(lines)
    os.replace(path + '.tmp', path)
    return open(path, 'a', buffering=1)


def main():
    config = load_config(sys.argv[1:])
    device, dtype = resolve_device(config)
    device = ranks.begin(device)
    rank, world = ranks.rank_of()
    cuda = torch.device(device).type == 'cuda'
    print('\n'.join(f'{key} = {value!r}' for key, value in config.items() if key != 'splits'))
    if not cuda:
        print('Training on the CPU, in float32.')
    if config['meta_batch'] % world:
        sys.exit(f'meta_batch={config["meta_batch"]} episodes cannot be shared out evenly to {world} processes.')
    if config['deterministic']:
        print('deterministic=True: the same run gives the same bits on CUDA too, and is slower.')
        os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
        torch.use_deterministic_algorithms(True)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype is not torch.float32)
    out_dir = config['out_dir']
    try:
        os.makedirs(out_dir, exist_ok=True)
        save(os.path.join(out_dir, f'writable{rank}'), {})
        os.remove(os.path.join(out_dir, f'writable{rank}'))
    except (OSError, RuntimeError) as error:
        sys.exit(f'Cannot write into out_dir={out_dir}: {error}')

    # data and model
    with ranks.rank_0_first():  # it makes or fetches what is missing
        splits, clip = data.load_splits(config), evaluation.load_clip(config)
    train, val, test = splits['train'], splits['val'], splits['test']
    way, shot, queries = data.fit_episode(config, train, config['way'], config['shot'], config['queries'])
    data.episode(train, way, shot, queries, config['seed'], 0)  # stops here if no such episode can be drawn
    data.check_test(config, test)
    model = evaluation.build(config, clip).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    print(f'{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters train beside '
          f'{sum(p.numel() for p in model.visual.parameters()) / 1e6:.2f} M frozen ones')
    needed = 3 * 12 * sum(p.numel() for p in parameters)  # best.pt, last.pt and the next one: weights and AdamW's two moments
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        sys.exit(f'out_dir={out_dir} has {free / 1e9:.2f} GB free, but the checkpoints need {needed / 1e9:.2f} GB.')
    optimizer = torch.optim.AdamW(parameters, config['lr'], betas=(0.9, 0.999), weight_decay=config['weight_decay'], fused=True)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=dtype is torch.float16)
    state = dict(iter=0, best=-1.0, loss=0.0, correct=0.0, steps=0)  # the last three: sums since the last log line

    def checkpoint():
        rng = dict(torch=torch.get_rng_state(), cuda=torch.cuda.get_rng_state(device) if cuda else None)
        return dict(state=state, model=trainable_state(model), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                    rng=rng, config=config, weights_hash=clip.weights_hash)

    last, best = os.path.join(out_dir, 'last.pt'), os.path.join(out_dir, 'best.pt')
    if config['resume']:
        saved = evaluation.load_checkpoint(last)
        changed = [key for key in FIXED if saved['config'].get(key) != config[key]]
        changed += ['max_iters'] * (config['decay'] == 'cosine' and saved['config']['max_iters'] != config['max_iters'])
        if changed:
            sys.exit(f'{last} was trained with other options: ' + ', '.join(
                f'{key}={saved["config"].get(key)!r} (now {config[key]!r})' for key in changed))
        evaluation.restore(model, clip, saved, last)
        optimizer.load_state_dict(saved['optimizer'])
        if saved['scaler']:  # it was trained in half precision too
            scaler.load_state_dict(saved['scaler'])
        state.update(saved['state'])
        torch.set_rng_state(saved['rng']['torch'])
        if cuda and saved['rng']['cuda'] is not None:
            torch.cuda.set_rng_state(saved['rng']['cuda'], device)
        print(f'resumed at step {state["iter"]}')
    elif os.path.exists(last):
        print(f'starting anew: {last} will be overwritten (--resume=True goes on from it)')
    log = open_log(os.path.join(out_dir, 'log.jsonl'), state['iter']) if rank == 0 else open(os.devnull, 'w')

    support_labels = torch.arange(way, device=device).repeat_interleave(shot)
    query_labels = torch.arange(way, device=device).repeat_interleave(queries)

    reader = data.ClipReader(config, clip.visual.image_size)
    try:
        val_videos, val_frozen = encode_frozen(model, val, reader, device, autocast)
        val_sizes = data.fit_episode(config, val_videos, min(way, len(val.classes)), 1, config['test_queries'])
        val_episodes = evaluation.draw_episodes(val_videos, *val_sizes, config['seed'], config['val_episodes'])
        needed, val_episodes = np.unique(val_episodes, return_inverse=True)  # the other videos are not encoded each time
        val_episodes = val_episodes.reshape(config['val_episodes'], -1)
        val_frozen = [x[torch.from_numpy(needed)] for x in val_frozen]
        share = config['meta_batch'] // world  # episodes of a step that are this rank's
        first = state['iter'] * config['meta_batch'] + rank * share
        jobs = episodes_from(config, train, (way, shot, queries), first, share)
        if config['cache_prefix']:
            draws = [[x.to(device) for x in encode_frozen(model, train, reader, device, autocast, draw)[1]]
                     for draw in range(config['cache_prefix'])]
            batches = cached(config, draws, jobs, first)
        else:
            batches = on_device(reader.stream(train, jobs, True, first, config['meta_batch']), device)
        forward = model
        if world > 1:
            forward = torch.nn.parallel.DistributedDataParallel(model, [device] if cuda else None, forward_sync_buffers=False)
        if config['compile'] is True or (config['compile'] == 'auto' and cuda):
            forward = torch.compile(forward)
        size = config['micro_batch'] or share

        def settle(number, numbers, indices):
            """Reads the loss, accuracy and signals of step `number` off the device, and stops at a loss that is not finite."""
            loss, accuracy, stopped = (numbers / world).tolist()
            if not math.isfinite(loss):
                sys.exit(f'The loss is {loss} at step {number}; {last} is the last good checkpoint. The videos: '
                         + ', '.join(train.videos[i].path for i in indices.flat))
            state['loss'] += loss
            state['correct'] += accuracy
            state['steps'] += 1
            return stopped > 0

        stop = []  # filled by the first Ctrl-C or SIGTERM: the step in progress ends, then the run is saved

        def on_signal(number, frame):
            stop.append(number)
            signal.signal(number, before[number])  # a second one ends the process
            print('stopping after this step', flush=True)
        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

        waited, began, unsettled, stopped = 0.0, time.perf_counter(), [], False
        while state['iter'] < config['max_iters'] and not stopped:
            now = time.perf_counter()
            episodes, indices = next(batches)
            waited += time.perf_counter() - now

            for group in optimizer.param_groups:
                group['lr'] = learning_rate(config, state['iter'])
            numbers = torch.zeros(3, device=device)  # loss, training accuracy, whether a signal came
            for i in range(0, share, size):
                part = part_of(episodes, i, size)
                weight = min(size, share - i) / share
                final = i + size >= share  # gradients of all ranks meet once a step
                with contextlib.nullcontext() if final or world == 1 else forward.no_sync():
                    with autocast:
                        features = forward(part, way * shot)  # (E, B, D)
                    scores = log_scores(features, way * shot, config['temp'])  # (E, M, N*K)
                    loss = weight * episode_loss(scores, support_labels, query_labels, config['loss'])
                    scaler.scale(loss).backward()
                right = class_scores(scores.detach(), support_labels, way).argmax(-1) == query_labels
                numbers += torch.stack([loss.detach(), weight * right.float().mean(), torch.zeros_like(loss)])
            scaler.unscale_(optimizer)
            if config['grad_clip']:
                torch.nn.utils.clip_grad_norm_(parameters, config['grad_clip'])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            numbers[2] = len(stop)
            state['iter'] += 1
            unsettled.append((state['iter'], ranks.add_up(numbers), indices))

            logs = state['iter'] % config['log_interval'] == 0
            validates = state['iter'] % config['eval_interval'] == 0 or state['iter'] == config['max_iters']
            while len(unsettled) > (cuda and not logs and not validates):  # on CUDA a step late: so it need not wait for us
                stopped = settle(*unsettled.pop(0)) or stopped
            if logs:
                steps, seconds = state['steps'], time.perf_counter() - began
                entry = dict(iter=state['iter'], loss=state['loss'] / steps, accuracy=100 * state['correct'] / steps,
                             lr=optimizer.param_groups[0]['lr'], ms_data=1000 * waited / steps,
                             ms_compute=1000 * (seconds - waited) / steps,
                             videos_per_s=indices.size * world * steps / seconds)
                print('step {iter}  loss {loss:.4f}  train accuracy {accuracy:.1f} %  {ms_data:.0f} + {ms_compute:.0f} ms '
                      '(data + compute)  {videos_per_s:.0f} videos/s'.format(**entry), flush=True)
                log.write(json.dumps(entry) + '\n')
                state.update(loss=0.0, correct=0.0, steps=0)
                waited, began = 0.0, time.perf_counter()
            if validates:
                now = time.perf_counter()
                accuracy = evaluation.validate(config, model, val_sizes[0], val_frozen, val_episodes, device, autocast)
                print(f'step {state["iter"]}  validation: {100 * accuracy:.2f} % '
                      f'({val_sizes[0]}-way 1-shot, {len(val_episodes)} episodes)', flush=True)
                if accuracy > state['best']:
                    state['best'] = float(accuracy)
                    if rank == 0:
                        save(best, checkpoint())
                if rank == 0:
                    save(last, checkpoint())
                began += time.perf_counter() - now
        if stopped:
            for step in unsettled:
                settle(*step)
            with ranks.rank_0_first():  # torchrun ends all as soon as one ends
                if rank == 0:
                    save(last, checkpoint())
            sys.exit(f'Stopped at step {state["iter"]} by a signal; --resume=True goes on from {last}.')

        for number, handler in before.items():
            signal.signal(number, handler)

        # the test split is read once, here
        with ranks.rank_0_first():  # it may still be writing best.pt
            evaluation.restore(model, clip, evaluation.load_checkpoint(best, device), best)
        encoded_test = encode_split(config, clip, model, [model], test, reader, device, autocast)
        rows, _, _ = evaluation.evaluate({**config, 'ckpt': [best]}, clip, [model], encoded_test, device, autocast)
        if rank == 0:
            pictures.curve(os.path.join(out_dir, 'log.jsonl'), os.path.join(out_dir, 'curve.png'))
            evaluation.save_json(os.path.join(out_dir, 'results.json'), rows)
        ranks.end()
    finally:
        reader.close()


if __name__ == '__main__':
    main()
