"""Batches and windows: each token is a target once."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2c.text.batches import Batches, windows
from gpt2c.text.shards import read_tokens, write_tokens


def test_batches_are_shifted_by_one(tmp_path):
    write_tokens(tmp_path / "a.bin", np.arange(1000))
    x, y = Batches([read_tokens(tmp_path / "a.bin")], batch_size=3, block_size=8, seed=1).batch(5)
    assert x.shape == y.shape == (3, 8)
    assert x.dtype == y.dtype == np.int32
    assert type(x) is type(y) is np.ndarray
    assert x.flags.c_contiguous and y.flags.c_contiguous
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


def few(count: int, middle: str = "") -> str:
    """Return how a message about this number of tokens begins."""
    return f"1 token{middle} is" if count == 1 else f"{count} tokens{middle} are"


@given(N=st.integers(1, 400), B=st.integers(1, 4), T=st.integers(1, 9), seed=st.integers(0, 2**63))
def test_each_token_is_a_target_in_every_epoch(N, B, T, seed):
    tokens = np.arange(N, dtype=np.uint16)
    if N < B * T + 1:
        with pytest.raises(ValueError, match=f"^{few(N)} too few .* needs {B * T + 1}"):
            Batches([tokens], B, T, seed)
        return
    batches = Batches([tokens], B, T, seed)
    per_epoch = batches.windows_per_epoch
    targets = np.concatenate([batches.batch(step)[1] for step in range(3 * per_epoch // B + 1)])
    for epoch in range(3):
        seen = targets[epoch * per_epoch : (epoch + 1) * per_epoch]
        np.testing.assert_array_equal(np.unique(seen), np.arange(1, N))
        assert len(np.unique(seen[:, 0])) == per_epoch  # no window comes twice
    assert batches.targets_per_epoch == N - 1
    assert per_epoch * T - (N - 1) <= max(T - 1, (N - 1) // 10)  # few windows come twice


@pytest.mark.parametrize(("N", "T"), [(767, 256), (1023, 256), (60_000, 256), (1025, 16), (18, 16)])
def test_last_token_of_a_shard_is_a_target(N, T):
    tokens = np.arange(N, dtype=np.uint16)
    batches = Batches([tokens], 1, T, seed=1)
    steps = range(batches.windows_per_epoch)
    seen = np.unique(np.concatenate([batches.batch(step)[1] for step in steps]))
    np.testing.assert_array_equal(seen, np.arange(1, N))


def test_every_shard_with_a_window_is_used():
    lengths = [2000, 511, 257, 256, 1]
    shards = [np.full(N, number, np.uint16) for number, N in enumerate(lengths)]
    batches = Batches(shards, 2, 256, seed=1)
    seen = [batches.batch(step)[0] for step in range(batches.windows_per_epoch // 2)]
    assert set(np.concatenate(seen).ravel().tolist()) == {0, 1, 2}
    assert batches.left_out == 2
    assert batches.targets_per_epoch == 1999 + 510 + 256


def test_epochs_differ_in_order_and_offset():
    batches = Batches([np.arange(1000, dtype=np.uint16)], batch_size=1, block_size=16, seed=3)
    starts = np.array(
        [batches.batch(step)[0][0, 0] for step in range(20 * batches.windows_per_epoch)]
    ).reshape(20, -1)
    assert len(set(map(tuple, starts.tolist()))) == 20
    assert len({tuple(sorted(epoch)) for epoch in starts.tolist()}) > 5


def test_batch_depends_on_seed_and_step_only():
    tokens = np.arange(500, dtype=np.uint16)
    forward = Batches([tokens], 4, 10, seed=1)
    expected = [forward.batch(step)[0] for step in range(60)]
    backward = Batches([tokens], 4, 10, seed=1)
    for step in reversed(range(60)):
        np.testing.assert_array_equal(backward.batch(step)[0], expected[step])
    other = Batches([tokens], 4, 10, seed=2)
    assert any((other.batch(step)[0] != expected[step]).any() for step in range(3))


@pytest.mark.parametrize(
    ("N", "B", "T", "seed", "checksum"),
    [
        (1000, 3, 8, 1, 3518575241),
        (25, 3, 8, 5, 650623262),
        (41, 5, 8, 2**63, 3181805142),
        (5000, 4, 64, 1337, 608227338),
    ],
)
def test_order_of_older_runs_is_kept(N, B, T, seed, checksum):
    tokens = (np.arange(N) * 7919 % 65521).astype(np.uint16)
    batches = Batches([tokens], B, T, seed, order=1)
    content = b"".join(batches.batch(step)[0].tobytes() for step in range(40))
    assert zlib.crc32(content) == checksum


@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=5),
    B=st.integers(1, 4),
    T=st.integers(1, 9),
    seed=st.integers(0, 2**63),
)
def test_epoch_is_one_permutation_of_the_windows_of_all_shards(lengths, B, T, seed):
    # Shard n holds 1000 n, 1000 n + 1, ..., so a token tells where it stood.
    shards = [np.arange(1000 * n, 1000 * n + N, dtype=np.uint16) for n, N in enumerate(lengths)]
    if sum((N - 1) // T for N in lengths) < B:
        middle = f" in {len(lengths)} shards" if len(lengths) > 1 else ""
        with pytest.raises(ValueError, match=f"^{few(sum(lengths), middle)} too few"):
            Batches(shards, B, T, seed)
        return
    for order in (1, 2):
        batches = Batches(shards, B, T, seed, order)
        per_epoch = batches.windows_per_epoch
        pairs = [batches.batch(step) for step in range(2 * per_epoch // B + 1)]
        x, y = (np.concatenate([pair[i] for pair in pairs])[: 2 * per_epoch] for i in (0, 1))
        np.testing.assert_array_equal(x // 1000, np.repeat(x[:, :1] // 1000, T, 1))
        np.testing.assert_array_equal(y, x + 1)  # within one shard, targets too
        for epoch in (y[:per_epoch], y[per_epoch:]):
            for n, N in enumerate(lengths):
                seen = np.unique(epoch[epoch[:, 0] // 1000 == n])
                if order == 1:
                    if len(seen):
                        np.testing.assert_array_equal(seen, seen[0] + np.arange(len(seen)))
                    assert N - len(seen) <= 2 * T
                else:
                    whole = 1000 * n + np.arange(1, N) if N > T else []
                    np.testing.assert_array_equal(seen, whole)
        again = Batches(shards, B, T, seed, order)
        for step in (len(pairs) - 1, 0):
            np.testing.assert_array_equal(again.batch(step)[0], pairs[step][0])


def test_epoch_mixes_shards():
    shards = [np.arange(1000 * n, 1000 * n + 400, dtype=np.uint16) for n in range(3)]
    x, _ = Batches(shards, batch_size=12, block_size=8, seed=1).batch(0)
    assert set((x[:, 0] // 1000).tolist()) == {0, 1, 2}


def test_order_is_the_same_on_every_machine_and_version():
    tokens = np.arange(100, dtype=np.uint16)
    for order, starts in ((1, [83, 43, 11, 51, 59, 67]), (2, [75, 35, 3, 43, 83, 51])):
        x, _ = Batches([tokens], batch_size=6, block_size=8, seed=1337, order=order).batch(0)
        assert x[:, 0].tolist() == starts


@given(N=st.integers(0, 100), B=st.integers(1, 4), T=st.integers(1, 9))
def test_windows_cover_each_target_once(N, B, T):
    tokens = np.arange(100, 100 + N, dtype=np.uint16)
    if N < 2:
        with pytest.raises(ValueError, match=f"^{few(N)} too few"):
            windows([tokens], B, T)
        return
    batches = list(windows([tokens], B, T))
    assert all(
        array.shape == (B, T) and array.dtype == np.int32 for pair in batches for array in pair
    )
    x, y = (np.concatenate([pair[i].ravel() for pair in batches]) for i in (0, 1))
    np.testing.assert_array_equal(y[: N - 1], tokens[1:])
    np.testing.assert_array_equal(x[: N - 1], tokens[:-1])
    assert (y[N - 1 :] == -1).all()
    assert (x[N - 1 :] == 0).all()
    assert len(y) - (N - 1) < B * T


def test_windows_lie_within_one_shard():
    shards = [np.array(ids, np.uint16) for ids in ([1, 2, 3, 4, 5, 6], [9], [11, 12])]
    (x, y), (x2, y2) = windows(shards, 2, 3)
    assert x.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert y.tolist() == [[2, 3, 4], [5, 6, -1]]
    assert x2.tolist() == [[11, 0, 0], [0, 0, 0]]
    assert y2.tolist() == [[12, -1, -1], [-1, -1, -1]]
    with pytest.raises(ValueError, match="2 tokens are too few"):
        windows(shards[1:2] * 2, 2, 3)
