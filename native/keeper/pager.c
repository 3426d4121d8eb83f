/* The pager: hands the memory of a restored container to it page by page; see pager.h for the keeper's view.
 *
 * Why it is a process of its own: it must not be in the container's cgroup, whose limits and freezer would
 * stop it, and it may die (a damaged disk, the OOM killer) without the keeper. Why it shares the keeper's
 * descriptors (CLONE_FILES): the kernel gives a process zeros for what is missing as soon as nobody holds
 * its userfaultfd. The keeper holds them without knowing, and only pages that are all in, or a process that
 * has ended, let the pager close one.
 *
 * Who calls it: keeper.c calls the functions of pager.h; everything below `run` is the child.
 */
#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pager_criu.h"
#include "pager_shared.h"
#include "pager_tasks.h"

/* Filling waits until the program had no page fault for QUIET, as its first reply must not wait for pages
 * nobody asked for, but no longer than LATEST after it runs. */
enum { QUIET_NS = 20000000, LATEST_NS = 60000000 };
/* Pauses before another attempt, by what it waits for. */
enum { BUSY_NS = 50000, MEMORY_NS = 5000000, ORDER_NS = 2000000, ENDED_NS = 1000000000 };
/* Pagers that may die in a row without placing a page. */
enum { DEATHS_MAX = 5 };
enum { OUTSIDE_ROOM = 16, FIXED_FDS = 3 };

struct pager_shared *shared;

static int to_pager = -1, to_keeper = -1; /* eventfd(2) */
static int keeper = -1;                   /* pidfd of the keeper: readable once it has ended */
static int outside[OUTSIDE_ROOM];
static int outside_count;

static _Noreturn void run(void);

/* ---- called by the keeper ------------------------------------------------------------------------- */

int pager_init(int work)
{
	void *memory = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		return -1;
	shared = memory;
	shared->directory = shared->listener = shared->connection = -1;
	shared->work = work;
	to_pager = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	to_keeper = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	keeper = (int)syscall(SYS_pidfd_open, getpid(), 0);
	return to_pager < 0 || to_keeper < 0 || keeper < 0 || fcntl(keeper, F_SETFD, FD_CLOEXEC) ? -1 : 0;
}

void pager_set_outside(const int *fds, int count)
{
	outside_count = count < OUTSIDE_ROOM ? count : OUTSIDE_ROOM;
	memcpy(outside, fds, (size_t)outside_count * sizeof *fds);
}

pid_t pager_spawn(void)
{
	/* Not fork(3): it cannot share the descriptors. Without CLONE_VM it is as safe as fork here, as
	 * the keeper has one thread. */
	long pid = syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);

	if (!pid)
		run();
	return (pid_t)pid;
}

static void notify(int fd)
{
	uint64_t one = 1;

	while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
		;
}

static void set_state(enum pager_state state)
{
	COMMIT(shared->status.state, state);
	notify(to_keeper);
}

/* What no pager survives is not tried again. Returns whether there was an order at all. */
static int give_up_orders(void)
{
	struct pager_status *status = &shared->status;
	int any = status->orders_done != status->orders_given;

	for (; status->orders_done != status->orders_given; status->orders_done++) {
		const struct order *order = &shared->orders[status->orders_done % ORDERS_MAX];

		/* It may have been taken up, all but counted. */
		if (order->kind == ORDER_ARM && order->directory != shared->directory)
			close(order->directory);
	}
	return any;
}

void pager_reaped(int wait_status)
{
	struct pager_status *status = &shared->status;
	int ordered;

	(void)wait_status; /* the reason for a death changes nothing */
	status->deaths = shared->progress == shared->progress_at_death ? status->deaths + 1 : 1;
	shared->progress_at_death = shared->progress;
	if (status->deaths < DEATHS_MAX)
		return;
	ordered = give_up_orders();
	if (!status->error)
		status->error = EIO;
	if (status->state == PAGER_FILLING || status->state == PAGER_STALLED)
		set_state(PAGER_STALLED);
	else if (ordered || (status->state != PAGER_IDLE && status->state != PAGER_DONE))
		set_state(PAGER_FAILED);
}

static int give_order(struct order order)
{
	struct pager_status *status = &shared->status;

	if (status->orders_given - status->orders_done >= ORDERS_MAX) {
		errno = EAGAIN;
		return -1;
	}
	shared->orders[status->orders_given % ORDERS_MAX] = order;
	status->deaths = 0;
	COMMIT(status->orders_given, status->orders_given + 1);
	notify(to_pager);
	return 0;
}

int pager_arm(int images)
{
	/* Opened anew, not duplicated: the position of the listing is the pager's alone. */
	int directory = openat(images, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (directory < 0)
		return -1;
	if (give_order((struct order){ ORDER_ARM, directory })) {
		close(directory);
		errno = EAGAIN;
		return -1;
	}
	return 0;
}

int pager_disarm(void)
{
	return give_order((struct order){ ORDER_DISARM, -1 });
}

const struct pager_status *pager_status(void)
{
	return &shared->status;
}

int pager_fd(void)
{
	return to_keeper;
}

void pager_acknowledge(void)
{
	uint64_t count;

	while (read(to_keeper, &count, sizeof count) < 0 && errno == EINTR)
		;
}

/* ---- the child: orders ---------------------------------------------------------------------------- */

static struct checkpoint checkpoint;
static int keeper_gone;

static enum pager_state state(void)
{
	return shared->status.state;
}

/* Keeps the records from being swapped out: the kernel writes events into them (pager_shared.h). Costs
 * nothing for what is not yet used. Without the privilege the risk is as small as it is. */
static void lock_records(void)
{
	mlock2(shared, sizeof *shared, MLOCK_ONFAULT);
}

/* Empties the records and frees their memory. Only where nobody would replay them: a record that outlived
 * its count would be taken for a new one. */
static void clear_records(void)
{
	munlock(shared, sizeof *shared); /* MADV_REMOVE refuses locked memory */
	if (madvise(shared->events, sizeof shared->events, MADV_REMOVE))
		memset(shared->events, 0, shared->event_count * sizeof *shared->events);
	shared->settled = 0;
	shared->event_count = 0;
	shared->task_count = 0;
}

static void forget_checkpoint(void)
{
	tasks_forget();
	checkpoint_free(&checkpoint);
}

/* Nothing is served any more: who misses a page waits, until it is killed or the retry succeeds. */
static void fail(enum pager_state how, int error)
{
	forget_checkpoint();
	shared->status.error = error;
	set_state(how);
}

/* Lets go of the present checkpoint. Returns whether that was possible: no living process needs it. */
static int release(void)
{
	struct pager_status *status = &shared->status;

	if (!criu_drain())
		return 0;
	tasks_close_dead();
	if (status->tasks)
		return 0;
	COMMIT(status->state, PAGER_IDLE);
	criu_hang_up();
	forget_checkpoint();
	clear_records();
	status->error = 0;
	status->pages_total = status->pages_left = status->faults = 0;
	status->t_running_ns = status->t_done_ns = 0;
	return 1;
}

static void use_directory(int directory)
{
	int old = shared->directory;

	/* Killed in between, the old one stays open: better than to close another file of the keeper's. */
	COMMIT(shared->directory, directory);
	if (old >= 0 && old != directory)
		close(old);
}

/* Takes up an order. Returns whether that was possible; resume does the rest. */
static int take_up(const struct order *order)
{
	if (order->kind == ORDER_ARM && state() == PAGER_STALLED) {
		tasks_close_dead();
		if (shared->status.tasks) {
			forget_checkpoint();
			use_directory(order->directory);
			set_state(PAGER_FILLING);
			return 1;
		}
	}
	if (!release())
		return 0;
	use_directory(order->kind == ORDER_ARM ? order->directory : -1);
	set_state(order->kind == ORDER_ARM ? PAGER_LOADING : PAGER_IDLE);
	return 1;
}

static int load(void)
{
	int error = checkpoint_load(&checkpoint, shared->directory);

	if (!error)
		error = tasks_load(&checkpoint);
	return -error;
}

static void resume_arming(void)
{
	int error = load();

	if (!error && shared->listener < 0 && shared->connection < 0)
		error = -criu_listen();
	if (error)
		fail(PAGER_FAILED, error);
	else if (shared->connection >= 0)
		set_state(PAGER_RESTORING);
	else
		set_state(PAGER_ARMED);
}

/* Goes on where the state says, after an order or another pager's death. */
static void resume(void)
{
	int error;

	if (tasks_loaded() || shared->status.deaths >= DEATHS_MAX)
		return;
	switch (state()) {
	case PAGER_LOADING:
	case PAGER_ARMED:
		resume_arming();
		break;
	case PAGER_RESTORING:
		error = shared->connection < 0 ? ECONNRESET : load();
		lock_records();
		if (error)
			fail(PAGER_FAILED, error);
		break;
	case PAGER_FILLING:
	case PAGER_STALLED:
		criu_hang_up();
		error = load();
		lock_records();
		if (error)
			fail(PAGER_STALLED, error);
		else
			set_state(PAGER_FILLING); /* what is unreadable is tried again */
		break;
	case PAGER_IDLE:
	case PAGER_DONE:
		criu_hang_up();
		break;
	case PAGER_FAILED:
		break; /* until release */
	}
}

static int ordered(void)
{
	return shared->status.orders_done !=
	       __atomic_load_n(&shared->status.orders_given, __ATOMIC_ACQUIRE);
}

static void carry_out_orders(void)
{
	struct pager_status *status = &shared->status;

	while (ordered() && take_up(&shared->orders[status->orders_done % ORDERS_MAX])) {
		COMMIT(status->orders_done, status->orders_done + 1);
		notify(to_keeper);
		resume();
	}
}

/* ---- the child: pages ----------------------------------------------------------------------------- */

static uint64_t earliest(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* How long to wait, at most, before the next attempt after this outcome, in ns. */
static uint64_t pause_after(enum outcome outcome)
{
	switch (outcome) {
	case BUSY:
		return BUSY_NS;
	case NO_MEMORY:
		return MEMORY_NS;
	default:
		return UINT64_MAX; /* until something happens */
	}
}

static uint64_t until_fill(void)
{
	uint64_t now = monotonic_ns(), start = shared->status.t_running_ns, due = start;


	if (tasks_last_fault_ns() > due)
		due = tasks_last_fault_ns();
	due = earliest(due + QUIET_NS, start + LATEST_NS);
	return due > now ? due - now : 0;
}

static void finish(void)
{
	const struct checkpoint *all = &checkpoint;

	shared->status.t_done_ns = monotonic_ns();
	criu_hang_up();
	for (size_t i = 0; i < all->pages_count; i++)
		checkpoint_drop_cache(all, i, 0, all->pages[i].count);
	forget_checkpoint();
	shared->status.error = 0;
	set_state(PAGER_DONE);
	clear_records();
}

/* Returns how long to wait before the next piece. */
static uint64_t fill(void)
{
	uint64_t wait = until_fill();
	enum outcome outcome;

	if (wait)
		return wait;
	outcome = tasks_fill();
	/* Right away: a program whose pages are all in must not ask the pager for new ones. */
	tasks_close_complete();
	if (outcome == NOTHING) {
		/* What is left cannot be read. Its process waits; others may end. */
		tasks_close_dead();
		if (!shared->status.tasks)
			finish();
		else if (state() != PAGER_STALLED)
			set_state(PAGER_STALLED);
		return ENDED_NS;
	}
	return outcome == PLACED ? 0 : pause_after(outcome);
}

/* One step of whatever there is to do; returns how long to wait for something new, in ns. */
static uint64_t work(void)
{
	uint64_t wait = UINT64_MAX;

	if (tasks_loaded())
		wait = pause_after(tasks_settle());
	if (tasks_loaded() && (state() == PAGER_FILLING || state() == PAGER_STALLED)) {
		wait = earliest(wait, fill());
	} else if (shared->status.tasks && state() != PAGER_RESTORING) {
		tasks_close_dead();
		if (!shared->status.tasks && state() == PAGER_STALLED)
			finish();
		wait = earliest(wait, ENDED_NS);
	}
	if (ordered())
		wait = earliest(wait, ORDER_NS);
	return wait;
}

/* ---- the child: waiting --------------------------------------------------------------------------- */

static void hear_criu(void)
{
	int error;

	switch (criu_read(&error)) {
	case CRIU_RUNNING:
		shared->status.t_running_ns = monotonic_ns();
		set_state(PAGER_FILLING);
		criu_hang_up();
		break;
	case CRIU_LOST:
		fail(PAGER_FAILED, error);
		break;
	case CRIU_NONE:
		break;
	}
}

static struct pollfd *fill_set(void)
{
	static struct pollfd *set;
	static uint32_t room;

	if (FIXED_FDS + shared->task_count > room) {
		room = FIXED_FDS + shared->task_count * 2;
		set = realloc(set, room * sizeof *set);
		if (!set)
			_exit(1);
	}
	set[0] = (struct pollfd){ to_pager, POLLIN, 0 };
	set[1] = (struct pollfd){ keeper_gone ? -1 : keeper, POLLIN, 0 };
	set[2] = (struct pollfd){ -1, POLLIN, 0 };
	if (state() == PAGER_ARMED)
		set[2].fd = shared->listener;
	if (state() == PAGER_RESTORING)
		set[2].fd = shared->connection;
	for (uint32_t i = 0; i < shared->task_count; i++) {
		int open = shared->tasks[i].state == TASK_OPEN && tasks_loaded();

		set[FIXED_FDS + i] = (struct pollfd){ open ? shared->tasks[i].fd : -1, POLLIN, 0 };
	}
	return set;
}

/* Waits for at most `longest` ns and takes in what has come. */
static void take_in(uint64_t longest)
{
	struct timespec limit = { (time_t)(longest / 1000000000), (long)(longest % 1000000000) };
	uint32_t count = shared->task_count;
	struct pollfd *set = fill_set();
	uint64_t orders;

	if (ppoll(set, FIXED_FDS + count, longest == UINT64_MAX ? NULL : &limit, NULL) <= 0)
		return;
	if (set[0].revents)
		(void)!read(to_pager, &orders, sizeof orders);
	if (set[1].revents)
		keeper_gone = 1;
	for (uint32_t i = 0; i < count; i++)
		if (set[FIXED_FDS + i].revents && tasks_read_events(i) == NO_MEMORY)
			/* The event stays in the queue, and poll would not wait. */
			nanosleep(&(struct timespec){ 0, MEMORY_NS }, NULL);
	if (set[2].revents && state() == PAGER_RESTORING)
		hear_criu();
	if (set[2].revents && state() == PAGER_ARMED && criu_accept()) {
		tasks_read_hot_ahead();
		lock_records();
		set_state(PAGER_RESTORING);
	}
}

static void become_pager(void)
{
	struct rlimit files;
	sigset_t all;

	/* Nothing but SIGKILL ends it: signals to the keeper's group are not meant for it. */
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	setsid();
	prctl(PR_SET_NAME, "architect-pager");
	prctl(PR_SET_TIMERSLACK, 1000); /* BUSY_NS is shorter than the default slack */
	umask(077);
	chdir("/");
	for (int i = 0; i < outside_count; i++)
		(void)!write(outside[i], "0", 1);
	/* Each fork of a program that misses pages costs a descriptor. */
	if (!getrlimit(RLIMIT_NOFILE, &files)) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
}

static _Noreturn void run(void)
{
	uint64_t wait = 0;

	become_pager();
	if (shared->status.orders_given) {
		tasks_recover();
		criu_recover();
	}
	carry_out_orders();
	resume();
	if (state() == PAGER_RESTORING)
		hear_criu(); /* the last word may have been received already */
	notify(to_keeper);
	for (;;) {
		/* Without a keeper its descriptors live as long as the pager: to the last page, then. */
		if (keeper_gone && !shared->status.tasks && state() != PAGER_RESTORING)
			_exit(0);
		take_in(wait);
		carry_out_orders();
		wait = work();
	}
}
