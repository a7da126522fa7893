"""A training's folder, which is its alone while it lasts."""

import contextlib
import os
import platform
import sys

from checkpoint import make_folder

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two trainings apart
    fcntl = None


@contextlib.contextmanager
def claimed(folder, replace):
    """Makes a folder and keeps other trainings out of it; what is then still empty is removed again. Stops where it cannot be
    written, another training is at work there, or it holds a checkpoint, unless that may be replaced."""
    new = not os.path.exists(folder)
    saved = [name for name in ('last.pt', 'best.pt') if os.path.exists(os.path.join(folder, name))]
    if saved and not replace:
        sys.exit(f'{folder} holds {saved[0]} of an earlier training: --resume=True goes on from it, --overwrite=True replaces '
                 'it, --out_dir= names another folder.')
    make_folder(folder)
    lock = open(os.path.join(folder, 'lock'), 'a+')
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with this process, however it ends
    except BlockingIOError:
        lock.seek(0)
        sys.exit(f'{folder} is in use by {lock.read()}: --out_dir= names another folder.')
    lock.truncate(0)
    print(f'process {os.getpid()} on {platform.node()}', end='', file=lock, flush=True)
    try:
        yield
    finally:
        lock.close()
        os.remove(lock.name)
        if new and not os.listdir(folder):
            os.rmdir(folder)
