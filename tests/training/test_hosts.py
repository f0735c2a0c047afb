"""Runs on two hosts: two network namespaces on this machine, joined by one virtual cable."""

import os
import subprocess
from pathlib import Path

import pytest
from runs import SMALL, Done, check_same, children, command, finish, run, send, start, until

pytestmark = pytest.mark.slow


@pytest.fixture
def hosts():
    """Names and addresses of the two hosts. Skips the test where namespaces can't be made."""
    names = [f"dreambooth-{os.getpid()}-{i}" for i in range(2)]
    addresses = ["10.77.0.1", "10.77.0.2"]

    def ip(*words: str) -> None:
        try:
            done = subprocess.run(["ip", *words], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("iproute2 is not installed here")
        if done.returncode:
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def base(saved, photographs) -> tuple:
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL)


def start_on_both(hosts, arguments: tuple, folders: list[Path], *torchrun: str) -> list[subprocess.Popen]:
    """Starts one process on each host, each in its own folder."""
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0][1]}:29400", "--rdzv-id", "two"]
    started = []
    for (name, address), folder in zip(hosts, folders, strict=True):
        first = f"is_host={int(address == hosts[0][1])}"  # torchrun can't tell without a name server
        line = command(arguments, 1, [*torchrun, *meeting, "--local-addr", address, "--rdzv-conf", first])
        line = ["ip", "netns", "exec", name, *line]
        started.append(start(line, folder, GLOO_SOCKET_IFNAME="cable"))
    return started


def on_both(hosts, arguments: tuple, folders: list[Path]) -> list[Done]:
    """Runs one process on each host to its end."""
    started = start_on_both(hosts, arguments, folders)
    return [finish(process, folder) for process, folder in zip(started, folders, strict=True)]


def test_two_hosts_give_the_result_of_one(hosts, base, tmp_path):
    base = (*base, "--gradient-accumulation-steps", 2, "--checkpointing-steps", 2, "--output-dir")
    folders = [tmp_path / "host0", tmp_path / "host1"]
    done = on_both(hosts, (*base, tmp_path / "two"), folders)
    assert [host.status for host in done] == [0, 0], done
    run(command([*base, tmp_path / "one"], 2), tmp_path)
    check_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_killed_on_one_host_restarts_the_run_on_both(victim, hosts, base, tmp_path):
    base = (*base, "--max-train-steps", 60, "--checkpointing-steps", 3, "--checkpoints-total-limit", 2, "--output-dir")
    folders = [tmp_path / "host0", tmp_path / "host1"]
    started = start_on_both(hosts, (*base, tmp_path / "two"), folders, "--max-restarts", "3")
    until((tmp_path / "two" / "checkpoints" / "checkpoint-000006").exists, started[0])
    send(children(started[victim].pid)[0], "SIGKILL")
    done = [finish(process, folder) for process, folder in zip(started, folders, strict=True)]
    assert [host.status for host in done] == [0, 0], done
    assert any("resuming from" in host.out for host in done)
    run(command([*base, tmp_path / "one"], 2), tmp_path)
    check_same(tmp_path / "two", tmp_path / "one")


def test_both_hosts_report_what_one_of_them_lacks(hosts, base, photographs, tmp_path):
    """The second host does not have the photographs. The first host does not wait for it."""
    (tmp_path / "host0").mkdir()
    photographs.rename(tmp_path / "host0" / "photographs")
    arguments = (*base, "--instance-data-dir", "photographs", "--output-dir", tmp_path / "two")
    done = on_both(hosts, arguments, [tmp_path / "host0", tmp_path / "host1"])
    assert all(host.status != 0 for host in done)
    assert all("photographs is not a folder" in host.complaint for host in done)
    assert not (tmp_path / "two").exists()
