#!/usr/bin/env python3
"""Two hosts on one GlusterFS volume: what is stored, seen, lost and waited for when hosts, bricks and links fail.

usage: tests/hosts/gluster.py [--short] [--dir DIR] [--python PYTHON] [--keep-logs]
   --short      leaves out bricks that stop answering and a link that is cut, which wait for time-outs of GlusterFS
   --dir        where the bricks are made; removed again (default: the temporary directory)
   --python     the Python that has tokendepot (default: the one that runs this)
   --keep-logs  leaves the directory

Needs root, /dev/fuse and Debian's glusterfs-server, glusterfs-client and iproute2; where one is missing it says so in one
line and ends with exit code 0. Everything runs in mount, network and process namespaces of its own, so that nothing of
the machine is touched and nothing is left: a bridge, two "hosts" (network namespaces, each with its own mount of the
volume and its own depot processes) and a replicated volume of two bricks. DIR must allow trusted extended attributes
(ext4, xfs, tmpfs). Prints one table; the last line is `HOSTS rows N wrong 0 lost 0 hangs 0`. Exit code 1 if a row failed.
"""

import argparse
import contextlib
import json
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "python"))

from metadata import A_CHUNK, strace_works, traced  # noqa: E402 found by the line above

TOOLS = ("glusterd", "gluster", "glusterfs", "glusterfsd", "ip", "unshare", "nsenter")
PING_TIMEOUT_S = 14  # GlusterFS's own default is 42: operations on a brick that is gone hang for so long
LOCKS_FREE_S = 5  # of a host that has gone: when its server gives up a connection that says nothing
OPTIONS = {
    "network.ping-timeout": PING_TIMEOUT_S,
    "server.tcp-user-timeout": LOCKS_FREE_S,
    # When and how often it asks where nothing is under way; how often in vain, server.keepalive-count, does not count beside the above.
    "server.keepalive-time": 2,
    "server.keepalive-interval": 1,
}
CLOSE_S = 12.0  # the depot's patience is 10
LOAD_TIMEOUT_S = 3.0
GRACE_S = 5.0  # for a busy machine; what hangs takes as long as GlusterFS or for ever
CHUNKS = 8  # of a prompt, as in host.py
SERVER = "10.77.0.1"
GLUSTERD_PORT = 24007
HOSTS = {"a": "10.77.0.2", "b": "10.77.0.3"}


def missing():
    if os.geteuid() != 0:
        return "not root"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no /dev/fuse"
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"no {tool}"
    probe = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "ip", "link", "add", "td0", "type", "bridge"],
        capture_output=True,
        text=True,
    )
    if probe.returncode != 0:
        return "namespaces and bridges are not permitted"
    return None


def run(*command, **how):
    return subprocess.run(command, check=True, capture_output=True, text=True, **how)


class Volume:
    """glusterd, two bricks and one mount a host, all inside the namespaces of this process."""

    def __init__(self, base):
        self.base = base
        run("mount", "--make-rprivate", "/")
        run("mount", "-t", "tmpfs", "none", "/run")
        for path in ("/run/netns", "/run/gluster"):
            os.makedirs(path)
        for inside, name in (("/var/lib/glusterd", "state"), ("/var/log/glusterfs", "log")):
            (base / name).mkdir()
            os.makedirs(inside, exist_ok=True)
            run("mount", "--bind", str(base / name), inside)
        self.network()
        self.daemon = subprocess.Popen(["glusterd", "-N"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.until(lambda: subprocess.run(["gluster", "volume", "info"], capture_output=True).returncode == 0)
        bricks = []
        for name in ("brick1", "brick2"):
            (base / name).mkdir()
            bricks.append(f"{SERVER}:{base / name}/data")
        run("gluster", "--mode=script", "volume", "create", "depot", "replica", "2", *bricks, "force")
        for option, value in OPTIONS.items():
            run("gluster", "--mode=script", "volume", "set", "depot", option, str(value))
        run("gluster", "--mode=script", "volume", "start", "depot")
        self.clients = {}
        for host in HOSTS:
            self.mount(host)

    def network(self):
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "br0", "type", "bridge")
        run("ip", "addr", "add", SERVER + "/24", "dev", "br0")
        run("ip", "link", "set", "br0", "up")
        for host, address in HOSTS.items():
            run("ip", "netns", "add", host)
            run("ip", "link", "add", "v" + host, "type", "veth", "peer", "name", "eth0", "netns", host)
            run("ip", "link", "set", "v" + host, "master", "br0", "up")
            inside = f"ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up"
            run("nsenter", f"--net=/run/netns/{host}", "sh", "-c", inside)

    @staticmethod
    def until(true, timeout=20.0):
        end = time.monotonic() + timeout
        while not true():
            if time.monotonic() > end:
                raise TimeoutError("GlusterFS did not become ready")
            time.sleep(0.1)

    def at(self, host):
        return self.base / ("mount-" + host)

    def mount(self, host):
        self.at(host).mkdir(exist_ok=True)
        self.until(lambda: self.reaches_the_server(host))  # the client ends when its first connection fails
        client = ["glusterfs", "-N", f"--volfile-server={SERVER}", "--volfile-id=depot", str(self.at(host))]
        self.clients[host] = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{host}", *client], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.until(lambda: os.path.ismount(self.at(host)))

    @staticmethod
    def reaches_the_server(host):
        connect = f"import socket; socket.create_connection(('{SERVER}', {GLUSTERD_PORT}), 1)"
        command = ["nsenter", f"--net=/run/netns/{host}", sys.executable, "-c", connect]
        return subprocess.run(command, capture_output=True).returncode == 0

    def kill_host(self, host):
        """The client process goes without a word, as the whole machine would: its kernel cannot close the connections."""
        self.link(host, "down")
        self.clients[host].kill()
        self.clients[host].wait()
        subprocess.run(["umount", "-l", str(self.at(host))], capture_output=True)

    def link(self, host, state):
        run("ip", "link", "set", "v" + host, state)

    def brick_pids(self):
        """Process ids of the bricks, in order."""
        found = {}
        for process in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"glusterfsd") and b"--brick-name" in words:
                    found[words[words.index(b"--brick-name") + 1]] = int(process.name)
        return [found[name] for name in sorted(found)]

    def kill_brick(self, number):
        pid = self.brick_pids()[number]
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)  # orphans come to the first process of a namespace; glusterd takes a zombie for alive

    def restart_bricks(self):
        def both_run():
            run("gluster", "--mode=script", "volume", "start", "depot", "force")
            return len(self.brick_pids()) == 2

        self.until(both_run)

    def heal_pending(self):
        entries = run("gluster", "volume", "heal", "depot", "info", "summary").stdout
        counts = [line.split(":")[1].strip() for line in entries.splitlines() if line.startswith("Total Number")]
        # A brick that is not connected yet has "-".
        return sum(map(int, counts)) if len(counts) == 2 and all(map(str.isdigit, counts)) else -1


class Process:
    """One depot process of a host (host.py)."""

    def __init__(self, python, volume, host, name="depot", capacity="1GiB", eviction_grace_ms=3000):
        root = str(volume.at(host) / name)
        self.log = (volume.base / f"host-{host}.log").open("a")
        self.child = subprocess.Popen(
            [python, str(HERE / "host.py"), root, capacity, str(LOAD_TIMEOUT_S), str(eviction_grace_ms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.answers = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()
        self.opened = self.answer(60)

    def read(self):
        for line in self.child.stdout:
            self.answers.put(json.loads(line))
        self.answers.put(None)

    def send(self, do, **what):
        self.child.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self.child.stdin.flush()

    def answer(self, timeout=60.0):
        """None: the process died or did not answer in time."""
        try:
            return self.answers.get(timeout=timeout)
        except queue.Empty:
            return None

    def ask(self, do, timeout=60.0, **what):
        self.send(do, **what)
        return self.answer(timeout)

    def kill(self):
        self.child.kill()
        self.child.wait()


class Table:
    def __init__(self):
        self.rows = self.wrong = self.lost = self.hangs = self.failed = 0

    def row(self, name, good, text, wrong=0, lost=0, hang=False):
        self.rows += 1
        self.wrong += wrong
        self.lost += lost
        self.hangs += hang
        ok = good and wrong == 0 and lost == 0 and not hang
        self.failed += not ok
        print(f"{name:58} {'ok' if ok else 'FAILED':7} {text}", flush=True)


class Trials:
    def __init__(self, volume, python, table):
        self.volume, self.python, self.table = volume, python, table
        self.known = []  # prompts acknowledged as a whole
        self.next_prompt = 0
        self.a = self.b = None

    def open(self, host):
        process = Process(self.python, self.volume, host)
        if process.opened is None:
            raise RuntimeError(f"host {host} did not open its depot")
        return process

    def fresh(self, count):
        self.next_prompt += count
        return list(range(self.next_prompt - count, self.next_prompt))

    def note(self, prompts, answer):
        """Remembers what was acknowledged; returns how many chunks were."""
        if answer is None:
            return 0
        self.known += [p for p, chunks in zip(prompts, answer["acknowledged"], strict=True) if chunks == CHUNKS]
        return sum(answer["acknowledged"])

    def store(self, process, count, timeout=60.0):
        prompts = self.fresh(count)
        answer = process.ask("store", timeout, prompts=prompts)
        return self.note(prompts, answer), answer

    def both_write(self):
        self.a, self.b = self.open("a"), self.open("b")
        opened = self.a.opened
        prompts = {host: self.fresh(40) for host in "ab"}
        self.a.send("store_all", prompts=prompts["a"])
        self.b.send("store_all", prompts=prompts["b"])
        chunks = 0
        for host, process in (("a", self.a), ("b", self.b)):
            chunks += self.note(prompts[host], process.answer(120))
        self.table.row(
            "both hosts store at once",
            chunks == 80 * CHUNKS,
            f"{chunks} chunks; transport {opened['transport']}, open {opened['open_s']:.1f} s",
        )

    def seen(self):
        """From the acknowledgement on one host to the look-up that finds it on the other."""
        times = []
        for _ in range(8):
            prompt = self.fresh(1)
            self.b.send("await", prompts=prompt, s=10)
            acknowledged = self.a.ask("store", prompts=prompt)
            at = time.time()
            answer = self.b.answer()
            self.note(prompt, acknowledged)
            times.append(max(0.0, answer["at"] - at) if answer["seen"] == CHUNKS else 10.0)
        usual = sorted(times)[len(times) // 2]
        self.table.row(
            "a chunk of one host is seen by the other",
            usual <= 1.0 and max(times) < 10.0,
            f"after {usual:.2f} s of 1 s, slowest {max(times):.2f} s",
        )

    def all_exact(self, name, process, least=None, extra=""):
        """Every acknowledged prompt is looked up and loaded; what was stored last has a second to be seen."""
        process.ask("await", prompts=self.known, s=1.0)
        answer = process.ask("load", 120, prompts=self.known)
        if answer is None:
            self.table.row(name, False, "no answer", hang=True)
            return
        wanted = len(self.known) * CHUNKS if least is None else least
        lost = max(0, wanted - answer["loaded"])
        self.table.row(
            name,
            True,
            f"{answer['loaded']} of {len(self.known) * CHUNKS} chunks byte for byte, slowest prompt {answer['longest_s']:.2f} s{extra}",
            wrong=answer["wrong"],
            lost=lost,
        )

    def capacity_holds(self):
        """Both make segments in a small root, each knowing by the notes of the other's keeper what there is."""
        processes = [Process(self.python, self.volume, host, "small", "64MiB", 0) for host in "ab"]
        segments = self.volume.base / "brick1" / "data" / "small" / "segments"
        for process in processes:
            process.send("store_all", prompts=self.fresh(150))
        most, end = 0, time.monotonic() + 120
        while any(process.answers.empty() for process in processes) and time.monotonic() < end:
            with contextlib.suppress(FileNotFoundError):  # recycled while it was looked at
                most = max(most, sum(file.stat().st_size for file in segments.iterdir()))
            time.sleep(0.02)
        answers = [process.answer(1) for process in processes]
        stored = [sum(answer["acknowledged"]) if answer else 0 for answer in answers]
        evicted = [process.ask("stats")["stats"]["roots"][0]["evicted_segments"] for process in processes]
        self.table.row(
            "both fill a root: its capacity holds",
            most <= 64 << 20 and min(evicted) > 0,
            f"{most >> 20} of 64 MiB, {stored} chunks, {evicted} segments evicted",
            hang=None in answers,
        )
        for process in processes:
            process.kill()

    def metadata(self):
        """What one client asks of the volume, as tests/python/test_metadata_operations.py has it of a disk."""
        if not strace_works():
            print("metadata operations: not here, strace is missing or ptrace is forbidden")
            return
        _, phases = traced(self.volume.at("a") / "traced", self.volume.base / "trace", python=self.python)
        for doing, phase in zip(("stored", "loaded"), phases, strict=True):
            self.table.row(f"metadata operations while one client {doing}", phase.a_chunk <= A_CHUNK, str(phase))

    def process_killed(self):
        prompts = self.fresh(200)
        self.a.send("store", prompts=prompts)
        time.sleep(0.7)
        self.a.kill()
        begin = time.monotonic()
        self.a = self.open("a")
        self.all_exact(
            "a process is killed while it stores; it starts again", self.a, extra=f"; open {time.monotonic() - begin:.1f} s"
        )
        chunks, _ = self.store(self.a, 5)
        self.table.row("it stores again", chunks == 5 * CHUNKS, f"{chunks} chunks")

    def brick_killed(self):
        self.volume.kill_brick(0)
        self.all_exact("one of two bricks is killed: loads", self.b)
        chunks, answer = self.store(self.b, 20)
        slow = "" if answer is None else f", {answer['s']:.2f} s"
        self.table.row("stores meanwhile", chunks == 20 * CHUNKS, f"{chunks} chunks{slow}", hang=answer is None)
        self.volume.restart_bricks()
        begin = time.monotonic()
        while self.volume.heal_pending() != 0 and time.monotonic() - begin < 40:
            time.sleep(0.5)
        healed = time.monotonic() - begin
        self.volume.kill_brick(1)
        self.all_exact("it comes back and heals; then the other one is killed", self.a, extra=f"; healed in {healed:.1f} s")
        self.volume.restart_bricks()
        time.sleep(2)

    def bricks_stopped(self):
        """Nothing answers and nothing says so: loads end by their deadline, look-ups do not notice."""
        other = self.open("b")
        pids = self.volume.brick_pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        answer = self.b.ask("lookup", 10, prompts=self.known[:20])
        found = 0 if answer is None else sum(answer["found"])
        self.table.row(
            "all bricks stop answering: look-ups",
            found == 20 * CHUNKS,
            "no answer" if answer is None else f"20 prompts in {answer['s'] * 1e3:.1f} ms",
            hang=answer is None,
        )
        answer = self.b.ask("load", 30, prompts=self.known[:1])
        self.table.row(
            "loads",
            answer is not None and answer["longest_s"] < LOAD_TIMEOUT_S + GRACE_S,
            "no answer" if answer is None else f"{answer['loaded']} loaded, back after {answer['longest_s']:.2f} s of {LOAD_TIMEOUT_S} s",
            hang=answer is None,
        )
        # The first ones wait until the journal's lock is too old to append, the last one for space in a segment.
        prompts = self.fresh(3)
        self.a.send("store", prompts=prompts)
        begin = time.monotonic()
        answer = other.ask("close", 60)
        took = time.monotonic() - begin
        other.kill()
        self.table.row(
            "a process closes", answer is not None and took < CLOSE_S + GRACE_S, f"after {took:.1f} s of {CLOSE_S} s", hang=answer is None
        )
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        answer = self.a.answer(90)
        self.note(prompts, answer)
        self.table.row(
            "stores do not hold up the engine",
            answer is not None and answer["gathered_s"] < GRACE_S,
            "no answer" if answer is None else f"for {answer['gathered_s']:.2f} s of {GRACE_S} s at most",
            hang=answer is None,
        )
        time.sleep(PING_TIMEOUT_S / 2 + 3)
        for name, host in (("a", self.a), ("b", self.b)):
            chunks, _ = self.store(host, 5)
            self.table.row(f"they answer again: host {name} stores", chunks == 5 * CHUNKS, f"{chunks} chunks")
        time.sleep(1)
        restarted = self.restart("a")
        self.all_exact("a new process loads everything", restarted)

    def restart(self, host):
        old = getattr(self, host)
        answer = old.ask("close", 60)
        if answer is None:
            self.table.row(f"host {host} closes", False, "no answer", hang=True)
            old.kill()
        setattr(self, host, self.open(host))
        return getattr(self, host)

    def partition(self):
        self.volume.link("a", "down")
        begin = time.monotonic()
        answer = self.a.ask("load", 60, prompts=self.known[:2])
        took = time.monotonic() - begin
        bound = 2 * (LOAD_TIMEOUT_S + GRACE_S)
        self.table.row(
            "host a is cut off: its loads are misses in time",
            answer is not None and took < bound,
            f"back after {took:.1f} s of {bound:.1f} s",
            wrong=0 if answer is None else answer["wrong"],
            hang=answer is None,
        )
        chunks, _ = self.store(self.b, 10)
        self.table.row("host b goes on storing", chunks == 10 * CHUNKS, f"{chunks} chunks")
        begin = time.monotonic()
        self.b.kill()
        self.b = self.open("b")  # may take over what it finds unlocked: a's journal, if its lock has gone
        self.table.row("host b starts again meanwhile", True, f"open {time.monotonic() - begin:.1f} s")
        time.sleep(max(0.0, PING_TIMEOUT_S + 8 - took))
        self.volume.link("a", "up")
        time.sleep(8)
        stored = []
        for process in (self.a, self.b, self.a, self.b):
            stored.append(self.store(process, 5)[0])
        self.table.row("the link comes back: both store", min(stored) == 5 * CHUNKS, f"{stored} chunks")
        time.sleep(1)
        self.all_exact("host b loads everything", self.b)
        self.all_exact("host a loads everything", self.restart("a"))

    def host_killed(self):
        """At the worst moment: while it stores, and while its keeper has the lock without which nobody makes segments."""
        held = self.a.ask("hold_keeper_lock")
        self.a.send("store", prompts=self.fresh(200))
        time.sleep(0.7)
        begin = time.monotonic()
        self.volume.kill_host("a")
        self.a.kill()
        chunks, _ = self.store(self.b, 2)
        self.table.row("host a dies silently while it stores: host b stores", chunks == 2 * CHUNKS, f"{chunks} chunks")
        segments = self.b.ask("stats")["stats"]["roots"][0]["segments"]
        wanted = segments + 3  # the one that is filled, a next one that was ready, and one that needed the lock
        took = 0.0
        while segments < wanted and took < 10 * LOCKS_FREE_S:
            prompts = self.fresh(4)
            self.note(prompts, self.b.ask("store_all", prompts=prompts))
            segments = self.b.ask("stats")["stats"]["roots"][0]["segments"]
            took = time.monotonic() - begin
        self.table.row(
            "host b takes over the keeper's lock that it held",
            held is not None and segments >= wanted and took < LOCKS_FREE_S + GRACE_S,
            f"makes segments again after {took:.1f} s of {LOCKS_FREE_S} s, on a busy machine {LOCKS_FREE_S + GRACE_S:.0f} s",
        )
        self.volume.link("a", "up")
        self.volume.mount("a")
        begin = time.monotonic()
        self.a = self.open("a")
        self.all_exact("host a comes back and loads everything", self.a, extra=f"; open {time.monotonic() - begin:.1f} s")
        self.all_exact("host b does, too", self.b)

    def end(self):
        for process in (self.a, self.b):
            if process is not None:
                process.kill()


def inside(arguments):
    base = pathlib.Path(arguments.dir)
    table = Table()
    volume = Volume(base)
    trials = Trials(volume, arguments.python, table)
    print(run("gluster", "--version").stdout.splitlines()[0] + f", replica 2, network.ping-timeout {PING_TIMEOUT_S} s")
    try:
        trials.both_write()
        trials.seen()
        trials.all_exact("each loads what the other stored", trials.a)
        trials.capacity_holds()
        trials.metadata()
        trials.process_killed()
        trials.brick_killed()
        if not arguments.short:
            trials.bricks_stopped()
            trials.partition()
        trials.host_killed()
    finally:
        trials.end()
    print(f"HOSTS rows {table.rows} wrong {table.wrong} lost {table.lost} hangs {table.hangs}")
    return 1 if table.failed else 0


def main():
    parser = argparse.ArgumentParser(usage=__doc__.partition("usage: ")[2].partition("\n\n")[0])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--dir")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--keep-logs", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        sys.exit(inside(arguments))
    reason = missing()
    if reason is not None:
        print(f"HOSTS skipped: {reason}")
        return
    base = tempfile.mkdtemp(prefix="tokendepot-hosts-", dir=arguments.dir)
    again = [sys.executable, __file__, "--inside", "--dir", base, "--python", arguments.python]
    again += ["--short"] if arguments.short else []
    # The process namespace ends everything in it when this script ends, however it ends.
    done = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", *again])
    if arguments.keep_logs:
        print(f"logs: {base}")
    else:
        shutil.rmtree(base, ignore_errors=True)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
