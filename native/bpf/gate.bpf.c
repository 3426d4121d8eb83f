// The traffic gate: sees every packet that comes in on an interface of one
// pod's network namespace, remembers when a declared port was last used, and
// holds or drops packets whose container is not there to take them.
//
// Loaded and attached (tc clsact ingress) by src/architect/adapters/gate.py,
// which owns the maps' contents; the structs below are repeated there.
//
// Why the mark and not a verdict: tc cannot queue a packet to user space. The
// mark is matched by one permanent rule in mangle PREROUTING, which hands the
// packet to an NFQUEUE before routing and before early demultiplexing can tie
// it to a socket that is about to disappear.
//
// Only UAPI headers, no CO-RE: one object file serves every kernel >= 5.12
// (atomic fetch-and-add).

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/if_packet.h>

#define SEC(name) __attribute__((section(name), used))
#define inline_always static inline __attribute__((always_inline))

// The BTF encoding of map definitions that libbpf reads.
#define __uint(name, val) int(*name)[val]
#define __type(name, val) __typeof__(val) *name

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define net16(x) ((__u16)__builtin_bswap16(x))
#else
#define net16(x) ((__u16)(x))
#endif

static void *(*const map_lookup)(void *map, const void *key) =
	(void *)BPF_FUNC_map_lookup_elem;
static __u64 (*const ktime_get_coarse_ns)(void) =
	(void *)BPF_FUNC_ktime_get_coarse_ns;
static long (*const load_bytes)(const void *ctx, __u32 offset, void *to,
				__u32 len) = (void *)BPF_FUNC_skb_load_bytes;

#define OWNERS 16
#define MARK 0x41740000u // "At", the owners' mask in the low half
#define MARK_MASK 0xfffe0000u
#define QUIET 0x00010000u // the packet waits, but nobody is to be woken for it
#define MAX_PORTS 1024
// Carried by the packets that CRIU sends over lo, in a peer's name, to put a
// restored socket into a half-closed state (SOCCR_MARK in its soccr/soccr.h).
// Held, they would arrive after the socket has been given to its program.
#define CRIU_MARK 0xC114
// Carried by what health-check-proxy sends to its pod's program over lo: DSCP 23, of
// the pool for local use (RFC 2474), which needs no privilege to set. Believed on lo only.
#define PROBE_CLASS 0x5c
#define CLASS_MASK 0xfc // without the two bits of ECN (RFC 3168)
// Set on what goes to a shadow port over lo, which is translated before it comes here
// (src/architect/adapters/shadowports.py).
#define SHADOW_MARK 0x41730000u // "As"
#define LOOPBACK_INDEX 1 // of lo, in every network namespace
// RFC 8200 knows seven extension headers, and no sane packet repeats them.
#define MAX_EXTENSIONS 7

struct port_owners { // masks of owners; key is protocol << 16 | port
	__u32 activity; // the port's packets count and can be held
	__u32 ignored;	// they do not count; held in transitions, else dropped unless open
	__u32 shadow;	// as ignored, but without a program an opening SYN passes
};

// Masks of owners; the gate is open for those in neither. As masks, not one
// entry an owner: a loop that collects them has too many paths to verify.
struct modes {
	__u32 holding;
	__u32 dropping;
};

// What else holds for owners that are not open. A map of its own: the modes' layout
// is that of gates which older releases have pinned.
struct sleep {
	__u32 absent;  // no program is there: a shadow port's opening SYN is refused,
		       // and what does not count is dropped
	__u32 opening; // of TCP, opening SYNs alone are held; the rest is dropped
	__u32 probed;  // a probe's command runs: what comes over lo does not count
};

struct held { // since the owner's mode was last set
	__u64 packets;
	__u64 bytes;
};

struct activity {
	__u64 last_ns; // CLOCK_MONOTONIC_COARSE
	__u64 packets;
	__u64 held;
	__u64 dropped;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct port_owners);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct modes);
} modes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sleep);
} sleeps SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, OWNERS);
	__type(key, __u32);
	__type(value, struct held);
} held SEC(".maps");

// One value a CPU: a busy program's packets come in on several, and would fight
// for the cache line.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, OWNERS);
	__type(key, __u32);
	__type(value, struct activity);
} traffic SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct held); // most for one owner in one closing of its gate
} limits SEC(".maps");

// TC_ACT_UNSPEC leaves the decision to the filters after ours, if any.
#define PASS TC_ACT_UNSPEC

// The verifier keeps the bound of a loop variable only while no helper is given
// its address, hence the copies.
#define for_each_owner(key, mask)                                              \
	for (__u32 bit = 0, key = 0; bit < OWNERS && (mask) >> bit;            \
	     key = ++bit)                                                      \
		if ((mask) & (1u << bit))

inline_always void count_activity(__u32 owners)
{
	// Good to a tick, at most 10 ms, and a tenth of the exact time's cost.
	__u64 now = ktime_get_coarse_ns();

	for_each_owner(owner, owners) {
		struct activity *seen = map_lookup(&traffic, &owner);

		if (seen) {
			seen->last_ns = now;
			seen->packets++;
		}
	}
}

inline_always void count_held(__u32 owners)
{
	for_each_owner(owner, owners) {
		struct activity *seen = map_lookup(&traffic, &owner);

		if (seen)
			seen->held++;
	}
}

inline_always void count_dropped(__u32 owners)
{
	for_each_owner(owner, owners) {
		struct activity *seen = map_lookup(&traffic, &owner);

		if (seen)
			seen->dropped++;
	}
}

// May these owners have one more packet held? The bound is here because a
// reader in user space cannot keep up with a flood.
inline_always int admit(__u32 owners, __u32 bytes)
{
	__u32 zero = 0;
	struct held *limit = map_lookup(&limits, &zero);

	if (!limit)
		return 0;
	for_each_owner(owner, owners) {
		struct held *now = map_lookup(&held, &owner);

		if (!now ||
		    __sync_fetch_and_add(&now->packets, 1) >= limit->packets ||
		    __sync_fetch_and_add(&now->bytes, bytes) >= limit->bytes)
			return 0;
	}
	return 1;
}

// A socket that is closed is answered for by its kernel, in the class of what came:
// a program's last words to a prober would bring a reset that looks like a client's.
inline_always int is_reset(struct __sk_buff *skb, __u32 transport, __u8 protocol)
{
	__u8 flags;

	return protocol == IPPROTO_TCP && !load_bytes(skb, transport + 13, &flags, 1) &&
	       flags & 0x04;
}

inline_always int is_opening(struct __sk_buff *skb, __u32 transport)
{
	__u8 flags;

	return !load_bytes(skb, transport + 13, &flags, 1) &&
	       (flags & 0x17) == 0x02; // SYN without FIN, RST or ACK
}

#include "keepalive.h"

// A global function is verified once, not on each of the paths that lead to it.
// `destination` is the port, in the host's order; `class` the traffic class.
__attribute__((noinline)) int judge(struct __sk_buff *skb, __u32 transport,
				    __u8 protocol, __u16 destination, __u8 class)
{
	struct port_owners *port;
	struct modes *mode;
	struct sleep *sleep;
	__u32 key, zero = 0, activity, shadow, quiet, holding, waiting, dropping;

	key = (__u32)protocol << 16 | destination;
	port = map_lookup(&ports, &key);
	if (!port || skb->mark == CRIU_MARK)
		return PASS;
	activity = port->activity;
	shadow = port->shadow;
	quiet = port->ignored | shadow;
	sleep = map_lookup(&sleeps, &zero);
	if (!sleep)
		return PASS;
	// Of ports that do not count, too: nobody else would tell their peers that the
	// connection is still there.
	if (protocol == IPPROTO_TCP && (activity | quiet) & sleep->absent) {
		int answer = answer_keepalive(skb, transport, sleep->absent);

		if (answer != PASS)
			return answer;
	}
	if (skb->ifindex != LOOPBACK_INDEX) {
		count_activity(activity);
	} else if ((class & CLASS_MASK) == PROBE_CLASS || skb->mark == SHADOW_MARK) {
		shadow |= activity;
		quiet |= activity;
		activity = 0;
	} else if (!is_reset(skb, transport, protocol)) {
		count_activity(activity & ~sleep->probed);
	}
	mode = map_lookup(&modes, &zero);
	if (!mode)
		return PASS;
	holding = activity & mode->holding;
	// In a transition a program's own connections lose nothing, either. A mark has no
	// room to say that a packet wakes one owner and only waits for another.
	waiting = holding ? 0 : port->ignored & mode->holding & ~sleep->absent;
	dropping = (activity & mode->dropping) |
		   (quiet & ~waiting & (mode->holding | mode->dropping));

	// A packet that must not reach one owner's absent socket may not pass
	// for the sake of another: it would be answered with a reset.
	if (dropping) {
		if (!(dropping & ~(shadow & sleep->absent)) &&
		    protocol == IPPROTO_TCP && is_opening(skb, transport))
			return PASS;
		count_dropped(dropping);
		return TC_ACT_SHOT;
	}
	if (holding | waiting) {
		// Marked already: it came through a bridge or VLAN device of
		// this namespace and was counted at the lower one.
		if ((skb->mark & MARK_MASK) == MARK && skb->mark != MARK)
			return PASS;
		if ((holding && !(holding & ~sleep->opening) &&
		     protocol == IPPROTO_TCP && !is_opening(skb, transport)) ||
		    !admit(holding | waiting, skb->len)) {
			count_dropped(holding | waiting);
			return TC_ACT_SHOT;
		}
		count_held(holding);
		skb->mark = holding ? MARK | activity : MARK | QUIET | waiting;
	}
	return PASS;
}

inline_always int has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP;
}

inline_always int look_up(struct __sk_buff *skb, __u32 transport, __u8 protocol,
			  __u8 class)
{
	__u16 destination;

	if (!has_ports(protocol) ||
	    load_bytes(skb, transport + 2, &destination, 2))
		return PASS;
	return judge(skb, transport, protocol, net16(destination), class);
}

inline_always int parse_ipv4(struct __sk_buff *skb, __u32 network)
{
	struct iphdr ip;

	if (load_bytes(skb, network, &ip, sizeof(ip)))
		return PASS;
	// Later fragments carry no ports. They wait for the first one in the
	// reassembly queue, so holding that one holds the datagram.
	if (ip.ihl < 5 || net16(ip.frag_off) & 0x1fff)
		return PASS;
	return look_up(skb, network + ip.ihl * 4u, ip.protocol, ip.tos);
}

inline_always int parse_ipv6(struct __sk_buff *skb, __u32 network)
{
	struct ipv6hdr ip;
	__u32 offset = network + sizeof(ip);
	__u8 next, class;

	if (load_bytes(skb, network, &ip, sizeof(ip)))
		return PASS;
	class = ip.priority << 4 | ip.flow_lbl[0] >> 4;
	next = ip.nexthdr;
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		__u8 extension[4];

		switch (next) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_MH:
		case IPPROTO_AH:
		case IPPROTO_FRAGMENT:
			break;
		default:
			return look_up(skb, offset, next, class);
		}
		if (load_bytes(skb, offset, extension, sizeof(extension)))
			return PASS;
		if (next == IPPROTO_FRAGMENT) {
			if ((extension[2] << 8 | extension[3]) & 0xfff8)
				return PASS;
			offset += 8;
		} else if (next == IPPROTO_AH) {
			offset += (extension[1] + 2u) * 4;
		} else {
			offset += (extension[1] + 1u) * 8;
		}
		next = extension[0];
	}
	return PASS;
}

inline_always int parse_network(struct __sk_buff *skb, __u32 offset, __u16 type)
{
	if (type == ETH_P_IP)
		return parse_ipv4(skb, offset);
	if (type == ETH_P_IPV6)
		return parse_ipv6(skb, offset);
	return PASS;
}

struct plain { // what nearly every packet of a busy program begins with
	struct ethhdr ethernet;
	struct iphdr ip;
	__be16 source, destination;
} __attribute__((packed));

// Interfaces with an Ethernet header: veth, lo, bridges.
SEC("tc") int gate_ethernet(struct __sk_buff *skb)
{
	const struct plain *plain = (void *)(long)skb->data;
	__u32 offset = ETH_HLEN;
	__u16 type;

	if (skb->pkt_type == PACKET_OTHERHOST) // never delivered here
		return PASS;
	if ((void *)(plain + 1) <= (void *)(long)skb->data_end &&
	    plain->ethernet.h_proto == net16(ETH_P_IP) && plain->ip.ihl == 5 &&
	    !(plain->ip.frag_off & net16(0x1fff))) {
		if (!has_ports(plain->ip.protocol))
			return PASS;
		return judge(skb, ETH_HLEN + sizeof(plain->ip), plain->ip.protocol,
			     net16(plain->destination), plain->ip.tos);
	}
	if (load_bytes(skb, 12, &type, 2))
		return PASS;
	type = net16(type);
	if (type == ETH_P_8021Q || type == ETH_P_8021AD) {
		if (load_bytes(skb, 16, &type, 2))
			return PASS;
		type = net16(type);
		offset += 4;
	}
	return parse_network(skb, offset, type);
}

// Interfaces without a link-layer header: tun, WireGuard, IP tunnels.
SEC("tc") int gate_raw(struct __sk_buff *skb)
{
	return parse_network(skb, 0, net16((__u16)skb->protocol));
}

// ---- the way out ----
//
// At the egress of every interface while an owner is not open. A packet that reaches a socket
// which is gone is answered by the kernel, with a reset or with ICMP. The gate sees to it that
// none does; but others may take its filter away, or the rule that queues, and until that is
// put back these answers must not leave: the sender then tries again, as if its packet had
// been lost.

inline_always int is_away(__u8 protocol, __u16 number)
{
	__u32 key = (__u32)protocol << 16 | number, zero = 0;
	struct port_owners *port = map_lookup(&ports, &key);
	struct modes *mode = map_lookup(&modes, &zero);

	return port && mode && port->activity & (mode->holding | mode->dropping);
}

__attribute__((noinline)) int guard_tcp(struct __sk_buff *skb, __u32 transport, __u8 class)
{
	__u16 source;

	if (!is_reset(skb, transport, IPPROTO_TCP) || load_bytes(skb, transport, &source, 2))
		return PASS;
	// To a prober on lo a refusal is the right answer: see PROBE_CLASS.
	if (skb->ifindex == LOOPBACK_INDEX && (class & CLASS_MASK) == PROBE_CLASS)
		return PASS;
	return is_away(IPPROTO_TCP, net16(source)) ? TC_ACT_SHOT : PASS;
}

// `transport` is where the ports are of the packet that could not be delivered.
__attribute__((noinline)) int guard_unreachable(struct __sk_buff *skb, __u32 transport,
						__u8 protocol)
{
	__u16 destination;

	if (!has_ports(protocol) || load_bytes(skb, transport + 2, &destination, 2))
		return PASS;
	return is_away(protocol, net16(destination)) ? TC_ACT_SHOT : PASS;
}

inline_always int guard_ipv4(struct __sk_buff *skb, __u32 network)
{
	struct iphdr ip;
	__u32 transport;
	__u8 kind[2];

	if (load_bytes(skb, network, &ip, sizeof(ip)) || ip.ihl < 5)
		return PASS;
	transport = network + ip.ihl * 4u;
	if (ip.protocol == IPPROTO_TCP)
		return guard_tcp(skb, transport, ip.tos);
	if (ip.protocol != IPPROTO_ICMP || load_bytes(skb, transport, kind, 2) ||
	    kind[0] != 3 || kind[1] != 3) // port unreachable (RFC 792)
		return PASS;
	network = transport + 8;
	if (load_bytes(skb, network, &ip, sizeof(ip)) || ip.ihl < 5)
		return PASS;
	return guard_unreachable(skb, network + ip.ihl * 4u, ip.protocol);
}

inline_always int guard_ipv6(struct __sk_buff *skb, __u32 network)
{
	struct ipv6hdr ip;
	__u8 kind[2];

	if (load_bytes(skb, network, &ip, sizeof(ip)))
		return PASS;
	network += sizeof(ip);
	if (ip.nexthdr == IPPROTO_TCP)
		return guard_tcp(skb, network, ip.priority << 4 | ip.flow_lbl[0] >> 4);
	if (ip.nexthdr != IPPROTO_ICMPV6 || load_bytes(skb, network, kind, 2) ||
	    kind[0] != 1 || kind[1] != 4) // port unreachable (RFC 4443)
		return PASS;
	network += 8;
	if (load_bytes(skb, network, &ip, sizeof(ip)))
		return PASS;
	return guard_unreachable(skb, network + sizeof(ip), ip.nexthdr);
}

inline_always int guard_network(struct __sk_buff *skb, __u32 offset)
{
	if (skb->protocol == net16(ETH_P_IP))
		return guard_ipv4(skb, offset);
	if (skb->protocol == net16(ETH_P_IPV6))
		return guard_ipv6(skb, offset);
	return PASS;
}

SEC("tc") int guard_ethernet(struct __sk_buff *skb)
{
	return guard_network(skb, ETH_HLEN);
}

SEC("tc") int guard_raw(struct __sk_buff *skb)
{
	return guard_network(skb, 0);
}

// No helper above is reserved for GPL programs.
char _license[] SEC("license") = "Apache-2.0";
