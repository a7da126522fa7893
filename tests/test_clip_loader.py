"""clip_loader.py without a network and without other CLIP packages: every file is written here."""

import contextlib
import hashlib
import http.server
import json
import os
import pickle
import re
import threading
import zipfile

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import clip_loader
from clip_loader import CLIP, Tokenizer, load_clip
from tools import fetch, weights

pytestmark = pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning', 'ignore:Detected pickle protocol')
SIZES = dict(image_size=32, patch_size=8, width=64, layers=2, embed_dim=16,
             vocab_size=514, context_length=24, text_width=64, text_layers=3)


@pytest.fixture(scope='module')
def clip():
    torch.manual_seed(0)
    return CLIP(**SIZES).eval()


@pytest.fixture
def state(clip):
    return {name: x.clone() for name, x in clip.state_dict().items()}


class Node(nn.Module):
    """A module tree that holds a state dict, for torch.jit.script; with attributes that are no parameters, as in real ones."""

    def __init__(self, state):
        super().__init__()
        self.depth, self.sizes, self.note = 3, [1, 2], 'no weights'
        for child in dict.fromkeys(name.split('.')[0] for name in state):
            below = {name[len(child) + 1:]: x for name, x in state.items() if name.startswith(child + '.')}
            if below:
                self.add_module(child, Node(below))
            else:
                self.register_buffer(child, state[child])

    def forward(self, x):
        return x


def hugging_face(state):
    """OpenAI's names -> Hugging Face's, written from the table of the two, independently of the loader."""
    plain = {'visual.class_embedding': 'vision_model.embeddings.class_embedding',
             'visual.conv1.weight': 'vision_model.embeddings.patch_embedding.weight',
             'visual.positional_embedding': 'vision_model.embeddings.position_embedding.weight',
             'token_embedding.weight': 'text_model.embeddings.token_embedding.weight',
             'positional_embedding': 'text_model.embeddings.position_embedding.weight', 'logit_scale': 'logit_scale'}
    norms = {'visual.ln_pre': 'vision_model.pre_layrnorm', 'visual.ln_post': 'vision_model.post_layernorm',
             'ln_final': 'text_model.final_layer_norm'}
    parts = {'attn.out_proj': 'self_attn.out_proj', 'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2', 'mlp.c_fc': 'mlp.fc1',
             'mlp.c_proj': 'mlp.fc2'}
    renamed = {}
    for name, x in state.items():
        stem, _, kind = name.rpartition('.')
        if name in plain:
            renamed[plain[name]] = x
        elif name in ('visual.proj', 'text_projection'):
            renamed[{'visual.proj': 'visual_projection', 'text_projection': 'text_projection'}[name] + '.weight'] = x.T
        elif stem in norms:
            renamed[f'{norms[stem]}.{kind}'] = x
        else:
            tower, i, part = re.fullmatch(r'(visual\.)?transformer\.resblocks\.(\d+)\.(.*)', name).groups()
            layer = f'{"vision" if tower else "text"}_model.encoder.layers.{i}.'
            if part.startswith('attn.in_proj_'):
                for letter, third in zip('qkv', x.chunk(3)):
                    renamed[f'{layer}self_attn.{letter}_proj.{part.removeprefix("attn.in_proj_")}'] = third
            else:
                renamed[f'{layer}{parts[part.rpartition(".")[0]]}.{kind}'] = x
    return renamed


def safetensors(state, path):
    names = {torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16', torch.int64: 'I64'}
    header, blobs, end = {'__metadata__': {'format': 'pt'}}, [], 0
    for name, x in state.items():
        blobs.append(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        header[name] = dict(dtype=names[x.dtype], shape=list(x.shape), data_offsets=[end, end := end + len(blobs[-1])])
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, 'little') + header + b''.join(blobs))


def script(state, path):
    torch.jit.script(Node(state)).save(str(path))


def trace(state, path):
    torch.jit.trace(Node(state), torch.zeros(1)).save(str(path))


def equal(clip, state):
    """The loaded CLIP holds exactly `state`, in float32."""
    loaded = clip.state_dict()
    assert loaded.keys() == state.keys()
    return all(loaded[name].dtype == torch.float32 and torch.equal(loaded[name], x.float()) for name, x in state.items())


# ---- formats

EXTRAS = dict(input_resolution=torch.tensor(32), context_length=torch.tensor(24), vocab_size=torch.tensor(514))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('names', ['openai', 'hugging face'])
@pytest.mark.parametrize('write', [script, trace, torch.save, safetensors])
def test_formats(state, tmp_path, write, names, dtype):
    state = {name: x.to(dtype) for name, x in state.items()}
    stored = {**state, **EXTRAS} if names == 'openai' else hugging_face(state)
    write(stored, tmp_path / 'anything')
    assert equal(load_clip(str(tmp_path / 'anything')), state)


@pytest.mark.parametrize('change', [
    lambda s: {name: x for name, x in s.items() if name.startswith('visual.')},
    lambda s: {name.removeprefix('visual.'): x for name, x in s.items() if name.startswith('visual.')},
    lambda s: hugging_face({name: x for name, x in s.items() if name.startswith('visual.')}),
    lambda s: {'epoch': 3, 'state_dict': {'module.' + name: x for name, x in s.items()}},
], ids=['visual.*', 'tower alone', 'hugging face tower', 'training checkpoint'])
def test_other_wrappings(state, tmp_path, change):
    torch.save(change(state), tmp_path / 'x.pt')
    clip = load_clip(str(tmp_path / 'x.pt'))
    assert equal(clip, {name: x for name, x in state.items() if name.startswith('visual.') or clip.vocab_size})
    assert (clip.vocab_size == 514) == ('epoch' in change(state))


def test_archive_of_real_layers(tmp_path):
    """PyTorch's own modules bring attributes, None and mangled class names; transposed tensors their strides."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).half().eval()
    layer.transposed = nn.Parameter(torch.randn(3, 5).half().t())
    with contextlib.suppress(AttributeError):
        torch.jit.script(layer).save(str(tmp_path / 'x.pt'))
    with zipfile.ZipFile(tmp_path / 'x.pt') as archive:
        read = weights.read_archive(archive)
    expected = layer.state_dict()
    assert expected.keys() <= read.keys() and read['transposed'].stride() == (1, 5)
    assert all(torch.equal(read[name], x) and read[name].dtype == x.dtype for name, x in expected.items())


def test_other_tensors_of_openai_archives(state, tmp_path):
    script({**state, **EXTRAS, 'visual.some_constant': torch.ones(2)}, tmp_path / 'x.pt')
    assert equal(load_clip(str(tmp_path / 'x.pt')), state)


def test_round_trip_is_exact(state):
    back = weights.openai_names(hugging_face(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], x) for name, x in state.items())


def test_loaded_clip_computes_the_same(clip, state, tmp_path):
    torch.save(state, tmp_path / 'x.pt')
    loaded = load_clip(str(tmp_path / 'x.pt'))
    images, tokens = torch.randn(2, 3, 32, 32), Tokenizer()(['a', 'b c'], 24)
    assert torch.equal(loaded.visual(images), clip.visual(images))
    assert torch.equal(loaded.encode_text(tokens), clip.encode_text(tokens))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_weights_hash(state, tmp_path):
    def hash_of(state, write):
        write(state, tmp_path / 'x')
        return load_clip(str(tmp_path / 'x')).weights_hash
    first = hash_of(state, torch.save)
    assert hash_of(hugging_face(state), safetensors) == first
    state['visual.proj'][-1, -1] += 1e-3
    assert hash_of(state, torch.save) != first


def test_random_weights(monkeypatch):
    monkeypatch.setitem(clip_loader.MODELS, 'tiny', ('', 32, 16, 64, 2, 16, 64))
    before = torch.get_rng_state()
    clip = load_clip('random:tiny')
    assert torch.equal(torch.get_rng_state(), before)
    assert clip.weights_hash == load_clip('random:tiny').weights_hash
    assert (clip.visual.image_size, clip.vocab_size, clip.context_length) == (32, 49408, 77)


# ---- what must be refused

class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def rezip(path, change):
    """Rewrites a zip file, each entry's bytes through change(name, bytes)."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def refused(path, message):
    with pytest.raises(ValueError, match=message):
        load_clip(str(path))


@pytest.mark.parametrize('payload', [
    lambda mark: pickle.dumps(Evil(mark), 2),
    lambda mark: b'c__builtin__\neval\n(V__import__("os").mkdir("%s")\ntR.' % str(mark).encode(),
    lambda mark: b'c__torch__\neval\n(V__import__("os").mkdir("%s")\ntR.' % str(mark).encode(),  # names an inert class
], ids=['reduce', 'eval', 'name'])
def test_malicious_archive(state, tmp_path, payload):
    script(state, tmp_path / 'x.pt')
    content = payload(tmp_path / 'mark')
    rezip(tmp_path / 'x.pt', lambda name, old: content if name.endswith('/data.pkl') else old)
    refused(tmp_path / 'x.pt', 'damaged or not CLIP weights')
    assert not (tmp_path / 'mark').exists()


@pytest.mark.parametrize('write', [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x)),
                                   lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False)],
                         ids=['torch', 'pickle', 'legacy'])
def test_malicious_state_dict(state, tmp_path, write):
    write({**state, 'evil': Evil(tmp_path / 'mark')}, tmp_path / 'x.pt')
    refused(tmp_path / 'x.pt', 'damaged or not CLIP weights')
    assert not (tmp_path / 'mark').exists()


def test_tampered_archive(state, tmp_path):
    path = tmp_path / 'x.pt'
    script(state, path)
    whole = path.read_bytes()
    place = whole.index(state['visual.proj'].numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
    refused(path, 'CRC')
    path.write_bytes(whole[:len(whole) // 2])
    refused(path, 'damaged')
    path.write_bytes(whole)
    rezip(path, lambda name, old: old[:-4] if name.endswith('/data/0') else old)
    refused(path, 'storage 0 holds')
    path.write_bytes(whole)
    rezip(path, lambda name, old: old[:len(old) // 2] if name.endswith('/data.pkl') else old)
    refused(path, 'damaged')


@pytest.mark.parametrize('offset, size, stride', [
    (1, (2, 3), (3, 1)), (0, (7,), (1,)), (0, (2, 3), (4, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (-2,), (1,)),
    (0, (10 ** 12,), (0,)), (0, (2, 3), (1,)), (0, (2.0,), (1,)), (0, (2 ** 63, 2), (2 ** 63, 1))])
def test_view_stays_in_its_storage(offset, size, stride):
    storage = torch.arange(6.)
    assert torch.equal(weights.view(storage, 1, (2, 2), (1, 3)), torch.tensor([[1., 4.], [2., 5.]]))
    with pytest.raises(ValueError, match='a tensor of size'):
        weights.view(storage, offset, size, stride)


@pytest.mark.parametrize('change, message', [
    (lambda raw: (2 ** 60).to_bytes(8, 'little') + raw[8:], 'the header has'),
    (lambda raw: raw[:-4], 'lies at bytes'),
    (lambda raw: raw.replace(b'"shape": [64, 16]', b'"shape": [64, 61]'), 'lies at bytes'),
    (lambda raw: raw.replace(b'"data_offsets": [0, 4096]', b'"data_offsets": [-9,4087]'), 'lies at bytes -9'),
    (lambda raw: raw.replace(b'"dtype": "F32"', b'"dtype": "X32"'), 'X32'),
], ids=['header', 'cut', 'shape', 'negative', 'dtype'])
def test_damaged_safetensors(state, tmp_path, change, message):
    safetensors({name: state[name] for name in ('visual.proj', *state)}, tmp_path / 'x')
    raw = (tmp_path / 'x').read_bytes()
    assert change(raw) != raw
    (tmp_path / 'x').write_bytes(change(raw))
    refused(tmp_path / 'x', f'damaged.*{message}')


@pytest.mark.parametrize('content', [b'', b'<!DOCTYPE html>', b'version https://git-lfs', b'PK\3\4 not really', b'\x80\4K\1.'])
def test_other_files(tmp_path, content):
    (tmp_path / 'x').write_bytes(content)
    refused(tmp_path / 'x', 'damaged or not CLIP weights. Expected a TorchScript archive')


def test_wrong_weights(state, tmp_path):
    def says(change, message):
        wrong = dict(state)
        change(wrong)
        torch.save(wrong, tmp_path / 'x.pt')
        refused(tmp_path / 'x.pt', message)
    says(lambda s: s.pop('visual.ln_pre.bias'), r'missing: visual\.ln_pre\.bias\.$')
    says(lambda s: s.update(head=torch.zeros(1)), r'unexpected: head\.$')
    says(lambda s: s.update({'ln_final.bias': torch.zeros(7)}), r'misshapen: ln_final\.bias \[7\] instead of \[64\]\.$')
    says(lambda s: s.pop('visual.proj'), r'no CLIP with a Vision Transformer: expected visual\.proj; found \d+ tensors: ')
    says(lambda s: s.pop('positional_embedding'), 'expected positional_embedding')
    says(lambda s: s.pop('token_embedding.weight'), r'unexpected: .*, and \d+ more\.$')
    says(lambda s: s.update({'visual.positional_embedding': torch.zeros(16, 64)}), '16 places')
    says(lambda s: s.update({'visual.conv1.weight': torch.zeros(1280, 3, 8, 8)}), '1280 wide')
    says(lambda s: s.clear(), 'found 0 tensors')
    torch.save(torch.zeros(3), tmp_path / 'x.pt')
    refused(tmp_path / 'x.pt', 'does not hold a state dict')


def test_hugging_face_key_without_its_query(state, tmp_path):
    wrong = hugging_face(state)
    del wrong['vision_model.encoder.layers.1.self_attn.k_proj.bias']
    torch.save(wrong, tmp_path / 'x.pt')
    refused(tmp_path / 'x.pt', r'missing: visual\.transformer\.resblocks\.1\.attn\.in_proj_bias; unexpected: .*q_proj\.bias')


def test_names_that_are_none(tmp_path):
    for name in ('ViT-B/33', str(tmp_path)):
        with pytest.raises(FileNotFoundError, match='no CLIP file.*ViT-B/32'):
            load_clip(name)
    with pytest.raises(ValueError, match='geometries'):
        load_clip('random:ViT-B/33')


# ---- the activation, the resolution

def test_activation(state, tmp_path):
    path = tmp_path / 'x.pt'
    torch.save(state, path)
    images = torch.randn(1, 3, 32, 32)
    quick, plain = (load_clip(str(path), act).visual(images) for act in ('quick_gelu', 'gelu'))
    assert not torch.allclose(quick, plain, atol=1e-4)
    assert load_clip(str(path)).act == 'quick_gelu' and torch.equal(load_clip(str(path)).visual(images), quick)
    for name, content, act in [('config.json', {'vision_config': {'hidden_act': 'gelu'}}, 'gelu'),
                               ('config.json', {'hidden_act': 'gelu'}, 'gelu'), ('config.json', ['other'], 'quick_gelu'),
                               ('open_clip_config.json', {'model_cfg': {'embed_dim': 512}}, 'gelu'),
                               ('open_clip_config.json', {'model_cfg': {'quick_gelu': True}}, 'quick_gelu')]:
        (tmp_path / name).write_text(json.dumps(content))
        assert load_clip(str(path)).act == act
    assert load_clip(str(path), 'gelu').act == 'gelu'
    with pytest.raises(ValueError, match='none of quick_gelu, gelu'):
        load_clip(str(path), 'relu')


def bicubic(signal, length):
    """Slow reference: antialiased bicubic resampling of a list, Keys' kernel with a = -1/2, half-pixel centres."""
    def kernel(x):
        x = abs(x)
        return 1.5 * x ** 3 - 2.5 * x ** 2 + 1 if x < 1 else -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2 if x < 2 else 0.0
    scale = len(signal) / length
    rows = []
    for i in range(length):
        weights = [kernel(((i + 0.5) * scale - (j + 0.5)) / max(scale, 1)) for j in range(len(signal))]
        rows.append(sum(w * x for w, x in zip(weights, signal)) / sum(weights))
    return rows


@pytest.mark.parametrize('grid', [3, 5, 9])
def test_other_resolution(grid):
    positions = torch.randn(1 + 5 * 5, 2, dtype=torch.float64)
    resized = clip_loader.resize_positions(positions, grid)
    rows = bicubic(positions[1:].view(5, 5, 2).unbind(0), grid)
    expected = torch.stack([torch.stack(bicubic(row.unbind(0), grid)) for row in rows]).view(-1, 2)
    assert torch.equal(resized[0], positions[0])
    torch.testing.assert_close(resized[1:], expected)


def test_load_at_another_resolution(state, tmp_path):
    torch.save(state, tmp_path / 'x.pt')
    clip = load_clip(str(tmp_path / 'x.pt'), image_size=48)
    assert clip.visual.image_size == 48 and clip.visual(torch.zeros(1, 3, 48, 48)).shape == (1, 16)
    assert equal(load_clip(str(tmp_path / 'x.pt'), image_size=32), state)
    with pytest.raises(ValueError, match='no multiple'):
        load_clip(str(tmp_path / 'x.pt'), image_size=50)


# ---- finding and fetching

class Server:
    """Serves `content` at /file: in ranges if asked, cut off after `cut` bytes of the first `cuts` answers."""

    def __init__(self, content, ranges=True, cut=None, cuts=1):
        self.asked, server = [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get('Range')
                server.asked.append(wanted)
                start = int(wanted[6:-1]) if wanted and ranges else 0
                if start > len(content):
                    return self.send_error(416)
                self.send_response(206 if wanted and ranges else 200)
                self.send_header('Content-Length', str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start:start + cut] if cut and len(server.asked) <= cuts else content[start:])

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}'

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


CONTENT = bytes(range(256)) * 12000  # 3 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize('ranges', [True, False])
def test_fetch_goes_on_after_a_break(tmp_path, ranges):
    path = tmp_path / 'new' / 'x.pt'
    with Server(CONTENT, ranges, cut=2_000_000) as server:
        assert fetch.fetch(server.url, str(path), SHA256) == str(path)
        assert server.asked == [None, 'bytes=2000000-']
        fetch.fetch(server.url, str(path), SHA256)  # there already: nobody is asked
        assert len(server.asked) == 2
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ['x.pt']


def test_fetch_goes_on_in_the_next_run(tmp_path):
    path = tmp_path / 'x.pt'
    with Server(CONTENT, cut=1000, cuts=1) as server:
        clip_loader_part = tmp_path / 'x.pt.part'
        with pytest.raises(OSError):
            fetch.download(server.url, str(clip_loader_part))
        assert clip_loader_part.read_bytes() == CONTENT[:1000] and not path.exists()
        fetch.fetch(server.url, str(path), SHA256)
        assert server.asked == [None, 'bytes=1000-'] and path.read_bytes() == CONTENT


def test_fetch_gives_up_when_nothing_more_arrives(tmp_path):
    with Server(CONTENT, ranges=False, cut=1000, cuts=99) as server:
        with pytest.raises(OSError, match=r'Cannot fetch x\.pt .*put it at'):
            fetch.fetch(server.url, str(tmp_path / 'x.pt'), SHA256)
        assert len(server.asked) == 2
    assert not (tmp_path / 'x.pt').exists()


def test_fetch_with_leftovers(tmp_path):
    for left in (CONTENT, CONTENT + b'more', b'wrong start'):
        (tmp_path / 'x.pt').write_bytes(b'damaged')
        (tmp_path / 'x.pt.part').write_bytes(left)
        with Server(CONTENT) as server:
            if left == b'wrong start':
                with pytest.raises(ValueError, match='removed'):
                    fetch.fetch(server.url, str(tmp_path / 'x.pt'), SHA256)
                assert os.listdir(tmp_path) == ['x.pt'] and (tmp_path / 'x.pt').read_bytes() == b'damaged'
            fetch.fetch(server.url, str(tmp_path / 'x.pt'), SHA256)
        assert (tmp_path / 'x.pt').read_bytes() == CONTENT and os.listdir(tmp_path) == ['x.pt']


def test_wrong_content_is_removed(tmp_path):
    with Server(b'a login page') as server, pytest.raises(ValueError, match='not the file with SHA-256'):
        fetch.fetch(server.url, str(tmp_path / 'x.pt'), SHA256)
    assert os.listdir(tmp_path) == []


def test_names_are_fetched_once(state, tmp_path, monkeypatch):
    torch.save(state, tmp_path / 'tiny.pt')
    content = (tmp_path / 'tiny.pt').read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(clip_loader.MODELS, 'ViT-L/14@336px', (sha256,))
    monkeypatch.setenv('CLIP_CACHE', str(tmp_path / 'cache'))
    with Server(content) as server:
        monkeypatch.setattr(clip_loader, 'ADDRESS', server.url)
        for _ in range(2):
            assert equal(load_clip('ViT-L/14@336px'), state)
        assert len(server.asked) == 1
    assert os.listdir(tmp_path / 'cache') == ['ViT-L-14-336px.pt']


def test_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv('CLIP_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(clip_loader, 'ADDRESS', 'http://127.0.0.1:9')
    with pytest.raises(OSError) as error:
        load_clip('ViT-B/16')
    assert f'put it at {tmp_path}/cache/ViT-B-16.pt' in str(error.value)
    assert f'http://127.0.0.1:9/{clip_loader.MODELS["ViT-B/16"][0]}/ViT-B-16.pt' in str(error.value)
    assert os.listdir(tmp_path / 'cache') == []


def test_merges(tmp_path, monkeypatch):
    """An installed package's copy if its digest is right, else the cache's, else fetched."""
    file = 'bpe_simple_vocab_16e6.txt.gz'
    (tmp_path / 'clip').mkdir()
    (tmp_path / 'clip' / file).write_bytes(CONTENT)
    source = tmp_path / 'source'
    source.write_bytes(CONTENT)
    monkeypatch.setenv('CLIP_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(clip_loader.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(clip_loader, 'MERGES', (source.as_uri(), SHA256))
    assert clip_loader.find_merges() == str(tmp_path / 'cache' / file)
    spec = type('Spec', (), dict(submodule_search_locations=[str(tmp_path / 'clip')]))
    monkeypatch.setattr(clip_loader.importlib.util, 'find_spec', lambda name: spec if name == 'clip' else None)
    assert clip_loader.find_merges() == str(tmp_path / 'clip' / file)
    (tmp_path / 'clip' / file).write_bytes(b'another')
    assert clip_loader.find_merges() == str(tmp_path / 'cache' / file)


# ---- text

def test_byte_tokens():
    tokens = Tokenizer()(['A  b', "it's", ''], 8)
    a, b, i, t, quote, s = (ord(char) - ord('!') for char in "abit's")
    assert tokens.tolist() == [[512, a + 256, b + 256, 513, 0, 0, 0, 0],
                               [512, i, t + 256, quote, s + 256, 513, 0, 0],
                               [512, 513, 0, 0, 0, 0, 0, 0]]
    assert tokens.dtype == torch.int64


def test_merges_are_applied_in_their_order():
    tokenizer = Tokenizer([('a', 'b'), ('b', 'c</w>'), ('ab', 'c</w>'), ('ab', 'ab')])
    ids = tokenizer.ids
    assert tokenizer.encode('abc bc ababc abab') == [
        ids[part] for part in ('abc</w>', 'bc</w>', 'ab', 'abc</w>', 'ab', 'a', 'b</w>')]
    assert tokenizer.vocab_size == 518 and tokenizer([''], 3).tolist() == [[516, 517, 0]]


def test_too_long():
    tokenizer = Tokenizer()
    assert tokenizer(['x' * 5], 7).tolist() == [[512, *[87] * 4, 343, 513]]
    with pytest.raises(ValueError, match='8 tokens, longer than 7'):
        tokenizer(['x' * 6], 7)
    assert tokenizer(['x' * 60], 7, truncate=True).tolist() == [[512, *[87] * 5, 513]]


BYTES, BYTE_OF_ID = Tokenizer(), list(clip_loader.byte_alphabet())


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_byte_tokens_lose_nothing(text):
    assume('oftext' not in text.lower())  # hypothesis picks the two special tokens from our sources
    ids = BYTES.encode(text)
    decoded = bytes(BYTE_OF_ID[i % 256] for i in ids).decode()
    assert decoded == ''.join(BYTES.words.findall(clip_loader.clean(text)))
    assert sum(i >= 256 for i in ids) == len(BYTES.words.findall(clip_loader.clean(text)))  # the last byte of each word


@pytest.mark.parametrize('name, words', [
    ('ApplyEyeMakeup', 'Apply Eye Makeup'), ('brush_hair', 'brush hair'), ('TVShow', 'TV Show'), ('HTML5Video', 'HTML5 Video'),
    ('Moving [something] up', 'Moving something up'), ('playing  drums', 'playing drums'), ('pass (in game)', 'pass (in game)'),
    ('A[b]', 'Ab'), ('__x__', 'x'), ('été_Long', 'été Long')])
def test_readable(name, words):
    assert clip_loader.readable(name) == words


def test_texts_of_class_names(clip):
    tokenizer = clip_loader.tokenizer_of(clip)
    weights = clip.texts(['OneTwo', 'b'], ['a {}', '{}!'])
    texts = clip.encode_text(tokenizer(['a One Two', 'One Two!', 'a b', 'b!'], 24)).detach()
    expected = [[x / x.norm() for x in pair] for pair in (texts[:2], texts[2:])]
    expected = torch.stack([(x + y) / (x + y).norm() for x, y in expected])
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad and torch.equal(clip.texts(['b', 'OneTwo'], ['a {}', '{}!']), weights.flip(0))
    with pytest.raises(ValueError, match='needs {}'):
        clip.texts(['a'], ['a video'])
    with pytest.raises(ValueError, match='longer than 24'):
        clip.texts(['a' * 40], ['{}'])
    with pytest.raises(ValueError, match='image tower alone'):
        CLIP(32, 16, 64, 1, 16).texts(['a'], ['{}'])


def test_text_is_causal(clip):
    """What stands after the end of a text does not change its features."""
    tokens = Tokenizer()(['a b'], 24)
    other = tokens.clone()
    other[0, 5:] = 7
    assert torch.equal(clip.encode_text(tokens), clip.encode_text(other))
    other[0, 1] = 7
    assert not torch.allclose(clip.encode_text(tokens), clip.encode_text(other), atol=1e-3)
