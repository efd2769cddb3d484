import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from fast_diffusers import compat, versions

ROOT = Path(compat.__file__).parents[1]

AVX2 = "fpu sse sse2 avx avx2 fma"
AVX512 = AVX2 + " avx512f avx512cd avx512bw avx512dq avx512vl"

PROBE = """
import json, logging, sys, warnings
network = []
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        network.append(event)
        raise OSError("no network")
sys.addaudithook(audit)
if "paddle-first" in sys.argv or "operator-first" in sys.argv:
    import paddle
if "operator-first" in sys.argv:
    paddle.matmul(paddle.ones([64, 64]), paddle.ones([64, 64]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fast_diffusers
import os, paddle, resource, threading
import paddle.nn.functional as F
from fast_diffusers import compat

def chained(x):
    y = paddle.permute(x, 0, 2, 1, 3).reshape([1, 3, 2, 4])
    return paddle.nn.functional.scaled_dot_product_attention_(y, y, y).reshape([-1])

threads = [compat.openmp_threads()]
worker = threading.Thread(target=lambda: threads.append(compat.openmp_threads()))
worker.start()
worker.join()
def faults():  # pages that 64 MiB take when what was just freed can be used again; sometimes it is freed a little later
    counts = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        paddle.ones([1 << 24])
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)
x = paddle.arange(24, dtype="float32").reshape([1, 2, 3, 4]) / 24
traced = paddle.jit.to_static(chained, full_graph=True)(x) if "trace" in sys.argv else chained(x)
print(json.dumps({
    "network": network,
    "threads": threads,
    "environment": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")},
    "faults": faults(),
    "root": [len(logging.getLogger().handlers), logging.getLogger().level],
    "warnings": [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)],
    "filters": [f[1].pattern for f in warnings.filters if f[1] is not None and "ccache" in f[1].pattern],
    "difference": float((traced - chained(x)).abs().max()),
}))
"""


SETTINGS = ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
GLIBC = platform.libc_ver()[0] == "glibc"


def probe(folder: Path, *arguments: str, **environment: str) -> tuple[dict, str]:
    """Import fast_diffusers in a new process without network: (what the process reports, its stderr)."""
    script = folder / "probe.py"
    script.write_text(PROBE)
    inherited = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    process = subprocess.run(
        [sys.executable, script, *arguments],
        env=inherited | {"PYTHONPATH": str(ROOT), "GLOG_minloglevel": "2"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout), process.stderr


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> tuple[dict, str]:
    return probe(tmp_path_factory.mktemp("fresh"), "trace")


def test_import_needs_no_network(fresh):
    assert fresh[0]["network"] == []


def test_import_prints_nothing_and_leaves_warning_filters_and_root_logger_alone(fresh):
    report, stderr = fresh
    assert stderr == ""
    assert report["warnings"] == report["filters"] == []
    assert report["root"] == [0, 30]


@pytest.mark.skipif(not compat._IS_X86, reason="other processors keep Paddle's one thread")
def test_every_thread_uses_all_cores_and_child_processes_choose_for_themselves(fresh):
    report, _ = fresh
    assert report["threads"] == [compat.usable_cores()] * 2
    assert report["environment"]["OMP_NUM_THREADS"] is None


def test_gemm_kernels_are_chosen_for_this_processor(fresh):
    cpuinfo = Path("/proc/cpuinfo")
    expected = compat.mkl_cpu_type(cpuinfo.read_text()) if cpuinfo.is_file() else None
    assert fresh[0]["environment"]["MKL_DEBUG_CPU_TYPE"] == expected


def test_traced_chained_calls_of_replaced_functions_end_and_are_right(fresh):
    assert fresh[0]["difference"] < 1e-6


@pytest.mark.skipif(not compat._IS_X86, reason="other processors keep Paddle's one thread")
def test_settings_of_the_user_stay(tmp_path):
    report, stderr = probe(tmp_path, OMP_NUM_THREADS="3", MKL_DEBUG_CPU_TYPE="4")
    assert report["threads"] == [3, 3]
    assert report["environment"] == {"OMP_NUM_THREADS": "3", "MKL_DEBUG_CPU_TYPE": "4"}
    assert stderr == ""


@pytest.mark.skipif(not GLIBC, reason="another malloc than glibc's")
def test_freed_memory_is_used_again_unless_the_user_set_malloc(fresh, tmp_path):
    assert fresh[0]["faults"] < 100
    report, _ = probe(tmp_path, MALLOC_MMAP_THRESHOLD_="131072")
    assert report["faults"] > 10_000


@pytest.mark.skipif(not compat._IS_X86, reason="other processors keep Paddle's one thread")
def test_paddle_may_be_imported_first(tmp_path):
    report, _ = probe(tmp_path, "paddle-first")
    assert report["threads"] == [compat.usable_cores()] * 2
    assert report["warnings"] == []


@pytest.mark.skipif(compat.usable_cores() == 1 or not compat._IS_X86, reason="one thread is all there is")
def test_operators_that_ran_first_are_reported_once(tmp_path):
    report, _ = probe(tmp_path, "operator-first")
    assert report["threads"] == [compat.usable_cores(), 1]
    assert len(report["warnings"]) == 1
    assert "Import fast_diffusers first" in report["warnings"][0]


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", AVX512, "7"),
        ("AuthenticAMD", AVX2, "5"),
        ("HygonGenuine", AVX2, "5"),
        ("AuthenticAMD", AVX2 + " avx512f", "5"),
        ("AuthenticAMD", "fpu sse sse2 avx", None),
        ("GenuineIntel", AVX512, None),
    ],
)
def test_mkl_cpu_type(vendor, flags, expected):
    assert compat.mkl_cpu_type(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\n") == expected


def test_mkl_cpu_type_of_unknown_processors():
    assert compat.mkl_cpu_type("") is None
    assert compat.mkl_cpu_type("processor : 0\nFeatures : fp asimd\nCPU implementer : 0x41\n") is None


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", None), ("100000 100000", 1), ("50000 100000", 1), ("99900000 100000", None)]
)
def test_usable_cores_respect_a_container_quota(tmp_path, quota, expected):
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert compat.usable_cores(file) == (expected or compat.usable_cores(tmp_path / "missing"))


def attention(q, k, v, mask=None, scale=None):
    """float64 [B, L, heads, dim] by definition."""
    scores = np.einsum("blhd,bshd->bhls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if mask is None else scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.fixture
def qkv() -> list[np.ndarray]:
    """[2, 5, 3, 4] and twice [2, 7, 3, 4], float64."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, length, 3, 4)) for length in (5, 7, 7)]


class TestAttention:
    def run(self, qkv, **settings):
        tensors = [paddle.to_tensor(x.astype("float32")) for x in qkv]
        return F.scaled_dot_product_attention_(*tensors, **settings).numpy()

    def test_plain(self, qkv):
        np.testing.assert_allclose(self.run(qkv), attention(*qkv), atol=1e-6)

    def test_scale(self, qkv):
        np.testing.assert_allclose(self.run(qkv, scale=0.9), attention(*qkv, scale=0.9), atol=1e-6)

    def test_added_mask(self, qkv):
        mask = np.random.default_rng(1).standard_normal((2, 3, 5, 7))
        found = self.run(qkv, attn_mask=paddle.to_tensor(mask.astype("float32")))
        np.testing.assert_allclose(found, attention(*qkv, mask=mask), atol=1e-6)

    def test_boolean_mask(self, qkv):
        keep = np.random.default_rng(2).random((2, 1, 5, 7)) < 0.5
        keep[..., 0] = True
        found = self.run(qkv, attn_mask=paddle.to_tensor(keep))
        np.testing.assert_allclose(found, attention(*qkv, mask=np.where(keep, 0, -np.inf)), atol=1e-6)

    def test_causal_ignores_the_mask(self, qkv):
        q = qkv[1]
        mask = np.where(np.tril(np.ones((7, 7))), 0, -np.inf)
        found = self.run([q, *qkv[1:]], is_causal=True, attn_mask=paddle.randn([2, 3, 7, 7]))
        np.testing.assert_allclose(found, attention(q, *qkv[1:], mask=mask), atol=1e-6)

    def test_no_dropout_outside_training(self, qkv):
        np.testing.assert_allclose(self.run(qkv, dropout_p=0.5, training=False), attention(*qkv), atol=1e-6)
        assert np.abs(self.run(qkv, dropout_p=0.5) - attention(*qkv)).max() > 0.1

    def test_gradient_reaches_all_inputs(self, qkv):
        tensors = [paddle.to_tensor(x, stop_gradient=False) for x in qkv]
        F.scaled_dot_product_attention_(*tensors).square().sum().backward()
        rng = np.random.default_rng(3)
        for which, tensor in enumerate(tensors):
            direction = rng.standard_normal(tensor.shape)

            def loss(step, which=which, direction=direction):
                moved = [x + step * direction if n == which else x for n, x in enumerate(qkv)]
                return np.square(attention(*moved)).sum()

            slope = (tensor.grad.numpy() * direction).sum()
            assert slope == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-6)


def test_swapped_middle_axes_and_their_gradient_are_those_of_a_transpose():
    x, weights = paddle.randn([2, 5, 3, 4]), paddle.randn([2, 3, 5, 4])
    results = []
    for swap in (compat.swap_middle_axes, lambda x: x.transpose([0, 2, 1, 3])):
        leaf = x.clone().detach()
        leaf.stop_gradient = False
        swapped = swap(leaf)
        (swapped * weights).sum().backward()
        results.append((swapped.numpy(), leaf.grad.numpy()))
    for ours, transposed in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, transposed)


def test_eager_on_cpu():
    eager = []

    def record(x):
        eager.append(compat.is_eager_on_cpu(x))
        return x + 1

    x = paddle.ones([2], dtype="float32")
    record(x.cpu())
    paddle.jit.to_static(record, full_graph=True)(x)
    assert eager == [True, False]


def test_import_failure_names_the_wrong_version(monkeypatch):
    monkeypatch.setattr(versions, "problems", lambda: ["numpy is 2.1.0, needs <2"])
    expected = r"AttributeError: no float_\. Likely cause: numpy is 2\.1\.0, needs <2\. Install the tested versions"
    with pytest.raises(ImportError, match=expected), compat._explained_failure():
        raise AttributeError("no float_")


def test_import_failure_with_the_right_versions_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(versions, "problems", lambda: [])
    with pytest.raises(AttributeError, match="no float_"), compat._explained_failure():
        raise AttributeError("no float_")


class Store(dict):
    set = dict.__setitem__


@pytest.fixture
def at_exit(monkeypatch):
    functions = []
    monkeypatch.setattr(compat.atexit, "register", functions.append)
    return functions


def test_rank_0_outlives_its_peers(at_exit):
    store = Store()
    compat.outlive_peers(store, "127.0.0.1", 0, 2)
    reading, writing = os.pipe()
    peer = os.fork()
    if peer == 0:
        compat.outlive_peers(store, "127.0.0.1", 1, 2)
        time.sleep(0.3)
        os.write(writing, b"last words")
        os._exit(0)
    os.close(writing)
    os.set_blocking(reading, False)
    (wait,) = at_exit
    wait()
    assert os.read(reading, 20) == b"last words"
    os.close(reading)
    os.waitpid(peer, 0)


def test_rank_0_waits_for_a_peer_that_never_came_no_longer_than_the_limit(at_exit):
    compat.outlive_peers(Store(), "127.0.0.1", 0, 2, limit=0.01)
    (wait,) = at_exit
    wait()
