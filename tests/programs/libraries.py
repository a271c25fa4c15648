"""Other libraries: the kernels neither use nor disturb their OpenMP threads."""

from __future__ import annotations

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

for library in sys.argv[2:]:  # in this order, before anything else is imported
    importlib.import_module(library)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.cluster import KMeans  # noqa: E402

from programs.common import in_child, in_thread, main, seconds, threads, train  # noqa: E402


def beside(*order: str) -> None:
    torch.set_num_threads(3)
    points = np.random.default_rng(1).standard_normal((4000, 8))
    matrix = torch.ones(300, 300)

    def by_sklearn() -> bytes:
        fitted = KMeans(8, n_init=1, max_iter=20, random_state=1).fit(points)
        return bytes(fitted.labels_.tobytes())

    def by_torch() -> tuple[float, float]:
        in_order = torch.sort(matrix.cumsum(0).view(-1)).values
        return (matrix @ matrix).sum().item(), in_order[-1].item()

    def by_numpy() -> float:
        return float((points.T @ points).sum())

    def ours() -> tuple[list[float], bytes]:
        before = threads()
        result = train(1, 5)
        assert threads() <= before + 1, "more than the two threads of a kernel"
        return result

    others = [by_sklearn, by_torch, by_numpy]
    expected = ours()
    theirs = [call() for call in others]
    for _ in range(3):  # in turn
        assert ours() == expected and [call() for call in others] == theirs
    before = seconds()
    ours()
    spent = sorted((s - before.get(thread, 0) for thread, s in seconds().items()), reverse=True)
    assert sum(spent[2:]) < 0.1 * sum(spent), "the pools of the others do not sleep"
    with ThreadPoolExecutor(5) as pool:  # at once
        for _ in range(3):
            training = [pool.submit(train, 1, 5) for _ in range(2)]
            futures = [pool.submit(call) for call in others]
            assert [future.result() for future in training] == [expected] * 2
            assert [future.result() for future in futures] == theirs
    by_torch()
    in_child(lambda: train(1, 5) == expected)  # PyTorch itself would hang there, also without gpt2c

    def forking_thread() -> None:
        by_torch()
        in_child(lambda: train(1, 5) == expected)

    in_thread(forking_thread)
    assert ours() == expected


if __name__ == "__main__":
    main(globals())
