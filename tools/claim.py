"""A training's folder, which is its alone while it lasts."""

import contextlib
import os
import sys

from checkpoint import make_folder

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows


@contextlib.contextmanager
def claimed(folder, resume, overwrite):
    """Makes a folder and keeps other trainings out of it; what is then still empty is removed again. Stops where it cannot be
    written, another training is at work there, or it holds a checkpoint that is neither gone on from nor to be replaced."""
    new = not os.path.exists(folder)
    make_folder(folder)
    lock = keep_out(folder)
    try:
        saved = [name for name in ('last.pt', 'best.pt') if os.path.exists(os.path.join(folder, name))]
        if saved and not resume and not overwrite:
            sys.exit(f'{folder} holds {saved[0]} of an earlier training: --resume=True goes on from it, --overwrite=True '
                     'replaces it, --out_dir= names another folder.')
        for name in saved if overwrite and not resume else ():
            os.remove(os.path.join(folder, name))
        yield
    finally:
        os.close(lock)
        if new and not os.listdir(folder):
            os.rmdir(folder)


def keep_out(folder):
    """Locks a folder while this process lives, however it ends -> the lock, to be closed. Stops where another process did."""
    in_use = f'{folder} is in use by another training: --out_dir= names another folder.'
    if fcntl is None:  # Windows locks no folder, but deletes this file with the process
        try:
            return os.open(os.path.join(folder, 'in_use'), os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        except FileExistsError:
            sys.exit(in_use)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(in_use)
    except OSError:
        pass  # a file system without locks
    return lock
