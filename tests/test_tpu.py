"""flaxdiff-tpu: the real program, run against a gcloud that records what it is asked and has two workers in two folders.

The stand-in answers as the real one does: it splits `--command` at spaces and joins it again for a shell, copies to each worker,
filters its list by the regular expression it is given, and fails when told to. That the real gcloud accepts the same words is
asked of the real one, by its own parser, where it is installed; nothing is ever run by it.
"""
import inspect, io, json, os, pty, re, shlex, shutil, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from flaxdiff import tpu
from flaxdiff.tpu import VERBS, copy_files, create_tpu, delete_tpu, list_tpus, mount_bucket, run_on_tpu, set_up_tpu, ssh_tpu, start_tpu, tpu_command, tpu_main, tpu_parser, train_on_tpu

BIN, ROOT = Path(sys.executable).parent, Path(__file__).resolve().parents[1]
PROGRAM = BIN / "flaxdiff-tpu"

GCLOUD = f"#!{sys.executable} -ES" + r'''
import json, os, re, shutil, signal, subprocess, sys
from pathlib import Path
words, root = sys.argv[1:], Path(os.environ["STAND_IN"])
with open(root / "asked", "a") as f: f.write(json.dumps(words) + "\n")
if words[0] == "storage":  # a bucket is a folder
    bucket = root / "buckets" / words[-1].removeprefix("gs://") if words[1] == "cp" else root / "buckets" / words[3].removeprefix("gs://")
    if words[1:3] == ["buckets", "create"]: bucket.mkdir(parents=True)
    elif words[1:3] == ["cp", "-r"] and bucket.is_dir(): shutil.copytree(words[3], bucket / Path(words[3]).name)
    else: sys.exit("ERROR: (gcloud.storage) " + " ".join(words))
    sys.exit(0)
group, verb, *rest = words[2:]
flags = dict(w[2:].partition("=")[::2] for w in rest if w.startswith("--") and len(w) > 2)
what, told = f"{group} {verb}", json.loads(os.environ.get("STAND_IN_SAYS", "{}"))
if what in told.get("fails", {}):
    print(f"ERROR: (gcloud.compute.tpus.{group}.{verb}) told to fail", file=sys.stderr)
    sys.exit(told["fails"][what])
if what in told.get("dies", []): os.kill(os.getpid(), signal.SIGKILL)
def workers():
    which = range(told.get("workers", 2)) if flags["worker"] == "all" else map(int, flags["worker"].split(","))
    for i in which:
        home = root / f"worker{i}"
        home.mkdir(exist_ok=True)
        yield home
if what == "queued-resources list":
    names = [f"projects/p/locations/z/queuedResources/{n}" for n in told.get("queued", [])]
    key, _, pattern = flags.get("filter", "name~.").partition("~")
    assert key == "name"
    for name in names:
        if re.search(pattern, name): print(name)
elif what == "tpu-vm ssh":
    statuses = []
    for home in workers():
        line = " ".join(flags["command"].split(" ")) if "command" in flags else "cat"
        path = f"{home}/bin:" + os.environ["PATH"]
        statuses.append(subprocess.run(["bash", "-c", line], cwd=home, env={**os.environ, "HOME": str(home), "PATH": path}).returncode)
    sys.exit(next(filter(None, statuses), 0))
elif what == "tpu-vm scp":
    *sources, target = [w for w in rest if not w.startswith("--")]
    for home in workers():
        here = lambda path: home / path.partition(":")[2] if ":" in path else Path(path)
        for source in map(here, sources):
            if source.is_dir(): shutil.copytree(source, here(target) / source.name) if "recurse" in flags else sys.exit(1)
            else: shutil.copy(source, here(target))
if "format" not in flags: print(f"{what} in {os.environ.get('CLOUDSDK_COMPUTE_ZONE')}")
'''


class Bench:
    "A folder with a gcloud in it, and the program run with that gcloud on PATH."
    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        self.put("bin/gcloud", GCLOUD)
        self.env = {**os.environ, "STAND_IN": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
        for name in [n for n in self.env if n.startswith("CLOUDSDK_")]: del self.env[name]

    def put(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def says(self, **told): self.env["STAND_IN_SAYS"] = json.dumps(told)

    def __call__(self, *words, **options):
        "Run the program; `asked` is then what it asked of gcloud."
        (self.folder / "asked").unlink(missing_ok=True)
        options = {"stdin": subprocess.DEVNULL} | options if "input" not in options else options
        return subprocess.run([PROGRAM, *map(str, words)], env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=120, **options)

    @property
    def asked(self):
        path = self.folder / "asked"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def bench(tmp_path): return Bench(tmp_path)


@pytest.fixture
def inside(bench, monkeypatch, capsys):
    "`tpu_main` in this process with the same gcloud, for what does not need a process of its own."
    def call(*words):
        for name in ("PATH", "STAND_IN", "STAND_IN_SAYS"):
            if name in bench.env: monkeypatch.setenv(name, bench.env[name])
        monkeypatch.chdir(bench.folder)
        (bench.folder / "asked").unlink(missing_ok=True)
        status = tpu_main([str(w) for w in words])
        return status, *capsys.readouterr()
    return call


# ---------------------------------------------------------------- what is asked

VM, QR = "compute tpus tpu-vm", "compute tpus queued-resources"
CASES = {
    "create t v4-8 --zone us-central2-b --project my-project": [f"{VM} create t --accelerator-type=v4-8 --version=tpu-ubuntu2204-base --zone=us-central2-b --project=my-project"],
    "create t v5litepod-16 --spot -- --internal-ips --labels=a=b": [f"{VM} create t --accelerator-type=v5litepod-16 --spot --version=v2-alpha-tpuv5-lite --internal-ips --labels=a=b"],
    "create t v9x-8 --version my-image --reserved": [f"{VM} create t --accelerator-type=v9x-8 --reserved --version=my-image"],
    "create t v6e-8 --queued --spot": [f"{QR} create t --node-id=t --accelerator-type=v6e-8 --spot --runtime-version=v2-alpha-tpuv6e"],
    "create t v5p-8 --queued --reserved": [f"{QR} create t --node-id=t --accelerator-type=v5p-8 --reserved --runtime-version=v2-alpha-tpuv5"],
    "list --zone=-": [f"{VM} list --zone=-", f"{QR} list --zone=-"],
    "start t --zone us-east5-a": [f"{VM} start t --zone=us-east5-a"],
    "stop t": [f"{VM} stop t"],
    "delete t --yes --zone us-east5-a": [f"{QR} list --filter=name~/queuedResources/t$ '--format=value(name)' --zone=us-east5-a", f"{VM} delete t --quiet --zone=us-east5-a"],
    "delete t --yes --queued": [f"{QR} delete t --force --quiet"],
    "ssh t --worker 1 --zone us-east5-a -- -L 80:localhost:80": [f"{VM} ssh t --worker=1 --zone=us-east5-a -- -L 80:localhost:80"],
    "run t -- printf '%s|' 'a  b' \"it's\" '\"$HOME\"'": [f"""{VM} ssh t --worker=all '--command=printf '"'"'%s|'"'"' '"'"'a  b'"'"' '"'"'it'"'"'"'"'"'"'"'"'s'"'"' '"'"'"$HOME"'"'"''"""],
    "run t --worker 0 -- 'echo a && echo b | cat'": [f"{VM} ssh t --worker=0 '--command=echo a && echo b | cat'"],
    "copy a 'b c' t:": [f"{VM} scp a 'b c' t: --worker=all"],
    "copy t:a . --worker 1 --recurse": [f"{VM} scp t:a . --worker=1 --recurse"],
    "train t -- --out 'my run' --resume": [f"{VM} ssh t --worker=all '--command=nohup ~/flaxdiff-env/bin/flaxdiff-train --out '\"'\"'my run'\"'\"' --resume > ~/flaxdiff-train.log 2>&1 < /dev/null & echo process $!'"]}
MORE = ["setup t --zone us-east5-a", "mount t gs://my-bucket --folder '~/a b'"]


def a_place(bench):
    "Files to copy, so that nothing fails."
    for name in ("a", "b c", "worker0/a", "worker1/a"): bench.put(name, name)


@pytest.mark.parametrize("line", CASES)
def test_what_is_asked_of_gcloud(bench, inside, line):
    a_place(bench)
    assert inside(*shlex.split(line))[0] == 0
    assert bench.asked == [shlex.split(words) for words in CASES[line]]


@pytest.mark.parametrize("line", [*CASES, *MORE])
def test_a_dry_run_prints_what_would_run_and_runs_nothing(bench, inside, line):
    a_place(bench)
    bench.says(fails={"tpu-vm ssh": 0})  # what a worker would do is not the question here
    verb, *words = shlex.split(line)
    inside(verb, *words)
    real = bench.asked
    status, printed, _ = inside(verb, "--dry-run", *words)
    assert status == 0 and not bench.asked
    if "found=" not in printed: assert [shlex.split(command) for command in printed.splitlines()] == [["gcloud", *w] for w in real]
    subprocess.run(["sh", "-e", "-c", printed], env=bench.env, cwd=bench.folder, check=True, stdout=subprocess.DEVNULL)
    assert bench.asked == real  # pasted into a shell


def test_the_program_itself(bench):
    line = 'run t --zone us-east5-a -- python3 -c \'import sys; print(sys.argv[1:], sep="")\' "it\'s" "a  b" \'$HOME\' "*"'
    done = bench(*shlex.split(line))
    assert done.returncode == 0 and done.stdout.splitlines()[:2] == [str(["it's", "a  b", "$HOME", "*"])] * 2  # one line a worker
    (real,) = bench.asked
    verb, *words = shlex.split(line)
    dry = bench(verb, "--dry-run", *words)
    assert dry.returncode == 0 and shlex.split(dry.stdout) == ["gcloud", *real] and not bench.asked


def test_every_verb_is_asked_for_and_has_help():
    assert {shlex.split(line)[0] for line in [*CASES, *MORE]} == set(VERBS)
    for verb, function in VERBS.items():
        text = subprocess.run([sys.executable, "-c", "import sys; from flaxdiff.tpu import tpu_parser; tpu_parser().parse_args(sys.argv[1:])", verb, "--help"],
                              capture_output=True, text=True).stdout if verb == "create" else tpu_parser()._subparsers._group_actions[0].choices[verb].format_help()
        for p in inspect.signature(function).parameters.values():
            if p.name != "place": assert (p.name.upper() if p.name == "words" else p.name.replace("_", "-") if p.default is not p.empty else p.name) in text
        assert "--dry-run" in text and "--zone" in text and ("--yes" in text) == (verb == "delete")


def test_gcloud_sees_its_own_environment_and_the_same_terminal(bench):
    bench.env["CLOUDSDK_COMPUTE_ZONE"] = "us-west4-a"
    done = bench("ssh", "t", input="from the keyboard\n")
    assert done.stdout.splitlines()[0] == "from the keyboard"  # the stand-in for a login is cat
    assert "tpu-vm list in us-west4-a" in bench("list").stdout and "--zone" not in str(bench.asked)


@pytest.mark.skipif(not shutil.which("gcloud"), reason="needs the real gcloud, for its parser")
def test_the_real_gcloud_takes_these_words(tmp_path):
    "`gcloud meta lint-gcloud-commands` parses and runs nothing: no account, no network."
    simple = [create_tpu("t", "v4-8", zone="us-central2-b", project="p-1"), create_tpu("t", "v6e-8", spot=True), create_tpu("t", "v6e-8", reserved=True),
              create_tpu("t", "v6e-8", queued=True, spot=True), create_tpu("t", "v6e-8", queued=True, reserved=True), list_tpus(zone="-"), start_tpu("t"),
              [tpu_command("stop", "t", zone="us-east5-a")], delete_tpu("t"), delete_tpu("t", queued=True), [tpu.find_queued("t")], ssh_tpu("t", "1"),
              run_on_tpu("t", "hostname"), run_on_tpu("t", "hostname", worker="0,2-3"), copy_files(["a", "b"], "t:", recurse=True), copy_files(["t:a"], ".")]
    lines = [shlex.join(command) for commands in simple for command in commands]
    wrong = "gcloud compute tpus tpu-vm delete t --force"  # so that the parser can be seen to refuse
    (tmp_path / "commands.json").write_text(json.dumps([{"command_string": line} for line in [*lines, wrong]]))
    env = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false", "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true"}
    done = subprocess.run(["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands.json'}"], env=env, capture_output=True, text=True, timeout=300)
    verdicts = {v["command_string"]: v for v in json.loads(done.stdout)}
    assert len(verdicts) == len(lines) + 1 and not verdicts.pop(wrong)["success"]
    assert not [(line, v["error_message"]) for line, v in verdicts.items() if not v["success"]]


# ---------------------------------------------------------------- deleting

def at_a_terminal(bench, answer, *words):
    "(status, what was shown) of the program at a terminal where a person types `answer`."
    master, slave = pty.openpty()
    (bench.folder / "asked").unlink(missing_ok=True)
    process = subprocess.Popen([PROGRAM, *words], env=bench.env, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    os.write(master, answer.encode())
    shown = b""
    while True:
        try: piece = os.read(master, 1024)
        except OSError: break  # Linux says so when the program has ended
        if not piece: break
        shown += piece
    os.close(master)
    return process.wait(60), shown.decode()


def judge(bench, answer, status, shown):
    "A yes deletes, anything else does not; in both cases the question shows the command."
    deletes = answer.strip().lower() in ("y", "yes")
    assert f"gcloud {VM} delete t" in shown and "[y/N]" in shown
    assert [w[3] for w in bench.asked] == ["list", "delete"][:1 + deletes]
    assert (status == 0) == deletes and ("Nothing was deleted" in shown) != deletes


@pytest.mark.parametrize("answer", ["y\n", "\x04"], ids=["yes", "end"])
def test_a_person_at_a_terminal_is_asked(bench, answer): judge(bench, answer, *at_a_terminal(bench, answer, "delete", "t"))


@pytest.mark.parametrize("answer", ["YES\n", " y \n", "n\n", "\n", "yes please\n", ""])
def test_only_yes_is_yes(bench, inside, monkeypatch, answer):
    stdin = io.StringIO(answer)
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    status, shown, _ = inside("delete", "t")
    judge(bench, answer, status, shown)


def test_without_a_terminal_nothing_is_deleted(bench, inside):
    done = bench("delete", "t", input="y\n")  # a pipe is no person
    assert done.returncode == 2 and "--yes" in done.stderr and not bench.asked
    assert inside("delete", "t", "--queued")[0] == 2 and not bench.asked
    assert inside("delete", "t", "--yes")[0] == 0 and len(bench.asked) == 2


@pytest.mark.parametrize("queued, group", [(["t"], "queued-resources"), (["a", "t", "b"], "queued-resources"), ([], "tpu-vm"), (["t2", "my-t", "t-2"], "tpu-vm")])
def test_a_queued_resource_is_found_and_deleted_with_its_tpu(bench, inside, queued, group):
    bench.says(queued=queued)
    assert inside("delete", "t", "--yes")[0] == 0
    real, found = bench.asked, group == "queued-resources"
    assert real[1:] == [["compute", "tpus", group, "delete", "t", *["--force"] * found, "--quiet"]]
    _, printed, _ = inside("delete", "t", "--dry-run")
    assert not bench.asked and "\n" not in printed.strip()
    subprocess.run(["sh", "-c", printed], env=bench.env, check=True, stdout=subprocess.DEVNULL)
    assert bench.asked == real


def test_what_cannot_be_looked_up_is_not_deleted(bench, inside):
    bench.says(fails={"queued-resources list": 3})
    assert inside("delete", "t", "--yes")[0] == 3 and len(bench.asked) == 1
    _, printed, _ = inside("delete", "t", "--dry-run")
    assert subprocess.run(["sh", "-c", printed], env=bench.env, stderr=subprocess.DEVNULL).returncode == 3 and len(bench.asked) == 1


# ---------------------------------------------------------------- failing

def test_the_status_is_gclouds_own(bench, inside):
    bench.says(fails={"tpu-vm create": 1, "tpu-vm list": 7, "tpu-vm ssh": 255}, dies=["tpu-vm stop"])
    done = bench("create", "t", "v4-8")
    assert done.returncode == 1 and "ERROR: (gcloud.compute.tpus.tpu-vm.create)" in done.stderr and not done.stdout
    assert inside("list")[0] == 7 and len(bench.asked) == 1  # the second list is not begun
    assert inside("stop", "t")[0] == 128 + 9
    status, _, said = inside("run", "t", "--", "hostname")
    assert status == 255 and "ssh-add" in said
    bench.says(fails={"tpu-vm ssh": 5})
    assert inside("setup", "t")[0] == 5 and len(bench.asked) == 1


def test_the_status_of_a_worker_comes_back(bench, inside):
    bench.put("worker1/bad", "")
    assert inside("run", "t", "--", "test ! -e bad || exit 23")[0] == 23
    assert inside("run", "t", "--worker", "0", "--", "test ! -e bad || exit 23")[0] == 0


def test_without_gcloud(bench):
    bench.env["PATH"] = "/nowhere"
    for words in (["list"], ["delete", "t", "--yes"]):
        done = bench(*words)
        assert done.returncode == 127 and "cloud.google.com/sdk/docs/install" in done.stderr and "gcloud auth login" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert bench("list", "--dry-run").returncode == 0


@pytest.mark.parametrize("call, named", [
    (lambda: create_tpu("My_TPU", "v4-8"), "name .*'My_TPU'"), (lambda: create_tpu("-t", "v4-8"), "name .*'-t'"), (lambda: create_tpu("t" * 64, "v4-8"), "name "),
    (lambda: start_tpu(""), "name .*''"), (lambda: start_tpu(3), "name .*3"), (lambda: create_tpu("t", "v4"), "accelerator_type .*v5litepod-16.*'v4'"),
    (lambda: create_tpu("t", "v4-0"), "accelerator_type .*'v4-0'"), (lambda: create_tpu("t", "8-v4"), "accelerator_type "), (lambda: create_tpu("t", "v5e-16"), "version .*v5e-16.*v5litepod"),
    (lambda: create_tpu("t", "v4-8", version=""), "version .*''"), (lambda: create_tpu("t", "v4-8", spot=True, reserved=True), "spot and reserved"),
    (lambda: list_tpus(zone="us-central2"), "zone .*'us-central2'"), (lambda: list_tpus(zone=""), "zone "), (lambda: list_tpus(zone="US-Central2-B"), "zone "),
    (lambda: list_tpus(project="My Project"), "project .*'My Project'"), (lambda: list_tpus(project="--quiet"), "project "),
    (lambda: run_on_tpu("t", []), "words "), (lambda: run_on_tpu("t", " "), "words "), (lambda: run_on_tpu("t", ["hostname"], worker="first"), "worker .*'first'"),
    (lambda: ssh_tpu("t", worker="all"), "worker .*'all'"), (lambda: copy_files(["a"], "b"), "destination,"), (lambda: copy_files(["t:a"], "t:b"), "destination,"),
    (lambda: copy_files(["t:a", "b"], "."), "destination,"), (lambda: copy_files(["t:a", "u:b"], "."), "destination,"), (lambda: copy_files(["./t:a"], "."), "destination,"),
    (lambda: copy_files(["T:a"], "."), "name .*'T'"), (lambda: copy_files(["t:a"], ".", worker="all"), "worker .*'all'"), (lambda: copy_files(["a"], "t:", worker=""), "worker "),
    (lambda: mount_bucket("t", "gs://my-bucket/folder"), "bucket .*'my-bucket/folder'"), (lambda: mount_bucket("t", "My Bucket"), "bucket "), (lambda: train_on_tpu("t", []), "words "),
    (lambda: copy_files(["--scp-flag=-oProxyCommand=x"], "t:"), "hyphen.*--scp-flag"), (lambda: copy_files(["-r", "a"], "t:"), "hyphen"), (lambda: copy_files(["t:a"], "-x"), "hyphen"),
    (lambda: copy_files(["-t:a"], "."), "hyphen"), (lambda: set_up_tpu("t", "--index-url=x"), "package"), (lambda: mount_bucket("t", "my-bucket", "-p"), "folder"),
    *((call, f"{what} ") for end in ("\n", " ", "\r\n") for what, call in (
        ("name", lambda end=end: start_tpu("my-tpu" + end)), ("name", lambda end=end: tpu.find_queued("my-tpu" + end)), ("name", lambda end=end: copy_files(["a"], f"my-tpu{end}:")),
        ("zone", lambda end=end: list_tpus(zone="us-central2-b" + end)), ("project", lambda end=end: list_tpus(project="p-1" + end)),
        ("worker", lambda end=end: run_on_tpu("t", "a", worker="0" + end)), ("accelerator_type", lambda end=end: create_tpu("t", "v4-8" + end)),
        ("version", lambda end=end: create_tpu("t", "v4-8", version="x" + end)), ("bucket", lambda end=end: mount_bucket("t", "my-bucket" + end)))),
    *((call, f"{what} must be one line") for bad in ("a\nb", "a\0", "", " ", 3, None) for what, call in (
        ("a path", lambda bad=bad: copy_files(["t:a"], bad)), ("package", lambda bad=bad: set_up_tpu("t", bad)), ("bucket", lambda bad=bad: mount_bucket("t", bad)),
        *([] if bad is None else [("folder", lambda bad=bad: mount_bucket("t", "my-bucket", bad))]))),
    *((call, f"{what} must be a list") for bad in ("--out x", [3], None) for what, call in (
        ("words", lambda bad=bad: train_on_tpu("t", bad)), ("words", lambda bad=bad: ssh_tpu("t", words=bad)), ("words", lambda bad=bad: create_tpu("t", "v4-8", words=bad)),
        ("sources", lambda bad=bad: copy_files(bad, "t:")), *([] if bad == "--out x" else [("words", lambda bad=bad: run_on_tpu("t", bad))]))),
    (lambda: ssh_tpu("t", worker="٣"), "worker "), (lambda: create_tpu("t", "v4-1٣"), "accelerator_type ")])
def test_what_cannot_be_right_is_named(call, named):
    with pytest.raises(ValueError, match=named): call()


def test_wrong_words_end_with_two_and_ask_nothing(bench, inside, capsys):
    done = bench("create", "t", "v4-8", "--zone", "us-central2")
    assert done.returncode == 2 and done.stderr.startswith("flaxdiff-tpu: error: zone ") and len(done.stderr.splitlines()) == 1 and not bench.asked
    assert inside("list", "--", "x")[0] == 2 and inside("run", "t", "--")[0] == 2 and not bench.asked
    for words in ([], ["fly"], ["create", "t"], ["run", "t", "hostname"], ["list", "--force"]):
        with pytest.raises(SystemExit) as e: tpu_main(words)
        assert e.value.code == 2


def test_what_google_may_add_is_let_through():
    for zone in ("us-central1-a", "northamerica-northeast1-c", "us-central1-ai1a", "u-france-east1-a"): list_tpus(zone=zone)
    for project in ("my-project-123", "example.com:my-project", "123456"): list_tpus(project=project)
    for kind in ("v2-8", "v5litepod-1", "v5p-12288", "v7x-16", "tpu7x-8"): create_tpu("t", kind, version="new-image-1.2")


# ---------------------------------------------------------------- what workers do with it

@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])), min_size=2, max_size=5).filter(lambda words: words[0].strip()))
def test_words_arrive_as_they_left(words):
    (command,) = run_on_tpu("t", words)
    line = command[-1].removeprefix("--command=")
    assert shlex.split(" ".join(line.split(" "))) == words and shlex.split(shlex.join(command)) == command


@pytest.mark.parametrize("word", ["it's", 'say "hi"', "$HOME `id` $(id)", "a\nb", "*", "~", "back\\slash", "-n", "", "!x", "é  ü", "a;b|c&d>e"])
def test_words_pass_a_real_shell(bench, inside, word):
    inside("run", "t", "--worker", "1", "--", sys.executable, "-ESc", "import sys; open('word', 'w').write(sys.argv[1])", word)
    assert (bench.folder / "worker1" / "word").read_text() == word and not (bench.folder / "worker0").exists()


def test_copies_reach_both_workers_and_come_from_one(bench, inside):
    bench.put("a b", "1"), bench.put("code/x/y", "2")
    at = lambda worker, name: (bench.folder / f"worker{worker}" / name)
    for worker, reached in (("0", [True, False]), ("0,1", [True, True]), (None, [True, True])):
        for i in range(2): shutil.rmtree(at(i, ""), ignore_errors=True)
        assert inside("copy", "a b", "t:", *([] if worker is None else ["--worker", worker]))[0] == 0
        assert [at(i, "a b").exists() for i in range(2)] == reached
    assert inside("copy", "code", "t:")[0] == 1 and inside("copy", "code", "t:", "--recurse")[0] == 0
    assert [at(i, "code/x/y").read_text() for i in range(2)] == ["2", "2"]
    at(0, "log").write_text("zero"), at(1, "log").write_text("one")
    assert inside("copy", "t:log", "mine")[0] == 0 and (bench.folder / "mine").read_text() == "zero"
    assert inside("copy", "t:log", "mine", "--worker", "1")[0] == 0 and (bench.folder / "mine").read_text() == "one"


UV = '#!/bin/sh\necho "uv $*" >> ~/log; for word in "$@"; do echo "$word" >> ~/words; done\n[ "$1" != venv ] || ln -sfn VENV ~/flaxdiff-env\n'


def test_setup_installs_on_both_workers_and_counts_chips(bench):
    "The scripts run in a real shell with a stand-in for uv; the last step is the real JAX and the real flaxdiff."
    installer = f"mkdir -p ~/.local/bin && cp {bench.folder}/uv ~/.local/bin/uv"
    bench.put("uv", UV.replace("VENV", str(BIN.parent))), bench.put("bin/curl", f"#!/bin/sh\necho \"curl $*\" >> ~/log; echo '{installer}' > $4\n")
    done = bench("setup", "t")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^flaxdiff \S+, \d+ of \d+ chips$", done.stdout, re.M)) == 2 and len(bench.asked) == 2
    for i in range(2):
        home = bench.folder / f"worker{i}"
        curl, venv, pip = (home / "log").read_text().splitlines()
        assert curl == f"curl -LsSf https://astral.sh/uv/{tpu.UV}/install.sh -o {home}/.uv-install.sh"
        assert venv.startswith("uv venv") and venv.endswith(f"--python 3.12 {home}/flaxdiff-env")
        words = (home / "words").read_text().splitlines()
        assert words[-5:] == [*tpu.PINS, f"flaxdiff[data] @ git+https://github.com/flaxdiff/flaxdiff@v{tpu.__version__}"]
    bench.put("bin/curl", "#!/bin/sh\nexit 6\n")
    assert bench("setup", "t", "--package", "./code").returncode == 6 and len(bench.asked) == 1  # JAX is not started


def test_the_pins_are_those_of_the_chapters():
    cell = (ROOT / "nbs" / "62_train.ipynb").read_text()
    assert set(re.findall(r"\w[\w-]*==[\d.]+", cell)) <= set(tpu.PINS) and all(re.fullmatch(r"[\w-]+(\[tpu\])?==[\d.]+", p) for p in tpu.PINS)
    assert tuple(map(int, tpu.PYTHON.split("."))) >= (3, 11)


def test_mount_installs_what_is_missing_and_mounts_once(bench, inside):
    log = f'echo "$(basename $0) $*" >> {bench.folder}/log\n'
    bench.put("bin/sudo", f"#!/bin/sh\n{log}[ \"$1\" != tee ] || cat > /dev/null\ncase \"$*\" in *install*) mkdir -p ~/bin; cp {bench.folder}/gcsfuse ~/bin/;; esac\n")
    bench.put("gcsfuse", f"#!/bin/sh\n{log}touch \"$3/mounted\"\n"), bench.put("bin/mountpoint", "#!/bin/sh\ntest -e \"$2/mounted\"\n")
    bench.put("bin/curl", "#!/bin/sh\necho key\n"), bench.put("bin/lsb_release", "#!/bin/sh\necho jammy\n")
    log = lambda: (bench.folder / "log").read_text().splitlines()
    assert inside("mount", "t", "gs://my-bucket")[0] == 0
    homes = [bench.folder / f"worker{i}" for i in range(2)]
    assert [line for line in log() if "gcsfuse" in line.split()[0]] == [f"gcsfuse --implicit-dirs my-bucket {h}/my-bucket" for h in homes]
    assert sum("apt-get" in line and "install --yes gcsfuse" in line for line in log()) == 2
    (bench.folder / "log").unlink()
    assert inside("mount", "t", "my-bucket")[0] == 0 and not (bench.folder / "log").exists()  # installed and mounted: nothing to do
    assert inside("mount", "t", "my-bucket", "--folder", "~/a b")[0] == 0 and (homes[1] / "a b" / "mounted").exists()
    (homes[1] / "bin" / "gcsfuse").write_text("#!/bin/sh\nexit 9\n")
    assert inside("mount", "t", "other-bucket")[0] == 9


def wait_for(path, seconds=120):
    "The text of a file that is still to come."
    end = time.time() + seconds
    while not path.exists() and time.time() < end: time.sleep(0.05)
    return path.read_text()


def test_training_goes_on_after_the_connection(bench, inside):
    for i in range(2): bench.put(f"worker{i}/flaxdiff-env/bin/flaxdiff-train", '#!/bin/sh\nwhile [ ! -e go ]; do sleep 0.05; done\necho "$@"; echo oh >&2; touch done\n')
    status, said, _ = inside("train", "t", "--", "--out", "my  run")
    assert status == 0
    for i in range(2):
        home = bench.folder / f"worker{i}"
        assert not (home / "done").exists()  # nobody waits for it
        (home / "go").touch()
        wait_for(home / "done", 20)
        assert (home / "flaxdiff-train.log").read_text() == "--out my  run\noh\n"


@pytest.mark.slow
def test_the_real_training_runs_there(bench):
    (bench.folder / "worker0").mkdir()
    (bench.folder / "worker0" / "flaxdiff-env").symlink_to(BIN.parent)
    flags = "--out my_run --steps 2 --batch-size 8 --features 8 --attention-levels 0 --emb-features 16 --quiet".split()
    bench("train", "t", "--", *flags)
    assert json.loads(wait_for(bench.folder / "worker0" / "my_run" / "summary.json"))["steps"] == 2
