"""Weight files as other packages write them -> a state dict in OpenAI's names. Files are read, never executed.

In reading order: read_state (three kinds of files, told apart by their content), read_saved (torch.save's), read_archive
(OpenAI's TorchScript archives), read_safetensors, openai_names (other packages' parameter names).
"""

import io
import json
import math
import os
import pickle
import types
import zipfile
from collections import OrderedDict

import torch

# Tensors some files carry beside the parameters: OpenAI's archives the first four, Hugging Face's older ones the last.
NOT_PARAMETERS = ('input_resolution', 'context_length', 'vocab_size', 'attn_mask', 'position_ids')


def read_state(path):
    """A weights file of any of three kinds, told apart by its content -> dict of names and tensors as they are stored."""
    with open(path, 'rb') as file:
        start = file.read(9)
    try:
        if start[:4] == b'PK\3\4':
            with zipfile.ZipFile(path) as archive:
                if any(name.count('/') == 1 and name.endswith('/constants.pkl') for name in archive.namelist()):
                    return read_archive(archive)
        elif start[8:] == b'{':
            return read_safetensors(path)
        state = read_saved(path)
    except OSError:
        raise
    except Exception as error:
        reason = ' '.join(str(error).split())[:300]
        raise ValueError(f'{path} (it begins with {start!r}) is damaged or not CLIP weights. Expected a TorchScript archive as '
                         f'OpenAI publishes it, a state dict of torch.save, or safetensors. {type(error).__name__}: {reason}'
                         ) from error
    if isinstance(state, dict) and isinstance(state.get('state_dict'), dict):  # a checkpoint of open_clip's training
        state = state['state_dict']
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(f'{path} does not hold a state dict: expected names and tensors, found {str(state)[:60]}...')
    return {str(name): x for name, x in state.items()}


def read_saved(path):
    """What torch.save wrote, checked against its own checksums, which torch.load ignores, -> the same, on the CPU.

    OSError: it cannot be opened. ValueError: damaged or something else. What torch says then is not passed on: it advises to
    load the file in a way that runs what is in it.
    """
    damaged = None
    try:
        if zipfile.is_zipfile(path):  # as each file of today's format is
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        if not damaged:
            return torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError('it is damaged, or holds more than the tensors and plain values that torch.save writes') from error
    raise ValueError(f'it is damaged: the checksum of {damaged} in it is wrong')


STORAGES = dict(HalfStorage=torch.float16, BFloat16Storage=torch.bfloat16, FloatStorage=torch.float32,
                DoubleStorage=torch.float64, LongStorage=torch.int64, IntStorage=torch.int32, BoolStorage=torch.bool)


class ArchiveUnpickler(pickle.Unpickler):
    """Reads a TorchScript archive's data.pkl into plain values. Whatever else than data it names is refused, so nothing in
    the archive can run; modules become empty namespaces, tensors the tuple of _rebuild_tensor_v2's arguments."""

    def find_class(self, module, name):
        if module.split('.')[0] == '__torch__':
            return type('Module', (types.SimpleNamespace,), {})
        if module == 'torch' and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
            return lambda *args: args
        if (module, name) == ('collections', 'OrderedDict'):
            return OrderedDict
        if module == 'torch.jit._pickle':  # marks the type of a list
            return lambda value, *_: value
        raise pickle.UnpicklingError(f'the archive names {module}.{name}, which weights have no use for')

    def persistent_load(self, storage):
        return storage


def read_archive(archive):
    """An open TorchScript archive (zip) -> dict of names and tensors: what its modules hold, buffers included."""
    pickled = next(name for name in archive.namelist() if name.count('/') == 1 and name.endswith('/data.pkl'))
    folder = pickled.removesuffix('data.pkl')
    storages, state = {}, {}

    def visit(value, name):
        match value:
            case types.SimpleNamespace():
                for key, item in vars(value).items():
                    visit(item, f'{name}.{key}' if name else key)
            case (('storage', torch.dtype() as dtype, str() as key, _, int() as length), offset, size, stride, *_):
                if key not in storages:
                    entry = archive.getinfo(f'{folder}data/{key}')
                    if entry.file_size != length * dtype.itemsize:
                        raise ValueError(f'storage {key} holds {entry.file_size} bytes, not {length} numbers of {dtype}')
                    storages[key] = torch.frombuffer(bytearray(archive.read(entry)), dtype=dtype)
                state[name] = view(storages[key], offset, size, stride)

    visit(ArchiveUnpickler(io.BytesIO(archive.read(pickled))).load(), '')
    return state


def view(storage, offset, size, stride):
    """storage.as_strided(size, stride, offset), with every number checked first."""
    if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise ValueError(f'a tensor of size {size}, stride {stride}, offset {offset}')
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if 0 in size or last >= len(storage) or math.prod(size) > len(storage):
        raise ValueError(f'a tensor of size {size}, stride {stride}, offset {offset} in a storage of {len(storage)}')
    return storage.as_strided(size, stride, offset)


def read_safetensors(path):
    """A safetensors file -> dict of names and tensors. The format is a length, a JSON header and raw numbers: less code to
    read safely here than a package to depend on."""
    dtypes = dict(F16=torch.float16, BF16=torch.bfloat16, F32=torch.float32, F64=torch.float64, I64=torch.int64)
    state = {}
    with open(path, 'rb') as file:
        size = os.path.getsize(path)
        length = int.from_bytes(file.read(8), 'little')
        if length > size:
            raise ValueError(f'the header has {length} bytes, the file {size}')
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == '__metadata__':
                continue
            dtype, shape, (begin, end) = dtypes[entry['dtype']], entry['shape'], entry['data_offsets']
            if not 0 <= begin < end <= size - 8 - length or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f'tensor {name} of shape {shape} lies at bytes {begin} to {end} of {size - 8 - length}')
            file.seek(8 + length + begin)
            state[name] = torch.frombuffer(bytearray(file.read(end - begin)), dtype=dtype).view(shape)
    return state


HUGGING_FACE = (  # (its name or a part of it, OpenAI's), applied in this order
    ('vision_model.encoder.layers.', 'visual.transformer.resblocks.'), ('text_model.encoder.layers.', 'transformer.resblocks.'),
    ('vision_model.embeddings.class_embedding', 'visual.class_embedding'),
    ('vision_model.embeddings.patch_embedding.', 'visual.conv1.'),
    ('vision_model.embeddings.position_embedding.weight', 'visual.positional_embedding'),
    ('vision_model.pre_layrnorm.', 'visual.ln_pre.'), ('vision_model.post_layernorm.', 'visual.ln_post.'),
    ('text_model.embeddings.token_embedding.', 'token_embedding.'),
    ('text_model.embeddings.position_embedding.weight', 'positional_embedding'),
    ('text_model.final_layer_norm.', 'ln_final.'), ('visual_projection.weight', 'visual.proj'),
    ('text_projection.weight', 'text_projection'), ('.self_attn.', '.attn.'), ('.layer_norm1.', '.ln_1.'),
    ('.layer_norm2.', '.ln_2.'), ('.mlp.fc1.', '.mlp.c_fc.'), ('.mlp.fc2.', '.mlp.c_proj.'),
)


def openai_names(state):
    """A state dict in OpenAI's, open_clip's or Hugging Face's names -> in OpenAI's, without what is no parameter."""
    state = {name.removeprefix('module.'): x for name, x in state.items() if name.split('.')[-1] not in NOT_PARAMETERS}
    if 'conv1.weight' in state:  # an image tower saved alone
        state = {'visual.' + name: x for name, x in state.items()}
    if not any(name.startswith('vision_model.') for name in state):
        return state
    renamed = {}
    for name, x in state.items():
        for theirs, ours in HUGGING_FACE:
            name = name.replace(theirs, ours)
        renamed[name] = x.t() if name in ('visual.proj', 'text_projection') else x
    for name in [name for name in renamed if '.attn.q_proj.' in name]:  # q, k and v are one matrix in OpenAI's
        names = [name.replace('q_proj', part) for part in ('q_proj', 'k_proj', 'v_proj')]
        if all(part in renamed for part in names):
            renamed[name.replace('q_proj.', 'in_proj_')] = torch.cat([renamed.pop(part) for part in names])
    return renamed
