/* The death of a pager at each instant that its records distinguish, and failures other than a death.
 *
 * Why it exists: a random kill rarely hits the few instructions between a system call and its record. Here
 * the test does with a dead pager's records and descriptors what that pager had done when it was killed;
 * then a real successor has to go on from there.
 *
 * Who calls it: pager_test.c.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../pager_tasks.h"
#include "../uffd.h"
#include "keeping.h"
#include "program.h"

enum { PUPPET_PAGES = 512 };

/* What the dead pager had done when it was killed, in the order it does it. */
enum instant { ACCEPTED, CONNECTED, PID_RECEIVED, FD_RECEIVED, ADOPTED, LAST_WORD, FILLING, INSTANTS };

static int to_puppet, from_puppet;

static pid_t start_puppet(const char *seed)
{
	int commands[2], answers[2];
	char pages[16];
	pid_t pid;

	CHECK(!pipe2(commands, O_CLOEXEC) && !pipe2(answers, O_CLOEXEC));
	snprintf(pages, sizeof pages, "%d", PUPPET_PAGES);
	pid = start_restore("1", "0", "0", seed, pages, "finish", commands[0], answers[1]);
	close(commands[0]);
	close(answers[1]);
	to_puppet = commands[1];
	from_puppet = answers[0];
	return pid;
}

static void tell(char what, uint32_t a, uint32_t b)
{
	struct command command = { what, a, b };

	CHECK(write(to_puppet, &command, sizeof command) == sizeof command);
}

static void expect_answer(void)
{
	struct pollfd fd = { from_puppet, POLLIN, 0 };
	char answer = 0;

	if (poll(&fd, 1, 10000) != 1)
		fail_with_status("the program waits for ever");
	CHECK(read(from_puppet, &answer, 1) == 1);
	CHECK(answer == 1);
}

static void ask(char what, uint32_t a, uint32_t b)
{
	tell(what, a, b);
	expect_answer();
}

static void wait_readable(int fd)
{
	struct pollfd wait = { fd, POLLIN, 0 };

	CHECK(poll(&wait, 1, 10000) == 1);
}

/* Does with CRIU's messages what a pager does, up to `last`, without recording more than it would have. */
static void play_restore(enum instant last)
{
	struct greeting *greeting = &shared->greeting;
	struct iovec byte = { &greeting->byte, 1 };
	struct msghdr message = { .msg_iov = &byte, .msg_iovlen = 1, .msg_control = greeting->control,
				  .msg_controllen = sizeof greeting->control };
	int connection, fd;

	wait_readable(shared->listener);
	CHECK((connection = accept4(shared->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0);
	if (last == ACCEPTED)
		return;
	shared->connection = connection;
	close(shared->listener);
	shared->listener = -1;
	shared->status.state = PAGER_RESTORING;
	if (last == CONNECTED)
		return;
	wait_readable(connection);
	CHECK(recv(connection, &greeting->pid, 4, 0) == 4);
	if (last == PID_RECEIVED)
		return;
	wait_readable(connection);
	CHECK(recvmsg(connection, &message, MSG_CMSG_CLOEXEC) == 1);
	if (last == FD_RECEIVED)
		return;
	memcpy(&fd, CMSG_DATA((struct cmsghdr *)greeting->control), sizeof fd);
	shared->tasks[0] = (struct task_record){ greeting->pid, fd, TASK_OPEN };
	shared->task_count = 1;
	if (last == ADOPTED)
		return;
	memset(greeting, 0, sizeof *greeting);
	for (int32_t word = 0; word != FINISHED;) {
		wait_readable(connection);
		CHECK(recv(connection, &word, 4, 0) == 4);
		greeting->pid = word;
	}
	if (last == LAST_WORD)
		return;
	shared->status.t_running_ns = monotonic_ns();
	shared->status.state = PAGER_FILLING;
	memset(greeting, 0, sizeof *greeting);
	close(connection);
	shared->connection = -1;
}

struct fixture {
	struct layout layout;
	unsigned descriptors;
	pid_t restore;
	uint32_t lazy, other; /* two lazy pages, far from each other and from all else */
	uint32_t hole;        /* a page that is not in the checkpoint */
};

/* An armed keeper whose pager is dead, and a puppet whose restore has come to `last`. */
static struct fixture set_up(enum instant last)
{
	struct fixture fixture = { .layout = make_layout(PUPPET_PAGES, 0, 1) };

	make_images(1, 1, PUPPET_PAGES);
	begin_keeping();
	fixture.descriptors = open_descriptors();
	arm();
	kill_pager();
	fixture.restore = start_puppet("1");
	play_restore(last);
	while (fixture.layout.kind[fixture.lazy] != 1)
		fixture.lazy++;
	fixture.other = PUPPET_PAGES - 1;
	while (fixture.layout.kind[fixture.other] != 1)
		fixture.other--;
	while (fixture.layout.kind[fixture.hole])
		CHECK(++fixture.hole < PUPPET_PAGES);
	return fixture;
}

static void tear_down(struct fixture *fixture)
{
	int status;

	close(to_puppet);
	CHECK(waitpid(fixture->restore, &status, 0) == fixture->restore && !status);
	close(from_puppet);
	end_keeping(fixture->descriptors);
}

static void expect_page(const struct fixture *fixture, uint32_t page)
{
	ask('r', page, fixture->layout.number[page]);
}

/* CRIU's messages: each instant of taking them in. */
void greeting_instants(void)
{
	for (int last = ACCEPTED; last < INSTANTS; last++) {
		struct fixture fixture = set_up((enum instant)last);

		succeed_pager();
		expect_page(&fixture, fixture.lazy);
		wait_for(PAGER_DONE);
		for (uint32_t page = 0; page < PUPPET_PAGES; page++)
			expect_page(&fixture, page);
		tear_down(&fixture);
	}
}

/* The instants of an event: waiting; read, not counted; counted, not acted upon. */
enum { UNREAD, READ, COUNTED, EVENT_INSTANTS };

static void play_event(int instant)
{
	struct event_record *event = &shared->events[shared->event_count];

	wait_readable(shared->tasks[0].fd);
	if (instant == UNREAD)
		return;
	event->task = 0;
	CHECK(read(shared->tasks[0].fd, &event->msg, sizeof event->msg) == sizeof event->msg);
	shared->event_count += instant == COUNTED;
}

/* Places the page as the dead pager had before the event. */
static void place_page(const struct fixture *fixture, uint32_t page)
{
	unsigned char bytes[PAGE];

	fill_page(bytes, fixture->layout.number[page]);
	CHECK(uffd_copy(shared->tasks[0].fd, MEMORY + (uint64_t)page * PAGE, bytes, PAGE) == PAGE);
}

static void event_fault(struct fixture *fixture, int instant)
{
	tell('r', fixture->lazy, fixture->layout.number[fixture->lazy]);
	play_event(instant);
	succeed_pager();
	expect_answer();
}

/* Filling never comes by a page that the checkpoint does not have. */
static void event_fault_hole(struct fixture *fixture, int instant)
{
	tell('r', fixture->hole, 0);
	play_event(instant);
	succeed_pager();
	expect_answer();
}

/* Killed between placing the page and waking its reader, as it were. */
static void event_fault_placed(struct fixture *fixture, int instant)
{
	unsigned char bytes[PAGE];
	struct uffdio_copy order = { .dst = MEMORY + (uint64_t)fixture->lazy * PAGE,
				     .src = (uintptr_t)bytes, .len = PAGE,
				     .mode = UFFDIO_COPY_MODE_DONTWAKE };

	tell('r', fixture->lazy, fixture->layout.number[fixture->lazy]);
	play_event(instant);
	fill_page(bytes, fixture->layout.number[fixture->lazy]);
	CHECK(!ioctl(shared->tasks[0].fd, UFFDIO_COPY, &order));
	succeed_pager();
	expect_answer();
}

/* Page faults that the kernel knows of and nobody has read. */
static unsigned unread_faults(int fd)
{
	char name[64], line[128];
	unsigned long pending = 0;
	FILE *file;

	snprintf(name, sizeof name, "/proc/self/fdinfo/%d", fd);
	CHECK((file = fopen(name, "re")));
	while (fgets(line, sizeof line, file))
		sscanf(line, "pending: %lu", &pending);
	fclose(file);
	return (unsigned)pending;
}

/* A page fault while another thread changes the address space: the kernel refuses to place anything. */
static void event_fault_busy(struct fixture *fixture, int instant)
{
	int fd = shared->tasks[0].fd;

	ask('a', fixture->lazy, 0);
	fixture->layout.number[fixture->lazy] = 0;
	wait_readable(fd);
	tell('r', fixture->hole, 0);
	while (!unread_faults(fd))
		sched_yield();
	play_event(instant); /* a page fault comes before other events */
	succeed_pager();
	expect_answer();
}

static void event_remove(struct fixture *fixture, int instant)
{
	tell('d', fixture->lazy, 0);
	play_event(instant);
	succeed_pager();
	expect_answer();
	ask('r', fixture->lazy, 0);
	fixture->layout.number[fixture->lazy] = 0;
}

/* The page was in: the successor must not take it for one that is still missing. */
static void event_remove_placed(struct fixture *fixture, int instant)
{
	place_page(fixture, fixture->lazy);
	expect_page(fixture, fixture->lazy);
	event_remove(fixture, instant);
}

static void event_unmap(struct fixture *fixture, int instant)
{
	tell('u', fixture->lazy, 0);
	play_event(instant);
	succeed_pager();
	expect_answer();
	/* Moved into the hole: what was there must not come back over it. */
	ask('m', fixture->other, fixture->lazy);
	ask('r', fixture->lazy, fixture->layout.number[fixture->other]);
	fixture->layout.number[fixture->lazy] = fixture->layout.number[fixture->other];
	fixture->layout.pages = fixture->other;
}

static void event_remap(struct fixture *fixture, int instant)
{
	uint32_t target = PUPPET_PAGES + 7;

	tell('m', fixture->lazy, target);
	play_event(instant);
	succeed_pager();
	expect_answer();
	ask('r', target, fixture->layout.number[fixture->lazy]);
	ask('m', target, fixture->lazy);
}

static void event_fork(struct fixture *fixture, int instant)
{
	tell('f', fixture->other, fixture->layout.number[fixture->other]);
	play_event(instant);
	succeed_pager();
	expect_answer();
}

static void fork_half_recorded(struct fixture *fixture, int instant)
{
	if (instant != COUNTED) {
		event_fork(fixture, instant);
		return;
	}
	tell('f', fixture->other, fixture->layout.number[fixture->other]);
	play_event(instant);
	shared->tasks[1] = (struct task_record){ 0, (int)shared->events[0].msg.arg.fork.ufd, TASK_OPEN };
	shared->events[0].child = 2;
	succeed_pager();
	expect_answer();
}

static void (*const events[])(struct fixture *, int) = {
	event_fault,  event_fault_hole,    event_fault_placed, event_fault_busy, event_remove,
	event_unmap,  event_remove_placed, event_remap,        event_fork,       fork_half_recorded,
};

void event_instants(void)
{
	for (unsigned i = 0; i < sizeof events / sizeof *events; i++)
		for (int instant = UNREAD; instant < EVENT_INSTANTS; instant++) {
			struct fixture fixture = set_up(FILLING);

			/* Filling and what follows it would hide that nobody cared for the event. */
			shared->status.t_running_ns = monotonic_ns() + DEADLINE_MS * 1000000ULL;
			events[i](&fixture, instant);
			kill_pager();
			CHECK(pager_status()->pages_left);
			shared->status.t_running_ns = monotonic_ns();
			succeed_pager();
			wait_for(PAGER_DONE);
			for (uint32_t page = 0; page < fixture.layout.pages; page++)
				expect_page(&fixture, page);
			tear_down(&fixture);
		}
}

/* A number that the pager was about to close when it was killed, and that is another file's by now. */
void closing_instants(void)
{
	struct fixture fixture = set_up(FILLING);
	int other[2];

	CHECK(!pipe2(other, O_CLOEXEC));
	shared->tasks[1] = (struct task_record){ 0, other[0], TASK_CLOSING };
	shared->tasks[2] = (struct task_record){ 0, shared->tasks[0].fd, TASK_CLOSING };
	shared->task_count = 3;
	succeed_pager();
	wait_for(PAGER_DONE);
	CHECK(!close(other[0]) && !close(other[1]));
	for (uint32_t page = 0; page < PUPPET_PAGES; page++)
		expect_page(&fixture, page);
	tear_down(&fixture);
}

/* ---- damaged images, and restores that fail ------------------------------------------------------- */

static void expect_failure(int error)
{
	CHECK(!pager_arm(images));
	wait_for(PAGER_FAILED);
	CHECK(pager_status()->error == error);
}

void refused(void)
{
	struct stat file;

	begin_keeping();
	expect_failure(ENOENT);
	make_images(2, 1, PUPPET_PAGES);
	CHECK(!stat("pages-2.img", &file));
	CHECK(!truncate("pages-2.img", file.st_size - 1));
	expect_failure(ENODATA);
	CHECK(!unlink("pages-2.img"));
	expect_failure(ENOENT);
	make_images(2, 1, PUPPET_PAGES);
	CHECK(!truncate("pagemap-4243.img", 25));
	expect_failure(EBADMSG);
	CHECK(!truncate("pagemap-4243.img", 4));
	expect_failure(EBADMSG);
	make_images(2, 1, PUPPET_PAGES);
	arm();
	/* Nobody survives loading this one, as it were: five deaths, and the keeper is told. */
	CHECK(!pager_disarm());
	wait_for(PAGER_IDLE);
	kill_pager();
	CHECK(!pager_arm(images));
	for (int i = 0; i < 5; i++)
		pager_reaped(SIGKILL);
	CHECK(pager_status()->state == PAGER_FAILED && settled_orders());
	succeed_pager();
	arm();
	kill_pager();
}

/* A part of the image cannot be read: everything else comes, the reader of that part waits, and gets the
 * right bytes once the image is whole again. */
void damaged(void)
{
	struct fixture fixture = set_up(FILLING);
	struct pollfd answer = { from_puppet, POLLIN, 0 };
	struct stat file;

	CHECK(!stat("pages-1.img", &file));
	tell('r', fixture.other, fixture.layout.number[fixture.other]);
	wait_readable(shared->tasks[0].fd);
	succeed_pager();
	expect_answer();
	/* Cut while it is mapped: reading beyond the end fails as reading a bad disk does. */
	CHECK(!truncate("pages-1.img", file.st_size / 2 / PAGE * PAGE));
	wait_for(PAGER_STALLED);
	CHECK(pager_status()->pages_left > 0);
	for (uint32_t page = 0; page < PUPPET_PAGES / 4; page++)
		expect_page(&fixture, page);
	tell('r', PUPPET_PAGES * 3 / 4, fixture.layout.number[PUPPET_PAGES * 3 / 4]);
	CHECK(!poll(&answer, 1, 300));
	kill_pager();
	succeed_pager();
	CHECK(!poll(&answer, 1, 100));
	make_images(1, 1, PUPPET_PAGES);
	CHECK(!pager_arm(images));
	expect_answer();
	wait_for(PAGER_DONE);
	for (uint32_t page = 0; page < PUPPET_PAGES; page++)
		expect_page(&fixture, page);
	tear_down(&fixture);
}

/* CRIU ends before the processes run. */
void given_up(void)
{
	unsigned descriptors;
	pid_t restore;

	make_images(2, 1, PUPPET_PAGES);
	begin_keeping();
	descriptors = open_descriptors();
	arm();
	restore = start_restore("2", "1", "10", "1", "512", "give-up", -1, -1);
	wait_for(PAGER_FAILED);
	CHECK(pager_status()->error == ECONNRESET);
	/* The processes are still there: nothing may be let go until they have ended. */
	CHECK(!pager_disarm());
	hear_pager(50);
	CHECK(!settled_orders() && pager_status()->tasks == 2);
	CHECK(!kill(-restore, SIGKILL));
	CHECK(waitpid(restore, NULL, 0) == restore);
	wait_for(PAGER_IDLE);
	arm();
	end_keeping(descriptors);
}

/* No pager survives this restore, while all that CRIU sent is still in its socket: the program waits, and
 * nothing is let go before it has ended. */
void abandoned(void)
{
	for (int last = ACCEPTED; last <= LAST_WORD; last++) {
		struct fixture fixture = set_up((enum instant)last);
		struct pollfd answer = { from_puppet, POLLIN, 0 };

		tell('r', fixture.lazy, fixture.layout.number[fixture.lazy]);
		for (int i = 0; i < 5; i++)
			pager_reaped(SIGKILL);
		CHECK(pager_status()->state == PAGER_FAILED);
		succeed_pager();
		CHECK(!pager_disarm());
		CHECK(!poll(&answer, 1, 50));
		CHECK(!settled_orders() && pager_status()->tasks == 1);
		CHECK(!kill(-fixture.restore, SIGKILL));
		CHECK(waitpid(fixture.restore, NULL, 0) == fixture.restore);
		wait_for(PAGER_IDLE);
		close(to_puppet);
		close(from_puppet);
		end_keeping(fixture.descriptors);
	}
}

/* The programs are killed before their pages are in. */
void killed_programs(void)
{
	struct fixture fixture = set_up(FILLING);

	CHECK(!kill(-fixture.restore, SIGKILL));
	CHECK(waitpid(fixture.restore, NULL, 0) == fixture.restore);
	succeed_pager();
	wait_for(PAGER_DONE);
	CHECK(!pager_disarm());
	wait_for(PAGER_IDLE);
	kill_pager();
}
