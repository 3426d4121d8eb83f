/* The processes being filled: what each still misses, and handing it over.
 *
 * Why it exists: a page may be placed only if it is missing, at the address where the program has it by
 * now, and never again once the program has discarded it. So every userfaultfd event is applied in the
 * order the kernel gave it. The kernel sees to it that nothing is placed between an event and its reading:
 * UFFDIO_COPY and UFFDIO_ZEROPAGE then answer EAGAIN. Each attempt therefore looks up its page anew.
 *
 * What each task misses is kept here, in the pager's own memory. A successor starts from the images, where
 * all is missing, and applies the recorded events again: a page that was placed before answers EEXIST, a
 * page that was discarded after having been placed is covered by the recorded event.
 *
 * A limit of the kernel's: it queues the event of an munmap after it let go of the address space. Should
 * another thread mremap into just that hole and be faster, the two events come in the wrong order.
 *
 * Who calls it: pager.c. Source: userfaultfd(2), ioctl_userfaultfd(2), the kernel's fs/userfaultfd.c.
 */
#define _GNU_SOURCE
#include "pager_tasks.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "pager_shared.h"
#include "pager_task.h"
#include "uffd.h"

/* Bytes placed between two looks for page faults; read ahead of filling; left in the page cache behind it. */
enum { CHUNK = 256 << 10, AHEAD = 512 << 10, BEHIND = 4 << 20 };
/* How long filling leaves the disk alone with what it was asked to read ahead. */
enum { DISK_NS = 100000000 };
/* Events read from one task before the next has its turn. */
enum { EVENTS_A_TURN = 64 };

struct checkpoint *checkpoint;
struct task *tasks;
static unsigned task_room;
static uint64_t last_fault;
static size_t last_index; /* of the pages file that filling last read from */
static uint64_t last_behind;

uint64_t monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

uint64_t tasks_last_fault_ns(void)
{
	return last_fault;
}

int tasks_loaded(void)
{
	return checkpoint != NULL;
}

/* ---- what is missing ------------------------------------------------------------------------------ */

int is_missing(const struct task *task, uint64_t page)
{
	return task->missing && task->missing[page / 64] >> page % 64 & 1;
}

void clear_missing(struct task *task, uint64_t page)
{
	if (!is_missing(task, page))
		return;
	task->missing[page / 64] &= ~(1ULL << page % 64);
	task->left--;
	shared->status.pages_left--;
}

uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t last_page(const struct range *range)
{
	return range->page + (range->end - range->start) / page_size();
}

/* First missing page of [page, end) that can be read, or end. */
static uint64_t next_missing(const struct task *task, uint64_t page, uint64_t end)
{
	for (; page < end; page++) {
		uint64_t word = task->missing[page / 64] >> page % 64;

		if (!word) {
			page |= 63;
			continue;
		}
		page += (uint64_t)__builtin_ctzll(word);
		if (page >= end || !pages_are_damaged(task->pages, page))
			break;
	}
	return page < end ? page : end;
}

/* How many pages from page on, fewer than limit, are all missing and readable. */
uint64_t run_length(const struct task *task, uint64_t page, uint64_t limit)
{
	uint64_t length = 0;

	while (length < limit && is_missing(task, page + length) &&
	       !pages_are_damaged(task->pages, page + length))
		length++;
	return length;
}

static void forget(struct task *task)
{
	shared->status.pages_left -= task->left;
	ranges_free(&task->ranges);
	free(task->missing);
	memset(task, 0, sizeof *task);
}

static int reserve(unsigned index)
{
	unsigned room = task_room ? task_room : 16;
	struct task *larger;

	if (index < task_room)
		return 0;
	while (room <= index)
		room *= 2;
	larger = realloc(tasks, room * sizeof *larger);
	if (!larger)
		return -ENOMEM;
	memset(larger + task_room, 0, (room - task_room) * sizeof *larger);
	tasks = larger;
	task_room = room;
	return 0;
}

static void count_in(const struct task *task)
{
	shared->status.pages_left += task->left;
	shared->status.pages_total += task->left;
}

/* All pages that the checkpoint has for a process of CRIU's. */
static int start_task(unsigned index, const struct pagemap *map)
{
	struct task *task;

	if (!map)
		return -ESRCH;
	if (reserve(index))
		return -ENOMEM;
	task = &tasks[index];
	task->pages = &checkpoint->pages[map->pages];
	task->pages_index = map->pages;
	task->missing = calloc(task->pages->count / 64 + 1, sizeof *task->missing);
	if (!task->missing || ranges_copy(&task->ranges, &map->lazy))
		return -ENOMEM;
	for (size_t i = 0; i < map->lazy.count; i++)
		for (uint64_t page = map->lazy.at[i].page; page < last_page(&map->lazy.at[i]); page++)
			task->missing[page / 64] |= 1ULL << page % 64;
	task->left = map->lazy_pages;
	count_in(task);
	return 0;
}

/* A fork misses what its parent missed. */
static int start_fork(unsigned index, unsigned parent)
{
	const struct task *from;
	struct task *task;
	size_t words;

	if (reserve(index))
		return -ENOMEM;
	task = &tasks[index];
	from = &tasks[parent];
	if (!from->missing)
		return 0;
	task->pages = from->pages;
	task->pages_index = from->pages_index;
	words = task->pages->count / 64 + 1;
	task->missing = malloc(words * sizeof *task->missing);
	if (!task->missing || ranges_copy(&task->ranges, &from->ranges))
		return -ENOMEM;
	memcpy(task->missing, from->missing, words * sizeof *task->missing);
	task->left = from->left;
	count_in(task);
	return 0;
}

/* ---- events --------------------------------------------------------------------------------------- */

/* What was in [start, end) is not to be placed any more. */
static int discard(struct task *task, uint64_t start, uint64_t end)
{
	struct ranges gone = { 0 };
	int error = ranges_take(&task->ranges, start, end, &gone);

	for (size_t i = 0; i < gone.count; i++)
		for (uint64_t page = gone.at[i].page; page < last_page(&gone.at[i]); page++)
			clear_missing(task, page);
	ranges_free(&gone);
	return error;
}

static int move(struct task *task, uint64_t from, uint64_t to, uint64_t length)
{
	struct ranges moved = { 0 };
	int error = ranges_take(&task->ranges, from, from + length, &moved);

	if (!error)
		error = discard(task, to, to + length);
	for (size_t i = 0; i < moved.count && !error; i++) {
		struct range range = moved.at[i];

		range.start += to - from;
		range.end += to - from;
		error = ranges_insert(&task->ranges, range);
	}
	ranges_free(&moved);
	return error;
}

static void record_task(unsigned index, int pid, int fd)
{
	struct task_record *record = &shared->tasks[index];

	record->pid = pid;
	record->fd = fd;
	record->state = TASK_OPEN;
	/* Events and page faults are looked for with poll: a read must never wait. */
	fcntl(fd, F_SETFL, O_NONBLOCK);
}

static void record_fork(struct event_record *event)
{
	uint32_t count = shared->task_count;

	if (!event->child) {
		record_task(count, 0, (int)event->msg.arg.fork.ufd);
		COMMIT(event->child, count + 1);
	}
	/* Not in the branch: a pager may have been killed between the two. */
	if (event->child > count) {
		COMMIT(shared->task_count, event->child);
		shared->status.tasks++;
	}
}

static int apply(struct event_record *event)
{
	struct task *task = &tasks[event->task];
	const struct uffd_msg *msg = &event->msg;

	switch (msg->event) {
	case UFFD_EVENT_REMOVE:
	case UFFD_EVENT_UNMAP:
		return discard(task, msg->arg.remove.start, msg->arg.remove.end);
	case UFFD_EVENT_REMAP:
		return move(task, msg->arg.remap.from, msg->arg.remap.to, msg->arg.remap.len);
	case UFFD_EVENT_FORK:
		record_fork(event);
		return start_fork(event->child - 1, event->task);
	default:
		return 0;
	}
}

void or_die(int error)
{
	/* Half-applied events cannot be undone: a successor starts afresh. */
	if (error)
		_exit(1);
}

/* Reads one event into the record. Returns 1, 0 if there is none, or -errno. */
static int read_event(unsigned index)
{
	struct event_record *event = &shared->events[shared->event_count];

	if (shared->event_count == EVENTS_MAX || shared->task_count == TASKS_MAX)
		return -ENOSPC;
	*(volatile uint32_t *)&event->task = index;
	if (read(shared->tasks[index].fd, &event->msg, sizeof event->msg) != sizeof event->msg)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	COMMIT(shared->event_count, shared->event_count + 1);
	shared->progress++;
	if (event->msg.event == UFFD_EVENT_PAGEFAULT) {
		shared->status.faults++;
		last_fault = monotonic_ns();
	}
	or_die(apply(event));
	return 1;
}

enum outcome tasks_read_events(unsigned index)
{
	int result = 1;

	for (int i = 0; i < EVENTS_A_TURN && result > 0; i++)
		result = read_event(index);
	if (result >= 0)
		return PLACED;
	/* EMFILE: a fork's userfaultfd found no room; the event stays in the queue. */
	shared->status.error = -result;
	return NO_MEMORY;
}

/* ---- filling -------------------------------------------------------------------------------------- */

struct run {
	uint64_t address, page, count;
};

/* The next pages to place, from the task's cursor to the end. */
static int next_run(struct task *task, struct run *run)
{
	uint64_t size = page_size();

	for (size_t i = ranges_search(&task->ranges, task->cursor); i < task->ranges.count; i++) {
		const struct range *range = &task->ranges.at[i];
		uint64_t skip = task->cursor > range->start ? (task->cursor - range->start) / size : 0;
		uint64_t end = last_page(range);
		uint64_t page = next_missing(task, range->page + skip, end);

		if (page == end)
			continue;
		run->page = page;
		run->address = task->cursor = range->start + (page - range->page) * size;
		run->count = run_length(task, page, least(end - page, CHUNK / size));
		return 1;
	}
	task->cursor = 0;
	return 0;
}

/* Frees the page cache behind filling: an image must not fill the node's memory a second time. */
static void drop_behind(const struct task *task, uint64_t page)
{
	uint64_t pages = BEHIND / page_size(), window = page / pages;

	if (window == last_behind && task->pages_index == last_index)
		return;
	if (last_behind != UINT64_MAX)
		checkpoint_drop_cache(checkpoint, last_index, last_behind * pages, pages);
	last_behind = window;
	last_index = task->pages_index;
}

/* How many pages of the run to place now. The disk reads on ahead of filling; what it has not brought yet is
 * left for later, as page faults would have to wait with it. */
static uint64_t ready(struct task *task, const struct run *run)
{
	uint64_t pages = AHEAD / page_size(), start = run->page / pages * pages, count;

	if (start != task->ahead || !task->asked_ahead) {
		pages_read_ahead(task->pages, start, 2 * pages);
		task->ahead = start;
		task->asked_ahead = monotonic_ns();
	}
	count = pages_in_memory(task->pages, run->page, run->count);
	/* A read that failed shows only when it is tried again and waited for. */
	return count || monotonic_ns() - task->asked_ahead < DISK_NS ? count : run->count;
}

static enum outcome fill_task(unsigned index)
{
	struct task *task = &tasks[index];
	struct run run;

	/* Twice: once from where it was to the end, once from the start. */
	if (!task->left || (!next_run(task, &run) && !next_run(task, &run)))
		return NOTHING;
	drop_behind(task, run.page);
	run.count = ready(task, &run);
	return run.count ? place(index, run.address, run.page, run.count) : BUSY;
}

static void close_task(unsigned index)
{
	struct task_record *record = &shared->tasks[index];

	COMMIT(record->state, TASK_CLOSING);
	close(record->fd);
	COMMIT(record->state, TASK_CLOSED);
	shared->status.tasks--;
	if (index < task_room)
		forget(&tasks[index]);
}

/* The oldest first: once it is complete, its later forks miss nothing. */
enum outcome tasks_fill(void)
{
	enum outcome best = NOTHING;

	for (uint32_t i = 0; i < shared->task_count; i++) {
		enum outcome outcome = NOTHING;

		if (shared->tasks[i].state == TASK_OPEN)
			outcome = fill_task(i);
		if (outcome == TASK_GONE)
			close_task(i);
		if (outcome == PLACED || outcome == UNREADABLE || outcome == TASK_GONE)
			return PLACED;
		if (outcome < best)
			best = outcome;
	}
	return best;
}

void tasks_close_complete(void)
{
	for (uint32_t i = 0; i < shared->task_count; i++)
		if (shared->tasks[i].state == TASK_OPEN && !tasks[i].left)
			close_task(i);
}

void tasks_close_dead(void)
{
	for (uint32_t i = 0; i < shared->task_count; i++)
		if (shared->tasks[i].state == TASK_OPEN && uffd_has_ended(shared->tasks[i].fd))
			close_task(i);
}

/* ---- begin, go on, end ---------------------------------------------------------------------------- */

int tasks_adopt(int pid, int fd)
{
	const struct pagemap *map = checkpoint ? checkpoint_find(checkpoint, pid) : NULL;
	uint32_t index = shared->task_count;

	/* The last pager may have been killed right after it had recorded this one. */
	if (index && shared->tasks[index - 1].fd == fd && shared->tasks[index - 1].pid == pid)
		return 0;
	if (index == TASKS_MAX)
		return -ENOSPC;
	record_task(index, pid, fd);
	COMMIT(shared->task_count, index + 1);
	shared->status.tasks++;
	shared->progress++;
	return start_task(index, map);
}

/* Whether fd is still the userfaultfd that a killed pager was about to close: the number may have been
 * given to another file since. */
static int still_to_close(unsigned index)
{
	int fd = shared->tasks[index].fd;

	for (uint32_t i = 0; i < shared->task_count; i++)
		if (shared->tasks[i].state == TASK_OPEN && shared->tasks[i].fd == fd)
			return 0;
	return uffd_is_one(fd);
}

static void recover_events(void)
{
	struct event_record *next = &shared->events[shared->event_count];

	/* Read, but not yet counted. */
	if (shared->event_count < EVENTS_MAX && next->msg.event)
		COMMIT(shared->event_count, shared->event_count + 1);
	if (shared->event_count && shared->events[shared->event_count - 1].msg.event == UFFD_EVENT_FORK)
		record_fork(&shared->events[shared->event_count - 1]);
}

void tasks_recover(void)
{
	/* First the forks: only a recorded userfaultfd is safe from still_to_close. */
	recover_events();
	shared->status.tasks = 0;
	for (uint32_t i = 0; i < shared->task_count; i++) {
		struct task_record *record = &shared->tasks[i];

		if (record->state == TASK_CLOSING) {
			if (still_to_close(i))
				close(record->fd);
			COMMIT(record->state, TASK_CLOSED);
		}
		shared->status.tasks += record->state == TASK_OPEN;
	}
}

static int start_adopted(void)
{
	for (uint32_t i = 0; i < shared->task_count; i++) {
		const struct pagemap *map = checkpoint_find(checkpoint, shared->tasks[i].pid);
		int error = reserve(i);

		if (!error && shared->tasks[i].pid)
			error = start_task(i, map);
		if (error)
			return error;
	}
	return 0;
}

int tasks_load(struct checkpoint *of)
{
	int error;

	checkpoint = of;
	last_fault = 0;
	last_behind = UINT64_MAX;
	shared->status.pages_left = shared->status.pages_total = 0;
	error = start_adopted();
	for (uint32_t i = 0; i < shared->event_count && !error; i++)
		error = apply(&shared->events[i]);
	if (error) {
		tasks_forget();
		return error;
	}
	/* Those that are closed were needed until here: their forks inherited from them. */
	for (uint32_t i = 0; i < shared->task_count; i++)
		if (shared->tasks[i].state != TASK_OPEN)
			forget(&tasks[i]);
	return 0;
}

void tasks_forget(void)
{
	for (unsigned i = 0; i < task_room; i++)
		forget(&tasks[i]);
	free(tasks);
	tasks = NULL;
	task_room = 0;
	checkpoint = NULL;
	shared->status.pages_left = 0;
}
