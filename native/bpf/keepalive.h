// Answers TCP's keep-alive probes for a program that is not there, so that its peers
// neither wake it nor give their connections up. Included by gate.bpf.c, which asks
// for each TCP packet to an absent owner; src/architect/adapters/keepalives.py fills
// the map from the program's checkpoint, and repeats the structs.
//
// A probe repeats a byte that the program has acknowledged (RFC 9293, section 3.8.4),
// and the answer says nothing but that again. It is made of the probe itself and goes
// back where that came from. Whatever is in any way unusual is left to the program.

#ifndef ARCHITECT_KEEPALIVE_H
#define ARCHITECT_KEEPALIVE_H

#define MAX_CONNECTIONS 4096
#define HOP_LIMIT 64

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define net32(x) ((__u32)__builtin_bswap32(x))
#else
#define net32(x) ((__u32)(x))
#endif

static long (*const store_bytes)(struct __sk_buff *skb, __u32 offset, const void *from,
				 __u32 len, __u64 flags) =
	(void *)BPF_FUNC_skb_store_bytes;
static long (*const change_tail)(struct __sk_buff *skb, __u32 len, __u64 flags) =
	(void *)BPF_FUNC_skb_change_tail;
static __s64 (*const checksum_change)(const void *from, __u32 from_size, const void *to,
				      __u32 to_size, __u32 seed) =
	(void *)BPF_FUNC_csum_diff;
static long (*const change_l4_checksum)(struct __sk_buff *skb, __u32 offset, __u64 from,
					__u64 to, __u64 flags) =
	(void *)BPF_FUNC_l4_csum_replace;
static long (*const redirect)(__u32 interface, __u64 flags) = (void *)BPF_FUNC_redirect;

struct ends { // as seen from the program; addresses of IPv4 as IPv6 maps them
	__u8 local[16];
	__u8 peer[16];
	__be16 local_port;
	__be16 peer_port;
};

struct connection { // in the host's order
	__u32 owners;
	__u32 receive_next;
	__u32 send_next;
	__u32 timestamp;
	__u16 window; // as in the header
	__u16 timestamps; // whether each segment carries them
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_CONNECTIONS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ends);
	__type(value, struct connection);
} connections SEC(".maps");

struct tcp_header {
	__be16 source, destination;
	__be32 sequence, acknowledged;
	__u8 length; // in words, in the upper half
	__u8 flags;
	__be16 window;
	__be16 checksum;
	__be16 urgent;
};

struct stamps { // as Linux and most others lay them out (RFC 7323, appendix A)
	__u8 no_operation[2], kind, length;
	__be32 value, echo;
};

struct probe { // a multiple of four bytes, for checksum_change
	struct tcp_header tcp;
	struct stamps stamps;
	__u8 data[4];
};

#define TCP_LENGTH ((__u32)sizeof(struct tcp_header))
#define STAMPED_LENGTH (TCP_LENGTH + (__u32)sizeof(struct stamps))
#define TCP_ACK_ALONE 0x10

inline_always __u16 folded(__s64 sum)
{
	__u32 rest = (__u32)sum;

	rest = (rest & 0xffff) + (rest >> 16);
	rest = (rest & 0xffff) + (rest >> 16);
	return (__u16)~rest;
}

// Does nothing precede the network header, or Ethernet's without a VLAN's?
inline_always int is_plain(__u32 network)
{
	return network == 0 || network == ETH_HLEN;
}

inline_always int answer_ethernet(struct __sk_buff *skb)
{
	__u8 from[2 * ETH_ALEN], to[2 * ETH_ALEN];

	if (load_bytes(skb, 0, from, sizeof(from)))
		return -1;
	__builtin_memcpy(to, from + ETH_ALEN, ETH_ALEN);
	__builtin_memcpy(to + ETH_ALEN, from, ETH_ALEN);
	return store_bytes(skb, 0, to, sizeof(to), 0);
}

inline_always int answer_ipv4(struct __sk_buff *skb, __u32 network, __u16 length)
{
	struct iphdr ip;
	__be32 source;

	if (load_bytes(skb, network, &ip, sizeof(ip)))
		return -1;
	source = ip.saddr;
	ip.saddr = ip.daddr;
	ip.daddr = source;
	ip.tos = 0;
	ip.tot_len = net16((__u16)sizeof(ip) + length);
	ip.frag_off = net16(0x4000); // so that its number needs not be one of its own
	ip.ttl = HOP_LIMIT;
	ip.check = 0;
	ip.check = folded(checksum_change((void *)0, 0, &ip, sizeof(ip), 0));
	return store_bytes(skb, network, &ip, sizeof(ip), 0);
}

inline_always int answer_ipv6(struct __sk_buff *skb, __u32 network, __u16 length)
{
	struct ipv6hdr ip;
	struct in6_addr source;

	if (load_bytes(skb, network, &ip, sizeof(ip)))
		return -1;
	source = ip.saddr;
	ip.saddr = ip.daddr;
	ip.daddr = source;
	ip.priority = 0;
	ip.flow_lbl[0] = ip.flow_lbl[1] = ip.flow_lbl[2] = 0;
	ip.payload_len = net16(length);
	ip.hop_limit = HOP_LIMIT;
	// Unlike IPv4's, this header does not add up to nothing in an interface's checksum.
	return store_bytes(skb, network, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM);
}

// Reads the addresses; returns the length of what follows the network header, or 0 if
// this is no plain packet. `transport` is where TCP begins.
inline_always __u16 read_ends(struct __sk_buff *skb, __u32 transport, struct ends *ends)
{
	__u16 length;

	if (skb->protocol == net16(ETH_P_IP)) {
		struct iphdr ip;

		// With options TCP begins elsewhere.
		if (!is_plain(transport - (__u32)sizeof(ip)) ||
		    load_bytes(skb, transport - (__u32)sizeof(ip), &ip, sizeof(ip)) ||
		    ip.frag_off & net16(0x3fff))
			return 0;
		ends->local[10] = ends->local[11] = 0xff;
		ends->peer[10] = ends->peer[11] = 0xff;
		__builtin_memcpy(ends->local + 12, &ip.daddr, 4);
		__builtin_memcpy(ends->peer + 12, &ip.saddr, 4);
		length = net16(ip.tot_len);
		return length < sizeof(ip) ? 0 : length - (__u16)sizeof(ip);
	}
	if (skb->protocol == net16(ETH_P_IPV6)) {
		struct ipv6hdr ip;

		if (!is_plain(transport - (__u32)sizeof(ip)) ||
		    load_bytes(skb, transport - (__u32)sizeof(ip), &ip, sizeof(ip)))
			return 0;
		__builtin_memcpy(ends->local, &ip.daddr, 16);
		__builtin_memcpy(ends->peer, &ip.saddr, 16);
		return net16(ip.payload_len);
	}
	return 0;
}

// Answers the TCP packet if it is a probe of a connection that one of the `absent`
// owners has: the packet is then the answer, and what is returned is the verdict on it.
// PASS: it is none, and is as it was. A function of its own for the verifier's sake.
__attribute__((noinline)) int answer_keepalive(struct __sk_buff *skb, __u32 transport,
					       __u32 absent)
{
	struct ends ends = {};
	struct probe probe = {}, answer;
	struct connection *known;
	__u32 header, network;
	__u16 length;
	__s64 change;

	length = read_ends(skb, transport, &ends);
	if (length < TCP_LENGTH || length > STAMPED_LENGTH + 1 ||
	    load_bytes(skb, transport, &probe.tcp, sizeof(probe.tcp)) ||
	    probe.tcp.flags != TCP_ACK_ALONE)
		return PASS;
	ends.local_port = probe.tcp.destination;
	ends.peer_port = probe.tcp.source;
	known = map_lookup(&connections, &ends);
	if (!known || !(known->owners & absent) ||
	    probe.tcp.sequence != net32(known->receive_next - 1) ||
	    probe.tcp.acknowledged != net32(known->send_next))
		return PASS;
	header = known->timestamps ? STAMPED_LENGTH : TCP_LENGTH;
	if (probe.tcp.length != header << 2 || length < header || length > header + 1)
		return PASS;
	if (known->timestamps &&
	    (load_bytes(skb, transport + TCP_LENGTH, &probe.stamps, sizeof(probe.stamps)) ||
	     probe.stamps.no_operation[0] != 1 || probe.stamps.no_operation[1] != 1 ||
	     probe.stamps.kind != 8 || probe.stamps.length != 10))
		return PASS;
	if (length > header && load_bytes(skb, transport + header, probe.data, 1))
		return PASS;

	answer = probe;
	answer.tcp.source = probe.tcp.destination;
	answer.tcp.destination = probe.tcp.source;
	answer.tcp.sequence = net32(known->send_next);
	answer.tcp.acknowledged = net32(known->receive_next);
	answer.tcp.window = net16(known->window);
	answer.tcp.urgent = 0;
	answer.data[0] = 0;
	if (known->timestamps) {
		// The dump's time, which is not before the last segment's: the peer drops what
		// is older (RFC 7323, section 5.3). The program's clock goes on from here.
		answer.stamps.value = net32(known->timestamp);
		answer.stamps.echo = probe.stamps.value;
	}
	change = checksum_change(&probe, sizeof(probe), &answer, sizeof(answer), 0);

	// From here on there is no way back: the prober repeats what fails.
	if (store_bytes(skb, transport, &answer.tcp, sizeof(answer.tcp), 0) ||
	    (known->timestamps && store_bytes(skb, transport + TCP_LENGTH, &answer.stamps,
					      sizeof(answer.stamps), 0)) ||
	    change_l4_checksum(skb, transport + 16, 0, change, 0))
		return TC_ACT_SHOT;
	// A checksum that the sender has left to its interface covers the length alone.
	if (length > header &&
	    (store_bytes(skb, transport + header, answer.data, 1, 0) ||
	     change_l4_checksum(skb, transport + 16, net16(length), net16((__u16)header),
				BPF_F_PSEUDO_HDR | 2)))
		return TC_ACT_SHOT;
	if (skb->protocol == net16(ETH_P_IP)) {
		network = transport - (__u32)sizeof(struct iphdr);
		if (answer_ipv4(skb, network, (__u16)header))
			return TC_ACT_SHOT;
	} else {
		network = transport - (__u32)sizeof(struct ipv6hdr);
		if (answer_ipv6(skb, network, (__u16)header))
			return TC_ACT_SHOT;
	}
	if ((network && answer_ethernet(skb)) ||
	    (skb->len != transport + header && change_tail(skb, transport + header, 0)))
		return TC_ACT_SHOT;
	return redirect(skb->ifindex, 0);
}

#endif
