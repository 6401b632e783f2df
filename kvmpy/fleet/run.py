# SPDX-License-Identifier: Apache-2.0
"""A run of tests on a fleet: deals them to its hosts, and judges what a lost host costs."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from distributed.comm.core import CommClosedError

from kvmpy.fleet.errors import FleetError
from kvmpy.fleet.fleetfile import Entry
from kvmpy.fleet.launch import Launcher
from kvmpy.fleet.ledger import Ledger
from kvmpy.fleet.members import Host, hint, nobody
from kvmpy.fleet.reports import HostFacts, Outcome
from kvmpy.fleet.session import session
from kvmpy.lab import events
from kvmpy.lab.kernels import Say
from kvmpy.lab.lane import Limits
from kvmpy.lab.listing import Listing
from kvmpy.signals import Interrupter, handled
from kvmpy.testing import labels
from kvmpy.testing.dealer import Begun, DealError
from kvmpy.testing.heartbeat import Heartbeat
from kvmpy.testing.host import HostSummary
from kvmpy.testing.reportfiles import SteadyStream

INTERRUPTED, FAILED = 2, 3
# Seconds until a host that died has to be back: its process, and a machine whose power was switched.
_BOOT_SECONDS = 900.0
_POLL = 0.05


@dataclass(frozen=True)
class Request:
    """What to run, and on which hosts.

    *listing* is pytest's command that finds the tests; *arguments* are those of the sessions. *entries* are
    the hosts that this run starts; *wait* is how long they may take to come, in seconds. *on* are labels that
    a host must have. *book* is the journal; with *resumed* it is an earlier run's.
    """

    paths: tuple[str, ...]
    listing: Sequence[str]
    arguments: Sequence[str]
    seed: int
    matrix: bool
    on: tuple[str, ...]
    entries: Sequence[Entry]
    limits: Limits
    wait: float
    book: Path
    resumed: bool


class FleetRun:
    """One run. The desk's answers go out with the next turn, after all that was said is on the disk."""

    def __init__(self, request: Request, client: Any, folder: Path, certificate: Path, say: Say) -> None:
        self._request = request
        self._client = client
        self._folder = folder
        self._tell = say
        self._stream = SteadyStream(sys.stdout)
        width = (lambda: shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
        self._heartbeat = Heartbeat(self._stream, width)
        self._ledger = Ledger(request.book, self._heartbeat)
        self._hosts: dict[str, Host] = {}
        self._launchers = [
            Launcher(entry, client.scheduler.address, certificate, folder, self._say)
            for entry in request.entries
        ]
        self._acked = 0
        self._answers: list[tuple[str, Any]] = []
        self._over: list[str] = []
        self._has_fleet = False
        self._settled_at = 0.0
        self._started = time.monotonic()

    def _say(self, text: str) -> None:
        self._heartbeat.clear()
        self._tell(text)

    # ---- the run

    def run(self) -> Outcome:
        """Run all, and return what became of it; the journal has the same."""
        status, why = 0, ""
        try:
            with handled(Interrupter(), signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._begin()
                while not self._done():
                    self._turn()
        except KeyboardInterrupt:
            status, why = INTERRUPTED, "told to end while it ran"
        except FleetError as error:
            status, why = FAILED, str(error)
            self._say(why)
        except CommClosedError:
            status, why = FAILED, "the fleet's scheduler died while it ran"
            self._say("the fleet's scheduler is gone; `kvmpy fleet run --resume` goes on")
        except OSError as error:
            status, why = FAILED, f"the run's journal failed while it ran: {error.strerror or error}"
            self._say(f"{self._request.book}: {error.strerror or error}")
        try:
            self._end(why)
        except OSError as error:
            self._say(f"{self._request.book}: {error.strerror or error}")
        finally:
            self.close()
        return Outcome(
            self._ledger.columns,
            [host.facts for host in self._hosts.values()],
            status,
            self._request.seed,
            time.monotonic() - self._started,
        )

    def close(self) -> None:
        """Leave nothing behind."""
        self._heartbeat.clear()
        self._stream.finish()
        for launcher in self._launchers:
            launcher.close()
        self._ledger.book.close()

    def _begin(self) -> None:
        request = self._request
        for launcher in self._launchers:
            launcher.start()
        self._ledger.select(self._listed())
        if request.resumed:
            self._ledger.resume()
        self._ledger.book.write("session", pid=os.getpid(), seed=request.seed, workers=False)
        self._ledger.book.write("selected", ids=list(self._ledger.needs))
        self._ledger.book.sync()
        self._ledger.open_earlier(matrix=request.matrix)
        reply = self._call("begin", client=self._client.id)
        if "refused" in reply:
            raise FleetError(reply["refused"])
        self._has_fleet = True
        self._settled_at = time.monotonic() + request.wait
        for address, about in reply["hosts"].items():
            self._joined(address, about)

    def _listed(self) -> dict[str, dict[str, list[str]]]:
        """Return the tests with their labels, by the name of their file."""
        listing = Listing(self._request.listing, {}, self._folder)
        try:
            while not listing.poll():
                time.sleep(_POLL)
            if (failure := listing.failure()) is not None:
                raise FleetError(failure[0])
            found: dict[str, dict[str, list[str]]] = {}
            for file, tests in listing.needs().items():
                name = next(iter(tests)).partition("::")[0] if tests else file
                found.setdefault(name, {}).update(tests)
            return found
        finally:
            listing.close()

    def _done(self) -> bool:
        held = any(host.hand.shares for host in self._hosts.values())
        return self._settled() and not held and not self._ledger.waiting()

    def _settled(self) -> bool:
        """Whether every host that has joined has told what it is, and no other one is waited for."""
        if any(not host.retired and host.missing is None for host in self._hosts.values()):
            return False
        if time.monotonic() > self._settled_at:
            return True
        return bool(self._hosts) and all(each.entry.name in self._hosts for each in self._launchers)

    def _call(self, name: str, **values: Any) -> dict[str, Any]:
        reply: dict[str, Any] = self._client.sync(getattr(self._client.scheduler, f"kvmpy_{name}"), **values)
        return reply

    def _turn(self) -> None:
        answers, self._answers = self._answers, []
        over, self._over = self._over, []
        reply = self._call("exchange", acked=self._acked, answers=answers, over=over)
        if "refused" in reply:
            raise FleetError(reply["refused"])
        for number, message in reply["said"]:
            if number > self._acked:
                self._take(message)
                self._acked = number
        self._look()
        self._ledger.book.sync()
        self._deal()
        self._heartbeat.tick()

    def _take(self, message: Mapping[str, Any]) -> None:
        if "about" in message:
            self._joined(message["host"], message["about"])
        elif "gone" in message:
            for host in self._hosts.values():
                if host.address == message["gone"]:
                    self._died(host, f"{host.name} died: its worker is gone")
        else:
            said = next((each for each in self._hosts.values() if each.lane == message["lane"]), None)
            if said is not None:
                self._heard(said, message["lines"], message["ended"])

    # ---- hosts

    def _joined(self, address: str, about: Mapping[str, Any]) -> None:
        name = str(about["name"])
        summary = msgspec.convert(about["summary"], HostSummary)
        host = self._hosts.get(name)
        if host is None:
            launcher = next((each for each in self._launchers if each.entry.name == name), None)
            host = self._hosts[name] = Host(name, HostFacts(name, summary), launcher)
            if launcher is not None:
                host.deaths_allowed = launcher.entry.deaths
        elif host.address:
            self._died(host, f"{name} died: it has joined anew")
        host.facts.told(summary, about)
        host.dangerous = bool(about["dangerous"])
        if host.launcher is not None:
            host.launcher.joined = True
        if not host.retired:
            host.address = address
            self._session(host)

    def _session(self, host: Host) -> None:
        """Start a session on a host that is there; the desk knows its lane before it says a word."""
        request = self._request
        host.lane = f"{host.name}-{uuid4().hex[:8]}"
        host.hand.anew()
        host.heard = time.monotonic()
        self._call("open", lane=host.lane)
        spec = {
            "lane": host.lane,
            "paths": list(request.paths),
            "here": str(Path.cwd()),
            "arguments": list(request.arguments),
            "dangerous": host.dangerous,
        }
        host.task = self._client.submit(
            session,
            spec,
            workers=[host.address],
            allow_other_workers=False,
            pure=False,
            key=f"session-{host.lane}",
        )

    def _close_lane(self, host: Host) -> None:
        if host.lane:
            self._over.append(host.lane)
        host.lane, host.task = "", None
        self._heartbeat.idle(host.name)

    def _lose(self, host: Host, reason: str, evidence: str = "") -> bool:
        """The session of a host is lost: give its test the verdict; return whether it is worth another."""
        self._close_lane(host)
        dealer = self._ledger.dealers.get(host.column)
        # One that had nothing to do costs nothing.
        victim = dealer.lose(host.hand) if dealer is not None and host.hand.shares else None
        if victim is None:
            self._say(reason)
        else:
            why = victim.blame(reason)
            self._say(f"{why}, in {victim.test.nodeid}; that test is lost")
            self._ledger.lost(host, victim.test, f"{why}\n{evidence}" if evidence else why)
            host.facts.losses.append(victim.test.nodeid)
        worth = dealer is None or dealer.take_back(host.hand)
        if dealer is None:
            host.hand.vain += 1
            worth = host.hand.vain <= 1
        host.hand.anew()
        return worth

    def _retire(self, host: Host, why: str) -> None:
        """Use a host no longer."""
        self._close_lane(host)
        host.retired = host.facts.retired = why
        self._say(f"{host.name}: {why}: it is not used any more")
        if host.launcher is not None:
            host.launcher.close()

    def _died(self, host: Host, reason: str) -> None:
        """A host is gone: its test is lost, and it may come back."""
        host.address = ""
        host.facts.deaths += 1
        self._lose(host, reason, host.launcher.evidence() if host.launcher is not None else "")
        if host.retired:
            return
        if host.facts.deaths > host.deaths_allowed:
            self._retire(host, f"it died {host.facts.deaths} times")
            return
        powered = host.launcher is not None and bool(host.launcher.entry.power)
        host.back_until = time.monotonic() + (_BOOT_SECONDS if powered else self._request.wait)

    def _hung(self, host: Host, silence: float) -> None:
        address, launcher = host.address, host.launcher
        self._died(host, f"hung: no sign of life of {host.name} for {silence:.0f} s")
        # Whatever becomes of it, nothing that it says counts.
        self._call("dismiss", address=address)
        if host.retired:
            return
        if launcher is None or not launcher.can_cycle():
            self._retire(host, "it hangs, and nothing switches its power")
            return
        try:
            launcher.cycle()
        except FleetError as error:
            self._retire(host, str(error))

    def _look(self) -> None:
        """See who hangs, who does not come back, and which tests nobody can run."""
        now = time.monotonic()
        limits = self._request.limits
        for launcher in self._launchers:
            host = self._hosts.get(launcher.entry.name)
            try:
                launcher.turn()
            except FleetError as error:
                if host is not None and not host.retired:
                    self._retire(host, str(error))
            if not launcher.alive() and (host is None or not (host.retired or host.address)):
                self._say(f"{launcher.entry.name} does not join: {launcher.last_words()}")
                if host is None:
                    host = self._hosts[launcher.entry.name] = Host(
                        launcher.entry.name, HostFacts.unknown(launcher.entry.name), launcher
                    )
                self._retire(host, "it does not join")
        for host in list(self._hosts.values()):
            if host.retired:
                continue
            silence = now - host.heard
            if not host.address:
                if now > host.back_until:
                    self._retire(host, "it did not come back")
            elif host.hand.running is not None:
                if silence > host.hand.running.limit + limits.grace:
                    self._hung(host, silence)
            elif (host.missing is None and silence > limits.boot) or (
                host.hand.shares and silence > max(limits.idle, limits.grace)
            ):
                self._hung(host, silence)
        if self._settled():
            self._withdraw()

    def _withdraw(self) -> None:
        """Give up the tests that no host can run, or none any more."""
        told = [host for host in self._hosts.values() if host.missing is not None and host.wanted]
        if not told:
            asked = f" that has {' and '.join(self._request.on)}" if self._request.on else ""
            raise FleetError(f"no host has joined{asked}")
        for title, dealer in self._ledger.dealers.items():
            own = [host for host in told if not title or host.column == title]
            left = [host.hand.offers for host in own if not host.retired]
            for needs, ids in dealer.queue.withdraw(left):
                if not title and not any(needs <= host.hand.offers for host in told):
                    what = nobody(needs, [host.hand.offers for host in told])
                    self._ledger.skip(title, ids, what, hint(needs, told))
                else:
                    words = title or ", ".join(sorted(map(labels.plain, needs))) or "anything"
                    self._ledger.columns[title].give_up(ids, f"no host left with {words}")

    def _deal(self) -> None:
        active = [host for host in self._hosts.values() if host.address and not host.retired]
        for host in active:
            if host.hand.wants is None or host.missing is None:
                continue
            dealer = self._ledger.dealers[host.column]
            lanes = sum(other.column == host.column for other in active) if dealer.queue else 0
            share = dealer.deal(host.hand, lanes) if lanes else None
            if share is not None:
                self._answers.append((host.lane, share.message(dealer.done)))

    # ---- what a session says

    def _heard(self, host: Host, lines: Sequence[bytes], ended: Mapping[str, str] | None) -> None:
        host.heard = time.monotonic()
        try:
            for line in lines:
                event = events.parse(line)
                take = getattr(self, f"_on_{type(event).__name__.lower()}", None)
                if take is not None:
                    take(host, event)
                if not host.lane:
                    return
        except DealError as error:
            self._restart(host, f"the session of {host.name} is not to be trusted: {error}", "")
            return
        if ended is not None:
            self._restart(host, f"{ended['reason']}, on {host.name}", ended["evidence"])

    def _restart(self, host: Host, reason: str, evidence: str) -> None:
        if self._lose(host, reason, evidence):
            self._session(host)
        else:
            last = evidence.strip().rpartition("\n")[2]
            self._retire(host, f"no session runs on it: {last or reason}")

    def _on_ready(self, host: Host, event: events.Ready) -> None:
        host.hand.ask(event.number)
        if event.number == 1:
            host.hand.wants = None
            asked = sorted({label for needs in self._ledger.needs.values() for label in needs})
            self._answers.append((host.lane, {"labels": asked}))

    def _on_host(self, host: Host, event: events.Host) -> None:
        # Where it runs is not for the session to say.
        known = host.facts.summary
        host.facts.summary = replace(
            event.summary,
            platform=known.platform,
            accelerator=known.accelerator,
            configuration=known.configuration,
        )

    def _on_labels(self, host: Host, event: events.Labels) -> None:
        first = host.missing is None
        host.missing = event.labels
        host.hand.offers = frozenset(label for label, missing in event.labels.items() if not missing)
        if not first:
            return
        facts = host.facts
        facts.labels = sorted(host.hand.offers)
        lacking = [label for label in self._request.on if not host.meets(label)]
        if lacking:
            host.wanted = False
            self._retire(host, f"it has not {' and '.join(lacking)} (--on)")
            return
        key = facts.key()
        facts.title = self._ledger.title(key, facts)
        host.column = facts.title if self._request.matrix else ""
        known = [
            each.facts
            for each in self._hosts.values()
            if each.column == host.column and each.missing is not None
        ]
        about = {
            "key": key,
            "summary": facts.summary_dict(),
            "hosts": {each.name: each.about() for each in known},
        }
        self._ledger.describe(host.column, about)
        if self._request.matrix:
            for needs, ids in self._ledger.dealers[host.column].queue.withdraw([host.hand.offers]):
                lacks = [event.labels.get(label, "") for label in sorted(needs - host.hand.offers)]
                self._ledger.skip(host.column, ids, "; ".join(lacks), host=host)

    def _on_collected(self, host: Host, event: events.Collected) -> None:
        share = host.hand.share(event.number)
        if set(event.ids) - set(share.ids):
            raise DealError(f"share {event.number} has tests that are not in it")
        dealer = self._ledger.dealers[host.column]
        for nodeid in dealer.collected(host.hand, event.number, event.ids):
            file, _, name = nodeid.partition("::")
            self._ledger.failed(host, nodeid, (file, None, name), f"{host.name} does not find this test")
            dealer.done.add(nodeid)

    def _on_start(self, host: Host, event: events.Start) -> None:
        test = Begun(event.nodeid, event.place, event.limit)
        self._ledger.begins(host, test)

    def _on_report(self, host: Host, event: events.Report) -> None:
        report = events.deserialize(event.data, "TestReport")
        if host.hand.running is None or report.nodeid != host.hand.running.nodeid:
            raise DealError(f"a report of {report.nodeid}, which does not run")
        self._ledger.report(host, report)

    def _on_finish(self, host: Host, event: events.Finish) -> None:
        self._ledger.dealers[host.column].ends(host.hand, event.nodeid)
        self._ledger.finish(host, event.nodeid)

    def _on_done(self, host: Host, event: events.Done) -> None:
        self._ledger.dealers[host.column].over(host.hand, event.number)

    def _on_uncollected(self, host: Host, event: events.Uncollected) -> None:
        report = events.deserialize(event.data, "CollectReport")
        self._ledger.uncollected(host, report, event.data)

    # ---- the end

    def _end(self, why: str) -> None:
        """Let everybody go; what still runs is lost, for the reason *why*."""
        failed: OSError | None = None
        for host in self._hosts.values():
            if host.hand.running is not None:
                test = host.hand.running
                host.hand.running = None
                try:
                    self._ledger.lost(host, test, f"{why}, on {host.name}")
                except OSError as error:
                    # The report has it all the same.
                    failed = error
        if failed is not None:
            raise failed
        if not why and not any(column.not_run for column in self._ledger.columns.values()):
            self._ledger.book.write("end")
        self._ledger.book.sync()
        over = [host.lane for host in self._hosts.values() if host.lane]
        for host in self._hosts.values():
            host.lane, host.task = "", None
        if self._has_fleet and self._client.status == "running":
            self._call("exchange", acked=self._acked, answers=[], over=over)
            self._call("finish", client=self._client.id)
