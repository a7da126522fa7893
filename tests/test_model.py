"""The network against independent statements of the same thing: nn.MultiheadAttention, a literal transcription of the thesis's
equations, invariances, and losses worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import (
    MLP,
    NORMS,
    VBA,
    Attention,
    TemporalAdapter,
    ViT,
    class_scores,
    episode_loss,
    inductive_mask,
    log_scores,
    trainable_state,
)

WAY, SHOT, QUERIES, T = 3, 2, 2, 4
B = WAY * (SHOT + QUERIES)
CONFIG = dict(levels=3, temporal_adapter=True, cls_token=False, cross_video='joint', attn_proj=True, mlp_order='serial',
              alpha_init='random', frames=T, norm='clip', recompute=False, frozen_dtype='float32')


def fresh(seed=0, **options):
    """A tiny VBA as built."""
    torch.manual_seed(seed)
    return VBA(ViT(32, 16, 128, 5, 32), CONFIG | options).eval()


def shaken(seed=0, **options):
    """A tiny VBA whose zero-initialised parts are not zero, as after training."""
    model = fresh(seed, **options)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def trainable_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def clips(*shape, seed=1):
    return torch.randint(0, 256, (*shape, T, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def encoded(model, frames):
    return model.kept(model.frozen(frames)[0])


def normalised(frames):
    mean, std = torch.tensor(NORMS['clip']).view(2, 3, 1, 1)
    return (frames / 255 - mean) / std


@pytest.mark.parametrize('adapter', [True, False])
def test_fresh_model_keeps_clips_features_exactly(adapter):
    model, frames = fresh(temporal_adapter=adapter), clips(2)
    kept = encoded(model, frames)
    x = model.visual.embed(normalised(frames.flatten(0, 1)))
    for i, block in enumerate(model.visual.transformer.resblocks):
        x = block(x)
        if i >= 2:
            assert torch.equal(kept[i - 2], x[:, 1:].unflatten(0, (2, T)))


def test_cls_token_option_keeps_all_tokens():
    assert encoded(fresh(cls_token=True), clips(2))[0].shape == (2, T, 5, 128)
    assert encoded(fresh(), clips(2))[0].shape == (2, T, 4, 128)


@pytest.mark.parametrize('form, masked', [('folded', False), ('plain', False), ('plain', True)])
def test_attention_equals_multihead_attention(form, masked):
    torch.manual_seed(0)
    dim, heads, videos, tokens = 128, 2, 3, 10
    ours, theirs, ln = Attention(dim, heads).double(), nn.MultiheadAttention(dim, heads, batch_first=True).double(), \
        nn.LayerNorm(dim).double()
    for parameter in (*ours.parameters(), *ln.parameters()):
        nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    q = torch.randn(videos, dim, dtype=torch.double, requires_grad=True)
    x = torch.randn(videos, tokens, dim, dtype=torch.double, requires_grad=True)
    mask = torch.rand(videos, tokens) < 0.6 if masked else torch.ones(videos, tokens, dtype=torch.bool)
    mask[:, 0] = True

    keys = ln(x)
    if form == 'folded':
        out = ours.folded(q, F.layer_norm(x, (dim,)), ln)
    else:
        out = ours(q[:, None], keys, keys, mask[:, None, None] if masked else None)[:, 0]
    expected = theirs(q[:, None], keys, keys, key_padding_mask=~mask if masked else None)[0][:, 0]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)

    # b_k has no gradient in exact arithmetic (it cancels in the softmax), and exactly none in the folded form
    direction = torch.randn_like(out)
    inputs = [q, x, *ln.parameters()]
    for a, b in zip(torch.autograd.grad((out * direction).sum(), [*inputs, *ours.parameters()], retain_graph=True),
                    torch.autograd.grad((expected * direction).sum(), [*inputs, *theirs.parameters()])):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('rows', [3, 100])
def test_folding_by_video_equals_folding_over_copies(monkeypatch, rows):
    """However many uses of a video go at a time, and with a video that nobody uses."""
    monkeypatch.setattr('model.FOLDED_ROWS', rows)
    torch.manual_seed(0)
    attn, ln, index = Attention(128, 2), nn.LayerNorm(128), torch.tensor([3, 0, 3, 1, 0, 3, 4])
    q, x = torch.randn(7, 128), F.layer_norm(torch.randn(5, 10, 128), (128,))
    nn.init.normal_(ln.weight), nn.init.normal_(ln.bias)
    torch.testing.assert_close(attn.folded_by_video(q, x, ln, index), attn.folded(q, x[index], ln), rtol=1e-4, atol=1e-5)


def test_temporal_adapter_is_a_depthwise_convolution_over_time():
    torch.manual_seed(0)
    adapter, x = TemporalAdapter(12), torch.randn(2, T, 5, 12)
    assert torch.equal(adapter(x), torch.zeros_like(x))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    conv = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), groups=8)
    conv.weight.data = adapter.kernel.data.T.reshape(8, 1, 3, 1, 1)
    conv.bias.data = adapter.bias.data
    hidden = adapter.down(x).permute(0, 3, 1, 2).unsqueeze(-1)  # (B, C, T, L, 1)
    expected = adapter.up(conv(hidden).squeeze(-1).permute(0, 2, 3, 1))
    torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-5)


def test_adapter_has_the_parameters_of_the_thesis():
    assert sum(p.numel() for p in TemporalAdapter(768).parameters()) == 789_760


def literal_attention(attn, q, k, v, allowed):
    """Query by query, head by head, with the rows of in_proj as W_q, W_k, W_v. allowed[i]: the keys that query i may see."""
    (wq, wk, wv), (bq, bk, bv) = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = q @ wq.T + bq, k @ wk.T + bk, v @ wv.T + bv
    size = q.shape[1] // attn.heads
    rows = []
    for i in range(len(q)):
        heads = []
        for h in range(attn.heads):
            part = slice(h * size, (h + 1) * size)
            keys, values = k[allowed[i]][:, part], v[allowed[i]][:, part]
            heads.append((keys @ q[i, part] / math.sqrt(size)).softmax(0) @ values)
        rows.append(attn.out_proj(torch.cat(heads)))
    return torch.stack(rows)


def literal_vba(model, frames, n_support, cross_video, mlp_order):
    """Equations 3.14-3.23 for one episode (B, T, 3, H, W), written as loops."""
    videos = len(frames)
    kept = encoded(model, frames)
    q = model.query.expand(videos, -1)
    for a, level in zip(kept, model.levels):
        star = a + level.alpha(a) + level.beta  # (3.14)
        rows = []
        for b in range(videos):  # (3.15)-(3.19)
            tokens = level.ln_tokens(star[b].flatten(0, 1))
            everything = [list(range(len(tokens)))]
            attended = literal_attention(level.frame_attn, level.ln_frame(q[b:b + 1]), tokens, tokens, everything)[0]
            base = q[b] + attended if mlp_order == 'serial' else q[b]
            rows.append(q[b] + attended + level.frame_mlp(level.ln_frame_mlp(base)))
        q = torch.stack(rows)
        if cross_video:  # (3.20)-(3.22)
            everyone = list(range(videos))
            allowed = [[j for j in everyone if cross_video == 'joint' or j < n_support or j == i] for i in everyone]
            normal = level.ln_video(q)
            attended = literal_attention(level.video_attn, normal, normal, q, allowed)
            base = q + attended if mlp_order == 'serial' else q
            q = q + attended + level.video_mlp(level.ln_video_mlp(base))
    return q


@pytest.mark.parametrize('attn_proj', [True, False])
@pytest.mark.parametrize('mlp_order', ['serial', 'parallel'])
@pytest.mark.parametrize('cross_video', ['joint', 'inductive', False])
@torch.no_grad()
def test_aggregator_equals_the_equations(cross_video, mlp_order, attn_proj):
    options = dict(cross_video=cross_video, mlp_order=mlp_order, attn_proj=attn_proj)
    model, frames = shaken(**options), clips(2, 5)
    features = model(frames, 3)
    for e in range(2):
        expected = literal_vba(model, frames[e], 3, cross_video, mlp_order)
        torch.testing.assert_close(features[e], expected, rtol=1e-4, atol=1e-4)


def predictions(model, frames):
    labels = torch.arange(WAY).repeat_interleave(SHOT)
    return class_scores(log_scores(model(frames, WAY * SHOT), WAY * SHOT, 10), labels, WAY)


@pytest.mark.parametrize('cross_video', ['joint', 'inductive', False])
@torch.no_grad()
def test_permuting_queries_permutes_scores(cross_video):
    model, frames = shaken(cross_video=cross_video), clips(1, B)
    order = torch.randperm(B - WAY * SHOT, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat([frames[:, :WAY * SHOT], frames[:, WAY * SHOT:][:, order]], 1)
    torch.testing.assert_close(predictions(model, shuffled), predictions(model, frames)[:, order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_episodes_of_a_batch_do_not_touch_each_other():
    model, frames = shaken(), clips(3, B)
    together = model(frames, WAY * SHOT)
    other = frames.clone()
    other[1] = clips(1, B, seed=2)[0]
    changed = model(other, WAY * SHOT)
    torch.testing.assert_close(changed[[0, 2]], together[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed[1], together[1], atol=1e-2)
    torch.testing.assert_close(model(frames[1:2], WAY * SHOT)[0], together[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('cross_video, others_change', [('joint', True), ('inductive', False), (False, False)])
@torch.no_grad()
def test_only_joint_attention_lets_queries_see_each_other(cross_video, others_change):
    model, frames = shaken(cross_video=cross_video), clips(1, B)
    before = predictions(model, frames)
    frames[0, -1] = clips(seed=5)
    after = predictions(model, frames)
    assert not torch.allclose(after[0, -1], before[0, -1], atol=1e-3)
    assert torch.allclose(after[0, :-1], before[0, :-1], atol=1e-6) == (not others_change)


@torch.no_grad()
def test_reversing_time_changes_vba_and_not_the_mean_pool():
    model, frames = shaken(), clips(1, B)
    assert not torch.allclose(model(frames.flip(2), 6), model(frames, 6), atol=1e-2)
    pooled = [model.visual(normalised(f.flatten(0, 2))).unflatten(0, (B, T)).mean(1) for f in (frames, frames.flip(2))]
    torch.testing.assert_close(pooled[0], pooled[1])


@pytest.mark.parametrize('adapter', [True, False])
def test_only_what_should_train_gets_a_gradient(adapter):
    model = shaken(temporal_adapter=adapter)
    features = model(clips(1, B), WAY * SHOT)
    labels = torch.arange(WAY)
    scores = log_scores(features, WAY * SHOT, 10)
    episode_loss(scores, labels.repeat_interleave(SHOT), labels.repeat_interleave(QUERIES), 'class').backward()
    assert all(p.grad is None for p in model.visual.parameters())
    without = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not without
    assert bool(model.adapters) == adapter
    assert not any(name.startswith('visual.') for name in trainable_state(model))
    if not adapter:
        assert not encoded(model, clips(1))[0].requires_grad


def test_chunks_of_the_frozen_part_change_nothing():
    model, frames = fresh(), clips(20)  # 80 images: five chunks
    whole = model.visual.embed(normalised(frames.flatten(0, 1)))
    for block in model.visual.transformer.resblocks[:2]:
        whole = block(whole)
    (outputs,), features = model.frozen(frames, head=True)
    torch.testing.assert_close(outputs.flatten(0, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.flatten(0, 1), model.visual(normalised(frames.flatten(0, 1))), rtol=1e-4, atol=1e-5)


def test_inductive_mask():
    assert inductive_mask(4, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_scores_by_hand():
    # supports along x, y and (3, 4)/5; the query along x: cosines 1, 0, 0.6; Temp 2
    features = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [3.0, 4.0], [7.0, 0.0]]])
    weights = [math.exp(2 * 1), math.exp(0), math.exp(2 * 0.6)]
    expected = torch.tensor([w / sum(weights) for w in weights])
    log_score = log_scores(features, 3, 2.0)
    torch.testing.assert_close(log_score[0, 0].exp(), expected)
    unequal = class_scores(log_score, torch.tensor([0, 1, 1]), 2)  # class 1 has two supports: their mean
    torch.testing.assert_close(unequal[0, 0], torch.stack([expected[0], (expected[1] + expected[2]) / 2]))


def test_losses_by_hand():
    p = torch.tensor([[[0.5, 0.2, 0.2, 0.1]]])  # one query of class 0; supports of classes 0, 0, 1, 1
    support, query = torch.tensor([0, 0, 1, 1]), torch.tensor([0])
    assert episode_loss(p.log(), support, query, 'class').item() == pytest.approx(-math.log(0.7))
    by_hand = -(math.log(0.5) + math.log(0.2) + math.log(0.8) + math.log(0.9)) / 4
    assert episode_loss(p.log(), support, query, 'pairwise').item() == pytest.approx(by_hand)


@pytest.mark.parametrize('kind', ['class', 'pairwise'])
def test_losses_stay_finite_at_temp_100(kind):
    features = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], requires_grad=True)  # cosines 1 and -1
    for queries in ([0, 1], [1, 0]):  # all right, all wrong
        loss = episode_loss(log_scores(features, 2, 100.0), torch.arange(2), torch.tensor(queries), kind)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, features)[0]).all()
        assert loss.item() == pytest.approx(0 if queries == [0, 1] else 200)


def test_mlp_is_clips():
    torch.manual_seed(0)
    mlp, x = MLP(8), torch.randn(3, 8)
    h = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    expected = (h / (1 + torch.exp(-1.702 * h))) @ mlp.c_proj.weight.T + mlp.c_proj.bias
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize('adapter, recompute, half', [(True, True, True), (False, False, False)])
def test_compiles_in_one_graph_with_the_same_gradients(monkeypatch, adapter, recompute, half):
    """fullgraph=True raises at a graph break. The backend traces forward and backward and runs them as they are."""
    torch._dynamo.reset()
    monkeypatch.setattr('model.CPU_CHUNK', 1000)  # one chunk, as on a GPU
    model, frames = shaken(temporal_adapter=adapter, recompute=recompute, levels=2), clips(2, B)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, dynamic=False, backend='aot_eager')):
        with torch.autocast('cpu', torch.bfloat16, enabled=half):
            features = forward(frames, WAY * SHOT)
        results.append([features.detach(), *torch.autograd.grad(features.square().sum(), trainable_parameters(model))])
    for eager, compiled in zip(*results):
        assert (compiled - eager).norm() <= (1e-2 if half else 1e-4) * eager.norm()


@pytest.mark.parametrize('adapter', [True, False])
def test_tokens_stay_in_the_dtype_of_autocast(monkeypatch, adapter):
    """From the first block to the aggregator, though on CUDA norms give float32: they are most of what training keeps."""
    norm = F.layer_norm
    monkeypatch.setattr(F, 'layer_norm', lambda x, *args: norm(x.float(), *args))
    model, frames = shaken(temporal_adapter=adapter), clips(1, B)
    seen = []
    model.visual.transformer.resblocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    with torch.autocast('cpu', torch.bfloat16):
        frozen, _ = model.frozen(frames)
        kept = model.kept(frozen)
        assert {x.dtype for x in [*seen, *frozen, *kept, *model.tokens(kept)]} == {torch.bfloat16}
        assert model(frames, WAY * SHOT).dtype == torch.float32


@pytest.mark.parametrize('adapter', [True, False])
def test_what_is_kept_elsewhere_comes_to_the_device_of_the_model(monkeypatch, adapter):
    """As in validation on a GPU, where the frozen part of each video waits in memory."""
    monkeypatch.setattr('model.dtype_beside', lambda weight: weight.dtype)  # autocast knows no device `meta`
    model = shaken(temporal_adapter=adapter)
    frozen, _ = model.frozen(clips(2))
    assert {x.device.type for x in model.to('meta').tokens(model.kept(frozen))} == {'meta'}


def test_recomputing_changes_no_gradient_and_keeps_less():
    frames, results, kept = clips(1, B), [], []
    for recompute in (False, True):
        model, saved = shaken(recompute=recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            features = model(frames, WAY * SHOT)
        results.append(torch.autograd.grad(features.square().sum(), trainable_parameters(model)))
        kept.append(sum(saved))
    assert all(torch.equal(a, b) for a, b in zip(*results)) and kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize('adapter', [True, False])
def test_frozen_part_in_bfloat16_is_near_and_trains(adapter):
    frames = clips(1, B)
    exact, half = shaken(temporal_adapter=adapter), shaken(temporal_adapter=adapter, frozen_dtype='bfloat16')
    assert half.visual.conv1.weight.dtype == torch.bfloat16 and half.query.dtype == torch.float32
    a, b = exact(frames, WAY * SHOT), half(frames, WAY * SHOT)
    assert a.dtype == b.dtype and not torch.equal(a, b) and F.cosine_similarity(a, b, dim=-1).min() > 0.99
    assert all(g is not None for g in torch.autograd.grad(b.sum(), trainable_parameters(half)))


@pytest.mark.cuda
def test_cuda_compiled_half_precision_is_near_the_cpu():
    frames = clips(2, B)
    expected = shaken()(frames, WAY * SHOT)
    model = torch.compile(shaken().cuda())
    with torch.autocast('cuda', torch.float16):
        features = model(frames.cuda(), WAY * SHOT).float().cpu()
    assert F.cosine_similarity(features, expected, dim=-1).min() > 0.99
