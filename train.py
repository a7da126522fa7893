"""Trains the adapters and the aggregator beside a frozen CLIP, episode by episode, then tests the best checkpoint.

    python train.py sample_configs/moving_shapes.py
    python train.py sample_configs/diving48.py --data_root=/data/diving48/clips --lr=1e-5
    python train.py sample_configs/diving48.py --resume=True

Writes into out_dir: log.jsonl, last.pt (to go on from), best.pt (best on the validation classes), results.json (the test).
"""

import json
import math
import os
import signal
import sys
import time

import numpy as np
import torch

import data
import eval as evaluation
import pictures
from config import load_config, resolve_device
from model import class_scores, episode_loss, log_scores, trainable_state

# options that a resumed run shares with the run it goes on from
FIXED = (*evaluation.MODEL_OPTIONS, 'dataset', 'splits', 'augment', 'flip', 'cache_frames', 'cache_prefix', 'loss', 'way',
         'shot', 'queries', 'meta_batch', 'lr', 'weight_decay', 'warmup_iters', 'decay', 'grad_clip', 'val_episodes', 'seed')


def learning_rate(config, i):
    """The rate of step i: a linear rise over warmup_iters, then constant or a cosine to 0 at max_iters."""
    if i < config['warmup_iters']:
        return config['lr'] * (i + 1) / config['warmup_iters']
    if config['decay'] == 'constant':
        return config['lr']
    done = (i - config['warmup_iters']) / max(1, config['max_iters'] - config['warmup_iters'])
    return config['lr'] * (1 + math.cos(math.pi * done)) / 2


def episodes_from(config, split, sizes, first):
    """Endless jobs (meta_batch, B) of sizes (way, shot, queries) from step `first` on, each a pure function of the seed."""
    size = config['meta_batch']
    while True:
        yield np.stack([data.episode(split, *sizes, config['seed'], number)
                        for number in range(first * size, (first + 1) * size)])
        first += 1


def cached(config, draws, jobs, first):
    """Like ClipReader.stream, from `draws`: lists of what the frozen part gave of every video, one list a draw of frames."""
    for number, indices in enumerate(jobs, first):
        draw = np.random.default_rng([config['seed'], number]).integers(len(draws))
        yield [x[torch.from_numpy(indices)].float() for x in draws[draw]], indices


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
    print('\n'.join(f'{key} = {value!r}' for key, value in config.items() if key != 'splits'))
    device, dtype = resolve_device(config)
    cuda = torch.device(device).type == 'cuda'
    if not cuda:
        print('No CUDA: training on the CPU in float32, without compile.')
    torch.set_float32_matmul_precision('high')
    if config['deterministic']:
        os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
        torch.use_deterministic_algorithms(True)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype is not torch.float32)
    out_dir = config['out_dir']
    try:
        os.makedirs(out_dir, exist_ok=True)
        save(os.path.join(out_dir, 'writable'), {})
        os.remove(os.path.join(out_dir, 'writable'))
    except (OSError, RuntimeError) as error:
        sys.exit(f'Cannot write into out_dir={out_dir}: {error}')

    # data and model
    splits = data.load_splits(config)
    train, val, test = splits['train'], splits['val'], splits['test']
    way, shot, queries = data.fit_episode(config, train, config['way'], config['shot'], config['queries'])
    data.episode(train, way, shot, queries, config['seed'], 0)  # stops here if no such episode can be drawn
    clip = evaluation.load_clip(config)
    model = evaluation.build(config, clip).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    print(f'{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters train beside '
          f'{sum(p.numel() for p in model.visual.parameters()) / 1e6:.2f} M frozen ones')
    optimizer = torch.optim.AdamW(parameters, config['lr'], betas=(0.9, 0.999), weight_decay=config['weight_decay'], fused=cuda)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    state = dict(iter=0, best=-1.0, loss=0.0, correct=0.0, steps=0)  # the last three: sums since the last log line

    def checkpoint():
        rng = dict(torch=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if cuda else [])
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
        scaler.load_state_dict(saved['scaler'])
        state.update(saved['state'])
        torch.set_rng_state(saved['rng']['torch'])
        if cuda:
            torch.cuda.set_rng_state_all(saved['rng']['cuda'])
        print(f'resumed at step {state["iter"]}')
    elif os.path.exists(last):
        print(f'starting anew: {last} will be overwritten (--resume=True goes on from it)')
    log = open_log(os.path.join(out_dir, 'log.jsonl'), state['iter'])

    support_labels = torch.arange(way, device=device).repeat_interleave(shot)
    query_labels = torch.arange(way, device=device).repeat_interleave(queries)

    stop = []  # filled by the first Ctrl-C or SIGTERM: the step in progress ends, then the run is saved; a second one kills
    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    reader = data.ClipReader(config, clip.visual.image_size)
    try:
        encoded_val = evaluation.encode_frozen(model, val, reader, device, autocast)
        val_way, _, val_queries = data.fit_episode(config, encoded_val['videos'], min(way, len(val.classes)), 1,
                                                   config['test_queries'])
        val_episodes, _ = evaluation.episode_list(encoded_val['videos'], val_way, 1, val_queries, config['seed'],
                                                  config['val_episodes'])
        jobs = episodes_from(config, train, (way, shot, queries), state['iter'])
        if config['cache_prefix']:
            draws = [evaluation.encode_frozen(model, train, reader, device, autocast, draw)['frozen']
                     for draw in range(config['cache_prefix'])]
            batches, forward = cached(config, draws, jobs, state['iter']), model.features
        else:
            batches, forward = reader.stream(train, jobs, train=True, first=state['iter']), model
        if config['compile'] is True or (config['compile'] == 'auto' and cuda):
            forward = torch.compile(forward)
        waited, began = 0.0, time.perf_counter()
        while state['iter'] < config['max_iters'] and not stop:
            now = time.perf_counter()
            inputs, indices = next(batches)  # frames (E, B, T, 3, H, W), or what the frozen part made of them
            inputs = inputs if config['cache_prefix'] else inputs.to(device, non_blocking=True)
            waited += time.perf_counter() - now

            for group in optimizer.param_groups:
                group['lr'] = learning_rate(config, state['iter'])
            with autocast:
                features = forward(inputs, way * shot)  # (E, B, D)
            scores = log_scores(features, way * shot, config['temp'])  # (E, M, N*K)
            loss = episode_loss(scores, support_labels, query_labels, config['loss'])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if config['grad_clip']:
                torch.nn.utils.clip_grad_norm_(parameters, config['grad_clip'])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            value = loss.item()
            if not math.isfinite(value):
                sys.exit(f'The loss is {value} at step {state["iter"] + 1}; {last} is the last good checkpoint. '
                         'The videos: ' + ', '.join(train.videos[i].path for i in indices.flat))

            state['iter'] += 1
            state['steps'] += 1
            state['loss'] += value
            state['correct'] += (class_scores(scores.detach(), support_labels).argmax(-1) == query_labels).float().mean().item()
            if state['iter'] % config['log_interval'] == 0:
                steps, seconds = state['steps'], time.perf_counter() - began
                entry = dict(iter=state['iter'], loss=state['loss'] / steps, accuracy=100 * state['correct'] / steps,
                             lr=optimizer.param_groups[0]['lr'], ms_data=1000 * waited / steps,
                             ms_compute=1000 * (seconds - waited) / steps, videos_per_s=indices.size * steps / seconds)
                print('step {iter}  loss {loss:.4f}  train accuracy {accuracy:.1f} %  {ms_data:.0f} + {ms_compute:.0f} ms '
                      '(data + compute)  {videos_per_s:.0f} videos/s'.format(**entry), flush=True)
                log.write(json.dumps(entry) + '\n')
                state.update(loss=0.0, correct=0.0, steps=0)
                waited, began = 0.0, time.perf_counter()
            if state['iter'] % config['eval_interval'] == 0 or state['iter'] == config['max_iters']:
                now = time.perf_counter()
                accuracy = evaluation.validate(config, model, encoded_val, val_episodes, device, autocast)
                print(f'step {state["iter"]}  validation: {100 * accuracy:.2f} % '
                      f'({val_way}-way 1-shot, {len(val_episodes)} episodes)', flush=True)
                if accuracy > state['best']:
                    state['best'] = float(accuracy)
                    save(best, checkpoint())
                save(last, checkpoint())
                began += time.perf_counter() - now
        if stop:
            save(last, checkpoint())
            sys.exit(f'Stopped at step {state["iter"]} by {signal.Signals(stop[0]).name}; --resume=True goes on from {last}.')

        # the test split is read once, here
        if not os.path.exists(best):
            return
        evaluation.restore(model, clip, evaluation.load_checkpoint(best, device), best)
        encoded_test = evaluation.encode_split(config, clip, model, test, reader, device, autocast)
        rows, _ = evaluation.evaluate(config, clip, model, encoded_test, device, autocast)
        pictures.curve(os.path.join(out_dir, 'log.jsonl'), os.path.join(out_dir, 'curve.png'))
        evaluation.save_rows(rows, os.path.join(out_dir, 'results.json'))
    finally:
        reader.close()


if __name__ == '__main__':
    main()
