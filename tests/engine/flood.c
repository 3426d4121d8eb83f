// Floods a port with SYNs or datagrams at a given rate, for tests/engine/test_floods.py.
//
//   flood INTERFACE MAC SOURCE DESTINATION PORT tcp|udp RATE SECONDS
//
// Whole frames through a packet socket (packet(7)), without the sender's queueing discipline, in
// batches of a millisecond's worth; each has another source port. Ends after SECONDS or with
// SIGTERM, and says how many frames the kernel took. A program in C, since Python sends a tenth
// of what is wanted.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

enum { BATCH = 512, TICK_NS = 1000000, SECOND_NS = 1000000000, LOAD = 18 };

struct frame {
	struct ether_header ethernet;
	struct iphdr ip;
	union {
		struct tcphdr tcp;
		struct udphdr udp;
		uint8_t bytes[sizeof(struct tcphdr)];
	};
	uint8_t load[LOAD];
} __attribute__((packed));

static volatile sig_atomic_t ended;

static void end(int number)
{
	(void)number;
	ended = 1;
}

static uint32_t sum(const void *data, size_t size)
{
	const uint8_t *bytes = data;
	uint32_t total = 0;

	for (size_t i = 0; i + 1 < size; i += 2)
		total += (uint32_t)bytes[i] << 8 | bytes[i + 1];
	return total;
}

static uint16_t folded(uint32_t total)
{
	while (total >> 16)
		total = (total & 0xffff) + (total >> 16);
	return htons((uint16_t)~total);
}

static uint32_t random32(void) // xorshift (Marsaglia): the C library's takes a lock
{
	static uint32_t state = 2463534242;

	state ^= state << 13;
	state ^= state >> 17;
	return state ^= state << 5;
}

static size_t fill(struct frame *frame, int tcp)
{
	size_t size = tcp ? sizeof(frame->tcp) : sizeof(frame->udp) + LOAD;
	uint16_t source = htons((uint16_t)(1024 + random32() % (65536 - 1024)));
	uint32_t total;

	// The pseudo header: both addresses, protocol, length (RFC 9293, section 3.1).
	total = sum(&frame->ip.saddr, 8) + frame->ip.protocol + (uint32_t)size;
	if (tcp) {
		frame->tcp.source = source;
		frame->tcp.seq = random32();
		frame->tcp.check = 0;
		frame->tcp.check = folded(total + sum(&frame->tcp, size));
	} else {
		frame->udp.source = source;
		frame->udp.check = 0; // none: IPv4 allows it (RFC 768)
	}
	return sizeof(frame->ethernet) + sizeof(frame->ip) + size;
}

static void prepare(struct frame *frame, char **words, int tcp, const uint8_t *own)
{
	size_t size = tcp ? sizeof(frame->tcp) : sizeof(frame->udp) + LOAD;
	unsigned int mac[ETH_ALEN];

	if (sscanf(words[2], "%x:%x:%x:%x:%x:%x", &mac[0], &mac[1], &mac[2], &mac[3], &mac[4],
		   &mac[5]) != ETH_ALEN)
		errx(2, "%s is no MAC address", words[2]);
	memset(frame, 0, sizeof(*frame));
	for (int i = 0; i < ETH_ALEN; i++)
		frame->ethernet.ether_dhost[i] = (uint8_t)mac[i];
	memcpy(frame->ethernet.ether_shost, own, ETH_ALEN);
	frame->ethernet.ether_type = htons(ETHERTYPE_IP);
	frame->ip.version = 4;
	frame->ip.ihl = 5;
	frame->ip.tot_len = htons((uint16_t)(sizeof(frame->ip) + size));
	frame->ip.ttl = 64;
	frame->ip.protocol = tcp ? IPPROTO_TCP : IPPROTO_UDP;
	if (inet_pton(AF_INET, words[3], &frame->ip.saddr) != 1 ||
	    inet_pton(AF_INET, words[4], &frame->ip.daddr) != 1)
		errx(2, "%s or %s is no IPv4 address", words[3], words[4]);
	frame->ip.check = folded(sum(&frame->ip, sizeof(frame->ip)));
	if (tcp) {
		frame->tcp.dest = htons((uint16_t)atoi(words[5]));
		frame->tcp.doff = 5;
		frame->tcp.syn = 1;
		frame->tcp.window = htons(65535);
	} else {
		frame->udp.dest = htons((uint16_t)atoi(words[5]));
		frame->udp.len = htons((uint16_t)size);
		memset(frame->load, 'x', LOAD);
	}
}

int main(int count, char **words)
{
	static struct frame frames[BATCH];
	static struct iovec pieces[BATCH];
	static struct mmsghdr messages[BATCH];
	struct sockaddr_ll place = { .sll_family = AF_PACKET };
	struct timespec now, next;
	struct ifreq request = { 0 };
	long long begin, passed;
	unsigned long long sent = 0;
	double seconds;
	int bypass = 1, due, tcp, out;

	if (count != 9)
		errx(2, "usage: flood INTERFACE MAC SOURCE DESTINATION PORT tcp|udp RATE SECONDS");
	tcp = !strcmp(words[6], "tcp");
	seconds = atof(words[8]);
	out = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
	if (out < 0)
		err(1, "packet socket");
	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", words[1]);
	if (ioctl(out, SIOCGIFHWADDR, &request))
		err(1, "%s", words[1]);
	place.sll_ifindex = (int)if_nametoindex(words[1]);
	if (bind(out, (struct sockaddr *)&place, sizeof(place)))
		err(1, "bind to %s", words[1]);
	// Where it is refused the queueing discipline only costs some of the rate.
	(void)!setsockopt(out, SOL_PACKET, PACKET_QDISC_BYPASS, &bypass, sizeof(bypass));
	for (int i = 0; i < BATCH; i++) {
		prepare(&frames[i], words, tcp, (uint8_t *)request.ifr_hwaddr.sa_data);
		pieces[i].iov_base = &frames[i];
		messages[i].msg_hdr.msg_iov = &pieces[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	due = (int)(atof(words[7]) * TICK_NS / SECOND_NS);
	due = due < 1 ? 1 : due > BATCH ? BATCH : due;
	signal(SIGTERM, end);
	clock_gettime(CLOCK_MONOTONIC, &next);
	begin = next.tv_sec * (long long)SECOND_NS + next.tv_nsec;
	while (!ended) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		passed = now.tv_sec * (long long)SECOND_NS + now.tv_nsec - begin;
		if (passed > (long long)(seconds * SECOND_NS))
			break;
		for (int i = 0; i < due; i++)
			pieces[i].iov_len = fill(&frames[i], tcp);
		int taken = sendmmsg(out, messages, (unsigned int)due, 0);
		if (taken > 0)
			sent += (unsigned long long)taken;
		else if (errno != ENOBUFS && errno != EAGAIN && errno != EINTR)
			err(1, "sendmmsg");
		// A batch that comes late is made up for: its successors follow without a pause.
		next.tv_nsec += TICK_NS;
		if (next.tv_nsec >= SECOND_NS) {
			next.tv_nsec -= SECOND_NS;
			next.tv_sec++;
		}
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
	}
	printf("%llu\n", sent);
	return 0;
}
