"""Laws of many devices and many hosts: real processes that speak over loopback take the steps of one device with the whole batch.

The processes of the first stage start together and those of the second when it is done; each test looks at what they left.
"""
import dataclasses
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from flaxdiff.distributed import DataParallel, allreduce_bytes, several_steps, start_hosts, step_seconds
from flaxdiff.trainer import DiffusionTrainer
from flaxdiff.trainer.parallel import _in_a_cluster, count_flops, fsdp_sharding

HERE = Path(__file__).resolve().parent
LIMIT = 300  # seconds a process may take on a busy machine; an idle one needs about 30


class Group:
    "The processes of one run; used with `with`, it leaves none behind."
    def __init__(self, folder, cases, hosts=1, devices=8):
        self.folder, self.hosts = Path(folder), hosts
        self.folder.mkdir()
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {os.environ['XLA_FLAGS']}"}
        self.processes = []
        for i in range(hosts):
            job = {"out": str(self.folder / f"{i}.npz"), "cases": cases, "host": [f"localhost:{port}", hosts, i] if hosts > 1 else None}
            with open(self.folder / f"{i}.txt", "w") as log:
                self.processes.append(subprocess.Popen([sys.executable, HERE / "workers.py", json.dumps(job)], env=env, stdout=log, stderr=subprocess.STDOUT))

    def __enter__(self): return self

    def __exit__(self, *_):
        for p in self.processes:
            p.kill()
            p.wait()

    def said(self, i): return (self.folder / f"{i}.txt").read_text()

    def wait_for(self, condition, what):
        "Until it holds; at once a failure where a process has ended badly, and after the limit."
        end = time.monotonic() + LIMIT
        while not condition():
            bad = [i for i, p in enumerate(self.processes) if p.poll() not in (None, 0)]
            if bad or time.monotonic() > end:
                pytest.fail(f"waited for {what}; {f'process {bad[0]} ended badly' if bad else 'out of time'}:\n" + "\n".join(self.said(i)[-3000:] for i in range(self.hosts)), pytrace=False)
            time.sleep(0.05)

    def results(self):
        "What each process left: {name: {quantity: array}}."
        self.wait_for(lambda: all(p.poll() == 0 for p in self.processes), "the end")
        return [read(self.folder / f"{i}.npz") for i in range(self.hosts)]


def read(path):
    found = {}
    with np.load(path) as saved:
        for key in saved.files:
            name, quantity = key.split("/")
            found.setdefault(name, {})[quantity] = saved[key]
    return found


def difference(a, b, quantities=("params", "ema", "losses", "levels")): return max(np.abs(a[q] - b[q]).max() for q in quantities)


def same_bits(a, b):
    for q in ("params", "ema", "opt", "losses", "levels", "step"): np.testing.assert_array_equal(a[q], b[q], err_msg=q)


HOWS = {"pmap": dict(how="pmap"), "shard_map": dict(how="shard_map")}
if "fsdp" in {f.name for f in dataclasses.fields(DiffusionTrainer)}: HOWS |= {"jit": dict(how="jit"), "fsdp": dict(how="jit", fsdp=True)}  # the trainer hands both on
BOTH = dict(accumulate=2, steps_per_dispatch=2)
EIGHT = {"one": dict(steps=4, devices=1)} | {f"{name}{' parts' * parts}": dict(steps=4, devices=8, **how, **(BOTH if parts else {}))
                                            for name, how in HOWS.items() for parts in (False, True)}
ON_MESH = {"own jit": dict(calls=4, how="jit"), "own fsdp": dict(calls=4, how="jit", fsdp=True), "own jit two": dict(calls=2, K=2, how="jit"), "own fsdp two": dict(calls=2, K=2, how="jit", fsdp=True)}
OWN = {"own": dict(calls=4, devices=1), "own alone": dict(calls=4, devices=1, how="jit", fsdp=True), "own pmap": dict(calls=4), **ON_MESH}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "One process with 8 devices, and two with 2 each."
    root = tmp_path_factory.mktemp("hosts")
    alone = {**EIGHT, **OWN, "born": dict(born=True, how="jit", fsdp=True), "four": dict(steps=4, devices=4), "adam": dict(steps=6, devices=4, optimizer="adam")}
    pair = {**{name: dict(steps=4, **how) for name, how in HOWS.items()}, **ON_MESH, "adam": dict(steps=6, optimizer="adam"),
            "fsdp adam": dict(steps=4, optimizer="adam", how="jit", fsdp=True), "fsdp asks": dict(steps=4, optimizer="adam", how="jit", fsdp=True, asks=True),
            "born": dict(born=True, how="jit", fsdp=True), "half": dict(steps=3, optimizer="adam", checkpoint_dir=str(root / "half"))}
    with Group(root / "alone", alone) as a, Group(root / "pair", pair, hosts=2, devices=2) as b: return root, a.results()[0], b.results()


@pytest.fixture(scope="module")
def second(first):
    "The checkpoints of two processes, gone on from by two new ones, and by one; then the two are told to stop."
    root = first[0]
    shutil.copytree(root / "half", root / "copy")
    go_on = dict(steps=3, optimizer="adam", resume=True)
    long = dict(steps=100_000, optimizer="adam", checkpoint_dir=str(root / "long"))
    with Group(root / "again", {"resumed": dict(checkpoint_dir=str(root / "half"), **go_on), "stopped": long}, hosts=2, devices=2) as pair:
        with Group(root / "fewer", {"resumed": dict(checkpoint_dir=str(root / "copy"), devices=4, **go_on)}, devices=4) as one: alone = one.results()[0]
        stop_one(pair, "stopped")
        return root, pair.results(), alone


def stop_one(group, case):
    "SIGTERM to the second process only, once it is in the midst of this case."
    group.wait_for(lambda: group.said(1).partition(f"case {case}\n")[2].count("step ") >= 3, "the first steps")
    group.processes[1].send_signal(signal.SIGTERM)


# Many devices

@pytest.mark.parametrize("name", [name for name in EIGHT if name != "one"])
def test_eight_devices_are_one(first, name):
    "float64, gradient descent: the sums run in another order, and that is all."
    _, alone, _ = first
    assert alone[name]["step"] == 4 == len(alone[name]["losses"])
    assert difference(alone[name], alone["one"]) < 1e-12


def test_batches_lie_cut_on_the_devices_before_their_step(first):
    "But for several steps in one call, whose batches are joined first."
    _, alone, pair = first
    assert all(alone[name]["sent"] == ("parts" not in name) for name in EIGHT if name != "one")
    assert all(host[name]["sent"] for host in pair for name in HOWS)


def test_a_state_that_is_cut_is_born_cut(first):
    "No device ever holds all of it: not when it is made, either."
    _, alone, pair = first
    for found, n in [(alone["born"], 8), *((host["born"], 4) for host in pair)]: assert found["held"] * n == found["whole"] > 0


def test_one_host_alone_may_ask_for_a_state_that_is_split(first):
    "Before the first step and at every report, as the record of a run does: nobody hangs, and nothing changes."
    for i, result in enumerate(first[2]):
        same_bits(result["fsdp asks"], result["fsdp adam"])
        assert result["fsdp asks"]["drawn"] == (5 if i == 0 else 0)


def test_the_steps_are_worth_comparing(first):
    "Parameters move, the average lags behind, and each step has another loss: equality says something."
    one = first[1]["one"]
    assert len(np.unique(one["losses"])) == 4 and np.abs(one["params"] - one["ema"]).max() > 1e-3
    assert one["params"].dtype == np.float64 and first[1]["adam"]["params"].dtype == np.float32


# Many hosts

def test_hosts_read_their_rows_of_one_batch(first):
    _, alone, pair = first
    np.testing.assert_array_equal(np.concatenate([host["pmap"]["rows"] for host in pair]), alone["one"]["rows"])
    assert len(pair[0]["pmap"]["rows"]) == 8


def test_hosts_agree_in_every_bit(first):
    for name in first[2][0].keys() - {"born"}: same_bits(*(host[name] for host in first[2]))


@pytest.mark.parametrize("how", HOWS)
def test_two_hosts_are_one(first, how):
    "2 processes × 2 devices against 1 × 4, and against one device: float64, gradient descent."
    _, alone, pair = first
    for host in pair:
        assert difference(host[how], alone["four"]) < 1e-12
        assert difference(host[how], alone["one"]) < 1e-12


ADAM = 1e-6  # float32, measured 6e-8 in parameters of size 2 and 2.4e-7 in losses of 2.3: one or two units in the last place, over 6 steps and over 60


def test_two_hosts_are_one_under_adam(first):
    """float32: the all-reduce of four shares on two hosts adds in another order, so g differs by about 1e-7 of itself. Adam moves by g/√v, where any
    common factor cancels, so a step differs by 1e-7 of the learning rate, 1e-10; what remains is the rounding of the parameters themselves. Only where
    the shares' gradients cancel to their rounding does more pass through: at most 2e-3 a step, and no such parameter was met."""
    _, alone, pair = first
    for host in pair: assert difference(host["adam"], alone["adam"], ("params", "ema", "losses")) < ADAM


@pytest.mark.slow
def test_sixty_steps_under_adam(tmp_path):
    with Group(tmp_path / "alone", {"adam": dict(steps=60, optimizer="adam", devices=4)}) as a:
        with Group(tmp_path / "pair", {name: dict(steps=60, optimizer="adam", **how) for name, how in HOWS.items()}, hosts=2, devices=2) as b: pair, (alone,) = b.results(), a.results()
    for host in pair:
        for how in HOWS: assert difference(host[how], alone["adam"], ("params", "ema", "losses")) < ADAM


# One program on the global batch

@pytest.mark.parametrize("name", ["own alone", "own pmap", *ON_MESH])
def test_one_program_on_eight_devices_is_one(first, name):
    "float64, momentum, noise by place: a whole batch cut by the compiler, with the state copied or cut."
    alone = first[1]
    assert difference(alone[name], alone["own"], ("params", "ema", "opt", "losses")) < 1e-12 and alone[name]["step"] == 4
    assert len(np.unique(alone["own"]["losses"])) == 4 and np.abs(alone["own"]["params"] - alone["own"]["ema"]).max() > 1e-3


@pytest.mark.parametrize("name", ON_MESH)
def test_one_program_on_two_hosts_is_one(first, name):
    for host in first[2]: assert difference(host[name], first[1]["own"], ("params", "ema", "opt", "losses")) < 1e-12


@pytest.mark.parametrize("name", ON_MESH)
def test_memory_is_used_again(first, name):
    "The new state lies where the old one lay, whose buffers are gone, and one program serves all calls."
    for result in (first[1], *first[2]): assert result[name]["deleted"] and result[name]["programs"] == 1 and result[name]["held"] == result[name]["first"]


def test_what_a_device_holds(first):
    "Copied: everything. Cut: its part of the two matrices of 64 x 24, and all of what is small: 24 + 24 + 24 + 64 numbers and the count of steps."
    one, large, small = first[1]["own"]["whole"], 3 * 8 * 2 * 64 * 24, 3 * 8 * (24 * 3 + 64) + 4
    assert one == large + small
    for n, results in ((8, [first[1]]), (4, first[2])):
        for result in results:
            assert result["own jit"]["held"] == one and result["own fsdp"]["held"] == large / n + small
            assert result["own fsdp"]["whole"] == one, "what is saved is whole, on every host"


def test_a_cut_state_goes_back(first):
    "What was gathered and is put back is the same in every bit, cut again."
    for result in (first[1], *first[2]):
        for name in ON_MESH: np.testing.assert_array_equal(result[name]["after"], np.concatenate([[result[name]["step"]], *(result[name][q] for q in ("params", "ema", "opt"))]))


@pytest.mark.parametrize("shape, n, due", [
    ((64, 24), 8, ("data",)), ((24, 64), 8, (None, "data")), ((3, 3, 64, 128), 8, (None, None, None, "data")), ((3, 3, 128, 64), 8, (None, None, "data")),
    ((64, 64), 8, ("data",)), ((63, 65), 8, ()), ((63, 64), 8, (None, "data")), ((8, 8), 8, ()), ((1024,), 8, ("data",)), ((1023,), 8, ()), ((), 8, ()), ((0, 4096), 8, ()), ((64, 64), 1, ("data",))])
def test_where_a_leaf_is_cut(shape, n, due):
    "Along the longest axis that the devices divide; small leaves and odd ones are copied."
    mesh = AbstractMesh((n,), ("data",))
    sharding = fsdp_sharding({"w": jax.ShapeDtypeStruct(shape, np.float32)}, mesh)["w"]
    assert sharding.spec == PartitionSpec(*due)
    assert np.prod(sharding.shard_shape(shape)) * (n if due else 1) == np.prod(shape)


def test_how_small_is_too_small():
    mesh = AbstractMesh((8,), ("data",))
    assert fsdp_sharding(np.zeros((8, 8)), mesh, smallest=64).spec == PartitionSpec("data") and fsdp_sharding(np.zeros((8, 8)), mesh, smallest=65).spec == PartitionSpec()


# Checkpoints

def test_two_hosts_write_one_folder(second):
    root, pair, _ = second
    assert {p.name for p in (root / "half").iterdir() if p.name.isdigit()} == {"3", "6"}
    assert pair[0]["resumed"]["step"] == 6


def test_resumed_by_two_hosts_is_never_stopped(first, second):
    "By two new processes: parameters, average, optimizer, record and place in the data, bit for bit."
    for whole, host in zip(first[2], second[1]): same_bits(host["resumed"], whole["adam"])


def test_resumed_by_fewer_hosts(first, second):
    "One process with four devices goes on from what two wrote: another order of sums from there on."
    assert difference(second[2]["resumed"], first[2][0]["adam"], ("params", "ema", "losses")) < ADAM


# SIGTERM

def check_stopped(results, folder):
    step = int(results[0]["stopped"]["step"])
    assert 3 <= step < 100_000
    for host in results: assert host["stopped"]["preempted"] and host["stopped"]["step"] == step == len(host["stopped"]["losses"])
    assert [p.name for p in folder.iterdir() if p.name.isdigit()] == [str(step)], "all have saved the step they stopped after"
    same_bits(*(host["stopped"] for host in results))


def test_all_stop_after_the_same_step(second):
    "SIGTERM to one of two."
    check_stopped(second[1], second[0] / "long")


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
def test_all_stop_after_the_same_dispatch(tmp_path, how):
    "Of several steps: the step that the processes agree on may lie inside one."
    case = dict(steps=100_000, optimizer="adam", steps_per_dispatch=2, **HOWS[how], checkpoint_dir=str(tmp_path / "long"))
    with Group(tmp_path / "pair", {"stopped": case}, hosts=2, devices=2) as pair:
        stop_one(pair, "stopped")
        check_stopped(pair.results(), tmp_path / "long")


# A process that is lost

@pytest.mark.slow
def test_a_lost_process_ends_the_others(tmp_path):
    "Killed without warning, it leaves the other with an error, not with a run that hangs for ever."
    with Group(tmp_path / "pair", {"long": dict(steps=1_000_000, optimizer="adam")}, hosts=2, devices=2) as pair:
        pair.wait_for(lambda: pair.said(1).count("step ") >= 3, "the first steps")
        pair.processes[1].kill()
        assert pair.processes[0].wait(LIMIT) != 0


# What must not pass

def test_start_hosts_refuses():
    for given, words in ((("a:1", None, None), "belong together"), ((None, 2, None), "belong together"), ((None, None, 0), "belong together"), (("a:1", 2, None), "belong together"),
                         (("a:1", 0, 0), "processes"), (("a:1", 2.0, 0), "processes"), (("a:1", 2, 2), "process must"), (("a:1", 2, -1), "process must"),
                         (("a:1", 2, "0"), "process must"), (("a:1", 2, True), "process must"), (("a", 2, 0), "coordinator must"), (("a:b", 2, 0), "coordinator must"),
                         ((1234, 2, 0), "coordinator must"), (("auto", 2, 0), "coordinator must"), (("auto", 2, None), "belong together")):
        with pytest.raises(ValueError, match=words): start_hosts(*given)


CLUSTERS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE")


def test_start_hosts_alone_does_nothing(monkeypatch):
    for name in CLUSTERS: monkeypatch.delenv(name, raising=False)
    assert start_hosts() == (0, 1)


def test_start_hosts_too_late():
    "Once a device was used there is no joining."
    jax.devices()
    for given in (("localhost:1", 1, 0), ("auto",)):
        with pytest.raises(RuntimeError, match="before"): start_hosts(*given)


@pytest.mark.parametrize("environment, several", [
    ({}, False), ({"TPU_WORKER_HOSTNAMES": "localhost"}, False), ({"TPU_WORKER_HOSTNAMES": "a,b"}, True), ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
    ({"SLURM_NTASKS": "4"}, False), ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}, True), ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True), ({"OMPI_COMM_WORLD_SIZE": "x"}, False)], ids=str)
def test_which_environments_are_clusters(monkeypatch, environment, several):
    for name in CLUSTERS: monkeypatch.delenv(name, raising=False)
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    assert _in_a_cluster() is several


# A slice of a Cloud TPU, made by gcloud

SLICE = """
import os, jax, numpy as np
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it where it sees no chip
from flaxdiff.distributed import start_hosts
number, count = start_hosts()
joined = jax.distributed.is_initialized()
from jax.experimental import multihost_utils
everyone = multihost_utils.process_allgather(np.int32(number)).ravel().tolist() if joined else [number]
said = "|".join(map(str, ["SAID", number, count, joined, everyone, len(jax.devices()), ""]))
print(said, flush=True)  # in one write, or Gloo's own words may come between where Python does not buffer
"""


class Metadata(http.server.BaseHTTPRequestHandler):
    "Google's metadata server, as worker N of a slice sees it under /N; on `hosts` machines."
    def do_GET(self):
        self.server.asked.append(self.path)
        _, worker, *path, key = self.path.split("/")
        assert path == "computeMetadata/v1/instance/attributes".split("/") and self.headers["Metadata-Flavor"] == "Google"
        known = {"agent-worker-number": worker, "worker-network-endpoints": ",".join(["unknown:unknown:127.0.0.1"] * self.server.hosts),
                 "tpu-env": f"ACCELERATOR_TYPE: 'v4-{8 * self.server.hosts}'\nWORKER_ID: '{worker}'\n"}
        self.send_response(200 if key in known else 404)
        self.end_headers()
        self.wfile.write(known.get(key, "").encode())

    def log_message(self, *_): pass


@pytest.fixture
def metadata():
    "Serves a slice; `metadata(hosts, …)` starts a process on each of its machines and returns what they said."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    def ask(hosts, vm=True, address=None, **environment):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        server.hosts, processes = hosts, []
        for i in range(hosts):
            env = {k: v for k, v in os.environ.items() if k not in CLUSTERS and not k.startswith("JAX_COORDINATOR")}
            env |= {"JAX_PLATFORMS": "cpu", "NO_PROXY": "127.0.0.1", "GCE_METADATA_IP": address or f"127.0.0.1:{server.server_port}/{i}", "JAX_COORDINATOR_PORT": str(port),
                    "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}", "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {os.environ['XLA_FLAGS']}", **environment}
            if vm: env["JAX_FORCE_TPU_INIT"] = "1"  # JAX takes this for a TPU VM
            processes.append(subprocess.Popen([sys.executable, "-c", SLICE], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        try: outputs = [p.communicate(timeout=LIMIT) for p in processes]
        finally:
            for p in processes: p.kill()
        for p, (_, err) in zip(processes, outputs): assert p.returncode == 0, err[-3000:]
        said = [re.search(r"SAID\|(.*)\|", out) for out, _ in outputs]  # Gloo speaks, too, and in the same line
        assert all(said), outputs
        return [found[1].split("|") for found in said]
    ask.asked = server.asked
    yield ask
    server.shutdown()


def test_a_slice_made_by_gcloud_is_joined_without_flags(metadata):
    "A v4-32 is four machines: each finds the others by the metadata server, and they talk over loopback."
    assert metadata(4) == [[str(i), "4", "True", "[0, 1, 2, 3]", "8"] for i in range(4)]


def test_one_machine_starts_nothing(metadata):
    alone = [["0", "1", "False", "[0]", "2"]]
    assert metadata(1) == alone and metadata.asked, "a v4-8"
    del metadata.asked[:]
    assert metadata(1, vm=False) == alone, "no TPU VM at all"
    assert metadata(1, TPU_WORKER_HOSTNAMES="localhost") == alone and not metadata.asked, "Kubernetes has told already"
    with socket.socket() as s:  # nobody listens
        s.bind(("127.0.0.1", 0))
        assert metadata(1, address=f"127.0.0.1:{s.getsockname()[1]}") == alone, "a TPU VM without a metadata server"


def test_another_jax_has_no_such_detection(monkeypatch):
    "JAX's own detection has no public name: should it move, a machine counts as alone."
    for name in CLUSTERS: monkeypatch.delenv(name, raising=False)
    import jax._src.clusters as clusters
    monkeypatch.delattr(clusters, "GceTpuCluster")
    assert _in_a_cluster() is False


def test_data_parallel_refuses():
    step = lambda state, key, index, batch, axis: (state, {})
    with pytest.raises(ValueError, match="how must"): DataParallel(step, how="xmap")
    with pytest.raises(ValueError, match="devices must"): DataParallel(step, [])
    for how in ("pmap", "shard_map"):
        with pytest.raises(ValueError, match="fsdp=True needs how='jit'"): DataParallel(step, how=how, fsdp=True)
    with pytest.raises(ValueError, match="fsdp must be True or False"): DataParallel(step, how="jit", fsdp="no")
    class Elsewhere: process_index = 7
    with pytest.raises(ValueError, match="some of this process"): DataParallel(step, [Elsewhere()])


# The model of what it costs

def test_several_steps_are_steps():
    step = lambda state, key, index, batch: (state * 2 + batch.sum() + key, {"state": state})
    batches, index = np.arange(6.0).reshape(3, 2), np.zeros((3, 2), int)
    for K in (1, 3):
        state, metrics = several_steps(step)(np.float32(1), np.float32(0.5), index[:K], batches.astype(np.float32)[:K])
        by_hand, seen = 1.0, []
        for batch in batches[:K]:
            seen.append(by_hand)
            by_hand = by_hand * 2 + batch.sum() + 0.5
        assert float(state) == by_hand and metrics["state"].tolist() == seen


def ring(values):
    "A ring all-reduce played out: (what each device has in the end, how many numbers each has sent)."
    n = len(values)
    parts, sent = [np.array_split(np.array(v, float), n) for v in values], [0] * n
    for turn in range(2 * (n - 1)):
        data = [parts[i][(i - turn) % n].copy() for i in range(n)]
        for i, x in enumerate(data):
            k, after = (i - turn) % n, parts[(i + 1) % n]
            after[k] = after[k] + x if turn < n - 1 else x
            sent[i] += len(x)
    return [np.concatenate(p) for p in parts], sent


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_bytes_are_those_of_a_ring(n):
    values = np.random.default_rng(n).standard_normal((n, 24))
    ends, sent = ring(values)
    for end in ends: np.testing.assert_allclose(end, values.sum(0), atol=1e-12)
    assert [allreduce_bytes(24, n)] * n == pytest.approx([4 * s for s in sent])


def test_operations_are_counted_in_loops():
    "As often as they turn, inside jit and checkpoint too; XLA counts the body once."
    w = jax.numpy.ones((7, 7))
    looped = lambda x: jax.lax.scan(lambda c, _: (jax.numpy.tanh(c @ w), None), x, None, length=11)[0]
    x = jax.ShapeDtypeStruct((5, 7), np.float32)
    for function in (looped, jax.jit(looped), jax.checkpoint(looped)): assert count_flops(function, x) == 11 * 2 * 5 * 7 * 7
    assert count_flops(lambda x: x + 1, x) == 0


def test_seconds_by_hand():
    "A million parameters, 1 GFLOP an example, 100 examples on 10 devices of 1 TFLOP/s: 10 ms of work; 7.2 MB at 1 GB/s: 7.2 ms."
    given = dict(parameters=1e6, flops=1e9, batch=100, speed=1e12, link=1e9)
    assert step_seconds(1, **given) == pytest.approx(0.1)
    assert step_seconds(10, **given) == pytest.approx(0.0172)
    assert step_seconds(10, **given, overlap=0.5) == pytest.approx(0.0172 - 0.01 / 3)
    assert step_seconds(10, **given, overlap=1.0) == pytest.approx(0.0172 - 0.02 / 3)
    assert step_seconds(10, **{**given, "link": 1e12}, overlap=1.0) == pytest.approx(0.01), "no more can be hidden than there is"
    np.testing.assert_allclose(step_seconds([1, 10], **given), [0.1, 0.0172])
    for name, value in (("devices", 0), ("devices", [4, 0.5]), ("overlap", 1.5), ("overlap", -0.1), ("speed", 0), ("link", -1)):
        with pytest.raises(ValueError, match=name): step_seconds(**{"devices": 2, **given, name: value})
    for name, value in (("devices", 0), ("parameters", -1)):
        with pytest.raises(ValueError, match=name): allreduce_bytes(**{"parameters": 1, "devices": 2, name: value})


@pytest.mark.parametrize("name", ["parameters", "flops", "batch", "speed", "link", "overlap", "devices"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_no_seconds_of_what_is_no_number(name, value):
    given = dict(devices=2, parameters=1e6, flops=1e9, batch=100)
    with pytest.raises(ValueError, match=name): step_seconds(**{**given, name: value})
    if name in ("parameters", "devices"):
        with pytest.raises(ValueError, match=name): allreduce_bytes(**{"parameters": 1, "devices": 2, name: value})
