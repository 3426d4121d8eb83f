/* A keeper for the pager's tests: what keeper.c does with pager.h, in few lines.
 *
 * Who calls it: pager_test.c and instants.c.
 */
#define _GNU_SOURCE
#include "keeping.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../pager_tasks.h"
#include "../uffd.h"
#include "program.h"

pid_t pager;
int images;

void fail_with_status(const char *what)
{
	const struct pager_status *status = pager_status();

	fprintf(stderr, "%s: state %u error %d tasks %u deaths %u total %lu left %lu faults %lu events %u "
		"settled %u\n", what, status->state, status->error, status->tasks, status->deaths,
		(unsigned long)status->pages_total, (unsigned long)status->pages_left,
		(unsigned long)status->faults, shared->event_count, shared->settled);
	_exit(1);
}

void begin_keeping(void)
{
	images = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	CHECK(images >= 0);
	CHECK(!pager_init(-1));
	CHECK((pager = pager_spawn()) > 0);
}

void kill_pager(void)
{
	int status;

	CHECK(!kill(pager, SIGKILL));
	CHECK(waitpid(pager, &status, 0) == pager);
	pager_reaped(status);
}

void succeed_pager(void)
{
	CHECK((pager = pager_spawn()) > 0);
}

void hear_pager(int milliseconds)
{
	struct pollfd fd = { pager_fd(), POLLIN, 0 };
	int status;

	poll(&fd, 1, milliseconds);
	pager_acknowledge();
	if (waitpid(pager, &status, WNOHANG) == pager) {
		pager_reaped(status);
		succeed_pager();
	}
}

int settled_orders(void)
{
	return pager_status()->orders_done == pager_status()->orders_given;
}

void wait_for(enum pager_state wanted)
{
	uint64_t end = monotonic_ns() + DEADLINE_MS * 1000000ULL;

	while (!settled_orders() || pager_status()->state != wanted) {
		if (monotonic_ns() > end) {
			fprintf(stderr, "wanted state %d: ", wanted);
			fail_with_status("not reached");
		}
		hear_pager(100);
	}
}

void arm(void)
{
	CHECK(!pager_arm(images));
	wait_for(PAGER_ARMED);
}

unsigned open_descriptors(void)
{
	unsigned count = 0;

	for (int fd = 0; fd < 1024; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void list_descriptors(void)
{
	char name[64], target[256];

	for (int fd = 0; fd < 1024; fd++) {
		ssize_t length;

		snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
		length = readlink(name, target, sizeof target);
		if (length > 0)
			fprintf(stderr, "%d: %.*s\n", fd, (int)length, target);
	}
}

void end_keeping(unsigned descriptors)
{
	CHECK(!pager_disarm());
	wait_for(PAGER_IDLE);
	for (int fd = 0; fd < 1024; fd++)
		CHECK(!uffd_is_one(fd));
	if (open_descriptors() != descriptors) {
		list_descriptors();
		fail_with_status("descriptors are left open");
	}
	kill_pager();
}

pid_t start_restore(const char *programs, const char *threads, const char *steps, const char *seed,
			   const char *pages, const char *end, int input, int output)
{
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid)
		return pid;
	setpgid(0, 0);
	if (input >= 0)
		CHECK(dup2(input, 0) == 0 && dup2(output, 1) == 1);
	execl("/proc/self/exe", "pager_test", "restore", programs, threads, steps, seed, pages, end, NULL);
	_exit(126);
}

void make_images(unsigned programs, unsigned seed, uint32_t pages)
{
	for (unsigned i = 0; i < programs; i++) {
		struct layout layout = make_layout(pages, i, seed);

		write_images(&layout, i);
		free(layout.number);
		free(layout.kind);
	}
}
