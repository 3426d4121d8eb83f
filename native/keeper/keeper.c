/* keeper: the process that an engine takes for a managed container.
 *
 * Why it exists: containerd's shim and Podman's conmon wait for one pid and read its pipes. That pid is
 * the keeper's. It is the parent of the container's real init, holds its stdio, passes its exit status
 * on, and stays when a checkpoint ends the init, so that the engine never learns of it. On request it
 * starts CRIU to bring the init back as its own child. It decides nothing about when: the daemon does.
 *
 * Who calls it: runc-architect starts one for each managed container; the daemon and runc-architect talk
 * to it over its control socket (common/control.h). It stays in the container's cgroup for the
 * container's life, so every kilobyte here is one that a hibernated container keeps.
 *
 * usage: keeper DIRECTORY READY_FD -- runc ... create ...
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../common/control.h"
#include "asleep.h"
#include "namespaces.h"
#include "pager.h"

/* The keeper's view of the container; src/architect/contract/states.py has the daemon's finer one. */
enum phase {
	CREATING,   /* runc create runs */
	RUNNING,    /* the init lives */
	DUMPING,    /* the init is about to be checkpointed; its end may be a hibernation */
	HIBERNATED, /* a committed checkpoint stands for the init */
	RESTORING,  /* CRIU runs */
};

static const char *const phase_names[] = { "creating", "running", "dumping", "hibernated", "restoring" };

enum { CLIENTS = 16, ORPHANS = 8, ARGUMENTS = 1024, RECIPE_MAX = 1 << 18 };

/* The longest that a signal waits for a woken program that computes instead of waiting. */
enum { SETTLE_MS = 100 };

static struct {
	enum phase phase;
	pid_t init, job, pager;
	int directory, listener, signals, ready;
	int init_status;            /* wait status of the last init; valid while init == 0 */
	unsigned long long pending; /* signals (bit n - 1: number n) for when the init lives again */
	int syscall;                /* /proc/INIT/syscall until the restored init has settled, or -1 */
	struct timespec settled_by; /* CLOCK_MONOTONIC; it is taken to have settled then */
	int ending;                 /* somebody killed the container: its end is no hibernation */
	int eager;                  /* the present restore does without the pager */
	int links;                  /* network interfaces that the checkpointed init had */
	int restore_waits;          /* a restore begins as soon as the pager has read the checkpoint */
	int images;                 /* directory of the armed checkpoint, or -1 */
	int restore_status;         /* wait status of the last failed restore */
} self = { .directory = -1, .listener = -1, .signals = -1, .ready = -1, .images = -1, .syscall = -1 };

enum awaiting { NOTHING, END_OF_DUMP, AWAKE };

static struct client {
	int fd, watching;
	enum awaiting awaiting;
} clients[CLIENTS];

/* Children that ended before they were known to be the init. */
static struct {
	pid_t pid;
	int status;
} orphans[ORPHANS];
static unsigned orphan_next;

static void start_restore(int eager);

static int exit_code(int status)
{
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static _Noreturn void leave(int code)
{
	if (self.pager > 0)
		kill(self.pager, SIGKILL);
	_exit(code);
}

/* ---- replies ------------------------------------------------------------------------------------ */

static void say(int fd, const char *format, ...)
{
	char text[MESSAGE_MAX];
	va_list values;
	int length;

	va_start(values, format);
	length = vsnprintf(text, sizeof text, format, values);
	va_end(values);
	send(fd, text, length, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void say_status(int fd)
{
	const struct pager_status *pager = pager_status();

	say(fd, "ok phase=%s init=%d keeper=%d pager=%d pager_state=%d pages=%lu left=%lu faults=%lu "
		"restore_status=%d",
	    phase_names[self.phase], self.init, getpid(), self.pager, (int)pager->state,
	    (unsigned long)pager->pages_total, (unsigned long)pager->pages_left,
	    (unsigned long)pager->faults, self.restore_status);
}

static void tell_watchers(void)
{
	for (int i = 0; i < CLIENTS; i++)
		if (clients[i].fd >= 0 && clients[i].watching)
			say_status(clients[i].fd);
}

static int anyone_awaits(enum awaiting what)
{
	for (int i = 0; i < CLIENTS; i++)
		if (clients[i].fd >= 0 && clients[i].awaiting == what)
			return 1;
	return 0;
}

/* Answers everybody who waits for what; with an error if there is one, else with the status. */
static void answer_awaiting(enum awaiting what, const char *error)
{
	for (int i = 0; i < CLIENTS; i++) {
		if (clients[i].fd < 0 || clients[i].awaiting != what)
			continue;
		clients[i].awaiting = NOTHING;
		if (error)
			say(clients[i].fd, "error %s", error);
		else
			say_status(clients[i].fd);
	}
}

static void enter_phase(enum phase phase)
{
	self.phase = phase;
	if (phase == RUNNING)
		asleep_end();
	tell_watchers();
}

/* ---- children ----------------------------------------------------------------------------------- */

/* Starts a program in the engine's namespaces, with the container's stdio. */
static pid_t start(char **argv, int netns)
{
	sigset_t none;
	pid_t child = fork();

	if (child)
		return child;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (netns >= 0)
		dup2(netns, RESTORE_NETNS_FD);
	namespaces_leave();
	if (netns >= 0)
		namespaces_enter_cgroup();
	execv(argv[0], argv);
	_exit(127);
}

static int read_pid(const char *name)
{
	char text[16] = "";
	int fd = openat(self.directory, name, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return 0;
	if (read(fd, text, sizeof text - 1) < 0)
		text[0] = 0;
	close(fd);
	return atoi(text);
}

static int committed(void)
{
	struct stat link;

	return !fstatat(self.directory, "checkpoint", &link, AT_SYMLINK_NOFOLLOW);
}

static void arm_pager(void)
{
	/* The link's target is a path of the host, not of the container's mount namespace. */
	namespaces_leave();
	if (self.images >= 0)
		close(self.images);
	self.images = openat(self.directory, "checkpoint", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (self.images >= 0)
		pager_arm(self.images);
	namespaces_return();
}

static void deliver(int signal)
{
	if (signal == SIGKILL)
		self.ending = 1;
	kill(self.init, signal);
}

static int is_pending(int signal)
{
	return self.pending >> (signal - 1) & 1;
}

/* A restored init begins anew the system call that it was taken out of. A signal that comes before it is
 * back in there runs its handler, and then the call waits all the same, where the kernel would have cut
 * it short (EINTR, signal(7)): a program that acts after its wait would not act. */
static void watch_settling(void)
{
	char path[32];

	namespaces_leave();
	snprintf(path, sizeof path, "/proc/%d/syscall", self.init);
	if (self.syscall >= 0)
		close(self.syscall);
	self.syscall = open(path, O_RDONLY | O_CLOEXEC);
	clock_gettime(CLOCK_MONOTONIC, &self.settled_by);
	self.settled_by.tv_nsec += SETTLE_MS * 1000000;
	self.settled_by.tv_sec += self.settled_by.tv_nsec / 1000000000;
	self.settled_by.tv_nsec %= 1000000000;
}

/* proc_pid_syscall(5): a number in a system call, -1 when blocked elsewhere (a page), else "running". */
static int is_settling(void)
{
	struct timespec now;
	char text[1];

	if (self.syscall < 0)
		return 0;
	clock_gettime(CLOCK_MONOTONIC, &now);
	if ((now.tv_sec < self.settled_by.tv_sec ||
	     (now.tv_sec == self.settled_by.tv_sec && now.tv_nsec < self.settled_by.tv_nsec)) &&
	    pread(self.syscall, text, 1, 0) == 1 && (*text == 'r' || *text == '-'))
		return 1;
	close(self.syscall);
	self.syscall = -1;
	return 0;
}

static void deliver_pending(void)
{
	if (!self.pending || !self.init || self.phase != RUNNING)
		return;
	if (is_pending(SIGKILL))
		deliver(SIGKILL);
	else if (is_settling())
		return;
	for (int signal = 1; signal < NSIG; signal++)
		if (is_pending(signal))
			deliver(signal);
	self.pending = 0;
}

/* How many network interfaces the container has, lo included; 0 if that cannot be told. */
static int count_links(void)
{
	struct if_nameindex *links = if_nameindex();
	int count = 0;

	while (links && links[count].if_index)
		count++;
	if_freenameindex(links);
	return count;
}

/* The init is gone and its checkpoint is whole. */
static void hibernate(void)
{
	self.links = count_links();
	enter_phase(HIBERNATED);
	arm_pager();
	answer_awaiting(END_OF_DUMP, NULL);
	if (is_pending(SIGKILL))
		leave(128 + SIGKILL);
	if (self.pending || anyone_awaits(AWAKE))
		start_restore(0);
}

static void init_ended(int status)
{
	self.init = 0;
	self.init_status = status;
	/* CRIU ends programs by SIGKILL. One that left by itself, thawed after a commit that nobody
	 * confirmed, has gone further than its checkpoint and must not come back as it was. */
	if (self.phase == DUMPING && !self.ending && WIFSIGNALED(status) &&
	    WTERMSIG(status) == SIGKILL && committed()) {
		hibernate();
		return;
	}
	if (self.phase == RESTORING && !self.job) {
		/* It was ended because its pages would never have come. */
		start_restore(1);
		return;
	}
	if (self.phase != HIBERNATED && self.phase != RESTORING)
		leave(exit_code(status));
}

static void adopt(pid_t init)
{
	for (int i = 0; i < ORPHANS; i++)
		if (orphans[i].pid == init)
			leave(exit_code(orphans[i].status));
	self.init = init;
	if (self.phase == RESTORING)
		watch_settling();
	namespaces_join(init);
	enter_phase(RUNNING);
	deliver_pending();
	answer_awaiting(AWAKE, NULL);
}

static void created(int status)
{
	pid_t init = status ? 0 : read_pid("init.pid");
	char code = init ? 0 : status ? exit_code(status) : 1;

	if (init) {
		cgroups_enter(init);
		adopt(init);
	}
	if (write(self.ready, &code, 1) != 1 || !init)
		leave(1);
	close(self.ready);
	self.ready = -1;
}

static void restored(int status)
{
	char text[64];
	pid_t init = status ? 0 : read_pid("restored.pid");

	if (init && !self.eager && pager_status()->state == PAGER_FAILED) {
		/* Restored, but there is nobody left who could bring its pages: its end is seen in init_ended. */
		self.init = init;
		kill(init, SIGKILL);
		return;
	}
	if (init) {
		adopt(init);
		return;
	}
	self.restore_status = status ? status : -1;
	if (!self.eager) {
		/* Whatever the pager's part in it was, CRIU can place every page by itself. */
		start_restore(1);
		return;
	}
	enter_phase(HIBERNATED);
	arm_pager();
	snprintf(text, sizeof text, "restore failed, CRIU's status %d", exit_code(self.restore_status));
	answer_awaiting(AWAKE, text);
	if (is_pending(SIGKILL))
		leave(128 + SIGKILL);
	self.pending = 0;
}

static void reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid == self.job) {
			self.job = 0;
			if (self.phase == CREATING)
				created(status);
			else
				restored(status);
		} else if (pid == self.init) {
			init_ended(status);
		} else if (pid == self.pager) {
			pager_reaped(status);
			self.pager = pager_spawn();
			tell_watchers();
		} else {
			orphans[orphan_next].pid = pid;
			orphans[orphan_next].status = status;
			orphan_next = (orphan_next + 1) % ORPHANS;
		}
	}
}

/* ---- restore ------------------------------------------------------------------------------------ */

/* Reads restore.argv; the words live in a buffer that only the short-lived caller keeps. */
static int read_recipe(char *buffer, char **argv, int room)
{
	int fd = openat(self.directory, "restore.argv", O_RDONLY | O_CLOEXEC), count = 0;
	ssize_t length = fd < 0 ? -1 : read(fd, buffer, RECIPE_MAX - 1);

	if (fd >= 0)
		close(fd);
	if (length <= 0)
		return 0;
	buffer[length] = 0;
	for (char *word = buffer; word < buffer + length && count < room; word += strlen(word) + 1)
		argv[count++] = word;
	return count;
}

static int pager_is_busy(void)
{
	const struct pager_status *pager = pager_status();

	return pager->state == PAGER_LOADING || pager->orders_done != pager->orders_given;
}

static void start_restore(int eager)
{
	struct recipe {
		char *argv[ARGUMENTS + 3];
		char words[RECIPE_MAX];
	} *recipe = malloc(sizeof *recipe);
	int count = recipe ? read_recipe(recipe->words, recipe->argv, ARGUMENTS) : 0;

	self.restore_waits = 0;
	if (!count) {
		free(recipe);
		self.pending = 0;
		enter_phase(HIBERNATED);
		answer_awaiting(AWAKE, "restore.argv cannot be read");
		return;
	}
	if (!eager && pager_is_busy()) {
		/* Woken right after it was hibernated: a few milliseconds that an eager restore would lose. */
		free(recipe);
		self.restore_waits = 1;
		enter_phase(RESTORING);
		return;
	}
	memset(orphans, 0, sizeof orphans);
	unlinkat(self.directory, "restored.pid", 0);
	self.eager = eager || pager_status()->state != PAGER_ARMED;
	if (!self.eager)
		recipe->argv[count++] = "--lazy-pages";
	/* `podman pod stop` takes the pod's network away and then signals: connections cannot be restored
	 * to addresses that are gone, but the program can be, and told to end. */
	if (eager && self.links > 1 && count_links() == 1)
		recipe->argv[count++] = "--tcp-close";
	recipe->argv[count] = NULL;
	enter_phase(RESTORING);
	self.job = start(recipe->argv, namespaces_net_fd());
	free(recipe);
}

/* ---- requests ----------------------------------------------------------------------------------- */

static void dump_begin(int fd, const char *container)
{
	enum pager_state pager = pager_status()->state;

	if (self.phase != RUNNING) {
		say(fd, "error cannot dump while %s", phase_names[self.phase]);
	} else if (pager == PAGER_FILLING || pager == PAGER_STALLED) {
		say(fd, "error memory is still being filled");
	} else if (committed()) {
		say(fd, "error an earlier checkpoint is still linked");
	} else {
		pager_disarm();
		asleep_begin(container);
		enter_phase(DUMPING);
		say_status(fd);
	}
}

static void dump_end(struct client *client)
{
	if (self.phase == DUMPING && committed()) {
		/* CRIU has ended the tasks; the last of them may still be freeing its memory. */
		client->awaiting = END_OF_DUMP;
		return;
	}
	if (self.phase == DUMPING) {
		enter_phase(RUNNING);
		deliver_pending();
		answer_awaiting(AWAKE, NULL);
	}
	say_status(client->fd);
}

static void wake(struct client *client)
{
	if (self.phase == RUNNING) {
		say_status(client->fd);
		return;
	}
	client->awaiting = AWAKE;
	if (self.phase == HIBERNATED)
		start_restore(0);
}

static void kill_request(int fd, int signal)
{
	if (!signal) {
		/* kill(2): a question whether it is there. */
	} else if (self.phase == RUNNING) {
		self.pending |= 1ULL << (signal - 1);
		deliver_pending();
	} else if (signal == SIGKILL && self.phase == HIBERNATED) {
		say(fd, "ok");
		leave(128 + SIGKILL);
	} else if (signal == SIGKILL && self.phase == DUMPING) {
		deliver(signal);
	} else {
		self.pending |= 1ULL << (signal - 1);
		if (self.phase == HIBERNATED)
			start_restore(0);
	}
	say(fd, "ok");
}

static void end(int fd, int code)
{
	say(fd, "ok");
	self.ending = 1;
	if (self.job)
		kill(self.job, SIGKILL);
	if (self.init)
		kill(self.init, SIGKILL);
	/* The init's end is this process's end; without an init there is nothing to wait for. */
	if (!self.init)
		leave(code);
}

static void request(struct client *client, char *text)
{
	char *value = strchr(text, ' ');
	int number = value ? atoi(value + 1) : 0;

	if (value)
		*value = 0;
	if (!strcmp(text, "status")) {
		say_status(client->fd);
	} else if (!strcmp(text, "watch")) {
		client->watching = 1;
		say_status(client->fd);
	} else if (!strcmp(text, "dump-begin")) {
		dump_begin(client->fd, value ? value + 1 : "");
	} else if (!strcmp(text, "dump-end")) {
		dump_end(client);
	} else if (!strcmp(text, "wake")) {
		wake(client);
	} else if (!strcmp(text, "arm") && self.phase == HIBERNATED) {
		/* The daemon has found the checkpoint unfit, and now tries what may have been put in its place. */
		arm_pager();
		say_status(client->fd);
	} else if (!strcmp(text, "kill") && number >= 0 && number < NSIG) {
		kill_request(client->fd, number);
	} else if (!strcmp(text, "exit")) {
		end(client->fd, number);
	} else {
		say(client->fd, "error unknown request %s", text);
	}
}

static void serve(struct client *client)
{
	char text[MESSAGE_MAX];
	ssize_t length = recv(client->fd, text, sizeof text - 1, MSG_DONTWAIT);

	if (length < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (length <= 0) {
		close(client->fd);
		*client = (struct client){ .fd = -1 };
		return;
	}
	text[length] = 0;
	request(client, text);
}

static void greet(void)
{
	int fd = accept4(self.listener, NULL, NULL, SOCK_CLOEXEC);

	for (int i = 0; fd >= 0 && i < CLIENTS; i++)
		if (clients[i].fd < 0) {
			clients[i] = (struct client){ .fd = fd };
			return;
		}
	if (fd >= 0) {
		say(fd, "error too many clients");
		close(fd);
	}
}

/* ---- set-up ------------------------------------------------------------------------------------- */

static int listen_at(const char *directory)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	if (snprintf(address.sun_path, sizeof address.sun_path, "%s/ctl", directory) >=
	    (int)sizeof address.sun_path)
		return -1;
	unlink(address.sun_path);
	if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, CLIENTS))
		return -1;
	chmod(address.sun_path, 0600);
	return fd;
}

/* The engine's descriptors must not live on in the keeper: conmon reserves published ports with
 * listening sockets that it leaves open across exec, and a port would stay taken for ever. */
static void close_inherited(int keep)
{
	if (keep > 3)
		syscall(SYS_close_range, 3, keep - 1, 0);
	syscall(SYS_close_range, keep + 1, ~0U, 0);
}

static void loop(void)
{
	struct pollfd set[CLIENTS + 3];

	for (;;) {
		set[0] = (struct pollfd){ .fd = self.signals, .events = POLLIN };
		set[1] = (struct pollfd){ .fd = self.listener, .events = POLLIN };
		set[2] = (struct pollfd){ .fd = pager_fd(), .events = POLLIN };
		for (int i = 0; i < CLIENTS; i++)
			set[3 + i] = (struct pollfd){ .fd = clients[i].fd, .events = POLLIN };
		if (poll(set, CLIENTS + 3, self.pending && self.phase == RUNNING ? 1 : -1) < 0)
			continue;
		deliver_pending();
		if (set[0].revents) {
			struct signalfd_siginfo information;

			while (read(self.signals, &information, sizeof information) > 0)
				;
			reap();
		}
		if (set[2].revents) {
			pager_acknowledge();
			if (self.restore_waits && !pager_is_busy())
				start_restore(0);
			tell_watchers();
		}
		for (int i = 0; i < CLIENTS; i++)
			if (clients[i].fd >= 0 && clients[i].fd == set[3 + i].fd && set[3 + i].revents)
				serve(&clients[i]);
		if (set[1].revents)
			greet();
	}
}

int main(int argc, char **argv)
{
	const int *outside;
	int outside_count;
	sigset_t set;

	if (argc < 5 || strcmp(argv[3], "--"))
		return 2;
	self.ready = atoi(argv[2]);
	close_inherited(self.ready);
	fcntl(self.ready, F_SETFD, FD_CLOEXEC);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	prctl(PR_SET_NAME, "architect-keeper");
	setsid();
	sigfillset(&set);
	sigprocmask(SIG_BLOCK, &set, NULL);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	self.signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	for (int i = 0; i < CLIENTS; i++)
		clients[i].fd = -1;
	self.directory = open(argv[1], O_PATH | O_DIRECTORY | O_CLOEXEC);
	self.listener = listen_at(argv[1]);
	if (self.directory < 0 || self.listener < 0 || self.signals < 0 ||
	    pager_init(self.directory))
		return 1;
	namespaces_remember_host();
	outside_count = cgroups_outside(&outside);
	pager_set_outside(outside, outside_count);
	/* Before the container's cgroup is entered: what the pager costs is not the container's. */
	self.pager = pager_spawn();
	self.job = start(argv + 4, -1);
	loop();
}
