// A load like pktgen's and somebody who takes it: sends one frame over and over through a
// packet socket on one CPU, and reads the datagrams from a UDP socket on another.
//
//   load PACKET_FD UDP_FD FRAME        FRAME in hexadecimal, with its Ethernet header
//
// Compiled and called by bench/tracking.py, which makes the sockets in two network
// namespaces: a socket stays where it was made. Each line of standard input is a number of
// milliseconds to send for, at most ten seconds; it is answered, once all is received or
// will not come any more, with a line "SENT RECEIVED NANOSECONDS".
//
// What keeps the figure honest: the sender's CPU does all of a packet's way (veth hands a
// packet over on the CPU that sent it) up to the socket, so whatever is added to that way
// is time that it does not send in. The reader looks at intervals and never blocks, since
// waking it would cost the sender several times of what is measured.

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define BATCH 64
#define FRAME_BYTES 1514
#define LONGEST_MS 10000
#define MOST_PACKETS 50000000ull // of one line: also a bound if the clock stands still
#define LOOK_NS 50000 // between two looks of the reader at its socket
#define SETTLE_NS 100000000ull // without a datagram: no more will come

static atomic_ullong received;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static unsigned long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void run_on(int index)
{
	cpu_set_t allowed, one;
	int found = -1;

	if (sched_getaffinity(0, sizeof(allowed), &allowed))
		fail("sched_getaffinity");
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &allowed) && ++found == index % CPU_COUNT(&allowed)) {
			CPU_ZERO(&one);
			CPU_SET(cpu, &one);
			if (pthread_setaffinity_np(pthread_self(), sizeof(one), &one))
				fail("pthread_setaffinity_np");
			return;
		}
}

static void *take(void *descriptor)
{
	static char buffers[BATCH][FRAME_BYTES];
	const struct timespec look = { .tv_nsec = LOOK_NS };
	struct mmsghdr messages[BATCH] = { 0 };
	struct iovec pieces[BATCH];

	run_on(1);
	for (int i = 0; i < BATCH; i++) {
		pieces[i] = (struct iovec){ buffers[i], FRAME_BYTES };
		messages[i].msg_hdr.msg_iov = &pieces[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	for (;;) {
		int count = recvmmsg(*(int *)descriptor, messages, BATCH, MSG_DONTWAIT, NULL);

		if (count > 0)
			atomic_fetch_add_explicit(&received, count, memory_order_relaxed);
		else if (count < 0 && errno != EAGAIN && errno != EINTR)
			fail("recvmmsg");
		if (count < BATCH)
			nanosleep(&look, NULL);
	}
	return NULL;
}

static void settle(unsigned long long expected)
{
	const struct timespec look = { .tv_nsec = LOOK_NS };
	unsigned long long seen = atomic_load(&received), since = now_ns();

	while (seen < expected && now_ns() - since < SETTLE_NS) {
		unsigned long long count = atomic_load(&received);

		if (count != seen)
			since = now_ns();
		seen = count;
		nanosleep(&look, NULL);
	}
}

int main(int count, char **words)
{
	static unsigned char frame[FRAME_BYTES];
	struct mmsghdr messages[BATCH] = { 0 };
	struct iovec piece = { .iov_base = frame };
	pthread_t reader;
	int out, in;
	unsigned int milliseconds;

	if (count != 4 || strlen(words[3]) > 2 * FRAME_BYTES) {
		fputs("usage: load PACKET_FD UDP_FD FRAME\n", stderr);
		return 2;
	}
	out = atoi(words[1]);
	in = atoi(words[2]);
	for (const char *digits = words[3]; sscanf(digits, "%2hhx", &frame[piece.iov_len]) == 1;
	     digits += 2)
		piece.iov_len++;
	for (int i = 0; i < BATCH; i++) {
		messages[i].msg_hdr.msg_iov = &piece;
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	if (pthread_create(&reader, NULL, take, &in))
		fail("pthread_create");
	run_on(0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	while (scanf("%u", &milliseconds) == 1 && milliseconds <= LONGEST_MS) {
		unsigned long long before = atomic_load(&received), sent = 0, start = now_ns(), end;

		do {
			int done = sendmmsg(out, messages, BATCH, 0);

			if (done < 0 && errno != ENOBUFS && errno != EINTR)
				fail("sendmmsg");
			sent += done > 0 ? done : 0;
			end = now_ns();
		} while (end - start < milliseconds * 1000000ull && sent < MOST_PACKETS);
		settle(before + sent);
		printf("%llu %llu %llu\n", sent, atomic_load(&received) - before, end - start);
	}
	return 0;
}
