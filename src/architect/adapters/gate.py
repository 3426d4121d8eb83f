"""The traffic gate of one pod: who was last talked to, and what must wait.

Called by architectd, mostly from the thread of its event loop. One gate serves one
network namespace with up to 16 owners (managed containers); it tells when an
owner's declared ports were last used, and while an owner is checkpointed it
holds the packets meant for it, or drops them, so that no client ever sees a
reset. The kernel side is native/bpf/gate.bpf.c; its maps are pinned, so a
daemon that was killed finds modes, ports and times as they were.

Order that loses nothing: set_mode(HOLD), checkpoint; when `fileno` polls
readable, `receive` says whom to wake; restore, set_mode(OPEN), release. The
rules that queue are on each packet's way, so they are there only while an owner
holds, and until `withdraw` after that. The filters of a program that is flooded
with packets can `rest` for some seconds: that it is busy is known by then.
"""

import contextlib
import enum
import os
import threading
import time
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from architect.adapters import bpf, filters, gatemaps, netfilter, netns, nfqueue, shadowports
from architect.adapters.gatemaps import OWNERS, Sleeps
from architect.adapters.holding import Holding, Waiting
from architect.adapters.keepalives import KeepAlives
from architect.decisions.ports import Port, Shadow, Use

HELD_PACKETS = 1024
"""Packets held for one owner in one closing of its gate; the rest is dropped."""
HELD_BYTES = 32 << 20
"""Likewise in bytes: aggregated segments have up to 64 KB each."""
RULE = netfilter.Rule(mark=0x41740000, mask=0xFFFE0000, queue=16754)
"""'At' as mark, so also in gate.bpf.c; 'Ar' as the queue's number."""

_RECEIVE_BUFFER = 8 << 20
_RECEIVE_AT_ONCE = 512
"""Keeps one `receive` below 5 ms; the descriptor stays readable for the rest."""
_PROGRAMS = ("gate_ethernet", "gate_raw", "guard_ethernet", "guard_raw")


class GateError(Exception):
    """The gate could not be opened, changed, read or taken away."""


class GateBusyError(GateError):
    """Another process has this gate's queue: a second daemon, or one still dying."""


class TooManyPortsError(GateError):
    """The pod's containers declare more ports than the gate has room for."""


class Mode(enum.IntEnum):
    """What happens to packets for an owner's declared ports."""

    OPEN = 0
    """They pass."""
    HOLD = 1
    """They wait in the queue for `release`."""
    DROP = 2
    """They vanish as in a congested network; TCP clients repeat them."""


class Activity(NamedTuple):
    """What an owner's ports have seen since the owner appeared."""

    last_ns: int
    """Time of the last packet on CLOCK_MONOTONIC, good to 10 ms; 0 if there was none."""
    packets: int
    """Packets that counted as activity; aggregated segments are one."""
    held: int
    """Of these, how many were put into the queue."""
    dropped: int
    """Packets dropped by mode or by the bound on held ones."""


class Gate:
    """The gate of one network namespace; made by `open`.

    Not for use by several threads at once, but for `withdraw` and `rest`; `open` and `close`
    take up to 0.1 s (programs are verified, iptables is called) and are better
    run in a worker.
    Methods raise GateError, and ValueError for an owner or port out of range.
    """

    def __init__(
        self,
        netns_fd: int,
        pin_dir: Path,
        maps: dict[str, int],
        programs: dict[str, int],
    ) -> None:
        """Take over open descriptors; use `open` instead."""
        self._netns = netns_fd
        self._pins = pin_dir
        self._programs = programs
        self._filters = filters.Filters(
            pin_dir,
            filters.Side.INGRESS,
            ethernet=programs["gate_ethernet"],
            raw=programs["gate_raw"],
        )
        self._guard = filters.Filters(
            pin_dir,
            filters.Side.EGRESS,
            ethernet=programs["guard_ethernet"],
            raw=programs["guard_raw"],
        )
        self._ports = bpf.Map(maps["ports"], gatemaps.KEY, gatemaps.PORT_OWNERS)
        self._mode_masks = bpf.Map(maps["modes"], gatemaps.KEY, gatemaps.MODES)
        self._sleep_masks = bpf.Map(maps["sleeps"], gatemaps.KEY, gatemaps.SLEEPS)
        self._held_counts = bpf.Map(maps["held"], gatemaps.KEY, gatemaps.HELD)
        self._traffic = bpf.PerCpuMap(maps["traffic"], gatemaps.KEY, gatemaps.ACTIVITY)
        self._limits = bpf.Map(maps["limits"], gatemaps.KEY, gatemaps.HELD)
        self.keep_alives = KeepAlives(maps["connections"])
        """Whose probes are answered; for an owner that is absent, until it is open."""
        self._tables = list(maps.values())
        self._holding: Holding | None = None
        self._shadows: list[Shadow] | None = []  # None: there are some of an earlier daemon
        self._pin_names: dict[str, int] = {}
        # Copies of what only we write, so that deciding costs no system call.
        self._port_owners: dict[int, tuple[int, ...]] = {}
        self._masks = dict.fromkeys(Mode, 0)  # mode -> owners; not kept for OPEN
        self._sleeps = Sleeps(0, 0, 0)
        self._lock = threading.Lock()
        self._queueing = False  # the rules are in place; under the lock, as all below
        self._resting = False  # the filters are not in place
        self._guarding = False  # those on the way out are
        self._watched_ns = 0  # when they were put back; CLOCK_MONOTONIC

    @classmethod
    def open(cls, netns: int | Path, pin_dir: Path, program: Path) -> "Gate":
        """Open the gate of a namespace, or take over the one that is there.

        `pin_dir` is this gate's own directory on a bpf file system (whose names
        must not contain dots), made if needed; `program` the compiled object.
        Whatever is missing (maps, filters; rules if an owner holds) is put in
        place; what is there keeps its state. Packets that a killed reader held
        are lost.
        Raises GateBusyError, GateError.
        """
        gate = None
        try:
            for family in netfilter.Family:
                _ = netfilter.probe(family, RULE).backend  # now, not when an owner is to hold
            gate = cls._load(netns, pin_dir, program)
            gate._start()
            gate.repair()
        except nfqueue.QueueBusyError as error:
            raise GateBusyError(f"gate {pin_dir.name}: {error}") from error
        except _CAUSES as error:
            raise GateError(f"cannot open gate {pin_dir.name}: {error}") from error
        else:
            opened, gate = gate, None
            return opened
        finally:
            if gate is not None:
                gate._close()

    @classmethod
    def _load(cls, namespace: int | Path, pin_dir: Path, program: Path) -> "Gate":
        pin_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not bpf.is_bpffs(pin_dir):
            raise GateError(f"{pin_dir} is not on a bpf file system; mount one (ensure_bpffs)")
        # A new release's program replaces the old one but keeps its maps.
        version = f"{zlib.crc32(program.read_bytes()):08x}"
        map_pins = {name: pin_dir / name for name in gatemaps.NAMES}
        program_pins = {name: pin_dir / f"{name}-{version}" for name in _PROGRAMS}
        pins = {**map_pins, **program_pins}
        descriptors: dict[str, int] = {}
        netns_fd = netns.open_netns(namespace)
        try:
            if not all(path.exists() for path in pins.values()):
                for path in program_pins.values():
                    path.unlink(missing_ok=True)
                bpf.load(program, map_pins, program_pins)
            for name, path in pins.items():
                descriptors[name] = bpf.open_pinned(path)
            for path in pin_dir.iterdir():
                if path not in pins.values() and not path.name.startswith(filters.PINS):
                    path.unlink()
        except BaseException:
            for descriptor in [*descriptors.values(), netns_fd]:
                os.close(descriptor)
            raise
        gate = cls(
            netns_fd,
            pin_dir,
            {name: descriptors[name] for name in gatemaps.NAMES},
            {name: descriptors[name] for name in _PROGRAMS},
        )
        gate._pin_names = {path.name: descriptors[name] for name, path in pins.items()}
        return gate

    def _start(self) -> None:
        if self._limits[0] == (0, 0):
            self._limits[0] = (HELD_PACKETS, HELD_BYTES)
        self._port_owners = {key: self._ports[key] for key in self._ports}
        self.keep_alives.find()
        if any(masks[Use.SHADOW] for masks in self._port_owners.values()):
            self._shadows = None
        self._masks[Mode.HOLD], self._masks[Mode.DROP] = self._mode_masks[0]
        self._sleeps = Sleeps(*self._sleep_masks[0])
        # A probe that ran for an earlier daemon is over, or counts.
        self._set_sleeps(self._sleeps._replace(probed=0))
        with netns.entered(self._netns):
            self._holding = Holding(
                RULE, capacity=OWNERS * HELD_PACKETS, buffer_bytes=_RECEIVE_BUFFER
            )
            # A daemon that was killed may have left them.
            found = [self._reach(family) for family in netfilter.Family]
            self._queueing = netfilter.Reach.QUEUED in found
            if not any(self._masks.values()):
                self._guard.take()

    @property
    def _packets(self) -> Holding:
        if self._holding is None:
            raise GateError(f"gate {self._pins.name} is closed")
        return self._holding

    def fileno(self) -> int:
        """Return a descriptor that polls readable when `receive` has work to do."""
        return self._packets.fileno()

    def limit(self, packets: int, size: int) -> None:
        """Set what one owner may have held in one closing: packets, and bytes."""
        try:
            self._limits[0] = (packets, size)
        except bpf.BpfError as error:
            raise GateError(f"cannot set the limits: {error}") from error

    def set_ports(self, owner: int, ports: Collection[Port]) -> None:
        """Declare an owner's ports, in place of those it had.

        A port may belong to several owners; then its packets count for each,
        wait if any of them holds, and are dropped if any of them drops.
        Raises TooManyPortsError; the ports may then be set in part.
        """
        bit = gatemaps.bit(owner)
        wanted: dict[int, Use] = {}
        for port in ports:
            if wanted.setdefault(gatemaps.key(port), port.use) != port.use:
                raise ValueError(f"port {port.number}/{port.protocol} is declared for two uses")
        try:
            for key in self._port_owners.keys() | wanted.keys():
                before = self._port_owners.get(key, (0, 0, 0))
                masks = [mask & ~bit for mask in before]
                if key in wanted:
                    masks[wanted[key]] |= bit
                after = tuple(masks)
                if after == before:
                    continue
                if any(after):
                    self._ports[key] = after
                    self._port_owners[key] = after
                else:
                    del self._ports[key]
                    del self._port_owners[key]
        except bpf.MapFullError as error:
            raise TooManyPortsError(
                f"the pod declares more ports than the gate holds ({len(self._port_owners)}); "
                "declare fewer"
            ) from error
        except bpf.BpfError as error:
            raise GateError(f"cannot set the ports of owner {owner}: {error}") from error

    def ports(self, owner: int) -> list[Port]:
        """Return an owner's declared ports, as set, or as found by `open`."""
        bit = gatemaps.bit(owner)
        return [
            Port(*gatemaps.port_of(key), use)
            for key, masks in sorted(self._port_owners.items())
            for use in Use
            if masks[use] & bit
        ]

    def set_mode(self, owner: int, mode: Mode) -> None:
        """Open or close the gate for an owner, from the next packet on.

        A change of mode gives the owner a fresh allowance of held packets.
        Packets held already stay held until `release`. The first to hold has
        the rules put in place: some milliseconds.
        """
        bit = gatemaps.bit(owner)
        if self.mode(owner) is mode:
            return
        if mode is Mode.OPEN:
            # First: a daemon killed in between must not leave it to the next dump.
            absent, opening, probed = self._sleeps
            self._set_sleeps(Sleeps(absent & ~bit, opening & ~bit, probed))
            self._set_masks(owner, bit, mode)
            return
        with self._lock:
            if mode is Mode.HOLD and not self._queueing:
                # Before the first mark: a marked packet without a rule passes.
                self._put_rules()
            self._put_filters()
            self._put_guard()
            self._set_masks(owner, bit, mode)

    def _set_masks(self, owner: int, bit: int, mode: Mode) -> None:
        masks = {found: owners & ~bit for found, owners in self._masks.items()}
        if mode is not Mode.OPEN:
            masks[mode] |= bit
        self._allow(owner)
        try:
            if mode is Mode.OPEN:
                self.keep_alives.forget(owner)
            self._mode_masks[0] = (masks[Mode.HOLD], masks[Mode.DROP])
        except bpf.BpfError as error:
            raise GateError(f"cannot set the mode of owner {owner}: {error}") from error
        self._masks = masks

    def set_absent(self, owner: int, *, only_opening: bool | None = False) -> None:
        """An owner that is not open has no program any more; until it is open again.

        New connections to its shadow ports are refused from now on, and what does not
        count is dropped; of that which waited, little is kept for the wake. With
        `only_opening` new TCP connections alone wait; other segments of TCP are
        dropped, for an owner that has no connection; None leaves that as it is.
        """
        bit = gatemaps.bit(owner)
        if self.mode(owner) is Mode.OPEN:
            raise ValueError(f"owner {owner} is open")
        absent, opening, probed = self._sleeps
        if only_opening is not None:
            opening = opening | bit if only_opening else opening & ~bit
        self._set_sleeps(Sleeps(absent | bit, opening, probed))
        self._collect(OWNERS * HELD_PACKETS)
        with self._saying():
            hushed = self._packets.hush(bit)
        if hushed:
            self._allow_the_rest(owner)

    def set_present(self, owner: int) -> None:
        """An owner's program is being brought back: nobody is refused any more who would find half of it."""
        self._set_sleeps(self._sleeps._replace(absent=self._sleeps.absent & ~gatemaps.bit(owner)))

    def set_probed(self, owner: int, *, probed: bool) -> None:
        """A probe's command runs in an owner, or no more: what comes over lo does not count meanwhile."""
        bit, mask = gatemaps.bit(owner), self._sleeps.probed
        self._set_sleeps(self._sleeps._replace(probed=mask | bit if probed else mask & ~bit))

    def _set_sleeps(self, masks: Sleeps) -> None:
        if masks == self._sleeps:
            return
        try:
            self._sleep_masks[0] = masks
        except bpf.BpfError as error:
            raise GateError(f"cannot say who sleeps: {error}") from error
        self._sleeps = masks

    def mode(self, owner: int) -> Mode:
        """Return an owner's mode, as set, or as found by `open`."""
        bit = gatemaps.bit(owner)
        return next((mode for mode, owners in self._masks.items() if owners & bit), Mode.OPEN)

    def activity(self, owner: int) -> Activity:
        """Read an owner's counters from the kernel. While the filters rest, the last packet is now."""
        gatemaps.bit(owner)
        try:
            by_cpu = [Activity(*fields) for fields in self._traffic[owner]]
        except bpf.BpfError as error:
            raise GateError(f"cannot read the activity of owner {owner}: {error}") from error
        last, *counts = zip(*by_cpu, strict=True)
        last_ns = time.monotonic_ns() if self._resting else max(*last, self._watched_ns)
        return Activity(last_ns, *map(sum, counts))

    def receive(self) -> int:
        """Take notice of newly held packets; return the mask of their holding owners.

        Does not block. Zero is a valid answer: late packets of an owner that
        is open again are passed on at once, and quiet ones want nobody. Other
        calls take notice too (`release`, `set_absent`, `repair`): call this after
        them, since `fileno` then no longer tells.
        """
        self._collect(_RECEIVE_AT_ONCE)
        return self._packets.woken() & self._masks[Mode.HOLD]

    def _collect(self, limit: int, keep: int = 0) -> None:
        """Read the queue; hold what must wait, or belongs to an owner in `keep`."""
        holding, dropping = self._masks[Mode.HOLD], self._masks[Mode.DROP]
        with self._saying():
            self._packets.collect(limit, holding=holding, dropping=dropping, keep=keep)

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except nfqueue.QueueError as error:
            raise GateError(f"gate {self._pins.name}: {error}") from error

    def release(self, owner: int, accept: bool) -> int:
        """Deliver or drop what is held for an owner, in order of arrival.

        Returns the number of packets that went. A packet that belongs to
        several owners stays until none of them is in mode HOLD, and is dropped
        if another of them is in mode DROP. Accepted packets have passed the
        gate: they go to their sockets even if the owner's mode is still HOLD.
        """
        bit = gatemaps.bit(owner)
        self._collect(OWNERS * HELD_PACKETS, keep=bit)
        with self._saying():
            return self._packets.release(
                bit,
                holding=self._masks[Mode.HOLD],
                dropping=self._masks[Mode.DROP],
                accept=accept,
            )

    def copy(self, *, on: bool) -> None:
        """Whether `copies` returns what is held from now on."""
        with self._saying():
            self._packets.copy(on=on)

    def copies(self, owner: int) -> list[bytes]:
        """Return what is held for an owner and was not returned before, each from its network header on."""
        bit = gatemaps.bit(owner)
        self._collect(OWNERS * HELD_PACKETS, keep=bit)
        return self._packets.copies(bit)

    def waiting(self, owner: int) -> Waiting:
        """Return how much is held for an owner, and for how long."""
        return self._packets.waiting(gatemaps.bit(owner))

    def expire(self, seconds: float) -> int:
        """Drop what has been held for longer; return the mask of the owners that had some.

        Their senders have sent them anew since, or have given up. The owners may have as much
        held anew.
        """
        with self._saying():
            owners = self._packets.expire(seconds)
        for owner in range(OWNERS):
            if owners >> owner & 1:
                self._allow_the_rest(owner)
        return owners

    def _allow_the_rest(self, owner: int) -> None:
        waiting = self.waiting(owner)
        self._allow(owner, waiting.packets + waiting.quiet)

    def _allow(self, owner: int, packets: int = 0) -> None:
        try:
            self._held_counts[owner] = (packets, 0)
        except bpf.BpfError as error:
            raise GateError(f"cannot set the allowance of owner {owner}: {error}") from error

    def drop_owner(self, owner: int) -> None:
        """Forget an owner that has ended: ports, mode, counters, held packets.

        Its packets are dropped; those of several owners stay for the others.
        The number is then free for another container.
        """
        bit = gatemaps.bit(owner)
        self.set_ports(owner, ())
        self.set_mode(owner, Mode.OPEN)
        self.set_probed(owner, probed=False)
        self._collect(OWNERS * HELD_PACKETS, keep=bit)
        with self._saying():
            self._packets.forget(bit, holding=self._masks[Mode.HOLD])
        try:
            self._traffic.clear(owner)
        except bpf.BpfError as error:
            raise GateError(f"cannot clear the activity of owner {owner}: {error}") from error

    def repair(self) -> list[str]:
        """Put back what others took away or what is new, and say what it was.

        Looks for pins, for the filter on every interface, and for the rules if
        they are to be there; takes well below a millisecond when nothing is
        missing.
        """
        repaired: list[str] = []
        try:
            for name, descriptor in self._pin_names.items():
                if not (self._pins / name).exists():
                    self._pins.mkdir(mode=0o700, parents=True, exist_ok=True)
                    bpf.pin(descriptor, self._pins / name)
                    repaired.append(f"pin {name}")
            # The rules first: a filter that marks without them lets packets pass.
            with self._lock, netns.entered(self._netns):
                if self._masks[Mode.HOLD] or self._queueing:
                    repaired += self._repair_rules()
                    self._queueing = True
                lacking = self._filters.put() if not self._resting else []
                if self._guarding or any(self._masks.values()):
                    lacking += self._guard.put()
                    self._guarding = True
                repaired += [f"filter on {name}" for name in dict.fromkeys(lacking)]
        except _CAUSES as error:
            raise GateError(f"cannot repair gate {self._pins.name}: {error}") from error
        return repaired

    def _reach(self, family: netfilter.Family) -> netfilter.Reach:
        def arrived() -> bool:
            self._packets.probe_arrived = False
            self._collect(_RECEIVE_AT_ONCE)
            return self._packets.probe_arrived

        known = map(gatemaps.port_of, self._port_owners)
        avoid = [number for protocol, number in known if protocol == "udp"]
        return netfilter.reach(family, RULE, self.fileno(), arrived, avoid)

    def _put_rules(self) -> None:
        try:
            with netns.entered(self._netns):
                self._repair_rules()
        except _CAUSES as error:
            raise GateError(f"gate {self._pins.name} cannot hold packets: {error}") from error
        self._queueing = True

    def _put_filters(self) -> None:
        if not self._resting:
            return
        # Even if it fails: the owners are then idle in time, and `repair` finds out before one is to hold.
        self._resting = False
        self._watched_ns = time.monotonic_ns()
        try:
            with netns.entered(self._netns):
                self._filters.put()
        except _CAUSES as error:
            raise GateError(f"gate {self._pins.name} cannot watch: {error}") from error

    def _put_guard(self) -> None:
        if self._guarding:
            return
        try:
            with netns.entered(self._netns):
                self._guard.put()
        except _CAUSES as error:
            raise GateError(f"gate {self._pins.name} cannot keep answers: {error}") from error
        self._guarding = True

    @property
    def busy(self) -> bool:
        """Whether a worker is at the gate's rules or filters."""
        return self._lock.locked()

    @property
    def resting(self) -> bool:
        """Whether the filters rest."""
        return self._resting

    def watch(self) -> None:
        """Put the filters back, if they rest."""
        with self._lock:
            self._put_filters()

    def rest(self) -> bool:
        """Take the filters off the packets' way while all owners are open; return whether they are.

        They come back with `watch`, and with the first owner that is not to be
        open. May be called while another thread uses the gate, and is for a
        worker: the kernel waits until no CPU runs the filter any more.
        """
        with self._lock:
            if any(self._masks.values()) or self._holding is None:
                return False
            try:
                with netns.entered(self._netns):
                    self._filters.take()
            except _CAUSES as error:
                raise GateError(f"cannot rest gate {self._pins.name}: {error}") from error
            finally:
                # Whatever was taken away before it failed is put back with the next `watch`.
                self._resting = True
            return True

    def withdraw(self) -> bool:
        """Take the rules away unless an owner holds; return whether they are gone.

        Takes up to 0.1 s, for a worker. May be called while another thread uses
        the gate: one that then wants to hold waits.
        """
        with self._lock:
            if self._masks[Mode.HOLD] or self._holding is None or self._holding:
                return False
            try:
                with netns.entered(self._netns):
                    if self._guarding and not any(self._masks.values()):
                        self._guard.take()
                        self._guarding = False
                    for family in netfilter.Family if self._queueing else ():
                        netfilter.remove(netfilter.probe(family, RULE).backend, family, RULE)
            except _CAUSES as error:
                raise GateError(
                    f"cannot take rules from gate {self._pins.name}: {error}"
                ) from error
            self._queueing = False
            return True

    def _repair_rules(self) -> list[str]:
        repaired = []
        for family in netfilter.Family:
            reached = self._reach(family)
            if reached is netfilter.Reach.QUEUED:
                continue
            backend = netfilter.probe(family, RULE).backend
            if reached is netfilter.Reach.UNKNOWN and netfilter.present(backend, family, RULE):
                continue
            netfilter.install(backend, family, RULE)
            if self._reach(family) is netfilter.Reach.DELIVERED:
                raise GateError(
                    f"the {family.value} rule of {backend.value} does not queue packets; "
                    "does another mangle rule change their mark?"
                )
            repaired.append(f"{family.value} rule")
        return repaired

    def keep_shadows(self, shadows: Collection[Shadow]) -> list[str]:
        """Have exactly these shadow ports; say what of them somebody else had taken away.

        Calls nft or iptables, so it is for a worker, and for one at a time.
        """
        wanted = sorted(set(shadows))
        repaired = []
        try:
            with netns.entered(self._netns):
                for family in netfilter.Family if wanted or self._shadows != [] else ():
                    backend = shadowports.backend(family)
                    if backend is None:
                        continue
                    if wanted and shadowports.present(backend, family, wanted):
                        continue
                    shadowports.put(backend, family, wanted)
                    if wanted == self._shadows:
                        repaired.append(f"{family.value} shadow ports")
        except _CAUSES as error:
            raise GateError(f"gate {self._pins.name}: {error}") from error
        self._shadows = wanted
        return repaired

    def close(self, *, remove: bool) -> None:
        """Give the gate up; with `remove` also take it away, letting all packets pass.

        Without it everything stays for the next `open`, but for the packets
        that are held: the kernel drops them with the queue. The clsact qdisc
        stays in any case, since others may have filters there.
        """
        try:
            if remove:
                self._remove()
        except _CAUSES as error:
            raise GateError(f"cannot remove gate {self._pins.name}: {error}") from error
        finally:
            self._close()

    def _remove(self) -> None:
        for owner in range(OWNERS):
            self.set_mode(owner, Mode.OPEN)
        self._collect(OWNERS * HELD_PACKETS, keep=~RULE.mask)
        self._packets.release_all()
        with netns.entered(self._netns):
            self._filters.take()
            self._guard.take()
            for family in netfilter.Family:
                # All that work: an earlier daemon may have preferred another.
                for backend in netfilter.probe(family, RULE).backends:
                    netfilter.remove(backend, family, RULE)
        # Links of interfaces that are gone are among them.
        for pin in list(self._pins.iterdir()):
            pin.unlink()
        self._pins.rmdir()
        self.keep_shadows([])

    def _close(self) -> None:
        if self._holding is None and not self._programs:
            return
        with self._lock:
            if self._holding is not None:
                self._holding.close()
                self._holding = None
        for descriptor in [*self._tables, *self._programs.values(), self._netns]:
            os.close(descriptor)
        self._programs = {}


_CAUSES = (
    bpf.BpfError,
    netfilter.NetfilterError,
    netns.NetnsError,
    nfqueue.QueueError,
    OSError,
)
