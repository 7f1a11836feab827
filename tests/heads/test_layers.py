"""The shared layers against naive loops, and what must not change them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heads.layers import (
    Attention,
    NystromAttention,
    alibi_slopes,
    cells_of,
    distances,
    group_means,
    local_attention,
    morton,
    pseudo_inverse,
    rope_2d,
)

BACKENDS = ["dense", "cells", "flex"]
SHAPES = ["full", "torn", "hole", "row", "islands", "alone", "two"]

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def ragged(name: str) -> torch.Tensor:
    """(N, 2) places as tissue has them: torn, with holes, in a row, alone, far from the origin."""
    random = np.random.default_rng(5)
    full = np.stack(np.meshgrid(np.arange(23), np.arange(17)), -1).reshape(-1, 2)
    shapes = {
        "full": full,
        "torn": full[random.uniform(size=len(full)) < 0.4],
        "hole": full[((full - np.array([11, 8])) ** 2).sum(1) > 25],
        "row": np.stack([np.arange(150), np.full(150, 7)], 1),
        "islands": np.concatenate([full[:40], full[:60] + np.array([900, 4]), full[:30] + np.array([-50, 7000])]),
        "alone": np.array([[3, -5]]),
        "two": np.array([[0, 0], [500, 500]]),
    }
    places = shapes[name]
    return torch.as_tensor(places[random.permutation(len(places))])


def qkv(n: int, heads: int = 3, dim: int = 8, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(heads, n, dim, generator=generator, dtype=dtype) for _ in range(3)]


def naive_local(q, k, v, grid, radius):
    """A tile at a time, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.empty_like(q)
    for i in range(len(grid)):
        near = [j for j in range(len(grid)) if math.hypot(*(grid[i] - grid[j]).tolist()) <= radius]
        for h in range(len(q)):
            weight = torch.stack([q[h, i] @ k[h, j] for j in near]).div(math.sqrt(q.shape[-1])).softmax(0)
            out[h, i] = sum(w * v[h, j] for w, j in zip(weight, near, strict=True))
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", [1, 2.5])
def test_local_attention_is_the_naive_loop(backend, radius):
    grid = ragged("torn")[:60]
    q, k, v = qkv(len(grid))
    got = local_attention(q, k, v, grid, radius, backend)
    torch.testing.assert_close(got.double(), naive_local(q, k, v, grid, radius), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("radius", [0, 1, 3.5, 10, 40])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_flex_agrees(radius, shape):
    grid = ragged(shape)
    inputs = qkv(len(grid))
    expected = local_attention(*inputs, grid, radius, "dense")
    torch.testing.assert_close(local_attention(*inputs, grid, radius, "flex"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("radius", [0, 1, 3.5, 10, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_cells_agree_gradients_too(radius, shape):
    agree("cells", radius, shape, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has gradients of FlexAttention on a GPU only")
@pytest.mark.parametrize("backend", ["cells", "flex"])
@pytest.mark.parametrize("radius", [0, 3.5, 40])
@pytest.mark.parametrize("shape", ["torn", "islands"])
def test_the_back_ends_agree_on_a_gpu(backend, radius, shape):
    agree(backend, radius, shape, "cuda", dim=16)


def agree(backend, radius, shape, device, dim=8):
    """With the dense reference: values to 1e-5, gradients to 1e-4."""
    grid = ragged(shape).to(device)
    results = []
    for name in ("dense", backend):
        inputs = [x.to(device).requires_grad_() for x in qkv(len(grid), dim=dim)]
        out = local_attention(*inputs, grid, radius, name)
        out.square().sum().backward()
        results.append((out.detach(), *(x.grad for x in inputs)))
    (expected, *slopes), (got, *other) = results
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(other, slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_radius_nothing_is_the_values_and_radius_all_is_full_attention(backend):
    grid = ragged("torn")
    q, k, v = qkv(len(grid))
    torch.testing.assert_close(local_attention(q, k, v, grid, 0, backend), v)
    full = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(local_attention(q, k, v, grid, 1e4, backend), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_local_attention_moves_with_its_tiles(backend):
    grid = ragged("torn")
    q, k, v = qkv(len(grid))
    out = local_attention(q, k, v, grid, 3, backend)
    torch.testing.assert_close(local_attention(q, k, v, grid + torch.tensor([-1000, 77]), 3, backend), out)
    order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))
    again = local_attention(q[:, order], k[:, order], v[:, order], grid[order], 3, backend)
    torch.testing.assert_close(again, out[:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_out_of_reach_changes_no_bit(backend):
    """For every head: the released code masks the first one only."""
    grid = ragged("full")
    q, k, v = qkv(len(grid))
    out = local_attention(q, k, v, grid, 3, backend)
    far = ((grid - grid[0]) ** 2).sum(1) > 9
    k[:, far], v[:, far] = 1e3, -1e3
    again = local_attention(q, k, v, grid, 3, backend)
    assert torch.equal(again[:, 0], out[:, 0])
    assert not torch.equal(again, out)


@pytest.mark.parametrize("radius", [0, 1, 3.5, 10])
def test_every_tile_is_in_one_cell_and_sees_all_it_may_reach(radius):
    grid = ragged("islands")
    place = grid - grid.amin(0)
    cells = cells_of(place, radius)
    assert sorted(cells.members[cells.members >= 0].tolist()) == list(range(len(grid)))
    assert cells.counts.tolist() == sorted((cells.near >= 0).sum(1).tolist())
    for members, near, count in zip(cells.members.tolist(), cells.near.tolist(), cells.counts.tolist(), strict=True):
        assert min(near[:count]) >= 0
        assert set(near[count:]) <= {-1}
        assert len(set(near[:count])) == count
        for tile in (row for row in members if row >= 0):
            reached = ((place - place[tile]) ** 2).sum(1) <= radius**2
            assert set(reached.nonzero()[:, 0].tolist()) <= set(near)


def test_tiles_on_one_place_are_all_seen():
    grid = ragged("torn").repeat(3, 1)
    inputs = qkv(len(grid))
    torch.testing.assert_close(
        local_attention(*inputs, grid, 3, "cells"), local_attention(*inputs, grid, 3, "dense"), rtol=1e-5, atol=1e-5
    )


def test_a_part_at_a_time_is_the_same(monkeypatch):
    grid = ragged("torn")
    outs = []
    for size in (1 << 30, 1):
        monkeypatch.setattr("heads.layers.CHUNK_BYTES", size)
        inputs = [x.requires_grad_() for x in qkv(len(grid))]
        out = local_attention(*inputs, grid, 2, "cells")
        out.square().sum().backward()
        outs.append((out.detach(), *(x.grad for x in inputs)))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_unknown_back_ends_and_radii_are_refused():
    grid = ragged("two")
    with pytest.raises(ValueError, match="known: auto, dense, cells, flex"):
        local_attention(*qkv(2), grid, 1, "fast")
    with pytest.raises(ValueError, match="reaches nothing"):
        local_attention(*qkv(2), grid, -1)


def test_the_rank_of_a_band_is_nearly_full():
    """The paper's argument in one dimension: N = 300, b = 5, rank at least N - b, where a low-rank product has few."""
    torch.manual_seed(0)
    q, k, _ = qkv(300, heads=1, dim=8, dtype=torch.float64)
    at = torch.arange(300)
    scores = (q[0] @ k[0].T).masked_fill((at[:, None] - at).abs() > 5, -torch.inf)
    assert torch.linalg.matrix_rank(scores.softmax(-1)) >= 295
    assert torch.linalg.matrix_rank(q[0] @ k[0].T) == 8


def test_morton_interleaves_bits():
    grid = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [2, 0], [3, 5]])
    assert morton(grid).tolist() == [0, 1, 2, 3, 4, 0b100111]


# -- RoPE and ALiBi --


def test_turned_vectors_know_differences_only():
    q, k, _ = qkv(40, dtype=torch.float64)
    grid = ragged("torn")[:40]
    scores = rope_2d(q, grid) @ rope_2d(k, grid).mT
    moved = grid + torch.tensor([12345, -678])
    torch.testing.assert_close(rope_2d(q, moved) @ rope_2d(k, moved).mT, scores)
    assert not torch.allclose(q @ k.mT, scores)
    still = torch.zeros_like(grid)
    torch.testing.assert_close(rope_2d(q, still), q)
    torch.testing.assert_close(rope_2d(q, grid).norm(dim=-1), q.norm(dim=-1))


def test_turns_by_hand():
    """d = 8: pairs 0 and 1 turn with the row by 1 and 1/100 radians, pairs 2 and 3 with the column."""
    x = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0]).repeat(2, 1)[None].double()
    turned = rope_2d(x, torch.tensor([[0, 0], [3, 2]]))[0, 1]
    angles = [2, 0.02, 3, 0.03]
    expected = torch.tensor([f(a) for a in angles for f in (math.cos, math.sin)], dtype=torch.float64)
    torch.testing.assert_close(turned, expected)
    with pytest.raises(ValueError, match="multiple of 4"):
        rope_2d(x[..., :6], torch.zeros(2, 2, dtype=torch.int64))


def test_slopes_and_distances():
    assert alibi_slopes(4).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    a, b = torch.tensor([[0, 0], [3, 4]]), torch.tensor([[0, 0], [6, 8], [3, 4]])
    assert distances(a, b).tolist() == [[0, 10, 5], [5, 5, 0]]


# -- attention that scores, Nyström --


def test_dropout_acts_on_both_branches():
    torch.manual_seed(0)
    layer, h = Attention(5, 7, dropout=0.5), torch.randn(3, 5)
    assert not torch.equal(layer(h), layer(h))
    assert torch.equal(layer.eval()(h), layer(h))


@pytest.mark.parametrize("n", [1, 2, 7, 40, 64, 65, 100])
def test_nystrom_with_a_landmark_for_each_token_is_nearly_softmax_attention(n):
    torch.manual_seed(0)
    layer = NystromAttention(16, landmarks=n, heads=2, iterations=40).double().eval()
    layer.convolution.weight.data.zero_()
    x = torch.randn(n, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, -1)).permute(1, 2, 0, 3)
    exact = layer.out(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    assert (layer(x) - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("n", [1, 2, 7, 50, 513])
def test_the_first_row_of_nystrom_is_that_of_all_rows(n):
    torch.manual_seed(0)
    layer, x = NystromAttention(16, landmarks=10, heads=2).double(), torch.randn(n, 16, dtype=torch.float64)
    mixed, row = layer.first(x)
    torch.testing.assert_close(mixed, layer(x)[0])
    assert row.shape == (n,)


def test_nystrom_holds_no_matrix_of_tiles_by_landmarks():
    layer, x = NystromAttention(32, landmarks=512, heads=2), torch.randn(4096, 32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(x).sum().backward()
    assert max(saved) <= 2 * 512 * 512  # the inverse; a softmax would be 2 × 4096 × 512


def test_more_iterations_are_nearer_to_the_inverse():
    torch.manual_seed(0)
    a = torch.randn(3, 64, 64, dtype=torch.float64).softmax(-1)
    one = torch.eye(64, dtype=torch.float64)
    errors = [float((a @ pseudo_inverse(a, n) - one).norm()) for n in (6, 12, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


def test_the_inverse_of_a_head_is_its_own():
    """The public implementation begins all of a batch with the largest scale of any."""
    torch.manual_seed(0)
    a = torch.randn(2, 9, 9).softmax(-1)
    b = torch.stack([a[0], 50 * a[1]])
    torch.testing.assert_close(pseudo_inverse(b, 6)[0], pseudo_inverse(a, 6)[0], rtol=0, atol=0)


def test_groups_by_hand_and_whatever_is_left_over():
    x = torch.arange(7.0).view(1, 7, 1)
    assert group_means(x, 3)[0, :, 0].tolist() == [1, 4, 6]  # 0 1 2, 3 4 5, 6
    assert group_means(x, 7)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert group_means(x, 100).shape == (1, 7, 1)
    assert group_means(x, 1)[0, :, 0].tolist() == [3]


def naive_nystrom(layer: NystromAttention, x: torch.Tensor) -> torch.Tensor:
    """A head at a time, with numpy's own inverse in the place of the iteration."""
    dim, n = x.shape[1] // layer.heads, len(x)
    projected = layer.qkv(x)
    outs = []
    size = -(-n // layer.landmarks)
    for h in range(layer.heads):
        q, k, v = (projected[:, i * x.shape[1] + h * dim :][:, :dim] for i in range(3))
        q = q / math.sqrt(dim)
        few_q, few_k = (torch.stack([part.mean(0) for part in t.split(size)]) for t in (q, k))
        middle = torch.linalg.pinv((few_q @ few_k.T).softmax(-1))
        out = (q @ few_k.T).softmax(-1) @ middle @ (few_q @ k.T).softmax(-1) @ v
        taps = layer.convolution.weight[h, 0]
        for i in range(n):
            for t in range(33):
                if 0 <= i + t - 16 < n:
                    out[i] = out[i] + taps[t] * v[i + t - 16]
        outs.append(out)
    return layer.out(torch.cat(outs, dim=1))


@pytest.mark.parametrize("n", [5, 23, 24, 25])
@torch.no_grad()
def test_nystrom_is_the_naive_loop(n):
    torch.manual_seed(1)
    layer = NystromAttention(12, landmarks=6, heads=3, iterations=60).double().eval()
    x = torch.randn(n, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive_nystrom(layer, x), rtol=1e-5, atol=1e-5)
