"""What a script says of its options, where it cannot go on saying it, or cannot go on at all."""

import contextlib
import errno
import re
import sys

NO_FAULTS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT)  # of the program


def begin():
    """What every script with options does first: it says its last words in a sentence, prints file names that are no UTF-8 as
    they are, and goes on where nobody reads any more."""
    sys.excepthook = in_a_sentence
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='surrogateescape')
    if not isinstance(sys.stdout, Lasting):
        sys.stdout = Lasting(sys.stdout)


def in_a_sentence(kind, error, trace):
    """What Python does with an error that ends a script: Ctrl-C and what cannot be written need no traceback."""
    if kind is KeyboardInterrupt:
        print('Stopped by Ctrl-C.', file=sys.stderr)
    elif getattr(error, 'errno', None) in NO_FAULTS:
        print(f'Cannot write {error.filename or "what was to be written"}: {error.strerror}.', file=sys.stderr)
    elif kind.__name__ == 'OutOfMemoryError':
        print(f'{error}\nThe GPU has too little memory: --micro_batch=1 and --recompute=True (of VBA) take less of '
              'it; `python tools/bench.py memory` counts how much.', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def print_options(title, section, file):
    """A section's options as they stand in a file, with their comments."""
    if not section:
        return
    with open(file, encoding='utf-8') as source:
        comments = dict(re.findall(r'^ +(\w+)=.*?,  +# (.*)$', source.read(), re.M))
    print(f'\nOptions, {title}:')
    for key, value in section.items():
        print(f'  --{key + "=" + str(value):26} {comments.get(key, "")}')


class Lasting:
    """Standard output that goes on where its reader has gone (`| head`): what is to be saved is saved all the same."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(BrokenPipeError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(BrokenPipeError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)
