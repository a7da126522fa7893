"""What is made or fetched once: data that a script of ours makes; files from the network, verified by SHA-256, taken up again
where a connection broke."""

import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

from tqdm import tqdm


def prepare(config):
    """Makes the data where the config names a script for it (the demo), whole or not at all; else says what to fetch."""
    root, script = config['data_root'].rstrip('/'), config['prepare']
    if not script:
        sys.exit(f'There is no folder {root}.\n' + (config['fetch'] or 'Set data_root to the folder that holds the videos.'))
    print(f'{root} is not there: running {script} to make it.', flush=True)
    part = root + '.part'
    shutil.rmtree(part, ignore_errors=True)
    path, *options = script.split(' --')
    if subprocess.run([sys.executable, path, '--out', part, *(f'--{option}' for option in options)]).returncode:
        sys.exit(f'{script} failed, so there is no data in {root}: see its message above.')
    os.replace(part, root)


def sha256_of(path):
    """The SHA-256 of a file in hexadecimal, None if there is none."""
    if not os.path.isfile(path):
        return None
    with open(path, 'rb') as file:
        return digest_of(file).hexdigest()


def digest_of(file):
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def fetch(url, path, sha256):
    """Makes sure that `path` holds the file with this SHA-256, downloading it if it does not, and returns path.

    What is loading lies at path + '.part', is moved when its digest is right and removed when it is wrong. A connection that
    breaks is taken up where it stopped as long as something arrives, then by the next run.
    """
    if (found := sha256_of(path)) == sha256:
        return path
    if found:
        print(f'{path} is damaged or another file (SHA-256 {found[:12]}..., not {sha256[:12]}...): fetching it anew.')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + '.part'
    while True:
        had = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            digest = download(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            if had and getattr(error, 'code', None) == 416:  # the part is longer than the file
                os.remove(part)
            elif not os.path.exists(part) or os.path.getsize(part) <= had:
                raise ConnectionError(f'Cannot fetch {os.path.basename(path)} ({error}). Without a network, get {url} '
                                      f'elsewhere and put it at {path}.') from error
    if digest != sha256:
        os.remove(part)
        raise ValueError(f'What came from {url} is not the file with SHA-256 {sha256}; it was removed.')
    os.replace(part, path)
    return path


def download(url, part):
    """Appends to `part` what it lacks of the file at url and returns the SHA-256 of the whole; OSError if the line breaks."""
    digest, have = hashlib.sha256(), 0
    if os.path.exists(part):
        with open(part, 'rb') as file:
            digest, have = digest_of(file), file.tell()
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        if response.status != 206:  # this server knows no ranges and sends the whole
            digest, have = hashlib.sha256(), 0
        total = have + int(response.headers.get('Content-Length') or 0)
        with open(part, 'ab' if have else 'wb') as file, tqdm(desc=os.path.basename(part)[:-5], initial=have, total=total,
                                                              unit='B', unit_scale=True, disable=None) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
                have += len(block)
    if have < total:
        raise ConnectionError(f'the connection broke after {have} of {total} bytes; a new run goes on from there')
    return digest.hexdigest()
