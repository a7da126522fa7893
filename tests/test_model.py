"""The network against independent statements of the same thing: nn.MultiheadAttention, a literal transcription of the thesis's
equations, invariances, and losses worked out by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import (
    CHUNK,
    MLP,
    NORMS,
    VBA,
    Attention,
    Episode,
    Step,
    TemporalAdapter,
    ViT,
    bring,
    class_scores,
    cosine,
    cross_entropy,
    inductive_mask,
    look,
    pairwise_loss,
    trainable_state,
)

WAY, SHOT, QUERIES, T = 3, 2, 2, 4
S, B = WAY * SHOT, WAY * (SHOT + QUERIES)
CONFIG = VBA.options | dict(levels=3, frames=T, temp=10.0)


def fresh(seed=0, **options):
    """A tiny VBA as built, and the tower beside it."""
    torch.manual_seed(seed)
    visual = ViT(32, 16, 128, 5, 32).requires_grad_(False)
    return VBA(SimpleNamespace(visual=visual), [], CONFIG | options).eval(), visual


def shaken(seed=0, **options):
    """A tiny VBA whose zero-initialised parts are not zero, as after training, and the tower beside it."""
    model, visual = fresh(seed, **options)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, visual


def episode(episodes=1, n_support=S, joint=True):
    """Episodes as in training: WAY ways, supports class by class; of n_support videos other than that, one way."""
    labels = torch.arange(WAY).repeat_interleave(SHOT) if n_support == S else torch.zeros(n_support, dtype=torch.int64)
    answers = torch.arange(WAY).repeat_interleave(QUERIES).expand(episodes, -1)
    return Episode(labels, torch.arange(WAY).expand(episodes, -1), ['a', 'b', 'c'], joint, answers)


def features(model, visual, frames, n_support=S, joint=True):
    """Frames (E, B, T, 3, H, W) -> Q_S (E, B, D)."""
    kept = model.video(*bring(look(visual, frames.flatten(0, 1), model.sees), 'cpu'))
    return model.features(kept, episode(len(frames), n_support, joint))


def trainable_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def clips(*shape, seed=1):
    return torch.randint(0, 256, (*shape, T, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def encoded(model, visual, frames):
    """Frames (V, T, 3, H, W) -> A, S tensors (V, T, L, D)."""
    return model.kept(look(visual, frames, model.sees))


def normalised(frames):
    mean, std = torch.tensor(NORMS['clip']).view(2, 3, 1, 1)
    return (frames / 255 - mean) / std


@pytest.mark.parametrize('adapter', [True, False])
def test_fresh_model_keeps_clips_features_exactly(adapter):
    (model, visual), frames = fresh(temporal_adapter=adapter), clips(2)
    kept = encoded(model, visual, frames)
    x = visual.embed(normalised(frames.flatten(0, 1)))
    for i, block in enumerate(visual.transformer.resblocks):
        x = block(x)
        if i >= 2:
            assert torch.equal(kept[i - 2], x[:, 1:].unflatten(0, (2, T)))


def test_cls_token_option_keeps_all_tokens():
    assert encoded(*fresh(cls_token=True), clips(2))[0].shape == (2, T, 5, 128)
    assert encoded(*fresh(), clips(2))[0].shape == (2, T, 4, 128)


def test_a_tower_that_is_not_deep_enough_is_refused():
    with pytest.raises(ValueError, match='levels=6.*5 blocks'):
        fresh(levels=6)


GOLDEN = json.loads(Path(__file__).with_name('golden.json').read_text())


@pytest.mark.parametrize('row', GOLDEN, ids=lambda row: '-'.join(str(v) for v in row.values() if type(v) in (str, bool)))
def test_class_scores_and_losses_are_those_of_the_code_before_methods(row):
    """Golden values: scores of a seeded model (E=2; the first episode's kept), and its losses over three steps of AdamW."""
    options = {key: row[key] for key in ('temporal_adapter', 'cross_video', 'mlp_order', 'loss')}
    (model, visual), frames, losses = shaken(**options), clips(2, B), []
    optimizer = torch.optim.AdamW(trainable_parameters(model), 1e-3, weight_decay=0.02)
    for _ in range(3):
        loss, scores = Step(model)(look(visual, frames.flatten(0, 1), model.sees), episode(2))
        if not losses:
            torch.testing.assert_close(scores[0].exp().flatten(), torch.tensor(row['scores']), rtol=1e-4, atol=1e-6)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(row['losses'], rel=1e-3)


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


def literal_vba(model, visual, frames, n_support, cross_video, mlp_order):
    """Equations 3.14-3.23 for one episode (B, T, 3, H, W), written as loops."""
    videos = len(frames)
    kept = encoded(model, visual, frames)
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
    (model, visual), frames = shaken(**options), clips(2, 5)
    found = features(model, visual, frames, 3)
    for e in range(2):
        expected = literal_vba(model, visual, frames[e], 3, cross_video, mlp_order)
        torch.testing.assert_close(found[e], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('cross_video', ['joint', 'inductive', False])
@torch.no_grad()
def test_episodes_by_index_equal_episodes_as_they_lie(cross_video):
    """As in tests: each video once, gathered into episodes, some of them in several."""
    (model, visual), frames = shaken(cross_video=cross_video), clips(B + 2)
    index = torch.stack([torch.randperm(B + 2, generator=torch.Generator().manual_seed(e))[:B] for e in range(3)])
    kept = model.video(*look(visual, frames, model.sees))
    for joint in (True, False):
        found = model.scores(kept, episode(3, joint=joint)._replace(index=index))
        lying = model.video(*look(visual, frames[index.flatten()], model.sees))
        torch.testing.assert_close(found, model.scores(lying, episode(3, joint=joint)), rtol=1e-4, atol=1e-4)


def test_an_inductive_episode_is_the_inductive_model():
    """Trained joint, asked inductively: the mask alone differs."""
    (joint, visual), (inductive, _), frames = shaken(), shaken(cross_video='inductive'), clips(1, B)
    asked = features(joint, visual, frames, joint=False)
    torch.testing.assert_close(asked, features(inductive, visual, frames))
    assert not torch.allclose(asked, features(joint, visual, frames), atol=1e-3)


def test_episode_helpers_by_hand():
    ways = Episode(torch.tensor([0, 1, 1]), torch.tensor([[4, 2]]), ['a'] * 5, index=torch.tensor([[3, 0, 2, 1]]))
    x = torch.tensor([[0.0], [1], [2], [3]]).half()
    taken = ways.take(x)
    assert taken.dtype == torch.float32 and taken.flatten().tolist() == [3, 0, 2, 1]
    support, query = ways.split(taken)
    assert ways.by_class(support).flatten().tolist() == [3, 1] and query.flatten().tolist() == [1]  # unequal: 3; (0 + 2) / 2


def predictions(model, visual, frames, **options):
    kept = model.video(*look(visual, frames.flatten(0, 1), model.sees))
    return model.scores(kept, episode(len(frames), **options)).softmax(-1) / SHOT  # (3.10)


@torch.no_grad()
def test_a_class_scores_the_same_whichever_others_there_are():
    """Where no video sees another: so a threshold on the score means the same in every episode."""
    model, visual = shaken(cross_video=False)
    kept = model.video(*look(visual, clips(B), model.sees))

    def scores(ways):
        supports = torch.arange(S).view(WAY, SHOT)[ways].flatten()
        index = torch.cat([supports, torch.arange(S, B)])[None]
        labels = torch.arange(len(ways)).repeat_interleave(SHOT)
        return model.scores(kept, Episode(labels, torch.tensor([ways]), ['a', 'b', 'c'], False, index=index))

    torch.testing.assert_close(scores([2, 0]), scores([0, 1, 2])[..., [2, 0]])


@pytest.mark.parametrize('cross_video', ['joint', 'inductive', False])
@torch.no_grad()
def test_permuting_queries_permutes_scores(cross_video):
    model, frames = shaken(cross_video=cross_video), clips(1, B)
    order = torch.randperm(B - S, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat([frames[:, :S], frames[:, S:][:, order]], 1)
    torch.testing.assert_close(predictions(*model, shuffled), predictions(*model, frames)[:, order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_episodes_of_a_batch_do_not_touch_each_other():
    model, frames = shaken(), clips(3, B)
    together = features(*model, frames)
    other = frames.clone()
    other[1] = clips(1, B, seed=2)[0]
    changed = features(*model, other)
    torch.testing.assert_close(changed[[0, 2]], together[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed[1], together[1], atol=1e-2)
    torch.testing.assert_close(features(*model, frames[1:2])[0], together[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('cross_video, others_change', [('joint', True), ('inductive', False), (False, False)])
@torch.no_grad()
def test_only_joint_attention_lets_queries_see_each_other(cross_video, others_change):
    model, frames = shaken(cross_video=cross_video), clips(1, B)
    before = predictions(*model, frames)
    frames[0, -1] = clips(seed=5)
    after = predictions(*model, frames)
    assert not torch.allclose(after[0, -1], before[0, -1], atol=1e-3)
    assert torch.allclose(after[0, :-1], before[0, :-1], atol=1e-6) == (not others_change)


@torch.no_grad()
def test_reversing_time_changes_vba_and_not_the_mean_pool():
    model, frames = shaken(), clips(1, B)
    assert not torch.allclose(features(*model, frames.flip(2)), features(*model, frames), atol=1e-2)
    pooled = [look(model[1], f[0], ('image',))[0].mean(1) for f in (frames, frames.flip(2))]
    torch.testing.assert_close(pooled[0], pooled[1])


@pytest.mark.parametrize('adapter', [True, False])
def test_only_what_should_train_gets_a_gradient(adapter):
    model, visual = shaken(temporal_adapter=adapter)
    loss, _ = Step(model)(look(visual, clips(B), model.sees), episode())
    loss.backward()
    assert all(p.grad is None for p in [*visual.parameters(), *(p for block in model.blocks for p in block.parameters())])
    without = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not without
    assert bool(model.adapters) == adapter
    assert not any(name.startswith(('visual.', 'blocks.')) for name in trainable_state(model))
    if not adapter:
        assert not encoded(model, visual, clips(1))[0].requires_grad


def test_chunks_of_the_frozen_tower_change_nothing():
    (_, visual), frames = fresh(), clips(20)  # 80 images: four chunks
    x = visual.embed(normalised(frames.flatten(0, 1)))
    expected = [x]
    for block in visual.transformer.resblocks:
        x = block(x)
        expected.append(x)
    pixels, image, two, none, five = look(visual, frames, ('pixels', 'image', 2, 0, 5))
    assert torch.equal(pixels, frames)
    torch.testing.assert_close(image.flatten(0, 1), visual(normalised(frames.flatten(0, 1))), rtol=1e-4, atol=1e-5)
    for found, m in ((two, 2), (none, 0), (five, 5)):
        torch.testing.assert_close(found.flatten(0, 1), expected[m], rtol=1e-4, atol=1e-5)


def test_looking_goes_no_deeper_than_asked():
    (_, visual), ran = fresh(), []
    for m, block in enumerate(visual.transformer.resblocks):
        block.register_forward_hook(lambda *args, m=m: ran.append(m))
    look(visual, clips(1), (2,))
    assert ran == [0, 1]
    look(visual, clips(1), ('pixels',))
    assert ran == [0, 1]


def test_inductive_mask():
    assert inductive_mask(4, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def two_ways(labels, answers):
    return Episode(torch.tensor(labels), torch.tensor([[0, 1]]), ['a', 'b'], answers=torch.tensor([answers]))


def test_scores_by_hand():
    # supports along x, y and (3, 4)/5; the query along x: cosines 1, 0, 0.6; Temp 2
    support, query = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [3.0, 4.0]]]), torch.tensor([[[7.0, 0.0]]])
    weights = [math.exp(2 * 1), math.exp(0), math.exp(2 * 0.6)]
    expected = torch.tensor([w / sum(weights) for w in weights])
    log_score = (2.0 * cosine(query, support)).log_softmax(-1)
    torch.testing.assert_close(log_score[0, 0].exp(), expected)
    unequal = class_scores(log_score, two_ways([0, 1, 1], [0]))  # class 1 has two supports: their mean
    torch.testing.assert_close(unequal[0, 0].exp(), torch.stack([expected[0], (expected[1] + expected[2]) / 2]))


def test_losses_by_hand():
    p = torch.tensor([[[0.5, 0.2, 0.2, 0.1]]])  # one query of class 0; supports of classes 0, 0, 1, 1
    ways = two_ways([0, 0, 1, 1], [0])
    assert cross_entropy(class_scores(p.log(), ways), ways.answers).item() == pytest.approx(-math.log(0.7))
    by_hand = -(math.log(0.5) + math.log(0.2) + math.log(0.8) + math.log(0.9)) / 4
    assert pairwise_loss(p.log(), ways).item() == pytest.approx(by_hand)


@pytest.mark.parametrize('pairwise', [False, True])
def test_losses_stay_finite_at_temp_100(pairwise):
    support = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], requires_grad=True)  # cosines 1 and -1
    for answers in ([0, 1], [1, 0]):  # all right, all wrong
        ways = two_ways([0, 1], answers)
        log_score = (100.0 * cosine(support.detach(), support)).log_softmax(-1)
        loss = pairwise_loss(log_score, ways) if pairwise else cross_entropy(class_scores(log_score, ways), ways.answers)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, support)[0]).all()
        assert loss.item() == pytest.approx(0 if answers == [0, 1] else 200)


def test_cosines_are_float32_whatever_autocast_does():
    x, y = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(5, 8)
    with torch.autocast('cpu', torch.bfloat16):
        found = cosine(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cosine_similarity(x.float()[:, None], y, dim=-1))


def test_mlp_is_clips():
    torch.manual_seed(0)
    mlp, x = MLP(8), torch.randn(3, 8)
    h = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    expected = (h / (1 + torch.exp(-1.702 * h))) @ mlp.c_proj.weight.T + mlp.c_proj.bias
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize('adapter, recompute, half', [(True, True, True), (False, False, False)])
def test_compiles_in_one_graph_with_the_same_gradients(adapter, recompute, half):
    """fullgraph=True raises at a graph break. The backend traces forward and backward and runs them as they are."""
    torch._dynamo.reset()
    (model, visual), frames = shaken(temporal_adapter=adapter, recompute=recompute, levels=2), clips(2 * B)
    seen, results = look(visual, frames, model.sees), []
    for forward in (Step(model), torch.compile(Step(model), fullgraph=True, dynamic=False, backend='aot_eager')):
        with torch.autocast('cpu', torch.bfloat16, enabled=half):
            loss, scores = forward(seen, episode(2))
        results.append([scores.detach(), *torch.autograd.grad(loss, trainable_parameters(model))])
    if half:  # rounding is large beside the smallest gradients: all as one vector
        results = [[torch.cat([x.flatten() for x in found])] for found in results]
    for eager, compiled in zip(*results):
        assert (compiled - eager).norm() <= (2e-2 if half else 1e-4) * eager.norm()


def test_looking_compiles_in_one_graph(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setitem(CHUNK, 'cpu', 1000)  # one chunk, as on a GPU
    (_, visual), frames = fresh(), clips(3)
    compiled = torch.compile(look, fullgraph=True, dynamic=False, backend='aot_eager')
    for sees in (('image', 3), (2, 4), (3,), ('pixels', 1)):
        for x, y in zip(compiled(visual, frames, sees), look(visual, frames, sees)):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize('adapter', [True, False])
def test_tokens_stay_in_the_dtype_of_autocast(monkeypatch, adapter):
    """From the first block to the aggregator, though on CUDA norms give float32: they are most of what training keeps."""
    norm = F.layer_norm
    monkeypatch.setattr(F, 'layer_norm', lambda x, *args: norm(x.float(), *args))
    (model, visual), ran = shaken(temporal_adapter=adapter), []
    visual.transformer.resblocks[0].register_forward_pre_hook(lambda block, args: ran.append(args[0]))
    with torch.autocast('cpu', torch.bfloat16):
        seen = look(visual, clips(B), model.sees)
        brought = bring(seen, 'cpu')
        kept, (_, *later) = model.kept(brought), model.video(*brought)
        assert {x.dtype for x in [*ran, *kept, *later]} == {torch.bfloat16}
        assert model.scores(model.video(*brought), episode()).dtype == torch.float32


def test_what_waits_elsewhere_in_half_precision_comes_to_the_device():
    """As in validation on a GPU, where what CLIP shows of each video may wait in memory."""
    brought = bring([torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2, dtype=torch.uint8)], 'cpu')
    assert [x.dtype for x in brought] == [torch.float32, torch.uint8]
    with torch.autocast('cpu', torch.bfloat16):
        assert bring([torch.zeros(2, 3)], 'cpu')[0].dtype == torch.bfloat16


def test_recomputing_changes_no_gradient_and_keeps_less():
    frames, results, kept = clips(B), [], []
    for recompute in (False, True):
        (model, visual), saved = shaken(recompute=recompute), []
        seen = look(visual, frames, model.sees)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss, _ = Step(model)(seen, episode())
        results.append(torch.autograd.grad(loss, trainable_parameters(model)))
        kept.append(sum(saved))
    assert all(torch.equal(a, b) for a, b in zip(*results)) and kept[1] < 0.7 * kept[0]


@pytest.mark.cuda
def test_cuda_compiled_half_precision_is_near_the_cpu():
    frames = clips(2 * B)
    model, visual = shaken()
    _, expected = Step(model)(look(visual, frames, model.sees), episode(2))
    ways = episode(2)
    ways = ways._replace(labels=ways.labels.cuda(), classes=ways.classes.cuda(), answers=ways.answers.cuda())
    with torch.autocast('cuda', torch.float16):
        seen = look(visual.cuda(), frames.cuda(), model.sees)
        _, scores = torch.compile(Step(model.cuda()))(seen, ways)
    assert (scores.exp().cpu() - expected.exp()).abs().max() < 0.05
